"""The command line as its users see it: finished, killed and resumed runs, and a copied pgd.py."""

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, real_log, toy_log, with_devices

import data
import pgd
from host import cli, devices, run_folder

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


def metrics_of(folder) -> list[dict]:
    """-> the rows of metrics.csv."""
    with open(folder / "metrics.csv") as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


def assert_one_line(done, message: str) -> None:
    """A finished process was refused: one line on standard error, status 2."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("pgd.py: ")


# --- Finished runs ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The smoke preset, start to end."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    env = with_devices(PGD_SAVE_EVERY="1e9")  # one save, at the end, however slow the machine is
    done = call("--preset", "smoke", "--num-seeds", 2, "--out", folder, env=env)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_a_run_leaves_its_folder_and_prints_its_table(finished):
    folder, done = finished
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names - {".lock"} == {
        "config.json", "metrics.csv", "curve.png", "final.json", "checkpoint/state.npz"
    }  # fmt: skip
    final = json.loads((folder / "final.json").read_text())
    assert final["env"] == "pendulum-random" and final["agent"] == "td3_bc"
    assert final["synthetic"] == "diffusion" and final["seeds"] == [0, 1]
    assert len(final["returns"]) == len(final["scores"]) == 2
    assert final["mean"] == pytest.approx(np.mean(final["scores"]))
    assert final["ci95"][0] < final["mean"] < final["ci95"][1]
    assert "uniformly random actions" in final["source"]
    assert set(final["wall_seconds"]) >= {"load", "fit", "rounds"}
    low, high = data.resolve("pendulum-random").reference
    expected = [100 * (r - low) / (high - low) for r in final["returns"]]
    np.testing.assert_allclose(final["scores"], expected, atol=1e-3)
    rows = (folder / "metrics.csv").read_text().splitlines()
    config = json.loads((folder / "config.json").read_text())["config"]
    assert len(rows) == 1 + 2 * config["rounds"]
    for shown in ("seed 0", "seed 1", "behaviour", "95 % interval", final["source"], str(folder)):
        assert shown in done.stdout
    assert "denoisers: one per seed" in done.stdout
    lines = done.stderr.splitlines()  # a line per round, since this is no terminal
    assert f"run folder: {folder}" in lines  # at the start
    assert [line.split(":")[0] for line in lines[-3:]] == ["fit 2/2", "rounds 1/2", "rounds 2/2"]


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_jobs_of_one_seed_each_equal_one_job_of_all_seeds(shared, tmp_path):
    """Five jobs --seed 0 to 4 and --num-seeds 5; with --shared-denoiser all use that of seed 0."""
    seeds = range(5) if not shared else [2]
    args = ["--env", "pendulum-medium", *TINY, "--rounds", 2, "--hyper.hidden", 16, 16]
    args = [str(x) for x in args] + ["--shared-denoiser"] * shared
    cli.main([*args, "--num-seeds", "5", "--out", str(tmp_path / "all")])
    rows, losses = metrics_of(tmp_path / "all"), []
    for seed in seeds:
        cli.main([*args, "--seed", str(seed), "--out", str(tmp_path / f"{seed}")])
        own = metrics_of(tmp_path / f"{seed}")
        wanted = [row for row in rows if row["seed"] == seed]
        assert len(own) == len(wanted) == 2
        for mine, row in zip(own, wanted):
            assert mine == pytest.approx(row, rel=1e-3)
        losses.append(finals(tmp_path / f"{seed}")["validation_loss"])
    whole = finals(tmp_path / "all")
    assert np.mean(losses) == pytest.approx(whole["validation_loss"], rel=1e-4)
    assert shared or np.ptp(losses) > 1e-6  # one denoiser per seed
    assert len({row["return"] for row in rows if row["round"] == 1}) == 5
    named = "the denoiser of seed 0 for all seeds" if shared else "one per seed"
    assert whole["denoisers"] == named


@pytest.mark.slow
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
    note = "round 0 is never guided"  # with --rounds 1 the default guidance has no effect
    assert note in done.stderr


@pytest.mark.slow
def test_a_log_without_a_simulator_reports_losses_and_likelihoods(tmp_path):
    log = real_log("simglucose.hdf5")
    done = call("--dataset-path", log, "--agent", "iql", *TINY, "--out", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    final = finals(tmp_path / "r")
    assert final["returns"] == [] and final["mean"] is None
    for key in ("validation_loss", "log_prob_synthetic", "log_prob_real"):
        assert np.isfinite(final[key])
    assert "never guided" not in done.stderr


# --- Killed, interrupted and resumed ---


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """-> function: source of the synthetic data -> (flags, folder) of a whole run, made once."""

    @functools.cache
    def make(synthetic):
        folder = tmp_path_factory.mktemp(synthetic)
        args = ("--env", "pendulum-medium", *TINY, "--fit-steps", 300, "--rounds", 12)
        args = (*args, "--model-steps", 600, "--synthetic", synthetic)
        args = (*args, "--export-steps", 100, "--export")
        done = call(*args, folder / "whole.npz", "--out", folder / "whole")
        assert done.returncode == 0, done.stderr
        return args, folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, synthetic", [("fit", "diffusion"), ("rounds", "diffusion"), ("fit", "world-model")]
)
def test_a_killed_run_resumes_to_the_same_numbers_bit_for_bit(
    stage, synthetic, tmp_path, undisturbed
):
    args, whole = undisturbed(synthetic)
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
    with run_folder.read_checkpoint(folder / "checkpoint" / "state.npz") as (about, _):
        rounds = len(about["history"])
    assert rounds < 12 and (rounds == 0 or stage == "rounds")
    again = ("--export", tmp_path / "killed.npz", "--export-steps", 100)
    resumed = call("--resume", folder, *again)
    assert resumed.returncode == 0, resumed.stderr
    assert finals(folder) == finals(whole / "whole")
    whole_log, killed_log = map(data.read_log, (whole / "whole.npz", tmp_path / "killed.npz"))
    for key in whole_log:
        np.testing.assert_array_equal(whole_log[key], killed_log[key])
    assert len(killed_log["rewards"]) < 10_000
    assert (folder / "metrics.csv").read_bytes() == (whole / "whole" / "metrics.csv").read_bytes()
    assert not list(folder.rglob("*.part"))


@pytest.mark.slow
def test_a_sweep_killed_half_way_goes_on_to_the_same_table(tmp_path, toy_file):
    """And in the folder are a row per point and seed, and a figure of the sweep."""
    argv = ["--dataset-path", toy_file, *TINY, "--num-seeds", 2]
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
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    env = with_devices(XLA_FLAGS=flags)
    resumed = call("--resume", tmp_path / "half", "--devices", 1, env=env)
    assert resumed.returncode == 0, resumed.stderr
    assert finals(tmp_path / "half") == finals(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, number",
    [
        ("imports", signal.SIGINT),
        ("compiling", signal.SIGINT),
        ("fit", signal.SIGINT),
        ("rounds", signal.SIGINT),
        ("rounds", signal.SIGTERM),
        ("rounds", signal.SIGHUP),
    ],
)
def test_a_signal_ends_a_run_within_seconds_and_saves_it(stage, number, tmp_path, toy_file):
    """In the fit and the rounds, the last step is in the checkpoint, though none was due."""
    folder = tmp_path / "r"
    args = ["--dataset-path", toy_file, *TINY, "--out", folder]
    args += ["--fit-steps", 10**7 if stage == "fit" else 40, "--rounds", 10**6]
    args += ["--blocks", 30] * (stage == "compiling")
    env = os.environ | {"PGD_SAVE_EVERY": "0" if stage == "fit" else "1e9"}
    usual = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)}
    process = subprocess.Popen(pgd_command(*args), env=env, stderr=subprocess.PIPE, text=True)
    for n, before in usual.items():  # a child inherits "ignore"
        signal.signal(n, before)
    sign = {
        "compiling": "config.json", "fit": "checkpoint/state.npz", "rounds": "metrics.csv"
    }.get(stage)  # fmt: skip
    while sign and not (folder / sign).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(0.5)
    start = time.monotonic()
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - start < 5.0
    assert "Traceback" not in said
    if stage == "imports":  # a shell shows 130 for both
        assert process.returncode in (130, -signal.SIGINT)
        return
    assert process.returncode == 128 + number
    if stage == "compiling":
        assert said.endswith("pgd.py: interrupted; --resume FOLDER continues a run\n")
    else:
        assert said.endswith(f"pgd.py: interrupted and saved; --resume {folder} continues\n")
    assert not (folder / "final.json").exists()
    if stage == "rounds":
        with run_folder.read_checkpoint(folder / "checkpoint" / "state.npz") as (about, _):
            last = (folder / "metrics.csv").read_text().splitlines()[-1]
            assert about["history"][-1]["round"] == int(last.split(",")[0]) > 0
        assert run_folder.load_policy(folder)(np.zeros((4, 3))).shape == (4, 2)


# --- The process: its environment, its output, its cache ---


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_devices_that_jax_does_not_have_are_one_clear_line(platform, toy_file):
    env = os.environ | {"JAX_PLATFORMS": platform}
    done = call("--dataset-path", toy_file, *TINY, env=env)
    if platform == "cuda" and "rounds" in done.stderr:
        pytest.skip("this machine has a GPU")
    assert_one_line(done, platform)


@pytest.mark.slow
@pytest.mark.parametrize("renderer", ["osmesa", "nonsense"])
def test_a_mujoco_renderer_that_is_not_here_is_one_clear_line(renderer, toy_file):
    env = os.environ | {"MUJOCO_GL": renderer}
    probe = [sys.executable, "-c", "import mujoco"]
    if subprocess.run(probe, env=env, capture_output=True).returncode == 0:
        pytest.skip(f"this machine has {renderer}")
    done = call("--dataset-path", toy_file, "--env", "halfcheetah-medium", *TINY, env=env)
    assert_one_line(done, f"MUJOCO_GL={renderer}")


@pytest.mark.slow
def test_help_into_a_reader_that_stops_ends_quietly():
    piped = f"{sys.executable} {ROOT / 'pgd.py'} --help | head -3"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", piped], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.startswith("usage: ") and len(done.stdout.splitlines()) == 3
    assert done.stderr == "" and done.returncode == 0
    read, write = os.pipe()
    os.close(read)  # nobody reads at all
    gone = subprocess.run(pgd_command("--help"), stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert gone.stderr == "" and gone.returncode == 0


@pytest.mark.slow
def test_an_unfinished_run_whose_output_nobody_reads_has_not_status_0(toy_file, tmp_path):
    read, write = os.pipe()
    os.close(read)
    args = pgd_command("--dataset-path", toy_file, *TINY, "--out", tmp_path / "r")
    assert subprocess.run(args, stdout=write, stderr=write).returncode not in (0, 2)
    os.close(write)
    assert not (tmp_path / "r" / "final.json").exists()


@pytest.mark.slow
def test_an_unknown_flag_is_refused_with_status_2():
    done = call("--envv", "pendulum-medium")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--env" in done.stderr


def test_offline_a_log_that_is_not_here_is_one_line():
    done = call("--env", "d4rl:hopper-medium", "--offline")
    assert_one_line(done, "hopper-medium-v2 is not on this machine, and downloads are off; put")


def test_deterministic_sets_a_flag_that_xla_knows_and_once():
    code = """
