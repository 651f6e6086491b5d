"""Accuracy of a trained model under attack: one table on the screen, and one JSON file.

    python eval_attacks.py --model-path runs/NAME/best.pt                 # Natural, FGSM, PGD-20, CW-inf
    python eval_attacks.py --model-path trades.pt --attacks natural autoattack --num-images 1000 --json result.json
    python eval_attacks.py --model-path runs/NAME/best.pt --attacks pgd-kl pgd-ls --alphas 0 0.1 0.3

The attacks may craft in bf16; the accuracy is always counted in float32 on the final images.
"""

import contextlib
import functools
import json
import math
import pathlib
import platform
import shlex
import sys
import time
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import attacks
import checkpoints
import data
import losses
import models
import runtime

ATTACKS = ("natural", "fgsm", "pgd", "cw", "pgd-kl", "pgd-ls", "apgd", "autoattack")
APGD = ["apgd-ce", "apgd-t"]  # the first half of AutoAttack
PROTOCOLS = {  # flags that stand for a published evaluation; a typed one wins
    "paper": {},
    "rst": dict(attacks=["natural", "pgd"], epsilon="0.031", step_size="0.003", num_steps=20),
    "rst-restarts": dict(attacks=["natural", "pgd"], epsilon="0.031", step_size="0.01", num_steps=40, restarts=5,
                         any_step=True),
}
USUAL_NORMALISATIONS = (  # CIFAR-10's two, CIFAR-100's, to [-1, 1], ImageNet's
    "0.4914,0.4822,0.4465 0.2471,0.2435,0.2616", "0.4914,0.4822,0.4465 0.2023,0.1994,0.2010",
    "0.5071,0.4865,0.4409 0.2673,0.2564,0.2762", "0.5,0.5,0.5 0.5,0.5,0.5", "0.485,0.456,0.406 0.229,0.224,0.225")


def main(argv=None):
    parser, args = parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            device, rank, _ = stack.enter_context(runtime.join_job(args.device))
            model, info, test, dataset = load(args)
            if {"apgd", "autoattack"} & set(args.attacks):
                attacks.check_autoattack(info["num_classes"])
            say_notes(model, info, device, test.images, test.labels)
        except (ValueError, ArithmeticError, *runtime.FAULTS) as error:
            parser.error(error)
        test = test.subset(slice(args.num_images))
        result = new_result(parser.prog, argv, args, info, dataset, test, device) | {"attacks": []}
        try:
            evaluate(model, test, args, result, device)
        except KeyboardInterrupt:
            sys.exit(130)
        except (FloatingPointError, *runtime.FAULTS) as error:
            sys.exit(f"{parser.prog}: {error}")
        finally:  # what is known, however it ends
            if rank == 0 and result["attacks"]:
                print(table(result))
                if args.json and not result["complete"] and not args.save_examples:
                    print("\nthe same command goes on from there")
        return result


def evaluate(model, test, args, result, device):
    """Run the rows of the table on the test images, and append the entry of each to result["attacks"]."""
    rows, model, test = attack_list(args), model.to(device), test.to(device)
    with models.frozen(model):
        forward, exact = crafting_passes(args, model, test, rows)
        result.update(precision=args.precision, tf32=device.type == "cuda", compile=args.compile)
        is_first = runtime.rank_and_world()[0] == 0
        result["attacks"] = runtime.from_rank_0(stopped(args, result, rows) if is_first else None)
        if result["attacks"] and is_first:
            print(f"{args.json}: going on after {result['attacks'][-1]['name']}", flush=True)
        evaluation = Evaluation(model, test, args, result, rows)
        with evaluation.bar:
            for place, row in enumerate(rows):
                evaluation.run(place, row, exact if row.params.get("precision") == "fp32" else forward)
    if sum(bool(row.params) for row in rows) > 1 and not args.epsilons:
        result["attacks"].append(worst_case(result["attacks"]))
    result["complete"] = True
    write(args.json, result)


