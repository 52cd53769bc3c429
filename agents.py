"""python agents.py [NAME ...]   # hyperparameters of every offline RL algorithm, or of those named

    agent = td3_bc(alpha=1.0)           # or make_agent("td3_bc", alpha=1.0)
    state = agent.init(key, obs_dim, act_dim)
    state, metrics = agent.update(key, state, batch)

Each algorithm is an Agent: a NamedTuple of pure functions, written for one seed. Use vmap to add a
seed axis. Observations are standardised and actions scaled to [-1, 1].

A batch is a pytree, such as a NamedTuple, with these fields:

    obs (B, O), action (B, A), reward (B,), next_obs (B, O)
    done (B,)            1 at a true terminal, 0 elsewhere and at a time-out; in batches of n steps
                         1 - gamma^(n - 1), so that gamma (1 - done) discounts the next value
    next_action (B, A)   read by rebrac only: NaN if unknown; meaningless if done
"""

import inspect
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class Agent(NamedTuple):
    """An algorithm as pure functions of its state, a pytree.

    For a deterministic policy, log_prob is the unit Gaussian centred on its action. It serves the
    metrics and the clone of the log's policy; the guide uses act.
    """

    init: Callable  # (key, obs_dim, act_dim) -> state
    update: Callable  # (key, state, batch) -> (state, metrics)
    act: Callable  # (state, obs (..., O)) -> noise-free action (..., A), used in evaluation
    log_prob: Callable  # (state, obs (..., O), action (..., A)) -> (...)
    q_value: Callable | None = None  # (state, obs, action) -> (...); None without a critic
    sample: Callable | None = None  # (key, state, obs) -> action; None if deterministic
    batches_per_update: int = 1  # n: update takes n batches concatenated, B = n * batch_size
    gamma: Any = 0.99  # discount factor of update, with which a batch of n steps is made


# --- Build networks ---


def init_mlp(key: chex.PRNGKey, sizes: tuple[int, ...]) -> list[tuple[chex.Array, chex.Array]]:
    """sizes (I, ..., O) -> one (weights, bias) per layer.

    Weights and biases are uniform in +-1/sqrt(fan-in), PyTorch's default and so TD3+BC's.
    """
    layers = []
    for k, fan_in, fan_out in zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:]):
        kw, kb = jax.random.split(k)
        bound = fan_in**-0.5
        w = jax.random.uniform(kw, (fan_in, fan_out), minval=-bound, maxval=bound)
        layers.append((w, jax.random.uniform(kb, (fan_out,), minval=-bound, maxval=bound)))
    return layers


def mlp(layers: list, x: chex.Array, layer_norm: bool = False) -> chex.Array:
    """x (..., I) -> (..., O), with a ReLU after each hidden layer.

    Layer norm, if asked for, follows each ReLU. It has no scale and shift of its own: the next
    layer's weights and bias express both.
    """
    for w, b in layers[:-1]:
        x = jax.nn.relu(x @ w + b)
        x = jax.nn.standardize(x) if layer_norm else x
    w, b = layers[-1]
    return x @ w + b


def init_critics(key, num: int, obs_dim: int, act_dim: int, hidden: tuple[int, ...]):
    """num -> parameters of that many independent Q networks, stacked along a leading axis."""
    sizes = (obs_dim + act_dim, *hidden, 1)
    return jax.vmap(lambda k: init_mlp(k, sizes))(jax.random.split(key, num))


def critics(params, obs: chex.Array, action: chex.Array, layer_norm: bool = False) -> chex.Array:
    """obs (..., O), action (..., A) -> Q values of every ensemble member (num, ...)."""
    x = jnp.concatenate([obs, action], axis=-1)
    return jax.vmap(lambda layers: mlp(layers, x, layer_norm))(params)[..., 0]


def min_q(params, obs: chex.Array, action: chex.Array, layer_norm: bool = False) -> chex.Array:
    """obs (..., O), action (..., A) -> minimum Q value over the ensemble (...)."""
    return jnp.min(critics(params, obs, action, layer_norm), axis=0)


# --- Define losses and steps ---


def bellman_target(batch, gamma, next_v: chex.Array) -> chex.Array:
    """next_v (B,) -> r + gamma V(s') (B,), without the second term at a terminal."""
    return batch.reward + gamma * (1.0 - batch.done) * next_v


def bellman_loss(critic, target: chex.Array, batch, layer_norm: bool = False):
    """target (B,) -> squared error, averaged over the batch and summed over the ensemble."""
    q = critics(critic, batch.obs, batch.action, layer_norm)
    loss = jnp.sum(jnp.mean((q - target) ** 2, axis=-1))
    return loss, {"critic_loss": loss, "q": jnp.mean(q)}


