"""The whole run of one seed: the fit, the rounds, and what each of them uses."""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, real_log, toy_log
from scipy.stats import norm

import agents
import data
import pgd
from baselines.log_alone import make_log_alone
from baselines.world_model import Config, make_world_model

CONFIG = Config(
    horizon=8, features=8, groups=4, blocks=1, fit_steps=20, fit_chunk=5, fit_batch=8,
    sample_steps=4, rounds=3, updates=4, batch_size=16, real_batch=4, trajectories=8,
    sample_batch=4, buffer_rounds=2, members=3, elites=2, model_hidden=16, model_layers=2,
    model_steps=20, model_chunk=5, model_batch=16, rollout=3,
)  # fmt: skip
MAKERS = {
    "diffusion": pgd.make_diffusion, "world-model": make_world_model, "none": make_log_alone
}  # fmt: skip
AGENT = agents.td3_bc(hidden=(16, 16))
CLONER = agents.bc(hidden=(8,))  # where any agent will do: it compiles fast


def evaluate(key, act):
    """A stand-in for an environment: how far the actions are from 0.3 on random observations."""
    return -jnp.abs(act(jax.random.normal(key, (5, 3))) - 0.3).sum(-1)


def make(config=CONFIG, agent=AGENT, synthetic="diffusion", evaluate=evaluate):
    """-> (program of one run, data set)."""
    dataset = pgd.make_dataset(toy_log(), config)
    return pgd.make_program(config, agent, MAKERS[synthetic], evaluate), dataset


def assert_close(a, b, tol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b)


def one(seed):
    return pgd.Run(jax.random.key(seed))


def train_in_chunks(program, run, dataset):
    """-> (state, metrics (rounds,)), a call for each chunk and round."""
    fit, run_round = jax.jit(program.fit), jax.jit(program.round)
    state, rows = program.init(run, dataset), []
    for _ in range(program.num_chunks):
        state, _ = fit(run, state, dataset)
    for _ in range(program.num_rounds):
        state, metrics = run_round(run, state, dataset)
        rows.append(metrics)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *rows)


# --- A whole run as one function, and in pieces ---


@functools.cache
def whole_run(synthetic):
    """-> train(key, dataset), compiled."""
    return jax.jit(pgd.make_train(CONFIG, AGENT, MAKERS[synthetic], evaluate))


@pytest.mark.slow
@pytest.mark.parametrize("synthetic", list(MAKERS))
def test_chunks_equal_the_whole(synthetic):
    program, dataset = make(synthetic=synthetic)
    state, metrics = train_in_chunks(program, one(5), dataset)
    whole, metrics_whole = whole_run(synthetic)(jax.random.key(5), dataset)
    assert_close(whole, state)
    assert_close(metrics_whole, metrics)
    returns = np.asarray(metrics["return"])
    assert returns.shape == (3,) and len(set(np.round(returns, 6))) == CONFIG.rounds


@pytest.mark.slow
def test_a_key_under_vmap_gives_what_it_gives_alone():
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    train = pgd.make_train(CONFIG, AGENT, pgd.make_diffusion, evaluate)
    keys = jax.random.split(jax.random.key(0), 2)
    many = jax.jit(jax.vmap(train, in_axes=(0, None)))(keys, dataset)
    for i in range(2):
        alone = whole_run("diffusion")(keys[i], dataset)
        assert_close(jax.tree.map(lambda x, i=i: x[i], many), alone, 5e-4)
    returns = np.asarray(many[1]["return"])
    assert np.abs(returns[0] - returns[1]).min() > 1e-4


