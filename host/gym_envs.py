"""Simulators made of gymnasium environments, one Python object per copy: D4RL's tasks beside the
three MuJoCo bodies.

    envs = D4RL["antmaze-large"].make(num=10)   # the interface of host/envs.py

Each task is the environment of a package, in D4RL's observations, actions, rewards and ends.
"""

import contextlib
import functools
import os
import re
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from host.errors import UserError
from host.files import require

# --- Any environment of gymnasium ---


def seeds_of(seed: int | Sequence[int], num: int) -> np.ndarray:
    """One seed, or one for each copy -> seeds (num,)."""
    return np.random.SeedSequence(seed).generate_state(num) if np.ndim(seed) == 0 else seed


@contextlib.contextmanager
def quiet_stderr():
    """Discard what C code writes to stderr inside the block."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """Work in a temporary folder, which also takes the temporary files of a package that leaves
    its own behind."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as away, contextlib.chdir(away):
        try:
            tempfile.tempdir = away
            yield
        finally:
            tempfile.tempdir = before


class GymnasiumEnvs:
    """`num` gymnasium environments with the interface of MujocoEnvs.

    make() -> an environment with actions in a Box and observations that gymnasium can flatten.
    limit: maximal steps per episode; None for the environment's own. space: the observation space
    that gives the order of flattening; None for the environment's own. wraps: keep its wrappers on.
    Raises UserError on an
    environment without a limit or without continuous actions.
    """

    def __init__(
        self, make: Callable, num: int, limit: int | None = None, space=None, wraps: bool = False
    ):
        self.gymnasium = require("gymnasium", "gymnasium[mujoco]")
        with quiet_stderr(), scratch():
            made = [make() for _ in range(num)]
        self.num, self.limit = num, limit or made[0].spec.max_episode_steps
        if self.limit is None:
            raise UserError(f"{made[0].spec.id} has no limit on its episodes")
        self.envs = made if wraps else [env.unwrapped for env in made]
        self.space = self.envs[0].observation_space if space is None else space
        actions = self.envs[0].action_space
        if not isinstance(actions, self.gymnasium.spaces.Box):
            raise UserError(f"{made[0].spec.id} has no continuous actions, but {actions}")
        self.low, self.high = actions.low.astype(np.float32), actions.high.astype(np.float32)
        self.obs_dim = self.flatten(self.envs[0].reset(seed=0)[0]).size

    def flatten(self, obs) -> np.ndarray:
        """An observation of one environment -> (O,)."""
        return self.gymnasium.spaces.flatten(self.space, obs)

    def _start(self, env, seed: int | None) -> np.ndarray:
        return self.flatten(env.reset(seed=seed)[0])

    def _step(self, env, action: np.ndarray):
        obs, reward, terminal = env.step(action)[:3]
        return self.flatten(obs), reward, terminal

    def reset(self, seed: int | Sequence[int]) -> np.ndarray:
        """Start every copy -> obs (num, O). seed: one number, or one for each copy."""
        seeds = seeds_of(seed, self.num)
        obs = [self._start(env, int(s)) for env, s in zip(self.envs, seeds)]
        self.obs = np.stack(obs).astype(np.float32)
        self._age = np.zeros(self.num, np.int64)
        return self.obs

    def step(self, action: np.ndarray):
        """action (num, A) -> next_obs (num, O), reward, terminal, timeout (num,), as MujocoEnvs
        gives them."""
        action = np.asarray(action, np.float64)
        results = [self._step(env, a) for env, a in zip(self.envs, action)]
        next_obs = np.stack([r[0] for r in results]).astype(np.float32)
        reward = np.array([r[1] for r in results], np.float32)
        terminal = np.array([r[2] for r in results], bool)
        self._age += 1
        timeout = ~terminal & (self._age >= self.limit)
        self.obs = next_obs.copy()
        for i in np.flatnonzero(terminal | timeout):
            self.obs[i], self._age[i] = self._start(self.envs[i], None), 0
        return next_obs, reward, terminal, timeout


class OwnEnvs(GymnasiumEnvs):
    """`num` copies of an environment that the user's own module registers: MODULE:EnvId-v0. Its
    wrappers stay on. Raises UserError where it cannot be made."""

    def __init__(self, name: str, num: int):
        gymnasium = require("gymnasium", "gymnasium[mujoco]")
        gymnasium.logger.min_level = gymnasium.logger.ERROR
        if not re.fullmatch(r"[\w.]+:[\w./-]+", name):
            raise UserError(
                f"--judge {name} should be MODULE:EnvId-v0: a module and what it registers"
            )
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            super().__init__(
                lambda: gymnasium.make(name, disable_env_checker=True), num, wraps=True
            )
        except UserError:
            raise
        except Exception as e:  # a user's code may raise anything
            raise UserError(f"--judge {name} cannot be made ({type(e).__name__}: {e})") from e

    def _step(self, env, action):
        obs, reward, terminal, truncated, _ = env.step(action.astype(env.action_space.dtype))
        return self.flatten(obs), reward, terminal or truncated  # either ends the episode


