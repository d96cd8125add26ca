"""moe_route: other systems' figures, and what must hold whatever the backend."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvlm.ops import expert_capacity, limoe_aux, moe_combine, moe_permute, moe_route, rows_bound
from dsvlm.ops.library import library

BACKENDS = ("torch", "kernel")
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert library(), "the compiled ops are not there: pip install --no-build-isolation -e ."


def drawn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def places(routing):
    """(expert, row inside the expert) of each choice; None where there is none."""
    start = [0, *routing.offs.tolist()]
    pairs = zip(routing.index.flatten().tolist(), routing.slot.flatten().tolist(), strict=True)
    return [None if slot < 0 else (expert, slot - start[expert]) for expert, slot in pairs]


# google-research/vmoe, vmoe/moe_test.py: gates and (expert, position in its buffer) of each choice
GATES = torch.tensor([[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]])
VMOE = {
    "position": [(0, 0), (2, 1), (0, 1), (2, 2), (2, 0), (0, 2)],
    "bpr": [(0, 1), (2, 2), (0, 0), (2, 1), (2, 0), (0, 2)],
}


@pytest.mark.parametrize("policy", VMOE)
@pytest.mark.parametrize("capacity", [3, 2, 1, 0])
def test_buffer_indices_of_vmoe(backend, policy, capacity):
    # their gates do not sum to 1; experts that nobody chooses take the rest
    rest = (1 - GATES.sum(dim=1, keepdim=True) / 2) / 14
    logits = torch.cat((GATES / 2, rest.expand(-1, 14)), dim=1).log()
    routing = moe_route(logits, k=2, capacity=capacity, policy=policy, slot_order="priority", align=1, backend=backend)
    assert places(routing) == [place if place[1] < capacity else None for place in VMOE[policy]]
    torch.testing.assert_close(routing.weight * 2, GATES.gather(1, routing.index.long()))


def losses(routing, count, tau=(0.0,)):
    return limoe_aux(*routing[7:11], torch.tensor(count), tau)


def test_losses_of_vmoe(backend):
    """vmoe/nn/routing_test.py: importance, load, and GShard's loss from the sums."""
    gates = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])
    routing = moe_route(gates.log(), k=1, capacity=-1, backend=backend)
    assert losses(routing, [4]).importance.item() == pytest.approx(0.03874999, abs=1e-6)
    gshard = 3 * (routing.prob_sum[0] / 4 * routing.load[:, 0] / 4).sum()
    assert gshard.item() == pytest.approx(1.0875, abs=1e-6)

    logits = torch.tensor([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]])
    noise = torch.tensor([[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]])
    routing = moe_route(logits, k=2, capacity=3, noise=noise, load_sigma=0.1, backend=backend)
    assert losses(routing, [3]).load.item() == pytest.approx(0.48573864536489236, abs=1e-6)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_top2gating_of_deepspeed(backend, factor):
    """Same kept choices and places; its weights are normalised after drops, so they follow from ours."""
    from deepspeed.moe.sharded_moe import top2gating

    tokens, experts = 96, 8
    logits = drawn(tokens, experts, seed=3) * 2
    aux, capacity, _, index, place, gates, _ = top2gating(
        logits.clone(), factor, 0, top2_2nd_expert_sampling=False, sparse_routes=True
    )
    routing = moe_route(logits, k=2, capacity=int(capacity), policy="position", slot_order="priority", backend=backend)
    assert int(capacity) == expert_capacity(tokens, experts, 2, factor, convention="deepspeed")
    theirs = zip(index.T.flatten().tolist(), place.T.flatten().tolist(), strict=True)
    assert places(routing) == [None if expert < 0 else (expert, row) for expert, row in theirs]
    assert (routing.slot < 0).any() == (factor < 2)
    kept = routing.weight * (routing.slot >= 0)
    torch.testing.assert_close(kept / kept.sum(dim=1, keepdim=True).clamp(min=1e-7), gates.T)


def test_top1gating_of_deepspeed(backend):
    """Whom it drops is not defined (a top-k of zeros and ones): all else, with everybody kept and with drops."""
    from deepspeed.moe.sharded_moe import top1gating

    logits = drawn(96, 8, seed=4)
    aux, capacity, _, index, place, gates, counts = top1gating(logits, 8.0, 0, use_rts=False, sparse_routes=True)
    routing = moe_route(logits, k=1, capacity=int(capacity), policy="position", backend=backend)
    assert places(routing) == list(zip(index[0].tolist(), place[0].tolist(), strict=True))
    torch.testing.assert_close(routing.weight[:, 0], gates[0])
    assert routing.load[:, 0].tolist() == counts.tolist()
    assert aux.item() == pytest.approx(8 * (routing.prob_sum[0] / 96 * routing.load[:, 0] / 96).sum().item())
    _, capacity, _, index, _, _, counts = top1gating(logits, 0.5, 0, use_rts=False, sparse_routes=True)
    routing = moe_route(logits, k=1, capacity=int(capacity), policy="position", backend=backend)
    assert routing.kept[:, 0].tolist() == counts.clamp(max=int(capacity)).tolist()
    assert (index >= 0).sum() == (routing.slot >= 0).sum()


