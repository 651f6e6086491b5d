"""Accuracy of a trained model under attack: one table on the screen, and one JSON file.

    python eval_attacks.py --model-path runs/NAME/best.pt

A model file says what it is, so its path is enough. The attacks may craft in bf16; the accuracy is always counted in
float32 on the final images.
"""

import contextlib
import functools
import json
import pathlib
import platform
import shlex
import sys
import time
from fractions import Fraction

import numpy as np
import torch
from tqdm import tqdm

import attacks
import checkpoints
import cli
import data
import losses
import models

ATTACKS = ("natural", "fgsm", "pgd", "cw", "pgd-kl", "pgd-ls")

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


def parse_args(argv=None):
    parser = cli.Parser(prog="eval_attacks.py", description=__doc__)
    add = parser.add_argument
    add("--model-path", required=True, metavar="FILE", help="a checkpoint of train_cifar.py, or a released state dict")
    add("--attacks", nargs="+", choices=ATTACKS, default=["natural", "fgsm", "pgd", "cw"], metavar="ATTACK",
        help=f"of {', '.join(ATTACKS)} (default: natural fgsm pgd cw, the columns of the paper's Table 3)")
    add("--alphas", nargs="+", type=cli.unit_float, metavar="A", help="values of α for pgd-ls, which needs them")
    add("--epsilon", type=cli.ratio, help="radius of the L-inf ball (default: 8/255; digits: 0.05)")
    add("--num-steps", type=cli.positive_int, default=20, help="of pgd, pgd-kl and pgd-ls (default: 20)")
    add("--cw-steps", type=cli.positive_int, default=30, help="of cw (default: 30)")
    add("--step-size", type=cli.ratio, help="of all but fgsm (default: epsilon / 10)")
    add("--random-start", choices=attacks.RANDOM_STARTS, default="uniform", help="of all but fgsm (default: uniform)")
    add("--num-images", type=cli.positive_int, metavar="N", help="the first N test images (default: all)")
    add("--batch-size", type=cli.positive_int, default=256, help="does not alter the result (default: 256)")
    add("--seed", type=cli.natural_int, default=0, help="of the random starts (default: 0)")
    add("--dataset", help="cifar10, cifar100, digits or a folder (default: the one the model was trained on)")
    add("--data-dir", default="data", metavar="DIR", help="where CIFAR is, or is downloaded to (default: data)")
    add("--arch", help="refuse the file if it holds another architecture (default: take what it holds)")
    cli.add_runtime_flags(parser, default="auto")
    add("--json", metavar="FILE", help="write the result there, after every attack (default: no file)")
    args = parser.parse_args(argv)
    if ("pgd-ls" in args.attacks) != bool(args.alphas):
        parser.error("--attacks pgd-ls and --alphas go together")
    if "pgd-kl" in args.attacks and args.random_start == "none":
        parser.error("--random-start none: pgd-kl would not move, KL(p(x) || p(x)) is 0 with gradient 0")
    if args.json and not pathlib.Path(args.json).resolve().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist")
    return parser, args


def attack_list(args):
    """The attacks asked for, in the paper's order: (name, parameters as they go into the JSON)."""
    step_size = args.step_size or str(Fraction(args.epsilon) / 10)
    base = {"epsilon": args.epsilon, "step_size": step_size, "num_steps": args.num_steps,
            "random_start": args.random_start, "seed": args.seed}
    rows = {
        "natural": [("Natural", {})],
        "fgsm": [("FGSM", {"objective": "ce", "epsilon": args.epsilon, "step_size": args.epsilon, "num_steps": 1,
                           "random_start": "none"})],
        "pgd": [(f"PGD-{args.num_steps}", {"objective": "ce"} | base)],
        "cw": [("CW-inf", {"objective": "cw", "kappa": 50.0} | base | {"num_steps": args.cw_steps})],
        "pgd-kl": [(f"PGD-{args.num_steps}-KL", {"objective": "kl"} | base)],
        "pgd-ls": [(f"PGD-{args.num_steps}-LS {alpha:g}", {"objective": "lsce", "alpha": alpha} | base)
                   for alpha in args.alphas or ()],
    }
    return [row for name in ATTACKS if name in args.attacks for row in rows[name]]


def make_attack(forward, params):
    """The function (x, y, indices) -> x_adv for parameters as in the JSON; None if they are empty (natural)."""
    if not params:
        return None
    epsilon = float(Fraction(params["epsilon"]))
    objective = {
        "ce": losses.cross_entropy,
        "kl": losses.kl_divergence,
        "lsce": functools.partial(losses.lsce, alpha=params.get("alpha", 0.0)),
        "cw": functools.partial(losses.cw_margin, kappa=params.get("kappa", 50.0)),
    }[params["objective"]]

    def attack(x, y, indices):
        start = attacks.start_per_image(params["random_start"], x, epsilon, indices, params.get("seed", 0))
        target = y
        if params["objective"] == "kl":
            with torch.no_grad():
                target = forward(x).float().softmax(1)
        return attacks.pgd(forward, x, target, objective, epsilon=epsilon, random_start=start,
                           step_size=float(Fraction(params["step_size"])), num_steps=params["num_steps"])

    return attack


