"""The one training loop. A stage brings data, an objective and weights to start from; the rest is here.

    train(stage, options)
        prepare data → build the model → [resume] → steps → final weights

One optimizer step is `batch_size × accumulation_steps` rows, however many processes share them. Which rows is
a pure function of (seed, step), the loss is the mean over all target tokens of the step, and a checkpoint
holds all the rest; so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import Tensor

from minimind.config import model_config
from minimind.data.batches import Batch, PackedDataset, prefetch
from minimind.data.records import Kind
from minimind.errors import UserError
from minimind.files import atomic_write, check_writable
from minimind.model import MiniMind
from minimind.paths import OUT_DIR
from minimind.stages import SCRIPTS
from minimind.tokenizer import Tokenizer
from minimind.train.checkpoint import (
    list_checkpoints,
    load_state,
    load_tensors,
    newest_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from minimind.train.cost import Cost, device_name, peak_memory
from minimind.train.datasets import load_datasets
from minimind.train.engine import Engine
from minimind.train.loggers import RunInfo, check_installed
from minimind.train.monitor import Monitor, matmul_rate, training_flops
from minimind.train.objective import Loss, NextToken, Objective
from minimind.train.optim import learning_rate_scale
from minimind.train.options import TrainOptions
from minimind.train.parallel import Parallel, setup
from minimind.train.shares import Shares
from minimind.train.signals import Interrupted, StopSignals
from minimind.weights import check_tokenizer, load_model, save_state

EVAL_TOKENS = 32_768  # held-out tokens per evaluation during training; the last one uses all
WORTH_COMPILING = 2e13  # floating-point operations; on a CPU compiling takes half a minute and has to pay

# Options that decide what a run computes, as do those of a stage's own: a resumed run must have the same.
FIXED_IN_A_RUN = (
    "max_seq_len",
    "epochs",
    "optimizer",
    "learning_rate",
    "warmup_iters",
    "weight_decay",
    "grad_clip",
    "max_steps",
    "seed",
)


@dataclass(frozen=True)
class Stage:
    """What is particular to one kind of training."""

    name: str  # the weight file's name without the model's size, relative to out_dir
    data_kind: Kind
    starts_from: tuple[str, ...] = ()  # weight files to start from, the first that exists
    objective: Objective = field(default_factory=NextToken)
    tag_weight: float = 1.0  # in the loss, of the tokens of a reasoning answer's tags
    prepare: Callable[[MiniMind], object] | None = None  # change the model, choose what is trained
    save: Callable[[dict[str, Tensor], Path], None] = save_state  # what of the state dict is the result


def train(stage: Stage, options: TrainOptions) -> int:
    """Run a stage from start to end. Returns the process's exit code: 0, or 128 + the signal that ended it.

    Raises: UserError for whatever the user can mend, before or during training.
    """
    parallel = setup(options.device, options.dtype, options.parallel)
    with memory_errors_explained(parallel):
        trainer = Trainer(stage, options, parallel)
        with alone_in(trainer.run_dir) if parallel.is_main else nullcontext():
            code = trainer.run()
    parallel.close()
    return code


@contextmanager
def memory_errors_explained(parallel: Parallel) -> Iterator[None]:
    """Turn running out of memory into a UserError that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"not enough memory on {parallel.device}; lower --batch_size (and raise --accumulation_steps as "
            "much), --max_seq_len or the size of the model"
        ) from error


