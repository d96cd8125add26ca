"""A checkpoint is there whole or not at all, wherever a kill strikes."""

import json
import resource
import shutil
import signal
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.resume import unlike
from dsvlm.data.files import write_file
from dsvlm.schedule.controller import Controlled, StopAndGo
from dsvlm.schedule.mixture import Phase
from dsvlm.train.build import hash_of
from dsvlm.train.checkpoint import (
    RunState,
    begin,
    complete_checkpoints,
    directory_of,
    entry_of,
    is_complete,
    load_weights,
    read_state,
    read_tensors,
    remove_old,
    write_tensors,
)

STATE = RunState(step=8, seed=1, identity="ab", schedule_version=1, manifests="cd", bad=2, seen=64)


class Scaled(torch.nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = torch.nn.Parameter(torch.ones(1))


def write_checkpoint(run_dir, step, complete=True):
    """What two ranks write for a linear layer."""
    directory = directory_of(run_dir, step)
    directory.mkdir(parents=True)
    write_file(directory / "state.json", json.dumps(asdict(STATE)).encode())
    save_file({"weight": torch.full((2, 3), float(step))}, directory / "weights-00000-of-00002.safetensors")
    save_file({"bias": torch.arange(2.0)}, directory / "weights-00001-of-00002.safetensors")
    if complete:
        files = {path.name: entry_of(path) for path in sorted(directory.iterdir())}
        write_file(directory / "COMPLETE.json", json.dumps({"format": 1, "step": step, "files": files}).encode())
    return directory


def sealed_state(directory):
    """The state of a checkpoint that holds nothing else."""
    write_file(
        directory / "COMPLETE.json", json.dumps({"files": {"state.json": entry_of(directory / "state.json")}}).encode()
    )
    return read_state(directory)


def test_a_state_that_was_changed_is_no_state(tmp_path):
    """Of the same size, and so of a checkpoint that looks complete: an update would be left out."""
    directory = write_checkpoint(tmp_path, 8)
    text = (directory / "state.json").read_text()
    (directory / "state.json").write_text(text.replace('"step": 8', '"step": 9'))
    assert is_complete(directory)
    with pytest.raises(ValueError, match="state.json is not the file that was written; remove the checkpoint"):
        read_state(directory)
    (directory / "COMPLETE.json").write_text("[]")
    assert not is_complete(directory)


def test_latest_complete_one_is_last(tmp_path):
    assert complete_checkpoints(tmp_path) == []
    written = [write_checkpoint(tmp_path, step) for step in (8, 24, 16, 100_000_000)]
    assert complete_checkpoints(tmp_path) == [written[i] for i in (0, 2, 1, 3)]
    assert read_state(written[0]) == STATE


def test_copies_by_other_names_are_no_part_of_the_run(tmp_path):
    """They sort behind the newest: the run would go on from them, be evaluated by them, and take them away."""
    written = [write_checkpoint(tmp_path, step) for step in (8, 16, 24)]
    for name in ("step_best", "step_00000008.bak"):
        shutil.copytree(written[0], written[0].with_name(name))
    assert complete_checkpoints(tmp_path) == written
    remove_old(tmp_path, keep=1)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000008.bak", "step_00000024", "step_best"]


@pytest.mark.parametrize("steps, phases, limit", [(10**12, 0, 400), (10**7, 1, 1024), (10**6, 20, 1024)])
def test_state_is_small(tmp_path, steps, phases, limit):
    """64 tasks or any number, shards and steps; under stop-and-go no two of 64 tasks are alike in anything."""
    state = RunState(
        step=steps, seed=2**63 - 1, identity="f" * 64, schedule_version=1, manifests=hash_of({"caption": "cd"}),
        bad=steps, seen=1000 * steps,
    )  # fmt: skip
    if phases:
        drawn = np.random.default_rng(phases)
        shares = [Phase(1000 * index, tuple(drawn.integers(1, 2000, 64).tolist())) for index in range(phases)]
        control = Controlled(shares, StopAndGo())
        control.state = unlike(control, steps, drawn)
        state = replace(state, controller=control.pack())
        again = Controlled(shares, StopAndGo())
        again.restore(state.controller, control.state.start)
        assert again.state.start == steps and np.array_equal(again.state.tasks, control.state.tasks)
    begin(tmp_path / "step", state)
    assert (tmp_path / "step/state.json").stat().st_size < limit
    assert sealed_state(tmp_path / "step") == state


def test_skipped_updates_are_written(tmp_path):
    state = replace(STATE, skipped=3)
    begin(tmp_path / "step", state)
    assert sealed_state(tmp_path / "step") == state and state.applied == 5


def test_state_of_an_older_version(tmp_path):
    """The first versions listed each task's manifest, and knew neither controllers nor skipped updates."""
    old = {"step": 8, "seed": 1, "identity": "ab", "schedule_version": 1, "manifests": {"caption": "cd"}, "bad": 2,
           "seen": 64}  # fmt: skip
    (tmp_path / "state.json").write_text(json.dumps(old))
    assert sealed_state(tmp_path) == RunState(8, 1, "ab", 1, hash_of({"caption": "cd"}), 2, 64, "", 0)


def test_killed_before_the_mark(tmp_path):
    whole = write_checkpoint(tmp_path, 8)
    write_checkpoint(tmp_path, 16, complete=False)
    assert complete_checkpoints(tmp_path) == [whole]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, empty, lambda path: path.unlink()], ids=["truncated", "empty", "gone"])
