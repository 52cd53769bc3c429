"""The command line of pgd.py: a log and flags in, a run's folder out.

session = open_session(flags)         # log, data set on the devices, agent, layout of the runs
finished = train(session, folder)     # pgd.run with hooks that save, evaluate and show
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import agents
import data
import pgd
from baselines.behaviour import make_diffusion_with_clone
from baselines.log_alone import make_log_alone
from baselines.paper_guide import make_paper_guide
from baselines.world_model import Config, make_world_model
from host import collect, devices, envs, export, fitted, flags, hosts, run_folder, spread, track
from host.errors import UserError
from host.files import require, say
from host.flags import Flags
from host.progress import Progress, summary
from host.signals import leave, leave_on_signals, signals

# --- Open a session: everything that a run needs, built from its flags ---


class Session(NamedTuple):
    """Everything that a run needs."""

    flags: Flags
    task: data.Task  # its log is dropped once the devices have it
    dataset: pgd.Dataset  # on every device
    agent: Any  # agents.Agent
    make_generator: Callable  # (config) -> pgd.Generator
    points: list[dict[str, float]]  # of the sweep; [{}] without one
    layout: spread.Layout
    mesh: Any
    in_program: Callable | None  # evaluate(key, act) -> returns (E,), in JAX
    evaluate: Callable | None  # (round, agent_states) -> returns (R,)


def open_session(given: Flags) -> Session:
    """Check the flags, load the log, and put it on the devices. Raises UserError."""
    job, config = given.job, given.config
    flags.check(given)
    points = flags.sweep_points(given)
    flags.check_agent(given, points)
    check_export(given)
    track.check(job.track)
    if job.deterministic:
        devices.be_deterministic()
    num_runs = len(points) * config.num_seeds
    num_models = 1 if job.shared_denoiser else config.num_seeds  # or a multiple of it
    devices.one_device_per_core(num_runs, *([] if job.synthetic == "none" else [num_models]))
    check_machine(given)
    batches = (config.fit_batch, config.sample_batch) if job.synthetic == "diffusion" else ()
    mesh = spread.make_mesh(num_runs, job.devices, batches)
    name = job.env or (None if config.dataset_path else flags.DEFAULT_ENV)
    task = data.load(name, config.dataset_path, job.discrete_as_continuous, job.judge)
    if job.physics == "mjx" and task.simulator not in envs.BODIES:
        raise UserError(f"--physics mjx is for {', '.join(envs.BODIES)}, not for {task.name}")
    shift, scale = reward_units(job)
    log = task.log | {"rewards": (task.log["rewards"] + shift) * scale}
    dataset = pgd.make_dataset(log, config, task.action_low, task.action_high)
    del log
    flags.check_dataset(given, dataset, data.episode_returns(task.log)[1].max())
    task.release_log()
    agent = agents.make_agent(config.agent, **given.hyper)
    layout = lay_out(given, points)
    layout = layout._replace(runs=spread.put(layout.runs, mesh))
    dataset = spread.put(dataset, mesh)
    mjx = job.physics == "mjx" or (job.physics == "auto" and job.fused and envs.has_mjx())
    in_program = envs.evaluator_in_program(task.simulator, job.eval_episodes, mjx)
    maker = generator_maker(given, points)
    s = Session(given, task, dataset, agent, maker, points, layout, mesh, in_program, None)
    return s._replace(evaluate=make_evaluate(s))


def reward_units(job: flags.Job) -> tuple[float, float]:
    """-> (what is added to each reward of the log, the factor after that). Antmaze's rewards of 0
    and 1 become -1 and 0 unless the user says otherwise, as in IQL (2110.06169)."""
    if job.reward_shift is not None:
        return job.reward_shift, job.reward_scale
    task = job.env or ""
    antmaze = "antmaze" in task and not task.startswith("ogbench:")  # whose rewards are -1 and 0
    return -1.0 * antmaze, job.reward_scale


def check_machine(given: Flags) -> None:
    """Raise UserError where this machine cannot start JAX's devices, or MuJoCo."""
    try:
        devices.check_backend()
    except AssertionError as e:  # JAX's answer to JAX_PLATFORMS=cuda in a build without CUDA
        names = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"this build of JAX has no devices for JAX_PLATFORMS={names}; install one that has, or "
            "leave JAX_PLATFORMS unset"
        ) from e
    entry = data.resolve(given.job.env) if given.job.env else None
    in_mujoco = entry and entry.simulator and entry.simulator not in envs.GYMNAX
    if in_mujoco and importlib.util.find_spec("mujoco"):  # without it data.load goes on
        require("mujoco", "gymnasium[mujoco]")