# --- maze2d, through gymnasium-robotics ---


MAZES = {  # gymnasium-robotics' name, D4RL's goal (row, column), steps per episode
    "maze2d-umaze": ("PointMaze_UMaze-v3", (1, 1), 300),
    "maze2d-medium": ("PointMaze_Medium-v3", (6, 6), 600),
    "maze2d-large": ("PointMaze_Large-v3", (7, 9), 800),
}
MAZES |= {f"{name}-dense": maze for name, maze in MAZES.items()}


def make_robotics(name: str, **settings):
    """Name in gymnasium-robotics -> an environment. Raises UserError if the package is missing."""
    gymnasium = require("gymnasium", "gymnasium[mujoco]")
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # gymnasium-robotics warns at every make
    gymnasium.register_envs(require("gymnasium_robotics", "gymnasium-robotics"))
    return gymnasium.make(name, disable_env_checker=True, **settings)


class MazeEnvs(GymnasiumEnvs):
    """D4RL's maze2d: D4RL's coordinates, fixed goal and reward, with PointMaze's physics.

    D4RL's position is (row, column) - 0.2, where the centre of a cell has whole numbers. PointMaze
    has Cartesian positions with the origin in the middle of the maze. The reward is 1 within 0.5 of
    the goal and 0 elsewhere; a `-dense` task pays exp(-distance). No episode ends before its limit.
    """

    def __init__(self, task: str, num: int):
        name, self.goal, limit = MAZES[task]
        self.dense = task.endswith("-dense")
        super().__init__(lambda: make_robotics(name), num, limit)

    def flatten(self, obs) -> np.ndarray:
        """PointMaze's observation -> D4RL's (4,): row, column and their velocities."""
        maze, (x, y, vx, vy) = self.envs[0].maze, obs["observation"]
        row, column = maze.y_map_center - y - 0.5, x + maze.x_map_center - 0.5
        return np.array([row - 0.2, column - 0.2, -vy, vx])

    def _start(self, env, seed):
        obs, _ = env.reset(seed=seed)
        rng, maze = env.np_random, env.maze
        free = [(r, c) for r, row in enumerate(maze.maze_map) for c, x in enumerate(row) if x != 1]
        free = [cell for cell in free if cell != self.goal]
        row, column = np.array(free[rng.integers(len(free))]) + 0.2 + rng.uniform(-0.1, 0.1, 2)
        qpos = np.array([column + 0.5 - maze.x_map_center, maze.y_map_center - row - 0.5])
        env.point_env.set_state(qpos, 0.1 * rng.standard_normal(2))
        env.goal = np.full(2, np.inf)  # PointMaze's own goal must not count
        state = np.concatenate([env.point_env.data.qpos, env.point_env.data.qvel])
        return self.flatten({"observation": state})

    def _step(self, env, action):
        obs = self.flatten(
            {"observation": env.point_env.step(np.array([action[1], -action[0]]))[0]}
        )
        distance = np.linalg.norm(obs[:2] - self.goal)
        return obs, np.exp(-distance) if self.dense else float(distance <= 0.5), False


# --- ant, through gymnasium ---


class AntEnvs(GymnasiumEnvs):
    """D4RL's ant-v2: gymnasium's Ant-v4 with 84 zeros at the end of each observation, where D4RL's
    simulator had contact forces that were always 0."""

    def __init__(self, num: int):
        gymnasium = require("gymnasium", "gymnasium[mujoco]")
        gymnasium.logger.min_level = gymnasium.logger.ERROR
        super().__init__(lambda: gymnasium.make("Ant-v4", disable_env_checker=True), num)

    def flatten(self, obs) -> np.ndarray:
        """27 positions and velocities -> D4RL's (111,)."""
        return np.pad(obs, (0, 84))


# --- antmaze, with the ant of OGBench, which is D4RL's ---


ANT_MAZES = {  # rows of cells: # wall, r the start, g the goal; and steps per episode
    "antmaze-umaze": ("##### #r..# ###.# #g..# #####", 700),
    "antmaze-medium": (
        "######## #r.##..# #..#...# ##...### #..#...# #.#..#.# #...#.g# ########", 1_000
    ),
    "antmaze-large": (
        "############ #r...#.....# #.##.#.#.#.# #......#...# #.####.###.# #..#.#.....# "
        "##.#.#.#.### #..#...#.g.# ############", 1_000
    ),
}  # fmt: skip
CELL = 4.0  # metres


