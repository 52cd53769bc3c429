"""Policy-guided diffusion for offline reinforcement learning (arXiv 2404.06356), in one file.

    python pgd.py                                           # pendulum-medium, minutes on a laptop
    python pgd.py --env halfcheetah-medium                  # the headline run
    python pgd.py --env halfcheetah-medium --preset laptop  # the same on two CPU cores
    python pgd.py --dataset-path FILE.hdf5                  # your own log, in D4RL's layout
    python pgd.py --num-seeds 8 --sweep guidance 0 0.25 1   # seeds and a sweep, on every device
    python pgd.py --help                                    # every setting

A diffusion model of whole sub-trajectories learns a fixed log; while it samples, the current policy
pushes the sampled actions toward its own; the agent trains on the result. Copied alone into another
project, this file needs jax, optax, chex and numpy:

    dataset = make_dataset(log, config)                     # log: a dict of D4RL's five arrays
    dims = dataset.obs_dim, dataset.act_dim
    trainer = make_train(config, agent, make_diffusion(config, *dims), *dims)
    result = jax.jit(trainer.train)(jax.random.key(0), dataset)
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

# --- Config ---


@dataclasses.dataclass(frozen=True)
class Config:
    # --- Run ---
    env: str | None = None  # task, D4RL's name or a gymnax one; pendulum-medium if nothing is given
    dataset_path: str | None = None  # train on this HDF5 or npz file; --env names its simulator
    agent: str = "td3_bc"  # bc, td3_bc, iql, rebrac, sac_n, edac, cql or awac, of agents.py
    hyper: dict[str, Any] = dataclasses.field(default_factory=dict)  # the agent's own settings
    synthetic: Literal["diffusion", "world-model", "none"] = "diffusion"  # none: the log alone
    preset: Literal["default", "smoke", "laptop", "paper"] = "default"  # sets the defaults below
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds seed, seed + 1, ... in one vmapped program
    sweep: tuple[str, ...] = ()  # field and values: guidance 0 0.5 1 2; of several fields, the grid
    shared_denoiser: bool = True  # one denoiser (always of key 0) for all seeds, or one per seed
    fused: bool = False  # the whole run as one compiled program
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the denoiser's products
    source: Literal["auto", "d4rl", "minari", "collect"] = "auto"  # where a D4RL name's log is from
    out: str | None = None  # run folder; runs/<env>-<agent>-<synthetic>-<time> if not given
    resume: str | None = None  # go on with the run in this folder, under its own settings alone
    export: str | None = None  # where to write synthetic data: FILE.hdf5, FILE.npz or minari:NAME
    export_steps: int = 100_000  # at least so many transitions, under each seed's final policy

    # --- Devices and hosts ---
    devices: int = 0  # of this machine, to spread seeds and sweep over; 0: all
    distributed: bool = False  # one of several hosts, each with its share of the seeds
    coordinator: str | None = None  # ADDRESS:PORT of host 0; found by itself on TPU, SLURM, K8s
    num_hosts: int | None = None  # and so are these two
    host: int | None = None  # this one's number, from 0

    # --- Trajectories ---
    horizon: int = 32  # T, steps in a window
    stride: int = 1  # keep every stride-th window start; episode starts and terminals always
    validation: float = 0.05  # fraction of the episodes held out of denoiser training
    held_out: Literal["random", "last"] = "random"  # which ones

    # --- Denoiser ---
    features: int = 64  # channels at the first level; they double at each level below
    levels: int = 1  # levels of the U-Net; 1 is full length throughout, no pooling
    blocks: int = 3  # residual blocks per level (and per level again on the way up)
    kernel: int = 3  # width of a convolution in steps
    expansion: int = 4  # width of a block's hidden layer, in units of its channels
    groups: int = 8  # groups of channels normalised together, over time

    # --- Denoiser training ---
    fit_steps: int = 10_000  # Adam steps
    fit_chunk: int = 100  # of which between two looks at the progress
    fit_batch: int = 16  # windows per step
    fit_lr: float = 2e-3  # peak learning rate; warm-up over the first tenth, then cosine to 0
    ema: float = 0.9995  # decay per step of the averaged parameters, the ones sampled from
    p_mean: float = -1.2  # mean of ln sigma in training (EDM Table 1)
    p_std: float = 1.2  # its standard deviation

    # --- Sampler ---
    sampler: Literal["sde", "heun"] = "sde"  # heun is EDM Algorithm 2, with two calls a level
    sample_steps: int = 64  # N, noise levels
    sigma_min: float = 0.01  # last noise level before 0
    sigma_max: float = 20.0  # first noise level
    rho: float = 7.0  # curvature of the schedule
    eta: float = 8.0  # sde: noise taken away and put back, 1 that of the reverse SDE, 0 none
    order: Literal[1, 2] = 2  # sde: 2 extrapolates the denoised estimate
    s_churn: float = 80.0  # heun: noise added back over all steps; 0 is the deterministic sampler
    s_tmin: float = 0.05  # churn only above this noise level
    s_tmax: float = 50.0  # and below this one
    s_noise: float = 1.003  # inflation of the noise added back

    # --- Guidance (PGD section 4) ---
    guidance: float = 0.25  # lambda, per 256 levels: up log pi of the policy; 0 is unguided
    value_guidance: float = 0.0  # the same up the Q of the agent's critic (2604.09035)
    behaviour_guidance: float = 0.0  # and down log pi of the log's clone (2505.20781)
    guidance_sine: float = 0.3  # c, height of the sine in the schedule of lambda
    guidance_every: int = 2  # push at every so many levels, and so much further
    guidance_normalise: bool = True  # scale each trajectory's gradient to unit length
    guidance_denoised: bool = True  # gradient at the last D(x; sigma) rather than at x
    condition_on_start: bool = False  # learn and sample what follows a given, logged state

    # --- World model (world_model.py; MBPO's recipe, with MOPO's penalty) ---
    members: int = 7  # Gaussian networks in the ensemble
    elites: int = 5  # of which the best on held-out transitions are used
    model_layers: int = 4  # hidden layers of each
    model_hidden: int = 200  # and their width
    model_steps: int = 40_000  # Adam steps at most
    model_chunk: int = 500  # steps between two looks at the held-out error
    patience: int = 10  # looks without an improvement by 1 % in any member, then training stops
    model_batch: int = 256  # transitions per step and member
    model_lr: float = 1e-3  # learning rate
    model_decay: float = 2.5e-5  # weight decay
    rollout: int = 5  # steps of a rollout from a logged state
    penalty: float = 0.0  # MOPO's: reward less this times the largest predicted std of an elite

    # --- Agent loop ---
    rounds: int = 10  # times that synthetic data is made anew with the current policy
    updates: int = 1_000  # agent updates per round
    batch_size: int = 256  # transitions per gradient step
    real_batch: int = 16  # of which from the log
    trajectories: int = 256  # synthetic trajectories made per round
    sample_batch: int = 128  # of which at once
    buffer_rounds: int = 2  # rounds of synthetic data kept; the oldest is dropped

    # --- Evaluation ---
    eval_episodes: int = 10  # per seed and round
    physics: Literal["auto", "c", "mjx"] = "auto"  # MuJoCo in C or JAX; auto: JAX with --fused


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},  # small gymnax tasks; where the task is larger, default-large stands in for it
    "default-large": dict(
        features=256, blocks=6, fit_steps=100_000, fit_batch=128, rounds=100, updates=5_000,
        trajectories=8_192, sample_batch=1_024,
    ),
    "smoke": dict(
        features=16, blocks=1, fit_steps=200, sample_steps=8, model_steps=200, model_chunk=50,
        rounds=2, updates=50, trajectories=64, sample_batch=64, eval_episodes=4,
    ),
    "laptop": dict(
        features=128, fit_steps=32_000, rounds=8, updates=5_000, trajectories=1_024,
    ),
    "paper": dict(
        features=1_024, levels=3, blocks=1, stride=8, fit_steps=1_000_000, fit_batch=32,
        sampler="heun", sample_steps=256, sigma_min=0.002, sigma_max=80.0, guidance=1.0,
        guidance_every=1, rounds=100, updates=10_000, trajectories=8_192, sample_batch=256,
    ),
}  # fmt: skip

DEFAULT_ENV = "pendulum-medium"


class UserError(Exception):
    """A user's mistake; its message is one line that says how to mend it."""


# --- Types ---


class Transition(NamedTuple):
    """What agents train on: observations standardised, actions in [-1, 1], rewards as logged."""

    obs: chex.Array  # (..., O)
    action: chex.Array  # (..., A)
    reward: chex.Array  # (...)
    next_obs: chex.Array  # (..., O)
    done: chex.Array  # (...), 1 at a true terminal, else 0
    next_action: chex.Array  # (..., A), NaN where it is not known, nothing where done


class Normalizer(NamedTuple):
    """Mean and standard deviation of each channel of a step."""

    mean: chex.Array  # (D,)
    std: chex.Array  # (D,), 1 where the channel is constant


class Dataset(NamedTuple):
    """A log on the device: an argument of every compiled function, shared by all seeds.

    A step is (observation, arctanh of the action, reward, done), D = O + A + 2 channels,
    standardised.
    """

    steps: chex.Array  # (N + known successors of time-outs, D)
    train_starts: chex.Array  # (M,) first steps of the windows to train on
    val_starts: chex.Array  # (V,) and of those held out
    usable: chex.Array  # (K,) steps whose successor is known, or not needed
    successors: chex.Array  # (K,) theirs; those of time-outs, if known, follow the N steps
    train_rows: chex.Array  # (P,) of the K, those of episodes to train on
    val_rows: chex.Array  # (Q,) and those of episodes held out
    normalizer: Normalizer
    action_low: chex.Array  # (A,) in the environment's units
    action_high: chex.Array  # (A,)

    @property
    def act_dim(self) -> int:
        return self.action_low.shape[-1]

    @property
    def obs_dim(self) -> int:
        return self.steps.shape[-1] - self.act_dim - 2

    def transitions(self, rows: chex.Array) -> Transition:
        """rows (...), each below K -> Transition (...) of the log."""
        step = split_steps(self, self.steps[self.usable[rows]])
        after = split_steps(self, self.steps[self.successors[rows]])
        return Transition(*step[:3], after.obs, step.done, after.action)


