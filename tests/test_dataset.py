"""Windows, normalisation and real transitions: what pgd.make_dataset makes of a log."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import real_log, successors, toy_log, write_hdf5

import data
import pgd
from host import flags
from host.errors import UserError


def brute_force_starts(terminals, timeouts, horizon):
    """The window rules, one start at a time: no window reaches a time-out or another episode, but
    for what follows a terminal; an episode's first counts horizon / 2 times."""
    starts, first = [], True
    for i in range(len(terminals)):
        inside = (terminals | timeouts)[i : i + horizon]
        end = i + int(np.argmax(inside)) if inside.any() else None
        if end is None and i + horizon <= len(terminals) or end is not None and terminals[end]:
            starts += [i] * (max(1, horizon // 2) if first else 1)
        first = (terminals | timeouts)[i]
    return starts


def ends_to_flags(lengths, terminal):
    flags = np.zeros((2, sum(lengths)), bool)
    for end, t in zip(np.cumsum(lengths) - 1, terminal):
        flags[0 if t else 1, end] = True
    return flags


def test_window_starts_on_hand_made_episodes():
    # an episode of 6 that ends in a time-out, one of 5 that ends in a terminal, one too short
    terminals, timeouts = ends_to_flags([6, 5, 3], [False, True, False])
    assert pgd.window_starts(terminals, timeouts, 4).tolist() == [0, 0, 1, 6, 6, 7, 8, 9, 10]
    assert pgd.window_starts(terminals, timeouts, 6).tolist() == [6, 6, 6, 7, 8, 9, 10]
    assert pgd.window_starts(timeouts, timeouts & False, 1).tolist() == [*range(6), *range(6, 14)]


@pytest.mark.parametrize("horizon", [2, 5, 8])
def test_window_starts_equal_the_rules_applied_one_by_one(horizon):
    rng = np.random.default_rng(horizon)
    terminals, timeouts = ends_to_flags(rng.integers(1, 20, 50), rng.random(50) < 0.5)
    starts = pgd.window_starts(terminals, timeouts, horizon)
    assert starts.tolist() == brute_force_starts(terminals, timeouts, horizon)
    assert len(starts) > 0


@pytest.mark.parametrize(
    "name, terminal, timeout",
    [
        ("friction-hopper.hdf5", 218, 0),
        ("simglucose.hdf5", 30, 32),
        ("door-human-v0.hdf5", 0, 25),
        ("safety-halfcheetah-train.hdf5", 0, 18),
    ],
)
def test_window_starts_of_the_real_logs(name, terminal, timeout):
    log = data.read_log(real_log(name))
    assert (log["terminals"].sum(), log["timeouts"].sum()) == (terminal, timeout)
    starts = pgd.window_starts(log["terminals"], log["timeouts"], 32)
    assert starts.tolist() == brute_force_starts(log["terminals"], log["timeouts"], 32)
    assert np.isin(np.flatnonzero(log["terminals"]), starts).all()


@pytest.mark.parametrize("known", [dict, successors])
def test_every_window_is_in_one_of_the_two_parts_and_is_a_piece_of_the_log(log, known):
    dataset = pgd.make_dataset(known(log), pgd.Config(horizon=8, validation=0.3))
    both = np.sort(np.concatenate([dataset.train_starts, dataset.val_starts]))
    assert both.tolist() == brute_force_starts(log["terminals"], log["timeouts"], 8)
    x = np.asarray(dataset.windows(jax.random.key(0), dataset.train_starts, 500, 8))
    steps, train = np.asarray(dataset.steps), np.asarray(dataset.train_starts)
    start = train[np.abs(x[:, None, 0, :3] - steps[None, train, :3]).max(-1).argmin(1)]
    ended = 0
    for window, i in zip(x, start):  # the log's steps, and its terminal again and again
        done = log["terminals"][i : i + 8]
        end = int(np.argmax(done)) if done.any() else 7
        np.testing.assert_array_equal(window, steps[i + np.minimum(np.arange(8), end)])
        ended += end < 7
    assert ended > 0
    assert len(np.unique(start)) > 0.6 * len(np.unique(train))  # drawn with replacement


def test_synthetic_data_of_a_perfect_model_has_the_logs_share_of_every_step():
    """Windows of the log, taken for a model's trajectories: terminals and the steps before them
    are as frequent as in the log, and so are an episode's first steps together."""
    log = toy_log(episodes=60, length=20)
    log["terminals"][:] = log["timeouts"] | log["terminals"]
    log["timeouts"][:] = False
    log["rewards"] = np.tile(np.arange(20.0), 60)  # tells a step's place in its episode
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8))
    x = dataset.windows(jax.random.key(0), dataset.train_starts, 20_000, 8)
    t = pgd.trajectories_to_transitions(dataset, x)
    place = np.bincount(np.round(t.reward).astype(int), minlength=20) / len(t.reward)
    # 8 windows hold a step, the last place of a window counts only for a terminal, and the first
    # window counts four times
    share = np.array([4, 5, 6, 7, 8, 9, 10, *[7] * 12, 8]) / 141
    np.testing.assert_allclose(place, share, rtol=0.05)
    np.testing.assert_allclose(np.mean(t.done), share[-1], rtol=0.05)


