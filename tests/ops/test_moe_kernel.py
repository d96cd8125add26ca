"""The compiled routing on the CPU against the reference: integers exactly, gradients, determinism, torch.compile."""

import math
import os
import subprocess
import sys

import pytest
import torch

from dsvlm.ops import moe_combine, moe_permute, moe_route, rows_bound
from dsvlm.ops import moe_reference as reference
from dsvlm.ops.moe_kernel import has_kernel

INTEGERS = ("index", "slot", "src", "offs", "load", "kept", "bad_rows")
REALS = ("weight", "prob_sum", "ent_sum", "z2_sum", "loadp_sum", "lse")
DIFFERENTIABLE = REALS[:-1]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert has_kernel("cpu"), "the compiled ops are not there: pip install --no-build-isolation -e ."


def drawn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def dyadic(tokens, experts, seed=0):
    """Each row surer of its first place than the next by far more than rounding, rows in any order.

    So every implementation of exp finds the same order; exact ties have tests of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    best = torch.randint(0, experts, (tokens, 1), generator=generator)
    second = torch.randint(0, experts, (tokens, 1), generator=generator)
    top = 1 + 3 * torch.randperm(tokens, generator=generator)[:, None] / (1 << 15)
    return torch.zeros(tokens, experts).scatter(1, second, 0.5).scatter(1, best, top)


# tokens, experts, k, capacity factor, policy, order, pools, align, what else: a fixed sample of the sheet's grid
GRID = [
    (0, 8, 2, 1.0, "bpr", "token", 1, 8, {}),
    (1, 1, 1, 0.25, "bpr", "token", 1, 8, {}),
    (1, 160, 4, 1.05, "probs", "priority", 2, 16, {}),
    (31, 2, 2, 1.0, "bpr", "priority", 1, 8, {"renormalize": True}),
    (32, 5, 1, 1.05, "probs", "token", 3, 8, {"load_sigma": 0.3}),
    (33, 5, 4, 0.25, "position", "token", 1, 8, {"noise": True, "load_sigma": 0.3}),
    (33, 8, 2, 8, "bpr", "priority", 2, 32, {"valid": True}),
    (33, 64, 4, 1.0, "bpr", "token", 1, 8, {"modalities": 3, "noise": True}),
    (300, 160, 2, 0.25, "probs", "priority", 1, 8, {"modalities": 2}),
    (129, 256, 8, 1.0, "position", "priority", 1, 8, {}),
    (4096, 8, 2, 1.05, "bpr", "token", 2, 8, {"valid": True, "modalities": 2, "load_sigma": 0.2}),
    (4096, 32, 1, 1.0, "bpr", "token", 1, 8, {"noise": True}),
    (4096, 32, 1, 1.0, "bpr", "priority", 1, 8, {}),
    (4096, 33, 4, 1.0, "bpr", "token", 1, 1, {"renormalize": True, "noise": True, "valid": True}),
    (4096, 64, 2, 0.25, "probs", "token", 1, 8, {}),
    (4096, 5, 2, 1.0, "bpr", "priority", 4, 8, {"modalities": 4}),
    (27136, 32, 1, 1.05, "bpr", "token", 2, 8, {"modalities": 2, "valid": True}),
    (27136, 8, 2, 0.25, "position", "token", 1, 8, {}),
    (27136, 8, 1, 1.0, "probs", "priority", 1, 8, {}),
]  # fmt: skip


def settings_of(tokens, experts, k, factor, policy, order, pools, align, more, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    more = dict(more)
    modalities = more.pop("modalities", 1)
    wide = torch.promote_types(dtype, torch.float32)
    settings = dict(
        k=k, capacity=[int(factor * tokens * k / experts / pools)] * pools, policy=policy, slot_order=order,
        align=align, num_modalities=modalities, load_sigma=more.get("load_sigma", 0.0),
        renormalize=more.get("renormalize", False),
    )  # fmt: skip
    if more.get("noise"):
        settings["noise"] = torch.randn(tokens, experts, generator=generator, dtype=wide) / 4
    if more.get("valid"):
        settings["valid"] = torch.rand(tokens, generator=generator) < 0.7
    if pools > 1:
        settings["pool"] = torch.randint(0, pools, (tokens,), generator=generator)
    if modalities > 1:
        settings["modality"] = torch.randint(0, modalities, (tokens,), generator=generator)
    return settings


@pytest.mark.parametrize("case", GRID, ids=lambda case: "-".join(map(str, case[:8])))
def test_integers_equal_the_reference(case):
    """With dyadic logits all of it; with drawn ones what follows from the op's own weights."""
    tokens, experts = case[:2]
    settings = settings_of(*case)
    noise = settings.pop("noise", None)
    logits = dyadic(tokens, experts)
    ours, theirs = (moe_route(logits, backend=backend, **settings) for backend in ("kernel", "torch"))
    for name in INTEGERS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name

    settings["noise"] = noise
    for dtype in (torch.float32, torch.bfloat16):
        logits = drawn(tokens, experts).to(dtype)
        ours = moe_route(logits, backend="kernel", **settings)
        raw = moe_route(logits, backend="kernel", **settings | {"renormalize": False})
        said = reference.gate(
            logits, noise, settings.get("modality"), settings.get("valid"),
            **{name: settings[name] for name in ("k", "renormalize", "num_modalities", "load_sigma")},
        )  # fmt: skip
        chosen = reference.select(
            raw.weight, said.index, said.asks, said.bad, settings.get("pool"), experts=experts, max_rows=len(ours.src),
            **{name: settings[name] for name in ("capacity", "align", "policy", "slot_order")},
        )  # fmt: skip
        assert torch.equal(ours.index, said.index.int())
        for name, expected in chosen._asdict().items():
            assert torch.equal(getattr(ours, name), expected), name
        for name in REALS:
            torch.testing.assert_close(getattr(ours, name), getattr(said, name), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("experts", [1, 5, 32, 33, 160])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0, 1e4])
