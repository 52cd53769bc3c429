"""Logs: names, files, checks, normalised scores, and the commands below.

    python data.py list                                     # every name and the sources of its log
    python data.py info halfcheetah-medium                  # sizes, returns, actions, hash
    python data.py download halfcheetah-medium              # D4RL's file, resumed and verified
    python data.py collect halfcheetah-medium               # a log of policies in policies/
    python data.py convert demo.hdf5 log.npz                # D4RL's layout, from other libraries'
    python data.py train-policy hopper --out runs/hopper    # a behaviour policy and its snapshots
    python data.py measure hopper                           # mean returns of hopper's policies

    task = load("halfcheetah-medium")                       # task.log: a dict of D4RL's arrays

A prefix of a name says where its log comes from:

    d4rl:halfcheetah-medium       D4RL's file, or an error
    collect:halfcheetah-medium    a log of this project's policies, collected once and cached
    minari:halfcheetah-medium     Minari's data set on the same task
    minari:ENV/DATA-v0            any data set of Minari
    ogbench:ENV-DATA-singletask-v0   OGBench's data set, with the rewards of a task
    halfcheetah-medium            D4RL's file; if it cannot be fetched, collect:halfcheetah-medium
"""

import contextlib
import difflib
import functools
import hashlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

from host import envs as sim
from host.collect import (
    KINDS,
    PolicyTraining,
    Recipe,
    cache_dir,
    collected,
    collected_path,
    make_recipe,
    measure_policies,
    shipped_policies,
    train_policy,
)
from host.d4rl import D4rlFile, Unreachable, d4rl_path, download, read_registry
from host.errors import UserError, at_least, printable
from host.export import export, refuse_existing_export
from host.files import atomic_path, is_log_file, own_dataset, require, say, write_arrays
from host.gym_envs import MAZES, GymnasiumEnvs, OwnEnvs
from host.logs import SUCCESSORS, Rules, check_log, episode_returns, mend_log, read_log
from host.minari import (
    MINARI_NAMES,
    check_minari_name,
    minari_environment,
    open_minari,
    read_minari,
)
from host.ogbench import OgbenchEnvs, names_of, read_ogbench

Source = Literal["auto", "d4rl", "collect", "minari", "ogbench"]
Kind = Literal["d4rl", "collect", "minari", "ogbench", "file"]


OWN = "the user's own "  # prefix of a simulator that --judge names; no file can name one

# --- Load: a name or a file -> Task ---


@dataclass(frozen=True)
class Task:
    """A log, where it came from, and the simulator that evaluates policies for it, if any."""

    name: str  # halfcheetah-medium-v2, collect:halfcheetah-medium, minari:ENV/DATA-v0 or a stem
    log: dict[str, np.ndarray]  # KEYS and perhaps SUCCESSORS: float32 and bool, N rows each
    action_low: np.ndarray  # (A,) in the environment's units
    action_high: np.ndarray  # (A,) in the environment's units
    source: str  # one line of provenance, for the table and final.json
    kind: Kind  # where the log came from
    simulator: str | None  # e.g. halfcheetah; None: returns cannot be measured
    reference: tuple[float, float] | None  # undiscounted returns with scores 0 and 100
    path: Path | None = None  # the file that holds the log
    success: float | None = None  # share of trajectories at the goal, where that is the return

    @property
    def load_name(self) -> str | None:
        """The name with which load() gives this log again; None for a log given as a file."""
        if self.kind == "file":
            return None
        return f"d4rl:{self.name}" if self.kind == "d4rl" else self.name

    def score(self, returns):
        """Undiscounted returns -> D4RL's normalised scores, 100 * (R - min) / (max - min); None if
        the reference returns are unknown."""
        if self.reference is None:
            return None
        low, high = self.reference
        return 100.0 * (np.asarray(returns, np.float64) - low) / (high - low)

    @functools.cached_property
    def behaviour_return(self) -> float:
        """Mean undiscounted return of the log's ended episodes; of OGBench, the share of
        trajectories that reach the goal."""
        if self.success is not None:
            return self.success
        return float(episode_returns(self.log)[0].mean())

    def release_log(self) -> None:
        """Drop the arrays to free memory; behaviour_return and fingerprint stay available."""
        _ = self.behaviour_return, self.fingerprint
        self.log.clear()

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the log's SHA-256, to recognise the log when a run resumes."""
        digest = hashlib.sha256()
        for key in self.log:
            digest.update(np.ascontiguousarray(self.log[key]).data)
        return digest.hexdigest()[:16]


