"""Which parameters train, by patterns on their names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn


def apply_freezing(model: nn.Module, freeze: Iterable[str], train: Iterable[str]) -> None:
    """Freeze the parameters that a `freeze` pattern finds, then let those train that a `train` pattern finds.

    Patterns are regular expressions searched in parameter names (`decoder.model.layers.0.mlp.up_proj.weight`);
    one that finds nothing is a ValueError, because a typing error would train the wrong model silently.
    """
    parameters = dict(model.named_parameters())
    for where, patterns, requires_grad in (("freeze", freeze, False), ("train", train, True)):
        for pattern in patterns:
            for name in matching(pattern, parameters, where, "parameter"):
                parameters[name].requires_grad_(requires_grad)


def matching(pattern: str, names: Iterable[str], where: str, what: str) -> list[str]:
    """The names in which the pattern is found; ValueError with the nearest names if there are none."""
    names = list(names)
    try:
        found = [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is not a regular expression: {error}") from error
    if not found:
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
        raise ValueError(f"{where}: pattern {pattern!r} matches no {what}; nearest: {', '.join(near)}")
    return found
