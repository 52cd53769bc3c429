"""Speed, as ratios to this machine's own matrix multiplication rate, measured in the same run.

    python bench.py                      # every table, about fifteen minutes on two cores
    python bench.py --only parts         # or one of them: parts, seeds, plain, runs, host
    python bench.py --json FILE.json --figure FILE.png

parts: each part of the method alone; a share is (floating-point operations that the method needs,
counted by hand) / time / matmul rate. seeds: what more seeds in one program cost. plain: against
the plain way of doing the same. runs: pgd.py as a user starts it. host: logs and simulators.
Memory is what XLA reserves for a program, its arguments and results included.
"""

import argparse
import dataclasses
import os
import pty
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import agents
import data
import devices
import envs
import pgd
import runs
import world_model

OBS, ACT = 17, 6  # halfcheetah
LOG_SIZE = 1_000_000


def configure(**settings) -> pgd.Config:
    """A config whose precision is the one that pgd.py would run with here."""
    return pgd.Config(precision=devices.precision("auto"), **settings)


class Measured(NamedTuple):
    """One program."""

    seconds: float  # best wall time of a call
    compile_s: float
    memory_mb: float


def measure(f, *args, repeats: int = 4) -> Measured:
    """Compile f for these arguments, and call it."""
    start = time.perf_counter()
    program = jax.jit(f).lower(*args).compile()
    compile_s, best = time.perf_counter() - start, np.inf
    m = program.memory_analysis()
    size = m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes
    jax.block_until_ready(program(*args))
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
        best = min(best, time.perf_counter() - start)
    return Measured(best, compile_s, size / 1e6)


def matmul_rate(n: int = 2048) -> float:
    """FLOP/s of one large float32 matrix product."""
    a = jax.random.normal(jax.random.key(0), (n, n))
    return 2 * n**3 / measure(lambda a: a @ a, a, repeats=8).seconds


def random_dataset(config: pgd.Config) -> pgd.Dataset:
    """A log of D4RL's size, of no meaning."""
    rng = np.random.default_rng(0)
    ends = np.arange(LOG_SIZE) % 1000 == 999
    log = {
        "observations": rng.standard_normal((LOG_SIZE, OBS), np.float32),
        "actions": np.tanh(rng.standard_normal((LOG_SIZE, ACT), np.float32)),
        "rewards": rng.standard_normal(LOG_SIZE, np.float32),
        "terminals": np.zeros(LOG_SIZE, bool),
        "timeouts": ends,
    }
    return pgd.make_dataset(log, config)


def unet_flops(config: pgd.Config) -> float:
    """Of one forward pass over one trajectory at one level: matrix products only."""
    assert config.levels == 1
    f, dim = config.features, OBS + ACT + 2
    block = config.kernel * f * f + 2 * config.expansion * f * f
    return 2 * config.horizon * (config.blocks * block + 2 * config.kernel * f * dim)


def part(what: str, m: Measured, per: float, flops: float, rate: float) -> dict:
    """A row: m made `per` of what is meant, in `flops` operations."""
    row = {"what": what, "ms": m.seconds / per * 1e3, "per_second": per / m.seconds}
    return (
        row
        | {"of_matmul": flops / m.seconds / rate}
        | {"compile_s": m.compile_s, "memory_mb": m.memory_mb}
    )


def guided(diffusion: pgd.Generator, agent):
    """-> generate(key, denoiser state, agent state, dataset)."""

    def generate(key, state, agent_state, dataset):
        policy = pgd.target_policy(agent, agent_state)
        return diffusion.generate(key, state, policy, 1.0, dataset)

    return generate


