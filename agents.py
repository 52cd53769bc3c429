"""Offline reinforcement-learning algorithms, each an Agent: a NamedTuple of pure functions.

    agent = make_agent("td3_bc")
    state = agent.init(key, obs_dim, act_dim)
    state, metrics = agent.update(key, state, batch)

Everything is written for one seed; vmap adds the seed axis. Observations arrive standardised and
actions scaled to [-1, 1]. A batch is any object with fields obs (B, O), action (B, A), reward (B,),
next_obs (B, O) and done (B,), done being 1 only at a true terminal.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class Agent(NamedTuple):
    """The contract between an algorithm and everything else.

    A deterministic actor's log_prob is the unit Gaussian round its action, so that nothing
    downstream asks which agent it is.
    """

    init: Callable  # (key, obs_dim, act_dim) -> state
    update: Callable  # (key, state, batch) -> (state, metrics)
    act: Callable  # (state, obs (..., O)) -> action (..., A), the action used in evaluation
    log_prob: Callable  # (state, obs (..., O), action (..., A)) -> (...)
    q_value: Callable | None = None  # (state, obs, action) -> (...), where there is a critic
    sample: Callable | None = None  # (key, state, obs) -> action, where the policy is stochastic
    batches_per_update: int = 1  # update() wants this many batches, end to end: B = n * batch_size


# --- Networks: a multi-layer perceptron is a list of (weights, bias) ---


def init_mlp(key: chex.PRNGKey, sizes: tuple[int, ...]) -> list[tuple[chex.Array, chex.Array]]:
    """Layer sizes -> parameters; weights and biases uniform in +-1/sqrt(fan in), as TD3+BC uses."""
    layers = []
    for k, fan_in, fan_out in zip(jax.random.split(key, len(sizes) - 1), sizes[:-1], sizes[1:]):
        kw, kb = jax.random.split(k)
        bound = fan_in**-0.5
        w = jax.random.uniform(kw, (fan_in, fan_out), minval=-bound, maxval=bound)
        layers.append((w, jax.random.uniform(kb, (fan_out,), minval=-bound, maxval=bound)))
    return layers


def mlp(layers: list, x: chex.Array) -> chex.Array:
    """x (..., I) -> (..., O), with a ReLU between layers."""
    for w, b in layers[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = layers[-1]
    return x @ w + b


def init_critics(key, num: int, obs_dim: int, act_dim: int, hidden: tuple[int, ...]):
    """An ensemble of Q networks: the parameters of one, with a leading axis (num,)."""
    sizes = (obs_dim + act_dim, *hidden, 1)
    return jax.vmap(lambda k: init_mlp(k, sizes))(jax.random.split(key, num))


def critics(params, obs: chex.Array, action: chex.Array) -> chex.Array:
    """obs (..., O), action (..., A) -> Q values (num, ...)."""
    x = jnp.concatenate([obs, action], axis=-1)
    return jax.vmap(mlp, in_axes=(0, None))(params, x)[..., 0]


def gaussian_log_prob(x: chex.Array, mean: chex.Array, log_std: chex.Array) -> chex.Array:
    """x, mean (..., A) -> (...): log density of a diagonal Gaussian."""
    z = (x - mean) * jnp.exp(-log_std)
    return jnp.sum(-0.5 * z**2 - log_std - 0.5 * jnp.log(2 * jnp.pi), axis=-1)


# --- Optimisation ---


def make_step(optimiser: optax.GradientTransformation, loss: Callable) -> Callable:
    """loss(params, ...) -> (scalar, metrics) becomes step(params, opt_state, ...) ->
    (params, opt_state, metrics)."""

    def step(params, opt_state, *args):
        grads, metrics = jax.grad(loss, has_aux=True)(params, *args)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    return step


def polyak(params, target, tau: float):
    """target <- tau * params + (1 - tau) * target."""
    return optax.incremental_update(params, target, tau)


# --- Actors with a state-independent spread: a = tanh(mlp(s)) + exp(log_std) * noise ---


def init_gaussian_actor(key, obs_dim: int, act_dim: int, hidden: tuple[int, ...]) -> dict:
    """Parameters of the mean network and one log standard deviation per action."""
    return {"mean": init_mlp(key, (obs_dim, *hidden, act_dim)), "log_std": jnp.zeros(act_dim)}


def actor_mean(actor: dict, obs: chex.Array) -> chex.Array:
    """obs (..., O) -> (..., A) in (-1, 1)."""
    return jnp.tanh(mlp(actor["mean"], obs))


def actor_log_prob(actor: dict, obs: chex.Array, action: chex.Array) -> chex.Array:
    """obs (..., O), action (..., A) -> (...)."""
    log_std = jnp.clip(actor["log_std"], -5.0, 2.0)
    return gaussian_log_prob(action, actor_mean(actor, obs), log_std)


def actor_sample(key, actor: dict, obs: chex.Array) -> chex.Array:
    """obs (..., O) -> sampled actions (..., A), clipped to [-1, 1]."""
    mean = actor_mean(actor, obs)
    noise = jnp.exp(jnp.clip(actor["log_std"], -5.0, 2.0)) * jax.random.normal(key, mean.shape)
    return jnp.clip(mean + noise, -1.0, 1.0)


# --- Behaviour cloning ---


class BCState(NamedTuple):
    actor: dict
    opt_state: Any


def bc(lr: float = 3e-4, hidden: tuple[int, ...] = (256, 256)) -> Agent:
    """Behaviour cloning: maximum likelihood of the log's actions under a Gaussian policy."""
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

    return Agent(
        init,
        update,
        act=lambda state, obs: actor_mean(state.actor, obs),
        log_prob=lambda state, obs, action: actor_log_prob(state.actor, obs, action),
        sample=lambda key, state, obs: actor_sample(key, state.actor, obs),
    )


