"""Test whether a model's robust accuracy can be trusted, and what attacks on it preserve of an image.

    python audit.py --model-path runs/NAME/best.pt
    python audit.py --model-path A.pt --oracle B.pt

Both look for gradient masking: the ways in which an accuracy under PGD can be high although the model is not robust
(Athalye et al. 2018; Carlini et al. 2019). The second also asks another robust model what it sees in attacked images.
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
    add("--square-queries", type=runtime.positive_int, default=1000, metavar="N", help="queries of Square")
    add("--autoattack", action="store_true", help="run all of AutoAttack, not APGD-CE and APGD-T only, a third of it")
    add("--oracle", metavar="FILE", help="let this other robust model, of images in [0, 1], judge what is preserved")
    add("--alphas", nargs="+", type=runtime.unit_float, metavar="A", default=[0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0],
        help="let --oracle judge PGD-LS with each α")
    eval_attacks.add_machine_flags(parser)
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    try:
        device = runtime.pick_device(args.device)
        model, info, test, dataset = eval_attacks.load(args)
        attacks.check_autoattack(info["num_classes"])
        oracle, oracle_info = load_oracle(args.oracle, device, info, dataset, test) if args.oracle else (None, None)
        eval_attacks.say_notes(model, info, device, test.images, test.labels)
        if oracle:
            eval_attacks.say_notes(oracle, oracle_info, device, test.images, test.labels)
    except (ValueError, ArithmeticError, *runtime.FAULTS) as error:
        parser.error(error)
    test = test.subset(slice(args.num_images or 256))
    result = eval_attacks.new_result(parser.prog, argv, args, info, dataset, test, device)
    result |= {"seed": args.seed, "checks": []}
    passes = sum(STEPS) + 60 * RESTARTS
    if oracle:
        result["oracle"] = eval_attacks.describe(oracle_info, dataset)
        passes += 200 * len(args.alphas)
    try:
        model, test = model.to(device), test.to(device)
        x = data.to_float(test.images[:args.batch_size])
        forward = runtime.forward_pass(args, model, x, math.ceil(passes * len(test.labels) / len(x)), evaluates=True)
        result["precision"] = args.precision
        audit(Source(model, forward, test, args), oracle, result)
    except KeyboardInterrupt:  # what is finished stands in the JSON, marked as incomplete
        sys.exit(130)
    except (FloatingPointError, *runtime.FAULTS) as error:
        sys.exit(f"{parser.prog}: {error}")
    return result


def load_oracle(path, device, info, dataset, test):
    """Return (model, info) of the oracle's file. Raise ValueError if it is the model itself, of another data set, or
    does not number the classes as `test` does."""
    oracle, oracle_info = checkpoints.load_model(path, device, num_classes=info["num_classes"])
    if oracle_info["sha256"] == info["sha256"]:
        raise ValueError("--oracle is the model itself: a second, separately trained one is needed")
    if "args" in oracle_info and oracle_info["args"]["dataset"] != dataset:
        raise ValueError(f"--oracle was trained on {oracle_info['args']['dataset']}, not on {dataset}")
    if data.fitted(test, dataset, oracle_info).classes != test.classes:
        raise ValueError("--oracle has the model's classes in another order")
    return oracle, oracle_info


def audit(source, oracle, result):
    """Run the checks, and let the oracle judge; put all into `result`, on the screen and into the JSON."""
    with models.frozen(source.model), tqdm(CHECKS.items(), unit="check", dynamic_ncols=True) as bar:
        for name, (check, heading, _) in bar:
            bar.set_description(name)
            masks, fine = check(source)
            numbers = {what: share(mask) for what, mask in masks.items()}
            words = f"{heading}: " + ", ".join(f"{what} {value:.1%}" for what, value in numbers.items())
            result["checks"].append({"name": name, "fine": bool(fine), "numbers": numbers, "words": words})
            bar.write(f"{'ok  ' if fine else 'FLAG'} {name}: {words}")
            eval_attacks.write(source.args.json, result)
        result["verdict"] = verdict(result["checks"])
        bar.write("\n".join(result["verdict"]))
        if oracle:
            result["semantics"] = []
            with models.frozen(oracle):
                for row in semantics(source, oracle):
                    result["semantics"].append(row)
                    bar.write(in_one_line(row))
                    eval_attacks.write(source.args.json, result)
    result["complete"] = True
    eval_attacks.write(source.args.json, result)


def verdict(checks):
    """Return what the checks mean for the reported accuracy, as lines."""
    at_epsilon = [check["numbers"] for check in checks if check["name"] not in ("gradients", "radius")]
    lowest = min(accuracy for numbers in at_epsilon for accuracy in numbers.values())
    flagged = [f"{check['name']}: {CHECKS[check['name']][2]}" for check in checks if not check["fine"]]
    if flagged:
        return [*flagged, "An accuracy under PGD alone is not to be trusted here; the lowest found is "
                          f"{lowest:.1%}, if not lower."]
    return [f"Nothing here points to gradient masking. The lowest accuracy found is {lowest:.1%}: an upper bound, as "
            "every attack gives."]


class Source:
    """The model that is attacked, frozen, with the test images. `forward` crafts; `model` scores, in float32."""

    def __init__(self, model, forward, test, args):
        self.model, self.forward, self.test, self.args = model, forward, test, args
        self.epsilon, self.found, size = float(Fraction(args.epsilon)), {}, args.batch_size
        self.batches = list(zip(data.to_float(test.images).split(size), test.labels.split(size), strict=True))

    def logits(self, attack=None, model=None, x_adv=None):
        """Return the logits (n, K) after attack(x, y, indices), by this or another model. x_adv receives the images."""
        return eval_attacks.attacked_logits(model or self.model, self.test.images, self.test.labels, attack,
                                            self.args.batch_size, examples=x_adv)

    def right(self, attack=None):
        """Return which images are classified correctly after the attack, (n,) bool on the CPU."""
        return (self.logits(attack).argmax(1) == self.test.labels).cpu()

    def pgd(self, objective="ce", epsilon=None, num_steps=20, restart=0, alpha=0.0):
        """Return the attack PGD as eval_attacks.py runs it: from a uniform start, in steps of ε/10."""
        params = eval_attacks.pgd_params(epsilon or self.args.epsilon, objective=objective, num_steps=num_steps,
                                         seed=self.args.seed, alpha=alpha)
        return functools.partial(eval_attacks.make_attack(self.forward, params), restart=restart)

    def right_after_pgd(self, objective="ce", epsilon=None, num_steps=20, restart=0):
        """Return self.right(self.pgd(...)), which runs once, although several checks ask for it."""
        key = objective, epsilon, num_steps, restart
        if key not in self.found:
            self.found[key] = self.right(self.pgd(*key))
        return self.found[key]


# The checks. Each returns {name: (n,) bool} and whether that is as it should be. --------------------------------------


def check_gradients(source):
    """Check that input gradients are finite and not zero: else a sign attack has nothing to follow."""
    gradients = torch.cat([attacks.input_gradient(source.model, x, y, losses.cross_entropy).flatten(1)
                           for x, y in source.batches])
    bad = (gradients == 0).all(1) | ~gradients.isfinite().all(1)
    return {"zero or non-finite": bad}, share(bad) <= TOLERANCE


def check_order(source):
    """Check that uniform noise is weaker than FGSM, and FGSM weaker than PGD-20."""
    def noise(x, y, indices):
        start = attacks.start_per_image("uniform", x, source.epsilon, indices, source.args.seed)
        return attacks.project(x + start, x, source.epsilon)

    fgsm = source.right(lambda x, y, indices: attacks.fgsm(source.forward, x, y, epsilon=source.epsilon))
    attacked = {"noise": source.right(noise), "FGSM": fgsm, "PGD-20": source.right_after_pgd()}
    return {"natural": source.right()} | attacked, never_raised(attacked)


def check_radius(source):
    """Check that accuracy falls to 0 within 0.5 of an image: plain grey lies there, which has no class."""
    radii = {min(times * Fraction(source.args.epsilon), Fraction(1, 2)) for times in (1, 2, 4)} | {Fraction(1, 2)}
    masks = {str(radius): source.right_after_pgd(epsilon=str(radius), num_steps=40) for radius in sorted(radii)}
    return masks, share(masks["1/2"]) <= TOLERANCE and never_raised(masks)


def check_steps(source):
    """Check that more steps never raise the accuracy."""
    masks = {str(steps): source.right_after_pgd(num_steps=steps) for steps in STEPS}
    return masks, never_raised(masks)


def check_restarts(source):
    """Check that restarts lower the accuracy little."""
    masks = torch.stack([source.right_after_pgd(restart=restart) for restart in range(RESTARTS)])
    after = {str(count): masks[:count].all(0) for count in range(1, RESTARTS + 1)}
    gain = compare.paired_difference(after[str(RESTARTS)].numpy(), after["1"].numpy())
    return after, gain["interval"][0] <= RESTART_GAIN


def check_square(source):
    """Check that Square, which sees no gradient and attacks the margin, does not beat PGD on CE and on the margin."""
    model, queries = attacks.for_autoattack(source.model), source.args.square_queries
    # its draws depend on the batch and its model is not compiled: no batch is filled up
    x_adv = torch.cat([attacks.square(model, x, y, epsilon=source.epsilon, num_queries=queries, seed=source.args.seed)
                       for x, y in source.batches])
    square = source.right(lambda x, y, indices: x_adv[indices])
    ce, cw = source.right_after_pgd("ce", num_steps=100), source.right_after_pgd("cw", num_steps=100)
    masks = {"Square": square, "PGD-100": ce, "CW-100": cw, "both": ce & cw, "all three": ce & cw & square}
    return masks, never_raised({"Square": square, "both": ce & cw})


def check_autoattack(source):
    """Check that stronger attacks do not lower the accuracy under PGD-20 much."""
    components = list(attacks.COMPONENTS) if source.args.autoattack else eval_attacks.APGD
    model, x, y = attacks.for_autoattack(source.model), data.to_float(source.test.images), source.test.labels
    x_adv = attacks.autoattack(model, x, y, epsilon=source.epsilon, batch_size=source.args.batch_size,
                               seed=source.args.seed, components=components)
    pgd, stronger = source.right_after_pgd(), source.right(lambda x, y, indices: x_adv[indices])
    masks = {"PGD-20": pgd, eval_attacks.components_name(components): stronger}
    return masks, share(pgd) - share(stronger) <= WIDE_GAP


CHECKS = {  # name: (the check, what its numbers are, what it means where it speaks up)
    "gradients": (check_gradients, "input gradients", "sign attacks stand still there"),
    "order": (check_order, "accuracy", "a weaker attack does better than a stronger one: the gradient misleads"),
    "radius": (check_radius, "accuracy under PGD-40 by ε",
               "PGD fails where success is certain: its number at the usual radius says nothing"),
    "steps": (check_steps, "accuracy under PGD by steps", "more steps raise the accuracy: the gradient misleads"),
    "restarts": (check_restarts, "accuracy under PGD-20 by restarts",
                 "success depends on the start: the loss is rugged, one run is too few"),
    "gradient-free": (check_square, "accuracy",
                      "a gradient-free attack beats the gradient attacks: the gradient is masked"),
    "stronger": (check_autoattack, "accuracy", "PGD-20 flatters this model: quote the stronger attack"),
}


def share(mask):
    return mask.double().mean().item()  # so that equal counts give equal shares


def never_raised(masks):
    """Return whether no accuracy lies above the one before it, beyond noise: no 95 % interval of a paired difference
    lies above 0."""
    masks = [mask.numpy() for mask in masks.values()]
    differences = [compare.paired_difference(*pair) for pair in itertools.pairwise(masks)]
    return all(difference["interval"][0] <= 0 for difference in differences)


# What the oracle sees. ------------------------------------------------------------------------------------------------


def semantics(source, oracle):
    """Yield a row for the natural images, PGD-CE, PGD-KL and each α of PGD-LS. A weaker attack preserves more,
    trivially. So each one but PGD-CE is followed by PGD-CE at the smaller radius that has the same success on the
    source; what it preserves beyond that is oracle_over_equal_ce, a paired difference."""
    yield judged(source, oracle, "Natural", None)[0]
    yield judged(source, oracle, "PGD-CE", source.pgd())[0]
    weaker = [("PGD-KL", source.pgd("kl"))]
    weaker += [(f"PGD-LS {alpha:g}", source.pgd("lsce", alpha=alpha)) for alpha in source.args.alphas]
    for name, attack in tqdm(weaker, unit="attack", dynamic_ncols=True):
        row, agrees = judged(source, oracle, name, attack)
        radius, found = matched_radius(source, row["source_accuracy"])
        name = f"  PGD-CE as strong as {name}" if found else f"  PGD-CE at ε, weaker than {name}"
        equal, agrees_equal = judged(source, oracle, name, source.pgd(epsilon=str(radius)), float(radius))
        row["oracle_over_equal_ce"] = compare.paired_difference(agrees_equal, agrees)
        yield row
        yield equal


def judged(source, oracle, name, attack, epsilon=None):
    """Return a row: what the source and the oracle make of the attacked images, over all of them but for
    oracle_agrees_where_source_fails, and how far they are from x. Also return where the oracle is right, (n,) bool."""
    epsilon, x, y = epsilon or source.epsilon, data.to_float(source.test.images), source.test.labels
    x_adv = torch.zeros_like(x)
    fooled = (source.logits(attack, x_adv=x_adv).argmax(1) != y).cpu()
    seen = source.logits(lambda x, y, indices: x_adv[indices], oracle)
    agrees, delta = (seen.argmax(1) == y).cpu(), (x_adv - x).flatten(1)
    return {"name": name, "epsilon": epsilon, "source_accuracy": share(~fooled), "oracle_agrees": share(agrees),
            "oracle_agrees_where_source_fails": share(agrees[fooled]) if fooled.any() else None,
            "oracle_p_true": losses.p_true(seen, y).mean().item(), "l_inf": delta.abs().amax(1).mean().item(),
            "l2": delta.norm(dim=1).mean().item(), "at_edge": share(delta.abs() >= epsilon - 1e-6)}, agrees


def matched_radius(source, accuracy, halvings=8):
    """Return the smallest radius below ε, by bisection, at which PGD-20 on CE leaves at most this accuracy, and True;
    or ε and False, where no radius below ε does."""
    low, high = Fraction(0), Fraction(source.args.epsilon)
    for _ in range(halvings):
        middle = (low + high) / 2
        if share(source.right_after_pgd(epsilon=str(middle))) <= accuracy:
            high = middle
        else:
            low = middle
    return high, high < Fraction(source.args.epsilon)


def in_one_line(row):
    """Return a row of the oracle's as text."""
    line = (f"{row['name']:<36} ε {row['epsilon']:.4f}, right: source {row['source_accuracy']:>6.1%}, oracle "
            f"{row['oracle_agrees']:>6.1%} with p_y {row['oracle_p_true']:.3f}; L2 {row['l2']:.3f}")
    if over := row.get("oracle_over_equal_ce"):
        points = (100 * value for value in (over["difference"], *over["interval"]))
        line += "; oracle over equal PGD-CE, points: {:+.1f} ({:+.1f} to {:+.1f})".format(*points)
    return line


if __name__ == "__main__":
    main()
