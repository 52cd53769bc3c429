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

import data
from host import cli, devices, envs
from host.errors import UserError
from host.export import export
from host.files import say
from studies import figures, statistics
from studies.common import Parser, markdown, run_study, save_table

ROOT = Path(__file__).resolve().parent.parent
EPISODES = 50  # of the final scores, per seed

# --- The grid: tasks x agents x arms x seeds, in the order in which it is run ---

SMALL = "--num-seeds 8 --sample-steps 16 --hyper.hidden 128 128 --model-steps 5000"
BODY = (
    "--num-seeds 4 --sample-steps 16 --preset laptop --features 64 --hyper.hidden 128 128 "
    "--updates 2500 --trajectories 1024 --buffer-rounds 4 --model-steps 10000"
)
GUIDANCE = "64"  # lambda, chosen on pendulum-random and hopper-medium-replay
TASKS = {  # name, or name@N for the first N steps of its log -> flags
    "reacher-random": SMALL,
    "reacher-medium-replay": SMALL,
    "mountaincar-continuous-random": SMALL,
    "mountaincar-continuous-medium-replay": SMALL,
    "swimmer-random": SMALL,
    "swimmer-medium-replay": SMALL,
    "pendulum-random": SMALL,
    "pendulum-medium-replay": SMALL,
    "collect:halfcheetah-random": BODY,
    "collect:halfcheetah-medium-replay": BODY,
    "collect:walker2d-medium-replay": BODY,
    "collect:hopper-random": BODY,
    "pendulum-random@1000": SMALL,
    "pendulum-random@10000": SMALL,
}
AGENTS = {  # agent -> the weight against its pull to the data, its published value first
    "td3_bc": ("alpha", (2.5, 10.0, 40.0)),
}
ARMS = {  # flags of a row; every row also sweeps the agent's weight
    "log": "--synthetic none --sweep",
    "diffusion": f"--sweep guidance 0 {GUIDANCE}",
    "world-model": "--synthetic world-model --sweep",
}
COLUMNS = ("log alone", "unguided", "guided", "world model")  # what the rows give
QUICK = (
    "--preset smoke --num-seeds 2 --batch-size 64 --hyper.hidden 16 16 --sample-steps 4 "
    "--model-steps 100"
)


class Row(NamedTuple):
    """One run of the grid."""

    task: str
    agent: str
    arm: str
    flags: str  # those of its task

    @property
    def name(self) -> str:
        return f"{self.task.replace(':', '-')}/{self.agent}/{self.arm}"

    def command(self, folder: Path) -> list[str]:
        """-> the flags of pgd.py; `folder` holds the runs."""
        weight, values = AGENTS[self.agent]
        swept = f"{ARMS[self.arm]} hyper.{weight} {' '.join(map(str, values))}"
        env, _, steps = self.task.partition("@")
        words = shlex.split(f"--env {env} --agent {self.agent} {self.flags} {swept}")
        if steps:
            words += ["--dataset-path", str(shortened(self.task, folder))]
        return [*words, "--out", str(folder / self.name)]


def grid(tasks: dict[str, str]) -> Iterator[Row]:
    """Tasks and their flags -> every row: all arms of a task before the next task."""
    for agent, (task, flags) in itertools.product(AGENTS, tasks.items()):
        for arm in ARMS:
            yield Row(task, agent, arm, flags)


