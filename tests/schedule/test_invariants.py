"""The 21 invariants of the data plane by number: where each is tested, and the tests of those that stand here."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dsvlm.data.manifest import MANIFEST, SHARDS, load_manifest, manifest_bytes
from dsvlm.data.shard import ShardWriter
from dsvlm.schedule import keys, permutation
from dsvlm.schedule.digest import digest, identity_bytes
from dsvlm.schedule.permutation import EpochOrder, permutations, permute
from dsvlm.schedule.plan import STRATEGIES, Plan, Schedule, Stream
from dsvlm.schedule.strategy import deal
from dsvlm.train.build import plan_run
from tests.dist.recipes import tiny

ROOT = Path(__file__).parents[2]
steady = settings(derandomize=True, deadline=None, database=None, phases=[Phase.generate], max_examples=40)

HELD = {
    1: ("World invariance: any W, any cut, the same samples in the same order",
        "schedule/test_strategy.py::test_world_invariance", "schedule/test_invariants.py::test_1_any_world_size",
        "schedule/test_mixture.py::test_every_world_size_runs_the_same_samples",
        "schedule/test_lengths.py::test_buckets"),
    2: ("Task agreement: one task in a round, equally many micro-steps on all ranks",
        "schedule/test_strategy.py::test_rounds", "schedule/test_lengths.py::test_buckets"),
    3: ("Exact coverage: every sample once an epoch",
        "schedule/test_plan.py::test_coverage", "schedule/test_plan.py::test_coverage_of_several_epochs",
        "schedule/test_permutation.py::test_epoch_order"),
    4: ("No loss, no repeat over a resume with any other W",
        "schedule/test_strategy.py::test_resume_with_another_world",
        "schedule/test_controller.py::test_cut_anywhere_and_gone_on_with"),
    5: ("Purity: any order of calls, any process, committed golden vectors",
        "schedule/test_plan.py::test_pure", "schedule/test_plan.py::test_locate_pure",
        "schedule/test_plan.py::test_golden", "schedule/test_digest.py::test_golden",
        "schedule/test_permutation.py::test_golden",
        "schedule/test_invariants.py::test_5_another_process"),
    6: ("Balance inside cycles",
        "schedule/test_plan.py::test_cycles_balance", "schedule/test_mixture.py::test_cycles_balance_in_every_phase"),
    7: ("Cursors without gap or repeat",
        "schedule/test_plan.py::test_ordinals_have_no_gap",
        "schedule/test_mixture.py::test_cursors_are_exact_over_phases",
        "schedule/test_controller.py::test_cursors_are_exact_under_control"),
    8: ("Bijection, all n up to 10^4 and any n up to 2^40",
        "schedule/test_invariants.py::test_8_every_small_size", "schedule/test_permutation.py::test_inverse_large"),
    9: ("Locality: few shards at once", "schedule/test_invariants.py::test_9_locality"),
    10: ("Fillers and masked samples are neutral",
         "train/test_window.py::test_masked_samples_and_fillers_are_neutral", "dist/test_lengths.py::test_strategies"),
    11: ("The gradient does not depend on W",
         "dist/test_gradient.py::test_world_size_and_stage", "dist/test_lengths.py::test_world_size_and_stage"),
    12: ("Corruption stays where it is",
         "data/test_loader.py::test_damage_touches_only_the_samples_it_is_in",
         "train/test_faults.py::test_damaged_samples_are_masked_in_place_and_journalled"),
    13: ("Fingerprint: equal for all W, another when a sample is",
         "schedule/test_digest.py::test_fingerprint_world_invariance",
         "schedule/test_digest.py::test_fingerprint_detects"),
    14: ("A rank that differs is named on all ranks",
         "schedule/test_digest.py::test_digest_detects", "schedule/test_agreement.py::test_large_job",
         "schedule/test_digest.py::test_digest_detects_data_recipe_step_and_version",
         "dist/test_guard.py::test_field_is_named_on_all_ranks", "dist/test_guard.py::test_manifest_and_versions",
         "dist/test_guard.py::test_a_window_that_differs_is_named"),
    15: ("Workers, prefetch, fork or spawn change nothing",
         "data/test_workers.py::test_their_number_changes_nothing",
         "data/test_loader.py::test_order_of_calls_changes_nothing",
         "data/test_shards.py::test_reader_survives_fork_and_pickle"),
    16: ("Round trip; webdataset reads the same",
         "data/test_shards.py::test_round_trip",
         "data/test_shards.py::test_webdataset_reads_the_same_samples_in_the_same_order",
         "data/test_tar_truth.py::test_what_is_written_is_read_by_us_and_by_webdataset"),
    17: ("The index is what tarfile says; truncation is found",
         "data/test_tar_truth.py::test_offsets_are_those_of_tarfile",
         "data/test_tar_truth.py::test_truncation_at_any_byte_is_reported_after_the_whole_members",
         "data/test_shards.py::test_every_truncation_is_found_and_the_samples_before_it_are_read"),
    18: ("Buckets keep epochs exact, padding ends at the bucket", "schedule/test_lengths.py::test_buckets"),
    19: ("State of 1 KB; the work of a resume does not depend on the step",
         "train/test_checkpoint.py::test_state_is_small", "schedule/test_invariants.py::test_19_work_of_a_resume"),
    20: ("A shard that is listed twice is refused unless allowed, and then in another order",
         "schedule/test_invariants.py::test_20_duplicates_are_refused",
         "schedule/test_invariants.py::test_20_shared_shards_give_different_streams"),
    21: ("Memory of workers does not grow", "data/test_workers.py::test_memory_does_not_grow_and_nothing_is_left"),
}  # fmt: skip


@pytest.mark.parametrize("number", range(1, 22))
def test_each_is_held(number):
    """The file is there, and the test in it."""
    for place in HELD[number][1:]:
        file, _, test = place.partition("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), place


@steady
@given(st.data())
def test_1_any_world_size(schedules, data):
    """Up to 20,000 ranks: in every round, each rank begins where the one before it ended, and so does each round."""
    schedule = data.draw(schedules())
    window = Plan(schedule).window(data.draw(st.integers(0, 500)))
    world_size = data.draw(st.integers(1, 20_000))
    rounds = deal(window, schedule, world_size, data.draw(st.integers(1, 20)))
    ranks = data.draw(st.lists(st.integers(0, world_size - 1), max_size=20))
    edges = {0, *(min(rank, len(window) + 1) for rank in range(0, world_size, max(1, world_size // 50))), *ranks}
    done = 0
    for part in rounds:
        assert part.span(0)[0] == done
        for rank in sorted(edges):
            if rank + 1 < world_size:
                assert part.span(rank)[1] == part.span(rank + 1)[0]
        done = part.span(world_size - 1)[1]
        assert sum(len(part.unit(rank).places) for rank in range(min(world_size, len(window)))) == part.samples
    assert done == len(window)


ASKED = """
import sys
from dsvlm.schedule.digest import digest
from dsvlm.schedule.plan import Plan, Schedule, Stream
streams = (Stream("caption", (5, 3, 0, 7, 4), 6, 3), Stream("vqa", (11,), 2, 1))
for strategy in ("accumulate", "mixed", "unified", "per_rank"):
    plan = Plan(Schedule(7, strategy, streams, block=3, group=2, samples=8, chunk=8 if strategy == "unified" else 2))
    for step in map(int, sys.argv[1:]):
        window = plan.window(step)
        epoch, sample = plan.locate_all(window.task, window.ordinal)
        print(digest(b"identity", window), epoch.tolist(), sample.tolist())
