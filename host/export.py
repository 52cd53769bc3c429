"""Logs written to a file or to Minari, and the checks to make before the work.

refuse_existing_export("synthetic.hdf5")           # before hours of training
export("synthetic.hdf5", log, task, "synthetic, from ...")
"""

import re
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np

from host.errors import UserError
from host.files import make_folder, require, write_arrays
from host.minari import check_minari_name


def export(target: str, log: dict[str, np.ndarray], task, about: str) -> None:
    """Write a log to FILE.hdf5, FILE.npz or minari:ENV/DATA-v0.

    task: a data.Task, whose action bounds and reference returns a Minari data set records.
    about: one line of provenance. Raises UserError or OSError if the log cannot be written.
    """
    refuse_existing_export(target)  # again: another run may have written it since
    if target.startswith("minari:"):
        write_minari(target.removeprefix("minari:"), log, task, about)
    else:
        write_arrays(target, log, {"source": about})


def export_target(target: str, seed: int, num_seeds: int) -> str:
    """-> the file or Minari name of one seed: `target` itself for a single seed, with `-seedN`
    inserted for several."""
    if num_seeds == 1:
        return target
    return re.sub(r"(-v\d+|\.\w+)$", rf"-seed{seed}\1", target)


def refuse_existing_export(target: str) -> None:
    """Raises UserError if `target` exists, has no valid name or suffix, or cannot be written."""
    if target.startswith("minari:"):
        _refuse_existing_minari(check_minari_name(target.removeprefix("minari:")))
    elif Path(target).suffix not in (".hdf5", ".h5", ".npz"):
        raise UserError(f"{target!r} should end in .hdf5 or .npz, or be minari:ENV/DATA-v0")
    elif Path(target).exists():
        raise UserError(f"{target} already exists; name another file")
    else:
        require("h5py", "h5py")
        try:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=Path(target).parent).close()
        except OSError as e:
            raise UserError(f"{target} cannot be written ({e.strerror}); name another file") from e


def _refuse_existing_minari(name: str) -> None:
    require("minari", "minari")
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(name)
    except ValueError as e:
        raise UserError(f"'minari:{name}' is no name for Minari; try minari:task/data-v0") from e
    if get_dataset_path(name).exists():
        raise UserError(f"Minari already has a data set {name}; raise its version")


def write_minari(name: str, log: dict[str, np.ndarray], task, about: str) -> None:
    """A log with next_observations -> a new local Minari data set with the same episodes.

    name: ENV/DATA-v0. task: has action_low (A,), action_high (A,) and reference. about: the data
    set's description. The last observation of a Minari episode is the log's last successor. Raises
    UserError, and leaves nothing behind, if the data set cannot be written.
    """
    minari = require("minari", "minari")
    from minari.storage.datasets_root_dir import get_dataset_path

    spaces = require("gymnasium", "gymnasium").spaces
    size = 2 * sum(array.nbytes for array in log.values())
    make_folder(get_dataset_path(), "MINARI_DATASETS_PATH")
    if size > shutil.disk_usage(get_dataset_path()).free:
        raise UserError(f"{get_dataset_path()} has no room for {size / 1e6:.0f} MB")
    low, high = (np.asarray(b, np.float32) for b in (task.action_low, task.action_high))
    shape = log["observations"].shape[1:]
    whole, new = False, not get_dataset_path(name).exists()
    try:
        with warnings.catch_warnings():  # minari warns of a missing author, environment, ...
            warnings.simplefilter("ignore")
            made = minari.create_dataset_from_buffers(
                name, _episodes(log), action_space=spaces.Box(low, high, dtype=np.float32),
                observation_space=spaces.Box(-np.inf, np.inf, shape, np.float32),
                description=about, algorithm_name="policy-guided diffusion", data_format="hdf5",
            )  # fmt: skip
        if task.reference:
            ref_min, ref_max = task.reference
            made.storage.update_metadata({"ref_min_score": ref_min, "ref_max_score": ref_max})
        whole = True
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"minari:{name} could not be written ({e})") from e
    finally:
        if not whole and new:
            shutil.rmtree(get_dataset_path(name), ignore_errors=True)


def _episodes(log: dict[str, np.ndarray]) -> list:
    """A log with next_observations -> a minari EpisodeBuffer for each ended episode."""
    from minari.data_collector import EpisodeBuffer

    first, episodes = 0, []
    for last in np.flatnonzero(log["terminals"] | log["timeouts"]):
        rows = slice(first, last + 1)
        obs = np.concatenate([log["observations"][rows], log["next_observations"][last : last + 1]])
        episodes.append(
            EpisodeBuffer(
                observations=obs, actions=log["actions"][rows], rewards=log["rewards"][rows],
                terminations=log["terminals"][rows], truncations=log["timeouts"][rows],
            )
        )  # fmt: skip
        first = last + 1
    return episodes
