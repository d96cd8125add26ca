"""Who am I among the ranks, and how they are started: by the deepspeed launcher, torchrun, srun, or alone."""

import base64
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsvlm.train.preempt import LAUNCHED, SIGNALS, clear_stop, install_handlers, request_stop

if TYPE_CHECKING:
    import torch

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world_size: int


def find_ranks(environ: Mapping[str, str]) -> Ranks:
    """Reads the launcher's variables; none of RANK and WORLD_SIZE means one process.

    Raises ValueError naming what is missing or wrong.
    """
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            raise ValueError(
                f"RANK is not set, but SLURM started {environ['SLURM_NTASKS']} tasks: start them as slurm/train.sbatch "
                "does, with RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
            )
        return Ranks(0, 0, 1)
    missing = [name for name in VARIABLES if name not in environ]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not set, while {'RANK' if 'RANK' in environ else 'WORLD_SIZE'} is: start with "
            "`dsvlm train RECIPE --nproc N`, `deepspeed --num_gpus N --module dsvlm train RECIPE`, torchrun, "
            "or slurm/train.sbatch"
        )
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not re.fullmatch("[0-9]{1,18}", environ[name]):
            raise ValueError(f"{name}={environ[name]!r} is not a number")
        numbers[name] = int(environ[name])
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise ValueError(f"RANK={numbers['RANK']} must be less than WORLD_SIZE={numbers['WORLD_SIZE']}")
    return Ranks(numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"])


def init_distributed(ranks: Ranks, timeout: int) -> "torch.device":
    """Starts the process group (nccl on GPUs, gloo on CPUs) and returns this rank's device."""
    use_cpu_without_gpu()
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    import logging
    import warnings
    from datetime import timedelta

    import deepspeed
    import torch
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch renames; hundreds of lines that no user can act on
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    gpu = os.environ.get("DS_ACCELERATOR") != "cpu"
    if gpu:
        torch.cuda.set_device(ranks.local_rank)
    else:
        leave_out_shared_memory_op()
    if not torch.distributed.is_initialized():
        # Generous: at the start ranks read from disks of their own; steps are watched by the guard's shorter timeout.
        limit = timedelta(seconds=max(1800, timeout))
        deepspeed.init_distributed("nccl" if gpu else "gloo", timeout=limit, auto_mpi_discovery=False, verbose=False)
    return torch.device("cuda", ranks.local_rank) if gpu else torch.device("cpu")


def use_cpu_without_gpu() -> None:
    """Tells DeepSpeed that this machine has no GPU, before it is imported and looks for one."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def leave_out_shared_memory_op() -> None:
    """Keeps DeepSpeed from building and starting its shared-memory all-reduce, which only its inference uses.

    It would take a compiler and 40 s at the first start, wait for ever where a killed build left its lock file, and
    leave 69 MB a rank behind in /dev/shm after every run, until the machine has no memory left (DeepSpeed 0.19.8,
    csrc/cpu/comm/shm.cpp: nothing unlinks what shm_initialize creates).
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(arguments: Sequence[str], nproc: int, run_dir: Path) -> int:
    """Starts `python -m dsvlm ARGUMENTS` on nproc ranks of this machine through the deepspeed launcher.

    Signals to this process ask its ranks, and no others, to save and end; returns the launcher's exit code.
    Raises ValueError, with nothing started, when another training is running in run_dir.
    """
    from dsvlm.train.rundir import lock_run

    pending = install_handlers()
    use_cpu_without_gpu()
    environ = dict(os.environ)
    world = {"localhost": devices_of(nproc, environ)}
    lock_run(run_dir).close()  # said before ranks take a minute to start; rank 0 holds the lock for as long as they run
    environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    # Not its `runner`, which would start ranks on the hosts of /job/hostfile too, take other GPUs than those of
    # CUDA_VISIBLE_DEVICES, and end with code 0 when the launcher itself is killed (deepspeed 0.19.8).
    command = [
        sys.executable, "-m", "deepspeed.launcher.launch", "--world_info",
        base64.urlsafe_b64encode(json.dumps(world).encode()).decode(), "--master_addr", "127.0.0.1",
        "--master_port", str(free_port()), "--log_level", "error", "--module", "dsvlm", *arguments,
    ]  # fmt: skip
    token = environ[LAUNCHED] = secrets.token_hex(8)
    # A session of its own: Ctrl-C then reaches this process alone, and the launcher cannot kill ranks that are saving.
    child = subprocess.Popen(command, env=environ, start_new_session=True)

    asked = False

    def stop(number: int, frame) -> None:
        nonlocal asked
        if number == signal.SIGINT and asked:
            os.killpg(child.pid, signal.SIGKILL)  # the second Ctrl-C means now
        asked = True
        try:
            request_stop(run_dir, token)
        except OSError:  # no room or quota for a file: by signal, which leaves ranks 30 seconds to save
            os.killpg(child.pid, signal.SIGTERM)
        print("dsvlm: stopping: the ranks save after the present update", file=sys.stderr)

    for number in SIGNALS:
        signal.signal(number, stop)
    if pending.signal is not None:
        stop(pending.signal, None)  # it came before there was a rank to ask
    try:
        code = child.wait()
        return code if code >= 0 else 128 - code  # as shells tell a death by signal
    finally:
        clear_stop(run_dir, token)


def devices_of(nproc: int, environ: Mapping[str, str]) -> list[str]:
    """The GPU of each rank, as CUDA_VISIBLE_DEVICES calls it; ValueError when there are fewer. On CPUs, numbers."""
    if environ.get("DS_ACCELERATOR") == "cpu":
        return [str(rank) for rank in range(nproc)]
    import torch

    count, visible = torch.cuda.device_count(), environ.get("CUDA_VISIBLE_DEVICES")
    if nproc > count:
        those = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise ValueError(
            f"--nproc {nproc}: {count} GPUs are there{those}, one for each rank; lower it, or set DS_ACCELERATOR=cpu"
        )
    names = [str(gpu) for gpu in range(count)] if visible is None else [name.strip() for name in visible.split(",")]
    return names[:nproc]
