"""Minari's data sets, read as logs, and the environments that they name.

log, about = read_minari("mujoco/hopper/medium-v0")
make = minari_environment(open_minari("mujoco/hopper/medium-v0"))   # None if unusable here
"""

import contextlib
import functools
import json
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from host.errors import UserError
from host.files import DAMAGE, make_folder, offline, require, say

# D4RL's task, without its version -> Minari's data set on the same task. The MuJoCo data sets are
# new recordings, not D4RL's.
MINARI_NAMES = {
    **{
        f"{task}-{kind}": f"mujoco/{task}/{kind}-v0"
        for task in ("halfcheetah", "hopper", "walker2d", "ant")
        for kind in ("medium", "expert")
    },
    **{
        f"{task}-{kind}": f"D4RL/{task}/{kind}-v2"
        for task in ("pen", "hammer", "door", "relocate")
        for kind in ("human", "cloned", "expert")
    },
    **{
        f"maze2d-{maze}": f"D4RL/pointmaze/{maze}-v2"
        for maze in ("umaze", "medium", "large", "umaze-dense", "medium-dense", "large-dense")
    },
    **{
        f"antmaze-{maze}": f"D4RL/antmaze/{maze}-v1"
        for maze in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play",
                     "large-diverse")
    },
    **{f"kitchen-{kind}": f"D4RL/kitchen/{kind}-v2" for kind in ("complete", "partial", "mixed")},
}  # fmt: skip

# The arrays of a log in D4RL's layout
ARRAYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


def check_minari_name(name: str) -> str:
    """A Minari identifier such as mujoco/hopper/medium-v0 -> the same. Raises UserError on any
    other text."""
    if not re.fullmatch(r"[\w-]+(/[\w-]+)*-v\d+", name):
        raise UserError(
            f"'minari:{name}' is no Minari name; it should look like minari:ENV/DATA-v0"
        )
    return name


def open_minari(name: str):
    """Minari name -> minari.MinariDataset, fetched by the minari package if it is not on disk.
    Raises UserError if there is no such data set, if it is unreadable, or if opening it would run
    code that it names."""
    minari = require("minari", "minari")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every failed try
    folder = os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")
    make_folder(Path(folder).expanduser(), "MINARI_DATASETS_PATH")
    try:
        content = Path(folder).expanduser() / name / "data"
        if not content.exists():
            if offline():
                raise UserError(f"minari:{name} is not on this machine, and downloads are off")
            minari.download_dataset(name)
        check_files(content, name)
        return minari.load_dataset(name)
    except UserError:
        raise
    except Exception as e:  # the package, its hub client and the file raise errors of many types
        reason = " ".join(str(e).split())[:150]
        raise UserError(
            f"Minari has no readable data set {name} here or at its remote ({type(e).__name__}: "
            f"{reason}); python data.py list names the local ones"
        ) from e


def check_files(folder: Path, name: str) -> None:
    """Check the files of a data set before the minari package opens them.

    The package builds the environment that metadata.json names if a space is missing there, and
    that environment may be any Python function. Raises UserError for such a data set, for files
    that are not plain ones, for links out of the HDF5 file, and for counts that do not fit.
    """

    def refuse(what: str):
        raise UserError(f"minari:{name} is refused: {what}")

    plain = lambda path: stat.S_ISREG(path.stat().st_mode) or path.is_dir()
    inside = folder.resolve()
    if odd := [path for path in folder.rglob("*") if not path.exists() or not plain(path)]:
        refuse(f"{odd[0].name} is not a plain file")
    if away := [p for p in folder.rglob("*") if not p.resolve().is_relative_to(inside)]:
        refuse(f"{away[0].name} is a link to a file outside the data set")
    metadata = json.loads((folder / "metadata.json").read_text())
    if not isinstance(metadata, dict):
        refuse("metadata.json holds no dictionary")
    for space in ("observation_space", "action_space"):
        if not isinstance(metadata.get(space), str):
            refuse(
                f"metadata.json has no {space}, and Minari would build the environment that the "
                "data set names to find it; only a data set with both spaces is opened"
            )
    main = folder / "main_data.hdf5"
    if main.exists():
        num = count_episodes(main, refuse)
    else:
        num = sum(path.name.isdigit() for path in folder.iterdir())
    declared = metadata.get("total_episodes")
    if not isinstance(declared, int) or not 0 <= declared <= num:
        refuse(f"it declares {declared} episodes and holds {num}")
    if not isinstance(metadata.get("total_steps"), int):
        refuse(f"it declares {metadata.get('total_steps')} steps")


