"""Attacks against foolbox, a linear model whose optimum is known, and the definition of the ball."""

import foolbox
import pytest
import torch
import torch.nn.functional as F
from foolbox.attacks.projected_gradient_descent import LinfProjectedGradientDescentAttack

import attacks
import losses
import models

EPSILON, STEP, STEPS = 0.1, 0.03, 7  # num_steps·step > ε: the projection works


def oracle(objective, start):
    """foolbox's L-inf PGD with another objective, (logits, labels) -> scalar, and a given start."""

    class Attack(LinfProjectedGradientDescentAttack):
        def get_loss_fn(self, model, labels):
            import eagerpy as ep

            return lambda inputs: ep.astensor(objective(model(inputs).raw, labels.raw))

        def get_random_start(self, x0, epsilon):
            return x0 + type(x0)(start)

    return Attack(abs_stepsize=STEP, steps=STEPS, random_start=True)


def cw_by_hand(logits, y):
    true = logits[range(len(y)), y]
    other = torch.stack([torch.cat([z[:k], z[k + 1 :]]).max() for z, k in zip(logits, y.tolist(), strict=True)])
    return -torch.clamp(true - other + 50.0, min=0).sum()


@pytest.mark.parametrize(
    "name, kind",
    [(name, kind) for name in ("ce", "lsce", "kl", "cw") for kind in ("uniform", "gaussian", "none")
     if (name, kind) != ("kl", "none")],  # KL(p(x) || p(x)) has no gradient at x: the scripts refuse it
)
def test_pgd_equals_foolbox(small_net, images, name, kind):
    x, y = images
    start = attacks.start_perturbation(kind, x, EPSILON, torch.Generator().manual_seed(3))
    alpha, k = 0.3, 5
    p_ref = small_net(x).softmax(1).detach()
    target, ours, theirs = {
        "ce": (y, losses.cross_entropy, lambda z, t: F.cross_entropy(z, t, reduction="sum")),
        "lsce": (y, lambda z, t: losses.lsce(z, t, alpha),
                 lambda z, t: F.cross_entropy(z, t, reduction="sum", label_smoothing=alpha * k / (k - 1))),
        "kl": (p_ref, losses.kl_divergence, lambda z, t: F.kl_div(z.log_softmax(1), p_ref, reduction="sum")),
        "cw": (y, losses.cw_margin, cw_by_hand),
    }[name]
    x_adv = attacks.pgd(small_net, x, target, ours, epsilon=EPSILON, step_size=STEP, num_steps=STEPS,
                        random_start=start)
    model = foolbox.PyTorchModel(small_net, bounds=(0, 1), device="cpu")
    expected, _, _ = oracle(theirs, start)(model, x, y, epsilons=EPSILON)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-6)
    assert ((x_adv - x).abs() > 0.9 * EPSILON).float().mean() > 0.3  # the test bites: pixels reached the ball's edge