def test_ties_go_to_lower_experts_and_lower_tokens(backend):
    logits = torch.zeros(6, 64)
    logits[:, [5, 33]] = 1.0
    for policy in ("bpr", "position", "probs"):
        routing = moe_route(logits, k=3, capacity=2, policy=policy, backend=backend)
        assert routing.index.tolist() == [[5, 33, 0]] * 6
        assert (routing.slot >= 0).tolist() == [[True] * 3] * 2 + [[False] * 3] * 4
    assert moe_route(torch.tensor([[0.0, -0.0, 0.0]]), k=2, capacity=1, backend=backend).index.tolist() == [[0, 1]]


def test_two_levels_and_ties_at_the_capacity(backend):
    """All want expert 0; the sure ones first, then the first of the others."""
    sure = torch.tensor([0, 1, 0, 0, 1, 0, 1, 0]).bool()
    logits = torch.zeros(8, 4)
    logits[:, 0] = torch.where(sure, 8.0, 4.0)
    for policy, kept in (("bpr", [0, 1, 2, 4, 6]), ("probs", [0, 1, 2, 4, 6]), ("position", [0, 1, 2, 3, 4])):
        for order in ("token", "priority"):
            routing = moe_route(logits, k=1, capacity=5, policy=policy, slot_order=order, backend=backend)
            assert (routing.slot[:, 0] >= 0).nonzero()[:, 0].tolist() == kept
            ranked = [1, 4, 6, 0, 2] if order == "priority" and policy != "position" else kept
            assert routing.src.tolist() == ranked + [-1] * (len(routing.src) - 5)


@pytest.mark.parametrize("tokens,experts,k,capacity", [
    (16, 4, 2, 0), (16, 4, 2, 1), (16, 4, 2, 99), (16, 4, 4, -1), (5, 1, 1, 3), (0, 4, 2, 3), (1, 3, 3, 1),
])  # fmt: skip
def test_degenerate_sizes(backend, tokens, experts, k, capacity):
    routing = moe_route(drawn(tokens, experts), k=k, capacity=capacity, backend=backend)
    limit = tokens if capacity < 0 else capacity
    assert routing.kept.tolist() == routing.load.clamp(max=limit).tolist()
    assert (routing.slot >= 0).sum() == routing.kept.sum() == (routing.src >= 0).sum()
    assert routing.load.sum() == tokens * k


def test_nobody_and_one_for_all(backend):
    logits = drawn(10, 4)
    routing = moe_route(logits, k=2, capacity=9, valid=torch.zeros(10).bool(), backend=backend)
    assert routing.load.sum() == 0 and (routing.slot == -1).all() and (routing.src == -1).all()
    assert all((x == 0).all() for x in (routing.weight, routing.prob_sum, routing.lse, routing.offs))
    logits[:, 2] = 9.0
    routing = moe_route(logits, k=1, capacity=3, align=8, backend=backend)
    assert routing.offs.tolist() == [0, 0, 8, 8] and routing.load[:, 0].tolist() == [0, 0, 10, 0]


def test_pools_do_not_know_each_other(backend):
    """Images compete among themselves; causal text is dropless, and nothing about it depends on what follows."""
    logits = drawn(40, 4)
    modality = (torch.arange(40) >= 30).long()

    def route(logits):
        return moe_route(logits, k=1, capacity=(2, -1), modality=modality, num_modalities=2, backend=backend)

    routing = route(logits)
    assert (routing.slot[30:] >= 0).all() and (routing.slot[:30] >= 0).sum() <= 8
    assert routing.kept[:, 1].tolist() == routing.load[:, 1].tolist()
    changed = logits.clone()
    changed[35:] = drawn(5, 4, seed=1)
    other = route(changed)
    assert torch.equal(other.slot[:30] >= 0, routing.slot[:30] >= 0)
    assert torch.equal(other.weight[:35], routing.weight[:35]) and torch.equal(other.index[:35], routing.index[:35])
    assert torch.equal(other.prob_sum[0], routing.prob_sum[0])


