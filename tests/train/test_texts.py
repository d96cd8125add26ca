"""The texts that a vocabulary is trained on: those of samples that the loader does not mask."""

import json

import pytest

from dsvlm.data.manifest import load_manifest
from dsvlm.data.shard import ShardWriter
from dsvlm.train.build import make_tokenizer, plan_run, shard_texts
from tests.dist.recipes import tiny

TASKS = {"lines": {"type": "caption", "shards": "lines", "samples": 2}}
UNFIT = [
    '{"caption": "half of a pair: \\ud83d"}', '{"caption": 5}', '{"caption": null}', '{"caption": ["a", "b"]}', "{}",
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def plan(kind, records, **task):
        with ShardWriter(tmp_path / "lines", kind) as writer:
            for i, record in enumerate(records):
                writer.write(f"s{i}", {"json": record.encode()})
        return plan_run(tiny(tmp_path, tasks={"lines": TASKS["lines"] | {"type": kind} | task}))

    return plan


def test_texts_that_are_masked_train_no_vocabulary(write, tmp_path):
    records = [json.dumps({"caption": f"a caption of number {i}"}) for i in range(30)]
    planned = write("caption", [*records[:10], *UNFIT, *records[10:]])
    assert load_manifest(tmp_path / "lines").samples == 35
    captions = [text for text in shard_texts(planned) if text.startswith("a caption")]
    assert captions == [f"a caption of number {i}" for i in range(30)]
    assert all(text in (*captions, "describe the image") for text in shard_texts(planned))
    assert make_tokenizer(planned).size > 8


def test_no_record_ends_the_training_of_a_vocabulary(write):
    deep = "[" * 900 + "]" * 900
    records = ['{"text": "a dog", "label": Infinity}', f'{{"text": {deep}, "label": 0}}', '{"text": "red", "label": 1}']
    assert list(shard_texts(write("pair", records, classes=2)))[-1] == "red"
