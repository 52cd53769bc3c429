"""This machine: its compilation cache, its devices and their memory."""

import contextlib
import os
from pathlib import Path

import jax

from host.cores import CGROUP, num_cores
from host.errors import UserError
from host.files import say


def enable_cache(folder: Path) -> None:
    """Keep compiled programs in this folder, unless JAX_COMPILATION_CACHE_DIR names another. They
    are native code, so a folder that others can write to is not used."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            say(f"{folder} can be written by others, so compiled programs are not kept; chmod 700")
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def one_device_per_core(*counts: int) -> None:
    """Split the CPU into as many devices as it has cores, or fewer, so that each of the counts (of
    runs, of models) divides over them. Two runs side by side, a core each, are faster than one
    after the other on both cores.

    Has no effect where JAX has started, or where the user's XLA_FLAGS or JAX_NUM_CPU_DEVICES say
    how many devices there are.
    """
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    num = max(n for n in range(1, num_cores() + 1) if all(count % n == 0 for count in counts))
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", num)


def be_deterministic() -> None:
    """Let XLA use only operations on a GPU that give the same digits every time. CPUs and TPUs do
    so anyhow. Has no effect where JAX has started its devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def check_backend() -> None:
    """Start JAX's devices. Raises UserError where JAX_PLATFORMS names some that are not here."""
    try:
        jax.local_devices()
    except RuntimeError as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"JAX cannot start its devices ({reason}); install JAX for them or change JAX_PLATFORMS"
        ) from e


def memory_per_device(num_devices: int) -> int | None:
    """-> free bytes of each device, None if unknown. The devices of a CPU share its memory."""
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
    try:  # a container's limit; the memory of its file cache can be reclaimed
        limit = int((CGROUP / "memory.max").read_text())
        used, stat = int((CGROUP / "memory.current").read_text()), fields_of(CGROUP / "memory.stat")
        free = min(free, limit - used + stat["inactive_file"] + stat["active_file"])
    except (OSError, KeyError, ValueError):
        pass
    return free // num_devices


def fields_of(path: str | Path) -> dict[str, int]:
    """A file of lines "name: number unit" or "name number" -> the numbers."""
    rows = [line.replace(":", " ").split() for line in Path(path).read_text().splitlines()]
    return {row[0]: int(row[1]) for row in rows}
