"""Simulators: our batched MuJoCo against gymnasium's, MJX against C, and what a run may rely on."""

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import real_log

import data
from host import envs, gym_envs
from host.collect import UniformPolicy
from host.errors import UserError

BODIES = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4"}


@pytest.mark.parametrize("task", BODIES)
def test_batched_mujoco_is_gymnasiums_step_by_step(task):
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    theirs = gymnasium.make(BODIES[task]).unwrapped
    ours = envs.MujocoEnvs(task, 3)
    first = ours.reset([5, 6, 7])
    for seed, row in zip((5, 6, 7), first):
        np.testing.assert_allclose(theirs.reset(seed=seed)[0], row, atol=1e-6)
    rng, falls = np.random.default_rng(0), 0
    for _ in range(200):
        action = rng.uniform(-1, 1, (3, ours.low.size)).astype(np.float32)
        next_obs, reward, terminal, timeout = ours.step(action)
        obs, their_reward, their_terminal, _, _ = theirs.step(action[2])
        np.testing.assert_allclose(obs, next_obs[2], atol=1e-5)
        assert their_reward == pytest.approx(reward[2], abs=1e-5)
        assert their_terminal == terminal[2] and not timeout.any()
        if their_terminal:
            falls += 1
            np.testing.assert_allclose(theirs.reset()[0], ours.obs[2], atol=1e-6)
        else:  # chaos must not decide the test
            theirs.set_state(ours.qpos[2], ours.qvel[2])
    assert falls > 0 or task == "halfcheetah"


def test_a_row_of_physics_does_not_depend_on_its_neighbours_or_on_threads():
    many, alone = envs.MujocoEnvs("hopper", 7, threads=3), envs.MujocoEnvs("hopper", 1, threads=1)
    rng = np.random.default_rng(0)
    many.reset(range(7))
    alone.reset([4])
    for _ in range(100):
        action = rng.uniform(-1, 1, (7, 3))
        a, b = many.step(action), alone.step(action[4:5])
        for x, y in zip(a, b):
            np.testing.assert_array_equal(x[4:5], y)


def test_an_episode_ends_by_a_timeout_at_its_limit():
    copies = envs.MujocoEnvs("halfcheetah", 2)
    copies.limit = 5
    copies.reset(0)
    ends = [copies.step(np.zeros((2, 6)))[3].tolist() for _ in range(11)]
    assert [any(e) for e in ends] == [i in (4, 9) for i in range(11)]
    assert all(e in ([True, True], [False, False]) for e in ends)


@pytest.mark.parametrize("task", BODIES)
@pytest.mark.slow
def test_mjx_steps_like_c_mujoco(task):
    pytest.importorskip("mujoco.mjx")
    copies = envs.MujocoEnvs(task, 32)
    copies.reset(0)
    rng = np.random.default_rng(1)
    for _ in range(20):  # to states with contacts and speed
        copies.step(rng.uniform(-1, 1, (32, copies.low.size)))
    qpos, qvel = copies.qpos, copies.qvel
    action = rng.uniform(-1, 1, (32, copies.low.size)).astype(np.float32)
    _, step = envs.make_mjx(task)
    obs, after, reward, terminal = jax.jit(jax.vmap(step))(
        (jnp.float32(qpos), jnp.float32(qvel)), action
    )
    true_obs, true_reward, true_terminal, _ = copies.step(action)
    moved = np.abs(true_obs - envs.observe(copies.body, qpos, qvel))
    error = np.abs(np.asarray(obs) - true_obs)
    assert np.median(error) < 1e-5 and error.max() < 2e-3 < 0.1 < moved.max()
    np.testing.assert_allclose(reward, true_reward, atol=2e-3)
    np.testing.assert_array_equal(terminal, true_terminal)


def test_mjx_starts_like_c_mujoco():
    pytest.importorskip("mujoco.mjx")
    reset, _ = envs.make_mjx("halfcheetah")
    starts = np.asarray(jax.vmap(lambda k: reset(k)[0])(jax.random.split(jax.random.key(0), 2000)))
    theirs = envs.MujocoEnvs("halfcheetah", 2000).reset(0)
    np.testing.assert_allclose(starts.mean(0), theirs.mean(0), atol=0.015)
    np.testing.assert_allclose(starts.std(0), theirs.std(0), atol=0.01)