@pytest.mark.parametrize("name", ["COMPLETE.json", "state.json", "weights-00001-of-00002.safetensors"])
def test_files_that_are_not_whole(tmp_path, name, damage):
    """As after a power cut, when names reach the disk before bytes."""
    whole, broken = write_checkpoint(tmp_path, 8), write_checkpoint(tmp_path, 16)
    assert is_complete(broken)
    damage(broken / name)
    assert complete_checkpoints(tmp_path) == [whole]


def test_killed_while_old_ones_are_removed(tmp_path):
    """The mark goes first: what is left of a removal counts for nothing."""
    old, new = write_checkpoint(tmp_path, 8), write_checkpoint(tmp_path, 16)
    (old / "COMPLETE.json").unlink()
    assert complete_checkpoints(tmp_path) == [new]


def test_changed_bytes_of_the_same_size_are_refused(tmp_path):
    directory = write_checkpoint(tmp_path, 8)
    path = directory / "weights-00000-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="weights-00000-of-00002.safetensors is not the file that was written"):
        dict(read_tensors(directory, "weights"))


def test_weights_of_all_ranks_are_read_into_a_model(tmp_path):
    directory = write_checkpoint(tmp_path, 8)
    model = torch.nn.Linear(3, 2)
    load_weights(model, directory)
    assert model.weight.eq(8).all()
    assert model.bias.tolist() == [0, 1]
    with pytest.raises(ValueError, match="it holds no ema"):
        dict(read_tensors(directory, "ema"))


def test_weights_of_another_model_are_refused(tmp_path):
    directory = write_checkpoint(tmp_path, 8)
    with pytest.raises(ValueError, match="no trainable bias"):
        load_weights(torch.nn.Linear(3, 2, bias=False), directory)
    with pytest.raises(ValueError, match="it lacks scale"):
        load_weights(Scaled(3, 2), directory)
    with pytest.raises(ValueError, match=r"weight .*\[2, 3\], the model's \[2, 5\]"):
        load_weights(torch.nn.Linear(5, 2), directory)


def test_old_checkpoints_and_halves_go_the_newest_stay(tmp_path):
    for step in (8, 16, 24, 32):
        write_checkpoint(tmp_path, step, complete=step != 16)
    half = write_checkpoint(tmp_path, 40, complete=False)  # being written by somebody, or about to be overwritten
    remove_old(tmp_path, keep=2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_00000024", "step_00000032", half.name]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    """The library's own error is none that ranks tell each other of."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    begin(tmp_path / "step", STATE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="weights-00000-of-00001.safetensors cannot be written: .*make room"):
            write_tensors(tmp_path / "step", "weights", {"weight": torch.zeros(2**14)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["state.json"]


def test_who_may_read_one_file_may_read_all(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    begin(tmp_path / "step", STATE)
    write_tensors(tmp_path / "step", "weights", {"weight": torch.zeros(2)})
    assert len({path.stat().st_mode for path in (tmp_path / "step").iterdir()}) == 1
