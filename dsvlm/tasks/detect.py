"""Detection: image -> the names and boxes of all objects."""

import re
from collections.abc import Sequence

from dsvlm.data.boxes import decode_boxes, iou
from dsvlm.data.sample import Box, Boxes, Segment, Text
from dsvlm.tasks.base import TaskType, normalise

LOCATIONS = re.compile(r"((?:<loc_\d+>\s*)+)")  # a run of location tokens


class Detect(TaskType):
    """Record: {"objects": [{"name": str, "box": [4]}, ...]}."""

    prompt = "list all objects"
    metric = "f1"
    writes_boxes = True

    def target(self, record: dict) -> tuple[Segment, ...]:
        segments: list[Segment] = []
        for item in record["objects"]:
            segments += [Text(item["name"], loss=True), Boxes((tuple(item["box"]),), loss=True)]
        return tuple(segments)

    def truth(self, record: dict) -> str:
        return ", ".join(item["name"] for item in record["objects"])

    def regions(self, record: dict) -> list[Box]:
        return [tuple(item["box"]) for item in record["objects"]]

    def parse(self, answer: str, bins: int) -> list[tuple[str, Box]]:
        """(name, box) of every complete object of an answer; a second box after one name has no name."""
        parts, found = LOCATIONS.split(answer), []  # names may hold anything else, "a < b" too
        for name, run in zip(parts[::2], parts[1::2], strict=False):
            boxes = decode_boxes(run, bins)
            found += [(normalise(name) if i == 0 else "", box) for i, box in enumerate(boxes)]
        return found

    def score(self, answers: Sequence[str], records: Sequence[dict], bins: int) -> dict[str, float]:
        hits = written = wanted = 0
        for answer, record in zip(answers, records, strict=True):
            found = self.parse(answer, bins)
            left = [(normalise(o["name"]), tuple(o["box"])) for o in record["objects"]]
            written, wanted = written + len(found), wanted + len(left)
            for name, box in found:
                best = max((t for t in left if t[0] == name), key=lambda t: iou(box, t[1]), default=None)
                if best and iou(box, best[1]) >= 0.5:
                    left.remove(best)
                    hits += 1
        return {"f1": 2 * hits / max(written + wanted, 1)}
