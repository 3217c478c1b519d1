"""Turn blocks of JSONL lines into token arrays, in this process or in several.

A worker is a fresh Python that runs `serve` and talks pickles over its stdin and stdout. `multiprocessing`
would import the training script, and PyTorch with it, into every worker: seconds and hundreds of megabytes.
Importing nothing but the tokenizer and NumPy, a worker starts in a quarter of a second. And its stdin ends
with its parent, even a killed one, where a process pool's workers would wait for ever.
"""

from __future__ import annotations

import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import zlib
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from minimind.data.lines import BadRecord, Block
from minimind.data.records import TAG, Kind, chats_of, parse_block
from minimind.errors import UserError
from minimind.tokenizer import Tokenizer

TAG_BYTES = re.compile(TAG.pattern.encode())


@dataclass
class EncodedBlock:
    """The documents of a block, one after the other. A preference pair is two: chosen, then rejected."""

    tokens: np.ndarray  # (tokens,) uint16, or uint32 for a vocabulary above 65,536
    weights: np.ndarray | None  # (tokens,) uint8: 1 on targets, 2 in a tag, else 0; None where all are 1
    lengths: np.ndarray  # (documents,) int64
    lines: np.ndarray  # (documents,) int64, line in the JSONL file, from 1
    fingerprints: np.ndarray  # (documents,) uint32, of the tokens of the whole record
    utf8_bytes: int  # of the texts, without JSON and template
    bad_records: list[BadRecord]
    position: int  # bytes of the file read so far, for the progress bar


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_block(block: Block, kind: Kind, file: str, tokenizer: Tokenizer) -> EncodedBlock:
    """Parse, check and tokenise the lines of `block`."""
    records, bad_records = parse_block(block, kind, file)
    found: list[Any] = [record for _, record in records]
    documents = (
        _encode_texts(found, tokenizer) if kind == "pretrain" else _encode_chats(found, kind, tokenizer)
    )
    tokens, weights, lengths, utf8_bytes = documents
    tokens = tokens.astype(token_dtype(tokenizer.vocab_size))
    per_record = 2 if kind == "preference" else 1
    ends = lengths.reshape(-1, per_record).sum(axis=1).cumsum()
    fingerprints = [zlib.crc32(part) for part in np.split(tokens, ends[:-1])] if len(ends) else []
    return EncodedBlock(
        tokens=tokens,
        weights=weights,
        lengths=lengths,
        lines=np.array([line for line, _ in records], np.int64).repeat(per_record),
        fingerprints=np.array(fingerprints, np.uint32).repeat(per_record),
        utf8_bytes=utf8_bytes,
        bad_records=bad_records,
        position=block.position,
    )


# Of `EncodedBlock`: tokens, weights, lengths, utf8_bytes.
Documents = tuple[np.ndarray, np.ndarray | None, np.ndarray, int]


def _encode_texts(records: list[Any], tokenizer: Tokenizer) -> Documents:
    texts = [record.text for record in records]
    tokens = tokenizer.encode_documents(texts)
    lengths = np.diff(tokenizer.document_ends(tokens), prepend=0)
    return tokens, None, lengths, sum(len(text.encode()) for text in texts)


def _encode_chats(records: list[Any], kind: Kind, tokenizer: Tokenizer) -> Documents:
    conversations: list[Any] = [messages for record in records for messages in chats_of(record)]
    encoded = tokenizer.encode_chat_batch(conversations)
    if kind == "preference":
        encoded = [(ids, _last_answer(mask)) for ids, mask in encoded]
    elif kind == "reasoning":
        encoded = [(ids, _mark_tags(ids, mask, tokenizer)) for ids, mask in encoded]
    utf8_bytes = sum(len(message["content"].encode()) for messages in conversations for message in messages)
    lengths = np.array([len(ids) for ids, _ in encoded], np.int64)
    tokens = np.fromiter(chain.from_iterable(ids for ids, _ in encoded), np.uint32, lengths.sum())
    weights = np.fromiter(chain.from_iterable(mask for _, mask in encoded), np.uint8, lengths.sum())
    return tokens, weights, lengths, utf8_bytes


