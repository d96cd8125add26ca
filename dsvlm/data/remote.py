"""Byte ranges of files at URLs, through fsspec, with patience for stores that fail now and then."""

import hashlib
import os
import random
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dsvlm.data.files import sha256_of, write_file

# Of one request: with the waits below about 16 s when a store refuses at once, and 4 minutes when it never answers.
ATTEMPTS = 7
SILENCE = 30                      # seconds without a byte, after which a web server's answer is given up
FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0                                     # seconds, doubled each time
CONCURRENT = 16                   # requests of one reader at a time: of a task, in one process
# Asking again does not help against these; everything else a store raises may be gone the next time.
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, NotImplementedError, ValueError)


class RemoteError(OSError):
    """A store did not answer, or not with what was asked for, at any attempt."""


class Stores:
    """The file systems that a process talks to, one per scheme and host; fsspec's own are one per thread too."""

    def __init__(self):
        self._systems: dict[tuple[int, str], object] = {}                # by process and host
        self._lock = threading.Lock()
        self.asked = 0                            # requests that have no answer yet

    def __reduce__(self):
        return Stores, ()

    @contextmanager
    def asking(self):
        """Counts a request, from its first attempt to its last."""
        with self._lock:
            self.asked += 1
        try:
            yield
        finally:
            with self._lock:
                self.asked -= 1

    def connect(self, url: str):
        """(file system, path) of a URL; a forked process connects anew."""
        import fsspec

        key = os.getpid(), "/".join(url.split("/")[:3])
        if (system := self._systems.get(key)) is None:
            system = self._systems.setdefault(key, fsspec.core.url_to_fs(url, **_options(url))[0])
        return system, system._strip_protocol(url)


class RemoteFile:
    """A file at a URL. Nothing of it is open, so it may be pickled, forked and used by several threads.

    name: what messages call it. size: in bytes; None = ask the store.
    """

    def __init__(self, url: str, size: int | None = None, name: str = "", stores: Stores | None = None):
        self.url, self.name, self.stores = url, name or url, stores or Stores()
        if size is None:
            size = sizes([url])[url]
        if size is None:
            raise ValueError(f"no file {url}")
        self.size = size

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from `offset` on, fewer at the end of the file; RemoteError names shard, URL and attempts."""
        stop = min(offset + size, self.size)
        if stop <= offset:
            return b""
        with self.stores.asking():
            return retry(self.url, self.name, lambda: self._range(offset, stop))

    def _range(self, start: int, stop: int) -> bytes:
        fs, path = self.stores.connect(self.url)
        data = bytes(fs.cat_file(path, start=start, end=stop))
        if len(data) > stop - start:
            raise ValueError(f"{len(data)} bytes instead of {stop - start}: the server does not support ranges")
        if len(data) < stop - start:
            raise OSError(f"{len(data)} bytes instead of {stop - start}")
        return data


def retry(url: str, name: str, request: Callable):
    """The answer of a request, asked again after waits that double and are scattered, so that ranks do not pile up."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except PERMANENT as error:
            raise RemoteError(f"{name} cannot be read from {url} (attempt {attempt}): {_reason(error)}") from error
        except Exception as error:                  # each store has exceptions of its own
            if attempt == ATTEMPTS:
                raise RemoteError(f"{name} cannot be read from {url} after {attempt} attempts: {_reason(error)}; "
                                  f"check the store and the network") from error
            time.sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1.5))


def sizes(urls: Iterable[str]) -> dict[str, int | None]:
    """Bytes of the file at each URL, None = there is none; several requests at a time."""
    stores = Stores()

    def size(url: str) -> int | None:
        fs, path = stores.connect(url)
        try:
            return fs.info(path)["size"]
        except FileNotFoundError as error:
            # fsspec says so of whatever goes wrong with a web server; what it was is the cause.
            if error.__cause__ is None or getattr(error.__cause__, "status", None) in (404, 410):
                return None
            raise OSError(str(error.__cause__)) from error

    urls = list(dict.fromkeys(urls))
    with ThreadPoolExecutor(CONCURRENT) as pool:
        return dict(zip(urls, pool.map(lambda url: retry(url, url, lambda: size(url)), urls), strict=True))


def download(url: str, target: Path, sha256: str = "") -> None:
    """Copy a small file, unless it is there already; complete or absent, also with several processes at it.

    sha256: of its content; a copy that has another is fetched again. ValueError when the store has other content too.
    """
    if target.exists() and sha256 in ("", _sha256(target)):
        return
    data = retry(url, target.name, lambda: _whole(url))
    found = hashlib.sha256(data).hexdigest()
    if sha256 not in ("", found):
        raise ValueError(f"{url}: sha256 {sha256} expected, {found} found: the set is being copied there, or the copy "
                         f"is damaged; wait for its end, or copy it again")
    _keep(target, data)


def mirror(url: str, name: str, cache: str) -> Path:
    """A local directory with the named file of a directory at a URL; one directory for each content it ever had."""
    try:
        data = retry(f"{url}/{name}", name, lambda: _whole(f"{url}/{name}"))
    except RemoteError as error:
        raise ValueError(f"no shard set at {url}: {error}") from error
    content = hashlib.sha256(url.encode() + b"\0" + data).hexdigest()[:32]
    target = cache_directory(cache) / "sets" / content / name
    if not target.exists() or target.read_bytes() != data:
        _keep(target, data)
    return target.parent


def cache_directory(cache: str) -> Path:
    """The node's directory for parts of remote files, made when absent; ValueError when it is somebody else's."""
    default = Path(tempfile.gettempdir()) / f"dsvlm-cache-{os.getuid()}"
    directory = Path(cache) if cache else default
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = directory.lstat()                    # a link in a directory that all may write to may be anybody's
    if not cache and (status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022 or directory.is_symlink()):
        raise ValueError(f"{directory} is a link, or others may write to it: set data.remote_cache to a directory of "
                         f"your own")
    return directory


def _options(url: str) -> dict:
    """For web servers a limit of silence: of its own, aiohttp waits five minutes. What the user configured stays."""
    if url.partition("://")[0] not in ("http", "https"):
        return {}
    import aiohttp
    import fsspec

    given = {}
    for scheme in ("http", "https"):
        given |= fsspec.config.conf.get(scheme, {}).get("client_kwargs", {})
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=300, sock_connect=SILENCE, sock_read=SILENCE)}
            | given}


def _keep(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_file(target, data)


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError:
        return "unreadable"           # a disk that fails, or another process that cleans up


def _whole(url: str) -> bytes:
    fs, path = Stores().connect(url)
    return bytes(fs.cat_file(path))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
