"""Window rules, normalisation, files, names, recipes, and data out again."""

import csv
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from conftest import ROOT, real_log, toy_log

import data
import envs
import pgd


def brute_force_starts(terminals, timeouts, horizon, stride):
    """METHOD's window rules, one start at a time."""
    starts, first = [], 0
    for i in range(len(terminals)):
        if i > 0 and (terminals[i - 1] or timeouts[i - 1]):
            first = i
        end = i + horizon - 1
        if end >= len(terminals) or np.any((terminals | timeouts)[i:end]) or timeouts[end]:
            continue
        if terminals[end] or (i - first) % stride == 0:
            starts.append(i)
    return starts


def ends_to_flags(lengths, terminal):
    flags = np.zeros((2, sum(lengths)), bool)
    for end, t in zip(np.cumsum(lengths) - 1, terminal):
        flags[0 if t else 1, end] = True
    return flags


def test_window_starts_on_hand_made_episodes():
    # an episode of 6 that ends in a time-out, one of 5 that ends in a terminal, one too short
    terminals, timeouts = ends_to_flags([6, 5, 3], [False, True, False])
    assert pgd.window_starts(terminals, timeouts, 4).tolist() == [0, 1, 6, 7]
    assert pgd.window_starts(terminals, timeouts, 4, stride=8).tolist() == [0, 6, 7]
    assert pgd.window_starts(terminals, timeouts, 6).tolist() == []


@pytest.mark.parametrize("horizon, stride", [(2, 1), (5, 1), (5, 3), (8, 8)])
def test_window_starts_equal_the_rules_applied_one_by_one(horizon, stride):
    rng = np.random.default_rng(horizon * stride)
    terminals, timeouts = ends_to_flags(rng.integers(1, 20, 50), rng.random(50) < 0.5)
    starts = pgd.window_starts(terminals, timeouts, horizon, stride)
    assert starts.tolist() == brute_force_starts(terminals, timeouts, horizon, stride)
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
@pytest.mark.parametrize("stride", [1, 8])
def test_window_starts_of_the_real_logs(name, terminal, timeout, stride):
    log = data.read_log(real_log(name))
    assert (log["terminals"].sum(), log["timeouts"].sum()) == (terminal, timeout)
    starts = pgd.window_starts(log["terminals"], log["timeouts"], 32, stride)
    assert starts.tolist() == brute_force_starts(log["terminals"], log["timeouts"], 32, stride)
    assert log["terminals"][starts + 31].sum() > 0 or terminal == 0


