"""Expert routing on the CPU: `python -m benchmarks.routing_cpu [--json FILE] [--save]`.

Gating forward and backward with a balance loss against DeepSpeed's top-1 gating and Batch Priority Routing in plain
PyTorch by sorting, two ways of it, of which the faster one counts; permute and combine against copies of as many bytes.
fp32, interleaved repeats, medians. Ours also gives the sums of all other losses.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import routing_peers as peers
from benchmarks.measure import IDLE_LOAD, Row, interleaved, load, machine, markdown, progress, publish, ratios, spread
from benchmarks.routing_peers import Case, Peer
from dsvlm.ops import moe_combine, moe_permute, moe_route

CASES = (Case("E = 32, top-1", 16384, 768, 32), Case("E = 8, top-1", 16384, 768, 8),
         Case("E = 64, top-1", 16384, 768, 64), Case("E = 32, top-2", 16384, 768, 32, 2))  # fmt: skip
SMALL = (Case("small", 512, 16, 8), Case("small, top-2", 512, 16, 8, 2))
TURN_MS = 100.0  # of each contestant, as many calls as fit: cold caches weigh the same for all, and little
ONE_SORT = "eager BPR, by one sort"
GOALS = {peers.DEEPSPEED: 20.0, peers.SORTED: 3.0}
GOAL_CASE = CASES[0].name


def gate_one_sort(case: Case, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One stable sort of 64-bit keys (expert, choice, best weight), the weight's bits turned round."""
    probs = logits.softmax(dim=1)
    weight, index = probs.max(dim=1, keepdim=True) if case.k == 1 else probs.topk(case.k, dim=1)
    priority = 0x7FFFFFFF - weight.detach()[:, :1].view(torch.int32).long()
    expert = index.flatten()
    key = ((index * case.k + torch.arange(case.k)) << 32 | priority).flatten()
    order = key.sort(stable=True).indices
    counts = expert.bincount(minlength=case.experts)
    place = torch.empty_like(expert)
    place[order] = torch.arange(len(expert)) - (counts.cumsum(dim=0) - counts)[expert[order]]
    slots = torch.where(place < case.capacity, expert * case.capacity + place, -1).view_as(index)
    return weight, peers.balance(probs.sum(dim=0), counts, case), slots


def contestants(case: Case) -> list[Peer]:
    found = [peer for peer in peers.PEERS if peer.name in (peers.OURS, peers.SORTED)]
    found.append(Peer(ONE_SORT, gate_one_sort, peers.move_by_slots))
    if case.k == 1:
        found += [peer for peer in peers.PEERS if peer.name == peers.DEEPSPEED]
    return found


