"""`dsvlm_git` in unmodified Hugging Face models that know nothing of a GitMask."""

import copy

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from dsvlm.model.backbone.attention import NAME, register

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}


@pytest.fixture(params=["opt", "llama"])
def models(request):
    """The same weights with our attention and with eager attention."""
    register()
    register()
    torch.manual_seed(0)
    if request.param == "opt":
        model = OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=16))
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **heads, intermediate_size=32))
    model.eval().set_attn_implementation("eager")
    ours = copy.deepcopy(model)
    ours.set_attn_implementation(NAME)
    return ours, model


@torch.no_grad()
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_plain_text_is_causal_and_padding_is_not_seen(models, side):
    ours, eager = models
    tokens = torch.randint(1, 50, (3, 7))
    mask = None
    if side:
        mask = torch.ones_like(tokens)
        mask[1, :3] = 0
        mask = mask if side == "left" else mask.flip(1)
    a, b = (m(tokens, attention_mask=mask).logits for m in (ours, eager))
    keep = torch.ones_like(tokens).bool() if mask is None else mask.bool()
    torch.testing.assert_close(a[keep], b[keep], rtol=1e-4, atol=1e-5)


def test_generate_with_cache_equals_eager(models):
    ours, eager = models
    tokens, mask = torch.randint(1, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    a, b = (m.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (ours, eager))
    assert torch.equal(a, b)


def test_silent_mistakes_are_errors(models):
    ours, _ = models
    tokens, mask = torch.randint(1, 50, (1, 6)), torch.tensor([[1, 1, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="padding between real tokens"):
        ours(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="expected key intervals.*torch.bool"):
        ours(tokens, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool), position_ids=torch.arange(6)[None])
    attention = AttentionInterface()[NAME]
    layer = next(m for m in ours.modules() if hasattr(m, "q_proj"))
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(ValueError, match="passed no mask for 5 queries"):
        attention(layer, q, q, q, None)
    assert attention(layer, q[:, :, :1], q, q, None)[0].shape == (1, 1, 2, 4)