def alone_in(run_dir: Path) -> AcquireReturnProxy:
    """Hold a run's folder. Raises: UserError when another process is at work in it."""
    try:
        return FileLock(run_dir / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is at work in {run_dir}; wait for it, or choose another --out_dir"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class for it, a CPU allocation only a sentence."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Trainer:
    """State of one run. Build it, then `run` it once."""

    def __init__(self, stage: Stage, options: TrainOptions, parallel: Parallel) -> None:
        self.stage, self.options, self.parallel = stage, options, parallel
        self.began = time.perf_counter()
        self.seconds_before, self.tokens = 0.0, 0  # spent before a resume, and trained on in all
        self.is_new = True  # nothing of it is saved yet
        self.saved_at: int | None = None  # the step of the last checkpoint written
        self.tokenizer = Tokenizer.load(options.tokenizer_path)
        self.config = model_config(
            options.preset,
            options.hidden_size,
            options.num_hidden_layers,
            options.use_moe,
            self.tokenizer.vocab_size,
        )
        self.weights_path = options.out_dir / f"{stage.name}_{self.config.name}.pth"
        self.run_dir = self.weights_path.parent / "runs" / self.weights_path.stem
        check_writable(self.weights_path.parent)
        check_writable(self.run_dir)
        check_installed(options.loggers)
        if self.weights_path.is_dir():
            raise UserError(
                f"{self.weights_path} is a folder, but the weights are to be written there; move it"
            )
        self.run_id = uuid.uuid4().hex[:8]
        torch.manual_seed(options.seed)
        self.started_from: Path | None = None
        self.model = self.initial_model()
        if stage.prepare:
            stage.prepare(self.model)
        self.model.to(parallel.device)
        self.objective = stage.objective
        self.objective.setup(self.config, self.tokenizer, parallel)
        datasets = load_datasets(stage.data_kind, options, self.tokenizer, parallel.is_main, stage.tag_weight)
        self.data, self.held_out = datasets.training, datasets.held_out
        self.data_sha256 = datasets.content_sha256

        rows_per_step = options.global_batch_size or options.batch_size * options.accumulation_steps
        self.shares = Shares(
            self.data.num_rows, rows_per_step, options.batch_size, parallel.rank, parallel.world_size
        )
        self.total_steps = min(options.epochs * self.shares.steps_per_epoch, options.max_steps or 10**9)
        self.warmup_steps = options.warmup_iters
        if self.warmup_steps is None:
            self.warmup_steps = min(100, self.total_steps // 50)
        self.eval_interval = options.eval_interval or max(1, self.total_steps // 10)
        self.flops_per_token = training_flops(self.model) + self.objective.flops_per_token

        self.compiled = self.compile()
        self.engine = Engine(self.model, options, parallel)

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @property
    def seconds(self) -> float:
        """How long the run has taken, with preparation, evaluation and what was before a resume."""
        return self.seconds_before + time.perf_counter() - self.began

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run, those of a last epoch that is broken off counted row by row."""
        epochs, steps = divmod(self.total_steps, self.shares.steps_per_epoch)
        return epochs * self.data.num_tokens + self.data.tokens(epochs, steps * self.shares.rows_per_step)

    def datasets(self) -> list[PackedDataset]:
        return [self.data, self.held_out] if self.held_out else [self.data]

    # ---- Before the first step ----

    def initial_model(self) -> MiniMind:
        """Random weights, or those of the stage that comes before this one."""
        has_checkpoint = self.options.from_resume and list_checkpoints(self.run_dir / "checkpoints")
        from_weight = self.options.from_weight
        names = (from_weight,) if from_weight else self.stage.starts_from
        if names in ((), ("none",)) or has_checkpoint:
            return MiniMind(self.config)
        paths = {self.options.out_dir / f"{name}_{self.config.name}.pth": name for name in names}
        path = next((p for p in paths if p.is_file()), list(paths)[-1])
        same = ("preset", "hidden_size", "num_hidden_layers", "use_moe", "tokenizer_path", "out_dir")
        given = {name: getattr(self.options, name) for name in same}
        flags = [f" --{n} {v}" for n, v in given.items() if v not in (None, False, OUT_DIR)]
        script = SCRIPTS.get(paths[path])
        if not script and not path.is_file():
            tail = f"_{self.config.name}.pth"
            found = sorted(p.name.removesuffix(tail) for p in self.options.out_dir.glob(f"*{tail}"))
            there = ", ".join(found) or "none of this size"
            raise UserError(f"--from_weight {from_weight}: there is no {path}; there are: {there}")
        command = f"python {script}{''.join(flags)}"
        model = load_model(path, command, expected=self.config)
        check_tokenizer(path, self.tokenizer)
        self.started_from = path
        return model

    def compile(self) -> bool:
        """Compile the decoder where that is wanted and possible; parameter names stay as they are."""
        options, device = self.options, self.parallel.device
        wanted = options.compile == "1"
        if options.compile == "auto":
            epochs = self.total_steps / self.shares.steps_per_epoch
            work = self.flops_per_token * self.data.num_rows * options.max_seq_len * epochs
            steady = not self.config.num_experts  # expert blocks change their shape with every batch
            wanted = steady and (device.type == "cuda" or (device.type == "cpu" and work > WORTH_COMPILING))
        can = find_spec("triton") if device.type == "cuda" else shutil.which("g++") or shutil.which("clang++")
        if wanted and not can and options.compile == "1":
            raise UserError(
                "--compile 1 needs a C++ compiler (CPU: install g++) or triton (CUDA); or --compile 0"
            )
        if wanted and can:
            # Sharding gathers one layer at a time, so then they are compiled one by one.
            for part in self.model.model.layers if self.parallel.sharded else [self.model.model]:
                part.compile()
        return bool(wanted and can)

    def resume(self, say: Callable[[str], None]) -> int:
        """Load the newest whole checkpoint, if asked to; returns the number of finished steps."""
        folder = self.run_dir / "checkpoints"
        if not self.options.from_resume:
            if list_checkpoints(folder):
                say(
                    f"starting anew (--from_resume 1 would go on from the checkpoints in {folder}); at the "
                    f"first save they and their weight file move to {self.run_dir / 'previous'}"
                )
            return 0
        path = newest_checkpoint(folder, say)
        if path is None:
            self.run_id = self.run_id_before() or self.run_id
            say(f"there is no checkpoint in {folder}; starting at the first step")
            return 0
        state = load_state(path)
        self.check_same_run(state["run"])
        self.run_id = state["run_id"]
        load_tensors(path, state, self.engine)
        self.engine.scaler.load_state_dict(state["scaler"])
        self.objective.load_state_dict(state["objective"], self.datasets())
        set_random_state(state["random"])
        self.seconds_before, self.tokens = state["spent"]
        say(f"resumed at step {state['step']} of {self.total_steps}")
        return state["step"]

    def run_id_before(self) -> str | None:
        """The id of a run that was killed before its first checkpoint."""
        try:
            return json.loads((self.run_dir / "run.json").read_bytes())["run_id"]
        except (OSError, ValueError, KeyError):
            return None

    def identity(self) -> dict[str, Any]:
        """What makes a run this run: all that decides its results."""
        shared = {item.name for item in dataclasses.fields(TrainOptions)}
        own = {item.name for item in dataclasses.fields(self.options)} - shared
        options = {name: getattr(self.options, name) for name in (*FIXED_IN_A_RUN, *sorted(own))}
        # Of files the content counts, wherever they are.
        options = {name: value for name, value in options.items() if not isinstance(value, Path)}
        data = {
            "data (its content)": self.data_sha256,
            "rows to train on": self.data.num_rows,
            "rows of an optimizer step": self.shares.rows_per_step,
            "tokenizer": self.tokenizer.fingerprint,
        }
        return (
            options
            | data
            | self.objective.identity()
            | {"dtype": str(self.parallel.dtype)}
            | dataclasses.asdict(self.config)
        )

    def check_same_run(self, saved: dict[str, Any]) -> None:
        now = self.identity()
        changed = [
            f"{name} was {saved.get(name)}, is {now[name]}" for name in now if saved.get(name) != now[name]
        ]
        if changed:
            raise UserError(
                "the checkpoint belongs to another run: "
                + "; ".join(changed)
                + ". Give the same flags and data, or start anew with --from_resume 0"
            )

    # ---- Training ----

    def run(self) -> int:
        options = self.options
        start = self.resume(self.say)
        self.is_new = start == 0
        self.peak_rate = matmul_rate(self.parallel.device, self.parallel.dtype)
        self.monitor = Monitor(
            self.run_dir,
            is_main=self.parallel.is_main,
            total_steps=self.total_steps,
            first_step=start,
            log_interval=options.log_interval,
        )
        steps = closing(prefetch(self.step_batches(start)))
        with StopSignals() as signals, self.monitor as monitor, steps as steps:
            self.introduce()
            name, project = self.weights_path.stem, options.wandb_project
            run = RunInfo(self.run_id, name, project, self.run_dir, self.settings())
            monitor.start_loggers(options.loggers, run)
            if self.is_new:
                self.objective.begin(self.model, self.datasets(), self.parallel, options.batch_size)
            done = start
            try:
                for batches in steps:
                    values = self.optimizer_step(done, batches, signals)
                    done += 1
                    self.tokens += int(values["tokens"])
                    monitor.step(done, values)
                    last = done == self.total_steps
                    if last or done % self.eval_interval == 0:
                        self.evaluate(done, full=last)
                    if last or done % options.save_interval == 0:
                        self.save(done)
                    if self.parallel.any(signals.received is not None) and not last:
                        raise Interrupted
            except Interrupted:
                if done == start:
                    monitor.say("stopped before the first step was done; nothing was changed")
                    return 128 + (signals.received or signal.SIGTERM)
                if done != self.saved_at:
                    self.save(done)
                monitor.say(
                    f"stopped at step {done} of {self.total_steps}; everything is saved: the same command "
                    "with --from_resume 1 goes on from here"
                )
                return 128 + (signals.received or signal.SIGTERM)
            self.save_final(done, start)
            cost = self.cost()
            self.write_settings(cost=cost.table())
            monitor.say(f"{self.weights_path}: {cost}")
        return 0

    def step_batches(self, first_step: int) -> Iterator[list[Batch]]:
        """The micro-batches of this process for each step from `first_step` on."""
        # A process without rows takes part with padding; compiled code wants one shape.
        fewest = self.shares.rows_at_once if self.compiled else 1
        for step in range(first_step, self.total_steps):
            epoch = self.shares.epoch(step)
            batches = []
            for rows in self.shares.passes(step):
                batch = self.data.batch(epoch, rows.start, len(rows), min_rows=fewest)
                batches.append(batch.pin_memory() if self.parallel.device.type == "cuda" else batch)
            yield batches

    def optimizer_step(self, step: int, batches: list[Batch], signals: StopSignals) -> dict[str, float]:
        """One update from `batches`; returns what to log.

        Raises: Interrupted on a signal, UserError when loss or gradient are not finite. Either way the
        weights are those before the step.
        """
        began = time.perf_counter()
        device, world = self.parallel.device, self.parallel.world_size
        counts = torch.tensor(
            [
                sum(b.row_units.sum().item() for b in batches),
                sum((b.document_ids >= 0).sum().item() for b in batches),
            ],
            dtype=torch.float64,
            device=device,
        )
        units, tokens = self.parallel.sum(counts).tolist()

        losses = self.accumulate_gradients(batches, units, signals)
        grad_norm = self.engine.clip()
        loss_sum = self.parallel.sum(torch.stack([loss.logged for loss in losses]).double().sum())
        loss = loss_sum.item() / max(units, 1)
        scale = learning_rate_scale(step, self.total_steps, self.warmup_steps)
        if not math.isfinite(loss) or (not math.isfinite(grad_norm) and not self.engine.scaler.is_enabled()):
            raise self.not_finite(step, batches, losses, scale)
        self.engine.step(scale)

        rate = tokens / (time.perf_counter() - began)
        logged = {
            "loss": loss,
            "lr": self.options.learning_rate * scale,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else -1.0,
            "tokens": tokens,
            "tokens_per_s": rate,
            "mfu": self.flops_per_token * rate / world / self.peak_rate,
            "epoch": self.shares.epoch(step),
        }
        return logged | self.mean_metrics(batches, losses, units)

    def mean_metrics(self, batches: list[Batch], losses: list[Loss], units: float) -> dict[str, float]:
        """The objective's further numbers, each a mean over the units of all batches of all processes."""
        if not losses[0].metrics:
            return {}
        sums = sum(
            torch.stack(list(loss.metrics.values())).double().cpu() * batch.row_units.sum().item()
            for batch, loss in zip(batches, losses, strict=True)
        )
        means = self.parallel.sum(sums.to(self.parallel.device)) / max(units, 1)
        return dict(zip(losses[0].metrics, means.tolist(), strict=True))

    def accumulate_gradients(self, batches: list[Batch], units: float, signals: StopSignals) -> list[Loss]:
        """Forward and backward of each batch; `units` is what the loss is a mean over, of the whole step."""
        device, world = self.parallel.device, self.parallel.world_size
        losses = []
        for i, batch in enumerate(batches):
            if signals.received and world == 1:
                raise Interrupted
            more_to_come = i + 1 < len(batches)
            with self.engine.accumulate(more_to_come), self.parallel.autocast():
                batch = batch.to(device, non_blocking=True)
                loss = self.objective.loss(self.engine.trained, batch, self.config.router_aux_loss_coef)
                # Processes' gradients are averaged, but the step's loss is a sum over them.
                self.engine.backward(loss.total * (world / max(units, 1)))
            losses.append(loss._replace(total=loss.total.detach()))
        return losses

    def not_finite(self, step: int, batches: list[Batch], losses: list[Loss], scale: float) -> UserError:
        """Name the step, the learning rate and the records behind a loss or gradient that is no number."""
        bad = [i for i, loss in enumerate(losses) if not loss.logged.isfinite()]
        epoch, lines = self.shares.epoch(step), set[int]()
        for i in bad or range(len(batches)):  # with finite losses the gradient alone is bad: all are suspects
            for row in self.shares.passes(step)[i]:
                if not bad or self.row_is_bad(epoch, row):
                    lines |= set(self.data.source_lines(epoch, row))
        shown = ", ".join(map(str, sorted(lines)[:20])) + (" …" if len(lines) > 20 else "")
        return UserError(
            f"the loss or its gradient is not finite at step {step + 1}, learning rate "
            f"{self.options.learning_rate * scale:.2e}, in the records at {self.options.data_path} lines "
            f"{shown}. The last good checkpoint is kept. Mend these records, or start anew with a lower "
            "--learning_rate"
        )

    @torch.no_grad()
    def row_is_bad(self, epoch: int, row: int) -> bool:
        alone = self.data.batch(epoch, row, 1).to(self.parallel.device)
        with self.parallel.autocast():
            return not self.objective.loss(self.model, alone, 0.0).logged.isfinite().item()

    # ---- Reporting and saving ----

    def say(self, message: str) -> None:
        if self.parallel.is_main:
            print(message, flush=True)

    def cost(self) -> Cost:
        """What the run has taken up to now."""
        device = self.parallel.device
        price = self.options.price_per_hour
        return Cost(self.seconds, self.tokens, peak_memory(device), device_name(device), price)

    def settings(self) -> dict[str, Any]:
        """All that a reader of the run's results needs to know, as plain values."""
        options = {name: plain(value) for name, value in vars(self.options).items()}
        return {
            "run_id": self.run_id,
            "stage": self.stage.name,
            "options": options,
            "started_from": plain(self.started_from),
            "model": dataclasses.asdict(self.config),
            "parameters": self.model.num_parameters,
            "trainable_parameters": self.num_trainable,
            "data_sha256": self.data_sha256,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "total_steps": self.total_steps,
            "device": str(self.parallel.device),
            "dtype": str(self.parallel.dtype).removeprefix("torch."),
            "world_size": self.parallel.world_size,
            "torch": torch.__version__,
        }

    def write_settings(self, **more: Any) -> None:
        """`run.json`, for a reader of the results and for the stage that goes on from them."""
        if self.parallel.is_main:
            text = json.dumps(self.settings() | more, indent=2, ensure_ascii=False)
            atomic_write(self.run_dir / "run.json", lambda file: file.write(text.encode()))

    def introduce(self) -> None:
        """Write `run.json` and say in a few lines what is about to happen."""
        if not self.parallel.is_main:
            return
        self.write_settings()
        say, report, total = self.monitor.say, self.data.report, self.model.num_parameters
        part = "" if self.num_trainable == total else f"{self.num_trainable / 1e6:.2f} M of "
        say(
            f"{self.stage.name}: {part}{total / 1e6:.2f} M parameters on "
            f"{self.parallel.device}, {str(self.parallel.dtype).removeprefix('torch.')}"
            f"{', compiled' if self.compiled else ''}; matrix products here run at "
            f"{self.peak_rate / 1e9:,.0f} GFLOP/s"
        )
        say(
            f"data: {self.data.num_rows:,} rows of {self.options.max_seq_len} tokens, "
            f"{self.data.padding_fraction:.2%} padding; {self.total_steps:,} steps"
        )
        if self.started_from:
            say(f"starting from {self.started_from}")
        if report.split:
            say(f"data: {report.split:,} texts are longer than a row and were split")
        if report.dropped and self.stage.data_kind == "preference":
            say(
                f"data: of {report.documents:,} pairs {report.dropped:,} are left out, since chosen and "
                f"rejected together are longer than --max_seq_len {self.options.max_seq_len}"
            )
        elif report.cut or report.dropped:
            say(
                f"data: of {report.documents:,} conversations {report.cut:,} are too long for --max_seq_len "
                f"{self.options.max_seq_len} and end after an earlier answer, {report.dropped:,} are left "
                f"out since no answer fits; {report.lost_target_tokens:,} answer tokens are lost"
            )
        if self.held_out is None:
            say("data: no record to hold out that fits, so there is no evaluation; --eval_path names a file")

    def evaluate(self, step: int, full: bool) -> None:
        if self.held_out is None:
            return
        rows = None if full else max(1, EVAL_TOKENS // self.options.max_seq_len)
        scores = self.objective.evaluate(
            self.model, self.held_out, self.tokenizer, self.parallel, self.options.batch_size, rows
        )
        self.monitor.evaluation(step, scores)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` and the weight file."""
        folder = self.run_dir / "checkpoints"
        if self.is_new:
            self.set_previous_aside(folder)
        state = {
            "step": step,
            "run_id": self.run_id,
            "run": self.identity(),
            "scaler": self.engine.scaler.state_dict(),
            "objective": self.objective.state_dict(self.datasets()),
            "random": random_state(),
            "spent": (self.seconds, self.tokens),
        }
        save_checkpoint(folder, step, state, self.engine.state_dict(), self.parallel)
        self.save_weights()
        self.parallel.barrier()
        self.saved_at = step

    def save_weights(self) -> None:
        weights = self.engine.whole_weights()
        if self.parallel.is_main:
            self.stage.save(weights, self.weights_path)

    def set_previous_aside(self, checkpoints: Path) -> None:
        """A run started by mistake must not cost the one before it: that moves to `previous/`."""
        self.is_new = False
        if not self.parallel.is_main:
            return
        found = [path for path in (checkpoints, self.weights_path) if path.exists()]
        if found:
            previous = self.run_dir / "previous"
            shutil.rmtree(previous, ignore_errors=True)
            previous.mkdir()
            for path in found:
                path.replace(previous / path.name)

    def save_final(self, done: int, start: int) -> None:
        """A run that was resumed at its end has nothing to train, but its weight file may be gone."""
        if done == start:
            self.save_weights()


def plain(value: Any) -> Any:
    """`value` as JSON and checkpoints can hold it."""
    return str(value) if isinstance(value, Path) else value
