"""The same program on many devices and hosts: virtual devices of a CPU, processes over loopback."""

import json
import os
import re
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import devices
import pgd

COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"

ON_EIGHT = """
import dataclasses, re, sys
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, "tests")
import devices, pgd
from conftest import toy_log
from test_train import CONFIG, assert_close, make_one
import agents

assert len(jax.devices()) == 8
COLLECTIVES = sys.argv[1]


def run(config, num_devices, batch_axis=None):
    dataset, points = pgd.make_dataset(toy_log(), config), pgd.sweep_points(config)
    fits = pgd.fit_axes(config, list(points[0]))
    shared = config.fit_batch if batch_axis else None
    mesh = devices.make_mesh(len(points), config.num_seeds, num_devices, shared)

    def make(config):
        generator = pgd.make_diffusion(config, 3, 2, batch_axis)
        agent = agents.td3_bc(hidden=(16, 16))
        return pgd.make_train(config, agent, generator, 3, 2)

    trainer = pgd.spread(make, config, mesh, len(points), fits)
    runs = devices.put(pgd.make_runs(config, points), mesh)
    dataset = devices.put(dataset, mesh)
    program = jax.jit(trainer.train).lower(runs, dataset).compile()
    result = program(runs, dataset)
    return mesh, program.as_text(), result


config = dataclasses.replace(CONFIG, rounds=2)
grid = dataclasses.replace(config, num_seeds=4, sweep=("guidance", "0", "1"))
mesh, text, many = run(grid, 8)
assert dict(mesh.shape) == {"sweep": 2, "seed": 4, "batch": 1}
assert not re.findall(COLLECTIVES, text), re.findall(COLLECTIVES, text)
spread_over = {len(x.sharding.device_set) for x in jax.tree.leaves(many[1])}
assert spread_over == {8}, spread_over
_, _, one = run(grid, 1)
assert_close(many, one, 1e-4)
print("seeds and sweep: as on one device, no collectives")

own = dataclasses.replace(config, num_seeds=8, shared_denoiser=False)
mesh, text, many = run(own, 8)
assert not re.findall(COLLECTIVES, text)
assert_close(many, run(own, 2)[2], 1e-4)
print("a denoiser each: as on two devices, no collectives")

lone = dataclasses.replace(config, num_seeds=2, fit_batch=32, trajectories=16, sample_batch=4)
mesh, text, many = run(lone, 8, "batch")
assert dict(mesh.shape) == {"sweep": 1, "seed": 2, "batch": 4}
assert "all-reduce" in text and "all-gather" in text
shared_by = {len(x.sharding.device_set) for x in jax.tree.leaves(many[0])}
assert shared_by == {8}, shared_by
_, _, one = run(lone, 1)
assert_close(many[0].ema, one[0].ema, 2e-3)
assert_close(many[1].buffer.obs, one[1].buffer.obs, 5e-2)
print("one denoiser, its batch shared: as on one device")
"""


def test_eight_devices_give_what_one_gives():
    flags = "--xla_force_host_platform_device_count=8 " + os.environ["XLA_FLAGS"]
    env = os.environ | {"XLA_FLAGS": flags}
    ask = [sys.executable, "-c", ON_EIGHT, COLLECTIVES]
    said = subprocess.run(ask, cwd=ROOT, env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]
    assert len(said.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    "points, seeds, num, fit_batch, shape",
    [
        (1, 8, 4, None, (1, 4, 1)),
        (4, 6, 8, None, (4, 2, 1)),
        (6, 2, 4, None, (2, 2, 1)),
        (1, 1, 8, 128, (1, 1, 8)),
        (1, 2, 8, 128, (1, 2, 4)),
        (1, 1, 8, 16, (1, 1, 2)),  # eight windows each are worth a device
        (1, 3, 8, 128, (1, 3, 2)),
        (1, 2, 8, None, (1, 2, 1)),
    ],
)
def test_runs_divide_over_devices(monkeypatch, points, seeds, num, fit_batch, shape):
    some = [types.SimpleNamespace(id=i) for i in range(num)]
    monkeypatch.setattr(jax, "local_devices", lambda: some)
    monkeypatch.setattr(
        jax.sharding, "Mesh", lambda grid, axes: types.SimpleNamespace(grid=grid, axes=axes)
    )
    mesh = devices.make_mesh(points, seeds, 0, fit_batch)
    assert mesh.grid.shape == shape and points % shape[0] == 0 and seeds % shape[1] == 0
    assert len({d.id for d in mesh.grid.ravel()}) == np.prod(shape)