def test_a_plain_run_of_five_seeds_gives_what_five_runs_of_a_seed_give():
    config = dataclasses.replace(CONFIG, rounds=2, updates=2, seed=0, num_seeds=5, real_batch=16)
    dataset, told = pgd.make_dataset(toy_log(), config), []
    hooks = pgd.Hooks(chunk=lambda *args: told.append(args), finish=lambda *args: args[2])
    returns = lambda: np.array([metrics["return"] for stage, *_, metrics in told if stage != "fit"])
    args = CLONER, hooks, make_log_alone, evaluate
    many = pgd.run(config, dataset, *args)
    all_returns = returns()
    assert all_returns.shape == (2, 5) and len(np.unique(all_returns)) == 10
    for seed in (3,):
        told.clear()
        alone = pgd.run(dataclasses.replace(config, seed=seed, num_seeds=1), dataset, *args)
        np.testing.assert_allclose(returns()[:, 0], all_returns[:, seed], rtol=1e-4, atol=1e-4)
        assert_close(
            jax.tree.map(lambda x, seed=seed: x[seed], many), jax.tree.map(lambda x: x[0], alone)
        )


@pytest.mark.slow
def test_the_host_is_told_of_every_chunk():
    told = []
    dataset = pgd.make_dataset(toy_log(), CONFIG)

    def chunk(stage, done, total, state, metrics):
        told.append((stage, done, total, int(state.round[0]), metrics))

    hooks = pgd.Hooks(chunk=chunk, finish=lambda program, runs, state: (program, runs, state))
    program, runs, state = pgd.run(CONFIG, dataset, CLONER, hooks, pgd.make_diffusion, evaluate)
    assert [x[:4] for x in told[:4]] == [("fit", i, 4, 0) for i in (1, 2, 3, 4)]
    assert [x[:4] for x in told[4:]] == [("rounds", i, 3, i) for i in (1, 2, 3)]
    assert all(0 < x[4]["loss"][0] < 10 for x in told[:4])
    assert all({"return", "log_prob_real", "log_prob_synthetic"} <= set(x[4]) for x in told[4:])
    assert all(isinstance(x[4]["return"], np.ndarray) for x in told[4:])
    assert runs.key.shape == (1,) and int(state.round[0]) == 3 and program.num_rounds == 3


def test_a_restored_run_goes_on_where_it_was():
    program, dataset = make(agent=CLONER)
    told, calls = [], []
    state = jax.eval_shape(program.init, one(0), dataset)

    def restore(fresh):
        assert jax.tree.structure(fresh) == jax.tree.structure(state)
        return 3, fresh._replace(round=fresh.round + 2)

    def compile(f, *args):
        """Nothing is computed."""

        def call(runs, state, dataset):
            calls.append(f)
            out = jax.eval_shape(f, runs, state, dataset)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)

        return call

    hooks = pgd.Hooks(compile=compile, restore=restore, chunk=lambda *args: told.append(args[:3]))
    pgd.run(CONFIG, dataset, CLONER, hooks)
    assert told == [("fit", 4, 4), ("rounds", 3, 3)] and len(calls) == 3


@pytest.mark.parametrize("synthetic", ["diffusion", "world-model"])
def test_a_chunk_leaves_the_kind_of_state_it_takes_so_that_it_compiles_once(synthetic):
    program, dataset = make(synthetic=synthetic)
    kind = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    state = jax.eval_shape(program.init, one(0), dataset)
    assert kind(jax.eval_shape(program.fit, one(0), state, dataset)[0]) == kind(state)
    assert kind(jax.eval_shape(program.round, one(0), state, dataset)[0]) == kind(state)


def fit_with(dataset, key=0, **settings):
    """CONFIG's diffusion, fitted with other settings -> its state."""
    config = dataclasses.replace(CONFIG, **settings)
    generator = pgd.make_diffusion(config)
    state, fit = generator.init(jax.random.key(0), dataset), jax.jit(generator.fit)
    for _ in range(generator.num_chunks):
        state, _ = fit(jax.random.key(key), state, dataset)
    return state


def test_steps_and_trajectories_that_fill_no_whole_chunk_are_rounded_up():
    config = dataclasses.replace(CONFIG, fit_steps=7, trajectories=10)
    program, dataset = make(config)
    assert program.num_chunks == 2
    state = jax.eval_shape(program.init, one(0), dataset)
    assert state.buffer.reward.shape == (2, 12 * config.horizon)
    program, _ = make(dataclasses.replace(config, trajectories=1), synthetic="diffusion")
    made = jax.eval_shape(program.generate, one(0), state, dataset)
    assert made.reward.shape == (4 * config.horizon,)


