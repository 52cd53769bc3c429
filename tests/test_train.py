"""The whole run: chunks equal the whole, seeds under vmap equal the seed alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import real_log, toy_log

import agents
import data
import pgd
import world_model

CONFIG = pgd.Config(
    horizon=8, features=16, blocks=1, fit_steps=20, fit_chunk=5, fit_batch=8, sample_steps=4,
    rounds=3, updates=4, batch_size=16, real_batch=4, trajectories=8, sample_batch=4,
    buffer_rounds=2, members=3, elites=2, model_hidden=16, model_layers=2, model_steps=20,
    model_chunk=5, model_batch=16, rollout=3,
)  # fmt: skip


def evaluate(key, act):
    """A stand-in for an environment: how far the actions are from 0.3 on random observations."""
    return -jnp.abs(act(jax.random.normal(key, (5, 3))) - 0.3).sum(-1)


def make(config=CONFIG, agent=None):
    dataset = pgd.make_dataset(toy_log(), config)
    agent = agent or agents.td3_bc(hidden=(16, 16))
    makers = {"none": pgd.make_resampler, "world-model": world_model.make_world_model}
    generator = makers.get(config.synthetic, pgd.make_diffusion)(config, 3, 2)
    return pgd.make_train(config, agent, generator, 3, 2, evaluate), dataset


def assert_close(a, b, tol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tol, atol=tol), a, b)


@pytest.mark.parametrize("synthetic", ["diffusion", "world-model", "none"])
def test_chunks_equal_the_whole(synthetic):
    trainer, dataset = make(dataclasses.replace(CONFIG, synthetic=synthetic))
    key_fit, key_rounds = jax.random.split(jax.random.key(5))
    whole = jax.jit(trainer.train)(jax.random.key(5), dataset)
    gen_whole, state_whole, metrics_whole, _ = whole
    fit_chunk, round_chunk = jax.jit(trainer.generator.fit_chunk), jax.jit(trainer.round_chunk)
    gen = trainer.generator.init(key_fit)
    for _ in range(trainer.generator.num_chunks):
        gen, _ = fit_chunk(key_fit, gen, dataset)
    state, returns = trainer.init_rounds(key_rounds, gen, dataset), []
    for _ in range(CONFIG.rounds):
        state, metrics = round_chunk(key_rounds, state, gen, dataset)
        returns.append(metrics["return"])
    assert_close(gen_whole, gen)
    assert_close(state_whole, state)
    assert_close(metrics_whole["return"], np.array(returns))
    assert len(set(np.round(returns, 6))) == CONFIG.rounds  # something was learnt in every round


@pytest.mark.parametrize("synthetic", ["diffusion", "world-model"])
def test_a_chunk_leaves_the_kind_of_state_it_takes_so_that_it_compiles_once(synthetic):
    trainer, dataset = make(dataclasses.replace(CONFIG, synthetic=synthetic))
    kind = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
    key, generator = jax.random.key(0), trainer.generator
    gen = jax.eval_shape(generator.init, key)
    assert kind(jax.eval_shape(generator.fit_chunk, key, gen, dataset)[0]) == kind(gen)
    state = jax.eval_shape(trainer.init_rounds, key, gen, dataset)
    after = jax.eval_shape(trainer.round_chunk, key, state, gen, dataset)[0]
    assert kind(after) == kind(state)


@pytest.mark.parametrize(
    "synthetic, shared", [("diffusion", True), ("diffusion", False), ("world-model", False)]
)
def test_every_seed_under_vmap_equals_that_seed_alone(synthetic, shared):
    trainer, dataset = make(dataclasses.replace(CONFIG, synthetic=synthetic))
    many = pgd.vmap_seeds(trainer, shared)
    seeds = jnp.array([3, 11])
    keys = jax.vmap(jax.random.key)(seeds)
    fit_key = jax.random.key(0) if shared else keys
    gen, _ = jax.jit(many.fit)(fit_key, dataset)
    states, metrics = jax.jit(many.run_rounds)(keys, gen, dataset)
    for i in range(2):
        alone_key = jax.random.key(0) if shared else keys[i]
        gen_alone, _ = jax.jit(trainer.fit)(alone_key, dataset)
        state, metrics_alone = jax.jit(trainer.run_rounds)(keys[i], gen_alone, dataset)
        assert_close(jax.tree.map(lambda x, i=i: x[i], states), state)
        assert_close(metrics["return"][i], metrics_alone["return"])
    assert np.abs(metrics["return"][0] - metrics["return"][1]).max() > 1e-4


def test_first_round_is_unguided_and_later_ones_are_not():
    unguided = dataclasses.replace(CONFIG, guidance=0.0)
    buffers = []
    for config in (CONFIG, unguided):
        trainer, dataset = make(config)
        gen, _ = jax.jit(trainer.fit)(jax.random.key(0), dataset)
        state = trainer.init_rounds(jax.random.key(1), gen, dataset)
        for _ in range(2):
            state, _ = jax.jit(trainer.round_chunk)(jax.random.key(1), state, gen, dataset)
        buffers.append(np.asarray(state.buffer.action))
    np.testing.assert_allclose(buffers[0][0], buffers[1][0], atol=1e-6)
    assert np.abs(buffers[0][1] - buffers[1][1]).max() > 1e-2


def test_buffer_keeps_the_newest_rounds():
    trainer, dataset = make()
    gen, _ = jax.jit(trainer.fit)(jax.random.key(0), dataset)
    state = trainer.init_rounds(jax.random.key(1), gen, dataset)
    seen = []
    for _ in range(3):
        state, _ = jax.jit(trainer.round_chunk)(jax.random.key(1), state, gen, dataset)
        seen.append(np.asarray(state.buffer.obs))
    assert np.all(seen[0][1] == 0) and np.any(seen[0][0] != 0)
    np.testing.assert_array_equal(seen[1][0], seen[0][0])
    np.testing.assert_array_equal(seen[2][1], seen[1][1])
    assert np.abs(seen[2][0] - seen[0][0]).max() > 1e-3


class Recorder:
    """An agent that only remembers the last batch it was shown."""

    batches_per_update = 2

    def init(self, key, obs_dim, act_dim):
        num = 2 * CONFIG.batch_size
        shape = lambda *s: jnp.zeros((num, *s))
        return pgd.Transition(shape(obs_dim), shape(act_dim), shape(), shape(obs_dim), shape())

    def update(self, key, state, batch):
        return batch, {}

    def act(self, state, obs):
        return jnp.zeros((*obs.shape[:-1], 2))

    def log_prob(self, state, obs, action):
        return -jnp.sum(action**2, axis=-1)


@pytest.mark.parametrize("synthetic, real_share", [("diffusion", 4), ("none", 16)])
def test_batches_mix_synthetic_and_real_in_the_stated_numbers(synthetic, real_share):
    trainer, dataset = make(dataclasses.replace(CONFIG, synthetic=synthetic), Recorder())
    gen = trainer.generator.init(jax.random.key(0))
    state = trainer.init_rounds(jax.random.key(1), gen, dataset)
    state, _ = jax.jit(trainer.round_chunk)(jax.random.key(1), state, gen, dataset)
    logged = {tuple(np.round(o, 3)) for o in np.asarray(dataset.steps[:, :3])}
    real = np.array([tuple(np.round(o, 3)) in logged for o in np.asarray(state.agent.obs)])
    assert real.reshape(2, 16).sum(1).tolist() == [real_share, real_share]


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
    config = pgd.Config(features=32, blocks=1, fit_steps=300, fit_chunk=300)
    dataset = pgd.make_dataset(task.log, config, task.action_low, task.action_high)
    diffusion = pgd.make_diffusion(config, dataset.obs_dim, dataset.act_dim)
    state = diffusion.init(jax.random.key(0))
    validate = jax.jit(diffusion.validate)
    before = float(validate(state, dataset)["validation_loss"])
    state, _ = jax.jit(diffusion.fit_chunk)(jax.random.key(0), state, dataset)
    after = float(validate(state, dataset)["validation_loss"])
    assert after < before - 0.1 < 1.0  # an untrained network is a denoiser of white noise: 1


def test_host_evaluation_of_a_seed_does_not_depend_on_its_neighbours(monkeypatch):
    make_envs = data.make_envs

    def short_envs(*args):  # before chaos blows up the last bit
        envs = make_envs(*args)
        envs.limit = 50
        return envs

    monkeypatch.setattr(data, "make_envs", short_envs)
    dataset = pgd.make_dataset(toy_log(obs_dim=17, act_dim=6), CONFIG)
    agent = agents.td3_bc(hidden=(8,))
    states = jax.vmap(lambda k: agent.init(k, 17, 6))(jax.random.split(jax.random.key(0), 2))
    both = dataclasses.replace(CONFIG, num_seeds=2, eval_episodes=2)
    second = dataclasses.replace(both, seed=1, num_seeds=1)
    returns = pgd.make_host_evaluate(both, "halfcheetah", agent, dataset)(0, states)
    alone = pgd.make_host_evaluate(second, "halfcheetah", agent, dataset)(
        0, jax.tree.map(lambda x: x[1:], states)
    )
    assert returns.shape == (2,) and abs(returns[0] - returns[1]) > 1e-3
    np.testing.assert_allclose(returns[1], alone[0], rtol=1e-3)
