"""The scripts around a GPU run, without one: stages and their limits, the clock, routing, layers, report, imports."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import device, gpu_report, layers, routing
from benchmarks import routing_peers as peers
from benchmarks.measure import Row
from benchmarks.parts import load_parts, save_part

ROOT = Path(__file__).resolve().parents[2]
# What a GPU host of reference lacks, and what nothing around a GPU run may wait for.
ABSENT = ("deepspeed", "webdataset", "peft", "simplejpeg", "isal", "energon", "megatron")


def gpu_sh(stages: str, out: Path, *arguments: str) -> subprocess.CompletedProcess:
    environ = dict(os.environ) | {"PYTHON": sys.executable, "DSVLM_GPU_STAGES": stages, "DSVLM_COMMIT": "c0ffee"}
    command = ["bash", "benchmarks/gpu.sh", "--out", str(out), "--smoke", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)


def test_stages_have_limits_and_later_ones_run(tmp_path):
    part = json.dumps({"part": "one", "complete": True, "rows": [], "text": "TEXT"})
    stages = f"""
beside& 9 sleep 1; echo beside >> {{parts}}/../order
before 9 echo before >> {{parts}}/../order; echo '{part}' > {{parts}}/1.json
hangs 1 sleep 60
fails 9 exit 7
after 9 cat {{parts}}/../order; echo {{seconds}}
"""
    done = gpu_sh(stages, tmp_path)
    assert done.returncode == 1, done.stderr
    report = json.loads(next(tmp_path.glob("smoke-*.json")).read_text())
    ends = {stage["stage"]: (stage["result"], stage["said"]) for stage in report["stages"]}
    assert ends["beside"][0] == ends["before"][0] == "ok"
    assert ends["hangs"][0] == "out of time" and ends["fails"][0] == "failed (7)"
    assert ends["after"] == ("ok", "9")
    assert report["parts"][0]["text"] == "TEXT" and report["machine"]["commit"] == "c0ffee"
    assert not report["publishable"] and "TEXT" in next(tmp_path.glob("smoke-*.md")).read_text()
    # what ran beside `before` had ended when the next one began
    assert "before\nbeside" in next(tmp_path.glob("smoke-*.log")).read_text()


def test_the_budget_holds_for_all_stages(tmp_path):
    begin = time.monotonic()
    stages = "other 50 sleep 50\nfirst 50 sleep 50\nsecond 50 echo never"
    done = gpu_sh(stages, tmp_path, "--budget", "22", "--only", "first,second")
    assert time.monotonic() - begin < 40 and done.returncode == 1
    report = json.loads(next(tmp_path.glob("smoke-*.json")).read_text())
    assert [(stage["stage"], stage["result"]) for stage in report["stages"]] == [
        ("first", "out of time"), ("second", "out of time"),
    ]  # fmt: skip
    assert report["stages"][0]["seconds"] <= 3 and report["stages"][1]["said"] == ""


def test_a_stage_leaves_time_to_those_after_it_down_to_half_of_its_own(tmp_path):
    stages = "first 18 echo {seconds}\nbeside& 500 echo {seconds}\nlast 8 echo {seconds}\nlate 200 echo {seconds}"
    gpu_sh(stages, tmp_path, "--budget", "40", "--only", "first,beside,last")
    report = json.loads(next(tmp_path.glob("smoke-*.json")).read_text())
    given = [int(stage["said"]) for stage in report["stages"]]
    assert 10 <= given[0] <= 12 and given[0] + given[2] <= 20 and given[2] == 8


def test_all_stages_fit_into_nine_minutes_and_come_by_importance():
    """Without their commands: what the script would run on a GPU host."""
    code = "source <(sed -n '/^stages()/,/^}/p' benchmarks/gpu.sh); smoke= python=python measured=m stages"
    lines = subprocess.run(["bash", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20).stdout
    stages = [line.split()[:2] for line in lines.splitlines()]
    names = [name for name, _ in stages]
    assert names == ["build", "compile&", "sanitizer&", "tests", "attention", "routing", "layers"]
    limits = dict(stages)
    alone = sum(int(limit) for name, limit in stages if not name.endswith("&"))
    # attention gives up to half of its time to the two after it: all of them run even if each takes all it may
    assert alone - int(limits["attention"]) // 2 <= 530 - 20
    assert max(int(limits["compile&"]), int(limits["sanitizer&"])) <= int(limits["tests"])


@pytest.mark.parametrize("builds, holds, ends, words", [
    (1, 1, 0, "built"), (0, 1, 1, "the build failed, what was there serves"), (1, 0, 1, "there is no library"),
])  # fmt: skip
def test_a_build_that_fails_is_told_also_where_another_serves(tmp_path, monkeypatch, builds, holds, ends, words):
    """The stages after it run, but what they measure is not this commit's code."""
    tools = {"nvcc": "", "python": f"""
if [ "$1" = setup.py ]; then
    [ {builds} = 1 ] && echo built
else
    cat >/dev/null
    [ {holds} = 1 ] || {{ echo "there is no library"; exit 1; }}
fi"""}
    for name, script in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = gpu_sh(f"build 20 python={tmp_path}/python build\nafter 9 echo ran", tmp_path)
    build, after = json.loads(next(tmp_path.glob("smoke-*.json")).read_text())["stages"]
    assert (done.returncode, after["said"]) == (ends, "ran") and build["said"] == words
    assert build["result"] == ("failed (1)" if ends else "ok")


