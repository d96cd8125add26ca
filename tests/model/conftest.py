"""Tiny models of every decoder kind, and samples that can be put into any batch."""

from dataclasses import dataclass

import pytest
import torch

from dsvlm.config import DecoderConfig, LoraSettings, ModelConfig, VisionConfig
from dsvlm.data.collate import Batch
from dsvlm.model.build import build_model

VOCAB, PAD, BOS, EOS = 41, 0, 1, 2
PIXELS, TOKENS = 8, 5  # image size; tokens of one image: (8 / 4)^2 + 1
HEADS = {"pair": 3, "sex": 2}

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": PIXELS,
    "patch_size": 4,
    "initializer_range": 0.3,
}
DECODERS = {
    "opt": {
        "hidden_size": 24,
        "word_embed_proj_dim": 20,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "do_layer_norm_before": False,
        "init_std": 0.3,
    },
    "llama": {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    },
    "mpt": {"d_model": 24, "n_heads": 3, "n_layers": 2, "max_seq_len": 64, "initializer_range": 0.3},
    "t5": {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}
DROPOUT = {
    "opt": ("dropout", "attention_dropout"),
    "llama": ("attention_dropout",),
    "mpt": (),  # transformers wants a whole number there
    "t5": ("dropout_rate",),
}


def recipe(kind="opt", dropout=0.0, vision=None, decoder=None, **settings) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(config={**VISION, "attention_dropout": dropout, **(vision or {})}),
        decoder=DecoderConfig(
            kind=kind, config={**DECODERS[kind], **dict.fromkeys(DROPOUT[kind], dropout), **(decoder or {})}
        ),
        **settings,
    )


def build(config: ModelConfig, heads=None, seed=0, vocab_size=VOCAB):
    return build_model(
        config,
        vocab_size=vocab_size,
        pad_id=PAD,
        bos_id=BOS,
        eos_id=EOS,
        heads=HEADS if heads is None else heads,
        seed=seed,
    )


@dataclass(frozen=True)
class Sample:
    """pixels: uint8 [images, 3, P, P]; tokens: [n]; target: how many tokens at the end are to be predicted."""

    pixels: torch.Tensor
    tokens: torch.Tensor
    target: int
    key: int
    weight: float
    head: int
    label: int


def sample(key: int, images: int, prompt: int, target: int, head: int = -1) -> Sample:
    generator = torch.Generator().manual_seed(key)
    pixels = torch.randint(0, 256, (images, 3, PIXELS, PIXELS), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(3, VOCAB, (prompt + target,), generator=generator)
    weight = float(torch.rand((), generator=generator)) + 0.5
    return Sample(pixels, tokens, target, 1000003 * key + 17, weight, head, head if head >= 0 else -100)


def collate(samples: list[Sample], kind: str = "opt", extra: int = 0, packed=None, width: int = 0) -> Batch:
    """As the loader does it, with several images per sample, and `extra` columns of padding more."""
    pixels = [s.pixels for s in samples]
    image_row = [row for row, s in enumerate(samples) for _ in s.pixels]
    if not image_row:
        pixels, image_row = [torch.zeros(1, 3, PIXELS, PIXELS, dtype=torch.uint8)], [-1]
    source, targets, answers = [], [], []
    for s in samples:
        if kind == "t5":
            split = len(s.tokens) - s.target
            source.append(s.tokens[:split])
            targets.append(s.tokens[split:] if s.target else torch.tensor([-100]))
            answers.append(torch.cat((torch.tensor([PAD]), s.tokens[split:]))[: max(s.target, 1)])
        else:
            source.append(s.tokens)
            shifted = torch.full_like(s.tokens, -100)
            shifted[len(s.tokens) - s.target - 1 : -1] = s.tokens[len(s.tokens) - s.target :]
            targets.append(shifted)

    def pad(rows, value):
        width = max(map(len, rows)) + extra
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=value) for row in rows])

    return Batch(
        pixels=torch.cat(pixels),
        image_row=torch.tensor(image_row),
        tokens=pad(source, PAD),
        lengths=torch.tensor([len(row) for row in source]),
        targets=pad(targets, -100),
        weight=torch.tensor([s.weight for s in samples]),
        keys=torch.tensor([s.key for s in samples]),
        task=torch.zeros(len(samples), dtype=torch.int64),
        label=torch.tensor([s.label for s in samples]),
        head=torch.tensor([s.head for s in samples]),
        decoder_tokens=pad(answers, PAD) if kind == "t5" else None,
        decoder_lengths=torch.tensor([len(a) for a in answers]) if kind == "t5" else None,
        row=None if packed is None else torch.tensor(packed),
        width=width,
    )


MIXED = [sample(1, 1, 3, 4), sample(2, 0, 2, 3), sample(3, 2, 4, 2, head=1), sample(4, 1, 2, 0, head=0)]


class Tools:
    """What the tests of this directory share."""

    recipe, build = staticmethod(recipe), staticmethod(build)
    sample, collate = staticmethod(sample), staticmethod(collate)
    mixed, lora = MIXED, LoraSettings
    vocab, pad, bos, eos, image_tokens, heads = VOCAB, PAD, BOS, EOS, TOKENS, HEADS

    @staticmethod
    def gradients(model, *batches, seed=0):
        """Parameter gradients of the summed losses; every micro-step with the same random state."""
        model.zero_grad()
        for batch in batches:
            torch.manual_seed(seed)
            with model.keyed_dropout(batch):
                model(batch)["loss_sum"].backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    @staticmethod
    def assert_equal(ours, theirs, tolerance):
        assert ours.keys() == theirs.keys()
        for name in ours:
            close = torch.allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
            assert close, f"{name}: differs by {(ours[name] - theirs[name]).abs().max():.1e}"


@pytest.fixture(scope="session")
def tools():
    return Tools


@pytest.fixture(params=["opt", "llama", "mpt", "t5"])
def kind(request):
    return request.param
