import hashlib
import re
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from orchestrator.localization import STRATEGIES
from orchestrator.models import MODELS
from orchestrator.registry import (
    Count,
    InputError,
    Positive,
    Registry,
    Share,
    ShareBelowOne,
    canonical_json,
    coerce,
    load_plugin,
    read_plugin,
)
from orchestrator.unlearning import METHODS


def is_one_sentence(error: BaseException) -> bool:
    text = str(error)
    return bool(text) and "\n" not in text and "Traceback" not in text


COERCED: list[tuple[object, Any, object]] = [
    (True, bool, True),
    ("true", bool, True),
    ("Off", bool, False),
    ("no", bool, False),
    (3, int, 3),
    (3.0, int, 3),
    ("-7", int, -7),
    (1, float, 1.0),
    ("1e-3", float, 0.001),
    ("-0.0", float, 0.0),
    ("text", str, "text"),
    ("none", str | None, None),
    (None, int | None, None),
    ("4", int | None, 4),
    (1.5, int | float, 1.5),
    ("b", Literal["a", "b"], "b"),
    ("2", Literal[1, 2], 2),
    ("1,2.0,3", tuple[float, ...], (1.0, 2.0, 3.0)),
    ([1, "2"], tuple[int, ...], (1, 2)),
    ("", tuple[int, ...], ()),
]


@pytest.mark.parametrize(("value", "annotation", "expected"), COERCED, ids=str)
def test_a_value_takes_the_one_form_of_its_annotation(value: object, annotation: Any, expected: object) -> None:
    result = coerce(value, annotation, "x")
    assert result == expected
    assert type(result) is type(expected)
    assert canonical_json(result) == canonical_json(expected)
    assert coerce(result, annotation, "x") == result


REFUSED: list[tuple[object, Any]] = [
    (1, bool),
    ("yep", bool),
    (True, int),
    (1.5, int),
    ("1.5", int),
    (float("inf"), int),
    (float("nan"), int),
    (True, float),
    ("nan", float),
    (float("inf"), float),
    (10**400, float),
    ([1.0], float),
    (3, str),
    (None, str),
    ("c", Literal["a", "b"]),
    (True, Literal[1, 2]),
    (1.0, Literal[1, 2]),
    ("1,x", tuple[int, ...]),
    (7, tuple[int, ...]),
    ("x", int | None),
    (float("nan"), float | None),
]


@pytest.mark.parametrize(("value", "annotation"), REFUSED, ids=str)
def test_a_value_without_such_a_form_is_refused(value: object, annotation: Any) -> None:
    with pytest.raises(InputError, match="option depth") as caught:
        coerce(value, annotation, "option depth")
    assert is_one_sentence(caught.value)


Toy = Registry[Any]


@pytest.fixture
def toys() -> Toy:
    registry: Toy = Registry("toy", frozenset({"base", "noise"}))

    @registry(version=3)
    def triple(base: int, *, factor: float = 3, name: str) -> tuple[int, float, str]:
        """Multiply.

        At length.
        """
        return base, factor, name

    return registry


def test_a_signature_is_the_schema(toys: Toy) -> None:
    entry = toys["triple"]
    assert (entry.name, entry.version, entry.summary, entry.kind) == ("triple", "3", "Multiply.", "toy")
    assert entry.inputs == {"base"}
    assert list(entry.options) == ["factor", "name"]
    assert [option.is_required for option in entry.options.values()] == [False, True]


def test_an_entry_is_given_its_inputs_and_no_others(toys: Toy) -> None:
    options = toys["triple"].resolve({"factor": "2", "name": "n"})
    assert toys["triple"]({"base": 5, "noise": 6}, options) == (5, 2.0, "n")


def test_defaults_are_coerced_like_given_values(toys: Toy) -> None:
    resolved = toys["triple"].resolve({"name": "n"})
    assert resolved == {"factor": 3.0, "name": "n"}
    assert type(resolved["factor"]) is float


def test_an_unknown_name_is_answered_with_the_nearest(toys: Toy) -> None:
    with pytest.raises(InputError, match=r"unknown toy 'tripel'; did you mean 'triple'\? allowed: triple"):
        toys["tripel"]


def test_an_unknown_option_is_answered_with_the_nearest(toys: Toy) -> None:
    with pytest.raises(InputError, match=r"toy triple has no option 'facter'; did you mean 'factor'\?"):
        toys["triple"].resolve({"facter": 1, "name": "n"})


def test_a_missing_required_option_is_named(toys: Toy) -> None:
    with pytest.raises(InputError, match="toy triple needs the option name"):
        toys["triple"].resolve({})


def test_a_duplicate_name_is_refused_and_the_first_stays(toys: Toy) -> None:
    first = toys["triple"].function

    def triple(base: int) -> int:
        return base

    with pytest.raises(InputError, match="'triple' is registered twice"):
        toys(triple)
    assert toys["triple"].function is first
    assert len(toys) == 1


def test_signatures_that_cannot_be_a_schema_are_refused(toys: Toy) -> None:
    def positional(base: int, depth: int = 1) -> None: ...

    def misspelt(bsae: int) -> None: ...

    def starred(base: int, **rest: int) -> None: ...

    def untyped(base: int, *, depth=1) -> None: ...  # type: ignore[no-untyped-def]

    for function, named in ((positional, "depth"), (misspelt, "bsae"), (starred, "rest"), (untyped, "depth")):
        with pytest.raises(InputError, match=named):
            toys(function)
    assert list(toys) == ["triple"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1, float("-inf")]}, {1, 2}, object()])
