"""Speed, as ratios to this machine's own rate of matrix multiplication in the same process.

    python -m studies.speed                                  # every table; an hour on two cores
    python -m studies.speed --only parts                     # parts, seeds, plain, runs or host
    python -m studies.speed --json FILE.json --figure FILE.png

parts: each part of the method by itself; "of matmul" is the number of floating-point operations
that the method needs, counted by hand, divided by the time and by the matmul rate. seeds: the cost
of more seeds in one program. plain: the plain way of doing the same. runs: pgd.py from a shell.
host: logs and simulators.

Times are medians over --repeats timings, with the least and the greatest. Memory is what XLA
reserves for a program, with its arguments and results.
"""

import contextlib
import dataclasses
import functools
import os
import pty
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import agents
import pgd
from baselines import plain_agents, world_model
from host import cli, collect, envs, flags, gym_envs, run_folder, spread
from host.errors import UserError
from studies.common import Parser, run_study
from studies.figures import ORDER, new_figure, save_figure

ROOT = Path(__file__).resolve().parent.parent
OBS, ACT = 17, 6  # halfcheetah's
HORIZON = 32  # steps of a trajectory
LOG_SIZE = 1_000_000
HEUN = {"sampler": "heun", "sigma_min": 0.01, "sigma_max": 80.0, "rho": 7.0}


# --- Measure ---


class Times(NamedTuple):
    """Several timings of the same."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def ms(self, per: float = 1.0, prefix: str = "") -> dict[str, float]:
        """-> median, least and greatest milliseconds per piece, of which each timing has `per`."""
        found = self.median, min(self.seconds), max(self.seconds)
        names = (f"{prefix}{name}" for name in ("ms", "ms_min", "ms_max"))
        return {name: s / per * 1e3 for name, s in zip(names, found)}


class Measured(NamedTuple):
    """A compiled program."""

    times: Times
    compile_s: float
    memory_mb: float


def timed(f: Callable, repeats: int) -> Times:
    """Call f() `repeats` times."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f())
        seconds.append(time.perf_counter() - start)
    return Times(seconds)


def alternately(fs: Sequence[Callable], repeats: int) -> list[Times]:
    """Call each f() once, and then time them in turn, `repeats` times each: what else the machine
    does falls on all of them alike."""
    for f in fs:
        jax.block_until_ready(f())
    found = [[timed(f, 1).seconds[0] for f in fs] for _ in range(repeats)]
    return [Times(list(seconds)) for seconds in zip(*found)]


def bind(f: Callable, *args) -> Callable:
    """-> a call of f, compiled once, with these arguments."""
    program = jax.jit(f)
    return lambda: program(*args)


def measure(f: Callable, *args, repeats: int) -> Measured:
    """Compile f for these arguments, call it once, and then time it."""
    start = time.perf_counter()
    program = jax.jit(f, keep_unused=True).lower(*args).compile()  # so that all arguments count
    compile_s = time.perf_counter() - start
    m = program.memory_analysis()
    size = m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes
    jax.block_until_ready(program(*args))
    return Measured(timed(lambda: program(*args), repeats), compile_s, size / 1e6)


def matmul_rate(repeats: int, n: int = 2048) -> float:
    """-> FLOP/s of one large float32 matrix product, the median."""
    a = jax.random.normal(jax.random.key(0), (n, n))
    return 2 * n**3 / measure(lambda a: a @ a, a, repeats=repeats).times.median


def part(what: str, m: Measured, per: float, flops: float, rate: float) -> dict:
    """-> a row: each call of m makes `per` pieces, with `flops` operations in all."""
    row = {"what": what} | m.times.ms(per) | {"per_second": per / m.times.median}
    row["of_matmul"] = flops / m.times.median / rate
    return row | {"compile_s": m.compile_s, "memory_mb": m.memory_mb}


def random_log(size: int) -> dict[str, np.ndarray]:
    """-> a log of halfcheetah's dimensions that holds noise."""
    rng = np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((size, OBS), np.float32),
        "actions": np.tanh(rng.standard_normal((size, ACT), np.float32)),
        "rewards": rng.standard_normal(size, np.float32),
        "terminals": np.zeros(size, bool),
        "timeouts": np.arange(size) % 1000 == 999,
    }


