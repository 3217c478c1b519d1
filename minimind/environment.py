"""Which machine a number was measured on."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import sys
from pathlib import Path


def environment() -> dict[str, object]:
    """Processor, cores and versions, for reports and benchmark results."""
    import torch

    found = {
        "processor": cpu_name(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
    }
    if bf16 := [name for name in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(name)]:
        found["bf16"] = ", ".join(bf16)  # instructions for its products
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def available_cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def wait_briefly() -> None:
    """Have threads that wait for work sleep after some 50 µs, unless the user has said otherwise.

    To be called before torch is imported. GNU's OpenMP, which PyTorch uses on Linux, lets them look for work
    for 15 ms by default, and they hold the cores that other processes want: on two cores beside four busy
    processes 2.5 tokens of an answer came in a second, and 65 so. Alone an answer takes as long either way.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine_memory() -> int:
    """Bytes of main memory, which in a container may be fewer than the machine has."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(limit).read_text()))
        except (OSError, ValueError):  # another version of control groups, or "max"
            continue
    return found


def peak_memory() -> int:
    """The most bytes of main memory that this process has held at once.

    Linux has two numbers; that of `getrusage` also counts the process that started this one.
    """
    with contextlib.suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
