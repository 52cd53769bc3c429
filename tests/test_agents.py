"""The Agent contract, gradients against finite differences, targets by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
import pgd

NAMES = [*agents.AGENTS, "sac"]
O, A, B = 3, 2, 64


def make(name, **settings):
    return agents.sac(**settings) if name == "sac" else agents.make_agent(name, **settings)


def batch(key, num, **fields):
    k = jax.random.split(key, 5)
    random = pgd.Transition(
        obs=jax.random.normal(k[0], (num, O)),
        action=jnp.tanh(jax.random.normal(k[1], (num, A))),
        reward=jax.random.normal(k[2], (num,)),
        next_obs=jax.random.normal(k[3], (num, O)),
        done=(jax.random.uniform(k[4], (num,)) < 0.2).astype(jnp.float32),
    )
    return random._replace(**fields)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_pure_updates(name):
    agent = make(name, hidden=(16, 16))
    state = agent.init(jax.random.key(0), O, A)
    b = batch(jax.random.key(1), B * agent.batches_per_update)
    one, metrics = jax.jit(agent.update)(jax.random.key(2), state, b)
    two, _ = jax.jit(agent.update)(jax.random.key(2), state, b)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert all(np.isfinite(v) and np.shape(v) == () for v in metrics.values())
    assert jax.tree.structure(one) == jax.tree.structure(state)
    for lead in [(), (5,), (2, 3)]:
        obs, action = jnp.ones((*lead, O)), 0.1 * jnp.ones((*lead, A))
        assert agent.act(state, obs).shape == (*lead, A)
        assert np.abs(agent.act(state, 10 * obs)).max() <= 1.0
        assert agent.log_prob(state, obs, action).shape == lead
        if agent.q_value:
            assert agent.q_value(state, obs, action).shape == lead


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_log_prob_equals_finite_differences(name):
    agent = make(name, hidden=(16, 16))
    state = agent.init(jax.random.key(0), O, A)
    obs = jax.random.normal(jax.random.key(1), (O,))
    action = jnp.array([0.3, -0.5])
    f = lambda a: float(agent.log_prob(state, obs, a))
    gradient = jax.grad(lambda a: agent.log_prob(state, obs, a))(action)
    eps = 1e-2
    for i in range(A):
        step = eps * jnp.eye(A)[i]
        numeric = (f(action + step) - f(action - step)) / (2 * eps)
        assert gradient[i] == pytest.approx(numeric, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("name", ["bc", "iql", "sac"])
def test_log_prob_is_a_density(name):
    """It integrates to one over the actions it gives mass to."""
    agent = make(name, hidden=(8,))
    state = agent.init(jax.random.key(3), O, 1)
    obs = jnp.array([0.2, -0.1, 0.4])
    grid = jnp.linspace(-6, 6, 20_001) if name != "sac" else jnp.linspace(-0.999, 0.999, 20_001)
    density = jnp.exp(agent.log_prob(state, jnp.broadcast_to(obs, (20_001, O)), grid[:, None]))
    assert float(jnp.sum(density) * (grid[1] - grid[0])) == pytest.approx(1.0, abs=0.01)


def test_a_deterministic_actors_log_prob_is_the_unit_gaussian_round_its_action():
    agent = agents.td3_bc(hidden=(16,))
    state = agent.init(jax.random.key(0), O, A)
    obs = jax.random.normal(jax.random.key(1), (7, O))
    action = jnp.tanh(jax.random.normal(jax.random.key(2), (7, A)))
    gap = np.asarray(action - agent.act(state, obs))
    expected = -0.5 * (gap**2).sum(-1) - A * 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(agent.log_prob(state, obs, action), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["td3_bc", "iql"])
def test_critics_find_the_value_of_a_one_step_task_and_do_not_look_past_terminals(name):
    """Reward 1 and done everywhere: Q is 1. Not done, gamma 0.5: Q is 2."""
    for done, value in ((1.0, 1.0), (0.0, 2.0)):
        agent = make(name, hidden=(32,), gamma=0.5, lr=3e-3, tau=0.05)
        num = B * agent.batches_per_update
        state = agent.init(jax.random.key(0), O, A)

        def step(state, key, agent=agent, num=num, done=done):
            b = batch(key, num, reward=jnp.ones(num), done=jnp.full(num, done))
            return agent.update(key, state, b)

        state, _ = jax.jit(lambda s, k, f=step: jax.lax.scan(f, s, k))(
            state, jax.random.split(jax.random.key(1), 600)
        )
        b = batch(jax.random.key(7), B)
        np.testing.assert_allclose(agent.q_value(state, b.obs, b.action), value, atol=0.15)


def test_iqls_value_is_the_expectile_of_q():
    """With one state and Q equal to the action's first entry, V is the expectile of that entry."""
    agent = agents.iql(hidden=(32,), lr=3e-3, tau=0.05, expectile=0.9)
    state = agent.init(jax.random.key(0), O, A)

    def step(state, key):
        action = jax.random.uniform(key, (256, A), minval=-1.0)
        zeros = jnp.zeros((256, O))
        b = pgd.Transition(zeros, action, action[:, 0], zeros, jnp.ones(256))
        return agent.update(key, state, b)

    state, _ = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(
        state, jax.random.split(jax.random.key(1), 1500)
    )
    value = float(agents.mlp(state.value, jnp.zeros(O))[0])
    grid = np.linspace(-1, 1, 10_001)
    weight = lambda v: np.where(grid < v, 0.1, 0.9)
    exact = 0.0
    for _ in range(100):
        exact = np.sum(weight(exact) * grid) / np.sum(weight(exact))
    assert value == pytest.approx(exact, abs=0.06) and exact > 0.4