class Found(NamedTuple):
    """A log as its source gives it; the fields are those of Task."""

    name: str
    log: dict[str, np.ndarray]
    source: str
    kind: Kind
    simulator: str | None
    reference: tuple[float, float] | None
    path: Path | None = None
    bounds: tuple[np.ndarray, np.ndarray] | None = None  # lowest and highest action, if known
    success: float | None = None


def load(
    name: str | None = None,
    path: str | None = None,
    discrete: bool = False,
    judge: str | None = None,
) -> Task:
    """The name of a task, a file, or both -> Task.

    name: as the module's docstring lists them; the version of D4RL's names may be left out.
    path: an HDF5 or npz file in a layout of host/layouts.py. With both, the file is the log, and
    the name, which then has no source's prefix, says which simulator evaluates. discrete: actions
    that are integers from 0 on are taken as numbers. judge: MODULE:EnvId-v0, the user's own
    environment, which evaluates instead; its module is imported.
    Raises UserError if the name is unknown, the log cannot be had, or a file is not a valid log.
    """
    if path is not None:
        found = _open_file(expand(path), name, discrete)
    elif name is None:
        raise UserError("name a task or give a file")
    else:
        entry = resolve(name)
        opened = {"minari": _open_minari, "ogbench": _open_ogbench}
        found = opened.get(entry.source, _open_named)(entry, discrete=discrete)
    simulator, bounds, log = found.simulator, found.bounds, found.log
    simulator = f"{OWN}{judge}" if judge else simulator
    if simulator and (package := sim.missing(simulator)):
        say(f"{simulator} cannot be simulated without {package}: pip install {package}; going on "
            "without returns")  # fmt: skip
        simulator = None
    if simulator:
        env = make_envs(simulator, 1)
        bounds = env.low, env.high
        have = log["observations"].shape[1], log["actions"].shape[1]
        want = env.obs_dim, env.low.size
        if have != want:
            raise UserError(
                f"the log has {have[0]} observations and {have[1]} actions, {simulator} has "
                f"{want[0]} and {want[1]}; name the log's own task or environment"
            )
    low, high = action_bounds(log["actions"], bounds, simulator)
    return Task(
        found.name, log, low, high, found.source, found.kind, simulator, found.reference,
        found.path, found.success,
    )  # fmt: skip


def expand(path: str | Path) -> Path:
    """A path with ~ for a home folder -> the whole path. Raises UserError."""
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise UserError(f"{path}: {e}") from e


def rules_of(entry: "Entry") -> Rules:
    """What a task says of its logs. Demonstrations by people have no limit of steps."""
    limit = None if "-human" in entry.name else entry.limit
    if entry.simulator in sim.GYMNAX:
        limit = sim.make_envs(entry.simulator, 1).limit
    return Rules(limit, entry.simulator in ENDLESS, bare_name(entry.name).startswith("antmaze"))


def _open_file(path: Path, name: str | None, discrete: bool) -> Found:
    """A file, and perhaps the name of the task that evaluates."""
    if name is None:
        log = read_log(path, Rules(discrete=discrete))
        return Found(path.stem, log, f"file {path.name}", "file", None, None, path)
    entry, (prefix, rest) = resolve(name), split_prefix(name)
    if entry.source == "ogbench":
        return _open_ogbench(entry, path)
    if prefix and entry.name != f"minari:{rest}":
        raise UserError(
            f"{name} names a source of logs, but the log is the file {path.name}; leave out the "
            f"prefix {prefix}:"
        )
    log = read_log(path, rules_of(entry)._replace(discrete=discrete))
    return Found(
        path.stem, log, f"file {path.name}", "file", entry.simulator, entry.reference, path
    )


