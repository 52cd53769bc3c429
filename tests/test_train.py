"""The whole run: chunks equal the whole, seeds under vmap equal the seed alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import real_log, toy_log

import agents
import data
import devices
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
    gen_whole, state_whole, metrics_whole = whole
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


def make_one(dataset):
    """-> make(config) -> Trainer, as pgd.build has it."""
    makers = {"none": pgd.make_resampler, "world-model": world_model.make_world_model}

    def make(config):
        agent = agents.td3_bc(hidden=(16, 16), **config.hyper)
        generator = makers.get(config.synthetic, pgd.make_diffusion)(config, 3, 2)
        return pgd.make_train(config, agent, generator, 3, 2, evaluate)

    return make


def train_all(config):
    """The whole of a config's runs on this machine's one device -> (points, fits, results)."""
    dataset, points = pgd.make_dataset(toy_log(), config), pgd.sweep_points(config)
    fits = pgd.fit_axes(config, list(points[0]))
    mesh = devices.make_mesh(len(points), config.num_seeds, 1)
    trainer = pgd.spread(make_one(dataset), config, mesh, len(points), fits)
    return points, fits, jax.jit(trainer.train)(pgd.make_runs(config, points), dataset)


@pytest.mark.parametrize(
    "synthetic, shared, sweep",
    [
        ("world-model", False, "penalty 0 2"),
        ("diffusion", True, "guidance 0 0.5"),
        ("diffusion", False, "p_mean -1.2 0.5 eta 0 4"),
        ("none", True, "hyper.alpha 0.5 2.5"),
    ],
)
def test_every_run_of_a_program_equals_that_run_alone(synthetic, shared, sweep):
    config = dataclasses.replace(
        CONFIG, synthetic=synthetic, shared_denoiser=shared, seed=3, num_seeds=2,
        sweep=tuple(sweep.split()), hyper={"alpha": 1.0} if "hyper" in sweep else {},
    )  # fmt: skip
    points, fits, (gen, states, metrics) = train_all(config)
    assert metrics["return"].shape == (len(points), 2, CONFIG.rounds)
    dataset = pgd.make_dataset(toy_log(), config)
    make = make_one(dataset)
    of = lambda point: make(pgd.with_settings(config, point))
    fit = jax.jit(lambda point, key: of(point).fit(key, dataset))
    run_rounds = jax.jit(lambda point, key, gen: of(point).run_rounds(key, gen, dataset))
    for i, point in enumerate(points):
        for s in range(2):
            key = jax.random.key(3 + s)
            gen_alone = fit(point, jax.random.split(jax.random.key(0) if shared else key)[0])
            own = tuple({"sweep": i, "seed": s}[axis] for axis in fits)
            assert_close(jax.tree.map(lambda x: x[own], gen), gen_alone)
            state, of_run = run_rounds(point, jax.random.split(key)[1], gen_alone)
            assert_close(jax.tree.map(lambda x: x[i, s], states), state, 5e-4)
            assert_close(metrics["return"][i, s], of_run["return"], 5e-4)
    assert len(set(metrics["return"][..., -1].ravel().tolist())) == 2 * len(points)


def test_a_setting_written_into_the_program_gives_what_it_gives_at_run_time():
    dataset, config = pgd.make_dataset(toy_log(), CONFIG), dataclasses.replace(CONFIG, seed=7)
    trainer = pgd.spread(make_one(dataset), config, devices.make_mesh(1, 1, 1))
    gen, state, metrics = jax.jit(trainer.train)(pgd.make_runs(config), dataset)
    alone = make_one(dataset)(config)
    gen_alone = jax.jit(alone.fit)(jax.random.split(jax.random.key(0))[0], dataset)
    key = jax.random.split(jax.random.key(7))[1]
    state_alone, metrics_alone = jax.jit(alone.run_rounds)(key, gen_alone, dataset)
    assert_close(gen, gen_alone)
    assert_close(jax.tree.map(lambda x: x[0, 0], state), state_alone, 5e-4)
    assert_close(metrics["return"][0, 0], metrics_alone["return"], 5e-4)


def test_what_does_not_touch_the_fit_leaves_one_denoiser_for_all():
    sweep = lambda *words, **kw: pgd.fit_axes(dataclasses.replace(CONFIG, **kw), words)
    assert sweep() == sweep("guidance", "eta") == ()
    assert sweep("fit_lr") == ("sweep",)
    assert sweep("guidance", shared_denoiser=False) == ("seed",)
    assert sweep("fit_lr", shared_denoiser=False) == ("sweep", "seed")
    assert sweep("penalty", synthetic="world-model") == ()


def test_a_grid_has_every_pair_of_values():
    config = dataclasses.replace(CONFIG, sweep=("guidance", "0", "1", "eta", "1", "4"))
    grid = [(p["guidance"], p["eta"]) for p in pgd.sweep_points(config)]
    assert grid == [(0.0, 1.0), (0.0, 4.0), (1.0, 1.0), (1.0, 4.0)]
    assert pgd.sweep_points(CONFIG) == [{}]


@pytest.mark.parametrize(
    "words, said",
    [
        ("horizon 16 32", "is not a number to vary"),
        ("validation 0.1 0.2", "changes the log's split"),
        ("penalty 0 1", "does nothing here"),
        ("guidence 0 1", "is not a setting"),
        ("0 1", "wants a field before its values"),
        ("guidance", "wants values"),
        ("guidance 1 1", "each once"),
        ("guidance 0 guidance 1", "named twice"),
        ("sigma-min 0.1 30", "--sigma-min must lie between"),
        ("fit-lr 0.1 -1", "--fit-lr must be above 0"),
        ("s-churn 0 80", "does nothing here"),  # that is Heun's
        ("guidance 0 inf", "must be finite"),
    ],
)
def test_a_sweep_that_cannot_work_says_so(words, said):
    with pytest.raises(pgd.UserError, match=said):
        pgd.sweep_points(dataclasses.replace(CONFIG, sweep=tuple(words.split())))


def test_settings_given_at_run_time_do_not_change_the_program():
    """So that another --guidance or --fit-steps finds its program in the compilation cache."""
    dataset, text = pgd.make_dataset(toy_log(), CONFIG), set()
    for changed in (
        {},
        {"guidance": 2.0, "eta": 1.0},
        {"fit_lr": 1e-3, "fit_steps": 40, "p_mean": -1.0},
    ):
        config = dataclasses.replace(CONFIG, **changed)
        trainer = pgd.spread(make_one(dataset), config, devices.make_mesh(1, 1, 1))
        runs = pgd.make_runs(config)
        text.add(jax.jit(trainer.train).lower(runs, dataset).as_text())
    assert len(text) == 1
    off = dataclasses.replace(CONFIG, guidance=0.0)  # but what is switched off is left out
    trainer = pgd.spread(make_one(dataset), off, devices.make_mesh(1, 1, 1))
    shorter = jax.jit(trainer.train).lower(pgd.make_runs(off), dataset).as_text()
    assert len(shorter) < 0.98 * len(text.pop())


def test_the_learning_rate_is_a_warm_up_and_a_cosine():
    """As optax has it, which cannot take a number of steps given at run time."""
    config = dataclasses.replace(CONFIG, fit_steps=40, fit_lr=0.01, fit_chunk=1)
    dataset, generator = pgd.make_dataset(toy_log(), config), pgd.make_diffusion(config, 3, 2)
    schedule = optax.warmup_cosine_decay_schedule(0.001, 0.01, 4, 40)
    state, fit_chunk = generator.init(jax.random.key(0)), jax.jit(generator.fit_chunk)
    for step in range(12):
        # Adam's own state says which direction was taken; the length is the learning rate
        before = state
        state, _ = fit_chunk(jax.random.key(1), state, dataset)
        mu, nu = state.opt_state[0].mu["in"]["w"], state.opt_state[0].nu["in"]["w"]
        n = step + 1
        way = (mu / (1 - 0.9**n)) / (jnp.sqrt(nu / (1 - 0.999**n)) + 1e-8)
        moved = before.params["in"]["w"] - state.params["in"]["w"]
        rate = float(jnp.sum(moved * way) / jnp.sum(way**2))
        if step > 0:  # the network's output is 0 at first, and so is this gradient
            assert rate == pytest.approx(float(schedule(step)), rel=1e-3)


def test_the_host_is_told_of_every_chunk():
    told = []
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    generator = pgd.make_diffusion(CONFIG, 3, 2)
    report = lambda stage, metrics: told.append((stage, float(metrics.get("loss", 0.0))))
    agent = agents.td3_bc(hidden=(16, 16))
    trainer = pgd.make_train(CONFIG, agent, generator, 3, 2, evaluate, report)
    jax.block_until_ready(jax.jit(trainer.train)(jax.random.key(0), dataset))
    jax.effects_barrier()
    stages = [stage for stage, _ in told]
    assert stages.count("fit") == 4 and stages.count("rounds") == CONFIG.rounds
    assert all(0 < loss < 10 for stage, loss in told if stage == "fit")


def test_first_round_is_unguided_and_later_ones_are_not():
    unguided = dataclasses.replace(CONFIG, guidance=0.0)
    buffers = []
    for config in (CONFIG, unguided):
        trainer, dataset = make(config)
        gen = jax.jit(trainer.fit)(jax.random.key(0), dataset)
        state = trainer.init_rounds(jax.random.key(1), gen, dataset)
        for _ in range(2):
            state, _ = jax.jit(trainer.round_chunk)(jax.random.key(1), state, gen, dataset)
        buffers.append(np.asarray(state.buffer.action))
    np.testing.assert_allclose(buffers[0][0], buffers[1][0], atol=1e-6)
    assert np.abs(buffers[0][1] - buffers[1][1]).max() > 1e-2


def test_buffer_keeps_the_newest_rounds():
    trainer, dataset = make()
    gen = jax.jit(trainer.fit)(jax.random.key(0), dataset)
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
        return pgd.Transition(
            shape(obs_dim), shape(act_dim), shape(), shape(obs_dim), shape(), shape(act_dim)
        )

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
    states = jax.tree.map(lambda x: x[None], states)  # of one point
    both = dataclasses.replace(CONFIG, num_seeds=2, eval_episodes=2)
    second = dataclasses.replace(both, seed=1, num_seeds=1)
    returns = pgd.make_host_evaluate(both, "halfcheetah", agent, dataset)(0, states)
    alone = pgd.make_host_evaluate(second, "halfcheetah", agent, dataset)(
        0, jax.tree.map(lambda x: x[:, 1:], states)
    )
    assert returns.shape == (1, 2) and abs(returns[0, 0] - returns[0, 1]) > 1e-3
    np.testing.assert_allclose(returns[0, 1], alone[0, 0], rtol=1e-3)