def lay_out(given: Flags, points: list[dict[str, float]]) -> spread.Layout:
    """Seeds and points of the sweep -> the runs, their settings and the models they share."""
    config, synthetic = given.config, given.job.synthetic
    seeds = range(config.seed, config.seed + config.num_seeds)
    common = {name: getattr(config, name) for name in flags.run_time_fields(given)}
    common = {name: x for name, x in common.items() if x != 0}  # what is off is left out
    return spread.lay_out(
        seeds, points, common, flags.FIT_FIELDS[synthetic],
        given.job.shared_denoiser or synthetic == "none",
    )  # fmt: skip


def generator_maker(given: Flags, points: list[dict[str, float]]) -> Callable:
    """-> make_generator(config), the source of synthetic experience."""
    if given.job.synthetic == "world-model":
        return make_world_model
    if given.job.synthetic == "none":
        return make_log_alone
    rule = guidance_rule(given)
    weight = given.config.behaviour_guidance
    if any(point.get("behaviour_guidance", weight) for point in points):
        return functools.partial(make_diffusion_with_clone, cloner=agents.bc(), rule=rule)
    return functools.partial(pgd.make_diffusion, rule=rule)


def guidance_rule(given: Flags) -> Callable:
    """-> rule(terms, dataset, config), which makes a guide."""
    return {"density": pgd.make_guide, "paper": make_paper_guide}[given.job.guidance_rule]


def agent_maker(session: Session) -> Any:
    """-> the agent, or where its hyperparameters are swept, a function of them."""
    swept = [name for name in session.points[0] if name.startswith("hyper.")]
    given = session.flags
    if not swept:
        return session.agent
    return lambda **hyper: agents.make_agent(given.config.agent, **(given.hyper | hyper))


def make_evaluate(session: Session) -> Callable | None:
    """-> evaluate(round, agent_states (R, ...)) -> mean returns (R,), or None without a simulator.

    Seeds start alike at every point of a sweep. The tasks in JAX run as one compiled program, the
    others in the simulator's own physics on the host.
    """
    layout, dataset, agent = session.layout, session.dataset, session.agent
    episodes, num = session.flags.job.eval_episodes, session.layout.num_runs
    if session.in_program:

        def one(run, index, state, dataset):
            key = pgd.run_keys(run, index)[5]
            return jnp.mean(session.in_program(key, pgd.make_act(agent, state, dataset)))

        axes = (layout.axes, None, 0, None)
        compiled = jax.jit(spread.over_runs(one, session.mesh, axes, num))
        return lambda index, states: np.asarray(
            compiled(layout.runs.each, jnp.int32(index), states, dataset)
        )
    if not session.task.simulator:
        return None
    copies = data.make_envs(session.task.simulator, num * episodes)

    @jax.jit
    def act(states, obs):  # (R * episodes, O) -> (R * episodes, A)
        one = lambda state, obs: pgd.make_act(agent, state, dataset)(obs)
        action = jax.vmap(one)(states, obs.reshape(num, episodes, -1))
        return action.reshape(num * episodes, -1)

    def evaluate(index, states):
        entropy = [np.random.SeedSequence((label["seed"], index)) for label in layout.labels]
        starts = np.concatenate([e.generate_state(episodes) for e in entropy])
        returns = envs.evaluate_on_host(copies, functools.partial(act, states), starts)
        return returns.reshape(num, episodes).mean(-1)

    return evaluate


