"""Ids as people read them: token by token, with location tokens gathered into boxes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsvlm.data.boxes import TOKEN
from dsvlm.data.encode import IGNORE, Encoded
from dsvlm.data.sample import Boxes, Image, Sample
from dsvlm.data.tokenizer import TextCodec

WORD_START = "\u2581"  # SentencePiece's sign for the space before a word


@dataclass(frozen=True)
class Piece:
    """One token: its text, its name in the vocabulary, its id (None where there is no vocabulary).

    kind: text | location | control (bos, eos, pad) | box (a whole box, where there is no vocabulary).
    learnt: whether it is a target, that is, whether its prediction enters the loss.
    """

    text: str
    name: str
    id: int | None
    kind: str
    learnt: bool


def text_pieces(text: Encoded, codec: TextCodec) -> tuple[list[Piece], list[Piece]]:
    """(what is read, what is written): a decoder-only row is all read, and learns some of what it reads."""
    if text.answer is not None:
        written = [i for i in text.targets if i != IGNORE]
        return pieces(text.tokens, [False] * len(text.tokens), codec), pieces(written, [True] * len(written), codec)
    learnt = [False, *(target != IGNORE for target in text.targets[:-1])]  # position i predicts token i + 1
    return pieces(text.tokens, learnt, codec), []


def pieces(ids: Sequence[int], learnt: Iterable[bool], codec: TextCodec) -> list[Piece]:
    names = codec.tokenizer.convert_ids_to_tokens(list(ids))
    return [
        Piece(surface(name, codec), name, i, kind_of(i, name, codec), flag)
        for i, name, flag in zip(ids, names, learnt, strict=True)
    ]


def kind_of(i: int, name: str, codec: TextCodec) -> str:
    if TOKEN.fullmatch(name):
        return "location"
    return "control" if i in codec.control else "text"


def surface(name: str, codec: TextCodec) -> str:
    """The text of one token; its name in the vocabulary when it is a part of a character."""
    if WORD_START in name:
        return name.replace(WORD_START, " ")
    text = codec.tokenizer.convert_tokens_to_string([name])
    return name if "\ufffd" in text else text


def segment_pieces(sample: Sample) -> list[Piece]:
    """The segments of a sample before there is a vocabulary: a piece for each text and each box."""
    found = []
    for segment in sample.segments:
        if isinstance(segment, Boxes):
            found += [Piece("", "", None, "box", segment.loss) for _ in segment.boxes]
        elif not isinstance(segment, Image):
            found.append(Piece(f" {segment.text}", "", None, "text", segment.loss))
    return found
