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
from host.files import say, too_many_axes

KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")  # of every log
SUCCESSORS = "next_observations"  # of logs that know the observation after a time-out


class Rules(NamedTuple):
    """What is known of a log's task, beside the log."""

    limit: int | None = None  # maximal steps per episode
    endless: bool = False  # no episode of the task ends in a terminal
    goal: bool = False  # terminals mark every step at a goal where the trajectory goes on (antmaze)
    discrete: bool = False  # actions that are integers are taken as numbers
    unsure: bool = False  # the file does not tell terminals from time-outs


def read_log(path: Path | str, rules: Rules = Rules()) -> dict[str, np.ndarray]:  # noqa: B008
    """An HDF5 or npz file in a layout of host/layouts.py -> dict of KEYS, and of SUCCESSORS if the
    file has it.

    observations (N, O), actions (N, A), rewards, terminals, timeouts (N,), next_observations
    (N, O). Raises UserError if the file is missing, damaged or not a valid log. Python objects in a
    file are never loaded, and links to other files are not followed.
    """
    path = Path(path)
    log, said, unsure = layouts.read(path)
    mend_log(log, str(path), path.name, rules._replace(unsure=unsure), said)
    if "timeouts" not in log:
        raise UserError(
            f"{path} has no timeouts, and neither next_observations nor a known task to restore "
            "them from; add the array, or name the task with --env"
        )
    return log


def mend_log(log: dict, where: str, name: str, rules: Rules, said: str = "") -> None:
    """Check arrays under D4RL's names and mend them, in place; say what was done, after `said`.
    Raises UserError, which begins with `where`."""
    for key in set(KEYS[2:]) & set(log):
        if log[key].ndim == 2 and log[key].shape[1] == 1:
            log[key] = log[key][:, 0]
    for key in {*KEYS[:3], SUCCESSORS} & set(log):
        if log[key].dtype == bool:
            log[key] = log[key].astype(np.float32)
    unknown = drop_unknown_successors(log)
    check_log(log, where)
    for key in set(KEYS[3:]) & set(log):
        log[key] = as_flags(log[key], key, where, rules)
    refuse_discrete(log["actions"], where, rules)
    steps: list[Callable] = [
        drop_repeated_tail, drop_reset_rows, tell_both_apart, mend_terminals, mend_timeouts,
        drop_fillers, say_odd_ends, narrow,
    ]  # fmt: skip
    try:
        phrases = [said, unknown, *(step(log, rules) for step in steps)]
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    for phrase in filter(None, phrases):
        say(f"{name}: {phrase}")


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
            raise UserError(f"{where}: {key} has shape {shape}; {too_many_axes(shape)}")
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
        if max(log[key].max(), -1.0 * log[key].min()) > 1e30:
            largest = np.abs(log[key]).reshape(num, -1).max(1)
            raise UserError(
                f"{where}: {key} reaches {largest.max():.1e} in row {largest.argmax()}, too large "
                "to be trained on; remove that episode"
            )


def as_flags(x: np.ndarray, key: str, path: str, rules: Rules) -> np.ndarray:
    """terminals or timeouts (N,) -> the same as bool. Raises UserError for other numbers than 0 and
    1, and for terminals that are most likely a mask of the steps that are none."""
    if x.dtype != bool:
        others = x[(x != 0) & (x != 1)]
        if len(others):
            raise UserError(f"{path}: {key} holds {others[0]:g}; it should hold 0 and 1 only")
        x = x.astype(bool)
    if key == "terminals" and x.mean() > 0.9 and len(x) > 10 and not rules.goal:
        raise UserError(
            f"{path}: terminals is 1 in {x.mean():.1%} of the rows; it should be 1 at the end of "
            "an episode and 0 elsewhere. Give 1 - terminals if it is a mask of the other steps"
        )
    return x


def drop_unknown_successors(log: dict[str, np.ndarray]) -> str:
    """Leave out next_observations where those of the last steps of episodes, and no others, are
    NaN."""
    if SUCCESSORS not in log or log[SUCCESSORS].ndim != 2 or "timeouts" not in log:
        return ""
    if log["timeouts"].shape != log["terminals"].shape:
        return ""  # check_log says so
    unknown = np.isnan(log[SUCCESSORS]).any(axis=1)
    ends = (log["timeouts"] != 0) | (log["terminals"] != 0)
    if not unknown.any() or ends.shape != unknown.shape or np.any(unknown[:-1] & ~ends[:-1]):
        return ""
    del log[SUCCESSORS]
    return "next_observations at the ends of episodes are NaN; the transitions there are left out"