def test_dataset_is_standardised_and_turns_back_into_the_log(log):
    log["observations"][:, 1] = 4.0  # a constant channel
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8, fit_batch=8, batch_size=8))
    steps = np.asarray(dataset.steps)
    moving = [0, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(steps.mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(steps[:, moving].std(0), 1.0, atol=1e-4)
    assert dataset.normalizer.std[1] == 1.0 and np.all(steps[:, 1] == 0.0)
    obs, action, reward, done = pgd.split_steps(dataset, dataset.steps)
    mean, std = dataset.normalizer
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


def test_real_transitions_are_steps_of_the_log_and_their_successors(log):
    dataset = pgd.make_dataset(log, pgd.Config(horizon=8, fit_batch=8, batch_size=8))
    batch = pgd.sample_real(jax.random.key(0), dataset, 4000)
    mean, std = (np.asarray(x[:3]) for x in dataset.normalizer)
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
        set((np.asarray(starts)[:, None] + np.arange(8)).ravel().tolist())
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
    for field in t:  # elsewhere the transition in the middle stands in
        np.testing.assert_array_equal(field[15], field[8 + 3])


def test_synthetic_terminals_of_friction_hopper_come_where_windows_end():
    log = data.read_log(real_log("friction-hopper.hdf5"))
    dataset = pgd.make_dataset(log, pgd.Config())
    x = pgd.sample_windows(jax.random.key(0), dataset, dataset.train_starts, 512, 32)
    done = np.asarray(pgd.trajectories_to_transitions(dataset, x).done).reshape(512, 32)
    assert done[:, -1].sum() > 0 and done[:, :-1].sum() == 0


def test_a_log_too_short_for_a_window_or_a_batch_is_one_clear_line():
    with pytest.raises(pgd.UserError, match="0 windows of 64 steps"):
        pgd.make_dataset(toy_log(), pgd.Config(horizon=64))
    with pytest.raises(pgd.UserError, match="--batch-size 10000 is larger than the log"):
        pgd.make_dataset(toy_log(), pgd.Config(batch_size=10_000))


# --- Files ---


def write(path: Path, log: dict) -> Path:
    with h5py.File(path, "w") as f:
        for key, value in log.items():
            f[key] = value
    return path


def successors(log: dict) -> dict:
    """The log with next_observations, of which those at the ends of episodes are all 9."""
    after = np.roll(log["observations"], -1, axis=0)
    after[log["terminals"] | log["timeouts"]] = 9.0
    return log | {"next_observations": after}


@pytest.mark.parametrize("name", ["a.hdf5", "a.npz"])
@pytest.mark.parametrize("more", [dict, successors])
def test_a_log_written_and_read_again_is_the_same(tmp_path, log, name, more):
    log = more(log) if more is successors else log
    data.write_log(tmp_path / name, log, {"source": "a test"})
    back = data.read_log(tmp_path / name)
    assert set(back) == set(log)
    for key in log:
        np.testing.assert_array_equal(back[key], log[key])
        assert back[key].dtype == log[key].dtype
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_users_own_npz_may_hold_doubles_columns_and_bytes(tmp_path, log):
    own = {k: np.asarray(v, np.float64) for k, v in log.items()}
    own |= {"terminals": log["terminals"].astype(np.uint8), "rewards": own["rewards"][:, None]}
    np.savez_compressed(tmp_path / "own.npz", **own, notes=np.arange(3))
    back = data.read_log(tmp_path / "own.npz")
    for key in log:
        np.testing.assert_array_equal(back[key], log[key])


def test_a_failed_write_leaves_nothing_behind(tmp_path, log):
    with pytest.raises(TypeError):
        data.write_log(tmp_path / "a.hdf5", log | {"rewards": object()}, {})
    assert list(tmp_path.iterdir()) == []


def bad(key, value):
    return lambda log: log.update({key: value(log[key])})


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda log: log.pop("rewards"), "has no rewards"),
        (lambda log: log.pop("timeouts"), "has no timeouts"),
        (bad("rewards", lambda x: x[:-1]), r"rewards has shape \(479,\), it should be \(480,\)"),
        (bad("actions", lambda x: x[:, 0]), r"actions has shape \(480,\)"),
        (bad("observations", lambda x: x[:0]), "observations has shape"),
        (
            bad("observations", lambda x: np.where(x > 2, np.nan, x)),
            "observations has NaN or infinite",
        ),
        (bad("rewards", lambda x: np.where(x > 1, np.inf, x)), "rewards has NaN or infinite"),
        (bad("actions", lambda x: x.astype("S8")), "not numbers"),
        (bad("terminals", lambda x: np.where(x, np.nan, 0.0)), "terminals has NaN"),
        (bad("observations", lambda x: np.float32(1.0)), "observations has shape"),
        (
            lambda log: log.update(next_observations=log["observations"][:, :2]),
            r"next_observations has shape \(480, 2\), it should be \(480, 3\)",
        ),
    ],
)
def test_a_bad_log_is_one_clear_line(tmp_path, log, spoil, message, suffix):
    spoil(log)
    path = tmp_path / f"bad{suffix}"
    write(path, log) if suffix == ".hdf5" else np.savez(path, **log)
    with pytest.raises(data.DataError, match=message) as e:
        data.read_log(path)
    assert "\n" not in str(e.value) and "bad" in str(e.value)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>" * 50])
def test_a_file_that_is_missing_empty_or_of_another_kind(tmp_path, content, suffix):
    path = tmp_path / f"log{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.DataError, match="no file|empty|cannot be read as"):
        data.read_log(path)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_a_truncated_or_flipped_file_is_one_clear_line(tmp_path, log, suffix):
    path = tmp_path / f"log{suffix}"
    with h5py.File(path, "w") if suffix == ".hdf5" else open(path, "wb") as f:
        if suffix == ".npz":
            np.savez_compressed(f, **log)
        else:
            for key, value in log.items():
                f.create_dataset(key, data=value, compression="gzip")
    content = path.read_bytes()
    path.write_bytes(content[:-3000])
    with pytest.raises(data.DataError, match="cannot be read as"):
        data.read_log(path)
    at = len(content) // 2
    path.write_bytes(content[:at] + bytes(64) + content[at + 64 :])
    with pytest.raises(data.DataError, match="cannot be read as"):
        data.read_log(path)


def test_python_objects_in_an_npz_are_never_loaded(tmp_path, log):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    log["rewards"] = np.array([Bomb()] * 480, dtype=object)
    np.savez(tmp_path / "a.npz", **log)
    with pytest.raises(data.DataError, match="rewards holds Python objects"):
        data.read_log(tmp_path / "a.npz")
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_declares_far_more_than_it_holds_is_not_read(tmp_path, log):
    with h5py.File(write(tmp_path / "a.hdf5", log), "r+") as f:
        del f["observations"]
        f.create_dataset("observations", (10**9, 30), "f4", chunks=(1000, 30), compression="gzip")
    with open(tmp_path / "b.npz", "wb") as f:
        zeros = np.zeros((4_000_000, 30), np.uint8)  # 120 MB from about 120 kB
        np.savez_compressed(f, **log | {"observations": zeros})
    for name in ("a.hdf5", "b.npz"):
        assert (tmp_path / name).stat().st_size < 400_000
        with pytest.raises(data.DataError, match="declares"):
            data.read_log(tmp_path / name)