class AntMazeEnvs(GymnasiumEnvs):
    """D4RL's antmaze-v2: position, posture and velocities (29,), the start at the origin. The
    reward is 1 within 0.5 m of the goal and ends the episode; it is 0 elsewhere. Each episode has
    its own goal, up to 1.5 m beyond the centre of the goal's cell in each direction."""

    def __init__(self, task: str, num: int):
        self.maze, limit = ANT_MAZES[task]
        os.environ.setdefault("MUJOCO_GL", "disable")  # OGBench would look for a display
        ant = require("ogbench.locomaze.ant", "ogbench").AntEnv
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "maze.xml"
            path.write_text(maze_xml(Path(ant.xml_file).read_text(), self.maze))
            super().__init__(lambda: ant(xml_file=str(path)), num, limit)
        self.goals = {}  # of each environment, where it is now

    def _start(self, env, seed):
        obs = super()._start(env, seed)
        goal = np.array(places_of(self.maze, "g")[0])
        noise = env.np_random.uniform(0, 0.25 * CELL, 2) + env.np_random.uniform(0, 0.125 * CELL, 2)
        self.goals[env] = np.maximum(goal + noise, 0.0)
        return obs

    def _step(self, env, action):
        obs, _, _ = super()._step(env, action)
        reached = bool(np.linalg.norm(obs[:2] - self.goals[env]) <= 0.5)
        return obs, float(reached), reached


def places_of(maze: str, mark: str) -> list[tuple[float, float]]:
    """-> x and y of the centres of all cells with a mark, in metres from that of the start."""
    rows = maze.split()
    at = lambda mark: [(c, r) for r, row in enumerate(rows) for c, x in enumerate(row) if x == mark]
    start = at("r")[0]
    return [(CELL * (c - start[0]), CELL * (r - start[1])) for c, r in at(mark)]


def maze_xml(ant: str, maze: str) -> str:
    """MuJoCo's XML of an ant, and rows of cells -> the same with the maze's walls."""
    tree = ElementTree.fromstring(ant)
    for x, y in places_of(maze, "#"):
        ElementTree.SubElement(
            tree.find("worldbody"), "geom", type="box", pos=f"{x} {y} {CELL / 4}", contype="1",
            size=f"{CELL / 2} {CELL / 2} {CELL / 4}", conaffinity="1",
        )  # fmt: skip
    return ElementTree.tostring(tree, encoding="unicode")


# --- kitchen, through gymnasium-robotics ---


KITCHENS = {  # what is to be done, in D4RL's words
    "kitchen": ("microwave", "kettle", "light switch", "slide cabinet"),
    "kitchen-mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}


class KitchenEnvs(GymnasiumEnvs):
    """D4RL's kitchen: positions of the robot (9,) and of the objects (21,), and the goal (30,). The
    reward is the number of tasks that are done in a step; an episode ends when all are. Positions
    are observed with D4RL's noise."""

    def __init__(self, task: str, num: int):
        tasks = list(KITCHENS[task])
        noise = {"robot_noise_ratio": 0.1, "object_noise_ratio": 0.1}
        make = lambda: make_robotics("FrankaKitchen-v1", tasks_to_complete=tasks, **noise)
        made = require("gymnasium_robotics.envs.franka_kitchen.kitchen_env", "gymnasium-robotics")
        self.goal = np.zeros(30)
        for name in tasks:
            self.goal[made.OBS_ELEMENT_INDICES[name]] = made.OBS_ELEMENT_GOALS[name]
        super().__init__(make, num, 280)

    def flatten(self, obs) -> np.ndarray:
        """FrankaKitchen's positions and velocities -> D4RL's (60,)."""
        seen = obs["observation"]
        return np.concatenate([seen[:9], seen[18:39], self.goal])


# --- By name ---


class D4rlTask(NamedTuple):
    """A simulator of one of D4RL's tasks."""

    package: str  # that must be installed
    make: Callable  # (num) -> copies
    mujoco_below: int | None = None  # the first version of MuJoCo with which it does not run


ADROIT = {"pen": 100, "hammer": 200, "door": 200, "relocate": 200}  # D4RL's steps per episode


def adroit(task: str, num: int) -> GymnasiumEnvs:
    """Name of a hand's task -> `num` copies."""
    name = f"AdroitHand{task.capitalize()}-v1"
    return GymnasiumEnvs(lambda: make_robotics(name), num, ADROIT[task])


def _tasks() -> Iterator[tuple[str, D4rlTask]]:
    yield "ant", D4rlTask("gymnasium", AntEnvs)
    for names, package, make, mujoco_below in [
        (ADROIT, "gymnasium_robotics", adroit, None),
        (MAZES, "gymnasium_robotics", MazeEnvs, None),
        (ANT_MAZES, "ogbench", AntMazeEnvs, None),
        (KITCHENS, "gymnasium_robotics", KitchenEnvs, 4),  # its 1.4 compares types of joints
    ]:
        for name in names:
            yield name, D4rlTask(package, functools.partial(make, name), mujoco_below)


D4RL: dict[str, D4rlTask] = dict(_tasks())
