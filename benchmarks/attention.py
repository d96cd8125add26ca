"""GIT attention on a GPU against what else computes it: `python -m benchmarks.attention --out FILE`.

Same inputs, one process, device time, rotating inputs, interleaved repeats, medians; every result is compared with fp64
before it is timed. The CPU has `benchmarks.attention_cpu`. `--smoke` takes tiny shapes on whatever is there: it shows
that the script works.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import attention_peers as peers
from benchmarks import device
from benchmarks.attention_shapes import SHAPES, SMOKE, Shape, compared_part, reference
from benchmarks.measure import Row, markdown, progress
from benchmarks.parts import save_part, table

MODES = {"forward": "forward", "both": "forward + backward"}
TOLERANCE = {"out": 1e-2, "q": 2e-2, "k": 2e-2, "v": 2e-2}  # bf16 against fp64, of the norm
EDGES = (512, 1024, 2048, 4096, 8192)  # lengths between which `auto` tells apart
BACKENDS = {"kernel": peers.OURS, "sdpa": peers.DENSE, "two_call": peers.TWO_CALL}  # what `auto` may choose


@dataclass(frozen=True)
class Goal:
    """How much faster than a peer (x), by mode: must and goal. where: which records it is about."""

    peer: str
    about: str
    where: Callable[[dict], bool]
    must: dict[str, float]
    goal: dict[str, float]


def both(forward: float, whole: float) -> dict[str, float]:
    return {"forward": forward, "both": whole}


GOALS = (
    Goal(peers.DENSE, "M = 577", lambda r: r["images"] == 577 and not r["packed"], both(1.2, 1.1), both(1.8, 1.5)),
    Goal(peers.EFFICIENT, "one sample a row", lambda r: not r["packed"], both(1.6, 1.4), both(2.5, 2.0)),
    Goal(peers.FLEX, "all, mask given", lambda r: True, both(1.0, 1.0), both(1.3, 1.3)),
    Goal(peers.TWO_CALL, "rows alike", lambda r: r["uniform"], both(1.0, 0.95), both(1.4, 1.3)),
    Goal(peers.FLASH, "rows alike", lambda r: r["uniform"], both(1.0, 0.95), both(1.4, 1.3)),
    Goal(peers.DENSE, "packed 8x(257+64)", lambda r: r["shape"] == "7B packed 8x(257+64)", both(5, 5), both(7, 7)),
)
FLOOR_MUST, FLOOR_GOAL, SHORT = 0.5, 0.65, 400  # share of the byte floor where the length is at most SHORT


def inspect_peer(peer: peers.Peer, shape: Shape, layout, inputs, expected: dict) -> tuple[dict, Callable]:
    """What a peer's result is worth before it is timed, and the function to time."""
    mask = peer.build(shape, *layout)
    attend = peer.attend(shape, mask)
    *qkv, grad = inputs
    out = attend(*qkv)
    found = dict(zip("qkv", torch.autograd.grad(out, qkv, grad), strict=True)) | {"out": out.detach()}
    facts: dict = {}
    if peer.exact:
        live = layout[0][-1] >= 0
        facts["error"] = {
            name: device.relative_error(compared_part(shape, name, x)[live], expected[name][live])
            for name, x in found.items()
        }
        # a NaN compares as wrong, too
        facts["wrong"] = not all(facts["error"][name] <= TOLERANCE[name] for name in TOLERANCE)
    facts["build_ms"] = device.host_ms(lambda turn: peer.build(shape, *layout), 5)
    facts["forward_mb"] = device.peak_mb(lambda turn: attend(*qkv))
    facts["both_mb"] = device.peak_mb(lambda turn: torch.autograd.grad(attend(*qkv), qkv, grad))
    if peer.name in (peers.OURS, peers.DENSE):
        facts["launches"] = device.launches(lambda turn: torch.autograd.grad(attend(*qkv), qkv, grad))
    return facts, attend


