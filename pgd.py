"""Policy-guided diffusion for offline reinforcement learning (arXiv 2404.06356), in one file.

    python pgd.py --env halfcheetah-medium                  # the headline run
    python pgd.py --dataset-path FILE.hdf5                  # your own log, in D4RL's layout

A diffusion model of whole sub-trajectories learns a fixed log. While it samples, the current policy
pulls the sampled actions toward its own. The agent trains on these synthetic trajectories.

Copied alone into another project, this file needs jax, optax 0.2.7, chex and numpy:

    config = Config(horizon=16)
    dataset = make_dataset(log, config)          # log: a dict of D4RL's five arrays
    train = make_train(config, agent)            # agent: init, update, act, log_prob; gamma
    state, metrics = jax.jit(train)(key, dataset)
    jax.jit(jax.vmap(train, in_axes=(0, None)))(jax.random.split(key, 8), dataset)
"""

import dataclasses
import functools
import importlib.util
import signal
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports that follow quietly

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

# --- Config ---


@dataclasses.dataclass(frozen=True)
class Config:
    # --- Run ---
    dataset_path: str | None = None  # file with the log; see docs/logs.md for the formats
    agent: str = "td3_bc"  # algorithm: bc, td3_bc, iql, awac, rebrac, sac_n, edac or cql
    seed: int = 0  # first seed
    num_seeds: int = 1  # number of seeds: seed, seed + 1, ... in one program
    # --- Denoiser ---
    horizon: int = 4  # steps in a synthetic trajectory (T), at least 2
    validation: float = 0.05  # fraction of the episodes held out of the generator's training
    features: int = 64  # channels at the U-Net's first level; each further level doubles them
    levels: int = 1  # levels of the U-Net; with 1 it works at full length throughout
    blocks: int = 3  # residual blocks per level on the way down, and again on the way up
    kernel: int = 3  # width of a convolution, in time steps
    expansion: int = 4  # hidden width of a residual block, as a multiple of its channels
    groups: int = 8  # channel groups of the normalisation, which also runs over time
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # the denoiser's activations
    # --- Denoiser training ---
    fit_steps: int = 4_000  # gradient steps of the denoiser
    fit_chunk: int = 100  # gradient steps of the denoiser between two progress reports
    fit_batch: int = 256  # trajectories in each gradient step of the denoiser
    fit_lr: float = 5e-3  # peak learning rate: linear warm-up over a tenth, then a cosine to 0
    ema: float = 0.995  # decay per step of the averaged parameters, which the sampler uses
    p_mean: float = 0.6  # mean of ln sigma, the noise on actions, in training (EDM Table 1)
    p_std: float = 1.4  # standard deviation of ln sigma in training (EDM Table 1)
    obs_noise: float = 0.25  # noise on observations, as a fraction of that on actions
    # --- Sampler ---
    sampler: Literal["sde", "heun"] = "sde"  # sde: one call per level; heun: EDM Algorithm 2
    sample_steps: int = 16  # number of noise levels (N)
    sigma_min: float = 0.02  # lowest noise level before 0, of actions
    sigma_max: float = 40.0  # highest noise level, of actions
    rho: float = 15.0  # curvature of the noise schedule (EDM equation 5)
    eta: float = 2.0  # sde: noise re-injected per step; 1 is the reverse SDE, 0 the ODE
    s_churn: float = 80.0  # heun: noise added over all steps; 0 is the deterministic sampler
    s_tmin: float = 0.05  # heun: no churn below this noise level
    s_tmax: float = 50.0  # heun: no churn above this noise level
    s_noise: float = 1.003  # heun: inflation of the added noise
    # --- Guidance ---
    guidance: float = 64.0  # exponent of N(policy's action, 1); 4 suits iql and awac; 0: unguided
    value_guidance: float = 0.0  # weight of the critic's Q(s, a) / mean |Q| in the log-density
    behaviour_guidance: float = 0.0  # exponent by which a clone of the log's policy is divided out
    condition_on_start: bool = False  # generate trajectories from given first observations
    # --- Agent loop ---
    rounds: int = 40  # number of rounds: new synthetic data, then agent updates
    updates: int = 250  # agent updates per round
    batch_size: int = 256  # transitions in each batch of the agent
    real_batch: int = 16  # real transitions in each batch of the agent
    trajectories: int = 2_048  # synthetic trajectories per round, in whole sampler calls
    sample_batch: int = 512  # trajectories per sampler call
    buffer_rounds: int = 2  # rounds of synthetic data that are kept
    n_step: int = 1  # rewards in a critic's target, logged or synthetic; fewer at an end


# --- Types ---


class Transition(NamedTuple):
    """Steps of a log or of a sample; without successors, the steps (..., T) of a trajectory."""

    obs: chex.Array  # (..., O), standardised
    action: chex.Array  # (..., A), in [-1, 1]
    reward: chex.Array  # (...), as logged
    done: chex.Array  # (...), 1 at a true terminal, else 0, or as n_step has it; no gradient
    next_obs: chex.Array | None = None  # (..., O)
    next_action: chex.Array | None = None  # (..., A), NaN if unknown; meaningless if done


