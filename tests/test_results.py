"""The study of scores: statistics, the grid, and tables that come from its files."""

import csv
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import mannwhitneyu, trim_mean

from host import flags
from host.errors import UserError
from studies import figures, ope, results, statistics

# --- Statistics ---


def test_the_interquartile_mean_is_that_of_the_middle_half():
    rng = np.random.default_rng(0)
    for sizes in [(8,), (4, 4, 8), (3, 5), (1,)]:
        scores = {str(i): rng.normal(size=n) for i, n in enumerate(sizes)}
        every = np.concatenate(list(scores.values()))
        assert statistics.iqm(scores) == pytest.approx(trim_mean(every, 0.25))
    assert statistics.iqm({"a": [0, 0, 1, 3, 5, 7, 9e9, -9e9]}) == pytest.approx(
        (0 + 1 + 3 + 5) / 4
    )


def test_the_probability_of_improvement_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 5, 9), rng.integers(0, 5, 6)  # with ties
    u = mannwhitneyu(x, y).statistic / (9 * 6)
    assert statistics.probability_of_improvement({"t": x}, {"t": y}) == pytest.approx(u)
    both = {"t": x, "u": [2.0]}, {"t": y, "u": [1.0]}
    assert statistics.probability_of_improvement(*both) == pytest.approx((u + 1) / 2)


def test_a_profile_gives_each_task_the_same_weight():
    scores = {"a": [0.0, 10.0], "b": [10.0, 10.0, 10.0, 20.0]}
    assert statistics.profile(scores, [-1, 0, 10, 15, 20]).tolist() == [1, 0.75, 0.125, 0.125, 0]


def test_bootstrap_intervals_cover_as_often_as_they_say():
    rng, hits = np.random.default_rng(2), 0
    for i in range(200):
        scores = {"a": rng.normal(0, 1, 20), "b": rng.normal(50, 1, 20)}
        low, high = statistics.interval_of(
            lambda s: np.mean([np.mean(x) for x in s.values()]), scores, resamples=200, seed=i
        )
        hits += low <= 25 <= high
    assert 0.88 <= hits / 200 <= 0.98
    # Tasks are never mixed: without spread inside the tasks there is no interval
    low, high = statistics.interval_of(statistics.iqm, {"a": [1.0] * 4, "b": [99.0] * 4})
    assert low == high == 50.0


def test_a_paired_difference_is_of_the_same_seeds():
    x, y = np.array([10.0, 60.0, 30.0]), np.array([9.0, 58.0, 27.0])
    mean, low, high = statistics.paired(x, y)
    half = 4.302653 * 1.0 / 3**0.5  # Student's t with two degrees of freedom, deviation 1
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))


# --- Grid and tables ---


def test_every_row_of_the_grid_is_a_run_that_would_start(tmp_path):
    rows = list(results.grid(results.GRID))
    assert len({row.name for row in rows}) == len(rows)
    blocks = [(row.agent, row.task) for row in rows]  # every arm of a task before the next task
    assert len(list(itertools.groupby(blocks))) == len(set(blocks)) == len(rows) / 3
    for row in rows:
        words = row.command(tmp_path)
        given = flags.parse(words[:-2])
        flags.check(given)
        flags.check_agent(given, flags.sweep_points(given))
        weight, values = results.PULL[row.agent], results.weights_of(row.agent, row.task)
        points = flags.sweep_points(given)
        assert given.hyper[weight] == values[0]  # the first is the published one
        if row.arm == "log":
            assert {p[f"hyper.{weight}"] for p in points} == set(values)
        elif row.arm == "diffusion":
            assert {p["guidance"] for p in points} == {0.0, flags.guidance_of(row.agent)}


def test_weights_begin_with_the_published_one_and_pull_less_and_less():
    assert results.weights_of("td3_bc", "reacher-random@1000") == [2.5, 10.0, 40.0]
    assert results.weights_of("iql", "pendulum-random") == [3.0, 12.0, 48.0]
    assert results.weights_of("rebrac", "collect:halfcheetah-random") == [0.001, 0.00025, 0.0000625]


