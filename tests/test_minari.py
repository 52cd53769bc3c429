"""Minari data sets: read, evaluated, refused and written."""

import json
import os
import re

import h5py
import numpy as np
import pytest
from conftest import data_command, successors, toy_log

import data
import pgd
from host import envs
from host.errors import UserError
from host.export import write_minari
from host.minari import minari_environment, open_minari


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
    monkeypatch.setenv("PGD_OFFLINE", "1")
    monkeypatch.setattr("minari.download_dataset", lambda name: pytest.fail("asked a server"))
    with pytest.raises(UserError, match="minari:toy/none-v0 is not on this machine"):
        data.load("minari:toy/none-v0")
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
        (lambda f: f.pop("episode_1"), "declares 2 episodes and holds 1"),
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


# --- Data sets from strangers ---


@pytest.fixture
def hostile(minari_set, tmp_path):
    """-> rewrite(**changes) of metadata.json of toy/dict-v0; None removes an entry."""
    path = tmp_path / "minari/toy/dict-v0/data/metadata.json"

    def rewrite(**changes):
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return rewrite


WRAPPER = {"name": "RecordEpisodeStatistics", "entry_point": "os:system", "kwargs": {}}


def spec_of(entry="os:system", wrappers=(), **fields) -> str:
    """An environment's specification as Minari stores it."""
    spec = {"id": "Evil-v0", "entry_point": entry, "kwargs": {}, "max_episode_steps": 5}
    return json.dumps(spec | {"additional_wrappers": list(wrappers)} | fields)


@pytest.mark.parametrize("space", ["observation_space", "action_space"])
@pytest.mark.parametrize("value", [None, 3, [], {}])
@pytest.mark.parametrize("command", [["info"], ["download"], ["load"]])
def test_a_set_without_a_space_never_runs_the_environment_it_names(
    hostile, tmp_path, space, value, command, capsys, monkeypatch
):
    proof = tmp_path / "ran"
    spec = spec_of(kwargs={"command": f"touch {proof}"})
    hostile(env_spec=spec, **{space: value})
    with pytest.raises((UserError, SystemExit)) as e:
        if command == ["load"]:
            data.load("minari:toy/dict-v0")
        data_command(capsys, monkeypatch, *command, "minari:toy/dict-v0")
    said = str(e.value) + capsys.readouterr().err
    assert f"has no {space}" in said and not proof.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "spec, reason",
    [
        ({}, "no such environment is registered"),
        ({"id": "Pendulum-v1", "kwargs": {"render_mode": "human", "x": 1}}, "keyword argument x"),
        ({"id": "Hopper-v5", "kwargs": {"xml_file": "/etc/passwd"}}, "keyword argument xml_file"),
        ({"id": "Hopper-v5", "kwargs": {"frame_skip": 1}}, "keyword argument frame_skip"),
        ({"id": "Pendulum-v1", "kwargs": ["g"]}, "no dictionary"),
        ({"id": "Pendulum-v1", "kwargs": {"disable_env_checker": True}}, "disable_env_checker"),
        ({"id": "Pendulum-v1", "max_episode_steps": 10**9}, "limit of 1000000000 steps"),
        ({"id": "Pendulum-v1", "max_episode_steps": "5"}, "limit of 5 steps"),
        ({"id": "Pendulum-v1", "kwargs": {"g": "heavy"}}, "Error"),
        ({"id": "GymV26Environment-v0"}, "only environments of gymnasium"),
        ({"id": "Pendulum-v1"}, "its observation space has 3 entries, not 5"),
        ({"id": "Pendulum-v1", "wrappers": [WRAPPER | {"name": "system"}]}, "wrapped in system"),
        ({"id": "Pendulum-v1", "wrappers": [WRAPPER | {"name": "\x1b[2J"}]}, "wrapped in  "),
    ],
)
def test_environments_that_a_set_names_are_built_only_if_harmless(hostile, spec, reason, capsys):
    hostile(env_spec=spec_of(**spec))
    task = data.load("minari:toy/dict-v0")  # the log itself is fine
    assert task.simulator is None
    said = capsys.readouterr().err
    assert re.search(reason, said) and "\x1b" not in said


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_drawn_and_harmless_wrappers_are_left_off(hostile, capsys):
    from gymnasium import spaces
    from minari.serialization import serialize_space

    limit = {"name": "TimeLimit", "kwargs": {"max_episode_steps": 3}}
    wrappers = [WRAPPER, WRAPPER | limit]
    kwargs = {"render_mode": "human", "g": 5.0}
    box = lambda n: serialize_space(spaces.Box(-2.0, 2.0, (n,)))
    hostile(
        env_spec=spec_of(id="Pendulum-v1", wrappers=wrappers, kwargs=kwargs),
        observation_space=box(3), action_space=box(1),
    )  # fmt: skip
    make = minari_environment(open_minari("toy/dict-v0"))
    env = make()
    assert env.render_mode is None and env.unwrapped.g == 5.0
    assert env.spec.max_episode_steps == 3 and not capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"total_episodes": 10**9}, "declares 1000000000 episodes and holds 2"),
        ({"total_episodes": "2"}, "declares 2 episodes"),
        ({"total_episodes": -1}, "declares -1 episodes"),
        ({"total_steps": 10**15}, "damaged|declares|readable"),
        ({"env_spec": 5}, "no readable data set"),
        ({"env_spec": "[]"}, "no readable data set"),
        ({"data_format": "pickle"}, "no readable data set"),
        ({"action_space": "{}"}, "no readable data set"),
    ],
)
def test_metadata_that_cannot_be_is_one_line(hostile, changes, message):
    hostile(**changes)
    with pytest.raises(UserError, match=message):
        data.load("minari:toy/dict-v0")


