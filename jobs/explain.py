"""`unlearn explain`: why two keys differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jobs.progress import console
from jobs.session import existing_store
from orchestrator import results
from orchestrator.registry import InputError
from orchestrator.store import Store


def run(first: str, second: str, storage: str) -> None:
    """Print the fields in which the specs of two runs differ."""
    store = existing_store(storage)
    a, b = (_find(store, prefix) for prefix in (first, second))
    differences = list(_differences(a.spec, b.spec, ""))
    for field, left, right in differences:
        console.print(f"{field}: {left!r} and {right!r}", highlight=False)
    if not differences:
        same = "they are one run" if a.key == b.key else "a function that they name has changed since (its version)"
        console.print(f"the specs are equal; {same}", highlight=False)


def _find(store: Store, prefix: str) -> results.Row:
    matching = [name for name in results.row_keys(store) if name.startswith(prefix)]
    if not matching:
        raise InputError(f"no stored run has a key that begins with {prefix!r}; `runs` of the export lists all keys")
    if len(matching) > 1:
        raise InputError(f"run {prefix!r} matches {len(matching)} of the stored runs; give more of the key")
    return results.get_row(store, matching[0])


def _differences(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in sorted({*a, *b}):
            yield from _differences(a.get(name), b.get(name), f"{path}.{name}" if path else name)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (left, right) in enumerate(zip(a, b, strict=True), 1):
            yield from _differences(left, right, f"{path}.{number}")
    elif a != b:
        yield path, a, b
