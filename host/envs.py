"""Simulators: batches of environments on the host, and tasks as pure functions in JAX.

    envs = make_envs("halfcheetah", 50)                 # C MuJoCo in threads, numpy in and out
    returns = evaluate_on_host(envs, act, seed=0)       # one episode in every copy
    evaluate = evaluator_in_program("pendulum", 10)     # a pure function, to compile into a run
    log = collect(envs, policy, steps=100_000, seed=0)  # D4RL's arrays

Every batch of environments has the same interface. `num` is the number of copies, `limit` the
maximal steps per episode, `obs_dim` the size of an observation, and `low` and `high` (A,) bound
the actions. `reset(seed) -> obs` starts all copies. `step(action) -> (next_obs, reward, terminal,
timeout)` steps all copies, and restarts those whose episode has ended. `obs` is the observation
to act on next. The episodes of a copy depend on the seed of that copy alone.
"""

import contextlib
import functools
import importlib.util
import io
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from host.cores import num_cores
from host.errors import UserError
from host.files import require
from host.gym_envs import D4RL, quiet_stderr, seeds_of

# --- MuJoCo, the three tasks of D4RL's -v2 logs ---


class Body(NamedTuple):
    """The constants of one of gymnasium's -v4 tasks, which have the physics and observations of
    D4RL's -v2 logs. Walker2d-v5 has another foot friction, Hopper-v5 another reward at a fall."""

    xml: str  # file in gymnasium's assets
    frame_skip: int  # physics steps per action
    control_cost: float  # weight of the squared action in the reward
    healthy_reward: float  # reward of every step
    noise: float  # scale of the random start
    normal_velocities: bool  # start velocities are normal if true, uniform if false
    max_speed: float = np.inf  # clipping of the observed velocities
    height: tuple[float, float] = (-np.inf, np.inf)  # of the torso (m); outside is a terminal
    angle: tuple[float, float] = (-np.inf, np.inf)  # of the torso (rad); outside is a terminal
    bound: float = np.inf  # magnitude of every other state variable; beyond it is a terminal


BODIES = {
    "halfcheetah": Body("half_cheetah.xml", 5, 0.1, 0.0, 0.1, True),
    "hopper": Body(
        "hopper.xml", 4, 1e-3, 1.0, 5e-3, False, 10.0, (0.7, np.inf), (-0.2, 0.2), 100.0
    ),
    "walker2d": Body("walker2d.xml", 4, 1e-3, 1.0, 5e-3, False, 10.0, (0.8, 2.0), (-1.0, 1.0)),
}
EPISODE = 1000  # maximal steps per episode of the three tasks


@functools.cache
def load_body(task: str):
    """Task name -> (Body, mujoco.MjModel). Raises UserError without mujoco or gymnasium."""
    mujoco = require("mujoco", "gymnasium[mujoco]")
    require("gymnasium", "gymnasium[mujoco]")
    folder = Path(importlib.util.find_spec("gymnasium").origin).parent / "envs" / "mujoco"
    # MuJoCo 4.0 warns of an attribute in gymnasium's files, on stderr and in a file in the current
    # folder
    with quiet_stderr(), tempfile.TemporaryDirectory() as away, contextlib.chdir(away):
        model = mujoco.MjModel.from_xml_path(str(folder / "assets" / BODIES[task].xml))
    return BODIES[task], model


def observe(body: Body, qpos, qvel, xp=np):
    """qpos (..., Q), qvel (..., V) -> obs (..., Q - 1 + V), which omits the position along the
    track. xp: numpy or jax.numpy."""
    return xp.concatenate([qpos[..., 1:], xp.clip(qvel, -body.max_speed, body.max_speed)], -1)


def reward_and_terminal(body: Body, seconds: float, before, qpos, qvel, action, xp=np):
    """One step of a task -> reward (...), terminal (...).

    seconds: simulated time of the step. before (...): position along the track before the step.
    qpos (..., Q), qvel (..., V): state after the step. xp: numpy or jax.numpy.
    """
    reward = (qpos[..., 0] - before) / seconds + body.healthy_reward
    reward = reward - body.control_cost * xp.sum(action**2, -1)
    low, high = (xp.asarray(b) for b in zip(body.height, body.angle))
    healthy = xp.all((qpos[..., 1:3] > low) & (qpos[..., 1:3] < high), -1)
    rest = xp.concatenate([qpos[..., 2:], qvel], -1)
    return reward, ~(healthy & xp.all(xp.abs(rest) < body.bound, -1))


