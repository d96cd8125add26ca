"""Build hook: the compiled ops (`dsvlm/ops/csrc`) attach here; without them the package is pure Python."""

from pathlib import Path

from setuptools import setup

CSRC = Path(__file__).parent / "dsvlm" / "ops" / "csrc"


def extensions() -> list:
    """The compiled libraries to build: one per directory of `dsvlm/ops/csrc` that holds sources; none yet."""
    assert not CSRC.exists(), "sources were added to dsvlm/ops/csrc: describe how to build them here"
    return []


setup(ext_modules=extensions())
