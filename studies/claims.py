"""The claims of the paper, checked on one log: a table and a figure of each measure.

    python -m studies.claims pendulum-medium -- --horizon 32 --fit-batch 32  # fits the models first
    python -m studies.claims my_log.hdf5 -- --env hopper-medium # your log; hopper judges
    python -m studies.claims RUN_DIR [RUN_DIR ...]              # finished runs of pgd.py on one log
    python -m studies.claims RUN_DIR -- --s-churn 0             # the same with another sampler
    python -m studies.claims hopper-medium -- --fit-steps 4000  # flags of the models' training

The program makes target policies at growing distance from the behaviour policy of the log. It asks
the diffusion model, at every guidance weight and with the paper's rule as well, and the world model
for trajectories under each target. The simulator judges the trajectories. The program saves
likelihood, dynamics, coverage and trajectories, each as csv and png, and the trade-off between
likelihood and dynamics error. It prints a table of the likelihoods and one of the errors. Intervals
are 95 % intervals over seeds.
"""

import contextlib
import ctypes.util
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import agents
import data
import pgd
from baselines import world_model
from baselines.behaviour import ClonedState
from baselines.paper_guide import make_paper_guide
from host import cli, collect, envs, flags, run_folder
from host.errors import UserError
from host.files import say
from host.progress import counted
from host.run_folder import interval
from studies.common import Parser, folder_of, is_file, markdown, run_study, save_table, split_flags
from studies.figures import COLOURS, ORDER, line, new_figure, save_figure

WEIGHTS = [0.0, 1.0, 4.0, 16.0, 64.0, 1e6]  # of the guide; the last stands for infinity
MARGIN = 0.05  # of an observation's range in the log; a state further outside is impossible


# --- Load what is judged ---


class Model(NamedTuple):
    """A fitted generator of one seed or of several."""

    name: str  # diffusion; paper, the same with the paper's rule; or world-model
    config: world_model.Config
    state: Any  # with a leading axis (seeds,), unless shared
    shared: bool  # one model for all seeds
    rule: Callable = pgd.make_guide  # makes the guide of a diffusion model

    def of(self, seed: int) -> Any:
        """-> the model's state of the seed-th seed."""
        return self.state if self.shared else jax.tree.map(lambda x: x[seed], self.state)


class Target(NamedTuple):
    """A policy that trajectories are asked for."""

    name: str
    agent: agents.Agent
    states: Any  # with a leading axis (seeds,)

    def of(self, seed: int) -> Any:
        """-> the agent's state of the seed-th seed."""
        return jax.tree.map(lambda x: x[seed], self.states)


SAMPLER = "sampler sample_steps sigma_min sigma_max rho eta s_churn s_tmin s_tmax s_noise".split()
POLICY_ONLY = {"guidance": 1.0, "value_guidance": 0.0, "behaviour_guidance": 0.0}


def load_run(run_dir: str, argv: Sequence[str] = ()) -> tuple[cli.Session, Model, Target | None]:
    """A finished run's folder -> its session, its generator, and its agents if they have learnt.

    argv: flags of the sampler that differ from the run's. Raises UserError for a run that cannot be
    judged, and for any other flag.
    """
    saved, _ = run_folder.read_config(run_dir)
    if saved.get("synthetic") == "none":
        raise UserError(f"{run_dir} was trained on the log alone: there is nothing to judge")
    if saved.get("sweep"):
        raise UserError(f"{run_dir} is a sweep; run its settings one at a time to judge them")
    loaded = cli.load_run(run_dir)
    session, config, state = loaded.session, loaded.config, loaded.state.model
    if isinstance(state, ClonedState):
        state = state.denoiser
    synthetic = session.flags.job.synthetic
    if argv and synthetic == "diffusion":
        config = with_sampler(session.flags, argv)
    rule = cli.guidance_rule(session.flags)
    model = Model(synthetic, config, state, session.layout.num_models == 1, rule)
    if config.rounds * config.updates < 100:
        return session, model, None
    name = f"{config.agent} of {Path(run_dir).name}"
    return session, model, Target(name, session.agent, loaded.state.agent)


def with_sampler(given: flags.Flags, argv: Sequence[str]) -> world_model.Config:
    """A run's flags -> its config with the sampler's settings of argv. Raises UserError for any
    other flag."""
    changed = vars(flags.Parser().parse_args(list(argv)))
    for name in changed:
        if name not in SAMPLER:
            raise UserError(f"{flags.dashed(name)} cannot be changed here; a sampler's flags can")
    config = dataclasses.replace(given.config, **changed)
    flags.check(given._replace(config=config))
    return config


def make_runs(
    task: str,
    out: Path,
    num_seeds: int,
    argv: Sequence[str],
    kinds: Sequence[str] = ("diffusion", "world-model"),
) -> list[str]:
    """Fit a model per seed of each kind to the task's log, unless an earlier call did -> their run
    folders. argv: further flags. Raises UserError where the earlier call had other flags."""
    folders = []
    log = ["--dataset-path" if is_file(task) else "--env", task]
    for synthetic in kinds:
        folder = out / synthetic
        few = "--rounds 1 --updates 1 --eval-episodes 1 --trajectories 32 --sample-batch 32"
        words = [*log, "--synthetic", synthetic, "--num-seeds", str(num_seeds), *few.split()]
        given = flags.parse([*words, "--guidance", "0", "--out", str(folder), *argv])
        if (folder / "config.json").exists():
            refuse_other_settings(folder, given)
            given = flags.parse(["--resume", str(folder)])
        if not (folder / "final.json").exists():
            cli.run_here(given)
        folders.append(str(folder))
    return folders


def refuse_other_settings(folder: Path, given: flags.Flags) -> None:
    """Raise UserError where the run in the folder was made with settings other than those given."""
    saved, _ = run_folder.read_config(folder)
    before = comparable(cli.from_saved(saved, folder / "config.json"))
    for name, value in comparable(given).items():
        if before[name] != value:
            raise UserError(
                f"{folder} was made with another {flags.dashed(name)}; name another --out"
            )


