"""Progress that a person sees on a terminal, and in a log file alike."""

import sys
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

EVERY = 60.0  # seconds between two lines of a log file during the fit


class Progress:
    """On a terminal a bar per stage; elsewhere a line per round, and one per minute of the fit."""

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
        if stage == "fit" and now - self.shown < EVERY and done < total:
            return
        left = (total - done) * (now - start) / max(1, done - before)
        about = "" if done in (total, before) else f", about {duration(left)} left"
        print(f"{stage} {done}/{total}: {said}{about}", file=sys.stderr, flush=True)
        self.shown = now

    def close(self) -> None:
        """Leave the terminal with whole lines."""
        for bar in self.bars.values():
            bar.close()


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