class Trajectory(NamedTuple):
    """Steps of the log or of a sample, apart."""

    obs: chex.Array  # (..., O) standardised
    action: chex.Array  # (..., A) in (-1, 1)
    reward: chex.Array  # (...) as logged
    done: chex.Array  # (...), 1 at a true terminal, else 0; has no gradient


# --- Make the data set ---


def window_starts(terminals, timeouts, horizon: int, stride: int = 1) -> np.ndarray:
    """terminals, timeouts (N,) -> first steps of windows, increasing.

    A window never goes on past an episode's end, and none ends on a time-out. One that ends on a
    terminal or begins an episode is kept; of the others every stride-th (as PGD's reference does).
    """
    ends = np.flatnonzero(terminals | timeouts)
    firsts = np.concatenate([[0], ends[:-1] + 1])
    offset = np.arange(len(terminals)) - np.repeat(firsts, ends - firsts + 1)  # step in its episode
    last = np.arange(len(terminals)) + horizon - 1
    inside = last <= np.repeat(ends, ends - firsts + 1)
    last = np.minimum(last, len(terminals) - 1)
    keep = (offset % stride == 0) | terminals[last]
    return np.flatnonzero(inside & keep & ~timeouts[last])


def make_dataset(
    log: dict[str, np.ndarray], config: Config, action_low: Any = -1.0, action_high: Any = 1.0
) -> Dataset:
    """A log in D4RL's flat layout -> Dataset.

    log: observations (N, O), actions (N, A) in [action_low, action_high], rewards (N,), terminals
    (N,), timeouts (N,) and perhaps next_observations (N, O), without which a time-out's transition
    is unknown; the last step ends an episode whether it says so or not. Raises UserError where no
    window fits, or a batch is larger than the log.
    """
    obs, action = np.asarray(log["observations"]), np.asarray(log["actions"])
    terminals = np.asarray(log["terminals"], bool)
    timeouts = np.asarray(log["timeouts"], bool) & ~terminals
    timeouts[-1] |= not terminals[-1]
    num_obs, num_act = obs.shape[1], action.shape[1]
    low, high = (np.broadcast_to(np.float32(b), (num_act,)) for b in (action_low, action_high))

    after = log.get("next_observations", obs[:0])  # used at time-outs, where it is there
    after = after[timeouts[: len(after)]]

    num = len(obs)
    with_after = np.full((num + len(after), num_obs + num_act + 2), np.nan, np.float32)
    with_after[num:, :num_obs] = after
    steps = with_after[:num]
    steps[:, :num_obs] = obs
    unit = 2.0 * (action - low) / (high - low) - 1.0
    steps[:, num_obs:-2] = np.arctanh(np.clip(unit, -0.999, 0.999))
    steps[:, -2], steps[:, -1] = log["rewards"], terminals
    mean, std = steps.mean(0, dtype=np.float64), steps.std(0, dtype=np.float64)
    std[std < 1e-6 * np.maximum(1.0, np.abs(mean))] = 1.0
    with_after -= mean.astype(np.float32)
    with_after /= std.astype(np.float32)

    starts = window_starts(terminals, timeouts, config.horizon, config.stride)
    episode = np.concatenate([[0], np.cumsum(terminals | timeouts)[:-1]])  # of each step
    needs_windows = config.synthetic == "diffusion"
    if len(starts) < 2 and needs_windows:
        raise UserError(
            f"the log has {len(starts)} windows of {config.horizon} steps, its longest episode "
            f"{np.bincount(episode).max()} steps; lower --horizon or bring more data"
        )
    episodes = np.unique(episode[starts] if needs_windows else episode)
    if len(episodes) > 1:
        num_val = max(1, round(config.validation * len(episodes)))
        if config.held_out == "random":
            episodes = np.random.default_rng(0).permutation(episodes)
        held_out = episodes[-num_val:]
        val = np.isin(episode[starts], held_out)
        train, val_step = ~val, np.isin(episode, held_out)
    else:  # one long episode: its end is held out
        boundary = num - max(1, round(config.validation * num))
        boundary = starts[-max(1, round(config.validation * len(starts))) :].min(initial=boundary)
        val, train = starts >= boundary, starts + config.horizon <= boundary
        val_step = np.arange(num) >= boundary
    usable = np.flatnonzero(~timeouts)
    successors = np.where(terminals[usable], usable, usable + 1)  # a terminal's is never looked at
    if len(after):
        usable = np.concatenate([usable, np.flatnonzero(timeouts)])
        successors = np.concatenate([successors, num + np.arange(len(after))])
    val_row = val_step[usable]
    if config.synthetic == "world-model" and len(set(val_row)) < 2:
        raise UserError("the log is too short to hold transitions out for a world model")
    for name, size, have in [
        ("fit-batch", config.fit_batch, train.sum()),
        ("batch-size", config.batch_size, len(usable)),
    ]:
        if size > have and (needs_windows or name == "batch-size"):
            raise UserError(f"--{name} {size} is larger than the log, which gives {have} of them")
    return Dataset(
        steps=jnp.asarray(with_after),
        train_starts=jnp.asarray(starts[train], jnp.int32),
        val_starts=jnp.asarray(starts[val], jnp.int32),
        usable=jnp.asarray(usable, jnp.int32),
        successors=jnp.asarray(successors, jnp.int32),
        train_rows=jnp.asarray(np.flatnonzero(~val_row), jnp.int32),
        val_rows=jnp.asarray(np.flatnonzero(val_row), jnp.int32),
        normalizer=Normalizer(jnp.float32(mean), jnp.float32(std)),
        action_low=jnp.asarray(low),
        action_high=jnp.asarray(high),
    )


def split_steps(dataset: Dataset, steps: chex.Array) -> Trajectory:
    """Standardised steps (..., D) -> Trajectory (..., O), (..., A), (...), (...)."""
    o = dataset.obs_dim
    mean, std = dataset.normalizer
    raw = steps[..., o:] * std[o:] + mean[o:]
    done = (raw[..., -1] > 0.5) & (mean[-1] > 0)  # a log without terminals has none
    done = done.astype(jnp.float32)
    return Trajectory(steps[..., :o], jnp.tanh(raw[..., :-2]), raw[..., -2], done)


def unscale_action(dataset: Dataset, action: chex.Array) -> chex.Array:
    """[-1, 1] -> the environment's own units."""
    return dataset.action_low + (action + 1.0) * 0.5 * (dataset.action_high - dataset.action_low)


def sample_windows(key, dataset: Dataset, starts: chex.Array, num: int, horizon: int):
    """-> (num, horizon, D): windows drawn with replacement, gathered from the flat log."""
    i = jax.random.randint(key, (num,), 0, starts.shape[0])
    return dataset.steps[starts[i][:, None] + jnp.arange(horizon)]


def sample_real(key, dataset: Dataset, num: int) -> Transition:
    """-> Transition (num, ...): steps of the log drawn with replacement."""
    return dataset.transitions(jax.random.randint(key, (num,), 0, dataset.usable.shape[0]))


def trajectories_to_transitions(dataset: Dataset, x: chex.Array) -> Transition:
    """Sampled trajectories (S, T, D) -> Transition (S * T, ...).

    The last step has no successor. Where it is a terminal it needs none; elsewhere the transition
    in the middle of the window, where the denoiser errs least, stands in for it.
    """
    obs, action, reward, done = split_steps(dataset, x)
    next_obs, next_action = (jnp.concatenate([y[:, 1:], y[:, -1:]], 1) for y in (obs, action))
    transitions = Transition(obs, action, reward, next_obs, done, next_action)
    last, middle = x.shape[1] - 1, (x.shape[1] - 1) // 2

    def mend_last(field):
        terminal = (done[:, last] > 0).reshape(-1, *[1] * (field.ndim - 2))
        return field.at[:, last].set(jnp.where(terminal, field[:, last], field[:, middle]))

    return jax.tree.map(lambda f: mend_last(f).reshape(-1, *f.shape[2:]), transitions)


# --- Denoiser network: a residual temporal U-Net over x (..., T, C) ---


def init_dense(key, fan_in: int, fan_out: int, scale: float = 1.0) -> dict:
    """Weights with variance scale^2 / fan_in, bias 0."""
    w = scale * fan_in**-0.5 * jax.random.truncated_normal(key, -2, 2, (fan_in, fan_out)) / 0.88
    return {"w": w, "b": jnp.zeros(fan_out)}


def dense(params: dict, x: chex.Array) -> chex.Array:
    """x (..., I) -> (..., O); as one flat product, which is a sixth faster to train on CPU."""
    y = x.reshape(-1, x.shape[-1]) @ params["w"] + params["b"]
    return y.reshape(*x.shape[:-1], -1)


def windows(x: chex.Array, kernel: int) -> chex.Array:
    """x (..., T, C) -> (..., T, kernel * C): each step beside its neighbours, zeros past the
    ends."""
    half = kernel // 2
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(half, half), (0, 0)])
    shifted = [padded[..., i : i + x.shape[-2], :] for i in range(kernel)]
    return jnp.concatenate(shifted, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: chex.Array, w: chex.Array, kernel: int) -> chex.Array:
    """x (..., T, C), w (kernel * C, C') -> (..., T, C'): a convolution over time, "same" padding.

    Windows times a matrix, in the backward pass too: in a scan on CPU this is a hundred times as
    fast as the gradient of lax.conv's weights, and 1.5 times the transpose that autodiff finds for
    it.
    """
    return windows(x, kernel) @ w


def convolve_forward(x, w, kernel):
    """-> convolve's value, and what its backward pass needs."""
    columns = windows(x, kernel)
    return columns @ w, (columns, w)


