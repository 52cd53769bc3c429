"""What the critics of finished runs know: how far they agree, and how they order actions.

    python -m studies.critics RUN_DIR [RUN_DIR ...]

For the first seed of each run the program compares the logged actions, the agent's own and uniform
ones: the mean Q over 4,096 logged states, and the standard deviation of Q over the ensemble. It
saves critics.csv.

Where the simulator can be put into a logged state, the program also measures every seed and sweep
point against true values: discounted returns of an action that the agent's own policy follows for
500 steps, from 256 logged states. It saves values.csv, with the mean value of the agent's own
actions by the critics (`value`) and in truth (`true_value`), and with the rank correlation between
the values of eight uniform actions by the critics and in truth, as its mean over states (`order`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import agents
from host import cli, envs
from host.errors import UserError
from host.progress import counted
from studies import claims
from studies.common import Parser, markdown_of, run_study, save_table

NUM = 4_096  # logged states, for the agreement
STATES, ACTIONS, STEPS = 256, 8, 500  # for the true values: logged states, uniform actions of each


def load(run_dir: str) -> cli.Loaded:
    """A finished run's folder -> the run. Raises UserError for an agent without critics."""
    run = cli.load_run(run_dir)
    if not hasattr(run.state.agent, "critic"):
        raise UserError(f"{run_dir}: {run.config.agent} has no critics")
    return run


def agreement(name: str, run: cli.Loaded) -> list[dict]:
    """A finished run -> a row per kind of action, of its first seed."""
    state, config = run.agent_state(0), run.config
    layer_norm = config.agent == "rebrac"
    batch = run.dataset.sample(jax.random.key(0), NUM)
    own = run.session.agent.act(state, batch.obs)
    uniform = jax.random.uniform(jax.random.key(1), own.shape, minval=-1.0)
    about = {"run": name, "agent": config.agent}
    about["updates"] = config.rounds * config.updates
    about["distance_to_log_actions"] = float(jnp.sqrt(jnp.mean((own - batch.action) ** 2)))
    rows = []
    for kind, action in (("log", batch.action), ("own", own), ("uniform", uniform)):
        q = agents.critics(state.critic, batch.obs, action, layer_norm)  # (critics, NUM)
        spread = float(q.std(axis=0).mean())
        rows.append(about | {"actions": kind, "q_mean": float(q.mean()), "q_std": spread})
    return rows


def true_values(judge: Callable, act: Callable, obs, action, gamma: float, steps: int):
    """obs (N, O), action (N, A) -> discounted returns (N,) of the action, and of `act` after it, in
    `steps` steps of the simulator. judge: as envs.make_judge gives it; act: obs (N, O) -> actions;
    all in the environment's units."""
    total, alive = np.zeros(len(obs)), np.ones(len(obs), bool)
    for discount in gamma ** np.arange(steps):
        next_obs, reward, terminal = judge(obs, action)
        total += np.where(alive, discount * reward, 0.0)
        alive &= ~np.asarray(terminal, bool)
        obs = np.where(alive[:, None], next_obs, obs)
        action = act(obs)
    return total


def order(values: np.ndarray, truth: np.ndarray) -> float:
    """values, truth (S, K) of K actions in each of S states -> the mean over states of Spearman's
    rank correlation; a state whose values are all equal counts 0."""
    from scipy.stats import rankdata

    x, y = (rankdata(v, axis=1) - (v.shape[1] + 1) / 2 for v in (values, truth))
    size = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    return float(np.mean((x * y).sum(1) / np.where(size > 0, size, 1.0)))


def against_truth(name: str, run: cli.Loaded) -> list[dict]:
    """A finished run -> a row per seed and sweep point; none without a judge of its simulator."""
    dataset, session, simulator = run.dataset, run.session, run.session.task.simulator
    judge = envs.make_judge(simulator) if simulator else None
    if judge is None:
        return []
    (mean, std), (shift, scale) = claims.obs_scale(dataset), cli.reward_units(session.flags.job)
    layer_norm, hyper = run.config.agent == "rebrac", session.flags.hyper
    of_log = dataset.sample(jax.random.key(0), STATES).obs
    shape = (STATES, ACTIONS, dataset.act_dim)
    uniform = jax.random.uniform(jax.random.key(1), shape, minval=-1.0).reshape(-1, shape[-1])
    act_in_jax = jax.jit(session.agent.act)

    @jax.jit
    def q_value(state, obs, action):
        return agents.critics(state.critic, obs, action, layer_norm).min(axis=0)

    def in_training_units(obs, action):
        next_obs, reward, terminal = judge(obs, action)
        return next_obs, (reward + shift) * scale, terminal

    rows = []
    for i, label in counted(list(enumerate(session.layout.labels)), f"true values of {name}"):
        state, gamma = run.agent_state(i), label.get("hyper.gamma", hyper["gamma"])

        def act(obs):
            action = act_in_jax(state, jnp.float32((obs - mean) / std))
            return np.asarray(dataset.unscale_action(action))

        def compare(obs, action):
            at, first = np.asarray(obs) * std + mean, np.asarray(dataset.unscale_action(action))
            truth = true_values(in_training_units, act, at, first, gamma, STEPS)
            return np.asarray(q_value(state, obs, action)), truth

        value, truth = compare(of_log, act_in_jax(state, of_log))
        q, true_q = compare(jnp.repeat(of_log, ACTIONS, axis=0), uniform)
        point = ", ".join(f"{k} {v:g}" for k, v in label.items() if k != "seed")
        rows.append({
            "run": name, "agent": run.config.agent, "point": point, "seed": label["seed"],
            "updates": run.config.rounds * run.config.updates,
            "value": float(value.mean()), "true_value": float(truth.mean()),
            "order": order(*(x.reshape(STATES, ACTIONS) for x in (q, true_q))),
        })  # fmt: skip
    return rows


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    parser = Parser("critics", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folders of finished runs")
    parser.add_argument("--out", default="results/agents", help="folder of the csv files")
    args = parser.parse_args(argv)
    runs = [(Path(run_dir).name, load(run_dir)) for run_dir in args.runs]
    saved = []
    for name, measure in (("critics.csv", agreement), ("values.csv", against_truth)):
        rows = [row for run in runs for row in measure(*run)]
        if rows:
            print(f"{markdown_of(rows)}\n")
            save_table(Path(args.out) / name, rows)
            saved.append(name)
    print(f"saved: {args.out}/ ({', '.join(saved)})")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("critics", study, argv)


if __name__ == "__main__":
    main()
