"""Accuracy of a trained model under attack: one table on the screen, and one JSON file.

    python eval_attacks.py --model-path runs/NAME/best.pt                 # Natural, FGSM, PGD-20, CW-inf
    python eval_attacks.py --model-path trades.pt --attacks natural autoattack --num-images 1000 --json result.json
    python eval_attacks.py --model-path runs/NAME/best.pt --attacks pgd-kl pgd-ls --alphas 0 0.1 0.3

The attacks may craft in bf16; the accuracy is always counted in float32 on the final images.
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
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import attacks
import checkpoints
import data
import losses
import models
import runtime

ATTACKS = ("natural", "fgsm", "pgd", "cw", "pgd-kl", "pgd-ls", "apgd", "autoattack")
PROTOCOLS = {  # flags that stand for a published evaluation; a typed one wins
    "paper": {},
    "rst": dict(attacks=["natural", "pgd"], epsilon="0.031", step_size="0.003", num_steps=20),
    "rst-restarts": dict(attacks=["natural", "pgd"], epsilon="0.031", step_size="0.01", num_steps=40, restarts=5,
                         any_step=True),
}
USUAL_NORMALISATIONS = (  # CIFAR-10's two, CIFAR-100's, to [-1, 1], ImageNet's
    "0.4914,0.4822,0.4465 0.2471,0.2435,0.2616", "0.4914,0.4822,0.4465 0.2023,0.1994,0.2010",
    "0.5071,0.4865,0.4409 0.2673,0.2564,0.2762", "0.5,0.5,0.5 0.5,0.5,0.5", "0.485,0.456,0.406 0.229,0.224,0.225")


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


def evaluate(model, test, args, result, device):
    """Run the attacks of args on the test images, and append their outcomes to result["attacks"]."""
    todo, model, test = attack_list(args), model.to(device), test.to(device)
    forward, forward_fp32 = crafting_passes(args, model, test, todo)
    result.update(precision=args.precision, tf32=device.type == "cuda", compile=args.compile)
    images = AttackedImages(model, test, args.batch_size, args.compile != "off", args.save_images)
    natural, examples = None, {"labels": test.labels.cpu().numpy()}
    images_each, passes_done = -(-len(test.labels) // runtime.rank_and_world()[1]), 0
    bar = tqdm(total=sum(attack.passes for attack in todo) * images_each, unit="pass", unit_scale=True,
               dynamic_ncols=True, disable=runtime.rank_and_world()[0] > 0)
    with models.frozen(model), bar:
        for attack in todo:
            start = time.perf_counter()
            bar.set_description(attack.name)
            chosen = images.right() if args.pool else torch.ones_like(test.labels, dtype=torch.bool)
            craft_by = forward_fp32 if "precision" in attack.params else forward
            extra = run_attack(attack, craft_by, images, chosen, bar) if chosen.any() else {}
            if not attack.params:
                natural = images.logits
            elif natural is not None and not args.pool:
                extra.update(spat_shares(natural, images.logits, test.labels, attack.params.get("alpha")))
            row = outcome(attack.name, attack.params, images.right().cpu(), time.perf_counter() - start) | extra
            result["attacks"].append(row)
            passes_done += attack.passes * images_each
            bar.update(passes_done - bar.n)  # what was skipped, as images fell before
            bar.set_postfix_str(f"{attack.name} {row['accuracy']:.1%}, {row['n'] / max(row['seconds'], .01):.0f} img/s")
            if not attack.params and row["accuracy"] <= 1 / len(test.classes) + 0.05 and not bar.disable:
                bar.write(f"warning: {row['accuracy']:.1%} natural accuracy is near chance: probably wrong "
                          "preprocessing (--normalize), or the labels are in another order", file=sys.stderr)
            if args.save_examples:
                examples.update(images.examples(attack.name))
            save(args, result, examples)
    if sum(bool(attack.params) for attack in todo) > 1 and not args.epsilons:
        result["attacks"].append(worst_case(result["attacks"]))
    result["complete"] = True
    save(args, result, examples)


def crafting_passes(args, model, test, todo):
    """Return two callables x -> logits that craft: in args.precision, and in float32."""
    n, world = len(test.labels), runtime.rank_and_world()[1]
    size = args.batch_size if test.images.is_cuda else min(args.batch_size, -(-n // world))  # as in attacked_logits
    x = data.to_float(test.images[torch.arange(size) % n])
    passes = sum(attack.passes for attack in todo if "components" not in attack.params)
    with runtime.tf32_convolutions(True):
        forward = runtime.forward_pass(args, model, x, passes * n / len(x) / world, evaluates=True)
    if (x.is_cuda or args.precision != "fp32") and any("precision" in attack.params for attack in todo):
        return forward, runtime.fast_pass(model, runtime.plain_pass(model), x, args.compile)
    return forward, forward


def run_attack(attack, forward, images, chosen, bar):
    """Attack the images of the mask `chosen` for one row, by the callable `forward`; of several restarts each those
    that the ones before left standing. Returns extra entries of the row."""
    if "components" in attack.params:
        crafting = runtime.tf32_convolutions("tf32" in attack.params)
    else:
        crafting = runtime.tf32_convolutions("precision" not in attack.params)
    if not attack.params:
        images.attack(None, chosen, bar.update)
    elif "components" in attack.params:
        look_up, after = crafting(official_attack)(images.model, images.test, chosen, attack.params, bar)
        images.attack(look_up, chosen, bar.update)
        return {"after": after}
    else:
        craft, passes = crafting(make_attack(forward, attack.params)), 1 + attack.params["num_steps"]
        for restart in range(attack.params.get("restarts", 1)):
            images.attack(functools.partial(craft, restart=restart), chosen, lambda n: bar.update(n * passes))
            chosen = chosen & images.right()
    return {}


def make_attack(forward, params):
    """Return the function (x, y, indices, restart=0) -> x_adv for parameters as in the JSON."""
    epsilon, step_size = float(Fraction(params["epsilon"])), float(Fraction(params["step_size"]))
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
            return attacks.pgd(model, x, target, objective, epsilon=epsilon, random_start=start, step_size=step_size,
                               num_steps=params["num_steps"])

        if params.get("any_step"):
            return attacks.worst_iterate(iterate, forward, functools.partial(losses.margin, y=y))
        return iterate(forward)

    return attack


def official_attack(model, test, chosen, params, bar):
    """Run pyautoattack, in float32, on the images of the mask `chosen`. Returns (a function (x, y, indices) -> x_adv
    that looks its results up, {component: the share of all images that stand after it})."""
    (rank, world), x_adv, after = runtime.rank_and_world(), data.to_float(test.images), {}
    mine = chosen.nonzero()[:, 0][rank::world]

    def logits(x):
        bar.update(len(x))
        return attacks.for_autoattack(model)(x)

    def note(component, robust):
        after[component] = robust.sum()
        bar.set_postfix_str(f"{robust.float().mean():.1%} stand after {component}")

    x_adv[mine] = attacks.autoattack(
        logits, x_adv[mine], test.labels[mine], epsilon=float(Fraction(params["epsilon"])), seed=params["seed"],
        batch_size=params["batch_size"], components=params["components"], on_component=note)
    after = {name: runtime.sum_over_processes(count).item() / len(test.labels) for name, count in after.items()}
    return (lambda x, y, indices: x_adv[indices]), after


class AttackedImages:
    """The test images as the attacks leave them: of each the logits of its latest version and, with keep, that version.
    model scores, in float32 and frozen. compiled: whether what crafts was compiled for batches of batch_size."""

    def __init__(self, model, test, batch_size, compiled, keep=False):
        self.model, self.test, self.batch_size, self.compiled = model, test, batch_size, compiled
        self.logits = None
        self.x_adv = data.to_float(test.images) if keep else None

    def attack(self, attack, chosen, progress):
        """Attack the images of the mask `chosen`, from their natural version; for attack see attacked_logits."""
        positions = chosen.nonzero()[:, 0]
        if len(positions) == 0:
            return
        found = None if self.x_adv is None else torch.zeros_like(self.x_adv)
        batch_size = self.batch_size
        if not self.compiled and not self.test.images.is_cuda:  # no batch need be larger than what there is
            batch_size = min(batch_size, -(-len(positions) // runtime.rank_and_world()[1]))
        logits = attacked_logits(self.model, self.test.images, self.test.labels, attack, batch_size, progress,
                                 positions, found)
        self.logits = logits if self.logits is None else torch.where(chosen[:, None], logits, self.logits)
        if found is not None:
            self.x_adv[chosen] = found[chosen]

    def right(self):
        """Return (N,) bool: which are classified correctly; all before the first attack."""
        if self.logits is None:
            return torch.ones_like(self.test.labels, dtype=torch.bool)
        return self.logits.argmax(1) == self.test.labels

    def examples(self, name):
        """Return what --save-examples keeps of them after the attack `name`."""
        kept = {"predictions": self.logits.argmax(1), "margins": losses.margin(self.logits, self.test.labels)}
        if self.x_adv is not None:
            kept["images"] = self.x_adv
        return {f"{what}/{name}": values.cpu().numpy().copy() for what, values in kept.items()}


def attacked_logits(model, images, labels, attack=None, batch_size=256, progress=lambda n: None, only=None,
                    examples=None):
    """Return the model's float32 logits (N, K) for attacked images: what every accuracy is counted from.

    images: (N, C, H, W) uint8, labels: (N,), both on one device. attack(x, y, indices) -> x_adv, indices being the
    images' positions, on the CPU; None for the natural images. model scores the final images: give it in float32 and
    frozen, whatever crafts inside `attack`. only: the positions to attack (default: all), at least one; the rows of
    the others are zero. Several processes share the work, and each returns the whole. All batches have one size (the
    last is filled up with images that are not counted), so that compiled code is not compiled twice.
    progress(n) is called after every n images; examples, zeros like the images in float32, receives the attacked ones.
    Raise FloatingPointError where logits are not finite.
    """
    n, logits, (rank, world) = len(images), None, runtime.rank_and_world()
    if not images.is_cuda:  # where code is compiled and cuDNN's choices are timed for one size
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
        runtime.sum_over_processes(examples)
    logits = runtime.sum_over_processes(logits)
    if broken := (~logits.isfinite()).any(1).sum().item():
        raise FloatingPointError(f"the logits of {broken} of {n} images are not finite: a fault, no attack's success")
    return logits


# Flags. ---------------------------------------------------------------------------------------------------------------


def attack_list(args):
    """Return the Attacks asked for, radius by radius in the paper's order."""
    listed = [Attack("Natural", {})] if "natural" in args.attacks else []
    for epsilon in args.epsilons or [args.epsilon]:
        suffix = f" ε {epsilon}" if args.epsilons else ""
        for flag in ATTACKS[1:]:
            if flag in args.attacks:
                listed += [Attack(name + suffix, params) for name, params in rows_of(flag, epsilon, args)]
    if args.pool:
        for i, attack in enumerate(listed):
            if attack.params:
                listed[i] = Attack(attack.name, attack.params | {"pool": [before.name for before in listed[:i]]})
    return listed


