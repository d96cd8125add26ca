"""`build_model`: a `GitVlm` from a recipe, with random or pretrained parts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from dsvlm.model.backbone import KINDS, Kind, build_decoder, check_decoder, check_settings, kind_of
from dsvlm.model.backbone.attention import register
from dsvlm.model.freeze import apply_freezing
from dsvlm.model.git import GitVlm, GitVlmConfig
from dsvlm.model.lora import apply_lora
from dsvlm.model.vision import build_tower, check_tower

if TYPE_CHECKING:
    from dsvlm.config import DecoderConfig, ModelConfig, VisionConfig

# what a checkpoint may call itself, by the decoder's kind: others of the same weights among them
TYPES = {"opt": ("opt",), "llama": ("llama", "mistral"), "mpt": ("mpt",), "t5": ("t5", "mt5")}
# the parts of a whole CLIP checkpoint that its vision tower leaves unread
CLIP_UNREAD = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
PREPROCESSOR = "preprocessor_config.json"  # how the images of a tower's checkpoint were prepared


def build_model(
    config: ModelConfig, *, vocab_size: int, pad_id: int, bos_id: int, eos_id: int, heads: dict[str, int], seed: int,
    boxes: Sequence[str] = (), learnt: bool = True, begun: Collection[str] = (),
) -> GitVlm:  # fmt: skip
    """The model of a recipe, its parameters frozen and adapted as it says; the caller's random state is not touched.

    vocab_size: tokens of the tokenizer, for which embedding rows are added where the decoder has fewer;
    heads: classes per head of the bank, in the order of `Batch.head`; boxes: tasks that read or write location tokens;
    learnt: whether a checkpoint has learnt those that it has rows for, as vocabularies rounded up do; begun: names of
    parameters that an earlier run has trained.
    Sizes that conflict, weights missing from or left over in a checkpoint, and rows that such tasks need but that would
    not train, are a ValueError.
    """
    register()
    tokens = {"pad_token_id": pad_id, "bos_token_id": bos_id, "eos_token_id": eos_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = kind_of(config.decoder.kind)
        tower = _tower(config.vision)
        mean, std = pixel_statistics(config.vision.pretrained)
        decoder = _decoder(kind, config.decoder, vocab_size, tokens)
        added = max(0, vocab_size - decoder.config.vocab_size)
        if added:
            add_rows(decoder, vocab_size)
        model = GitVlm(
            GitVlmConfig(
                decoder_kind=config.decoder.kind,
                vision_settings=_settings(tower),
                decoder_settings=_settings(decoder),
                heads=dict(heads),
                moe=None if config.moe is None else asdict(config.moe),
                image_mean=mean,
                image_std=std,
                loss_chunk=config.loss_chunk,
                **tokens,
            ),
            tower,
            decoder,
        )
        if config.embedding_std is not None:
            nn.init.normal_(model.get_input_embeddings().weight, std=config.embedding_std)
        if config.positions == "sinusoidal":
            set_sinusoidal_positions(model)
        if config.lora is not None:
            apply_lora(model, config.lora)
    apply_freezing(model, config.freeze, config.train)
    if boxes and (added or not learnt):
        check_location_rows(model, added, boxes, begun)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _tower(config: VisionConfig) -> CLIPVisionModel:
    if config.pretrained is None:
        check_settings(CLIPVisionModel.config_class, config.config, "model.vision.config")
        return build_tower(config.config)
    types = ("clip", "clip_vision_model")
    tower = load_pretrained(
        CLIPVisionModel, config.pretrained, "sdpa", "model.vision.pretrained", types, unread=CLIP_UNREAD
    )
    check_tower(tower.config)
    return tower


def pixel_statistics(directory: str | None) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel, of pixels from 0 to 1, that a tower was trained with.

    OpenAI's, unless its checkpoint says otherwise, as some of LAION's do.
    """
    path = Path(directory or "") / PREPROCESSOR
    if directory is None or not path.is_file():
        return list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD)
    try:
        settings = json.loads(path.read_text())
        mean = [float(value) for value in settings.get("image_mean", OPENAI_CLIP_MEAN)]
        std = [float(value) for value in settings.get("image_std", OPENAI_CLIP_STD)]
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"image_mean {mean}, image_std {std}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model.vision.pretrained: {path} tells no mean and deviation of 3 channels ({error}); download it again"
        ) from None
    return mean, std


def has_own_statistics(directory: str) -> bool:
    """Whether a checkpoint's are not OpenAI's."""
    return pixel_statistics(directory) != pixel_statistics(None)


def _decoder(kind: Kind, config: DecoderConfig, vocab_size: int, tokens: dict[str, int]) -> PreTrainedModel:
    if config.pretrained is None:
        check_settings(kind.config, config.config, "model.decoder.config")
        decoder = build_decoder(kind, {"vocab_size": vocab_size, **config.config, **tokens})
    else:
        decoder = load_pretrained(
            kind.model, config.pretrained, kind.attention, "model.decoder.pretrained", TYPES[config.kind]
        )
        check_decoder(decoder.config)
        decoder.get_input_embeddings().padding_idx = None  # its row may be one that is read here, and has to train
    if decoder.config.is_encoder_decoder:  # what training writes there, whatever a checkpoint was pretrained with
        decoder.config.decoder_start_token_id = tokens["pad_token_id"]
    return decoder


