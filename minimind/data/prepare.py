"""Tokenise a data file once and keep the result beside it.

`prepare` streams the JSONL file through `records` and `encode` into a `TokenStore`. The store is found again
by what it was made from: the bytes of the file, the kind of records, the tokenizer and the version of the
format. It does not depend on `max_seq_len`; cutting and packing happen later, on the arrays.

A store is built in `NAME.tmp`, under a lock, and renamed to `NAME` when every byte is on disk. So a build
that was killed leaves no store behind, and of several processes that need the same one, one builds it and the
others wait.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import closing
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from minimind.data.encode import EncodedBlock, encode_blocks
from minimind.data.lines import BadRecord, no_records, open_file, read_blocks
from minimind.data.records import Kind, OnBadRecord
from minimind.data.store import BAD_RECORDS, FORMAT_VERSION, StoreWriter, TokenStore
from minimind.environment import available_cores
from minimind.errors import UserError
from minimind.files import put_in_place, shown_size, sync, write_text
from minimind.tokenizer import Tokenizer

SMALL_FILE_BYTES = 1 << 20  # below, starting workers takes longer than the work
CLOCK_RESOLUTION = 2.0  # seconds, of the file systems that are worst at it
MAX_WORKERS = 8  # a worker needs about 90 MB, and all together stay below 1 GB


def prepare(
    path: str | Path,
    kind: Kind,
    tokenizer: Tokenizer,
    *,
    on_bad_record: OnBadRecord = "stop",
    cache_dir: str | Path | None = None,
    num_workers: int | None = None,
    progress: bool = True,
) -> TokenStore:
    """The tokens of a JSONL file (plain or .gz), from the cache if it holds them.

    Args:
        kind: "pretrain", "conversation", "reasoning" or "preference"; see `records` for the formats.
        on_bad_record: "stop" raises on the first bad record; "skip" leaves bad records out, says how many
            and lists them in `bad_records.jsonl` in the store's folder. A BOM or Windows line ends stop too,
            but cost no record with "skip".
        cache_dir: where stores are kept; by default `.cache` beside the file, or `~/.cache/minimind` where
            that cannot be written.
        num_workers: processes that tokenise; by default one for every core, and none for a small file.
        progress: show a progress bar (on a terminal) and what was done, on stderr.

    Raises:
        UserError: the file cannot be read, changes while it is read, has a bad record or no usable one, or
            the disk is full.
    """
    path = Path(path)
    cache = _cache_folder(path, cache_dir)
    content, state = _content_hash(path, cache)
    key = hashlib.sha256(f"{FORMAT_VERSION} {kind} {tokenizer.fingerprint} {content}".encode()).hexdigest()
    folder = cache / f"{kind}-{key[:20]}"
    if num_workers is None:
        num_workers = 0 if state.st_size < SMALL_FILE_BYTES else min(available_cores(), MAX_WORKERS)

    _remove_stale_builds(cache)
    store = TokenStore.open(folder)
    if store is None:
        with _lock(folder, f"waiting for another process to tokenise {path}" if progress else None):
            store = TokenStore.open(folder)  # the process we waited for may have built it
            if store is None:
                meta = {
                    "kind": kind,
                    "source": str(path),
                    "content_sha256": content,
                    "tokenizer_fingerprint": tokenizer.fingerprint,
                    "vocab_size": tokenizer.vocab_size,
                }
                _build(path, state, folder, meta, tokenizer, on_bad_record, num_workers, progress)
                store = TokenStore.open(folder)
    assert store is not None  # it was built
    _report_bad_records(store, path, on_bad_record, progress)
    return store


def _cache_folder(path: Path, cache_dir: str | Path | None) -> Path:
    beside, at_home = path.parent / ".cache", Path.home() / ".cache" / "minimind"
    choices = [Path(cache_dir)] if cache_dir else [beside, at_home]
    for folder in choices:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise UserError(f"{choices[-1]} cannot be written, and the tokens of {path} must be kept somewhere")


def _content_hash(path: Path, cache: Path) -> tuple[str, os.stat_result]:
    """SHA-256 of the bytes of the file, and its state before they were read.

    The content decides which store is used; but gigabytes are hashed once, not at each start: the hash is
    remembered with the file's state, and trusted as long as that is the same.
    """
    memory = cache / "hashes" / f"{path.name}.json"
    with open_file(path) as file:
        state = os.fstat(file.fileno())
        known = _remembered(memory)
        if known.get("state") == _whole_state(state):
            return known["sha256"], state
        # A change within the clock's resolution would leave the time as it is.
        settled = time.time() - max(state.st_ctime, state.st_mtime) > CLOCK_RESOLUTION
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if settled and _whole_state(os.fstat(file.fileno())) == _whole_state(state):
            entry = json.dumps({"state": _whole_state(state), "sha256": sha256})
            with contextlib.suppress(UserError):  # a full disk; it is only hashed again
                write_text(memory, entry)
        return sha256, state


def _remembered(memory: Path) -> dict:
    try:
        return dict(json.loads(memory.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _whole_state(state: os.stat_result) -> list[int]:
    """Changes with every write to a file, also where a tool sets the time of the last one back."""
    return [state.st_dev, *_identity(state), state.st_ctime_ns]


def _lock_file(folder: Path) -> Path:
    return folder.with_suffix(".lock")


def _remove_stale_builds(cache: Path) -> None:
    """Delete what killed builds left: a `.tmp` folder that nobody holds the lock of."""
    for stale in cache.glob("*.tmp"):
        try:
            with FileLock(_lock_file(stale), timeout=0):
                shutil.rmtree(stale, ignore_errors=True)
        except Timeout:
            pass  # at work


def _lock(folder: Path, say_waiting: str | None) -> AcquireReturnProxy:
    """Hold the lock of `folder` in a `with` block."""
    lock = FileLock(_lock_file(folder))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if say_waiting:
            _say(say_waiting)
        return lock.acquire()


def _build(
    path: Path,
    state: os.stat_result,
    folder: Path,
    meta: dict,
    tokenizer: Tokenizer,
    on_bad_record: OnBadRecord,
    num_workers: int,
    progress: bool,
) -> None:
    """Write the store `folder` beside its place and rename it there. The caller holds its lock."""
    building = folder.with_suffix(".tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        blocks = encode_blocks(read_blocks(path), meta["kind"], str(path), tokenizer, num_workers)
        bar = _ProgressBar(path, state.st_size, progress)
        with closing(StoreWriter(building, meta)) as writer, closing(blocks), bar:
            for block in blocks:
                _add(writer, block, on_bad_record)
                bar.show(block, writer)
            if not writer.counts["num_documents"]:
                raise no_records(path)
            if _identity(path.stat()) != _identity(state):
                raise UserError(f"{path} changed while it was read; run this again when it is complete")
            writer.finish()
        sync(building)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        put_in_place(building, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{folder.parent}: the disk is full; the tokens need up to two thirds of the size of {path.name}"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    bar.summary(writer, folder)


def _identity(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_size, state.st_mtime_ns


def _add(writer: StoreWriter, block: EncodedBlock | BadRecord, on_bad_record: OnBadRecord) -> None:
    bad_records = [block] if isinstance(block, BadRecord) else block.bad_records
    for bad in bad_records:
        if on_bad_record == "stop":
            raise bad.stop()
        writer.add_bad_record(bad)
    if isinstance(block, EncodedBlock):
        writer.add(block)


def _report_bad_records(store: TokenStore, path: Path, on_bad_record: OnBadRecord, progress: bool) -> None:
    """A store made with "skip" must not pass for a clean one, nor be silent when it comes from the cache."""
    first = next(store.bad_records(), None)
    if first is None:
        return
    first = first._replace(file=str(path))  # the file may have been moved since
    if on_bad_record == "stop":
        raise first.stop()
    if progress:
        skipped, documents = store.meta["skipped"], store.num_documents
        _say(f"{path}: {skipped:,} bad records skipped, {documents:,} documents used")
        _say(f"  the first flaw: {first}\n  all of them: {store.folder / BAD_RECORDS}")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class _ProgressBar:
    """A bar with rate and remaining time on a terminal, and one line at the end everywhere."""

    def __init__(self, path: Path, file_bytes: int, progress: bool):
        self._path, self._said, self._start = path, progress, time.perf_counter()
        self._bar = Progress(
            TextColumn("tokenising {task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]:5.1f} MB/s of text "),
            TimeRemainingColumn(),
            console=(console := Console(stderr=True)),
            disable=not (progress and console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task(path.name, total=file_bytes, rate=0.0)

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _rate(self, writer: StoreWriter) -> float:
        return writer.counts["utf8_bytes"] / 1e6 / (time.perf_counter() - self._start)

    def show(self, block: EncodedBlock | BadRecord, writer: StoreWriter) -> None:
        if isinstance(block, EncodedBlock):
            self._bar.update(self._task, completed=block.position, rate=self._rate(writer))

    def summary(self, writer: StoreWriter, folder: Path) -> None:
        if self._said:
            documents, tokens = writer.counts["num_documents"], writer.counts["num_tokens"]
            text = f"{shown_size(writer.counts['utf8_bytes'])} of text at {self._rate(writer):.1f} MB/s"
            _say(f"{self._path}: {documents:,} documents, {tokens:,} tokens from {text}, kept in {folder}")
