"""A trained run as a model in one process: its recipe, tokenizer and latest complete checkpoint, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsvlm.config import Recipe
from dsvlm.data.tokenizer import TextCodec
from dsvlm.data.transforms import make_decoder
from dsvlm.train.checkpoint import complete_checkpoints, load_weights
from dsvlm.train.pretrained import begin_model, check_contents
from dsvlm.train.rundir import decoder_of, load_own_tokenizer, read_recipe, read_run

if TYPE_CHECKING:
    from dsvlm.model.git import GitVlm


def latest_checkpoint(run_dir: str | Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises ValueError when the directory is not a run, or no checkpoint is complete yet.
    """
    read_recipe(Path(run_dir))  # says so when it is not a run at all
    checkpoints = complete_checkpoints(Path(run_dir))
    if not checkpoints:
        raise ValueError(
            f"{run_dir}: no complete checkpoint yet; a training saves every train.save_every updates, at its end, "
            "and when a signal ends it"
        )
    return checkpoints[-1]


def load_run(
    run_dir: str | Path, kind: str = "weights", checkpoint: Path | None = None
) -> tuple[Recipe, TextCodec, GitVlm]:
    """Recipe, text codec and model of a run, in evaluation mode, on the GPU if there is one.

    kind: "weights", or "ema" for the averaged ones; checkpoint: one of the run's, default the newest complete one.
    """
    import torch

    run_dir = Path(run_dir)
    recipe = read_recipe(run_dir)
    checkpoint = checkpoint or latest_checkpoint(run_dir)
    if kind == "ema" and not recipe.optim.ema:
        raise ValueError(f"{run_dir}: the run keeps no averaged weights (optim.ema is 0); leave --ema out")
    if record := read_run(run_dir).get("pretrained"):
        check_contents(recipe, record)
    codec = load_own_tokenizer(run_dir, recipe.text.bins)
    model = begin_model(recipe, codec, trains=False, record=record)
    load_weights(model, checkpoint, kind)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return recipe, codec, model.to(device).eval()


def load_decoder(run_dir: str | Path, recipe: Recipe, model: GitVlm) -> Callable[[bytes], np.ndarray]:
    """What turns encoded images into the pixels that the run trained on, uint8 [3, P, P]."""
    name = decoder_of(recipe, Path(run_dir))
    return make_decoder(name, model.config.vision_settings["image_size"], recipe.data.dct_scaling)
