"""What the notebooks share: the pictures and results they show, and how they draw them."""

import json
import os
import pathlib
import sys

import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox imports GitPython, which wants the git binary

import data  # noqa: E402
import models  # noqa: E402


def pictures(indices, live=False, data_dir="data"):
    """(x (n, 3, 32, 32) in [0, 1], y, names of the classes): CIFAR-10's test images at these positions; not live, of
    the first twenty, which foolbox brings along."""
    if live:
        test = data.load("cifar10", ROOT / data_dir, train=False)
        return data.to_float(test.images[indices]), test.labels[indices], test.classes
    import foolbox

    model = foolbox.PyTorchModel(torch.nn.Identity().eval(), bounds=(0, 1), device="cpu")
    x, y = foolbox.utils.samples(model, "cifar10", batchsize=20)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return x[indices], y[indices], names


def predictions(model, x):
    """The probabilities (n, K), computed in float32 on the frozen model."""
    with models.frozen(model), torch.no_grad():
        return model(x.contiguous(memory_format=torch.channels_last)).softmax(1)


def titles(p, y, names):
    """"cat 87 %" for each image, with a mark where that is wrong."""
    return [f"{names[k]} {100 * row[k]:.0f} %" + ("" if k == true else " (wrong)")
            for row, k, true in zip(p, p.argmax(1), y, strict=True)]


def grid(columns, row_labels=None):
    """A figure with a column for each (heading, images (n, 3, H, W), titles or None), the same image in a row."""
    n = len(columns[0][1])
    figure, axes = plt.subplots(n, len(columns), figsize=(1.75 * len(columns), 1.85 * n), squeeze=False, dpi=80,
                                layout="constrained")
    for j, (heading, images, labels) in enumerate(columns):
        for i, (ax, image) in enumerate(zip(axes[:, j], images, strict=True)):
            ax.imshow(image.permute(1, 2, 0).numpy().clip(0, 1), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            text = labels[i] if labels else ""
            ax.set_title(f"{heading}\n{text}" if i == 0 else text, fontsize=8)
            if j == 0 and row_labels:
                ax.set_ylabel(row_labels[i], fontsize=8)
    return figure


def amplified(delta, factor):
    """A perturbation as a picture: grey is 0, `factor` times its size."""
    return (0.5 + factor * delta).clamp(0, 1)


def gradient_picture(gradient):
    """An input gradient as a picture: grey is 0, clipped at three of its standard deviations."""
    return amplified(gradient / (3 * gradient.flatten(1).std(1)[:, None, None, None]), 0.5)


def finish(figure, name, folder):
    """Show the figure, and save it as folder/NAME.png unless folder is None."""
    if folder is not None:
        (ROOT / "notebooks" / folder).mkdir(exist_ok=True)
        figure.savefig(ROOT / "notebooks" / folder / f"{name}.png", bbox_inches="tight")  # as it is shown
    plt.show(figure)


def result(path):
    """A JSON of results/."""
    return json.loads((ROOT / "results" / path).read_text())


def rows(found):
    """{attack's name: its entry} of a result."""
    return {row["name"]: row for row in found["attacks"]}


def evaluate(path, data_dir, num_images, *flags):
    """The result of eval_attacks.py for a model file, both paths from the repository's root."""
    import eval_attacks

    return eval_attacks.main(["--model-path", str(ROOT / path), "--data-dir", str(ROOT / data_dir),
                              "--num-images", str(num_images), *flags])


def points(difference):
    """compare.py's difference in points, with its 95 % interval: "+0.36 (-0.16 to +0.88)"."""
    low, high = difference["interval"]
    return f"{100 * difference['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def verdict(differences):
    """"confirmed" if all these differences lie above 0 with their intervals, "contradicted" if one lies below, or
    "undecided"."""
    if all(d["interval"][0] > 0 for d in differences):
        return "confirmed"
    return "contradicted" if any(d["interval"][1] < 0 for d in differences) else "undecided"


def band(ax, x, rows, label, **style):
    """Accuracies (%) of entries of results over x, with their 95 % intervals as a band."""
    low, high = 100 * np.array([row["interval"] for row in rows]).T
    line, = ax.plot(x, [100 * row["accuracy"] for row in rows], label=label, **style)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.25, linewidth=0)