def test_td3_bc_with_no_weight_on_q_is_behaviour_cloning_and_with_it_improves():
    target = lambda obs: jnp.tanh(obs[:, :A])

    def train(alpha):
        agent = agents.td3_bc(alpha=alpha, hidden=(32, 32), lr=3e-3, gamma=0.0)
        state = agent.init(jax.random.key(0), O, A)

        def step(state, key):
            b = batch(key, 2 * B)
            b = b._replace(action=target(b.obs), reward=jnp.sum(target(b.obs), axis=-1))
            noisy = jnp.clip(b.action + 0.3 * jax.random.normal(key, b.action.shape), -1, 1)
            b = b._replace(action=noisy, reward=jnp.sum(noisy, axis=-1))
            return agent.update(key, state, b)

        keys = jax.random.split(jax.random.key(1), 600)
        state, _ = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(state, keys)
        obs = batch(jax.random.key(9), 256).obs
        return np.asarray(agent.act(state, obs) - target(obs))

    cloned, improved = train(0.0), train(2.5)
    assert np.abs(cloned).mean() < 0.1
    assert improved.mean() > cloned.mean() + 0.2  # larger actions pay here


def test_td3_bc_splits_its_batches_and_stops_gradients_into_targets():
    agent = agents.td3_bc(hidden=(8,), tau=0.0)
    state = agent.init(jax.random.key(0), O, A)
    after, _ = agent.update(jax.random.key(1), state, batch(jax.random.key(2), 2 * B))
    for before_target, after_target in [
        (state.critic_target, after.critic_target),
        (state.actor_target, after.actor_target),
    ]:
        jax.tree.map(np.testing.assert_array_equal, before_target, after_target)
    assert np.abs(after.critic[0][0] - state.critic[0][0]).max() > 0
    first, second = batch(jax.random.key(2), B), batch(jax.random.key(3), B)
    join = lambda a, b: jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)
    one, _ = agent.update(jax.random.key(1), state, join(first, second))
    two, _ = agent.update(jax.random.key(1), state, join(second, first))
    assert (
        np.abs(one.actor[0][0] - two.actor[0][0]).max() > 0
    )  # the actor learns from the last batch


def test_ensemble_members_start_apart():
    state = agents.td3_bc().init(jax.random.key(0), O, A)
    w = state.critic[0][0]
    assert np.abs(w[0] - w[1]).max() > 0.1


def test_unknown_agents_and_settings_are_one_clear_line():
    with pytest.raises(ValueError, match="choose one of bc, td3_bc, iql"):
        agents.make_agent("td3bc")
    with pytest.raises(ValueError, match="has no setting"):
        agents.make_agent("iql", alpha=1.0)