def crafting_passes(args, model, test, rows):
    """Return two callables x -> logits that craft: in args.precision, and in float32."""
    n, (_, world) = len(test.labels), runtime.rank_and_world()
    size = args.batch_size if test.images.is_cuda else min(args.batch_size, math.ceil(n / world))  # as attacked_logits
    indices = torch.arange(size) % n
    x, y = data.to_float(test.images[indices]), test.labels[indices]

    def rehearsal(forward):  # before the JSON says "graphs": a step that cannot be recorded would run without
        runtime.attack_pass(model, forward, x)
        for row in rows:
            if "objective" in row.params and row.params.get("precision") != "fp32":
                make_attack(forward, row.params | {"num_steps": 1})(x, y, indices)

    passes = sum(row.passes for row in rows if "objective" in row.params) * n / size / world
    with runtime.tf32_convolutions(True):
        forward = runtime.forward_pass(args, model, x, passes, rehearsal, evaluates=True)
    if args.precision == "fp32" and not x.is_cuda:  # and so has no TF32
        return forward, forward
    return forward, runtime.fast_pass(model, runtime.plain_pass(model), x, args.compile)


class Row(NamedTuple):
    """A row of the table before it is run: its name, and its parameters as they go into the JSON, where it becomes an
    entry of "attacks"; {} for the natural images."""

    name: str
    params: dict

    @property
    def passes(self):
        """At most how many forward passes it takes an image."""
        if "components" in self.params:
            return sum(attacks.COMPONENTS[name] + 2 for name in self.params["components"])
        return (1 + self.params.get("num_steps", 0)) * self.params.get("restarts", 1)


