"""A run's folder: config.json, checkpoint/state.npz, metrics.csv, final.json and the figures.

Every file is written beside its place and renamed, so that a kill leaves the last good one.
"""

import contextlib
import csv
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.special import stdtrit

from host.errors import UserError
from host.files import atomic_file

PACKAGES = ("jax", "jaxlib", "optax", "chex", "gymnax", "gymnasium", "mujoco", "numpy")
DATASET = ("mean", "std", "action_low", "action_high")  # fields that a policy needs


class RunFolder:
    """A run's folder, new or of an earlier start."""

    def __init__(self, path: Path, labels: list[dict]):
        """labels: the swept settings and the seed of each run."""
        self.path, self.labels = path, labels
        self.history: list[dict] = []  # a row per round and run
        self.seconds: dict[str, float] = {}  # wall time per stage
        self.notes: dict[str, np.ndarray] = {}  # arrays that go into every checkpoint
        self._saved, self._save_cost = time.monotonic(), 0.0
        self._save_every = save_every()

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
        """Keep the state, after `fitted` chunks of the fit.

        Without force: at most every $PGD_SAVE_EVERY seconds and a twentieth of the time.
        """
        start = time.monotonic()
        if not force and start - self._saved < max(self._save_every, 20.0 * self._save_cost):
            return
        leaves = {name: np.asarray(x) for name, x in named_leaves(state)}
        about = {"labels": self.labels, "history": self.history, "seconds": self.seconds}
        about |= {"fitted": fitted}
        with atomic_file(self.path / "checkpoint" / "state.npz") as f:
            np.savez(f, about=np.array(json.dumps(about)), **self.notes, **leaves)
        self._saved = time.monotonic()
        self._save_cost = self._saved - start

    def restore(self, state: Any) -> tuple[int, Any]:
        """A new state -> (chunks of the fit that are done, the saved state), or (0, the new state)
        where nothing was saved."""
        path = self.path / "checkpoint" / "state.npz"
        if not path.is_file():
            return 0, state
        with read_checkpoint(path) as (about, arrays):
            names, likes = zip(*named_leaves(state))
            missing = [name for name in names if name not in arrays]
            leaves = [arrays[name] for name in names if name in arrays]
            self.history, self.seconds = about["history"], about["seconds"]
            fitted = int(about["fitted"])
        wrong = missing or [
            name
            for name, x, like in zip(names, leaves, likes)
            if (x.shape, x.dtype) != (like.shape, like.dtype)
        ]
        if wrong:
            raise UserError(
                f"{path} is of another version of this program ({wrong[0]} differs); start the run "
                "again"
            )
        leaves = [jax.device_put(x, like.sharding) for x, like in zip(leaves, likes)]
        return fitted, jax.tree.unflatten(jax.tree.structure(state), leaves)

    def remove_if_empty(self) -> None:
        """Remove the folder where a run has failed before it left anything but config.json."""
        if [x.name for x in self.path.iterdir()] == ["config.json"]:
            (self.path / "config.json").unlink()
            self.path.rmdir()

    # --- Metrics ---

    def log(self, index: int, updates: int, metrics: dict, score: Callable) -> None:
        """Add a row per run to metrics.csv.

        index: the round; updates: the agent's updates so far; metrics: arrays (R,); score: returns
        -> normalised scores, or None. Raises UserError for a metric that is not finite.
        """
        if "return" in metrics and score(0.0) is not None:
            metrics = metrics | {"score": score(metrics["return"])}
        for name, values in metrics.items():
            if not np.isfinite(values).all():
                label = self.labels[int(np.argmin(np.isfinite(values)))]
                which = ", ".join(f"{key} {value}" for key, value in label.items())
                raise UserError(
                    f"{name} is not finite in round {index} of {which}: the agent or its denoiser "
                    "has diverged; lower --hyper.lr, --fit-lr or --guidance"
                )
        columns = {k: np.float64(v).ravel().round(6).tolist() for k, v in metrics.items()}
        for i, label in enumerate(self.labels):
            row = {"round": index, **label, "updates": updates}
            self.history.append(row | {k: column[i] for k, column in columns.items()})
        self.write_metrics()

    def write_metrics(self) -> None:
        """Write metrics.csv from the history."""
        names = list(dict.fromkeys(name for row in self.history for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        with atomic_file(self.path / "metrics.csv") as f:
            f.write(text.getvalue().encode())


def named_leaves(state: Any) -> list[tuple[str, Any]]:
    """A pytree -> (name, array) of each leaf, such as (".agent.actor[0][1]", ...)."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path), x) for path, x in leaves]


# --- Make a folder, and open one ---


def create(path: Path, config: dict, task, labels: list[dict]) -> RunFolder:
    """Make a run's folder and its config.json. Raises UserError where the folder holds a run.

    config: every setting; task: a data.Task.
    """
    refuse_existing(path)
    log = {"name": task.name, "source": task.source, "fingerprint": task.fingerprint}
    write_json(path / "config.json", {"config": config, "data": log, "versions": versions()})
    return RunFolder(path, labels)


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
    if (Path(path) / "config.json").exists() or (Path(path) / "checkpoint").exists():
        raise UserError(f"{path} already holds a run; --resume {path}, or name another --out")


def read_config(path: str | Path) -> tuple[dict, str]:
    """A run's folder -> (its settings, the fingerprint of its log). Raises UserError."""
    path = Path(path) / "config.json"
    if not path.is_file():
        raise UserError(f"there is no run in {path.parent}: it has no config.json")
    with readable(path):
        about = json.loads(path.read_text())
        return with_tuples(about["config"]), about["data"]["fingerprint"]


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into a UserError."""
    damage = ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error
    try:
        yield
    except damage as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}); start the run again") from e


@contextlib.contextmanager
def read_checkpoint(path: Path) -> Iterator[tuple[dict, dict]]:
    """state.npz -> (its notes, its arrays by name)."""
    with readable(path), np.load(path, allow_pickle=False) as z:
        yield json.loads(str(z["about"])), {name: z[name] for name in z.files if name != "about"}


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


def summarise(history: list[dict], labels: list[dict], about: About, validation: dict) -> dict:
    """Results of the last round, as final.json has them; of a sweep, those of each point.

    validation: {metric: (R,)} of the models, on held-out episodes.
    """
    last = [
        row | {k: float(v[i]) for k, v in validation.items()}
        for i, row in enumerate(history[-len(labels) :])
    ]
    points = [{k: v for k, v in label.items() if k != "seed"} for label in labels]
    points = [dict(p) for p in dict.fromkeys(tuple(p.items()) for p in points)]
    if points == [{}]:
        return about._asdict() | results(last, validation)
    swept = []
    for point in points:
        own = [row for row in last if point.items() <= row.items()]
        swept.append(point | results(own, validation))
    whole = about._asdict() | results(last, validation)
    whole |= {"mean": None, "ci95": None, "sweep": swept}
    return whole | {"guidance": None} if "guidance" in points[0] else whole


def results(rows: list[dict], validation: dict) -> dict:
    """Last rows of some runs -> returns and scores of each, their mean and interval, and means of
    the other measures."""
    scores = [row["score"] for row in rows if "score" in row]
    mean, ci95 = interval(scores)
    measures = [name for name in MEASURES if name in rows[0] and name not in validation]
    measures += list(validation)
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
    "policy_distance": "distance to the policy (log: 1)",  # of synthetic actions, squared
    "effective_guidance": "effective guidance (lambda / std^2)",
}
OF_SYNTHETIC = ("log_prob_synthetic", "policy_distance", "effective_guidance")


def table(final: dict) -> str:
    """final.json -> lines for a person: a line per seed, or of a sweep, per point."""
    lines = ["", f"  {final['env']}: {final['agent']} on {final['synthetic']}"]
    lines += [f"  log: {final['source']}"]
    models = "denoisers" if final["synthetic"] == "diffusion" else "ensembles"
    lines += [f"  {models}: {final['denoisers']}"] if final.get("denoisers") else []
    lines.append("")
    if "sweep" in final:
        lines += sweep_lines(final)
    elif final["returns"]:
        lines.append(f"  {'':<36}{'return':>10}{'score':>10}")
        scores = final["scores"] or [None] * len(final["returns"])
        for seed, ret, score in zip(final["seeds"], final["returns"], scores):
            lines.append(f"  {f'seed {seed}':<36}{ret:>10.1f}{number(score):>10}")
        mean = float(np.mean(final["returns"]))
        lines.append(f"  {'mean':<36}{mean:>10.1f}{number(final['mean']):>10}{ends(final)}")
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
    return "\n".join(lines)


def sweep_lines(final: dict) -> list[str]:
    """The points of a sweep, a line each."""
    points = final["sweep"]
    fields = swept_fields(points)
    names = ["return", "score"] if points[0]["returns"] else []
    names += [] if final["synthetic"] == "none" else ["log_prob_synthetic"]
    names += [name for name in ("validation_loss", "validation_error") if name in points[0]]
    titles = [name.replace("_", " ") for name in names]
    lines = ["  " + "".join(f"{f:<22}" for f in fields) + "".join(f"{n:>20}" for n in titles)]
    for p in points:
        line = "  " + "".join(f"{p[f]:<22g}" for f in fields)
        shown = {"return": number(np.mean(p["returns"] or 0.0)), "score": number(p["mean"])}
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