# --- Parts ---


def bench_parts(features: Sequence[int], dataset: pgd.Dataset, rate: float, repeats: int):
    """-> rows of every part by itself, the denoiser's at each number of features."""
    yield from bench_agents(dataset, rate, repeats)
    yield from bench_world_model(dataset, rate, repeats)
    for num in features:
        yield from bench_denoiser(num, dataset, rate, repeats)


def unet_flops(config: pgd.Config) -> float:
    """-> operations of one forward pass over one trajectory, in matrix products, with one level."""
    assert config.levels == 1
    f, dim = config.features, OBS + ACT + 2
    block = config.kernel * f * f + 2 * config.expansion * f * f
    return 2 * config.horizon * (config.blocks * block + 2 * config.kernel * f * dim)


def denoiser_calls(config: pgd.Config) -> int:
    """-> denoiser calls per trajectory."""
    return 2 * config.sample_steps - 1 if config.sampler == "heun" else config.sample_steps


def generate_with(generator: pgd.Generator, agent) -> Callable:
    """-> generate(key, model, agent_state, dataset), guided where the generator has guidance."""

    def generate(key, model, agent_state, dataset):
        policy = pgd.target_policy(agent, agent_state)
        return generator.generate(key, model, policy, 1.0, dataset)

    return generate


def bench_denoiser(features: int, dataset: pgd.Dataset, rate: float, repeats: int):
    """-> rows of a training step in its scan, and of a level of each sampler."""
    steps, num = 40, 32
    config = pgd.Config(
        horizon=HORIZON, features=features, fit_batch=num, fit_chunk=steps, sample_steps=16,
        trajectories=num, sample_batch=num,
    )  # fmt: skip
    diffusion, key = pgd.make_diffusion(config), jax.random.key(0)
    model = jax.jit(diffusion.init)(key, dataset)
    m = measure(diffusion.fit, key, model, dataset, repeats=repeats)
    flops = 3 * num * unet_flops(config) * steps
    yield part(f"denoiser training step, {features} features, batch {num}", m, steps, flops, rate)

    agent = agents.td3_bc()
    agent_state = agent.init(key, OBS, ACT)
    for sampler, guidance in [("heun", 0.0), ("heun", 1.0), ("sde", 0.0), ("sde", 1.0)]:
        c = dataclasses.replace(config, sampler=sampler, guidance=guidance)
        generate = generate_with(pgd.make_diffusion(c), agent)
        m = measure(generate, key, model, agent_state, dataset, repeats=repeats)
        what = f"{sampler} step of {num} trajectories, {features} features"
        what += ", guided" if guidance else ", unguided"
        yield part(what, m, c.sample_steps, num * denoiser_calls(c) * unet_flops(c), rate)


def bench_world_model(dataset: pgd.Dataset, rate: float, repeats: int):
    """-> rows of a training step of the ensemble and of its rollouts, and of as many transitions by
    guided diffusion."""
    steps, length, batch = 200, 31, 128
    num = length * batch
    config = world_model.Config(
        model_chunk=steps, patience=10**6, horizon=length, trajectories=batch, rollout=length,
        sample_batch=batch,
    )  # fmt: skip
    ensemble, key = world_model.make_world_model(config), jax.random.key(0)
    model, width = jax.jit(ensemble.init)(key, dataset), config.model_hidden
    one = (OBS + ACT) * width + (config.model_layers - 1) * width**2 + width * (2 * OBS + 3)
    m = measure(ensemble.fit, key, model, dataset, repeats=repeats)
    flops = 3 * 2 * one * config.members * config.model_batch * steps
    what = f"world model training step, {config.members} members, batch {config.model_batch}"
    yield part(what, m, steps, flops, rate)

    agent = agents.td3_bc()
    agent_state = agent.init(key, OBS, ACT)
    m = measure(generate_with(ensemble, agent), key, model, agent_state, dataset, repeats=repeats)
    flops = 2 * one * config.elites * num
    yield part("1,000 transitions of the world model", m, num / 1e3, flops, rate)

    for about, settings in [
        ("the default sampler", {}),
        ("Heun, 32 levels", HEUN | {"sample_steps": 32}),
        ("Heun, the paper's 256", HEUN | {"sample_steps": 256}),
    ]:
        c = pgd.Config(
            horizon=HORIZON, features=128, trajectories=batch, sample_batch=batch, **settings
        )
        diffusion = pgd.make_diffusion(c)
        model = jax.jit(diffusion.init)(key, dataset)
        generate = generate_with(diffusion, agent)
        m = measure(generate, key, model, agent_state, dataset, repeats=min(3, repeats))
        what = f"1,000 transitions of guided diffusion, 128 features, {about}"
        yield part(what, m, num / 1e3, batch * denoiser_calls(c) * unet_flops(c), rate)


