"""The command line as its users see it: one finished run, one killed and resumed, many mistakes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import ROOT, real_log, toy_log

import agents
import data
import pgd

TINY = (
    "--features 16 --blocks 1 --fit-steps 40 --fit-chunk 10 --fit-batch 16 --sample-steps 4 "
    "--rounds 3 --updates 10 --trajectories 16 --sample-batch 16 --eval-episodes 2 "
    "--model-steps 60 --model-chunk 10 --members 3 --elites 2 --model-hidden 16"
).split()


def pgd_command(*args):
    return [sys.executable, str(ROOT / "pgd.py"), *map(str, args)]


def call(*args, **kw):
    return subprocess.run(pgd_command(*args), capture_output=True, text=True, **kw)


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "toy.hdf5"
    data.write_log(path, toy_log(episodes=20), {})
    return path


def finals(folder):
    final = json.loads((folder / "final.json").read_text())
    final.pop("wall_seconds")
    return final


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The smoke preset, start to end."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    done = call("--preset", "smoke", "--num-seeds", 2, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_readmes_examples_of_guides_run(finished):
    """As they stand there, but on a finished run of the smoke preset, in smaller batches."""
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("\n## Guides\n") : readme.index("\n## What a run leaves\n")]
    code = "".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))
    code = code.replace("runs/mine", str(finished[0])).replace("(128,)", "(8,)")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *start, zero, low, high, early1, _, _, expert = done.stdout.splitlines()
    first = np.float64(start[0].strip("[ ]").split())
    np.testing.assert_allclose(first, [-1.0, 0.0, 0.0], atol=1e-5)
    rewards = [float(line.split()[1]) for line in (zero, low, high)]
    assert rewards[0] < rewards[1] < rewards[2]
    assert early1.startswith("early1 ") and np.isfinite(float(expert.split()[1]))


def test_a_run_leaves_its_folder_and_prints_its_table(finished):
    folder, done = finished
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "config.json", "metrics.csv", "curve.png", "final.json", "checkpoint/state.npz"
    }  # fmt: skip
    final = json.loads((folder / "final.json").read_text())
    assert final["env"] == "pendulum-medium" and final["agent"] == "td3_bc"
    assert final["synthetic"] == "diffusion" and final["seeds"] == [0, 1]
    assert len(final["returns"]) == len(final["scores"]) == 2
    assert final["mean"] == pytest.approx(np.mean(final["scores"]))
    assert final["ci95"][0] < final["mean"] < final["ci95"][1]
    assert "policies/pendulum-medium.npz" in final["source"]
    assert set(final["wall_seconds"]) >= {"load", "fit", "rounds"}
    low, high = data.resolve("pendulum-medium").reference
    expected = [100 * (r - low) / (high - low) for r in final["returns"]]
    np.testing.assert_allclose(final["scores"], expected, atol=1e-3)
    rows = (folder / "metrics.csv").read_text().splitlines()
    config = json.loads((folder / "config.json").read_text())["config"]
    assert len(rows) == 1 + 2 * config["rounds"]
    for shown in ("seed 0", "seed 1", "behaviour", "95 % interval", final["source"], str(folder)):
        assert shown in done.stdout


def test_fused_equals_chunks(toy_file, tmp_path):
    for name, extra in (("chunks", ()), ("fused", ("--fused",))):
        done = call("--dataset-path", toy_file, *TINY, "--out", tmp_path / name, *extra)
        assert done.returncode == 0, done.stderr
    chunks, fused = finals(tmp_path / "chunks"), finals(tmp_path / "fused")
    assert chunks.keys() == fused.keys()
    for key in ("validation_loss", "log_prob_synthetic", "log_prob_real"):
        assert chunks[key] == pytest.approx(fused[key], rel=1e-3)
    before = json.loads((tmp_path / "fused" / "final.json").read_text())
    assert call("--resume", tmp_path / "fused").returncode == 0  # it had finished: not again
    after = json.loads((tmp_path / "fused" / "final.json").read_text())
    assert before["wall_seconds"]["fused"] == after["wall_seconds"]["fused"]


@pytest.mark.parametrize(
    "stage, synthetic", [("fit", "diffusion"), ("rounds", "diffusion"), ("fit", "world-model")]
)
def test_a_killed_run_resumes_to_the_same_numbers_bit_for_bit(stage, synthetic, tmp_path):
    args = ("--env", "pendulum-medium", *TINY, "--fit-steps", 400, "--rounds", 12)
    args = (*args, "--model-steps", 2000, "--synthetic", synthetic)
    args = (*args, "--export-steps", 100, "--export")
    whole = call(*args, tmp_path / "whole.npz", "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    folder, env = tmp_path / "killed", os.environ | {"PGD_SAVE_EVERY": "0"}
    process = subprocess.Popen(
        pgd_command(*args, tmp_path / "killed.npz", "--out", folder),
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    sign = {"fit": "checkpoint/state.npz", "rounds": "metrics.csv"}[stage]
    while not (folder / sign).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "final.json").exists()
    with np.load(folder / "checkpoint" / "state.npz") as z:
        rounds = len(json.loads(str(z["notes"]))["history"])
    assert rounds < 12 and (rounds == 0 or stage == "rounds")
    resumed = call("--resume", folder)
    assert resumed.returncode == 0, resumed.stderr
    assert finals(folder) == finals(tmp_path / "whole")
    whole_log, killed_log = (data.read_log(tmp_path / f"{n}.npz") for n in ("whole", "killed"))
    for key in whole_log:
        np.testing.assert_array_equal(whole_log[key], killed_log[key])
    assert len(killed_log["rewards"]) < 10_000  # --export-steps came along
    assert (folder / "metrics.csv").read_bytes() == (
        tmp_path / "whole" / "metrics.csv"
    ).read_bytes()
    assert not list(folder.rglob("*.part"))


def test_halfcheetah_judges_a_published_log_on_the_host(tmp_path):
    log = real_log("safety-halfcheetah-train.hdf5")
    done = call(
        "--dataset-path", log, "--env", "halfcheetah-medium", *TINY, "--num-seeds", 2,
        "--rounds", 1, "--out", tmp_path / "r",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    final = finals(tmp_path / "r")
    assert final["returns"][0] != final["returns"][1]
    assert final["env"] == "safety-halfcheetah-train"
    assert final["source"] == "file safety-halfcheetah-train.hdf5"
    assert final["behaviour_return"] == pytest.approx(1769, abs=1)
    assert all(-1000 < r < 1000 for r in final["returns"])


def test_a_log_without_a_simulator_reports_losses_and_likelihoods(tmp_path):
    log = real_log("simglucose.hdf5")
    done = call("--dataset-path", log, "--agent", "iql", *TINY, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    final = finals(tmp_path / "r")
    assert final["returns"] == [] and final["mean"] is None
    for key in ("validation_loss", "log_prob_synthetic", "log_prob_real"):
        assert np.isfinite(final[key])


# --- Mistakes: one line on standard error, status 2, nothing left behind ---


@pytest.mark.parametrize(
    "args, message",
    [
        (["--env", "pendulum-medum"], "did you mean pendulum-medium"),
        (["--env", "hopper-medium", "--source", "d4rl"], "cannot be fetched"),
        (["--dataset-path", "nowhere.hdf5"], "there is no file nowhere.hdf5"),
        (["--dataset-path", "empty.hdf5"], "empty"),
        (["--dataset-path", "text.hdf5"], "cannot be read as HDF5"),
        (["--dataset-path", "toy.hdf5", "--horizon", "64"], "0 windows of 64 steps"),
        (["--dataset-path", "toy.hdf5", "--batch-size", "4096"], "larger than the log"),
        (["--dataset-path", "toy.hdf5", "--env", "halfcheetah-medium"], "3 observations"),
        (["--dataset-path", "toy.hdf5", "--agent", "td3"], "there is no agent 'td3'"),
        (["--dataset-path", "toy.hdf5", "--kernel", "4"], "--kernel must be odd"),
        (["--dataset-path", "toy.hdf5", "--trajectories", "100"], "multiple of --sample-batch"),
        (["--resume", "nowhere"], "there is no run in nowhere"),
        (["--resume", "nowhere", "--seed", "3"], "--resume takes no other flags"),
        (["--resume", "nowhere", "--env=hopper-medium"], "--resume takes no other flags"),
        (["--dataset-path", "toy.hdf5", "--source", "d4rl"], "a file needs none"),
        (["--dataset-path", "toy.hdf5", "--num-seeds", "1000000"], "would fit"),
        (["--dataset-path", "toy.hdf5", "--sweep", "horizon", "8"], "not a number to vary"),
        (["--sweep", "guidance", "0", "1", "--export", "x.npz"], "one setting at a time"),
        (["--synthetic", "none", "--sweep", "guidance", "0", "1"], "does nothing here"),
        (["--devices", "99"], "this machine has 1"),
        (["--sweep"], "wants a field, without dashes, and its values"),
        (["--num-hosts", "2"], "need --distributed"),
        (["--agent", "iql", "--hyper.gamma", "1.5"], "iql's gamma cannot be 1.5"),
        (["--sweep", "hyper.alpha", "1", "nan"], "td3_bc's alpha cannot be nan"),
        (["--sweep", "hyper.expectile", "0.7", "0.9"], "hyper.expectile is not a setting"),
        (["--sweep", "hyper.hidden", "8", "16"], "not a number to vary"),
        (["--sweep", "--hyper.alpha", "1", "2"], "without dashes"),
        (["--synthetic", "none", "--condition-on-start"], "need --synthetic diffusion"),
        (["--agent", "bc", "--value-guidance", "1"], "needs an agent with a critic, not bc"),
        (["--agent", "bc", "--sweep", "value-guidance", "0", "1"], "with a critic, not bc"),
    ],
)
def test_mistakes_are_one_clear_line(args, message, tmp_path, toy_file, monkeypatch, capsys):
    (tmp_path / "empty.hdf5").write_bytes(b"")
    (tmp_path / "text.hdf5").write_text("observations, actions\n1, 2\n")
    (tmp_path / "toy.hdf5").symlink_to(toy_file)
    monkeypatch.chdir(tmp_path)
    refuse = lambda *a, **k: (_ for _ in ()).throw(OSError("no network in tests"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as e:
        pgd.main(args)
    assert e.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err
    assert said.err.count("\n") == 1 and said.err.startswith("pgd.py: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_sweep_killed_half_way_goes_on_to_the_same_table(tmp_path, toy_file):
    """And in the folder are a row per point and seed, and a figure of the sweep."""
    argv = ["--dataset-path", toy_file, *TINY, "--num-seeds", 2, "--no-shared-denoiser"]
    argv += ["--sweep", "behaviour-guidance", 0, 2, "fit-lr", 1e-3, 1e-2]
    argv += ["--agent", "rebrac", "--value-guidance", 0.1, "--hyper.hidden", 16, 16]
    whole = call(*argv, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    points = json.loads((tmp_path / "whole" / "final.json").read_text())["sweep"]
    grid = [(0.0, 1e-3), (0.0, 1e-2), (2.0, 1e-3), (2.0, 1e-2)]
    assert [(p["behaviour_guidance"], p["fit_lr"]) for p in points] == grid
    assert all(p["seeds"] == [0, 1] for p in points)
    assert len({p["log_prob_synthetic"] for p in points}) == 4
    assert points[0]["validation_loss"] == points[2]["validation_loss"]  # of the same fit-lr
    assert points[0]["validation_loss"] != points[1]["validation_loss"]
    assert (tmp_path / "whole" / "sweep.png").stat().st_size > 10_000
    rows = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    assert (
        rows[0].startswith("round,behaviour_guidance,fit_lr,seed,updates")
        and len(rows) == 1 + 3 * 4 * 2
    )

    env = os.environ | {"PGD_SAVE_EVERY": "0"}
    half = subprocess.Popen(
        pgd_command(*argv, "--out", tmp_path / "half"), env=env, stderr=subprocess.DEVNULL
    )
    saved = tmp_path / "half" / "metrics.csv"
    until = time.monotonic() + 300
    while not saved.exists() and half.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    half.send_signal(signal.SIGKILL)
    half.wait()
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    resumed = call("--resume", tmp_path / "half", "--devices", 1, env=os.environ | flags)
    assert resumed.returncode == 0, resumed.stderr
    assert finals(tmp_path / "half") == finals(tmp_path / "whole")


def test_compiled_programs_are_kept_unless_the_user_says_where(tmp_path, monkeypatch):
    import jax

    import devices

    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        devices.enable_cache(tmp_path)
        assert jax.config.jax_compilation_cache_dir == before["jax_compilation_cache_dir"]
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        devices.enable_cache(tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_an_unknown_flag_is_refused_with_status_2():
    done = call("--envv", "pendulum-medium")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--env" in done.stderr


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_file(
    tmp_path, toy_file, monkeypatch, capsys
):
    import runs

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.np, "savez", full)
    with pytest.raises(SystemExit) as e:
        pgd.main(["--dataset-path", str(toy_file), *TINY, "--out", str(tmp_path / "r")])
    assert e.value.code == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "r").rglob("*.part"))


def test_damaged_run_folders_are_one_clear_line(finished, tmp_path, capsys):
    folder, _ = finished
    for name, content in (("config.json", b"{}"), ("checkpoint/state.npz", b"PK\x03\x04 cut")):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(folder, copy)
        (copy / name).write_bytes(content)
        with pytest.raises(SystemExit) as e:
            pgd.main(["--resume", str(copy)])
        said = capsys.readouterr().err
        assert e.value.code == 2 and "is damaged" in said and said.count("\n") == 1


def test_a_diverging_agent_is_one_clear_line_and_no_result(tmp_path, toy_file, capsys, monkeypatch):
    monkeypatch.setattr(agents, "make_agent", lambda name, **_: agents.bc(lr=float("nan")))
    args = ["--dataset-path", str(toy_file), *TINY, "--agent", "bc"]
    with pytest.raises(SystemExit):
        pgd.main([*args, "--out", str(tmp_path / "r")])
    assert "is not finite in round 0 of seed 0" in capsys.readouterr().err
    assert not (tmp_path / "r" / "final.json").exists()


def test_the_log_alone_needs_no_denoiser(tmp_path, toy_file):
    args = ["--dataset-path", str(toy_file), *TINY, "--synthetic", "none", "--no-shared-denoiser"]
    pgd.main([*args, "--num-seeds", "2", "--out", str(tmp_path / "r")])
    final = finals(tmp_path / "r")
    assert final["synthetic"] == "none" and "validation_loss" not in final


def test_a_world_model_run_reports_and_exports_its_rollouts(tmp_path, toy_file, capsys):
    args = ["--dataset-path", str(toy_file), *TINY, "--synthetic", "world-model", "--rollout", "4"]
    args += ["--num-seeds", "2", "--export", str(tmp_path / "w.npz"), "--export-steps", "600"]
    pgd.main([*args, "--out", str(tmp_path / "r")])
    final = finals(tmp_path / "r")
    assert final["synthetic"] == "world-model" and final["guidance"] is None
    assert -10 < final["validation_r2"] < 1 and 0 < final["within_1_sigma"] < 1
    assert "validation r2" in capsys.readouterr().out
    for seed in (0, 1):
        log = data.read_log(tmp_path / f"w-seed{seed}.npz")
        _, lengths = data.episode_returns(log)
        assert len(log["rewards"]) >= 600 and lengths.max() == 4
    with np.load(tmp_path / "w-seed0.npz") as z:
        assert "world model" in str(z["source"])


def test_every_setting_has_its_own_help_line():
    done = call("--help", env=os.environ | {"COLUMNS": "80"})  # one column of settings
    shown = "".join(done.stdout.replace("│", " ").split())
    source = (ROOT / "pgd.py").read_text()
    for name, hyper in agents.hyperparameters("td3_bc").items():
        assert f"--hyper.{name.replace('_', '-')}" in shown
        assert "".join(hyper.help.split()) in shown, name
    for field in dataclasses.fields(pgd.Config):
        if field.name == "hyper":
            continue
        line = next(x for x in source.splitlines() if x.startswith(f"    {field.name}: "))
        assert "  # " in line, field.name
        assert "".join(line.split("  # ")[1].split()) in shown, field.name


def test_interval_is_students_t():
    import runs

    mean, (low, high) = runs.summarise([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and high - mean == pytest.approx(
        3.1824 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-4
    )
    assert runs.summarise([5.0]) == (5.0, None)


def test_a_run_does_not_overwrite_another(finished, capsys):
    folder, _ = finished
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit):
        pgd.main(["--preset", "smoke", "--out", str(folder)])
    assert "already holds a run" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_resumed_run_refuses_another_log(tmp_path, capsys):
    path = tmp_path / "log.hdf5"
    data.write_log(path, toy_log(seed=0), {})
    args = ["--dataset-path", str(path), *TINY, "--batch-size", "64", "--rounds", "1"]
    pgd.main([*args, "--out", str(tmp_path / "r")])
    with h5py.File(path, "r+") as f:
        f["rewards"][3] = 7.0
    with pytest.raises(SystemExit):
        pgd.main(["--resume", str(tmp_path / "r")])
    assert "was trained on another log" in capsys.readouterr().err


# --- Copied away ---

USER_CODE = """
import jax, jax.numpy as jnp, numpy as np, optax
from types import SimpleNamespace
import pgd

