"""A run's folder: config.json, checkpoint/state.npz, metrics.csv, final.json and the figures.

Every file but metrics.csv is written beside its place and renamed, so that a kill leaves the last
good one. metrics.csv grows by a line per run and round; a resumed run writes it again from the
checkpoint. One process at a time has a folder.
"""

import contextlib
import csv
import errno
import fcntl
import functools
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from host.errors import UserError, printable
from host.files import atomic_file, atomic_path, npy_header, say

PACKAGES = ("jax", "jaxlib", "optax", "chex", "gymnax", "gymnasium", "mujoco", "numpy")
FORMAT = 4  # of a checkpoint; raised where the program takes a saved state for something else
DATASET = ("mean", "std", "action_low", "action_high")  # fields that a policy needs
STATE, PREVIOUS, LOCK = "state.npz", "state.previous.npz", ".lock"
OF_THE_MACHINE = (  # settings that may change when a run goes on
    "out", "resume", "export", "export_steps", "devices", "distributed", "coordinator", "num_hosts",
    "host", "dataset_path", "denoiser", "offline", "track",
)  # fmt: skip
LOG_ALONE = Path(__file__).resolve().parent.parent / "results" / "log_alone"  # runs to compare with
OF_THE_AGENT = (
    "agent", "hyper", "rounds", "updates", "batch_size", "n_step", "reward_shift", "reward_scale",
    "judge",
)  # fmt: skip
OWN = ("config.json", "metrics.csv", "final.json", "curve.png", "sweep.png", STATE)


