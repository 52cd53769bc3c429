"""Flags of `python pgd.py`: what there is, what was given, and whether it can work."""

import argparse
import dataclasses
import difflib
import inspect
import itertools
import math
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import agents
import data
from baselines.world_model import Config
from host import envs
from host.errors import UserError

DEFAULT_ENV = "pendulum-random"
Synthetic = Literal["diffusion", "world-model", "none"]
Preset = Literal["default", "smoke", "laptop", "paper"]


@dataclasses.dataclass(frozen=True)
class Job:
    # --- Task ---
    env: str | None = None  # task, such as hopper-medium or minari:NAME; else pendulum-random
    discrete_as_continuous: bool = False  # take actions that are integers 0, 1, 2, ... for numbers
    reward_shift: float | None = None  # added to each reward; by default -1 for antmaze, else 0
    reward_scale: float = 1.0  # factor of each reward, after the shift; scores are not changed
    synthetic: Synthetic = "diffusion"  # source of synthetic data; none: the log
    preset: Preset = "default"  # default values; see docs/presets.md
    sweep: tuple[str, ...] = ()  # settings and values: guidance 0 1 eta 1 8 makes four points
    offline: bool = False  # download nothing: a log is on this machine, or is collected here
    denoiser: str | None = None  # folder of a run whose fitted models are used, instead of a fit
    shared_denoiser: bool = False  # one denoiser, that of seed 0, for all seeds
    fused: bool = False  # the whole run as one compiled program, without progress
    # --- Guidance ---
    guidance_rule: Literal["density", "paper"] = "density"  # how scores guide; see docs/guides.md
    # --- Evaluation ---
    eval_episodes: int = 10  # episodes per seed and evaluation
    physics: Literal["auto", "c", "mjx"] = (
        "auto"  # MuJoCo's engine; mjx is JAX; auto: mjx with --fused
    )
    judge: str | None = None  # your own environment that evaluates: MODULE:EnvId-v0
    # --- Run folder ---
    out: str | None = None  # folder of the run; by default runs/TASK-AGENT-SOURCE-SEED-TIME
    resume: str | None = None  # folder of a run to continue, under that run's own settings
    export: str | None = None  # target of synthetic data: FILE.hdf5, FILE.npz or minari:NAME
    export_steps: int = 100_000  # smallest number of transitions to export per seed
    track: Literal["none", "tensorboard", "wandb"] = "none"  # also shows the metrics there
    # --- Devices and hosts ---
    deterministic: bool = False  # on a GPU, only operations that give the same digits every time
    devices: int = 0  # number of this machine's devices to use; 0 means all
    distributed: bool = False  # this process is one of several hosts that share the seeds
    coordinator: str | None = None  # ADDRESS:PORT of host 0; detected on TPU and SLURM
    num_hosts: int | None = None  # number of hosts
    host: int | None = None  # index of this host, from 0


class Flags(NamedTuple):
    """All settings of a run."""

    job: Job
    config: Config
    hyper: dict[str, Any]  # the agent's hyperparameters

    def as_dict(self) -> dict[str, Any]:
        """-> {setting: value}, as config.json has them."""
        both = dataclasses.asdict(self.job) | dataclasses.asdict(self.config)
        return both | {"hyper": self.hyper}


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},  # for the small gymnax tasks; larger tasks get default-large instead
    "default-large": dict(
        horizon=32, features=256, blocks=6, fit_steps=100_000, fit_batch=128, sigma_max=160.0,
        rounds=100, updates=5_000, trajectories=8_192, sample_batch=1_024,
    ),
    "smoke": dict(
        features=16, blocks=1, fit_steps=200, fit_batch=16, sample_steps=8, rounds=2, updates=50,
        trajectories=64, sample_batch=64, model_steps=200, model_chunk=50, eval_episodes=4,
    ),
    "laptop": dict(
        horizon=32, features=128, fit_steps=5_000, fit_batch=64, sigma_max=160.0, rounds=8,
        updates=5_000, trajectories=1_024, sample_batch=128,
    ),
    "paper": dict(
        horizon=32, features=1_024, levels=3, blocks=1, fit_steps=1_000_000, fit_batch=32,
        ema=0.9995, p_mean=-1.2, p_std=1.2, obs_noise=1.0, sampler="heun", sample_steps=256,
        sigma_min=0.002, sigma_max=80.0, rho=7.0, guidance=1.0, guidance_rule="paper", rounds=100,
        updates=10_000, trajectories=8_192, sample_batch=256,
    ),
}  # fmt: skip
GUIDANCE = {"iql": 4.0, "awac": 4.0}  # of agents that clone actions, weighted by their advantage