def test_evaluation_through_mjx_adds_rewards_until_the_first_terminal(monkeypatch):
    start, later = jnp.zeros(2), jnp.ones(2)
    reset = lambda key: (start, jnp.int32(0))

    def step(state, action):  # rewards 1, 2, 3, ... and a terminal at the third step
        return later, state + 1, state + 1.0 + action[0], state == 2

    monkeypatch.setattr(envs, "make_mjx", lambda task: (reset, step))
    monkeypatch.setattr(envs, "EPISODE", 10)
    assert envs.evaluator_in_program("hopper", 4) is None  # without being asked for
    evaluate = envs.evaluator_in_program("hopper", 4, mjx=True)
    returns = evaluate(jax.random.key(0), lambda obs: jnp.zeros(1) + 10.0 * obs[0])
    np.testing.assert_allclose(returns, [1 + 12 + 13] * 4)  # the first action sees the start


def test_mujoco_replays_the_published_halfcheetah_log():
    log = data.read_log(real_log("safety-halfcheetah-train.hdf5"))
    obs, action, after = (log[k][:300] for k in ("observations", "actions", "next_observations"))
    next_obs, reward, terminal = envs.make_judge("halfcheetah")(obs, action)
    assert (((next_obs - after) / obs.std(0)) ** 2).mean() < 1e-5
    assert np.corrcoef(reward, log["rewards"][:300])[0, 1] > 0.999 and not terminal.any()


@pytest.mark.parametrize("task", [*envs.GYMNAX, *envs.BODIES])
def test_the_judge_put_into_a_collected_state_gives_the_collected_step(task):
    copies = envs.make_envs(task, 4)
    log = envs.collect(copies, UniformPolicy(copies.low.size), 1200, seed=3)
    obs, action, next_obs = (log[k] for k in ("observations", "actions", "next_observations"))
    found, reward, terminal = envs.make_judge(task)(obs, action)
    limit = envs.BODIES[task].max_speed if task in envs.BODIES else np.inf
    speed = np.abs(obs).max(1) < limit  # of hopper and walker2d; faster is clipped
    error = (found - next_obs) / np.maximum(obs.std(0), 1e-3)
    # MuJoCo's start from states rounded to single precision
    error = np.abs(error[speed])
    assert np.median(error) < 1e-4 and np.quantile(error, 0.95) < 0.02
    error = np.abs(reward - log["rewards"])[speed]
    assert np.median(error) < 1e-3 and np.quantile(error, 0.95) < 0.02
    assert (terminal == log["terminals"])[speed].mean() > 0.99
    assert log["terminals"][speed].sum() > 10 or task != "hopper"
    assert speed.sum() > 100
    assert np.abs(log["next_observations"] - log["observations"]).max() > 1e-2  # it moves
    np.testing.assert_allclose(envs.make_readback(task)(obs), obs, atol=1e-5)


def test_an_observation_of_no_state_is_read_back_as_that_of_the_nearest():
    off = np.array([[3.0, -4.0, 0.5]])
    np.testing.assert_allclose(envs.make_readback("pendulum")(off), [[0.6, -0.8, 0.5]], atol=1e-6)
    off = np.array([[3.0, 0.0, 4.0, 2.0, 0.1, 0.2, 0.3, 0.4]])  # cosines, sines, speeds, goal
    on = [[0.6, 0.0, 0.8, 1.0, 0.1, 0.2, 0.3, 0.4]]
    np.testing.assert_allclose(envs.make_readback("reacher")(off), on, atol=1e-6)
    fast = np.full((1, 11), 20.0)  # hopper's observations have speeds of 10 at most
    assert envs.make_readback("hopper")(fast).tolist() == [[20.0] * 5 + [10.0] * 6]


def test_a_simulator_that_takes_no_state_is_no_judge():
    assert envs.make_judge("door") is None and envs.make_judge(None) is None
    assert envs.make_readback("door") is None and envs.make_readback(None) is None


