"""What Optuna would try next: a function of the axes, the history, a number and a seed, so that it can be replayed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.axes import Axis, Distribution
from orchestrator.registry import canonical_json
from orchestrator.search import grid, listed, size
from orchestrator.seeds import numpy_generator

_TRIES = 8  # at a setting that was not chosen before, until any other is taken


def suggest(
    axes: Mapping[str, Axis],
    history: Sequence[tuple[Mapping[str, Any], float]],
    *,
    chosen: Sequence[Mapping[str, Any]],
    seed: int,
    is_maximised: bool,
) -> dict[str, Any]:
    """One value for each axis, by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011); none twice.

    `history`: what was tried with what came of it, oldest first; the first ten are drawn at random. `chosen`: all that
    was chosen before, tried or not; the setting is another, if there is another. The sampler is made anew for each
    number, so nothing but the arguments enters, and Optuna keeps no state that could be lost.
    """
    number, known = len(chosen), {canonical_json(setting) for setting in chosen}
    for again in range(_TRIES):
        where = (number, again) if again else (number,)
        found = _asked(axes, history, int(numpy_generator(seed, "optuna", *where).integers(2**31)), is_maximised)
        if canonical_json(found) not in known:
            return found
    others = [] if math.isinf(size(axes)) else [each for each in grid(axes) if canonical_json(each) not in known]
    return others[int(numpy_generator(seed, "optuna", number, "other").integers(len(others)))] if others else found


def _asked(
    axes: Mapping[str, Axis], history: Iterable[tuple[Mapping[str, Any], float]], stream: int, is_maximised: bool
) -> dict[str, Any]:
    import optuna  # takes half a second

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: _space(axis, optuna) for name, axis in axes.items()}
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
