"""Many runs in one program, on one device, on virtual devices of a CPU, and on several hosts."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, toy_log, with_devices
from test_train import CONFIG, MAKERS, assert_close, evaluate

import agents
import pgd
from host import cli, cores, devices, envs, flags, spread
from host.errors import UserError

SMALL = dataclasses.replace(CONFIG, fit_steps=10, rounds=2)
AGENT = agents.bc(hidden=(16,))  # which compiles fast


def given(config=SMALL, hyper=None, **job) -> flags.Flags:
    return flags.Flags(flags.Job(**job), config, hyper or {})


def lay_out(f: flags.Flags) -> spread.Layout:
    return cli.lay_out(f, flags.sweep_points(f))


def program_of(f: flags.Flags, mesh=None):
    """-> (program of all runs, layout, data set, program of one run)."""
    layout = lay_out(f)
    swept = any(name.startswith("hyper.") for name in layout.labels[0])
    make_agent = lambda **hyper: agents.td3_bc(hidden=(16, 16), **hyper)
    learns_rewards = f.job.synthetic == "world-model"
    agent = make_agent if swept else make_agent() if learns_rewards else AGENT
    program = pgd.make_program(f.config, agent, MAKERS[f.job.synthetic], evaluate)
    mesh = mesh or spread.make_mesh(layout.num_runs, 1)
    dataset = pgd.make_dataset(toy_log(), f.config)
    return spread.spread(program, layout, mesh), layout, dataset, program


def train(program, runs, dataset):
    """-> (state, metrics (R, rounds), validation), as one compiled call."""

    def whole(runs, dataset):
        state, metrics = pgd.fuse(program).round(runs, program.init(runs, dataset), dataset)
        return state, metrics, program.validate(runs, state, dataset)

    return jax.jit(whole)(runs, dataset)


def row(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


# --- Every run of a program is the run alone ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "synthetic, shared, sweep, models",
    [
        ("diffusion", True, "guidance 0 0.5", 1),
        ("diffusion", False, "guidance 0 0.5", 2),  # a model per seed, 1 < M < R
        ("diffusion", False, "p_mean -1.2 1.5 eta 0 4", 4),  # per seed and p_mean
        ("diffusion", False, "obs_noise 0.3 1", 4),  # which the sampler needs as well
        ("diffusion", False, "fit_lr 0.005 0.02", 4),  # M = R
        ("world-model", False, "penalty 0 2", 2),
        ("none", True, "hyper.alpha 0.5 2.5", 1),
    ],
)
def test_every_run_of_a_program_equals_that_run_alone(synthetic, shared, sweep, models):
    config = dataclasses.replace(
        SMALL, seed=3, num_seeds=2, fit_steps=5, fit_lr=0.01, ema=0.5, model_steps=10
    )
    hyper = {"alpha": 1.0} if "hyper" in sweep else {}
    f = given(
        config, hyper, synthetic=synthetic, shared_denoiser=shared, sweep=tuple(sweep.split())
    )
    program, layout, dataset, one = program_of(f)
    assert layout.num_models == models and layout.num_runs == len(layout.labels)
    state, metrics, said = train(program, layout.runs, dataset)
    rounds = (layout.num_runs, config.rounds)
    assert jax.tree.map(jnp.transpose, metrics)["return"].shape == rounds

    @jax.jit
    def alone(run, fit_run, dataset):
        """A run whose model is fitted with another's key, where it is shared."""
        model = pgd.State(one.init(fit_run, dataset).model, (), (), ())
        for _ in range(one.num_chunks):
            model, _ = one.fit(fit_run, model, dataset)
        state = one.init(run, dataset)._replace(model=model.model)
        state, metrics = jax.lax.scan(
            lambda state, _: one.round(run, state, dataset), state, None, config.rounds
        )
        return state, metrics, one.validate(run, state, dataset)

    common = {name: getattr(config, name) for name in flags.run_time_fields(f)}
    for i, label in enumerate(layout.labels):
        swept = {name: jnp.float32(x) for name, x in label.items() if name != "seed"}
        hyper = {name[6:]: x for name, x in swept.items() if name.startswith("hyper.")}
        own = {name: x for name, x in swept.items() if not name.startswith("hyper.")}
        settings = {name: jnp.float32(x) for name, x in common.items() if x} | own
        run = pgd.Run(jax.random.key(label["seed"]), settings, hyper)
        fit_run = run._replace(key=jax.random.key(0)) if shared else run
        state_alone, metrics_alone, said_alone = alone(run, fit_run, dataset)
        model = state.model if models == 1 else row(state.model, layout.runs.model_of[i])
        assert_close(model, state_alone.model, 5e-4)
        rest = lambda s: s._replace(model=())
        assert_close(row(rest(state), i), rest(state_alone), 1e-3)
        assert_close(metrics["return"][:, i], metrics_alone["return"], 1e-3)
        assert_close(row(said, i), said_alone, 2e-4)
    for values in (said[name] for name in said if "within" not in name):  # each its own
        assert len(set(np.round(values, 4).tolist())) == models
    last = np.asarray(metrics["return"])[-1]
    assert len(set(last.tolist())) == layout.num_runs
    many = jax.eval_shape(jax.jit(program.generate), layout.runs, state, dataset)
    assert many.reward.shape[0] == layout.num_runs


