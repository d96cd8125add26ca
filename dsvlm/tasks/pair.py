"""Classification of a pair (image, text) by a head of its own: the head-bank objective."""

from collections import Counter
from collections.abc import Sequence

from dsvlm.data.sample import Sample, Text
from dsvlm.tasks.base import TaskType


class Pair(TaskType):
    """Record: {"text": str, "label": int}."""

    prompt = "{text}"
    fields = ("text",)
    metric = "accuracy"

    def sample(self, record: dict) -> Sample:
        return Sample(self.question(record), label=int(record["label"]))

    def target(self, record: dict) -> tuple[Text, ...]:
        return ()

    def truth(self, record: dict) -> str:
        return str(record["label"])

    def score(self, answers: Sequence[str], records: Sequence[dict], bins: int) -> dict[str, float]:
        right = sum(a == str(r["label"]) for a, r in zip(answers, records, strict=True))
        return {"accuracy": right / max(len(records), 1)}

    def chance(self, train: Sequence[dict], records: Sequence[dict]) -> float:
        likely = Counter(r["label"] for r in train).most_common(1)[0][0]
        return sum(r["label"] == likely for r in records) / max(len(records), 1)
