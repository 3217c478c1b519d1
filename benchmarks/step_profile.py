"""Which part of the network an optimizer step spends its time on, by PyTorch's profiler.

Forward, a part is what runs inside its modules. Backward, it is what autograd runs for an operation of that
part: both carry the same sequence number. A step is measured without `torch.compile`, which would fuse
operations of several parts into one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.own_steps import OwnSteps
from minimind.model import MLP, Attention, MiniMind

ATTENTION, MLP_PRODUCTS = "attention with its projections", "products of the MLP"
VOCABULARY, ELEMENTWISE = "vocabulary and cross-entropy", "norms, activations, residuals, embedding"
OPTIMIZER, DATA, REST = "optimizer and clipping", "waiting for data", "the rest"
PARTS = (ATTENTION, MLP_PRODUCTS, VOCABULARY, ELEMENTWISE, OPTIMIZER, DATA, REST)
BACKWARD = "autograd::engine::evaluate_function: "


def profile_step(steps: OwnSteps) -> dict[str, float]:
    """Seconds of each of `PARTS` in one optimizer step, after one that is not counted.

    `steps` must not be compiled, and is of no use for measuring speed afterwards.
    """
    steps.step()
    mark_parts(steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        steps.step()
        took = time.perf_counter() - began
    seconds = by_part(profiler.events())
    seconds[DATA] = steps.waited
    seconds[REST] = max(0.0, took - sum(s for part, s in seconds.items() if part != REST))
    return {part: seconds[part] for part in PARTS}


def mark_parts(steps: OwnSteps) -> None:
    """Have all parts of a step run inside a range of the profiler that has the part's name."""
    trainer = steps.trainer
    mark_modules(trainer.model)
    trainer.objective.loss = marked(VOCABULARY, trainer.objective.loss)  # but for the decoder in it
    trainer.engine.clip = marked(OPTIMIZER, trainer.engine.clip)
    trainer.engine.step = marked(OPTIMIZER, trainer.engine.step)


def marked(part: str, function: Callable) -> Callable:
    def call(*args: object, **kwargs: object) -> object:
        with record_function(part):
            return function(*args, **kwargs)

    return call


def mark_modules(model: MiniMind) -> None:
    """An inner range counts more than those around it: what is left to the decoder is elementwise."""
    model.model.forward = marked(ELEMENTWISE, model.model.forward)
    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = marked(ATTENTION, module.forward)
        elif isinstance(module, MLP):
            for product in module.children():
                assert isinstance(product, nn.Linear)
                product.forward = marked(MLP_PRODUCTS, product.forward)


def by_part(events: list[FunctionEvent]) -> dict[str, float]:
    """Seconds of the events inside each part's ranges, and of the backward events that belong to them."""
    part_of_sequence = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        part = forward_part(event)
        if part and event.sequence_nr >= 0:  # of several with one number the last is what autograd recorded
            part_of_sequence[event.sequence_nr] = part
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        part = forward_part(event) or backward_part(event, part_of_sequence)
        if part:
            seconds[part] += event.self_cpu_time_total / 1e6
    return seconds


def forward_part(event: FunctionEvent | None) -> str | None:
    """The innermost range that the event is, or is in."""
    while event is not None:
        if event.name in PARTS:
            return event.name
        event = event.cpu_parent
    return None


def backward_part(event: FunctionEvent | None, part_of_sequence: dict[int, str]) -> str | None:
    while event is not None:
        if event.name.startswith(BACKWARD):
            return part_of_sequence.get(event.sequence_nr)
        event = event.cpu_parent
    return None