class Dataset(NamedTuple):
    """A log on the device: an argument of every compiled function, shared by all runs. A step is
    (observation, arctanh of the action, reward, done), standardised; D = O + A + 2."""

    steps: chex.Array  # (N + F, D); the last F are the known final observations at time-outs
    train_starts: chex.Array  # (M,) first steps of the training windows
    val_starts: chex.Array  # (V,) first steps of the held-out windows
    usable: chex.Array  # (K,) steps with a known successor, and terminals
    successors: chex.Array  # (K,) the successor of each usable step
    train_rows: chex.Array  # (P,) indices into `usable`, training episodes
    val_rows: chex.Array  # (Q,) indices into `usable`, held-out episodes
    mean: chex.Array  # (D,) of each channel of a step, before it was standardised
    std: chex.Array  # (D,), 1 where the channel is constant
    action_low: chex.Array  # (A,) in the environment's units
    action_high: chex.Array  # (A,) in the environment's units

    act_dim = property(lambda self: self.action_low.shape[-1])
    obs_dim = property(lambda self: self.steps.shape[-1] - self.act_dim - 2)

    def split(self, steps: chex.Array) -> Transition:
        """Standardised steps (..., D) -> Transition (...) without successors."""
        raw = steps[..., self.obs_dim :] * self.std[self.obs_dim :] + self.mean[self.obs_dim :]
        done = jnp.float32((raw[..., -1] > 0.5) & (self.mean[-1] > 0))  # none if the log has none
        return Transition(steps[..., : self.obs_dim], jnp.tanh(raw[..., :-2]), raw[..., -2], done)

    def transitions(self, rows: chex.Array) -> Transition:
        """rows (...), indices into `usable` -> Transition (...) of the log."""
        step = self.split(self.steps[self.usable[rows]])
        after = self.split(self.steps[self.successors[rows]])
        return step._replace(next_obs=after.obs, next_action=after.action)

    def sample(self, key, num: int, n: int = 1, gamma=1.0) -> Transition:
        """-> Transition (num, ...) of n steps of the log, drawn with replacement."""
        first = jax.random.randint(key, (num,), 0, self.usable.shape[0])
        rows = jnp.minimum(first + jnp.arange(n + 1)[:, None], self.usable.shape[0] - 1)
        follows = self.successors[rows[:-1]] == self.usable[rows[1:]]
        return jax.tree.map(lambda x: x[0], n_step(self.transitions(rows[:-1]), follows, gamma, n))

    def windows(self, key, starts: chex.Array, num: int, horizon: int) -> chex.Array:
        """-> (num, horizon, D): windows that begin at random `starts`. A terminal is repeated."""
        i = jax.random.randint(key, (num,), 0, starts.shape[0])
        index = starts[i][:, None] + jnp.arange(horizon)
        end = (self.steps[index, -1] > 0).at[:, -1].set(True)  # a terminal, or the last step
        return self.steps[jnp.minimum(index, index[:, :1] + jnp.argmax(end, 1, keepdims=True))]

    def unscale_action(self, action: chex.Array) -> chex.Array:
        """action (..., A) in [-1, 1] -> (..., A) in the environment's units."""
        return self.action_low + (action + 1.0) * 0.5 * (self.action_high - self.action_low)


# --- Make the data set: a log becomes standardised steps and windows ---


def window_starts(terminals, timeouts, horizon: int) -> np.ndarray:
    """-> first steps (M,) of the windows, which end before a time-out or run past a terminal. An
    episode's first counts horizon / 2 times, so that its steps are as frequent as later ones."""
    ends, first = np.flatnonzero(terminals | timeouts), np.arange(len(terminals))
    end = ends[np.searchsorted(ends, first)]  # of each step's episode
    times = np.where(np.diff(end, prepend=-1) != 0, max(1, horizon // 2), 1)
    return np.repeat(first, np.where(terminals[end] | (first + horizon <= end), times, 0))


def make_dataset(log: dict, config: Config, action_low=None, action_high=None) -> Dataset:
    """A log in D4RL's flat layout -> Dataset. The log: observations (N, O), actions (N, A),
    rewards, terminals and timeouts (N,), and next_observations (N, O), or none: then transitions at
    time-outs are left out. Bounds clip the actions; None: [-1, 1] or, if wider, the log's."""
    obs, action = np.asarray(log["observations"]), np.asarray(log["actions"])
    terminals = np.asarray(log["terminals"], bool)
    timeouts = np.asarray(log["timeouts"], bool) & ~terminals
    timeouts[-1] |= not terminals[-1]
    (num, num_obs), num_act = obs.shape, action.shape[1]
    ends, part = np.flatnonzero(terminals | timeouts), round(config.validation * num)
    lengths = np.diff(ends, prepend=-1)
    lengths *= terminals[ends] | (lengths > config.horizon)  # of episodes that have windows
    longest, part = np.argmax(lengths), max(part, config.horizon + 1)
    if cut := lengths[longest] > max(part, lengths.sum() / 2 - 1):  # its last part is held out
        timeouts[ends[longest] - part] = True
    edges = (action_low, np.minimum(action.min(0), -1)), (action_high, np.maximum(action.max(0), 1))
    low, high = (np.broadcast_to(np.float32(x if b is None else b), num_act) for b, x in edges)
    # Standardise every channel of (observation, arctanh of the action, reward, done)
    final_obs = log.get("next_observations", obs[:0])
    final_obs = final_obs[timeouts[: len(final_obs)]]
    kind = np.result_type(obs, np.float32)  # float64 holds values far from 0
    steps = np.full((num + len(final_obs), num_obs + num_act + 2), np.nan, kind)
    steps[:num, :num_obs], steps[num:, :num_obs] = obs, final_obs
    unit = 2.0 * (action - low) / (high - low) - 1.0
    steps[:num, num_obs:-2] = np.arctanh(np.clip(unit, -0.999, 0.999))
    steps[:num, -2], steps[:num, -1] = log["rewards"], terminals
    mean, std = (f(steps[:num], 0, dtype=np.float64) for f in (np.mean, np.std))
    std[np.ptp(steps[:num], 0) <= 8 * np.finfo(kind).eps * np.abs(mean) + 1e-30] = 1.0  # constant
    if terminals.any():  # done becomes -1 or 1, which has a mean square of 1 however rare it is
        mean[-1] = std[-1] = 0.5
    steps -= mean.astype(kind)
    steps /= std.astype(kind)
    # Windows, successors, and whole episodes that are held out at random
    starts = window_starts(terminals, timeouts, config.horizon)
    episode = np.concatenate([[0], np.cumsum(terminals | timeouts)[:-1]])  # (N,)
    episodes = np.unique(episode[starts] if len(starts) else episode)
    num_val = max(1, round(config.validation * len(episodes)))
    shuffled = [longest + 1] if cut else np.random.default_rng(0).permutation(episodes)
    held_out = np.isin(episode, shuffled[-num_val:])
    usable = np.flatnonzero(~timeouts)
    successors = np.where(terminals[usable], usable, usable + 1)  # a terminal's is never used
    if len(final_obs):
        usable = np.concatenate([usable, np.flatnonzero(timeouts)])
        successors = np.concatenate([successors, num + np.arange(len(final_obs))])
    index = lambda x: jnp.asarray(x, jnp.int32)
    rows = starts[~held_out[starts]], starts[held_out[starts]], usable, successors
    rows += np.flatnonzero(~held_out[usable]), np.flatnonzero(held_out[usable])
    return Dataset(jnp.float32(steps), *map(index, rows), *map(jnp.float32, (mean, std, low, high)))


def trajectories_to_transitions(dataset: Dataset, x: chex.Array) -> Transition:
    """Sampled trajectories (S, T, D) -> Transition (S * T, ...). Steps after a terminal, and last
    steps, which have no successor, are replaced by copies of the first transitions of all."""
    t, last = dataset.split(x), jnp.arange(x.shape[1]) == x.shape[1] - 1
    kept = ((jnp.cumsum(t.done, axis=1) == t.done) & ((t.done > 0) | ~last)).ravel()
    after = jnp.arange(kept.size) + ((t.done == 0) & ~last).ravel()
    t = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), t)
    t = t._replace(next_obs=t.obs[after], next_action=t.action[after])
    spare = jnp.argsort(~kept, stable=True)[(jnp.cumsum(~kept) - 1) % jnp.sum(kept)]
    return jax.tree.map(lambda x: x[jnp.where(kept, jnp.arange(kept.size), spare)], t)


