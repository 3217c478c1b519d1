"""What turns losses into updates: the model as processes share it, optimizers, the gradients' scaler."""

from __future__ import annotations

import contextlib
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from minimind.model import MiniMind
from minimind.train.optim import Muon, build_optimizers, clip_gradients
from minimind.train.options import TrainOptions
from minimind.train.parallel import Parallel


class Engine:
    """One process's part of the training of `model`: alone, under DDP, or under FSDP2.

        for batch in batches:
            with engine.accumulate(more_to_come):
                engine.backward(loss(engine.trained, batch))
        norm = engine.clip()
        engine.prepare()
        engine.step(learning_rate_scale)        or engine.skip()

    Attributes:
        model: the plain model, for evaluation and for its parameters.
        trained: what to call in training; under several processes it averages their gradients.
    """

    def __init__(self, model: MiniMind, options: TrainOptions, parallel: Parallel) -> None:
        self.model, self.parallel = model, parallel
        self.trained = self.wrap(model)
        self.parameters = list(model.parameters())
        self.max_norm = options.grad_clip or math.inf
        self.optimizers = build_optimizers(
            model,
            options.optimizer,
            options.learning_rate,
            options.weight_decay,
            options.EMBEDDING_RATE,
        )
        self.scaler = torch.amp.GradScaler(parallel.device.type, enabled=parallel.dtype is torch.float16)

    def wrap(self, model: MiniMind) -> MiniMind:
        if self.parallel.world_size == 1:
            return model
        if self.parallel.sharded:
            for layer in model.model.layers:
                fully_shard(layer)
            return fully_shard(model)
        device = self.parallel.device
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    # ---- One step ----

    def accumulate(self, more_to_come: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of a batch: processes exchange gradients in a step's last one alone."""
        if self.parallel.sharded:
            self.trained.set_requires_gradient_sync(not more_to_come)
        elif more_to_come and self.parallel.world_size > 1:
            return self.trained.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def clip(self) -> Tensor:
        """Scale the gradients down to a norm of `--grad_clip`; returns the norm before, (), maybe not finite.

        It stays on the device, so that nothing waits here.
        """
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        return clip_gradients(self.parameters, self.max_norm)

    def prepare(self) -> None:
        """After `clip`, what can be done for `step` while it may still come to `skip`."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.prepare()

    def step(self, scale: float) -> None:
        """Update the weights at `scale` times the peak learning rate."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale
            self.scaler.step(optimizer)
        self.scaler.update()
        self.discard()

    def skip(self) -> None:
        """Leave the step out after `clip`."""
        self.scaler.update()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    # ---- State ----

    def state_dict(self) -> dict[str, Any]:
        """`model` and `optimizers`, by the plain model's names; sharded tensors are this process's part."""
        model, optimizers = get_state_dict(self.model, self.optimizers)
        return {"model": model, "optimizers": optimizers}

    def load_state_dict(self, state: dict[str, Any], whole: bool) -> None:
        """Takes what `state_dict` gave, here or under another number of processes.

        Args: whole: the tensors are whole, and each process takes its part of them.
        """
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizers"],
            options=StateDictOptions(full_state_dict=True) if whole else None,
        )

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's state dict, for the main process to write.

        Under sharding all processes must take part, and the others get nothing.
        """
        if not self.parallel.sharded:
            return self.model.state_dict()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(self.model, options=options)


def build_engine(model: MiniMind, options: TrainOptions, parallel: Parallel) -> Engine:
    """The engine that `parallel` calls for. DeepSpeed is imported only where a run is for it."""
    if parallel.zero_stage:
        from minimind.train.zero import ZeroEngine

        return ZeroEngine(model, options, parallel)
    return Engine(model, options, parallel)