class OwnAgent:
    """A user's own agent: a class that can be called, with a linear critic that starts at 0."""

    def init(self, key, obs_dim, act_dim):
        return {"w": jnp.zeros(obs_dim + act_dim), "b": jnp.zeros((obs_dim, act_dim))}

    def __call__(self, obs):
        raise AssertionError("an agent is not a function of hyperparameters")

    def update(self, key, state, batch):
        return state, {"loss": jnp.mean(batch.reward)}

    def act(self, state, obs):
        return jnp.tanh(obs @ state["b"])

    def log_prob(self, state, obs, action):
        return -jnp.sum((action - self.act(state, obs)) ** 2, axis=-1)

    def q_value(self, state, obs, action):
        return jnp.concatenate([obs, action], -1) @ state["w"]


def test_a_users_own_agent_may_be_callable_and_its_critic_may_start_at_zero():
    config = dataclasses.replace(CONFIG, fit_steps=5, value_guidance=1.0, guidance=0)
    program, dataset = make(config, OwnAgent(), evaluate=None)
    state = jax.jit(program.init)(one(0), dataset)
    made = jax.jit(program.generate)(one(0), state._replace(round=jnp.int32(1)), dataset)
    assert all(bool(jnp.isfinite(x).all()) for x in made[:5])
    with pytest.raises(AttributeError, match="gamma"):
        program, _ = make(dataclasses.replace(config, n_step=2), OwnAgent(), evaluate=None)
        jax.eval_shape(program.round, one(0), state, dataset)


def test_a_guide_that_is_off_asks_nothing_of_the_agent():
    config = dataclasses.replace(CONFIG, guidance=0, value_guidance=0)
    dataset, asked = pgd.make_dataset(toy_log(), config), []
    ask = lambda *args: asked.append(args) or jnp.zeros(())
    policy = SimpleNamespace(act=ask, log_prob=ask, q_value=None)  # as bc's, without a critic
    state = pgd.init_diffusion(jax.random.key(0), dataset, config)
    draw = lambda config: jax.eval_shape(
        lambda key: pgd.generate(key, state, policy, 1.0, dataset, config), jax.random.key(0)
    )
    assert draw(config).reward.shape == (config.trajectories * config.horizon,) and not asked
    draw(dataclasses.replace(config, guidance=4))
    assert asked


@pytest.mark.slow
def test_the_length_of_a_chunk_does_not_change_the_result():
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    short, long = (fit_with(dataset, fit_chunk=n) for n in (5, 20))
    assert int(short.step) == int(long.step) == 20
    assert_close(short, long)


FUSED = """
import sys, time
import jax
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
events = []
sys.path.insert(0, "tests")
from test_train import *
dataset = pgd.make_dataset(toy_log(), CONFIG)
events.clear()
train = jax.jit(pgd.make_train(CONFIG, AGENT, pgd.make_diffusion, evaluate))
compiled = train.lower(jax.random.key(0), dataset).compile()
hits = sum(name == "/jax/compilation_cache/cache_hits" for name in events)
print(hits, "callback" in compiled.as_text(), "custom-call" in compiled.as_text())
"""


