"""A run that cannot be lost: diverged seeds, two writers, swapped and damaged files, moved logs."""

import functools
import json
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import toy_log
from test_run_folder import ALONE, TINY, mistake, read_final, run

import agents
import data
import pgd
from host import cli, flags, run_folder, spread
from host.errors import UserError


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "toy.hdf5"
    data.write_log(path, toy_log(episodes=20), {})
    return path


# --- Runs that diverge ---


def exploding(name, after, **hyper):
    """Behaviour cloning that turns to NaN where `after` (state, batch) says so."""
    agent = agents.bc()

    def update(key, state, batch):
        new, metrics = agent.update(key, state, batch)
        bad = after(new, batch)
        spoil = lambda x: jnp.where(bad, jnp.nan, x) if x.dtype == jnp.float32 else x
        return jax.tree.map(spoil, new), jax.tree.map(spoil, metrics)

    return agent._replace(update=update)


def first_weight(state) -> jax.Array:
    return next(x for x in jax.tree.leaves(state.actor) if x.ndim == 2)[0, 0]


@pytest.fixture
def one_seed_explodes(monkeypatch):
    """Seed 1 of the toy runs, whose first weight is known, turns to NaN from its first update."""
    agent = agents.bc()
    keys = [pgd.run_keys(pgd.Run(jax.random.key(seed)))[2] for seed in range(3)]
    weights = [float(first_weight(agent.init(key, 3, 2))) for key in keys]
    near = lambda state, _: jnp.abs(first_weight(state) - weights[1]) < 0.02
    assert min(abs(w - weights[1]) for i, w in enumerate(weights) if i != 1) > 0.1
    monkeypatch.setattr(agents, "make_agent", functools.partial(exploding, after=near))


def finish_with_status(status: int, *args) -> None:
    with pytest.raises(SystemExit) as e:
        run(*args)
    assert e.value.code == status


def test_one_diverged_seed_does_not_touch_the_others(
    tmp_path, toy_file, capsys, monkeypatch, one_seed_explodes
):
    args = ["--dataset-path", toy_file, *ALONE, "--agent", "bc"]
    finish_with_status(3, *args, "--num-seeds", 3, "--out", tmp_path / "three")
    said = capsys.readouterr()
    assert "seed 1 has diverged: " in said.err and said.err.count("has diverged") == 1
    assert "diverged: seed 1: " in said.out
    final = read_final(tmp_path / "three")
    assert final["seeds"] == [0, 2]
    assert [(x["seed"], "not finite in round 0" in x["what"]) for x in final["diverged"]] == [
        (1, 1)
    ]
    never = functools.partial(exploding, after=lambda state, batch: False)
    monkeypatch.setattr(agents, "make_agent", never)
    run(*args, "--num-seeds", 3, "--out", tmp_path / "sound")
    of = lambda name: [
        line
        for line in (tmp_path / name / "metrics.csv").read_text().splitlines()
        if line.split(",")[1] != "1"
    ]
    assert of("three") == of("sound")  # to the last digit


def test_a_resumed_run_remembers_what_has_diverged(tmp_path, toy_file, capsys, one_seed_explodes):
    folder = tmp_path / "r"
    args = ["--dataset-path", toy_file, *ALONE, "--agent", "bc", "--num-seeds", 3]
    finish_with_status(3, *args, "--out", folder)
    (folder / "final.json").unlink()
    finish_with_status(3, "--resume", folder)
    assert [x["seed"] for x in read_final(folder)["diverged"]] == [1]


def test_if_all_seeds_diverge_the_status_is_2(tmp_path, toy_file, capsys, monkeypatch):
    always = functools.partial(exploding, after=lambda state, batch: True)
    monkeypatch.setattr(agents, "make_agent", always)
    args = ["--dataset-path", toy_file, *ALONE, "--agent", "bc", "--num-seeds", 2]
    said = mistake(capsys, *args, "--out", tmp_path / "r")
    assert "is not finite in round 0 of seed 0" in said and "lower --hyper.lr" in said
    assert not (tmp_path / "r" / "final.json").exists()