def check_export(given: Flags) -> None:
    """Raise UserError where an export would overwrite something, now and not after the run."""
    config = given.config
    if given.job.export:
        for seed in range(config.seed, config.seed + config.num_seeds):
            target = export.export_target(given.job.export, seed, config.num_seeds)
            export.refuse_existing_export(target)


# --- Train: pgd.run, with hooks that spread, check, save, evaluate and show ---


class Finished(NamedTuple):
    """What pgd.run leaves."""

    program: pgd.Program  # of all runs
    runs: spread.Runs
    state: pgd.State


def train(session: Session, folder: run_folder.RunFolder) -> Finished:
    """The whole run, from the folder's last checkpoint on."""
    config, fused = session.flags.config, session.flags.job.fused
    recorder = Recorder(session, folder)
    hooks = pgd.Hooks(
        functools.partial(spread_runs, session),
        functools.partial(compile_checked, session),
        recorder.restore,
        recorder.chunk,
        Finished,
    )
    args = agent_maker(session), hooks, session.make_generator
    with contextlib.closing(recorder.progress), contextlib.closing(recorder.tracker):
        return pgd.run(config, session.dataset, *args, session.in_program if fused else None)


def spread_runs(session: Session, program: pgd.Program, config: Config):
    """Program of one run -> (program of all runs, Runs), with --fused as a single round."""
    program = spread.spread(program, session.layout, session.mesh)
    return pgd.fuse(program) if session.flags.job.fused else program, session.layout.runs


def compile_checked(session: Session, f: Callable, runs, state, dataset) -> Callable:
    """f(runs, state, dataset) -> the same, compiled; UserError where it does not fit in memory."""
    settings = {}
    if session.mesh.size > 1 and state:  # every chunk leaves the state where it found it
        settings["out_shardings"] = (jax.tree.map(lambda x: x.sharding, state), None)
    with spread.on(session.mesh):
        compiled = jax.jit(f, donate_argnums=1, **settings).lower(runs, state, dataset).compile()
    available = devices.memory_per_device(session.mesh.size)
    share = session.mesh.size if session.mesh.axis_names == ("run",) else 1
    spread.check_memory(compiled, session.layout.num_runs, available, share)
    return compiled


