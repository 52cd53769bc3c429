"""Speed, as ratios to this machine's own matrix multiplication rate, measured in the same run.

    python bench.py                # everything, about five minutes on two cores
    python bench.py --json FILE    # the same for machines
    python bench.py --only host    # logs and simulators alone: against plain ways in the same run

A ratio is (floating-point operations that the method needs, counted by hand) / time / matmul rate.
"""

import argparse
import dataclasses
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import agents
import data
import envs
import pgd
import runs
import world_model

OBS, ACT = 17, 6  # halfcheetah
LOG_SIZE = 1_000_000


def seconds(f, *args, repeats: int = 4) -> tuple[float, float]:
    """-> (best wall time of a call, time of the first call, compilation included)."""
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    first, best = time.perf_counter() - start, np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        best = min(best, time.perf_counter() - start)
    return best, first


def matmul_rate(n: int = 2048) -> float:
    """FLOP/s of one large float32 matrix product."""
    a = jax.random.normal(jax.random.key(0), (n, n))
    return 2 * n**3 / seconds(jax.jit(lambda a: a @ a), a, repeats=8)[0]


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


def bench_denoiser(features: int, dataset: pgd.Dataset, rate: float, steps: int = 40):
    """Rows for a training step in its scan and for guided sampling."""
    config = pgd.Config(
        features=features,
        fit_batch=32,
        fit_chunk=steps,
        sample_steps=16,
        trajectories=32,
        sample_batch=32,
    )
    diffusion = pgd.make_diffusion(config, OBS, ACT)
    key = jax.random.key(0)
    state = jax.jit(diffusion.init)(key)
    best, first = seconds(jax.jit(diffusion.fit_chunk), key, state, dataset)
    flops = 3 * 32 * unet_flops(config) * steps
    yield (
        f"denoiser training step, {features} features, batch 32",
        best / steps,
        first,
        flops / best / rate,
    )

    agent = agents.td3_bc()
    agent_state = agent.init(key, OBS, ACT)
    for name, guidance, denoised in (
        ("unguided", 0.0, False), ("guided", 1.0, False), ("guided, denoised", 1.0, True)
    ):  # fmt: skip
        c = dataclasses.replace(config, guidance=guidance, guidance_denoised=denoised)
        diffusion = pgd.make_diffusion(c, OBS, ACT)

        @jax.jit
        def generate(key, state, agent_state, dataset, diffusion=diffusion):
            policy = pgd.target_policy(agent, agent_state)
            return diffusion.generate(key, state, policy, 1.0, dataset)

        best, first = seconds(generate, key, state, agent_state, dataset)
        calls = 2 * c.sample_steps - 1 + (c.sample_steps if guidance and denoised else 0)
        flops = 32 * calls * unet_flops(c)
        yield (
            f"Heun step of 32 trajectories, {features} features, {name}",
            best / c.sample_steps, first, flops / best / rate,
        )  # fmt: skip


def bench_world_model(dataset: pgd.Dataset, rate: float, steps: int = 200):
    """Rows for a training step of the ensemble and for a step of its rollouts, next to diffusion's
    way of making as many transitions."""
    num = 31 * 128
    config = pgd.Config(
        model_chunk=steps,
        patience=10**6,
        horizon=31,
        trajectories=128,
        rollout=31,
        sample_batch=128,
    )
    model, key = world_model.make_world_model(config, OBS, ACT), jax.random.key(0)
    state = jax.jit(model.init)(key)
    width = config.model_hidden
    one = (OBS + ACT) * width + (config.model_layers - 1) * width**2 + width * (2 * OBS + 3)
    best, first = seconds(jax.jit(model.fit_chunk), key, state, dataset)
    flops = 3 * 2 * one * config.members * config.model_batch * steps
    what = f"world model training step, {config.members} members, batch {config.model_batch}"
    yield what, best / steps, first, flops / best / rate

    agent = agents.td3_bc()
    agent_state = agent.init(key, OBS, ACT)

    @jax.jit
    def roll_out(key, state, agent_state, dataset):
        policy = pgd.target_policy(agent, agent_state)
        return model.generate(key, state, policy, 1.0, dataset)

    best, first = seconds(roll_out, key, state, agent_state, dataset)
    flops = 2 * one * config.elites * num
    yield "1,000 transitions of the world model", best / num * 1e3, first, flops / best / rate

    config = pgd.Config(features=128, trajectories=128, sample_batch=128)
    diffusion = pgd.make_diffusion(config, OBS, ACT)

    @jax.jit
    def generate(key, state, agent_state, dataset):
        policy = pgd.target_policy(agent, agent_state)
        return diffusion.generate(key, state, policy, 1.0, dataset)

    state = jax.jit(diffusion.init)(key)
    best, first = seconds(generate, key, state, agent_state, dataset, repeats=2)
    flops = 128 * (3 * config.sample_steps - 1) * unet_flops(config)
    what = "1,000 transitions of guided diffusion, 128 features, 32 levels"
    yield what, best / num * 1e3, first, flops / best / rate


