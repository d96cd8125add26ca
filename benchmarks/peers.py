"""The other loaders, each as its documentation says, on the same JPEG bytes; same decoder, tokenizer and batch.

Every contestant is two functions: `prepare(inputs, directory)` writes what it reads, once, and `open(work)` gives its
batches without end or for one epoch. Where documentation leaves a choice, the faster one was taken.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from benchmarks.inputs import PIXELS
from dsvlm.data.encode import encode_record
from dsvlm.data.manifest import load_manifest
from dsvlm.data.reader import ShardReader
from dsvlm.data.tokenizer import TextCodec
from dsvlm.data.transforms import make_decoder
from dsvlm.tasks import TASK_TYPES

SHUFFLE = 1000  # samples of shuffle buffers: the figure in webdataset's and Energon's examples is 100 to 1000
CHUNK_MB = 64


@dataclass
class Work:
    """What every contestant does: per sample `encode`, per batch `collate`; `directory` holds what `prepare` wrote."""

    directory: Path
    codec: TextCodec
    batch: int
    workers: int

    def __post_init__(self):
        self.decode, self.encoder = make_decoder("pillow", PIXELS), self.codec.encoder()
        self.template = TASK_TYPES["caption"]().sample

    def encode(self, image: bytes, record: dict) -> tuple[torch.Tensor, list[int], list[int]]:
        """(pixels [P, P, 3] uint8, as decoders have them; tokens; targets) of a caption."""
        text = encode_record(record, self.template, self.encoder, 256, encoder_decoder=False, images=True, classes=0)
        return torch.from_numpy(self.decode(image).transpose(1, 2, 0)), text.tokens, text.targets

    def collate(self, samples: list) -> dict[str, torch.Tensor]:
        """A padded batch, pixels [N, 3, P, P] in any order of memory.

        `default_collate` stacks straight into shared memory when it runs in a worker.
        """
        pixels, tokens, targets = zip(*samples, strict=True)
        length = max(map(len, tokens))
        text = np.full((2, len(tokens), length), self.codec.pad_id, np.int64)
        for row, (ids, wanted) in enumerate(zip(tokens, targets, strict=True)):
            text[0, row, : len(ids)], text[1, row, : len(wanted)] = ids, wanted
        return {"pixels": default_collate(list(pixels)).permute(0, 3, 1, 2), "text": torch.from_numpy(text)}


def samples_of(source: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """(key, image, record) of a shard set."""
    reader = ShardReader(load_manifest(source))
    for sample in range(len(reader)):
        yield reader.key(sample), reader.read(sample, "jpg"), reader.read(sample, "json")


# webdataset: https://github.com/webdataset/webdataset (README, "Creating a WebDataset" / wds-distributed): shuffle raw
# samples, map, batch inside the workers, WebLoader with batch_size=None; repeat() rather than epochs.
def prepare_webdataset(source: Path, directory: Path) -> None:
    link_tars(source, directory)


def open_webdataset(work: Work) -> Iterable:
    import webdataset as wds

    urls = sorted(map(str, work.directory.glob("*.tar")))
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls)).repeat().shuffle(SHUFFLE, initial=SHUFFLE)
        .map(lambda s: work.encode(s["jpg"], json.loads(s["json"])))
        .batched(work.batch, collation_fn=work.collate)
    )  # fmt: skip
    return wds.WebLoader(dataset, batch_size=None, num_workers=work.workers)


# MosaicML: https://docs.mosaicml.com/projects/streaming (main concepts, "Dataset conversion", shuffling): MDS shards of
# 64 MB without compression, subclass with __getitem__, shuffle=True (py1e), batch_size given to dataset and DataLoader.
def prepare_mosaic(source: Path, directory: Path) -> None:
    streaming = import_streaming()
    with streaming.MDSWriter(out=str(directory), columns={"jpg": "bytes", "json": "bytes"}) as writer:
        for _, image, record in samples_of(source):
            writer.write({"jpg": image, "json": record})


def open_mosaic(work: Work) -> Iterable:
    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()

    class Captions(streaming.StreamingDataset):
        def __getitem__(self, index: int):
            sample = super().__getitem__(index)
            return work.encode(sample["jpg"], json.loads(sample["json"]))

    dataset = Captions(local=str(work.directory), shuffle=True, batch_size=work.batch)
    return DataLoader(dataset, batch_size=work.batch, num_workers=work.workers, collate_fn=work.collate)


def import_streaming():
    """MosaicML's package imports torchvision for data sets that are not used here.

    A torchvision whose operators do not fit torch (CPU torch, CUDA torchvision) fails at that; declaring the two
    operators that it describes first lets it be imported.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    except ImportError:
        pass
    import streaming
    import streaming.base.util

    return streaming


