"""A run's folder: what a run leaves, what loads it again, and what happens to a damaged one."""

import errno
import json
import os
import shutil
import time

import h5py
import jax
import numpy as np
import pytest
from conftest import toy_log

import agents
import data
import pgd
from host import cli, flags, run_folder
from host.errors import UserError
from host.progress import Progress, counted
from studies import figures

TINY = (
    "--features 16 --blocks 1 --fit-steps 40 --fit-chunk 10 --fit-batch 16 --sample-steps 4 "
    "--rounds 2 --updates 5 --trajectories 16 --sample-batch 16 --eval-episodes 2 "
    "--model-steps 60 --model-chunk 10 --members 3 --elites 2 --model-hidden 16 "
    "--hyper.hidden 16 16"
).split()


ALONE = [*TINY, "--synthetic", "none"]  # without a denoiser, which takes seconds to compile


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "toy.hdf5"
    data.write_log(path, toy_log(episodes=20), {})
    return path


def run(*args) -> None:
    cli.main([str(x) for x in args])


def mistake(capsys, *args) -> str:
    """Arguments that fail -> the last line on standard error; the status is 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(*args)
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


def read_final(folder) -> dict:
    return json.loads((folder / "final.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two seeds on a gymnax task."""
    folder = tmp_path_factory.mktemp("runs") / "pendulum"
    run("--env", "pendulum-medium", *TINY, "--num-seeds", 2, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory, toy_file):
    """A sweep of two points and two seeds, on a file that is deleted afterwards."""
    folder, log = tmp_path_factory.mktemp("runs") / "sweep", toy_file.with_name("gone.hdf5")
    shutil.copy(toy_file, log)
    args = ["--dataset-path", log, *TINY, "--num-seeds", 2, "--sweep", "hyper.alpha", 0.5, 5]
    run(*args, "--out", folder)
    return folder, log


# --- Load ---


def expected_action(loaded, index: int, obs: np.ndarray) -> np.ndarray:
    session = loaded.session
    act = pgd.make_act(session.agent, loaded.agent_state(index), session.dataset)
    return np.asarray(act(obs))


