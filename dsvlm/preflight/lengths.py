"""`dsvlm data lengths`: the side files that windows are cut by, made before a start, and what they say of padding."""

import os
from functools import partial

from dsvlm.data.lengths import Lengths
from dsvlm.preflight.inputs import open_codec
from dsvlm.schedule.lengths import token_shares
from dsvlm.schedule.plan import Window
from dsvlm.schedule.strategy import deal
from dsvlm.train.build import Planned
from dsvlm.train.lengths import (
    beside_shards,
    bucket_edges,
    find_lengths,
    image_tokens,
    make_dealer,
    make_lengths,
    window_positions,
)


def lengths(planned: Planned, workers: int) -> list[dict]:
    """Makes what is missing next to each task's shards; what each file says, as JSON values.

    Where shards lie that cannot be written to, as data sets of many users do: in the run directory, which is looked
    through as well. workers: processes; 0 = this one.
    """
    codec, _ = open_codec(planned)
    beside = beside_shards(planned).items()
    places = {name: place if os.access(place, os.W_OK) else planned.recipe.run_dir for name, place in beside}
    made = make_lengths(planned, codec, places, workers)
    tokens = image_tokens(planned.recipe)
    found = find_lengths(planned, codec)
    return [describe(name, table, tokens, planned.recipe.train.buckets, name in made) for name, table in found.items()]


def describe(name: str, table: Lengths, tokens: int, buckets: int, made: bool) -> dict:
    """task, file, samples, made now or found; positions of its rows: mean, longest, edges of its own buckets."""
    histogram = table.histogram(tokens)
    positions = int(histogram @ range(len(histogram)))
    return {
        "task": name, "file": str(table.path), "samples": table.samples, "made": made,
        "mean": positions / table.samples, "longest": len(histogram) - 1,
        "edges": bucket_edges(histogram, buckets).tolist(),
    }  # fmt: skip


def render(rows: list[dict]) -> str:
    """One line per task."""
    return "\n".join(
        f"{row['task']}: {row['file']} ({'made' if row['made'] else 'found'}), {row['samples']} samples, "
        f"rows of {row['mean']:.1f} positions at the mean, {row['longest']} at most"
        for row in rows
    )


class Cut:
    """How a recipe's windows are dealt to ranks, and what is known of padding, without reading a sample.

    deal: window -> rounds, as in training; lengths: window -> positions of its samples, tables: of each task; both
    None: no side files yet.
    """

    def __init__(self, planned: Planned, world_size: int):
        train, self.lengths, self.tables = planned.recipe.train, None, None
        self.deal = partial(deal, schedule=planned.schedule, world_size=world_size, micro_batch=train.micro_batch)
        found = any_lengths(planned) and find_lengths(planned, open_codec(planned)[0])
        if not found or None in found.values():
            return
        if train.micro_tokens:
            self.deal = make_dealer(planned, found, world_size)
        self.tables, tokens = tuple(found.values()), image_tokens(planned.recipe)
        self.lengths = partial(window_positions, planned.plan, lengths=self.tables, image_tokens=tokens)

    def shares(self, window: Window, rounds) -> dict[str, float]:
        """useful_tokens: of the tokens computed; waiting: of the time that ranks could compute; nothing if unknown."""
        if self.lengths is None:
            return {}
        useful, padded, waited = token_shares(rounds, self.lengths(window))
        return {"useful_tokens": useful / padded, "waiting": 1 - padded / waited}


def any_lengths(planned: Planned) -> bool:
    """Whether a set of shards has side files, be they of another vocabulary: only then is it worth its training."""
    places = {planned.recipe.run_dir, *beside_shards(planned).values()}
    return any(next(place.glob("lengths-*.npy"), None) for place in places)
