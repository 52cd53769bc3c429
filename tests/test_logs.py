"""Logs as people have them: what was misread in silence has its right value here, or is refused."""

import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from conftest import data_command, real_log, write_hdf5

import data
import pgd
from host.errors import UserError
from host.logs import Rules, read_log


def log(episodes, steps, obs=3, act=1):
    rng, n = np.random.default_rng(0), episodes * steps
    return {
        "observations": rng.normal(size=(n, obs)),
        "actions": rng.uniform(-1, 1, (n, act)),
        "rewards": np.ones(n),
        "terminals": np.zeros(n),
        "timeouts": np.arange(n) % steps == steps - 1,
    }


def with_successors(made: dict) -> dict:
    """The log with the true successors; those of the last steps of episodes are new states."""
    after = np.roll(made["observations"], -1, axis=0)
    after[np.flatnonzero(made["timeouts"] | (made["terminals"] > 0))] += 10.0
    return made | {"next_observations": after}


@pytest.fixture(params=[".npz", ".hdf5"])
def save(request, tmp_path):
    """-> save(arrays), which writes them as they are."""

    def write(arrays: dict, name="log"):
        path = tmp_path / f"{name}{request.param}"
        if request.param == ".npz":
            np.savez(path, **arrays)
            return path
        return write_hdf5(path, arrays)

    return write


def ends(found: dict, key="timeouts") -> list[int]:
    return np.flatnonzero(found[key]).tolist()


# --- Ends of episodes ---


def test_time_outs_that_are_never_marked_come_from_the_tasks_limit(save, capsys):
    task = data.load("pendulum-medium", save(log(3, 200) | {"timeouts": np.zeros(600)}))
    returns, lengths = data.episode_returns(task.log)
    assert lengths.tolist() == [200] * 3 and returns.tolist() == [200.0] * 3
    assert "marks no time-out: episodes are taken to end after 200 steps" in capsys.readouterr().err
    dataset = pgd.make_dataset(task.log, pgd.Config(horizon=150))
    starts = {*np.asarray(dataset.train_starts), *np.asarray(dataset.val_starts)}
    assert all(start % 200 < 50 for start in starts)  # no window runs across a reset


def test_marks_win_over_the_limit(save, capsys):
    made = log(6, 50)
    task = data.load("pendulum-medium", save(made))
    assert ends(task.log) == ends(made) and not capsys.readouterr().err


def test_successors_without_time_outs_give_the_last_end_too(save, capsys):
    made = with_successors(log(2, 100))
    made.pop("timeouts")
    found = read_log(save(made))
    assert ends(found) == [99, 199]
    assert data.episode_returns(found)[0].tolist() == [100.0, 100.0]
    assert "1 steps are followed by another state" in capsys.readouterr().err


def test_a_log_of_one_episode_without_time_outs(save):
    made = with_successors(log(1, 100))
    made.pop("timeouts")
    found = read_log(save(made))
    assert ends(found) == [99]


def test_demonstrations_by_people_have_no_limit(save):
    made = log(4, 250, 39, 28)
    made.pop("timeouts")
    path = save(made)
    with pytest.raises(UserError, match="has no timeouts, .* add the array"):
        data.load("door-human", path)
    assert data.rules_of(data.resolve("door-expert")).limit == 200


def test_successors_that_are_the_next_episodes_start_are_left_out(save, capsys):
    made = log(4, 50)
    made["next_observations"] = np.roll(made["observations"], -1, axis=0)
    found = read_log(save(made))
    assert "next_observations" not in found and ends(found) == [49, 99, 149, 199]
    assert "the next episode has begun already" in capsys.readouterr().err
    dataset = pgd.make_dataset(found, pgd.Config(horizon=8))
    assert dataset.usable.shape[0] == 196  # no transition jumps into the next episode


@pytest.mark.parametrize("late", [1, -1])
@pytest.mark.parametrize("key", ["timeouts", "terminals"])
def test_marks_one_step_off_follow_the_successors(save, capsys, late, key):
    made = with_successors(log(4, 50))
    true = made["timeouts"].copy()
    made["timeouts"] = np.zeros(200, bool)
    made[key] = np.roll(true, late)
    made[key][0] = False  # that of the last end, which comes back at the beginning
    found = read_log(save(made))
    every = np.flatnonzero(found["terminals"] | found["timeouts"]).tolist()
    assert every == [49, 99, 149, 199]
    if key == "timeouts":
        assert not found["terminals"].any()
    elif late == 1:  # nobody knows how the last episode ended
        assert ends(found, "terminals") == [49, 99, 149] and ends(found) == [199]
    else:
        assert ends(found, "terminals") == every and not found["timeouts"].any()
    assert "marks of ends are one row off" in capsys.readouterr().err


def test_marks_of_both_kinds_move_and_keep_their_kind(save):
    made = with_successors(half_terminal())
    for late in (1, -1):
        off = made | {k: np.roll(made[k], late) for k in ("terminals", "timeouts")}
        for k in ("terminals", "timeouts"):
            off[k][0] = 0
        found = read_log(save(off))
        assert ends(found, "terminals") == [49, 149] and ends(found) == [99, 199]


def test_one_mark_beside_an_end_may_be_chance(save):
    made = with_successors(log(5, 100))
    made["timeouts"][:] = False
    made["terminals"][98] = 1.0
    found = read_log(save(made))
    assert ends(found, "terminals") == [98] and ends(found) == [99, 199, 299, 399, 499]


