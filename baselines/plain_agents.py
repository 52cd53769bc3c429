"""TD3+BC, ReBRAC and IQL the plain way, as studies/speed.py compares them with agents.py.

Every network has parameters and an optimiser of its own, and every batch its own pass: nothing is
stacked, and no target is computed for two updates at once. The losses are those of agents.py, and
so are the results, to rounding. Hyperparameters are the defaults of agents.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import agents

GAMMA, TAU = 0.99, 0.005


class Learner(NamedTuple):
    """Networks by name, such as "actor" and "critic 1", each with its Adam state."""

    params: dict[str, Any]
    targets: dict[str, Any]
    opts: dict[str, Any]


def start(optimiser, **params) -> Learner:
    """-> a Learner of these networks, whose targets are copies."""
    return Learner(params, params, {name: optimiser.init(p) for name, p in params.items()})


def q_of(layers, obs, action, layer_norm=False):
    """layers of one critic, obs (B, O), action (B, A) -> Q (B,)."""
    return agents.mlp(layers, jnp.concatenate([obs, action], -1), layer_norm)[..., 0]


def make_step(optimiser):
    """-> step(learner, name, loss): one gradient step of the loss by that network alone."""

    def step(learner: Learner, name: str, loss) -> Learner:
        grads = jax.grad(loss)(learner.params[name])
        updates, opt = optimiser.update(grads, learner.opts[name], learner.params[name])
        new = optax.apply_updates(learner.params[name], updates)
        return learner._replace(
            params=learner.params | {name: new}, opts=learner.opts | {name: opt}
        )

    return step


def follow(learner: Learner, names) -> Learner:
    """Move the target of each named network by tau towards it."""
    new = {n: agents.polyak(learner.params[n], learner.targets[n], TAU) for n in names}
    return learner._replace(targets=learner.targets | new)


CRITICS = ("critic 1", "critic 2")


def separate(critic) -> dict:
    """-> {"critic 1": layers, "critic 2": layers} of the stacked critics of agents.py."""
    return {name: jax.tree.map(lambda x: x[i], critic) for i, name in enumerate(CRITICS)}


def td3(ours: agents.Agent, lr: float, rebrac: bool) -> agents.Agent:
    """TD3+BC, or ReBRAC, with the networks that `ours`, of agents.py, starts from."""
    optimiser = optax.adam(lr, eps=1e-5)
    step = make_step(optimiser)
    pi = lambda actor, obs: jnp.tanh(agents.mlp(actor, obs))

    def init(key, obs_dim, act_dim):
        state = ours.init(key, obs_dim, act_dim)
        return start(optimiser, actor=state.actor, **separate(state.critic))

    def target_of(learner, batch, noise):
        target = learner.targets
        noise = jnp.clip(0.2 * noise, -0.5, 0.5)
        action = jnp.clip(pi(target["actor"], batch.next_obs) + noise, -1.0, 1.0)
        q1, q2 = (q_of(target[name], batch.next_obs, action, rebrac) for name in CRITICS)
        next_v = jnp.minimum(q1, q2)
        if rebrac:
            penalty = jnp.sum((action - batch.next_action) ** 2, -1)
            next_v -= 0.01 * jnp.where(jnp.isnan(penalty), 0.0, penalty)
        return batch.reward + GAMMA * (1.0 - batch.done) * next_v

    def update(key, learner, batch):
        noise = jax.random.normal(key, batch.action.shape)
        for half in jnp.split(jnp.arange(len(noise)), 2):
            part = jax.tree.map(lambda x: x[half], batch)
            target = target_of(learner, part, noise[half])
            for name in CRITICS:
                error = lambda layers: q_of(layers, part.obs, part.action, rebrac) - target
                learner = step(learner, name, lambda layers: jnp.mean(error(layers) ** 2))

        def actor_loss(actor):
            action = pi(actor, part.obs)
            cloning = jnp.sum((action - part.action) ** 2, -1)
            q = [q_of(learner.params[name], part.obs, action, rebrac) for name in CRITICS]
            q = jnp.minimum(*q) if rebrac else q[0]
            scale = 1.0 / jax.lax.stop_gradient(jnp.mean(jnp.abs(q)))
            if rebrac:
                return -scale * jnp.mean(q) + 0.01 * jnp.mean(cloning)
            return -2.5 * scale * jnp.mean(q) + jnp.mean(cloning) / action.shape[-1]

        learner = step(learner, "actor", actor_loss)
        return follow(learner, learner.params), {}

    return agents.Agent(init, update, act=None, log_prob=None, batches_per_update=2)


def iql(ours: agents.Agent, lr: float = 3e-4) -> agents.Agent:
    """IQL with the networks that `ours`, of agents.py, starts from."""
    optimiser = optax.adam(lr, eps=1e-5)
    step = make_step(optimiser)

    def init(key, obs_dim, act_dim):
        state = ours.init(key, obs_dim, act_dim)
        own = {"actor": state.actor, "value": state.value}
        return start(optimiser, **own, **separate(state.critic))

    def update(key, learner, batch):
        pairs = (learner.targets[name] for name in CRITICS)
        q = jnp.minimum(*(q_of(layers, batch.obs, batch.action) for layers in pairs))
        value_of = lambda layers, obs: agents.mlp(layers, obs)[..., 0]

        def value_loss(value):
            u = q - value_of(value, batch.obs)
            return jnp.mean(jnp.abs(0.7 - (u < 0)) * u**2)

        def actor_loss(actor):
            return agents.weighted_cloning(actor, batch, advantage, 3.0, 100.0)[0]

        learner = step(learner, "value", value_loss)
        advantage = q - value_of(learner.params["value"], batch.obs)
        learner = step(learner, "actor", actor_loss)
        next_v = value_of(learner.params["value"], batch.next_obs)
        target = batch.reward + GAMMA * (1.0 - batch.done) * next_v
        for name in CRITICS:
            error = lambda layers: q_of(layers, batch.obs, batch.action) - target
            learner = step(learner, name, lambda layers: jnp.mean(error(layers) ** 2))
        return follow(learner, CRITICS), {}

    return agents.Agent(init, update, act=None, log_prob=None)


def make_plain(name: str) -> agents.Agent:
    """-> the plain td3_bc, rebrac or iql. Its state is a Learner; it has init and update only."""
    ours = agents.make_agent(name)
    if name == "iql":
        return iql(ours)
    return td3(ours, 1e-3, True) if name == "rebrac" else td3(ours, 3e-4, False)