def _open_minari(entry: "Entry", discrete: bool = False) -> Found:
    log, about = read_minari(entry.minari)
    mend_log(log, entry.name, entry.name, Rules(discrete=discrete))
    simulator = entry.simulator if about.has_environment else None
    return Found(
        entry.name, log, f"Minari {entry.minari}", "minari", simulator, about.reference,
        bounds=about.bounds,
    )  # fmt: skip


def _open_ogbench(entry: "Entry", path: Path | None = None, discrete: bool = False) -> Found:
    log, path, success = read_ogbench(entry.name.removeprefix("ogbench:"), path)
    check_log(log, str(path))
    source = f"OGBench {path.name}, rewards of the task"
    return Found(
        entry.name, log, source, "ogbench", entry.simulator, entry.reference, path, success=success
    )


def _open_named(entry: "Entry", discrete: bool = False) -> Found:
    """D4RL's file or a collected log, as entry.source says."""
    task = {"simulator": entry.simulator, "reference": entry.reference}
    if entry.source != "collect":
        try:
            path, checked = download(entry.d4rl)
            log = read_log(path, rules_of(entry))
            return Found(
                entry.name, log, f"D4RL {entry.name} ({checked})", "d4rl", path=path, **task
            )
        except Unreachable as e:
            path, bare = d4rl_path(entry.d4rl), bare_name(entry.name)
            ways_out = (
                f"put {path.name} into {path.parent}, name a mirror in PGD_MIRROR, or give "
                "--dataset-path"
            )
            if entry.source == "d4rl" or entry.recipe is None:
                if bare in MINARI_NAMES:
                    ways_out += f", or use minari:{bare}"
                raise UserError(f"{e}; {ways_out}") from e
            say(f"{e}; going on with collect:{bare}, a re-collected log that is not D4RL's. For "
                f"D4RL's own, {ways_out}")  # fmt: skip
    path, provenance = collected(entry.recipe)
    name = f"collect:{entry.recipe.name}" if entry.d4rl else entry.name
    return Found(name, read_log(path), provenance, "collect", path=path, **task)


def action_bounds(actions: np.ndarray, bounds: tuple | None, owner: str | None):
    """actions (N, A) -> lowest (A,) and highest (A,) action, in the environment's units.

    bounds: the environment's (low, high), which are taken if they are known and finite. Otherwise
    the bounds are [-1, 1], widened to the log's extremes. One line on stderr says how many actions
    lie outside the bounds of `owner`, the simulator, or that extremes are taken.
    """
    if bounds is not None and np.isfinite(bounds).all():
        low, high = bounds
        outside = np.mean(np.any((actions < low) | (actions > high), axis=1))
        if outside > 0:
            say(
                f"{outside:.1%} of the actions lie outside the bounds of {owner or 'the log'} and "
                f"are clipped; they reach {np.abs(actions).max():.2f}"
            )
        return low, high
    low, high = np.minimum(actions.min(0), -1.0), np.maximum(actions.max(0), 1.0)
    if low.min() < -1.0 or high.max() > 1.0:
        say(
            f"actions reach {np.abs(actions).max():.2f}, outside [-1, 1], and no simulator gives "
            "their bounds; the bounds are the log's extremes"
        )
    return low, high


# --- Names ---


class Entry(NamedTuple):
    """A resolved name: where its log can come from, and how policies for it are evaluated."""

    name: str  # canonical, as Task.name would be if the log came from `source`
    source: Source  # auto: D4RL's file, or a collected log if it cannot be fetched
    simulator: str | None  # None: returns cannot be measured
    reference: tuple[float, float] | None  # undiscounted returns with scores 0 and 100
    limit: int | None = None  # maximal steps per episode, if known
    d4rl: D4rlFile | None = None  # D4RL's file of this name
    recipe: Recipe | None = None  # how to collect the log; None: a policy is missing
    minari: str | None = None  # the data set's name on Minari


# Undiscounted returns with scores 0 and 100: the means of a uniformly random policy and of the
# -expert policy in policies/ over 1,000 episodes, from `python data.py measure TASK`.
GYMNAX_REFERENCE = {
    "pendulum": (-1233.5, -167.7),
    "reacher": (15.7, 50.0),
    "mountaincar-continuous": (-33.1, 93.4),
    "swimmer": (84.6, 366.9),
}


