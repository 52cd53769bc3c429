"""Minari data sets: read, evaluated, refused and written."""

import h5py
import numpy as np
import pytest
from conftest import successors, toy_log

import data
from host import envs
from host.errors import UserError
from host.export import write_minari
from host.minari import open_minari


@pytest.fixture
def minari_set(tmp_path, monkeypatch):
    """A local Minari data set with Dict observations, T + 1 of them, and reference scores."""
    minari = pytest.importorskip("minari")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng, episodes = np.random.default_rng(0), []
    for length in (12, 20):
        goal, state = rng.normal(size=(length + 1, 2)), rng.normal(size=(length + 1, 3))
        end = np.arange(length) == length - 1
        episodes.append(
            EpisodeBuffer(
                observations={"goal": goal, "state": state},
                actions=rng.uniform(-1, 1, (length, 2)).astype(np.float32),
                rewards=rng.normal(size=length),
                terminations=end & (length == 12), truncations=end & (length == 12),
            )
        )  # fmt: skip
    box = lambda n: spaces.Box(-np.inf, np.inf, (n,), np.float64)
    made = minari.create_dataset_from_buffers(
        "toy/dict-v0", episodes, action_space=spaces.Box(-3.0, 3.0, (2,), np.float32),
        observation_space=spaces.Dict(state=box(3), goal=box(2)), data_format="hdf5",
    )  # fmt: skip
    made.storage.update_metadata({"ref_min_score": -2.0, "ref_max_score": 6.0})
    return episodes


@pytest.mark.filterwarnings("ignore")
def test_minari_dict_observations_are_flattened_and_the_last_is_a_successor(minari_set):
    from gymnasium import spaces

    task = data.load("minari:toy/dict-v0")
    log = task.log
    assert log["observations"].shape == (32, 5) and log["actions"].shape == (32, 2)
    assert log["terminals"].nonzero()[0].tolist() == [11]
    assert log["timeouts"].nonzero()[0].tolist() == [31]  # ended without a flag
    first, second = minari_set
    one = {"goal": second.observations["goal"][4], "state": second.observations["state"][4]}
    space = open_minari("toy/dict-v0").observation_space
    flat = spaces.flatten(space, one)
    np.testing.assert_allclose(log["observations"][12 + 4], flat, atol=1e-6)
    last = {key: x[12] for key, x in first.observations.items()}
    flat = spaces.flatten(space, last)
    np.testing.assert_allclose(log["next_observations"][11], flat, atol=1e-6)
    assert task.score(2.0) == 50.0 and task.simulator is None
    assert task.action_high.tolist() == [3.0, 3.0] and task.kind == "minari"
    assert task.name == task.load_name == "minari:toy/dict-v0"


def test_a_missing_minari_set_is_one_clear_line(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("MINARI_REMOTE", "nowhere://at-all")
    with pytest.raises(UserError, match="no readable data set toy/none-v0") as e:
        data.load("minari:toy/none-v0")
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="nothing like hopper-medium-replay"):
        data.load("minari:hopper-medium-replay")


@pytest.mark.filterwarnings("ignore")
def test_a_minari_set_is_judged_in_the_environment_it_names(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    import gymnasium
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gymnasium.make("Pendulum-v1")
    rng, length = np.random.default_rng(0), 200
    obs = [env.reset(seed=0)[0]]
    action = rng.uniform(-2, 2, (length, 1)).astype(np.float32)
    steps = [env.step(a) for a in action]
    obs += [s[0] for s in steps]
    episode = EpisodeBuffer(
        observations=np.array(obs, np.float32), actions=action, rewards=[s[1] for s in steps],
        terminations=[s[2] for s in steps], truncations=[s[3] for s in steps],
    )  # fmt: skip
    minari.create_dataset_from_buffers("toy/pendulum-v0", [episode], env=env, data_format="hdf5")
    task = data.load("minari:toy/pendulum-v0")
    assert task.simulator == "minari:toy/pendulum-v0"
    copies = data.make_envs(task.simulator, 2)
    returns = envs.evaluate_on_host(copies, lambda obs: np.zeros((2, 1)), 0)
    assert copies.limit == 200 and np.all(returns < -100)
    np.testing.assert_allclose(copies.reset([0, 1])[0], task.log["observations"][0], atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_log_made_in_a_wrapped_environment_keeps_its_own_bounds(tmp_path, monkeypatch, capsys):
    minari = pytest.importorskip("minari")
    import gymnasium

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)
    recorder = minari.DataCollector(env, data_format="hdf5")
    recorder.reset(seed=0)
    for _ in range(200):
        recorder.step(recorder.action_space.sample())
    recorder.create_dataset("toy/rescaled-v0")
    task = data.load("minari:toy/rescaled-v0")
    assert task.simulator is None and task.action_high.tolist() == [1.0]
    assert "it was wrapped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: f.pop("episode_1"), "is damaged"),
        (lambda f: f["episode_0"].pop("rewards"), "is damaged"),
        (lambda f: f["episode_0/rewards"].resize((5,)), "is damaged"),
        (lambda f: f["episode_0/observations/goal"].resize((5, 2)), "is damaged|one more"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_minari_set_is_one_clear_line(minari_set, tmp_path, spoil, message):
    with h5py.File(tmp_path / "minari/toy/dict-v0/data/main_data.hdf5", "r+") as f:
        spoil(f)
    with pytest.raises(UserError, match=message) as e:
        data.load("minari:toy/dict-v0")
    assert "\n" not in str(e.value) and "toy/dict-v0" in str(e.value)


def test_a_failed_minari_write_leaves_nothing(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    log = successors(toy_log())
    task = data.Task("t", log, -np.ones(2), np.ones(2), "", "file", None, None)

    def full(self, episodes):
        raise OSError(28, "No space left on device")

    storage = minari.dataset._storages.hdf5_storage.HDF5Storage
    monkeypatch.setattr(storage, "update_episodes", full)
    with pytest.raises(UserError, match="No space left"):
        write_minari("toy/full-v0", log, task, "")
    assert not (tmp_path / "toy" / "full-v0").exists()
