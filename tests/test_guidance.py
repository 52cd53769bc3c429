"""Policy guidance against the closed form of a linear policy (PGD section 4)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_log

import agents
import pgd
from baselines.behaviour import ClonedState, make_diffusion_with_clone
from host import flags
from host.errors import UserError

CONFIG = pgd.Config(horizon=8, fit_batch=8, batch_size=8, sample_steps=16)
RATE = 256 / 16  # a push at one of 16 levels stands for those of 16 of the paper's 256
W = jnp.array([[0.5, -0.2], [0.1, 0.4], [-0.3, 0.2]])  # a linear policy: mean action obs @ W


def log_prob(obs, action):
    return -0.5 * jnp.sum((action - obs @ W) ** 2, axis=-1)


POLICY = pgd.action_score(log_prob)


def lambda_at(step, num=16):
    """PGD's schedule over the levels, per 256 of them."""
    return 256 / num * ((1 - step / num) + 0.3 * np.sin(np.pi * (step + 1) / num))


def moved_by(terms, config=CONFIG, step=3, x=None, denoised=None):
    """How far the guide of the terms moves x (5, 8, D) -> (pushed - x, x, dataset). The gradient is
    taken at `denoised`, which is x itself unless given."""
    dataset = pgd.make_dataset(toy_log(), config)
    if x is None:
        x = dataset.windows(jax.random.key(0), dataset.train_starts, 5, 8)
    guide = pgd.make_guide(terms, dataset, config)
    moved = guide(x, x if denoised is None else denoised, jnp.int32(step)) - x
    return np.asarray(moved), np.asarray(x), dataset


def push(config=CONFIG, step=3, weight=1.0, f=log_prob, **more):
    return moved_by([(weight, pgd.action_score(f))], config, step, **more)


def exact_gradient(x, dataset):
    """d/dz of -|tanh(std z + mean) - obs W|^2 / 2, by hand."""
    mean, std = (np.asarray(v)[3:5] for v in (dataset.mean, dataset.std))
    action = np.tanh(x[..., 3:5] * std + mean)
    return (x[..., :3] @ np.asarray(W) - action) * (1 - action**2) * std


def unit(g):
    """Gradients (..., T, D) -> the same at length 1 for each trajectory."""
    return g / np.sqrt((g**2).sum((-2, -1), keepdims=True))


def test_push_is_the_exact_gradient_of_a_linear_policy():
    moved, x, dataset = push(step=3)
    expected = lambda_at(3) * unit(exact_gradient(x, dataset))
    np.testing.assert_allclose(moved[..., 3:5], expected, atol=2e-4)
    assert np.all(moved[..., :3] == 0) and np.all(moved[..., 5:] == 0)  # only actions are pushed


def test_push_has_length_lambda_n_for_each_trajectory():
    for step in (0, 3, 14):
        moved, x, dataset = push(step=step, weight=2.0)
        lambda_n = 2.0 * lambda_at(step)
        expected = lambda_n * unit(exact_gradient(x, dataset))
        np.testing.assert_allclose(moved[..., 3:5], expected, atol=4e-4)
        np.testing.assert_allclose(np.sqrt((moved**2).sum((1, 2))), lambda_n, rtol=1e-4)


def test_lambda_of_256_levels_is_the_papers():
    """lambda_n = lambda ((1 - n/N) + 0.3 sin(pi (n + 1) / N)), none at the last of the N steps."""
    config = dataclasses.replace(CONFIG, sample_steps=256)
    for step in (0, 100, 254):
        moved, *_ = push(config, step, weight=0.7)
        lambda_n = 0.7 * ((1 - step / 256) + 0.3 * np.sin(np.pi * (step + 1) / 256))
        np.testing.assert_allclose(np.sqrt((moved**2).sum((1, 2))), lambda_n, rtol=1e-3)
    assert np.all(push(config, 255)[0] == 0)


def test_no_push_at_the_last_step_nor_at_zero_weight():
    assert np.all(push(step=15)[0] == 0)
    assert np.all(push(step=3, weight=0.0)[0] == 0)


def test_a_vanishing_gradient_pushes_nothing_and_is_not_nan():
    moved, _, _ = push(f=lambda obs, action: jnp.zeros(action.shape[:-1]))
    assert np.all(moved == 0)