class MujocoEnvs:
    """`num` copies of a MuJoCo task, stepped in C threads with one call per action.

    Each step is a pure function of (qpos, qvel, action), because the solver starts cold. A row does
    not depend on its neighbours, and a logged state replays to the last bit.
    """

    def __init__(self, task: str, num: int, threads: int | None = None):
        self.body, self.model = load_body(task)
        mujoco = require("mujoco", "gymnasium[mujoco]")
        rollout = require("mujoco.rollout", "gymnasium[mujoco]")
        threads = min(threads or num_cores(), num)
        self._pool = rollout.Rollout(nthread=threads)
        self._data = [mujoco.MjData(self.model) for _ in range(threads)]
        self._models = [self.model] * num
        self.num, self.limit = num, EPISODE
        bounds = self.model.actuator_ctrlrange.astype(np.float32)
        self.low, self.high = bounds[:, 0], bounds[:, 1]
        self.num_qpos, self.num_qvel = self.model.nq, self.model.nv
        self.obs_dim = self.num_qpos - 1 + self.num_qvel
        self.seconds = self.model.opt.timestep * self.body.frame_skip
        steps, size = self.body.frame_skip, 1 + self.num_qpos + self.num_qvel
        self._control = np.empty((num, steps, self.model.nu))
        self._path = np.empty((num, steps, size))  # time, qpos, qvel after every physics step
        self._sensors = np.empty((num, steps, self.model.nsensordata))
        self._state = np.zeros((num, size))

    def physics(self, qpos: np.ndarray, qvel: np.ndarray, action: np.ndarray):
        """qpos (num, Q), qvel (num, V), action (num, A) -> qpos, qvel one step later."""
        self._state[:, 1:] = np.concatenate([qpos, qvel], axis=1)
        self._control[:] = action[:, None]
        steps = self.body.frame_skip
        self._pool.rollout(
            self._models, self._data, self._state, self._control, skip_checks=True, nstep=steps,
            state=self._path, sensordata=self._sensors,
        )  # fmt: skip
        return np.split(self._path[:, -1, 1:].copy(), [self.num_qpos], axis=1)

    def _start(self, i: int) -> None:
        """Draw a random start for copy i with gymnasium's distribution and order of draws."""
        rng, noise = self._rng[i], self.body.noise
        self.qpos[i] = self.model.qpos0 + rng.uniform(-noise, noise, self.num_qpos)
        if self.body.normal_velocities:
            self.qvel[i] = noise * rng.standard_normal(self.num_qvel)
        else:
            self.qvel[i] = rng.uniform(-noise, noise, self.num_qvel)
        self._age[i] = 0

    def reset(self, seed: int | Sequence[int]) -> np.ndarray:
        """Start every copy -> obs (num, O). seed: one number, or one for each copy."""
        self._rng = [np.random.default_rng(int(s)) for s in seeds_of(seed, self.num)]
        self.qpos, self.qvel = (np.empty((self.num, n)) for n in (self.num_qpos, self.num_qvel))
        self._age = np.zeros(self.num, np.int64)
        for i in range(self.num):
            self._start(i)
        self.obs = observe(self.body, self.qpos, self.qvel).astype(np.float32)
        return self.obs

    def step(self, action: np.ndarray):
        """action (num, A) -> next_obs (num, O), reward, terminal, timeout (num,).

        Afterwards self.obs (num, O) is the observation to act on next. Where an episode has ended,
        it is the first of a new episode and differs from next_obs.
        """
        action, before = np.asarray(action, np.float64), self.qpos[:, 0].copy()
        self.qpos, self.qvel = self.physics(self.qpos, self.qvel, action)
        reward, terminal = reward_and_terminal(
            self.body, self.seconds, before, self.qpos, self.qvel, action
        )
        next_obs = observe(self.body, self.qpos, self.qvel).astype(np.float32)
        self._age += 1
        timeout = ~terminal & (self._age >= self.limit)
        self.obs = next_obs
        ended = np.flatnonzero(terminal | timeout)
        if len(ended):
            for i in ended:
                self._start(i)
            self.obs = observe(self.body, self.qpos, self.qvel).astype(np.float32)
        return next_obs, reward.astype(np.float32), terminal, timeout