def convolve_backward(kernel, residuals, dy):
    """dy (..., T, C') -> gradients by x (..., T, C) and w (kernel * C, C')."""
    columns, w = residuals
    dw = jnp.einsum("...i,...j->ij", columns, dy)
    mirrored = w.reshape(kernel, -1, w.shape[-1])[::-1].swapaxes(1, 2)  # (kernel, C', C)
    return windows(dy, kernel) @ mirrored.reshape(kernel * w.shape[-1], -1), dw


convolve.defvjp(convolve_forward, convolve_backward)


def conv(params: dict, x: chex.Array, kernel: int) -> chex.Array:
    """x (..., T, C) -> (..., T, C'), with a bias."""
    return convolve(x, params["w"], kernel) + params["b"]


def group_norm(x: chex.Array, groups: int) -> chex.Array:
    """x (..., T, C) -> the same shape, standardised over time and the channels of each group."""
    g = x.reshape(*x.shape[:-1], groups, -1).astype(jnp.float32)
    mean = jnp.mean(g, axis=(-3, -1), keepdims=True)
    var = jnp.mean(g**2, axis=(-3, -1), keepdims=True) - mean**2
    g = (g - mean) * jax.lax.rsqrt(jnp.maximum(var, 0.0) + 1e-5)
    return g.reshape(x.shape).astype(x.dtype)


def init_block(key, c_in: int, c_out: int, config: Config) -> dict:
    """Parameters of residual_block, which starts as the identity (or its skip)."""
    k = jax.random.split(key, 5)
    hidden = config.expansion * c_out
    block = {
        "conv": init_dense(k[0], config.kernel * c_in, c_out),
        "film": init_dense(k[1], config.features, 2 * c_out, scale=0.0),
        "widen": init_dense(k[2], c_out, hidden),
        "narrow": init_dense(k[3], hidden, c_out, scale=0.0),
    }
    if c_in != c_out:
        block["skip"] = init_dense(k[4], c_in, c_out)
    return block


def residual_block(block: dict, x: chex.Array, emb: chex.Array, config: Config) -> chex.Array:
    """x (..., T, C), emb (..., E) -> (..., T, C'): a convolution over time, scale and shift by the
    noise level, and a hidden layer over the channels of each step."""
    h = jax.nn.relu(group_norm(x, config.groups))
    h = conv(block["conv"], h, config.kernel)
    scale, shift = jnp.split(dense(block["film"], emb)[..., None, :], 2, axis=-1)
    h = group_norm(h, config.groups) * (1.0 + scale) + shift
    h = dense(block["narrow"], jax.nn.relu(dense(block["widen"], h)))
    return (dense(block["skip"], x) if "skip" in block else x) + h


def init_unet(key, dim: int, config: Config, told: int = 0) -> dict:
    """D channels in and out, `told` more only in -> parameters."""
    f, key = config.features, iter(jax.random.split(key, 4 + 2 * config.levels * config.blocks))
    widths = [f * 2**level for level in range(config.levels)]

    def init_blocks(c_in, c_out):
        return [
            init_block(next(key), c_in if i == 0 else c_out, c_out, config)
            for i in range(config.blocks)
        ]

    return {
        "embed": [init_dense(next(key), f, f), init_dense(next(key), f, f)],
        "in": init_dense(next(key), config.kernel * (dim + told), f),
        "down": [init_blocks(c_in, c) for c_in, c in zip([f, *widths], widths)],
        "up": [init_blocks(2 * c + c, c) for c in widths[:-1]],
        "out": init_dense(next(key), config.kernel * f, dim, scale=0.0),
    }


