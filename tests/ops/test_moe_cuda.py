"""The routing's CUDA kernels against the reference: their own source on the CPU's emulator, and on a device."""

import ctypes

import numpy as np
import pytest
import torch

from dsvlm.ops import moe_reference as reference
from dsvlm.ops.moe_kernel import has_kernel, kernel_refuses
from dsvlm.ops.moe_routing import POLICIES, SLOT_ORDERS, Routing, rows_bound
from tests.ops.emulation.build import HERE, EmulationError, emulated, guarded

TYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = ("slot", "src", "offs", "load", "kept")
SUMS = ("prob_sum", "ent_sum", "z2_sum", "loadp_sum")
DEFAULTS = dict(
    noise=None, modality=None, valid=None, pool=None, align=8, policy="bpr", slot_order="token", renormalize=False,
    num_modalities=1, load_sigma=0.0,
)  # fmt: skip


def poisoned(*shape, dtype=torch.float32):
    """What an allocator may return: NaN, or integers that mean nothing."""
    byte = 0xFF if dtype.is_floating_point else 0x5A
    return torch.full((*shape, dtype.itemsize), byte, dtype=torch.uint8).view(dtype).view(shape)


class Emulated:
    """The kernels' source as C++. `seed` draws the order in which threads run."""

    def __init__(self, cache):
        self.kernels = emulated(HERE / "moe_routing.cuh", cache)
        self.kernels.workspace_bytes.restype = ctypes.c_int64
        self.seed = 0

    def call(self, name, *arguments, out):
        """Every tensor ends where memory ends, so that an access behind it is an error."""
        given = [guarded(x) if isinstance(x, torch.Tensor) and x.numel() else x for x in (*arguments, *out)]
        self.kernels.call(name, *given, seed=self.seed)
        for result, memory in zip(out, given[len(arguments) :], strict=True):
            result.copy_(memory)

    def route(self, logits, k, capacity, **options):
        o = DEFAULTS | options
        (n, experts), pools, modalities = logits.shape, len(capacity), o["num_modalities"]
        rows = rows_bound(n, experts, k, capacity, o["align"])
        sizes = np.array([
            TYPES.index(logits.dtype), n, experts, k, modalities, o["renormalize"], experts % 4 == 0, pools, o["align"],
            rows, POLICIES.index(o["policy"]), SLOT_ORDERS.index(o["slot_order"]),
        ])  # fmt: skip
        bytes_ = self.kernels.workspace_bytes(ctypes.c_void_p(sizes.ctypes.data), ctypes.c_float(o["load_sigma"]))
        table = (modalities, experts)
        shapes = [(n, k), (n, k), (n, k), (rows,), (experts,), (experts, pools), (experts, pools)]
        shapes += [table, table[:1], table[:1], table, (n,), ()]
        types = {i: torch.int32 for i in (1, 2, 3, 4, 5, 6, 12)}
        result = [poisoned(*shape, dtype=types.get(i, torch.float32)) for i, shape in enumerate(shapes)]
        given = o["noise"], o["modality"], o["valid"], o["pool"]
        workspace = poisoned(bytes_, dtype=torch.uint8)
        self.call("route", sizes, np.array(capacity), o["load_sigma"], logits, *given, workspace, out=result)
        return Routing(*result)

    def route_backward(self, grads, logits, routing, **options):
        o, (n, experts) = DEFAULTS | options, logits.shape
        sizes = np.array([
            TYPES.index(logits.dtype), n, experts, routing.index.shape[1], o["num_modalities"], o["renormalize"],
            experts % 4 == 0, *[0] * 5,
        ])  # fmt: skip
        given, out = (o["noise"], o["modality"], o["valid"]), poisoned(n, experts, dtype=logits.dtype)
        saved = logits, *given, routing.index, routing.lse
        self.call("route_backward", sizes, o["load_sigma"], *saved, *grads, out=[out])
        return out

    def _rows(self, x, src, slot):
        return np.array([TYPES.index(x.dtype), src.shape[0], *slot.shape, x.shape[1]])

    def permute(self, x, src, slot):
        out = poisoned(src.shape[0], x.shape[1], dtype=x.dtype)
        self.call("permute_rows", self._rows(x, src, slot), x, src, out=[out])
        return out

    def permute_backward(self, grad, src, slot):
        return self.combine(grad, None, slot, src)

    def combine(self, y, weight, slot, src):
        out = poisoned(slot.shape[0], y.shape[1], dtype=y.dtype)
        self.call("combine_rows", self._rows(y, src, slot), y, weight, slot, out=[out])
        return out

    def combine_backward(self, grad, y, weight, slot, src):
        grad_y, grad_weight = poisoned(*y.shape, dtype=y.dtype), poisoned(*weight.shape)
        given = grad, y, weight, slot, src
        self.call("combine_rows_backward", self._rows(y, src, slot), *given, out=[grad_y, grad_weight])
        return grad_y, grad_weight


