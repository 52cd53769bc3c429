"""Quality of the sampler against the number of denoiser calls: what the default rests on.

    python samplers.py halfcheetah-medium -- --preset laptop   # fits the denoisers, then samples
    python samplers.py pendulum-medium --num-seeds 4

Every sampler draws from the same denoisers, one per seed, without guidance and with two weights of
it (the target is TD3+BC trained on the log). Against the log and the 256-level stochastic Heun
sampler of the paper: dynamics error, as analysis.py has it; moments of the steps; log-likelihood of
held-out pairs of steps under a Gaussian with the sample's mean and covariance; log-likelihood of
the actions under the target. Saved: samplers.csv, samplers.png, samplers.md.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import agents
import analysis
import data
import devices
import envs
import pgd
import runs

HEUN = dict(sampler="heun", sigma_max=80.0, sigma_min=0.002, guidance_every=1)
SDE = dict(sampler="sde", sigma_max=20.0, sigma_min=0.01, guidance_every=1)
FAMILIES = {  # name: (settings, levels)
    "stochastic Heun": (HEUN, (256, 128, 64, 32, 16)),
    "deterministic Heun": (HEUN | dict(s_churn=0.0), (128, 32, 16)),
    "DPM++ 2M": (SDE | dict(eta=0.0, order=2, sigma_max=80.0), (64, 32, 16)),
    "DPM++ 2M SDE": (SDE | dict(eta=1.0, order=2, sigma_max=80.0), (64, 32, 16)),
    "SDE, eta 8, order 1": (SDE | dict(eta=8.0, order=1), (64, 32, 16)),
    "SDE, eta 8, order 2": (SDE | dict(eta=8.0, order=2), (64, 32, 24, 16)),
    "the same, pushed at every other level": (
        SDE | dict(eta=8.0, order=2, guidance_every=2), (64, 32, 24, 16)
    ),
    "the same, sigma_max 80": (SDE | dict(eta=8.0, order=2, sigma_max=80.0), (64, 32)),
}  # fmt: skip
REFERENCE = "stochastic Heun", 256


def calls(settings: dict, levels: int) -> int:
    """Denoiser calls for one trajectory."""
    return 2 * levels - 1 if settings["sampler"] == "heun" else levels


def pairs(steps: np.ndarray, alive: np.ndarray | None = None) -> np.ndarray:
    """Trajectories (n, T, D) -> consecutive steps side by side (n * (T - 1), 2 * D); fewer where
    alive (n, T) says that a trajectory had ended."""
    both = np.concatenate([steps[:, :-1], steps[:, 1:]], axis=-1)
    if alive is not None:
        return both[alive[:, 1:]]
    return both.reshape(-1, both.shape[-1])


def gaussian_likelihood(sampled: np.ndarray, held_out: np.ndarray) -> float:
    """Rows (n, D), (m, D) -> mean log density, per dimension, of the second under a Gaussian fitted
    to the first; a ridge of 0.01 variances keeps nearly exact relations from deciding it."""
    dim = sampled.shape[1]
    mean, cov = sampled.mean(0), np.cov(sampled.T) + 0.01 * np.eye(dim)
    x = held_out - mean
    quadratic = np.mean(np.sum(x * np.linalg.solve(cov, x.T).T, axis=1))
    return float(-0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * cov)[1]) / dim)


def as_steps(t, dataset: pgd.Dataset) -> np.ndarray:
    """(obs, action in [-1, 1], ...) of trajectories (n, T, ...) -> (n, T, O + A), standardised."""
    o, a = dataset.obs_dim, dataset.act_dim
    mean, std = (np.asarray(x)[o : o + a] for x in dataset.normalizer)
    pre_tanh = np.arctanh(np.clip(t.action, -0.999, 0.999))
    return np.concatenate([t.obs, (pre_tanh - mean) / std], axis=-1)


def study(run_dir: str, num: int, num_seeds: int, weights: Sequence[float]) -> list[dict]:
    """-> a row per sampler, number of levels, weight and seed; the log itself first."""
    session, model, _ = analysis.load_run(run_dir)
    dataset, length = session.dataset, model.config.horizon - 1
    judge = analysis.make_judge(session)
    std = np.asarray(dataset.normalizer.std[: dataset.obs_dim])
    bc, td3 = agents.bc(), agents.td3_bc()
    clones = analysis.train("bc", bc, dataset, num_seeds, [3_000])[0]
    targets = analysis.train("td3_bc", td3, dataset, num_seeds, [2_000])[0]
    windows = pgd.sample_windows(
        jax.random.key(3), dataset, dataset.val_starts, 2_000, model.config.horizon
    )
    held_out = pairs(np.asarray(windows[..., : dataset.obs_dim + dataset.act_dim]))
    rows = []

    def add(about: dict, t, seed: int):
        """Judge transitions (n, L, ...), obs standardised and actions in [-1, 1]."""
        own = lambda states: jax.tree.map(lambda x: x[seed], states)
        mean = np.asarray(dataset.normalizer.mean[: dataset.obs_dim])
        action = np.asarray(pgd.unscale_action(dataset, t.action))
        going = np.cumsum(t.done, axis=1) == 0
        s = analysis.Sample(
            t.obs * std + mean, action, t.reward, t.next_obs * std + mean, going, going, None, None
        )
        error = analysis.dynamics_error(s, judge, std)
        steps = as_steps(t, dataset)
        rows.append(
            about
            | {
                "seed": seed,
                "error": np.nanmean(error),
                "error_median": np.nanmedian(error),
                "validation": gaussian_likelihood(pairs(steps, going), held_out),
                "mean": np.sqrt(np.mean(steps[going].mean(0) ** 2)),
                "std": steps[going].std(0).mean(),
                "log_prob_target": np.mean(td3.log_prob(own(targets), t.obs, t.action)[going]),
                "log_prob_clone": np.mean(bc.log_prob(own(clones), t.obs, t.action)[going]),
            }
        )

    settings = [
        (name, levels, over | {"sample_steps": levels})
        for name, (over, many) in FAMILIES.items()
        for levels in many
    ]
    bar = tqdm(total=len(settings) * len(weights) * num_seeds, desc="samplers", disable=None)
    for seed in range(num_seeds):
        key = jax.random.key(500 + seed)
        log = pgd.sample_windows(key, dataset, dataset.train_starts, num, model.config.horizon)
        obs, action, reward, done = (np.asarray(x) for x in pgd.split_steps(dataset, log))
        cut = lambda x: x[:, :length]
        t = pgd.Transition(cut(obs), cut(action), cut(reward), obs[:, 1:], cut(done), action[:, 1:])
        add({"sampler": "the log", "levels": 0, "calls": 0, "weight": 0.0}, t, seed)
    for name, levels, over in settings:
        settings_ = analysis.POLICY_ONLY | dict(trajectories=num, sample_batch=num) | over
        config = dataclasses.replace(model.config, **settings_)
        generator = pgd.make_diffusion(config, dataset.obs_dim, dataset.act_dim)

        @jax.jit
        def generate(key, state, agent_state, weight, dataset, generator=generator):
            policy = pgd.target_policy(td3, agent_state)
            return generator.generate(key, state, policy, weight, dataset)

        for weight in weights:
            for seed in range(num_seeds):
                agent_state = jax.tree.map(lambda x, seed=seed: x[seed], targets)
                args = model.of(seed), agent_state, jnp.float32(weight), dataset
                made = generate(jax.random.key(seed), *args)
                t = jax.tree.map(
                    lambda x: np.asarray(x).reshape(num, length + 1, *x.shape[1:])[:, :length], made
                )
                about = {"sampler": name, "levels": levels, "calls": calls(over, levels)}
                add(about | {"weight": weight}, t, seed)
                bar.update()
    bar.close()
    return rows


def summary(rows: list[dict], what: str, name: str, levels: int, weight: float) -> float:
    """Mean over seeds; of errors, the geometric mean."""
    return analysis.band(rows, what, sampler=name, levels=levels, weight=weight)[0]


MEASURES = {
    "error": "dynamics error",
    "validation": "held-out log-likelihood per dimension",
    "std": "spread of the steps (the log's: 1)",
    "log_prob_target": "log-likelihood under the target",
}


def draw(path: Path, rows: list[dict], weights: Sequence[float], title: str) -> None:
    """Each measure against denoiser calls, a curve per family; and error against likelihood under
    the target as guidance grows."""
    figure, axes = analysis.new_figure(1, len(MEASURES) + 1, 3.6, 3.6)
    for i, (name, (over, many)) in enumerate(FAMILIES.items()):
        style = {"marker": "o", "ms": 3, "color": f"C{i}", "label": name}
        xs = [calls(over, n) for n in many]
        for ax, what in zip(axes[0], MEASURES):
            weight = weights[-1] if what == "log_prob_target" else 0.0
            ax.plot(xs, [summary(rows, what, name, n, weight) for n in many], **style)
        for levels in (64, 256):
            if levels not in many:
                continue
            points = [[summary(rows, what, name, levels, w) for w in weights]
                      for what in ("log_prob_target", "error")]  # fmt: skip
            label = f"{name}, {levels}"
            dash = "--" if levels == 256 else "-"
            axes[0, -1].plot(*points, dash, marker="o", ms=3, color=f"C{i}", label=label)
    for ax, (what, label) in zip(axes[0], MEASURES.items()):
        weight = weights[-1] if what == "log_prob_target" else 0.0
        ax.axhline(summary(rows, what, *REFERENCE, weight), color="0.6", ls="--", lw=1)
        if what not in ("log_prob_target", "error"):
            ax.axhline(summary(rows, what, "the log", 0, 0.0), color="black", ls=":", lw=1)
        guided = f", guidance {weight:g}" if weight else ", unguided"
        ax.set(xscale="log", xlabel="denoiser calls", title=label + guided)
        ax.set_xticks([16, 32, 64, 128, 256, 512], ["16", "32", "64", "128", "256", "512"])
        ax.minorticks_off()
        ax.title.set_size(8)
    axes[0, 0].set(yscale="log")
    axes[0, -1].set(
        yscale="log", xlabel="log-likelihood under the target", ylabel="dynamics error",
        title=f"guidance {', '.join(f'{w:g}' for w in weights)}",
    )  # fmt: skip
    axes[0, 1].legend(frameon=False, fontsize=6)
    figure.suptitle(title, fontsize=10)
    analysis.save_figure(path, figure)


def table(rows: list[dict], weights: Sequence[float]) -> str:
    """A line per sampler and number of levels."""
    head = ["sampler", "levels", "calls", "error", "held-out", "mean", "spread"]
    for w in weights[1:]:
        head += [f"target's likelihood, guidance {w:g}", f"error, guidance {w:g}"]
    lines = [head, ["---"] * len(head)]
    base = lambda name, n: summary(rows, "log_prob_target", name, n, 0.0)
    for name, levels in dict.fromkeys((r["sampler"], r["levels"]) for r in rows):
        get = lambda what, w=0.0: summary(rows, what, name, levels, w)
        found = [r for r in rows if (r["sampler"], r["levels"]) == (name, levels)]
        line = [name, str(levels), str(found[0]["calls"]), f"{get('error'):.3g}"]
        line += [f"{get(what):.3f}" for what in ("validation", "mean", "std")]
        for w in weights[1:]:
            if name == "the log":
                line += [f"({base(name, levels):.2f})", "-"]
            else:
                line += [f"{get('log_prob_target', w):.3f}", f"{get('error', w):.3g}"]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exit status 0 only when everything is saved, 2 for a user's mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, flags = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", help="or a log's FILE, with its flags after --")
    parser.add_argument("--num-seeds", type=int, default=2, help="denoisers")
    parser.add_argument("--num", type=int, default=256, help="trajectories per setting and seed")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--out", help="where to save; analysis/TASK if not given")
    args = parser.parse_args(argv)
    try:
        if min(args.num_seeds, args.num) < 1 or min(args.weights) <= 0:
            raise runs.RunError("--num-seeds and --num want at least 1, --weights more than 0")
        out = Path(args.out or Path("analysis") / Path(args.task.replace(":", "-")).stem)
        run_dir = analysis.make_runs(args.task, out, args.num_seeds, flags, ["diffusion"])[0]
        weights = [0.0, *sorted(args.weights)]
        rows = study(run_dir, args.num, args.num_seeds, weights)
        analysis.save_table(out / "samplers.csv", rows)
        title = f"{Path(args.task).stem}, {args.num_seeds} denoisers"
        draw(out / "samplers.png", rows, weights, title)
        text = f"{title}, {args.num} trajectories each\n\n{table(rows, weights)}\n"
        with runs.atomic_file(out / "samplers.md") as f:
            f.write(text.encode())
        print(f"\n{text}\nsaved: {out}/ (samplers.md, samplers.csv, samplers.png)")
    except (
        data.DataError, devices.DeviceError, envs.EnvError, runs.RunError, pgd.UserError, OSError
    ) as e:  # fmt: skip
        print(f"samplers.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("samplers.py: interrupted; the same command keeps what is fitted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
