"""Everything here runs on CPU, offline, with caches in a temporary folder."""

import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

TEMP = tempfile.mkdtemp(prefix="pgd-tests-")  # of this process; removed at its end
os.environ["TMPDIR"] = tempfile.tempdir = TEMP
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PGD_CACHE"] = tempfile.mkdtemp(prefix="pgd-cache-")
os.environ["D4RL_DATASET_DIR"] = tempfile.mkdtemp(prefix="pgd-d4rl-")
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" not in os.environ:  # all processes share what the first has compiled
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="pgd-xla-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"  # a test process per core has no second core to use
# Tests compile much and compute little
FLAGS = "--xla_backend_optimization_level=0"
if version("jax").startswith("0.10."):  # XLA stops at a flag that it does not know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)

import h5py  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OWNER = os.getpid()  # a fork of this process must not remove its files
REAL = ROOT.parent / "shared" / "data"


def pytest_unconfigure():
    if os.getpid() == OWNER:
        shutil.rmtree(TEMP, ignore_errors=True)


def real_log(name: str) -> Path:
    """A published log nobody here made; tests that need it are skipped where it is absent."""
    path = REAL / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def toy_log(episodes=12, length=40, obs_dim=3, act_dim=2, seed=0):
    """A linear system under random actions; every third episode ends in a terminal, the others in a
    time-out."""
    rng = np.random.default_rng(seed)
    log = {k: [] for k in ("observations", "actions", "rewards", "terminals", "timeouts")}
    for e in range(episodes):
        x = rng.normal(size=obs_dim)
        for t in range(length):
            a = np.tanh(rng.normal(size=act_dim))
            last = t == length - 1
            row = (x, a, x.sum() - (a**2).sum(), last and e % 3 == 0, last and e % 3 != 0)
            for k, v in zip(log, row):
                log[k].append(v)
            x = 0.9 * x + 0.3 * a.sum() + 0.05 * rng.normal(size=obs_dim)
    out = {k: np.array(v, np.float32) for k, v in log.items()}
    return out | {k: out[k].astype(bool) for k in ("terminals", "timeouts")}


def with_devices(**more) -> dict[str, str]:
    """-> the environment of a process that chooses its CPU devices itself, or by `more`."""
    return {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"} | more


@pytest.fixture
def log():
    return toy_log()


def successors(log: dict) -> dict:
    """The log with next_observations, which are all 9 at the ends of episodes."""
    after = np.roll(log["observations"], -1, axis=0)
    after[log["terminals"] | log["timeouts"]] = 9.0
    return log | {"next_observations": after}


def write_hdf5(path: Path, log: dict) -> Path:
    """Write the arrays without any check -> path."""
    with h5py.File(path, "w") as f:
        for key, value in log.items():
            f[key] = value
    return path


def data_command(capsys, monkeypatch, *args) -> str:
    """Run `python data.py ARGS` in this process -> what it prints."""
    import data

    monkeypatch.setattr("sys.argv", ["data.py", *map(str, args)])
    data.main()
    return capsys.readouterr().out
