"""Statistics of scores over seeds and tasks, as Agarwal et al. define them (arXiv 2108.13264).

scores: {task: array (S,)}, one score per seed; tasks may have different numbers of seeds.

iqm(scores)                                # interquartile mean over all runs of all tasks
interval_of(iqm, scores)                   # 95 % interval, bootstrap stratified by task
probability_of_improvement(x, y)           # mean over tasks of P(X > Y) + P(X = Y) / 2
profile(scores, thresholds)                # share of runs above each threshold
paired(x, y)                               # mean difference of the same seeds, with its interval
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from host.run_folder import interval

Scores = Mapping[str, Sequence[float]]
RESAMPLES = 2_000


def iqm(scores: Scores) -> float:
    """-> the interquartile mean: of all runs in order, the mean of the middle half. A quarter of
    the runs, rounded down, is left out at each end."""
    runs = np.sort(np.concatenate([np.asarray(x, float) for x in scores.values()]))
    cut = len(runs) // 4
    return float(runs[cut : len(runs) - cut].mean())


def probability_of_improvement(x: Scores, y: Scores) -> float:
    """-> the mean over tasks of the probability that a run of x beats a run of y; a tie counts one
    half. x and y have the same tasks."""
    of = lambda a, b: np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b))
    return float(np.mean([of(np.asarray(x[task]), np.asarray(y[task])) for task in x]))


def profile(scores: Scores, thresholds: Sequence[float]) -> np.ndarray:
    """thresholds (T,) -> share of runs with a higher score (T,), each task with the same weight."""
    above = [np.asarray(x)[:, None] > np.asarray(thresholds) for x in scores.values()]
    return np.mean([a.mean(axis=0) for a in above], axis=0)


def interval_of(
    statistic: Callable, *groups: Scores, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """statistic(*groups) -> number or array; -> its 95 % interval (low, high), by the percentiles
    of a bootstrap that draws the seeds of each task and group anew, with replacement."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples):
        again = [
            {task: np.asarray(x)[rng.integers(len(x), size=len(x))] for task, x in group.items()}
            for group in groups
        ]
        drawn.append(statistic(*again))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return low, high


def paired(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Scores (S,) of the same seeds -> (mean of x - y, low, high): the 95 % interval over seeds."""
    mean, ci95 = interval(np.subtract(x, y).tolist())
    return (mean, *(ci95 or (mean, mean)))