@pytest.mark.slow
def test_a_diverged_fit_ends_its_own_runs_only(tmp_path, toy_file, capsys):
    args = ["--dataset-path", toy_file, *TINY, "--sweep", "fit-lr", 1e-3, 1e30]
    finish_with_status(3, *args, "--num-seeds", 2, "--out", tmp_path / "r")
    final = read_final(tmp_path / "r")
    good, bad = final["sweep"]
    assert good["seeds"] == [0, 1] and bad["seeds"] == [] and bad["mean"] is None
    assert len(final["diverged"]) == 2
    assert all("the loss of the fit is not finite" in x["what"] for x in final["diverged"])
    assert "fit lr 1e+30, seed 0: the loss of the fit" in capsys.readouterr().out
    run(*[x for x in args if x != 1e30], "--num-seeds", 2, "--out", tmp_path / "alone")
    (alone,) = read_final(tmp_path / "alone")["sweep"]
    assert alone["log_prob_real"] == pytest.approx(good["log_prob_real"], rel=1e-4)


def test_a_diverged_run_keeps_its_last_sound_agent_and_says_when():
    """Two rounds are sound; from the third on the metrics are NaN."""

    def one_round(run, state, dataset):
        x = state.agent + 1.0
        x = jnp.where(x > run.settings["limit"], jnp.nan, x)
        return state._replace(agent=x, round=state.round + 1), {"x": x}

    labels = [{"limit": limit, "seed": 0} for limit in (2.0, 9.0)]
    points = [{"limit": label["limit"]} for label in labels]
    layout = spread.lay_out([0], points, {}, (), True)
    nothing = lambda *args: None
    program = pgd.Program(nothing, nothing, one_round, nothing, nothing, 0, 4)
    program = spread.spread(program, layout, spread.make_mesh(2, 1))
    state = pgd.State((), jnp.zeros(2), jnp.zeros(2), jnp.zeros(2, jnp.int32))
    seen = []
    for _ in range(4):
        state, metrics = program.round(layout.runs, state, None)
        seen.append(metrics["x"])
    np.testing.assert_array_equal(np.array(seen)[:, 1], [1, 2, 3, 4])
    np.testing.assert_array_equal(np.array(seen)[:, 0], [1, 2, np.nan, np.nan])
    assert state.agent.tolist() == [2.0, 4.0]
    assert state.round.tolist() == [spread.IN_FIT - 1 - 2, 4]


# --- Two writers, and files that were swapped ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory, toy_file):
    folder = tmp_path_factory.mktemp("runs") / "r"
    os.environ["PGD_SAVE_EVERY"] = "0"
    try:
        run("--dataset-path", toy_file, *ALONE, "--rounds", 3, "--out", folder)
    finally:
        del os.environ["PGD_SAVE_EVERY"]
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "final.json").unlink()
    return tmp_path / "copy"


def test_a_folder_has_one_writer_at_a_time(copy, tmp_path, toy_file, capsys):
    lock = run_folder.lock_folder(copy)
    said = mistake(capsys, "--resume", copy)
    assert f"is in use by process {os.getpid()} on " in said
    (tmp_path / "new").mkdir()
    other = run_folder.lock_folder(tmp_path / "new")  # another run that has not begun to write
    said = mistake(capsys, "--dataset-path", toy_file, *ALONE, "--out", tmp_path / "new")
    assert "is in use by process" in said
    lock.close()
    other.close()
    run("--resume", copy)
    run("--dataset-path", toy_file, *ALONE, "--out", tmp_path / "new")


def test_of_runs_that_start_together_one_gets_the_folder(tmp_path):
    """Each start opens the lock anew, so that threads race as processes do."""
    task = data.Task("t", {"x": np.zeros(3)}, *[None] * 6)

    def start(barrier, path, won) -> None:
        barrier.wait()
        try:
            won.append(run_folder.create(path, {}, task, [{"seed": 0}]))
        except UserError as e:
            assert "is in use by" in str(e) or "already holds a run" in str(e)
        barrier.wait()

    for i in range(20):
        won, barrier = [], threading.Barrier(8)
        args = barrier, tmp_path / str(i), won
        those = [threading.Thread(target=start, args=args) for _ in range(8)]
        for thread in those:
            thread.start()
        for thread in those:
            thread.join()
        assert len(won) == 1
        won[0].close()


