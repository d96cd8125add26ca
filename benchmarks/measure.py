"""How the benchmarks measure: interleaved repeats, medians and ranges, the machine's load, memory of processes."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
IDLE_LOAD = 0.3  # above it at the start, figures are not for publishing
PACKAGES = (
    "torch", "numpy", "pillow", "pyarrow", "transformers", "tokenizers", "simplejpeg", "isal", "webdataset",
    "mosaicml-streaming", "litdata", "megatron-energon",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table.

    value: median; low, high: range over the repeats; goal: as text, "" = for comparison; met: None where there is none.
    """

    part: str
    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    goal: str = ""
    met: bool | None = None
    note: str = ""

    def to_dict(self) -> dict:
        return asdict(self)


def spread(part: str, what: str, values: Iterable[float], unit: str, **more) -> Row:
    """A row from repeats."""
    values = list(values)
    return Row(part, what, statistics.median(values), unit, min(values), max(values), **more)


def interleaved(contestants: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Runs A, B, ..., A, B, ...: a change of the machine's mood meets all alike. Each call returns one figure."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats):
        for name, run in contestants.items():
            results[name].append(run())
            progress(f"{repeat + 1}/{repeats} {name}: {results[name][-1]:.4g}")
    return results


def ratios(results: Mapping[str, list[float]], above: str, below: str) -> list[float]:
    """Quotients of neighbouring repeats, which share the machine's mood."""
    return [a / b for a, b in zip(results[above], results[below], strict=True)]


def rate(run: Callable[[], int]) -> float:
    """Samples per second of a run that returns how many it read."""
    start = time.perf_counter()
    count = run()
    return count / (time.perf_counter() - start)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load() -> float:
    return os.getloadavg()[0]


def machine() -> dict:
    """What a result is worth nothing without: processor, cores, system, versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        "system": platform.system() + " " + platform.release().split("-")[0], "commit": commit(), "versions": versions,
    }  # fmt: skip


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def commit() -> str:
    """Short hash of the checkout, with a plus when files differ from it; "" outside of git."""
    root = Path(__file__).parents[1]
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip()


def pss_mb(pid: int) -> float:
    """Proportional set size of a process in MB: shared pages count in parts."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in rollup if line.startswith("Pss:")).split()[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and all its descendants so far; those that have ended count if they were awaited."""
    total = 0
    for each in [pid, *children(pid)]:
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        total += sum(map(int, fields[11:15 if each == pid else 13]))
    return total / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Process ids of all descendants."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def markdown(rows: Iterable[Row]) -> str:
    """The table for people."""
    lines = ["| part | what | median | range | goal | |", "|---|---|---:|---:|---|---|"]
    for row in rows:
        low_high = "" if row.low is None else f"{shown(row.low)} to {shown(row.high)}"
        mark = {None: "", True: "met", False: "**not met**"}[row.met]
        tail = "; ".join(text for text in (mark, row.note) if text)
        lines.append(f"| {row.part} | {row.what} | {shown(row.value)} {row.unit} | {low_high} | {row.goal} | {tail} |")
    return "\n".join(lines)


def publish(report: dict, text: str, name: str, to_json: Path | None, save: bool) -> None:
    """Prints the table; writes the report to `to_json`, and with `save` both into results/, by name and date."""
    print(text)
    data = json.dumps(report, indent=1) + "\n"
    if to_json:
        to_json.write_text(data)
    if save:
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / f"{name}-{report['date']}"
        target.with_suffix(".json").write_text(data)
        target.with_suffix(".md").write_text(text + "\n")


def shown(value: float) -> str:
    """Three significant digits; whole numbers in full."""
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