def init(key, obs_dim, act_dim):
    return 0.1 * jax.random.normal(key, (obs_dim, act_dim))
def log_prob(w, obs, action):
    return -0.5 * jnp.sum((action - jnp.tanh(obs @ w)) ** 2, axis=-1)
def update(key, w, batch):
    loss, g = jax.value_and_grad(lambda w: -jnp.mean(log_prob(w, batch.obs, batch.action)))(w)
    return w - 0.3 * g, {"loss": loss}
agent = SimpleNamespace(init=init, update=update, log_prob=log_prob, act=lambda w, obs: jnp.tanh(obs
@ w))

rng = np.random.default_rng(0)
obs = rng.normal(size=(2000, 3))
log = dict(observations=obs, actions=np.tanh(obs[:, :2]), rewards=obs[:, 0],
           terminals=np.zeros(2000, bool), timeouts=np.arange(2000) % 50 == 49)
config = pgd.Config(horizon=8, features=16, blocks=1, fit_steps=200, fit_batch=32, sample_steps=16,
                    rounds=3, updates=50, batch_size=32, trajectories=64, sample_batch=64)
dataset = pgd.make_dataset(log, config)
generator = pgd.make_diffusion(config, dataset.obs_dim, dataset.act_dim)
trainer = pgd.make_train(config, agent, generator, dataset.obs_dim, dataset.act_dim)
_, state, metrics = jax.jit(trainer.train)(jax.random.key(0), dataset)
print(state.buffer.obs.shape, float(metrics["loss"][0]), float(metrics["loss"][-1]))
assert state.buffer.obs.shape == (2, 512, 3)
assert metrics["loss"][-1] < 0.8 * metrics["loss"][0]
"""


def test_a_copied_pgd_trains_and_samples_alone_with_the_users_own_agent(tmp_path):
    (tmp_path / "pgd.py").write_text((ROOT / "pgd.py").read_text())
    (tmp_path / "mine.py").write_text(USER_CODE)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "args, features",
    [
        ([], 64),
        (["--env", "swimmer-medium"], 64),
        (["--env", "pendulum-medium", "--dataset-path", "x.hdf5"], 64),
        (["--dataset-path", "x.hdf5"], 256),
        (["--env", "halfcheetah-medium"], 256),
        (["--env", "halfcheetah-medium", "--preset", "laptop"], 128),
        (["--env", "halfcheetah-medium", "--features", "32"], 32),
    ],
)
def test_the_default_preset_is_sized_by_the_task(args, features):
    import envs

    assert pgd.parse_config(args, tuple(envs.GYMNAX)).features == features
