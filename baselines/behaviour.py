"""Behaviour guidance: a diffusion model guided away from a clone of the log's policy.

    python pgd.py --behaviour-guidance 0.5

PGD leaves out the term - grad_a log beta(a|s) of the on-policy target. STITCH-OPE (arXiv
2505.20781) adds it with a weight of its own. beta is a clone of the log's policy, an agent that is
trained on the log beside the denoiser by pgd.update_agent.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

import pgd


class ClonedState(NamedTuple):
    """A denoiser and a clone of the log's policy."""

    denoiser: pgd.DenoiserState
    clone: Any  # state of the cloning agent
    step: chex.Array  # () int32


def make_diffusion_with_clone(config: pgd.Config, cloner, rule=pgd.make_guide) -> pgd.Generator:
    """cloner: an agent such as agents.bc() -> the diffusion model with behaviour guidance.

    rule(terms, dataset, config) makes a guide, as pgd.make_guide does.
    The clone has as many updates as the denoiser has gradient steps, on the training episodes.
    """
    diffusion = pgd.make_diffusion(config)
    # A key that the denoiser never uses, so that the denoiser is the same as without a clone
    clone_key = lambda key: jax.random.fold_in(key, 2**31 - 1)

    def init(key, dataset):
        clone = cloner.init(clone_key(key), dataset.obs_dim, dataset.act_dim)
        denoiser = diffusion.init(key, dataset)
        return ClonedState(denoiser, clone, jnp.zeros((), jnp.int32))

    def fit(key, state, dataset):
        key_clone = clone_key(key)
        denoiser, metrics = diffusion.fit(key, state.denoiser, dataset)

        def draw(key):
            rows = jax.random.choice(key, dataset.train_rows, (config.batch_size,))
            return dataset.transitions(rows)

        def step(clone, i):  # with a key of its own, whatever the length of a chunk
            return pgd.update_agent(jax.random.fold_in(key_clone, i), cloner, clone, draw, 1)

        end = state.step + config.fit_chunk
        clone, _ = jax.lax.scan(step, state.clone, state.step + jnp.arange(config.fit_chunk))
        return ClonedState(denoiser, clone, end), metrics

    def generate(key, state, policy, weight, dataset):
        beta = pgd.action_score(functools.partial(cloner.log_prob, state.clone))
        terms = [(-weight * config.behaviour_guidance, beta)]
        return pgd.make_diffusion(config, terms, rule).generate(
            key, state.denoiser, policy, weight, dataset
        )

    def validate(state, dataset):
        t = dataset.transitions(dataset.val_rows[: 2**14])
        likelihood = jnp.mean(cloner.log_prob(state.clone, t.obs, t.action))
        return diffusion.validate(state.denoiser, dataset) | {"clone_log_prob": likelihood}

    return diffusion._replace(init=init, fit=fit, generate=generate, validate=validate)