class Recorder:
    """The hooks that save, evaluate and show."""

    def __init__(self, session: Session, folder: run_folder.RunFolder):
        self.session, self.folder = session, folder
        self.progress, self.fitted = Progress(), 0
        kind = session.flags.job.track
        self.tracker = track.make_tracker(kind, folder.path, folder.labels, settings_of(session))
        self.clock = time.monotonic()
        names = run_folder.DATASET
        folder.notes = {name: np.asarray(getattr(session.dataset, name)) for name in names}

    def restore(self, state: pgd.State) -> tuple[int, pgd.State]:
        """-> (chunks of the fit that are done, state): the last checkpoint, or the beginning."""
        self.fitted, state = self.folder.restore(state)
        self.folder.check_diverged("start it again with other settings")
        if self.folder.history:  # a kill may have torn the last line
            self.folder.write_metrics()
        path = self.session.flags.job.denoiser
        if path and self.fitted == 0:
            path, layout = Path(path), self.session.layout
            old = from_saved(run_folder.read_config(path)[0], path / "config.json")
            there = lay_out(old, flags.sweep_points(old)).models
            num_chunks = self.session.make_generator(self.session.flags.config).num_chunks
            state = fitted.take(state, path, num_chunks, layout.models, there)
            self.fitted = num_chunks
        say(f"run folder: {self.folder.path}")
        notes(self.session)
        self.clock = time.monotonic()
        return self.fitted, state

    def chunk(self, stage: str, done: int, total: int, state: pgd.State, metrics: dict) -> None:
        """After every chunk: check, evaluate, log, save and show."""
        fused = self.session.flags.job.fused
        name, now = "fused" if fused else stage, time.monotonic()
        seconds = self.folder.seconds
        seconds[name] = seconds.get(name, 0.0) + now - self.clock
        if stage == "fit":
            self.fitted = done
            model_of = np.asarray(self.session.layout.runs.model_of)
            of_runs = {name: np.ravel(x)[model_of] for name, x in metrics.items()}
            self.check_fit(done, of_runs["loss"])
            self.tracker.fit(done, of_runs)
        elif fused:
            self.fused_rounds(state, metrics)
        else:
            metrics = self.evaluated(done - 1, state, metrics)
            self.log(done - 1, metrics)
        self.progress(stage, done, total, summary(metrics))
        last = stage == "rounds" and done == total
        self.folder.save(self.fitted, state, force=last or bool(signals.wanted))
        if signals.wanted:
            leave(signals.wanted, f"interrupted and saved; --resume {self.folder.path} continues")
        signals.can_wait = not last
        self.clock = time.monotonic()

    def check_fit(self, chunk: int, loss: np.ndarray) -> None:
        """Mark the runs whose model has diverged; loss (R,), of each run's model."""
        for i in np.flatnonzero(~np.isfinite(loss)):
            self.folder.mark_diverged(int(i), f"the loss of the fit is not finite in chunk {chunk}")
        flag = "--fit-lr" if "diff" in self.session.flags.job.synthetic else "--model-lr"
        self.folder.check_diverged(f"lower {flag}")

    def evaluated(self, index: int, state: pgd.State, metrics: dict) -> dict:
        """Metrics of a round -> the same with the returns of its agents."""
        if self.session.evaluate is None:
            return metrics
        with self.folder.timed("evaluate"):
            returns = self.session.evaluate(index, state.agent)
        sound = np.asarray(state.round) >= 0
        return metrics | {"return": np.where(sound, returns, np.nan)}

    def fused_rounds(self, state: pgd.State, metrics: dict) -> None:
        """Log the rounds of a fused run; a simulator on the host judges the last one alone."""
        rounds = self.session.flags.config.rounds
        for index in range(rounds):
            row = {name: values[index] for name, values in metrics.items()}
            if index == rounds - 1 and "return" not in row:
                row = self.evaluated(index, state, row)
            self.log(index, row)

    def log(self, index: int, metrics: dict) -> None:
        """A row of metrics.csv for each run."""
        updates = (index + 1) * self.session.flags.config.updates
        self.tracker.rows(self.folder.log(index, updates, metrics, self.session.task.score))


# --- One run on this host: folder, results, export ---


def start(given: Flags) -> tuple[Session, run_folder.RunFolder]:
    """Flags of a new run or of --resume -> its session and its folder. Raises UserError."""
    began, fingerprint, job = time.monotonic(), None, given.job
    if job.resume:
        path = Path(job.resume)
        given, fingerprint = reopen(given)
    elif job.out:
        run_folder.refuse_existing(job.out)  # before minutes of loading
    session = open_session(given)
    task, config = session.task, given.config
    if job.denoiser and not job.resume:
        path = Path(job.denoiser)
        saved, of_models = run_folder.read_config(path)
        fitted.check(given, from_saved(saved, path / "config.json"), path)
        if of_models != task.fingerprint:
            raise UserError(f"the models in {path} were fitted on another log than {task.source}")
    if job.resume and fingerprint != task.fingerprint:
        raise UserError(f"the run was trained on another log than {task.source}")
    labels = session.layout.labels
    if job.resume:
        folder = run_folder.reopen(path, labels)
    else:
        names = task.name, config.agent, job.synthetic, config.seed
        path = Path(job.out) if job.out else run_folder.new_path(*names)
        folder = run_folder.create(path, settings_of(session), task, labels)
    folder.seconds["load"] = time.monotonic() - began
    return session, folder


def settings_of(session: Session) -> dict:
    """-> the settings that config.json keeps: those that give this very run again, anywhere."""
    given, task = session.flags, session.task
    settings = given.as_dict()
    path = given.config.dataset_path
    settings["dataset_path"] = path and os.path.abspath(os.path.expanduser(path))
    settings["denoiser"] = given.job.denoiser and os.path.abspath(given.job.denoiser)
    settings["env"] = task.load_name or given.job.env
    if given.job.export and not given.job.export.startswith("minari:"):
        settings["export"] = os.path.abspath(given.job.export)
    return settings


