"""Rows b and c: from shards to batches, against what two cores can decode and against other loaders."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks import contest
from benchmarks.measure import Row, interleaved, progress, ratios, spread

BATCH = 32
WORKERS = 2


def make_tokenizer(root: Path) -> None:
    """One vocabulary, trained on the generated text, for all contestants."""
    from dsvlm.data.tokenizer import train_tokenizer
    from dsvlm.train.build import shard_texts

    if not (root / "tokenizer").is_dir():
        planned = contest.planned_run(root, ["caption", "vqa", "text"], 0, BATCH)
        train_tokenizer(shard_texts(planned), 2000, 8).save(root / "tokenizer")


def measure_limit(root: Path, repeats: int, warm: int, timed: int) -> list[Row]:
    """Row b: images per second of the loader with 0, 1 and 2 workers, and the cores' decode limit."""
    make_tokenizer(root)
    go = partial(images_per_second, root, warm=warm, timed=timed)
    mixture = "caption,vqa,text"
    contestants = {
        "limit": partial(go, contest.LIMIT), "limit with text": partial(go, contest.LIMIT_TEXT),
        "2": partial(go, contest.OURS), "2 mixed": partial(go, contest.OURS, tasks=mixture),
        "1": partial(go, contest.OURS, workers=1), "0": partial(go, contest.OURS, workers=0),
    }  # fmt: skip
    found = interleaved(contestants, repeats)
    names = {
        "limit": "2 processes that only decode from memory (limit)",
        "limit with text": "2 processes that decode and tokenise from memory",
        "2": "dsvlm loader, captions, 2 workers", "2 mixed": "dsvlm loader, captions, questions and plain text, 2 workers",
        "1": "dsvlm loader, captions, 1 worker", "0": "dsvlm loader, captions, in the trainer's process",
    }  # fmt: skip
    rows = [spread("b", names[name], found[name], "images/s") for name in contestants]
    share = spread("b", "dsvlm loader, 2 workers: share of the decode limit", ratios(found, "2", "limit"), "")
    rows.append(Row(**share.to_dict() | {"goal": ">= 0.95", "met": share.value >= 0.95}))
    return rows


def measure_peers(root: Path, repeats: int, warm: int, timed: int) -> list[Row]:
    """Row c: images per second with 2 workers, ours and every peer that is installed."""
    from benchmarks.peers import PEERS, prepare

    make_tokenizer(root)
    go = partial(images_per_second, root, warm=warm, timed=timed)
    contestants, missing = {contest.OURS: partial(go, contest.OURS)}, []
    for name, (package, _, _) in PEERS.items():
        if not installed(package):
            missing.append(name)
            continue
        prepare(name, root / "caption", root / "peers")
        contestants[name] = partial(go, name)
    if missing:
        progress(f"not installed, left out: {', '.join(missing)} (benchmarks/requirements.txt)")
    found = interleaved(contestants, repeats)
    rows = [spread("c", f"{name}, 2 workers", values, "images/s") for name, values in found.items()]
    for name in [name for name in found if name != contest.OURS]:
        row = spread("c", f"dsvlm against {name}", ratios(found, contest.OURS, name), "times")
        rows.append(Row(**row.to_dict() | {"goal": "> 1", "met": row.value > 1}))
    return rows


def images_per_second(root: Path, name: str, *, warm: int, timed: int, workers: int = WORKERS, tasks="caption"):
    return contest.run(name, root, workers=workers, batch=BATCH, warm=warm, timed=timed, tasks=tasks)["rate"]


def installed(package: str) -> bool:
    module = {"mosaicml-streaming": "streaming", "megatron-energon": "megatron"}.get(package, package)
    return find_spec(module) is not None