@pytest.mark.slow
def test_five_jobs_of_a_seed_give_what_one_job_of_five_seeds_gives():
    config = dataclasses.replace(SMALL, fit_steps=5, num_seeds=5)
    program, layout, dataset, _ = program_of(given(config))
    assert layout.num_models == 5
    many, metrics, said = train(program, layout.runs, dataset)
    job = given(dataclasses.replace(config, num_seeds=1))
    alone = None
    for seed in (0, 2, 4):
        job = given(dataclasses.replace(config, seed=seed, num_seeds=1))
        if alone is None:
            program, *_ = program_of(job)
            alone = jax.jit(lambda runs, dataset: train(program, runs, dataset))
        state, own, own_said = alone(lay_out(job).runs, dataset)
        assert_close(row(many.model, seed), state.model)
        rest = lambda s: s._replace(model=())
        assert_close(row(rest(many), seed), row(rest(state), 0), 2e-4)
        assert_close(metrics["return"][:, seed], own["return"][:, 0])
        assert_close(said["validation_loss"][seed], own_said["validation_loss"][0])


# --- Layouts: which runs there are, which models they need ---


def test_what_does_not_touch_the_fit_leaves_a_model_per_seed():
    count = lambda *sweep, **job: (
        lay_out(given(dataclasses.replace(SMALL, num_seeds=3), sweep=sweep, **job)).num_models
    )
    assert count() == count("guidance", "0", "1") == count("eta", "0", "1") == 3
    assert count("fit_lr", "0.001", "0.002") == 6
    assert count("guidance", "0", "1", shared_denoiser=True) == 1
    assert count("fit_lr", "0.001", "0.002", shared_denoiser=True) == 2
    assert count("penalty", "0", "1", synthetic="world-model") == 3
    assert count("penalty", "0", "1", synthetic="world-model", shared_denoiser=True) == 1
    assert count(synthetic="none") == 1


def test_labels_name_every_run_and_the_model_of_each():
    config = dataclasses.replace(SMALL, seed=5, num_seeds=2)
    layout = lay_out(given(config, sweep=tuple("p_mean -1 0 guidance 0 1".split())))
    labels = [
        {"p_mean": p, "guidance": g, "seed": s}
        for p in (-1.0, 0.0) for g in (0.0, 1.0) for s in (5, 6)
    ]  # fmt: skip
    assert layout.labels == labels
    assert layout.runs.model_of.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    np.testing.assert_array_equal(layout.runs.models.settings["p_mean"], [-1, -1, 0, 0])
    np.testing.assert_array_equal(layout.runs.each.settings["guidance"], [0, 0, 1, 1, 0, 0, 1, 1])
    key = lambda keys: jax.random.key_data(keys).tolist()
    seeds = jax.vmap(jax.random.key)(np.array([5, 6] * 4))
    assert key(layout.runs.each.key) == key(seeds) and key(layout.runs.models.key) == key(seeds[:4])
    shared = lay_out(given(config, shared_denoiser=True))
    assert key(shared.runs.models.key) == [key(jax.random.key(0))]


