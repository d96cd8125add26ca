"""A tiny run for tests that start real ranks: its shards, its recipe and what an uninterrupted training writes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

STEPS, SAVE_EVERY, LIMIT = 24, 8, 240  # LIMIT: seconds for whatever a start is waited for
RECIPE = {
    "name": "tiny",
    "text": {"vocab_size": 64, "bins": 4, "max_length": 48},
    "model": {
        "vision": {"config": {
            "image_size": 20, "patch_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }},
        "decoder": {"kind": "opt", "config": {
            "hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 64, "dropout": 0.1,
        }},
    },
    "tasks": {
        "caption": {"type": "caption", "shards": "train/caption", "samples": 3},
        "question": {"type": "vqa", "shards": "train/question", "samples": 5},
    },
    "schedule": {"steps": STEPS},
    "optim": {"lr": 0.01, "warmup": 2, "ema": 0.9},
    "train": {"micro_batch": 2, "zero": 3, "save_every": SAVE_EVERY, "log_every": 1},
}  # fmt: skip
# What a training writes for a step, without what depends on the clock.
TOLD = (
    "step", "loss", "task_loss", "task_accuracy", "lr", "grad_norm", "samples", "masked", "tokens", "targets", "digest",
    "fingerprint",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """What one process runs where `pytest -n` has several: a file, or a folder whose tests share what is dear."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            shared = item.path.parent.name in ("dist", "ops")
            item.add_marker(pytest.mark.xdist_group(str(item.path.parent if shared else item.path)))


class TinyRuns:
    """Starts the tiny recipe on two CPU ranks and reads what it wrote."""

    def __init__(self, directory: Path):
        from dsvlm.data.convert.scenes import make_scenes

        self.directory, self.recipe, self.steps = directory, directory / "tiny.yaml", STEPS
        self.save_every = SAVE_EVERY
        make_scenes(directory / "data", samples=32, val_samples=16, size=20, tasks=("caption", "question"))
        self.recipe.write_text(yaml.safe_dump(RECIPE | {"data": {"root": str(directory / "data")}}))
        self.environ = dict(os.environ) | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def train(self, output: Path) -> list[str]:
        """The part of the command that every way in shares."""
        return ["train", str(self.recipe), "--set", f"output={output}"]

    def nproc(self, output: Path) -> list[str]:
        return [sys.executable, "-m", "dsvlm", *self.train(output), "--nproc", "2"]

    def start(self, command: Sequence[str]) -> subprocess.Popen:
        with (self.directory / "log").open("a") as log:
            return subprocess.Popen(command, env=self.environ, stdout=log, stderr=log, cwd=self.directory)

    def finish(self, process: subprocess.Popen) -> int:
        try:
            return process.wait(LIMIT)
        finally:
            process.kill()

    def rows(self, output: Path) -> list[dict]:
        """What the run wrote about its steps; the line being written is left out."""
        text = (output / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [{name: row[name] for name in TOLD} for row in rows]

    def wait_for(self, output: Path, step: int, since: float, alive=lambda: True) -> None:
        """Waits until a start later than `since` (seconds since 1970) has written the line of a step."""
        path, end = output / "metrics.jsonl", time.monotonic() + LIMIT
        while not (path.exists() and path.stat().st_mtime > since and len(self.rows(output)) > step):
            assert alive(), f"ended before step {step}:\n{self.log()}"
            assert time.monotonic() < end, f"no step {step} within {LIMIT} s:\n{self.log()}"
            time.sleep(0.02)

    def checkpoints(self, output: Path) -> list[int]:
        return sorted(json.loads(path.read_text())["step"] for path in output.glob("checkpoints/*/COMPLETE.json"))

    def log(self) -> str:
        return (self.directory / "log").read_text()[-4000:]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyRuns:
    return TinyRuns(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def uninterrupted(tiny) -> list[dict]:
    """The rows of `dsvlm train R --nproc 2`, started once and left alone."""
    output = tiny.directory / "uninterrupted"
    assert tiny.finish(tiny.start(tiny.nproc(output))) == 0, tiny.log()
    rows = tiny.rows(output)
    assert [row["step"] for row in rows] == list(range(tiny.steps))
    assert not (output / "REQUEUE").exists()
    return rows
