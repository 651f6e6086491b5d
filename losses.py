"""What attacks maximise and what training minimises, as functions of logits only.

Shapes: logits (B, K); y (B,) int64; p_ref (B, K). The functions named *_loss return a scalar, the mean over the batch;
the others, but for spat_counts, one value an example, (B,). All compute in float32 at least. Equation numbers are those
of "Semantics-Preserving Adversarial Training" (SPAT), where no other paper is named.
"""

import torch
import torch.nn.functional as F


def cross_entropy(logits, y):
    """Return -log p_y, (B,): LSCE with α = 0."""
    return lsce(logits, y, alpha=0.0)


def lsce(logits, y, alpha):
    """Return the label-smoothed cross entropy, Eq. 8-9, (B,): 1-α on the true class, α/(K-1) on each other class.

    alpha is a float or a (B,) tensor in [0, 1]; a float outside raises ValueError. F.cross_entropy(label_smoothing=...)
    spreads its value over all K classes, the true one included: α is αK/(K-1) there, which torch refuses above 1.
    """
    if not isinstance(alpha, torch.Tensor) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], not {alpha}")
    log_p, q_wrong = _log_softmax(logits), alpha / (logits.shape[1] - 1)  # Eq. 9
    return -((1 - alpha - q_wrong) * _true(log_p, y) + q_wrong * log_p.sum(1))  # Eq. 8; the sum is over all classes


def kl_divergence(logits, p_ref):
    """Return KL(p_ref || softmax(logits)), (B,), for TRADES' attack. p_ref gets no gradient and may hold zeros."""
    log_p = _log_softmax(logits)
    return F.kl_div(log_p, p_ref.detach().to(log_p.dtype), reduction="none").sum(1)


def cw_margin(logits, y, kappa=50.0):
    """Return -max(z_y - max_{k != y} z_k + κ, 0), (B,): CW-inf (Carlini and Wagner 2017 with confidence κ) as MART's
    code runs it with PGD. An attack that reaches margin -κ stops moving."""
    return -(margin(logits, y) + kappa).clamp(min=0)


def margin(logits, y):
    """Return z_y - max_{k != y} z_k, (B,): below 0 where the model is wrong."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return _true(logits, y) - _max_other(logits, y)


def standard_loss(logits_adv, logits_nat, y, beta):
    """Return CE(p(x), y), without an adversarial term; logits_adv and beta are not used."""
    return cross_entropy(logits_nat, y).mean()


def madry_loss(logits_adv, logits_nat, y, beta):
    """Return CE(p(x_adv), y), Eq. 4 (Madry et al. 2018); logits_nat and beta are not used."""
    return cross_entropy(logits_adv, y).mean()


def trades_loss(logits_adv, logits_nat, y, beta):
    """Return CE(p(x), y) + β·KL(p(x) || p(x_adv)) (Zhang et al. 2019)."""
    return cross_entropy(logits_nat, y).mean() + beta * _kl(logits_nat, logits_adv).mean()


def mart_loss(logits_adv, logits_nat, y, beta):
    """Return BCE(p(x_adv), y) + β·KL(p(x) || p(x_adv))·(1 - p_y(x)) (Wang et al. 2020, Eq. 12)."""
    weight = 1 - p_true(logits_nat, y)
    return boosted_cross_entropy(logits_adv, y).mean() + beta * (_kl(logits_nat, logits_adv) * weight).mean()


def boosted_cross_entropy(logits, y):
    """Return MART's BCE, (B,), with the constants of its code: -log p_y - log(1 - max_{k != y} p_k), its Eq. 8."""
    log_p = _log_softmax(logits)
    return -_true(log_p, y) - torch.log(1.0001 - _max_other(log_p.exp(), y) + 1e-12)


def p_true(logits, y):
    """Return p_y, (B,): the probability of the true class."""
    return _true(_log_softmax(logits), y).exp()


def spat_counts(logits_nat, logits_adv, y, alpha):
    """Count two kinds of examples, (2,): of p_y(x) > 1 - α, where ascending LSCE raises the true logit, and of
    p_y(x_adv) > p_y(x), which the attack made easier."""
    before, after = p_true(logits_nat.double(), y), p_true(logits_adv.double(), y)
    return torch.stack([before > 1 - alpha, after > before]).sum(1)


def _kl(logits_nat, logits_adv):
    """Return KL(p(x) || p(x_adv)), (B,), with gradient on both. It takes two log-softmaxes, because F.kl_div on
    probabilities has a NaN gradient where a natural probability underflows."""
    return F.kl_div(_log_softmax(logits_adv), _log_softmax(logits_nat), reduction="none", log_target=True).sum(1)


def _log_softmax(logits):
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=1)


def _true(values, y):
    return values.gather(1, y[:, None]).squeeze(1)


def _max_other(values, y):
    """Return the maximum over k != y of values[:, k], (B,)."""
    return values.scatter(1, y[:, None], float("-inf")).max(dim=1).values