def test_a_grid_has_every_pair_of_values():
    points = flags.sweep_points(given(sweep=("guidance", "0", "1", "eta", "1", "4")))
    grid = [(p["guidance"], p["eta"]) for p in points]
    assert grid == [(0.0, 1.0), (0.0, 4.0), (1.0, 1.0), (1.0, 4.0)]
    assert flags.sweep_points(given()) == [{}]


@pytest.mark.parametrize(
    "words, said",
    [
        ("horizon 16 32", "is not a number to vary"),
        ("validation 0.1 0.2", "changes the log's split"),
        ("penalty 0 1", "does nothing here"),
        ("guidence 0 1", "is not a setting"),
        ("0 1", "wants a setting before its values"),
        ("guidance", "wants values"),
        ("guidance 1 1", "each once"),
        ("guidance 0 guidance 1", "named twice"),
        ("sigma-min 0.1 50", "--sigma-min must lie between"),
        ("obs-noise 0.01 1", "--sigma-max times --obs-noise must be at least 2"),
        ("sigma-max 0.1 40 obs-noise 50 100", "--sigma-max times --obs-noise must be at least 2"),
        ("fit-lr 0.1 -1", "--fit-lr must be above 0"),
        ("s-churn 0 80", "does nothing here"),  # that is Heun's
        ("guidance 0 inf", "must be finite"),
    ],
)
def test_a_sweep_that_cannot_work_says_so(words, said):
    with pytest.raises(UserError, match=said):
        flags.sweep_points(given(sweep=tuple(words.split())))


def test_settings_given_at_run_time_do_not_change_the_program():
    """So that another --guidance or --fit-lr finds its program in the compilation cache."""

    def text(**settings):
        program, layout, dataset, _ = program_of(given(dataclasses.replace(SMALL, **settings)))
        whole = lambda runs, state, dataset: (
            program.fit(runs, state, dataset), program.round(runs, state, dataset)
        )  # fmt: skip
        state = jax.eval_shape(program.init, layout.runs, dataset)
        return jax.jit(whole).lower(layout.runs, state, dataset).as_text()

    texts = {
        text(),
        text(guidance=2.0, eta=1.0, seed=7),
        text(fit_lr=1e-3, p_mean=-1.0, ema=0.9, obs_noise=0.5),
    }
    assert len(texts) == 1
    assert len(text(guidance=0.0)) < 0.98 * len(texts.pop())  # what is switched off is left out


# --- Evaluation ---


class Stub:
    """Environments that tell what they are given: the return is the start's seed, or the action."""

    low, high = np.full(2, -1.0), np.full(2, 1.0)

    def __init__(self, num):
        self.num, self.starts = num, []

    def reset(self, seed):
        self.starts.append(np.asarray(seed))
        self.obs = np.zeros((self.num, 3), np.float32)
        return self.obs

    def step(self, action):
        self.actions = np.asarray(action)
        end = np.ones(self.num, bool)
        return self.obs, self.actions.sum(-1), end, ~end


def host_evaluate(monkeypatch, f, **job):
    """-> (evaluate(round, agent_states) of the host's loop, Stub)."""
    stubs = []
    monkeypatch.setattr("data.make_envs", lambda name, num: stubs.append(Stub(num)) or stubs[-1])
    layout, dataset = lay_out(f), pgd.make_dataset(toy_log(), f.config)
    task = types.SimpleNamespace(simulator="stub")
    agent = types.SimpleNamespace(act=lambda state, obs: state + jnp.zeros((*obs.shape[:-1], 2)))
    mesh = spread.make_mesh(layout.num_runs, 1)
    session = cli.Session(
        f, task, dataset, agent, None, [{}], layout, mesh, job.get("in_program"), None
    )
    return cli.make_evaluate(session), stubs[0] if stubs else None