@pytest.mark.slow
def test_a_fused_run_has_no_callbacks_and_is_found_in_the_compilation_cache(tmp_path):
    said = []
    for _ in range(2):
        code = (
            "import conftest, os, jax; jax.config.update('jax_compilation_cache_dir', "
            f"{str(tmp_path)!r})\n" + FUSED
        )
        env = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
        ask = [sys.executable, "-c", code]
        run = subprocess.run(ask, cwd=ROOT, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        said.append(run.stdout.split())
    assert said == [["0", "False", said[0][2]], ["1", "False", said[0][2]]]


# --- The fit ---


@pytest.mark.slow
def test_the_learning_rate_is_a_warm_up_and_a_cosine():
    config = dataclasses.replace(CONFIG, fit_steps=40, fit_lr=0.01, fit_chunk=1)
    dataset, generator = pgd.make_dataset(toy_log(), config), pgd.make_diffusion(config)
    schedule = optax.warmup_cosine_decay_schedule(0.001, 0.01, 4, 40)
    state, fit = generator.init(jax.random.key(0), dataset), jax.jit(generator.fit)
    for step in range(12):
        before = state
        state, _ = fit(jax.random.key(1), state, dataset)
        rate, n = float(schedule(step)), step + 1
        moved = lambda kind: before.params["in"][kind] - state.params["in"][kind]
        if step == 0:  # the network's output is 0 at first, and so is this gradient
            continue
        # Biases: Adam's own state says which direction was taken, with Nesterov's look ahead; the
        # length is the learning rate
        last, adam = (s.opt_state.inner_states["adam"].inner_state[0] for s in (before, state))
        mu, nu = adam.mu["in"]["b"], adam.nu["in"]["b"]
        gradient = (mu - 0.9 * last.mu["in"]["b"]) / 0.1
        ahead = 0.9 * mu / (1 - 0.9 ** (n + 1)) + 0.1 * gradient / (1 - 0.9**n)
        way = ahead / (jnp.sqrt(nu / (1 - 0.999**n)) + 1e-8)
        length = float(jnp.sum(moved("b") * way) / jnp.sum(way**2))
        assert length == pytest.approx(rate, rel=1e-3)
        # Matrices: along each singular direction about as far, 0.2 rms per entry (2502.16982)
        unit = 0.2 * np.sqrt(max(moved("w").shape))
        singular = np.linalg.svd(np.asarray(moved("w")), compute_uv=False) / (rate * unit)
        assert np.all((singular > 0.3) & (singular < 1.4)), singular


@pytest.mark.parametrize("ema", [0.9995, 0.5])
def test_the_average_is_the_bias_corrected_mean_of_the_parameters(ema):
    """sum_n ema^(N - n) params_n / sum_n ema^(N - n) over the N steps; the start plays no part."""
    config = dataclasses.replace(CONFIG, fit_steps=10, fit_chunk=1, ema=ema)
    dataset, generator = pgd.make_dataset(toy_log(), config), pgd.make_diffusion(config)
    state, fit, seen = generator.init(jax.random.key(0), dataset), jax.jit(generator.fit), []
    for _ in range(10):
        state, _ = fit(jax.random.key(1), state, dataset)
        seen.append(state.params)
    weights = ema ** np.arange(9.0, -1.0, -1.0)
    weights /= weights.sum()
    mean = lambda *leaves: sum(w * np.asarray(x, np.float64) for w, x in zip(weights, leaves))
    expected = jax.tree.map(mean, *seen)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.ema, expected
    )
    apart = np.abs(np.asarray(state.params["in"]["w"]) - expected["in"]["w"]).max()
    assert apart > 1e-4  # which the last parameters are not


@pytest.mark.slow
def test_samples_have_the_spread_of_the_log():
    """Episodes at one of two levels, with noise: a window's mean tells its level, so that it varies
    as widely in samples as in the log, and hardly ever lies between the two."""
    rng, length = np.random.default_rng(0), 40
    level = np.repeat(rng.choice([-1.0, 1.0], (200, 1)), length, axis=0)
    num = len(level)
    log = {
        "observations": np.float32(level + 0.5 * rng.normal(size=(num, 3))),
        "actions": np.tanh(rng.normal(size=(num, 1))),
        "rewards": rng.normal(size=num),
        "terminals": np.zeros(num, bool),
        "timeouts": np.arange(num) % length == length - 1,
    }
    config = pgd.Config(
        horizon=16,
        features=16,
        fit_steps=1_000,
        fit_chunk=1_000,
        fit_batch=32,
        sample_batch=1_024,
    )
    dataset = pgd.make_dataset(log, config)
    state = pgd.init_diffusion(jax.random.key(0), dataset, config)
    state, _ = jax.jit(lambda s: pgd.fit_diffusion(jax.random.key(1), s, dataset, config))(state)
    x = jax.jit(lambda s: pgd.sample(jax.random.key(2), s, dataset, config))(state)[..., :3]
    windows = dataset.windows(jax.random.key(3), dataset.train_starts, 4_096, 16)[..., :3]
    slow = lambda x: np.asarray(x).mean(axis=1).std(axis=0)  # of each window's means
    np.testing.assert_allclose(slow(x) / slow(windows), 1.0, atol=0.07)
    between = lambda x: np.mean(np.abs(np.asarray(x).mean(axis=(1, 2))) < 0.5)
    assert between(windows) == 0.0 and between(x) < 0.05


