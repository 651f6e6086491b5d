"""What an evaluation counts, and how it is kept: the logits of attacked images, the JSON, the table."""

import functools
import json
import pathlib
import platform
import shlex
import sys
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

import attacks
import checkpoints
import cli
import data
import losses

# Table 3 of the paper, WRN-34-10 at ε 8/255: (data set, defense, α) -> Natural, FGSM, PGD-20, CW-inf
TABLE_3 = {
    ("cifar10", "madry", None): (84.39, 59.93, 56.37, 54.14),
    ("cifar10", "trades", None): (85.97, 62.29, 57.32, 54.38),
    ("cifar10", "mart", None): (83.70, 61.93, 58.46, 53.28),
    ("cifar10", "trades", 0.1): (84.60, 61.46, 58.22, 54.97),
    ("cifar10", "mart", 0.3): (81.93, 61.87, 59.59, 51.57),
    ("cifar100", "madry", None): (61.77, 34.42, 31.51, 30.10),
    ("cifar100", "trades", None): (57.13, 32.90, 31.02, 28.07),
    ("cifar100", "mart", None): (58.56, 36.46, 34.12, 30.16),
    ("cifar100", "trades", 0.1): (55.54, 33.35, 31.20, 28.14),
    ("cifar100", "mart", 0.2): (60.28, 36.91, 34.66, 30.93),
}

# All that the paper gives in numbers: (target of reproduce.py, row) -> {attack: accuracy in %}
PAPER = {("table3" + "-cifar100" * (dataset == "cifar100"), defense + (f"-spat{alpha}" if alpha else "")):
         dict(zip(("Natural", "FGSM", "PGD-20", "CW-inf"), values, strict=True))
         for (dataset, defense, alpha), values in TABLE_3.items()} | {
    ("table4", "rst"): {"Natural": 89.65, "PGD-20": 63.00},
    ("table4", "mart"): {"Natural": 89.81, "PGD-20": 63.06},
    ("table4", "rst-spat0.1"): {"Natural": 89.52, "PGD-20": 63.47},
    ("table4", "mart-spat0.1"): {"Natural": 89.44, "PGD-20": 63.37},
    ("figure4", "standard"): {"PGD-20-KL": 47.51, "PGD-20-LS 1e-05": 25.3, "PGD-20-LS 5e-05": 44.16,
                              "PGD-20-LS 0.0001": 51.28, "PGD-20-LS 0.001": 69.23, "PGD-20-LS 0.01": 80.04},  # Table 1
    ("figure4", "madry"): {"PGD-20-KL": 71.58, "PGD-20-LS 0.1": 57.7, "PGD-20-LS 0.2": 62.93, "PGD-20-LS 0.3": 67.7,
                           "PGD-20-LS 0.4": 72.14, "PGD-20-LS 0.5": 75.57},  # Table 2
    ("figure5", "eps8-alpha1"): {"Natural": 32.44, "PGD-20": 0.0},
}


class Attack(NamedTuple):
    """A row of the table: its name, and its parameters as they go into the JSON; {} for the natural images."""

    name: str
    params: dict

    @property
    def passes(self):
        """At most how many forward passes it takes an image."""
        if "components" in self.params:
            return 1 + sum(attacks.COMPONENTS[name] for name in self.params["components"])
        return (1 + self.params.get("num_steps", 0)) * self.params.get("restarts", 1)


def make_attack(forward, params):
    """The function (x, y, indices, restart=0) -> x_adv for parameters as in the JSON."""
    epsilon = float(Fraction(params["epsilon"]))
    objective = {
        "ce": losses.cross_entropy,
        "kl": losses.kl_divergence,
        "lsce": functools.partial(losses.lsce, alpha=params.get("alpha", 0.0)),
        "cw": functools.partial(losses.cw_margin, kappa=params.get("kappa", 50.0)),
    }[params["objective"]]

    def attack(x, y, indices, restart=0):
        start = attacks.start_per_image(params["random_start"], x, epsilon, indices, params.get("seed", 0), restart)
        target = attacks.probabilities(forward, x) if params["objective"] == "kl" else y

        def iterate(model):
            return attacks.pgd(model, x, target, objective, epsilon=epsilon, random_start=start,
                               step_size=float(Fraction(params["step_size"])), num_steps=params["num_steps"])

        if params.get("any_step"):
            return attacks.worst_iterate(iterate, forward, functools.partial(losses.margin, y=y))
        return iterate(forward)

    return attack


