"""Break the code in one place at a time, and see which test notices.

    python tests/mutants.py                 # all: hours on two cores; Ctrl-C prints the table
    python tests/mutants.py pgd.py          # those of one file
    python tests/mutants.py --list          # only check that every mutant still applies

A mutant is a line of a file and what it is changed to. Each is tried in a copy of the project, with
the tests that should notice, up to the first one that fails. Survivors are listed at the end, and
the exit status is 1 where more than 5 % survive. pytest does not collect this file.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

METHOD = "test_edm.py test_guidance.py test_train.py test_dataset.py test_returns.py"
TESTS = {  # file -> tests that should notice
    "pgd.py": METHOD,
    "agents.py": "test_agents.py",
    "data.py": "test_data.py test_collect.py test_fitted.py",
    "baselines/world_model.py": "test_world_model.py",
    "baselines/behaviour.py": "test_guidance.py",
    "baselines/paper_guide.py": "test_guidance.py",
    "host/logs.py": "test_logs.py test_data.py",
    "host/layouts.py": "test_logs.py",
    "host/minari.py": "test_minari.py",
    "host/spread.py": "test_train.py test_survival.py test_spread.py",
    "host/run_folder.py": "test_run_folder.py test_survival.py test_flags.py test_cli.py",
    "host/cli.py": "test_export.py test_fitted.py test_run_folder.py test_train.py test_cli.py",
    "host/flags.py": "test_flags.py",
    "host/envs.py": "test_envs.py",
}


class Mutant(NamedTuple):
    file: str
    old: str  # occurs exactly once in the file
    new: str


def mutants(file: str, *changes: tuple[str, str]) -> list[Mutant]:
    return [Mutant(file, old, new) for old, new in changes]


MUTANTS = [
    *mutants(
        "pgd.py",
        # the data set
        ("(first + horizon <= end), times", "(first + horizon <= 1 + end), times"),
        ("terminals[end] | (first", "(first"),
        ("max(1, horizon // 2), 1)", "1, 1)"),
        ("mean[-1] = std[-1] = 0.5", "pass"),
        # returns of n steps
        ("goes_on, out = follows & (t.done == 0), t", "goes_on, out = follows, t"),
        ("for _ in range(n - 1):", "for _ in range(n):"),
        ("t.reward + gamma * rest.reward", "t.reward + rest.reward"),
        ("1.0 - gamma * (1.0 - rest.done)", "rest.done"),
        ("self.successors[rows[:-1]] == self.usable[rows[1:]]", "rows[1:] > 0"),
        ("jnp.roll(synthetic.obs, -1, axis=0), axis=-1)", "synthetic.next_obs, axis=-1)"),
        ("gamma = agent.gamma if c.n_step > 1 else 1.0", "gamma = 0.99"),
        ("lengths.sum() / 2 - 1)", "2 * lengths.sum())"),
        ("lengths *= terminals[ends] | (lengths > config.horizon)", "pass"),
        ("x if b is None else b", "1 if b is None else b"),
        ("-(-config.trajectories // config", "(config.trajectories // config"),
        ("-(-config.fit_steps // config", "(config.fit_steps // config"),
        ("jax.lax.stop_gradient(q))), 1e-6)", "jax.lax.stop_gradient(q))), 0.0)"),
        ("c.real_batch, c.n_step, gamma)", "c.real_batch)"),
        ("(self.steps[index, -1] > 0)", "(self.steps[index, -1] > 9)"),
        ("np.clip(unit, -0.999, 0.999)", "np.clip(unit, -0.9, 0.9)"),
        ("np.where(terminals[usable], usable, usable + 1)", "usable + 1"),
        ("rows = starts[~held_out[starts]],", "rows = starts,"),
        ("rows += np.flatnonzero(~held_out[usable]),", "rows += np.arange(len(usable)),"),
        ("(raw[..., -1] > 0.5)", "(raw[..., -1] > 0.9)"),
        ("(action + 1.0) * 0.5", "(action + 1.0)"),
        ("timeouts[-1] |= not terminals[-1]", "pass"),
        ("max(part, config.horizon + 1)\n", "max(part, config.horizon)\n"),
        # transitions of sampled trajectories
        ("(jnp.cumsum(t.done, axis=1) == t.done) &", "(t.done >= 0) &"),
        ("((t.done > 0) | ~last)).ravel()", "(t.done >= 0)).ravel()"),
        ("((t.done == 0) & ~last).ravel()", "(0 * t.done + ~last > 0).ravel()"),
        ("jnp.argsort(~kept, stable=True)[", "jnp.arange(kept.size)["),
        ("(jnp.cumsum(~kept) - 1) % jnp.sum(kept)", "0 * jnp.cumsum(~kept)"),
        # network, loss, schedule
        ("c_skip = SIGMA_DATA**2 /", "c_skip = 1.01 * SIGMA_DATA**2 /"),
        ("jnp.log(sigma) / 4.0)  # c_noise", "jnp.log(sigma))  # c_noise"),
        ("(SIGMA_DATA**-2 + s**-2)", "s**-2"),
        ("config.sample_steps) ** config.rho, 0.0)", "config.sample_steps) ** 7.0, 0.0)"),
        ("axis=(-3, -1), epsilon=1e-5", "axis=-1, epsilon=1e-5"),
        ("h = group_norm(h, config.groups) * (1.0 + scale) + shift",
         "h = group_norm(h, config.groups)"),
        ("jnp.array([config.obs_noise, 1.0,", "jnp.array([0.25, 1.0,"),
        ("config.obs_noise, 1.0, jnp.inf])", "config.obs_noise, 1.0, 1.0])"),
        ("jnp.nan_to_num(s, posinf=0.0) * noise", "sigma[:, None, None] * noise"),
        # samplers
        ("gamma = jnp.minimum(s_churn / num, 2**0.5 - 1)", "gamma = s_churn / num"),
        ("noise = s_noise * jax", "noise = jax"),
        ("gamma * (2.0 + gamma)", "gamma"),
        ("dt * 0.5 * (d_cur + d_next)", "dt * d_cur"),
        ("0.5 * h[i] / h[i - 1] * (denoised - last)", "0.0 * denoised"),
        ("keep = jnp.exp(-(1.0 + eta) * h[i])", "keep = jnp.exp(-h[i])"),
        ("-jnp.expm1(-2.0 * eta * h[i])", "-jnp.expm1(-eta * h[i])"),
        ("sample_sde(key, *args, config.eta)", "sample_sde(key, *args)"),
        ("denoiser(scale * x, sigma) / scale", "denoiser(x, sigma)"),
        ("return scale * (sample_heun", "return 1.0 * (sample_heun"),
        # guidance
        ("jax.lax.stop_gradient(t.obs), t.action", "t.obs, t.action"),
        ("v, v_u = s**2 * SIGMA_DATA**2 /", "v, v_u = 2 * s**2 * SIGMA_DATA**2 /"),
        ("jnp.stack([config.obs_noise * sigma, sigma])", "jnp.stack([sigma, sigma])"),
        ("moved = v * g.obs / (1.0 + v * k)", "moved = v * g.obs"),
        ("jnp.sum(weight * score(t))", "jnp.sum(score(t))"),
        ("(jnp.abs(g.obs) - 2.0 * k) /", "(jnp.abs(g.obs) - 2.0 * k) * 0.0 /"),
        ("v_u * (std * (1.0 - a**2)) ** 2, sign", "v_u * std**2, sign"),
        ("sign * jnp.maximum(jnp.abs(u), 3.8) - u", "sign * 9.0 - u"),
        ("sign * (jnp.tanh(u + d) - a)", "0.0 * d"),
        ("stops = (uphill(end) < 0) |", "stops ="),
        ("| (jnp.abs(g.action) < -2.0 * h.action)", ""),
        ("jnp.clip(change, -jnp.sqrt(v_u), jnp.sqrt(v_u))", "change"),
        ("for _ in range(6):", "for _ in range(2):"),
        ("(near + share * (far - near))[0]", "near[0]"),
        ("jnp.zeros((*u.shape[:-1], LABELS))", "jnp.ones((*u.shape[:-1], LABELS))"),
        ("far[\"synthetic\"] / far[\"real\"]", "far[\"real\"] / far[\"synthetic\"]"),
        ("agent.act(state.agent, t.obs)", "agent.act(learner, t.obs)"),
        ("(action - policy.act(obs)) ** 2, -1) / 2", "(action - policy.act(obs)) ** 2, -1)"),
        ("(config.guidance, near)", "(config.guidance, policy.log_prob)"),
        # training the denoiser
        ("rate = (1.0 - config.ema) / (1.0 - config.ema ** (state.step + 1))",
         "rate = 1.0 - config.ema"),
        ("ema = optax.incremental_update(params, state.ema, rate)", "ema = params"),
        ("0.1, 1.0, config.fit_steps // 10", "1.0, 1.0, config.fit_steps // 10"),
        ("config.p_mean + config.p_std", "0.6 + config.p_std"),
        ("make_denoiser(state.ema, dataset,", "make_denoiser(state.params, dataset,"),
        ("denoising_loss(state.ema, key, dataset, dataset.val_starts",
         "denoising_loss(state.ema, key, dataset, dataset.train_starts"),
        ("p_mean=Config.p_mean, p_std=Config.p_std", "p_mean=config.p_mean, p_std=config.p_std"),
        ("sigma: with_start(guide(", "sigma: (guide("),
        # agent loop
        ("jax.random.fold_in(rounds, index)", "rounds"),
        ("jnp.float32(state.round > 0)", "jnp.float32(1.0)"),
        ("size = jnp.minimum(state.round + 1, c.buffer_rounds)", "size = c.buffer_rounds"),
        ("b.at[state.round % c.buffer_rounds]", "b.at[0]"),
        ("(c.batch_size - c.real_batch,), 0, size", "(c.batch_size,), 0, size"),
        ("make_act(agent, learner, dataset)", "make_act(agent, state.agent, dataset)"),
        ("(obs - mean) / std)", "obs)"),
    ),
    *mutants(
        "agents.py",
        ("gamma * (1.0 - batch.done) * next_v", "gamma * next_v"),
        ("optax.incremental_update(params, target, tau)",
         "optax.incremental_update(target, params, tau)"),
        ("next_v = next_v - next_penalty(batch, next_action)",
         "next_v = next_v + next_penalty(batch, next_action)"),
        ("jnp.where(jnp.isnan(penalty), 0.0, penalty)", "penalty"),
        ("jnp.abs(expectile - (u < 0))", "jnp.abs(expectile - (u > 0))"),
        ("advantage, 1.0 / temperature, max_weight", "advantage, temperature, max_weight"),
        ("log_alpha * (entropy - target_entropy)", "log_alpha * (target_entropy - entropy)"),
        ("critics(critic, obs, action) - log_density", "critics(critic, obs, action)"),
        ("jnp.mean(pairs) / (num_critics - 1)", "jnp.mean(pairs) / num_critics"),
        ("x = jax.nn.standardize(x) if layer_norm else x", "x = x"),
        ('"walker2d-random": (0.01, 0.0)', '"walker2d-random": (0.01, 0.01)'),
        ('"halfcheetah-medium-expert": (10, 5.0)', '"halfcheetah-medium-expert": (10, 1.0)'),
        ("expectile: float = 0.7", "expectile: float = 0.8"),
    ),
    *mutants(
        "data.py",
        ('"pendulum": (-1233.5, -167.7)', '"pendulum": (-1233.5, -160.0)'),
        ("100.0 * (np.asarray(returns", "99.0 * (np.asarray(returns"),
    ),
    *mutants(
        "host/logs.py",
        ("np.diff(totals, prepend=0.0)", "np.diff(totals, prepend=1.0)"),
        ('breaks &= ~(log["terminals"] | log["timeouts"])', "pass"),
        ("wrong.sum() < 2 or wrong.sum()", "wrong.sum()"),
        ("step > 1e-3 * std", "step > 1e3 * std"),
        ("eps = max(np.finfo(x.dtype).eps", "eps = min(np.finfo(x.dtype).eps"),
        ("if num < 10 or", "if"),
        ("first + limit - 1 : end", "first + limit : end"),
        ("if same(inner, obs[inner + 1]).all():", "if False:"),
        ("elif stands and same(timeouts, obs[timeouts]).all():", "elif False:"),
        ("if np.array_equal(terminals, timeouts):", "if False:"),
        ('log["terminals"], log["timeouts"] = terminals & ~moved, moved', "pass"),
        ("or np.median(moves[extra]) <= usual:", "or False:"),
        ("rewards[extra].any()", "False"),
        ("np.diff(ends, prepend=-1)[terminals[ends]]", "np.diff(ends, prepend=0)[terminals[ends]]"),
        ("at_goal = before - before[first]", "at_goal = before + terminals - before[first]"),
    ),
    *mutants(
        "host/layouts.py",
        ("ends = np.roll(of_ends[first], -1)", "ends = of_ends[first]"),
        ("if terminal.any() else len(terminal)", "if False else len(terminal)"),
        ('"next_observations": obs[1:],', '"next_observations": obs[:-1],'),
        ("return sorted(parts, key=parts.get)", "return sorted(parts)"),
    ),
    *mutants(
        "host/minari.py",
        ("if not isinstance(metadata.get(space), str):", "if False:"),
        ("if strange := sorted(set(settings) - KEYWORDS):", "if strange := []:"),
    ),
    *mutants(
        "baselines/world_model.py",
        ("better = go_on & (error < 0.99 * state.best_error)", "better = go_on"),
        ("jnp.argsort(state.best_error)[: config.elites]",
         "jnp.argsort(-state.best_error)[: config.elites]"),
        ("row = pgd.Transition(obs, action, reward - penalty",
         "row = pgd.Transition(obs, action, reward + penalty"),
        ("draw = lambda i: jax.random.randint(jax.random.fold_in(key, i), (), 0, num)",
         "draw = lambda i: i"),
        ("jnp.where(done[:, None] > 0, start(key_start), next_obs), row", "next_obs, row"),
    ),
    *mutants(
        "baselines/behaviour.py",
        ("-weight * config.behaviour_guidance", "weight * config.behaviour_guidance"),
        ("dataset.train_rows, (config.batch_size,)", "dataset.val_rows, (config.batch_size,)"),
    ),
    *mutants(
        "host/spread.py",
        ('0 if shared else label["seed"]', 'label["seed"]'),
        ("lambda x: x[runs.model_of], state.model", "lambda x: x[:num_runs], state.model"),
        ("needed <= available", "needed <= 10 * available"),
        ("sound = alive & all_finite((metrics, new.agent))", "sound = alive"),
        ("agent=select(sound, new.agent, state.agent)", "agent=new.agent"),
    ),
    *mutants(
        "host/run_folder.py",
        ("stdtrit(len(scores) - 1, 0.975)", "stdtrit(len(scores) - 1, 0.95)"),
        ("fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        ("refuse_other_run(path, about.get(\"of\"), self.identity)", "pass"),
        ("leaves = [arrays[f\".agent{name}\"][runs[0]]",
         "leaves = [arrays[f\".agent{name}\"][0]"),
    ),
    *mutants(
        "host/cli.py",
        ('np.random.SeedSequence((label["seed"], index))', 'np.random.SeedSequence((0, index))'),
        ('"timeouts": (last & ~done)[keep]', '"timeouts": (last & done)[keep]'),
        ("state = state._replace(round=state.round + 1)  # other keys", "pass"),
    ),
    *mutants(
        "host/flags.py",
        ('"awac": 4.0', '"awac": 64.0'),
        ('values.setdefault("guidance", guidance_of', 'values.__setitem__("guidance", guidance_of'),
        ("return GUIDANCE.get(agent, Config.guidance)", "return Config.guidance"),
    ),
    *mutants(
        "host/envs.py",
        ("returns += reward * alive", "returns += reward"),
    ),
]  # fmt: skip


def problem(mutant: Mutant) -> str | None:
    """What keeps a mutant from applying, if anything."""
    found = (ROOT / mutant.file).read_text().count(mutant.old)
    return None if found == 1 else f"occurs {found} times"


def verdict(mutant: Mutant, tree: Path) -> str:
    """Try a mutant in a copy of the project -> the test that fails, or "survived"."""
    path = tree / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    tests = [
        f"tests/{name}" for name in TESTS[mutant.file].split() if (tree / "tests" / name).exists()
    ]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        for marks in ("not slow", "slow"):  # the quick tests first
            done = subprocess.run(
                [*command, "-m", marks], cwd=tree, capture_output=True, text=True, timeout=1800
            )
            if done.returncode not in (0, 5):  # 5: no test of this kind
                break
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        path.write_text(text)
    if done.returncode in (0, 5):
        return "survived"
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.M)
    return failed[0] if failed else f"pytest ended with status {done.returncode}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="files whose mutants to try; all by default")
    parser.add_argument("--list", action="store_true", help="only check that mutants apply")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.files or m.file in args.files]
    broken = [(m, p) for m in chosen if (p := problem(m))]
    for m, p in broken:
        print(f"does not apply: {m.file}: {m.old!r} {p}")
    print(f"{len(chosen)} mutants, {len(broken)} of which do not apply")
    if args.list or broken:
        sys.exit(bool(broken))
    results: list[tuple[Mutant, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        skip = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "results")
        shutil.copytree(ROOT, tree, ignore=skip)
        os.symlink(ROOT / "results", tree / "results")
        try:
            for m in chosen:
                results.append((m, verdict(m, tree)))
                print(f"{results[-1][1]:<70} {m.file}: {m.old[:60]!r}", flush=True)
        except KeyboardInterrupt:
            print("interrupted")
    survivors = [m for m, what in results if what == "survived"]
    print(f"\n{len(results) - len(survivors)} of {len(results)} mutants were killed")
    for m in survivors:
        print(f"survived: {m.file}: {m.old!r} -> {m.new!r}")
    sys.exit(len(survivors) > 0.05 * len(results))


if __name__ == "__main__":
    main()