# Simulators in which no episode ends in a terminal
ENDLESS = {"halfcheetah", "pendulum", "reacher", "swimmer", *MAZES}


def registry() -> dict[str, Entry]:
    """-> {name: Entry} of D4RL's data sets, with versions, and of the gymnax tasks' logs."""
    shipped, known = shipped_policies(), {}
    for name, file in read_registry().items():
        task, kind = bare_name(name).split("-", 1)
        simulator = simulator_of(bare_name(name))
        known[name] = Entry(
            name=name,
            source="auto",
            simulator=simulator,
            reference=file.reference,
            limit=file.limit,
            d4rl=file,
            recipe=make_recipe(task, kind, shipped) if task in sim.BODIES else None,
        )
    for task in sim.GYMNAX:
        for kind in KINDS:
            if recipe := make_recipe(task, kind, shipped):
                reference = GYMNAX_REFERENCE.get(task)
                known[recipe.name] = Entry(recipe.name, "collect", task, reference, recipe=recipe)
    return known


def simulator_of(name: str) -> str | None:
    """A name of D4RL without its version -> the simulator with the longest name that begins it:
    kitchen-mixed, antmaze-large of antmaze-large-play, halfcheetah of halfcheetah-medium."""
    fitting = [x for x in sim.simulators() if name == x or name.startswith(f"{x}-")]
    return max(fitting, key=len, default=None)


def bare_name(name: str) -> str:
    """A name -> the same without its version: hopper-medium-v2 -> hopper-medium."""
    return re.sub(r"-v\d+$", "", name)


def split_prefix(name: str) -> tuple[str | None, str]:
    """A name -> (prefix in lower case or None, rest), without surrounding blanks."""
    prefix, colon, rest = name.partition(":")
    return (prefix.strip().lower(), rest.strip()) if colon else (None, name.strip())


def resolve(name: str) -> Entry:
    """A name with or without prefix and version -> Entry.

    Case and surrounding blanks do not matter, except for Minari's own names, which have capitals.
    Raises UserError on an unknown name, with the nearest known ones, and on a prefix that does not
    go with the name.
    """
    prefix, rest = split_prefix(name)
    if prefix == "minari":
        return _resolve_minari(rest)
    if prefix == "ogbench":
        names_of(rest.lower())
        full = f"ogbench:{rest.lower()}"
        return Entry(full, "ogbench", full, (0.0, 1.0))
    if prefix not in (None, "d4rl", "collect"):
        raise UserError(f"{name!r} has an unknown prefix; use d4rl:, collect:, minari: or ogbench:")
    entry = _lookup(rest)
    if prefix is None:
        return entry
    if prefix == "d4rl":
        if entry.d4rl is None:
            raise UserError(f"{entry.name} is not a D4RL task; its log is collect:{entry.name}")
        return entry._replace(source="d4rl")
    refuse_without_recipe(entry)
    if entry.d4rl is None:
        return entry
    return entry._replace(name=f"collect:{entry.recipe.name}", source="collect")


def _lookup(name: str) -> Entry:
    """A name without a prefix -> its Entry in the registry."""
    known, name = registry(), name.lower()
    without_version = {bare_name(full): full for full in known}
    full = name if name in known else without_version.get(name)
    if full is None:
        near = difflib.get_close_matches(name, [*known, *without_version], n=4, cutoff=0.5)
        near = list(dict.fromkeys(map(bare_name, near))) or sorted(without_version)[:4]
        if Path(name).is_dir():
            raise UserError(f"there is no task {name!r}; to read the folder, write ./{name}")
        raise UserError(
            f"there is no task {name!r}; did you mean {' or '.join(near)}? "
            "python data.py list names all"
        )
    return known[full]