def make_step(optimiser: optax.GradientTransformation, loss: Callable) -> Callable:
    """loss -> step(params, opt_state, ...) -> (params, opt_state, metrics), one gradient step.

    The loss maps (params, ...) to (scalar, metrics).
    """

    def step(params, opt_state, *args):
        grads, metrics = jax.grad(loss, has_aux=True)(params, *args)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    return step


def polyak(params, target, tau):
    """params, target -> tau * params + (1 - tau) * target."""
    return optax.incremental_update(params, target, tau)


# --- Parametrise Gaussian policies: a = tanh(mlp(s)) + exp(log_std) * noise ---


def gaussian_log_prob(x: chex.Array, mean: chex.Array, log_std: chex.Array) -> chex.Array:
    """x, mean (..., A), log_std (..., A) or (A,) -> log density of a diagonal Gaussian (...)."""
    z = (x - mean) * jnp.exp(-log_std)
    return jnp.sum(-0.5 * z**2 - log_std - 0.5 * jnp.log(2 * jnp.pi), axis=-1)


def clip_log_std(log_std: chex.Array) -> chex.Array:
    """log_std (..., A) -> (..., A) in [-5, 2], EDAC's bounds."""
    return jnp.clip(log_std, -5.0, 2.0)


def init_gaussian_actor(key, obs_dim: int, act_dim: int, hidden: tuple[int, ...]) -> dict:
    """obs_dim, act_dim -> parameters of the mean network, and log_std (A,) for every state."""
    return {"mean": init_mlp(key, (obs_dim, *hidden, act_dim)), "log_std": jnp.zeros(act_dim)}


def actor_mean(actor: dict, obs: chex.Array) -> chex.Array:
    """obs (..., O) -> mean action (..., A) in (-1, 1)."""
    return jnp.tanh(mlp(actor["mean"], obs))


def actor_log_prob(actor: dict, obs: chex.Array, action: chex.Array) -> chex.Array:
    """obs (..., O), action (..., A) -> log density (...) before actor_sample's clip."""
    return gaussian_log_prob(action, actor_mean(actor, obs), clip_log_std(actor["log_std"]))


def actor_sample(key, actor: dict, obs: chex.Array) -> chex.Array:
    """obs (..., O) -> sampled actions (..., A), clipped to [-1, 1]."""
    mean = actor_mean(actor, obs)
    noise = jnp.exp(clip_log_std(actor["log_std"])) * jax.random.normal(key, mean.shape)
    return jnp.clip(mean + noise, -1.0, 1.0)


def gaussian_agent(init: Callable, update: Callable, gamma: Any = 0.99, q_value=None) -> Agent:
    """init, update, ... -> an Agent whose policy is the Gaussian actor in state.actor."""
    return Agent(
        init,
        update,
        act=lambda state, obs: actor_mean(state.actor, obs),
        log_prob=lambda state, obs, action: actor_log_prob(state.actor, obs, action),
        q_value=q_value,
        sample=lambda key, state, obs: actor_sample(key, state.actor, obs),
        gamma=gamma,
    )


# --- Parametrise tanh-Gaussian policies: a = tanh(u), u ~ N(mean(s), std(s)) ---


def tanh_gaussian(actor: list, obs: chex.Array) -> tuple[chex.Array, chex.Array]:
    """obs (..., O) -> mean (..., A) and log standard deviation (..., A) of u."""
    mean, log_std = jnp.split(mlp(actor, obs), 2, axis=-1)
    return mean, clip_log_std(log_std)


def tanh_log_prob(mean: chex.Array, log_std: chex.Array, u: chex.Array) -> chex.Array:
    """mean, log_std, u (..., A) -> log density of the action tanh(u) (...).

    SAC, arXiv 1812.05905, equation 26.
    """
    log_det = 2.0 * (jnp.log(2.0) - u - jax.nn.softplus(-2.0 * u))  # log(1 - tanh(u)^2), stable
    return gaussian_log_prob(u, mean, log_std) - jnp.sum(log_det, axis=-1)


def tanh_sample(key, actor: list, obs: chex.Array) -> tuple[chex.Array, chex.Array]:
    """obs (..., O) -> sampled actions (..., A) in (-1, 1) and their log densities (...)."""
    mean, log_std = tanh_gaussian(actor, obs)
    u = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    return jnp.tanh(u), tanh_log_prob(mean, log_std, u)


# --- BC ---


class BCState(NamedTuple):
    actor: dict
    opt_state: Any


