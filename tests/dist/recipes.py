"""The tiny recipe of the multi-rank tests: four tasks with and without images, text and head."""

import copy

from dsvlm.config import Recipe, parse_recipe

VISION = {"image_size": 40, "patch_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2}  # fmt: skip
DECODERS = {
    "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_position_embeddings": 96, "dropout": 0.0},
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "tie_word_embeddings": False},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0},
}  # fmt: skip
RAW = {
    "name": "tiny", "seed": 5,
    "text": {"vocab_size": 64, "bins": 8, "max_length": 64},
    "model": {"vision": {"config": VISION}, "decoder": {"kind": "opt"}, "loss_chunk": 7},
    "tasks": {
        "lines": {"type": "vqa", "shards": "train/lines", "samples": 5},  # text only, and first: the stale case
        "question": {"type": "vqa", "shards": "train/question", "samples": 6, "weight": 2.0},
        "locate": {"type": "locate", "shards": "train/locate", "samples": 4},
        "match": {"type": "pair", "shards": "train/match", "samples": 3, "classes": 3},
    },
    "schedule": {"steps": 4, "strategy": "accumulate"},
    # A large eps: where a gradient is 0 but for rounding (key biases), AdamW would turn rounding into steps of size lr.
    "optim": {"lr": 1e-2, "eps": 1e-3, "clip": 0.0, "schedule": "constant"},
    "train": {"micro_batch": 3, "zero": 0},
}  # fmt: skip

STRATEGIES = {
    "accumulate": {},
    "mixed": {"schedule__strategy": "mixed"},
    "unified": {"schedule__strategy": "unified", "schedule__samples": 10},
    "per_rank": {"schedule__strategy": "per_rank", "schedule__samples": 12, "schedule__chunk": 3},
}


def tiny(root, decoder: str = "opt", **changes) -> Recipe:
    """The recipe on the data at `root`; changes by dotted path with `__` for the dots: `train__zero=3`."""
    raw = copy.deepcopy(RAW)
    raw["data"] = {"root": str(root)}
    raw["model"]["decoder"] = {"kind": decoder, "config": dict(DECODERS[decoder])}
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = raw
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return parse_recipe(raw)
