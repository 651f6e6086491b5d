"""Adversarial training written a second time, from the paper and design.md, which train_cifar.py must equal.

The loop below shares with train_cifar.py only the data set, its split and the generators that design.md documents. Both
run eagerly in float64, where rounding flips no sign of a gradient; so every weight and every number of the log must
agree. A rate that is never set, a wrong order, start, mode or step size shows here, which no test of one function sees.
"""

import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model
from PIL import Image

import checkpoints
import data
import models
import train_cifar

N, HELD_OUT, BATCH, EPOCHS, STEPS, RATE, DECAY, SEED = 40, 24, 16, 2, 3, 0.2, 5e-4, 5


def kl(z, z_adv):
    p = z.softmax(1)
    return (p * (p.log() - z_adv.softmax(1).log())).sum(1)


def objective(z, y, p_natural, defense, alpha):
    """What the attack maximises, (B,)."""
    if alpha is None and defense == "trades":
        return (p_natural * (p_natural.log() - z.softmax(1).log())).sum(1)
    wanted = torch.full_like(z, (alpha or 0.0) / 9)
    wanted[torch.arange(len(y)), y] = 1 - (alpha or 0.0)
    return -(wanted * z.log_softmax(1)).sum(1)


def outer_loss(z, z_adv, y, defense):
    """What the training step minimises, by the equations of the TRADES and MART papers."""
    if defense == "standard":
        return F.cross_entropy(z, y)
    if defense == "madry":
        return F.cross_entropy(z_adv, y)
    if defense == "trades":
        return F.cross_entropy(z, y) + 6 * kl(z, z_adv).mean()
    p_adv, is_true = z_adv.softmax(1), F.one_hot(y, 10).bool()
    boosted = -p_adv[is_true].log() - (1.0001 - p_adv[~is_true].view(-1, 9).amax(1) + 1e-12).log()
    return (boosted + 5 * kl(z, z_adv) * (1 - z.softmax(1)[is_true])).mean()


def ascend(model, x, start, epsilon, step_size, steps, of_logits):
    """PGD, Eq. 7, on a model in eval mode."""
    model.eval()
    lower, upper = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    x_adv = torch.minimum(torch.maximum(x + start, lower), upper)
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        gradient, = torch.autograd.grad(of_logits(model(x_adv)).sum(), x_adv)
        x_adv = torch.minimum(torch.maximum(x_adv + step_size * gradient.sign(), lower), upper)
    return x_adv.detach()


def rate(flags, epoch, progress):
    """The learning rate in the epoch, counted from 0, when that share of the whole run is done."""
    if "cosine" in flags:
        return RATE * (1 + math.cos(epoch * math.pi / EPOCHS)) / 2
    if "onecycle" in flags:
        rising = np.interp(progress, [0, 0.3], [0.04, 1])
        return RATE * (rising if progress < 0.3 else (1 + math.cos((progress - 0.3) / 0.7 * math.pi)) / 2)
    return RATE * ([0.1, 0.01] if "--lr-milestones" in flags else [1, 0.1])[epoch]


def augmented(images, rng, mirror):
    """Each image shifted by up to four pixels, zeros following, and mirrored or not."""
    down, right = (torch.randint(9, (len(images),), generator=rng) for _ in range(2))
    mirrored = torch.rand(len(images), generator=rng) < 0.5
    padded, found = torch.zeros(len(images), 3, 40, 40, dtype=torch.float64), []
    padded[:, :, 4:36, 4:36] = images.double() / 255
    for image, i, j, m in zip(padded, down, right, mirrored, strict=True):
        crop = image[:, i:i + 32, j:j + 32]
        found.append(crop.flip(2) if m and mirror else crop)
    return torch.stack(found)


def validate(model, images, y, epsilon):
    x, starts = images.double() / 255, []
    for i in range(len(x)):
        noise = torch.empty(3, 32, 32, dtype=torch.float64)
        starts.append(noise.uniform_(-epsilon, epsilon, generator=torch.Generator().manual_seed(i)))
    x_adv = ascend(model, x, torch.stack(starts), epsilon, epsilon / 10, 20,
                   lambda z: F.cross_entropy(z, y, reduction="none"))
    model.eval()
    row = {}
    for name, batch in (("natural", x), ("robust", x_adv)):
        z = model(batch).detach()
        row[f"val_{name}_accuracy"] = (z.argmax(1) == y).double().mean().item()
        row[f"val_{name}_loss"] = F.cross_entropy(z, y).item()
    return row


