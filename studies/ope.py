"""Off-policy evaluation: rank policies by a log alone, without running any of them.

    python -m studies.ope pendulum-medium                       # fits the models, then evaluates
    python -m studies.ope pendulum-medium --policies RUN_DIR mine.npz
    python -m studies.ope RUN_DIR [RUN_DIR ...]                 # finished runs with fitted models
    python -m studies.ope hopper-medium -- --fit-steps 4000     # flags of the models' training

Policies are those of all seeds and sweep points of a run folder of pgd.py, or npz files as in
policies/; the default is all shipped policies of the task. Each one counts as deterministic. Three
methods estimate its discounted return from the first states of the log's episodes: the diffusion
model, whose short windows are guided by the policy and each start where the last one ended;
rollouts of the world model; and fitted Q evaluation (FQE) on the log. Where there is a simulator,
it gives the true returns, and the program reports the rank correlation, the regret of the policy
that is ranked first, and the error. It saves ope.csv and ope.png.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import agents
import data
import pgd
from baselines import world_model
from host import cli, collect, envs, flags, run_folder
from host.errors import UserError
from host.progress import counted
from host.run_folder import interval
from studies import claims
from studies.common import Parser, folder_of, run_study, save_table, split_flags
from studies.figures import COLOURS, new_figure, save_figure

SHORT = "--condition-on-start --horizon 8 --fit-batch 64".split()  # the diffusion model's flags
CHUNK = 500  # updates of FQE in one call
TAU = 0.05  # Polyak rate of FQE: at 0.005, 10,000 updates are about 50 Bellman backups
NAMES = {"diffusion": "guided", "world-model": "world model", "fqe": "log alone"}  # of colours


class Settings(NamedTuple):
    """What an estimate depends on, besides the policy and the model."""

    gamma: float  # discount factor
    limit: int  # steps of an episode
    guidance: float  # exponent of the policy, for the diffusion model
    num: int  # trajectories of an estimate
    updates: int  # gradient steps of FQE


# --- Policies ---


class Policy(NamedTuple):
    """A deterministic policy in the environment's units."""

    name: str
    act: Callable  # (params, obs (..., O)) -> action (..., A), in JAX
    params: Any = ()


def shipped_act(layers: list, obs: chex.Array) -> chex.Array:
    """Layers of a tanh-Gaussian actor, obs (..., O) -> its mean's action (..., A) in [-1, 1]."""
    return jnp.tanh(jnp.split(agents.mlp(layers, obs), 2, axis=-1)[0])


def load_policies(words: Sequence[str], session: cli.Session) -> list[Policy]:
    """Run folders and npz files -> policies. Without any: all that are shipped for the log's
    simulator. Raises UserError for what cannot be read or has other sizes than the log."""
    simulator, dataset = session.task.simulator, session.dataset
    words = words or [
        str(collect.POLICIES / f"{name}.npz")
        for name in collect.shipped_policies(f"{simulator}-*" if simulator else "")
    ]

    def shipped(layers, obs):
        action = shipped_act(layers, obs)
        chex.assert_axis_dimension(action, -1, dataset.act_dim)
        return dataset.unscale_action(action)

    found = [(word, policy) for word in words for policy in load_policy(word, shipped)]
    if len(found) < 2:
        raise UserError("there are fewer than two policies to rank; name them with --policies")
    for word, policy in found:
        try:
            jax.eval_shape(Standardised(policy, dataset).act, jnp.zeros((1, dataset.obs_dim)))
        except (TypeError, ValueError, AssertionError) as e:
            raise UserError(f"{word} has other observations or actions than the log") from e
    return [policy for _, policy in found]


def load_policy(word: str, shipped: Callable) -> list[Policy]:
    """A run folder -> the policy of each of its runs, or an npz file -> its policy; shipped: act of
    a file's layers. Raises UserError for what is neither."""
    path = Path(word)
    if path.is_dir():
        checkpoint = path / "checkpoint" / "state.npz"
        if not checkpoint.is_file():
            raise UserError(f"{word} has no checkpoint, so it has no policy")
        with run_folder.read_checkpoint(checkpoint) as (about, _):
            labels = about["labels"]
        return [from_run(path, label) for label in labels]
    if not path.is_file():
        raise UserError(f"there is no policy {word}; give a run folder or an npz file")
    with run_folder.readable(path):
        layers = collect.Policy.load(path).layers
    return [Policy(path.stem, shipped, [tuple(map(jnp.asarray, layer)) for layer in layers])]


