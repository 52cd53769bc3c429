"""Preconditioning, loss, schedule, sampler and network against closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_log

import pgd
from host.flags import PRESETS
from studies import samplers

MU, S = 0.7, 0.5  # a Gaussian log with mean MU and standard deviation S


def gaussian_denoiser(x, sigma):
    """The exact E[x0 | x] for data N(MU, S^2)."""
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def shaken(params):
    """No layer at its zero initialisation."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, moved)


@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_schedule_runs_from_sigma_max_to_sigma_min_then_zero(rho):
    config = pgd.Config(sample_steps=18, sigma_min=0.002, sigma_max=80.0, rho=rho)
    sigmas = np.asarray(pgd.noise_levels(config))
    i = np.arange(18)
    low, high = 0.002 ** (1 / rho), 80 ** (1 / rho)
    expected = (high + i / 17 * (low - high)) ** rho  # EDM equation 5
    np.testing.assert_allclose(sigmas[:-1], expected, rtol=1e-4)
    assert sigmas[-1] == 0 and len(sigmas) == 19


def test_preconditioned_zero_network_is_the_exact_denoiser_of_unit_gaussian_data():
    denoiser = pgd.precondition(lambda x, c_noise: jnp.zeros_like(x))
    x = jax.random.normal(jax.random.key(0), (5, 4, 3))
    sigma = jnp.array([0.01, 0.1, 1.0, 10.0, 80.0])
    np.testing.assert_allclose(denoiser(x, sigma), x / (1 + sigma[:, None, None] ** 2), rtol=1e-6)


def test_preconditioning_keeps_input_and_target_at_unit_variance():
    seen = {}

    def network(x, c_noise):
        seen["x"], seen["c_noise"] = x, c_noise
        return jnp.zeros_like(x)

    key_x, key_n = jax.random.split(jax.random.key(0))
    x0, noise = jax.random.normal(key_x, (20_000, 1, 1)), jax.random.normal(key_n, (20_000, 1, 1))
    for s in (0.05, 1.0, 20.0):
        sigma = jnp.full(20_000, s)
        denoiser = pgd.precondition(network)
        skip = denoiser(x0 + s * noise, sigma)
        assert np.std(seen["x"]) == pytest.approx(1.0, abs=0.02)
        np.testing.assert_allclose(seen["c_noise"], np.log(s) / 4, rtol=1e-5)
        c_out = s / np.sqrt(s**2 + 1)
        assert np.std((x0 - skip) / c_out) == pytest.approx(1.0, abs=0.02)


def test_loss_of_the_exact_denoiser_of_unit_gaussian_data_is_one_at_every_noise_level():
    key_x, key_n = jax.random.split(jax.random.key(0))
    x, noise = jax.random.normal(key_x, (4096, 4, 3)), jax.random.normal(key_n, (4096, 4, 3))
    for scale in (1.0, jnp.array([0.25, 1.0, jnp.inf])):
        denoiser = pgd.precondition(lambda x, c_noise: jnp.zeros_like(x), scale)
        for s in (0.02, 0.3, 5.0):
            loss = pgd.edm_loss(denoiser, x, jnp.full(4096, s), noise, scale)
            assert float(loss) == pytest.approx(1.0, abs=0.03)


def test_labels_are_not_seen_and_are_what_the_network_says_at_every_noise_level():
    """Reward and done, the last two of a step's channels, whose noise counts as infinite."""
    seen, said = [], jax.random.normal(jax.random.key(1), (3, 4, 5))
    scale = jnp.array([1.0, 1.0, 1.0, jnp.inf, jnp.inf])
    denoiser = pgd.precondition(lambda x, c_noise: seen.append(np.asarray(x)) or said, scale)
    x, sigma = jax.random.normal(jax.random.key(0), (3, 4, 5)), jnp.array([0.02, 1.0, 40.0])
    made = denoiser(x, sigma)
    c_in, c_skip = 1 / np.sqrt(1 + sigma[:, None, None] ** 2), 1 / (1 + sigma[:, None, None] ** 2)
    np.testing.assert_allclose(seen[0][..., :3], (c_in * x)[..., :3], rtol=1e-6)
    np.testing.assert_array_equal(seen[0][..., 3:], 0.0)
    np.testing.assert_allclose(made[..., 3:], said[..., 3:], rtol=1e-6)
    expected = c_skip * x + sigma[:, None, None] * c_in * said
    np.testing.assert_allclose(made[..., :3], expected[..., :3], rtol=1e-5, atol=1e-6)
    # the squared error of a label counts once, whatever the noise
    wrong = lambda x, sigma: x0 + jnp.array([0.0, 0.0, 0.0, 2.0, 1.0])
    x0 = jnp.zeros((3, 4, 5))
    assert float(pgd.edm_loss(wrong, x0, sigma, x0, scale)) == pytest.approx((4.0 + 1.0) / 5)


