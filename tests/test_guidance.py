"""The guide against closed forms: it samples p_off(tau) prod pi(a|s)^lambda (PGD section 4)."""

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
from baselines.paper_guide import make_paper_guide
from host import flags
from host.errors import UserError

CONFIG = pgd.Config(horizon=8, fit_batch=8, batch_size=8, sample_steps=16)
W = jnp.array([[0.5, -0.2], [0.1, 0.4], [-0.3, 0.2]])  # a linear policy: mean action obs @ W
LAMBDAS = (1.0, 4.0, 16.0, 64.0)


def log_prob(obs, action):
    return -0.5 * jnp.sum((action - obs @ W) ** 2, axis=-1)


POLICY = pgd.action_score(log_prob)


def small_action_log(num=40 * 30, std=0.03, low=-1.0, high=1.0, **more):
    """A toy log of Gaussian actions so small that tanh is straight; in units from low to high."""
    log = toy_log(**more)
    unit = std * np.random.default_rng(0).normal(size=log["actions"].shape)
    log["actions"] = low + (unit + 1.0) * 0.5 * (high - low)
    return log


def moved_by(terms, sigma=1.0, x=None, dataset=None):
    """How far the guide of the terms moves x (5, 8, D) at noise level sigma -> (moved, x, data)."""
    dataset = dataset or pgd.make_dataset(toy_log(), CONFIG)
    if x is None:
        x = dataset.windows(jax.random.key(0), jnp.arange(30), 5, 8)
    moved = pgd.make_guide(terms, dataset, CONFIG)(x, jnp.float32(sigma)) - x
    return np.asarray(moved), np.asarray(x), dataset


def white_noise_denoiser(x, s):
    """Exact for standardised white noise; s: the noise on each channel."""
    return x / (1 + s**2)


def draw(sampler, denoiser, terms, dataset, config, num=2048, key=0, rule=pgd.make_guide):
    """Guided samples (num, 8, D) of the config's horizon, with an exact denoiser(x, s); s (D,):
    the noise on each channel."""
    guide, sigmas = rule(terms, dataset, config), pgd.noise_levels(config)
    scale = jnp.array([config.obs_noise] * dataset.obs_dim + [1.0] * (dataset.act_dim + 2))
    guided = lambda y, sigma: guide(denoiser(scale * y, scale * sigma), sigma) / scale
    shape = (num, config.horizon, dataset.steps.shape[-1])
    options = {} if sampler is pgd.sample_heun else {"eta": config.eta}
    return scale * sampler(jax.random.key(key), guided, shape, sigmas, **options)


# --- One step of the guide ---


@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
@pytest.mark.parametrize("weight", [0.5, 4.0, 64.0])
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-2.0, 5.0)])
def test_the_guide_is_the_kalman_update_of_a_linear_gaussian_policy(sigma, weight, bounds):
    """D + lambda v g / (1 + lambda v k) in the action's channels, by hand; no other one moves."""
    low, high = bounds
    log = small_action_log(low=low, high=high)
    dataset = pgd.make_dataset(log, CONFIG, low, high)
    spread = 0.05  # of the policy
    f = lambda obs, action: -0.5 * jnp.sum((action - 0.02 * (obs @ W)) ** 2, -1) / spread**2
    moved, x, _ = moved_by([(weight, pgd.action_score(f))], sigma, dataset=dataset)
    mean, std = (np.asarray(v)[3:5] for v in (dataset.mean, dataset.std))
    v, k = sigma**2 / (1 + sigma**2), (std / spread) ** 2
    target = (0.02 * x[..., :3] @ np.asarray(W) - mean) / std  # the policy's action, standardised
    gain = weight * v * k / (1 + weight * v * k)
    np.testing.assert_allclose(moved[..., 3:5], gain * (target - x[..., 3:5]), atol=0.02, rtol=0.02)
    assert np.all(moved[..., :3] == 0) and np.all(moved[..., 5:] == 0)