def test_dataset_is_standardised_and_turns_back_into_the_log(log):
    log["observations"][:, 1] = 4.0  # a constant channel
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8, fit_batch=8, batch_size=8))
    steps = np.asarray(dataset.steps)
    moving = [0, 2, 3, 4, 5]
    np.testing.assert_allclose(steps[:, :6].mean(0), 0.0, atol=1e-5)
    np.testing.assert_array_equal(np.unique(steps[:, 6]), [-1.0, 1.0])
    np.testing.assert_allclose(steps[:, moving].std(0), 1.0, atol=1e-4)
    assert dataset.std[1] == 1.0 and np.all(steps[:, 1] == 0.0)
    obs, action, reward, done = dataset.split(dataset.steps)[:4]
    mean, std = dataset.mean, dataset.std
    np.testing.assert_allclose(obs * std[:3] + mean[:3], log["observations"], atol=1e-5)
    np.testing.assert_allclose(action, log["actions"], atol=1e-5)
    np.testing.assert_allclose(reward, log["rewards"], atol=1e-5)
    np.testing.assert_array_equal(done, log["terminals"])


def test_actions_are_scaled_by_their_bounds(log):
    config = pgd.Config(horizon=8, fit_batch=8, batch_size=8)
    scaled = log | {"actions": 2.0 * log["actions"] + 1.0}
    dataset = pgd.make_dataset(scaled, config, action_low=-1.0, action_high=3.0)
    plain = pgd.make_dataset(log, config)
    np.testing.assert_allclose(dataset.steps, plain.steps, atol=1e-3)

    class Deterministic:
        act = staticmethod(lambda state, obs: obs[..., :2] * 0 + 0.5)

    assert pgd.make_act(Deterministic, None, dataset)(np.zeros(3)).tolist() == [2.0, 2.0]
    t = dataset.transitions(np.arange(50))
    np.testing.assert_allclose(
        dataset.unscale_action(t.action), scaled["actions"][dataset.usable[:50]], atol=1e-3
    )
    own = pgd.make_dataset(log, config, np.array([-2.0, 0.0]), np.array([4.0, 1.0]))
    corners = np.array([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(own.unscale_action(corners), [[-2, 0], [4, 1], [1, 0.5]], atol=1e-6)


def test_the_agent_is_shown_standardised_observations_and_its_actions_are_clipped(log):
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8), -2.0, 2.0)

    class Proud:
        act = staticmethod(lambda state, obs: state * obs[..., :2])

    act = pgd.make_act(Proud, 2.0, dataset)
    expected = 2.0 * np.clip(2.0 * np.asarray(dataset.steps[:50, :2]), -1.0, 1.0)
    np.testing.assert_allclose(act(log["observations"][:50]), expected, atol=1e-4)
    assert np.abs(expected).max() == 2.0


def test_real_transitions_are_steps_of_the_log_and_their_successors(log):
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8, fit_batch=8, batch_size=8))
    batch = dataset.sample(jax.random.key(0), 4000)
    mean, std = (np.asarray(x[:3]) for x in (dataset.mean, dataset.std))
    obs, next_obs = (np.asarray(x) * std + mean for x in (batch.obs, batch.next_obs))
    i = np.abs(obs[:, None] - log["observations"]).sum(-1).argmin(1)
    np.testing.assert_allclose(obs, log["observations"][i], atol=1e-4)
    assert not log["timeouts"][i].any()  # their successors are unknown
    np.testing.assert_array_equal(batch.done, log["terminals"][i])
    np.testing.assert_allclose(batch.reward, log["rewards"][i], atol=1e-4)
    going = ~log["terminals"][i]
    np.testing.assert_allclose(next_obs[going], log["observations"][i[going] + 1], atol=1e-4)
    assert len(np.unique(i)) == 480 - 8  # every other step is drawn, the 4 terminals among them