def load_pretrained(
    model_class: type[PreTrainedModel], directory: str, attention: str, where: str, types: tuple[str, ...],
    unread: tuple[str, ...] = (),
) -> PreTrainedModel:  # fmt: skip
    """A model from a local Hugging Face directory; ValueError unless its weights are the model's, name by name.

    where: the recipe's field, for messages; types: what its configuration may call itself.
    unread: prefixes of weights that the checkpoint may hold beyond the model's.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{where}: {directory} holds no config.json; give the local path of a downloaded checkpoint")
    try:
        settings = json.loads(path.read_text())
        found = settings.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{where}: {path} is damaged ({error}); download it again") from None
    if found not in types:
        raise ValueError(
            f"{where}: {directory} is a checkpoint of type {found!r}, expected {' or '.join(types)}"
            + (f"; set model.decoder.kind: {found}" if found in KINDS and set(types) <= set(KINDS) else "")
        )
    if settings.get("quantization_config"):
        raise ValueError(f"{where}: {directory} holds quantised weights; give the checkpoint that they were made from")
    if (path.parent / "adapter_config.json").is_file():
        raise ValueError(
            f"{where}: {directory} holds an adapter (adapter_config.json), for which Transformers would load the model "
            "that it names, from elsewhere; merge the two and give that, or take the adapter's files away"
        )
    with quiet_reports():
        try:
            model, report = model_class.from_pretrained(
                directory, output_loading_info=True, attn_implementation=attention, dtype=torch.float32,
                local_files_only=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
        except Exception as error:  # each format of weights has errors of its own
            raise ValueError(
                f"{where}: {directory} cannot be loaded: {error}; download it again (files of Git LFS may be pointers)"
            ) from error
    for state in ("missing", "unexpected", "mismatched"):
        keys = [key if isinstance(key, str) else key[0] for key in report[f"{state}_keys"]]
        keys = sorted(key for key in keys if state != "unexpected" or not key.startswith(unread))
        if keys:
            shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            raise ValueError(f"{where}: {directory}: {state} weights for {model_class.__name__}: {shown}")
    return model


def add_rows(decoder: PreTrainedModel, vocab_size: int) -> None:
    """Adds rows to the embeddings, and to a head of its own: that of T5 1.1, Flan-T5 and mT5, too.

    Their configurations say in Transformers 5 that it is tied, which loading does not heed where the checkpoint has a
    head, and resizing does: the checkpoint's would be gone without a word.
    """
    config = decoder.config
    said = config.tie_word_embeddings
    config.tie_word_embeddings = decoder.get_input_embeddings().weight is decoder.get_output_embeddings().weight
    decoder.resize_token_embeddings(vocab_size)
    config.tie_word_embeddings = said


@contextmanager
def quiet_reports():
    """Without Transformers' table of weights that are missing or left over: hundreds of expected ones of a CLIP."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_location_rows(model: GitVlm, added: int, tasks: Sequence[str], begun: Collection[str]) -> None:
    """ValueError if rows of location tokens are frozen that nothing has trained: they start alike, and would stay so.

    added: rows that the checkpoint does not have; begun: names of parameters that an earlier run has trained.
    """
    ends = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    frozen = [
        name for name, p in model.named_parameters() if id(p) in ends and not p.requires_grad and name not in begun
    ]
    if frozen:
        what = f"the decoder got {added} rows for tokens that its checkpoint does not have, location tokens among them"
        if not added:
            what = "the decoder's checkpoint has rows to spare for location tokens, but has not learnt these tokens"
        raise ValueError(
            f"model.train: {what}, but model.lora or model.freeze keeps {' and '.join(frozen)} as they are, so that "
            f"task {', '.join(tasks)} could not tell places apart; add {', '.join(map(repr, frozen))} to model.train"
        )


def _settings(part: PreTrainedModel) -> dict:
    return {key: value for key, value in part.config.to_dict().items() if key not in ("dtype", "_name_or_path")}


@torch.no_grad()
def set_sinusoidal_positions(model: GitVlm) -> None:
    """Start learned position tables from sinusoids of standard deviation 1.

    Patches: rows in one half of the features, columns in the other (MAE, He et al. 2021), the class token 0. OPT's
    table: Vaswani et al. 2017. Decoders without a table (rotary, relative) keep theirs.
    """
    table = model.vision.tower.embeddings.position_embedding.weight
    side, half = math.isqrt(len(table) - 1), table.shape[1] // 2
    line = torch.arange(side)
    table.zero_()
    table[1:, :half] = sinusoids(side, half)[line.repeat_interleave(side)]
    table[1:, half:] = sinusoids(side, table.shape[1] - half)[line.repeat(side)]
    if model.decoder.config.model_type == "opt":
        table = model.decoder.model.decoder.embed_positions.weight
        table.copy_(sinusoids(*table.shape))


def sinusoids(length: int, size: int) -> Tensor:
    """[length, size]: sines, then cosines, of root mean square 1, of wavelengths from 4 positions to 4 * length.

    The longest wavelength follows the table's length: with that of long texts, a grid of few patches would share most
    of its features.
    """
    count = (size + 1) // 2
    wavelength = 4.0 * length ** (torch.arange(count) / max(1, count - 1))
    angle = 2 * math.pi * torch.arange(length)[:, None] / wavelength
    return math.sqrt(2.0) * torch.cat((angle.sin(), angle.cos()), dim=1)[:, :size]
