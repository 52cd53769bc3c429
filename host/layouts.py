"""The layouts in which libraries keep the same arrays, one function for each.

    log, said, unsure = read("demo.hdf5")   # arrays under D4RL's names

said is a phrase about what was done, or ""; unsure is true where terminals may be time-outs.

An adapter gives the same three, or None where the file has another layout. D4RL's arrays and those
of gymnasium, Stable-Baselines and d3rlpy version 1 differ in names alone. robomimic, d3rlpy version
2 and Minari keep a group for each episode, imitation the places where episodes are split.
"""

import re
from pathlib import Path

import numpy as np

from host.errors import UserError
from host.files import list_arrays, read_arrays

NAMES = {  # D4RL's name -> other names of the same array
    "observations": ("observations", "observation", "obs", "states", "state"),
    "actions": ("actions", "action", "acts"),
    "rewards": ("rewards", "reward", "rews"),
    "terminals": ("terminals", "terminations", "terminated", "terminal"),
    "timeouts": ("timeouts", "truncations", "truncated", "timeout"),
    "next_observations": ("next_observations", "next_observation", "next_obs"),
}
NEXT_STATES = ("next_states", "next_state")  # where the observations are called states
DONE = ("dones", "done")  # an end of either kind
LAST = ("episode_terminals", "episode_ends")  # the last step of every episode
FIRST = ("episode_starts",)  # the first step of every episode
WIDE = ("observations", "next_observations")  # read in double precision if they have it


def read(path: Path) -> tuple[dict[str, np.ndarray], str, bool]:
    """A file -> (arrays under D4RL's names, a phrase that says what was done, whether terminals may
    be time-outs). Raises UserError where it fits no layout."""
    if path.is_dir():
        inside = [p for p in (path / "main_data.hdf5", path / "data" / "main_data.hdf5")
                  if p.is_file()]  # fmt: skip
        if not inside:
            raise UserError(f"{path} is a folder; give the HDF5 or npz file in it")
        path = inside[0]
    found = list_arrays(path)
    for adapter in (robomimic, minari_file, d3rlpy, imitation, flat):
        try:
            log = adapter(path, found)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError) as e:
            like = "" if adapter is flat else f" of {adapter.__name__.replace('_', ' ')}'s layout"
            said = " ".join(str(e).split())[:120]
            raise UserError(f"{path}: arrays{like} do not fit together ({said})") from e
        if log is not None:
            return log


def agree(where: str, num: int, arrays: dict[str, np.ndarray]) -> None:
    """Raise ValueError where an episode's arrays have another number of rows."""
    for name, x in arrays.items():
        if x.ndim == 0 or len(x) != num or num == 0:
            raise ValueError(f"{where}: {name} has shape {x.shape}, not {num} rows")


def flags(x: np.ndarray) -> np.ndarray:
    """Ends -> bool. Raises ValueError for other numbers than 0 and 1."""
    if not np.all((x == 0) | (x == 1)):
        raise ValueError("ends of episodes should be 0 or 1")
    return x.astype(bool)


def pick(found: dict, names: tuple[str, ...]) -> str | None:
    """-> the first of the names that the file has."""
    return next((name for name in names if name in found), None)


