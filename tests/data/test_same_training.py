"""Where shards lie and who wrote them changes no batch: local, at a URL, and the same tars as another tool's."""

import pytest

from benchmarks import slow_store
from dsvlm.data.adopt import index_set
from dsvlm.data.manifest import load_manifest
from dsvlm.train.build import plan_run
from tests.data.loading import TASKS, everything, loader_of, scenes
from tests.dist.recipes import tiny

STEPS = range(5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def local(root):
    """The codec and all batches of the shards as they lie."""
    loader = loader_of(str(root))
    return loader.codec, everything(loader, STEPS)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_root_at_a_url_gives_the_same_batches(root, local, tmp_path, monkeypatch, workers):
    """Workers are processes of their own that have to find the store themselves."""
    for name, value in slow_store.environment(tmp_path / "package", latency=0.005).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(tmp_path / "package")         # workers get the path of the process that starts them
    store = slow_store.register(latency=0.005)
    codec, expected = local
    cache = str(tmp_path / "cache")
    loader = loader_of(f"slow://{root}", codec, data__remote_cache=cache, data__workers=workers)
    try:
        assert everything(loader, STEPS) == expected
    finally:
        loader.close()
    identities = {plan_run(tiny(where, tasks=TASKS, data__remote_cache=cache)).identity
                  for where in (str(root), f"slow://{root}")}
    assert len(identities) == 1, "a run may be gone on where its shards were copied to"
    if not workers:
        tars = sum(path.endswith(".tar") for path in store.requests)
        assert tars <= len(TASKS) * len(STEPS) * 4, "samples of a window are not asked for one by one"


def test_our_tars_as_another_tools_give_the_same_batches(root, local, tmp_path):
    codec, expected = local
    for name, task in TASKS.items():
        manifest = load_manifest(root / task["shards"])
        shards = [manifest.shard(number) for number in range(len(manifest.names))]
        report = index_set(shards, task["type"], tmp_path / task["shards"])
        assert report["samples"] == manifest.samples, name
    assert everything(loader_of(str(tmp_path), codec), STEPS) == expected