def _resolve_minari(name: str) -> Entry:
    """A name on Minari, or of a D4RL task without its version -> Entry."""
    if name.lower() in MINARI_NAMES:
        name = MINARI_NAMES[name.lower()]
    elif name.lower() in map(bare_name, registry()):
        raise UserError(
            f"Minari has nothing like {name.lower()}; minari:ENV/DATA-v0 names any of its data sets"
        )
    full = f"minari:{check_minari_name(name)}"
    return Entry(full, "minari", full, None, minari=name)


def refuse_without_recipe(entry: Entry) -> None:
    """Raises UserError if no policies are in policies/ to collect the entry's log with."""
    if entry.recipe is None:
        raise UserError(
            f"no policy is shipped to collect {entry.name} with; python data.py list says which "
            "logs can be collected"
        )


def make_envs(simulator: str, num: int):
    """`num` copies on the host of a simulator; minari:NAME is the environment of that data set,
    ogbench:NAME that of a task of OGBench.
    Raises UserError if there is no such simulator."""
    if simulator.startswith(OWN):
        return OwnEnvs(simulator.removeprefix(OWN), num)
    if simulator.startswith("ogbench:"):
        return OgbenchEnvs(simulator.removeprefix("ogbench:"), num)
    if not simulator.startswith("minari:"):
        return sim.make_envs(simulator, num)
    found = open_minari(simulator.removeprefix("minari:"))
    make = minari_environment(found)
    if make is None:
        raise UserError(f"{simulator} names no environment that can be made here")
    return GymnasiumEnvs(make, num, space=found.observation_space)


# --- Files: HDF5 in D4RL's layout, or npz; host/logs.py reads them ---


def write_log(path: Path | str, log: dict[str, np.ndarray], about: dict[str, str]) -> None:
    """A log in D4RL's layout -> an HDF5 or npz file, written whole or not at all.

    about: notes that the file keeps, e.g. {"source": provenance}.
    """
    write_arrays(path, log, about)


# --- Agreement of a log with a simulator ---


def replay_error(task: Task, num: int = 1000) -> tuple[np.ndarray, str]:
    """Step C MuJoCo from logged states -> (squared errors of the successors (num,), what the states
    were read from).

    An error is the mean over the observation of the squared difference in units of its variance.
    The states are the file's infos/qpos and infos/qvel if it has them; otherwise they are derived
    from the observations.
    """
    log = task.log
    ends = log["terminals"] | log["timeouts"]
    ends[-1] |= SUCCESSORS not in log
    rows = np.flatnonzero(~ends if SUCCESSORS not in log else np.ones_like(ends))
    rows = np.sort(np.random.default_rng(0).choice(rows, min(num, len(rows)), replace=False))
    after = log[SUCCESSORS][rows] if SUCCESSORS in log else log["observations"][rows + 1]
    copies = sim.MujocoEnvs(task.simulator, len(rows))
    states, what = read_states(task.path, rows), "infos/qpos and infos/qvel"
    sizes = [(len(rows), copies.num_qpos), (len(rows), copies.num_qvel)]
    if states is None or [x.shape for x in states] != sizes:
        states = sim.state_from_obs(log["observations"][rows], copies.num_qpos)
        what = "observations"
    made = sim.observe(copies.body, *copies.physics(*states, log["actions"][rows]))
    made = made.astype(np.float32)  # logs have single precision
    scale = log["observations"].std(0) + 1e-6
    return np.mean(((made - after) / scale) ** 2, axis=1), what


