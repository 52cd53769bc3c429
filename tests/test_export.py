"""Synthetic data as files and as Minari data sets, by whole runs of pgd.py."""

import json

import h5py
import jax
import numpy as np
import pytest
from conftest import toy_log

import data
import pgd
from baselines.log_alone import make_log_alone
from host import cli, flags
from host.errors import UserError
from host.export import export, refuse_existing_export, write_minari


def toy_transitions():
    """Three trajectories of 4 steps: no terminal, one in the middle, one at the very end."""
    obs = np.arange(24, dtype=np.float32).reshape(12, 2)
    done = np.zeros(12, np.float32)
    done[[5, 11]] = 1.0
    action = np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
    made = pgd.Transition(obs, action, obs[:, 0], done, obs + 2.0, action)
    for field in made:
        field[3] = field[1]  # the stand-in for a last step without a successor
    return made


class Units:  # of a data set
    obs_dim = 2
    mean, std = np.array([1.0, 2.0, 0, 0, 0]), np.array([2.0, 4.0, 1, 1, 1])
    action_low, action_high = np.array([-2.0]), np.array([4.0])
    unscale_action = pgd.Dataset.unscale_action


def test_exported_trajectories_end_where_they_should():
    out = cli.transitions_to_log(toy_transitions(), 4, Units())
    # the first without its last step, the second up to its terminal, the third whole
    rows = [0, 1, 2, 4, 5, 8, 9, 10, 11]
    assert out["terminals"].nonzero()[0].tolist() == [4, 8]
    assert out["timeouts"].nonzero()[0].tolist() == [2]
    t = toy_transitions()
    np.testing.assert_allclose(out["observations"], t.obs[rows] * [2, 4] + [1, 2])
    np.testing.assert_allclose(out["next_observations"], (t.obs + 2)[rows] * [2, 4] + [1, 2])
    np.testing.assert_allclose(out["actions"], (t.action[rows] + 1) * 3 - 2, atol=1e-6)
    np.testing.assert_allclose(out["rewards"], t.reward[rows])


