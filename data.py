"""Logs in and out: D4RL, Minari, your own HDF5 or npz, or re-collected; names, checks and scores.

    python data.py list                                     # every name, where it comes from
    python data.py info halfcheetah-medium                  # sizes, returns, actions, hash
    python data.py download halfcheetah-medium              # D4RL's own file, resumed and verified
    python data.py collect halfcheetah-medium               # the like of it, by a shipped policy
    python data.py train-policy hopper --out runs/hopper    # a behaviour policy and its snapshots

    task = load("halfcheetah-medium")                       # task.log: a dict of D4RL's arrays

Numpy in, numpy out: nothing but this file and envs.py touches data files, simulators or the
network.
"""

import contextlib
import csv
import difflib
import errno
import fcntl
import functools
import hashlib
import http.client
import json
import logging
import lzma
import os
import re
import shutil
import sys
import tempfile
import time
import tokenize
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

import envs as sim
from envs import require, scale_action

HERE = Path(__file__).resolve().parent
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
SUCCESSORS = "next_observations"  # the sixth array, where a log has it
Source = Literal["auto", "d4rl", "minari", "collect"]


class DataError(Exception):
    """A user's mistake or a missing file; its message is one line that says how to mend it."""


# --- Load: a name or a file -> Task ---


@dataclass(frozen=True)
class Task:
    """A log, where it came from, and the simulator to be judged in, if there is one."""

    name: str
    log: dict[str, np.ndarray]  # KEYS and perhaps SUCCESSORS: float32 and bool, N rows each
    action_low: np.ndarray  # (A,) in the environment's units
    action_high: np.ndarray
    source: str  # one line of provenance, for the table and final.json
    kind: Source  # the `source` that gives this very log again
    simulator: str | None  # e.g. "halfcheetah"; None: returns cannot be measured
    reference: tuple[float, float] | None  # returns that score 0 and 100
    path: Path | None = None  # the file that holds the log

    def score(self, returns):
        """Undiscounted returns -> D4RL's normalised score, 100 * (R - min) / (max - min)."""
        if self.reference is None:
            return None
        low, high = self.reference
        return 100.0 * (np.asarray(returns, np.float64) - low) / (high - low)

    @functools.cached_property
    def behaviour_return(self) -> float:
        """Mean undiscounted return of the log's episodes; the last counts only if it has ended."""
        return float(episode_returns(self.log)[0].mean())

    def release_log(self) -> None:
        """Forget the arrays, once they are elsewhere."""
        _ = self.behaviour_return, self.fingerprint
        self.log.clear()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the log, to know it again when a run is resumed."""
        digest = hashlib.sha256()
        for key in self.log:
            digest.update(np.ascontiguousarray(self.log[key]).data)
        return digest.hexdigest()[:16]


def episode_returns(log: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """-> (undiscounted returns (E,), lengths (E,)) of the episodes that have ended, or of the only
    one."""
    ends = np.flatnonzero(log["terminals"] | log["timeouts"])
    ends = ends if len(ends) else np.array([len(log["rewards"]) - 1])
    totals = np.cumsum(log["rewards"], dtype=np.float64)[ends]
    return np.diff(totals, prepend=0.0), np.diff(ends, prepend=-1)


def load(name: str | None = None, path: str | None = None, source: Source = "auto") -> Task:
    """A task name, a file (HDF5 in D4RL's layout, or npz), or both -> Task.

    Names: D4RL's, with or without the version; gymnax tasks in the same scheme (pendulum-medium);
    minari:NAME. With a file too, the file is the log and the name says which simulator judges.
    `source` is where the log of a D4RL name comes from; auto tries D4RL's host (or PGD_MIRROR),
    then a re-collection by a shipped policy. Raises DataError, in one line, for whatever is wrong.
    """
    entry = None if name is None else resolve(name)
    if path is None and entry is None:
        raise DataError("name a task or give a file")
    bounds = file = None
    if path is not None:
        if source != "auto":
            raise DataError("--source says where the log of a name is from; a file needs none")
        file = Path(path)
        limit = entry.limit if entry else None
        if entry and entry.simulator in sim.GYMNAX:
            limit = sim.make_envs(entry.simulator, 1).limit
        log, origin, kind = read_log(Path(path), limit), f"file {Path(path).name}", source
    elif entry.minari or source == "minari":
        entry, log, bounds, origin = read_minari(entry)
        kind = "minari"
    else:
        log, origin, kind = _load_by_name(entry, source)
        file = d4rl_path(entry) if kind == "d4rl" else collected_path(entry)
    simulator = entry.simulator if entry else None
    if simulator and (package := sim.missing(simulator)):
        _say(f"{simulator} needs {package} to be judged in: pip install {package}; going on "
             "without returns")  # fmt: skip
        simulator = None
    if simulator:
        env = make_envs(simulator, 1)
        bounds = env.low, env.high
        have = log["observations"].shape[1], log["actions"].shape[1]
        want = env.obs_dim, env.low.size
        if have != want:
            raise DataError(
                f"the log has {have[0]} observations and {have[1]} actions, {simulator} has "
                f"{want[0]} and {want[1]}; leave out --env, or name the log's own task"
            )
    low, high = action_bounds(log["actions"], bounds, simulator)
    title = entry.name if path is None else Path(path).stem
    reference = entry.reference if entry else None
    return Task(title, log, low, high, origin, kind, simulator, reference, file)


def action_bounds(actions: np.ndarray, bounds: tuple | None, owner: str | None):
    """-> (low (A,), high (A,)): the environment's where known, else [-1, 1] and what the log needs
    beyond it. Says once how many actions lie outside."""
    if bounds is not None and np.isfinite(bounds).all():
        low, high = bounds
        outside = np.mean(np.any((actions < low) | (actions > high), axis=1))
        if outside > 0:
            _say(
                f"{outside:.1%} of the actions lie outside {owner or 'their'} bounds and are "
                f"clipped; they reach {np.abs(actions).max():.2f}"
            )
        return low, high
    low, high = np.minimum(actions.min(0), -1.0), np.maximum(actions.max(0), 1.0)
    if low.min() < -1.0 or high.max() > 1.0:
        _say(
            f"actions reach {np.abs(actions).max():.2f}, outside [-1, 1], and no simulator "
            "gives their bounds: the log's own extremes are taken"
        )
    return low, high


# --- Names ---


class Entry(NamedTuple):
    """What is known of a task name."""

    name: str  # with D4RL's version
    simulator: str | None
    reference: tuple[float, float] | None
    limit: int | None = None  # longest episode
    d4rl: dict | None = None  # its row of d4rl_registry.csv
    recipe: tuple[tuple[str, int], ...] | None = None  # (policy, steps), ...: how to collect it
    minari: str | None = None  # its name there


# Returns that score 0 and 100: the means of a uniformly random policy and of the -expert policy in
# policies/ over 1,000 episodes, as `python data.py measure TASK` prints them.
GYMNAX_REFERENCE = {
    "pendulum": (-1233.5, -167.7),
    "reacher": (15.7, 50.0),
    "mountaincar-continuous": (-33.1, 93.4),
    "swimmer": (84.6, 366.9),
}

MUJOCO_STEPS, GYMNAX_STEPS = 1_000_000, 100_000
REPLAY_STEPS = {"halfcheetah": 200_000, "hopper": 400_000, "walker2d": 300_000}  # as D4RL's


def recipe(simulator: str, kind: str, shipped: set[str]) -> tuple[tuple[str, int], ...] | None:
    """How to re-collect D4RL's `kind` of log -> (policy, steps) one after another, or None where a
    policy for it is missing.

    A replay is not the true one, which nobody kept: equal parts by a random policy and by the
    snapshots of the training run up to medium (or to the expert, for full-replay).
    """
    steps = MUJOCO_STEPS if simulator in sim.BODIES else GYMNAX_STEPS
    early = [f"early{i}" for i in range(1, 10) if f"{simulator}-early{i}" in shipped]
    stages = {
        "random": (["random"], steps),
        "medium": (["medium"], steps),
        "expert": (["expert"], steps),
        "medium-expert": (["medium", "expert"], 2 * steps),
        "medium-replay": (["random", *early, "medium"], REPLAY_STEPS.get(simulator, steps)),
        "full-replay": (["random", *early, "medium", "expert"], steps),
    }
    if kind not in stages or ("replay" in kind and not early):
        return None
    policies, total = stages[kind]
    if any(p != "random" and f"{simulator}-{p}" not in shipped for p in policies):
        return None
    return tuple((f"{simulator}-{p}", total // len(policies)) for p in policies)


KINDS = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")


def registry() -> dict[str, Entry]:
    """Every name that load() knows by itself -> Entry."""
    shipped = {p.stem for p in (HERE / "policies").glob("*.npz")}
    known = {}
    with open(HERE / "d4rl_registry.csv", newline="") as f:
        for row in csv.DictReader(f):
            stem = row["dataset"].rsplit("-v", 1)[0]
            task, kind = stem.split("-", 1)
            simulator = stem if stem in sim.MAZES else task
            known[row["dataset"]] = Entry(
                name=row["dataset"],
                simulator=simulator if simulator in sim.simulators() else None,
                reference=(float(row["ref_min_score"]), float(row["ref_max_score"])),
                limit=int(row["max_episode_steps"]),
                d4rl=row,
                recipe=recipe(task, kind, shipped) if task in sim.BODIES else None,
            )
    for task in sim.GYMNAX:
        for kind in KINDS:
            if how := recipe(task, kind, shipped):
                known[f"{task}-{kind}"] = Entry(
                    f"{task}-{kind}", task, GYMNAX_REFERENCE.get(task), recipe=how
                )
    return known


def resolve(name: str) -> Entry:
    """A task name, with or without D4RL's version -> Entry; DataError with the nearest names."""
    if name.startswith("minari:"):
        if not re.fullmatch(r"minari:[\w-]+(/[\w-]+)*-v\d+", name):
            raise DataError(f"{name!r} is no Minari name; it should look like minari:ENV/DATA-v0")
        return Entry(name, name, None, minari=name.removeprefix("minari:"))
    known, name = registry(), name.strip().lower()
    without_version = {full.rsplit("-v", 1)[0]: full for full in known}
    full = name if name in known else without_version.get(name)
    if full is None:
        near = difflib.get_close_matches(name, [*known, *without_version], n=4, cutoff=0.5)
        near = (
            list(dict.fromkeys(n.rsplit("-v", 1)[0] for n in near)) or sorted(without_version)[:4]
        )
        raise DataError(
            f"there is no task {name!r}; did you mean {' or '.join(near)}? "
            "python data.py list has all"
        )
    return known[full]


def _load_by_name(entry: Entry, source: str) -> tuple[dict, str, str]:
    """-> (log, provenance, the source that it came from)."""
    if source == "d4rl" and entry.d4rl is None:
        raise DataError(f"{entry.name} is not a D4RL task; its log is collected (--source collect)")
    if entry.d4rl and source != "collect":
        try:
            path, checked = download(entry)
            return read_log(path, entry.limit), f"D4RL {entry.name} ({checked})", "d4rl"
        except Unreachable as e:
            path = d4rl_path(entry)
            ways_out = (
                f"put {path.name} into {path.parent}, name a mirror in PGD_MIRROR, or give "
                "--dataset-path"
            )
            if source == "d4rl" or entry.recipe is None:
                raise DataError(f"{e}; {ways_out}, or --source minari") from e
            _say(f"{e}; going on with a re-collected log, which is not D4RL's; else {ways_out}")
    if entry.recipe is None:
        raise DataError(
            f"no policy is shipped to collect {entry.name} with; python data.py list says which "
            "logs can be collected"
        )
    return *load_collected(entry), "collect"


def make_envs(simulator: str, num: int):
    """`num` host-side copies of a simulator by name; minari:NAME is the one of that data set."""
    if not simulator.startswith("minari:"):
        return sim.make_envs(simulator, num)
    found = open_minari(simulator.removeprefix("minari:"))
    make = minari_environment(found)
    if make is None:
        raise DataError(f"{simulator} does not say in which environment it was made")
    return sim.GymnasiumEnvs(make, num, space=found.observation_space)


# --- Files: HDF5 in D4RL's layout, or npz ---


def read_log(path: Path, limit: int | None = None) -> dict[str, np.ndarray]:
    """A file with D4RL's arrays -> dict of KEYS, and of SUCCESSORS where it has them, checked.

    observations (N, O), actions (N, A), rewards, terminals, timeouts (N,), and next_observations
    (N, O). Missing or unmarked ends of episodes are put back; `limit` is the longest episode, where
    known. Raises DataError, in one line, for whatever is wrong; never loads a pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; fetch or write it again")
    try:
        log = _read_npz(path) if path.suffix == ".npz" else _read_hdf5(path)
    except DAMAGE as e:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EACCES):
            raise
        kind = "npz" if path.suffix == ".npz" else "HDF5"
        raise DataError(f"{path} cannot be read as {kind}; it is damaged or of another kind") from e
    for key in set(KEYS[2:]) & set(log):
        if log[key].ndim == 2 and log[key].shape[1] == 1:
            log[key] = log[key][:, 0]
    missing = "timeouts" not in log
    check_log(log, str(path))
    log |= {key: log[key].astype(bool, copy=False) for key in KEYS[3:] if key in log}
    if said := mend_timeouts(log, limit):
        _say(f"{path.name} {'has no timeouts: ' if missing else ''}{said}")
    if "timeouts" not in log:
        raise DataError(
            f"{path} has no timeouts, and neither next_observations nor a known task to put them "
            "back from; add the array, or name the task with --env"
        )
    return log


# What h5py, zipfile and numpy raise on files that are not what they should be
DAMAGE = (
    OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile,
    zlib.error, lzma.LZMAError, tokenize.TokenError,
)  # fmt: skip


def check_declared(path: Path, sizes: dict[str, int]) -> None:
    """DataError where arrays of `sizes` bytes could not come from an honest file like this one."""
    declared, stored = sum(sizes.values()), path.stat().st_size
    if declared > 200 * stored + 2**26:
        raise DataError(
            f"{path} is {stored:,} bytes and declares {declared:,} bytes of numbers; that is no "
            "log, and it is not read"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if declared > 0.5 * memory:
        raise DataError(
            f"{path} holds {declared / 1e9:.1f} GB of numbers, too much for the "
            f"{memory / 1e9:.1f} GB of this machine; cut it"
        )


def _check_kinds(path: Path, kinds: dict[str, tuple[np.dtype, tuple]]) -> None:
    """The needed arrays are there, and hold numbers in one or two dimensions."""
    needed = set(KEYS) - {"timeouts"}
    if lacking := needed - set(kinds):
        raise DataError(f"{path} has no {', '.join(sorted(lacking))}; it needs {', '.join(KEYS)}")
    for key, (dtype, shape) in kinds.items():
        if dtype.kind == "O":
            raise DataError(f"{path}: {key} holds Python objects, which are never loaded")
        if dtype.kind not in "fiub":
            raise DataError(f"{path}: {key} holds {dtype}, not numbers")
        if shape is None or len(shape) not in (1, 2):
            raise DataError(f"{path}: {key} has shape {shape}, it should be (N, ...)")
    check_declared(
        path,
        {
            key: int(np.prod(shape, dtype=object)) * dtype.itemsize
            for key, (dtype, shape) in kinds.items()
        },
    )


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    h5py = require("h5py", "h5py")
    with h5py.File(path, "r") as f:
        found = {}
        for key in (*KEYS, SUCCESSORS):
            if isinstance(f.get(key), h5py.Dataset):
                found[key] = own_dataset(f, key)
        _check_kinds(path, {key: (x.dtype, x.shape) for key, x in found.items()})
        log = {}
        for key, x in found.items():  # straight into one float32 array, or a bool one as it is
            log[key] = np.empty(x.shape, bool if x.dtype == bool else np.float32)
            if log[key].size:
                x.read_direct(log[key])
        return log


def own_dataset(f, key: str):
    """f[key], which may lie in no other file: DataError for links, raw files and virtual sets."""
    x = f[key]
    if x.file.filename != f.filename or x.external or x.is_virtual:
        raise DataError(f"{f.filename}: {key} lies in another file, which is not followed")
    return x


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    kinds = {}
    with zipfile.ZipFile(path) as z:
        for key in (*KEYS, SUCCESSORS):
            if f"{key}.npy" in z.namelist():
                with z.open(f"{key}.npy") as f:
                    version = np.lib.format.read_magic(f)
                    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                        version, np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(f)
                    kinds[key] = dtype, shape
    _check_kinds(path, kinds)
    with np.load(path, allow_pickle=False) as z, np.errstate(over="ignore"):
        as_is = lambda x: x if x.dtype == bool else x.astype(np.float32, copy=False)
        return {key: as_is(z[key]) for key in kinds}


def check_log(log: dict[str, np.ndarray], where: str) -> None:
    """Shapes agree and every number is finite, or DataError."""
    num, width = len(log["observations"]), log["observations"].shape[1:]
    for key, ndim in zip((*KEYS, SUCCESSORS), (2, 2, 1, 1, 1, 2)):
        if key not in log:
            continue
        shape = log[key].shape
        agrees = key != SUCCESSORS or shape[1:] == width
        if len(shape) != ndim or shape[0] != num or 0 in shape or not agrees:
            want = f"({num}, ...)" if ndim == 2 else f"({num},)"
            want = log["observations"].shape if key == SUCCESSORS else want
            raise DataError(f"{where}: {key} has shape {shape}, it should be {want} and not empty")
        bad = None if log[key].dtype == bool else ~np.isfinite(log[key]).reshape(num, -1).all(1)
        if bad is not None and bad.any():
            raise DataError(
                f"{where}: {key} has NaN or infinite values in {bad.sum()} of {num} rows, "
                f"the first in row {bad.argmax()}; remove those episodes"
            )


def mend_timeouts(log: dict[str, np.ndarray], limit: int | None) -> str:
    """Mark, in place, the ends of episodes that the log does not mark -> what was done, if
    anything.

    Where next_observations are there, an episode has ended wherever the next row is another state;
    else, if `timeouts` is missing, after every `limit` steps.
    """
    if SUCCESSORS in log:
        breaks = _breaks(log["observations"], log[SUCCESSORS])
        marked = log["terminals"] | log.get("timeouts", False)
        breaks &= ~marked
        log["timeouts"] = breaks | log.get("timeouts", False)
        if breaks.any():
            return (
                f"{breaks.sum()} steps are followed by another state than their next_observations "
                "say, and are taken as time-outs"
            )
    elif "timeouts" not in log and limit:
        log["timeouts"] = _timeouts_by_limit(log["terminals"], limit)
        return f"episodes are taken to end after {limit} steps"
    return ""


def _breaks(obs: np.ndarray, next_obs: np.ndarray, rows: int = 100_000) -> np.ndarray:
    """-> (N,): whether the next row is not the state that this one led to."""
    scale = 1e-3 * obs.std(0) + 1e-6
    breaks = np.zeros(len(obs), bool)
    for i in range(0, len(obs) - 1, rows):
        after = obs[i + 1 : i + 1 + rows]
        apart = np.abs(next_obs[i : i + len(after)] - after)
        breaks[i : i + len(after)] = np.any(apart > scale, axis=1)
    return breaks


def _timeouts_by_limit(terminals: np.ndarray, limit: int) -> np.ndarray:
    timeouts, first = np.zeros(len(terminals), bool), 0
    for end in [*np.flatnonzero(terminals), len(terminals)]:
        timeouts[first + limit - 1 : end : limit] = True
        first = end + 1
    return timeouts


def write_log(path: Path | str, log: dict[str, np.ndarray], about: dict[str, str]) -> None:
    """A log in D4RL's layout -> an HDF5 or npz file, written whole or not at all."""
    path = Path(path)
    if path.suffix == ".npz":
        with atomic_path(path) as part, open(part, "wb") as f:
            np.savez(f, **log, **about)
    else:
        write_parts(path, [log], len(log["rewards"]), about)


def write_parts(path: Path, parts: Iterable[dict], rows: int, about: dict[str, str]) -> None:
    """Logs, `rows` in all, laid end to end in one HDF5 file in D4RL's layout, written whole or not
    at all."""
    h5py = require("h5py", "h5py")
    with atomic_path(path) as part:
        try:
            with h5py.File(part, "w") as f:
                done = 0
                for log in parts:
                    for key, array in log.items():
                        array = np.asarray(array)
                        if key not in f:
                            f.create_dataset(key, (rows, *array.shape[1:]), array.dtype)
                        f[key][done : done + len(array)] = array
                    done += len(log["rewards"])
                f.attrs.update(about)
        except RuntimeError as e:  # h5py's way of saying that the disk is full
            raise OSError(f"{path} could not be written ({e})") from e


def make_folder(folder: Path, variable: str) -> None:
    """DataError, naming the variable that moves it, where the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"{folder} cannot be made ({e.strerror}); set {variable}") from e


# --- D4RL's host, or a mirror of it ---

STALL = 20.0  # seconds without a byte before trying again


class Unreachable(Exception):
    """D4RL's file could not be fetched; nothing is wrong with what is on disk."""


def d4rl_path(entry: Entry) -> Path:
    """Where D4RL itself keeps the file: $D4RL_DATASET_DIR, or ~/.d4rl/datasets."""
    folder = os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")
    return Path(folder).expanduser() / entry.d4rl["url"].rsplit("/", 1)[1]


def download(entry: Entry, mirror: str | None = None) -> tuple[Path, str]:
    """D4RL's file for this entry, from its cache folder, its host or a mirror -> (path, what was
    checked).

    mirror, or $PGD_MIRROR: the address of a folder that holds D4RL's files under their own names.
    An interrupted download goes on where it stopped, and two processes do not fetch at once. The
    file gets its name only when size and SHA-256 agree with the registry, where that has them.
    Raises Unreachable, or DataError on a wrong file.
    """
    path, row = d4rl_path(entry), entry.d4rl
    size, sha256 = int(row["bytes"] or 0), row["sha256"]
    verified = "SHA-256 verified" if sha256 else "no hash known"
    part = path.with_name(path.name + ".part")
    if not path.is_file():
        mirror = mirror or os.environ.get("PGD_MIRROR")
        url = f"{mirror.rstrip('/')}/{path.name}" if mirror else row["url"]
        make_folder(path.parent, "D4RL_DATASET_DIR")
        with open(part, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for another process that fetches the same
            if not path.is_file():
                part.touch()
                _fetch_to(entry, url, part, path, size, sha256)
                return path, verified
    if problem := _problem(path, size, sha256):
        raise DataError(f"{path} is not D4RL's file: {problem}; remove it and run again")
    return path, verified


def _fetch_to(entry: Entry, url: str, part: Path, path: Path, size: int, sha256: str) -> None:
    """Fetch in as many tries as it takes, while each brings something; check; give the name."""
    while True:
        before = part.stat().st_size
        try:
            fetch(url, part, size)
            break
        except DataError:
            part.unlink()
            raise
        except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: no address
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
                raise
            if part.stat().st_size > before:
                time.sleep(0.5)
                continue
            if not part.stat().st_size:
                part.unlink()
            host = url.split("/")[2] if "//" in url else repr(url)
            reason = " ".join(str(getattr(e, "reason", None) or e).split())
            raise Unreachable(f"{entry.name} cannot be fetched from {host} ({reason})") from e
    if problem := _problem(part, size, sha256):
        part.unlink()
        raise DataError(
            f"{url} sent a wrong file ({problem}), which was removed; try again, name a mirror, "
            "or --source collect"
        )
    os.replace(part, path)


def _problem(path: Path, size: int, sha256: str) -> str | None:
    """What is wrong with a downloaded file, if anything."""
    if size and path.stat().st_size != size:
        return f"{path.stat().st_size:,} bytes instead of {size:,}"
    if sha256 and _sha256(path) != sha256:
        return "another SHA-256 than the registry's"
    if not require("h5py", "h5py").is_hdf5(path):
        return "not HDF5"
    return None


def fetch(url: str, part: Path, size: int = 0) -> None:
    """Append what `part` still lacks of `url`, or all of it where the server cannot resume.

    size: of the whole file, where known. Raises DataError for what cannot be the file: a web page,
    another size. OSError where the connection fails or stalls; what has arrived is kept.
    """
    have = part.stat().st_size if part.exists() else 0
    if size and have == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=STALL)
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:  # nothing is left to send: the check that follows decides
            return
        raise
    with response:
        at = f"bytes {have}-"
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", at).startswith(at):
            part.write_bytes(b"")
            raise OSError("the server resumed at another place than asked")
        length = response.headers.get("Content-Length")
        left = int(length) if length else None
        whole = left + have * resumed if left is not None else 0
        if "html" in response.headers.get("Content-Type", ""):
            raise DataError(f"{url} sends a web page instead of data; name a mirror in PGD_MIRROR")
        if size and whole and whole != size:
            raise DataError(f"{url} sends {whole:,} bytes instead of {size:,}; name a mirror")
        bar = tqdm(
            desc=part.name.removesuffix(".part"), unit="B", unit_scale=True, disable=None,
            initial=have * resumed, total=whole or None,
        )  # fmt: skip
        with open(part, "ab" if resumed else "wb") as f, bar:
            while block := response.read1(1 << 20):
                f.write(block)
                bar.update(len(block))
                if size and f.tell() > size:
                    raise DataError(f"{url} sends more than the {size:,} bytes it should")
                left = None if left is None else left - len(block)
        if left:
            raise OSError(f"the connection broke with {left:,} bytes to go")


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- Minari ---

MINARI_NAMES = {  # D4RL's task -> Minari's data set on it; the MuJoCo ones are new data
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


def open_minari(name: str):
    """A Minari data set, local or fetched by the minari package; DataError where it is not to be
    had."""
    minari = require("minari", "minari")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every try
    folder = os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")
    make_folder(Path(folder).expanduser(), "MINARI_DATASETS_PATH")
    try:
        return minari.load_dataset(name, download=True)
    except Exception as e:  # whatever the package, its hub client or the file raises
        reason = " ".join(str(e).split())[:150]
        raise DataError(
            f"Minari has no readable data set {name} here or at its remote ({type(e).__name__}: "
            f"{reason}); python data.py list names the local ones"
        ) from e


def read_minari(entry: Entry):
    """-> (Entry of the data set, log, (action low, high), provenance).

    Observations are flattened (Dict, Tuple and Discrete too, in the space's order); of the T + 1
    observations of an episode the last is only a successor. An episode that ends without a flag
    ends by a time-out.
    """
    name = entry.minari or MINARI_NAMES.get(entry.name.rsplit("-v", 1)[0])
    if name is None:
        raise DataError(f"Minari has nothing like {entry.name}; --env minari:NAME names its own")
    found = open_minari(name)
    spaces = require("gymnasium", "gymnasium").spaces
    if not isinstance(found.action_space, spaces.Box):
        raise DataError(f"minari:{name} has no continuous actions, but {found.action_space}")
    try:
        log = _read_episodes(found, name)
        about = found.storage.metadata
        reference = about.get("ref_min_score"), about.get("ref_max_score")
        reference = None if None in reference else tuple(map(float, reference))
    except (*DAMAGE, IndexError, AttributeError, MemoryError) as e:
        raise DataError(
            f"minari:{name} is damaged ({type(e).__name__}); remove it and fetch or write it again"
        ) from e
    check_log(log, f"minari:{name}")
    known = entry._replace(
        name=f"minari:{name}",
        minari=name,
        simulator=f"minari:{name}" if minari_environment(found) else None,
        reference=reference if reference and reference[0] < reference[1] else None,
    )
    space = found.action_space
    bounds = np.ravel(space.low).astype(np.float32), np.ravel(space.high).astype(np.float32)
    return known, log, bounds, f"Minari {name}"


def _read_episodes(found, name: str) -> dict[str, np.ndarray]:
    """Every episode of a Minari data set, end to end."""
    num, made, at = int(found.total_steps), None, 0
    for episode in tqdm(found.iterate_episodes(), name, total=found.total_episodes, disable=None):
        obs = _flatten(found.observation_space, episode.observations, f"minari:{name}")
        action = _flatten(found.action_space, episode.actions, f"minari:{name}")
        if at + len(action) > num:
            raise DataError(f"minari:{name} has more than the {num} steps that it declares")
        if len(obs) != len(action) + 1:
            raise DataError(f"minari:{name}: episode {episode.id} has {len(obs)} observations for "
                            f"{len(action)} actions; it should be one more")  # fmt: skip
        if not len(action):
            continue
        terminal = np.asarray(episode.terminations, bool)
        timeout = np.asarray(episode.truncations, bool) & ~terminal
        timeout[-1] |= not terminal[-1]
        row = obs[:-1], action, np.asarray(episode.rewards), terminal, timeout, obs[1:]
        if made is None:
            kinds = (np.float32, np.float32, np.float32, bool, bool, np.float32)
            made = {
                key: np.empty((num, *x.shape[1:]), kind)
                for key, x, kind in zip((*KEYS, SUCCESSORS), row, kinds)
            }
        for array, x in zip(made.values(), row):
            array[at : at + len(action)] = x
        at += len(action)
    if not at:
        raise DataError(f"minari:{name} is empty")
    return {key: array[:at] for key, array in made.items()}


def _flatten(space, x, where: str) -> np.ndarray:
    """A stack of T elements of a space -> (T, n), as gymnasium flattens each."""
    spaces = require("gymnasium", "gymnasium").spaces
    if isinstance(space, spaces.Box):
        return np.asarray(x, np.float32).reshape(len(x), -1)
    if isinstance(space, spaces.Discrete):
        return np.eye(space.n, dtype=np.float32)[np.asarray(x) - space.start]
    if isinstance(space, spaces.Dict):
        return np.concatenate([_flatten(s, x[k], where) for k, s in space.items()], axis=1)
    if isinstance(space, spaces.Tuple):
        return np.concatenate([_flatten(s, v, where) for s, v in zip(space, x)], axis=1)
    raise DataError(f"{where} has observations of {space}, which are no vector")


def minari_environment(found) -> Callable | None:
    """-> make(), the environment a Minari data set was made in, if it is one that gymnasium or
    gymnasium-robotics registers and can make here; a data set's own code is never run."""
    spec = found.env_spec
    if spec is None or spec.max_episode_steps is None:
        return None
    gymnasium = require("gymnasium", "gymnasium")
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    with contextlib.suppress(ImportError):
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
    settings = dict(spec.kwargs) | {"max_episode_steps": spec.max_episode_steps}
    make = functools.partial(gymnasium.make, spec.id, disable_env_checker=True, **settings)
    reason = "no such environment is registered here"
    if spec.additional_wrappers:
        reason = "it was wrapped"
    elif spec.id in gymnasium.registry:
        try:
            make().close()
            return make
        except Exception as e:  # whatever an environment raises on settings it does not know
            reason = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
    _say(f"{spec.id}, in which this log was made, cannot be used to judge ({reason}); going on "
         "without returns")  # fmt: skip
    return None


def write_minari(name: str, log: dict[str, np.ndarray], task: Task, about: str) -> None:
    """A log with next_observations -> a new local Minari data set, an episode for each of its own.

    name: ENV/DATA-v0. Action bounds and reference scores are the task's. An episode's last
    observation is its last successor.
    """
    minari = require("minari", "minari")
    from minari.data_collector import EpisodeBuffer
    from minari.storage.datasets_root_dir import get_dataset_path

    spaces = require("gymnasium", "gymnasium").spaces
    first, episodes = 0, []
    for last in np.flatnonzero(log["terminals"] | log["timeouts"]):
        rows = slice(first, last + 1)
        obs = np.concatenate([log["observations"][rows], log[SUCCESSORS][last : last + 1]])
        episodes.append(
            EpisodeBuffer(
                observations=obs, actions=log["actions"][rows], rewards=log["rewards"][rows],
                terminations=log["terminals"][rows], truncations=log["timeouts"][rows],
            )
        )  # fmt: skip
        first = last + 1
    size = 2 * sum(array.nbytes for array in log.values())
    make_folder(get_dataset_path(), "MINARI_DATASETS_PATH")
    if size > shutil.disk_usage(get_dataset_path()).free:
        raise DataError(f"{get_dataset_path()} has no room for {size / 1e6:.0f} MB")
    low, high = (np.asarray(b, np.float32) for b in (task.action_low, task.action_high))
    shape = log["observations"].shape[1:]
    whole = False
    try:
        with warnings.catch_warnings():  # that there is no author, no environment, ...
            warnings.simplefilter("ignore")
            made = minari.create_dataset_from_buffers(
                name, episodes, action_space=spaces.Box(low, high, dtype=np.float32),
                observation_space=spaces.Box(-np.inf, np.inf, shape, np.float32),
                description=about, algorithm_name="policy-guided diffusion", data_format="hdf5",
            )  # fmt: skip
        if task.reference:
            ref_min, ref_max = task.reference
            made.storage.update_metadata({"ref_min_score": ref_min, "ref_max_score": ref_max})
        whole = True
    except (RuntimeError, ValueError, OSError) as e:
        raise DataError(f"minari:{name} could not be written ({e})") from e
    finally:
        if not whole:
            shutil.rmtree(get_dataset_path(name), ignore_errors=True)


def export(target: str, log: dict, task: Task, about: str) -> None:
    """Write a log to FILE.hdf5, FILE.npz or minari:ENV/DATA-v0."""
    if target.startswith("minari:"):
        write_minari(target.removeprefix("minari:"), log, task, about)
    else:
        write_log(target, log, {"source": about})


def export_target(target: str, seed: int, num_seeds: int) -> str:
    """The file or Minari name of one seed: its own, with the seed in it, where there are many."""
    if num_seeds == 1:
        return target
    return re.sub(r"(-v\d+|\.\w+)$", rf"-seed{seed}\1", target)


def refuse_existing_export(target: str) -> None:
    """DataError where an export would overwrite something, or has no proper name or folder."""
    if target.startswith("minari:"):
        name = resolve(target).minari
        require("minari", "minari")
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.storage.datasets_root_dir import get_dataset_path

        try:
            parse_dataset_id(name)
        except ValueError as e:
            raise DataError(f"{target!r} is no name for Minari; try minari:task/data-v0") from e
        if get_dataset_path(name).exists():
            raise DataError(f"Minari already has a data set {name}; raise its version")
    elif Path(target).suffix not in (".hdf5", ".h5", ".npz"):
        raise DataError(f"{target!r} should end in .hdf5 or .npz, or be minari:ENV/DATA-v0")
    elif Path(target).exists():
        raise DataError(f"{target} already exists; name another file")
    else:
        require("h5py", "h5py")
        try:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=Path(target).parent).close()
        except OSError as e:
            raise DataError(f"{target} cannot be written ({e.strerror}); name another file") from e


# --- Re-collected logs ---


def cache_dir() -> Path:
    """Where collected logs are kept: $PGD_CACHE, or pgd in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("PGD_CACHE", f"{base}/pgd")).expanduser()


def collected_path(entry: Entry, steps: int | None = None, seed: int = 0) -> Path:
    """Where the re-collected log of an entry is, or would be; another file for other policies."""
    digest = hashlib.sha256(b"3")  # of this way of collecting
    for stem, _ in entry.recipe:
        file = HERE / "policies" / f"{stem}.npz"
        digest.update(stem.encode() if stem.endswith("-random") else file.read_bytes())
    total = steps or sum(n for _, n in entry.recipe)
    return cache_dir() / f"{entry.name}-{total}-{seed}-{digest.hexdigest()[:8]}.hdf5"


def load_collected(entry: Entry, steps: int | None = None, seed: int = 0) -> tuple[dict, str]:
    """The log of shipped policies, collected once and cached -> (log, provenance).

    D4RL's recipe: stochastic policies, 1,000,000 steps (100,000 for the small gymnax tasks), or the
    parts of a mixture one after another.
    """
    parts = entry.recipe
    if steps is not None:
        cuts = np.linspace(0, steps, len(parts) + 1).astype(int)
        parts = tuple((stem, int(n)) for (stem, _), n in zip(parts, np.diff(cuts)))
    total = sum(n for _, n in parts)
    path = collected_path(entry, steps, seed)
    make_folder(path.parent, "PGD_CACHE")
    described = "; ".join(_policy(entry.simulator, stem)[1] for stem, _ in parts)
    origin = f"re-collected, not D4RL's: {described}" if entry.d4rl else f"collected: {described}"
    origin = f"{origin}; {total:,} steps, seed {seed}"
    if not path.exists():
        start = time.time()
        _say(f"collecting {total:,} steps of {entry.name} into {path}")
        most = 200 if entry.simulator in sim.BODIES else 500
        limit = sim.make_envs(entry.simulator, 1).limit

        def make(i, stem, n):
            num = min(most, max(1, n // limit))
            whole = -(-n // (num * limit)) * limit * num  # streams of whole episodes
            policy, at = _policy(entry.simulator, stem)[0], seed + 1000 * i
            if entry.simulator in sim.GYMNAX:
                rows = whole // num
                log = sim.collect_in_program(entry.simulator, policy.sample, num, rows, at)
            else:
                log = sim.collect(sim.make_envs(entry.simulator, num), policy, whole, at)
            log["timeouts"][n - 1] |= not log["terminals"][n - 1]
            return {key: array[:n] for key, array in log.items()}

        write_parts(path, (make(i, *p) for i, p in enumerate(parts)), total, {"source": origin})
        _say(f"collected in {time.time() - start:.0f} s")
    return read_log(path), origin


def _policy(simulator: str, stem: str) -> tuple[Any, str]:
    """-> (a Policy or UniformPolicy, its description)."""
    if stem.endswith("-random"):
        return UniformPolicy(sim.make_envs(simulator, 1).low.size), "uniformly random actions"
    policy = Policy.load(HERE / "policies" / f"{stem}.npz")
    return policy, f"SAC policy policies/{stem}.npz (mean return {policy.meta['mean_return']:.0f})"


# --- Behaviour policies: small npz files, arrays only ---


@dataclass(frozen=True)
class Policy:
    """A SAC actor on the host: obs (n, O) -> tanh-Gaussian actions (n, A) in [-1, 1]."""

    layers: list  # of (weights, bias)
    meta: dict  # task, mean_return, command, ...

    def __call__(self, obs: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """A sampled action, or the mean's where rng is None."""
        x = obs
        for w, b in self.layers[:-1]:
            x = np.maximum(x @ w + b, 0.0)
        w, b = self.layers[-1]
        mean, log_std = np.split(x @ w + b, 2, axis=-1)
        if rng is not None:
            noise = rng.standard_normal(mean.shape, np.float32)
            mean = mean + np.exp(np.clip(log_std, -5.0, 2.0)) * noise
        return np.tanh(mean)

    def sample(self, key, obs):
        """The same in JAX, for one obs (O,) -> (A,)."""
        import jax
        import jax.numpy as jnp

        x = obs
        for w, b in self.layers[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = self.layers[-1]
        mean, log_std = jnp.split(x @ w + b, 2)
        noise = jax.random.normal(key, mean.shape)
        return jnp.tanh(mean + jnp.exp(jnp.clip(log_std, -5.0, 2.0)) * noise)

    def save(self, path: Path) -> None:
        arrays = {f"{n}{i}": a for i, layer in enumerate(self.layers) for n, a in zip("wb", layer)}
        with atomic_path(path) as part, open(part, "wb") as f:
            np.savez(f, meta=np.array(json.dumps(self.meta)), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Policy":
        with np.load(path, allow_pickle=False) as z:
            layers = [(z[f"w{i}"], z[f"b{i}"]) for i in range((len(z.files) - 1) // 2)]
            return cls(layers, json.loads(str(z["meta"])))


@dataclass(frozen=True)
class UniformPolicy:
    """Uniformly random actions in [-1, 1], behind the interface of Policy."""

    act_dim: int

    def __call__(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-1.0, 1.0, (len(obs), self.act_dim))

    def sample(self, key, obs):
        import jax

        return jax.random.uniform(key, (self.act_dim,), minval=-1.0, maxval=1.0)


def train_policy(
    task: tyro.conf.Positional[str],
    out: Path,
    stop_at: float = float("inf"),
    max_steps: int = 1_000_000,
    seed: int = 0,
    num_envs: int = 16,
    hidden: tuple[int, ...] = (256, 256),
    updates_per_step: float = 1.0,
    start_steps: int = 10_000,
    start_hold: int = 1,
    eval_every: int = 5_000,
) -> None:
    """Train SAC online and keep its snapshots: OUT/TASK-STEPS.npz, one for every evaluation.

    D4RL's recipe for its logs. `updates_per_step` updates of batch 256 per environment step, replay
    of all that was seen; every `eval_every` steps the stochastic policy is judged and saved. Ends
    with the first snapshot whose mean return passes `stop_at`, or after `max_steps`. The first
    `start_steps` actions are random, each held for `start_hold` steps, which finds a goal that
    dithering does not.
    """
    import jax

    import agents

    at_least(0, seed=seed, start_steps=start_steps)
    at_least(
        1, max_steps=max_steps, num_envs=num_envs, start_hold=start_hold, eval_every=eval_every,
        hidden=min(hidden, default=0),
    )  # fmt: skip
    agent, batch_size = agents.sac_n(num_critics=2, hidden=hidden), 256
    envs = sim.make_envs(task, num_envs)
    judge = sim.make_envs(task, 100 if task in sim.GYMNAX else num_envs)
    act_dim, rng = envs.low.size, np.random.default_rng(seed)
    num_updates = max(1, round(updates_per_step * num_envs))
    sizes = (envs.obs_dim, act_dim, 1, envs.obs_dim, 1)
    buffer = [np.empty((max_steps + num_envs, n), np.float32) for n in sizes]

    @jax.jit
    def learn(key, state, batches):
        def step(state, x):
            return agent.update(x[0], state, x[1])

        keys = jax.random.split(key, num_updates)
        return jax.lax.scan(step, state, (keys, batches))[0]

    def snapshot(state, t):
        layers = [tuple(map(np.asarray, layer)) for layer in state.actor]
        policy, noise = Policy(layers, {}), np.random.default_rng(t)
        act = lambda obs: scale_action(policy(obs, noise), judge.low, judge.high)
        mean_return = round(float(sim.evaluate_on_host(judge, act, t).mean()), 1)
        command = (
            f"python data.py train-policy {task} --out {out} --stop-at {stop_at:g} "
            f"--max-steps {max_steps} --seed {seed} --num-envs {num_envs} "
            f"--hidden {' '.join(map(str, hidden))} "
            f"--updates-per-step {updates_per_step:g} --start-steps {start_steps} "
            f"--start-hold {start_hold} "
            f"--eval-every {eval_every}"
        )
        meta = {"task": task, "algorithm": "SAC", "mean_return": mean_return, "env_steps": t}
        return Policy(layers, meta | {"command": command})

    key = jax.random.key(seed)
    state, sample = agent.init(key, envs.obs_dim, act_dim), jax.jit(agent.sample)
    obs = envs.reset(seed)
    every = max(1, eval_every // num_envs) * num_envs
    bar = tqdm(
        range(0, max_steps + 1, num_envs), task, unit_scale=num_envs, unit=" steps", disable=None
    )
    for t in bar:
        key_act, key_learn = jax.random.split(jax.random.fold_in(key, t))
        if t < start_steps:
            if t // num_envs % start_hold == 0:
                action = rng.uniform(-1.0, 1.0, (num_envs, act_dim))
        else:
            action = np.asarray(sample(key_act, state, obs))
        next_obs, reward, terminal, _ = envs.step(scale_action(action, envs.low, envs.high))
        rows = (obs, action, reward[:, None], next_obs, terminal[:, None])
        for array, row in zip(buffer, rows):
            array[t : t + num_envs] = row
        obs = envs.obs
        if t < start_steps:
            continue
        index = rng.integers(0, t + num_envs, (num_updates, batch_size))
        o, a, r, n, d = (array[index] for array in buffer)
        state = learn(key_learn, state, Batch(o, a, r[..., 0], n, d[..., 0]))
        if t % every == 0:
            policy = snapshot(state, t)
            policy.save(out / f"{task}-{t}.npz")
            _say(f"{task}: {t:,} steps, mean return {policy.meta['mean_return']}")
            if policy.meta["mean_return"] >= stop_at:
                break


class Batch(NamedTuple):
    """What Agent.update takes."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray
    done: np.ndarray


# --- Helpers ---


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def atomic_path(path: Path):
    """A temporary path beside `path`, renamed onto it when the block ends well, removed when
    not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# --- Command line ---


def at_least(least: int, **flags: int | None) -> None:
    """DataError for a number that is too small, or absurd."""
    for name, value in flags.items():
        if value is not None and not least <= value < 2**31:
            raise DataError(f"--{name.replace('_', '-')} must be at least {least}, and below 2^31")


def collectable_size(entry: Entry) -> str:
    """How much `collect` would make of this log, or nothing where no policy is shipped."""
    return f"{sum(n for _, n in entry.recipe):,} steps" if entry.recipe else ""


def list_command() -> None:
    """Every log by name: where it comes from, where it is judged, and what is here already."""
    rows = [("name", "D4RL's file", "collected here", "judged in", "here already")]
    for entry in registry().values():
        size = "" if entry.d4rl is None else "size unknown"
        if entry.d4rl and entry.d4rl["bytes"]:
            size = f"{int(entry.d4rl['bytes']) / 1e6:.0f} MB"
        here = [
            what
            for what, path in (
                ("D4RL's", entry.d4rl and d4rl_path(entry)),
                ("collected", entry.recipe and collected_path(entry)),
            )
            if path and path.is_file()
        ]
        judge = entry.simulator or "-"
        if entry.simulator and sim.missing(entry.simulator):
            judge += f" (pip install {sim.missing(entry.simulator)})"
        rows.append((entry.name, size, collectable_size(entry), judge, ", ".join(here)))
    try:
        for name, about in require("minari", "minari").list_local_datasets().items():
            steps = f"{about['total_steps']:,} steps"
            rows.append((f"minari:{name}", "", "", "its own", f"Minari, {steps}"))
    except Exception as e:  # a damaged data set, or no minari
        rows.append(("minari:", "", "", "", f"cannot be listed ({type(e).__name__})"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"\nD4RL's files are kept in {d4rl_path(resolve('hopper-medium')).parent}")
    print(f"collected logs are kept in {cache_dir()}")
    print("any other Minari data set is minari:NAME")


def info_command(
    name: tyro.conf.Positional[str], source: Source = "auto", picture: Path | None = None
) -> None:
    """Sizes, episodes, returns, actions, ends and hash of a log, by name or file; --picture
    FILE.png draws its returns."""
    if picture is not None and (picture.suffix != ".png" or picture.exists()):
        raise DataError(f"{picture} should end in .png and not exist yet")
    is_file = Path(name).suffix in (".hdf5", ".h5", ".npz")
    task = load(None if is_file else name, name if is_file else None, source)
    log, (returns, lengths) = task.log, episode_returns(task.log)
    obs, action = log["observations"], log["actions"]
    moving, still = obs.std(0) > 0, (obs.std(0) == 0).sum()
    at_bound = np.mean(np.any((action <= task.action_low) | (action >= task.action_high), axis=1))
    score = "" if task.reference is None else f", score {task.score(returns.mean()):.1f}"
    lines = {
        "source": task.source,
        "file": "-" if task.path is None else f"{task.path} ({task.path.stat().st_size:,} bytes)",
        "hash": f"{task.fingerprint} (of the five arrays)",
        "steps": f"{len(obs):,} in {len(returns):,} ended episodes of {lengths.min():,} to "
        f"{lengths.max():,}",
        "ends": f"{log['terminals'].sum():,} terminals, {log['timeouts'].sum():,} time-outs",
        "observations": f"{obs.shape[1]}, from {obs.min():.3g} to {obs.max():.3g}"
        + (f"; {still} never change" if not moving.all() else ""),
        "successors": "known at time-outs too" if SUCCESSORS in log else "the next row",
        "actions": f"{action.shape[1]}, from {action.min():.3g} to {action.max():.3g}; "
        f"{at_bound:.1%} of the steps touch a bound",
        "rewards": f"mean {log['rewards'].mean():.4g}, from {log['rewards'].min():.4g} to "
        f"{log['rewards'].max():.4g}",
        "returns": f"mean {returns.mean():.1f}{score}, std {returns.std():.1f}, from "
        f"{returns.min():.1f} to {returns.max():.1f}",
        "judged in": task.simulator or "no simulator",
    }
    if task.simulator in sim.BODIES:
        error, what = replay_error(task)
        lines["replays"] = (
            f"error of one step in {task.simulator}: median {np.median(error):.1e}, largest "
            f"{error.max():.1e} variances, from {what}"
        )
    print(task.name)
    for key, text in lines.items():
        print(f"  {key:<13} {text}")
    print("  episodes by return")
    counts, edges = np.histogram(returns, bins=12)
    for count, low, high in zip(counts, edges, edges[1:]):
        bar = "#" * int(np.ceil(40 * count / counts.max()))
        print(f"  {low:>12.1f} to {high:>10.1f} {count:>8,} {bar}")
    if picture is not None:
        _draw_returns(picture, task.name, returns)
        print(f"saved: {picture}")


def _draw_returns(path: Path, title: str, returns: np.ndarray) -> None:
    matplotlib = require("matplotlib", "matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.hist(returns, bins=40)
    axes.set(xlabel="undiscounted return", ylabel="episodes", title=title)
    with atomic_path(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)


def replay_error(task: Task, num: int = 1000) -> tuple[np.ndarray, str]:
    """Put MuJoCo into logged states and step it -> (squared differences from the logged successors,
    in variances (num,), what the states were taken from).

    The states are the log's infos/qpos and infos/qvel where its file has them, else what its
    observations say.
    """
    log = task.log
    ends = log["terminals"] | log["timeouts"]
    ends[-1] |= SUCCESSORS not in log
    rows = np.flatnonzero(~ends if SUCCESSORS not in log else np.ones_like(ends))
    rows = np.sort(np.random.default_rng(0).choice(rows, min(num, len(rows)), replace=False))
    after = log[SUCCESSORS][rows] if SUCCESSORS in log else log["observations"][rows + 1]
    envs = sim.MujocoEnvs(task.simulator, len(rows))
    states, what = read_states(task.path, rows), "infos/qpos and infos/qvel"
    if states is None:
        states = sim.state_from_obs(log["observations"][rows], envs.num_qpos)
        what = "observations"
    made = sim.observe(envs.body, *envs.physics(*states, log["actions"][rows]))
    made = made.astype(np.float32)  # as it is logged
    scale = log["observations"].std(0) + 1e-6
    return np.mean(((made - after) / scale) ** 2, axis=1), what


def read_states(path: Path | None, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """-> (qpos (n, Q), qvel (n, V)) of these rows of a file that holds a simulator's states."""
    if path is None or path.suffix == ".npz":
        return None
    with require("h5py", "h5py").File(path, "r") as f:
        if "infos/qpos" not in f or "infos/qvel" not in f:
            return None
        qpos, qvel = (own_dataset(f, key) for key in ("infos/qpos", "infos/qvel"))
        return qpos[rows], qvel[rows]


def measure(task: tyro.conf.Positional[str], episodes: int = 1000) -> None:
    """Mean undiscounted return of a random policy and of every policy shipped for `task`."""
    at_least(1, episodes=episodes)
    envs = sim.make_envs(task, 100)
    shipped = [p.stem for p in sorted((HERE / "policies").glob(f"{task}-*.npz"))]
    for stem in [f"{task}-random", *shipped]:
        policy, described = _policy(task, stem)
        rng = np.random.default_rng(0)
        act = lambda obs, p=policy, r=rng: scale_action(p(obs, r), envs.low, envs.high)
        rounds = [sim.evaluate_on_host(envs, act, i) for i in range(-(-episodes // envs.num))]
        returns = np.concatenate(rounds)
        print(f"{stem}: {returns.mean():.1f} +- {returns.std():.1f}, {described}", flush=True)


def collect_command(
    name: tyro.conf.Positional[str],
    steps: int | None = None,
    seed: int = 0,
    out: str | None = None,
) -> None:
    """Collect the log of shipped policies into the cache; --out FILE.hdf5, FILE.npz or
    minari:ENV/DATA-v0 puts a copy there."""
    entry = resolve(name)
    if entry.recipe is None:
        raise DataError(f"no policy is shipped to collect {entry.name} with; python data.py list")
    at_least(0, seed=seed)
    at_least(len(entry.recipe), steps=steps)
    if out is not None:
        refuse_existing_export(out)
    log, origin = load_collected(entry, steps, seed)
    path = collected_path(entry, steps, seed)
    if out is not None and Path(out).suffix in (".hdf5", ".h5"):
        with atomic_path(Path(out)) as part:  # with the simulator's states
            shutil.copyfile(path, part)
    elif out is not None:
        one = make_envs(entry.simulator, 1)
        bounds = one.low, one.high
        task = Task(
            entry.name, log, *bounds, origin, "collect", entry.simulator, entry.reference, path
        )
        export(out, log, task, origin)
    print(f"{out or path}: {origin}")


def download_command(name: tyro.conf.Positional[str], mirror: str | None = None) -> None:
    """Fetch a D4RL log into D4RL's cache folder, going on where an earlier try stopped; --mirror
    names another folder on the web that holds D4RL's files."""
    entry = resolve(name)
    if entry.minari:
        open_minari(entry.minari)
        print(f"minari:{entry.minari} is here")
        return
    if entry.d4rl is None:
        raise DataError(f"{entry.name} is not a D4RL task; python data.py collect {entry.name}")
    try:
        path, checked = download(entry, mirror)
    except Unreachable as e:
        raise DataError(f"{e}; what has arrived is kept, run the command again to go on") from e
    print(f"{path} ({checked})")


def main() -> None:
    """The command line: one of the commands, an error as one line and status 2."""
    commands = {
        "list": list_command,
        "info": info_command,
        "download": download_command,
        "collect": collect_command,
        "train-policy": train_policy,
        "measure": measure,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands)
    except BrokenPipeError:  # the reader, head perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DataError, sim.EnvError, OSError, MemoryError) as e:
        print(f"data.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted; what has arrived is kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