def test_models_are_fitted_once_per_log(tmp_path):
    """A later agent takes the models of the first, from a row that comes before its own."""
    rows = list(results.grid(results.GRID))
    seen, fits = set(), []
    for row in rows:
        words = row.command(tmp_path)
        if "--denoiser" in words:
            assert words[words.index("--denoiser") + 1] in seen
        elif row.arm != "log":
            fits.append((row.task, row.arm))
        seen.add(str(tmp_path / row.name))
        (tmp_path / row.name).mkdir(parents=True)
        (tmp_path / row.name / "final.json").touch()
    assert len(fits) == len(set(fits)) == 2 * len({row.task for row in rows})
    shutil.rmtree(tmp_path / "reacher-random")  # where a folder is gone, the row fits its own
    assert not any("--denoiser" in r.command(tmp_path) for r in rows if r.task == "reacher-random")


def fill(out, guided, tasks=("easy", "hard"), seeds=4):
    """Scores in which the log alone has 10 at weight 2.5, 20 at 10 and 2 at 40, unguided data 5
    more."""
    lines = [
        {"task": task, "agent": "td3_bc", "arm": arm, "weight": weight, "seed": seed,
         "score": base + {2.5: 0, 10.0: 10, 40.0: -8}[weight] + seed, "return": 0.0}
        for task in tasks
        for arm, base in [("log alone", 10), ("unguided", 15), ("guided", guided)]
        for weight in (2.5, 10.0, 40.0)
        for seed in range(seeds)
    ]  # fmt: skip
    results.save_table(out / "scores.csv", lines)
    curves = [
        {"task": task, "agent": "td3_bc", "arm": arm, "weight": 2.5, "updates": 1_000 * i,
         "mean": 5.0 * i, "low": 0.0, "high": 9.0, "seeds": seeds}
        for task in tasks for arm in ("unguided", "guided") for i in (1, 2, 3)
    ]  # fmt: skip
    results.save_table(out / "curves.csv", curves)
    rows = [
        {"task": task, "agent": "td3_bc", "row": "log", "command": "python pgd.py", "steps": 100,
         "behaviour_score": 3.0, "runs": 8, "diverged": 0, "minutes_fit": 1.0, "minutes": 2.0,
         "on": "2 CPU cores"}
        for task in tasks
    ]  # fmt: skip
    results.save_table(out / "rows.csv", rows)


def cells(table: str) -> dict[str, list[str]]:
    """A table -> {first cell: the others}."""
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_tables_come_from_the_scores(tmp_path):
    fill(tmp_path, guided=40)
    made = results.tables(tmp_path)
    interval = 3.182446 * np.std(range(4), ddof=1) / 2  # Student's t, three degrees of freedom
    at = lambda mean: f"{mean:.1f} ({mean - interval:.1f} to {mean + interval:.1f})"
    table = cells(made["td3_bc-scores"])
    assert table["log"] == ["behaviour policy", "seeds", *results.COLUMNS]
    assert table["easy"] == ["3.0", "4", at(11.5), at(21.5) + " at 10", at(16.5), at(41.5), ""]
    # Guided data add the same in every seed, so that the paired interval has no width
    paired = cells(made["td3_bc-paired"])["easy"]
    assert paired == [f"+{x}.0 (+{x}.0 to +{x}.0)" for x in (5, 30, 20, 25)] + [
        "", "-8.0 (-8.0 to -8.0)"
    ]  # fmt: skip
    total = cells(made["td3_bc-aggregate"])
    assert total["log alone"][0] == "2" and total["log alone"][1].startswith("11.5 (")
    assert total["log alone, best weight"][1].startswith("21.5 (")
    assert total["log alone"][2] == "1.00 (1.00 to 1.00)" and total["guided"][2] == ""
    # The log alone ends at 11.5; the curves pass it after 3,000 updates
    assert cells(made["td3_bc-pace"])["easy"] == ["3,000", "3,000", ""]
    assert results.draw_gains(tmp_path) == ["gains.png"]
    assert (tmp_path / "gains.png").stat().st_size > 10_000


def test_a_log_of_development_has_no_part_in_the_aggregate(tmp_path, monkeypatch):
    fill(tmp_path, guided=40)
    monkeypatch.setattr(results, "DEVELOPMENT", {"hard"})
    made = results.tables(tmp_path)
    assert cells(made["td3_bc-aggregate"])["guided"][0] == "1"
    assert "hard" in made["td3_bc-scores"]
    monkeypatch.setattr(results, "DEVELOPMENT", {"hard", "easy"})
    assert len(cells(results.tables(tmp_path)["td3_bc-aggregate"])) == 2  # its head alone
    results.report(tmp_path, [])
    assert not (tmp_path / "profiles.png").exists()  # there is nothing to draw
    monkeypatch.setattr(results, "DEVELOPMENT", {"hard"})
    results.report(tmp_path, [])
    assert (tmp_path / "profiles.png").exists()


