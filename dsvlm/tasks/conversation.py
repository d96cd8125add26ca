"""Conversation about an image: every answer is learnt, each with the turns before it read."""

from collections.abc import Sequence

from dsvlm.data.sample import Sample, Segment, Text
from dsvlm.data.turns import read_turns
from dsvlm.tasks.base import TaskType
from dsvlm.tasks.caption import text_scores


class Conversation(TaskType):
    """Record: {"conversations": [{"from": "human", "value": str}, {"from": "gpt", "value": str}, ...]}.

    OpenAI's turns (`role`, `content`) are read too. The prompt is filled with each question, as {text}; an EOS ends
    each answer. Evaluation asks for the last answer, with the true ones before it.
    """

    prompt = "{text}"
    fields = ("text",)
    metric = "word_f1"

    def __init__(self, prompt: str | None = None):
        super().__init__(prompt)
        if self.asked is not None:
            raise ValueError(f"prompt {self.prompt!r}: it has no {{text}}, where the questions of a conversation stand")

    def sample(self, record: dict) -> Sample:
        return Sample(self.said(record))

    def question(self, record: dict) -> tuple[Segment, ...]:
        """The image, the system's text and all turns up to the last answer."""
        return self.said(record)[:-1]

    def target(self, record: dict) -> tuple[Segment, ...]:
        return self.said(record)[-1:]

    def said(self, record: dict) -> tuple[Segment, ...]:
        """All of a conversation; the last segment is the last answer."""
        system, turns = read_turns(record["conversations"])
        image, *first = self.filled({"text": turns[0][0]})
        segments = [image, *([Text(system)] if system.strip() else ()), *first]
        for (_, answer), (question, _) in zip(turns, turns[1:], strict=False):
            segments += [Text(answer, loss=True), *self.filled({"text": question})[1:]]
        return (*segments, Text(turns[-1][1], loss=True))

    def score(self, answers: Sequence[str], records: Sequence[dict], bins: int) -> dict[str, float]:
        return text_scores(answers, [self.truth(record) for record in records])