def rows_of(flag, epsilon, args):
    """Return [(name, parameters), ...], the rows of one attack of --attacks at one radius."""
    if flag == "fgsm":
        return [("FGSM", dict(epsilon=epsilon, objective="ce", step_size=epsilon, num_steps=1, random_start="none"))]
    if flag in ("apgd", "autoattack"):
        params = dict(components=["apgd-ce", "apgd-t"] if flag == "apgd" else list(attacks.COMPONENTS), epsilon=epsilon,
                      version="standard", seed=args.seed, batch_size=args.batch_size)
        if args.tf32:
            params["tf32"] = True
        if (world := runtime.rank_and_world()[1]) > 1:
            params["processes"] = world
        return [("APGD-CE + APGD-T" if flag == "apgd" else "AutoAttack", params)]
    base = dict(epsilon=epsilon, step_size=args.step_size or str(Fraction(epsilon) / 10), num_steps=args.num_steps,
                random_start=args.random_start, seed=args.seed)
    rule = ""
    if args.restarts > 1:
        base["restarts"], rule = args.restarts, f" x{args.restarts}"
    if args.any_step:  # in float32, as one step decides: in bf16 it may fall short of float32's boundary
        base["any_step"], base["precision"], rule = True, "fp32", rule + " any step"
    rows = []
    if flag == "cw":
        for kappa in args.kappas:
            name = "CW-inf" if kappa == 50 else f"CW-inf κ {kappa:g}"
            params = dict(objective="cw", kappa=kappa) | base | {"num_steps": args.cw_steps}
            if kappa < 1:
                params["precision"] = "fp32"
            rows.append((name + rule, params))
        return rows
    for steps in args.steps_sweep or [args.num_steps]:
        params = base | {"num_steps": steps}
        if flag == "pgd":
            rows.append((f"PGD-{steps}{rule}", {"objective": "ce"} | params))
        elif flag == "pgd-kl":
            rows.append((f"PGD-{steps}-KL{rule}", {"objective": "kl"} | params))
        else:
            rows += [(f"PGD-{steps}-LS {alpha:g}{rule}", {"objective": "lsce", "alpha": alpha} | params)
                     for alpha in args.alphas]
    return rows


