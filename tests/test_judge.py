"""--judge: a user's own environment evaluates, and only the command line can name it."""

import json

import numpy as np
import pytest
from conftest import toy_log

import data
from host import cli
from host.envs import evaluate_on_host
from host.errors import UserError

MODULE = """
import gymnasium
import numpy as np


class Line(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(3, self.t, np.float32), 1.0, self.t == 50, False, {}


class Doubled(gymnasium.RewardWrapper):
    def reward(self, reward):
        return 2 * reward


gymnasium.register("Line-v0", lambda: Doubled(Line()), max_episode_steps=7)
gymnasium.register("Endless-v0", Line)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A folder with a user's module and log, which is the current folder. -> the module's name"""
    monkeypatch.chdir(tmp_path)
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    data.write_log("log.npz", toy_log(), {})
    return name


def test_an_own_environment_keeps_its_wrappers_and_its_limit(module):
    task = data.load(path="log.npz", judge=f"{module}:Line-v0")
    assert task.action_low.tolist() == [-2, -2] and task.action_high.tolist() == [2, 2]
    envs = data.make_envs(task.simulator, 2)
    returns = evaluate_on_host(envs, lambda obs: np.zeros((2, 2)), 0)
    assert returns.tolist() == [14.0, 14.0]  # seven steps of a doubled reward


@pytest.mark.parametrize(
    "judge, said",
    [
        ("no_such_module_here:Line-v0", "cannot be made .ModuleNotFoundError"),
        ("MODULE:Missing-v0", "cannot be made .NameNotFound"),
        ("MODULE:Endless-v0", "has no limit on its episodes"),
        ("Line-v0", "should be MODULE:EnvId-v0"),
        ("../x:Line-v0", "should be MODULE:EnvId-v0"),
    ],
)
def test_a_judge_that_cannot_be_made_is_one_line(judge, said, module):
    with pytest.raises(UserError, match=said):
        data.load(path="log.npz", judge=judge.replace("MODULE", module))


def test_a_judge_of_other_sizes_is_refused(module):
    data.write_log("wide.npz", toy_log(obs_dim=5), {})
    with pytest.raises(UserError, match="5 observations and 2 actions, .* has 3 and 2"):
        data.load(path="wide.npz", judge=f"{module}:Line-v0")


@pytest.mark.slow
def test_a_folder_cannot_name_code_to_run(module, tmp_path, capsys):
    smoke = "--dataset-path log.npz --synthetic none --preset smoke --batch-size 32 --rounds 1"
    cli.main([*smoke.split(), "--out", "run", "--judge", f"{module}:Line-v0"])
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert final["returns"] == [14.0] and final["scores"] == []
    capsys.readouterr()
    for ask, said in [
        (["--resume", "run"], f"give --judge {module}:Line-v0 again"),
        (["--resume", "run", "--judge", "other:Line-v0"], f"give --judge {module}:Line-v0 again"),
    ]:
        with pytest.raises(SystemExit) as e:
            cli.main(ask)
        assert e.value.code == 2 and said in capsys.readouterr().err
    cli.main(["--resume", "run", "--judge", f"{module}:Line-v0"])
    with pytest.raises(UserError, match="code that a folder names is not run"):
        cli.load_run("run")