class Device:
    """The compiled ops on a CUDA device; tensors come from the CPU and go back to it."""

    def __init__(self):
        assert has_kernel("cuda") and not kernel_refuses(torch.empty(0, device="cuda"))

    def op(self, name, *arguments):
        given = [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]
        result = getattr(torch.ops.dsvlm, f"moe_{name}")(*given)
        return result.cpu() if isinstance(result, torch.Tensor) else tuple(x.cpu() for x in result)

    def route(self, logits, k, capacity, **options):
        o = DEFAULTS | options
        rows = rows_bound(*logits.shape, k, capacity, o["align"])
        sizes = k, capacity, rows, o["align"], o["policy"], o["slot_order"], o["renormalize"], o["num_modalities"]
        given = o["noise"], o["modality"], o["valid"], o["pool"]
        return Routing(*self.op("route", logits, *given, *sizes, o["load_sigma"]))

    def route_backward(self, grads, logits, routing, **options):
        o = DEFAULTS | options
        given = logits, o["noise"], o["modality"], o["valid"], routing.index, routing.lse
        return self.op("route_backward", *grads, *given, o["renormalize"], o["load_sigma"])

    def __getattr__(self, name):
        return lambda *arguments: self.op(name, *arguments)


@pytest.fixture(scope="module", params=["emulated", pytest.param("device", marks=pytest.mark.gpu)])
def engine(request, tmp_path_factory):
    return Device() if request.param == "device" else Emulated(tmp_path_factory.mktemp("emulated"))


