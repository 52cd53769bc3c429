"""Several hosts: finding each other, and gathering results."""

import contextlib
import json
from typing import Any

import jax
import numpy as np

from host.errors import UserError


def start_hosts(coordinator: str | None, num_hosts: int | None, host: int | None) -> None:
    """Connect to the other hosts, before anything else of JAX runs.

    coordinator: ADDRESS:PORT of host 0. All three are found by themselves on TPU, SLURM and
    Kubernetes. Raises UserError where the hosts cannot be found.
    """
    given = [x is not None for x in (coordinator, num_hosts, host)]
    if any(given) and not all(given):
        raise UserError("give all three of --coordinator, --num-hosts and --host, or none")
    if all(given) and not 0 <= host < num_hosts:
        raise UserError(f"--host {host} must be at least 0 and below --num-hosts {num_hosts}")
    with contextlib.suppress(AttributeError):  # else JAX keeps SIGTERM for itself, and a
        jax.config.update("jax_enable_preemption_service", False)  # preempted host saves nothing
    try:
        jax.distributed.initialize(coordinator, num_hosts, host)
    except (ValueError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"the hosts did not find each other ({reason}); outside TPU, SLURM and Kubernetes give "
            "--coordinator ADDRESS:PORT --num-hosts N --host I"
        ) from e


def gather(content: Any) -> list[Any]:
    """Each host's content, anything that JSON can hold -> the contents of all, in host order."""
    from jax.experimental.multihost_utils import process_allgather

    text = np.frombuffer(json.dumps(content).encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.array([len(text)], np.int32))).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes().decode()) for row, size in zip(rows, sizes)]