# --- What there is: fields of the two dataclasses, with the comments that explain them ---


class Flag(NamedTuple):
    """One flag of the command line."""

    name: str  # the field's
    group: str
    type: Any
    default: Any
    help: str


def flags_of(cls) -> Iterator[Flag]:
    """A dataclass whose source has banners and a comment per field -> its own Flags."""
    kinds, group = typing.get_type_hints(cls), ""
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    line = r"^    (?:# --- (.*) ---|(\w+): .*? = (?:\(\s+)?[^#\n]*  # (.*))$"
    for banner, name, text in re.findall(line, inspect.getsource(cls), re.M):
        group = banner or group
        if name:
            yield Flag(name, group, kinds[name], defaults[name], text)


def all_flags() -> list[Flag]:
    """-> every flag but the agent's hyperparameters, in the order of --help."""
    import pgd

    return [*flags_of(Job), *flags_of(pgd.Config), *flags_of(Config)]


def plain_type(kind: Any) -> Any:
    """int | None -> int, and the like."""
    options = [t for t in typing.get_args(kind) if t is not type(None)]
    return options[0] if len(options) == 1 and typing.get_origin(kind) is not tuple else kind


def dashed(name: str) -> str:
    """The name of a field -> its flag."""
    return f"--{name.replace('_', '-')}"


# --- What was given: command line -> Flags ---


NEGATIVE = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
KINDS = {"int": "an integer", "float": "a number"}


class Parser(argparse.ArgumentParser):
    """Mistakes are a UserError, and only flags that were given are in the result."""

    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self._negative_number_matcher = NEGATIVE  # argparse's own does not know -1e-3
        for flag in all_flags():
            names = dict.fromkeys([dashed(flag.name), f"--{flag.name}"])
            kind = plain_type(flag.type)
            if kind is bool:
                self.add_argument(*names, action=argparse.BooleanOptionalAction, dest=flag.name)
            elif typing.get_origin(kind) is tuple:
                self.add_argument(*names, nargs="*", dest=flag.name)
            elif typing.get_origin(kind) is Literal:
                choices = typing.get_args(kind)
                of = type(choices[0])
                self.add_argument(*names, type=of, choices=choices, dest=flag.name)
            else:
                self.add_argument(*names, type=kind, dest=flag.name)
        hyper = {name for agent in agents.AGENTS for name in agents.hyperparameters(agent)}
        for name in sorted(hyper):
            names = dict.fromkeys([f"--hyper.{name.replace('_', '-')}", f"--hyper.{name}"])
            self.add_argument(*names, nargs="+", dest=f"hyper.{name}")
        self.add_argument("--help", "-h", "--help-all", nargs=0, action=Help)

    def error(self, message: str):
        raise UserError(self.plainly(message))

    def plainly(self, message: str) -> str:
        """argparse's message -> one for a person."""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            name = unknown[1].split("=")[0]
            if not name.startswith("-"):
                return f"there is nothing to do with {name!r}; every setting has a flag, see --help"
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(name, known, n=1)
            return f"there is no flag {name}; " + (
                f"did you mean {near[0]}?" if near else "--help lists the flags"
            )
        flag, text = re.match(r"(?:argument ([^/:]+)[^:]*: )?(.*)", message).groups()
        if found := re.match(r"invalid (int|float) value: (.*)", text):
            return f"{flag} needs {KINDS[found[1]]}, not {found[2]}"
        if found := re.match(r"invalid choice: (\S+) \(choose from (.*)\)", text):
            return f"{flag} must be one of {found[2]}, not {found[1]}".replace("'", "")
        if text.startswith("ignored explicit argument"):
            return f"{flag} takes no value"
        return f"{flag} needs a value" if text.startswith("expected") else message


class Help(argparse.Action):
    """--help or --help-all: print the flags and exit."""

    def __call__(self, parser, namespace, values, option_string=None):
        agent = getattr(namespace, "agent", Config.agent)
        print(help_text(agent, everything=option_string == "--help-all"), flush=True)
        parser.exit()


SHORT = ("Task", "Run", "Guidance", "Agent loop", "Evaluation", "Run folder", "Devices and hosts")


