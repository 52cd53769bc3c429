"""Scores of agents on the log alone, on unguided and guided data, and on a world model's data.

    python -m studies.results                     # every row of the grid that is missing, in order
    python -m studies.results --only pendulum     # the rows of the tasks whose names begin so
    python -m studies.results --list              # the rows, what is done, and each row's command
    python -m studies.results --report            # tables and figures from results/study/*.csv
    python -m studies.results --quick --out DIR   # a miniature of the grid, in minutes

A row is one run of pgd.py with its own folder under runs/results/. A row that was stopped is
resumed by the same command. A finished row is scored anew with 50 episodes per seed. Its figures go
into results/study/: scores.csv (a line per seed), curves.csv (learning curves) and rows.csv (what
was run, when and for how long). The report writes the tables of docs/results.md and README.md, and
the figures.
"""

import csv
import dataclasses
import itertools
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import agents
import data
from host import cli, devices, envs, flags
from host.errors import UserError
from host.export import export
from host.files import say
from studies import figures, statistics
from studies.common import Parser, markdown, run_study, save_table

ROOT = Path(__file__).resolve().parent.parent
EPISODES = 50  # of the final scores, per seed

# --- The grid: tasks x agents x arms x seeds, in the order in which it is run ---

SMALL = "--num-seeds 8 --sample-steps 16 --hyper.hidden 128 128 --model-steps 5000"
BODY = (  # half of each batch is real, and returns have 3 steps, as chosen on hopper-medium-replay
    "--num-seeds 4 --sample-steps 16 --preset laptop --features 64 --hyper.hidden 128 128 "
    "--updates 2500 --trajectories 1024 --buffer-rounds 4 --real-batch 128 --model-steps 10000 "
    "--n-step 3"
)
GYMNAX = {  # name, or name@N for the first N steps of its log -> flags
    "pendulum-random": SMALL,
    "swimmer-random": SMALL,
    "reacher-random": SMALL,
    "reacher-medium-replay": SMALL,
    "mountaincar-continuous-random": SMALL,
    "reacher-medium-replay@1000": SMALL,
    "swimmer-medium-replay": SMALL,
    "mountaincar-continuous-medium-replay": SMALL,
    "reacher-medium-replay@10000": SMALL,
    "pendulum-medium-replay": SMALL,
}
MUJOCO = {
    "collect:halfcheetah-random": BODY,
    "collect:halfcheetah-medium-replay": BODY,
    "collect:walker2d-random": BODY,
    "collect:walker2d-medium-replay": BODY,
    "collect:hopper-random": BODY,
    "collect:hopper-medium-replay": BODY,
}
MEDIUM = {
    "reacher-medium": SMALL,
    "collect:halfcheetah-medium": BODY,
    "collect:walker2d-medium": BODY,
    "collect:hopper-medium": BODY,
}
DEVELOPMENT = {  # settings were chosen on these logs: they have a line in the tables of the tasks,
    "pendulum-random",  # and no part in the aggregate
    "swimmer-random",
    "reacher-random",
    "reacher-medium-replay",
    "reacher-medium-replay@1000",
    "reacher-medium-replay@10000",
    "pendulum-medium-replay",
    "collect:hopper-medium-replay",
}
GRID = [  # agent and its logs, in the order in which they are run
    ("td3_bc", GYMNAX | MUJOCO),
    ("rebrac", MUJOCO),
    ("td3_bc", MEDIUM),
    ("iql", GYMNAX | {"collect:hopper-medium-replay": BODY}),
]
# The weight of an agent's pull to the data, and by how much the control makes it weaker, twice
PULL = {"td3_bc": "alpha", "rebrac": "actor_bc", "iql": "beta"}
WEAKER = {"td3_bc": 4.0, "rebrac": 0.25, "iql": 4.0}
ARMS = {  # flags of a row; the log alone also sweeps the agent's weight, as the control
    "log": "--synthetic none --sweep",
    "diffusion": "--sweep guidance 0 {guidance:g}",
    "world-model": "--synthetic world-model",
}
COLUMNS = ("log alone", "log alone, best weight", "unguided", "guided", "world model")
WEAKEST = "log alone, weakest pull"  # the last of an agent's three weights
NEEDED = ("log alone", "unguided", "guided")  # a task without one of these is not reported
QUICK = (
    "--preset smoke --num-seeds 2 --batch-size 64 --hyper.hidden 16 16 --sample-steps 4 "
    "--model-steps 100"
)


