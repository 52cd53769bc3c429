"""Agents: the contract, losses and gradients against numpy, defaults by closed forms."""

import ast
import functools
import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
import pgd
from baselines import plain_agents

O, A, B = 3, 2, 64
NETS = {"actor", "critic", "value", "log_alpha"}
make = agents.make_agent

# Compilation dominates, so tests share programs: small networks, one update function per agent
SMALL = dict(hidden=(7, 5))
BY_HAND = {
    "bc": {},
    "td3_bc": dict(critic_updates=1),
    "rebrac": dict(critic_updates=1, actor_bc=0.2, critic_bc=0.3),
    "iql": dict(max_weight=0.1),
    "awac": dict(max_weight=1.2),
    "sac_n": dict(num_critics=3),
    "edac": dict(num_critics=4, diversity=1.5),
    "cql": dict(conservatism=2.0, num_actions=4),
}


@functools.partial(jax.jit, static_argnums=1)
def random_batch(key, num):
    k = jax.random.split(key, 6)
    return pgd.Transition(
        obs=jax.random.normal(k[0], (num, O)),
        action=jnp.tanh(jax.random.normal(k[1], (num, A))),
        reward=jax.random.normal(k[2], (num,)),
        next_obs=jax.random.normal(k[3], (num, O)),
        done=(jax.random.uniform(k[4], (num,)) < 0.2).astype(jnp.float32),
        next_action=jnp.tanh(jax.random.normal(k[5], (num, A))),
    )


def batch(key, num, **fields):
    return random_batch(key, num)._replace(**fields)


def init(agent, seed=0, act_dim=A):
    """A state such as agent.init's, with numpy's numbers: no program to compile."""
    rng = np.random.default_rng(seed)

    def net(x):
        bound = x.shape[-2] ** -0.5 if x.ndim > 1 else 0.3
        return jnp.asarray(rng.uniform(-bound, bound, x.shape), x.dtype)

    shape = jax.eval_shape(lambda key: agent.init(key, O, act_dim), jax.random.key(0))
    nets = {f: jax.tree.map(net, getattr(shape, f)) for f in shape._fields if f in NETS}
    nets |= {f + "_target": x for f, x in nets.items() if f + "_target" in shape._fields}
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    return state._replace(**nets)


@functools.cache
def small(name):
    """-> an agent with the settings of BY_HAND, its initial state, its compiled update."""
    agent = make(name, **SMALL, **BY_HAND[name])
    return agent, init(agent, 3), jax.jit(agent.update)


def train(agent, state, data, num):
    """Updates on consecutive pieces of `data`, `num` rows each -> (state, metrics (T,))."""
    pieces = jax.tree.map(lambda x: x.reshape(-1, num, *x.shape[1:]), data)
    keys = jax.random.split(jax.random.key(1), len(pieces.obs))
    return jax.lax.scan(lambda s, x: agent.update(x[0], s, x[1]), state, (keys, pieces))


@pytest.mark.parametrize("name", agents.AGENTS)
def test_shapes_and_pure_updates(name):
    agent, state, update = small(name)
    b = batch(jax.random.key(1), B)
    one, metrics = update(jax.random.key(2), state, b)
    two, _ = update(jax.random.key(2), state, b)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert all(np.isfinite(v) and np.shape(v) == () for v in metrics.values())
    assert jax.tree.structure(one) == jax.tree.structure(state)
    act = jax.jit(agent.act)
    for lead in [(), (5,), (2, 3)]:
        obs, action = jnp.ones((*lead, O)), 0.1 * jnp.ones((*lead, A))
        shape = lambda f, *args, state=state: jax.eval_shape(f, state, *args).shape
        assert shape(agent.act, obs) == (*lead, A)
        assert np.abs(act(state, 10 * obs)).max() <= 1.0
        assert shape(agent.log_prob, obs, action) == lead
        if agent.q_value:
            assert shape(agent.q_value, obs, action) == lead