def test_host_evaluation_starts_depend_on_the_seed_and_the_round_alone(monkeypatch):
    sweep = ("guidance", "0", "1")
    f = given(dataclasses.replace(SMALL, seed=4, num_seeds=2), eval_episodes=3, sweep=sweep)
    run, envs = host_evaluate(monkeypatch, f)
    states = jnp.array([0.1, 0.2, 0.3, 0.4])
    returns = run(0, states), run(1, states), run(0, states)
    first, second, again = (s.reshape(4, 3) for s in envs.starts)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:2], first[2:])  # seeds start alike at each point
    assert not set(first.ravel()) & set(second.ravel())
    assert not set(first[0]) & set(first[1]) and len(set(first[0])) == 3
    np.testing.assert_allclose(returns[0], 2 * states, rtol=1e-5)  # of each run's own agent
    alone = given(dataclasses.replace(SMALL, seed=5), eval_episodes=3)
    run, envs = host_evaluate(monkeypatch, alone)
    run(0, states[:1])
    np.testing.assert_array_equal(envs.starts[0], first[1])


def test_evaluation_in_jax_has_the_keys_that_a_fused_run_has(monkeypatch):
    """The host's loop and the fused program see the same starts in every round."""
    in_program = lambda key, act: jax.random.uniform(key, (2,)) + 10.0 * act(jnp.zeros(3))[0]
    f = given(dataclasses.replace(SMALL, num_seeds=2, updates=1), eval_episodes=2)
    run, _ = host_evaluate(monkeypatch, f, in_program=in_program)
    told = []
    for seed in (0, 1):
        each = pgd.Run(jax.random.key(seed))
        for index in (0, 1):
            key = pgd.run_keys(each, index)[5]
            told.append(float(jax.random.uniform(key, (2,)).mean()) + 10.0 * 0.1 * (seed + 1))
    states = jnp.array([0.1, 0.2])
    ours = [run(0, states), run(1, states)]
    assert len({round(x, 3) for x in told}) == 4
    np.testing.assert_allclose(np.array(ours).T.ravel(), told, rtol=1e-5)


@pytest.mark.slow
def test_host_evaluation_of_a_seed_does_not_depend_on_its_neighbours(monkeypatch):
    def short_envs(*args):  # before chaos blows up the last bit
        made = envs.make_envs(*args)
        made.limit = 50
        return made

    monkeypatch.setattr("data.make_envs", short_envs)
    dataset = pgd.make_dataset(toy_log(obs_dim=17, act_dim=6), CONFIG)
    agent = agents.td3_bc(hidden=(8,))
    states = jax.vmap(lambda k: agent.init(k, 17, 6))(jax.random.split(jax.random.key(0), 2))
    task, mesh = types.SimpleNamespace(simulator="halfcheetah"), spread.make_mesh(1, 1)
    both = given(dataclasses.replace(SMALL, num_seeds=2), eval_episodes=2)
    second = given(dataclasses.replace(SMALL, seed=1), eval_episodes=2)
    of = lambda f: cli.make_evaluate(
        cli.Session(f, task, dataset, agent, None, [{}], lay_out(f), mesh, None, None)
    )
    returns = of(both)(0, states)
    alone = of(second)(0, row(states, slice(1, None)))
    assert returns.shape == (2,) and abs(returns[0] - returns[1]) > 1e-3
    np.testing.assert_allclose(returns[1], alone[0], rtol=1e-3)


# --- Devices ---