# litData: https://github.com/Lightning-AI/litData (README, "Speed up model training"): optimize() with chunk_bytes of
# 64 MB, StreamingDataset(shuffle=True) with __getitem__, StreamingDataLoader.
def prepare_litdata(source: Path, directory: Path) -> None:
    import litdata

    reader = ShardReader(load_manifest(source))
    litdata.optimize(
        fn=PairOf(reader), inputs=list(range(len(reader))), output_dir=str(directory), chunk_bytes=f"{CHUNK_MB}MB",
        num_workers=1, verbose=False,
    )  # fmt: skip


@dataclass
class PairOf:
    reader: ShardReader

    def __call__(self, sample: int) -> dict[str, bytes]:
        return {"jpg": self.reader.read(sample, "jpg"), "json": self.reader.read(sample, "json")}


def open_litdata(work: Work) -> Iterable:
    import litdata

    class Captions(litdata.StreamingDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return work.encode(sample["jpg"], json.loads(sample["json"]))

    dataset = Captions(str(work.directory), shuffle=True, drop_last=True)
    return litdata.StreamingDataLoader(
        dataset, batch_size=work.batch, num_workers=work.workers, collate_fn=work.collate
    )


# Energon: https://nvidia.github.io/Megatron-Energon (quickstart; crude datasets; data preparation by program): our very
# tars, prepared; a cooker, encode_sample and batch in the task encoder; get_loader, which is get_savable_loader without
# its snapshots.
def prepare_energon(source: Path, directory: Path) -> None:
    from megatron.energon.flavors import BaseWebdatasetFactory

    link_tars(source, directory)
    tars = sorted(path.name for path in directory.glob("*.tar"))
    ratio = [("train", 1), ("val", 0), ("test", 0)]
    BaseWebdatasetFactory.prepare_dataset(directory, tars, split_parts_ratio=ratio, shuffle_seed=None, workers=2)
    (directory / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def open_energon(work: Work) -> Iterable:
    from megatron import energon

    @energon.edataclass
    class Caption(energon.Sample):
        jpg: bytes
        json: bytes

    @energon.edataclass
    class Encoded(energon.Sample):
        row: tuple

    @energon.stateless
    def cook(sample):
        return Caption(**energon.basic_sample_keys(sample), jpg=sample["jpg"], json=sample["json"])

    class Captions(energon.DefaultTaskEncoder):
        decoder = None  # bytes: decoded below, as for all others
        cookers = [energon.Cooker(cook)]

        @energon.stateless
        def encode_sample(self, sample):
            return Encoded.derive_from(sample, row=work.encode(sample.jpg, json.loads(sample.json)))

        @energon.stateless
        def batch(self, samples):
            return work.collate([sample.row for sample in samples])

    dataset = energon.get_train_dataset(
        work.directory, batch_size=work.batch, shuffle_buffer_size=SHUFFLE, max_samples_per_sequence=100,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=work.workers), task_encoder=Captions(),
    )  # fmt: skip
    return energon.get_loader(dataset)


# Plain files: torch's map-style Dataset and DataLoader, https://pytorch.org/docs/stable/data.html.
def prepare_files(source: Path, directory: Path) -> None:
    for key, image, record in samples_of(source):
        (directory / f"{key}.jpg").write_bytes(image)
        (directory / f"{key}.json").write_bytes(record)


class Files(Dataset):
    def __init__(self, work: Work):
        self.work, self.paths = work, sorted(work.directory.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int):
        path = self.paths[index]
        return self.work.encode(path.read_bytes(), json.loads(path.with_suffix(".json").read_bytes()))


def open_files(work: Work) -> Iterable:
    return DataLoader(
        Files(work), batch_size=work.batch, shuffle=True, num_workers=work.workers, collate_fn=work.collate
    )


def link_tars(source: Path, directory: Path) -> None:
    """The very shards, under another directory, so that nothing is written beside ours."""
    for tar in sorted(source.glob("*.tar")):
        (directory / tar.name).hardlink_to(tar)


PEERS = {
    "webdataset": ("webdataset", prepare_webdataset, open_webdataset),
    "MosaicML streaming": ("mosaicml-streaming", prepare_mosaic, open_mosaic),
    "litData": ("litdata", prepare_litdata, open_litdata),
    "Energon": ("megatron-energon", prepare_energon, open_energon),
    "files and torch DataLoader": ("torch", prepare_files, open_files),
}  # name: (package, prepare, open)


def prepare(name: str, source: Path, directory: Path) -> Path:
    """What a peer reads, written once below `directory`."""
    target = directory / name.split()[0].lower()
    if not target.is_dir():
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        PEERS[name][1](source, part)
        part.rename(target)
    return target