def weights_of(agent: str, task: str) -> list[float]:
    """-> the agent's published weight for the task, and two with a weaker pull to the data."""
    log = task.partition("@")[0].removeprefix("collect:")
    published = agents.hyperparameters(agent, log)[PULL[agent]].default
    return [published * WEAKER[agent] ** i for i in range(3)]


class Row(NamedTuple):
    """One run of the grid."""

    task: str
    agent: str
    arm: str
    flags: str  # those of its task
    models: str | None = None  # the agent whose row of this task and arm fits the same models

    @property
    def name(self) -> str:
        return f"{self.task.replace(':', '-')}/{self.agent}/{self.arm}"

    def command(self, folder: Path) -> list[str]:
        """-> the flags of pgd.py; `folder` holds the runs."""
        env, _, steps = self.task.partition("@")
        arm = ARMS[self.arm].format(guidance=flags.guidance_of(self.agent))
        words = shlex.split(f"--env {env} --agent {self.agent} {self.flags} {arm}")
        pull, weights = PULL[self.agent], weights_of(self.agent, self.task)
        if self.arm == "log":
            words += [f"hyper.{pull}", *map(str, weights)]
        else:
            words += [f"--hyper.{pull}", str(weights[0])]
        if steps:
            words += ["--dataset-path", str(shortened(self.task, folder))]
        fitted = folder / self._replace(agent=self.models).name
        if self.models and (fitted / "final.json").exists():  # else it fits its own
            words += ["--denoiser", str(fitted)]
        return [*words, "--out", str(folder / self.name)]


def grid(tasks_of: Sequence[tuple[str, dict[str, str]]]) -> Iterator[Row]:
    """Agents, each with its tasks and their flags -> every row: all arms of a task before the next
    task. The models are those that the first agent with the task has fitted."""
    fitted: dict[tuple, str] = {}
    for agent, tasks in tasks_of:
        for (task, own), arm in itertools.product(tasks.items(), ARMS):
            models = None if arm == "log" else fitted.get((task, arm))
            fitted.setdefault((task, arm), agent)
            yield Row(task, agent, arm, own, models)


def shortened(task: str, folder: Path) -> Path:
    """TASK@N -> the file, below `folder`, with the first N steps of the task's log."""
    name, _, steps = task.partition("@")
    return folder / "logs" / f"{name}-{steps}.npz"