def inputs(tokens, experts, seed, *, pools=1, modalities=1, ties=False):
    """Random logits, or some with few different values, and everything that comes with tokens."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=rng)
    if ties:
        zeros = torch.where(logits < 0, -0.0, 0.0)  # which are equal
        logits = torch.where(torch.rand(tokens, experts, generator=rng) < 0.4, zeros, -200.0)  # weights: 1 / n exactly
    draw = [torch.randint(0, n, (tokens,), generator=rng).to(torch.uint8) for n in (pools, modalities)]
    valid = torch.rand(tokens, generator=rng) < 0.9
    return logits, dict(pool=draw[0], modality=draw[1], valid=valid, num_modalities=modalities)


def assert_selected(routing, said, score, options, capacity):
    """Rows are the reference's for these scores: with the kernel's own weights, digits of exp do not matter."""
    o, experts = DEFAULTS | options, routing.offs.shape[0]
    expected = reference.select(
        score, said.index, said.asks, said.bad, o["pool"], experts=experts, capacity=capacity,
        max_rows=routing.src.shape[0], align=o["align"], policy=o["policy"], slot_order=o["slot_order"],
    )  # fmt: skip
    for name, value in zip(INTEGERS, expected, strict=True):
        assert torch.equal(getattr(routing, name), value), name


def gate_of(logits, k, options):
    o = DEFAULTS | options
    names = "renormalize", "num_modalities", "load_sigma"
    given = o["noise"], o["modality"], o["valid"]
    return reference.gate(logits, *given, k=k, **{name: o[name] for name in names})


# tokens, experts, k, capacity, align, policy, slot_order
SHAPES = [
    (0, 4, 2, (3,), 8, "bpr", "token"),
    (1, 1, 1, (0,), 8, "bpr", "token"),
    (1, 8, 4, (-1,), 1, "position", "priority"),
    (31, 5, 2, (0, 3), 4, "bpr", "token"),
    (33, 32, 4, (2,), 8, "position", "token"),
    (129, 1, 1, (57,), 8, "bpr", "token"),
    (257, 8, 2, (-1, 9, 30), 16, "bpr", "token"),
    (257, 8, 2, (-1, 9, 30), 16, "probs", "priority"),
    (1000, 5, 4, (500,), 8, "bpr", "priority"),
    (1000, 8, 1, (100,), 8, "probs", "token"),
    (600, 33, 2, (30,), 8, "bpr", "token"),
    (300, 64, 4, (9,), 8, "position", "priority"),
    (300, 70, 2, (5,), 8, "bpr", "priority"),
    (40, 160, 2, (1,), 8, "probs", "token"),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_choices_and_rows_are_the_reference_s(engine, shape, ties):
    tokens, experts, k, capacity, align, policy, slot_order = shape
    logits, options = inputs(tokens, experts, 1, pools=len(capacity), ties=ties)
    options |= dict(align=align, policy=policy, slot_order=slot_order)
    got, said = engine.route(logits, k, capacity, **options), gate_of(logits, k, options)
    assert torch.equal(got.index, said.index.int())
    assert got.bad_rows == 0
    assert_selected(got, said, said.score if ties else got.weight, options, capacity)


@pytest.mark.parametrize("slot_order", SLOT_ORDERS)
@pytest.mark.parametrize(
    "tokens, experts, k, capacity", [(9000, 2, 1, (2000,)), (8300, 4, 4, (6000,)), (5000, 1, 1, (-1,))]
)
def test_more_choices_than_shared_memory_holds(engine, tokens, experts, k, capacity, slot_order):
    """A segment's list in global memory, several tiles of choices, sums of hundreds of blocks."""
    logits, options = inputs(tokens, experts, 2)
    options |= dict(slot_order=slot_order)
    got, said = engine.route(logits, k, capacity, **options), gate_of(logits.double(), k, options)
    assert_selected(got, said, got.weight, options, capacity)
    torch.testing.assert_close(got.prob_sum.double(), said.prob_sum, rtol=1e-6, atol=1e-3)


GATES = [
    (33, 5, 2, 1, torch.float32, dict(load_sigma=0.3)),
    (257, 32, 1, 2, torch.bfloat16, dict(noise=0.3, load_sigma=0.3)),
    (100, 64, 4, 3, torch.float16, dict(noise=0.3, renormalize=True, load_sigma=0.2)),
    (100, 100, 4, 2, torch.float32, dict(renormalize=True)),
    (60, 160, 4, 2, torch.bfloat16, dict(noise=0.5)),
    (60, 163, 3, 12, torch.float32, dict(load_sigma=0.3)),  # sums so wide that a block has fewer threads
]


@pytest.mark.parametrize("case", GATES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_weights_sums_and_gradients_are_those_of_fp64(engine, case):
    tokens, experts, k, modalities, dtype, extra = case
    logits, options = inputs(tokens, experts, 3, modalities=modalities)
    logits, options = logits.to(dtype), options | extra
    if "noise" in extra:
        options["noise"] = extra["noise"] * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(4))
    logits[:5, experts // 2] = -torch.inf  # masked, legal
    logits[7] = torch.where(torch.arange(experts) == 1, 1.0, -torch.inf)
    logits[~options["valid"]] = torch.nan
    got = engine.route(logits, k, (-1,), **options)

    wide = options | {"noise": None if options.get("noise") is None else options["noise"].double()}
    x = logits.double().requires_grad_()
    said = gate_of(x, k, wide)
    for name in ("weight", *SUMS, "lse"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(said, name), rtol=2e-6, atol=2e-6)
    rng = torch.Generator().manual_seed(5)
    outputs = [getattr(said, name) for name in ("weight", *SUMS)]
    grads = [torch.randn(o.shape, generator=rng) for o in outputs]
    for kept in (range(5), [0], [1, 3]):  # a gradient that did not come is none
        pairs = [(o, g.double()) for i, (o, g) in enumerate(zip(outputs, grads, strict=True)) if i in kept]
        pairs = [(o, g) for o, g in pairs if o.requires_grad]
        expected = torch.autograd.grad([o for o, _ in pairs], x, [g for _, g in pairs], retain_graph=True)[0]
        given = [g if i in kept else None for i, g in enumerate(grads)]
        found = engine.route_backward(given, logits, got, **options)
        step = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        torch.testing.assert_close(found.double(), expected.nan_to_num(), rtol=step, atol=2e-5)
        assert (found[~options["valid"]] == 0).all()


def test_gradients_of_large_logits(engine):
    """lse is kept rounded: what it loses grows with the logits, and must not come back in the gradient."""
    logits = 3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(9)) + 1e4
    got, x = engine.route(logits, 2, (-1,)), logits.double().requires_grad_()
    said = gate_of(x, 2, {})
    for place, name in enumerate(("weight", "prob_sum", "ent_sum")):
        output = getattr(said, name)
        grads: list[torch.Tensor | None] = [None] * 5
        grads[place] = torch.randn(output.shape, generator=torch.Generator().manual_seed(place))
        expected = torch.autograd.grad(output, x, grads[place].double(), retain_graph=True)[0]
        found = engine.route_backward(grads, logits, got)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6 if name == "ent_sum" else 4e-7)