def state_from_obs(obs: np.ndarray, num_qpos: int) -> tuple[np.ndarray, np.ndarray]:
    """obs (N, O) -> qpos (N, Q), qvel (N, V). The position along the track is set to 0; it has no
    influence on the physics."""
    obs = np.asarray(obs, np.float64)
    return np.pad(obs[:, : num_qpos - 1], ((0, 0), (1, 0))), obs[:, num_qpos - 1 :]


# --- MuJoCo through MJX: the same three tasks in pure JAX ---


def has_mjx() -> bool:
    """True if mujoco-mjx is installed."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec("mujoco.mjx") is not None
    return False


def make_mjx(task: str):
    """Task name -> (reset, step), pure functions.

    reset(key) -> (obs (O,), state), and step(state, action (A,)) -> (obs, state, reward, terminal),
    where state is (qpos (Q,), qvel (V,)). Steps agree with C MuJoCo to about 1e-6; rare larger
    differences occur where a contact begins. Whole episodes diverge, because the system is chaotic.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that the optional warp is missing
        mjx = require("mujoco.mjx", "mujoco-mjx")
    import jax
    import jax.numpy as jnp

    body, model = load_body(task)
    seconds = model.opt.timestep * body.frame_skip
    device_model, start = mjx.put_model(model, impl="jax"), mjx.make_data(model, impl="jax")

    def reset(key):
        key_qpos, key_qvel = jax.random.split(key)
        uniform = lambda key, n: jax.random.uniform(
            key, (n,), minval=-body.noise, maxval=body.noise
        )
        qpos = jnp.asarray(model.qpos0, jnp.float32) + uniform(key_qpos, model.nq)
        if body.normal_velocities:
            qvel = body.noise * jax.random.normal(key_qvel, (model.nv,))
        else:
            qvel = uniform(key_qvel, model.nv)
        return observe(body, qpos, qvel, jnp), (qpos, qvel)

    def step(state, action):
        qpos, qvel = state
        data = start.replace(qpos=qpos, qvel=qvel, ctrl=action)
        data = jax.lax.fori_loop(0, body.frame_skip, lambda _, d: mjx.step(device_model, d), data)
        after = data.qpos, data.qvel
        reward, terminal = reward_and_terminal(body, seconds, qpos[0], *after, action, jnp)
        return observe(body, *after, jnp), after, reward, terminal

    return reset, step


# --- gymnax ---


GYMNAX = {
    "pendulum": "Pendulum-v1",
    "reacher": "Reacher-misc",
    "mountaincar-continuous": "MountainCarContinuous-v0",
    "swimmer": "Swimmer-misc",
}


def make_gymnax(task: str):
    """Task name -> (gymnax environment, its parameters, lowest action (A,), highest action
    (A,))."""
    gymnax = require("gymnax", "gymnax six")
    env, params = gymnax.make(GYMNAX[task])
    space = env.action_space(params)
    low, high = (np.broadcast_to(np.float32(b), space.shape) for b in (space.low, space.high))
    return env, params, low, high


def gymnax_state(task: str, state, obs):
    """A gymnax state and obs (O,) -> the state with the variables that obs determines.

    Angles come from their cosine and sine, which need not have unit length.
    """
    from jax.numpy import arctan2

    if task == "pendulum":
        return state.replace(theta=arctan2(obs[1], obs[0]), theta_dot=obs[2])
    if task == "reacher":
        cos, sin, speed, goal = obs.reshape(4, 2)
        return state.replace(angles=arctan2(sin, cos), angle_vels=speed, goal_xy=goal)
    if task == "mountaincar-continuous":
        return state.replace(position=obs[0], velocity=obs[1])
    urchins, (xy, speed, goal) = obs[:-6].reshape(-1, 2), obs[-6:].reshape(3, 2)
    return state.replace(urchin_xys=urchins, xy=xy, xy_vel=speed, goal_xy=goal)


