"""L-inf attacks, as functions of (model, x, target).

x is (B, C, H, W) in [0, 1] and the result has its shape, type and range. model is any callable x -> logits: its
mode, its precision and whether its weights want gradients belong to the caller (see models.frozen).
"""

import torch
import torch.nn.functional as F

RANDOM_STARTS = ("gaussian", "uniform", "none")


def start_perturbation(kind, like, epsilon, generator=None):
    """A perturbation shaped like the tensor `like`: "uniform" in the ε-ball, "gaussian" 0.001·N(0, 1) as TRADES and
    MART start, or "none" (zero). generator: on like's device. Raises ValueError on another kind."""
    if kind == "uniform":
        noise = torch.empty(like.shape, device=like.device, dtype=like.dtype)
        noise.uniform_(-epsilon, epsilon, generator=generator)
    elif kind == "gaussian":
        noise = torch.empty(like.shape, device=like.device, dtype=like.dtype).normal_(0, 0.001, generator=generator)
    elif kind == "none":
        noise = 0.0
    else:
        raise ValueError(f"random start must be one of {', '.join(RANDOM_STARTS)}, not {kind!r}")
    return torch.zeros_like(like) + noise  # zeros_like keeps the memory format


def start_per_image(kind, like, epsilon, indices, seed=0, restart=0):
    """The same, one draw an image, each a function of (seed, restart, the image's index) alone: an evaluation's
    result then depends on neither its batch size nor the number of processes. Drawn on the CPU."""
    starts = []
    for index in indices.tolist():
        # seeds of one evaluation differ in the low bits only, which torch's Mersenne twister spreads well enough
        generator = torch.Generator().manual_seed((seed * 1000 + restart) * 10_000_000 + index)
        starts.append(start_perturbation(kind, like[:1].cpu(), epsilon, generator))
    return torch.zeros_like(like) + torch.cat(starts).to(like.device)


def project(x_adv, x, epsilon):
    """The point of the ε-ball around x, and of [0, 1], that is closest to x_adv."""
    return (x + (x_adv - x).clamp(-epsilon, epsilon)).clamp(0, 1)


def input_gradient(model, x, target, objective):
    """d sum(objective(model(x), target)) / dx. The sum and not the mean: an example's step must not depend on its
    batch. autograd.grad and not backward(): no .grad is left behind and no weight gradient is computed."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(objective(model(x), target).sum(), x)[0]


def pgd(model, x, target, objective, *, epsilon, step_size, num_steps, random_start="uniform"):
    """Projected gradient ascent on objective(model(x), target) -> (B,), SPAT Eq. 7. Returns the last iterate.

    target: whatever the objective takes, labels (B,) or probabilities (B, K). epsilon, step_size: in units of x.
    random_start: "uniform", "gaussian", "none" or a perturbation tensor like x; projected like every iterate.
    Raises ValueError on another kind.
    """
    if not isinstance(random_start, torch.Tensor):
        random_start = start_perturbation(random_start, x, epsilon)
    x_adv = project(x + random_start, x, epsilon)
    for _ in range(num_steps):
        x_adv = project(x_adv + step_size * input_gradient(model, x_adv, target, objective).sign(), x, epsilon)
    return x_adv


def _cross_entropy(logits, y):
    return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, y, reduction="none")


def fgsm(model, x, y, *, epsilon):
    """x + ε·sign(d CE / dx), SPAT Eq. 6, without a random start, clipped to [0, 1]."""
    return pgd(model, x, y, _cross_entropy, epsilon=epsilon, step_size=epsilon, num_steps=1, random_start="none")


def attacked_logits(model, images, labels, attack=None, batch_size=256, progress=lambda n: None, rank=0, world=1):
    """The model's float32 logits (N, K) for attacked images: what every accuracy is counted from.

    images: (N, C, H, W) uint8, labels: (N,), both on one device. attack(x, y, indices) -> x_adv, indices being the
    images' positions; None for the natural images. model scores the final images: give it in float32 and frozen,
    whatever crafts inside `attack`. Of `world` processes each takes every world-th image and leaves the rows of the
    others zero: their sum is the result. All batches have one size (the last is filled up with images that are not
    counted), so that compiled code is not compiled twice. progress(n) is called after every n images.
    """
    n, logits = len(images), None
    batch_size = min(batch_size, -(-n // world))
    batches = -(-len(range(rank, n, world)) // batch_size)
    positions = torch.arange(rank, rank + max(batches, 1) * batch_size * world, world, device=images.device)
    for chunk in positions.split(batch_size):
        indices, counted = chunk % n, chunk < n
        x = images[indices].to(torch.float32, memory_format=torch.channels_last).div_(255)
        if attack is not None:
            x = attack(x, labels[indices], indices)
        with torch.no_grad():
            out = model(x).float()
        logits = out.new_zeros(n, out.shape[1]) if logits is None else logits
        logits[indices[counted]] = out[counted]
        progress(int(counted.sum()))
    return logits
