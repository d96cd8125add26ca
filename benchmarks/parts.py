"""What one benchmark of a GPU run leaves behind: records, verdicts and text in a file that is whole at any moment."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from benchmarks.measure import Row


def save_part(path: Path | None, name: str, text: str, rows: Iterable[Row], complete: bool, **more) -> None:
    """Replaces the part's file: a run that is killed leaves what it had measured. rows: verdicts against goals."""
    if path is None:
        return
    found = {"part": name, "complete": complete, "rows": [row.to_dict() for row in rows], **more, "text": text}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(part, path)


def load_parts(directory: Path) -> list[dict]:
    """All parts of a run, in order of their files' names."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A markdown table; all columns but the first to the right."""
    head = list(head)
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])
