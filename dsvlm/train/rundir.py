"""The run directory: what is written at a first start, and what a later start must find unchanged."""

import fcntl
import json
import shutil
from pathlib import Path

import yaml

from dsvlm.config import BY_CONTENT, LOCAL_FILES, Recipe, parse_recipe, read_raw
from dsvlm.config_checks import check_room
from dsvlm.data.files import write_file
from dsvlm.data.tokenizer import TextCodec, load_tokenizer
from dsvlm.data.transforms import check_decoder, resolve_decoder
from dsvlm.schedule.plan import SCHEDULE_VERSION
from dsvlm.train.build import Planned, make_tokenizer, manifest_record
from dsvlm.train.checkpoint import complete_checkpoints, read_state
from dsvlm.train.pretrained import check_contents, check_places, crcs

KEPT = {"recipe", "manifests", "format"}  # what run.json has always held


def lock_run(run_dir: Path):
    """Holds the run directory for this training; the file to keep open.

    Raises ValueError when another training is writing there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = open(run_dir / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(
            f"output: another training is running in {run_dir}; wait for its end, ask it to save and end (touch "
            f"{run_dir}/STOP), or set output to another directory"
        ) from None
    except OSError:
        pass  # a file system without locks: nothing can be known about other trainings
    return lock


def prepare_run(planned: Planned, ranks: int = 1) -> None:
    """Rank 0's first act: writes recipe, identity and tokenizer, or checks that the run that is there has the same.

    ranks: of this start. Raises ValueError naming each field that differs.
    """
    recipe, run_dir = planned.recipe, planned.recipe.run_dir
    begun = has_begun(run_dir)
    if begun:
        check_same_run(planned)
        check_same_ranks(recipe, ranks)
        check_same_tokenizer(recipe)
    check_new_run(recipe)
    decoder = run_decoder(planned)
    saved = read_run(run_dir) if begun else {}
    pretrained, tokenizer = check_contents(recipe, saved.get("pretrained") if begun else None), saved.get("tokenizer")
    if not begun:
        codec = make_tokenizer(planned)
        shutil.rmtree(run_dir / "tokenizer", ignore_errors=True)  # of a start that failed before its first update
        save_tokenizer(codec, recipe.text.tokenizer, run_dir / "tokenizer")
        tokenizer = crcs(sorted(path for path in (run_dir / "tokenizer").iterdir() if path.is_file()))
    # At every start: execution settings, such as where shards lie and are evaluated, may have changed.
    write_file(run_dir / "recipe.yaml", yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
    # Last: a directory without run.json is one that was never started.
    record = identity_of(planned) | {"decoder": decoder}
    if pretrained:
        record["pretrained"] = pretrained
    if tokenizer:  # runs of older versions do not say it
        record["tokenizer"] = tokenizer
    if units_couple(recipe):
        record["ranks"] = ranks
    write_file(run_dir / "run.json", json.dumps(record, indent=1, sort_keys=True).encode())


def save_tokenizer(codec: TextCodec, origin: str, directory: Path) -> None:
    """Keeps a tokenizer; origin: the directory that it is from, or `train`.

    Transformers does not write all that it reads: of a LLaMA tokenizer with `legacy: true` it forgets that, and the
    copy would split texts in another way. Then the files are kept as they are.
    """
    try:
        codec.save(directory)
    except Exception as error:  # the tokenizers library knows no other
        raise OSError(f"{directory} cannot be written: {error}") from None
    if load_tokenizer(directory, codec.bins).hash() != codec.hash():
        for path in Path(origin).iterdir():
            if path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json"):
                shutil.copyfile(path, directory / path.name)
        if load_tokenizer(directory, codec.bins).hash() != codec.hash():
            raise ValueError(f"text.tokenizer: a copy of {origin} is another tokenizer; save it again by Transformers")


def has_begun(run_dir: Path) -> bool:
    """Whether there is anything to go on with; a start that failed before its first update may be corrected."""
    lines = run_dir / "metrics.jsonl"
    told = lines.exists() and lines.stat().st_size > 0
    return (run_dir / "run.json").exists() and (told or bool(complete_checkpoints(run_dir)))


def read_run(run_dir: Path) -> dict:
    """run.json, empty when there is none; ValueError when it is damaged."""
    path = run_dir / "run.json"
    try:
        record = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        record = error
    if not isinstance(record, dict) or path.exists() and not record.keys() >= KEPT:
        raise ValueError(
            f"{path} is damaged: it holds no JSON object with {', '.join(sorted(KEPT))}; restore it, or set output to "
            "another directory"
        )
    return record


def run_decoder(planned: Planned) -> str:
    """The decoder of a run: the recipe's, or what `auto` stood for at the run's first start.

    Raises ValueError when it is not installed here.
    """
    return decoder_of(planned.recipe, planned.recipe.run_dir)


def decoder_of(recipe: Recipe, run_dir: Path) -> str:
    """The same, of a run that may have been moved."""
    path, name = run_dir / "run.json", recipe.data.decoder
    if name == "auto" and path.exists():
        name = read_run(run_dir).get("decoder", "pillow")  # runs that do not say it are older than others
    name = resolve_decoder(name)
    check_decoder(name)
    return name


def identity_of(planned: Planned) -> dict:
    """What run.json holds: all that makes a run this run."""
    return {
        "recipe": planned.recipe.identity(),
        "manifests": manifest_record(planned.manifests),
        "format": {"schedule": SCHEDULE_VERSION},
    }


def units_couple(recipe: Recipe) -> bool:
    """Whether samples of a unit compete for experts, so that the number of ranks, which cut units, is part of a run."""
    return recipe.model.moe is not None and recipe.model.moe.group == "unit"


def check_same_ranks(recipe: Recipe, ranks: int) -> None:
    path = recipe.run_dir / "run.json"
    if not units_couple(recipe) or not path.exists():
        return
    began = read_run(recipe.run_dir)["ranks"]
    if began != ranks:
        raise ValueError(
            f"{recipe.run_dir}: began on {began} ranks, now {ranks}: with model.moe.group unit, images compete for "
            f"experts with those that share their unit, which the number of ranks decides. Go on with {began} ranks"
        )


def check_same_tokenizer(recipe: Recipe) -> None:
    """Raises ValueError when the recipe's tokenizer is not the run's, which has a copy and can do without."""
    directory = recipe.text.tokenizer
    if directory == "train" or not Path(directory).is_dir():
        return
    kept = load_own_tokenizer(recipe.run_dir, recipe.text.bins)
    if load_tokenizer(directory, recipe.text.bins).hash() != kept.hash():
        raise ValueError(
            f"text.tokenizer: {directory} is not the tokenizer that {recipe.run_dir} began with: give that one, or the "
            f"copy, {recipe.run_dir / 'tokenizer'}, or set output to another directory"
        )


def check_start(planned: Planned) -> None:
    """What can be said before ranks start: ValueError when a checkpoint is missing or the run that is there differs."""
    check_places(planned.recipe)
    check_new_run(planned.recipe)
    if has_begun(planned.recipe.run_dir):
        check_same_run(planned)


def check_new_run(recipe: Recipe) -> None:
    """What is asked of a recipe whose run has not begun, beside what is asked of every one."""
    if not has_begun(recipe.run_dir):
        check_room(recipe)


def check_same_run(planned: Planned) -> None:
    """Raises ValueError, naming each field that differs, when the run directory holds another run."""
    run_dir, now = planned.recipe.run_dir, identity_of(planned)
    if not (run_dir / "run.json").exists():
        return
    saved = read_run(run_dir)
    if known_by_path(saved):
        raise ValueError(
            f"{run_dir}: begun by a version that knew checkpoints and tokenizers by their paths, and cannot go on; "
            f"another run may begin with its weights (model.start_from: {run_dir})"
        )
    remedies = {
        "recipe": "recipe or --set",
        "manifests": "data.root or the tasks' shards",
        "format": "version of dsvlm that began it",
    }
    for kind, fix in remedies.items():
        # As text, for 0 is not 0.0 to the identity; what an earlier version did not know is None.
        was, own = ({key: json.dumps(of[kind].get(key), sort_keys=True) for key in saved[kind] | now[kind]}
                    for of in (saved, now))  # fmt: skip
        changed = sorted(key for key in was if was[key] != own[key])
        if changed:
            shown = "; ".join(f"{k}: was {saved[kind].get(k)!r}, now {now[kind].get(k)!r}" for k in changed[:5])
            what = "the manifest of task " if kind == "manifests" else ""
            raise ValueError(
                f"{run_dir} holds another run: {what}{shown}. To go on with it, restore the {fix}; "
                "to start afresh, set output to another directory"
            )
    check_same_order(planned)


def check_same_order(planned: Planned) -> None:
    """Raises ValueError when the run's checkpoints are of other windows, with all that has a name unchanged.

    Windows, and the bank of heads, hold the tasks in the recipe's order, which the identity of a checkpoint knows.
    """
    run_dir, checkpoints = planned.recipe.run_dir, complete_checkpoints(planned.recipe.run_dir)
    if checkpoints and read_state(checkpoints[-1]).identity != planned.identity.hex():
        raise ValueError(
            f"{run_dir} holds another run: its tasks were in another order, and so were the samples of its windows; "
            f"now it is {', '.join(planned.recipe.tasks)}. To go on with it, restore the order of tasks, which "
            f"{run_dir / 'recipe.yaml'} has; to start afresh, set output to another directory"
        )


def known_by_path(saved: dict) -> bool:
    """Whether a run is older than `BY_CONTENT`, and would be another one to the checks of its digests."""
    kept = (saved["recipe"].get(field) for field in BY_CONTENT)
    return any(value not in (None, "train", LOCAL_FILES) for value in kept)


def open_run(planned: Planned) -> tuple[TextCodec, Path | None]:
    """Every rank's view of a prepared run: its tokenizer and its latest complete checkpoint."""
    recipe = planned.recipe
    checkpoints = complete_checkpoints(recipe.run_dir)
    return load_own_tokenizer(recipe.run_dir, recipe.text.bins), checkpoints[-1] if checkpoints else None


def load_own_tokenizer(run_dir: Path, bins: int) -> TextCodec:
    """The run's copy of its tokenizer; ValueError when it is gone, or is not what was written."""
    if not (run_dir / "tokenizer").is_dir():
        raise ValueError(f"{run_dir}/tokenizer is gone, and with it the run's vocabulary; restore it from a copy")
    for name, crc in read_run(run_dir).get("tokenizer", {}).items():
        path = run_dir / "tokenizer" / name
        if not path.is_file() or crcs([path])[name] != crc:
            raise ValueError(f"{path} is not the file that the run began with; restore it from a copy")
    return load_tokenizer(run_dir / "tokenizer", bins)


def read_recipe(run_dir: Path) -> Recipe:
    """The recipe of a run, with its output pointing at where the run lies now."""
    path = Path(run_dir) / "recipe.yaml"
    if not path.exists():
        raise ValueError(f"{run_dir} is not a run: it has no recipe.yaml; give the directory that dsvlm train wrote")
    return parse_recipe(read_raw(path) | {"output": str(run_dir)})