def comparable(given: flags.Flags) -> dict[str, Any]:
    """Flags -> the settings that make two runs the same, with names and paths in full."""
    settings, path = given.as_dict(), given.config.dataset_path
    settings["dataset_path"] = path and os.path.abspath(os.path.expanduser(path))
    if given.job.env:
        name = data.split_prefix(data.resolve(given.job.env).name)[1]
        settings["env"] = data.bare_name(name)
    own = {f.name for f in dataclasses.fields(pgd.Config)}
    others = {f.name for f in dataclasses.fields(world_model.Config)} - own
    unused = others if given.job.synthetic == "diffusion" else set()
    leave_out = {"out", "resume", *flags.HERE_ONLY, *unused}
    return {name: value for name, value in settings.items() if name not in leave_out}


# --- Make target policies, from the behaviour policy outwards ---

CHUNK = 250  # updates of a target policy in one call
BATCH = 256


def train(name: str, agent, dataset: pgd.Dataset, num_seeds: int, stages: Sequence[int]) -> list:
    """Train an agent on the log alone -> its states (seeds, ...) after each number of updates in
    `stages`, which are multiples of CHUNK."""

    def init(key, dataset):
        return agent.init(key, dataset.obs_dim, dataset.act_dim)

    def chunk(key, state, dataset, index):
        key = jax.random.fold_in(key, index)
        draw = lambda key: dataset.sample(key, BATCH)
        return pgd.update_agent(key, agent, state, draw, CHUNK)[0]

    keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
    states = jax.jit(jax.vmap(init, in_axes=(0, None)))(keys, dataset)
    chunk, kept = jax.jit(jax.vmap(chunk, in_axes=(0, 0, None, None))), []
    for i in counted(range(max(stages) // CHUNK), f"target policies, {name}"):
        states = chunk(keys, states, dataset, i)
        if (i + 1) * CHUNK in stages:
            kept.append(states)
    return kept


def make_targets(session: cli.Session, num_seeds: int, updates: Sequence[int]) -> list[Target]:
    """-> a clone of the behaviour policy, which comes first; the clone with more noise; TD3+BC and
    IQL after each number of updates; the policies shipped for the simulator that made other
    logs."""
    bc, dataset = agents.bc(), session.dataset
    clone = train("bc", bc, dataset, num_seeds, [max(updates)])[0]
    targets = [Target("clone", bc, clone)]
    for noise in (0.2, 0.5):
        log_std = 0.5 * jnp.log(jnp.exp(2 * clone.actor["log_std"]) + noise**2)
        noisy = clone._replace(actor=clone.actor | {"log_std": log_std})
        targets.append(Target(f"clone + noise {noise}", bc, noisy))
    for name in ("td3_bc", "iql"):
        agent = agents.make_agent(name)
        for stage, states in zip(updates, train(name, agent, dataset, num_seeds, updates)):
            targets.append(Target(f"{name} {stage}", agent, states))
    own = data.bare_name(data.split_prefix(session.task.name)[1])
    for stem in ("early1", "expert"):
        name = f"{session.task.simulator}-{stem}"
        if name != own and collect.shipped_policies(name):
            state = shipped_policy(name, dataset)
            states = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_seeds, *x.shape)), state)
            targets.append(Target(f"shipped {stem}", agents.sac_n(), states))
    return targets


def shipped_policy(name: str, dataset: pgd.Dataset) -> agents.SACState:
    """Name of a policy in policies/, such as pendulum-expert -> a state of agents.sac_n(), which
    takes standardised observations. Raises UserError for a name that is not there."""
    if not collect.shipped_policies(name):
        raise UserError(f"policies/ has no {name}; it has {', '.join(collect.shipped_policies())}")
    layers = collect.Policy.load(collect.POLICIES / f"{name}.npz").layers
    return agents.SACState(standardise_inputs(layers, dataset), *[jnp.zeros(())] * 6)


def standardise_inputs(layers: list, dataset: pgd.Dataset) -> list:
    """Layers of a network that takes observations in the environment's units -> layers of the same
    network of standardised observations."""
    mean, std = obs_scale(dataset)
    (w, b), *rest = [(jnp.asarray(w), jnp.asarray(b)) for w, b in layers]
    return [(std[:, None] * w, b + mean @ w), *rest]