def mlp_flops(inputs: int, outputs: int, layers: int = 2, batch: int = 256) -> float:
    """-> operations of one forward pass of a network with hidden layers of width 256."""
    return 2 * batch * 256 * (inputs + (layers - 1) * 256 + outputs)


def agent_flops() -> dict[str, float]:
    """-> operations of one update of each agent. A forward pass counts 1, a pass with the gradient
    3, a pass with the gradient by the input alone 2."""
    critic, actor, value = mlp_flops(OBS + ACT, 1), mlp_flops(OBS, ACT), mlp_flops(OBS, 1)
    flops = {
        "bc": 3 * actor,
        "td3_bc": 2 * (actor + 8 * critic) + 3 * actor + 2 * critic,
        "iql": 2 * critic + 3 * value + value + 3 * actor + value + 6 * critic,
        "awac": 2 * actor + 12 * critic + 3 * actor,
    }
    critic, actor, num = mlp_flops(OBS + ACT, 1, 3), mlp_flops(OBS, 2 * ACT, 3), 10
    sac = lambda num: actor + 4 * num * critic + 3 * actor + 2 * num * critic
    return flops | {
        "rebrac": 2 * (actor + 8 * critic) + 3 * actor + 4 * critic,
        "sac_n": sac(num),
        "edac": sac(num) + 4 * num * critic,  # slopes by the action, and the gradient of those
        "cql": sac(2) + 20 * actor + 3 * 2 * 30 * critic,
    }


def updates_of(agent, num: int) -> Callable:
    """-> run(key, agent_state, dataset): num updates in their scan, on batches of the log."""

    def run(key, state, dataset):
        draw = lambda key: dataset.sample(key, 256)
        return pgd.update_agent(key, agent, state, draw, num)

    return run


def bench_agents(dataset: pgd.Dataset, rate: float, repeats: int, updates: int = 200):
    """-> rows of agent updates in their scan, on batches of the log."""
    for name, flops in agent_flops().items():
        agent, key = agents.make_agent(name), jax.random.key(0)
        state = agent.init(key, OBS, ACT)
        m = measure(updates_of(agent, updates), key, state, dataset, repeats=repeats)
        per, what = agent.batches_per_update, f"{name} update, batch 256"
        if per > 1:
            what += ", per critic update and half an actor update"
        yield part(what, m, updates * per, flops * updates, rate)


# --- Seeds: many runs in one program ---


def program_of(config: world_model.Config, agent):
    """-> (Program of all seeds of the config, its Runs, their mesh, the axes of a Run)."""
    layout = cli.lay_out(flags.Flags(flags.Job(), config, {}), [{}])
    num = layout.num_runs
    mesh = spread.make_mesh(num, 0 if num % len(jax.local_devices()) == 0 else 1)
    program = spread.spread(pgd.make_program(config, agent), layout, mesh)
    return program, spread.put(layout.runs, mesh), mesh, layout.axes


def whole_run(program: pgd.Program) -> Callable:
    """-> run(runs, dataset): all of a run, from its start to its results."""
    fused = pgd.fuse(program)
    return lambda runs, dataset: fused.round(runs, program.init(runs, dataset), dataset)


