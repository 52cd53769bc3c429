"""The machine: its devices as a mesh, their memory, the compilation cache, several hosts."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

AXES = ("sweep", "seed", "batch")
SMALLEST_SHARE = 8  # windows of a batch that make a device worth its share of the denoiser


class DeviceError(Exception):
    """Settings that do not fit this machine; the message is one line that says how to mend it."""


def enable_cache(folder: Path) -> None:
    """Keep compiled programs in this folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def precision(wanted: str) -> str:
    """auto -> bfloat16 where the hardware is built for it (TPU; NVIDIA from Ampere), else
    float32."""
    if wanted != "auto":
        return wanted
    device = jax.local_devices()[0]
    if device.platform == "tpu":
        return "bfloat16"
    capability = getattr(device, "compute_capability", None)  # NVIDIA's, as "8.0"
    fast = device.platform == "gpu" and str(capability)[:1].isdigit() and float(capability) >= 8.0
    return "bfloat16" if fast else "float32"


def make_mesh(num_points: int, num_seeds: int, wanted: int = 0, fit_batch: int | None = None):
    """Local devices -> a mesh with the axes "sweep", "seed" and "batch".

    wanted: so many devices, 0 for all. Every device holds the same number of runs. If there are
    fewer runs than devices, and fit_batch is given, "batch" says how many devices share one run's
    denoiser; devices that are then still without work are left out. Raises DeviceError where runs
    do not divide over the devices.
    """
    devices, runs = jax.local_devices(), num_points * num_seeds
    if wanted > len(devices):
        raise DeviceError(f"--devices {wanted}: this machine has {len(devices)}")
    num, share = wanted or len(devices), 1
    if runs < num:
        if fit_batch is not None:
            shares = range(1, num // runs + 1)
            fair = lambda n: fit_batch % n == 0 and fit_batch // n >= SMALLEST_SHARE
            share = max((n for n in shares if fair(n)), default=1)
        num = runs * share
    elif runs % num:
        fitting = max(n for n in range(1, num) if runs % n == 0)
        raise DeviceError(
            f"{runs} runs do not divide over {num} devices; choose a multiple of {num}, "
            f"or --devices {fitting}"
        )
    sweep = math.gcd(num_points, num // share)
    grid = np.array(devices[:num]).reshape(sweep, num // share // sweep, share)
    return jax.sharding.Mesh(grid, AXES)


def put(tree: Any, mesh, *axes: str) -> Any:
    """Arrays on every device of the mesh, their leading axes split along these; none: copied."""
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))


# --- Memory ---


def size_of(tree: Any) -> int:
    """Bytes of a tree of arrays, or of what jax.eval_shape says of them."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.shape) * getattr(x.dtype, "itemsize", 8) for x in leaves)


def memory_per_device(num_devices: int) -> int | None:
    """Bytes that each device of this machine can still give, where that can be known; those of a
    CPU share its memory."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    try:
        free = fields_of("/proc/meminfo")["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:  # a container's own limit; what its files are cached in can be had back
        cgroup = Path("/sys/fs/cgroup")
        limit = int((cgroup / "memory.max").read_text())
        used, stat = int((cgroup / "memory.current").read_text()), fields_of(cgroup / "memory.stat")
        free = min(free, limit - used + stat["inactive_file"] + stat["active_file"])
    except (OSError, KeyError, ValueError):
        pass
    return free // num_devices


def fields_of(path: str | Path) -> dict[str, int]:
    """A file of lines "name: number unit" or "name number" -> the numbers."""
    rows = [line.replace(":", " ").split() for line in Path(path).read_text().splitlines()]
    return {row[0]: int(row[1]) for row in rows}


def check_memory(fixed: int, per_run: int, num_runs: int, mesh) -> None:
    """Raise DeviceError if so many runs cannot fit; fixed: bytes once per device, per_run: each."""
    groups = mesh.shape["sweep"] * mesh.shape["seed"]
    here, each = memory_per_device(groups * mesh.shape["batch"]), num_runs // groups
    if here is None or fixed + each * per_run <= here:
        return
    fits = max(0, (here - fixed) // per_run) * groups
    gb = lambda size: f"{size / 1e9:.3g} GB"
    advice = f"about {fits:,} would fit: lower --num-seeds" if fits else "not one fits"
    raise DeviceError(
        f"{num_runs:,} runs (seeds x sweep) need about {gb(fixed + each * per_run)} a device, "
        f"which has {gb(here)}; {advice}"
    )


# --- Several hosts ---


def start_hosts(coordinator: str | None, num_hosts: int | None, host: int | None) -> None:
    """Find the other hosts; DeviceError where the cluster cannot be made out. Nothing of JAX may
    have run before."""
    given = [x is not None for x in (coordinator, num_hosts, host)]
    if any(given) and not all(given):
        raise DeviceError("give all three of --coordinator, --num-hosts and --host, or none")
    if all(given) and not 0 <= host < num_hosts:
        raise DeviceError(f"--host {host} must lie between 0 and --num-hosts less 1")
    try:
        jax.distributed.initialize(coordinator, num_hosts, host)
    except (ValueError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise DeviceError(
            f"the hosts did not come together ({reason}); outside TPU, SLURM and Kubernetes give "
            "--coordinator ADDRESS:PORT --num-hosts N --host I"
        ) from e


def gather(content: Any) -> list[Any]:
    """Each host's content, anything that JSON can hold -> those of all, in the hosts' order."""
    from jax.experimental.multihost_utils import process_allgather

    text = np.frombuffer(json.dumps(content).encode(), np.uint8)
    sizes = np.asarray(process_allgather(np.array([len(text)], np.int32))).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes().decode()) for row, size in zip(rows, sizes)]
