"""Everything on the host side: logs in, environments, behaviour policies, normalised scores.

    python data.py collect halfcheetah-medium               # re-collect a log with a shipped policy
    python data.py download halfcheetah-medium              # fetch D4RL's own, resumed and verified
    python data.py train-policy halfcheetah --stop-at 4770 --out policies/halfcheetah-medium.npz

    task = load("halfcheetah-medium")                       # task.log: a dict of D4RL's arrays

Numpy in, numpy out: nothing but this file touches data files, simulators or the network.
"""

import contextlib
import csv
import difflib
import errno
import functools
import hashlib
import http.client
import importlib
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


class DataError(Exception):
    """A user's mistake or a missing file; its message is one line that says how to mend it."""


# --- Load: a name or a file -> Task ---


@dataclass(frozen=True)
class Task:
    """A log, where it came from, and the simulator to be judged in, if there is one."""

    name: str
    log: dict[str, np.ndarray]  # D4RL's flat layout: KEYS, float32 and bool, N rows each
    action_low: np.ndarray  # (A,) in the environment's units
    action_high: np.ndarray
    source: str  # one line of provenance, for the table and final.json
    kind: Literal["auto", "d4rl", "collect"]  # the `source` that gives this very log again
    simulator: str | None  # e.g. "halfcheetah"; None: returns cannot be measured
    reference: tuple[float, float] | None  # returns that score 0 and 100

    def score(self, returns):
        """Undiscounted returns -> D4RL's normalised score, 100 * (R - min) / (max - min)."""
        if self.reference is None:
            return None
        low, high = self.reference
        return 100.0 * (np.asarray(returns, np.float64) - low) / (high - low)

    @functools.cached_property
    def behaviour_return(self) -> float:
        """Mean undiscounted return of the log's episodes; the last counts only if it has ended."""
        ends = np.flatnonzero(self.log["terminals"] | self.log["timeouts"])
        ends = ends if len(ends) else np.array([len(self.log["rewards"]) - 1])
        totals = np.cumsum(self.log["rewards"], dtype=np.float64)[ends]
        return float(np.diff(totals, prepend=0.0).mean())

    def release_log(self) -> None:
        """Forget the arrays, once they are elsewhere."""
        _ = self.behaviour_return, self.fingerprint
        self.log.clear()

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the log, to know it again when a run is resumed."""
        digest = hashlib.sha256()
        for key in KEYS:
            digest.update(np.ascontiguousarray(self.log[key]).data)
        return digest.hexdigest()[:16]


def load(
    name: str | None = None,
    path: str | None = None,
    source: Literal["auto", "d4rl", "collect"] = "auto",
) -> Task:
    """A D4RL or gymnax task name, or an HDF5 file in D4RL's layout, or both -> Task.

    With both, the file is the log and the name says which simulator judges. `source` is where the
    log of a name comes from: D4RL's host, or a re-collection by a shipped policy; auto tries them
    in that order. Raises DataError, in one line, for whatever is wrong with the file or the name.
    """
    entry = None if name is None else resolve(name)
    if path is not None:
        log, origin, kind = read_hdf5(Path(path)), f"file {Path(path).name}", source
    elif entry is None:
        raise DataError("name a task or give a file")
    else:
        log, origin, kind = _load_by_name(entry, source)
    simulator = entry.simulator if entry else None
    if simulator:
        env = make_envs(simulator, 1)
        low, high = env.low, env.high
        have, want = (
            (log["observations"].shape[1], log["actions"].shape[1]),
            (env.obs_dim, low.size),
        )
        if have != want:
            raise DataError(
                f"the log has {have[0]} observations and {have[1]} actions, {simulator} has "
                f"{want[0]} and {want[1]}; leave out --env, or name the log's own task"
            )
        outside = np.mean(np.any((log["actions"] < low) | (log["actions"] > high), axis=1))
        if outside > 0:
            _say(f"{outside:.1%} of the actions lie outside {simulator}'s bounds and are clipped")
    else:
        low = np.minimum(log["actions"].min(0), -1.0)
        high = np.maximum(log["actions"].max(0), 1.0)
        if low.min() < -1.0 or high.max() > 1.0:
            _say(
                f"actions reach {np.abs(log['actions']).max():.2f}, outside [-1, 1], and no "
                "simulator gives their bounds: the log's own extremes are taken"
            )
    title = entry.name if path is None else Path(path).stem
    reference = entry.reference if entry else None
    return Task(title, log, low, high, origin, kind, simulator, reference)


class Entry(NamedTuple):
    """What is known of a task name."""

    name: str  # with D4RL's version
    simulator: str | None
    reference: tuple[float, float] | None
    limit: int | None  # longest episode
    d4rl: dict | None  # its row of d4rl_registry.csv
    policy: str | None  # re-collectable: "random", or the name of a file in policies/


# Returns that score 0 and 100: the means of a uniformly random policy and of the -expert policy in
# policies/ over 1,000 episodes, as `python data.py measure TASK` prints them.
GYMNAX_REFERENCE = {"pendulum": (-1233.5, -167.7)}


def registry() -> dict[str, Entry]:
    """Every name that load() knows -> Entry."""
    policies = {p.stem for p in (HERE / "policies").glob("*.npz")}
    simulators = [*MujocoEnvs.IDS, *GymnaxEnvs.IDS]
    policies |= {f"{s}-random" for s in simulators}
    known = {}
    with open(HERE / "d4rl_registry.csv", newline="") as f:
        for row in csv.DictReader(f):
            stem = row["dataset"].rsplit("-v", 1)[0]
            simulator = stem.split("-")[0] if stem.split("-")[0] in MujocoEnvs.IDS else None
            reference = float(row["ref_min_score"]), float(row["ref_max_score"])
            policy = stem if stem in policies else None
            limit = int(row["max_episode_steps"])
            known[row["dataset"]] = Entry(row["dataset"], simulator, reference, limit, row, policy)
    for stem in sorted(policies):
        simulator = stem.rsplit("-", 1)[0]
        if simulator in GymnaxEnvs.IDS:
            reference = GYMNAX_REFERENCE.get(simulator)
            known[stem] = Entry(stem, simulator, reference, None, None, stem)
    return known


def resolve(name: str) -> Entry:
    """A task name, with or without D4RL's version -> Entry; DataError with the nearest names."""
    known = registry()
    without_version = {full.rsplit("-v", 1)[0]: full for full in known}
    full = name if name in known else without_version.get(name)
    if full is None:
        near = difflib.get_close_matches(name, [*known, *without_version], n=4, cutoff=0.5)
        near = (
            list(dict.fromkeys(n.rsplit("-v", 1)[0] for n in near)) or sorted(without_version)[:4]
        )
        raise DataError(f"there is no task {name!r}; did you mean {' or '.join(near)}?")
    return known[full]