FAKE_SANITIZER = """#!/bin/bash
echo "$@" >> "$FAKE/calls"
tool=$2
[ "$FAKE_MODE" != hangs ] || sleep 60
[ "$FAKE_MODE" != foreign ] || { echo "========= Error: Device not supported"; exit 1; }
if [ "$FAKE_MODE" = counts ] && [ "$tool" = memcheck ]; then
    while [ "$1" != -m ]; do command=$1; shift; done
    "$command" "$@" --collect-only || exit
fi
if [ "$FAKE_MODE" = finds ] && [ "$tool" = racecheck ]; then
    echo "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"
    exit 86
fi
[ "$tool" = racecheck ] && echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ||
    echo "========= ERROR SUMMARY: 0 errors"
"""
CLEAN = "memcheck: 0 errors; racecheck: 0 hazards displayed (0 errors, 0 warnings); synccheck: 0 errors"
HAZARDS = "2 hazards displayed (2 errors, 0 warnings)"


def sanitized(tmp_path, monkeypatch, mode: str, beside: str, seconds: int = 50) -> tuple[int, dict, str]:
    """Exit status, the stage as the report has it, and its log; mode: what the fake tool does, beside: name of it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("nvcc", beside):
        (tools / name).write_text(FAKE_SANITIZER)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("FAKE_MODE", mode)
    done = gpu_sh(f"sanitizer {seconds} sanitize {{seconds}}", tmp_path)
    (stage,) = json.loads(next(tmp_path.glob("smoke-*.json")).read_text())["stages"]
    return done.returncode, stage, next(tmp_path.glob("smoke-*.log")).read_text()


def test_the_sanitizer_checks_a_few_small_tests_of_both_ops(tmp_path, monkeypatch):
    code, stage, log = sanitized(tmp_path, monkeypatch, "counts", "compute-sanitizer")
    assert (code, stage["result"], stage["said"]) == (0, "ok", CLEAN), log
    collected = [line.split("::")[0] for line in log.splitlines() if "::" in line]
    assert collected.count("tests/ops/test_git_cuda.py") >= 4 and collected.count("tests/ops/test_moe_cuda.py") >= 4
    assert len(collected) <= 24
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted(call.split()[1] for call in calls) == ["memcheck", "racecheck", "synccheck"]
    assert all("--kernel-name kns=dsvlm --error-exitcode 86" in call for call in calls)


@pytest.mark.parametrize("mode, ends, words", [
    ("finds", 1, [f"racecheck: failed (86) {HAZARDS}", "memcheck: 0 errors"]),
    ("foreign", 0, ["memcheck: not checked, it does not support this device"]),
    ("hangs", 1, ["memcheck: out of time", "synccheck: out of time"]),
])  # fmt: skip
def test_what_the_sanitizer_says_is_reported(tmp_path, monkeypatch, mode, ends, words):
    code, stage, log = sanitized(tmp_path, monkeypatch, mode, "compute-sanitizer", 21 if mode == "hangs" else 50)
    assert code == ends and all(word in stage["said"] for word in words), stage
    assert mode != "finds" or HAZARDS in log


def test_without_a_sanitizer_one_line_says_so(tmp_path, monkeypatch):
    code, stage, log = sanitized(tmp_path, monkeypatch, "", "nothing")
    assert code == 0 and stage["said"].startswith("not checked: there is no compute-sanitizer"), log


def test_unknown_options_are_refused(tmp_path):
    done = gpu_sh("", tmp_path, "--nonsense")
    assert done.returncode == 2 and "usage" in done.stderr and not list(tmp_path.iterdir())
    done = gpu_sh("one 9 echo 1", tmp_path, "--only", "two")
    assert done.returncode == 2 and "--only two names no stage" in done.stderr
    done = gpu_sh("one 9 echo 1\ntwo& 9 echo 2", tmp_path, "--only", "two,one,tow")
    assert done.returncode == 2 and "--only tow names no stage" in done.stderr and not list(tmp_path.iterdir())


def test_a_run_that_is_ended_ends_its_stages(tmp_path):
    """They would keep the device busy beside the next run, and write what `auto` follows."""
    name = tmp_path / "pid"
    stages = f"beside& 50 sleep 50\nlong 50 echo $$ > {name}.part; mv {name}.part {name}; exec sleep 50"
    environ = dict(os.environ) | {"PYTHON": sys.executable, "DSVLM_GPU_STAGES": stages}
    run = subprocess.Popen(
        ["bash", "benchmarks/gpu.sh", "--out", str(tmp_path), "--smoke"], cwd=ROOT, env=environ, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 20
    while not name.exists() and time.monotonic() < end:
        time.sleep(0.05)
    pid = int(name.read_text())
    run.terminate()
    run.communicate(timeout=20)  # the stages hold its stderr: all of them have ended
    assert run.returncode != 0 and not Path(f"/proc/{pid}").exists()


def test_gpu_tests_are_known_and_left_out(pytestconfig):
    """Only files with the mark are imported on a GPU host: the stage finds them by it."""
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    assert "mark\\.gpu" in script and "-m gpu" in script
    assert any(marker.startswith("gpu:") for marker in pytestconfig.getini("markers"))
    assert "not gpu" in " ".join(pytestconfig.getini("addopts"))


def test_a_gpu_host_needs_torch_and_numpy_only():
    """Neither the ops nor the scripts import what such a host lacks; nor do files of tests marked gpu."""
    tests = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    tests.remove(str(Path(__file__)))
    code = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.path.insert(0, {str(ROOT)!r})
import dsvlm.ops
early = sorted(set(sys.modules) & {{"transformers", "pyarrow", "PIL"}})
assert not early, early
import benchmarks.attention, benchmarks.routing, benchmarks.layers, benchmarks.gpu_report
assert "transformers" not in sys.modules
import pytest
tests = {tests!r}
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-p", "no:cacheprovider", *tests]) if tests else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


class Queue:
    """A device whose pause lasts as long as it was told, and a host that needs `host` seconds to queue a call."""

    def __init__(self, monkeypatch, host: float):
        self.host, self.pauses = host, []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.pauses.append(cycles / device.CLOCK_HZ))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self)

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return self.pauses[-1] < self.host if self.pauses else True

    def elapsed_time(self, end) -> float:
        return 5.0


def test_pauses_grow_until_the_host_is_ahead(monkeypatch):
    queue = Queue(monkeypatch, host=0.003)
    watch = device.Stopwatch(lambda turn: None)
    assert watch() == 5.0 and not watch.waits
    assert queue.pauses == [0.0005, 0.001, 0.002, 0.004] and watch() == 5.0 and len(queue.pauses) == 5
    never = device.Stopwatch(lambda turn: None)
    queue.host = 9.0
    assert never() == 5.0 and never.waits


def test_medians_are_interleaved_and_take_turns(monkeypatch):
    calls = []
    runs = {name: device.rotated([(name, 0), (name, 1)], lambda *given: calls.append(given)) for name in "ab"}
    found = device.medians(runs, repeats=3, warm=1)
    assert calls == [(name, turn % 2) for turn in (1, 2, 3, 4) for name in "ab"]
    assert found["a"]["low"] <= found["a"]["median"] <= found["a"]["high"] and not found["a"]["waits"]


def test_inputs_rotate_over_more_than_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "cache_bytes", lambda: 60)
    assert device.sets_of(20) == 10 and device.sets_of(10**6) == 2


@pytest.mark.parametrize("case", routing.SMOKE, ids=lambda case: case.name)
def test_routing_peers_agree(case):
    """All that keep by priority give one result; with one choice so does keeping by own weight."""
    given = routing.draw(case, 3)
    expected = routing.result(case, next(peer for peer in peers.PEERS if peer.name == peers.SORTED), given)
    compared = [peer for peer in peers.PEERS if peer.name in (peers.TUTEL, peers.MEGATRON)]
    dropped = (expected == 0).all(dim=1)
    assert 0 < int(dropped.sum()) < case.tokens / 2 or case.k > 1
    for peer in compared:
        difference = device.relative_error(routing.result(case, peer, given), expected)
        assert difference < 1e-6 or (peer.name == peers.MEGATRON and case.k > 1), peer.name
        assert all(grad.isfinite().all() for grad in routing.whole(case, peer, given))


def routed(**ms: float) -> dict:
    names = {"ours": peers.OURS, "deepspeed": peers.DEEPSPEED, "tutel": peers.TUTEL}
    facts = {
        names[name]: {f"{part}_ms": {"median": spent, "waits": False} for part in ("gating", "whole")}
        for name, spent in ms.items()
    }
    return {"case": "c", "peers": facts}


def test_routing_verdicts():
    rows = routing.verdicts([routed(ours=1.0, deepspeed=12.0, tutel=9.0)])
    assert [(row.value, row.met) for row in rows] == [(12.0, True), (9.0, False)]
    parts = {"metadata": 0.012, "permute": 1.0, "copy: permute": 0.8}
    record = routed(ours=1.0) | {
        "parts": {name: {"median": spent} for name, spent in parts.items()},
        "launches": {"forward": ["k"] * 4, "backward": ["k"] * 5},
    }
    rows = routing.verdicts([record])
    assert [row.met for row in rows] == [False, False, True, False]
    rows = routing.verdicts([{"case": "c", "peers": {peers.OURS: {"skipped": "RuntimeError: no"}}}])
    assert [(row.met, row.note) for row in rows] == [(False, "RuntimeError: no")]


def test_layers_compute_the_same_in_any_cut():
    size = layers.SMOKE
    samples = layers.draw_samples(size)
    cuts = {cut.__name__: cut(samples, size) for cut in (layers.padded, layers.packed)}
    for shapes in cuts.values():
        assert sorted(sample for each in shapes for row in each.segments for sample in row) == sorted(samples)
    assert all(each.length <= size.row for each in cuts["packed"])
    rows, facts = layers.measure(size, torch.float32, (layers.peers.DENSE,))
    assert facts["cuts"]["packed"]["useful"] > facts["cuts"]["padded"]["useful"]
    losses = list(facts["losses"].values())
    assert losses[0] > 0 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(row.value > 0 for row in rows)


@pytest.mark.parametrize("script", [routing, layers], ids=lambda script: script.__name__)
def test_smoke_runs_write_their_part(script, tmp_path, monkeypatch, capsys):
    part = tmp_path / "part.json"
    more = ["--repeats", "1"] if script is routing else []
    monkeypatch.setattr("sys.argv", ["script", "--smoke", "--out", str(part), *more])
    assert script.main() == 0
    assert json.loads(part.read_text())["text"] in capsys.readouterr().out


def test_report_is_not_publishable_unless_everything_went_well(tmp_path, monkeypatch):
    work, out = tmp_path / "work", tmp_path / "out"
    for directory in (work / "parts", work / "logs", out):
        directory.mkdir(parents=True)
    (work / "logs/attention.log").write_text("first\nlast | line\n")
    row = Row("attention", "x", 2.0, "x", goal=">= 3", met=False)
    table = tmp_path / "measured.json"
    table.write_text('[{"backend": "kernel"}]\n')
    monkeypatch.setattr(device, "machine", lambda: {
        "device": "Some GPU", "architecture": "sm_90", "driver": "1", "torch": "2", "cuda": "3", "triton": "4",
        "processor": "p", "cores": 2, "commit": "abc",
    })  # fmt: skip
    monkeypatch.setattr("sys.argv", [
        "report", "--work", str(work), "--out", str(out), "--measured", str(table), "--seconds", "9",
    ])  # fmt: skip
    for result, complete, publishable in (("ok", True, True), ("out of time", True, False), ("ok", False, False)):
        (work / "stages.tsv").write_text(f"attention\t{result}\t7\n")
        save_part(work / "parts/1-attention.json", "attention", "TABLE", [row], complete)
        assert len(load_parts(work / "parts")) == 1
        assert gpu_report.main() == 0
        report = json.loads(next(path for path in out.glob("gpu-*.json") if "measured" not in path.name).read_text())
        assert report["publishable"] is publishable and report["choices"] == [{"backend": "kernel"}]
        text = next(out.glob("gpu-*.md")).read_text()
        assert "1 of 1 missed" in text and "TABLE" in text and "last / line" in text and "Some GPU (sm_90)" in text
        assert ("Not publishable" in text) is not publishable
    assert json.loads(next(out.glob("*measured.json")).read_text()) == [{"backend": "kernel"}]
