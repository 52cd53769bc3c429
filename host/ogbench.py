"""OGBench: its data sets by name or as files, and its environments with a fixed goal.

    log, path, reached = read_ogbench("antmaze-large-navigate-singletask-task1-v0")
    envs = OgbenchEnvs("antmaze-large-navigate-singletask-task1-v0", num=10)

A data set of OGBench has no rewards. Those of a task are made by OGBench's own relabelling. A score
is the share of episodes that reach the goal.
"""

import contextlib
import difflib
import os
import re
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np

from host.errors import UserError
from host.files import list_arrays, offline, read_arrays, require, say
from host.gym_envs import GymnasiumEnvs, quiet_stderr, scratch

EXAMPLE = "ogbench:antmaze-large-navigate-singletask-v0"
FOLDER = Path("~/.ogbench/data")  # where the package keeps its files
STALL = 20.0  # seconds without a byte before a download is given up


class Names(NamedTuple):
    """What a task's name stands for."""

    env: str  # id of the environment in gymnasium's registry
    data: str  # name of the file without its suffix


def names_of(task: str) -> Names:
    """antmaze-large-navigate-singletask-task1-v0 -> its environment, antmaze-large-singletask-
    task1-v0, and its data set, antmaze-large-navigate-v0. Raises UserError on another name."""
    parts = task.split("-")
    if not re.fullmatch(r"[a-z0-9-]+-v\d+", task) or len(parts) < 3:
        raise UserError(f"ogbench:{task} is not a name of OGBench, such as {EXAMPLE}")
    if "singletask" not in parts:
        with_goal = "-".join([*parts[:-1], "singletask", parts[-1]])
        raise UserError(
            f"ogbench:{task} has no rewards of its own; name a task with a goal, such as "
            f"ogbench:{with_goal}"
        )
    at = parts.index("singletask")
    env = "-".join(parts[: at - 1] + parts[at:])
    data = "-".join(parts[:at] + parts[-1:])
    known = registered()
    if env not in known:
        near = difflib.get_close_matches(env, [x for x in known if "singletask" in x], n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"OGBench has no environment {env} for ogbench:{task}{hint}")
    return Names(env, data)


def registered() -> list[str]:
    """-> ids of OGBench's environments. Raises UserError without the package."""
    os.environ.setdefault("MUJOCO_GL", "disable")  # dm_control would look for a display
    require("ogbench", "ogbench")
    registry = require("gymnasium", "gymnasium").registry
    return [k for k, spec in registry.items() if str(spec.entry_point).startswith("ogbench.")]


def make(env: str):
    """Id -> an environment with a fixed goal. Raises UserError on one of images or of choices."""
    gymnasium = require("gymnasium", "gymnasium")
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    with scratch():
        made = gymnasium.make(env, disable_env_checker=True)
    shape = made.observation_space.shape
    if shape is None or len(shape) != 1 or not isinstance(made.action_space, gymnasium.spaces.Box):
        raise UserError(f"{env} has images or discrete actions, which are not supported")
    return made


class OgbenchEnvs(GymnasiumEnvs):
    """`num` copies of a task of OGBench. The reward is 1 in the step that reaches the goal and 0 in
    all others; that step ends the episode."""

    def __init__(self, task: str, num: int):
        env = names_of(task).env
        super().__init__(lambda: make(env), num)

    def _step(self, env, action):
        obs, _, terminal, _, info = env.step(action)
        reached = bool(info["success"])
        return self.flatten(obs), float(reached), bool(terminal) or reached


def read_ogbench(task: str, path: Path | None = None) -> tuple[dict[str, np.ndarray], Path, float]:
    """A task's name, and perhaps the file -> (log in D4RL's layout, the file, share of trajectories
    that reach the goal).

    The last row of a trajectory has no successor and is left out. Rewards come from OGBench's
    relabelling. A step at the goal is a terminal, and its trajectory goes on as another episode.
    Raises UserError if the file cannot be had, is damaged, or is not of the task's environment.
    """
    names = names_of(task)
    path = path or fetch(names.data)
    has = list_arrays(path)
    states = tuple(name for name in ("qpos", "button_states") if name in has)
    needed = ("observations", "actions", "terminals", "qpos")
    arrays = read_arrays(path, (*needed, *states[1:]), wide=("qpos",))
    last = arrays["terminals"] != 0
    if last.shape != (len(arrays["observations"]),) or not last.any():
        raise UserError(f"{path}: terminals should be 1 in the last row of every trajectory")
    last[-1] = True
    keep = ~last
    log = {key: arrays[key][keep] for key in ("observations", "actions")}
    log["next_observations"] = arrays["observations"][np.flatnonzero(keep) + 1]
    rewards, reached = relabel(names.env, {key: arrays[key][keep] for key in states}, path)
    ends = np.append(last[1:], True)[keep]
    log |= {"rewards": rewards, "terminals": reached, "timeouts": ends & ~reached}
    trajectory = np.cumsum(last)[keep]  # of each row
    share = len(np.unique(trajectory[reached])) / len(np.unique(trajectory))
    say(f"{path.name}: rewards of {names.env}, by OGBench's relabelling; {share:.1%} of the "
        "trajectories reach the goal")  # fmt: skip
    return log, path, share


def relabel(env: str, states: dict[str, np.ndarray], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Simulator states of N steps -> rewards (N,) and whether a step is at the goal (N,)."""
    tools = require("ogbench.relabel_utils", "ogbench")
    states = dict(states)
    with quiet_stderr():
        made = make(env)
    try:
        tools.relabel_dataset(env, made, states)
    except (IndexError, ValueError, KeyError, AssertionError) as e:
        raise UserError(f"{path}: its states are not those of {env} ({e})") from e
    finally:
        made.close()
    return states["rewards"].astype(np.float32), states["masks"] == 0


def fetch(name: str) -> Path:
    """A data set's name -> its file in OGBench's folder, fetched by the package if it is not there.
    Raises UserError."""
    folder = FOLDER.expanduser()
    path = folder / f"{name}.npz"
    if path.is_file():
        return path
    if offline():
        raise UserError(f"{name}.npz is not in {folder}, and downloads are off")
    download = require("ogbench", "ogbench").download_datasets
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(STALL)
        with contextlib.redirect_stdout(None):
            download([name], str(folder))
    except OSError as e:
        reason = " ".join(str(getattr(e, "reason", None) or e).split())
        raise UserError(
            f"{name}.npz cannot be fetched ({reason}); put it into {folder}, or give --dataset-path"
        ) from e
    finally:
        socket.setdefaulttimeout(before)
    return path