def parse_args(argv=None):
    parser = runtime.Parser(prog="eval_attacks.py", description=__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("attacks").add_argument
    add("--attacks", nargs="+", choices=ATTACKS, default=["natural", "fgsm", "pgd", "cw"], metavar="ATTACK",
        help=f"which attacks to run, of {', '.join(ATTACKS)}; apgd is APGD-CE and APGD-T, the first half of AutoAttack")
    add("--protocol", choices=PROTOCOLS, default="paper", help="settings to start from; paper: the defaults below; "
        "rst: Table 4's PGD-20 at ε 0.031; rst-restarts: RST's own 40 steps, 5 restarts, broken if any step breaks")
    add("--epsilon", type=runtime.ratio, metavar="E", help="radius of the L-inf ball (default: "
        f"{data.EPSILON['cifar10']}; digits: {data.EPSILON['digits']})")
    add("--epsilons", nargs="+", type=runtime.ratio, metavar="E", help="run every attack at each of these radii")
    add("--num-steps", type=runtime.positive_int, default=20, metavar="N", help="steps of pgd, pgd-kl and pgd-ls")
    add("--steps-sweep", nargs="+", type=runtime.positive_int, metavar="N",
        help="run these three with each number of them")
    add("--cw-steps", type=runtime.positive_int, default=30, metavar="N", help="steps of cw")
    add("--step-size", type=runtime.ratio, metavar="S", help="step of pgd, pgd-kl, pgd-ls, cw (default: epsilon / 10)")
    add("--random-start", choices=attacks.RANDOM_STARTS, default="uniform", help="where these four start")
    add("--restarts", type=runtime.positive_int, default=1, metavar="R", help="run these four from R starts, all count")
    add("--any-step", action="store_true", help="count any step that breaks an image, as RST does; crafts in float32")
    add("--alphas", nargs="+", type=runtime.unit_float, metavar="A", help="run pgd-ls, which needs them, with each α")
    add("--kappas", nargs="+", type=runtime.natural_float, metavar="K", default=[50.0],
        help="run cw with each confidence κ; one below 1 is crafted in float32")
    add("--pool", action="store_true", help="attack only what the attacks before left standing; the rows accumulate")
    add("--seed", type=runtime.natural_int, default=0, help="seed of the random starts")
    add("--tf32", action="store_true", help="let apgd and autoattack too use a GPU's TF32; the counting never does")
    add = add_machine_flags(parser)
    add("--save-examples", metavar="FILE", help="write each image's predictions and margins to this .npz")
    add("--save-images", action="store_true", help="put the attacked images into it, float32, 12 kB each")
    typed = parser.parse_args(argv)
    parser.set_defaults(**PROTOCOLS[typed.protocol])
    if typed.epsilons:
        parser.set_defaults(epsilon=None)
    args = parser.parse_args(argv)
    for wrong, why in (
        (("pgd-ls" in args.attacks) != bool(args.alphas), "--attacks pgd-ls and --alphas go together"),
        ("pgd-kl" in args.attacks and args.random_start == "none", "--random-start none: pgd-kl would not move"),
        (args.restarts > 1000, "--restarts: at most 1000, the next ones are those of another --seed"),
        (args.restarts > 1 and args.random_start == "none", "--restarts: without a random start all are the same"),
        (args.epsilon and args.epsilons, "--epsilon and --epsilons exclude one another"),
        (args.pool and args.epsilons, "--pool: an image broken at one radius may stand at another of --epsilons"),
        (args.tf32 and (args.device == "cpu" or not torch.cuda.is_available()), "--tf32: a CPU does not have it"),
        (args.save_images and not args.save_examples, "--save-images goes with --save-examples"),
    ):
        if wrong:
            parser.error(why)
    return parser, args


def add_model_flags(parser, images="all"):
    """Add the flags of what a model is evaluated on, here and in audit.py. images: how many by default, for the help.
    """
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--model-path", required=True, metavar="FILE", help="a checkpoint of train_cifar.py, or a released state dict")
    add("--dataset", help="cifar10, cifar100, digits or a folder (default: the one the model was trained on)")
    add("--data-dir", default="data", metavar="DIR", help="where CIFAR is, or is downloaded to")
    add("--num-images", type=runtime.positive_int, metavar="N", help=f"take the first N images (default: {images})")
    add("--num-classes", type=runtime.positive_int, metavar="K",
        help="refuse the file if it has another number of classes (default: take what it has)")
    add_file_flags(add)


def add_file_flags(add):
    """Add, by the function `add`, the flags that say what a released model's file cannot."""
    add("--arch", help="refuse the file if it holds another architecture (default: take what it holds); "
        "preact-resnet-18-x is fast_adversarial's, whose projections see a block's input")
    add("--weights", metavar="NAME", help="which of several sets of weights to take, such as swa_state_dict")
    add("--normalize", nargs=2, type=runtime.three_numbers, metavar=("MEAN", "STD"),
        help="how a released model's training images were normalised, such as 0.4914,0.4822,0.4465 "
        "0.2471,0.2435,0.2616 (default: not at all)")


def add_machine_flags(parser):
    """Add the flags of how to compute and of the JSON, and return the latter's function to add more."""
    add = runtime.add_runtime_flags(parser, default="auto")
    add("--batch-size", type=runtime.positive_int, default=256, metavar="N",
        help="images at a time; alters the outcome of apgd and autoattack only")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write the result there, part by part (default: no file)")
    return add


def load(args):
    """Return (model, info, all test images, the data set's name) by the flags above. Raise ValueError."""
    runtime.check_output("--json", args.json)
    model, info = checkpoints.load_model(args.model_path, arch=args.arch, num_classes=args.num_classes,
                                         normalize=args.normalize, weights=args.weights)
    dataset = args.dataset or info.get("args", {}).get("dataset")
    if dataset is None:
        dataset = "cifar100" if info["num_classes"] == 100 else "cifar10"
    test = data.fitted(data.load(dataset, args.data_dir, train=False), dataset, info)
    if args.num_images and args.num_images > len(test.labels):
        raise ValueError(f"--num-images {args.num_images}: {dataset} has {len(test.labels)} test images")
    return model, info, test, dataset


def say_notes(model, info, device, images, labels):
    """Print, to stderr, what the model's file left open. Where that is the normalisation, note first which of the usual
    ones does better than none, and than those before it, by three standard errors, on images (N, C, H, W) uint8 with
    labels (N,). labels may be None. A few hundred images do not tell CIFAR-10's two apart."""
    if checkpoints.ASSUMED in info["notes"] and labels is not None:
        model, images, labels = model.to(device), images.to(device), labels.to(device)
        best = plain = attacked_logits(model, images, labels).argmax(1) == labels
        for flag in USUAL_NORMALISATIONS:
            normalised = models.Normalised(model, *map(runtime.three_numbers, flag.split())).to(device)
            right = attacked_logits(normalised, images, labels).argmax(1) == labels
            gains = right.float() - best.float()
            if gains.sum() > 3 * gains.norm():
                best, hint = right, f"did you mean --normalize {flag}?"
        if best is not plain:
            info["notes"].append(f"{hint} {best.sum()} of {len(labels)} images are right with it, not {plain.sum()}")
    if runtime.rank_and_world()[0] == 0:
        for note in info["notes"]:
            print(f"{info['path']}: {note}", file=sys.stderr)


# The result: a JSON, and a table on the screen. -----------------------------------------------------------------------


def outcome(name, params, correct_mask, seconds=0.0):
    """Return one attack's entry in the JSON, from which images are still classified correctly, (n,) bool."""
    from scipy.stats import binomtest  # here, as its import takes a second

    n, correct = len(correct_mask), int(correct_mask.sum())
    interval = binomtest(correct, n).proportion_ci(0.95, "wilson")
    return {"name": name, "params": params, "n": n, "correct": correct, "accuracy": correct / n,
            "interval": (float(interval.low), float(interval.high)), "seconds": round(seconds, 2),
            "correct_mask": np.packbits(correct_mask.numpy()).tobytes().hex()}


def correct_mask(row):
    """Return the outcome per image, (n,) bool, of an attack's entry in the JSON."""
    bits = np.frombuffer(bytes.fromhex(row["correct_mask"]), np.uint8)
    return np.unpackbits(bits)[: row["n"]].astype(bool)


def settings(row):
    """Return the parameters of an attack's entry, with radius and step as numbers: 8/255 and 16/510 are equal."""
    return {key: Fraction(value) if key in ("epsilon", "step_size") else value for key, value in row["params"].items()}


def worst_case(rows):
    """Return the entry in the JSON of the images that are right in every one of these entries."""
    masks = [correct_mask(row) for row in rows]
    return outcome("Worst case", {"of": [row["name"] for row in rows]}, torch.from_numpy(np.logical_and.reduce(masks)))


def spat_shares(natural, attacked, y, alpha=None):
    """Return the shares of losses.spat_counts, for an attack's entry; the first for PGD-LS only. Logits are (n, K)."""
    confident, easier = (losses.spat_counts(natural, attacked, y, alpha or 0.0).double() / len(y)).tolist()
    if alpha is None:
        return {"share_made_easier": easier}
    return {"share_made_easier": easier, "share_p_y_above_1_minus_alpha": confident}


def device_name(device):
    """Return "NVIDIA H100 80GB HBM3", or the CPU's model and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def command(script, argv):
    """Return the command line that a result comes from; argv None: this process's own."""
    return shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)])


