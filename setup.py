"""Build hooks: ds_configs/ goes into the wheel; `dsvlm/ops/csrc` becomes one library, with CUDA code where nvcc is.

DSVLM_CUDA: 1 = CUDA code or an error, 0 = none; default: where nvcc is found. DSVLM_CUDA_ARCH: "80;90a" by default.
The library uses torch's stable ABI only: one build loads on CPU-only and on CUDA torch, 2.11 or newer.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
CSRC = HERE / "dsvlm" / "ops" / "csrc"
FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
CXX_FLAGS = [*FLAGS, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-fno-math-errno"]
CXX_FLAGS += ["-ffp-contract=fast"]  # what compilers do anyway, and csrc/moe_routing/lanes.h counts on
WITHOUT = "dsvlm: built without its compiled ops, for want of {}; the PyTorch reference serves"
# *_simd.cpp is compiled once for each set of instructions; the machine that runs it picks one (csrc/simd/simd.h)
INSTRUCTIONS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTIONS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    wide = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    INSTRUCTIONS["avx512"] = [*INSTRUCTIONS["avx2"], *wide]


class BuildPackage(build_py):
    """Copies the repository's ds_configs/ into the package, where an installed `dsvlm` finds it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "dsvlm", "ds_configs")
            shutil.copytree(HERE / "ds_configs", target, dirs_exist_ok=True)


class BuildLibrary(build_ext):
    """Compiles `csrc` with g++ and nvcc; where that is not possible, says so in one line and installs without it."""

    def build_extension(self, ext: Extension) -> None:
        torch, compiler = importlib.util.find_spec("torch"), shutil.which(os.environ.get("CXX", "g++"))
        if torch is None or compiler is None:
            missing = "a C++ compiler (g++)" if torch else "torch (install it first, then with --no-build-isolation)"
            print(WITHOUT.format(missing))
            return
        torch_dir = Path(torch.origin).parent
        nvcc, wanted = find_nvcc(), os.environ.get("DSVLM_CUDA", "")
        if wanted == "1" and nvcc is None:
            raise SystemExit("DSVLM_CUDA=1, but there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
        nvcc = None if wanted == "0" else nvcc
        target = Path(self.get_ext_fullpath(ext.name))
        for cuda in [nvcc, None] if nvcc else [None]:
            try:
                return compile_library(target, compiler, cuda, torch_dir)
            except subprocess.CalledProcessError as error:
                if wanted == "1":
                    raise SystemExit(f"{error}\n{error.stderr}") from error
                print(f"{error.stderr}\n{error}", file=sys.stderr)
                again = "dsvlm: trying again without CUDA code"
                print(again if cuda else WITHOUT.format("a compiler that takes them (see above)"))


def compile_library(target: Path, compiler: str, nvcc: str | None, torch_dir: Path) -> None:
    """All sources to objects, two at a time or as many as there are cores, and the objects to one library."""
    include = [f"-I{CSRC}", f"-I{torch_dir / 'include'}"]
    jobs = []
    if nvcc is not None:  # first: they take longest
        architectures = os.environ.get("DSVLM_CUDA_ARCH", "80;90a").split(";")
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
        host = ["-ccbin", compiler, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        binding = [compiler, *CXX_FLAGS, "-x", "c++", *include, f"-isystem{find_cuda_headers(nvcc)}"]
        for source in sorted(CSRC.rglob("*.cu")):
            # without kernels there is nothing for the device: g++ reads torch's headers once, nvcc three times
            has_kernels = '.cuh"' in source.read_text()
            jobs.append((source, "", [nvcc, *FLAGS, *code, *host, *include] if has_kernels else binding))
    for source in sorted(CSRC.rglob("*.cpp")):
        sets = INSTRUCTIONS if source.stem.endswith("_simd") else {"": []}
        for name, flags in sets.items():
            define = [f"-DDSVLM_ISA={name}"] if name else []
            jobs.append((source, name, [compiler, *CXX_FLAGS, *flags, *define, *include]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: compile_object(*job), jobs))
    libraries = [f"-L{torch_dir / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    if nvcc is None:
        run([compiler, "-shared", "-o", str(part), *objects, "-Wl,--no-as-needed", *libraries])
    else:
        host = ["-ccbin", compiler, "-cudart", "static", "-Xlinker", "--no-as-needed"]
        run([nvcc, "-shared", "-o", str(part), *objects, *host, *libraries])
    part.replace(target)


def compile_object(source: Path, variant: str, command: list[str]) -> str:
    """One object file below build/, made again when the command, the source or a header it may include changes."""
    headers = [p for place in {source.parent, CSRC, CSRC / "simd", CSRC / "cuda"} for p in place.glob("*.*h")]
    content = hashlib.sha256(" ".join(command).encode())
    for path in sorted([source, *headers]):
        content.update(path.read_bytes())
    folder = HERE / "build" / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(filter(None, (source.parent.name, source.stem, variant)))
    result = folder / f"{name}-{content.hexdigest()[:16]}.o"
    if not result.exists():
        part = result.with_suffix(f".{os.getpid()}.part")
        run([*command, "-c", str(source), "-o", str(part)])
        part.replace(result)
    return str(result)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    return shutil.which("nvcc") or next((p for h in homes if h and (p := shutil.which("nvcc", path=f"{h}/bin"))), None)


def find_cuda_headers(nvcc: str) -> str:
    """The directory of cuda_runtime.h: nvcc knows it, wherever it is installed and whatever starts it."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    found = [Path(place) for place in re.findall(r'-I([^"\s]+)', done.stderr)]
    found.append(Path(nvcc).resolve().parents[1] / "include")
    return str(next((place for place in found if (place / "cuda_runtime.h").exists()), found[-1]))


library = Extension("dsvlm.ops._C", sources=[], py_limited_api=True, optional=True)
setup(
    ext_modules=[library],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},  # the library has no Python in it
)