def read_states(path: Path | None, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A file and row numbers (n,) -> infos/qpos (n, Q), infos/qvel (n, V); None if the file has no
    simulator states."""
    if path is None or path.is_dir() or not require("h5py", "h5py").is_hdf5(path):
        return None
    with require("h5py", "h5py").File(path, "r") as f:
        qpos, qvel = (own_dataset(f, key) for key in ("infos/qpos", "infos/qvel"))
        if qpos is None or qvel is None or min(len(qpos), len(qvel)) <= rows.max():
            return None
        return qpos[rows], qvel[rows]


# --- Command line ---


def list_command() -> None:
    """List the logs by name, with their sources, simulators and files on this machine."""
    rows = [("name", "D4RL's file", "collected log", "simulator", "on this machine")]
    rows += [_list_row(entry) for entry in registry().values()]
    try:
        for name, about in require("minari", "minari").list_local_datasets().items():
            steps = f"{about['total_steps']:,} steps"
            rows.append((f"minari:{name}", "", "", "its own", f"Minari, {steps}"))
    except Exception as e:  # minari is missing, or raises one of many errors on a damaged data set
        rows.append(("minari:", "", "", "", f"cannot be listed ({type(e).__name__})"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"\nD4RL's files are kept in {d4rl_path(resolve('hopper-medium').d4rl).parent}")
    print(f"collected logs are kept in {cache_dir()}")
    print("the prefixes d4rl:, collect:, minari: and ogbench: choose the source of a log")
    print(
        "any data set of Minari is minari:ENV/DATA-v0, one of OGBench ENV-DATA-singletask-v0 after "
        "ogbench:"
    )


def _list_row(entry: Entry) -> tuple[str, ...]:
    size = "" if entry.d4rl is None else "size unknown"
    if entry.d4rl and entry.d4rl.size:
        size = f"{entry.d4rl.size / 1e6:.0f} MB"
    steps = f"{entry.recipe.steps:,} steps" if entry.recipe else ""
    simulator = entry.simulator or "-"
    if entry.simulator and sim.missing(entry.simulator):
        simulator += f" (pip install {sim.missing(entry.simulator)})"
    files = {
        "D4RL's": entry.d4rl and d4rl_path(entry.d4rl),
        "collected": entry.recipe and collected_path(entry.recipe),
    }
    here = [what for what, path in files.items() if path and path.is_file()]
    return entry.name, size, steps, simulator, ", ".join(here)


def is_file(name: str) -> bool:
    """True if a word of the command line is the path of a log and not a task's name."""
    path = expand(name)
    suffixes = (".hdf5", ".h5", ".h5py", ".npz", ".pkl", ".pickle")
    return path.suffix.lower() in suffixes or "/" in name and path.exists() or is_log_file(path)


def info_command(
    name: tyro.conf.Positional[str], env: str | None = None, picture: Path | None = None
) -> None:
    """Print the sizes, episodes, returns, actions, ends and hash of a log.

    Args:
        name: name of a task, with or without a source's prefix, or an HDF5 or npz file
        env: name of the task that a file is a log of
        picture: new PNG file for a histogram of the returns
    """
    if picture is not None and (picture.suffix != ".png" or picture.exists()):
        raise UserError(f"{picture} should end in .png and not exist yet")
    if env and not is_file(name):
        raise UserError(f"--env is for a file, and {name} is the name of a task")
    task = load(env, name, discrete=True) if is_file(name) else load(name)
    returns, lengths = episode_returns(task.log)
    print(printable(task.name))
    for key, text in _describe(task, returns, lengths).items():
        print(f"  {key:<13} {printable(text)}")
    print("  episodes by return")
    spread = max(float(np.ptp(returns)), 1e-6 * float(np.abs(returns).max()), 1e-9)
    counts, edges = np.histogram(returns, 12, (returns.min(), returns.min() + spread))
    for count, low, high in zip(counts, edges, edges[1:]):
        bar = "#" * int(np.ceil(40 * count / counts.max()))
        print(f"  {low:>12.1f} to {high:>10.1f} {count:>8,} {bar}")
    if picture is not None:
        _draw_returns(picture, task.name, returns)
        print(f"saved: {picture}")


def _describe(task: Task, returns: np.ndarray, lengths: np.ndarray) -> dict[str, str]:
    """A task, its episodes' returns (E,) and lengths (E,) -> lines of text by heading."""
    log = task.log
    obs, action, reward = log["observations"], log["actions"], log["rewards"]
    still = (obs.std(0) == 0).sum()
    ends = np.flatnonzero(log["terminals"] | log["timeouts"])
    tail = len(obs) - 1 - ends[-1] if len(ends) else 0
    both = (log["terminals"] & log["timeouts"]).sum()
    at_bound = np.mean(np.any((action <= task.action_low) | (action >= task.action_high), axis=1))
    score = "" if task.reference is None else f", score {task.score(task.behaviour_return):.1f}"
    if task.success is not None:
        score += f" ({task.success:.1%} of the trajectories reach the goal)"
    lines = {
        "source": task.source,
        "file": "-" if task.path is None else f"{task.path} ({task.path.stat().st_size:,} bytes)",
        "hash": f"{task.fingerprint} (of the arrays)",
        "steps": f"{len(obs):,} in {len(returns):,} ended episodes of {lengths.min():,} to "
        f"{lengths.max():,}" + (f", and {tail:,} of an episode that has not ended" if tail else ""),
        "ends": f"{log['terminals'].sum():,} terminals, {log['timeouts'].sum():,} timeouts"
        + (f", {both:,} steps are both and count as terminals" if both else ""),
        "observations": f"{obs.shape[1]}, from {obs.min():.3g} to {obs.max():.3g}"
        + (f"; {still} never change" if still else ""),
        "successors": "known at timeouts too" if SUCCESSORS in log else "the next row",
        "actions": f"{action.shape[1]}, from {action.min():.3g} to {action.max():.3g}; "
        f"{at_bound:.1%} of the steps touch a bound",
        "rewards": f"mean {reward.mean():.4g}, from {reward.min():.4g} to {reward.max():.4g}",
        "returns": f"mean {returns.mean():.1f}{score}, std {returns.std():.1f}, from "
        f"{returns.min():.1f} to {returns.max():.1f}",
        "simulator": task.simulator or "none",
    }
    off = np.abs(obs - np.median(obs, axis=0))
    near = np.mean((off > 0) & (off < 0.05 * obs.std(0)), axis=0)  # 0.04 of a normal density
    if (near > 1 / 3).any():
        lines["far values"] = (
            f"set the scale of observations {', '.join(map(str, np.flatnonzero(near > 1 / 3)))}: "
            "a third of the steps or more are within 0.05 standard deviations of the median"
        )
    if task.simulator in sim.BODIES and (SUCCESSORS in log or tail > 1 or lengths.max() > 1):
        error, what = replay_error(task)
        lines["replays"] = (
            f"error of one step in {task.simulator}: median {np.median(error):.1e}, largest "
            f"{error.max():.1e} variances, from {what}"
        )
    return lines


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


def download_command(name: tyro.conf.Positional[str], mirror: str | None = None) -> None:
    """Download a D4RL log into D4RL's cache folder; an interrupted download resumes.

    Args:
        name: name of a D4RL task, or minari:NAME
        mirror: address of a web folder that holds D4RL's files; $PGD_MIRROR by default
    """
    entry = resolve(name)
    if entry.minari:
        open_minari(entry.minari)
        print(f"{entry.name} is on this machine")
        return
    if entry.d4rl is None or entry.source == "collect":
        reason = "is not a D4RL task" if entry.d4rl is None else "is collected, not downloaded"
        raise UserError(f"{entry.name} {reason}; python data.py collect {entry.recipe.name}")
    try:
        path, checked = download(entry.d4rl, mirror)
    except Unreachable as e:
        raise UserError(f"{e}; what has arrived is kept, run the command again to resume") from e
    print(f"{path} ({checked})")


def collect_command(
    name: tyro.conf.Positional[str],
    steps: int | None = None,
    seed: int = 0,
    out: str | None = None,
) -> None:
    """Collect a log with the policies in policies/ and keep it in the cache.

    Args:
        name: name of a task, with or without the prefix collect:
        steps: transitions of the whole log; the recipe's own number by default
        seed: of the environments and the actions
        out: FILE.hdf5, FILE.npz or minari:ENV/DATA-v0 for a copy of the log
    """
    entry = resolve(name)
    if split_prefix(name)[0] not in (None, "collect"):
        raise UserError(f"{name} is not collected; leave out its prefix")
    refuse_without_recipe(entry)
    at_least(0, seed=seed)
    at_least(len(entry.recipe.parts), steps=steps)
    if out is not None:
        refuse_existing_export(out)
    path, provenance = collected(entry.recipe, steps, seed)
    if out is not None and Path(out).suffix in (".hdf5", ".h5"):
        with atomic_path(Path(out)) as part:  # a copy keeps the simulator's states
            shutil.copyfile(path, part)
    elif out is not None:
        log, one = read_log(path), make_envs(entry.simulator, 1)
        task = Task(
            entry.name, log, one.low, one.high, provenance, "collect", entry.simulator,
            entry.reference, path,
        )  # fmt: skip
        export(out, log, task, provenance)
    print(f"{out or path}: {provenance}")


def convert_command(
    source: tyro.conf.Positional[str], target: tyro.conf.Positional[str], env: str | None = None
) -> None:
    """Write a log in D4RL's layout or as a Minari data set.

    Args:
        source: HDF5 or npz file in any layout of docs/logs.md, or name of a task
        target: FILE.hdf5, FILE.npz or minari:ENV/DATA-v0
        env: name of the task that a file is a log of
    """
    refuse_existing_export(target)
    task = load(env, source, discrete=True) if is_file(source) else load(source)
    log = task.log
    if target.startswith("minari:") and SUCCESSORS not in log:
        log = with_successors(log)
    export(target, log, task, f"{task.source}, converted")
    returns, _ = episode_returns(log)
    print(f"{target}: {len(log['rewards']):,} steps, {len(returns):,} ended episodes")


def with_successors(log: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A log -> the same with next_observations, less the last step of each episode that ends by a
    time-out: what follows it is not known."""
    end = log["terminals"] | log["timeouts"]
    unknown = log["timeouts"] & ~log["terminals"]
    unknown[-1] |= not end[-1]
    say(f"the log lacks next_observations; {unknown.sum():,} last steps before time-outs are left "
        "out")  # fmt: skip
    after = np.where(end[:, None], log["observations"], np.roll(log["observations"], -1, axis=0))
    before = np.append(unknown[1:], False) & ~end  # these steps end their episodes now
    whole = log | {SUCCESSORS: after, "timeouts": log["timeouts"] & ~unknown | before}
    return {key: x[~unknown] for key, x in whole.items()}


def train_policy_command(settings: tyro.conf.OmitArgPrefixes[PolicyTraining]) -> None:
    """Train a behaviour policy by SAC and save a snapshot at every evaluation."""
    import agents

    settings.check()
    train_policy(settings, agents.sac_n(num_critics=2, hidden=settings.hidden))


def measure_command(task: tyro.conf.Positional[str], episodes: int = 1000) -> None:
    """Print the mean return of a random policy and of every policy shipped for a simulator.

    Args:
        task: name of a simulator, e.g. hopper or pendulum
        episodes: episodes per policy
    """
    at_least(1, episodes=episodes)
    measure_policies(task, episodes)


def parse_command(commands: dict[str, Callable]) -> Callable[[], None]:
    """The command line -> the call of its command, not made yet. Raises UserError for a mistake."""

    def put_off(command: Callable) -> Callable:
        bind = functools.partial(functools.partial, command)
        return functools.wraps(command)(lambda *args, **kwargs: bind(*args, **kwargs))

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            deferred = {name: put_off(command) for name, command in commands.items()}
            return tyro.extras.subcommand_cli_from_dict(deferred)
    except SystemExit as e:
        if not e.code:  # --help
            raise
    lines = [line.strip("│╭╮╰╯ ") for line in said.getvalue().splitlines()]  # of tyro's box
    rules = ["\n" if re.match("─|-+$", line) else line for line in lines]
    parts = [" ".join(part.split()).rstrip(".") for part in " ".join(rules).split("\n")[1:]]
    mistakes = [part for part in parts if part and not part.startswith(("For full", "Argument"))]
    raise UserError(f"{'; '.join(mistakes)}; python data.py COMMAND --help explains a command")


def main() -> None:
    """Run one command. A mistake is one line on stderr and exit status 2."""
    commands = {
        "list": list_command,
        "info": info_command,
        "download": download_command,
        "collect": collect_command,
        "convert": convert_command,
        "train-policy": train_policy_command,
        "measure": measure_command,
    }
    try:
        parse_command(commands)()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, MemoryError) as e:
        print(f"data.py: {printable(' '.join(str(e).split()))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted; what has arrived is kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