class RunFolder:
    """A run's folder, new or of an earlier start."""

    def __init__(self, path: Path, labels: list[dict], lock: Any = None):
        """labels: the swept settings and the seed of each run; lock: of lock_folder()."""
        self.path, self.labels, self._lock = path, labels, lock
        self.history: list[dict] = []  # a row per round and run
        self.diverged: dict[int, str] = {}  # index of each run that has diverged -> where and what
        self.seconds: dict[str, float] = {}  # wall time per stage
        self.notes: dict[str, np.ndarray] = {}  # arrays that go into every checkpoint
        self._saved, self._save_cost = time.monotonic(), 0.0
        self._save_every = save_every()
        self._columns: list[str] = []  # of metrics.csv, as far as it is written

    @functools.cached_property
    def identity(self) -> dict:
        """What binds a checkpoint to this run, as config.json said when the process began."""
        return identity(self.path)

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock:
            self._lock.close()

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the block's wall time to the stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start

    # --- Checkpoint: one npz of arrays, no pickle ---

    def save(self, fitted: int, state: Any, force: bool = False) -> None:
        """Keep the state, after `fitted` chunks of the fit, and the checkpoint before it.

        Without force: at most every $PGD_SAVE_EVERY seconds and a twentieth of the time.
        """
        start = time.monotonic()
        if not force and start - self._saved < max(self._save_every, 20.0 * self._save_cost):
            return
        leaves = {name: np.asarray(x) for name, x in named_leaves(state)}
        about = {"labels": self.labels, "history": self.history, "seconds": self.seconds}
        about |= {"fitted": fitted, "diverged": list(self.diverged.items())}
        about |= {"of": self.identity, "format": FORMAT}
        path, previous = (self.path / "checkpoint" / name for name in (STATE, PREVIOUS))
        path.parent.mkdir(parents=True, exist_ok=True)
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        with atomic_path(path) as part:
            with open(part, "wb") as f:
                np.savez(f, about=text, **self.notes, **leaves)
            if path.exists():
                previous.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # a file system without hard links
                    os.link(path, previous)
        self._saved = time.monotonic()
        self._save_cost = self._saved - start

    def restore(self, state: Any) -> tuple[int, Any]:
        """A new state -> (chunks of the fit that are done, the saved state), or (0, the new state)
        where nothing was saved. Where the last checkpoint is damaged, the one before it counts."""
        path, previous = (self.path / "checkpoint" / name for name in (STATE, PREVIOUS))
        if not path.is_file() and not previous.is_file():
            return 0, state
        try:
            return self._restore(path, state)
        except (Damaged, FileNotFoundError) as e:
            if not previous.is_file():
                raise
            say(f"{str(e).removesuffix(START_AGAIN)}; going on from the checkpoint before it")
            restored = self._restore(previous, state)
            os.replace(previous, path)  # the next save keeps this one, not the damaged one
            return restored

    def _restore(self, path: Path, state: Any) -> tuple[int, Any]:
        with read_checkpoint(path) as (about, arrays):
            refuse_other_run(path, about.get("of"), self.identity)
            names, likes = zip(*named_leaves(state))
            for name, like in zip(names, likes):
                if arrays.header(name) != (like.shape, like.dtype):
                    raise UserError(
                        f"{path} is of another version of this program ({name} differs); start the "
                        "run again"
                    )
            for name in set(DATASET) & set(self.notes):
                if not np.allclose(arrays[name], self.notes[name], rtol=1e-5, atol=1e-6):
                    raise UserError(
                        f"{path} is of a run with another {name.replace('_', ' ')} of the data, as "
                        "of another simulator; resume it with the packages it began with"
                    )
            leaves = [arrays[name] for name in names]
            self.history = [dict(row) for row in about["history"]]
            self.seconds = {str(k): float(x) for k, x in about["seconds"].items()}
            self.diverged = {int(i): str(what) for i, what in about["diverged"]}
            known = set(range(len(self.labels)))
            if not set(self.diverged) <= known or any(type(r["round"]) is not int
                                                      for r in self.history):  # fmt: skip
                raise ValueError("no such run")
            fitted = int(about["fitted"])
            if fitted < 0 or about["labels"] != self.labels:
                raise ValueError("no such run")
        leaves = [jax.device_put(x, like.sharding) for x, like in zip(leaves, likes)]
        return fitted, jax.tree.unflatten(jax.tree.structure(state), leaves)

    def remove_if_empty(self) -> None:
        """Remove the folder where a run has failed before it left anything but config.json."""
        if {x.name for x in self.path.iterdir()} <= {"config.json", LOCK}:
            for name in ("config.json", LOCK):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()

    # --- Metrics ---

    def log(self, index: int, updates: int, metrics: dict, score: Callable) -> list[dict]:
        """Add a row to metrics.csv for each run whose metrics are finite -> the rows.

        index: the round; updates: the agent's updates so far; metrics: arrays (R,); score: returns
        -> normalised scores, or None. Raises UserError where all runs have diverged.
        """
        if "return" in metrics and score(0.0) is not None:
            metrics = metrics | {"score": score(metrics["return"])}
        columns = {k: np.float64(v).ravel().round(6).tolist() for k, v in metrics.items()}
        rows = []
        for i, label in enumerate(self.labels):
            wrong = [k for k, column in columns.items() if not np.isfinite(column[i])]
            if wrong:
                self.mark_diverged(i, f"{wrong[0]} is not finite in round {index}")
            else:
                row = {"round": index, **label, "updates": updates}
                rows.append(row | {k: column[i] for k, column in columns.items()})
        self.check_diverged("lower --hyper.lr, --fit-lr or --guidance")
        self.history += rows
        self.write_metrics(rows)
        return rows

    def mark_diverged(self, i: int, what: str) -> None:
        """Note once that run i has diverged, and say it."""
        if i not in self.diverged:
            self.diverged[i] = what
            if len(self.labels) > 1:
                say(f"{named(self.labels[i])} has diverged: {what}; the other runs go on")

    def check_diverged(self, advice: str) -> None:
        """Raise UserError where no run is left."""
        if len(self.diverged) == len(self.labels):
            raise UserError(f"{self.diverged[0]} of {named(self.labels[0])}: the agent or its "
                            f"denoiser has diverged; {advice}")  # fmt: skip

    def write_metrics(self, rows: list[dict] | None = None) -> None:
        """Add rows to metrics.csv, or write it from the history."""
        path = self.path / "metrics.csv"
        names = list(dict.fromkeys(name for row in rows or [] for name in row))
        more = self._columns and names == self._columns and path.exists()
        if not more:
            rows = self.history
            names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        if not more:
            writer.writeheader()
        writer.writerows(rows)
        if more:
            with open(path, "ab") as f:
                f.write(text.getvalue().encode())
        else:
            with atomic_file(path) as f:
                f.write(text.getvalue().encode())
        self._columns = names


def named(label: dict) -> str:
    """A run's label -> a text such as "guidance 4, seed 0"."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in label.items())


def named_leaves(state: Any) -> list[tuple[str, Any]]:
    """A pytree -> (name, array) of each leaf, such as (".agent.actor[0][1]", ...)."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path), x) for path, x in leaves]