ON_DEVICES = """
import dataclasses, re, sys
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, "tests")
from test_spread import *

NUM = int(sys.argv[1])
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
assert len(jax.devices()) == NUM


def run(f, num_devices, batches=()):
    layout = lay_out(f)
    mesh = spread.make_mesh(layout.num_runs, num_devices, batches)
    program, layout, dataset, _ = program_of(f, mesh)
    session = types.SimpleNamespace(mesh=mesh, layout=layout)
    runs, dataset = spread.put(layout.runs, mesh), spread.put(dataset, mesh)
    init = lambda runs, _, dataset: program.init(runs, dataset)
    state = cli.compile_checked(session, init, runs, (), dataset)(runs, (), dataset)
    text = []
    for f in (program.fit, program.round):
        compiled = cli.compile_checked(session, f, runs, state, dataset)
        text.append(compiled.as_text())
        before = jax.tree.map(lambda x: x.sharding, state)
        state, metrics = compiled(runs, state, dataset)
        same = lambda x, s: x.sharding.is_equivalent_to(s, x.ndim)
        assert all(jax.tree.leaves(jax.tree.map(same, state, before)))
    found = [set(re.findall(COLLECTIVES, t)) for t in text]
    return mesh, found, state, metrics


config = dataclasses.replace(SMALL, fit_steps=5, rounds=1, updates=2, sample_steps=3)
half = NUM // 2


def check(name, f, num, shape, batches=(), tol=1e-4):
    mesh, found, many, metrics = run(f, num, batches)
    assert dict(mesh.shape) == shape, mesh.shape
    over = {len(x.sharding.device_set) for x in jax.tree.leaves(many)}
    assert over == {num}, over
    _, none, one, metrics_one = run(f, 1)
    assert none == [set(), set()]
    assert_close(many.model, one.model, tol)
    assert_close(many.agent, one.agent, 10 * tol)
    assert_close(metrics, metrics_one, 10 * tol)
    return found


for shared in (True, False) if NUM == 2 else ():
    # one model for all, or one for each of as many runs as devices
    f = given(dataclasses.replace(config, num_seeds=NUM), shared_denoiser=shared)
    found = check("seeds", f, NUM, {"run": NUM})
    assert found == [set(), set()], found
print("runs: as on one device, no collectives")

sweep = ("guidance", "0", "1")
f = given(dataclasses.replace(config, num_seeds=half), sweep=sweep)
assert lay_out(f).num_models == half
found = check("sweep", f, NUM, {"run": NUM})
assert found == [set(), set()], found
print("a sweep with a model per seed: as on one device, no collectives")

lone = dataclasses.replace(config, fit_batch=8 * NUM, sample_batch=8 * NUM, trajectories=8 * NUM)
found = check("batch", given(lone), NUM, {"batch": NUM}, (8 * NUM, 8 * NUM), 2e-3)
assert "all-reduce" in found[0] and found[1], found
print("one run, its batches split: as on one device")
"""


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 8])
def test_many_devices_give_what_one_gives(num):
    settings = f"--xla_force_host_platform_device_count={num} " + os.environ["XLA_FLAGS"]
    env = with_devices(XLA_FLAGS=settings)
    code = "import sys; sys.path.insert(0, 'tests'); import conftest\n" + ON_DEVICES
    ask = [sys.executable, "-c", code, str(num)]
    said = subprocess.run(ask, cwd=ROOT, env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]
    assert len(said.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    "runs, num, batches, shape",
    [
        (8, 4, (), {"run": 4}),
        (24, 8, (), {"run": 8}),
        (12, 4, (), {"run": 4}),
        (3, 8, (), {"run": 3}),
        (1, 8, (128, 128), {"batch": 8}),
        (2, 8, (128, 128), {"batch": 8}),
        (1, 8, (16, 128), {"batch": 2}),  # eight windows each are worth a device
        (1, 8, (128, 16), {"batch": 2}),
        (3, 8, (16, 16), {"run": 3}),
        (1, 6, (128, 128), {"batch": 4}),  # 128 does not divide over 5 or 6
        (1, 8, (15, 15), {"run": 1}),
        (2, 8, (), {"run": 2}),
    ],
)
def test_runs_divide_over_devices(monkeypatch, runs, num, batches, shape):
    some = [types.SimpleNamespace(id=i) for i in range(num)]
    monkeypatch.setattr(jax, "local_devices", lambda: some)
    monkeypatch.setattr(
        jax,
        "make_mesh",
        lambda sizes, axes, devices, axis_types: (dict(zip(axes, sizes)), devices),
    )
    made, used = spread.make_mesh(runs, 0, batches)
    assert made == shape and "run" not in shape or runs % shape["run"] == 0
    assert len({d.id for d in used}) == np.prod(list(made.values()))