def shorten(task: str, folder: Path) -> None:
    """Write the file of TASK@N, unless it is there."""
    name, _, steps = task.partition("@")
    path = shortened(task, folder)
    if steps and not path.exists():
        whole = data.load(name)
        log = {key: x[: int(steps)] for key, x in whole.log.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        export(str(path), log, whole, f"the first {steps} steps of {whole.source}")


# --- Run a row ---


def run(row: Row, folder: Path) -> None:
    """Run pgd.py, or go on with it where its folder is. Raises UserError where it fails."""
    out = folder / row.name
    shorten(row.task, folder)
    command = ["--resume", str(out)] if out.exists() else row.command(folder)
    say(f"{row.name}: python pgd.py {shlex.join(command)}")
    status = subprocess.run([sys.executable, str(ROOT / "pgd.py"), *command]).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status not in (0, 3):  # 3: some seeds have diverged
        raise UserError(f"{row.name} stopped with exit status {status}; see what it said above")


def arm_of(row: Row, label: dict) -> tuple[str, float]:
    """A run's label -> (its column, the weight of the agent)."""
    column = {"log": "log alone", "world-model": "world model"}.get(row.arm)
    column = column or ("guided" if label["guidance"] else "unguided")
    published = weights_of(row.agent, row.task)[0]
    return column, label.get(f"hyper.{PULL[row.agent]}", published)


def scored(row: Row, loaded: cli.Loaded, episodes: int) -> list[dict]:
    """A finished row -> a line per run: its score over `episodes` fresh episodes; none for one that
    has diverged."""
    session, task = loaded.session, loaded.session.task
    job = dataclasses.replace(session.flags.job, eval_episodes=episodes)
    session = session._replace(
        flags=session.flags._replace(job=job),
        in_program=envs.evaluator_in_program(task.simulator, episodes),
    )
    returns = cli.make_evaluate(session)(loaded.config.rounds, loaded.state.agent)
    lines = []
    for label, value, alive in zip(session.layout.labels, returns, loaded.state.round >= 0):
        column, weight = arm_of(row, label)
        line = {"task": row.task, "agent": row.agent, "arm": column, "weight": weight}
        line |= {"seed": label["seed"]}
        if alive:
            lines.append(line | {"score": float(task.score(value)), "return": float(value)})
    return lines


def curves(row: Row, folder: Path) -> list[dict]:
    """-> learning curves of a row: mean score over seeds after each round, with its interval."""
    with (folder / row.name / "metrics.csv").open() as f:
        history = list(csv.DictReader(f))
    found: dict[tuple, list[float]] = {}
    for line in history:
        label = {"guidance": float(line.get("guidance", 0.0))}
        label |= {k: float(v) for k, v in line.items() if k.startswith("hyper.")}
        key = (*arm_of(row, label), int(line["updates"]))
        if line["score"]:
            found.setdefault(key, []).append(float(line["score"]))
    lines = []
    for (column, weight, updates), scores in found.items():
        mean, low, high = figures.band(scores)
        lines.append({"task": row.task, "agent": row.agent, "arm": column, "weight": weight,
                      "updates": updates, "mean": mean, "low": low, "high": high,
                      "seeds": len(scores)})  # fmt: skip
    return lines


def about(row: Row, folder: Path, loaded: cli.Loaded) -> dict:
    """-> what was run: the command, the time it took, and on what."""
    final = json.loads((folder / row.name / "final.json").read_text())
    seconds = final["wall_seconds"]
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True)
    device, cores = jax.devices()[0], devices.num_cores()
    on = f"{cores} CPU core{'s' * (cores > 1)}" if device.platform == "cpu" else device.device_kind
    return {
        "task": row.task, "agent": row.agent, "row": row.arm,
        "command": f"python pgd.py {shlex.join(row.command(folder))}",
        "log": final["source"], "steps": len(loaded.dataset.steps),
        "behaviour_score": final["behaviour_score"],
        "runs": len(final["seeds"]), "diverged": len(final["diverged"]),
        "minutes_fit": seconds.get("fit", 0.0) / 60,
        "minutes": sum(seconds.values()) / 60,
        "on": on, "python": platform.python_version(), "jax": jax.__version__,
        "commit": git.stdout.decode().strip(), "finished": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


# --- Keep the results ---


def read(path: Path) -> list[dict]:
    """A csv of save_table -> its rows, numbers as numbers; [] where there is no file."""
    if not path.exists():
        return []

    def number(text: str):
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError:
            return text

    with path.open() as f:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(f)]


def keep(path: Path, row: Row, lines: list[dict]) -> None:
    """Put a row's lines into a csv, in place of those that it has of the row."""
    same = lambda x: x["task"] == row.task and x["agent"] == row.agent
    if lines and "arm" in lines[0]:
        mine = {line["arm"] for line in lines}
        old = [x for x in read(path) if not (same(x) and x["arm"] in mine)]
    else:
        old = [x for x in read(path) if not (same(x) and x["row"] == row.arm)]
    if old or lines:
        save_table(path, old + lines)