def stages(config: world_model.Config, dataset: pgd.Dataset, updates: int = 200):
    """-> (name, function, arguments) of each stage of TD3+BC's runs on all seeds of the config, and
    of the whole."""
    c, agent = config, agents.td3_bc()
    program, runs, mesh, axes = program_of(c, agent)
    here = spread.put(dataset, mesh)
    state = jax.jit(program.init)(runs, here)
    one = lambda run, state, dataset: updates_of(agent, updates)(run.key, state, dataset)
    many = spread.over_runs(one, mesh, (axes, 0, None), c.num_seeds)
    return [
        (f"denoiser training, {c.fit_chunk} steps", program.fit, (runs, state, here)),
        (f"guided sampling, {c.trajectories} trajectories", program.generate, (runs, state, here)),
        (f"td3_bc, {updates} updates", many, (runs.each, state.agent, here)),
        (f"a round: the sampling and {c.updates} updates", program.round, (runs, state, here)),
        (f"a run: the training and {c.rounds} rounds", whole_run(program), (runs, here)),
    ]


def bench_seeds(counts: Sequence[int], dataset: pgd.Dataset, repeats: int):
    """-> rows of the stages of a run and of the whole, per number of seeds. The ratio is the time
    per seed over that of one seed by itself."""
    config = world_model.Config(
        horizon=HORIZON, fit_batch=16, fit_steps=40, fit_chunk=40, trajectories=32,
        sample_batch=32, updates=100, rounds=2,
    )  # fmt: skip
    alone = {}
    for seeds in sorted({1, *counts}):
        for stage, f, args in stages(dataclasses.replace(config, num_seeds=seeds), dataset):
            m = measure(f, *args, repeats=repeats)
            per_seed = m.times.median / seeds
            row = {"what": stage, "seeds": seeds} | m.times.ms()
            row["ratio"] = per_seed / alone.setdefault(stage, per_seed)
            yield row | {"compile_s": m.compile_s, "memory_mb": m.memory_mb}


# --- The plain way of doing the same ---


class Unfolded(NamedTuple):
    """Stands for pgd.unfold(x, kernel, gap)."""

    x: Any
    kernel: int
    gap: int = 1


def dense_by_xla(params: dict, x: Any, dense: Callable = pgd.dense) -> Any:
    """pgd.dense; of an Unfolded, XLA's own convolution."""
    if not isinstance(x, Unfolded):
        return dense(params, x)
    flat = x.x.reshape(-1, *x.x.shape[-2:])
    filters = params["w"].reshape(x.kernel, -1, params["w"].shape[-1])
    y = jax.lax.conv_general_dilated(
        flat, filters, (1,), "SAME", rhs_dilation=(x.gap,),
        dimension_numbers=("NHC", "HIO", "NHC"),
    )  # fmt: skip
    return y.reshape(*x.x.shape[:-1], -1) + params["b"]


def convolutions_by_xla():
    """-> a context in which a denoiser is traced with lax.conv in place of windows and a matrix."""
    return mock.patch.multiple(pgd, unfold=Unfolded, dense=dense_by_xla)


def compared(what: str, ours: Callable, plain: str, theirs: Callable, repeats: int, per=1.0):
    """-> a row of two calls, timed in turn; the ratio is above 1 where ours is faster."""
    ours, theirs = alternately((ours, theirs), repeats)
    row = {"what": what} | ours.ms(per) | {"plain": plain} | theirs.ms(per, "plain_")
    return row | {"ratio": theirs.median / ours.median}


def bench_plain(dataset: pgd.Dataset, repeats: int):
    """-> rows of each part, with the plain way of doing the same."""
    yield from plain_agents_of(dataset, repeats)
    yield from plain_fit(dataset, repeats)
    yield from plain_loop(dataset, repeats)
    yield from plain_batches(dataset, repeats)
    yield from plain_seeds(dataset, min(3, repeats))


def plain_fit(dataset: pgd.Dataset, repeats: int, features: int = 64, steps: int = 20):
    """-> rows of a training step of the denoiser."""
    config = pgd.Config(
        horizon=HORIZON, features=features, fit_batch=16, fit_chunk=steps, fit_steps=1_000
    )
    diffusion, key = pgd.make_diffusion(config), jax.random.key(0)
    state = jax.jit(diffusion.init)(key, dataset)
    ours = bind(diffusion.fit, key, state, dataset)
    what = f"denoiser training step, {features} features, batch 16"
    with convolutions_by_xla():
        theirs = bind(pgd.make_diffusion(config).fit, key, state, dataset)
        jax.block_until_ready(theirs())  # compiles it here
    yield compared(what, ours, "the same with lax.conv", theirs, repeats, steps)

    step = jax.jit(pgd.make_diffusion(dataclasses.replace(config, fit_chunk=1)).fit)

    def loop():
        model = state
        for _ in range(steps):
            model, metrics = step(key, model, dataset)
            float(metrics["loss"])  # as a loop that logs its loss does
        return model

    yield compared(what, ours, "a Python loop around one jitted step", loop, repeats, steps)


