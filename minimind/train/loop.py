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
import os
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import Tensor

from minimind.config import model_config
from minimind.data.batches import Batch, PackedDataset, prefetch
from minimind.data.records import Kind
from minimind.errors import UserError
from minimind.evaluate.run_report import REPORT, SAMPLES
from minimind.files import check_writable, write_text
from minimind.model import MiniMind
from minimind.runs import RUN, read_run, run_folder
from minimind.stages import SCRIPTS, command
from minimind.tokenizer import Tokenizer
from minimind.train import report
from minimind.train.checkpoint import (
    CheckpointWriter,
    list_checkpoints,
    load_state,
    load_tensors,
    newest_checkpoint,
    random_state,
    set_random_state,
)
from minimind.train.compiling import compile_decoder, computes_the_same
from minimind.train.cost import Cost, device_name, peak_memory
from minimind.train.datasets import load_datasets
from minimind.train.engine import build_engine
from minimind.train.loggers import RunInfo, check_installed
from minimind.train.memory import (
    is_out_of_memory,
    memory_errors_explained,
    rows_that_fit,
    rows_worthwhile,
)
from minimind.train.monitor import Monitor, matmul_rate, training_flops
from minimind.train.objective import Loss, NextToken, Objective
from minimind.train.optim import learning_rate_scale
from minimind.train.options import TrainOptions
from minimind.train.parallel import Parallel, setup
from minimind.train.samples import conclude
from minimind.train.shares import Shares
from minimind.train.signals import Interrupted, StopSignals
from minimind.train.stability import ROLLBACKS, Stability
from minimind.train.zero_settings import zero_stage
from minimind.weights import check_tokenizer, load_model, save_state

EVAL_TOKENS = 32_768  # held-out tokens per evaluation during training; the last one uses all

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
    stage_of_zero = zero_stage(options)
    parallel = setup(options.device, options.dtype, options.parallel, options.hang_timeout, stage_of_zero)
    with parallel.errors_once(), memory_errors_explained(parallel):
        trainer = Trainer(stage, options, parallel)
        with alone_in(trainer.run_dir) if parallel.is_main else nullcontext():
            code = trainer.run()
    parallel.close()
    return code


def alone_in(run_dir: Path) -> AcquireReturnProxy:
    """Hold a run's folder. Raises: UserError when another process is at work in it."""
    try:
        return FileLock(run_dir / ".lock").acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another run is at work in {run_dir}; wait for it, or choose another --out_dir"
        ) from None