def bench_denoiser(features: int, dataset: pgd.Dataset, rate: float, steps: int = 40):
    """Rows for a training step in its scan and for a level of each sampler."""
    config = configure(
        features=features, fit_batch=32, fit_chunk=steps, sample_steps=16, trajectories=32,
        sample_batch=32,
    )  # fmt: skip
    diffusion, key = pgd.make_diffusion(config, OBS, ACT), jax.random.key(0)
    state = jax.jit(diffusion.init)(key)
    m = measure(diffusion.fit_chunk, key, state, dataset)
    flops = 3 * 32 * unet_flops(config) * steps
    yield part(f"denoiser training step, {features} features, batch 32", m, steps, flops, rate)

    agent = agents.td3_bc()
    agent_state = agent.init(key, OBS, ACT)
    for sampler, guidance in [("heun", 0.0), ("heun", 1.0), ("sde", 0.0), ("sde", 1.0)]:
        c = dataclasses.replace(config, sampler=sampler, guidance=guidance)
        m = measure(
            guided(pgd.make_diffusion(c, OBS, ACT), agent), key, state, agent_state, dataset
        )
        calls = 2 * c.sample_steps - 1 if sampler == "heun" else c.sample_steps
        name = f"{sampler} step of 32 trajectories, {features} features"
        name += ", guided" if guidance else ", unguided"
        yield part(name, m, c.sample_steps, 32 * calls * unet_flops(c), rate)


def bench_world_model(dataset: pgd.Dataset, rate: float, steps: int = 200):
    """Rows for a training step of the ensemble and for its rollouts, next to diffusion's way of
    making as many transitions."""
    num, length = 31 * 128, 31
    config = pgd.Config(
        model_chunk=steps, patience=10**6, horizon=length, trajectories=128, rollout=length,
        sample_batch=128,
    )  # fmt: skip
    model, key = world_model.make_world_model(config, OBS, ACT), jax.random.key(0)
    state, width = jax.jit(model.init)(key), config.model_hidden
    one = (OBS + ACT) * width + (config.model_layers - 1) * width**2 + width * (2 * OBS + 3)
    m = measure(model.fit_chunk, key, state, dataset)
    flops = 3 * 2 * one * config.members * config.model_batch * steps
    what = f"world model training step, {config.members} members, batch {config.model_batch}"
    yield part(what, m, steps, flops, rate)

    agent = agents.td3_bc()
    agent_state = agent.init(key, OBS, ACT)
    m = measure(guided(model, agent), key, state, agent_state, dataset)
    flops = 2 * one * config.elites * num
    yield part("1,000 transitions of the world model", m, num / 1e3, flops, rate)

    for about, over in [
        ("default sampler", {}),
        ("Heun, 32 levels", dict(sampler="heun", sigma_max=80.0)),
        (
            "Heun, the paper's 256",
            dict(sampler="heun", sigma_max=80.0, sample_steps=256, guidance_every=1),
        ),
    ]:
        c = configure(features=128, trajectories=128, sample_batch=128, **over)
        diffusion = pgd.make_diffusion(c, OBS, ACT)
        state = jax.jit(diffusion.init)(key)
        m = measure(guided(diffusion, agent), key, state, agent_state, dataset, repeats=1)
        calls = 2 * c.sample_steps - 1 if c.sampler == "heun" else c.sample_steps
        what = f"1,000 transitions of guided diffusion, 128 features, {about}"
        yield part(what, m, num / 1e3, 128 * calls * unet_flops(c), rate)


def mlp_flops(inputs: int, outputs: int, layers: int = 2, batch: int = 256) -> float:
    """Of one forward pass, with so many hidden layers of 256."""
    return 2 * batch * 256 * (inputs + (layers - 1) * 256 + outputs)


def updates_of(agent, num: int):
    """-> run(key, agent state, dataset): so many updates in their scan, on batches of the log."""

    def run(key, state, dataset):
        def step(state, key):
            key_batch, key_agent = jax.random.split(key)
            batch = pgd.sample_real(key_batch, dataset, agent.batches_per_update * 256)
            return agent.update(key_agent, state, batch)

        state, metrics = jax.lax.scan(step, state, jax.random.split(key, num))
        return state, jax.tree.map(jnp.mean, metrics)

    return run


