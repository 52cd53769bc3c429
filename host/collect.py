"""Logs collected by behaviour policies, and the training of those policies.

    recipe = make_recipe("pendulum", "medium-expert", shipped_policies())
    path, provenance = collected(recipe)               # collected once, then cached
    train_policy(PolicyTraining("hopper", Path("runs/hopper")), agent)

The policies are in policies/, as npz files that hold arrays only.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from host import envs as sim
from host.envs import scale_action
from host.errors import UserError, at_least
from host.files import atomic_file, make_folder, say, write_hdf5

POLICIES = Path(__file__).resolve().parent.parent / "policies"
FORMAT = b"3"  # part of every cached file's hash; raise it when collection changes

# --- Recipes ---

KINDS = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")
MUJOCO_STEPS, GYMNAX_STEPS = 1_000_000, 100_000
# Steps of D4RL's medium-replay logs, rounded
REPLAY_STEPS = {"halfcheetah": 200_000, "hopper": 400_000, "walker2d": 300_000}


class Recipe(NamedTuple):
    """How to collect a log: which policies act, and for how many steps each."""

    name: str  # of the log, without a version, e.g. hopper-medium-expert
    simulator: str
    parts: tuple[tuple[str, int], ...]  # ((policy, steps), ...), in the order of the log

    @property
    def steps(self) -> int:
        """Steps of the whole log."""
        return sum(steps for _, steps in self.parts)


def shipped_policies(pattern: str = "*") -> list[str]:
    """-> sorted names of the policies in policies/, e.g. hopper-medium; `pattern` is a glob."""
    return sorted(path.stem for path in POLICIES.glob(f"{pattern}.npz"))


def make_recipe(simulator: str, kind: str, shipped: list[str]) -> Recipe | None:
    """The recipe for a log of D4RL's `kind` (one of KINDS); None if a policy for it is missing.

    shipped: names of the policies that exist. D4RL's replay logs hold the steps of a training run,
    which no shipped policy can repeat. Their recipe has equal parts of a random policy and of the
    snapshots up to medium (for full-replay, up to expert).
    """
    steps = MUJOCO_STEPS if simulator in sim.BODIES else GYMNAX_STEPS
    early = [f"early{i}" for i in range(1, 10) if f"{simulator}-early{i}" in shipped]
    stages = {
        "random": (["random"], steps),
        "medium": (["medium"], steps),
        "expert": (["expert"], steps),
        "medium-expert": (["medium", "expert"], 2 * steps),
        "medium-replay": (["random", *early, "medium"], REPLAY_STEPS.get(simulator, steps)),
        "full-replay": (["random", *early, "medium", "expert"], steps),
    }
    if kind not in stages or ("replay" in kind and not early):
        return None
    policies, total = stages[kind]
    if any(p != "random" and f"{simulator}-{p}" not in shipped for p in policies):
        return None
    parts = tuple((f"{simulator}-{p}", total // len(policies)) for p in policies)
    return Recipe(f"{simulator}-{kind}", simulator, parts)


# --- Collected logs ---


def cache_dir() -> Path:
    """The folder of collected logs: $PGD_CACHE, or pgd in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("PGD_CACHE", f"{base}/pgd")).expanduser()


def collected_path(recipe: Recipe, steps: int | None = None, seed: int = 0) -> Path:
    """The path of a recipe's log in the cache, whether it exists or not.

    steps: of the whole log; None for the recipe's own number. The file's name contains a hash of
    the policies, so that other policies give another file.
    """
    digest = hashlib.sha256(FORMAT)
    for policy, _ in recipe.parts:
        file = POLICIES / f"{policy}.npz"
        digest.update(policy.encode() if policy.endswith("-random") else file.read_bytes())
    name = f"collect-{recipe.name}-{steps or recipe.steps}-{seed}-{digest.hexdigest()[:8]}.hdf5"
    return cache_dir() / name


