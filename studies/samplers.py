"""Quality of the samplers against the number of denoiser calls, on which the default rests.

    python -m studies.samplers pendulum-medium --num-seeds 4 -- --horizon 32 --fit-batch 32
    python -m studies.samplers halfcheetah-medium -- --preset laptop   # flags of the denoisers' fit
    python -m studies.samplers gaussian -- --eta 2  # one sampler on data whose denoiser is exact

Every sampler draws from the same denoisers, one per seed, without guidance and with two guidance
weights. The target policy is TD3+BC, trained on the log. The program measures the dynamics error,
as studies.claims does; the moments of the steps; the log-likelihood of held-out pairs of steps
under a Gaussian with the sample's mean and covariance; and the log-likelihood of the actions under
the target. It saves samplers.csv and samplers.png. For `gaussian` it prints the samples' standard
deviations over those of Gaussian observations, by their variance.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import agents
import pgd
from host import cli, flags
from host.errors import UserError
from host.progress import counted
from studies import claims
from studies.common import (
    Parser,
    folder_of,
    markdown,
    markdown_of,
    run_study,
    save_table,
    split_flags,
)
from studies.figures import ORDER, new_figure, save_figure

HEUN = {"sampler": "heun", "sigma_max": 80.0, "sigma_min": 0.002, "rho": 7.0}
SDE = {"sampler": "sde", "sigma_max": 20.0, "sigma_min": 0.01, "rho": 7.0}
WIDE = SDE | {"sigma_max": 80.0}
FIELDS = "sampler", "sigma_min", "rho", "eta"  # and the highest level of the run
DEFAULT = {name: getattr(pgd.Config, name) for name in FIELDS}


class Family(NamedTuple):
    """A sampler at several numbers of levels."""

    settings: dict[str, Any]  # of pgd.Config
    levels: tuple[int, ...]
    style: tuple[str, str]  # colour and dash of its curve


FAMILIES = {
    "stochastic Heun": Family(HEUN, (256, 128, 64, 32, 16), (ORDER[0], "-")),
    "deterministic Heun": Family(HEUN | {"s_churn": 0.0}, (128, 32, 16), (ORDER[0], "--")),
    "DPM++ 2M": Family(WIDE | {"eta": 0.0}, (64, 32, 16), (ORDER[2], "--")),
    "DPM++ 2M SDE": Family(WIDE | {"eta": 1.0}, (64, 32, 16), (ORDER[2], "-")),
    "SDE, eta 8": Family(SDE | {"eta": 8.0}, (64, 32, 24, 16), (ORDER[1], "-")),
    "SDE, eta 8, sigma_max 80": Family(WIDE | {"eta": 8.0}, (64, 32), (ORDER[1], ":")),
    "the default": Family(DEFAULT, (64, 32, 16), (ORDER[3], "-")),
}
REFERENCE = "stochastic Heun", 256
LOG = "the log"


def calls(settings: dict[str, Any], levels: int) -> int:
    """-> denoiser calls per trajectory."""
    return 2 * levels - 1 if settings["sampler"] == "heun" else levels


# --- Measure ---


def pairs(steps: np.ndarray, alive: np.ndarray | None = None) -> np.ndarray:
    """Trajectories (n, T, D) -> pairs of consecutive steps (n * (T - 1), 2 * D).

    alive (n, T): whether a trajectory goes on at this step; pairs whose second step does not are
    left out.
    """
    both = np.concatenate([steps[:, :-1], steps[:, 1:]], axis=-1)
    return both[alive[:, 1:]] if alive is not None else both.reshape(-1, both.shape[-1])


def gaussian_likelihood(sampled: np.ndarray, held_out: np.ndarray) -> float:
    """Rows (n, D), (m, D) -> mean log density, per dimension, of the second under a Gaussian fitted
    to the first. A ridge of 0.01 variances keeps nearly exact relations from deciding it."""
    dim = sampled.shape[1]
    mean, cov = sampled.mean(0), np.cov(sampled.T) + 0.01 * np.eye(dim)
    x = held_out - mean
    quadratic = np.mean(np.sum(x * np.linalg.solve(cov, x.T).T, axis=1))
    return float(-0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * cov)[1]) / dim)


def as_steps(t: pgd.Transition, dataset: pgd.Dataset) -> np.ndarray:
    """Trajectories (n, T, ...) -> standardised observations and actions before tanh
    (n, T, O + A)."""
    o, a = dataset.obs_dim, dataset.act_dim
    mean, std = (np.asarray(x)[o : o + a] for x in (dataset.mean, dataset.std))
    pre_tanh = np.arctanh(np.clip(t.action, -0.999, 0.999))
    return np.concatenate([t.obs, (pre_tanh - mean) / std], axis=-1)


class Bench(NamedTuple):
    """What every sampler is measured with."""

    session: cli.Session
    judge: claims.Judge
    clones: Any  # states (seeds, ...) of agents.bc() after 3,000 updates on the log
    targets: Any  # states (seeds, ...) of agents.td3_bc() after 2,000 updates on the log
    held_out: np.ndarray  # (m, 2 * (O + A)) pairs of held-out steps


def make_bench(session: cli.Session, num_seeds: int) -> Bench:
    """Train the target policy and a clone of the behaviour policy, one per seed."""
    dataset = session.dataset
    clones = claims.train("bc", agents.bc(), dataset, num_seeds, [3_000])[0]
    targets = claims.train("td3_bc", agents.td3_bc(), dataset, num_seeds, [2_000])[0]
    horizon = session.flags.config.horizon
    windows = dataset.windows(jax.random.key(3), dataset.val_starts, 2_000, horizon)
    held_out = pairs(np.asarray(windows[..., : dataset.obs_dim + dataset.act_dim]))
    return Bench(session, claims.make_judge(session), clones, targets, held_out)


def measure(bench: Bench, t: pgd.Transition, seed: int) -> dict[str, float]:
    """Trajectories (n, L, ...) in numpy, observations standardised -> their measures."""
    dataset = bench.session.dataset
    own = lambda states: jax.tree.map(lambda x: x[seed], states)
    mean, std = claims.obs_scale(dataset)
    action = np.asarray(dataset.unscale_action(t.action))
    going = np.cumsum(t.done, axis=1) == 0
    obs, next_obs = t.obs * std + mean, t.next_obs * std + mean
    s = claims.Sample(obs, action, t.reward, next_obs, going, going, None, None)
    error = claims.dynamics_error(s, bench.judge, std)
    steps = as_steps(t, dataset)
    under = lambda agent, states: np.mean(agent.log_prob(own(states), t.obs, t.action)[going])
    return {
        "error": np.nanmean(error),
        "error_median": np.nanmedian(error),
        "validation": gaussian_likelihood(pairs(steps, going), bench.held_out),
        "mean": np.sqrt(np.mean(steps[going].mean(0) ** 2)),
        "std": steps[going].std(0).mean(),
        "log_prob_target": under(agents.td3_bc(), bench.targets),
        "log_prob_clone": under(agents.bc(), bench.clones),
    }


def logged(dataset: pgd.Dataset, num: int, horizon: int, seed: int) -> pgd.Transition:
    """-> (num, horizon - 1, ...) windows of the log in numpy."""
    key = jax.random.key(500 + seed)
    t = dataset.split(dataset.windows(key, dataset.train_starts, num, horizon))
    t = t._replace(next_obs=t.obs[:, 1:], next_action=t.action[:, 1:])
    return jax.tree.map(lambda x: np.asarray(x)[:, : horizon - 1], t)


def make_sampler(config: pgd.Config, num: int, rule: Callable = pgd.make_guide) -> Callable:
    """-> sample(key, model, agent_state, weight, dataset) -> Transition (num, horizon - 1, ...) in
    numpy, under TD3+BC in this state."""
    generator = pgd.make_diffusion(config, rule=rule)

    @jax.jit
    def generate(key, model, agent_state, weight, dataset):
        policy = pgd.target_policy(agents.td3_bc(), agent_state)
        return generator.generate(key, model, policy, weight, dataset)

    def sample(*args) -> pgd.Transition:
        split = lambda x: np.asarray(x).reshape(num, config.horizon, *x.shape[1:])
        return jax.tree.map(lambda x: split(x)[:, :-1], generate(*args))

    return sample


def sample_all(run_dir: str, num: int, num_seeds: int, weights: Sequence[float]) -> list[dict]:
    """Folder of a diffusion run -> a row per sampler, number of levels, weight and seed, those of
    the log first."""
    session, model, _ = claims.load_run(run_dir)
    dataset, bench = session.dataset, make_bench(session, num_seeds)
    rows = []
    for seed in range(num_seeds):
        about = {"sampler": LOG, "levels": 0, "calls": 0, "weight": 0.0, "seed": seed}
        t = logged(dataset, num, model.config.horizon, seed)
        rows.append(about | measure(bench, t, seed))
    settings = [(name, f, levels) for name, f in FAMILIES.items() for levels in f.levels]
    parts = [(*s, w) for s in settings for w in weights]
    for name, family, levels, weight in counted(parts, "samplers"):
        own = claims.POLICY_ONLY | family.settings | {"sample_steps": levels}
        own |= {"trajectories": num, "sample_batch": num}
        if weight == weights[0]:
            sample = make_sampler(dataclasses.replace(model.config, **own), num, model.rule)
        for seed in range(num_seeds):
            target = jax.tree.map(lambda x, seed=seed: x[seed], bench.targets)
            args = model.of(seed), target, jnp.float32(weight), dataset
            t = sample(jax.random.key(seed), *args)
            about = {"sampler": name, "levels": levels}
            about |= {"calls": calls(family.settings, levels), "weight": weight}
            rows.append(about | {"seed": seed} | measure(bench, t, seed))
    return rows


# --- Figure and table ---


def mean_of(rows: list[dict], what: str, name: str, levels: int, weight: float) -> float:
    """-> mean over seeds of a sampler's measure; of errors, the geometric mean."""
    return claims.band(rows, what, sampler=name, levels=levels, weight=weight)[0]


