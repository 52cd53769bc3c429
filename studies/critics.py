"""Agreement of the critics of finished runs, in logged states.

    python -m studies.critics RUN_DIR [RUN_DIR ...]

For the first seed of each run the program compares the logged actions, the agent's own and uniform
ones: the mean Q over 4,096 logged states, and the standard deviation of Q over the ensemble. It
saves critics.csv.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import agents
from host import cli
from host.errors import UserError
from studies.common import Parser, markdown_of, run_study, save_table

NUM = 4_096  # logged states


def critic_rows(run_dir: str) -> list[dict]:
    """A finished run's folder -> a row per kind of action. Raises UserError for an agent without an
    ensemble of critics."""
    run = cli.load_run(run_dir)
    state, config = run.agent_state(0), run.config
    if not hasattr(state, "critic"):
        raise UserError(f"{run_dir}: {config.agent} has no critics")
    layer_norm = config.agent == "rebrac"
    batch = run.dataset.sample(jax.random.key(0), NUM)
    own = run.session.agent.act(state, batch.obs)
    uniform = jax.random.uniform(jax.random.key(1), own.shape, minval=-1.0)
    about = {"run": Path(run_dir).name, "agent": config.agent}
    about["updates"] = config.rounds * config.updates
    about["distance_to_log_actions"] = float(jnp.sqrt(jnp.mean((own - batch.action) ** 2)))
    rows = []
    for name, action in (("log", batch.action), ("own", own), ("uniform", uniform)):
        q = agents.critics(state.critic, batch.obs, action, layer_norm)  # (critics, NUM)
        spread = float(q.std(axis=0).mean())
        rows.append(about | {"actions": name, "q_mean": float(q.mean()), "q_std": spread})
    return rows


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    parser = Parser("critics", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folders of finished runs")
    parser.add_argument("--out", default="results/agents", help="folder of critics.csv")
    args = parser.parse_args(argv)
    rows = [row for run_dir in args.runs for row in critic_rows(run_dir)]
    print(markdown_of(rows))
    save_table(Path(args.out) / "critics.csv", rows)
    print(f"\nsaved: {args.out}/ (critics.csv)")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("critics", study, argv)


if __name__ == "__main__":
    main()
