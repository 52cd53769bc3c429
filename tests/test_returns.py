"""Returns of n steps: --n-step, of logged and of synthetic transitions."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_log

import agents
import pgd
from baselines.log_alone import make_log_alone
from baselines.world_model import make_world_model
from host import flags
from host.errors import UserError

GAMMA = 0.9
CONFIG = flags.Config(
    horizon=6, features=8, groups=4, blocks=1, fit_steps=5, fit_chunk=5, fit_batch=8,
    sample_steps=4, rounds=2, updates=2, batch_size=16, real_batch=8, trajectories=8,
    sample_batch=4, buffer_rounds=1, members=3, elites=2, model_hidden=16, model_layers=2,
    model_steps=20, model_chunk=5, model_batch=16, rollout=3,
)  # fmt: skip


def one_by_one(t: pgd.Transition, first: int, n: int, after) -> tuple:
    """The n-step return of transition `first` as a loop; after(i) -> the index of the transition
    that continues i, or None. -> (sum of rewards, weight of the value, index of the last step)."""
    total, weight, i = 0.0, 1.0, first
    for step in range(n):
        total += GAMMA**step * float(t.reward[i])
        weight *= GAMMA * (1.0 - float(t.done[i]))
        following = after(i)
        if step == n - 1 or float(t.done[i]) > 0 or following is None:
            return total, weight, i
        i = following


def assert_is(found: pgd.Transition, row: int, t: pgd.Transition, first: int, expected) -> None:
    total, weight, last = expected
    np.testing.assert_allclose(found.reward[row], total, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(GAMMA * (1.0 - found.done[row]), weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.obs[row], t.obs[first])
    np.testing.assert_array_equal(found.action[row], t.action[first])
    if weight > 0:
        np.testing.assert_array_equal(found.next_obs[row], t.next_obs[last])
        np.testing.assert_array_equal(found.next_action[row], t.next_action[last])


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_n_step_is_the_sum_of_discounted_rewards_and_the_value_after_them(n):
    rng = np.random.default_rng(0)
    num = 600
    done, follows = rng.random(num) < 0.15, rng.random(num) < 0.8
    follows[-1] = False
    x = rng.normal(size=(4, num, 2)).astype(np.float32)
    t = pgd.Transition(x[0], x[1], x[2, :, 0], np.float32(done), x[3], x[3] + 1.0)
    found = pgd.n_step(jax.tree.map(jnp.asarray, t), jnp.asarray(follows), GAMMA, n)
    ends = []
    for i in range(num):
        expected = one_by_one(t, i, n, lambda i: i + 1 if follows[i] else None)
        assert_is(found, i, t, i, expected)
        ends.append(expected[2] - i + 1)
    assert set(ends) == set(range(1, n + 1))  # every length was seen


def test_the_target_of_an_exact_value_is_that_value_whatever_n():
    """Bellman's equation: along a policy's own steps r + gamma V(s') is V(s), and so is the target
    of n steps."""
    rng = np.random.default_rng(1)
    reward, done = rng.normal(size=(5, 20)), np.zeros((5, 20))
    done[:2, -1] = 1.0
    value = np.zeros((5, 21))
    value[2:, 20] = rng.normal(size=3)  # of what follows the last step of the others
    for i in reversed(range(20)):
        value[:, i] = reward[:, i] + GAMMA * (1.0 - done[:, i]) * value[:, i + 1]
    flat = lambda x: jnp.asarray(x.reshape(-1, *x.shape[2:]), jnp.float32)
    obs, next_obs = flat(value[:, :-1, None]), flat(value[:, 1:, None])  # a state is its value
    t = pgd.Transition(obs, obs, flat(reward), flat(done), next_obs, next_obs)
    follows = jnp.arange(100) % 20 < 19
    for n in (1, 2, 5, 50):
        batch = pgd.n_step(t, follows, GAMMA, n)
        target = agents.bellman_target(batch, GAMMA, batch.next_obs[:, 0])
        np.testing.assert_allclose(target, value[:, :-1].ravel(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("n", [1, 3, 50])
def test_logged_returns_stay_within_their_episode(n, known):
    log = toy_log(episodes=9, length=12)
    log["timeouts"][5] = True  # an episode of 6 steps that a time-out ends
    if known:
        log["next_observations"] = np.roll(log["observations"], -1, axis=0) + 0.5
    dataset = pgd.make_dataset(log, CONFIG)
    usable, successor = np.asarray(dataset.usable), np.asarray(dataset.successors)
    num = len(usable)
    found = dataset.sample(jax.random.key(0), 400, n, GAMMA)
    first = np.asarray(jax.random.randint(jax.random.key(0), (400,), 0, num))
    t = jax.tree.map(np.asarray, dataset.transitions(jnp.arange(num)))
    row_of = {step: row for row, step in enumerate(usable)}

    def after(row):  # the transition that begins where this one ends, if its successor is usable
        step = successor[row]
        if step == usable[row] + 1 and step in row_of:
            return row_of[step] if row_of[step] == row + 1 else None
        return None

    lengths = set()
    for i, row in enumerate(first):
        expected = one_by_one(t, row, n, after)
        assert_is(found, i, t, row, expected)
        lengths.add(expected[2] - row + 1)
        episode = lambda row: np.searchsorted(
            np.flatnonzero(log["terminals"] | log["timeouts"]), usable[row]
        )
        assert episode(row) == episode(expected[2])
    assert len(lengths) >= min(n, 10)


def synthetic(config, maker):
    """-> (a round's synthetic transitions, those in the buffer after the round)."""
    dataset = pgd.make_dataset(toy_log(), config)
    agent = agents.td3_bc(gamma=GAMMA, hidden=(8,))
    program = pgd.make_program(config, agent, maker)
    run = pgd.Run(jax.random.key(0))
    state = program.init(run, dataset)
    made = program.generate(run, state, dataset)
    after, _ = jax.jit(program.round)(run, state, dataset)
    return made, jax.tree.map(lambda b: b[0], after.buffer)


@pytest.mark.parametrize("maker", [pgd.make_diffusion, make_world_model])
def test_the_buffer_holds_returns_that_stay_within_their_trajectory(maker):
    made, one = synthetic(CONFIG, maker)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), made, one)
    config = dataclasses.replace(CONFIG, n_step=3)
    made, kept = synthetic(config, maker)
    made, kept = (jax.tree.map(np.asarray, x) for x in (made, kept))
    length = maker(config).length
    if maker is make_world_model:
        length = config.rollout

    def after(i):
        inside = (i + 1) % length != 0
        return i + 1 if inside and np.array_equal(made.next_obs[i], made.obs[i + 1]) else None

    steps = set()
    for i in range(len(made.reward)):
        total, weight, last = one_by_one(made, i, 3, after)
        np.testing.assert_allclose(kept.reward[i], total, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(GAMMA * (1.0 - kept.done[i]), weight, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(kept.next_obs[i], made.next_obs[last], rtol=1e-3, atol=1e-3)
        steps.add(last - i + 1)
    assert steps == {1, 2, 3}


def test_the_logged_part_of_a_batch_has_returns_of_several_steps():
    config = dataclasses.replace(CONFIG, n_step=3, real_batch=16)
    dataset = pgd.make_dataset(toy_log(), config)
    empty = jax.tree.map(jnp.zeros_like, dataset.sample(jax.random.key(0), 16))
    agent = types.SimpleNamespace(  # its state is the last batch
        init=lambda *_: empty, update=lambda key, state, batch: (batch, {}), gamma=GAMMA,
        act=lambda state, obs: jnp.zeros((*obs.shape[:-1], 2)),
        log_prob=lambda state, obs, action: jnp.zeros(obs.shape[:-1]),
    )  # fmt: skip
    program = pgd.make_program(config, agent, make_log_alone)
    run = pgd.Run(jax.random.key(0))
    batch = jax.jit(program.round)(run, program.init(run, dataset), dataset)[0].agent
    usable, successor = np.asarray(dataset.usable), np.asarray(dataset.successors)
    t = jax.tree.map(np.asarray, dataset.transitions(jnp.arange(len(usable))))
    continues = np.append(successor[:-1] == usable[1:], False)
    for i in range(16):
        (row,) = np.flatnonzero((t.obs == np.asarray(batch.obs[i])).all(axis=1))
        after = lambda row: row + 1 if continues[row] else None
        assert_is(batch, i, t, row, one_by_one(t, row, 3, after))
    assert np.isclose(batch.done, 1.0 - GAMMA**2).sum() > 8


def test_in_a_sweep_of_gamma_every_run_has_its_own_returns():
    config = dataclasses.replace(CONFIG, n_step=3)
    dataset = pgd.make_dataset(toy_log(), config)
    agent = lambda gamma: agents.td3_bc(gamma=gamma, hidden=(8,))
    program = pgd.make_program(config, agent, make_world_model)

    def one_round(gamma):
        run = pgd.Run(jax.random.key(0), hyper={"gamma": gamma})
        return program.round(run, program.init(run, dataset), dataset)[0].buffer

    gammas = jnp.array([0.5, 0.9])
    swept = jax.jit(jax.vmap(one_round))(gammas)
    assert float(jnp.abs(swept.done[0] - swept.done[1]).max()) > 0.1
    for i, gamma in enumerate(gammas):
        alone = jax.jit(one_round)(gamma)
        for x, y in zip(alone, jax.tree.map(lambda x, i=i: x[i], swept)):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        least = float(1.0 - gamma**2)  # of three steps: gamma (1 - done) is gamma^3
        assert np.isclose(np.asarray(alone.done), least, atol=1e-6).any()


def test_the_discount_is_that_of_the_agent_and_every_agent_states_it():
    for name in agents.AGENTS:
        if name == "bc":
            continue
        assert agents.make_agent(name, gamma=0.5).gamma == 0.5, name
    for value in (0, 101):
        with pytest.raises(UserError, match="--n-step must lie between 1 and 100"):
            flags.check(flags.parse(["--n-step", str(value)]))
