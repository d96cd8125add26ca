"""An object store in miniature: local files behind a latency and a bandwidth per request, as an fsspec file system."""

import os
import time
from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem

PROTOCOL = "slow"
LATENCY, BANDWIDTH = 0.03, 200e6  # seconds, bytes per second of one stream


class SlowStore(AbstractFileSystem):
    """`slow:///path` is the local file /path, served late.

    latency: seconds before each answer; bandwidth: bytes per second of each stream; fail_every: each n-th request
    fails, 0 = none. `requests` (counted by path) and `sent` (bytes) are of this process since `register`.
    """

    protocol = PROTOCOL
    requests: list[str] = []
    sent: list[int] = []

    def __init__(self, latency=LATENCY, bandwidth=BANDWIDTH, fail_every=0, **options):
        super().__init__(**options)
        self.latency, self.bandwidth, self.fail_every = float(latency), float(bandwidth), int(fail_every)

    def cat_file(self, path, start=None, end=None, **options) -> bytes:
        self.requests.append(str(path))
        if self.fail_every and len(self.requests) % self.fail_every == 0:
            raise TimeoutError("the store is busy")
        with Path(self._strip_protocol(path)).open("rb") as file:
            file.seek(start or 0)
            data = file.read() if end is None else file.read(end - (start or 0))
        time.sleep(self.latency + len(data) / self.bandwidth)
        self.sent.append(len(data))
        return data

    def info(self, path, **options) -> dict:
        time.sleep(self.latency)
        path = Path(self._strip_protocol(path))
        if not path.exists():
            raise FileNotFoundError(path)
        return {"name": str(path), "size": path.stat().st_size, "type": "file"}


def register(latency: float = LATENCY, bandwidth: float = BANDWIDTH, fail_every: int = 0) -> type[SlowStore]:
    """Make `slow://` known in this process; returns the class, whose counters start anew."""
    fsspec.register_implementation(PROTOCOL, SlowStore, clobber=True)
    fsspec.config.conf[PROTOCOL] = {"latency": latency, "bandwidth": bandwidth, "fail_every": fail_every}
    SlowStore.clear_instance_cache()
    SlowStore.requests, SlowStore.sent = [], []
    return SlowStore


def environment(directory: Path, latency: float = LATENCY, bandwidth: float = BANDWIDTH) -> dict[str, str]:
    """Environment variables under which processes started later know `slow://` too, loaders' workers among them.

    directory: gets the few lines of an installed package that fsspec looks for.
    """
    package = Path(directory) / "slow_store-1.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: slow-store\nVersion: 1\n")
    (package / "entry_points.txt").write_text(f"[fsspec.specs]\n{PROTOCOL} = benchmarks.slow_store.SlowStore\n")
    path = [str(directory), str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), f"FSSPEC_{PROTOCOL.upper()}_LATENCY": str(latency),
            f"FSSPEC_{PROTOCOL.upper()}_BANDWIDTH": str(bandwidth)}