def wilson(correct, n, z=1.959964):
    """The 95 % Wilson score interval of a share, as (low, high) in [0, 1]."""
    p = correct / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def outcome(name, params, correct_mask, seconds):
    """One attack's entry in the JSON, from which images are still classified correctly, (n,) bool."""
    n, correct = len(correct_mask), int(correct_mask.sum())
    return {"name": name, "params": params, "n": n, "correct": correct, "accuracy": correct / n,
            "interval": wilson(correct, n), "seconds": round(seconds, 2),
            "correct_mask": np.packbits(correct_mask.numpy()).tobytes().hex()}


def table(result):
    """The result as text, for the screen."""
    model = result["model"]
    spat = "" if model["spat_alpha"] is None else f" + SPAT (α {model['spat_alpha']:g})"
    trained = f", {model['defense']}{spat}, {model['epochs']} epochs, seed {model['seed']}" if model["defense"] else ""
    lines = [f"{model['path']}: {model['arch']} on {model['dataset']}{trained}",
             f"the first {result['n']} test images; attacks at ε {result['epsilon']} crafted in {result['precision']}",
             "",
             f"{'attack':<16} {'correct':>13} {'accuracy':>9}   95 % interval   {'seconds':>7}"]
    for row in result["attacks"]:
        low, high = row["interval"]
        lines.append(f"{row['name']:<16} {row['correct']:>6}/{row['n']:<6} {row['accuracy']:>8.2%}   "
                     f"{100 * low:5.2f} - {100 * high:5.2f}   {row['seconds']:>7.0f}")
    paper = TABLE_3.get((model["dataset"], model["defense"], model["spat_alpha"]))
    if paper and Fraction(result["epsilon"]) == Fraction(8, 255):
        names = ("Natural", "FGSM", "PGD-20", "CW-inf")
        row = "  ".join(f"{name} {value:.2f}" for name, value in zip(names, paper, strict=True))
        lines.append("paper, Table 3 (WRN-34-10): " + row)
    return "\n".join(lines)


def describe(info, dataset):
    """What the JSON says of the model."""
    args = info.get("args", {})
    return {key: info[key] for key in ("path", "sha256", "arch")} | {
        "dataset": dataset, "defense": args.get("defense"), "spat_alpha": args.get("spat_alpha"),
        "epochs": info.get("epoch"), "seed": args.get("seed"), "args": args}


def evaluate(model, test, args, result, device):
    """Run the attacks of args on the test images and append their outcomes to result["attacks"]."""
    todo, (rank, world) = attack_list(args), cli.rank_and_world()
    model, test = model.to(device), test.to(device)
    batch_size = min(args.batch_size, -(-len(test.labels) // world))
    x = data.to_float(test.images[:batch_size])
    passes = sum(params.get("num_steps", 1) for _, params in todo) * len(test.labels) / batch_size / world
    _, forward = cli.pick_forward(args, model, x, passes)
    result |= {"precision": args.precision, "compile": args.compile}
    cost = [1 + params.get("num_steps", 0) for _, params in todo]
    with models.frozen(model), tqdm(total=sum(cost) * -(-len(test.labels) // world), unit="pass", unit_scale=True,
                                    dynamic_ncols=True, disable=rank > 0) as bar:
        for (name, params), weight in zip(todo, cost, strict=True):
            bar.set_description(name)
            start = time.perf_counter()
            logits = cli.sum_over_processes(attacks.attacked_logits(
                model, test.images, test.labels, make_attack(forward, params), batch_size,
                lambda n, weight=weight: bar.update(n * weight), rank, world))
            correct = (logits.argmax(1) == test.labels).cpu()
            result["attacks"].append(outcome(name, params, correct, time.perf_counter() - start))
            if args.json and rank == 0:
                checkpoints.write_atomically(args.json, json.dumps(result, indent=1).encode())


def main(argv=None):
    parser, args = parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            device, rank, _ = stack.enter_context(cli.join_job(args.device))
            model, info = checkpoints.load_model(args.model_path, arch=args.arch)
            trained_on = info["args"]["dataset"] if "args" in info else None
            dataset = args.dataset or trained_on or {100: "cifar100"}.get(info["num_classes"], "cifar10")
            test = data.load(dataset, args.data_dir, train=False)
            if len(test.classes) != info["num_classes"]:
                raise ValueError(
                    f"{args.model_path} has {info['num_classes']} classes, {dataset} has {len(test.classes)}")
            if args.num_images and args.num_images > len(test.labels):
                raise ValueError(f"--num-images {args.num_images}: {dataset} has {len(test.labels)} test images")
        except (ValueError, OSError) as error:
            parser.error(error)
        args.epsilon = args.epsilon or data.EPSILON.get(dataset, "8/255")
        test = test.subset(slice(args.num_images))
        result = {
            "model": describe(info, dataset), "n": len(test.labels), "epsilon": args.epsilon,
            "device": device_name(device), "precision": args.precision, "batch_size": args.batch_size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": shlex.join(["python", "eval_attacks.py", *(sys.argv[1:] if argv is None else argv)]),
            "attacks": [],
        }
        evaluate(model, test, args, result, device)
        if rank == 0:
            print(table(result))
        return result


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


if __name__ == "__main__":
    main()