class Trainer:
    """State of one run. Build it, then `run` it once."""

    def __init__(self, stage: Stage, options: TrainOptions, parallel: Parallel) -> None:
        options = options.settled(parallel.zero_stage)
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
        self.run_dir = run_folder(self.weights_path)
        check_writable(self.weights_path.parent)
        check_writable(self.run_dir)
        if not parallel.see_the_same(self.run_dir):
            raise UserError(
                f"--out_dir {options.out_dir} is not the same folder for all processes; it must be on a disk "
                "that all machines of the run share, since each goes on from the checkpoints there"
            )
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

        self.flops_per_token = training_flops(self.model) + self.objective.flops_per_token
        rows, wanted = options.rows_per_step, options.batch_size
        worthwhile = rows_worthwhile(self.config, self.flops_per_token, options.max_seq_len, parallel.device)
        at_once = min(rows if options.fits_batch_size else wanted, worthwhile)
        self.shares = Shares(self.data.num_rows, rows, at_once, parallel.rank, parallel.world_size)
        self.total_steps = min(options.epochs * self.shares.steps_per_epoch, options.max_steps or 10**9)
        warmup = options.warmup_iters
        self.warmup_steps = min(100, self.total_steps // 20) if warmup is None else warmup
        self.eval_interval = options.eval_interval or max(1, self.total_steps // 10)

        self.check_same_as_main()
        # Counted before an engine leaves a process with a part of them.
        self.num_parameters = self.model.num_parameters
        self.num_trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        epochs = self.total_steps / self.shares.steps_per_epoch
        work = self.flops_per_token * self.data.num_rows * options.max_seq_len * epochs
        self.compiled = compile_decoder(self.model, options.compile, work, parallel)
        if self.compiled and parallel.device.type == "cpu":  # by whatever C++ compiler there is
            self.check_compiled()
        self.engine = build_engine(self.model, options, parallel)
        if options.fits_batch_size:
            fits = rows_that_fit(self.engine, self.objective, self.data, self.shares.rows_at_once)
            self.shares = dataclasses.replace(self.shares, batch_size=fits)
            self.say(f"--batch_size auto: {fits} rows at once, in steps of {self.shares.rows_per_step}")
        self.stability = Stability(options.skip_limit)
        self.checkpoints = CheckpointWriter(self.run_dir / "checkpoints", parallel, options.keep_last)

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
        script = SCRIPTS.get(paths[path])
        if not script and not path.is_file():
            tail = f"_{self.config.name}.pth"
            found = sorted(p.name.removesuffix(tail) for p in self.options.out_dir.glob(f"*{tail}"))
            there = ", ".join(found) or "none of this size"
            raise UserError(f"--from_weight {from_weight}: there is no {path}; there are: {there}")
        same = ("preset", "hidden_size", "num_hidden_layers", "use_moe", "tokenizer_path")
        given = {name: v for name in same if (v := getattr(self.options, name)) not in (None, False)}
        how_to_make = command(script or "…", given, self.options.out_dir)
        model = load_model(path, how_to_make, expected=self.config)
        check_tokenizer(path, self.tokenizer)
        self.started_from = path
        return model

    def check_compiled(self) -> None:
        """Go on without the compiler if what it made is wrong here."""
        rows = self.shares.rows_at_once
        if not computes_the_same(self.model, self.data.batch(0, 0, rows, min_rows=rows), self.parallel):
            self.compiled = False
            torch.compiler.set_stance("force_eager")
            self.say("torch.compile's code computes something else on this machine; going on without it")

    def resume(self) -> int:
        """Load the newest whole checkpoint, if asked to; returns the number of finished steps."""
        folder, before = self.checkpoints.folder, self.run_before()
        # A launcher that starts a run again gives the flags of the first time.
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        again = self.parallel.from_main(again and before.get("launcher") == os.getppid())
        if not (self.options.from_resume or again):
            if list_checkpoints(folder):
                self.say(
                    f"starting anew (--from_resume 1 would go on from the checkpoints in {folder}); at the "
                    f"first save they and their weight file move to {self.run_dir / 'previous'}"
                )
            return 0
        path = self.newest_checkpoint()
        state = load_state(path) if path else None
        # A run that was started again before its first save finds the checkpoints of the run before it.
        others = state and not self.options.from_resume and state["run_id"] != before.get("run_id")
        if path is None or state is None or others:
            self.run_id = before.get("run_id", self.run_id)
            self.say(f"there is no checkpoint of this run in {folder}; starting at the first step")
            return 0
        self.check_same_run(state["run"])
        self.run_id = state["run_id"]
        self.seconds_before, self.tokens = state["spent"]
        self.load(path, state)
        self.say(f"resumed at step {state['step']} of {self.total_steps}")
        return state["step"]

    def newest_checkpoint(self) -> Path | None:
        """The main process looks, so that all go on from the same."""
        main = self.parallel.is_main
        return self.parallel.from_main(newest_checkpoint(self.checkpoints.folder, self.say) if main else None)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Put everything that training changes back to what it was in a checkpoint."""
        load_tensors(path, state, self.engine)
        self.engine.scaler.load_state_dict(state["scaler"])
        self.stability.load_state_dict(state["stability"])
        self.objective.load_state_dict(state["objective"], self.datasets())
        set_random_state(state["random"])

    def run_before(self) -> dict[str, Any]:
        """The settings of the last run in this folder, which may have been killed before its first save."""
        return read_run(self.weights_path)

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
        changed = differences(saved, self.identity(), ("was", "is"))
        if changed:
            raise UserError(
                f"the checkpoint belongs to another run: {changed}. Give the same flags and data, or start "
                "anew with --from_resume 0"
            )

    def check_same_as_main(self) -> None:
        """Processes on other machines read their own copy of the data, and have their own command line."""
        own = self.identity()
        changed = differences(self.parallel.from_main(own), own, ("in process 0 is", "in this one"))
        if changed:
            raise UserError(
                f"process {self.parallel.rank} on {socket.gethostname()} differs: {changed}. Start all "
                "processes with the same flags and data"
            )

    # ---- Training ----

    def run(self) -> int:
        start = self.done = self.resume()
        self.is_new = start == 0
        self.peak_rate = matmul_rate(self.parallel.device, self.parallel.dtype)
        self.monitor = Monitor(
            self.run_dir,
            is_main=self.parallel.is_main,
            total_steps=self.total_steps,
            first_step=start,
            log_interval=self.options.log_interval,
        )
        with StopSignals() as signals, self.monitor as monitor, self.parallel.watched():
            report.introduce(self)
            name, project = self.weights_path.stem, self.options.wandb_project
            run = RunInfo(self.run_id, name, project, self.run_dir, report.settings(self))
            monitor.start_loggers(self.options.loggers, run)
            if self.is_new:
                self.objective.begin(self.model, self.datasets(), self.parallel, self.shares.batch_size)
            try:
                while self.done < self.total_steps:
                    self.train_steps(signals)
            except Interrupted:
                self.stop(start)
                return 128 + (signals.received or signal.SIGTERM)
            self.finish_saving()
            weights = None
            if self.parallel.sharded or self.done == start:  # then what there was to train may lack its file
                weights = self.save_weights()
            cost = self.cost()
            self.write_settings(cost=cost.table())
            monitor.say(f"{self.weights_path}: {cost}")
        if self.parallel.is_main:
            conclude(self, weights)
        return 0

    def train_steps(self, signals: StopSignals) -> None:
        """Steps from `self.done` to the end, or to where batches must be made anew: smaller, or again.

        Raises: Interrupted on a signal, UserError when the training fails for good.
        """
        with closing(prefetch(self.step_batches(self.done))) as steps:
            for batches in steps:
                values = self.optimizer_step(self.done, batches, signals)
                if values is None:  # out of memory; done again with less at a time
                    return
                self.done += 1
                self.tokens += int(values["tokens"])
                self.monitor.step(self.done, values)
                if self.stability.must_go_back():
                    self.go_back()
                    return
                last = self.done == self.total_steps
                if last or self.done % self.eval_interval == 0:
                    self.evaluate(self.done, full=last)
                good = not self.stability.in_a_row  # else the weights may be what is wrong
                if last or (good and self.done % self.options.save_interval == 0):
                    self.save(self.done)
                self.parallel.beat("waiting for its rows")

    def stop(self, start: int) -> None:
        """Save what a signal has interrupted."""
        if self.done == start:
            self.say("stopped before the first step was done; nothing was changed")
            return
        if self.done != self.saved_at:
            self.save(self.done)
        self.finish_saving()
        if self.parallel.sharded:
            self.save_weights()
        self.say(
            f"stopped at step {self.done} of {self.total_steps}; everything is saved: the same command "
            "with --from_resume 1 goes on from here"
        )

    def go_back(self) -> None:
        """To the last checkpoint, at half the learning rate. Raises: UserError when that does not help."""
        path = state = None
        if not self.is_new:
            self.finish_saving()
            path = self.newest_checkpoint()
            state = load_state(path) if path else None
        rollbacks = self.stability.rollbacks + 1
        if path is None or state is None or rollbacks > ROLLBACKS:
            raise UserError(
                f"{self.stability.in_a_row} steps in a row were left out, up to step {self.done}"
                + (f", after going back {ROLLBACKS} times" if state else "")
                + f"; their records are named above. Mend these in {self.options.data_path}, or start anew "
                "with a lower --learning_rate" + (". The last good checkpoint is kept" if state else "")
            )
        self.load(path, state)
        self.stability.rollbacks, self.stability.in_a_row = rollbacks, 0
        self.done = self.saved_at = state["step"]
        self.monitor.go_back(self.done)
        self.say(
            f"back to the checkpoint of step {self.done}; on from there at {self.stability.rate:g} of the "
            "learning rate"
        )

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

    def optimizer_step(
        self, step: int, batches: list[Batch], signals: StopSignals
    ) -> dict[str, float] | None:
        """One update from `batches`; returns what to log, or None when memory ran out: less is to be tried.

        A step that would harm the weights is left out. Raises: Interrupted on a signal, the weights being
        those before the step.
        """
        began = time.perf_counter()
        self.parallel.beat("counting its tokens", step + 1)
        own = (
            sum(b.row_units.sum().item() for b in batches),
            sum((b.document_ids >= 0).sum().item() for b in batches),
            signals.received is not None,
        )
        units, tokens, asked = self.parallel.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        if asked:  # in whichever process
            raise Interrupted

        try:
            losses = self.accumulate_gradients(batches, units, signals)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            losses = None  # and out of this block, where the error still holds the memory
        if losses is None:
            self.take_less_at_once()
            return None
        self.parallel.beat("optimizer step")
        grad_norm, (loss, *means) = self.measured(batches, losses, units)
        scale = self.stability.rate * learning_rate_scale(step, self.total_steps, self.warmup_steps)
        # A gradient scaler leaves steps out by itself, until it has found its scale.
        scaled = self.engine.scaler.is_enabled()
        objection = self.stability.objection(loss, units, 0.0 if scaled else grad_norm)
        if objection:
            self.say(report.left_out(self, step, batches, losses, scale, objection))
            self.engine.skip()
        else:
            self.engine.step(scale)

        rate = tokens / (time.perf_counter() - began)
        logged = {
            "loss": loss,
            "lr": self.options.learning_rate * scale,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "tokens_per_s": rate,
            "mfu": self.flops_per_token * rate / self.parallel.world_size / self.peak_rate,
            "epoch": self.shares.epoch(step),
            "skipped": self.stability.skipped,
        }
        return logged | dict(zip(losses[0].metrics, means, strict=True))

    def take_less_at_once(self) -> None:
        """After running out of memory: the same steps, in passes of half as many rows.

        Raises: MemoryError with one row a pass, and UserError under several processes and DeepSpeed: they
        have stopped in the middle of an exchange, and only a new start brings them together.
        """
        rows, step_rows = self.shares.rows_at_once, self.shares.rows_per_step
        if rows == 1:
            raise MemoryError
        half = math.ceil(rows / 2)
        flags = f"--batch_size {half} --global_batch_size {step_rows}"
        if self.parallel.world_size > 1 or self.parallel.zero_stage:
            raise UserError(
                f"not enough memory on {self.parallel.device} for {rows} rows at once; start again with "
                f"{flags} (the same training) or --batch_size auto"
            )
        self.engine.discard()
        if self.parallel.device.type == "cuda":
            torch.cuda.empty_cache()
        self.shares = dataclasses.replace(self.shares, batch_size=half)
        self.say(f"not enough memory for {rows} rows at once; on with {half}, in steps as before ({flags})")

    def must_stop(self, signals: StopSignals) -> bool:
        """Whether to end before a pass. On a CPU a step is long, and to ask the others costs little."""
        asked = signals.received is not None
        if self.parallel.world_size == 1 or self.parallel.device.type != "cpu":
            return asked and self.parallel.world_size == 1
        return self.parallel.any(asked)

    def measured(self, batches: list[Batch], losses: list[Loss], units: float) -> tuple[float, list[float]]:
        """Clips the gradients; returns their norm before, the step's loss and the objective's metrics.

        The latter are means over the units of all batches of all processes. A GPU is waited for here and
        nowhere else in a step, after all its passes; so the numbers come in one tensor.
        """
        norm = self.engine.clip()
        values = torch.stack([torch.stack([x.logged, *x.metrics.values(), norm]) for x in losses])
        # Fp64 for the sums; a Mac's GPU has none, and several processes add theirs up where they are.
        values = values.to("cpu" if self.parallel.world_size == 1 else self.parallel.device).double()
        loss_sum = values[:, :1].sum(dim=0)  # (1,)
        counts = [batch.row_units.sum().item() for batch in batches]
        sums = sum(row[1:-1] * count for row, count in zip(values, counts, strict=True))  # (metrics,)
        sums = self.parallel.sum(torch.cat((loss_sum, sums)))
        *sums, norm = torch.cat((sums, values[0, -1:])).tolist()
        return norm, [value / max(units, 1) for value in sums]

    def accumulate_gradients(self, batches: list[Batch], units: float, signals: StopSignals) -> list[Loss]:
        """Forward and backward of each batch; `units` is what the loss is a mean over, of the whole step."""
        device, world = self.parallel.device, self.parallel.world_size
        losses = []
        for i, batch in enumerate(batches):
            if self.must_stop(signals):
                raise Interrupted
            more_to_come = i + 1 < len(batches)
            self.parallel.beat(f"forward pass {i + 1} of {len(batches)}")
            with self.engine.accumulate(more_to_come), self.parallel.autocast():
                batch = batch.to(device, non_blocking=True)
                loss = self.objective.loss(self.engine.trained, batch, self.config.router_aux_loss_coef)
                self.parallel.beat(f"backward pass {i + 1} of {len(batches)}")
                # Processes' gradients are averaged, but the step's loss is a sum over them.
                self.engine.backward(loss.total * (world / max(units, 1)))
            losses.append(loss._replace(total=loss.total.detach()))
        return losses

    # ---- Reporting and saving ----

    def say(self, message: str) -> None:
        if self.parallel.is_main:
            print(message, flush=True)

    def cost(self) -> Cost:
        """What the run has taken up to now."""
        device = self.parallel.device
        price = self.options.price_per_hour
        return Cost(self.seconds, self.tokens, peak_memory(device), device_name(device), price)

    def write_settings(self, **more: Any) -> None:
        """`run.json`, for a reader of the results and for the stage that goes on from them."""
        if self.parallel.is_main:
            text = json.dumps(report.settings(self) | more, indent=2, ensure_ascii=False)
            write_text(self.run_dir / RUN, text)

    def evaluate(self, step: int, full: bool) -> None:
        if self.held_out is None:
            return
        rows = None if full else max(1, EVAL_TOKENS // self.options.max_seq_len)
        scores = self.objective.evaluate(
            self.model, self.held_out, self.tokenizer, self.parallel, self.shares.batch_size, rows
        )
        self.monitor.evaluation(step, scores)

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` and the weight file."""
        self.parallel.beat("saving")
        if self.is_new:
            self.set_previous_aside(self.checkpoints.folder)
        state = {
            "step": step,
            "run_id": self.run_id,
            "run": self.identity(),
            "scaler": self.engine.scaler.state_dict(),
            "stability": self.stability.state_dict(),
            "objective": self.objective.state_dict(self.datasets()),
            "random": random_state(),
            "spent": (self.seconds, self.tokens),
        }
        try:
            self.checkpoints.wait()
        except UserError as error:
            self.say(f"{error}. The checkpoint before it is kept; training goes on and tries again now")
        self.checkpoints.save(
            step,
            state,
            self.engine.state_dict(),
            lambda copy: self.stage.save(copy["model"], self.weights_path),
        )
        self.saved_at = step

    def finish_saving(self) -> None:
        """Until the last checkpoint is on the disk. Raises: UserError, in all processes, when it is not."""
        failure = None
        try:
            self.checkpoints.wait()
        except UserError as error:
            failure = error
        if self.parallel.any(failure is not None):
            raise failure or UserError("the main process could not write its checkpoint")

    def save_weights(self) -> dict[str, Tensor]:
        """The weight file alone; returns the engine's `whole_weights`."""
        weights = self.engine.whole_weights()
        if self.parallel.is_main:
            self.stage.save(weights, self.weights_path)
        return weights

    def set_previous_aside(self, checkpoints: Path) -> None:
        """A run started by mistake must not cost the one before it: that moves to `previous/`."""
        self.is_new = False
        if not self.parallel.is_main:
            return
        results = (checkpoints, self.weights_path, self.run_dir / REPORT, self.run_dir / SAMPLES)
        found = [path for path in results if path.exists()]
        if found:
            previous = self.run_dir / "previous"
            shutil.rmtree(previous, ignore_errors=True)
            previous.mkdir()
            for path in found:
                path.replace(previous / path.name)


def differences(first: dict[str, Any], second: dict[str, Any], verbs: tuple[str, str]) -> str:
    """Where the identities of two runs differ, in words."""
    return "; ".join(
        f"{name} {verbs[0]} {first.get(name)}, {verbs[1]} {value}"
        for name, value in second.items()
        if first.get(name) != value
    )