def reopen(given: Flags) -> tuple[Flags, str]:
    """--resume's flags -> (the run's own, but for those of this machine and the export; the
    fingerprint of its log)."""
    path = Path(given.job.resume)
    saved, fingerprint = run_folder.read_config(path)
    old = from_saved(saved, path / "config.json")
    here = {name: getattr(given.job, name) for name in (*flags.HERE_ONLY, "resume")}
    # A folder that came from elsewhere names no place to write to: only the command line does
    here |= {"export": given.job.export}
    if given.job.judge != old.job.judge:  # nor code to import
        own = old.job.judge
        again = (
            f"give --judge {own} again, which imports its module" if own else "leave out --judge"
        )
        raise UserError(f"{path} is judged by {own or 'no environment of your own'}; {again}")
    if given.job.export:
        here |= {"export_steps": given.job.export_steps}
    elif old.job.export and not (path / "final.json").exists():
        say(f"note: the run began with --export {old.job.export}; give --export again to write it")
    config = old.config
    if given.config.dataset_path:  # the log has moved
        config = dataclasses.replace(config, dataset_path=given.config.dataset_path)
    return old._replace(config=config, job=dataclasses.replace(old.job, **here)), fingerprint


def from_saved(saved: dict, path: Path) -> Flags:
    """config.json's settings -> Flags. Raises UserError, naming the field, where they are another
    version's or cannot be."""
    if not isinstance(saved, dict):
        raise UserError(f"{path} is damaged; start the run again")
    hyper = saved.pop("hyper", {})
    known = {f.name for cls in (flags.Job, Config) for f in dataclasses.fields(cls)}
    if differ := sorted(set(saved) ^ known):
        field = f"it has {differ[0]}" if differ[0] in saved else f"it lacks {differ[0]}"
        raise UserError(f"{path} is of another version of this program: {field}")
    if wrong := flags.misfit(saved, hyper):
        raise UserError(f"{path} is damaged: {wrong}; restore it")
    given = flags.from_values(saved, hyper)
    flags.check(given)
    return given


def notes(session: Session) -> None:
    """Say what the user may not expect of this run."""
    job, config = session.flags.job, session.flags.config
    if job.preset == "default" and not job.resume and jax.default_backend() == "cpu":
        if config.features >= flags.PRESETS["default-large"]["features"]:
            say("note: this run is sized for a GPU; on this CPU, use --preset laptop")
    if job.reward_shift is None and reward_units(job)[0]:
        say(
            "note: 1 is taken from every reward, as is usual for antmaze; --reward-shift 0 does not"
        )
    guided = config.guidance or config.value_guidance or config.behaviour_guidance
    if config.rounds == 1 and guided and job.synthetic == "diffusion":
        say("note: round 0 is never guided, since its policy is untrained; with --rounds 1 the "
            "guidance has no effect")  # fmt: skip
    if job.fused and not job.resume:
        say("note: a fused run compiles and runs as one program, without progress")


def run_here(given: Flags) -> dict:
    """One whole run -> the content of final.json. Raises UserError for a user's mistake."""
    session, folder = start(given)
    with contextlib.closing(folder):
        try:
            done = train(session, folder)
        except UserError:
            if not given.job.resume:
                folder.remove_if_empty()
            raise
        validation = validate(session, done)
        written = export_all(session, done) if session.flags.job.export else []
        final = finish(session, folder, validation)
        for target in written:
            print(f"exported: {target}")
        return final


def validate(session: Session, done: Finished) -> dict[str, np.ndarray]:
    """-> {metric: (R,)} of the models on held-out episodes."""
    metrics = jax.jit(done.program.validate)(done.runs, done.state, session.dataset)
    return {name: np.asarray(x) for name, x in metrics.items()}