@pytest.mark.parametrize("name", agents.AGENTS)
def test_gradient_of_log_prob_equals_finite_differences(name):
    agent, state, _ = small(name)
    obs = jax.random.normal(jax.random.key(1), (O,))
    action = jnp.array([0.3, -0.5])
    log_prob = jax.jit(lambda a: agent.log_prob(state, obs, a))
    f = lambda a: float(log_prob(a))
    gradient = jax.jit(jax.grad(log_prob))(action)
    eps = 1e-2
    for i in range(A):
        step = eps * jnp.eye(A)[i]
        numeric = (f(action + step) - f(action - step)) / (2 * eps)
        assert gradient[i] == pytest.approx(numeric, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("name", ["bc", "iql", "awac", "sac_n", "edac", "cql"])
def test_the_action_of_evaluation_is_the_middle_of_what_the_policy_samples(name):
    """Without noise: the median, which neither tanh nor clipping moves."""
    agent, state, _ = small(name)
    obs = jax.random.normal(jax.random.key(1), (5, O))
    keys = jax.random.split(jax.random.key(2), 10_000)
    samples = jax.jit(jax.vmap(lambda k: agent.sample(k, state, obs)))(keys)
    assert np.std(samples, axis=0).min() > 0.3
    np.testing.assert_allclose(agent.act(state, obs), np.median(samples, axis=0), atol=0.06)


@pytest.mark.parametrize("name", ["bc", "iql", "awac", "sac_n", "cql"])
def test_log_prob_is_a_density(name):
    """It integrates to one over the actions it gives mass to."""
    agent = make(name, **SMALL, **BY_HAND[name])
    state = init(agent, 3, act_dim=1)
    obs = jnp.array([0.2, -0.1, 0.4])
    end = 0.999 if name in ("sac_n", "cql") else 6.0
    grid = jnp.linspace(-end, end, 20_001)
    log_prob = jax.jit(agent.log_prob)
    density = jnp.exp(log_prob(state, jnp.broadcast_to(obs, (20_001, O)), grid[:, None]))
    assert float(jnp.sum(density) * (grid[1] - grid[0])) == pytest.approx(1.0, abs=0.01)


def test_a_deterministic_actors_log_prob_is_the_unit_gaussian_round_its_action():
    agent, state, _ = small("td3_bc")
    obs = jax.random.normal(jax.random.key(1), (7, O))
    action = jnp.tanh(jax.random.normal(jax.random.key(2), (7, A)))
    gap = np.asarray(action - jax.jit(agent.act)(state, obs))
    expected = -0.5 * (gap**2).sum(-1) - A * 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(jax.jit(agent.log_prob)(state, obs, action), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["td3_bc", "iql", "rebrac", "awac", "cql"])
def test_critics_find_the_value_of_a_one_step_task_and_do_not_look_past_terminals(name):
    """Reward 1 and done everywhere: Q is 1. Not done, gamma 0.5: Q is 2."""
    more = {"rebrac": {"critic_bc": 0.0}, "cql": {"conservatism": 0.0, "num_actions": 1}}
    agent = make(name, hidden=(16,), gamma=0.5, lr=6e-3, tau=0.1, **more.get(name, {}))
    num, total = 32 * agent.batches_per_update, 500 * 32 * agent.batches_per_update
    run, q_value = jax.jit(lambda *args: train(agent, *args, num)), jax.jit(agent.q_value)
    b = batch(jax.random.key(7), B)
    for done, value in ((1.0, 1.0), (0.0, 2.0)):
        data = batch(jax.random.key(1), total, reward=jnp.ones(total), done=jnp.full(total, done))
        state, _ = run(init(agent), data)
        np.testing.assert_allclose(q_value(state, b.obs, b.action), value, atol=0.15)


def test_iqls_value_is_the_expectile_of_q():
    """With one state and Q equal to the action's first entry, V is the expectile of that entry."""
    agent = agents.iql(hidden=(16,), lr=6e-3, tau=0.1, expectile=0.9)
    num = 128 * 1000
    action = jax.random.uniform(jax.random.key(1), (num, A), minval=-1.0)
    same = dict(obs=jnp.zeros((num, O)), done=jnp.ones(num))
    data = batch(jax.random.key(2), num, action=action, reward=action[:, 0], **same)
    state, _ = jax.jit(lambda state, data: train(agent, state, data, 128))(init(agent), data)
    value = float(agents.mlp(state.value, jnp.zeros(O))[0])
    grid = np.linspace(-1, 1, 10_001)
    weight = lambda v: np.where(grid < v, 0.1, 0.9)
    exact = 0.0
    for _ in range(100):
        exact = np.sum(weight(exact) * grid) / np.sum(weight(exact))
    assert value == pytest.approx(exact, abs=0.06) and exact > 0.4


def test_td3_bc_with_no_weight_on_q_is_behaviour_cloning_and_with_it_improves():
    target = lambda obs: jnp.tanh(obs[:, :A])

    data = batch(jax.random.key(1), 500 * 2 * B)
    noise = 0.3 * jax.random.normal(jax.random.key(2), data.action.shape)
    action = jnp.clip(target(data.obs) + noise, -1, 1)
    data = data._replace(action=action, reward=jnp.sum(action, axis=-1))

    @jax.jit
    def error_of(alpha):
        agent = agents.td3_bc(alpha=alpha, hidden=(16, 16), lr=6e-3, gamma=0.0)
        state, _ = train(agent, init(agent), data, 2 * B)
        obs = batch(jax.random.key(9), 256).obs
        return agent.act(state, obs) - target(obs)

    cloned, improved = error_of(0.0), error_of(2.5)
    assert np.abs(cloned).mean() < 0.1
    assert improved.mean() > cloned.mean() + 0.2  # larger actions pay here


def test_td3_bc_splits_its_batches_and_stops_gradients_into_targets():
    agent = agents.td3_bc(hidden=(8,), tau=0.0)
    state = init(agent)
    update = jax.jit(agent.update)
    after, _ = update(jax.random.key(1), state, batch(jax.random.key(2), 2 * B))
    for before_target, after_target in [
        (state.critic_target, after.critic_target),
        (state.actor_target, after.actor_target),
    ]:
        jax.tree.map(np.testing.assert_array_equal, before_target, after_target)
    assert np.abs(after.critic[0][0] - state.critic[0][0]).max() > 0
    first, second = batch(jax.random.key(2), B), batch(jax.random.key(3), B)
    join = lambda a, b: jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)
    one, _ = update(jax.random.key(1), state, join(first, second))
    two, _ = update(jax.random.key(1), state, join(second, first))
    assert (
        np.abs(one.actor[0][0] - two.actor[0][0]).max() > 0
    )  # the actor learns from the last batch


