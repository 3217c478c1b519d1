"""Short passes through the decoder as CUDA graphs: captured once, then started as a whole.

Eight rows keep a fast GPU busy for a few milliseconds, but to start their thousand kernels one by one takes a
CPU several times as long. The loss stays as it is: it has as many logits as a batch has targets, where a
graph has one shape.

PyTorch's `make_graphed_callables` gives gradients in the memory that the next replay writes over; a step of
several passes adds them up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minimind.model import Decoder, MiniMind, Routing
from minimind.train.parallel import Parallel

TOKENS = 16_384  # of a pass; more keep any GPU busy, and what a graph works in is not given back
PASSES_BEFORE = 2  # of a shape, in which the code for it is compiled

Run = Callable[..., tuple[Tensor, list[Routing]]]  # `Decoder.forward`


def replay_passes(model: MiniMind | None, parallel: Parallel) -> None:
    """Have the passes that train a compiled `model` replayed, or all of a frozen one that is asked beside it.

    Not where processes exchange gradients on the way.
    """
    if model and parallel.device.type == "cuda" and parallel.world_size == 1 and not parallel.sharded:
        model.model.forward = ReplayedDecoder(model.model)  # type: ignore[method-assign, assignment]


class ReplayedDecoder:
    """In the place of `Decoder.forward`: passes are captured when the code for their shape is there."""

    def __init__(self, decoder: Decoder) -> None:
        self.run = decoder.forward
        self.trained = [p for p in decoder.parameters() if p.requires_grad]
        self.passes: Counter[torch.Size] = Counter()  # of each shape
        self.captured: CapturedPass | None = None
        self.usable = True

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, list[Routing]]:
        """As `Decoder.forward`; where it is replayed with all its inputs, (B, T) each."""
        shape = inputs[0].shape
        evaluated = bool(self.trained) > torch.is_grad_enabled()
        if evaluated or not self.usable or shape.numel() > TOKENS:
            return self.run(*inputs)
        if self.captured and shape != self.captured.shape:  # passes have one shape until memory runs out
            self.captured = None
        if self.captured is None and self.passes[shape] >= PASSES_BEFORE and self.a_step_begins():
            self.capture(inputs)
        self.passes[shape] += 1
        if self.captured is None or self.captured.is_between:
            return self.run(*inputs)
        return self.captured(inputs)

    def a_step_begins(self) -> bool:
        """Later in it a capture would wait for what is left of earlier passes, which is not allowed."""
        return all(parameter.grad is None for parameter in self.trained)

    def capture(self, inputs: tuple[Tensor, ...]) -> None:
        try:
            self.captured = CapturedPass(self.run, self.trained, inputs)
        except RuntimeError:  # an operation that waits for the GPU, or too little memory
            self.usable = False


class CapturedPass:
    """Forward and backward of batches of one shape, each a graph that works in memory of its own.

    Gradients are added up in the same places in each pass, which become those of the `trained` parameters.
    """

    def __init__(self, run: Run, trained: list[nn.Parameter], inputs: tuple[Tensor, ...]) -> None:
        self.run, self.trained, self.shape = run, trained, inputs[0].shape
        with torch.inference_mode(False):  # code is compiled for either kind of tensor, and was for these
            self.inputs = [tensor.clone() for tensor in inputs]
        self.gradients = [torch.zeros_like(parameter) for parameter in trained]
        self.live: list[Tensor] = []  # what capture needs
        self.is_between = False  # its forward and its backward, and cannot take another batch
        torch.clear_autocast_cache()  # a graph must cast the weights itself, each time
        self.outputs, self.forward = graph_of(self.forward_once)
        if trained:
            self.output_gradients = [torch.empty_like(output) for output in self.outputs]
            _, self.backward = graph_of(self.backward_once, self.forward)
        torch.clear_autocast_cache()
        self.differentiable = [output.requires_grad for output in self.live]
        self.live = []  # with all that they were computed from

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[Routing]]:
        self.collect_gradients()
        torch._foreach_copy_(self.inputs, list(inputs))
        hidden, *routing = Replay.apply(torch.empty((), requires_grad=True), self)
        self.is_between = bool(self.trained)
        return hidden, list(map(Routing, routing[::2], routing[1::2]))

    def collect_gradients(self) -> None:
        """Have the parameters' gradients where they are added up; a step begins without any."""
        new = [place for p, place in zip(self.trained, self.gradients, strict=True) if p.grad is None]
        if new:
            torch._foreach_zero_(new)
        for parameter, place in zip(self.trained, self.gradients, strict=True):
            if parameter.grad is not None and parameter.grad is not place:
                place.copy_(parameter.grad)  # of a pass of another shape
            parameter.grad = place

    # ---- What is captured ----

    def forward_once(self) -> list[Tensor]:
        hidden, routings = self.run(*self.inputs)
        self.live = [hidden, *(tensor for routing in routings for tensor in routing)]
        return [output.detach() for output in self.live]

    def backward_once(self) -> list[Tensor]:
        pairs = zip(self.live, self.output_gradients, strict=True)
        outputs, along = zip(*((o, g) for o, g in pairs if o.requires_grad), strict=True)
        found = torch.autograd.grad(outputs, self.trained, along)
        torch._foreach_add_(self.gradients, found)
        return []


class Replay(torch.autograd.Function):
    """A `CapturedPass` as one operation, whose gradients are no concern of autograd's."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, captured: CapturedPass) -> tuple[Tensor, ...]:
        """`anchor` requires a gradient, so that what comes out does."""
        ctx.captured = captured
        captured.forward.replay()
        outputs = tuple(output.detach() for output in captured.outputs)
        pairs = zip(outputs, captured.differentiable, strict=True)
        ctx.mark_non_differentiable(*(output for output, wanted in pairs if not wanted))
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        torch._foreach_copy_(ctx.captured.output_gradients, list(gradients))
        ctx.captured.backward.replay()
        ctx.captured.is_between = False
        return None, None


def graph_of(
    function: Callable[[], list[Tensor]], before: torch.cuda.CUDAGraph | None = None
) -> tuple[list[Tensor], torch.cuda.CUDAGraph]:
    """What `function` returns, whose values come with each replay of the graph.

    Args: before: the graph that is always replayed first, which has its memory in common with this one.
    """
    graph = torch.cuda.CUDAGraph()
    pool = before.pool() if before else None
    # The thread that makes batches goes on meanwhile, and takes page-locked memory.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        return function(), graph