# --- TD3+BC: arXiv 2106.06860 ---


class TD3BCState(NamedTuple):
    actor: list
    actor_target: list
    actor_opt: Any
    critic: list
    critic_target: list
    critic_opt: Any


def td3_bc(
    alpha: float = 2.5,
    gamma: float = 0.99,
    tau: float = 0.005,
    policy_noise: float = 0.2,
    noise_clip: float = 0.5,
    critic_updates: int = 2,
    lr: float = 3e-4,
    hidden: tuple[int, ...] = (256, 256),
) -> Agent:
    """TD3+BC (arXiv 2106.06860, equation 5 and Table 2).

    One update is `critic_updates` critic updates, each on its own batch, then one actor update and
    one Polyak step on the last of them: TD3's delayed policy update without a branch.
    """
    optimiser = optax.adam(lr, eps=1e-5)

    def pi(actor, obs):
        return jnp.tanh(mlp(actor, obs))

    def init(key, obs_dim, act_dim):
        key_actor, key_critic = jax.random.split(key)
        actor = init_mlp(key_actor, (obs_dim, *hidden, act_dim))
        critic = init_critics(key_critic, 2, obs_dim, act_dim, hidden)
        return TD3BCState(
            actor, actor, optimiser.init(actor), critic, critic, optimiser.init(critic)
        )

    def critic_target(key, state, batch):
        noise = policy_noise * jax.random.normal(key, batch.action.shape)
        noise = jnp.clip(noise, -noise_clip, noise_clip)
        next_action = jnp.clip(pi(state.actor_target, batch.next_obs) + noise, -1.0, 1.0)
        next_q = jnp.min(critics(state.critic_target, batch.next_obs, next_action), axis=0)
        return batch.reward + gamma * (1.0 - batch.done) * next_q

    def critic_loss(critic, target, batch):
        q = critics(critic, batch.obs, batch.action)
        loss = jnp.sum(jnp.mean((q - target) ** 2, axis=-1))
        return loss, {"critic_loss": loss, "q": jnp.mean(q)}

    def actor_loss(actor, critic, batch):
        action = pi(actor, batch.obs)
        first = jax.tree.map(lambda x: x[0], critic)
        q = mlp(first, jnp.concatenate([batch.obs, action], axis=-1))[..., 0]
        lambda_ = alpha / jax.lax.stop_gradient(jnp.mean(jnp.abs(q)))
        bc_loss = jnp.mean((action - batch.action) ** 2)
        loss = -lambda_ * jnp.mean(q) + bc_loss
        return loss, {"actor_loss": loss, "bc_loss": bc_loss}

    critic_step = make_step(optimiser, critic_loss)
    actor_step = make_step(optimiser, actor_loss)

    def update(key, state, batch):
        # The target networks stand still meanwhile, so all targets are made at once
        rows = (critic_target(key, state, batch), batch)
        split = jax.tree.map(lambda x: x.reshape(critic_updates, -1, *x.shape[1:]), rows)
        critic, critic_opt = state.critic, state.critic_opt
        for i in range(critic_updates):
            target, part = jax.tree.map(lambda x: x[i], split)
            critic, critic_opt, critic_metrics = critic_step(critic, critic_opt, target, part)
        actor, actor_opt, actor_metrics = actor_step(state.actor, state.actor_opt, critic, part)
        state = TD3BCState(
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
        q_value=lambda state, obs, action: jnp.min(critics(state.critic, obs, action), axis=0),
        batches_per_update=critic_updates,
    )


