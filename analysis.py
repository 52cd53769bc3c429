"""The method's claims, checked on one log: a table and a figure each.

    python analysis.py pendulum-medium                  # trains what it needs, then judges it
    python analysis.py my_log.hdf5 -- --env halfcheetah-medium   # your log, and who judges it
    python analysis.py RUN_DIR [RUN_DIR ...]            # finished runs of pgd.py on one log
    python analysis.py RUN_DIR -- --s-churn 0           # with other settings of the sampler
    python analysis.py hopper-medium -- --fit-steps 4000  # or of what it trains

Policies at growing distance from the one that made the log are cloned or trained on it. For each,
the diffusion model (at every guidance weight) and the world model make trajectories, which the
simulator judges. Saved, for 95 % intervals over seeds: likelihood, dynamics, coverage and
trajectories, each a csv and a png, and the trade-off between the first two.
"""

import argparse
import contextlib
import csv
import ctypes.util
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import agents
import data
import devices
import envs
import pgd
import runs
import world_model

MARGIN = 0.05  # of a channel's range in the log: a state further outside is called impossible


# --- Load what is to be judged ---


class Model(NamedTuple):
    """A fitted generator, of one seed or of all."""

    name: str  # diffusion or world-model
    config: pgd.Config
    state: Any
    shared: bool  # one for all seeds; else the state has a leading axis (seeds,)

    def of(self, seed: int):
        """The state of the seed-th seed."""
        return self.state if self.shared else jax.tree.map(lambda x: x[seed], self.state)


class Target(NamedTuple):
    """A policy that samples are asked for; its states have a leading axis (seeds,)."""

    name: str
    agent: agents.Agent
    states: Any

    def of(self, seed: int) -> Any:
        return jax.tree.map(lambda x: x[seed], self.states)


SAMPLER = (
    "sampler sample_steps sigma_min sigma_max rho eta order s_churn s_tmin s_tmax s_noise "
    "guidance_sine guidance_every guidance_normalise guidance_denoised"
).split()


WORLD_MODEL = (
    "members elites model_layers model_hidden model_steps model_chunk patience model_batch "
    "model_lr model_decay rollout penalty"
).split()


POLICY_ONLY = {"guidance": 1.0, "value_guidance": 0.0, "behaviour_guidance": 0.0}  # lambda is 1


DECIDED = ("dataset_path", "source", "env", "precision", "devices")  # by the run itself


def load_run(run_dir: str, flags: Sequence[str] = ()) -> tuple[pgd.Session, Model, Target | None]:
    """A finished run -> its session, its generator, and its agents if they have learnt."""
    import tyro

    folder, config, fingerprint = runs.Run.resume(run_dir, pgd.Config)
    session = pgd.build(dataclasses.replace(config, export=None, devices=1))
    done, state, rounds = pgd.restore(session, folder)
    if config.synthetic == "none":
        raise runs.RunError(f"{run_dir} was trained on the log alone: there is nothing to judge")
    if config.sweep:
        raise runs.RunError(f"{run_dir} is a sweep; run its settings one at a time to judge them")
    finished = done == session.trainer.generator.num_chunks and rounds.round[0, 0] == config.rounds
    if not finished or fingerprint != session.task.fingerprint:
        raise runs.RunError(f"{run_dir} is not a finished run on the log that is here now")
    if config.synthetic == "diffusion" and flags:
        changed = tyro.cli(pgd.Config, args=list(flags), default=config)
        for field in dataclasses.fields(config):
            same = getattr(changed, field.name) == getattr(config, field.name)
            if not same and field.name not in SAMPLER:
                flag = f"--{field.name.replace('_', '-')}"
                raise runs.RunError(f"{flag} cannot be changed here, only the sampler's settings")
        pgd.check_config(changed)
        config = changed
    model = Model(config.synthetic, config, state, "seed" not in session.fits)
    if config.rounds * config.updates < 100:
        return session, model, None
    name = f"{config.agent} of {Path(run_dir).name}"
    return session, model, Target(name, session.agent, jax.tree.map(lambda x: x[0], rounds.agent))


def make_runs(
    task: str, out: Path, num_seeds: int, flags: Sequence[str], kinds=("diffusion", "world-model")
) -> list[str]:
    """Fit a denoiser and a world model per seed to the task's log, unless that was done before ->
    their run folders."""
    folders = []
    log = ["--dataset-path" if task.endswith((".hdf5", ".npz")) else "--env", task]
    for synthetic in kinds:
        folder = out / synthetic
        argv = [*log, "--synthetic", synthetic, "--num-seeds", str(num_seeds)]
        argv += ["--no-shared-denoiser", "--rounds", "1", "--updates", "1", "--eval-episodes", "1"]
        argv += ["--trajectories", "32", "--sample-batch", "32", "--out", str(folder), *flags]
        config = pgd.parse_config(argv, tuple(envs.GYMNAX))
        if (folder / "config.json").exists():
            before = runs.Run.resume(str(folder), pgd.Config)[1]
            for field in dataclasses.fields(config):
                same = getattr(before, field.name) == getattr(config, field.name)
                others = synthetic == "diffusion" and field.name in WORLD_MODEL
                if not same and not others and field.name not in DECIDED:
                    flag = f"--{field.name.replace('_', '-')}"
                    raise runs.RunError(
                        f"{folder} was made with another {flag}; name another --out"
                    )
            config = dataclasses.replace(pgd.Config(), resume=str(folder))
        if not (folder / "final.json").exists():
            pgd.run(config)
        folders.append(str(folder))
    return folders