@pytest.mark.parametrize("spoil", ["noise", "rounded", "shuffled"])
def test_successors_of_another_precision_or_order(save, capsys, spoil):
    rng = np.random.default_rng(1)
    made = with_successors(log(10, 50))
    if spoil == "noise":
        made["next_observations"] += 0.01 * rng.normal(size=made["next_observations"].shape)
    elif spoil == "rounded":
        made["observations"] = made["observations"].round(2)
    else:
        order = rng.permutation(500)
        made = {key: x[order] for key, x in made.items()}
        with pytest.raises(UserError, match="rows should be in the order of time"):
            read_log(save(made))
        return
    found = read_log(save(made))
    assert ends(found) == ends(made)
    assert "to a tenth of a standard deviation only" in capsys.readouterr().err


def test_successors_in_single_precision_beside_double(save, capsys):
    made = with_successors(log(4, 50))
    made["observations"] += 1e5
    made["next_observations"] = np.float32(made["next_observations"] + 1e5)  # off by up to 0.004
    assert ends(read_log(save(made))) == [49, 99, 149, 199] and not capsys.readouterr().err


def test_single_precision_resets_are_known_too(save):
    made = log(4, 50)
    made["next_observations"] = np.float32(np.roll(made["observations"], -1, axis=0))
    assert "next_observations" not in read_log(save(made))


def test_successors_that_are_nan_at_ends_alone_are_unknown(save, capsys):
    made = half_terminal()
    made["next_observations"] = np.roll(made["observations"], -1, axis=0)
    made["next_observations"][49::50] = np.nan
    found = read_log(save(made))
    assert_same(found, made)
    assert "next_observations" not in found and "are NaN" in capsys.readouterr().err
    made["next_observations"][10] = np.nan
    with pytest.raises(UserError, match="next_observations has NaN"):
        read_log(save(made))


@pytest.mark.parametrize("ends_by", ["limit", "successors"])
def test_a_goal_without_time_outs_has_its_trajectories(save, ends_by):
    made = log(5, 1000)
    made["terminals"] = (np.arange(5000) % 1000 >= 800) * 1.0
    if ends_by == "successors":
        after = np.roll(made["observations"], -1, axis=0)
        after[999::1000] += 10.0
        made["next_observations"] = after
    made["timeouts"][:] = False
    found = read_log(save(made), data.rules_of(data.resolve("antmaze-medium-play")))
    assert len(found["rewards"]) == 5 * 801 and ends(found, "terminals") == [*range(800, 4005, 801)]
    assert not found["timeouts"].any()


def test_short_episodes_are_no_mask(save):
    rng = np.random.default_rng(0)
    last = np.cumsum(rng.integers(1, 4, 100)) - 1  # episodes of one to three steps
    made = log(1, last[-1] + 1)
    made["timeouts"][:] = False
    made["terminals"][last] = 1.0
    assert len(data.episode_returns(read_log(save(made)))[0]) == 100
    with pytest.raises(UserError, match="terminals is 1 in 100.0% of the rows"):
        read_log(save(log(3, 50) | {"terminals": np.ones(150)}))


def goal_log() -> dict:
    made = log(4, 250, 29, 8)
    made["rewards"][:] = 0.0
    made["rewards"][340:350] = made["terminals"][340:350] = 1.0
    return made


def test_a_trajectory_ends_at_its_goal(save, capsys):
    found = read_log(save(goal_log()), data.rules_of(data.resolve("antmaze-umaze")))
    returns, lengths = data.episode_returns(found)
    assert returns.tolist() == [0, 1, 0, 0] and lengths.tolist() == [250, 91, 250, 250]
    assert ends(found, "terminals") == [340] and ends(found) == [249, 590, 840]
    task = data.load("antmaze-umaze", save(goal_log()))
    assert task.score(task.behaviour_return) == pytest.approx(25.0)
    assert "159 steps after a trajectory has reached its goal" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, message",
    [
        (lambda x: x - 1 + 2 * (np.arange(200) == 9), "terminals holds -1; it should hold 0 and 1"),
        (lambda x: x + 0.5 * (np.arange(200) == 9), "terminals holds 0.5"),
        (lambda x: 1 - (np.arange(200) % 50 == 49), "terminals is 1 in 98.0% of the rows"),
        (lambda x: x + 2 * (np.arange(200) == 9), "terminals holds 2"),
    ],
)
def test_terminals_are_0_or_1_at_ends(save, values, message):
    made = log(4, 50)
    made["terminals"] = values(made["terminals"])
    with pytest.raises(UserError, match=message):
        read_log(save(made))
    made = log(4, 50)
    made["timeouts"] = made["timeouts"] * 0.25
    with pytest.raises(UserError, match="timeouts holds 0.25"):
        read_log(save(made))


@pytest.mark.parametrize("open_steps", [0, 30])
def test_rows_that_were_never_filled_are_left_out(save, capsys, open_steps):
    made = log(4, 50)
    if open_steps:  # of an episode that has not ended
        more = log(1, open_steps) | {"timeouts": np.zeros(open_steps, bool)}
        made = {key: np.concatenate([x, more[key]]) for key, x in made.items()}
    full = {k: np.concatenate([x, np.zeros((300, *x.shape[1:]))]) for k, x in made.items()}
    found = read_log(save(full))
    assert len(found["rewards"]) == 200 + open_steps and ends(found) == [49, 99, 149, 199]
    assert "last 300 rows are one repeated row" in capsys.readouterr().err


def test_a_robot_at_rest_inside_an_episode_is_kept(save, capsys):
    made = log(4, 50)
    for key in ("observations", "actions"):
        made[key][60:90] = 0.0  # 30 equal rows before an end
    assert len(read_log(save(made))["rewards"]) == 200 and not capsys.readouterr().err


