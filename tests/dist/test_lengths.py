"""Cutting windows by length biases nothing: each update has the gradient of the plain cut, bucketed and packed.

With equal gradients, losses are equal too, update for update: their spread is the plain order's.
"""

import pytest

from dsvlm.train.build import make_tokenizer, plan_run
from dsvlm.train.lengths import beside_shards, make_lengths
from tests.dist.recipes import STRATEGIES, tiny
from tests.dist.test_gradient import assert_equal

ALL_PACKED = {f"tasks__{name}__pack": True for name in ("lines", "question", "locate", "match")}
BUCKETS = {"train__micro_tokens": 96, "train__buckets": 3}
CUTS = {
    "one bucket": BUCKETS | {"train__buckets": 1},
    "buckets": BUCKETS,
    "packed": BUCKETS | ALL_PACKED,
    "packed in one row each": {"train__micro_tokens": 4096} | ALL_PACKED,
    "text alone packed": BUCKETS | {"tasks__lines__pack": True},
}


@pytest.fixture(scope="module")
def root(data_root):
    """The data, with lengths next to the shards."""
    planned = plan_run(tiny(data_root, **BUCKETS))
    made = make_lengths(planned, make_tokenizer(planned), beside_shards(planned))
    yield data_root
    for path in made.values():
        path.unlink()


@pytest.fixture(scope="module")
def plain(pools, root):
    """The gradient of one window on one rank without ZeRO, cut by samples."""
    known = {}

    def reference(**changes):
        key = repr(sorted(changes.items()))
        if key not in known:
            known[key] = pools(1).run("gradient", recipe=tiny(root, **changes), step=1)[0]
        return known[key]

    return reference


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cut", ["buckets", "packed"])
def test_strategies(pools, root, plain, strategy, cut):
    changes = STRATEGIES[strategy]
    found = pools(2).run("gradient", recipe=tiny(root, train__zero=3, **CUTS[cut], **changes), step=1)
    for rank in found:
        assert_equal(rank, plain(**changes), 1e-12)


@pytest.mark.parametrize("world_size, zero, cut", [
    (1, 3, "buckets"), (3, 3, "buckets"), (3, 0, "one bucket"),
    (1, 0, "packed"), (3, 2, "packed"), (3, 3, "packed in one row each"), (2, 3, "text alone packed"),
])  # fmt: skip
def test_world_size_and_stage(pools, root, plain, world_size, zero, cut):
    found = pools(world_size).run("gradient", recipe=tiny(root, train__zero=zero, **CUTS[cut]), step=1)
    for rank in found:
        assert_equal(rank, plain(), 1e-12)


@pytest.mark.parametrize("cut", ["buckets", "packed"])
def test_packed_rounds_with_dropout(pools, root, plain, cut):
    """Units of several tasks; dropout is keyed by sample, wherever in a row it lies."""
    changes = {"schedule__rounds": "packed", "model__decoder__config__dropout": 0.1}
    found = pools(2).run("gradient", recipe=tiny(root, train__zero=3, **CUTS[cut], **changes), step=1)
    assert_equal(found[0], plain(model__decoder__config__dropout=0.1), 1e-12)


DROPOUT = {"model__decoder__config__dropout": 0.1, "model__decoder__config__attention_dropout": 0.1}
LORA = {"model__lora": {"targets": ["self_attn.(q|v)_proj", "fc1"], "r": 2, "alpha": 4, "dropout": 0.1}}


@pytest.mark.parametrize("changes, tolerance", [
    (DROPOUT | {"model__gradient_checkpointing": True}, 1e-12),
    (DROPOUT | LORA | {"model__freeze": ["^vision"]}, 1e-12),
    ({"decoder": "llama"}, 1e-7),  # its norms compute in fp32 whatever the model's dtype
], ids=["recomputed", "lora", "llama"])  # fmt: skip
def test_models_in_packed_rows(pools, root, plain, changes, tolerance):
    found = pools(2).run("gradient", recipe=tiny(root, train__zero=3, **CUTS["packed"], **changes), step=1)
    for rank in found:
        assert_equal(rank, plain(**changes), tolerance)


def test_packed_updates_give_the_same_weights(pools, root):
    """By the engine's own reduced gradients, text alone first in the window: nothing stale, nothing hangs."""
    plain, packed = (tiny(root, train__zero=zero, **cut) for zero, cut in ((0, {}), (3, CUTS["packed"])))
    wanted = pools(1).run("weights_after", recipe=plain, steps=3)[0]
    for rank in pools(2).run("weights_after", recipe=packed, steps=3):
        assert max(float(abs(rank[name] - wanted[name]).max()) for name in wanted) < 2e-5