def attacked_logits(model, images, labels, attack=None, batch_size=256, progress=lambda n: None, only=None,
                    examples=None):
    """The model's float32 logits (N, K) for attacked images: what every accuracy is counted from.

    images: (N, C, H, W) uint8, labels: (N,), both on one device. attack(x, y, indices) -> x_adv, indices being the
    images' positions, on the CPU; None for the natural images. model scores the final images: give it in float32 and
    frozen, whatever crafts inside `attack`. only: the positions to attack (default: all), at least one; the rows of
    the others are zero. Several processes share the work, and each returns the whole. All batches have one size (the
    last is filled up with images that are not counted), so that compiled code is not compiled twice.
    progress(n) is called after every n images; examples, zeros like the images in float32, receives the attacked ones.
    """
    n, logits, (rank, world) = len(images), None, cli.rank_and_world()
    batch_size = min(batch_size, -(-n // world))
    only = torch.arange(n, device=images.device) if only is None else only
    mine = only[rank::world]
    counted, total = len(mine), max(1, -(-len(mine) // batch_size)) * batch_size
    filled = torch.cat([mine, only.repeat(-(-total // len(only)))])[:total]
    positions = filled.cpu()  # all at once: to fetch them batch by batch would wait for the GPU each time
    for done in range(0, total, batch_size):
        indices = filled[done : done + batch_size]
        x = data.to_float(images[indices])
        if attack is not None:
            x = attack(x, labels[indices], positions[done : done + batch_size])
        with torch.no_grad():
            out = model(x).float()
        logits = out.new_zeros(n, out.shape[1]) if logits is None else logits
        count = max(0, min(batch_size, counted - done))
        logits[indices[:count]] = out[:count]
        if examples is not None:
            examples[indices[:count]] = x[:count]
        progress(count)
    if examples is not None:
        cli.sum_over_processes(examples)
    return cli.sum_over_processes(logits)


class AttackedImages:
    """The test images as the attacks leave them: of each the logits of its latest version and, with keep, that version.
    model scores, in float32 and frozen. compiled: whether what crafts was compiled for batches of batch_size."""

    def __init__(self, model, test, batch_size, compiled, keep=False):
        self.model, self.test, self.batch_size, self.compiled = model, test, batch_size, compiled
        self.logits = None
        self.x_adv = data.to_float(test.images) if keep else None

    def attack(self, attack, chosen, progress):
        """Attack the images of the mask `chosen`, from their natural version; attack: see attacked_logits."""
        positions = chosen.nonzero()[:, 0]
        if len(positions) == 0:
            return
        world, found = cli.rank_and_world()[1], None if self.x_adv is None else torch.zeros_like(self.x_adv)
        batch_size = self.batch_size if self.compiled else min(self.batch_size, -(-len(positions) // world))
        logits = attacked_logits(self.model, self.test.images, self.test.labels, attack, batch_size, progress,
                                 positions, found)
        self.logits = logits if self.logits is None else torch.where(chosen[:, None], logits, self.logits)
        if found is not None:
            self.x_adv[chosen] = found[chosen]

    def right(self):
        """(N,) bool: which are classified correctly; all before the first attack."""
        if self.logits is None:
            return torch.ones_like(self.test.labels, dtype=torch.bool)
        return self.logits.argmax(1) == self.test.labels

    def examples(self, name):
        """What --save-examples keeps of them after the attack `name`."""
        kept = {"predictions": self.logits.argmax(1), "margins": losses.margin(self.logits, self.test.labels)}
        kept |= {} if self.x_adv is None else {"images": self.x_adv}
        return {f"{what}/{name}": values.cpu().numpy().copy() for what, values in kept.items()}


def device_name(device):
    """"NVIDIA H100 80GB HBM3", or the CPU's model and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def command(script, argv):
    """The command line that a result comes from; argv None: this process's own."""
    return shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])


def describe(info, dataset):
    """What the JSON says of the model."""
    args = info.get("args", {})
    return {key: info[key] for key in ("path", "sha256", "arch", "normalize")} | {
        "dataset": dataset, "defense": args.get("defense"), "spat_alpha": args.get("spat_alpha"),
        "epochs": info.get("epoch"), "seed": args.get("seed"), "args": args}


def wilson(correct, n, z=1.959964):
    """The 95 % Wilson score interval of a share, as (low, high) in [0, 1]."""
    p = correct / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def outcome(name, params, correct_mask, seconds=0.0):
    """One attack's entry in the JSON, from which images are still classified correctly, (n,) bool."""
    n, correct = len(correct_mask), int(correct_mask.sum())
    return {"name": name, "params": params, "n": n, "correct": correct, "accuracy": correct / n,
            "interval": wilson(correct, n), "seconds": round(seconds, 2),
            "correct_mask": np.packbits(correct_mask.numpy()).tobytes().hex()}


def spat_shares(natural, attacked, y, alpha=None):
    """More of an attack's entry: the shares of losses.spat_counts, the first for PGD-LS only. Logits are (n, K)."""
    confident, easier = (losses.spat_counts(natural, attacked, y, alpha or 0.0).double() / len(y)).tolist()
    return {"share_made_easier": easier} | ({} if alpha is None else {"share_p_y_above_1_minus_alpha": confident})


def table(result):
    """The result as text, for the screen."""
    model = result["model"]
    spat = "" if model["spat_alpha"] is None else f" + SPAT (α {model['spat_alpha']:g})"
    of = model.get("args", {}).get("epochs", model["epochs"])
    epochs = f"{of} epochs" if model["epochs"] == of else f"epoch {model['epochs']} of {of}"
    trained = f", {model['defense']}{spat}, {epochs}, seed {model['seed']}" if model["defense"] else ""
    epsilon = result["epsilon"]
    exact = [row["name"] for row in result["attacks"] if "after" in row or "precision" in row["params"]]
    lines = [f"{model['path']}: {model['arch']} on {model['dataset']}{trained}",
             f"the first {result['n']} test images; attacks at ε {epsilon} crafted in {result['precision']}"
             + (f", {' and '.join(exact)} in fp32" if exact and result["precision"] != "fp32" else "")
             + ("" if result["complete"] else "; INCOMPLETE, it was stopped"),
             "",
             f"{'attack':<16} {'correct':>13} {'accuracy':>9}   95 % interval   {'seconds':>7}"]
    for row in result["attacks"]:
        low, high = row["interval"]
        lines.append(f"{row['name']:<16} {row['correct']:>6}/{row['n']:<6} {row['accuracy']:>8.2%}   "
                     f"{100 * low:5.2f} - {100 * high:5.2f}   {row['seconds']:>7.0f}")
        lines += [f"  after {name:<10} {'':>13} {share:>8.2%}" for name, share in row.get("after", {}).items()]
    paper = TABLE_3.get((model["dataset"], model["defense"], model["spat_alpha"]))
    if paper and "," not in epsilon and Fraction(epsilon) == Fraction(8, 255):
        names = ("Natural", "FGSM", "PGD-20", "CW-inf")
        row = "  ".join(f"{name} {value:.2f}" for name, value in zip(names, paper, strict=True))
        lines.append("paper, Table 3, the same method on WRN-34-10: " + row)
    return "\n".join(lines)


def correct_mask(row):
    """The outcome per image, (n,) bool, of an attack's entry in the JSON."""
    bits = np.frombuffer(bytes.fromhex(row["correct_mask"]), np.uint8)
    return np.unpackbits(bits)[: row["n"]].astype(bool)


def worst_case(rows):
    """The entry in the JSON of the images that are right in every one of these entries."""
    masks = [correct_mask(row) for row in rows]
    return outcome("Worst case", {"of": [row["name"] for row in rows]}, torch.from_numpy(np.logical_and.reduce(masks)))


def write(path, result):
    """The result as a JSON file, or nothing if path is None. OSError if it cannot be written."""
    if path is not None:
        checkpoints.write_atomically(path, json.dumps(result, indent=1).encode())


def read(path):
    """A result of eval_attacks.py; raises ValueError if the file is not one."""
    try:
        with open(path, encoding="utf-8") as file:
            result = json.load(file)
        names = [(row["name"], row["params"], correct_mask(row)) for row in result["attacks"]]
        if all(len(mask) == result["n"] for _, _, mask in names) and result["model"]["dataset"]:
            return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a result of eval_attacks.py ({type(error).__name__})") from None
    raise ValueError(f"{path}: not a result of eval_attacks.py (its masks do not fit its n)")