def test_each_channel_has_its_own_noise_and_its_own_weight_in_the_loss():
    """The noise on observations is obs_noise times that on actions; labels have none, since the
    denoiser does not see them."""
    config = pgd.Config(horizon=8, fit_batch=8, batch_size=8, obs_noise=0.5)
    scale = pgd.noise_scale(pgd.make_dataset(toy_log(), config), config)
    np.testing.assert_array_equal(scale, [0.5, 0.5, 0.5, 1, 1, np.inf, np.inf])
    sigma, seen = jnp.array([0.5, 2.0]), []
    x, noise = jnp.zeros((2, 1, 7)), jnp.ones((2, 1, 7))
    loss = pgd.edm_loss(lambda x, _: seen.append(x) or jnp.eye(7)[0], x, sigma, noise, scale)
    np.testing.assert_allclose(
        seen[0][:, 0], np.outer(sigma, [0.5, 0.5, 0.5, 1, 1, 0, 0]), rtol=1e-6
    )
    weight = 1 + (0.5 * np.array([0.5, 2.0])) ** -2.0  # of an observation's error of 1
    assert float(loss) == pytest.approx(weight.mean() / 7)


def test_loss_does_not_depend_on_the_order_of_the_batch():
    config = pgd.Config(features=8, blocks=1)
    params = jax.jit(lambda key: shaken(pgd.init_unet(key, 4, 4, config)))(jax.random.key(0))
    denoiser = pgd.precondition(lambda x, c: pgd.unet(params, x, c, config))
    key_x, key_n, key_s = jax.random.split(jax.random.key(1), 3)
    x, noise = jax.random.normal(key_x, (8, 16, 4)), jax.random.normal(key_n, (8, 16, 4))
    sigma = jnp.exp(jax.random.normal(key_s, (8,)))
    order = np.random.default_rng(0).permutation(8)
    loss_of = jax.jit(lambda x, sigma, noise: pgd.edm_loss(denoiser, x, sigma, noise))
    loss = loss_of(x, sigma, noise)
    permuted = loss_of(x[order], sigma[order], noise[order])
    np.testing.assert_allclose(loss, permuted, rtol=1e-5)
    other = loss_of(x[order], sigma, noise[order])
    assert abs(float(loss - other)) > 1e-4  # the noise levels do matter


def test_deterministic_sampler_solves_the_probability_flow_of_a_gaussian():
    """Its exact solution is x(0) = MU + (x(sigma_max) - MU) * S / sqrt(S^2 + sigma_max^2)."""
    key, shape = jax.random.key(3), (64, 4, 2)
    sigmas = pgd.noise_levels(pgd.Config(sample_steps=128, sigma_max=80.0))
    x = pgd.sample_heun(key, gaussian_denoiser, shape, sigmas)
    start = 80.0 * jax.random.normal(jax.random.fold_in(key, 0), shape)
    exact = MU + (start - MU) * S / np.sqrt(S**2 + 80.0**2)
    error = np.abs(x - exact).max()
    assert error < 3e-3
    coarse = pgd.sample_heun(
        key, gaussian_denoiser, shape, pgd.noise_levels(pgd.Config(sample_steps=32, sigma_max=80.0))
    )
    coarse_error = np.abs(coarse - exact).max()
    assert (
        coarse_error > 6 * error
    )  # second order: a quarter of the steps, about 16 times the error


@pytest.mark.parametrize("s_churn", [10.0, 80.0])
def test_stochastic_sampler_has_the_moments_of_a_gaussian(s_churn):
    sigmas = pgd.noise_levels(pgd.Config(sample_steps=128))
    churn = (s_churn, 0.05, 50.0, 1.0)
    sampler = jax.jit(
        lambda k: pgd.sample_heun(k, gaussian_denoiser, (20_000, 1, 1), sigmas, churn)
    )
    x = np.asarray(sampler(jax.random.key(0)))
    assert x.mean() == pytest.approx(MU, abs=0.02)
    assert x.std() == pytest.approx(S, rel=0.03)
    still = pgd.sample_heun(jax.random.key(0), gaussian_denoiser, (20_000, 1, 1), sigmas)
    assert np.corrcoef(x.ravel(), np.asarray(still).ravel())[0, 1] < 0.9  # noise was added