@pytest.mark.parametrize("task", ["pendulum", "pendulum in a program", "halfcheetah", "hopper"])
def test_collected_streams_follow_each_other_within_episodes(task):
    copies = envs.make_envs(task.split()[0], 4)
    uniform = UniformPolicy(copies.low.size)
    if task.endswith("program"):
        collect = lambda: envs.collect_in_program("pendulum", uniform.sample, 4, 600, seed=0)
    else:
        collect = lambda: envs.collect(envs.make_envs(task, 4), uniform, 2400, seed=0)
    log = collect()
    data.check_log(log, "log")
    ends = log["terminals"] | log["timeouts"]
    inner = np.flatnonzero(~ends[:-1])
    follows = np.abs(log["next_observations"][inner] - log["observations"][inner + 1])
    assert follows.max() < 1e-5  # compiled outputs of a gymnax step may differ in the last bit
    assert ends[[599, 1199, 1799, 2399]].all()  # where the four streams stop
    broken = np.flatnonzero(ends[:-1])
    assert not np.any(
        np.all(log["next_observations"][broken] == log["observations"][broken + 1], axis=1)
    )
    assert log["actions"].min() >= copies.low.min() and log["actions"].max() <= copies.high.max()
    assert np.abs(log["actions"]).max() > 0.9 * copies.high.max()
    if task.startswith("pendulum"):  # 200 steps an episode, and never a terminal
        assert ends.sum() == 12 and not log["terminals"].any()
    if task == "hopper":  # a random hopper falls
        assert log["terminals"].sum() > 20
    again = collect()
    np.testing.assert_array_equal(log["observations"], again["observations"])


@pytest.mark.parametrize("task", ["halfcheetah", "hopper"])
def test_a_collected_log_replays_exactly_from_its_own_states(task):
    copies = envs.make_envs(task, 3)
    act = lambda obs, rng: rng.uniform(-1, 1, (len(obs), copies.low.size))
    log = envs.collect(copies, act, 900, seed=1)
    qpos, qvel = log["infos/qpos"], log["infos/qvel"]
    replay = envs.MujocoEnvs(task, 900)
    after = replay.physics(qpos, qvel, log["actions"].astype(np.float64))
    obs = envs.observe(replay.body, *after).astype(np.float32)
    np.testing.assert_array_equal(obs, log["next_observations"])
    inner = np.flatnonzero(~(log["terminals"] | log["timeouts"]))
    np.testing.assert_array_equal(after[0][inner], qpos[inner + 1])
    np.testing.assert_array_equal(after[1][inner], qvel[inner + 1])


class Countdown:
    """A host-side environment of 3 copies that pay 1 a step and end after 2, 3 and 9 steps."""

    num = 3

    def reset(self, seed):
        self.t, self.obs = 0, np.zeros((3, 1))
        return self.obs

    def step(self, action):
        self.t += 1
        terminal, timeout = self.t == np.array([2, -1, -1]), self.t == np.array([-1, 3, 9])
        return self.obs, np.ones(3), terminal, timeout


def test_evaluation_on_the_host_counts_each_copys_first_episode_only():
    returns = envs.evaluate_on_host(Countdown(), lambda obs: np.zeros((3, 1)), 0)
    assert returns.tolist() == [2.0, 3.0, 9.0]


def test_gymnasium_copies_end_at_their_limit_and_start_again():
    copies = gym_envs.GymnasiumEnvs(lambda: gymnasium.make("Pendulum-v1"), 2, limit=4)
    copies.reset([3, 4])
    ends = []
    for _ in range(9):
        next_obs, _, _, timeout = copies.step(np.zeros((2, 1)))
        ends.append(timeout.any())
        assert np.all(copies.obs == next_obs) != timeout.any()
    assert [i for i, end in enumerate(ends) if end] == [3, 7]


# --- Extras ---


