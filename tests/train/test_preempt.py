"""Stop signals: noted, never lost, passed on through a file; the second Ctrl-C means now."""

import os
import signal
import subprocess
import sys

import pytest

from dsvlm.train import launch as launching
from dsvlm.train.preempt import (
    LAUNCHED,
    SIGNALS,
    StopFlag,
    clear_stop,
    install_handlers,
    mark_requeue,
    request_stop,
    stop_requested,
)
from dsvlm.train.rundir import lock_run


@pytest.fixture
def handlers():
    """Puts pytest's own handlers back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_is_noted(handlers, number, tmp_path):
    flag = install_handlers()
    assert not stop_requested(flag, tmp_path)
    os.kill(os.getpid(), number)
    assert flag.signal == number
    assert stop_requested(flag, tmp_path)


def test_installed_again_it_keeps_what_it_has_seen(handlers):
    first = install_handlers()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert install_handlers() is first
    assert first.signal == signal.SIGUSR1


def test_second_interrupt_means_now(handlers):
    install_handlers()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_second_warning_does_not_end_a_save(handlers):
    install_handlers()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)


def test_stop_file(tmp_path):
    run_dir, flag = tmp_path / "run", StopFlag()
    request_stop(run_dir)  # may come before the ranks have made the directory
    assert stop_requested(flag, run_dir)
    clear_stop(run_dir)
    clear_stop(run_dir)
    assert not stop_requested(flag, run_dir)


def test_each_launch_has_a_stop_file_of_its_own(tmp_path):
    """Anybody may touch STOP; that of one launch is nothing to the ranks of another, or to those of none."""
    request_stop(tmp_path, "one")
    assert [stop_requested(StopFlag(), tmp_path, token) for token in ("one", "two", "")] == [True, False, False]
    clear_stop(tmp_path)
    assert stop_requested(StopFlag(), tmp_path, "one")
    clear_stop(tmp_path, "one")
    request_stop(tmp_path)
    assert [stop_requested(StopFlag(), tmp_path, token) for token in ("one", "two", "")] == [True, True, True]


class Ranks:
    """A launcher whose ranks run until a signal arrives; `seen`: the names in the run directory while they do."""

    def __init__(self, run_dir, meanwhile):
        self.run_dir, self.meanwhile, self.seen, self.token, self.pid = run_dir, meanwhile, [], "", 0

    def __call__(self, command, env, start_new_session):
        self.token = env[LAUNCHED]
        return self

    def wait(self) -> int:
        self.meanwhile()
        self.seen = sorted(path.name for path in self.run_dir.iterdir())
        return 0


def test_ctrl_c_on_a_launch_asks_its_own_ranks_only(handlers, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    ranks = Ranks(run_dir, lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(launching.subprocess, "Popen", ranks)
    assert launching.launch(["train", "quickstart"], 2, run_dir) == 0
    assert ranks.seen == [".lock", f"STOP.{ranks.token}"]
    assert [path.name for path in run_dir.iterdir()] == [".lock"]
    first, ranks.meanwhile = ranks.token, (run_dir / "STOP").touch
    launching.launch(["train", "quickstart"], 2, run_dir)
    assert first != ranks.token
    assert (run_dir / "STOP").exists(), "it belongs to the training that runs there, whose ranks take it away"


def test_a_launch_that_cannot_write_asks_by_signal(handlers, tmp_path, monkeypatch):
    """Ended by an error instead, it would leave ranks behind that nobody waits for."""
    sent = []

    def full(run_dir, token):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(launching.subprocess, "Popen", Ranks(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    monkeypatch.setattr(launching, "request_stop", full)
    monkeypatch.setattr(launching.os, "killpg", lambda *args: sent.append(args))
    assert launching.launch(["train", "quickstart"], 2, tmp_path) == 0
    assert sent == [(0, signal.SIGTERM)]


def test_second_launch_into_a_run_is_refused_and_touches_nothing(handlers, tmp_path, monkeypatch):
    monkeypatch.setattr(launching.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("ranks were started"))
    request_stop(tmp_path)  # as the first training would find it
    with lock_run(tmp_path):
        with pytest.raises(ValueError, match="output: another training is running"):
            launching.launch(["train", "quickstart"], 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "STOP"]


def test_requeue_mark_names_the_job_and_goes_away(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    mark_requeue(tmp_path, wanted=True)
    assert (tmp_path / "REQUEUE").read_text() == "17\n"
    mark_requeue(tmp_path, wanted=False)
    mark_requeue(tmp_path, wanted=False)
    assert not (tmp_path / "REQUEUE").exists()


@pytest.mark.parametrize("options", [[], ["--local_rank=1"]], ids=["alone", "deepspeed"])
def test_program_listens_before_it_imports_anything_heavy(options):
    """A signal that meets the program while it imports torch must not end it."""
    code = (
        "import signal, sys, dsvlm.cli\n"
        "def run(arguments):\n"
        "    assert 'torch' not in sys.modules\n"
        "    signal.raise_signal(signal.SIGUSR1)\n"
        "    return 0\n"
        "dsvlm.cli.run = run\n"
        "from dsvlm.__main__ import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *options, "train", "quickstart"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
