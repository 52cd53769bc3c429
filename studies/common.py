"""What every study shares: its command line, its folder and its tables.

run_study("claims", study, argv)       # mistakes in one line, exit status 2, and 130 on Ctrl-C
own, flags = split_flags(argv)         # flags for a run come after --
save_table(folder / "rows.csv", rows)  # a list of dicts with the same keys
"""

import argparse
import csv
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from host import collect, devices
from host.errors import UserError
from host.files import atomic_file


class Parser(argparse.ArgumentParser):
    """A parser whose --help is the study's docstring and its flags; mistakes are a UserError."""

    def __init__(self, name: str, doc: str):
        super().__init__(
            prog=f"python -m studies.{name}",
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise UserError(message)


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command line -> (the study's own words, the flags of a run, which come after --)."""
    argv = list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def run_study(
    name: str, study: Callable, argv: Sequence[str] | None, interrupted: str = "nothing is saved"
) -> None:
    """Call study(argv), where None stands for the program's own command line.

    Exit status 0 only if all is saved, 2 for a user's mistake, 130 after Ctrl-C. interrupted: what
    to tell the user after Ctrl-C.
    """
    try:
        devices.enable_cache(collect.cache_dir() / "compiled")
        study(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, MemoryError) as e:
        print(f"studies.{name}: {' '.join(str(e).split()) or type(e).__name__}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"studies.{name}: interrupted; {interrupted}", file=sys.stderr)
        if argv is not None:
            sys.exit(130)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # XLA may be compiling, and would crash on an orderly way out


def is_file(task: str) -> bool:
    """True if a task is the path of a log, and not a name."""
    return task.endswith((".hdf5", ".npz"))


def folder_of(task: str) -> Path:
    """A task's name or the path of its log -> the folder of its studies."""
    name = Path(task).stem if is_file(task) else re.sub(r"[^\w.-]+", "-", task)
    return Path("runs") / "studies" / name


def save_table(path: Path, rows: list[dict]) -> None:
    """Write rows with the same keys as csv, numbers to six digits, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, (str, int)) else f"{v:.6g}" for k, v in row.items()})
    with atomic_file(path) as f:
        f.write(text.getvalue().encode())


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first being the heads -> a table in Markdown."""
    first, *others = lines
    every = [first, ["---"] * len(first), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def markdown_of(rows: Sequence[dict]) -> str:
    """Rows with the same keys -> a table in Markdown, numbers to four digits."""
    text = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    return markdown([list(rows[0]), *(list(map(text, row.values())) for row in rows)])