def _load_by_name(entry: Entry, source: str) -> tuple[dict, str, str]:
    """-> (log, provenance, the source that it came from)."""
    if source == "d4rl" and entry.d4rl is None:
        raise DataError(f"{entry.name} is not a D4RL task; its log is collected (--source collect)")
    if entry.d4rl and source != "collect":
        try:
            path, checked = download(entry)
            return read_hdf5(path, limit=entry.limit), f"D4RL {entry.name} ({checked})", "d4rl"
        except Unreachable as e:
            path = d4rl_path(entry)
            ways_out = f"put {path.name} into {path.parent}, or give --dataset-path"
            if source == "d4rl" or entry.policy is None:
                raise DataError(f"{e}; {ways_out}") from e
            _say(f"{e}; going on with a re-collected log, which is not D4RL's; else {ways_out}")
    if entry.policy is None:
        have = ", ".join(n for n, e in registry().items() if e.policy)
        raise DataError(f"no policy is shipped to collect {entry.name} with; there is {have}")
    return *load_collected(entry), "collect"


# --- HDF5 in D4RL's layout ---


def read_hdf5(path: Path, limit: int | None = None) -> dict[str, np.ndarray]:
    """A file in D4RL's layout -> dict of KEYS, checked; DataError in one line for whatever is
    wrong.

    Where `timeouts` is missing and the longest episode is known (`limit`), they are put back.
    """
    h5py = _import("h5py", "h5py")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; fetch or write it again")
    try:
        with h5py.File(path, "r") as f:
            have = {key for key in KEYS if isinstance(f.get(key), h5py.Dataset)}
            missing = set(KEYS) - have - ({"timeouts"} if limit else set())
            if missing:
                raise DataError(
                    f"{path} has no {', '.join(sorted(missing))}; it needs {', '.join(KEYS)}"
                )
            for key in have:
                if f[key].dtype.kind not in "fiub":
                    raise DataError(f"{path}: {key} holds {f[key].dtype}, not numbers")
                if f[key].ndim not in (1, 2):
                    raise DataError(
                        f"{path}: {key} has shape {f[key].shape}, it should be (N, ...)"
                    )
            log = {key: _read(f[key]) for key in have}
    except (OSError, RuntimeError, KeyError) as e:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EACCES):
            raise
        raise DataError(f"{path} cannot be read as HDF5; it is damaged or of another kind") from e
    for key in set(KEYS[2:]) & have:
        if log[key].ndim == 2 and log[key].shape[1] == 1:
            log[key] = log[key][:, 0]
    if "timeouts" not in log:
        log["timeouts"] = _timeouts_by_limit(log["terminals"] != 0, limit)
        _say(f"{path.name} has no timeouts: episodes are taken to end after {limit} steps")
    check_log(log, str(path))
    return {key: log[key] if key in KEYS[:3] else log[key].astype(bool) for key in KEYS}


