"""Experts keep the promise: number of ranks, ZeRO stage, micro-batch and shared work change nothing about a gradient."""

import numpy as np
import pytest
from tests.dist.recipes import tiny
from tests.dist.test_gradient import assert_equal

LOSSES = {"importance": 0.3, "load": 0.2, "z": 0.01, "local_entropy": 0.05, "global_entropy": 0.4, "tau": 1.0}
MOE = {
    "where": ["vision", "connector", "decoder"], "layers": "every 1", "experts": 4, "k": 2, "capacity_factor": 0.5,
    "noise": 1.0, "image": LOSSES, "text": LOSSES,
}  # fmt: skip


def changes(train=(), **moe) -> dict:
    return {"model__moe": MOE | moe, **{f"train__{name}": value for name, value in dict(train).items()}}


@pytest.fixture(scope="module")
def single(pools, data_root):
    """The gradient of one window on one rank without ZeRO: what all others must equal."""
    known = {}

    def reference(**more):
        key = repr(sorted(more.items()))
        if key not in known:
            known[key] = pools(1).run("gradient", recipe=tiny(data_root, **changes(), **more))[0]
        return known[key]

    return reference


@pytest.mark.parametrize("world_size, zero, micro_batch", [(1, 3, 2), (2, 0, 1), (2, 1, 64), (2, 2, 3), (2, 3, 3), (3, 3, 2), (3, 1, 3)])
def test_gradient(pools, data_root, single, world_size, zero, micro_batch):
    recipe = tiny(data_root, **changes({"zero": zero, "micro_batch": micro_batch}))
    for rank in pools(world_size).run("gradient", recipe=recipe):
        assert_equal(rank, single(), 1e-12)
