"""Answers of a model to questions about images: greedy decoding in batches, and the `generate` command."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsvlm.data.boxes import decode_boxes
from dsvlm.data.collate import Batch, Row, collate
from dsvlm.data.encode import Encoded, encode_sample
from dsvlm.data.reader import BadSample
from dsvlm.data.sample import Box, Image, Sample, Segment
from dsvlm.data.tokenizer import TextCodec, spoken_segments
from dsvlm.data.transforms import to_rgb

if TYPE_CHECKING:
    from dsvlm.model.git import GitVlm

Question = tuple[Sequence[Segment], np.ndarray | None]  # prompt segments, and pixels uint8 [3, P, P]


@dataclass(frozen=True)
class Room:
    """What a row of a model can hold.

    text: tokens of prompt and answer that fit beside one image into the decoder's positions, None = no limit.
    """

    text: int | None
    encoder_decoder: bool

    @classmethod
    def of(cls, model: GitVlm) -> Room:
        config = model.decoder.config
        positions = getattr(config, "max_position_embeddings", None)  # T5 has none: its positions are relative
        return cls(positions and positions - model.vision.tokens, config.is_encoder_decoder)

    def answer(self, prompt: int, wanted: int) -> int:
        """New tokens that can be asked for after a prompt of so many, at most `wanted`."""
        return wanted if self.text is None else min(wanted, self.text - prompt)


def answers(
    model: GitVlm, codec: TextCodec, questions: Sequence[Question], max_new_tokens: int, batch: int, bar=None
) -> list[str]:
    """Greedy answers as text, in the order of the questions.

    batch: questions decoded together; bar: a tqdm bar to move on, or None. An answer has at most max_new_tokens tokens,
    and no more than the decoder's positions have room for.
    """
    texts, room = [""] * len(questions), Room.of(model)
    prompts = [len(encode_question(codec, segments, room).tokens) for segments, _ in questions]
    limits = [room.answer(prompt, max_new_tokens) for prompt in prompts]
    # together only what may write equally much: a long prompt would cut the answers of the short ones beside it
    for limit in sorted(set(limits), reverse=True):
        alike = [number for number, own in enumerate(limits) if own == limit]
        left = iter(alike)
        for inputs in batches(model, codec, [questions[number] for number in alike], room, batch):
            ids = model.generate(inputs.pixels, inputs.image_row, inputs.tokens, inputs.lengths, limit, codec.eos_id)
            for written in ids.tolist():
                texts[next(left)] = codec.decode(until_eos(written, codec.eos_id))
            if bar is not None:
                bar.update(len(ids))
    return texts


def head_answers(
    model: GitVlm, codec: TextCodec, questions: Sequence[Question], head: int, batch: int, bar=None
) -> list[str]:
    """The most likely class of one head of the bank, as text, in the order of the questions."""
    import torch

    classes = []
    with torch.inference_mode():
        for inputs in batches(model, codec, questions, Room.of(model), batch):
            classes += model.head_logits(inputs, head).argmax(dim=-1).tolist()
            if bar is not None:
                bar.update(len(inputs.tokens))
    return [str(c) for c in classes]


def batches(
    model: GitVlm, codec: TextCodec, questions: Sequence[Question], room: Room, size: int
) -> Iterator[Batch]:
    """Questions in batches on the model's device."""
    image_size = model.config.vision_settings["image_size"]
    for start in range(0, len(questions), size):
        yield question_batch(codec, questions[start : start + size], room, image_size).to(model.device)


def question_batch(codec: TextCodec, questions: Sequence[Question], room: Room, image_size: int) -> Batch:
    """Encoded questions and their images as rows; errors as in `encode_question`."""
    rows = [
        Row(encode_question(codec, segments, room), image, weight=0.0, key=0, task=0) for segments, image in questions
    ]
    return collate(rows, image_size=image_size, pad_id=codec.pad_id)


def encode_question(codec: TextCodec, segments: Sequence[Segment], room: Room) -> Encoded:
    """The row of training, cut off where the answer starts.

    Raises BadSample when the prompt leaves no room for an answer, ValueError when it holds a box without area.
    """
    # A sample with a label is a prompt without a target: a question, for both kinds of decoder.
    text = encode_sample(Sample(tuple(segments), label=0), codec, sys.maxsize, room.encoder_decoder)
    if room.text is not None and len(text.tokens) >= room.text:
        raise BadSample(f"the prompt is longer than {room.text - 1} tokens, what the model has room for")
    return text


def until_eos(ids: Sequence[int], eos_id: int) -> list[int]:
    ids = list(ids)
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def generate(
    run_dir: Path, image: Path, prompt: Sequence[str], *, as_json: bool, draw: Path | None, ema: bool
) -> int:
    """The `generate` command: prints the answer to one prompt, put into no template, and its boxes in the answer.

    prompt: what was said so far, questions and answers in turn.
    """
    from dsvlm.eval.load import load_decoder, load_run

    asked = spoken_segments(prompt)
    try:
        data = Path(image).read_bytes()
    except OSError as error:
        raise ValueError(f"image {image}: {error.strerror}") from None
    recipe, codec, model = load_run(run_dir, "ema" if ema else "weights")
    try:
        pixels = load_decoder(run_dir, recipe, model)(data)
    except BadSample as error:
        raise ValueError(f"image {image}: {error.reason}") from None
    question = ((Image(), *asked), pixels)
    [answer] = answers(model, codec, [question], recipe.eval.max_new_tokens, 1)
    boxes = decode_boxes(answer, codec.bins)
    size = image_size(data)
    if draw is not None:
        draw_boxes(data, boxes, draw)
    if as_json:
        print(json.dumps({"answer": answer, "boxes": [describe(box, size) for box in boxes]}))
        return 0
    print(answer)
    for box in boxes:
        pixel = describe(box, size)["pixels"]
        print(f"box {' '.join(f'{v:.4f}' for v in box)}  pixels {' '.join(map(str, pixel))}")
    return 0


def describe(box: Box, size: tuple[int, int]) -> dict:
    """A box as shares of the image and in pixels of the file, both x0, y0, x1, y1."""
    return {"box": list(box), "pixels": in_pixels(box, size)}


def in_pixels(box: Box, size: tuple[int, int]) -> list[int]:
    width, height = size
    return [round(v * length) for v, length in zip(box, (width, height, width, height), strict=True)]


def image_size(data: bytes) -> tuple[int, int]:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return image.size


def draw_boxes(data: bytes, boxes: Sequence[Box], path: Path) -> None:
    """Writes the image with boxes drawn on it; small images are enlarged so that lines stay thin."""
    from PIL import Image, ImageDraw

    with Image.open(io.BytesIO(data)) as opened:
        image = to_rgb(opened)
    scale = max(1, 320 // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for box in boxes:
        pen.rectangle(in_pixels(box, image.size), outline=(255, 0, 200), width=max(2, max(image.size) // 200))
    try:
        image.save(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"--draw {path}: cannot write the image ({error})") from None
