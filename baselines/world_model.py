"""The autoregressive baseline: an ensemble of Gaussian dynamics models under the current policy.

    python pgd.py --env halfcheetah-medium --synthetic world-model --rollout 5 --penalty 1

The recipe is PETS (arXiv 1805.12114) for the networks and their loss, MBPO (arXiv 1906.08253) for
bootstraps, elites, early stopping and short rollouts from logged states, and MOPO (arXiv
2005.13239) for the penalty. It is a pgd.Generator, as the diffusion model is, so that pgd.py trains
any agent on it. Observations are standardised.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import pgd


@dataclasses.dataclass(frozen=True)
class Config(pgd.Config):
    # --- World model ---
    members: int = 7  # number of Gaussian networks in the ensemble
    elites: int = 5  # number of members, the best on held-out transitions, that are used
    model_layers: int = 4  # hidden layers of each member
    model_hidden: int = 200  # width of each member's hidden layers
    model_steps: int = 40_000  # gradient steps of the ensemble at most
    model_chunk: int = 500  # gradient steps between two looks at the held-out error
    patience: int = 10  # looks without a 1 % better member after which training stops
    model_batch: int = 256  # transitions in each member's gradient step
    model_lr: float = 1e-3  # learning rate of the ensemble
    model_decay: float = 2.5e-5  # weight decay of the ensemble
    rollout: int = 5  # steps of a rollout from a logged state
    penalty: float = 0.0  # reward penalty per unit of the largest predicted std (MOPO)


class Prediction(NamedTuple):
    """The Gaussians of the E elites."""

    next_obs: chex.Array  # (E, ..., O) means, standardised
    reward: chex.Array  # (E, ...) means, as logged
    obs_std: chex.Array  # (E, ..., O)
    reward_std: chex.Array  # (E, ...)
    done: chex.Array  # (E, ...) probability of a terminal


class WorldModelState(NamedTuple):
    params: dict  # of all members (M, ...)
    opt_state: Any
    best: dict  # (M, ...) parameters of each member's best look at the held-out transitions
    best_error: chex.Array  # (M,) mean squared error at the best look
    stale: chex.Array  # () looks since a member improved
    step: chex.Array  # () int32


# --- One member: a multi-layer perceptron with a mean and a bounded log-variance per output ---


def init_member(key, num_in: int, num_out: int, hidden: int, layers: int) -> dict:
    """-> parameters of one member with num_out Gaussian outputs and the logit of a terminal."""
    sizes = [num_in] + [hidden] * layers + [2 * num_out + 1]
    normal = lambda k, i, o: jax.random.truncated_normal(k, -2, 2, (i, o)) / (2 * i**0.5)  # PETS
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        "layers": [(normal(k, i, o), jnp.zeros(o)) for k, i, o in zip(keys, sizes, sizes[1:])],
        "max_log_var": jnp.full(num_out, 0.5, jnp.float32),
        "min_log_var": jnp.full(num_out, -10.0, jnp.float32),
    }


def apply_member(params: dict, x: chex.Array):
    """x (B, I) -> mean (B, K), softly bounded log variance (B, K), logit of a terminal (B,)."""
    for w, b in params["layers"][:-1]:
        x = jax.nn.swish(x @ w + b)
    w, b = params["layers"][-1]
    out = x @ w + b
    num = params["max_log_var"].shape[-1]
    mean, log_var, logit = out[..., :num], out[..., num : 2 * num], out[..., -1]
    log_var = params["max_log_var"] - jax.nn.softplus(params["max_log_var"] - log_var)
    log_var = params["min_log_var"] + jax.nn.softplus(log_var - params["min_log_var"])
    return mean, log_var, logit


def member_loss(params: dict, x, target, done, has_terminals) -> chex.Array:
    """x (B, I), target (B, K), done (B,) -> loss (): negative log-likelihood (PETS equation 1, but
    for constants), penalty on the bounds (PETS appendix A.1) and cross-entropy of done.

    The observation after a terminal is unknown: there only the reward, the last of the K, counts.
    """
    mean, log_var, logit = apply_member(params, x)
    nll = (mean - target) ** 2 * jnp.exp(-log_var) + log_var
    known = jnp.ones_like(nll).at[:, :-1].set((1.0 - done)[:, None])
    bounds = 0.01 * jnp.sum(params["max_log_var"] - params["min_log_var"])
    terminal = jnp.mean(optax.sigmoid_binary_cross_entropy(logit, done))
    return jnp.mean(nll * known) + bounds + has_terminals * terminal


# --- Targets: the standardised change of the observation, and the reward ---


def target_scale(dataset) -> tuple[chex.Array, chex.Array]:
    """-> mean (K,), std (K,) of the targets over 10,000 training transitions."""
    rows = jax.random.choice(jax.random.key(0), dataset.train_rows, (10_000,))
    t = dataset.transitions(rows)
    keep = (1.0 - t.done)[:, None]
    change = t.next_obs - t.obs
    mean = jnp.sum(change * keep, 0) / jnp.maximum(jnp.sum(keep), 1.0)
    var = jnp.sum((change - mean) ** 2 * keep, 0) / jnp.maximum(jnp.sum(keep), 1.0)
    std = jnp.sqrt(jnp.maximum(var, 1e-12))  # a constant channel is predicted to stay constant
    return jnp.append(mean, dataset.mean[-2]), jnp.append(std, dataset.std[-2])


def member_inputs(t, scale):
    """Transition (B, ...) -> inputs (B, O + A), targets (B, K), done (B,)."""
    mean, std = scale
    target = jnp.concatenate([t.next_obs - t.obs, t.reward[..., None]], axis=-1)
    return jnp.concatenate([t.obs, t.action], axis=-1), (target - mean) / std, t.done


def bootstrap(key, i: chex.Array, num: int) -> chex.Array:
    """i (B,), each below num -> (B,): the i-th draws of a member's resample of the log, which is
    num draws with replacement and is never stored."""
    draw = lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, num)
    return jax.vmap(draw)(i)


# --- The ensemble: training ---


def make_optimiser(config: Config) -> optax.GradientTransformation:
    """Adam with decay of the weights, not of the biases."""
    weights = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    decay = optax.add_decayed_weights(config.model_decay, mask=weights)
    return optax.chain(decay, optax.adam(config.model_lr))


def init(key, dataset, config: Config) -> WorldModelState:
    """-> an ensemble that is not trained yet."""
    num_in, num_out = dataset.obs_dim + dataset.act_dim, dataset.obs_dim + 1
    make = lambda k: init_member(k, num_in, num_out, config.model_hidden, config.model_layers)
    params = jax.vmap(make)(jax.random.split(key, config.members))
    return WorldModelState(
        params=params,
        opt_state=jax.vmap(make_optimiser(config).init)(params),
        best=params,
        best_error=jnp.full(config.members, jnp.inf, jnp.float32),
        stale=jnp.zeros((), jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )


def held_out(dataset):
    """-> Transition (5000, ...): the same held-out transitions every time."""
    return dataset.transitions(jax.random.choice(jax.random.key(0), dataset.val_rows, (5_000,)))


def errors(params, dataset, scale) -> chex.Array:
    """-> (M,): each member's mean squared error on held-out transitions."""
    x, target, done = member_inputs(held_out(dataset), scale)
    mean = jax.vmap(lambda p: apply_member(p, x)[0])(params)
    known = jnp.ones_like(target).at[:, :-1].set((1.0 - done)[:, None])
    return jnp.mean((mean - target) ** 2 * known, axis=(1, 2))