import os
from host import devices
devices.be_deterministic()
devices.be_deterministic()
import jax
jax.jit(lambda x: x + 1)(1)
print(os.environ["XLA_FLAGS"])
"""
    ask = [sys.executable, "-c", code]
    done = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split().count("--xla_gpu_deterministic_ops=true") == 1
    assert os.environ["XLA_FLAGS"] in done.stdout  # what the user set stays


def test_compiled_programs_are_kept_unless_the_user_says_where(tmp_path, monkeypatch):
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


class Device:
    def __init__(self, platform, capability=None):
        self.platform, self.compute_capability = platform, capability


@pytest.mark.parametrize(
    "device, dtype",
    [
        (Device("cpu"), jnp.float32), (Device("tpu"), jnp.bfloat16),
        (Device("gpu", "9.0"), jnp.bfloat16), (Device("gpu", "12.0"), jnp.bfloat16),
        (Device("gpu", "7.5"), jnp.float32), (Device("gpu", "gfx90a"), jnp.float32),
    ],
)  # fmt: skip
def test_precision_is_chosen_by_the_device_unless_it_is_named(device, dtype, monkeypatch):
    """By pgd.py itself, so that a copied one chooses as the command line does."""
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert pgd.Config().precision == "auto" and pgd.activation_dtype(pgd.Config()) == dtype
    for name in ("float32", "bfloat16"):
        assert pgd.activation_dtype(pgd.Config(precision=name)) == jnp.dtype(name)


# --- Copied away ---

USER_CODE = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from types import SimpleNamespace
needed_by_jax = set(sys.modules)
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
train = pgd.make_train(config, agent)
state, metrics = jax.jit(train)(jax.random.key(0), dataset)
print(state.buffer.obs.shape, float(metrics["loss"][0]), float(metrics["loss"][-1]))
assert state.buffer.obs.shape == (2, 512, 3)
assert metrics["loss"][-1] < 0.8 * metrics["loss"][0]

keys = jax.random.split(jax.random.key(0), 2).at[0].set(jax.random.key(0))
states, metrics = jax.jit(jax.vmap(train, in_axes=(0, None)))(keys, dataset)
assert states.buffer.obs.shape == (2, 2, 512, 3) and metrics["loss"].shape == (2, 3)
assert np.all(metrics["loss"][:, -1] < 0.8 * metrics["loss"][:, 0])
np.testing.assert_allclose(states.agent[0], state.agent, rtol=1e-2, atol=1e-3)
assert np.any(states.agent[0] != states.agent[1])
x = pgd.sample(jax.random.key(1), state.model, dataset, config)
assert x.shape == (64, 8, 7) and np.all(np.isfinite(x))
loaded = {name.split(".")[0] for name in set(sys.modules) - needed_by_jax}
heavy = {"scipy", "h5py", "tqdm", "gymnax", "matplotlib", "tyro", "gymnasium", "host", "agents"}
assert not loaded & heavy, loaded & heavy
"""


