"""A sample as ids with next-token targets: the loss flags of the segments become labels here, and nowhere else."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dsvlm.data.reader import BadSample
from dsvlm.data.sample import Image, Sample
from dsvlm.data.tokenizer import TextCodec

IGNORE = -100  # target of a position without loss
# What a template or a vocabulary raises on a record that is not of its task: a value missing, of another type or size,
# or nested too deeply.
UNFIT = (KeyError, TypeError, ValueError, ArithmeticError, RecursionError)


class Encoded(NamedTuple):
    """One sample's text as a row.

    ids: decoder: bos, prompt, target, eos; encoder-decoder: prompt, eos, target, eos. A list, or int32 [n] when another
    process read the sample.
    prompt: how many of `ids` come before the first that is predicted.
    start: what the decoder of an encoder-decoder reads first; None for a decoder.
    silent: ranges of `ids` behind `prompt` that are read and not predicted: a conversation's later questions.
    """

    ids: Sequence[int]
    prompt: int
    start: int | None
    label: int | None
    images: int
    silent: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> Sequence[int]:
        """Ids the model reads; of an encoder-decoder, its encoder."""
        return self.ids if self.start is None else self.ids[: self.prompt]

    @property
    def answer(self) -> list[int] | None:
        """What the decoder of an encoder-decoder reads: its start token, then the target."""
        return None if self.start is None else [self.start, *self.ids[self.prompt : -1]]

    @property
    def targets(self) -> list[int]:
        """Id to predict at each position of `tokens` (decoder) or of `answer` (encoder-decoder); IGNORE = no loss."""
        target = [*self.ids[self.prompt :]]
        for first, end in self.silent:
            target[first - self.prompt : end - self.prompt] = [IGNORE] * (end - first)
        return [IGNORE] * (self.prompt - 1) + target + [IGNORE] if self.start is None else target or [IGNORE]

    @property
    def count(self) -> int:
        """Targets that enter the loss; a label counts as one."""
        return len(self.ids) - self.prompt - sum(e - f for f, e in self.silent) + (self.label is not None)


def encode_sample(sample: Sample, codec: TextCodec, max_length: int, encoder_decoder: bool) -> Encoded:
    """Encodes a sample with an EOS behind every run of segments that are predicted, predicted too: one, but for
    conversations, whose later questions are read in their places. A conversation that is longer than max_length loses
    its last turns.

    Raises BadSample when the text is longer than max_length or its end is not predicted.
    """
    prompt, target, silent, images = [], [], [], 0
    for segment in sample.segments:
        if isinstance(segment, Image):
            images += 1
            continue
        ids = codec.encode(segment, first=not prompt and not target)
        if segment.loss:
            target.extend(ids)
        elif not target:
            prompt.extend(ids)
        else:
            if encoder_decoder:
                raise BadSample("an encoder-decoder answers once: it cannot have a conversation")
            if not asked(silent, target):
                target.append(codec.eos_id)
                silent.append((len(target), len(target)))
            target.extend(ids)
            silent[-1] = (silent[-1][0], len(target))
    if sample.label is None and not target:
        raise BadSample("nothing to predict: the target is empty")
    if sample.label is None and asked(silent, target):
        raise BadSample("nothing to predict: the last answer is empty")
    if target and not asked(silent, target):
        target.append(codec.eos_id)
    while silent and len(prompt) + len(target) + 1 > max_length:
        del target[silent.pop()[0] :]  # the last turn: those before it do without
    if len(prompt) + len(target) + 1 > max_length:
        raise BadSample(f"text of {len(prompt) + len(target) + 1} tokens is longer than text.max_length ({max_length})")
    if encoder_decoder:
        # T5's convention: the decoder starts with the pad token.
        return Encoded([*prompt, codec.eos_id, *target], len(prompt) + 1, codec.pad_id, sample.label, images)
    before = len(prompt) + 1
    silent = tuple((first + before, end + before) for first, end in silent)
    return Encoded([codec.bos_id, *prompt, *target], before, None, sample.label, images, silent)


def asked(silent: list[tuple[int, int]], target: list[int]) -> bool:
    """Whether the ids so far end with a later question."""
    return bool(silent) and silent[-1][1] == len(target)


def encode_record(
    record: dict, make: Callable[[dict], Sample], codec: TextCodec, max_length: int, *, encoder_decoder: bool,
    images: bool = True, classes: int = 0,
) -> Encoded:  # fmt: skip
    """A record as the loader sends it to the model; BadSample when it does not fit its task.

    make: the task type's template; images: whether the task's samples have images; classes: of its head.
    """
    try:
        text = encode_sample(make(record), codec, max_length, encoder_decoder)
        if text.label is not None and not 0 <= text.label < classes:
            raise BadSample(f"label {text.label} is none of the task's {classes} classes (0 is the first)")
    except UNFIT as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(f"its record does not fit the task: {error!r}") from error
    return text if images else text._replace(images=0)


def masked_sample(codec: TextCodec, encoder_decoder: bool) -> Encoded:
    """What stands in place of a sample whose text could not be read: a row without loss."""
    return Encoded([codec.bos_id, codec.eos_id], 2, codec.pad_id if encoder_decoder else None, None, 1)