def test_maze2d_pays_at_d4rls_goal_and_moves_along_its_axes():
    pytest.importorskip("gymnasium_robotics")
    maze = envs.make_envs("maze2d-umaze", 2)
    maze.reset(0)
    inner = maze.envs[0]
    put = lambda row, column: inner.point_env.set_state(
        np.array([column + 0.7 - inner.maze.x_map_center, inner.maze.y_map_center - row - 0.7]),
        np.zeros(2),
    )  # D4RL's position + 0.2 is PointMaze's cell; + 0.5 its corner
    put(1.0, 1.0)  # the goal
    next_obs, reward, terminal, _ = maze.step(np.zeros((2, 2)))
    np.testing.assert_allclose(next_obs[0], [1.0, 1.0, 0.0, 0.0], atol=1e-3)
    assert reward[0] == 1.0 and not terminal.any()
    put(1.0, 2.0)
    next_obs, reward, _, _ = maze.step(np.tile([0.0, 1.0], (2, 1)))
    assert reward[0] == 0.0 and next_obs[0, 3] > 0.01 > abs(next_obs[0, 2])  # along the column
    put(2.0, 3.0)  # the gap of the U, open along the rows
    for _ in range(20):
        next_obs, _, _, _ = maze.step(np.tile([1.0, 0.0], (2, 1)))
    assert next_obs[0, 0] > 2.1 and abs(next_obs[0, 1] - 3.0) < 0.05
    starts = [maze.reset(seed) for seed in range(30)]
    cells = {tuple(np.round(obs[0, :2]).astype(int)) for obs in starts}
    free = {(1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)}  # the U without the goal
    assert cells <= free and len(cells) > 3
    dense = envs.make_envs("maze2d-umaze-dense", 1)
    obs = dense.reset(3)
    next_obs, reward, _, _ = dense.step(np.zeros((1, 2)))
    distance = np.linalg.norm(next_obs[0, :2] - [1.0, 1.0])
    assert reward[0] == pytest.approx(np.exp(-distance), abs=1e-5) and obs.shape == (1, 4)


def test_adroit_has_the_dimensions_of_d4rls_logs():
    pytest.importorskip("gymnasium_robotics")
    door = envs.make_envs("door", 1)
    door.reset(0)
    assert (door.obs_dim, door.low.size, door.limit) == (39, 28, 200)
    task = data.load("door-human", str(real_log("door-human-v0.hdf5")))
    assert task.simulator == "door" and task.action_high.max() == 1.0


def test_a_missing_extra_is_said_in_a_line_and_costs_the_returns_only(monkeypatch, capsys):
    monkeypatch.setattr(envs.importlib.util, "find_spec", lambda name: None)
    task = data.load("door-human", str(real_log("door-human-v0.hdf5")))
    said = capsys.readouterr().err
    assert task.simulator is None and "pip install gymnasium-robotics" in said


def test_an_unknown_simulator_names_those_that_are_there():
    with pytest.raises(UserError, match="halfcheetah"):
        envs.make_envs("halfcheeta", 1)


def test_ant_is_gymnasiums_with_contact_forces_of_zero():
    ant = envs.make_envs("ant", 2)
    obs = ant.reset([3, 4])
    same = gymnasium.make("Ant-v4", disable_env_checker=True)
    first, _ = same.reset(seed=4)
    assert obs.shape == (2, 111) and not obs[:, 27:].any()
    np.testing.assert_allclose(obs[1, :27], first, rtol=1e-6)
    x = ant.envs[1].data.body("torso").xpos[0]
    action = np.random.default_rng(0).uniform(-1, 1, (2, 8))
    _, reward, terminal, _ = ant.step(action)
    moved = ant.envs[1].data.body("torso").xpos[0] - x
    assert reward[1] == pytest.approx(moved / 0.05 + 1.0 - 0.5 * np.sum(action[1] ** 2), rel=1e-5)
    assert not terminal.any() and ant.limit == 1000


