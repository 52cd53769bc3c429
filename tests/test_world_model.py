"""The ensemble against systems whose dynamics are known, and its loss against numpy."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import real_log, toy_log

import data
import pgd
from baselines import world_model as wm

CONFIG = wm.Config(
    members=4, elites=3, model_hidden=32, model_layers=2,
    model_steps=3_000, model_chunk=100, model_batch=64, rollout=5, horizon=8, trajectories=20,
    sample_batch=10, batch_size=8, validation=0.2,
)  # fmt: skip
PUSH = types.SimpleNamespace(sample=lambda key, obs: 0.5 * jnp.tanh(obs[..., :2]))


class Model(types.SimpleNamespace):
    """A Generator, and with it the predictions and measures of the module for the same config."""


def make(config):
    predict = functools.partial(wm.predict, config=config)
    score = functools.partial(wm.score, config=config)
    return Model(**wm.make_world_model(config)._asdict(), predict=predict, score=score)


def fit(config, log):
    dataset = pgd.make_dataset(log, config)
    model = make(config)
    key, chunk = jax.random.key(0), jax.jit(model.fit)
    state = model.init(key, dataset)
    for _ in range(model.num_chunks):
        state, metrics = chunk(key, state, dataset)
    return model, state, dataset, metrics


@pytest.fixture(scope="module")
def fitted():
    return fit(CONFIG, toy_log(episodes=60))


@pytest.mark.slow
def test_it_learns_a_noisy_linear_system_and_the_size_of_its_noise(fitted):
    model, state, dataset, _ = fitted
    t = dataset.transitions(dataset.val_rows)
    t = jax.tree.map(lambda x: x[t.done == 0], t)
    mean, std = (x[:3] for x in (dataset.mean, dataset.std))
    p = jax.jit(model.predict)(state, t.obs, t.action, dataset)
    obs = t.obs * std + mean
    true = 0.9 * obs + 0.3 * t.action.sum(-1, keepdims=True)  # of the log's own making
    error = (p.next_obs.mean(0) * std + mean - true) ** 2
    assert float(error.mean()) < 0.2 * 0.05**2  # well below the noise of one step
    np.testing.assert_allclose((p.obs_std * std).mean((0, 1)), 0.05, rtol=0.15)
    reward = obs.sum(-1) - (t.action**2).sum(-1)
    assert float(jnp.std(p.reward.mean(0) - reward) / jnp.std(reward)) < 0.1
    said = jax.jit(model.validate)(state, dataset)
    assert abs(said["within_1_sigma"] - 0.683) < 0.06 and abs(said["within_2_sigma"] - 0.954) < 0.04
    change = (t.next_obs - t.obs) * std
    best = 1 - 0.05**2 / np.asarray(change).var(0)  # what the true mean would explain
    assert np.median(best) - 0.02 < said["validation_r2"] < np.median(best) + 0.02


@pytest.mark.slow
def test_the_terminal_head_finds_where_episodes_end():
    """Terminals where the first observation is above 1, and nowhere else."""
    log = toy_log(episodes=300, length=20)
    x = log["observations"]
    log["terminals"], log["timeouts"] = x[:, 0] > 1.0, np.arange(len(x)) % 20 == 19
    log["timeouts"] &= ~log["terminals"]
    model, state, dataset, _ = fit(dataclasses.replace(CONFIG, model_steps=1_000, horizon=2), log)
    t = dataset.transitions(dataset.val_rows)
    done = jax.jit(model.predict)(state, t.obs, t.action, dataset).done.mean(0) > 0.5
    assert 0.02 < np.mean(t.done) < 0.9 and np.mean(done == (t.done > 0)) > 0.97
    none = dict(log, terminals=np.zeros(len(x), bool), timeouts=np.arange(len(x)) % 20 == 19)
    dataset = pgd.make_dataset(none, CONFIG)  # a log without terminals makes none
    assert np.all(model.predict(state, t.obs, t.action, dataset).done == 0)


def test_loss_is_the_gaussians_and_leaves_out_what_follows_a_terminal():
    params = wm.init_member(jax.random.key(0), 5, 4, 8, 2)
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=(6, 4))
    done = np.array([0, 0, 1, 0, 1, 0], np.float32)
    mean, log_var, logit = (np.asarray(a, np.float64) for a in wm.apply_member(params, x))
    nll = (mean - target) ** 2 / np.exp(log_var) + log_var
    nll[done > 0, :3] = 0.0
    cross = np.log1p(np.exp(logit)) - done * logit
    expected = nll.mean() + 0.01 * 4 * 10.5 + cross.mean()
    loss = wm.member_loss(params, x, target, done, 1.0)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    moved = target.copy()
    moved[2, :3] += 7.0
    np.testing.assert_allclose(wm.member_loss(params, x, moved, done, 1.0), loss, rtol=1e-6)
    moved[2, 3] += 7.0  # but its reward counts
    assert wm.member_loss(params, x, moved, done, 1.0) > loss + 0.1


def test_log_variances_stay_within_their_bounds():
    params = wm.init_member(jax.random.key(0), 5, 4, 8, 2)
    log_var = wm.apply_member(params, 1e4 * jax.random.normal(jax.random.key(1), (100, 5)))[1]
    assert log_var.min() >= -10.01 and log_var.max() <= 0.51 and log_var.std() > 1.0


def test_a_bootstrap_holds_about_63_percent_of_the_log_and_is_always_the_same():
    i = jnp.arange(5_000)
    drawn = wm.bootstrap(jax.random.key(0), i, 5_000)
    assert abs(len(np.unique(drawn)) / 5_000 - (1 - np.exp(-1))) < 0.02
    np.testing.assert_array_equal(wm.bootstrap(jax.random.key(0), i[7:9], 5_000), drawn[7:9])
    assert np.mean(wm.bootstrap(jax.random.key(1), i, 5_000) == drawn) < 0.01


@pytest.mark.slow
def test_members_differ_and_the_best_are_used(fitted):
    model, state, dataset, metrics = fitted
    t = dataset.transitions(dataset.val_rows[:50])
    p = model.predict(state, t.obs, t.action, dataset)
    assert p.next_obs.shape == (3, 50, 3) and np.abs(p.next_obs[0] - p.next_obs[1]).max() > 1e-4
    worst = int(np.argmax(state.best_error))
    spoilt = jax.tree.map(lambda x: x.at[worst].set(jnp.nan), state.best)
    again = model.predict(state._replace(best=spoilt), t.obs, t.action, dataset)
    np.testing.assert_array_equal(p.next_obs, again.next_obs)
    np.testing.assert_allclose(metrics["loss"], np.mean(state.best_error), rtol=1e-6)


@pytest.mark.slow
def test_training_stops_by_itself_and_keeps_each_members_best():
    config = dataclasses.replace(CONFIG, model_steps=4_000, patience=2, model_chunk=50)
    model, state, dataset, _ = fit(config, toy_log(episodes=60))
    assert int(state.stale) >= 2 and 100 < int(state.step) < 4_000
    again, _ = jax.jit(model.fit)(jax.random.key(0), state, dataset)
    assert int(again.step) == int(state.step)
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, again.best, state.best)


def rollouts(fitted, policy=PUSH, **settings):
    _, state, dataset, _ = fitted
    config = dataclasses.replace(CONFIG, **settings)
    model = make(config)
    made = jax.jit(lambda k, s, d: model.generate(k, s, policy, 1.0, d))
    t = made(jax.random.key(1), state, dataset)
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, model.length, *x.shape[1:]), t), dataset


def test_a_rollout_goes_on_from_a_logged_state_after_a_terminal(monkeypatch):
    """Where every step is predicted to be a terminal that leads far from the log."""
    config = dataclasses.replace(CONFIG, rollout=5)
    dataset, model = pgd.make_dataset(toy_log(episodes=60), config), make(config)
    state = model.init(jax.random.key(0), dataset)

    def terminal(elites, obs, action, dataset, scale):
        each = lambda x: jnp.broadcast_to(x, (config.elites, *x.shape))
        zero = each(jnp.zeros(obs.shape[:-1]))
        return wm.Prediction(each(obs + 100.0), zero, 0.0 * each(obs), zero, zero + 1.0)

    monkeypatch.setattr(wm, "predict_with", terminal)
    t = model.generate(jax.random.key(1), state, PUSH, 1.0, dataset)
    assert np.all(np.asarray(t.done) == 1) and np.asarray(t.next_obs).min() > 50.0
    logged = {tuple(x) for x in np.round(np.asarray(dataset.steps[:, :3]), 4)}
    assert all(tuple(x) in logged for x in np.round(np.asarray(t.obs), 4))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5, 40])
def test_rollouts_start_in_the_log_and_follow_the_policy(fitted, length):
    t, dataset = rollouts(fitted, rollout=length)
    assert t.obs.shape == (2 * (8 * 10 // length), length, 3)  # in two batches
    logged = {tuple(np.round(x, 4)) for x in np.asarray(dataset.steps[:, :3])}
    assert all(tuple(np.round(x, 4)) in logged for x in t.obs[:, 0])
    assert len(np.unique(t.obs[:, 0], axis=0)) > 0.7 * len(t.obs)
    np.testing.assert_allclose(t.action, 0.5 * np.tanh(t.obs[..., :2]), atol=1e-6)
    follows = np.all(t.obs[:, 1:] == t.next_obs[:, :-1], axis=-1)
    np.testing.assert_array_equal(follows, t.done[:, :-1] == 0)
    assert np.abs(t.next_obs - t.obs).max() > 0.1
    on = t.done == 0  # at the end of a rollout too, the policy says what it would do next
    np.testing.assert_allclose(t.next_action[on], 0.5 * np.tanh(t.next_obs[on][..., :2]), atol=1e-6)


@pytest.mark.slow
def test_every_step_is_drawn_from_a_random_elite_with_its_spread(fitted):
    model, state, dataset, _ = fitted
    chosen = np.argsort(state.best_error)[:3]
    *rest, (w, b) = state.best["layers"]
    apart = b.at[chosen, 0].add(1e3 * np.arange(3))  # each elite far from the others
    moved = state._replace(best=state.best | {"layers": [*rest, (w, apart)]})
    t, _ = rollouts((model, moved, dataset, None), rollout=1)
    p = model.predict(moved, t.obs[:, 0], t.action[:, 0], dataset)
    z = (t.next_obs[:, 0] - p.next_obs) / p.obs_std  # (3, n, 3)
    elite = np.argmin(np.abs(z[..., 0]), axis=0)
    assert np.all(np.bincount(elite, minlength=3) > 0.2 * len(elite))
    noise = np.take_along_axis(np.asarray(z), elite[None, :, None], axis=0)[0]
    assert np.abs(noise).max() < 5.0 and abs(noise.std() - 1.0) < 0.1
    reward = (t.reward[:, 0] - p.reward[elite, np.arange(len(elite))]) / p.reward_std.mean(0)
    assert abs(reward.std() - 1.0) < 0.2


@pytest.mark.slow
def test_training_goes_through_each_members_bootstrap(fitted, monkeypatch):
    model, _, dataset, _ = fitted
    start, seen = model.init(jax.random.key(0), dataset), []

    def one_row(key, i, num):
        seen.append(num)
        return 0 * i

    whole, _ = model.fit(jax.random.key(0), start, dataset)
    monkeypatch.setattr(wm, "bootstrap", one_row)
    lone, _ = model.fit(jax.random.key(0), start, dataset)
    assert set(seen) == {len(dataset.train_rows)}
    assert np.all(lone.best_error > 2 * whole.best_error)


@pytest.mark.slow
def test_observations_that_never_change_are_predicted_not_to():
    log = toy_log(episodes=30)
    goal = np.repeat(np.random.default_rng(0).normal(size=30), 40)[:, None]
    log["observations"] = np.concatenate([log["observations"], goal], axis=1).astype(np.float32)
    model, state, dataset, _ = fit(dataclasses.replace(CONFIG, model_steps=300), log)
    t = dataset.transitions(dataset.val_rows)
    p = jax.jit(model.predict)(state, t.obs, t.action, dataset)
    assert np.abs(p.next_obs[..., 3] - t.obs[:, 3]).max() < 1e-4 and p.obs_std[..., 3].max() < 1e-4
    assert jax.jit(model.validate)(state, dataset)["validation_r2"] > 0.5


@pytest.mark.slow
def test_errors_grow_with_the_length_of_a_rollout(fitted):
    """Against the true system without noise, from the same start under the same actions."""
    t, dataset = rollouts(fitted, rollout=20)
    mean, std = (np.asarray(x[:3]) for x in (dataset.mean, dataset.std))
    x, gap = t.obs[:, 0] * std + mean, []
    for step in range(20):
        x = 0.9 * x + 0.3 * t.action[:, step].sum(-1, keepdims=True)
        gap.append(np.mean((t.next_obs[:, step] * std + mean - x)[t.done.sum(1) == 0] ** 2))
    assert gap[0] < gap[4] < gap[12] and gap[0] < 2 * 0.05**2


@pytest.mark.slow
def test_the_penalty_is_the_largest_predicted_spread(fitted):
    model, state, dataset, _ = fitted
    free, _ = rollouts(fitted, rollout=1)
    paid, _ = rollouts(fitted, rollout=1, penalty=2.0)
    p = model.predict(state, free.obs[:, 0], free.action[:, 0], dataset)
    reward_std = p.reward_std / dataset.std[-2]
    norms = np.sqrt((p.obs_std**2).sum(-1) + reward_std**2)
    np.testing.assert_allclose(free.reward - paid.reward, 2 * norms.max(0)[:, None], rtol=1e-3)


@pytest.mark.slow
def test_the_published_halfcheetah_log_is_predicted_well():
    task = data.load(path=str(real_log("safety-halfcheetah-train.hdf5")))
    config = wm.Config(members=2, elites=2, model_steps=1_000, model_hidden=128)
    dataset = pgd.make_dataset(task.log, config, task.action_low, task.action_high)
    model = make(config)
    state, _ = jax.jit(lambda k, d: jax.lax.scan(
        lambda s, _: model.fit(k, s, d), model.init(k, d), None, model.num_chunks
    ))(jax.random.key(0), dataset)  # fmt: skip
    assert jax.jit(model.validate)(state, dataset)["validation_r2"] > 0.95
