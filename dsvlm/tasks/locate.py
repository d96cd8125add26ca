"""Locating: image and name -> the boxes of that name."""

from collections.abc import Sequence

from dsvlm.data.boxes import decode_boxes, match_boxes
from dsvlm.data.sample import Box, Boxes
from dsvlm.tasks.base import TaskType


class Locate(TaskType):
    """Record: {"name": str, "boxes": [[4], ...]}."""

    prompt = "where is the {name}?"
    fields = ("name",)
    metric = "mean_iou"
    writes_boxes = True

    def target(self, record: dict) -> tuple[Boxes, ...]:
        return (Boxes(tuple(self.regions(record)), loss=True),)

    def regions(self, record: dict) -> list[Box]:
        return [tuple(box) for box in record["boxes"]]

    def truth(self, record: dict) -> str:
        return f"{len(record['boxes'])} box{'es' * (len(record['boxes']) > 1)}"

    def score(self, answers: Sequence[str], records: Sequence[dict], bins: int) -> dict[str, float]:
        found = [match_boxes(decode_boxes(a, bins), self.regions(r)) for a, r in zip(answers, records, strict=True)]
        total = max(len(found), 1)
        return {"mean_iou": sum(found) / total, "iou_above_half": sum(f >= 0.5 for f in found) / total}
