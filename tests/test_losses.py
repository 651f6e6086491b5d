"""Losses against closed forms, torch's own losses and the papers' formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F

import losses


def draw(k, b=7, scale=3.0, dtype=torch.float64):
    """Logits, of which every other row is classified rightly, and labels."""
    g = torch.Generator().manual_seed(k)
    logits, y = scale * torch.randn(b, k, generator=g, dtype=dtype), torch.randint(k, (b,), generator=g)
    y[::2] = logits[::2].argmax(1)
    return logits, y


@pytest.mark.parametrize("k", [2, 10, 100])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 0.5])
def test_lsce_is_torchs_label_smoothing_with_another_scale(k, alpha):
    logits, y = draw(k)
    expected = F.cross_entropy(logits, y, label_smoothing=alpha * k / (k - 1), reduction="none")
    torch.testing.assert_close(losses.lsce(logits, y, alpha), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 10, 100])
def test_lsce_at_one_is_the_mean_over_the_other_classes(k):
    logits, y = draw(k)
    log_p = torch.log(torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))
    expected = [-sum(log_p[i, j] for j in range(k) if j != y[i]) / (k - 1) for i in range(len(y))]
    torch.testing.assert_close(losses.lsce(logits, y, 1.0), torch.stack(expected))


def test_lsce_takes_an_alpha_per_example():
    logits, y = draw(10)
    alpha = torch.linspace(0, 1, len(y), dtype=torch.float64)
    single = [losses.lsce(logits[i : i + 1], y[i : i + 1], alpha[i].item())[0] for i in range(len(y))]
    torch.testing.assert_close(losses.lsce(logits, y, alpha), torch.stack(single))


def test_lsce_gradient_is_softmax_minus_smoothed_target():
    logits, y = draw(10)
    logits.requires_grad_()
    losses.lsce(logits, y, 0.3).sum().backward()
    target = torch.full_like(logits, 0.3 / 9).scatter(1, y[:, None], 0.7)
    torch.testing.assert_close(logits.grad, logits.softmax(1) - target)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_lsce_refuses_alpha_outside_its_range(alpha):
    with pytest.raises(ValueError, match="alpha"):
        losses.lsce(*draw(10), alpha)


def test_kl_divergence_is_the_sum_over_classes_and_admits_zeros():
    logits, _ = draw(10)
    p_ref = torch.randn(7, 10, dtype=torch.float64).softmax(1)
    p_ref[:, 3] = 0
    p_ref /= p_ref.sum(1, keepdim=True)
    pairs = zip(p_ref.tolist(), logits.softmax(1).tolist(), strict=True)
    expected = [sum(q * math.log(q / p) for q, p in zip(qs, ps, strict=True) if q) for qs, ps in pairs]
    torch.testing.assert_close(losses.kl_divergence(logits, p_ref), torch.tensor(expected, dtype=torch.float64))
    assert not losses.kl_divergence(logits, p_ref.requires_grad_()).requires_grad  # p_ref is a constant


@pytest.mark.parametrize("kappa", [50.0, 0.0])
def test_cw_margin_written_out(kappa):
    logits, y = draw(10, scale=20.0)
    expected = []
    for z, label in zip(logits.tolist(), y.tolist(), strict=True):
        margin = z[label] - max(v for j, v in enumerate(z) if j != label)
        expected.append(-max(margin + kappa, 0.0))
    torch.testing.assert_close(losses.cw_margin(logits, y, kappa), torch.tensor(expected, dtype=torch.float64))


def mart_by_hand(logits_adv, logits_nat, y, beta):
    total = 0.0
    for adv, nat, label in zip(logits_adv, logits_nat, y.tolist(), strict=True):
        p_adv, p = adv.softmax(0), nat.softmax(0)
        other = max(p_adv[j] for j in range(len(p)) if j != label)
        bce = -torch.log(p_adv[label]) - torch.log(1.0001 - other + 1e-12)
        kl = (p * (p / p_adv).log()).sum()
        total += bce + beta * kl * (1 - p[label])
    return total / len(y)


def trades_by_hand(logits_adv, logits_nat, y, beta):
    p, p_adv = logits_nat.softmax(1), logits_adv.softmax(1)
    kl = (p * (p / p_adv).log()).sum(1)
    return (-torch.log(p[range(len(y)), y]) + beta * kl).mean()


@pytest.mark.parametrize("k", [3, 10, 100])
@pytest.mark.parametrize("ours, by_hand", [(losses.mart_loss, mart_by_hand), (losses.trades_loss, trades_by_hand)])
def test_outer_losses_equal_the_papers_formulas(ours, by_hand, k):
    logits_adv, y = draw(k)
    logits_nat = 0.5 * logits_adv.roll(1, 0)  # not flip: the mean of KL over pairs that mirror one another is symmetric
    torch.testing.assert_close(ours(logits_adv, logits_nat, y, 5.0), by_hand(logits_adv, logits_nat, y, 5.0))


def test_madry_and_standard_are_torchs_cross_entropy():
    logits, y = draw(10)
    torch.testing.assert_close(losses.madry_loss(logits, None, y, None), F.cross_entropy(logits, y))
    torch.testing.assert_close(losses.standard_loss(None, logits, y, None), F.cross_entropy(logits, y))


def test_trades_has_a_gradient_on_both_arguments():
    logits_adv, y = draw(10)
    logits_nat = torch.randn_like(logits_adv).requires_grad_()
    logits_adv.requires_grad_()
    losses.trades_loss(logits_adv, logits_nat, y, 6.0).backward()
    with_kl = logits_nat.grad.clone()
    logits_nat.grad = None
    losses.trades_loss(logits_adv, logits_nat, y, 0.0).backward()
    assert (logits_adv.grad != 0).any()
    assert (with_kl - logits_nat.grad).abs().max() > 1e-3


OBJECTIVES = {
    "cross_entropy": losses.cross_entropy,
    "lsce": lambda z, y: losses.lsce(z, y, 0.3),
    "lsce_1": lambda z, y: losses.lsce(z, y, 1.0),
    "kl": lambda z, y: losses.kl_divergence(z, z.detach().flip(1).softmax(1)),
    "cw": losses.cw_margin,
    "bce": losses.boosted_cross_entropy,
    "madry": lambda z, y: losses.madry_loss(z, None, y, None),
    "trades": lambda z, y: losses.trades_loss(z, z.flip(1), y, 6.0),
    "mart": lambda z, y: losses.mart_loss(z, z.flip(1), y, 5.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_by_finite_differences(name):
    logits, y = draw(5, b=4)
    reference = logits.detach().clone()  # a KL target that finite differences must not move
    function = OBJECTIVES[name] if name != "kl" else lambda z, y: losses.kl_divergence(z, reference.flip(1).softmax(1))
    assert torch.autograd.gradcheck(lambda z: function(z, y), logits.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_logits_stay_finite(name, dtype):
    logits = torch.zeros(6, 10, dtype=dtype)
    for i, value in enumerate((1e4, -1e4)):
        logits[i, 0], logits[2 + i, 1], logits[4 + i] = value, value, value
    logits[5, ::2] = -1e4
    for label in (0, 1, 9):
        z = logits.clone().requires_grad_()
        value = OBJECTIVES[name](z, torch.full((6,), label))
        value.sum().backward()
        assert value.isfinite().all() and z.grad.isfinite().all()
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_batch_of_one_keeps_its_dimension():
    logits, y = draw(10, b=1)
    for function in (losses.cross_entropy, losses.cw_margin, losses.boosted_cross_entropy):
        assert function(logits, y).shape == (1,)