# --- Make target policies, from the log's own outwards ---

CHUNK = 250  # updates of a target policy between two looks at the bar


def train(name: str, agent, dataset: pgd.Dataset, num_seeds: int, stages: Sequence[int]) -> list:
    """Train the agent on the log alone -> its states (seeds, ...) after so many updates each."""
    n = agent.batches_per_update

    @jax.jit
    def init(keys):
        return jax.vmap(lambda key: agent.init(key, dataset.obs_dim, dataset.act_dim))(keys)

    @jax.jit
    def chunk(keys, states, dataset, first):
        def step(state, i, key):
            key_batch, key_agent = jax.random.split(jax.random.fold_in(key, i))
            batch = pgd.sample_real(key_batch, dataset, n * 256)
            return agent.update(key_agent, state, batch)[0], None

        one = lambda key, state: jax.lax.scan(
            lambda s, i: step(s, i, key), state, first + jnp.arange(CHUNK)
        )[0]
        return jax.vmap(one)(keys, states)

    keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds))
    states, kept = init(keys), []
    for i in tqdm(range(0, max(stages), CHUNK), f"target policies, {name}", disable=None):
        states = chunk(keys, states, dataset, i)
        if i + CHUNK in stages:
            kept.append(states)
    return kept


def make_targets(session: pgd.Session, num_seeds: int, updates: Sequence[int]) -> list[Target]:
    """The log's policy cloned, first of all; the clone with growing noise; TD3+BC and IQL at
    several stages; the shipped policies of the simulator, which made other logs."""
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
    simulator = session.task.simulator
    for stem in ("early1", "expert"):
        name = f"{simulator}-{stem}"
        if (data.HERE / "policies" / f"{name}.npz").exists() and name != session.task.name:
            state = shipped_policy(name, dataset)
            every = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_seeds, *x.shape)), state)
            targets.append(Target(f"shipped {stem}", agents.sac_n(), every))
    return targets


def shipped_policy(name: str, dataset: pgd.Dataset) -> agents.SACState:
    """One of policies/, as a state of agents.sac_n() that takes standardised observations."""
    layers = data.Policy.load(data.HERE / "policies" / f"{name}.npz").layers
    return agents.SACState(standardise_inputs(layers, dataset), *[jnp.zeros(())] * 6)


def standardise_inputs(layers: list, dataset: pgd.Dataset) -> list:
    """Layers that take observations in the environment's units -> ones that take them
    standardised."""
    mean, std = (x[: dataset.obs_dim] for x in dataset.normalizer)
    (w, b), *rest = [(jnp.asarray(w), jnp.asarray(b)) for w, b in layers]
    return [(std[:, None] * w, b + mean @ w), *rest]


def distance(target: Target, clone: Target, seed: int, dataset: pgd.Dataset) -> float:
    """Wasserstein-2 distance of the two policies' actions, each taken for a diagonal Gaussian with
    the mean and spread of 64 sampled actions, over 1,000 logged states: root mean square per
    dimension of [-1, 1]."""
    obs = pgd.sample_real(jax.random.key(0), dataset, 1_000).obs
    moments = []
    for t in (target, clone):
        policy = pgd.target_policy(t.agent, t.of(seed))
        keys = jax.random.split(jax.random.key(1), 64)
        actions = jax.vmap(lambda key, p=policy: jnp.clip(p.sample(key, obs), -1.0, 1.0))(keys)
        moments.append((actions.mean(0), actions.std(0)))
    (mean, std), (mean_clone, std_clone) = moments
    return float(jnp.sqrt(jnp.mean((mean - mean_clone) ** 2 + (std - std_clone) ** 2)))


# --- Sample and judge ---


class Judge(NamedTuple):
    """Knows the truth: next_obs of (obs (N, O), action (N, A)), in the environment's units."""

    step: Callable
    name: str


