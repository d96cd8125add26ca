"""The data plane measured: `python -m benchmarks.data` prints the table of the README.

    a  raw samples per second            e  time to the first batch after a resume
    b  loader against the decode limit   f  simulated object store
    c  loader against other loaders      g  memory of workers and indexes
    d  plan, digest and state            h  samples lost or repeated, tasks of ranks; p  padding

Other loaders are compared when they are installed: benchmarks/requirements.txt.
"""

import argparse
import dataclasses
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.inputs import make_inputs
from benchmarks.measure import IDLE_LOAD, Row, load, machine, markdown, progress, publish

PARTS = "abcdefghp"


@dataclass(frozen=True)
class Size:
    """How much is measured. warm, timed: batches of a run, thrown away and timed."""

    samples: int
    repeats: int
    warm: int
    timed: int
    epochs: tuple[int, ...]
    huge: tuple[int, int]  # shards, samples of each
    indexed: int  # samples
    seconds: float  # of each figure of the plan


FULL = Size(8000, 5, 128, 64, (1, 5, 10), (10_000, 100_000), 100_000_000, 0.1)
QUICK = Size(640, 1, 4, 6, (1, 2), (100, 1000), 200_000, 0.02)


def measure(part: str, root: Path, work: Path, size: Size) -> list[Row]:
    """The rows of one part; what it needs is imported here, so that `--only` runs without the rest."""
    if part == "a":
        from benchmarks.raw import measure_raw

        return measure_raw(root, size.repeats, min(4000, size.samples))
    if part in "bc":
        from benchmarks.endtoend import measure_limit, measure_peers

        if part == "b":
            return measure_limit(root, size.repeats, size.warm, size.timed)
        return measure_peers(root, size.repeats, size.warm, size.timed, tuned=size.repeats > 1)
    if part == "d":
        from benchmarks.resume import measure_state

        return plan_rows(size) + measure_state(root, work)
    if part == "e":
        from benchmarks.resume import measure_resume

        return measure_resume(root, size.repeats, *size.huge)
    if part == "f":
        from benchmarks.store import measure_store

        return measure_store(root, work, size.repeats, size.warm, size.timed)
    if part == "g":
        from benchmarks.memory import measure_index, measure_memory

        return measure_memory(root, size.epochs) + measure_index(size.indexed)
    if part == "h":
        from benchmarks.coverage import measure_coverage

        return measure_coverage(root)
    return padding_rows()


def plan_rows(size: Size) -> list[Row]:
    """The smallest and largest world of `benchmarks.plan`, which shows all."""
    from benchmarks import plan

    ends = [f", W = {world:,}" for world in (plan.WORLDS[0], plan.WORLDS[-1])]
    found = [row for row in plan.plan_rows(size.repeats, size.seconds) if row.what.endswith(tuple(ends))]
    found += plan.length_rows(size.repeats) + plan.digest_rows(size.repeats)
    return [dataclasses.replace(row, part="d", what=f"{row.part}: {row.what}") for row in found]


def padding_rows() -> list[Row]:
    from benchmarks.padding import MIXTURE, STEPS, WINDOW, table

    rows = []
    for found in table(WINDOW, [8], STEPS):
        goal = {} if found["goal"] is None else {"goal": f">= {found['goal']}", "met": found["met"]}
        if found["data"] == MIXTURE:
            what = f"useful tokens, {found['data']}, {found['cut']}, W = {found['world_size']}"
            rows.append(Row("p", what, found["useful"], "", **goal))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, help=f"captions to generate (default {FULL.samples})")
    parser.add_argument("--repeats", type=int, help=f"of each contestant, interleaved (default {FULL.repeats})")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: shows that it runs, measures nothing")
    parser.add_argument("--only", default=",".join(PARTS), metavar="a,c", help="parts to measure (default all)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "dsvlm-benchmarks",
                        help="directory for generated inputs, kept for the next run (default %(default)s)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine there, too")
    parser.add_argument("--save", action="store_true", help="write both into benchmarks/results, dated")
    args = parser.parse_args()
    changed = {name: getattr(args, name) for name in ("samples", "repeats") if getattr(args, name)}
    size = dataclasses.replace(QUICK if args.quick else FULL, **changed)
    parts = args.only.split(",")
    if unknown := [part for part in parts if part not in PARTS or not part]:
        parser.error(f"--only {','.join(unknown)}: parts are {', '.join(PARTS)}")
    report = run(parts, args.work, size)
    publish(report, render(report), "data", args.json, args.save)


def run(parts: list[str], work: Path, size: Size) -> dict:
    """Measures the parts, one after the other."""
    from benchmarks.endtoend import make_tokenizer

    at_start, begin = load(), time.perf_counter()
    publishable = at_start <= IDLE_LOAD and size.repeats >= FULL.repeats
    if at_start > IDLE_LOAD:
        progress(f"warning: load {at_start:.2f} at the start, more than {IDLE_LOAD}: figures are not for publishing")
    work.mkdir(parents=True, exist_ok=True)
    root = make_inputs(work, size.samples).root
    make_tokenizer(root)
    rows: list[Row] = []
    for part in parts:
        progress(f"part {part}")
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            rows += measure(part, root, Path(scratch), size)
    return {
        "date": date.today().isoformat(), "publishable": publishable, "load": [at_start, load()],
        "seconds": time.perf_counter() - begin, "size": dataclasses.asdict(size), "machine": machine(),
        "rows": [row.to_dict() for row in rows],
    }  # fmt: skip


def render(report: dict) -> str:
    about = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        markdown(Row(**row) for row in report["rows"]), "",
        f"{report['date']}, {about['cores']} cores, {about['processor']}, {about['system']}, Python {about['python']}, "
        f"{versions}; commit {about['commit']}; load {report['load'][0]:.2f} before, {report['load'][1]:.2f} after; "
        f"{report['size']['repeats']} interleaved repeats, median and range; {report['seconds']:.0f} s.",
    ]  # fmt: skip
    if not report["publishable"]:
        lines.append("Not publishable: the machine was busy, or fewer repeats than usual.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