def test_held_out_windows_share_no_step_with_the_training_windows(log):
    dataset = pgd.make_dataset(
        log, pgd.Config(horizon=8, fit_batch=8, batch_size=8, validation=0.3)
    )
    steps = [
        {s + i for s in np.asarray(starts).tolist() for i in range(8) if s // 40 == (s + i) // 40}
        for starts in (dataset.train_starts, dataset.val_starts)
    ]
    assert steps[0] and steps[1] and not steps[0] & steps[1]
    assert len({s // 40 for s in steps[1]}) == 4  # 30 % of 12 episodes


def test_a_trajectorys_last_step_counts_only_as_a_terminal(log):
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8, fit_batch=8, batch_size=8))
    terminal = int(np.flatnonzero(log["terminals"])[0])
    windows = np.stack([dataset.steps[terminal - 7 : terminal + 1], dataset.steps[:8]])
    t = pgd.trajectories_to_transitions(dataset, jax.numpy.asarray(windows))
    assert t.reward.shape == (16,)
    assert t.done.tolist() == [0] * 7 + [1] + [0] * 8
    np.testing.assert_allclose(t.obs[7], dataset.steps[terminal, :3], atol=1e-6)
    np.testing.assert_allclose(t.next_obs[:7], dataset.steps[terminal - 6 : terminal + 1, :3])
    np.testing.assert_allclose(t.next_obs[8:15], dataset.steps[1:8, :3])
    np.testing.assert_array_equal(t.next_action[:7], t.action[1:8])
    np.testing.assert_array_equal(t.next_action[8:14], t.action[9:15])
    for field in t:  # elsewhere the first transition stands in
        np.testing.assert_array_equal(field[15], field[0])


def test_synthetic_terminals_of_friction_hopper_are_as_frequent_as_the_logs():
    log = data.read_log(real_log("friction-hopper.hdf5"))
    dataset = pgd.make_dataset(log, pgd.Config())
    x = dataset.windows(jax.random.key(0), dataset.train_starts, 4096, 32)
    done = np.asarray(pgd.trajectories_to_transitions(dataset, x).done)
    assert 0.8 < done.mean() / log["terminals"].mean() < 1.25


def flagged(**settings):
    return flags.Flags(flags.Job(), dataclasses.replace(flags.Config(), **settings), {})


def test_a_log_too_short_for_a_window_or_a_batch_is_one_clear_line():
    log = toy_log()
    log["timeouts"] |= log["terminals"]  # a window may run past a terminal
    log["terminals"][:] = False
    check = lambda f: flags.check_dataset(f, pgd.make_dataset(log, f.config), 40)
    with pytest.raises(UserError, match="0 windows of 64 steps"):
        check(flagged(horizon=64))
    with pytest.raises(UserError, match="--batch-size 10000 is larger than the log"):
        check(flagged(batch_size=10_000))
    with pytest.raises(UserError, match="--fit-batch 10000 is larger than the log"):
        check(flagged(fit_batch=10_000, horizon=8))
    check(flagged(horizon=8))


# --- A log of a single episode ---


@pytest.mark.parametrize("length, horizon, part", [(400, 8, 60), (100, 8, 15), (400, 40, 60)])
def test_of_a_single_episode_the_last_part_is_held_out(length, horizon, part):
    log = toy_log(episodes=1, length=length)
    log["terminals"][:] = False
    dataset = pgd.make_dataset(log, pgd.Config(horizon=horizon, validation=0.15))
    first = length - part  # of the held-out steps
    train, val = (np.asarray(x) for x in (dataset.train_starts, dataset.val_starts))
    again = [0] * (horizon // 2 - 1)
    assert train.tolist() == again + list(range(first - horizon)) and val.min() == first
    assert np.unique(val).tolist() == list(range(first, length - horizon))
    rows = lambda rows: np.asarray(dataset.usable)[np.asarray(rows)]
    assert rows(dataset.train_rows).max() < first <= rows(dataset.val_rows).min()


def test_the_held_out_part_of_a_single_episode_holds_a_window():
    """However small the fraction that is held out."""
    log = toy_log(episodes=1, length=400)
    log["terminals"][:] = False
    dataset = pgd.make_dataset(log, pgd.Config(horizon=32, validation=0.01))
    assert len(dataset.train_starts) > 250 and len(dataset.val_starts) > 0
    assert dataset.train_starts.max() + 31 < dataset.val_starts.min()


@pytest.mark.parametrize(
    "lengths", [(6, 1000), (1000, 3), (500, 500), (8,) * 30 + (100,), (400, 60, 60, 60)]
)
def test_no_log_of_uneven_episodes_loses_its_training_windows_to_the_held_out_part(lengths):
    parts = [toy_log(episodes=1, length=n, seed=n) for n in lengths]
    log = {key: np.concatenate([x[key] for x in parts]) for key in parts[0]}
    log["timeouts"] = log["timeouts"] | log["terminals"]
    log["terminals"] = np.zeros_like(log["timeouts"])
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8))
    train, val = (np.unique(x) for x in (dataset.train_starts, dataset.val_starts))
    assert len(val) > 0 and len(train) > 5 * len(val)
    assert not {s + i for s in train for i in range(8)} & {s + i for s in val for i in range(8)}
    rows = len(dataset.train_rows), len(dataset.val_rows)
    assert rows[1] > 0 and sum(rows) == len(dataset.usable) and rows[0] > 5 * rows[1]