def make_judge(session: pgd.Session) -> Judge:
    """The log's simulator; where it cannot be put into a state, a world model of its own, trained
    with other keys and a wider network."""
    step = envs.make_judge(session.task.simulator)
    if step is not None:
        return Judge(step, f"simulator {session.task.simulator}")
    print(
        f"warning: no simulator for {session.task.name} can be put into a state; an independent "
        "model judges instead: its own errors are in every figure, and it favours its like",
        file=sys.stderr,
    )
    config = pgd.Config(synthetic="world-model", model_hidden=256, model_layers=3)
    dataset = session.dataset
    model = world_model.make_world_model(config, dataset.obs_dim, dataset.act_dim)
    key = jax.random.key(2**31 - 1)
    fit_chunk, state = jax.jit(model.fit_chunk, donate_argnums=1), jax.jit(model.init)(key)
    for _ in tqdm(range(model.num_chunks), "independent model", disable=None):
        state, _ = fit_chunk(key, state, dataset)
        if state.stale >= config.patience:
            break
    mean, std = (x[: dataset.obs_dim] for x in dataset.normalizer)

    @jax.jit
    def predict(state, dataset, obs, action):
        low, high = dataset.action_low, dataset.action_high
        unit = 2.0 * (action - low) / (high - low) - 1.0
        return model.predict(state, (obs - mean) / std, unit, dataset).next_obs.mean(0) * std + mean

    return Judge(lambda o, a: np.asarray(predict(state, dataset, o, a)), "an independent model")


class Sample(NamedTuple):
    """Trajectories of L steps, obs and actions in the environment's units, all numpy."""

    obs: np.ndarray  # (n, L, O)
    action: np.ndarray  # (n, L, A)
    reward: np.ndarray  # (n, L)
    next_obs: np.ndarray  # (n, L, O)
    going: np.ndarray  # (n, L), whether the trajectory had not ended before this step
    valid: np.ndarray  # (n, L), nor ends with it: its next_obs means something
    log_prob: np.ndarray  # (n, L) under the target policy
    log_prob_behaviour: np.ndarray  # (n, L) under the log's policy cloned


def make_sampler(model: Model, agent, clone: Target, dataset, num: int, length: int) -> Callable:
    """-> sample(target, seed, weight) -> Sample; compiled once for all targets of that agent."""
    if model.name == "diffusion":
        settings = POLICY_ONLY | {"horizon": length + 1}
        make = pgd.make_diffusion
    else:
        settings = {"rollout": length, "penalty": 0.0, "horizon": length}
        make = world_model.make_world_model
    settings |= {"trajectories": num, "sample_batch": num}
    config = dataclasses.replace(model.config, **settings)
    generator = make(config, dataset.obs_dim, dataset.act_dim)
    mean, std = (np.asarray(x[: dataset.obs_dim]) for x in dataset.normalizer)

    @jax.jit
    def generate(key, model_state, agent_state, clone_state, weight, dataset):
        policy = pgd.target_policy(agent, agent_state)
        t = generator.generate(key, model_state, policy, weight, dataset)
        t = jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:])[:, :length], t)
        under_clone = clone.agent.log_prob(clone_state, t.obs, t.action)
        action = pgd.unscale_action(dataset, t.action)
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
    """Windows of the log as a Sample, without likelihoods; of the length it was cut into."""
    if not len(dataset.train_starts):
        raise runs.RunError(f"no episode of the log has {length + 1} steps; lower --horizon")
    x = pgd.sample_windows(jax.random.key(0), dataset, dataset.train_starts, num, length + 1)
    obs, action, reward, done = pgd.split_steps(dataset, x)
    mean, std = (x[: dataset.obs_dim] for x in dataset.normalizer)
    obs, action = np.asarray(obs * std + mean), np.asarray(pgd.unscale_action(dataset, action))
    done, reward = np.asarray(done)[:, :-1], np.asarray(reward)[:, :-1]
    ended, none = np.cumsum(done, axis=1), np.full(done.shape, np.nan)
    masks = ended - done == 0, ended == 0
    return Sample(obs[:, :-1], action[:, :-1], reward, obs[:, 1:], *masks, none, none)


def dynamics_error(s: Sample, judge: Judge, std: np.ndarray) -> np.ndarray:
    """-> (n, L): squared difference of each next_obs from the judge's, from the same state and
    action, in variances of each observation over the log, averaged over them; NaN where not
    valid."""
    flat = lambda x: x.reshape(-1, x.shape[-1])
    true = judge.step(flat(s.obs), flat(s.action)).reshape(s.obs.shape)
    return np.where(s.valid, np.mean(((s.next_obs - true) / std) ** 2, axis=-1), np.nan)


def drift(s: Sample, judge: Judge, std: np.ndarray) -> np.ndarray:
    """-> (n, L): the same difference along the trajectory, the judge started in its first state and
    given its actions."""
    state, out = s.obs[:, 0], []
    for t in range(s.obs.shape[1]):
        with np.errstate(over="ignore", invalid="ignore"):
            state = np.clip(judge.step(state, s.action[:, t]), -1e6, 1e6)
            out.append(np.mean(((s.next_obs[:, t] - state) / std) ** 2, axis=-1))
    return np.where(s.valid, np.stack(out, axis=1), np.nan)