def describe(info, dataset):
    """Return what the JSON says of the model."""
    args = info.get("args", {})
    return {"path": info["path"], "sha256": info["sha256"], "arch": info["arch"], "normalize": info["normalize"],
            "weights": info["weights"], "notes": info["notes"], "dataset": dataset, "defense": args.get("defense"),
            "spat_alpha": args.get("spat_alpha"), "epochs": info.get("epoch"), "seed": args.get("seed"), "args": args}


def table(result):
    """Return the result as text, for the screen."""
    model, attacked = result["model"], f"attacks at ε {result['epsilon']} crafted in {result['precision']}"
    trained = ""
    if model["defense"]:
        trained = f", {model['defense']}"
        if model["spat_alpha"] is not None:
            trained += f" + SPAT (α {model['spat_alpha']:g})"
        of = model["args"].get("epochs", model["epochs"])
        epochs = f"{of} epochs" if model["epochs"] == of else f"epoch {model['epochs']} of {of}"
        trained += f", {epochs}, seed {model['seed']}"
    exact = [row["name"] for row in result["attacks"] if "after" in row or "precision" in row["params"]]
    if exact and result["precision"] != "fp32":
        attacked += f", {' and '.join(exact)} in fp32"
    if not result["complete"]:
        attacked += "; INCOMPLETE, it was stopped"
    if model.get("weights"):
        trained += f", its {model['weights']}"
    lines = [f"{model['path']}: {model['arch']} on {model['dataset']}{trained}", *model.get("notes", []),
             f"the first {result['n']} test images; {attacked}", "",
             f"{'attack':<16} {'correct':>13} {'accuracy':>9}   95 % interval   {'seconds':>7}"]
    for row in result["attacks"]:
        low, high = row["interval"]
        lines.append(f"{row['name']:<16} {row['correct']:>6}/{row['n']:<6} {row['accuracy']:>8.2%}   "
                     f"{100 * low:5.2f} - {100 * high:5.2f}   {row['seconds']:>7.0f}")
        for component, share in row.get("after", {}).items():
            lines.append(f"  after {component:<10} {'':>13} {share:>8.2%}")
    return "\n".join(lines)


