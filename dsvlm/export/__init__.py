"""Trained models outside dsvlm's runs: `GitVlm` and `GitProcessor` load an exported folder."""

from dsvlm.export.hf import export_run
from dsvlm.export.processor import GitProcessor
from dsvlm.model.git import GitVlm

__all__ = ["GitProcessor", "GitVlm", "export_run"]
