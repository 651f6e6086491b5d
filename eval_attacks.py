"""Accuracy of a trained model under attack: one table on the screen, and one JSON file.

    python eval_attacks.py --model-path runs/NAME/best.pt

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
import losses
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
    add = parser.add_argument
    add("--model-path", required=True, metavar="FILE", help="a checkpoint of train_cifar.py, or a released state dict")
    add("--num-images", type=cli.positive_int, metavar="N", help=f"the first N test images (default: {images})")
    add("--seed", type=cli.natural_int, default=0, help="of the random starts (default: 0)")
    add("--dataset", help="cifar10, cifar100, digits or a folder (default: the one the model was trained on)")
    add("--data-dir", default="data", metavar="DIR", help="where CIFAR is, or is downloaded to (default: data)")
    add("--arch", help="refuse the file if it holds another architecture (default: take what it holds)")
    add("--num-classes", type=cli.positive_int, help="refuse the file if it has another number (default: as it has)")
    add("--normalize", nargs=2, type=cli.three_numbers, metavar=("MEAN", "STD"),
        help="of a released model's training images, such as 0.4914,0.4822,0.4465 0.2471,0.2435,0.2616 (default: none)")
    add("--json", metavar="FILE", help="write the result there, part by part (default: no file)")
    cli.add_runtime_flags(parser, default="auto")


def parse_args(argv=None):
    parser = cli.Parser(prog="eval_attacks.py", description=__doc__)
    add = parser.add_argument
    add_model_flags(parser)
    add("--attacks", nargs="+", choices=ATTACKS, default=["natural", "fgsm", "pgd", "cw"], metavar="ATTACK",
        help=f"of {', '.join(ATTACKS)} (default: natural fgsm pgd cw, the columns of the paper's Table 3); apgd is "
        "APGD-CE and APGD-T, the first half of AutoAttack")
    add("--protocol", choices=PROTOCOLS, default="paper",
        help="paper: the defaults below; rst: Table 4's PGD-20 at ε 0.031 with step 0.003; rst-restarts: RST's own 40 "
        "steps of 0.01, 5 restarts, broken if any step breaks (default: paper)")
    add("--alphas", nargs="+", type=cli.unit_float, metavar="A", help="values of α for pgd-ls, which needs them")
    add("--kappas", nargs="+", type=cli.natural_float, metavar="K", default=[50.0],
        help="of cw; one below 1 is crafted in float32 (default: 50)")
    add("--epsilon", type=cli.ratio, help="radius of the L-inf ball (default: 8/255; digits: 0.05)")
    add("--epsilons", nargs="+", type=cli.ratio, metavar="E", help="a sweep: every attack at each of these radii")
    add("--num-steps", type=cli.positive_int, default=20, help="of pgd, pgd-kl and pgd-ls (default: 20)")
    add("--steps-sweep", nargs="+", type=cli.positive_int, metavar="N", help="a sweep: these three with each number")
    add("--cw-steps", type=cli.positive_int, default=30, help="of cw (default: 30)")
    add("--step-size", type=cli.ratio, help="of pgd*, cw (default: epsilon / 10)")
    add("--random-start", choices=attacks.RANDOM_STARTS, default="uniform", help="of pgd*, cw (default: uniform)")
    add("--restarts", type=cli.positive_int, default=1, metavar="R", help="of pgd*, cw: each start counts (default: 1)")
    add("--any-step", action="store_true", help="... or if any step does, RST's rule; crafted in float32")
    add("--pool", action="store_true", help="attack only what the attacks before left standing; the rows accumulate")
    add("--batch-size", type=cli.positive_int, default=256, help="alters apgd and autoattack only (default: 256)")
    add("--tf32", action="store_true", help="on a GPU: what is crafted in float32 may use TF32; not the counting")
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


def attack_list(args):
    """The attacks asked for, radius by radius in the paper's order: (name, parameters as they go into the JSON)."""
    listed = [("Natural", {})] if "natural" in args.attacks else []
    for epsilon in args.epsilons or [args.epsilon]:
        radius = {"epsilon": epsilon}
        base = radius | {"step_size": args.step_size or str(Fraction(epsilon) / 10), "num_steps": args.num_steps,
                         "random_start": args.random_start, "seed": args.seed}
        base |= {"restarts": args.restarts} if args.restarts > 1 else {}
        exact = {"precision": "fp32"}  # where one step decides: in bf16 it may fall short of float32's boundary
        base |= {"any_step": True} | exact if args.any_step else {}
        rule = (f" x{args.restarts}" if args.restarts > 1 else "") + (" any step" if args.any_step else "")
        official = radius | {"version": "standard", "seed": args.seed, "batch_size": args.batch_size}
        official |= {"processes": world} if (world := cli.rank_and_world()[1]) > 1 else {}
        rows = {name: [] for name in ATTACKS}
        rows["fgsm"] = [("FGSM", radius | dict(objective="ce", step_size=epsilon, num_steps=1, random_start="none"))]
        for n in args.steps_sweep or [args.num_steps]:
            steps = base | {"num_steps": n}
            rows["pgd"] += [(f"PGD-{n}{rule}", {"objective": "ce"} | steps)]
            rows["pgd-kl"] += [(f"PGD-{n}-KL{rule}", {"objective": "kl"} | steps)]
            rows["pgd-ls"] += [(f"PGD-{n}-LS {alpha:g}{rule}", {"objective": "lsce", "alpha": alpha} | steps)
                               for alpha in args.alphas or ()]
        rows["cw"] = [(f"CW-inf{'' if kappa == 50 else f' κ {kappa:g}'}{rule}", {"objective": "cw", "kappa": kappa}
                       | base | {"num_steps": args.cw_steps} | (exact if kappa < 1 else {})) for kappa in args.kappas]
        rows["apgd"] = [("APGD-CE + APGD-T", {"components": ["apgd-ce", "apgd-t"]} | official)]
        rows["autoattack"] = [("AutoAttack", {"components": list(attacks.COMPONENTS)} | official)]
        suffix = f" ε {epsilon}" if args.epsilons else ""
        listed += [(name + suffix, params) for key in ATTACKS if key in args.attacks for name, params in rows[key]]
    if args.pool:
        listed = [(name, params | {"pool": [before for before, _ in listed[:i]]} if params else params)
                  for i, (name, params) in enumerate(listed)]
    return listed


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
        with torch.no_grad():
            target = forward(x).float().softmax(1) if params["objective"] == "kl" else y

        def iterate(model):
            return attacks.pgd(model, x, target, objective, epsilon=epsilon, random_start=start,
                               step_size=float(Fraction(params["step_size"])), num_steps=params["num_steps"])

        if params.get("any_step"):
            return attacks.worst_iterate(iterate, forward, functools.partial(losses.margin, y=y))
        return iterate(forward)

    return attack


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


