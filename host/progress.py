"""Progress that a person sees on a terminal, and in a log file alike."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from tqdm import tqdm

EVERY = 60.0  # seconds between two lines of a log file, but for rounds
T = TypeVar("T")


class Progress:
    """On a terminal a bar per stage; elsewhere a line per round, and one per minute of others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """clock: -> seconds."""
        self.clock, self.terminal = clock, sys.stderr.isatty()
        self.bars: dict[str, tqdm] = {}
        self.first: dict[str, tuple[float, int]] = {}  # time and chunks at a stage's first call
        self.shown = clock()  # when the last line was printed

    def __call__(self, stage: str, done: int, total: int, said: str) -> None:
        """`done` of `total` chunks of a stage are done; said: what to show beside."""
        if self.terminal:
            self.move_bar(stage, done, total, said)
        else:
            self.print_line(stage, done, total, said)

    def move_bar(self, stage: str, done: int, total: int, said: str) -> None:
        if stage not in self.bars:
            self.bars[stage] = tqdm(total=total, initial=done - 1, desc=stage)
        bar = self.bars[stage]
        bar.set_postfix_str(said, refresh=False)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    def print_line(self, stage: str, done: int, total: int, said: str) -> None:
        now = self.clock()
        start, before = self.first.setdefault(stage, (now, done))
        if stage != "rounds" and now - self.shown < EVERY and done < total:
            return
        left = (total - done) * (now - start) / max(1, done - before)
        about = "" if done in (total, before) else f"about {duration(left)} left"
        text = ", ".join(filter(None, (said, about)))
        print(f"{stage} {done}/{total}" + f": {text}" * bool(text), file=sys.stderr, flush=True)
        self.shown = now

    def close(self) -> None:
        """Leave the terminal with whole lines."""
        for bar in self.bars.values():
            bar.close()


def counted(items: Iterable[T], stage: str, total: int | None = None) -> Iterator[T]:
    """The items, of which there are `total`, with their progress shown after each."""
    total = len(items) if total is None else total
    with contextlib.closing(Progress()) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress(stage, done, total, "")


def duration(seconds: float) -> str:
    """Seconds -> a short text, such as "1 h 5 min"."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def summary(metrics: dict[str, np.ndarray]) -> str:
    """Metrics of a chunk -> the one to show, a mean over the runs that go on."""
    name = next((n for n in ("return", "loss", "log_prob_real") if n in metrics), None)
    if name is None:
        return ""
    return f"{name.replace('_', ' ')} {np.nanmean(metrics[name]):.{1 if name == 'return' else 3}f}"
