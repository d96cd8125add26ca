"""limoe_aux against the formulas, on both sides of its hinge, and where there is nothing to say."""

import math

import pytest
import torch

from dsvlm.ops import limoe_aux, moe_route


def logits(tokens=12, experts=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator, dtype=torch.float64).requires_grad_()


def of(z, tau, load_sigma=0.4, **options):
    modality = torch.arange(len(z)) % 3 % 2
    routing = moe_route(z, k=1, capacity=9, modality=modality, num_modalities=2, load_sigma=load_sigma, **options)
    return limoe_aux(*routing[7:11], modality.bincount(), tau)


@pytest.mark.parametrize("tau", [(math.log(2), math.log(2)), (math.log(5), math.log(5)), (math.log(2), math.log(5))])
def test_formulas_and_gradients(tau):
    z = logits()
    aux, p, modality = of(z, tau), z.softmax(dim=1), torch.arange(12) % 3 % 2
    importance = p.sum(dim=0)
    torch.testing.assert_close(aux.importance, importance.var(unbiased=False) / importance.mean() ** 2)
    cdf = torch.distributions.Normal(0, 1).cdf((z - z.max(dim=1, keepdim=True).values) / 0.4).mean(dim=0)
    torch.testing.assert_close(aux.load, cdf.var(unbiased=False) / cdf.mean() ** 2)
    torch.testing.assert_close(aux.z, z.logsumexp(dim=1).square().mean())
    for m in range(2):
        part = p[modality == m]
        torch.testing.assert_close(aux.local_entropy[m], -(part * part.log()).sum(dim=1).mean())
        entropy = -(part.mean(dim=0) * part.mean(dim=0).log()).sum()
        torch.testing.assert_close(aux.mean_entropy[m], entropy.detach())
        torch.testing.assert_close(aux.global_entropy[m], (tau[m] - entropy).clamp(min=0))
    active = aux.global_entropy > 0
    assert active.tolist() == [t == math.log(5) for t in tau], "both sides of the hinge are meant to be seen"

    def losses(z):
        return tuple(of(z, tau))[:5]

    assert torch.autograd.gradcheck(losses, (z,), atol=1e-8)


def test_sums_of_parts_are_the_sums_of_the_whole():
    """What micro-steps and ranks add up gives the losses of all tokens together."""
    z, modality = logits(20), torch.arange(20) % 2
    options = dict(k=1, capacity=-1, num_modalities=2, load_sigma=0.3)
    whole = moe_route(z, modality=modality, **options)
    cuts = [moe_route(a, modality=m, **options) for a, m in zip(z.split(7), modality.split(7), strict=True)]
    sums = [sum(getattr(cut, name) for cut in cuts) for name in ("prob_sum", "ent_sum", "z2_sum", "loadp_sum")]
    for a, b in zip(limoe_aux(*sums, modality.bincount(), (1.5, 1.5)),
                    limoe_aux(*whole[7:11], modality.bincount(), (1.5, 1.5)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)


def test_masked_experts_and_absent_load_have_finite_gradients():
    z = logits().detach()
    z[:, 1] = -math.inf
    z.requires_grad_()
    aux = of(z, (1.0, 1.7), load_sigma=0.0)
    assert aux.load == 0
    sum(part.sum() for part in aux).backward()
    assert z.grad.isfinite().all()


def test_nan_shows():
    z = logits().detach()
    z[3, 2] = math.nan
    aux = of(z, (1.0, 1.0))
    assert aux.importance.isnan() and aux.load.isnan() and aux.z.isnan()
    assert aux.local_entropy.isnan().tolist() == aux.global_entropy.isnan().tolist() == [True, False]


def test_shapes_that_do_not_fit():
    routing = moe_route(logits(), k=1, capacity=3)
    with pytest.raises(ValueError, match="limoe_aux"):
        limoe_aux(*routing[7:11], torch.tensor([12, 3]), (1.0,))
    sums = dict(zip(("prob_sum", "ent_sum", "z2_sum", "loadp_sum"), routing[7:11], strict=True))
    limoe_aux(**sums, count=torch.tensor([12]), tau=(1.0,))
    for name, wrong in (("z2_sum", torch.ones(7)), ("loadp_sum", torch.ones(5)), ("ent_sum", torch.ones(2))):
        with pytest.raises(ValueError, match=f"{name} .*do not fit"):
            limoe_aux(**sums | {name: wrong}, count=torch.tensor([12]), tau=(1.0,))