def test_the_guide_never_passes_the_policys_action():
    """Neither where tanh is nearly flat nor at any weight; and it comes nearer with the weight."""
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    x = 3.0 * jax.random.normal(jax.random.key(1), (64, 8, 7))
    goal = np.asarray(jnp.tanh(x[..., :3] @ W))
    f = lambda obs, action: -0.5 * jnp.sum((action - jnp.tanh(obs @ W)) ** 2, -1)
    before = np.asarray(dataset.split(x).action)
    last = before
    for weight in (0.5, 4.0, 64.0, 1e4, 1e8):
        moved, *_ = moved_by([(weight, pgd.action_score(f))], 20.0, x, dataset)
        action = np.asarray(dataset.split(x + moved).action)
        side = np.sign(goal - before)
        assert np.all(side * (goal - action) >= -2e-3)  # on the same side of it still
        assert np.all(side * (action - last) >= -2e-3)
        last = action
    at_ease = np.abs(before) < 0.9
    assert np.abs(goal - last)[at_ease].max() < 0.01


def test_no_noise_left_no_guidance():
    moved, *_ = moved_by([(16.0, POLICY)], 1e-4)
    assert np.abs(moved).max() < 1e-4


@pytest.mark.parametrize("sampler", [pgd.sample_sde, pgd.sample_heun])
def test_zero_weight_is_unguided_to_the_last_bit(sampler):
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    terms = [(0.0, POLICY), (0.0, pgd.action_score(q_value)), (0.0, mine)]
    guided, plain = (
        draw(sampler, white_noise_denoiser, t, dataset, CONFIG, num=6) for t in (terms, [])
    )
    np.testing.assert_array_equal(guided, plain)


# --- The density of guided samples ---


SETTINGS = [
    (pgd.sample_sde, 8, 8.0),
    (pgd.sample_sde, 64, 8.0),
    (pgd.sample_sde, 64, 1.0),
    (pgd.sample_sde, 256, 1.0),
    (pgd.sample_heun, 32, 0.0),
]


@functools.cache
def gaussian_task(sampler, levels, eta, obs_noise=CONFIG.obs_noise):
    """White noise with actions so small that tanh is straight -> sample(lambda, w), of a policy
    N(obs @ w + (0.5, -0.3), 1), all standardised -> observations (S, 3), actions (S, 2)."""
    config = dataclasses.replace(CONFIG, sample_steps=levels, eta=eta, obs_noise=obs_noise)
    dataset = pgd.make_dataset(small_action_log(), config)
    mean, std = (x[3:5] for x in (dataset.mean, dataset.std))

    @jax.jit
    def sample(weight, w):
        mu = lambda obs: obs @ w + jnp.array([0.5, -0.3])
        policy = lambda obs, action: -0.5 * jnp.sum(((action - mean) / std - mu(obs)) ** 2, axis=-1)
        terms = [(weight, pgd.action_score(policy))]
        x = draw(sampler, white_noise_denoiser, terms, dataset, config, 1024)
        return x[..., :3].reshape(-1, 3), x[..., 3:5].reshape(-1, 2)

    return sample


@pytest.mark.slow
@pytest.mark.parametrize("sampler, levels, eta", SETTINGS)
def test_a_gaussian_log_and_policy_give_the_product_density(sampler, levels, eta):
    """Mean gain mu and variance 1 - gain with gain = lambda / (1 + lambda), in units of the
    unguided sample's, whatever the sampler and the number of levels."""
    sample, still = gaussian_task(sampler, levels, eta), jnp.zeros((3, 2))
    error = 0.12 if levels > 8 else 0.25
    before, unguided = (np.asarray(x).std(0) for x in sample(0.0, still))
    for weight in LAMBDAS:
        obs, action = map(np.asarray, sample(weight, still))
        gain = weight / (1 + weight)
        np.testing.assert_allclose(action.mean(0), gain * np.array([0.5, -0.3]), atol=0.03)
        np.testing.assert_allclose(action.std(0), np.sqrt(1 - gain) * unguided, rtol=error)
        np.testing.assert_allclose(obs.std(0), before, rtol=1e-4)  # they do not move


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler, levels, eta, obs_noise, low, high",
    [(*s, 0.25, 0.88, 1.08) for s in SETTINGS[1:]] + [(*s, 1.0, 0.97, 1.33) for s in SETTINGS[1:]],
)
def test_a_policy_of_the_state_is_met(sampler, levels, eta, obs_noise, low, high):
    """E (a - mu)^2 is that of p(s) p(a) pi^lambda / Z(s). With a gradient by the actions alone, an
    action also keeps what it learnt while its state was uncertain: as much noise on states as on
    actions makes it up to a third larger."""
    sample = gaussian_task(sampler, levels, eta, obs_noise)
    distance = lambda weight: float(np.mean((lambda o, a: (a - mu(o)) ** 2)(*sample(weight, W))))
    mu = lambda obs: obs @ W + jnp.array([0.5, -0.3])
    square = float(np.sum(W**2) + 0.5**2 + 0.3**2) / 2  # E mu^2 per action
    unguided = distance(0.0) / (1 + square)
    for weight in LAMBDAS:
        gain = weight / (1 + weight)
        exact = (1 - gain) + (1 - gain) ** 2 * square
        assert low < distance(weight) / unguided / exact < high