MEASURES = {
    "error": "dynamics error (variances)",
    "validation": "held-out log-likelihood per dimension (nats)",
    "std": "spread of the steps (the log's: 1)",
    "log_prob_target": "log-likelihood under the target (nats)",
}


def draw(path: Path, rows: list[dict], weights: Sequence[float], title: str) -> None:
    """Each measure against denoiser calls, a curve per family; and dynamics error against
    likelihood under the target as guidance grows, at 64 and 256 levels."""
    figure, axes = new_figure(1, len(MEASURES) + 1, 3.6, 3.6)
    at = {what: weights[-1] if what == "log_prob_target" else 0.0 for what in MEASURES}
    for name, family in FAMILIES.items():
        colour, dash = family.style
        style = {"marker": "o", "ms": 3, "color": colour, "ls": dash}
        xs = [calls(family.settings, n) for n in family.levels]
        for ax, (what, weight) in zip(axes[0], at.items()):
            ys = [mean_of(rows, what, name, n, weight) for n in family.levels]
            ax.plot(xs, ys, label=name, **style)
        for levels in sorted({64, 256} & set(family.levels)):
            x, y = ([mean_of(rows, what, name, levels, w) for w in weights]
                    for what in ("log_prob_target", "error"))  # fmt: skip
            axes[0, -1].plot(x, y, **style | {"marker": "s" if levels == 256 else "o"})
    for ax, (what, weight) in zip(axes[0], at.items()):
        ax.axhline(mean_of(rows, what, *REFERENCE, weight), color="0.6", ls="--", lw=1)
        if what not in ("log_prob_target", "error"):
            ax.axhline(mean_of(rows, what, LOG, 0, 0.0), color="black", ls=":", lw=1)
        guided = f"guidance {weight:g}" if weight else "unguided"
        ax.set(xscale="log", xlabel="denoiser calls", ylabel=MEASURES[what], title=guided)
        ax.set_xticks([16, 32, 64, 128, 256, 512], ["16", "32", "64", "128", "256", "512"])
        ax.minorticks_off()
    axes[0, 0].set(yscale="log")
    axes[0, -1].set(
        yscale="log",
        xlabel=MEASURES["log_prob_target"],
        ylabel=MEASURES["error"],
        title=f"guidance {', '.join(f'{w:g}' for w in weights)}; squares: 256 levels",
    )
    axes[0, 1].legend(fontsize=6, handlelength=4)
    figure.suptitle(title)
    save_figure(path, figure)


