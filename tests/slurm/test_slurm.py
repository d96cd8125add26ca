"""The batch scripts on a real SLURM: two nodes, a rank each, warned, pushed out, cancelled, in the end complete."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from dsvlm.config import load_recipe
from tests.slurm.conftest import SLURM

CPU = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=20")


def test_warned_and_pushed_out_it_ends_as_if_left_alone(cluster, tiny, uninterrupted):
    output, since = cluster.directory / "run", time.time()
    job = cluster.submit("train.sbatch", *tiny.train(output)[1:], options=CPU)
    tiny.wait_for(output, 4, since)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", "first requeue")
    since, stopped = time.time(), len(tiny.rows(output))
    assert 4 < stopped < tiny.steps, "the warning was to come in the middle"
    assert tiny.checkpoints(output)[-1] == stopped, "both ranks save what they have trained"

    tiny.wait_for(output, stopped + 2, since)
    pusher = cluster.submit("eval.sbatch", "--help", options=("--partition=high", "--gpus=0", "--cpus-per-task=1"))
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "2", "requeue after preemption")
    assert stopped < tiny.checkpoints(output)[-1] == len(tiny.rows(output)) < tiny.steps
    cluster.wait(lambda: cluster.job(pusher)["JobState"] == "COMPLETED", "end of the job that pushed it out")

    cluster.wait(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "end of the job")
    assert cluster.job(job)["JobState"] == "COMPLETED", cluster.log()
    assert tiny.rows(output) == uninterrupted


def test_cancelled_it_saves_and_is_not_queued_again(cluster, tiny):
    output, since = cluster.directory / "cancelled", time.time()
    job = cluster.submit("train.sbatch", *tiny.train(output)[1:], options=CPU)
    tiny.wait_for(output, 1, since)
    cluster.run("scancel", job)
    cluster.wait(lambda: cluster.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), "end of the job")
    assert cluster.job(job)["JobState"] == "CANCELLED", cluster.log()
    assert cluster.job(job)["Restarts"] == "0"
    assert tiny.checkpoints(output) == [len(tiny.rows(output))]


def test_preprocessing_one_task_per_array_task(cluster):
    out = cluster.directory / "scenes"
    options = ("--array=0-1", "--mem=0", "--cpus-per-task=1")
    arguments = ("scenes", "--out", str(out), "--samples", "4", "--val-samples", "2")
    job = cluster.submit("preprocess.sbatch", *arguments, options=options, environ={"TASKS": "caption locate"})
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-j", job), "end of both array tasks")
    sets = sorted(str(p.parent.relative_to(out)) for p in out.rglob("manifest.json"))
    assert sets == ["train/caption", "train/locate", "val/caption", "val/locate"], cluster.log()


@pytest.mark.parametrize("tasks, number, message", [
    (None, "0", "TASKS is empty: name the tasks to convert"),
    ("  ", "0", "TASKS is empty: name the tasks to convert"),
    ("caption locate", "2", 'TASKS="caption locate" has no entry 2: give --array=0-1\n'),
])  # fmt: skip
def test_preprocessing_says_what_is_missing(tasks, number, message):
    environ = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": number} | ({"TASKS": tasks} if tasks else {})
    done = subprocess.run(["bash", str(SLURM / "preprocess.sbatch")], env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "0--1" not in done.stderr


def test_the_recipes_that_scripts_name_are_there():
    """With what preprocess.sbatch writes: the recipe's sets are below train/ and val/ of its data.root."""
    named = re.findall(r"train\.sbatch (\S+)", "".join(path.read_text() for path in SLURM.glob("*.sbatch")))
    assert named and all(load_recipe(name) for name in named if not name.endswith(".yaml") and name.islower())
    out = re.search(r"--out (\S+)", (SLURM / "preprocess.sbatch").read_text())[1]
    assert all(task.shards.startswith(f"{Path(out).name}/") for task in load_recipe("coco").tasks.values())
