"""The CPU attention against torch's own with a dense mask: `python -m benchmarks.attention_cpu` prints the table.

Batches are cut to one row, heads and lengths stay. torch gets contiguous [B, H, S, D] and a bool mask made beforehand;
ours gets [B, S, H, D] and the intervals, and is called by its public name. Repeats are interleaved; time is by the
clock, with one thread the processor's, which a busy machine disturbs less.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.attention_shapes import SHAPES, Shape, alike
from benchmarks.measure import IDLE_LOAD, Row, interleaved, load, machine, markdown, progress, publish, ratios, spread
from dsvlm.ops import GitMask, git_attention

REPEATS, THREADS = 7, 2
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL = Shape("OPT-350M packed 8x(257+64)", 16, 16, 64, alike(1, 257, 64, 8))
LONG = 3000  # beyond it a repeat takes torch many seconds: fewer of them


def shapes(only: str) -> list[Shape]:
    found = [replace(s, segments=s.segments[:1]) for s in SHAPES if not s.extra and s.uniform] + [SMALL]
    found += [replace(s, segments=s.segments[:1]) for s in SHAPES if not s.extra and s.packed]
    return [shape for shape in found if only in shape.name]


def contestants(shape: Shape, dtype: torch.dtype, clock: Callable[[], float]) -> dict[str, Callable[[], float]]:
    """Seconds of one call of each, by name and mode."""
    cpu = torch.device("cpu")
    mask = GitMask.from_segments(*shape.layout(cpu))
    dense = mask.dense()
    *qkv, grad = shape.inputs(cpu, 0, dtype)
    turned = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in qkv]
    turned_grad = grad.transpose(1, 2).contiguous()
    grouped = shape.heads != shape.kv_heads

    def ours():
        return git_attention(*qkv, mask, backend="kernel")

    def theirs():
        return F.scaled_dot_product_attention(*turned, attn_mask=dense, enable_gqa=grouped)

    def seconds(attend, leaves, weight) -> float:
        begin = clock()
        if weight is None:
            with torch.no_grad():
                attend()
        else:
            torch.autograd.grad(attend(), leaves, weight)
        return clock() - begin

    return {
        "ours, forward": lambda: seconds(ours, qkv, None),
        "theirs, forward": lambda: seconds(theirs, turned, None),
        "ours, forward + backward": lambda: seconds(ours, qkv, grad),
        "theirs, forward + backward": lambda: seconds(theirs, turned, turned_grad),
    }


def measure(shape: Shape, name: str, repeats: int, threads: int) -> list[Row]:
    runs = contestants(shape, TYPES[name], time.thread_time if threads == 1 else time.perf_counter)
    for run in runs.values():
        run()
    found = interleaved(runs, max(3, repeats // 2) if shape.length > LONG else repeats)
    rows = []
    for mode in ("forward", "forward + backward"):
        speed_up = ratios(found, f"theirs, {mode}", f"ours, {mode}")
        ours, theirs = (statistics.median(found[f"{who}, {mode}"]) for who in ("ours", "theirs"))
        must = 4.0 if shape.packed else 1.0
        rate = shape.flops(mode != "forward") / ours / 1e9
        note = f"{1e3 * ours:.1f} ms against {1e3 * theirs:.1f} ms, {rate:.0f} GFLOP/s of exact pairs"
        what = f"{shape.name}: H {shape.heads}/{shape.kv_heads}, D {shape.head_size}, {mode}"
        met = statistics.median(speed_up) >= must
        rows.append(spread(name, what, speed_up, "x", goal=f">= {must:g}", met=met, note=note))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of each, interleaved (default %(default)s)")
    parser.add_argument("--threads", type=int, default=THREADS, help="default %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="shapes whose name contains it")
    parser.add_argument("--types", default=",".join(TYPES), help="default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine there, too")
    parser.add_argument("--save", action="store_true", help="write both into benchmarks/results, dated")
    args = parser.parse_args()
    names = args.types.split(",")
    if unknown := [name for name in names if name not in TYPES]:
        parser.error(f"--types {','.join(unknown)}: types are {', '.join(TYPES)}")
    torch.set_num_threads(args.threads)
    at_start, rows = load(), []
    for name in names:
        for shape in shapes(args.only):
            progress(f"{name} {shape.name}")
            rows += measure(shape, name, args.repeats, args.threads)
    busy = at_start > IDLE_LOAD
    report = {
        "date": date.today().isoformat(), "publishable": not busy and args.repeats >= REPEATS, "threads": args.threads,
        "repeats": args.repeats, "load": [at_start, load()], "machine": machine(), "rows": [r.to_dict() for r in rows],
    }  # fmt: skip
    publish(report, render(report), "attention-cpu", args.json, args.save)


def render(report: dict) -> str:
    about, one = report["machine"], report["threads"] == 1
    how = "1 thread, processor time" if one else f"{report['threads']} threads, time by the clock"
    lines = [
        markdown(Row(**row) for row in report["rows"]), "",
        f"Speed-up over scaled_dot_product_attention with a dense bool mask: median and range of {report['repeats']} "
        f"interleaved repeats (fewer for the longest), {how}, {about['processor']}, torch "
        f"{about['versions']['torch']}, commit {about['commit']}, {report['date']}; load {report['load'][0]:.2f} "
        f"before, {report['load'][1]:.2f} after.",
    ]  # fmt: skip
    if not report["publishable"]:
        lines.append("Not publishable: the machine was busy, or fewer repeats than usual.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