def amplification(dataset: pgd.Dataset, judge: Judge, num: int = 2_000) -> list[dict]:
    """-> rows: the dynamics error that logged transitions would have if each of their states
    carried noise of so many standard deviations. A stiff simulator makes much of little."""
    t, rng = pgd.sample_real(jax.random.key(4), dataset, num), np.random.default_rng(0)
    mean, std = (np.asarray(x[: dataset.obs_dim]) for x in dataset.normalizer)
    obs, action = np.asarray(t.obs) * std + mean, np.asarray(pgd.unscale_action(dataset, t.action))
    after, rows = judge.step(obs, action), []
    for noise in (0.003, 0.01, 0.03, 0.1):
        before = obs + noise * std * rng.standard_normal(obs.shape)
        moved = np.mean(((judge.step(before, action) - after) / std) ** 2, axis=-1) + noise**2
        row = {"noise": noise, "error": moved.mean(), "error_median": np.median(moved)}
        rows.append({k: float(v) for k, v in row.items()})
    return rows


def held_out_rows(model: Model, dataset: pgd.Dataset, num_seeds: int) -> list[dict]:
    """-> rows: the world model's one-step predictions of held-out episodes, per observation."""
    made, rows = world_model.make_world_model(model.config, dataset.obs_dim, dataset.act_dim), []
    score = jax.jit(made.score)
    for seed in range(1 if model.shared else num_seeds):
        measured = score(model.of(seed), dataset)
        for i in range(dataset.obs_dim):
            about = {"seed": seed, "observation": i}
            rows.append(about | {name: float(x[i]) for name, x in measured.items()})
    return rows


class Reference(NamedTuple):
    """What the log says is usual, in standardised units."""

    low: np.ndarray  # (O,)
    high: np.ndarray  # (O,)
    steps: np.ndarray  # (N', O + A) at most 20,000 logged (obs, action)
    quantiles: np.ndarray  # (101, O) of the observations
    mean: np.ndarray  # (O,)
    std: np.ndarray  # (O,)


def make_reference(dataset: pgd.Dataset) -> Reference:
    """The log's ranges, quantiles and a sample of its steps, for coverage()."""
    obs_dim, (mean, std) = dataset.obs_dim, dataset.normalizer
    obs = np.asarray(dataset.steps[:, :obs_dim])
    t = pgd.sample_real(jax.random.key(2), dataset, min(20_000, len(dataset.usable)))
    steps = np.concatenate([np.asarray(t.obs), np.asarray(t.action)], axis=-1)
    quantiles = np.quantile(obs, np.linspace(0, 1, 101), axis=0)
    mean, std = (np.asarray(x[:obs_dim]) for x in (mean, std))
    return Reference(obs.min(0), obs.max(0), steps, quantiles, mean, std)


def coverage(s: Sample, ref: Reference, dataset: pgd.Dataset) -> dict[str, float]:
    """-> impossible: fraction of states outside the log's range by more than MARGIN of it;
    nearest: median distance of (standardised obs, action in [-1, 1]) to the nearest logged one;
    marginal: distance of each observation's distribution from the log's (Wasserstein, standard
    deviations), averaged; reward: mean per step."""
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
    """x (n, D), log (N, D) -> (n,): distance to the nearest row that is not the same."""

    def one(row):
        square = jnp.sum((log - row) ** 2, axis=-1)  # exact; |x|^2 + |y|^2 - 2 x y is not
        return jnp.sqrt(jnp.min(jnp.where(square < 1e-9, jnp.inf, square)))

    return jax.lax.map(one, x)


# --- Tables: a row per target policy, model, guidance weight and seed ---


