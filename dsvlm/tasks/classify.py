"""Classification of a region: image and box -> name."""

from collections.abc import Sequence

from dsvlm.data.sample import Text
from dsvlm.tasks.base import TaskType, blind_share, exact_share


class Classify(TaskType):
    """Record: {"box": [4], "name": str}."""

    prompt = "what is in the region {box}?"
    fields = ("box",)

    def target(self, record: dict) -> tuple[Text, ...]:
        return (Text(record["name"], loss=True),)

    def score(self, answers: Sequence[str], records: Sequence[dict], bins: int) -> dict[str, float]:
        return {"exact": exact_share(answers, [r["name"] for r in records])}

    def chance(self, train: Sequence[dict], records: Sequence[dict]) -> float:
        return blind_share(train, records, lambda r: ("", r["name"]))