def run_grid(rows: Sequence[Row], folder: Path, out: Path, episodes: int) -> None:
    """Run the rows that rows.csv lacks, one after the other, and keep what each gives."""
    for number, row in enumerate(rows, 1):
        if is_done(row, out):
            continue
        say(f"row {number} of {len(rows)}")
        run(row, folder)
        loaded = cli.load_run(folder / row.name)
        keep(out / "scores.csv", row, scored(row, loaded, episodes))
        keep(out / "curves.csv", row, curves(row, folder))
        keep(out / "rows.csv", row, [about(row, folder, loaded)])


def is_done(row: Row, out: Path) -> bool:
    """True if rows.csv has the row."""
    return any((x["task"], x["agent"], x["row"]) == row[:3] for x in read(out / "rows.csv"))


# --- Report: tables and figures from the csv files alone ---


def table_of(out: Path) -> dict[tuple, dict[int, float]]:
    """scores.csv -> {(task, agent, column, weight): {seed: score}}."""
    found: dict[tuple, dict[int, float]] = {}
    for x in read(out / "scores.csv"):
        key = x["task"], x["agent"], x["arm"], x["weight"]
        found.setdefault(key, {})[int(x["seed"])] = x["score"]
    return found


def complete(scores: dict) -> list[tuple[str, str]]:
    """-> (task, agent) of those with the log alone, unguided and guided data, in their order."""
    pairs = dict.fromkeys(key[:2] for key in scores)
    has = {key[:3] for key in scores}
    return [p for p in pairs if all((*p, column) in has for column in NEEDED)]


def best(scores: dict, task: str, agent: str) -> float:
    """-> the agent's weight with the highest mean score on the log alone."""
    means = {key[3]: np.mean(list(x.values())) for key, x in scores.items()
             if key[:3] == (task, agent, "log alone")}  # fmt: skip
    return max(means, key=means.__getitem__)


def arm_and_weight(scores: dict, task: str, agent: str, column: str) -> tuple[str, float]:
    """A column of the tables -> the arm and the agent's weight that it shows."""
    if column == "log alone, best weight":
        return "log alone", best(scores, task, agent)
    return column, weights_of(agent, task)[0]


def column_of(scores: dict, agent: str, column: str) -> dict[str, dict[int, float]]:
    """-> {task: {seed: score}} of a column, at the published weight unless it says otherwise."""
    found = {}
    for task, other in complete(scores):
        if other == agent:
            key = (task, agent, *arm_and_weight(scores, task, agent, column))
            if key in scores:
                found[task] = scores[key]
    return found


def weakest_pull(scores: dict, agent: str) -> dict[str, dict[int, float]]:
    """-> {task: {seed: score}} of the log alone at the weight that pulls least to the data."""
    keys = {task: (task, agent, "log alone", weights_of(agent, task)[-1])
            for task, other in complete(scores) if other == agent}  # fmt: skip
    return {task: scores[key] for task, key in keys.items() if key in scores}


def aggregated(scores: dict, agent: str, column: str) -> dict[str, list[float]]:
    """-> {task: scores} of a column, without the tasks of development. It is empty for a column
    that lacks one of the other tasks, because its mean could not be compared."""
    tasks = [task for task, a in complete(scores) if a == agent and task not in DEVELOPMENT]
    found = column_of(scores, agent, column)
    if not found.keys() >= set(tasks):
        return {}
    return {task: list(found[task].values()) for task in tasks}


