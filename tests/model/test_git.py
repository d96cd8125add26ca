"""GitVlm against the model written out plainly: each row alone, eager attention, the dense mask of the article."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.mpt.modeling_mpt import MptAttention, MptModel

from dsvlm.config import MoeConfig, MoeLosses


def plain_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    out = scores.softmax(-1) @ value.repeat_interleave(group, 1)
    return out.transpose(1, 2).contiguous(), None


def dense_git_mask(images, texts):
    """create_git_attention_mask of the GIT-LLM article, in fp64."""
    top = torch.cat((torch.zeros(images, images), torch.full((images, texts), float("-inf"))), 1)
    corner = torch.triu(torch.ones(texts, texts), diagonal=1)
    corner = corner.masked_fill(corner == 1, float("-inf"))
    return torch.cat((top, torch.cat((torch.zeros(texts, images), corner), 1)), 0).double()[None, None]


def reference(model, samples, kind):
    """Loss and per-row logits of the target positions, one row after the other."""
    tower, language = model.vision.tower, model.decoder
    embed, weight = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    loss, all_logits = 0.0, []
    for s in samples:
        images = torch.zeros(0, embed.shape[1], dtype=torch.float64)
        if len(s.pixels):
            features = tower((s.pixels.double() / 255 - mean) / std).last_hidden_state
            projected = F.linear(features, model.connector.linear.weight, model.connector.linear.bias)
            norm = model.connector.norm
            images = F.layer_norm(projected, projected.shape[-1:], norm.weight, norm.bias, norm.eps).flatten(0, 1)
        prompt = len(s.tokens) - s.target
        if kind == "t5":
            x = torch.cat((images, embed[s.tokens[:prompt]]))[None]
            encoded = language.encoder(inputs_embeds=x)
            pooled = encoded.last_hidden_state[0, -1]
            logits = language(encoder_outputs=encoded, labels=s.tokens[None, prompt:]).logits[0] if s.target else None
        else:
            x = torch.cat((images, embed[s.tokens]))[None]
            hidden = language.base_model(
                inputs_embeds=x,
                attention_mask=dense_git_mask(len(images), len(s.tokens)),
                position_ids=torch.arange(x.shape[1])[None],
            ).last_hidden_state[0]
            pooled = hidden[-1]
            logits = hidden[len(images) + prompt - 1 : -1] @ weight.T if s.target else None
        if s.target:
            loss = loss + s.weight32 * F.cross_entropy(logits, s.tokens[prompt:], reduction="sum")
        if s.head >= 0:
            head = model.heads.bank[s.head]
            scores = F.linear(pooled, head.weight, head.bias)
            loss = loss + s.weight32 * F.cross_entropy(scores[None], torch.tensor([s.label]))
        all_logits.append(logits)
    return loss, all_logits


@pytest.fixture
def pair(tools, kind):
    """Our model, and its double whose parts use the plain attention."""
    AttentionInterface.register("plain", plain_attention)
    ours = tools.build(tools.recipe(kind)).double()
    plain = copy.deepcopy(ours)
    parts = [plain.vision.tower.config] + ([plain.decoder.config] if kind != "t5" else [])
    for config in parts:
        config._attn_implementation = "plain"
    if kind == "mpt":  # its own attention, where True in a mask, as is -inf, means masked
        plain.decoder.transformer.__class__ = MptModel
        for block in plain.decoder.transformer.blocks:
            block.attn.__class__ = MptAttention
    return ours, plain


# RMSNorm and rotary embeddings of LLaMA and T5, and MPT's own softmax, round to fp32 inside, also in an fp64 model
TOLERANCE = {"opt": 1e-11, "llama": 1e-5, "mpt": 1e-5, "t5": 1e-5}


def with_float32_weight(samples):
    for s in samples:
        object.__setattr__(s, "weight32", float(torch.tensor(s.weight)))
    return samples


def test_loss_logits_and_gradients_equal_the_plain_model(tools, kind, pair):
    ours, plain = pair
    samples = with_float32_weight(tools.mixed)
    batch = tools.collate(samples, kind, extra=2)
    out = ours(batch)
    expected, logits = reference(plain, samples, kind)
    torch.testing.assert_close(out["loss_sum"], expected, rtol=TOLERANCE[kind], atol=0)
    got = ours.logits(batch)
    for row, (s, want) in enumerate(zip(samples, logits, strict=True)):
        if want is not None:
            live = batch.targets[row] != -100
            torch.testing.assert_close(got[row][live], want, rtol=TOLERANCE[kind], atol=TOLERANCE[kind])
            hits = (want.argmax(-1) == s.tokens[-s.target :]).sum()
            nll = F.cross_entropy(want, s.tokens[-s.target :], reduction="sum")
            if s.head < 0:
                assert out["correct"][row] == hits and out["count"][row] == s.target
                torch.testing.assert_close(out["nll"][row], nll, rtol=TOLERANCE[kind], atol=0)
    expected.backward()
    theirs = {n: p.grad for n, p in plain.named_parameters()}
    tools.assert_equal(tools.gradients(ours, batch), theirs, TOLERANCE[kind])


def test_rows_do_not_depend_on_their_batch(tools, kind):
    model = tools.build(tools.recipe(kind)).double()
    together = model(tools.collate(tools.mixed, kind, extra=3))
    for row, s in enumerate(tools.mixed):
        alone = model(tools.collate([s], kind))
        torch.testing.assert_close(alone["nll"][0], together["nll"][row], rtol=1e-6, atol=1e-9)
        assert alone["count"][0] == together["count"][row] and alone["correct"][0] == together["correct"][row]
        assert not together["nll"].requires_grad


def test_every_parameter_has_a_gradient_in_every_batch(tools, kind):
    """What ZeRO-3 needs: also for text alone, images alone, no target at all and a filler of weight 0."""
    model = tools.build(tools.recipe(kind)).double()
    text = [tools.sample(5, 0, 3, 2)]
    filler = [tools.sample(6, 0, 1, 0)]
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    runs = []
    for samples in (tools.mixed, text, filler):
        calls.clear()
        gradients = tools.gradients(model, tools.collate(samples, kind))
        runs.append(list(calls))
        assert all(torch.isfinite(g).all() for g in gradients.values())
    assert runs[0] == runs[1] == runs[2], "the same modules in the same order, whatever the batch holds"
    assert all((g == 0).all() for g in gradients.values())
    tower = tools.gradients(model, tools.collate(text, kind))["vision.tower.embeddings.patch_embedding.weight"]
    assert (tower == 0).all()


def test_padding_of_nan_does_not_reach_the_loss(tools, kind):
    """The pad token's embedding is poisoned; the dummy image and image slots of other rows are there, too."""
    model = tools.build(tools.recipe(kind), heads={}).double()
    batch = tools.collate(tools.mixed, kind, extra=4)
    if kind == "t5":
        batch.decoder_tokens[:, 0] = 5  # T5 starts from the pad token: here from another
        for row, length in enumerate(batch.decoder_lengths):
            assert (batch.decoder_tokens[row, length:] == tools.pad).all()
    clean = tools.gradients(model, batch)
    loss = model(batch)["loss_sum"]
    # tied: only the lookup is poisoned, not the output projection
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, out: torch.where((inputs[0] == tools.pad)[..., None], float("nan"), out)
    )
    poisoned = model(batch)["loss_sum"]
    assert torch.isfinite(loss) and torch.equal(loss, poisoned)
    tools.assert_equal(tools.gradients(model, batch), clean, 0.0)