def help_text(agent: str = Config.agent, everything: bool = False) -> str:
    """-> the flags by group, a line each: the groups that most runs need, or every group."""
    lines = ["usage: python pgd.py [--FLAG VALUE ...]", ""]
    lines += ["Policy-guided diffusion for offline reinforcement learning; see README.md."]
    lines += [
        "The defaults are those of the small gymnax tasks; larger tasks and --preset have others."
    ]
    own = {"guidance": guidance_of(agent)}
    flags = [f._replace(default=own.get(f.name, f.default)) for f in all_flags()]
    groups = dict.fromkeys([*SHORT, *(flag.group for flag in flags)] if everything else SHORT)
    for group in groups:
        lines += ["", f"{group}:"]
        lines += [flag_line(flag) for flag in flags if flag.group == group]
    agent = agent if agent in agents.AGENTS else Config.agent
    lines += ["", f"Hyperparameters of {agent}; `python agents.py` lists those of every agent:"]
    for name, h in agents.hyperparameters(agent).items():
        lines.append(f"  {dashed('hyper.' + name):<24} {h.help} (default {shown(h.default)})")
    if not everything:
        others = dict.fromkeys(flag.group.lower() for flag in flags if flag.group not in SHORT)
        lines += ["", f"--help-all adds: {', '.join(others)}."]
    return "\n".join(lines)


def flag_line(flag: Flag) -> str:
    """A Flag -> its line of --help."""
    kind, notes = plain_type(flag.type), []
    if not (flag.default is None or flag.default is False or flag.default == ()):
        notes.append(f"default {shown(flag.default)}")
    if typing.get_origin(kind) is Literal:
        notes.append(f"or {', '.join(str(x) for x in typing.get_args(kind) if x != flag.default)}")
    return f"  {dashed(flag.name):<24} {flag.help}" + (f" ({'; '.join(notes)})" if notes else "")


def shown(value: Any) -> str:
    """A value -> the way it is typed on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


HERE_ONLY = (  # not part of a run
    "devices", "distributed", "coordinator", "num_hosts", "host", "offline", "track",
)  # fmt: skip
WITH_RESUME = {"resume", "export", "export_steps", "dataset_path", "judge", *HERE_ONLY}


def parse(argv: Sequence[str]) -> Flags:
    """Command line -> Flags: the preset's values over the defaults, given flags over both.

    The agent's hyperparameters are those published for the data set, where there are any. Raises
    UserError for flags that are unknown or malformed.
    """
    given = vars(Parser().parse_args(argv))
    if given.get("sweep") == []:
        raise UserError("--sweep needs a setting, without dashes, and its values: guidance 0 0.5 1")
    if "resume" in given and set(given) - WITH_RESUME:
        wrong = dashed(sorted(set(given) - WITH_RESUME)[0])
        raise UserError(
            f"--resume takes no {wrong}: a run continues under its own settings; only --export, "
            "--export-steps, --dataset-path of a log that has moved, --track, --offline, --devices "
            "and the flags of the hosts may change; --judge is given again"
        )
    name = given.get("env") or ("" if "dataset_path" in given else DEFAULT_ENV)
    entry = data.resolve(name) if name else None
    if entry and "env" in given:
        given["env"] = name if ":" in name else entry.name
    preset = given.get("preset", "default")
    if preset == "default" and not (entry and entry.simulator in envs.GYMNAX):
        preset = "default-large"
    task = data.bare_name(entry.name.split(":")[-1]) if entry else ""
    agent = given.get("agent", Config.agent)
    hyper = read_hyper(given, agent, task)
    values = PRESETS[preset] | {k: v for k, v in given.items() if not k.startswith("hyper.")}
    if given.get("synthetic") == "none":
        values["real_batch"] = values.get("batch_size", Config.batch_size)
    if values.get("guidance_rule") == "paper":
        values.setdefault("guidance", 1.0)  # the paper's; its unit is another
    values.setdefault("guidance", guidance_of(agent))
    values |= {"sweep": tuple(values["sweep"])} if "sweep" in values else {}
    return from_values(values, hyper)


def guidance_of(agent: str) -> float:
    """-> the default of --guidance; docs/ablation.md has the runs."""
    return GUIDANCE.get(agent, Config.guidance)


def read_hyper(given: dict[str, Any], agent: str, task: str) -> dict[str, Any]:
    """Given words by "hyper.NAME" -> {name: value} of all the agent's hyperparameters."""
    try:
        known = agents.hyperparameters(agent, task)
        values = {name: h.default for name, h in known.items()}
        for name, words in ((k[6:], v) for k, v in given.items() if k.startswith("hyper.")):
            if name not in known:
                raise UserError(f"{agent} has no --hyper.{name}; it has {', '.join(known)}")
            values[name] = read_numbers(f"--hyper.{name}", known[name].type, words)
        agents.check_settings(agent, values)
    except ValueError as e:
        raise UserError(str(e)) from e
    return values