def judge_all(models, targets, weights, session, judge, num: int, num_seeds: int):
    """-> (rows of each table, samples of the first seed by (target, model, weight))."""
    dataset, clone, ref = session.dataset, targets[0], make_reference(session.dataset)
    length = models[0].config.horizon - 1  # of the diffusion model, where there is one
    tables = {"likelihood": [], "dynamics": [], "coverage": []}
    log = real_sample(dataset, num, length)
    about = {"target": "", "distance": 0.0, "model": "log", "weight": 0.0, "seed": 0}
    error = dynamics_error(log, judge, ref.std)
    of_log = {"log_prob_target": np.nan, "log_prob_behaviour": np.nan}
    of_log |= {"error": np.nanmean(error), "error_median": np.nanmedian(error)}
    tables["likelihood"].append(about | of_log)
    tables["coverage"].append(about | coverage(log, ref, dataset))
    print(f"dynamics error of the log itself: {of_log['error']:.2g} by {judge.name}")
    if of_log["error"] > 1e-3:
        print("warning: the judge does not reproduce the log; is --env its task?", file=sys.stderr)
    drawn, samplers = {("", "log", 0.0): log}, {}
    away = {
        target.name: [distance(target, clone, seed, dataset) for seed in range(num_seeds)]
        for target in targets
    }
    settings = [
        (target, model, weight)
        for target in targets
        for model in models
        for weight in (weights if model.name == "diffusion" else [0.0])
    ]
    with tqdm(total=len(settings) * num_seeds, desc="judge", disable=None) as bar:
        for target, model, weight in settings:
            kind = model.name, id(target.agent)
            if kind not in samplers:
                samplers[kind] = make_sampler(model, target.agent, clone, dataset, num, length)
            for seed in range(num_seeds):
                s = samplers[kind](target, seed, weight)
                about = {
                    "target": target.name,
                    "distance": away[target.name][seed],
                    "model": model.name,
                    "weight": weight,
                    "seed": seed,
                }
                error, path = dynamics_error(s, judge, ref.std), drift(s, judge, ref.std)
                summary = {
                    "log_prob_target": s.log_prob[s.going].mean(),
                    "log_prob_behaviour": s.log_prob_behaviour[s.going].mean(),
                    "error": np.nanmean(error) if s.valid.any() else np.nan,
                    "error_median": np.nanmedian(error) if s.valid.any() else np.nan,
                }
                tables["likelihood"].append(about | summary)
                for t in np.flatnonzero(s.valid.any(0)).tolist():
                    row = {"step": t, "going": s.valid[:, t].mean()}
                    row["error"] = np.nanmean(error[:, t])
                    tables["dynamics"].append(about | row | {"drift": np.nanmedian(path[:, t])})
                tables["coverage"].append(about | coverage(s, ref, dataset))
                if seed == 0:
                    drawn[target.name, model.name, weight] = s
                bar.update()
    return tables, drawn


def save_table(path: Path, rows: list[dict]) -> None:
    """Rows with the same keys -> a csv, floats to six digits, written whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, (str, int)) else f"{v:.6g}" for k, v in row.items()})
    with runs.atomic_file(path) as f:
        f.write(text.getvalue().encode())


ERRORS = ("error", "error_median", "drift")


def band(rows: list[dict], what: str, **where) -> tuple[float, float, float]:
    """The rows that agree with `where` -> mean over seeds, and the ends of its 95 % interval; of
    errors, which spread over orders of magnitude, the geometric mean."""
    found = [float(r[what]) for r in rows if all(r[k] == v for k, v in where.items())]
    if not found:  # no trajectory was still going on
        return np.nan, np.nan, np.nan
    if what in ERRORS:
        return tuple(float(np.exp(x)) for x in _interval(np.log(np.maximum(found, 1e-12))))
    return _interval(found)


def _interval(found) -> tuple[float, float, float]:
    mean, interval = runs.summarise(list(found))
    return mean, *(interval or (mean, mean))


def table(rows: list[dict], shown: float) -> str:
    """A line per target policy, nearest first: log-likelihoods and dynamics errors without
    guidance, at the weight shown, and of the world model."""
    first = ["", "", "under the target", "", "under the log's", "", "dynamics error", "", ""]
    second = ["target policy", "distance", *3 * ["unguided", f"guidance {shown:g}"], "world model"]
    lines = [first, len(first) * ["---"], second]
    for target in by_distance(rows):
        line = [target, f"{band(rows, 'distance', target=target)[0]:.2f}"]
        for what in ("log_prob_target", "log_prob_behaviour", "error"):
            for weight in (0.0, shown):
                line.append(cell(rows, what, target=target, model="diffusion", weight=weight))
        line.append(cell(rows, "error", target=target, model="world-model"))
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(rows: list[dict], what: str, **where) -> str:
    """ "mean (low to high)", or a dash where no row agrees with `where`."""
    mean, low, high = band(rows, what, **where)
    show = lambda x: f"{x:.2g}" if what in ERRORS else f"{x:.2f}"
    interval = f" ({show(low)} to {show(high)})" if low < high else ""
    return "-" if np.isnan(mean) else show(mean) + interval


def by_distance(rows: list[dict]) -> list[str]:
    """Names of the target policies, from the one nearest to the log's outwards."""
    names = dict.fromkeys(r["target"] for r in rows if r["target"])
    return sorted(names, key=lambda name: band(rows, "distance", target=name)[0])


# --- Figures ---


def line(axes, xs, bands, label: str, color, **style) -> None:
    """A curve of means with its band of intervals."""
    mean, low, high = np.array(bands).T
    axes.plot(xs, mean, label=label, color=color, **style)
    axes.fill_between(xs, low, high, color=color, alpha=0.2, lw=0)


