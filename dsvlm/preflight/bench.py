"""`dsvlm data bench`: how fast this machine reads, decodes and batches, and which of them is the limit."""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import numpy as np

from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import BadSample, ShardReader
from dsvlm.data.tokenizer import TextCodec
from dsvlm.data.transforms import DECODERS, make_decoder, resolve_decoder
from dsvlm.preflight.inputs import image_shape, open_codec
from dsvlm.preflight.table import table
from dsvlm.train.build import Planned, make_loader, make_sources

POOL, POOL_BYTES = 256, 64 * 2**20  # images kept for the decoders: so many, and so many bytes
BUSY = 0.5  # load average on an otherwise idle machine


@dataclass(frozen=True)
class Subject:
    """What is measured. readers: of each task; pairs: endless (task, sample), random; mean_bytes: of a sample."""

    name: str
    readers: Sequence[ShardReader]
    pairs: Iterator[tuple[int, int]]
    mean_bytes: float
    decoder: str
    dct_scaling: bool


def bench_directory(directory: str, image_size: int, seconds: float, progress) -> dict:
    """`bench` of a shard set: reading and decoding."""
    return bench(of_directory(directory), image_size, seconds, progress)


def bench_recipe(planned: Planned, image_size: int | None, workers: Sequence[int], seconds: float, progress) -> dict:
    """`bench` of a recipe: reading, decoding and its loader. image_size: None = the recipe's."""
    size = image_size or image_shape(planned.recipe).pixels
    codec, _ = open_codec(planned)
    loaders = {count: partial(loader_rate, planned, codec, size, count, seconds) for count in workers}
    return bench(of_recipe(planned), size, seconds, progress, loaders)


def of_directory(directory: str) -> Subject:
    """A shard set alone, in a random order that is the same each time."""
    reader = ShardReader(load_manifest(directory))
    draw = np.random.default_rng(0)
    pairs = ((0, sample) for _ in itertools.count() for sample in draw.permutation(len(reader)).tolist())
    size = sum(reader.manifest.bytes) / len(reader)
    return Subject(str(directory), [reader], pairs, size, resolve_decoder("auto"), False)


def of_recipe(planned: Planned) -> Subject:
    """The samples of a recipe, in the order of its plan and in its shares."""
    data, readers = planned.recipe.data, [source.reader for source in make_sources(planned)]
    taken = planned.plan.cursors(planned.recipe.schedule.steps)
    size = [sum(reader.manifest.bytes) / len(reader) for reader in readers]
    mean_bytes = float(np.dot(taken, size) / taken.sum())
    return Subject(
        planned.recipe.name, readers, planned_pairs(planned), mean_bytes, resolve_decoder(data.decoder),
        data.dct_scaling,
    )  # fmt: skip


def planned_pairs(planned: Planned) -> Iterator[tuple[int, int]]:
    for step in itertools.count():
        window = planned.plan.window(step)
        tasks, ordinals = window.take(np.arange(len(window)))
        yield from zip(tasks.tolist(), planned.plan.locate_all(tasks, ordinals)[1].tolist(), strict=True)


def bench(
    subject: Subject, image_size: int, seconds: float, progress, loaders: dict[int, Callable[[], dict]] | None = None,
) -> dict:
    """Rates of reading, decoding and, by number of workers, of loaders; JSON types only. seconds: of each row."""
    report = {
        "subject": subject.name, "image_size": image_size, "decoder": subject.decoder, "seconds": seconds,
        "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "damaged": 0,
    }  # fmt: skip
    images = some_images(subject, report)
    rows: list[tuple[str, Callable]] = [("read", partial(read_rate, subject, seconds, report))]
    if images:
        for name in (name for name in DECODERS if find_spec({"pillow": "PIL"}.get(name, name))):
            decode = make_decoder(name, image_size, subject.dct_scaling)
            rows.append((f"decode, {name}", partial(decode_rate, images, decode, seconds)))
        decode = make_decoder(subject.decoder, image_size, subject.dct_scaling)
        rows.append(("read + decode", partial(read_rate, subject, seconds, report, decode)))
    rows += [(f"loader, {count} workers", measure) for count, measure in (loaders or {}).items()]
    report["rows"] = {name: measure() for name, measure in progress(rows, desc="bench", unit="row")}
    return report | {"limit": limit(report), "warnings": warnings(report)}


def rate(act: Callable[[], int], seconds: float) -> dict:
    """Samples that `act() -> how many` gets done for about `seconds`: in a second, and in one of this process's CPU."""
    done, begin, cpu = 0, time.perf_counter(), time.process_time()
    while not done or time.perf_counter() < begin + seconds:
        done += act()
    return {
        "samples_per_s": done / (time.perf_counter() - begin),
        "samples_per_cpu_s": done / max(time.process_time() - cpu, 1e-9),
    }