@pytest.mark.parametrize("name", [n for n in agents.AGENTS if n != "bc"])
def test_ensemble_members_start_apart_and_targets_equal(name):
    state = make(name, hidden=(16, 16)).init(jax.random.key(0), O, A)
    for net in ("critic", "actor"):
        target = getattr(state, net + "_target", getattr(state, net))
        jax.tree.map(np.testing.assert_array_equal, getattr(state, net), target)
    if name in ("sac_n", "edac", "cql"):
        assert state.log_alpha == 0.0
    if name in ("iql", "awac"):
        assert (state.actor["log_std"] == 0.0).all()
    for w, _ in state.critic:
        assert np.abs(w[:-1] - w[1:]).max(axis=(1, 2)).min() > 0.05


# --- Every loss, its value and its gradient, against numpy ---

KEY = jax.random.key(11)


def np_mlp(layers, x, layer_norm=False):
    for w, b in layers[:-1]:
        x = np.maximum(x @ w + b, 0.0)
        if layer_norm:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    w, b = layers[-1]
    return x @ w + b


def np_q(critic, obs, action, layer_norm=False):
    """-> (ensemble, ...)."""
    x = np.concatenate([obs, action], axis=-1)
    members = [[(w[i], b[i]) for w, b in critic] for i in range(len(critic[0][0]))]
    return np.stack([np_mlp(m, x, layer_norm)[..., 0] for m in members])


def np_normal(x, mean, std):
    return np.sum(-0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi), axis=-1)


def np_gaussian(actor, obs):
    return np.tanh(np_mlp(actor["mean"], obs)), np.exp(actor["log_std"])


def np_squashed(actor, obs, noise):
    """-> tanh(u), its log density."""
    mean, log_std = np.split(np_mlp(actor, obs), 2, axis=-1)
    std = np.exp(np.clip(log_std, -5, 2))
    u = mean + std * noise
    return np.tanh(u), np_normal(u, mean, std) - np.sum(np.log(1 - np.tanh(u) ** 2), axis=-1)


def noise(key, *shape):
    return np.float64(jax.random.normal(key, shape or (B, A)))


