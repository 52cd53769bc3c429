"""Policy guidance against the closed form of a linear policy (PGD section 4)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_log

import pgd

CONFIG = pgd.Config(horizon=8, fit_batch=8, batch_size=8, guidance_denoised=False, sample_steps=16,
                    guidance_every=1)  # fmt: skip
RATE = 256 / 16  # a push at one of 16 levels stands for those of 16 of the paper's 256
W = jnp.array([[0.5, -0.2], [0.1, 0.4], [-0.3, 0.2]])  # a linear policy: mean action obs @ W


def log_prob(obs, action):
    return -0.5 * jnp.sum((action - obs @ W) ** 2, axis=-1)


def push(config=CONFIG, step=3, weight=1.0, x=None, f=log_prob, denoised=None, sigma=0.5):
    """How far the guide moves x (5, 8, D): -> (pushed - x, x, dataset)."""
    dataset = pgd.make_dataset(toy_log(), config)
    x = (
        pgd.sample_windows(jax.random.key(0), dataset, dataset.train_starts, 5, 8)
        if x is None
        else x
    )
    guide = pgd.make_policy_guide(f, dataset, config, weight)
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
        guide = pgd.make_policy_guide(log_prob, dataset, config, weight)
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
            guide = pgd.make_policy_guide(log_prob, dataset, config, weight)
            sigmas = pgd.noise_levels(config)
            x = pgd.sample_sde(jax.random.key(0), denoiser, (1024, 8, 7), sigmas, guide, eta=eta)
            obs, action, _, _ = pgd.split_steps(dataset, x)
            likelihood[num, weight] = float(log_prob(obs, action).mean())
    effect = {num: likelihood[num, 0.1] - likelihood[num, 0.0] for num in (32, 64, 256)}
    assert effect[256] > 0.03
    assert effect[64] == pytest.approx(effect[256], rel=0.15)
    assert effect[32] == pytest.approx(effect[256], rel=0.3)