def some_images(subject: Subject, report: dict) -> list[bytes]:
    """Encoded images for the decoders; none where samples have none."""
    images: list[bytes] = []
    for task, sample in itertools.islice(subject.pairs, 4 * POOL):
        if len(images) == POOL or sum(map(len, images)) > POOL_BYTES:
            break
        try:
            data = subject.readers[task].image(sample)
        except BadSample:
            report["damaged"] += 1
            continue
        if data is not None:
            images.append(data)
    return images


def read_rate(subject: Subject, seconds: float, report: dict, decode: Callable | None = None) -> dict:
    """Records and images of random samples, checked against their checksums, by one thread of this process."""

    def act() -> int:
        task, sample = next(subject.pairs)
        try:
            subject.readers[task].record(sample)
            image = subject.readers[task].image(sample)
            if image is not None and decode is not None:
                decode(image)
        except BadSample:
            report["damaged"] += 1
        return 1

    found = rate(act, seconds)
    return found if decode else found | {"mb_per_s": found["samples_per_s"] * subject.mean_bytes / 1e6}


def decode_rate(images: Sequence[bytes], decode: Callable, seconds: float) -> dict:
    """Images in memory to pixels."""
    order = itertools.cycle(images)

    def act() -> int:
        try:
            decode(next(order))
        except BadSample:
            pass  # it has cost its time, and `data verify --decode` names it
        return 1

    return rate(act, seconds)


def loader_rate(planned: Planned, codec: TextCodec, image_size: int, workers: int, seconds: float) -> dict:
    """Batches of the run's own loader for one rank, without its cache of samples; the first one starts the clock."""
    data = replace(planned.recipe.data, workers=workers, cache_mb=0)
    planned = replace(planned, recipe=replace(planned.recipe, data=data))
    loader = make_loader(planned, codec, image_size, rank=0, world_size=1)
    sizes: list[int] = []

    def act() -> int:
        sizes.append(len(next(batches).tokens))
        return sizes[-1]

    try:
        batches = loader_batches(loader, planned.recipe.schedule.steps, [1.0] * len(planned.recipe.tasks))
        next(batches)
        found = rate(act, seconds)
    finally:
        loader.close()
    if workers:
        del found["samples_per_cpu_s"]  # it is not this process that works
    return found | {"batches_per_s": found["samples_per_s"] * len(sizes) / sum(sizes)}


def loader_batches(loader, steps: int, weights: Sequence[float]) -> Iterator:
    for step in itertools.cycle(range(steps)):
        yield from loader.batches(loader.window(step), weights)


def limit(report: dict) -> dict:
    """What costs a sample the most time of one core, and how fast that alone would go."""
    rows = report["rows"]
    # On a busy machine waiting is for others, not for the disk.
    costs = {"reading": 1 / rows["read"]["samples_per_s" if report["load"] <= BUSY else "samples_per_cpu_s"]}
    decoded = rows.get(f"decode, {report['decoder']}")
    if decoded:
        costs["decoding"] = 1 / decoded["samples_per_cpu_s"]
    if "loader, 0 workers" in rows:
        rest = 1 / rows["loader, 0 workers"]["samples_per_cpu_s"] - sum(costs.values())
        costs["tokenising and batching"] = max(rest, 1e-9)
    what = max(costs, key=costs.get)
    return {"what": what, "per_core": 1 / costs[what], "shares": {k: v / sum(costs.values()) for k, v in costs.items()}}


def warnings(report: dict) -> list[str]:
    found = []
    if report["load"] > BUSY:
        found.append(
            f"load average {report['load']:.1f} on {report['cores']} cores at the start: other work makes these "
            "rates too low"
        )
    if report["damaged"]:
        found.append(f"{report['damaged']} reads met a damaged sample: see dsvlm data verify")
    return found


def render(report: dict) -> str:
    """Return the report of `bench` as text."""
    columns = {"samples_per_s": "samples/s", "samples_per_cpu_s": "per CPU-second", "mb_per_s": "MB/s",
               "batches_per_s": "batches/s"}  # fmt: skip
    body = [[name, *(f"{row[key]:,.0f}" if key in row else "" for key in columns)]
            for name, row in report["rows"].items()]  # fmt: skip
    slowest = report["limit"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in slowest["shares"].items())
    lines = [
        f"{report['subject']}: images of {report['image_size']} pixels, {report['cores']} cores",
        "",
        *table([["", *columns.values()], *body]),
        "",
        f"{slowest['what']} limits: {slowest['per_core']:,.0f} samples/s per core",
        f"time of a sample on one core: {shares}",
        *feeding(report["rows"]),
    ]
    return "\n".join([*lines, *(f"warning: {text}" for text in report["warnings"])])


def feeding(rows: dict) -> list[str]:
    """What the number of workers with the most batches a second means for a rank."""
    loaders = {name: row for name, row in rows.items() if "batches_per_s" in row}
    if not loaders:
        return []
    name, best = max(loaders.items(), key=lambda item: item[1]["batches_per_s"])
    size = best["samples_per_s"] / best["batches_per_s"]
    workers = name.removeprefix("loader, ").replace("1 workers", "1 worker")
    return [f"{workers}: a micro-step of {size:.1f} samples every {1000 / best['batches_per_s']:.1f} ms"]