def table(rows: list[dict], weights: Sequence[float]) -> str:
    """-> a table in Markdown with a line per sampler and number of levels."""
    heads = ["sampler", "levels", "calls", "error", "held-out", "mean", "spread"]
    for w in weights[1:]:
        heads += [f"likelihood under the target, guidance {w:g}", f"error, guidance {w:g}"]
    lines = [heads]
    for name, levels in dict.fromkeys((r["sampler"], r["levels"]) for r in rows):
        get = lambda what, w=0.0: mean_of(rows, what, name, levels, w)
        found = next(r for r in rows if (r["sampler"], r["levels"]) == (name, levels))
        cells = [name, str(levels), str(found["calls"]), f"{get('error'):.3g}"]
        cells += [f"{get(what):.3f}" for what in ("validation", "mean", "std")]
        for w in weights[1:]:
            if name == LOG:
                cells += [f"{get('log_prob_target'):.3f}", "-"]
            else:
                cells += [f"{get('log_prob_target', w):.3f}", f"{get('error', w):.3g}"]
        lines.append(cells)
    return markdown(lines)


# --- An exact denoiser ---

VARIANCES = (150.0, 30.0, 3.0, 1.0, 0.1, 0.01)


def spread_of_gaussian(config: pgd.Config, num: int = 100_000) -> np.ndarray:
    """-> standard deviations of num samples over those of Gaussian observations with VARIANCES,
    where the denoiser is exact and all that is wrong is the sampler's."""
    variance, key = jnp.array(VARIANCES) / config.obs_noise**2, jax.random.key(0)
    exact = lambda x, sigma: x * variance / (variance + sigma**2)
    args = exact, (num, 1, len(VARIANCES)), pgd.noise_levels(config)
    if config.sampler == "heun":
        churn = config.s_churn, config.s_tmin, config.s_tmax, config.s_noise
        x = jax.jit(lambda key: pgd.sample_heun(key, *args, churn))(key)
    else:
        x = jax.jit(lambda key: pgd.sample_sde(key, *args, config.eta))(key)
    return np.asarray(x.std((0, 1)) / jnp.sqrt(variance))


