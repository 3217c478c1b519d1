"""What a stage will cost before it is begun: tokens, steps, hours, money and memory.

    minimind estimate pretrain --preset base --price_per_hour 1.3     a few steps, measured here
    minimind estimate pretrain --preset base --gpu 3090               computed for a GPU that need not be here

STAGE's own flags follow it, so this is an estimate of exactly that run. Nothing is written to its --out_dir,
and the weights of earlier stages need not be there: random ones compute as long. The tokens of the data are
kept in the cache, where the run will find them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import make_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minimind.cli import COMMANDS
from minimind.errors import UserError
from minimind.flags import Parser, add_flags, flag

if TYPE_CHECKING:
    from minimind.train.loop import Stage, Trainer
    from minimind.train.parallel import Parallel

STAGES = {
    "pretrain": "PretrainOptions",
    "sft": "SFTOptions",
    "lora": "LoRAOptions",
    "dpo": "DPOOptions",
    "reason": "ReasonOptions",
    "distill": "DistillOptions",
}
WARM_UP = 2  # steps; the first ones compile and set up
STEPS, SECONDS = 10, 30  # measured: so many steps, fewer if they take longer than that
ASSUMED_MFU = 0.35  # share of the peak rate that training reaches


class GPU(NamedTuple):
    tflops: float  # bf16 products with fp32 sums, dense: data sheets often give the double, for sparse ones
    memory_gb: int
    price_per_hour: float | None = None  # ¥: the published 2.1 h for ¥2.73


GPUS = {  # cards without bf16 (V100, T4) are not here: on them training is in fp32
    "3060": GPU(25.5, 12),
    "3080": GPU(59.5, 10),
    "3090": GPU(71, 24, 1.3),
    "4080": GPU(97.5, 16),
    "4090": GPU(165, 24),
    "5090": GPU(209.5, 32),
    "A10": GPU(125, 24),
    "L4": GPU(121, 24),
    "L40S": GPU(362, 48),
    "A100-40GB": GPU(312, 40),
    "A100-80GB": GPU(312, 80),
    "H20": GPU(148, 96),
    "H100": GPU(989, 80),
    "H200": GPU(989, 141),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    stages = parser.add_subparsers(
        dest="stage", required=True, metavar="STAGE", help="with --help a stage lists its flags"
    )
    classes = {name: options_class(name) for name in STAGES}
    for name, options in classes.items():
        purpose = COMMANDS[f"train {name}"].purpose
        add_flags(stages.add_parser(name, help=purpose, description=__doc__), options)
    flags = vars(parser.parse_args(argv))
    name = flags.pop("stage")
    options = classes[name](**flags)
    return (compute if options.gpu else measure)(name, options)


def options_class(stage: str) -> type[Any]:
    """A stage's options, and `--gpu`."""
    options = getattr(import_module(f"minimind.stages.{stage}"), STAGES[stage])
    gpu = ("gpu", str | None, flag(None, "compute for this GPU, without measuring", choices=tuple(GPUS)))
    return make_dataclass("EstimateOptions", [gpu], bases=(options,), frozen=True)


@contextmanager
def trial(name: str, options: Any, parallel: Parallel) -> Iterator[tuple[Stage, Any]]:
    """The stage, and `options` that need no weights of others and write to a folder which is then removed."""
    prefix = "minimind_estimate_"
    with tempfile.TemporaryDirectory(prefix=prefix) if parallel.is_main else nullcontext("") as own:
        options = for_trial(options, Path(parallel.from_main(own)), parallel.is_main)
        parallel.barrier()
        yield import_module(f"minimind.stages.{name}").stage(options), options
        parallel.barrier()


def for_trial(options: Any, folder: Path, is_main: bool = True) -> Any:
    """`options` that write to `folder` and need no weights of other stages."""
    changes = {"out_dir": folder, "from_weight": "none", "from_resume": False}
    if hasattr(options, "teacher"):
        changes["teacher_path"] = options.teacher
        if not options.teacher_path and not options.teacher.is_file():
            changes["teacher_path"] = folder / "teacher.pth"
            if is_main:
                write_teacher(options, folder / "teacher.pth")
    return replace(options, **changes)