def test_fgsm_equals_foolbox(small_net, images):
    x, y = images
    model = foolbox.PyTorchModel(small_net, bounds=(0, 1), device="cpu")
    expected, _, _ = foolbox.attacks.LinfFastGradientAttack()(model, x, y, epsilons=EPSILON)
    torch.testing.assert_close(attacks.fgsm(small_net, x, y, epsilon=EPSILON), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step_size, num_steps", [(0.1, 1), (0.03, 7), (0.025, 40)])
def test_a_linear_model_is_driven_to_its_optimum(step_size, num_steps):
    """For logits Wx with two classes CE grows along -(w_y - w_other): every pixel ends at the edge of ball or box."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3 * 4 * 4, generator=g)
    x, y = torch.rand(5, 3, 4, 4, generator=g), torch.tensor([0, 1, 0, 1, 1])
    direction = torch.stack([weight[1 - k] - weight[k] for k in y.tolist()]).view_as(x).sign()
    expected = (x + EPSILON * direction).clamp(0, 1)
    x_adv = attacks.pgd(lambda v: v.flatten(1) @ weight.T, x, y, losses.cross_entropy, epsilon=EPSILON,
                        step_size=step_size, num_steps=num_steps, random_start="none")
    torch.testing.assert_close(x_adv, expected)


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "none"])
@pytest.mark.parametrize("epsilon, step_size", [(8 / 255, 2 / 255), (0.5, 0.4), (0.0005, 0.1)])
def test_ball_and_box_are_never_left(small_net, images, kind, epsilon, step_size):
    x, y = images
    seen = []

    def spy(v):
        seen.append(v.detach().clone())
        return small_net(v)

    torch.manual_seed(0)
    last = attacks.pgd(spy, x, y, losses.cross_entropy, epsilon=epsilon, step_size=step_size, num_steps=5,
                       random_start=kind)
    for iterate in [*seen, last]:
        assert iterate.min() >= 0 and iterate.max() <= 1
        assert (iterate - x).abs().max() <= epsilon * (1 + 1e-6) + 1e-7
    assert len(seen) == 5 and (last != x).any()


def test_more_steps_raise_the_objective(small_net, images):
    x, y = images
    values = []
    for num_steps in (1, 3, 10, 30):
        x_adv = attacks.pgd(small_net, x, y, losses.cross_entropy, epsilon=EPSILON, step_size=0.01,
                            num_steps=num_steps, random_start="none")
        values.append(losses.cross_entropy(small_net(x_adv), y).mean().item())
    assert values == sorted(values) and values[-1] > values[0] + 0.05


def test_an_examples_result_does_not_depend_on_its_batch(small_net, images):
    x, y = images
    start = attacks.start_perturbation("uniform", x, EPSILON, torch.Generator().manual_seed(3))
    settings = dict(epsilon=EPSILON, step_size=STEP, num_steps=STEPS)
    together = attacks.pgd(small_net, x, y, losses.cross_entropy, random_start=start, **settings)
    alone = [attacks.pgd(small_net, x[i : i + 1], y[i : i + 1], losses.cross_entropy, random_start=start[i : i + 1],
                         **settings) for i in range(len(x))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_zero_gradient_moves_nothing(images):
    x, y = images
    constant = attacks.pgd(lambda v: 0 * v.flatten(1)[:, :5], x, y, losses.cross_entropy, epsilon=EPSILON,
                           step_size=STEP, num_steps=3, random_start="none")
    assert torch.equal(constant, x)


def test_unknown_start_is_refused(small_net, images):
    with pytest.raises(ValueError, match="normal"):
        attacks.pgd(small_net, *images, losses.cross_entropy, epsilon=0.1, step_size=0.1, num_steps=1,
                    random_start="normal")


def test_nothing_is_left_behind(small_net, images):
    """The attack leaves no .grad, changes no buffer and no flag, and does not turn gradients on for its caller."""
    x, y = images
    small_net.train()
    small_net.head.eval()
    small_net.conv.bias.requires_grad_(False)
    modes = [m.training for m in small_net.modules()]
    wants = [p.requires_grad for p in small_net.parameters()]
    buffers = {k: v.clone() for k, v in small_net.named_buffers()}
    with models.frozen(small_net), torch.no_grad():
        assert not any(m.training for m in small_net.modules())
        assert not any(p.requires_grad for p in small_net.parameters())
        x_adv = attacks.pgd(small_net, x, y, losses.cross_entropy, epsilon=0.1, step_size=0.1, num_steps=2)
    assert not x_adv.requires_grad
    assert [m.training for m in small_net.modules()] == modes
    assert [p.requires_grad for p in small_net.parameters()] == wants
    assert all(p.grad is None for p in small_net.parameters()) and x.grad is None
    assert all(torch.equal(v, buffers[k]) for k, v in small_net.named_buffers())


def test_probabilities_are_a_constant(small_net, images):
    """Else every step of the attack would keep, and walk, the graph of the clean pass too."""
    p = attacks.probabilities(small_net, images[0])
    torch.testing.assert_close(p, F.softmax(small_net(images[0]), 1))
    assert not p.requires_grad


def test_frozen_restores_after_an_error(small_net):
    small_net.train()
    with pytest.raises(KeyError), models.frozen(small_net):
        raise KeyError
    assert all(m.training for m in small_net.modules()) and all(p.requires_grad for p in small_net.parameters())


def test_starts_are_what_their_names_say():
    like = torch.zeros(64, 3, 32, 32)
    uniform = attacks.start_perturbation("uniform", like, 0.1)
    assert uniform.abs().max() <= 0.1 and abs(uniform.std().item() - 0.1 / 3**0.5) < 1e-3
    assert abs(attacks.start_perturbation("gaussian", like, 0.1).std().item() - 0.001) < 1e-5
    assert not attacks.start_perturbation("none", like, 0.1).any()


def test_start_per_image_depends_on_seed_restart_and_index_only():
    like = torch.zeros(4, 3, 8, 8)
    together = attacks.start_per_image("uniform", like, 0.1, torch.tensor([5, 0, 7, 2]), seed=1)
    single = attacks.start_per_image("uniform", like[:1], 0.1, torch.tensor([7]), seed=1)
    assert torch.equal(together[2:3], single)
    for other in (dict(seed=2), dict(seed=1, restart=1)):
        assert not torch.equal(single, attacks.start_per_image("uniform", like[:1], 0.1, torch.tensor([7]), **other))


def test_no_two_pairs_of_seed_and_restart_share_a_start():
    """Restart 1000 of seed 0 was restart 0 of seed 1. What results were made with is still drawn alike."""
    like, index = torch.zeros(1, 3, 4, 4), torch.tensor([3])
    for seed, restart in ((0, 0), (0, 999), (2, 0), (7, 12)):
        generator = torch.Generator().manual_seed((seed * 1000 + restart) * 10_000_000 + 3)
        expected = attacks.start_perturbation("uniform", like, 0.1, generator)
        assert torch.equal(attacks.start_per_image("uniform", like, 0.1, index, seed, restart), expected)
    with pytest.raises(ValueError, match="1000 restarts"):
        attacks.start_per_image("uniform", like, 0.1, index, 0, 1000)


@pytest.mark.parametrize("low, high, epsilon, message", [
    (-2.0, 2.0, 0.03, r"x must be in \[0, 1\], not in \[-"), (0, 255, 0.03, "normalise inside the model"),
    (0, float("nan"), 0.03, "x must be"), (0, 1, 8, "epsilon must be"), (0, 1, 0, "epsilon must be")])
def test_images_outside_0_and_1_are_refused(small_net, images, low, high, epsilon, message):
    """Of normalised images the attack would leave the ball: the clipping to [0, 1] moves them far."""
    x, y = images
    x = low + (high - low) * x
    with pytest.raises(ValueError, match=message):
        attacks.pgd(small_net, x, y, losses.cross_entropy, epsilon=epsilon, step_size=0.01, num_steps=1)
    with pytest.raises(ValueError, match=message):
        attacks.early_stopped_pgd(small_net, x, y, y, losses.cross_entropy, tau=1, epsilon=epsilon, step_size=0.01,
                                  num_steps=1)
    if epsilon == 0.03:
        with pytest.raises(ValueError, match=message):
            attacks.fgsm(small_net, x, y, epsilon=epsilon)


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_early_stopped_pgd_equals_a_loop_over_single_images(small_net, images, tau):
    x, _ = images
    y = small_net(x).argmax(1)
    y[0] = (y[0] + 1) % 5  # wrong from the start
    start = attacks.start_perturbation("gaussian", x, EPSILON, torch.Generator().manual_seed(3))
    radius, step_size = 0.5, 0.02
    settings = dict(epsilon=radius, step_size=step_size, num_steps=20, random_start=start)
    found = attacks.early_stopped_pgd(small_net, x, y, y, losses.cross_entropy, tau=tau, **settings)
    moves = []
    for i in range(len(x)):
        image, label, left = x[i : i + 1], y[i : i + 1], tau
        x_adv = (image + start[i : i + 1]).clamp(0, 1)
        for step in range(21):
            x_adv = x_adv.detach().requires_grad_()
            logits = small_net(x_adv)
            if logits.argmax() != label:
                left -= 1
            if left < 0 or step == 20:
                break
            gradient = torch.autograd.grad(F.cross_entropy(logits, label), x_adv)[0]
            x_adv = (x_adv + step_size * gradient.sign()).clamp(image - radius, image + radius).clamp(0, 1)
        moves.append(step)
        torch.testing.assert_close(found[i : i + 1], x_adv.detach(), rtol=0, atol=1e-6)
    assert moves[0] == tau and len(set(moves)) > 2 and max(moves) > tau  # some stop, at several steps
    plain = attacks.pgd(small_net, x, y, losses.cross_entropy, **settings)
    never = attacks.early_stopped_pgd(small_net, x, y, y, losses.cross_entropy, tau=20, **settings)
    assert torch.equal(plain, never) and not torch.equal(plain, found)


def test_worst_iterate_keeps_what_the_attack_passes_by():
    """A model that is wrong only where the mean is near 0.5, and an attack that runs past it from 0.3 to 0.8."""
    x, y = torch.full((3, 3, 4, 4), 0.3), torch.zeros(3, dtype=torch.long)
    x[1] = 0.7  # it moves away from 0.5: its start is its worst
    x[2] = 0.0  # it ends at 0.5: what the last step makes is its worst

    def model(x):
        mean = x.mean((1, 2, 3))
        return torch.stack([(mean - 0.5) ** 2, torch.full_like(mean, 0.01), mean], 1)

    def attack(watched):
        return attacks.pgd(watched, x, y, lambda logits, y: logits[:, 2], epsilon=0.5, step_size=0.125, num_steps=4,
                           random_start="none")

    worst = attacks.worst_iterate(attack, model, lambda logits: logits[:, 0] - logits[:, 1])
    torch.testing.assert_close(worst.mean((1, 2, 3)), torch.tensor([0.55, 0.7, 0.5]))
    torch.testing.assert_close(attack(model).mean((1, 2, 3)), torch.tensor([0.8, 1.0, 0.5]))