def describe(session: Session) -> run_folder.About:
    """-> what the results are of."""
    job, config, task = session.flags.job, session.flags.config, session.task
    score = None if task.reference is None else float(task.score(task.behaviour_return))
    denoisers = None
    if job.synthetic != "none":
        what = "denoiser" if job.synthetic == "diffusion" else "ensemble"
        many = "one per seed" if not job.shared_denoiser else f"the {what} of seed 0 for all seeds"
        denoisers = many if config.num_seeds > 1 or job.shared_denoiser else None
    guidance = config.guidance if job.synthetic == "diffusion" else None
    shift, scale = reward_units(job)
    rewards = None if (shift, scale) == (0, 1) else f"(reward {shift:+g}) x {scale:g}"
    compared = job.synthetic != "none" and not job.sweep
    settings = session.flags.as_dict()
    return run_folder.About(
        task.name, config.agent, job.synthetic, score, task.behaviour_return, task.source, guidance,
        job.preset, denoisers, session.flags.hyper, rewards,
        run_folder.log_alone(settings, task.source) if compared else None,
    )  # fmt: skip


def finish(session: Session, folder: run_folder.RunFolder, validation: dict) -> dict:
    """Write final.json and the figures, and print the table -> the content of final.json."""
    about, lost = describe(session), folder.diverged
    final = run_folder.summarise(folder.history, folder.labels, about, validation, lost)
    return write_results(folder, final)


def write_results(folder: run_folder.RunFolder, final: dict, quiet: bool = False) -> dict:
    """final.json without wall times -> with them; write it, draw the figures, print the table."""
    from studies import figures

    final = final | {"wall_seconds": {k: round(v, 1) for k, v in folder.seconds.items()}}
    drawn = figures.draw_run(folder.path, folder.history, final)
    run_folder.write_json(folder.path / "final.json", final)
    if not quiet:
        print(run_folder.table(final))
        names = ", ".join(["final.json", "metrics.csv", *drawn, "checkpoint/"])
        print(f"\nsaved: {folder.path}/ ({names})")
    return final


# --- Export synthetic data ---


def export_all(session: Session, done: Finished) -> list[str]:
    """Write synthetic data under each seed's final policy -> the files written, one per seed.

    Whole rounds of trajectories are generated until each seed has --export-steps transitions.
    """
    job, config, dataset = session.flags.job, session.flags.config, session.dataset
    seeds = range(config.seed, config.seed + config.num_seeds)
    length = session.make_generator(config).length
    shift, scale = reward_units(job)
    sound = np.asarray(done.state.round) >= 0  # runs that have not diverged
    generate = jax.jit(done.program.generate)
    logs, rows, state = [[] for _ in seeds], 0, done.state
    with tqdm(total=job.export_steps, desc="export", unit=" steps", disable=None) as bar:
        while rows < job.export_steps:
            made = jax.tree.map(np.asarray, generate(done.runs, state, dataset))
            for i, parts in enumerate(logs):
                one = jax.tree.map(lambda x, i=i: x[i], made)
                parts.append(transitions_to_log(one, length, dataset))
            rows = min(
                sum(len(part["rewards"]) for part in parts) for parts in compress(logs, sound)
            )
            state = state._replace(round=state.round + 1)  # other keys
            bar.update(min(rows, job.export_steps) - bar.n)
    written = []
    for seed, parts in compress(zip(seeds, logs), sound):
        log = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        log["rewards"] = log["rewards"] / scale - shift  # in the log's own units
        target = export.export_target(job.export, seed, len(seeds))
        export.export(target, log, session.task, provenance(session, seed))
        written.append(target)
    return written


def provenance(session: Session, seed: int) -> str:
    """One line about exported data."""
    config = session.flags.config
    how = f"world model, penalty {config.penalty:g}"
    if session.flags.job.synthetic == "diffusion":
        weights = {
            "guidance": config.guidance,
            "value guidance": config.value_guidance,
            "behaviour guidance": config.behaviour_guidance,
        }
        how = ", ".join(f"{name} {w:g}" for name, w in weights.items() if w) or "unguided"
        how += ", starting in logged states" * config.condition_on_start
    return f"synthetic, {how}, {config.agent} seed {seed}, trained on {session.task.source}"


