"""How far the critics of finished runs agree, in logged states (first seed).

PYTHONPATH=. python results/agents/critics.py RUN [RUN ...]
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp

import agents
import pgd
import runs

for run_dir in sys.argv[1:]:
    folder, config, _ = runs.Run.resume(run_dir, pgd.Config)
    session = pgd.build(dataclasses.replace(config, export=None, devices=1))
    state = jax.tree.map(lambda x: x[0, 0], pgd.restore(session, folder)[2].agent)
    batch = pgd.sample_real(jax.random.key(0), session.dataset, 4096)
    own = session.agent.act(state, batch.obs)
    uniform = jax.random.uniform(jax.random.key(1), own.shape, minval=-1.0)
    apart = jnp.sqrt(jnp.mean((own - batch.action) ** 2))
    print(f"{run_dir}: {config.agent}, {config.rounds * config.updates} updates; its actions are")
    print(f"{apart:.2f} from the log's (root mean square); reward {batch.reward.mean():.2f} a step")
    for name, action in (("the log's", batch.action), ("its own", own), ("uniform", uniform)):
        q = agents.critics(state.critic, batch.obs, action)
        print(f"  {name} actions: Q {q.mean():.1f}, standard deviation {q.std(axis=0).mean():.2f}")