class GymnaxEnvs:
    """`num` copies of a gymnax task on the host, with the interface of MujocoEnvs."""

    def __init__(self, task: str, num: int):
        import jax

        env, params, self.low, self.high = make_gymnax(task)
        self.num, self.limit = num, int(params.max_steps_in_episode)
        self.obs_dim = env.observation_space(params).shape[0]

        @jax.jit
        def reset(seed):
            keys = jax.random.split(jax.random.key(seed), num)
            return jax.vmap(env.reset, in_axes=(0, None))(keys, params)

        @jax.jit
        def step(seed, t, state, action):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), t), num)
            return jax.vmap(env.step, in_axes=(0, 0, 0, None))(keys, state, action, params)

        self._reset_all, self._step_all = reset, step

    def reset(self, seed: int) -> np.ndarray:
        """Start every copy -> obs (num, O)."""
        self._seed, self._t = seed, 0
        obs, self._state = self._reset_all(seed)
        self.obs = np.asarray(obs, np.float32)
        return self.obs

    def step(self, action: np.ndarray):
        """action (num, A) -> next_obs (num, O), reward, terminal, timeout (num,), as MujocoEnvs
        gives them."""
        self._t += 1
        out = self._step_all(self._seed, self._t, self._state, np.asarray(action, np.float32))
        obs, self._state, reward, terminal, timeout, info = out
        self.obs = np.asarray(obs, np.float32)
        next_obs = np.asarray(info["final_observation"], np.float32)
        terminal, timeout = np.asarray(terminal, bool), np.asarray(timeout, bool)
        return next_obs, np.asarray(reward, np.float32), terminal, timeout & ~terminal


# --- By name ---


def simulators() -> list[str]:
    """-> every name that make_envs accepts."""
    return [*BODIES, *GYMNAX, *D4RL]


def missing(task: str) -> str | None:
    """Name of a simulator -> the pip package that it lacks here; None if it can be used."""
    if task not in D4RL:
        return None
    package, too_new = D4RL[task].package, D4RL[task].mujoco_below
    if importlib.util.find_spec(package) is None:
        return package.replace("_", "-")
    with contextlib.suppress(PackageNotFoundError):
        if too_new and int(version("mujoco").split(".")[0]) >= too_new:
            return f"'mujoco<{too_new}'"
    return None


def make_envs(task: str, num: int):
    """`num` copies on the host of a simulator such as halfcheetah, pendulum, antmaze-large or door.
    Raises UserError on an unknown name or a missing package."""
    if task in GYMNAX:
        return GymnaxEnvs(task, num)
    if task in BODIES:
        return MujocoEnvs(task, num)
    if task in D4RL:
        return D4RL[task].make(num)
    raise UserError(f"there is no simulator for {task!r}; there is {', '.join(simulators())}")


# --- Evaluation and collection ---


def evaluate_on_host(envs, act: Callable, seed: int | Sequence[int]) -> np.ndarray:
    """Run one episode in every copy -> undiscounted returns (num,).

    act: obs (num, O) -> actions (num, A) in the environment's units. seed: one number, or one for
    each copy.
    """
    obs, returns, alive = envs.reset(seed), np.zeros(envs.num), np.ones(envs.num, bool)
    while alive.any():
        _, reward, terminal, timeout = envs.step(act(obs))
        obs = envs.obs
        returns += reward * alive
        alive &= ~(terminal | timeout)
    return returns