def by_hand(name, before, after, b, settings):
    """Losses of one update with key KEY, as functions of what they train: {name of the metric:
    (loss(params), params, optimiser's state after the step)}. All else in them is constant."""
    s, n = before, after
    discounted = lambda v: b.reward + 0.99 * (1 - b.done) * v
    mse = lambda q, y: np.sum(np.mean((q - y) ** 2, axis=-1))
    cloned = lambda actor: np_normal(b.action, *np_gaussian(actor, b.obs))
    key_a, key_b = jax.random.split(KEY)
    limit = settings.get("max_weight")

    if name == "bc":
        return {"actor_loss": (lambda p: -np.mean(cloned(p)), s.actor, n.opt_state)}

    if name in ("td3_bc", "rebrac"):
        ln = name == "rebrac"
        pi = lambda actor, obs: np.tanh(np_mlp(actor, obs))
        smooth = np.clip(0.2 * noise(KEY), -0.5, 0.5)
        next_action = np.clip(pi(s.actor_target, b.next_obs) + smooth, -1, 1)
        next_v = np_q(s.critic_target, b.next_obs, next_action, ln).min(0)
        if name == "rebrac":
            penalty = ((next_action - b.next_action) ** 2).sum(-1)
            assert np.isnan(penalty).sum() == 2  # rows whose next action is not known
            next_v = next_v - 0.3 * np.where(np.isnan(penalty), 0.0, penalty)
        target = discounted(next_v)

        def q_of(actor):
            q = np_q(n.critic, b.obs, pi(actor, b.obs), ln)
            return q.min(0) if ln else q[0]

        scale = 1 / np.abs(q_of(s.actor)).mean()

        def actor_loss(p):
            gap = (pi(p, b.obs) - b.action) ** 2
            if name == "td3_bc":
                return -2.5 * scale * q_of(p).mean() + gap.mean()
            return -scale * q_of(p).mean() + 0.2 * gap.sum(-1).mean()

        return {
            "critic_loss": (
                lambda p: mse(np_q(p, b.obs, b.action, ln), target),
                s.critic,
                n.critic_opt,
            ),
            "actor_loss": (actor_loss, s.actor, n.actor_opt),
        }

    if name == "iql":
        q = np_q(s.critic_target, b.obs, b.action).min(0)
        v = lambda value, obs: np_mlp(value, obs)[:, 0]

        def value_loss(p):
            u = q - v(p, b.obs)
            return np.mean(np.where(u > 0, 0.7, 0.3) * u**2)

        target = discounted(v(n.value, b.next_obs))
        weight = np.minimum(np.exp(3.0 * (q - v(n.value, b.obs))), limit)
        assert 0 < np.mean(weight == limit) < 1
        return {
            "value_loss": (value_loss, s.value, n.value_opt),
            "critic_loss": (
                lambda p: mse(np_q(p, b.obs, b.action), target),
                s.critic,
                n.critic_opt,
            ),
            "actor_loss": (lambda p: -np.mean(weight * cloned(p)), s.actor, n.actor_opt),
        }

    if name == "awac":

        def sampled(key, obs):
            mean, std = np_gaussian(s.actor, obs)
            return np.clip(mean + std * noise(key), -1, 1)

        next_v = np_q(s.critic_target, b.next_obs, sampled(key_a, b.next_obs)).min(0)
        target = discounted(next_v)
        value = np_q(n.critic, b.obs, sampled(key_b, b.obs)).min(0)
        advantage = np_q(n.critic, b.obs, b.action).min(0) - value
        weight = np.minimum(np.exp(3 * advantage), limit)
        assert 0 < np.mean(weight == limit) < 1
        return {
            "critic_loss": (
                lambda p: mse(np_q(p, b.obs, b.action), target),
                s.critic,
                n.critic_opt,
            ),
            "actor_loss": (lambda p: -np.mean(weight * cloned(p)), s.actor, n.actor_opt),
        }

    alpha = np.exp(s.log_alpha)  # sac_n, edac, cql
    next_action, log_pi = np_squashed(s.actor, b.next_obs, noise(key_a))
    next_v = np_q(s.critic_target, b.next_obs, next_action).min(0)
    target = discounted(next_v if name == "cql" else next_v - alpha * log_pi)

    def critic_loss(p):
        q = np_q(p, b.obs, b.action)
        return mse(q, target) + {"sac_n": 0.0, "edac": diversity, "cql": conservatism}[name](p, q)

    def diversity(p, q):
        eps, num = 1e-6, settings["num_critics"]
        slopes = [
            (np_q(p, b.obs, b.action + eps * e) - np_q(p, b.obs, b.action - eps * e)) / (2 * eps)
            for e in np.eye(A)
        ]
        g = np.stack(slopes, axis=-1)  # (N, B, A)
        g = g / np.maximum(np.linalg.norm(g, axis=-1, keepdims=True), 1e-6)
        pairs = [(g[i] * g[j]).sum(-1) for i in range(num) for j in range(num) if i != j]
        return 1.5 * np.mean(np.sum(pairs, axis=0)) / (num - 1)

    def conservatism(p, q):
        keys = jax.random.split(jax.random.split(KEY, 3)[2], 3)
        terms = []
        uniform = np.float64(jax.random.uniform(keys[0], (4, B, A), minval=-1.0))
        for i in range(4):
            terms.append(np_q(p, b.obs, uniform[i]) - A * np.log(0.5))
        for key, where in ((keys[1], b.obs), (keys[2], b.next_obs)):
            drawn = noise(key, 4, B, A)
            for i in range(4):
                action, log_density = np_squashed(s.actor, where, drawn[i])
                terms.append(np_q(p, b.obs, action) - log_density)
        return 2.0 * np.sum(np.mean(np.log(np.sum(np.exp(terms), axis=0)) - q, axis=-1))

    if name == "sac_n":
        diversity = None
        critic_loss = lambda p: mse(np_q(p, b.obs, b.action), target)

    def actor_loss(p):
        action, log_pi = np_squashed(p, b.obs, noise(key_b))
        return np.mean(alpha * log_pi - np_q(n.critic, b.obs, action).min(0))

    entropy = -np.mean(np_squashed(s.actor, b.obs, noise(key_b))[1])
    return {
        "critic_loss": (critic_loss, s.critic, n.critic_opt),
        "actor_loss": (actor_loss, s.actor, n.actor_opt),
        "alpha_loss": (lambda p: p * (entropy - -A), s.log_alpha, n.alpha_opt),
    }


def test_every_agent_is_checked_by_hand():
    assert set(BY_HAND) == set(agents.AGENTS)


