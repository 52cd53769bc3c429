"""Policy guidance against the closed form of a linear policy (PGD section 4)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_log

import agents
import pgd

CONFIG = pgd.Config(horizon=8, fit_batch=8, batch_size=8, guidance_denoised=False, sample_steps=16,
                    guidance_every=1)  # fmt: skip
RATE = 256 / 16  # a push at one of 16 levels stands for those of 16 of the paper's 256
W = jnp.array([[0.5, -0.2], [0.1, 0.4], [-0.3, 0.2]])  # a linear policy: mean action obs @ W


def log_prob(obs, action):
    return -0.5 * jnp.sum((action - obs @ W) ** 2, axis=-1)


POLICY = pgd.policy_score(log_prob)


def push(config=CONFIG, step=3, weight=1.0, x=None, f=log_prob, denoised=None, sigma=0.5):
    """How far the guide moves x (5, 8, D): -> (pushed - x, x, dataset)."""
    dataset = pgd.make_dataset(toy_log(), config)
    x = (
        pgd.sample_windows(jax.random.key(0), dataset, dataset.train_starts, 5, 8)
        if x is None
        else x
    )
    guide = pgd.make_guide([(weight, pgd.policy_score(f))], dataset, config)
    moved = guide(x, denoised, jnp.float32(sigma), jnp.int32(step)) - x
    return np.asarray(moved), np.asarray(x), dataset


def exact_gradient(x, dataset):
    """d/dz of -|tanh(std z + mean) - obs W|^2 / 2, by hand."""
    mean, std = (np.asarray(v)[3:5] for v in dataset.normalizer)
    action = np.tanh(x[..., 3:5] * std + mean)
    return (x[..., :3] @ np.asarray(W) - action) * (1 - action**2) * std


def test_push_is_the_exact_gradient_of_a_linear_policy():
    config = dataclasses.replace(CONFIG, guidance_normalise=False)
    moved, x, dataset = push(config, step=3)
    lambda_n = RATE * ((1 - 3 / 16) + 0.3 * np.sin(np.pi * 4 / 16))
    np.testing.assert_allclose(moved[..., 3:5], lambda_n * exact_gradient(x, dataset), atol=1e-5)
    assert np.all(moved[..., :3] == 0) and np.all(moved[..., 5:] == 0)  # only actions are pushed


def test_normalised_push_has_length_lambda_n_for_each_trajectory():
    for step in (0, 3, 14):
        moved, x, dataset = push(step=step, weight=2.0)
        lambda_n = RATE * 2.0 * ((1 - step / 16) + 0.3 * np.sin(np.pi * (step + 1) / 16))
        g = exact_gradient(x, dataset)
        norm = np.sqrt((g**2).sum((1, 2), keepdims=True))
        np.testing.assert_allclose(moved[..., 3:5], lambda_n * g / norm, atol=2e-4)
        np.testing.assert_allclose(np.sqrt((moved**2).sum((1, 2))), lambda_n, rtol=1e-4)


def test_pushing_at_every_other_level_goes_twice_as_far():
    every = {n: dataclasses.replace(CONFIG, guidance_every=n) for n in (1, 2)}
    for step in (2, 6):
        np.testing.assert_allclose(push(every[2], step)[0], 2 * push(every[1], step)[0], rtol=1e-5)
    assert np.all(push(every[2], 3)[0] == 0) and np.any(push(every[1], 3)[0] != 0)


def test_no_push_at_the_last_step_nor_at_zero_weight():
    assert np.all(push(step=15)[0] == 0)
    assert np.all(push(step=3, weight=0.0)[0] == 0)


def test_a_vanishing_gradient_pushes_nothing_and_is_not_nan():
    moved, _, _ = push(f=lambda obs, action: jnp.zeros(action.shape[:-1]))
    assert np.all(moved == 0)


def test_denoised_option_takes_the_gradient_at_the_denoised_trajectory():
    config = dataclasses.replace(CONFIG, guidance_denoised=True)
    noised = 40.0 * jax.random.normal(jax.random.key(1), (5, 8, 7))
    shrunk = noised / (1 + 40.0**2)
    moved, _, dataset = push(config, x=noised, denoised=shrunk, sigma=40.0)
    g = exact_gradient(np.asarray(shrunk), dataset)
    norm = np.sqrt((g**2).sum((1, 2), keepdims=True))
    lambda_n = RATE * ((1 - 3 / 16) + 0.3 * np.sin(np.pi * 4 / 16))
    np.testing.assert_allclose(moved[..., 3:5], lambda_n * g / norm, atol=2e-3)
    # at the noised one tanh is saturated and most actions feel nothing
    at_noised = exact_gradient(np.asarray(noised), dataset)
    assert np.mean(np.abs(at_noised) < 1e-3) > 0.8 > np.mean(np.abs(g) < 1e-3)


@pytest.mark.parametrize("sampler", [pgd.sample_sde, pgd.sample_heun])
@pytest.mark.parametrize("denoised", [False, True])
def test_guided_samples_are_likelier_under_the_policy_and_more_so_with_weight(sampler, denoised):
    config = dataclasses.replace(CONFIG, guidance_denoised=denoised, sample_steps=32)
    dataset = pgd.make_dataset(toy_log(), config)
    denoiser = lambda x, sigma: x / (1 + sigma**2)  # exact for standardised white noise
    likelihood = []
    for weight in (0.0, 0.06, 0.25):
        guide = pgd.make_guide([(weight, POLICY)], dataset, config)
        x = sampler(jax.random.key(0), denoiser, (256, 8, 7), pgd.noise_levels(config), guide)
        obs, action, _, _ = pgd.split_steps(dataset, x)
        likelihood.append(float(log_prob(obs, action).mean()))
    assert likelihood[0] + 0.02 < likelihood[1] < likelihood[2] - 0.02


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_effect_of_a_weight_does_not_depend_on_the_number_of_levels(eta):
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    denoiser = lambda x, sigma: x / (1 + sigma**2)
    likelihood = {}
    for num in (32, 64, 256):
        for weight in (0.0, 0.1):
            config = dataclasses.replace(CONFIG, guidance_denoised=True, sample_steps=num)
            guide = pgd.make_guide([(weight, POLICY)], dataset, config)
            sigmas = pgd.noise_levels(config)
            x = pgd.sample_sde(jax.random.key(0), denoiser, (1024, 8, 7), sigmas, guide, eta=eta)
            obs, action, _, _ = pgd.split_steps(dataset, x)
            likelihood[num, weight] = float(log_prob(obs, action).mean())
    effect = {num: likelihood[num, 0.1] - likelihood[num, 0.0] for num in (32, 64, 256)}
    assert effect[256] > 0.03
    assert effect[64] == pytest.approx(effect[256], rel=0.15)
    assert effect[32] == pytest.approx(effect[256], rel=0.3)


# --- Guides that add up ---


def q_value(obs, action):
    return 3.0 + action @ jnp.array([1.0, -2.0]) + jnp.sum(obs, axis=-1)


def mine(t):
    """A user's own: reward, and a first observation near 1 in its first entry."""
    return jnp.sum(t.reward, axis=-1) - 2.0 * (t.obs[..., 0, 0] - 1.0) ** 2


