"""`unlearn list`: the registries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from jobs.progress import console
from jobs.session import load_plugins
from orchestrator.criteria import CRITERIA
from orchestrator.data import DATASETS
from orchestrator.forget_sets import FORGET_SETS
from orchestrator.localization import STRATEGIES
from orchestrator.metrics import COMPARISONS, METRICS
from orchestrator.models import MODELS
from orchestrator.proxies import PROXIES
from orchestrator.recipes import RECIPES
from orchestrator.registry import Entry, InputError, Registry, suggest
from orchestrator.unlearning import METHODS

REGISTRIES: dict[str, Registry[Any]] = {
    "recipes": RECIPES,
    "methods": METHODS,
    "strategies": STRATEGIES,
    "datasets": DATASETS,
    "models": MODELS,
    "forget-sets": FORGET_SETS,
    "proxies": PROXIES,
    "metrics": METRICS,
    "criteria": CRITERIA,
    "comparisons": COMPARISONS,
}


def run(what: str | None, plugins: Sequence[str]) -> None:
    """Print one catalogue, or all."""
    load_plugins(plugins)
    if what is not None and what not in REGISTRIES:
        raise InputError(f"unknown catalogue {what!r}; {suggest(what, REGISTRIES)}")
    for name in [what] if what else REGISTRIES:
        table = Table("name", "what it is", "options", title=name, title_justify="left")
        for entry in REGISTRIES[name].values():
            table.add_row(entry.name, entry.summary, _options(entry))
        console.print(table)


def _options(entry: Entry[Any]) -> str:
    return ", ".join(o.name if o.is_required else f"{o.name}={o.default}" for o in entry.options.values())