@pytest.mark.parametrize(
    "task, goal, of_ogbench",
    [
        ("antmaze-umaze", (0.0, 8.0), None),
        ("antmaze-medium", (20.0, 20.0), "antmaze-medium-v0"),
        ("antmaze-large", (32.0, 24.0), "antmaze-large-v0"),
    ],
)
def test_antmaze_has_d4rls_walls_ant_and_goal(task, goal, of_ogbench):
    pytest.importorskip("ogbench")
    maze = envs.make_envs(task, 2)
    obs = maze.reset(0)
    assert obs.shape == (2, 29) and np.abs(obs[:, :2]).max() <= 0.1  # the start is the origin
    model = maze.envs[0].model
    boxes = {tuple(p[:2]) for p, kind in zip(model.geom_pos, model.geom_type) if kind == 6}
    if of_ogbench:  # the same maze, from another source; its start is at row 1, column 1
        cells = gymnasium.make(of_ogbench, disable_env_checker=True).unwrapped.maze_map
        walls = {(4.0 * (c - 1), 4.0 * (r - 1)) for r, c in np.argwhere(np.array(cells) == 1)}
        assert boxes == walls
    else:
        assert len(boxes) == 18 and (0.0, 4.0) in boxes and (8.0, 4.0) not in boxes
    # D4RL's ant: torques up to 30, 0.1 s per action
    torque = model.actuator_gear[:, 0] * model.actuator_ctrlrange[:, 1]
    assert set(torque) == {30.0} and model.opt.timestep * maze.envs[0].frame_skip == 0.1
    goals = []
    for seed in range(20):
        maze.reset(seed)
        goals.append(maze.goals[maze.envs[0]])
    beyond = np.array(goals) - goal
    assert beyond.min() >= 0 and beyond.max() <= 1.5 and np.ptp(beyond) > 0.5
    env = maze.envs[0]
    for offset, reached in [(-0.8, 0.0), (-0.3, 1.0)]:
        qpos = np.copy(env.init_qpos)
        qpos[:2] = maze.goals[env] + [offset, 0.0]
        env.set_state(qpos, env.init_qvel)
        _, reward, terminal, _ = maze.step(np.zeros((2, 8)))
        assert (reward[0], terminal[0]) == (reached, bool(reached)) and reward[1] == 0.0


def test_kitchen_counts_tasks_in_d4rls_layout():
    if lacks := envs.missing("kitchen"):
        pytest.skip(f"kitchen needs {lacks}")
    kitchen = envs.make_envs("kitchen-mixed", 2)
    obs = kitchen.reset(0)
    assert obs.shape == (2, 60) and kitchen.limit == 280
    goal = obs[0, 30:]
    np.testing.assert_allclose(goal[[11, 12, 17, 18, 22]], [-0.88, -0.01, -0.69, -0.05, -0.75])
    assert not goal[:11].any() and not goal[19:22].any()  # the slide cabinet is not asked for
    env, total = kitchen.envs[0], 0.0
    at = {"microwave": [22], "light switch": [17, 18], "bottom burner": [11, 12]}
    for place in at.values():
        qpos = env.data.qpos.copy()
        qpos[place] = goal[place]
        env.robot_env.set_state(qpos, 0 * env.data.qvel)
        after, reward, terminal, _ = kitchen.step(np.zeros((2, 9)))
        assert reward.tolist() == [1.0, 0.0] and not terminal.any()
        np.testing.assert_allclose(after[0, place], goal[place], atol=0.3)
        total += reward[0]
    qpos = env.data.qpos.copy()
    qpos[23:30] = goal[23:30]
    env.robot_env.set_state(qpos, 0 * env.data.qvel)
    _, reward, terminal, _ = kitchen.step(np.zeros((2, 9)))
    assert total + reward[0] == 4.0 and terminal.tolist() == [True, False]


def test_a_simulator_that_lacks_its_package_says_which(monkeypatch):
    monkeypatch.setattr(envs.importlib.util, "find_spec", lambda name: None)
    assert envs.missing("antmaze-large") == "ogbench"
    assert envs.missing("kitchen") == "gymnasium-robotics" and envs.missing("hopper") is None
    monkeypatch.setattr(envs.importlib.util, "find_spec", lambda name: True)
    for number, lacks in [("3.9.1", None), ("4.0.0", "'mujoco<4'")]:
        monkeypatch.setattr(envs, "version", lambda name, number=number: number)
        assert envs.missing("kitchen") == lacks and envs.missing("door") is None
