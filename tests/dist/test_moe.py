"""Experts keep the promise: ranks, ZeRO stage, micro-batch and who computes which expert change nothing."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from dsvlm.config import load_recipe
from dsvlm.export import GitVlm, export_run
from dsvlm.train.build import make_tokenizer, plan_run
from dsvlm.train.checkpoint import read_tensors
from dsvlm.train.engine import ds_configs
from dsvlm.train.lengths import beside_shards, make_lengths
from tests.dist.recipes import tiny
from tests.dist.test_gradient import assert_equal

LOSSES = {"importance": 0.3, "load": 0.2, "z": 0.01, "local_entropy": 0.05, "global_entropy": 0.4, "tau": 1.0}
MOE = {
    "where": ["vision", "connector", "decoder"], "layers": "every 1", "experts": 4, "k": 2, "capacity_factor": 0.5,
    "noise": 1.0, "image": LOSSES, "text": LOSSES,
}  # fmt: skip
TASKS = ("lines", "question", "locate", "match")
PACKED = {"train__micro_tokens": 96, "train__buckets": 3} | {f"tasks__{task}__pack": True for task in TASKS}
CLOCK = ("seconds", "tokens_per_s", "data_wait", "useful_tokens", "task_useful_tokens")


def with_experts(root, zero=0, micro_batch=3, moe=(), **changes):
    changes = {"train__zero": zero, "train__micro_batch": micro_batch} | changes
    return tiny(root, model__moe=MOE | dict(moe), **changes)


@pytest.fixture(scope="module")
def single(pools, data_root):
    """The gradient of one window on one rank without ZeRO: what all others must equal."""
    known = {}

    def reference(**moe):
        key = repr(sorted(moe.items()))
        if key not in known:
            known[key] = pools(1).run("gradient", recipe=with_experts(data_root, moe=moe))[0]
        return known[key]

    return reference


@pytest.fixture(scope="module")
def lengths(data_root):
    """What packed rows are planned from, next to the shards."""
    planned = plan_run(tiny(data_root, **PACKED))
    made = make_lengths(planned, make_tokenizer(planned), beside_shards(planned))
    yield
    for path in made.values():
        path.unlink()


@pytest.mark.parametrize("world_size, zero, micro_batch, changes", [
    (2, 1, 64, {}), (2, 2, 1, {"schedule__rounds": "packed"}), (2, 3, 3, PACKED),
    (2, 3, 2, {"model__gradient_checkpointing": True}),
])  # fmt: skip
def test_gradient(pools, data_root, single, lengths, world_size, zero, micro_batch, changes):
    recipe = with_experts(data_root, zero, micro_batch, **changes)
    for rank in pools(world_size).run("gradient", recipe=recipe):
        assert_equal(rank, single(), 1e-12)


def test_losses_and_noise_have_a_part_in_the_gradient(single):
    """What the test above compares."""
    nothing = {"image": {"importance": 0.0}, "text": {"importance": 0.0}}
    for other in (single(**nothing), single(noise=2.0), single(capacity_factor=2.0)):
        assert all(np.abs(other[n] - single()[n]).max() > 1e-6 for n in other if "vision" in n and "router" in n)


SHARED = {"where": ["vision", "connector"]}


@pytest.mark.parametrize("world_size, zero, micro_batch", [(2, 0, 3), (2, 2, 1), (2, 1, 64)])
def test_shared_experts(pools, data_root, single, world_size, zero, micro_batch):
    """Expert parallelism: rows travel to the rank that holds their expert, and the gradient is the same."""
    recipe = with_experts(data_root, zero, micro_batch, SHARED, train__expert_parallel=True)
    for rank in pools(world_size).run("gradient", recipe=recipe):
        assert_equal(rank, single(**SHARED), 1e-12)


def test_experts_that_cannot_be_dealt(pools, data_root):
    recipe = with_experts(data_root, 0, 3, SHARED | {"experts": 5}, train__expert_parallel=True)
    with pytest.raises(AssertionError, match="5 experts .* cannot be dealt to 2 ranks"):
        pools(2).run("gradient", recipe=recipe)


STEPPING = {"optim__clip": 0.5, "optim__weight_decay": 0.1}
PARTS = {
    "all": {}, "none": {"model__freeze": ["experts"]}, "recomputed": {"model__gradient_checkpointing": True},
    "nothing else": {"model__freeze": ["."], "model__train": ["experts"], "optim__clip": 0.05},
    "beside LoRA": {"model__lora": {"targets": ["q_proj"], "r": 2}},
}  # fmt: skip


@pytest.fixture(scope="module")
def unshared(pools, data_root):
    """Updates on one rank that holds all experts, by which of them train."""
    known = {}

    def reference(part):
        recipe = with_experts(data_root, 0, 3, SHARED, **STEPPING | PARTS[part])
        if part not in known:
            known[part] = pools(1).run("updates", recipe=recipe, steps=3)[0]
        return known[part]

    return reference


@pytest.mark.parametrize("zero, part", [
    (0, "all"), (1, "all"), (2, "all"), (1, "none"), (0, "nothing else"), (2, "nothing else"), (2, "recomputed"),
    (1, "beside LoRA"),
])  # fmt: skip
def test_shared_experts_take_the_same_steps(pools, data_root, unshared, zero, part):
    """Each rank keeps half of the experts, their masters and moments; all know the norm of all gradients and clip."""
    recipe = with_experts(data_root, zero, 3, SHARED, train__expert_parallel=True, **STEPPING | PARTS[part])
    wanted, ranks = unshared(part), pools(2).run("updates", recipe=recipe, steps=3)
    assert min(wanted["norms"]) > recipe.optim.clip > 0
    assert any(".experts." in name for name in wanted["weights"]) == (part != "none")
    for rank in ranks:
        assert worst(rank["weights"], wanted["weights"]) < 2e-5
        assert rank["kept"] == {what: count / 2 for what, count in wanted["kept"].items()}
        assert rank["norms"] == ranks[0]["norms"]
        np.testing.assert_allclose(rank["norms"], wanted["norms"], rtol=1e-5)


@pytest.mark.parametrize("zero", [1, 2])
def test_shared_experts_larger_than_a_bucket(pools, data_root, unshared, zero, tmp_path):
    """Of a real model they often are: DeepSpeed then reduces each parameter by itself."""
    config = json.loads((ds_configs() / f"zero{zero}.json").read_text())
    config["zero_optimization"]["reduce_bucket_size"] = 50
    (tmp_path / "small.json").write_text(json.dumps(config))
    own = {"train__ds_config": str(tmp_path / "small.json"), "train__expert_parallel": True}
    for rank in pools(2).run("updates", recipe=with_experts(data_root, zero, 3, SHARED, **STEPPING, **own), steps=3):
        assert worst(rank["weights"], unshared("all")["weights"]) < 2e-5
        np.testing.assert_allclose(rank["norms"], unshared("all")["norms"], rtol=1e-5)


@pytest.mark.parametrize("zero", [1, 2])
def test_shared_experts_in_bf16(pools, data_root, zero):
    """Other optimizers of DeepSpeed: gradients are rounded on the way, masters and moments are fp32."""
    recipe = with_experts(data_root, zero, 3, SHARED, train__dtype="bf16", **STEPPING)
    (wanted, _), both = (pools(2).run("updates", recipe=each, steps=3) for each in (recipe, shared(recipe)))
    moved = worst(pools(2).run("updates", recipe=recipe, steps=1)[0]["weights"], wanted["weights"])
    for rank in both:
        assert worst(rank["weights"], wanted["weights"]) < 0.05 * moved
        np.testing.assert_allclose(rank["norms"], wanted["norms"], rtol=3e-3)
        assert rank["kept"]["master"] == rank["kept"]["parameters"] == wanted["kept"]["parameters"] / 2


def shared(recipe):
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, expert_parallel=True))


@pytest.mark.parametrize("ranks, zero, shared, then_ranks, then_zero, then_shared", [
    (2, 0, True, 2, 0, True), (2, 2, True, 2, 3, False), (1, 0, False, 2, 1, True), (2, 1, True, 1, 0, True),
])  # fmt: skip
def test_checkpoints_hold_all_experts(
    pools, data_root, ranks, zero, shared, then_ranks, then_zero, then_shared, tmp_path
):
    """So that a run may go on with its experts shared or not."""
    steps = {"steps": 2, "then": 2}
    recipe = with_experts(data_root, zero, 3, SHARED, train__expert_parallel=shared, **STEPPING)
    other = with_experts(data_root, then_zero, 3, SHARED, train__expert_parallel=then_shared, **STEPPING)
    path, losses, averages = pools(ranks).run("go_straight", recipe=recipe, directory=str(tmp_path), **steps)[0]
    weights = dict(read_tensors(Path(path), "weights"))
    inner = weights["vision.tower.encoder.layers.0.mlp.experts.inner"]
    assert len(inner) == 4 and len(inner.flatten(1).unique(dim=0)) == 4, "experts that are alike would hide a mix-up"
    for losses_again, averages_again in pools(then_ranks).run("go_on", recipe=other, path=path, **steps):
        np.testing.assert_allclose(losses_again, losses, rtol=1e-5)
        assert worst(averages_again, averages) <= (0 if recipe == other else 1e-5)


def worst(found: dict, wanted: dict) -> float:
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted)


ONE_CHOICE, ALONE = {"capacity_factor": 0.3, "k": 1}, {"schedule__rounds": "packed"}


def test_a_rank_that_routes_nothing_to_an_expert(pools, data_root):
    """Rounds of a rank with an image and one without, and of two that choose other experts; every stage trains."""
    first, second = pools(2).run("loads", recipe=with_experts(data_root, 0, 1, ONE_CHOICE, **ALONE))
    assert any(ours.any() != theirs.any() for ours, theirs in zip(first, second, strict=True))
    assert any(((ours > 0) & (theirs == 0)).any() for ours, theirs in zip(first, second, strict=True) if theirs.any())
    alone = pools(1).run("weights_after", recipe=with_experts(data_root, 0, 1, ONE_CHOICE, **ALONE), steps=3)[0]
    for zero in (1, 2, 3):
        found = pools(2).run("weights_after", recipe=with_experts(data_root, zero, 1, ONE_CHOICE, **ALONE), steps=3)
        for rank in found:
            assert worst(rank, alone) < 2e-5, f"ZeRO-{zero}"


def rows(recipe) -> list[dict]:
    lines = (recipe.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


@pytest.fixture(scope="module")
def short(data_root, tmp_path_factory):
    """`short(name, zero)`: the shipped recipe on few scenes, in a directory of that name."""
    root = tmp_path_factory.mktemp("git-moe-tiny")

    def named(name, zero=3, **changes):
        return load_recipe("git-moe-tiny", [
            f"data.root={data_root}", f"output={root / name}", f"train.zero={zero}", "schedule.steps=6",
            "optim.warmup=1", "train.log_every=1", "train.micro_batch=4", "model.vision.config.hidden_size=16",
            "model.vision.config.intermediate_size=16", "model.vision.config.num_attention_heads=2",
            "model.decoder.config={hidden_size: 16, word_embed_proj_dim: 16, ffn_dim: 16, num_hidden_layers: 1, "
            "num_attention_heads: 2, max_position_embeddings: 96}",
            "tasks={question: {type: vqa, shards: train/question, samples: 8}, "
            "locate: {type: locate, shards: train/locate, samples: 5}}",
            *(f"{path}={value}" for path, value in changes.items()),
        ])  # fmt: skip

    return named


@pytest.fixture(scope="module")
def straight(pools, short):
    assert pools(2).run("train_until", recipe=short("straight"), stop=6) == [0, 0]
    return rows(short("straight"))


def test_the_recipe_tells_of_its_routing(straight):
    for row in straight:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
        assert 0.5 < row["moe_success"]["vision0.image"] <= 1
        load = row["moe_load"]["vision0.image"]
        assert len(load) == 4 and abs(sum(load) - 1) < 1e-4
        assert 1 <= row["moe_busiest"]["vision0.image"] <= 4
        assert 0 < row["moe_entropy"]["vision0.image"] <= math.log(4) + 1e-6
        assert row["moe_loss"]["vision0.image.load"] > 0
        assert row["moe_bad_tokens"] == {"vision0.image": 0}


@pytest.mark.parametrize("zero, ranks, micro_batch, shared", [
    (1, 2, 4, False), (2, 2, 4, True), (3, 2, 4, False), (0, 1, 5, False),
])  # fmt: skip
def test_interrupted_and_gone_on_with(pools, short, straight, zero, ranks, micro_batch, shared):
    """Bit for bit with the same settings; with others up to rounding, which no token's choice of experts hangs on."""
    recipe = short(f"zero{zero}", zero, **{"train.micro_batch": micro_batch, "train.expert_parallel": shared})
    assert pools(ranks).run("train_until", recipe=recipe, stop=3) == [0] * ranks
    assert pools(ranks).run("train_until", recipe=recipe, stop=6) == [3] * ranks
    if zero == 3:
        assert rows(recipe) == straight
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in rows(recipe)], [r[name] for r in straight], rtol=1e-3)
    for row, wanted in zip(rows(recipe), straight, strict=True):
        assert row["fingerprint"] == wanted["fingerprint"]
        np.testing.assert_allclose(list(row["moe_loss"].values()), list(wanted["moe_loss"].values()), rtol=1e-3)


def test_an_exported_run_holds_its_experts(straight, short, tmp_path):
    model = GitVlm.from_pretrained(export_run(short("straight").run_dir, tmp_path / "out"))
    assert model.vision.tower.encoder.layers[0].mlp.experts.inner.shape == (4, 16, 16)


def test_units_that_compete_are_part_of_the_run(pools, short):
    """Identity: micro-batch and ranks; other runs may change both."""
    unit = {"model.moe.group": "unit"}
    recipe = short("unit", **unit)
    assert pools(2).run("train_until", recipe=recipe, stop=1) == [0, 0]
    with pytest.raises(AssertionError, match="began on 2 ranks, now 1"):
        pools(1).run("train_until", recipe=recipe, stop=2)
    with pytest.raises(AssertionError, match="train.micro_batch: was 4, now 5"):
        pools(2).run("train_until", recipe=short("unit", **unit, **{"train.micro_batch": 5}), stop=2)
    assert short("a").identity() == short("a", **{"train.micro_batch": 5}).identity()