def unet(params: dict, x: chex.Array, c_noise: chex.Array, config: Config) -> chex.Array:
    """x (..., T, D + told), c_noise broadcastable to (...) -> (..., T, D), float32 as the
    parameters are; with --precision bfloat16 the products between are not."""
    dtype = jnp.bfloat16 if config.precision == "bfloat16" else jnp.float32
    params, x = jax.tree.map(lambda p: p.astype(dtype), (params, x))
    frequencies = jnp.exp(jnp.linspace(0.0, jnp.log(1000.0), config.features // 2))
    angles = c_noise[..., None] * frequencies
    emb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(dtype)
    for layer in params["embed"]:
        emb = jax.nn.relu(dense(layer, emb))

    h = conv(params["in"], x, config.kernel)
    skips = []
    for level, blocks in enumerate(params["down"]):
        if level > 0:
            skips.append(h)
            h = jnp.mean(h.reshape(*h.shape[:-2], -1, 2, h.shape[-1]), axis=-2)  # half the length
        for block in blocks:
            h = residual_block(block, h, emb, config)
    for blocks in reversed(params["up"]):
        h = jnp.concatenate([jnp.repeat(h, 2, axis=-2), skips.pop()], axis=-1)  # twice the length
        for block in blocks:
            h = residual_block(block, h, emb, config)
    h = jax.nn.relu(group_norm(h, config.groups))
    return conv(params["out"], h, config.kernel).astype(jnp.float32)


# --- EDM: preconditioning, loss, schedule, sampler (arXiv 2206.00364) ---

SIGMA_DATA = 1.0  # every channel is standardised


def precondition(network: Callable) -> Callable:
    """F(x, c_noise) -> denoiser D(x (..., T, D), sigma (...)) (EDM Table 1)."""

    def denoiser(x, sigma):
        s = jnp.asarray(sigma)[..., None, None]
        c_skip = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2)
        c_out = s * SIGMA_DATA / jnp.sqrt(s**2 + SIGMA_DATA**2)
        c_in = 1.0 / jnp.sqrt(s**2 + SIGMA_DATA**2)
        c_noise = jnp.log(sigma) / 4.0
        return c_skip * x + c_out * network(c_in * x, c_noise)

    return denoiser


def edm_loss(denoiser: Callable, x, sigma, noise) -> chex.Array:
    """x, noise (B, T, D), sigma (B,) -> mean weighted squared error (EDM equations 2 and 8)."""
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    error = denoiser(x + sigma[:, None, None] * noise, sigma) - x
    return jnp.mean(weight[:, None, None] * error**2)


def noise_levels(config: Config) -> chex.Array:
    """-> (N + 1,): sigma_max down to sigma_min, then 0 (EDM equation 5)."""
    ramp = jnp.linspace(1.0, 0.0, config.sample_steps)
    low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
    return jnp.append((low + ramp * (high - low)) ** config.rho, 0.0)


def is_zero(setting) -> bool:
    """Whether it is switched off for good: 0, and neither swept nor given at run time."""
    return isinstance(setting, (int, float)) and setting == 0


def sample_heun(key, denoiser: Callable, shape, sigmas, guide=None, churn=(0, 0, 0, 1)):
    """Stochastic Heun sampler (EDM Algorithm 2) -> (shape), in 2N - 1 denoiser calls.

    denoiser(x, sigma) -> x; sigmas (N + 1,), the last 0; churn: (S_churn, S_tmin, S_tmax, S_noise).
    guide(x, denoised, sigma, step) -> x is applied before the churn of each step; denoised is what
    the last call of the denoiser returned, at the same level and nearly the same place.
    """
    s_churn, s_tmin, s_tmax, s_noise = churn
    num = sigmas.shape[0] - 1

    def to_noised(x, denoised, n):
        """Guide x, raise its noise level from sigma to sigma_hat, and denoise it there."""
        sigma = sigmas[n]
        x = x if guide is None else guide(x, denoised, sigma, n)
        gamma = jnp.minimum(s_churn / num, 2**0.5 - 1)
        gamma = jnp.where((s_tmin <= sigma) & (sigma <= s_tmax), gamma, 0.0)
        sigma_hat = sigma * (1.0 + gamma)
        if not is_zero(s_churn):
            noise = s_noise * jax.random.normal(jax.random.fold_in(key, n + 1), shape)
            x = x + sigma * jnp.sqrt(gamma * (2.0 + gamma)) * noise  # sqrt(sigma_hat^2 - sigma^2)
        return x, sigma_hat, denoiser(x, sigma_hat)

    def heun_step(carry, n):
        x_hat, sigma_hat, denoised = to_noised(*carry, n)
        d_cur = (x_hat - denoised) / sigma_hat
        dt = sigmas[n + 1] - sigma_hat
        x_next = x_hat + dt * d_cur
        denoised = denoiser(x_next, sigmas[n + 1])
        d_next = (x_next - denoised) / sigmas[n + 1]
        return (x_hat + dt * 0.5 * (d_cur + d_next), denoised), None

    x = sigmas[0] * jax.random.normal(jax.random.fold_in(key, 0), shape)
    carry = x, jnp.zeros(shape)  # in pure noise the best estimate is the mean
    carry, _ = jax.lax.scan(heun_step, carry, jnp.arange(num - 1))
    return to_noised(*carry, num - 1)[2]  # the last step goes to 0, and has no correction


def sample_sde(key, denoiser: Callable, shape, sigmas, guide=None, eta=1.0, order: int = 2):
    """Exponential integrator of the reverse-time SDE (DPM-Solver++, arXiv 2211.01095, section 5)
    -> (shape), in N denoiser calls; arguments as of sample_heun.

    eta: how fast noise is taken away and put back on the way: 0 is the deterministic sampler, 1
    the reverse of the noising process, more corrects more of the errors made before. order: 2
    extrapolates the denoised estimate from the last two.
    """
    num = sigmas.shape[0] - 1
    h = jnp.log(sigmas[:-2] / sigmas[1:-1])  # (N - 1,)

    def step(carry, n):
        x, last = carry
        x = x if guide is None else guide(x, last, sigmas[n], n)
        denoised = denoiser(x, sigmas[n])
        to = denoised
        if order == 2:
            to = to + jnp.where(n > 0, 0.5 * h[n] / h[n - 1] * (denoised - last), 0.0)
        keep = jnp.exp(-(1.0 + eta) * h[n])
        x = keep * x + (1.0 - keep) * to
        if not is_zero(eta):
            noise = jax.random.normal(jax.random.fold_in(key, n + 1), shape)
            x = x + sigmas[n + 1] * jnp.sqrt(-jnp.expm1(-2.0 * eta * h[n])) * noise
        return (x, denoised), None

    x = sigmas[0] * jax.random.normal(jax.random.fold_in(key, 0), shape)
    carry = x, jnp.zeros(shape)  # in pure noise the best estimate is the mean
    (x, last), _ = jax.lax.scan(step, carry, jnp.arange(num - 1))
    x = x if guide is None else guide(x, last, sigmas[num - 1], num - 1)
    return denoiser(x, sigmas[num - 1])  # the last step goes to 0


# --- Guidance (PGD section 4): scores of a trajectory, and a push up their gradients ---

GUIDANCE_LEVELS = 256  # lambda is what so many levels push; of fewer levels, each pushes further


def policy_score(log_prob: Callable) -> Callable:
    """log_prob(obs (..., O), action (..., A)) -> (...) becomes a score: Trajectory (..., T) ->
    (...), the sum of log pi(a|s). Its gradient is by the actions alone (PGD section 4)."""
    return lambda t: jnp.sum(log_prob(jax.lax.stop_gradient(t.obs), t.action), axis=-1)


def value_score(q_value: Callable) -> Callable:
    """q_value(obs (..., O), action (..., A)) -> (...) becomes a score: the sum of Q(s, a) over its
    mean size in the trajectory. By the actions, its gradient is that of the advantage (arXiv
    2604.09035)."""

    def score(t):
        q = q_value(jax.lax.stop_gradient(t.obs), t.action)
        size = jax.lax.stop_gradient(jnp.mean(jnp.abs(q), axis=-1))
        return jnp.sum(q, axis=-1) / jnp.maximum(size, 1e-6)

    return score


def make_guide(terms: Sequence[tuple[Any, Callable]], dataset: Dataset, config: Config) -> Callable:
    """Weights and scores -> guide for a sampler, which adds up their pushes.

    score(Trajectory (..., T)) -> (...) is any function of one's own that JAX can differentiate. The
    push is lambda_n * g / ||g||, g being the score's gradient with respect to the standardised
    trajectory (..., T, D), its actions before tanh, and ||g|| its norm over one trajectory.
    lambda_n is of the paper's 256 levels, and as much more as there are fewer.
    """
    num, every = config.sample_steps, config.guidance_every

    def push(x, denoised, step):
        at, direction = denoised if config.guidance_denoised else x, 0.0
        for weight, score in terms:
            # Summed over the batch: each trajectory's gradient is its own
            g = jax.grad(lambda at, f=score: jnp.sum(f(split_steps(dataset, at))))(at)
            if config.guidance_normalise:
                norm_sq = jnp.sum(g**2, axis=(-2, -1), keepdims=True)
                g = g * jax.lax.rsqrt(jnp.maximum(norm_sq, 1e-12))
            direction = direction + weight * g
        sine = config.guidance_sine * jnp.sin(jnp.pi * (step + 1) / num)
        lambda_n = ((1 - step / num) + sine) * GUIDANCE_LEVELS * every / num
        return x + jnp.where(step < num - 1, lambda_n, 0.0) * direction

    def guide(x, denoised, sigma, step):
        if every == 1:
            return push(x, denoised, step)
        return jax.lax.cond(step % every == 0, push, lambda x, *_: x, x, denoised, step)

    return guide


def fix_start(denoiser: Callable, guide: Callable | None, obs: chex.Array):
    """First observations (B, O), standardised -> denoiser(x, sigma ()) and guide of trajectories
    that begin there (inpainting).

    The denoised trajectory starts at obs, and so does the sample; the rest of it follows by a
    gradient through the denoiser of how far it would have started from there: reconstruction
    guidance (arXiv 2204.03458, section 3.1), weighted by the variance that a standardised channel
    has left at this noise (pseudoinverse-guided diffusion, Song et al., ICLR 2023). The guide
    pushes the rest alone.
    """
    o = obs.shape[-1]

    def known(x, first):
        return x.at[..., 0, :o].set(first)

    def conditional(x, sigma):
        denoised, vjp = jax.vjp(lambda x: denoiser(x, sigma), x)
        variance = sigma**2 / (sigma**2 + SIGMA_DATA**2)
        gap = (obs - denoised[..., 0, :o]) / variance
        (pull,) = vjp(known(jnp.zeros_like(x), gap))
        return known(denoised + sigma**2 * pull, obs)

    def kept(x, denoised, sigma, step):
        return known(guide(x, known(denoised, obs), sigma, step), x[..., 0, :o])

    return conditional, kept if guide else None


# --- Generators: where synthetic experience comes from ---


class Generator(NamedTuple):
    """A model of the log that can be asked for experience under the current policy."""

    init: Callable  # (key) -> state
    fit_chunk: Callable  # (key, state, dataset) -> (state, metrics)
    num_chunks: int  # calls of fit_chunk that make the whole fit
    generate: Callable  # (key, state, policy, guided, dataset) -> Transition (S, ...)
    validate: Callable  # (state, dataset) -> metrics on what was held out
    length: int = 1  # steps of a trajectory; generate lays S / length of them end to end
    sample: Callable | None = None  # (key, state, dataset, terms, start) -> (B, T, D), if diffusion


class TargetPolicy(NamedTuple):
    """What a Generator may ask of the current policy; obs standardised, actions in [-1, 1]."""

    log_prob: Callable  # (obs (..., O), action (..., A)) -> (...)
    sample: Callable  # (key, obs (..., O)) -> action (..., A)
    q_value: Callable | None = None  # (obs (..., O), action (..., A)) -> (...), if it has a critic


def target_policy(agent, agent_state) -> TargetPolicy:
    """An agent in one of its states; one that has no `sample` is deterministic."""
    sample = getattr(agent, "sample", None) or (lambda key, state, obs: agent.act(state, obs))
    q_value = getattr(agent, "q_value", None)
    return TargetPolicy(
        functools.partial(agent.log_prob, agent_state),
        lambda key, obs: sample(key, agent_state, obs),
        q_value and functools.partial(q_value, agent_state),
    )


class DenoiserState(NamedTuple):
    params: dict
    ema: dict  # averaged parameters: the ones to sample from
    opt_state: Any
    step: chex.Array  # () int32
    clone: Any = ()  # of the log's policy, for behaviour guidance


def make_diffusion(
    config: Config,
    obs_dim: int,
    act_dim: int,
    batch_axis: str | None = None,
    cloner=None,
    terms: Sequence[tuple[Any, Callable]] = (),
) -> Generator:
    """The trajectory diffusion model: EDM training, guided sampling.

    batch_axis: a mesh axis whose devices share the work on this one model. cloner: the Agent that
    learns the log's policy beside the denoiser, for behaviour guidance. terms: further weights and
    scores for make_guide, in every round.
    """
    if cloner is None and not is_zero(config.behaviour_guidance):
        raise UserError("behaviour guidance needs a cloner, such as agents.bc()")

    def learning_rate(step):
        """Up to the peak over the first tenth, from a tenth of it, then a cosine to 0."""
        warm = config.fit_steps // 10
        up = 0.1 + 0.9 * step / jnp.maximum(warm, 1)
        down = 0.5 + 0.5 * jnp.cos(jnp.pi * (step - warm) / (config.fit_steps - warm))
        return config.fit_lr * jnp.where(step < warm, up, down)

    optimiser = optax.adam(learning_rate)

    def make_denoiser(params, start=None):
        """start: first observations (B, O) that D(x) has already. The network is told them at every
        step: one that sees a few steps round each makes the rest of a trajectory without them."""
        if start is None:
            return precondition(lambda x, c_noise: unet(params, x, c_noise, config))

        def known(x):
            return x.at[..., 0, :obs_dim].set(start)

        def network(x, c_noise):
            everywhere = jnp.broadcast_to(start[:, None], (*x.shape[:-1], obs_dim))
            x = jnp.concatenate([known(x), everywhere], axis=-1)
            return unet(params, x, c_noise, config)

        denoiser = precondition(network)
        return lambda x, sigma: known(denoiser(x, sigma))

    def draw(key, dataset, starts, num, noise=config):
        """-> windows (num, T, D), their noise levels (num,) and noise (num, T, D)."""
        key_window, key_sigma, key_noise = jax.random.split(key, 3)
        x = sample_windows(key_window, dataset, starts, num, config.horizon)
        sigma = jnp.exp(noise.p_mean + noise.p_std * jax.random.normal(key_sigma, (num,)))
        return x, sigma, jax.random.normal(key_noise, x.shape)

    def loss_fn(params, batch):
        start = batch[0][:, 0, :obs_dim] if config.condition_on_start else None
        return edm_loss(make_denoiser(params, start), *batch)

    def init(key):
        key_init, _, key_clone = jax.random.split(key, 3)
        told = obs_dim if config.condition_on_start else 0
        params = init_unet(key_init, obs_dim + act_dim + 2, config, told)
        clone = cloner.init(key_clone, obs_dim, act_dim) if cloner else ()
        step = jnp.zeros((), jnp.int32)
        return DenoiserState(params, params, optimiser.init(params), step, clone)

    def fit_chunk(key, state, dataset):
        _, key_steps = jax.random.split(key)

        def fit_step(state, _):
            k = jax.random.fold_in(key_steps, state.step)
            batch = own_share(draw(k, dataset, dataset.train_starts, config.fit_batch), batch_axis)
            loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
            if batch_axis:
                loss, grads = jax.lax.pmean((loss, grads), batch_axis)
            updates, opt_state = optimiser.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            decay = jnp.minimum(config.ema, (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update(params, state.ema, 1 - decay)
            clone = update_clone(jax.random.fold_in(k, 3), state.clone, dataset)
            return DenoiserState(params, ema, opt_state, state.step + 1, clone), loss

        state, losses = jax.lax.scan(fit_step, state, None, config.fit_chunk)
        return state, {"loss": jnp.mean(losses)}

    def update_clone(key, clone, dataset):
        if cloner is None:
            return clone
        key_rows, key_update = jax.random.split(key)
        rows = jax.random.choice(key_rows, dataset.train_rows, (config.batch_size,))
        return cloner.update(key_update, clone, dataset.transitions(rows))[0]

    def sample(key, state, dataset, terms=(), start=None):
        """Weights and scores for make_guide, perhaps first observations (B, O) -> trajectories (B,
        T, D), standardised. Without these B is config.sample_batch, and where the denoiser was
        trained with condition_on_start they are logged ones; where it was not, and they are given,
        they are inpainted."""
        guide = make_guide(terms, dataset, config) if terms else None
        if config.condition_on_start and start is None:
            key, key_start = jax.random.split(key)
            first = jax.random.choice(key_start, dataset.train_starts, (config.sample_batch,))
            start = dataset.steps[first, :obs_dim]
        denoiser = make_denoiser(state.ema, start if config.condition_on_start else None)
        if start is not None and not config.condition_on_start:
            denoiser, guide = fix_start(denoiser, guide, start)
        num = config.sample_batch if start is None else len(start)
        args = denoiser, (num, config.horizon, dataset.steps.shape[-1]), noise_levels(config), guide
        if config.sampler == "heun":
            churn = (config.s_churn, config.s_tmin, config.s_tmax, config.s_noise)
            return sample_heun(key, *args, churn)
        return sample_sde(key, *args, config.eta, config.order)

    def generate(key, state, policy, guided, dataset):
        if not is_zero(config.value_guidance) and policy.q_value is None:
            raise UserError("value guidance needs an agent with a critic, which this one has not")
        clone_log_prob = lambda obs, action: cloner.log_prob(state.clone, obs, action)
        weighted = [
            (config.guidance, policy_score(policy.log_prob)),
            (config.value_guidance, value_score(policy.q_value)),
            (-config.behaviour_guidance, policy_score(clone_log_prob)),
        ]
        own = [(guided * weight, score) for weight, score in weighted if not is_zero(weight)]

        keys = jax.random.split(key, config.trajectories // config.sample_batch)
        alone = batch_axis is None or len(keys) % jax.lax.axis_size(batch_axis) != 0
        keys = keys if alone else own_share(keys, batch_axis)
        x = jax.lax.map(lambda k: sample(k, state, dataset, [*own, *terms]), keys)
        if not alone:
            x = jax.lax.all_gather(x, batch_axis, tiled=True)
        return trajectories_to_transitions(dataset, x.reshape(-1, *x.shape[-2:]))

    def validate(state, dataset):
        losses = jax.lax.map(  # the same 1,024 held-out windows and noises, whatever is trained on
            lambda k: loss_fn(state.ema, draw(k, dataset, dataset.val_starts, 128, Config)),
            jax.random.split(jax.random.fold_in(jax.random.key(0), 2**31 - 1), 8),
        )
        metrics = {"validation_loss": jnp.mean(losses)}
        if cloner is not None:
            t = dataset.transitions(dataset.val_rows[: 2**14])
            metrics["clone_log_prob"] = jnp.mean(cloner.log_prob(state.clone, t.obs, t.action))
        return metrics

    num_chunks = config.fit_steps // config.fit_chunk
    return Generator(init, fit_chunk, num_chunks, generate, validate, config.horizon, sample)


def own_share(tree, axis: str | None):
    """Leading axes (n * B, ...) -> (B, ...): what this one of the mesh axis' n devices works on."""
    if axis is None:
        return tree
    num = jax.lax.axis_size(axis)
    return jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:])[jax.lax.axis_index(axis)], tree)


def make_resampler(config: Config, obs_dim: int = 0, act_dim: int = 0) -> Generator:
    """The log itself as a Generator: nothing to fit; the agent's batches are all real."""
    num = config.batch_size
    return Generator(
        init=lambda key: (),
        fit_chunk=lambda key, state, dataset: (state, {}),
        num_chunks=0,
        generate=lambda key, state, policy, guided, dataset: sample_real(key, dataset, num),
        validate=lambda state, dataset: {},
    )


# --- Train: fit the generator, then rounds of generate, update, evaluate ---


class RoundState(NamedTuple):
    agent: Any
    buffer: Transition  # (buffer_rounds, S, ...) synthetic experience; the oldest is overwritten
    round: chex.Array  # () int32


class Trainer(NamedTuple):
    """One run for one key; jit it, vmap it over keys. The host may instead call the chunks one
    after another, always with the same key, and gets the numbers of `train`."""

    generator: Generator
    generate: Callable  # (key, round_state, gen_state, dataset) -> Transition (S, ...)
    init_rounds: Callable  # (key, gen_state, dataset) -> RoundState
    round_chunk: Callable  # (key, round_state, gen_state, dataset) -> (round_state, metrics)
    fit: Callable  # (key, dataset) -> gen_state, after every chunk
    run_rounds: Callable  # (key, gen_state, dataset) -> (round_state, metrics (rounds,))
    train: Callable  # (key, dataset) -> (gen_state, round_state, metrics (rounds,))


def mix(fake: Transition, real: Transition, num_batches: int) -> Transition:
    """Transitions (n * F, ...) and (n * R, ...) -> n batches of F + R, end to end."""

    def mix_field(f, r):
        f, r = (x.reshape(num_batches, len(x) // num_batches, *x.shape[1:]) for x in (f, r))
        return jnp.concatenate([f, r], axis=1).reshape(-1, *f.shape[2:])

    return jax.tree.map(mix_field, fake, real)


def make_act(agent, agent_state, dataset: Dataset) -> Callable:
    """-> act: observations (..., O) to actions (..., A), both in the environment's own units."""
    mean, std = (x[: dataset.obs_dim] for x in dataset.normalizer)

    def act(obs):
        action = agent.act(agent_state, (obs - mean) / std)
        return unscale_action(dataset, jnp.clip(action, -1.0, 1.0))

    return act


def make_train(
    config: Config,
    agent,
    generator: Generator,
    obs_dim: int,
    act_dim: int,
    evaluate=None,
    report: Callable | None = None,
) -> Trainer:
    """-> Trainer.

    agent: an Agent of agents.py, or anything with its init, update, act and log_prob.
    evaluate(key, act) -> returns (E,): where given, it runs inside the program after every round.
    report(stage, metrics): where given, the host is told so after every chunk of `train`.
    """  # fmt: skip
    num_batches = getattr(agent, "batches_per_update", 1)
    num_real = config.batch_size if config.synthetic == "none" else config.real_batch

    def generate(key, round_state, gen_state, dataset):
        policy = target_policy(agent, round_state.agent)
        guided = jnp.float32(round_state.round > 0)  # the first policy knows nothing yet
        return generator.generate(key, gen_state, policy, guided, dataset)

    def init_rounds(key, gen_state, dataset):
        key_init, _ = jax.random.split(key)
        state = RoundState(agent.init(key_init, obs_dim, act_dim), None, jnp.zeros((), jnp.int32))
        made = jax.eval_shape(generate, key, state, gen_state, dataset)
        empty = jax.tree.map(lambda x: jnp.zeros((config.buffer_rounds, *x.shape), x.dtype), made)
        return state._replace(buffer=empty)

    def round_chunk(key, state, gen_state, dataset):
        _, key_rounds = jax.random.split(key)
        keys = jax.random.split(jax.random.fold_in(key_rounds, state.round), 4)
        key_generate, key_update, key_evaluate, key_probe = keys

        # Generate
        synthetic = generate(key_generate, state, gen_state, dataset)
        slot = state.round % config.buffer_rounds
        buffer = jax.tree.map(lambda b, x: b.at[slot].set(x), state.buffer, synthetic)
        flat = jax.tree.map(lambda b: b.reshape(-1, *b.shape[2:]), buffer)
        size = jnp.minimum(state.round + 1, config.buffer_rounds) * synthetic.reward.shape[0]

        # Update, on batches that mix synthetic and real transitions
        def update_step(agent_state, key):
            key_agent, key_fake, key_real = jax.random.split(key, 3)
            num_fake = num_batches * (config.batch_size - num_real)
            i = jax.random.randint(key_fake, (num_fake,), 0, size)
            fake = jax.tree.map(lambda b: b[i], flat)
            real = sample_real(key_real, dataset, num_batches * num_real)
            return agent.update(key_agent, agent_state, mix(fake, real, num_batches))

        agent_state, metrics = jax.lax.scan(
            update_step, state.agent, jax.random.split(key_update, config.updates)
        )
        metrics = jax.tree.map(jnp.mean, metrics)

        # Evaluate
        for name, t in [("real", sample_real(key_probe, dataset, 1024)), ("synthetic", synthetic)]:
            metrics[f"log_prob_{name}"] = jnp.mean(agent.log_prob(agent_state, t.obs, t.action))
        if evaluate is not None:
            returns = evaluate(key_evaluate, make_act(agent, agent_state, dataset))
            metrics["return"] = jnp.mean(returns)
        return RoundState(agent_state, buffer, state.round + 1), metrics

    def told(stage, results):
        if report is not None:
            jax.debug.callback(functools.partial(report, stage), results[1])
        return results

    def fit(key, dataset):
        step = lambda _, state: told("fit", generator.fit_chunk(key, state, dataset))[0]
        return jax.lax.fori_loop(0, generator.num_chunks, step, generator.init(key))

    def run_rounds(key, gen_state, dataset):
        step = lambda state, _: told("rounds", round_chunk(key, state, gen_state, dataset))
        return jax.lax.scan(step, init_rounds(key, gen_state, dataset), None, config.rounds)

    def train(key, dataset):
        key_fit, key_rounds = jax.random.split(key)
        gen_state = fit(key_fit, dataset)
        return gen_state, *run_rounds(key_rounds, gen_state, dataset)

    return Trainer(generator, generate, init_rounds, round_chunk, fit, run_rounds, train)


# --- Many runs: seeds and a sweep under vmap, spread over devices ---

FIT_FIELDS = {  # floats that may be swept, or change without compiling anew: those of the fit
    "diffusion": ("fit_lr", "ema", "p_mean", "p_std"),
    "world-model": ("model_lr", "model_decay"),
    "none": (),
}
SAMPLE_FIELDS = {  # and those of what comes after
    "diffusion": (
        "guidance", "value_guidance", "behaviour_guidance", "guidance_sine", "sigma_min",
        "sigma_max", "rho", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise",
    ),
    "world-model": ("penalty",),
    "none": (),
}  # fmt: skip
RUN = ("sweep", "seed")  # axes of what every run has for itself; the mesh's are these and "batch"


class Runs(NamedTuple):
    """All runs of one program: every seed at every point of the sweep."""

    keys: chex.PRNGKey  # (seeds,)
    swept: dict[str, chex.Array]  # settings, (points,) each
    common: dict[str, chex.Array]  # () each


def make_runs(config: Config, points: Sequence[dict[str, float]] = ({},)) -> Runs:
    """Seeds of the config at every point -> Runs.

    A field that is 0 throughout stays a constant, so that what it switches off costs nothing.
    """
    fields = FIT_FIELDS[config.synthetic] + SAMPLE_FIELDS[config.synthetic]
    swept = {name: jnp.array([p[name] for p in points], jnp.float32) for name in points[0]}
    own = {name: getattr(config, name) for name in fields if name not in swept}
    common = {name: jnp.float32(value) for name, value in own.items() if value != 0}
    if config.synthetic == "diffusion":
        common["fit_steps"] = jnp.int32(config.fit_steps)
    keys = jax.vmap(jax.random.key)(config.seed + np.arange(config.num_seeds))
    return Runs(keys, swept, common)


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """The config with other values of some fields; "hyper.NAME" is the agent's."""
    own = {name: x for name, x in settings.items() if not name.startswith("hyper.")}
    hyper = {name[6:]: x for name, x in settings.items() if name.startswith("hyper.")}
    return dataclasses.replace(config, **own, hyper=config.hyper | hyper)


def fit_axes(config: Config, swept: Sequence[str]) -> tuple[str, ...]:
    """-> the axes along which generators differ: () is one for all runs."""
    by_sweep = any(name in FIT_FIELDS[config.synthetic] for name in swept)
    by_seed = not config.shared_denoiser and config.synthetic != "none"
    return ("sweep",) * by_sweep + ("seed",) * by_seed


def spread(
    make: Callable, config: Config, mesh, num_points: int = 1, fits: tuple[str, ...] = ()
) -> Trainer:
    """The Trainer of one run -> that of all Runs, which every function takes in its key's place.

    make(config) -> Trainer; mesh: its axes are "sweep", "seed" and "batch"; fits: as of fit_axes.
    Results and states gain the leading axes (points, seeds), generators' those of `fits`. Each
    device works on its own runs, and speaks with no other but to share a batch. Runs are what
    train() makes of the seed's key, but for a shared denoiser, which always has the key of seed 0.
    """
    P, sizes = jax.sharding.PartitionSpec, dict(zip(RUN, (num_points, config.num_seeds)))

    def over(out: tuple[str, ...], method: Callable, *axes: tuple[str, ...]) -> Callable:
        """method(trainer, key, *args) of one run -> f(runs, *args) of all that differ along `out`;
        axes: those that each of the args has."""

        def f(common, swept, key, *args):
            return method(make(with_settings(config, common | swept)), key, *args)

        ins = ((), ("sweep",), ("seed",) if "seed" in out else (), *axes)
        for axis in [a for a in reversed(RUN) if a in out]:
            where = [0 if axis in a else None for a in ins]
            f = jax.vmap(f, where, axis_size=sizes[axis] // mesh.shape[axis])
        spec = lambda a: P(*a)
        f = jax.shard_map(
            f, mesh=mesh, in_specs=(*map(spec, ins),), out_specs=spec(out), check_vma=False
        )

        def of_all(runs, *args):
            swept = runs.swept if "sweep" in out else {}
            return f(runs.common, swept, runs.keys if "seed" in out else jax.random.key(0), *args)

        return of_all

    def fit_key(key):
        return jax.random.split(key)[0]

    def round_key(key):
        return jax.random.split(key)[1]

    def generate(trainer, key, state, gen_state, dataset, index):
        """Round `index` of experience beyond those trained on, for export."""
        key = jax.random.fold_in(jax.random.split(round_key(key))[1], index)
        return trainer.generate(key, state, gen_state, dataset)

    of_config = make(config).generator
    generator = of_config._replace(
        init=over(fits, lambda t, key: t.generator.init(fit_key(key))),
        fit_chunk=over(
            fits, lambda t, key, *args: t.generator.fit_chunk(fit_key(key), *args), fits, ()
        ),
        validate=over(fits, lambda t, key, *args: t.generator.validate(*args), fits, ()),
    )
    of_rounds = lambda name: lambda t, key, *args: getattr(t, name)(round_key(key), *args)
    fit = over(fits, lambda t, key, dataset: t.fit(fit_key(key), dataset), ())
    run_rounds = over(RUN, of_rounds("run_rounds"), fits, ())

    def train(runs, dataset):
        gen_state = fit(runs, dataset)
        return gen_state, *run_rounds(runs, gen_state, dataset)

    return Trainer(
        generator,
        generate=over(RUN, generate, RUN, fits, (), ()),
        init_rounds=over(RUN, of_rounds("init_rounds"), fits, ()),
        round_chunk=over(RUN, of_rounds("round_chunk"), RUN, fits, ()),
        fit=fit,
        run_rounds=run_rounds,
        train=train,
    )


# --- Main: one run on the host, in chunks or fused ---


AT_LEAST_ONE = (
    "num_seeds stride features levels blocks expansion groups kernel fit_steps fit_chunk fit_batch "
    "rounds updates batch_size trajectories sample_batch buffer_rounds eval_episodes export_steps "
    "members elites model_layers model_hidden model_steps model_chunk patience model_batch rollout "
    "guidance_every"
).split()


def check_config(c: Config) -> None:
    """Raise UserError, in one line, for settings that cannot work."""
    rules = {
        f"--{name.replace('_', '-')} must be at least 1": getattr(c, name) >= 1
        for name in AT_LEAST_ONE
    } | {
        "--env and --dataset-path must not be empty": "" not in (c.env, c.dataset_path),
        "--horizon must be at least 2": c.horizon >= 2,
        "--value-guidance, --behaviour-guidance and --condition-on-start need --synthetic "
        "diffusion": c.synthetic == "diffusion"
        or not (c.value_guidance or c.behaviour_guidance or c.condition_on_start),
        "--export needs --synthetic diffusion or world-model": not c.export
        or c.synthetic != "none",
        "--export takes no --sweep: export one setting at a time": not (c.export and c.sweep),
        "--export is for one host: export a finished run's seeds there": not c.export
        or not c.distributed,
        "--coordinator, --num-hosts and --host need --distributed": c.distributed
        or (c.coordinator, c.num_hosts, c.host) == (None, None, None),
        "--devices must be at least 0": c.devices >= 0,
        "--sample-steps must be at least 2": c.sample_steps >= 2,
        "--kernel must be odd": c.kernel % 2 == 1,
        "--features must be a multiple of --groups, and even": c.features % c.groups == 0
        and c.features % 2 == 0,
        f"--levels {c.levels} needs a --horizon that can be halved {c.levels - 1} times": c.horizon
        % 2 ** (c.levels - 1)
        == 0,
        "--fit-steps must be a multiple of --fit-chunk": c.fit_steps % c.fit_chunk == 0,
        "--model-steps must be a multiple of --model-chunk": c.model_steps % c.model_chunk == 0,
        "--elites must be at most --members": c.elites <= c.members,
        "--rollout must be at most --horizon x --sample-batch": c.rollout
        <= c.horizon * c.sample_batch,
        "--model-lr must be above 0": c.model_lr > 0,
        "--model-decay and --penalty must be at least 0": min(c.model_decay, c.penalty) >= 0,
        "--trajectories must be a multiple of --sample-batch": c.trajectories % c.sample_batch == 0,
        "--real-batch must lie between 0 and --batch-size": 0 <= c.real_batch <= c.batch_size,
        "--validation must lie between 0 and 1": 0 < c.validation < 1,
        "--sigma-min must lie between 0 and --sigma-max": 0 < c.sigma_min < c.sigma_max,
        "--rho and --p-std must be above 0": c.rho > 0 and c.p_std > 0,
        "--fit-lr must be above 0": c.fit_lr > 0,
        "--ema must lie between 0 and 1": 0 <= c.ema < 1,
        "--s-churn and --eta must be at least 0": min(c.s_churn, c.eta) >= 0,
        "--seed must be at least 0 and below 2^31": 0 <= c.seed < 2**31 - c.num_seeds,
    }
    for name, value in dataclasses.asdict(c).items():
        rules[f"--{name.replace('_', '-')} must be finite"] = not isinstance(
            value, float
        ) or np.isfinite(value)
    for message, holds in rules.items():
        if not holds:
            raise UserError(message)


def sweep_points(config: Config) -> list[dict[str, float]]:
    """--sweep's words, fields and their values -> every point of the grid; [{}] without a sweep.

    Raises UserError for a field that is unknown, changes shapes or plays no part in this run.
    """
    values: dict[str, list[float]] = {}
    known = {f.name: f.type for f in dataclasses.fields(Config)}
    used = FIT_FIELDS[config.synthetic] + SAMPLE_FIELDS[config.synthetic]
    idle = ("eta",) if config.sampler == "heun" else ("s_churn", "s_tmin", "s_tmax", "s_noise")
    used = tuple(name for name in used if name not in idle)
    known |= {f"hyper.{name}": type(x) for name, x in config.hyper.items()}
    used += tuple(name for name in known if name.startswith("hyper.") and known[name] is float)
    for word in config.sweep:
        try:
            number = float(word)
        except ValueError:
            name = word.lstrip("-").replace("-", "_")
            if name not in known or name in values:
                what = "is named twice" if name in values else "is not a setting"
                raise UserError(f"--sweep {word}: {name} {what}") from None
            if name not in used:
                why = "does nothing here" if known[name] is float else "is not a number to vary"
                why = "changes the log's split" if name == "validation" else why
                raise UserError(
                    f"--sweep {word}: it {why}; with --synthetic {config.synthetic} there are "
                    f"{', '.join(used) or 'none'}"
                ) from None
            values[name] = []
            continue
        if not values:
            raise UserError(f"--sweep wants a field before its values, not {word}")
        values[name].append(number)
    for name, found in values.items():
        if not found or len(set(found)) < len(found):
            raise UserError(f"--sweep {name} wants values, each once")
    points = [dict(zip(values, grid)) for grid in itertools.product(*values.values())]
    for point in points:
        check_config(with_settings(dataclasses.replace(config, sweep=()), point))
    return points


def parse_config(argv: Sequence[str], small_tasks: Sequence[str]) -> Config:
    """Command line -> Config: Config's own values, the preset's over them, single flags over
    those; and flags for the agent's own settings, with the paper's values for the data set."""
    import tyro

    import agents

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--env")
    parser.add_argument("--agent")
    parser.add_argument("--dataset-path", "--dataset_path")
    parser.add_argument("--resume")
    parser.add_argument("--export")
    parser.add_argument("--export-steps", "--export_steps")
    parser.add_argument("--devices")
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-hosts", "--num_hosts")
    parser.add_argument("--host")
    known, others = parser.parse_known_args(argv)
    if known.resume and (others or known.dataset_path or known.env or known.preset or known.agent):
        raise UserError(
            "--resume takes no other flags but --export, --devices and those of the hosts: a run "
            "goes on under its own settings"
        )
    task = known.env or ("" if known.dataset_path else DEFAULT_ENV)
    preset = known.preset or "default"
    if preset == "default" and not task.startswith(tuple(small_tasks)):
        preset = "default-large"
    try:
        hyper = agents.hyperparameters(known.agent or Config.agent, task)
    except ValueError as e:
        raise UserError(str(e)) from e
    own = [
        (name, Annotated[h.type, tyro.conf.arg(help=h.help)], h.default)
        for name, h in hyper.items()
    ]
    Hyper = dataclasses.make_dataclass("Hyper", own, frozen=True)
    field = "hyper", Hyper, dataclasses.field(default=Hyper())
    # Of Config's name and module, so that tyro finds the help lines in Config's source
    Flags = dataclasses.make_dataclass("Config", [field], bases=(Config,), frozen=True)
    Flags.__module__ = Config.__module__
    if hasattr(Config, "__firstlineno__"):  # Python 3.13 goes by it
        Flags.__firstlineno__ = Config.__firstlineno__
    start = Flags(**PRESETS.get(preset, {}))
    usage = "--sweep wants a field, without dashes, and its values: --sweep guidance 0 0.5 1"
    if "--sweep" in argv[:-1] and argv[argv.index("--sweep") + 1].startswith("--"):
        raise UserError(usage)
    flags = tyro.cli(Flags, args=argv, default=start, description=__doc__)
    config = Config(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(Config)})
    config = dataclasses.replace(config, hyper=dataclasses.asdict(flags.hyper))
    if "--sweep" in argv and not config.sweep:
        raise UserError(usage)
    return config


def make_host_evaluate(
    config: Config, simulator: str, agent, dataset: Dataset, num_points: int = 1
) -> Callable:
    """-> evaluate(round, agent_states (points, seeds)) -> returns (points, seeds), in the
    simulator's own physics on the host; a seed starts alike at every point."""
    import data
    import envs as sim

    seeds, episodes = config.seed + np.arange(config.num_seeds), config.eval_episodes
    shape = (num_points, len(seeds), episodes)
    envs = data.make_envs(simulator, np.prod(shape).item())

    @jax.jit
    def act(agent_states, obs):  # (points * seeds * episodes, O) -> (the same, A)
        one = lambda state, obs: make_act(agent, state, dataset)(obs)
        action = jax.vmap(jax.vmap(one))(agent_states, obs.reshape(*shape, -1))
        return action.reshape(np.prod(shape), -1)

    def evaluate(round_index, agent_states):
        entropy = [np.random.SeedSequence((seed, round_index)) for seed in seeds.tolist()]
        starts = np.concatenate([e.generate_state(episodes) for e in entropy] * num_points)
        returns = sim.evaluate_on_host(envs, functools.partial(act, agent_states), starts)
        return returns.reshape(shape).mean(-1)

    return evaluate


class Session(NamedTuple):
    """Everything that a run needs, built from its config."""

    config: Config  # with --precision decided
    task: Any  # data.Task; its log is emptied once the device has it
    dataset: Dataset  # on every device
    agent: Any
    points: list[dict[str, float]]  # of the sweep; [{}] without one
    runs: Runs
    fits: tuple[str, ...]  # axes along which generators differ
    mesh: Any  # of devices, with the axes "sweep", "seed" and "batch"
    trainer: Trainer  # of all runs
    progress: dict[str, Any]  # bars by stage, for a fused run to move
    host_evaluate: Callable | None  # (round, agent_states) -> returns (points, seeds)


def build(config: Config) -> Session:
    """Load the log, put it on the devices and make the trainer: first for one run, then for all."""
    import agents
    import data
    import devices
    import envs
    import world_model

    check_config(config)
    points = sweep_points(config)
    if config.export:
        for seed in range(config.seed, config.seed + config.num_seeds):
            data.refuse_existing_export(data.export_target(config.export, seed, config.num_seeds))
    try:
        for point in points:
            agent = agents.make_agent(config.agent, **with_settings(config, point).hyper)
    except ValueError as e:
        raise UserError(str(e)) from e
    every = [with_settings(config, point) for point in points]
    if agent.q_value is None and any(c.value_guidance for c in every):
        raise UserError(f"--value-guidance needs an agent with a critic, not {config.agent}")
    cloner = agents.bc() if any(c.behaviour_guidance for c in every) else None
    config = dataclasses.replace(config, precision=devices.precision(config.precision))
    fit_batch = config.fit_batch if config.synthetic == "diffusion" else None
    mesh = devices.make_mesh(len(points), config.num_seeds, config.devices, fit_batch)
    name = config.env or (None if config.dataset_path else DEFAULT_ENV)
    task = data.load(name, config.dataset_path, config.source)
    dataset = make_dataset(task.log, config, task.action_low, task.action_high)
    task.release_log()

    dims = dataset.obs_dim, dataset.act_dim
    mjx = config.physics == "mjx" or config.physics == "auto" and config.fused and envs.has_mjx()
    if config.physics == "mjx" and task.simulator not in envs.BODIES:
        raise UserError(f"--physics mjx is for {', '.join(envs.BODIES)}, not for {task.name}")
    evaluate = envs.evaluator_in_program(task.simulator, config.eval_episodes, mjx)
    progress = {}

    def report(stage, metrics):
        if stage in progress:
            progress[stage].update()

    def make(config, batch_axis="batch" if mesh.shape["batch"] > 1 else None):
        agent = agents.make_agent(config.agent, **config.hyper)
        makers = {
            "diffusion": functools.partial(make_diffusion, batch_axis=batch_axis, cloner=cloner),
            "world-model": world_model.make_world_model,
            "none": make_resampler,
        }
        generator = makers[config.synthetic](config, *dims)
        told = report if config.fused else None
        return make_train(config, agent, generator, *dims, evaluate, told)

    runs, fits = make_runs(config, points), fit_axes(config, list(points[0]))
    needed = memory_needed(config, make(config, None), dataset, len(points), fits)
    devices.check_memory(*needed, len(points) * config.num_seeds, mesh)
    runs = devices.put(runs, mesh)
    dataset = devices.put(dataset, mesh)
    trainer = spread(make, config, mesh, len(points), fits)
    host_evaluate = None
    if evaluate is None and task.simulator:
        host_evaluate = make_host_evaluate(config, task.simulator, agent, dataset, len(points))
    return Session(
        config, task, dataset, agent, points, runs, fits, mesh, trainer, progress, host_evaluate
    )


def memory_needed(
    config: Config, trainer: Trainer, dataset: Dataset, num_points: int, fits: tuple[str, ...]
) -> tuple[int, int]:
    """-> (bytes once per device, bytes of each run on it) beside the log, as an estimate.

    A run's state is counted twice, as it is replaced by the next; of what is made on the way, the
    activations of the denoiser, which all runs of a device hold at once.
    """
    import devices

    key = jax.random.key(0)
    gen_state = jax.eval_shape(trainer.generator.init, key)
    state = jax.eval_shape(trainer.init_rounds, key, gen_state, dataset)
    per_run, training = 2 * devices.size_of(state), 2 * devices.size_of(gen_state)
    if config.synthetic == "diffusion":
        width = 4 * config.features * 2 ** (config.levels - 1) * config.horizon
        width *= 2 * (config.kernel + config.expansion + 3)
        per_run += width * config.sample_batch
        training += width * config.blocks * config.fit_batch
    shared_by = np.prod([n for a, n in zip(RUN, (num_points, config.num_seeds)) if a not in fits])
    return (0, per_run + int(training / shared_by)) if fits else (training, per_run)


def train_or_resume(config: Config):
    """Load, fit, rounds, export -> (config, session, run folder, held-out metrics, exported)."""
    import runs

    start, folder, fingerprint = time.monotonic(), None, None
    if config.resume:
        asked = config
        folder, config, fingerprint = runs.Run.resume(config.resume, Config)
        folder.clear()
        here = ("devices", "distributed", "coordinator", "num_hosts", "host")
        config = dataclasses.replace(config, **{name: getattr(asked, name) for name in here})
        if asked.export:
            config = dataclasses.replace(
                config, export=asked.export, export_steps=asked.export_steps
            )
        elif (folder.folder / "final.json").exists():  # it has exported what it was to export
            config = dataclasses.replace(config, export=None)
    elif config.out:
        runs.refuse_existing(config.out)  # now, not after minutes of loading
    session = build(config)
    if fingerprint not in (None, session.task.fingerprint):
        raise UserError(f"the run was trained on another log than {session.task.source}")
    if folder is None:
        path = config.dataset_path and os.path.abspath(config.dataset_path)
        config = dataclasses.replace(session.config, dataset_path=path, source=session.task.kind)
        if config.export and not config.export.startswith("minari:"):
            config = dataclasses.replace(config, export=os.path.abspath(config.export))
        folder = runs.Run.create(config, session.task)
    folder.points = session.points
    folder.seconds["load"] = time.monotonic() - start
    if config.preset == "default" and not config.resume and jax.default_backend() == "cpu":
        if config.features >= PRESETS["default-large"]["features"]:
            print("note: sized for a GPU; on this CPU, --preset laptop", file=sys.stderr)

    gen_state, state = (run_fused if config.fused else run_chunks)(config, session, folder)
    validate = jax.jit(session.trainer.generator.validate)
    held_out = validate(session.runs, gen_state, session.dataset)
    if "sweep" in session.fits:  # a number for each point, else one for all
        mean = lambda x: np.float64(x).reshape(len(session.points), -1).mean(1).tolist()
    else:
        mean = lambda x: float(np.mean(x))
    held_out = {name: mean(value) for name, value in held_out.items()}
    written = export(config, session, gen_state, state) if config.export else []
    return config, session, folder, held_out, written


def run(config: Config) -> dict:
    """One whole run on the host: load, fit, rounds, run folder -> the content of final.json.

    Raises UserError, or an error of data, devices, envs or runs in one line, for a user's mistake.
    """
    config, session, folder, held_out, written = train_or_resume(config)
    final = folder.finish(folder.summary(config, session.task, held_out))
    for target in written:
        print(f"exported: {target}")
    return final


def run_on_host(config: Config) -> dict:
    """This host's share of the seeds, in OUT/host0, OUT/host1, ...; host 0 puts the results of all
    into OUT. If one host fails, all stop."""
    import devices
    import runs

    devices.start_hosts(config.coordinator, config.num_hosts, config.host)
    num, host = jax.process_count(), jax.process_index()
    out = devices.gather(config.resume or config.out or str(runs.default_folder(config)))[0]
    own = f"{out}/host{host}"
    share, rest = divmod(config.num_seeds, num)
    if config.resume:
        before = len(list(pathlib.Path(out).glob("host*")))
        if host == 0 and before not in (0, num):
            raise UserError(f"{out} is of {before} hosts, not of {num}")
        config = dataclasses.replace(config, resume=own)
    elif rest:
        raise UserError(f"--num-seeds {config.num_seeds} does not divide over {num} hosts")
    else:
        seed = config.seed + host * share
        config = dataclasses.replace(config, seed=seed, num_seeds=share, out=own)
    try:
        if not config.resume and host == 0:
            runs.refuse_existing(out)
        config, session, folder, held_out, _ = train_or_resume(config)
    except Exception as e:
        devices.gather({"error": str(e)})
        raise
    own = {"history": folder.history, "seconds": folder.seconds, "held_out": held_out}
    every = devices.gather(own)
    for i, said in enumerate(every):
        if "error" in said:
            raise UserError(f"host {i} stopped: {said['error']}")
    return folder.finish_with_others(config, session.task, every, host)


def run_fused(config: Config, session: Session, folder):
    """Fit and every round as one compiled program -> (gen_state, round_state)."""
    from tqdm import tqdm

    task, trainer, mesh = session.task, session.trainer, session.mesh
    if folder.saved:  # a finished run, resumed
        _, gen_state, state = restore(session, folder)
        return gen_state, state
    sizes = dict(zip(RUN, (len(session.points), config.num_seeds)))
    told = lambda axes: np.prod([(sizes if a in axes else mesh.shape)[a] for a in RUN]).item()
    total = {
        "fit": trainer.generator.num_chunks * told(session.fits) * mesh.shape["batch"],
        "rounds": config.rounds * told(RUN) * mesh.shape["batch"],
    }
    with contextlib.ExitStack() as stack, folder.timed("fused"):
        for stage, num in total.items():
            bar = tqdm(total=num, desc=stage, disable=None)
            session.progress[stage] = stack.enter_context(bar)
        results = jax.jit(trainer.train)(session.runs, session.dataset)
        gen_state, state, metrics = jax.block_until_ready(results)
        jax.effects_barrier()
    for i in range(config.rounds):
        row = {name: values[..., i] for name, values in metrics.items()}
        if session.host_evaluate and i == config.rounds - 1:
            with folder.timed("evaluate"):
                row["return"] = session.host_evaluate(i, state.agent)
        folder.log(i, (i + 1) * config.updates, row, task.score)
    folder.save((np.int32(trainer.generator.num_chunks), gen_state, state), force=True)
    return gen_state, state


def restore(session: Session, folder):
    """-> (fit chunks done, gen_state, round_state): the last checkpoint, or the very beginning."""
    gen_state = jax.jit(session.trainer.generator.init)(session.runs)
    state = jax.jit(session.trainer.init_rounds)(session.runs, gen_state, session.dataset)
    return folder.restore((np.int32(0), gen_state, state))


def run_chunks(config: Config, session: Session, folder):
    """The same in pieces, with progress and checkpoints, from the last one on -> (gen_state,
    round_state)."""
    from tqdm import tqdm

    runs, dataset, trainer = session.runs, session.dataset, session.trainer
    fit_chunk = jax.jit(trainer.generator.fit_chunk, donate_argnums=1)
    round_chunk = jax.jit(trainer.round_chunk, donate_argnums=1)
    done, gen_state, state = restore(session, folder)

    num_chunks = trainer.generator.num_chunks
    with tqdm(total=num_chunks, initial=int(done), desc="fit", disable=None) as bar:
        for chunk in range(int(done), num_chunks):
            with folder.timed("fit"):
                gen_state, metrics = fit_chunk(runs, gen_state, dataset)
                loss = float(np.mean(metrics["loss"]))
            if not np.isfinite(loss):
                flag = "--fit-lr" if config.synthetic == "diffusion" else "--model-lr"
                raise UserError(f"the loss is {loss}; lower {flag}")
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            folder.save((np.int32(chunk + 1), gen_state, state))

    done, first = np.int32(num_chunks), int(np.ravel(state.round)[0])
    with tqdm(total=config.rounds, initial=first, desc="rounds", disable=None) as bar:
        for i in range(first, config.rounds):
            with folder.timed("rounds"):
                state, metrics = round_chunk(runs, state, gen_state, dataset)
                metrics = jax.tree.map(np.asarray, metrics)
            if session.host_evaluate:
                with folder.timed("evaluate"):
                    metrics["return"] = session.host_evaluate(i, state.agent)
            said = folder.log(i, (i + 1) * config.updates, metrics, session.task.score)
            bar.set_postfix_str(said, refresh=False)
            bar.update()
            folder.save((done, gen_state, state), force=i == config.rounds - 1)
    return gen_state, state


def transitions_to_log(t: Transition, length: int, dataset: Dataset) -> dict[str, np.ndarray]:
    """Synthetic transitions (S * length, ...), trajectories end to end -> a log in D4RL's layout
    and the environment's units, with next_observations.

    A trajectory ends at its first terminal, or by a time-out at the last step that starts where the
    one before it ended (a stand-in does not).
    """
    t = Transition(*(np.asarray(x).reshape(-1, length, *x.shape[1:]) for x in t))
    done = t.done > 0
    goes_on = ~done[:, :-1] & np.all(t.obs[:, 1:] == t.next_obs[:, :-1], axis=-1)
    keep = np.cumprod(np.pad(goes_on, ((0, 0), (1, 0)), constant_values=True), axis=1) > 0
    last = keep & (np.cumsum(keep, axis=1) == keep.sum(1, keepdims=True))
    mean, std = (np.asarray(x[: dataset.obs_dim]) for x in dataset.normalizer)
    return {
        "observations": t.obs[keep] * std + mean,
        "actions": np.asarray(unscale_action(dataset, t.action[keep])),
        "rewards": t.reward[keep],
        "terminals": done[keep],
        "timeouts": (last & ~done)[keep],
        "next_observations": t.next_obs[keep] * std + mean,
    }


def export(config: Config, session: Session, gen_state, state) -> list[str]:
    """Write synthetic data under each seed's final policy, whole rounds of trajectories until
    there are --export-steps transitions -> the files written, one per seed."""
    from tqdm import tqdm

    import data

    dataset, seeds = session.dataset, (config.seed + np.arange(config.num_seeds)).tolist()
    generate = jax.jit(session.trainer.generate)
    logs = [[] for _ in seeds]
    rows, i = 0, config.rounds
    with tqdm(total=config.export_steps, desc="export", unit=" steps", disable=None) as bar:
        while rows < config.export_steps:
            made = generate(session.runs, state, gen_state, dataset, jnp.int32(i))
            made = jax.tree.map(np.asarray, made)
            for s, parts in enumerate(logs):
                one = jax.tree.map(lambda x, s=s: x[0, s], made)
                parts.append(transitions_to_log(one, session.trainer.generator.length, dataset))
            rows = min(sum(len(part["rewards"]) for part in parts) for parts in logs)
            i += 1
            bar.update(min(rows, config.export_steps) - bar.n)
    written = []
    for seed, parts in zip(seeds, logs):
        log = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        how = f"world model, penalty {config.penalty:g}"
        if config.synthetic == "diffusion":
            weights = [("guidance", config.guidance), ("value guidance", config.value_guidance),
                       ("behaviour guidance", config.behaviour_guidance)]  # fmt: skip
            how = ", ".join(f"{name} {w:g}" for name, w in weights if w) or "unguided"
            how += ", starting in logged states" * config.condition_on_start
        about = f"synthetic, {how}, {config.agent} seed {seed}, trained on {session.task.source}"
        target = data.export_target(config.export, seed, len(seeds))
        data.export(target, log, session.task, about)
        written.append(target)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exit status 0 only for a finished run, 2 for a user's mistake."""
    import data
    import devices
    import envs
    import runs

    try:
        argv = sys.argv[1:] if argv is None else argv
        config = parse_config(argv, tuple(envs.GYMNAX))
        devices.enable_cache(data.cache_dir() / "compiled")
        (run_on_host if config.distributed else run)(config)
    except (
        UserError, data.DataError, devices.DeviceError, envs.EnvError, runs.RunError, OSError
    ) as e:  # fmt: skip
        print(f"pgd.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("pgd.py: interrupted; go on with --resume and the run's folder", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
