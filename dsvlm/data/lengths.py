"""Lengths of a task's samples, in a side file: ranks know all lengths of a window without reading it.

`lengths-<16 hex>.npy`: uint16 [samples, 2], text tokens and images of each row as the loader makes it. The name hashes
all that they depend on, so a file of another tokenizer, prompt or conversion is never taken for this one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dsvlm.data.encode import encode_record, masked_sample
from dsvlm.data.reader import BadSample
from dsvlm.data.tokenizer import TextCodec

VERSION = 2  # of what a record becomes: raise it when encode_record or a task type's template changes
LARGEST = 2**16 - 1
CHUNK = 4096  # samples that a process counts at a time


def lengths_name(**parts) -> str:
    """File name of the lengths that depend on `parts` (JSON values)."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True)
    return f"lengths-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"


class Lengths:
    """The side file of one shard set, mapped into memory; pickling carries the path alone.

    ValueError when the file is not one of `samples` samples.
    """

    def __init__(self, path: Path, samples: int):
        self.path, self.samples = Path(path), samples
        assert len(self.table) == samples  # opened now, so that a damaged file is found now

    def __reduce__(self):
        return Lengths, (self.path, self.samples)

    @cached_property
    def table(self) -> np.ndarray:
        """[samples, 2] uint16: text tokens, images."""
        try:
            table = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{self.path} is not a file of lengths ({error}): remove it, and it is made anew"
            ) from error
        if table.shape != (self.samples, 2) or table.dtype != np.uint16:
            raise ValueError(
                f"{self.path}: uint16 [{self.samples}, 2] expected, {table.dtype} {list(table.shape)} found: "
                "remove it, and it is made anew"
            )
        return table

    def positions(self, samples: np.ndarray, image_tokens: int) -> np.ndarray:
        """Positions that `samples: [n] int64` take in a row, images and text, [n] int64."""
        return self.table[samples].astype(np.int64) @ [1, image_tokens]

    def histogram(self, image_tokens: int) -> np.ndarray:
        """[longest + 1] int64: samples of each number of positions."""
        pairs = (self.table[start : start + 2**20] for start in range(0, self.samples, 2**20))
        counts = [np.bincount(part.astype(np.int64) @ [1, image_tokens]) for part in pairs]
        total = np.zeros(max(map(len, counts)), np.int64)
        for part in counts:
            total[: len(part)] += part
        return total

    def hash(self) -> str:
        """sha256 of the file, for ranks to compare."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def write_lengths(path: Path, table: np.ndarray) -> None:
    """Write a side file under its final name once its bytes are on the disk. table: [samples, 2] uint16."""
    assert table.dtype == np.uint16 and table.ndim == 2 and table.shape[1] == 2, (table.dtype, table.shape)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, table, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def count_lengths(
    source, codec: TextCodec, max_length: int, *, encoder_decoder: bool, workers: int = 0,
    progress: Callable[[Iterable], Iterable] = iter, chunk: int = CHUNK,
) -> np.ndarray:  # fmt: skip
    """Encode every sample of a task and return its lengths, [samples, 2] uint16; bad samples count as they are masked.

    source: as the loader's; workers: processes, 0 = this one; progress: wraps the chunks of samples.
    """
    if max_length > LARGEST:
        raise ValueError(f"text.max_length: {max_length} is more than side files of lengths hold ({LARGEST}); lower it")
    size = len(source.reader)
    chunks = [range(start, min(start + chunk, size)) for start in range(0, size, chunk)]
    count = partial(_count, source, codec, max_length, encoder_decoder)
    parts = list(progress(_mapped(count, chunks, workers if len(chunks) > 1 else 0)))
    return np.concatenate(parts) if parts else np.zeros((0, 2), np.uint16)


def _mapped(count: Callable[[range], np.ndarray], chunks: list[range], workers: int) -> Iterator[np.ndarray]:
    if not workers:
        yield from map(count, chunks)
        return
    # Spawned: the caller may hold threads, and those of tokenizers do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(count, chunks)
        except BrokenProcessPool as error:
            raise ValueError(f"a process that counted lengths was ended from outside ({error}): start again") from error


def _count(source, codec: TextCodec, max_length: int, encoder_decoder: bool, samples: range) -> np.ndarray:
    masked = masked_sample(codec, encoder_decoder)
    source.reader.fetch(np.array(samples), when=0)
    found = []
    for sample in samples:
        try:
            text = encode_record(
                source.reader.record(sample), source.sample, codec, max_length,
                encoder_decoder=encoder_decoder, images=source.images, classes=source.classes,
            )  # fmt: skip
        except BadSample:
            text = masked
        found.append((len(text.tokens), text.images))
    return np.array(found, np.uint16)
