"""Learning curves of several runs in one figure, and what each scores above the first.

    python -m studies.curves "log alone=runs/log" "guided=runs/guided" --out results/curves

Each word is LABEL=RUN_DIR. The runs have the same seeds and no sweep. The table has each run's
score over the second half of the updates that all of them have made: the mean over evaluations and
seeds, with its 95 % interval over the seeds, and the difference to the first run, seed by seed. It
is saved as curves.csv beside the figure, curves.png.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from host.errors import UserError
from studies import figures
from studies.common import Parser, markdown_of, run_study, save_table
from studies.results import cell, difference


def read_curve(path: Path) -> dict[int, dict[int, float]]:
    """A run's folder -> {updates: {seed: score}}. UserError for a sweep, or without scores."""
    file = path / "metrics.csv"
    if not file.is_file():
        raise UserError(f"{path} has no metrics.csv; give the folder of a run")
    curve: dict[int, dict[int, float]] = {}
    with file.open() as f:
        for line in csv.DictReader(f):
            scores = curve.setdefault(int(line["updates"]), {})
            if int(line["seed"]) in scores:
                raise UserError(f"{path} is a sweep; give runs with one value of every setting")
            if not line.get("score"):
                raise UserError(
                    f"{path} has rounds without a score; give runs of a known simulator"
                )
            scores[int(line["seed"])] = float(line["score"])
    return curve


def second_half(curve: dict, updates: Sequence[int]) -> dict[int, float]:
    """-> {seed: mean score over the second half of `updates`}."""
    late = [curve[u] for u in updates if u > updates[-1] / 2]
    return {seed: float(np.mean([scores[seed] for scores in late])) for seed in late[0]}


def compare(curves: dict[str, dict]) -> list[dict]:
    """{label: curve} -> a row per run. Raises UserError where updates or seeds differ."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    if not shared:
        raise UserError("the runs have no number of updates in common; use the same --updates")
    means = {label: second_half(curve, shared) for label, curve in curves.items()}
    first, rows = next(iter(means.values())), []
    for label, scores in means.items():
        if set(scores) != set(first):
            raise UserError(f"{label} has other seeds than the first run; use the same seeds")
        row = {"trained on": label, "seeds": len(first), "updates": f"{shared[-1]:,}"}
        row |= {"score": cell(list(scores.values()))}
        rows.append(row | {"above the first": difference(scores, first) if rows else ""})
    return rows


def draw(path: Path, curves: dict[str, dict], title: str) -> None:
    """{label: {updates: {seed: score}}} -> a curve per run, with its 95 % interval over seeds."""
    figure, axes = figures.new_figure(1, 1, 5.5, 3.6)
    for i, (label, curve) in enumerate(curves.items()):
        bands = [figures.band(list(scores.values())) for scores in curve.values()]
        colour = figures.COLOURS.get(label, figures.ORDER[i % 4])
        dash = ("-", "--", ":")[i // 4 % 3]  # of the curves that take a colour again
        figures.line(axes[0, 0], list(curve), bands, label, colour, ls=dash)
    axes[0, 0].set(xlabel="agent updates", ylabel=figures.NAMES["score"], title=title)
    axes[0, 0].legend()
    figures.save_figure(path, figure)


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    parser = Parser("curves", __doc__)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN_DIR", help="runs to compare")
    parser.add_argument("--title", default="", help="title of the figure")
    parser.add_argument("--out", required=True, help="folder of the figure and the table")
    args = parser.parse_args(argv)
    curves = {}
    for word in args.runs:
        label, equals, folder = word.partition("=")
        if not equals or not label or label in curves:
            raise UserError(
                f"each run needs a label of its own, as in guided=runs/mine; not {word}"
            )
        curves[label] = read_curve(Path(folder))
    rows, out = compare(curves), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    save_table(out / "curves.csv", rows)
    draw(out / "curves.png", curves, args.title)
    print(markdown_of(rows))
    print(f"\nsaved: {out}/ (curves.png, curves.csv)")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("curves", study, argv)


if __name__ == "__main__":
    main()
