"""The method's claims, checked on finished runs.

    python analysis.py RUN_DIR [RUN_DIR ...]      # dynamics error of what each run's denoiser makes

Prints one table, and saves it as dynamics.csv and dynamics.png in the first run's folder.
"""

import argparse
import csv
import dataclasses
import io
import sys
from pathlib import Path

import jax
import numpy as np

import data
import envs
import pgd
import runs


def dynamics_error(run_dir: str, num: int = 256, weight: float = 0.0, **sampler) -> np.ndarray:
    """-> (num, T - 1, O): squared difference between each synthetic next observation and MuJoCo's
    own from the same state and action, in units of that observation's variance over the log.

    The run's first seed, its own sampler settings unless given otherwise; weight is the guidance.
    """
    folder, config, fingerprint = runs.Run.resume(run_dir, pgd.Config)
    session = pgd.build(config)
    if session.task.simulator not in envs.BODIES or config.synthetic != "diffusion":
        raise runs.RunError(f"{run_dir} has no denoiser that a MuJoCo simulator could judge")
    done, gen_state, state = pgd.restore(session, folder)
    if done != session.trainer.generator.num_chunks or fingerprint != session.task.fingerprint:
        raise runs.RunError(f"{run_dir} is not a finished run on the log that is here now")
    if not config.shared_denoiser:
        gen_state = jax.tree.map(lambda x: x[0], gen_state)
    sampler |= {"guidance": weight, "trajectories": num, "sample_batch": num}
    dataset, config = session.dataset, dataclasses.replace(config, **sampler)
    diffusion = pgd.make_diffusion(config, dataset.obs_dim, dataset.act_dim)
    first = jax.tree.map(lambda x: x[0], state.agent)

    @jax.jit
    def generate(gen_state, agent_state, dataset):
        log_prob = lambda obs, action: session.agent.log_prob(agent_state, obs, action)
        t = diffusion.generate(jax.random.key(1), gen_state, log_prob, weight, dataset)
        unit = lambda x: x.reshape(num, config.horizon, -1)[:, :-1]
        obs, next_obs, action = unit(t.obs), unit(t.next_obs), unit(t.action)
        return obs, next_obs, pgd.unscale_action(dataset, action)

    obs, next_obs, action = generate(gen_state, first, dataset)
    mean, std = (np.asarray(x[: dataset.obs_dim]) for x in dataset.normalizer)
    flat = lambda x: np.asarray(x).reshape(-1, x.shape[-1])
    true = envs.step_from(session.task.simulator, flat(obs) * std + mean, flat(action))
    return ((flat(next_obs) * std + mean - true) / std).reshape(*obs.shape) ** 2


SAMPLERS = {
    "as trained": {},
    "16 deterministic": {"sample_steps": 16, "s_churn": 0.0},
    "32 deterministic": {"sample_steps": 32, "s_churn": 0.0},
    "256, S_churn 80": {"sample_steps": 256, "s_churn": 80.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", nargs="+")
    parser.add_argument("--num", type=int, default=256, help="trajectories judged per row")
    parser.add_argument("--guidance", type=float, nargs="*", default=[0.0])
    parser.add_argument("--samplers", nargs="*", default=["as trained"], choices=list(SAMPLERS))
    args = parser.parse_args()
    rows, curves = [], {}
    try:
        for run_dir in args.run_dir:
            for name in args.samplers:
                for weight in args.guidance:
                    error = dynamics_error(run_dir, args.num, weight, **SAMPLERS[name])
                    row = {"run": run_dir, "sampler": name, "guidance": weight}
                    per_step = error.mean(-1)
                    row["mean"] = round(float(per_step.mean()), 5)
                    row["median"] = round(float(np.median(per_step)), 5)
                    rows.append(row)
                    curves[f"{Path(run_dir).name}, {name}, {weight:g}"] = per_step.mean(0)
                    print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    except (data.DataError, envs.EnvError, runs.RunError, pgd.UserError, OSError) as e:
        print(f"analysis.py: {e}", file=sys.stderr)
        sys.exit(2)
    save(Path(args.run_dir[0]), rows, curves)


def save(folder: Path, rows: list[dict], curves: dict) -> None:
    """dynamics.csv and dynamics.png (error against the step in the window)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with runs.atomic_file(folder / "dynamics.csv") as f:
        f.write(text.getvalue().encode())
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, curve in curves.items():
        axes.plot(curve, label=label)
    axes.set(xlabel="step in the window", ylabel="dynamics error (variances)", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    with runs.atomic_file(folder / "dynamics.png") as f:
        figure.savefig(f, dpi=120, format="png")
    print(f"saved: {folder}/dynamics.csv, {folder}/dynamics.png")


if __name__ == "__main__":
    main()
