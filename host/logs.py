"""A file becomes a log in D4RL's layout: its arrays are found, checked, and their ends mended.

    log = read_log("my_log.hdf5", Rules(limit=1000))   # a dict of KEYS, and of SUCCESSORS

What can be known to be wrong is mended and said in one line, or refused in one line.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from host import layouts
from host.errors import UserError
from host.files import say

KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")  # of every log
SUCCESSORS = "next_observations"  # of logs that know the observation after a time-out


class Rules(NamedTuple):
    """What is known of a log's task, beside the log."""

    limit: int | None = None  # maximal steps per episode
    endless: bool = False  # no episode of the task ends in a terminal
    goal: bool = False  # terminals mark every step at a goal where the trajectory goes on (antmaze)
    discrete: bool = False  # actions that are integers are taken as numbers


def read_log(path: Path | str, rules: Rules = Rules()) -> dict[str, np.ndarray]:  # noqa: B008
    """An HDF5 or npz file in a layout of host/layouts.py -> dict of KEYS, and of SUCCESSORS if the
    file has it.

    observations (N, O), actions (N, A), rewards, terminals, timeouts (N,), next_observations
    (N, O). Raises UserError if the file is missing, damaged or not a valid log. Python objects in a
    file are never loaded, and links to other files are not followed.
    """
    path = Path(path).expanduser()
    log, said = layouts.read(path)
    for key in set(KEYS[2:]) & set(log):
        if log[key].ndim == 2 and log[key].shape[1] == 1:
            log[key] = log[key][:, 0]
    check_log(log, str(path))
    for key in set(KEYS[3:]) & set(log):
        log[key] = as_flags(log[key], key, path)
    refuse_discrete(log["actions"], path, rules)
    steps: list[Callable] = [centre, drop_repeated_tail, mend_terminals, mend_timeouts, drop_resets]
    phrases = [said, *(step(log, rules) for step in steps)]
    for phrase in filter(None, phrases):
        say(f"{path.name}: {phrase}")
    if "timeouts" not in log:
        raise UserError(
            f"{path} has no timeouts, and neither next_observations nor a known task to restore "
            "them from; add the array, or name the task with --env"
        )
    numbers = {key: log[key] for key in ("observations", SUCCESSORS) if key in log}
    return log | {key: x.astype(np.float32, copy=False) for key, x in numbers.items()}


# --- Checks ---


def check_log(log: dict[str, np.ndarray], where: str) -> None:
    """Check the shapes of a log's arrays and that all numbers are finite. Raises UserError, which
    names `where` the log is from."""
    num, *width = log["observations"].shape or (0,)
    for key, ndim in zip((*KEYS, SUCCESSORS), (2, 2, 1, 1, 1, 2)):
        if key not in log:
            continue
        shape = log[key].shape
        agrees = key != SUCCESSORS or [*shape[1:]] == width
        if len(shape) > 2:
            raise UserError(f"{where}: {key} has shape {shape}; images are not supported")
        if len(shape) != ndim or shape[0] != num or 0 in shape or not agrees:
            letter = "A" if key == "actions" else "O"
            want = f"({num}, {letter})" if ndim == 2 else f"({num},)"
            want = log["observations"].shape if key == SUCCESSORS else want
            raise UserError(f"{where}: {key} has shape {shape}, it should be {want} and not empty")
        bad = None if log[key].dtype == bool else ~np.isfinite(log[key]).reshape(num, -1).all(1)
        if bad is not None and bad.any():
            raise UserError(
                f"{where}: {key} has NaN or infinite values in {bad.sum()} of {num} rows, "
                f"the first in row {bad.argmax()}; remove those episodes"
            )
        largest = np.abs(log[key]).reshape(num, -1).max(1)
        if largest.max() > 1e18:
            raise UserError(
                f"{where}: {key} reaches {largest.max():.1e} in row {largest.argmax()}, too large "
                "to be trained on; remove that episode"
            )


def as_flags(x: np.ndarray, key: str, path: Path) -> np.ndarray:
    """terminals or timeouts (N,) -> the same as bool. Raises UserError for other numbers than 0 and
    1, and for terminals that are most likely a mask of the steps that are none."""
    if x.dtype != bool:
        others = x[(x != 0) & (x != 1)]
        if len(others):
            raise UserError(f"{path}: {key} holds {others[0]:g}; it should hold 0 and 1 only")
        x = x.astype(bool)
    if key == "terminals" and 0.5 < x.mean() < 1.0 and len(x) > 10:
        raise UserError(
            f"{path}: terminals is 1 in {x.mean():.1%} of the rows; it should be 1 at the end of "
            "an episode and 0 elsewhere. Give 1 - terminals if it is a mask of the other steps"
        )
    return x


