"""Many runs in one program, spread over devices.

Seeds times sweep points are one axis of runs. Runs that fit the same model share it: a sweep of the
guidance fits one denoiser per seed, and --shared-denoiser one for all.

    layout = lay_out(seeds, points, fit_fields, shared)
    mesh = make_mesh(layout.num_runs, wanted=0)
    program = spread(make_program(config, agent), layout, mesh)
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pgd
from host.errors import UserError

SMALLEST_SHARE = 8  # trajectories per device that make it worth splitting a batch


class Runs(NamedTuple):
    """The first argument of a spread program."""

    each: pgd.Run  # (R,) runs; settings that all runs share are scalars
    models: pgd.Run  # (M,) runs whose keys and settings the models are fitted with
    model_of: Any  # (R,) index of each run's model


class Layout(NamedTuple):
    """Which runs there are, and which models they need."""

    runs: Runs
    axes: pgd.Run  # 0 for what each run has for itself, None for what all share
    labels: list[dict]  # swept settings and seed of each run
    models: list[dict]  # swept settings and seed of each model's fit

    @property
    def num_runs(self) -> int:
        return len(self.labels)

    @property
    def num_models(self) -> int:
        return len(self.models)


def lay_out(
    seeds: Sequence[int],
    points: Sequence[dict[str, float]],
    common: dict[str, float],
    fit_fields: Sequence[str],
    shared: bool,
) -> Layout:
    """Seeds, points of a sweep and settings that all runs share -> Layout.

    Names that begin with "hyper." are the agent's. fit_fields: settings that change a model.
    shared: the runs of all seeds use the model of seed 0.
    """
    labels = [{**point, "seed": seed} for point in points for seed in seeds]
    fitted_with = [name for name in points[0] if name in fit_fields]
    of = lambda label: (*(label[x] for x in fitted_with), 0 if shared else label["seed"])
    first: dict[tuple, dict] = {}  # of each model, the first run
    for label in labels:
        first.setdefault(of(label), label)
    index = {model: i for i, model in enumerate(first)}

    def make(labels: list[dict], keys: list[int]) -> pgd.Run:
        swept = {name: jnp.array([x[name] for x in labels], jnp.float32) for name in points[0]}
        shared_by_all = {name: jnp.float32(x) for name, x in common.items() if name not in swept}
        settings = {k: v for k, v in (shared_by_all | swept).items() if not k.startswith("hyper.")}
        hyper = {k[6:]: v for k, v in swept.items() if k.startswith("hyper.")}
        return pgd.Run(jax.vmap(jax.random.key)(np.array(keys)), settings, hyper)

    each = make(labels, [label["seed"] for label in labels])
    runs = Runs(
        each,
        make(list(first.values()), [model[-1] for model in first]),
        jnp.array([index[of(label)] for label in labels], jnp.int32),
    )
    settings = {name: 0 if name in points[0] else None for name in each.settings}
    axes = pgd.Run(0, settings, dict.fromkeys(each.hyper, 0))
    return Layout(runs, axes, labels, [dict(zip([*fitted_with, "seed"], x)) for x in first])


def make_mesh(num_runs: int, wanted: int = 0, batches: Sequence[int] = ()):
    """-> a mesh over this machine's devices, with the axis "run" or "batch".

    wanted: number of devices, 0 for all. batches: sizes of the denoiser's batches, if there is one.
    Every device holds the same number of runs. Where there are fewer runs than devices, the devices
    split the batches ("batch") if they can, and the others stay idle. Raises UserError where the
    runs do not divide over the devices.
    """
    devices = jax.local_devices()
    if wanted > len(devices):
        raise UserError(f"--devices {wanted} is more than this machine's {len(devices)}")
    num, axis = wanted or len(devices), "run"
    if num_runs < num:
        fair = lambda n: all(b % n == 0 and b // n >= SMALLEST_SHARE for b in batches)
        share = max((n for n in range(1, num + 1) if batches and fair(n)), default=1)
        num, axis = (share, "batch") if share > num_runs else (num_runs, "run")
    elif num_runs % num:
        fitting = max(n for n in range(1, num) if num_runs % n == 0)
        raise UserError(
            f"{num_runs} runs (seeds times sweep points) do not divide over {num} devices; choose "
            f"a multiple of {num}, or --devices {fitting}"
        )
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((num,), (axis,), devices=devices[:num], axis_types=auto)


def put(tree: Any, mesh, split: bool = False) -> Any:
    """Arrays -> the same on every device of the mesh, or split along their leading axis."""
    spec = jax.sharding.PartitionSpec(*mesh.axis_names if split else ())
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))


def over_runs(f, mesh, in_axes: tuple, num: int):
    """f of one run -> f of `num` runs: vmap, and each device works on its own runs.

    in_axes: for each argument a tree of 0 and None, as for jax.vmap. Results gain a leading axis.
    """
    many = jax.vmap(f, in_axes=in_axes)
    if mesh.axis_names != ("run",) or mesh.size == 1 or num % mesh.size:
        return many
    P = jax.sharding.PartitionSpec
    spec = lambda axis: P() if axis is None else P("run")
    specs = jax.tree.map(spec, in_axes, is_leaf=lambda x: x is None)
    return jax.shard_map(many, mesh=mesh, in_specs=specs, out_specs=P("run"), check_vma=False)


IN_FIT = -1  # State.round of a run whose model has diverged; of one that did in round r: -2 - r


def all_finite(tree: Any):
    """Arrays -> () bool: none of them holds NaN or infinity."""
    numbers = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in numbers]))


def select(condition, new: Any, old: Any) -> Any:
    """condition () -> the arrays of `new` if it holds, or else those of `old`."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def spread(program: pgd.Program, layout: Layout, mesh) -> pgd.Program:
    """The Program of one run -> the Program of all runs of the layout, which take a Runs first.

    States have a leading axis (R,), models one of (M,), or none where M is 1. Metrics have the axis
    (R,), those of the fit the models' axis. A run that diverges keeps its last sound agent, has a
    negative State.round and metrics of NaN from then on, and touches no other run.
    """
    num_runs, num_models, axes = layout.num_runs, layout.num_models, layout.axes
    bare = lambda model: pgd.State(model, (), (), ())
    only = lambda runs: jax.tree.map(lambda x: x[0] if x.ndim else x, runs)

    def of_models(f, *extra):
        """f(run, *args) -> f(runs, *args), over the models."""
        if num_models == 1:
            return lambda runs, *args: f(only(runs.models), *args)
        mapped = over_runs(f, mesh, (axes, *extra), num_models)
        return lambda runs, *args: mapped(runs.models, *args)

    def of_runs(f):
        """f(run, state, dataset) -> f(runs, state, dataset), over the runs."""
        model_axis = None if num_models == 1 else 0
        mapped = over_runs(f, mesh, (axes, pgd.State(model_axis, 0, 0, 0), None), num_runs)

        def g(runs, state, dataset):
            if 1 < num_models < num_runs:
                own = jax.tree.map(lambda x: x[runs.model_of], state.model)
                state = state._replace(model=own)
            return mapped(runs.each, state, dataset)

        return g

    def init(runs, dataset):
        model = of_models(lambda run, dataset: program.init(run, dataset).model, None)
        rest = over_runs(
            lambda run, dataset: program.init(run, dataset)._replace(model=()),
            mesh,
            (axes, None),
            num_runs,
        )
        return rest(runs.each, dataset)._replace(model=model(runs, dataset))

    def fit(runs, state, dataset):
        def one(run, model, dataset):
            new, metrics = program.fit(run, bare(model), dataset)
            sound = all_finite(metrics)
            return select(sound, new.model, model), sound, metrics

        model, sound, metrics = of_models(one, 0, None)(runs, state.model, dataset)
        if 1 < num_models < num_runs:  # else the runs and their models are in the same order
            sound = sound[runs.model_of]
        return state._replace(model=model, round=jnp.where(sound, state.round, IN_FIT)), metrics

    def run_round(runs, state, dataset):
        def one(run, state, dataset):
            new, metrics = program.round(run, state, dataset)
            alive = state.round >= 0
            sound = alive & all_finite((metrics, new.agent))
            index = jnp.where(alive, IN_FIT - 1 - state.round, state.round)
            new = new._replace(
                model=(),
                agent=select(sound, new.agent, state.agent),
                round=jnp.where(sound, new.round, index),
            )
            return new, jax.tree.map(lambda x: jnp.where(sound, x, jnp.nan), metrics)

        new, metrics = of_runs(one)(runs, state, dataset)
        return new._replace(model=state.model), metrics

    def validate(runs, state, dataset):
        one = lambda run, model, dataset: program.validate(run, bare(model), dataset)
        metrics = of_models(one, 0, None)(runs, state.model, dataset)
        each = lambda x: x[runs.model_of] if num_models > 1 else jnp.broadcast_to(x, num_runs)
        return jax.tree.map(each, metrics)

    return program._replace(
        init=init, fit=fit, round=run_round, generate=of_runs(program.generate), validate=validate
    )


# --- Memory: what a compiled program needs against what the device has ---


def needed_bytes(compiled) -> int:
    """Bytes that a compiled program allocates on each device, beside its arguments."""
    m = compiled.memory_analysis()
    return m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def check_memory(compiled, num_runs: int, available: int | None, num_devices: int) -> None:
    """Raise UserError where a compiled program needs more than `available` bytes on a device."""
    needed = needed_bytes(compiled)
    if available is None or needed <= available:
        return
    fits = math.floor(num_runs * available / needed) // num_devices * num_devices
    advice = f"about {fits:,} would fit: lower --num-seeds" if fits else "not one run fits"
    gb = lambda size: f"{size / 1e9:.3g} GB"
    raise UserError(
        f"{num_runs:,} runs (seeds times sweep points) need about {gb(needed)} on each device, "
        f"which has {gb(available)}; {advice}"
    )


def on(mesh):
    """-> a context in which programs are traced for this mesh, so that they can split batches."""
    if mesh.axis_names == ("batch",) and mesh.size > 1:
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    return contextlib.nullcontext()