def bc(
    lr: float = 3e-4,  # learning rate of Adam
    hidden: tuple[int, ...] = (256, 256),  # hidden layer widths
) -> Agent:
    """BC, behaviour cloning: maximum likelihood of the logged actions under a Gaussian policy."""
    optimiser = optax.adam(lr, eps=1e-5)

    def init(key, obs_dim, act_dim):
        actor = init_gaussian_actor(key, obs_dim, act_dim, hidden)
        return BCState(actor, optimiser.init(actor))

    def actor_loss(actor, batch):
        loss = -jnp.mean(actor_log_prob(actor, batch.obs, batch.action))
        return loss, {"actor_loss": loss}

    actor_step = make_step(optimiser, actor_loss)

    def update(key, state, batch):
        actor, opt_state, metrics = actor_step(state.actor, state.opt_state, batch)
        return BCState(actor, opt_state), metrics

    return gaussian_agent(init, update)


# --- TD3 ---


class TD3State(NamedTuple):
    actor: list
    actor_target: list
    actor_opt: Any
    critic: list
    critic_target: list
    critic_opt: Any


def td3(
    actor_loss: Callable,
    next_penalty: Callable | None,
    gamma: float,
    tau: float,
    policy_noise: float,
    noise_clip: float,
    critic_updates: int,
    lr: float,
    hidden: tuple[int, ...],
    layer_norm: bool = False,
) -> Agent:
    """TD3 (arXiv 1802.09477, algorithm 1) with a replaceable actor loss.

    actor_loss(critic, batch, action (B, A)) -> (scalar, metrics); the actor chose `action`.
    next_penalty(batch, next_action (B, A)) -> (B,), subtracted from the next state's value.

    One update makes `critic_updates` critic steps, each on its own batch. It then makes one actor
    step on the last of these batches and one Polyak step: a delayed policy update without a branch.
    """
    optimiser = optax.adam(lr, eps=1e-5)

    def pi(actor, obs):
        return jnp.tanh(mlp(actor, obs))

    def init(key, obs_dim, act_dim):
        key_actor, key_critic = jax.random.split(key)
        actor = init_mlp(key_actor, (obs_dim, *hidden, act_dim))
        critic = init_critics(key_critic, 2, obs_dim, act_dim, hidden)
        return TD3State(actor, actor, optimiser.init(actor), critic, critic, optimiser.init(critic))

    def critic_target(key, state, batch):
        noise = policy_noise * jax.random.normal(key, batch.action.shape)
        noise = jnp.clip(noise, -noise_clip, noise_clip)
        next_action = jnp.clip(pi(state.actor_target, batch.next_obs) + noise, -1.0, 1.0)
        next_v = min_q(state.critic_target, batch.next_obs, next_action, layer_norm)
        if next_penalty is not None:
            next_v = next_v - next_penalty(batch, next_action)
        return bellman_target(batch, gamma, next_v)

    def critic_loss(critic, target, batch):
        return bellman_loss(critic, target, batch, layer_norm)

    def loss_of_actor(actor, critic, batch):
        return actor_loss(critic, batch, pi(actor, batch.obs))

    critic_step = make_step(optimiser, critic_loss)
    actor_step = make_step(optimiser, loss_of_actor)

    def update(key, state, batch):
        # Target networks change only at the end, so one pass computes every target
        rows = (critic_target(key, state, batch), batch)
        split = jax.tree.map(lambda x: x.reshape(critic_updates, -1, *x.shape[1:]), rows)
        critic, critic_opt = state.critic, state.critic_opt
        for i in range(critic_updates):
            target, part = jax.tree.map(lambda x: x[i], split)
            critic, critic_opt, critic_metrics = critic_step(critic, critic_opt, target, part)
        actor, actor_opt, actor_metrics = actor_step(state.actor, state.actor_opt, critic, part)
        state = TD3State(
            actor,
            polyak(actor, state.actor_target, tau),
            actor_opt,
            critic,
            polyak(critic, state.critic_target, tau),
            critic_opt,
        )
        return state, critic_metrics | actor_metrics

    def log_prob(state, obs, action):
        mean = pi(state.actor, obs)
        return gaussian_log_prob(action, mean, jnp.zeros_like(mean))

    return Agent(
        init,
        update,
        act=lambda state, obs: pi(state.actor, obs),
        log_prob=log_prob,
        q_value=lambda state, obs, action: min_q(state.critic, obs, action, layer_norm),
        batches_per_update=critic_updates,
        gamma=gamma,
    )


# --- TD3+BC ---