def refuse_discrete(actions: np.ndarray, path: Path, rules: Rules) -> None:
    """Raise UserError for actions that are indices 0, 1, 2, ..., unless the rules take them."""
    few = actions[:1000]
    if rules.discrete or few.min() < 0 or np.any(few != np.round(few)):
        return
    if actions.min() >= 0 and actions.max() > 0 and np.all(actions == np.round(actions)):
        raise UserError(
            f"{path}: the actions are the integers {actions.min():g} to {actions.max():g}, indices "
            "of a discrete choice; this method is for continuous actions. Where they are numbers "
            "after all, give --discrete-as-continuous"
        )


# --- Mending: each function changes the log in place -> a phrase that says what was done, or "" ---


def centre(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Subtract the mean, in float64, from observations whose changes float32 cannot resolve."""
    obs = log["observations"]
    if obs.dtype != np.float64:
        return ""
    coarse = np.abs(obs).max(0) * np.finfo(np.float32).eps > 1e-3 * obs.std(0)
    coarse &= obs.std(0) > 1e-12 * np.abs(obs).max(0)
    if not coarse.any():
        return ""
    mean = np.where(coarse, obs.mean(0), 0.0)
    for key in {"observations", SUCCESSORS} & set(log):
        log[key] = log[key] - mean
    which = ", ".join(map(str, np.flatnonzero(coarse)[:10]))
    return (
        f"observations {which} reach {np.abs(mean).max():.3g}, too far from 0 for single "
        "precision; their means are subtracted, so give a policy observations less "
        f"{', '.join(f'{m:.10g}' for m in mean[coarse][:10])}"
    )


def drop_repeated_tail(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Leave out ten or more equal rows after the last end: a buffer that was never filled."""
    ends = np.flatnonzero(log["terminals"] | log.get("timeouts", False))
    first = ends[-1] + 1 if len(ends) else 0
    equal = np.ones(len(log["rewards"]) - first, bool)
    if len(equal) < 10:
        return ""
    for key in ("observations", "actions", "rewards"):
        tail = log[key][first:]
        equal &= np.all((tail == tail[-1:]).reshape(len(tail), -1), axis=1)
    different = np.flatnonzero(~equal)
    num = len(equal) - (different[-1] + 1 if len(different) else 0)
    if num < 10 or num == len(log["rewards"]):
        return ""
    for key in log:
        log[key] = log[key][:-num]
    return f"the last {num:,} rows are one repeated row and are left out"


def mend_terminals(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Take terminals for time-outs where the task has none, or has them at its limit alone; at a
    goal, let the trajectory end with its first terminal."""
    terminals = log["terminals"]
    if rules.goal and np.any(terminals[1:] & terminals[:-1]):
        return end_at_goal(log)
    if not terminals.any():
        return ""
    ends = np.flatnonzero(terminals | log.get("timeouts", False))
    lengths = np.diff(ends, prepend=-1)[terminals[ends]]
    if rules.endless:
        why = "this task has no terminals"
    elif rules.limit and np.all(lengths == rules.limit):
        why = f"all are at the task's limit of {rules.limit} steps"
    else:
        return ""
    log["timeouts"] = log.get("timeouts", False) | terminals
    log["terminals"] = np.zeros_like(terminals)
    return f"{terminals.sum():,} terminals are taken as time-outs, because {why}"


def end_at_goal(log: dict[str, np.ndarray]) -> str:
    """Leave out the steps between a trajectory's first terminal and its time-out."""
    terminals, timeouts = log["terminals"], log.get("timeouts", np.zeros_like(log["terminals"]))
    trajectory = np.append(0, np.cumsum(timeouts)[:-1])
    before = np.cumsum(terminals) - terminals  # terminals before this row
    first = np.flatnonzero(np.diff(trajectory, prepend=-1))
    at_goal = before - before[first][trajectory] > 0
    for key in log:
        log[key] = log[key][~at_goal]
    return f"{at_goal.sum():,} steps after a trajectory has reached its goal are left out"


def mend_timeouts(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Mark unmarked ends of episodes as time-outs.

    With next_observations, an episode ends wherever the next row is not the successor; a mark one
    row off such an end is moved to it. Without them, and without any mark of a time-out, an episode
    ends after every `limit` steps.
    """
    given = log.get("timeouts", np.zeros_like(log["terminals"]))
    missing = "has no timeouts: " if "timeouts" not in log else ""
    if SUCCESSORS in log:
        breaks = find_breaks(log["observations"], log[SUCCESSORS])
        log["timeouts"], said = given, []
        if moved := move_marks(log, breaks):
            said.append(f"{moved} marks of ends are one row off, as next_observations show, and "
                        "are moved")  # fmt: skip
        breaks &= ~(log["terminals"] | log["timeouts"])
        if num := breaks.sum():
            said.append(f"{num} steps are followed by another state than their next_observations "
                        "say and are marked as timeouts")  # fmt: skip
        if missing or num and not given.any():  # the last step ends an episode too
            breaks[-1] |= not log["terminals"][-1]
        log["timeouts"] = breaks | log["timeouts"]
        return missing + ("; ".join(said) or "no end is unmarked") if said or missing else ""
    if rules.limit and not given.any():
        log["timeouts"] = timeouts_by_limit(log["terminals"], rules.limit)
        if missing or log["timeouts"].any():
            return (missing or "marks no time-out: ") + (
                f"episodes are taken to end after {rules.limit} steps"
            )
    return ""


def move_marks(log: dict[str, np.ndarray], breaks: np.ndarray) -> int:
    """Move marks of ends that are one row late or early to the break (N,) beside them, in place ->
    how many."""
    moved = 0
    for shift in (1, -1):
        free = breaks & ~(log["terminals"] | log["timeouts"])
        beside = np.roll(free, shift)  # the row before this one, or after it, is an unmarked break
        beside[0 if shift == 1 else -1] = False
        for key in ("terminals", "timeouts"):
            wrong = log[key] & ~breaks & beside
            wrong[-1] = False  # nothing follows the last row
            log[key] = log[key] & ~wrong | np.roll(wrong, -shift)
            moved += int(wrong.sum())
            if wrong.any():  # nothing shows the end of the last episode, which is off as well
                early = shift == -1 and log[key][-2] and not breaks[-2]
                log[key][-2] &= not early
                log[key][-1] |= early or not log["terminals"][-1]
    return moved


def find_breaks(obs: np.ndarray, next_obs: np.ndarray, rows: int = 100_000) -> np.ndarray:
    """obs (N, O), next_obs (N, O) -> (N,) bool: the next row differs from this row's successor by
    more than 0.1 % of a standard deviation. Works on `rows` rows at a time."""
    scale = 1e-3 * obs.std(0) + 1e-6 * np.abs(obs).max(0)
    breaks = np.zeros(len(obs), bool)
    for i in range(0, len(obs) - 1, rows):
        after = obs[i + 1 : i + 1 + rows]
        apart = np.abs(next_obs[i : i + len(after)] - after)
        breaks[i : i + len(after)] = np.any(apart > scale, axis=1)
    return breaks


def timeouts_by_limit(terminals: np.ndarray, limit: int) -> np.ndarray:
    """terminals (N,) -> timeouts (N,) after every `limit` steps since the last end."""
    timeouts, first = np.zeros(len(terminals), bool), 0
    for end in [*np.flatnonzero(terminals), len(terminals)]:
        timeouts[first + limit - 1 : end : limit] = True
        first = end + 1
    return timeouts


def drop_resets(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Leave out next_observations where at every time-out they are the first observation of the
    next episode, as environments that reset by themselves give them."""
    if SUCCESSORS not in log or "timeouts" not in log:
        return ""
    inner = np.flatnonzero(log["timeouts"][:-1] & ~log["terminals"][:-1])
    if not len(inner):
        return ""
    obs, next_obs = log["observations"], log[SUCCESSORS]
    if not np.array_equal(next_obs[inner], obs[inner + 1]):
        return ""
    del log[SUCCESSORS]
    return (
        f"next_observations at the {len(inner)} time-outs are the first observations of the next "
        "episodes; those transitions are left out"
    )


# --- Episodes ---


def episode_returns(log: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Log -> (undiscounted returns (E,), lengths (E,)) of the E episodes that have ended. A log
    without an end counts as one episode."""
    ends = np.flatnonzero(log["terminals"] | log["timeouts"])
    ends = ends if len(ends) else np.array([len(log["rewards"]) - 1])
    totals = np.cumsum(log["rewards"], dtype=np.float64)[ends]
    return np.diff(totals, prepend=0.0), np.diff(ends, prepend=-1)