def collected(recipe: Recipe, steps: int | None = None, seed: int = 0) -> tuple[Path, str]:
    """Collect a recipe's log unless it is in the cache -> (path of the HDF5 file, provenance).

    steps: of the whole log, divided among the parts; None for the recipe's own number. The policies
    are stochastic, as D4RL's were. The provenance is one line.
    """
    parts = recipe.parts
    if steps is not None:
        cuts = np.linspace(0, steps, len(parts) + 1).astype(int)
        parts = tuple((policy, int(n)) for (policy, _), n in zip(parts, np.diff(cuts)))
    total = sum(n for _, n in parts)
    path = collected_path(recipe, steps, seed)
    make_folder(path.parent, "PGD_CACHE")
    described = "; ".join(load_policy(recipe.simulator, policy)[1] for policy, _ in parts)
    made_like = "re-collected, not D4RL's" if recipe.simulator in sim.BODIES else "collected"
    provenance = f"{made_like}: {described}; {total:,} steps, seed {seed}"
    if not path.exists():
        start = time.time()
        say(f"collecting {total:,} steps of {recipe.name} into {path}")
        arrays = (
            _collect_part(recipe.simulator, policy, n, seed + 1000 * i)
            for i, (policy, n) in enumerate(parts)
        )
        write_hdf5(path, arrays, total, {"source": provenance})
        say(f"collected in {time.time() - start:.0f} s")
    return path, provenance