def moved_by(terms, config=CONFIG, step=3):
    dataset = pgd.make_dataset(toy_log(), config)
    x = pgd.sample_windows(jax.random.key(0), dataset, dataset.train_starts, 5, 8)
    guide = pgd.make_guide(terms, dataset, config)
    return np.asarray(guide(x, None, jnp.float32(0.5), jnp.int32(step)) - x), x, dataset


@pytest.mark.parametrize("normalise", [True, False])
def test_guides_add_up(normalise):
    config = dataclasses.replace(CONFIG, guidance_normalise=normalise)
    terms = [(0.5, POLICY), (0.2, pgd.value_score(q_value)), (-0.3, POLICY), (0.1, mine)]
    alone = [moved_by([term], config)[0] for term in terms]
    assert all(np.abs(a).max() > 0.01 for a in alone)
    np.testing.assert_allclose(moved_by(terms, config)[0], sum(alone), atol=1e-5)


def test_value_guidance_is_the_gradient_of_q_by_the_actions_over_its_size():
    config = dataclasses.replace(CONFIG, guidance_normalise=False)
    moved, x, dataset = moved_by([(0.5, pgd.value_score(q_value))], config)
    t = pgd.split_steps(dataset, x)
    action, std = np.asarray(t.action), np.asarray(dataset.normalizer.std[3:5])
    size = np.abs(q_value(t.obs, t.action)).mean(1)[:, None, None]  # of each trajectory
    slope = np.array([1.0, -2.0]) * (1 - action**2) * std / size
    lambda_n = RATE * ((1 - 3 / 16) + 0.3 * np.sin(np.pi * 4 / 16))
    np.testing.assert_allclose(moved[..., 3:5], 0.5 * lambda_n * slope, rtol=1e-4, atol=1e-6)
    assert np.all(moved[..., :3] == 0) and np.all(moved[..., 5:] == 0)


