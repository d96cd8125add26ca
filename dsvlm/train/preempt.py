"""Stop signals: a handler notes the first one, and all ranks stop together at the end of a window."""

import os
import signal
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "STOP"  # in the run directory: how a launching process passes a signal on, whatever lies between


class StopFlag:
    """Whether a signal has arrived in this process."""

    def __init__(self):
        self.signal: int | None = None

    def __call__(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self.signal = number


def install_handlers() -> StopFlag:
    """Starts noting signals; called again it returns the flag that is already in place, with what it has seen."""
    flag = signal.getsignal(SIGNALS[0])
    if not isinstance(flag, StopFlag):
        flag = StopFlag()
        for number in SIGNALS:
            signal.signal(number, flag)
    return flag


def stop_requested(flag: StopFlag, run_dir: Path) -> bool:
    return flag.signal is not None or (run_dir / STOP_FILE).exists()


def request_stop(run_dir: Path) -> None:
    """Asks a running training to save and end after its present window."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / STOP_FILE).touch()


def clear_stop(run_dir: Path) -> None:
    (run_dir / STOP_FILE).unlink(missing_ok=True)


def mark_requeue(run_dir: Path, wanted: bool) -> None:
    """Leaves the mark by which a batch script knows that the job is to be queued again, or takes an old one away."""
    mark = run_dir / "REQUEUE"
    if wanted:
        mark.write_text(f"{os.environ.get('SLURM_JOB_ID', '')}\n")
    else:
        mark.unlink(missing_ok=True)