@functools.cache
def correlated_task(share, levels=16, eta=2.0, obs_noise=CONFIG.obs_noise):
    """Observation and action follow AR(1) and share a part of it, with an exact denoiser, and the
    policy is N(0.5, 1), all standardised -> (sample(lambda) (S, 8): 4 observations, 4 actions;
    their covariance in the log)."""
    num = 4
    config = dataclasses.replace(
        CONFIG, sample_steps=levels, horizon=num, eta=eta, obs_noise=obs_noise
    )
    log = small_action_log()
    log["observations"], log["actions"] = log["observations"][:, :1], log["actions"][:, :1]
    dataset = pgd.make_dataset(log, config)
    ar = 0.9 ** np.abs(np.subtract.outer(range(num), range(num)))
    noise = (1 - share**2) * np.eye(num)
    cov = np.block([[ar, share * ar], [share * ar, share**2 * ar + noise]])
    m, s = float(dataset.mean[1]), float(dataset.std[1])
    policy = lambda obs, action: -0.5 * jnp.sum(((action - m) / s - 0.5) ** 2, axis=-1)
    both = lambda x: jnp.concatenate([x[..., 0], x[..., 1]], -1)

    def denoiser(x, s):
        noise = jnp.diag(jnp.repeat(s[:2] ** 2, num))
        d = both(x) @ jnp.linalg.solve(cov + noise, cov)
        d = jnp.stack([d[:, :num], d[:, num:]], -1)
        return jnp.concatenate([d, x[..., 2:] / (1 + s[2:] ** 2)], -1)

    @jax.jit
    def sample(weight):
        terms = [(weight, pgd.action_score(policy))]
        return both(draw(pgd.sample_sde, denoiser, terms, dataset, config, 4096))

    return sample, cov


@pytest.mark.slow
@pytest.mark.parametrize(
    "share, levels, eta, off, low, high",
    [(0.0, 64, 8.0, 0.1, 0.73, 1.27), (0.8, 64, 8.0, 0.1, 0.73, 1.27),
     (0.98, 64, 8.0, 0.1, 0.73, 1.27), (0.8, 64, 2.0, 0.17, 0.73, 1.27),
     (0.999, 16, 2.0, 0.12, 1.4, 1.8)],
)  # fmt: skip
def test_as_much_noise_on_states_gives_the_tilted_density_of_both_to_the_stated_error(
    share, levels, eta, off, low, high
):
    """p_off(tau) pi^lambda, which prefers states in which the log does what the policy does: of
    precision P + lambda on the actions. v is the posterior variance of a channel on its own, so
    that the stated error grows with the correlation. With less noise, eta 2, states follow the
    guided actions less: their mean is off by up to 0.17, a third. The last case has a nearly
    deterministic policy in the log, and the default sampler: actions stay farther from the policy
    than they should."""
    sample, cov = correlated_task(share, levels, eta, obs_noise=1.0)
    for weight in LAMBDAS:
        x = np.asarray(sample(weight))
        pull = weight * np.diag([0.0] * 4 + [1.0] * 4)
        exact_cov = np.linalg.inv(np.linalg.inv(cov) + pull)
        exact_mean = exact_cov @ np.diag(pull) * 0.5
        np.testing.assert_allclose(x.mean(0), exact_mean, atol=off)
        exact = np.diag(exact_cov)[4:].mean() + ((exact_mean[4:] - 0.5) ** 2).mean()
        assert low < ((x[:, 4:] - 0.5) ** 2).mean() / exact < high