def cell(values: Sequence[float]) -> str:
    """Scores of the seeds -> mean (low to high), the 95 % interval of the mean."""
    mean, low, high = figures.band(values)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def score_table(out: Path, scores: dict, agent: str) -> str:
    """-> a line per task: the score in each column."""
    behaviour = {x["task"]: x["behaviour_score"] for x in read(out / "rows.csv")}
    by_column = {column: column_of(scores, agent, column) for column in COLUMNS}
    lines = [["log", "behaviour policy", "seeds", *COLUMNS]]
    for task, seeds in by_column["log alone"].items():
        line = [task, f"{behaviour[task]:.1f}", str(len(seeds))]
        for column in COLUMNS:
            values = by_column[column].get(task)
            text = cell(list(values.values())) if values else ""
            if column == "log alone, best weight":
                text += f" at {best(scores, task, agent):g}"
            line.append(text)
        lines.append(line)
    return markdown(lines)


def difference(x: dict[int, float], y: dict[int, float]) -> str:
    """Scores of two columns -> the mean difference of the same seeds, with its interval."""
    both = sorted(set(x) & set(y))
    mean, low, high = statistics.paired([x[s] for s in both], [y[s] for s in both])
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def paired_table(scores: dict, agent: str) -> str:
    """-> a line per task: what guided data add, seed by seed, and what unguided data do."""
    of = {column: column_of(scores, agent, column) for column in COLUMNS}
    pairs = [("unguided", "log alone"), *(("guided", c) for c in COLUMNS if c != "guided")]
    lines = [["log", *(f"{x} minus {y}" for x, y in pairs), f"{WEAKEST} minus log alone"]]
    weakest = weakest_pull(scores, agent)
    for task in of["guided"]:
        cells = [difference(of[x][task], of[y][task]) if task in of[y] else "" for x, y in pairs]
        other = task in weakest and difference(weakest[task], of["log alone"][task])
        lines.append([task, *cells, other or ""])
    return markdown(lines)


def aggregate_table(scores: dict, agent: str) -> str:
    """-> a line per column: interquartile mean over all tasks but those of development, and how
    often guided data win."""
    lines = [["trained on", "tasks", "interquartile mean", "P(guided is better)"]]
    wins = statistics.probability_of_improvement
    guided = aggregated(scores, agent, "guided")
    for column in COLUMNS:
        values = aggregated(scores, agent, column)
        if values:
            low, high = statistics.interval_of(statistics.iqm, values)
            middle = f"{statistics.iqm(values):.1f} ({low:.1f} to {high:.1f})"
            mine = {task: guided[task] for task in values}
            low, high = statistics.interval_of(wins, mine, values)
            better = f"{wins(mine, values):.2f} ({low:.2f} to {high:.2f})"
            lines.append([column, str(len(values)), middle, better if column != "guided" else ""])
    return markdown(lines)


def pace_table(out: Path, scores: dict, agent: str) -> str:
    """-> a line per task: after how many updates the mean of each column reaches that at the end
    on the log alone, all at the published weight."""
    others = ("unguided", "guided", "world model")
    lines = [["log", *others]]
    curves = [x for x in read(out / "curves.csv") if x["agent"] == agent]
    for task, seeds in column_of(scores, agent, "log alone").items():
        goal, line = np.mean(list(seeds.values())), [task]
        for column in others:
            mine = [x for x in curves if (x["task"], x["arm"], x["weight"]) ==
                    (task, column, weights_of(agent, task)[0])]  # fmt: skip
            reached = [x["updates"] for x in mine if x["mean"] >= goal]
            line.append("" if not mine else f"{min(reached):,.0f}" if reached else "never")
        lines.append(line)
    return markdown(lines)


def cost_table(out: Path) -> str:
    """-> a line per row: what it cost."""
    lines = [["log", "agent", "row", "runs", "diverged", "minutes", "of those the fit", "on"]]
    for x in read(out / "rows.csv"):
        lines.append([x["task"], x["agent"], x["row"], f"{x['runs']:.0f}", f"{x['diverged']:.0f}",
                      f"{x['minutes']:.0f}", f"{x['minutes_fit']:.0f}", x["on"]])  # fmt: skip
    return markdown(lines)


