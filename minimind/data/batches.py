"""Batches for training: rows of packed segments, any row of any epoch at once.

    store = prepare("dataset/pretrain_hq.jsonl", "pretrain", tokenizer)
    training, held_out = split_holdout(store)
    data = PackedDataset(store, 512, seed=42, pad_id=0, eos_id=2, documents=training)
    batch = data.batch(epoch=0, row_start=0, row_count=32)

What a row holds depends on (seed, epoch, row) alone. So a run is continued by asking for its next rows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch

from minimind.data.epochs import Drawn, Epochs
from minimind.data.holdout import all_documents
from minimind.data.segments import Documents, make_segments, slabs
from minimind.data.store import TokenStore
from minimind.errors import UserError
from minimind.loops import compiled

T = TypeVar("T")


@dataclass
class Batch:
    """B rows of T = `max_seq_len` positions. Attend only where `document_ids` are equal."""

    input_ids: torch.Tensor  # (B, T) int64; padding: pad_id
    labels: torch.Tensor  # (B, T) int64, the next token of the same document; padding: pad_id
    loss_mask: torch.Tensor  # (B, T) float32, weight of the label in the loss: 0 where it is no target
    position_ids: torch.Tensor  # (B, T) int64, from 0 in every segment; padding: 0
    document_ids: torch.Tensor  # (B, T) int32, 0, 1, 2 … for the segments of a row; padding: -1
    targets_at: torch.Tensor  # (M,) int64, flat indices of the positions whose loss_mask is not 0

    @property
    def row_units(self) -> torch.Tensor:
        """(B,) what each row counts for in the mean that is the loss: the weight of its targets."""
        return self.loss_mask.sum(dim=1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """In page-locked memory, from where a copy to a GPU does not block."""
        return self._map(torch.Tensor.pin_memory)

    @property
    def num_target_tokens(self) -> int:
        """Labels that count in the loss, whatever their weight."""
        return len(self.targets_at)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(self, **{field.name: change(getattr(self, field.name)) for field in fields(self)})


@dataclass
class PairBatch(Batch):
    """A batch of P preference pairs. The two documents of a pair stand in one row, the chosen one first."""

    pairs: torch.Tensor  # (P,) int64, the number of each pair in the store, row after row
    sides: torch.Tensor  # (M,) int64, the answer each target is of: 2p in the chosen one of pair p, or 2p + 1
    pairs_in_row: torch.Tensor  # (B,) int64
    reference: torch.Tensor  # (P, 2) float32, `PairDataset.reference` of these pairs

    @property
    def row_units(self) -> torch.Tensor:
        return self.pairs_in_row


@compiled()
def fill(
    tokens, classes, weight_of_class, starts, lengths, borders, ids, labels, loss_mask, positions, documents
):
    """Write the stretches of each row into it, one after the other; without classes all are targets.

    A batch for a GPU has hundreds. Written in Python, they would keep it from the thread that feeds the GPU.
    """
    for row in range(len(borders) - 1):
        column = 0
        for stretch in range(borders[row], borders[row + 1]):
            for i in range(lengths[stretch]):
                source = starts[stretch] + i
                ids[row, column] = tokens[source]
                labels[row, column] = tokens[source + 1]
                loss_mask[row, column] = weight_of_class[classes[source + 1]] if len(classes) else 1
                positions[row, column] = i
                documents[row, column] = stretch - borders[row]
                column += 1


class PackedDataset:
    """A `TokenStore` as rows of `max_seq_len` positions.

    Attributes:
        num_rows: rows in an epoch, the same in all.
        num_tokens: positions with a token in an epoch.
        padding_fraction: positions without a token, of all positions.
        report: how many documents were split, cut or dropped; see `segments.CutReport`.
    """

    def __init__(
        self,
        store: TokenStore,
        max_seq_len: int,
        *,
        seed: int,
        pad_id: int,
        eos_id: int,
        documents: Documents | None = None,
        tag_weight: float = 1.0,
    ):
        """Make up the rows.

        Args:
            documents: the documents of the store to use, ascending; without it, all.
            tag_weight: weight in the loss of the tokens that make up a reasoning answer's tags.
        """
        documents = all_documents(store) if documents is None else documents
        segments, self.report = make_segments(store, documents, max_seq_len, eos_id)
        self.store, self.max_seq_len, self.pad_id = store, max_seq_len, pad_id
        self._target_weights = np.array([0, 1, tag_weight], np.float32)  # by the store's class of a token
        self._epochs = Epochs(segments, max_seq_len, seed)
        self.num_rows = len(self._epochs.rows)
        self.num_tokens = segments.num_positions
        self.padding_fraction = 1 - self.num_tokens / max(self.num_rows * max_seq_len, 1)

    def batch(self, epoch: int, row_start: int, row_count: int, min_rows: int = 0) -> Batch:
        """Rows `row_start` … `row_start + row_count - 1` of an epoch; fewer where the epoch ends before.

        Rows of padding make it up to `min_rows`, for those who need batches of one shape.
        """
        drawn = self._draw(epoch, row_start, row_count)
        shape = (max(len(drawn), min_rows), self.max_seq_len)
        arrays = Batch(
            input_ids=np.full(shape, self.pad_id, np.int64),
            labels=np.full(shape, self.pad_id, np.int64),
            loss_mask=np.zeros(shape, np.float32),
            position_ids=np.zeros(shape, np.int64),
            document_ids=np.full(shape, -1, np.int32),
            targets_at=np.empty(0, np.int64),
        )
        stretches, weights = self._stretches(drawn), self.store.weights
        fill(
            np.asarray(self.store.tokens),
            np.empty(0, np.uint8) if weights is None else np.asarray(weights),
            self._target_weights,
            *(stretches.starts, stretches.lengths, stretches.borders),
            *(arrays.input_ids, arrays.labels, arrays.loss_mask, arrays.position_ids, arrays.document_ids),
        )
        self.store.release()  # another batch needs other pages
        arrays.targets_at = np.flatnonzero(arrays.loss_mask)
        return arrays._map(torch.from_numpy)

    def _draw(self, epoch: int, row_start: int, row_count: int) -> Drawn:
        """Rows of an epoch, fewer where it ends before."""
        return self._epochs.draw(epoch, row_start, min(row_start + row_count, self.num_rows))

    def _stretches(self, drawn: Drawn) -> Drawn:
        """Where each stretch of a document begins in the store, and how many positions it takes."""
        return drawn

    def tokens(self, epoch: int, rows: int) -> int:
        """Positions with a token in the first `rows` rows of an epoch."""
        return self._epochs.tokens(epoch, rows)

    def source_lines(self, epoch: int, row: int) -> list[int]:
        """The lines of the JSONL file that a row was made from, to name them when its loss is not finite."""
        documents = self.store.documents_at(self._draw(epoch, row, 1).starts)
        return sorted({int(line) for line in self.store.lines[documents]})


class PairDataset(PackedDataset):
    """A store of preference pairs as rows that hold whole pairs.

    Attributes:
        reference: (pairs of the store, 2) float32, the log-probability of each chosen and rejected answer
            under the model that training starts from; NaN until somebody has worked it out.

    Raises: UserError when an answer has no target, which can happen with another tokenizer's chat template.
    """

    def __init__(self, store: TokenStore, max_seq_len: int, **arguments):
        super().__init__(store, max_seq_len, **arguments)
        line = line_without_target(store)
        if line:
            raise UserError(
                f"{store.meta['source']}:{line}: the chat template in --tokenizer_path leaves out an answer "
                "of this pair; mend it, or use the shipped tokenizer"
            )
        self.reference = torch.full((store.num_documents // 2, 2), torch.nan)

    def batch(self, epoch: int, row_start: int, row_count: int, min_rows: int = 0) -> PairBatch:
        batch = super().batch(epoch, row_start, row_count, min_rows)
        drawn = self._draw(epoch, row_start, row_count)
        pairs_in_row = torch.zeros(len(batch.input_ids), dtype=torch.int64)
        pairs_in_row[: len(drawn)] = torch.from_numpy(np.diff(drawn.borders))
        pairs_before = pairs_in_row.cumsum(0) - pairs_in_row  # (B,)
        row_of_target = batch.targets_at // self.max_seq_len  # (M,)
        pairs = torch.from_numpy(self.store.documents_at(drawn.starts) // 2)
        return PairBatch(
            **vars(batch),
            pairs=pairs,
            sides=2 * pairs_before[row_of_target] + batch.document_ids.flatten()[batch.targets_at],
            pairs_in_row=pairs_in_row,
            reference=self.reference[pairs],
        )

    def _stretches(self, drawn: Drawn) -> Drawn:
        chosen = self.store.documents_at(drawn.starts)
        starts = np.stack((chosen, chosen + 1), axis=1).flatten()
        offsets = self.store.offsets
        return Drawn(offsets[starts], offsets[starts + 1] - offsets[starts] - 1, 2 * drawn.borders)


def line_without_target(store: TokenStore) -> int | None:
    """The line of the first document in which nothing is a target, if there is one."""
    assert store.weights is not None  # as all pairs have
    for documents in slabs(store, all_documents(store)):
        borders = store.offsets[documents[0] : documents[-1] + 2]
        weights = store.weights[borders[0] : borders[-1]]
        has_target = np.logical_or.reduceat(weights, borders[:-1] - borders[0])  # (documents,)
        if not has_target.all():
            return int(store.lines[documents[has_target.argmin()]])
    return None


def prefetch(iterable: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """The items of `iterable`, made by a thread that stays up to `depth` items ahead.

    What `iterable` raises is raised here. The thread ends with the generator, also if that is closed early.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
    room = threading.Semaphore(depth - 1)  # the thread always makes one
    closed = threading.Event()

    def work() -> None:
        try:
            for item in iterable:
                ready.put((item, None))
                room.acquire()
                if closed.is_set():
                    return
            ready.put((None, StopIteration()))
        except BaseException as error:
            ready.put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        closed.set()
        room.release()
        thread.join()