@pytest.mark.slow
@pytest.mark.parametrize(
    "share, obs_noise, off, low, high",
    [(0.8, 0.05, 0.06, 0.9, 1.08), (0.999, 0.05, 0.06, 0.75, 1.05), (0.0, 0.25, 0.06, 0.95, 1.2),
     (0.8, 0.25, 0.14, 0.85, 1.03), (0.98, 0.25, 0.21, 0.45, 0.9), (0.999, 0.25, 0.26, 0.33, 0.9)],
)  # fmt: skip
def test_little_noise_on_states_tilts_the_policy_and_not_the_states(
    share, obs_noise, off, low, high
):
    """p(states) prod p(a | s) pi(a | s)^lambda / Z(s): states keep the log's mean 0 and spread, and
    an action has precision 1 / noise^2 + lambda, whatever the log's policy. At the default, 0.25,
    states follow by up to half of the 0.5 by which the density of both would move them, and lose up
    to 0.4 of their spread, where the log's policy has little noise."""
    sample, _ = correlated_task(share, obs_noise=obs_noise)
    before = np.asarray(sample(0.0))[:, :4].std(0)
    kept = {0.0: 0.97, 0.8: 0.83, 0.98: 0.67, 0.999: 0.58}[share] if obs_noise == 0.25 else 0.95
    for weight in LAMBDAS:
        x = np.asarray(sample(weight))
        assert np.abs(x[:, :4].mean(0)).max() < off
        assert np.all(x[:, :4].std(0) > kept * before) and np.all(x[:, :4].std(0) < 1.03 * before)
        of_log = 1 / (1 - share**2)  # precision of the log's policy, N(share s, 1 - share^2)
        gain = weight / (of_log + weight)
        exact = 1 / (of_log + weight) + (1 - gain) ** 2 * (share**2 + 0.5**2)
        assert low < ((x[:, 4:] - 0.5) ** 2).mean() / exact < high


@functools.cache
def uniform_task(act_dim):
    """Uniform actions: -> (data set, exact denoiser by quadrature, the grid of actions)."""
    log = toy_log(episodes=100)
    size = len(log["rewards"]), act_dim
    log["actions"] = np.random.default_rng(1).uniform(-1, 1, size)
    dataset = pgd.make_dataset(log, CONFIG)
    u = jnp.linspace(-0.999, 0.999, 401)
    first, last = 3, 3 + act_dim
    z = (jnp.arctanh(u)[:, None] - dataset.mean[first:last]) / dataset.std[first:last]  # (G, A)

    def denoiser(x, s):
        a = x[..., first:last]
        w = jax.nn.softmax(-0.5 * ((a[..., None, :] - z) / s[first:last]) ** 2, axis=-2)
        return white_noise_denoiser(x, s).at[..., first:last].set((w * z).sum(-2))

    return dataset, denoiser, np.asarray(u)


@pytest.mark.slow
@pytest.mark.parametrize("act_dim, levels, eta", [(1, 8, 8.0), (1, 16, 8.0), (1, 64, 8.0),
                                                  (3, 64, 8.0)])  # fmt: skip
@pytest.mark.parametrize("mu", [0.0, 0.8])
def test_lambda_is_the_exponent_for_uniform_actions(act_dim, levels, eta, mu):
    """E (a - mu)^2 under a unit Gaussian policy to the power lambda, per action, by quadrature. The
    8 levels lie closer together: the default's 8 give 0.6 of it at lambda = 256."""
    dataset, denoiser, u = uniform_task(act_dim)
    config = dataclasses.replace(CONFIG, sample_steps=levels, eta=eta)
    if levels == 8:
        config = dataclasses.replace(config, sigma_min=0.01, sigma_max=20.0, rho=7.0)
    policy = lambda obs, action: -0.5 * jnp.sum((action - mu) ** 2, axis=-1)

    @jax.jit
    def distance(weight):
        terms = [(weight, pgd.action_score(policy))]
        x = draw(pgd.sample_sde, denoiser, terms, dataset, config, 256)
        return jnp.mean((dataset.split(x).action - mu) ** 2)

    last = np.inf
    for weight in (0.0, *LAMBDAS, 256.0):
        density = np.exp(-0.5 * weight * (u - mu) ** 2)
        exact = np.sum(density * (u - mu) ** 2) / np.sum(density)
        found = float(distance(weight))
        assert found == pytest.approx(exact, rel=0.3)
        assert found < last
        last = found