def new_figure(rows: int, columns: int, width: float = 4.2, height: float = 3.4, **kw):
    """-> (figure, axes (rows, columns)); width and height of each in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **kw)


def save_figure(path: Path, figure) -> None:
    """A png, written whole or not at all."""
    import matplotlib.pyplot as plt

    with runs.atomic_file(path) as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


def colors_of(targets: list[str]) -> dict:
    """-> a colour per target policy, from dark to light in the order given."""
    import matplotlib

    return {name: matplotlib.cm.viridis(i / max(1, len(targets))) for i, name in enumerate(targets)}


def weights_of(rows: list[dict]) -> list[float]:
    """-> the guidance weights that diffusion was sampled with, increasing."""
    return sorted({r["weight"] for r in rows if r["model"] == "diffusion"})


def draw_likelihood(path: Path, rows: list[dict], title: str) -> None:
    """Likelihood of the sampled actions against the guidance weight."""
    figure, axes = new_figure(1, 2)
    targets, weights = by_distance(rows), weights_of(rows)
    for name, color in colors_of(targets).items():
        for ax, what in zip(axes[0], ("log_prob_target", "log_prob_behaviour")):
            pick = lambda w: band(rows, what, target=name, model="diffusion", weight=w)
            line(ax, weights, [pick(w) for w in weights], name, color, marker="o", ms=3)
    axes[0, 0].set(ylabel="log-likelihood under the target policy", xlabel="guidance weight")
    axes[0, 1].set(ylabel="log-likelihood under the log's policy", xlabel="guidance weight")
    axes[0, 1].legend(frameon=False, fontsize=7)
    figure.suptitle(title)
    save_figure(path, figure)


def curves(rows: list[dict], shown: float) -> list[tuple[str, dict, str]]:
    """-> (label, which rows, colour) of the models to compare."""
    known = [
        ("diffusion, unguided", {"model": "diffusion", "weight": 0.0}, "C0"),
        (f"diffusion, guidance {shown:g}", {"model": "diffusion", "weight": shown}, "C1"),
        ("world model", {"model": "world-model"}, "C2"),
    ]
    return [k for k in known if any(all(r[x] == v for x, v in k[1].items()) for r in rows)]


def draw_dynamics(path: Path, rows, steps, shown: float, title: str, judge: str) -> None:
    """Error against the target's distance, and against the rollout's length: of each step, and of
    the whole path."""
    targets = by_distance(rows)
    chosen = [targets[i] for i in sorted({0, len(targets) // 2, len(targets) - 1})]
    figure, axes = new_figure(2, 1 + len(chosen), 3.6, 2.8)
    length = max(r["step"] for r in steps) + 1
    for label, where, color in curves(rows, shown):
        xs = [band(rows, "distance", target=name)[0] for name in targets]
        for ax, what in zip(axes[:, 0], ("error", "error_median")):
            line(ax, xs, [band(rows, what, target=n, **where) for n in targets], label, color,
                 marker="o", ms=3)  # fmt: skip
        for column, name in zip(axes[:, 1:].T, chosen):
            of_target = [r for r in steps if r["target"] == name]
            for ax, what in zip(column, ("error", "drift")):
                bands = [band(of_target, what, step=t, **where) for t in range(length)]
                line(ax, np.arange(1, length + 1), bands, label, color)
            column[0].set(title=name, ylabel="error of the step")
            column[1].set(xlabel="step", ylabel="median distance from the simulator")
    axes[0, 0].set(ylabel="mean error", title="all steps")
    axes[1, 0].set(ylabel="median error", xlabel="target's distance from the log's policy")
    for ax in axes.flat:
        ax.set_yscale("log")
    axes[0, 0].legend(frameon=False, fontsize=7)
    figure.suptitle(f"{title}, judged by {judge} (variances of the observations)", fontsize=10)
    save_figure(path, figure)


def draw_tradeoff(path: Path, rows: list[dict], title: str) -> None:
    """Dynamics error against likelihood under the target: diffusion as its guidance grows, and the
    world model."""
    figure, axes = new_figure(1, 1, 5.5, 4.2)
    ax, weights, targets = axes[0, 0], weights_of(rows), by_distance(rows)
    for name, color in colors_of(targets).items():
        where = {"target": name, "model": "diffusion"}
        xs = [band(rows, "log_prob_target", weight=w, **where)[0] for w in weights]
        bands = [band(rows, "error", weight=w, **where) for w in weights]
        line(ax, xs, bands, name, color, marker="o", ms=3)
        if any(r["model"] == "world-model" for r in rows):
            star = [band(rows, what, target=name, model="world-model")[0]
                    for what in ("log_prob_target", "error")]  # fmt: skip
            ax.plot(*star, "*", color=color, ms=11, mec="black", mew=0.5)
    ax.set(yscale="log", xlabel="log-likelihood of the actions under the target policy",
           ylabel="dynamics error", title=title)  # fmt: skip
    ax.plot(
        [], [], "k-o", ms=3, label="diffusion, guidance " + ", ".join(f"{w:g}" for w in weights)
    )
    ax.plot([], [], "k*", ms=9, label="world model")
    ax.legend(frameon=False, fontsize=7)
    save_figure(path, figure)


def draw_coverage(path: Path, samples: dict[str, Sample], rows, target: str, shown: float) -> None:
    """Marginals of up to six observations, the distribution of returns, and the table's measures
    against the log's own."""
    figure, axes = new_figure(2, 5, 3.0, 2.6)
    log = samples["log"]
    spread = np.argsort(-log.obs.std((0, 1)))[: min(6, log.obs.shape[-1])]
    for ax, channel in zip(axes.flat, np.sort(spread)):
        bins = np.histogram_bin_edges(log.obs[..., channel], 40)
        for (label, s), color in zip(samples.items(), ("0.6", "C0", "C1", "C2")):
            style = {"histtype": "stepfilled" if label == "log" else "step", "density": True}
            x = np.clip(s.obs[..., channel][s.going], bins[0], bins[-1])
            ax.hist(x, bins, color=color, label=label, **style)
        ax.set(title=f"observation {channel}", yticks=[])
    returns = {k: (s.reward * s.going).sum(1) for k, s in samples.items()}
    bins = np.histogram_bin_edges(np.concatenate(list(returns.values())), 30)
    for (label, x), color in zip(returns.items(), ("0.6", "C0", "C1", "C2")):
        style = {"histtype": "stepfilled" if label == "log" else "step", "density": True}
        axes.flat[6].hist(x, bins, color=color, label=label, **style)
    axes.flat[6].set(title=f"return of {log.obs.shape[1]} steps", yticks=[])
    axes.flat[6].legend(frameon=False, fontsize=6)
    wanted = [("log", {"model": "log"}, "0.6")]
    wanted += [(k, w | {"target": target}, c) for k, w, c in curves(rows, shown)]
    for ax, what in zip(axes.flat[7:], ("impossible", "nearest", "marginal")):
        for i, (_, where, color) in enumerate(wanted):
            mean, low, high = band(rows, what, **where)
            ax.bar(i, mean, yerr=[[mean - low], [high - mean]], color=color)
        ax.set(title=what, xticks=[])
    for ax in axes.flat[len(spread) : 6]:
        ax.axis("off")
    figure.suptitle(f"target policy: {target}", fontsize=10)
    save_figure(path, figure)


