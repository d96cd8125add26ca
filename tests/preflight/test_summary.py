"""The whole run in a few numbers: each against a count over all steps and ranks of a small run."""

import json
import math

import numpy as np
import pytest

from dsvlm.cli import run
from dsvlm.config import load_recipe
from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.shard import ShardWriter
from dsvlm.preflight import summary as summary_module
from dsvlm.preflight.lengths import Cut
from dsvlm.preflight.summary import plan_summary, render, shards_bound, spread
from dsvlm.schedule.plan import Stream
from dsvlm.train.build import plan_run
from tests.dist.recipes import tiny

PHASES = [{"start": 2, "shares": {"question": 2, "locate": 5}}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two tasks in shards of a few samples each."""
    base = tmp_path_factory.mktemp("summary")
    make_scenes(base / "whole", samples=30, val_samples=1, tasks=("question", "locate"))
    for name, kind in (("question", "vqa"), ("locate", "locate")):
        reader = ShardReader(load_manifest(base / "whole/train" / name))
        with ShardWriter(base / "train" / name, kind, shard_bytes=12_000) as writer:
            for sample in range(30):
                record = json.dumps(reader.record(sample), sort_keys=True).encode()
                writer.write(reader.key(sample), {"png": reader.image(sample), "json": record})
    return base


def recipe_of(root, **schedule):
    raw = tiny(root, train__micro_batch=2).to_dict()
    raw["tasks"] = {name: raw["tasks"][name] for name in ("question", "locate")}
    raw["schedule"] |= {"steps": 6, "block": 2, "group": 2, **schedule}
    path = root / "recipe.yaml"
    path.write_text(json.dumps(raw | {"output": str(root / "run")}))  # JSON is YAML
    return path


CASES = {
    "accumulate": {}, "phases": {"phases": PHASES}, "mixed": {"strategy": "mixed"},
    "unified": {"strategy": "unified", "samples": 10}, "per_rank": {"strategy": "per_rank", "samples": 12, "chunk": 3},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_a_count_over_everything(root, case):
    """Six steps and four ranks are all looked at, so every figure is exact."""
    recipe = load_recipe(recipe_of(root, **CASES[case]))
    _, summary = plan_summary(recipe, 4, range(1))
    planned = plan_run(recipe)
    shards = [np.cumsum(stream.shard_sizes) for stream in planned.schedule.streams]
    assert min(map(len, shards)) > 4
    taken, rounds_of, places, live, touched = np.zeros(2, int), [], 0, 0, ([], [])
    for step in range(6):
        window = planned.plan.window(step)
        rounds = Cut(planned, 4).deal(window)
        rounds_of.append(len(rounds))
        live += len(window)
        places += sum(4 * max(len(one.unit(rank).places) for rank in range(4)) for one in rounds)
        for rank in range(4):
            task, ordinal = window.take(np.concatenate([one.unit(rank).places for one in rounds]))
            _, sample = planned.plan.locate_all(task, ordinal)
            for one in range(2):
                taken[one] += (task == one).sum()
                held = np.unique(np.searchsorted(shards[one], sample[task == one], side="right"))
                touched[one].extend([len(held)] * (len(held) > 0))
    assert summary["execution"]["exact"] and summary["execution"]["samples"] == pytest.approx(live / 6)
    assert summary["execution"]["micro_steps"] == pytest.approx(np.mean(rounds_of))
    assert summary["execution"]["idle_share"] == pytest.approx(1 - live / places)
    for one, (name, row) in enumerate(summary["tasks"].items()):
        assert row["taken"] == taken[one] and row["epochs"] == pytest.approx(taken[one] / 30), name
        assert row["seen_at_most"] == math.ceil(taken[one] / 30)
        assert row["steps_per_epoch"] == pytest.approx(6 * 30 / taken[one])
        assert row["shards_open"] == pytest.approx(np.mean(touched[one]))
        assert row["most_shards_open"] == max(touched[one]) <= row["shards_open_bound"]
    size = [sum(manifest.bytes) / 30 for manifest in planned.manifests.values()]
    assert summary["reads"]["bytes"] == pytest.approx(taken @ size / 6)
    # All that a rank reads from one of these small shards is one request.
    assert summary["reads"]["requests"] == pytest.approx(sum(map(sum, touched)) / 6)
    assert summary["reads"]["requests_per_rank"] * 4 == pytest.approx(summary["reads"]["requests"])


def test_command(root, capsys):
    """At 16,384 ranks too; what is printed for people holds what the JSON object holds."""
    command = ["plan", str(recipe_of(root)), "--world-size", "16384", "--steps", "0:2"]
    assert run([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in report["steps"]] == [0, 1] and report["steps"][0]["fillers"] > 16_000
    assert report["run"]["world_size"] == 16_384 and report["run"]["padding"] is None
    assert len(report["run"]["looked_at"]["ranks"]) == 8
    assert run(command) == 0
    text = capsys.readouterr().out
    assert render(report["run"]) in text and report["steps"][1]["digest"] in text
    assert run(["plan", str(recipe_of(root)), "--world-size", "0"]) == 2
    assert "--world-size 0" in capsys.readouterr().err


def test_steps_past_the_end_are_left_out(root, capsys):
    """As simulate and preview do."""
    last = load_recipe(recipe_of(root), []).schedule.steps
    assert run(["plan", str(recipe_of(root)), "--steps", f"{last - 1}:{last + 5}", "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)["steps"]] == [last - 1]
    assert run(["plan", str(recipe_of(root)), "--steps", f"{last}:{last + 1}"]) == 2
    assert f"the recipe has {last} steps" in capsys.readouterr().err


def test_padding_where_lengths_are_known(root, capsys):
    path = recipe_of(root)
    assert run(["data", "lengths", str(path)]) == 0
    capsys.readouterr()
    plain, cut = (load_recipe(path, [f"train.micro_tokens={tokens}"]) for tokens in (0, 128))
    shares = []
    for recipe in (plain, cut):
        planned = plan_run(recipe)
        dealt = Cut(planned, 2)
        windows = [planned.plan.window(step) for step in range(6)]
        shares.append(np.mean([dealt.shares(window, dealt.deal(window))["useful_tokens"] for window in windows]))
    plain, cut = (plan_summary(recipe, 2, range(1))[1] for recipe in (plain, cut))
    assert [run["padding"]["useful_share"] for run in (plain, cut)] == pytest.approx(shares)
    assert plain["execution"]["exact"] and not cut["execution"]["exact"]
    assert "of the positions that are computed are useful" in render(plain)


def test_what_the_figures_cannot_know_is_said(root, capsys):
    control = "schedule.controller={kind: stop_and_go}"
    unknown = ["train.micro_tokens=1000", "text.max_length=63"]  # of which no test makes the lengths
    command = ["plan", str(recipe_of(root)), *(part for each in (control, *unknown) for part in ("--set", each))]
    assert run(command) == 0
    text = capsys.readouterr().out
    assert "finding: train.micro_tokens: cut by samples here" in text and "as if none ever did" in text
    assert max(map(len, text.splitlines())) <= 120
    assert plan_summary(load_recipe(recipe_of(root)), 4, range(1))[1]["findings"] == []


def test_of_large_windows_fewer_are_located(root, monkeypatch):
    """What is located are the samples of the ranks looked at, not of all."""
    monkeypatch.setattr(summary_module, "SAMPLES", 40)
    recipe = load_recipe(recipe_of(root))
    looked = {world: plan_summary(recipe, world, range(1))[1]["looked_at"]["steps"] for world in (1, 16)}
    assert len(looked[1]) < len(looked[16]) == 6 and looked[1][-1] == 5


def test_spread():
    assert spread(3, 8) == [0, 1, 2] and spread(16_384, 3) == [0, 8191, 16_383] and spread(1, 8) == [0]


def test_shards_bound():
    stream = Stream("a", (10,) * 9, 1, 1)
    assert [shards_bound(stream, 2, count) for count in (0, 1, 20, 21, 10**6)] == [0, 5, 5, 7, 9]
