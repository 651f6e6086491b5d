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
            ax.set_title(f"{heading}\n{text}" if i == 0 else text, fontsize=9)
            if j == 0 and row_labels:
                ax.set_ylabel(row_labels[i], fontsize=9)
    return figure


def amplified(delta, factor):
    """A perturbation as a picture: grey is 0, `factor` times its size."""
    return (0.5 + factor * delta).clamp(0, 1)


def gradient_picture(gradient):
    """An input gradient as a picture: grey is 0, clipped at three of its standard deviations."""
    return amplified(gradient / (3 * gradient.flatten(1).std(1)[:, None, None, None]), 0.5)


def loss_curves(p_y, curves):
    """LSCE and its gradient by the true logit over p_y, from {alpha: (loss, gradient)}; a dot where p_y = 1 - α."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), dpi=80, layout="constrained")
    styles = zip(("#0072B2", "#D55E00", "#009E73"), ("-", "--", "-."), "so^", strict=True)
    for (alpha, values), (color, line, marker) in zip(curves.items(), styles, strict=True):
        for ax, value in zip(axes, values, strict=True):
            ax.plot(p_y, value, color=color, linestyle=line, linewidth=2)
            ax.plot(1 - alpha, np.interp(1 - alpha, p_y, value), color=color, marker=marker, linestyle=line,
                    label=f"α {alpha}", clip_on=False)
    axes[0].set(title="the loss", ylabel="LSCE")
    axes[1].set(title="its gradient with respect to the true logit", ylabel="p_y - (1 - α)", ylim=(-1.1, 0.9))
    axes[1].axhspan(0, 0.9, color="0.92")
    axes[1].text(0.02, 0.82, "the attack pushes the true logit up", va="top")
    axes[1].text(0.98, -1.02, "the attack pushes the true logit down", ha="right")
    for ax in axes:
        ax.set(xlabel="p_y, the probability of the true class", xlim=(0, 1))
        ax.grid(alpha=0.3)
    axes[0].legend(loc="upper center", title="mark: p_y = 1 - α")
    return figure


def method(rows, shown, level, name, note):
    """One image under two attacks: the image, from there a row of pictures for each attack, and p_y over the steps.
    rows: {heading, of which the first word names the attack: (iterates (T + 1, 3, H, W), p_y (T + 1,))}; shown: the
    steps with a picture; level: 1 - α; name: of the true class."""
    figure = plt.figure(figsize=(9, 4.4), dpi=110, layout="constrained")
    cells = figure.add_gridspec(2, len(shown) + 3, width_ratios=[1, 0.1] + [1] * len(shown) + [2.3])
    clean, curve = figure.add_subplot(cells[:, 0]), figure.add_subplot(cells[:, -1])

    def picture(ax, image, p_y, when, color):
        ax.imshow(image.permute(1, 2, 0).numpy().clip(0, 1), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_xlabel(f"{name} {100 * p_y:.0f} %\n{when}", color=color)
        ax.spines[:].set(color=color, linewidth=1.5)

    styles = ("#D55E00", "s", "--"), ("#0072B2", "o", "-")
    for row, (heading, (color, marker, line)) in enumerate(zip(rows, styles, strict=True)):
        iterates, p_y = rows[heading]
        for column, step in enumerate(shown):
            ax = figure.add_subplot(cells[row, column + 2])
            picture(ax, iterates[step], p_y[step], f"step {step}", color)
            if column == 0:
                arrow = dict(arrowstyle="-|>", color=color, linewidth=2)
                for text in (ax.text(0, 1.06, heading, transform=ax.transAxes, color=color, weight="bold"),
                             ax.annotate("", (0, 0.5), (1, 0.7 - 0.4 * row), "axes fraction", clean.transAxes, arrow)):
                    text.set_in_layout(False)
        curve.plot(p_y, color=color, marker=marker, markevery=list(shown), linewidth=2, linestyle=line)
        curve.annotate(heading.split()[0], (len(p_y) - 1, p_y[-1]), (0, 8), textcoords="offset points", color=color,
                       weight="bold", ha="right")
    picture(clean, iterates[0], p_y[0], "the image", "black")
    curve.axhline(level, color="black", linewidth=1, linestyle=":")
    above = f"above 1 - α = {level:.1f} SPAT's\nattack pushes the true logit up"
    curve.text(len(p_y) - 1, level + 0.01, above, ha="right")
    curve.set_title("p_y, probability of the true class", fontsize=10)
    curve.margins(y=0.12)
    curve.set(xlabel="step", ylim=(0, None), xlim=(0, len(p_y) - 0.5), xticks=range(0, len(p_y), 5))
    curve.grid(alpha=0.3)
    figure.supxlabel(note, fontsize=9)
    figure.get_layout_engine().set(hspace=0.16)
    return figure


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