def test_lse_to_units_in_the_last_place(experts, scale):
    """Found: 2.05. Of the larger of its two summands, the maximum and a logarithm of at least 1: they may cancel."""
    logits = drawn(1000, experts) * scale
    exact = logits.double().logsumexp(dim=1)
    top = logits.max(dim=1).values.double()
    size = torch.stack((exact, top, exact - top)).abs().amax(dim=0).clamp(min=1).float()
    error = (moe_route(logits, k=1, capacity=9, backend="kernel").lse - exact).abs()
    assert (error <= 2.5 * (torch.nextafter(size, torch.tensor(math.inf)) - size)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GRID[3:12], ids=lambda case: "-".join(map(str, case[:8])))
def test_gradients_equal_the_reference(case, dtype):
    tokens, experts = case[:2]
    settings = settings_of(*case, dtype=dtype)
    values, gradients = {}, {}
    for backend in ("kernel", "torch"):
        logits = drawn(tokens, experts).to(dtype).requires_grad_()
        routing = moe_route(logits, backend=backend, **settings)
        outputs = [getattr(routing, name) for name in DIFFERENTIABLE if getattr(routing, name).requires_grad]
        upstream = [drawn(*output.shape, seed=seed, dtype=output.dtype) for seed, output in enumerate(outputs)]
        values[backend] = [output.detach() for output in outputs]
        (gradients[backend],) = torch.autograd.grad(
            sum((output * grad).sum() for output, grad in zip(outputs, upstream, strict=True)), logits
        )
        assert gradients[backend].dtype == dtype
    real = dict(rtol=1e-12, atol=1e-12) if dtype == torch.float64 else dict(rtol=2e-5, atol=1e-5)
    stored = {torch.bfloat16: dict(rtol=1e-2, atol=1e-4), torch.float16: dict(rtol=2e-3, atol=2e-5)}.get(dtype, real)
    if backend == "torch" and settings["load_sigma"] == 0:
        values["kernel"] = values["kernel"][:4]  # the op's loadp_sum is part of its graph also where it is 0
    torch.testing.assert_close(values["kernel"], values["torch"], **real)
    torch.testing.assert_close(gradients["kernel"], gradients["torch"], **stored)


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("name, noise", [*((name, 0.0) for name in DIFFERENTIABLE[:4]), ("weight", 0.5)])
def test_gradients_of_large_logits(name, noise, offset):
    """lse is kept rounded: what it loses grows with the logits, and must not come back in the gradient."""

    def gradient(backend, dtype):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        more = {"noise": drawn(300, 8, seed=2) * noise} if noise else {}
        output = getattr(moe_route(leaf, k=2, capacity=-1, backend=backend, **more), name)
        return torch.autograd.grad(output, leaf, drawn(*output.shape, seed=1).to(output))[0].double()

    logits = drawn(300, 8) * 3 + offset
    exact = gradient("torch", torch.float64)
    ours, theirs = ((gradient(backend, torch.float32) - exact).abs().max() for backend in ("kernel", "torch"))
    assert ours <= 2 * theirs + 4e-7 * exact.abs().max()


