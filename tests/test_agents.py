"""The Agent contract, gradients against finite differences, targets by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agents
import pgd

O, A, B = 3, 2, 64
make = agents.make_agent


def batch(key, num, **fields):
    k = jax.random.split(key, 6)
    random = pgd.Transition(
        obs=jax.random.normal(k[0], (num, O)),
        action=jnp.tanh(jax.random.normal(k[1], (num, A))),
        reward=jax.random.normal(k[2], (num,)),
        next_obs=jax.random.normal(k[3], (num, O)),
        done=(jax.random.uniform(k[4], (num,)) < 0.2).astype(jnp.float32),
        next_action=jnp.tanh(jax.random.normal(k[5], (num, A))),
    )
    return random._replace(**fields)


@pytest.mark.parametrize("name", agents.AGENTS)
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


@pytest.mark.parametrize("name", agents.AGENTS)
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


@pytest.mark.parametrize("name", ["bc", "iql", "awac", "sac_n", "edac", "cql"])
def test_the_action_of_evaluation_is_the_middle_of_what_the_policy_samples(name):
    """Without noise: the median, which neither tanh nor clipping moves."""
    agent = make(name, hidden=(16, 16))
    state = agent.init(jax.random.key(0), O, A)
    obs = jax.random.normal(jax.random.key(1), (5, O))
    keys = jax.random.split(jax.random.key(2), 10_000)
    samples = jax.vmap(lambda k: agent.sample(k, state, obs))(keys)
    assert np.std(samples, axis=0).min() > 0.3
    np.testing.assert_allclose(agent.act(state, obs), np.median(samples, axis=0), atol=0.06)


@pytest.mark.parametrize("name", ["bc", "iql", "awac", "sac_n", "cql"])
def test_log_prob_is_a_density(name):
    """It integrates to one over the actions it gives mass to."""
    agent = make(name, hidden=(8,))
    state = agent.init(jax.random.key(3), O, 1)
    obs = jnp.array([0.2, -0.1, 0.4])
    end = 0.999 if name in ("sac_n", "cql") else 6.0
    grid = jnp.linspace(-end, end, 20_001)
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


@pytest.mark.parametrize("name", ["td3_bc", "iql", "rebrac", "awac", "cql"])
def test_critics_find_the_value_of_a_one_step_task_and_do_not_look_past_terminals(name):
    """Reward 1 and done everywhere: Q is 1. Not done, gamma 0.5: Q is 2."""
    for done, value in ((1.0, 1.0), (0.0, 2.0)):
        more = {"rebrac": {"critic_bc": 0.0}, "cql": {"conservatism": 0.0}}.get(name, {})
        agent = make(name, hidden=(32,), gamma=0.5, lr=3e-3, tau=0.05, **more)
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
        b = pgd.Transition(zeros, action, action[:, 0], zeros, jnp.ones(256), action)
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
def test_ensemble_members_start_apart(name):
    state = make(name, hidden=(16, 16)).init(jax.random.key(0), O, A)
    for w, _ in state.critic:
        assert np.abs(w[:-1] - w[1:]).max(axis=(1, 2)).min() > 0.05


# --- Every loss, its value and its gradient, against numpy ---

SMALL = dict(hidden=(7, 5))
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
    discounted = lambda v: b.reward + 0.9 * (1 - b.done) * v
    mse = lambda q, y: np.sum(np.mean((q - y) ** 2, axis=-1))
    cloned = lambda actor: np_normal(b.action, *np_gaussian(actor, b.obs))
    key_a, key_b = jax.random.split(KEY)

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
        weight = np.minimum(np.exp(3.0 * (q - v(n.value, b.obs))), 1.2)
        assert 0 < np.mean(weight == 1.2) < 1
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
        weight = np.minimum(np.exp(3 * advantage), 1.2)
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


BY_HAND = {
    "bc": {},
    "td3_bc": dict(critic_updates=1),
    "rebrac": dict(critic_updates=1, actor_bc=0.2, critic_bc=0.3),
    "iql": dict(max_weight=1.2),
    "awac": dict(max_weight=1.2),
    "sac_n": dict(num_critics=3),
    "edac": dict(num_critics=4, diversity=1.5),
    "cql": dict(conservatism=2.0, num_actions=4),
}


def test_every_agent_is_checked_by_hand():
    assert set(BY_HAND) == set(agents.AGENTS)


@pytest.mark.parametrize("name", agents.AGENTS)
def test_losses_and_gradients_are_those_computed_by_hand(name):
    """One update: each reported loss, the gradient that its optimiser was given along random
    directions, and the size of its step, against numpy. In numpy all but the trained parameters is
    constant, so a gradient that leaked through a target, a weight or another network would
    show."""
    settings = SMALL | BY_HAND[name] | ({} if name == "bc" else {"gamma": 0.9})
    agent = agents.make_agent(name, **settings)
    before = agent.init(jax.random.key(3), O, A)
    if name != "bc":  # targets of their own, so that mistaking one for the other shows
        moved = jax.tree.map(lambda x: 1.2 * x + 0.01, before.critic_target)
        before = before._replace(critic_target=moved)
    if name in ("td3_bc", "rebrac"):
        before = before._replace(actor_target=jax.tree.map(lambda x: 0.8 * x, before.actor_target))
    b = batch(jax.random.key(4), B)
    b = b._replace(next_action=b.next_action.at[:2].set(jnp.nan))
    after, metrics = jax.jit(agent.update)(KEY, before, b)

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


@pytest.mark.parametrize("name", [n for n in agents.AGENTS if n != "bc"])
def test_targets_follow_by_polyak_alone(name):
    tau = 0.25
    agent = agents.make_agent(name, tau=tau, hidden=(8,))
    before = agent.init(jax.random.key(0), O, A)
    b = batch(jax.random.key(2), B * agent.batches_per_update)
    after, _ = jax.jit(agent.update)(jax.random.key(1), before, b)
    for net in [f.removesuffix("_target") for f in before._fields if f.endswith("_target")]:
        old, new = getattr(before, net + "_target"), getattr(after, net + "_target")
        expected = jax.tree.map(lambda o, p: (1 - tau) * o + tau * p, old, getattr(after, net))
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6), new, expected)


@pytest.mark.parametrize(
    "name, settings",
    [("bc", {}), ("iql", {}), ("td3_bc", dict(policy_noise=0.0, critic_updates=1))],
)
def test_the_order_of_a_batch_does_not_matter(name, settings):
    agent = agents.make_agent(name, hidden=(8,), **settings)
    state, b = agent.init(jax.random.key(0), O, A), batch(jax.random.key(1), B)
    turned = jax.tree.map(lambda x: x[::-1], b)
    update = jax.jit(agent.update)
    (_, one), (_, two) = (update(jax.random.key(2), state, x) for x in (b, turned))
    for key in one:
        assert one[key] == pytest.approx(float(two[key]), rel=1e-5)


def test_more_critics_are_more_pessimistic():
    values = []
    for num in (2, 10):
        agent = agents.sac_n(num_critics=num, hidden=(16,))
        state = agent.init(jax.random.key(0), O, A)
        b = batch(jax.random.key(1), 256)
        values.append(float(jnp.mean(agent.q_value(state, b.obs, b.action))))
        assert agents.critics(state.critic, b.obs, b.action).shape == (num, 256)
    assert values[1] < values[0]


def test_edacs_penalty_turns_the_critics_gradients_apart():
    """Trained on nothing else, the ensemble's gradients by the action end less alike."""
    alike = {}
    for diversity in (0.0, 100.0):
        agent = agents.edac(num_critics=4, diversity=diversity, hidden=(16,), lr=3e-3)
        state = agent.init(jax.random.key(0), O, A)
        keys = jax.random.split(jax.random.key(1), 200)
        step = lambda state, key, agent=agent: agent.update(key, state, batch(key, B))
        _, metrics = jax.jit(lambda s, k, f=step: jax.lax.scan(f, s, k))(state, keys)
        alike[diversity] = float(metrics["alike"][-50:].mean())
    assert alike[100.0] < alike[0.0] - 0.3


def test_cql_values_actions_outside_the_log_less():
    """All rewards are alike; only the penalty tells the log's actions from others."""
    gaps = {}
    for conservatism in (0.0, 5.0):
        agent = agents.cql(conservatism=conservatism, num_actions=4, hidden=(32,), lr=3e-3)
        state = agent.init(jax.random.key(0), O, A)

        def step(state, key, agent=agent):
            b = batch(key, B)
            return agent.update(
                key, state, b._replace(action=0.3 + 0.05 * b.action, done=b.done * 0 + 1)
            )

        keys = jax.random.split(jax.random.key(1), 300)
        state, _ = jax.jit(lambda s, k, f=step: jax.lax.scan(f, s, k))(state, keys)
        b = batch(jax.random.key(9), 256)
        q = lambda a: float(jnp.mean(agent.q_value(state, b.obs, jnp.full((256, A), a))))
        gaps[conservatism] = q(0.3) - q(-0.8)
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
