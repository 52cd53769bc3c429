"""What kills, damage, rivals and a full disk do to a run.

    python -m studies.faults                       # 200 kills and all other faults, half an hour
    python -m studies.faults --kills 2 --others 1  # a miniature
    python -m studies.faults --minutes 60          # memory of one run over an hour, nothing else

Every fault is made for real, on a run of pgd.py in a process of its own. The run then goes on by
--resume. It counts as "same" if it ends with the very files of a run that nothing happened to, as
"refused" if it ends with one line on standard error and status 2, and as "wrong" otherwise. The
counts go into results/faults/faults.csv. The exit status is 1 if any is wrong.
"""

import contextlib
import csv
import functools
import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from host import d4rl
from host.errors import UserError
from host.export import write_minari
from host.files import say, write_arrays
from host.progress import counted
from studies.common import Parser, run_study, save_table

ROOT = Path(__file__).resolve().parent.parent
RUN = (
    "--preset smoke --num-seeds 2 --features 8 --fit-steps 200 --fit-chunk 20 --rounds 8 "
    "--updates 20 --trajectories 16 --sample-batch 16 --eval-episodes 1 --hyper.hidden 16 16"
).split()
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONGEST = 300  # seconds after which a process counts as hanging


class Ended(NamedTuple):
    """How a process ended."""

    status: int  # negative: killed by that signal
    said: str  # on standard error


class Bench:
    """A folder for the victims, and the files of a run that nothing happened to."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.count = folder, random.Random(seed), 0
        start = time.monotonic()
        whole = self.new()
        ended = self.run(whole)
        if ended.status:
            raise UserError(f"the run without a fault failed: {ended.said[-300:]}")
        self.seconds, self.wanted = time.monotonic() - start, content(whole)

    def new(self) -> Path:
        """-> a place for a new run."""
        self.count += 1
        return self.folder / f"run{self.count}"

    def start(self, out: Path, *more: str, limit: int | None = None) -> subprocess.Popen:
        """Begin a run, or go on with one where there is a folder. limit: KiB of a file."""
        begun = (out / "config.json").exists()
        args = ["--resume", str(out)] if begun else [*RUN, "--out", str(out), *more]
        capped = ["bash", "-c", f'ulimit -f {limit} && exec "$@"', "bash"] if limit else []
        return subprocess.Popen(
            [*capped, sys.executable, str(ROOT / "pgd.py"), *args],
            env=os.environ | {"PGD_SAVE_EVERY": "0"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, out: Path, *more: str, limit: int | None = None) -> Ended:
        """A whole run, or the rest of one -> how it ended."""
        return ended(self.start(out, *more, limit=limit))

    def verdict(self, out: Path) -> str:
        """Go on with a run -> same, refused or wrong."""
        last = self.run(out)
        if last.status == 0 and content(out) != self.wanted:
            return "wrong"
        return judged(last)

    def data(self, *args: str, **more: str) -> Ended:
        """A command of data.py, in an environment with `more` -> how it ended."""
        return ended(
            subprocess.Popen(
                [sys.executable, str(ROOT / "data.py"), *args], env=os.environ | more,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip


def judged(last: Ended) -> str:
    """How a process ended -> same, refused or wrong, as far as that can be seen from outside."""
    if last.status == 0:
        return "same"
    one_line = last.status == 2 and last.said.strip().count("\n") <= 2
    return "refused" if one_line and "Traceback" not in last.said else "wrong"


def ended(process: subprocess.Popen) -> Ended:
    """Wait for a process -> how it ended; one that hangs is killed."""
    try:
        said = process.communicate(timeout=LONGEST)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        said = process.communicate()[1] + "\nTraceback: it hung"
    return Ended(process.returncode, said)


def content(out: Path) -> dict:
    """A finished run's folder -> what two runs of the same settings have in common; also the names
    of files that should not be left."""
    final = json.loads((out / "final.json").read_text())
    final.pop("wall_seconds")
    with np.load(out / "checkpoint" / "state.npz", allow_pickle=False) as f:
        digest = hashlib.sha256()
        for name in sorted(set(f.files) - {"about"}):  # which holds wall times
            digest.update(f[name].tobytes())
    return {
        "final": final,
        "metrics": (out / "metrics.csv").read_bytes(),
        "arrays": digest.hexdigest(),
        "left": sorted(p.name for p in out.rglob("*.part")),
    }


# --- The faults: each yields a verdict per try ---


def kills(bench: Bench, num: int, aimed: bool) -> Iterator[str]:
    """Kill runs by SIGKILL, SIGTERM or SIGINT, up to four times each, at any time or, `aimed`, as
    soon as a checkpoint is being written. A verdict for every kill: that of the run's end."""
    done = 0
    while done < num:
        out, times = bench.new(), 0
        for _ in range(bench.rng.randint(1, 4)):
            process = bench.start(out)
            until = time.monotonic() + bench.rng.uniform(0.0, 1.1 * bench.seconds)
            while process.poll() is None and time.monotonic() < until:
                if aimed and list(out.glob("checkpoint/.*.part")):
                    break
                time.sleep(0.0005 if aimed else 0.01)
            if process.poll() is None:
                process.send_signal(bench.rng.choice(SIGNALS))
                times += 1
            last = ended(process)
            if "Traceback" in last.said and last.status >= 0:
                say(f"{out.name}: {last.said[-500:]}")
                yield "wrong"
        verdict = bench.verdict(out)
        done += times
        yield from [verdict] * times