def evaluator_in_program(task: str | None, episodes: int, mjx: bool = False) -> Callable | None:
    """Task name -> evaluate(key, act) -> undiscounted returns (episodes,), a pure JAX function.

    None if the task has no simulator in JAX. The MuJoCo tasks have one through MJX, which is used
    only if `mjx` is true. act: obs (O,) -> action (A,) in the environment's units.
    """
    import jax
    import jax.numpy as jnp

    if task in GYMNAX:
        env, params, _, _ = make_gymnax(task)
        limit, reset = params.max_steps_in_episode, lambda key: env.reset(key, params)

        def step(key, state, action):
            obs, state, reward, terminal, timeout, _ = env.step(key, state, action, params)
            return obs, state, reward, terminal | timeout

    elif task in BODIES and mjx:
        reset, mjx_step = make_mjx(task)
        limit, step = EPISODE, lambda key, state, action: mjx_step(state, action)
    else:
        return None

    def episode(key, act):
        key_reset, key_steps = jax.random.split(key)

        def one_step(carry, key):
            obs, state, alive = carry
            obs, state, reward, ended = step(key, state, act(obs))
            return (obs, state, alive & ~ended), reward * alive

        carry = *reset(key_reset), jnp.array(True)
        return jnp.sum(jax.lax.scan(one_step, carry, jax.random.split(key_steps, limit))[1])

    def evaluate(key, act):
        return jax.vmap(episode, in_axes=(0, None))(jax.random.split(key, episodes), act)

    return evaluate


def scale_action(action, low, high):
    """action (..., A) in [-1, 1] -> in the environment's units, from low (A,) to high (A,)."""
    return low + (action + 1.0) * 0.5 * (high - low)


