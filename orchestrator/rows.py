"""The row of a finished run: its metrics, computed from its outputs, beside what the run itself measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator import results
from orchestrator.metrics import METRICS
from orchestrator.pipeline import Finished
from orchestrator.specs import RunSpec


def make_row(name: str, spec: RunSpec, finished: Finished, provenance: Mapping[str, Any]) -> results.Row:
    """The row of a finished run, its metrics computed from the outputs."""
    return results.Row(
        key=name,
        spec=spec.model_dump(mode="json"),
        metrics={metric: METRICS[metric]({"outputs": finished.outputs}, {}) for metric in METRICS},
        metric_versions={metric: METRICS[metric].version for metric in METRICS},
        series=finished.series,
        measurements=finished.measurements,
        layers=finished.layers,
        provenance={**provenance, results.COMPARABLE: results.comparable(spec.setting, spec.forget)},
    )