def test_a_mesh_that_does_not_divide_says_so(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: list(range(4)))
    with pytest.raises(devices.DeviceError, match="6 runs do not divide over 4 devices.* 3$"):
        devices.make_mesh(3, 2)
    with pytest.raises(devices.DeviceError, match="this machine has 4"):
        devices.make_mesh(1, 8, 16)


def test_more_runs_than_memory_say_how_many_would_fit(monkeypatch):
    mesh = types.SimpleNamespace(shape={"sweep": 2, "seed": 2, "batch": 1})
    monkeypatch.setattr(devices, "memory_per_device", lambda num: 10_000 * 4 // num)
    devices.check_memory(2_000, 1_000, 32, mesh)  # 8 on each of four
    with pytest.raises(devices.DeviceError, match="36 runs .*about 32 would fit"):
        devices.check_memory(2_000, 1_000, 36, mesh)
    with pytest.raises(devices.DeviceError, match="not one fits"):
        devices.check_memory(9_500, 1_000, 4, mesh)
    monkeypatch.setattr(
        devices, "memory_per_device", lambda num: None
    )  # unknown: nothing is claimed
    devices.check_memory(2_000, 1_000, 10**9, mesh)


@pytest.mark.parametrize("shared", [True, False])
def test_the_estimate_of_memory_is_near_what_the_compiler_reserves(shared):
    import dataclasses

    from conftest import toy_log
    from test_train import make_one

    config = pgd.Config(
        features=64, sample_steps=4, updates=2, trajectories=256, sample_batch=128,
        shared_denoiser=shared, fit_steps=100, horizon=16,
    )  # fmt: skip
    dataset = pgd.make_dataset(toy_log(), config)
    make, fits, used = make_one(dataset), pgd.fit_axes(config, []), {}
    _, per_run = pgd.memory_needed(config, make(config), dataset, 1, fits)
    alike = dataclasses.replace(config, num_seeds=4)  # four seeds of a point share its denoiser
    of_points = pgd.memory_needed(alike, make(config), dataset, 2, ("sweep",))[1]
    assert pgd.memory_needed(alike, make(config), dataset, 2, ())[1] < of_points
    assert of_points < pgd.memory_needed(alike, make(config), dataset, 2, ("sweep", "seed"))[1]
    for seeds in (2, 6):
        c = dataclasses.replace(config, num_seeds=seeds)
        trainer = pgd.spread(make, c, devices.make_mesh(1, seeds, 1), 1, fits)
        all_runs = pgd.make_runs(c)
        gen = jax.eval_shape(trainer.generator.init, all_runs)
        state = jax.eval_shape(trainer.init_rounds, all_runs, gen, dataset)
        program = jax.jit(trainer.round_chunk).lower(all_runs, state, gen, dataset).compile()
        m = program.memory_analysis()
        used[seeds] = m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes
    measured = (used[6] - used[2]) / 4
    assert 0.6 * measured < per_run < 2.0 * measured


def test_memory_of_this_machine_is_known():
    here = devices.memory_per_device(1)
    if sys.platform == "linux":
        assert 1e8 < here < 1e14
        assert devices.memory_per_device(4) == pytest.approx(here / 4, rel=0.2)
    assert devices.size_of({"a": jnp.zeros((3, 4)), "b": np.zeros(5, np.int8)}) == 53


@pytest.mark.parametrize(
    "kind, capability, expected",
    [("cpu", None, "float32"), ("gpu", "9.0", "bfloat16"), ("gpu", "7.5", "float32"),
     ("tpu", None, "bfloat16"), ("gpu", "gfx90a", "float32")],
)  # fmt: skip
def test_precision_follows_the_hardware(monkeypatch, kind, capability, expected):
    device = types.SimpleNamespace(platform=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert devices.precision("auto") == expected
    assert devices.precision("float32") == "float32"


def run_cli(*argv, **kw):
    command = [sys.executable, str(ROOT / "pgd.py"), *argv]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw
    )


TINY = (
    "--preset smoke --features 8 --fit-steps 20 --fit-chunk 10 --updates 3 --rounds 2 "
    "--trajectories 8 --sample-batch 8 --sample-steps 3 --eval-episodes 2"
).split()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_hosts_share_the_seeds_and_host_0_has_the_table(tmp_path):
    sweep = ["--num-seeds", "2", "--sweep", "guidance", "0", "1", "--seed", "5"]
    alone = run_cli(*TINY, *sweep, "--out", str(tmp_path / "one"))
    said, wrong = alone.communicate(timeout=600)
    assert alone.returncode == 0, wrong

    where = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--num-hosts", "2"]
    both = tmp_path / "two"
    hosts = [run_cli(*TINY, *sweep, *where, "--host", str(i), "--out", str(both)) for i in range(2)]
    answers = [h.communicate(timeout=600) for h in hosts]
    assert [h.returncode for h in hosts] == [0, 0], answers
    assert "95 % interval" in answers[0][0] and "guidance" in answers[0][0]
    assert "host 0 has the table" in answers[1][0]

    one, two = (json.loads((tmp_path / d / "final.json").read_text()) for d in ("one", "two"))
    assert two["seeds"] == one["seeds"] == [5, 6, 5, 6]
    np.testing.assert_allclose(two["returns"], one["returns"], rtol=1e-3)
    assert [p["guidance"] for p in two["sweep"]] == [0.0, 1.0]
    rows = lambda d: (tmp_path / d / "metrics.csv").read_text().splitlines()
    label = lambda d: [line.split(",")[:4] for line in rows(d)]
    assert label("two") == label("one") and len(rows("two")) == 1 + 2 * 2 * 2
    for i in range(2):  # each wrote its own seeds, points and all
        own = json.loads((both / f"host{i}" / "final.json").read_text())
        assert own["seeds"] == [5 + i, 5 + i]


def test_a_host_that_fails_stops_the_others(tmp_path):
    """The second host's folder is taken."""
    both = tmp_path / "two"
    (both / "host1" / "checkpoint").mkdir(parents=True)
    where = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--num-hosts", "2"]
    argv = [*TINY, "--num-seeds", "2", *where, "--out", str(both)]
    hosts = [run_cli(*argv, "--host", str(i)) for i in range(2)]
    said = [h.communicate(timeout=600)[1] for h in hosts]
    assert [h.returncode for h in hosts] == [2, 2], said
    assert "already holds a run" in said[1] and "host 1 stopped" in said[0]
    assert not (both / "final.json").exists()


def test_hosts_that_cannot_start_say_so_in_one_line(tmp_path):
    for argv, said in [
        (["--host", "1"], "need --distributed"),
        (["--distributed", "--host", "1"], "all three"),
        (["--distributed"], "did not come together"),
    ]:
        run = run_cli(*TINY, *argv, "--out", str(tmp_path / "x"))
        _, wrong = run.communicate(timeout=120)
        lines = [line for line in wrong.splitlines() if line.startswith("pgd.py:")]
        assert run.returncode == 2 and len(lines) == 1 and said in lines[0], wrong


def test_bfloat16_products_keep_float32_parameters_and_nearly_the_same_loss():
    from conftest import toy_log
    from test_train import CONFIG

    losses = {}
    dataset = pgd.make_dataset(toy_log(), CONFIG)
    for precision in ("float32", "bfloat16"):
        config = pgd.dataclasses.replace(CONFIG, precision=precision, fit_steps=200, fit_chunk=200)
        generator = pgd.make_diffusion(config, 3, 2)
        state = generator.init(jax.random.key(0))
        text = jax.jit(generator.fit_chunk).lower(jax.random.key(0), state, dataset).as_text()
        assert bool(re.search(r"dot_general.*bf16", text)) == (precision == "bfloat16")
        state, _ = jax.jit(generator.fit_chunk)(jax.random.key(0), state, dataset)
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        losses[precision] = float(jax.jit(generator.validate)(state, dataset)["validation_loss"])
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert losses["bfloat16"] != losses["float32"] < 0.9
