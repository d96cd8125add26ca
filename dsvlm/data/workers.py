"""Worker processes that read for one rank. They hold no state, so any of them can be ended and started again.

Each is a fresh interpreter (never a fork: the ranks have threads) without torch. All take their jobs from one queue of
the kernel, which hands over whole messages, so none is bound to a slow one and none can hold a lock when it dies. Each
answers on a socket of its own, writes pixels into shared blocks, and says in a shared word which sample it is at.
"""

import errno
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence

from dsvlm.data.blocks import Blocks
from dsvlm.data.jobs import Job, unpack
from dsvlm.data.reading import Reading
from dsvlm.data.serve import IDLE, LENGTH, MOST, PLACES, STARTING

PATIENCE = 300  # seconds that workers may take to start: many nodes may be reading the same Python files
GOING = 10  # seconds that one may take to be gone
RESTARTS = 3  # without an answer in between, after which the run cannot go on
DEATHS = 2  # of workers at the same sample, after which it is masked
# Images come and go by the hundred thousand bytes. By default the C library gives such memory back to the kernel each
# time, which costs as much as decoding.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**27),
}  # fmt: skip
AHEAD = 64  # images per worker asked for before they are needed


class Workers:
    """`count` processes that carry out jobs in the order they were submitted.

    timeout: seconds in which something must happen while an answer is waited for.
    """

    def __init__(self, reading: Reading, count: int, timeout: float):
        assert 0 < count <= MOST
        self.reading, self.count, self.timeout, self.ahead = reading, count, timeout, AHEAD * count
        self.blocks = Blocks()
        self.take = self.blocks.take
        self.words = self.blocks.words[:count]
        self.spec = os.memfd_create("dsvlm-reading")
        with open(self.spec, "wb", closefd=False) as file:
            pickle.dump(reading, file)
        self.jobs: dict[int, Job] = {}  # those without an answer
        self.unsent: deque[int] = deque()
        self.number = 0
        self.restarts = 0
        self.deaths: Counter = Counter()  # by kind of job, task and sample
        self.deadly: dict[tuple[str, int, int], str] = {}  # those that are not touched any more, and why
        self.events: list[dict] = []
        self.start()

    def submit(self, job: Job) -> None:
        """Puts a job behind the others."""
        assert len(job.items) < PLACES
        self.number += 1
        self.jobs[self.number] = job
        self.unsent.append(self.number)
        self.send()

    def wait(self, job: Job) -> list:
        """The answer to a job that was submitted; workers that died or hang are started again meanwhile.

        Raises ValueError when that does not help.
        """
        seen, quiet, tick = None, 0.0, min(1.0, self.timeout / 4)
        while job.answer is None:
            start = time.monotonic()
            self.poll(tick)
            if job.answer is not None:
                break  # what follows costs as much as the poll
            # No more than what was waited for: this process may have been stopped too.
            quiet += min(time.monotonic() - start, 2 * tick)
            sight = (len(self.jobs), self.blocks.words.tobytes())
            if sight != seen:
                seen, quiet = sight, 0.0
            if quiet > (max(PATIENCE, self.timeout) if (self.words == STARTING).all() else self.timeout):
                self.replace_hung()
        return job.result()

    def poll(self, seconds: float = 0) -> None:
        """Takes the answers that are there, or the first within `seconds`."""
        dead = self.receive(seconds)
        if dead is not None:
            self.replace_dead(dead)

    def take_events(self) -> list[dict]:
        """What befell the workers since the last call, as journal entries without a step."""
        events, self.events = self.events, []
        return events

    def close(self) -> None:
        """Ends the workers: they have nothing to save."""
        self.stop()
        self.blocks.close()
        if self.spec >= 0:
            os.close(self.spec)
            self.spec = -1

    # -- one generation of workers --

    def start(self) -> None:
        self.words[:] = STARTING
        self.selector = selectors.DefaultSelector()
        self.queue, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.queue.setblocking(False)
        self.answers: list[socket.socket] = []
        self.processes = [self.spawn(index, theirs) for index in range(self.count)]
        theirs.close()
        self.unsent = deque(self.jobs)
        self.send()

    def spawn(self, index: int, queue: socket.socket) -> subprocess.Popen:
        mine, theirs = socket.socketpair()
        files = (queue.fileno(), theirs.fileno(), self.blocks.file, self.spec)
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-c", "from dsvlm.data.serve import serve; serve()", str(index), *map(str, files)],
            pass_fds=files, stdin=subprocess.DEVNULL,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        )  # fmt: skip
        theirs.close()
        mine.setblocking(False)
        self.answers.append(mine)
        self.selector.register(mine, selectors.EVENT_READ, (index, bytearray()))
        return process

    def stop(self) -> None:
        for process in self.processes:
            process.kill()  # also one that is stopped
        for process in self.processes:
            try:
                process.wait(GOING)
            except subprocess.TimeoutExpired:
                pass  # deep in a disk's or a network's driver; it is gone when that returns
        for answers in self.answers:
            answers.close()
        self.processes, self.answers = [], []
        self.selector.close()
        self.queue.close()

    def receive(self, seconds: float) -> int | None:
        """Takes answers, waiting for the first at most `seconds`; the index of a worker that has died, or None."""
        self.send()
        for key, _ in self.selector.select(seconds):
            index, partial = key.data
            try:
                data = key.fileobj.recv(2**16)  # for more, Python asks the system for new pages each time
            except ConnectionResetError:
                data = b""
            if not data:
                return index
            partial += data
            while len(partial) >= LENGTH.size and len(partial) >= (end := LENGTH.size + LENGTH.unpack_from(partial)[0]):
                self.deliver(*pickle.loads(memoryview(partial)[LENGTH.size : end]))
                del partial[:end]
        self.send()
        return None

    def deliver(self, number: int, answer: list | tuple | Exception) -> None:
        self.jobs.pop(number).answer = unpack(*answer) if isinstance(answer, tuple) else answer
        self.restarts = 0

    def send(self) -> None:
        while self.unsent:
            number = self.unsent[0]
            job = self.jobs[number]
            skip = self.skip(job) if self.deadly else {}
            try:
                sent = (number, job.kind, job.items, job.step, job.start, job.places, skip, job.after)
                self.queue.send(pickle.dumps(sent))
            except OSError as error:
                assert error.errno != errno.EMSGSIZE, "jobs are small messages"
                return  # full, so they have enough to do; or nobody is left, which `receive` will see
            self.unsent.popleft()

    def skip(self, job: Job) -> dict[int, str]:
        """Places of the job's items that are not touched any more, with the reason."""
        known = [(place, self.deadly.get((job.kind, *item))) for place, item in enumerate(job.items)]
        return {place: reason for place, reason in known if reason}

    def replace_dead(self, index: int) -> None:
        code = self.processes[index].wait()
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        self.restart(f"a worker process ended ({how})", [index])

    def replace_hung(self) -> None:
        cause = f"no worker did anything for {self.timeout:g} seconds (data.worker_timeout)"
        self.restart(cause, range(self.count))

    def restart(self, cause: str, suspects: Sequence[int]) -> None:
        """Ends all workers and starts others, which go on with the jobs that have no answer."""
        words = [int(self.words[index]) for index in suspects if self.words[index] > IDLE]
        found = [self.blame(*divmod(word, PLACES), cause) for word in words]
        where = "; ".join(["it was at " + sample for sample in found if sample]) or "it was at no sample"
        self.stop()
        self.restarts += 1
        if self.restarts > RESTARTS:
            raise ValueError(
                f"data.workers: {cause}, for the {self.restarts}th time without an answer in between; {where}. "
                "Its own message, if any, stands above; data.workers: 0 reads in the training's own process instead"
            )
        self.events.append({"event": "workers restarted", "reason": f"{cause}; {where}"})
        self.start()

    def blame(self, number: int, place: int, cause: str) -> str | None:
        """Notes at which sample a worker ended; one that does it again is not touched any more. Returns its name."""
        if number not in self.jobs:
            return None  # its answer was on the way
        job = self.jobs[number]
        task, sample = job.items[place]
        self.deaths[job.kind, task, sample] += 1
        if self.deaths[job.kind, task, sample] >= DEATHS:
            self.deadly[job.kind, task, sample] = f"reading it ends workers: {cause}"
            self.restarts = 0  # its job gets further now: there may be others in it
        return self.reading.where(task, sample)
