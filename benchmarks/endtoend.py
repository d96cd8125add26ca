"""Rows b and c: from shards to batches, against what two cores can decode and against other loaders."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from benchmarks import contest
from benchmarks.measure import Row, interleaved, progress, ratios, spread

BATCH = 32
WORKERS = 2
MIXTURE = "caption,vqa,text"
OURS_2 = "dsvlm loader, captions, 2 workers"
OURS_LARGE = "dsvlm loader, captions of 1024 x 768 images, 2 workers"


def make_tokenizer(root: Path) -> None:
    """One vocabulary, trained on the generated text, for all contestants."""
    from dsvlm.data.tokenizer import train_tokenizer
    from dsvlm.train.build import shard_texts

    if not (root / "tokenizer").is_dir():
        planned = contest.planned_run(root, ["caption", "vqa", "text"], 0, BATCH)
        train_tokenizer(shard_texts(planned), 2000, 8).save(root / "tokenizer")


def measure_limit(root: Path, repeats: int, warm: int, timed: int) -> list[Row]:
    """Row b: images per second of the loader with 0, 1 and 2 workers, and the cores' decode limit.

    The limit decodes the loader's samples, from memory and into as many blocks as the loader's workers have: nothing is
    read, tokenised or handed over. The limits have the allocator's settings that the loader gives its workers. 336 px
    images are ready for the model; 1024 x 768 ones are reduced at every read, as those of data sets that nobody
    converted.
    """
    make_tokenizer(root)
    small, large = "2 processes that only decode from memory (limit)", "the same, 1024 x 768 reduced to 336 (limit)"
    contestants = {
        small: Contestant(contest.LIMIT, tuned=True),
        "2 processes that read, decode and tokenise, without hand-over": Contestant(contest.WORK, tuned=True),
        OURS_2: Contestant(contest.OURS),
        "dsvlm loader, captions, questions and plain text, 2 workers": Contestant(contest.OURS, tasks=MIXTURE),
        "dsvlm loader, captions, 1 worker": Contestant(contest.OURS, workers=1),
        "dsvlm loader, captions, in the trainer's process": Contestant(contest.OURS, workers=0),
        large: Contestant(contest.LIMIT, tuned=True, tasks="large", slower=4),
        OURS_LARGE: Contestant(contest.OURS, tasks="large", slower=4),
    }
    found, rows = race("b", contestants, root, repeats, warm, timed)
    for ours, limit in ((OURS_2, small), (OURS_LARGE, large)):
        share = spread("b", f"{ours}: share of the decode limit", ratios(found, ours, limit), "")
        rows.append(replace(share, goal=">= 0.95", met=share.value >= 0.95))
    return rows


def measure_peers(root: Path, repeats: int, warm: int, timed: int, tuned: bool = True) -> list[Row]:
    """Row c: images per second with 2 workers, ours and every peer that is installed.

    Peers run as documented and, `tuned`, again with the allocator's settings that our loader gives its workers.
    """
    from benchmarks.peers import PEERS, prepare

    make_tokenizer(root)
    names = [name for name, (package, _, _) in PEERS.items() if installed(package)]
    if missing := sorted(set(PEERS) - set(names)):
        progress(f"not installed, left out: {', '.join(missing)} (benchmarks/requirements.txt)")
    contestants = {OURS_2: Contestant(contest.OURS)}
    for name in names:
        prepare(name, root / "caption", root / "peers")
        contestants[f"{name}, 2 workers"] = Contestant(name)
    for name in names if tuned else ():
        contestants[f"{name}, 2 workers, our allocator settings"] = Contestant(name, tuned=True)
    found, rows = race("c", contestants, root, repeats, warm, timed)
    for index, row in enumerate(rows[1:], 1):
        ahead = ratios(found, OURS_2, row.what)
        note = f"dsvlm {median(ahead):.2f} times as fast ({min(ahead):.2f} to {max(ahead):.2f}); {row.note}"
        rows[index] = replace(row, goal="dsvlm ahead", met=median(ahead) > 1, note=note)
    return rows


@dataclass(frozen=True)
class Contestant:
    name: str
    workers: int = WORKERS
    tasks: str = "caption"
    tuned: bool = False
    slower: int = 1  # by which its images take longer: so many fewer are read


def race(part: str, contestants: dict[str, Contestant], root: Path, repeats: int, warm: int, timed: int):
    """(images per second of each repeat, rows): interleaved runs, processor time in the note."""
    cpu: dict[str, list[float]] = {name: [] for name in contestants}

    def run(name: str) -> float:
        chosen = asdict(contestants[name])
        size = {key: max(1, value // chosen["slower"]) for key, value in (("warm", warm), ("timed", timed))}
        del chosen["slower"]
        result = contest.run(chosen.pop("name"), root, batch=BATCH, **size, **chosen)
        cpu[name].append(result["cpu"])
        return result["rate"]

    found = interleaved({name: partial(run, name) for name in contestants}, repeats)
    rows = [
        spread(part, name, rates, "images/s", note=f"{median(cpu[name]):.2f} CPU seconds per 1,000")
        for name, rates in found.items()
    ]
    return found, rows


def installed(package: str) -> bool:
    module = {"mosaicml-streaming": "streaming", "megatron-energon": "megatron"}.get(package, package)
    return find_spec(module) is not None
