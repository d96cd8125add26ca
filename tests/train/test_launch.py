"""Who am I: the launcher's variables, complete or with an error that names what is missing."""

import re

import pytest

from dsvlm import cli
from dsvlm.train.launch import VARIABLES, Ranks, devices_of, find_ranks

COMPLETE = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_complete():
    assert find_ranks(COMPLETE) == Ranks(rank=3, local_rank=1, world_size=4)


@pytest.mark.parametrize("environ", [{}, {"LOCAL_RANK": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}])
def test_no_launcher_is_one_process(environ):
    assert find_ranks(environ) == Ranks(0, 0, 1)


@pytest.mark.parametrize("name", VARIABLES)
def test_missing_variable_is_named(name):
    environ = {key: value for key, value in COMPLETE.items() if key != name}
    with pytest.raises(ValueError, match=f"^{name} not set, while (RANK|WORLD_SIZE) is"):
        find_ranks(environ)


def test_all_missing_variables_are_named():
    with pytest.raises(ValueError, match="^LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set, while RANK is"):
        find_ranks({"RANK": "0", "WORLD_SIZE": "2"})


def test_slurm_tasks_without_ranks():
    with pytest.raises(ValueError, match=r"RANK is not set, but SLURM started 8 tasks.*RANK=\$SLURM_PROCID"):
        find_ranks({"SLURM_PROCID": "5", "SLURM_NTASKS": "8"})


def test_batch_step_of_a_larger_job_is_one_process():
    """A script without srun sees the job's number of tasks, but is not one of them."""
    assert find_ranks({"SLURM_NTASKS": "8"}) == Ranks(0, 0, 1)


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", "two", "-1", "1.5", "\u00b2"])
def test_what_is_not_a_number_is_shown(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not a number")):
        find_ranks(COMPLETE | {name: value})


def test_rank_outside_the_world():
    with pytest.raises(ValueError, match="RANK=4 must be less than WORLD_SIZE=4"):
        find_ranks(COMPLETE | {"RANK": "4"})


def test_ranks_take_the_gpus_that_are_theirs(monkeypatch):
    """Those of CUDA_VISIBLE_DEVICES, by whatever name: on a shared machine the first ones are somebody else's."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert devices_of(2, {}) == ["0", "1"]
    assert devices_of(2, {"CUDA_VISIBLE_DEVICES": "4,GPU-5e, 7"}) == ["4", "GPU-5e"]
    assert devices_of(4, {"CUDA_VISIBLE_DEVICES": "4", "DS_ACCELERATOR": "cpu"}) == ["0", "1", "2", "3"]
    with pytest.raises(ValueError, match=r"--nproc 4: 3 GPUs are there \(CUDA_VISIBLE_DEVICES=4,5,6\).*lower it"):
        devices_of(4, {"CUDA_VISIBLE_DEVICES": "4,5,6"})


@pytest.mark.parametrize("told, words", [(False, "dsvlm: error: the disk is full\n"), (True, "")])
def test_what_rank_0_tells_the_others_leave_to_it(monkeypatch, capsys, told, words):
    error = ValueError("the disk is full")
    error.told = told

    def fail(name, overrides):
        raise error

    monkeypatch.setattr("dsvlm.config.load_recipe", fail)
    assert cli.run(["train", "quickstart"]) == 2
    assert capsys.readouterr().err == words
