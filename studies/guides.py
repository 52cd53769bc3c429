"""What guides are worth: given starts, a score of your own, evaluation of policies without a
simulator, and the gain in score by each guide.

    P="python pgd.py --env pendulum-medium"; L="--horizon 32 --fit-batch 32"
    $P $L --rounds 2 --updates 3000 --out plain
    $P $L --rounds 1 --updates 1 --condition-on-start --out conditioned
    $P --horizon 8 --fit-batch 64 --rounds 1 --updates 1 --condition-on-start --out short
    python -m studies.guides plain conditioned short
    python -m studies.guides --paired results/pendulum-value/final.json

The runs are of pendulum-medium. The first run is without --condition-on-start, the others with it.
The program saves starts.csv, steering.csv and evaluation.csv. With --paired it prints what each
swept setting adds to the score of the same seed, over its value of 0, averaged over the values of
the other settings.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import agents
import pgd
from host import cli, envs
from host.errors import UserError
from host.run_folder import interval, readable, swept_fields
from studies import claims
from studies.common import Parser, run_study, save_table

NUM = 256  # trajectories of each estimate
EPISODE = 200  # steps of pendulum
POLICIES = ("early1", "early2", "medium", "expert")  # of pendulum, in policies/


class Denoiser(NamedTuple):
    """A fitted diffusion model of one run."""

    name: str  # of the run's folder
    session: cli.Session
    config: pgd.Config
    state: Any  # pgd.DenoiserState

    @property
    def rule(self) -> Callable:
        return cli.guidance_rule(self.session.flags)

    def sample(self, key, terms=(), start=None) -> pgd.Transition:
        """-> trajectories (NUM, T) without successors; terms and start as in pgd.sample."""

        @jax.jit
        def sample(key, state, dataset, start):
            x = pgd.sample(key, state, dataset, self.config, terms, start, self.rule)
            return dataset.split(x)

        return sample(key, self.state, self.session.dataset, start)


def load(run_dir: str, conditioned: bool) -> Denoiser:
    """A finished run's folder -> its denoiser of the first seed. Raises UserError for a run of
    another kind."""
    session, model, _ = claims.load_run(run_dir)
    if model.name != "diffusion" or session.task.simulator != "pendulum":
        raise UserError(f"{run_dir} is not a diffusion run of pendulum-medium")
    if model.config.condition_on_start != conditioned:
        wanted = "with" if conditioned else "without"
        raise UserError(f"{run_dir} should be a run {wanted} --condition-on-start")
    config = dataclasses.replace(model.config, sample_batch=NUM)
    return Denoiser(Path(run_dir).name, session, config, model.of(0))


def dynamics_error(denoiser: Denoiser, t: pgd.Transition) -> np.ndarray:
    """Trajectories (n, T) -> dynamics error (n, T - 1), in variances."""
    dataset = denoiser.session.dataset
    mean, std = claims.obs_scale(dataset)
    obs = np.asarray(t.obs) * std + mean
    action = np.asarray(dataset.unscale_action(t.action))[:, :-1]
    alive = np.ones(action.shape[:2], bool)
    s = claims.Sample(obs[:, :-1], action, None, obs[:, 1:], alive, alive, None, None)
    return claims.dynamics_error(s, claims.make_judge(denoiser.session), std)


def start_rows(denoisers: Sequence[Denoiser]) -> list[dict]:
    """-> the dynamics error of several transitions of a trajectory. Conditioned denoisers start in
    the first states of held-out windows."""
    key, rows = jax.random.key(0), []
    for d in denoisers:
        start, starts, dataset = None, "its own starts", d.session.dataset
        if d.config.condition_on_start:
            windows = jax.random.choice(key, dataset.val_starts, (NUM,))
            start, starts = dataset.steps[windows, : dataset.obs_dim], "given starts"
        error = np.nanmean(dynamics_error(d, d.sample(key, (), start)), axis=0)
        for i in (1, 2, 6, 7, 16, 31):
            if i <= len(error):
                row = {"run": d.name, "starts": starts, "transition": i}
                rows.append(row | {"error": float(error[i - 1])})
    return rows


def steering_rows(denoiser: Denoiser) -> list[dict]:
    """-> mean height of the tip, mean reward and dynamics error of trajectories that are guided up
    the sum of the heights, which is the first observation."""
    score, rows = lambda t: jnp.sum(t.obs[..., 0], axis=-1), []
    for weight in (0.0, 0.25, 1.0, 4.0, 16.0):
        t = denoiser.sample(jax.random.key(0), [(weight, score)])
        error = float(np.nanmean(dynamics_error(denoiser, t)))
        mean, std = claims.obs_scale(denoiser.session.dataset)
        row = {"weight": weight, "height": float(t.obs[..., 0].mean() * std[0] + mean[0])}
        rows.append(row | {"mean_reward": float(t.reward.mean()), "error": error})
    return rows


def make_estimate(denoiser: Denoiser) -> Callable:
    """-> estimate(key, state of agents.sac_n(), weight) -> returns (NUM,) of whole episodes.

    Each window starts where the last one ended. The rewards of the windows are summed and scaled to
    an episode's length.
    """
    dataset, agent = denoiser.session.dataset, agents.sac_n()
    length = denoiser.config.horizon - 1
    num = EPISODE // length

    @jax.jit
    def estimate(key, policy, weight, state, dataset):
        score = pgd.action_score(pgd.target_policy(agent, policy).log_prob)

        def window(obs, key):
            terms = [(weight, score)]
            x = pgd.sample(key, state, dataset, denoiser.config, terms, obs, denoiser.rule)
            t = dataset.split(x)
            return t.obs[:, -1], t.reward[:, :-1].sum(axis=1)

        first = dataset.steps[::EPISODE, : dataset.obs_dim][:500]  # starts of the log's episodes
        obs = jax.random.choice(key, first, (NUM,))
        rewards = jax.lax.scan(window, obs, jax.random.split(key, num))[1]
        return rewards.sum(axis=0) * EPISODE / (num * length)

    return lambda key, policy, weight: estimate(
        key, policy, jnp.float32(weight), denoiser.state, dataset
    )


def evaluation_rows(denoiser: Denoiser) -> list[dict]:
    """-> returns of the shipped policies by the simulator, and as estimated by the denoiser at
    several guidance weights, with standard errors."""
    dataset, key, rows = denoiser.session.dataset, jax.random.key(0), []
    evaluate = envs.evaluator_in_program(denoiser.session.task.simulator, NUM)
    estimate = make_estimate(denoiser)
    for name in POLICIES:
        policy = claims.shipped_policy(f"pendulum-{name}", dataset)
        act = pgd.make_act(agents.sac_n(), policy, dataset)
        found = [("simulator", "", evaluate(key, act))]
        found += [("denoiser", f"{w:g}", estimate(key, policy, w)) for w in (0.0, 4.0, 64.0)]
        for judge, weight, returns in found:
            row = {"run": denoiser.name, "policy": name, "judge": judge, "guidance": weight}
            row |= {"return": float(returns.mean())}
            rows.append(row | {"standard_error": float(returns.std()) / NUM**0.5})
    return rows


def paired(path: Path) -> list[dict]:
    """final.json of a sweep -> what each value of each swept setting adds to the score: mean and
    95 % interval over seeds. Raises UserError where it is not the sweep of a scored task."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with readable(path):
        points = json.loads(path.read_text()).get("sweep")
    if not points or not points[0]["scores"]:
        raise UserError(f"{path} is not of a sweep on a task with scores")
    fields, rows = swept_fields(points), []
    at = {tuple(p[f] for f in fields): np.array(p["scores"]) for p in points}
    for i, field in enumerate(fields):
        base = lambda point, i=i: (*point[:i], 0.0, *point[i + 1 :])
        for value in sorted({point[i] for point in at} - {0.0}):
            added = [at[p] - at[base(p)] for p in at if p[i] == value and base(p) in at]
            if added:
                mean, ci95 = interval(np.mean(added, axis=0).tolist())
                low, high = ci95 or (mean, mean)
                rows.append({"setting": field, "value": value, "added": mean, "low": low,
                             "high": high})  # fmt: skip
    if not rows:
        raise UserError(f"{path} has no setting with the value 0 to compare with")
    return rows