class Evaluation:
    """The test images as the rows leave them: the logits of each one's latest version and, with --save-images, that
    version. The model scores, in float32 and frozen."""

    def __init__(self, model, test, args, result, rows):
        self.model, self.test, self.args, self.result = model, test, args, result
        self.rank, self.world = runtime.rank_and_world()
        self.logits = self.all_right = F.one_hot(test.labels, len(test.classes)).float()  # before the first row
        self.natural = None  # the logits of the natural images
        self.x_adv = data.to_float(test.images) if args.save_images else None
        self.arrays = {"labels": test.labels.cpu().numpy()}  # for --save-examples
        self.images_each = math.ceil(len(test.labels) / self.world)
        self.bar = tqdm(total=sum(row.passes for row in rows) * self.images_each, unit="pass", unit_scale=True,
                        dynamic_ncols=True, disable=self.rank > 0)

    def run(self, place, row, forward):
        """Run a row, which crafts by the callable `forward`; put its entry in its place in the result and save that. An
        entry that is there already comes from a stopped evaluation: the row, or its first components, are finished."""
        done, start, after = self.bar.n, time.perf_counter(), {}
        self.bar.set_description(row.name)
        chosen = self.right() if "pool" in row.params else torch.ones_like(self.test.labels, dtype=torch.bool)
        if row.params and (old := self.result["attacks"][place:place + 1]):
            stood = torch.from_numpy(correct_mask(old[0])).to(chosen.device)
            self.logits = torch.where(stood[:, None], self.all_right, 1 - self.all_right)  # for right() alone
            if old[0]["params"] == row.params:
                self.bar.update(row.passes * self.images_each)
                return
            chosen, after, start = chosen & stood, dict(old[0]["after"]), start - old[0]["seconds"]
        # a component takes hours: it becomes an entry, lest the next is stopped
        for component in self.attacked(chosen, row.params, forward, after):
            entry = outcome(*with_components(row, [*after, component]), self.right(), time.perf_counter() - start)
            after[component] = entry["accuracy"]
            self.save(place, entry | {"after": dict(after)})
            self.bar.set_postfix_str(f"{entry['accuracy']:.1%} stand after {component}")
        entry = outcome(*row, self.right(), time.perf_counter() - start)
        if after:
            entry["after"] = after
        if not row.params:
            self.natural = self.logits
            if entry["accuracy"] <= 1 / len(self.test.classes) + 0.05 and self.rank == 0:
                self.bar.write(f"warning: {entry['accuracy']:.1%} natural accuracy is near chance: probably wrong "
                               "preprocessing (--normalize), or the labels are in another order", file=sys.stderr)
        elif self.natural is not None and "objective" in row.params and "pool" not in row.params:
            entry |= spat_shares(self.natural, self.logits, self.test.labels, row.params.get("alpha"))
        self.bar.update(done + row.passes * self.images_each - self.bar.n)  # what was skipped
        self.bar.set_postfix_str(f"{entry['accuracy']:.1%}, {entry['n'] / max(entry['seconds'], .01):.0f} img/s")
        self.save(place, entry)
        self.save_examples(row.name)

    def save(self, place, entry):
        self.result["attacks"][place:place + 1] = [entry]
        write(self.args.json, self.result)

    def attacked(self, chosen, params, forward, finished=()):
        """Attack the images of the mask `chosen`, (N,) bool: a restart, or a component of AutoAttack, only those that
        the ones before it left correct. It runs while iterated; all it yields is each finished component's name."""
        if not params:
            self.score(None, chosen)
        elif "components" in params:
            for component in params["components"][len(finished):]:
                with runtime.tf32_convolutions("tf32" in params):
                    attack = self.autoattack(component, chosen, params)
                self.score(attack, chosen)
                chosen = chosen & self.right()
                yield component
        else:
            attack = make_attack(forward, params)
            attack = runtime.tf32_convolutions(params.get("precision") != "fp32")(attack)  # and not in the scoring
            for restart in range(params.get("restarts", 1)):
                self.score(functools.partial(attack, restart=restart), chosen, passes=1 + params["num_steps"])
                chosen = chosen & self.right()

    def autoattack(self, component, chosen, params):
        """Run a component, in float32, on this process's part of the chosen images, and return it as an attack."""
        scored, x_adv = attacks.for_autoattack(self.model), data.to_float(self.test.images)
        mine = chosen.nonzero()[:, 0][self.rank::self.world]

        def logits(x):
            self.bar.update(len(x))
            return scored(x)

        if len(mine):
            x_adv[mine] = attacks.autoattack(
                logits, x_adv[mine], self.test.labels[mine], epsilon=float(Fraction(params["epsilon"])),
                seed=params["seed"], batch_size=params["batch_size"], components=[component])
        return lambda x, y, indices: x_adv[indices]

    def score(self, attack, chosen, passes=1):
        """Score the chosen images after an attack, of so many passes, on their natural version: see attacked_logits."""
        only, batch_size = chosen.nonzero()[:, 0], self.args.batch_size
        if len(only) == 0:
            return
        if self.args.compile == "off" and not only.is_cuda:  # no batch need be larger than what there is
            batch_size = min(batch_size, math.ceil(len(only) / self.world))
        examples = None if self.x_adv is None else torch.zeros_like(self.x_adv)
        logits = attacked_logits(self.model, self.test.images, self.test.labels, attack, batch_size,
                                 lambda n: self.bar.update(n * passes), only, examples)
        self.logits = torch.where(chosen[:, None], logits, self.logits)
        if examples is not None:
            self.x_adv[chosen] = examples[chosen]

    def right(self):
        return self.logits.argmax(1) == self.test.labels

    def save_examples(self, name):
        """Write the file of --save-examples anew, now with what the row of this name found."""
        if self.args.save_examples and self.rank == 0:
            self.arrays[f"predictions/{name}"] = self.logits.argmax(1).cpu().numpy()
            self.arrays[f"margins/{name}"] = losses.margin(self.logits, self.test.labels).cpu().numpy()
            if self.x_adv is not None:
                self.arrays[f"images/{name}"] = np.array(self.x_adv.cpu())  # a copy
            checkpoints.write_atomically(self.args.save_examples,
                                         lambda file: np.savez_compressed(file, **self.arrays))