def test_pools_are_the_groups_of_vmoe(backend):
    """Routing groups apart from each other equals routing each alone."""
    logits, group = drawn(60, 5), torch.arange(60) // 20
    whole = moe_route(logits, k=2, capacity=(3,) * 3, pool=group, backend=backend)
    alone = [moe_route(part, k=2, capacity=3, backend=backend) for part in logits.split(20)]
    assert torch.equal(whole.slot >= 0, torch.cat([part.slot >= 0 for part in alone]))
    assert torch.equal(whole.kept, torch.cat([part.kept for part in alone], dim=1))


def test_a_modality_without_tokens_costs_nothing(backend):
    logits = drawn(12, 4).requires_grad_()
    routing = moe_route(
        logits, k=1, capacity=4, modality=torch.zeros(12).long(), num_modalities=2, load_sigma=0.3, backend=backend
    )
    aux = losses(routing, [12, 0], [math.log(4), math.log(4)])
    assert aux.local_entropy[1] == aux.global_entropy[1] == 0 and aux.global_entropy[0] > 0
    sum(part.sum() for part in aux).backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("policy", ["bpr", "position", "probs"])
def test_rows_of_nan_and_infinity(backend, noise, policy):
    logits = drawn(9, 4)
    logits[1, 2], logits[2, 0], logits[3], logits[4, :3], logits[5, 1] = NAN, INF, -INF, -INF, -INF
    logits[6] = NAN
    valid = torch.arange(9) != 6
    extra = torch.zeros(9, 4) if noise else None
    if noise:
        extra[7, 1] = NAN  # clean logits are fine: the row is bad all the same
    routing = moe_route(
        logits.requires_grad_(), k=2, capacity=4, policy=policy, noise=extra, valid=valid, load_sigma=0.5,
        modality=torch.arange(9) % 2, num_modalities=2, backend=backend,
    )  # fmt: skip
    bad = [1, 2, 3, 7] if noise else [1, 2, 3]
    assert routing.bad_rows == len(bad)
    assert routing.index[bad].tolist() == [[0, 1]] * len(bad)
    assert routing.index.min() >= 0 and routing.index.max() <= 3
    assert (routing.index[:, 0] != routing.index[:, 1]).all()
    assert routing.weight[bad].isnan().all() and routing.lse[bad].isnan().all()
    good = [row for row in range(9) if row not in bad]
    assert routing.weight[good].isfinite().all() and routing.lse[good].isfinite().all()
    assert routing.slot[6].tolist() == [-1, -1] and routing.weight[6].tolist() == [0, 0] and routing.lse[6] == 0
    assert routing.index[4].tolist() == [3, 0] and routing.weight[4].tolist() == [1, 0]
    assert routing.slot[4, 0] >= 0 and routing.slot[4, 1] == -1  # an expert behind -inf is never asked
    for sums in (routing.prob_sum, routing.ent_sum, routing.z2_sum, routing.loadp_sum):
        assert sums.isnan().all()  # rows 1 and 2 lie in different modalities: the loss shows it
    (gradient,) = torch.autograd.grad(routing.weight.nan_to_num().sum(), logits)
    assert gradient[good].isfinite().all() and gradient[bad].isnan().all() and (gradient[6] == 0).all()


@pytest.mark.parametrize("policy", ["bpr", "position", "probs"])
def test_bad_rows_yield_to_all_others(backend, policy):
    logits = torch.zeros(6, 3)
    logits[:, 0], logits[0, 1] = torch.arange(6) / 4 + 1, NAN
    routing = moe_route(logits, k=1, capacity=5, policy=policy, backend=backend)
    assert routing.slot[0, 0] == -1 and (routing.slot[1:, 0] >= 0).all()
    assert (moe_route(logits, k=1, capacity=6, policy=policy, backend=backend).slot >= 0).all()


def test_noise_decides_and_statistics_are_clean(backend):
    logits, noise = drawn(30, 6), drawn(30, 6, seed=1)
    plain, shaken = (moe_route(logits, k=2, capacity=9, noise=n, backend=backend) for n in (None, noise))
    as_logits = moe_route(logits + noise, k=2, capacity=9, backend=backend)
    for name in ("weight", "index", "slot"):
        assert torch.equal(getattr(shaken, name), getattr(as_logits, name))
    for name in ("prob_sum", "ent_sum", "z2_sum", "lse"):
        torch.testing.assert_close(getattr(shaken, name), getattr(plain, name))


def test_renormalised_weights_sum_to_one_and_drop_the_same(backend):
    raw, normal = (moe_route(drawn(50, 6), k=3, capacity=9, renormalize=r, backend=backend) for r in (False, True))
    torch.testing.assert_close(normal.weight, raw.weight / raw.weight.sum(dim=1, keepdim=True))
    assert torch.equal(raw.slot, normal.slot)