def write_teacher(options: Any, path: Path) -> None:
    """A teacher of the right size for those who have none yet."""
    from minimind.config import model_config
    from minimind.model import MiniMind
    from minimind.tokenizer import Tokenizer
    from minimind.weights import save_weights

    vocab_size = Tokenizer.load(options.tokenizer_path).vocab_size
    save_weights(MiniMind(model_config(options.teacher_preset, vocab_size=vocab_size)), path)


# ---- Measured on this machine ----


class Rates(NamedTuple):
    """Seconds of each thing that a run does."""

    start_up: float  # once: compiling
    token: float  # of training
    row: float  # of reading alone, in evaluation
    save: float
    steps: int  # that were measured


def measure(name: str, options: Any) -> int:
    from minimind.train.cost import Cost, device_name, peak_memory, total_memory
    from minimind.train.loop import Trainer
    from minimind.train.memory import memory_errors_explained
    from minimind.train.monitor import duration
    from minimind.train.parallel import setup
    from minimind.train.zero_settings import zero_stage

    parallel = setup(
        options.device, options.dtype, options.parallel, options.hang_timeout, zero_stage(options)
    )
    with (
        parallel.errors_once(),
        memory_errors_explained(parallel),
        trial(name, options, parallel) as (stage, options),
    ):
        trainer = Trainer(stage, options, parallel)
        describe(trainer)
        trainer.say("measuring a few steps, an evaluation and a save: minutes on a slow machine")
        rates = measured_rates(trainer)
    device = parallel.device
    training = rates.token * trainer.total_tokens
    beside = rates.start_up + rates.row * rows_read(trainer) + rates.save * saves(trainer)
    cost = Cost(
        training + beside,
        trainer.total_tokens,
        peak_memory(device),
        device_name(device),
        options.price_per_hour,
    )

    precision = str(parallel.dtype).removeprefix("torch.") + (", compiled" if trainer.compiled else "")
    trainer.say(
        f"measured: {1 / rates.token:,.0f} tokens/s in {rates.steps} steps on {cost.device} ({precision})"
    )
    trainer.say(
        f"time: {duration(cost.seconds)}, {duration(beside)} of it for compiling, evaluation and saving"
    )
    say_money(trainer, cost)
    needed, there = cost.peak_memory, total_memory(device)
    if device.type != "cuda":  # main memory is shared
        needed *= parallel.world_size
    fits = needed < there
    verdict = "it fits" if fits else "it does not fit; lower --batch_size or --max_seq_len"
    trainer.say(f"memory: {needed / 1e9:.2f} GB at its peak, of {there / 1e9:.1f} GB here: {verdict}")
    parallel.close()
    return 0 if fits else 1


def measured_rates(trainer: Trainer) -> Rates:
    """Do a few steps, an evaluation and a save of a run that has just been built."""
    from minimind.data.batches import PairDataset, prefetch
    from minimind.train.signals import StopSignals
    from minimind.train.step import optimizer_step

    trainer.peak_rate = 1.0  # nobody reads the MFU
    if isinstance(trainer.data, PairDataset):
        trainer.data.reference.zero_()  # any score will do
    seconds, tokens = [], []
    with closing(prefetch(trainer.step_batches(0))) as steps:
        last = time.perf_counter()
        for step, batches in enumerate(steps):
            values = optimizer_step(trainer, step, batches, StopSignals())
            if values is None:
                raise MemoryError  # the run would take less at once; its figures are wanted
            tokens.append(values["tokens"])
            now = clock(trainer)
            seconds.append(now - last)
            last = now
            counted = seconds[WARM_UP:]
            if trainer.parallel.any(len(counted) >= STEPS or sum(counted) > SECONDS):
                break
    counted = [s / t for s, t in zip(seconds, tokens, strict=True)][WARM_UP:] or [seconds[-1] / tokens[-1]]
    token = statistics.median(counted)
    start_up = sum(max(0.0, s - token * t) for s, t in zip(seconds[:WARM_UP], tokens, strict=False))

    first, again = (reading_seconds(trainer) for _ in range(2))  # the first time may compile
    start_up += max(0.0, first - again)
    began = clock(trainer)
    trainer.save(len(seconds))
    trainer.finish_saving()
    return Rates(start_up, token, again / rows_of_reading(trainer), clock(trainer) - began, len(counted))


def clock(trainer: Trainer) -> float:
    """The time when all work so far is done, a GPU's too."""
    from minimind.train.monitor import finish_work

    finish_work(trainer.parallel.device)
    return time.perf_counter()