def run_alone(folder, *command):
    """A Python command in a folder, without this project on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_a_copied_pgd_trains_and_samples_alone_with_the_users_own_agent(tmp_path):
    """Over seeds too, and it imports nothing but jax, optax, chex and numpy."""
    (tmp_path / "pgd.py").write_text((ROOT / "pgd.py").read_text())
    (tmp_path / "mine.py").write_text(USER_CODE)
    done = run_alone(tmp_path, "mine.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_copied_pgd_with_agents_beside_it_trains_on_a_file(tmp_path):
    """It prints the metrics, with a number for each seed, and needs nothing of host/."""
    for name in ("pgd.py", "agents.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    np.savez(tmp_path / "mine.npz", **toy_log(episodes=20))
    args = TINY[: TINY.index("--eval-episodes")]
    done = run_alone(
        tmp_path, "pgd.py", "--dataset-path", "mine.npz", *args, "--rounds", 2, "--num-seeds", 2
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^fit 4/4: loss \[\S+ +\S+\]$", done.stdout, re.M)
    (row,) = re.findall(r"^rounds 2/2: .*log_prob_real \[ *(\S+) +(\S+)\]", done.stdout, re.M)
    numbers = [float(word) for word in row]
    assert len(numbers) == 2 and numbers[0] != numbers[1] and np.isfinite(numbers).all()
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {
        "pgd.py", "agents.py", "mine.npz"
    }  # fmt: skip