# --- Make a folder, and open one ---


def create(path: Path, config: dict, task, labels: list[dict]) -> RunFolder:
    """Make a run's folder and its config.json. Raises UserError where the folder holds a run or
    another process has it.

    config: every setting; task: a data.Task.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(path)
    try:
        refuse_existing(path)
        log = {"name": task.name, "source": task.source, "fingerprint": task.fingerprint}
        write_json(path / "config.json", {"config": config, "data": log, "versions": versions()})
    except BaseException:
        lock.close()
        raise
    return RunFolder(path, labels, lock)


def reopen(path: Path, labels: list[dict]) -> RunFolder:
    """The folder of a run that goes on; what a kill left of its own files is removed. Raises
    UserError where another process has the folder."""
    folder = RunFolder(path, labels, lock_folder(path))
    for place in (path, path / "checkpoint"):
        for part in place.glob(".*.part"):
            if part.name[1:].rsplit(".", 2)[0] in OWN:
                part.unlink(missing_ok=True)
    return folder


def lock_folder(path: Path):
    """-> an open file, which keeps other processes out of the folder until it is closed. Raises
    UserError where another process has the folder."""
    if (path / "checkpoint").is_symlink():
        raise UserError(f"{path}/checkpoint is a link; a run writes nowhere outside its folder")
    lock, flags = path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    if lock.is_symlink() or lock.exists() and not lock.is_file():
        raise UserError(f"{lock} is not a plain file; remove it")
    lock = os.fdopen(os.open(lock, flags, 0o644), "r+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.seek(0)
        owner = lock.read(200) or "another process"
        lock.close()
        raise UserError(f"{path} is in use by {owner}; wait for it, or name another --out") from e
    except OSError:  # a file system without locks
        pass
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()
    return lock


def identity(path: Path) -> dict:
    """A run's folder -> the settings and the log's fingerprint, which bind a checkpoint to it."""
    with readable(path / "config.json"):
        about = json.loads((path / "config.json").read_text())
        settings = {k: v for k, v in about["config"].items() if k not in OF_THE_MACHINE}
        return {"config": settings, "fingerprint": about["data"]["fingerprint"]}


def refuse_other_run(path: Path, of: dict | None, here: dict) -> None:
    """Raise UserError where a checkpoint is not of the run in its folder, and name what differs."""
    if of is None:
        raise UserError(f"{path} is of another version of this program; start the run again")
    if of["fingerprint"] != here["fingerprint"]:
        raise UserError(f"{path} is of a run on another log than config.json says")
    for name in sorted(set(of["config"]) | set(here["config"])):
        if of["config"].get(name) != here["config"].get(name):
            raise UserError(
                f"{path} is of a run with {name} {of['config'].get(name)}, and config.json says "
                f"{here['config'].get(name)}; restore config.json"
            )


def new_path(name: str, agent: str, synthetic: str, seed: int) -> Path:
    """-> runs/TASK-AGENT-SOURCE-seedN-TIME, a folder that does not exist yet."""
    name = re.sub(r"[^\w.-]+", "-", name)
    stem = f"{name}-{agent}-{synthetic}-seed{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, i = Path("runs") / stem, 1
    while True:  # made here and now, so that two runs of the same second do not share a folder
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            i += 1
            path = Path("runs") / f"{stem}-{i}"


def refuse_existing(path: str | Path) -> None:
    """Raise UserError where the folder already holds a run, or a part of one."""
    names = [x for x in (*OWN, "checkpoint", "host0") if (Path(path) / x).exists()]
    if names and not {"config.json", "host0", "checkpoint"} & set(names):
        raise UserError(f"{path} holds {names[0]} of something else; name another --out")
    if names:
        raise UserError(f"{path} already holds a run; --resume {path}, or name another --out")


def read_config(path: str | Path) -> tuple[dict, str]:
    """A run's folder -> (its settings, the fingerprint of its log). Raises UserError."""
    path = Path(path) / "config.json"
    if not path.is_file():
        raise UserError(f"there is no run in {path.parent}: it has no config.json")
    with readable(path):
        about = json.loads(path.read_text())
        return with_tuples(about["config"]), about["data"]["fingerprint"]


START_AGAIN = "; start the run again"


