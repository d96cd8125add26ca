"""Conversations of one to three turns, beside the other tasks: ranks, stages and cuts change nothing about them."""

import pytest

from dsvlm.train.build import make_tokenizer, plan_run
from dsvlm.train.lengths import beside_shards, make_lengths
from tests.dist.recipes import tiny
from tests.dist.test_gradient import assert_equal

TALKS = {"tasks__talks": {"type": "conversation", "shards": "train/talks", "samples": 5, "prompt": "user {text} model"}}
NAMES = ("lines", "question", "locate", "match", "talks")
PACKED = {"train__micro_tokens": 160} | {f"tasks__{name}__pack": True for name in NAMES}


@pytest.fixture(scope="module")
def root(data_root):
    """The data, with lengths next to the shards."""
    planned = plan_run(tiny(data_root, **TALKS, train__micro_tokens=160))
    made = make_lengths(planned, make_tokenizer(planned), beside_shards(planned))
    yield data_root
    for path in made.values():
        path.unlink()


@pytest.fixture(scope="module")
def single(pools, root):
    """The gradient of one window on one rank without ZeRO."""
    return pools(1).run("gradient", recipe=tiny(root, **TALKS))[0]


@pytest.mark.parametrize("world_size, zero, cut", [(2, 3, {"train__micro_batch": 2}), (2, 3, PACKED)])
def test_conversations_on_more_ranks(pools, root, single, world_size, zero, cut):
    for rank in pools(world_size).run("gradient", recipe=tiny(root, train__zero=zero, **TALKS | cut)):
        assert_equal(rank, single, 1e-12)