def test_part_files_of_others_are_left_alone(copy):
    ours, theirs = copy / ".metrics.csv.77.part", copy / "sub" / ".thesis.tex.5.part"
    theirs.parent.mkdir()
    for part in (ours, theirs, copy / ".cv.part"):
        part.write_text("x")
    run("--resume", copy)
    assert not ours.exists() and theirs.exists() and (copy / ".cv.part").exists()


def test_a_folder_cannot_say_where_to_write(copy, tmp_path, capsys):
    place = copy / "config.json"
    about = json.loads(place.read_text())
    about["config"] |= {"export": str(tmp_path / "elsewhere.npz"), "synthetic": "diffusion"}
    place.write_text(json.dumps(about))
    given, _ = cli.reopen(flags.parse(["--resume", str(copy)]))
    assert given.job.export is None and "give --export again" in capsys.readouterr().err
    given, _ = cli.reopen(flags.parse(["--resume", str(copy), "--export", "here.npz"]))
    assert given.job.export == "here.npz"


@pytest.mark.parametrize(
    "field, value", [("updates", 7), ("seed", 3), ("buffer_rounds", 1), ("preset", "smoke")]
)
def test_a_checkpoint_is_bound_to_its_settings(copy, capsys, field, value):
    about = json.loads((copy / "config.json").read_text())
    about["config"][field] = value
    (copy / "config.json").write_text(json.dumps(about))
    said = mistake(capsys, "--resume", copy)
    assert f"is of a run with {field} " in said and f"config.json says {value}" in said


STRANGE = (
    None, "x", "", -1, 0, 1e308, [], {}, True, 3.5, 10**30, [[1]], "\x1b[2J", 1e-30, ["a"], {"a": 1}
)  # fmt: skip


def test_settings_of_any_type_are_accepted_or_one_clear_line(copy):
    """1,200 files: each setting in turn has each strange value. None of them is a traceback."""
    place = copy / "config.json"
    about, refused, tried = json.loads(place.read_text()), 0, 0
    for name in about["config"]:
        for value in STRANGE:
            changed = json.dumps(about["config"] | {name: value})  # as it is read from the file
            tried += 1
            try:
                given = cli.from_saved(run_folder.with_tuples(json.loads(changed)), place)
                flags.check_agent(given, flags.sweep_points(given))
            except UserError as e:
                refused += 1
                assert str(e).isprintable()
    assert tried > 1_000 and refused > 0.9 * tried


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "", "null", "[]", "7", '{"config": {}, "data": {}}', "\0\0",
     '{"config": null, "data": {"fingerprint": 1}}', '{"config": [], "data": {"fingerprint": 1}}',
     '{"config": {"hyper": 3}, "data": {"fingerprint": "x"}}'],
)  # fmt: skip
def test_a_config_that_is_none_is_one_clear_line(copy, capsys, text):
    (copy / "config.json").write_text(text)
    said = mistake(capsys, "--resume", copy)
    assert "is damaged" in said or "is of another version" in said


@pytest.mark.parametrize("fingerprint", [None, "0" * 16])
def test_a_run_without_the_fingerprint_of_its_log_is_refused(copy, capsys, fingerprint):
    about = json.loads((copy / "config.json").read_text())
    about["data"]["fingerprint"] = fingerprint
    (copy / "config.json").write_text(json.dumps(about))
    assert "trained on another log" in mistake(capsys, "--resume", copy)


def test_a_checkpoint_of_another_seed_is_refused(copy, toy_file, tmp_path, capsys):
    args = ["--dataset-path", toy_file, *ALONE, "--rounds", 3, "--seed", 5]
    run(*args, "--out", tmp_path / "five")
    other = tmp_path / "five" / "checkpoint" / run_folder.STATE
    shutil.copy(other, copy / "checkpoint" / run_folder.STATE)
    assert "is of a run with seed 5, and config.json says 0" in mistake(capsys, "--resume", copy)


