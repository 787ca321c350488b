"""Progress of a wave: bars with rate and time left on a terminal, a plain line now and then when piped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

console = Console(soft_wrap=True)
_SECONDS_BETWEEN_LINES = 5.0


class _Rate(ProgressColumn):
    """Finished steps per second, or per minute where they are slow, and the time left at that rate.

    Over the whole run of the bar: steps come ten at a time, so that a recent rate would be 0 or a burst.
    """

    def render(self, task: Task) -> Text:
        if not task.completed or not task.elapsed:
            return Text("")
        rate = task.completed / task.elapsed
        left = timedelta(seconds=round(((task.total or 0) - task.completed) / rate))
        return Text(f"{_rate(rate):>10}  {left} left" if task.completed < (task.total or 0) else f"{_rate(rate):>10}")


def _rate(per_second: float) -> str:
    return f"{per_second:.1f}/s" if per_second >= 1 else f"{60 * per_second:.1f}/min"


@contextmanager
def bars(totals: Mapping[str, int]) -> Iterator[Callable[[str, int], None]]:
    """One bar per name with a total above zero; gives a function to advance one by a number of steps."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
        )
        with Progress(*columns, console=console) as progress:
            tasks = {name: progress.add_task(name, total=total) for name, total in totals.items() if total}
            yield lambda name, steps: progress.advance(tasks[name], steps)
        return
    lines = _Lines(totals)
    yield lines.advance


class _Lines:
    def __init__(self, totals: Mapping[str, int]) -> None:
        self.totals, self.finished = totals, dict.fromkeys(totals, 0)
        self.start = self.printed = time.monotonic()

    def advance(self, name: str, steps: int) -> None:
        self.finished[name] += steps
        now, finished, total = time.monotonic(), self.finished[name], self.totals[name]
        if finished < total and now - self.printed < _SECONDS_BETWEEN_LINES:
            return
        self.printed = now
        rate = finished / max(now - self.start, 1e-9)
        left = f", {(total - finished) / rate:.0f} s left" if finished < total else ""
        console.print(f"{name}: {finished}/{total} ({_rate(rate)}{left})", highlight=False)
