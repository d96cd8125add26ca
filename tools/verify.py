"""Check every byte of a shard set; needs no torch, and no installation of dsvlm."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dsvlm.data.commands import run_tool  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_tool("verify"))