def rows_of_reading(trainer: Trainer) -> int:
    return min(trainer.data.num_rows, 2 * trainer.shares.batch_size * trainer.parallel.world_size)


def reading_seconds(trainer: Trainer) -> float:
    """How long an evaluation of `rows_of_reading` takes."""
    began = clock(trainer)
    trainer.objective.evaluate(
        trainer.model,
        trainer.data,
        trainer.tokenizer,
        trainer.parallel,
        trainer.shares.batch_size,
        rows_of_reading(trainer),
    )
    return clock(trainer) - began


def rows_read(trainer: Trainer) -> int:
    """Rows that are read without training: in the evaluations, and to score them first where that is done."""
    rows = sum(data.num_rows for data in trainer.datasets()) if trainer.objective.scores_first else 0
    evaluations = (trainer.total_steps - 1) // trainer.eval_interval  # and one at the end
    return rows + evaluations * trainer.rows_to_evaluate(full=False) + trainer.rows_to_evaluate(full=True)


def saves(trainer: Trainer) -> int:
    return 1 + (trainer.total_steps - 1) // trainer.options.save_interval


# ---- Computed for a GPU ----


def compute(name: str, options: Any) -> int:
    import torch

    from minimind.train.cost import Cost
    from minimind.train.loop import Trainer
    from minimind.train.monitor import duration
    from minimind.train.parallel import Parallel

    if options.dtype == "float32":
        raise UserError(f"--gpu {options.gpu} is computed for bf16 products; leave out --dtype float32")
    gpu, price = GPUS[options.gpu], options.price_per_hour
    options = replace(
        options,
        compile="0",
        price_per_hour=price or gpu.price_per_hour,
        dtype="float32",
        batch_size=1,  # at once, which changes nothing here; auto would measure
        global_batch_size=options.rows_per_step,
    )
    cpu = Parallel(torch.device("cpu"), torch.float32)
    with trial(name, options, cpu) as (stage, options):
        trainer = Trainer(stage, options, cpu)
    flops = trainer.flops_per_token * trainer.total_tokens
    if trainer.objective.scores_first:  # forward only, which is a third of a step
        flops += trainer.flops_per_token * trainer.data.num_tokens / 3
    state = state_bytes(trainer)
    seconds = flops / (gpu.tflops * 1e12 * ASSUMED_MFU)
    cost = Cost(seconds, trainer.total_tokens, state, options.gpu, options.price_per_hour)

    describe(trainer)
    trainer.say(
        f"computed, not measured: one {options.gpu} has {gpu.tflops:g} TFLOP/s (bf16, dense), and it is "
        f"assumed that training reaches {ASSUMED_MFU:.0%} of them; attention, evaluation, saving are left out"
    )
    trainer.say(f"time: {duration(seconds)} for {flops:.3g} floating-point operations")
    say_money(trainer, cost, assumed=price is None)
    fits = state < gpu.memory_gb * 1e9
    rest = "activations come on top, and grow with --batch_size" if fits else "it does not fit"
    trainer.say(
        f"memory: {state / 1e9:.2f} GB of {gpu.memory_gb} GB for weights, gradients and optimizer; {rest}"
    )
    return 0 if fits else 1


def state_bytes(trainer: Trainer) -> int:
    """Bytes of fp32 weights, and where they are trained, of gradients and what the optimizer keeps."""
    import torch

    numbers = sum(p.numel() for p in trainer.model.parameters())
    for optimizer in trainer.engine.optimizers:
        trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        numbers += trained * (
            3 if isinstance(optimizer, torch.optim.AdamW) else 2
        )  # Muon keeps one, AdamW two
    return 4 * numbers


# ---- Said of both ----


def describe(trainer: Trainer) -> None:
    trainer.say(
        f"{trainer.stage.name}: {trainer.num_parameters / 1e6:.2f} M parameters; "
        f"{trainer.data.num_tokens:,} tokens in an epoch, {trainer.total_tokens:,} in all, "
        f"{trainer.total_steps:,} steps"
    )


def say_money(trainer: Trainer, cost: Any, assumed: bool = False) -> None:
    money = "unknown without --price_per_hour"
    if cost.money is not None:
        money = f"¥{cost.money:.2f} at ¥{cost.price_per_hour:g} an hour"
        money += " (assumed; --price_per_hour gives another)" if assumed else ""
    trainer.say(f"money: {money}")
