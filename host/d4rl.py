"""D4RL's data sets: the registry of their addresses, hashes and reference returns; downloads.

file = read_registry()["hopper-medium-v2"]
path, checked = download(file)                     # resumed where it stopped, and verified
"""

import csv
import errno
import fcntl
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from host.errors import UserError
from host.files import DAMAGE, atomic_file, make_folder, offline, own_dataset, require, say

REGISTRY = Path(__file__).resolve().parent / "d4rl_registry.csv"
HOST = "http://rail.eecs.berkeley.edu/"  # of every file in the registry
SECOND = "https://huggingface.co/datasets/imone/D4RL/resolve/main"  # holds D4RL's files as they are
STALL = 20.0  # seconds without a byte before the connection is given up and opened again
DISK = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)  # errors of the disk, not the host


class Unreachable(Exception):
    """D4RL's file could not be fetched from its host; no file on disk is wrong."""


class D4rlFile(NamedTuple):
    """One row of d4rl_registry.csv."""

    name: str  # with its version, e.g. hopper-medium-v2
    url: str
    size: int  # bytes; 0 if unknown
    sha256: str  # hexadecimal; empty if unknown
    reference: tuple[float, float]  # undiscounted returns with scores 0 and 100
    limit: int  # maximal steps per episode


def read_registry() -> dict[str, D4rlFile]:
    """-> {name with version: D4rlFile}, in the order of d4rl_registry.csv."""
    known = {}
    with open(REGISTRY, newline="") as f:
        for row in csv.DictReader(f):
            known[row["dataset"]] = D4rlFile(
                name=row["dataset"],
                url=row["url"],
                size=int(row["bytes"] or 0),
                sha256=row["sha256"],
                reference=(float(row["ref_min_score"]), float(row["ref_max_score"])),
                limit=int(row["max_episode_steps"]),
            )
    return known


def d4rl_path(file: D4rlFile) -> Path:
    """The path at which the d4rl package keeps the file, in $D4RL_DATASET_DIR or
    ~/.d4rl/datasets."""
    folder = os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")
    return Path(folder).expanduser() / file.url.rsplit("/", 1)[1]


# --- Download ---


