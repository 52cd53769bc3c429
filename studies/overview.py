"""The figure at the top of the README: how the policy pulls synthetic actions, and the scores.

    python -m studies.overview                # draws it from the csv files in results/study/
    python -m studies.overview --run RUN_DIR  # samples anew first; RUN_DIR is a row of the grid

Left: the first action of synthetic transitions against the policy's own action in the same state,
without guidance and with two weights. The policy is that of the first guided run in RUN_DIR.
Right: learning curves of the row's task, from curves.csv. The samples go into pull.csv, the figure
into overview.png.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import pgd
from host import cli
from host.errors import UserError
from studies import figures, results
from studies.common import Parser, run_study, save_table

WEIGHTS = (0.0, 4.0, 64.0)  # lambda
ARMS = ("log alone", "unguided", "guided")


def pull(run: cli.Loaded, num: int) -> list[dict]:
    """-> num rows for each weight: the policy's action, and the synthetic one, both in [-1, 1]."""
    labels = run.session.layout.labels
    guided = [i for i, x in enumerate(labels) if x.get("guidance", run.config.guidance)]
    if run.session.flags.job.synthetic != "diffusion" or not guided:
        raise UserError("--run needs the folder of a run of the diffusion model with guidance")
    agent, state, rows = run.session.agent, run.agent_state(guided[0]), []
    for weight in WEIGHTS:
        config = dataclasses.replace(
            run.config, guidance=weight, value_guidance=0.0, behaviour_guidance=0.0,
            trajectories=num, sample_batch=num,
        )  # fmt: skip
        policy = pgd.target_policy(agent, state)
        make = lambda key, model, dataset, c=config, p=policy: pgd.generate(
            key, model, p, 1.0, dataset, c
        )
        t = jax.jit(make)(jax.random.key(1_000), run.model(guided[0]), run.dataset)
        kept = slice(0, num * config.horizon, config.horizon)  # the first step of each trajectory
        pairs = zip(np.asarray(agent.act(state, t.obs))[kept, 0], np.asarray(t.action)[kept, 0])
        about = {"task": run.session.task.name, "agent": run.config.agent, "weight": weight}
        rows += [about | {"policy": float(p), "action": float(a)} for p, a in pairs]
    return rows


def draw(out: Path) -> None:
    """Draw overview.png from pull.csv and curves.csv. Raises UserError where one is missing."""
    pairs, curves = results.read(out / "pull.csv"), results.read(out / "curves.csv")
    if not pairs:
        raise UserError(f"{out} has no pull.csv; name a finished row of the grid with --run")
    task, agent = pairs[0]["task"], pairs[0]["agent"]
    published = results.weights_of(agent, task)[0]
    figure, axes = figures.new_figure(1, 1 + len(WEIGHTS), 2.6, 2.6, width_ratios=[1, 1, 1, 1.5])
    for ax, weight in zip(axes[0], WEIGHTS):
        mine = [x for x in pairs if x["weight"] == weight]
        x, y = (np.array([pair[name] for pair in mine]) for name in ("policy", "action"))
        ax.plot([-1, 1], [-1, 1], color="black", lw=0.8)
        colour = figures.COLOURS["guided" if weight else "unguided"]
        ax.scatter(x, y, s=5, alpha=0.5, lw=0, color=colour)
        title = f"λ = {weight:g}" if weight else "unguided, λ = 0"
        ax.set(title=title, xlabel="the policy's action", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
    axes[0, 0].set_ylabel("synthetic action, same state")
    ax = axes[0, -1]
    for arm in ARMS:
        mine = [x for x in curves if (x["task"], x["agent"], x["arm"], x["weight"]) ==
                (task, agent, arm, published)]  # fmt: skip
        if not mine:
            raise UserError(f"{out}/curves.csv lacks {arm} on {task}; run studies.results first")
        bands = [(x["mean"], x["low"], x["high"]) for x in mine]
        figures.line(ax, [x["updates"] for x in mine], bands, arm)
    seeds = int(mine[0]["seeds"])
    ax.set(title=f"{task}, {agent}, {seeds} seeds", xlabel="agent updates")
    ax.set_ylabel("normalised score")
    ax.legend()
    figures.save_figure(out / "overview.png", figure)


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    parser = Parser("overview", __doc__)
    parser.add_argument("--run", metavar="RUN_DIR", help="folder of a run with guidance")
    parser.add_argument("--num", type=int, default=400, help="points of each weight")
    parser.add_argument("--out", default="results/study", help="folder of the csv files")
    args = parser.parse_args(argv)
    if args.num < 1:
        raise UserError("--num must be at least 1")
    out = Path(args.out)
    if args.run:
        save_table(out / "pull.csv", pull(cli.load_run(args.run), args.num))
    draw(out)
    print(f"saved: {out}/ (overview.png{', pull.csv' if args.run else ''})")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("overview", study, argv)


if __name__ == "__main__":
    main()
