"""How GPU benchmarks measure: device events behind a filled queue, rotating inputs, interleaved; and what runs it.

On a machine without a GPU the same functions take the wall clock, so that the scripts themselves are tested.
"""

import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from benchmarks.measure import commit, processor

CLOCK_HZ = 2.0e9  # no GPU of today counts faster: a pause lasts at least as long as it says
SHORTEST_PAUSE, LONGEST_PAUSE = 5e-4, 0.1  # seconds
FEWEST_SETS = 2


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cache_bytes() -> int:
    """Size of the device's last cache; inputs rotate over several times as much."""
    if not torch.cuda.is_available():
        return 0
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)


def sets_of(size: int) -> int:
    """How many copies of inputs of `size` bytes are needed so that none is still in the cache when its turn comes."""
    return max(FEWEST_SETS, math.ceil(3 * cache_bytes() / max(size, 1)) + 1) if torch.cuda.is_available() else 1


class Stopwatch:
    """Times calls on the device alone: a pause is queued before each, so that the host is done when it starts.

    A call that waits for the device itself cannot be queued ahead: `waits` says so, and its time includes the host's.
    """

    def __init__(self, run: Callable[[int], Any]):
        self.run, self.turn, self.pause, self.waits = run, 0, SHORTEST_PAUSE, False

    def __call__(self) -> float:
        """Milliseconds of one call, on the next set of inputs."""
        self.turn += 1
        if not torch.cuda.is_available():
            start = time.perf_counter()
            self.run(self.turn)
            return 1e3 * (time.perf_counter() - start)
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if not self.waits:
                torch.cuda._sleep(int(self.pause * CLOCK_HZ))
            start.record()
            self.run(self.turn)
            end.record()
            too_late = start.query()  # the device was through with the pause before the last launch was queued
            end.synchronize()
            if self.waits or not too_late:
                return start.elapsed_time(end)
            self.pause *= 2
            self.waits = self.pause > LONGEST_PAUSE


def medians(runs: Mapping[str, Callable[[int], Any]], repeats: int, warm: int = 3) -> dict[str, dict]:
    """Times several runs A, B, ..., A, B, ...: name -> median, low, high in ms, and whether the run waits by itself."""
    watches = {name: Stopwatch(run) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in watches}
    for repeat in range(warm + repeats):
        for name, watch in watches.items():
            spent = watch()
            if repeat >= warm:
                taken[name].append(spent)
    return {
        name: {"median": statistics.median(times), "low": min(times), "high": max(times), "waits": watches[name].waits}
        for name, times in taken.items()
    }


def host_ms(run: Callable[[int], Any], repeats: int) -> float:
    """Median wall time of a call that is awaited: what it costs where nothing else keeps the device busy."""
    times = []
    for turn in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        run(turn)
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def peak_mb(run: Callable[[int], Any]) -> float | None:
    """Memory that a call needs above what is allocated before it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def launches(run: Callable[[int], Any]) -> list[str] | None:
    """Names of the kernels, copies and fills that a call puts on the device, in order; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    run(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run(1)
        torch.cuda.synchronize()
    on_device = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events = [event for event in on_device if not getattr(event, "is_user_annotation", False)]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


def ceilings(gib: float = 2.0, side: int = 8192, repeats: int = 10) -> dict[str, float]:
    """What this device does at best: bytes read and written by a copy per second, bf16 FLOP/s of a matrix product."""
    where = device()
    source = torch.randn(int(gib * 2**28), device=where)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    found = medians({"copy": lambda turn: target.copy_(source), "product": lambda turn: a @ b}, repeats)
    return {
        "bytes_per_s": 2 * source.nbytes / (found["copy"]["median"] / 1e3),
        "flop_per_s": 2 * side**3 / (found["product"]["median"] / 1e3),
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| over all elements; NaN where there is a NaN."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def machine() -> dict:
    """What GPU results are worth nothing without."""
    about: dict[str, Any] = {"commit": os.environ.get("DSVLM_COMMIT") or commit(), "torch": torch.__version__}
    about |= {"cuda": torch.version.cuda or "", "processor": processor(), "cores": len(os.sched_getaffinity(0))}
    for package in ("triton", "transformers", "deepspeed", "numpy"):
        try:
            about[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            about[package] = ""
    if not torch.cuda.is_available():
        return about | {"device": "", "architecture": "", "driver": ""}
    properties = torch.cuda.get_device_properties(0)
    return about | {
        "device": properties.name, "architecture": architecture(), "driver": driver(),
        "multiprocessors": properties.multi_processor_count, "memory_gib": round(properties.total_memory / 2**30),
        "cache_mb": cache_bytes() / 1e6, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def architecture() -> str:
    """"sm_90": what the table for `backend="auto"` calls the device."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(0))


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def rotated(sets: Sequence[Any], run: Callable[..., Any]) -> Callable[[int], Any]:
    """A run that takes the next set of inputs at every turn."""
    return lambda turn: run(*sets[turn % len(sets)])