def test_a_column_that_lacks_a_task_has_no_part_in_the_aggregate(tmp_path):
    fill(tmp_path, guided=40)
    lines, found = results.read(tmp_path / "scores.csv"), {}
    for tasks in (("easy",), ("easy", "hard")):
        more = [x | {"arm": "world model"} for x in lines
                if x["arm"] == "log alone" and x["task"] in tasks]  # fmt: skip
        results.save_table(tmp_path / "scores.csv", lines + more)
        made = results.tables(tmp_path)
        assert cells(made["td3_bc-scores"])["easy"][-1] != ""
        found[tasks] = cells(made["td3_bc-aggregate"]).get("world model")
    assert found[("easy",)] is None and found[("easy", "hard")][0] == "2"


def test_the_legend_names_the_curves_of_every_panel():
    figure, axes = figures.new_figure(1, 2)
    for ax, labels in zip(axes[0], [("guided",), ("guided", "world model")]):
        for label in labels:
            figures.line(ax, [0, 1], [(0, 0, 0), (1, 1, 1)], label)
    figures.add_legend(figure)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["guided", "world model"]


def test_a_worse_guide_is_reported_as_worse(tmp_path):
    fill(tmp_path, guided=0)
    made = results.tables(tmp_path)
    assert cells(made["td3_bc-paired"])["hard"][3] == "-15.0 (-15.0 to -15.0)"
    assert cells(made["td3_bc-aggregate"])["unguided"][2] == "0.00 (0.00 to 0.00)"


def test_a_task_without_all_of_its_arms_is_not_reported(tmp_path):
    fill(tmp_path, guided=40)
    half = {"task": "new", "agent": "td3_bc", "arm": "log alone", "weight": 2.5, "seed": 0}
    lines = results.read(tmp_path / "scores.csv") + [half | {"score": 1.0, "return": 0.0}]
    results.save_table(tmp_path / "scores.csv", lines)
    assert "new" not in results.tables(tmp_path)["td3_bc-scores"]


def test_tables_go_between_their_marks_and_nowhere_else():
    page = "before\n<!-- a -->\n\nold\n\n<!-- end -->\nbetween\n<!-- b -->\n<!-- end -->\nafter\n"
    once = results.put_tables(page, {"a": "| new |", "b": "| other |", "c": "| lost |"})
    assert once.startswith("before\n<!-- a -->\n\n| new |\n\n<!-- end -->\nbetween\n")
    assert once.endswith("<!-- b -->\n\n| other |\n\n<!-- end -->\nafter\n")
    assert results.put_tables(once, {"a": "| new |", "b": "| other |"}) == once


def test_pages_show_the_tables_of_the_files():
    """`python -m studies.results --report` was run after the last change of the results."""
    made = results.tables(ROOT / "results" / "study")
    for page in ("docs/results.md", "README.md"):
        text = (ROOT / page).read_text()
        assert results.put_tables(text, made) == text
        assert {*re.findall("<!-- (.*) -->", text)} <= {*made, "end"}  # none is left of a lost row