def look(state: WorldModelState, go_on, dataset, scale) -> WorldModelState:
    """Keep each member's best parameters on the held-out transitions; go_on () bool."""
    error = errors(state.params, dataset, scale)
    better = go_on & (error < 0.99 * state.best_error)
    keep = lambda new, old: jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return state._replace(
        best=jax.tree.map(keep, state.params, state.best),
        best_error=jnp.where(better, error, state.best_error),
        stale=jnp.where(jnp.any(better), 0, state.stale + 1),
    )


def fit(key, state: WorldModelState, dataset, config: Config):
    """model_chunk gradient steps, fewer where training has stopped -> (state, metrics)."""
    key_bootstrap, key_steps = jax.random.split(key)
    scale, optimiser = target_scale(dataset), make_optimiser(config)
    num, members = dataset.train_rows.shape[0], jnp.arange(config.members)
    has_terminals = (dataset.mean[-1] > 0).astype(jnp.float32)

    def one_member(member, params, opt_state, step):
        key_batch = jax.random.fold_in(jax.random.fold_in(key_steps, step), member)
        i = jax.random.randint(key_batch, (config.model_batch,), 0, num)
        i = bootstrap(jax.random.fold_in(key_bootstrap, member), i, num)
        inputs = member_inputs(dataset.transitions(dataset.train_rows[i]), scale)
        loss, grads = jax.value_and_grad(member_loss)(params, *inputs, has_terminals)
        updates, opt_state = optimiser.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def step(carry):
        state, total = carry
        params, opt_state, loss = jax.vmap(one_member, in_axes=(0, 0, 0, None))(
            members, state.params, state.opt_state, state.step
        )
        state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
        return state, total + jnp.mean(loss)

    end, go_on = state.step + config.model_chunk, state.stale < config.patience
    state, total = jax.lax.while_loop(
        lambda carry: go_on & (carry[0].step < end), step, (state, jnp.zeros(()))
    )
    state = look(state, go_on, dataset, scale)
    return state, {"loss": jnp.mean(state.best_error), "nll": total / config.model_chunk}


