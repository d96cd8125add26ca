"""From the plan's numbers to batches: text of a window first, images lazily and a bounded number ahead."""

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from dsvlm.data.blocks import as_images
from dsvlm.data.collate import Batch, arrange, complete
from dsvlm.data.drafts import Draft, Images, LoadedWindow, Share
from dsvlm.data.encode import masked_sample
from dsvlm.data.jobs import Inline, Job
from dsvlm.data.reading import LoaderConfig, Reading, Source, Text
from dsvlm.data.tokenizer import TextCodec
from dsvlm.data.workers import Workers

__all__ = ["Draft", "LoadedWindow", "Loader", "LoaderConfig", "Source"]
WINDOWS_AHEAD = 2  # whose texts are read while an earlier one trains
UNITS = 8  # whose texts are arranged in one go: code and data that images have driven from the caches are slow at first
FETCHES, TEXTS, IMAGES = 1024, 128, 32  # items of a job, at most: each answer wakes the training's process


class Loader:
    """Reads the samples of one rank.

    plan: `window(step)` and `locate_all(tasks, ordinals)`; deal: `deal(window) -> rounds` with `unit(rank)`.
    sources: tasks in the plan's order.
    """

    def __init__(self, plan, deal, sources: Sequence[Source], codec: TextCodec, config: LoaderConfig):
        self.plan, self.deal, self.sources, self.codec, self.config = plan, deal, sources, codec, config
        self.masked = masked_sample(codec, config.encoder_decoder)
        self.cache = Cache(config.cache_mb * 2**20)
        reading = Reading(sources, codec.encoder(), config)
        self.pool = Workers(reading, config.workers, config.worker_timeout) if config.workers else Inline(reading)
        self.ahead: deque[Share] = deque()  # of steps that follow each other
        self.step = 0

    def window(self, step: int) -> LoadedWindow:
        """Text of this rank's share of a window; with workers, what comes next is asked for too.

        Raises ValueError or OSError when its shards cannot be read.
        """
        if not self.ahead or self.ahead[0].step != step:
            self.forget()
            self.ahead.append(self.begin(step))
        self.step = step
        window = self.finish(self.ahead.popleft())
        while self.pool.ahead and len(self.ahead) < WINDOWS_AHEAD:
            self.ahead.append(self.begin(step + 1 + len(self.ahead)))
        self.look_ahead(window)
        return window

    def batches(self, window: LoadedWindow, weights: Sequence[float]) -> Iterator[Batch]:
        """One batch per micro-step; images that fail to decode become masked rows, with the reason in their draft.

        weights: of each target, per task.
        """
        for index, unit in enumerate(window.units):
            self.look_ahead(window)
            window.asked += [None] * (index + 1 - len(window.asked))
            images = window.asked[index] or self.ask_images(unit, window.step)
            window.asked[index] = None
            if index % UNITS == 0:
                near = range(index, min(index + UNITS, len(window.units)))
                made = [self.arrange(window.units[each], window.shape(each)[0]) for each in near]
            yield self.batch(unit, images, weights, made[index % UNITS], window.shape(index)[1])

    def forget(self) -> None:
        """Drops what was read ahead: the plan has changed, or another step is wanted."""
        self.ahead.clear()

    def journal(self, window: LoadedWindow) -> list[dict]:
        """The masked samples of a window, as journal entries."""
        return [
            {
                "step": window.step,
                "task": self.sources[draft.task].name,
                "where": self.sources[draft.task].reader.where(draft.sample),
                "reason": draft.reason,
            }
            for draft in window.drafts
            if draft.reason
        ]

    def take_events(self) -> list[dict]:
        """What befell the workers since the last call, as journal entries."""
        return [{"step": self.step, "rank": self.config.rank, **event} for event in self.pool.take_events()]

    def close(self) -> None:
        self.pool.close()

    # -- a window, from numbers to texts --

    def begin(self, step: int) -> Share:
        """Looks up what a window holds, and has its shards told."""
        window = self.plan.window(step)
        units = [round_.unit(self.config.rank) for round_ in self.deal(window)]
        tasks, ordinals = window.take(np.concatenate([unit.places for unit in units]))
        epochs, samples = self.plan.locate_all(tasks, ordinals)
        numbers = list(zip(tasks.tolist(), epochs.tolist(), samples.tolist(), ordinals.tolist(), strict=True))
        share = Share(step, [len(u.places) for u in units], [(u.rows, u.width) for u in units], numbers)
        for task in np.unique(tasks).tolist():
            if self.sources[task].reader.is_remote:
                here = tasks == task
                share.fetches += self.ask_fetches(step, tasks[here], epochs[here], samples[here])
        return share

    def ask_fetches(self, step: int, tasks: np.ndarray, epochs: np.ndarray, samples: np.ndarray) -> list[Job]:
        """Has one task's samples brought near, and says when they come again, so that a cache keeps the right ones."""
        after = self.plan.next_use(tasks, epochs, samples).tolist()
        items = list(zip(tasks.tolist(), samples.tolist(), strict=True))
        jobs = [
            Job("fetch", items[first : first + FETCHES], step, after=after[first : first + FETCHES])
            for first in range(0, len(items), FETCHES)
        ]
        return self.submit(jobs)

    def submit(self, jobs: list[Job]) -> list[Job]:
        for job in jobs:
            self.pool.submit(job)
        return jobs

    def ask_texts(self, share: Share) -> None:
        wanted = dict.fromkeys((task, sample) for task, _, sample, _ in share.numbers)
        wanted = [pair for pair in wanted if ("text", *pair) not in self.cache.items]
        size = min(TEXTS, max(1, -(-len(wanted) // max(1, self.config.workers))))
        pieces = range(0, len(wanted), size)
        share.texts = self.submit([Job("text", wanted[first : first + size], share.step) for first in pieces])

    def finish(self, share: Share) -> LoadedWindow:
        """The window with all its texts; waits for them."""
        if share.loaded is not None:
            return share.loaded
        for job in share.fetches:
            self.pool.wait(job)
        if share.texts is None:
            self.ask_texts(share)
        found: dict[tuple[int, int], Text] = {}
        for job in share.texts:
            found |= zip(job.items, self.pool.wait(job), strict=True)
        for pair, text in found.items() if self.cache.limit else ():
            self.keep(pair, text)
        drafts, counts = [], [0] * len(self.sources)
        for task, epoch, sample, ordinal in share.numbers:
            text = found.get((task, sample)) or self.cache.items["text", task, sample]
            drafts.append(Draft(task, epoch, sample, ordinal, text.crc, text.row or self.masked, text.reason))
            counts[task] += text.row.count if text.row else 0
        rest = iter(drafts)
        units = [[next(rest) for _ in range(size)] for size in share.sizes]
        share.loaded = LoadedWindow(share.step, units, np.array(counts, np.int64), share.shapes)
        return share.loaded

    def keep(self, pair: tuple[int, int], text: Text) -> None:
        size = 64 + 16 * len(text.row.ids if text.row else ())
        if self.cache.room(size):
            # Ids of its own: those of a worker are part of its whole answer, which would stay with them.
            row = text.row and text.row._replace(ids=text.row.ids.copy())
            self.cache.put(("text", *pair), text._replace(row=row), size)

    # -- images --

    def look_ahead(self, window: LoadedWindow) -> None:
        """Takes what the workers have done and asks for what comes next, a window's texts before any of its images."""
        if not self.pool.ahead:
            return
        self.pool.poll()
        windows = [window]
        for share in self.ahead:
            if share.texts is None and answered(share.fetches):
                self.ask_texts(share)
            if share.texts is None or not answered(share.texts):
                break
            windows.append(self.finish(share))
        room = self.pool.ahead - sum(len(a.drafts) for w in windows for a in w.asked if a is not None)
        for other in windows:
            while room > 0 and len(other.asked) < len(other.units):
                other.asked.append(self.ask_images(other.units[len(other.asked)], other.step))
                room -= len(other.asked[-1].drafts)

    def ask_images(self, unit: list[Draft], step: int) -> Images:
        drafts = [draft for draft in unit if draft.text.images]
        if not drafts:
            return Images(drafts)
        size = self.config.image_size
        start, memory = self.pool.take(len(drafts) * 3 * size * size)
        images = Images(drafts, as_images(memory, size))
        missing = []
        for place, draft in enumerate(drafts):
            known = self.cache.items.get(("image", draft.task, draft.sample))
            if known is None:
                missing.append(place)
            else:
                images.pixels[place] = known
        for first in range(0, len(missing), IMAGES):
            places = missing[first : first + IMAGES]
            items = [(drafts[place].task, drafts[place].sample) for place in places]
            images.jobs.append(Job("image", items, step, images.pixels, places, start))
        self.submit(images.jobs)
        return images

    def arrange(self, unit: list[Draft], packed: Sequence[int] | None) -> dict:
        """What a unit's batch holds beside images and weights; of a unit without samples, a masked one."""
        if not unit:
            return arrange([self.masked], [], [0], [0], [-1], self.codec.pad_id)
        with_image = [place for place, draft in enumerate(unit) if draft.text.images]
        tasks = [draft.task for draft in unit]
        heads = [self.sources[task].head for task in tasks]
        texts, keys = [draft.text for draft in unit], [self.key(draft) for draft in unit]
        return arrange(texts, with_image, keys, tasks, heads, self.codec.pad_id, packed)

    def batch(self, unit: list[Draft], images: Images, weights: Sequence[float], made: dict, width: int) -> Batch:
        size = self.config.image_size
        for job in images.jobs:
            for place, reason in zip(job.places, self.pool.wait(job), strict=True):
                if reason is not None:
                    draft = images.drafts[place]
                    draft.reason = draft.reason or reason
                elif self.cache.room(3 * size**2):
                    draft = images.drafts[place]
                    pixels = images.pixels[place].copy(order="K")  # in their own order of bytes
                    self.cache.put(("image", draft.task, draft.sample), pixels, 3 * size**2)
        pixels = np.zeros((1, 3, size, size), np.uint8) if images.pixels is None else images.pixels
        own = [0.0 if draft.reason else weights[draft.task] for draft in unit] or [0.0]
        return complete(made, pixels, own, width if unit else 0)

    def key(self, draft: Draft) -> int:
        """What the sample's dropout is keyed by: seed, task and place in the task's stream; never rank or unit."""
        text = f"{self.config.seed}/{self.sources[draft.task].name}/{draft.ordinal}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def answered(jobs: list[Job]) -> bool:
    """Whether all jobs went well; those that failed say so when they are waited for."""
    return all(isinstance(job.answer, list) for job in jobs)


class Cache:
    """Values up to a number of bytes, none of which is ever dropped.

    An epoch repeats nothing: of a data set that does not fit, the first part found each time is more than the latest.
    """

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.items: dict = {}

    def room(self, size: int) -> bool:
        return self.used + size <= self.limit

    def put(self, key, value, size: int) -> None:
        if self.room(size) and key not in self.items:
            self.items[key] = value
            self.used += size
