"""Which part of synthetic data costs the agent its score.

    python -m studies.links RUN_DIR --out results/links/NAME

RUN_DIR is a finished run of the diffusion model. The denoiser of each seed makes unguided
trajectories. The simulator is put into each of their states, takes the synthetic action, and says
what the next observation, the reward and the terminal should have been, and which observation it
has in that state. The two differ where no state has the synthetic observation: its distance to what
the simulator reads back is the error `obs`. The run's agent is then trained anew on the
trajectories as they are, on copies in which the truth replaces one part, all three that follow the
action, or the observation as well, and on as many windows of the log; batches have no other
transitions. Where all is true, what is left of the distance to the log is due to which states and
actions are sampled.

The table has the score over the second half of the updates, and the difference to the log, seed by
seed. It is saved as scores.csv, the errors of the trajectories as errors.csv, the learning curves
as curves.png.
"""

import dataclasses
import types
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import pgd
from host import cli, envs
from host.errors import UserError
from host.files import say
from host.progress import counted
from studies import claims, curves
from studies.common import Parser, markdown_of, run_study, save_table

LOG = "the log"
PARTS = {  # label -> what the simulator replaces
    "synthetic": (),
    "true rewards": ("reward",),
    "true next observations": ("next_obs",),
    "true terminals": ("done",),
    "all three true": ("reward", "next_obs", "done"),
    "true observations too": ("obs", "reward", "next_obs", "done"),
}


def make_synthetic(run: cli.Loaded, index: int, num: int) -> pgd.Transition:
    """-> (num * horizon, ...), unguided trajectories of the denoiser of seed `index`."""
    config = dataclasses.replace(
        run.config, trajectories=num, guidance=0.0, value_guidance=0.0, behaviour_guidance=0.0
    )
    nobody = types.SimpleNamespace(act=None, q_value=None)
    make = lambda key, model, dataset: pgd.generate(key, model, nobody, 0.0, dataset, config)
    return jax.jit(make)(jax.random.key(1_000 + index), run.model(index), run.dataset)


def from_log(run: cli.Loaded, index: int, num: int) -> pgd.Transition:
    """-> (num * horizon, ...), windows of the log in the form of synthetic trajectories."""
    dataset, key = run.dataset, jax.random.key(1_000 + index)
    x = dataset.windows(key, dataset.train_starts, num, run.config.horizon)
    return pgd.trajectories_to_transitions(dataset, x)


def truth_of(run: cli.Loaded, t: pgd.Transition) -> pgd.Transition:
    """-> t with the simulator's observations, next observations, rewards and terminals, where those
    are finite."""
    simulator = run.session.task.simulator
    mean, std = claims.obs_scale(run.dataset)
    obs, action = np.asarray(t.obs) * std + mean, np.asarray(run.dataset.unscale_action(t.action))
    next_obs, reward, terminal = envs.make_judge(simulator)(obs, action)
    shift, scale = cli.reward_units(run.session.flags.job)
    known = np.isfinite(next_obs).all(-1) & np.isfinite(reward)
    keep = lambda new, old: jnp.where(known.reshape(-1, *[1] * (old.ndim - 1)), new, old)
    return t._replace(
        obs=keep(np.float32((envs.make_readback(simulator)(obs) - mean) / std), t.obs),
        next_obs=keep(np.float32((next_obs - mean) / std), t.next_obs),
        reward=keep(np.float32((reward + shift) * scale), t.reward),
        done=keep(np.float32(terminal), t.done),
    )


def with_truth(t: pgd.Transition, truth: pgd.Transition, parts: Sequence[str]) -> pgd.Transition:
    """-> t with `parts` from the truth; and, where its own terminals go, the next observations,
    which a terminal has none of."""
    made = t._replace(**{part: getattr(truth, part) for part in parts})
    if "done" in parts and "next_obs" not in parts:
        revived = (t.done > 0) & (truth.done == 0)
        made = made._replace(next_obs=jnp.where(revived[:, None], truth.next_obs, t.next_obs))
    return made


def errors_of(t: pgd.Transition, truth: pgd.Transition) -> dict[str, float]:
    """-> errors of synthetic transitions: mean squares, those of observations in units of the log's
    variance; missed terminals as a share of the true ones, false ones of the synthetic."""
    going = t.done == 0
    share = lambda part, whole: float(jnp.sum(part * whole) / jnp.maximum(jnp.sum(whole), 1.0))
    square = jnp.mean((t.next_obs - truth.next_obs) ** 2, axis=-1)[going]
    reward = (t.reward - truth.reward) ** 2
    return {
        "obs": float(jnp.mean((t.obs - truth.obs) ** 2)),
        "next_obs_mean": float(square.mean()), "next_obs_median": float(jnp.median(square)),
        "reward": float(reward.mean() / jnp.var(truth.reward)),
        "terminals": float(t.done.sum()), "true_terminals": float(truth.done.sum()),
        "missed": share(1.0 - t.done, truth.done), "false": share(1.0 - truth.done, t.done),
    }  # fmt: skip