def bench_agents(dataset: pgd.Dataset, rate: float, updates: int = 200):
    """Rows for agent updates in their scan, batches drawn from the log."""
    # A forward pass is 1, with its gradient 3, with that of its input alone 2
    critic, actor, value = mlp_flops(OBS + ACT, 1), mlp_flops(OBS, ACT), mlp_flops(OBS, 1)
    flops = {
        "bc": 3 * actor,
        "td3_bc": 2 * (actor + 8 * critic) + 3 * actor + 2 * critic,
        "iql": 2 * critic + 3 * value + value + 3 * actor + value + 6 * critic,
        "awac": 2 * actor + 12 * critic + 3 * actor,
    }
    critic, actor, num = mlp_flops(OBS + ACT, 1, 3), mlp_flops(OBS, 2 * ACT, 3), 10
    sac = lambda num: actor + 4 * num * critic + 3 * actor + 2 * num * critic
    flops |= {
        "rebrac": 2 * (actor + 8 * critic) + 3 * actor + 4 * critic,
        "sac_n": sac(num),
        "edac": sac(num) + 4 * num * critic,  # slopes by the action, and the gradient of those
        "cql": sac(2) + 20 * actor + 3 * 2 * 30 * critic,
    }
    for name, flop in flops.items():
        agent, key = agents.make_agent(name), jax.random.key(0)
        m = measure(updates_of(agent, updates), key, agent.init(key, OBS, ACT), dataset)
        per, what = agent.batches_per_update, ""
        if per > 1:
            what = ", per critic update and half an actor update"
        yield part(f"{name} update, batch 256{what}", m, updates * per, flop * updates, rate)


# --- Seeds: one program of many ---


def bench_seeds(counts: list[int], dataset: pgd.Dataset):
    """Rows for the stages of a run, and the whole, for so many seeds in one program; ratio: time
    over that of as many programs of one seed, one after another."""
    config = configure(
        fit_batch=16, fit_steps=40, fit_chunk=40, trajectories=32, sample_batch=32, updates=100,
        rounds=2, shared_denoiser=False, agent="td3_bc",
    )  # fmt: skip
    agent, alone = agents.td3_bc(), {}
    num_devices = len(jax.local_devices())
    for seeds in sorted({1, *counts}):
        c = dataclasses.replace(config, num_seeds=seeds)
        mesh = devices.make_mesh(1, seeds, 0 if seeds % num_devices == 0 else 1)
        fits, all_runs = pgd.fit_axes(c, []), pgd.make_runs(c)

        def make(c):
            diffusion = pgd.make_diffusion(c, OBS, ACT)
            return pgd.make_train(c, agent, diffusion, OBS, ACT)

        trainer = pgd.spread(make, c, mesh, 1, fits)
        all_runs, here = devices.put(all_runs, mesh), devices.put(dataset, mesh)
        gen_state = jax.jit(trainer.generator.init)(all_runs)
        state = jax.jit(trainer.init_rounds)(all_runs, gen_state, here)
        updates = jax.vmap(updates_of(agent, 200), in_axes=(0, 0, None))
        agent_states = jax.tree.map(lambda x: x[0], state.agent)
        for stage, f, args in [
            ("denoiser training, 40 steps", trainer.generator.fit_chunk, (gen_state, here)),
            ("guided sampling, 32 trajectories", trainer.generate,
             (state, gen_state, here, jnp.int32(0))),
            ("td3_bc, 200 updates", lambda r, *a: updates(r.keys, *a), (agent_states, here)),
            ("a round: the sampling and 100 updates", trainer.round_chunk,
             (state, gen_state, here)),
            ("a run: the training and two rounds", trainer.train, (here,)),
        ]:  # fmt: skip
            m = measure(f, all_runs, *args, repeats=3)
            alone.setdefault(stage, m.seconds / seeds)
            row = {"what": stage, "seeds": seeds, "ms": m.seconds * 1e3}
            row["ratio"] = m.seconds / seeds / alone[stage]
            yield row | {"compile_s": m.compile_s, "memory_mb": m.memory_mb}


# --- The plain way of doing the same ---


def conv_by_xla(x, w, kernel: int):
    """What pgd.convolve computes, as XLA's own convolution."""
    flat = x.reshape(-1, *x.shape[-2:])
    filters = w.reshape(kernel, -1, w.shape[-1])
    y = jax.lax.conv_general_dilated(
        flat, filters, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )
    return y.reshape(*x.shape[:-1], -1)