def loop(flags, train_set, val_set, epsilon, start_kind, alpha, aux):
    """The whole training -> (the model, the rows of its log)."""
    torch.manual_seed(SEED)
    model, defense, rows, step = tiny_model("").double(), flags[1], [], 0
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    steps_an_epoch, labelled = math.ceil(N / BATCH), BATCH - aux
    for epoch in range(EPOCHS):
        order = torch.randperm(N, generator=data.generator("cpu", 2, SEED, epoch)).tolist() * 2
        sums = dict.fromkeys(("train_loss", "train_natural_accuracy", "train_robust_accuracy"), 0.0)
        for i in range(steps_an_epoch):
            rng = data.step_generator("cpu", SEED, step)
            chosen = torch.tensor(order[i * labelled:(i + 1) * labelled])
            images, y = train_set.images[chosen], train_set.labels[chosen]
            if aux:
                drawn = torch.randint(len(train_set.aux.labels), (aux,), generator=rng)
                mix = torch.randperm(BATCH, generator=rng)
                images = torch.cat([images, train_set.aux.images[drawn]])[mix]
                y = torch.cat([y, train_set.aux.labels[drawn]])[mix]
            x = augmented(images, rng, train_set.mirror)
            start, x_adv, z, z_adv = torch.empty_like(x), None, None, None
            if start_kind == "gaussian":
                start.normal_(0, 0.001, generator=rng)
            else:
                start.uniform_(-epsilon, epsilon, generator=rng)
            model.eval()
            p_natural = model(x).softmax(1).detach()
            if defense != "standard":
                x_adv = ascend(model, x, start, epsilon, epsilon / 4, STEPS,
                               lambda z: objective(z, y, p_natural, defense, alpha))  # noqa: B023
                if i == 0:
                    before, after = (model(batch).softmax(1)[torch.arange(BATCH), y] for batch in (x, x_adv))
                    sums["share_p_y_above_1_minus_alpha"] = (before > 1 - (alpha or 0)).double().mean().item()
                    sums["share_made_easier"] = (after > before).double().mean().item()
            model.train()
            if defense != "madry":
                z = model(x)
                sums["train_natural_accuracy"] += (z.argmax(1) == y).double().mean().item() / steps_an_epoch
            if defense != "standard":
                z_adv = model(x_adv)
                sums["train_robust_accuracy"] += (z_adv.argmax(1) == y).double().mean().item() / steps_an_epoch
            loss = outer_loss(z, z_adv, y, defense)
            sums["train_loss"] += loss.item() / steps_an_epoch
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            lr = rate(flags, epoch, step / (EPOCHS * steps_an_epoch))
            with torch.no_grad():
                for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                    g = g + DECAY * p
                    v.mul_(0.9).add_(g)
                    p -= lr * (g + 0.9 * v if "--nesterov" in flags else v)
            step += 1
        rows.append({"epoch": epoch + 1, "lr": lr} | sums | validate(model, val_set.images, val_set.labels, epsilon))
    return model, rows


CASES = [
    "standard", "standard --nesterov --lr-schedule onecycle", "madry", "madry --spat-alpha 0.2 --lr-schedule cosine",
    "madry --lr-milestones 1 2 --random-start uniform", "madry --nesterov --lr-schedule onecycle", "trades",
    "trades --spat-alpha 0.1 --nesterov", "trades --spat-alpha 0 --lr-schedule onecycle", "mart",
    "mart --spat-alpha 0.3 --lr-schedule onecycle", "mart --spat-alpha 1", "trades mirrored",
    "trades --aux-data aux.npz --aux-fraction 0.25"]


@pytest.mark.parametrize("case", CASES)
def test_train_equals_the_independent_loop(case, tmp_path, monkeypatch):
    flags = ["--defense", *case.removesuffix(" mirrored").split()]
    source, dataset = data.load("digits"), "digits"
    if "mirrored" in case:
        dataset = str(tmp_path / "pictures")
        for i in range(2 * (N + HELD_OUT)):  # half of them for test/, which nobody reads
            folder = tmp_path / "pictures" / ("train" if i % 2 else "test") / str(source.labels[i].item())
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        source = data.load(dataset)
    train_set, val_set = data.split(source, HELD_OUT, N)
    assert train_set.mirror == ("mirrored" in case)
    if "--aux-data" in case:
        images, labels = source.images[100:160], source.labels[100:160]
        np.savez(tmp_path / "aux.npz", data=images.numpy(), extrapolated_targets=labels.numpy())
        train_set = train_set._replace(aux=data.Dataset(images, labels, source.classes))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "build_model", lambda *_: tiny_model("").double())
    monkeypatch.setattr(data, "to_float", lambda images: images.to(
        torch.float64, memory_format=torch.channels_last).div_(255))
    schedule = [] if "--lr-schedule" in flags else ["--lr-schedule", "step"]
    train_cifar.main([
        *flags, *schedule, "--dataset", dataset, "--limit-train", str(N), "--val-size", str(HELD_OUT), "--batch-size",
        str(BATCH), "--epochs", str(EPOCHS), "--num-steps", str(STEPS), "--lr", str(RATE), "--weight-decay", str(DECAY),
        "--epsilon", "0.05", "--seed", str(SEED), "--precision", "fp32", "--compile", "off", "--out-dir", "run"])

    alpha = float(flags[flags.index("--spat-alpha") + 1]) if "--spat-alpha" in flags else None
    start_kind = "uniform" if "uniform" in flags else "gaussian"
    model, rows = loop(flags, train_set, val_set, 0.05, start_kind, alpha, 4 if "--aux-data" in flags else 0)
    last, best = (checkpoints.load(tmp_path / "run" / name) for name in ("last.pt", "best.pt"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(last["state_dict"][name], value, rtol=0, atol=1e-6, msg=name)
    logged = list(csv.DictReader(open("run/log.csv")))
    for printed, found, row in zip(logged, last["rows"], rows, strict=True):
        for name in found.keys() - {"seconds", "images_per_s"}:
            if found[name] is not None:
                assert found[name] == pytest.approx(row[name], rel=1e-6, abs=1e-9), name
                assert float(printed[name]) == pytest.approx(row[name], rel=5e-6, abs=1e-9), name  # of six digits
    adversarial, has_alpha = flags[1] != "standard", flags[1] != "trades" or alpha is not None
    empty = {"train_natural_accuracy": flags[1] == "madry", "train_robust_accuracy": not adversarial,
             "share_made_easier": not adversarial, "share_p_y_above_1_minus_alpha": not adversarial or not has_alpha}
    assert {name for name, value in logged[-1].items() if not value} == {name for name in empty if empty[name]}
    scores = [row["val_robust_accuracy" if adversarial else "val_natural_accuracy"] for row in rows]
    assert best["epoch"] == max(k for k in range(EPOCHS) if scores[k] == max(scores)) + 1
    assert last["epoch"] == EPOCHS and last["step"] == EPOCHS * math.ceil(N / BATCH)
