"""Files that are written whole or not at all, messages on stderr, and optional packages.

with atomic_file(folder / "metrics.csv") as f:     # a kill leaves the last good file
    f.write(text.encode())
write_arrays("log.npz", arrays, {"source": "..."})  # npz or HDF5, by the suffix
minari = require("minari", "minari")               # UserError says what to install
"""

import contextlib
import errno
import importlib
import lzma
import os
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from host.cores import memory_limit
from host.errors import UserError, printable

# Exceptions of h5py, zipfile and numpy on a damaged file or a file of another format
DAMAGE = (
    OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile,
    zlib.error, lzma.LZMAError, tokenize.TokenError,
)  # fmt: skip


def say(text: str) -> None:
    """Print a line on stderr without breaking a progress bar."""
    tqdm.write(printable(text), file=sys.stderr)


def offline() -> bool:
    """True where $PGD_OFFLINE, which --offline sets, forbids downloads."""
    return os.environ.get("PGD_OFFLINE", "") not in ("", "0")


def require(module: str, package: str):
    """Import an optional module -> the module. Raises UserError with the pip package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{module} cannot be imported ({e}); pip install {package}") from e
    except Exception as e:  # whatever a renderer's library raises where it is missing
        gl = os.environ.get("MUJOCO_GL")
        how = f"with MUJOCO_GL={gl}; install its library, or set MUJOCO_GL=disable" if gl else ""
        raise UserError(f"{module} cannot be imported ({' '.join(str(e).split())}) {how}") from e


def make_folder(folder: Path, variable: str) -> None:
    """Make a folder and its parents. Raises UserError with the environment variable that sets the
    folder's place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder} cannot be made ({e.strerror}); set {variable}") from e


# --- Write whole or not at all ---