def bench_plain(dataset: pgd.Dataset, features: int = 64, steps: int = 20):
    """Rows (what, ms, the plain way, its ms, ratio)."""
    config = configure(features=features, fit_batch=16, fit_chunk=steps, fit_steps=1_000)
    diffusion, key = pgd.make_diffusion(config, OBS, ACT), jax.random.key(0)
    state = jax.jit(diffusion.init)(key)
    ours = measure(diffusion.fit_chunk, key, state, dataset)

    def row(what, ours_s, plain, plain_s):
        times = {"ms": ours_s * 1e3, "plain": plain, "plain_ms": plain_s * 1e3}
        return {"what": what, **times, "ratio": plain_s / ours_s}

    what = f"denoiser training step, {features} features, batch 16"
    other = pgd.make_diffusion(config, OBS, ACT)  # a new one, or jit would know the old
    with mock.patch.object(pgd, "convolve", conv_by_xla):
        plain = measure(other.fit_chunk, key, state, dataset, repeats=2)
    yield row(what, ours.seconds / steps, "the same with lax.conv", plain.seconds / steps)

    one = pgd.make_diffusion(dataclasses.replace(config, fit_chunk=1), OBS, ACT)
    step = jax.jit(one.fit_chunk)

    def loop(state):
        for _ in range(steps):
            state, metrics = step(key, state, dataset)
            float(metrics["loss"])  # as a loop that logs its loss does
        return state

    loop(state)
    plain_s = min(once(lambda: loop(state)) for _ in range(3)) / steps
    yield row(what, ours.seconds / steps, "a Python loop round one jitted step", plain_s)

    agent, num = agents.td3_bc(), 100
    agent_state = agent.init(key, OBS, ACT)
    ours = measure(updates_of(agent, num), key, agent_state, dataset)
    single = jax.jit(updates_of(agent, 1))

    def agent_loop(state):
        for i in range(num):
            state, metrics = single(jax.random.fold_in(key, i), state, dataset)
            float(metrics["q"])
        return state

    agent_loop(agent_state)
    plain_s = min(once(lambda: agent_loop(agent_state)) for _ in range(3)) / num
    yield row("td3_bc update", ours.seconds / num, "a Python loop round one jitted step", plain_s)

    seeds, run = 4, updates_of(agent, num)
    many = (
        jax.random.split(key, seeds),
        jax.vmap(lambda k: agent.init(k, OBS, ACT))(jax.random.split(key, seeds)),
    )
    ours = measure(jax.vmap(run, in_axes=(0, 0, None)), *many, dataset)
    mapped = lambda keys, states, dataset: jax.lax.map(lambda x: run(*x, dataset), (keys, states))
    plain = measure(mapped, *many, dataset)
    in_turn = "one after another in the program (lax.map)"
    what = f"td3_bc update of {seeds} seeds"
    yield row(what, ours.seconds / num, in_turn, plain.seconds / num)

    ours = measure(lambda key, dataset: pgd.sample_real(key, dataset, 256), key, dataset)
    choose = lambda key, dataset: dataset.transitions(
        jax.random.choice(key, dataset.usable.shape[0], (256,), replace=False)
    )
    plain = measure(choose, key, dataset, repeats=2)
    without = "without replacement, as torch loaders do"
    yield row("a batch of 256 of the log", ours.seconds, without, plain.seconds)

    windows = dataset.steps[dataset.train_starts[: 2**15, None] + jnp.arange(32)]
    draw = lambda key, dataset: pgd.sample_windows(key, dataset, dataset.train_starts, 16, 32)
    ours = measure(draw, key, dataset)
    stored = lambda key, w: w[jax.random.randint(key, (16,), 0, len(w))]
    plain = measure(stored, key, windows)
    yield row("16 windows gathered from flat steps", ours.seconds,
              "from a stored copy of windows (25 times the memory)", plain.seconds)  # fmt: skip
    del windows

    small = dataclasses.replace(config, num_seeds=seeds, updates=50, rounds=1, fit_chunk=20)
    small = dataclasses.replace(
        small, fit_steps=20, trajectories=16, sample_batch=16, shared_denoiser=False
    )

    def make(c):
        return pgd.make_train(c, agent, pgd.make_diffusion(c, OBS, ACT), OBS, ACT)

    def first(num):
        c = dataclasses.replace(small, num_seeds=num)
        trainer = pgd.spread(make, c, devices.make_mesh(1, num, 1), 1, pgd.fit_axes(c, []))
        jax.clear_caches()
        return once(
            lambda: jax.block_until_ready(jax.jit(trainer.train)(pgd.make_runs(c), dataset))
        )

    what = f"{seeds} seeds of a short run, compilation included"
    yield row(what, first(seeds), "one program per seed", sum(first(1) for _ in range(seeds)))


