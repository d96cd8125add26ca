"""The compiled library of `dsvlm.ops`: found, loaded once, and named where it is absent."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parent


@functools.cache
def library() -> bool:
    """Loads the compiled ops (`torch.ops.dsvlm`) at the first call; False, with one warning, where there are none."""
    path = HERE / "_C.abi3.so"
    try:
        if not path.exists():
            raise OSError("it was not built: that needs g++ and torch at installation (pip's --no-build-isolation)")
        torch.ops.load_library(path)
    except OSError as error:
        warnings.warn(f"dsvlm: no compiled ops, the slower PyTorch reference serves: {error}", stacklevel=2)
        return False
    return True


@functools.cache
def built_for(device: str, ops: tuple[str, ...]) -> bool:
    """Whether the library is there and has all these ops for a type of device, "cpu" or "cuda"."""
    if not library() or not all(hasattr(torch.ops.dsvlm, op) for op in ops):  # one from before there were these ops
        return False
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"dsvlm::{op}", key) for op in ops)


def constant(function: Callable) -> Callable:
    """Marks a function whose results torch.compile takes for constants, as torch.compiler.assume_constant_result does:
    that imports all of torch._dynamo for it, a second in every process."""
    function._dynamo_marked_constant = True
    return function


def same_device(op: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """ValueError naming the first tensor that is elsewhere: a compiled op would read memory that is not its own."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, the others are on {device}; move it there")