def collect(envs, policy: Callable, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Collect `steps` transitions -> a log of N = steps rows in D4RL's layout, with
    next_observations.

    policy: (obs (n, O), rng) -> actions (n, A) in [-1, 1]. Each copy of the environment makes one
    stream of steps // num transitions, rounded up, and the streams are concatenated. Short episodes
    are therefore not over-represented. The last episode of a stream ends by a timeout. MuJoCo tasks
    also give their exact states, as infos/qpos (N, Q) and infos/qvel (N, V).
    """
    length = -(-steps // envs.num)
    rng = np.random.default_rng(seed)
    obs = envs.reset(seed)
    num, act_dim = envs.num, envs.low.size
    shapes = {
        "observations": ((envs.obs_dim,), np.float32),
        "actions": ((act_dim,), np.float32),
        "rewards": ((), np.float32),
        "terminals": ((), bool),
        "timeouts": ((), bool),
        "next_observations": ((envs.obs_dim,), np.float32),
    }
    if isinstance(envs, MujocoEnvs):
        shapes["infos/qpos"] = ((envs.num_qpos,), np.float64)
        shapes["infos/qvel"] = ((envs.num_qvel,), np.float64)
    log = {k: np.empty((num, length, *shape), kind) for k, (shape, kind) in shapes.items()}
    for t in tqdm(range(length), "collect", unit_scale=num, unit=" steps", disable=None):
        action = scale_action(policy(obs, rng), envs.low, envs.high).astype(np.float32)
        state = [envs.qpos, envs.qvel] if "infos/qpos" in log else []
        state = [x.copy() for x in state]
        next_obs, reward, terminal, timeout = envs.step(action)
        row = (obs, action, reward, terminal, timeout, next_obs, *state)
        for array, x in zip(log.values(), row):
            array[:, t] = x
        obs = envs.obs
    log["timeouts"][:, -1] |= ~log["terminals"][:, -1]
    return {k: v.reshape(num * length, *v.shape[2:])[:steps] for k, v in log.items()}


def collect_in_program(task: str, policy: Callable, num: int, length: int, seed: int) -> dict:
    """Collect a gymnax task's log in one compiled program -> num * length rows in D4RL's layout.

    policy: (key, obs (O,)) -> action (A,) in [-1, 1], a JAX function. The log is `num` streams of
    `length` steps, concatenated; the last episode of a stream ends by a timeout.
    """
    import jax
    import jax.numpy as jnp

    env, params, low, high = make_gymnax(task)

    @jax.jit
    def run(key):
        key_reset, key_steps = jax.random.split(key)
        reset = jax.vmap(env.reset, in_axes=(0, None))
        start = reset(jax.random.split(key_reset, num), params)

        def one(key, obs, state):
            key_act, key_env = jax.random.split(key)
            action = scale_action(policy(key_act, obs), low, high)
            after, state, reward, terminal, timeout, info = env.step(key_env, state, action, params)
            row = obs, action, reward, terminal, timeout & ~terminal, info["final_observation"]
            return (after, state), row

        step = lambda carry, key: jax.vmap(one)(jax.random.split(key, num), *carry)
        rows = jax.lax.scan(step, start, jax.random.split(key_steps, length))[1]
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), rows)

    names = "observations actions rewards terminals timeouts next_observations".split()
    log = {k: np.array(x) for k, x in zip(names, run(jax.random.key(seed)))}
    log["timeouts"][:, -1] |= ~log["terminals"][:, -1]
    return {k: v.reshape(num * length, *v.shape[2:]) for k, v in log.items()}


# --- True successors, to compare a model's with ---


def make_judge(simulator: str) -> Callable | None:
    """Name of a simulator -> judge(obs (N, O), action (N, A)) -> next_obs (N, O), reward (N,),
    terminal (N,).

    The judge puts the simulator into the states that obs describes and steps it once, all in the
    environment's units. None if the simulator cannot be put into the state of an observation.
    """
    if simulator in BODIES:
        return functools.partial(_judge_by_mujoco, simulator)
    if simulator not in GYMNAX:
        return None
    import jax

    env, params, state_of = _gymnax_states(simulator)

    def one_step(obs, action):  # the step itself is not random
        out = env.step_env(jax.random.key(0), state_of(obs), action, params)
        next_obs, _, reward, terminal, *_ = out
        return next_obs, reward, terminal

    step = jax.jit(jax.vmap(one_step))
    return lambda obs, action: jax.tree.map(np.asarray, step(np.float32(obs), np.float32(action)))


def make_readback(simulator: str) -> Callable | None:
    """Name of a simulator -> readback(obs (N, O)) -> (N, O), in the environment's units: what the
    simulator observes in the states that obs describes.

    It differs from obs where no state has this observation, such as a cosine and a sine whose
    squares do not add up to 1. None where make_judge gives None.
    """
    if simulator in BODIES:
        body, model = load_body(simulator)
        return lambda obs: observe(body, *state_from_obs(obs, model.nq))
    if simulator not in GYMNAX:
        return None
    import jax

    env, params, state_of = _gymnax_states(simulator)
    read = jax.jit(jax.vmap(lambda obs: env.get_obs(state_of(obs), params)))
    return lambda obs: np.asarray(read(np.float32(obs)))


def _gymnax_states(task: str):
    """-> the task's environment and parameters, and a function obs (O,) -> state."""
    import jax

    env, params, _, _ = make_gymnax(task)
    _, start = env.reset_env(jax.random.key(0), params)
    return env, params, lambda obs: gymnax_state(task, start, obs)


def _judge_by_mujoco(task: str, obs: np.ndarray, action: np.ndarray):
    """obs (N, O), action (N, A) -> next_obs (N, O), reward (N,), terminal (N,) by C MuJoCo."""
    envs, action = MujocoEnvs(task, len(obs)), np.asarray(action, np.float64)
    qpos, qvel = state_from_obs(obs, envs.num_qpos)
    after = envs.physics(qpos, qvel, action)
    outcome = reward_and_terminal(envs.body, envs.seconds, qpos[:, 0], *after, action)
    return observe(envs.body, *after), *outcome


def render(task: str, obs: np.ndarray, size: int = 120) -> np.ndarray:
    """obs (N, O) of a MuJoCo task -> frames (N, size, size, 3) uint8, all at position 0 of the
    track.

    Needs OpenGL. Without a display, set MUJOCO_GL to egl or osmesa before MuJoCo is imported.
    """
    mujoco = require("mujoco", "gymnasium[mujoco]")
    _, model = load_body(task)
    state, frames = mujoco.MjData(model), []
    camera = mujoco.MjvCamera()
    camera.distance, camera.elevation, camera.azimuth = 3.5, -10.0, 90.0
    with contextlib.closing(mujoco.Renderer(model, size, size)) as renderer:
        for qpos, _ in zip(*state_from_obs(obs, model.nq)):
            state.qpos[:] = qpos
            mujoco.mj_forward(model, state)
            camera.lookat[:] = (0.0, 0.0, qpos[1] if task != "halfcheetah" else 0.3)
            renderer.update_scene(state, camera)
            frames.append(renderer.render())
    return np.stack(frames)