def stopped(bench: Bench) -> Path:
    """-> the folder of a run that SIGTERM has stopped in its rounds."""
    while True:
        out = bench.new()
        process = bench.start(out)
        while process.poll() is None and not (out / "metrics.csv").exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        if ended(process).status == 128 + signal.SIGTERM:
            return out


def damages(bench: Bench, num: int) -> Iterator[str]:
    """Flip a bit of a file of a stopped run, cut it short, empty it or remove it."""
    half = stopped(bench)
    files = ["checkpoint/state.npz", "checkpoint/state.npz", "config.json", "metrics.csv"]
    for _ in range(num):
        out = bench.new()
        shutil.copytree(half, out)
        path = out / bench.rng.choice(files)
        old, how = path.read_bytes(), bench.rng.choice(["flip", "cut", "empty", "remove"])
        at = bench.rng.randrange(len(old))
        flipped = old[:at] + bytes([old[at] ^ (1 << bench.rng.randrange(8))]) + old[at + 1 :]
        new = {"flip": flipped, "cut": old[:at], "empty": b""}
        path.write_bytes(new[how]) if how in new else path.unlink()
        if path.name == "config.json" and how == "remove":
            yield "refused" if bench.run(out).status == 2 else "wrong"  # a folder that is no run
        else:
            yield bench.verdict(out)


def swaps(bench: Bench, num: int) -> Iterator[str]:
    """Put the checkpoint of a run with another seed in a run's place: only a refusal is right."""
    half, other = stopped(bench), bench.new()
    bench.run(other, "--seed", "7")
    for _ in range(num):
        out = bench.new()
        shutil.copytree(half, out)
        for name in ("state.npz", "state.previous.npz"):
            if (other / "checkpoint" / name).exists():
                shutil.copy(other / "checkpoint" / name, out / "checkpoint" / name)
        yield "refused" if bench.verdict(out) == "refused" else "wrong"


def rivals(bench: Bench, num: int) -> Iterator[str]:
    """Start two runs with the same --out: one is refused, and the other is not disturbed."""
    for _ in range(num):
        out = bench.new()
        both = [bench.start(out) for _ in range(2)]
        ends = sorted(ended(process) for process in both)
        good = [e.status for e in ends] == [0, 2] and "Traceback" not in ends[1].said
        yield "same" if good and content(out) == bench.wanted else "wrong"


def full_disks(bench: Bench, num: int) -> Iterator[str]:
    """Let no file grow beyond a size at which a run cannot be saved; then go on without a limit."""
    for _ in range(num):
        out = bench.new()
        last = bench.run(out, limit=bench.rng.randint(2, 60))
        bad = last.status != 2 or "Traceback" in last.said
        yield "wrong" if bad else bench.verdict(out)


def divergences(bench: Bench, num: int) -> Iterator[str]:
    """Sweep a learning rate of which one value diverges: the others end as they do without it."""
    alone, both = bench.new(), bench.new()
    bench.run(alone, "--sweep", "fit-lr", "0.001", "0.002")
    status = bench.run(both, "--sweep", "fit-lr", "0.001", "1e30").status
    final, wanted = (json.loads((x / "final.json").read_text()) for x in (both, alone))
    lost = {line["fit_lr"] for line in final["diverged"]}
    same = final["sweep"][0]["returns"] == wanted["sweep"][0]["returns"]
    yield "same" if status == 3 and lost == {1e30} and same else "wrong"


