"""Data sets and kept pools that the multi-rank tests share."""

import json
from pathlib import Path

import pytest

from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.shard import ShardWriter
from tests.dist.pool import Pool


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """Scenes, a text-only task `lines`, a head-bank task `match` and conversations `talks` made from them."""
    root = tmp_path_factory.mktemp("dist-data")
    make_scenes(root, samples=24, val_samples=8, tasks=("caption", "question", "locate"))
    source = ShardReader(load_manifest(root / "train/caption"))
    with ShardWriter(root / "train/lines", "vqa") as lines, ShardWriter(root / "train/match", "pair") as match:
        for i in range(len(source)):
            caption = source.record(i)["caption"]
            lines.write(f"l{i}", {"json": to_json({"question": f"after {i % 7} comes", "answer": str(i % 7 + 1)})})
            label = i % 3
            pair = {"text": caption if label else "an empty scene", "label": label}
            match.write(f"m{i}", {"png": source.image(i), "json": to_json(pair)})
    with ShardWriter(root / "train/talks", "conversation") as talks:
        for i in range(len(source)):
            said = [("<image>\ndescribe", source.record(i)["caption"]), (f"after {i % 7} comes", str(i % 7 + 1))] * 2
            talks.write(f"t{i}", {"png": source.image(i), "json": to_json({"conversations": turns(said[: 1 + i % 3])})})
    return root


def turns(said: list[tuple[str, str]]) -> list[dict]:
    """LLaVA's turns of (question, answer); the image's mark stands in the first question alone."""
    texts = [text.replace("<image>", "" if i else "<image>") for i, pair in enumerate(said) for text in pair]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def to_json(record: dict) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


@pytest.fixture(scope="session")
def pools():
    """`pools(world_size)`: a kept pool, started when first asked for."""
    started: dict[int, Pool] = {}

    def pool(world_size: int) -> Pool:
        if world_size not in started or not started[world_size].processes:
            started[world_size] = Pool(world_size)
        return started[world_size]

    yield pool
    for each in started.values():
        each.close()
