"""Figures in one style: the same four colours everywhere, bands over seeds, axes with units.

new_figure(1, 2)                       # panels in the style
line(ax, xs, bands, "unguided")        # a curve with a band, in the colour of its name
draw_run(folder, history, final)       # curve.png, and sweep.png of a sweep
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from host.files import atomic_file
from host.run_folder import interval, swept_fields

COLOURS = {  # what each colour always means
    "log alone": "#555555",
    "log alone, best weight": "#9467bd",
    "unguided": "#1f77b4",
    "guided": "#d95f02",
    "world model": "#2ca02c",
}
ORDER = ("#1f77b4", "#d95f02", "#2ca02c", "#555555")  # of curves with other meanings
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.4, "axes.grid": True,
    "grid.alpha": 0.25, "figure.dpi": 130,
}  # fmt: skip
NAMES = {  # of measures, with units
    "return": "undiscounted return",
    "score": "normalised score",
    "log_prob_real": "log-likelihood of logged actions (nats)",
    "log_prob_synthetic": "log-likelihood of synthetic actions (nats)",
}


def new_figure(rows: int, columns: int, width: float = 4.4, height: float = 3.2, **settings):
    """-> (figure, axes (rows, columns)); width and height are each panel's, in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    size = width * columns, height * rows
    return plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **settings
    )


def save_figure(path: Path, figure) -> None:
    """Write a png, whole or not at all."""
    import matplotlib.pyplot as plt

    with atomic_file(path) as f:
        figure.savefig(f, format="png")
    plt.close(figure)


def line(ax, xs: Sequence[float], bands: Sequence, label: str, colour: str | None = None, **style):
    """bands: (mean, low, high) at each x -> a curve with a band."""
    colour = colour or COLOURS.get(label, ORDER[0])
    mean, low, high = np.array(bands, float).T
    ax.plot(xs, mean, label=label, color=colour, **style)
    ax.fill_between(xs, low, high, color=colour, alpha=0.15, lw=0)


def add_legend(figure) -> None:
    """Put a legend of the curves of all panels below them, each label once."""
    found = [ax.get_legend_handles_labels() for ax in figure.axes]
    handles = {label: handle for both in found for handle, label in zip(*both)}
    num = min(len(handles), int(figure.get_figwidth() / 1.6))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=num)


def band(values: Sequence[float]) -> tuple[float, float, float]:
    """Values over seeds -> (mean, low, high), the 95 % interval of the mean."""
    mean, ci95 = interval([float(v) for v in values])
    return (mean, *(ci95 or (mean, mean)))


def draw_run(folder: Path, history: list[dict], final: dict) -> list[str]:
    """Draw the figures of a run into its folder -> their names."""
    points = [{}]
    if "sweep" in final:
        fields = swept_fields(final["sweep"])
        points = [{name: p[name] for name in fields} for p in final["sweep"]]
    draw_curve(folder / "curve.png", history, points, final)
    if "sweep" not in final:
        return ["curve.png"]
    draw_sweep(folder / "sweep.png", fields, final)
    return ["curve.png", "sweep.png"]


def draw_curve(path: Path, history: list[dict], points: list[dict], final: dict) -> None:
    """Score, return or log-likelihood against agent updates, with a band over seeds; of a sweep, a
    curve per point, up to eight."""
    what = "log_prob_real"
    if final["returns"]:
        what = "score" if final["scores"] else "return"
    figure, axes = new_figure(1, 1, 5.5, 3.6)
    ax = axes[0, 0]
    alone = {"none": "log alone", "world-model": "world model"}.get(final["synthetic"])
    alone = alone or ("guided" if final["guidance"] else "unguided")
    for i, point in enumerate(points[:8]):
        rows = [r for r in history if point.items() <= r.items() and r.get(what) is not None]
        if not rows:
            continue
        updates = sorted({r["updates"] for r in rows})
        bands = [band([r[what] for r in rows if r["updates"] == u]) for u in updates]
        label = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in point.items()) or alone
        colour = COLOURS[alone] if point == {} else ORDER[i % 4]
        line(ax, updates, bands, label, colour, ls="-" if i < 4 else "--")
    behaviour = {"score": final["behaviour_score"], "return": final["behaviour_return"]}.get(what)
    if behaviour is not None:
        ax.axhline(behaviour, color="black", ls=":", lw=1, label="behaviour policy of the log")
    seeds = len(set(final["seeds"]))
    title = f"{final['env']}, {final['agent']}, {seeds} seed{'s' * (seeds > 1)}"
    ax.set(xlabel="agent updates", ylabel=NAMES[what], title=title)
    ax.legend()
    save_figure(path, figure)


def draw_sweep(path: Path, fields: list[str], final: dict) -> None:
    """Score, or return, and log-likelihood of synthetic actions against the first swept setting; a
    curve per value of the others, with 95 % intervals."""
    first, *others = fields
    measures = [] if final["synthetic"] == "none" else ["log_prob_synthetic"]
    if final["returns"]:
        measures = ["score" if final["scores"] else "return", *measures]
    measures = measures or ["log_prob_real"]
    figure, axes = new_figure(1, len(measures))
    groups = list(dict.fromkeys(tuple(p[f] for f in others) for p in final["sweep"]))
    for i, group in enumerate(groups):
        rows = [p for p in final["sweep"] if tuple(p[f] for f in others) == group]
        rows = sorted(rows, key=lambda p: p[first])
        label = ", ".join(f"{f.replace('_', ' ')} {v:g}" for f, v in zip(others, group))
        for ax, what in zip(axes[0], measures):
            key = {"score": "scores", "return": "returns"}.get(what, what)
            of = lambda p, key=key: [] if p.get(key) is None else np.atleast_1d(p[key]).tolist()
            found = [band(of(p)) for p in rows]  # of a point that has diverged there is nothing
            mean, low, high = np.array(found, float).T
            error = [mean - low, high - mean]
            style = {"marker": "o", "ms": 3, "capsize": 2, "color": ORDER[i % 4]}
            ax.errorbar([p[first] for p in rows], mean, error, label=label, **style)
    for ax, what in zip(axes[0], measures):
        ax.set(xlabel=first.replace("_", " "), ylabel=NAMES[what])
    behaviour = final["behaviour_score"] if measures[0] == "score" else final["behaviour_return"]
    if measures[0] in ("score", "return"):
        axes[0, 0].axhline(behaviour, color="black", ls=":", lw=1)
    if others:
        axes[0, 0].legend()
    figure.suptitle(f"{final['env']}, {final['agent']}, {len(set(final['seeds']))} seeds")
    save_figure(path, figure)
