"""From an image and a prompt to what `GitVlm.generate` takes, and back to text: needs the exported folder alone."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsvlm.data.boxes import decode_boxes
from dsvlm.data.sample import Box, Image
from dsvlm.data.tokenizer import TextCodec, load_tokenizer, spoken_segments
from dsvlm.data.transforms import make_decoder, to_rgb
from dsvlm.eval.generate import Room, question_batch, until_eos

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

SETTINGS = "preprocessor_config.json"


@dataclass(frozen=True)
class ProcessorSettings:
    """image_size: pixels of the square image; bins: location tokens; text_room, encoder_decoder: as in `Room`.

    dct_scaling: whether the run had large JPEGs decoded at a part of their size, which changes pixels; older folders do
    not say it.
    """

    image_size: int
    bins: int
    text_room: int | None
    encoder_decoder: bool
    max_new_tokens: int
    dct_scaling: bool = False


class GitProcessor:
    """Image and text in, tensors out; ids in, text and boxes out.

    Pillow decodes the images, whatever decoder the run had: it is there wherever the folder is used. JPEGs that were
    decoded by another one may differ in single pixels by a few of 255 steps.

        inputs = processor("photo.jpg", "where is the red square?")
        text = processor.decode(model.generate(**inputs)[0])
    """

    def __init__(self, codec: TextCodec, settings: ProcessorSettings):
        self.codec, self.settings = codec, settings

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> GitProcessor:
        """Reads an exported folder; ValueError when it is none."""
        from transformers import AutoConfig

        from dsvlm.model.git import GitVlmConfig

        # loading a tokenizer, transformers looks at config.json beside it and warns of a model type it does not know
        AutoConfig.register(GitVlmConfig.model_type, GitVlmConfig, exist_ok=True)
        path = Path(directory) / SETTINGS
        if not path.is_file():
            raise ValueError(f"{directory} holds no {SETTINGS}; give a folder that dsvlm export wrote")
        entries = json.loads(path.read_text())
        settings = ProcessorSettings(**{k: v for k, v in entries.items() if k != "processor_class"})
        return cls(load_tokenizer(directory, settings.bins), settings)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the tokenizer and the settings."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.codec.save(directory)
        settings = {"processor_class": type(self).__name__, **asdict(self.settings)}
        (Path(directory) / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    def __call__(
        self, image: str | Path | bytes | PilImage, prompt: str | Sequence[str], max_new_tokens: int | None = None
    ) -> dict:
        """The arguments of `GitVlm.generate` for one image and prompt.

        image: a path, encoded bytes, or a Pillow image. prompt: text, or what was said in a conversation so far,
        questions and answers in turn. Tensors are on the CPU, with a batch of one row: pixels
        [1, 3, P, P] uint8, image_row [1], tokens [1, L], lengths [1] int64; max_new_tokens and eos_id are integers.
        """
        settings = self.settings
        pixels = make_decoder("pillow", settings.image_size, settings.dct_scaling)(encoded(image))
        room = Room(settings.text_room, settings.encoder_decoder)
        question = ((Image(), *spoken_segments(prompt)), pixels)
        batch = question_batch(self.codec, [question], room, settings.image_size)
        limit = settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        return {
            "pixels": batch.pixels, "image_row": batch.image_row, "tokens": batch.tokens, "lengths": batch.lengths,
            "max_new_tokens": room.answer(batch.tokens.shape[1], limit), "eos_id": self.codec.eos_id,
        }  # fmt: skip

    def decode(self, ids) -> str:
        """One answer's text, location tokens kept.

        ids: [T] int64, or a list of integers.
        """
        return self.codec.decode(until_eos([int(i) for i in ids], self.codec.eos_id))

    def boxes(self, text: str) -> list[Box]:
        """The boxes in an answer, x0 y0 x1 y1 as shares of the image's width and height."""
        return decode_boxes(text, self.codec.bins)


def encoded(image: str | Path | bytes | PilImage) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).read_bytes()
        except OSError as error:
            raise ValueError(f"image {image}: {error.strerror}") from None
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, "PNG")  # one way in, so that every image is prepared alike
    return buffer.getvalue()