def test_load_policy_acts_as_the_agent_of_its_seed_in_the_environments_units(finished):
    loaded = cli.load_run(finished)
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    actions = [run_folder.load_policy(finished, seed=seed)(obs) for seed in (0, 1)]
    for seed in (0, 1):
        assert actions[seed].shape == (5, 1)
        expected = expected_action(loaded, seed, obs)
        np.testing.assert_allclose(actions[seed], expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(actions[0], actions[1])
    assert run_folder.load_policy(finished, seed=1)(obs[2]).shape == (1,)  # one observation
    np.testing.assert_allclose(run_folder.load_policy(finished)(obs[2]), actions[0][2], rtol=1e-5)
    assert np.abs(actions).max() <= 2.0  # pendulum's torque


@pytest.mark.slow
def test_load_policy_of_a_sweep_needs_the_point_and_not_the_log(swept):
    folder, log = swept
    loaded = cli.load_run(folder)
    obs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    labels = loaded.session.layout.labels
    assert labels == [{"hyper.alpha": a, "seed": s} for a in (0.5, 5.0) for s in (0, 1)]
    expected = [expected_action(loaded, i, obs) for i in range(4)]
    os.rename(log, log.with_suffix(".away"))
    try:
        for i, label in enumerate(labels):
            act = run_folder.load_policy(folder, **label)
            np.testing.assert_allclose(act(obs), expected[i], rtol=1e-5, atol=1e-6)
        with pytest.raises(UserError, match="has 2 runs with {'seed': 1}"):
            run_folder.load_policy(folder, seed=1)
        with pytest.raises(UserError, match="there is no file"):
            cli.load_run(folder)
    finally:
        os.rename(log.with_suffix(".away"), log)


@pytest.mark.slow
def test_load_run_gives_the_config_data_set_and_states_of_every_run(finished, swept):
    loaded = cli.load_run(finished)
    assert loaded.config.num_seeds == 2 and loaded.config.features == 16
    assert loaded.dataset.obs_dim == 3 and loaded.dataset.act_dim == 1
    assert int(loaded.model(1).step) == 40  # gradient steps
    ema = [jax.tree.leaves(loaded.model(i).ema) for i in (0, 1)]
    assert any(np.any(a != b) for a, b in zip(*ema))  # a denoiser per seed
    losses = loaded.program.validate(loaded.session.layout.runs, loaded.state, loaded.dataset)
    final = read_final(finished)
    assert np.mean(losses["validation_loss"]) == pytest.approx(final["validation_loss"], rel=1e-4)
    loaded = cli.load_run(swept[0])
    assert loaded.session.layout.num_models == 2  # the agent's settings change no denoiser
    ema = [jax.tree.leaves(loaded.model(i).ema) for i in (1, 3)]
    assert all(np.all(a == b) for a, b in zip(*ema))


def test_an_unfinished_run_is_not_loaded_and_its_policy_only_from_a_checkpoint(
    finished, tmp_path, capsys
):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoint")
    with pytest.raises(UserError, match="is not a finished run; --resume .*copy finishes it"):
        cli.load_run(copy)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        run_folder.load_policy(copy)
    with pytest.raises(UserError, match="there is no run in"):
        run_folder.load_policy(tmp_path)
    with pytest.raises(UserError, match="there is no run in"):
        cli.load_run(tmp_path)


# --- What a run leaves, and what it refuses ---


def test_a_run_does_not_overwrite_another(finished, capsys):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    said = mistake(capsys, "--preset", "smoke", "--out", finished)
    assert "already holds a run" in said
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def test_damaged_run_folders_are_one_clear_line(finished, tmp_path, capsys):
    for name, content in (("config.json", b"{}"), ("checkpoint/state.npz", b"PK\x03\x04 cut")):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(finished, copy)
        (copy / "checkpoint" / run_folder.PREVIOUS).unlink(missing_ok=True)  # of a slow machine
        (copy / name).write_bytes(content)
        with pytest.raises(SystemExit) as e:
            run("--resume", copy)
        said = capsys.readouterr().err
        assert e.value.code == 2 and "is damaged" in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["metrics.csv", "final.json", "checkpoint/x", "host0/config.json"])
def test_a_folder_with_a_part_of_a_run_is_not_written_into(name, tmp_path, capsys):
    path = tmp_path / "r" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    said = mistake(capsys, "--preset", "smoke", "--out", tmp_path / "r")
    alone = name in ("metrics.csv", "final.json")
    want = f"holds {name} of something else; name another" if alone else "already holds a run"
    assert want in said and path.read_text() == "mine"


