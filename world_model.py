"""The autoregressive baseline: an ensemble of Gaussian dynamics models under the current policy.

    python pgd.py --env halfcheetah-medium --synthetic world-model --rollout 5 --penalty 1

The usual recipe: PETS (arXiv 1805.12114) for the networks and their loss, MBPO (arXiv 1906.08253)
for bootstraps, elites, early stopping and short rollouts from logged states, MOPO (arXiv
2005.13239) for the penalty. It stands behind the same contract as the diffusion model, so pgd.py
trains any agent on it alike. Observations are standardised, as everywhere on the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class WorldModel(NamedTuple):
    """pgd.Generator's fields, and the ensemble's own predictions."""

    init: Callable  # (key) -> state
    fit_chunk: Callable  # (key, state, dataset) -> (state, metrics)
    num_chunks: int  # calls of fit_chunk that make the whole fit; the last ones do nothing if early
    generate: Callable  # (key, state, policy, weight, dataset) -> Transition (S, ...)
    validate: Callable  # (state, dataset) -> metrics on the episodes held out
    length: int  # steps of a rollout; generate lays S / length of them end to end
    predict: Callable  # (state, obs (..., O), action (..., A), dataset) -> Prediction
    score: Callable  # (state, dataset) -> errors on the episodes held out, per observation


class Prediction(NamedTuple):
    """Every elite's Gaussian, elites first."""

    next_obs: chex.Array  # (E, ..., O) means, standardised
    reward: chex.Array  # (E, ...) means, as logged
    obs_std: chex.Array  # (E, ..., O)
    reward_std: chex.Array  # (E, ...)
    done: chex.Array  # (E, ...) probability of a terminal


class WorldModelState(NamedTuple):
    params: dict  # of all members (M, ...)
    opt_state: Any
    best: dict  # parameters at each member's best look at the held-out transitions (M, ...)
    best_error: chex.Array  # (M,) mean squared error there
    stale: chex.Array  # () looks since any member improved
    step: chex.Array  # () int32


# --- One member: a multi-layer perceptron with a mean and a bounded log-variance per output ---


def init_member(key, num_in: int, num_out: int, hidden: int, layers: int) -> dict:
    """Parameters of one member; num_out Gaussian outputs and the logit of a terminal."""
    sizes = [num_in] + [hidden] * layers + [2 * num_out + 1]
    normal = lambda k, i, o: jax.random.truncated_normal(k, -2, 2, (i, o)) / (2 * i**0.5)  # PETS
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        "layers": [(normal(k, i, o), jnp.zeros(o)) for k, i, o in zip(keys, sizes, sizes[1:])],
        "max_log_var": jnp.full(num_out, 0.5, jnp.float32),
        "min_log_var": jnp.full(num_out, -10.0, jnp.float32),
    }


def apply_member(params: dict, x: chex.Array):
    """x (B, I) -> mean (B, K), log variance (B, K) softly kept in its bounds, done logit (B,)."""
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
    """Negative log-likelihood of target (B, K) (PETS equation 1, up to constants), the penalty on
    the bounds (its appendix A.1), and cross-entropy of done (B,).

    What follows a terminal is unknown: there only the reward, the last of the K, counts.
    """
    mean, log_var, logit = apply_member(params, x)
    nll = (mean - target) ** 2 * jnp.exp(-log_var) + log_var
    known = jnp.ones_like(nll).at[:, :-1].set((1.0 - done)[:, None])
    bounds = 0.01 * jnp.sum(params["max_log_var"] - params["min_log_var"])
    terminal = jnp.mean(optax.sigmoid_binary_cross_entropy(logit, done))
    return jnp.mean(nll * known) + bounds + has_terminals * terminal


# --- Targets: the standardised change of the observation, and the reward ---


def target_scale(dataset) -> tuple[chex.Array, chex.Array]:
    """-> mean (K,), std (K,) of the targets over 10,000 transitions to train on."""
    rows = jax.random.choice(jax.random.key(0), dataset.train_rows, (10_000,))
    t = dataset.transitions(rows)
    keep = (1.0 - t.done)[:, None]
    change = t.next_obs - t.obs
    mean = jnp.sum(change * keep, 0) / jnp.maximum(jnp.sum(keep), 1.0)
    var = jnp.sum((change - mean) ** 2 * keep, 0) / jnp.maximum(jnp.sum(keep), 1.0)
    std = jnp.sqrt(jnp.maximum(var, 1e-12))  # what never changes is predicted not to
    reward = dataset.normalizer.mean[-2], dataset.normalizer.std[-2]
    return jnp.append(mean, reward[0]), jnp.append(std, reward[1])