def refuse_discrete(actions: np.ndarray, path: str, rules: Rules) -> None:
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


def narrow(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Round observations to single precision, unless they would lose their changes: the data set
    standardises those in double precision."""
    obs = log["observations"]
    if obs.dtype != np.float64:
        return ""
    std = obs.std(0)
    step = np.abs(obs).max(0) * np.finfo(np.float32).eps  # between two numbers of float32
    varies = std > 1e-12 * np.abs(obs).max(0)
    if not np.any(varies & (step > 1e-3 * std)):
        for key in {"observations", SUCCESSORS} & set(log):
            log[key] = log[key].astype(np.float32)
        return ""
    coarse = varies & (step > 0.05 * std)
    if not coarse.any():
        return ""
    which = ", ".join(map(str, np.flatnonzero(coarse)[:10]))
    return (
        f"observations {which} reach {np.abs(obs[:, coarse]).max():.3g} and change by "
        f"{std[coarse].min():.2g}. They are standardised in double precision, but a policy sees "
        "single precision, which cannot resolve that; subtract a constant from the log and from "
        "what the policy gets"
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


def drop_reset_rows(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Leave out the row after each end where it is no step: vector environments of gymnasium 1
    record one there, from the final state to the next episode's first, with a reward of 0."""
    ends = np.flatnonzero(log["terminals"] | log.get("timeouts", False))
    extra = ends[ends < len(log["rewards"]) - 2] + 1
    rewards, obs = log["rewards"], log["observations"]
    if not 2 <= len(extra) < len(rewards) / 4 or np.isin(extra, ends).any():
        return ""
    if rewards[extra].any() or np.mean(rewards != 0) < 0.5:
        return ""
    if SUCCESSORS in log and find_breaks(obs, log[SUCCESSORS])[extra].any():
        return ""  # the row ends an episode: the marks are a row early
    # Without successors, the rows may be final steps without a reward, if their actions count
    moves = np.linalg.norm(np.diff(obs, axis=0) / np.maximum(obs.std(0), 1e-12), axis=1)
    usual = np.quantile(np.delete(moves, np.concatenate([extra - 1, extra])), 0.99)
    if np.median(moves[extra - 1]) > usual or np.median(moves[extra]) <= usual:
        return ""  # the row does not continue the episode, or the next one does
    for key in log:
        log[key] = np.delete(log[key], extra, axis=0)
    return (
        f"{len(extra)} rows after the ends of episodes are no steps, but lead with a reward of 0 "
        "to the next episode's first observation, as vector environments record them; they are "
        "left out"
    )


def tell_both_apart(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Where every time-out is also marked as a terminal, as by a recorder that keeps `done` for
    terminals, take those for time-outs; where all ends are both, those of the longest episodes."""
    if "timeouts" not in log or rules.goal:
        return ""
    terminals, timeouts = log["terminals"], log["timeouts"]
    if timeouts.sum() < 2 or np.any(timeouts & ~terminals):
        return ""
    moved, which = timeouts, "they are taken as time-outs"
    if np.array_equal(terminals, timeouts):
        ends = np.flatnonzero(terminals)
        lengths = np.diff(ends, prepend=-1)
        limit = rules.limit or int(lengths.max())
        moved = np.zeros_like(terminals)
        moved[ends[lengths == limit]] = True
        which = f"the {moved.sum():,} after {limit:,} steps are taken as time-outs"
        if moved.sum() < (1 if rules.limit else max(2, len(ends) // 20)):  # fewer tie by chance
            moved, which = np.zeros_like(terminals), "they are taken as terminals"
    log["terminals"], log["timeouts"] = terminals & ~moved, moved
    return f"{timeouts.sum():,} ends are marked as terminals and as time-outs; {which}"


def mend_terminals(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Take terminals for time-outs where the task has none, or has them at its limit alone; at a
    goal, let the trajectory end with its first terminal."""
    terminals = log["terminals"]
    if rules.goal and np.any(terminals[1:] & terminals[:-1]):
        return end_at_goal(log, rules.limit)
    if not terminals.any():
        return ""
    ends = np.flatnonzero(terminals | log.get("timeouts", False))
    lengths = np.diff(ends, prepend=-1)[terminals[ends]]
    moved, why = terminals, "this task has no terminals"
    if not rules.endless:
        at_limit = lengths == rules.limit if rules.limit else np.zeros(len(lengths), bool)
        if not at_limit.any() or not (at_limit.all() or rules.unsure):
            return ""
        moved = np.zeros_like(terminals)
        moved[np.flatnonzero(terminals)[at_limit]] = True
        why = f"they are at the task's limit of {rules.limit} steps"
    log["timeouts"] = log.get("timeouts", False) | moved
    log["terminals"] = terminals & ~moved
    return f"{moved.sum():,} terminals are taken as time-outs, because {why}"


def end_at_goal(log: dict[str, np.ndarray], limit: int | None) -> str:
    """Leave out the steps between a trajectory's first terminal and its end. Trajectories end at
    time-outs; where none is marked, as next_observations show, or else at the limit."""
    terminals, timeouts = log["terminals"], log.get("timeouts", np.zeros_like(log["terminals"]))
    if not timeouts.any():
        if SUCCESSORS in log:
            timeouts = find_breaks(log["observations"], log[SUCCESSORS])
        elif limit:
            timeouts = timeouts_by_limit(np.zeros_like(terminals), limit)
        timeouts[-1] = True
        log["timeouts"] = timeouts
    trajectory = np.append(0, np.cumsum(timeouts)[:-1])
    before = np.cumsum(terminals) - terminals  # terminals before this row
    first = np.flatnonzero(np.diff(trajectory, prepend=-1))
    at_goal = before - before[first][trajectory] > 0
    for key in log:
        log[key] = log[key][~at_goal]
    log["timeouts"] &= ~log["terminals"]
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
        if breaks.mean() > 0.5 and len(breaks) > 20:
            rough = find_breaks(log["observations"], log[SUCCESSORS], tolerance=0.1)
            if rough.mean() > 0.2:
                raise UserError(
                    f"next_observations are the next row at {1 - rough.mean():.0%} of the rows "
                    "only; the rows should be in the order of time, episode by episode. Sort them, "
                    "or leave next_observations out"
                )
            breaks = rough
            said.append("next_observations agree with the next rows to a tenth of a standard "
                        "deviation only")  # fmt: skip
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
    if rules.limit and not given[:-1].any():
        log["timeouts"] = timeouts_by_limit(log["terminals"], rules.limit) | given
        if missing or np.any(log["timeouts"] & ~given):
            return (missing or "marks no time-out: ") + (
                f"episodes are taken to end after {rules.limit} steps"
            )
    return ""


def move_marks(log: dict[str, np.ndarray], breaks: np.ndarray) -> int:
    """Move marks of ends that are one row late or early to the break (N,) beside them, in place ->
    how many. At least two marks, and half of all, have to be off: one may be so by chance."""
    for shift in (1, -1):
        marked = log["terminals"] | log["timeouts"]
        beside = np.roll(breaks & ~marked, shift)  # the row before this one, or after it, is a
        beside[0 if shift == 1 else -1] = False  # break without a mark
        wrong = marked & ~breaks & beside
        wrong[-1] = False  # nothing follows the last row
        if wrong.sum() < 2 or wrong.sum() < 0.5 * marked[:-1].sum():
            continue
        early = shift == -1 and marked[-2] and not breaks[-2]  # the last end is off as well
        wrong[-2] |= early
        for key in ("terminals", "timeouts"):
            log[key] = log[key] & ~wrong | np.roll(log[key] & wrong, -shift)
        if shift == 1:  # the mark of the last end lies beyond the last row
            log["timeouts"][-1] |= not log["terminals"][-1]
        return int(wrong.sum())
    return 0


def find_breaks(
    obs: np.ndarray, next_obs: np.ndarray, tolerance: float = 1e-3, rows: int = 100_000
) -> np.ndarray:
    """obs (N, O), next_obs (N, O) -> (N,) bool: the next row differs from this row's successor by
    more than `tolerance` standard deviations. Works on `rows` rows at a time."""
    scale = tolerance * obs.std(0) + rounding(obs, next_obs)
    breaks = np.zeros(len(obs), bool)
    for i in range(0, len(obs) - 1, rows):
        after = obs[i + 1 : i + 1 + rows]
        apart = np.abs(next_obs[i : i + len(after)] - after)
        breaks[i : i + len(after)] = np.any(apart > scale, axis=1)
    return breaks


def rounding(obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
    """-> (O,) what the precision of either array may change a number by."""
    eps = max(np.finfo(x.dtype).eps for x in (obs, next_obs))
    return 8 * eps * np.maximum(obs.max(0), -obs.min(0))


def timeouts_by_limit(terminals: np.ndarray, limit: int) -> np.ndarray:
    """terminals (N,) -> timeouts (N,) after every `limit` steps since the last end."""
    timeouts, first = np.zeros(len(terminals), bool), 0
    for end in [*np.flatnonzero(terminals), len(terminals)]:
        timeouts[first + limit - 1 : end : limit] = True
        first = end + 1
    return timeouts


def drop_fillers(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Leave out next_observations where at every time-out they are not what followed: the next
    episode's first observation, as environments that reset by themselves give it, the episode's own
    first or last one, or zeros."""
    if SUCCESSORS not in log or "timeouts" not in log:
        return ""
    timeouts = np.flatnonzero(log["timeouts"] & ~log["terminals"])
    inner = timeouts[timeouts < len(log["rewards"]) - 1]
    if not len(inner):
        return ""
    obs, next_obs = log["observations"], log[SUCCESSORS]
    scale = 1e-5 * obs.std(0) + rounding(obs, next_obs)
    same = lambda rows, others: np.all(np.abs(next_obs[rows] - others) <= scale, axis=1)
    steps = np.flatnonzero(~(log["timeouts"] | log["terminals"]))
    ends = np.flatnonzero(log["timeouts"] | log["terminals"])
    first = np.append(0, ends + 1)[np.searchsorted(ends, timeouts)]  # of the episode
    few = steps[:: max(1, len(steps) // 10_000)]
    before = timeouts[timeouts > first] - 1
    stands = np.mean(same(few, obs[few])) < 0.5 and not same(before, obs[before]).any()
    what = ""
    if same(inner, obs[inner + 1]).all():
        what = "the rows that follow, as where the next episode has begun already"
    elif stands and same(timeouts, obs[timeouts]).all():
        what = "the observations themselves"
    elif not next_obs[timeouts].any() and next_obs[steps].any(axis=1).all():
        what = "zeros"
    elif len(timeouts) > 1 and np.all(timeouts > first) and same(timeouts, obs[first]).all():
        what = "the first observations of their own episodes"
    if not what:
        return ""
    del log[SUCCESSORS]
    return (
        f"next_observations at the {len(inner)} time-outs are {what}; those transitions are left "
        "out"
    )


def say_odd_ends(log: dict[str, np.ndarray], rules: Rules) -> str:
    """Say where the ends of episodes look wrong but cannot be mended."""
    if "timeouts" not in log:
        return ""
    terminals, ended = log["terminals"], log["terminals"] | log["timeouts"]
    said, num = [], len(ended)
    if not ended[:-1].any() and num > (rules.limit or 1000):
        said.append(f"no end of an episode is marked, so that all {num:,} rows are one episode")
    longest = np.diff(np.flatnonzero(ended), prepend=-1).max(initial=0)
    if rules.limit and longest > 2 * rules.limit:  # demonstrations may be longer than the limit
        said.append(
            f"an episode of {longest:,} steps is longer than the task's {rules.limit:,}; ends may "
            "lack a mark"
        )
    in_row = int(np.sum(terminals[1:] & terminals[:-1]))
    if in_row > 0.5 * terminals.sum() and not rules.goal:
        said.append(
            f"{in_row:,} of {terminals.sum():,} terminals follow a terminal, as where a flag of "
            "success stays on; each is an episode of one step"
        )
    return "; ".join(said)


# --- Episodes ---


def episode_returns(log: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Log -> (undiscounted returns (E,), lengths (E,)) of the E episodes that have ended. A log
    without an end counts as one episode."""
    ends = np.flatnonzero(log["terminals"] | log["timeouts"])
    ends = ends if len(ends) else np.array([len(log["rewards"]) - 1])
    totals = np.cumsum(log["rewards"], dtype=np.float64)[ends]
    return np.diff(totals, prepend=0.0), np.diff(ends, prepend=-1)