def flat(path: Path, found: dict):
    """Arrays of N rows each, under D4RL's names or others."""
    chosen = {key: name for key, names in NAMES.items() if (name := pick(found, names))}
    if chosen.get("observations") in ("states", "state"):
        chosen.pop("next_observations", None)
        if name := pick(found, NEXT_STATES):
            chosen["next_observations"] = name
    done, last, first = (pick(found, names) for names in (DONE, LAST, FIRST))
    lacking = [key for key in ("observations", "actions", "rewards") if key not in chosen]
    if "terminals" not in chosen and not (done or last or first):
        lacking.append("terminals")
    if lacking == ["rewards"] and "qpos" in found:
        task = re.sub(r"(-v\d+)?$", r"-singletask\1", path.stem, count=1)
        raise UserError(
            f"{path} has states and no rewards, as the files of OGBench; name the task that gives "
            f"rewards, such as --env ogbench:{task}"
        )
    if lacking:
        has = ", ".join(sorted(found)[:20]) or "no arrays"
        raise UserError(f"{path} has no {', '.join(lacking)}; it has {has}")
    others = [name for name in (done, last, first) if name]
    wide = tuple(chosen[key] for key in WIDE if key in chosen)
    arrays = read_arrays(path, (*chosen.values(), *others), wide=wide)
    column = lambda x: x[:, 0] if x.ndim == 2 and x.shape[1] == 1 else x
    log = {key: arrays[name] for key, name in chosen.items()}
    log |= {key: column(log[key]) for key in ("rewards", "terminals", "timeouts") if key in log}
    of_ends = {name: flags(column(arrays[name])) for name in others}
    said, unsure, num = [], False, len(log["rewards"])
    agree("the log", num, of_ends)
    if last:
        ends = of_ends[last]
    elif first:
        ends = np.roll(of_ends[first], -1)
        ends[-1] = True
    elif done:
        ends = of_ends[done]
    if "terminals" not in log:
        timeouts = flags(column(log["timeouts"])) if "timeouts" in log else np.zeros(num, bool)
        log["terminals"] = of_ends[done] & ~timeouts if done else np.zeros(num, bool)
        unsure = bool(done) and "timeouts" not in log
        if not done:
            said.append("it says where episodes end, not why; all ends are taken as time-outs")
        elif unsure and not (last or first):
            said.append(f"{done} is taken as terminals, without time-outs")
    if "timeouts" not in log and (last or first or (done and "terminals" in chosen)):
        log["timeouts"] = ends & ~flags(column(log["terminals"]))
    if "timeouts" not in chosen and "masks" in found and found["masks"][1] in ((num,), (num, 1)):
        ends = ends if done or last or first else flags(log["terminals"])
        said.append(use_masks(path, log, ends))
    if "valids" in found and found["valids"][1] in ((num,), (num, 1)):
        said.append(keep_valid(path, log))
    if "costs" in found or "cost" in found:
        said.append("costs are not used")
    said = "; ".join(filter(None, said))
    return {key: log[key] for key in NAMES if key in log}, said, unsure


def use_masks(path: Path, log: dict, ends: np.ndarray) -> str:
    """Where masks (N,) are 0 and 1, as in the logs of OGBench and of JAX libraries, a terminal is
    where they are 0, and `ends` (N,) are the ends of trajectories. Masks without a 0, or with more
    0 than 1, mean something else. -> what was done."""
    masks = read_arrays(path, ("masks",))["masks"].ravel()
    if not np.isin(masks, (0, 1)).all() or np.array_equal(masks == 0, log["terminals"] != 0):
        return ""
    if np.mean(masks == 0) > 0.5 or masks.all():
        return ""
    ends = ends | (log["terminals"] != 0) | (log.get("timeouts", np.zeros(len(ends))) != 0)
    log["terminals"] = masks == 0
    log["timeouts"] = ends & ~log["terminals"]
    return "terminals are where masks is 0, and other ends are time-outs"


def keep_valid(path: Path, log: dict) -> str:
    """Where valids (N,) is 0, as in OGBench's compact data sets, a row is the last observation of a
    trajectory and no step: it becomes the successor of the row before it. -> what was done."""
    valid = read_arrays(path, ("valids",))["valids"].ravel() != 0
    if valid.all():
        return ""
    last = valid & ~np.append(valid[1:], False)
    log.setdefault("next_observations", np.roll(log["observations"], -1, axis=0))
    timeouts = log.get("timeouts", np.zeros(len(valid))) != 0
    log["timeouts"] = (timeouts | last) & (log["terminals"] == 0)
    for key in log:
        log[key] = log[key][valid]
    return f"{np.sum(~valid)} rows that valids marks are last observations, not steps"