@pytest.mark.parametrize("output", range(5), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("more", [{}, {"noise": True, "load_sigma": 0.4, "renormalize": True, "modalities": 2}])
def test_gradcheck_of_each_output(output, more):
    settings = settings_of(7, 5, 2, 1.0, "bpr", "token", 1, 8, more, dtype=torch.float64)
    settings["load_sigma"] = settings["load_sigma"] or 0.4

    def one(logits):
        return getattr(moe_route(logits, backend="kernel", **settings), DIFFERENTIABLE[output])

    assert torch.autograd.gradcheck(one, (drawn(7, 5, dtype=torch.float64).requires_grad_(),), atol=1e-8)


def test_gradcheck_of_permute_and_combine():
    routing = moe_route(drawn(6, 4, dtype=torch.float64), k=2, capacity=2, align=2, backend="kernel")
    x = drawn(6, 3, dtype=torch.float64).requires_grad_()
    y = drawn(len(routing.src), 3, dtype=torch.float64).requires_grad_()
    weight = routing.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: moe_permute(x, routing.src, routing.slot, backend="kernel"), (x,))
    assert torch.autograd.gradcheck(
        lambda y, w: moe_combine(y, w, routing.slot, routing.src, backend="kernel"), (y, weight)
    )


def test_second_derivatives_are_refused():
    logits = drawn(6, 4).requires_grad_()
    routing = moe_route(logits, k=1, capacity=2, backend="kernel")
    x = drawn(6, 3).requires_grad_()
    there = moe_permute(x, routing.src, routing.slot, backend="kernel")
    for output, given in ((routing.weight.sum(), logits), ((there**2).sum(), x)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(output, given, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 64, 771])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_there_and_back(dtype, width, k):
    """Rounded once, from fp64; rows that hold nothing may hold anything, and are 0 in every result."""
    routing = moe_route(drawn(40, 6), k=k, capacity=9, backend="kernel")
    empty = routing.src < 0
    x, upstream = drawn(40, width).to(dtype), drawn(40, width, seed=1).to(dtype)
    there = moe_permute(x, routing.src, routing.slot, backend="kernel")
    assert torch.equal(there, reference.permute(x, routing.src, k)) and (there[empty] == 0).all() and empty.any()

    y = drawn(len(there), width, seed=2).to(dtype)
    y[empty] = math.nan
    weight = routing.weight.detach()
    spread = [torch.stack((part, part), dim=-1)[..., 0] for part in (routing.src, routing.slot)]  # with gaps
    assert torch.equal(moe_permute(x, *spread, backend="kernel"), there)
    assert torch.equal(moe_combine(y, weight, *spread[::-1], backend="kernel"),
                       moe_combine(y, weight, routing.slot, routing.src, backend="kernel"))
    wide = y.double().requires_grad_(), weight.double().requires_grad_()
    exact = reference.combine(*wide, routing.slot)
    exact.backward(upstream.double())
    ours = y.clone().requires_grad_(), weight.clone().requires_grad_()
    out = moe_combine(*ours, routing.slot, routing.src, backend="kernel")
    out.backward(upstream)
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]  # a unit in the last place
    torch.testing.assert_close(out, exact.to(dtype), rtol=step, atol=1e-6)
    torch.testing.assert_close(ours[0].grad, wide[0].grad.to(dtype), rtol=step, atol=1e-6)
    torch.testing.assert_close(ours[1].grad, wide[1].grad.float(), rtol=1e-4, atol=1e-4)
    assert (ours[0].grad[empty] == 0).all() and (ours[1].grad[routing.slot < 0] == 0).all()

    grad = drawn(len(there), width, seed=3).to(dtype)
    grad[empty] = math.nan
    back = torch.ops.dsvlm.moe_permute_backward(grad, routing.src, routing.slot)
    ones = torch.ones(40, k, dtype=torch.float64)
    torch.testing.assert_close(
        back, reference.combine(grad.double(), ones, routing.slot).to(dtype), rtol=step, atol=1e-6
    )


