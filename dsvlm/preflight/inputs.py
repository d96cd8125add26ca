"""What a look at a recipe's samples needs before there is a run: its vocabulary and the size of its images."""

from dataclasses import dataclass
from pathlib import Path

from dsvlm.config import Recipe
from dsvlm.data.tokenizer import TextCodec, load_tokenizer
from dsvlm.train.build import Planned, make_tokenizer
from dsvlm.train.rundir import check_same_run


@dataclass(frozen=True)
class ImageShape:
    """pixels: of a side; tokens: positions that an image takes in a row."""

    pixels: int
    tokens: int


def image_shape(recipe: Recipe) -> ImageShape:
    """What the vision tower makes of an image, from its settings alone."""
    from transformers import CLIPVisionConfig

    vision = recipe.model.vision
    if vision.pretrained is None:
        settings = CLIPVisionConfig(**vision.config)
    elif Path(vision.pretrained).is_dir():
        settings = CLIPVisionConfig.from_pretrained(vision.pretrained)
    else:
        raise ValueError(f"model.vision.pretrained: {vision.pretrained!r} is not a directory; download it first")
    return ImageShape(settings.image_size, (settings.image_size // settings.patch_size) ** 2 + 1)


def open_codec(planned: Planned, directory: str | None = None) -> tuple[TextCodec, str]:
    """The vocabulary that the run will use, and where it is from: a directory, the run's own, or trained now."""
    recipe = planned.recipe
    if directory is not None:
        return load_tokenizer(directory, recipe.text.bins), directory
    if recipe.text.tokenizer != "train":
        return make_tokenizer(planned), recipe.text.tokenizer
    own = recipe.run_dir / "tokenizer"
    if own.is_dir() and is_same_run(planned):
        return load_tokenizer(own, recipe.text.bins), str(own)
    return make_tokenizer(planned), "trained on the shards, as the run will"


def is_same_run(planned: Planned) -> bool:
    try:
        check_same_run(planned)
    except ValueError:
        return False
    return True