# --- Scores without a Gaussian form ---


def q_value(obs, action):
    return 3.0 + action @ jnp.array([1.0, -2.0]) + jnp.sum(obs, axis=-1)


def mine(t):
    """A user's own: up in the last observation, and near 1 in the first entry of the first."""
    return jnp.sum(t.obs[..., 2], axis=-1) - 2.0 * (t.obs[..., 0, 0] - 1.0) ** 2


def bowl(obs, action):
    """Concave, but not quadratic: nearly straight away from its top at 0.2."""
    return -jnp.sum(jnp.log(jnp.cosh(20.0 * (action - 0.2))), axis=-1)


def tanh_gaussian(obs, action):
    """Far from most of the log, with its mode at 0.98 and -0.71."""
    u = jnp.arctanh(jnp.clip(action, -0.9999, 0.9999))
    return agents.tanh_log_prob(jnp.array([2.2, -0.8]), jnp.log(jnp.array([0.2, 0.3])), u)


@pytest.mark.parametrize("f", [q_value, bowl, log_prob, lambda obs, action: jnp.sum(action**2, -1)])
@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_any_score_moves_uphill_and_further_with_its_weight_but_not_past_its_top(f, sigma):
    """And where it has no top among the log's actions, nor a curvature that points to one, by at
    most the spread sqrt(v) that the noise leaves."""
    last = 0.0
    for weight in (0.1, 1.0, 10.0, 1e4):
        moved, x, dataset = moved_by([(weight, pgd.action_score(f))], sigma)
        t = dataset.split(jnp.asarray(x))
        gradient = jax.grad(lambda a, obs=t.obs: jnp.sum(f(obs, a)))
        g = gradient(t.action)
        step = np.asarray(dataset.split(x + moved).action - t.action)
        assert np.all(step * g >= -1e-6)
        assert np.all(np.abs(step) >= np.abs(last) - 1e-5)
        assert np.all(gradient(t.action + step - 0.01 * np.sign(g)) * g >= 0)
        spread = np.sqrt(sigma**2 / (1 + sigma**2)) * np.asarray(dataset.std[3:5])
        if f not in (bowl, log_prob):
            assert np.all(np.abs(moved[..., 3:5] * dataset.std[3:5]) <= 1.0001 * spread)
        last = step
    assert np.abs(last).max() > 0.1 * spread.max()


@pytest.mark.parametrize("f", [log_prob, bowl, tanh_gaussian])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 20.0])
@pytest.mark.parametrize("weight", [1.0, 16.0, 1e4])
def test_an_action_moves_to_a_mode_of_the_posterior(f, sigma, weight):
    """Of N(a, v_a) exp(weight f), v_a = v std^2 (1 - a^2)^2, which brute force finds on a grid of
    the log's actions, an entry at a time: no score here couples the entries."""
    moved, x, dataset = moved_by([(weight, pgd.action_score(f))], sigma)
    t = dataset.split(jnp.asarray(x))
    found = np.arctanh(dataset.split(x + moved).action)
    v_a = sigma**2 / (1 + sigma**2) * (dataset.std[3:5] * (1 - t.action**2)) ** 2
    grid = np.linspace(-3.8, 3.8, 8_001)
    for i in range(2):
        here = t.action[..., None, :]
        a = here.repeat(len(grid), -2).at[..., i].set(np.tanh(grid))
        density = weight * f(t.obs[..., None, :], a)
        density += -0.5 * (a - here)[..., i] ** 2 / v_a[..., i, None]
        around = jnp.pad(density, [(0, 0)] * 2 + [(1, 1)], constant_values=-jnp.inf)
        is_mode = (density >= around[..., 2:]) & (density >= around[..., :-2])
        off = np.where(is_mode, np.abs(grid - found[..., i, None]), np.inf).min(-1)
        assert off.max() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.1, 0.3, 0.65])
