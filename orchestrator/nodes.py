"""The nodes of a Ray cluster: one call on each of them, and the check that all of them see one storage root."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from orchestrator.registry import InputError
from orchestrator.store import Store

R = TypeVar("R")

FOLDER = "nodes"  # of the markers, for as long as a command runs
_ANSWER_SECONDS = 120.0  # for a node to start a process and answer; one that is leaving may never
_LATE_SECONDS = 5.0  # that a shared file system may take to show what another machine has written


class NoAnswerError(RuntimeError):
    """A node does not answer: it has left, or hangs."""


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    name: str  # host and address, for people
    resources: Mapping[str, float]
    is_ours: bool  # the driver runs there

    @property
    def cores(self) -> float:
        return float(self.resources.get("CPU", 0))


def alive() -> list[Node]:
    """The nodes of the cluster that we are connected to, the driver's own first."""
    import ray
    from ray.util.client import ray as client

    ours = "" if client.is_connected() else ray.get_runtime_context().get_node_id()  # type: ignore[no-untyped-call]
    found = [
        Node(
            n["NodeID"], f"{n['NodeManagerHostname']} ({n['NodeManagerAddress']})", n["Resources"], n["NodeID"] == ours
        )
        for n in ray.nodes()  # type: ignore[no-untyped-call]
        if n["Alive"]
    ]
    return sorted(found, key=lambda node: (not node.is_ours, node.name, node.id))


def on_each(
    nodes: Sequence[Node], function: Callable[..., R], *inputs: Any, seconds: float = _ANSWER_SECONDS
) -> list[R | Exception]:
    """`function(*inputs)` once on every node, at the same time, on no core of it; or what it raised.

    NoAnswerError stands for a node that has left, or is silent for so many seconds.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(function)
    places = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in nodes]
    calls = [remote.options(num_cpus=0, max_retries=0, scheduling_strategy=p).remote(*inputs) for p in places]
    deadline = time.monotonic() + seconds
    answers: list[R | Exception] = []
    for call in calls:
        try:
            answers.append(ray.get(call, timeout=max(0.0, deadline - time.monotonic())))
        except GetTimeoutError:
            ray.cancel(call, force=True)
            answers.append(NoAnswerError(f"no answer within {seconds:g} s"))
        except RayTaskError as error:
            answers.append(error.cause if isinstance(error.cause, Exception) else error)
        except RayError as error:
            answers.append(NoAnswerError(reason(error)))
    return answers


@contextlib.contextmanager
def one_root(store: Store, name: str) -> Iterator[None]:
    """Check that every node with cores sees the store that the driver sees, and keep its marker for those to come.

    `name` is that of the marker. InputError, before anything is trained, names a node that does not see it, or whose
    own marker the driver does not see.
    """
    others = [node for node in alive() if not node.is_ours and node.cores]
    store.put(name, b"driver")
    try:
        strangers = unseen(store, name, others)
        if strangers:
            listed = "; ".join(f"{node.name}: {said}" for node, said in strangers[:3])
            more = f"; and {len(strangers) - 3} more" if len(strangers) > 3 else ""
            raise InputError(
                f"storage root {store.root!r} is not the same place on every node: {listed}{more}. Give --storage "
                "a folder that all nodes share (NFS, EFS, Lustre), at the same path, or s3://bucket/prefix with "
                "credentials on every node"
            )
        yield
    finally:
        store.delete(name)


def unseen(store: Store, name: str, nodes: Sequence[Node]) -> list[tuple[Node, str]]:
    """The nodes that cannot read the driver's marker or whose own the driver cannot read, each with the reason.

    One that does not answer is none of them: should it come back, its workers look for the marker themselves.
    """
    found = []
    for node, answer in zip(nodes, on_each(nodes, answer_marker, store, name), strict=True):
        if isinstance(answer, NoAnswerError):
            continue
        if isinstance(answer, Exception):
            found.append((node, reason(answer)))
        elif _soon(store, answer):
            store.delete(answer)
        else:
            found.append((node, "what it writes there cannot be read by the driver"))
    return found


def answer_marker(store: Store, name: str) -> str:
    """Read the marker `name`, and write one of this node's own; its name. Nothing is written where none is read."""
    brief = replace(store, patience_seconds=_LATE_SECONDS)
    brief.__dict__["filesystem"] = store.filesystem  # with the endpoint that the driver knows
    if not _soon(brief, name):
        raise FileNotFoundError("the driver's marker is not there")
    own = f"{FOLDER}/{secrets.token_hex(8)}"
    brief.put(own, b"node")
    return own


def reason(error: Exception) -> str:
    """One line on what went wrong on a node."""
    last = [line for line in str(error).splitlines() if line.strip()][-1:] or [type(error).__name__]
    return last[0].strip()[:300]


def _soon(store: Store, name: str) -> bool:
    deadline = time.monotonic() + _LATE_SECONDS
    while not store.exists(name):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