def mlp_flops(inputs: int, outputs: int, batch: int = 256, hidden: int = 256) -> float:
    """Of one forward pass."""
    return 2 * batch * (inputs * hidden + hidden * hidden + hidden * outputs)


def bench_agents(dataset: pgd.Dataset, rate: float, updates: int = 200):
    """Rows for agent updates in their scan, batches drawn from the log."""
    critic, actor, value = mlp_flops(OBS + ACT, 1), mlp_flops(OBS, ACT), mlp_flops(OBS, 1)
    flops = {  # a forward pass is 1, with its gradient 3, with that of its input alone 2
        "bc": 3 * actor,
        "td3_bc": 2 * (actor + 2 * critic + 6 * critic) + 3 * actor + 2 * critic,
        "iql": 2 * critic + 3 * value + value + 3 * actor + value + 6 * critic,
    }
    for name, flop in flops.items():
        agent = agents.make_agent(name)
        n = agent.batches_per_update

        @jax.jit
        def run(key, state, dataset, agent=agent, n=n):
            def step(state, key):
                key_batch, key_agent = jax.random.split(key)
                return agent.update(key_agent, state, pgd.sample_real(key_batch, dataset, n * 256))

            state, metrics = jax.lax.scan(step, state, jax.random.split(key, updates))
            return state, jax.tree.map(jnp.mean, metrics)

        key = jax.random.key(0)
        best, first = seconds(run, key, agent.init(key, OBS, ACT), dataset)
        per_unit = best / updates / n
        what = ", per critic update and half an actor update" if name == "td3_bc" else ""
        yield f"{name} update, batch 256{what}", per_unit, first, flop * updates / best / rate


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
        scan = jax.jit(
            lambda s, a: jax.lax.scan(lambda s, a: (jax.vmap(step)(s, a)[1], None), s, a)[0]
        )
        mjx = num * length / seconds(scan, state, action, repeats=2)[0]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["device", "host"], help="one of the two tables")
    parser.add_argument("--features", type=int, nargs="*", default=[64, 96, 128])
    parser.add_argument("--json", help="write the table here too")
    args = parser.parse_args()
    report = {}
    if args.only != "host":
        report |= device_table(args.features)
    if args.only != "device":
        report |= host_table()
    if args.json:
        runs.write_json(Path(args.json), report | {"versions": runs.versions()})


def host_table() -> dict:
    print(f"\n| {'what':<75} | {'steps/s':>10} | {'against':<28} | ratio |")
    print(f"|{'-' * 77}|{'-' * 12}|{'-' * 30}|{'-' * 7}|")
    rows = []
    for what, per_s, against, ratio in bench_host():
        rows.append({"what": what, "steps_per_s": per_s, "against": against, "ratio": ratio})
        print(f"| {what:<75} | {per_s:>10,.0f} | {against:<28} | {ratio:>5.1f} |", flush=True)
    return {"host": rows}


def device_table(features: list[int]) -> dict:
    rate = matmul_rate()
    device = jax.devices()[0].device_kind
    print(f"{device}: matmul {rate / 1e9:.0f} GFLOP/s\n", file=sys.stderr)
    print(f"| {'what':<75} | {'ms':>8} | {'per s':>7} | first call, s | of matmul |")
    print(f"|{'-' * 77}|{'-' * 10}|{'-' * 9}|{'-' * 15}|{'-' * 11}|")
    dataset, rows = random_dataset(pgd.Config()), []

    def show(row):
        name, time_, first, ratio = row
        rows.append({"what": name, "ms": time_ * 1e3, "first_call_s": first, "of_matmul": ratio})
        numbers = f"{time_ * 1e3:>8.2f} | {1 / time_:>7.0f} | {first:>13.1f} | {ratio:>8.0%} "
        print(f"| {name:<75} | {numbers} |", flush=True)

    for row in bench_agents(dataset, rate):
        show(row)
    for row in bench_world_model(dataset, rate):
        show(row)
    for num in features:
        for row in bench_denoiser(num, dataset, rate):
            show(row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\npeak resident memory with a log of {LOG_SIZE:,} steps: {peak:.0f} MB")
    return {"device": device, "matmul_gflops": rate / 1e9, "peak_mb": peak, "rows": rows}


if __name__ == "__main__":
    main()
