"""The main job on photographs: COCO's own files become shards, and the shipped recipe trains four tasks on 2 ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MINI = Path(os.environ.get("DSVLM_COCO_MINI") or Path(__file__).parents[2].parent / "shared/data/coco_mini")
LAYERS = "hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2"
SMALL = (
    f"model.vision.config={{image_size: 32, patch_size: 16, {LAYERS}}}", f"model.decoder.config={{{LAYERS}}}",
    "text.vocab_size=400", "optim.warmup=2", "schedule.steps=4", "train.save_every=4", "data.workers=1",
    *(f"tasks.{name}.samples={n}" for name, n in {"caption": 4, "categorize": 4, "locate": 3, "detect": 2}.items()),
)  # fmt: skip


@pytest.mark.skipif(not MINI.is_dir(), reason=f"no COCO sample at {MINI}")
def test_coco_from_its_own_files_to_a_checkpoint(tiny, tmp_path):
    def dsvlm(*arguments: str) -> str:
        command = [sys.executable, "-m", "dsvlm", *arguments]
        done = subprocess.run(command, env=tiny.environ, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    annotations = MINI / "annotations"
    report = json.loads(dsvlm(
        "data", "convert", "coco", "--images", str(MINI / "train2017"), "--out", "data/coco/train", "--resize", "48",
        "--json", "--captions", str(annotations / "captions_train2017.json"),
        "--tasks", "caption,categorize,locate,detect",
        "--instances", str(annotations / "instances_train2017.json"),
    ))  # fmt: skip
    assert report["tasks"]["caption"]["samples"] == 400
    settings = [part for setting in SMALL for part in ("--set", setting)]
    dsvlm("train", "coco", "--nproc", "2", *settings)
    rows = [json.loads(line) for line in (tmp_path / "runs/coco/metrics.jsonl").read_text().splitlines()]
    tasks = {"caption", "categorize", "locate", "detect"}
    assert len(rows) == 4 and all(set(row["task_loss"]) == tasks for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"] and sum(row["masked"] for row in rows) == 0
    planned = json.loads(dsvlm("plan", "coco", "--world-size", "2", "--steps", "0:4", "--json", *settings))
    assert [row["digest"] for row in planned["steps"]] == [row["digest"] for row in rows]
    assert (tmp_path / "runs/coco/checkpoints/step_00000004/COMPLETE.json").exists()
