"""Checkpoints: whole fp32 tensors in safetensors files, complete if and only if COMPLETE.json is there.

    checkpoints/step_00000500/
        state.json                    step, seed, identity: the same for every rank, and under 1 KB for any number of
                                      tasks (for 64 that a controller steers)
        weights-00000-of-00002.safetensors   what each rank wrote: masters, `NAME`
        exp_avg-..., exp_avg_sq-...   the optimizer's moments
        ema-...                       averaged weights, when the recipe keeps them
        COMPLETE.json                 names, sizes and sha256 of the files above, written last

Tensors are gathered one at a time and dealt to ranks as writers, so any number of ranks and any ZeRO stage can read
them again. Frozen weights are not saved: they come from where they came at the start.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsvlm.data.files import write_file
from dsvlm.train.build import hash_of
from dsvlm.train.fragments import STATES, gather, set_update_count, shape_of, trainable, write_fragment

FORMAT = 1


@dataclass(frozen=True)
class RunState:
    """Everything a run needs besides tensors.

    step: updates done; identity: hex of what makes the run this run; manifests: one hash of all of them (run.json has
    each task's); bad, seen: samples masked and drawn so far; controller: its packed state, or empty; skipped: those of
    the updates that changed nothing, for their gradients were no numbers.
    """

    step: int
    seed: int
    identity: str
    schedule_version: int
    manifests: str
    bad: int = 0
    seen: int = 0
    controller: str = ""
    skipped: int = 0

    @property
    def applied(self) -> int:
        """Updates that the optimizer has taken, by its own count."""
        return self.step - self.skipped


def directory_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def is_complete(directory: Path) -> bool:
    """Whether COMPLETE.json is there and every file it names has its size."""
    try:
        files = json.loads((directory / "COMPLETE.json").read_text())["files"]
        return all((directory / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return [directory for directory in begun_checkpoints(run_dir) if is_complete(directory)]


def begun_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints, whole or not, oldest first. A copy by another name, such as `step_best`, is no part of the run."""
    found = sorted((run_dir / "checkpoints").glob("step_*"))
    return [path for path in found if re.fullmatch("step_[0-9]{8,}", path.name)]


def save_checkpoint(engine, guard, ema, run_dir: Path, state: RunState, keep: int) -> Path:
    """Writes the checkpoint of a step on all ranks and removes those beyond `keep`; collective."""
    directory = directory_of(run_dir, state.step)
    guard.first(begin, directory, state)
    kinds: dict = {"weights": lambda name, p: gather(engine, p)}
    # Before it has taken its first update the optimizer holds no moments.
    moment = gather if state.applied else lambda engine, p, key: torch.zeros(shape_of(p))
    kinds |= {key: lambda name, p, key=key: moment(engine, p, key) for key in STATES}
    if ema is not None:
        kinds["ema"] = ema.gather
    written = {}
    for kind, whole in kinds.items():
        mine = my_share(engine, whole)
        written |= guard.together(write_tensors, directory, kind, mine)
    parts = guard.gather(written)
    guard.first(finish, directory, state, {name: entry for part in parts for name, entry in part.items()})
    guard.first(remove_old, run_dir, keep)
    return directory


def begin(directory: Path, state: RunState) -> None:
    if directory.exists():
        shutil.rmtree(directory)  # half a checkpoint of an earlier start
    directory.mkdir(parents=True)
    record = asdict(state)
    if not state.skipped:
        del record["skipped"]  # as in nearly all runs: the file must stay below 1 KB
    write_file(directory / "state.json", json.dumps(record, sort_keys=True, separators=(",", ":")).encode())


def my_share(engine, whole) -> dict[str, Tensor]:
    """Gathers every tensor on all ranks, one at a time, and keeps those that this rank writes; collective."""
    rank, mine = torch.distributed.get_rank(), {}
    by_size = sorted(trainable(engine), key=lambda item: -shape_of(item[1]).numel())  # so that shares are alike
    for index, (name, parameter) in enumerate(by_size):
        tensor = whole(name, parameter)
        assert tensor.shape == shape_of(parameter), f"{name}: {tensor.shape} is not the whole parameter"
        if index % engine.world_size == rank:
            mine[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return mine


def write_tensors(directory: Path, kind: str, tensors: dict[str, Tensor]) -> dict[str, dict]:
    """Writes this rank's file of one kind; its entry for COMPLETE.json, or none when it has no tensor."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not tensors:
        return {}
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    path = directory / f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors"
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary)
    except SafetensorError as error:  # of the system too: a disk that is full
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}; make room, or move the run directory") from None
    # safetensors lets their owner alone read its files; these are for whom the others of the checkpoint are for
    with suppress(PermissionError):  # of file systems without modes
        temporary.chmod((directory / "state.json").stat().st_mode)
    replace_durably(temporary, path)
    return {path.name: entry_of(path)}


def finish(directory: Path, state: RunState, files: dict[str, dict]) -> None:
    files = files | {"state.json": entry_of(directory / "state.json")}
    complete = {"format": FORMAT, "step": state.step, "files": files}
    write_file(directory / "COMPLETE.json", json.dumps(complete, indent=1, sort_keys=True).encode())
    if not is_complete(directory):
        raise ValueError(f"checkpoint {directory}: files are missing; is output a directory that all nodes share?")


def remove_old(run_dir: Path, keep: int) -> None:
    """Removes complete checkpoints but for the newest `keep`, and the halves that interrupted saves have left."""
    kept = complete_checkpoints(run_dir)[-keep:]
    for old in begun_checkpoints(run_dir):
        if old not in kept and old < kept[-1]:
            (old / "COMPLETE.json").unlink(missing_ok=True)  # first: an interrupted removal leaves no complete one
            shutil.rmtree(old)


def replace_durably(temporary: Path, path: Path) -> None:
    """Gives a finished file its final name once its bytes are on the disk."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


def entry_of(path: Path) -> dict:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def check_entry(directory: Path, name: str, files: dict[str, dict]) -> None:
    """ValueError unless a file is what COMPLETE.json says."""
    if entry_of(directory / name) != files[name]:
        raise ValueError(f"checkpoint {directory}: {name} is not the file that was written; remove the checkpoint")


def read_state(directory: Path) -> RunState:
    """The state of a complete checkpoint; ValueError when it is not the one that was written."""
    check_entry(directory, "state.json", json.loads((directory / "COMPLETE.json").read_text())["files"])
    state = json.loads((directory / "state.json").read_text())
    if isinstance(state["manifests"], dict):  # as the first versions wrote it: a hash of each task
        state["manifests"] = hash_of(state["manifests"])
    return RunState(**state)


def read_tensors(directory: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one kind (`weights`, `ema`, `exp_avg`, `exp_avg_sq`) one by one, their files' checksums checked.

    Raises ValueError naming the file that is missing or damaged.
    """
    from safetensors import safe_open

    files = json.loads((directory / "COMPLETE.json").read_text())["files"]
    names = sorted(name for name in files if name.startswith(f"{kind}-"))
    if not names:
        raise ValueError(f"checkpoint {directory}: it holds no {kind}")
    for name in names:
        check_entry(directory, name, files)
        with safe_open(directory / name, framework="pt") as tensors:
            for key in tensors.keys():
                yield key, tensors.get_tensor(key)


def load_weights(model, directory: Path, kind: str = "weights") -> None:
    """Puts a checkpoint's weights into a model that no engine has wrapped yet.

    Raises ValueError when names or shapes do not match exactly the model's trainable parameters.
    """
    missing = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in read_tensors(directory, kind):
        if name not in missing:
            raise ValueError(f"checkpoint {directory}: the model has no trainable {name}: it is of another model")
        parameter = missing.pop(name)
        if tensor.shape != parameter.shape:
            found, wanted = list(tensor.shape), list(parameter.shape)
            raise ValueError(f"checkpoint {directory}: {name} has the shape {found}, the model's {wanted}")
        parameter.data.copy_(tensor)
    if missing:
        raise ValueError(f"checkpoint {directory}: it lacks {', '.join(sorted(missing)[:3])}: it is of another model")


def load_optimizer(engine, ema, directory: Path, applied: int) -> None:
    """Sets masters, moments, their count of updates and averages of an engine whose optimizer state exists already."""
    parameters = dict(trainable(engine))
    for key in (None, *STATES):
        for name, tensor in read_tensors(directory, key or "weights"):
            write_fragment(engine, parameters[name], tensor, key)
    set_update_count(engine, applied)
    if ema is not None:
        for name, tensor in read_tensors(directory, "ema"):
            ema.load(name, tensor)
