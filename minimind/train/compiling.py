"""torch.compile where it pays, and the proof that what came of it computes what it should.

On a CPU the code is made by whatever C++ compiler the machine has. GCC 12 does not know processors newer than
itself: for one with AMX it fell back to instructions of no particular processor, and the gradients of the
attention's keys came out as NaN. And a process that is killed while it compiles can leave an empty library,
which PyTorch then finds at each later start.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minimind.data.batches import Batch
from minimind.errors import UserError
from minimind.model import Decoder, MiniMind
from minimind.train.parallel import Parallel

if TYPE_CHECKING:
    from torch._dynamo.exc import BackendCompilerFailed

WORTH_COMPILING = 2e13  # floating-point operations; on a CPU compiling takes half a minute and has to pay
TOLERANCE = 0.05  # of the gradients; bf16 rounds in other places when compiled, which makes 0.01


def compile_decoder(model: MiniMind, wanted: str, work: float, parallel: Parallel) -> bool:
    """Compile the decoder where that is wanted and possible; parameter names stay as they are.

    Args:
        wanted: what `--compile` says: "1", "0", or "auto" for where it pays.
        work: floating-point operations of the whole run.
    """
    device = parallel.device.type
    if wanted == "auto":
        # Expert blocks change their shape with every batch, unless they are in one product.
        together = device == "cuda" and parallel.dtype is torch.bfloat16 and not parallel.sharded
        steady = not model.config.num_experts or together
        pays = device == "cuda" or (device == "cpu" and work > WORTH_COMPILING)
        if not (steady and pays) or parallel.zero_stage == 3:
            return False
    elif wanted == "0":
        return False
    if parallel.zero_stage == 3:  # its weights come and go under the compiler's hands
        raise UserError("--compile 1 does not work with --zero_stage 3; use 1 or 2, or --parallel fsdp")
    if not (find_spec("triton") if device == "cuda" else shutil.which("g++") or shutil.which("clang++")):
        if wanted == "auto":
            return False
        raise UserError(
            "--compile 1 needs a C++ compiler (CPU: install g++) or triton (CUDA); or --compile 0"
        )
    for part in parts(model.model, parallel):
        part.compile(options=compiler_options(device))
    return True


def parts(decoder: Decoder, parallel: Parallel) -> Iterable[nn.Module]:
    """What to compile as one."""
    if parallel.sharded:  # one layer at a time is gathered
        return decoder.layers
    if parallel.device.type == "cuda":
        # Every layer is the same code, so one is compiled: side by side, `small` took its first step after
        # 18 s, and after 28 with all layers as one.
        return [decoder.rotary, *decoder.layers, decoder.norm]
    # Given the mask and the angles as a whole, or the compiler works them out again in each layer.
    return [decoder.layers]


def compiler_options(device: str) -> dict[str, str] | None:
    """The processor by its name where a compiler may not recognise it."""
    nameable = "cpp.march" in torch._inductor.list_options()  # in newer PyTorch
    if device == "cpu" and nameable and torch.cpu.get_capabilities().get("amx_bf16"):
        return {"cpp.march": "sapphirerapids"}  # the first that had AMX
    return None


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within this context the model runs as it is written; a GPU's attention and its mask stay compiled."""
    compiled = {module: module._compiled_call_impl for module in model.modules()}
    try:
        for module in compiled:
            module._compiled_call_impl = None  # PyTorch has no public way back from `Module.compile`
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def fault_of_compiled(model: MiniMind, batch: Batch, parallel: Parallel) -> str | None:
    """Why the compiled decoder is not to be used; None if its outputs and gradients are the plain one's.

    It takes a pass on `batch`, of the shape that training will use, and leaves no gradients. The plain
    decoder keeps more for its backward pass and gets its rows one by one, or this check would take more
    memory than the training.
    """
    batch = batch.to(parallel.device)
    inputs = (batch.input_ids, batch.position_ids, batch.document_ids)
    with uncompiled(model):
        expected = outputs_and_gradients(model, inputs, parallel, rows_at_once=1)
    fault = None
    try:
        found = compiled_outputs_and_gradients(model, inputs, parallel)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        fault = reason(error)
    else:
        # Written so that NaN is a difference.
        if not all((a - b).norm() <= TOLERANCE * b.norm() for a, b in zip(found, expected, strict=True)):
            fault = "its code computes something else"
    return (fault or "it does not in another process") if parallel.any(fault is not None) else None


def reason(error: BackendCompilerFailed) -> str:
    """One line of what may be hundreds: a compiler's own word, where there is one."""
    lines = str(error.inner_exception).splitlines() or [type(error.inner_exception).__name__]
    return next((line for line in lines if "error: " in line), lines[0]).strip()


@contextmanager
def compiler_errors_explained() -> Iterator[None]:
    """Turn a failure of the compiler during training into a UserError.

    Before the first step on a CPU it is done without; a GPU's code is compiled in that step.
    """
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise UserError(
            f"torch.compile does not work on this machine ({reason(error)}); --compile 0 trains without it"
        ) from error


def compiled_outputs_and_gradients(
    model: MiniMind, inputs: tuple[Tensor, Tensor, Tensor], parallel: Parallel
) -> tuple[Tensor, Tensor]:
    """As `outputs_and_gradients`; each broken library that PyTorch had kept is removed and made once more.

    Raises: BackendCompilerFailed.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    removed = set()
    while True:
        try:
            return outputs_and_gradients(model, inputs, parallel, rows_at_once=len(inputs[0]))
        except torch._dynamo.exc.BackendCompilerFailed as error:
            library = Path(getattr(error.inner_exception, "path", None) or "")  # an ImportError's
            if library in removed or not library.is_relative_to(cache_dir()):
                raise
            library.unlink(missing_ok=True)
            removed.add(library)


def outputs_and_gradients(
    model: MiniMind, inputs: tuple[Tensor, Tensor, Tensor], parallel: Parallel, rows_at_once: int
) -> tuple[Tensor, Tensor]:
    """Hidden states, and the gradients of all trained parameters for one direction of them."""
    shape = (*inputs[0].shape, model.config.hidden_size)  # (B, T, H)
    generator = torch.Generator(inputs[0].device).manual_seed(0)
    direction = torch.randn(shape, generator=generator, device=inputs[0].device)
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    outputs, sums = [], torch.zeros(sum(p.numel() for p in parameters), device=direction.device)
    for *rows, along in zip(*(t.split(rows_at_once) for t in (*inputs, direction)), strict=True):
        with parallel.autocast():
            hidden = model.model(*rows)[0].float()
        gradients = torch.autograd.grad((hidden * along).mean(), parameters)
        sums.add_(torch.cat([gradient.flatten() for gradient in gradients]), alpha=len(along))
        outputs.append(hidden.detach())
    return torch.cat(outputs), sums / len(direction)