def _collect_part(simulator: str, name: str, steps: int, seed: int) -> dict[str, np.ndarray]:
    """`steps` transitions of one policy -> a log with next_observations; the last episode ends by a
    timeout where it is cut."""
    most = 200 if simulator in sim.BODIES else 500  # copies of the environment
    limit = sim.make_envs(simulator, 1).limit
    num = min(most, max(1, steps // limit))
    rows = -(-steps // (num * limit)) * limit  # per copy: whole episodes
    policy = load_policy(simulator, name)[0]
    if simulator in sim.GYMNAX:
        log = sim.collect_in_program(simulator, policy.sample, num, rows, seed)
    else:
        log = sim.collect(sim.make_envs(simulator, num), policy, rows * num, seed)
    log["timeouts"][steps - 1] |= not log["terminals"][steps - 1]
    return {key: array[:steps] for key, array in log.items()}


# --- Policies ---


@dataclass(frozen=True)
class Policy:
    """A SAC actor in numpy: obs (n, O) -> tanh-Gaussian actions (n, A) in [-1, 1]."""

    layers: list  # of (weights (in, out), bias (out,)); the last gives mean and log std, (2 A,)
    meta: dict  # task, mean_return, command, ...

    def __call__(self, obs: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """obs (n, O) -> sampled actions (n, A); the mean's if rng is None."""
        x = obs
        for w, b in self.layers[:-1]:
            x = np.maximum(x @ w + b, 0.0)
        w, b = self.layers[-1]
        mean, log_std = np.split(x @ w + b, 2, axis=-1)
        if rng is not None:
            noise = rng.standard_normal(mean.shape, np.float32)
            mean = mean + np.exp(np.clip(log_std, -5.0, 2.0)) * noise
        return np.tanh(mean)

    def sample(self, key, obs):
        """obs (O,) -> a sampled action (A,), in JAX."""
        import jax
        import jax.numpy as jnp

        x = obs
        for w, b in self.layers[:-1]:
            x = jax.nn.relu(x @ w + b)
        w, b = self.layers[-1]
        mean, log_std = jnp.split(x @ w + b, 2)
        noise = jax.random.normal(key, mean.shape)
        return jnp.tanh(mean + jnp.exp(jnp.clip(log_std, -5.0, 2.0)) * noise)

    def save(self, path: Path) -> None:
        """Write an npz file of w0, b0, w1, ... and meta as a JSON string."""
        arrays = {f"{n}{i}": a for i, layer in enumerate(self.layers) for n, a in zip("wb", layer)}
        with atomic_file(path) as f:
            np.savez(f, meta=np.array(json.dumps(self.meta)), **arrays)

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a file that save() wrote; pickled objects are refused."""
        with np.load(path, allow_pickle=False) as z:
            layers = [(z[f"w{i}"], z[f"b{i}"]) for i in range((len(z.files) - 1) // 2)]
            return cls(layers, json.loads(str(z["meta"])))


@dataclass(frozen=True)
class UniformPolicy:
    """Uniformly random actions in [-1, 1], with the interface of Policy."""

    act_dim: int

    def __call__(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """obs (n, O) -> actions (n, A)."""
        return rng.uniform(-1.0, 1.0, (len(obs), self.act_dim))

    def sample(self, key, obs):
        """obs (O,) -> an action (A,), in JAX."""
        import jax

        return jax.random.uniform(key, (self.act_dim,), minval=-1.0, maxval=1.0)


def load_policy(simulator: str, name: str) -> tuple[Policy | UniformPolicy, str]:
    """Name of a policy, e.g. hopper-medium or hopper-random -> (policy, one phrase that describes
    it)."""
    if name.endswith("-random"):
        return UniformPolicy(sim.make_envs(simulator, 1).low.size), "uniformly random actions"
    policy = Policy.load(POLICIES / f"{name}.npz")
    return policy, f"SAC policy policies/{name}.npz (mean return {policy.meta['mean_return']:.0f})"


def measure_policies(task: str, episodes: int) -> None:
    """Print the mean and the standard deviation of the undiscounted return of a random policy and
    of every policy shipped for `task`."""
    copies = sim.make_envs(task, 100)
    for name in [f"{task}-random", *shipped_policies(f"{task}-*")]:
        policy, described = load_policy(task, name)
        rng = np.random.default_rng(0)
        act = lambda obs, p=policy, r=rng: scale_action(p(obs, r), copies.low, copies.high)
        rounds = [sim.evaluate_on_host(copies, act, i) for i in range(-(-episodes // copies.num))]
        returns = np.concatenate(rounds)
        print(f"{name}: {returns.mean():.1f} +- {returns.std():.1f}, {described}", flush=True)


# --- Training of a policy ---


@dataclass(frozen=True)
class PolicyTraining:
    """Settings of `python data.py train-policy`."""

    task: tyro.conf.Positional[str]  # simulator, e.g. hopper or pendulum
    out: Path  # folder of the snapshots
    stop_at: float = float("inf")  # stop at the first snapshot with at least this mean return
    max_steps: int = 1_000_000  # environment steps, all copies together
    seed: int = 0  # of the networks, the environments and the batches
    num_envs: int = 16  # copies of the environment
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers of actor and critics
    updates_per_step: float = 1.0  # updates of batch 256 per environment step
    start_steps: int = 10_000  # environment steps with uniformly random actions at the start
    start_hold: int = 1  # steps for which each of those random actions is repeated
    eval_every: int = 5_000  # environment steps between snapshots

    def check(self) -> None:
        """Raises UserError if a number is too small."""
        at_least(0, seed=self.seed, start_steps=self.start_steps)
        at_least(
            1,
            max_steps=self.max_steps,
            num_envs=self.num_envs,
            start_hold=self.start_hold,
            eval_every=self.eval_every,
            hidden=min(self.hidden, default=0),
        )

    def command(self) -> str:
        """The command line that repeats this training."""
        return (
            f"python data.py train-policy {self.task} --out {self.out} --stop-at {self.stop_at:g} "
            f"--max-steps {self.max_steps} --seed {self.seed} --num-envs {self.num_envs} "
            f"--hidden {' '.join(map(str, self.hidden))} "
            f"--updates-per-step {self.updates_per_step:g} --start-steps {self.start_steps} "
            f"--start-hold {self.start_hold} --eval-every {self.eval_every}"
        )


class Batch(NamedTuple):
    """Transitions as Agent.update takes them, (U, B) for U updates of batch B."""

    obs: np.ndarray  # (U, B, O)
    action: np.ndarray  # (U, B, A) in [-1, 1]
    reward: np.ndarray  # (U, B)
    next_obs: np.ndarray  # (U, B, O)
    done: np.ndarray  # (U, B): 1 at a terminal


BATCH_SIZE = 256


def train_policy(settings: PolicyTraining, agent) -> None:
    """Train SAC online and keep a snapshot of every evaluation as OUT/TASK-STEPS.npz.

    agent: SAC as agents.py makes it; init, update and sample are used. The replay buffer keeps all
    transitions. Ends with the first snapshot whose mean return is at least `stop_at`, or after
    `max_steps` environment steps. Raises UserError on bad settings.
    """
    import jax

    settings.check()
    task, num_envs = settings.task, settings.num_envs
    if list(Path(settings.out).glob(f"{task}-[0-9]*.npz")):
        raise UserError(f"{settings.out} already holds policies of {task}; name another --out")
    copies = sim.make_envs(task, num_envs)
    judge = sim.make_envs(task, 100 if task in sim.GYMNAX else num_envs)
    act_dim, rng = copies.low.size, np.random.default_rng(settings.seed)
    num_updates = max(1, round(settings.updates_per_step * num_envs))
    replay = _make_replay(settings.max_steps + num_envs, copies.obs_dim, act_dim)
    learn, sample = _make_learn(agent, num_updates), jax.jit(agent.sample)
    key = jax.random.key(settings.seed)
    state, obs = agent.init(key, copies.obs_dim, act_dim), copies.reset(settings.seed)
    every = max(1, settings.eval_every // num_envs) * num_envs
    bar = tqdm(
        range(0, settings.max_steps + 1, num_envs), task, unit_scale=num_envs, unit=" steps",
        disable=None,
    )  # fmt: skip
    for t in bar:
        key_act, key_learn = jax.random.split(jax.random.fold_in(key, t))
        if t >= settings.start_steps:
            action = np.asarray(sample(key_act, state, obs))
        elif t // num_envs % settings.start_hold == 0:
            action = rng.uniform(-1.0, 1.0, (num_envs, act_dim))
        next_obs, reward, terminal, _ = copies.step(scale_action(action, copies.low, copies.high))
        for array, rows in zip(replay, (obs, action, reward, next_obs, terminal)):
            array[t : t + num_envs] = rows
        obs = copies.obs
        if t < settings.start_steps:
            continue
        index = rng.integers(0, t + num_envs, (num_updates, BATCH_SIZE))
        state = learn(key_learn, state, Batch(*(array[index] for array in replay)))
        if t % every == 0:
            mean_return = _save_snapshot(settings, judge, state.actor, t)
            if mean_return >= settings.stop_at:
                break


def _make_replay(size: int, obs_dim: int, act_dim: int) -> Batch:
    """-> an uninitialised Batch with a first axis of `size` transitions."""
    shapes = (obs_dim,), (act_dim,), (), (obs_dim,), ()
    return Batch(*(np.empty((size, *shape), np.float32) for shape in shapes))


def _make_learn(agent, num_updates: int) -> Callable:
    """-> learn(key, state, Batch) -> state after `num_updates` updates, compiled."""
    import jax

    @jax.jit
    def learn(key, state, batches):
        def step(state, x):
            return agent.update(x[0], state, x[1])

        keys = jax.random.split(key, num_updates)
        return jax.lax.scan(step, state, (keys, batches))[0]

    return learn


def _save_snapshot(settings: PolicyTraining, judge, actor, t: int) -> float:
    """Evaluate the stochastic policy with these actor layers and save it -> its mean return."""
    layers = [tuple(map(np.asarray, layer)) for layer in actor]
    policy, rng = Policy(layers, {}), np.random.default_rng(t)
    act = lambda obs: scale_action(policy(obs, rng), judge.low, judge.high)
    mean_return = round(float(sim.evaluate_on_host(judge, act, t).mean()), 1)
    meta = {
        "task": settings.task,
        "algorithm": "SAC",
        "mean_return": mean_return,
        "env_steps": t,
        "command": settings.command(),
    }
    Policy(layers, meta).save(settings.out / f"{settings.task}-{t}.npz")
    say(f"{settings.task}: {t:,} steps, mean return {mean_return}")
    return mean_return