def plain_agents_of(dataset: pgd.Dataset, repeats: int, num: int = 100, seeds: int = 8):
    """-> rows of the updates of TD3+BC, ReBRAC and IQL, of one seed and of several; the plain ones
    are those of baselines/plain_agents.py."""
    key = jax.random.key(0)
    keys = jax.random.split(key, seeds)
    for name in ("td3_bc", "rebrac", "iql"):
        one, many = [], []
        for agent in (agents.make_agent(name), plain_agents.make_plain(name)):
            run, init = updates_of(agent, num), lambda key: agent.init(key, OBS, ACT)
            one.append(bind(run, key, init(key), dataset))
            over_seeds = jax.vmap(run, in_axes=(0, 0, None))
            many.append(bind(over_seeds, keys, jax.vmap(init)(keys), dataset))
        plain = "separate networks, optimisers and passes"
        per = num * agents.make_agent(name).batches_per_update
        what = f"{name} update" + ", per critic update" * (name != "iql")
        yield compared(what, one[0], plain, one[1], repeats, per)
        yield compared(f"{what}, {seeds} seeds", many[0], plain, many[1], repeats, per)


def plain_loop(dataset: pgd.Dataset, repeats: int, num: int = 100, seeds: int = 4):
    """-> rows of an agent's update, against a loop in Python and against seeds one by one."""
    agent, key = agents.td3_bc(), jax.random.key(0)
    state, run = agent.init(key, OBS, ACT), updates_of(agent, num)
    single = jax.jit(updates_of(agent, 1))

    def loop():
        learner = state
        for i in range(num):
            learner, metrics = single(jax.random.fold_in(key, i), learner, dataset)
            float(metrics["q"])
        return learner

    ours, plain = bind(run, key, state, dataset), "a Python loop around one jitted step"
    yield compared("td3_bc update", ours, plain, loop, repeats, num)

    keys = jax.random.split(key, seeds)
    states = jax.vmap(lambda key: agent.init(key, OBS, ACT))(keys)
    ours = bind(jax.vmap(run, in_axes=(0, 0, None)), keys, states, dataset)
    in_turn = lambda keys, states, data: jax.lax.map(lambda x: run(*x, data), (keys, states))
    theirs = bind(in_turn, keys, states, dataset)
    plain = "one after another in the program (lax.map)"
    yield compared(f"td3_bc update of {seeds} seeds", ours, plain, theirs, repeats, num)


def plain_batches(dataset: pgd.Dataset, repeats: int):
    """-> rows of drawing a batch."""
    key = jax.random.key(0)
    ours = bind(lambda key, data: data.sample(key, 256), key, dataset)
    choose = lambda key, data: data.transitions(
        jax.random.choice(key, data.usable.shape[0], (256,), replace=False)
    )
    plain = "without replacement, as torch loaders do"
    theirs = bind(choose, key, dataset)
    yield compared("a batch of 256 of the log", ours, plain, theirs, repeats)

    windows = dataset.steps[dataset.train_starts[: 2**15, None] + jnp.arange(HORIZON)]
    ours = bind(lambda key, d: d.windows(key, d.train_starts, 16, HORIZON), key, dataset)
    theirs = bind(lambda key, w: w[jax.random.randint(key, (16,), 0, len(w))], key, windows)
    plain = "from a stored copy of windows (25 times the memory)"
    yield compared("16 windows gathered from flat steps", ours, plain, theirs, repeats)


def plain_seeds(dataset: pgd.Dataset, repeats: int, seeds: int = 4):
    """-> a row of several seeds in one program, and in a program each."""
    small = world_model.Config(
        horizon=HORIZON, fit_batch=16, fit_steps=20, fit_chunk=20, trajectories=16,
        sample_batch=16, updates=50, rounds=1,
    )  # fmt: skip

    def fresh(num: int):
        program, runs, *_ = program_of(dataclasses.replace(small, num_seeds=num), agents.td3_bc())
        jax.clear_caches()
        return jax.jit(whole_run(program))(runs, dataset)

    what = f"{seeds} seeds of a short run, compilation included"
    each = lambda: [fresh(1) for _ in range(seeds)]
    yield compared(what, lambda: fresh(seeds), "one program per seed", each, repeats)