def read_numbers(flag: str, kind: Any, words: Sequence[str]) -> Any:
    """Words -> a number of type int or float, or where `kind` is another, a tuple of integers."""
    one = kind in (int, float)
    if one and len(words) > 1:
        raise UserError(f"{flag} takes one value, not {' '.join(words)}")
    try:
        numbers = tuple(map(kind if one else int, words))
    except ValueError as e:
        needs = "a number" if kind is float else "an integer" if one else "integers"
        raise UserError(f"{flag} needs {needs}, not {' '.join(words)}") from e
    most = 1_000 if one else 65_536
    if kind is not float and max(numbers) > most:
        raise UserError(f"{flag} must be at most {most:,}")
    return numbers[0] if one else numbers


def from_values(values: dict[str, Any], hyper: dict[str, Any]) -> Flags:
    """{setting: value} -> Flags. Raises UserError for a setting that does not exist."""
    names = {cls: {f.name for f in dataclasses.fields(cls)} for cls in (Job, Config)}
    if unknown := set(values) - names[Job] - names[Config]:
        raise UserError(f"there is no setting {sorted(unknown)[0]}")
    of = lambda cls: cls(**{k: v for k, v in values.items() if k in names[cls]})
    return Flags(of(Job), of(Config), hyper)


def misfit(values: dict[str, Any], hyper: Any) -> str | None:
    """Settings from a file -> what has another type than it should, if anything."""
    for cls in (Job, Config):
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if not fits(values[field.name], hints[field.name]):
                return f"{field.name} is {str(values[field.name])[:40]!r}"
    try:
        known = agents.hyperparameters(values["agent"])
        for name, value in dict(hyper).items():
            if name not in known or not fits(value, known[name].type):
                return f"hyper.{name} is {str(value)[:40]!r}"
        agents.make_agent(values["agent"], **hyper)
    except (TypeError, ValueError) as e:
        return " ".join(str(e).split())
    return None


def fits(value: Any, kind: Any) -> bool:
    """True if a value from a JSON file, with tuples for lists, has the type that a hint names."""
    inside = get_args(kind)
    if get_origin(kind) is Literal:
        return any(value == x and type(value) is type(x) for x in inside)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(x, inside[0]) for x in value)
    if inside:  # a union
        return any(fits(value, x) for x in inside)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is kind and (kind is not int or abs(value) < 2**63)


# --- Whether it can work ---

AT_LEAST_ONE = (
    "fit_steps fit_chunk rounds updates export_steps model_steps model_chunk patience"
).split()
AT_MOST = {  # integers that cost memory or time to compile: from 1 to these
    "num_seeds": 1_000_000,
    **dict.fromkeys("features groups model_hidden".split(), 65_536),
    **dict.fromkeys("kernel expansion buffer_rounds members elites".split(), 1_000),
    **dict.fromkeys("levels blocks model_layers n_step".split(), 100),
    **dict.fromkeys("sample_steps eval_episodes rollout".split(), 10_000),
    **dict.fromkeys("fit_batch batch_size model_batch trajectories sample_batch".split(), 10**7),
}


def check(flags: Flags) -> None:
    """Raise UserError, in one line, for settings that cannot work."""
    for name, value in flags.as_dict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{dashed(name)} must be finite")
        if name in AT_LEAST_ONE and not 1 <= value < 2**31:
            raise UserError(f"{dashed(name)} must be at least 1 and below 2^31")
        if name in AT_MOST and not 1 <= value <= AT_MOST[name]:
            raise UserError(f"{dashed(name)} must lie between 1 and {AT_MOST[name]:,}")
    for message, holds in rules(flags.job, flags.config):
        if not holds:
            raise UserError(message)


