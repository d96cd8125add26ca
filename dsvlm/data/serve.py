"""A worker process: takes jobs from the queue of its rank until that closes, and holds nothing that would be missed."""

import faulthandler
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np

from dsvlm.data.blocks import HEAD, BlockView, as_images
from dsvlm.data.jobs import Job, carry_out, pack
from dsvlm.data.locks import PATIENCE
from dsvlm.data.reading import Reading

STARTING, IDLE = -1, 0  # words of a worker; others are the number of a job and the place of an item in it
PLACES = 2**16  # of a job, at most
MOST = HEAD // 16  # workers of a rank: each has two words, what it is at and a beat while it waits for a store
LENGTH = struct.Struct("<Q")  # before every answer
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FETCHING, BEAT = 32, 0.25  # hints carried out at a time, most of which wait for a store; seconds


def serve() -> None:
    """Runs the worker. Arguments of the command: its index, then descriptors of queue, answers, blocks and reading."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)  # launchers send them to every process; the training decides when to stop
    faulthandler.enable()
    index, queue, answers, blocks, spec = map(int, sys.argv[1:])
    with open(f"/proc/self/fd/{spec}", "rb") as file:
        reading = pickle.load(file)
    reading.encoder.one_thread = True  # so says the environment that `workers` gives
    try:
        Server(index, socket.socket(fileno=queue), socket.socket(fileno=answers), BlockView(blocks), reading).run()
    except (BrokenPipeError, ConnectionResetError):
        pass  # the training has ended
    os._exit(0)  # without waiting for what is being fetched


class Server:
    """Carries out jobs one by one; hints to fetch are carried out aside, for stores make them wait."""

    def __init__(self, index: int, queue: socket.socket, answers: socket.socket, view: BlockView, reading: Reading):
        self.index, self.queue, self.answers, self.view, self.reading = index, queue, answers, view, reading
        self.lock = threading.Lock()
        self.fetches = ThreadPoolExecutor(FETCHING)
        self.fetching: set[int] = set()  # numbers of jobs

    def run(self) -> None:
        threading.Thread(target=self.beat, daemon=True).start()
        self.view.words[self.index] = IDLE
        while message := self.queue.recv(2**20):
            number, kind, items, step, start, places, skip, after = pickle.loads(message)
            job = Job(kind, items, step, places=places, skip=skip, after=after)
            if kind == "fetch":
                self.fetching.add(number)
                self.fetches.submit(self.fetch, number, job)
                continue
            if kind == "image":
                job.pixels = self.pixels(start, max(places) + 1)
            found = outcome(job, self.reading, lambda place, first=number * PLACES: self.at(first + place))
            self.answer(number, pack(found) if kind == "text" and isinstance(found, list) else found)
            self.at(IDLE)

    def at(self, word: int) -> None:
        self.view.words[self.index] = word

    def pixels(self, start: int, count: int) -> np.ndarray:
        """[count, 3, P, P], the images of the file from `start`."""
        size = self.reading.config.image_size
        return as_images(self.view.show(start, count * 3 * size * size), size)

    def fetch(self, number: int, job: Job) -> None:
        """Answers once the bytes are here: jobs that need them are sent then, and no worker is idle for them.

        Or after a while: a disk may block for longer, and who reads then asks the store itself.
        """
        found = outcome(job, self.reading)
        if isinstance(found, list):
            wait(found, PATIENCE)  # what fails there, fails where it is read
            found = []
        self.answer(number, found)
        self.fetching.discard(number)

    def answer(self, number: int, found: list | tuple | Exception) -> None:
        data = pickle.dumps((number, found), pickle.HIGHEST_PROTOCOL)
        with self.lock:
            self.answers.sendall(LENGTH.pack(len(data)) + data)

    def beat(self) -> None:
        """While a store is waited for, whose patience has a limit, shows that this process has not been stopped.

        Waiting for another process that fetches is no reason: that one may have been stopped.
        """
        while True:
            time.sleep(BEAT)
            if self.fetching or self.reading.is_asking():
                self.view.words[MOST + self.index] += 1


def outcome(job: Job, reading: Reading, begin: Callable[[int], None] = lambda place: None) -> list | Exception:
    """The answer to a job, or the error that says why no run can go on."""
    try:
        return carry_out(job, reading, begin)
    except (ValueError, OSError) as error:
        return ValueError(str(error))
    except Exception:
        return RuntimeError(f"a data worker failed:\n{traceback.format_exc()}")
