"""OGBench: names, files, rewards of a task, and success as the return."""

import importlib.util

import numpy as np
import pytest

import data
import pgd
from host.envs import evaluate_on_host
from host.errors import UserError
from host.ogbench import OgbenchEnvs, make, names_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ogbench") is None, reason="ogbench is not installed"
)
TASK = "pointmaze-medium-navigate-singletask-task1-v0"


def test_a_name_stands_for_an_environment_and_a_data_set():
    assert names_of("antmaze-large-navigate-singletask-task3-v0") == (
        "antmaze-large-singletask-task3-v0",
        "antmaze-large-navigate-v0",
    )
    assert names_of("cube-single-play-singletask-v0") == (
        "cube-single-singletask-v0",
        "cube-single-play-v0",
    )


@pytest.mark.parametrize(
    "name, said",
    [
        ("antmaze-large-navigate-v0", "ogbench:antmaze-large-navigate-singletask-v0"),
        ("antmaze-lurge-navigate-singletask-v0", "did you mean antmaze-large-singletask-v0"),
        ("../x-singletask-v0", "is not a name of OGBench"),
        ("x", "is not a name of OGBench"),
    ],
)
def test_a_wrong_name_says_which_is_right(name, said):
    with pytest.raises(UserError, match=said):
        data.load(f"ogbench:{name}")


def walk(path, trajectories=6, steps=30, reach=(1, 4)):
    """A file in OGBench's layout: straight lines in a maze, of which those in `reach` pass the goal
    in their last ten rows. -> (goal (2,), positions (T, steps, 2))."""
    env = make(names_of(TASK).env)
    env.reset(seed=0)
    goal, rng = np.array(env.unwrapped.cur_goal_xy), np.random.default_rng(0)
    xy = np.empty((trajectories, steps, 2))
    for i in range(trajectories):
        end = goal if i in reach else goal + 5.0
        xy[i] = end + np.linspace(3.0, 0.0, steps)[:, None] * rng.uniform(0.9, 1.1, 2)
        if i in reach:
            xy[i, -10:] = goal + 0.01
    last = np.zeros((trajectories, steps), bool)
    last[:, -1] = True
    flat = xy.reshape(-1, 2)
    np.savez(
        path,
        observations=flat.astype(np.float32),
        actions=rng.uniform(-1, 1, flat.shape).astype(np.float32),
        terminals=last.ravel(),
        qpos=flat,
        qvel=np.zeros_like(flat),
    )
    return goal, xy


def test_a_file_becomes_the_log_of_a_task(tmp_path, capsys):
    path = tmp_path / "pointmaze-medium-navigate-v0.npz"
    goal, xy = walk(path)
    task = data.load(f"ogbench:{TASK}", str(path))
    log = task.log
    # The last row of a trajectory is only the successor of the one before it
    np.testing.assert_array_equal(log["observations"], np.float32(xy[:, :-1].reshape(-1, 2)))
    np.testing.assert_array_equal(log["next_observations"], np.float32(xy[:, 1:].reshape(-1, 2)))
    near = np.linalg.norm(xy[:, :-1].reshape(-1, 2) - goal, axis=1) <= 0.5
    assert near.sum() >= 18  # both trajectories that pass the goal
    np.testing.assert_array_equal(log["rewards"], np.where(near, 0.0, -1.0))
    np.testing.assert_array_equal(log["terminals"], near)
    ends = np.tile(np.arange(29) == 28, 6)
    np.testing.assert_array_equal(log["timeouts"], ends & ~near)
    # Two of six trajectories reach the goal: that, not the reward, is the log's score
    assert task.behaviour_return == pytest.approx(2 / 6)
    assert task.score(task.behaviour_return) == pytest.approx(100 / 3)
    assert task.simulator == f"ogbench:{TASK}" and task.kind == "ogbench"
    assert "33.3% of the trajectories reach the goal" in capsys.readouterr().err
    returns, lengths = data.episode_returns(log)
    said = data._describe(task, returns, lengths)["returns"]
    assert "score 33.3 (33.3% of the trajectories reach the goal)" in said
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8, validation=0.0))
    assert len(dataset.usable) == len(near)  # every transition has its successor


def test_a_file_without_a_task_names_one(tmp_path):
    path = tmp_path / "pointmaze-medium-navigate-v0.npz"
    walk(path)
    with pytest.raises(UserError, match="ogbench:pointmaze-medium-navigate-singletask-v0"):
        data.load(None, str(path))


def test_a_file_of_another_environment_is_refused(tmp_path):
    path = tmp_path / "pointmaze-medium-navigate-v0.npz"
    walk(path)
    with pytest.raises(UserError, match="states are not those of cube-single|observations and"):
        data.load("ogbench:cube-single-play-singletask-v0", str(path))


def test_reaching_the_goal_is_a_return_of_one_and_ends_the_episode():
    envs = OgbenchEnvs(TASK, 2)
    envs.reset(0)
    still = np.zeros((2, 2))
    _, reward, terminal, _ = envs.step(still)
    assert reward.tolist() == [0, 0] and not terminal.any()
    envs.envs[1].set_xy(np.array(envs.envs[1].cur_goal_xy))
    _, reward, terminal, timeout = envs.step(still)
    assert reward.tolist() == [0, 1] and terminal.tolist() == [False, True] and not timeout.any()
    # A policy that stays where it starts never arrives
    assert evaluate_on_host(envs, lambda obs: still, 0).tolist() == [0, 0]


def test_offline_the_file_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        "ogbench.download_datasets", lambda *args: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(UserError, match="cannot be fetched .no network.; put it into .*--dataset"):
        data.load(f"ogbench:{TASK}")
    monkeypatch.setenv("PGD_OFFLINE", "1")
    with pytest.raises(UserError, match="navigate-v0.npz is not in .*, and downloads are off"):
        data.load(f"ogbench:{TASK}")
