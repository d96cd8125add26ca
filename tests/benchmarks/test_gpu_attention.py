"""The attention benchmark away from any GPU: exact work, honest peers, checks and verdicts that can fail."""

import inspect
import json
import math

import pytest
import torch

from benchmarks import attention, device
from benchmarks import attention_peers as peers
from benchmarks.attention_shapes import SHAPES, SMOKE, Shape, alike, compared_part, reference
from dsvlm.ops import GitMask
from dsvlm.ops.git_choice import lookup

RAGGED = Shape("ragged", 4, 2, 8, (((5, 2), (3, 4)), ((4, 6), (1, 1))))
PACKED_FULL = Shape("full", 2, 2, 8, (((5, 2), (3, 4)), ((4, 6), (3, 1))))
LEFT = Shape("left", 2, 2, 8, (((5, 2),), ((5, 4),)), padding="left")


@pytest.mark.parametrize("shape", [*SMOKE, RAGGED, LEFT], ids=lambda shape: shape.name)
def test_pairs_are_those_of_the_mask(shape):
    mask = GitMask.from_segments(*shape.layout(torch.device("cpu")))
    assert int(mask.dense().sum()) == shape.pairs
    assert int(mask.live.sum()) == shape.tokens


def test_work_and_floors_of_a_known_shape():
    """B = 32, H = Hk = 32, D = 128, M = 257, T = 64: 44 GFLOP and 338 MB forward (q, k, v, o and lse)."""
    shape = next(shape for shape in SHAPES if shape.name == "7B 257+64")
    assert round(shape.flops(False) / 1e9) == 44 and round(shape.bytes(False) / 1e6) == 338
    floors = shape.floors({"bytes_per_s": 4.3e12, "flop_per_s": 790e12})
    assert round(1e3 * floors["forward"]) == 79
    assert round(1e3 * (floors["both"] - floors["forward"])) == 157
    assert floors["both_bytes"] == pytest.approx(3 * floors["forward_bytes"])


def test_shapes_differ_in_name():
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    assert all(shape.heads % shape.kv_heads == 0 and shape.head_size in (64, 80, 96, 128) for shape in SHAPES)
    packed = next(shape for shape in SHAPES if shape.name == "7B packed 8x(257+64)")
    assert packed.pairs / packed.batch == 676_616 and packed.packed and packed.uniform is None
    assert alike(2, 7, 5)[0] == ((7, 5),) and SMOKE[0].uniform == (7, 5)


def exact_error(shape: Shape, attend: peers.Attend) -> float:
    """Largest relative error of output and gradients against the reference, on rows of samples."""
    layout = shape.layout(torch.device("cpu"))
    inputs = shape.inputs(torch.device("cpu"), 1, torch.float32)
    expected = reference(shape, GitMask.from_segments(*layout).dense(), inputs)
    *qkv, grad = inputs
    out = attend(*qkv)
    found = dict(zip("qkv", torch.autograd.grad(out, qkv, grad), strict=True)) | {"out": out}
    live = layout[0][-1] >= 0
    return max(
        device.relative_error(compared_part(shape, name, x)[live], expected[name][live]) for name, x in found.items()
    )


def fake_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """What torch.nn.attention.varlen computes, one sequence after the other: causal from the lower right corner."""
    out, group = [], query.shape[1] // key.shape[1]
    ends = (x[i:].tolist() for x in (cu_seq_q, cu_seq_k) for i in (0, 1))
    for a, b, c, d in zip(*ends, strict=False):
        assert b - a <= max_q and d - c <= max_k
        q = query[a:b].transpose(0, 1)
        k, v = (x[c:d].repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))
        seen = torch.ones(b - a, d - c, dtype=torch.bool)
        if window_size == (-1, 0):
            seen = seen.tril((d - c) - (b - a))
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("shape", [SMOKE[0], RAGGED, PACKED_FULL, LEFT], ids=lambda shape: shape.name)
def test_two_calls_of_variable_length_are_the_mask(shape):
    plan = peers.varlen_plan(shape, *shape.layout(torch.device("cpu")))
    assert exact_error(shape, peers.two_call_varlen(shape, plan, fake_varlen)) < 1e-5


class FakeFlash:
    """What the flash-attn package computes, causal from the lower right corner."""

    @staticmethod
    def flash_attn_func(q, k, v, causal=False):
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        return peers.sdpa(q, k, v, attn_mask=seen.tril(k.shape[1] - q.shape[1]) if causal else seen)

    @staticmethod
    def flash_attn_varlen_func(q, k, v, *ends, causal=False):
        return fake_varlen(q, k, v, *ends, window_size=(-1, 0) if causal else (-1, -1))


