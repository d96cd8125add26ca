"""Megatron-Energon prepares our shards and reads the same samples from them."""

import hashlib
import importlib.util
import json
import subprocess
import sys

import pytest

from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.manifest import check_files, load_manifest
from dsvlm.data.reader import ShardReader

# One process: `energon prepare`, as from the command line, then its loader with samples as they lie in the tars.
SCRIPT = """
import hashlib, json, sys
from dataclasses import dataclass

from megatron.energon import Cooker, DefaultTaskEncoder, Sample, WorkerConfig, basic_sample_keys
from megatron.energon import get_loader, get_train_dataset, stateless
from megatron.energon.tools.prepare import command

command(["--non-interactive", "--no-progress", "--num-workers", "1", "--split-ratio", "1,0,0",
         "--sample-type", "CrudeWebdataset", sys.argv[1]], standalone_mode=False)

@dataclass
class Raw(Sample):
    members: dict

@stateless
def cook(sample):
    members = {ext: hashlib.sha256(data).hexdigest() for ext, data in sample.items() if not ext.startswith("__")}
    return Raw(**basic_sample_keys(sample), members=members)

class Encoder(DefaultTaskEncoder):
    decoder = None
    cookers = [Cooker(cook)]

dataset = get_train_dataset(sys.argv[1], worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
                            batch_size=None, shuffle_buffer_size=None, max_samples_per_sequence=None,
                            task_encoder=Encoder(), repeat=False)
print("READ", json.dumps([[sample.__key__, sample.members] for sample in get_loader(dataset)]))
"""


def has_energon() -> bool:
    return importlib.util.find_spec("megatron") is not None and importlib.util.find_spec("megatron.energon") is not None


@pytest.mark.skipif(not has_energon(), reason="megatron-energon is not installed")
def test_energon_prepares_and_reads_our_shards(tmp_path):
    make_scenes(tmp_path, samples=12, val_samples=0, tasks=("caption",), shard_mb=0.012)
    manifest = load_manifest(tmp_path / "train/caption")
    assert len(manifest.names) > 2
    command = [sys.executable, "-c", SCRIPT, str(manifest.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("READ "))
    reader = ShardReader(manifest)
    ours = {reader.key(i): {ext: hashlib.sha256(reader.read(i, ext)).hexdigest() for ext in manifest.members}
            for i in range(len(reader))}
    theirs = json.loads(line.removeprefix("READ "))
    assert len(theirs) == len(ours) == 12 and dict(theirs) == ours
    check_files(load_manifest(manifest.path))                 # what it wrote beside our files is in nobody's way