# --- Runs from a shell ---

MARKS = {"first loss on the progress bar": "loss ", "first return": "return -"}


def bench_runs(repeats: int):
    """-> rows of pgd.py from a shell, with an empty compilation cache and with a full one, in
    chunks and fused. The log has been collected before."""
    short = ["--fit-steps", "3000", "--rounds", "3"]
    with tempfile.TemporaryDirectory() as folder:
        start_run(f"{folder}/before", f"{folder}/none", "--preset", "smoke")  # collects the log
        for name, given in [("in chunks", []), ("fused", ["--fused"])]:
            caches = [f"{folder}/cache-{name}-{i}" for i in range(repeats)]
            for which in ("first run", "second run"):
                outs = [f"{folder}/{name}-{which}-{i}" for i in range(repeats)]
                runs = [start_run(o, c, *short, *given) for o, c in zip(outs, caches)]
                for what in runs[0][0]:
                    seconds = [seen[what] for seen, _ in runs if what in seen]
                    row = {"what": f"pgd.py {' '.join(short)}, {name}, {which}: {what}"}
                    row["seconds"] = float(np.median(seconds))
                    row |= {"seconds_min": min(seconds), "seconds_max": max(seconds)}
                    yield row | {"peak_mb": float(np.median([peak for _, peak in runs]))}


def start_run(folder: str, cache: str, *given: str) -> tuple[dict[str, float], float]:
    """Run pgd.py as in a terminal -> (seconds until each of MARKS and the end, peak MB). Raises
    UserError where the run fails."""
    command = [sys.executable, str(ROOT / "pgd.py"), *given, "--out", folder]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # without columns, progress bars stay empty
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    begin, seen, text, peak = time.perf_counter(), {}, "", 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=env)
    os.close(theirs)
    try:
        while True:
            try:
                text = (text + os.read(ours, 4096).decode(errors="replace"))[-2_000:]
            except OSError:  # the run has closed its end
                break
            peak = max(peak, peak_mb(process.pid))
            for name, mark in MARKS.items():
                if mark in text:
                    seen.setdefault(name, time.perf_counter() - begin)
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        os.close(ours)
        status = process.wait()
    if status != 0:
        raise UserError(f"pgd.py {' '.join(given)} failed: {text[-500:]}")
    return seen | {"the end": time.perf_counter() - begin}, peak


def peak_mb(pid: int) -> float:
    """-> peak resident memory of a running process, 0 if unknown."""
    with contextlib.suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text()
        return float(status.split("VmHWM:")[1].split()[0]) / 1024
    return 0.0


# --- Logs and simulators ---


def rates(what: str, num: int, ours: Times, against: str, theirs: Times) -> dict:
    """-> a row of steps per second, where each timing has num steps."""
    row = {"what": what, "steps_per_s": num / ours.median}
    row |= {"least": num / max(ours.seconds), "greatest": num / min(ours.seconds)}
    return row | {"against": against, "ratio": theirs.median / ours.median}