# --- Runs, as a user starts them ---

FIRST = {"first loss on the progress bar": "loss ", "first return": "return -"}


def peak_mb(pid: int) -> float:
    """Peak resident memory of a running process; 0 where that cannot be read."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        return float(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return 0.0


def start(folder: str, cache: str, *flags: str) -> tuple[dict[str, float], float]:
    """Run pgd.py as in a terminal -> (seconds until each of FIRST and the end, peak MB)."""
    command = [sys.executable, str(data.HERE / "pgd.py"), *flags, "--out", folder]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # else it has no columns, and bars stay empty
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    begin, seen, text, peak = time.perf_counter(), {}, "", 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=env)
    os.close(theirs)
    while True:
        try:
            text = (text + os.read(ours, 4096).decode(errors="replace"))[-2_000:]
        except OSError:  # it has closed its end
            break
        peak = max(peak, peak_mb(process.pid))
        for name, mark in FIRST.items():
            if mark in text:
                seen.setdefault(name, time.perf_counter() - begin)
    os.close(ours)
    if process.wait() != 0:
        raise RuntimeError(f"pgd.py {' '.join(flags)} failed: {text[-500:]}")
    return seen | {"the end": time.perf_counter() - begin}, peak


def bench_runs():
    """Rows for pgd.py from a shell: with an empty compilation cache and a full one, in chunks and
    fused. The log has been collected before."""
    with tempfile.TemporaryDirectory() as folder:
        short = ["--fit-steps", "3000", "--rounds", "3"]
        start(f"{folder}/before", f"{folder}/none", "--preset", "smoke")  # collects the log
        for flags, name in [([], "in chunks"), (["--fused"], "fused")]:
            for i, cache in enumerate(["first run", "second run"]):
                out, kept = f"{folder}/{name}{i}", f"{folder}/cache-{name}"
                seen, peak = start(out, kept, *short, *flags)
                for what, seconds in seen.items():
                    about = f"pgd.py {' '.join(short)}, {name}, {cache}: {what}"
                    yield {"what": about, "seconds": seconds, "peak_mb": peak}


# --- Logs and simulators: against the plain way of doing the same ---


def bench_host(steps: int = 100_000):
    """Rows (what, steps per second, the plain way, ratio of the rates)."""
    import gymnasium

    gymnasium.logger.min_level = gymnasium.logger.ERROR
    policy = data.Policy.load(data.HERE / "policies" / "halfcheetah-medium.npz")
    rate = lambda make, num: steps / once(lambda: envs.collect(make(num), policy, steps, 0))
    make = lambda: gymnasium.make("HalfCheetah-v4")
    loop = rate(lambda num: envs.GymnasiumEnvs(make, num, envs.EPISODE), 20)
    ours = rate(lambda num: envs.make_envs("halfcheetah", num), 200)
    plain = "one gymnasium object a copy"
    yield "collect halfcheetah, policy included, 200 copies", ours, plain, ours / loop

    agent = agents.td3_bc()
    state = agent.init(jax.random.key(0), OBS, ACT)
    act = jax.jit(lambda obs: agent.act(state, obs))
    for num in (10, 100):
        results = []
        for copies in (
            envs.GymnasiumEnvs(make, num, envs.EPISODE),
            envs.make_envs("halfcheetah", num),
        ):
            act(copies.reset(0))
            duration = once(lambda c=copies: envs.evaluate_on_host(c, act, 0))
            results.append(num * envs.EPISODE / duration)
        name = f"evaluate an agent in halfcheetah, {num} episodes at once"
        yield name, results[1], plain, results[1] / results[0]

    if envs.has_mjx():
        num, length = 16, 50
        reset, step = envs.make_mjx("halfcheetah")
        keys = jax.random.split(jax.random.key(0), num)
        _, state = jax.vmap(reset)(keys)
        action = jax.random.uniform(jax.random.key(1), (length, num, ACT), minval=-1.0)
        scan = lambda s, a: jax.lax.scan(lambda s, a: (jax.vmap(step)(s, a)[1], None), s, a)[0]
        mjx = num * length / measure(scan, state, action, repeats=2).seconds
        yield "halfcheetah through MJX, 16 copies", mjx, "C MuJoCo, as collected above", mjx / ours

    entry = data.resolve("pendulum-random")
    uniform = data.UniformPolicy(1)
    whole = lambda: envs.collect_in_program("pendulum", uniform.sample, 500, steps // 500, 0)
    host = steps / once(
        lambda: envs.collect(envs.make_envs(entry.simulator, 500), uniform, steps, 0)
    )
    ours = steps / once(whole)
    yield (
        "collect pendulum in one program, compilation included",
        ours,
        "a jitted step",
        ours / host,
    )

    with tempfile.TemporaryDirectory() as folder:
        yield from bench_loading(Path(folder))


def bench_loading(folder: Path, num: int = LOG_SIZE):
    """A file of D4RL's size, as it is and compressed as D4RL's are, read in a fresh process."""
    import h5py

    rng = np.random.default_rng(0)
    log = {
        "observations": rng.standard_normal((num, OBS), np.float32),
        "actions": np.tanh(rng.standard_normal((num, ACT), np.float32)),
        "rewards": rng.standard_normal(num, np.float32),
        "terminals": np.zeros(num, bool),
        "timeouts": np.arange(num) % 1000 == 999,
    }
    log["next_observations"] = np.roll(log["observations"], -1, axis=0)
    for name, packing in (("", {}), (", gzip", {"compression": "gzip"})):
        path = folder / f"log{len(packing)}.hdf5"
        with h5py.File(path, "w") as f:
            for key, value in log.items():
                f.create_dataset(key, data=value, **packing)
        measure = (
            "import re, sys, time; import data, h5py\n"
            "status = lambda: open('/proc/self/status').read()\n"
            "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status())[1]) * 1024\n"
            "before, start = peak(), time.time()\n"
            "if sys.argv[2] == 'plain':\n"
            "    f = h5py.File(sys.argv[1]); log = {k: f[k][()] for k in f}\n"
            "else:\n"
            "    log = data.read_log(data.Path(sys.argv[1]))\n"
            "size = sum(x.nbytes for x in log.values())\n"
            "print(time.time() - start, (peak() - before) / size)"
        )
        found = {}
        for way in ("plain", "ours", "plain", "ours"):  # the first to warm the file's cache
            ask = [sys.executable, "-c", measure, str(path), way]
            said = subprocess.run(ask, cwd=data.HERE, capture_output=True, text=True, check=True)
            found[way] = [float(x) for x in said.stdout.split()]
        time_, memory = found["ours"]
        what = (
            f"load a log of {num:,} steps{name}: {time_:.2f} s, {memory:.2f} x its size in memory"
        )
        yield what, num / time_, "h5py alone, unchecked", found["plain"][0] / time_


def once(f) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


# --- Tables ---

COLUMNS = {  # of every table: (head, width, how to write it)
    "what": ("what", 72, "{:<72}"),
    "seeds": ("seeds", 5, "{:>5}"),
    "ms": ("ms", 9, "{:>9.3g}"),
    "per_second": ("per s", 7, "{:>7.4g}"),
    "seconds": ("seconds", 7, "{:>7.1f}"),
    "steps_per_s": ("steps/s", 10, "{:>10,.0f}"),
    "of_matmul": ("of matmul", 9, "{:>9.0%}"),
    "plain": ("the plain way", 51, "{:<51}"),
    "against": ("against", 28, "{:<28}"),
    "plain_ms": ("its ms", 9, "{:>9.3g}"),
    "ratio": ("ratio", 6, "{:>6.2f}"),
    "compile_s": ("compile, s", 10, "{:>10.1f}"),
    "memory_mb": ("MB", 6, "{:>6.0f}"),
    "peak_mb": ("peak MB", 7, "{:>7.0f}"),
}


def show(rows: Iterator[dict]) -> list[dict]:
    """Print rows as they come -> all of them."""
    kept = []
    for row in rows:
        if not kept:
            print("\n| " + " | ".join(f"{COLUMNS[k][0]:<{COLUMNS[k][1]}}" for k in row) + " |")
            print("|" + "|".join("-" * (COLUMNS[k][1] + 2) for k in row) + "|")
        print("| " + " | ".join(COLUMNS[k][2].format(v) for k, v in row.items()) + " |", flush=True)
        kept.append(row)
    return kept


def draw(path: Path, report: dict[str, Any]) -> None:
    """A bar for each part's share of the matmul rate, each plain way's ratio and each number of
    seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = []
    for row in report.get("parts", []):
        bars.append((row["what"], row["of_matmul"], "C0", "share of matmul rate"))
    for row in report.get("plain", []):
        bars.append((f"{row['what']} / {row['plain']}", row["ratio"], "C1", "times as fast"))
    for row in report.get("seeds", []):
        what = f"{row['what']}, {row['seeds']} seeds"
        bars.append((what, row["ratio"], "C2", "time per seed, in that of one alone"))
    if not bars:
        return
    groups = list(dict.fromkeys(b[3] for b in bars))
    counts = [sum(b[3] == g for b in bars) for g in groups]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, 1 + 0.22 * len(bars)), layout="constrained",
        height_ratios=counts, squeeze=False,
    )  # fmt: skip
    for ax, group in zip(axes[:, 0], groups):
        own = [b for b in bars if b[3] == group]
        ax.barh([b[0] for b in own], [b[1] for b in own], color=own[0][2])
        ax.invert_yaxis()
        ax.tick_params(labelsize=7)
        ax.axvline(1.0, color="black", lw=0.5)
        ax.set(xlabel=group, xscale="log" if group == "times as fast" else "linear")
    figure.suptitle(report["device"], fontsize=10)
    with runs.atomic_file(path) as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