def test_a_tanh_gaussian_policy_is_followed_to_its_mode_and_not_past_it(std):
    """Its log-density is straight or convex away from the mode, u = m + 2 std^2 tanh(u), where the
    top of a parabola lies far past it: uniform actions, which are guided at all 16 levels."""
    dataset, denoiser, _ = uniform_task(2)
    mean = jnp.array([0.9, -2.0])
    log_prob = lambda obs, action: agents.tanh_log_prob(
        mean, jnp.log(jnp.full(2, std)), jnp.arctanh(jnp.clip(action, -0.9999, 0.9999))
    )
    mode = mean
    for _ in range(200):
        mode = mean + 2 * std**2 * jnp.tanh(mode)

    @jax.jit
    def sample(weight):
        terms = [(weight, pgd.action_score(log_prob))]
        x = draw(pgd.sample_sde, denoiser, terms, dataset, CONFIG, 256)
        t = dataset.split(x)
        return jnp.arctanh(t.action), jnp.mean(log_prob(t.obs, t.action))

    last = -np.inf
    for weight in (0.0, 1.0, 4.0, 16.0, 64.0, 1e6):
        u, likelihood = sample(weight)
        assert likelihood > last - 0.01
        last = likelihood
    off = np.asarray((u - mode) * jnp.sign(mode)).reshape(-1, 2)
    assert np.all(np.abs(np.median(off, axis=0)) < 0.3)
    assert np.all(np.quantile(off, 0.9, axis=0) < 0.3)


def test_a_quadratic_score_of_ones_own_is_met_and_a_straight_one_is_followed():
    moved, x, dataset = moved_by([(1e6, mine)], sigma=1.0)
    np.testing.assert_allclose((x + moved)[:, 0, 0], 1.0, atol=1e-3)  # the top of the quadratic
    np.testing.assert_allclose(moved[..., 2], np.sqrt(1 / 17), rtol=1e-3)  # sqrt(v), up
    rest = moved.copy()
    rest[:, 0, 0] = rest[..., 2] = 0
    assert np.all(rest == 0)
    # and little weight moves by weight v g
    small, *_ = moved_by([(1e-4, mine)], sigma=1.0)
    np.testing.assert_allclose(small[..., 2], 1e-4 / 17, rtol=1e-2)
    np.testing.assert_allclose(
        small[:, 0, 0], -4e-4 / 17 * (x[:, 0, 0] - 1.0), rtol=1e-2, atol=1e-8
    )


def test_a_label_follows_from_the_states_and_actions_and_is_not_moved():
    moved, *_ = moved_by([(1e6, mine)])
    assert np.all(moved[..., -2:] == 0)
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    for rule in (pgd.make_guide, make_paper_guide):  # a score of rewards would do nothing
        guide = rule([(1.0, lambda t: jnp.sum(t.reward, axis=-1))], dataset, CONFIG)
        with pytest.raises(TypeError):
            guide(jnp.zeros((5, 8, 7)), jnp.float32(1.0))


def test_weights_of_one_score_add_up():
    one, *_ = moved_by([(5.0, POLICY)])
    two, *_ = moved_by([(2.0, POLICY), (3.0, POLICY)])
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_a_negative_weight_pushes_the_other_way_and_no_further_than_the_noise():
    away, x, dataset = moved_by([(-4.0, POLICY)], sigma=0.5)
    toward, *_ = moved_by([(4.0, POLICY)], sigma=0.5)
    assert np.all(away[..., 3:5] * toward[..., 3:5] <= 0) and np.abs(away).max() > 0.01
    assert np.abs(np.asarray(dataset.split(x + away).action)).max() < 1.0
    assert np.all(np.isfinite(moved_by([(4.0, POLICY), (-8.0, POLICY)])[0]))


# --- The paper's rule ---