def spoil_about(path, **changes) -> None:
    """Change the notes in a checkpoint."""
    with np.load(path) as z:
        arrays = dict(z)
    about = json.loads(arrays["about"].tobytes()) | changes
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    "changes",
    [
        {"fitted": -5},
        {"fitted": "x"},
        {"labels": []},
        {"history": 3, "diverged": 3},
        {"history": [{"round": "x"}]},
        {"history": [3]},
        {"seconds": []},
        {"seconds": {"rounds": "x"}},
        {"diverged": [[99, "x"]]},
    ],
)
def test_notes_that_cannot_be_are_damage(copy, capsys, changes):
    spoil_about(copy / "checkpoint" / run_folder.STATE, **changes)
    (copy / "checkpoint" / run_folder.PREVIOUS).unlink()
    assert "is damaged" in mistake(capsys, "--resume", copy)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-700]),
        lambda path: path.write_bytes(
            path.read_bytes()[:900] + bytes(64) + path.read_bytes()[964:]
        ),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(copy, finished, capsys, spoil):
    spoil(copy / "checkpoint" / run_folder.STATE)
    run("--resume", copy)
    assert (copy / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()
    final, whole = read_final(copy), read_final(finished)
    assert final | {"wall_seconds": 0} == whole | {"wall_seconds": 0}
    assert "going on from the checkpoint before it" in capsys.readouterr().err


def test_metrics_that_a_kill_has_torn_are_repaired(copy, finished):
    (copy / "metrics.csv").write_bytes((finished / "metrics.csv").read_bytes()[:-9] + b"\0\0,")
    run("--resume", copy)
    assert (copy / "metrics.csv").read_bytes() == (finished / "metrics.csv").read_bytes()


def test_metrics_grow_by_lines_and_the_history_is_stored_in_bytes(tmp_path):
    (tmp_path / "config.json").write_text('{"config": {}, "data": {"fingerprint": "0"}}')
    folder = run_folder.RunFolder(tmp_path, [{"seed": 0}, {"seed": 1}])
    for i in range(3):
        folder.log(i, 5 * i, {"a": np.array([i, 2 * i])}, lambda returns: None)
        if not i:
            inode = (tmp_path / "metrics.csv").stat().st_ino
    assert (tmp_path / "metrics.csv").stat().st_ino == inode  # not written again
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines[0] == "round,seed,updates,a" and lines[-1] == "2,1,10,4.0" and len(lines) == 7
    folder.history = folder.history * 2_000  # 12,000 rows
    folder.save(0, {"x": np.zeros(3)}, force=True)
    size = (tmp_path / "checkpoint" / run_folder.STATE).stat().st_size
    assert size < 100 * len(folder.history)


def test_a_log_that_has_moved_is_named_again_and_known_by_its_content(
    copy, toy_file, tmp_path, capsys
):
    moved = tmp_path / "moved.hdf5"
    os.rename(toy_file, moved)
    try:
        assert "there is no file" in mistake(capsys, "--resume", copy)
        run("--resume", copy, "--dataset-path", moved)
        other = tmp_path / "other.hdf5"
        data.write_log(other, toy_log(episodes=20, seed=9), {})
        (copy / "final.json").unlink()
        said = mistake(capsys, "--resume", copy, "--dataset-path", other)
        assert "trained on another log" in said
    finally:
        os.rename(moved, toy_file)


def test_a_lock_or_a_checkpoint_that_leads_elsewhere_is_refused(copy, tmp_path, capsys):
    victim = tmp_path / "victim.txt"
    victim.write_text("dear diary")
    (copy / run_folder.LOCK).unlink()
    (copy / run_folder.LOCK).symlink_to(victim)
    assert "is not a plain file" in mistake(capsys, "--resume", copy)
    assert victim.read_text() == "dear diary"
    (copy / run_folder.LOCK).unlink()
    os.mkfifo(copy / run_folder.LOCK)
    assert "is not a plain file" in mistake(capsys, "--resume", copy)
    (copy / run_folder.LOCK).unlink()
    os.rename(copy / "checkpoint", tmp_path / "there")
    (copy / "checkpoint").symlink_to(tmp_path / "there")
    assert "checkpoint is a link" in mistake(capsys, "--resume", copy)