def obs_scale(dataset: pgd.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """-> mean (O,) and standard deviation (O,) of the log's observations."""
    return tuple(np.asarray(x[: dataset.obs_dim]) for x in (dataset.mean, dataset.std))


def distance(target: Target, clone: Target, seed: int, dataset: pgd.Dataset) -> float:
    """Wasserstein-2 distance between the actions of two policies over 1,000 logged states.

    It is a root mean square per dimension of [-1, 1]. Each policy counts as a diagonal Gaussian
    with the mean and the spread of 64 sampled actions.
    """
    obs = dataset.sample(jax.random.key(0), 1_000).obs
    moments = []
    for t in (target, clone):
        policy = pgd.target_policy(t.agent, t.of(seed))
        keys = jax.random.split(jax.random.key(1), 64)
        actions = jax.vmap(lambda key, p=policy: jnp.clip(p.sample(key, obs), -1.0, 1.0))(keys)
        moments.append((actions.mean(0), actions.std(0)))
    (mean, std), (mean_clone, std_clone) = moments
    return float(jnp.sqrt(jnp.mean((mean - mean_clone) ** 2 + (std - std_clone) ** 2)))


# --- Judges: who knows the true next observation ---


class Judge(NamedTuple):
    """The true dynamics, in the environment's units."""

    step: Callable  # obs (N, O), action (N, A) -> next_obs (N, O)
    name: str


def make_judge(session: cli.Session) -> Judge:
    """-> the log's simulator; an independent world model where it cannot be put into a state."""
    judge = envs.make_judge(session.task.simulator)
    if judge is not None:
        step = lambda obs, action: judge(obs, action)[0]
        return Judge(step, f"simulator {session.task.simulator}")
    say(
        f"warning: no simulator for {session.task.name} can be put into a state; an independent "
        "model judges instead: its own errors are in every figure, and it favours its like"
    )
    return Judge(independent_model(session.dataset), "an independent model")


def independent_model(dataset: pgd.Dataset) -> Callable:
    """-> step of a Judge: a world model with another key and wider networks than the one judged."""
    config = world_model.Config(model_hidden=256, model_layers=3)
    model = world_model.make_world_model(config)
    key = jax.random.key(2**31 - 1)
    fit, state = jax.jit(model.fit, donate_argnums=1), jax.jit(model.init)(key, dataset)
    for _ in counted(range(model.num_chunks), "independent model"):
        state, _ = fit(key, state, dataset)
        if state.stale >= config.patience:
            break
    mean, std = obs_scale(dataset)

    @jax.jit
    def predict(state, dataset, obs, action):
        low, high = dataset.action_low, dataset.action_high
        unit = 2.0 * (action - low) / (high - low) - 1.0
        made = world_model.predict(state, (obs - mean) / std, unit, dataset, config)
        return made.next_obs.mean(0) * std + mean

    return lambda obs, action: np.asarray(predict(state, dataset, obs, action))


# --- Sample, and measure ---


class Sample(NamedTuple):
    """Trajectories of L steps in numpy, obs and actions in the environment's units."""

    obs: np.ndarray  # (n, L, O)
    action: np.ndarray  # (n, L, A)
    reward: np.ndarray  # (n, L)
    next_obs: np.ndarray  # (n, L, O)
    going: np.ndarray  # (n, L), no terminal before this step
    valid: np.ndarray  # (n, L), no terminal at this step either: next_obs has a meaning
    log_prob: np.ndarray  # (n, L) under the target policy
    log_prob_behaviour: np.ndarray  # (n, L) under the clone of the behaviour policy


def make_sampler(model: Model, agent, clone: Target, dataset, num: int, length: int) -> Callable:
    """-> sample(target, seed, weight) -> Sample of num trajectories, compiled once for all targets
    of the agent."""
    settings = {"trajectories": num, "sample_batch": num}
    if model.name != "world-model":
        settings |= POLICY_ONLY | {"horizon": length + 1}
        make = functools.partial(pgd.make_diffusion, rule=model.rule)
    else:
        settings |= {"rollout": length, "penalty": 0.0, "horizon": length}
        make = world_model.make_world_model
    generator = make(dataclasses.replace(model.config, **settings))
    mean, std = obs_scale(dataset)

    @jax.jit
    def generate(key, model_state, agent_state, clone_state, weight, dataset):
        policy = pgd.target_policy(agent, agent_state)
        t = generator.generate(key, model_state, policy, weight, dataset)
        t = jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:])[:, :length], t)
        under_clone = clone.agent.log_prob(clone_state, t.obs, t.action)
        action = dataset.unscale_action(t.action)
        return t, action, policy.log_prob(t.obs, t.action), under_clone

    def sample(target: Target, seed: int, weight: float) -> Sample:
        states = model.of(seed), target.of(seed), clone.of(seed)
        key = jax.random.key(1_000 + seed)
        made = generate(key, *states, jnp.float32(weight), dataset)
        t, action, log_prob, under_clone = jax.tree.map(np.asarray, made)
        ended = np.cumsum(t.done, axis=1)
        obs, next_obs = t.obs * std + mean, t.next_obs * std + mean
        masks = ended - t.done == 0, ended == 0
        return Sample(obs, action, t.reward, next_obs, *masks, log_prob, under_clone)

    return sample


def real_sample(dataset: pgd.Dataset, num: int, length: int) -> Sample:
    """Windows of the log -> Sample without likelihoods; length: one less than the windows'."""
    if not len(dataset.train_starts):
        raise UserError(f"no episode of the log has {length + 1} steps; lower --horizon")
    x = dataset.windows(jax.random.key(0), dataset.train_starts, num, length + 1)
    return as_sample(dataset, x)


def as_sample(dataset: pgd.Dataset, x: jax.Array) -> Sample:
    """Trajectories (n, L + 1, D), logged or sampled -> Sample (n, L, ...) without likelihoods."""
    t, (mean, std) = dataset.split(x), obs_scale(dataset)
    obs, action = np.asarray(t.obs) * std + mean, np.asarray(dataset.unscale_action(t.action))
    done, reward = np.asarray(t.done)[:, :-1], np.asarray(t.reward)[:, :-1]
    ended, none = np.cumsum(done, axis=1), np.full(done.shape, np.nan)
    masks = ended - done == 0, ended == 0
    return Sample(obs[:, :-1], action[:, :-1], reward, obs[:, 1:], *masks, none, none)


def dynamics_error(s: Sample, judge: Judge, std: np.ndarray) -> np.ndarray:
    """-> (n, L): squared difference of each next_obs from the judge's, who takes the same action in
    the same state. It is in variances of each observation over the log, averaged over observations;
    NaN where not valid."""
    flat = lambda x: x.reshape(-1, x.shape[-1])
    true = judge.step(flat(s.obs), flat(s.action)).reshape(s.obs.shape)
    return np.where(s.valid, np.mean(((s.next_obs - true) / std) ** 2, axis=-1), np.nan)


def drift(s: Sample, judge: Judge, std: np.ndarray) -> np.ndarray:
    """-> (n, L): the same difference, from a judge who starts in the trajectory's first state and
    takes all its actions."""
    state, out = s.obs[:, 0], []
    for t in range(s.obs.shape[1]):
        with np.errstate(over="ignore", invalid="ignore"):
            state = np.clip(judge.step(state, s.action[:, t]), -1e6, 1e6)
            out.append(np.mean(((s.next_obs[:, t] - state) / std) ** 2, axis=-1))
    return np.where(s.valid, np.stack(out, axis=1), np.nan)