class Damaged(UserError):
    """A file cannot be read."""


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into Damaged."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as e:  # zipfile, numpy and json raise errors of a dozen types
        if getattr(e, "errno", None) not in (None, errno.EINVAL):  # the disk's, not the file's
            raise
        raise Damaged(f"{path} is damaged ({type(e).__name__}){START_AGAIN}") from e


class Arrays(NamedTuple):
    """The arrays of an open npz file, read when they are asked for."""

    file: zipfile.ZipFile

    def header(self, name: str) -> tuple[tuple, np.dtype] | None:
        """-> (shape, dtype) of an array, or None if there is none."""
        if f"{name}.npy" not in self.file.namelist():
            return None
        dtype, shape = npy_header(self.file, f"{name}.npy")
        return shape, dtype

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.file.getinfo(f"{name}.npy")
        if entry.file_size > 200 * entry.compress_size + 2**26:
            raise ValueError("it declares far more than it holds")
        with self.file.open(f"{name}.npy") as f:
            return np.lib.format.read_array(f, allow_pickle=False)


@contextlib.contextmanager
def read_checkpoint(path: Path) -> Iterator[tuple[dict, Arrays]]:
    """state.npz -> (its notes, its arrays by name). Raises Damaged, also for what the block makes
    of a damaged file."""
    with readable(path), zipfile.ZipFile(path) as z:
        arrays = Arrays(z)
        text = arrays["about"]
        about = json.loads(text.tobytes()) if text.dtype == np.uint8 else {}
        if about.get("format") != FORMAT:
            raise UserError(f"{path} is of another version of this program; start the run again")
        yield about, arrays


def with_tuples(x: Any) -> Any:
    """Content of a JSON file -> the same with tuples for its lists."""
    if isinstance(x, dict):
        return {key: with_tuples(value) for key, value in x.items()}
    return tuple(map(with_tuples, x)) if isinstance(x, list) else x


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, whole or not at all. Raises ValueError for a number that is not finite."""
    with atomic_file(path) as f:
        f.write((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def save_every() -> float:
    """-> seconds between checkpoints: $PGD_SAVE_EVERY, or 20."""
    try:
        return float(os.environ.get("PGD_SAVE_EVERY", "20"))
    except ValueError as e:
        raise UserError("PGD_SAVE_EVERY should be a number of seconds") from e


def versions() -> dict[str, str]:
    """-> versions of the packages and of Python, the device, and the git commit."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    here = Path(__file__).resolve().parent
    with contextlib.suppress(OSError):
        ask = ["git", "-C", str(here), "rev-parse", "HEAD"]
        answer = subprocess.run(ask, capture_output=True, text=True)
        found["commit"] = answer.stdout.strip() or "not in git"
    return found


# --- A policy out of a folder ---


def load_policy(path: str | Path, seed: int = 0, **point: float) -> Callable:
    """A run's folder -> act: obs (..., O) -> action (..., A), both in the environment's own units.

    seed: one of the run's seeds; point: of a sweep, the values of its settings, such as guidance=1.
    Needs neither the log nor the simulator. Raises UserError for a run that is not there.
    """
    act = policy_in_jax(path, seed, **point)
    return lambda obs: np.asarray(act(np.asarray(obs, np.float32)))


def policy_in_jax(path: str | Path, seed: int = 0, **point: float) -> Callable:
    """As load_policy, but act is a compiled JAX function that other JAX functions may call."""
    import agents

    config, _ = read_config(path)
    checkpoint = Path(path) / "checkpoint" / "state.npz"
    if not checkpoint.is_file():
        raise UserError(f"{path} has no checkpoint yet")
    with read_checkpoint(checkpoint) as (about, arrays):
        wanted = point | {"seed": seed}
        runs = [i for i, x in enumerate(about["labels"]) if wanted.items() <= x.items()]
        if len(runs) != 1:
            raise UserError(
                f"{path} has {len(runs)} runs with {wanted}; its runs are {about['labels']}"
            )
        hyper = {k[6:]: v for k, v in about["labels"][runs[0]].items() if k[:6] == "hyper."}
        agent = agents.make_agent(config["agent"], **(config["hyper"] | hyper))
        mean, std, low, high = (arrays[name] for name in DATASET)
        num_act = len(low)
        num_obs = len(mean) - num_act - 2
        like = jax.eval_shape(lambda key: agent.init(key, num_obs, num_act), jax.random.key(0))
        leaves = [arrays[f".agent{name}"][runs[0]] for name, _ in named_leaves(like)]
        state = jax.tree.unflatten(jax.tree.structure(like), leaves)

    @jax.jit
    def act(obs):
        action = agent.act(state, (obs - mean[:num_obs]) / std[:num_obs])
        return low + (jax.numpy.clip(action, -1.0, 1.0) + 1.0) * 0.5 * (high - low)

    return act


