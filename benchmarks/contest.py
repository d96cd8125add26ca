"""One contestant in a process of its own: `python -m benchmarks.contest NAME ...` prints samples per second as JSON.

The clock runs from one batch to a later one, in the steady state; the consumer only takes batches. Nothing of one
contestant (threads, caches, shared memory) is there when the next one runs.
"""

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.inputs import PIXELS
from benchmarks.measure import children, cpu_seconds, pss_mb

OURS = "dsvlm"
LIMIT = "decode limit"
WORK = "work without hand-over"
# glibc gives back and faults in again the memory of every image unless told otherwise; our loader tells its workers.
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "268435456", "MALLOC_MMAP_THRESHOLD_": "33554432"}
WINDOW = 256  # samples of one window
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
MODEL = {  # never built: a recipe must have one
    "vision": {"config": {**SIZES, "image_size": PIXELS, "patch_size": 14, "intermediate_size": 64}},
    "decoder": {"config": {**SIZES, "word_embed_proj_dim": 64, "ffn_dim": 64, "max_position_embeddings": 2048}},
}


def run(name: str, root: Path, site: str = "", tuned: bool = False, **options) -> dict:
    """Runs a contestant in a fresh process: images per second, CPU seconds per 1000 images, MB of each worker.

    options: those of the command; site: directory of a sitecustomize.py for it and its workers; tuned: with ALLOCATOR.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.contest", name, "--root", str(root)]
    for option, value in options.items():
        command += [f"--{option}", str(value)]
    here = Path(__file__).parents[1]
    path = os.pathsep.join(part for part in (site, os.environ.get("PYTHONPATH"), str(here)) if part)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    environment |= ALLOCATOR if tuned else {}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contest")
    parser.add_argument("name")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--tasks", default="caption")
    parser.add_argument("--url", help="of the shards, when they are remote")
    parser.add_argument("--cache", default="")
    parser.add_argument("--block", type=int, default=1)
    for option in ("workers", "batch", "warm", "timed"):
        parser.add_argument(f"--{option}", type=int, required=True)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if args.name in (LIMIT, WORK):
        result = flat_out(args)
    else:
        result = timed(open_contestant(args), args.warm, args.timed)
    sys.stdout.flush()
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)  # loaders' threads and workers need no farewell


def open_contestant(args) -> Iterable:
    if args.name == OURS:
        return ours(args)
    from benchmarks.peers import PEERS, Work
    from dsvlm.data.tokenizer import load_tokenizer

    directory = args.root / "peers" / args.name.split()[0].lower()
    work = Work(directory, load_tokenizer(args.root / "tokenizer", 8), args.batch, args.workers)
    return PEERS[args.name][2](work)


def timed(batches: Iterable, warm: int, count: int) -> dict:
    """Images per second over `count` batches after `warm` ones."""
    images, iterator = 0, iter(batches)
    for _ in range(warm):
        next(iterator)
    gc.collect()
    gc.freeze()  # as our training does before its first step, for all contestants alike
    start, cpu = time.perf_counter(), cpu_seconds(os.getpid())
    for _ in range(count):
        batch = next(iterator)
        images += len(batch["pixels"] if isinstance(batch, dict) else batch)
    seconds = time.perf_counter() - start
    cpu = cpu_seconds(os.getpid()) - cpu
    pss = [pss_mb(pid) for pid in children(os.getpid())]
    return {"rate": images / seconds, "cpu": 1000 * cpu / images, "pss": pss}


def planned_run(root, tasks: list[str], workers: int, batch: int, changed: dict | None = None):
    """A run's plan over generated sets, made as training makes it; `changed`: sections of the recipe, merged in."""
    from dsvlm.config import parse_recipe
    from dsvlm.train.build import plan_run

    samples = {"text": WINDOW // 8, "vqa": WINDOW // 4}
    kinds = {"vqa": "vqa", "text": "vqa"}
    recipe = {
        "name": "benchmark",
        "data": {"root": str(root), "workers": workers, "cache_mb": 0, "decoder": "pillow"},
        "text": {"max_length": 1024, "bins": 8},
        "model": MODEL,
        "tasks": {
            name: {"type": kinds.get(name, "caption"), "shards": name, "samples": samples.get(name, WINDOW)}
            for name in tasks
        },
        "schedule": {"steps": 10**9},
        "train": {"micro_batch": batch, "zero": 0},
    }
    for section, fields in (changed or {}).items():
        recipe[section] = recipe[section] | fields
    return plan_run(parse_recipe(recipe))


def ours(args) -> Iterator:
    """Pixels of each batch, window after window: what a training rank takes."""
    from dsvlm.data.tokenizer import load_tokenizer
    from dsvlm.train.build import make_loader

    tasks = args.tasks.split(",")
    changed = {"schedule": {"block": args.block}, "data": {"remote_cache": args.cache}}
    planned = planned_run(args.url or args.root, tasks, args.workers, args.batch, changed)
    loader = make_loader(planned, load_tokenizer(args.root / "tokenizer", 8), PIXELS, 0, 1)
    step = 0
    while True:
        window = loader.window(step)
        for found in loader.batches(window, [1.0] * len(tasks)):
            yield found.pixels if int(found.image_row[0]) >= 0 else ()
        step += 1


def flat_out(args) -> dict:
    """Processes that work without any hand-over: what the cores can do at most."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(args.workers + 1), context.Queue()
    work = decode_some if args.name == LIMIT else read_some
    processes = [
        context.Process(target=work, args=(args, rank, barrier, queue), daemon=True) for rank in range(args.workers)
    ]
    for process in processes:
        process.start()
    barrier.wait()
    found = [queue.get() for _ in processes]
    return {"rate": sum(rate for rate, _ in found), "cpu": sum(cpu for _, cpu in found) / len(found), "pss": []}


def decode_some(args, rank: int, barrier, queue) -> None:
    """Decodes images that lie in memory, each once, into as many blocks of batches as the loader's workers have.

    They are samples that a worker reads: drawn from the whole set, and like there in no cache of the processor.
    """
    import numpy as np

    from dsvlm.data.blocks import Blocks
    from dsvlm.data.manifest import load_manifest
    from dsvlm.data.reader import ShardReader
    from dsvlm.data.transforms import make_decoder
    from dsvlm.data.workers import AHEAD

    decode, blocks = make_decoder("pillow", PIXELS), Blocks()
    reader = ShardReader(load_manifest(args.root / args.tasks))
    numbers = np.random.default_rng(rank).permutation(len(reader))[: args.batch + timed_each(args)].tolist()
    batches = [blocks.take(args.batch * 3 * PIXELS**2)[1] for _ in range(1 + AHEAD // args.batch)]
    for memory in batches:
        memory[:] = 0  # its pages are there from now on
    places = [pixels for memory in batches for pixels in memory.reshape(-1, PIXELS, PIXELS, 3).transpose(0, 3, 1, 2)]

    def write(item: tuple) -> None:
        data, pixels = item
        pixels[...] = decode(data, pixels)

    images = [reader.image(number) for number in numbers]
    measure(args, list(zip(images, itertools.cycle(places), strict=False)), write, barrier, queue)


def read_some(args, rank: int, barrier, queue) -> None:
    """Does what a worker of the loader does, text and image, into memory of its own."""
    import numpy as np

    from dsvlm.data.tokenizer import load_tokenizer
    from dsvlm.train.build import make_loader

    planned = planned_run(args.root, [args.tasks], 0, args.batch)
    reading = make_loader(planned, load_tokenizer(args.root / "tokenizer", 8), PIXELS, 0, 1).pool.reading
    pixels = np.empty((3, PIXELS, PIXELS), np.uint8)

    def read(sample: int) -> None:
        reading.text(0, sample)
        reading.image(0, sample, pixels)

    order = np.random.default_rng(rank).permutation(planned.schedule.streams[0].size).tolist()
    measure(args, order, read, barrier, queue)


def timed_each(args) -> int:
    """Images that each process is timed over."""
    return args.timed * args.batch // args.workers


def measure(args, items: list, work: Callable, barrier, queue) -> None:
    """Puts (items per second, CPU seconds per 1000) of this process into the queue."""
    count = timed_each(args)
    for item in items[: args.batch]:
        work(item)
    gc.collect()
    gc.freeze()
    barrier.wait()
    start, cpu = time.perf_counter(), time.process_time()
    for index in range(args.batch, args.batch + count):
        work(items[index % len(items)])
    queue.put((count / (time.perf_counter() - start), 1000 * (time.process_time() - cpu) / count))


if __name__ == "__main__":
    main()