def test_links_into_other_files_are_not_followed(tmp_path, log):
    write(tmp_path / "other.hdf5", log)
    with h5py.File(write(tmp_path / "a.hdf5", log), "r+") as f:
        del f["rewards"]
        f["rewards"] = h5py.ExternalLink("../" + tmp_path.name + "/other.hdf5", "rewards")
    (tmp_path / "raw").write_bytes(bytes(480 * 4))
    with h5py.File(write(tmp_path / "b.hdf5", log), "r+") as f:
        del f["rewards"]
        raw = [(str(tmp_path / "raw"), 0, 480 * 4)]
        f.create_dataset("rewards", (480,), "f4", external=raw)
    with h5py.File(write(tmp_path / "c.hdf5", log), "r+") as f:
        del f["rewards"]
        f["away"] = h5py.ExternalLink("other.hdf5", "/")
        f["rewards"] = h5py.SoftLink("/away/rewards")
    with h5py.File(write(tmp_path / "d.hdf5", log), "r+") as f:
        del f["rewards"]
        layout = h5py.VirtualLayout((480,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "rewards", shape=(480,))
        f.create_virtual_dataset("rewards", layout)
    for name in ("a.hdf5", "b.hdf5", "c.hdf5", "d.hdf5"):
        with pytest.raises(data.DataError, match="another file, which is not followed"):
            data.read_log(tmp_path / name)


def test_a_log_larger_than_memory_is_refused_before_reading(tmp_path, log, monkeypatch):
    path = write(tmp_path / "a.hdf5", log)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4}
    monkeypatch.setattr(data.os, "sysconf", pages.get)
    with pytest.raises(data.DataError, match="too much for the"):
        data.read_log(path)


def test_an_empty_hdf5_data_set_is_one_clear_line(tmp_path, log):
    with h5py.File(write(tmp_path / "a.hdf5", log), "r+") as f:
        del f["rewards"]
        f["rewards"] = h5py.Empty("f4")
    with pytest.raises(data.DataError, match="rewards has shape None"):
        data.read_log(tmp_path / "a.hdf5")


def test_the_fingerprint_knows_every_array_that_training_reads(log):
    make = lambda x: data.Task("t", x, None, None, "", "auto", None, None).fingerprint
    full = successors(log)
    prints = {make(log), make(full)}
    for key in full:
        changed = full | {key: np.where(np.arange(480) == 7, 1 - full[key].T, full[key].T).T}
        prints.add(make({k: x.astype(full[k].dtype) for k, x in changed.items()}))
    assert len(prints) == 2 + len(full)


@pytest.mark.parametrize("name", ["../etc/passwd", "minari:../../x-v0", "minari:/etc/x-v0"])
def test_names_that_climb_out_of_their_folder_are_refused(name):
    with pytest.raises(data.DataError, match="no task|no Minari name"):
        data.resolve(name)


# --- Ends of episodes ---


def test_missing_timeouts_are_put_back_where_the_limit_is_known(tmp_path, log, capsys):
    timeouts = log.pop("timeouts")
    back = data.read_log(write(tmp_path / "a.hdf5", log), limit=40)
    np.testing.assert_array_equal(back["timeouts"], timeouts)
    said = capsys.readouterr().err
    assert "has no timeouts" in said and "40 steps" in said and said.count("\n") == 1


def test_a_limit_is_counted_from_the_last_end():
    terminals = np.zeros(20, bool)
    terminals[[3, 13]] = True
    log = {"terminals": terminals}
    data.mend_timeouts(log, 5)
    assert np.flatnonzero(log["timeouts"]).tolist() == [8, 18]  # 9 to 13 is a whole episode


def test_missing_timeouts_are_put_back_from_the_successors_without_a_limit(tmp_path, log, capsys):
    log = successors(log)
    timeouts = log.pop("timeouts")
    back = data.read_log(write(tmp_path / "a.hdf5", log))
    np.testing.assert_array_equal(back["timeouts"][:-1], timeouts[:-1])
    said = capsys.readouterr().err
    assert "has no timeouts" in said and "another state" in said and said.count("\n") == 1


def test_an_end_that_a_log_forgot_to_mark_is_found_and_said(tmp_path, log, capsys):
    log = successors(log)
    forgotten = int(np.flatnonzero(log["timeouts"])[2])
    log["timeouts"][forgotten] = False
    back = data.read_log(write(tmp_path / "a.hdf5", log))
    assert back["timeouts"][forgotten] and "1 steps are followed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["safety-halfcheetah-train", "friction-hopper", "simglucose"])