def rules(j: Job, c: Config) -> Iterator[tuple[str, bool]]:
    """-> (what must hold, whether it does); an earlier rule guards a later one's arithmetic."""
    diffusion = j.synthetic == "diffusion"
    extras = c.value_guidance or c.behaviour_guidance or c.condition_on_start
    yield "--env must not be empty", j.env != ""
    yield "--dataset-path must not be empty", c.dataset_path != ""
    yield "--reward-scale must be positive", j.reward_scale > 0
    yield (
        "--value-guidance, --behaviour-guidance and --condition-on-start need --synthetic "
        "diffusion",
        diffusion or not extras,
    )
    yield "--guidance-rule needs --synthetic diffusion", diffusion or j.guidance_rule == "density"
    yield (
        "--denoiser needs --synthetic diffusion or world-model",
        not (j.denoiser and j.synthetic == "none"),
    )
    yield (
        "--denoiser cannot be combined with --fused, which fits its own",
        not (j.denoiser and j.fused),
    )
    yield (
        "--export needs --synthetic diffusion or world-model",
        not j.export or (j.synthetic != "none"),
    )
    yield "--export takes no --sweep: export one setting at a time", not (j.export and j.sweep)
    yield (
        "--export is for one host: export from the finished run there",
        not (j.export and j.distributed),
    )
    yield (
        "--coordinator, --num-hosts and --host need --distributed",
        j.distributed or ((j.coordinator, j.num_hosts, j.host) == (None, None, None)),
    )
    yield "--devices must be at least 0", j.devices >= 0
    yield "--num-hosts must lie between 1 and 65,536", 1 <= (j.num_hosts or 1) <= 65_536
    yield (
        f"--num-seeds {c.num_seeds} does not divide over {j.num_hosts} hosts",
        bool(j.resume) or c.num_seeds % (j.num_hosts or 1) == 0,
    )
    yield "--seed must be at least 0 and below 2^31", 0 <= c.seed < 2**31 - c.num_seeds
    yield "--horizon must be at least 2 and below 2^31", 2 <= c.horizon < 2**31
    yield "--validation must lie between 0 and 1", 0 < c.validation < 1
    yield "--sample-steps must be at least 2", c.sample_steps >= 2
    yield "--kernel must be odd", c.kernel % 2 == 1
    yield (
        "--features must be a multiple of --groups, and even",
        c.features % c.groups == 0 and c.features % 2 == 0,
    )
    yield (
        f"--levels {c.levels} needs a --horizon that can be halved {c.levels - 1} times",
        c.horizon % 2 ** (c.levels - 1) == 0,
    )
    yield "--fit-steps must be a multiple of --fit-chunk", c.fit_steps % c.fit_chunk == 0
    yield "--model-steps must be a multiple of --model-chunk", c.model_steps % c.model_chunk == 0
    yield "--elites must be at most --members", c.elites <= c.members
    yield (
        "--rollout must be at most --horizon x --sample-batch",
        c.rollout <= c.horizon * c.sample_batch,
    )
    yield "--model-lr must be above 0", c.model_lr > 0
    yield "--model-decay and --penalty must be at least 0", min(c.model_decay, c.penalty) >= 0
    yield (
        "--trajectories must be a multiple of --sample-batch",
        (c.trajectories % c.sample_batch == 0),
    )
    yield "--real-batch must lie between 0 and --batch-size", 0 <= c.real_batch <= c.batch_size
    yield "--sigma-min must lie between 0 and --sigma-max", 0 < c.sigma_min < c.sigma_max
    yield "--sigma-max must be at most 1,000,000", c.sigma_max <= 1e6
    yield "--rho must lie between 0.1 and 100", 0.1 <= c.rho <= 100
    yield "--p-std must lie between 0 and 10", 0 < c.p_std <= 10
    yield "--obs-noise must lie above 0 and be at most 100", 0 < c.obs_noise <= 100
    yield (
        "--sigma-max times --obs-noise must be at least 2, and --sigma-max itself, or sampling "
        "does not begin in noise",
        c.sigma_max * min(c.obs_noise, 1.0) >= 2,
    )
    yield "--fit-lr must be above 0", c.fit_lr > 0
    yield "--ema must be at least 0 and below 1", 0 <= c.ema < 1
    yield "--s-churn and --eta must be at least 0", min(c.s_churn, c.eta) >= 0


def check_agent(flags: Flags, points: Sequence[dict[str, float]]) -> None:
    """Raise UserError for an agent that cannot be made at every point of the sweep."""
    c = flags.config
    try:
        for point in points:
            hyper = {name[6:]: x for name, x in point.items() if name.startswith("hyper.")}
            agent = agents.make_agent(c.agent, **(flags.hyper | hyper))
    except ValueError as e:
        raise UserError(str(e)) from e
    if agent.q_value is None and any(p.get("value_guidance", c.value_guidance) for p in points):
        raise UserError(f"--value-guidance needs an agent with a critic, not {c.agent}")


