"""What a worker is given to do, under a name that says whether it is done, and a try at it that came to nothing."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from orchestrator import exact, results
from orchestrator.blocks import block_name, model_name
from orchestrator.specs import (
    CampaignSpec,
    LocalizationSpec,
    OriginalSpec,
    ProxiesSpec,
    RunSpec,
    ScoresSpec,
    SingleSpec,
    StandInSpec,
    key,
)
from orchestrator.store import Store

Kind = Literal["model", "block", "single", "original", "proxies", "localization", "run"]


@dataclass(frozen=True)
class Task:
    """A unit of work: one subset model, one single training for exact scores, one original, localization or run.

    Ten subset models make a block, which the worker that finishes the last of them puts together: a block is what a
    campaign consists of, and its models are what workers are given.
    """

    kind: Kind
    spec: CampaignSpec | SingleSpec | OriginalSpec | ProxiesSpec | LocalizationSpec | RunSpec
    block: int = 0
    member: int = 0

    @classmethod
    def of_run(cls, spec: RunSpec, name: str) -> Task:
        """The task of a run whose key is known, which takes time where runs are many."""
        task = cls("run", spec)
        vars(task)["object_name"] = f"rows/{name}.json"
        return task

    @property
    def label(self) -> str:
        """What the task is, in a few words."""
        if isinstance(self.spec, RunSpec):
            mask = self.spec.mask
            budget = f" {mask.budget:g}" if mask and mask.budget else ""
            by = f" by {mask.strategy.name}{budget}" if mask else ""
            return f"{self.spec.method.label}{by} on {self.spec.forget.rule.name}, seed {self.spec.seed}"
        if isinstance(self.spec, LocalizationSpec):
            return f"{self.spec.strategy.name} on {self.spec.forget.rule.name}"
        if isinstance(self.spec, CampaignSpec):
            return f"{self.member} of block {self.block}"
        if isinstance(self.spec, SingleSpec):
            return f"{exact.side(self.spec)}, seed {self.spec.seed}"
        return f"seed {(self.spec.original if isinstance(self.spec, ProxiesSpec) else self.spec).seed}"

    @property
    def objects(self) -> tuple[str, ...]:
        """The stored objects that say the task is done."""
        if isinstance(self.spec, ProxiesSpec):
            return tuple(map(scores_object, self.spec.each))
        return (self.object_name,)

    @cached_property
    def object_name(self) -> str:
        """The stored object that says the task is done; of a task that has one."""
        name = key(self.spec)
        return {
            "model": model_name(name, self.block, self.member),
            "block": block_name(name, self.block),
            "single": exact.single_object(name),
            "original": f"models/{name}.safetensors",
            "localization": f"localizations/{name}.safetensors",
            "run": f"rows/{name}.json",
        }[self.kind]


def scores_object(spec: ScoresSpec | StandInSpec) -> str:
    """The stored object that holds memorization scores, or what stands in for them."""
    if isinstance(spec, StandInSpec):
        return f"proxies/{key(spec)}.parquet"
    return f"scores/{key(spec)}.parquet"


def put_failure(store: Store, task: Task, error: str, trace: str = "") -> None:
    """Keep a try at a task that came to nothing, as an attempt."""
    results.put_attempt(store, attempt_of(task, "failed", error, trace))


def attempt_of(task: Task, status: str, error: str, trace: str = "") -> results.Attempt:
    """A try at a task, with all that is known of it here and now."""
    facts = {"host": socket.gethostname(), "time": time.time(), "kind": task.kind, "traceback": trace}
    whole = Task("block", task.spec, task.block).object_name if task.kind == "model" else None
    provenance = {**facts, "what": task.label, "objects": list(task.objects), "whole": whole}
    spec = task.spec.model_dump(mode="json")
    return results.Attempt(key(task.spec), spec, status, error, provenance)
