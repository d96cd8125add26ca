"""`dsvlm_git` in Hugging Face models that know nothing of a GitMask, and MPT by its override."""

import copy

import pytest
import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from dsvlm.config import RECIPES, load_recipe
from dsvlm.model.backbone import kind_of
from dsvlm.model.backbone.attention import NAME, register
from dsvlm.model.backbone.mpt import use_git_attention
from dsvlm.model.build import build_model
from dsvlm.ops import GitMask

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}


def build(kind):
    """The same weights with our attention and with eager attention."""
    register()
    register()
    torch.manual_seed(0)
    if kind == "opt":
        sizes = {"ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16, "dropout": 0.0}
        model = OPTForCausalLM(OPTConfig(**SIZES, **sizes, init_std=0.3))
    elif kind == "llama":
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **heads, intermediate_size=32, initializer_range=0.3))
    else:
        sizes = {"vocab_size": 50, "d_model": 24, "n_heads": 3, "n_layers": 2, "max_seq_len": 32}
        model = MptForCausalLM(MptConfig(**sizes, initializer_range=0.3))
    ours = copy.deepcopy(model)
    if kind == "mpt":
        use_git_attention(ours)
    else:
        model.set_attn_implementation("eager")
        ours.set_attn_implementation(NAME)
    return ours.eval(), model.eval()


@pytest.fixture(params=["opt", "llama", "mpt"])
def kind(request):
    return request.param


@pytest.fixture
def models(kind):
    return build(kind)


@torch.no_grad()
@pytest.mark.parametrize("side", [None, "left", "right", "inner"])
def test_plain_text_is_causal_and_padding_is_not_seen(models, side):
    ours, eager = models
    tokens = torch.randint(1, 50, (3, 7))
    mask = None
    if side:
        mask = torch.ones_like(tokens)
        mask[1, 2 * (side == "inner") :][:3] = 0
        mask = mask if side != "right" else mask.flip(1)
    a, b = (m(tokens, attention_mask=mask).logits for m in (ours, eager))
    keep = torch.ones_like(tokens).bool() if mask is None else mask.bool()
    torch.testing.assert_close(a[keep], b[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [slice(0, 2), slice(2, 4)])
def test_generate_with_cache_equals_eager(models, padded):
    ours, eager = models
    tokens, mask = torch.randint(1, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, padded] = 0
    a, b = (m.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (ours, eager))
    assert torch.equal(a, b)


def packed_mask():
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, -1], [0, 0, -1, 0, 0, 0, 0, -1, -1, -1]])
    is_image = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    return GitMask.from_segments(segments, is_image)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dense", [None, torch.bool, torch.float64])
def test_git_masks_give_the_logits_and_gradients_of_eager(models, kind, recompute, dense):
    """Packed rows with inner padding, as intervals and as dense masks; padding loses nothing and adds nothing."""
    ours, eager = (m.double().train() for m in models)
    if recompute:
        ours.activation_checkpointing_enable({"use_reentrant": False})
    mask, tokens = packed_mask(), torch.randint(1, 50, (2, 10))
    seen = mask.dense()
    empty = ~mask.live[:, None, :, None]  # eager divides by 0 in rows of nothing
    floats = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~(seen | empty), float("-inf"))
    given = mask.as_hf() if dense is None else seen if dense == torch.bool else floats
    theirs = ~(seen | empty) if kind == "mpt" else floats
    live = mask.live.double()
    losses = []
    for model, attention_mask in ((ours, given), (eager, theirs)):
        out = model(tokens, attention_mask=attention_mask, position_ids=mask.position_ids(), use_cache=False).logits
        losses.append((out.square().mean(-1) * live).sum())
        losses[-1].backward()
    tolerance = 1e-6 if kind == "opt" else 1e-5  # eager softmax is fp32; norms and rotations of others, too
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=tolerance)


def test_bool_rows_of_nothing_give_zero_and_dropout_works(models):
    attention = AttentionInterface()[NAME]
    q = torch.randn(2, 2, 5, 4)
    seen = torch.ones(2, 1, 5, 5).bool().tril()
    seen[1, :, 3] = False
    out, _ = attention(None, q, q, q, seen)
    assert (out[1, 3] == 0).all() and (out[0] != 0).all()
    assert torch.equal(attention(None, q, q, q, seen, dropout=1.0)[0], torch.zeros_like(out))


def test_autocast_is_that_of_torch_s_attention(models):
    """Also where a model hands over queries and values of two types, as LLaMA does."""
    ours, eager = models
    mask, tokens = packed_mask(), torch.randint(1, 50, (2, 10))
    given = {"attention_mask": mask.as_hf(), "position_ids": mask.position_ids(), "use_cache": False}
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(tokens, **given).logits
    expected = ours(tokens, **given).logits
    assert found.dtype == torch.bfloat16
    on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    assert copy.deepcopy(ours).to("meta")(tokens.to("meta"), **on_meta).logits.shape == (2, 10, 50)
    torch.testing.assert_close(found[mask.live].float(), expected[mask.live], rtol=0.1, atol=0.2)


