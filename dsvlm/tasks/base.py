"""What a task type is: a template that turns a record into a sample, a parser of answers and a score.

Every type is text-to-text with cross-entropy (T5, Kosmos-2, GFM) unless it names a head. The same template object
serves training and evaluation.
"""

import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from numbers import Number

from dsvlm.data.boxes import decode_boxes
from dsvlm.data.sample import Box, Boxes, Image, Sample, Segment, Text


class TaskType(ABC):
    """One task type with its prompt template.

    prompt: text with fields in braces that the record fills, for example "where is the {name}?"; it is read as it is
    written, spaces and newlines too, but for those at its ends and beside boxes.
    """

    prompt: str
    fields: tuple[str, ...] = ()  # of a record that a prompt may name
    metric: str = "exact"  # the first figure of a report
    writes_boxes: bool = False  # whether answers hold location tokens

    def __init__(self, prompt: str | None = None):
        if prompt is not None:
            self.prompt = prompt
        try:
            parsed = list(string.Formatter().parse(self.prompt))
        except ValueError as error:
            raise ValueError(
                f"prompt {self.prompt!r}: {error}; close each {{ that opens a field, and write braces that are text "
                "twice, as {{ and }}"
            ) from None
        self.parts = [(literal, name) for literal, name, _, _ in parsed]
        names = [name for _, name in self.parts if name is not None]
        self.has_boxes = self.writes_boxes or "box" in names  # whether it reads or writes location tokens
        for _, name, form, conversion in parsed:
            if name is not None and name not in self.fields:
                raise ValueError(
                    f"prompt {self.prompt!r}: no field {{{name}}}; a {type(self).__name__.lower()} record has "
                    f"{', '.join(self.fields) or 'none'}"
                )
            if form or conversion:  # of Python's format strings: a box, or text that is typed, has none
                asked = f"!{conversion}" * bool(conversion) + f":{form}" * bool(form)
                raise ValueError(
                    f"prompt {self.prompt!r}: {{{name}{asked}}} asks for a format, but a field is filled in as the "
                    f"record has it; write {{{name}}}"
                )
        self.asked = None if names else self.filled({})  # the question of all records

    def question(self, record: dict) -> tuple[Segment, ...]:
        """The image and the filled prompt: what a model is asked with."""
        return self.filled(record) if self.asked is None else self.asked

    def filled(self, record: dict) -> tuple[Segment, ...]:
        """The image and the prompt with a record's values in place of its fields."""
        segments: list[Segment] = [Image()]
        for literal, name in self.parts:
            segments.append(Text(literal))
            if name is not None:
                segments.append(self.fill(name, record))
        return join_text(segments)

    def fill(self, name: str, record: dict) -> Segment:
        if name == "box":
            return Boxes((tuple(record["box"]),))
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, (str, Number)):  # null would become the word "None"
            raise TypeError(f"{name}: {value!r:.80} is neither text nor a number")
        return Text(str(value))

    def sample(self, record: dict) -> Sample:
        """The question and its target."""
        return Sample(self.question(record) + self.target(record))

    @abstractmethod
    def target(self, record: dict) -> tuple[Segment, ...]:
        """Segments the model is to write."""

    @abstractmethod
    def score(self, answers: Sequence[str], records: Sequence[dict], bins: int) -> dict[str, float]:
        """Metrics of answers (decoded text, in the order of `records`)."""

    def chance(self, train: Sequence[dict], records: Sequence[dict]) -> float | None:
        """Share of `records` that the best guess without looking gets right; None where there is no such guess."""
        return None

    def truth(self, record: dict) -> str:
        """The expected answer, for people."""
        return " ".join(s.text if isinstance(s, Text) else "" for s in self.target(record)).strip()

    def regions(self, record: dict) -> list[Box]:
        """Boxes that a correct answer holds."""
        return []

    def answer_regions(self, answer: str, bins: int) -> list[Box]:
        return decode_boxes(answer, bins)


def join_text(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbouring texts as one, as written; whitespace at a prompt's ends and beside boxes is dropped.

    `data.tokenizer.prompt_segments` does so with what people type: the same text has the ids of training.
    """
    joined: list[Segment] = []
    for is_text, run in groupby(segments, lambda segment: isinstance(segment, Text)):
        if not is_text:
            joined += run
        elif text := "".join(segment.text for segment in run).strip():
            joined.append(Text(text))
    return tuple(joined)


def normalise(text: str) -> str:
    return " ".join(text.lower().split())


def exact_share(answers: Sequence[str], truths: Sequence[str]) -> float:
    right = sum(normalise(a) == normalise(t) for a, t in zip(answers, truths, strict=True))
    return right / max(len(truths), 1)


def blind_share(train: Sequence[dict], records: Sequence[dict], key: Callable[[dict], tuple[str, str]]) -> float:
    """Share answered right without looking: to each question the answer that was most frequent in training.

    key: (question, answer) of a record.
    """
    seen: dict[str, Counter] = {}
    for question, answer in map(key, train):
        seen.setdefault(question, Counter())[normalise(answer)] += 1
    right = 0
    for question, answer in map(key, records):
        counts = seen.get(question)
        right += bool(counts) and min(counts, key=lambda a: (-counts[a], a)) == normalise(answer)
    return right / max(len(records), 1)
