"""Tokens per second of decoder layers, padded rows against packed ones: `python -m benchmarks.layers [--cpu]`.

Four layers of LLaMA-7B's size in bf16 on a GPU, smaller ones in fp32 on the CPU; forward and backward of a window of
captions and texts, cut into padded micro-batches of drawn samples, or into packed rows. Only tokens of samples count.
Mask building is part of the time, the optimiser is not. Layers are plain PyTorch (RMSNorm, rotary embedding, SwiGLU).
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import attention_peers as peers
from benchmarks import device
from benchmarks.attention_shapes import Shape
from benchmarks.measure import IDLE_LOAD, Row, interleaved, load, machine, markdown, ratios, spread
from benchmarks.parts import save_part
from dsvlm.ops import GitMask

RESULTS = Path(__file__).parent / "results"
IMAGE = 576  # tokens of one image, 336 px in patches of 14
TEXTS_PER_CAPTION = 3


@dataclass(frozen=True)
class Size:
    """Layers and the window. micro_batch: samples of a padded one; rows: of a packed one, `row` tokens each."""

    layers: int
    hidden: int
    heads: int
    inner: int
    samples: int
    micro_batch: int
    row: int
    rows: int
    repeats: int
    image: int = IMAGE


GPU = Size(4, 4096, 32, 11008, samples=128, micro_batch=16, row=2048, rows=4, repeats=8)
CPU = Size(2, 512, 8, 1376, samples=16, micro_batch=8, row=2048, rows=1, repeats=3)
SMOKE = Size(1, 32, 2, 48, samples=8, micro_batch=4, row=256, rows=1, repeats=1, image=9)


def draw_samples(size: Size) -> list[tuple[int, int]]:
    """(image tokens, text tokens) of a window's samples, in the drawn order; lengths as in `benchmarks.padding`."""
    draw = np.random.default_rng(0)
    captions = size.samples // (1 + TEXTS_PER_CAPTION)
    caption = np.clip(np.exp(draw.normal(2.9, 0.5, captions)), 1, 128).astype(int)
    longest = min(2048, size.row)
    text = np.clip(np.exp(draw.normal(5.3, 0.6, size.samples - captions)), 1, longest).astype(int)
    samples = [(size.image, int(n)) for n in caption] + [(0, int(n)) for n in text]
    return [samples[i] for i in draw.permutation(len(samples))]


def padded(samples: list[tuple[int, int]], size: Size) -> list[Shape]:
    """Micro-batches of samples as they come, each padded to its longest."""
    step = size.micro_batch
    return [shape(size, [[sample] for sample in samples[i : i + step]]) for i in range(0, len(samples), step)]


def packed(samples: list[tuple[int, int]], size: Size) -> list[Shape]:
    """Micro-batches of rows filled first-fit, longest sample first."""
    rows: list[list[tuple[int, int]]] = []
    for sample in sorted(samples, key=sum, reverse=True):
        fitting = (row for row in rows if sum(map(sum, row)) + sum(sample) <= size.row)
        row = next(fitting, None)
        if row is None:
            rows.append([sample])
        else:
            row.append(sample)
    return [shape(size, rows[i : i + size.rows]) for i in range(0, len(rows), size.rows)]


