"""Readers that end their process; workers import this file, so it needs little else."""

import os
import signal
import time

from dsvlm.data.reader import ShardReader


class Deadly(ShardReader):
    """A reader that ends its process at one image."""

    def __reduce__(self):
        return type(self), (self.manifest,)

    def image(self, sample):
        if sample == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image(sample)


class DeadlyText(Deadly):
    """A reader that hangs at one record."""

    image = ShardReader.image

    def record(self, sample):
        if sample == 5:
            time.sleep(3600)
        return super().record(sample)


class DeadlyTexts(Deadly):
    """A reader that ends its process at every record."""

    image = ShardReader.image

    def record(self, sample):
        os.kill(os.getpid(), signal.SIGKILL)


class Unusable(Deadly):
    """A reader that cannot even be made."""

    def __setstate__(self, state):
        raise RuntimeError("this reader cannot be made")

    def __reduce__(self):
        return type(self), (self.manifest,), {"any": 1}


class Patient(Deadly):
    """A reader whose store makes it wait, hints first and then one read."""

    image = ShardReader.image
    is_asking = False

    def __init__(self, manifest):
        super().__init__(manifest)
        self.is_remote = True

    def fetch(self, samples, when, after):
        time.sleep(1.5)
        return []

    def record(self, sample):
        if sample == 5:
            self.is_asking = True
            time.sleep(2.5)
            self.is_asking = False
        return super().record(sample)
