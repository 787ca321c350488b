import pytest

from jobs.gpus import best
from tests.commands import run


@pytest.mark.parametrize(
    ("rates", "number", "measured"),
    [
        ([10, 9, 99, 99], 1, 2),  # a second worker slows both: the third is not tried
        ([10, 10.9, 99, 99], 1, 2),
        ([10, 11, 12, 99], 2, 3),  # 11 is a tenth more than 10, 12 is less than that beyond 11
        ([10, 15, 20, 21], 3, 4),
        ([10, 15, 20, 25], 4, 4),
    ],
)
def test_workers_are_added_for_as_long_as_each_brings_a_tenth(rates: list[float], number: int, measured: int) -> None:
    asked: list[int] = []

    def rate(workers: int) -> float:
        asked.append(workers)
        return rates[workers - 1]

    assert best(rate) == (number, rates[:measured])
    assert asked == list(range(1, measured + 1))


@pytest.mark.parametrize("share", ["many", "nan"])
def test_a_share_of_a_gpu_that_is_no_number_is_refused(share: str) -> None:
    refused = run("memorize", "digits", "--gpus-per-worker", share, "--dry-run")
    assert refused.returncode == 2
    assert f"got {share!r}; allowed: a number from 0" in " ".join(refused.stderr.split())
