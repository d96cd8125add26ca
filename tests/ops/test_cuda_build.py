"""The machine code of the CUDA kernels: no spills, no local memory, tensor cores in use, nothing missing."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dsvlm.ops import library
from tests.ops.emulation.build import CSRC, HERE
from tests.ops.sass import Kernel, kernels_of

ARCHITECTURES = os.environ.get("DSVLM_CUDA_ARCH", "80;90a").split(";")
PLACES = (os.environ.get("PATH"), os.path.join(os.environ.get("CUDA_HOME", ""), "bin"), "/usr/local/cuda/bin")
NVCC = next(filter(None, (shutil.which("nvcc", path=place) for place in PLACES)), None)
GLOBAL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\(")
BUILD = "`python setup.py build_ext --inplace` builds all of it"
HEAD_SIZES, TYPES = (64, 80, 96, 128), ("bf16", "f16")

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc: the library has no CUDA code"),
    pytest.mark.skipif(os.environ.get("DSVLM_CUDA") == "0", reason="DSVLM_CUDA=0: built without CUDA code"),
]


def sources() -> dict[str, set[str]]:
    """The names of all kernels below csrc, by directory; those of a directory without a .cu are not compiled yet."""
    found = {}
    for path in sorted(CSRC.rglob("*.cu*")):
        if not list(path.parent.glob("*.cu")):
            continue
        names = set(GLOBAL.findall(path.read_text()))
        assert len(names) == path.read_text().count("__global__"), f"{path.name}: a kernel whose name is not found"
        found.setdefault(path.parent.name, set()).update(names)
    return {directory: names for directory, names in found.items() if names}


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    path = library.HERE / "_C.abi3.so"
    assert path.exists(), f"nvcc is here, but the library was not built; {BUILD}"
    return kernels_of(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[Kernel]:
    """The kernels of the emulator's tests, and some that must not pass, as nvcc compiles them."""
    folder = tmp_path_factory.mktemp("nvcc")
    code = "".join(f'#include "{HERE / name}"\n' for name in ("matmul.cuh", "probes.cuh", "faulty.cuh"))
    (folder / "all.cu").write_text(code)
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    command = [NVCC, "-std=c++17", "-O3", f"-I{CSRC}", *targets, "-c", "all.cu", "-o", "all.o"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return kernels_of(folder / "all.o")


def named(kernels: list[Kernel], *words: str) -> list[Kernel]:
    """Kernels whose names hold every word as a whole."""
    return [k for k in kernels if all(re.search(rf"\b{word}\b", k.name) for word in words)]


def test_every_kernel_is_there_for_every_architecture(compiled):
    for directory, names in sources().items():
        for name in names:
            for architecture in ARCHITECTURES:
                found = [kernel for kernel in named(compiled, name) if kernel.architecture == f"sm_{architecture}"]
                assert found, f"{directory}: {name} is not in the library for sm_{architecture}; {BUILD}"
    assert {kernel.architecture for kernel in compiled} <= {f"sm_{name}" for name in ARCHITECTURES}


def test_attention_has_every_type_and_head_size(compiled):
    for name in sources().get("git_attention", ()):
        for dtype in TYPES:
            for size in HEAD_SIZES:
                found = [k for k in compiled if re.search(rf"\b{name}<[^>]*\b{dtype}, {size}\b", k.name)]
                assert {k.architecture for k in found} == {f"sm_{a}" for a in ARCHITECTURES}, (name, dtype, size)


def test_no_kernel_spills_and_attention_uses_tensor_cores(compiled):
    attention = set(sources().get("git_attention", ()))
    faults = []
    for kernel in compiled:
        faults += kernel.faults(tensor_cores=any(named([kernel], name) for name in attention))
    assert not faults, "\n".join(faults)


def test_the_kernels_of_the_emulator_s_tests_compile_for_the_device(built):
    """The same source that runs on the CPU: cp.async, ldmatrix and mma become single instructions."""
    matmuls = named(built, "matmul")
    assert len(matmuls) == 2 * len(ARCHITECTURES)
    for kernel in matmuls:
        assert not kernel.faults(tensor_cores=True)
        per_step = kernel.instructions["HMMA"]
        assert per_step == 32 and kernel.instructions["LDSM"] == 20, kernel.instructions  # 4 parts x 8, x (1 + 4)
        assert kernel.instructions["LDGSTS"] and kernel.instructions["LDGDEPBAR"]
    for kernel in named(built, "powers"):
        assert kernel.instructions["MUFU"] == 1


@pytest.mark.parametrize(
    "name, fault",
    [("spilling", "instructions for local memory"), ("indexed", "bytes of stack"), ("scalar", "tensor cores")],
)
def test_faults_are_caught(built, name, fault):
    kernels = named(built, name)
    assert len(kernels) == len(ARCHITECTURES)
    for kernel in kernels:
        assert any(fault in found for found in kernel.faults(tensor_cores=True)), kernel


def test_a_kernel_that_is_missing_is_missed(tmp_path):
    """Names are read from the sources: each way in which a kernel is declared there is understood."""
    for declared in (
        "__global__ void one(int x)",
        "template <class T>\n__global__ void __launch_bounds__(128, Shape<T>::kBlocks(2)) one(T x)",
        "__global__ void __launch_bounds__(kThreads)\n    one(int x)",
    ):
        assert GLOBAL.findall(declared) == ["one"]


def test_device_code_is_small(compiled):
    """The library travels to machines and into wheels: some MB."""
    assert Path(library.HERE / "_C.abi3.so").stat().st_size < 24 << 20