def _read(dataset) -> np.ndarray:
    """An HDF5 data set straight into one float32 array, or a bool one as it is."""
    out = np.empty(dataset.shape, bool if dataset.dtype == bool else np.float32)
    if out.size:
        dataset.read_direct(out)
    return out


def _timeouts_by_limit(terminals: np.ndarray, limit: int) -> np.ndarray:
    timeouts, age = np.zeros(len(terminals), bool), 0
    for i, terminal in enumerate(terminals):
        age += 1
        timeouts[i] = not terminal and age == limit
        if terminal or age == limit:
            age = 0
    return timeouts


def check_log(log: dict[str, np.ndarray], where: str) -> None:
    """Shapes agree and every number is finite, or DataError."""
    num = len(log["observations"])
    for key, ndim in zip(KEYS, (2, 2, 1, 1, 1)):
        shape = log[key].shape
        if len(shape) != ndim or shape[0] != num or 0 in shape:
            want = f"({num}, ...)" if ndim == 2 else f"({num},)"
            raise DataError(f"{where}: {key} has shape {shape}, it should be {want} and not empty")
        bad = None if log[key].dtype == bool else ~np.isfinite(log[key]).reshape(num, -1).all(1)
        if bad is not None and bad.any():
            raise DataError(
                f"{where}: {key} has NaN or infinite values in {bad.sum()} of {num} rows, "
                f"the first in row {bad.argmax()}; remove those episodes"
            )


def write_hdf5(path: Path, log: dict[str, np.ndarray], attrs: dict[str, str]) -> None:
    """A log in D4RL's layout, written whole or not at all."""
    h5py = _import("h5py", "h5py")
    with atomic_path(path) as part:
        try:
            with h5py.File(part, "w") as f:
                for key, array in log.items():
                    f.create_dataset(key, data=array)
                f.attrs.update(attrs)
        except RuntimeError as e:  # h5py's way of saying that the disk is full
            raise OSError(f"{path} could not be written ({e})") from e


# --- D4RL's host ---


class Unreachable(Exception):
    """D4RL's file could not be fetched; nothing is wrong with what is on disk."""


