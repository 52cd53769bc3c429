"""The paper's guidance rule, for comparison with the tilted density of pgd.make_guide.

    python pgd.py --guidance-rule paper --guidance 0.25

At each level the paper pushes the sample by lambda_n g / ||g|| (PGD section 4). g is the gradient
of the score by the standardised trajectory, and lambda_n = lambda max(0, 1 - n + 0.3 sin(pi n)),
where n grows from 0 at the first level to 1 at the last; the paper's sine is a level ahead. Here
the push is a change of the denoiser's output that moves the next sample as far, so that the
samplers need no guide.
"""

import jax
import jax.numpy as jnp

import pgd


def make_paper_guide(terms, dataset: pgd.Dataset, config: pgd.Config):
    """(weight, score) pairs -> guide(D (B, T, D), sigma) -> D', as pgd.make_guide.

    The gradient is taken at D, where tanh is not saturated. A weight is the paper's lambda at its
    256 levels: with fewer levels each push is longer, so that their sum stays the same.
    """
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)

    seen = lambda x: dataset.split(x)._replace(reward=None, done=None)

    def guide(denoised, sigma):
        n = (high - sigma ** (1 / config.rho)) / (high - low)  # from 0 to 1 (EDM equation 5)
        lambda_n = 256 / config.sample_steps * jax.nn.relu(1 - n + 0.3 * jnp.sin(jnp.pi * n))
        # The step to the next level keeps this share of the sample and takes the rest from D
        h = config.rho * (high - low) / sigma ** (1 / config.rho) / (config.sample_steps - 1)
        keep = jnp.exp(-(1.0 + config.eta) * h)
        if config.sampler == "heun":
            churned = (config.s_tmin <= sigma) & (sigma <= config.s_tmax)
            gamma = jnp.minimum(config.s_churn / config.sample_steps, 2**0.5 - 1)
            keep = jnp.exp(-h) / (1.0 + jnp.where(churned, gamma, 0.0))
        moved = 0.0
        for weight, score in terms:
            g = jax.grad(lambda x, f=score: jnp.sum(f(seen(x))))(denoised)
            norm_sq = jnp.sum(g**2, axis=(-2, -1), keepdims=True)
            moved += weight * lambda_n * g * jax.lax.rsqrt(jnp.maximum(norm_sq, 1e-12))
        return denoised + moved / (1.0 - keep)

    return guide