def noise_of(monkeypatch, f, *args):
    """Call f(*args, config) -> the noise levels that the loss sees, which are those of actions."""
    seen, edm_loss, obs = [], pgd.edm_loss, args[-1].obs_noise

    def check(sigma, scale):
        np.testing.assert_array_equal(scale, [obs, obs, obs, 1, 1, np.inf, np.inf])
        seen.append(np.asarray(sigma))

    def spy(denoiser, x, sigma, noise, scale):
        jax.debug.callback(check, sigma, scale)
        return edm_loss(lambda x, sigma: x, x, sigma, noise, scale)

    with monkeypatch.context() as m:
        m.setattr(pgd, "edm_loss", spy)
        jax.block_until_ready(f(*args))
        jax.effects_barrier()
    return np.concatenate(seen)


def test_noise_levels_in_training_are_log_normal_with_the_settings_moments(monkeypatch):
    config = dataclasses.replace(CONFIG, p_mean=0.7, p_std=0.4)
    dataset = pgd.make_dataset(toy_log(), config)
    args = jax.random.key(0), dataset, dataset.train_starts, 4096, config
    sigma = noise_of(monkeypatch, pgd.denoising_loss, {}, *args)
    assert np.log(sigma).mean() == pytest.approx(0.7, abs=0.03)
    assert np.log(sigma).std() == pytest.approx(0.4, abs=0.02)


def test_validation_noise_does_not_depend_on_the_runs_settings(monkeypatch):
    """So that runs of a sweep can be compared: the default's noise on actions, the same for all."""
    sigma = []
    for settings in ({}, {"p_mean": 0.7, "p_std": 0.4, "ema": 0.9, "obs_noise": 0.5}):
        config = dataclasses.replace(CONFIG, **settings)
        dataset = pgd.make_dataset(toy_log(), config)
        state = pgd.DenoiserState({}, {}, (), jnp.zeros(()))
        sigma.append(noise_of(monkeypatch, pgd.validate_diffusion, state, dataset, config))
    np.testing.assert_array_equal(*map(np.sort, sigma))
    assert len(sigma[0]) == 1024
    assert np.log(sigma[0]).mean() == pytest.approx(0.6, abs=0.1)
    assert np.log(sigma[0]).std() == pytest.approx(1.4, abs=0.1)


