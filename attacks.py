"""L-inf attacks, as functions of (model, x, target). Equation numbers are SPAT's.

x is (B, C, H, W) in [0, 1] and the result has its shape, type and range. model is any callable x -> logits: its
mode, its precision and whether its weights want gradients belong to the caller (see models.frozen).
"""

import contextlib
import functools
import sys

import torch
import torch.nn.functional as F

RANDOM_STARTS = ("gaussian", "uniform", "none")


def pgd(model, x, target, objective, *, epsilon, step_size, num_steps, random_start="uniform"):
    """Return the last iterate of projected gradient ascent on objective(model(x), target) -> (B,), Eq. 7.

    target: whatever the objective takes, labels (B,) or probabilities (B, K). epsilon, step_size: in units of x.
    random_start: "uniform", "gaussian", "none" or a perturbation tensor like x; projected like every iterate.
    Raise ValueError on another kind, on an epsilon outside (0, 1], and on values of x outside [0, 1]: of normalised
    images the result would lie far outside the ball.
    """
    x_adv = _first_iterate(x, random_start, epsilon)
    step = _fast_step(_step, model, objective, epsilon, step_size)
    for _ in range(num_steps):
        x_adv = step(x_adv, x, target)
    return x_adv


def early_stopped_pgd(model, x, y, target, objective, *, tau, epsilon, step_size, num_steps, random_start="uniform"):
    """Return what PGD comes to if an image that the model gets wrong, label y (B,), moves tau more steps and then stops
    (FAT, Zhang et al. 2020, Algorithm 1); for the rest see pgd."""
    x_adv, left = _first_iterate(x, random_start, epsilon), torch.full_like(y, tau)
    step = _fast_step(_early_stopped_step, model, objective, epsilon, step_size)
    for _ in range(num_steps):
        x_adv, left = step(x_adv, x, target, y, left)
    return x_adv


_checked = set()


def _first_iterate(x, random_start, epsilon):
    if not 0 < epsilon <= 1:
        raise ValueError(f"epsilon must be in (0, 1], not {epsilon}")
    # each look at the values waits for the GPU: one for each shape is enough
    if not (x.is_cuda and x.shape in _checked) and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"x must be in [0, 1], not in [{x.min():.4g}, {x.max():.4g}]: normalise inside the model")
    _checked.add(x.shape)
    if not isinstance(random_start, torch.Tensor):
        random_start = start_perturbation(random_start, x, epsilon)
    return project(x + random_start, x, epsilon)


def _fast_step(step, model, objective, epsilon, step_size):
    """Return step(x_adv, x, target, ...) of this model; on a GPU it is recorded once and replayed, see recorded."""
    move = functools.partial(_ascend, epsilon=epsilon, step_size=step_size)
    if hasattr(model, "recorded"):  # a runtime.RecordedPass
        objective, move = model.compiled(objective), model.compiled(move)
    return recorded(model, functools.partial(step, model, objective, move))


def recorded(model, function):
    """Return the function of tensors; where the model is a runtime.RecordedPass, one that a GPU replays."""
    return model.recorded(function) if hasattr(model, "recorded") else function


def _step(model, objective, move, x_adv, x, target):
    return move(x_adv, input_gradient(model, x_adv, target, objective), x)


def _early_stopped_step(model, objective, move, x_adv, x, target, y, left):
    logits, gradient = logits_and_gradient(model, x_adv, target, objective)
    wrong = logits.argmax(1) != y
    moves = (~wrong | (left > 0))[:, None, None, None]  # not sorted out of the batch, which keeps its shape
    return torch.where(moves, move(x_adv, gradient, x), x_adv), left - wrong.long()


def _ascend(x_adv, gradient, x, *, epsilon, step_size):
    return project(x_adv + step_size * gradient.sign(), x, epsilon)  # Eq. 7


def project(x_adv, x, epsilon):
    """Return the point of the ε-ball around x, and of [0, 1], that is closest to x_adv."""
    return (x + (x_adv - x).clamp(-epsilon, epsilon)).clamp(0, 1)


def input_gradient(model, x, target, objective):
    """Return d sum(objective(model(x), target)) / dx: the sum, as an example's step must not depend on its batch."""
    return logits_and_gradient(model, x, target, objective)[1]


def logits_and_gradient(model, x, target, objective):
    """Return model(x), (B, K), as a constant, and that gradient, shaped like x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        # not by backward(), which would compute the weights' gradients and leave them in .grad
        return logits.detach(), torch.autograd.grad(objective(logits, target).sum(), x)[0]


def fgsm(model, x, y, *, epsilon):
    """Return x + ε·sign(d CE / dx), Eq. 6, without a random start, clipped to [0, 1]."""
    return pgd(model, x, y, _cross_entropy, epsilon=epsilon, step_size=epsilon, num_steps=1, random_start="none")


def _cross_entropy(logits, y):
    return F.cross_entropy(_at_least_float32(logits), y, reduction="none")


def _at_least_float32(logits):
    return logits if logits.dtype == torch.float64 else logits.float()


def probabilities(model, x):
    """Return softmax(model(x)), (B, K), a constant: KL's target."""
    return _at_least_float32(constant_logits(model, x)).softmax(1)


def constant_logits(model, x):
    """Return model(x), (B, K), without its gradient."""
    return recorded(model, functools.partial(_logits, model))(x)


def _logits(model, x):
    with torch.enable_grad():  # x wants one, so that a compiled model runs the graph of an attack's step, and no other
        return model(x.detach().requires_grad_()).detach()