EXPORT = [
    "--env", "pendulum-medium", "--preset", "smoke", "--fit-steps", 100, "--rounds", 1,
    "--updates", 5, "--horizon", 8, "--eval-episodes", 1, "--export-steps", 900,
]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, run, exported HDF5) of a tiny run on a log of pendulum."""
    folder = tmp_path_factory.mktemp("export")
    run, path = folder / "run", folder / "synthetic.hdf5"
    cli.main([*map(str, EXPORT), "--out", str(run), "--export", str(path)])
    return folder, run, path


@pytest.mark.slow
def test_an_exported_file_is_a_log_in_the_environments_units(exported):
    _, _, path = exported
    log = data.read_log(path)
    returns, lengths = data.episode_returns(log)
    assert (
        len(log["rewards"]) >= 900 and set(lengths) == {7} and lengths.sum() == len(log["rewards"])
    )
    first = log["observations"][::7]  # of each trajectory, from several rounds
    assert len(np.unique(first, axis=0)) == len(first)
    assert np.abs(log["actions"]).max() > 1.2 and np.abs(log["actions"]).max() <= 2.0  # torque
    inner = np.flatnonzero(~(log["terminals"] | log["timeouts"]))
    np.testing.assert_array_equal(log["next_observations"][inner], log["observations"][inner + 1])
    with h5py.File(path) as f:
        assert "synthetic" in f.attrs["source"] and "pendulum-medium" in f.attrs["source"]


class Task:
    action_low, action_high, reference = np.array([-1.0]), np.array([1.0]), None


@pytest.mark.parametrize("target", ["a.hdf5", "a.npz", "minari:me/synthetic-v0"])
def test_the_second_of_two_exports_to_one_place_leaves_the_first_as_it_is(
    target, tmp_path, monkeypatch
):
    """Both may have begun before either has written."""
    if target.startswith("minari:"):
        pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    log = cli.transitions_to_log(toy_transitions(), 4, Units())
    export(target, log, Task(), "the first")
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert files
    with pytest.raises(UserError, match="already"):
        export(target, log, Task(), "the second")
    if target.startswith("minari:"):
        with pytest.raises(UserError, match="could not be written"):  # at the same moment
            write_minari("me/synthetic-v0", log, Task(), "the second")
    assert files == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_finished_run_exports_the_same_again_and_as_minari(exported, monkeypatch):
    minari = pytest.importorskip("minari")
    folder, run, path = exported
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
    again = folder / "again.npz"
    args = ["--resume", str(run), "--export-steps", "900", "--export"]
    cli.main([*args, str(again)])
    log, same = data.read_log(path), data.read_log(again)
    for key in log:
        np.testing.assert_array_equal(log[key], same[key])
    cli.main([*args, "minari:pendulum/synthetic-v0"])
    task = data.load("minari:pendulum/synthetic-v0")
    for key in log:
        np.testing.assert_array_equal(log[key], task.log[key])
    assert task.reference == data.GYMNAX_REFERENCE["pendulum"]
    assert (task.action_low.item(), task.action_high.item()) == (-2.0, 2.0)
    found = minari.load_dataset("pendulum/synthetic-v0")
    assert found.total_steps == len(log["rewards"]) and found[0].observations.shape == (8, 3)
    with pytest.raises(UserError, match="already has a data set"):
        refuse_existing_export("minari:pendulum/synthetic-v0")


@pytest.mark.slow
def test_an_exported_file_trains_the_same_as_the_arrays_it_came_from(exported):
    import agents

    _, _, path = exported
    config = pgd.Config(horizon=8, batch_size=32, real_batch=32, updates=20, rounds=2)
    arrays = data.read_log(path)
    task = data.load("pendulum-medium", str(path))
    results = []
    for log in (arrays, task.log):
        dataset = pgd.make_dataset(log, config, -2.0, 2.0)
        train = pgd.make_train(config, agents.td3_bc(hidden=(16,)), make_log_alone)
        state, metrics = jax.jit(train)(jax.random.key(0), dataset)
        results.append((state.agent, metrics))
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.slow
def test_an_export_is_refused_before_the_work(exported, tmp_path, capsys):
    _, run, path = exported
    for args, message in (
        (["--export", str(path)], "already exists"),
        (["--export", str(tmp_path / "x.csv")], "should end in .hdf5"),
        (["--export", "minari:../x-v0"], "no Minari name"),
        (["--export", "minari:a/b-v0"], "is no name for Minari"),
        (["--export", f"{path}/x.hdf5"], "cannot be written"),
        (["--export", str(tmp_path / "x.hdf5"), "--synthetic", "none"], "--synthetic diffusion"),
    ):
        with pytest.raises(SystemExit) as e:
            cli.main(["--preset", "smoke", "--out", str(tmp_path / "r"), *args])
        said = capsys.readouterr().err
        assert e.value.code == 2 and message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_many_seeds_export_a_file_each(tmp_path):
    args = [*map(str, EXPORT), "--num-seeds", "2", "--seed", "4", "--out", str(tmp_path / "r")]
    cli.main([*args, "--fit-steps", "100", "--export", str(tmp_path / "x.hdf5")])
    four, five = (data.read_log(tmp_path / f"x-seed{i}.hdf5") for i in (4, 5))
    assert len(four["rewards"]) == len(five["rewards"])
    assert np.abs(four["observations"] - five["observations"]).max() > 0.1


@pytest.mark.slow
def test_rewards_in_other_units_are_exported_in_the_logs_own(exported, tmp_path):
    """The denoiser sees standardised rewards, so that unguided data are the same in any units."""
    made = []
    for i, units in enumerate([[], ["--reward-shift", "3", "--reward-scale", "0.1"]]):
        path = tmp_path / f"{i}.npz"
        ask = [*map(str, EXPORT), "--guidance", "0", "--num-seeds", "1", *units]
        cli.main([*ask, "--out", str(tmp_path / f"run{i}"), "--export", str(path)])
        made.append(data.read_log(path)["rewards"])
    np.testing.assert_allclose(*made, rtol=1e-2, atol=1e-2)
    assert made[0].std() > 1.0
    plain, changed = (read_json(tmp_path / f"run{i}" / "final.json") for i in (0, 1))
    assert plain["rewards"] is None and changed["rewards"] == "(reward +3) x 0.1"
    assert plain["behaviour_return"] == changed["behaviour_return"]
    assert abs(plain["returns"][0]) > 50  # of the simulator, in its own units


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "words, rewards",
    [
        ([], {0.0, 1.0}),
        (["--env", "antmaze-umaze"], {-1.0, 0.0}),
        (["--env", "antmaze-umaze", "--reward-shift", "0"], {0.0, 1.0}),
        (["--reward-shift", "-1", "--reward-scale", "5"], {-5.0, 0.0}),
    ],
)
def test_an_agent_sees_rewards_in_the_units_of_its_flags(words, rewards, tmp_path):
    log = toy_log(obs_dim=29, act_dim=8)
    log["rewards"] = log["terminals"].astype(np.float32)
    path = tmp_path / "maze.npz"
    data.write_log(path, log, {})
    session = cli.open_session(
        flags.parse(
            ["--dataset-path", str(path), "--synthetic", "none", "--batch-size", "8", *words]
        )
    )
    dataset = session.dataset
    seen = np.asarray(dataset.transitions(np.arange(len(dataset.usable))).reward)
    assert set(np.round(seen, 4).tolist()) == rewards
    assert 0 <= session.task.behaviour_return <= 1  # in the log's own units


def test_a_scale_of_rewards_that_is_not_positive_is_refused():
    for value in ("0", "-1", "nan"):
        with pytest.raises(UserError, match="--reward-scale must be"):
            flags.check(flags.parse(["--reward-scale", value]))
