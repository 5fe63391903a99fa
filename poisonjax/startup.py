"""Settings that must stand before JAX starts. On CPU they double its speed."""

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path


def start_jax(rows: int) -> None:
    """Sets the compile cache and, where there is no accelerator, memory and devices for the CPU.

    `rows` of a microbatch: on CPU each core is a device of its own (as many as divide the rows), because XLA
    splits small operations badly over threads. JAX_NUM_CPU_DEVICES and JAX_COMPILATION_CACHE_DIR win.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "poisonjax" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if sys.platform == "linux":
        keep_freed_memory()
    if "JAX_PLATFORMS" not in os.environ and find_spec("libtpu") and not _tpus() and not find_spec("jax_plugins"):
        os.environ["JAX_PLATFORMS"] = "cpu"  # the TPU's library, there for `plan`, would look for one for seconds
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        os.environ["JAX_NUM_CPU_DEVICES"] = str(max(n for n in range(1, cores + 1) if rows % n == 0))


def _tpus() -> bool:
    """Whether a TPU is plugged in (a PCI device of Google's)."""
    return any(vendor.read_text().strip() == "0x1ae0" for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"))


def keep_freed_memory() -> None:
    """Tells glibc, where that is the library, to keep large freed blocks: XLA's buffers of a step would be mapped and
    zeroed anew each step (38,000 page faults a step of the quickstart, a fifth of its time)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc
        return
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_arena_max, 1)
