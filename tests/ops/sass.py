"""Reads the machine code of compiled kernels: what cuobjdump says of their registers, memory and instructions."""

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

# cuobjdump calls nvdisasm; CUDA's toolkit has both, so have these packages
PACKAGES = ("nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")
USAGE = re.compile(r"^\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+) ", re.M)
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", re.M)


@dataclass
class Kernel:
    """A kernel for one architecture: registers a thread, bytes of stack and local memory, instructions by opcode."""

    name: str
    architecture: str
    registers: int
    stack: int
    local: int
    instructions: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.name} for {self.architecture}"

    def faults(self, tensor_cores: bool = False) -> list[str]:
        """What is wrong with it: registers that spill, arrays that live in memory, products without tensor cores."""
        found = []
        if self.stack or self.local:
            found.append(f"{self}: {self.stack} bytes of stack, {self.local} bytes of local memory")
        if traffic := {name: self.instructions[name] for name in ("LDL", "STL") if self.instructions[name]}:
            found.append(f"{self}: instructions for local memory {traffic}")
        if tensor_cores and not (self.instructions["HMMA"] or self.instructions["HGMMA"]):
            found.append(f"{self}: no instruction for tensor cores")
        return found


def tools() -> dict[str, str]:
    """The environment in which cuobjdump is found; raises LookupError where it is not installed."""
    places = []
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        places += [str(Path(file.locate()).parent) for file in files if file.parent.name == "bin"]
    path = os.pathsep.join([*places, os.environ.get("PATH", "")])
    if not (shutil.which("cuobjdump", path=path) and shutil.which("nvdisasm", path=path)):
        raise LookupError(f"cuobjdump and nvdisasm are not installed: pip install {' '.join(PACKAGES)}")
    return dict(os.environ, PATH=path)


def kernels_of(path: Path) -> list[Kernel]:
    """All kernels in an object file or library, readable names, every architecture."""
    environment = tools()

    def dump(*options: str) -> str:
        command = ["cuobjdump", *options, str(path)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    kernels = {}
    for architecture, part in parts(dump("-res-usage"), r"^arch = (\w+)$"):
        for name, usage in parts(part, r"^ *Function (\S+):$"):
            registers, stack, _, local = map(int, USAGE.search(usage).groups())
            kernels[architecture, name] = Kernel(name, architecture, registers, stack, local)
    architectures = sorted({architecture for architecture, _ in kernels})
    with ThreadPoolExecutor() as pool:  # disassembling takes seconds
        codes = pool.map(lambda architecture: dump("-sass", "-arch", architecture), architectures)
        for architecture, text in zip(architectures, codes, strict=True):
            for name, code in parts(text, r"^\s*Function : (\S+)$"):
                kernels[architecture, name].instructions = Counter(INSTRUCTION.findall(code))
    names = "\n".join(kernel.name for kernel in kernels.values())
    readable = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    for kernel, name in zip(kernels.values(), readable, strict=True):
        kernel.name = name
    return list(kernels.values())


def parts(text: str, heading: str) -> list[tuple[str, str]]:
    """(what the heading names, text below it) for each line that the pattern matches."""
    pieces = re.split(heading, text, flags=re.M)
    return list(zip(pieces[1::2], pieces[2::2], strict=True))