def test_json_without_one_form_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical_json(value)


def test_json_does_not_depend_on_the_order_of_fields() -> None:
    assert canonical_json({"b": 1, "a": (2, "ü")}) == canonical_json({"a": [2, "ü"], "b": 1}) == '{"a":[2,"ü"],"b":1}'


# ---- plugins -------------------------------------------------------------------------------------------------------

METHOD = '''
from orchestrator.unlearning import METHODS
@METHODS(version=2)
def {name}(model, *, strength: float = 1):
    """A method of the user's own."""
    return model
'''


@pytest.fixture
def forgotten_afterwards() -> Any:
    """Takes out of the process what a test's plugins put in."""
    from orchestrator import registry
    from orchestrator.unlearning import METHODS

    tables = (METHODS._entries, registry._plugin_hashes, registry._plugin_failures, sys.modules)
    before = [dict(table) for table in tables]  # type: ignore[call-overload]
    yield METHODS
    for table, kept in zip(tables, before, strict=True):
        for name in set(table) - set(kept):
            del table[name]


def test_a_plugin_file_adds_a_method_by_one_function(tmp_path: Path, forgotten_afterwards: Any) -> None:
    from orchestrator.specs import Method, key

    file = tmp_path / "my methods.py"
    file.write_text(METHOD.format(name="soften"))
    plugin = read_plugin(str(file))
    file.unlink()  # a worker has only the plugin, not the file
    load_plugin(plugin)
    entry = forgotten_afterwards["soften"]
    assert entry.version == "2+" + hashlib.sha256(METHOD.format(name="soften").encode()).hexdigest()[:12]
    assert entry.summary == "A method of the user's own."
    spec = Method(name="soften", options={"strength": "2"})
    assert spec.options == {"strength": 2.0}
    assert spec.entry({"model": "given"}, spec.options) == "given"
    assert len(key(spec)) == 32


def test_a_plugin_is_loaded_once(tmp_path: Path, forgotten_afterwards: Any) -> None:
    file = tmp_path / "once.py"
    file.write_text(METHOD.format(name="soften_once"))
    load_plugin(read_plugin(str(file)))
    first = forgotten_afterwards["soften_once"]
    load_plugin(read_plugin(str(file)))
    assert forgotten_afterwards["soften_once"] is first


def test_another_source_under_the_same_name_is_not_taken_for_loaded(tmp_path: Path, forgotten_afterwards: Any) -> None:
    for folder, name in (("a", "soften_a"), ("b", "soften_b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(METHOD.format(name=name))
    load_plugin(read_plugin(str(tmp_path / "a/same.py")))
    with pytest.raises(InputError, match="another source"):
        load_plugin(read_plugin(str(tmp_path / "b/same.py")))


def test_a_plugin_module_carries_the_hash_of_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten_afterwards: Any
) -> None:
    package = tmp_path / "users_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "methods.py").write_text(METHOD.format(name="soften_module"))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugin = read_plugin("users_package.methods")
    load_plugin(plugin)
    load_plugin(plugin)
    digest = hashlib.sha256(METHOD.format(name="soften_module").encode()).hexdigest()[:12]
    assert forgotten_afterwards["soften_module"].version == f"2+{digest}"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import no_such_module_anywhere", "ModuleNotFoundError.*no_such_module_anywhere"),
        ("raise RuntimeError('first line\\nsecond line')", "RuntimeError: first line"),
        (METHOD.format(name="identity"), "'identity' is registered twice"),
        (METHOD.format(name="soften_bad").replace("*, ", ""), "asks for 'strength'"),
    ],
)
def test_a_plugin_that_fails_says_why_in_one_sentence_every_time(
    tmp_path: Path, forgotten_afterwards: Any, source: str, said: str
) -> None:
    file = tmp_path / "faulty.py"
    file.write_text(METHOD.format(name="soften_before") + source)
    plugin = read_plugin(str(file))
    for _ in range(2):  # the second task of a worker must not find the plugin "loaded"
        with pytest.raises(InputError, match=said) as caught:
            load_plugin(plugin)
        assert is_one_sentence(caught.value)


@pytest.mark.parametrize("name", ["absent.py", "no.such.module", "not a module", "folder.py", "latin.py"])
def test_a_plugin_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.py").mkdir()
    Path("latin.py").write_bytes(b"x = '\xe9'")
    with pytest.raises(InputError, match=re.escape(repr(name))) as caught:
        read_plugin(name)
    assert is_one_sentence(caught.value)


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (Count, ["1", 7], [0, "-3", 1.5]),
        (Positive, ["1e-3", 2], [0, -0.1, "nan"]),
        (Share, [0, "1"], [-0.01, 1.01]),
        (ShareBelowOne, [0, "0.99"], [1, 2]),
    ],
)
def test_bounds_of_an_option_are_held(annotation: object, good: list[object], bad: list[object]) -> None:
    for value in good:
        assert coerce(value, annotation, "it") == float(value)  # type: ignore[arg-type]
    for value in bad:
        with pytest.raises(InputError, match=r"it is .*; allowed: a"):
            coerce(value, annotation, "it")


@pytest.mark.parametrize("registry", [METHODS, STRATEGIES, MODELS], ids=lambda registry: registry.kind)
def test_counts_and_rates_of_all_built_in_functions_are_bounded(registry: Registry[Any]) -> None:
    for entry in registry.values():
        for name in {"lr", "epochs", "batch_size", "width"} & set(entry.options):
            with pytest.raises(InputError, match=name):
                entry.resolve({name: -1})