def test_a_score_of_ones_own_moves_everything_it_depends_on():
    config = dataclasses.replace(CONFIG, guidance_normalise=False)
    moved, x, dataset = moved_by([(1.0, mine)], config)
    lambda_n = RATE * ((1 - 3 / 16) + 0.3 * np.sin(np.pi * 4 / 16))
    expected = np.zeros_like(moved)
    expected[..., 5] = dataset.normalizer.std[5]  # reward, in its own units
    expected[:, 0, 0] = -4.0 * (np.asarray(x)[:, 0, 0] - 1.0)
    np.testing.assert_allclose(moved, lambda_n * expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [pgd.sample_sde, pgd.sample_heun])
def test_zero_weight_is_unguided_to_the_last_bit(sampler):
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    sigmas, denoiser = pgd.noise_levels(CONFIG), lambda x, sigma: x / (1 + sigma**2)
    sample = lambda guide: sampler(jax.random.key(0), denoiser, (6, 8, 7), sigmas, guide)
    terms = [(0.0, POLICY), (0.0, pgd.value_score(q_value)), (0.0, mine)]
    np.testing.assert_array_equal(
        sample(pgd.make_guide(terms, dataset, CONFIG)), sample(lambda x, *_: x)
    )


def slope_of(x, dataset):
    """Regression of the standardised actions, before tanh, on the observations of a sample."""
    obs, z = (np.asarray(x[..., i]).reshape(-1, 1 + i.stop - i.start - 1)
              for i in (slice(0, 3), slice(3, 5)))  # fmt: skip
    w, *_ = np.linalg.lstsq(obs, z - z.mean(0), rcond=None)
    return w, (z - z.mean(0) - obs @ w).std(0)


def test_guided_samples_of_a_gaussian_log_move_toward_the_product_density():
    """White noise, the exact denoiser, a Gaussian policy of mean obs @ W: in p(tau) pi^lambda
    (METHOD.md) each action given its observation has its mean on the line from 0 to the policy's,
    nearer with lambda, and a smaller spread; and observations are left alone."""
    log = toy_log()
    log["actions"] = 0.03 * np.random.default_rng(0).normal(size=log["actions"].shape)
    config = dataclasses.replace(
        CONFIG, guidance_normalise=False, guidance_denoised=True, sample_steps=64
    )
    dataset = pgd.make_dataset(log, config)  # tanh is straight over such small actions
    std = float(dataset.normalizer.std[3])
    policy = lambda obs, action: -0.5 * jnp.sum((action / std - obs @ W) ** 2, axis=-1)
    denoiser, slopes, spreads = lambda x, sigma: x / (1 + sigma**2), [], []
    for weight in (0.0, 0.001, 0.004):
        guide = pgd.make_guide([(weight, pgd.policy_score(policy))], dataset, config)
        x = pgd.sample_sde(
            jax.random.key(0), denoiser, (4096, 8, 7), pgd.noise_levels(config), guide, eta=1.0
        )
        slope, spread = slope_of(x, dataset)
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


