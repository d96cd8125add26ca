"""Captioning: image -> text."""

from collections import Counter
from collections.abc import Sequence

from dsvlm.data.sample import Text
from dsvlm.tasks.base import TaskType, exact_share, normalise


class Caption(TaskType):
    """Record: {"caption": str}."""

    prompt = "describe the image"
    metric = "word_f1"

    def target(self, record: dict) -> tuple[Text, ...]:
        return (Text(record["caption"], loss=True),)

    def score(self, answers: Sequence[str], records: Sequence[dict], bins: int) -> dict[str, float]:
        return text_scores(answers, [r["caption"] for r in records])


def text_scores(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Scores of free text: the mean F1 over words, and the share that is right to the word."""
    f1 = [word_f1(a, t) for a, t in zip(answers, truths, strict=True)]
    return {"word_f1": sum(f1) / max(len(f1), 1), "exact": exact_share(answers, truths)}


def word_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words, each counted as often as it stands."""
    a, t = Counter(normalise(answer).split()), Counter(normalise(truth).split())
    shared = sum((a & t).values())
    return 2 * shared / max(sum(a.values()) + sum(t.values()), 1)