@pytest.mark.parametrize("policy", POLICIES)
def test_bad_rows_are_counted_and_harm_no_other(engine, policy):
    logits, options = inputs(70, 6, 6)
    options = dict(valid=options["valid"], load_sigma=0.5, policy=policy)
    options["valid"][:4] = True
    clean = logits.clone()
    logits[0, 3], logits[1, 2], logits[2] = torch.nan, torch.inf, -torch.inf
    clean[60:] = logits[60:] = torch.tensor([-200.0, -200, 0, -200, -200, -200])  # second choices of weight 0
    got, said = engine.route(logits, 2, (17,), **options), gate_of(logits, 2, options)
    assert got.bad_rows == 3
    assert torch.equal(got.index, said.index.int()) and got.index[:3].tolist() == [[0, 1]] * 3
    assert got.weight[:3].isnan().all() and got.lse[:3].isnan().all() and got.prob_sum.isnan().all()
    assert got.ent_sum.isnan().all() and got.z2_sum.isnan().all() and got.loadp_sum.isnan().all()
    assert_selected(got, said, got.weight, options, (17,))
    others = engine.route(clean, 2, (17,), **options)
    assert torch.equal(got.weight[3:], others.weight[3:])
    grad = engine.route_backward([torch.ones(70, 2), *[None] * 4], logits, got, **options)
    assert grad[:3].isnan().all() and grad[3:].isfinite().all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 64, 520])
def test_rows_there_and_back(engine, dtype, width):
    tokens, k, experts = 50, 2, 4
    logits, options = inputs(tokens, experts, 7)
    routing = engine.route(logits, k, (13,), **options)
    rng = torch.Generator().manual_seed(8)
    src, slot, weight = routing.src, routing.slot, routing.weight
    x, y, grad_out = (torch.randn(n, width, generator=rng).to(dtype) for n in (tokens, len(src), tokens))
    assert (src < 0).any() and (slot < 0).any()
    rows = engine.permute(x, src, slot)
    assert torch.equal(rows, reference.permute(x, src, k))
    y[src < 0] = torch.nan  # never read
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    wide = [t.double().requires_grad_() for t in (y, weight)]
    out = reference.combine(*wide, slot)
    torch.testing.assert_close(engine.combine(y, weight, slot, src).double(), out, rtol=step, atol=1e-6)
    expected = torch.autograd.grad(out, wide, grad_out.double())
    found = engine.combine_backward(grad_out, y, weight, slot, src)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=step, atol=1e-6)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-4)
    assert (found[0][src < 0] == 0).all() and (found[1][slot < 0] == 0).all()
    back = engine.permute_backward(y, src, slot)
    torch.testing.assert_close(back.double(), reference.combine(y.double(), torch.ones(tokens, k), slot).double(),
                               rtol=step, atol=1e-6)  # fmt: skip


