"""Layers of experts: what they compute, for whom, and what stays the same whatever shares a unit with a sample."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from dsvlm.config import MoeConfig, MoeLosses, OptimConfig, VisionConfig
from dsvlm.config_checks import picked
from dsvlm.model import moe
from dsvlm.model.moe_experts import Grouped
from dsvlm.model.moe_losses import SUMS
from dsvlm.model.moe_place import moe_layers
from dsvlm.train.optim import parameter_groups
from dsvlm.train.routing import routing_row

LOSSES = MoeLosses(importance=0.3, load=0.2, z=0.01, local_entropy=0.05, global_entropy=0.4, tau=1.0)
EVERYWHERE = MoeConfig(
    ("vision", "connector", "decoder"), "every 1", experts=4, k=2, capacity_factor=0.5, noise=1.0, image=LOSSES,
    text=LOSSES,
)  # fmt: skip


@pytest.fixture(params=["opt", "llama"])
def kind(request):
    return request.param


def config(**changes) -> MoeConfig:
    return dataclasses.replace(EVERYWHERE, **changes)


def different(model):
    """Experts that are no longer copies of each other."""
    generator = torch.Generator().manual_seed(3)
    for layer in moe_layers(model):
        for parameter in layer.experts.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def model_of(tools, kind="opt", moe=EVERYWHERE, **settings):
    return different(tools.build(tools.recipe(kind, moe=moe, **settings)).double())


def gradients(model, *batches, seed=0):
    """Of losses and routing losses, summed over micro-steps."""
    model.zero_grad()
    for batch in batches:
        torch.manual_seed(seed)
        with model.keyed_dropout(batch):
            out = model(batch)
            (out["loss_sum"] + (out["aux"] * torch.tensor([0.3, 0.7])).sum()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_which_blocks():
    assert picked("every 2", 12, "vision") == [1, 3, 5, 7, 9, 11]
    assert picked("last 2", 12, "vision") == [9, 11] and picked("last 2", 7, "vision") == [3, 5]
    assert picked("every 1", 1, "vision") == [0]
    with pytest.raises(ValueError, match="'last 1' picks none of the 1 blocks that model.vision has"):
        picked("last 1", 1, "vision")


def test_upcycled_experts_compute_what_the_dense_model_does(tools, kind):
    """Two copies of a network, whose weights add up to 1."""
    batch = tools.collate(tools.mixed)
    wanted = tools.build(tools.recipe(kind)).eval()(batch)["loss_sum"]
    same = config(capacity_factor=0.0, renormalize=True)
    model = tools.build(tools.recipe(kind, moe=same)).eval()
    for name, parameter in tools.build(tools.recipe(kind)).named_parameters():
        if name in dict(model.named_parameters()):
            dict(model.named_parameters())[name].data.copy_(parameter)
    dense = tools.build(tools.recipe(kind))
    assert moe_layers(model)[0].experts.inner[2].equal(dense.vision.tower.encoder.layers[0].mlp.fc1.weight.T)
    torch.testing.assert_close(model(batch)["loss_sum"], wanted, rtol=1e-5, atol=0)
    assert abs(different(model)(batch)["loss_sum"] - wanted) > 1e-3


def test_upcycling_a_checkpoint(tools, tmp_path):
    torch.manual_seed(11)
    CLIPVisionModel(CLIPVisionConfig(**tools.recipe().vision.config)).save_pretrained(tmp_path)
    recipe = dataclasses.replace(
        tools.recipe(moe=config(where=("vision",), layers="last 1")), vision=VisionConfig(pretrained=str(tmp_path))
    )
    layers = tools.build(recipe).vision.tower.encoder.layers
    source = CLIPVisionModel.from_pretrained(tmp_path).encoder.layers[1].mlp
    for expert in range(4):
        assert layers[1].mlp.experts.outer[expert].equal(source.fc2.weight.T)
        assert layers[1].mlp.experts.inner_bias[expert].equal(source.fc1.bias)
    assert not isinstance(layers[0].mlp, moe.MoeLayer)


def by_hand(layer, tokens):
    """One image [P, D] through a layer: V-MoE's Batch Priority Routing, choice by choice."""
    gates = (tokens @ layer.router.weight.T).softmax(dim=1)
    room = dict.fromkeys(range(4), moe.expert_capacity(len(tokens), 4, 2, layer.config.capacity_factor))
    out, dropped = torch.zeros_like(tokens), 0
    best, chosen = gates.topk(2)
    for choice in range(2):
        for token in best[:, 0].argsort(descending=True).tolist():
            expert = int(chosen[token, choice])
            if room[expert] == 0:
                dropped += 1
                continue
            room[expert] -= 1
            e = layer.experts
            hidden = e.act(tokens[token] @ e.inner[expert] + e.inner_bias[expert])
            out[token] += best[token, choice] * (hidden @ e.outer[expert] + e.outer_bias[expert])
    return out, dropped


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_against_plain_loops(tools, dtype):
    model = model_of(tools, moe=config(capacity_factor=0.6), vision={"image_size": 16}).to(dtype).eval()
    layer = moe_layers(model)[0]
    images = torch.randn(3, 17, 16, dtype=dtype)
    group = torch.arange(3)[:, None].expand(-1, 17)
    groups = moe.Groups(group, 3, 3, 17, group >= 0, torch.full((3,), 17), torch.ones(3, dtype=torch.long), group[:, 0])
    layer.context = type("Known", (), {"images": groups, "tell": lambda *told: None})()
    found = layer(images)
    dropped = 0
    for image, ours in zip(images, found, strict=True):
        wanted, lost = by_hand(layer, image)
        dropped += lost
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5 if dtype == torch.float32 else 1e-12)
    assert dropped > 5
    layer.context.images = one(groups)
    torch.testing.assert_close(layer(images[:1]), found[:1])