def attacked_logits(model, images, labels, attack=None, batch_size=256, progress=lambda n: None, only=None,
                    examples=None):
    """Return the model's float32 logits (N, K) for attacked images: what every accuracy is counted from.

    model: in float32 and frozen, whatever crafts inside the attack. images: (N, C, H, W) uint8, labels: (N,), both on
    one device. attack(x, y, indices) -> x_adv, the indices on the CPU; None: the natural images, which need no labels.
    only: the indices to attack, at least one (default: all); the rows of the others are zero. progress(n) is called
    after every n images. examples, zeros like the images in float32, receives the attacked ones. Several processes
    share the work, and each returns the whole. Raise FloatingPointError where logits are not finite.
    """
    n, logits, (rank, world) = len(images), None, runtime.rank_and_world()
    if not images.is_cuda:  # where code is compiled and cuDNN's choices are timed for one size
        batch_size = min(batch_size, math.ceil(n / world))
    only = torch.arange(n, device=images.device) if only is None else only
    mine = only[rank::world]
    # the last batch is filled up with images that are not counted, as another size would be compiled anew
    total = max(1, math.ceil(len(mine) / batch_size)) * batch_size
    filled = torch.cat([mine, only.repeat(math.ceil(total / len(only)))])[:total]
    # to the CPU all at once: batch by batch it would wait for the GPU each time
    parts = (indices.split(batch_size) for indices in (mine, filled, filled.cpu()))
    for counted, indices, on_cpu in zip(*parts, strict=True):
        x = data.to_float(images[indices])
        if attack is not None:
            x = attack(x, labels[indices], on_cpu)
        with torch.no_grad():
            out = model(x).float()
        logits = out.new_zeros(n, out.shape[1]) if logits is None else logits
        logits[counted] = out[:len(counted)]
        if examples is not None:
            examples[counted] = x[:len(counted)]
        progress(len(counted))
    if examples is not None:
        runtime.sum_over_processes(examples)
    logits = runtime.sum_over_processes(logits)
    if broken := (~logits.isfinite()).any(1).sum().item():
        raise FloatingPointError(f"the logits of {broken} of {n} images are not finite: a fault, no attack's success")
    return logits


def pgd_params(epsilon, **others):
    """Return the parameters of PGD-20 as they go into the JSON, with these others besides or instead."""
    return dict(objective="ce", epsilon=epsilon, step_size=str(Fraction(epsilon) / 10), num_steps=20,
                random_start="uniform", seed=0) | others


def make_attack(forward, params):
    """Return the attack (x, y, indices, restart=0) -> x_adv that parameters, as in the JSON, describe."""
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
        pgd = functools.partial(attacks.pgd, x=x, target=target, objective=objective, step_size=step_size,
                                epsilon=epsilon, random_start=start, num_steps=params["num_steps"])
        if params.get("any_step"):
            return attacks.worst_iterate(pgd, forward, functools.partial(losses.margin, y=y))
        return pgd(forward)

    return attack


# Flags, and the rows that they ask for. -------------------------------------------------------------------------------


def attack_list(args):
    """Return the Rows of the table, radius by radius in the paper's order."""
    rows = [Row("Natural", {})] if "natural" in args.attacks else []
    for epsilon in args.epsilons or [args.epsilon]:
        for flag in ATTACKS[1:]:
            for name, params in rows_of(flag, epsilon, args) if flag in args.attacks else []:
                if args.pool:
                    params["pool"] = [before.name for before in rows]
                rows.append(Row(f"{name} ε {epsilon}" if args.epsilons else name, params))
    return rows