@pytest.mark.parametrize("shape", [SMOKE[0], RAGGED, PACKED_FULL, LEFT], ids=lambda shape: shape.name)
def test_the_flash_attn_package_in_two_calls_is_the_mask(shape):
    plan = peers.varlen_plan(shape, *shape.layout(torch.device("cpu")))
    assert exact_error(shape, peers.flash_two_call(shape, plan, FakeFlash)) < 1e-5


@pytest.mark.parametrize("peer, package", [
    (peers.FLASH, "flash_attn.flash_attn_interface"), (peers.FLEX_FLASH, "flash_attn.cute"),
    (peers.MAGI, "magi_attention"),
])  # fmt: skip
def test_a_peer_that_is_not_installed_is_one_line_of_the_report(monkeypatch, peer, package):
    asked = []
    monkeypatch.setattr(peers, "installed", asked.append)  # None: it is not
    shapes = SMOKE[:2]
    (chosen,) = [each for each in peers.PEERS if each.name == peer]
    masks = {peers.FLEX_FLASH: lambda *layout: None}  # BlockMasks need CUDA
    chosen = peers.Peer(peer, masks.get(peer, chosen.build), chosen.attend)
    ceilings = {"bytes_per_s": 1e9, "flop_per_s": 1e9}
    records = [attention.measure_shape(shape, [chosen], 1, ceilings) for shape in shapes]
    assert asked == [package] * len(shapes)
    lines = [line for line in attention.render(records, []).splitlines() if "not measured" in line]
    assert len(lines) == 1 and lines[0].startswith(f"* not measured: {peer}: ") and "installed" in lines[0]


def test_grouped_heads_are_asked_for_where_that_is_known():
    seen = []

    def newer(query, key, *args, enable_gqa=False, **more):
        seen.append(enable_gqa)
        return fake_varlen(query, key, *args, **more)

    plan = peers.varlen_plan(RAGGED, *RAGGED.layout(torch.device("cpu")))
    assert exact_error(RAGGED, peers.two_call_varlen(RAGGED, plan, newer)) < 1e-5
    assert seen and all(seen)


@pytest.mark.parametrize("build, attend", [(peers.dense_mask, peers.sdpa_dense), (peers.no_mask, peers.two_call)])
def test_stock_peers_are_the_mask(build, attend):
    mask = build(SMOKE[0], *SMOKE[0].layout(torch.device("cpu")))
    assert exact_error(SMOKE[0], attend(SMOKE[0], mask)) < 1e-5


@pytest.mark.parametrize("shape", [RAGGED, LEFT], ids=lambda shape: shape.name)
def test_slices_cover_the_mask_once(shape):
    layout = shape.layout(torch.device("cpu"))
    plan = peers.slices(shape, *layout)
    seen = torch.zeros(shape.batch * shape.length, shape.batch * shape.length, dtype=torch.int)
    for (a, b), (c, d), kind in zip(*(plan[key].tolist() for key in list(plan)[:3]), strict=True):
        part = torch.ones(b - a, d - c, dtype=torch.int)
        seen[a:b, c:d] += part.tril((d - c) - (b - a)) if kind else part
    dense = GitMask.from_segments(*layout).dense()[:, 0]
    assert torch.equal(seen, torch.block_diag(*dense.int()))


def test_wrong_results_are_named():
    """A causal mask is not the GIT mask, and NaN is never right."""
    where = torch.device("cpu")
    layout, inputs = SMOKE[0].layout(where), SMOKE[0].inputs(where, 0)
    expected = reference(SMOKE[0], GitMask.from_segments(*layout).dense(), inputs)

    def found(attend):
        peer = peers.Peer("other", peers.no_mask, lambda shape, mask: attend)
        return attention.inspect_peer(peer, SMOKE[0], layout, inputs, expected)[0]

    assert found(lambda q, k, v: peers.sdpa(q, k, v, is_causal=True))["wrong"]
    assert found(lambda q, k, v: peers.sdpa(q, k, v * math.nan))["wrong"]
    mask = peers.dense_mask(SMOKE[0], *layout)
    assert not found(lambda q, k, v: peers.sdpa(q, k, v, attn_mask=mask))["wrong"]


def record(name: str, **more) -> dict:
    """A record with times (ms, both modes) by peer; a peer whose time is negative gave wrong results."""
    times = more.pop("times")
    facts = {"images": 577, "packed": False, "uniform": True, "length": 705, "head_size": 128} | more
    timed = {
        peer: {"wrong": spent < 0, "forward_ms": {"median": abs(spent)}, "both_ms": {"median": abs(spent)}}
        for peer, spent in times.items()
    }
    return {"shape": name, "peers": timed, "floor_ms": {"forward_bytes": 0.5, "both_bytes": 0.5}} | facts


