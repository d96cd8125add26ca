"""Small loaders for the tests of the data plane: drawn scenes, a recipe, and all that windows give."""

import hashlib
from dataclasses import replace

import torch

from dsvlm.data.collate import Batch
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.loader import Loader
from dsvlm.train.build import make_loader, make_tokenizer, plan_run
from tests.dist.recipes import tiny

TASKS = {
    "question": {"type": "vqa", "shards": "train/question", "samples": 7},
    "locate": {"type": "locate", "shards": "train/locate", "samples": 4},
}


def scenes(directory):
    make_scenes(directory, samples=12, val_samples=4, tasks=("question", "locate"))
    return directory


def loader_of(root, codec=None, **changes) -> Loader:
    """The first of one rank; changes by dotted path, `data__workers=2`."""
    planned = plan_run(tiny(root, tasks=TASKS, **{"data__cache_mb": 0} | changes))
    return make_loader(planned, codec or make_tokenizer(planned), 40, 0, 1)


def with_reader(loader: Loader, kind: type, workers: int, **changes) -> Loader:
    """Another loader, whose first task is read by `kind`."""
    first, *rest = loader.sources
    sources = [replace(first, reader=kind(first.reader.manifest)), *rest]
    return Loader(loader.plan, loader.deal, sources, loader.codec, replace(loader.config, workers=workers, **changes))


def everything(loader: Loader, steps, between=lambda loader, step: None) -> list:
    """All batches (as hashes of their bytes, taken at the end), counts and journal lines of some windows.

    between: called after the first batch of each window.
    """
    found = []
    for step in steps:
        window = loader.window(step)
        kept = []
        for index, batch in enumerate(loader.batches(window, [1.0, 1.0])):
            if not index:
                between(loader, step)
            kept.append(batch)
        found += [*kept, (step, window.counts.tolist(), loader.journal(window))]
    return [hash_of(entry) if isinstance(entry, Batch) else entry for entry in found]


def hash_of(batch: Batch) -> str:
    parts = [v.numpy().tobytes() if torch.is_tensor(v) else repr(v).encode() for v in vars(batch).values()]
    return hashlib.sha256(b"|".join(parts)).hexdigest()