def rows_of(flag, epsilon, args):
    """Return [(name, parameters)] of the rows of one word of --attacks at one radius."""
    pgd, steps = functools.partial(pgd_row, args, epsilon), args.steps_sweep or [args.num_steps]
    if flag == "fgsm":
        return [("FGSM", dict(epsilon=epsilon, objective="ce", step_size=epsilon, num_steps=1, random_start="none"))]
    if flag == "pgd":
        return [pgd(f"PGD-{n}", num_steps=n) for n in steps]
    if flag == "cw":
        return [pgd("CW-inf" if kappa == 50 else f"CW-inf κ {kappa:g}", objective="cw", kappa=kappa,
                    num_steps=args.cw_steps) for kappa in args.kappas]
    if flag == "pgd-kl":
        return [pgd(f"PGD-{n}-KL", objective="kl", num_steps=n) for n in steps]
    if flag == "pgd-ls":
        return [pgd(f"PGD-{n}-LS {alpha:g}", objective="lsce", alpha=alpha, num_steps=n)
                for n in steps for alpha in args.alphas]
    components, (_, world) = APGD if flag == "apgd" else list(attacks.COMPONENTS), runtime.rank_and_world()
    params = {"components": components, "epsilon": epsilon, "version": "standard", "seed": args.seed,
              "batch_size": args.batch_size}
    if args.tf32:
        params["tf32"] = True
    if world > 1:
        params["processes"] = world
    return [(components_name(components), params)]


def pgd_row(args, epsilon, name, **params):
    """Return (name, parameters) of a row of PGD, with these parameters and what the flags say of all of its kind."""
    params = pgd_params(epsilon, random_start=args.random_start, seed=args.seed, **params)
    if args.step_size:
        params["step_size"] = args.step_size
    if args.restarts > 1:
        name, params["restarts"] = f"{name} x{args.restarts}", args.restarts
    if args.any_step:
        name, params["any_step"] = f"{name} any step", True
    if args.any_step or params.get("kappa", 50) < 1:
        params["precision"] = "fp32"  # as one step decides: in bf16 it may fall short of float32's boundary
    return name, params


def components_name(components):
    """Return "AutoAttack" for its standard four components, and "APGD-CE + APGD-T" for those two."""
    return "AutoAttack" if components == list(attacks.COMPONENTS) else " + ".join(components).upper()


def with_components(row, components):
    """Return the Row with these components of AutoAttack in the place of its own."""
    name = row.name.replace(components_name(row.params["components"]), components_name(components))
    return Row(name, row.params | {"components": components})