def tables(out: Path) -> dict[str, str]:
    """-> {name: a table in Markdown} of everything in the csv files."""
    scores, made = table_of(out), {}
    for agent in dict.fromkeys(agent for _, agent in complete(scores)):
        made[f"{agent}-scores"] = score_table(out, scores, agent)
        made[f"{agent}-paired"] = paired_table(scores, agent)
        made[f"{agent}-aggregate"] = aggregate_table(scores, agent)
        made[f"{agent}-pace"] = pace_table(out, scores, agent)
    if made:
        made["cost"] = cost_table(out)
    return made


def put_tables(text: str, made: dict[str, str]) -> str:
    """A page -> the same with each table between its marks, <!-- NAME --> and <!-- end -->."""
    for name, table in made.items():
        mark, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, found, after = text.partition(mark)
        if found and end in after:
            text = f"{before}{mark}\n{table}\n\n{end}{after.partition(end)[2]}"
    return text


def report(out: Path, pages: Sequence[Path]) -> None:
    """Print the tables, put them into the pages that have their marks, and draw the figures."""
    made = tables(out)
    if not made:
        raise UserError(
            f"{out} has no task with the log alone and guided data; run the study first"
        )
    for name, table in made.items():
        print(f"\n{name}\n\n{table}")
    for page in pages:
        page.write_text(put_tables(page.read_text(), made))
    drawn = [draw_curves(out), *draw_profiles(out), *draw_sizes(out), *draw_gains(out)]
    print(f"\nsaved: {out}/ ({', '.join(drawn)})")


