"""How well a denoiser has learnt its log after so many steps, by optimiser and batch.

    python -m studies.fits collect:hopper-medium-replay --steps 4000 16000
    python -m studies.fits pendulum-medium --steps 5000x16 4000x32 --optimisers muon
    python -m studies.fits pendulum-medium --optimisers muon --name long-ema -- --ema 0.9995

5000x16 are 5,000 steps of 16 windows; 5000 alone takes the batch of the run. For each of these and
each optimiser a denoiser is fitted from the start, since the learning rate falls to 0 over the
steps. The table has its held-out loss, and five measures of 2,048 unguided trajectories: the
dynamics error (see docs/claims.md), the distance of observations to what the simulator reads back
in their states, in units of the log's variance, the spread, which is the standard deviation of
observations divided by that of logged windows, the share of trajectories that reach a terminal, and
the slope of actions on those of a clone of the log's policy in the same states, divided by that of
held-out steps of the log. It compares fits to one log: the clone learns from the same windows, so a
slope of 1 does not prove that actions depend on states as in the log.
It goes into results/fits/TASK.csv, or TASK-NAME.csv. Flags of pgd.py follow a --.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import agents
import pgd
from host import cli, envs, flags
from host.errors import UserError
from host.files import say
from studies import claims
from studies.common import Parser, folder_of, markdown_of, run_study, save_table, split_flags


def adam(config: pgd.Config) -> optax.GradientTransformation:
    """Adam with the schedule of pgd.make_optimiser."""
    unit = optax.warmup_cosine_decay_schedule(0.1, 1.0, config.fit_steps // 10, config.fit_steps)
    return optax.adam(lambda step: config.fit_lr * unit(step))


OPTIMISERS: dict[str, tuple[Callable, float]] = {  # name -> (config -> optimiser, its rate)
    "adam": (adam, 2e-3),
    "adam, 5e-3": (adam, 5e-3),
    "muon": (pgd.make_optimiser, 5e-3),
}


def fit(session: cli.Session, config: pgd.Config, optimiser: Callable, seed: int):
    """-> (pgd.DenoiserState, milliseconds per step, without the first chunk's compilation)."""
    dataset, key = session.dataset, jax.random.key(seed)
    before, pgd.make_optimiser = pgd.make_optimiser, optimiser
    try:
        state = pgd.init_diffusion(key, dataset, config)
        chunk = jax.jit(lambda key, state: pgd.fit_diffusion(key, state, dataset, config))
        state, num = jax.block_until_ready(chunk(key, state)[0]), config.fit_steps
        start = time.monotonic()
        for done in range(config.fit_chunk, num, config.fit_chunk):
            state, metrics = jax.block_until_ready(chunk(key, state))
            if done % max(config.fit_chunk, num // 5) < config.fit_chunk:
                say(f"  {done}/{num}: loss {float(metrics['loss']):.3f}")
        steps = max(1, num - config.fit_chunk)
        return state, 1e3 * (time.monotonic() - start) / steps
    finally:
        pgd.make_optimiser = before


def make_clone(dataset: pgd.Dataset, num: int = 4_000) -> Callable:
    """-> act: obs (..., O) -> action (..., A) of a clone of the policy of the training episodes."""
    agent = agents.bc(hidden=(128, 128))

    def draw(key):
        i = jax.random.randint(key, (256,), 0, dataset.train_rows.shape[0])
        return dataset.transitions(dataset.train_rows[i])

    key, state = jax.random.key(0), agent.init(jax.random.key(1), dataset.obs_dim, dataset.act_dim)
    state, _ = jax.jit(lambda state: pgd.update_agent(key, agent, state, draw, num))(state)
    return lambda obs: agent.act(state, obs)


def slope(act: Callable, obs, action) -> float:
    """Least-squares slope of actions (..., A) on act(obs (..., O)), all entries together."""
    clone = act(obs)
    clone = clone - clone.reshape(-1, clone.shape[-1]).mean(0)
    return float(jnp.sum(clone * action) / jnp.sum(clone**2))


def quality(session: cli.Session, config: pgd.Config, state, judge, clone, seed: int) -> dict:
    """-> measures of 2,048 unguided trajectories, and of as many windows of the log."""
    dataset, keys = session.dataset, jax.random.split(jax.random.key(seed + 1), 4)
    config = dataclasses.replace(config, sample_batch=512)
    draw = lambda key: pgd.sample(key, state, dataset, config)
    x = np.concatenate(jax.jit(lambda keys: jax.lax.map(draw, keys))(keys))
    log = np.asarray(dataset.windows(keys[0], dataset.train_starts, len(x), config.horizon))
    error = claims.dynamics_error(claims.as_sample(dataset, x), judge, claims.obs_scale(dataset)[1])
    error = error[np.isfinite(error)]
    spread = lambda x: x[..., : dataset.obs_dim].std(axis=(0, 1))
    ended = lambda x: float(np.asarray(dataset.split(x).done).any(axis=1).mean())
    found = {}
    if readback := envs.make_readback(session.task.simulator):
        mean, std = claims.obs_scale(dataset)
        obs = x[..., : dataset.obs_dim].reshape(-1, dataset.obs_dim) * std + mean
        found = {"obs_error": float(np.mean(((readback(obs) - obs) / std) ** 2))}
    made, held_out = dataset.split(jnp.asarray(x)), dataset.transitions(dataset.val_rows)
    alive = jnp.cumsum(made.done, axis=1) == made.done  # up to the first terminal
    made = jax.tree.map(lambda x: x[alive], made._replace(next_obs=None, next_action=None))
    of_log = slope(clone, held_out.obs, held_out.action)
    return found | {
        "action_slope": slope(clone, made.obs, made.action) / of_log,
        "error_mean": error.mean(), "error_median": np.median(error),
        "spread": float(np.mean(spread(x) / spread(log))),
        "terminal": ended(x), "terminal_in_log": ended(log),
    }  # fmt: skip


def compare(session: cli.Session, names: Sequence[str], lengths: Sequence[tuple], num_seeds: int):
    """-> a row per optimiser and length, (steps, batch), with means over the seeds."""
    rows, judge, dataset = [], claims.make_judge(session), session.dataset
    clone = make_clone(dataset)
    for name in names:
        optimiser, rate = OPTIMISERS[name]
        for num, batch in lengths:
            own = {"fit_steps": num, "fit_batch": batch, "fit_lr": rate}
            config = dataclasses.replace(session.flags.config, **own)
            validate = jax.jit(lambda state, c=config: pgd.validate_diffusion(state, dataset, c))
            found = []
            for seed in range(num_seeds):
                say(f"{name}, {num} steps of {batch} windows, seed {seed}")
                state, cost = fit(session, config, optimiser, seed)
                loss = float(validate(state)["validation_loss"])
                kept = {"ms_per_step": cost, "seconds": cost * num / 1e3, "held_out_loss": loss}
                found.append(kept | quality(session, config, state, judge, clone, seed))
            about = {"optimiser": name, "steps": num, "batch": batch, "seeds": num_seeds}
            means = {key: float(np.mean([x[key] for x in found])) for key in found[0]}
            rows.append(about | means)
    return rows


def length_of(word: str, config: pgd.Config) -> tuple[int, int]:
    """STEPS or STEPSxBATCH -> (steps, windows in a step)."""
    if not (found := re.fullmatch(r"([1-9]\d{0,8})(?:x([1-9]\d{0,5}))?", word)):
        raise UserError(f"--steps needs words such as 5000 or 5000x16, not {word}")
    num, batch = int(found[1]), int(found[2] or config.fit_batch)
    if num % config.fit_chunk:
        raise UserError(f"--steps must be multiples of --fit-chunk {config.fit_chunk}")
    return num, batch


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    argv, more = split_flags(argv)
    parser = Parser("fits", __doc__)
    parser.add_argument("task", help="a task with a simulator")
    parser.add_argument("--steps", nargs="+", default=[str(pgd.Config.fit_steps)],
                        metavar="STEPSxBATCH", help="of the denoiser's training")  # fmt: skip
    parser.add_argument("--optimisers", nargs="+", choices=list(OPTIMISERS),
                        default=list(OPTIMISERS), help="those to compare")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="number of denoisers of each kind")
    parser.add_argument("--name", help="part of the table's name, for other settings")
    parser.add_argument("--out", default="results/fits", help="folder of the table")
    args = parser.parse_args(argv)
    words = ["--env", args.task, "--devices", "1", "--guidance", "0", *more]
    given = flags.parse(words)
    lengths = [length_of(word, given.config) for word in args.steps]
    rows = compare(cli.open_session(given), args.optimisers, lengths, args.seeds)
    name = folder_of(args.task).name + (f"-{args.name}" if args.name else "")
    path = Path(args.out) / f"{name}.csv"
    save_table(path, rows)
    print(markdown_of(rows))
    print(f"saved: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("fits", study, argv)


if __name__ == "__main__":
    main()