def test_the_gradient_is_taken_at_the_denoised_trajectory():
    noised = 40.0 * jax.random.normal(jax.random.key(1), (5, 8, 7))
    shrunk = noised / (1 + 40.0**2)
    moved, _, dataset = push(x=noised, denoised=shrunk)
    g = exact_gradient(np.asarray(shrunk), dataset)
    np.testing.assert_allclose(moved[..., 3:5], lambda_at(3) * unit(g), atol=2e-3)
    # at the noised one tanh is saturated and most actions feel nothing
    at_noised = exact_gradient(np.asarray(noised), dataset)
    assert np.mean(np.abs(at_noised) < 1e-3) > 0.8 > np.mean(np.abs(g) < 1e-3)


def white_noise_denoiser(x, sigma):
    """Exact for standardised white noise."""
    return x / (1 + sigma**2)


@pytest.mark.parametrize("sampler", [pgd.sample_sde, pgd.sample_heun])
def test_guided_samples_are_likelier_under_the_policy_and_more_so_with_weight(sampler):
    config = dataclasses.replace(CONFIG, sample_steps=32)
    dataset = pgd.make_dataset(toy_log(), config)

    @jax.jit
    def likelihood(weight):
        guide = pgd.make_guide([(weight, POLICY)], dataset, config)
        sigmas = pgd.noise_levels(config)
        x = sampler(jax.random.key(0), white_noise_denoiser, (256, 8, 7), sigmas, guide)
        t = dataset.split(x)
        return log_prob(t.obs, t.action).mean()

    likelihoods = [float(likelihood(weight)) for weight in (0.0, 0.06, 0.25)]
    assert likelihoods[0] + 0.02 < likelihoods[1] < likelihoods[2] - 0.02


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_effect_of_a_weight_does_not_depend_on_the_number_of_levels(eta):
    dataset, effect = pgd.make_dataset(toy_log(), CONFIG), {}
    for num in (32, 64, 256):
        config = dataclasses.replace(CONFIG, sample_steps=num)
        sigmas = pgd.noise_levels(config)

        @jax.jit
        def likelihood(weight, config=config, sigmas=sigmas):
            guide = pgd.make_guide([(weight, POLICY)], dataset, config)
            args = jax.random.key(0), white_noise_denoiser, (1024, 8, 7), sigmas, guide
            t = dataset.split(pgd.sample_sde(*args, eta=eta))
            return log_prob(t.obs, t.action).mean()

        effect[num] = float(likelihood(0.1)) - float(likelihood(0.0))
    assert effect[256] > 0.03
    assert effect[64] == pytest.approx(effect[256], rel=0.15)
    assert effect[32] == pytest.approx(effect[256], rel=0.3)


# --- Guides that add up ---


def q_value(obs, action):
    return 3.0 + action @ jnp.array([1.0, -2.0]) + jnp.sum(obs, axis=-1)


def mine(t):
    """A user's own: reward, and a first observation near 1 in its first entry."""
    return jnp.sum(t.reward, axis=-1) - 2.0 * (t.obs[..., 0, 0] - 1.0) ** 2


def test_guides_add_up():
    terms = [(0.5, POLICY), (0.2, pgd.action_score(q_value)), (-0.3, POLICY), (0.1, mine)]
    alone = [moved_by([term])[0] for term in terms]
    assert all(np.abs(a).max() > 0.01 for a in alone)
    np.testing.assert_allclose(moved_by(terms)[0], sum(alone), atol=2e-5)


def test_a_negative_weight_pushes_the_other_way():
    np.testing.assert_allclose(push(weight=-0.5)[0], -push(weight=0.5)[0], atol=1e-5)


def test_value_guidance_is_the_gradient_of_q_by_the_actions_whatever_its_size():
    score = pgd.action_score(q_value)
    moved, x, dataset = moved_by([(0.5, score)])
    t = dataset.split(x)
    action, std = np.asarray(t.action), np.asarray(dataset.std[3:5])
    slope = np.array([1.0, -2.0]) * (1 - action**2) * std
    # before it is brought to length 1
    g = jax.grad(lambda x: jnp.sum(score(dataset.split(x))))(jnp.asarray(x))
    np.testing.assert_allclose(g[..., 3:5], slope, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        moved[..., 3:5], 0.5 * lambda_at(3) * unit(slope), rtol=1e-3, atol=1e-5
    )
    assert np.all(moved[..., :3] == 0) and np.all(moved[..., 5:] == 0)
    large, *_ = moved_by([(0.5, pgd.action_score(lambda *x: 1e3 * q_value(*x)))])
    np.testing.assert_allclose(large, moved, rtol=1e-3, atol=1e-5)