def count_episodes(path: Path, refuse: Callable) -> int:
    """An HDF5 file -> the number of its episodes; refuse(reason) is called for a link that leaves
    the file, or for raw data or virtual data in other files."""
    h5py, seen, declared = require("h5py", "h5py"), set(), 0

    def walk(group, depth: int) -> None:
        nonlocal declared
        if (address := h5py.h5o.get_info(group.id).addr) in seen:
            return  # the same group under another name
        seen.add(address)
        for key in group:
            if isinstance(group.get(key, getlink=True), (h5py.ExternalLink, h5py.SoftLink)):
                refuse(f"{group.name}/{key} in {path.name} is a link, which is not followed")
            item = group[key]
            if isinstance(item, h5py.Group):
                if depth > 8:
                    refuse(f"{path.name} is nested too deep")
                walk(item, depth + 1)
            elif isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
                refuse(f"{item.name} in {path.name} lies in another file, which is not followed")
            elif isinstance(item, h5py.Dataset):
                declared += int(np.prod(item.shape or (), dtype=object)) * item.dtype.itemsize

    with h5py.File(path, "r") as f:
        walk(f, 0)
        stored = path.stat().st_size
        if declared > 200 * stored + 2**26:
            refuse(f"{path.name} has {stored:,} bytes and declares {declared:,}")
        return sum(key.startswith("episode_") for key in f)


# --- Data set -> log ---


class About(NamedTuple):
    """What a Minari data set says of itself."""

    bounds: tuple[np.ndarray, np.ndarray]  # lowest and highest action, (A,) each
    reference: tuple[float, float] | None  # undiscounted returns with scores 0 and 100
    has_environment: bool  # minari_environment gives one


def read_minari(name: str) -> tuple[dict[str, np.ndarray], About]:
    """Minari name -> (log of N rows in D4RL's layout with next_observations, About).

    Observations in a Dict, Tuple or Discrete space are flattened in the space's order. The last of
    the T + 1 observations of an episode appears only in next_observations. An episode whose last
    step has no flag ends by a timeout. Raises UserError if the data set is missing, damaged or
    empty, or has actions outside a Box.
    """
    found = open_minari(name)
    spaces = require("gymnasium", "gymnasium").spaces
    if not isinstance(found.action_space, spaces.Box):
        raise UserError(f"minari:{name} has no continuous actions, but {found.action_space}")
    try:
        log = _read_episodes(found, name)
        metadata = found.storage.metadata
        reference = metadata.get("ref_min_score"), metadata.get("ref_max_score")
        reference = None if None in reference else tuple(map(float, reference))
    except (*DAMAGE, IndexError, AttributeError, MemoryError) as e:
        raise UserError(
            f"minari:{name} is damaged ({type(e).__name__}); remove it and fetch or write it again"
        ) from e
    space = found.action_space
    return log, About(
        bounds=(np.ravel(space.low).astype(np.float32), np.ravel(space.high).astype(np.float32)),
        reference=reference if reference and reference[0] < reference[1] else None,
        has_environment=minari_environment(found) is not None,
    )


def _read_episodes(found, name: str) -> dict[str, np.ndarray]:
    """MinariDataset -> log with the episodes end to end."""
    num, log, at = int(found.total_steps), None, 0
    for episode in tqdm(found.iterate_episodes(), name, total=found.total_episodes, disable=None):
        obs = _flatten(found.observation_space, episode.observations, f"minari:{name}")
        action = _flatten(found.action_space, episode.actions, f"minari:{name}")
        if at + len(action) > num:
            raise UserError(f"minari:{name} has more than the {num} steps that it declares")
        if len(obs) != len(action) + 1:
            raise UserError(
                f"minari:{name}: episode {episode.id} has {len(obs)} observations and "
                f"{len(action)} actions; it should have one more observation than actions"
            )
        if not len(action):
            continue
        terminal = np.asarray(episode.terminations, bool)
        timeout = np.asarray(episode.truncations, bool) & ~terminal
        timeout[-1] |= not terminal[-1]
        rows = obs[:-1], action, np.asarray(episode.rewards), terminal, timeout, obs[1:]
        if log is None:
            wide = np.float64 if obs.dtype == np.float64 else np.float32
            kinds = (wide, np.float32, np.float32, bool, bool, wide)
            log = {
                key: np.empty((num, *x.shape[1:]), kind)
                for key, x, kind in zip(ARRAYS, rows, kinds)
            }
        for array, x in zip(log.values(), rows):
            array[at : at + len(action)] = x
        at += len(action)
    if not at:
        raise UserError(f"minari:{name} is empty")
    return {key: array[:at] for key, array in log.items()}