def paper_sampler(key, denoiser, terms, dataset, config, num):
    """The paper's rule as it is written: Heun's sampler, with x pushed by lambda_n g / ||g|| before
    the churn of every level, and g at the last denoised estimate."""
    sigmas, levels = pgd.noise_levels(config), config.sample_steps
    ((weight, score),) = terms
    gamma = min(config.s_churn / levels, 2**0.5 - 1)

    def step(carry, i):
        x, last = carry
        lambda_n = weight * ((1 - i / levels) + 0.3 * jnp.sin(jnp.pi * (i + 1) / levels))
        g = jax.grad(lambda x: jnp.sum(score(dataset.split(x))))(last)
        x = x + lambda_n * g / jnp.sqrt(jnp.sum(g**2, axis=(1, 2), keepdims=True) + 1e-12)
        churn = jnp.where((config.s_tmin <= sigmas[i]) & (sigmas[i] <= config.s_tmax), gamma, 0.0)
        noise = config.s_noise * jax.random.normal(jax.random.fold_in(key, i), x.shape)
        hat = sigmas[i] * (1 + churn)
        x = x + sigmas[i] * jnp.sqrt(churn * (2 + churn)) * noise
        d = (x - denoiser(x, hat)) / hat
        dt = sigmas[i + 1] - hat
        last = denoiser(x + dt * d, sigmas[i + 1])
        d_next = (x + dt * d - last) / sigmas[i + 1]
        return (x + dt * 0.5 * (d + d_next), last), None

    shape = (num, config.horizon, dataset.steps.shape[-1])
    x = sigmas[0] * jax.random.normal(jax.random.fold_in(key, 10**6), shape)
    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros(shape)), jnp.arange(levels - 1))
    return denoiser(x, sigmas[levels - 1])


@pytest.mark.slow
def test_the_papers_rule_is_that_of_the_paper_at_its_256_levels():
    config = dataclasses.replace(CONFIG, sample_steps=256, sigma_min=0.002, sigma_max=80.0,
                                 sampler="heun")  # fmt: skip
    dataset = pgd.make_dataset(toy_log(), config)
    churn = config.s_churn, config.s_tmin, config.s_tmax, config.s_noise
    likelihood = lambda x: float(POLICY(dataset.split(x)).mean())

    @jax.jit
    def both(weight):
        terms = [(weight, POLICY)]
        guide = make_paper_guide(terms, dataset, config)
        guided = lambda x, sigma: guide(white_noise_denoiser(x, sigma), sigma)
        sigmas, shape = pgd.noise_levels(config), (512, 8, 7)
        ours = pgd.sample_heun(jax.random.key(0), guided, shape, sigmas, churn)
        args = jax.random.key(1), white_noise_denoiser, terms, dataset, config, 512
        return ours, paper_sampler(*args)

    unguided = likelihood(both(0.0)[0])
    for weight in (0.05, 0.2, 1.0):
        ours, paper = map(likelihood, both(weight))
        assert paper - unguided > 0.3
        assert ours - unguided == pytest.approx(paper - unguided, rel=0.25)


def test_the_papers_rule_gives_every_trajectory_the_same_length_of_push():
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    x = dataset.windows(jax.random.key(0), dataset.train_starts, 5, 8)
    guide = make_paper_guide([(0.3, POLICY)], dataset, CONFIG)
    lengths = [jnp.sqrt(jnp.sum((guide(x, s) - x) ** 2, (1, 2))) for s in pgd.noise_levels(CONFIG)]
    np.testing.assert_allclose(np.std(lengths[3]) / np.mean(lengths[3]), 0.0, atol=1e-3)
    assert np.all(np.asarray(lengths[-2]) < 1e-4)  # none at the last level
    assert np.all(np.asarray(lengths[0]) > 0.1)
    nothing = make_paper_guide([(1.0, lambda t: 0.0 * t.obs.sum((-2, -1)))], dataset, CONFIG)
    np.testing.assert_array_equal(nothing(x, jnp.float32(1.0)), x)


# --- Where trajectories start ---

AR = 0.9 ** np.abs(np.arange(8)[:, None] - np.arange(8))  # covariance over time of each channel


def exact_unet(params, x, c_noise, config):
    """Stands in for the network, so that the denoiser is exact for a Gaussian process of covariance
    AR whose first observation is known: x (B, 8, 7 + 3), of which 3 channels are the start."""
    sigma = jnp.exp(4.0 * c_noise)[..., None, None]
    s = sigma * jnp.array([0.25] * 3 + [1.0] * 4)  # on each channel; the labels come as 0
    start, noisy = x[..., 7:], x[..., :7] * jnp.sqrt(s**2 + 1)  # c_in taken back
    np.testing.assert_array_equal(x.shape[-2:], (8, 10))
    cov, level = jnp.asarray(AR, jnp.float32), jnp.reshape(sigma, (-1,))[0] ** 2
    free = jnp.linalg.solve(cov + level * jnp.eye(8), cov).T
    known = jnp.linalg.solve(cov + level / 16 * jnp.diag((jnp.arange(8) > 0) * 1.0), cov).T
    obs = jnp.concatenate([start[:, :1], noisy[:, 1:, :3]], axis=1)
    product = lambda w, y: jnp.einsum("ts,bsd->btd", w, y)
    denoised = jnp.concatenate([product(known, obs), product(free, noisy[..., 3:])], -1)
    return (denoised - noisy / (1 + s**2)) * jnp.sqrt(1 + s**2) / s


