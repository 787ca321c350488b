"""The numbers of every built-in function against those that its version once gave."""

import json

import pytest

from tests import golden

PINNED = json.loads(golden.NUMBERS.read_text(encoding="utf-8"))
COMPUTED = golden.numbers()


@pytest.mark.parametrize("kind", sorted(COMPUTED))
def test_a_function_whose_numbers_change_has_a_new_version(kind: str) -> None:
    """Where a change is meant: bump the function's version, then `make golden`."""
    assert set(COMPUTED[kind]) == set(PINNED[kind]), "a function is new, gone or of another version: make golden"
    for name, numbers in COMPUTED[kind].items():
        # loose enough for another processor's order of summing, tight enough for any change of a formula
        assert numbers == pytest.approx(PINNED[kind][name], rel=3e-3, abs=1e-6), name