def test_verdicts_follow_the_goals():
    rows = attention.verdicts([record("a", times={peers.OURS: 1.0, peers.DENSE: 1.15, peers.FLEX: 1.3})])
    found = {row.what: row for row in rows}
    dense = found["SDPA dense (M = 577): a, forward"]
    assert dense.value == pytest.approx(1.15) and dense.met is False
    assert found["SDPA dense (M = 577): a, forward + backward"].met is True
    assert "goal met" in found["Flex (all, mask given): a, forward"].note
    assert not any("two calls" in what or "byte floor" in what for what in found)
    short = attention.verdicts([record("b", times={peers.OURS: 1.0}, length=321, images=257)])
    assert [(row.value, row.met) for row in short] == [(0.5, True)] * 2
    wrong = attention.verdicts([record("c", times={peers.OURS: -1.0})])
    assert [row.met for row in wrong] == [False] and "error" in wrong[0].what
    failed = record("d", times={}) | {"peers": {peers.OURS: {"skipped": "RuntimeError: no"}}}
    assert [(row.met, row.note) for row in attention.verdicts([failed])] == [(False, "RuntimeError: no")]


def test_choices_are_the_fastest_that_all_shapes_can_take():
    names = list(attention.BACKENDS.values())
    kernel, sdpa, two_call = names
    records = [
        record("a", times={kernel: 1.0, sdpa: 2.0, two_call: 1.5}),
        record("b", times={kernel: 1.0, sdpa: 0.9}, length=800),
        record("c", times={kernel: -0.1, sdpa: 2.0, two_call: 3.0}, length=300),
        record("d", times={kernel: 5.0, sdpa: 6.0, two_call: 3.0}, head_size=64),
        record("e", times={kernel: 5.0, sdpa: 2.0}, packed=True, length=9000),
    ]
    entries = attention.choices(records, "sm_90")
    assert [(entry["head_size"], entry["queries_up_to"], entry["backend"]) for entry in entries] == [
        (64, 1024, "two_call"), (64, 1024, "kernel"), (128, 512, "sdpa"), (128, 1024, "kernel"),
    ]  # fmt: skip
    assert lookup(entries, "sm_90", 64, 600, False, ("kernel", "sdpa")) == "kernel"
    assert lookup(entries, "sm_90", 128, 600, False) == "kernel"
    assert lookup(entries, "sm_90", 128, 2000, False) is None and lookup(entries, "sm_80", 128, 9, False) is None


def test_the_table_keeps_what_was_not_measured_again(tmp_path):
    path = tmp_path / "measured.json"
    entry = {"device": "sm_80", "head_size": 64, "queries_up_to": 512, "packed": False, "backend": "sdpa"}
    attention.write_choices(path, [])
    assert json.loads(path.read_text()) == []
    attention.write_choices(path, [entry, entry | {"device": "sm_90"}])
    attention.write_choices(path, [entry | {"device": "sm_90", "backend": "kernel"}])
    found = [(entry["device"], entry["backend"]) for entry in json.loads(path.read_text())]
    assert found == [("sm_80", "sdpa"), ("sm_90", "kernel")]


def test_smoke_run_writes_its_part_and_the_table(tmp_path, monkeypatch, capsys):
    part, table = tmp_path / "part.json", tmp_path / "measured.json"
    arguments = ["--smoke", "--repeats", "2", "--out", str(part), "--measured", str(table)]
    monkeypatch.setattr("sys.argv", ["attention", *arguments])
    assert attention.main() == 0
    found = json.loads(part.read_text())
    assert found["complete"] and [record["shape"] for record in found["records"]] == [shape.name for shape in SMOKE]
    assert found["records"][0]["peers"][peers.DENSE]["forward_ms"]["median"] > 0
    assert found["records"][0]["peers"][peers.VARLEN] == {"skipped": "needs CUDA"}
    assert {entry["packed"] for entry in json.loads(table.read_text())} == {True, False}
    assert SMOKE[1].name in capsys.readouterr().out


def test_a_run_out_of_time_says_what_is_missing(tmp_path, monkeypatch):
    part = tmp_path / "part.json"
    monkeypatch.setattr("sys.argv", ["attention", "--smoke", "--seconds", "-1", "--out", str(part)])
    assert attention.main() == 0
    found = json.loads(part.read_text())
    assert not found["complete"] and f"out of time: {SMOKE[0].name}" in found["text"]


def test_names_of_torch_that_only_a_gpu_reaches():
    """Attributes and parameters that the CUDA paths use exist in this torch."""
    from torch.nn.attention import SDPBackend
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from torch.nn.attention.varlen import varlen_attn

    assert SDPBackend.EFFICIENT_ATTENTION and SDPBackend.CUDNN_ATTENTION and torch.cuda._sleep
    given = list(inspect.signature(create_block_mask).parameters)[:6]
    assert given == ["mask_mod", "B", "H", "Q_LEN", "KV_LEN", "device"]
    assert {"block_mask", "enable_gqa", "kernel_options"} <= set(inspect.signature(flex_attention).parameters)
    parameters = list(inspect.signature(varlen_attn).parameters)
    assert parameters[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "window_size" in parameters