def amplification(dataset: pgd.Dataset, judge: Judge, num: int = 2_000) -> list[dict]:
    """-> a row per noise level, in standard deviations: the dynamics error that logged transitions
    would have with such noise in their states. A stiff simulator amplifies it."""
    t, rng = dataset.sample(jax.random.key(4), num), np.random.default_rng(0)
    mean, std = obs_scale(dataset)
    obs, action = np.asarray(t.obs) * std + mean, np.asarray(dataset.unscale_action(t.action))
    after, rows = judge.step(obs, action), []
    for noise in (0.003, 0.01, 0.03, 0.1):
        before = obs + noise * std * rng.standard_normal(obs.shape)
        moved = np.mean(((judge.step(before, action) - after) / std) ** 2, axis=-1) + noise**2
        row = {"noise": noise, "error": moved.mean(), "error_median": np.median(moved)}
        rows.append({k: float(v) for k, v in row.items()})
    return rows


def held_out_rows(model: Model, dataset: pgd.Dataset, num_seeds: int) -> list[dict]:
    """-> a row per seed and observation: the world model's one-step predictions of held-out
    episodes."""
    score = jax.jit(lambda state, dataset: world_model.score(state, dataset, model.config))
    rows = []
    for seed in range(1 if model.shared else num_seeds):
        measured = score(model.of(seed), dataset)
        for i in range(dataset.obs_dim):
            about = {"seed": seed, "observation": i}
            rows.append(about | {name: float(x[i]) for name, x in measured.items()})
    return rows


class Reference(NamedTuple):
    """What is usual in the log, in standardised units."""

    low: np.ndarray  # (O,)
    high: np.ndarray  # (O,)
    steps: np.ndarray  # (N', O + A) at most 20,000 logged (obs, action)
    quantiles: np.ndarray  # (101, O) of the observations
    mean: np.ndarray  # (O,) in the environment's units
    std: np.ndarray  # (O,) in the environment's units


def make_reference(dataset: pgd.Dataset) -> Reference:
    """-> the log's ranges and quantiles, and a sample of its steps."""
    obs = np.asarray(dataset.steps[:, : dataset.obs_dim])
    t = dataset.sample(jax.random.key(2), min(20_000, len(dataset.usable)))
    steps = np.concatenate([np.asarray(t.obs), np.asarray(t.action)], axis=-1)
    quantiles = np.quantile(obs, np.linspace(0, 1, 101), axis=0)
    return Reference(obs.min(0), obs.max(0), steps, quantiles, *obs_scale(dataset))


def coverage(s: Sample, ref: Reference, dataset: pgd.Dataset) -> dict[str, float]:
    """-> impossible: share of states outside the log's range by more than MARGIN of it; nearest:
    median distance of (standardised obs, action in [-1, 1]) from the nearest logged one; marginal:
    Wasserstein distance of each observation from the log's, in standard deviations, averaged;
    reward: mean per step."""
    obs = ((s.obs - ref.mean) / ref.std)[s.going]
    low, high = dataset.action_low, dataset.action_high
    unit = 2 * (s.action[s.going] - low) / (high - low) - 1
    slack = MARGIN * np.where(ref.high > ref.low, ref.high - ref.low, 1.0)
    outside = np.any((obs < ref.low - slack) | (obs > ref.high + slack), axis=-1)
    rows = np.random.default_rng(0).permutation(len(obs))[:1_000]
    x = np.concatenate([obs, unit], axis=-1)[rows]
    quantiles = np.quantile(obs, np.linspace(0, 1, 101), axis=0)
    return {
        "impossible": float(outside.mean()),
        "nearest": float(np.median(nearest(x, ref.steps))),
        "marginal": float(np.abs(quantiles - ref.quantiles).mean()),
        "reward": float(s.reward[s.going].mean()),
    }


@jax.jit
def nearest(x, log):
    """x (n, D), log (N, D) -> (n,): distance from the nearest row that is not the same."""

    def one(row):
        square = jnp.sum((log - row) ** 2, axis=-1)  # exact; |x|^2 + |y|^2 - 2 x y is not
        return jnp.sqrt(jnp.min(jnp.where(square < 1e-9, jnp.inf, square)))

    return jax.lax.map(one, x)


# --- Tables: a row per target policy, model, guidance weight and seed ---


def judge_all(models, targets, weights: dict, session, judge, num: int, num_seeds: int):
    """weights: name of a model -> its guidance weights. -> (rows of each table by its name, samples
    of the first seed by (target, model, weight))."""
    dataset, clone, ref = session.dataset, targets[0], make_reference(session.dataset)
    length = models[0].config.horizon - 1  # of the diffusion model, where there is one
    log = real_sample(dataset, num, length)
    tables = {"likelihood": [], "dynamics": [], "coverage": []}
    judge_log(tables, log, judge, ref, dataset)
    drawn, samplers = {("", "log", 0.0): log}, {}
    away = {
        target.name: [distance(target, clone, seed, dataset) for seed in range(num_seeds)]
        for target in targets
    }
    settings = [
        (target, model, weight, seed)
        for target in targets
        for model in models
        for weight in weights[model.name]
        for seed in range(num_seeds)
    ]
    for target, model, weight, seed in counted(settings, "judged samples"):
        kind = model.name, id(target.agent)
        if kind not in samplers:
            samplers[kind] = make_sampler(model, target.agent, clone, dataset, num, length)
        s = samplers[kind](target, seed, weight)
        about = {"target": target.name, "distance": away[target.name][seed]}
        about |= {"model": model.name, "weight": weight, "seed": seed}
        judge_sample(tables, about, s, judge, ref, dataset)
        if seed == 0:
            drawn[target.name, model.name, weight] = s
    return tables, drawn