def _last_answer(mask: list[int]) -> list[int]:
    """`mask` with its last run of ones alone: in a pair, earlier answers belong to the prompt both share."""
    start = bytes(mask).rstrip(b"\0").rfind(b"\0") + 1
    return [0] * start + mask[start:]


def _mark_tags(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> list[int]:
    """`mask` with a 2 for every token of the answers that holds a byte of a tag.

    Tags are found by their bytes, since a tokenizer may cut them anywhere and join their `>` to what follows.
    """
    token_bytes = tokenizer.token_bytes
    answers = [token_bytes[i] if target else b"" for i, target in zip(ids, mask, strict=True)]
    ends = list(accumulate(map(len, answers)))
    marked = list(mask)
    for tag in TAG_BYTES.finditer(b"".join(answers)):
        first, last = bisect_right(ends, tag.start()), bisect_left(ends, tag.end())
        marked[first : last + 1] = [2] * (last + 1 - first)
    return marked


def encode_blocks(
    blocks: Iterable[Block | BadRecord], kind: Kind, file: str, tokenizer: Tokenizer, num_workers: int
) -> Generator[EncodedBlock | BadRecord, None, None]:
    """`encode_block` over `blocks`, in their order; bad records between blocks are handed on.

    With `num_workers` 0 the work is done here. Otherwise at most two blocks a worker are under way, so memory
    does not grow with the file. Close the iterator to end the workers early.
    """
    if num_workers == 0:
        for block in blocks:
            yield block if isinstance(block, BadRecord) else encode_block(block, kind, file, tokenizer)
        return
    workers = [_Worker(kind, file, tokenizer) for _ in range(num_workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def encode(block: Block) -> EncodedBlock:
        worker = idle.get()
        try:
            return worker.encode(block)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(num_workers)  # each only waits for its worker
    under_way: deque[Future[EncodedBlock] | BadRecord] = deque()
    try:
        for block in blocks:
            under_way.append(block if isinstance(block, BadRecord) else threads.submit(encode, block))
            if len(under_way) > 2 * num_workers:
                yield _result(under_way.popleft())
        while under_way:
            yield _result(under_way.popleft())
    finally:
        for worker in workers:
            worker.end()
        threads.shutdown(cancel_futures=True)


def _result(item: Future[EncodedBlock] | BadRecord) -> EncodedBlock | BadRecord:
    return item if isinstance(item, BadRecord) else item.result()


class _Worker:
    """The near end of a worker process."""

    def __init__(self, kind: Kind, file: str, tokenizer: Tokenizer):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # one core a worker
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-P", "-c", "from minimind.data.encode import serve; serve()"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._greeting: tuple | None = (kind, file, tokenizer)

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin, pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def encode(self, block: Block) -> EncodedBlock:
        try:
            if self._greeting:  # sent only now, so that workers start side by side
                self._send(self._greeting)
                self._greeting = None
            self._send(block)
            assert self._process.stdout is not None
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            if code < 0:
                raise UserError(
                    f"a tokenising process was killed by signal {-code}, perhaps for lack of memory; "
                    "nothing was kept, run this again with a lower --num_workers"
                ) from None
            raise RuntimeError(f"a tokenising process ended with code {code}, see above") from None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """The far end: encode blocks from stdin until it is closed, also by the death of the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a stray print must not end up among the replies
    try:
        kind, file, tokenizer = pickle.load(requests)
        while True:
            encoded = encode_block(pickle.load(requests), kind, file, tokenizer)
            pickle.dump(encoded, replies, pickle.HIGHEST_PROTOCOL)
            replies.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # without flushing to a pipe that nobody reads
