import math
import re
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from scipy import stats

from orchestrator.axes import Distribution, choice, fitted, loguniform, parse, uniform
from orchestrator.registry import Bounds, Count, InputError, Positive, ShareBelowOne

SHARES = np.linspace(0, 0.999, 25)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (uniform(-2.0, 5.0), stats.uniform(-2, 7)),
        (loguniform(1e-5, 10.0), stats.loguniform(1e-5, 10)),
    ],
)
def test_real_numbers_are_quantiles_of_the_distribution_to_four_digits(drawn: Distribution, expected: Any) -> None:
    for share in SHARES:
        found = drawn.at(float(share))
        assert found == pytest.approx(expected.ppf(share), rel=5.1e-4)
        assert found == float(f"{found:.4g}")
        assert drawn.values[0] <= found <= drawn.values[1]


def test_whole_numbers_are_drawn_evenly_with_both_ends() -> None:
    drawn = fitted(uniform(1, 10), Count, "epochs")
    found = [drawn.at(k / 1000) for k in range(1000)]
    assert all(type(value) is int for value in found)
    assert [found.count(value) for value in range(1, 11)] == [100] * 10
    logarithmic = fitted(loguniform(1, 100), Count, "epochs")
    found = [logarithmic.at((k + 0.5) / 4000) for k in range(4000)]
    assert set(found) == set(range(1, 101))
    for value in (1, 10, 100):  # the share of the interval of half a unit around it, on the logarithmic scale
        share = math.log((value + 0.5) / (value - 0.5)) / math.log(100.5 / 0.5)
        assert found.count(value) / 4000 == pytest.approx(share, abs=5e-4)


def test_choices_keep_their_types() -> None:
    drawn = fitted(choice("true", False), bool, "redraw")
    assert [drawn.at(0.0), drawn.at(0.49), drawn.at(0.5)] == [True, True, False]
    assert fitted(choice(1, 2.5), float, "x").values == (1.0, 2.5)


@pytest.mark.parametrize("drawn", [uniform(1, 10), loguniform(0.001, 0.1), choice("a", "b"), choice(0.1)])
def test_text_is_read_as_it_is_written(drawn: Distribution) -> None:
    kinds = {"a": str}
    annotation = kinds.get(str(drawn.values[0]), int if drawn.is_whole else float)
    again = parse(str(drawn))
    assert again is not None
    assert fitted(again, annotation, "x") == fitted(drawn, annotation, "x")


def test_what_spells_no_distribution_is_none_or_refused() -> None:
    assert parse("0.1,0.3") is None
    assert parse("released") is None
    assert parse(" loguniform( 1e-3 , 1e-1 ) ") == Distribution("loguniform", ("1e-3", "1e-1"))
    with pytest.raises(
        InputError, match=re.escape("'loguniforn(1, 2)' is no distribution; did you mean 'loguniform'?")
    ):
        parse("loguniforn(1, 2)")


@pytest.mark.parametrize(
    ("text", "annotation", "said"),
    [
        ("uniform(0.3, 0.1)", float, "lr is uniform(0.3, 0.1); allowed: low below high"),
        ("uniform(0.3)", float, "allowed: uniform(low, high)"),
        ("loguniform(0, 1)", float, "allowed: low above 0"),
        ("loguniform(0, 1)", Positive, "lr is 0.0; allowed: a finite number above 0"),
        ("uniform(0.5, 1)", ShareBelowOne, "lr is 1.0; allowed: a finite number from 0 below 1"),
        ("uniform(1, 2.5)", int, "lr is '2.5'; allowed: a whole number"),
        ("uniform(a, b)", float, "lr is 'a'; allowed: a finite number"),
        ("uniform(0, 1)", bool, "lr is '0'; allowed: true or false"),
        ("uniform(1, 2)", Literal["1", "2"], "allowed: choice(...), since it is not a number"),
        ("choice()", float, "allowed: choice of one or more values"),
        ("choice(1, 1.0)", float, "allowed: distinct values"),
        ("choice(1, inf)", float, "lr is 'inf'; allowed: a finite number"),
        ("choice(0.1, 3)", Annotated[float, Bounds(at_most=1)], "lr is 3.0; allowed: a finite number to 1"),
    ],
)
def test_bounds_are_checked_by_the_option(text: str, annotation: Any, said: str) -> None:
    drawn = parse(text)
    assert drawn is not None
    with pytest.raises(InputError, match=re.escape(said)):
        fitted(drawn, annotation, "lr")