def n_step(t: Transition, follows: chex.Array, gamma, n: int) -> Transition:
    """Transitions in order (S, ...) -> of up to n steps, with targets reward + gamma (1 - done) V(
    next_obs): done is 1 - gamma^(k - 1) after k. follows (S, ...): the next one continues this."""
    goes_on, out = follows & (t.done == 0), t
    choose = lambda x, y: jnp.where(goes_on[..., None] if x.ndim > goes_on.ndim else goes_on, x, y)
    for _ in range(n - 1):
        rest = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), out)
        reward, done = t.reward + gamma * rest.reward, 1.0 - gamma * (1.0 - rest.done)
        longer = rest._replace(obs=t.obs, action=t.action, reward=reward, done=done)
        out = jax.tree.map(choose, longer, t)
    return out


# --- Denoiser network: a residual temporal U-Net over x (..., T, C) ---


def init_dense(key, fan_in: int, fan_out: int, scale: float = 1.0) -> dict:
    """-> weights (fan_in, fan_out) with variance scale^2 / fan_in, and biases of 0."""
    init = jax.nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
    return {"w": init(key, (fan_in, fan_out)), "b": jnp.zeros(fan_out)}


def dense(params: dict, x: chex.Array) -> chex.Array:
    """x (..., I) -> (..., O). One flat product trains a sixth faster on CPU than a batched one."""
    return (x.reshape(-1, x.shape[-1]) @ params["w"] + params["b"]).reshape(*x.shape[:-1], -1)


