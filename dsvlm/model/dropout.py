"""Dropout whose masks belong to samples: the same draws on any rank, world size, unit and padding."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

# odd 64-bit constants as signed integers: splitmix64's increment and finaliser, and one factor per trailing dimension
INCREMENT = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
DIMENSION = (0xD1342543DE82EF95 - 2**64, 0xAF251AF3B0F025B5 - 2**64, 0x5851F42D4C957F2D, 0x369DEA0F31A53F85)
BITS = 53


class KeyedDropout(AbstractContextManager):
    """Within this context `torch.nn.functional.dropout` draws its masks from sample keys.

    row_keys: [B] int64, one per row; image_keys: [N] int64, one per image (`image_keys`). Packed rows: row_keys and
    position [R, S] int64, the key of the sample at each place of the rows, and the place counted from its start.
    A mask element is a hash of (key of its sample or image, nonce of the call, position in the sample). The nonce comes
    from the CPU default generator, which the caller seeds equally on all ranks; `torch.utils.checkpoint` restores that
    generator, so a recomputed call draws the same mask (hold the context around the backward, too).
    A tensor belongs to the rows or the images by its leading dimension; [B * S, D] is read as [B, S, D], and of packed
    rows, [R, H, S, S] as attention weights.

    The function itself is replaced, in all threads, as the backward of a GPU recomputes in a thread of its own; a
    torch function mode is off during `Tensor.backward`.
    """

    def __init__(self, row_keys: Tensor, image_keys: Tensor, position: Tensor | None = None):
        self.row_keys = row_keys
        self.image_keys = image_keys
        self.position = position

    def __enter__(self) -> KeyedDropout:
        self.replaced, F.dropout = F.dropout, self._dropout
        return self

    def __exit__(self, *error) -> None:
        F.dropout = self.replaced

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0.0:
            return x
        if not 0.0 < p <= 1.0:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        nonce = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64).item()
        shape = x.shape
        if x.dim() == 2 and len(self.row_keys) > 0 and shape[0] % len(self.row_keys) == 0:
            x = x.unflatten(0, (len(self.row_keys), -1))  # OPT flattens rows and positions before its feed-forward
        keys, position = self._keys(x)
        keep = keyed_uniform(keys, nonce, x.shape, position) >= int(p * 2**BITS)
        return (x * keep * (1.0 / (1.0 - p) if p < 1.0 else 0.0)).view(shape)

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        for keys, position in ((self.row_keys, self.position), (self.image_keys, None)):
            if x.shape[0] == len(keys):
                return keys, position
        raise ValueError(
            f"dropout of a tensor {tuple(x.shape)}: its leading dimension is neither the {len(self.row_keys)} rows nor "
            f"the {len(self.image_keys)} images of the batch, so its draws cannot be keyed by sample; set this "
            "module's dropout to 0"
        )


def keyed_uniform(keys: Tensor, nonce: int, shape: torch.Size, position: Tensor | None = None) -> Tensor:
    """Integers uniform in [0, 2^53) that depend on (key, nonce, index) only, not on the sizes of the dimensions.

    keys: [shape[0]] int64; shape: at most 5 dimensions. Trailing dimensions are counted from the last, so that an
    absent dimension and a dimension of size 1 are the same.
    With position [R, S] (packed rows), keys are [R, S] and shape [R, S, D] or [R, H, S, S] (attention weights, of
    which the query has the key): positions take the place of the index along S, so that a sample has the integers of a
    row of its own. Between two samples they mean nothing, as the weight there is 0. Other shapes are a ValueError.
    """
    if len(shape) - 1 > len(DIMENSION):
        raise ValueError(f"keyed dropout: at most {len(DIMENSION) + 1} dimensions, found {tuple(shape)}")

    def along(table: Tensor, back: int) -> Tensor:
        """[shape[0] or 1, n] as a tensor with n at the dimension `back` from the end."""
        return table.view(len(table), *(1,) * (len(shape) - 1 - back), -1, *(1,) * (back - 1))

    count = [torch.arange(size, device=keys.device)[None] for size in shape[:0:-1]]
    state = splitmix(keys ^ nonce)
    if position is None:
        state = state.view(-1, *(1,) * (len(shape) - 1))
    else:
        state = along(state, 2)
        if len(shape) == 3 and shape[1] == position.shape[1]:
            count[1] = position
        elif len(shape) == 4 and shape[2:] == (position.shape[1],) * 2:
            count[:2] = position, position
        else:
            raise ValueError(
                f"dropout of a tensor {tuple(shape)} of packed rows {tuple(position.shape)}: its draws cannot be keyed "
                "by sample, as it is neither [rows, positions, D] nor [rows, heads, positions, positions]; set this "
                "module's dropout to 0, or the tasks' `pack` to false"
            )
    for back, (number, factor) in enumerate(zip(count, DIMENSION, strict=False), start=1):
        state = state + along(number * factor, back)
    return (splitmix(state) >> (64 - BITS)) & (2**BITS - 1)


def splitmix(x: Tensor) -> Tensor:
    """splitmix64's bijection of 64-bit integers (Steele et al. 2014), on int64 with wrap-around."""
    x = x + INCREMENT
    x = (x ^ _shift(x, 30)) * MIX[0]
    x = (x ^ _shift(x, 27)) * MIX[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # int64 shifts carry the sign in; the mask makes the shift logical


def image_keys(row_keys: Tensor, image_row: Tensor) -> Tensor:
    """[N] int64 keys of images: the row's key for its first image, derived keys for the others, 0 for a dummy.

    row_keys: [B] int64; image_row: [N] int64, -1 = dummy.
    """
    earlier = (image_row[:, None] == image_row).tril(-1).sum(dim=1)
    return torch.where(image_row >= 0, row_keys[image_row.clamp(min=0)] + earlier * DIMENSION[-1], 0)
