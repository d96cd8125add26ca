"""Expert routing on a GPU against what else does it: `python -m benchmarks.routing --out FILE`.

Device time, interleaved repeats, medians, rotating inputs, and copies of the same bytes in the same process. The CPU
has `benchmarks.routing_cpu`. `--smoke` takes tiny sizes on whatever is there: it shows that the script works.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import device
from benchmarks import routing_peers as peers
from benchmarks.measure import Row, markdown, progress
from benchmarks.parts import save_part, table
from benchmarks.routing_peers import Case
from dsvlm.ops import moe_combine, moe_permute, moe_route

CASES = (
    Case("LIMoE-B/16", 27136, 768, 32),
    Case("7B, 16k tokens", 16384, 4096, 32),
    Case("7B, 16k tokens, top-2", 16384, 4096, 8, 2),
    Case("7B, 8k tokens", 8192, 4096, 8),
    Case("LIMoE-L/16", 13568, 1024, 32),
    Case("64 experts", 32768, 1024, 64),
)
SMOKE = (Case("smoke", 96, 8, 4), Case("smoke top-2", 64, 8, 4, 2))
METADATA_US, COPY_MUST, COPY_GOAL = 10.0, 0.85, 0.9
WHOLE = {peers.DEEPSPEED: 10.0, peers.TUTEL: 10.0, peers.MEGATRON: 5.0}  # times
LAUNCHES = {"forward": 4, "backward": 3}


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Logits and tokens that want gradients, and the gradients of weights and result."""
    where, dtype = device.device(), torch.bfloat16 if torch.cuda.is_available() else torch.float32
    random = torch.Generator(where).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=where)

    return {
        "logits": normal(case.tokens, case.experts).requires_grad_(),
        "x": normal(case.tokens, case.width).to(dtype).requires_grad_(),
        "grad": normal(case.tokens, case.width).to(dtype),
    }


