"""Registries: a decorated function is a catalogue entry, and its signature is its schema.

The parameters that a registry offers are *inputs*; the remaining keyword-only parameters are *options*, which
the command line sets, keys hash and tables print. Plugins register the same way from a user's own module.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar

Value = bool | int | float | str | None | tuple[Any, ...]
M = TypeVar("M")
F = TypeVar("F", bound=Callable[..., Any])


class InputError(ValueError):
    """A user's input cannot be used; the message says what, got, allowed and, where there is one, the remedy."""


@dataclass(frozen=True)
class Bounds:
    """What numbers an option may be, as metadata of its annotation: `lr: Annotated[float, Bounds(above=0)]`."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def holds(self, number: Any) -> bool:
        """Whether a number is allowed; None, where an option may be none, is."""
        return number is None or (self.at_least <= number <= self.at_most and self.above < number < self.below)

    def __str__(self) -> str:
        named = {"from": self.at_least, "above": self.above, "to": self.at_most, "below": self.below}
        return " ".join(f"{word} {bound:g}" for word, bound in named.items() if math.isfinite(bound))


@dataclass(frozen=True)
class Added:
    """Marks an option that came after a release: at its default it stays out of keys, so that older keys hold."""


@dataclass(frozen=True)
class Fits:
    """Marks an option that must fit the model: `check(model, value)` raises InputError, before anything is trained."""

    check: Callable[[Any, Any], object]


@dataclass(frozen=True)
class File:
    """Marks an option that names a user's file: its content enters keys, its path does not."""


Count = Annotated[int, Bounds(at_least=1)]
Natural = Annotated[int, Bounds(at_least=0)]
Positive = Annotated[float, Bounds(above=0)]
NonNegative = Annotated[float, Bounds(at_least=0)]
Share = Annotated[float, Bounds(at_least=0, at_most=1)]
ShareBelowOne = Annotated[float, Bounds(at_least=0, below=1)]
PositiveShare = Annotated[float, Bounds(above=0, at_most=1)]
ProperShare = Annotated[float, Bounds(above=0, below=1)]


def suggest(got: str, allowed: Iterable[str]) -> str:
    """Word the part of an error that says what is allowed, the nearest name first."""
    names = sorted(allowed)
    near = difflib.get_close_matches(got, names, n=1)
    listed = f"allowed: {', '.join(names) or 'none'}"
    return f"did you mean {near[0]!r}? {listed}" if near else listed