# --- IQL: arXiv 2110.06169 ---


class IQLState(NamedTuple):
    actor: dict
    actor_opt: Any
    value: list
    value_opt: Any
    critic: list
    critic_target: list
    critic_opt: Any


def iql(
    expectile: float = 0.7,
    beta: float = 3.0,
    max_weight: float = 100.0,
    gamma: float = 0.99,
    tau: float = 0.005,
    lr: float = 3e-4,
    hidden: tuple[int, ...] = (256, 256),
) -> Agent:
    """Implicit Q-learning (arXiv 2110.06169, equations 5 to 7): expectile value, weighted
    cloning."""
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

    def critic_loss(critic, value, batch):
        target = batch.reward + gamma * (1.0 - batch.done) * mlp(value, batch.next_obs)[..., 0]
        q = critics(critic, batch.obs, batch.action)
        loss = jnp.sum(jnp.mean((q - target) ** 2, axis=-1))  # equation 6
        return loss, {"critic_loss": loss, "q": jnp.mean(q)}

    def actor_loss(actor, advantage, batch):
        weight = jnp.minimum(jnp.exp(beta * advantage), max_weight)
        loss = -jnp.mean(weight * actor_log_prob(actor, batch.obs, batch.action))  # equation 7
        return loss, {"actor_loss": loss, "advantage": jnp.mean(advantage)}

    value_step = make_step(optimiser, value_loss)
    critic_step = make_step(optimiser, critic_loss)
    actor_step = make_step(optimiser, actor_loss)

    def update(key, state, batch):
        q = jnp.min(critics(state.critic_target, batch.obs, batch.action), axis=0)
        value, value_opt, m_value = value_step(state.value, state.value_opt, q, batch)
        advantage = q - mlp(value, batch.obs)[..., 0]
        actor, actor_opt, m_actor = actor_step(state.actor, state.actor_opt, advantage, batch)
        critic, critic_opt, m_critic = critic_step(state.critic, state.critic_opt, value, batch)
        critic_target = polyak(critic, state.critic_target, tau)
        state = IQLState(actor, actor_opt, value, value_opt, critic, critic_target, critic_opt)
        return state, m_value | m_critic | m_actor

    return Agent(
        init,
        update,
        act=lambda state, obs: actor_mean(state.actor, obs),
        log_prob=lambda state, obs, action: actor_log_prob(state.actor, obs, action),
        q_value=lambda state, obs, action: jnp.min(critics(state.critic, obs, action), axis=0),
        sample=lambda key, state, obs: actor_sample(key, state.actor, obs),
    )


# --- SAC: arXiv 1812.05905; online, it trains the behaviour policies in policies/ ---


class SACState(NamedTuple):
    actor: list
    actor_opt: Any
    critic: list
    critic_target: list
    critic_opt: Any
    log_alpha: chex.Array
    alpha_opt: Any


