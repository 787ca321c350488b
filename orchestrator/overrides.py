"""`--set field=value`: overrides of a study, typed and checked by its specs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import ValidationError

from orchestrator.arms import Arm
from orchestrator.axes import Distribution, parse
from orchestrator.registry import InputError, suggest
from orchestrator.search import Asha
from orchestrator.specs import ForgetSet, Named, Strategy
from orchestrator.study import Study
from orchestrator.tuning import Tuning
from orchestrator.unlearning import METHODS

T = TypeVar("T")
N = TypeVar("N", bound=Named)


class _ValueError(InputError):
    """A value that its field does not allow; `allowed` says what would be."""

    def __init__(self, place: str, value: object, allowed: str) -> None:
        self.allowed = allowed
        super().__init__(f"{place} is {value!r}; allowed: {allowed}")


def checked(build: Callable[[], T]) -> T:
    """Build a spec; what pydantic or a registry finds wrong becomes one InputError sentence."""
    try:
        return build()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        cause = (first.get("ctx") or {}).get("error")
        if isinstance(cause, InputError):
            raise InputError(str(cause)) from None
        allowed = first["msg"].removeprefix("Input should be ").partition(", unable")[0]
        raise _ValueError(place, first["input"], allowed[0].lower() + allowed[1:]) from None


def override(study: Study, assignments: Iterable[str]) -> Study:
    """Apply `field=value` texts in turn; see `assign` for what a field may be.

    A function named anew that has options without a default takes them from the texts that follow.
    """
    texts, changed = list(assignments), study
    for place, text in enumerate(texts):
        changed = assign(changed, text, dict(_split(later) for later in texts[place + 1 :]))
    changed.check_whole()  # not before: a strategy may be set before its budget
    changed.check_used(path.removeprefix("search.") for path, _ in map(_split, texts) if path.startswith("search."))
    return changed


def _split(assignment: str) -> tuple[str, str]:
    path, _, text = assignment.partition("=")
    return path, text


def assign(study: Study, assignment: str, later: Mapping[str, str] | None = None) -> Study:
    """Apply one `field=value`; `later` holds the values that follow by field.

    Fields of the study and of its parts (`references`, `seeds`, `training.epochs`, `campaign.models`), options of its
    functions (`data.train`, `model.width`, `forget_sets.random.fraction`), which `methods` and `forget_sets` take part,
    one arm's axes (`methods.del.lr=0.03,0.1`, `.budget`, `.strategy`, `.granularity`), or an axis of all arms and
    stages that have it (`lr=0.1`, `budget=0.1,0.3`). Raises InputError with what, got and allowed.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise InputError(f"--set takes field=value; got {assignment!r}")
    try:
        return _assigned(study, path, text, later or {})
    except _ValueError as error:
        raise InputError(f"{path} is {text!r}; allowed: {error.allowed}") from None


def _assigned(study: Study, path: str, text: str, later: Mapping[str, str]) -> Study:
    field, *rest = path.split(".")
    changes: Any
    if field in ("data", "model"):
        changes = _named(getattr(study, field), rest, text, path, later)
    elif field in ("training", "campaign", "search"):
        changes = _part(getattr(study, field), rest, text, path)
    elif field == "scheduler":
        changes = _scheduler(study.scheduler, rest, text, path, later)
    elif field == "forget_sets":
        changes = _forget_sets(study.forget_sets, rest, text, path, later)
    elif field == "methods":
        changes = _arms(study.methods, rest, text, path)
    elif field == "tuning":
        changes = _tuning(study, rest, text, path, later)
    elif field == "seeds" and not rest:
        changes = text.split(",")
    elif field in ("references", "forget_draw", "original_seed", "protocol", "scores") and not rest:
        changes = text
    elif not rest and any(_has(arm, field) for arm in study.methods.values()):
        kept = later["methods"].split(",") if "methods" in later else study.methods  # what is dropped fits anything
        field, changes = (
            "methods",
            {name: _everywhere(arm, path, text) if name in kept else arm for name, arm in study.methods.items()},
        )
    else:
        raise InputError(f"unknown field {path!r}; {suggest(path, _fields(study))}")
    changed: Study = _rebuild(study, field, changes)
    return changed


def _rebuild(spec: Any, field: str, value: Any) -> Any:
    fields = {name: getattr(spec, name) for name in type(spec).model_fields}
    return checked(lambda: type(spec)(**fields | {field: value}))


