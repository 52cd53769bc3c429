"""A run's metrics in TensorBoard or Weights & Biases, beside metrics.csv.

tracker = make_tracker("tensorboard", folder, labels, settings)
tracker.fit(done, {"loss": ...})         # after a chunk of the fit, an array (R,) of each metric
tracker.rows(rows)                       # of metrics.csv
tracker.close()

No run depends on them: a tracker that fails says so once and is silent from then on.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from host.errors import UserError
from host.files import offline, require, say

PROJECT = "policy-guided-diffusion"  # unless WANDB_PROJECT names another
PATIENCE = 30.0  # seconds that a start may take


class Tracker:
    """One curve of each metric for each run of a folder."""

    def __init__(self, name: str, open_all: Callable[[], list], labels: list[dict]):
        """open_all: -> a (log, close) per label, with log(step, metrics)."""
        self.name, self.labels, self.outlets = name, labels, []
        with self.guarded():
            self.outlets = open_all()

    def fit(self, done: int, metrics: dict[str, np.ndarray]) -> None:
        """Metrics (R,) after `done` chunks of the fit."""
        with self.guarded():
            for i, (log, _) in enumerate(self.outlets):
                log(done, {f"fit/{name}": float(x[i]) for name, x in metrics.items()})

    def rows(self, rows: Sequence[dict]) -> None:
        """Rows of metrics.csv, which hold a run's label, its updates and its metrics."""
        of_run = [tuple(label.items()) for label in self.labels]
        named = {"updates", "round", *self.labels[0]}
        with self.guarded():
            for row in rows if self.outlets else ():
                log, _ = self.outlets[of_run.index(tuple((k, row[k]) for k in self.labels[0]))]
                log(row["updates"], {f"round/{k}": x for k, x in row.items() if k not in named})

    def close(self) -> None:
        """Write what is left."""
        with self.guarded():
            for _, close in self.outlets:
                close()
        self.outlets = []

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """The block, or a line and no more tracking where it fails."""
        try:
            yield
        except Exception as e:  # of a package, a disk or a server that the run does not need
            self.outlets = []
            said = " ".join(str(e).split())[:150] or type(e).__name__
            say(f"note: {self.name} failed ({said}); the run goes on without it")


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(kind: str) -> None:
    """Raise UserError where the package is not installed."""
    if kind in PACKAGES:
        require(PACKAGES[kind], PACKAGES[kind])


def make_tracker(kind: str, folder: Path, labels: list[dict], settings: dict) -> Tracker:
    """kind: none, tensorboard or wandb; labels: of the runs; settings: as config.json has them.
    Raises UserError where the package is not installed, or its place in the folder is a link."""
    if kind == "none":
        return Tracker(kind, list, labels)
    package = require(PACKAGES[kind], PACKAGES[kind])
    if (folder / kind).is_symlink():
        raise UserError(f"{folder}/{kind} is a link; a run writes nowhere outside its folder")
    if kind == "tensorboard":
        return Tracker(kind, lambda: [tensorboard(package, folder, x) for x in labels], labels)
    open_all = lambda: [wandb(package, folder, label, settings) for label in labels]
    return Tracker(kind, open_all, labels)


def tensorboard(package, folder: Path, label: dict) -> tuple[Callable, Callable]:
    """-> (log, close) of event files in FOLDER/tensorboard/LABEL."""
    writer = package.SummaryWriter(str(folder / "tensorboard" / short(label)))

    def log(step: int, metrics: dict) -> None:
        for name, x in metrics.items():
            writer.add_scalar(name, x, step)
        writer.flush()

    return log, writer.close


def wandb(package, folder: Path, label: dict, settings: dict) -> tuple[Callable, Callable]:
    """-> (log, close) of a run of Weights & Biases, in a group of the folder's name. A folder that
    is resumed goes on with its run."""
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it takes our agents.py for a chatbot's
    about = (folder / "config.json").stat()
    name = f"{folder.resolve()} {about.st_mtime_ns} {short(label)}"
    run = package.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        group=folder.resolve().name,
        name=f"{folder.resolve().name} {short(label)}",
        id=hashlib.sha256(name.encode()).hexdigest()[:16],
        resume="allow",
        reinit="create_new",
        config=settings | label,
        dir=str(folder),
        mode="offline" if offline() else None,
        settings=package.Settings(silent=True, console="off", init_timeout=PATIENCE),
    )
    run.define_metric("fit/*", step_metric="fit/chunk")
    run.define_metric("round/*", step_metric="updates")

    def log(step: int, metrics: dict) -> None:
        fit = next(iter(metrics)).startswith("fit/")
        run.log(metrics | {"fit/chunk" if fit else "updates": step})

    return log, run.finish


def short(label: dict) -> str:
    """A run's label -> a name such as seed0 or guidance4-seed0."""
    return "-".join(f"{name}{value:g}" for name, value in label.items())