def td3_bc(
    alpha: float = 2.5,  # weight of Q / mean |Q| against the cloning loss (2106.06860, Table 2)
    gamma: float = 0.99,  # discount factor
    tau: float = 0.005,  # Polyak averaging rate of the target networks
    policy_noise: float = 0.2,  # standard deviation of the target policy's noise (TD3)
    noise_clip: float = 0.5,  # clip on the target policy's noise (TD3)
    critic_updates: int = 2,  # critic updates per actor update (TD3's policy delay)
    lr: float = 3e-4,  # learning rate of Adam, all networks
    hidden: tuple[int, ...] = (256, 256),  # hidden layer widths
) -> Agent:
    """TD3+BC (arXiv 2106.06860, equation 5): TD3 with a cloning term in the actor's loss."""

    def actor_loss(critic, batch, action):
        first = jax.tree.map(lambda x: x[0], critic)  # TD3 maximises the first critic alone
        q = mlp(first, jnp.concatenate([batch.obs, action], axis=-1))[..., 0]
        lambda_ = alpha / jax.lax.stop_gradient(jnp.mean(jnp.abs(q)))
        bc_loss = jnp.mean((action - batch.action) ** 2)
        loss = -lambda_ * jnp.mean(q) + bc_loss
        return loss, {"actor_loss": loss, "bc_loss": bc_loss}

    return td3(actor_loss, None, gamma, tau, policy_noise, noise_clip, critic_updates, lr, hidden)


# --- ReBRAC ---


def rebrac(
    actor_bc: float = 0.01,  # beta_1: weight of cloning in the actor's loss (2305.09836)
    critic_bc: float = 0.01,  # beta_2: weight of cloning in the critics' target (2305.09836)
    gamma: float = 0.99,  # discount factor
    tau: float = 0.005,  # Polyak averaging rate of the target networks
    policy_noise: float = 0.2,  # standard deviation of the target policy's noise (TD3)
    noise_clip: float = 0.5,  # clip on the target policy's noise (TD3)
    critic_updates: int = 2,  # critic updates per actor update (TD3's policy delay)
    lr: float = 1e-3,  # learning rate of Adam (batch size 1024; Adroit: 3e-4 with batch size 256)
    hidden: tuple[int, ...] = (256, 256, 256),  # hidden layer widths; critics add layer norm
) -> Agent:
    """ReBRAC (arXiv 2305.09836, equations 2 and 3): TD3+BC with a cloning term for the critics too.

    Its networks are deeper, and its critics have layer norm. The critics' term is 0 for a
    transition with an unknown next action.
    """

    def next_penalty(batch, next_action):
        penalty = jnp.sum((next_action - batch.next_action) ** 2, axis=-1)
        return critic_bc * jnp.where(jnp.isnan(penalty), 0.0, penalty)

    def actor_loss(critic, batch, action):
        q = min_q(critic, batch.obs, action, layer_norm=True)
        lambda_ = 1.0 / jax.lax.stop_gradient(jnp.mean(jnp.abs(q)))
        bc_loss = jnp.mean(jnp.sum((action - batch.action) ** 2, axis=-1))
        loss = -lambda_ * jnp.mean(q) + actor_bc * bc_loss
        return loss, {"actor_loss": loss, "bc_loss": bc_loss}

    noise = policy_noise, noise_clip
    return td3(
        actor_loss, next_penalty, gamma, tau, *noise, critic_updates, lr, hidden, layer_norm=True
    )


# --- Clone actions by advantage ---


def weighted_cloning(actor, batch, advantage: chex.Array, scale, max_weight):
    """advantage (B,) -> -mean(min(exp(scale * advantage), max_weight) * log pi(a|s)), metrics."""
    weight = jnp.minimum(jnp.exp(scale * advantage), max_weight)
    loss = -jnp.mean(weight * actor_log_prob(actor, batch.obs, batch.action))
    return loss, {"actor_loss": loss, "advantage": jnp.mean(advantage)}


# --- IQL ---


class IQLState(NamedTuple):
    actor: dict
    actor_opt: Any
    value: list
    value_opt: Any
    critic: list
    critic_target: list
    critic_opt: Any


