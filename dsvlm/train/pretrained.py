"""What a recipe's model begins with: checkpoints of others, and an earlier run of one's own.

They are part of a run by what is in them, wherever they lie.
"""

import json
from pathlib import Path

import yaml

from dsvlm.config import Recipe
from dsvlm.data.checksum import crc32
from dsvlm.data.tokenizer import TextCodec, load_tokenizer
from dsvlm.train.build import make_model
from dsvlm.train.checkpoint import complete_checkpoints, is_complete, read_tensors

PIECE = 2**24  # bytes read at a time
COMPLETE = "COMPLETE.json"


def begin_model(recipe: Recipe, codec: TextCodec, trains: bool = True):
    """The recipe's model as its run begins: `make_model`, then the weights of `model.start_from`.

    Raises ValueError when they are of another vocabulary, or one of them has no place in the model.
    """
    checkpoints = start_checkpoints(recipe)
    begun = set().union(*map(names_of, checkpoints))
    model = make_model(recipe, codec, trains, begun)
    if not checkpoints:
        return model
    tokenizer = checkpoints[0].parents[1] / "tokenizer"
    if not tokenizer.is_dir() or load_tokenizer(tokenizer, recipe.text.bins).hash() != codec.hash():
        raise ValueError(f"model.start_from: it has another vocabulary than this run; set text.tokenizer: {tokenizer}")
    places = {plain(name): parameter for name, parameter in model.named_parameters()}
    for checkpoint in reversed(checkpoints):  # what a later run has trained again is that run's
        for name, tensor in read_tensors(checkpoint, "weights"):
            place = places.get(plain(name))
            if place is None or place.shape != tensor.shape:
                found = "no such parameter" if place is None else f"there the shape {list(place.shape)}"
                raise ValueError(
                    f"model.start_from: {checkpoint} holds {name} {list(tensor.shape)}, and this model has {found}: it "
                    "must have all that was trained there (tasks with heads, experts, adapters and sizes alike)"
                )
            place.data.copy_(tensor)
    return model


def plain(name: str) -> str:
    """A parameter's name without LoRA: what has been wrapped since goes by its old name."""
    return name.replace(".base_layer.", ".")


def names_of(checkpoint: Path) -> set[str]:
    """Plain names of the parameters that a checkpoint holds."""
    from safetensors import safe_open

    names = set()
    for path in checkpoint.glob("weights-*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            names.update(map(plain, tensors.keys()))
    return names


def start_checkpoints(recipe: Recipe) -> list[Path]:
    """The checkpoints that a run begins with, the newest first: that of `model.start_from`, and what is beneath it.

    A run's checkpoint has nothing of what the run kept frozen: where an earlier one, with which it began in turn, had
    trained that, it is there.
    """
    if recipe.model.start_from is None:
        return []
    found = [start_checkpoint(recipe.model.start_from)]
    known, run_dir, seen = names_of(found[0]), found[0].parents[1], set()
    while run_dir not in seen and (given := began_with(run_dir)) is not None:
        seen.add(run_dir)
        try:
            checkpoint = start_checkpoint(given)
        except ValueError as error:
            raise ValueError(f"{error} ({run_dir}/recipe.yaml has it: that run began there)") from None
        record = json.loads((run_dir / "run.json").read_text()).get("pretrained", {}).get("model.start_from")
        if record and record[COMPLETE] != f"{crc_of(checkpoint / COMPLETE):08x}":
            raise ValueError(
                f"model.start_from: {checkpoint} is not what {run_dir} began with; set model.start_from in "
                f"{run_dir}/recipe.yaml to the checkpoint that it was"
            )
        if not (names := names_of(checkpoint)) <= known:
            found.append(checkpoint)
        known, run_dir = known | names, checkpoint.parents[1]
    return found


def start_checkpoint(given: str) -> Path:
    """The checkpoint of an earlier run to begin with: one that is given, or the newest of a run that is."""
    path = Path(given).resolve()
    found = [path] if is_complete(path) else complete_checkpoints(path)
    if not found:
        raise ValueError(
            f"model.start_from: {path} holds no complete checkpoint; give the directory of a run, or one of its "
            "checkpoints/step_..."
        )
    return found[-1]


def began_with(run_dir: Path) -> str | None:
    """The `model.start_from` of an earlier run; ValueError when its recipe is gone."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        raise ValueError(f"model.start_from: {run_dir} has no recipe.yaml, which says what it began with; restore it")
    return yaml.safe_load(path.read_text())["model"].get("start_from")


def check_places(recipe: Recipe) -> None:
    """ValueError, naming the field, when a checkpoint that the recipe names is not there."""
    for field, directory in places(recipe).items():
        if not (directory / "config.json").is_file():
            raise ValueError(
                f"{field}: {directory} holds no config.json: give the local directory of a downloaded Hugging Face "
                "checkpoint; of a run that has been moved, RUN/recipe.yaml has the field"
            )
    start_checkpoints(recipe)


def contents(recipe: Recipe) -> dict[str, dict[str, str]]:
    """crc32 of the files that decide what the model begins with, by the recipe's field."""
    from dsvlm.model.build import PREPROCESSOR, has_own_statistics

    check_places(recipe)
    files = {
        field: {path.name: path for path in weights_of(directory)} for field, directory in places(recipe).items()
    }
    tower = recipe.model.vision.pretrained
    if tower and has_own_statistics(tower):
        files["model.vision.pretrained"][PREPROCESSOR] = Path(tower) / PREPROCESSOR
    if checkpoints := start_checkpoints(recipe):  # of each the file that has the sha256 of the others
        files["model.start_from"] = {
            COMPLETE + " of a run before" * number: checkpoint / COMPLETE
            for number, checkpoint in enumerate(checkpoints)
        }
    return {field: {name: f"{crc_of(path):08x}" for name, path in named.items()} for field, named in files.items()}


def check_contents(recipe: Recipe, record: dict[str, dict[str, str]] | None) -> dict[str, dict[str, str]]:
    """What `contents` gives; ValueError naming the file when it is not what a run's record says, if there is one.

    Frozen weights are in no checkpoint of the run: with others it would be another run, without a word.
    """
    found = contents(recipe)
    for field, files in found.items() if record is not None else ():
        known = record.get(field, {})
        changed = sorted(name for name in known | files if known.get(name) != files.get(name))
        if changed:
            name = changed[0]
            raise ValueError(
                f"{field}: {name} is not the file that the run began with (crc32 {known.get(name, 'of none')}, now "
                f"{files.get(name, 'of none')}): give the checkpoint that it was"
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