def judge_log(tables: dict, log: Sample, judge: Judge, ref: Reference, dataset) -> None:
    """Add a row of the log itself, and warn where the judge does not reproduce it."""
    about = {"target": "", "distance": 0.0, "model": "log", "weight": 0.0, "seed": 0}
    error = dynamics_error(log, judge, ref.std)
    measures = {"log_prob_target": np.nan, "log_prob_behaviour": np.nan}
    measures |= {"error": np.nanmean(error), "error_median": np.nanmedian(error)}
    tables["likelihood"].append(about | measures)
    tables["coverage"].append(about | coverage(log, ref, dataset))
    print(f"dynamics error of the log itself: {measures['error']:.2g} by {judge.name}")
    if measures["error"] > 1e-3:
        say("warning: the judge does not reproduce the log; is --env its task?")


def judge_sample(tables: dict, about: dict, s: Sample, judge: Judge, ref: Reference, dataset):
    """Add the rows of a sample to each table; about: what the sample is of."""
    error, path = dynamics_error(s, judge, ref.std), drift(s, judge, ref.std)
    some = s.valid.any()
    measures = {
        "log_prob_target": s.log_prob[s.going].mean(),
        "log_prob_behaviour": s.log_prob_behaviour[s.going].mean(),
        "error": np.nanmean(error) if some else np.nan,
        "error_median": np.nanmedian(error) if some else np.nan,
    }
    tables["likelihood"].append(about | measures)
    for t in np.flatnonzero(s.valid.any(0)).tolist():
        row = {"step": t, "going": s.valid[:, t].mean(), "error": np.nanmean(error[:, t])}
        tables["dynamics"].append(about | row | {"drift": np.nanmedian(path[:, t])})
    tables["coverage"].append(about | coverage(s, ref, dataset))


ERRORS = ("error", "error_median", "drift")


def band(rows: list[dict], what: str, **where) -> tuple[float, float, float]:
    """The rows that agree with `where` -> mean over seeds and the ends of its 95 % interval. Errors
    spread over orders of magnitude, so their mean is the geometric one."""
    found = [float(r[what]) for r in rows if all(r[k] == v for k, v in where.items())]
    if not found:  # no trajectory was still going on
        return np.nan, np.nan, np.nan
    if what in ERRORS:
        found = np.log(np.maximum(found, 1e-12)).tolist()
    mean, ci95 = interval(found)
    ends = (mean, *(ci95 or (mean, mean)))
    return tuple(float(np.exp(x)) for x in ends) if what in ERRORS else ends


def likelihood_table(rows: list[dict]) -> str:
    """-> a table in Markdown with a line per target policy, nearest first: log-likelihood of the
    synthetic actions under the target at every guidance weight, and under the clone."""
    weights = weights_of(rows)
    heads = [f"under the target: λ = {weights[0]:g}", *(f"λ = {w:g}" for w in weights[1:])]
    heads += [f"under the clone: λ = {weights[0]:g}", f"λ = {weights[-1]:g}"]
    lines = [["target policy", "distance", *heads]]
    for target in by_distance(rows):
        where = {"target": target, "model": "diffusion"}
        cells = [cell(rows, "log_prob_target", weight=w, **where) for w in weights]
        for w in (weights[0], weights[-1]):
            cells.append(f"{band(rows, 'log_prob_behaviour', weight=w, **where)[0]:.2f}")
        lines.append([target, f"{band(rows, 'distance', target=target)[0]:.2f}", *cells])
    return markdown(lines)


def error_table(rows: list[dict]) -> str:
    """-> a table in Markdown with a line per target policy, nearest first: dynamics error at every
    guidance weight, of the world model, and of the paper's rule at the same likelihood."""
    weights, ratios = weights_of(rows), against_paper(rows)
    strong = sorted({w for _, w in ratios})
    heads = [f"λ = {w:g}" for w in weights] + ["world model"]
    heads += [f"paper's rule at {w:g}, times the guide's" for w in strong]
    lines = [["target policy", *heads]]
    for target in by_distance(rows):
        where = {"target": target, "model": "diffusion"}
        cells = [cell(rows, "error", weight=w, **where) for w in weights]
        cells.append(cell(rows, "error", target=target, model="world-model"))
        for w in strong:
            found = [{"error": r} for r in ratios[target, w]]
            cells.append(cell(found, "error") if found else "-")
        lines.append([target, *cells])
    return markdown(lines)


def against_paper(rows: list[dict]) -> dict[tuple[str, float], list[float]]:
    """-> {(target, weight of the paper's rule): ratios}, a ratio per seed: the rule's dynamics
    error over that of the guide, at the λ that makes the actions as likely under the target. A
    seed is left out where no λ does."""
    found = {}
    for r in (r for r in rows if r["model"] == "paper"):
        of_guide = [g for g in rows if g["model"] == "diffusion"
                    and (g["target"], g["seed"]) == (r["target"], r["seed"])]  # fmt: skip
        of_guide.sort(key=lambda g: g["log_prob_target"])
        x = [g["log_prob_target"] for g in of_guide]
        y = [np.log(g["error"]) for g in of_guide]
        same = np.interp(r["log_prob_target"], x, y, left=np.nan, right=np.nan)
        ratios = found.setdefault((r["target"], r["weight"]), [])
        if np.isfinite(same):
            ratios.append(float(r["error"] / np.exp(same)))
    return found


def cell(rows: list[dict], what: str, **where) -> str:
    """-> "mean (low to high)", or a dash where no row agrees with `where`."""
    mean, low, high = band(rows, what, **where)
    show = lambda x: f"{x:.2g}" if what in ERRORS else f"{x:.2f}"
    ends = f" ({show(low)} to {show(high)})" if low < high else ""
    return "-" if np.isnan(mean) else show(mean) + ends


