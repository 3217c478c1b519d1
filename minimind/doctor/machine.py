"""Whether this machine can train: versions, devices, memory, disk, compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from minimind.environment import available_cores, cpu_name, machine_memory
from minimind.findings import OK, PROBLEM, WARNING, Finding, verdict

OPTIONAL = {"wandb": "--use_wandb", "transformers": "trying exports there", "peft": "trying adapters there"}
ROOM_GB = {"memory": 4, "disk": 4}  # a small model with its checkpoints takes about half


def examine(out_dir: Path) -> int:
    """Print what is found here and, under a launcher, in all processes of it. Returns the exit code."""
    findings = [python(), *torch_and_gpus(), memory(), disk(out_dir), compiler(), packages()]
    if find_spec("torch") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from minimind.doctor.processes import examine_together

        return examine_together(findings)
    return verdict(findings, "this machine can train")


def python() -> Finding:
    text = f"Python {platform.python_version()}, {available_cores()} cores of {cpu_name()}"
    new_enough = tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 11)
    return Finding(OK, text) if new_enough else Finding(PROBLEM, f"{text}; install Python 3.11 or newer")


def torch_and_gpus() -> list[Finding]:
    """PyTorch, the driver, and every GPU that both of them can use."""
    driver = nvidia_driver()
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
        return [Finding(PROBLEM, f"PyTorch does not load ({error}); pip install torch")]
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    text = f"PyTorch {torch.__version__} built for {built_for}"
    old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10)
    found = [Finding(PROBLEM, f"{text} is too old; pip install -U torch") if old else Finding(OK, text)]
    if torch.cuda.is_available():
        found.append(Finding(OK, f"NVIDIA driver {driver or 'of unknown version'}"))
        return found + [gpu(index) for index in range(torch.cuda.device_count())]
    if driver and not torch.version.cuda:
        mend = "this PyTorch is built for CPU; install one for CUDA: https://pytorch.org/get-started"
        return [*found, Finding(PROBLEM, f"NVIDIA driver {driver}, but {mend}")]
    if driver:
        mend = (
            "renew the driver, or install a PyTorch built for an older CUDA; look at CUDA_VISIBLE_DEVICES too"
        )
        return [*found, Finding(PROBLEM, f"NVIDIA driver {driver} does not serve {built_for}: {mend}")]
    return [*found, Finding(OK, f"no NVIDIA GPU: training runs on the {cpu_or_mps()}")]


def cpu_or_mps() -> str:
    import torch

    from minimind.train.parallel import has_fast_bfloat16

    if torch.mps.is_available():
        return "Apple GPU, in fp32"
    return f"CPU, in {'bf16' if has_fast_bfloat16(torch.device('cpu')) else 'fp32 (it has no fast bf16)'}"


def gpu(index: int) -> Finding:
    import torch

    from minimind.train.parallel import has_fast_bfloat16

    device = torch.device("cuda", index)
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as error:
        return Finding(PROBLEM, f"cuda:{index} does not answer ({str(error).splitlines()[0]}); restart it")
    text = f"cuda:{index} {torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if not has_fast_bfloat16(device):
        return Finding(WARNING, f"{text}, no bf16: training is in fp32; --dtype float16 is faster")
    if free < total / 2:
        return Finding(WARNING, f"{text}, bf16; another process holds the rest, see nvidia-smi")
    return Finding(OK, f"{text}, bf16")


def nvidia_driver() -> str | None:
    """Its version, or None where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def memory() -> Finding:
    text = f"{machine_memory() / 1e9:.1f} GB of memory"
    enough = machine_memory() >= ROOM_GB["memory"] * 1e9
    return Finding(OK, text) if enough else Finding(WARNING, f"{text}; lower --batch_size, --num_workers 1")


def disk(out_dir: Path) -> Finding:
    """Room and rights in `out_dir`, or in the folder it will be made in."""
    folder = next(path for path in (out_dir.absolute(), *out_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free / 1e9
    text = f"{free:.1f} GB free in {out_dir}"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding(PROBLEM, f"{out_dir} cannot be written to; choose another --out_dir")
    if free < ROOM_GB["disk"]:
        level = WARNING if free > ROOM_GB["disk"] / 10 else PROBLEM
        return Finding(level, f"{text}; checkpoints need more: free some, or choose another --out_dir")
    return Finding(OK, text)


def compiler() -> Finding:
    if found := shutil.which("g++") or shutil.which("clang++"):
        return Finding(OK, f"C++ compiler for torch.compile on a CPU: {found}")
    return Finding(WARNING, "no C++ compiler: training on a CPU is not compiled, and slower; install g++")


def packages() -> Finding:
    """Those that are not needed for training."""
    said = [f"{name} {'found' if find_spec(name) else 'missing'} ({use})" for name, use in OPTIONAL.items()]
    return Finding(OK, f"optional packages: {', '.join(said)}")
