"""Shards of other tools scanned once each, side by side; what is finished is kept until all are."""

import hashlib
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from dsvlm.data.files import write_file
from dsvlm.data.index import gathered, scan_tar
from dsvlm.data.manifest import arrow_bytes, is_parquet, is_url
from dsvlm.data.stream import LocalFile, Stream

VERSION = 2                       # of what a scan gives: raise it when an index is made otherwise
CHANGES = ("ETag", "etag", "LastModified", "last_modified", "mtime", "created", "generation")


GRACE = 0.5  # seconds for our own Ctrl-C to arrive: it reaches the workers, too, and they may be the first to end


class Unfinished(ValueError):
    """Some of several shards could not be read, or do not fit the fields; what they all gave is kept."""


@dataclass(frozen=True)
class Scan:
    """Scans a shard into an index file of `directory`; one that is there for the same bytes is not made again.

    image: extension of the image, of tars; mapping: `fields` and `image`, of parquet files.
    """

    directory: Path
    image: str | None = None
    mapping: dict | None = None

    def __call__(self, shard: str) -> dict:
        """{"file", "samples", "bytes", "sha256", "index_sha256", "members", "gathered"}; ValueError if damaged."""
        mark = state(shard)
        place = shard if is_url(shard) else os.path.abspath(shard)
        key = json.dumps([VERSION, place, mark or uuid.uuid4().hex, self.image, self.mapping], sort_keys=True)
        stem = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self._kept(stem) or self._scan(shard, mark, stem)

    def _kept(self, stem: str) -> dict | None:
        try:
            found = json.loads((self.directory / f"{stem}.json").read_bytes())
            data = (self.directory / found["file"]).read_bytes()
        except (OSError, ValueError):
            return None
        return found if hashlib.sha256(data).hexdigest() == found["index_sha256"] else None

    def _scan(self, shard: str, mark: list | None, stem: str) -> dict:
        file = open_file(shard)
        stream = Stream(file.read, file.size)
        if is_parquet(shard):
            from dsvlm.data.parquet import index_parquet

            table, members, apart = index_parquet(shard, file, self.mapping), [], 0
        else:
            table = scan_tar(shard, stream, self.image)
            members = [name.removesuffix(".offset") for name in table.column_names if name.endswith(".offset")]
            apart = gathered(table)
        sha256, data = stream.sha256(), arrow_bytes(table)
        if state(shard) != mark:
            raise ValueError(f"{shard} was changed while it was read: wait until it is complete")
        found = {"file": f"{stem}.arrow", "samples": table.num_rows, "bytes": stream.size, "sha256": sha256,
                 "index_sha256": hashlib.sha256(data).hexdigest(), "members": members, "gathered": apart}
        write_file(self.directory / found["file"], data)
        write_file(self.directory / f"{stem}.json", json.dumps(found).encode())
        return found


def state(shard: str) -> list | None:
    """What changes when a shard does; None when its store tells nothing of the kind. ValueError when there is none."""
    if not is_url(shard):
        if not os.path.isfile(shard):
            raise ValueError(f"no file {shard}")
        found = os.stat(shard)
        return [found.st_size, found.st_mtime_ns]
    from dsvlm.data.remote import RemoteFile, retry

    file = RemoteFile(shard)                              # tells what is wrong with the URL
    system, path = file.stores.connect(shard)
    info = retry(shard, shard, lambda: system.info(path))
    changes = [str(info[name]) for name in CHANGES if info.get(name)]
    return [file.size, *changes] if changes else None


def check_distinct(shards: Sequence[str]) -> None:
    """ValueError when two of the shards are one file."""
    known: dict[str, str] = {}
    for shard in map(str, shards):
        place = shard if is_url(shard) else os.path.realpath(shard)
        if place in known:
            twice = "is named twice" if known[place] == shard else f"and {known[place]} are one file"
            raise ValueError(f"{shard} {twice}: its samples would count twice; name it once")
        known[place] = shard


def each(function: Callable, shards: Sequence[str], workers: int = 1, progress=None,
         check: Callable = lambda shard, result: None) -> list:
    """function(shard) of every shard, in order; ValueError at the end names all for which it raised.

    workers: processes, 1 = this one; progress: callable(iterable, desc=str, total=int) -> iterable; check: called with
    the first result, and ends everything when it raises.
    """
    if workers < 1:
        raise ValueError(f"--workers {workers}: choose at least 1")
    results, failed = [], []
    with _mapping(min(workers, len(shards))) as mapped:
        tried = mapped(partial(_try, function), shards)
        bar = tried if progress is None else progress(tried, desc="index", total=len(shards))
        for shard, (result, error) in zip(shards, bar, strict=True):
            if error is None:
                if not results:
                    check(shard, result)
                results.append(result)
            else:
                failed.append(error)
    if failed and len(shards) == 1:
        raise ValueError(failed[0])
    if failed:
        raise Unfinished(f"{len(failed)} of {len(shards)} shards cannot be indexed; what was made of the others is "
                         f"kept for the next call:\n" + "\n".join(failed))
    return results


def open_file(shard: str, size: int | None = None):
    """A shard at a path or URL: `size` and `read(offset, size)`; ValueError when there is none.

    size: in bytes; None = ask the store.
    """
    if is_url(shard):
        from dsvlm.data.remote import RemoteFile

        return RemoteFile(shard, size)
    if not os.path.isfile(shard):
        raise ValueError(f"no file {shard}")
    return LocalFile(Path(shard))


def open_stream(shard: str) -> Stream:
    """A shard at a path or URL, to be read once from start to end."""
    file = open_file(shard)
    return Stream(file.read, file.size)


def _try(function: Callable, shard: str) -> tuple:
    """(result, None), or (None, why there is none)."""
    try:
        return function(shard), None
    except ValueError as error:
        return None, str(error)
    except OSError as error:          # a disk's, which knows nothing of shards
        return None, str(error) if shard in str(error) else f"{shard}: {error}"


@contextmanager
def _mapping(workers: int):
    """A `map` in processes, which starts nothing more once its user has failed."""
    if workers <= 1:
        yield map
        return
    # Spawned: the caller may hold threads, and those of fsspec do not survive a fork.
    # They end at Ctrl-C, which reaches them too, without a word: what is to be said about it, their parent says. Where
    # that one ignores it, as in the background, they do.
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    action = signal.SIG_IGN if ignored else signal.SIG_DFL
    pool = ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, action))
    try:
        yield pool.map
    except BrokenProcessPool as error:
        time.sleep(GRACE)
        raise Unfinished(f"a process that indexed shards was ended from outside ({error}); give it more memory or "
                         f"fewer --workers, and call again: what was finished is kept") from error
    finally:
        pool.shutdown(cancel_futures=True)
