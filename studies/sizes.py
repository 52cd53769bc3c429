"""Cost against size: time and memory of each stage of a run, and the power of the size they follow.

    python -m studies.sizes                            # every size; six minutes on two cores
    python -m studies.sizes --only steps               # log, steps or features
    python -m studies.sizes --out results/sizes

One size varies at a time: the steps of the log, the steps of a trajectory, or the denoiser's
features. The others have the value that they have in BASE. The log holds noise, of halfcheetah's
dimensions. studies/speed.py has the cost of more seeds.

Times are medians over --repeats timings, with the least and the greatest. Memory is what XLA
reserves for a program with its arguments and results; "without the log" leaves out the log's own.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

import pgd
from baselines import world_model
from host.errors import UserError
from studies.common import Parser, markdown, run_study, save_table
from studies.figures import ORDER, new_figure, save_figure
from studies.speed import measure, random_log, stages

BASE = {"log": 100_000, "steps": 32, "features": 64}
SIZES = {
    "log": [10_000, 100_000, 1_000_000, 10_000_000],
    "steps": [8, 16, 32, 64, 128],
    "features": [32, 64, 128, 256, 512],
}
SAID = {
    "log": "steps of the log",
    "steps": "steps of a trajectory",
    "features": "features of the denoiser",
}


def config_of(sizes: dict[str, int]) -> world_model.Config:
    """-> the config of these sizes, with little work of each stage."""
    return world_model.Config(
        horizon=sizes["steps"], features=sizes["features"], fit_batch=16, fit_steps=10,
        fit_chunk=10, trajectories=32, sample_batch=32, rounds=1, updates=50,
    )  # fmt: skip


def bench(axis: str, values: Sequence[int], repeats: int) -> Iterator[dict]:
    """-> a row for each value of the axis and each stage."""
    dataset, of = None, None
    for value in values:
        sizes = BASE | {axis: value}
        config = config_of(sizes)
        if of != (sizes["log"], sizes["steps"]):  # else the last one's data set will do
            dataset, of = None, (sizes["log"], sizes["steps"])
            log = random_log(sizes["log"])
            start = time.perf_counter()
            dataset = jax.block_until_ready(pgd.make_dataset(log, config))
            s = time.perf_counter() - start
            size = sum(x.nbytes for x in jax.tree.leaves(dataset)) / 1e6
            del log
            if axis == "log":
                of_data = {"ms": s * 1e3, "ms_min": s * 1e3, "ms_max": s * 1e3}
                yield {"axis": axis, "size": value, "what": "the data set is made"} | of_data | {
                    "memory_mb": size, "without_log_mb": 0.0
                }  # fmt: skip
        for what, f, args in stages(config, dataset, config.updates)[:3]:
            m = measure(f, *args, repeats=repeats)
            yield {"axis": axis, "size": value, "what": what} | m.times.ms() | {
                "memory_mb": m.memory_mb, "without_log_mb": m.memory_mb - size
            }  # fmt: skip


def exponent(rows: list[dict], column: str) -> float:
    """-> b of column = a * size^b, by least squares on logarithms."""
    x, y = (np.log([float(r[k]) for r in rows]) for k in ("size", column))
    return float(np.polyfit(x, y, 1)[0])


def curves(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """-> {(axis, stage): its rows, by size}."""
    found = {}
    for row in rows:
        found.setdefault((row["axis"], row["what"]), []).append(row)
    return found


def table(rows: list[dict]) -> str:
    """-> a table in Markdown with a line per axis and stage: its smallest and largest size,
    with their times and memory, and the exponent of the time."""
    lines = [["varied", "from, to", "stage", "ms, from", "to", "time grows as size to the",
              "MB without the log, from", "to"]]  # fmt: skip
    for (axis, what), of in curves(rows).items():
        first, last = of[0], of[-1]
        memory = [f"{r['without_log_mb']:.0f}" for r in (first, last)]
        power = f"{exponent(of, 'ms'):.2f}" if len(of) > 1 else "-"
        sizes = f"{first['size']:,}, {last['size']:,}"
        times = [f"{r['ms']:,.3g}" if r["ms"] < 1000 else f"{r['ms']:,.0f}" for r in (first, last)]
        lines.append([SAID[axis], sizes, what, *times, power, *memory])
    return markdown(lines)


def draw(path: Path, rows: list[dict]) -> None:
    """Time and memory against size on logarithmic axes, a column per axis."""
    of_axis = {}
    for (axis, what), of in curves(rows).items():
        of_axis.setdefault(axis, {})[what] = of
    figure, axes = new_figure(2, len(of_axis), 3.4, 2.8)
    for column, (axis, stages_of) in zip(axes.T, of_axis.items()):
        stages_of = sorted(stages_of.items(), key=lambda x: x[0].startswith("the data set"))
        for (what, of), colour in zip(stages_of, ORDER):
            x = [r["size"] for r in of]
            column[0].plot(x, [r["ms"] for r in of], color=colour, marker="o", ms=3, label=what)
            low, high = ([r[k] for r in of] for k in ("ms_min", "ms_max"))
            column[0].fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
            column[1].plot(x, [r["memory_mb"] for r in of], color=colour, marker="o", ms=3)
        for ax, name in zip(column, ("ms", "MB, the log included")):
            ax.set(xscale="log", yscale="log", xlabel=SAID[axis], ylabel=name)
            ax.set_xticks(x, [f"{size:g}" for size in x])
            ax.set_xticks([], minor=True)
        column[0].legend(fontsize=6)
    save_figure(path, figure)


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    parser = Parser("sizes", __doc__)
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), help="what varies")
    parser.add_argument("--most", type=int, help="leave out sizes above this")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each row")
    parser.add_argument("--out", default="runs/studies/sizes", help="folder of table and figure")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError("--repeats must be at least 1")
    jax.config.update("jax_enable_compilation_cache", False)
    rows, out = [], Path(args.out)
    for axis in args.only:
        values = [v for v in SIZES[axis] if args.most is None or v <= args.most]
        if not values:
            raise UserError(f"--most {args.most} leaves no size of {SAID[axis]}")
        for row in bench(axis, values, args.repeats):
            print(f"{SAID[axis]} {row['size']:,}: {row['what']}: {row['ms']:.3g} ms, "
                  f"{row['memory_mb']:.0f} MB", flush=True)  # fmt: skip
            rows.append(row)
    print(f"\n{table(rows)}\n")
    save_table(out / "sizes.csv", rows)
    draw(out / "sizes.png", rows)
    print(f"saved: {out}/ (sizes.csv, sizes.png)")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("sizes", study, argv)


if __name__ == "__main__":
    main()