CORES = """
import sys
import jax
from host import devices
devices.num_cores = lambda: 4
devices.one_device_per_core(*map(int, sys.argv[1:]))
print(jax.local_device_count())
devices.one_device_per_core(1)  # JAX has started: no effect, no error
"""


@pytest.mark.parametrize(
    "counts, chosen, num",
    [
        ((8,), {}, 4),
        ((6,), {}, 3),  # 6 runs do not divide over 4 cores
        ((6, 2), {}, 2),  # of 2 models, each fits on one device
        ((8, 1), {}, 1),  # one model: a second device would only fit it again
        ((5,), {}, 1),
        ((8,), {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, 2),
        ((8,), {"JAX_NUM_CPU_DEVICES": "3"}, 3),
    ],
)
def test_runs_share_the_cores_of_a_cpu(counts, chosen, num):
    env = with_devices(**{"XLA_FLAGS": ""} | chosen)
    ask = [sys.executable, "-c", CORES, *map(str, counts)]
    said = subprocess.run(ask, cwd=ROOT, env=env, capture_output=True, text=True)
    assert said.stdout == f"{num}\n", said.stderr[-1000:]


def test_a_container_has_the_cores_of_its_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert cores.num_cores() == 8
    for quota, num in [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)]:
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert cores.num_cores() == num


def test_a_mesh_that_does_not_divide_says_so(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: list(range(4)))
    with pytest.raises(UserError, match="6 runs .*do not divide over 4 devices.* 3$"):
        spread.make_mesh(6)
    with pytest.raises(UserError, match="more than this machine's 4"):
        spread.make_mesh(8, 16)


# --- Memory ---


def compiled_with(size):
    stats = types.SimpleNamespace(
        temp_size_in_bytes=size, output_size_in_bytes=700, alias_size_in_bytes=700
    )
    return types.SimpleNamespace(memory_analysis=lambda: stats)


def test_more_runs_than_memory_say_how_many_would_fit():
    spread.check_memory(compiled_with(8_000), 32, 8_000, 4)
    with pytest.raises(UserError, match="36 runs .*about 32 would fit"):
        spread.check_memory(compiled_with(9_000), 36, 8_000, 4)
    with pytest.raises(UserError, match="not one run fits"):
        spread.check_memory(compiled_with(9_000), 4, 1_000, 4)
    spread.check_memory(compiled_with(9_000), 10**9, None, 4)  # unknown: nothing is claimed


def test_needed_memory_is_what_a_program_makes_beside_its_arguments():
    """A matrix of 4 MB comes out, and beside it a product of 4 MB is held; what is written over a
    donated argument is no more."""
    x = jnp.ones((1000, 1000))
    need = lambda f, **kw: spread.needed_bytes(jax.jit(f, **kw).lower(x).compile())
    assert 7.9e6 < need(lambda x: jnp.sin(x @ x) @ x) < 12.1e6
    assert need(lambda x: x + 1.0) == pytest.approx(4e6, rel=0.01)
    assert need(lambda x: x + 1.0, donate_argnums=0) < 1e5


@pytest.mark.slow
def test_needed_memory_grows_with_the_number_of_runs():
    """So that what check_memory says would fit does."""
    used = {}
    for seeds in (2, 6):
        config = dataclasses.replace(
            SMALL, num_seeds=seeds, trajectories=256, sample_batch=128, updates=1, real_batch=16
        )
        program, layout, dataset, _ = program_of(given(config, synthetic="none"))
        state = jax.eval_shape(program.init, layout.runs, dataset)
        f = jax.jit(program.round, donate_argnums=1).lower(layout.runs, state, dataset)
        used[seeds] = spread.needed_bytes(f.compile())
    assert used[6] == pytest.approx(3 * used[2], rel=0.2)