def milliseconds(run: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return 1e3 * (time.perf_counter() - begin) / calls


def gating_rows(case: Case, repeats: int) -> list[Row]:
    """Times of each contestant, which must keep whom ours keeps, and ratios."""
    logits = torch.randn(case.tokens, case.experts, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gating(peer: Peer) -> object:
        weight, loss, plan = peer.gate(case, logits)
        torch.autograd.grad((weight, loss), logits, (upstream[weight.shape], upstream[loss.shape]))
        return plan

    upstream = {size: torch.ones(size) for size in ((case.tokens, case.k), (case.tokens,), (1, 1), ())}
    runs, kept = {}, peers.gate_ours(case, logits)[2].slot >= 0
    for peer in contestants(case):
        plan = gating(peer)  # also warms up
        assert not isinstance(plan, Tensor) or torch.equal(plan >= 0, kept), f"{peer.name} keeps others"
        calls = max(1, round(TURN_MS / milliseconds(lambda peer=peer: gating(peer), 3)))
        runs[peer.name] = lambda peer=peer, calls=calls: milliseconds(lambda: gating(peer), calls)
    times = interleaved(runs, repeats)
    part, rows = f"N = {case.tokens:,}, {case.name}", []
    for name, values in times.items():
        rows.append(spread(part, f"gating, forward + backward: {name}", values, "ms"))
    best = min((peers.SORTED, ONE_SORT), key=lambda name: statistics.median(times[name]))
    for name, label in ((best, peers.SORTED), (peers.DEEPSPEED, peers.DEEPSPEED)):
        if name in times:
            quotients = ratios(times, name, peers.OURS)
            goal, median = GOALS[label], statistics.median(quotients)
            more = {"goal": f">= {goal:g}", "met": median >= goal} if case.name == GOAL_CASE else {}
            rows.append(spread(part, f"ours against {name}", quotients, "x", **more))
    return rows


def moving_rows(case: Case, repeats: int) -> list[Row]:
    """Permute and combine, forward and backward, as shares of the speed of a copy that reads and writes as much."""
    random = torch.Generator().manual_seed(0)
    routing = moe_route(torch.randn(case.tokens, case.experts, generator=random), k=case.k, capacity=case.capacity)
    kept, rows = int(routing.kept.sum()), len(routing.src)
    x = torch.randn(case.tokens, case.width, generator=random)
    y, moves = torch.randn(rows, case.width, generator=random), torch.ops.dsvlm
    src, slot, weight = routing.src, routing.slot, routing.weight
    runs = {
        "permute": (kept + rows, lambda: moe_permute(x, src, slot)),
        "combine": (kept + case.tokens, lambda: moe_combine(y, weight, slot, src)),
        "permute, backward": (kept + case.tokens, lambda: moves.moe_permute_backward(y, src, slot)),
        "combine, backward": (
            case.tokens + kept + rows, lambda: moves.moe_combine_backward(x, y, weight, slot, src)
        ),
    }  # fmt: skip
    found = []
    for name, (moved, run) in runs.items():
        source = torch.randn(moved // 2, case.width)
        pair = {name: run, "copy": source.clone}  # both take fresh memory for the result
        for each in pair.values():
            each()
        timed = {label: lambda each=each: milliseconds(each, 3) for label, each in pair.items()}
        times = interleaved(timed, repeats)
        found.append(spread(f"N = {case.tokens:,}, d = {case.width}, {case.name}", f"{name}, of a copy's speed",
                            ratios(times, "copy", name), ""))  # fmt: skip
    return found


def run(repeats: int, quick: bool) -> dict:
    at_start, begin, rows = load(), time.perf_counter(), []
    for case in SMALL if quick else CASES:
        progress(case.name)
        rows += gating_rows(case, repeats)
    for case in SMALL if quick else (CASES[0], CASES[3]):
        rows += moving_rows(case, repeats)
    return {
        "date": date.today().isoformat(), "publishable": at_start <= IDLE_LOAD and not quick,
        "load": [at_start, load()], "seconds": time.perf_counter() - begin, "repeats": repeats,
        "threads": torch.get_num_threads(), "machine": machine(), "rows": [row.to_dict() for row in rows],
    }  # fmt: skip


def render(report: dict) -> str:
    about = report["machine"]
    lines = [
        markdown(Row(**row) for row in report["rows"]), "",
        f"{report['date']}, {report['threads']} threads, {about['processor']}, {about['system']}, Python "
        f"{about['python']}, torch {torch.__version__}; commit {about['commit']}; load {report['load'][0]:.2f} before, "
        f"{report['load'][1]:.2f} after; {report['repeats']} interleaved repeats, median and range.",
    ]  # fmt: skip
    if not report["publishable"]:
        lines.append("Not publishable: the machine was busy, or sizes were small.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=31, help="of each contestant, interleaved (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and machine there, too")
    parser.add_argument("--save", action="store_true", help="write both into benchmarks/results, dated")
    args = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(args.threads)
    report = run(args.repeats, args.quick)
    publish(report, render(report), "routing-cpu", args.json, args.save)


if __name__ == "__main__":
    main()
