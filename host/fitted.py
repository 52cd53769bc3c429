"""Fitted models of an earlier run, for other agents, seeds' agents and guidance: --denoiser DIR."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pgd
from host import flags, run_folder
from host.errors import UserError

# Settings of the sampler and of the agent loop, which may differ from those of the earlier run
FREE = {
    "agent", "seed", "num_seeds", "sampler", "sample_steps", "rounds", "updates",
    "batch_size", "real_batch", "trajectories", "sample_batch", "buffer_rounds", "n_step",
    "dataset_path", "rollout", "elites",
    *(name for names in flags.SAMPLE_FIELDS.values() for name in names),
}  # fmt: skip


def check(given: flags.Flags, old: flags.Flags, path: Path) -> None:
    """Raise UserError where the models of the earlier run are not those that this run would fit."""
    pairs = [
        (f.name, getattr(given.config, f.name), getattr(old.config, f.name))
        for f in dataclasses.fields(flags.Config)
        if f.name not in FREE
    ]
    pairs += [("synthetic", given.job.synthetic, old.job.synthetic)]
    for name, wanted, there in pairs:
        if wanted != there:
            raise UserError(
                f"the models in {path} were fitted with --{name.replace('_', '-')} {there}, this "
                f"run has {wanted}; give the same"
            )


def take(
    state: pgd.State, path: Path, num_chunks: int, wanted: Sequence[dict], there: Sequence[dict]
) -> pgd.State:
    """A new state of all runs -> the same with the models that the run in `path` has fitted.

    num_chunks: chunks of a whole fit. wanted, there: seed and fit settings of each model, here and
    in the folder. Raises UserError, also where the fit in the folder is not finished.
    """
    checkpoint = path / "checkpoint" / "state.npz"
    if not checkpoint.is_file():
        raise UserError(f"{path} has no checkpoint yet; --resume {path} fits its models")
    missing = [label for label in wanted if label not in there]
    if missing:
        known = ", ".join(str(label["seed"]) for label in there)
        raise UserError(f"{path} has no model of seed {missing[0]['seed']}; it has {known}")
    index = np.array([list(there).index(label) for label in wanted])
    with run_folder.read_checkpoint(checkpoint) as (about, arrays):
        done = int(about["fitted"])
        if done < num_chunks and not np.max(arrays[".round"]) > 0:  # a fused run counts no chunks
            raise UserError(f"the fit in {path} is not finished; --resume {path} finishes it")
        if any("the fit" in what for _, what in about["diverged"]):
            raise UserError(f"a model in {path} has diverged; fit it again with a lower --fit-lr")

        def leaf(name: str, like: Any):
            name, one = f".model{name}", like.shape[1:] if len(wanted) > 1 else like.shape
            stored = (len(there), *one) if len(there) > 1 else one
            if arrays.header(name) != (stored, like.dtype):
                raise UserError(f"the models in {path} are of another kind ({name} differs)")
            x = arrays[name] if len(there) > 1 else arrays[name][None]
            return jax.device_put(x[index] if len(wanted) > 1 else x[index[0]], like.sharding)

        leaves = [leaf(*item) for item in run_folder.named_leaves(state.model)]
    return state._replace(model=jax.tree.unflatten(jax.tree.structure(state.model), leaves))