def transitions_to_log(t: pgd.Transition, length: int, dataset) -> dict[str, np.ndarray]:
    """Transitions (S * length, ...), trajectories end to end -> a log in D4RL's layout and the
    environment's units, with next_observations.

    A trajectory ends at its first terminal, or by a time-out at the last step that continues it.
    """
    t = jax.tree.map(lambda x: np.asarray(x).reshape(-1, length, *x.shape[1:]), t)
    done = t.done > 0
    goes_on = ~done[:, :-1] & np.all(t.obs[:, 1:] == t.next_obs[:, :-1], axis=-1)
    keep = np.cumprod(np.pad(goes_on, ((0, 0), (1, 0)), constant_values=True), axis=1) > 0
    last = keep & (np.cumsum(keep, axis=1) == keep.sum(1, keepdims=True))
    mean, std = (np.asarray(x[: dataset.obs_dim]) for x in (dataset.mean, dataset.std))
    return {
        "observations": t.obs[keep] * std + mean,
        "actions": np.asarray(dataset.unscale_action(t.action[keep])),
        "rewards": t.reward[keep],
        "terminals": done[keep],
        "timeouts": (last & ~done)[keep],
        "next_observations": t.next_obs[keep] * std + mean,
    }


# --- Several hosts, each with its share of the seeds ---


def run_on_hosts(given: Flags) -> dict:
    """This host's share of the seeds, in OUT/host0, OUT/host1, ...; host 0 puts the results of all
    into OUT. If one host fails, all stop."""
    job, config = given.job, given.config
    flags.check(given)
    hosts.start_hosts(job.coordinator, job.num_hosts, job.host)
    num, index = jax.process_count(), jax.process_index()
    name = config.dataset_path and Path(config.dataset_path).stem
    default = name or job.env or flags.DEFAULT_ENV, config.agent, job.synthetic, config.seed
    out = job.resume or job.out or (str(run_folder.new_path(*default)) if index == 0 else None)
    out = hosts.gather(out)[0]
    share, rest = divmod(config.num_seeds, num)
    if job.resume:
        before = len(list(Path(out).glob("host*")))
        if index == 0 and before not in (0, num):
            raise UserError(f"{out} is of {before} hosts, not of {num}")
        job = dataclasses.replace(job, resume=f"{out}/host{index}")
    elif rest:
        raise UserError(f"--num-seeds {config.num_seeds} does not divide over {num} hosts")
    else:
        config = dataclasses.replace(config, seed=config.seed + index * share, num_seeds=share)
        # The share of a host is a run like another, whose seeds need not divide again
        job = dataclasses.replace(job, out=f"{out}/host{index}", num_hosts=None)
    try:
        if not job.resume and index == 0:
            run_folder.refuse_existing(out)
        session, folder = start(given._replace(job=job, config=config))
        validation = validate(session, train(session, folder))
    except Exception as e:
        hosts.gather({"error": str(e)})
        raise
    own = {
        "labels": folder.labels,
        "history": folder.history,
        "diverged": list(folder.diverged.items()),
        "seconds": folder.seconds,
        "validation": {k: v.tolist() for k, v in validation.items()},
    }
    every = hosts.gather(own)
    for i, said in enumerate(every):
        if "error" in said:
            finish(session, folder, validation)  # the others' work is not lost
            raise UserError(f"host {i} stopped: {said['error']}")
    return finish_with_others(session, folder, validation, every, index)