def _fields(study: Study) -> list[str]:
    """The fields that `--set` knows, for error messages."""
    named = [f"{part}.{option}" for part in ("data", "model") for option in getattr(study, part).entry.options]
    parts = [
        f"{p}.{field}" for p in ("training", "campaign", "search") for field in type(getattr(study, p)).model_fields
    ]
    arms = [each for arm in study.methods.values() for each in (arm, *arm.stages)]
    axes = {option for arm in arms for option in METHODS[arm.method].options}
    plain = [
        "data",
        "model",
        "references",
        "seeds",
        "protocol",
        "scores",
        "tuning",
        "tuning.criterion",
        "tuning.seeds",
        "tuning.draw",
        "tuning.references",
        "forget_draw",
        "original_seed",
        "forget_sets",
        "methods",
        "scheduler",
        *(f"scheduler.{field}" for field in Asha.model_fields),
    ]
    return [*plain, "budget", *named, *parts, *sorted(axes)]


def _new(kind: type[N], name: str, prefix: str, later: Mapping[str, str]) -> N:
    """A function by name, its options without a default taken from the values that follow."""
    needed = [option.name for option in kind.registry[name].options.values() if option.is_required]
    given = {option: later[f"{prefix}.{option}"] for option in needed if f"{prefix}.{option}" in later}
    return checked(lambda: kind(name=name, options=given))


def _named(named: N, rest: list[str], text: str, path: str, later: Mapping[str, str] | None = None) -> N:
    kind = type(named)
    if not rest:
        return _new(kind, text, path, later or {})
    if len(rest) > 1:
        raise InputError(f"unknown field {path!r}; {suggest(rest[0], named.entry.options)}")
    return checked(lambda: kind(name=named.name, options={**named.options, rest[0]: text}))


def _part(part: Any, rest: list[str], text: str, path: str) -> Any:
    if len(rest) != 1 or rest[0] not in type(part).model_fields:
        raise InputError(f"unknown field {path!r}; {suggest('.'.join(rest), type(part).model_fields)}")
    return _rebuild(part, rest[0], text)


def _scheduler(scheduler: Asha | None, rest: list[str], text: str, path: str, later: Mapping[str, str]) -> Asha | None:
    if rest and scheduler is None and "scheduler" not in later:
        raise InputError(
            f"{path} is set to {text} and no scheduler is; allowed: with --scheduler asha, which stops runs early "
            "(or with --scheduler none, which says that none is stopped)"
        )
    if rest:
        changed: Asha = _part(scheduler or Asha(), rest, text, path)
        return changed
    if text not in ("asha", "none"):
        raise InputError(f"scheduler is {text!r}; {suggest(text, ('asha', 'none'))}")
    return (scheduler or Asha()) if text == "asha" else None


def _forget_sets(
    rules: tuple[ForgetSet, ...], rest: list[str], text: str, path: str, later: Mapping[str, str]
) -> tuple[ForgetSet, ...]:
    by_name = {rule.name: rule for rule in rules}
    if not rest:
        return tuple(by_name.get(name) or _new(ForgetSet, name, f"{path}.{name}", later) for name in text.split(","))
    if rest[0] not in by_name:
        raise InputError(f"unknown field {path!r}; {suggest(rest[0], by_name)}")
    return tuple(_named(rule, rest[1:], text, path) if rule.name == rest[0] else rule for rule in rules)


def _tuning(study: Study, rest: list[str], text: str, path: str, later: Mapping[str, str]) -> Tuning | None:
    """The study's tuning with one field changed; `tuning=none` reports all settings, `.criterion` begins it."""
    tuning = study.tuning
    if not rest and text == "none":
        return None
    if not rest:
        raise InputError(f"tuning is {text!r}; allowed: none; to tune, set tuning.criterion={text}")
    if rest == ["criterion"] and tuning is None:
        return checked(lambda: Tuning(criterion=text))
    if tuning is None:
        raise InputError(f"{path} is set and the study is not tuned; set tuning.criterion first")
    if rest[:1] != ["forget_sets"]:
        fields = sorted({*Tuning.model_fields} - {"forget_sets"})
        if len(rest) != 1 or rest[0] not in fields:
            raise InputError(f"unknown field {path!r}; {suggest('.'.join(rest), [*fields, 'forget_sets.NAME'])}")
        last = checked(lambda: Tuning(criterion=later.get("tuning.criterion", tuning.criterion)))
        if rest[0] == "references" and not last.uses_references:
            raise InputError(f"{path} is set and the criterion {last.criterion} asks for no references; leave it out")
        changed: Tuning = _rebuild(tuning, rest[0], text.split(",") if rest[0] == "seeds" else text)
        return changed
    names = [rule.name for rule in study.forget_sets]
    if len(rest) < 2 or rest[1] not in names or (len(rest) > 2 and rest[1] not in tuning.forget_sets):
        raise InputError(f"unknown field {path!r}; {suggest('.'.join(rest[1:]), names)}, each first set to a rule")
    known = tuning.forget_sets.get(rest[1])
    rule = (
        _new(ForgetSet, text, path, later) if known is None or len(rest) == 2 else _named(known, rest[2:], text, path)
    )
    stands: Tuning = _rebuild(tuning, "forget_sets", {**tuning.forget_sets, rest[1]: rule})
    return stands