def a_folder(path, seeds=1) -> run_folder.RunFolder:
    """A run's folder with a data set's scale in its notes."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"config": {}, "data": {"fingerprint": "x"}}))
    folder = run_folder.RunFolder(path, [{"seed": i} for i in range(seeds)])
    folder.notes = {name: np.ones(3, np.float32) for name in run_folder.DATASET}
    return folder


def test_after_a_damaged_checkpoint_the_good_one_outlives_a_save_that_fails(
    tmp_path, monkeypatch, capsys
):
    folder = a_folder(tmp_path / "r")
    states = [{"x": jax.numpy.full(3, float(i))} for i in range(4)]
    for i in (0, 1):
        folder.save(i, states[i], force=True)
    state, previous = (
        folder.path / "checkpoint" / x for x in (run_folder.STATE, run_folder.PREVIOUS)
    )
    state.write_bytes(b"PK\x03\x04 cut")
    fitted, found = a_folder(folder.path).restore(states[2])
    assert fitted == 0 and found["x"].tolist() == [0, 0, 0]
    said = capsys.readouterr().err
    assert "is damaged (BadZipFile); going on from the checkpoint before it" in said
    again = a_folder(folder.path)

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)  # when the files have changed places
    with pytest.raises(OSError):
        again.save(5, states[3], force=True)
    monkeypatch.undo()
    assert a_folder(folder.path).restore(states[2])[1]["x"].tolist() == [0, 0, 0]
    again.save(6, states[3], force=True)
    state.write_bytes(b"")  # damaged again: the good one is the one before it
    assert a_folder(folder.path).restore(states[2])[1]["x"].tolist() == [0, 0, 0]


def test_a_run_is_not_resumed_on_data_of_another_scale(tmp_path):
    """As where the simulator, whose bounds scale the actions, is not installed any more."""
    a_folder(tmp_path / "r").save(1, {"x": jax.numpy.ones(3)}, force=True)
    folder = a_folder(tmp_path / "r")
    folder.notes["action_high"] = np.full(3, 1.4, np.float32)
    with pytest.raises(UserError, match="with another action high of the data"):
        folder.restore({"x": jax.numpy.zeros(3)})


def test_too_little_memory_is_no_damage_and_a_checkpoint_is_no_bomb(tmp_path, monkeypatch):
    folder, state = a_folder(tmp_path / "r"), {"x": jax.numpy.ones(3)}
    folder.save(1, state, force=True)

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(np.lib.format, "read_array", fail)
    with pytest.raises(MemoryError):
        folder.restore(state)
    monkeypatch.undo()
    path = folder.path / "checkpoint" / run_folder.STATE
    arrays = dict(np.load(path)) | {".x": np.zeros(2**26, np.float32)}
    np.savez_compressed(path, **arrays)
    with pytest.raises(UserError, match="is damaged"), run_folder.read_checkpoint(path) as (_, z):
        z[".x"]


def test_a_config_of_another_version_is_refused_on_resume_by_its_field(finished, tmp_path, capsys):
    copy = tmp_path / "old"
    shutil.copytree(finished, copy)
    about = json.loads((copy / "config.json").read_text())
    about["config"]["fix_start"] = True
    (copy / "config.json").write_text(json.dumps(about))
    said = mistake(capsys, "--resume", copy)
    assert "is of another version of this program: it has fix_start" in said


def test_a_checkpoint_of_another_version_is_refused_wherever_it_is_read(finished, tmp_path, capsys):
    """Its arrays may have the same shapes and mean something else."""
    copy = tmp_path / "old"
    shutil.copytree(finished, copy)
    path = copy / "checkpoint" / "state.npz"
    arrays = dict(np.load(path, allow_pickle=False))
    about = json.loads(arrays["about"].tobytes())
    assert about["format"] == run_folder.FORMAT
    for old in ({"format": 1}, {}):
        text = {k: v for k, v in about.items() if k != "format"} | old
        np.savez(path, **arrays | {"about": np.frombuffer(json.dumps(text).encode(), np.uint8)})
        for read in (run_folder.load_policy, cli.load_run):
            with pytest.raises(UserError, match="state.npz is of another version of this program"):
                read(copy)
        assert "is of another version of this program" in mistake(capsys, "--resume", copy)


def test_a_resumed_run_refuses_another_log(tmp_path, capsys):
    path = tmp_path / "log.hdf5"
    data.write_log(path, toy_log(seed=0), {})
    args = ["--dataset-path", path, *ALONE, "--batch-size", 64, "--rounds", 1]
    run(*args, "--out", tmp_path / "r")
    with h5py.File(path, "r+") as f:
        f["rewards"][3] = 7.0
    assert "was trained on another log" in mistake(capsys, "--resume", tmp_path / "r")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ESTALE, errno.EROFS, errno.EIO])
def test_a_full_or_failing_disk_is_one_clear_line_and_leaves_no_half_file(
    number, tmp_path, toy_file, monkeypatch, capsys
):
    def fail(*args, **kw):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder.np, "savez", fail)
    said = mistake(capsys, "--dataset-path", toy_file, *ALONE, "--out", tmp_path / "r")
    assert said == f"pgd.py: [Errno {number}] {os.strerror(number)}"
    assert not list((tmp_path / "r").rglob("*.part"))


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path, toy_file, capsys):
    (tmp_path / "file").write_text("not a folder")
    for out in ("/proc/no-such-run", tmp_path / "file" / "run"):
        said = mistake(capsys, "--dataset-path", toy_file, *TINY, "--out", out)
        assert said.startswith("pgd.py: ") and str(out) in said


def test_a_diverging_agent_is_one_clear_line_and_no_result(tmp_path, toy_file, capsys, monkeypatch):
    monkeypatch.setattr(agents, "make_agent", lambda name, **_: agents.bc(lr=float("nan")))
    args = ["--dataset-path", toy_file, *ALONE, "--agent", "bc", "--out", tmp_path / "r"]
    assert "is not finite in round 0 of seed 0" in mistake(capsys, *args)
    assert not (tmp_path / "r" / "final.json").exists()


def test_two_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20250101-120000")
    name = "collect:halfcheetah-medium"
    paths = [run_folder.new_path(name, "iql", "diffusion", 7) for _ in range(3)]
    assert len(set(paths)) == 3 and all(path.is_dir() for path in paths)
    for path in paths:
        start = "collect-halfcheetah-medium-iql-diffusion-seed7-20250101-120000"
        assert path.parent.name == "runs" and path.name.startswith(start)


def test_a_run_without_out_names_its_folder_after_task_agent_source_and_seed(
    tmp_path, toy_file, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run("--dataset-path", toy_file, *ALONE, "--seed", 3)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("toy-td3_bc-none-seed3-")
    said = capsys.readouterr()
    assert f"run folder: runs/{folder.name}\n" in said.err  # at the start
    assert f"saved: runs/{folder.name}/" in said.out


# --- The log alone, the world model, a re-collected log ---


def test_the_log_alone_needs_no_denoiser(tmp_path, toy_file, capsys):
    run("--dataset-path", toy_file, *ALONE, "--num-seeds", 2, "--out", tmp_path / "r")
    final = read_final(tmp_path / "r")
    assert final["synthetic"] == "none" and "validation_loss" not in final
    said = capsys.readouterr().out
    assert "synthetic actions" not in said and "logged actions" in said


def test_a_sweep_on_the_log_alone_shows_no_likelihood_of_synthetic_actions(
    tmp_path, toy_file, capsys, monkeypatch
):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda path, figure: drawn.append(figure))
    args = ["--dataset-path", toy_file, *ALONE, "--sweep", "hyper.alpha", 1, 2.5]
    run(*args, "--out", tmp_path / "r")
    assert "synthetic" not in capsys.readouterr().out.replace("td3_bc on none", "")
    labels = [ax.get_ylabel() for figure in drawn for ax in figure.axes]
    assert labels and not any("synthetic" in label for label in labels)


@pytest.mark.slow
def test_a_world_model_run_reports_and_exports_its_rollouts(tmp_path, toy_file, capsys):
    args = ["--dataset-path", toy_file, *TINY, "--synthetic", "world-model", "--rollout", 4]
    args += ["--num-seeds", 2, "--export", tmp_path / "w.npz", "--export-steps", 600]
    run(*args, "--out", tmp_path / "r")
    final = read_final(tmp_path / "r")
    assert final["synthetic"] == "world-model" and final["guidance"] is None
    assert -10 < final["validation_r2"] < 1 and 0 < final["within_1_sigma"] < 1
    said = capsys.readouterr().out
    assert "held-out R^2 of the world model" in said and "ensembles: one per seed" in said
    for seed in (0, 1):
        log = data.read_log(tmp_path / f"w-seed{seed}.npz")
        _, lengths = data.episode_returns(log)
        assert len(log["rewards"]) >= 600 and lengths.max() == 4
    with np.load(tmp_path / "w-seed0.npz") as z:
        assert "world model" in str(z["source"])


@pytest.mark.slow
def test_a_recollected_log_is_called_so_everywhere(tmp_path, monkeypatch, capsys):
    """In final.json, the figure's title, the table and the folder's name."""
    collected, drawn = data.collected, []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "collected", lambda recipe: collected(recipe, 4_000))
    refuse = lambda *a, **k: (_ for _ in ()).throw(OSError("no network in tests"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(figures, "save_figure", lambda path, figure: drawn.append(figure))
    run("--env", "HalfCheetah-medium", *TINY, "--rounds", 1, "--eval-episodes", 1)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("collect-halfcheetah-medium-td3_bc-diffusion-seed0-")
    assert read_final(folder)["env"] == "collect:halfcheetah-medium"
    said = capsys.readouterr()
    assert "\n  collect:halfcheetah-medium: td3_bc on diffusion\n" in said.out
    assert "going on with collect:halfcheetah-medium" in said.err
    assert drawn[0].axes[0].get_title().startswith("collect:halfcheetah-medium, td3_bc")
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["env"] == "collect:halfcheetah-medium"  # so that --resume takes the same log


# --- Results ---


def test_interval_is_students_t():
    mean, (low, high) = run_folder.interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and high - mean == pytest.approx(
        3.1824 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-4
    )
    assert run_folder.interval([5.0]) == (5.0, None)


ABOUT = run_folder.About(
    "toy", "td3_bc", "world-model", None, -3.0, "file toy", None, "default", None, {}, None
)


def rows(labels: list[dict], **metrics) -> list[dict]:
    return [{"round": 0, **label, "updates": 5, **metrics} for label in labels]


def test_a_measure_that_cannot_be_computed_is_null(tmp_path):
    nan = {"validation_r2": np.array([np.nan, 0.5]), "validation_error": np.array([0.1, np.inf])}
    labels = [{"seed": 0}, {"seed": 1}]
    history = rows(labels, log_prob_real=-1.0, log_prob_synthetic=-2.0)
    final = run_folder.summarise(history, labels, ABOUT, nan) | {"wall_seconds": {"fit": 1.0}}
    assert final["validation_r2"] is None and final["validation_error"] is None
    run_folder.write_json(tmp_path / "final.json", final)
    assert "NaN" not in (tmp_path / "final.json").read_text()
    assert "held-out" not in run_folder.table(final)
    labels = [{"penalty": p, "seed": 0} for p in (0.0, 1.0)]
    history = rows(labels, log_prob_real=-1.0, log_prob_synthetic=-2.0)
    final = run_folder.summarise(history, labels, ABOUT, nan) | {"wall_seconds": {"fit": 1.0}}
    run_folder.write_json(tmp_path / "final.json", final)
    assert final["sweep"][0]["validation_error"] == pytest.approx(0.1)
    assert "-" in run_folder.table(final).splitlines()[-4]


def test_a_run_is_compared_with_the_same_agent_on_the_same_log_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "LOG_ALONE", tmp_path / "shipped")
    config = flags.parse(["--updates", "7"]).as_dict()

    def write(path, config, final=None):
        path.mkdir(parents=True)
        data = {"config": config, "data": {"fingerprint": "0"}}
        run_folder.write_json(path / "config.json", data)
        run_folder.write_json(path / "final.json", final or {})

    shipped = {"source": "a log", "seeds": [0, 1], "returns": [1.0, 4.0], "mean": 12.0,
               "ci95": [8.0, 16.0], "env": "toy"}  # fmt: skip
    alone = config | {"synthetic": "none", "real_batch": 256, "seed": 5, "num_seeds": 2}
    write(tmp_path / "shipped" / "toy", alone, shipped)
    found = run_folder.log_alone(config, "a log")
    assert found == {k: shipped[k] for k in ("seeds", "returns", "mean", "ci95")}
    assert run_folder.log_alone(config, "another log") is None
    others = {"updates": 8, "n_step": 3, "agent": "iql", "hyper": config["hyper"] | {"lr": 1.0}}
    for name, value in others.items():
        assert run_folder.log_alone(config | {name: value}, "a log") is None

    history = rows([{"seed": 0}], log_prob_real=-1.0)
    final = run_folder.summarise(history, [{"seed": 0}], ABOUT, {}) | {"wall_seconds": {}}
    line = "the log alone, mean of 2 seeds             2.5      12.0   95 % interval 8.0 to 16.0"
    assert line in run_folder.table(final | {"log_alone": found})
    assert "log alone" not in run_folder.table(final | {"log_alone": None})


@pytest.mark.slow
def test_a_finished_run_shows_the_shipped_one(tmp_path, monkeypatch, capsys, finished):
    monkeypatch.setattr(run_folder, "LOG_ALONE", tmp_path)
    alone = tmp_path / "pendulum"
    run("--env", "pendulum-medium", *ALONE, "--num-seeds", 3, "--out", alone)
    assert read_final(alone)["log_alone"] is None
    shutil.copytree(finished, tmp_path / "run")
    capsys.readouterr()
    run("--resume", tmp_path / "run")
    assert "the log alone, mean of 3 seeds" in capsys.readouterr().out
    assert read_final(tmp_path / "run")["log_alone"]["mean"] == read_final(alone)["mean"]


def test_the_default_run_has_a_shipped_comparison():
    shipped = run_folder.LOG_ALONE / flags.DEFAULT_ENV
    found = run_folder.log_alone(flags.parse([]).as_dict(), read_final(shipped)["source"])
    assert found["seeds"] == list(range(8))
    assert run_folder.read_config(shipped)[0]["synthetic"] == "none"


@pytest.mark.parametrize(
    "metrics, named",
    [
        ({"score": 20.0, "return": -500.0}, "normalised score"),
        ({"return": -500.0}, "undiscounted return"),
        ({}, "log-likelihood of synthetic actions (nats)"),
    ],
)
def test_the_axis_of_the_sweeps_figure_says_what_is_plotted(metrics, named, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda path, figure: drawn.append(figure))
    labels = [{"guidance": g, "seed": seed} for g in (0.0, 1.0) for seed in (0, 1)]
    history = rows(labels, log_prob_real=-1.0, log_prob_synthetic=-2.0, **metrics)
    about = ABOUT._replace(synthetic="diffusion", behaviour_score=metrics.get("score"))
    final = run_folder.summarise(history, labels, about, {})
    assert figures.draw_run(tmp_path, history, final) == ["curve.png", "sweep.png"]
    ax = drawn[1].axes[0]
    assert ax.get_ylabel() == named and ax.get_xlabel() == "guidance"
    plotted = ax.lines[0].get_ydata() if not ax.containers else ax.containers[0][0].get_ydata()
    np.testing.assert_allclose(plotted, next(iter(metrics.values()), -2.0))


# --- Progress ---


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_there_is_a_line_a_minute_of_the_fit_and_a_line_per_round(capsys):
    clock = Clock()
    progress = Progress(clock)
    assert not progress.terminal
    for i in range(100):  # 10 s a chunk
        clock.now += 10.0
        progress("fit", i + 1, 100, f"loss {i}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 17 and lines[0] == "fit 6/100: loss 5, about 16 min left"
    assert lines[-1] == "fit 100/100: loss 99"
    for i in range(3):
        clock.now += 3000.0
        progress("rounds", i + 1, 3, "return 1.0")
    assert capsys.readouterr().err.splitlines() == [
        "rounds 1/3: return 1.0",
        "rounds 2/3: return 1.0, about 50 min left",
        "rounds 3/3: return 1.0",
    ]


def test_items_that_are_counted_are_all_there_and_said_once_a_minute(capsys, monkeypatch):
    clock, seen = Clock(), []
    monkeypatch.setattr("host.progress.Progress", lambda: Progress(clock))
    for item in counted("abcde", "samples"):
        seen.append(item)
        clock.now += 40.0
    assert "".join(seen) == "abcde"
    assert capsys.readouterr().err.splitlines() == [
        "samples 2/5: about 2 min left", "samples 4/5: about 1 min left", "samples 5/5",
    ]  # fmt: skip
    next(items := counted(iter([7]), "samples", 1))
    assert list(items) == [] and capsys.readouterr().err == "samples 1/1\n"


def test_on_a_terminal_there_are_bars(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress(Clock())
    progress("fit", 3, 4, "loss 1")  # of a resumed run
    progress("fit", 4, 4, "loss 1")
    progress.close()
    said = capsys.readouterr().err
    assert "4/4" in said and "loss 1" in said and "\r" in said
