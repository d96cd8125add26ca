"""Build hooks: ds_configs/ goes into the wheel; the compiled ops (`dsvlm/ops/csrc`) attach here when they come."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
CSRC = HERE / "dsvlm" / "ops" / "csrc"


class BuildPackage(build_py):
    """Copies the repository's ds_configs/ into the package, where an installed `dsvlm` finds it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "dsvlm", "ds_configs")
            shutil.copytree(HERE / "ds_configs", target, dirs_exist_ok=True)


def extensions() -> list:
    """The compiled libraries to build: one per directory of `dsvlm/ops/csrc` that holds sources; none yet."""
    assert not CSRC.exists(), "sources were added to dsvlm/ops/csrc: describe how to build them here"
    return []


setup(ext_modules=extensions(), cmdclass={"build_py": BuildPackage})