def test_text_never_reaches_image_rows(tools):
    model = tools.build(tools.recipe("llama")).double()
    seen = []
    layer = model.decoder.model.layers[-1]
    layer.register_forward_hook(lambda module, inputs, out: seen.append(out[0, : tools.image_tokens].detach().clone()))
    s = tools.sample(7, 1, 4, 3)
    batch = tools.collate([s])
    model(batch)
    batch.tokens[0, 2] += 1
    model(batch)
    assert torch.equal(seen[0], seen[1])
    batch.pixels[0, :, -1, -1] += 99
    model(batch)
    assert (seen[2] != seen[1]).any(-1).all(), "images see all of their images"


def test_two_images_are_seen_in_order(tools):
    model = tools.build(tools.recipe("opt")).double()
    s = tools.sample(8, 2, 2, 3)
    batch = tools.collate([s])
    forward = model(batch)["loss_sum"]
    batch.pixels = batch.pixels.flip(0)
    assert abs(forward - model(batch)["loss_sum"]) > 1e-6


def test_frozen_tower_keeps_no_graph(tools):
    model = tools.build(tools.recipe("opt", freeze=("^vision",))).double()
    features = model.vision(tools.collate(tools.mixed).pixels)
    assert not features.requires_grad
    gradients = tools.gradients(model, tools.collate([tools.sample(5, 0, 3, 2)]))
    assert "connector.linear.weight" in gradients and not any(n.startswith("vision") for n in gradients)


def test_too_long_rows_are_refused(tools):
    model = tools.build(tools.recipe("opt"))
    with pytest.raises(ValueError, match="75 tokens .* max_position_embeddings 64"):
        model(tools.collate([tools.sample(1, 1, 60, 10)]))


def test_save_and_load(tools, kind, tmp_path):
    model = tools.build(tools.recipe(kind)).eval()
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    batch = tools.collate(tools.mixed, kind)
    assert torch.equal(model(batch)["loss_sum"], loaded(batch)["loss_sum"])
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (kind != "llama")
    assert loaded.vision.mean == list(OPENAI_CLIP_MEAN)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_few_steps_learn_the_batch(tools, kind, recompute):
    model = tools.build(tools.recipe(kind, gradient_checkpointing=recompute)).train()
    batch = tools.collate(tools.mixed, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(batch)["loss_sum"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_routing_losses_that_recomputation_would_cut_off_are_refused(tools):
    """The first forward of a reentrant checkpoint knows no gradients, and it is the first that tells of the routing."""
    losses = {"image": MoeLosses(), "text": MoeLosses(z=0.1)}
    model = tools.build(tools.recipe(moe=MoeConfig(("vision", "decoder"), "every 1", experts=2, **losses))).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="losses of decoder0, decoder1, vision.* no gradient.*'use_reentrant': False"):
        model(tools.collate(tools.mixed))
    with torch.no_grad():
        model(tools.collate(tools.mixed))
    model.experts = replace(model.experts, text=MoeLosses())
    model(tools.collate(tools.mixed))["loss_sum"].backward()