def test_validation_is_of_the_average_on_held_out_windows(monkeypatch):
    seen = []

    def spy(params, key, dataset, starts, num, config):
        seen.append((params, starts))
        return jnp.zeros(())

    monkeypatch.setattr(pgd, "denoising_loss", spy)
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    pgd.validate_diffusion(pgd.DenoiserState("last", "mean", (), 0), dataset, CONFIG)
    assert {params for params, _ in seen} == {"mean"}
    assert all(starts is dataset.val_starts for _, starts in seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "friction-hopper.hdf5",
        "simglucose.hdf5",
        "door-human-v0.hdf5",
        "safety-halfcheetah-train.hdf5",
    ],
)
def test_a_denoiser_learns_each_real_log(name):
    task = data.load(path=str(real_log(name)))
    config = pgd.Config(
        horizon=32, features=32, blocks=1, fit_steps=250, fit_chunk=250, fit_batch=32, ema=0.98
    )
    dataset = pgd.make_dataset(task.log, config, task.action_low, task.action_high)
    diffusion = pgd.make_diffusion(config)
    state = diffusion.init(jax.random.key(0), dataset)
    validate = jax.jit(diffusion.validate)
    before = float(validate(state, dataset)["validation_loss"])
    state, _ = jax.jit(diffusion.fit)(jax.random.key(0), state, dataset)
    after = float(validate(state, dataset)["validation_loss"])
    # An untrained network answers 0: D = c_skip x has an exact loss, and a label that of its square
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 2**31 - 1), 8)
    first = lambda key: jax.random.split(key, 3)[0]
    draw = lambda key: dataset.windows(first(key), dataset.val_starts, 128, config.horizon)
    square = np.mean([np.mean(np.asarray(draw(key)) ** 2, (0, 1)) for key in keys], axis=0)  # (D,)
    variance = np.exp(2 * (config.p_mean + config.p_std * norm.ppf((np.arange(999) + 0.5) / 999)))
    variance = variance[:, None] * np.where(np.arange(len(square) - 2) < dataset.obs_dim, 1 / 16, 1)
    seen = np.mean((variance * square[:-2] + 1) / (variance + 1), axis=0)
    assert before == pytest.approx(np.mean([*seen, *square[-2:]]), rel=0.03)
    assert after < before - 0.1


@pytest.mark.slow
def test_bfloat16_activations_keep_float32_parameters_and_nearly_the_same_loss():
    losses, dataset = {}, pgd.make_dataset(toy_log(), CONFIG)
    for precision in ("float32", "bfloat16"):
        config = dataclasses.replace(
            CONFIG, precision=precision, fit_steps=200, fit_chunk=200, ema=0.98
        )
        generator = pgd.make_diffusion(config)
        state = generator.init(jax.random.key(0), dataset)
        fit = jax.jit(generator.fit).lower(jax.random.key(0), state, dataset)
        assert bool(re.search(r"dot_general.*bf16", fit.as_text())) == (precision == "bfloat16")
        state, _ = fit.compile()(jax.random.key(0), state, dataset)
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        losses[precision] = float(jax.jit(generator.validate)(state, dataset)["validation_loss"])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"] != losses["float32"] < 0.9


# --- Sampling ---


SAMPLER = {
    "sample_steps": 6, "sigma_min": 0.03, "sigma_max": 7.0, "rho": 3.0, "eta": 0.6,
    "s_churn": 1.3, "s_tmin": 0.1, "s_tmax": 3.0, "s_noise": 1.2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["sde", "heun"])
def test_a_sample_is_the_samplers_with_the_settings_and_the_averaged_parameters(name):
    config = dataclasses.replace(CONFIG, sampler=name, obs_noise=0.4, **SAMPLER)
    dataset, key = pgd.make_dataset(toy_log(), config), jax.random.key(3)
    params, ema = (pgd.init_unet(jax.random.key(i), 7, 7, config) for i in (0, 1))
    move = lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape)
    params, ema = jax.tree.map(move, (params, ema))
    state = pgd.DenoiserState(params, ema, (), 0)
    x = jax.jit(lambda k: pgd.sample(k, state, dataset, config))(key)
    ramp, s = np.arange(6) / 5, SAMPLER
    low, high = s["sigma_min"] ** (1 / 3), s["sigma_max"] ** (1 / 3)
    sigmas = jnp.append((high + ramp * (low - high)) ** 3, 0.0).astype(jnp.float32)
    # Noise on observations is 0.4 of that on actions: what is sampled is x over its noise
    finite = np.array([0.4, 0.4, 0.4, 1, 1, 1, 1])
    scale = np.where(np.arange(7) < 5, finite, np.inf)
    denoiser = pgd.precondition(lambda x, c: pgd.unet(ema, x, c, config), scale)
    args = lambda x, sigma: denoiser(finite * x, sigma) / finite, (4, 8, 7), sigmas
    if name == "sde":
        expected = jax.jit(lambda k: pgd.sample_sde(k, *args, eta=0.6))(key)
    else:
        churn = (1.3, 0.1, 3.0, 1.2)
        expected = jax.jit(lambda k: pgd.sample_heun(k, *args, churn))(key)
    np.testing.assert_allclose(x, finite * expected, rtol=1e-3, atol=1e-3)