def coerce(value: object, annotation: Any, what: str) -> Value:
    """Turn a value, or the text of one, into the one canonical form of its annotation.

    Annotations: bool, int, float, str, None, Literal, tuple[T, ...] and unions of these.
    Raises InputError naming `what` where the value has no such form or is not finite.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        number = coerce(value, arguments[0], what)
        if not all(bound.holds(number) for bound in arguments[1:] if isinstance(bound, Bounds)):
            raise InputError(f"{what} is {number}; allowed: {_spell(annotation)}")
        return number
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(value, arguments, what)
    if origin is Literal:
        for member in arguments:
            if (type(value) is type(member) and value == member) or value == str(member):
                return typing.cast(Value, member)
        raise InputError(f"{what} is {value!r}; {suggest(str(value), map(str, arguments))}")
    if origin is tuple:
        items = [part for part in value.split(",") if part] if isinstance(value, str) else value
        if isinstance(items, list | tuple):
            return tuple(coerce(item, arguments[0], what) for item in items)
    elif annotation is type(None):
        if value is None or value in ("none", "None", "null"):
            return None
    elif annotation in _SCALARS:
        try:
            return _SCALARS[annotation](value)
        except (TypeError, ValueError, OverflowError):
            pass
    else:
        raise TypeError(f"{what}: options of type {annotation!r} are not supported")
    raise InputError(f"{what} is {value!r}; allowed: {_spell(annotation)}")


def _coerce_union(value: object, members: tuple[Any, ...], what: str) -> Value:
    # None before the rest, so that the text 'none' is not taken for a string
    for member in sorted(members, key=lambda m: m is not type(None)):
        try:
            return coerce(value, member, what)
        except InputError:
            continue
    raise InputError(f"{what} is {value!r}; allowed: {' or '.join(_spell(m) for m in members)}")


def _bool(value: object) -> bool:
    named = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
    if isinstance(value, bool):
        return value
    return named[value.lower()] if isinstance(value, str) and value.lower() in named else _fail()


def _int(value: object) -> int:
    if isinstance(value, bool):
        _fail()
    number = int(value) if isinstance(value, str) else value
    return int(number) if isinstance(number, int | float) and number == int(number) else _fail()


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        _fail()
    number = float(value)
    return number + 0.0 if math.isfinite(number) else _fail()  # -0.0 + 0.0 is 0.0: one form for zero


def _str(value: object) -> str:
    return value if isinstance(value, str) else _fail()


def _fail() -> typing.NoReturn:
    raise ValueError


_SCALARS: dict[Any, Callable[[Any], Value]] = {bool: _bool, int: _int, float: _float, str: _str}


def _spell(annotation: Any) -> str:
    if annotation is type(None):
        return "none"
    if typing.get_origin(annotation) is typing.Annotated:
        kind, *bounds = typing.get_args(annotation)
        return " ".join([_spell(kind), *(str(bound) for bound in bounds if isinstance(bound, Bounds))])
    if typing.get_origin(annotation) is tuple:
        return f"a list of {_spell(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is Literal:
        return ", ".join(map(str, typing.get_args(annotation)))
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}.get(
        annotation, str(annotation)
    )


_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter that a user may set."""

    name: str
    annotation: Any
    default: Any

    @property
    def is_required(self) -> bool:
        return self.default is _REQUIRED

    def marks(self, kind: type[M]) -> list[M]:
        """The annotation's marks of a kind (Added, File, Fits)."""
        return [mark for mark in getattr(self.annotation, "__metadata__", ()) if isinstance(mark, kind)]

    def has_mark(self, kind: type) -> bool:
        return bool(self.marks(kind))


@dataclass(frozen=True)
class Entry(Generic[F]):
    """A registered function: its name, version, options, and the inputs that it asks for."""

    name: str
    function: F
    version: str
    inputs: frozenset[str]
    options: Mapping[str, Option]
    kind: str

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    def resolve(self, options: Mapping[str, object]) -> dict[str, Value]:
        """Check the options given and fill in the defaults; a required option that is missing raises."""
        for name in options:
            if name not in self.options:
                raise InputError(f"{self.kind} {self.name} has no option {name!r}; {suggest(name, self.options)}")
        resolved: dict[str, Value] = {}
        for name, option in self.options.items():
            if name not in options and option.is_required:
                raise InputError(f"{self.kind} {self.name} needs the option {name} ({_spell(option.annotation)})")
            resolved[name] = self.coerce(name, options.get(name, option.default))
        return resolved

    def coerce(self, name: str, value: object) -> Value:
        return coerce(value, self.options[name].annotation, f"option {name} of {self.kind} {self.name}")

    def __call__(self, available: Mapping[str, Any], options: Mapping[str, Value]) -> Any:
        """Call the function with the inputs that it declares, and nothing else, and its options."""
        return self.function(**{name: available[name] for name in self.inputs}, **options)