open_parts: set[Path] = set()  # files that are being written, which a signal removes


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`, for a writer that opens files by name.

    When the block ends, the temporary file is flushed to disk and renamed to `path`. When the block
    raises, the temporary file is removed and `path` is unchanged. Makes the parent folders. The
    temporary name is .NAME.PID.part, so that two processes do not write to the same file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    open_parts.add(part)
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        open_parts.discard(part)


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """Yield a binary file, open for writing, that becomes `path` when the block ends; see
    atomic_path."""
    with atomic_path(path) as part, open(part, "wb") as f:
        yield f


def write_arrays(path: Path | str, arrays: dict[str, np.ndarray], about: dict[str, str]) -> None:
    """Arrays of N rows each, and notes `about` them -> an npz file (suffix .npz) or an HDF5 file.

    The notes become further entries of an npz file, or attributes of an HDF5 file.
    """
    path = Path(path)
    if path.suffix == ".npz":
        with atomic_file(path) as f:
            np.savez(f, **arrays, **about)
    else:
        write_hdf5(path, [arrays], len(next(iter(arrays.values()))), about)


def write_hdf5(
    path: Path, parts: Iterable[dict[str, np.ndarray]], rows: int, about: dict[str, str]
) -> None:
    """Concatenate `parts`, dicts with the same keys and `rows` rows in all, into one HDF5 file.

    `about` becomes the file's attributes. Only one part at a time has to be in memory. Raises
    OSError where the disk is full.
    """
    h5py = require("h5py", "h5py")
    with atomic_path(path) as part_path:
        try:
            with h5py.File(part_path, "w") as f:
                done = 0
                for part in parts:
                    part = {key: np.asarray(array) for key, array in part.items()}
                    num = {len(array) for array in part.values()}.pop()
                    for key, array in part.items():
                        if key not in f:
                            f.create_dataset(key, (rows, *array.shape[1:]), array.dtype)
                        f[key][done : done + num] = array
                    done += num
                f.attrs.update(about)
        except RuntimeError as e:  # h5py reports a full disk as a RuntimeError
            raise OSError(f"{path} could not be written ({e})") from e


# --- Read files from strangers ---


def read_arrays(
    path: Path, names: tuple[str, ...], optional: tuple[str, ...] = (), wide: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """The arrays `names` of an npz or an HDF5 file -> {name: array}, in the order of `names`.

    Arrays of numbers become float32, or float64 if they are in `wide` and have more than four bytes
    in the file; arrays of bool stay bool. Names in `optional` may be missing from the file. Raises
    UserError if the file is missing, empty, damaged or of another format, and on arrays that are
    missing, hold no numbers, have more than two axes, lie in another file, or are too large.
    Python objects are never loaded.
    """
    with _opened(path) as kind:
        read = _read_npz if kind == "npz" else _read_hdf5
        return read(path, names, optional, wide)


def list_arrays(path: Path) -> dict[str, tuple[np.dtype | None, tuple | None]]:
    """An npz or HDF5 file -> {name: (dtype, shape)} of its arrays, both None for a link. Raises
    UserError as read_arrays does."""
    with _opened(path) as kind:
        if kind == "npz":
            with zipfile.ZipFile(path) as z:
                names = [name for name in z.namelist() if name.endswith(".npy")]
                return {name.removesuffix(".npy"): npy_header(z, name) for name in names}
        h5py, found, seen = require("h5py", "h5py"), {}, set()

        def walk(group, prefix: str, depth: int) -> None:
            if (address := h5py.h5o.get_info(group.id).addr) in seen:
                return  # the same group under another name
            seen.add(address)
            for key in group:
                if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                    found[prefix + key] = None, None  # read_arrays says that it is not followed
                elif isinstance(item := group[key], h5py.Dataset):
                    found[prefix + key] = item.dtype, item.shape
                elif isinstance(item, h5py.Group) and depth < 8:
                    walk(item, f"{prefix}{key}/", depth + 1)

        with h5py.File(path, "r") as f:
            walk(f, "", 0)
        return found


def is_log_file(path: Path) -> bool:
    """True if a file has the content of an HDF5 or npz file, whatever its name."""
    return path.is_file() and (zipfile.is_zipfile(path) or require("h5py", "h5py").is_hdf5(path))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[str]:
    """Check a file, and turn what reading it raises into a UserError -> "npz" or "HDF5"."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the HDF5 or npz file in it")
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; fetch or write it again")
    with open(path, "rb") as f:
        start = f.read(24)
    first = start[:2]
    if start == b"version https://git-lfs.":
        raise UserError(f"{path} is a pointer of Git LFS, not the file; git lfs pull fetches it")
    kind = "npz" if first == b"PK" or path.suffix.lower() == ".npz" else "HDF5"
    if first[:1] == b"\x80" and first[1:] in b"\2\3\4\5":
        raise UserError(
            f"{path} is a Python pickle, which can run any program and is never loaded; save its "
            "arrays with numpy.savez where it was made"
        )
    if ".tfrecord" in path.name:
        raise UserError(f"{path} is RLDS; read it with tensorflow_datasets and save its arrays "
                        "with numpy.savez")  # fmt: skip
    try:
        yield kind
    except UserError:
        raise
    except DAMAGE as e:
        said = " ".join(str(e).split())
        if "unable to lock file" in said and "errno = 11" not in said:
            raise UserError(f"{path} lies on a disk without locks; set HDF5_USE_FILE_LOCKING=FALSE"
                            ) from e  # fmt: skip
        if getattr(e, "errno", None) == errno.EAGAIN or "unable to lock file" in said:
            raise UserError(f"{path} is locked, since another program is writing it; close it "
                            "there first") from e  # fmt: skip
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EACCES):
            raise
        if "plugin" in said or "filter" in said and "returned failure" not in said:
            raise UserError(f"{path} is compressed with a filter that is not installed here; write "
                            "it again with: h5repack -f GZIP=4 IN OUT") from e  # fmt: skip
        if path.suffix == ".npy":
            raise UserError(
                f"{path} is one array; save all arrays of the log with numpy.savez"
            ) from e
        raise UserError(f"{path} cannot be read as {kind}; it is damaged or of another kind") from e


def _wide(dtype: np.dtype, wanted: bool) -> type:
    """-> float64 for numbers that float32 may round, if wanted; else float32."""
    return np.float64 if wanted and dtype.kind in "fiu" and dtype.itemsize > 4 else np.float32


def _read_hdf5(path: Path, names, optional, wide) -> dict[str, np.ndarray]:
    h5py = require("h5py", "h5py")
    with h5py.File(path, "r") as f:
        found = {name: x for name in names if (x := own_dataset(f, name)) is not None}
        _check_headers(
            path, {name: (x.dtype, x.shape) for name, x in found.items()}, names, optional
        )
        arrays = {}
        for name, x in found.items():  # read_direct makes no copy in the file's own dtype
            kind = bool if x.dtype == bool else _wide(x.dtype, name in wide)
            arrays[name] = np.empty(x.shape, kind)
            if arrays[name].size:
                x.read_direct(arrays[name])
        return arrays


def own_dataset(f, name: str):
    """An open h5py.File -> its data set `name`, or None if there is none. Raises UserError if the
    data lie in another file, through a link, as raw data or as a virtual data set. A link is never
    opened, since it may lead to a pipe that nobody writes to."""
    h5py, at = require("h5py", "h5py"), f
    for part in name.split("/"):
        link = (
            at.get(part, getlink=True) if isinstance(at, h5py.Group) and part in at.keys() else None
        )
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise UserError(
                f"{f.filename}: {name} is a link, perhaps to another file, which is not followed"
            )
        at = at[part]
    if not isinstance(at, h5py.Dataset):
        return None
    if at.external or at.is_virtual:
        raise UserError(f"{f.filename}: {name} lies in another file, which is not followed")
    return at


def _read_npz(path: Path, names, optional, wide) -> dict[str, np.ndarray]:
    """Each array is checked and read from the one entry NAME.npy, which numpy.load would not always
    choose."""
    with zipfile.ZipFile(path) as z:
        entries = {name: f"{name}.npy" for name in names if f"{name}.npy" in z.namelist()}
        headers = {name: npy_header(z, entry) for name, entry in entries.items()}
        _check_headers(path, headers, names, optional)
        arrays = {}
        with np.errstate(over="ignore"):
            for name, entry in entries.items():
                with z.open(entry) as f:
                    x = np.lib.format.read_array(f, allow_pickle=False)
                kind = bool if x.dtype == bool else _wide(x.dtype, name in wide)
                arrays[name] = x.astype(kind, copy=False)
        return arrays


def npy_header(z: zipfile.ZipFile, entry: str) -> tuple[np.dtype, tuple]:
    """An entry of an npz file -> dtype and shape, without the numbers."""
    with z.open(entry) as f:
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_2_0
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else read
        shape, _, dtype = read(f)
    return dtype, shape


def few(names: Sequence[str]) -> str:
    """Names -> a line of the first ones."""
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def too_many_axes(shape: tuple) -> str:
    """The shape of an array with more than two axes -> what to do about it."""
    if len(shape) == 3:
        return "put the rows of all episodes end to end, as (N, O) or (N,)"
    return "images are not supported"


def _check_headers(
    path: Path,
    headers: dict[str, tuple[np.dtype, tuple | None]],
    names: tuple[str, ...],
    optional: tuple[str, ...],
) -> None:
    """Check {name: (dtype, shape)} before the arrays are read, as read_arrays describes."""
    needed = [name for name in names if name not in optional]
    if lacking := sorted(set(needed) - set(headers)):
        raise UserError(f"{path} has no {few(lacking)}; it needs {few(needed)}")
    declared = 0
    for name, (dtype, shape) in headers.items():
        if dtype.kind == "O":
            raise UserError(f"{path}: {name} holds Python objects, which are never loaded")
        if dtype.kind not in "fiub":
            raise UserError(f"{path}: {name} holds {dtype}, not numbers")
        if shape is not None and len(shape) > 2:
            raise UserError(f"{path}: {name} has shape {shape}; {too_many_axes(shape)}")
        if shape is None:
            raise UserError(f"{path}: {name} has shape {shape}, it should be (N, ...)")
        declared += int(np.prod(shape, dtype=object)) * dtype.itemsize
    stored = path.stat().st_size
    if declared > 200 * stored + 2**26:
        raise UserError(
            f"{path} is {stored:,} bytes and declares {declared:,} bytes of numbers; it is not read"
        )
    memory = memory_limit()
    if declared > 0.5 * memory:
        raise UserError(
            f"{path} holds {declared / 1e9:.1f} GB of numbers, too much for the "
            f"{memory / 1e9:.1f} GB of this machine; cut it"
        )
