"""A run's folder: config.json, checkpoint/, metrics.csv, curve.png, final.json, and the printed
table.

Every file is written beside its place and renamed, so that a kill leaves the last good one.
"""

import contextlib
import csv
import dataclasses
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.special import stdtrit

PACKAGES = ("jax", "jaxlib", "optax", "chex", "gymnax", "gymnasium", "mujoco", "numpy")


def save_every() -> float:
    """Seconds between checkpoints: $PGD_SAVE_EVERY, or 20."""
    try:
        return float(os.environ.get("PGD_SAVE_EVERY", "20"))
    except ValueError as e:
        raise RunError("PGD_SAVE_EVERY should be a number of seconds") from e


class RunError(Exception):
    """A run folder that cannot be used; its message is one line that says why."""


class Run:
    """One run folder, new or resumed."""

    def __init__(self, folder: Path, config):
        self.folder = folder
        self.seeds = [config.seed + i for i in range(config.num_seeds)]
        self.points: list[dict[str, float]] = [{}]  # of the sweep
        self.history: list[dict] = []  # a row per round, point and seed
        self.seconds: dict[str, float] = {}  # wall time per stage
        self._saved, self._save_every = time.monotonic(), save_every()
        self._save_cost = 0.0

    @classmethod
    def create(cls, config, task) -> "Run":
        """Make the folder and its config.json; RunError where the folder already holds a run."""
        folder = Path(config.out or default_folder(config, task.name))
        refuse_existing(folder)
        log = {"name": task.name, "source": task.source, "fingerprint": task.fingerprint}
        about = {"config": dataclasses.asdict(config), "data": log, "versions": versions()}
        write_json(folder / "config.json", about)
        return cls(folder, config)

    @classmethod
    def resume(cls, folder: str, make_config: Callable) -> tuple["Run", Any, str]:
        """-> (run, its config, its log's fingerprint)."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise RunError(f"there is no run in {folder}: it has no config.json")
        with readable(path):
            about = json.loads(path.read_text())
            fields = with_tuples(about["config"])
            config, fingerprint = make_config(**fields), about["data"]["fingerprint"]
        if set(fields) != {f.name for f in dataclasses.fields(config)}:  # others have changed too
            raise RunError(f"{path} is of another version of this program; start the run again")
        return cls(path.parent, config), config, fingerprint

    def clear(self) -> None:
        """Remove what a kill left half written; only for the one process that will write here."""
        for part in self.folder.rglob(".*.part"):
            part.unlink()

    @contextlib.contextmanager
    def timed(self, stage: str):
        """Add the block's wall time to this stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            elapsed = time.monotonic() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed

    # --- Checkpoint: one npz of arrays, no pickle ---

    def save(self, state: Any, force: bool = False) -> None:
        """Keep the state, at most every so many seconds and a twentieth of the time, unless
        forced."""
        start = time.monotonic()
        if not force and start - self._saved < max(self._save_every, 20.0 * self._save_cost):
            return
        leaves = {f"leaf{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
        notes = json.dumps({"history": self.history, "seconds": self.seconds})
        with atomic_file(self.folder / "checkpoint" / "state.npz") as f:
            np.savez(f, notes=np.array(notes), **leaves)
        self._saved = time.monotonic()
        self._save_cost = self._saved - start

    @property
    def saved(self) -> bool:
        """Whether there is a checkpoint."""
        return (self.folder / "checkpoint" / "state.npz").is_file()

    def restore(self, like: Any) -> Any:
        """-> the saved state in the shape of `like`, or `like` itself where nothing was saved
        yet."""
        path = self.folder / "checkpoint" / "state.npz"
        if not self.saved:
            return like
        shapes, treedef = jax.tree.flatten(like)
        with readable(path), np.load(path, allow_pickle=False) as z:
            leaves = [z[f"leaf{i}"] for i in range(len(z.files) - 1)]
            notes = json.loads(str(z["notes"]))
            self.history, self.seconds = notes["history"], notes["seconds"]
        if [(x.shape, x.dtype) for x in leaves] != [(x.shape, x.dtype) for x in shapes]:
            raise RunError(f"{path} is of another version of this program; start the run again")
        put = lambda x, like: jax.device_put(x, like.sharding) if hasattr(like, "sharding") else x
        return jax.tree.unflatten(treedef, [put(x, like) for x, like in zip(leaves, shapes)])

    # --- Results ---

    def log(self, round_index: int, updates: int, metrics: dict, score: Callable) -> str:
        """Add a row per run to metrics.csv; metrics holds arrays (points, seeds) -> a summary for
        the bar."""
        if "return" in metrics and score(0.0) is not None:
            metrics = metrics | {"score": score(metrics["return"])}
        for name, values in metrics.items():
            if not np.isfinite(values).all():
                run = self.runs()[int(np.argmin(np.isfinite(values)))]
                which = ", ".join(f"{key} {value}" for key, value in run.items())
                raise RunError(
                    f"{name} is not finite in round {round_index} of {which}: the agent has "
                    "diverged, or its denoiser; lower --hyper.lr, --fit-lr or --guidance"
                )
        columns = {k: np.float64(v).ravel().round(6).tolist() for k, v in metrics.items()}
        for i, run in enumerate(self.runs()):
            row = {"round": round_index, **run, "updates": updates}
            self.history.append(row | {k: column[i] for k, column in columns.items()})
        self.write_metrics()
        what = "return" if "return" in columns else "log_prob_real"
        return f"{what.replace('_', ' ')} {np.mean(columns[what]):.1f}"

    def runs(self) -> list[dict]:
        """-> the swept fields and the seed of every run, points first."""
        return [{**point, "seed": seed} for point in self.points for seed in self.seeds]

    def write_metrics(self) -> None:
        """metrics.csv from the history."""
        names = list(dict.fromkeys(name for row in self.history for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        with atomic_file(self.folder / "metrics.csv") as f:
            f.write(text.getvalue().encode())

    def summary(self, config, task, held_out: dict) -> dict:
        """The last round's results as final.json has them; of a sweep, each point's too, and no
        mean over all.

        held_out: metrics of the generators, one number each, or a list with one per point.
        """
        last = self.history[-len(self.points) * len(self.seeds) :]
        behaviour_score = (
            None if task.reference is None else float(task.score(task.behaviour_return))
        )
        guidance = config.guidance if config.synthetic == "diffusion" else None
        about = {
            "env": task.name,
            "agent": config.agent,
            "synthetic": config.synthetic,
            "behaviour_score": behaviour_score,
            "behaviour_return": task.behaviour_return,
            "source": task.source,
            "guidance": None if "guidance" in self.points[0] else guidance,
            "preset": config.preset,
            "hyper": config.hyper,
        }
        of_all = {k: v for k, v in held_out.items() if not isinstance(v, list)}
        about |= _results(last) | of_all
        if self.points == [{}]:
            return about
        points = []
        for i, point in enumerate(self.points):
            own = _results([row for row in last if point.items() <= row.items()])
            own |= {k: v[i] for k, v in held_out.items() if isinstance(v, list)}
            points.append(point | own)
        return about | {"mean": None, "ci95": None, "sweep": points}

    def finish(self, final: dict, quiet: bool = False) -> dict:
        """Write final.json and the figures, and print the table -> all of final.json."""
        final = final | {"wall_seconds": {k: round(v, 1) for k, v in self.seconds.items()}}
        figures = ["curve.png"]
        draw_curve(self.folder / "curve.png", self.history, self.points, final)
        if "sweep" in final:
            figures.append("sweep.png")
            draw_sweep(self.folder / "sweep.png", list(self.points[0]), final)
        write_json(self.folder / "final.json", final)
        if not quiet:
            print(table(final))
            names = ", ".join(["final.json", "metrics.csv", *figures, "checkpoint/"])
            print(f"\nsaved: {self.folder}/ ({names})")
        return final

    def finish_with_others(self, config, task, hosts: list[dict], host: int) -> dict:
        """This host's own results into its folder; host 0 puts those of all beside the folders.

        hosts: history, seconds and held_out of each, in their order.
        """
        final = self.finish(self.summary(config, task, hosts[host]["held_out"]), quiet=True)
        if host != 0:
            print(f"saved: {self.folder}/; host 0 has the table of all")
            return final
        whole = Run(self.folder.parent, config)
        whole.points = self.points
        rows = [row for each in hosts for row in each["history"]]
        whole.seeds = sorted({row["seed"] for row in rows})
        order = {tuple(run.items()): i for i, run in enumerate(whole.runs())}
        place = lambda row: order[tuple((k, row[k]) for k in whole.runs()[0])]
        whole.history = sorted(rows, key=lambda row: (row["round"], place(row)))
        for each in hosts:
            for stage, seconds in each["seconds"].items():
                whole.seconds[stage] = max(seconds, whole.seconds.get(stage, 0.0))
        whole.write_metrics()
        names, every = hosts[0]["held_out"], [each["held_out"] for each in hosts]
        held_out = {k: np.mean([each[k] for each in every], axis=0).tolist() for k in names}
        return whole.finish(whole.summary(config, task, held_out))


def _results(rows: list[dict]) -> dict:
    """Last rows of some runs -> returns and scores of each, mean and interval, likelihoods."""
    scores = [row["score"] for row in rows if "score" in row]
    mean, ci95 = summarise(scores)
    logs = [name for name in rows[0] if name.startswith("log_prob")]
    return {
        "seeds": [row["seed"] for row in rows],
        "returns": [row["return"] for row in rows if "return" in row],
        "scores": scores,
        "mean": mean,
        "ci95": ci95,
    } | {name: float(np.mean([row[name] for row in rows])) for name in logs}


def summarise(scores: list[float]) -> tuple[float | None, list[float] | None]:
    """Scores per seed -> (mean, 95 % interval of the mean by Student's t); no interval for one
    seed."""
    if not scores:
        return None, None
    mean = float(np.mean(scores))
    if len(scores) < 2:
        return mean, None
    half = float(stdtrit(len(scores) - 1, 0.975) * np.std(scores, ddof=1) / len(scores) ** 0.5)
    return mean, [mean - half, mean + half]


def table(final: dict) -> str:
    """final.json as lines for a person: of a sweep, a line per point; else, one per seed."""
    lines = ["", f"  {final['env']}: {final['agent']} on {final['synthetic']}"]
    lines += [f"  log: {final['source']}", ""]
    if "sweep" in final:
        lines += _sweep_lines(final["sweep"])
    elif final["returns"]:
        lines.append(f"  {'':<14}{'return':>10}{'score':>10}")
        scores = final["scores"] or [None] * len(final["returns"])
        for seed, ret, score in zip(final["seeds"], final["returns"], scores):
            lines.append(f"  seed {seed:<9}{ret:>10.1f}{_number(score):>10}")
        mean = float(np.mean(final["returns"]))
        lines.append(f"  {'mean':<14}{mean:>10.1f}{_number(final['mean']):>10}{_interval(final)}")
    behaviour = final["behaviour_return"]
    lines.append(f"  {'behaviour':<14}{behaviour:>10.1f}{_number(final['behaviour_score']):>10}")
    lines.append("")
    held_out = ("validation_loss", "validation_error", "validation_r2", "within_1_sigma")
    likelihoods = () if "sweep" in final else ("log_prob_synthetic", "log_prob_real")
    for name in (*held_out, "within_2_sigma", "clone_log_prob", *likelihoods):
        if final.get(name) is not None:
            lines.append(f"  {name.replace('_', ' '):<20}{final[name]:>10.4g}")
    total = sum(final["wall_seconds"].values())
    parts = ", ".join(f"{stage} {s:.0f}" for stage, s in final["wall_seconds"].items())
    lines.append(f"  {'wall time':<20}{total:>8.0f} s ({parts})")
    return "\n".join(lines)


def _sweep_lines(points: list[dict]) -> list[str]:
    fields = _fields(points)
    names = [*(["return", "score"] if points[0]["returns"] else []), "log prob synthetic"]
    names += [
        k.replace("_", " ") for k in points[0] if k in ("validation_loss", "validation_error")
    ]
    lines = ["  " + "".join(f"{f:<16}" for f in fields) + "".join(f"{n:>10}  " for n in names)]
    for p in points:
        line = "  " + "".join(f"{p[f]:<16g}" for f in fields)
        if p["returns"]:
            line += f"{np.mean(p['returns']):>10.1f}  {_number(p['mean']):>10}  "
        line += f"{p['log_prob_synthetic']:>18.3f}"
        for name in ("validation_loss", "validation_error"):
            line += f"  {p[name]:>{len(name)}.4g}" if name in p else ""
        lines.append(line + _interval(p))
    return lines


def _fields(points: list[dict]) -> list[str]:
    """-> the swept fields of final.json's points."""
    return list(points[0])[: list(points[0]).index("seeds")]


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.1f}"


def _interval(final: dict) -> str:
    if final["ci95"] is None:
        return ""
    return f"   95 % interval {final['ci95'][0]:.1f} to {final['ci95'][1]:.1f}"


def draw_curve(path: Path, history: list[dict], points: list[dict], final: dict) -> None:
    """Return (or, without a simulator, log-likelihood of the log's actions) against updates, a
    curve per seed; of a sweep, one per point, the mean over its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    what = "return" if final["returns"] else "log_prob_real"
    if points == [{}]:
        groups = {f"seed {seed}": {"seed": seed} for seed in final["seeds"]}
    else:
        groups = {", ".join(f"{k} {v:g}" for k, v in p.items()): p for p in points}
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (label, group) in enumerate(groups.items()):
        rows = [r for r in history if group.items() <= r.items() and r.get(what) is not None]
        updates = sorted({r["updates"] for r in rows})
        means = [np.mean([r[what] for r in rows if r["updates"] == u]) for u in updates]
        color = None if points == [{}] else plt.cm.viridis(i / len(groups))
        axes.plot(updates, means, lw=1, label=label, color=color)
    if final["returns"]:
        axes.axhline(final["behaviour_return"], color="black", ls="--", lw=1, label="behaviour")
    axes.set(xlabel="agent updates", ylabel=what.replace("_", " "), title=final["env"])
    if len(groups) <= 8:
        axes.legend(frameon=False)
    with atomic_file(path) as f:
        figure.savefig(f, dpi=120, format="png")
    plt.close(figure)


def draw_sweep(path: Path, fields: list[str], final: dict) -> None:
    """Score, or return, and likelihood of the synthetic actions against the first swept field, a
    curve per value of the others, with 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first, *others = fields
    measures = {"log_prob_synthetic": "log-likelihood of synthetic actions"}
    if final["returns"]:
        measures = {("scores" if final["scores"] else "returns"): "score"} | measures
    figure, axes = plt.subplots(
        1, len(measures), figsize=(5 * len(measures), 4), layout="constrained", squeeze=False
    )
    groups = list(dict.fromkeys(tuple(p[f] for f in others) for p in final["sweep"]))
    for i, group in enumerate(groups):
        rows = [p for p in final["sweep"] if tuple(p[f] for f in others) == group]
        rows = sorted(rows, key=lambda p: p[first])
        label = ", ".join(f"{f} {v:g}" for f, v in zip(others, group))
        for ax, what in zip(axes[0], measures):
            found = [summarise(np.atleast_1d(p[what]).tolist()) for p in rows]
            means = [mean for mean, _ in found]
            ends = np.array([ci or (mean, mean) for mean, ci in found]).T
            error = np.abs(ends - means)
            color = plt.cm.viridis(i / len(groups))
            xs = [p[first] for p in rows]
            ax.errorbar(xs, means, error, marker="o", ms=3, capsize=2, label=label, color=color)
    for ax, name in zip(axes[0], measures.values()):
        ax.set(xlabel=first.replace("_", " "), ylabel=name)
    if final["scores"] and final["behaviour_score"] is not None:
        axes[0, 0].axhline(final["behaviour_score"], color="black", ls="--", lw=1)
    if others:
        axes[0, 0].legend(frameon=False, fontsize=7)
    figure.suptitle(f"{final['env']}, {len(set(final['seeds']))} seeds")
    with atomic_file(path) as f:
        figure.savefig(f, dpi=120, format="png")
    plt.close(figure)


# --- Helpers ---


def default_folder(config, name: str | None = None) -> Path:
    """-> runs/<env>-<agent>-<synthetic>-<time>."""
    name = name or config.env or Path(config.dataset_path or "default").stem
    name = re.sub(r"[^\w.-]+", "-", name)
    title = f"{name}-{config.agent}-{config.synthetic}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path("runs") / title


def refuse_existing(folder: str | Path) -> None:
    """RunError where the folder already holds a run, or a part of one."""
    if (Path(folder) / "config.json").exists() or (Path(folder) / "checkpoint").exists():
        raise RunError(f"{folder} already holds a run; --resume {folder}, or name another --out")


@contextlib.contextmanager
def readable(path: Path):
    """Turn whatever a damaged file raises into one line."""
    try:
        yield
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise RunError(f"{path} is damaged ({type(e).__name__}); start the run again") from e


@contextlib.contextmanager
def atomic_file(path: Path):
    """A binary file that takes its place when the block ends well, and vanishes when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def with_tuples(x: Any) -> Any:
    """What JSON gave back, its lists as tuples again."""
    if isinstance(x, dict):
        return {key: with_tuples(value) for key, value in x.items()}
    return tuple(map(with_tuples, x)) if isinstance(x, list) else x


def write_json(path: Path, content: dict) -> None:
    """Written whole or not at all; ValueError for a number that JSON has not."""
    with atomic_file(path) as f:
        f.write((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def versions() -> dict[str, str]:
    """Packages, Python, device and git commit of this run."""
    found = {"python": platform.python_version(), "device": jax.devices()[0].device_kind}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    here = Path(__file__).resolve().parent
    ask = ["git", "-C", str(here), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        answer = subprocess.run(ask, capture_output=True, text=True)
        found["commit"] = answer.stdout.strip() or "not in git"
    return found