def d4rl_path(entry: Entry) -> Path:
    """Where D4RL itself keeps the file: $D4RL_DATASET_DIR, or ~/.d4rl/datasets."""
    folder = os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")
    return Path(folder).expanduser() / entry.d4rl["url"].rsplit("/", 1)[1]


def download(entry: Entry) -> tuple[Path, str]:
    """D4RL's file for this entry, from its cache folder or its host -> (path, what was checked).

    An interrupted download goes on where it stopped. The file gets its name only when size and
    SHA-256 agree with the registry, where that has them. Raises Unreachable, or DataError on a
    wrong file.
    """
    path, row = d4rl_path(entry), entry.d4rl
    size, sha256 = int(row["bytes"] or 0), row["sha256"]
    verified = "SHA-256 verified" if sha256 else "no hash known"
    if path.is_file():
        if problem := _problem(path, size, sha256):
            raise DataError(f"{path} is not D4RL's file: {problem}; remove it and run again")
        return path, verified
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(row["url"], part)
    except (OSError, http.client.HTTPException) as e:  # urllib's errors are OSErrors too
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        reason = getattr(e, "reason", None) or e
        raise Unreachable(f"{entry.name}: D4RL's host cannot be reached ({reason})") from e
    if problem := _problem(part, size, sha256):
        part.unlink()
        raise DataError(
            f"{row['url']} sent a wrong file ({problem}), which was removed; try again, "
            "or --source collect"
        )
    os.replace(part, path)
    return path, verified


def _problem(path: Path, size: int, sha256: str) -> str | None:
    """What is wrong with a downloaded file, if anything."""
    if size and path.stat().st_size != size:
        return f"{path.stat().st_size:,} bytes instead of {size:,}"
    if sha256 and _sha256(path) != sha256:
        return "another SHA-256 than the registry's"
    if not _import("h5py", "h5py").is_hdf5(path):
        return "not HDF5"
    return None


def fetch(url: str, part: Path, timeout: float = 20.0) -> None:
    """Append what `part` still lacks of `url`, or all of it where the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:  # nothing is left to send: the size check that follows decides
            return
        raise
    with response:
        resumed = response.status == 206
        left = int(response.headers.get("Content-Length") or 0)
        bar = tqdm(
            desc=part.name.removesuffix(".part"), unit="B", unit_scale=True, disable=None,
            initial=have * resumed, total=left + have * resumed or None,
        )  # fmt: skip
        with open(part, "ab" if resumed else "wb") as f, bar:
            while block := response.read(1 << 20):
                f.write(block)
                bar.update(len(block))
                left -= len(block)
        if left > 0:
            raise OSError(f"the connection broke with {left:,} bytes to go")


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --- Re-collected logs ---


def cache_dir() -> Path:
    """Where collected logs are kept: $PGD_CACHE, or pgd in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("PGD_CACHE", f"{base}/pgd")).expanduser()