def member_inputs(t, scale):
    """Transition (B, ...) -> inputs (B, O + A), targets (B, K), done (B,)."""
    mean, std = scale
    target = jnp.concatenate([t.next_obs - t.obs, t.reward[..., None]], axis=-1)
    return jnp.concatenate([t.obs, t.action], axis=-1), (target - mean) / std, t.done


def bootstrap(key, i: chex.Array, num: int) -> chex.Array:
    """i (B,), each below num -> (B,): the i-th draws of a member's own resample of the log, num
    draws with replacement, without storing it."""
    draw = lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, num)
    return jax.vmap(draw)(i)


# --- The ensemble as a Generator ---


def make_world_model(config, obs_dim: int, act_dim: int) -> WorldModel:
    """config: pgd.Config's group of the world model, and its horizon, trajectories and
    sample_batch, which say how many transitions `generate` makes, and how many at once."""
    num_out = obs_dim + 1
    weights = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)  # not the biases
    decay = optax.add_decayed_weights(config.model_decay, mask=weights)
    optimiser = optax.chain(decay, optax.adam(config.model_lr))

    def init(key):
        make = lambda k: init_member(
            k, obs_dim + act_dim, num_out, config.model_hidden, config.model_layers
        )
        params = jax.vmap(make)(jax.random.split(jax.random.split(key)[0], config.members))
        return WorldModelState(
            params=params,
            opt_state=jax.vmap(optimiser.init)(params),
            best=params,
            best_error=jnp.full(config.members, jnp.inf, jnp.float32),
            stale=jnp.zeros((), jnp.int32),
            step=jnp.zeros((), jnp.int32),
        )

    def held_out(dataset):
        """The same 5,000 transitions of held-out episodes every time."""
        rows = jax.random.choice(jax.random.key(0), dataset.val_rows, (5_000,))
        return dataset.transitions(rows)

    def errors(params, dataset, scale):
        """-> (M,): every member's mean squared error on held-out transitions."""
        x, target, done = member_inputs(held_out(dataset), scale)
        mean = jax.vmap(lambda p: apply_member(p, x)[0])(params)
        known = jnp.ones_like(target).at[:, :-1].set((1.0 - done)[:, None])
        return jnp.mean((mean - target) ** 2 * known, axis=(1, 2))

    def fit_chunk(key, state, dataset):
        key_bootstrap, key_steps = jax.random.split(jax.random.split(key)[1])
        scale = target_scale(dataset)
        num, members = dataset.train_rows.shape[0], jnp.arange(config.members)
        has_terminals = (dataset.normalizer.mean[-1] > 0).astype(jnp.float32)

        def one_member(member, params, opt_state, step):
            key_batch = jax.random.fold_in(jax.random.fold_in(key_steps, step), member)
            i = jax.random.randint(key_batch, (config.model_batch,), 0, num)
            i = bootstrap(jax.random.fold_in(key_bootstrap, member), i, num)
            batch = dataset.transitions(dataset.train_rows[i])
            inputs = member_inputs(batch, scale)
            loss, grads = jax.value_and_grad(member_loss)(params, *inputs, has_terminals)
            updates, opt_state = optimiser.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        def fit_step(carry):
            state, total = carry
            params, opt_state, loss = jax.vmap(one_member, in_axes=(0, 0, 0, None))(
                members, state.params, state.opt_state, state.step
            )
            state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
            return state, total + jnp.mean(loss)

        end = state.step + config.model_chunk
        go_on = state.stale < config.patience
        state, total = jax.lax.while_loop(
            lambda carry: go_on & (carry[0].step < end), fit_step, (state, jnp.zeros(()))
        )

        # Look at the held-out transitions: each member keeps its best parameters
        error = errors(state.params, dataset, scale)
        better = go_on & (error < 0.99 * state.best_error)
        keep = lambda new, old: jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        state = state._replace(
            best=jax.tree.map(keep, state.params, state.best),
            best_error=jnp.where(better, error, state.best_error),
            stale=jnp.where(jnp.any(better), 0, state.stale + 1),
        )
        return state, {"loss": jnp.mean(state.best_error), "nll": total / config.model_chunk}

    def elites(state):
        chosen = jnp.argsort(state.best_error)[: config.elites]
        return jax.tree.map(lambda x: x[chosen], state.best)

    def predict(state, obs, action, dataset):
        return predict_with(elites(state), obs, action, dataset, target_scale(dataset))

    def predict_with(members, obs, action, dataset, scale):
        x = jnp.concatenate([obs, action], axis=-1)
        mean, log_var, logit = jax.vmap(apply_member, in_axes=(0, None))(members, x)
        mean, std = mean * scale[1] + scale[0], jnp.exp(0.5 * log_var) * scale[1]
        done = jax.nn.sigmoid(logit) * (dataset.normalizer.mean[-1] > 0)
        return Prediction(obs + mean[..., :-1], mean[..., -1], std[..., :-1], std[..., -1], done)

    def generate(key, state, policy, guided, dataset):
        """Rollouts of config.rollout steps from logged states under the policy, by a random elite
        at every step; where one ends in a terminal, the next step starts at a logged state again.

        The reward is less config.penalty times the largest norm of an elite's predicted standard
        deviations, each in units of the log's (MOPO's estimator). `guided` is for the diffusion
        alone.
        """
        num = config.horizon * config.sample_batch // config.rollout  # at once
        members, scale = elites(state), target_scale(dataset)

        def start(key):
            rows = jax.random.randint(key, (num,), 0, dataset.usable.shape[0])
            return dataset.steps[dataset.usable[rows], :obs_dim]

        def step(obs, key):
            key_action, key_elite, key_obs, key_reward, key_start = jax.random.split(key, 5)
            action = jnp.clip(policy.sample(key_action, obs), -1.0, 1.0)
            p = predict_with(members, obs, action, dataset, scale)
            elite = jax.random.randint(key_elite, (num,), 0, config.elites), jnp.arange(num)
            next_obs = p.next_obs[elite] + p.obs_std[elite] * jax.random.normal(key_obs, obs.shape)
            reward = p.reward[elite] + p.reward_std[elite] * jax.random.normal(key_reward, (num,))
            std = jnp.concatenate([p.obs_std, p.reward_std[..., None]], -1)
            std = std.at[..., -1].divide(dataset.normalizer.std[-2])
            penalty = config.penalty * jnp.max(jnp.linalg.norm(std, axis=-1), axis=0)
            done = (p.done[elite] > 0.5).astype(jnp.float32)
            row = obs, action, reward - penalty, next_obs, done
            return jnp.where(done[:, None] > 0, start(key_start), next_obs), row

        def rollouts(key):
            key_start, key_steps = jax.random.split(key)
            keys = jax.random.split(key_steps, config.rollout + 1)
            rows = jax.lax.scan(step, start(key_start), keys[:-1])[1]
            obs, action, reward, next_obs, done = rows
            follow = jnp.concatenate([obs[1:], next_obs[-1:]])  # equal to the last bit, not nearly
            next_obs = jnp.where(done[..., None] > 0, next_obs, follow)
            last = jnp.clip(policy.sample(keys[-1], next_obs[-1]), -1.0, 1.0)
            next_action = jnp.concatenate([action[1:], last[None]])
            rows = obs, action, reward, next_obs, done, next_action
            return [jnp.moveaxis(x, 0, 1) for x in rows]  # (num, rollout, ...)

        keys = jax.random.split(key, config.trajectories // config.sample_batch)
        in_order = [x.reshape(-1, *x.shape[3:]) for x in jax.lax.map(rollouts, keys)]
        like = jax.eval_shape(dataset.transitions, jnp.zeros(1, jnp.int32))
        return type(like)(*in_order)

    def score(state, dataset):
        """One-step predictions of held-out transitions, per observation (O,): mean squared error of
        the elites' mean in the log's variances, R^2 of the change, and how often the target lies
        within 1 and 2 sigma of an elite's."""
        t = held_out(dataset)
        p = predict(state, t.obs, t.action, dataset)
        keep = (1.0 - t.done)[:, None]
        over = lambda x: jnp.sum(x * keep, axis=-2) / jnp.maximum(jnp.sum(keep), 1.0)
        error, change = over((jnp.mean(p.next_obs, 0) - t.next_obs) ** 2), t.next_obs - t.obs
        spread = over((change - over(change)) ** 2)
        z = jnp.abs(p.next_obs - t.next_obs) / p.obs_std
        inside = lambda n: jnp.mean(over((z < n).astype(jnp.float32)), axis=0)
        r2 = jnp.where(spread > 1e-10, 1.0 - error / jnp.maximum(spread, 1e-10), jnp.nan)
        return {"error": error, "r2": r2, "within_1_sigma": inside(1), "within_2_sigma": inside(2)}

    def validate(state, dataset):
        """The same over all observations: means, but the median R^2 of those that change."""
        s = score(state, dataset)
        return {
            "validation_error": jnp.mean(s["error"]),
            "validation_r2": jnp.nanmedian(s["r2"]),
            "within_1_sigma": jnp.mean(s["within_1_sigma"]),
            "within_2_sigma": jnp.mean(s["within_2_sigma"]),
        }

    num_chunks = config.model_steps // config.model_chunk
    return WorldModel(
        init, fit_chunk, num_chunks, generate, validate, config.rollout, predict, score
    )
