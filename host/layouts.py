"""The layouts in which libraries keep the same arrays, one function for each.

    log, said = read("demo.hdf5")   # D4RL's names; said: a phrase about what was left out, or ""

D4RL's and those of Stable-Baselines3, imitation, d3rlpy, CORL and TorchRL differ in names alone.
robomimic, d3rlpy version 2 and Minari keep a group for each episode, imitation the places where
episodes are split.
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
    "next_observations": ("next_observations", "next_observation", "next_obs", "next_states"),
}
DONE = ("dones", "done")  # an end of either kind
LAST = ("episode_terminals", "episode_ends")  # the last step of every episode
FIRST = ("episode_starts",)  # the first step of every episode
WIDE = ("observations", "next_observations")  # kept in double precision until they are centred


def read(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """A file -> (arrays under D4RL's names, a phrase that says what was done). Raises UserError
    where it fits no layout."""
    if path.is_dir():
        inside = [p for p in (path / "main_data.hdf5", path / "data" / "main_data.hdf5")
                  if p.is_file()]  # fmt: skip
        if not inside:
            raise UserError(f"{path} is a folder; give the HDF5 or npz file in it")
        path = inside[0]
    found = list_arrays(path)
    for adapter in (robomimic, minari_file, d3rlpy, imitation):
        log = adapter(path, found)
        if log is not None:
            return log
    return flat(path, found)


def pick(found: dict, names: tuple[str, ...]) -> str | None:
    """-> the first of the names that the file has."""
    return next((name for name in names if name in found), None)


def flat(path: Path, found: dict) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of N rows each, under D4RL's names or others."""
    chosen = {key: name for key, names in NAMES.items() if (name := pick(found, names))}
    extra = {key: name for key, names in (("done", DONE), ("last", LAST), ("first", FIRST))
             if (name := pick(found, names))}  # fmt: skip
    if "terminals" not in chosen and "done" in extra:
        chosen["terminals"] = extra.pop("done")
    elif "terminals" not in chosen and ("first" in extra or "last" in extra):
        extra.setdefault("none", "")
    lacking = [key for key in ("observations", "actions", "rewards", "terminals")
               if key not in chosen and not (key == "terminals" and "none" in extra)]  # fmt: skip
    if lacking:
        has = ", ".join(sorted(found)[:20]) or "no arrays"
        raise UserError(f"{path} has no {', '.join(lacking)}; it has {has}")
    names = [*chosen.values(), *(extra[k] for k in ("last", "first") if k in extra)]
    wide = tuple(chosen[key] for key in WIDE if key in chosen)
    arrays = read_arrays(path, tuple(names), wide=wide)
    log = {key: arrays[name] for key, name in chosen.items()}
    said = []
    if "none" in extra:
        log["terminals"] = np.zeros(len(log["rewards"]), bool)
        said.append("it says where episodes end, not why; all ends are taken as time-outs")
    if "timeouts" not in log and ("last" in extra or "first" in extra):
        if "last" in extra:
            ends = arrays[extra["last"]].astype(bool).ravel()
        else:
            ends = np.roll(arrays[extra["first"]].astype(bool).ravel(), -1)
            ends[-1] = True
        if len(ends) == len(log["terminals"]):
            log["timeouts"] = ends & ~log["terminals"].astype(bool).reshape(len(ends), -1)[:, 0]
    elif chosen["terminals"] in DONE and "timeouts" in log:
        if log["terminals"].shape == log["timeouts"].shape:
            log["terminals"] = np.where(log["timeouts"] > 0, 0, log["terminals"])
    elif chosen["terminals"] in DONE:
        said.append(f"{chosen['terminals']} is taken as terminals, without time-outs")
    if "costs" in found or "cost" in found:
        said.append("costs are not used")
    order = [key for key in NAMES if key in log]
    return {key: log[key] for key in order}, "; ".join(said)


def join(episodes: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Logs of single episodes -> one log."""
    return {key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]}


def numbered(found: dict, pattern: str) -> list[str]:
    """-> the parts of the names that fit a pattern with one number, in the number's order."""
    parts = {m[0]: int(m[1]) for name in found if (m := re.match(pattern, name))}
    return sorted(parts, key=parts.get)


def robomimic(path: Path, found: dict) -> tuple[dict[str, np.ndarray], str] | None:
    """data/demo_N/{obs/*, actions, rewards, dones}: observations are those of one or two axes, in
    the order of their names. A demonstration ends by a time-out, or where dones says success."""
    demos = numbered(found, r"data/demo_(\d+)")
    if not demos:
        return None
    first = f"{demos[0]}/obs/"
    channels = sorted(n[len(first) :] for n in found if n.startswith(first))
    images = [c for c in channels if len(found[first + c][1]) > 2]
    channels = [c for c in channels if c not in images]
    if not channels:
        raise UserError(f"{path}: {first} has no observations but images, which are not supported")
    names = [f"{demo}/obs/{c}" for demo in demos for c in channels]
    names += [f"{demo}/{key}" for demo in demos for key in ("actions", "rewards", "dones")]
    arrays = read_arrays(path, tuple(names))
    episodes = []
    for demo in demos:
        columns = [arrays[f"{demo}/obs/{c}"] for c in channels]
        columns = [x.reshape(len(x), -1) for x in columns]
        terminal = arrays[f"{demo}/dones"].astype(bool)
        timeout = np.zeros_like(terminal)
        timeout[-1] = not terminal[-1]
        episodes.append(
            {
                "observations": np.concatenate(columns, axis=1),
                "actions": arrays[f"{demo}/actions"],
                "rewards": arrays[f"{demo}/rewards"],
                "terminals": terminal,
                "timeouts": timeout,
            }
        )
    said = f"robomimic's layout: {len(demos)} demonstrations, observations {', '.join(channels)}"
    return join(episodes), said + (f"; images {', '.join(images)} are not used" if images else "")


def minari_file(path: Path, found: dict) -> tuple[dict[str, np.ndarray], str] | None:
    """episode_N/{observations, actions, rewards, terminations, truncations}, one observation more
    than actions; observations may be a group of arrays."""
    groups = numbered(found, r"episode_(\d+)(?=/)")
    if not groups or f"{groups[0]}/rewards" not in found:
        return None
    first = f"{groups[0]}/observations"
    channels = [""] if first in found else [
        n[len(first) :] for n in found if n.startswith(first + "/")
    ]  # fmt: skip
    flags = ("actions", "rewards", "terminations", "truncations")
    names = [f"{g}/observations{c}" for g in groups for c in channels]
    arrays = read_arrays(path, (*names, *(f"{g}/{key}" for g in groups for key in flags)))
    episodes = []
    for g in groups:
        obs = [arrays[f"{g}/observations{c}"] for c in channels]
        obs = np.concatenate([x.reshape(len(x), -1) for x in obs], axis=1)
        action, reward, terminal, timeout = (arrays[f"{g}/{key}"] for key in flags)
        if len(obs) != len(action) + 1:
            raise UserError(f"{path}: {g} should have one more observation than actions")
        terminal, timeout = terminal.astype(bool), timeout.astype(bool) & ~terminal.astype(bool)
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
    return join(episodes), f"Minari's layout: {len(groups)} episodes"


def d3rlpy(path: Path, found: dict) -> tuple[dict[str, np.ndarray], str] | None:
    """d3rlpy's version 2: observations_N, actions_N, rewards_N and terminated_N of episode N, at
    whose end an episode is cut unless it has terminated."""
    groups = [name.rsplit("_", 1)[1] for name in numbered(found, r"observations_(\d+)$")]
    if not groups or f"actions_{groups[0]}" not in found:
        return None
    keys = ("observations", "actions", "rewards", "terminated")
    arrays = read_arrays(path, tuple(f"{key}_{g}" for g in groups for key in keys))
    episodes = []
    for g in groups:
        obs, action, reward, terminated = (arrays[f"{key}_{g}"] for key in keys)
        terminal = np.zeros(len(obs), bool)
        terminal[-1] = bool(np.ravel(terminated)[0])
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
    return join(episodes), f"d3rlpy's layout: {len(groups)} episodes"


def imitation(path: Path, found: dict) -> tuple[dict[str, np.ndarray], str] | None:
    """imitation's rollouts: acts (N, A) and rews (N,) of E episodes, split at indices (E - 1,); obs
    with one row more for each episode; terminal (E,), whether an episode has ended."""
    if not {"obs", "acts", "rews", "indices", "terminal"} <= set(found):
        return None
    arrays = read_arrays(path, ("obs", "acts", "rews", "indices", "terminal"))
    cuts = arrays["indices"].astype(int)
    num, terminal = len(arrays["acts"]), arrays["terminal"].astype(bool)
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
    return log, said
