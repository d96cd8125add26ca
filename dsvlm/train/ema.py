"""Averaged weights: an exponential moving average of the fp32 masters, kept in the same slices as they are."""

import torch
from torch import Tensor

from dsvlm.train.fragments import fragment, is_cut, join, shape_of, trainable


class Ema:
    """average <- decay * average + (1 - decay) * weights, after every update.

    The decay grows as (1 + step) / (10 + step) up to `decay`, so that early averages are not the initial weights.
    """

    def __init__(self, engine, decay: float):
        self.engine, self.decay = engine, decay
        self.slices: dict[str, tuple[int, Tensor]] = {}
        for name, parameter in trainable(engine):
            piece = fragment(engine, parameter)
            if piece is not None:
                self.slices[name] = (piece[0], piece[1].detach().clone())

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in trainable(self.engine):
            if name in self.slices:
                self.slices[name][1].lerp_(fragment(self.engine, parameter)[1], 1 - decay)

    def gather(self, name: str, parameter) -> Tensor:
        """The whole averaged tensor on every rank; collective where slices are partitioned."""
        if is_cut(parameter):
            return join(self.slices.get(name), shape_of(parameter), self.engine.device)
        return self.slices[name][1].view(parameter.shape)

    def load(self, name: str, whole: Tensor) -> None:
        if name in self.slices:
            start, values = self.slices[name]
            values.copy_(whole.reshape(-1)[start : start + values.numel()])