def one(groups):
    """The first group alone."""
    return dataclasses.replace(
        groups, group=groups.group[:1], size=1, images=1, valid=groups.valid[:1], tokens=groups.tokens[:1],
        share=groups.share[:1],
    )  # fmt: skip


class Batched(Grouped):
    """What serves where torch has no grouped product."""

    def __call__(self, x, weight):
        return self.batched(x, weight)


def test_both_products_agree_and_nothing_gets_past_the_last_row():
    torch.manual_seed(0)
    offs, live = torch.tensor([8, 8, 24], dtype=torch.int32), torch.arange(32) % 8 < 6
    live[24:] = False
    results = []
    for way in ("grouped", "batched"):
        biases = [torch.randn(8), torch.randn(8), torch.randn(4)]
        experts = moe.Experts(3, [torch.randn(4, 8)] * 2, torch.randn(8, 4), biases, F.silu)
        generator = torch.Generator().manual_seed(1)
        for parameter in experts.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        rows = torch.randn(32, 4, generator=generator)
        rows[24:] = torch.nan
        rows.requires_grad_()
        product = Grouped(offs, 32, 16)
        if way == "batched":
            product = Batched(offs, 32, 16)
        out = experts.feed(rows, live, product)
        (out[live].square().sum()).backward()
        results.append([out[live], rows.grad[live], *(p.grad for p in experts.parameters())])
    for grouped, batched in zip(*results, strict=True):
        assert grouped.isfinite().all()
        torch.testing.assert_close(grouped, batched)
    assert results[0][2][1].abs().max() == 0  # no row came to the second expert


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_the_cut(tools, kind, checkpointing):
    """One unit, two, packed rows, more padding: capacity, noise and losses are those of each image and text."""
    model = model_of(tools, kind, gradient_checkpointing=checkpointing).train()
    samples = tools.mixed
    wanted = gradients(model, tools.collate(samples))
    assert all(grad.abs().max() > 0 for name, grad in wanted.items() if "router" in name)
    for batches in (
        [tools.collate(samples[:1], extra=3), tools.collate(samples[1:])],
        [tools.collate([s]) for s in samples],
        [tools.collate(samples, packed=[0, 0, 1, 1])],
        [tools.collate(samples[2:], packed=[0, 0], width=30), tools.collate(samples[:2])],
    ):
        tools.assert_equal(gradients(model, *batches), wanted, 1e-9)
    other = gradients(model, tools.collate(samples), seed=1)
    assert any(not torch.allclose(other[n], wanted[n], rtol=1e-3) for n in wanted), "noise does nothing"