@pytest.mark.filterwarnings("ignore")
def test_a_set_never_reads_outside_its_own_files(minari_set, tmp_path):
    folder = tmp_path / "minari/toy/dict-v0/data"
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(folder / "main_data.hdf5", "r+") as f:
        del f["episode_1/rewards"]
        f["episode_1/rewards"] = h5py.ExternalLink(str(tmp_path / "pipe"), "rewards")
    with pytest.raises(UserError, match="link, which is not followed"):
        data.load("minari:toy/dict-v0")  # a pipe without a writer would wait for ever
    (folder / "metadata.json").unlink()
    os.mkfifo(folder / "metadata.json")
    with pytest.raises(UserError, match="metadata.json is not a plain file"):
        data.load("minari:toy/dict-v0")
    (folder / "metadata.json").unlink()
    (folder / "metadata.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="no readable data set"):
        data.load("minari:toy/dict-v0")


@pytest.mark.filterwarnings("ignore")
def test_hard_links_empty_space_and_links_out_of_the_set_are_refused(hostile, tmp_path):
    folder = tmp_path / "minari/toy/dict-v0/data"
    main = folder / "main_data.hdf5"
    whole = main.read_bytes()
    with h5py.File(main, "r+") as f:
        below = f.create_group("L0")
        for i in range(1, 8):  # 16^8 paths
            level = f.create_group(f"L{i}")
            for j in range(16):
                level[str(j)] = below
            below = level
    assert len(data.load("minari:toy/dict-v0").log["rewards"]) == 32
    with h5py.File(main, "r+") as f:
        f.create_dataset("episode_0/more", (10**9, 3), "f4", chunks=(1000, 3))
    with pytest.raises(UserError, match="declares 12,0"):
        data.load("minari:toy/dict-v0")
    main.write_bytes(whole)
    hostile(total_steps=float("inf"))
    with pytest.raises(UserError, match="declares inf steps"):
        data.load("minari:toy/dict-v0")
    hostile(total_steps=32)
    os.rename(main, tmp_path / "away.hdf5")
    main.symlink_to(tmp_path / "away.hdf5")
    with pytest.raises(UserError, match="is a link to a file outside the data set"):
        data.load("minari:toy/dict-v0")


def plain_set(tmp_path, monkeypatch, change=lambda episode: None, episodes=3, length=40):
    """Write toy/plain-v0: episodes of Box observations in double precision, each after a change."""
    minari = pytest.importorskip("minari")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng, made = np.random.default_rng(0), []
    for _ in range(episodes):
        end = np.arange(length) == length - 1
        episode = {
            "observations": rng.normal(size=(length + 1, 3)),
            "actions": rng.uniform(-1, 1, (length, 2)).astype(np.float32),
            "rewards": rng.normal(size=length),
            "terminations": np.zeros(length, bool),
            "truncations": end,
        }
        change(episode)
        made.append(EpisodeBuffer(**episode))
    minari.create_dataset_from_buffers(
        "toy/plain-v0", made, action_space=spaces.Box(-1.0, 1.0, (2,), np.float32),
        observation_space=spaces.Box(-np.inf, np.inf, (3,), np.float64), data_format="hdf5",
    )  # fmt: skip
    return made


@pytest.mark.filterwarnings("ignore")
def test_a_minari_set_is_mended_as_a_file_is(tmp_path, monkeypatch, capsys):
    def far(episode):  # as time stamps are
        episode["observations"] += 1.7e9

    made = plain_set(tmp_path, monkeypatch, far)
    log = data.load("minari:toy/plain-v0").log
    seen = np.concatenate([e.observations[:-1] for e in made])
    np.testing.assert_array_equal(log["observations"], seen)  # in double precision
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8))
    rows = np.asarray(dataset.transitions(np.arange(len(dataset.usable))).obs)[:, 0]
    assert len(rows) == len(seen) and np.corrcoef(np.sort(rows), np.sort(seen[:, 0]))[0, 1] > 0.9999
    assert "a policy sees single precision" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_a_minari_set_of_discrete_choices_is_refused_unless_asked_for(tmp_path, monkeypatch):
    def choices(episode):
        episode["actions"] = np.round(episode["actions"] + 1).clip(0, 1)

    plain_set(tmp_path, monkeypatch, choices)
    with pytest.raises(UserError, match="minari:toy/plain-v0: the actions are the integers 0 to 1"):
        data.load("minari:toy/plain-v0")
    assert len(data.load("minari:toy/plain-v0", discrete=True).log["rewards"]) == 120
