"""Metrics in TensorBoard and Weights & Biases, which no run depends on."""

import builtins
import json
import struct
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import toy_log

from host import cli, flags, track
from host.errors import UserError

LABELS = [{"seed": 0}, {"seed": 1}]
ROWS = [
    {"round": 0, "seed": 1, "updates": 50, "return": -3.0},
    {"round": 0, "seed": 0, "updates": 50, "return": -5.0},
]


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "toy.npz"
    np.savez(path, **toy_log())
    return path


def parsed(path, **more):
    """Flags of a run of a few seconds on the file `path`, or of --resume."""
    words = [x for name, value in more.items() for x in (f"--{name}", str(value))]
    small = "--preset smoke --updates 5 --fit-steps 20 --fit-chunk 10 --trajectories 16".split()
    small += "--sample-batch 16 --horizon 8 --batch-size 32".split()
    return flags.parse([*small, "--dataset-path", str(path), *words] if path else words)


def events(path):
    """A TensorBoard event file -> [(step, name, value)]."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event, data = proto.Event.FromString(data[12 : 12 + length]), data[16 + length :]
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def test_each_run_has_its_own_curves_by_chunk_and_by_update(tmp_path):
    pytest.importorskip("tensorboardX")
    tracker = track.make_tracker("tensorboard", tmp_path, LABELS, {})
    tracker.fit(1, {"loss": np.array([0.5, 0.25])})
    tracker.rows(ROWS)
    tracker.close()
    found = {p.parent.name: events(p) for p in tmp_path.glob("tensorboard/*/events*")}
    wanted = [(1, "fit/loss", 0.5), (50, "round/return", -5.0)]
    assert found["seed0"] == wanted
    assert found["seed1"][0] == (1, "fit/loss", 0.25)
    assert found["seed1"][1] == (50, "round/return", -3.0)


def test_weights_and_biases_keeps_the_metrics_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("PGD_OFFLINE", "1")
    (tmp_path / "config.json").write_text("{}")
    tracker = track.make_tracker("wandb", tmp_path, LABELS, {"guidance": 64.0})
    tracker.fit(1, {"loss": np.array([0.5, 0.25])})
    returns = [-3271.5, -5813.5]  # which no name and no time in the files has by chance
    tracker.rows([row | {"return": value} for row, value in zip(ROWS, returns)])
    tracker.close()
    files, until = list(tmp_path.glob("wandb/offline-run-*/*.wandb")), time.monotonic() + 60.0
    assert len(files) == 2
    has = lambda: [[str(value).encode() in f.read_bytes() for value in returns] for f in files]
    while time.monotonic() < until and not all(map(any, has())):
        time.sleep(0.1)  # the package's own process writes them
    assert all(b"round/return" in f.read_bytes() and b"fit/loss" in f.read_bytes() for f in files)
    assert sorted(has()) == [[False, True], [True, False]]


class Wandb:
    """Weights & Biases as far as a tracker calls it."""

    Settings = SimpleNamespace

    def __init__(self):
        self.begun, self.logged = [], []

    def init(self, **how):
        self.begun.append(how)
        log = lambda row, name=how["name"]: self.logged.append((name, row))
        return SimpleNamespace(log=log, finish=list, define_metric=lambda *args, **kw: None)


def test_a_resumed_folder_goes_on_with_its_curves_and_another_one_does_not(tmp_path, monkeypatch):
    package = Wandb()
    monkeypatch.setattr(track, "require", lambda *names: package)
    monkeypatch.delenv("PGD_OFFLINE", raising=False)
    for name in ("one", "one", "two"):
        (tmp_path / name).mkdir(exist_ok=True)
        if not (tmp_path / name / "config.json").exists():
            (tmp_path / name / "config.json").write_text("{}")
        track.make_tracker("wandb", tmp_path / name, LABELS, {"guidance": 64.0}).rows(ROWS)
    ids = [how["id"] for how in package.begun]
    assert ids[:2] == ids[2:4] and len(set(ids)) == 4
    assert [how["group"] for how in package.begun] == ["one"] * 4 + ["two"] * 2
    assert package.begun[0]["config"] == {"guidance": 64.0, "seed": 0}
    assert package.begun[0]["mode"] is None
    row = {"updates": 50, "round/return": -3.0}
    assert package.logged[0] == ("one seed1", row)


@pytest.mark.parametrize("at", ["open", "log", "close"])
def test_a_tracker_that_fails_says_so_once_and_is_silent(at, capsys):
    calls = []

    def fail(*args):
        calls.append(args)
        raise ConnectionError("no\nserver")

    good = lambda *args: calls.append(args)
    pair = (fail if at == "log" else good, fail if at == "close" else good)
    tracker = track.Tracker("wandb", fail if at == "open" else lambda: [pair] * 2, LABELS)
    for _ in range(3):
        tracker.fit(1, {"loss": np.ones(2)})
        tracker.rows(ROWS)
    tracker.close()
    said = capsys.readouterr().err
    assert said == "note: wandb failed (no server); the run goes on without it\n"
    assert len(calls) == {"open": 1, "log": 1, "close": 3 * 4 + 1}[at]


def test_a_run_whose_tracker_fails_ends_as_one_without(toy_file, tmp_path, monkeypatch, capsys):
    def broken():
        raise OSError("disk full")

    monkeypatch.setattr(track, "require", lambda *names: SimpleNamespace(SummaryWriter=broken))
    ends = []
    for kind in ("none", "tensorboard"):
        given = parsed(toy_file, out=tmp_path / kind, track=kind)
        cli.run_here(given)
        ends.append((tmp_path / kind / "metrics.csv").read_text())
    assert ends[0] == ends[1] and ends[0].count("\n") > 1
    assert "the run goes on without it" in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_before_there_is_a_folder(
    toy_file, tmp_path, monkeypatch
):
    real = builtins.__import__
    gone = lambda name, *args: _no_module(name) if name == "wandb" else real(name, *args)
    monkeypatch.setattr("importlib.import_module", lambda name: gone(name))
    with pytest.raises(UserError, match="pip install wandb"):
        cli.start(parsed(toy_file, out=tmp_path / "new", track="wandb"))
    assert not (tmp_path / "new").exists()


def _no_module(name):
    raise ImportError(f"No module named {name!r}")


def test_a_link_in_a_run_folder_leads_nowhere(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tensorboard").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="tensorboard is a link"):
        track.make_tracker("tensorboard", tmp_path, LABELS, {})
    assert not list((tmp_path / "elsewhere").iterdir())


def test_tracking_and_offline_are_of_one_start_and_not_of_the_run(toy_file, tmp_path):
    out = tmp_path / "run"
    pytest.importorskip("tensorboardX")
    cli.run_here(parsed(toy_file, out=out, track="tensorboard"))
    saved = json.loads((out / "config.json").read_text())["config"]
    assert saved["track"] == "tensorboard"
    given, _ = cli.reopen(parsed(None, resume=out))
    assert given.job.track == "none"
    assert cli.load_run(out).session.flags.job.track == "none"