def from_run(path: Path, label: dict[str, float]) -> Policy:
    """A run folder and the label of one of its runs -> Policy."""
    act = run_folder.policy_in_jax(path, **label)
    about = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in label.items())
    return Policy(f"{path.resolve().name}, {about}", lambda _, obs: act(obs))


class Standardised(NamedTuple):
    """A policy as the models see it: what pgd.Generator may ask of one."""

    policy: Policy
    dataset: pgd.Dataset

    def act(self, obs: chex.Array) -> chex.Array:
        """obs (..., O) standardised -> action (..., A) in [-1, 1]."""
        d = self.dataset
        mean, std = d.mean[: d.obs_dim], d.std[: d.obs_dim]
        action = self.policy.act(self.policy.params, obs * std + mean)
        chex.assert_shape(action, (*obs.shape[:-1], d.act_dim))
        return 2.0 * (action - d.action_low) / (d.action_high - d.action_low) - 1.0

    def log_prob(self, obs: chex.Array, action: chex.Array) -> chex.Array:
        """Of a unit Gaussian around the action, up to a constant: the guide's exponent is then the
        inverse variance of the synthetic actions."""
        return -0.5 * jnp.sum((action - self.act(obs)) ** 2, axis=-1)


# --- Estimates: (key, policy, model, dataset, starts (n, O) standardised) -> returns (n,) ---


