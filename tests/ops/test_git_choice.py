"""Which backend "auto" is: the compiled op on the CPU; on CUDA what was measured as the fastest, if it can serve."""

from types import SimpleNamespace

import pytest
import torch

from dsvlm.ops import GitMask, git_attention, git_choice, git_kernel
from dsvlm.ops.git_choice import choose, lookup, table
from dsvlm.ops.git_kernel import has_kernel

PACKED = GitMask(torch.tensor([[[0, 3]] * 3]), 3)
EQUAL = GitMask.from_lengths(2, 1, 3)


def like(device="cpu", dtype=torch.float32, queries=3, size=64):
    """What the choice reads of q, k and v."""
    return [SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, queries, 2, size))] * 3


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(git_kernel, "has_kernel", lambda device: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cpu(built, dtype):
    slopes = torch.ones(2)
    assert choose(*like(dtype=dtype), PACKED, None, 0.0) == "kernel"
    assert choose(*like(dtype=dtype), PACKED, slopes, 0.0) == "kernel"
    assert choose(*like(dtype=dtype), PACKED, slopes.requires_grad_(), 0.0) == "math"
    assert choose(*like(dtype=dtype), PACKED, None, 0.1) == "math"
    assert choose(*like(dtype=dtype, queries=1), PACKED, None, 0.0) == "sdpa"
    assert choose(*like(dtype=torch.float16), PACKED, None, 0.0) == "sdpa"


def test_cuda_follows_the_measurements(built, monkeypatch):
    rows = [
        {"device": "sm_90", "head_size": 64, "queries_up_to": 512, "packed": True, "backend": "kernel"},
        {"device": "sm_90", "head_size": 64, "queries_up_to": 2048, "packed": True, "backend": "flex"},
        {"device": "sm_90", "head_size": 64, "queries_up_to": 512, "packed": False, "backend": "two_call"},
        {"device": "sm_90", "head_size": 64, "queries_up_to": 512, "packed": False, "backend": "kernel"},
        {"device": "sm_80", "head_size": 64, "queries_up_to": 512, "packed": True, "backend": "sdpa"},
    ]
    assert lookup(rows, "sm_90", 64, 512, True) == "kernel" and lookup(rows, "sm_90", 64, 513, True) == "flex"
    assert lookup(rows, "sm_90", 64, 4096, True) is None and lookup(rows, "sm_90", 80, 64, True) is None
    monkeypatch.setattr(git_choice, "measured", lambda device, *key: lookup(rows, "sm_90", *key))
    gpu = {"device": "cuda:0", "dtype": torch.bfloat16}
    slopes = torch.ones(2)
    assert choose(*like(**gpu), PACKED, None, 0.0) == "kernel"
    assert choose(*like(**gpu), PACKED, slopes, 0.0) == "kernel"
    assert choose(*like(**gpu, queries=600), PACKED, None, 0.0) == "sdpa"  # measured for as many keys as queries
    assert choose(*like(**gpu | {"dtype": torch.float32}), PACKED, None, 0.0) == "sdpa"
    assert choose(*like(**gpu), EQUAL, None, 0.0) == "two_call"
    assert choose(*like(**gpu), EQUAL, slopes, 0.0) == "kernel"  # the second row about the same thing
    assert choose(*like(**gpu), GitMask(PACKED.rows, 3, packed=False), None, 0.0) == "kernel"
    assert choose(*like(**gpu, size=80), PACKED, None, 0.0) == "sdpa"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose(*like(**gpu), EQUAL, None, 0.0) == "kernel"


def test_the_table_is_what_is_looked_up():
    for row in table():
        assert set(row) == {"device", "head_size", "queries_up_to", "packed", "backend"}
        assert lookup(table(), row["device"], row["head_size"], row["queries_up_to"], row["packed"])


def test_without_the_library_the_reference_serves(monkeypatch):
    q = torch.randn(1, 3, 2, 4)
    expected = git_attention(q, q, q, EQUAL, backend="sdpa")
    monkeypatch.setattr(git_kernel, "built_for", lambda device, ops: False)
    assert not has_kernel("cpu")
    assert torch.equal(git_attention(q, q, q, EQUAL), expected)
    with pytest.raises(ValueError, match="no compiled op for cpu here"):
        git_attention(q, q, q, EQUAL, backend="kernel")


@pytest.mark.skipif(not has_kernel("cpu"), reason="the compiled ops were not built")
def test_auto_is_the_compiled_op_here():
    q = torch.randn(1, 3, 2, 4)
    assert torch.equal(git_attention(q, q, q, EQUAL), git_attention(q, q, q, EQUAL, backend="kernel"))
