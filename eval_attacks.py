"""Accuracy of a trained model under attack: one table on the screen, and one JSON file.

    python eval_attacks.py --model-path runs/NAME/best.pt                 # Natural, FGSM, PGD-20, CW-inf
    python eval_attacks.py --model-path trades.pt --attacks natural autoattack --num-images 1000 --json result.json
    python eval_attacks.py --model-path runs/NAME/best.pt --attacks pgd-kl pgd-ls --alphas 0 0.1 0.3

The attacks may craft in bf16; the accuracy is always counted in float32 on the final images.
"""

import contextlib
import functools
import platform
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
import models
import scores

ATTACKS = ("natural", "fgsm", "pgd", "cw", "pgd-kl", "pgd-ls", "apgd", "autoattack")
PROTOCOLS = {  # flags that stand for a published evaluation; a typed one wins
    "paper": {},
    "rst": dict(attacks=["natural", "pgd"], epsilon="0.031", step_size="0.003", num_steps=20),
    "rst-restarts": dict(attacks=["natural", "pgd"], epsilon="0.031", step_size="0.01", num_steps=40, restarts=5,
                         any_step=True),
}


def add_model_flags(parser, images="all"):
    """What a model is evaluated on, here and in audit.py; images: how many by default, for the help."""
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--model-path", required=True, metavar="FILE", help="a checkpoint of train_cifar.py, or a released state dict")
    add("--dataset", help="cifar10, cifar100, digits or a folder (default: the one the model was trained on)")
    add("--data-dir", default="data", metavar="DIR", help="where CIFAR is, or is downloaded to")
    add("--num-images", type=cli.positive_int, metavar="N", help=f"take the first N test images (default: {images})")
    add("--arch", help="refuse the file if it holds another architecture (default: take what it holds)")
    add("--num-classes", type=cli.positive_int, metavar="K",
        help="refuse the file if it has another number of classes (default: take what it has)")
    add("--normalize", nargs=2, type=cli.three_numbers, metavar=("MEAN", "STD"),
        help="how a released model's training images were normalised, such as 0.4914,0.4822,0.4465 "
        "0.2471,0.2435,0.2616 (default: not at all)")


def add_machine_flags(parser):
    add = cli.add_runtime_flags(parser, default="auto").add_argument
    add("--batch-size", type=cli.positive_int, default=256, metavar="N",
        help="images at a time; alters the outcome of apgd and autoattack only")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write the result there, part by part (default: no file)")
    return add


