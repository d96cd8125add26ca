"""Every way to start two ranks, and every way to end them, tells the same training, bit for bit."""

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from dsvlm.train.launch import free_port

BIN = Path(sys.executable).parent


def deepspeed(tiny, output: Path) -> list[str]:
    options = ["--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--module"]
    return [sys.executable, str(BIN / "deepspeed"), *options, "dsvlm", *tiny.train(output)]


def torchrun(tiny, output: Path) -> list[str]:
    options = ["--nproc_per_node", "2", "--master_port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "dsvlm", *tiny.train(output)]


def stop_at(tiny, command: list[str], output: Path, step: int, number: int) -> int:
    """Starts a command, sends its process a signal once the line of a step is there, and returns the exit code."""
    since = time.time()
    process = tiny.start(command)
    try:
        tiny.wait_for(output, step, since, lambda: process.poll() is None)
        process.send_signal(number)
    except BaseException:
        process.kill()
        raise
    return tiny.finish(process)


def test_terminated_and_gone_on_with_by_torchrun(tiny, uninterrupted):
    output = tiny.directory / "terminated"
    assert stop_at(tiny, tiny.nproc(output), output, 4, signal.SIGTERM) == 0, tiny.log()
    stopped = len(tiny.rows(output))
    assert 4 < stopped < tiny.steps, "the signal was to arrive in the middle"
    assert tiny.checkpoints(output)[-1] == stopped, "it saves what it has trained"
    assert (output / "REQUEUE").exists()
    assert not (output / "STOP").exists()

    assert tiny.finish(tiny.start(torchrun(tiny, output))) == 0, tiny.log()
    assert tiny.rows(output) == uninterrupted
    assert not (output / "REQUEUE").exists()


def test_killed_rank_then_interrupted(tiny, uninterrupted):
    """By the deepspeed launcher until a rank is killed, by dsvlm until Ctrl-C, by the deepspeed launcher to the end."""
    output = tiny.directory / "killed"
    since = time.time()
    process = tiny.start(deepspeed(tiny, output))
    try:
        tiny.wait_for(output, tiny.save_every + 2, since, lambda: process.poll() is None)
        ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        assert len(ranks) == 1
        ranks[0].kill()
    except BaseException:
        process.kill()
        raise
    assert tiny.finish(process) != 0
    last = tiny.checkpoints(output)[-1]
    assert last % tiny.save_every == 0 and last < len(tiny.rows(output)), "what came after the checkpoint is lost"

    assert stop_at(tiny, tiny.nproc(output), output, last + 2, signal.SIGINT) == 0, tiny.log()
    stopped = len(tiny.rows(output))
    assert last < stopped < tiny.steps, "the signal was to arrive in the middle"
    assert tiny.checkpoints(output)[-1] == stopped

    assert tiny.finish(tiny.start(deepspeed(tiny, output))) == 0, tiny.log()
    assert tiny.rows(output) == uninterrupted
    left = [path.name for path in Path("/dev/shm").glob("deepspeed_*") if path.stat().st_mtime >= since]
    assert not left, "nobody would ever remove them, and they are memory"


def test_one_rank_tells_the_same_training_as_two(tiny, uninterrupted):
    """Other ranks, stage and micro-batch, with dropout: the same samples, and losses equal up to rounding."""
    output = tiny.directory / "one"
    settings = ["--set", "train.zero=0", "--set", "train.micro_batch=8"]
    assert tiny.finish(tiny.start([sys.executable, "-m", "dsvlm", *tiny.train(output), *settings])) == 0, tiny.log()
    for one, two in zip(tiny.rows(output), uninterrupted, strict=True):
        for name in ("step", "digest", "fingerprint", "samples", "tokens", "targets", "lr"):
            assert one[name] == two[name], name
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-2)
        for task, loss in two["task_loss"].items():
            assert one["task_loss"][task] == pytest.approx(loss, rel=1e-3)