def shortened(task: str, folder: Path) -> Path:
    """TASK@N -> the file, below `folder`, with the first N steps of the task's log."""
    name, _, steps = task.partition("@")
    path = folder / "logs" / f"{name}-{steps}.npz"
    if not path.exists():
        whole = data.load(name)
        log = {key: x[: int(steps)] for key, x in whole.log.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        export(str(path), log, whole, f"the first {steps} steps of {whole.source}")
    return path


# --- Run a row ---


def run(row: Row, folder: Path) -> None:
    """Run pgd.py, or go on with it where its folder is. Raises UserError where it fails."""
    out = folder / row.name
    command = ["--resume", str(out)] if out.exists() else row.command(folder)
    say(f"{row.name}: python pgd.py {shlex.join(command)}")
    status = subprocess.run([sys.executable, str(ROOT / "pgd.py"), *command]).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status not in (0, 3):  # 3: some seeds have diverged
        raise UserError(f"{row.name} stopped with exit status {status}; see what it said above")


def arms_of(row: Row, label: dict) -> tuple[str, float]:
    """A run's label -> (column, weight of the agent)."""
    column = {"log": "log alone", "world-model": "world model"}.get(row.arm)
    column = column or ("guided" if label["guidance"] else "unguided")
    return column, label[f"hyper.{AGENTS[row.agent][0]}"]


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
        column, weight = arms_of(row, label)
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
        key = (*arms_of(row, label), int(line["updates"]))
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
    on = f"{cores} CPU cores" if device.platform == "cpu" else device.device_kind
    return {
        "task": row.task, "agent": row.agent, "row": row.arm,
        "command": f"python pgd.py {shlex.join(row.command(Path('runs/results')))}",
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
            return float(text)
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
    return [p for p in pairs if all((*p, column) in has for column in COLUMNS[:3])]


def best(scores: dict, task: str, agent: str, column: str) -> float | None:
    """-> the agent's weight with the highest mean score; None where the column has none."""
    weights = [w for w in AGENTS[agent][1] if (task, agent, column, w) in scores]
    mean = lambda w: np.mean(list(scores[task, agent, column, w].values()))
    return max(weights, key=mean, default=None)


def chosen(scores: dict, agent: str, column: str, how: str) -> dict[str, dict[int, float]]:
    """-> {task: {seed: score}} of a column, at the "published" weight or each task's "best"."""
    found = {}
    for task, other in complete(scores):
        if other == agent:
            published = AGENTS[agent][1][0]
            weight = published if how == "published" else best(scores, task, agent, column)
            if (task, agent, column, weight) in scores:
                found[task] = scores[task, agent, column, weight]
    return found


def cell(values: Sequence[float]) -> str:
    """Scores of the seeds -> mean (low to high), the 95 % interval of the mean."""
    mean, low, high = figures.band(values)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def score_table(out: Path, scores: dict, agent: str, how: str) -> str:
    """-> a line per task: the score in each column; at the best weight, with that weight."""
    behaviour = {x["task"]: x["behaviour_score"] for x in read(out / "rows.csv")}
    by_column = {column: chosen(scores, agent, column, how) for column in COLUMNS}
    lines = [["log", "its own policy", "seeds", *COLUMNS]]
    for task, seeds in by_column["log alone"].items():
        line = [task, f"{behaviour[task]:.1f}", str(len(seeds))]
        for column in COLUMNS:
            values = by_column[column].get(task)
            text = cell(list(values.values())) if values else ""
            if values and how == "best":
                text += f" at {best(scores, task, agent, column):g}"
            line.append(text)
        lines.append(line)
    return markdown(lines)


def difference(x: dict[int, float], y: dict[int, float]) -> str:
    """Scores of two columns -> the mean difference of the same seeds, with its interval."""
    both = sorted(set(x) & set(y))
    mean, low, high = statistics.paired([x[s] for s in both], [y[s] for s in both])
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def paired_table(scores: dict, agent: str, how: str) -> str:
    """-> a line per task: what guided data add, seed by seed."""
    guided = chosen(scores, agent, "guided", how)
    others = [c for c in COLUMNS if c != "guided"]
    of = {column: chosen(scores, agent, column, how) for column in others}
    lines = [["log", *(f"guided less {column}" for column in others)]]
    for task, x in guided.items():
        cells = [difference(x, of[c][task]) if task in of[c] else "" for c in others]
        lines.append([task, *cells])
    return markdown(lines)


def aggregate_table(scores: dict, agent: str) -> str:
    """-> a line per column: interquartile mean over all tasks, and how often guided data win."""
    lines = [["trained on", "tasks", "interquartile mean, published weight", "best weight",
              "P(guided is better), published weight", "best weight"]]  # fmt: skip
    for column in COLUMNS:
        cells, tasks = {"iqm": [], "win": []}, 0
        for how in ("published", "best"):
            found = chosen(scores, agent, column, how)
            values = {task: list(x.values()) for task, x in found.items()}
            if not values:
                break
            tasks = len(values)
            low, high = statistics.interval_of(statistics.iqm, values)
            cells["iqm"].append(f"{statistics.iqm(values):.1f} ({low:.1f} to {high:.1f})")
            guided = chosen(scores, agent, "guided", how)
            guided = {task: list(guided[task].values()) for task in values}
            wins = statistics.probability_of_improvement
            low, high = statistics.interval_of(wins, guided, values)
            text = f"{wins(guided, values):.2f} ({low:.2f} to {high:.2f})"
            cells["win"].append("" if column == "guided" else text)
        if tasks:
            lines.append([column, str(tasks), *cells["iqm"], *cells["win"]])
    return markdown(lines)


def pace_table(out: Path, scores: dict, agent: str) -> str:
    """-> a line per task: after how many updates the mean of each column reaches that at the end
    on the log alone, all at the published weight."""
    published, lines = AGENTS[agent][1][0], [["log", *COLUMNS[1:]]]
    curves = [x for x in read(out / "curves.csv") if x["agent"] == agent]
    for task, seeds in chosen(scores, agent, "log alone", "published").items():
        goal, line = np.mean(list(seeds.values())), [task]
        for column in COLUMNS[1:]:
            mine = [x for x in curves if (x["task"], x["arm"], x["weight"]) ==
                    (task, column, published)]  # fmt: skip
            reached = [x["updates"] for x in mine if x["mean"] >= goal]
            line.append("" if not mine else f"{min(reached):,.0f}" if reached else "never")
        lines.append(line)
    return markdown(lines)


def cost_table(out: Path) -> str:
    """-> a line per row: what it cost, and its command."""
    lines = [["log", "row", "runs", "diverged", "minutes", "of those the fit", "on", "command"]]
    for x in read(out / "rows.csv"):
        lines.append([x["task"], x["row"], f"{x['runs']:.0f}", f"{x['diverged']:.0f}",
                      f"{x['minutes']:.0f}", f"{x['minutes_fit']:.0f}", x["on"],
                      f"`{x['command']}`"])  # fmt: skip
    return markdown(lines)


def tables(out: Path) -> dict[str, str]:
    """-> {name: a table in Markdown} of everything in the csv files."""
    scores, made = table_of(out), {}
    for agent in dict.fromkeys(agent for _, agent in complete(scores)):
        made[f"{agent}-published"] = score_table(out, scores, agent, "published")
        made[f"{agent}-best"] = score_table(out, scores, agent, "best")
        made[f"{agent}-paired-published"] = paired_table(scores, agent, "published")
        made[f"{agent}-paired-best"] = paired_table(scores, agent, "best")
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
    drawn = [draw_curves(out), draw_profiles(out), *draw_sizes(out)]
    print(f"\nsaved: {out}/ ({', '.join(drawn)})")


def draw_curves(out: Path) -> str:
    """Learning curves at the published weight, a panel per task -> the figure's name."""
    lines, scores = read(out / "curves.csv"), table_of(out)
    pairs = complete(scores)
    columns = min(4, len(pairs))
    figure, axes = figures.new_figure(-(-len(pairs) // columns), columns, 3.0, 2.4)
    for ax in axes.flat[len(pairs) :]:
        ax.set_axis_off()
    for ax, (task, agent) in zip(axes.flat, pairs):
        for column in COLUMNS:
            mine = [x for x in lines if (x["task"], x["agent"], x["arm"]) == (task, agent, column)
                    and x["weight"] == AGENTS[agent][1][0]]  # fmt: skip
            if mine:
                bands = [(x["mean"], x["low"], x["high"]) for x in mine]
                figures.line(ax, [x["updates"] for x in mine], bands, column)
        ax.set(title=task, xlabel="agent updates", ylabel="normalised score")
    axes[0, 0].legend()
    figures.save_figure(out / "curves.png", figure)
    return "curves.png"


def draw_profiles(out: Path) -> str:
    """Performance profiles over all tasks, at the published and the best weight -> the figure's
    name."""
    scores, thresholds = table_of(out), np.linspace(-20, 120, 141)
    figure, axes = figures.new_figure(1, 2)
    agent = next(iter(AGENTS))
    for ax, how in zip(axes[0], ("published", "best")):
        for column in COLUMNS:
            found = chosen(scores, agent, column, how)
            values = {task: list(x.values()) for task, x in found.items()}
            if values:
                of = lambda x: statistics.profile(x, thresholds)
                low, high = statistics.interval_of(of, values, resamples=500)
                figures.line(ax, thresholds, np.stack([of(values), low, high], 1), column)
        ax.set(title=f"{agent}, {how} weight", xlabel="normalised score",
               ylabel="share of runs above it")  # fmt: skip
    axes[0, 0].legend()
    figures.save_figure(out / "profiles.png", figure)
    return "profiles.png"


def draw_sizes(out: Path) -> list[str]:
    """Scores against the size of the log, at the published weight, a panel for each log of which
    there are several sizes -> the figure's name, if there is one."""
    steps = {x["task"]: x["steps"] for x in read(out / "rows.csv")}
    scores, agent = table_of(out), next(iter(AGENTS))
    found = {column: chosen(scores, agent, column, "published") for column in COLUMNS}
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
    axes[0, 0].legend()
    figures.save_figure(out / "sizes.png", figure)
    return ["sizes.png"]


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
    folder, tasks, pages = Path("runs/results"), TASKS, [Path("docs/results.md"), Path("README.md")]
    if args.quick:
        folder, pages = out / "runs", []
        tasks = {"pendulum-random@2000": QUICK, "mountaincar-continuous-random@2000": QUICK}
    elif args.out:
        pages = []
    rows = [row for row in grid(tasks) if row.task.startswith(args.only)]
    if not rows:
        raise UserError(f"no task begins with {args.only}; there are {', '.join(tasks)}")
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
