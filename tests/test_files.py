"""host/files.py and host/errors.py: whole files, arrays from strangers, imports one way."""

import ast
import os

import numpy as np
import pytest
from conftest import ROOT

from host import cores, files, signals
from host.errors import UserError, at_least
from host.files import atomic_file, atomic_path, make_folder, read_arrays, require, write_arrays


def test_a_file_appears_when_the_block_ends_and_a_failure_keeps_the_last_good_one(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    with atomic_file(path) as f:
        f.write(b"one")
        assert [p.name for p in path.parent.iterdir()] == [f".a.txt.{os.getpid()}.part"]
    assert path.read_bytes() == b"one"
    with pytest.raises(ZeroDivisionError), atomic_file(path) as f:
        f.write(b"two")
        raise ZeroDivisionError
    assert path.read_bytes() == b"one"
    with atomic_path(path) as part:  # for a writer that opens the file by its name
        part.write_bytes(b"three")
    assert path.read_bytes() == b"three"
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass  # nothing was written
    assert path.read_bytes() == b"three" and list(path.parent.iterdir()) == [path]


def test_a_signal_removes_the_files_that_are_being_written(tmp_path, monkeypatch, capfd):
    class Left(Exception):
        pass

    def leave(status):
        left = [p.name for p in tmp_path.iterdir()]
        raise Left(status, left)

    monkeypatch.setattr(os, "_exit", leave)
    (tmp_path / "b.txt").write_text("whole")
    with pytest.raises(Left) as e, atomic_file(tmp_path / "a.txt") as f:
        f.write(b"half")
        signals.leave(2, "interrupted")
    assert e.value.args == (130, ["b.txt"]) and not files.open_parts
    assert "interrupted" in capfd.readouterr().err


def test_a_containers_limit_of_memory_counts(tmp_path, monkeypatch):
    machine = cores.memory_limit()
    monkeypatch.setattr(cores, "CGROUP", tmp_path)
    path = tmp_path / "log.npz"
    np.savez(path, a=np.zeros(3000))
    for limit, fits in (("max", True), (str(2 * machine), True), ("40000", False)):
        (tmp_path / "memory.max").write_text(limit)
        if fits:
            assert len(read_arrays(path, ("a",))["a"]) == 3000
        else:
            with pytest.raises(UserError, match="too much for the 0.0 GB of this machine"):
                read_arrays(path, ("a",))


@pytest.mark.parametrize("number, said", [(11, "another program is writing it"),
                                          (37, "set HDF5_USE_FILE_LOCKING=FALSE")])  # fmt: skip
def test_a_file_that_cannot_be_locked(number, said, tmp_path):
    path = tmp_path / "log.hdf5"
    path.write_bytes(b"\x89HDF")
    with pytest.raises(UserError, match=said), files._opened(path):
        raise OSError(f"unable to lock file, errno = {number}, error message = 'no'")


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_arrays_come_back_in_the_order_that_is_asked_for(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    arrays = {"b": np.arange(3), "a": np.eye(3), "c": np.array([True, False, True])}
    write_arrays(path, arrays, {"source": "a test"})
    found = read_arrays(path, ("c", "a", "x"), optional=("x",))
    assert list(found) == ["c", "a"]
    assert found["a"].dtype == np.float32 and found["c"].dtype == bool
    np.testing.assert_array_equal(found["a"], arrays["a"])
    with pytest.raises(UserError, match="has no x; it needs c, x"):
        read_arrays(path, ("c", "x"))


def test_what_is_missing_or_too_small_is_said_in_a_line(tmp_path):
    with pytest.raises(UserError, match=r"pip install a-package$") as e:
        require("no_such_module", "a-package")
    assert "\n" not in str(e.value)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="set PGD_CACHE$"):
        make_folder(tmp_path / "file" / "folder", "PGD_CACHE")
    at_least(1, steps=None, num_envs=1)
    with pytest.raises(UserError, match="--num-envs must be at least 1"):
        at_least(1, steps=3, num_envs=0)
    with pytest.raises(UserError, match="--steps must be at least 1 and below 2"):
        at_least(1, steps=2**31)


@pytest.mark.parametrize("name", ["errors", "files", "envs", "d4rl", "minari", "collect", "export"])
def test_the_sources_of_logs_import_nothing_above_them(name):
    tree = ast.parse((ROOT / "host" / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    assert not imported & {"data", "pgd", "agents", "host.cli"}