def test_losses_and_figures(tools):
    """Of one image, from its router's logits, by V-MoE's, ST-MoE's and LIMoE's formulas."""
    losses = MoeLosses(importance=2.0, z=3.0, local_entropy=5.0, global_entropy=7.0, tau=1.3)
    model = model_of(tools, moe=config(where=("vision",), layers="last 1", noise=0.0, image=losses)).eval()
    seen = []
    moe_layers(model)[0].router.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    out = model(tools.collate(tools.mixed[:1]))
    p = seen[0].softmax(dim=1)
    mean = p.mean(dim=0)
    importance = p.sum(dim=0).var(correction=0) / p.sum(dim=0).mean() ** 2
    z = seen[0].logsumexp(dim=1).square().mean()
    local, spread = torch.special.entr(p).sum(dim=1).mean(), torch.special.entr(mean).sum()
    wanted = 2 * importance + 3 * z + 5 * local + 7 * (1.3 - spread).clamp(min=0)
    torch.testing.assert_close(out["aux"], torch.stack((wanted, wanted * 0)).double())
    row = routing_row(model.experts, ["v"], out["routing"].numpy())
    load = p.topk(2).indices.flatten().bincount(minlength=4)
    assert row["moe_load"]["v.image"] == pytest.approx((load / 10).tolist())
    assert row["moe_entropy"]["v.image"] == pytest.approx(spread.item())
    assert row["moe_token_entropy"] == {"v.image": pytest.approx(local.item())}
    assert row["moe_success"]["v.image"] == pytest.approx(load.clamp(max=4).sum().item() / 10)
    assert row["moe_busiest"]["v.image"] == pytest.approx(4 * max(row["moe_load"]["v.image"]))


def bad_in(model, batch) -> dict[str, int]:
    names = [layer.name for layer in moe_layers(model)]
    return routing_row(model.experts, names, model(batch)["routing"].numpy())["moe_bad_tokens"]


