"""The JSON of an evaluation: its entries, its reading, its table. Shared by the scripts that write and compare it."""

import json
import pathlib
import platform
import shlex
import sys
from fractions import Fraction

import numpy as np
import torch

import checkpoints
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


def shares(natural, attacked, y, alpha=None):
    """More of an attack's entry: the share of images that it made easier, p_y(x_adv) > p_y(x); and, for PGD-LS, of
    those with p_y(x) > 1 - α, whose true logit the ascent of LSCE raises. natural, attacked: logits (n, K)."""
    before, after = (losses.p_true(logits.double(), y) for logits in (natural, attacked))
    row = {"share_made_easier": (after > before).double().mean().item()}
    if alpha is not None:
        row["share_p_y_above_1_minus_alpha"] = (before > 1 - alpha).double().mean().item()
    return row


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
        lines.append("paper, Table 3 (WRN-34-10): " + row)
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
