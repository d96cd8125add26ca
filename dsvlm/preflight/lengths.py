"""`dsvlm data lengths`: the side files that a recipe's windows are cut by, made before the first start."""

from dsvlm.data.lengths import Lengths
from dsvlm.preflight.inputs import open_codec
from dsvlm.train.build import Planned
from dsvlm.train.lengths import bucket_edges, find_lengths, image_tokens, make_lengths


def lengths(planned: Planned, workers: int) -> list[dict]:
    """Makes what is missing next to each task's shards; what each file says, as JSON values.

    workers: processes; 0 = this one.
    """
    codec, _ = open_codec(planned)
    beside = {name: manifest.path for name, manifest in planned.manifests.items()}
    made = make_lengths(planned, codec, beside, workers)
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