@pytest.mark.parametrize("name", agents.AGENTS)
def test_losses_and_gradients_are_those_computed_by_hand(name):
    """One update against numpy: each reported loss, the gradient that its optimiser was given along
    random directions, and Adam's step. In numpy all but the trained parameters is constant, so a
    gradient that leaked through a target, a weight or another network would show."""
    settings = SMALL | BY_HAND[name]
    agent, before, update = small(name)
    if name != "bc":  # targets of their own, so that mistaking one for the other shows
        moved = jax.tree.map(lambda x: 1.2 * x + 0.01, before.critic_target)
        before = before._replace(critic_target=moved)
    if name in ("td3_bc", "rebrac"):
        before = before._replace(actor_target=jax.tree.map(lambda x: 0.8 * x, before.actor_target))
    b = batch(jax.random.key(4), B)
    b = b._replace(next_action=b.next_action.at[:2].set(jnp.nan))
    after, metrics = update(KEY, before, b)

    double = lambda tree: jax.tree.map(np.float64, tree)
    parts = by_hand(name, double(before), double(after), double(b), settings)
    rng = np.random.default_rng(0)
    for what, (loss, params, opt_state) in parts.items():
        value = loss(params)
        if what == "critic_loss":
            value = np.float64(value)
            added = settings.get("diversity", settings.get("conservatism", 0.0))
            extra = added * float(metrics.get("alike", metrics.get("gap", 0.0)))
            assert metrics[what] + extra == pytest.approx(value, rel=1e-4)
        elif what in metrics:
            assert metrics[what] == pytest.approx(value, rel=1e-4, abs=1e-6)
        gradient = jax.tree.map(lambda mu: np.float64(mu) / 0.1, opt_state[0].mu)  # Adam's first
        for _ in range(3):
            way = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), params)
            at = lambda eps: loss(jax.tree.map(lambda p, d: p + eps * d, params, way))
            numeric = (at(1e-5) - at(-1e-5)) / 2e-5
            exact = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradient, way))))
            assert exact == pytest.approx(numeric, rel=5e-3, abs=1e-4), what
        net = what.removesuffix("_loss").replace("alpha", "log_alpha")
        step = jax.tree.map(lambda x, y: np.abs(x - y).max(), getattr(after, net), params)
        lr = 3e-5 if name == "cql" and net != "critic" else 1e-3 if name == "rebrac" else 3e-4
        assert max(jax.tree.leaves(step)) == pytest.approx(lr, rel=0.02), what  # Adam's first
        # Adam's first step is lr * g / (|g| + eps): where g is small, it tells eps
        eps = 1e-8 if name in ("sac_n", "edac", "cql") else 1e-5
        first = jax.tree.map(lambda p, g: p - lr * g / (np.abs(g) + eps), params, gradient)
        for x, y in zip(*map(jax.tree.leaves, (getattr(after, net), first))):
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-7, err_msg=what)


@pytest.mark.parametrize("name", [n for n in agents.AGENTS if n != "bc"])
def test_evaluation_uses_the_trained_networks_and_the_least_q(name):
    """With NaN in every target network, all that an Agent answers stays finite."""
    agent, state, _ = small(name)
    targets = {f: getattr(state, f) for f in state._fields if f.endswith("_target")}
    state = state._replace(**jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), targets))
    b = batch(jax.random.key(1), B)
    answers = jax.jit(
        lambda state, obs, action: (
            agent.act(state, obs),
            agent.log_prob(state, obs, action),
            agent.q_value(state, obs, action),
        )
    )(state, b.obs, b.action)
    assert all(np.isfinite(x).all() for x in answers)
    q = np_q(jax.tree.map(np.float64, state.critic), b.obs, b.action, name == "rebrac")
    np.testing.assert_allclose(answers[-1], q.min(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in agents.AGENTS if n != "bc"])
def test_targets_follow_by_polyak_alone(name):
    tau = 0.005  # the default
    _, before, update = small(name)
    targets = [f for f in before._fields if f.endswith("_target")]
    far = {f: jax.tree.map(lambda x: x + 1.0, getattr(before, f)) for f in targets}
    before = before._replace(**far)
    after, _ = update(jax.random.key(1), before, batch(jax.random.key(2), B))
    for net in [f.removesuffix("_target") for f in targets]:
        old, new = getattr(before, net + "_target"), getattr(after, net + "_target")
        expected = jax.tree.map(lambda o, p: (1 - tau) * o + tau * p, old, getattr(after, net))
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6), new, expected)


@pytest.mark.parametrize(
    "name, settings",
    [("bc", None), ("iql", None), ("td3_bc", dict(policy_noise=0.0, critic_updates=1))],
)
def test_the_order_of_a_batch_does_not_matter(name, settings):
    _, state, update = small(name)
    if settings:
        update = jax.jit(make(name, **SMALL, **settings).update)
    b = batch(jax.random.key(1), B)
    turned = jax.tree.map(lambda x: x[::-1], b)
    (_, one), (_, two) = (update(jax.random.key(2), state, x) for x in (b, turned))
    for key in one:
        assert one[key] == pytest.approx(float(two[key]), rel=1e-5)


