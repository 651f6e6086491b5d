"""What the notebooks share: the models, pictures and results they show, and how they draw them."""

import importlib.resources
import inspect
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

import compare  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito, told apart by the colour-blind too
MADRY = ROOT / "pretrained/cifar10-resnet-18-madry-s1.pt"
SECOND = ROOT / "pretrained/cifar10-resnet-18-mart-spat0.3-s1.pt"  # MART + SPAT 0.3: sees what was made for Madry's


def standard():
    """The path of a standard ResNet-18 that nobody here trained: it is among the examples of AutoAttack's authors (MIT
    licence, github.com/fra31/auto-attack), and pyautoattack installs it."""
    return importlib.resources.files("pyautoattack") / "examples/model_test.pt"


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


def says(p, y, names, who=""):
    """For each image what a model says of it, and whether that is right: ("second: ship 76 %", True)."""
    of_each = zip(p, p.argmax(1), y, strict=True)
    return [(f"{who}{names[k]} {100 * row[k]:.0f} %", k == true) for row, k, true in of_each]


def seen(found, **judges):
    """The probabilities {attack: {who: (n, K)}} that the models, who=model, give to the images {attack: images}."""
    return {name: {who: predictions(model, images) for who, model in judges.items()} for name, images in found.items()}


def count_right(p, y):
    """Print on how many images each model is right after each attack. p: of `seen`."""
    for name, by in p.items():
        right = [f"the {who} model is right on {(of.argmax(1) == y).sum()} of {len(y)}" for who, of in by.items()]
        print(f"~ {name}: {', '.join(right)}")


def compared(found, p, y, names, drawn):
    """Draw some of the images after each attack, with what the models of `seen` say of each."""
    columns = [(name, images[drawn], [says(of[drawn], y[drawn], names, f"{who}: ") for who, of in p[name].items()])
               for name, images in found.items()]
    return grid([names[k] for k in y[drawn]], columns, "Attacked: Madry's ResNet-18. Second: MART + SPAT 0.3, "
                "ResNet-18. One seed each. Orange: not the true class.")


def source(function):
    """Print a function as it stands in the repository."""
    print(inspect.getsource(function))


def grid(rows, columns, note, size=2.3, vertical=False):
    """Large pictures. rows: the label of each image; columns: (heading, images (n, 3, H, W), lines below them, each as
    `says` returns it); vertical: the images side by side. A wrong line is orange."""
    lines = max(len(below) for _, _, below in columns)
    shape = (len(columns), len(rows)) if vertical else (len(rows), len(columns))
    height = 0.97 * size + 0.2 * lines
    figure, axes = plt.subplots(*shape, figsize=(size * shape[1], height * shape[0] + 0.7), dpi=100, squeeze=False,
                                layout="constrained")
    for (heading, images, below), of_column in zip(columns, axes if vertical else axes.T, strict=True):
        for i, (ax, image) in enumerate(zip(of_column, images, strict=True)):
            ax.imshow(image.permute(1, 2, 0).numpy().clip(0, 1), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel("\n".join(" " * len(below)), fontsize=12)  # room for the lines
            for k, (text, right) in enumerate(line[i] for line in below):
                ax.annotate(text, (0.5, 0), (0, -4 - 14 * k), "axes fraction", "offset points", ha="center", va="top",
                            fontsize=10, color="black" if right else VERMILLION)
        (of_column[0].set_ylabel if vertical else of_column[0].set_title)(heading, fontsize=11)
    for ax, label in zip(axes[0] if vertical else axes[:, 0], rows, strict=True):
        (ax.set_title if vertical else ax.set_ylabel)(label, fontsize=11)
    figure.supxlabel(note, fontsize=10)
    return figure


def gradient_picture(gradient):
    """An input gradient as a picture: grey is 0, clipped at three of its standard deviations."""
    return (0.5 + gradient / (6 * gradient.flatten(1).std(1)[:, None, None, None])).clamp(0, 1)


def loss_curves(p_y, curves):
    """LSCE and its gradient by the true logit over p_y, from {alpha: (loss, gradient)}; a dot where p_y = 1 - α."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), dpi=80, layout="constrained")
    styles = zip((BLUE, VERMILLION, GREEN), ("-", "--", "-."), "so^", strict=True)
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


def finish(figure, name, folder):
    """Show the figure, and save it as folder/NAME.png unless folder is None."""
    figure.canvas.draw()
    figure.set_layout_engine("none")  # laid out once, so that both are the same
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


def acts_on(path):
    """The share of training images with p_y > 1 - α in the last epoch of a log.csv of results/, in %."""
    log = np.genfromtxt(ROOT / "results" / path, delimiter=",", names=True)
    return 100 * log["share_p_y_above_1_minus_alpha"][-1]


def points(difference):
    """A difference in points, with its 95 % interval: "+0.36 (-0.16 to +0.88)"."""
    return compare.in_words(difference).split(" | ")[0]


def band(ax, x, rows, label, **style):
    """Accuracies (%) of entries of results over x, with their 95 % intervals as a band."""
    low, high = 100 * np.array([row["interval"] for row in rows]).T
    line, = ax.plot(x, [100 * row["accuracy"] for row in rows], label=label, **style)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.25, linewidth=0)