@pytest.mark.slow
def test_a_program_that_does_not_fit_is_refused_before_it_runs(monkeypatch):
    program, layout, dataset, _ = program_of(given(dataclasses.replace(SMALL, num_seeds=2)))
    session = types.SimpleNamespace(mesh=spread.make_mesh(2, 1), layout=layout)
    init = lambda runs, _, dataset: program.init(runs, dataset)
    args = layout.runs, (), dataset
    monkeypatch.setattr(devices, "memory_per_device", lambda num: 1_000)
    with pytest.raises(UserError, match="2 runs .*not one run fits"):
        cli.compile_checked(session, init, *args)
    monkeypatch.setattr(devices, "memory_per_device", lambda num: 10**9)
    state = cli.compile_checked(session, init, *args)(*args)
    assert state.round.tolist() == [0, 0]


def test_memory_of_this_machine_is_known():
    here = devices.memory_per_device(1)
    if sys.platform == "linux":
        assert 1e8 < here < 1e14
        assert devices.memory_per_device(4) == pytest.approx(here / 4, rel=0.2)


@pytest.mark.parametrize(
    "kind, capability, expected",
    [("cpu", None, "float32"), ("gpu", "9.0", "bfloat16"), ("gpu", "7.5", "float32"),
     ("gpu", "10.0", "bfloat16"), ("tpu", None, "bfloat16"), ("gpu", "gfx90a", "float32")],
)  # fmt: skip
def test_precision_follows_the_hardware(monkeypatch, kind, capability, expected):
    device = types.SimpleNamespace(platform=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    dtype = lambda name: jnp.dtype(pgd.activation_dtype(pgd.Config(precision=name))).name
    assert dtype("auto") == expected
    assert dtype("float32") == "float32" and dtype("bfloat16") == "bfloat16"


# --- Hosts ---


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_two_hosts_find_each_other_by_the_variables_of_slurm_and_resume(tmp_path):
    """Without --coordinator; killed by SLURM's signal, the same command goes on."""
    both, hosts = tmp_path / "two", None
    flags = ["--distributed", "--num-seeds", "2", "--rounds", "80"]

    def start(*args):
        job = str(np.random.default_rng().integers(10**6))  # the port follows from it
        slurm = {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2",
                 "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2"}  # fmt: skip
        return [run_cli(*args, env=os.environ | slurm | {"SLURM_PROCID": str(i)}) for i in range(2)]

    hosts = start(*TINY, *flags, "--out", str(both))
    until = time.monotonic() + 300
    while len(list(both.glob("host*/metrics.csv"))) < 2 and time.monotonic() < until:
        assert all(h.poll() is None for h in hosts), [h.communicate() for h in hosts]
        time.sleep(0.05)
    for h in hosts:
        h.send_signal(signal.SIGTERM)
    answers = [h.communicate(timeout=60) for h in hosts]
    assert [h.returncode for h in hosts] == [143, 143], answers
    assert not (both / "final.json").exists()
    hosts = start("--distributed", "--resume", str(both))
    answers = [h.communicate(timeout=600) for h in hosts]
    assert [h.returncode for h in hosts] == [0, 0], answers
    assert json.loads((both / "final.json").read_text())["seeds"] == [0, 1]


@pytest.mark.slow
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


@pytest.mark.slow
def test_hosts_that_cannot_start_say_so_in_one_line(tmp_path):
    for argv, said in [
        (["--host", "1"], "need --distributed"),
        (["--distributed", "--host", "1"], "all three"),
        (["--distributed"], "did not find each other"),
    ]:
        run = run_cli(*TINY, *argv, "--out", str(tmp_path / "x"))
        _, wrong = run.communicate(timeout=120)
        lines = [line for line in wrong.splitlines() if line.startswith("pgd.py:")]
        assert run.returncode == 2 and len(lines) == 1 and said in lines[0], wrong
