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

import compare  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"  # of Okabe and Ito, told apart by the colour-blind too
BY_FAR = 0.05  # of two trainings: twice what a second seed moved a difference at most, five times in PGD-20
NAMES = {"standard": "standard", "madry": "Madry", "madry-spat0.2": "Madry + SPAT 0.2", "trades": "TRADES",
         "trades-spat0": "TRADES, CE inside", "trades-spat0.1": "TRADES + SPAT 0.1", "mart": "MART",
         "mart-spat0.3": "MART + SPAT 0.3"}
PAIRS = {("madry", "madry-spat0.2"): "SPAT in Madry", ("trades", "trades-spat0.1"): "SPAT in TRADES",
         ("trades", "trades-spat0"): "of which CE for KL", ("trades-spat0", "trades-spat0.1"): "of which smoothing",
         ("mart", "mart-spat0.3"): "SPAT in MART"}
SMOOTHED = {"madry-spat0.2": ("o-", BLUE), "trades-spat0.1": ("s--", VERMILLION), "mart-spat0.3": ("^:", GREEN)}


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
    figure = plt.figure(figsize=(9.4, 4), dpi=110)
    cells = figure.add_gridspec(2, len(shown) + 4, width_ratios=[1, 0.05] + [1] * len(shown) + [0.15, 2.3],
                                left=0, right=1, bottom=0.1, top=0.95, wspace=0.07, hspace=0.42)
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
                ax.annotate("", (0, 0.5), (1, 0.7 - 0.4 * row), "axes fraction", clean.transAxes, arrow)
                ax.text(0, 1.06, heading, transform=ax.transAxes, color=color, weight="bold")
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
    figure.text(0.5, -0.05, note, ha="center", va="top", fontsize=9)
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


def shares(path):
    """Of each epoch in a log.csv of results/, the share of training images with p_y > 1 - α."""
    return np.genfromtxt(ROOT / "results" / path, delimiter=",", names=True)["share_p_y_above_1_minus_alpha"]


class NotThere(Exception):
    """Shown in a notebook as its one line."""

    def _render_traceback_(self):
        return [str(self)]


def evaluate(path, data_dir, num_images, *flags, made_by=""):
    """The result of eval_attacks.py for a model file, both paths from the repository's root."""
    import eval_attacks

    if not (ROOT / path).exists():
        raise NotThere(f"{path} is not there" + f"; it is made by: {made_by}" * bool(made_by))
    return eval_attacks.main(["--model-path", str(ROOT / path), "--data-dir", str(ROOT / data_dir),
                              "--num-images", str(num_images), *flags])


def points(difference):
    """A difference in points, with its 95 % interval: "+0.36 (-0.16 to +0.88)"."""
    return compare.in_words(difference).split(" | ")[0]


def verdict(difference, fixed_model=False):
    """What a paired difference says of a statement that it is above 0. Its interval is about the test images; two
    trainings, one run each, differ by their seed too."""
    low, high = difference["interval"]
    if low <= 0 <= high:
        return "not told from 0"
    above = difference["difference"] > 0
    if fixed_model or abs(difference["difference"]) > BY_FAR:
        return "replicated" if above else "refuted"
    return "same sign, one run" if above else "other sign, one run"


def band(ax, x, rows, label, **style):
    """Accuracies (%) of entries of results over x, with their 95 % intervals as a band."""
    low, high = 100 * np.array([row["interval"] for row in rows]).T
    line, = ax.plot(x, [100 * row["accuracy"] for row in rows], label=label, **style)
    ax.fill_between(x, low, high, color=line.get_color(), alpha=0.25, linewidth=0)


def seeds_of(summary):
    """"one seed", "20 seeds", or "19 to 20 seeds": what the comparisons of a summary (compare.summarise) are over."""
    found = [len(c["seeds"]) for c in summary["comparisons"]]
    ends = " to ".join(map(str, sorted({min(found), max(found)})))
    return "one seed" if ends == "1" else f"{ends} seeds"


def spat_comparisons(summary):
    """(those of PAIRS that a summary has, its attacks, {(pair, attack): comparison})."""
    found = {((c["a"], c["b"]), c["attack"]): c for c in summary["comparisons"]}
    return [pair for pair in PAIRS if any(pair == of for of, _ in found)], list(
        dict.fromkeys(attack for _, attack in found)), found


def spat_table(summary):
    """The differences of PAIRS in points, a line an attack; * where Holm's p is below 0.05."""
    pairs, attacks, found = spat_comparisons(summary)
    over = "the images of one seed" if seeds_of(summary) == "one seed" else "the seeds"
    lines = [f"points; *: p < 0.05 over {over}, after Holm's correction over {len(summary['comparisons'])} comparisons",
             f"{'':<22}" + "".join(f"{PAIRS[pair]:<26}" for pair in pairs)]
    for attack in attacks:
        of = [found[pair, attack] for pair in pairs]
        estimated = all(c["all_images"] for c in of)
        name = attack.split("-")[0] + f", first {of[0]['images']:,}" if estimated else attack
        lines.append(f"{name:<22}" + "".join(f"{points(c) + '*' * (c['p_holm'] < 0.05):<26}" for c in of))
        if estimated:
            lines.append(f"{'  estimated for all':<22}" + "".join(f"{points(c['all_images']):<26}" for c in of))
    return "\n".join(line.rstrip() for line in lines)