def save(args, result, examples):
    """Write the files that args ask for, from the first process."""
    if runtime.rank_and_world()[0] == 0:
        write(args.json, result)
        if args.save_examples:
            checkpoints.write_atomically(args.save_examples, lambda file: np.savez_compressed(file, **examples))


def write(path, result):
    """Write the result as a JSON file, or nothing if path is None. Raises OSError if it cannot be written."""
    if path is not None:
        checkpoints.write_atomically(path, json.dumps(result, indent=1).encode())


def read(path):
    """Return a result of eval_attacks.py. Raises ValueError if the file is not one."""
    try:
        result = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        masks = [(row["name"], settings(row), correct_mask(row))[2] for row in result["attacks"]]
        if all(len(mask) == result["n"] for mask in masks) and result["model"]["dataset"]:
            return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: not a result of eval_attacks.py ({type(error).__name__})") from None
    raise ValueError(f"{path}: not a result of eval_attacks.py (its masks do not fit its n)")


def main(argv=None):
    parser, args = parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            device, rank, _ = stack.enter_context(runtime.join_job(args.device))
            model, info, test, dataset = load(args)
            runtime.check_output("--save-examples", args.save_examples)
            if {"apgd", "autoattack"} & set(args.attacks):
                attacks.check_autoattack(info["num_classes"])
            say_notes(model, info, device, test.images[:200], test.labels[:200])
            test = test.subset(slice(args.num_images))
        except (ValueError, FloatingPointError, *runtime.FAULTS) as error:
            parser.error(error)
        args.epsilon = ", ".join(args.epsilons or [args.epsilon or data.EPSILON.get(dataset, "8/255")])
        result = {
            "model": describe(info, dataset), "n": len(test.labels), "images": data.fingerprint(test),
            "epsilon": args.epsilon, "device": device_name(device), "precision": args.precision,
            "batch_size": args.batch_size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": command(parser.prog, argv), "complete": False, "attacks": []}
        try:
            evaluate(model, test, args, result, device)
        except KeyboardInterrupt:  # what is finished stands in the JSON, marked as incomplete
            if rank == 0:
                print(table(result))
            sys.exit(130)
        except (FloatingPointError, *runtime.FAULTS) as error:
            sys.exit(f"{parser.prog}: {error}")
        if rank == 0:
            print(table(result))
        return result


if __name__ == "__main__":
    main()
