"""Runs of every kind of decoder, made without training: their weights are large and random, so that answers differ."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dsvlm.config import parse_recipe
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.files import write_file
from dsvlm.train.build import make_model, make_tokenizer, plan_run
from dsvlm.train.checkpoint import RunState, directory_of, entry_of

VISION = {"image_size": 20, "patch_size": 10, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
          "num_attention_heads": 2}  # fmt: skip
DECODERS = {
    "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 48, "dropout": 0.1},
    "llama": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "max_position_embeddings": 64},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}  # fmt: skip


def make_run(root: Path, kind: str) -> Path:
    """A run directory as training leaves it; llama has LoRA adapters and averaged weights."""
    model = {"vision": {"config": VISION}, "decoder": {"kind": kind, "config": DECODERS[kind]}}
    if kind == "llama":
        model["lora"] = {"targets": ["q_proj", "down_proj"], "r": 2}
    recipe = parse_recipe({
        "name": f"tiny-{kind}", "output": str(root / kind), "data": {"root": str(root / "data")}, "model": model,
        "text": {"vocab_size": 64, "bins": 4, "max_length": 40}, "schedule": {"steps": 7},
        "tasks": {"locate": {"type": "locate", "shards": "train/locate", "samples": 2}},
        "optim": {"ema": 0.9 if kind == "llama" else 0.0}, "eval": {"max_new_tokens": 100 if kind == "opt" else 12},
    })  # fmt: skip
    codec = make_tokenizer(plan_run(recipe))
    codec.save(recipe.run_dir / "tokenizer")
    write_file(recipe.run_dir / "recipe.yaml", yaml.safe_dump(recipe.to_dict()).encode())
    directory = directory_of(recipe.run_dir, 7)
    directory.mkdir(parents=True)
    for seed, weights in enumerate(("weights", "ema")[: 1 + (kind == "llama")]):
        trained = make_model(recipe, codec)
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: torch.randn(p.shape, generator=generator) for name, p in trained.named_parameters() if p.requires_grad
        }
        save_file(tensors, directory / f"{weights}-00000-of-00001.safetensors")
    write_file(directory / "state.json", json.dumps(asdict(RunState(7, 0, "", 1, ""))).encode())
    files = {path.name: entry_of(path) for path in directory.iterdir()}
    write_file(directory / "COMPLETE.json", json.dumps({"format": 1, "step": 7, "files": files}).encode())
    return recipe.run_dir


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("export")
    make_scenes(root / "data", samples=24, val_samples=8, size=20, tasks=("locate",))
    return {kind: make_run(root, kind) for kind in DECODERS}