@dataclass(frozen=True)
class Registry(Mapping[str, Entry[F]]):
    """The functions of one family by name. `offered` are the inputs that a function of it may ask for."""

    kind: str
    offered: frozenset[str]
    _entries: dict[str, Entry[F]] = field(default_factory=dict)

    @typing.overload
    def __call__(self, function: F, /) -> F: ...
    @typing.overload
    def __call__(self, /, *, version: int = 1) -> Callable[[F], F]: ...
    def __call__(self, function: F | None = None, /, *, version: int = 1) -> F | Callable[[F], F]:
        """Register a function under its own name; bump `version` whenever its numbers change."""

        def register(function: F) -> F:
            entry = self._describe(function, version)
            if entry.name in self._entries:
                first = self._entries[entry.name].function.__module__
                raise InputError(
                    f"{self.kind} {entry.name!r} is registered twice: in {first} and {function.__module__}"
                )
            self._entries[entry.name] = entry
            return function

        return register if function is None else register(function)

    def _describe(self, function: F, version: int) -> Entry[F]:
        hints = typing.get_type_hints(function, include_extras=True)
        inputs: set[str] = set()
        options: dict[str, Option] = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if name in self.offered:
                inputs.add(name)
            elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                if name not in hints:
                    raise InputError(f"option {name} of {self.kind} {function.__name__} has no type annotation")
                options[name] = Option(name, hints[name], parameter.default)
            else:
                raise InputError(
                    f"{self.kind} {function.__name__} asks for {name!r}; {suggest(name, self.offered)}, "
                    "and options come after * in the signature"
                )
        text = str(version) + _plugin_hashes.get(function.__module__, "")
        return Entry(function.__name__, function, text, frozenset(inputs), options, self.kind)

    def __getitem__(self, name: str) -> Entry[F]:
        try:
            return self._entries[name]
        except KeyError:
            raise InputError(f"unknown {self.kind} {name!r}; {suggest(name, self._entries)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


class Choice(Protocol):
    """A registered function by name, with its options: what specs name, or plain values read from a file."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Chosen:
    """A choice in plain values."""

    name: str
    options: Mapping[str, Any]


def load_modules(package: str) -> None:
    """Import every module of a package, so that what they register is there; called by the package itself."""
    for module in pkgutil.iter_modules(sys.modules[package].__path__):
        importlib.import_module(f"{package}.{module.name}")


def canonical_json(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces; raises on what is not finite or not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


@dataclass(frozen=True)
class Plugin:
    """A user's module: its source travels to every worker, so a path that only the driver sees will do."""

    module: str
    source: str | None  # None: an installed module, imported by name
    path: str = ""  # of the file, as the user gave it

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.path or self.module


_plugin_hashes: dict[str, str] = {}
_plugin_failures: dict[str, InputError] = {}


def read_plugin(name: str) -> Plugin:
    """Read `path/to/file.py` or `package.module` into a Plugin; raises InputError where there is none."""
    if not name.endswith(".py"):
        if not re.fullmatch(r"\w+(\.\w+)*", name) or _find_spec(name) is None:
            raise InputError(f"plugin {name!r} is not a file ending in .py, nor a module that can be imported")
        return Plugin(name, None)
    try:
        module = "plugin_" + re.sub(r"\W", "_", Path(name).stem)
        return Plugin(module, Path(name).read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"plugin file {name!r} cannot be read: {reason}; give the path of a Python file") from None


def _find_spec(name: str) -> object | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    except Exception as error:  # a parent package that fails to load
        raise _failure(name, error) from error


def load_plugin(plugin: Plugin) -> None:
    """Run a plugin's module once in this process; its functions' versions carry the hash of its source."""
    digest = "+" + hashlib.sha256(_source(plugin)).hexdigest()[:12]
    if _plugin_hashes.setdefault(plugin.module, digest) != digest:
        raise InputError(f"plugin {plugin.name} is already loaded from another source; rename one of the two")
    if plugin.module in _plugin_failures:  # a part of it may be registered, so a second try would find it twice
        raise _plugin_failures[plugin.module]
    if plugin.module in sys.modules and plugin.source is not None:
        return
    try:
        if plugin.source is None:
            importlib.import_module(plugin.module)
        else:
            module = types.ModuleType(plugin.module)
            sys.modules[plugin.module] = module
            exec(compile(plugin.source, plugin.name, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        _plugin_failures[plugin.module] = _failure(plugin.name, error)
        raise _plugin_failures[plugin.module] from error


def _source(plugin: Plugin) -> bytes:
    if plugin.source is not None:
        return plugin.source.encode()
    spec = importlib.util.find_spec(plugin.module)
    return Path(spec.origin).read_bytes() if spec and spec.origin else plugin.module.encode()


def _failure(name: str, error: BaseException) -> InputError:
    reason = str(error).split("\n", 1)[0]
    return InputError(
        reason if isinstance(error, InputError) else f"plugin {name} fails to load: {type(error).__name__}: {reason}"
    )
