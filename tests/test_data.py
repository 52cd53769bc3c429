"""Window rules, normalisation, files, names and downloads."""

import http.server
import io
import threading
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from conftest import real_log, toy_log

import data
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


def test_hdf5_round_trip(tmp_path, log):
    data.write_log(tmp_path / "a.hdf5", log, {"source": "a test"})
    back = data.read_log(tmp_path / "a.hdf5")
    for key in data.KEYS:
        np.testing.assert_array_equal(back[key], log[key])
    assert [p.name for p in tmp_path.iterdir()] == ["a.hdf5"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, log):
    with pytest.raises(TypeError):
        data.write_log(tmp_path / "a.hdf5", log | {"rewards": object()}, {})
    assert list(tmp_path.iterdir()) == []


def bad(key, value):
    return lambda log: log.update({key: value(log[key])})


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
    ],
)
def test_a_bad_log_is_one_clear_line(tmp_path, log, spoil, message):
    spoil(log)
    path = write(tmp_path / "bad.hdf5", log)
    with pytest.raises(data.DataError, match=message) as e:
        data.read_log(path)
    assert "\n" not in str(e.value) and "bad.hdf5" in str(e.value)


@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>" * 50])
def test_a_file_that_is_missing_empty_or_of_another_kind(tmp_path, content):
    path = tmp_path / "log.hdf5"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.DataError, match="no file|empty|cannot be read as HDF5"):
        data.read_log(path)


def test_a_truncated_file_is_one_clear_line(tmp_path, log):
    path = write(tmp_path / "log.hdf5", log)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(data.DataError, match="cannot be read as HDF5"):
        data.read_log(path)


def test_missing_timeouts_are_put_back_where_the_limit_is_known(tmp_path, log, capsys):
    timeouts = log.pop("timeouts")
    back = data.read_log(write(tmp_path / "a.hdf5", log), limit=40)
    np.testing.assert_array_equal(back["timeouts"], timeouts)
    assert "40 steps" in capsys.readouterr().err


def test_actions_of_door_human_reach_beyond_one_and_get_bounds_that_hold_them(capsys):
    task = data.load(path=str(real_log("door-human-v0.hdf5")))
    assert task.action_high.max() == pytest.approx(1.366, abs=1e-3)
    assert "1.37" in capsys.readouterr().err
    dataset = pgd.make_dataset(task.log, pgd.Config(), task.action_low, task.action_high)
    assert np.isfinite(dataset.steps).all()


# --- Names, scores, simulators ---


def test_names_with_and_without_version_and_the_nearest_for_a_typo():
    assert data.resolve("halfcheetah-medium").name == "halfcheetah-medium-v2"
    assert data.resolve("halfcheetah-medium-v2").name == "halfcheetah-medium-v2"
    assert data.resolve("pendulum-medium").simulator == "pendulum"
    with pytest.raises(data.DataError, match="halfcheetah-medium"):
        data.resolve("halfcheeta-medium")


def test_every_registry_name_resolves():
    entries = data.registry().values()
    assert sum(e.d4rl is not None for e in entries) == 50
    assert all(e.reference[0] < e.reference[1] for e in entries if e.reference)


def test_score_is_d4rls_formula():
    entry = data.resolve("halfcheetah-medium-v2")
    task = data.Task("t", {}, None, None, "", "d4rl", "halfcheetah", entry.reference)
    expected = 100 * (4770.0 + 280.178953) / (12135.0 + 280.178953)
    assert task.score(4770.0) == pytest.approx(expected, abs=1e-9)


def test_a_policy_file_holds_arrays_only_and_acts_like_the_agent(tmp_path):
    import agents

    agent = agents.sac(hidden=(8, 8))
    state = agent.init(jax.random.key(0), 3, 2)
    policy = data.Policy([tuple(map(np.asarray, layer)) for layer in state.actor], {"task": "t"})
    policy.save(tmp_path / "p.npz")
    loaded = data.Policy.load(tmp_path / "p.npz")
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    np.testing.assert_allclose(loaded(obs, None), agent.act(state, obs), atol=1e-5)
    assert loaded.meta == {"task": "t"}


# --- Downloads, from a server on this machine ---


class Server(http.server.BaseHTTPRequestHandler):
    content, breaks_after, ranges = b"", None, []

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.ranges.append(start)
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.breaks_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch, log):
    """A D4RL entry whose host is a local server: (entry, handler class, file content)."""
    import hashlib

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as f:
        for key, value in log.items():
            f[key] = value
    content = buffer.getvalue()
    handler = type("Handler", (Server,), {"content": content, "ranges": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    row = {
        "url": f"http://127.0.0.1:{server.server_port}/toy.hdf5",
        "bytes": str(len(content)),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    yield data.Entry("toy-v2", None, None, None, row, None), handler, content
    server.shutdown()


def test_a_download_is_verified_and_kept(served):
    entry, handler, content = served
    path, checked = data.download(entry)
    assert path.read_bytes() == content and checked == "SHA-256 verified"
    assert [p.name for p in path.parent.iterdir()] == ["toy.hdf5"]
    data.download(entry)
    assert handler.ranges == [0]  # the second time nothing is fetched
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(data.DataError, match="another SHA-256"):
        data.download(entry)


def test_a_broken_download_goes_on_where_it_stopped(served):
    entry, handler, content = served
    handler.breaks_after = 1000
    with pytest.raises(data.Unreachable):
        data.download(entry)
    assert not data.d4rl_path(entry).exists()
    handler.breaks_after = None
    path, _ = data.download(entry)
    assert path.read_bytes() == content and handler.ranges == [0, 1000]


@pytest.mark.parametrize("wrong", [b"x", b"<html>moved</html>"])
def test_wrong_content_is_refused_and_removed(served, wrong):
    entry, handler, content = served
    handler.content = (
        wrong * (len(content) // len(wrong)) + content[len(wrong) * (len(content) // len(wrong)) :]
    )
    with pytest.raises(data.DataError, match="SHA-256"):
        data.download(entry)
    assert list(data.d4rl_path(entry).parent.iterdir()) == []


def test_an_unreachable_host_falls_back_to_a_collected_log_and_says_so(monkeypatch, capsys):
    entry = data.resolve("hopper-random")
    row = entry.d4rl | {"url": "http://127.0.0.1:9/hopper_random-v2.hdf5"}
    entry = entry._replace(d4rl=row)
    monkeypatch.setattr(data, "load_collected", lambda e: ("the log", "re-collected, not D4RL's"))
    found = data._load_by_name(entry, "auto")
    assert found == ("the log", "re-collected, not D4RL's", "collect")
    said = capsys.readouterr().err
    assert "cannot be reached" in said and "--dataset-path" in said and said.count("\n") == 1
    with pytest.raises(data.DataError, match="cannot be reached"):
        data._load_by_name(entry, "d4rl")
