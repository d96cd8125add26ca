"""Question answering: image and question -> short text."""

from collections.abc import Sequence

from dsvlm.data.sample import Text
from dsvlm.tasks.base import TaskType, blind_share, exact_share


class Vqa(TaskType):
    """Record: {"question": str, "answer": str}."""

    prompt = "{question}"
    fields = ("question",)

    def target(self, record: dict) -> tuple[Text, ...]:
        return (Text(record["answer"], loss=True),)

    def score(self, answers: Sequence[str], records: Sequence[dict], bins: int) -> dict[str, float]:
        return {"exact": exact_share(answers, [r["answer"] for r in records])}

    def chance(self, train: Sequence[dict], records: Sequence[dict]) -> float:
        return blind_share(train, records, lambda r: (r["question"], r["answer"]))
