"""What a recipe's model begins with: checkpoints of others, and an earlier run of one's own.

They are part of a run by what is in them, wherever they lie.
"""

import json
from pathlib import Path

from dsvlm.config import Recipe, read_raw
from dsvlm.data.checksum import crc32
from dsvlm.data.tokenizer import TextCodec, load_tokenizer
from dsvlm.train.build import head_sizes, make_model
from dsvlm.train.checkpoint import complete_checkpoints, is_complete, read_tensors

PIECE = 2**24  # bytes read at a time
START, EARLIER = "model.start_from", " of its start"  # fields of run.json


def begin_model(recipe: Recipe, codec: TextCodec, trains: bool = True, record: dict | None = None):
    """The recipe's model as its run begins: `make_model`, then the weights of `model.start_from`.

    record: what run.json says that the run began with (`contents`), default: whatever is there now.
    Raises ValueError when they are of another vocabulary, or one of them has no place in the model.
    """
    starts = list(start_checkpoints(recipe.model.start_from, record).values())
    model = make_model(recipe, codec, trains, begun=set().union(*map(names_of, starts)))
    if not starts:
        return model
    tokenizer = starts[0].parents[1] / "tokenizer"
    if not tokenizer.is_dir() or load_tokenizer(tokenizer, recipe.text.bins).hash() != codec.hash():
        raise ValueError(f"{START}: it has another vocabulary than this run; set text.tokenizer: {tokenizer}")
    for checkpoint in reversed(starts):
        if trains:
            check_heads(recipe, checkpoint)
        put_weights(model, checkpoint)
    return model


def put_weights(model, checkpoint: Path) -> None:
    """Puts an earlier run's trained weights into a model, which must have a place for each."""
    places = {plain(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in read_tensors(checkpoint, "weights"):
        place = places.get(plain(name))
        if place is None or place.shape != tensor.shape:
            found = "no such parameter" if place is None else f"there the shape {list(place.shape)}"
            raise ValueError(
                f"model.start_from: {checkpoint} holds {name} {list(tensor.shape)}, and this model has {found}: it "
                "must have all that was trained there (tasks with heads, experts, adapters and sizes alike)"
            )
        place.data.copy_(tensor)


def plain(name: str) -> str:
    """A parameter's name without LoRA: what has been wrapped since goes by its old name."""
    return name.replace(".base_layer.", ".")


def names_of(checkpoint: Path) -> set[str]:
    """Plain names of the parameters that a checkpoint holds."""
    from safetensors import SafetensorError, safe_open

    names = set()
    for path in checkpoint.glob("weights-*.safetensors"):
        try:
            with safe_open(path, framework="pt") as tensors:
                names.update(map(plain, tensors.keys()))
        except SafetensorError as error:
            raise ValueError(f"{START}: {path} is damaged ({error}); restore it, or give another checkpoint") from error
    return names


def check_heads(recipe: Recipe, checkpoint: Path) -> None:
    """ValueError when a task's head was another one of the bank: heads are known by their number alone."""
    path = checkpoint.parents[1] / "recipe.yaml"
    tasks = read_raw(path)["tasks"] if path.is_file() else {}
    before, now = [name for name, task in tasks.items() if task["classes"]], list(head_sizes(recipe))
    for name in before:
        if name in now and now.index(name) != before.index(name):
            raise ValueError(
                f"{START}: {checkpoint} has the heads of {', '.join(before)} in this order, and now it is "
                f"{', '.join(now)}: {name} would begin with another task's head; give tasks of type pair in that order"
            )


def start_checkpoints(start_from: str | None, record: dict | None = None) -> dict[str, Path]:
    """The checkpoint to begin with, by its field; then, as that holds but what its run trained, those before it.

    record: as of `begin_model`. Runs of versions that knew the first one alone go on with that.
    """
    first = start_checkpoint(start_from)
    if first is None:
        return {}
    if record is not None and START + EARLIER not in record:
        return {START: first}
    return {START: first} | {field + EARLIER: path for field, path in starts_before(first.parents[1]).items()}


def starts_before(run_dir: Path) -> dict[str, Path]:
    """The checkpoints that an earlier run began with, where it has trained a part of its model alone."""
    path = run_dir / "recipe.yaml"
    model = read_raw(path)["model"] if path.is_file() else {}  # a checkpoint that was copied with its tokenizer alone
    if model.get("start_from") is None or not (model["freeze"] or model["lora"]):
        return {}
    record = json.loads((run_dir / "run.json").read_text()).get("pretrained", {})
    found = start_checkpoints(model["start_from"], record)
    for field, checkpoint in found.items():
        if record.get(field) != crcs([checkpoint / "COMPLETE.json"]):
            raise ValueError(
                f"{START}: {run_dir} froze a part of what it began with, which is not in {checkpoint} any more: give "
                f"that run, as it was then, in {run_dir / 'recipe.yaml'}"
            )
    return found


def start_checkpoint(start_from: str | None) -> Path | None:
    """The checkpoint of an earlier run to begin with: one that is given, or the newest of a run that is."""
    if start_from is None:
        return None
    given = Path(start_from).resolve()
    found = [given] if is_complete(given) else complete_checkpoints(given)
    if not found:
        raise ValueError(
            f"{START}: {given} holds no complete checkpoint; give the directory of a run, or one of its "
            "checkpoints/step_..."
        )
    return found[-1]


def check_places(recipe: Recipe) -> None:
    """ValueError, naming the field, when a checkpoint that the recipe names is not there."""
    for field, directory in places(recipe).items():
        if not (directory / "config.json").is_file():
            raise ValueError(
                f"{field}: {directory} holds no config.json: give the local directory of a downloaded Hugging Face "
                "checkpoint; of a run that has been moved, RUN/recipe.yaml has the field"
            )
    start_checkpoint(recipe.model.start_from)


def contents(recipe: Recipe, record: dict | None = None) -> dict[str, dict[str, str]]:
    """crc32 of the files that decide what the model begins with, by the recipe's field; record: as of `begin_model`."""
    from dsvlm.model.build import PREPROCESSOR, has_own_statistics

    check_places(recipe)
    files = {field: weights_of(directory) for field, directory in places(recipe).items()}
    tower = recipe.model.vision.pretrained
    if tower and has_own_statistics(tower):
        files["model.vision.pretrained"].append(Path(tower) / PREPROCESSOR)
    for field, checkpoint in start_checkpoints(recipe.model.start_from, record).items():
        files[field] = [checkpoint / "COMPLETE.json"]  # which has the sha256 of the others
    return {field: crcs(paths) for field, paths in files.items()}


def crcs(paths: list[Path]) -> dict[str, str]:
    return {path.name: f"{crc_of(path):08x}" for path in paths}


def check_contents(recipe: Recipe, record: dict[str, dict[str, str]] | None) -> dict[str, dict[str, str]]:
    """What `contents` gives; ValueError naming the file when it is not what a run's record says, if there is one.

    Frozen weights are in no checkpoint of the run: with others it would be another run, without a word.
    """
    found = contents(recipe, record)
    for field, files in found.items() if record is not None else ():
        known = record.get(field, {})
        changed = sorted(name for name in known | files if known.get(name) != files.get(name))
        if changed:
            name = changed[0]
            remedy = "give the checkpoint that it was" if name in known else "take it away: the run began without it"
            raise ValueError(
                f"{field}: {name} is not the file that the run began with (crc32 {known.get(name, 'of none')}, now "
                f"{files.get(name, 'of none')}): {remedy}"
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