def test_published_logs_give_their_timeouts_back_from_their_successors(name, tmp_path, capsys):
    path = real_log(f"{name}.hdf5")
    log = data.read_log(path)
    assert capsys.readouterr().err == ""  # nothing to mend
    timeouts = log.pop("timeouts")
    back = data.read_log(write(tmp_path / "a.hdf5", log))
    np.testing.assert_array_equal(back["timeouts"][:-1], timeouts[:-1])


def test_a_known_successor_makes_a_timeout_usable(log):
    config = pgd.Config(horizon=8, fit_batch=8, batch_size=8)
    plain, known = (pgd.make_dataset(x, config) for x in (log, successors(log)))
    np.testing.assert_array_equal(plain.steps, known.steps[:480])
    assert (len(plain.usable), len(known.usable)) == (480 - 8, 480)
    batch = pgd.sample_real(jax.random.key(0), known, 4000)
    mean, std = (np.asarray(x[:3]) for x in known.normalizer)
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
    assert not pgd.split_steps(dataset, steps)[3].any()
    with_some = pgd.make_dataset(log, pgd.Config(horizon=8, fit_batch=8, batch_size=8))
    assert pgd.split_steps(with_some, 30.0 * steps)[3].any()


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
    task = data.load("pendulum-medium", str(write(tmp_path / "a.hdf5", log)))
    said = capsys.readouterr().err
    assert "100.0% of the actions" in said and "2.50" in said and said.count("\n") == 1
    assert (task.action_low.item(), task.action_high.item()) == (-2.0, 2.0)
    dataset = pgd.make_dataset(task.log, pgd.Config(horizon=8), task.action_low, task.action_high)
    action = pgd.split_steps(dataset, dataset.steps[:480])[1]
    np.testing.assert_allclose(np.abs(action), 0.999, atol=1e-4)


def test_each_action_without_known_bounds_gets_its_own():
    actions = np.array([[0.5, -3.0], [-0.2, 0.4], [2.0, 0.0]], np.float32)
    low, high = data.action_bounds(actions, None, None)
    assert (low.tolist(), high.tolist()) == ([-1.0, -3.0], [2.0, 1.0])


# --- Names, scores, recipes ---


def test_names_with_and_without_version_and_the_nearest_for_a_typo():
    assert data.resolve("halfcheetah-medium").name == "halfcheetah-medium-v2"
    assert data.resolve("halfcheetah-medium-v2").name == "halfcheetah-medium-v2"
    assert data.resolve("pendulum-medium").simulator == "pendulum"
    assert data.resolve("maze2d-umaze-dense").simulator == "maze2d-umaze-dense"
    assert data.resolve("door-human").simulator == "door"
    assert data.resolve("antmaze-umaze").simulator is None
    with pytest.raises(data.DataError, match="halfcheetah-medium"):
        data.resolve("halfcheeta-medium")


