"""Compiles kernels for the emulator and calls them: CUDA source as host C++, its launches as plain functions."""

import ctypes
import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def emulated(source: str | Path, cache: Path, defines: Iterable[str] = ()) -> Kernels:
    """`source`, a file or C++ text that includes .cuh files by their path below csrc, as a library in `cache`.

    defines: `NAME=value`. A library that `cache` holds already is loaded again. Raises RuntimeError with the
    compiler's messages.
    """
    text = f'#include "{source.resolve()}"\n' if isinstance(source, Path) else source
    command = ["g++", *FLAGS, *(f"-D{define}" for define in defines)]
    name = hashlib.sha256("\n".join([*command, text]).encode()).hexdigest()[:16]
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