def load_collected(entry: Entry, steps: int | None = None, seed: int = 0) -> tuple[dict, str]:
    """The log of a shipped policy, collected once and cached -> (log, provenance).

    D4RL's recipe: the stochastic policy, 1,000,000 steps (100,000 for the small gymnax tasks).
    """
    policy, described, digest = _policy(entry)
    steps = steps or (1_000_000 if entry.simulator in MujocoEnvs.IDS else 100_000)
    path = cache_dir() / f"{entry.policy}-{steps}-{seed}-{digest}.hdf5"
    origin = f"re-collected, not D4RL's: {described}" if entry.d4rl else f"collected: {described}"
    origin = f"{origin}, {steps:,} steps, seed {seed}"
    if not path.exists():
        start = time.time()
        _say(f"collecting {steps:,} steps of {entry.policy} into {path}")
        most = 50 if entry.simulator in MujocoEnvs.IDS else 500
        limit = make_envs(entry.simulator, 1).limit
        num = min(most, max(1, steps // limit))
        whole = (
            -(-steps // (num * limit)) * limit * num
        )  # streams of whole episodes, where all last
        log = collect(make_envs(entry.simulator, num), policy, whole, seed)
        log = {key: array[:steps] for key, array in log.items()}
        write_hdf5(path, log, {"source": origin})
        _say(f"collected in {time.time() - start:.0f} s")
    return read_hdf5(path), origin


def _policy(entry: Entry) -> tuple[Callable, str, str]:
    """-> (policy(obs, rng) -> action in [-1, 1], its description, a short hash of it)."""
    if entry.policy.endswith("-random"):
        act_dim = make_envs(entry.simulator, 1).low.size
        uniform = lambda obs, rng: rng.uniform(-1.0, 1.0, (len(obs), act_dim))
        return uniform, "uniformly random actions", "random"
    path = HERE / "policies" / f"{entry.policy}.npz"
    policy = Policy.load(path)
    described = f"SAC policy policies/{path.name} (mean return {policy.meta['mean_return']:.0f})"
    return policy, described, _sha256(path)[:8]


# --- Environments: many at once, numpy in, numpy out ---


class MujocoEnvs:
    """`num` copies of a gymnasium MuJoCo task, stepped together on the host.

    D4RL's -v2 logs have the physics and the observations of gymnasium's -v4 tasks (Walker2d-v5 has
    another foot friction, Hopper-v5 another reward at a fall).
    """

    IDS = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4"}

    def __init__(self, task: str, num: int):
        gymnasium = _import("gymnasium", "gymnasium[mujoco]")
        gymnasium.logger.min_level = gymnasium.logger.ERROR  # -v4 is what D4RL's logs need
        # MuJoCo 4.0 warns of an attribute in gymnasium's own model files, also into a file here
        with _quiet_stderr(), tempfile.TemporaryDirectory() as away, contextlib.chdir(away):
            made = [gymnasium.make(self.IDS[task], disable_env_checker=True) for _ in range(num)]
        self.num, self.limit = num, made[0].spec.max_episode_steps
        self.envs = [env.unwrapped for env in made]
        space = self.envs[0].action_space
        self.low, self.high = space.low.astype(np.float32), space.high.astype(np.float32)
        self.obs_dim = self.envs[0].observation_space.shape[0]

    def reset(self, seed: int | Sequence[int]) -> np.ndarray:
        """Start every copy afresh -> obs (num, O); `seed` is one number, or one for each copy."""
        if np.ndim(seed) == 0:
            seed = np.random.SeedSequence(seed).generate_state(self.num)
        obs = [env.reset(seed=int(s))[0] for env, s in zip(self.envs, seed)]
        self.obs = np.stack(obs).astype(np.float32)
        self._age = np.zeros(self.num, np.int64)
        return self.obs

    def step(self, action: np.ndarray):
        """action (num, A) -> next_obs (num, O), reward, terminal, timeout (num,).

        `self.obs` is what to act on next: it differs from next_obs where an episode has ended.
        """
        results = [env.step(a)[:3] for env, a in zip(self.envs, np.asarray(action, np.float64))]
        next_obs = np.stack([r[0] for r in results]).astype(np.float32)
        reward = np.array([r[1] for r in results], np.float32)
        terminal = np.array([r[2] for r in results], bool)
        self._age += 1
        timeout = ~terminal & (self._age >= self.limit)
        self.obs = next_obs.copy()
        for i in np.flatnonzero(terminal | timeout):
            self.obs[i], self._age[i] = self.envs[i].reset()[0], 0
        return next_obs, reward, terminal, timeout


def make_gymnax(task: str):
    """Task name -> (gymnax environment, its parameters, action low (A,), action high (A,))."""
    gymnax = _import("gymnax", "gymnax six")
    env, params = gymnax.make(GymnaxEnvs.IDS[task])
    space = env.action_space(params)
    low, high = (np.broadcast_to(np.float32(b), space.shape) for b in (space.low, space.high))
    return env, params, low, high


class GymnaxEnvs:
    """`num` copies of a gymnax task on the host, behind the interface of MujocoEnvs."""

    IDS = {
        "pendulum": "Pendulum-v1",
        "reacher": "Reacher-misc",
        "mountaincar-continuous": "MountainCarContinuous-v0",
    }

    def __init__(self, task: str, num: int):
        import jax

        env, params, self.low, self.high = make_gymnax(task)
        self.num, self.limit = num, int(params.max_steps_in_episode)
        self.obs_dim = env.observation_space(params).shape[0]

        @jax.jit
        def reset(seed):
            keys = jax.random.split(jax.random.key(seed), num)
            return jax.vmap(env.reset, in_axes=(0, None))(keys, params)

        @jax.jit
        def step(seed, t, state, action):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), t), num)
            return jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, action, params)

        self._reset_all, self._step_all = reset, step

    def reset(self, seed: int) -> np.ndarray:
        """Start every copy afresh -> obs (num, O)."""
        self._seed, self._t = seed, 0
        obs, self._state = self._reset_all(seed)
        self.obs = np.asarray(obs, np.float32)
        return self.obs

    def step(self, action: np.ndarray):
        """action (num, A) -> next_obs (num, O), reward, terminal, timeout (num,); see
        MujocoEnvs."""
        self._t += 1
        out = self._step_all(self._seed, self._t, self._state, np.asarray(action, np.float32))
        obs, self._state, reward, terminal, timeout, info = out
        self.obs = np.asarray(obs, np.float32)
        next_obs = np.asarray(info["final_observation"], np.float32)
        terminal, timeout = np.asarray(terminal, bool), np.asarray(timeout, bool)
        return next_obs, np.asarray(reward, np.float32), terminal, timeout & ~terminal