def measure_shape(shape: Shape, contestants: Iterable[peers.Peer], repeats: int, ceilings: dict[str, float]) -> dict:
    """One record: every peer's errors, memory and times, or why it was not measured."""
    where = device.device()
    layout = shape.layout(where)
    size = sum(x.nbytes for x in shape.inputs(where, 0))
    sets = [shape.inputs(where, seed) for seed in range(device.sets_of(size))]
    expected = reference(shape, peers.GitMask.from_segments(*layout).dense(), sets[0])
    record = {
        "shape": shape.name, "batch": shape.batch, "length": shape.length, "heads": shape.heads,
        "kv_heads": shape.kv_heads, "head_size": shape.head_size, "packed": shape.packed,
        "images": max(m for row in shape.segments for m, _ in row), "uniform": shape.uniform is not None,
        "pairs": shape.pairs, "tokens": shape.tokens,
        "flops": {mode: shape.flops(mode == "both") for mode in MODES}, "floor_ms": shape.floors(ceilings), "peers": {},
    }  # fmt: skip
    runs = {}
    for peer in contestants:
        if shape.extra and not peer.extra:
            continue
        try:
            facts, attend = inspect_peer(peer, shape, layout, sets[0], expected)
        except peers.Unavailable as reason:
            facts = {"skipped": str(reason)}
        except Exception as error:  # somebody else's code: its row says so, the others are measured
            device.synchronize()  # after a fault of the device nothing can be measured: this raises again
            facts = {"skipped": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
        else:
            runs |= timed_modes(peer.name, attend, sets)
        record["peers"][peer.name] = facts
    for (name, mode), times in device.medians(runs, repeats).items():
        record["peers"][name][f"{mode}_ms"] = times
    return record


def timed_modes(name: str, attend: peers.Attend, sets: list) -> dict[tuple[str, str], Callable[[int], None]]:
    def forward(q, k, v, grad):
        return attend(q, k, v)

    def whole(q, k, v, grad):
        return torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

    return {(name, "forward"): device.rotated(sets, forward), (name, "both"): device.rotated(sets, whole)}


def time_of(record: dict, peer: str, mode: str) -> float | None:
    """Median ms, None where it was not measured."""
    return record["peers"].get(peer, {}).get(f"{mode}_ms", {}).get("median")


def verdicts(records: Iterable[dict]) -> list[Row]:
    """What was asked for, shape by shape; ratios of medians."""
    records, rows = list(records), []
    for goal in GOALS:
        for record in filter(goal.where, records):
            for mode, title in MODES.items():
                mine, theirs = (time_of(record, name, mode) for name in (peers.OURS, goal.peer))
                if mine is None or theirs is None:
                    continue
                wrong = record["peers"][goal.peer].get("wrong")
                rows.append(
                    against(
                        f"{goal.peer} ({goal.about}): {record['shape']}, {title}", theirs / mine, "x", goal.must[mode],
                        goal.goal[mode], "its result is wrong" if wrong else "",
                    )
                )  # fmt: skip
    for record in records:
        for mode, title in MODES.items():
            mine = time_of(record, peers.OURS, mode)
            if record["length"] <= SHORT and not record["packed"] and mine is not None:
                what = f"share of the byte floor: {record['shape']}, {title}"
                rows.append(against(what, record["floor_ms"][f"{mode}_bytes"] / mine, "", FLOOR_MUST, FLOOR_GOAL))
        mine = record["peers"].get(peers.OURS, {})
        if mine.get("wrong") or "skipped" in mine:
            what, note = f"error: {record['shape']}", mine.get("skipped", "")
            rows.append(Row("attention", what, math.nan, "", goal="right", met=False, note=note))
    return rows


def against(what: str, value: float, unit: str, must: float, goal: float, note: str = "") -> Row:
    reached = "goal met" if value >= goal else "goal missed"
    note = "; ".join(text for text in (reached, note) if text)
    return Row("attention", what, value, unit, goal=f">= {must:g} (goal {goal:g})", met=value >= must, note=note)


def choices(records: Iterable[dict], name: str) -> list[dict]:
    """Which backend `auto` takes on this device, by head size, packing and length: the fastest forward + backward.

    Each entry: {"device", "head_size", "queries_up_to", "packed", "backend"}; where that is "two_call", which not every
    batch can take, an entry with the fastest of the rest follows. Shapes between two edges decide together; a backend
    that cannot run one of them, or whose result is wrong, is out.
    """
    groups: dict[tuple, list[dict[str, float]]] = {}
    for record in records:
        times = {
            backend: spent for backend, peer in BACKENDS.items()
            if (spent := time_of(record, peer, "both")) is not None and not record["peers"][peer].get("wrong")
        }  # fmt: skip
        edge = next((edge for edge in EDGES if record["length"] <= edge), None)
        if edge is not None:
            groups.setdefault((record["head_size"], record["packed"], edge), []).append(times)
    entries = []
    for (head_size, packed, edge), group in sorted(groups.items()):
        able = [backend for backend in BACKENDS if all(backend in times for times in group)]
        able.sort(key=lambda backend: sum(times[backend] / min(times.values()) for times in group))
        for backend in able[: 2 if able[:1] == ["two_call"] else 1]:
            entry = {"device": name, "head_size": head_size, "queries_up_to": edge, "packed": packed}
            entries.append(entry | {"backend": backend})
    return entries


def write_choices(path: Path, entries: list[dict]) -> None:
    """Puts entries into the table: those about the same thing are replaced, others stay."""

    def about(entry: dict) -> tuple:
        return entry["device"], entry["head_size"], entry["packed"], entry["queries_up_to"]

    known = json.loads(path.read_text()) if path.exists() else []
    again = {about(entry) for entry in entries}
    whole = sorted([entry for entry in known if about(entry) not in again] + entries, key=about)
    part = path.with_name(path.name + ".part")
    lines = ",\n".join("  " + json.dumps(entry) for entry in whole)
    part.write_text(f"[\n{lines}\n]\n" if whole else "[]\n")
    os.replace(part, path)


def render(records: list[dict], left_out: list[str]) -> str:
    """Tables for people: times with our speed-up over each peer, then memory and mask building, then what was not."""
    names = [peer.name for peer in peers.PEERS]
    lines, facts, skipped = [], [], {}
    for record in records:
        for mode, title in MODES.items():
            mine, floor = time_of(record, peers.OURS, mode), record["floor_ms"][mode]
            line = [f"{record['shape']}, {title}", f"{floor:.3f}"]
            for name in names:
                spent = time_of(record, name, mode)
                if spent is None:
                    line.append("")
                elif name == peers.OURS:
                    rate = record["flops"][mode] / spent / 1e9
                    line.append(f"{spent:.3f} ({rate:.0f} TFLOP/s, {100 * floor / spent:.0f} %)")
                else:
                    wrong = " WRONG" if record["peers"][name].get("wrong") else ""
                    line.append(f"{spent:.3f}" + (f" ({spent / mine:.2f}x)" if mine else "") + wrong)
            lines.append(line)
        for name, found in record["peers"].items():
            if "skipped" in found:
                skipped.setdefault((name, found["skipped"]), []).append(record["shape"])
            else:
                memory = ["" if found[key] is None else f"{found[key]:.0f}" for key in ("forward_mb", "both_mb")]
                error = found.get("error", {})
                errors = [f"{error[part]:.1e}" if error else "other mask" for part in TOLERANCE]
                facts.append([f"{record['shape']}: {name}", *memory, f"{found['build_ms']:.3f}", *errors])
    text = ["ms; floor: the larger of bytes and arithmetic at the measured ceilings; (x): our speed-up", ""]
    text += [table(["shape", "floor", *names], lines), ""]
    text += [table(["peak memory and mask building", "MB forward", "MB both", "mask ms", *TOLERANCE], facts), ""]
    for (name, why), shapes in skipped.items():
        everywhere = len(shapes) == sum(name in record["peers"] for record in records)
        text.append(f"* not measured: {name}: {why}" + ("" if everywhere else f" ({'; '.join(shapes)})"))
    text += [f"* not measured, out of time: {name}" for name in left_out]
    return "\n".join(text)


def compile_flex(shapes: Iterable[Shape], seconds: float) -> None:
    """Compiles FlexAttention for all shapes at once, each in its own process: the measuring run finds it cached."""
    environ = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.attention", "--warm"]
    running = [subprocess.Popen([*command, shape.name], env=environ) for shape in shapes if not shape.extra]
    end = time.monotonic() + seconds
    for process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def warm_flex(shape: Shape) -> None:
    where = device.device()
    *qkv, grad = shape.inputs(where, 0)
    attend = peers.flex(shape, peers.block_mask(shape, *shape.layout(where)))
    torch.autograd.grad(attend(*qkv), qkv, grad)
    device.synchronize()


def run(shapes: Iterable[Shape], args: argparse.Namespace) -> int:
    begin, shapes, records, left_out = time.monotonic(), list(shapes), [], []
    ceilings = device.ceilings(0.001, 64, 2) if args.smoke else device.ceilings()
    about = {"ceilings": ceilings, "repeats": args.repeats, "machine": device.machine()}

    def save(complete: bool) -> None:
        text = render(records, left_out)
        save_part(args.out, "attention", text, verdicts(records), complete, **about, records=records)
        if args.measured:
            write_choices(args.measured, choices(records, about["machine"]["architecture"] or "cpu"))

    for shape in shapes:
        spent = time.monotonic() - begin
        longest = max((record["seconds"] for record in records), default=0.0)
        if spent + longest > args.seconds:
            left_out.append(shape.name)
            continue
        start = time.monotonic()
        torch._dynamo.reset()
        record = measure_shape(shape, peers.PEERS, args.repeats, ceilings)
        records.append(record | {"seconds": time.monotonic() - start})
        progress(f"attention: {shape.name}: {time.monotonic() - start:.1f} s")
        save(False)
    save(not left_out)
    print(render(records, left_out), markdown(verdicts(records)), sep="\n\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on whatever is there: measures nothing")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls of each (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=240, help="begin no shape after that (default %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="shapes whose name contains it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write records, verdicts and text there")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="write the table for backend='auto' there")
    parser.add_argument("--compile", action="store_true", help="only compile FlexAttention for all shapes, in parallel")
    parser.add_argument("--warm", metavar="SHAPE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.smoke:
        parser.error("no CUDA device is visible: only --smoke runs without one")
    shapes = [shape for shape in (SMOKE if args.smoke else SHAPES) if args.only in shape.name]
    if args.warm:
        warm_flex(next(shape for shape in shapes if shape.name == args.warm))
        return 0
    if args.compile:
        compile_flex(shapes, args.seconds)
        return 0
    return run(shapes, args)


if __name__ == "__main__":
    sys.exit(main())