def test_no_rows_and_no_tokens(engine):
    routing = engine.route(torch.zeros(3, 2), 1, (0,))
    assert routing.src.numel() == 0
    out = engine.combine(torch.zeros(0, 8), routing.weight, routing.slot, routing.src)
    assert torch.equal(out, torch.zeros(3, 8))
    grads = engine.combine_backward(torch.ones(3, 8), torch.zeros(0, 8), routing.weight, routing.slot, routing.src)
    assert torch.equal(grads[1], torch.zeros(3, 1))


def test_repeats_are_equal_in_every_bit(engine):
    """Whatever the order of threads, and whatever lay in memory before."""
    logits, options = inputs(300, 8, 9, pools=2, modalities=2)
    options |= dict(load_sigma=0.5)
    results = []
    for seed in range(4):
        if isinstance(engine, Emulated):
            engine.seed = seed
        routing = engine.route(logits, 2, (20, -1), **options)
        rng = torch.Generator().manual_seed(10)
        grads = [torch.randn(getattr(routing, name).shape, generator=rng) for name in ("weight", *SUMS)]
        y, grad_out = (torch.randn(n, 40, generator=rng) for n in (len(routing.src), 300))
        rows = engine.combine_backward(grad_out, y, routing.weight, routing.slot, routing.src)
        results.append((*routing, engine.route_backward(grads, logits, routing, **options), *rows))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_sums_that_fit_no_block_are_refused(engine):
    with pytest.raises((EmulationError, RuntimeError)):
        engine.route(torch.zeros(4, 1000), 1, (1,), num_modalities=40, load_sigma=0.1)


@pytest.mark.gpu
def test_seven_launches_without_waiting_and_in_a_graph():
    """Four kernels forward, three backward, no copy and no memset between; a graph replays them with other values."""
    rng = torch.Generator().manual_seed(11)
    tokens, experts, width = 4096, 32, 768
    logits, other, x = (torch.randn(tokens, n, generator=rng).cuda() for n in (experts, experts, width))
    grad_sums = torch.randn(1, experts, generator=rng).cuda(), None, None, None
    rows, op = rows_bound(tokens, experts, 1, (135,), 8), torch.ops.dsvlm
    assert has_kernel("cuda")

    def forward():
        nothing, sizes = [None] * 4, (1, [135], rows, 8, "bpr", "token", False, 1, 0.0)
        routed = Routing(*op.moe_route(logits, *nothing, *sizes))
        y = op.moe_permute(x, routed.src, routed.slot)
        return *routed, y, op.moe_combine(y, routed.weight, routed.slot, routed.src)

    def backward(*given):
        routed, (y, out) = Routing(*given[:-2]), given[-2:]
        grad_y, grad_weight = op.moe_combine_backward(out, y, routed.weight, routed.slot, routed.src)
        grad_x = op.moe_permute_backward(grad_y, routed.src, routed.slot)
        saved = logits, None, None, None, routed.index, routed.lse
        return grad_x, op.moe_route_backward(grad_weight, *grad_sums, *saved, False, 0.0)

    backward(*forward())  # memory and code are loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = forward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counts = []
    for run in (forward, lambda: backward(*result)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        counts.append(sum("dsvlm" in event.name for event in profile.events()))
    assert counts == [4, 3]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward()
        captured += backward(*captured)
    logits.copy_(other)
    graph.replay()
    expected = forward()
    expected += backward(*expected)
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    tokens, width = 70_000, 32_768  # 2.3 G elements
    assert has_kernel("cuda")
    x = torch.zeros(tokens, width, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.arange(width, device="cuda") % 256
    src = torch.arange(tokens, device="cuda", dtype=torch.int32)
    slot, weight = src[:, None].contiguous(), torch.full((tokens, 1), 2.0, device="cuda")
    rows = torch.ops.dsvlm.moe_permute(x, src, slot)
    assert torch.equal(rows[-1], x[-1]) and rows[:-1].count_nonzero() == 0
    out = torch.ops.dsvlm.moe_combine(rows, weight, slot, src)
    assert torch.equal(out[-1], 2 * x[-1])
    _, grad_weight = torch.ops.dsvlm.moe_combine_backward(x, rows, weight, slot, src)
    assert grad_weight[-1] > 0 and grad_weight[:-1].count_nonzero() == 0