def finish_with_others(session: Session, folder, validation, every: list[dict], index: int) -> dict:
    """This host's results into its folder; host 0 puts those of all hosts beside the folders."""
    about, lost = describe(session), folder.diverged
    final = run_folder.summarise(folder.history, folder.labels, about, validation, lost)
    final = write_results(folder, final, quiet=True)
    if index != 0:
        print(f"saved: {folder.path}/; host 0 has the table of all")
        return final
    points = session.points
    labels = [label for point in points for host in every for label in host["labels"]
              if point.items() <= label.items()]  # fmt: skip
    whole = run_folder.RunFolder(folder.path.parent, labels)
    place = {tuple(label.items()): i for i, label in enumerate(labels)}
    of = lambda row: place[tuple((name, row[name]) for name in labels[0])]
    rows = [row for host in every for row in host["history"]]
    whole.history = sorted(rows, key=lambda row: (row["round"], of(row)))
    for host in every:
        for i, what in host["diverged"]:
            whole.diverged[place[tuple(host["labels"][i].items())]] = what
        for stage, seconds in host["seconds"].items():
            whole.seconds[stage] = max(seconds, whole.seconds.get(stage, 0.0))
    found = {
        tuple(label.items()): {name: host["validation"][name][i] for name in validation}
        for host in every
        for i, label in enumerate(host["labels"])
    }
    all_validation = {
        name: np.array([found[tuple(label.items())][name] for label in labels])
        for name in validation
    }
    whole.write_metrics()
    about = about._replace(denoisers=about.denoisers or "one per seed")
    lost = whole.diverged
    final = run_folder.summarise(whole.history, labels, about, all_validation, lost)
    return write_results(whole, final)


# --- Load a run ---


class Loaded(NamedTuple):
    """A finished run; see Session for its parts."""

    session: Session
    program: pgd.Program  # of all runs
    state: pgd.State  # agent, buffer and round have a leading axis (R,); see model()

    @property
    def dataset(self) -> pgd.Dataset:
        return self.session.dataset

    @property
    def config(self) -> Config:
        return self.session.flags.config

    def model(self, index: int = 0) -> Any:
        """-> the state of the model of run `index`: of a diffusion model, a DenoiserState."""
        layout = self.session.layout
        if layout.num_models == 1:
            return self.state.model
        i = int(layout.runs.model_of[index])
        return jax.tree.map(lambda x: x[i], self.state.model)

    def agent_state(self, index: int = 0) -> Any:
        """-> the agent's state of run `index`."""
        return jax.tree.map(lambda x: x[index], self.state.agent)


def load_run(path: str | Path) -> Loaded:
    """A finished run's folder -> Loaded, on one device. Raises UserError."""
    saved, fingerprint = run_folder.read_config(path)
    given = from_saved(saved, Path(path) / "config.json")
    if given.job.judge:
        raise UserError(
            f"{path} is judged by {given.job.judge}; code that a folder names is not run"
        )
    job = dataclasses.replace(given.job, export=None, devices=1, distributed=False, track="none")
    session = open_session(given._replace(job=job))
    if fingerprint != session.task.fingerprint:
        raise UserError(f"{path} was trained on another log than {session.task.source}")
    make = agent_maker(session), session.make_generator
    program = spread.spread(pgd.make_program(given.config, *make), session.layout, session.mesh)
    state = jax.jit(program.init)(session.layout.runs, session.dataset)
    _, state = run_folder.RunFolder(Path(path), session.layout.labels).restore(state)
    if int(np.max(state.round)) < given.config.rounds:
        raise UserError(f"{path} is not a finished run; --resume {path} finishes it")
    return Loaded(session, program, state)


# --- Main ---


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Exit status 0 is only for a finished run or --help, 2 for a user's mistake,
    3 where some runs have diverged, 128 + N for signal N, such as 130 for Ctrl-C, and 141 where the
    reader of an unfinished run's output has gone."""
    alone, argv = argv is None, sys.argv[1:] if argv is None else argv
    if alone:
        leave_on_signals()
    unfinished = False
    try:
        given = flags.parse(argv)
        unfinished = True
        if given.job.offline:
            os.environ["PGD_OFFLINE"] = "1"
        devices.enable_cache(collect.cache_dir() / "compiled")
        final = (run_on_hosts if given.job.distributed else run_here)(given)
        unfinished = False
        sys.stdout.flush()
        if final["diverged"]:
            sys.exit(3)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141 if unfinished else 0)
    except (UserError, OSError, MemoryError) as e:
        print(f"pgd.py: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