def spat_panel(ax, comparisons, accuracies, paper):
    """A row for each comparison: the difference with its interval, and each seed's. accuracies: {row: {seed: value}}"""
    for y, c in enumerate(comparisons):
        if several := len(c["seeds"]) > 1:
            of_seeds = [100 * (accuracies[c["b"]][seed] - accuracies[c["a"]][seed]) for seed in c["seeds"]]
            ax.plot(of_seeds, [y + 0.25] * len(of_seeds), ".", color=BLUE, alpha=0.5, markersize=4, label="each seed")
        if estimate := c["all_images"]:
            ax.plot(100 * c["mean"], y + 0.3, ".", color="grey", markersize=6, label="on the first images alone")
        label = "mean of the seeds" if several else "measured"
        result, fill, label = (estimate, "white", "estimated for all images") if estimate else (c, "black", label)
        ends = [100 * end for end in result["interval"] or ()]
        ax.plot(ends, [y] * len(ends), color="black")
        ax.plot(100 * result["mean" if "mean" in result else "difference"], y, "s" if estimate else "o", color="black",
                markerfacecolor=fill, markersize=5, label=label)
        if paper and c["paper"] is not None:
            ax.plot(c["paper"], y - 0.3, "x", color=VERMILLION, markersize=5, label="paper (WRN-34-10)")
    ax.axvline(0, color="black", linewidth=0.8, linestyle=":")
    ax.set(ylim=(len(comparisons) - 0.5, -0.5), yticks=range(len(comparisons)))
    ax.tick_params(labelleft=False)
    ax.grid(axis="x", alpha=0.3)


def share_panel(ax, logs):
    """The share of training images with p_y > 1 - α over the epochs. logs: {row: log.csv of each seed}"""
    for row, (style, color) in SMOOTHED.items():
        if row in logs:
            course = 100 * np.array([shares(path) for path in logs[row]])
            epochs = range(1, course.shape[1] + 1)
            ax.plot(epochs, course.mean(0), style, color=color, markersize=4, label=NAMES[row])
            ax.fill_between(epochs, course.min(0), course.max(0), color=color, alpha=0.2, linewidth=0)
    ax.set_ylim(0, max(5, ax.get_ylim()[1]))  # so that less than 1 % looks like little
    ax.set_xlabel("epoch", fontsize=9)
    band = ", band: all seeds" if max(map(len, logs.values())) > 1 else " in training"
    ax.set_title(f"p_y > 1 - α, %{band}", fontsize=9)
    ax.grid(alpha=0.3)


def spat_figure(summary, logs, title, paper=False):
    """What SPAT changes: a panel an attack with the differences of PAIRS in a summary (compare.summarise), estimated
    for all images where the attack saw fewer; and the share of training images on which smoothing acts, from the
    log.csv in the folder results/LOGS."""
    pairs, attacks, found = spat_comparisons(summary)
    attacks = [attack for attack in attacks if attack != "CW-inf κ 0"]  # the table has it
    accuracies = {attack: {row["row"]: {int(seed): value for seed, value in row["accuracies"].items()}
                           for row in summary["rows"] if row["attack"] == attack} for attack in attacks}
    figure, axes = plt.subplots(2, (len(attacks) + 2) // 2, figsize=(8.5, 5), dpi=100, layout="constrained")
    *panels, last = axes.flat
    for ax, attack in zip(panels, attacks, strict=False):
        if ax is not panels[0]:
            ax.sharex(panels[0])
        c = found[pairs[0], attack]
        spat_panel(ax, [found[pair, attack] for pair in pairs], accuracies[attack], paper)
        ax.set_title(f"{attack.split('-')[0]} (from {c['images']:,})" if c["all_images"] else attack, fontsize=9)
    for ax in panels[len(attacks):]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_yticks(range(len(pairs)), [PAIRS[pair] for pair in pairs])
        ax.tick_params(labelleft=True)
    for ax in panels[:len(attacks)][-axes.shape[1]:]:  # the lowest of each column
        ax.set_xlabel("points of accuracy", fontsize=9)
    share_panel(last, {row: [f"{logs}/{row}" + f"-s{seed}" * (seed != 1) + ".log.csv" for seed in of_seeds]
                       for row, of_seeds in accuracies[attacks[0]].items()})
    seeds, images = seeds_of(summary), found[pairs[0], attacks[0]]["images"]
    bars = "intervals over the images" if seeds == "one seed" else "t-intervals over the seeds"
    figure.suptitle(f"{title}: {seeds}, {images:,} test images; bars: 95 % {bars}", fontsize=10)
    legend = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