PLANES = {  # what to draw of a low-dimensional task: (x axis, y axis, obs (n, L, O) -> x, y)
    "pendulum": ("angle", "speed", lambda o: (np.arctan2(o[..., 1], o[..., 0]), o[..., 2])),
    "reacher": (
        "tip x", "tip y", lambda o: (o[..., 0] + o[..., 1], o[..., 2] + o[..., 3])
    ),
    "mountaincar-continuous": ("position", "speed", lambda o: (o[..., 0], o[..., 1])),
    "swimmer": ("x", "y", lambda o: (o[..., -6], o[..., -5])),
}  # fmt: skip


def draw_trajectories(path: Path, samples: dict[str, Sample], simulator: str | None) -> None:
    """Paths in the plane of a small task; a strip of rendered frames for a MuJoCo body, or where
    nothing can be rendered, the first angles over time."""
    plane = PLANES.get(simulator)
    if plane is None and simulator in envs.BODIES:
        frames = {}
        with contextlib.suppress(Exception):  # no OpenGL here, in any of its many ways to say so
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
            ax.plot(np.where(jumps, np.nan, x), y, lw=0.7)
        names = plane[:2] if plane else ("step", "last observation")
        ax.set(title=label, xlabel=names[0], ylabel=names[1])
    save_figure(path, figure)


# --- Main ---


