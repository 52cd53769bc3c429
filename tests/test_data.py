"""Files, checks, ends of episodes, bounds, names, scores and the command line."""

import csv
import io
import os
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import ROOT, data_command, real_log, successors, toy_log, write_hdf5

import data
from host import d4rl
from host.errors import UserError
from host.logs import Rules, mend_timeouts

# --- Files ---


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
    write_hdf5(path, log) if suffix == ".hdf5" else np.savez(path, **log)
    with pytest.raises(UserError, match=message) as e:
        data.read_log(path)
    assert "\n" not in str(e.value) and "bad" in str(e.value)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>" * 50])
def test_a_file_that_is_missing_empty_or_of_another_kind(tmp_path, content, suffix):
    path = tmp_path / f"log{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="no file|empty|cannot be read as"):
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
    with pytest.raises(UserError, match="cannot be read as"):
        data.read_log(path)
    at = len(content) // 2
    path.write_bytes(content[:at] + bytes(64) + content[at + 64 :])
    with pytest.raises(UserError, match="cannot be read as"):
        data.read_log(path)


def test_python_objects_in_an_npz_are_never_loaded(tmp_path, log):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    log["rewards"] = np.array([Bomb()] * 480, dtype=object)
    np.savez(tmp_path / "a.npz", **log)
    with pytest.raises(UserError, match="rewards holds Python objects"):
        data.read_log(tmp_path / "a.npz")
    assert not (tmp_path / "exploded").exists()


def test_a_file_that_declares_far_more_than_it_holds_is_not_read(tmp_path, log):
    with h5py.File(write_hdf5(tmp_path / "a.hdf5", log), "r+") as f:
        del f["observations"]
        f.create_dataset("observations", (10**9, 30), "f4", chunks=(1000, 30), compression="gzip")
    with open(tmp_path / "b.npz", "wb") as f:
        zeros = np.zeros((4_000_000, 30), np.uint8)  # 120 MB from about 120 kB
        np.savez_compressed(f, **log | {"observations": zeros})
    for name in ("a.hdf5", "b.npz"):
        assert (tmp_path / name).stat().st_size < 400_000
        with pytest.raises(UserError, match="declares"):
            data.read_log(tmp_path / name)


def test_an_npz_entry_is_checked_and_read_under_one_name(tmp_path, log):
    """An entry `rewards` beside `rewards.npy`: numpy.load returns the first, unchecked."""
    path = tmp_path / "a.npz"
    np.savez(path, **log)
    other = io.BytesIO()
    np.lib.format.write_array(other, np.full(480, 7, "S3"))
    with zipfile.ZipFile(path, "a") as z:
        z.writestr("rewards", other.getvalue())
        z.writestr("observations", b"no array")
    back = data.read_log(path)
    np.testing.assert_array_equal(back["rewards"], log["rewards"])
    np.testing.assert_array_equal(back["observations"], log["observations"])


