"""What a look at a recipe's samples needs before there is a run: its vocabulary and the size of its images."""

from dataclasses import dataclass

from dsvlm.config import Recipe
from dsvlm.data.tokenizer import TextCodec, load_tokenizer
from dsvlm.train.build import Planned, make_tokenizer
from dsvlm.train.lengths import image_tokens, vision_settings
from dsvlm.train.rundir import check_same_run


@dataclass(frozen=True)
class ImageShape:
    """pixels: of a side; tokens: positions that an image takes in a row."""

    pixels: int
    tokens: int


def image_shape(recipe: Recipe) -> ImageShape:
    """What the vision tower makes of an image, from its settings alone."""
    return ImageShape(vision_settings(recipe).image_size, image_tokens(recipe))


def open_codec(planned: Planned, directory: str | None = None) -> tuple[TextCodec, str]:
    """The vocabulary that the run will use, and where it is from: a directory, the run's own, or trained now."""
    if directory is not None:
        return load_tokenizer(directory, planned.recipe.text.bins), directory
    place = known_tokenizer(planned)
    if place is None:
        return make_tokenizer(planned), "trained on the shards, as the run will"
    return load_tokenizer(place, planned.recipe.text.bins), place


def known_tokenizer(planned: Planned) -> str | None:
    """Directory of the run's vocabulary: the recipe's, or the one that a start has trained; None = not made yet."""
    if planned.recipe.text.tokenizer != "train":
        return planned.recipe.text.tokenizer
    own = planned.recipe.run_dir / "tokenizer"
    return str(own) if own.is_dir() and is_same_run(planned) else None


def is_same_run(planned: Planned) -> bool:
    try:
        check_same_run(planned)
    except ValueError:
        return False
    return True
