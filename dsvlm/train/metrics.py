"""What a run writes about itself: metrics.jsonl (a line per update), TensorBoard, journal.jsonl and a progress bar."""

import json
import sys
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from dsvlm.data.files import write_file


class Metrics:
    """Writers of rank 0; every method does nothing on other ranks.

    start: updates done before this start. Lines of later updates, left by a start that was interrupted after its last
    checkpoint, are cut off, so that the files always tell one uninterrupted run.

    error: why something could not be written, for all ranks to end with; this one alone would leave the others waiting.
    """

    def __init__(self, run_dir: Path, rank: int, start: int, steps: int, log_every: int):
        self.on, self.log_every, self.run_dir = rank == 0, log_every, run_dir
        self.error: str | None = None
        if not self.on:
            return
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.lines = reopen(run_dir / "metrics.jsonl", start)
        self.journal_lines = reopen(run_dir / "journal.jsonl", start)
        self.board = SummaryWriter(run_dir / "tensorboard", purge_step=start)
        self.bar = tqdm(total=steps, initial=start, unit="update", dynamic_ncols=True, file=sys.stderr, mininterval=1.0)

    def write(self, row: dict) -> None:
        """row: as in metrics.jsonl; nested dicts become TensorBoard groups."""
        if not self.on:
            return
        self.bar.update()
        with self.noted("metrics.jsonl"):
            self.lines.write(json.dumps(row) + "\n")
            if row["step"] % self.log_every == 0:
                self.lines.flush()
        if row["step"] % self.log_every == 0:
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['tokens_per_s']:.0f} tokens/s", refresh=False)
            with self.noted("tensorboard"):
                self.draw(row)

    def draw(self, row: dict) -> None:
        for name, value in row.items():
            for sub, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, (int, float)) and name != "step":
                    self.board.add_scalar(f"{name}/{sub}" if sub else name, number, row["step"])

    def journal(self, entries: Iterable[dict]) -> None:
        """Samples that were masked instead of trained on."""
        if self.on:
            with self.noted("journal.jsonl"):
                for entry in entries:
                    self.journal_lines.write(json.dumps(entry) + "\n")
                self.journal_lines.flush()

    def flush(self) -> None:
        """Has everything written that was told; OSError when it could not be."""
        if self.on:
            with self.noted("metrics.jsonl"):
                self.lines.flush()
            with self.noted("tensorboard"):
                self.board.flush()
            if self.error:
                raise OSError(self.error)

    def close(self) -> None:
        """What matters has been flushed by now, or the run ends with the reason why it was not."""
        if self.on:
            for file in (self.bar, self.board, self.lines, self.journal_lines):
                with suppress(OSError):
                    file.close()

    @contextmanager
    def noted(self, name: str):
        try:
            yield
        except OSError as error:
            what = f"{self.run_dir / name} cannot be written: {error.strerror or error}"
            self.error = self.error or f"{what}; make room, or move the run directory"


def reopen(path: Path, start: int):
    """Opens a file of JSON lines for appending after its lines of steps below `start`."""
    kept = [line for line in read_lines(path) if line.get("step", start) < start]
    write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return path.open("a")


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file of JSON lines; none when there is no file.

    A kill cuts the last one off, and a disk may damage any: they are left out, for the others tell of the run alone.
    """
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