def gating(case: Case, peer: peers.Peer, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    weight, loss, _ = peer.gate(case, given["logits"])
    return torch.autograd.grad(weight.sum() + loss, given["logits"])


def whole(case: Case, peer: peers.Peer, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Gating, the way to the experts (which change nothing), the way back, and all gradients."""
    weight, loss, plan = peer.gate(case, given["logits"])
    out = peer.move(case, given["x"], weight, plan)
    inputs, one = (given["logits"], given["x"]), torch.ones_like(loss)
    return torch.autograd.grad((out, loss), inputs, (given["grad"], one))


def result(case: Case, peer: peers.Peer, given: dict[str, Tensor]) -> Tensor:
    weight, _, plan = peer.gate(case, given["logits"])
    return peer.move(case, given["x"], weight, plan).detach()


def measure_case(case: Case, repeats: int) -> dict:
    """One record: times of gating and of everything for each peer, and our parts against copies of as many bytes."""
    shape = {"case": case.name, "tokens": case.tokens, "width": case.width, "experts": case.experts, "k": case.k}
    record = shape | {"capacity": case.capacity, "peers": {}}
    size = sum(x.nbytes for x in draw(case, 0).values())
    sets = [draw(case, seed) for seed in range(device.sets_of(size))]
    expected, runs = result(case, next(peer for peer in peers.PEERS if peer.name == peers.SORTED), sets[0]), {}
    for peer in peers.PEERS:
        try:
            out = result(case, peer, sets[0])
            whole(case, peer, sets[0])
        except peers.Unavailable as reason:
            record["peers"][peer.name] = {"skipped": str(reason)}
            continue
        except Exception as error:  # somebody else's code: its row says so, the others are measured
            device.synchronize()  # after a fault of the device nothing can be measured: this raises again
            record["peers"][peer.name] = {"skipped": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
            continue
        facts = {"host_ms": device.host_ms(lambda turn, peer=peer: whole(case, peer, sets[turn % len(sets)]), 10)}
        if peer.bpr:
            facts["error"] = device.relative_error(out, expected)
            facts["wrong"] = not facts["error"] <= 1e-2
        record["peers"][peer.name] = facts
        runs |= {
            (peer.name, part.__name__): lambda turn, part=part, peer=peer: part(case, peer, sets[turn % len(sets)])
            for part in (gating, whole)
        }
    for (name, part), times in device.medians(runs, repeats).items():
        record["peers"][name][f"{part}_ms"] = times
    if "skipped" not in record["peers"][peers.OURS]:
        record |= measure_parts(case, sets, repeats)
    return record


def measure_parts(case: Case, sets: list[dict[str, Tensor]], repeats: int) -> dict:
    """Our op alone: metadata, moving against copies, launches."""

    def route(given: dict[str, Tensor]):
        return moe_route(given["logits"], k=case.k, capacity=case.capacity, backend="kernel")

    plans = [route(given) for given in sets]
    kept, rows = int(plans[0].kept.sum()), len(plans[0].src)
    parts: dict[str, tuple[int, list[Callable[[], object]]]] = {}  # rows read and written, a run for each set

    def add(name: str, moved: int, make: Callable[[dict, object], Callable[[], object]]) -> None:
        parts[name] = moved, [make(given, plan) for given, plan in zip(sets, plans, strict=True)]

    def back(output: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)

    def permute_backward(given, plan):
        out = moe_permute(given["x"], plan.src, plan.slot, backend="kernel")
        return back(out, (given["x"],), torch.randn_like(out))

    def combine_backward(given, plan):
        y = torch.randn(rows, case.width, device=given["x"].device).to(given["x"].dtype).requires_grad_()
        weight = plan.weight.detach().requires_grad_()
        return back(moe_combine(y, weight, plan.slot, plan.src, backend="kernel"), (y, weight), given["grad"])

    def combine(given, plan):
        y = torch.randn(rows, case.width, device=given["x"].device).to(given["x"].dtype)
        weight = plan.weight.detach()
        return lambda: moe_combine(y, weight, plan.slot, plan.src, backend="kernel")

    def permute(given, plan):
        x = given["x"].detach()
        return lambda: moe_permute(x, plan.src, plan.slot, backend="kernel")

    add("permute", kept + rows, permute)
    add("combine", kept + case.tokens, combine)
    add("permute, backward", kept + case.tokens, permute_backward)
    add("combine, backward", case.tokens + kept + rows, combine_backward)
    runs = {"metadata": device.rotated([(given,) for given in sets], lambda given: route(given))}
    for name, (moved, each) in parts.items():
        like = sets[0]["x"]
        sources = [
            torch.randn(max(1, moved * case.width // 2), device=like.device).to(like.dtype)
            for _ in range(device.sets_of(moved * case.width * like.element_size()))
        ]
        pairs = [(source, torch.empty_like(source)) for source in sources]
        runs[name] = lambda turn, each=each: each[turn % len(each)]()
        runs[f"copy: {name}"] = device.rotated(pairs, lambda source, target: target.copy_(source))
    return {"parts": device.medians(runs, repeats), "launches": count_launches(case, sets)}


def count_launches(case: Case, sets: list[dict[str, Tensor]]) -> dict[str, list[str]] | None:
    """Names of what the device runs for one layer without losses, forward and backward; None without a GPU."""
    peer, kept = peers.PEERS[0], []

    def forward(turn: int) -> None:
        given = sets[turn % len(sets)]
        plan = moe_route(given["logits"], k=case.k, capacity=case.capacity, backend="kernel")
        kept.append((peer.move(case, given["x"], plan.weight, plan), given))

    def backward(turn: int) -> None:
        out, given = kept[turn]
        torch.autograd.grad(out, (given["logits"], given["x"]), given["grad"])

    names = device.launches(forward)
    return None if names is None else {"forward": names, "backward": device.launches(backward)}


def verdicts(records: Iterable[dict]) -> list[Row]:
    """What was asked for; ratios of medians."""
    rows = []
    for record in records:
        found = record["peers"]
        mine = found.get(peers.OURS, {}).get("whole_ms", {}).get("median")
        for name, goal in WHOLE.items():
            theirs = found.get(name, {}).get("whole_ms", {})
            if mine and theirs:
                ratio = theirs["median"] / mine
                note = "its device waits for the host" if theirs["waits"] else ""
                what = f"whole forward + backward, against {name}: {record['case']}"
                rows.append(Row("routing", what, ratio, "x", goal=f">= {goal:g}", met=ratio >= goal, note=note))
        ours = found.get(peers.OURS, {})
        if ours.get("wrong") or "skipped" in ours:
            what, note = f"error: {record['case']}", ours.get("skipped", "")
            rows.append(Row("routing", what, math.nan, "", goal="right", met=False, note=note))
        if "parts" in record:
            rows += part_verdicts(record)
    return rows


def part_verdicts(record: dict) -> list[Row]:
    times, name = record["parts"], record["case"]
    spent = 1e3 * times["metadata"]["median"]
    goal = f"<= {METADATA_US:g}"
    rows = [Row("routing", f"metadata: {name}", spent, "us", goal=goal, met=spent <= METADATA_US)]
    for part in times:
        if f"copy: {part}" in times:
            share = times[f"copy: {part}"]["median"] / times[part]["median"]
            goal, met = f">= {COPY_MUST} (goal {COPY_GOAL})", share >= COPY_MUST
            rows.append(Row("routing", f"{part}, of a copy: {name}", share, "", goal=goal, met=met))
    for direction, names in (record["launches"] or {}).items():
        most = LAUNCHES[direction]
        met = len(names) <= most
        rows.append(Row("routing", f"launches {direction}: {name}", len(names), "", goal=f"<= {most}", met=met))
    return rows


def render(records: list[dict], left_out: list[str]) -> str:
    lines, skipped = [], []
    for record in records:
        for name, facts in record["peers"].items():
            if "skipped" in facts:
                skipped.append(f"{record['case']}: {name}: {facts['skipped']}")
                continue
            times = [f"{facts[key]['median']:.4f}" for key in ("gating_ms", "whole_ms")]
            error = f"{facts['error']:.1e}" if "error" in facts else "others kept"
            lines.append([f"{record['case']}: {name}", *times, f"{facts['host_ms']:.4f}", error])
    moves = [
        [f"{record['case']}: {part}", f"{1e3 * times['median']:.2f}"]
        for record in records for part, times in record.get("parts", {}).items()
    ]  # fmt: skip
    head = ["ms, forward + backward", "gating", "whole", "whole, awaited", "difference"]
    text = [table(head, lines), "", table(["our parts", "us"], moves), ""]
    text += [f"* not measured: {line}" for line in skipped]
    text += [f"* not measured, out of time: {name}" for name in left_out]
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on whatever is there: measures nothing")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of each (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=45, help="begin no case after that (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write records, verdicts and text there")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.smoke:
        parser.error("no CUDA device is visible: only --smoke runs without one")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    begin, records, left_out = time.monotonic(), [], []
    cases = SMOKE if args.smoke else CASES
    about = {"repeats": args.repeats, "machine": device.machine()}

    def save(complete: bool) -> None:
        text, rows = render(records, left_out), verdicts(records)
        save_part(args.out, "routing", text, rows, complete, **about, records=records)

    for case in cases:
        if time.monotonic() - begin > args.seconds:
            left_out.append(case.name)
            continue
        start = time.monotonic()
        records.append(measure_case(case, args.repeats))
        progress(f"routing: {case.name}: {time.monotonic() - start:.1f} s")
        save(False)
    save(not left_out)
    print(render(records, left_out), markdown(verdicts(records)), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