CASES = st.fixed_dictionaries({
    "tokens": st.integers(0, 70), "experts": st.integers(1, 20), "k": st.integers(1, 4),
    "capacity": st.lists(st.integers(-1, 12), min_size=1, max_size=3), "align": st.sampled_from([1, 2, 8]),
    "policy": st.sampled_from(["bpr", "position", "probs"]), "order": st.sampled_from(["token", "priority"]),
    "levels": st.sampled_from([2, 5, 1000]), "seed": st.integers(0, 99),
})  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=CASES)
def test_conservation(backend, case):
    """Rows are a bijection inside the capacity; what goes there and back is the weighted token."""
    generator = torch.Generator().manual_seed(case["seed"])
    tokens, experts, pools = case["tokens"], case["experts"], len(case["capacity"])
    k = min(case["k"], experts)
    logits = torch.randint(0, case["levels"], (tokens, experts), generator=generator).double() / 8
    pool = torch.randint(0, pools, (tokens,), generator=generator)
    valid = torch.rand(tokens, generator=generator) < 0.8
    options = dict(k=k, slot_order=case["order"], align=case["align"], pool=pool, valid=valid, backend=backend)
    routing = moe_route(logits, capacity=case["capacity"], policy=case["policy"], **options)
    slot, src = routing.slot.flatten().long(), routing.src.long()
    kept = (slot >= 0).nonzero()[:, 0]
    assert torch.equal(src[slot[kept]], kept) and (src >= 0).sum() == len(kept) == routing.kept.sum()
    limit = torch.tensor([c if c >= 0 else tokens for c in case["capacity"]])
    assert torch.equal(routing.kept, routing.load.minimum(limit).int())
    assert routing.load.sum() == valid.sum() * k
    rows = (routing.kept.sum(dim=1) + case["align"] - 1) // case["align"] * case["align"]
    assert torch.equal(routing.offs, rows.cumsum(0).int())
    assert rows_bound(tokens, experts, k, case["capacity"], case["align"]) == len(src) >= rows.sum()
    start = routing.offs - rows
    own = routing.index.flatten()[kept].long()
    assert (slot[kept] >= start[own]).all() and (slot[kept] < start[own] + routing.kept.sum(dim=1)[own]).all()

    x = torch.randn(tokens, 3, generator=generator, dtype=torch.double)
    there = moe_permute(x, routing.src, routing.slot, backend=backend)
    back = moe_combine(there, routing.weight, routing.slot, routing.src, backend=backend)
    expected = x * (routing.weight * (routing.slot >= 0)).sum(dim=1, keepdim=True)
    torch.testing.assert_close(back, expected)
    if k == 1:
        other = {
            p: moe_route(logits, capacity=case["capacity"], policy=p, **options) for p in ("bpr", "position", "probs")
        }
        assert torch.equal(other["bpr"].slot, other["probs"].slot)
        mass = {p: (r.weight * (r.slot >= 0)).sum() for p, r in other.items()}
        assert mass["bpr"] >= mass["position"] - 1e-12


