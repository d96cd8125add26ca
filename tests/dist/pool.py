"""Kept process groups: ranks start once per test session and then run case after case, so that a ZeRO case is cheap."""

import faulthandler
import gc
import importlib
import os
import socket
import sys
import traceback
from pathlib import Path
from queue import Empty

import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 180  # seconds a case may take before the ranks' stacks are printed and the pool is ended


class Pool:
    """`world_size` ranks with one process group, which DeepSpeed allows only once per process."""

    def __init__(self, world_size: int):
        context = mp.get_context("spawn")
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        self.inputs = [context.SimpleQueue() for _ in range(world_size)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=work, args=(rank, world_size, port, self.inputs[rank], self.results), daemon=True)
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def run(self, case: str, **arguments) -> list:
        """Calls CASE(**arguments), of `cases` or `runs`, on every rank; the results in order of rank.

        Raises AssertionError with the tracebacks of the ranks that failed.
        """
        for queue in self.inputs:
            queue.put((case, arguments))
        try:
            answers = dict(self.results.get(timeout=TIMEOUT) for _ in self.processes)
        except Empty:
            self.close()
            raise AssertionError(f"a rank gave no answer in {TIMEOUT} s; its stack stands above") from None
        failed = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if failed:
            self.close()  # the others may be out of step with them
        assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in sorted(failed.items()))
        return [answers[rank][1] for rank in range(len(self.processes))]

    def close(self) -> None:
        for queue in self.inputs:
            queue.put(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self.processes = []


def work(rank: int, world_size: int, port: int, inputs, results) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    sys.path.insert(0, str(ROOT))
    import torch

    from dsvlm.train import guard
    from dsvlm.train.launch import find_ranks, init_distributed

    guard.Nodes = kept(guard.Nodes)
    torch.set_num_threads(1)
    init_distributed(find_ranks(os.environ), 60)
    cases = {**vars(importlib.import_module("tests.dist.cases")), **vars(importlib.import_module("tests.dist.runs"))}
    while (message := inputs.get()) is not None:
        case, arguments = message
        faulthandler.dump_traceback_later(TIMEOUT - 10)
        try:
            answer = (True, cases[case](**arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        results.put((rank, answer))
        if not gc.get_freeze_count():
            gc.collect()
            gc.freeze()  # every engine collects garbage: a third of a case's time, with all modules to look at
    os._exit(0)  # DeepSpeed leaves threads behind that would keep an idle rank alive


def kept(make):
    """Makes groups once for each layout of nodes: every case's guard would add four, of three threads each."""
    found = {}

    def made_or_known(nodes: list[list[int]], timeout: int):
        layout = str(nodes), timeout  # all of it: whoever makes a group must have made as many as its other ranks
        if layout not in found:
            found[layout] = make(nodes, timeout)
        return found[layout]

    return made_or_known