# --- The ensemble: predictions and rollouts ---


def elites_of(state: WorldModelState, config: Config) -> dict:
    """-> parameters (E, ...) of the best members."""
    chosen = jnp.argsort(state.best_error)[: config.elites]
    return jax.tree.map(lambda x: x[chosen], state.best)


def predict_with(elites: dict, obs, action, dataset, scale) -> Prediction:
    """Elites' parameters, obs (..., O), action (..., A) -> Prediction (E, ...)."""
    x = jnp.concatenate([obs, action], axis=-1)
    mean, log_var, logit = jax.vmap(apply_member, in_axes=(0, None))(elites, x)
    mean, std = mean * scale[1] + scale[0], jnp.exp(0.5 * log_var) * scale[1]
    done = jax.nn.sigmoid(logit) * (dataset.mean[-1] > 0)
    return Prediction(obs + mean[..., :-1], mean[..., -1], std[..., :-1], std[..., -1], done)


def predict(state: WorldModelState, obs, action, dataset, config: Config) -> Prediction:
    """obs (..., O) standardised, action (..., A) in [-1, 1] -> Prediction (E, ...)."""
    return predict_with(elites_of(state, config), obs, action, dataset, target_scale(dataset))


def generate(key, state: WorldModelState, policy, weight, dataset, config: Config):
    """Rollouts under the policy from logged states, end to end -> Transition (S, ...).

    A random elite predicts each step. After a terminal, the next step starts at a logged state.
    The reward is less config.penalty times the largest norm of an elite's predicted standard
    deviations, in units of the log's (MOPO). weight, the strength of guidance, has no effect.
    """
    num = config.horizon * config.sample_batch // config.rollout  # rollouts at once
    elites, scale = elites_of(state, config), target_scale(dataset)

    def start(key):
        rows = jax.random.randint(key, (num,), 0, dataset.usable.shape[0])
        return dataset.steps[dataset.usable[rows], : dataset.obs_dim]

    def step(obs, key):
        key_action, key_elite, key_obs, key_reward, key_start = jax.random.split(key, 5)
        action = jnp.clip(policy.sample(key_action, obs), -1.0, 1.0)
        p = predict_with(elites, obs, action, dataset, scale)
        elite = jax.random.randint(key_elite, (num,), 0, config.elites), jnp.arange(num)
        next_obs = p.next_obs[elite] + p.obs_std[elite] * jax.random.normal(key_obs, obs.shape)
        reward = p.reward[elite] + p.reward_std[elite] * jax.random.normal(key_reward, (num,))
        std = jnp.concatenate([p.obs_std, p.reward_std[..., None]], -1)
        std = std.at[..., -1].divide(dataset.std[-2])
        penalty = config.penalty * jnp.max(jnp.linalg.norm(std, axis=-1), axis=0)
        done = (p.done[elite] > 0.5).astype(jnp.float32)
        row = pgd.Transition(obs, action, reward - penalty, done, next_obs)
        return jnp.where(done[:, None] > 0, start(key_start), next_obs), row

    def rollouts(key):
        key_start, key_steps = jax.random.split(key)
        keys = jax.random.split(key_steps, config.rollout + 1)
        t = jax.lax.scan(step, start(key_start), keys[:-1])[1]  # (rollout, num, ...)
        follow = jnp.concatenate([t.obs[1:], t.next_obs[-1:]])  # equal to the last bit
        next_obs = jnp.where(t.done[..., None] > 0, t.next_obs, follow)
        last = jnp.clip(policy.sample(keys[-1], next_obs[-1]), -1.0, 1.0)
        next_action = jnp.concatenate([t.action[1:], last[None]])
        t = t._replace(next_obs=next_obs, next_action=next_action)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), t)  # (num, rollout, ...)

    keys = jax.random.split(key, config.trajectories // config.sample_batch)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), jax.lax.map(rollouts, keys))


def score(state: WorldModelState, dataset, config: Config) -> dict:
    """One-step predictions of held-out transitions -> measures per observation (O,).

    error: mean squared error of the elites' mean, in the log's variances. r2: R^2 of the change,
    NaN where an observation never changes. within_n_sigma: share of the targets within n of an
    elite's standard deviations.
    """
    t = held_out(dataset)
    p = predict(state, t.obs, t.action, dataset, config)
    keep = (1.0 - t.done)[:, None]
    over = lambda x: jnp.sum(x * keep, axis=-2) / jnp.maximum(jnp.sum(keep), 1.0)
    error, change = over((jnp.mean(p.next_obs, 0) - t.next_obs) ** 2), t.next_obs - t.obs
    spread = over((change - over(change)) ** 2)
    z = jnp.abs(p.next_obs - t.next_obs) / p.obs_std
    inside = lambda n: jnp.mean(over((z < n).astype(jnp.float32)), axis=0)
    r2 = jnp.where(spread > 1e-10, 1.0 - error / jnp.maximum(spread, 1e-10), jnp.nan)
    return {"error": error, "r2": r2, "within_1_sigma": inside(1), "within_2_sigma": inside(2)}


def validate(state: WorldModelState, dataset, config: Config) -> dict:
    """Means of score() over the observations; of R^2, the median over those that change."""
    s = score(state, dataset, config)
    return {
        "validation_error": jnp.mean(s["error"]),
        "validation_r2": jnp.nanmedian(s["r2"]),
        "within_1_sigma": jnp.mean(s["within_1_sigma"]),
        "within_2_sigma": jnp.mean(s["within_2_sigma"]),
    }


def make_world_model(config: Config) -> pgd.Generator:
    """The ensemble as a Generator. config.horizon times config.trajectories transitions are made in
    each round, rounded down to whole rollouts, config.horizon times config.sample_batch at once."""
    return pgd.Generator(
        init=functools.partial(init, config=config),
        fit=functools.partial(fit, config=config),
        generate=functools.partial(generate, config=config),
        validate=functools.partial(validate, config=config),
        num_chunks=-(-config.model_steps // config.model_chunk),
        length=config.rollout,
    )
