"""Compiles kernels for the emulator and calls them: CUDA source as host C++, its launches as plain functions."""

import ctypes
import hashlib
import mmap
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "dsvlm" / "ops" / "csrc"
# -fno-gnu-unique and -Bsymbolic: every library has an emulator of its own. Fortified longjmp knows no fibers.
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-shared", "-DDSVLM_EMULATE", "-U_FORTIFY_SOURCE", "-fno-gnu-unique",
    "-Wl,-Bsymbolic", "-Wall", "-Wno-unknown-pragmas", f"-I{HERE}", f"-I{CSRC}",
)  # fmt: skip


class EmulationError(RuntimeError):
    """What a kernel did that no kernel may do, with block and thread."""


class Kernels(ctypes.CDLL):
    """A compiled source; its functions return the status that `launch` gave them."""

    def call(self, name: str, *arguments: Any, seed: int = 0) -> None:
        """Calls an `extern "C"` function that returns cudaError_t: arrays and tensors as pointers, int as int64_t,
        float as float, None as a null pointer; `seed` draws the order of threads. Raises EmulationError."""
        self.dsvlm_emulation_seed(ctypes.c_uint64(seed))
        if getattr(self, name)(*map(as_argument, arguments)):
            self.dsvlm_emulation_error.restype = ctypes.c_char_p
            raise EmulationError(f"{name}: {self.dsvlm_emulation_error().decode() or 'refused'}")


def as_argument(value: Any) -> Any:
    if hasattr(value, "data_ptr"):
        return ctypes.c_void_p(value.data_ptr())
    if hasattr(value, "ctypes"):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


def guarded(values: torch.Tensor) -> torch.Tensor:
    """A contiguous copy whose last byte is the last of its page, with no memory behind: an access beyond is an error.

    Aligned to 16 bytes, so up to 15 bytes behind the last element can be touched unseen.
    """
    size = -(-values.numel() * values.element_size() // 16) * 16
    total = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE
    memory = mmap.mmap(-1, total)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(start + total - mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    offset = total - mmap.PAGESIZE - size
    copy = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
    return copy.view(values.shape).copy_(values)


def emulated(source: str | Path, cache: Path, defines: Iterable[str] = ()) -> Kernels:
    """`source`, a file or C++ text that includes .cuh files by their path below csrc, as a library in `cache`.

    defines: `NAME=value`. A library that `cache` holds already is loaded again. Raises RuntimeError with the
    compiler's messages.
    """
    text = f'#include "{source.resolve()}"\n' if isinstance(source, Path) else source
    command = ["g++", *FLAGS, *(f"-D{define}" for define in defines)]
    content = hashlib.sha256("\n".join([*command, text]).encode())
    for header in sorted([*HERE.glob("*.*h"), *CSRC.rglob("*.*h")]):
        content.update(header.read_bytes())
    name = content.hexdigest()[:16]
    library = cache / f"{name}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        code, part = cache / f"{name}.cpp", cache / f"{name}.part"
        code.write_text(text)
        done = subprocess.run([*command, str(code), "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ does not compile the kernels for the emulator:\n{done.stderr[-8000:]}")
        part.replace(library)
    return Kernels(str(library))