# --- Results ---


class About(NamedTuple):
    """What the results of a run are of, as final.json has it."""

    env: str
    agent: str
    synthetic: str
    behaviour_score: float | None
    behaviour_return: float
    source: str
    guidance: float | None
    preset: str
    denoisers: str | None  # how many there are, and of which seeds
    hyper: dict
    rewards: str | None  # how the log's rewards were changed; None: they were not
    log_alone: dict | None = None  # of log_alone()


def summarise(
    history: list[dict], labels: list[dict], about: About, validation: dict,
    diverged: dict[int, str] | None = None,
) -> dict:  # fmt: skip
    """Results of the last round, as final.json has them; of a sweep, those of each point.

    validation: {metric: (R,)} of the models, on held-out episodes. diverged: the index of each run
    that has diverged -> what happened; those runs are in no mean.
    """
    diverged = diverged or {}
    index = {tuple(label.items()): i for i, label in enumerate(labels)}
    last = []
    for row in history[len(diverged) - len(labels) :]:
        i = index[tuple((name, row[name]) for name in labels[0])]
        last.append(row | {k: float(v[i]) for k, v in validation.items()})
    points = [{k: v for k, v in label.items() if k != "seed"} for label in labels]
    points = [dict(p) for p in dict.fromkeys(tuple(p.items()) for p in points)]
    lost = {"diverged": [labels[i] | {"what": what} for i, what in sorted(diverged.items())]}
    if points == [{}]:
        return about._asdict() | results(last, validation) | lost
    swept = []
    for point in points:
        own = [row for row in last if point.items() <= row.items()]
        swept.append(point | results(own, validation))
    whole = about._asdict() | results(last, validation) | lost
    whole |= {"mean": None, "ci95": None, "sweep": swept}
    return whole | {"guidance": None} if "guidance" in points[0] else whole


def log_alone(config: dict, source: str) -> dict | None:
    """Settings of a run, and its log -> seeds, returns, mean score and interval of the shipped run
    of the same agent on that log alone, with as many updates; None where results/ has none."""
    for path in sorted(LOG_ALONE.glob("*/final.json")):
        final = json.loads(path.read_text())
        there = read_config(path.parent)[0] if final["source"] == source else {}
        if there and all(there.get(name) == config[name] for name in OF_THE_AGENT):
            return {key: final[key] for key in ("seeds", "returns", "mean", "ci95")}
    return None


def results(rows: list[dict], validation: dict) -> dict:
    """Last rows of some runs -> returns and scores of each, their mean and interval, and means of
    the other measures."""
    scores = [row["score"] for row in rows if "score" in row]
    mean, ci95 = interval(scores)
    measures = [name for name in MEASURES if rows and name in rows[0] and name not in validation]
    measures += list(validation) if rows else []
    return {
        "seeds": [row["seed"] for row in rows],
        "returns": [row["return"] for row in rows if "return" in row],
        "scores": scores,
        "mean": mean,
        "ci95": ci95,
    } | {name: finite(np.mean([row[name] for row in rows])) for name in measures}


def finite(x) -> float | None:
    """A number, such as an R^2 that cannot be computed, -> itself, or None where JSON has none."""
    return float(x) if np.isfinite(x) else None


def interval(scores: list[float]) -> tuple[float | None, list[float] | None]:
    """Scores per seed -> (mean, 95 % interval of the mean by Student's t); no interval for one
    seed."""
    if not scores:
        return None, None
    mean = float(np.mean(scores))
    if len(scores) < 2:
        return mean, None
    from scipy.special import stdtrit  # here, since it takes a fifth of a second to import

    half = float(stdtrit(len(scores) - 1, 0.975) * np.std(scores, ddof=1) / len(scores) ** 0.5)
    return mean, [mean - half, mean + half]


