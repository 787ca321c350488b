"""What MLflow is given of a row or a campaign: parameters, numbers and points, under names that it takes."""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from orchestrator.costs import Stretch
from orchestrator.export import run_line
from orchestrator.results import Row

V = TypeVar("V")

MAX_NAME, MAX_PARAM, MAX_TAG = 250, 6000, 5000  # characters; the server cuts without a word, or refuses
MAX_PARAMS, MAX_ENTITIES = 100, 1000  # of one log_batch; more would be a second request
DIGEST = 32  # characters of a fingerprint that name a dataset; MLflow takes 36 at most

_ILLEGAL = re.compile(r"[^\w\-. :/]", re.ASCII)


def legal(name: str) -> str:
    """A name as MLflow takes it: letters, digits and `_-. :/`, no path that leads elsewhere, 250 characters at most."""
    plain = posixpath.normpath(_ILLEGAL.sub("_", name)).lstrip("/")
    plain = re.sub(r"(^|/)\.\.(?=/|$)", r"\1__", plain)
    return "_" if plain in ("", ".") else plain[:MAX_NAME]


def by_legal_name(items: Iterable[tuple[str, V]]) -> dict[str, V]:
    """Values under legal names; of two names that become one, the second keeps a part of its hash."""
    found: dict[str, V] = {}
    for name, value in items:
        plain = legal(name)
        if plain in found:
            plain = f"{plain[: MAX_NAME - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        found[plain] = value
    return found


def cut(text: str, most: int) -> str:
    """A text of `most` characters, that says where it was cut."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def typed_params(row: Row, arm: str) -> dict[str, str | int | float | bool]:
    """A row's parameters by name; options by the names of the exported column `options`. What is absent is left out."""
    line, training = run_line(row), row.spec["setting"]["training"]
    named = ("data", "model", "forget_set", "forget_draw", "method", "strategy", "granularity", "budget", "seed")
    params = {
        "arm": arm,
        **{name: line[name] for name in (*named, "original_seed", "numerics")},
        "fingerprint": row.spec["setting"]["data"],
        **{f"option.{name}": value for name, value in json.loads(line["options"]).items()},
        **{f"forget_set.{name}": value for name, value in row.spec["forget"]["rule"]["options"].items()},
        **{f"model.{name}": value for name, value in row.spec["setting"]["model"]["options"].items()},
        **{f"training.{name}": value for name, value in training.items()},
    }
    return {name: value for name, value in params.items() if value is not None}


def params(typed: Mapping[str, object]) -> dict[str, str]:
    """Parameters as MLflow keeps them: a hundred at most, the last of them holding what is more as JSON."""
    texts = by_legal_name((name, cut(str(value), MAX_PARAM)) for name, value in typed.items())
    if len(texts) <= MAX_PARAMS:
        return texts
    names = list(texts)
    more = {name: texts[name] for name in names[MAX_PARAMS - 1 :]}
    return {name: texts[name] for name in names[: MAX_PARAMS - 1]} | {"more": cut(json.dumps(more), MAX_PARAM)}


def numbers(row: Row, typed: Mapping[str, object]) -> dict[str, float]:
    """A row's numbers by name: metrics by split, measurements, and every parameter that is a number.

    MLflow compares parameters as text, so what is to be filtered by range must be a metric. What is not finite is left
    out: infinity would be kept as the largest number.
    """
    found = {f"{name}/{split}": value for name, values in row.metrics.items() for split, value in values.items()}
    found |= {f"measured/{name}": value for name, value in row.measurements.items()}
    found["measured/seconds"] = row.provenance["seconds"]
    found |= {
        f"param/{name}": float(value)
        for name, value in typed.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return by_legal_name((name, value) for name, value in found.items() if math.isfinite(value))


def points(row: Row, room: int) -> list[tuple[str, int, float]]:
    """A row's series as (name, epoch, value), epochs from 1, `room` points at most.

    Of longer ones every k-th epoch and the last are given; the store and the exported table `series` have all.
    """
    series = by_legal_name((f"epoch/{name}", values) for name, values in row.series.items())
    longest = max(map(len, series.values()), default=0)
    step = 1
    while sum(-(-len(values) // step) + 1 for values in series.values()) > room and step < longest:
        step += 1
    return [
        (name, epoch, value)
        for name, values in series.items()
        for epoch, value in enumerate(values, 1)
        if (epoch % step == 0 or epoch == len(values)) and math.isfinite(value)
    ][: max(room, 0)]


def campaign_params(stretch: Stretch) -> dict[str, str]:
    """A campaign's parameters by name."""
    spec = stretch.spec or {}
    setting = spec["setting"]
    return params(
        {
            "recipe": stretch.recipe,
            "data": stretch.data,
            "fingerprint": setting["data"],
            "model": setting["model"]["name"],
            **{f"model.{name}": value for name, value in setting["model"]["options"].items()},
            **{f"training.{name}": value for name, value in setting["training"].items()},
            "fraction": spec["fraction"],
            "seed": spec["seed"],
        }
    )


def commit_tags(commit: str | None) -> dict[str, str]:
    """The commit that code ran from, and whether it had been edited."""
    if not commit:
        return {}
    plain = commit.removesuffix("-dirty")
    return {"mlflow.source.git.commit": plain, "unlearn.git_dirty": str(plain != commit).lower()}