def test_a_score_of_ones_own_moves_everything_it_depends_on():
    moved, x, dataset = moved_by([(1.0, mine)])
    expected = np.zeros_like(moved)
    expected[..., 5] = dataset.std[5]  # reward, in its own units
    expected[:, 0, 0] = -4.0 * (x[:, 0, 0] - 1.0)
    np.testing.assert_allclose(moved, lambda_at(3) * unit(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sampler", [pgd.sample_sde, pgd.sample_heun])
def test_zero_weight_is_unguided_to_the_last_bit(sampler):
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    sigmas = pgd.noise_levels(CONFIG)
    sample = lambda guide: sampler(
        jax.random.key(0), white_noise_denoiser, (6, 8, 7), sigmas, guide
    )
    terms = [(0.0, POLICY), (0.0, pgd.action_score(q_value)), (0.0, mine)]
    np.testing.assert_array_equal(
        sample(pgd.make_guide(terms, dataset, CONFIG)), sample(lambda x, *_: x)
    )


def slope_of(x):
    """Regression of the standardised actions, before tanh, on the observations of a sample."""
    obs, z = np.asarray(x[..., :3]).reshape(-1, 3), np.asarray(x[..., 3:5]).reshape(-1, 2)
    w, *_ = np.linalg.lstsq(obs, z - z.mean(0), rcond=None)
    return w, (z - z.mean(0) - obs @ w).std(0)


@pytest.mark.slow
def test_guided_samples_of_a_gaussian_log_move_toward_the_product_density():
    """White noise, the exact denoiser, a Gaussian policy of mean obs @ W: in p(tau) pi^lambda each
    action given its observation has its mean on the line from 0 to the policy's, nearer with
    lambda, and a smaller spread; and observations are left alone."""
    log = toy_log()
    log["actions"] = 0.03 * np.random.default_rng(0).normal(size=log["actions"].shape)
    config = dataclasses.replace(CONFIG, sample_steps=64)
    dataset = pgd.make_dataset(log, config)  # tanh is straight over such small actions
    std = float(dataset.std[3])
    policy = lambda obs, action: -0.5 * jnp.sum((action / std - obs @ W) ** 2, axis=-1)
    sigmas, slopes, spreads = pgd.noise_levels(config), [], []

    @jax.jit
    def sample(weight):
        guide = pgd.make_guide([(weight, pgd.action_score(policy))], dataset, config)
        args = jax.random.key(0), white_noise_denoiser, (4096, 8, 7), sigmas, guide
        return pgd.sample_sde(*args, eta=1.0)

    for weight in (0.0, 0.02, 0.08):
        x = sample(weight)
        slope, spread = slope_of(x)
        slopes.append(slope)
        spreads.append(spread.mean())
        np.testing.assert_allclose(np.asarray(x[..., :3]).std((0, 1)), 1.0, atol=0.03)
    share = [float(np.sum(s * W) / np.sum(W**2)) for s in slopes]
    assert abs(share[0]) < 0.02 < share[1] < share[2] - 0.02 and share[2] < 1.0
    for slope, part in zip(slopes, share):
        np.testing.assert_allclose(slope, part * np.asarray(W), atol=0.03)
    assert spreads[0] > spreads[1] + 0.01 > spreads[2] + 0.02


# --- Where trajectories start ---

AR = 0.9 ** np.abs(np.arange(8)[:, None] - np.arange(8))  # covariance over time of each channel


def exact_unet(params, x, c_noise, config):
    """Stands in for the network, so that the denoiser is exact for a Gaussian process of covariance
    AR whose first observation is known: x (B, 8, 7 + 3), of which 3 channels are the start."""
    sigma = jnp.exp(4.0 * c_noise)[..., None, None]
    start, noisy = x[..., 7:], x[..., :7] * jnp.sqrt(sigma**2 + 1)  # c_in taken back
    np.testing.assert_array_equal(x.shape[-2:], (8, 10))
    cov, level = jnp.asarray(AR, jnp.float32), jnp.reshape(sigma, (-1,))[0] ** 2
    free = jnp.linalg.solve(cov + level * jnp.eye(8), cov).T
    known = jnp.linalg.solve(cov + level * jnp.diag((jnp.arange(8) > 0) * 1.0), cov).T
    obs = jnp.concatenate([start[:, :1], noisy[:, 1:, :3]], axis=1)
    product = lambda w, y: jnp.einsum("ts,bsd->btd", w, y)
    denoised = jnp.concatenate([product(known, obs), product(free, noisy[..., 3:])], -1)
    return (denoised - noisy / (1 + sigma**2)) * jnp.sqrt(1 + sigma**2) / sigma


@pytest.mark.parametrize("sampler", ["sde", "heun"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_given_start_is_exact_in_every_sample_and_the_rest_follows_it(
    sampler, guided, monkeypatch
):
    config = dataclasses.replace(CONFIG, sample_steps=64, condition_on_start=True, sampler=sampler)
    dataset = pgd.make_dataset(toy_log(), config)
    monkeypatch.setattr(pgd, "unet", exact_unet)
    start = jax.random.normal(jax.random.key(2), (2048, 3)) + jnp.array([1.5, 0.0, -1.0])
    terms = [(0.05, mine), (0.05, POLICY)] if guided else []
    state = pgd.DenoiserState({}, {}, (), jnp.zeros(()))
    sample = jax.jit(lambda key, start: pgd.sample(key, state, dataset, config, terms, start))
    x = sample(jax.random.key(0), start)
    np.testing.assert_array_equal(x[:, 0, :3], start)
    if guided:
        return
    obs, start = np.asarray(x[..., :3]), np.asarray(start)
    for t in (1, 3, 7):  # exactly: slope 0.9^t, variance 1 - 0.9^(2t)
        slope = np.sum(obs[:, t] * start) / np.sum(start**2)
        assert slope == pytest.approx(0.9**t, abs=0.1)
        assert np.std(obs[:, t] - slope * start) == pytest.approx(
            np.sqrt(1 - 0.9 ** (2 * t)), abs=0.1
        )


def test_samples_start_where_the_user_says():
    config = dataclasses.replace(
        CONFIG, features=16, blocks=1, sample_steps=8, condition_on_start=True
    )
    dataset = pgd.make_dataset(toy_log(), config)
    start = jnp.linspace(-2.0, 2.0, 12).reshape(4, 3)
    terms = [(0.1, mine), (0.1, POLICY)]
    state = pgd.init_diffusion(jax.random.key(0), dataset, config)
    x = jax.jit(lambda s, d: pgd.sample(jax.random.key(1), s, d, config, terms, start))(
        state, dataset
    )
    assert x.shape == (4, 8, 7) and np.isfinite(x).all()
    np.testing.assert_array_equal(x[:, 0, :3], start)


def test_a_start_is_for_a_denoiser_that_was_trained_with_one():
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    state = pgd.init_diffusion(jax.random.key(0), dataset, CONFIG)
    with pytest.raises((AssertionError, TypeError, ValueError)):
        pgd.sample(jax.random.key(0), state, dataset, CONFIG, (), jnp.zeros((4, 3)))


@functools.cache
def generator_of(with_clone=False, condition_on_start=False):
    """-> (make(key, dataset, weights) -> (model, Transition), data set): a briefly fitted diffusion
    under an untrained TD3+BC agent; the weights are values of the config."""
    config = dataclasses.replace(
        CONFIG, features=16, blocks=1, fit_steps=100, fit_batch=16, batch_size=32, sample_steps=8,
        trajectories=32, sample_batch=16, condition_on_start=condition_on_start,
    )  # fmt: skip
    agent = agents.td3_bc(hidden=(16,))

    @jax.jit
    def make(key, dataset, weights):
        own = dataclasses.replace(config, **weights)
        cloner = agents.bc(hidden=(16,))
        diffusion = (
            make_diffusion_with_clone(own, cloner) if with_clone else pgd.make_diffusion(own)
        )
        model = diffusion.fit(key, diffusion.init(key, dataset), dataset)[0]
        policy = pgd.target_policy(agent, agent.init(jax.random.key(0), 3, 2))
        return model, diffusion.generate(key, model, policy, jnp.float32(1.0), dataset)

    return make, pgd.make_dataset(toy_log(), config)


def generated(with_clone=False, condition_on_start=False, key=0, **weights):
    """-> (Transition, data set, model)."""
    make, dataset = generator_of(with_clone, condition_on_start)
    model, made = make(jax.random.key(key) if isinstance(key, int) else key, dataset, weights)
    return made, dataset, model


@pytest.mark.slow
def test_condition_on_start_begins_in_logged_states():
    made, dataset, _ = generated(condition_on_start=True)
    firsts = np.asarray(made.obs).reshape(32, 8, 3)[:, 0]
    logged = np.asarray(dataset.steps[dataset.train_starts, :3])
    nearest = np.abs(firsts[:, None] - logged[None]).max(-1).min(1)
    assert np.all(nearest == 0) and len(np.unique(firsts, axis=0)) > 16
    made, *_ = generated()
    firsts = np.asarray(made.obs).reshape(32, 8, 3)[:, 0]
    assert np.all(np.abs(firsts[:, None] - logged[None]).max(-1).min(1) > 0)


@pytest.mark.slow
def test_every_step_of_a_conditioned_sample_knows_the_start():
    """A log whose observations stay what they were: even the last step, which the convolutions of
    this network cannot see from the first, has to be where the trajectory starts."""
    config = dataclasses.replace(
        CONFIG, horizon=16, features=16, blocks=1, fit_steps=600, fit_chunk=600, fit_batch=32,
        fit_lr=3e-3, ema=0.98, condition_on_start=True,
    )  # fmt: skip
    log = toy_log(episodes=100)
    log["observations"] = np.repeat(log["observations"][::40], 40, axis=0)
    dataset = pgd.make_dataset(log, config)
    diffusion = pgd.make_diffusion(config)
    start = jax.random.normal(jax.random.key(1), (64, 3))

    @jax.jit
    def sample(key, dataset):
        state, _ = diffusion.fit(key, diffusion.init(key, dataset), dataset)
        return pgd.sample(key, state, dataset, config, start=start)

    last = np.asarray(sample(jax.random.key(0), dataset))[:, -1, :3]
    assert np.mean((last - start) ** 2) < 0.1


# --- What generate() makes of the weights of the config ---


@pytest.mark.slow
def test_each_weight_of_the_config_is_its_guide():
    """Value and behaviour weights: samples that the critic values more, that the clone finds less
    likely."""
    none = {"guidance": 0.0, "value_guidance": 0.0, "behaviour_guidance": 0.0}
    plain, up, down, toward = (
        generated(True, **none | weights)
        for weights in (
            {}, {"value_guidance": 0.3}, {"behaviour_guidance": 0.3}, {"guidance": 0.3},
        )
    )  # fmt: skip
    state, plain, up, down, toward = plain[2], plain[0], up[0], down[0], toward[0]
    agent, cloner = agents.td3_bc(hidden=(16,)), agents.bc(hidden=(16,))
    learner = agent.init(jax.random.key(0), 3, 2)
    q = lambda t: float(agent.q_value(learner, t.obs, t.action).mean())
    beta = lambda t: float(cloner.log_prob(state.clone, t.obs, t.action).mean())
    pi = lambda t: float(agent.log_prob(learner, t.obs, t.action).mean())
    assert q(up) > q(plain) + 0.001
    assert beta(down) < beta(plain) - 0.02
    assert pi(toward) > pi(plain) + 0.02


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_generate_asks_for_each_guide_with_its_weight_and_sign(monkeypatch, weight):
    """Toward the policy and its value, away from the clone; all times the round's weight."""
    seen = []

    def spy(key, state, dataset, config, terms):
        seen.append(terms)
        return jnp.zeros((2, 8, 7))

    monkeypatch.setattr(pgd, "sample", spy)
    config = dataclasses.replace(
        CONFIG, features=8, blocks=1, trajectories=4, sample_batch=2,
        guidance=0.5, value_guidance=0.3, behaviour_guidance=0.2,
    )  # fmt: skip
    dataset = pgd.make_dataset(toy_log(), config)
    agent, cloner = agents.td3_bc(hidden=(4,)), agents.bc(hidden=(4,))
    diffusion = make_diffusion_with_clone(config, cloner)
    clone = cloner.init(jax.random.key(2), 3, 2)
    learner = agent.init(jax.random.key(1), 3, 2)
    model = ClonedState((), clone, jnp.zeros((), jnp.int32))
    policy = pgd.target_policy(agent, learner)
    diffusion.generate(jax.random.key(0), model, policy, jnp.float32(weight), dataset)
    (terms,) = seen
    np.testing.assert_allclose([float(w) for w, _ in terms], weight * np.array([0.5, 0.3, -0.2]))
    t = dataset.split(dataset.steps[:8])
    expected = [
        agent.log_prob(learner, t.obs, t.action).sum(),
        pgd.action_score(lambda obs, action: agent.q_value(learner, obs, action))(t),
        cloner.log_prob(model.clone, t.obs, t.action).sum(),
    ]
    np.testing.assert_allclose([float(f(t)) for _, f in terms], expected, rtol=1e-5)


# --- The clone of the log's policy ---


@pytest.mark.slow
def test_the_clone_learns_the_logs_policy_beside_an_unchanged_denoiser(monkeypatch):
    weights = {"guidance": 0.0, "value_guidance": 0.0, "behaviour_guidance": 0.0}
    _, dataset, with_clone = generated(True, **weights)
    _, _, without = generated()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        with_clone.denoiser.params,
        without.params,
    )
    assert isinstance(without, pgd.DenoiserState)  # there is no clone
    cloner = agents.bc(hidden=(16,))
    first = cloner.init(jax.random.key(5), 3, 2)
    t = dataset.transitions(dataset.val_rows)
    likelihood = lambda state: float(cloner.log_prob(state, t.obs, t.action).mean())
    assert likelihood(with_clone.clone) > likelihood(first) + 0.02
    monkeypatch.setattr(pgd, "validate_diffusion", lambda *_, config: {})
    generator = make_diffusion_with_clone(CONFIG, cloner)
    said = generator.validate(with_clone, dataset)
    assert float(said["clone_log_prob"]) == pytest.approx(likelihood(with_clone.clone), rel=1e-4)


class Seen:
    """A cloner whose state is the last batch that it was shown and a sum over all of them."""

    def init(self, key, obs_dim, act_dim):
        return jnp.zeros((CLONE.batch_size, obs_dim)), jnp.zeros((CLONE.batch_size, act_dim)), 0.0

    def update(self, key, state, batch):
        noise = jax.random.uniform(key)
        return (batch.obs, batch.action, state[2] * 0.5 + batch.obs.sum() + noise), {}

    def log_prob(self, state, obs, action):
        return -jnp.sum(action**2, axis=-1)


CLONE = dataclasses.replace(CONFIG, fit_steps=4, fit_chunk=4, batch_size=256, validation=0.5)


@pytest.fixture
def no_denoiser(monkeypatch):
    """The clone alone: its denoiser is nothing, and is not fitted."""
    nothing = lambda config, *_: pgd.Generator(
        lambda key, dataset: (), lambda key, model, dataset: (model, {}), None, None,
        config.fit_steps // config.fit_chunk,
    )  # fmt: skip
    monkeypatch.setattr(pgd, "make_diffusion", nothing)


def test_the_clone_sees_no_held_out_episode(no_denoiser):
    dataset = pgd.make_dataset(toy_log(), CLONE)
    generator = make_diffusion_with_clone(CLONE, Seen())
    model = generator.init(jax.random.key(0), dataset)
    model, _ = jax.jit(generator.fit)(jax.random.key(0), model, dataset)
    of = lambda obs, action: {tuple(x) for x in np.round(np.hstack([obs, action]), 4).tolist()}
    shown = of(*map(np.asarray, model.clone[:2]))
    rows = lambda rows: of(*(np.asarray(x) for x in dataset.transitions(rows)[:2]))
    assert len(dataset.val_rows) > 150 and len(shown) > 100
    assert shown <= rows(dataset.train_rows) and not shown & rows(dataset.val_rows)


def test_the_clone_does_not_depend_on_the_length_of_a_chunk(no_denoiser):
    dataset, ends = pgd.make_dataset(toy_log(), CLONE), []
    for length in (1, 4):
        config = dataclasses.replace(CLONE, fit_chunk=length)
        generator = make_diffusion_with_clone(config, Seen())
        model, fit = generator.init(jax.random.key(0), dataset), jax.jit(generator.fit)
        for _ in range(generator.num_chunks):
            model, _ = fit(jax.random.key(0), model, dataset)
        assert int(model.step) == 4
        ends.append(float(model.clone[2]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def test_a_weight_that_lacks_what_it_needs_is_one_clear_line():
    config = dataclasses.replace(flags.Config(), agent="bc", value_guidance=0.1)
    given = flags.Flags(flags.Job(), config, {})
    with pytest.raises(UserError, match="needs an agent with a critic"):
        flags.check_agent(given, [{}])
    alone = dataclasses.replace(flags.Job(), synthetic="none")
    config = dataclasses.replace(flags.Config(), behaviour_guidance=0.1)
    with pytest.raises(UserError, match="need --synthetic diffusion"):
        flags.check(flags.Flags(alone, config, {}))