def test_more_critics_are_more_pessimistic():
    values = []
    for num in (2, 10):
        agent = agents.sac_n(num_critics=num, hidden=(16,))
        state = init(agent)
        b = batch(jax.random.key(1), 256)
        values.append(float(jnp.mean(jax.jit(agent.q_value)(state, b.obs, b.action))))
        q = jax.eval_shape(agents.critics, state.critic, b.obs, b.action)
        assert q.shape == (num, 256)
    assert values[1] < values[0]


def test_edacs_penalty_turns_the_critics_gradients_apart():
    """Trained on nothing else, the ensemble's gradients by the action end less alike."""
    data = batch(jax.random.key(1), 200 * 32)

    @jax.jit
    def alike_after(diversity):
        agent = agents.edac(num_critics=4, diversity=diversity, hidden=(16,), lr=3e-3)
        _, metrics = train(agent, init(agent), data, 32)
        return metrics["alike"][-50:].mean()

    alike = {diversity: float(alike_after(diversity)) for diversity in (0.0, 100.0)}
    assert alike[100.0] < alike[0.0] - 0.3


def test_cql_values_actions_outside_the_log_less():
    """All rewards are alike; only the penalty tells the log's actions from others."""
    data = batch(jax.random.key(1), 300 * 32)
    data = data._replace(action=0.3 + 0.05 * data.action, done=jnp.ones_like(data.done))
    b = batch(jax.random.key(9), 256)

    @jax.jit
    def gap_after(conservatism):
        agent = agents.cql(conservatism=conservatism, num_actions=2, hidden=(16,), lr=6e-3)
        state, _ = train(agent, init(agent), data, 32)
        q = lambda a: jnp.mean(agent.q_value(state, b.obs, jnp.full((256, A), a)))
        return q(0.3) - q(-0.8)

    gaps = {conservatism: float(gap_after(conservatism)) for conservatism in (0.0, 5.0)}
    assert gaps[5.0] > gaps[0.0] + 0.5


def test_the_papers_values_of_a_data_set_are_the_defaults_there():
    of = lambda *args: {k: h.default for k, h in agents.hyperparameters(*args).items()}
    assert of("rebrac", "hopper-medium-replay-v2")["critic_bc"] == 0.5
    assert of("rebrac", "pen-human-v1")["lr"] == 3e-4
    assert of("edac", "walker2d-medium-expert") == of("edac") | {"diversity": 5.0}
    assert of("edac", "no-such-task") == of("edac")
    assert all(h.help for name in agents.AGENTS for h in agents.hyperparameters(name).values())


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("td3bc", {}, "choose one of bc, td3_bc, iql"),
        ("iql", {"alpha": 1.0}, "iql has no setting \\['alpha'\\]; it has expectile"),
        ("td3_bc", {"lr": 0.0}, "td3_bc's lr cannot be 0.0"),
        ("td3_bc", {"gamma": 1.5}, "gamma cannot be 1.5"),
        ("edac", {"num_critics": 1}, "num_critics cannot be 1"),
        ("bc", {"hidden": ()}, "hidden must not be empty"),
        ("bc", {"hidden": 256}, "bc's hidden cannot be 256"),
        ("sac_n", {"num_critics": 2.5}, "num_critics cannot be 2.5"),
        ("cql", {"conservatism": float("nan")}, "conservatism cannot be nan"),
    ],
)
def test_unknown_agents_and_settings_that_cannot_work_are_one_clear_line(name, settings, message):
    with pytest.raises(ValueError, match=message):
        agents.make_agent(name, **settings)


@pytest.mark.parametrize(
    "settings", [{"lr": "1"}, {"lr": None}, {"hidden": ("8",)}, {"hidden": (2.5,)}, {"lr": [1.0]}]
)
def test_a_setting_of_the_wrong_type_is_a_value_error(settings):
    with pytest.raises(ValueError, match="bc's .* cannot be"):
        make("bc", **settings)
    with pytest.raises(ValueError, match="bc's lr cannot be"):
        make("bc", lr=jnp.ones(2))


# --- Defaults and limits, by closed forms ---


def zeros(state, **fields):
    """A state whose networks are 0 everywhere, but for some fields."""
    nets = {f: getattr(state, f) for f in state._fields if "opt" not in f}
    return state._replace(**jax.tree.map(jnp.zeros_like, nets) | fields)


def first_entry(scale=1.0):
    """-> two critics of one hidden unit whose Q is scale * action[0], for actions in [-1, 1]."""
    w = jnp.zeros((2, O + A, 1)).at[:, O].set(1.0)
    last = jnp.full((2, 1, 1), scale), jnp.full((2, 1), -scale)
    return [(w, jnp.ones((2, 1))), last]