def test_an_npz_entry_that_is_no_array_is_one_clear_line(tmp_path, log):
    rewards = log.pop("rewards")
    path = tmp_path / "a.npz"
    for content in (b"no array", b"", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x09\x00abc"):
        np.savez(path, **log)
        with zipfile.ZipFile(path, "a") as z:
            z.writestr("rewards.npy", content)
        with pytest.raises(UserError, match="cannot be read as npz"):
            data.read_log(path)
    np.savez(path, **log)
    with zipfile.ZipFile(path, "a") as z:  # the name without its suffix is not an array's
        z.writestr("rewards", rewards.tobytes())
    with pytest.raises(UserError, match="has no rewards"):
        data.read_log(path)


def test_links_into_other_files_are_not_followed(tmp_path, log):
    write_hdf5(tmp_path / "other.hdf5", log)
    with h5py.File(write_hdf5(tmp_path / "a.hdf5", log), "r+") as f:
        del f["rewards"]
        f["rewards"] = h5py.ExternalLink("../" + tmp_path.name + "/other.hdf5", "rewards")
    (tmp_path / "raw").write_bytes(bytes(480 * 4))
    with h5py.File(write_hdf5(tmp_path / "b.hdf5", log), "r+") as f:
        del f["rewards"]
        raw = [(str(tmp_path / "raw"), 0, 480 * 4)]
        f.create_dataset("rewards", (480,), "f4", external=raw)
    with h5py.File(write_hdf5(tmp_path / "c.hdf5", log), "r+") as f:
        del f["rewards"]
        f["away"] = h5py.ExternalLink("other.hdf5", "/")
        f["rewards"] = h5py.SoftLink("/away/rewards")
    with h5py.File(write_hdf5(tmp_path / "d.hdf5", log), "r+") as f:
        del f["rewards"]
        layout = h5py.VirtualLayout((480,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "rewards", shape=(480,))
        f.create_virtual_dataset("rewards", layout)
    os.mkfifo(tmp_path / "pipe")  # opening it waits for a writer, for ever
    with h5py.File(write_hdf5(tmp_path / "e.hdf5", log), "r+") as f:
        del f["rewards"]
        f["rewards"] = h5py.ExternalLink(str(tmp_path / "pipe"), "rewards")
    for name in ("a.hdf5", "b.hdf5", "c.hdf5", "d.hdf5", "e.hdf5"):
        with pytest.raises(UserError, match="another file, which is not followed"):
            data.read_log(tmp_path / name)


def test_a_log_larger_than_memory_is_refused_before_reading(tmp_path, log, monkeypatch):
    path = write_hdf5(tmp_path / "a.hdf5", log)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4}
    monkeypatch.setattr(os, "sysconf", pages.get)
    with pytest.raises(UserError, match="too much for the"):
        data.read_log(path)


def test_an_empty_hdf5_data_set_is_one_clear_line(tmp_path, log):
    with h5py.File(write_hdf5(tmp_path / "a.hdf5", log), "r+") as f:
        del f["rewards"]
        f["rewards"] = h5py.Empty("f4")
    with pytest.raises(UserError, match="rewards has shape None"):
        data.read_log(tmp_path / "a.hdf5")


def test_the_fingerprint_knows_every_array_that_training_reads(log):
    make = lambda x: data.Task("t", x, None, None, "", "file", None, None).fingerprint
    full = successors(log)
    prints = {make(log), make(full)}
    for key in full:
        changed = full | {key: np.where(np.arange(480) == 7, 1 - full[key].T, full[key].T).T}
        prints.add(make({k: x.astype(full[k].dtype) for k, x in changed.items()}))
    assert len(prints) == 2 + len(full)


@pytest.mark.parametrize("name", ["../etc/passwd", "minari:../../x-v0", "minari:/etc/x-v0"])
def test_names_that_climb_out_of_their_folder_are_refused(name):
    with pytest.raises(UserError, match="no task|no Minari name"):
        data.resolve(name)


# --- Ends of episodes ---


def test_missing_timeouts_are_put_back_where_the_limit_is_known(tmp_path, log, capsys):
    timeouts = log.pop("timeouts")
    back = data.read_log(write_hdf5(tmp_path / "a.hdf5", log), Rules(limit=40))
    np.testing.assert_array_equal(back["timeouts"], timeouts)
    said = capsys.readouterr().err
    assert "has no timeouts" in said and "40 steps" in said and said.count("\n") == 1


def test_a_limit_is_counted_from_the_last_end():
    terminals = np.zeros(20, bool)
    terminals[[3, 13]] = True
    log = {"terminals": terminals}
    mend_timeouts(log, Rules(limit=5))
    assert np.flatnonzero(log["timeouts"]).tolist() == [8, 18]  # 9 to 13 is a whole episode


def test_missing_timeouts_are_put_back_from_the_successors_without_a_limit(tmp_path, log, capsys):
    log = successors(log)
    timeouts = log.pop("timeouts")
    back = data.read_log(write_hdf5(tmp_path / "a.hdf5", log))
    np.testing.assert_array_equal(back["timeouts"][:-1], timeouts[:-1])
    said = capsys.readouterr().err
    assert "has no timeouts" in said and "another state" in said and said.count("\n") == 1


def test_an_end_that_a_log_forgot_to_mark_is_found_and_said(tmp_path, log, capsys):
    log = successors(log)
    forgotten = int(np.flatnonzero(log["timeouts"])[2])
    log["timeouts"][forgotten] = False
    back = data.read_log(write_hdf5(tmp_path / "a.hdf5", log))
    assert back["timeouts"][forgotten] and "1 steps are followed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["safety-halfcheetah-train", "friction-hopper", "simglucose"])
def test_published_logs_give_their_timeouts_back_from_their_successors(name, tmp_path, capsys):
    path = real_log(f"{name}.hdf5")
    log = data.read_log(path)
    assert capsys.readouterr().err == ""  # nothing to mend
    timeouts = log.pop("timeouts")
    back = data.read_log(write_hdf5(tmp_path / "a.hdf5", log))
    np.testing.assert_array_equal(back["timeouts"][:-1], timeouts[:-1])


# --- Action bounds ---


def test_each_action_without_known_bounds_gets_its_own():
    actions = np.array([[0.5, -3.0], [-0.2, 0.4], [2.0, 0.0]], np.float32)
    low, high = data.action_bounds(actions, None, None)
    assert (low.tolist(), high.tolist()) == ([-1.0, -3.0], [2.0, 1.0])


# --- Names and scores ---


def test_names_with_and_without_version_and_the_nearest_for_a_typo():
    assert data.resolve("halfcheetah-medium").name == "halfcheetah-medium-v2"
    assert data.resolve("halfcheetah-medium-v2").name == "halfcheetah-medium-v2"
    assert data.resolve("pendulum-medium").simulator == "pendulum"
    assert data.resolve("maze2d-umaze-dense").simulator == "maze2d-umaze-dense"
    assert data.resolve("door-human").simulator == "door"
    for name, simulator in [
        ("antmaze-umaze-diverse", "antmaze-umaze"),
        ("antmaze-large-play", "antmaze-large"),
        ("ant-medium-replay", "ant"),
        ("kitchen-partial", "kitchen"),
        ("kitchen-complete", "kitchen"),
        ("kitchen-mixed", "kitchen-mixed"),
        ("maze2d-large-dense", "maze2d-large-dense"),
        ("maze2d-umaze", "maze2d-umaze"),
        ("door-human", "door"),
    ]:
        assert data.resolve(name).simulator == simulator
    judged = {name for name, entry in data.registry().items() if entry.simulator}
    assert {data.bare_name(n) for n in data.registry()} - set(map(data.bare_name, judged)) == set()
    with pytest.raises(UserError, match="halfcheetah-medium"):
        data.resolve("halfcheeta-medium")


@pytest.mark.parametrize(
    "text, name, source",
    [
        ("halfcheetah-medium", "halfcheetah-medium-v2", "auto"),
        (" HalfCheetah-Medium-v2 ", "halfcheetah-medium-v2", "auto"),
        ("d4rl:halfcheetah-medium", "halfcheetah-medium-v2", "d4rl"),
        ("D4RL: HalfCheetah-medium-v2", "halfcheetah-medium-v2", "d4rl"),
        ("collect:halfcheetah-medium-v2", "collect:halfcheetah-medium", "collect"),
        ("Pendulum-medium", "pendulum-medium", "collect"),
        ("collect:Pendulum-medium", "pendulum-medium", "collect"),
        ("minari:halfcheetah-medium", "minari:mujoco/halfcheetah/medium-v0", "minari"),
        ("Minari:Door-human ", "minari:D4RL/door/human-v2", "minari"),
        (" minari:D4RL/door/human-v2", "minari:D4RL/door/human-v2", "minari"),
    ],
)
def test_a_prefix_says_the_source_and_capitals_and_blanks_do_not_matter(text, name, source):
    entry = data.resolve(text)
    assert (entry.name, entry.source) == (name, source)
    assert entry.minari == (name.removeprefix("minari:") if source == "minari" else None)
    assert data.resolve(entry.name).name == name


def test_a_prefix_changes_nothing_but_name_and_source():
    entry = data.resolve("hopper-medium")
    assert data.resolve("d4rl:hopper-medium") == entry._replace(source="d4rl")
    assert data.resolve("collect:hopper-medium") == entry._replace(
        name="collect:hopper-medium", source="collect"
    )
    assert data.resolve("collect:pendulum-medium") == data.resolve("pendulum-medium")


@pytest.mark.parametrize(
    "name, message",
    [
        ("d4rl:pendulum-medium", "not a D4RL task; its log is collect:pendulum-medium"),
        ("collect:antmaze-umaze", "no policy is shipped to collect antmaze-umaze"),
        ("collect:hoper-medium", "did you mean hopper-medium"),
        ("minari:pendulum-medium", "Minari has nothing like pendulum-medium"),
        ("minari:hopper-medium-replay", "Minari has nothing like hopper-medium-replay"),
        ("minari:toy", "no Minari name"),
        ("tarball:hopper-medium", "unknown prefix; use d4rl:, collect:, minari: or ogbench:"),
        (":hopper-medium", "unknown prefix"),
        ("", "there is no task ''"),
    ],
)
def test_a_prefix_that_does_not_go_with_the_name_is_one_clear_line(name, message):
    with pytest.raises(UserError, match=message) as e:
        data.resolve(name)
    assert "\n" not in str(e.value)


@pytest.fixture
def toy_sources(tmp_path, monkeypatch):
    """Replaces D4RL's host and the collection of logs by toy files; the host is down while
    served["down"] is true."""
    log = toy_log(obs_dim=11, act_dim=3)  # hopper's dimensions
    paths = write_hdf5(tmp_path / "d4rl.hdf5", log), write_hdf5(tmp_path / "collected.hdf5", log)
    served = {"down": False}

    def download(file):
        if served["down"]:
            raise d4rl.Unreachable(f"{file.name} cannot be fetched from a test")
        return paths[0], "no hash known"

    monkeypatch.setattr(data, "download", download)
    monkeypatch.setattr(data, "collected", lambda recipe: (paths[1], f"collected {recipe.name}"))
    return served


@pytest.mark.parametrize(
    "name, down, title, load_name",
    [
        ("hopper-medium", False, "hopper-medium-v2", "d4rl:hopper-medium-v2"),
        ("d4rl:hopper-medium", False, "hopper-medium-v2", "d4rl:hopper-medium-v2"),
        ("hopper-medium", True, "collect:hopper-medium", "collect:hopper-medium"),
        ("collect:Hopper-medium-v2", False, "collect:hopper-medium", "collect:hopper-medium"),
    ],
)
def test_a_tasks_name_says_its_source_and_loads_it_again(
    name, down, title, load_name, toy_sources, capsys
):
    toy_sources["down"] = down
    task = data.load(name)
    assert (task.name, task.load_name) == (title, load_name)
    assert task.simulator == "hopper" and task.reference == data.resolve("hopper-medium").reference
    assert ("going on with collect:hopper-medium" in capsys.readouterr().err) == down
    toy_sources["down"] = False  # the substitute stays the substitute
    again = data.load(task.load_name)
    assert (again.name, again.kind, again.path) == (task.name, task.kind, task.path)
    assert again.source == task.source and again.fingerprint == task.fingerprint


def test_d4rls_file_alone_is_an_error_where_it_cannot_be_had(toy_sources):
    toy_sources["down"] = True
    with pytest.raises(UserError, match="PGD_MIRROR.*or use minari:hopper-medium$"):
        data.load("d4rl:hopper-medium")
    with pytest.raises(UserError, match="or use minari:antmaze-umaze$"):
        data.load("antmaze-umaze")  # no policy can collect it
    with pytest.raises(UserError, match="or give --dataset-path$"):
        data.load("d4rl:hopper-random")  # Minari has no such data set


def test_a_gymnax_log_has_one_source_and_its_plain_name(tmp_path, monkeypatch, log):
    path = write_hdf5(tmp_path / "a.hdf5", log | {"actions": log["actions"][:, :1]})
    monkeypatch.setattr(data, "collected", lambda recipe: (path, "collected"))
    for name in ("pendulum-medium", "collect:pendulum-medium"):
        task = data.load(name)
        assert task.name == task.load_name == "pendulum-medium" and task.kind == "collect"


def test_a_file_is_evaluated_by_the_task_that_is_named_without_a_source(tmp_path, log):
    path = str(write_hdf5(tmp_path / "own.hdf5", log | {"actions": log["actions"][:, :1]}))
    task = data.load("Pendulum-medium", path)
    assert (task.name, task.kind, task.load_name) == ("own", "file", None)
    assert task.simulator == "pendulum" and task.reference == data.GYMNAX_REFERENCE["pendulum"]
    assert data.load(path=path).simulator is None and data.load(path=path).load_name is None
    for prefix in ("collect", "d4rl", "minari"):
        with pytest.raises(UserError, match=f"leave out the prefix {prefix}:$") as e:
            data.load(f"{prefix}:hopper-medium", path)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="name a task or give a file"):
        data.load()


