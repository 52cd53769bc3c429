"""host/files.py and host/errors.py: whole files, arrays from strangers, imports one way."""

import ast
import os

import numpy as np
import pytest
from conftest import ROOT

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