@pytest.mark.parametrize("sampler", ["sde", "heun"])
@pytest.mark.parametrize("guided", [False, True])
def test_a_given_start_is_exact_in_every_sample_and_the_rest_follows_it(
    sampler, guided, monkeypatch
):
    config = dataclasses.replace(CONFIG, sample_steps=64, condition_on_start=True, sampler=sampler)
    dataset = pgd.make_dataset(toy_log(), config)
    monkeypatch.setattr(pgd, "unet", exact_unet)
    start = jax.random.normal(jax.random.key(2), (2048, 3)) + jnp.array([1.5, 0.0, -1.0])
    terms = [(1.0, mine), (4.0, POLICY)] if guided else []
    state = pgd.DenoiserState({}, {}, (), jnp.zeros(()))
    sample = jax.jit(lambda key, start: pgd.sample(key, state, dataset, config, terms, start))
    x = sample(jax.random.key(0), start)
    np.testing.assert_array_equal(x[:, 0, :3], start)
    if guided:
        return
    action = np.asarray(x[..., 3:5])
    assert action.std() == pytest.approx(1.0, abs=0.06)
    correlation = np.mean(action[:, 1:] * action[:, :-1]) / np.mean(action**2)
    assert correlation == pytest.approx(0.9, abs=0.05)
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
    terms = [(1.0, mine), (4.0, POLICY)]
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
        fit_lr=1e-2, ema=0.98, condition_on_start=True,
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
    assert np.mean((last - start) ** 2) < 0.02


# --- What generate() makes of the weights of the config ---


@pytest.mark.slow
def test_each_weight_of_the_config_is_its_guide():
    """Value and behaviour weights: samples that the critic values more, that the clone finds less
    likely."""
    none = {"guidance": 0.0, "value_guidance": 0.0, "behaviour_guidance": 0.0}
    plain, up, down, toward = (
        generated(True, **none | weights)
        for weights in (
            {}, {"value_guidance": 10.0}, {"behaviour_guidance": 0.5}, {"guidance": 4.0},
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


@pytest.mark.parametrize(
    "weight, name", [(0.0, "td3_bc"), (0.5, "td3_bc"), (0.5, "iql"), (0.5, "edac")]
)
def test_generate_asks_for_each_guide_with_its_weight_and_sign(monkeypatch, weight, name):
    """Toward the policy and its value, away from the clone; all times the round's weight. A policy
    with a standard deviation of its own counts as N(its action, 1), as a deterministic one does."""
    seen = []

    def spy(key, state, dataset, config, terms, start, rule):
        seen.append(terms)
        return jnp.zeros((2, 8, 7))

    monkeypatch.setattr(pgd, "sample", spy)
    config = dataclasses.replace(
        CONFIG, features=8, blocks=1, trajectories=4, sample_batch=2,
        guidance=0.5, value_guidance=0.3, behaviour_guidance=0.2,
    )  # fmt: skip
    dataset = pgd.make_dataset(toy_log(), config)
    agent, cloner = agents.make_agent(name, hidden=(4,)), agents.bc(hidden=(4,))
    diffusion = make_diffusion_with_clone(config, cloner)
    clone = cloner.init(jax.random.key(2), 3, 2)
    learner = agent.init(jax.random.key(1), 3, 2)
    model = ClonedState((), clone, jnp.zeros((), jnp.int32))
    policy = pgd.target_policy(agent, learner)
    diffusion.generate(jax.random.key(0), model, policy, jnp.float32(weight), dataset)
    (terms,) = seen
    np.testing.assert_allclose([float(w) for w, _ in terms], weight * np.array([0.5, 0.3, -0.2]))
    t = dataset.split(dataset.steps[:8])
    q = agent.q_value(learner, t.obs, t.action)
    expected = [
        -0.5 * jnp.sum((t.action - agent.act(learner, t.obs)) ** 2),
        q.sum() / jnp.abs(q).mean(),  # whatever the scale of Q
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