def test_reference_returns_are_pinned():
    assert data.GYMNAX_REFERENCE == {
        "pendulum": (-1233.5, -167.7),
        "reacher": (15.7, 50.0),
        "mountaincar-continuous": (-33.1, 93.4),
        "swimmer": (84.6, 366.9),
    }
    for name in ("pendulum-medium", "pendulum-medium-expert", "collect:pendulum-random"):
        assert data.resolve(name).reference == (-1233.5, -167.7)
    for name in ("halfcheetah-medium", "d4rl:halfcheetah-medium", "collect:halfcheetah-medium"):
        assert data.resolve(name).reference == (-280.178953, 12135.0)
    assert data.resolve("minari:halfcheetah-medium").reference is None  # its own metadata say


def test_scores_are_d4rls_formula_for_every_name_in_the_registry():
    with open(d4rl.REGISTRY, newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 50
    for row in rows:
        low, high = float(row["ref_min_score"]), float(row["ref_max_score"])
        entry = data.resolve(row["dataset"])
        assert entry.reference == (low, high)
        task = data.Task("t", {}, None, None, "", "d4rl", entry.simulator, entry.reference)
        returns = np.array([low, high, 0.0, 1234.5])
        expected = (returns - low) / (high - low) * 100
        np.testing.assert_allclose(task.score(returns), expected, rtol=0, atol=1e-6)
    shared = ROOT.parent / "shared" / "d4rl_registry.csv"
    if shared.exists():
        assert d4rl.REGISTRY.read_bytes() == shared.read_bytes()


# --- The command line ---


def test_list_says_what_there_is_where_from_and_what_is_here(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    (tmp_path / "hopper_medium-v2.hdf5").write_bytes(b"x")
    lines = data_command(capsys, monkeypatch, "list").splitlines()
    rows = {line.split()[0]: line for line in lines if line}
    assert "153 MB" in rows["hopper-medium-v2"] and rows["hopper-medium-v2"].endswith("D4RL's")
    assert "1,000,000 steps" in rows["hopper-random-v2"] and "antmaze-umaze-v2" in rows
    assert "100,000 steps" in rows["pendulum-medium"]


def test_info_of_a_published_log(tmp_path, capsys, monkeypatch):
    path = real_log("simglucose.hdf5")
    said = data_command(capsys, monkeypatch, "info", path, "--picture", tmp_path / "returns.png")
    log = data.read_log(path)
    returns, lengths = data.episode_returns(log)
    assert f"20,018 in 62 ended episodes of {lengths.min()} to {lengths.max()}" in said
    assert "30 terminals, 32 timeouts" in said and f"mean {returns.mean():.1f}" in said
    counts = [int(x.split()[3]) for x in said.splitlines() if " to " in x and "#" in x]
    assert sum(counts) == 62
    assert (tmp_path / "returns.png").read_bytes()[:4] == b"\x89PNG"
    assert "far values" not in said


def test_info_names_the_observations_whose_scale_is_that_of_far_values(
    tmp_path, capsys, monkeypatch
):
    """Few and far, as where some episodes leave the arena; not a switch, nor a constant."""
    log = toy_log()
    obs = log["observations"]
    obs[:, 0], obs[:, 2] = 1.0, np.arange(len(obs)) % 5 == 0
    obs[::5, 1] *= 300.0
    log.pop("next_observations", None)
    data.write_log(tmp_path / "far.npz", log, {})
    said = data_command(capsys, monkeypatch, "info", tmp_path / "far.npz")
    assert "far values    set the scale of observations 1:" in said


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
        (["download", "collect:hopper-medium"], "is collected, not downloaded"),
        (["collect", "d4rl:hopper-medium"], "is not collected; leave out its prefix"),
        (["collect", "minari:hopper-medium"], "is not collected; leave out its prefix"),
        (["info", "d4rl:pendulum-medium"], "is not a D4RL task"),
        (["info", "tarball:hopper-medium"], "unknown prefix"),
        (["measure", "pendulum", "--episodes", "0"], "--episodes must be at least 1"),
        (["train-policy", "pendulum", "--out", "x", "--num-envs", "0"], "--num-envs must be at"),
        (["measure", "pendulumm"], "there is no simulator"),
        (["inof", "pendulum-medium"], "data.py: Unrecognized options: inof, pendulum-medium; Av"),
        (["info"], "data.py: Missing from data.py info: STR name of a task"),
        (["collect", "pendulum-medium", "--steps", "x"], "data.py: Error parsing --steps"),
        (["info", "a_folder"], "to read the folder, write ./a_folder"),
    ],
)
def test_mistakes_at_the_command_line_are_one_line(args, message, capsys, monkeypatch, tmp_path):
    (tmp_path / "a_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        data_command(capsys, monkeypatch, *args)
    said = capsys.readouterr().err
    assert e.value.code == 2 and message in said and said.count("\n") == 1
    assert said.startswith("data.py: ") and not set(said) & set("│─╭╰")
    assert [p.name for p in tmp_path.iterdir()] == ["a_folder"]
