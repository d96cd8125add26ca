"""A run as a Hugging Face folder: safetensors, configuration, tokenizer, processor, generation settings, model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dsvlm.config import Recipe
from dsvlm.data.tokenizer import TextCodec
from dsvlm.eval.evaluate import versions
from dsvlm.eval.generate import Room
from dsvlm.eval.load import latest_checkpoint, load_run
from dsvlm.export.card import model_card
from dsvlm.export.processor import GitProcessor, ProcessorSettings
from dsvlm.train.checkpoint import read_state
from dsvlm.train.launch import use_cpu_without_gpu

if TYPE_CHECKING:
    from dsvlm.model.git import GitVlm


def export_run(run_dir: str | Path, out: str | Path, ema: bool = False) -> Path:
    """Writes the newest complete checkpoint of a run as a folder that `GitVlm.from_pretrained` loads.

    LoRA adapters are merged into their layers; ema: the averaged weights. Raises ValueError when `out` is not empty.
    """
    run_dir, out = Path(run_dir), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; export into a new one, or remove it")
    checkpoint, weights = latest_checkpoint(run_dir), "ema" if ema else "weights"
    recipe, codec, model = load_run(run_dir, weights, checkpoint)
    if recipe.model.lora:
        from dsvlm.model.lora import merge_lora

        merge_lora(model)
    use_cpu_without_gpu()  # save_pretrained imports whatever could have wrapped the model, DeepSpeed among it
    model.cpu().save_pretrained(out)
    for path in out.glob("*.safetensors"):  # which safetensors lets their owner alone read
        path.chmod((out / "config.json").stat().st_mode)
    check_tensors(model, out)
    settings = processor_settings(recipe, model)
    GitProcessor(codec, settings).save_pretrained(out)
    save_generation(codec, settings, out)
    step = read_state(checkpoint).step
    evaluated = read_evaluation(run_dir, step, weights)
    (out / "README.md").write_text(model_card(recipe, step, weights, evaluated, versions()), encoding="utf-8")
    return out


def processor_settings(recipe: Recipe, model: GitVlm) -> ProcessorSettings:
    room = Room.of(model)
    return ProcessorSettings(
        image_size=model.config.vision_settings["image_size"], bins=recipe.text.bins, text_room=room.text,
        encoder_decoder=room.encoder_decoder, max_new_tokens=recipe.eval.max_new_tokens,
        dct_scaling=recipe.data.dct_scaling,
    )  # fmt: skip


def check_tensors(model: GitVlm, out: Path) -> None:
    """Every parameter is in the written files, whole and finite.

    ZeRO-3 leaves empty parameters behind where a gathering is forgotten, and such files load without a word.
    Raises ValueError naming a tensor that is not finite: the run has diverged.
    """
    import torch
    from safetensors import safe_open

    saved = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                saved[name] = tensor.shape
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{path}: {name} holds values that are not finite; export an earlier checkpoint")
    stored = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in saved}
    for name, parameter in model.named_parameters():
        assert parameter.numel(), f"{name} is empty"
        assert id(parameter) in stored, f"{name} was not written"
        assert saved[stored[id(parameter)]] == parameter.shape, f"{name} was not written whole"


def save_generation(codec: TextCodec, settings: ProcessorSettings, out: Path) -> None:
    from transformers import GenerationConfig

    GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=settings.max_new_tokens, pad_token_id=codec.pad_id,
        bos_token_id=codec.bos_id, eos_token_id=codec.eos_id,
    ).save_pretrained(out)  # fmt: skip


def read_evaluation(run_dir: Path, step: int, weights: str) -> dict | None:
    """eval.json, when it is about these very weights."""
    path = run_dir / "eval.json"
    result = json.loads(path.read_text()) if path.exists() else None
    same = result is not None and (result["step"], result["weights"]) == (step, weights)
    return result if same else None