def parse_args(argv=None):
    parser = runtime.Parser(prog="eval_attacks.py", description=__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("attacks").add_argument
    add("--attacks", nargs="+", choices=ATTACKS, default=["natural", "fgsm", "pgd", "cw"], metavar="ATTACK",
        help=f"which attacks to run, of {', '.join(ATTACKS)}; apgd is APGD-CE and APGD-T, the first half of AutoAttack")
    add("--protocol", choices=PROTOCOLS, default="paper", help="settings to start from; paper: the defaults below; "
        "rst: Table 4's PGD-20 at ε 0.031; rst-restarts: RST's own 40 steps, 5 restarts, broken if any step breaks")
    add("--epsilons", nargs="+", type=runtime.ratio, metavar="E", help="run every attack at each of these radii")
    add("--num-steps", type=runtime.positive_int, default=20, metavar="N", help="steps of pgd, pgd-kl and pgd-ls")
    add("--steps-sweep", nargs="+", type=runtime.positive_int, metavar="N", help="run these three with each number")
    add("--cw-steps", type=runtime.positive_int, default=30, metavar="N", help="steps of cw")
    add("--step-size", type=runtime.ratio, metavar="S", help="step of pgd, pgd-kl, pgd-ls, cw (default: epsilon / 10)")
    add("--random-start", choices=attacks.RANDOM_STARTS, default="uniform", help="where these four start")
    add("--restarts", type=runtime.positive_int, default=1, metavar="R", help="run these four from R starts, all count")
    add("--any-step", action="store_true", help="count any step that breaks an image, as RST does; crafts in float32")
    add("--alphas", nargs="+", type=runtime.unit_float, metavar="A", help="run pgd-ls, which needs them, with each α")
    add("--kappas", nargs="+", type=runtime.natural_float, metavar="K", default=[50.0],
        help="run cw with each confidence κ; one below 1 is crafted in float32")
    add("--pool", action="store_true", help="attack only what the attacks before left standing; the rows accumulate")
    add("--tf32", action="store_true", help="let apgd and autoattack too use a GPU's TF32; the counting never does")
    add = add_machine_flags(parser)
    add("--save-examples", metavar="FILE", help="write each image's predictions and margins to this .npz")
    add("--save-images", action="store_true",
        help="put the attacked images into it, float32, 12 kB each; those of all rows are kept in memory")
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
    """Add what is evaluated at which radius, here and in audit.py. images: how many by default, for the help."""
    parser.set_defaults(attacks=None, epsilons=None, oracle=None, save_examples=None)  # which one of the two has
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--model-path", required=True, metavar="FILE", help="a checkpoint of train_cifar.py, or a released state dict")
    add("--dataset", help="cifar10, cifar100, digits or a folder (default: the one the model was trained on)")
    add("--data-dir", default="data", metavar="DIR", help="where CIFAR is, or is downloaded to")
    add("--num-images", type=runtime.positive_int, metavar="N", help=f"take the first N images (default: {images})")
    add("--num-classes", type=runtime.positive_int, metavar="K",
        help="refuse the file if it has another number of classes (default: take what it has)")
    add_file_flags(add)
    add("--epsilon", type=runtime.ratio, metavar="E", help="radius of the L-inf ball (default: "
        f"{data.EPSILON}; digits: {data.EPSILON_DIGITS})")
    add("--seed", type=runtime.natural_int, default=0, help="seed of the random starts")


def add_file_flags(add):
    """Add, by the function `add`, the flags that say what a released model's file cannot."""
    add("--arch", help="refuse the file if it holds another architecture (default: take what it holds); "
        "preact-resnet-18-x is fast_adversarial's, whose projections see a block's input")
    add("--weights", metavar="NAME", help="which of several sets of weights to take, such as swa_state_dict")
    add("--normalize", nargs=2, type=runtime.three_numbers, metavar=("MEAN", "STD"), help="how a released model's "
        f"training images were normalised, such as {USUAL_NORMALISATIONS[0]} (default: not at all)")


def add_machine_flags(parser):
    """Add the flags of how to compute and of the JSON, and return the latter's function to add more."""
    add = runtime.add_runtime_flags(parser, default="auto")
    add("--batch-size", type=runtime.positive_int, default=256, metavar="N",
        help="images at a time; alters the outcome of apgd and autoattack only")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write the result there, part by part (default: no file)")
    return add


def load(args):
    """Return (model, info, all test images, the data set's name) by the flags above, and fill in args.epsilon. Raise
    ValueError; ArithmeticError for a checkpoint whose ε is no number."""
    taken = [pathlib.Path(path).resolve() for path in (args.model_path, args.oracle) if path]
    for flag, path in (("--json", args.json), ("--save-examples", args.save_examples)):
        runtime.check_output(flag, path)
        if path and pathlib.Path(path).resolve() in taken:
            raise ValueError(f"{flag} {path}: another flag names that file too")
        taken.append(path and pathlib.Path(path).resolve())
    model, info = checkpoints.load_model(args.model_path, arch=args.arch, num_classes=args.num_classes,
                                         normalize=args.normalize, weights=args.weights)
    trained = {"defense": "standard", "dataset": "cifar100" if info["num_classes"] == 100 else "cifar10"}
    trained |= info.get("args", {})
    dataset = args.dataset or trained["dataset"]
    test = data.fitted(data.load(dataset, args.data_dir, train=False), dataset, info)
    if args.num_images and args.num_images > len(test.labels):
        raise ValueError(f"--num-images {args.num_images}: {dataset} has {len(test.labels)} test images")
    args.epsilon = args.epsilon or data.default_epsilon(dataset)
    radii = args.epsilons or [args.epsilon]
    if trained["defense"] != "standard" and args.attacks != ["natural"]:
        if Fraction(trained["epsilon"]) not in map(Fraction, radii):
            info["notes"].append(f"trained at ε {trained['epsilon']}, attacked at ε {', '.join(radii)}")
    return model, info, test, dataset


def say_notes(model, info, device, images, labels):
    """Print, to stderr, what the model's file left open. Where that is the normalisation, note first which of the usual
    ones does better than none, and than those before it, by three standard errors, on the first 200 of the images
    (N, C, H, W) uint8 with labels (N,), or None. So few do not tell CIFAR-10's two apart."""
    if checkpoints.ASSUMED in info["notes"] and labels is not None:
        images, labels, hint = images[:200].to(device), labels[:200].to(device), None
        best = plain = attacked_logits(model.to(device), images, labels).argmax(1) == labels
        for flag in USUAL_NORMALISATIONS:
            normalised = models.Normalised(model, *map(runtime.three_numbers, flag.split())).to(device)
            right = attacked_logits(normalised, images, labels).argmax(1) == labels
            gains = right.float() - best.float()
            if gains.sum() > 3 * gains.norm():
                best, hint = right, f"did you mean --normalize {flag}?"
        if hint:
            info["notes"].append(f"{hint} {best.sum()} of {len(labels)} images are right with it, not {plain.sum()}")
    if runtime.rank_and_world()[0] == 0:
        for note in info["notes"]:
            print(f"{info['path']}: {note}", file=sys.stderr)


# The result: a JSON, and a table on the screen. -----------------------------------------------------------------------


def new_result(prog, argv, args, info, dataset, test, device):
    """Return what the JSON begins with, here and in audit.py."""
    return {"model": describe(info, dataset), "n": len(test.labels), "images": data.fingerprint(test),
            "epsilon": ", ".join(args.epsilons or [args.epsilon]), "device": device_name(device),
            "precision": args.precision, "batch_size": args.batch_size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": command(prog, argv), "complete": False}


def describe(info, dataset):
    """Return what the JSON says of the model."""
    args = info.get("args", {})
    return {key: info[key] for key in ("path", "sha256", "arch", "normalize", "weights", "notes")} | {
        "dataset": dataset, "defense": args.get("defense"), "spat_alpha": args.get("spat_alpha"),
        "epochs": info.get("epoch"), "seed": args.get("seed"), "trained_on": info.get("trained_on"), "args": args}


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


def outcome(name, params, right, seconds=0.0):
    """Return the entry in the JSON of a row that leaves these images right, (n,) bool."""
    from scipy.stats import binomtest  # here, as its import takes a second

    n, correct = len(right), int(right.sum())
    interval = binomtest(correct, n).proportion_ci(0.95, "wilson")
    return {"name": name, "params": params, "n": n, "correct": correct, "accuracy": correct / n,
            "interval": (float(interval.low), float(interval.high)), "seconds": round(seconds, 2),
            "correct_mask": np.packbits(right.cpu().numpy()).tobytes().hex()}


def correct_mask(entry):
    """Return which images are right, (n,) bool, by an entry in the JSON."""
    bits = np.frombuffer(bytes.fromhex(entry["correct_mask"]), np.uint8)
    return np.unpackbits(bits)[: entry["n"]].astype(bool)


def settings(entry):
    """Return the parameters of an entry, with radius and step as numbers: 8/255 and 16/510 are equal."""
    return {key: Fraction(value) if key in ("epsilon", "step_size") else value
            for key, value in entry["params"].items()}


def worst_case(entries):
    """Return the entry of the images that are right in every one of these entries."""
    right = torch.from_numpy(np.logical_and.reduce([correct_mask(entry) for entry in entries]))
    return outcome("Worst case", {"of": [entry["name"] for entry in entries]}, right)


def spat_shares(natural, attacked, y, alpha=None):
    """Return the shares of losses.spat_counts for an entry, that of confident images for PGD-LS only; logits (n, K)."""
    confident, easier = (losses.spat_counts(natural, attacked, y, alpha or 0.0).double() / len(y)).tolist()
    if alpha is None:
        return {"share_made_easier": easier}
    return {"share_made_easier": easier, "share_p_y_above_1_minus_alpha": confident}


def crafted_in(result):
    """Return in words what arithmetic a result's attacks crafted in."""
    precision = result.get("precision", "unknown precision")
    return f"{precision} (TF32 in convolutions)" if result.get("tf32") and precision == "fp32" else precision


def table(result):
    """Return the result as text, for the screen."""
    model, crafted = result["model"], f"attacks at ε {result['epsilon']} crafted in {crafted_in(result)}"
    head = [f"{model['path']}: {model['arch']} on {model['dataset']}"]
    if model["defense"]:
        spat = "" if model["spat_alpha"] is None else f" + SPAT (α {model['spat_alpha']:g})"
        epochs = model["args"].get("epochs", model["epochs"])
        head += [model["defense"] + spat,
                 f"{epochs} epochs" if model["epochs"] == epochs else f"epoch {model['epochs']} of {epochs}",
                 f"seed {model['seed']}"]
    if model.get("weights"):
        head.append(f"its {model['weights']}")
    exact = [entry["name"] for entry in result["attacks"] if "after" in entry or "precision" in entry["params"]]
    if exact and result["precision"] != "fp32":
        crafted += f", {' and '.join(exact)} in fp32"
    if not result["complete"]:
        crafted += "; INCOMPLETE, it was stopped"
    lines = [", ".join(head), *model.get("notes", []), f"the first {result['n']} test images; {crafted}", "",
             f"{'attack':<16} {'correct':>13} {'accuracy':>9}   95 % interval   {'seconds':>7}"]
    for entry in result["attacks"]:
        low, high = entry["interval"]
        lines.append(f"{entry['name']:<16} {entry['correct']:>6}/{entry['n']:<6} {entry['accuracy']:>8.2%}   "
                     f"{100 * low:5.2f} - {100 * high:5.2f}   {entry['seconds']:>7.0f}")
        for component, share in entry.get("after", {}).items():
            lines.append(f"  after {component:<10} {'':>13} {share:>8.2%}")
    return "\n".join(lines)


def stopped(args, result, rows):
    """Return the entries, those of the first rows, in the file of --json where this very evaluation was stopped; [] if
    none was. What was stopped there otherwise is kept beside it. --save-examples needs margins, which no file has."""
    try:
        before = read(args.json)
    except ValueError:  # no such file
        return []
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # in a file that was edited
        heads = [{key: value for key, value in head.items() if key not in ("command", "attacks")}
                 | {"device": head["device"].partition(",")[0]}  # without the number of threads
                 for head in (before, json.loads(json.dumps(result)))]
        entries = before["attacks"]
        if heads[0] == heads[1] and not args.save_examples:
            if len(entries) <= len(rows) and all(map(belongs, entries, rows)):
                return entries
    if before.get("complete") is False:
        pathlib.Path(args.json).replace(f"{args.json}.old")
        print(f"{args.json}: another evaluation was stopped there, kept as {args.json}.old", file=sys.stderr)
    return []


def belongs(entry, row):
    """Return whether an entry is that of the row, or of its first components."""
    finished = entry["params"].get("components", [])
    if finished and finished != row.params.get("components"):
        row = with_components(row, row.params["components"][:len(finished)])
        if list(entry["after"]) != finished:
            return False
    return (entry["name"], entry["params"]) == row and entry["seconds"] >= 0


def write(path, result):
    """Write the result as a JSON file, from the first process, or nothing if path is None. Raise OSError."""
    if path is not None and runtime.rank_and_world()[0] == 0:
        checkpoints.write_atomically(path, json.dumps(result, indent=1).encode())


def read(path):
    """Return a result of eval_attacks.py. Raises ValueError if the file is not one."""
    try:
        result = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        entries = result["attacks"][:]  # an error where they are no list
        masks = [(entry["name"], settings(entry), correct_mask(entry))[2] for entry in entries]
        if all(len(mask) == result["n"] for mask in masks) and result["model"]["dataset"]:
            return result
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{path}: not a result of eval_attacks.py ({type(error).__name__})") from None
    raise ValueError(f"{path}: not a result of eval_attacks.py (its masks do not fit its n)")


if __name__ == "__main__":
    main()