@pytest.mark.parametrize("name", ["td3_bc", "rebrac"])
def test_the_target_policys_noise_is_clipped_to_a_half_and_has_standard_deviation_a_fifth(name):
    """With all networks 0 the next action is the noise alone, and the loss shows its moments."""
    num = 4096
    more = {"critic_bc": 1.0} if name == "rebrac" else {}
    agent = make(name, hidden=(1,), critic_updates=1, **more)
    target = {"critic_target": first_entry()} if name == "td3_bc" else {}
    nothing = jnp.zeros((num, A))
    b = batch(jax.random.key(1), num, reward=nothing[:, 0], done=nothing[:, 0], next_action=nothing)
    _, metrics = jax.jit(agent.update)(KEY, zeros(init(agent), **target), b)
    smooth = np.clip(0.2 * noise(KEY, num, A), -0.5, 0.5)
    assert 0.005 < np.mean(np.abs(smooth) == 0.5) < 0.02
    next_v = smooth[:, 0] if name == "td3_bc" else -np.sum(smooth**2, axis=-1)
    assert metrics["critic_loss"] == pytest.approx(2 * np.mean((0.99 * next_v) ** 2), rel=1e-5)


def test_iqls_defaults_weigh_errors_by_expectile_and_clones_by_advantage():
    """One update with V = 0 and Q = scale * action[0], the same action everywhere."""
    agent = agents.iql(hidden=(1,), lr=1e-9)
    state, b = zeros(init(agent)), batch(jax.random.key(1), B)

    @jax.jit
    def metrics(first, scale):
        action = jnp.zeros((B, A)).at[:, 0].set(first)
        now = state._replace(critic_target=first_entry(scale))
        return agent.update(KEY, now, b._replace(action=action))[1]

    def weight(first, scale=1.0):
        log_prob = -0.5 * first**2 - A * 0.5 * np.log(2 * np.pi)
        return metrics(first, scale)["actor_loss"] / -log_prob

    assert metrics(0.5, 1.0)["value_loss"] / 0.25 == pytest.approx(0.7, rel=1e-5)
    assert metrics(-0.5, 1.0)["value_loss"] / 0.25 == pytest.approx(0.3, rel=1e-5)
    assert np.log(weight(0.5)) / 0.5 == pytest.approx(3.0, rel=1e-5)  # beta
    assert np.log(weight(-0.9)) / -0.9 == pytest.approx(3.0, rel=1e-5)
    assert weight(0.8, 10.0) == pytest.approx(100.0, rel=1e-5)  # exp(24), clipped


def test_awacs_defaults_weigh_clones_by_advantage():
    agent = agents.awac(hidden=(1,), lr=1e-9)
    state = zeros(init(agent))
    update = jax.jit(agent.update)
    for scale in (1.0, 10.0):
        state = state._replace(critic=first_entry(scale))
        b = batch(jax.random.key(1), B, action=jnp.full((B, A), 0.5))
        sampled = np.clip(noise(jax.random.split(KEY)[1]), -1, 1)[:, 0]
        weight = np.minimum(np.exp(3 * scale * (0.5 - sampled)), 100.0)
        log_prob = -0.5 * A * 0.25 - A * 0.5 * np.log(2 * np.pi)
        assert (weight == 100.0).any() == (scale == 10.0)
        assert update(KEY, state, b)[1]["actor_loss"] == pytest.approx(
            -np.mean(weight) * log_prob, rel=1e-4
        )


@pytest.mark.parametrize("name", ["bc", "sac_n"])
def test_log_standard_deviations_are_clipped_to_minus_5_and_2(name):
    agent = make(name, hidden=(1,), **({"num_critics": 1} if name == "sac_n" else {}))
    drawn, obs = noise(KEY, 1000, A), jnp.zeros((1000, O))
    sample, log_prob = jax.jit(agent.sample), jax.jit(agent.log_prob)
    for log_std, limit in ((-50.0, -5.0), (50.0, 2.0)):
        state = zeros(init(agent))
        if name == "bc":
            actor = state.actor | {"log_std": jnp.full(A, log_std)}
            expected = np.clip(np.exp(limit) * drawn, -1, 1)
        else:
            bias = jnp.concatenate([jnp.zeros(A), jnp.full(A, log_std)])
            actor = [state.actor[0], (state.actor[1][0], bias)]
            expected = np.tanh(np.exp(limit) * drawn)
        state = state._replace(actor=actor)
        np.testing.assert_allclose(sample(KEY, state, obs), expected, atol=1e-6)
        at_mean = log_prob(state, obs[0], jnp.zeros(A))  # and there tanh'(0) is 1
        assert at_mean == pytest.approx(-A * (limit + 0.5 * np.log(2 * np.pi)), rel=1e-5)


def test_actions_at_the_edge_have_a_finite_density_under_a_squashed_policy():
    agent, state, _ = small("sac_n")
    log_prob = jax.jit(lambda a: agent.log_prob(state, jnp.zeros(O), jnp.full(A, a)))
    assert log_prob(1.0) == log_prob(0.9995) == log_prob(0.999) != log_prob(0.99)