def iql(
    expectile: float = 0.7,  # expectile of Q fitted by V; 0.5 is the mean (2110.06169: 0.7, MuJoCo)
    beta: float = 3.0,  # inverse temperature: cloning weight is exp(beta * advantage) (2110.06169)
    max_weight: float = 100.0,  # upper clip on a transition's cloning weight
    gamma: float = 0.99,  # discount factor
    tau: float = 0.005,  # Polyak averaging rate of the target critics
    lr: float = 3e-4,  # learning rate of Adam, all networks
    hidden: tuple[int, ...] = (256, 256),  # hidden layer widths
) -> Agent:
    """IQL, implicit Q-learning (arXiv 2110.06169, equations 5 to 7).

    The value network fits an expectile of Q over logged actions. The policy clones these actions,
    weighted by advantage.
    """
    optimiser = optax.adam(lr, eps=1e-5)

    def init(key, obs_dim, act_dim):
        key_actor, key_value, key_critic = jax.random.split(key, 3)
        actor = init_gaussian_actor(key_actor, obs_dim, act_dim, hidden)
        value = init_mlp(key_value, (obs_dim, *hidden, 1))
        critic = init_critics(key_critic, 2, obs_dim, act_dim, hidden)
        opts = [optimiser.init(p) for p in (actor, value, critic)]
        return IQLState(actor, opts[0], value, opts[1], critic, critic, opts[2])

    def value_loss(value, q, batch):
        u = q - mlp(value, batch.obs)[..., 0]
        loss = jnp.mean(jnp.abs(expectile - (u < 0)) * u**2)  # equation 5
        return loss, {"value_loss": loss}

    def critic_loss(critic, value, batch):  # equation 6
        next_v = mlp(value, batch.next_obs)[..., 0]
        return bellman_loss(critic, bellman_target(batch, gamma, next_v), batch)

    def actor_loss(actor, advantage, batch):  # equation 7
        return weighted_cloning(actor, batch, advantage, beta, max_weight)

    value_step = make_step(optimiser, value_loss)
    critic_step = make_step(optimiser, critic_loss)
    actor_step = make_step(optimiser, actor_loss)

    def update(key, state, batch):
        q = min_q(state.critic_target, batch.obs, batch.action)
        value, value_opt, m_value = value_step(state.value, state.value_opt, q, batch)
        advantage = q - mlp(value, batch.obs)[..., 0]
        actor, actor_opt, m_actor = actor_step(state.actor, state.actor_opt, advantage, batch)
        critic, critic_opt, m_critic = critic_step(state.critic, state.critic_opt, value, batch)
        critic_target = polyak(critic, state.critic_target, tau)
        state = IQLState(actor, actor_opt, value, value_opt, critic, critic_target, critic_opt)
        return state, m_value | m_critic | m_actor

    return gaussian_agent(init, update, gamma, lambda state, *args: min_q(state.critic, *args))


# --- AWAC ---


class AWACState(NamedTuple):
    actor: dict
    actor_opt: Any
    critic: list
    critic_target: list
    critic_opt: Any


def awac(
    temperature: float = 1 / 3,  # lambda: cloning weight is exp(advantage / lambda) (CORL, MuJoCo)
    max_weight: float = 100.0,  # upper clip on a transition's cloning weight
    gamma: float = 0.99,  # discount factor
    tau: float = 0.005,  # Polyak averaging rate of the target critics
    lr: float = 3e-4,  # learning rate of Adam, all networks
    hidden: tuple[int, ...] = (256, 256),  # hidden layer widths
) -> Agent:
    """AWAC, advantage-weighted actor-critic (arXiv 2006.09359, equation 13).

    The critics evaluate the current policy. One sampled action per state estimates its value.
    """
    optimiser = optax.adam(lr, eps=1e-5)

    def init(key, obs_dim, act_dim):
        key_actor, key_critic = jax.random.split(key)
        actor = init_gaussian_actor(key_actor, obs_dim, act_dim, hidden)
        critic = init_critics(key_critic, 2, obs_dim, act_dim, hidden)
        return AWACState(actor, optimiser.init(actor), critic, critic, optimiser.init(critic))

    def actor_loss(actor, advantage, batch):
        return weighted_cloning(actor, batch, advantage, 1.0 / temperature, max_weight)

    critic_step = make_step(optimiser, bellman_loss)
    actor_step = make_step(optimiser, actor_loss)

    def update(key, state, batch):
        key_next, key_now = jax.random.split(key)
        next_action = actor_sample(key_next, state.actor, batch.next_obs)
        next_v = min_q(state.critic_target, batch.next_obs, next_action)
        target = bellman_target(batch, gamma, next_v)
        critic, critic_opt, m_critic = critic_step(state.critic, state.critic_opt, target, batch)

        v = min_q(critic, batch.obs, actor_sample(key_now, state.actor, batch.obs))
        advantage = min_q(critic, batch.obs, batch.action) - v
        actor, actor_opt, m_actor = actor_step(state.actor, state.actor_opt, advantage, batch)
        critic_target = polyak(critic, state.critic_target, tau)
        return AWACState(actor, actor_opt, critic, critic_target, critic_opt), m_critic | m_actor

    return gaussian_agent(init, update, gamma, lambda state, *args: min_q(state.critic, *args))


# --- SAC ---


class SACState(NamedTuple):
    actor: list
    actor_opt: Any
    critic: list
    critic_target: list
    critic_opt: Any
    log_alpha: chex.Array  # () log of the temperature, the weight of the entropy
    alpha_opt: Any