def unfold(x: chex.Array, kernel: int, gap: int = 1) -> chex.Array:
    """x (..., T, C) -> (..., T, kernel * C): each step beside those at distances of gap. dense() of
    it is a convolution over time; in a scan on CPU, lax.conv is several times slower."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(kernel // 2 * gap,) * 2, (0, 0)])
    shifted = [padded[..., i * gap : i * gap + x.shape[-2], :] for i in range(kernel)]
    return jnp.concatenate(shifted, axis=-1)


def group_norm(x: chex.Array, groups: int) -> chex.Array:
    """x (..., T, C) -> (..., T, C), standardised over time and the channels of each group."""
    g = x.reshape(*x.shape[:-1], groups, -1).astype(jnp.float32)
    return jax.nn.standardize(g, axis=(-3, -1), epsilon=1e-5).reshape(x.shape).astype(x.dtype)


def init_block(key, c_in: int, c_out: int, config: Config) -> dict:
    """-> parameters of residual_block, which starts as the identity or as its skip layer."""
    wide = config.expansion * c_out
    layers = {"conv": (config.kernel * c_in, c_out), "film": (config.features, 2 * c_out, 0.0),
              "widen": (c_out, wide), "narrow": (wide, c_out, 0.0)}  # fmt: skip
    layers |= {"skip": (c_in, c_out)} if c_in != c_out else {}
    keys = jax.random.split(key, 5)
    return {name: init_dense(k, *layer) for k, (name, layer) in zip(keys, layers.items())}


def residual_block(block: dict, x: chex.Array, emb: chex.Array, gap: int, config: Config):
    """x (..., T, C), emb (..., E) -> (..., T, C'): a convolution over time, scale and shift by the
    noise level, then a hidden layer over the channels of each step."""
    h = jax.nn.relu(group_norm(x, config.groups))
    h = dense(block["conv"], unfold(h, config.kernel, gap))
    scale, shift = jnp.split(dense(block["film"], emb)[..., None, :], 2, axis=-1)
    h = group_norm(h, config.groups) * (1.0 + scale) + shift
    h = dense(block["narrow"], jax.nn.relu(dense(block["widen"], h)))
    return (dense(block["skip"], x) if "skip" in block else x) + h


def init_unet(key, dim_in: int, dim_out: int, config: Config) -> dict:
    """-> parameters of a network from dim_in to dim_out channels."""
    f, key = config.features, iter(jax.random.split(key, 4 + 2 * config.levels * config.blocks))
    widths = [f * 2**level for level in range(config.levels)]
    inputs = lambda c_in, c: [c_in] + [c] * (config.blocks - 1)
    init_blocks = lambda *c: [init_block(next(key), i, c[1], config) for i in inputs(*c)]
    return {
        "embed": [init_dense(next(key), f, f), init_dense(next(key), f, f)],
        "in": init_dense(next(key), config.kernel * dim_in, f),
        "down": [init_blocks(c_in, c) for c_in, c in zip([f, *widths], widths)],
        "up": [init_blocks(2 * c + c, c) for c in widths[:-1]],
        "out": init_dense(next(key), config.kernel * f, dim_out, scale=0.0),
    }


def activation_dtype(config: Config):
    """-> bfloat16 where asked for, or with "auto" on a TPU or an NVIDIA GPU from Ampere on."""
    device = jax.local_devices()[0]
    nvidia = device.platform == "gpu" and str(getattr(device, "compute_capability", "none"))
    fast = device.platform == "tpu" or (nvidia and nvidia[0].isdigit() and float(nvidia) >= 8.0)
    best = "bfloat16" if fast else "float32"
    return jnp.dtype(best if config.precision == "auto" else config.precision)


def unet(params: dict, x: chex.Array, c_noise: chex.Array, config: Config) -> chex.Array:
    """x (..., T, C), c_noise broadcastable to (...) -> (..., T, C'), in float32."""
    if "batch" in jax.sharding.get_abstract_mesh().axis_names:  # few runs, many devices
        x = jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec("batch"))
    dtype = activation_dtype(config)
    params, x = jax.tree.map(lambda p: p.astype(dtype), (params, x))
    angles = c_noise[..., None] * jnp.exp(jnp.linspace(0.0, jnp.log(1000.0), config.features // 2))
    emb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(dtype)
    for layer in params["embed"]:
        emb = jax.nn.relu(dense(layer, emb))
    h, skips = dense(params["in"], unfold(x, config.kernel)), []
    for level, blocks in enumerate(params["down"]):
        if level > 0:
            skips.append(h)
            h = jnp.mean(h.reshape(*h.shape[:-2], -1, 2, h.shape[-1]), axis=-2)  # half the length
        for i, block in enumerate(blocks):  # gaps of 1, 3, 9, 1, ... steps
            h = residual_block(block, h, emb, 3 ** (i % 3), config)
    for blocks in reversed(params["up"]):
        h = jnp.concatenate([jnp.repeat(h, 2, axis=-2), skips.pop()], axis=-1)  # twice the length
        for i, block in enumerate(blocks):  # gaps of 1, 3, 9, 1, ... steps
            h = residual_block(block, h, emb, 3 ** (i % 3), config)
    h = jax.nn.relu(group_norm(h, config.groups))
    return dense(params["out"], unfold(h, config.kernel)).astype(jnp.float32)


# --- EDM: preconditioning, loss, schedule, samplers (arXiv 2206.00364) ---

SIGMA_DATA = 1.0  # every channel is standardised
LABELS = 2  # the last channels, reward and done, which follow from the others


def noise_scale(dataset: Dataset, config: Config) -> chex.Array:
    """-> (D,): the noise on each channel, in units of sigma. Observations have less of it, so that
    actions are learnt and sampled at states that are nearly clean; that of labels hides them."""
    scales = jnp.array([config.obs_noise, 1.0, jnp.inf])
    return jnp.repeat(scales, np.array([dataset.obs_dim, dataset.act_dim, LABELS]))


def precondition(network: Callable, scale=1.0) -> Callable:
    """F(x, c_noise) -> denoiser D(x (..., T, D), sigma (...)) (EDM Table 1); scale: noise_scale."""

    def denoiser(x, sigma):
        s = jnp.asarray(sigma)[..., None, None] * scale
        c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
        c_out = SIGMA_DATA / jnp.sqrt(1.0 + (SIGMA_DATA / s) ** 2)
        c_in = 1.0 / jnp.sqrt(s**2 + SIGMA_DATA**2)
        return c_skip * x + c_out * network(c_in * x, jnp.log(sigma) / 4.0)  # c_noise

    return denoiser


def edm_loss(denoiser: Callable, x, sigma, noise, scale=1.0) -> chex.Array:
    """x, noise (B, T, D), sigma (B,) -> weighted squared error () (EDM equations 2 and 8)."""
    s = sigma[:, None, None] * scale
    error = denoiser(x + jnp.nan_to_num(s, posinf=0.0) * noise, sigma) - x
    return jnp.mean((SIGMA_DATA**-2 + s**-2) * error**2)


def noise_levels(config: Config) -> chex.Array:
    """-> (N + 1,): sigma_max down to sigma_min, then 0 (EDM equation 5)."""
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    return jnp.append(jnp.linspace(high, low, config.sample_steps) ** config.rho, 0.0)


def sample_heun(key, denoiser: Callable, shape, sigmas, churn=(0, 0, 0, 1)):
    """Stochastic Heun sampler (EDM Algorithm 2) -> (shape), in 2N - 1 calls of denoiser(x, sigma).
    sigmas (N + 1,), the last 0; churn: (S_churn, S_tmin, S_tmax, S_noise)."""
    s_churn, s_tmin, s_tmax, s_noise = churn
    num = sigmas.shape[0] - 1

    def add_noise(x, i):
        gamma = jnp.minimum(s_churn / num, 2**0.5 - 1)
        gamma = jnp.where((s_tmin <= sigmas[i]) & (sigmas[i] <= s_tmax), gamma, 0.0)
        noise = s_noise * jax.random.normal(jax.random.fold_in(key, i + 1), shape)
        x = x + sigmas[i] * jnp.sqrt(gamma * (2.0 + gamma)) * noise
        return x, sigmas[i] * (1.0 + gamma)

    def step(x, i):
        x_hat, sigma_hat = add_noise(x, i)
        d_cur = (x_hat - denoiser(x_hat, sigma_hat)) / sigma_hat  # Euler step
        dt = sigmas[i + 1] - sigma_hat
        x_next = x_hat + dt * d_cur
        d_next = (x_next - denoiser(x_next, sigmas[i + 1])) / sigmas[i + 1]  # second-order
        return x_hat + dt * 0.5 * (d_cur + d_next), None

    x = sigmas[0] * jax.random.normal(jax.random.fold_in(key, 0), shape)
    x, _ = jax.lax.scan(step, x, jnp.arange(num - 1))
    return denoiser(*add_noise(x, num - 1))  # the Euler step to sigma = 0, uncorrected


def sample_sde(key, denoiser: Callable, shape, sigmas, eta=1.0):
    """Second-order integrator of the reverse-time SDE (DPM-Solver++, section 5 of arXiv 2211.01095)
    -> (shape), in N denoiser calls; arguments as sample_heun's. eta: 0 is the ODE, 1 the SDE."""
    num = sigmas.shape[0] - 1
    h = jnp.log(sigmas[:-2] / sigmas[1:-1])  # (N - 1,)

    def step(carry, i):
        x, last = carry
        denoised = denoiser(x, sigmas[i])
        target = denoised + jnp.where(i > 0, 0.5 * h[i] / h[i - 1] * (denoised - last), 0.0)
        keep = jnp.exp(-(1.0 + eta) * h[i])
        x = keep * x + (1.0 - keep) * target
        noise = jax.random.normal(jax.random.fold_in(key, i + 1), shape)
        x = x + sigmas[i + 1] * jnp.sqrt(-jnp.expm1(-2.0 * eta * h[i])) * noise
        return (x, denoised), None

    x = sigmas[0] * jax.random.normal(jax.random.fold_in(key, 0), shape)
    (x, _), _ = jax.lax.scan(step, (x, jnp.zeros(shape)), jnp.arange(num - 1))
    return denoiser(x, sigmas[num - 1])  # the step to sigma = 0


# --- Guidance (PGD section 4): toward p_off(tau) prod_i exp(weight_i score_i(tau)) ---


def action_score(f: Callable) -> Callable:
    """f(obs, action) -> (...), such as log pi or Q -> the score sum_t f(s_t, a_t) of a trajectory
    (..., T), whose gradient is by the actions alone (PGD section 4; for Q, arXiv 2604.09035)."""
    return lambda t: jnp.sum(f(jax.lax.stop_gradient(t.obs), t.action), axis=-1)


def make_guide(terms: Sequence[tuple[Any, Callable]], dataset: Dataset, config: Config) -> Callable:
    """(weight, score) pairs -> guide(D (B, T, D), sigma) -> the mode of N(D, v) exp(sum weight
    score); for a quadratic score that is D + v g / (1 + v k). A score is any function, trajectory
    (..., T) -> (...), of states and actions that JAX can differentiate; lambda weighs log pi."""
    is_action = slice(dataset.obs_dim, -LABELS)
    mean, std = dataset.mean[is_action], dataset.std[is_action]
    gradient = jax.grad(lambda t: sum(jnp.sum(weight * score(t)) for weight, score in terms))

    def guide(denoised, sigma):
        s = jnp.stack([config.obs_noise * sigma, sigma])[..., None, None]
        v, v_u = s**2 * SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)  # of an observation, of an action
        t = dataset.split(denoised)._replace(reward=None, done=None)  # no score sees them
        g, h = jax.jvp(gradient, (t,), (jax.tree.map(jnp.ones_like, t),))  # h: Hessian's row sums
        # States: about sqrt(v) where the curvature puts a top more than 2 std away, or nowhere
        k = jax.nn.relu(-h.obs)
        k += jax.nn.relu(jnp.abs(g.obs) - 2.0 * k) / jnp.sqrt(v)
        moved = v * g.obs / (1.0 + v * k)
        # Actions a = tanh(u): to the mode of N(a, v_a) exp(score), by bisection up to the log's
        # bounds; if the score has neither a top nor curvature before them, by sqrt(v) at most
        a, u, sign = t.action, denoised[..., is_action] * std + mean, jnp.sign(g.action)
        v_a, end = v_u * (std * (1.0 - a**2)) ** 2, sign * jnp.maximum(jnp.abs(u), 3.8) - u
        uphill = lambda d: sign * gradient(t._replace(action=jnp.tanh(u + d))).action
        # A point: its distance d in u, and the slope of the log-density, which is 0 at the mode
        point = lambda d: jnp.stack([d, v_a * uphill(d) - sign * (jnp.tanh(u + d) - a)])
        near, far = jnp.stack([jnp.zeros_like(u), v_a * sign * g.action]), point(end)
        for _ in range(6):
            middle = point(0.5 * (near + far)[0])
            near, far = jnp.where(middle[1] > 0, *map(jnp.stack, ([middle, far], [near, middle])))
        share = near[1] / jnp.maximum(near[1] - jnp.minimum(far[1], 0.0), 1e-30)
        change = (near + share * (far - near))[0] / std
        stops = (uphill(end) < 0) | (jnp.abs(g.action) < -2.0 * h.action)
        change = jnp.where(stops, change, jnp.clip(change, -jnp.sqrt(v_u), jnp.sqrt(v_u)))
        return denoised + jnp.concatenate([moved, change, jnp.zeros((*u.shape[:-1], LABELS))], -1)

    return guide if terms else lambda denoised, _: denoised


# --- Generator: where synthetic experience comes from; EDM training and guided sampling ---


class Generator(NamedTuple):
    """A model of the log that generates experience under the current policy."""

    init: Callable  # (key, dataset) -> model
    fit: Callable  # (key, model, dataset) -> (model, metrics): one chunk of the training
    generate: Callable  # (key, model, policy, weight, dataset) -> Transition (S, ...)
    validate: Callable  # (model, dataset) -> metrics on the held-out episodes
    num_chunks: int = 0  # calls of fit that make the whole training
    length: int = 1  # steps of a trajectory; generate lays S / length of them end to end


def target_policy(agent, state) -> types.SimpleNamespace:
    """An agent in one of its states -> what a Generator may ask: log_prob(obs, action), act(obs),
    sample(key, obs) -> action, and q_value(obs, action) of the critic, or None."""
    bind = lambda f: f and functools.partial(f, state)
    log_prob, act, q_value = map(bind, (agent.log_prob, agent.act, getattr(agent, "q_value", None)))
    noisy = getattr(agent, "sample", None) or (lambda key, state, obs: agent.act(state, obs))
    sample = lambda key, obs: noisy(key, state, obs)
    return types.SimpleNamespace(log_prob=log_prob, act=act, sample=sample, q_value=q_value)


class DenoiserState(NamedTuple):
    params: dict
    ema: dict  # averaged parameters, which the sampler uses
    opt_state: Any
    step: chex.Array  # () int32


def make_optimiser(config: Config) -> optax.GradientTransformation:
    """Muon for matrices, Adam for biases: warm-up over a tenth of the steps, then a cosine to 0."""
    unit = optax.warmup_cosine_decay_schedule(0.1, 1.0, config.fit_steps // 10, config.fit_steps)
    return optax.contrib.muon(lambda step: config.fit_lr * unit(step), consistent_rms=0.2)


def make_denoiser(params, dataset: Dataset, config: Config, start=None, guide=lambda x, _: x):
    """Parameters -> D(x (B, T, D), sigma), of trajectories that begin at start (B, O) if given. The
    network sees the start at every step, since its convolutions reach only a few steps."""
    scale = noise_scale(dataset, config)
    with_start = lambda x: x if start is None else x.at[..., 0, : start.shape[-1]].set(start)

    def network(x, c_noise):
        if start is not None:
            everywhere = jnp.broadcast_to(start[:, None], (*x.shape[:-1], start.shape[-1]))
            x = jnp.concatenate([with_start(x), everywhere], -1)
        return unet(params, x, c_noise, config)

    return lambda x, sigma: with_start(guide(precondition(network, scale)(x, sigma), sigma))


def denoising_loss(params, key, dataset: Dataset, starts, num: int, config: Config) -> chex.Array:
    """Loss () on num windows that begin at `starts` (M,), with noise levels drawn as in EDM."""
    key_window, key_sigma, key_noise = jax.random.split(key, 3)
    x = dataset.windows(key_window, starts, num, config.horizon)
    sigma = jnp.exp(config.p_mean + config.p_std * jax.random.normal(key_sigma, (num,)))
    start = x[:, 0, : dataset.obs_dim] if config.condition_on_start else None
    noise, scale = jax.random.normal(key_noise, x.shape), noise_scale(dataset, config)
    return edm_loss(make_denoiser(params, dataset, config, start), x, sigma, noise, scale)


def init_diffusion(key, dataset: Dataset, config: Config) -> DenoiserState:
    """-> a denoiser that is not trained yet."""
    dim = dataset.steps.shape[-1]
    params = init_unet(key, dim + config.condition_on_start * dataset.obs_dim, dim, config)
    return DenoiserState(params, params, make_optimiser(config).init(params), jnp.int32(0))


def fit_diffusion(key, state: DenoiserState, dataset: Dataset, config: Config):
    """fit_chunk gradient steps -> (state, {"loss": ()})."""
    optimiser = make_optimiser(config)

    def step(state, _):
        key_step = jax.random.fold_in(key, state.step)
        args = key_step, dataset, dataset.train_starts, config.fit_batch, config
        loss, grads = jax.value_and_grad(denoising_loss)(state.params, *args)
        updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = (1.0 - config.ema) / (1.0 - config.ema ** (state.step + 1))  # bias-corrected
        ema = optax.incremental_update(params, state.ema, rate)
        return DenoiserState(params, ema, opt_state, state.step + 1), loss

    state, losses = jax.lax.scan(step, state, None, config.fit_chunk)
    return state, {"loss": jnp.mean(losses)}


def sample(key, state, dataset, config: Config, terms=(), start=None, rule=make_guide):
    """-> trajectories (B, T, D), standardised; guided by terms, (weight, score) pairs. With
    condition_on_start they begin at start (B, O), standardised, or else at logged states."""
    if config.condition_on_start and start is None:
        key, key_start = jax.random.split(key)
        first = jax.random.choice(key_start, dataset.train_starts, (config.sample_batch,))
        start = dataset.steps[first, : dataset.obs_dim]
    num = config.sample_batch if start is None else start.shape[0]
    denoiser = make_denoiser(state.ema, dataset, config, start, rule(terms, dataset, config))
    scale = jnp.nan_to_num(noise_scale(dataset, config), posinf=1.0)
    scaled = lambda x, sigma: denoiser(scale * x, sigma) / scale  # all channels at noise sigma
    args = scaled, (num, config.horizon, dataset.steps.shape[-1]), noise_levels(config)
    churn = config.s_churn, config.s_tmin, config.s_tmax, config.s_noise
    heun = config.sampler == "heun"
    return scale * (sample_heun(key, *args, churn) if heun else sample_sde(key, *args, config.eta))


def generate(key, state, policy, weight, dataset, config, terms=(), rule=make_guide):
    """Synthetic trajectories, end to end -> Transition (trajectories * T, ...). weight () scales
    the two guides of config and is 0 in round 0; terms: further (weight, score) pairs."""
    near = lambda obs, action: -jnp.sum((action - policy.act(obs)) ** 2, -1) / 2  # of N(act, 1)
    scale = lambda q: q / jnp.maximum(jnp.mean(jnp.abs(jax.lax.stop_gradient(q))), 1e-6)  # TD3+BC's
    value = lambda obs, action: scale(policy.q_value(obs, action))
    guides = [(config.guidance, near), (config.value_guidance, value)]
    is_off = lambda w: isinstance(w, int | float) and w == 0  # known when the program is compiled
    terms = [(weight * w, action_score(f)) for w, f in guides if not is_off(w)] + list(terms)
    keys = jax.random.split(key, -(-config.trajectories // config.sample_batch))
    x = jax.lax.map(lambda key: sample(key, state, dataset, config, terms, None, rule), keys)
    return trajectories_to_transitions(dataset, x.reshape(-1, *x.shape[-2:]))


def validate_diffusion(state: DenoiserState, dataset: Dataset, config: Config) -> dict:
    """Loss on 1,024 held-out windows, the same windows and sigmas whatever the run."""
    config = dataclasses.replace(config, p_mean=Config.p_mean, p_std=Config.p_std)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 2**31 - 1), 8)
    loss = lambda key: denoising_loss(state.ema, key, dataset, dataset.val_starts, 128, config)
    return {"validation_loss": jnp.mean(jax.lax.map(loss, keys))}


def make_diffusion(config: Config, terms=(), rule: Callable = make_guide) -> Generator:
    """The trajectory diffusion model; terms: more (weight, score) pairs; rule: as make_guide."""
    return Generator(
        init=functools.partial(init_diffusion, config=config),
        fit=functools.partial(fit_diffusion, config=config),
        generate=functools.partial(generate, config=config, terms=terms, rule=rule),
        validate=functools.partial(validate_diffusion, config=config),
        num_chunks=-(-config.fit_steps // config.fit_chunk),
        length=config.horizon,
    )


# --- Agent loop: rounds of synthetic data and agent updates ---


class Run(NamedTuple):
    """What one run has for itself; a program of many runs has these with a leading axis."""

    key: chex.PRNGKey
    settings: dict[str, chex.Array] = {}  # values of Config fields
    hyper: dict[str, chex.Array] = {}  # hyperparameters of the agent


class State(NamedTuple):
    """All that a run has learnt; a checkpoint is this."""

    model: Any  # of the Generator
    agent: Any
    buffer: Transition  # (buffer_rounds, S, ...) synthetic experience; the oldest is overwritten
    round: chex.Array  # () int32


class Program(NamedTuple):
    """One run as pure functions; vmap them over runs."""

    init: Callable  # (run, dataset) -> state
    fit: Callable  # (run, state, dataset) -> (state, metrics): a chunk of the generator's training
    round: Callable  # (run, state, dataset) -> (state, metrics): a round of the agent
    generate: Callable  # (run, state, dataset) -> Transition (S, ...): a round's synthetic data
    validate: Callable  # (run, state, dataset) -> metrics on the held-out episodes
    num_chunks: int  # calls of fit
    num_rounds: int  # calls of round


def update_agent(key, agent, state, draw: Callable, num: int):
    """num updates on batches draw(key) -> Transition (B, ...) -> (agent's state, mean metrics)."""
    batches = getattr(agent, "batches_per_update", 1)

    def step(state, i):
        key_agent, key_batch = jax.random.split(jax.random.fold_in(key, i))
        drawn = jax.vmap(draw)(jax.random.split(key_batch, batches))
        batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), drawn)  # end to end
        return agent.update(key_agent, state, batch)

    state, metrics = jax.lax.scan(step, state, jnp.arange(num))
    return state, jax.tree.map(jnp.mean, metrics)


def make_act(agent, state, dataset: Dataset) -> Callable:
    """-> act: obs (..., O) -> action (..., A), both in the environment's own units."""
    mean, std = dataset.mean[: dataset.obs_dim], dataset.std[: dataset.obs_dim]
    return lambda obs: dataset.unscale_action(jnp.clip(agent.act(state, (obs - mean) / std), -1, 1))


def run_keys(run: Run, index=0) -> tuple[chex.PRNGKey, ...]:
    """-> keys: to init and fit the model, init the agent; generate, update, evaluate, probe."""
    model, fit, agent, rounds = jax.random.split(run.key, 4)
    return model, fit, agent, *jax.random.split(jax.random.fold_in(rounds, index), 4)


def make_program(config: Config, agent, make_generator=make_diffusion, evaluate=None) -> Program:
    """agent: as in agents.py, or a function of run.hyper that gives one. make_generator(config) ->
    Generator. evaluate(key, act) -> returns (E,), in JAX; where given, it runs after each round."""

    def parts(run):
        own = dataclasses.replace(config, **run.settings)
        return own, agent if hasattr(agent, "init") else agent(**run.hyper), make_generator(own)

    def init(run, dataset):
        _, agent, generator = parts(run)
        key_model, _, key_agent, *_ = run_keys(run)
        learner = agent.init(key_agent, dataset.obs_dim, dataset.act_dim)
        state = State(generator.init(key_model, dataset), learner, None, jnp.zeros((), jnp.int32))
        made = jax.eval_shape(generate, run, state, dataset)
        empty = lambda x: jnp.zeros((config.buffer_rounds, *x.shape), x.dtype)
        return state._replace(buffer=jax.tree.map(empty, made))

    def fit(run, state, dataset):
        model, metrics = parts(run)[2].fit(run_keys(run)[1], state.model, dataset)
        return state._replace(model=model), metrics

    def generate(run, state, dataset):
        _, agent, generator = parts(run)
        key, policy = run_keys(run, state.round)[3], target_policy(agent, state.agent)
        weight = jnp.float32(state.round > 0)  # round 0 is unguided: its policy is untrained
        return generator.generate(key, state.model, policy, weight, dataset)

    def run_round(run, state, dataset):
        c, agent, _ = parts(run)
        gamma = agent.gamma if c.n_step > 1 else 1.0
        *_, key_update, key_evaluate, key_probe = run_keys(run, state.round)
        synthetic = generate(run, state, dataset)  # Generate
        follows = jnp.all(synthetic.next_obs == jnp.roll(synthetic.obs, -1, axis=0), axis=-1)
        write = lambda b, x: b.at[state.round % c.buffer_rounds].set(x)
        buffer = jax.tree.map(write, state.buffer, n_step(synthetic, follows, gamma, c.n_step))
        flat = jax.tree.map(lambda b: b.reshape(-1, *b.shape[2:]), buffer)
        size = jnp.minimum(state.round + 1, c.buffer_rounds) * synthetic.reward.shape[0]

        def draw(key):  # Update, on batches that mix synthetic and real transitions
            key_fake, key_real = jax.random.split(key)
            i = jax.random.randint(key_fake, (c.batch_size - c.real_batch,), 0, size)
            real = dataset.sample(key_real, c.real_batch, c.n_step, gamma)
            return jax.tree.map(lambda b, r: jnp.concatenate([b[i], r]), flat, real)

        learner, metrics = update_agent(key_update, agent, state.agent, draw, c.updates)
        far = {}  # Evaluate: mean squared distance of actions to the policy that guided them
        for name, t in [("real", dataset.sample(key_probe, 1024)), ("synthetic", synthetic)]:
            metrics[f"log_prob_{name}"] = jnp.mean(agent.log_prob(learner, t.obs, t.action))
            far[name] = jnp.mean((t.action - agent.act(state.agent, t.obs)) ** 2) + 1e-9
        metrics["policy_distance"] = far["synthetic"] / far["real"]  # in units of the log's
        metrics["effective_guidance"] = 1.0 / far["synthetic"] - 1.0 / far["real"]
        if evaluate is not None:
            metrics["return"] = jnp.mean(evaluate(key_evaluate, make_act(agent, learner, dataset)))
        return State(state.model, learner, buffer, state.round + 1), metrics

    validate = lambda run, state, dataset: parts(run)[2].validate(state.model, dataset)
    num = make_generator(config).num_chunks, config.rounds
    return Program(init, fit, run_round, generate, validate, *num)


def fuse(program: Program) -> Program:
    """-> the program whose only round is the whole run, with metrics (rounds, ...)."""

    def whole(run, state, dataset):
        fit = lambda _, state: program.fit(run, state, dataset)[0]
        state = jax.lax.fori_loop(0, program.num_chunks, fit, state)
        one = lambda state, _: program.round(run, state, dataset)
        return jax.lax.scan(one, state, None, program.num_rounds)

    return program._replace(round=whole, num_chunks=0, num_rounds=1)


def make_train(config: Config, agent, *args) -> Callable:
    """Arguments of make_program -> train(key, dataset) -> (state, metrics (rounds,)), a whole run
    as a pure function of a random key: jit it, vmap it over keys."""
    program = fuse(make_program(config, agent, *args))
    return lambda key, dataset: program.round(Run(key), program.init(Run(key), dataset), dataset)


# --- Run: the host loop ---


def over_seeds(program: Program, config: Config) -> tuple[Program, Run]:
    """Program of one run -> that of all seeds of the config, and their runs."""
    others = [jax.vmap(f, in_axes=(0, 0, None)) for f in program[1:5]]
    keys = jax.vmap(jax.random.key)(config.seed + np.arange(config.num_seeds))
    return Program(jax.vmap(program.init, (0, None)), *others, *program[5:]), Run(keys)


def print_chunk(stage: str, done: int, total: int, state: State, metrics: dict) -> None:
    """Print the metrics, with a number for each seed."""
    said = [f"{name} {np.ravel(x)}" for name, x in metrics.items()]
    print(f"{stage} {done}/{total}:", *said, flush=True)


class Hooks(NamedTuple):
    """What run() calls on its way; these are a plain run's."""

    spread: Callable = over_seeds  # (program, config) -> (program of all runs, runs)
    compile: Callable = lambda f, *args: jax.jit(f, donate_argnums=1)  # args: those of f
    restore: Callable = lambda state: (0, state)  # -> (chunks of the fit that are done, state)
    chunk: Callable = print_chunk  # (stage, done, total, state, metrics), after every chunk
    finish: Callable = lambda program, runs, state: state  # -> what run() returns


def run(config: Config, dataset: Dataset, agent, hooks: Hooks = Hooks(), *args):  # noqa: B008
    """The fit, then the rounds -> hooks.finish(...); args: further arguments of make_program."""
    program, runs = hooks.spread(make_program(config, agent, *args), config)
    init = lambda runs, _, dataset: program.init(runs, dataset)
    done, state = hooks.restore(hooks.compile(init, runs, (), dataset)(runs, (), dataset))
    chunks, rounds = range(done, program.num_chunks), range(np.max(state.round), program.num_rounds)
    stages = [("fit", program.fit, chunks), ("rounds", program.round, rounds)]
    compiled = [(s, hooks.compile(f, runs, state, dataset), todo) for s, f, todo in stages if todo]
    for stage, f, chunks in compiled:
        for i in chunks:
            state, metrics = f(runs, state, dataset)
            hooks.chunk(stage, i + 1, chunks.stop, state, jax.tree.map(np.asarray, metrics))
    return hooks.finish(program, runs, state)


def main() -> None:
    """The command line of host/cli.py; without host/, a plain run on an npz file."""
    if importlib.util.find_spec("host"):
        return importlib.import_module("host.cli").main()
    import tyro

    config = tyro.cli(Config)
    dataset = make_dataset(dict(np.load(config.dataset_path, allow_pickle=False)), config)
    run(config, dataset, importlib.import_module("agents").make_agent(config.agent))


if __name__ == "__main__":
    main()