def start_perturbation(kind, like, epsilon, generator=None):
    """Return a perturbation shaped like the tensor `like`: "uniform" in the ε-ball, "gaussian" 0.001·N(0, 1) as TRADES
    and MART start, or "none" (zero). generator: on like's device. Raise ValueError on another kind."""
    if kind not in RANDOM_STARTS:
        raise ValueError(f"random start must be one of {', '.join(RANDOM_STARTS)}, not {kind!r}")
    noise = torch.zeros(like.shape, device=like.device, dtype=like.dtype)
    if kind == "uniform":
        noise.uniform_(-epsilon, epsilon, generator=generator)
    if kind == "gaussian":
        noise.normal_(0, 0.001, generator=generator)
    return torch.zeros_like(like) + noise  # zeros_like keeps the memory format


def start_per_image(kind, like, epsilon, indices, seed=0, restart=0):
    """Return such a perturbation, each image's drawn on the CPU from (seed, restart, the image's index) alone: so an
    evaluation depends on neither batch size nor processes. Raise ValueError for a restart above 999, the next seed's.
    """
    if restart > 999:
        raise ValueError(f"restart {restart}: a seed has 1000 restarts, from 0 on")
    starts, one = [], torch.empty_like(like[:1], device="cpu")
    for index in indices.tolist():
        # seeds of one evaluation differ in the low bits only, which torch's Mersenne twister spreads well enough; of
        # higher ones it takes 32 in all, so that seeds 2**22 apart draw alike
        generator = torch.Generator().manual_seed((seed * 1000 + restart) * 10_000_000 + index)
        starts.append(start_perturbation(kind, one, epsilon, generator))
    return torch.zeros_like(like) + torch.cat(starts).to(like.device)


def worst_iterate(attack, model, score):
    """Run attack(model) and return, of all iterates that passed through the model, each example's of lowest
    score(logits), (B,). With the margin as score an example is broken if any step breaks it (RST's rule)."""
    lowest, kept = None, None

    def watched(x):
        nonlocal lowest, kept
        logits = model(x)
        with torch.no_grad():
            now = score(logits)
            if lowest is None:
                lowest, kept = now, x.detach()
            kept = torch.where((now < lowest)[:, None, None, None], x, kept)
            lowest = torch.where(now < lowest, now, lowest)
        return logits

    last = attack(watched)
    with torch.enable_grad():
        watched(last.requires_grad_())  # as in a step: a compiled model then runs no other graph
    return kept


# What AutoAttack's standard version consists of, and at most how many forward passes each part takes an image.
COMPONENTS = {"apgd-ce": 102, "apgd-t": 9 * 102, "fab-t": 9 * 202, "square": 5001}


def check_autoattack(num_classes, components=None):
    """Return the components, the standard four for None. Raise ValueError where AutoAttack is not defined."""
    components = list(COMPONENTS) if components is None else list(components)
    if unknown := [name for name in components if name not in COMPONENTS]:
        raise ValueError(f"unknown component {unknown[0]!r} of AutoAttack; known: {', '.join(COMPONENTS)}")
    if num_classes < 4:  # the difference of logits ratio takes the four largest logits
        raise ValueError(f"AutoAttack needs at least 4 classes, not {num_classes}")
    return components


def for_autoattack(model):
    """Return the model as autoattack and square want it: they hand out NCHW batches, and take float32 logits."""
    return lambda x: model(x.contiguous(memory_format=torch.channels_last)).float()


@contextlib.contextmanager
def _left_as_found(device):
    """Restore the global random state, which pyautoattack seeds, and the trace function, which it sets. Keep cuDNN from
    timing its algorithms anew for each of the many batch sizes that it sends."""
    trace, cudnn = sys.gettrace(), torch.backends.cudnn
    try:
        with (torch.random.fork_rng([device] if device.type == "cuda" else []),
              cudnn.flags(enabled=cudnn.enabled, benchmark=False, allow_tf32=cudnn.allow_tf32)):
            yield
    finally:
        sys.settrace(trace)


def autoattack(model, x, y, *, epsilon, batch_size, seed=0, components=None, on_component=None):
    """Run AutoAttack for L-inf (Croce and Hein 2020), its standard version, by pyautoattack, the official code. Return
    x_adv: x itself where the model is wrong already or nothing succeeded.

    model: frozen, its logits float32. components: of COMPONENTS, in the order in which they run; None for the standard
    four (only those may be called AutoAttack). on_component(name, robust), robust (B,) bool, is called after each.
    batch_size and seed alter the result: state them. Raise ValueError for less than 4 classes.
    """
    from pyautoattack import AutoAttack  # its import costs a second

    x, x_adv = x.contiguous(), x.clone(memory_format=torch.contiguous_format)  # it reshapes with view()
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in x.split(batch_size)])
    robust = logits.argmax(1) == y
    for component in check_autoattack(logits.shape[1], components):
        standing = robust.nonzero()[:, 0]
        if len(standing):
            with _left_as_found(x.device):
                attack = AutoAttack(model, device=x.device, eps=epsilon, norm="Linf", seed=seed, version="standard")
                attack.attacks_to_run = [component]
                for targeted in (attack.apgd_targeted, attack.fab):
                    targeted.n_target_classes = min(9, logits.shape[1] - 1)
                x_adv[standing], label = attack.run_standard_evaluation(x[standing], y[standing], batch_size=batch_size)
            robust[standing] = label == y[standing]
        if on_component:
            on_component(component, robust.clone())
    return x_adv


def square(model, x, y, *, epsilon, num_queries, seed=0):
    """Run Square (Andriushchenko et al. 2020), which needs no gradient, by pyautoattack. Return x_adv."""
    from pyautoattack.square import SquareAttack

    with _left_as_found(x.device), torch.no_grad():
        attack = SquareAttack(model, p_init=0.8, n_queries=num_queries, eps=epsilon, norm="Linf", seed=seed,
                              device=x.device, resc_schedule=False)
        return attack.perturb(x.contiguous(), y)
