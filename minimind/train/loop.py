"""The one training loop. A stage brings data, an objective and weights to start from; the rest is here.

    train(stage, options)
        prepare data → build the model → [resume] → steps → final weights

What comes before the first step is in `start.py`, what one step does in `step.py`.

One optimizer step is `batch_size × accumulation_steps` rows, however many processes share them. Which rows is
a pure function of (seed, step), the loss is the mean over all target tokens of the step, and a checkpoint
holds all the rest; so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimind.config import model_config
from minimind.data.batches import Batch, PackedDataset, prefetch
from minimind.data.records import Kind
from minimind.errors import UserError
from minimind.evaluate.run_report import REPORT, SAMPLES
from minimind.files import check_writable, write_text
from minimind.model import MiniMind
from minimind.runs import RUN, alone_in, bring_back_last_saved, keep_last_saved, run_folder, set_aside
from minimind.tokenizer import Tokenizer
from minimind.train import report
from minimind.train.checkpoint import CheckpointWriter, list_checkpoints, load_state, random_state
from minimind.train.compiling import compile_decoder, compiler_errors_explained
from minimind.train.cost import Cost, device_name, peak_memory
from minimind.train.datasets import load_datasets
from minimind.train.engine import build_engine
from minimind.train.graphs import replay_passes
from minimind.train.loggers import RunInfo, check_installed
from minimind.train.memory import memory_errors_explained, rows_that_fit, rows_worthwhile
from minimind.train.monitor import Monitor, matmul_rate, training_flops
from minimind.train.objective import NextToken, Objective
from minimind.train.options import TrainOptions
from minimind.train.parallel import Parallel, return_freed_memory, setup
from minimind.train.samples import conclude
from minimind.train.shares import Shares
from minimind.train.signals import Interrupted, StopSignals, output_may_break
from minimind.train.stability import ROLLBACKS, Stability
from minimind.train.start import (
    check_compiled,
    check_same_as_main,
    identity,
    initial_model,
    last_checkpoint,
    restore,
    resume,
)
from minimind.train.step import optimizer_step
from minimind.train.zero_settings import zero_stage
from minimind.weights import save_state

EVAL_TOKENS = 32_768  # held-out tokens per evaluation during training; the last one uses all


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
        alone = alone_in(trainer.run_dir) if parallel.is_main else nullcontext()
        with alone, compiler_errors_explained():
            code = trainer.run()
    parallel.close()
    return code


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
        self.model, self.started_from = initial_model(self)
        if stage.prepare:
            stage.prepare(self.model)
        self.model.to(parallel.device)
        self.objective = stage.objective
        self.objective.setup(self.config, self.tokenizer, parallel)
        datasets = load_datasets(stage.data_kind, options, self.tokenizer, parallel.is_main, stage.tag_weight)
        self.data, self.held_out = datasets.training, datasets.held_out
        self.data_sha256 = datasets.content_sha256

        self.flops_per_token = training_flops(self.model) + self.objective.flops_per_token
        # Counted before an engine leaves a process with a part of them.
        self.num_parameters = self.model.num_parameters
        self.num_trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        rows, wanted = options.rows_per_step, options.batch_size
        frozen = 2 * self.num_trainable < self.num_parameters
        worthwhile = rows_worthwhile(self.config, options.max_seq_len, parallel.device, frozen)
        at_once = min(rows if options.fits_batch_size else wanted, worthwhile)
        self.shares = Shares(self.data.num_rows, rows, at_once, parallel.rank, parallel.world_size)
        self.total_steps = min(options.epochs * self.shares.steps_per_epoch, options.max_steps or 10**9)
        warmup = options.warmup_iters
        self.warmup_steps = min(100, self.total_steps // 20) if warmup is None else warmup
        self.eval_interval = options.eval_interval or max(1, self.total_steps // 10)

        check_same_as_main(self)
        epochs = self.total_steps / self.shares.steps_per_epoch
        work = self.flops_per_token * self.data.num_rows * options.max_seq_len * epochs
        self.compiled = compile_decoder(self.model, options.compile, work, parallel)
        if self.compiled and parallel.device.type == "cpu":  # by whatever C++ compiler there is
            check_compiled(self)
        if self.compiled:
            replay_passes(self.model, parallel)
            replay_passes(self.objective.teacher, parallel)
        if parallel.device.type == "cpu":
            return_freed_memory()
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

    # ---- Training ----

    def run(self) -> int:
        start = self.done = resume(self)
        self.is_new = start == 0
        if self.parallel.is_main and (not self.is_new or self.has_results):
            (keep_last_saved if self.is_new else bring_back_last_saved)(self.run_dir)
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
            try:
                self.finish_saving()
            except UserError:
                self.save_weights()  # far smaller; there may be room for them at least
                self.say(f"the last checkpoint is not written, but {self.weights_path} is")
                raise
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
                values = optimizer_step(self, self.done, batches, signals)
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
            if self.is_new and self.parallel.is_main:
                bring_back_last_saved(self.run_dir)
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
            path = last_checkpoint(self)
            state = load_state(path) if path else None
        rollbacks = self.stability.rollbacks + 1
        if path is None or state is None or rollbacks > ROLLBACKS:
            raise UserError(
                f"{self.stability.in_a_row} steps in a row were left out, up to step {self.done}"
                + (f", after going back {ROLLBACKS} times" if state else "")
                + f"; their records are named above. Mend these in {self.options.data_path}, or start anew "
                "with a lower --learning_rate" + (". The last good checkpoint is kept" if state else "")
            )
        restore(self, path, state)
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

    # ---- Reporting and saving ----

    def say(self, message: str) -> None:
        if self.parallel.is_main:
            with output_may_break():
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
        how = self.parallel, self.shares.batch_size, self.rows_to_evaluate(full)
        scores = self.objective.evaluate(self.model, self.held_out, self.tokenizer, *how)
        self.monitor.evaluation(step, scores)

    def rows_to_evaluate(self, full: bool) -> int:
        """All at the end, before it some; no more than were trained on, which takes three times as long."""
        rows = self.held_out.num_rows if self.held_out else 0
        some = self.eval_interval, EVAL_TOKENS // self.options.max_seq_len
        steps, most = (self.total_steps, rows) if full else some
        return min(rows, max(1, min(most, steps * self.shares.rows_per_step)))

    def save(self, step: int) -> None:
        """Write the checkpoint of `step` and the weight file."""
        self.parallel.beat("saving")
        if self.is_new:
            self.set_previous_aside(self.checkpoints.folder)
        state = {
            "step": step,
            "run_id": self.run_id,
            "run": identity(self),
            "scaler": self.engine.scaler.state_dict(),
            "stability": self.stability.state_dict(),
            "objective": self.objective.state_dict(self.datasets()),
            "random": random_state(),
            "spent": (self.seconds, self.tokens),
        }
        try:
            self.checkpoints.wait()
        except UserError as error:
            self.say(f"{error}. Those before it are kept; training goes on and tries again now")
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
        if self.parallel.is_main:
            results = (checkpoints, self.weights_path, self.run_dir / REPORT, self.run_dir / SAMPLES)
            set_aside(self.run_dir, results if self.has_results else ())

    @property
    def has_results(self) -> bool:
        """Whether there is anything whole of a run, which is not so after it was killed in its first save."""
        return bool(list_checkpoints(self.checkpoints.folder)) or self.weights_path.exists()