def test_terminals_at_the_limit_alone_and_in_a_task_without_any_are_time_outs(save, capsys):
    made = log(3, 200)
    made["terminals"], made["timeouts"] = made["timeouts"], np.zeros(600)
    found = read_log(save(made), Rules(limit=200))
    assert not found["terminals"].any() and ends(found) == [199, 399, 599]
    assert "because they are at the task's limit of 200 steps" in capsys.readouterr().err
    task = data.load("pendulum-medium", save(made))
    assert not task.log["terminals"].any()
    assert "because this task has no terminals" in capsys.readouterr().err
    made = log(3, 200)
    made["terminals"][77] = 1.0  # one true terminal: the others are believed as well
    made["terminals"] += made["timeouts"]
    made["timeouts"][:] = 0.0
    found = read_log(save(made), Rules(limit=200))
    assert ends(found, "terminals") == [77, 199, 399, 599]


def test_ends_that_are_marked_as_terminals_and_as_time_outs(save, capsys):
    """As by a recorder that keeps done, an end of either kind, under the name of terminals."""
    made = log(4, 50)
    made["terminals"] = made["timeouts"].copy()
    made["terminals"][77] = 1.0
    found = read_log(save(made))
    assert ends(found, "terminals") == [77] and ends(found) == [49, 99, 149, 199]
    assert "4 ends are marked as terminals and as time-outs; they are taken as time-outs" in (
        capsys.readouterr().err
    )
    made["terminals"] = made["timeouts"] = np.isin(np.arange(200), [29, 79, 129, 199])
    found = read_log(save(made))  # every end is marked twice: the longest are time-outs
    assert ends(found, "terminals") == [29, 79, 129, 199] and not ends(found)
    assert "they are taken as terminals" in capsys.readouterr().err
    made["terminals"] = made["timeouts"] = np.isin(np.arange(200), [29, 89, 149, 199])
    found = read_log(save(made))
    assert ends(found, "terminals") == [29, 199] and ends(found) == [89, 149]
    assert "the 2 after 60 steps are taken as time-outs" in capsys.readouterr().err
    lengths = np.append(np.random.default_rng(0).integers(5, 15, 98), [15, 15])
    made = log(1, lengths.sum())  # two of a hundred ends tie by chance
    made["terminals"] = made["timeouts"] = np.isin(np.arange(lengths.sum()), lengths.cumsum() - 1)
    assert len(ends(read_log(save(made)), "terminals")) == 100
    assert ends(read_log(save(made), Rules(limit=15))) == list(lengths.cumsum()[-2:] - 1)


def of_vector_environment(known: bool, terminal=(1, 4), num=8, steps=50) -> dict:
    """A walk as gymnasium's vector environments record it: after each end, a row that leads from
    the final state to the next episode's first."""
    rng, rows = np.random.default_rng(0), []
    for e in range(num):
        x = 20.0 * rng.normal(size=3)
        for t in range(steps):
            after = x + 0.1 * rng.normal(size=3)
            last = t == steps - 1
            rows.append((x, after, 1.0 + x[0], last and e in terminal, last and e not in terminal))
            x = after
        rows.append((x, x * 0, 0.0, False, False))
    obs, after, rewards, terminals, timeouts = map(np.array, zip(*rows[:-1]))
    breaks = np.flatnonzero(rewards == 0)
    after[breaks] = obs[breaks + 1]
    made = {"observations": obs, "actions": rng.uniform(-1, 1, (len(obs), 2)), "rewards": rewards,
            "terminals": terminals, "timeouts": timeouts}  # fmt: skip
    return made | ({"next_observations": after} if known else {})


@pytest.mark.parametrize("known", [True, False])
def test_rows_between_episodes_of_a_vector_environment_are_left_out(save, capsys, known):
    made = of_vector_environment(known)
    found = read_log(save(made))
    assert np.flatnonzero(found["timeouts"] | found["terminals"]).tolist() == list(
        range(49, 400, 50)
    )
    assert ends(found, "terminals") == [99, 249] and found["rewards"].all()
    steps = np.flatnonzero(made["rewards"])
    np.testing.assert_allclose(found["observations"], made["observations"][steps], rtol=1e-5)
    if known:  # the true successors at time-outs are kept
        after = made["next_observations"][steps]
        np.testing.assert_allclose(found["next_observations"], after, rtol=1e-5)
    assert "7 rows after the ends of episodes are no steps" in capsys.readouterr().err


@pytest.mark.parametrize("sparse", [True, False])
def test_a_first_step_without_a_reward_is_kept(save, capsys, sparse):
    """Also where every episode begins with a reward of 0, if its state is a new one."""
    made = of_vector_environment(True)
    kept = made["rewards"] != 0
    made = {key: x[kept] for key, x in made.items()}
    made["rewards"][::50] = 0.0
    if sparse:
        made["rewards"][np.arange(400) % 50 < 48] = 0.0
    assert len(read_log(save(made))["rewards"]) == 400 and not capsys.readouterr().err


def test_rows_after_ends_that_may_be_steps_are_kept(save, capsys):
    made = of_vector_environment(False)
    made["rewards"][made["rewards"] == 0] = 0.5  # as where the marks are a row early
    assert len(read_log(save(made))["rewards"]) == len(made["rewards"])
    rng = np.random.default_rng(0)
    walk = log(8, 50) | {"observations": np.cumsum(rng.normal(size=(400, 3)), axis=0)}
    walk["rewards"][::50] = 0.0  # one long walk that is cut and goes on
    assert len(read_log(save(walk))["rewards"]) == 400 and not capsys.readouterr().err
    short = log(1, 41)  # episodes of two steps with a reward at the end
    short["terminals"] = short["rewards"] = (np.arange(41) % 2 == 0) * 1.0
    assert len(read_log(save(short))["rewards"]) == 41
    made = of_vector_environment(True, terminal=range(8))
    steps = np.flatnonzero(made["rewards"])
    made = {key: x[steps] for key, x in made.items()}
    made["rewards"] = 1.0 - made["terminals"]  # 0 at the end alone
    made["terminals"] = np.roll(made["terminals"], -1)  # and marked a row early
    found = read_log(save(made))
    assert (
        ends(found, "terminals")[:-1] == list(range(49, 399, 50)) and len(found["rewards"]) == 400
    )