def shape(size: Size, rows: list[list[tuple[int, int]]]) -> Shape:
    return Shape("", size.heads, size.heads, size.hidden // size.heads, tuple(map(tuple, rows)))


class Layer(nn.Module):
    """A decoder layer as LLaMA's, its attention given from outside."""

    def __init__(self, size: Size):
        super().__init__()
        self.heads = size.heads
        self.norm_attention, self.norm_inner = nn.RMSNorm(size.hidden), nn.RMSNorm(size.hidden)
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden, bias=False)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False)
        self.up = nn.Linear(size.hidden, 2 * size.inner, bias=False)
        self.down = nn.Linear(size.inner, size.hidden, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: peers.Attend) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        x = x + self.out(attend(rotate(q, *turn), rotate(k, *turn), v).flatten(-2))
        gate, value = self.up(self.norm_inner(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, S, H, D] by [B, S, 1, D / 2] (Su et al. 2021)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def angles(positions: Tensor, head_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rates = 10000.0 ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)
    turn = positions[..., None, None] * rates
    return turn.cos().to(dtype), turn.sin().to(dtype)


class Window:
    """All micro-batches of one cut, ready to be run: inputs are on the device, masks are not built yet."""

    def __init__(self, shapes: list[Shape], table: Tensor):
        self.shapes, self.tokens = shapes, sum(each.tokens for each in shapes)
        self.computed = sum(each.batch * each.length for each in shapes)
        where = table.device
        self.layouts = [each.layout(where) for each in shapes]
        self.positions = [GitMask.from_segments(*layout).position_ids() for layout in self.layouts]
        # a token's vector depends on its place and on its sample's lengths: the cuts compute the same thing
        self.inputs = [embed(each, table, place) for each, place in zip(shapes, self.positions, strict=True)]

    def run(self, layers: nn.ModuleList, attention: str) -> float:
        """Forward and backward of everything: mean square of what the layers add to the tokens of samples."""
        total, peer = 0.0, next(peer for peer in peers.PEERS if peer.name == attention)
        for each, layout, positions, x in zip(self.shapes, self.layouts, self.positions, self.inputs, strict=True):
            turn = angles(positions, each.head_size, x.dtype)
            attend, given = peer.attend(each, peer.build(each, *layout)), x
            for layer in layers:
                x = layer(x, turn, attend)
            live = (layout[0] >= 0)[..., None]
            loss = torch.where(live, x - given, 0).float().square().sum() / (self.tokens * x.shape[-1])
            loss.backward()
            total = total + loss.detach()
        for parameter in layers.parameters():
            parameter.grad = None
        return float(total)  # waits for the device


def embed(each: Shape, table: Tensor, positions: Tensor) -> Tensor:
    """[B, S, hidden]: rows of a random table, by place and sample."""
    ids = torch.zeros(each.batch, each.length, dtype=torch.long)
    for row, samples in enumerate(each.segments):
        start = 0
        for m, t in samples:
            ids[row, start : start + m + t] = 31 * m + 17 * t
            start += m + t
    return table[(ids.to(table.device) + 7 * positions) % len(table)]


def measure(size: Size, dtype: torch.dtype, names: tuple[str, ...]) -> tuple[list[Row], dict]:
    """Useful tokens per second of each cut with each attention, and what the cuts hold."""
    where = device.device()
    torch.manual_seed(0)
    with torch.device(where):
        layers = nn.ModuleList(Layer(size) for _ in range(size.layers)).to(dtype)
        table = torch.randn(1024, size.hidden).to(dtype)
    samples = draw_samples(size)
    windows = {cut.__name__: Window(cut(samples, size), table) for cut in (padded, packed)}
    losses, contestants, peaks = {}, {}, {}
    for cut, window in windows.items():
        for name in names:
            label = f"{cut}, {name}"
            peaks[label] = device.peak_mb(lambda turn, window=window, name=name: window.run(layers, name))
            losses[label] = window.run(layers, name)  # warm, too
            contestants[label] = timed(window, layers, name)
    expected = losses[f"padded, {names[0]}"]
    results = interleaved(contestants, size.repeats)
    rows = []
    for label, speeds in results.items():
        difference = abs(losses[label] / expected - 1)
        note = f"loss differs by {difference:.1e}"
        if peaks[label] is not None:
            note += f", peak {peaks[label]:.0f} MB"
        what = f"useful tokens/s: {label}"
        # bf16 rounds each sum; the means over all tokens agree far better than their parts
        rows.append(spread("layers", what, speeds, "", met=None if difference < 1e-2 else False, note=note))
    first, last = f"padded, {names[0]}", f"packed, {names[-1]}"
    rows.append(spread("layers", f"{last}, against {first}", ratios(results, last, first), "x"))
    facts = {
        cut: {
            "tokens": window.tokens, "computed": window.computed, "micro_batches": len(window.shapes),
            "useful": window.tokens / window.computed,
        }
        for cut, window in windows.items()
    }  # fmt: skip
    return rows, {"cuts": facts, "losses": losses, "speeds": results}


def timed(window: Window, layers: nn.ModuleList, name: str) -> Callable[[], float]:
    def run() -> float:
        device.synchronize()
        start = time.perf_counter()
        window.run(layers, name)
        return window.tokens / (time.perf_counter() - start)

    return run


def available() -> tuple[str, ...]:
    try:
        peers.ours(shape(SMOKE, [[(1, 1)]]), None)
    except peers.Unavailable:
        return (peers.DENSE,)
    return peers.DENSE, peers.OURS


def render(rows: list[Row], facts: dict, size: Size, dtype: torch.dtype) -> str:
    cuts = "; ".join(
        f"{cut}: {found['computed']:,} positions, {found['useful']:.3f} useful, {found['micro_batches']} micro-batches"
        for cut, found in facts["cuts"].items()
    )
    name = str(dtype).removeprefix("torch.")
    about = (
        f"{size.layers} layers, hidden {size.hidden}, {size.heads} heads, inner {size.inner}, {name}; {size.samples} "
        f"samples, one caption of {size.image} image tokens to {TEXTS_PER_CAPTION} texts; {cuts}."
    )
    return "\n".join([about, "", markdown(rows)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny layers, on whatever is there: measures nothing")
    parser.add_argument("--cpu", action="store_true", help="smaller layers, on the CPU")
    parser.add_argument("--bf16", action="store_true", help="on the CPU, too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write records and text there")
    parser.add_argument("--save", action="store_true", help="write both into benchmarks/results, dated")
    args = parser.parse_args()
    if torch.cuda.is_available() == args.cpu and not args.smoke:
        parser.error("--cpu is for machines without a GPU" if args.cpu else "no CUDA device is visible: see --cpu")
    size = SMOKE if args.smoke else CPU if args.cpu else GPU
    dtype = torch.bfloat16 if torch.cuda.is_available() or args.bf16 else torch.float32
    names, at_start = available(), load()
    rows, facts = measure(size, dtype, names)
    text = render(rows, facts, size, dtype)
    about = {"machine": machine(), "load": [at_start, load()], "size": asdict(size), "records": facts}
    text += (
        f"\n\n{date.today()}, {torch.get_num_threads()} threads, {about['machine']['processor']}, torch "
        f"{torch.__version__}; commit {about['machine']['commit']}; load {at_start:.2f} before; {size.repeats} "
        "interleaved repeats, median and range."
    )
    if at_start > IDLE_LOAD and args.cpu:
        text += f"\nNot publishable: the machine was busy (load above {IDLE_LOAD})."
    save_part(args.out, "layers", text, rows[-1:], peers.OURS in names, **about)
    if args.save:
        name = RESULTS / f"layers-{date.today()}"
        save_part(name.with_suffix(".json"), "layers", text, rows, peers.OURS in names, **about)
        name.with_suffix(".md").write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