def make_envs(task: str, num: int):
    """`num` host-side copies of a gymnax or MuJoCo task."""
    if task in GymnaxEnvs.IDS:
        return GymnaxEnvs(task, num)
    if task in MujocoEnvs.IDS:
        return MujocoEnvs(task, num)
    raise DataError(f"there is no simulator for {task!r}")


def evaluate_on_host(envs, act: Callable, seed: int | Sequence[int]) -> np.ndarray:
    """One episode in every copy -> undiscounted returns (num,). act maps obs (num, O) to (num,
    A)."""
    obs, returns, alive = envs.reset(seed), np.zeros(envs.num), np.ones(envs.num, bool)
    while alive.any():
        _, reward, terminal, timeout = envs.step(act(obs))
        obs = envs.obs
        returns += reward * alive
        alive &= ~(terminal | timeout)
    return returns


def step_from(simulator: str, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """obs (N, O), action (N, A) -> next_obs (N, O), as MuJoCo has it from exactly that state.

    An observation is qpos without the position along the track, which has no influence, then qvel.
    """
    if simulator not in MujocoEnvs.IDS:
        raise DataError(f"{simulator} cannot be put into a given state")
    env = make_envs(simulator, 1).envs[0]
    env.reset(seed=0)
    out, num_qpos = np.empty(obs.shape), env.model.nq - 1
    for i, (o, a) in enumerate(zip(obs.astype(np.float64), action.astype(np.float64))):
        env.set_state(np.concatenate([[0.0], o[:num_qpos]]), o[num_qpos:])
        out[i] = env.step(a)[0]
    return out


def evaluator_in_program(simulator: str | None, episodes: int) -> Callable | None:
    """-> evaluate(key, act) -> returns (episodes,), a pure function to compile into a run; None
    where the task has no simulator in JAX. act maps obs (..., O) to actions (..., A)."""
    if simulator not in GymnaxEnvs.IDS:
        return None
    import jax
    import jax.numpy as jnp

    env, params, _, _ = make_gymnax(simulator)

    def episode(key, act):
        key_reset, key_steps = jax.random.split(key)
        obs, state = env.reset(key_reset, params)

        def step(carry, key):
            obs, state, alive = carry
            obs, state, reward, terminal, timeout, _ = env.step(key, state, act(obs), params)
            return (obs, state, alive * (1.0 - (terminal | timeout))), reward * alive

        keys = jax.random.split(key_steps, params.max_steps_in_episode)
        return jnp.sum(jax.lax.scan(step, (obs, state, jnp.float32(1.0)), keys)[1])

    def evaluate(key, act):
        return jax.vmap(episode, in_axes=(0, None))(jax.random.split(key, episodes), act)

    return evaluate


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

    def save(self, path: Path) -> None:
        arrays = {f"{n}{i}": a for i, layer in enumerate(self.layers) for n, a in zip("wb", layer)}
        with atomic_path(path) as part, open(part, "wb") as f:
            np.savez(f, meta=np.array(json.dumps(self.meta)), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Policy":
        with np.load(path, allow_pickle=False) as z:
            layers = [(z[f"w{i}"], z[f"b{i}"]) for i in range((len(z.files) - 1) // 2)]
            return cls(layers, json.loads(str(z["meta"])))


def scale_action(action, low, high):
    """[-1, 1] -> the environment's own units."""
    return low + (action + 1.0) * 0.5 * (high - low)


def collect(envs, policy: Callable, steps: int, seed: int) -> dict[str, np.ndarray]:
    """`steps` transitions of the stochastic policy, in D4RL's flat layout.

    Each copy of the environment is one stream of steps // num (rounded up) and the streams are laid
    end to end, so that no episode is preferred for ending early; where a stream stops, so does an
    episode, as if by a time-out.
    """
    length = -(-steps // envs.num)
    rng = np.random.default_rng(seed)
    obs = envs.reset(seed)
    num, act_dim = envs.num, envs.low.size
    log = {
        "observations": np.empty((num, length, envs.obs_dim), np.float32),
        "actions": np.empty((num, length, act_dim), np.float32),
        "rewards": np.empty((num, length), np.float32),
        "terminals": np.empty((num, length), bool),
        "timeouts": np.empty((num, length), bool),
        "next_observations": np.empty((num, length, envs.obs_dim), np.float32),
    }
    for t in tqdm(range(length), "collect", unit_scale=num, unit=" steps", disable=None):
        action = scale_action(policy(obs, rng), envs.low, envs.high).astype(np.float32)
        next_obs, reward, terminal, timeout = envs.step(action)
        for name, x in zip(log, (obs, action, reward, terminal, timeout, next_obs)):
            log[name][:, t] = x
        obs = envs.obs
    log["timeouts"][:, -1] |= ~log["terminals"][:, -1]
    return {k: v.reshape(num * length, *v.shape[2:])[:steps] for k, v in log.items()}


def train_policy(
    task: tyro.conf.Positional[str],
    stop_at: float,
    out: Path,
    seed: int = 0,
    max_steps: int = 1_000_000,
    num_envs: int = 16,
    start_steps: int = 10_000,
    eval_every: int = 5_000,
) -> None:
    """Train SAC online and save the snapshot whose mean return is nearest to `stop_at`.

    D4RL's recipe for its -medium logs. One update of batch 256 per environment step, replay of all
    that was seen; every `eval_every` steps the stochastic policy is judged, and the
    first time that it passes `stop_at`, the nearer of this snapshot and the one before is kept.
    """
    import jax

    import agents

    agent, batch_size = agents.sac(), 256
    envs = make_envs(task, num_envs)
    judge = make_envs(task, 100 if task in GymnaxEnvs.IDS else num_envs)
    act_dim, rng = envs.low.size, np.random.default_rng(seed)
    sizes = (envs.obs_dim, act_dim, 1, envs.obs_dim, 1)
    buffer = [np.empty((max_steps + num_envs, n), np.float32) for n in sizes]

    @jax.jit
    def learn(key, state, batches):
        def step(state, x):
            return agent.update(x[0], state, x[1])

        keys = jax.random.split(key, num_envs)
        return jax.lax.scan(step, state, (keys, batches))[0]

    def snapshot(state, t):
        layers = [tuple(map(np.asarray, layer)) for layer in state.actor]
        policy, noise = Policy(layers, {}), np.random.default_rng(t)
        act = lambda obs: scale_action(policy(obs, noise), judge.low, judge.high)
        mean_return = round(float(evaluate_on_host(judge, act, t).mean()), 1)
        command = (
            f"python data.py train-policy {task} --stop-at {stop_at:g} --seed {seed} "
            f"--num-envs {num_envs} --start-steps {start_steps} --eval-every {eval_every} "
            f"--out {out}"
        )
        meta = {"task": task, "algorithm": "SAC", "mean_return": mean_return, "env_steps": t}
        return Policy(layers, meta | {"command": command})

    key = jax.random.key(seed)
    state, sample = agent.init(key, envs.obs_dim, act_dim), jax.jit(agent.sample)
    obs, before = envs.reset(seed), None
    every = max(1, eval_every // num_envs) * num_envs
    bar = tqdm(
        range(0, max_steps, num_envs), task, unit_scale=num_envs, unit=" steps", disable=None
    )
    for t in bar:
        key_act, key_learn = jax.random.split(jax.random.fold_in(key, t))
        if t < start_steps:
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
        index = rng.integers(0, t + num_envs, (num_envs, batch_size))
        o, a, r, n, d = (array[index] for array in buffer)
        state = learn(key_learn, state, Batch(o, a, r[..., 0], n, d[..., 0]))
        if t % every == 0:
            now = snapshot(state, t)
            _say(f"{task}: {t:,} steps, mean return {now.meta['mean_return']}")
            if now.meta["mean_return"] >= stop_at:
                choice = [p for p in (before, now) if p is not None]
                best = min(choice, key=lambda p: abs(p.meta["mean_return"] - stop_at))
                best.save(out)
                _say(f"saved {out}: {best.meta}")
                return
            before = now
    raise DataError(f"{task} did not reach {stop_at:g} in {max_steps:,} steps; try another --seed")


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


def _import(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise DataError(f"{module} cannot be imported ({e}); pip install {package}") from e


@contextlib.contextmanager
def _quiet_stderr():
    """Drop what C code writes to standard error meanwhile."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


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


def measure(task: tyro.conf.Positional[str], episodes: int = 1000) -> None:
    """Mean undiscounted return of a random policy and of every policy shipped for `task`."""
    if task not in {*GymnaxEnvs.IDS, *MujocoEnvs.IDS}:
        raise DataError(f"there is no simulator for {task!r}")
    envs = make_envs(task, 100)
    for entry in registry().values():
        if entry.simulator == task and entry.policy:
            policy, described, _ = _policy(entry)
            rng = np.random.default_rng(0)
            act = lambda obs: scale_action(policy(obs, rng), envs.low, envs.high)
            rounds = [evaluate_on_host(envs, act, i) for i in range(-(-episodes // envs.num))]
            returns = np.concatenate(rounds)
            print(f"{entry.name}: {returns.mean():.1f} +- {returns.std():.1f}, {described}")


def collect_command(
    name: tyro.conf.Positional[str],
    steps: int | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Collect the log of a shipped policy into the cache, or into --out."""
    log, origin = load_collected(resolve(name), steps, seed)
    if out is not None:
        write_hdf5(out, log, {"source": origin})
    print(f"{out or cache_dir()}: {origin}")


def download_command(name: tyro.conf.Positional[str]) -> None:
    """Fetch a D4RL log into D4RL's cache folder, going on where an earlier try stopped."""
    entry = resolve(name)
    if entry.d4rl is None:
        raise DataError(f"{entry.name} is not a D4RL task; python data.py collect {entry.name}")
    try:
        path, checked = download(entry)
    except Unreachable as e:
        raise DataError(f"{e}; what has arrived is kept, run the command again to go on") from e
    print(f"{path} ({checked})")


def main() -> None:
    commands = {
        "collect": collect_command,
        "download": download_command,
        "train-policy": train_policy,
        "measure": measure,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands)
    except (DataError, OSError) as e:
        print(f"data.py: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
