"""What DeepSpeed is told: whether a run is for it, our settings, and the user's own merged over them."""

from __future__ import annotations

import json
import math
import os
from importlib.util import find_spec
from typing import Any

from minimind.errors import UserError
from minimind.paths import pip_install
from minimind.train.options import TrainOptions
from minimind.train.parallel import Parallel

# Sections of a settings file that would compute in another precision than --dtype says.
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "bfloat16": "bfloat16"}


def zero_stage(options: TrainOptions) -> int:
    """The ZeRO stage that a run asks for; 0 is a run without DeepSpeed.

    It is asked for by --parallel zero, by --zero_stage, by --deepspeed_config, and by the launcher
    `deepspeed` where --parallel names nothing else.

    Raises: UserError for flags that contradict each other, and when DeepSpeed is not installed.
    """
    own = {"zero_stage": options.zero_stage, "deepspeed_config": options.deepspeed_config}
    given = [f"--{name}" for name, value in own.items() if value is not None]
    if options.parallel not in (None, "zero"):
        if given:
            raise UserError(
                f"the settings of {' and '.join(given)} are for --parallel zero, not {options.parallel}; "
                "leave one out"
            )
        return 0
    if not (options.parallel == "zero" or given or launched_by_deepspeed()):
        return 0
    if not find_spec("deepspeed"):
        raise UserError(f"ZeRO needs DeepSpeed: {pip_install('deepspeed')}")
    stage = user_settings(options).get("zero_optimization", {}).get("stage")
    if stage is None or stage == "auto":
        return options.zero_stage or 2
    check_same(options, "zero_optimization.stage", stage, options.zero_stage or stage, "--zero_stage")
    if stage not in (1, 2, 3):
        raise UserError(f"{options.deepspeed_config}: ZeRO's stage is {stage}; choose 1, 2 or 3")
    return stage


def launched_by_deepspeed() -> bool:
    """Whether `deepspeed script.py` started this process: CROSS_SIZE is set by it, and not by torchrun."""
    return "CROSS_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def deepspeed_settings(options: TrainOptions, parallel: Parallel) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Raises: UserError where the user's file wants another thing than the flags do.
    """
    theirs = user_settings(options)
    rows, world = options.rows_per_step, parallel.world_size
    micro = math.ceil(rows / world)
    if not options.fits_batch_size:
        micro = min(options.batch_size, micro)
    for key, value, flags in (
        ("train_batch_size", rows, "--global_batch_size, or --batch_size × --accumulation_steps"),
        ("train_micro_batch_size_per_gpu", micro, "--batch_size"),
        ("gradient_accumulation_steps", math.ceil(rows / (micro * world)), "--accumulation_steps"),
        ("gradient_clipping", options.grad_clip, "--grad_clip"),
    ):
        check_same(options, key, theirs.pop(key, value), value, flags)
    for section, flags in (
        ("optimizer", "--optimizer, --learning_rate and --weight_decay"),
        ("scheduler", "--learning_rate and --warmup_iters"),
        ("torch_autocast", "--dtype"),
        ("amp", "--dtype"),
    ):
        if theirs.pop(section, None):
            raise UserError(f"{options.deepspeed_config}: take out {section!r}; {flags} decide that here")
    dtype = str(parallel.dtype).removeprefix("torch.")
    for section, wanted in PRECISIONS.items():
        if theirs.pop(section, {}).get("enabled") is True and dtype != wanted:
            raise UserError(
                f"{options.deepspeed_config}: {section} is enabled, but this run computes in {dtype}; give "
                f"--dtype {wanted}, or take {section!r} out"
            )
    ours = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,  # the loop says which batch is a step's last
        "gradient_clipping": options.grad_clip,
        "zero_optimization": {},
        "zero_force_ds_cpu_optimizer": False,  # offloaded state is stepped by PyTorch's AdamW all the same
    }
    settings = merged(ours, theirs)
    settings["zero_optimization"] |= {"stage": parallel.zero_stage, "compute_grad_norm": True}
    offload = settings["zero_optimization"].get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise UserError(f"{options.deepspeed_config}: checkpoints cannot reach state on nvme; offload to cpu")
    return settings


def user_settings(options: TrainOptions) -> dict[str, Any]:
    """What is in --deepspeed_config. Raises: UserError when it cannot be read."""
    path = options.deepspeed_config
    if path is None:
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config {path} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--deepspeed_config {path} must be an object, {{…}}")
    for section in ("zero_optimization", *PRECISIONS):
        if not isinstance(settings.get(section, {}), dict):
            raise UserError(f"--deepspeed_config {path}: {section} must be an object, {{…}}")
    return settings


def check_same(options: TrainOptions, key: str, theirs: Any, ours: Any, flags: str) -> None:
    """The loop owns `key`; "auto", as transformers has it, leaves it to us."""
    if theirs not in (ours, "auto"):
        raise UserError(
            f"{options.deepspeed_config}: {key} is {theirs}, but this run has {ours}; change {flags}, or "
            "take it out of the file"
        )


def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """`theirs` over `ours`, section by section."""
    both = {
        key: merged(ours[key], value)
        if isinstance(value, dict) and isinstance(ours.get(key), dict)
        else value
        for key, value in theirs.items()
    }
    return ours | both