def check_dataset(flags: Flags, dataset, longest: int) -> None:
    """Raise UserError for a log that is too short; longest: its longest episode, in steps."""
    c, synthetic = flags.config, flags.job.synthetic
    windows = len(dataset.train_starts) + len(dataset.val_starts)
    if synthetic == "diffusion" and not (len(dataset.train_starts) and len(dataset.val_starts)):
        raise UserError(
            f"the log has {windows} windows of {c.horizon} steps, too few to train on and to hold "
            f"out; its longest episode has {longest} steps; lower --horizon or bring more data"
        )
    if synthetic == "world-model" and not (len(dataset.train_rows) and len(dataset.val_rows)):
        raise UserError("the log is too short to hold transitions out for a world model")
    if synthetic == "diffusion" and c.fit_batch > len(dataset.train_starts):
        raise UserError(
            f"--fit-batch {c.fit_batch} is larger than the log, which has "
            f"{len(dataset.train_starts)} training windows"
        )
    if c.batch_size > len(dataset.usable):
        raise UserError(
            f"--batch-size {c.batch_size} is larger than the log, which has {len(dataset.usable)} "
            "transitions"
        )


# --- Sweeps ---

FIT_FIELDS = {  # numbers that change a model; they can be swept and do not compile anew
    "diffusion": ("fit_lr", "ema", "p_mean", "p_std", "obs_noise"),
    "world-model": ("model_lr", "model_decay"),
    "none": (),
}
SAMPLE_FIELDS = {  # numbers that change what a model generates; the same
    "diffusion": (
        "guidance", "value_guidance", "behaviour_guidance", "sigma_min", "sigma_max", "rho", "eta",
        "s_churn", "s_tmin", "s_tmax", "s_noise",
    ),
    "world-model": ("penalty",),
    "none": (),
}  # fmt: skip


def run_time_fields(flags: Flags) -> tuple[str, ...]:
    """-> the settings that play a part in this run and are arguments of its program."""
    idle = (
        ("eta",) if flags.config.sampler == "heun" else ("s_churn", "s_tmin", "s_tmax", "s_noise")
    )
    fields = FIT_FIELDS[flags.job.synthetic] + SAMPLE_FIELDS[flags.job.synthetic]
    return tuple(name for name in fields if name not in idle)


def sweep_points(flags: Flags) -> list[dict[str, float]]:
    """--sweep's words, settings and their values -> every point of the grid; [{}] without a sweep.

    Raises UserError for a setting that does not exist, cannot vary or plays no part in this run.
    """
    values: dict[str, list[float]] = {}
    for word in flags.job.sweep:
        try:
            number = float(word)
        except ValueError:
            name = word.lstrip("-").replace("-", "_")
            check_swept(flags, word, name, values)
            values[name] = []
            continue
        if not values:
            raise UserError(f"--sweep wants a setting before its values, not {word}")
        values[list(values)[-1]].append(number)
    for name, found in values.items():
        if not found or len(set(found)) < len(found):
            raise UserError(f"--sweep {name} wants values, each once")
    points = [dict(zip(values, grid)) for grid in itertools.product(*values.values())]
    for point in points:
        config = {k: v for k, v in point.items() if not k.startswith("hyper.")}
        check(flags._replace(config=dataclasses.replace(flags.config, **config)))
    return points


def check_swept(flags: Flags, word: str, name: str, values: dict) -> None:
    """Raise UserError where the setting `name` cannot be swept; word: as it was typed."""
    known = {flag.name: flag.type for flag in all_flags()}
    known |= {f"hyper.{k}": type(x) for k, x in flags.hyper.items()}
    used = [*run_time_fields(flags), *(k for k in known if k[:6] == "hyper." and known[k] is float)]
    if name in values:
        raise UserError(f"--sweep {word}: {name} is named twice")
    if name not in known:
        near = difflib.get_close_matches(name, used, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--sweep {word}: {name} is not a setting{hint}")
    if name not in used:
        why = "does nothing here" if known[name] is float else "is not a number to vary"
        why = "changes the log's split" if name == "validation" else why
        raise UserError(
            f"--sweep {word}: it {why}; with --synthetic {flags.job.synthetic} there are "
            f"{', '.join(used) or 'none'}"
        )