def bench_host(repeats: int, steps: int = 100_000):
    """-> rows of logs and simulators, against the plain way of doing the same."""
    import gymnasium

    gymnasium.logger.min_level = gymnasium.logger.ERROR
    make = lambda: gymnasium.make("HalfCheetah-v4")
    by_objects = lambda num: gym_envs.GymnasiumEnvs(make, num, envs.EPISODE)
    by_threads = lambda num: envs.make_envs("halfcheetah", num)
    policy = collect.Policy.load(collect.POLICIES / "halfcheetah-medium.npz")
    collected = lambda copies: timed(lambda: envs.collect(copies, policy, steps, 0), repeats)
    ours, theirs = collected(by_threads(200)), collected(by_objects(20))
    plain = "one gymnasium object per copy"
    yield rates("collect halfcheetah, policy included, 200 copies", steps, ours, plain, theirs)

    agent = agents.td3_bc()
    state = agent.init(jax.random.key(0), OBS, ACT)
    act = jax.jit(lambda obs: agent.act(state, obs))
    for num in (10, 100):
        found = []
        for copies in (by_threads(num), by_objects(num)):
            act(copies.reset(0))
            evaluate = functools.partial(envs.evaluate_on_host, copies, act, 0)
            found.append(timed(evaluate, repeats))
        what = f"evaluate an agent in halfcheetah, {num} episodes at once"
        yield rates(what, num * envs.EPISODE, found[0], plain, found[1])

    if envs.has_mjx():
        num, length = 16, 50
        mjx = mjx_times(num, length, repeats)
        c_time = Times([s * num * length / steps for s in ours.seconds])
        what, against = f"halfcheetah through MJX, {num} copies", "C MuJoCo, as collected above"
        yield rates(what, num * length, mjx, against, c_time)

    uniform = collect.UniformPolicy(1)
    in_program = lambda: envs.collect_in_program("pendulum", uniform.sample, 500, steps // 500, 0)
    by_step = lambda: envs.collect(envs.make_envs("pendulum", 500), uniform, steps, 0)
    ours, theirs = timed(in_program, repeats), timed(by_step, repeats)
    what = "collect pendulum in one program, compilation included"
    yield rates(what, steps, ours, "a jitted step", theirs)
    yield from bench_loading(repeats)


def mjx_times(num: int, length: int, repeats: int) -> Times:
    """-> times of num copies of halfcheetah for `length` steps in JAX."""
    reset, step = envs.make_mjx("halfcheetah")
    _, state = jax.vmap(reset)(jax.random.split(jax.random.key(0), num))
    action = jax.random.uniform(jax.random.key(1), (length, num, ACT), minval=-1.0)
    scan = lambda s, a: jax.lax.scan(lambda s, a: (jax.vmap(step)(s, a)[1], None), s, a)[0]
    return measure(scan, state, action, repeats=repeats).times


LOAD = """
import re, sys, time
import data, h5py
status = lambda: open("/proc/self/status").read()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status())[1]) * 1024
before, start = peak(), time.time()
if sys.argv[2] == "plain":
    f = h5py.File(sys.argv[1])
    log = {k: f[k][()] for k in f}
else:
    log = data.read_log(sys.argv[1])
print(time.time() - start, (peak() - before) / sum(x.nbytes for x in log.values()))
"""


def bench_loading(repeats: int, num: int = LOG_SIZE):
    """-> rows of reading a file of D4RL's size in a new process, as it is and compressed."""
    import h5py

    log = random_log(num)
    log["next_observations"] = np.roll(log["observations"], -1, axis=0)
    with tempfile.TemporaryDirectory() as folder:
        for name, packing in (("", {}), (", gzip", {"compression": "gzip"})):
            path = Path(folder) / f"log{len(packing)}.hdf5"
            with h5py.File(path, "w") as f:
                for key, value in log.items():
                    f.create_dataset(key, data=value, **packing)
            found = {"plain": [], "ours": []}
            for way in ("plain", *("ours", "plain") * repeats):  # the first warms the file cache
                ask = [sys.executable, "-c", LOAD, str(path), way]
                said = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True)
                found[way].append([float(x) for x in said.stdout.split()])
            (ours, memory), (theirs, _) = np.transpose(found["ours"]), np.transpose(found["plain"])
            what = (
                f"load a log of {num:,} steps{name}: {np.median(memory):.2f} x its size in memory"
            )
            ours, theirs = Times(ours.tolist()), Times(theirs[1:].tolist())
            yield rates(what, num, ours, "h5py alone, unchecked", theirs)


# --- Tables and figure ---