@pytest.mark.parametrize("filler", ["itself", "zeros", "first", "next"])
def test_successors_at_time_outs_that_are_filled_in_are_left_out(save, capsys, filler):
    made = of_vector_environment(True, terminal=())
    kept = made["rewards"] != 0
    made = {key: x[kept] for key, x in made.items()}
    last, obs = np.arange(49, 400, 50), made["observations"]
    fill = {"itself": obs[last], "zeros": 0.0, "first": obs[last - 49]}
    fill["next"] = obs[np.append(last[:-1] + 1, 0)]
    made["next_observations"][last] = fill[filler]
    assert "next_observations" not in read_log(save(made))
    said = {"itself": "the observations themselves", "zeros": "zeros", "next": "rows that follow",
            "first": "first observations of their own"}  # fmt: skip
    assert said[filler] in capsys.readouterr().err
    made["next_observations"][99] += 1.0  # one of them is true
    assert "next_observations" in read_log(save(made))


def test_ends_that_look_wrong_are_said(save, capsys):
    read_log(save(log(1, 3000) | {"timeouts": np.zeros(3000)}))
    assert "no end of an episode is marked, so that all 3,000 rows" in capsys.readouterr().err
    found = read_log(save(log(1, 3000)), Rules(limit=1000))  # the last row alone is marked
    assert ends(found) == [999, 1999, 2999]
    read_log(save(log(2, 2500)), Rules(limit=1000))
    assert "an episode of 2,500 steps is longer than the task's 1,000" in capsys.readouterr().err
    made = log(5, 100)
    made["terminals"] = (np.arange(500) % 100 >= 60) * 1.0
    made["timeouts"][:] = 0.0
    read_log(save(made))
    assert "195 of 200 terminals follow a terminal" in capsys.readouterr().err
    read_log(save(log(4, 50)))
    assert not capsys.readouterr().err


def test_masks_tell_goals_from_the_ends_of_trajectories(save, capsys):
    """As in the dictionaries that ogbench.make_env_and_datasets returns."""
    made = log(4, 50)
    made["terminals"] = made.pop("timeouts")
    masks = np.ones(200)
    masks[[20, 149]] = 0.0
    found = read_log(save(made | {"masks": masks}))
    assert ends(found, "terminals") == [20, 149] and ends(found) == [49, 99, 199]
    assert "terminals are where masks is 0" in capsys.readouterr().err
    made["timeouts"], made["terminals"] = made["terminals"], 1.0 - masks
    found = read_log(save(made | {"masks": masks}))  # they say what terminals say
    assert ends(found, "terminals") == [20, 149] and not capsys.readouterr().err
    for other in (0.5 * masks, np.ones(200), 1 - masks, 1.0 - made["timeouts"]):  # other kinds
        found = read_log(save(made | {"masks": other}))
        assert ends(found, "terminals") == [20, 149]
    made = log(4, 50)
    made["terminals"] = made.pop("timeouts")[:, None]  # columns
    found = read_log(save(made | {"masks": masks[:, None], "valids": np.ones((200, 1))}))
    assert ends(found, "terminals") == [20, 149] and ends(found) == [49, 99, 199]


def test_last_observations_of_a_compact_ogbench_set_are_no_steps(save, capsys):
    made = log(4, 50)
    made["terminals"] = (np.arange(200) % 50 >= 48) * 1.0
    valids, masks = (np.arange(200) % 50 != 49) * 1.0, np.ones(200)
    masks[[98, 99]] = 0.0  # a goal
    del made["timeouts"]
    found = read_log(save(made | {"masks": masks, "valids": valids}))
    assert ends(found, "terminals") == [97] and ends(found) == [48, 146, 195]
    after = made["observations"][1:][valids[:-1] > 0]
    np.testing.assert_allclose(found["next_observations"], after, rtol=1e-5)
    assert "4 rows that valids marks are last observations" in capsys.readouterr().err


# --- Numbers ---


@pytest.mark.parametrize("far", [1.7e9, 1.7e18])
def test_observations_far_from_zero_keep_their_changes(save, capsys, far):
    """They are centred in double precision, before they are cast."""
    made = log(4, 50)
    moved = made | {"observations": (1e9 if far > 1e12 else 1) * made["observations"] + far}
    found = read_log(save(moved))
    said = capsys.readouterr().err
    assert "observations 0, 1, 2 reach" in said and "single precision, which cannot" in said
    near = read_log(save(made))
    steps = [pgd.make_dataset(x, pgd.Config(horizon=8)).steps for x in (found, near)]
    np.testing.assert_allclose(steps[0], steps[1], atol=1e-4)
    assert not capsys.readouterr().err


def test_the_precision_of_a_file_does_not_change_the_policys_observations(save, capsys):
    """A hopper that hardly moves: single precision resolves it, so nothing is shifted or said."""
    made = log(4, 50)
    made["observations"] = 1.25 + 1e-5 * made["observations"]
    single = {k: np.float32(x) if k == "observations" else x for k, x in made.items()}
    means = [
        pgd.make_dataset(read_log(save(x)), pgd.Config(horizon=8)).mean for x in (made, single)
    ]
    np.testing.assert_allclose(means[0], means[1], rtol=1e-6)
    assert float(means[0][0]) == pytest.approx(1.25) and not capsys.readouterr().err


