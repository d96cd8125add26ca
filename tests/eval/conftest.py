"""A run that really was trained, for three updates on one rank, with one damaged validation sample."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.index import ShardIndex
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.shard import ShardWriter

DAMAGED = 2  # sample of the question task's validation set
VISION = {"image_size": 20, "patch_size": 10, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
          "num_attention_heads": 2}  # fmt: skip
OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
       "max_position_embeddings": 64, "dropout": 0.0}  # fmt: skip


def write_pairs(source: Path, out: Path) -> None:
    """Questions of `source` as pairs: does the answer name a shape (1) or not (0)?"""
    reader = ShardReader(load_manifest(source))
    with ShardWriter(out, "pair") as writer:
        for sample in range(len(reader)):
            record = reader.record(sample)
            label = int(record["answer"] in ("square", "ring", "cross"))
            text = f'{{"label":{label},"text":"{record["question"]}"}}'
            writer.write(reader.key(sample), {"json": text.encode(), "png": reader.image(sample)})


def damage(directory: Path, sample: int) -> None:
    """Changes a byte in the image of a sample."""
    offset, _, _ = ShardIndex(directory / "shard-000000.arrow").member(sample, "png")
    with (directory / "shard-000000.tar").open("r+b") as file:
        file.seek(offset + 20)
        byte = file.read(1)[0]
        file.seek(offset + 20)
        file.write(bytes([byte ^ 0xFF]))


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("eval")
    make_scenes(root / "data", samples=32, val_samples=16, size=20, tasks=("question", "locate"))
    for split in ("train", "val"):
        write_pairs(root / "data" / split / "question", root / "data" / split / "pair")
    damage(root / "data/val/question", DAMAGED)
    tasks = {"question": "vqa", "locate": "locate", "pair": "pair"}
    recipe = {
        "name": "tiny", "data": {"root": str(root / "data")}, "output": str(root / "run"),
        "text": {"vocab_size": 64, "bins": 8, "max_length": 48},
        "model": {"vision": {"config": VISION}, "decoder": {"kind": "opt", "config": OPT}},
        "tasks": {name: {"type": kind, "shards": f"train/{name}", "eval": f"val/{name}", "samples": 4}
                  for name, kind in tasks.items()},
        "schedule": {"steps": 3}, "optim": {"lr": 0.01, "ema": 0.5},
        "train": {"zero": 0}, "eval": {"batch": 5, "max_new_tokens": 12},
    }  # fmt: skip
    recipe["tasks"]["pair"]["classes"] = 2
    (root / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    environ = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dsvlm", "train", str(root / "tiny.yaml")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return root / "run"


@pytest.fixture
def loaded(run_dir):
    """Recipe, codec and a model with weights so large that its answers differ."""
    from dsvlm.eval.load import load_run

    recipe, codec, model = load_run(run_dir)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0)
    return recipe, codec, model.double()
