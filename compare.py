"""Two evaluations of the same images, compared image by image.

    python compare.py A.json B.json

Both files are eval_attacks.py's. For every attack that both have: the difference B - A of the accuracies with its 95 %
interval, which is narrower than what two separate intervals suggest, because the images are the same.
"""

import math
from fractions import Fraction

import cli
import scores


def paired_difference(a, b, z=1.959964):
    """For two (n,) bool outcomes on the same images, a dict: gained (wrong in a, right in b), lost, the difference
    b - a, its 95 % interval (Agresti and Min 2005: the Wald interval after half an image is added to each of the four
    cells) and McNemar's exact p."""
    gained, lost, n = int((~a & b).sum()), int((a & ~b).sum()), len(a)
    adjusted = (gained - lost) / (n + 2)
    half = z * math.sqrt((gained + lost + 1) / (n + 2) - adjusted**2) / math.sqrt(n + 2)
    changed, tail = gained + lost, sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    return {"n": n, "gained": gained, "lost": lost, "difference": (gained - lost) / n,
            "interval": (adjusted - half, adjusted + half),
            "p": float(min(Fraction(1), Fraction(2 * tail, 2**changed)))}


def compare(first, second):
    """{attack's name: paired_difference} of the attacks that two results share, by name and parameters; raises
    ValueError if they are not of the same images, or share none."""
    for key, of in (("n", dict), ("dataset", lambda r: r["model"])):
        values = [of(result)[key] for result in (first, second)]
        if values[0] != values[1]:
            raise ValueError(f"not the same images: {key} is {values[0]} and {values[1]}")
    ours, theirs = ({row["name"]: row for row in result["attacks"]} for result in (first, second))
    shared = [name for name in ours if name in theirs and ours[name]["params"] == theirs[name]["params"]]
    if not shared:
        raise ValueError("the two files share no attack with the same parameters")
    masks = {name: [scores.correct_mask(rows[name]) for rows in (ours, theirs)] for name in shared}
    return {name: paired_difference(*pair) for name, pair in masks.items()}


def parse_args(argv=None):
    parser = cli.Parser(prog="compare.py", description=__doc__)
    parser.add_argument("a", metavar="A.json")
    parser.add_argument("b", metavar="B.json")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    try:
        first, second = scores.read(args.a), scores.read(args.b)
        differences = compare(first, second)
    except ValueError as error:
        parser.error(error)
    for letter, path, result in (("A", args.a, first), ("B", args.b, second)):
        print(f"{letter} {path}, crafted in {result.get('precision', 'unknown precision')}")
    print(f"B - A in points, {first['n']} images of {first['model']['dataset']}\n")
    print(f"{'attack':<16}{'A':>8}{'B':>8}{'B - A':>9}   95 % interval    gained   lost   McNemar's p")
    accuracy = [{row["name"]: row["accuracy"] for row in result["attacks"]} for result in (first, second)]
    for name, d in differences.items():
        low, high = d["interval"]
        print(f"{name:<16}{accuracy[0][name]:>8.2%}{accuracy[1][name]:>8.2%}{100 * d['difference']:>+9.2f}"
              f"   {100 * low:+6.2f} to {100 * high:+6.2f} {d['gained']:>7} {d['lost']:>6}   {d['p']:.2g}")
    if others := [name for name in accuracy[0] | accuracy[1] if name not in differences]:
        print(f"\nnot in both, or with other parameters: {', '.join(others)}")
    return differences


if __name__ == "__main__":
    main()