def test_far_observations_keep_their_successors(save):
    made = with_successors(log(4, 50))
    far = made | {k: made[k] + 1.7e9 for k in ("observations", "next_observations")}
    found = read_log(save(far))
    gap = found["next_observations"] - found["observations"]
    np.testing.assert_allclose(gap, made["next_observations"] - made["observations"], atol=1e-4)
    assert ends(found) == [49, 99, 149, 199]


@pytest.mark.parametrize("scale", [1e-7, 1e-12, 1e9])
def test_the_unit_of_an_observation_does_not_matter(save, scale):
    made = with_successors(log(4, 50))
    scaled = made | {k: made[k] * scale for k in ("observations", "next_observations")}
    scaled["timeouts"] = made["timeouts"] & False
    found = read_log(save(scaled))
    assert ends(found) == [49, 99, 149, 199]  # found by the successors
    steps = [pgd.make_dataset(x, pgd.Config(horizon=8)).steps for x in (found, made)]
    np.testing.assert_allclose(steps[0], steps[1], atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 5.3, -1e9, 1e-9])
def test_a_constant_observation_is_0_when_standardised(value):
    made = log(4, 50)
    made["observations"][:, 1] = value
    steps = np.asarray(pgd.make_dataset(made, pgd.Config(horizon=8)).steps)
    np.testing.assert_allclose(steps[:, 1], 0.0, atol=1e-6)
    assert np.isfinite(steps).all()


@pytest.mark.parametrize(
    "key, value", [("observations", 1e38), ("actions", -3e38), ("rewards", 1e32)]
)
def test_one_number_that_would_drown_all_others_is_refused(save, key, value):
    made = log(4, 50)
    made[key][7] = value
    with pytest.raises(
        UserError, match=rf"{key} reaches \de\+\d+ in row 7|{key} reaches .* in row 7"
    ):
        read_log(save(made))


@pytest.mark.parametrize("dtype", [np.int64, np.float32, np.float64, np.uint8])
def test_actions_that_are_indices_are_refused_unless_asked_for(save, dtype, capsys):
    made = log(4, 50)
    made["actions"] = (made["actions"] > 0).astype(dtype)
    path = save(made)
    with pytest.raises(UserError, match="the integers 0 to 1.*--discrete-as-continuous"):
        data.load(None, path)
    assert data.load(None, path, discrete=True).log["actions"].max() == 1.0
    made["actions"] = np.sign(log(4, 50)["actions"])  # a saturated controller
    read_log(save(made))


# --- Files ---