def sac(
    num_critics: int,
    penalty: Callable | None,
    gamma: float,
    tau: float,
    lr: float,
    actor_lr: float,
    hidden: tuple[int, ...],
    soft_target: bool = True,
) -> Agent:
    """SAC (arXiv 1812.05905) with an ensemble of critics, a tuned temperature and a critic penalty.

    penalty(key, critic, actor, batch) -> (scalar, metrics), added to the critics' loss.
    soft_target: include the entropy in the next state's value.
    """
    optimiser, actor_optimiser = optax.adam(lr), optax.adam(actor_lr)

    def init(key, obs_dim, act_dim):
        key_actor, key_critic = jax.random.split(key)
        actor = init_mlp(key_actor, (obs_dim, *hidden, 2 * act_dim))
        critic = init_critics(key_critic, num_critics, obs_dim, act_dim, hidden)
        log_alpha = jnp.zeros(())
        opts = actor_optimiser.init(actor), optimiser.init(critic), actor_optimiser.init(log_alpha)
        return SACState(actor, opts[0], critic, critic, opts[1], log_alpha, opts[2])

    def critic_loss(critic, key, target, actor, batch):
        loss, metrics = bellman_loss(critic, target, batch)
        if penalty is None:
            return loss, metrics
        added, penalty_metrics = penalty(key, critic, actor, batch)
        return loss + added, metrics | penalty_metrics

    def actor_loss(actor, key, critic, alpha, batch):
        action, log_pi = tanh_sample(key, actor, batch.obs)
        loss = jnp.mean(alpha * log_pi - min_q(critic, batch.obs, action))
        return loss, {"actor_loss": loss, "entropy": -jnp.mean(log_pi)}

    def alpha_loss(log_alpha, entropy, target_entropy):
        return log_alpha * (entropy - target_entropy), {"alpha": jnp.exp(log_alpha)}

    critic_step = make_step(optimiser, critic_loss)
    actor_step = make_step(actor_optimiser, actor_loss)
    alpha_step = make_step(actor_optimiser, alpha_loss)

    def update(key, state, batch):
        key_critic, key_actor, key_penalty = jax.random.split(key, 3)
        alpha = jnp.exp(state.log_alpha)
        next_action, log_pi = tanh_sample(key_critic, state.actor, batch.next_obs)
        next_v = min_q(state.critic_target, batch.next_obs, next_action)
        target = bellman_target(batch, gamma, next_v - alpha * log_pi if soft_target else next_v)
        critic, critic_opt, m_critic = critic_step(
            state.critic, state.critic_opt, key_penalty, target, state.actor, batch
        )
        actor, actor_opt, m_actor = actor_step(
            state.actor, state.actor_opt, key_actor, critic, alpha, batch
        )
        target_entropy = -float(batch.action.shape[-1])  # -A, SAC's choice
        log_alpha, alpha_opt, m_alpha = alpha_step(
            state.log_alpha, state.alpha_opt, m_actor["entropy"], target_entropy
        )
        critic_target = polyak(critic, state.critic_target, tau)
        state = SACState(actor, actor_opt, critic, critic_target, critic_opt, log_alpha, alpha_opt)
        return state, m_critic | m_actor | m_alpha

    def log_prob(state, obs, action):
        u = jnp.arctanh(jnp.clip(action, -0.999, 0.999))  # logged actions may be exactly +-1
        return tanh_log_prob(*tanh_gaussian(state.actor, obs), u)

    return Agent(
        init,
        update,
        act=lambda state, obs: jnp.tanh(tanh_gaussian(state.actor, obs)[0]),
        log_prob=log_prob,
        q_value=lambda state, obs, action: min_q(state.critic, obs, action),
        sample=lambda key, state, obs: tanh_sample(key, state.actor, obs)[0],
        gamma=gamma,
    )


# --- SAC-N ---


def sac_n(
    num_critics: int = 10,  # ensemble size N (2110.01548: 10 on halfcheetah, up to 500 on hopper)
    gamma: float = 0.99,  # discount factor
    tau: float = 0.005,  # Polyak averaging rate of the target critics
    lr: float = 3e-4,  # learning rate of Adam, all networks
    hidden: tuple[int, ...] = (256, 256, 256),  # hidden layer widths (2110.01548)
) -> Agent:
    """SAC-N (arXiv 2110.01548, section 3): SAC with the minimum of N critics for pessimism.

    N = 2 is plain SAC, which can also train online.
    """
    return sac(num_critics, None, gamma, tau, lr, lr, hidden)


# --- EDAC ---