def show(title: str, rows: list[dict]) -> None:
    """Print rows, a line each."""
    print(f"\n{title}")
    for row in rows:
        cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        print("  " + ", ".join(cells))


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    parser = Parser("guides", __doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR",
                        help="one run without --condition-on-start, then runs with it")  # fmt: skip
    parser.add_argument("--paired", metavar="FINAL.json", help="final.json of a sweep")
    parser.add_argument("--out", default="results/guides", help="folder of the results")
    args = parser.parse_args(argv)
    if args.paired:
        rows = paired(Path(args.paired))
        show("added to the score of the same seed, with its 95 % interval", rows)
    elif len(args.runs) < 2:
        raise UserError("give a run without --condition-on-start and one with it, or --paired")
    if not args.runs:
        return
    denoisers = [load(run_dir, conditioned=i > 0) for i, run_dir in enumerate(args.runs)]
    tables = {
        "starts": start_rows(denoisers),
        "steering": steering_rows(denoisers[0]),
        "evaluation": [row for d in denoisers[1:] for row in evaluation_rows(d)],
    }
    for name, rows in tables.items():
        show(name, rows)
        save_table(Path(args.out) / f"{name}.csv", rows)
    print(f"\nsaved: {args.out}/ ({', '.join(f'{name}.csv' for name in tables)})")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("guides", study, argv)


if __name__ == "__main__":
    main()