MEASURES = {  # of final.json -> their names in the table
    "validation_loss": "held-out loss of the denoiser",
    "validation_error": "held-out error of the world model",
    "validation_r2": "held-out R^2 of the world model",
    "within_1_sigma": "targets within 1 sigma",
    "within_2_sigma": "targets within 2 sigma",
    "clone_log_prob": "held-out log-likelihood of the clone",
    "log_prob_synthetic": "log-likelihood of synthetic actions",
    "log_prob_real": "log-likelihood of logged actions",
    "policy_distance": "distance to policy, squared (log: 1)",  # of synthetic actions
    "effective_guidance": "effective lambda of the guide",
}
OF_SYNTHETIC = ("log_prob_synthetic", "policy_distance", "effective_guidance")


def table(final: dict) -> str:
    """final.json -> lines for a person: a line per seed, or of a sweep, per point."""
    lines = ["", f"  {final['env']}: {final['agent']} on {final['synthetic']}"]
    lines += [f"  log: {final['source']}"]
    models = "denoisers" if final["synthetic"] == "diffusion" else "ensembles"
    lines += [f"  {models}: {final['denoisers']}"] if final.get("denoisers") else []
    lines += [f"  trained on: {final['rewards']}"] if final.get("rewards") else []
    lines.append("")
    if "sweep" in final:
        lines += sweep_lines(final)
    elif final["returns"]:
        lines.append(f"  {'':<36}{'return':>10}{'score':>10}")
        scores = final["scores"] or [None] * len(final["returns"])
        for seed, ret, score in zip(final["seeds"], final["returns"], scores):
            lines.append(f"  {f'seed {seed}':<36}{ret:>10.1f}{number(score):>10}")
        mean = float(np.mean(final["returns"]))
        of = f"mean of {len(scores)} seeds" if final.get("diverged") else "mean"
        lines.append(f"  {of:<36}{mean:>10.1f}{number(final['mean']):>10}{ends(final)}")
    for label in final.get("diverged", []):
        what = label["what"]
        lines.append(
            f"  diverged: {named({k: v for k, v in label.items() if k != 'what'})}: {what}"
        )
    if alone := final.get("log_alone"):
        of = f"the log alone, mean of {len(alone['seeds'])} seeds"
        mean = float(np.mean(alone["returns"]))
        lines.append(f"  {of:<36}{mean:>10.1f}{number(alone['mean']):>10}{ends(alone)}")
    behaviour = final["behaviour_return"]
    lines.append(
        f"  {'behaviour policy of the log':<36}{behaviour:>10.1f}"
        f"{number(final['behaviour_score']):>10}"
    )
    lines.append("")
    for name, title in MEASURES.items():
        if "sweep" not in final and final.get(name) is not None:
            if final["synthetic"] != "none" or name not in OF_SYNTHETIC:
                lines.append(f"  {title:<36}{final[name]:>10.4g}")
    total = sum(final["wall_seconds"].values())
    parts = ", ".join(f"{stage} {s:.0f}" for stage, s in final["wall_seconds"].items())
    lines.append(f"  {'wall time':<36}{total:>8.0f} s ({parts})")
    return "\n".join(map(printable, lines))


def sweep_lines(final: dict) -> list[str]:
    """The points of a sweep, a line each."""
    points = final["sweep"]
    fields = swept_fields(points)
    names = ["return", "score"] if any(p["returns"] for p in points) else []
    names += [] if final["synthetic"] == "none" else ["log_prob_synthetic"]
    names += [
        name for name in ("validation_loss", "validation_error") if any(name in p for p in points)
    ]
    titles = [name.replace("_", " ") for name in names]
    lines = ["  " + "".join(f"{f:<22}" for f in fields) + "".join(f"{n:>20}" for n in titles)]
    for p in points:
        line = "  " + "".join(f"{p[f]:<22g}" for f in fields)
        shown = {"score": number(p["mean"])}
        shown["return"] = number(np.mean(p["returns"]) if p["returns"] else None)
        for name in names:
            own = "-" if p.get(name) is None else f"{p[name]:.4g}"
            line += f"{shown.get(name, own):>20}"
        lines.append(line + ends(p))
    return lines


def swept_fields(points: list[dict]) -> list[str]:
    """Points of final.json's sweep -> the swept settings."""
    return list(points[0])[: list(points[0]).index("seeds")]


def number(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}"


def ends(final: dict) -> str:
    """The ends of the 95 % interval, where there is one."""
    if final["ci95"] is None:
        return ""
    return f"   95 % interval {final['ci95'][0]:.1f} to {final['ci95'][1]:.1f}"
