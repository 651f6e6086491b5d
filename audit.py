"""Can a model's robust accuracy be trusted, and does an attack preserve what the image shows?

    python audit.py --model-path runs/NAME/best.pt
    python audit.py --model-path A.pt --oracle B.pt

The first looks for gradient masking: the ways in which an accuracy under PGD can be high although the model is not
robust (Athalye et al. 2018; Carlini et al. 2019). The second asks another robust model what it sees in
the examples that fool the first.
"""

import functools
import itertools
import math
import sys
from fractions import Fraction

import torch
from tqdm import tqdm

import attacks
import checkpoints
import compare
import data
import eval_attacks
import losses
import models
import runtime

STEPS = (1, 5, 10, 20, 50, 100)
RESTARTS = 5
TOLERANCE = 0.01  # a share of images that may misbehave before a check speaks up
RESTART_GAIN = 0.03  # what more restarts may gain, by the lower end of its interval
WIDE_GAP = 0.10  # PGD-20 above APGD; 3.5 to 8.6 points were seen here without other signs of masking


def parse_args(argv=None):
    parser = runtime.Parser(prog="audit.py", description=__doc__)
    eval_attacks.add_model_flags(parser, images="256, or all if there are fewer")
    add = parser.add_argument_group("checks").add_argument
    add("--epsilon", type=runtime.ratio, metavar="E", help="radius of the L-inf ball (default: "
        f"{data.EPSILON['cifar10']}; digits: {data.EPSILON['digits']})")
    add("--square-queries", type=runtime.positive_int, default=1000, metavar="N",
        help="queries of the gradient-free attack")
    add("--autoattack", action="store_true", help="run all of AutoAttack, not APGD-CE and APGD-T only, a third of it")
    add("--oracle", metavar="FILE", help="let this other robust model judge what the attacks preserve; it gets images "
        "in [0, 1]")
    add("--alphas", nargs="+", type=runtime.unit_float, metavar="A", default=[0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0],
        help="let --oracle judge PGD-LS with each α")
    add("--seed", type=runtime.natural_int, default=0, help="seed of the random starts")
    eval_attacks.add_machine_flags(parser)
    return parser, parser.parse_args(argv)