def by_distance(rows: list[dict]) -> list[str]:
    """-> names of the target policies, from the one nearest to the clone outwards."""
    names = dict.fromkeys(r["target"] for r in rows if r["target"])
    return sorted(names, key=lambda name: band(rows, "distance", target=name)[0])


# --- Figures ---

WEIGHT = "guidance weight λ"
DISTANCE = "distance of the target from the clone"
ERROR = "dynamics error (variances)"


def spaced(names: list[str], num: int = 4) -> list[str]:
    """-> at most num of the names, evenly spaced, with the first and the last."""
    at = np.linspace(0, len(names) - 1, min(num, len(names))).round().astype(int)
    return [names[i] for i in at]


def draw_likelihood(path: Path, rows: list[dict], title: str) -> None:
    """Log-likelihood of the sampled actions less that of unguided ones, against the guidance
    weight, of four targets."""
    figure, axes = new_figure(1, 2)
    weights = weights_of(rows)
    for name, colour in zip(spaced(by_distance(rows)), ORDER):
        for ax, what in zip(axes[0], ("log_prob_target", "log_prob_behaviour")):
            bands = [band(changes(rows, what, name, w), what) for w in weights]
            line(ax, range(len(weights)), bands, name, colour, marker="o", ms=3)
    for ax, whose in zip(axes[0], ("the target policy", "the clone")):
        ax.set_xticks(range(len(weights)), [f"{w:g}" for w in weights])
        ax.set(xlabel=WEIGHT, title=f"under {whose}")
        if np.abs(ax.get_ylim()).max() > 5.0:  # some targets are far from the log
            ax.set_yscale("symlog", linthresh=1.0)
            ax.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set(ylabel="log-likelihood less unguided (nats)")
    axes[0, 1].legend()
    figure.suptitle(title)
    save_figure(path, figure)


def changes(rows: list[dict], what: str, target: str, weight: float) -> list[dict]:
    """-> a row per seed, {what: value at the weight less that at the smallest weight}."""
    of_target = [r for r in rows if r["target"] == target and r["model"] == "diffusion"]
    value = {(r["weight"], r["seed"]): r[what] for r in of_target}
    first, seeds = weights_of(rows)[0], {r["seed"] for r in of_target}
    return [{what: value[weight, seed] - value[first, seed]} for seed in sorted(seeds)]


def weights_of(rows: list[dict], model: str = "diffusion") -> list[float]:
    """-> the guidance weights of a model's rows, increasing."""
    return sorted({r["weight"] for r in rows if r["model"] == model})


def curves(rows: list[dict], shown: float) -> list[tuple[str, dict, str]]:
    """-> (label, what its rows agree with, colour) of each model that there are rows of."""
    known = [
        ("unguided", {"model": "diffusion", "weight": 0.0}, COLOURS["unguided"]),
        (f"guidance {shown:g}", {"model": "diffusion", "weight": shown}, COLOURS["guided"]),
        ("world model", {"model": "world-model"}, COLOURS["world model"]),
    ]
    return [k for k in known if any(all(r[x] == v for x, v in k[1].items()) for r in rows)]


def draw_dynamics(path: Path, rows, steps, shown: float, title: str, judge: str) -> None:
    """Dynamics error against the target's distance; and along the trajectory, of three targets, the
    error of each step and the drift of the whole path."""
    targets = by_distance(rows)
    chosen = spaced(targets, 3)
    figure, axes = new_figure(2, 1 + len(chosen), 3.6, 2.8)
    length = max(r["step"] for r in steps) + 1
    for label, where, colour in curves(rows, shown):
        xs = [band(rows, "distance", target=name)[0] for name in targets]
        for ax, what in zip(axes[:, 0], ("error", "error_median")):
            bands = [band(rows, what, target=name, **where) for name in targets]
            line(ax, xs, bands, label, colour, marker="o", ms=3)
        for column, name in zip(axes[:, 1:].T, chosen):
            of_target = [r for r in steps if r["target"] == name]
            for ax, what in zip(column, ("error", "drift")):
                bands = [band(of_target, what, step=t, **where) for t in range(length)]
                line(ax, np.arange(1, length + 1), bands, label, colour)
            column[0].set(title=f"target: {name}", xlabel="step", ylabel=f"mean {ERROR}")
            column[1].set(xlabel="step", ylabel="median drift (variances)")
    axes[0, 0].set(xlabel=DISTANCE, ylabel=f"mean {ERROR}", title="all steps")
    axes[1, 0].set(xlabel=DISTANCE, ylabel=f"median {ERROR}")
    for ax in axes.flat:
        ax.set_yscale("log")
    axes[0, 0].legend()
    figure.suptitle(f"{title}, judged by {judge}")
    save_figure(path, figure)


def draw_tradeoff(path: Path, rows: list[dict], title: str) -> None:
    """Dynamics error against likelihood under the target, a panel for each of four targets: the
    diffusion model as its guidance grows, the same with the paper's rule, and the world model."""
    names = spaced(by_distance(rows))
    figure, axes = new_figure(1, len(names), 3.4, 3.4)
    known = {
        "diffusion": ("λ", COLOURS["guided"], "o"),
        "paper": ("the paper's rule at", COLOURS["log alone"], "s"),
        "world-model": ("world model", COLOURS["world model"], "*"),
    }
    for model, (said, colour, marker) in known.items():
        weights = weights_of(rows, model)
        if not weights:
            continue
        if model != "world-model":
            said += " " + ", ".join(f"{w:g}" for w in weights)
        for ax, name in zip(axes[0], names):
            of_model = [{"target": name, "model": model, "weight": w} for w in weights]
            xs = [band(rows, "log_prob_target", **where)[0] for where in of_model]
            bands = [band(rows, "error", **where) for where in of_model]
            line(ax, xs, bands, said, colour, marker=marker, ms=10 if marker == "*" else 4)
    for ax, name in zip(axes[0], names):
        ax.set(yscale="log", xlabel="likelihood under the target (nats)", title=name)
    axes[0, 0].set(ylabel=ERROR)
    axes[0, 0].legend()
    figure.suptitle(title)
    save_figure(path, figure)