def test_scores_are_d4rls_formula_for_every_name_in_the_registry():
    with open(ROOT / "d4rl_registry.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 50
    for row in rows:
        low, high = float(row["ref_min_score"]), float(row["ref_max_score"])
        entry = data.resolve(row["dataset"])
        task = data.Task("t", {}, None, None, "", "d4rl", entry.simulator, entry.reference)
        returns = np.array([low, high, 0.0, 1234.5])
        expected = (returns - low) / (high - low) * 100
        np.testing.assert_allclose(task.score(returns), expected, rtol=0, atol=1e-6)
    shared = ROOT.parent / "shared" / "d4rl_registry.csv"
    if shared.exists():
        assert (ROOT / "d4rl_registry.csv").read_bytes() == shared.read_bytes()


def test_recipes_lay_policies_end_to_end():
    shipped = {f"hopper-{p}" for p in ("early1", "early2", "medium", "expert")}
    shipped.add("walker2d-medium")
    recipe = lambda *a: data.recipe(*a, shipped)
    assert recipe("hopper", "random") == (("hopper-random", 1_000_000),)
    assert recipe("hopper", "medium-expert") == (
        ("hopper-medium", 1_000_000), ("hopper-expert", 1_000_000)
    )  # fmt: skip
    replay = recipe("hopper", "medium-replay")
    assert [p for p, _ in replay] == [
        "hopper-random", "hopper-early1", "hopper-early2", "hopper-medium"
    ]  # fmt: skip
    assert {n for _, n in replay} == {100_000}
    assert recipe("walker2d", "medium-expert") is None  # no expert is shipped
    assert recipe("walker2d", "medium-replay") is None  # and no early snapshot
    assert recipe("hopper", "human") is None


def test_every_shipped_policy_is_read_and_serves_some_log():
    used = {stem for e in data.registry().values() for stem, _ in e.recipe or ()}
    for path in (ROOT / "policies").glob("*.npz"):
        policy = data.Policy.load(path)
        simulator = path.stem.rsplit("-", 1)[0]
        copies = envs.make_envs(simulator, 2)
        action = policy(copies.reset(0), np.random.default_rng(0))
        assert action.shape == (2, copies.low.size) and np.abs(action).max() <= 1.0
        assert policy.meta["task"] == simulator and path.stem in used


def test_a_mixture_is_collected_in_its_parts_and_cached(monkeypatch):
    entry = data.resolve("pendulum-medium-expert")
    log, origin = data.load_collected(entry, steps=2400)
    returns, lengths = data.episode_returns(log)
    assert set(lengths) == {200} and len(returns) == 12
    assert returns[:6].mean() < -400 < -300 < returns[6:].mean()  # medium first, then expert
    assert "pendulum-medium.npz" in origin and "pendulum-expert.npz" in origin
    monkeypatch.setattr(data.sim, "collect_in_program", None)  # the second time it is there
    again, _ = data.load_collected(entry, steps=2400)
    np.testing.assert_array_equal(log["observations"], again["observations"])
    assert data.collected_path(entry, 2400).name.startswith("pendulum-medium-expert-2400-0-")


def test_a_part_that_is_cut_inside_an_episode_ends_by_a_timeout():
    log, _ = data.load_collected(data.resolve("pendulum-medium-expert"), steps=500)
    assert log["timeouts"].nonzero()[0].tolist() == [199, 249, 449, 499]


def test_a_collected_mujoco_log_replays_exactly_from_its_file():
    entry = data.resolve("halfcheetah-random")
    log, _ = data.load_collected(entry, steps=3000)
    path = data.collected_path(entry, 3000)
    task = data.Task("t", log, None, None, "", "collect", "halfcheetah", None, path)
    error, what = data.replay_error(task)
    assert what == "infos/qpos and infos/qvel" and error.max() == 0.0 and len(error) == 1000
    blind = data.Task("t", log, None, None, "", "collect", "halfcheetah", None, None)
    error, what = data.replay_error(blind)
    assert what == "observations" and np.median(error) < 1e-9


def test_a_policy_file_holds_arrays_only_and_acts_like_the_agent(tmp_path):
    import agents

    agent = agents.sac_n(num_critics=2, hidden=(8, 8))
    state = agent.init(jax.random.key(0), 3, 2)
    policy = data.Policy([tuple(map(np.asarray, layer)) for layer in state.actor], {"task": "t"})
    policy.save(tmp_path / "p.npz")
    loaded = data.Policy.load(tmp_path / "p.npz")
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(loaded(obs, None), agent.act(state, obs), atol=1e-5)
    assert loaded.meta == {"task": "t"}
    draws = jax.vmap(loaded.sample, in_axes=(0, None))(
        jax.random.split(jax.random.key(0), 4000), obs[0]
    )
    theirs = loaded(np.tile(obs[0], (4000, 1)), np.random.default_rng(0))
    np.testing.assert_allclose(draws.mean(0), theirs.mean(0), atol=0.05)
    np.testing.assert_allclose(draws.std(0), theirs.std(0), atol=0.03)


def test_training_a_policy_keeps_a_snapshot_for_every_evaluation(tmp_path):
    data.train_policy(
        "pendulum", tmp_path, max_steps=480, num_envs=4, hidden=(8, 8), updates_per_step=0.5,
        start_steps=120, eval_every=160,
    )  # fmt: skip
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["pendulum-160.npz", "pendulum-320.npz", "pendulum-480.npz"]
    first, last = (data.Policy.load(tmp_path / name) for name in (names[0], names[-1]))
    assert last.meta["env_steps"] == 480 and "--hidden 8 8" in last.meta["command"]
    assert np.abs(first.layers[0][0] - last.layers[0][0]).max() > 1e-4
    with pytest.raises(data.sim.EnvError, match="there is no simulator"):
        data.train_policy("pendulumm", tmp_path)


# --- The command line ---


def say(capsys, monkeypatch, *args) -> str:
    monkeypatch.setattr("sys.argv", ["data.py", *map(str, args)])
    data.main()
    return capsys.readouterr().out


def test_list_says_what_there_is_where_from_and_what_is_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (tmp_path / "hopper_medium-v2.hdf5").write_bytes(b"x")
    lines = say(capsys, monkeypatch, "list").splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert "153 MB" in rows["hopper-medium-v2"] and rows["hopper-medium-v2"].endswith("D4RL's")
    assert "1,000,000 steps" in rows["hopper-random-v2"] and "antmaze-umaze-v2" in rows
    assert "100,000 steps" in rows["pendulum-medium"]


def test_info_of_a_published_log(tmp_path, capsys, monkeypatch):
    path = real_log("simglucose.hdf5")
    said = say(capsys, monkeypatch, "info", path, "--picture", tmp_path / "returns.png")
    log = data.read_log(path)
    returns, lengths = data.episode_returns(log)
    assert f"20,018 in 62 ended episodes of {lengths.min()} to {lengths.max()}" in said
    assert "30 terminals, 32 time-outs" in said and f"mean {returns.mean():.1f}" in said
    counts = [int(x.split()[3]) for x in said.splitlines() if " to " in x and "#" in x]
    assert sum(counts) == 62
    assert (tmp_path / "returns.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "args, message",
    [
        (["info", "nowhere.hdf5"], "there is no file"),
        (["info", "hoper-medium"], "did you mean hopper-medium"),
        (["collect", "antmaze-umaze"], "no policy is shipped"),
        (["collect", "pendulum-medium", "--out", "x.csv"], "should end in .hdf5"),
        (["collect", "pendulum-medium-expert", "--steps", "1"], "--steps must be at least 2"),
        (["collect", "pendulum-medium", "--seed", "-1"], "--seed must be at least 0"),
        (["info", "pendulum-medium", "--picture", "x.hdf5"], "should end in .png"),
        (["download", "pendulum-medium"], "is not a D4RL task"),
        (["measure", "pendulum", "--episodes", "0"], "--episodes must be at least 1"),
        (["train-policy", "pendulum", "--out", "x", "--num-envs", "0"], "--num-envs must be at"),
        (["measure", "pendulumm"], "there is no simulator"),
    ],
)
def test_mistakes_at_the_command_line_are_one_line(args, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        say(capsys, monkeypatch, *args)
    said = capsys.readouterr().err
    assert e.value.code == 2 and message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# --- Out: synthetic data as files, and Minari both ways ---


def toy_transitions():
    """Three trajectories of 4 steps: no terminal, one in the middle, one at the very end."""
    obs = np.arange(24, dtype=np.float32).reshape(12, 2)
    done = np.zeros(12, np.float32)
    done[[5, 11]] = 1.0
    action = np.linspace(-1, 1, 12, dtype=np.float32)[:, None]
    made = pgd.Transition(obs, action, obs[:, 0], obs + 2.0, done, action)
    for field in made:
        field[3] = field[1]  # the stand-in for a last step without a successor
    return made


class Units:  # of a data set
    obs_dim = 2
    normalizer = pgd.Normalizer(np.array([1.0, 2.0, 0, 0, 0]), np.array([2.0, 4.0, 1, 1, 1]))
    action_low, action_high = np.array([-2.0]), np.array([4.0])


def test_exported_trajectories_end_where_they_should():
    out = pgd.transitions_to_log(toy_transitions(), 4, Units)
    # the first without its last step, the second up to its terminal, the third whole
    rows = [0, 1, 2, 4, 5, 8, 9, 10, 11]
    assert out["terminals"].nonzero()[0].tolist() == [4, 8]
    assert out["timeouts"].nonzero()[0].tolist() == [2]
    t = toy_transitions()
    np.testing.assert_allclose(out["observations"], t.obs[rows] * [2, 4] + [1, 2])
    np.testing.assert_allclose(out["next_observations"], (t.obs + 2)[rows] * [2, 4] + [1, 2])
    np.testing.assert_allclose(out["actions"], (t.action[rows] + 1) * 3 - 2, atol=1e-6)
    np.testing.assert_allclose(out["rewards"], t.reward[rows])


EXPORT = [
    "--preset", "smoke", "--fit-steps", 100, "--rounds", 1, "--updates", 5, "--horizon", 8,
    "--eval-episodes", 1, "--export-steps", 900,
]  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, run, exported HDF5) of a tiny run on a log of pendulum."""
    folder = tmp_path_factory.mktemp("export")
    run, path = folder / "run", folder / "synthetic.hdf5"
    pgd.main([*map(str, EXPORT), "--out", str(run), "--export", str(path)])
    return folder, run, path


def test_an_exported_file_is_a_log_in_the_environments_units(exported):
    _, _, path = exported
    log = data.read_log(path)
    returns, lengths = data.episode_returns(log)
    assert (
        len(log["rewards"]) >= 900 and set(lengths) == {7} and lengths.sum() == len(log["rewards"])
    )
    first = log["observations"][::7]  # of each trajectory, from several rounds
    assert len(np.unique(first, axis=0)) == len(first)
    assert np.abs(log["actions"]).max() > 1.2 and np.abs(log["actions"]).max() <= 2.0  # torque
    inner = np.flatnonzero(~(log["terminals"] | log["timeouts"]))
    np.testing.assert_array_equal(log["next_observations"][inner], log["observations"][inner + 1])
    with h5py.File(path) as f:
        assert "synthetic" in f.attrs["source"] and "pendulum-medium" in f.attrs["source"]


def test_a_finished_run_exports_the_same_again_and_as_minari(exported, monkeypatch):
    minari = pytest.importorskip("minari")
    folder, run, path = exported
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
    again = folder / "again.npz"
    args = ["--resume", str(run), "--export-steps", "900", "--export"]
    pgd.main([*args, str(again)])
    log, same = data.read_log(path), data.read_log(again)
    for key in log:
        np.testing.assert_array_equal(log[key], same[key])
    pgd.main([*args, "minari:pendulum/synthetic-v0"])
    task = data.load("minari:pendulum/synthetic-v0")
    for key in log:
        np.testing.assert_array_equal(log[key], task.log[key])
    assert task.reference == data.GYMNAX_REFERENCE["pendulum"]
    assert (task.action_low.item(), task.action_high.item()) == (-2.0, 2.0)
    found = minari.load_dataset("pendulum/synthetic-v0")
    assert found.total_steps == len(log["rewards"]) and found[0].observations.shape == (8, 3)
    with pytest.raises(data.DataError, match="already has a data set"):
        data.refuse_existing_export("minari:pendulum/synthetic-v0")


def test_an_exported_file_trains_the_same_as_the_arrays_it_came_from(exported):
    import agents

    _, _, path = exported
    config = pgd.Config(synthetic="none", horizon=8, batch_size=32, updates=20, rounds=2)
    arrays = data.read_log(path)
    task = data.load("pendulum-medium", str(path))
    results = []
    for log in (arrays, task.log):
        dataset = pgd.make_dataset(log, config, -2.0, 2.0)
        trainer = pgd.make_train(config, agents.td3_bc(hidden=(16,)),
                                 pgd.make_resampler(config, 3, 1), 3, 1)  # fmt: skip
        _, state, metrics = jax.jit(trainer.train)(jax.random.key(0), dataset)
        results.append((state.agent, metrics))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_an_export_is_refused_before_the_work(exported, tmp_path, capsys):
    _, run, path = exported
    for args, message in (
        (["--export", str(path)], "already exists"),
        (["--export", str(tmp_path / "x.csv")], "should end in .hdf5"),
        (["--export", "minari:../x-v0"], "no Minari name"),
        (["--export", "minari:a/b-v0"], "is no name for Minari"),
        (["--export", f"{path}/x.hdf5"], "cannot be written"),
        (["--export", str(tmp_path / "x.hdf5"), "--synthetic", "none"], "--synthetic diffusion"),
    ):
        with pytest.raises(SystemExit) as e:
            pgd.main(["--preset", "smoke", "--out", str(tmp_path / "r"), *args])
        said = capsys.readouterr().err
        assert e.value.code == 2 and message in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_many_seeds_export_a_file_each(tmp_path):
    args = [*map(str, EXPORT), "--num-seeds", "2", "--seed", "4", "--out", str(tmp_path / "r")]
    pgd.main([*args, "--fit-steps", "100", "--export", str(tmp_path / "x.hdf5")])
    four, five = (data.read_log(tmp_path / f"x-seed{i}.hdf5") for i in (4, 5))
    assert len(four["rewards"]) == len(five["rewards"])
    assert np.abs(four["observations"] - five["observations"]).max() > 0.1


@pytest.fixture
def minari_set(tmp_path, monkeypatch):
    """A local Minari data set with Dict observations, T + 1 of them, and reference scores."""
    minari = pytest.importorskip("minari")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    rng, episodes = np.random.default_rng(0), []
    for length in (12, 20):
        goal, state = rng.normal(size=(length + 1, 2)), rng.normal(size=(length + 1, 3))
        end = np.arange(length) == length - 1
        episodes.append(
            EpisodeBuffer(
                observations={"goal": goal, "state": state},
                actions=rng.uniform(-1, 1, (length, 2)).astype(np.float32),
                rewards=rng.normal(size=length),
                terminations=end & (length == 12), truncations=end & (length == 12),
            )
        )  # fmt: skip
    box = lambda n: spaces.Box(-np.inf, np.inf, (n,), np.float64)
    made = minari.create_dataset_from_buffers(
        "toy/dict-v0", episodes, action_space=spaces.Box(-3.0, 3.0, (2,), np.float32),
        observation_space=spaces.Dict(state=box(3), goal=box(2)), data_format="hdf5",
    )  # fmt: skip
    made.storage.update_metadata({"ref_min_score": -2.0, "ref_max_score": 6.0})
    return episodes


@pytest.mark.filterwarnings("ignore")
def test_minari_dict_observations_are_flattened_and_the_last_is_a_successor(minari_set):
    from gymnasium import spaces

    task = data.load("minari:toy/dict-v0")
    log = task.log
    assert log["observations"].shape == (32, 5) and log["actions"].shape == (32, 2)
    assert log["terminals"].nonzero()[0].tolist() == [11]
    assert log["timeouts"].nonzero()[0].tolist() == [31]  # ended without a flag
    first, second = minari_set
    one = {"goal": second.observations["goal"][4], "state": second.observations["state"][4]}
    space = data.open_minari("toy/dict-v0").observation_space
    flat = spaces.flatten(space, one)
    np.testing.assert_allclose(log["observations"][12 + 4], flat, atol=1e-6)
    last = {key: x[12] for key, x in first.observations.items()}
    flat = spaces.flatten(space, last)
    np.testing.assert_allclose(log["next_observations"][11], flat, atol=1e-6)
    assert task.score(2.0) == 50.0 and task.simulator is None
    assert task.action_high.tolist() == [3.0, 3.0] and task.kind == "minari"


def test_a_missing_minari_set_is_one_clear_line(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("MINARI_REMOTE", "nowhere://at-all")
    with pytest.raises(data.DataError, match="no readable data set toy/none-v0") as e:
        data.load("minari:toy/none-v0")
    assert "\n" not in str(e.value)
    with pytest.raises(data.DataError, match="nothing like hopper-medium-replay"):
        data.load("hopper-medium-replay", source="minari")


@pytest.mark.filterwarnings("ignore")
def test_a_minari_set_is_judged_in_the_environment_it_names(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    import gymnasium
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gymnasium.make("Pendulum-v1")
    rng, length = np.random.default_rng(0), 200
    obs = [env.reset(seed=0)[0]]
    action = rng.uniform(-2, 2, (length, 1)).astype(np.float32)
    steps = [env.step(a) for a in action]
    obs += [s[0] for s in steps]
    episode = EpisodeBuffer(
        observations=np.array(obs, np.float32), actions=action, rewards=[s[1] for s in steps],
        terminations=[s[2] for s in steps], truncations=[s[3] for s in steps],
    )  # fmt: skip
    minari.create_dataset_from_buffers("toy/pendulum-v0", [episode], env=env, data_format="hdf5")
    task = data.load("minari:toy/pendulum-v0")
    assert task.simulator == "minari:toy/pendulum-v0"
    copies = data.make_envs(task.simulator, 2)
    returns = envs.evaluate_on_host(copies, lambda obs: np.zeros((2, 1)), 0)
    assert copies.limit == 200 and np.all(returns < -100)
    np.testing.assert_allclose(copies.reset([0, 1])[0], task.log["observations"][0], atol=1e-6)


def test_a_collected_log_goes_out_as_a_file_with_its_states_and_as_minari(
    tmp_path, capsys, monkeypatch
):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    ask = ["collect", "hopper-random", "--steps", 2000, "--out"]
    say(capsys, monkeypatch, *ask, tmp_path / "a.hdf5")
    say(capsys, monkeypatch, *ask, "minari:hopper/random-v0")
    log, same = data.read_log(tmp_path / "a.hdf5"), data.load("minari:hopper/random-v0").log
    for key in log:
        np.testing.assert_array_equal(log[key], same[key])
    assert log["terminals"].sum() > 20
    with h5py.File(tmp_path / "a.hdf5") as f:
        assert f["infos/qpos"].shape == (2000, 6) and f["infos/qpos"].dtype == np.float64


@pytest.mark.filterwarnings("ignore")
def test_a_log_made_in_a_wrapped_environment_keeps_its_own_bounds(tmp_path, monkeypatch, capsys):
    minari = pytest.importorskip("minari")
    import gymnasium

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)
    recorder = minari.DataCollector(env, data_format="hdf5")
    recorder.reset(seed=0)
    for _ in range(200):
        recorder.step(recorder.action_space.sample())
    recorder.create_dataset("toy/rescaled-v0")
    task = data.load("minari:toy/rescaled-v0")
    assert task.simulator is None and task.action_high.tolist() == [1.0]
    assert "it was wrapped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: f.pop("episode_1"), "is damaged"),
        (lambda f: f["episode_0"].pop("rewards"), "is damaged"),
        (lambda f: f["episode_0/rewards"].resize((5,)), "is damaged"),
        (lambda f: f["episode_0/observations/goal"].resize((5, 2)), "is damaged|one more"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_minari_set_is_one_clear_line(minari_set, tmp_path, spoil, message):
    with h5py.File(tmp_path / "minari/toy/dict-v0/data/main_data.hdf5", "r+") as f:
        spoil(f)
    with pytest.raises(data.DataError, match=message) as e:
        data.load("minari:toy/dict-v0")
    assert "\n" not in str(e.value) and "toy/dict-v0" in str(e.value)


def test_a_failed_minari_write_leaves_nothing(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    log = successors(toy_log())
    task = data.Task("t", log, -np.ones(2), np.ones(2), "", "auto", None, None)

    def full(self, episodes):
        raise OSError(28, "No space left on device")

    storage = minari.dataset._storages.hdf5_storage.HDF5Storage
    monkeypatch.setattr(storage, "update_episodes", full)
    with pytest.raises(data.DataError, match="No space left"):
        data.write_minari("toy/full-v0", log, task, "")
    assert not (tmp_path / "toy" / "full-v0").exists()