def test_refuses(backend):
    def route(**changes):
        settings = {"logits": drawn(4, 3), "k": 1, "capacity": 2, "backend": backend} | changes
        return moe_route(settings.pop("logits"), **settings)

    for changes, match in (
        ({"backend": "triton"}, "unknown backend 'triton'"), ({"k": 4}, "k=4"), ({"k": 0}, "k=0"),
        ({"policy": "random"}, "unknown policy 'random'"), ({"slot_order": "any"}, "unknown slot_order"),
        ({"capacity": -2}, "capacity"), ({"capacity": ()}, "capacity"), ({"align": 0}, "align=0"),
        ({"capacity": (1, 2)}, "pool"), ({"max_rows": 7}, "max_rows=7, but 24"), ({"noise": drawn(4, 2)}, "noise"),
        ({"valid": torch.ones(3).bool()}, "valid"), ({"logits": drawn(4)}, "logits"),
        ({"valid": torch.ones(4)}, "valid is torch.float32, expected torch.bool"),
        ({"load_sigma": -1.0}, "load_sigma"), ({"load_sigma": 1e-39}, "load_sigma=1e-39.*at least 1e-30"),
        ({"load_sigma": math.nan}, "load_sigma"), ({"capacity": 2.5}, "integer"),
        ({"capacity": [1, 2.5]}, "integer"), ({"pool": torch.tensor([0, 1, 0, 0])}, "pool has numbers from 0 to 1"),
        ({"modality": torch.tensor([0, 256, 0, 0]), "num_modalities": 2}, "modality has numbers from 0 to 256"),
        ({"capacity": (1, 2), "pool": torch.tensor([0, 1, -1, 0])}, "from -1 to 1, expected 0 to 1"),
        ({"modality": torch.full((4,), 0.5), "num_modalities": 2}, "modality is torch.float32, expected integers"),
        ({"capacity": (1, 2), "pool": torch.zeros(4)}, "pool is torch.float32, expected integers"),
        ({"k": 1.0}, "k=1.0; expected an integer"), ({"align": 1.5}, "align=1.5; expected an integer"),
        ({"num_modalities": "2"}, "num_modalities='2'; expected an integer"), ({"load_sigma": math.inf}, "load_sigma"),
        ({"valid": torch.ones(4, device="meta").bool()}, "valid is on meta, the others are on cpu"),
        ({"noise": torch.zeros(4, 3, device="meta")}, "noise is on meta"),
        ({"modality": torch.zeros(4, device="meta").int()}, "modality is on meta"),
        ({"pool": torch.zeros(4, device="meta").int()}, "pool is on meta"), ({"max_rows": 24.0}, "max_rows=24.0"),
        ({"max_rows": 2**63}, f"{2**63} rows .*numbered in 32 bits"), ({"align": 2**70}, f"align={2**70} makes of 4"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            route(**changes)
    for capacity in (2**31, 2**63, 2**70):
        assert all(torch.equal(a, b) for a, b in zip(route(capacity=capacity), route(capacity=4), strict=True))
    small = {"modality": torch.tensor([0, 1, 1, 0]).to(torch.uint16), "num_modalities": 2}
    assert torch.equal(route(**small).ent_sum, route(**small | {"modality": small["modality"].long()}).ent_sum)
    routing = route(max_rows=30)
    assert routing.src.shape == (30,)
    with pytest.raises(ValueError, match="moe_permute"):
        moe_permute(drawn(3, 2), routing.src, routing.slot, backend=backend)
    with pytest.raises(ValueError, match="moe_permute.*src .30, 1."):
        moe_permute(drawn(4, 2), routing.src[:, None], routing.slot, backend=backend)
    with pytest.raises(ValueError, match="moe_combine"):
        moe_combine(drawn(3, 2), routing.weight, routing.slot, routing.src, backend=backend)
    for name in ("src", "slot"):
        with pytest.raises(ValueError, match=f"moe_permute: {name} is on meta"):
            moved = {"src": routing.src, "slot": routing.slot} | {name: getattr(routing, name).to("meta")}
            moe_permute(drawn(4, 2), **moved, backend=backend)
    for name in ("weight", "slot", "src"):
        with pytest.raises(ValueError, match=f"moe_combine: {name} is on meta"):
            moved = {each: getattr(routing, each) for each in ("weight", "slot", "src")}
            moe_combine(drawn(30, 2), **moved | {name: moved[name].to("meta")}, backend=backend)


def test_rows_beyond_32_bits_of_bytes(backend):
    """Shapes alone: 2^22 rows of 2^10 numbers are 2^32 elements."""
    with torch.device("meta"):
        x, slot = torch.empty(1 << 22, 1 << 10), torch.empty(1 << 22, 1, dtype=torch.int32)
        src, weight = torch.empty(1 << 22, dtype=torch.int32), torch.empty(1 << 22, 1)
    if backend == "kernel":
        assert torch.ops.dsvlm.moe_permute(x, src, slot).numel() == 1 << 32
        assert torch.ops.dsvlm.moe_combine(x, weight, slot, src).numel() == 1 << 32
    else:
        assert moe_permute(x, src, slot, backend=backend).numel() == 1 << 32


def test_expert_capacity(backend):
    of = {
        name: expert_capacity(1000, 16, 2, 1.05, convention=name) for name in ("vmoe", "deepspeed", "megatron", "tutel")
    }
    assert of == {"vmoe": 132, "deepspeed": 132, "megatron": 132, "tutel": 2 * int(1.05 * 63)}
    assert expert_capacity(10, 16, 1, 1.0) == 4 and expert_capacity(2, 16, 1, 1.0) == 2
    assert expert_capacity(100, 16, 1, 1.0, minimum=50) == 50
    with pytest.raises(ValueError, match="unknown convention"):
        expert_capacity(10, 2, 1, 1.0, convention="none")
    for factor in (math.inf, math.nan, -1.0):
        with pytest.raises(ValueError, match=f"factor={factor}; expected"):
            expert_capacity(10, 2, 1, factor)