def hostile_sets(bench: Bench, num: int) -> Iterator[str]:
    """Open a Minari data set whose metadata.json names a command instead of an environment, and
    lacks an entry or holds another value: it may be read or refused, and nothing may be run."""
    os.environ["MINARI_DATASETS_PATH"] = str(bench.folder / "minari")
    task = data.load("collect:pendulum-medium")
    log = {name: array[:400] for name, array in task.log.items()}
    write_minari("toy/log-v0", log, task, "")
    path = bench.folder / "minari/toy/log-v0/data/metadata.json"
    sound, values = json.loads(path.read_text()), [None, 5, -1, 10**15, "", "[]", "{}", [], {}]
    for i in range(num):
        proof = bench.folder / f"proof{i}"
        spec = {"id": "Evil-v0", "entry_point": "os:system", "max_episode_steps": 5}
        spec |= {"kwargs": {"command": f"touch {proof}"}, "additional_wrappers": []}
        wrapped = {"additional_wrappers": [{**spec, "name": "Evil"}]}
        spec |= bench.rng.choice([{}, {"id": "Pendulum-v1"}, wrapped])
        changed = sound | {"env_spec": json.dumps(spec)}
        for name in bench.rng.sample(sorted(sound), bench.rng.randint(0, 3)):
            changed[name] = bench.rng.choice(values)
        for name in bench.rng.sample(["observation_space", "action_space", *sound], 2):
            changed.pop(name, None)
        path.write_text(json.dumps(changed))
        last = bench.data("info", "minari:toy/log-v0")
        yield "wrong" if proof.exists() else judged(last)


