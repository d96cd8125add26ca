"""The compiled attention under ZeRO-2 and ZeRO-3: the loss and gradient of a window are those of a dense mask."""

import numpy as np
import pytest

from dsvlm.ops.git_kernel import has_kernel
from tests.dist.recipes import tiny

pytestmark = pytest.mark.skipif(not has_kernel("cpu"), reason="the compiled ops were not built")


@pytest.mark.parametrize("zero, changes", [(2, {}), (3, {"model__gradient_checkpointing": True})])
def test_kernel_equals_dense_mask(pools, data_root, zero, changes):
    recipe = tiny(data_root, train__zero=zero, **changes)
    kernel, dense = (pools(2).run("by_backend", recipe=recipe, backend=backend) for backend in ("kernel", "sdpa"))
    for (calls, losses, gradient), (dense_calls, wanted, expected) in zip(kernel, dense, strict=True):
        assert calls == dense_calls > 0
        np.testing.assert_allclose(losses, wanted, rtol=1e-12)
        scale = max(np.abs(value).max() for value in expected.values())
        for name, value in expected.items():
            assert np.abs(gradient[name] - value).max() <= 1e-12 * scale > 0, name