def test_sampler_calls_the_denoiser_2n_minus_1_times_and_never_at_zero():
    calls = []

    def denoiser(x, sigma):
        jax.debug.callback(lambda s: calls.append(float(s)), sigma)
        return x / (1 + sigma**2)

    sigmas = pgd.noise_levels(pgd.Config(sample_steps=8))
    jax.block_until_ready(pgd.sample_heun(jax.random.key(0), denoiser, (2, 4, 1), sigmas))
    jax.effects_barrier()
    assert len(calls) == 15 and min(calls) > 0


@pytest.mark.parametrize("sampler", [pgd.sample_heun, pgd.sample_sde])
def test_the_denoiser_is_asked_at_every_level_in_order_and_last_of_all(sampler):
    seen, options = [], {"churn": (0, 0, 0, 1)} if sampler is pgd.sample_heun else {"eta": 0.0}

    def denoiser(x, sigma):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma, ordered=True)
        return jnp.where(sigma < 0.021, 3.0, gaussian_denoiser(x, sigma))

    sigmas = pgd.noise_levels(pgd.Config(sample_steps=8))
    x = sampler(jax.random.key(0), denoiser, (4, 4, 1), sigmas, **options)
    jax.effects_barrier()
    levels = seen[::2] if sampler is pgd.sample_heun else seen  # Heun corrects at the next level
    np.testing.assert_allclose(levels, sigmas[:-1], rtol=1e-6)
    np.testing.assert_array_equal(x, 3.0)  # the sample is what it says at the last level


def test_deterministic_exponential_integrator_converges_at_second_order():
    """To the exact solution of the probability-flow ODE of a Gaussian."""
    key, shape, error = jax.random.key(3), (64, 4, 2), []
    for num in (32, 64, 128):
        sigmas = pgd.noise_levels(pgd.Config(sample_steps=num, sigma_min=0.002))
        x = pgd.sample_sde(key, gaussian_denoiser, shape, sigmas, eta=0.0)
        start = sigmas[0] * jax.random.normal(jax.random.fold_in(key, 0), shape)
        exact = MU + (start - MU) * S / np.sqrt(S**2 + float(sigmas[0]) ** 2)
        error.append(float(np.abs(x - exact).max()))
    assert error[0] / error[1] > 3.0 and error[1] / error[2] > 3.0


@pytest.mark.parametrize("eta", [0.0, 1.0, 8.0])
def test_stochastic_exponential_integrator_has_the_moments_of_a_gaussian(eta):
    sigmas = pgd.noise_levels(pgd.Config(sample_steps=128, sigma_min=0.002, sigma_max=80.0))
    shape = (20_000, 1, 1)
    sampler = jax.jit(lambda k: pgd.sample_sde(k, gaussian_denoiser, shape, sigmas, eta=eta))
    x = np.asarray(sampler(jax.random.key(0)))
    assert x.mean() == pytest.approx(MU, abs=0.02)
    assert x.std() == pytest.approx(S, rel=0.03)
    start = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), shape))
    memory = np.corrcoef(x.ravel(), start.ravel())[0, 1]
    assert memory > 0.999 if eta == 0 else memory < 0.5  # of the noise that it set out from


def test_the_default_sampler_keeps_the_spread_of_each_direction_of_a_gaussian(capsys):
    """Windows of 32 steps of hopper's log have variances up to 179 in their principal directions,
    and windows of 4 steps of small tasks up to 6, where a single channel has 1. With an exact
    denoiser, 16 levels make none off by over a tenth."""
    found = samplers.spread_of_gaussian(pgd.Config(obs_noise=1.0))
    assert np.abs(found - 1.0).max() < 0.09, found
    more_noise = samplers.spread_of_gaussian(pgd.Config(obs_noise=1.0, eta=8.0))
    assert np.abs(more_noise - 1.0).max() < 0.11, more_noise
    former = pgd.Config(obs_noise=1.0, sigma_max=20.0, sigma_min=0.01, rho=7.0, eta=8.0)
    assert samplers.spread_of_gaussian(former).max() > 1.13
    small = samplers.spread_of_gaussian(pgd.Config())  # variances 150, 30, 3, ...
    assert small[0] < 0.9 and np.abs(small[1:] - 1.0).max() < 0.09, small
    for preset in ("laptop", "default-large"):
        long = samplers.spread_of_gaussian(pgd.Config(sigma_max=PRESETS[preset]["sigma_max"]))
        assert np.abs(long - 1.0).max() < 0.1, long
    heun = pgd.Config(sampler="heun", obs_noise=1.0, sample_steps=64, s_churn=0.0)
    assert np.abs(samplers.spread_of_gaussian(heun) - 1.0).max() < 0.05
    samplers.study(["gaussian", "--", "--eta", "0"])
    assert "| 150 | 30 |" in capsys.readouterr().out