@pytest.mark.parametrize("name", ["log.HDF5", "log.h5py", "log", "log.data"])
def test_a_file_is_known_by_its_content(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    os.rename(write_hdf5(tmp_path / "x", log(4, 50)), tmp_path / name)
    assert "200 in 4 ended episodes" in data_command(capsys, monkeypatch, "info", name)
    assert len(data.load(None, name).log["rewards"]) == 200


@pytest.mark.parametrize("name", ["log.NPZ", "log", "log.hdf5"])
def test_an_npz_is_known_by_its_content(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", **log(4, 50))
    os.rename("x.npz", name)
    assert "200 in 4 ended episodes" in data_command(capsys, monkeypatch, "info", name)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.savez(tmp_path / "x.npz", **log(4, 50))
    assert len(data.load(None, "~/x.npz").log["rewards"]) == 200
    assert "200 in 4" in data_command(capsys, monkeypatch, "info", "~/x.npz")


def test_info_of_a_file_with_its_task_and_an_open_tail(tmp_path, monkeypatch, capsys):
    made = log(3, 200)
    made["timeouts"][599] = False
    np.savez(tmp_path / "x.npz", **made)
    said = data_command(capsys, monkeypatch, "info", tmp_path / "x.npz", "--env", "pendulum-medium")
    assert "600 in 2 ended episodes of 200 to 200, and 200 of an episode that has not ended" in said
    assert "score" in said
    made["terminals"][[50, 199]] = 1.0
    np.savez(tmp_path / "x.npz", **made)
    said = data_command(capsys, monkeypatch, "info", tmp_path / "x.npz")
    assert "2 terminals, 2 timeouts, 1 steps are both and count as terminals" in said


def test_a_folder_a_pickle_and_rlds_are_one_clear_line(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "log.pkl").write_bytes(b"\x80\x04\x95rest")
    (tmp_path / "a.tfrecord-00000-of-00001").write_bytes(b"abcdefg")
    (tmp_path / "a.npz").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    for name, message in [("folder", "is a folder"), ("log.pkl", "a Python pickle.*numpy.savez"),
                          ("a.tfrecord-00000-of-00001", "is RLDS"),
                          ("a.npz", "is a pointer of Git LFS")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            data.load(None, tmp_path / name)


def test_a_file_that_is_being_written_is_called_locked(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", log(4, 50))
    code = (
        "import h5py, sys, time\n"
        "with h5py.File(sys.argv[1], 'r+') as f:\n"
        "    print('open', flush=True); time.sleep(60)"
    )
    env = os.environ | {"HDF5_USE_FILE_LOCKING": "TRUE"}
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=-1, env=env)
    try:
        writer.stdout.readline()
        with pytest.raises(UserError, match="is locked, since another program is writing it"):
            read_log(path)
    finally:
        writer.kill()
        writer.wait()


def test_a_filter_that_is_not_installed_is_named_as_the_cause(tmp_path):
    with h5py.File(write_hdf5(tmp_path / "a.hdf5", log(4, 50)), "r+") as f:
        rewards = f["rewards"][:]
        del f["rewards"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((200,))
        plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))  # Zstandard
        space = h5py.h5s.create_simple((200,))
        x = h5py.h5d.create(f.id, b"rewards", h5py.h5t.NATIVE_DOUBLE, space, plist)
        x.write_direct_chunk((0,), rewards.tobytes(), 0)
    with pytest.raises(UserError, match="compressed with a filter that is not installed"):
        read_log(tmp_path / "a.hdf5")


@pytest.mark.parametrize(
    "key, shape, message",
    [
        ("actions", (200,), r"actions has shape \(200,\), it should be \(200, A\)"),
        ("observations", (200,), r"observations has shape \(200,\), it should be \(200, O\)"),
        ("observations", (200, 8, 8, 3), "images are not supported"),
        ("next_observations", (200, 8, 8, 3), "images are not supported"),
    ],
)
def test_wrong_shapes_say_the_right_one(save, key, shape, message):
    with pytest.raises(UserError, match=message):
        read_log(save(log(4, 50) | {key: np.zeros(shape, np.float32)}))


# --- Layouts ---


def assert_same(found: dict, made: dict) -> None:
    for key in ("observations", "actions", "rewards"):
        np.testing.assert_allclose(found[key], np.float32(made[key]), rtol=1e-6)
    assert ends(found) == ends(made) and ends(found, "terminals") == ends(made, "terminals")


def half_terminal() -> dict:
    """Episodes 0 and 2 end in a terminal, 1 and 3 by a time-out."""
    made = log(4, 50)
    made["terminals"][[49, 149]] = 1
    made["timeouts"][[49, 149]] = False
    return made


LAYOUTS = {
    "gymnasium": lambda m: {
        "obs": m["observations"], "action": m["actions"], "reward": m["rewards"],
        "terminations": m["terminals"] > 0, "truncations": m["timeouts"],
    },
    "CleanRL": lambda m: {
        "observations": m["observations"], "actions": m["actions"], "rewards": m["rewards"],
        "dones": m["terminals"] + m["timeouts"], "truncated": m["timeouts"],
    },
    "d3rlpy 1": lambda m: {
        "observations": m["observations"], "actions": m["actions"], "rewards": m["rewards"],
        "terminals": m["terminals"], "episode_terminals": m["terminals"] + m["timeouts"],
    },
    "terminated": lambda m: {
        "state": m["observations"], "acts": m["actions"], "rews": m["rewards"],
        "terminated": m["terminals"], "truncated": m["timeouts"],
    },
    "DSRL": lambda m: m | {"costs": np.ones(200)},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_arrays_under_other_names(save, name):
    made = half_terminal()
    assert_same(read_log(save(LAYOUTS[name](made))), made)


def test_stable_baselines_logs_mark_the_starts_of_episodes(save, capsys):
    made = log(4, 50)
    starts = np.roll(made["timeouts"], 1)
    arrays = {"obs": made["observations"], "actions": made["actions"], "rewards": made["rewards"],
              "episode_starts": starts, "episode_returns": np.full(4, 50.0)}  # fmt: skip
    assert_same(read_log(save(arrays)), made)
    assert "all ends are taken as time-outs" in capsys.readouterr().err
    made = half_terminal()
    arrays["dones"] = made["terminals"] > 0
    assert_same(read_log(save(arrays)), made)


def test_dones_beside_terminals_are_the_other_ends(save):
    made = half_terminal()
    done = made["terminals"] + made["timeouts"]
    arrays = {k: made[k] for k in ("observations", "actions", "rewards", "terminals")}
    assert_same(read_log(save(arrays | {"dones": done})), made)
    arrays.pop("terminals")
    assert_same(
        read_log(save(arrays | {"dones": done[:, None], "timeouts": made["timeouts"]})), made
    )
    starts = np.roll(done, 1)
    assert_same(read_log(save(arrays | {"timeouts": made["timeouts"], "episode_starts": starts,
                                 "dones": done})), made)  # fmt: skip


def test_dones_at_the_limit_are_time_outs(save, capsys):
    made = log(1, 2800, 11, 3)
    last = np.cumsum([1000, 500, 1000, 300]) - 1
    made["dones"] = np.isin(np.arange(2800), last)
    del made["terminals"], made["timeouts"]
    task = data.load("hopper-medium", save(made))
    assert ends(task.log, "terminals") == [1499, 2799] and ends(task.log) == [999, 2499]
    assert "2 terminals are taken as time-outs" in capsys.readouterr().err


def test_states_beside_observations_are_another_array(save):
    made = with_successors(log(4, 50))
    more = {"states": np.zeros((200, 9)), "next_states": np.zeros((200, 9))}
    next_obs = made.pop("next_observations")
    assert "next_observations" not in read_log(save(made | more))
    made["state"] = made.pop("observations")
    found = read_log(save(made | {"next_state": next_obs}))
    np.testing.assert_allclose(found["next_observations"], next_obs, atol=1e-5)


def test_robomimic_ends_at_the_first_success(tmp_path, capsys):
    with h5py.File(tmp_path / "demo.hdf5", "w") as f:
        for i in range(5):
            demo = f.create_group(f"data/demo_{i}")
            demo["obs/pos"], demo["actions"] = np.random.rand(60, 2), np.random.rand(60, 1)
            demo["rewards"] = demo["dones"] = (np.arange(60) >= 50) * 1.0
    returns, lengths = data.episode_returns(read_log(tmp_path / "demo.hdf5"))
    assert lengths.tolist() == [51] * 5 and returns.tolist() == [1.0] * 5
    assert "45 steps after the first success" in capsys.readouterr().err
    with h5py.File(tmp_path / "demo.hdf5", "r+") as f:
        for i, num in ((0, 59), (1, 61)):  # together they would fit
            del f[f"data/demo_{i}/actions"]
            f[f"data/demo_{i}/actions"] = np.random.rand(num, 1)
    with pytest.raises(UserError, match="arrays of robomimic's layout do not fit together"):
        read_log(tmp_path / "demo.hdf5")


def test_hard_links_in_circles_end(tmp_path):
    with h5py.File(write_hdf5(tmp_path / "a.hdf5", log(4, 50)), "r+") as f:
        for i in range(12):
            f[f"g{i}"] = f["/"]
    assert len(read_log(tmp_path / "a.hdf5")["rewards"]) == 200


def test_imitation_rollouts(tmp_path, capsys):
    """As rollout.save of imitation 0.x writes them; checked by hand on its own test data."""
    made = with_successors(half_terminal())
    after = made["next_observations"][49::50]
    obs = np.concatenate([np.r_[made["observations"][50 * i : 50 * i + 50], after[i : i + 1]]
                          for i in range(4)])  # fmt: skip
    arrays = {
        "obs": obs,
        "acts": made["actions"],
        "rews": made["rewards"],
        "indices": np.array([50, 100, 150]),
        "terminal": made["terminals"][49::50] > 0,
    }
    np.savez(tmp_path / "a.npz", **arrays)
    found = read_log(tmp_path / "a.npz")
    assert_same(found, made)
    np.testing.assert_allclose(found["next_observations"], made["next_observations"], atol=1e-5)
    np.savez(tmp_path / "b.npz", **arrays | {"indices": np.array([50, 100])})
    with pytest.raises(UserError, match="do not split 200 steps into 4 episodes"):
        read_log(tmp_path / "b.npz")


def test_imitation_transitions(tmp_path, capsys):
    made = with_successors(half_terminal())
    arrays = {"obs": made["observations"], "acts": made["actions"], "rews": made["rewards"],
              "next_obs": made["next_observations"], "dones": made["terminals"] > 0,
              "infos": np.array([{}] * 200)}  # fmt: skip
    np.savez(tmp_path / "a.npz", **arrays)
    found = read_log(tmp_path / "a.npz")  # infos are pickled, and never touched
    assert_same(found, made)
    np.testing.assert_allclose(found["next_observations"], made["next_observations"], atol=1e-5)


def test_a_file_that_fits_no_layout_says_what_it_has(save):
    with pytest.raises(UserError, match=r"has no rewards, terminals; it has actions, foo, obs"):
        read_log(save({"obs": np.zeros((5, 2)), "actions": np.zeros((5, 1)), "foo": np.zeros(5)}))


def test_robomimic_demonstrations(tmp_path, capsys):
    made = half_terminal()
    with h5py.File(tmp_path / "demo.hdf5", "w") as f:
        for i in (10, 2, 1, 0):  # their order is that of the numbers: 0, 1, 2, 10
            at = slice(50 * [0, 1, 2, 10].index(i), 50 * [0, 1, 2, 10].index(i) + 50)
            demo = f.create_group(f"data/demo_{i}")
            demo["obs/pos"] = made["observations"][at, :2]
            demo["obs/vel"] = made["observations"][at, 2]
            demo["obs/agentview_image"] = np.zeros((50, 4, 4, 3), np.uint8)
            demo["actions"], demo["rewards"] = made["actions"][at], made["rewards"][at]
            demo["dones"] = made["terminals"][at].astype(np.int64)
            demo["states"] = np.zeros((50, 9))
    assert_same(read_log(tmp_path / "demo.hdf5"), made)
    said = capsys.readouterr().err
    assert (
        "4 demonstrations, observations pos, vel" in said and "agentview_image are not used" in said
    )


def test_robomimic_demonstrations_that_fail_end_by_a_time_out(tmp_path, capsys):
    """done_mode 1 and 2 of robomimic mark the last row of every demonstration."""
    with h5py.File(tmp_path / "demo.hdf5", "w") as f:
        for i in range(4):
            demo = f.create_group(f"data/demo_{i}")
            demo["obs/pos"], demo["actions"] = np.random.rand(60, 2), np.random.rand(60, 1)
            demo["next_obs/pos"] = np.append(demo["obs/pos"][1:], [[i, i]], axis=0)
            demo["dones"] = np.arange(60) == 59
            demo["rewards"] = (np.arange(60) == 59) * float(i % 2)
    found = read_log(tmp_path / "demo.hdf5")
    assert ends(found, "terminals") == [119, 239] and ends(found) == [59, 179]
    assert found["next_observations"][[59, 179]].tolist() == [[0, 0], [2, 2]]
    assert "2 that end without a reward end by a time-out" in capsys.readouterr().err
    with h5py.File(tmp_path / "demo.hdf5", "r+") as f:
        del f["data/demo_2/next_obs"]
    assert "next_observations" not in read_log(tmp_path / "demo.hdf5")
    with h5py.File(tmp_path / "demo.hdf5", "r+") as f:
        f["data/demo_2/next_obs/pos"] = np.zeros((60, 2))  # not the next rows
    assert "next_observations" not in read_log(tmp_path / "demo.hdf5")
    assert "next_obs are not the next rows and are not used" in capsys.readouterr().err


def test_messages_of_files_are_short_and_say_what_to_do(tmp_path):
    np.save(tmp_path / "log.npy", np.zeros((5, 3)))
    with pytest.raises(UserError, match="is one array; save all arrays of the log with numpy"):
        read_log(tmp_path / "log.npy")
    made = {key: x.reshape(4, 50, *x.shape[1:]) for key, x in log(4, 50).items()}
    np.savez(tmp_path / "a.npz", **made)
    with pytest.raises(UserError, match=r"put the rows of all episodes end to end, as \(N, O\)"):
        read_log(tmp_path / "a.npz")
    with h5py.File(tmp_path / "demo.hdf5", "w") as f:
        for i in range(300):
            demo = f.create_group(f"data/demo_{i}")
            demo["obs/pos"], demo["actions"] = np.zeros((6, 2)), np.zeros((6, 1))
    with pytest.raises(UserError, match="and 594 more; it needs") as e:
        read_log(tmp_path / "demo.hdf5")
    assert len(str(e.value)) < 1000


def test_d3rlpy_2(tmp_path):
    made = half_terminal()
    with h5py.File(tmp_path / "d3.h5", "w") as f:
        for i in range(4):
            at = slice(50 * i, 50 * i + 50)
            f[f"observations_{i}"] = made["observations"][at]
            f[f"actions_{i}"] = made["actions"][at]
            f[f"rewards_{i}"] = made["rewards"][at, None]
            f[f"terminated_{i}"] = i % 2 == 0
        f["total_size"], f["version"] = 4, "2.0"
    assert_same(read_log(tmp_path / "d3.h5"), made)


@pytest.mark.parametrize("where", ["data/main_data.hdf5", "data", "."])
def test_a_minari_set_by_its_path(tmp_path, where):
    made = half_terminal()
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "main_data.hdf5", "w") as f:
        for i in range(4):
            at = slice(50 * i, 50 * i + 50)
            episode = f.create_group(f"episode_{i}")
            last = np.full((1, 3), float(i))
            whole = np.concatenate([made["observations"][at], last])
            episode["observations/state"], episode["observations/z"] = whole[:, :2], whole[:, 2:]
            episode["actions"], episode["rewards"] = made["actions"][at], made["rewards"][at]
            episode["terminations"] = made["terminals"][at] > 0
            episode["truncations"] = made["timeouts"][at]
    (tmp_path / "data" / "metadata.json").write_text(json.dumps({"env_spec": "never read"}))
    found = data.load(None, tmp_path / where).log
    assert_same(found, made)
    np.testing.assert_array_equal(found["next_observations"][[49, 99]], [[0.0] * 3, [1.0] * 3])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["out.hdf5", "out.npz", "minari:toy/converted-v0"])
@pytest.mark.parametrize("known", [True, False])
def test_a_converted_log_is_the_same_log(tmp_path, monkeypatch, capsys, target, known):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    made = with_successors(half_terminal()) if known else half_terminal()
    np.savez("in.npz", **LAYOUTS["d3rlpy 1"](made), **{k: made[k] for k in made if "next" in k})
    said = data_command(capsys, monkeypatch, "convert", "in.npz", target)
    minari = target.startswith("minari:")
    found = data.load(target).log if minari else read_log(target)
    keep = np.ones(200, bool)
    if minari and not known:  # nobody knows what came after a time-out
        keep[[99, 199]] = False
        made["timeouts"][[98, 198]] = True
    assert f"{target}: {keep.sum()} steps, 4 ended episodes" in said
    assert_same(found, {key: x[keep] for key, x in made.items()})
    assert ("next_observations" in found) == (known or minari)
    with pytest.raises(SystemExit):
        data_command(capsys, monkeypatch, "convert", "in.npz", target)
    assert "already" in capsys.readouterr().err


# --- The published logs are what they were ---


@pytest.mark.parametrize(
    "name, episodes, mean",
    [
        ("safety-halfcheetah-train", 18, 1769.0),
        ("friction-hopper", 218, None),
        ("simglucose", 62, None),
        ("door-human-v0", 25, None),
    ],
)
def test_published_logs_are_unchanged_in_count_and_return(name, episodes, mean, capsys):
    path = real_log(f"{name}.hdf5")
    found = read_log(path)
    assert not capsys.readouterr().err
    returns, lengths = data.episode_returns(found)
    assert len(returns) == episodes and lengths.sum() == len(found["rewards"])
    if mean:
        assert returns.mean() == pytest.approx(mean, rel=1e-3)
    with h5py.File(path) as f:
        for key in f:
            np.testing.assert_array_equal(np.asarray(f[key]).astype(found[key].dtype), found[key])


# --- Found by generated inputs ---


def test_observations_that_are_flags_are_numbers(save):
    made = log(2, 30)
    made["observations"] = made["observations"] > 0
    made["next_observations"] = np.roll(made["observations"], -1, axis=0)
    found = read_log(save(made))
    assert found["observations"].dtype == np.float32
    np.testing.assert_array_equal(found["observations"], made["observations"])


def test_ends_of_other_lengths_beside_unknown_successors_are_one_line(save):
    made = log(2, 30) | {"next_observations": np.full((60, 3), np.nan), "terminals": np.zeros(0)}
    with pytest.raises(UserError, match="terminals has shape .0,."):
        read_log(save(made))


def test_a_channel_of_hardly_anything_counts_as_constant(save):
    made = log(4, 30)
    made["observations"][:, 0] = 0.0
    made["observations"][3, 0] = 1e-45  # the smallest number of single precision
    dataset = pgd.make_dataset(read_log(save(made)), pgd.Config(horizon=4))
    assert np.isfinite(np.asarray(dataset.steps)).all() and dataset.std[0] == 1.0