def draw_coverage(path: Path, samples: dict[str, Sample], rows, target: str, shown: float) -> None:
    """Marginals of up to six observations, the distribution of returns, and the measures of the
    coverage table; the log is grey."""
    figure, axes = new_figure(2, 5, 3.0, 2.6)
    log = samples["log"]
    known = [("log", {"model": "log"}, COLOURS["log alone"])]
    known += [(k, w | {"target": target}, colour) for k, w, colour in curves(rows, shown)]
    colours = {label: colour for label, _, colour in known}

    def histogram(ax, values: dict[str, np.ndarray], bins) -> None:
        for label, x in values.items():
            kind = "stepfilled" if label == "log" else "step"
            x = np.clip(x, bins[0], bins[-1])
            ax.hist(x, bins, density=True, histtype=kind, color=colours[label], label=label)
        ax.set(ylabel="density", yticks=[])

    widest = np.argsort(-log.obs.std((0, 1)))[: min(6, log.obs.shape[-1])]
    for ax, channel in zip(axes.flat, np.sort(widest)):
        bins = np.histogram_bin_edges(log.obs[..., channel], 40)
        histogram(ax, {k: s.obs[..., channel][s.going] for k, s in samples.items()}, bins)
        ax.set(xlabel=f"observation {channel}")
    returns = {label: (s.reward * s.going).sum(1) for label, s in samples.items()}
    bins = np.histogram_bin_edges(np.concatenate(list(returns.values())), 30)
    histogram(axes.flat[6], returns, bins)
    axes.flat[6].set(xlabel=f"return of {log.obs.shape[1]} steps")
    axes.flat[6].legend()
    measures = {
        "impossible": "share of impossible states",
        "nearest": "distance to the log (std)",
        "marginal": "distance of marginals (std)",
    }
    for ax, (what, name) in zip(axes.flat[7:], measures.items()):
        for i, (_, where, colour) in enumerate(known):
            mean, low, high = band(rows, what, **where)
            ax.bar(i, mean, yerr=[[mean - low], [high - mean]], color=colour)
        ax.set(ylabel=name, xticks=[])
    for ax in axes.flat[len(widest) : 6]:
        ax.axis("off")
    figure.suptitle(f"target policy: {target}")
    save_figure(path, figure)


PLANES = {  # of a small task: (x axis, y axis, obs (n, L, O) -> x, y)
    "pendulum": (
        "angle (rad)", "angular velocity (rad/s)",
        lambda o: (np.arctan2(o[..., 1], o[..., 0]), o[..., 2]),
    ),
    "reacher": ("tip x", "tip y", lambda o: (o[..., 0] + o[..., 1], o[..., 2] + o[..., 3])),
    "mountaincar-continuous": ("position", "velocity", lambda o: (o[..., 0], o[..., 1])),
    "swimmer": ("x", "y", lambda o: (o[..., -6], o[..., -5])),
}  # fmt: skip


def draw_trajectories(path: Path, samples: dict[str, Sample], simulator: str | None) -> None:
    """Paths in the plane of a small task, or a strip of rendered frames of a MuJoCo body; where
    nothing can be rendered, the last observation over time."""
    plane = PLANES.get(simulator)
    if plane is None and simulator in envs.BODIES:
        frames = {}
        with contextlib.suppress(Exception):  # without OpenGL, rendering raises many kinds
            for label, s in samples.items():
                frames[label] = envs.render(simulator, s.obs[0][s.going[0]][::6])
        if len(frames) == len(samples):
            figure, axes = new_figure(len(frames), 1, 9.0, 1.6)
            for ax, (label, images) in zip(axes[:, 0], frames.items()):
                ax.imshow(np.concatenate(list(images), axis=1))
                ax.set(ylabel=label, xticks=[], yticks=[])
            return save_figure(path, figure)
    figure, axes = new_figure(1, len(samples), 3.0, 3.0, sharex=True, sharey=True)
    for ax, (label, s) in zip(axes[0], samples.items()):
        for i in range(min(24, len(s.obs))):
            obs = s.obs[i][s.going[i]]
            x, y = plane[2](obs) if plane else (np.arange(len(obs)), obs[:, -1])
            jumps = np.abs(np.diff(x, prepend=x[:1])) > 3.0  # an angle that goes round
            ax.plot(np.where(jumps, np.nan, x), y, lw=0.7, color=ORDER[0], alpha=0.5)
        names = plane[:2] if plane else ("step", "last observation")
        ax.set(title=label, xlabel=names[0], ylabel=names[1])
    save_figure(path, figure)


# --- Main ---