def draw_curves(out: Path) -> str:
    """Learning curves, a panel per task and agent -> the figure's name."""
    lines, scores = read(out / "curves.csv"), table_of(out)
    pairs = complete(scores)
    columns = min(4, len(pairs))
    figure, axes = figures.new_figure(-(-len(pairs) // columns), columns, 3.0, 2.4)
    for ax in axes.flat[len(pairs) :]:
        ax.set_axis_off()
    for ax, (task, agent) in zip(axes.flat, pairs):
        for column in COLUMNS:
            key = (task, agent, *arm_and_weight(scores, task, agent, column))
            mine = [x for x in lines if (x["task"], x["agent"], x["arm"], x["weight"]) == key]
            if mine:
                bands = [(x["mean"], x["low"], x["high"]) for x in mine]
                figures.line(ax, [x["updates"] for x in mine], bands, column)
        ax.set(title=f"{task}\n{agent}", xlabel="agent updates", ylabel="normalised score")
    figures.add_legend(figure)
    figures.save_figure(out / "curves.png", figure)
    return "curves.png"


def draw_profiles(out: Path) -> list[str]:
    """Performance profiles over all tasks but those of development, a panel per agent -> the
    figure's name, if there is such a task."""
    scores, thresholds = table_of(out), np.linspace(-20, 120, 141)
    names = dict.fromkeys(agent for task, agent in complete(scores) if task not in DEVELOPMENT)
    if not names:
        return []
    figure, axes = figures.new_figure(1, len(names))
    for ax, agent in zip(axes[0], names):
        for column in COLUMNS:
            values = aggregated(scores, agent, column)
            if values:
                of = lambda x: statistics.profile(x, thresholds)
                low, high = statistics.interval_of(of, values, resamples=500)
                figures.line(ax, thresholds, np.stack([of(values), low, high], 1), column)
        ax.set(title=agent, xlabel="normalised score", ylabel="share of runs above it")
    figures.add_legend(figure)
    figures.save_figure(out / "profiles.png", figure)
    return ["profiles.png"]


def draw_sizes(out: Path) -> list[str]:
    """Scores against the size of the log, for the first agent, a panel for each log of which there
    are several sizes -> the figure's name, if there is one."""
    steps = {x["task"]: x["steps"] for x in read(out / "rows.csv")}
    scores, agent = table_of(out), GRID[0][0]
    found = {column: column_of(scores, agent, column) for column in COLUMNS}
    families: dict[str, list[str]] = {}
    for task in found["log alone"]:
        families.setdefault(task.partition("@")[0], []).append(task)
    families = {k: sorted(v, key=steps.get) for k, v in families.items() if len(v) > 1}
    if not families:
        return []
    figure, axes = figures.new_figure(1, len(families))
    for ax, (name, tasks) in zip(axes[0], families.items()):
        for column in COLUMNS:
            mine = [task for task in tasks if task in found[column]]
            bands = [figures.band(found[column][task].values()) for task in mine]
            if mine:
                figures.line(ax, [steps[task] for task in mine], bands, column, marker="o", ms=3)
        ax.set(title=name, xlabel="steps of the log", ylabel="normalised score", xscale="log")
    figures.add_legend(figure)
    figures.save_figure(out / "sizes.png", figure)
    return ["sizes.png"]


def draw_gains(out: Path) -> list[str]:
    """What guided data add to the log alone against what a weaker pull to the data adds, a point
    per task, for the first agent -> the figure's name, if there are two tasks."""
    scores, agent = table_of(out), GRID[0][0]
    alone, guided, weakest = (
        column_of(scores, agent, "log alone"), column_of(scores, agent, "guided"),
        weakest_pull(scores, agent),
    )  # fmt: skip
    tasks = [task for task in guided if task in weakest]
    if len(tasks) < 2:
        return []
    figure, axes = figures.new_figure(1, 1, 5.4, 4.2)
    for task in tasks:
        x, y = (
            figures.band(
                [found[task][i] - alone[task][i] for i in alone[task].keys() & found[task]]
            )
            for found in (weakest, guided)
        )
        spread = [[[m - low], [high - m]] for m, low, high in (x, y)]
        axes[0, 0].errorbar(x[0], y[0], spread[1], spread[0], "o", ms=4, label=task)
    axes[0, 0].axline((0, 0), slope=1, color="0.8", zorder=0)
    axes[0, 0].set(
        xlabel="log alone: weakest pull minus published weight", title=agent,
        ylabel="published weight: guided data minus log alone",
    )  # fmt: skip
    axes[0, 0].legend(fontsize=7)
    figures.save_figure(out / "gains.png", figure)
    return ["gains.png"]


# --- Command line ---


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    parser = Parser("results", __doc__)
    parser.add_argument("--only", default="", metavar="TASK", help="rows whose task begins so")
    parser.add_argument("--list", action="store_true", help="show the rows and their commands")
    parser.add_argument("--report", action="store_true", help="tables and figures alone")
    parser.add_argument("--quick", action="store_true", help="a miniature, with --out of its own")
    parser.add_argument("--out", help="folder of the results; results/study unless given")
    args = parser.parse_args(argv)
    if args.quick and not args.out:
        raise UserError("--quick needs --out DIR, so that it touches no result")
    out = Path(args.out or "results/study")
    folder, tasks_of = Path("runs/results"), GRID
    pages = [Path("docs/results.md"), Path("README.md")]
    if args.quick:
        folder, pages = out / "runs", []
        logs = ("pendulum-random@2000", "mountaincar-continuous-random@2000")
        tasks_of = [("td3_bc", dict.fromkeys(logs, QUICK)), ("iql", {logs[0]: QUICK})]
    elif args.out:
        pages = []
    rows = [row for row in grid(tasks_of) if row.task.startswith(args.only)]
    if not rows:
        known = ", ".join(dict.fromkeys(row.task for row in grid(tasks_of)))
        raise UserError(f"no task begins with {args.only}; there are {known}")
    if args.list:
        for row in rows:
            done = "done   " if is_done(row, out) else "missing"
            print(f"{done}  python pgd.py {shlex.join(row.command(folder))}")
        return
    if not args.report:
        run_grid(rows, folder, out, EPISODES if not args.quick else 4)
    report(out, [page for page in pages if page.exists()])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("results", study, argv, "the same command goes on")


if __name__ == "__main__":
    main()