def fixed(t: pgd.Transition) -> pgd.Generator:
    """-> a generator whose model is what it generates, of the shape of t (S, ...)."""
    return pgd.Generator(
        init=lambda key, dataset: jax.tree.map(jnp.zeros_like, t),
        fit=None,
        generate=lambda key, model, policy, weight, dataset: model,
        validate=lambda model, dataset: {},
    )


def train(run: cli.Loaded, data: Sequence[pgd.Transition], name: str) -> dict:
    """Train the run's agent on nothing but data, one Transition (S, ...) per seed -> its learning
    curve, {updates: {seed: score}}."""
    session, config = run.session, dataclasses.replace(run.config, real_batch=0, buffer_rounds=1)
    program = pgd.make_program(config, session.agent, lambda _: fixed(data[0]))
    program, runs = pgd.over_seeds(program, config)
    state = jax.jit(program.init)(runs, run.dataset)
    state = state._replace(model=jax.tree.map(lambda *x: jnp.stack(x), *data))
    one_round, evaluate = jax.jit(program.round, donate_argnums=1), cli.make_evaluate(session)
    curve, seeds = {}, [label["seed"] for label in session.layout.labels]
    for i in counted(range(config.rounds), name):
        state, _ = one_round(runs, state, run.dataset)
        scores = session.task.score(evaluate(i, state.agent))
        curve[(i + 1) * config.updates] = dict(zip(seeds, map(float, scores)))
    return curve


def check(run: cli.Loaded, folder: str) -> None:
    """Raise UserError for a run that cannot be studied."""
    job, task = run.session.flags.job, run.session.task
    if job.synthetic != "diffusion":
        raise UserError(f"{folder} has no diffusion model; give a run with --synthetic diffusion")
    if run.session.layout.num_runs != run.config.num_seeds:
        raise UserError(f"{folder} is a sweep; give a run with one value of every setting")
    if envs.make_judge(task.simulator) is None or task.reference is None:
        raise UserError(f"no simulator of {task.name} can be put into a state and give a score")


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    parser = Parser("links", __doc__)
    parser.add_argument("run", metavar="RUN_DIR", help="folder of a finished run")
    parser.add_argument("--num", type=int, default=4_096, help="trajectories per seed")
    parser.add_argument("--rounds", type=int, help="rounds of updates, if other than the run's")
    parser.add_argument("--updates", type=int, help="updates per round, if other than the run's")
    parser.add_argument("--out", required=True, help="folder of the tables and the figure")
    args = parser.parse_args(argv)
    run = cli.load_run(args.run)
    check(run, args.run)
    config = run.config
    length = {"rounds": args.rounds or config.rounds, "updates": args.updates or config.updates}
    if min(args.num, *length.values()) < 1 or args.num % config.sample_batch:
        raise UserError(
            f"--num must be a multiple of {config.sample_batch}, the run's --sample-batch, and "
            "--rounds and --updates positive"
        )
    given = run.session.flags
    given = given._replace(config=dataclasses.replace(config, **length))
    run = run._replace(session=run.session._replace(flags=given))
    seeds = range(config.num_seeds)
    say(f"{args.num} trajectories of each of {len(seeds)} seeds")
    made = [make_synthetic(run, i, args.num) for i in seeds]
    truth = [truth_of(run, t) for t in made]
    errors = [{"seed": config.seed + i} | errors_of(made[i], truth[i]) for i in seeds]
    sources = {LOG: [from_log(run, i, args.num) for i in seeds]}
    for label, parts in PARTS.items():
        sources[label] = [with_truth(made[i], truth[i], parts) for i in seeds]
    found = {label: train(run, data, label) for label, data in sources.items()}
    rows, out = curves.compare(found), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_table(out / "errors.csv", errors)
    save_table(out / "scores.csv", rows)
    curves.draw(out / "curves.png", found, f"{run.session.task.name}, unguided trajectories")
    print(f"{markdown_of(errors)}\n\n{markdown_of(rows)}\n")
    print(f"saved: {out}/ (scores.csv, errors.csv, curves.png)")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("links", study, argv)


if __name__ == "__main__":
    main()
