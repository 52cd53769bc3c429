"""What fixed starts, steering by reward and off-line evaluation are worth on pendulum-medium.

python pgd.py --rounds 2 --updates 3000 --out plain
python pgd.py --rounds 1 --updates 1 --condition-on-start --out conditioned
python pgd.py --rounds 1 --updates 1 --condition-on-start --horizon 8 --fit-batch 64 --out short
PYTHONPATH=. python results/guides/measure.py plain conditioned short
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

import agents
import analysis
import envs
import pgd

NUM = 256
key = jax.random.key(0)


def load(folder):
    session, model, _ = analysis.load_run(folder)
    config = dataclasses.replace(model.config, sample_batch=NUM)
    dims = session.dataset.obs_dim, session.dataset.act_dim
    return session, pgd.make_diffusion(config, *dims, cloner=agents.bc()), model.of(0)


def dynamics_error(session, x):
    """Trajectories (n, T, D) -> (n, T - 1), in the log's variances."""
    dataset = session.dataset
    mean, std = (np.asarray(v[: dataset.obs_dim]) for v in dataset.normalizer)
    t = pgd.split_steps(dataset, x)
    obs = np.asarray(t.obs) * std + mean
    action = np.asarray(pgd.unscale_action(dataset, t.action))[:, :-1]
    alive = np.ones(action.shape[:2], bool)
    sample = analysis.Sample(obs[:, :-1], action, None, obs[:, 1:], alive, alive, None, None)
    return analysis.dynamics_error(sample, analysis.make_judge(session), std)


def starts():
    print("dynamics error of a window's transitions; given starts are those of held-out windows")
    plain, conditioned, short = sys.argv[1:]
    for folder, given in [(plain, False), (plain, True), (conditioned, True), (short, True)]:
        session, diffusion, state = load(folder)
        dataset = session.dataset
        windows = jax.random.choice(key, dataset.val_starts, (NUM,))
        start = dataset.steps[windows, : dataset.obs_dim] if given else None
        x = jax.jit(lambda k, s, d, o, f=diffusion: f.sample(k, s, d, (), o))(
            key, state, dataset, start
        )
        error = np.nanmean(dynamics_error(session, x), axis=0)
        what = "given starts" if given else "its own starts"
        at = [i for i in (1, 2, 6, 7, 16, 31) if i <= len(error)]
        print(f"  {folder}, {what}: " + ", ".join(f"{error[i - 1]:.5f} ({i})" for i in at))


def steering():
    print("reward steered upwards: weight, mean reward, dynamics error")
    session, diffusion, state = load(sys.argv[1])
    for weight in (0.0, 0.02, 0.05, 0.1, 0.4):
        terms = [(weight, lambda t: jnp.sum(t.reward, axis=-1))]
        x = jax.jit(lambda k, s, d, t=terms: diffusion.sample(k, s, d, t))(
            key, state, session.dataset
        )
        reward = float(pgd.split_steps(session.dataset, x).reward.mean())
        print(f"  {weight:g}: {reward:.2f}, {np.nanmean(dynamics_error(session, x)):.4f}")


def evaluation(folder):
    print(f"off-line evaluation by {folder}: policy, its return, estimates with lambda 0, 0.25, 1")
    session, diffusion, state = load(folder)
    dataset, length = session.dataset, session.config.horizon - 1
    first = dataset.steps[::200, : dataset.obs_dim][:500]
    num = 200 // length
    for name in ("early1", "early2", "medium", "expert"):
        agent, other = agents.sac_n(), analysis.shipped_policy(f"pendulum-{name}", dataset)
        score = pgd.policy_score(pgd.target_policy(agent, other).log_prob)
        estimates = []
        for weight in (0.0, 0.25, 1.0):

            @jax.jit
            def rewards(key, state, dataset, first, terms=((weight, score),)):
                def window(obs, key):
                    t = pgd.split_steps(dataset, diffusion.sample(key, state, dataset, terms, obs))
                    return t.obs[:, -1], t.reward[:, :-1].sum(axis=1)

                obs = jax.random.choice(key, first, (NUM,))
                return jax.lax.scan(window, obs, jax.random.split(key, num))[1]

            total = rewards(key, state, dataset, first).sum(axis=0) * 200 / (num * length)
            estimates.append(f"{float(total.mean()):.0f} ({float(total.std()) / NUM**0.5:.0f})")
        judge = envs.evaluator_in_program(session.task.simulator, NUM)
        true = judge(key, pgd.make_act(agent, other, dataset))
        print(f"  {name}: {true.mean():.0f} ({true.std() / NUM**0.5:.0f}); {', '.join(estimates)}")


starts()
steering()
evaluation(sys.argv[2])
evaluation(sys.argv[3])