HALF, LAST = (lambda x: np.mean(x[len(x) // 2 :])), (lambda x: x[-1])  # of the evaluations


@pytest.mark.parametrize(
    "folder, setting, page, measures",
    [
        ("alpha40", "guidance", "ablation", (HALF, LAST)),
        ("alpha40/lambda", "guidance", "ablation", (HALF, LAST)),
        ("alpha40/half_real", "guidance", "ablation", (HALF, LAST)),
        ("alpha40/half_real_unguided", "guidance", "ablation", (HALF, LAST)),
        ("tau/log", "hyper.alpha", "ablation", (LAST,)),
        ("tau/synthetic", "guidance", "ablation", (LAST,)),
        ("iql/pendulum-medium-replay", "guidance", "ablation", (HALF,)),
        ("iql/pendulum-medium-replay-log", "hyper.beta", "ablation", (HALF,)),
        ("iql/pendulum-random", "guidance", "ablation", (HALF,)),
        ("iql/pendulum-random-log", "hyper.beta", "ablation", (HALF,)),
        ("iql/reacher-random", "guidance", "ablation", (HALF,)),
        ("iql/reacher-random-log", "hyper.beta", "ablation", (HALF,)),
        ("calls/4", None, "ablation", (HALF,)),
        ("calls/8", None, "ablation", (HALF,)),
        ("calls/16", None, "ablation", (HALF,)),
        ("calls/32", None, "ablation", (HALF,)),
        ("behaviour", "behaviour_guidance", "ablation", (HALF,)),
        ("rebrac/reacher-random", "guidance", "ablation", (HALF,)),
        ("rebrac/pendulum-random", "guidance", "ablation", (HALF,)),
        ("rebrac/reacher-random-log", "hyper.actor_bc", "ablation", (HALF,)),
        ("rebrac/pendulum-random-log", "hyper.actor_bc", "ablation", (HALF,)),
        ("awac", "guidance", "ablation", (HALF,)),
        ("awac/log", None, "ablation", (HALF,)),
        ("hopper_alpha/log", "hyper.alpha", "ablation", (HALF,)),
        ("hopper_alpha/published", "guidance", "ablation", (HALF,)),
        ("hopper_alpha", ("guidance", "hyper.alpha"), "ablation", (HALF,)),
        ("swimmer_cut", "hyper.alpha", "logs", (LAST,)),
        *((f"n_step/hopper-{n}", "guidance", "ablation", (HALF,)) for n in (1, 3, 5)),
        *((f"n_step/hopper-log-{n}", "hyper.alpha", "ablation", (HALF,)) for n in (3, 5, 10)),
        *((f"n_step/hopper-iql-{n}", None, "ablation", (HALF,)) for n in (1, 5)),
        ("n_step/swimmer-random-3", None, "ablation", (HALF, LAST)),
        ("n_step/reacher-medium-replay-3", None, "ablation", (HALF, LAST)),
    ],
)
def test_a_page_shows_the_scores_of_the_runs_that_it_names(folder, setting, page, measures):
    path, text = ROOT / "results" / "guide" / folder, (ROOT / "docs" / f"{page}.md").read_text()
    assert f"results/guide/{folder})" in text
    scores = {}
    for row in csv.DictReader(open(path / "metrics.csv")):
        point = tuple(row.get(key) for key in np.atleast_1d(setting))
        of_point = scores.setdefault(point, {})
        of_point.setdefault(row["seed"], []).extend([float(row["score"])] if row["score"] else [])
    for of_seed, measure in itertools.product(scores.values(), measures):
        assert ope.spread_of([measure(x) for x in of_seed.values()]) in " ".join(text.split())


def test_the_page_shows_how_critics_order_actions():
    page = " ".join((ROOT / "docs" / "ablation.md").read_text().split())
    rows = list(csv.DictReader(open(ROOT / "results" / "guide" / "alpha40" / "values.csv")))
    points = {(r["run"], r["point"]) for r in rows}
    assert len(points) == 4
    for point in points:
        orders = [float(r["order"]) for r in rows if (r["run"], r["point"]) == point]
        assert len(orders) == 8 and ope.spread_of(orders, 2) in page


def test_the_page_shows_the_second_half_of_the_log_alone_at_alpha_40():
    scores = {}
    for r in csv.DictReader(open(ROOT / "results" / "guide" / "alpha40" / "log" / "metrics.csv")):
        if r["score"] and float(r["hyper.alpha"]) == 40:
            scores.setdefault(r["seed"], []).append(float(r["score"]))
    half = ope.spread_of([HALF(x) for x in scores.values()])
    assert f"| {half} |" in (ROOT / "docs" / "ablation.md").read_text()


def test_the_page_shows_what_less_noise_on_observations_adds():
    """The former rows of the grid against today's, seed by seed."""
    found = []
    for path in (ROOT / "results/guide/obs_noise/equal.csv", ROOT / "results/study/scores.csv"):
        found.append({})
        for r in csv.DictReader(open(path)):
            if r["agent"] == "td3_bc" and r["arm"] in ("unguided", "guided"):
                of_seed = found[-1].setdefault((r["task"], r["arm"]), {})
                of_seed[int(r["seed"])] = float(r["score"])
    page, (old, new) = (ROOT / "docs/ablation.md").read_text(), found
    both = {k for k in old.keys() & new.keys() if not k[0].startswith("collect:")}  # other flags
    assert len(both) >= 4
    for task, arm in both:
        x, y = old[task, arm], new[task, arm]
        cells = results.cell(list(x.values())), results.cell(list(y.values()))
        assert f"| {arm} | {' | '.join(cells)} | {results.difference(y, x)} |" in page


def test_a_second_look_at_a_row_replaces_the_first(tmp_path):
    path, row = tmp_path / "rows.csv", results.Row("a", "td3_bc", "log", "")
    other = {"task": "a", "agent": "td3_bc", "row": "diffusion", "minutes": 1.0, "steps": 1000191}
    results.save_table(path, [other, other | {"row": "log", "minutes": 2.0}])
    results.keep(path, row, [other | {"row": "log", "minutes": 3.0}])
    assert [(x["row"], x["minutes"]) for x in results.read(path)] == [("diffusion", 1), ("log", 3)]
    assert all(x["steps"] == 1000191 for x in results.read(path))  # to the last digit
    assert results.is_done(row, tmp_path) and not results.is_done(row._replace(task="b"), tmp_path)


@pytest.mark.slow
def test_a_miniature_of_the_grid_resumes_and_reports(tmp_path, monkeypatch, capsys):
    """One task and two agents: rows on the log alone and on unguided and guided data."""
    monkeypatch.setattr(results, "QUICK", results.QUICK + " --fit-steps 40 --fit-chunk 20")
    monkeypatch.setattr(results, "ARMS", dict(list(results.ARMS.items())[:2]))
    monkeypatch.chdir(tmp_path)
    ask = ["--quick", "--only", "pendulum", "--out", "out"]
    results.study([*ask, "--list"])
    assert capsys.readouterr().out.count("missing") == 4 and not Path("out").exists()
    results.study(ask)
    made = results.tables(tmp_path / "out")
    assert "pendulum-random@2000" in made["td3_bc-scores"] and "iql-scores" in made
    commands = [x["command"] for x in results.read(tmp_path / "out" / "rows.csv")]
    assert len(commands) == 4 and made["cost"].count("\n| pendulum-random@2000 |") == 4
    shared = [x for x in commands if "--denoiser out/runs/pendulum-random@2000/td3_bc/diff" in x]
    assert len(shared) == 1 and not any("(2.5" in x for x in commands)
    assert all((tmp_path / "out" / name).stat().st_size for name in ("curves.png", "profiles.png"))
    assert not (tmp_path / "out" / "gains.png").exists()  # of one log
    lines = results.read(tmp_path / "out" / "scores.csv")
    assert len(lines) == 2 * 2 * (3 + 2)  # agents, seeds; weights, unguided and guided

    # What is done is not run again; a row whose results are lost is taken from its folder
    ran = []
    monkeypatch.setattr(results, "run", lambda row, folder: ran.append(row.arm))
    results.study(ask)
    assert ran == []
    for name in ("rows.csv", "scores.csv"):
        kept = [x for x in results.read(tmp_path / "out" / name) if "log" in (x.get("row", ""),)]
        shutil.copy(tmp_path / "out" / name, tmp_path / f"before-{name}")
        if name == "rows.csv":
            results.save_table(tmp_path / "out" / name, kept)
    results.study(ask)
    assert ran == ["diffusion"] * 2
    same = lambda path: sorted(map(str, results.read(path)))
    assert same(tmp_path / "out" / "scores.csv") == same(tmp_path / "before-scores.csv")


def test_mistakes_are_one_line(tmp_path):
    for words, said in [
        (["--only", "nothing"], "no task begins with nothing"),
        (["--quick"], "--quick needs --out"),
        (["--report", "--out", str(tmp_path)], "run the study first"),
    ]:
        with pytest.raises(UserError, match=said):
            results.study(words)


def test_a_row_that_fails_stops_the_study(tmp_path):
    row = results.Row("no-such-task", "td3_bc", "log", "--num-seeds 1")
    with pytest.raises(UserError, match="no-such-task/td3_bc/log stopped with exit status 2"):
        results.run(row, tmp_path)


def test_every_column_has_a_colour_of_its_own():
    assert len({figures.COLOURS[column] for column in results.COLUMNS}) == len(results.COLUMNS)
