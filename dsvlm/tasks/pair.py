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
        return Sample(self.question(record), label=label_of(record))

    def target(self, record: dict) -> tuple[Text, ...]:
        return ()

    def truth(self, record: dict) -> str:
        return str(label_of(record))

    def score(self, answers: Sequence[str], records: Sequence[dict], bins: int) -> dict[str, float]:
        right = sum(a == str(label_of(r)) for a, r in zip(answers, records, strict=True))
        return {"accuracy": right / max(len(records), 1)}

    def chance(self, train: Sequence[dict], records: Sequence[dict]) -> float:
        likely = Counter(label_of(r) for r in train).most_common(1)[0][0]
        return sum(label_of(r) == likely for r in records) / max(len(records), 1)


def label_of(record: dict) -> int:
    """The class of a record, the same for training, score and chance; ValueError unless it is a whole number."""
    label = record["label"]
    if isinstance(label, int) and not isinstance(label, bool) or isinstance(label, float) and label.is_integer():
        return int(label)
    raise ValueError(f"label {label!r:.80} is no class: store a whole number, 0 is the first")