def test_actions_without_bounds_are_not_clipped_at_one(log):
    wide = log | {"actions": 2.0 * log["actions"]}
    dataset = pgd.make_dataset(wide, pgd.Config(horizon=8))
    np.testing.assert_allclose(dataset.action_high, wide["actions"].max(0))
    np.testing.assert_allclose(dataset.action_low, wide["actions"].min(0))
    t = dataset.transitions(np.arange(300))
    logged = wide["actions"][dataset.usable[:300]]
    np.testing.assert_allclose(dataset.unscale_action(t.action), logged, atol=5e-3)
    narrow = pgd.make_dataset(log | {"actions": 0.5 * log["actions"]}, pgd.Config(horizon=8))
    assert narrow.action_low.tolist() == [-1, -1] and narrow.action_high.tolist() == [1, 1]


# --- Sampled trajectories become transitions ---


def sampled(dataset, done, seed=0):
    """A hand-made x (S, T, D) whose `done` flags are given, all else numbers of its own."""
    done = np.asarray(done, np.float32)
    x = np.random.default_rng(seed).normal(size=(*done.shape, 7)).astype(np.float32)
    x[..., -1] = (done - np.asarray(dataset.mean)[-1]) / np.asarray(dataset.std)[-1]
    return x


def test_nothing_after_a_terminal_is_in_the_transitions(log):
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8))
    done = np.zeros((6, 8))
    done[0, 3] = done[1, 7] = done[3, 0] = done[4, 1] = done[5, 2] = done[5, 6] = 1
    x = sampled(dataset, done)  # trajectory 2 has no terminal; 5 has another after its end
    t = jax.tree.map(np.asarray, pgd.trajectories_to_transitions(dataset, x))
    raw = jax.tree.map(np.asarray, dataset.split(x))
    kept = [(0, i) for i in range(4)] + [(1, i) for i in range(8)] + [(2, i) for i in range(7)]
    kept += [(3, 0), (4, 0), (4, 1), (5, 0), (5, 1), (5, 2)]
    left = iter(kept)  # the first transitions fill the places that are left
    for row, place in enumerate((i, j) for i in range(6) for j in range(8)):
        i, j = place if place in kept else next(left)
        at = f"transition {row}"
        np.testing.assert_array_equal(t.obs[row], raw.obs[i, j], at)
        np.testing.assert_array_equal(t.action[row], raw.action[i, j], at)
        assert (t.reward[row], t.done[row]) == (raw.reward[i, j], done[i, j]), at
        if not done[i, j]:
            np.testing.assert_array_equal(t.next_obs[row], raw.obs[i, j + 1], at)
            np.testing.assert_array_equal(t.next_action[row], raw.action[i, j + 1], at)
    assert len(list(left)) == 25 - 23


def test_no_observation_after_a_terminal_is_its_successor(log):
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8))
    done = np.zeros((1, 8))
    done[0, 3] = 1
    x = sampled(dataset, done)
    t = jax.tree.map(np.asarray, pgd.trajectories_to_transitions(dataset, x))
    later = {tuple(o) for o in x[0, 4:, :3].tolist()}
    assert not later & {tuple(o) for o in t.next_obs.tolist()}