def parse_args(argv=None):
    parser = cli.Parser(prog="eval_attacks.py", description=__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("attacks").add_argument
    add("--attacks", nargs="+", choices=ATTACKS, default=["natural", "fgsm", "pgd", "cw"], metavar="ATTACK",
        help=f"which attacks to run, of {', '.join(ATTACKS)}; apgd is APGD-CE and APGD-T, the first half of AutoAttack")
    add("--protocol", choices=PROTOCOLS, default="paper", help="settings to start from; paper: the defaults below; "
        "rst: Table 4's PGD-20 at ε 0.031; rst-restarts: RST's own 40 steps, 5 restarts, broken if any step breaks")
    add("--epsilon", type=cli.ratio, metavar="E", help="radius of the L-inf ball (default: "
        f"{data.EPSILON['cifar10']}; digits: {data.EPSILON['digits']})")
    add("--epsilons", nargs="+", type=cli.ratio, metavar="E", help="run every attack at each of these radii")
    add("--num-steps", type=cli.positive_int, default=20, metavar="N", help="steps of pgd, pgd-kl and pgd-ls")
    add("--steps-sweep", nargs="+", type=cli.positive_int, metavar="N", help="run these three with each number of them")
    add("--cw-steps", type=cli.positive_int, default=30, metavar="N", help="steps of cw")
    add("--step-size", type=cli.ratio, metavar="S", help="step of pgd, pgd-kl, pgd-ls and cw (default: epsilon / 10)")
    add("--random-start", choices=attacks.RANDOM_STARTS, default="uniform", help="where these four start")
    add("--restarts", type=cli.positive_int, default=1, metavar="R", help="run these four from R starts, each counts")
    add("--any-step", action="store_true", help="count any step that breaks an image, as RST does; crafts in float32")
    add("--alphas", nargs="+", type=cli.unit_float, metavar="A", help="run pgd-ls, which needs them, with each α")
    add("--kappas", nargs="+", type=cli.natural_float, metavar="K", default=[50.0],
        help="run cw with each confidence κ; one below 1 is crafted in float32")
    add("--pool", action="store_true", help="attack only what the attacks before left standing; the rows accumulate")
    add("--seed", type=cli.natural_int, default=0, help="seed of the random starts")
    add("--tf32", action="store_true", help="let what is crafted in float32 use a GPU's TF32; the counting never does")
    add = add_machine_flags(parser)
    add("--save-examples", metavar="FILE", help="write each image's predictions and margins to this .npz")
    add("--save-images", action="store_true", help="put the attacked images into it, float32, 12 kB each")
    typed = parser.parse_args(argv)
    parser.set_defaults(**PROTOCOLS[typed.protocol] | ({"epsilon": None} if typed.epsilons else {}))
    args = parser.parse_args(argv)
    for wrong, why in (
        (("pgd-ls" in args.attacks) != bool(args.alphas), "--attacks pgd-ls and --alphas go together"),
        ("pgd-kl" in args.attacks and args.random_start == "none", "--random-start none: pgd-kl would not move"),
        (args.restarts > 1 and args.random_start == "none", "--restarts: without a random start all are the same"),
        (args.epsilon and args.epsilons, "--epsilon and --epsilons exclude one another"),
        (args.pool and args.epsilons, "--pool: an image broken at one radius may stand at another of --epsilons"),
        (args.tf32 and (args.device == "cpu" or not torch.cuda.is_available()), "--tf32: a CPU does not have it"),
        (args.save_images and not args.save_examples, "--save-images goes with --save-examples"),
    ):
        if wrong:
            parser.error(why)
    return parser, args


def rows_at(epsilon, args):
    """{flag of --attacks: [(name, parameters), ...]} at one radius."""
    base = {"epsilon": epsilon, "step_size": args.step_size or str(Fraction(epsilon) / 10), "num_steps": args.num_steps,
            "random_start": args.random_start, "seed": args.seed}
    base |= {"restarts": args.restarts} if args.restarts > 1 else {}
    fp32 = {"precision": "fp32"}  # where one step decides: in bf16 it may fall short of float32's boundary
    base |= {"any_step": True} | fp32 if args.any_step else {}
    rule = (f" x{args.restarts}" if args.restarts > 1 else "") + (" any step" if args.any_step else "")
    official = {"epsilon": epsilon, "version": "standard", "seed": args.seed, "batch_size": args.batch_size}
    official |= {"processes": world} if (world := cli.rank_and_world()[1]) > 1 else {}
    sweep = [(n, base | {"num_steps": n}) for n in args.steps_sweep or [args.num_steps]]
    return {
        "fgsm": [("FGSM", dict(epsilon=epsilon, objective="ce", step_size=epsilon, num_steps=1, random_start="none"))],
        "pgd": [(f"PGD-{n}{rule}", {"objective": "ce"} | steps) for n, steps in sweep],
        "cw": [(f"CW-inf{'' if kappa == 50 else f' κ {kappa:g}'}{rule}", {"objective": "cw", "kappa": kappa} | base
                | {"num_steps": args.cw_steps} | (fp32 if kappa < 1 else {})) for kappa in args.kappas],
        "pgd-kl": [(f"PGD-{n}-KL{rule}", {"objective": "kl"} | steps) for n, steps in sweep],
        "pgd-ls": [(f"PGD-{n}-LS {alpha:g}{rule}", {"objective": "lsce", "alpha": alpha} | steps)
                   for n, steps in sweep for alpha in args.alphas or ()],
        "apgd": [("APGD-CE + APGD-T", {"components": ["apgd-ce", "apgd-t"]} | official)],
        "autoattack": [("AutoAttack", {"components": list(attacks.COMPONENTS)} | official)],
    }


def attack_list(args):
    """The Attacks asked for, radius by radius in the paper's order."""
    listed = [scores.Attack("Natural", {})] if "natural" in args.attacks else []
    for epsilon in args.epsilons or [args.epsilon]:
        suffix = f" ε {epsilon}" if args.epsilons else ""
        listed += [scores.Attack(name + suffix, params) for flag, rows in rows_at(epsilon, args).items()
                   if flag in args.attacks for name, params in rows]
    if args.pool:
        names = [attack.name for attack in listed]
        listed = [attack._replace(params=attack.params | {"pool": names[:i]}) if attack.params else attack
                  for i, attack in enumerate(listed)]
    return listed


def load(args):
    """(model, info, the test images asked for, the data set's name) by the flags above; raises ValueError."""
    cli.check_output("--json", args.json)
    model, info = checkpoints.load_model(args.model_path, arch=args.arch, num_classes=args.num_classes,
                                         normalize=args.normalize)
    trained_on = info.get("args", {}).get("dataset")
    dataset = args.dataset or trained_on or {100: "cifar100"}.get(info["num_classes"], "cifar10")
    test = data.load(dataset, args.data_dir, train=False)
    if len(test.classes) != info["num_classes"]:
        raise ValueError(f"{args.model_path} has {info['num_classes']} classes, {dataset} has {len(test.classes)}")
    if args.num_images and args.num_images > len(test.labels):
        raise ValueError(f"--num-images {args.num_images}: {dataset} has {len(test.labels)} test images")
    return model, info, test.subset(slice(args.num_images)), dataset


def official_attack(model, test, chosen, params, bar):
    """pyautoattack, in float32, on the images of the mask `chosen`: (a function (x, y, indices) -> x_adv that looks its
    results up, {component: the share of all images that stand after it})."""
    (rank, world), x_adv, after = cli.rank_and_world(), data.to_float(test.images), {}
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
    after = {name: cli.sum_over_processes(count).item() / len(test.labels) for name, count in after.items()}
    return (lambda x, y, indices: x_adv[indices]), after


def run_attack(attack, forward, images, chosen, tf32, bar):
    """One row's attack, crafted by the callable `forward`, on the images of the mask `chosen`; of several restarts each
    on what those before left standing. Returns extra entries of the row."""
    crafting = attacks.tf32(tf32 and "precision" not in attack.params)
    if not attack.params:
        images.attack(None, chosen, bar.update)
    elif "components" in attack.params:
        look_up, after = crafting(official_attack)(images.model, images.test, chosen, attack.params, bar)
        images.attack(look_up, chosen, bar.update)
        return {"after": after}
    else:
        craft, passes = crafting(scores.make_attack(forward, attack.params)), 1 + attack.params["num_steps"]
        for restart in range(attack.params.get("restarts", 1)):
            images.attack(functools.partial(craft, restart=restart), chosen, lambda n: bar.update(n * passes))
            chosen = chosen & images.right()
    return {}


def crafting_passes(args, model, test, todo):
    """The callables x -> logits that craft: (in args.precision, in float32)."""
    n, world = len(test.labels), cli.rank_and_world()[1]
    x = data.to_float(test.images[:min(args.batch_size, -(-n // world))])
    passes = sum(attack.passes for attack in todo if "components" not in attack.params)
    _, forward = attacks.tf32(args.tf32)(cli.forward_passes)(args, model, x, passes * n / len(x) / world)
    if (args.tf32 or args.precision != "fp32") and any("precision" in attack.params for attack in todo):
        return forward, cli.fast_pass(model, cli.forward_pass(model), x, args.compile)[0]
    return forward, forward


def evaluate(model, test, args, result, device):
    """Run the attacks of args on the test images and append their outcomes to result["attacks"]."""
    todo, model, test = attack_list(args), model.to(device), test.to(device)
    forward, forward_fp32 = crafting_passes(args, model, test, todo)
    result |= {"precision": args.precision, "tf32": args.tf32, "compile": args.compile}
    images = scores.AttackedImages(model, test, args.batch_size, args.compile != "off", args.save_images)
    natural, examples = None, {"labels": test.labels.cpu().numpy()}
    with models.frozen(model), Progress(todo, len(test.labels)) as bar:
        for attack in todo:
            start = bar.begin(attack)
            chosen = images.right() if args.pool else torch.ones_like(test.labels, dtype=torch.bool)
            craft_by = forward_fp32 if "precision" in attack.params else forward
            extra = run_attack(attack, craft_by, images, chosen, args.tf32, bar) if chosen.any() else {}
            if not attack.params:
                natural = images.logits
            elif natural is not None and not args.pool:
                extra |= scores.spat_shares(natural, images.logits, test.labels, attack.params.get("alpha"))
            row = scores.outcome(attack.name, attack.params, images.right().cpu(), time.perf_counter() - start) | extra
            result["attacks"].append(row)
            bar.end(attack, row, len(test.classes))
            if args.save_examples:
                examples |= images.examples(attack.name)
            write(args, result, examples)
        if sum(bool(attack.params) for attack in todo) > 1 and not args.epsilons:
            result["attacks"].append(scores.worst_case(result["attacks"]))
        result["complete"] = True
        write(args, result, examples)


class Progress(tqdm):
    """A bar over the forward passes of all attacks."""

    def __init__(self, todo, n):
        rank, world = cli.rank_and_world()
        self.images, self.passes_done = -(-n // world), 0
        super().__init__(total=sum(attack.passes for attack in todo) * self.images, unit="pass", unit_scale=True,
                         dynamic_ncols=True, disable=rank > 0)

    def begin(self, attack):
        self.set_description(attack.name)
        return time.perf_counter()

    def end(self, attack, row, num_classes):
        self.passes_done += attack.passes * self.images
        self.update(self.passes_done - self.n)  # what was skipped, as images fell before
        self.set_postfix_str(f"{row['name']} {row['accuracy']:.1%}, {row['n'] / max(row['seconds'], 0.01):.0f} img/s")
        if not attack.params and row["accuracy"] <= 1 / num_classes + 0.05:
            self.write(f"warning: {row['accuracy']:.1%} natural accuracy is near chance: probably wrong preprocessing "
                       "(--normalize), or the labels are in another order", file=sys.stderr)


def write(args, result, examples):
    if cli.rank_and_world()[0] == 0:
        scores.write(args.json, result)
        if args.save_examples:
            checkpoints.write_atomically(args.save_examples, lambda file: np.savez_compressed(file, **examples))


def main(argv=None):
    parser, args = parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            device, rank, _ = stack.enter_context(cli.join_job(args.device))
            model, info, test, dataset = load(args)
            cli.check_output("--save-examples", args.save_examples)
            if {"apgd", "autoattack"} & set(args.attacks):
                attacks.check_autoattack(info["num_classes"])
        except (ValueError, OSError) as error:
            parser.error(error)
        args.epsilon = ", ".join(args.epsilons or [args.epsilon or data.EPSILON.get(dataset, "8/255")])
        result = {
            "model": scores.describe(info, dataset), "n": len(test.labels), "epsilon": args.epsilon,
            "device": scores.device_name(device), "precision": args.precision, "batch_size": args.batch_size,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "command": scores.command(parser.prog, argv), "complete": False, "attacks": []}
        try:
            evaluate(model, test, args, result, device)
        except KeyboardInterrupt:  # what is finished stands in the JSON, marked as incomplete
            print(scores.table(result))
            sys.exit(130)
        except cli.FAULTS as error:
            sys.exit(f"{parser.prog}: {error}")
        if rank == 0:
            print(scores.table(result))
        return result


if __name__ == "__main__":
    main()
