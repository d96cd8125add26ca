"""A conversation teaches what its turns teach one by one, each behind all that was said before it."""

import numpy as np
import pytest
import torch

from dsvlm.data.collate import Row, collate
from dsvlm.data.encode import Encoded

IDS = [1, 5, 6, 7, 8, 2, 9, 10, 11, 2, 12, 2]  # bos, question (2), answer (2), eos, question (2), answer, eos, eos
TURNS = [(3, 6), (8, 10), (11, 12)]  # of IDS, the answers with their ends


def batch(*texts: Encoded):
    image = np.random.default_rng(3).integers(0, 256, (3, 8, 8), np.uint8)
    return collate([Row(text, image, 1.0, 7, 0) for text in texts], image_size=8, pad_id=0)


@pytest.mark.parametrize("kind", ["opt", "llama", "mpt"])
def test_every_answer_is_learnt_as_if_it_were_the_last(tools, kind):
    model = tools.build(tools.recipe(kind), heads={}).double()
    silent = tuple((end, first) for (_, end), (first, _) in zip(TURNS, TURNS[1:], strict=False))
    talk = Encoded(IDS, TURNS[0][0], None, None, 1, silent)
    alone = [Encoded(IDS[:end], first, None, None, 1) for first, end in TURNS]
    assert talk.count == sum(text.count for text in alone) == 6
    together = model(batch(talk))["loss_sum"]
    one_by_one = sum(model(batch(text))["loss_sum"] for text in alone)
    assert torch.allclose(together, one_by_one, rtol=1e-5)
    ours, theirs = tools.gradients(model, batch(talk)), tools.gradients(model, *(batch(text) for text in alone))
    tools.assert_equal(ours, theirs, 1e-5 if kind == "llama" else 1e-9)