def ar_denoiser(x, sigma):
    """Exact for a Gaussian process of that covariance."""
    cov = jnp.asarray(AR, jnp.float32)
    return jnp.einsum("ts,bsd->btd", cov @ jnp.linalg.inv(cov + sigma**2 * jnp.eye(8)), x)


@pytest.mark.parametrize("sampler", ["sde", "heun"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_fixed_start_is_exact_in_every_sample_and_the_rest_follows_it(sampler, guided):
    config = dataclasses.replace(CONFIG, guidance_denoised=True, sample_steps=64)
    dataset = pgd.make_dataset(toy_log(), config)
    start = jax.random.normal(jax.random.key(2), (2048, 3)) + jnp.array([1.5, 0.0, -1.0])
    guide = pgd.make_guide([(0.05, mine), (0.05, POLICY)], dataset, config) if guided else None
    denoiser, guide = pgd.fix_start(ar_denoiser, guide, start)
    args = jax.random.key(0), denoiser, (2048, 8, 7), pgd.noise_levels(config), guide
    if sampler == "sde":
        x = pgd.sample_sde(*args, eta=8.0)
    else:
        x = pgd.sample_heun(*args, churn=(80.0, 0.05, 50.0, 1.003))
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


@pytest.mark.parametrize("trained_so", [False, True])
def test_samples_start_where_the_user_says(trained_so):
    config = dataclasses.replace(
        CONFIG, features=16, blocks=1, sample_steps=8, condition_on_start=trained_so
    )
    dataset = pgd.make_dataset(toy_log(), config)
    diffusion = pgd.make_diffusion(config, 3, 2)
    start = jnp.linspace(-2.0, 2.0, 12).reshape(4, 3)
    terms = [(0.1, mine), (0.1, POLICY)]
    state = diffusion.init(jax.random.key(0))
    x = jax.jit(lambda s, d: diffusion.sample(jax.random.key(1), s, d, terms, start))(
        state, dataset
    )
    assert x.shape == (4, 8, 7) and np.isfinite(x).all()
    np.testing.assert_array_equal(x[:, 0, :3], start)


def generated(config, **settings):
    """A briefly fitted diffusion's trajectories under a TD3+BC agent -> (Transition, dataset,
    state); with a cloner where there is behaviour guidance."""
    config = dataclasses.replace(
        config, features=16, blocks=1, fit_steps=100, fit_batch=16, batch_size=32, sample_steps=8,
        trajectories=32, sample_batch=16, guidance_denoised=True, **settings,
    )  # fmt: skip
    dataset = pgd.make_dataset(toy_log(), config)
    cloner = agents.bc(hidden=(16,)) if config.behaviour_guidance else None
    diffusion = pgd.make_diffusion(config, 3, 2, cloner=cloner)
    agent = agents.td3_bc(hidden=(16,))

    @jax.jit
    def make(key, dataset):
        state = diffusion.fit_chunk(key, diffusion.init(key), dataset)[0]
        policy = pgd.target_policy(agent, agent.init(key, 3, 2))
        return state, diffusion.generate(key, state, policy, jnp.float32(1.0), dataset)

    state, made = make(jax.random.key(0), dataset)
    return made, dataset, state


def test_condition_on_start_begins_in_logged_states():
    made, dataset, _ = generated(CONFIG, condition_on_start=True)
    firsts = np.asarray(made.obs).reshape(32, 8, 3)[:, 0]
    logged = np.asarray(dataset.steps[dataset.train_starts, :3])
    nearest = np.abs(firsts[:, None] - logged[None]).max(-1).min(1)
    assert np.all(nearest == 0) and len(np.unique(firsts, axis=0)) > 16
    made, *_ = generated(CONFIG)
    firsts = np.asarray(made.obs).reshape(32, 8, 3)[:, 0]
    assert np.all(np.abs(firsts[:, None] - logged[None]).max(-1).min(1) > 0)


def test_every_step_of_a_conditioned_sample_knows_the_start():
    """A log whose observations stay what they were: even the last step, which the convolutions of
    this network cannot see from the first, has to be where the trajectory starts."""
    config = dataclasses.replace(
        CONFIG, horizon=16, features=16, blocks=1, fit_steps=600, fit_chunk=600, fit_batch=32,
        fit_lr=3e-3, condition_on_start=True, guidance_every=2,
    )  # fmt: skip
    log = toy_log(episodes=100)
    log["observations"] = np.repeat(log["observations"][::40], 40, axis=0)
    dataset = pgd.make_dataset(log, config)
    diffusion = pgd.make_diffusion(config, 3, 2)
    start = jax.random.normal(jax.random.key(1), (64, 3))

    @jax.jit
    def sample(key, dataset):
        state, _ = diffusion.fit_chunk(key, diffusion.init(key), dataset)
        return diffusion.sample(key, state, dataset, start=start)

    last = np.asarray(sample(jax.random.key(0), dataset))[:, -1, :3]
    assert np.mean((last - start) ** 2) < 0.1


def test_each_weight_of_the_config_is_its_guide():
    """What generate() makes of value and behaviour weights: samples that the critic values more,
    that the clone finds less likely."""
    plain, dataset, state = generated(CONFIG, guidance=0.0, behaviour_guidance=1e-9)
    agent = agents.td3_bc(hidden=(16,))
    q = lambda t: float(agent.q_value(agent.init(jax.random.key(0), 3, 2), t.obs, t.action).mean())
    cloner = agents.bc(hidden=(16,))
    beta = lambda t: float(cloner.log_prob(state.clone, t.obs, t.action).mean())
    pi = lambda t: float(
        agent.log_prob(agent.init(jax.random.key(0), 3, 2), t.obs, t.action).mean()
    )
    up, down, toward = (
        generated(CONFIG, **({"guidance": 0.0, "behaviour_guidance": 1e-9} | weights))[0]
        for weights in ({"value_guidance": 0.3}, {"behaviour_guidance": 0.3}, {"guidance": 0.3})
    )
    assert q(up) > q(plain) + 0.001
    assert beta(down) < beta(plain) - 0.02
    assert pi(toward) > pi(plain) + 0.02


def test_the_clone_learns_the_logs_policy_beside_an_unchanged_denoiser():
    _, dataset, with_clone = generated(CONFIG, behaviour_guidance=0.1)
    _, _, without = generated(CONFIG)
    jax.tree.map(np.testing.assert_array_equal, with_clone.params, without.params)
    assert without.clone == ()
    cloner = agents.bc(hidden=(16,))
    first = cloner.init(jax.random.key(5), 3, 2)
    t = dataset.transitions(dataset.val_rows)
    likelihood = lambda state: float(cloner.log_prob(state, t.obs, t.action).mean())
    assert likelihood(with_clone.clone) > likelihood(first) + 0.02


def test_a_weight_that_lacks_what_it_needs_is_one_clear_line():
    config = dataclasses.replace(CONFIG, behaviour_guidance=0.1)
    with pytest.raises(pgd.UserError, match="needs a cloner"):
        pgd.make_diffusion(config, 3, 2)
    diffusion = pgd.make_diffusion(dataclasses.replace(CONFIG, value_guidance=0.1), 3, 2)
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    policy = pgd.TargetPolicy(log_prob, None)
    with pytest.raises(pgd.UserError, match="needs an agent with a critic"):
        diffusion.generate(jax.random.key(0), None, policy, 1.0, dataset)