def test_exponential_integrator_calls_the_denoiser_n_times_and_never_at_zero():
    calls = []

    def denoiser(x, sigma):
        jax.debug.callback(lambda s: calls.append(float(s)), sigma)
        return x / (1 + sigma**2)

    sigmas = pgd.noise_levels(pgd.Config(sample_steps=8))
    jax.block_until_ready(pgd.sample_sde(jax.random.key(0), denoiser, (2, 4, 1), sigmas))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(calls), sorted(sigmas[:-1]), rtol=1e-6)


# --- Both samplers against the algorithms in numpy, with the same random numbers ---


def draws(key, shape, num):
    """-> the normal numbers of the start and of each step."""
    return [
        np.asarray(jax.random.normal(jax.random.fold_in(key, i), shape), np.float64)
        for i in range(num + 1)
    ]


@pytest.mark.parametrize("churn", [(2.0, 0.05, 5.0, 1.3), (80.0, 0.0, 50.0, 1.003)])
def test_stochastic_sampler_is_edms_algorithm_2(churn):
    key, shape = jax.random.key(4), (6, 4, 2)
    sigmas = pgd.noise_levels(pgd.Config(sample_steps=10))
    s_churn, s_tmin, s_tmax, s_noise = churn
    t, n = np.asarray(sigmas, np.float64), 10
    noise = draws(key, shape, n)
    x = t[0] * noise[0]
    for i in range(n):
        inside = s_tmin <= t[i] <= s_tmax
        gamma = min(s_churn / n, np.sqrt(2) - 1) if inside else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + np.sqrt(t_hat**2 - t[i] ** 2) * s_noise * noise[i + 1]
        d = (x_hat - gaussian_denoiser(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] > 0:
            d_next = (x - gaussian_denoiser(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d + d_next) / 2
    ours = jax.jit(lambda k: pgd.sample_heun(k, gaussian_denoiser, shape, sigmas, churn))(key)
    np.testing.assert_allclose(ours, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0, 3.0])
def test_exponential_integrator_is_dpm_solver_plus_plus(eta):
    key, shape = jax.random.key(4), (6, 4, 2)
    sigmas = pgd.noise_levels(pgd.Config(sample_steps=10))
    t, n, last, h_last = np.asarray(sigmas, np.float64), 10, None, None
    noise = draws(key, shape, n)
    x = t[0] * noise[0]
    for i in range(n - 1):
        denoised = gaussian_denoiser(x, t[i])
        h, target = np.log(t[i] / t[i + 1]), denoised
        if last is not None:
            target = denoised + 0.5 * h / h_last * (denoised - last)
        keep = np.exp(-(1 + eta) * h)
        x = keep * x + (1 - keep) * target
        x = x + t[i + 1] * np.sqrt(1 - np.exp(-2 * eta * h)) * noise[i + 1]
        last, h_last = denoised, h
    x = gaussian_denoiser(x, t[n - 1])
    ours = jax.jit(lambda k: pgd.sample_sde(k, gaussian_denoiser, shape, sigmas, eta))(key)
    np.testing.assert_allclose(ours, x, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("levels", [1, 3])
def test_training_approaches_the_exact_denoiser_of_a_gaussian_process(levels):
    """Windows of an AR(1) process are N(0, C), so D(x; sigma) = C (C + sigma^2 I)^-1 x exactly. The
    reward is the observation, but it is not seen: its mean is D of the observation."""
    rho, horizon, n = 0.95, 16, 20_000
    rng = np.random.default_rng(0)
    z = np.empty(n, np.float32)
    z[0] = rng.normal()
    for t in range(1, n):
        z[t] = rho * z[t - 1] + np.sqrt(1 - rho**2) * rng.normal()
    ends = np.arange(n) % 200 == 199
    log = {
        "observations": z[:, None],
        "actions": np.tanh(rng.normal(size=(n, 1))),
        "rewards": z,
        "terminals": np.zeros(n, bool),
        "timeouts": ends,
    }
    config = pgd.Config(
        horizon=horizon,
        features=32 if levels == 1 else 16,
        levels=levels,
        blocks=2 if levels == 1 else 1,
        fit_steps=400,
        fit_chunk=400,
        fit_batch=64,
        ema=0.98,
    )
    dataset = pgd.make_dataset(log, config)
    diffusion = pgd.make_diffusion(config)
    state = diffusion.init(jax.random.key(0), dataset)
    trained, _ = jax.jit(diffusion.fit)(jax.random.key(0), state, dataset)

    cov = rho ** np.abs(np.arange(horizon)[:, None] - np.arange(horizon))
    x0 = dataset.windows(jax.random.key(5), dataset.val_starts, 256, horizon)
    for obs_sigma in (0.2, 1.0):
        sigma = obs_sigma / config.obs_noise
        noise = jnp.array([obs_sigma, sigma, 0.0, 0.0])
        noisy = x0 + noise * jax.random.normal(jax.random.key(6), x0.shape)
        exact = noisy[..., 0] @ (cov @ np.linalg.inv(cov + obs_sigma**2 * np.eye(horizon))).T
        error = []
        for params in (state.params, trained.ema):
            denoiser = pgd.make_denoiser(params, dataset, config)
            denoised = jax.jit(denoiser)(noisy, jnp.full(256, sigma))
            error.append(np.mean((denoised[..., [0, 2]] - exact[..., None]) ** 2, (0, 1)))
        assert np.all(error[1] < 0.1 * error[0]), (sigma, error)


@pytest.mark.parametrize("gap", [1, 3, 9])
def test_convolution_and_its_gradients_equal_lax_conv(gap):
    x = jax.random.normal(jax.random.key(0), (2, 9, 4))
    w = jax.random.normal(jax.random.key(1), (5, 4, 3))

    def reference(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", rhs_dilation=(gap,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    def ours(x, w):
        return pgd.dense({"w": w.reshape(20, 3), "b": jnp.zeros(3)}, pgd.unfold(x, 5, gap))

    np.testing.assert_allclose(ours(x, w), reference(x, w), atol=1e-4)
    grads = [
        jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(x, w))), (0, 1))(x, w)
        for f in (ours, reference)
    ]
    for a, b in zip(*grads):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("blocks, reach", [(1, 3), (2, 6), (3, 15), (4, 16)])
