"""The benchmark measures what it says, in bounded time, and names the limit."""

import json
import time

import numpy as np
import pytest

from dsvlm.cli import run
from dsvlm.config import load_recipe
from dsvlm.data.transforms import DECODERS
from dsvlm.preflight import bench
from dsvlm.train.build import plan_run

KEYS = {"subject", "image_size", "decoder", "seconds", "cores", "load", "damaged", "rows", "limit", "warnings"}


def test_shard_set(recipe, capsys):
    begin = time.monotonic()
    assert run(["data", "bench", str(recipe.parent / "train/locate"), "--seconds", "0.1", "--json"]) == 0
    assert time.monotonic() - begin < 10
    report = json.loads(capsys.readouterr().out)
    assert set(report) == KEYS and report["image_size"] == 224 and report["decoder"] in DECODERS
    assert {"read", "decode, pillow", "read + decode"} <= set(report["rows"])
    assert set(report["rows"]["read"]) == {"samples_per_s", "samples_per_cpu_s", "mb_per_s"}
    assert all(value > 0 for row in report["rows"].values() for value in row.values())
    assert set(report["limit"]["shares"]) == {"reading", "decoding"}
    assert sum(report["limit"]["shares"].values()) == pytest.approx(1)
    assert run(["data", "bench", str(recipe.parent / "train/locate"), "--seconds", "0.1", "--image-size", "40"]) == 0
    told = capsys.readouterr().out
    assert "limits:" in told and "read + decode" in told and "images of 40 pixels" in told


def test_recipe(recipe, capsys):
    """With one worker too; the recipe's damaged image is met, and told."""
    assert run(["data", "bench", str(recipe), "--seconds", "0.1", "--workers", "0,1", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert set(report) == KEYS and report["image_size"] == 40 and report["damaged"] > 0
    assert any("damaged" in text for text in report["warnings"])
    assert set(report["rows"]["loader, 0 workers"]) == {"samples_per_s", "samples_per_cpu_s", "batches_per_s"}
    assert set(report["rows"]["loader, 1 workers"]) == {"samples_per_s", "batches_per_s"}
    one = report["rows"]["loader, 1 workers"]
    assert 1 <= one["samples_per_s"] / one["batches_per_s"] <= 3  # of a micro-batch
    assert set(report["limit"]["shares"]) == {"reading", "decoding", "tokenising and batching"}


def test_samples_come_in_the_order_of_the_plan(recipe):
    planned = plan_run(load_recipe(recipe))
    subject, steps = bench.of_recipe(planned), 3
    size = len(planned.plan.window(0))
    found = [next(subject.pairs) for _ in range(steps * size)]
    for step in range(steps):
        window = planned.plan.window(step)
        tasks, ordinals = window.take(np.arange(size))
        assert found[step * size : (step + 1) * size] == list(
            zip(tasks.tolist(), planned.plan.locate_all(tasks, ordinals)[1].tolist(), strict=True)
        )
    alone = bench.of_directory(recipe.parent / "train/locate")
    drawn = [next(alone.pairs)[1] for _ in range(48)]
    assert sorted(drawn[:24]) == sorted(drawn[24:]) == list(range(24)) and drawn[:24] != drawn[24:]


def rows(read: float, decode: float, loader: float) -> dict:
    return {
        "read": {"samples_per_s": read / 2, "samples_per_cpu_s": read}, "decode, pillow": {"samples_per_cpu_s": decode},
        "loader, 0 workers": {"samples_per_s": 1, "samples_per_cpu_s": loader, "batches_per_s": 0.125},
        "loader, 2 workers": {"samples_per_s": 400, "batches_per_s": 50},
    }  # fmt: skip


@pytest.mark.parametrize(("rates", "what", "per_core"), [
    ((10_000, 200, 190), "decoding", 200),
    ((100, 2000, 90), "reading", 100),
    ((10_000, 2000, 100), "tokenising and batching", 1 / (1 / 100 - 1 / 10_000 - 1 / 2000)),
])  # fmt: skip
def test_limit(rates, what, per_core):
    report = {"rows": rows(*rates), "decoder": "pillow", "load": 9.0}
    found = bench.limit(report)
    assert found["what"] == what and found["per_core"] == pytest.approx(per_core)


def test_waiting_for_the_disk_counts_where_nobody_else_works():
    report = {"rows": rows(10_000, 2000, 1000), "decoder": "pillow", "load": 0.1}
    assert bench.limit(report)["shares"]["reading"] > bench.limit(report | {"load": 5.0})["shares"]["reading"]


def test_words():
    report = {"subject": "x", "image_size": 224, "cores": 2, "load": 3.1, "damaged": 2, "decoder": "pillow",
              "rows": rows(10_000, 200, 190)}  # fmt: skip
    report |= {"limit": bench.limit(report), "warnings": bench.warnings(report)}
    told = bench.render(report)
    assert "decoding limits: 200 samples/s per core" in told
    assert "2 workers: a micro-step of 8.0 samples every 20.0 ms" in told
    assert "warning: load average 3.1 on 2 cores" in told and "2 reads met a damaged sample" in told
    assert bench.warnings(report | {"load": 0.2, "damaged": 0}) == []


@pytest.mark.parametrize(("arguments", "message"), [
    (["nothing"], "no recipe 'nothing'"),
    (["RECIPE", "--workers", "0,-1"], "--workers 0,-1"),
    (["RECIPE", "--seconds", "0"], "--seconds 0"),
    (["RECIPE", "--seconds", "nan"], "--seconds nan"),
    (["RECIPE", "--image-size", "0"], "--image-size 0"),
    (["SHARDS", "--workers", "1"], "give a recipe"),
    (["DIRECTORY"], "holds no manifest.json"),
])  # fmt: skip
def test_errors(recipe, capsys, arguments, message):
    names = {"RECIPE": recipe, "SHARDS": recipe.parent / "train/odd", "DIRECTORY": recipe.parent}
    assert run(["data", "bench", *(str(names.get(a, a)) for a in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_help_has_examples_and_is_light(recipe):
    import subprocess
    import sys

    code = (
        "import sys\nfrom dsvlm.cli import build_parser\nfor name in sys.argv[1:]:\n"
        "    try:\n        build_parser().parse_args(['data', name, '--help'])\n    except SystemExit:\n        pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'PIL'} & set(sys.modules)\nassert not heavy, heavy"
    )
    names = ["preview", "bench", "simulate", "lengths"]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert f"data {name} quickstart" in done.stdout