def _flatten(space, x, where: str) -> np.ndarray:
    """T elements of a space, stacked as Minari stores them -> (T, n), each as gymnasium flattens
    it; in double precision where it is stored so."""
    spaces = require("gymnasium", "gymnasium").spaces
    if isinstance(space, spaces.Box):
        x = np.asarray(x)
        kind = np.float64 if x.dtype.kind in "fiu" and x.dtype.itemsize > 4 else np.float32
        return x.astype(kind, copy=False).reshape(len(x), -1)
    if isinstance(space, spaces.Discrete):
        return np.eye(space.n, dtype=np.float32)[np.asarray(x) - space.start]
    if isinstance(space, spaces.Dict):
        return np.concatenate([_flatten(s, x[k], where) for k, s in space.items()], axis=1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([_flatten(s, v, where) for s, v in zip(space, x)], axis=1)
    raise UserError(f"{where} has observations of {space}, which cannot be flattened to a vector")


# --- The environment of a data set ---


# Keyword arguments of environments that a data set may set. They change the task, as a maze or a
# weight of the reward does, but load no file and open no window.
KEYWORDS = {
    "maze_map", "continuing_task", "reset_target", "reward_type", "tasks_to_complete",
    "terminate_on_tasks_completed", "remove_task_when_completed", "object_noise_ratio",
    "robot_noise_ratio", "forward_reward_weight", "ctrl_cost_weight", "contact_cost_weight",
    "healthy_reward", "terminate_when_unhealthy", "healthy_state_range", "healthy_z_range",
    "healthy_angle_range", "reset_noise_scale", "use_contact_forces", "contact_force_range",
    "exclude_current_positions_from_observation", "include_cfrc_ext_in_observation",
    "max_episode_steps", "g", "goal_velocity", "continuous",
}  # fmt: skip
PACKAGES = ("gymnasium.", "gymnasium_robotics.", "ogbench.")  # whose environments are built
# Wrappers that change neither observations, actions nor rewards
HARMLESS = {"TimeLimit", "OrderEnforcing", "PassiveEnvChecker", "RecordEpisodeStatistics",
            "RecordVideo", "Monitor", "DataCollector", "StepDataCallback"}  # fmt: skip


def minari_environment(found) -> Callable | None:
    """MinariDataset -> make(), which builds the environment that the data set was recorded in.

    None if the environment cannot be used; one line on stderr then says why. Only environments that
    gymnasium, gymnasium-robotics or ogbench register are built, with keyword arguments of KEYWORDS.
    Code that the data set itself names, such as an entry point or a wrapper, is never run.
    """
    spec = found.env_spec
    if spec is None or spec.max_episode_steps is None:
        return None
    gymnasium = require("gymnasium", "gymnasium")
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    with contextlib.suppress(ImportError):
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
    try:
        steps, settings = environment_settings(spec, gymnasium.registry)
        make = functools.partial(
            gymnasium.make, spec.id, disable_env_checker=True, max_episode_steps=steps, **settings
        )
        env = make()
        try:
            env.reset(seed=0)
            env.step(env.action_space.sample())
        finally:
            env.close()
        size = gymnasium.spaces.flatdim
        for name in ("observation_space", "action_space"):
            there, here = (size(getattr(x, name)) for x in (found, env))
            if there != here:
                raise UserError(f"its {name.replace('_', ' ')} has {here} entries, not {there}")
        return make
    except UserError as e:
        reason = str(e)
    except Exception as e:  # an environment may raise anything on settings it does not know
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
    say(
        f"the log was recorded in {spec.id}, which cannot be used here ({reason}); going on "
        "without returns"
    )
    return None


def environment_settings(spec, registry: dict) -> tuple[int, dict]:
    """EnvSpec of a data set -> maximal steps per episode and keyword arguments. Raises UserError
    for an environment that must not be built."""
    known = registry.get(spec.id) if isinstance(spec.id, str) else None
    if known is None:
        raise UserError("no such environment is registered here")
    entry = known.entry_point
    if not (isinstance(entry, str) and entry.startswith(PACKAGES)):
        raise UserError(f"only environments of {', '.join(p[:-1] for p in PACKAGES)} are built")
    wrappers = spec.additional_wrappers
    if any(w.name not in HARMLESS for w in wrappers):
        raise UserError(f"it was wrapped in {', '.join(str(w.name) for w in wrappers)}")
    if not isinstance(spec.kwargs, dict):
        raise UserError("its keyword arguments are no dictionary")
    settings = {k: v for k, v in spec.kwargs.items() if k != "render_mode"}  # nothing is drawn
    if strange := sorted(set(settings) - KEYWORDS):
        raise UserError(f"its keyword argument {strange[0]} may change more than the task")
    steps = [spec.max_episode_steps]
    steps += [w.kwargs.get("max_episode_steps") for w in wrappers if w.name == "TimeLimit"]
    if not all(type(n) is int and 0 < n <= 10**6 for n in steps):
        raise UserError(f"its limit of {steps[-1]} steps per episode is none")
    return min(steps), settings
