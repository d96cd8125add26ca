"""Stop signals: a handler notes the first one, and all ranks stop together at the end of a window."""

import os
import signal
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STOP_FILE = "STOP"  # in the run directory: anybody may touch it, and the training that runs there saves and ends
LAUNCHED = "DSVLM_LAUNCHED"  # token of the process that launched these ranks: its own file to stop them is STOP.TOKEN


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


def stop_file(run_dir: Path, token: str = "") -> Path:
    """How a launching process passes a signal on to its own ranks, whatever lies between; without a token: to any."""
    return run_dir / (f"{STOP_FILE}.{token}" if token else STOP_FILE)


def stop_requested(flag: StopFlag, run_dir: Path, token: str = "") -> bool:
    """Whether a signal has come, or one of the two files: that of the launching process, and the one for anybody."""
    return flag.signal is not None or any(stop_file(run_dir, name).exists() for name in {"", token})


def request_stop(run_dir: Path, token: str = "") -> None:
    """Asks a running training to save and end after its present window."""
    run_dir.mkdir(parents=True, exist_ok=True)
    stop_file(run_dir, token).touch()


def clear_stop(run_dir: Path, token: str = "") -> None:
    stop_file(run_dir, token).unlink(missing_ok=True)


def mark_requeue(run_dir: Path, wanted: bool) -> None:
    """Leaves the mark by which a batch script knows that the job is to be queued again, or takes an old one away."""
    mark = run_dir / "REQUEUE"
    if wanted:
        mark.write_text(f"{os.environ.get('SLURM_JOB_ID', '')}\n")
    else:
        mark.unlink(missing_ok=True)