def download(file: D4rlFile, mirror: str | None = None) -> tuple[Path, str]:
    """Fetch the file unless it is in the cache folder -> (path, a phrase that says what was
    checked).

    mirror, or $PGD_MIRROR: addresses of folders that hold D4RL's files under their own names,
    separated by blanks. They are tried first, then D4RL's own host, then for a file of known hash a
    public copy. An interrupted download resumes
    where it stopped. A lock keeps two processes from fetching the same file at once. The file gets
    its final name only when it opens as a log and its size and SHA-256 agree with the registry. A
    hash that the registry lacks is recorded in NAME.sha256 beside the file and holds from then on.
    Raises Unreachable if no host sends the file or $PGD_OFFLINE is set, and UserError if a host
    sends a wrong one or if the cached file is a wrong one.
    """
    path = d4rl_path(file)
    part, record = (path.with_name(path.name + suffix) for suffix in (".part", ".sha256"))
    if not path.is_file():
        if offline():
            raise Unreachable(f"{file.name} is not on this machine, and downloads are off")
        make_folder(path.parent, "D4RL_DATASET_DIR")
        with open(part, "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for another process that fetches the same file
            if not path.is_file():
                part.touch()
                urls = _sources(file, mirror or os.environ.get("PGD_MIRROR", ""))
                url = _fetch_first(file, urls, part, path)
                if not file.sha256:
                    _record(record, path, url)
                return path, "SHA-256 verified" if file.sha256 else "SHA-256 recorded"
    recorded = "" if file.sha256 or not record.is_file() else record.read_text()[:64]
    if problem := _problem(path, file.size, file.sha256 or recorded):
        raise UserError(
            f"{path} is not the file that was fetched: {problem}; remove it and run again"
            if recorded
            else f"{path} is not D4RL's file: {problem}; remove it and run again"
        )
    if recorded:
        return path, "SHA-256 as recorded when it was fetched"
    return path, "SHA-256 verified" if file.sha256 else "no hash known"


def _sources(file: D4rlFile, mirrors: str) -> list[str]:
    """-> addresses of the file, in the order in which they are tried."""
    urls = [f"{folder.rstrip('/')}/{d4rl_path(file).name}" for folder in mirrors.split()]
    if file.url.startswith("http://"):
        urls.append(file.url.replace("http://", "https://", 1))
    urls.append(file.url)
    if file.sha256 and file.url.startswith(HOST):  # the hash decides whose file it is
        urls.append(f"{SECOND}/{d4rl_path(file).name}")
    return urls


def _fetch_first(file: D4rlFile, urls: list[str], part: Path, path: Path) -> str:
    """Fetch the file from the first of the addresses that sends it -> that address. Raises
    Unreachable if none does."""
    reasons = {}
    for url in urls:
        try:
            _fetch_verified(file, url, part, path)
            return url
        except Unreachable as e:
            host = url.split("/")[2] if "//" in url else repr(url)
            reasons[host] = str(e)
            if not file.sha256 and part.exists() and len(urls) > 1:
                part.write_bytes(b"")  # without a hash, halves of two hosts cannot be told apart
            part.touch()
    if not part.stat().st_size:
        part.unlink()
    said = ", ".join(f"{host} ({reason})" for host, reason in reasons.items())
    raise Unreachable(f"{file.name} cannot be fetched from {said}")


def _record(record: Path, path: Path, url: str) -> None:
    """Write the hash of a file that the registry has no hash of, and say so."""
    digest = _sha256(path)
    with atomic_file(record) as f:
        f.write(f"{digest}  {path.name}\n".encode())
    how = "" if url.startswith("https:") else ", and the connection was not encrypted"
    say(
        f"{path.name}: nobody has published its SHA-256{how}; {digest[:16]}... is recorded in "
        f"{record.name} and checked from now on"
    )


def _fetch_verified(file: D4rlFile, url: str, part: Path, path: Path) -> None:
    """Fetch `url` into `part`, check it, and rename it to `path`; a failed try is repeated as long
    as the last one brought new bytes. Raises Unreachable with the reason."""
    while True:
        before = part.stat().st_size
        try:
            fetch(url, part, file.size)
            break
        except UserError:
            part.unlink()
            raise
        except (OSError, http.client.HTTPException, ValueError) as e:  # ValueError: a malformed URL
            if getattr(e, "errno", None) in DISK:
                raise
            if part.stat().st_size > before:
                time.sleep(0.5)
                continue
            raise Unreachable(" ".join(str(getattr(e, "reason", None) or e).split())) from e
    if problem := _problem(part, file.size, file.sha256):
        part.unlink()
        raise UserError(
            f"{url} sent a wrong file ({problem}), which was removed; try again, name a mirror in "
            "PGD_MIRROR, or use the name with the prefix collect:"
        )
    os.replace(part, path)


def _problem(path: Path, size: int, sha256: str) -> str | None:
    """A phrase that says why this is not the file of that size (0: unknown) and hash; None if it
    is."""
    if size and path.stat().st_size != size:
        return f"{path.stat().st_size:,} bytes instead of {size:,}"
    if sha256 and _sha256(path) != sha256:
        return "its SHA-256 is not the registry's"
    return _not_a_log(path)


def _not_a_log(path: Path) -> str | None:
    """A phrase that says why the file does not open as a log, cut short or of another kind; None if
    it does."""
    h5py = require("h5py", "h5py")
    if not h5py.is_hdf5(path):
        return "not HDF5"
    try:
        with h5py.File(path, "r", locking=False) as f:  # download() holds a lock
            arrays = [own_dataset(f, name) for name in ("observations", "actions", "rewards")]
            if any(x is None or not x.shape or not x.shape[0] for x in arrays):
                return "no log: it lacks observations, actions or rewards"
            for x in arrays:
                _ = x[0], x[-1]
    except DAMAGE as e:
        return f"cut short or damaged ({' '.join(str(e).split())[:80]})"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fetch(url: str, part: Path, size: int = 0) -> None:
    """Append the missing rest of `url` to `part`, or replace `part` if the server cannot resume.

    size: bytes of the whole file; 0 if unknown. Raises UserError on a web page or on another size,
    and OSError if the connection fails or stalls. Bytes that arrived before an OSError are kept.
    """
    have = part.stat().st_size if part.exists() else 0
    if size and have == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=STALL)
    except urllib.error.HTTPError as e:
        if e.code == 416 and have:  # nothing left to send; the caller checks the file
            return
        raise
    with response:
        resumed, left = _read_headers(response, url, part, have, size)
        start = have if resumed else 0
        bar = tqdm(
            desc=part.name.removesuffix(".part"), unit="B", unit_scale=True, disable=None,
            initial=start, total=None if left is None else start + left,
        )  # fmt: skip
        with open(part, "ab" if resumed else "wb") as f, bar:
            while block := response.read1(1 << 20):
                f.write(block)
                bar.update(len(block))
                if size and f.tell() > size:
                    raise UserError(f"{url} sends more than the {size:,} bytes of the file")
                left = None if left is None else left - len(block)
        if left:
            raise OSError(f"the connection broke with {left:,} bytes to go")


def _read_headers(response, url: str, part: Path, have: int, size: int) -> tuple[bool, int | None]:
    """-> (whether the server resumes at byte `have`, bytes that it will send if it says so).

    Raises UserError on a web page or on another size than `size`. Empties `part` and raises OSError
    if the server resumes at another byte.
    """
    at = f"bytes {have}-"
    resumed = response.status == 206
    if resumed and not response.headers.get("Content-Range", at).startswith(at):
        part.write_bytes(b"")
        raise OSError("the server resumed at the wrong byte")
    if "html" in response.headers.get("Content-Type", ""):
        raise UserError(f"{url} sends a web page instead of data; name a mirror in PGD_MIRROR")
    length = response.headers.get("Content-Length")
    if not length:
        return resumed, None
    whole = int(length) + have * resumed
    if size and whole and whole != size:
        raise UserError(
            f"{url} sends {whole:,} bytes instead of {size:,}; name a mirror in PGD_MIRROR"
        )
    return resumed, int(length)