def analyse(run_dirs: list[str], out: Path, args, flags: Sequence[str]) -> None:
    """Judge finished runs of one log and save every table and figure in `out`; RunError, in one
    line, for runs that cannot be judged together."""
    loaded = [load_run(run_dir, flags) for run_dir in run_dirs]
    loaded.sort(key=lambda x: x[1].name)  # diffusion first: its horizon cuts the log
    session, models = loaded[0][0], [model for _, model, _ in loaded]
    if len({x.task.fingerprint for x, _, _ in loaded}) > 1:
        raise runs.RunError("these runs were trained on different logs")
    if len({model.name for model in models}) < len(models):
        raise runs.RunError("give one run of each kind: diffusion, world-model")
    if flags and models[0].name != "diffusion":
        raise runs.RunError("there is no sampler to change in a world model")
    own = [target for _, _, target in loaded if target]
    limits = [m.config.num_seeds for m in models if own or not m.shared]
    num_seeds = min([args.num_seeds, *limits])
    judge = make_judge(session)
    targets = make_targets(session, num_seeds, sorted(args.updates)) + own
    weights = sorted({0.0, *args.weights})
    shown = min([w for w in weights if w > 0], key=lambda w: abs(w - args.shown))
    tables, drawn = judge_all(models, targets, weights, session, judge, args.num, num_seeds)
    rows, title = tables["likelihood"], f"{session.task.name}, {num_seeds} seeds"
    title += " (of the policies alone: one model for all)" if any(m.shared for m in models) else ""
    tables["amplification"] = amplification(session.dataset, judge)
    for own_session, model, _ in loaded:
        if model.name == "world-model":
            tables["world_model"] = held_out_rows(model, own_session.dataset, num_seeds)
    for name, content in tables.items():
        save_table(out / f"{name}.csv", content)
    draw_dynamics(out / "dynamics.png", rows, tables["dynamics"], shown, title, judge.name)
    far = by_distance(rows)[-1]
    samples = {"log": drawn["", "log", 0.0]}
    for label, where, _ in curves(rows, shown):
        samples[label] = drawn[far, where["model"], where.get("weight", 0.0)]
    draw_coverage(out / "coverage.png", samples, tables["coverage"], far, shown)
    draw_trajectories(out / "trajectories.png", samples, session.task.simulator)
    save_table(out / "trajectories.csv", list(trajectory_rows(samples)))
    if any(m.name == "diffusion" for m in models):
        draw_likelihood(out / "likelihood.png", rows, title)
        draw_tradeoff(out / "tradeoff.png", rows, title)
    floor = ", ".join(f"{r['noise']:g}: {r['error']:.2g}" for r in tables["amplification"])
    text = (
        f"{title}, judged by {judge.name}; mean over seeds (95 % interval)\n\n"
        f"{table(rows, shown)}\n\n"
        f"error of the log itself with noise of so many standard deviations in it: {floor}\n"
    )
    with runs.atomic_file(out / "table.md") as f:
        f.write(text.encode())
    print(f"\n{text}\nsaved: {out}/ (table.md, and csv and png of each measure)")


def trajectory_rows(samples: dict[str, Sample], num: int = 8):
    """The first trajectories drawn, a row per step."""
    for label, s in samples.items():
        for i in range(min(num, len(s.obs))):
            for t in np.flatnonzero(s.going[i]):
                row = {"model": label, "trajectory": i, "step": int(t), "reward": s.reward[i, t]}
                row |= {f"obs{k}": x for k, x in enumerate(s.obs[i, t])}
                yield row | {f"action{k}": x for k, x in enumerate(s.action[i, t])}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exit status 0 only when everything is saved, 2 for a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, flags = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", metavar="TASK or RUN_DIR", help="or several RUN_DIRs")
    parser.add_argument("--num-seeds", type=int, default=4, help="denoisers and policies of each")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.125, 0.25, 0.5, 1.0])
    parser.add_argument("--shown", type=float, default=0.25, help="weight in tables and figures")
    parser.add_argument("--num", type=int, default=128, help="trajectories per setting and seed")
    parser.add_argument("--updates", type=int, nargs="+", default=[1_000, 5_000],
                        help="stages of TD3+BC and IQL; multiples of 250")  # fmt: skip
    parser.add_argument("--out", help="where to save; the first RUN_DIR, or analysis/TASK")
    args = parser.parse_args(argv)
    if "DISPLAY" not in os.environ and ctypes.util.find_library("EGL"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported
    try:
        check(args)
        if any(Path(w, "config.json").exists() for w in args.what):
            run_dirs, out = args.what, Path(args.out or args.what[0])
        elif args.what == [""]:
            raise runs.RunError("the task has no name")
        elif inside := [str(p.parent) for p in Path(args.what[0]).glob("*/config.json")]:
            raise runs.RunError(f"{args.what[0]} is not a run; did you mean {' '.join(inside)}?")
        elif len(args.what) > 1:
            missing = next(w for w in args.what if not Path(w, "config.json").exists())
            raise runs.RunError(f"there is no run in {missing}: it has no config.json")
        else:
            out = Path(args.out or Path("analysis") / Path(args.what[0].replace(":", "-")).stem)
            run_dirs, flags = make_runs(args.what[0], out, args.num_seeds, flags), []
        analyse(run_dirs, out, args, flags)
    except (
        data.DataError, devices.DeviceError, envs.EnvError, runs.RunError, pgd.UserError, OSError
    ) as e:  # fmt: skip
        print(f"analysis.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("analysis.py: interrupted; the same command keeps what is fitted", file=sys.stderr)
        sys.exit(130)


def check(args) -> None:
    """Raise RunError, in one line, for settings that cannot work."""
    rules = {
        "--num-seeds and --num must be at least 1": min(args.num_seeds, args.num) >= 1,
        "--weights must be at least 0, and one above it": np.isfinite(
            [*args.weights, args.shown]
        ).all()
        and min(args.weights) >= 0 < max(args.weights),
        f"--updates must be multiples of {CHUNK}": all(
            u > 0 and u % CHUNK == 0 for u in args.updates
        ),
    }
    for message, holds in rules.items():
        if not holds:
            raise runs.RunError(message)


if __name__ == "__main__":
    main()
