"""DeepSpeed's ZeRO behind the engine that the loop drives: the training state is split over the processes.

Rajbhandari et al. 2020, arXiv:1910.02054. Stage 1 splits AdamW's moments and the weights that it updates,
stage 2 the gradients too, stage 3 also the weights that the model computes with: they are fetched layer by
layer. Precision, loss scaling, schedule and checkpoints stay ours, so a run gives the losses that it gives
without DeepSpeed, and its checkpoints go on without it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minimind.errors import UserError
from minimind.model import MiniMind
from minimind.train.engine import Engine
from minimind.train.memory import is_out_of_memory
from minimind.train.optim import build_optimizers
from minimind.train.options import TrainOptions
from minimind.train.parallel import Parallel
from minimind.train.zero_settings import deepspeed_settings

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(Engine):
    """One process's part of a training under ZeRO; see `Engine` for how it is driven.

    Attributes:
        trained: DeepSpeed's engine.
        zero: its optimizer, which holds this process's part of the state and steps AdamW on it.
    """

    def __init__(self, model: MiniMind, options: TrainOptions, parallel: Parallel) -> None:
        self.model, self.parallel = model, parallel
        self.shapes = {name: p.shape for name, p in model.named_parameters()}  # stage 3 empties the tensors
        self.owners = share_out(self.shapes, parallel.world_size)
        (optimizer,) = build_optimizers(model, "adamw", options.learning_rate, options.weight_decay)
        names = {p: name for name, p in model.named_parameters()}
        self.group_names = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self.optimizers = [optimizer]
        if parallel.dtype is not torch.float32:
            # DeepSpeed ends the autocast around it; its own would send gradients in bf16.
            model.forward = parallel.autocast()(model.forward)
        settings = deepspeed_settings(options, parallel)
        deepspeed = import_deepspeed(parallel)
        # What goes wrong without settings of the user is no mistake of the user.
        with settings_errors_explained() if options.deepspeed_config else nullcontext():
            self.trained = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
        self.zero = self.trained.optimizer
        self.allocate_moments()
        by_group = parallel.zero_stage == 3
        self.norm_method = "_get_norm_groups" if by_group else "scaled_global_norm"
        self.measure_norm = getattr(self.zero, self.norm_method)
        self.scaler = torch.amp.GradScaler(parallel.device.type, enabled=parallel.dtype is torch.float16)
        # What the scaler is shown instead of all gradients, of which no process has more than a part.
        self.norm = nn.Parameter(torch.zeros((), device=parallel.device))
        self.norm_holder = torch.optim.SGD([self.norm], lr=0.0)

    # ---- One step ----

    def accumulate(self, more_to_come: bool) -> contextlib.AbstractContextManager:
        """Stage 1 exchanges gradients in a step's last batch alone; stages 2 and 3 keep only a part of them,
        so they have to in each."""
        self.trained.set_gradient_accumulation_boundary(not more_to_come)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.trained.backward(self.scaler.scale(loss), scale_wrt_gas=False)

    def clip(self) -> Tensor:
        """The norm of the gradients, maybe not finite. DeepSpeed scales them down when it steps."""
        norm = self.measure_norm()  # of scaled gradients
        if self.parallel.zero_stage == 3:
            norms = torch.stack(norm)
            norm = torch.where((norms >= 0).all(), torch.linalg.vector_norm(norms), -1.0)
        self.set_norm(norm)
        self.norm.grad = norm.where(norm >= 0, math.nan).to(self.norm)  # -1: it was not finite
        self.scaler.unscale_(self.norm_holder)
        return self.norm.grad

    def set_norm(self, norm: Tensor) -> None:
        """What DeepSpeed finds as the norm when it steps; below 0 it leaves the step out."""
        stage_3 = self.parallel.zero_stage == 3
        setattr(self.zero, self.norm_method, lambda: [norm] if stage_3 else norm)

    def step(self, scale: float) -> None:
        """As `Engine.step`; a gradient that is not finite changes nothing."""
        for group in self.zero.param_groups:
            group["lr"] = group["peak_lr"] * scale
        self.zero.override_loss_scale(self.scaler.get_scale())
        self.trained.step()
        self.zero.override_loss_scale(1.0)  # `backward` is given losses that are scaled already
        self.scaler.update()

    def discard(self) -> None:
        """Forget the gradients, by way of a step that is left out."""
        self.set_norm(torch.tensor(-1.0, device=self.parallel.device))
        self.trained.set_gradient_accumulation_boundary(True)
        logger = logging.getLogger("DeepSpeed")
        logger.disabled = True  # it calls that an overflow
        self.trained.step()
        logger.disabled = False
        if self.parallel.zero_stage == 2:
            self.zero.all_grad_tensors.clear()  # of a step that has not come to its end

    # ---- State ----

    def state_dict(self) -> dict[str, Any]:
        """As `Engine.state_dict`, with the whole tensors of this process's share of the parameters.

        All processes put together one tensor after the other, and its owner keeps it.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        weights, moments, step = {}, {}, self.steps_done()
        for name, parameter in self.model.named_parameters():
            weight = self.gather(parameter)
            if self.owns(name):
                weights[name] = weight
            if parameter.requires_grad:
                found = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                if self.owns(name):
                    moments[name] = {key: tensor.cpu() for key, tensor in found.items()} | {"step": step}
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": names}
            for group, names in zip(self.zero.param_groups, self.group_names, strict=True)
        ]
        optimizers = {"state": moments, "param_groups": groups}
        return {"model": self.with_tied_names(weights), "optimizers": optimizers}

    def load_state_dict(self, state: dict[str, Any], whole: bool) -> None:
        """As `Engine.load_state_dict`.

        Args: whole: each process has all tensors, otherwise those of its share.
        """
        weights, optimizers = state["model"], state["optimizers"]
        for name, parameter in self.model.named_parameters():
            self.scatter(parameter, self.from_owner(name, weights.get(name), whole))
            if parameter.requires_grad:
                moments = optimizers["state"].get(name, {})
                for key in MOMENTS:
                    self.set_moment(parameter, key, self.from_owner(name, moments.get(key), whole))
        self.zero.refresh_fp32_params()
        first = self.group_names[0][0]
        step = self.from_owner(first, optimizers["state"].get(first, {}).get("step"), whole, shape=())
        for held in self.optimizers[0].state.values():
            held["step"].copy_(step)
        for group, saved in zip(self.zero.param_groups, optimizers["param_groups"], strict=True):
            group |= {key: value for key, value in saved.items() if key != "params"}

    def whole_weights(self) -> dict[str, Tensor]:
        if self.parallel.zero_stage < 3:
            return self.model.state_dict()
        weights = {}
        for name, parameter in self.model.named_parameters():
            weight = self.gather(parameter)
            if self.parallel.is_main:
                weights[name] = weight
        return self.with_tied_names(weights)

    # ---- Tensor by tensor ----

    def owns(self, name: str) -> bool:
        return self.owners[name] == self.parallel.rank

    def gather(self, parameter: nn.Parameter) -> Tensor:
        """The whole weight, on the CPU."""
        with self.whole(parameter):
            return parameter.detach().to("cpu", copy=True)

    def scatter(self, parameter: nn.Parameter, weight: Tensor) -> None:
        with self.whole(parameter, modifier_rank=0), torch.no_grad():
            parameter.copy_(weight)

    def whole(
        self, parameter: nn.Parameter, modifier_rank: int | None = None
    ) -> contextlib.AbstractContextManager:
        if self.parallel.zero_stage < 3:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters([parameter], modifier_rank=modifier_rank)

    def set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.parallel.zero_stage < 3:
            return safe_set_full_optimizer_state(parameter, value, key)
        part = parameter.ds_tensor.numel()
        padded = F.pad(value.flatten(), (0, part * self.parallel.world_size - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.split(part)[self.parallel.rank], key)

    def from_owner(
        self, name: str, tensor: Tensor | None, whole: bool, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """`tensor`, of the parameter's shape if no other, on the device; unless all have it `whole`, from
        the process that has it."""
        if tensor is None:
            tensor = torch.empty(self.shapes[name] if shape is None else shape)
        tensor = tensor.to(self.parallel.device)
        if not whole:
            dist.broadcast(tensor, self.owners[name])
        return tensor

    def with_tied_names(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """`weights` with tied tensors under each of their names, as a state dict has them."""
        first = {p: name for name, p in self.model.named_parameters()}
        names = ((name, first[p]) for name, p in self.model.named_parameters(remove_duplicate=False))
        return {name: weights[known] for name, known in names if known in weights}

    def allocate_moments(self) -> None:
        """Before AdamW would, at its first step: a checkpoint may be read before, and DeepSpeed links what it
        finds after the first group's step alone."""
        stage_3 = self.parallel.zero_stage == 3
        zero, state = self.zero, self.optimizers[0].state
        for part in zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups:
            if not state[part]:
                state[part] = {key: torch.zeros_like(part) for key in MOMENTS}
                state[part]["step"] = torch.zeros((), device=part.device)
        if not stage_3:
            zero._lazy_init_hp_params_optimizer_state()

    def steps_done(self) -> Tensor:
        return next(iter(self.optimizers[0].state.values()))["step"].cpu()


def share_out(shapes: dict[str, torch.Size], processes: int) -> dict[str, int]:
    """Which process writes which tensor of a checkpoint: the largest first, each to whoever has least."""
    owners, loads = {}, [0] * processes
    for name in sorted(shapes, key=lambda name: -shapes[name].numel()):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += shapes[name].numel()
    return owners


def import_deepspeed(parallel: Parallel) -> ModuleType:
    os.environ["DS_ACCELERATOR"] = parallel.device.type  # --device decides, not what DeepSpeed finds
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    # It calls what PyTorch has renamed.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Its extension for processes on one CPU takes a compiler and minutes to build; gloo does without.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


@contextlib.contextmanager
def settings_errors_explained() -> Iterator[None]:
    """For the one call that gives DeepSpeed its settings.

    It checks them by assertions, pydantic (a ValueError) and exceptions of its own; what it does not check
    fails where it is used: a section of another type, a module or an extension that is not there.
    Raises: UserError when it refuses them.
    """
    from deepspeed.runtime.config import DeepSpeedConfigError
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    own = (DeepSpeedConfigError, ZeRORuntimeException)
    checked, used = (AssertionError, ValueError), (AttributeError, TypeError, ImportError, RuntimeError)
    try:
        yield
    except (*own, *checked, *used) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:400]
        if "ninja" in reason.lower() or "jit load" in reason.lower() or "c++" in reason.lower():
            raise UserError(
                "these DeepSpeed settings need an extension that is compiled on this machine: install g++ "
                f"(for a GPU also its CUDA toolkit) and ninja (pip install ninja), or drop them ({reason})"
            ) from error
        raise UserError(f"DeepSpeed does not take these settings: {reason}") from error
