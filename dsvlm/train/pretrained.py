"""Checkpoints that a recipe begins from: they are part of a run by what is in them, wherever they lie."""

from pathlib import Path

from dsvlm.config import Recipe
from dsvlm.data.checksum import crc32

PIECE = 2**24  # bytes read at a time


def check_places(recipe: Recipe) -> None:
    """ValueError, naming the field, when a checkpoint that the recipe names is not there."""
    for field, directory in places(recipe).items():
        if not (directory / "config.json").is_file():
            raise ValueError(
                f"{field}: {directory} holds no config.json: give the local directory of a downloaded Hugging Face "
                "checkpoint; of a run that has been moved, RUN/recipe.yaml has the field"
            )


def contents(recipe: Recipe) -> dict[str, dict[str, str]]:
    """crc32 of the configuration and every file of weights of each checkpoint, by the recipe's field."""
    check_places(recipe)
    return {
        field: {path.name: f"{crc_of(path):08x}" for path in weights_of(directory)}
        for field, directory in places(recipe).items()
    }


def check_contents(recipe: Recipe, record: dict[str, dict[str, str]] | None) -> dict[str, dict[str, str]]:
    """What `contents` gives; ValueError naming the file when it is not what a run's record says.

    Frozen weights are in no checkpoint of the run: with others it would be another run, without a word. Runs without a
    record are older than it.
    """
    found = contents(recipe)
    for field, files in found.items() if record is not None else ():
        known = record.get(field, {})
        changed = sorted(name for name in known | files if known.get(name) != files.get(name))
        if changed:
            name = changed[0]
            raise ValueError(
                f"{field}: {name} in {places(recipe)[field]} is not the file that the run began with (crc32 "
                f"{known.get(name, 'of none')}, now {files.get(name, 'of none')}): give the checkpoint that it was"
            )
    return found


def places(recipe: Recipe) -> dict[str, Path]:
    parts = {"model.vision.pretrained": recipe.model.vision, "model.decoder.pretrained": recipe.model.decoder}
    return {field: Path(part.pretrained) for field, part in parts.items() if part.pretrained}


def weights_of(directory: Path) -> list[Path]:
    """The files that decide what is loaded: of several formats, safetensors is read."""
    weights = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    return [directory / "config.json", *weights]


def crc_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            crc = crc32(piece, crc)
    return crc
