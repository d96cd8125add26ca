"""Bad input: a clear error before anything starts, or a masked sample in its place with a line in the journal."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from dsvlm.data.convert.scenes import make_scenes
from dsvlm.data.index import ShardIndex
from dsvlm.data.shard import ShardWriter
from dsvlm.train.build import make_loader, make_tokenizer, plan_run
from dsvlm.train.checkpoint import RunState, begin, directory_of, finish
from dsvlm.train.loop import start_record
from dsvlm.train.metrics import reopen
from dsvlm.train.rundir import check_start, identity_of, open_run, prepare_run, read_recipe, run_decoder
from tests.dist.recipes import tiny

TASKS = {
    "question": {"type": "vqa", "shards": "train/question", "samples": 6},
    "locate": {"type": "locate", "shards": "train/locate", "samples": 4},
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    make_scenes(root, samples=12, val_samples=4, tasks=("question", "locate"))
    return root


@pytest.fixture
def root(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / "data")


def loader_of(root, rank=0, world_size=1, codec=None, **changes):
    planned = plan_run(tiny(root, tasks=TASKS, **changes))
    return make_loader(planned, codec or make_tokenizer(planned), 40, rank, world_size)


def damage(root, task: str, row: int, extension: str) -> str:
    """Flips a byte in the middle of one member; returns where."""
    shard = root / f"train/{task}/shard-000000.tar"
    index = ShardIndex(shard.with_suffix(".arrow"))
    offset, size, _ = index.member(row, extension)
    with shard.open("r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))
    return f"shard-000000.tar:{index.key(row)}"


def epoch_of(loader, steps: int):
    """All batches and journal lines of some windows."""
    batches, journal = [], []
    for step in range(steps):
        window = loader.window(step)
        batches += list(loader.batches(window, [1.0, 1.0]))
        journal += loader.journal(window)
    return batches, journal


def test_damaged_samples_are_masked_in_place_and_journalled(clean, root):
    """Everything else stays as it is: ids, shapes, order, targets, and the counts that normalise the window."""
    bad = {damage(root, "question", 3, "png"), damage(root, "locate", 5, "json"), damage(root, "locate", 7, "png")}
    loader = loader_of(clean)
    (good_batches, none), (batches, journal) = epoch_of(loader, 3), epoch_of(loader_of(root, codec=loader.codec), 3)
    assert not none and {entry["where"] for entry in journal} == bad
    assert all(entry["reason"] and entry["task"] in TASKS for entry in journal)
    assert sum(int((b.weight == 0).sum()) for b in batches) == len(journal)
    for a, b in zip(good_batches, batches, strict=True):
        live = b.weight > 0
        assert torch.equal(a.keys, b.keys) and torch.equal(a.task, b.task) and torch.equal(a.image_row, b.image_row)
        width = min(a.tokens.shape[1], b.tokens.shape[1])
        assert torch.equal(a.tokens[live][:, :width], b.tokens[live][:, :width])
        assert torch.equal(a.pixels[live], b.pixels[live])
        assert not b.pixels[~live].any() or b.lengths[~live].min() == 2  # black, or its record is what was damaged


def test_an_image_that_fails_keeps_its_place_in_the_count(clean, root):
    damage(root, "question", 3, "png")
    for step in range(2):
        assert np.array_equal(loader_of(clean).window(step).counts, loader_of(root).window(step).counts)


def test_text_too_long_is_masked(root):
    batches, journal = epoch_of(loader_of(root, text__max_length=12), 2)
    assert journal and all("text.max_length (12)" in entry["reason"] for entry in journal)


def test_record_of_another_type_is_masked(root):
    shutil.rmtree(root / "train/locate")
    with ShardWriter(root / "train/locate", "locate") as writer:
        for i in range(4):
            writer.write(f"k{i}", {"json": json.dumps({"nmae": i}).encode()})
    planned = plan_run(tiny(root, tasks=TASKS))
    loader = make_loader(planned, make_tokenizer(planned), 40, 0, 1)
    window = loader.window(0)
    assert [entry["task"] for entry in loader.journal(window)] == ["locate"] * 4
    assert "does not fit the task" in loader.journal(window)[0]["reason"]


def test_the_cache_changes_nothing(root):
    damage(root, "question", 3, "png")
    (plain, journal), (other, other_journal) = (epoch_of(loader_of(root, data__cache_mb=size), 3) for size in (0, 1))
    assert journal == other_journal
    for a, b in zip(plain, other, strict=True):
        tensors = [(x, vars(b)[name]) for name, x in vars(a).items() if torch.is_tensor(x)]
        assert all(torch.equal(x, y) for x, y in tensors)


def test_ranks_share_a_window_without_overlap(root):
    whole = loader_of(root).window(0)
    shares = [loader_of(root, rank, 3).window(0) for rank in range(3)]
    assert len({len(share.units) for share in shares}) == 1
    ids = sorted((d.task, d.ordinal) for share in shares for d in share.drafts)
    assert ids == sorted((d.task, d.ordinal) for d in whole.drafts)
    assert np.array_equal(sum(share.counts for share in shares), whole.counts)


@pytest.mark.parametrize("break_it, words", [
    (lambda root: (root / "train/locate/shard-000000.tar").unlink(), ["task locate", "shard-000000.tar"]),
    (lambda root: truncate(root / "train/locate/shard-000000.tar"), ["task locate", "shard-000000.tar", "bytes"]),
    (lambda root: shutil.rmtree(root / "train/locate"), ["task locate", "train/locate"]),
    (lambda root: (root / "train/locate/shards.arrow").write_bytes(b"x"), ["task locate", "shards.arrow"]),
    (lambda root: other_type(root / "train/locate"), ["task locate", "'vqa'", "tasks.locate.type"]),
])  # fmt: skip
def test_broken_shard_sets_are_one_error_before_the_start(root, break_it, words):
    break_it(root)
    with pytest.raises(ValueError) as error:
        loader_of(root)
    for word in words:
        assert word in str(error.value)


def truncate(path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def other_type(directory) -> None:
    shutil.rmtree(directory)
    shutil.copytree(directory.parent / "question", directory)


def test_a_task_without_samples_is_refused_where_it_would_be_written(tmp_path):
    with pytest.raises(ValueError, match="no sample"), ShardWriter(tmp_path / "empty", "locate"):
        pass
    assert not (tmp_path / "empty/manifest.json").exists()


def test_a_run_is_not_gone_on_with_other_data_or_another_recipe(root, tmp_path):
    output = str(tmp_path / "run")
    prepare_run(plan_run(tiny(root, tasks=TASKS, output=output)))
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0}\n')
    prepare_run(plan_run(tiny(root, tasks=TASKS, output=output, train__micro_batch=5)))  # execution may change
    with pytest.raises(ValueError, match="optim.lr: was 0.01, now 0.5"):
        prepare_run(plan_run(tiny(root, tasks=TASKS, output=output, optim__lr=0.5)))
    shutil.rmtree(root / "train")
    make_scenes(root / "new", samples=14, val_samples=4, tasks=("question", "locate"))
    shutil.move(root / "new/train", root / "train")
    with pytest.raises(ValueError, match="manifest of task locate.*restore the data.root"):
        prepare_run(plan_run(tiny(root, tasks=TASKS, output=output)))


def test_a_run_is_not_gone_on_with_its_tasks_in_another_order(root, tmp_path):
    """All that has a name is the same, and so is the identity of the recipe; the windows are not."""
    output = str(tmp_path / "run")
    planned = plan_run(tiny(root, tasks=TASKS, output=output))
    prepare_run(planned)
    directory = directory_of(planned.recipe.run_dir, 1)
    begin(directory, state := RunState(1, 5, planned.identity.hex(), 1, "x"))
    finish(directory, state, {})
    other = plan_run(tiny(root, tasks=dict(reversed(TASKS.items())), output=output))
    assert other.recipe.identity_hash() == planned.recipe.identity_hash() and other.identity != planned.identity
    for check in (prepare_run, check_start):
        with pytest.raises(ValueError, match="tasks were in another order, .* now it is locate, question. To go on"):
            check(other)
    here, there = start_record(planned), start_record(other)
    assert [key for key in here if here[key] != there[key]] == ["order of tasks"], "ranks that disagree say so"
    assert list(read_recipe(planned.recipe.run_dir).tasks) == list(TASKS), "what eval reads heads by"
    prepare_run(planned)


def test_a_start_that_failed_before_its_first_update_may_be_corrected(root, tmp_path):
    """Its vocabulary, too, is made again: it may be what was wrong."""
    output = str(tmp_path / "run")
    prepare_run(plan_run(tiny(root, tasks=TASKS, output=output, text__vocab_size=48)))
    corrected = plan_run(tiny(root, tasks=TASKS, output=output, optim__lr=0.5))
    prepare_run(corrected)
    assert open_run(corrected)[0].hash() == make_tokenizer(corrected).hash()
    for text in ("", "{}"):
        (tmp_path / "run/run.json").write_text(text)
        with pytest.raises(ValueError, match="run.json is damaged"):
            prepare_run(corrected)


def test_a_number_of_another_kind_is_named(root, tmp_path):
    """The identity of a run tells 0 from 0.0."""
    changes = {"tasks": TASKS, "output": str(tmp_path / "run")}
    prepare_run(plan_run(tiny(root, **changes)))
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0}\n')
    record = json.loads((tmp_path / "run/run.json").read_text())
    empty = next(field for field, value in record["recipe"].items() if value is None)
    del record["recipe"][empty]  # as a version wrote it that did not know the field
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    prepare_run(plan_run(tiny(root, **changes)))
    with pytest.raises(ValueError, match="dropout.*: was .*0.0.*, now .*0"):
        prepare_run(plan_run(tiny(root, **changes, model__decoder__config__dropout=0)))


def test_a_vocabulary_that_was_changed_is_refused(root, tmp_path):
    """One that Transformers still reads would split every text in another way, without a word."""
    planned = plan_run(tiny(root, tasks=TASKS, output=str(tmp_path / "run")))
    prepare_run(planned)
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0}\n')
    prepare_run(planned)
    path = tmp_path / "run/tokenizer/tokenizer.json"
    whole = path.read_text()
    path.write_text(whole.replace("-", "-1", 1))
    with pytest.raises(ValueError, match="tokenizer.json is not the file that the run began with"):
        open_run(planned)
    record = json.loads((tmp_path / "run/run.json").read_text())
    del record["tokenizer"]  # runs of older versions do not say it
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    prepare_run(planned)
    open_run(planned)
    path.write_text(whole[:100])
    with pytest.raises(ValueError, match="^text.tokenizer: .*run/tokenizer cannot be loaded: [^\n]*$"):
        open_run(planned)


def test_lines_that_are_damaged_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n\xff\xfe\n{}\n[]\n{"step": 2}\n{"step": 3}\n{"st')
    with reopen(path, 3) as lines:
        lines.write("more\n")
    assert path.read_text() == '{"step": 0}\n{"step": 2}\nmore\n'


def test_runs_of_versions_that_did_not_count_positions_go_on(root, tmp_path):
    """A new run needs a place for each token; one that has begun is gone on with and evaluated as it is."""
    recipe = tiny(root, tasks=TASKS, output=str(tmp_path / "run"), text__max_length=100)
    for starts in (prepare_run, check_start):
        with pytest.raises(ValueError, match="text.max_length: 100 tokens after 5 image tokens are more than"):
            starts(plan_run(recipe))
    prepare_run(plan_run(tiny(root, tasks=TASKS, output=str(tmp_path / "run"))))
    (tmp_path / "run/run.json").write_text(json.dumps(identity_of(plan_run(recipe))))
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 0}\n')
    check_start(plan_run(recipe))
    prepare_run(plan_run(recipe))
    assert read_recipe(tmp_path / "run") == recipe
    (tmp_path / "run/recipe.yaml").write_text("name: [")
    with pytest.raises(ValueError, match="recipe .*recipe.yaml: not valid YAML"):
        read_recipe(tmp_path / "run")


def test_a_label_that_no_head_knows_is_masked(root):
    shutil.rmtree(root / "train/locate")
    with ShardWriter(root / "train/locate", "pair") as writer:
        for i in range(4):
            writer.write(f"k{i}", {"json": json.dumps({"text": "red", "label": (0, 2, -100, 9)[i]}).encode()})
    tasks = TASKS | {"locate": {"type": "pair", "shards": "train/locate", "samples": 4, "classes": 3}}
    planned = plan_run(tiny(root, tasks=tasks))
    loader = make_loader(planned, make_tokenizer(planned), 40, 0, 1)
    window = loader.window(0)
    assert window.counts[1] == 2
    assert sorted(entry["reason"].split()[1] for entry in loader.journal(window)) == ["-100", "9"]


def test_a_disk_error_in_the_middle_of_a_window_masks_the_sample(root, monkeypatch):
    loader = loader_of(root)

    def broken(sample):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(loader.sources[1].reader, "image", broken)
    _, journal = epoch_of(loader, 1)
    assert [entry["task"] for entry in journal] == ["locate"] * 4 and "Input/output" in journal[0]["reason"]


def test_too_many_bad_samples_stop_all_ranks_with_one_message(root, tmp_path):
    """On two real ranks: the journal names every masked sample, and the exit code says that something is wrong."""
    bad = {damage(root, "question", row, "png") for row in range(11)}
    recipe = tiny(root, tasks=TASKS, train__zero=3, schedule__steps=9, output=str(tmp_path / "run"))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    command = [sys.executable, "-m", "dsvlm", "train", str(path), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "samples could not be used, more than data.max_bad_share (0.01)" in done.stderr
    assert "Traceback" not in done.stderr
    journal = [json.loads(line) for line in (tmp_path / "run/journal.jsonl").read_text().splitlines()]
    assert len(journal) >= 10 and {entry["where"] for entry in journal} <= bad
    masked = [json.loads(line)["masked"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(masked) == len(journal)
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_a_run_keeps_the_decoder_that_auto_was(root, tmp_path, monkeypatch):
    """Also where another one is installed later; runs from before it was recorded were decoded by Pillow."""
    from dsvlm.data import transforms

    def decoder_of(name, **changes):
        planned = plan_run(tiny(root, tasks=TASKS, output=str(tmp_path / name), **changes))
        prepare_run(planned)
        return run_decoder(planned)

    there = transforms.find_spec
    monkeypatch.setattr(transforms, "find_spec", lambda name: None if name == "simplejpeg" else there(name))
    assert decoder_of("old") == "pillow"
    with pytest.raises(ValueError, match="data.decoder.*simplejpeg, which is not installed here"):
        decoder_of("other", data__decoder="simplejpeg")
    assert not (tmp_path / "other/run.json").exists()
    monkeypatch.setattr(transforms, "find_spec", lambda name: True)
    assert decoder_of("old") == "pillow" and decoder_of("new") == "simplejpeg" and decoder_of("new") == "simplejpeg"
    path = tmp_path / "old/run.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "decoder"}))
    assert decoder_of("old") == "pillow"
    monkeypatch.setattr(transforms, "find_spec", lambda name: None if name == "simplejpeg" else there(name))
    with pytest.raises(ValueError, match="not installed here"):
        decoder_of("new")


def test_a_worker_that_hangs_must_be_replaced_before_the_ranks_give_up(root):
    """The sample is masked after its second hang, so two of them and the rest of the window must fit."""
    message = r"worker_timeout: 20 seconds are more than a third of train.timeout \(59\).* lower it, or .* to 60"
    with pytest.raises(ValueError, match=message):
        tiny(root, data__workers=1, train__timeout=59)
    tiny(root, data__workers=0, train__timeout=59)
    tiny(root, data__workers=1, train__timeout=60)
    tiny(root, data__workers=1, train__timeout=59, data__worker_timeout=19)