# --- The rounds ---


def fake_diffusion(config):
    """Trajectories that are the round's random numbers, plus the weight of the guidance in the
    reward; never logged steps, never 0."""

    def generate(key, model, policy, weight, dataset):
        num = config.trajectories * config.horizon
        obs = 100.0 + jax.random.normal(key, (num, dataset.obs_dim))
        action = jnp.zeros((num, dataset.act_dim))
        reward, done = jnp.full(num, 10.0 + weight), jnp.zeros(num)
        return pgd.Transition(obs, action, reward, done, obs, action)

    return pgd.Generator(
        lambda key, dataset: (), lambda key, model, dataset: (model, {}), generate,
        lambda model, dataset: {}, 0, config.horizon,
    )  # fmt: skip


class Recorder:
    """An agent that only remembers the last batch it was shown, and how many."""

    batches_per_update = 2

    def init(self, key, obs_dim, act_dim):
        num = 2 * CONFIG.batch_size
        shape = lambda *s: jnp.zeros((num, *s))
        batch = pgd.Transition(
            shape(obs_dim), shape(act_dim), shape(), shape(), shape(obs_dim), shape(act_dim)
        )
        return batch, jnp.zeros(())

    def update(self, key, state, batch):
        return (batch, state[1] + 1), {"shown": state[1]}

    def act(self, state, obs):
        return jnp.zeros((*obs.shape[:-1], 2)) + 0.01 * state[1]

    def log_prob(self, state, obs, action):
        return -jnp.sum(action**2, axis=-1) - state[1]


def record(config=CONFIG, make_generator=fake_diffusion, rounds=1, evaluate=None):
    """-> (states after each round, metrics of each, data set) of a Recorder."""
    dataset = pgd.make_dataset(toy_log(), config)
    program = pgd.make_program(config, Recorder(), make_generator, evaluate)
    state, run_round, states, said = program.init(one(0), dataset), jax.jit(program.round), [], []
    for _ in range(rounds):
        state, metrics = run_round(one(0), state, dataset)
        states.append(state)
        said.append(metrics)
    return states, said, dataset


@pytest.mark.parametrize(
    "maker, real", [(fake_diffusion, 4), (fake_diffusion, 9), (make_log_alone, 16)]
)
def test_batches_mix_synthetic_and_real_in_the_stated_numbers(maker, real):
    config = dataclasses.replace(CONFIG, real_batch=real)
    (state,), _, dataset = record(config, maker)
    logged = {tuple(np.round(o, 3)) for o in np.asarray(dataset.steps[:, :3])}
    seen = np.asarray(state.agent[0].obs)
    is_real = np.array([tuple(np.round(o, 3)) in logged for o in seen])
    assert is_real.reshape(2, 16).sum(1).tolist() == [real, real]
    assert float(state.agent[1]) == CONFIG.updates


def test_batches_come_from_the_filled_part_of_the_buffer():
    config = dataclasses.replace(CONFIG, real_batch=0, buffer_rounds=3, trajectories=4)
    states, _, _ = record(config, rounds=5)
    row = lambda x: {tuple(o) for o in np.asarray(x).reshape(-1, 3).tolist()}
    for i, state in enumerate(states):
        shown = row(state.agent[0].obs)
        filled = min(i + 1, 3)
        slots = [row(state.buffer.obs[slot]) for slot in range(3)]
        assert (0.0, 0.0, 0.0) not in shown and shown <= set().union(*slots)
        from_each = [len(shown & slot) for slot in slots]
        assert all(n > 0 for n in from_each[:filled]) and not any(from_each[filled:])