def edac(
    num_critics: int = 10,  # ensemble size N (2110.01548)
    diversity: float = 1.0,  # eta: weight of the penalty on aligned critic gradients (2110.01548)
    gamma: float = 0.99,  # discount factor
    tau: float = 0.005,  # Polyak averaging rate of the target critics
    lr: float = 3e-4,  # learning rate of Adam, all networks
    hidden: tuple[int, ...] = (256, 256, 256),  # hidden layer widths (2110.01548)
) -> Agent:
    """EDAC (arXiv 2110.01548, section 4): SAC-N with diverse critics, so that a smaller N suffices.

    A penalty on cosine similarity keeps the critics' gradients along the action from aligning.
    """

    def penalty(key, critic, actor, batch):
        def slope(layers):  # -> (B, A); the sum over B is safe, as each Q has an action of its own
            q = lambda action: mlp(layers, jnp.concatenate([batch.obs, action], axis=-1))
            return jax.grad(lambda action: jnp.sum(q(action)))(batch.action)

        g = jax.vmap(slope)(critic)  # (N, B, A)
        norm_sq = jnp.sum(g**2, axis=-1, keepdims=True)
        g = g * jax.lax.rsqrt(jnp.maximum(norm_sq, 1e-12))
        # Sum of g_i . g_j over pairs i != j: the sum over all pairs minus the terms i = j
        pairs = jnp.sum(jnp.sum(g, axis=0) ** 2, axis=-1) - jnp.sum(g**2, axis=(0, -1))
        alike = jnp.mean(pairs) / (num_critics - 1)
        return diversity * alike, {"alike": alike}

    return sac(num_critics, penalty, gamma, tau, lr, lr, hidden)


# --- CQL ---


def cql(
    conservatism: float = 10.0,  # alpha: weight of the CQL penalty (CORL: 10; 2006.04779: 5)
    num_actions: int = 10,  # actions per state and proposal, in the log-sum-exp (2006.04779)
    gamma: float = 0.99,  # discount factor
    tau: float = 0.005,  # Polyak averaging rate of the target critics
    lr: float = 3e-4,  # learning rate of Adam, critics (2006.04779, Appendix F)
    actor_lr: float = 3e-5,  # learning rate of Adam, actor and temperature (CORL)
    hidden: tuple[int, ...] = (256, 256, 256),  # hidden layer widths (CORL)
) -> Agent:
    """CQL(H) (arXiv 2006.04779, equation 4): SAC with Q pushed down everywhere and up on the log.

    Importance sampling estimates the log-sum-exp of Q over all actions (Appendix F). Its three
    proposals are uniform actions and the policy's actions at the state and at the next state.
    """

    def penalty(key, critic, actor, batch):
        key_random, key_now, key_next = jax.random.split(key, 3)
        shape = num_actions, *batch.action.shape
        repeat = lambda obs: jnp.broadcast_to(obs, (num_actions, *obs.shape))
        uniform = jax.random.uniform(key_random, shape, minval=-1.0)
        now, log_now = tanh_sample(key_now, actor, repeat(batch.obs))
        next_, log_next = tanh_sample(key_next, actor, repeat(batch.next_obs))
        log_uniform = jnp.full(shape[:-1], shape[-1] * jnp.log(0.5))
        action = jnp.concatenate([uniform, now, next_])  # (3 * num_actions, B, A)
        log_density = jnp.concatenate([log_uniform, log_now, log_next])
        obs = jnp.broadcast_to(batch.obs, (*action.shape[:-1], batch.obs.shape[-1]))
        soft_max = jax.nn.logsumexp(critics(critic, obs, action) - log_density, axis=1)  # (2, B)
        gap = soft_max - critics(critic, batch.obs, batch.action)
        gap = jnp.sum(jnp.mean(gap, axis=-1))
        return conservatism * gap, {"gap": gap}

    return sac(2, penalty, gamma, tau, lr, actor_lr, hidden, soft_target=False)


# --- List agents and published settings ---

AGENTS = {f.__name__: f for f in (bc, td3_bc, iql, rebrac, sac_n, edac, cql, awac)}

REBRAC = {  # data set -> (actor_bc, critic_bc) (2305.09836, Appendix)
    "halfcheetah-random": (0.001, 0.1),
    "halfcheetah-medium": (0.001, 0.01),
    "halfcheetah-expert": (0.01, 0.01),
    "halfcheetah-medium-expert": (0.01, 0.1),
    "halfcheetah-medium-replay": (0.01, 0.001),
    "halfcheetah-full-replay": (0.001, 0.1),
    "hopper-random": (0.001, 0.01),
    "hopper-medium": (0.01, 0.001),
    "hopper-expert": (0.1, 0.001),
    "hopper-medium-expert": (0.1, 0.01),
    "hopper-medium-replay": (0.05, 0.5),
    "hopper-full-replay": (0.01, 0.01),
    "walker2d-random": (0.01, 0.0),
    "walker2d-medium": (0.05, 0.1),
    "walker2d-expert": (0.01, 0.5),
    "walker2d-medium-expert": (0.01, 0.01),
    "walker2d-medium-replay": (0.05, 0.01),
    "walker2d-full-replay": (0.01, 0.01),
    "pen-human": (0.1, 0.5),
    "pen-cloned": (0.05, 0.5),
    "pen-expert": (0.01, 0.01),
    "door-human": (0.1, 0.1),
    "door-cloned": (0.01, 0.1),
    "door-expert": (0.05, 0.01),
    "hammer-human": (0.01, 0.5),
    "hammer-cloned": (0.1, 0.5),
    "hammer-expert": (0.01, 0.01),
    "relocate-human": (0.1, 0.01),
    "relocate-cloned": (0.1, 0.01),
    "relocate-expert": (0.05, 0.01),
}
EDAC = {  # data set -> (num_critics, diversity) (2110.01548, Appendix)
    "halfcheetah-medium": (10, 1.0),
    "halfcheetah-medium-replay": (10, 1.0),
    "halfcheetah-medium-expert": (10, 5.0),
    "hopper-medium": (50, 1.0),
    "hopper-medium-replay": (50, 1.0),
    "hopper-medium-expert": (50, 1.0),
    "walker2d-medium": (10, 1.0),
    "walker2d-medium-replay": (10, 1.0),
    "walker2d-medium-expert": (10, 5.0),
}
ADROIT = ("pen", "door", "hammer", "relocate")  # tasks on which ReBRAC uses a learning rate of 3e-4