def test_a_step_sees_as_far_as_the_gaps_of_the_convolutions(blocks, reach, monkeypatch):
    """Apart from the normalisation, which sees all: 1, 3, 9, 1, ... steps on either side, and one
    each for the first and the last convolution."""
    monkeypatch.setattr(pgd, "group_norm", lambda x, groups: x)
    config = pgd.Config(features=8, blocks=blocks, expansion=1)
    params = pgd.init_unet(jax.random.key(0), 2, 2, config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])
    first = lambda x: jnp.sum(pgd.unet(params, x, jnp.zeros(64), config)[:, 0])
    slope = jax.grad(first)(jax.random.normal(jax.random.key(2), (64, 32, 2)))
    seen = np.flatnonzero(np.any(np.asarray(slope) != 0, axis=(0, 2)))
    assert seen.max() == reach


def test_group_norm_standardises_each_group_over_time_and_channels():
    x = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (2, 10, 8))
    y = np.asarray(pgd.group_norm(x, 4)).reshape(2, 10, 4, 2)
    np.testing.assert_allclose(y.mean((1, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(y.std((1, 3)), 1.0, atol=1e-3)


@pytest.mark.parametrize("levels", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_network_takes_any_leading_axes_and_one_or_many_noise_levels(levels):
    config = dataclasses.replace(pgd.Config(), features=8, levels=levels, blocks=1)
    params = jax.jit(lambda key: shaken(pgd.init_unet(key, 5, 5, config)))(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 16, 5))
    unet = jax.jit(lambda x, c_noise: pgd.unet(params, x, c_noise, config))
    many = unet(x, jnp.full(3, 0.3))
    one = unet(x, jnp.float32(0.3))
    single = jnp.stack([unet(xi, jnp.float32(0.3)) for xi in x])
    np.testing.assert_allclose(many, one, atol=1e-5)
    np.testing.assert_allclose(many, single, atol=1e-5)  # no trajectory sees another
    other = unet(x, jnp.full(3, 0.9))
    assert np.abs(many - other).max() > 1e-4
