"""A recipe whose first window holds all that a preview must cope with: hostile text, long text, damaged samples."""

import json
from pathlib import Path

import pytest
import yaml

from dsvlm.config import load_recipe
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.shard import ShardWriter
from dsvlm.train.build import make_tokenizer, plan_run
from tests.dist.recipes import RAW, tiny

HOSTILE = '<script>alert("x")</script> & <b>'
TASKS = {
    "odd": {"type": "caption", "shards": "train/odd", "samples": 6},
    **{name: RAW["tasks"][name] for name in ("question", "locate")},
    "match": {"type": "pair", "shards": "train/match", "samples": 3, "classes": 3},
}


def write_odd(source: ShardReader, out: Path) -> None:
    """Six captions: a hostile one, one too long, one without its field, one with a damaged image, two sound ones."""
    records = [{"caption": HOSTILE}, {"caption": "red " * 80}, {"text": "?"}]
    records += [{"caption": f"a ring {i}"} for i in "abc"]
    with ShardWriter(out, "caption") as writer:
        for i, record in enumerate(records):
            image = b"no image" if i == 3 else source.image(i)
            writer.write(f"odd{i}", {"json": json.dumps(record).encode(), "png": image})


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("preflight")
    make_scenes(root, samples=24, val_samples=1, tasks=("question", "locate"))
    source = ShardReader(load_manifest(root / "train/question"))
    write_odd(source, root / "train/odd")
    with ShardWriter(root / "train/match", "pair") as writer:
        for i in range(12):
            record = json.dumps({"text": source.record(i)["question"], "label": i % 3}).encode()
            writer.write(f"m{i}", {"json": record, "png": source.image(i)})
    raw = tiny(root).to_dict() | {"tasks": TASKS, "output": str(root / "run")}
    (root / "tiny.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return root / "tiny.yaml"


@pytest.fixture
def planned(recipe):
    return plan_run(load_recipe(recipe))


@pytest.fixture(scope="session")
def codec(recipe):
    return make_tokenizer(plan_run(load_recipe(recipe)))