def join(episodes: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Logs of single episodes -> one log."""
    return {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}


def numbered(found: dict, pattern: str) -> list[str]:
    """-> the parts of the names that fit a pattern with one number, in the number's order."""
    parts = {m[0]: int(m[1]) for name in found if (m := re.match(pattern, name))}
    return sorted(parts, key=parts.get)


def robomimic(path: Path, found: dict):
    """data/demo_N/{obs/*, actions, rewards, dones}: observations are those of one or two axes, in
    the order of their names. A demonstration ends at its first success, which dones marks, or else
    by a time-out. Where rewards are 0 and 1, a last row that is done without one is a time-out."""
    demos = numbered(found, r"data/demo_(\d{1,9})(?=/)")
    if not demos:
        return None
    first = f"{demos[0]}/obs/"
    channels = sorted(n[len(first) :] for n in found if n.startswith(first))
    images = [c for c in channels if len(found[first + c][1] or ()) > 2]
    channels = [c for c in channels if c not in images]
    if not channels:
        raise UserError(f"{path}: {first} has no observations but images, which are not supported")
    names = [f"{demo}/obs/{c}" for demo in demos for c in channels]
    after = [name.replace("/obs/", "/next_obs/", 1) for name in names]
    if not all(x in found and found[x][1] == found[y][1] for x, y in zip(after, names)):
        after = []
    wide = (*names, *after)
    names = [*wide] + [f"{demo}/{key}" for demo in demos for key in ("actions", "rewards", "dones")]
    arrays = read_arrays(path, tuple(names), wide=wide)
    sparse = all(np.isin(arrays[f"{demo}/rewards"], (0, 1)).all() for demo in demos)
    episodes, cut, failed, true = [], 0, 0, True
    for demo in demos:
        columns = [arrays[f"{demo}/obs/{c}"] for c in channels]
        columns += [arrays[f"{demo}/next_obs/{c}"] for c in channels] if after else []
        action, reward, done = (arrays[f"{demo}/{key}"] for key in ("actions", "rewards", "dones"))
        of_obs = dict(zip([*channels, *(f"next {c}" for c in channels)], columns))
        agree(demo, len(action), of_obs | {"rewards": reward, "dones": done})
        columns = [x.reshape(len(x), -1) for x in columns]
        terminal = flags(done).ravel()
        end = int(np.argmax(terminal)) + 1 if terminal.any() else len(terminal)
        cut += len(terminal) - end
        if sparse and terminal.any() and end == len(terminal) and np.ravel(reward)[-1] == 0:
            terminal, failed = np.zeros_like(terminal), failed + 1
        timeout = np.arange(end) == end - 1
        half = len(channels)
        steps = [np.array_equal(x[:-1], y[1:]) for x, y in zip(columns[half:], columns[:half])]
        true = true and all(steps)
        known = {"next_observations": np.concatenate(columns[half:], 1)[:end]} if after else {}
        episodes.append(
            known
            | {
                "observations": np.concatenate(columns[:half], axis=1)[:end],
                "actions": action[:end],
                "rewards": reward[:end],
                "terminals": terminal[:end],
                "timeouts": timeout & ~terminal[:end],
            }
        )
    said = f"robomimic's layout: {len(demos)} demonstrations, observations {', '.join(channels)}"
    if not true:
        for episode in episodes:
            del episode["next_observations"]
        said += "; next_obs are not the next rows and are not used"
    said += f"; {cut} steps after the first success are left out" if cut else ""
    said += f"; {failed} that end without a reward end by a time-out" if failed else ""
    return (
        join(episodes),
        said + (f"; images {', '.join(images)} are not used" if images else ""),
        False,
    )


def minari_file(path: Path, found: dict):
    """episode_N/{observations, actions, rewards, terminations, truncations}, one observation more
    than actions; observations may be a group of arrays."""
    groups = numbered(found, r"episode_(\d{1,9})(?=/)")
    if not groups or f"{groups[0]}/rewards" not in found:
        return None
    first = f"{groups[0]}/observations"
    channels = [""] if first in found else [
        n[len(first) :] for n in found if n.startswith(first + "/")
    ]  # fmt: skip
    names = [f"{g}/observations{c}" for g in groups for c in channels]
    kinds = ("actions", "rewards", "terminations", "truncations")
    others = [f"{g}/{key}" for g in groups for key in kinds]
    arrays = read_arrays(path, (*names, *others), wide=tuple(names))
    episodes = []
    for g in groups:
        obs = [arrays[f"{g}/observations{c}"] for c in channels]
        obs = np.concatenate([x.reshape(len(x), -1) for x in obs], axis=1)
        action, reward, terminal, timeout = (arrays[f"{g}/{key}"] for key in kinds)
        if len(obs) == 1 and len(action) == 0:
            continue  # an episode without a step
        if len(obs) != len(action) + 1:
            raise UserError(f"{path}: {g} should have one more observation than actions")
        agree(g, len(action), {"rewards": reward, "terminations": terminal, "truncations": timeout})
        terminal, timeout = flags(terminal), flags(timeout) & ~flags(terminal)
        timeout[-1] |= not terminal[-1]
        episodes.append(
            {
                "observations": obs[:-1],
                "actions": action.reshape(len(action), -1),
                "rewards": reward,
                "terminals": terminal,
                "timeouts": timeout,
                "next_observations": obs[1:],
            }
        )
    return join(episodes), f"Minari's layout: {len(groups)} episodes", False


def d3rlpy(path: Path, found: dict):
    """d3rlpy's version 2: observations_N, actions_N, rewards_N and terminated_N of episode N, at
    whose end an episode is cut unless it has terminated."""
    groups = [name.rsplit("_", 1)[1] for name in numbered(found, r"observations_(\d{1,9})$")]
    if not groups or f"actions_{groups[0]}" not in found:
        return None
    keys = ("observations", "actions", "rewards", "terminated")
    names = tuple(f"{key}_{g}" for g in groups for key in keys)
    arrays = read_arrays(path, names, wide=tuple(f"observations_{g}" for g in groups))
    episodes = []
    for g in groups:
        obs, action, reward, terminated = (arrays[f"{key}_{g}"] for key in keys)
        agree(f"episode {g}", len(obs), {"observations": obs, "actions": action, "rewards": reward})
        terminal = np.zeros(len(obs), bool)
        terminal[-1] = flags(np.ravel(terminated)[:1])[0]
        timeout = np.zeros(len(obs), bool)
        timeout[-1] = not terminal[-1]
        episodes.append(
            {
                "observations": obs,
                "actions": action.reshape(len(action), -1),
                "rewards": reward.reshape(len(reward)),
                "terminals": terminal,
                "timeouts": timeout,
            }
        )
    return join(episodes), f"d3rlpy's layout: {len(groups)} episodes", False


def imitation(path: Path, found: dict):
    """imitation's rollouts: acts (N, A) and rews (N,) of E episodes, split at indices (E - 1,); obs
    with one row more for each episode; terminal (E,), whether an episode has ended."""
    if not {"obs", "acts", "rews", "indices", "terminal"} <= set(found):
        return None
    arrays = read_arrays(path, ("obs", "acts", "rews", "indices", "terminal"))
    cuts = arrays["indices"].astype(int)
    num, terminal = len(arrays["acts"]), flags(arrays["terminal"])
    lengths = np.diff(np.concatenate([[0], cuts, [num]]))
    if len(terminal) != len(lengths) or lengths.min() < 1:
        raise UserError(f"{path}: indices do not split {num} steps into {len(terminal)} episodes")
    if len(arrays["obs"]) != num + len(lengths):
        raise UserError(f"{path}: obs should have one row more than acts for each episode")
    last = np.cumsum(lengths) - 1  # rows of actions
    first = np.cumsum(lengths + 1) - 1  # the observation after each episode
    ends = np.zeros((2, num), bool)
    ends[0, last], ends[1, last] = terminal, ~terminal
    log = {
        "observations": np.delete(arrays["obs"], first, axis=0),
        "actions": arrays["acts"].reshape(num, -1),
        "rewards": arrays["rews"],
        "terminals": ends[0],
        "timeouts": ends[1],
        "next_observations": np.delete(arrays["obs"], np.append(0, first[:-1] + 1), axis=0),
    }
    said = "imitation's layout; an episode that ended at a limit of steps counts as terminal there"
    return log, said, True