@torch.no_grad()
def test_hidden_states_are_there_when_asked_for(models):
    ours, tokens = models[0], torch.randint(1, 50, (2, 5))
    found, expected = (m(tokens, output_hidden_states=True).hidden_states for m in models)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for given in ({}, {"input_ids": tokens, "inputs_embeds": ours.get_input_embeddings()(tokens)}):
        with pytest.raises(ValueError, match="one of input_ids (or|and) inputs_embeds"):
            ours(**given)


@torch.no_grad()
def test_float_masks_of_a_wider_type_hide_and_no_more(models, kind):
    """The least fp32 number is none of bf16: rows of padding would become NaN, and by values of weight 0 all others."""
    ours, eager = (m.bfloat16() for m in models)
    tokens, seen = torch.randint(1, 50, (2, 7)), torch.ones(2, 1, 7, 7).bool().tril()
    seen[1, ..., :3] = False
    mask = torch.zeros(2, 1, 7, 7).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.tensor([range(7), [0, 0, 0, 0, 1, 2, 3]])
    found = ours(tokens, attention_mask=mask, position_ids=positions).logits
    expected = eager(tokens, attention_mask=~seen if kind == "mpt" else mask, position_ids=positions).logits
    assert found.isfinite().all()
    keep = seen.any(dim=-1)[:, 0]
    torch.testing.assert_close(found[keep], expected[keep], rtol=0.1, atol=0.1)


def test_silent_mistakes_are_errors():
    ours, _ = build("opt")
    tokens = torch.randint(1, 50, (1, 6))
    with pytest.raises(ValueError, match=r"expected key intervals.*torch.bool \(1, 1, 6, 5\)"):
        ours(tokens, attention_mask=torch.ones(1, 1, 6, 5, dtype=torch.bool), position_ids=torch.arange(6)[None])
    attention = AttentionInterface()[NAME]
    layer = next(m for m in ours.modules() if hasattr(m, "q_proj"))
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="passed no mask for 5 queries"):
        attention(layer, q, q, q, None)
    assert attention(layer, q[:, :, :1], q, q, None)[0].shape == (1, 1, 2, 4)


def test_models_that_change_scores_are_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    register()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 32}
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, **heads)).eval()
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="Gemma2Attention passed softcap.*attn_implementation='eager'"):
        model(torch.randint(1, 50, (1, 6)))


def test_windows_become_dense_masks():
    """A sliding window is more than causal: transformers' own mask is used, not a wrong one."""
    from transformers import MistralConfig, MistralForCausalLM

    register()
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 3, "intermediate_size": 32}
    model = MistralForCausalLM(MistralConfig(**SIZES, **heads)).eval()
    tokens, outs = torch.randint(1, 50, (1, 9)), []
    for name in (NAME, "eager"):
        model.set_attn_implementation(name)
        outs.append(model(tokens).logits)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_attends_by_it(name):
    config = load_recipe(name).model
    model = build_model(config, vocab_size=50, pad_id=0, bos_id=1, eos_id=2, heads={}, seed=0)
    assert model.decoder.config._attn_implementation == NAME
    assert model.vision.tower.config._attn_implementation == "sdpa"  # no mask, no dropout


def test_t5_does_not_and_says_why():
    """It adds a learned position bias to the scores; whoever asks for our attention is refused."""
    from transformers import T5Config, T5ForConditionalGeneration

    assert {kind: kind_of(kind).attention for kind in ("opt", "llama", "mpt", "t5")} == {
        "opt": NAME, "llama": NAME, "mpt": "eager", "t5": "eager",  # MPT's own module calls git_attention
    }  # fmt: skip
    register()
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="T5Attention passed position_bias.*attn_implementation='eager'"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long), decoder_input_ids=torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize("part, kind, words", [
    ("decoder", "t5", "learned position bias.*use opt, llama or mpt"),
    ("decoder", "opt", "kind opt always attend by dsvlm_git; remove it"),
    ("vision", "opt", "PyTorch's attention.*remove it"),
])  # fmt: skip
def test_recipes_do_not_choose_it(part, kind, words):
    changes = [f"model.decoder.kind={kind}", f"model.{part}.config.attn_implementation={NAME}"]
    path = rf"model\.{part}\.config\.attn_implementation"
    with pytest.raises(ValueError, match=rf"{path}: .{NAME}. is no choice.*{words}"):
        load_recipe("quickstart", changes)