class Bench:
    """A frozen model, the images, and what the checks ask of them."""

    def __init__(self, model, forward, test, args):
        self.model, self.forward, self.test, self.args = model, forward, test, args
        self.x, self.outcomes = data.to_float(test.images), {}

    def attacked(self, objective, epsilon=None, num_steps=20, restart=0, **params):
        """x_adv of PGD on the objective as eval_attacks.py runs it: uniform start, step ε/10."""
        epsilon = epsilon or self.args.epsilon
        attack = eval_attacks.make_attack(self.forward, params | {
            "objective": objective, "epsilon": epsilon, "step_size": str(Fraction(epsilon) / 10),
            "num_steps": num_steps, "random_start": "uniform", "seed": self.args.seed})
        return self.in_batches(functools.partial(attack, restart=restart))

    def in_batches(self, attack):
        """attack(x, y, indices), joined. All batches have one size (the last is filled up with the first images, which
        do not count twice), so that compiled code is not compiled twice."""
        n, size = len(self.x), min(self.args.batch_size, len(self.x))
        filled = torch.arange(-(-n // size) * size, device=self.x.device) % n
        return torch.cat([attack(self.x[i], self.test.labels[i], i) for i in filled.split(size)])[:n]

    def batches(self):
        return torch.arange(len(self.x), device=self.x.device).split(self.args.batch_size)

    def logits(self, x, model=None):
        with torch.no_grad():
            return torch.cat([(model or self.model)(x[i]).float() for i in self.batches()])

    def right(self, x):
        """Which images are classified correctly, (n,) bool on the CPU."""
        return (self.logits(x).argmax(1) == self.test.labels).cpu()

    def stands(self, objective="ce", epsilon=None, num_steps=20, restart=0):
        """Which images are still right after that PGD, (n,) bool on the CPU; run once, several checks ask for it."""
        key = objective, epsilon or self.args.epsilon, num_steps, restart
        if key not in self.outcomes:
            self.outcomes[key] = self.right(self.attacked(*key))
        return self.outcomes[key]


def raised(before, after):
    """Whether accuracy rises from the outcomes `before` to `after` on the same images, beyond noise: the 95 % interval
    of the paired difference lies above 0."""
    return compare.paired_difference(before.numpy(), after.numpy())["interval"][0] > 0


def never_raised(masks):
    """Whether no outcome is above the one before it."""
    return not any(raised(a, b) for a, b in itertools.pairwise(masks))


def share(mask):
    return mask.float().mean().item()


def shares_of(names, masks):
    return {str(name): share(mask) for name, mask in zip(names, masks, strict=True)}


# The checks: each a function of the bench -> (what it measured, whether it is as it should be, in words). -------------


def check_gradients(bench):
    """A zero or non-finite input gradient gives a sign attack nothing to follow."""
    bad = []
    for i in bench.batches():
        gradient = attacks.input_gradient(bench.model, bench.x[i], bench.test.labels[i], losses.cross_entropy)
        gradient = gradient.flatten(1)
        bad.append((gradient == 0).all(1) | ~gradient.isfinite().all(1))
    bad = share(torch.cat(bad))
    return {"zero or non-finite": bad}, bad <= TOLERANCE, (
        f"{bad:.1%} of the images have a zero or non-finite input gradient")


def check_order(bench):
    """Uniform noise must be weaker than FGSM, and FGSM weaker than PGD-20."""
    epsilon = float(Fraction(bench.args.epsilon))
    everyone = torch.arange(len(bench.x), device=bench.x.device)
    noise = attacks.project(bench.x + attacks.start_per_image("uniform", bench.x, epsilon, everyone, bench.args.seed),
                            bench.x, epsilon)
    fgsm = bench.in_batches(lambda x, y, _: attacks.fgsm(bench.forward, x, y, epsilon=epsilon))
    masks = [*map(bench.right, (bench.x, noise, fgsm)), bench.stands()]
    numbers = shares_of(("natural", "noise", "FGSM", "PGD-20"), masks)
    return numbers, never_raised(masks[1:]), ", ".join(f"{name} {value:.1%}" for name, value in numbers.items())


def check_radius(bench):
    """Within 0.5 of any image lies plain grey, which has no class: accuracy must fall to 0."""
    epsilons = sorted({Fraction(1, 2)} | {min(k * Fraction(bench.args.epsilon), Fraction(1, 2)) for k in (1, 2, 4)})
    epsilons = [str(epsilon) for epsilon in epsilons]
    masks = [bench.stands(epsilon=epsilon, num_steps=40) for epsilon in epsilons]
    fine = share(masks[-1]) <= TOLERANCE and never_raised(masks)
    return shares_of(epsilons, masks), fine, "accuracy under PGD-40 at " + ", ".join(
        f"ε {float(Fraction(epsilon)):.3f} {share(mask):.1%}" for epsilon, mask in zip(epsilons, masks, strict=True))


def check_steps(bench):
    """More steps must never raise the accuracy."""
    masks = [bench.stands(num_steps=steps) for steps in STEPS]
    return shares_of(STEPS, masks), never_raised(masks), "accuracy under PGD with " + ", ".join(
        f"{steps} steps {share(mask):.1%}" for steps, mask in zip(STEPS, masks, strict=True))


def check_restarts(bench):
    """Restarts can only lower the accuracy; where they lower it much, one run of PGD finds its way by luck."""
    masks = [bench.stands(restart=restart) for restart in range(RESTARTS)]
    standing = [torch.stack(masks[: k + 1]).all(0) for k in range(RESTARTS)]
    drop = compare.paired_difference(standing[-1].numpy(), standing[0].numpy())
    return shares_of(range(1, RESTARTS + 1), standing), drop["interval"][0] <= RESTART_GAIN, (
        f"PGD-20 {share(standing[0]):.1%}, with {RESTARTS} restarts {share(standing[-1]):.1%}")


def check_square(bench):
    """An attack that sees no gradient must not beat those that do: else the gradient is hidden. PGD runs on CE
    and on the margin, which Square attacks too: so it is the gradient that differs and not the objective."""
    model, epsilon = attacks.for_autoattack(bench.model), float(Fraction(bench.args.epsilon))
    # its draws depend on the batch and its model is not compiled: no batch is filled up
    found = torch.cat([attacks.square(model, bench.x[i], bench.test.labels[i], epsilon=epsilon,
                                      num_queries=bench.args.square_queries, seed=bench.args.seed)
                       for i in bench.batches()])
    ce, cw = (bench.stands(objective, num_steps=100) for objective in ("ce", "cw"))
    square, pgd = bench.right(found), ce & cw
    numbers = {"Square": share(square), "PGD-100": share(ce), "CW-100": share(cw), "both": share(pgd)}
    return numbers, not raised(square, pgd), (
        f"Square with {bench.args.square_queries} queries {share(square):.1%}, PGD-100 {share(ce):.1%}, CW-100 "
        f"{share(cw):.1%}, both {share(pgd):.1%}; {share(pgd & ~square):.1%} fall to Square alone")


def check_autoattack(bench):
    """How far the accuracy under PGD-20 lies above the one under stronger attacks."""
    components = list(attacks.COMPONENTS) if bench.args.autoattack else ["apgd-ce", "apgd-t"]
    name = "AutoAttack" if bench.args.autoattack else "APGD-CE + APGD-T"
    found = attacks.autoattack(
        attacks.for_autoattack(bench.model), bench.x, bench.test.labels, epsilon=float(Fraction(bench.args.epsilon)),
        batch_size=bench.args.batch_size, seed=bench.args.seed, components=components)
    pgd, strong = bench.stands(), bench.right(found)
    gap = share(pgd) - share(strong)
    return {"PGD-20": share(pgd), name: share(strong)}, gap <= WIDE_GAP, (
        f"PGD-20 {share(pgd):.1%}, {name} {share(strong):.1%}: {100 * gap:.1f} points lower")


CHECKS = {"gradients": check_gradients, "order": check_order, "radius": check_radius, "steps": check_steps,
          "restarts": check_restarts, "gradient-free": check_square, "stronger": check_autoattack}
AT_EPSILON = ("order", "steps", "restarts", "gradient-free", "stronger")  # their numbers are accuracies at one radius
MEANING = {
    "gradients": "sign attacks stand still there",
    "order": "a weaker attack does better than a stronger one: the gradient misleads",
    "radius": "PGD fails where success is certain: its number at the usual radius says nothing",
    "steps": "more steps raise the accuracy: the gradient misleads",
    "restarts": "success depends on the start: the loss is rugged, one run is too few",
    "gradient-free": "a gradient-free attack beats the gradient attacks: the gradient is masked",
    "stronger": "PGD-20 flatters this model: quote the stronger attack",
}


def verdict(checks):
    """What the checks mean for the reported accuracy, as lines."""
    flagged = [check for check in checks if not check["fine"]]
    lowest = min(value for check in checks if check["name"] in AT_EPSILON
                 for value in check["numbers"].values())
    if not flagged:
        return [f"Nothing here points to gradient masking. The lowest accuracy found is {lowest:.1%}: an upper bound, "
                "as every attack gives."]
    return [f"{check['name']}: {MEANING[check['name']]}" for check in flagged] + [
        f"An accuracy under PGD alone is not to be trusted here; the lowest found is {lowest:.1%}, if not lower."]


# What a second model sees. --------------------------------------------------------------------------------------------


def judged(bench, oracle, name, x_adv, epsilon):
    """The row of one attack: what the source model and the oracle make of x_adv, and how far it is from x. Over all
    images, but for oracle_agrees_where_source_fails. And where the oracle is right, (n,) bool."""
    delta = (x_adv - bench.x).flatten(1)
    seen = bench.logits(x_adv, oracle)
    agrees, fooled = (seen.argmax(1) == bench.test.labels).cpu(), ~bench.right(x_adv)
    return {"name": name, "epsilon": epsilon, "source_accuracy": 1 - share(fooled), "oracle_agrees": share(agrees),
            "oracle_agrees_where_source_fails": share(agrees[fooled]) if fooled.any() else None,
            "oracle_p_true": losses.p_true(seen, bench.test.labels).mean().item(),
            "l_inf": delta.abs().amax(1).mean().item(), "l2": delta.norm(dim=1).mean().item(),
            "at_edge": share(delta.abs() >= epsilon - 1e-6)}, agrees


def matched_radius(bench, accuracy, halvings=8):
    """(the smallest radius, by bisection below ε, at which PGD-20 on CE leaves at most this accuracy, True); (ε, False)
    where none below ε does."""
    low, high, found = Fraction(0), Fraction(bench.args.epsilon), False
    for _ in range(halvings):
        middle = (low + high) / 2
        if share(bench.stands(epsilon=str(middle))) <= accuracy:
            high, found = middle, True
        else:
            low = middle
    return high, found


def semantics(bench, oracle, progress):
    """A row for the natural images, PGD-CE, PGD-KL and each α of PGD-LS, each weaker attack followed by PGD-CE at the
    smaller radius that has the same success on the source model: a weaker attack preserves more, trivially. What it
    preserves beyond that is oracle_over_equal_ce, a paired difference."""
    epsilon = float(Fraction(bench.args.epsilon))
    rows = [judged(bench, oracle, "Natural", bench.x, epsilon)[0]]
    todo = [("PGD-CE", "ce", {}), ("PGD-KL", "kl", {})]
    todo += [(f"PGD-LS {alpha:g}", "lsce", {"alpha": alpha}) for alpha in bench.args.alphas]
    for name, objective, params in todo:
        row, agrees = judged(bench, oracle, name, bench.attacked(objective, **params), epsilon)
        rows.append(row)
        if objective != "ce":
            radius, found = matched_radius(bench, row["source_accuracy"])
            name = f"  PGD-CE {'as strong as' if found else 'at ε, weaker than'} {name}"
            equal, agrees_equal = judged(bench, oracle, name, bench.attacked("ce", str(radius)), float(radius))
            row["oracle_over_equal_ce"] = compare.paired_difference(agrees_equal, agrees)
            rows.append(equal)
        progress()
    return rows


def semantics_table(rows):
    lines = [f"{'attack':<36}{'ε':>7}{'source right':>14}{'oracle right':>14}{'where source fails':>20}"
             f"{'oracle p_y':>12}{'L-inf':>8}{'L2':>7}{'at edge':>9}   oracle right over equal PGD-CE, points"]
    for row in rows:
        fooled = row["oracle_agrees_where_source_fails"]
        lines.append(f"{row['name']:<36}{row['epsilon']:>7.4f}{row['source_accuracy']:>14.1%}"
                     f"{row['oracle_agrees']:>14.1%}{'' if fooled is None else format(fooled, '.1%'):>20}"
                     f"{row['oracle_p_true']:>12.3f}{row['l_inf']:>8.4f}{row['l2']:>7.3f}{row['at_edge']:>9.1%}")
        if over := row.get("oracle_over_equal_ce"):
            low, high = over["interval"]
            lines[-1] += f"   {100 * over['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    return "\n".join(lines)


def main(argv=None):
    parser, args = parse_args(argv)
    try:
        device = runtime.pick_device(args.device)
        model, info, test, dataset = eval_attacks.load(args)
        attacks.check_autoattack(info["num_classes"])
        oracle = None
        if args.oracle:
            oracle, oracle_info = checkpoints.load_model(args.oracle, device, num_classes=info["num_classes"])
            if oracle_info["sha256"] == info["sha256"]:
                raise ValueError("--oracle is the model itself: a second, separately trained one is needed")
            if "args" in oracle_info and oracle_info["args"]["dataset"] != dataset:
                raise ValueError(f"--oracle was trained on {oracle_info['args']['dataset']}, not on {dataset}")
    except (ValueError, OSError) as error:
        parser.error(error)
    test = test if args.num_images else test.subset(slice(256))
    args.epsilon = args.epsilon or data.EPSILON.get(dataset, "8/255")
    try:
        model, test = model.to(device), test.to(device)
        passes = (sum(STEPS) + 60 * RESTARTS + (200 * len(args.alphas) if oracle else 0)) * len(test.labels)
        x = data.to_float(test.images[:args.batch_size])
        _, forward = runtime.forward_passes(args, model, x, math.ceil(passes / len(x)))
        result = {"model": eval_attacks.describe(info, dataset), "n": len(test.labels), "epsilon": args.epsilon,
                  "seed": args.seed, "device": eval_attacks.device_name(device), "precision": args.precision,
                  "torch": torch.__version__, "complete": False, "checks": [],
                  "command": eval_attacks.command(parser.prog, argv)}
        if oracle:
            result["oracle"] = eval_attacks.describe(oracle_info, dataset)
        audit(Bench(model, forward, test, args), oracle, result)
    except KeyboardInterrupt:  # what is finished stands in the JSON, marked as incomplete
        sys.exit(130)
    except runtime.FAULTS as error:
        sys.exit(f"{parser.prog}: {error}")
    return result


def audit(bench, oracle, result):
    """Run the checks, and with an oracle the semantics, and put them into `result`, on the screen and into the JSON."""
    parts = len(CHECKS) + (2 + len(bench.args.alphas) if oracle else 0)
    with models.frozen(bench.model), tqdm(total=parts, unit="part", dynamic_ncols=True) as bar:
        for name, check in CHECKS.items():
            bar.set_description(name)
            numbers, fine, words = check(bench)
            result["checks"].append({"name": name, "fine": bool(fine), "numbers": numbers, "words": words})
            bar.write(f"{'ok  ' if fine else 'FLAG'} {name}: {words}")
            bar.update()
            eval_attacks.write(bench.args.json, result)
        result["verdict"] = verdict(result["checks"])
        bar.write("\n".join(result["verdict"]))
        if oracle:
            bar.set_description("oracle")
            with models.frozen(oracle):
                result["semantics"] = semantics(bench, oracle, bar.update)
            bar.write(semantics_table(result["semantics"]))
    result["complete"] = True
    eval_attacks.write(bench.args.json, result)


if __name__ == "__main__":
    main()