def test_the_successor_of_a_terminal_in_the_log_is_not_the_next_episodes_start(log):
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8))
    real = dataset.transitions(np.arange(len(dataset.usable)))
    end = np.asarray(real.done) > 0
    np.testing.assert_array_equal(np.asarray(real.next_obs)[end], np.asarray(real.obs)[end])


# --- Ends of episodes ---


def test_a_known_successor_makes_a_timeout_usable(log):
    config = pgd.Config(horizon=8, fit_batch=8, batch_size=8)
    plain, known = (pgd.make_dataset(x, config) for x in (log, successors(log)))
    np.testing.assert_array_equal(plain.steps, known.steps[:480])
    assert (len(plain.usable), len(known.usable)) == (480 - 8, 480)
    batch = known.sample(jax.random.key(0), 4000)
    mean, std = (np.asarray(x[:3]) for x in (known.mean, known.std))
    obs, after = (np.asarray(x) * std + mean for x in (batch.obs, batch.next_obs))
    i = np.abs(obs[:, None] - log["observations"]).sum(-1).argmin(1)
    at_timeout = log["timeouts"][i]
    assert at_timeout.sum() > 10
    np.testing.assert_allclose(after[at_timeout], 9.0, atol=1e-4)
    inner = ~at_timeout & ~log["terminals"][i]
    np.testing.assert_allclose(after[inner], log["observations"][i[inner] + 1], atol=1e-4)
    assert known.train_starts.max() < 480 and known.val_starts.max() < 480
    next_action = np.asarray(batch.next_action)
    assert np.isnan(next_action[at_timeout]).all()  # the log does not say
    np.testing.assert_allclose(next_action[inner], log["actions"][i[inner] + 1], atol=1e-4)


def test_a_log_without_terminals_makes_no_synthetic_terminals(log):
    without = log | {"terminals": np.zeros(480, bool), "timeouts": np.arange(480) % 40 == 39}
    dataset = pgd.make_dataset(without, pgd.Config(horizon=8, fit_batch=8, batch_size=8))
    steps = jax.random.normal(jax.random.key(0), (64, 7)) * 3.0
    assert not dataset.split(steps).done.any()
    with_some = pgd.make_dataset(log, pgd.Config(horizon=8, fit_batch=8, batch_size=8))
    assert with_some.split(30.0 * steps).done.any()


# --- Action bounds ---


def test_actions_of_door_human_reach_beyond_one_and_get_bounds_that_hold_them(capsys):
    task = data.load(path=str(real_log("door-human-v0.hdf5")))
    assert task.action_high.max() == pytest.approx(1.366, abs=1e-3)
    said = capsys.readouterr().err
    assert "1.37" in said and said.count("\n") == 1
    dataset = pgd.make_dataset(task.log, pgd.Config(), task.action_low, task.action_high)
    assert np.isfinite(dataset.steps).all()


def test_actions_outside_a_simulators_bounds_are_said_once_and_clipped(tmp_path, log, capsys):
    log["observations"] = np.repeat(log["observations"], 2, axis=1)[:, :3]
    log["actions"] = 2.5 * np.sign(log["actions"][:, :1])
    log["timeouts"] |= log["terminals"]
    log["terminals"][:] = False  # pendulum has none
    task = data.load("pendulum-medium", str(write_hdf5(tmp_path / "a.hdf5", log)))
    said = capsys.readouterr().err
    assert "100.0% of the actions" in said and "2.50" in said and said.count("\n") == 1
    assert (task.action_low.item(), task.action_high.item()) == (-2.0, 2.0)
    dataset = pgd.make_dataset(task.log, pgd.Config(horizon=8), task.action_low, task.action_high)
    action = dataset.split(dataset.steps[:480]).action
    np.testing.assert_allclose(np.abs(action), 0.999, atol=1e-4)


def test_a_sampled_step_is_a_terminal_above_one_half(log):
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8))
    steps = np.zeros((2, dataset.steps.shape[-1]), np.float32)
    steps[:, -1] = (np.array([0.4, 0.6]) - float(dataset.mean[-1])) / float(dataset.std[-1])
    assert np.asarray(dataset.split(jax.numpy.asarray(steps)).done).tolist() == [0.0, 1.0]