def with_diffusion(key, policy: Standardised, model, dataset, starts, config, rule, s: Settings):
    """Windows end to end, each conditioned on the last observation of the one before it."""
    length = config.horizon - 1  # transitions of a window
    terms = [(s.guidance, pgd.action_score(policy.log_prob))]

    def window(carry, key):
        obs, alive, first = carry
        x = pgd.sample(key, model, dataset, config, terms, obs, rule)
        t = jax.tree.map(lambda x: x[:, :-1], dataset.split(x))
        going = alive[:, None] * (jnp.cumsum(t.done, axis=1) - t.done == 0)
        index = first + jnp.arange(length)
        weight = jnp.where(index < s.limit, s.gamma**index, 0.0)
        alive = alive * (jnp.sum(t.done, axis=1) == 0)
        return (x[:, -1, : dataset.obs_dim], alive, first + length), (t.reward * going) @ weight

    carry = starts, jnp.ones(len(starts)), jnp.zeros((), jnp.int32)
    keys = jax.random.split(key, -(-s.limit // length))
    return jnp.sum(jax.lax.scan(window, carry, keys)[1], axis=0)


def with_world_model(key, policy: Standardised, model, dataset, starts, config, rule, s: Settings):
    """Rollouts in which a random elite of the ensemble predicts each step."""
    elites, scale = world_model.elites_of(model, config), world_model.target_scale(dataset)
    low, high = jnp.min(dataset.steps, axis=0), jnp.max(dataset.steps, axis=0)

    def step(carry, key):
        obs, alive, discount = carry
        keys = jax.random.split(key, 3)
        p = world_model.predict_with(elites, obs, policy.act(obs), dataset, scale)
        elite = jax.random.randint(keys[0], alive.shape, 0, config.elites), jnp.arange(len(alive))
        after = p.next_obs[elite] + p.obs_std[elite] * jax.random.normal(keys[1], obs.shape)
        after = jnp.clip(after, low[: dataset.obs_dim], high[: dataset.obs_dim])
        reward = p.reward[elite] * alive * discount
        return (after, alive * (p.done[elite] <= 0.5), discount * s.gamma), reward

    carry = starts, jnp.ones(len(starts)), jnp.ones(())
    return jnp.sum(jax.lax.scan(step, carry, jax.random.split(key, s.limit))[1], axis=0)


class Evaluation(NamedTuple):
    """The state of fitted Q evaluation."""

    critic: Any  # of agents.init_critics
    target: Any  # its Polyak average
    opt_state: Any


def fqe_chunk(key, state: Evaluation, policy: Standardised, dataset, index, s: Settings):
    """CHUNK gradient steps of fitted Q evaluation. Q counts in units of value_scale(). Targets are
    clipped to what rewards of the log can sum up to, as in arXiv 2103.16596's code."""
    optimiser = optax.adam(3e-4)
    update = agents.make_step(optimiser, agents.bellman_loss)
    reward = dataset.steps[:, -2] * dataset.std[-2] + dataset.mean[-2]
    least, most = jnp.nanmin(reward), jnp.nanmax(reward)  # of one step, or of endlessly many
    low = jnp.minimum(least, least / (1.0 - s.gamma)) / value_scale(dataset, s)
    high = jnp.maximum(most, most / (1.0 - s.gamma)) / value_scale(dataset, s)

    def step(state, i):
        batch = dataset.sample(jax.random.fold_in(key, index * CHUNK + i), 256)
        batch = batch._replace(reward=batch.reward / value_scale(dataset, s))
        next_q = agents.min_q(state.target, batch.next_obs, policy.act(batch.next_obs))
        target = jnp.clip(agents.bellman_target(batch, s.gamma, next_q), low, high)
        critic, opt_state, _ = update(state.critic, state.opt_state, target, batch)
        return Evaluation(critic, agents.polyak(critic, state.target, TAU), opt_state), None

    return jax.lax.scan(step, state, jnp.arange(CHUNK))[0]


def value_scale(dataset: pgd.Dataset, s: Settings) -> chex.Array:
    """-> the root mean square of the rewards over 1 - gamma, the size of a value."""
    return jnp.hypot(dataset.mean[-2], dataset.std[-2]) / (1.0 - s.gamma)


def init_fqe(key, dataset: pgd.Dataset) -> Evaluation:
    """-> a critic that has not learnt."""
    critic = agents.init_critics(key, 1, dataset.obs_dim, dataset.act_dim, (256, 256))
    return Evaluation(critic, critic, optax.adam(3e-4).init(critic))


def fqe(policies: Sequence[Policy], dataset: pgd.Dataset, starts, num_seeds: int, s: Settings):
    """Fitted Q evaluation on the log -> estimates (policies, seeds). It knows no limit of steps."""

    @functools.partial(jax.jit, static_argnums=0)
    def chunk(act, params, key, state, dataset, index):
        policy = Standardised(Policy("", act, params), dataset)
        return fqe_chunk(key, state, policy, dataset, index, s)

    @functools.partial(jax.jit, static_argnums=0)
    def value(act, params, critic, dataset, starts):
        action = Standardised(Policy("", act, params), dataset).act(starts)
        return jnp.mean(agents.min_q(critic, starts, action)) * value_scale(dataset, s)

    found = np.zeros((len(policies), num_seeds))
    for i, seed in counted(list(np.ndindex(found.shape)), "fitted Q evaluation"):
        key, policy = jax.random.key(seed), policies[i]
        state = init_fqe(key, dataset)
        for index in range(s.updates // CHUNK):
            state = chunk(policy.act, policy.params, key, state, dataset, index)
        found[i, seed] = value(policy.act, policy.params, state.critic, dataset, starts)
    return found


def with_model(model: claims.Model, policies, dataset, starts, num_seeds: int, s: Settings):
    """Estimates (policies, seeds) by a fitted generator of each seed."""
    method = {"diffusion": with_diffusion, "world-model": with_world_model}[model.name]

    @functools.partial(jax.jit, static_argnums=0)
    def estimate(act, params, key, state, dataset, starts):
        policy = Standardised(Policy("", act, params), dataset)
        returns = method(key, policy, state, dataset, starts, model.config, model.rule, s)
        return jnp.mean(returns)

    found = np.zeros((len(policies), num_seeds))
    for i, seed in counted(list(np.ndindex(found.shape)), f"estimates by {model.name}"):
        policy, key = policies[i], jax.random.key(seed)
        found[i, seed] = estimate(policy.act, policy.params, key, model.of(seed), dataset, starts)
    return found


# --- The truth, and how far estimates are from it ---


def true_returns(simulator: str, policy: Policy, s: Settings) -> np.ndarray:
    """-> discounted returns (s.num,) of episodes in the simulator."""
    copies, num = envs.make_envs(simulator, s.num), s.num
    act = jax.jit(policy.act)
    obs, returns, alive = copies.reset(0), np.zeros(num), np.ones(num, bool)
    for discount in s.gamma ** np.arange(min(s.limit, copies.limit)):
        action = np.asarray(act(policy.params, jnp.float32(obs)))
        _, reward, terminal, timeout = copies.step(action)
        obs = copies.obs
        returns += discount * reward * alive
        alive &= ~(terminal | timeout)
        if not alive.any():
            break
    return returns


def quality(true: np.ndarray, estimate: np.ndarray) -> dict[str, float]:
    """True returns (P,) and estimates (P,) -> Spearman's rank correlation; regret of the policy
    that is ranked first and mean absolute error, both in units of the range of the true returns."""
    from scipy.stats import rankdata

    spread, equal = float(np.ptp(true)), np.ptp(estimate) == 0
    return {
        "rank_correlation": 0.0 if equal else np.corrcoef(*map(rankdata, (true, estimate)))[0, 1],
        "regret": float(true.max() - true[np.argmax(estimate)]) / spread,
        "error": float(np.mean(np.abs(true - estimate))) / spread,
    }


# --- The command ---


def first_rows(log: dict[str, np.ndarray]) -> np.ndarray:
    """Log -> the row of each episode's first step."""
    ends = np.flatnonzero(log["terminals"] | log["timeouts"])
    return np.append(0, ends[ends < len(log["rewards"]) - 1] + 1)


def evaluate(run_dirs: Sequence[str], args, argv: Sequence[str], out: Path) -> None:
    """Evaluate the policies by every method and save the results in `out`. Raises UserError."""
    loaded = [claims.load_run(run_dir, argv) for run_dir in run_dirs]
    session, models = loaded[0][0], [model for _, model, _ in loaded]
    if len({s.task.fingerprint for s, _, _ in loaded}) > 1:
        raise UserError("these runs were trained on different logs")
    if any(m.name == "diffusion" and not m.config.condition_on_start for m in models):
        raise UserError("the diffusion model should be fitted with --condition-on-start")
    job, dataset = session.flags.job, session.dataset
    path = session.flags.config.dataset_path
    name = job.env or (None if path else flags.DEFAULT_ENV)
    log = data.load(name, path, job.discrete_as_continuous).log
    policies = load_policies(args.policies, session)
    simulator = session.task.simulator
    limit = args.limit or int(data.episode_returns(log)[1].max())
    s = Settings(args.gamma, limit, args.guidance, args.num, args.updates)
    num_seeds = min(m.config.num_seeds for m in models)
    mean, std = claims.obs_scale(dataset)
    rows = np.random.default_rng(0).choice(first_rows(log), s.num)
    starts = jnp.float32((log["observations"][rows] - mean) / std)
    found = {m.name: with_model(m, policies, dataset, starts, num_seeds, s) for m in models}
    if s.updates:
        found["fqe"] = fqe(policies, dataset, starts, num_seeds, s)
    true = None
    if simulator:
        true = np.array([true_returns(simulator, p, s).mean() for p in policies])
    save(out, session.task.name, policies, found, true, s)


def save(out: Path, name: str, policies, found: dict, true: np.ndarray | None, s: Settings) -> None:
    """Print the tables, and write ope.csv and ope.png."""
    rows = [
        {"policy": p.name, "method": method, "seed": seed, "estimate": float(x)}
        | ({} if true is None else {"true_return": float(true[i])})
        for method, estimates in found.items()
        for i, p in enumerate(policies)
        for seed, x in enumerate(estimates[i])
    ]
    save_table(out / "ope.csv", rows)
    num_seeds = len(next(iter(found.values()))[0])
    print(f"\n{name}: discounted returns (gamma {s.gamma:g}, {s.limit} steps), {num_seeds} seeds\n")
    heads = [*(() if true is None else ("simulator",)), *found]
    print(f"{'policy':<28}" + "".join(f"{h:>28}" for h in heads))
    for i, p in enumerate(policies):
        cells = [] if true is None else [f"{true[i]:.1f}"]
        cells += [spread_of(x[i]) for x in found.values()]
        print(f"{p.name:<28}" + "".join(f"{c:>28}" for c in cells))
    files = ["ope.csv"]
    if true is not None:
        print(f"\n{'method':<16}{'rank correlation':>28}{'regret at 1':>28}{'error':>28}")
        for method, x in found.items():
            q = [quality(true, x[:, seed]) for seed in range(num_seeds)]
            cells = [spread_of([row[k] for row in q], 2) for k in q[0]]
            print(f"{method:<16}" + "".join(f"{c:>28}" for c in cells))
        print("regret and error are in units of the range of the true returns")
        draw(out / "ope.png", name, found, true)
        files.append("ope.png")
    print(f"\nsaved: {out}/ ({', '.join(files)})")


def spread_of(values: Sequence[float], digits: int = 1) -> str:
    """Values over seeds -> their mean, and its 95 % interval in brackets."""
    mean, ci95 = interval([float(v) for v in values])
    if not ci95:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({ci95[0]:.{digits}f} to {ci95[1]:.{digits}f})"


def draw(path: Path, name: str, found: dict, true: np.ndarray) -> None:
    """Estimates against true returns, a panel for each method."""
    figure, axes = new_figure(1, len(found), 3.0, 3.0)
    for ax, (method, estimates) in zip(axes[0], found.items()):
        ax.plot([true.min(), true.max()], [true.min(), true.max()], color="black", ls=":", lw=1)
        for x in estimates.T:
            ax.plot(true, x, "o", ms=4, color=COLOURS[NAMES[method]])
        ax.set(title=method, xlabel="true discounted return", ylabel="estimate")
    figure.suptitle(name)
    save_figure(path, figure)


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    argv, given = split_flags(argv)
    parser = Parser("ope", __doc__)
    parser.add_argument("what", nargs="+", metavar="TASK or RUN_DIR",
                        help="one task, or run folders with fitted models")  # fmt: skip
    parser.add_argument("--policies", nargs="+", default=[], metavar="POLICY",
                        help="run folders or npz files; all shipped ones by default")  # fmt: skip
    parser.add_argument("--num-seeds", type=int, default=4, help="models of each kind")
    parser.add_argument("--num", type=int, default=128, help="trajectories of each estimate")
    parser.add_argument("--gamma", type=float, default=0.99, help="discount factor")
    parser.add_argument("--guidance", type=float, default=64.0,
                        help="exponent of the policy, for the diffusion model")  # fmt: skip
    parser.add_argument("--limit", type=int, help="steps of an episode; the log's longest")
    parser.add_argument("--updates", type=int, default=10_000,
                        help=f"gradient steps of FQE, multiple of {CHUNK}; 0: none")  # fmt: skip
    parser.add_argument("--out", help="folder of the results; the first RUN_DIR, or "
                        "runs/studies/TASK")  # fmt: skip
    args = parser.parse_args(argv)
    if not 0.0 <= args.gamma < 1.0 or args.guidance < 0.0:
        raise UserError("--gamma must be in [0, 1) and --guidance at least 0")
    if min(args.num_seeds, args.num, args.limit or 1) < 1:
        raise UserError("--num-seeds, --num and --limit must be at least 1")
    if args.updates < 0 or args.updates % CHUNK:
        raise UserError(f"--updates must be a multiple of {CHUNK}")
    first = args.what[0]
    if any(Path(w, "config.json").exists() for w in args.what):
        return evaluate(args.what, args, given, Path(args.out or first))
    if len(args.what) > 1 or not first:
        raise UserError("give one task, or run folders")
    out = Path(args.out) if args.out else folder_of(first).with_name(f"ope-{folder_of(first).name}")
    runs = claims.make_runs(first, out, args.num_seeds, [*SHORT, *given], ["diffusion"])
    runs += claims.make_runs(first, out, args.num_seeds, given, ["world-model"])
    evaluate(runs, args, [], out)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("ope", study, argv, "the same command keeps the models that are fitted")


if __name__ == "__main__":
    main()