def test_every_fp16_and_bf16_number_is_read_and_written():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        y = bits.view(dtype)[:, None].contiguous()
        slot = torch.arange(len(y), dtype=torch.int32)[:, None]
        ones = torch.ones(len(y), 1)
        out = moe_combine(y, ones, slot, slot[:, 0], backend="kernel")
        torch.testing.assert_close(out, y, rtol=0, atol=0, equal_nan=True)
        third = moe_combine(y, ones / 3, slot, slot[:, 0], backend="kernel")
        torch.testing.assert_close(third, (y.float() * (ones / 3)).to(dtype), rtol=0, atol=0, equal_nan=True)


def all_of(routing, logits):
    outputs = [getattr(routing, name) for name in DIFFERENTIABLE]
    (gradient,) = torch.autograd.grad(sum((o * o).sum() for o in outputs), logits)
    return [x.detach() for x in routing] + [gradient]


def same(a, b):
    return all(
        torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def test_repeats_threads_and_poisoned_memory_change_no_bit():
    settings = settings_of(3000, 12, 2, 0.8, "bpr", "token", 2, 8, {"modalities": 2, "noise": True, "load_sigma": 0.3})
    logits = drawn(3000, 12).requires_grad_()
    threads, first = torch.get_num_threads(), None
    try:
        for repeat in range(20):
            torch.set_num_threads(1 + repeat % 2)
            # what the allocator hands out next is full of NaN, and of wild numbers where integers are read
            del [torch.full((size,), math.nan) for size in (48, 3000, 6000, 9000, 36000) for _ in range(3)][:]
            found = all_of(moe_route(logits, backend="kernel", **settings), logits)
            first = first or found
            assert same(found, first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
def test_lesser_instruction_sets_give_the_same(instructions, tmp_path):
    """Integers exactly, numbers up to the order of sums; in a process of its own, which chooses once."""
    code = (
        "import sys, torch\nfrom tests.ops.test_moe_kernel import *\n"
        "cases = [GRID[i] for i in (3, 4, 5, 7, 10)]\n"
        "torch.save([run_case(case, d) for case in cases for d in (torch.float32, torch.float16)], sys.argv[1])"
    )
    path = tmp_path / "found.pt"
    environ = dict(os.environ) | {"DSVLM_SIMD": instructions}
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=environ, timeout=120)
    cases = [GRID[i] for i in (3, 4, 5, 7, 10)]
    expected = [run_case(case, d) for case in cases for d in (torch.float32, torch.float16)]
    for theirs, ours in zip(torch.load(path), expected, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.float16 else 2e-5, atol=1e-5)


def run_case(case, dtype):
    settings = settings_of(*case) | {"noise": None}
    if dtype == torch.float16:  # rows that differ by rounding only: nobody is dropped for it
        settings |= {"capacity": [-1] * len(settings["capacity"]), "slot_order": "token"}
    logits = dyadic(*case[:2]).to(dtype).requires_grad_()
    routing = moe_route(logits, backend="kernel", **settings)
    return all_of(routing, logits)


def test_opcheck():
    logits, bound = drawn(10, 4), rows_bound(10, 4, 2, 3)
    assert has_kernel("cpu")  # and its fakes
    arguments = (logits, None, None, None, None, 2, [3], bound, 8, "bpr", "token", False, 1, 0.0)
    weight, index, slot, src, *_, lse, _ = torch.ops.dsvlm.moe_route(*arguments)
    torch.library.opcheck(torch.ops.dsvlm.moe_route, arguments)
    torch.library.opcheck(
        torch.ops.dsvlm.moe_route_backward,
        (torch.ones_like(weight), None, None, None, None, logits, None, None, None, index, lse, False, 0.0),
    )
    x, y = drawn(10, 3), drawn(bound, 3)
    torch.library.opcheck(torch.ops.dsvlm.moe_permute, (x, src, slot))
    torch.library.opcheck(torch.ops.dsvlm.moe_permute_backward, (y, src, slot))
    torch.library.opcheck(torch.ops.dsvlm.moe_combine, (y, weight, slot, src))
    torch.library.opcheck(torch.ops.dsvlm.moe_combine_backward, (x, y, weight, slot, src))


def test_compiles_to_one_graph():
    def layer(logits, x):
        routing = moe_route(logits, k=2, capacity=4, noise=torch.zeros_like(logits), load_sigma=0.5)
        there = moe_permute(x, routing.src, routing.slot)
        out = moe_combine(there * 2, routing.weight, routing.slot, routing.src)
        return out, routing.prob_sum.square().sum() + routing.loadp_sum.square().sum()

    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        logits, x = drawn(12, 4).requires_grad_(), drawn(12, 5, seed=1).requires_grad_()
        out, loss = run(logits, x)
        (out.square().sum() + loss).backward()
        results.append((out.detach(), loss.detach(), logits.grad, x.grad))
    assert same(*results)


def test_numbers_that_do_not_fit_a_byte_become_no_others_where_nobody_can_look():
    """A compiled graph has no values to check: 256 must not become 0 on its way to the op."""
    compiled = torch.compile(
        lambda m: moe_route(torch.zeros(4, 3), k=1, capacity=2, modality=m, num_modalities=2).ent_sum,
        fullgraph=True, backend="eager",
    )  # fmt: skip
    compiled(torch.tensor([0, 1, 0, 1]))
    for wrong in (256, -256, -1, 2**40):
        with pytest.raises(RuntimeError, match="modality of token 3 is 255, expected less than 2"):
            compiled(torch.tensor([0, 1, 0, wrong]))


def test_the_op_refuses_what_would_read_out_of_bounds():
    def route(modality, pool):
        assert has_kernel("cpu")
        given = (x if x is None else torch.tensor(x, dtype=torch.uint8) for x in (modality, pool))
        sizes = 1, [2, 2], rows_bound(4, 3, 1, (2, 2)), 8, "bpr", "token", False, 2, 0.0
        torch.ops.dsvlm.moe_route(drawn(4, 3), None, next(given), None, next(given), *sizes)

    with pytest.raises(RuntimeError, match="modality of token 3 is 2, expected less than 2"):
        route([0, 1, 0, 2], None)
    with pytest.raises(RuntimeError, match="pool of token 0 is 9"):
        route(None, [9, 1, 0, 0])
    slot, src = torch.tensor([[5]], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="slot names a row beyond"):
        moe_combine(drawn(2, 3), torch.ones(1, 1), slot, src, backend="kernel")
    with pytest.raises(RuntimeError, match="src names a token beyond"):
        moe_permute(drawn(1, 3), src + 7, slot * 0, backend="kernel")