def official_attack(model, test, only, params, bar):
    """pyautoattack, in float32, on the images at the positions `only`: (a function (x, y, indices) -> x_adv that looks
    its results up, {component: how many of them stand after it})."""
    x_adv, after = data.to_float(test.images), {}

    def logits(x):
        bar.update(len(x))
        return attacks.for_autoattack(model)(x)

    def note(component, robust):
        after[component] = robust.sum()
        bar.set_postfix_str(f"{robust.float().mean():.1%} stand after {component}")

    x_adv[only] = attacks.autoattack(
        logits, x_adv[only], test.labels[only], epsilon=float(Fraction(params["epsilon"])), seed=params["seed"],
        batch_size=params["batch_size"], components=params["components"], on_component=note)
    return (lambda x, y, indices: x_adv[indices]), after


def run_attack(model, forward, test, params, standing, args, bar, x_adv):
    """(logits (N, K) of the attacked images, extra entries of the row); only the images at the positions `standing`
    are attacked, the rows of the others are zero. Of several restarts each attacks what those before left standing.
    x_adv, float32 like the images or None, receives the attacked ones."""
    rank, world = cli.rank_and_world()
    attack, cost, extra, logits, craft = None, 1, {}, 0, attacks.tf32(args.tf32 and "precision" not in params)
    if "components" in params:
        attack, after = craft(official_attack)(model, test, standing[rank::world], params, bar)
        extra["after"] = {k: cli.sum_over_processes(v).item() / len(test.labels) for k, v in after.items()}
    elif params:
        attack, cost = craft(make_attack(forward, params)), 1 + params["num_steps"]
    for restart in range(params.get("restarts", 1)):
        of_restart = functools.partial(attack, restart=restart) if restart else attack
        found = None if x_adv is None else torch.zeros_like(x_adv)
        size = args.batch_size if args.compile != "off" else min(args.batch_size, -(-len(standing) // world))
        latest = cli.sum_over_processes(attacks.attacked_logits(
            model, test.images, test.labels, of_restart, size, lambda n: bar.update(n * cost), rank, world,
            standing, found))
        if found is not None:
            x_adv[standing] = cli.sum_over_processes(found)[standing]
        logits = torch.where(latest.any(1, keepdim=True), latest, logits)
        standing = standing[latest[standing].argmax(1) == test.labels[standing]]
        if len(standing) == 0:
            break
    return logits, extra


def evaluate(model, test, args, result, device):
    """Run the attacks of args on the test images and append their outcomes to result["attacks"]."""
    todo, (rank, world), n = attack_list(args), cli.rank_and_world(), len(test.labels)
    model, test = model.to(device), test.to(device)
    batch_size = min(args.batch_size, -(-n // world))
    cost = [sum(attacks.COMPONENTS[c] for c in params["components"]) + 1 if "components" in params
            else (1 + params.get("num_steps", 0)) * params.get("restarts", 1) for _, params in todo]
    passes = sum(weight for (_, params), weight in zip(todo, cost, strict=True) if "components" not in params)
    x = data.to_float(test.images[:batch_size])
    forward = exact = attacks.tf32(args.tf32)(cli.pick_forward)(args, model, x, passes * n / batch_size / world)[1]
    if (args.tf32 or args.precision != "fp32") and any("precision" in params for _, params in todo):
        exact = cli.fast_pass(model, cli.forward_pass(model), x, args.compile)[0]
    result |= {"precision": args.precision, "tf32": args.tf32, "compile": args.compile}
    correct, logits, saved = torch.ones(n, dtype=torch.bool, device=device), None, {"labels": test.labels.cpu().numpy()}
    x_adv, natural = data.to_float(test.images) if args.save_images else None, None
    with models.frozen(model), tqdm(total=sum(cost) * -(-n // world), unit="pass", unit_scale=True,
                                    dynamic_ncols=True, disable=rank > 0) as bar:
        for (name, params), weight in zip(todo, cost, strict=True):
            bar.set_description(name)
            start, begun, extra = time.perf_counter(), bar.n, {}
            standing = correct.nonzero()[:, 0] if args.pool else torch.arange(n, device=device)
            if len(standing):
                of_precision = exact if "precision" in params else forward
                latest, extra = run_attack(model, of_precision, test, params, standing, args, bar, x_adv)
                logits = latest if logits is None else torch.where(latest.any(1, keepdim=True), latest, logits)
            natural = logits if not params else natural
            if params and natural is not None and not args.pool:
                extra |= scores.shares(natural, logits, test.labels, params.get("alpha"))
            correct = logits.argmax(1) == test.labels
            seconds = time.perf_counter() - start
            result["attacks"].append(scores.outcome(name, params, correct.cpu(), seconds) | extra)
            bar.update(begun + weight * -(-n // world) - bar.n)  # what was skipped
            bar.set_postfix_str(f"{name} {correct.float().mean():.1%}, {n / seconds:.0f} img/s")
            if not params and (accuracy := correct.float().mean().item()) <= 1 / logits.shape[1] + 0.05:
                bar.write(f"warning: {accuracy:.1%} natural accuracy is near chance: probably wrong "
                          "preprocessing (--normalize), or the labels are in another order", file=sys.stderr)
            if args.save_examples:
                saved[f"predictions/{name}"] = logits.argmax(1).cpu().numpy()
                saved[f"margins/{name}"] = losses.margin(logits, test.labels).cpu().numpy()
                if args.save_images:
                    saved[f"images/{name}"] = x_adv.cpu().numpy().copy()
            write(args, result, saved, rank)
        if sum(bool(params) for _, params in todo) > 1 and not args.epsilons:
            result["attacks"].append(scores.worst_case(result["attacks"]))
        result["complete"] = True
        write(args, result, saved, rank)


def write(args, result, saved, rank):
    if rank == 0:
        scores.write(args.json, result)
    if args.save_examples and rank == 0:
        checkpoints.write_atomically(args.save_examples, lambda file: np.savez_compressed(file, **saved))


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