def test_the_buffer_keeps_the_newest_rounds():
    states, _, _ = record(rounds=3)
    seen = [np.asarray(s.buffer.obs) for s in states]
    assert np.all(seen[0][1] == 0) and np.any(seen[0][0] != 0)
    np.testing.assert_array_equal(seen[1][0], seen[0][0])
    np.testing.assert_array_equal(seen[2][1], seen[1][1])
    assert np.abs(seen[2][0] - seen[0][0]).max() > 1e-3


def test_round_0_has_weight_0_and_later_ones_have_1():
    states, _, _ = record(rounds=2)
    assert np.all(np.asarray(states[1].buffer.reward[0]) == 10.0)
    assert np.all(np.asarray(states[1].buffer.reward[1]) == 11.0)


@pytest.mark.slow
def test_first_round_is_unguided_and_later_ones_are_not():
    buffers = []
    for guidance in (0.25, 0.0):
        program, dataset = make(dataclasses.replace(CONFIG, guidance=guidance))
        state, run_round = program.init(one(0), dataset), jax.jit(program.round)
        state, _ = jax.jit(program.fit)(one(0), state, dataset)
        for _ in range(2):
            state, _ = run_round(one(0), state, dataset)
        buffers.append(np.asarray(state.buffer.action))
    np.testing.assert_allclose(buffers[0][0], buffers[1][0], atol=1e-5)
    assert np.abs(buffers[0][1] - buffers[1][1]).max() > 1e-2


def starts_and_action(key, act):
    """An environment that tells what it is given: a random start, and the action at it."""
    start = jax.random.uniform(key, (3,))
    return jnp.array([start[0] + 1e3 * act(start)[0]])


def test_the_agent_that_is_judged_is_the_one_after_the_updates():
    _, said, _ = record(rounds=2, evaluate=starts_and_action)
    for i, metrics in enumerate(said):
        num = (i + 1) * CONFIG.updates
        assert float(metrics["return"]) // 10.0 == num  # the Recorder acts by its updates
        assert float(metrics["log_prob_synthetic"]) == pytest.approx(-num)
        assert -num - 2 < float(metrics["log_prob_real"]) < -num
        assert float(metrics["shown"]) == num - 2.5  # the mean over the updates


def test_a_round_says_how_far_its_data_are_from_the_policy_that_guided_them():
    """The synthetic actions are 0; the Recorder acts by 0.01 for each update before the round."""
    _, said, dataset = record(rounds=3)
    logged = np.asarray(dataset.transitions(jnp.arange(len(dataset.usable))).action)
    for i, metrics in enumerate(said[1:], 1):
        action = 0.01 * i * CONFIG.updates
        synthetic, log = action**2, np.mean((logged - action) ** 2)
        assert float(metrics["policy_distance"]) == pytest.approx(synthetic / log, rel=0.1)
        expected = 1 / synthetic - 1 / log
        assert float(metrics["effective_guidance"]) == pytest.approx(expected, rel=0.01)


def test_every_evaluation_has_its_own_starts_and_so_has_every_seed():
    program, dataset = make(agent=Recorder(), evaluate=starts_and_action, synthetic="none")
    run_round, starts = jax.jit(program.round), []
    for seed in (0, 1):
        state = program.init(one(seed), dataset)
        for _ in range(3):
            state, metrics = run_round(one(seed), state, dataset)
            starts.append(float(metrics["return"]) % 10.0)
    assert len({round(s, 2) for s in starts}) == 6


def test_the_keys_of_a_run_are_all_different():
    rows = [pgd.run_keys(one(seed), index) for seed in (0, 1) for index in (0, 1, 2)]
    seen = lambda keys: {tuple(jax.random.key_data(k).tolist()) for k in keys}
    once, each = seen(k for row in rows for k in row[:3]), seen(k for row in rows for k in row[3:])
    assert len(rows[0]) == 7 and len(once) == 2 * 3 and len(each) == 6 * 4 and not once & each
