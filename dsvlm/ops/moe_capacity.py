"""Tokens that an expert takes: the formulas found in other systems, so that their settings can be kept."""

from __future__ import annotations

CONVENTIONS = ("vmoe", "deepspeed", "megatron", "tutel")
LARGEST = 1e6  # factor: infinity and NaN have no number of rows


def expert_capacity(
    tokens: int, experts: int, k: int, factor: float, *, convention: str = "vmoe", minimum: int = 0
) -> int:
    """Rows per expert for a static budget of tokens; never more than there are tokens.

    vmoe: ceil(tokens * k * factor / experts), up to a multiple of 4; deepspeed: ceil(tokens / experts * factor * k);
    megatron: ceil(tokens * k / experts * factor); tutel: k * int(factor * ceil(tokens / experts)). minimum: at least so
    many. Take `tokens` from the plan, not from this rank's batch: then no rank waits for another one's count.
    """
    if tokens < 0 or experts < 1 or not 1 <= k <= experts or not 0 <= factor <= LARGEST:
        raise ValueError(
            f"expert_capacity: tokens={tokens}, experts={experts}, k={k}, factor={factor}; expected tokens >= 0, "
            f"1 <= k <= experts, 0 <= factor <= {LARGEST:g}"
        )
    if convention == "vmoe":
        rows = -(-_ceil(tokens * k * factor / experts) // 4) * 4
    elif convention == "deepspeed":
        rows = _ceil(tokens / experts * factor * k)
    elif convention == "megatron":
        rows = _ceil(tokens * k / experts * factor)
    elif convention == "tutel":
        rows = k * int(factor * -(-tokens // experts))
    else:
        raise ValueError(f"expert_capacity: unknown convention {convention!r}; choose one of {', '.join(CONVENTIONS)}")
    return min(max(rows, minimum), tokens)


def most_pools(experts: int) -> int:
    """Pools, each a modality too, that one `moe_route` takes on every device.

    On CUDA a block keeps sums of each modality in its shared memory, of which the least devices have 96 KiB, and there
    are at most 8192 pairs of an expert and a pool (csrc/moe_routing/gate.cuh, route.cuh).
    """
    tables = 4 if experts <= 64 else 2 if experts <= 128 else 1  # of a block of 32 threads
    of_each = tables * (2 * -(-experts // 4) * 4 + 2) + experts
    return max(1, min(256, (96 * 1024 // 4 - 3 * tables - 1) // of_each))


def _ceil(value: float) -> int:
    return int(-(-value // 1))