def judge_runs(run_dirs: list[str], out: Path, args, argv: Sequence[str]) -> None:
    """Judge finished runs on one log, and save every table and figure in `out`.

    args: the program's own flags; argv: flags of the sampler. Raises UserError for runs that cannot
    be judged together.
    """
    loaded = [load_run(run_dir, argv) for run_dir in run_dirs]
    loaded.sort(key=lambda x: x[1].name)  # diffusion first: its horizon cuts the log
    session, models = loaded[0][0], [model for _, model, _ in loaded]
    own = [target for _, _, target in loaded if target]
    if len({session.task.fingerprint for session, _, _ in loaded}) > 1:
        raise UserError("these runs were trained on different logs")
    if len({model.name for model in models}) < len(models):
        raise UserError("give one run of each kind: diffusion, world-model")
    if argv and models[0].name != "diffusion":
        raise UserError("there is no sampler to change in a world model")
    if args.paper_weights and models[0].name == "diffusion" and models[0].rule is pgd.make_guide:
        models.append(models[0]._replace(name="paper", rule=make_paper_guide))
    limits = [m.config.num_seeds for m in models if own or not m.shared]
    num_seeds = min([args.num_seeds, *limits])
    judge = make_judge(session)
    targets = make_targets(session, num_seeds, sorted(args.updates)) + own
    weights = {"diffusion": sorted({0.0, *args.weights}), "paper": sorted(set(args.paper_weights))}
    weights["world-model"] = [0.0]
    shown = min([w for w in weights["diffusion"] if w > 0], key=lambda w: abs(w - args.shown))
    tables, drawn = judge_all(models, targets, weights, session, judge, args.num, num_seeds)
    tables["amplification"] = amplification(session.dataset, judge)
    for own_session, model, _ in loaded:
        if model.name == "world-model":
            tables["world_model"] = held_out_rows(model, own_session.dataset, num_seeds)
    title = f"{session.task.name}, {num_seeds} seed{'s' * (num_seeds > 1)}"
    if num_seeds > 1 and any(m.shared for m in models):
        title += " of the policies, one model for all"
    far = by_distance(tables["likelihood"])[-1]
    samples = {"log": drawn["", "log", 0.0]}
    for label, where, _ in curves(tables["likelihood"], shown):
        samples[label] = drawn[far, where["model"], where.get("weight", 0.0)]
    tables["trajectories"] = list(trajectory_rows(samples))
    save(out, tables, samples, far, shown, title, judge, session.task.simulator)


def save(out: Path, tables, samples, far: str, shown: float, title: str, judge, simulator) -> None:
    """Write every csv and figure, and print the table. far: the target policy of `samples`."""
    rows = tables["likelihood"]
    for name, content in tables.items():
        save_table(out / f"{name}.csv", content)
    draw_dynamics(out / "dynamics.png", rows, tables["dynamics"], shown, title, judge.name)
    draw_coverage(out / "coverage.png", samples, tables["coverage"], far, shown)
    draw_trajectories(out / "trajectories.png", samples, simulator)
    figures = ["dynamics.png", "coverage.png", "trajectories.png"]
    if weights_of(rows):
        draw_likelihood(out / "likelihood.png", rows, title)
        draw_tradeoff(out / "tradeoff.png", rows, title)
        figures += ["likelihood.png", "tradeoff.png"]
    noise = ", ".join(f"{r['noise']:g}: {r['error']:.2g}" for r in tables["amplification"])
    print(f"\n{title}, judged by {judge.name}; mean over seeds (95 % interval)\n")
    if weights_of(rows):
        print(likelihood_table(rows), end="\n\n")
    print(error_table(rows))
    print(f"\ndynamics error of logged states with noise, by its standard deviation: {noise}")
    print(f"\nsaved: {out}/ ({', '.join([*(f'{name}.csv' for name in tables), *figures])})")


def trajectory_rows(samples: dict[str, Sample], num: int = 8) -> Iterator[dict]:
    """Samples -> a row per step of the first num trajectories of each."""
    for label, s in samples.items():
        for i in range(min(num, len(s.obs))):
            for t in np.flatnonzero(s.going[i]):
                row = {"model": label, "trajectory": i, "step": int(t), "reward": s.reward[i, t]}
                row |= {f"obs{k}": x for k, x in enumerate(s.obs[i, t])}
                yield row | {f"action{k}": x for k, x in enumerate(s.action[i, t])}


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    argv, given = split_flags(argv)
    parser = Parser("claims", __doc__)
    parser.add_argument(
        "what", nargs="+", metavar="TASK or RUN_DIR", help="one task, or run folders"
    )
    parser.add_argument("--num-seeds", type=int, default=4, help="models and policies of each kind")
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS,
                        help="guidance weights of the diffusion model")  # fmt: skip
    parser.add_argument("--paper-weights", type=float, nargs="*", default=[0.0625, 0.25, 1.0],
                        help="weights of the paper's rule, on the same model")  # fmt: skip
    parser.add_argument("--shown", type=float, default=64.0, help="weight in figures")
    parser.add_argument("--num", type=int, default=128, help="trajectories per setting and seed")
    parser.add_argument("--updates", type=int, nargs="+", default=[1_000, 5_000],
                        help=f"updates of TD3+BC and IQL; multiples of {CHUNK}")  # fmt: skip
    parser.add_argument("--out", help="folder of the results; the first RUN_DIR, or "
                        "runs/studies/TASK")  # fmt: skip
    args = parser.parse_args(argv)
    check(args)
    if "DISPLAY" not in os.environ and ctypes.util.find_library("EGL"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported
    first = args.what[0]
    if any(Path(w, "config.json").exists() for w in args.what):
        return judge_runs(args.what, Path(args.out or first), args, given)
    if args.what == [""]:
        raise UserError("the task has no name")
    if inside := [str(path.parent) for path in Path(first).glob("*/config.json")]:
        raise UserError(f"{first} is not a run; did you mean {' '.join(inside)}?")
    if len(args.what) > 1:
        raise UserError(f"there is no run in {first}: it has no config.json")
    out = Path(args.out) if args.out else folder_of(first)
    judge_runs(make_runs(first, out, args.num_seeds, given), out, args, [])


def check(args) -> None:
    """Raise UserError for the program's own flags that cannot work."""
    weights = [*args.weights, *args.paper_weights, args.shown]
    if min(args.num_seeds, args.num) < 1:
        raise UserError("--num-seeds and --num must be at least 1")
    if not np.isfinite(weights).all() or min(args.weights) < 0 or max(args.weights) == 0:
        raise UserError("--weights must be at least 0, and one of them above it")
    if min(args.paper_weights, default=1.0) <= 0:
        raise UserError("--paper-weights must be above 0")
    if any(u <= 0 or u % CHUNK for u in args.updates):
        raise UserError(f"--updates must be multiples of {CHUNK}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("claims", study, argv, "the same command keeps the models that are fitted")


if __name__ == "__main__":
    main()