TABLES = ("parts", "seeds", "plain", "runs", "host")


def main() -> None:
    """The command line: the tables asked for, printed row by row and perhaps saved."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--json", help="write the tables here too")
    parser.add_argument("--figure", help="and a bar chart here")
    args = parser.parse_args()
    if args.figure and not {"parts", "seeds", "plain"} & set(args.only):
        parser.error("--figure draws parts, seeds and plain; --only has none of them")
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    rate, device = matmul_rate(), jax.devices()[0].device_kind
    precision = devices.precision("auto")
    print(f"{device}: float32 matmul {rate / 1e9:.0f} GFLOP/s; denoiser in {precision}", flush=True)
    report = {"device": device, "matmul_gflops": rate / 1e9, "precision": precision}
    dataset = None
    if {"parts", "seeds", "plain"} & set(args.only):
        dataset = random_dataset(pgd.Config())
    if "parts" in args.only:
        report["parts"] = show(parts(args.features, dataset, rate))
    if "seeds" in args.only:
        report["seeds"] = show(bench_seeds(sorted(args.seeds), dataset))
    if "plain" in args.only:
        report["plain"] = show(bench_plain(dataset))
    if "runs" in args.only:
        report["runs"] = show(bench_runs())
    if "host" in args.only:
        names = ("what", "steps_per_s", "against", "ratio")
        report["host"] = show(dict(zip(names, row)) for row in bench_host())
    if args.json:
        runs.write_json(Path(args.json), report | {"versions": runs.versions()})
    if args.figure:
        draw(Path(args.figure), report)
    for path in filter(None, (args.json, args.figure)):
        print(f"saved: {path}")


def parts(features: list[int], dataset: pgd.Dataset, rate: float) -> Iterator[dict]:
    """Rows for every part alone, the denoiser's at each number of features."""
    yield from bench_agents(dataset, rate)
    yield from bench_world_model(dataset, rate)
    for num in features:
        yield from bench_denoiser(num, dataset, rate)


if __name__ == "__main__":
    main()