DEPTH = {"bc": 2, "td3_bc": 2, "iql": 2, "awac": 2, "rebrac": 3, "sac_n": 3, "edac": 3, "cql": 3}
ENSEMBLE = {"td3_bc": 2, "iql": 2, "awac": 2, "rebrac": 2, "sac_n": 10, "edac": 10, "cql": 2}


@pytest.mark.parametrize("name", agents.AGENTS)
def test_default_networks_have_the_published_sizes(name):
    agent = make(name)
    state = jax.eval_shape(lambda key: agent.init(key, O, A), jax.random.key(0))
    actor = state.actor["mean"] if isinstance(state.actor, dict) else state.actor
    assert [b.shape[-1] for _, b in actor[:-1]] == [256] * DEPTH[name]
    assert agent.batches_per_update == (2 if name in ("td3_bc", "rebrac") else 1)
    if name != "bc":
        assert [b.shape for _, b in state.critic[:-1]] == [(ENSEMBLE[name], 256)] * DEPTH[name]


def test_layers_start_uniform_in_one_over_the_root_of_the_fan_in():
    for (w, b), fan_in in zip(agents.init_mlp(KEY, (400, 100, 25)), (400, 100)):
        for x in (w, b):
            assert 0.8 < np.abs(x).max() * fan_in**0.5 <= 1.0
        assert np.std(w) * fan_in**0.5 == pytest.approx(3**-0.5, rel=0.05)


# --- Settings by data set, the command line ---


def test_published_tables():
    """Rows from the papers' tables, over the whole of each; a sum for the rest."""
    rebrac, edac = agents.REBRAC, agents.EDAC
    assert len(rebrac) == 30 and len(edac) == 9
    assert rebrac["halfcheetah-medium"] == (0.001, 0.01)
    assert rebrac["halfcheetah-medium-replay"] == (0.01, 0.001)
    assert rebrac["hopper-expert"] == (0.1, 0.001)
    assert rebrac["hopper-medium-replay"] == (0.05, 0.5)
    assert rebrac["walker2d-random"] == (0.01, 0.0)
    assert rebrac["walker2d-expert"] == (0.01, 0.5)
    assert rebrac["pen-cloned"] == (0.05, 0.5)
    assert rebrac["hammer-cloned"] == (0.1, 0.5)
    assert rebrac["relocate-expert"] == (0.05, 0.01)
    np.testing.assert_allclose(np.sum(list(rebrac.values()), axis=0), (1.134, 3.743))
    for task, row in edac.items():
        num = 50 if task.startswith("hopper") else 10
        eta = 5.0 if task.endswith("expert") and num == 10 else 1.0
        assert row == (num, eta)


def test_published_defaults():
    of = lambda name, *task: {k: h.default for k, h in agents.hyperparameters(name, *task).items()}
    assert of("edac") == of("edac", "halfcheetah-medium-v2")
    assert of("rebrac") == of("rebrac", "walker2d-medium-expert-v2")
    assert {of("rebrac", f"{task}-human-v1")["lr"] for task in agents.ADROIT} == {3e-4}
    assert of("rebrac", "hopper-medium-v2")["lr"] == of("rebrac")["lr"] == 1e-3
    assert (of("cql")["conservatism"], of("cql")["num_actions"]) == (10.0, 10)


def test_the_command_prints_every_setting_and_refuses_an_unknown_agent(capsys):
    agents.main(["rebrac"])
    shown = capsys.readouterr().out
    for key, h in agents.hyperparameters("rebrac").items():
        assert f"  {key} " in shown and h.help in shown
    agents.main(["--help"])
    assert "python agents.py" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        agents.main(["no-such-agent"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_module_imports_nothing_of_this_project():
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(agents))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"chex", "jax", "optax"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["td3_bc", "rebrac", "iql"])
def test_the_plain_way_of_an_update_gives_the_same(name):
    """Against the plain agents that studies/speed.py times, with the default networks."""
    ours, plain = make(name), plain_agents.make_plain(name)
    dataset = batch(jax.random.key(1), 512)
    start = jax.random.key(0)

    def after(agent, num):
        draw = lambda key: jax.tree.map(
            lambda x: x[jax.random.randint(key, (128,), 0, 512)], dataset
        )
        state = agent.init(start, O, A)
        return jax.jit(lambda s: pgd.update_agent(start, agent, s, draw, num)[0])(state)

    state, learner = after(ours, 5), after(plain, 5)
    wanted = {"actor": state.actor} | plain_agents.separate(state.critic)
    targets = plain_agents.separate(state.critic_target)
    if name == "iql":
        wanted["value"] = state.value
    else:
        targets["actor"] = state.actor_target
    first = plain.init(start, O, A)

    def moved(a, b):
        return max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b))))

    for key, params in wanted.items():
        assert moved(params, first.params[key]) > 1e-3
        assert moved(params, learner.params[key]) < 1e-4, key
    for key, params in targets.items():
        assert moved(params, learner.targets[key]) < 1e-5, key
