"""Inputs of the data benchmarks: generated, seeded, the same bytes at every run; kept in a directory outside git.

Images are 1/f noise, whose spectrum and JPEG size are near those of photographs. Four shard sets with uneven shards:
`caption` and `vqa` (336 px JPEG and text), `text` (no image) and `large` (1024 x 768 JPEG and caption).
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dsvlm.data.shard import ShardWriter

VERSION = 1  # of the bytes: raise it when the generator changes
PIXELS = 336
LARGE = (1024, 768)
QUALITY = 90
SHARDS = 20
WORDS = 4000


@dataclass(frozen=True)
class Inputs:
    """Directories of the shard sets below `root`, by task name."""

    root: Path

    def __getitem__(self, name: str) -> Path:
        return self.root / name


def counts(samples: int) -> dict[str, int]:
    """Samples of each set: most are captions, which all contestants read."""
    return {"caption": samples, "vqa": samples // 4, "text": samples // 8, "large": max(samples // 20, 8)}


def make_inputs(work: Path, samples: int, processes: int = 2) -> Inputs:
    """Generates the sets once per size, below `work`; a directory that is there is complete."""
    root = work / f"inputs-v{VERSION}-{samples}"
    if not root.is_dir():
        part = root.with_name(f"{root.name}.part-{os.getpid()}")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed and had the same number
        part.mkdir(parents=True)
        # Spawned: the caller may hold threads, and whatever they had locked would stay locked in a fork.
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(write_set, *zip(*((part, *item) for item in counts(samples).items()), strict=True)))
        part.rename(root)
    return Inputs(root)


def write_set(root: Path, name: str, samples: int) -> None:
    """One shard set; shard sizes differ by up to four times."""
    rng = np.random.default_rng([VERSION, sum(name.encode())])
    shards = min(SHARDS, max(1, samples // 2))
    cuts = np.cumsum(rng.uniform(1, 4, shards))
    starts = set((cuts[:-1] / cuts[-1] * samples).astype(int).tolist())
    kind = {"vqa": "vqa", "text": "vqa"}.get(name, "caption")
    with ShardWriter(root / name, kind, {"generated": VERSION}) as writer:
        for index, members in enumerate(make_samples(name, samples, rng)):
            writer.shard_bytes = 0 if index in starts else 2**40  # 0: the sample begins a shard
            writer.write(f"{name}-{index:07d}", members)


def make_samples(name: str, samples: int, rng: np.random.Generator) -> Iterator[dict[str, bytes]]:
    fields = noise_fields(rng, 0 if name == "text" else min(12, samples // 4 + 1))
    for _ in range(samples):
        if name in ("caption", "large"):
            record = {"caption": words(rng, int(rng.integers(8, 18)))}
        else:
            answer = int(np.clip(rng.lognormal(2.0 if name == "vqa" else 4.8, 0.6), 1, 400))
            record = {"question": words(rng, int(rng.integers(5, 13))) + "?", "answer": words(rng, answer)}
        members = {"json": json.dumps(record, sort_keys=True, separators=(",", ":")).encode()}
        if name != "text":
            members["jpg"] = photograph(rng, fields, LARGE if name == "large" else (PIXELS, PIXELS))
        yield members


def words(rng: np.random.Generator, count: int) -> str:
    """Made-up words with the frequencies of a language (Zipf)."""
    return " ".join(word(int(rank) % WORDS) for rank in rng.zipf(1.3, count))


def word(rank: int) -> str:
    """Syllables that spell a number: frequent words are short."""
    rank, text = rank + 1, ""
    while rank:
        rank, syllable = divmod(rank, 80)
        text += "bdfgklmnprstvwxz"[syllable % 16] + "aeiou"[syllable // 16]
    return text


def noise_fields(rng: np.random.Generator, number: int, size: int = 1536) -> np.ndarray:
    """Fields whose amplitude falls as 1/f, mean 0, deviation 1: [number, size, size] float32."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    fields = np.empty((number, size, size), np.float32)
    for field in fields:
        phase = np.exp(2j * np.pi * rng.random(frequency.shape))
        field[:] = np.fft.irfft2(phase / frequency, (size, size))
        field /= field.std()
    return fields


def photograph(rng: np.random.Generator, fields: np.ndarray, size: tuple[int, int]) -> bytes:
    """A JPEG, quality 90, 4:2:0, of any contrast in brightness and a quarter of it in each colour difference."""
    from PIL import Image

    planes, brightness = [], rng.uniform(15, 60)
    for contrast in (brightness, brightness / 4, brightness / 4):
        x, y = (int(rng.integers(0, fields.shape[1] - side + 1)) for side in size)
        crop = fields[rng.integers(len(fields)), y : y + size[1], x : x + size[0]]
        crop = crop[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
        planes.append(Image.fromarray(np.clip(128 + contrast * crop, 0, 255).astype(np.uint8)))
    out = io.BytesIO()
    Image.merge("YCbCr", planes).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