# --- Main ---


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    argv, given = split_flags(argv)
    parser = Parser("samplers", __doc__)
    parser.add_argument("task", help="name of a task, or a log's file with its --env after --")
    parser.add_argument("--num-seeds", type=int, default=2, help="number of denoisers")
    parser.add_argument("--num", type=int, default=256, help="trajectories per setting and seed")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.25, 1.0],
                        help="guidance weights; 0 is always added")  # fmt: skip
    parser.add_argument("--out", help="folder of the results; runs/studies/TASK if not given")
    args = parser.parse_args(argv)
    if min(args.num_seeds, args.num) < 1:
        raise UserError("--num-seeds and --num must be at least 1")
    if not np.isfinite(args.weights).all() or min(args.weights) <= 0:
        raise UserError("--weights must be above 0")
    if not args.task:
        raise UserError("the task has no name")
    if args.task == "gaussian":
        spread = spread_of_gaussian(flags.parse(given).config)
        row = {f"{v:g}": f"{s:.2f}" for v, s in zip(VARIANCES, spread)}
        return print(markdown_of([{"variance of the data": "deviation of samples"} | row]))
    out = Path(args.out) if args.out else folder_of(args.task)
    run_dir = claims.make_runs(args.task, out, args.num_seeds, given, ["diffusion"])[0]
    weights = [0.0, *sorted(set(args.weights))]
    rows = sample_all(run_dir, args.num, args.num_seeds, weights)
    title = f"{Path(args.task).stem}, {args.num_seeds} denoisers, {args.num} trajectories each"
    save_table(out / "samplers.csv", rows)
    draw(out / "samplers.png", rows, weights, title)
    print(f"\n{title}\n\n{table(rows, weights)}\n\nsaved: {out}/ (samplers.csv, samplers.png)")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("samplers", study, argv, "the same command keeps the denoisers that are fitted")


if __name__ == "__main__":
    main()
