"""The package with and without its compiled library."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsvlm.ops import library

PACKAGE = Path(library.__file__).parents[1]
USE = """
import torch
from dsvlm.ops import GitMask, git_attention
from dsvlm.ops.library import library
segments = torch.tensor([[0, 0, 0, 1, 1, -1]])
mask = GitMask.from_segments(segments, segments < 0)
q = torch.ones(1, 6, 2, 8, requires_grad=True)
for _ in range(2):
    git_attention(q, q, q, mask).sum().backward()
print(library(), q.grad.isfinite().all().item())
"""


def test_without_the_library_the_reference_serves_and_one_line_says_so(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "dsvlm", ignore=shutil.ignore_patterns("*.so", "csrc", "__pycache__"))
    environment = dict(os.environ, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", USE], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
    assert done.stderr.count("no compiled ops") == 1, done.stderr
    assert str(tmp_path) in done.stderr.splitlines()[0], "another copy of the package was imported"


@pytest.mark.parametrize("compiler, again", [("/bin/false", 1), ("no-such-compiler", 0)])
def test_without_a_compiler_that_works_the_build_succeeds_and_one_line_says_so(tmp_path, compiler, again):
    """Also where there is an nvcc: it fails, and so does what is tried then."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(PACKAGE.parent / name, tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "dsvlm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to("/bin/false")
    environment = dict(os.environ, CXX=compiler, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    environment.pop("DSVLM_CUDA", None)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("built without its compiled ops") == 1, done.stdout
    assert done.stdout.count("trying again without CUDA code") == again
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(not (library.HERE / "_C.abi3.so").exists(), reason="the compiled ops were not built")
def test_the_library_loads_where_torch_has_no_cuda():
    """It asks for no library but torch's own and the system's; CUDA's run-time library is inside.

    The CUDA stream's symbol is weak, and found through libtorch.so, which asks for libtorch_cuda.so if there is one.
    """
    assert library.library()
    path = library.HERE / "_C.abi3.so"
    dump = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dump)
    assert "libtorch.so" in needed
    symbols = subprocess.run(["nm", "-D", str(path)], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"(\w) aoti_torch_get_current_cuda_stream", symbols)) <= {"w"}
    assert not [name for name in needed if re.search("cuda|nvidia|python", name)], needed


def test_a_library_that_does_not_load_is_named_and_left(tmp_path, monkeypatch):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "HERE", tmp_path)
    with pytest.warns(UserWarning, match="no compiled ops.*_C.abi3.so"):
        assert not library.library.__wrapped__()