def _arms(arms: Mapping[str, Arm], rest: list[str], text: str, path: str) -> dict[str, Arm]:
    if not rest:
        chosen = {}
        for name in filter(None, text.split(",")):
            if name not in arms and name not in METHODS:
                raise InputError(f"unknown method {name!r}; {suggest(name, {*arms, *METHODS})}")
            chosen[name] = arms[name] if name in arms else _plain_arm(name)
        if not chosen:
            raise InputError(f"methods is {text!r}; {suggest(text, {*arms, *METHODS})}")
        return chosen
    if rest[0] not in arms:
        raise InputError(f"unknown field {path!r}; {suggest(rest[0], arms)}")
    return {name: _arm(arm, ".".join(rest[1:]), text, path) if name == rest[0] else arm for name, arm in arms.items()}


def _arm(arm: Arm, field: str, text: str, path: str) -> Arm:
    options = METHODS[arm.method].options
    part, _, option = field.partition(".")
    if field == "budget":
        changed: Arm = _rebuild(arm, "budget", _budgets(text))
    elif field in ("granularity", "h", "train_head", "freeze_statistics"):
        changed = _rebuild(arm, field, text)
    elif field == "scores":
        changed = _rebuild(arm, "scores", text.split(","))
    elif field == "stages":
        changed = _rebuild(arm, "stages", [_plain_arm(method) for method in text.split(",")])
    elif part == "stages":
        changed = _rebuild(arm, "stages", _stages(arm, option, text, path))
    elif field in ("strategy", "base"):
        changed = _rebuild(arm, field, None if text == "none" else checked(lambda: Strategy(name=text)))
    elif part in ("strategy", "base") and getattr(arm, part) is not None:
        changed = _rebuild(arm, part, _named(getattr(arm, part), [option], text, path))
    elif field in options:
        changed = _rebuild(arm, "options", {**arm.options, field: parse(text) or tuple(text.split(","))})
    else:
        raise InputError(f"unknown field {path!r}; {suggest(field, [*options, *set(Arm.model_fields) - _FIXED])}")
    return changed


def _budgets(text: str) -> list[str | None] | Distribution:
    drawn = parse(text)
    values = drawn.values if drawn else text.split(",")
    named = [None if share == "own" else share for share in values]
    return replace(drawn, values=tuple(named)) if drawn else named


def _plain_arm(method: str) -> Arm:
    return checked(lambda: Arm(method=method))


def _stages(arm: Arm, rest: str, text: str, path: str) -> list[Arm]:
    """The stages with one field of one of them changed: `1.lr`, counted from 1, the least memorized part's."""
    number, _, field = rest.partition(".")
    places = [str(place) for place in range(1, len(arm.stages) + 1)]
    if number not in places or not field:
        raise InputError(f"unknown field {path!r}; allowed: stages.{'|'.join(places) or 'N'}.FIELD")
    return [_arm(s, field, text, path) if place == number else s for place, s in zip(places, arm.stages, strict=True)]


_FIXED = {"method", "options"}  # fields of an arm that --set does not name


def _has(arm: Arm, axis: str) -> bool:
    """Whether an arm or a stage of it has an axis."""
    own = arm.strategy is not None if axis == "budget" else axis in METHODS[arm.method].options
    return own or any(_has(stage, axis) for stage in arm.stages)


def _everywhere(arm: Arm, axis: str, text: str) -> Arm:
    """The arm with an axis set in it and in its stages, where they have it."""
    stages = [_everywhere(stage, axis, text) for stage in arm.stages]
    if stages != list(arm.stages):
        arm = _rebuild(arm, "stages", stages)
    alone = arm.model_copy(update={"stages": ()})
    return _arm(arm, axis, text, axis) if _has(alone, axis) else arm