class Server(http.server.BaseHTTPRequestHandler):
    """A server, and a proxy for every other one, that sends `content` with one fault."""

    content, fault, rng = b"", "", random.Random(0)

    def do_GET(self):
        body, status, headers = self.content, 200, {"Content-Length": len(self.content)}
        cut = self.rng.randrange(len(body))
        if self.fault == "cut":
            body = body[:cut]
        elif self.fault == "cut, and nobody says so":
            body, headers = body[:cut], {}
        elif self.fault == "garbage":
            body = self.rng.randbytes(len(body))
        elif self.fault == "a web page":
            body, headers = b"<html>moved</html>", {"Content-Type": "text/html"}
        elif self.fault == "not found":
            body, status, headers = b"", 404, {}
        elif self.fault == "redirected for ever":
            body, status, headers = b"", 302, {"Location": self.path + "x"}
        elif self.fault == "resumed elsewhere":
            status, headers = 206, {"Content-Range": f"bytes {cut}-{len(body)}/*"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client has gone
            self.wfile.write(body)

    def log_message(self, *args):
        pass


SERVED = ("", "cut", "cut, and nobody says so", "garbage", "a web page", "not found",
          "redirected for ever", "resumed elsewhere")  # fmt: skip


def hostile_servers(bench: Bench, num: int) -> Iterator[str]:
    """Download a log whose hash nobody knows from a server that misbehaves: the file gets its name
    only if it is whole."""
    log = bench.folder / "served.hdf5"
    write_arrays(log, data.load("collect:pendulum-medium").log, {})
    file = d4rl.read_registry()["maze2d-umaze-v1"]
    name = d4rl.d4rl_path(file).name
    for i in range(num):
        handler = type("Handler", (Server,), {"content": log.read_bytes(), "rng": bench.rng})
        handler.fault = SERVED[i % len(SERVED)]
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place, proxy = bench.folder / f"d4rl{i}", f"http://127.0.0.1:{server.server_port}"
        here = {"D4RL_DATASET_DIR": str(place), "PGD_MIRROR": f"{proxy}/folder", "no_proxy": ""}
        last = bench.data("download", file.name, http_proxy=proxy, https_proxy=proxy, **here)
        server.shutdown()
        server.server_close()
        whole = (place / name).exists() and (place / name).read_bytes() == log.read_bytes()
        good = whole if handler.fault == "" else not (place / name).exists()
        yield judged(last) if good else "wrong"


class Fault(NamedTuple):
    """One kind of fault."""

    what: str
    make: Callable  # (bench, number of tries) -> verdicts
    share: float  # of --kills or of --others


KILLS = {
    "kills": Fault("killed at any time", functools.partial(kills, aimed=False), 0.5),
    "saves": Fault("killed while it saves", functools.partial(kills, aimed=True), 0.5),
}
OTHERS = {
    "damages": Fault("a bit flipped, a file cut, emptied or removed", damages, 4.0),
    "swaps": Fault("the checkpoint of another run", swaps, 0.5),
    "rivals": Fault("two runs with one --out", rivals, 1.0),
    "disks": Fault("no space on the disk", full_disks, 1.0),
    "divergences": Fault("one of two settings diverges", divergences, 0.1),
    "sets": Fault("a Minari data set that names a command", hostile_sets, 4.0),
    "servers": Fault("a server that sends something else", hostile_servers, 1.6),
}


def campaign(num: dict[str, int], only: Sequence[str], seed: int, path: Path) -> list[dict]:
    """-> a row per kind of fault: how many tries, and how they ended.

    num: kills and others; only: kinds to try, or none for all; path: a table, whose rows of other
    kinds are kept.
    """
    every = {k: (f, num["kills"]) for k, f in KILLS.items()}
    every |= {k: (f, num["others"]) for k, f in OTHERS.items()}
    rows = {}
    if only and path.exists():
        with open(path, newline="") as f:
            rows = {row["fault"]: row for row in csv.DictReader(f)}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), seed)
        for kind in only or every:
            fault, most = every[kind]
            counts = {"same": 0, "refused": 0, "wrong": 0}
            tries = max(1, round(fault.share * most))
            for verdict in counted(fault.make(bench, tries), fault.what, tries):
                counts[verdict] += 1
            rows[fault.what] = {"fault": fault.what, "tries": sum(counts.values())} | counts
            save_table(path, list(rows.values()))
            say(f"{fault.what}: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
    return list(rows.values())


def memory(minutes: float) -> list[dict]:
    """One run whose rounds do not end -> its memory, in MB, every ten seconds."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args = [*RUN, "--rounds", "1000000", "--updates", "500", "--out", f"{folder}/run"]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "pgd.py"), *args],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        start = time.monotonic()
        try:
            while time.monotonic() - start < 60 * minutes:
                time.sleep(10)
                if process.poll() is not None:
                    raise UserError(f"the run ended with status {process.returncode}")
                status = Path(f"/proc/{process.pid}/status").read_text()
                kb = int(status.split("VmRSS:")[1].split()[0])
                rows.append({"seconds": time.monotonic() - start, "resident_mb": kb / 1024})
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
    quarter = len(rows) // 4 or 1
    of = lambda part: float(np.median([row["resident_mb"] for row in part]))
    first, last = of(rows[quarter : 2 * quarter] or rows), of(rows[-quarter:])
    say(f"median memory of the second quarter {first:.0f} MB, of the last {last:.0f} MB, "
        f"{100 * (last / first - 1):+.1f} %")  # fmt: skip
    return rows


def study(argv: list[str]) -> None:
    """The command line. Raises UserError for a user's mistake."""
    parser = Parser("faults", __doc__)
    parser.add_argument("--kills", type=int, default=200, help="number of kills (default 200)")
    parser.add_argument("--others", type=int, default=10, help="scale of the other faults")
    kinds = [*KILLS, *OTHERS]
    parser.add_argument("--only", nargs="+", default=[], choices=kinds, help="kinds of faults")
    parser.add_argument("--minutes", type=float, help="measure memory for so long instead")
    parser.add_argument("--seed", type=int, default=0, help="of times, signals and damages")
    parser.add_argument("--out", default="results/faults", help="folder of the results")
    args = parser.parse_args(argv)
    if args.minutes:
        save_table(Path(args.out) / "memory.csv", memory(args.minutes))
        print(f"saved: {args.out}/memory.csv")
        return
    num = {"kills": args.kills, "others": args.others}
    rows = campaign(num, args.only, args.seed, Path(args.out) / "faults.csv")
    print(f"saved: {args.out}/faults.csv")
    if any(int(row["wrong"]) for row in rows):
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, with exit statuses as run_study has them."""
    run_study("faults", study, argv)


if __name__ == "__main__":
    main()
