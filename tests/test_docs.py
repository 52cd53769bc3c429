"""What README.md and docs/ say: examples run, links lead somewhere, sizes and names hold."""

import ast
import csv
import dataclasses
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import ROOT, toy_log

import agents
import pgd
from host import flags

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, heading: str | None = None) -> str:
    """The python examples of a page, or of one of its sections."""
    text = page.read_text()
    if heading:
        text = re.split(rf"^## {re.escape(heading)}$", text, flags=re.M)[1]
        text = re.split(r"^## ", text, flags=re.M)[0]
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))


def run(code: str, folder, path: str = str(ROOT)):
    """Run an example in a folder, with these modules within reach."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


SMALL = (
    "fit_steps=20, fit_chunk=20, features=16, blocks=1, sample_steps=4, trajectories=32, "
    "sample_batch=32"
)
LOG = "import numpy\nlog = dict(numpy.load('log.npz'))\n"


@pytest.mark.slow
def test_the_readmes_example_of_copying_runs(tmp_path):
    np.savez(tmp_path / "log.npz", **toy_log())
    code = blocks(ROOT / "README.md", "Copy it").replace("fit_steps=1_000", SMALL)
    code = code.replace("updates=100", "updates=10")
    done = run(LOG + code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("(2, 128, 3)")


@pytest.mark.slow
def test_the_example_of_another_project_runs_with_pgd_alone(tmp_path):
    np.savez(tmp_path / "log.npz", **toy_log())
    (tmp_path / "pgd.py").write_text((ROOT / "pgd.py").read_text())
    code = blocks(ROOT / "docs" / "developing.md", "Use pgd.py in another project")
    code = code.replace("fit_steps=1_000, rounds=5", f"{SMALL}, rounds=2, horizon=8")
    code = code.replace("updates=100", "updates=10")
    done = run(LOG + code, tmp_path, path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("(2, 256, 3)")


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    """A small finished run with given starts."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    flags = "--preset smoke --condition-on-start --horizon 8 --eval-episodes 2 --fit-batch 64"
    command = [sys.executable, str(ROOT / "pgd.py"), *flags.split(), "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_examples_of_guides_run(conditioned, tmp_path):
    """As they stand, but on a small run and in smaller batches."""
    code = blocks(ROOT / "docs" / "guides.md", "Guides in Python")
    code = code.replace("runs/mine", str(conditioned)).replace("(128,)", "(8,)")
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    *start, zero, low, high, early1, _, _, expert = done.stdout.splitlines()
    first = np.float64(start[0].strip("[ ]").split())
    np.testing.assert_allclose(first, [-1.0, 0.0, 0.0], atol=1e-5)
    rewards = [float(line.split()[1]) for line in (zero, low, high)]
    assert rewards[0] < rewards[1] < rewards[2]
    assert early1.startswith("early1 ") and np.isfinite(float(expert.split()[1]))


def test_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 12_000


@pytest.mark.parametrize(
    "label, preset",
    [
        ("`default`, gymnax tasks", "default"), ("`default`, other logs", "default-large"),
        ("`laptop`", "laptop"), ("`smoke`", "smoke"), ("`paper`", "paper"),
    ],
)  # fmt: skip
def test_the_table_of_presets_has_the_codes_values(label, preset):
    c = types.SimpleNamespace(**dataclasses.asdict(pgd.Config()) | flags.PRESETS[preset])
    page = (ROOT / "docs" / "presets.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith(f"| {label} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1].startswith(f"{c.features:,} features, {c.levels} level")
    assert f", {c.blocks} block" in cells[1]
    fit = f"{c.fit_steps:,} steps of {c.fit_batch} windows"
    assert cells[2:6] == [str(c.horizon), fit, f"{c.rounds} × {c.updates:,}", f"{c.trajectories:,}"]
    assert f"{c.sample_steps} levels" in cells[6]


def test_pgd_keeps_its_budget():
    text = (ROOT / "pgd.py").read_text()
    assert len(text.splitlines()) <= 800
    tree = ast.parse(text)

    def depth(node) -> int:
        inner = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
        return inner + isinstance(node, ast.FunctionDef)

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
    assert depth(tree) <= 3
    imported = {
        (name.name if isinstance(node, ast.Import) else node.module).split(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert not imported & {"agents", "data", "host", "baselines", "studies", "tyro", "gymnax"}


def test_the_root_shows_three_modules():
    assert {p.name for p in ROOT.glob("*.py")} == {"pgd.py", "agents.py", "data.py"}


def test_every_function_of_the_equation_table_is_in_pgd():
    import pgd

    text = (ROOT / "README.md").read_text()
    table = text.split("## Equation to function")[1].split("\n## ")[0]
    names = [name for line in table.splitlines()[3:] for name in re.findall(r"`(\w+)`", line)]
    assert len(names) > 10
    for name in names:
        assert hasattr(pgd, name), name


def test_the_table_of_faults_is_the_campaigns():
    text = (ROOT / "docs/run-folder.md").read_text()
    with open(ROOT / "results/faults/faults.csv", newline="") as f:
        rows = [f"| {' | '.join(row)} |" for row in csv.reader(f)][1:]
    assert len(rows) == 9 and all(row in text for row in rows)
    with open(ROOT / "results/faults/memory.csv", newline="") as f:
        resident = [float(row["resident_mb"]) for row in csv.DictReader(f)]
    quarter = len(resident) // 4
    last = np.median(resident[-quarter:])
    grown = 100 * (last / np.median(resident[quarter : 2 * quarter]) - 1)
    assert f"{grown:.1f} % above that of the second, {last:.0f}" in " ".join(text.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target, section in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", page.read_text()):
        if not target.startswith("http"):
            to = page.parent / target if target else page
            assert to.exists(), f"{page.name}: {target}"
            assert not section or section in sections(to), f"{page.name}: {target}#{section}"


def sections(page) -> set[str]:
    """The names by which a link reaches each heading of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)  # code has comments
    heads = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_flags_that_pages_name_exist(page):
    from host import flags

    known = {flags.dashed(f.name) for f in flags.all_flags()} | {"--help", "--help-all"}
    known |= {f"--no-{name[2:]}" for name in known}
    hyper = {name for agent in agents.AGENTS for name in agents.hyperparameters(agent)}
    known |= {flags.dashed(f"hyper.{name}") for name in hyper}
    for line in page.read_text().splitlines():
        for command in re.findall(r"python pgd\.py([^`|#]*)", line):
            for flag in re.findall(r"(?<!\S)--[a-z][a-z.-]*", command):
                assert flag in known, f"{page.name}: {flag} in {line}"


def test_every_mutant_still_applies():
    import mutants

    assert len(mutants.MUTANTS) >= 60
    assert not [m for m in mutants.MUTANTS if mutants.problem(m)]