@pytest.mark.parametrize("packed", [None, [0, 0, 1, 1]])
def test_tokens_whose_logits_are_no_numbers_are_counted_where_they_are(tools, packed):
    """By layer and modality; those of samples that do not teach are not, and each layer warns once."""
    model = model_of(tools).train()
    batch = tools.collate(tools.mixed, packed=packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(bad_in(model, batch).values()) == {0}
    context = moe_layers(model)[0].context
    real = context.rows.valid & (context.rows.group >= context.rows.images)
    row, column = real.nonzero()[0].tolist()
    last = moe_layers(model)[-1]  # the decoder's: what is wrong there is wrong nowhere else

    def spoil(_, args, logits):
        logits = logits.view(*real.shape, -1).clone()
        logits[row, column : column + 2, 1] = torch.tensor([torch.nan, torch.inf])
        logits[~real.any(dim=1)] = torch.nan
        return logits.flatten(0, 1)

    handle = last.router.register_forward_hook(spoil)
    with pytest.warns(UserWarning, match=rf"router of {last.name}.text .* smaller optim.clip") as told:
        warnings.simplefilter("default")
        for _ in range(3):
            found = bad_in(model, batch)
    assert len(told) == 1
    assert {name: count for name, count in found.items() if count} == {f"{last.name}.text": 2}
    handle.remove()

    moe_layers(model)[0].router.register_forward_hook(lambda _, args, logits: logits * torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bad_in(model, batch)
        assert found[f"{moe_layers(model)[0].name}.image"] == 20  # 4 images of 5 tokens
        quiet = [dataclasses.replace(sample, weight=0.0) for sample in tools.mixed[:2]]
        quiet = tools.collate([*quiet, *tools.mixed[2:]], packed=packed)
        teaching = sum(weight > 0 for weight in quiet.weight[quiet.image_row].tolist())
        assert bad_in(model, quiet)[f"{moe_layers(model)[0].name}.image"] == 5 * teaching < 20


def test_losses_are_means_over_layers_and_weigh_as_configured(tools):
    out = model_of(tools).train()(tools.collate(tools.mixed))
    weights = torch.tensor([getattr(LOSSES, name, 0.0) for name in SUMS], dtype=torch.float64)
    sums = (out["routing"][:, :, : len(SUMS)] @ weights).sum(dim=0)
    torch.testing.assert_close(out["aux"], sums / torch.tensor([5, 2]))  # images: 2 + 1 + 2 layers; text: 2


@pytest.mark.parametrize("packed", [None, [0, 0, 1, 1]])
@pytest.mark.parametrize("group", ["sample", "unit"])
def test_every_token_is_in_its_group(tools, packed, group):
    model = model_of(tools, moe=config(group=group))
    model(tools.collate(tools.mixed, packed=packed))
    context = moe_layers(model)[0].context
    for groups in (context.images, context.rows):
        counts = groups.group[groups.valid].flatten().long().bincount(minlength=groups.size)
        assert counts.tolist() == groups.tokens.tolist()
    images = [5, 5, 5, 5]
    assert context.images.tokens.tolist() == (images if group == "sample" else [20])
    assert context.rows.tokens.tolist() == ([*images, 7, 5, 6, 2] if group == "sample" else [20, 20])


def test_biases_of_experts_do_not_decay(tools):
    model = tools.build(tools.recipe(moe=EVERYWHERE))
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    free = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {n for n in free if "experts" in n} == {n for n in names.values() if "experts" in n and n.endswith("bias")}


def test_samples_that_do_not_teach_have_no_part_in_the_losses(tools):
    model = model_of(tools).train()
    wanted = gradients(model, tools.collate(tools.mixed))
    filler = dataclasses.replace(tools.mixed[0], weight=0.0, key=5)
    found = gradients(model, tools.collate(tools.mixed), tools.collate([filler, filler]))
    tools.assert_equal(found, wanted, 1e-12)


def test_a_unit_as_the_group_leaves_fillers_out(tools):
    model = model_of(tools, moe=config(group="unit")).train()
    samples = tools.mixed
    wanted = gradients(model, tools.collate(samples))
    apart = gradients(model, tools.collate(samples[:1]), tools.collate(samples[1:]))
    assert any(not torch.allclose(apart[n], wanted[n], rtol=1e-3) for n in wanted), "samples do not compete"
    unlimited = model_of(tools, moe=config(group="unit", capacity_factor=0.0)).train()
    filler = dataclasses.replace(samples[0], weight=0.0)
    wanted, found = (gradients(unlimited, tools.collate(part)) for part in (samples, [*samples, filler]))
    tools.assert_equal(found, wanted, 1e-12)


def test_text_never_knows_the_future(tools, kind):
    model = model_of(tools, kind, moe=config(capacity_factor=0.25)).eval()
    sample = tools.mixed[0]
    changed = dataclasses.replace(sample, tokens=sample.tokens.clone())
    changed.tokens[-1] = (changed.tokens[-1] + 5) % tools.vocab
    with torch.no_grad():
        ours, theirs = (model.logits(tools.collate([s]))[0] for s in (sample, changed))
    torch.testing.assert_close(ours[:-1], theirs[:-1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours[-1], theirs[-1])


def test_cached_decoding_says_what_the_whole_row_does(tools, kind):
    model = model_of(tools, kind).eval()
    sample = tools.sample(9, 1, 4, 1)
    batch = tools.collate([sample])
    said = model.generate(batch.pixels, batch.image_row, batch.tokens, batch.lengths, 6, -1)[0]
    tokens = sample.tokens
    for token in said:
        with torch.no_grad():
            row = tools.collate([dataclasses.replace(sample, tokens=tokens)])
            assert model.logits(row)[0, len(tokens) - 1].argmax() == token
        tokens = torch.cat((tokens, token[None]))


@pytest.mark.parametrize("packed", [None, [0, 0, 1, 1], [0, 0, 0, 0]])
def test_many_groups_are_routed_in_parts(tools, monkeypatch, packed):
    """With the same result; experts run once, as on a rank with fewer: under ZeRO-3 each time gathers their weights."""
    model, runs = model_of(tools).train(), []
    wanted = gradients(model, tools.collate(tools.mixed, packed=packed))
    told = model(tools.collate(tools.mixed, packed=packed))
    for layer in moe_layers(model):
        layer.experts.register_forward_hook(lambda *_: runs.append(1))
    assert moe.most_groups(8) == 256 and moe.most_groups(64) == 42  # more do not fit a block of a GPU
    for most in (2, 3, 5):
        monkeypatch.setattr(moe, "MOST_GROUPS", most)
        runs.clear()
        tools.assert_equal(gradients(model, tools.collate(tools.mixed, packed=packed)), wanted, 1e-12)
        assert len(runs) == len(moe_layers(model))
        torch.manual_seed(0)
        again = model(tools.collate(tools.mixed, packed=packed))
        assert len(moe_layers(model)[0].context.rows.split(most)) == -(-8 // most)
        torch.testing.assert_close(again["routing"][..., :2], told["routing"][..., :2])


def test_where_nobody_asks_about_routing_nothing_of_it_is_kept(tools):
    """Each step of decoding would add to it, and a graph that is kept cannot be copied with the model."""
    model = model_of(tools)
    batch = tools.collate([tools.sample(9, 1, 4, 1)])
    for use in (
        lambda: model.logits(batch),
        lambda: model.generate(batch.pixels, batch.image_row, batch.tokens, batch.lengths, 3, -1),
        lambda: model(batch),
    ):
        use()
        assert moe_layers(model)[0].context.told is None
        copy.deepcopy(model)


def test_a_unit_without_images_uses_every_expert(tools):
    model = model_of(tools).train()
    found = gradients(model, tools.collate([tools.mixed[1]]))
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad.abs().max() == 0 for name, grad in found.items() if name.startswith("vision"))


def test_bf16_routes_in_fp32(tools):
    model = tools.build(tools.recipe(moe=EVERYWHERE)).to(torch.bfloat16).train()
    with torch.autocast("cpu"):
        assert moe_layers(model)[0].router(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.float32
    found = gradients(model, tools.collate(tools.mixed))
    assert all(torch.isfinite(grad).all() for grad in found.values())


def test_saving_and_loading_keeps_the_experts(tools, kind, tmp_path):
    model = model_of(tools, kind).float().eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    batch = tools.collate(tools.mixed)
    assert torch.equal(loaded(batch)["loss_sum"], model(batch)["loss_sum"])


def test_freezing_and_lora(tools):
    lora = tools.lora(targets=("q_proj",), r=2, alpha=4)
    patterns = {"freeze": (r"^vision.*experts",), "train": (r"decoder.*router",)}
    model = tools.build(tools.recipe(moe=EVERYWHERE, lora=lora, **patterns))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("experts" in n and n.startswith(("vision", "decoder")) for n in names)
    assert {n.split(".")[0] for n in names if "router" in n} == {"vision", "connector", "decoder"}
    assert gradients(model.train(), tools.collate(tools.mixed)).keys() == names
