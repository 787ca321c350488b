"""What Optuna would try next: a function of the axes, the history, a number and a seed, so that it can be replayed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.axes import Axis, Distribution
from orchestrator.search import listed
from orchestrator.seeds import numpy_generator


def suggest(
    axes: Mapping[str, Axis],
    history: Iterable[tuple[Mapping[str, Any], float]],
    *,
    number: int,
    seed: int,
    is_maximised: bool,
) -> dict[str, Any]:
    """One value for each axis, by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011).

    `history`: what was tried with what came of it, oldest first; the first ten are drawn at random. The sampler is made
    anew for each number, so nothing but the arguments enters, and Optuna keeps no state that could be lost.
    """
    import optuna  # takes half a second

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: _space(axis, optuna) for name, axis in axes.items()}
    stream = int(numpy_generator(seed, "optuna", number).integers(2**31))
    study = optuna.create_study(
        direction="maximize" if is_maximised else "minimize", sampler=optuna.samplers.TPESampler(seed=stream)
    )
    for values, objective in history:
        coded = {name: _coded(axes[name], value) for name, value in values.items()}
        study.add_trial(optuna.trial.create_trial(params=coded, distributions=space, value=objective))
    asked = study.ask(space).params
    return {name: _decoded(axis, asked[name]) for name, axis in axes.items()}


def _is_range(axis: Axis) -> bool:
    return isinstance(axis, Distribution) and axis.kind != "choice"


def _space(axis: Axis, optuna: Any) -> Any:
    if not isinstance(axis, Distribution) or axis.kind == "choice":
        return optuna.distributions.CategoricalDistribution(tuple(range(len(listed(axis)))))  # of any type, by place
    low, high = axis.values
    made = optuna.distributions.IntDistribution if axis.is_whole else optuna.distributions.FloatDistribution
    return made(low, high, log=axis.kind == "loguniform")


def _coded(axis: Axis, value: Any) -> Any:
    return value if _is_range(axis) else list(listed(axis)).index(value)


def _decoded(axis: Axis, value: Any) -> Any:
    if isinstance(axis, Distribution) and axis.kind != "choice":
        return axis.rounded(value)
    return listed(axis)[value]