"""


def test_5_another_process():
    """Digests and samples of another process, asked for in another order."""
    steps = ["3", "1000003", "0"]
    answers = []
    for order in (steps, steps[::-1]):
        command = [sys.executable, "-c", ASKED, *order]
        lines = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
        answers.append([lines[at : at + 3] for at in range(0, 12, 3)])
    first, second = answers
    assert [group[::-1] for group in second] == first and len({line for group in first for line in group}) == 12
    streams = (Stream("caption", (5, 3, 0, 7, 4), 6, 3), Stream("vqa", (11,), 2, 1))
    window = Plan(Schedule(7, "accumulate", streams, block=3, group=2)).window(3)
    assert first[0][0].startswith(digest(b"identity", window))


def test_8_every_small_size():
    """A permutation for every n up to 10,000.

    Cycle walking makes a bijection of one for any n below its domain; so every domain there is, and sizes beside it.
    """
    sizes = set(range(1, 400))
    for n in range(400, 10_001):
        low_side = 2 ** ((n - 1).bit_length() // 2)
        sizes |= {n - 1, n, n + 1} if n % low_side == 0 else set()
    assert len(sizes) > 800
    for n in sizes:
        image = permutations(n, np.array([n * 7919], np.uint64))[0]
        assert np.array_equal(np.sort(image), np.arange(n)), n
    assert np.array_equal(image, permute(np.arange(n), n, n * 7919))


@steady
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=20), block=st.integers(1, 5), group=st.integers(1, 5),
    key=st.integers(0, 2**64 - 1), data=st.data(),
)  # fmt: skip
def test_9_locality(sizes, block, group, key, data):
    """At any place of an epoch at most `group` shards are begun and not done; a short run stays in two groups."""
    total = sum(sizes)
    ids = EpochOrder(np.array(sizes), block, group, key).samples(np.arange(total))
    shard = np.searchsorted(np.cumsum(sizes), ids, side="right")
    first, last = (np.array([np.flatnonzero(shard == one)[end] for one in range(len(sizes))]) for end in (0, -1))
    places = np.arange(total)[:, None]
    assert ((first <= places) & (places <= last)).sum(axis=1).max() <= group
    length = data.draw(st.integers(1, max(1, sum(sorted(sizes)[:group]))))  # no group but an epoch's last is smaller
    start = data.draw(st.integers(0, total - 1))
    run = shard[start : start + length]
    assert len(set(run.tolist())) <= 2 * group


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_19_work_of_a_resume(strategy, monkeypatch):
    """Numbers that a new plan hashes for its first window: as many at step 10^9 as at step 0."""
    streams = (Stream("a", (50,) * 300, 640, 3), Stream("b", (7,) * 100, 320, 5))
    schedule = Schedule(1, strategy, streams, samples=960, chunk=960 if strategy == "unified" else 8, block=4)

    def work(step: int) -> int:
        hashed = 0

        def counted(x):
            nonlocal hashed
            hashed += x.size
            return mix(x)

        mix = keys.mix
        with monkeypatch.context() as patch:
            patch.setattr(permutation, "mix", counted)
            patch.setattr(keys, "mix", counted)
            plan = Plan(schedule)
            window = plan.window(step)
            rounds = deal(window, schedule, 4, 8)
            plan.locate_all(*window.take(np.concatenate([part.unit(1).places for part in rounds])))
            digest(b"identity", window)
        return hashed

    start = [work(step) for step in range(0, 20, 2)]
    late = [work(10**9 + step) for step in range(0, 20, 2)]
    assert min(start) > 100 and max(late) <= 1.5 * max(start)


@pytest.fixture
def sets(tmp_path):
    """Directory of shard sets: `one`, `copy` of it, `other`, and `twice`, which lists a shard of `one` twice."""
    for name in ("one", "other"):
        with ShardWriter(tmp_path / name, "vqa", shard_bytes=4000) as writer:
            for index in range(12):
                record = {"question": f"{name} {index}?", "answer": "yes"}
                writer.write(f"{name}{index}", {"json": json.dumps(record).encode()})
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    shutil.copytree(tmp_path / "one", tmp_path / "twice")
    manifest = load_manifest(tmp_path / "one")
    row = {"name": manifest.names[0], "samples": manifest.sizes[0], "bytes": manifest.bytes[0],
           "sha256": manifest.sha256[0], "index_sha256": manifest.index_sha256[0]}  # fmt: skip
    listed, header = manifest_bytes("vqa", [row, row], manifest.members, {})
    (tmp_path / "twice" / SHARDS).write_bytes(listed)
    (tmp_path / "twice" / MANIFEST).write_bytes(header)
    return tmp_path


def recipe_of(root, allowed: bool, **tasks):
    recipe = tiny(root, data__shared_shards=allowed)
    task = recipe.tasks["lines"]
    return replace(recipe, data=replace(recipe.data, root=str(root), shared_shards=allowed),
                   tasks={name: replace(task, shards=shards) for name, shards in tasks.items()})  # fmt: skip


@pytest.mark.parametrize(
    "tasks, words",
    [
        ({"a": "one", "b": "one"}, ["task b", "one of task a"]),
        ({"a": "one", "b": "other", "c": "copy"}, ["task c", "copy holds the same bytes", "one of task a"]),
        ({"a": "twice"}, ["task a", "twice of task a"]),
    ],
)
def test_20_duplicates_are_refused(sets, tasks, words):
    with pytest.raises(ValueError) as error:
        plan_run(recipe_of(sets, False, **tasks))
    assert all(word in str(error.value) for word in [*words, "shard-000000.tar", "data.shared_shards"]), error.value
    assert len(plan_run(recipe_of(sets, True, **tasks)).manifests) == len(tasks)


def test_20_shared_shards_give_different_streams(sets):
    plan_run(recipe_of(sets, False, a="one", b="other"))
    planned = plan_run(recipe_of(sets, True, a="one", b="one"))
    first, second = (planned.plan.locate(task, np.arange(12))[1].tolist() for task in (0, 1))
    assert first != second and sorted(first) == sorted(second) == list(range(12))
    identities = {plan_run(recipe_of(sets, allowed, a="one", b="other")).identity for allowed in (True, False)}
    assert len(identities) == 1  # allowing it changes nothing of what is trained
    assert identity_bytes(planned.schedule, "r", ["m", "m"]) != identity_bytes(planned.schedule, "r", ["m", "n"])