def sac(
    gamma: float = 0.99,
    tau: float = 0.005,
    lr: float = 3e-4,
    hidden: tuple[int, ...] = (256, 256),
) -> Agent:
    """Soft actor-critic (arXiv 1812.05905) with two critics and an automatic temperature.

    It has no conservatism: meant for data that its own policy collects (data.py), not for a fixed
    log.
    """
    optimiser = optax.adam(lr)

    def init(key, obs_dim, act_dim):
        key_actor, key_critic = jax.random.split(key)
        actor = init_mlp(key_actor, (obs_dim, *hidden, 2 * act_dim))
        critic = init_critics(key_critic, 2, obs_dim, act_dim, hidden)
        log_alpha = jnp.zeros(())
        opts = [optimiser.init(p) for p in (actor, critic, log_alpha)]
        return SACState(actor, opts[0], critic, critic, opts[1], log_alpha, opts[2])

    def dist(actor, obs):
        mean, log_std = jnp.split(mlp(actor, obs), 2, axis=-1)
        return mean, jnp.clip(log_std, -5.0, 2.0)

    def squashed_log_prob(mean, log_std, u):
        # log density of tanh(u); log(1 - tanh(u)^2) in its stable form
        log_det = 2.0 * (jnp.log(2.0) - u - jax.nn.softplus(-2.0 * u))
        return gaussian_log_prob(u, mean, log_std) - jnp.sum(log_det, axis=-1)

    def sample_log_prob(key, actor, obs):
        mean, log_std = dist(actor, obs)
        u = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return jnp.tanh(u), squashed_log_prob(mean, log_std, u)

    def critic_loss(critic, key, state, batch):
        next_action, log_pi = sample_log_prob(key, state.actor, batch.next_obs)
        next_q = jnp.min(critics(state.critic_target, batch.next_obs, next_action), axis=0)
        next_v = next_q - jnp.exp(state.log_alpha) * log_pi
        target = batch.reward + gamma * (1.0 - batch.done) * next_v
        q = critics(critic, batch.obs, batch.action)
        loss = jnp.sum(jnp.mean((q - target) ** 2, axis=-1))
        return loss, {"critic_loss": loss, "q": jnp.mean(q)}

    def actor_loss(actor, key, critic, alpha, batch):
        action, log_pi = sample_log_prob(key, actor, batch.obs)
        q = jnp.min(critics(critic, batch.obs, action), axis=0)
        return jnp.mean(alpha * log_pi - q), {"entropy": -jnp.mean(log_pi)}

    def alpha_loss(log_alpha, entropy, target_entropy):
        return log_alpha * (entropy - target_entropy), {"alpha": jnp.exp(log_alpha)}

    critic_step = make_step(optimiser, critic_loss)
    actor_step = make_step(optimiser, actor_loss)
    alpha_step = make_step(optimiser, alpha_loss)

    def update(key, state, batch):
        key_critic, key_actor = jax.random.split(key)
        critic, critic_opt, m_critic = critic_step(
            state.critic, state.critic_opt, key_critic, state, batch
        )
        actor, actor_opt, m_actor = actor_step(
            state.actor, state.actor_opt, key_actor, critic, jnp.exp(state.log_alpha), batch
        )
        target_entropy = -float(batch.action.shape[-1])
        log_alpha, alpha_opt, m_alpha = alpha_step(
            state.log_alpha, state.alpha_opt, m_actor["entropy"], target_entropy
        )
        critic_target = polyak(critic, state.critic_target, tau)
        state = SACState(actor, actor_opt, critic, critic_target, critic_opt, log_alpha, alpha_opt)
        return state, m_critic | m_actor | m_alpha

    def log_prob(state, obs, action):
        u = jnp.arctanh(jnp.clip(action, -0.999, 0.999))
        return squashed_log_prob(*dist(state.actor, obs), u)

    return Agent(
        init,
        update,
        act=lambda state, obs: jnp.tanh(dist(state.actor, obs)[0]),
        log_prob=log_prob,
        q_value=lambda state, obs, action: jnp.min(critics(state.critic, obs, action), axis=0),
        sample=lambda key, state, obs: sample_log_prob(key, state.actor, obs)[0],
    )


# --- By name ---

AGENTS = {"bc": bc, "td3_bc": td3_bc, "iql": iql}  # the offline ones, for --agent


def make_agent(name: str, **settings) -> Agent:
    """The Agent called `name`, with its published settings unless others are given.

    Raises ValueError, naming what there is, for an unknown agent or setting.
    """
    if name not in AGENTS:
        raise ValueError(f"there is no agent {name!r}; choose one of {', '.join(AGENTS)}")
    known = inspect.signature(AGENTS[name]).parameters
    if unknown := set(settings) - set(known):
        raise ValueError(f"{name} has no setting {sorted(unknown)}; it has {', '.join(known)}")
    return AGENTS[name](**settings)