# --- Look up settings and agents ---


class Hyperparameter(NamedTuple):
    """One keyword argument of an algorithm."""

    type: Any
    default: Any
    help: str


def hyperparameters(name: str, task: str = "") -> dict[str, Hyperparameter]:
    """Agent name, data set -> {keyword: Hyperparameter}.

    The defaults are the paper's values for the data set if it lists any. An unknown agent raises
    ValueError with the known names.
    """
    if name not in AGENTS:
        raise ValueError(f"there is no agent {name!r}; choose one of {', '.join(AGENTS)}")
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(AGENTS[name]), re.M))
    known = {
        p.name: Hyperparameter(p.annotation, p.default, helps[p.name])
        for p in inspect.signature(AGENTS[name]).parameters.values()
    }
    task = re.sub(r"-v\d+$", "", task)
    special: dict[str, Any] = {}
    if name == "rebrac" and task in REBRAC:
        special = dict(zip(("actor_bc", "critic_bc"), REBRAC[task]))
        special |= {"lr": 3e-4} if task.startswith(ADROIT) else {}
    if name == "edac" and task in EDAC:
        special = dict(zip(("num_critics", "diversity"), EDAC[task]))
    return known | {key: known[key]._replace(default=value) for key, value in special.items()}


def check_settings(name: str, settings: dict[str, Any]) -> None:
    """Raise a one-line ValueError for a setting that the agent lacks or a value that cannot work.

    Traced values, those of a sweep, pass unchecked.
    """
    known = hyperparameters(name)
    if unknown := set(settings) - set(known):
        raise ValueError(f"{name} has no setting {sorted(unknown)}; it has {', '.join(known)}")
    above_0 = "lr", "actor_lr", "tau", "temperature", "max_weight"
    for key, value in settings.items():
        is_list = known[key].type not in (float, int)  # hidden: a tuple of widths
        if is_list and not isinstance(value, tuple | list):
            raise ValueError(f"{name}'s {key} cannot be {value!r}")
        if is_list and not value:
            raise ValueError(f"{name}'s {key} must not be empty")
        number = int | float if known[key].type is float else int
        low = 0 if known[key].type is float else 2 if (name, key) == ("edac", "num_critics") else 1
        high = 1 if key in ("gamma", "tau", "expectile") else math.inf
        for x in value if is_list else (value,):
            if isinstance(x, jax.core.Tracer):
                continue
            if not isinstance(x, jax.Array | number) or jnp.ndim(x):
                raise ValueError(f"{name}'s {key} cannot be {x!r}")
            if not (low <= x <= high and math.isfinite(x)) or (x == 0 and key in above_0):
                raise ValueError(f"{name}'s {key} cannot be {x}")


def make_agent(name: str, **settings) -> Agent:
    """Agent name, settings -> Agent, with published values for settings not given.

    Raises a one-line ValueError for an unknown agent or setting or a value that cannot work.
    """
    check_settings(name, settings)
    return AGENTS[name](**settings)


def main(names: list[str]) -> None:
    """Print the hyperparameters of the algorithms named, or of all."""
    if {"-h", "--help"} & set(names):
        print(__doc__)
        return
    for name in names or AGENTS:
        try:
            known = hyperparameters(name)
        except ValueError as e:
            print(f"agents.py: {e}", file=sys.stderr)
            sys.exit(2)
        print(f"{name}: {inspect.cleandoc(AGENTS[name].__doc__).splitlines()[0]}")
        for key, (_, default, help_line) in known.items():
            print(f"  {key:<15} {default!s:<18} {help_line}")
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