COLUMNS = {  # of every table: (head, width, format of a cell)
    "what": ("what", 72, "{:<72}"),
    "seeds": ("seeds", 5, "{:>5}"),
    "ms": ("ms", 9, "{:>9.3g}"),
    "ms_min": ("least", 9, "{:>9.3g}"),
    "ms_max": ("greatest", 9, "{:>9.3g}"),
    "per_second": ("per s", 7, "{:>7.4g}"),
    "seconds": ("seconds", 7, "{:>7.1f}"),
    "seconds_min": ("least", 7, "{:>7.1f}"),
    "seconds_max": ("greatest", 8, "{:>8.1f}"),
    "steps_per_s": ("steps/s", 10, "{:>10,.0f}"),
    "least": ("least", 10, "{:>10,.0f}"),
    "greatest": ("greatest", 10, "{:>10,.0f}"),
    "of_matmul": ("of matmul", 9, "{:>9.0%}"),
    "plain": ("the plain way", 51, "{:<51}"),
    "against": ("against", 29, "{:<29}"),
    "plain_ms": ("its ms", 9, "{:>9.3g}"),
    "plain_ms_min": ("least", 9, "{:>9.3g}"),
    "plain_ms_max": ("greatest", 9, "{:>9.3g}"),
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
    """A bar for each part's share of the matmul rate, each ratio to the plain way, and the time per
    seed at each number of seeds."""
    groups = {
        "share of the matmul rate": [
            (row["what"], row["of_matmul"]) for row in report.get("parts", [])
        ],
        "times as fast as the plain way": [
            (f"{row['what']} / {row['plain']}", row["ratio"]) for row in report.get("plain", [])
        ],
        "time per seed, over that of one seed by itself": [
            (f"{row['what']}, {row['seeds']} seeds", row["ratio"])
            for row in report.get("seeds", [])
        ],
    }
    groups = {name: bars for name, bars in groups.items() if bars}
    counts = [len(bars) for bars in groups.values()]
    height = (1 + 0.22 * sum(counts)) / len(groups)
    figure, axes = new_figure(len(groups), 1, 9.0, height, height_ratios=counts)
    for ax, (name, bars), colour in zip(axes[:, 0], groups.items(), ORDER):
        ax.barh([bar[0] for bar in bars], [bar[1] for bar in bars], color=colour)
        ax.invert_yaxis()
        ax.tick_params(labelsize=7)
        ax.axvline(1.0, color="black", lw=0.5)
        ax.set(xlabel=name, xscale="log" if "times" in name else "linear")
    figure.suptitle(report["device"])
    save_figure(path, figure)


# --- Main ---

TABLES = ("parts", "seeds", "plain", "runs", "host")
DRAWN = {"parts", "seeds", "plain"}


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    parser = Parser("speed", __doc__)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="which tables")
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128, 256],
                        help="channels of the denoiser, in parts")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 4, 8],
                        help="numbers of seeds, in seeds")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5,
                        help="timings of each row; at most 3 of what takes minutes")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="file for the tables")
    parser.add_argument(
        "--figure", metavar="FILE", help="png for a bar chart of parts, seeds, plain"
    )
    args = parser.parse_args(argv)
    if min(args.repeats, *args.features, *args.seeds) < 1:
        raise UserError("--repeats, --features and --seeds must be at least 1")
    if args.figure and not DRAWN & set(args.only):
        raise UserError("--figure draws parts, seeds and plain; --only has none of them")
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are measured
    rate, device = matmul_rate(max(8, args.repeats)), jax.devices()[0].device_kind
    precision = jnp.dtype(pgd.activation_dtype(pgd.Config())).name
    print(f"{device}: float32 matmul {rate / 1e9:.0f} GFLOP/s; denoiser in {precision}", flush=True)
    report = {"device": device, "matmul_gflops": rate / 1e9, "precision": precision}
    report["repeats"] = args.repeats
    few, dataset = min(3, args.repeats), None
    if DRAWN & set(args.only):
        dataset = pgd.make_dataset(random_log(LOG_SIZE), pgd.Config(horizon=HORIZON))
    tables = {
        "parts": lambda: bench_parts(args.features, dataset, rate, args.repeats),
        "seeds": lambda: bench_seeds(args.seeds, dataset, args.repeats),
        "plain": lambda: bench_plain(dataset, args.repeats),
        "runs": lambda: bench_runs(few),
        "host": lambda: bench_host(few),
    }
    for name in TABLES:
        if name in args.only:
            report[name] = show(tables[name]())
    if args.json:
        versions = run_folder.versions()
        run_folder.write_json(Path(args.json), report | {"versions": versions})
    if args.figure:
        draw(Path(args.figure), report)
    for path in filter(None, (args.json, args.figure)):
        print(f"saved: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("speed", study, argv)


if __name__ == "__main__":
    main()
