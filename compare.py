"""Two evaluations of the same images, compared image by image.

    python compare.py A.json B.json

Both files are eval_attacks.py's. For every attack that both have: the difference B - A of the accuracies with its 95 %
interval, which is narrower than what two separate intervals suggest, because the images are the same.
"""

import math
import statistics
from fractions import Fraction

from scipy import special

import eval_attacks
import runtime


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


def difference_estimator(a, b, all_a, all_b, z=1.959964):
    """The difference b - a on N images under an attack that was run on the first n alone, which must be as good as
    drawn at random. a, b: its (n,) bool outcomes; all_a, all_b: the (N,) outcomes of a cheaper attack. It is the
    cheaper one's difference on all N, plus what the two attacks' differences differ by on the n. A dict: n, images (N),
    difference, its 95 % interval (two-phase sampling, Cochran 1977, chapter 12; with paired_difference's half images)
    and p, by the normal distribution."""
    costly, cheap = b.astype(float) - a, all_b.astype(float) - all_a
    n, images, error = len(costly), len(cheap), costly - cheap[:len(costly)]
    spread = [(d @ d + 1) / (n + 2) - (d.sum() / (n + 2)) ** 2 for d in (error, costly)]
    deviation = math.sqrt(spread[0] * (1 / n - 1 / images) + spread[1] / images)
    difference = float(cheap.mean() + error.mean())
    return {"n": n, "images": images, "difference": difference,
            "interval": (difference - z * deviation, difference + z * deviation),
            "p": 2 * float(special.ndtr(-abs(difference) / deviation))}


def flattery(first, second):
    """Of two results: on how many more images `second` than `first` is right under PGD-20 and wrong in the worst case,
    as paired_difference: so much of a gain under PGD-20 does not reach the worst case."""
    masks = [{row["name"]: eval_attacks.correct_mask(row) for row in result["attacks"]} for result in (first, second)]
    return paired_difference(*(of["PGD-20"] & ~of["Worst case"] for of in masks))


def t_interval(values):
    """For one value a seed, a dict: n, mean, its 95 % interval by Student's t and the two-sided p of a mean of 0. Both
    are None where a single value, or equal ones, have no spread to judge by."""
    n, mean = len(values), statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else 0.0
    if error < 1e-12:  # equal accuracies may differ by a rounding
        return {"n": n, "mean": mean, "interval": None, "p": None}
    half = float(special.stdtrit(n - 1, 0.975)) * error
    return {"n": n, "mean": mean, "interval": (mean - half, mean + half),
            "p": 2 * float(special.stdtr(n - 1, -abs(mean) / error))}


def holm(p_values):
    """Holm's p-values (1979), adjusted for all comparisons of a family; None, no p, counts as 1."""
    p_values = [1.0 if p is None else p for p in p_values]
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = adjusted[i] = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


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
    masks = {name: [eval_attacks.correct_mask(rows[name]) for rows in (ours, theirs)] for name in shared}
    return {name: paired_difference(*pair) for name, pair in masks.items()}


def for_all_images(before, after, attack):
    """difference_estimator for an attack that saw fewer images than the worst case, which is the cheaper one; else
    None. before, after: {attack: its entry in the JSON}."""
    entries = [of[name] for name in (attack, "Worst case") for of in (before, after) if name in of]
    if len(entries) == 4 and entries[0]["n"] < entries[2]["n"]:
        return difference_estimator(*map(eval_attacks.correct_mask, entries))


def summarise(found, pairs, paper):
    """What several seeds say. found: {row: {seed: {attack: its entry in the JSON}}}; pairs: of (row a, row b) to
    compare, where both are found; paper: {row: {attack: accuracy in %}}. A dict of two lists of dicts, accuracies in
    [0, 1]: "rows", each row's attacks with t_interval over the seeds; and "comparisons", b - a paired over the seeds
    that both have or, with one seed, over its images (which says nothing of another training), with Holm's p of all;
    "all_images" is the same by for_all_images, outside Holm's family."""
    rows, comparisons = [], []
    for row, of_seed in found.items():
        for attack, entry in next(iter(of_seed.values())).items():
            values = {seed: entries[attack]["accuracy"] for seed, entries in of_seed.items()}
            rows.append({"row": row, "attack": attack, "images": entry["n"], "accuracies": values,
                         "paper": paper.get(row, {}).get(attack)} | t_interval(list(values.values())))
    for a, b in pairs:
        seeds = [seed for seed in found.get(a, ()) if seed in found.get(b, ())]
        for attack in found[a][seeds[0]] if seeds else ():
            both = [(found[a][seed][attack], found[b][seed][attack]) for seed in seeds]
            result = t_interval([after["accuracy"] - before["accuracy"] for before, after in both])
            if len(seeds) == 1:
                over_images = paired_difference(*map(eval_attacks.correct_mask, both[0]))
                result |= {key: over_images[key] for key in ("interval", "p")}
            estimates = [for_all_images(found[a][seed], found[b][seed], attack) for seed in seeds]
            all_images = estimates[0] if len(seeds) == 1 or not estimates[0] else t_interval(
                [estimate["difference"] for estimate in estimates])
            of_paper = [paper.get(row, {}).get(attack) for row in (a, b)]
            comparisons.append({"a": a, "b": b, "attack": attack, "seeds": seeds, "images": both[0][0]["n"],
                                "over": "seeds" if len(seeds) > 1 else "images", "all_images": all_images,
                                "paper": None if None in of_paper else of_paper[1] - of_paper[0]} | result)
    for comparison, p in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True):
        comparison["p_holm"] = p
    return {"rows": rows, "comparisons": comparisons}


def in_words(result):
    """"-0.24 (-0.60 to +0.13) | 0.22": a difference in points, its interval, and p."""
    difference, ends = result["mean" if "mean" in result else "difference"], result["interval"]
    interval = "({:+.2f} to {:+.2f})".format(*(100 * end for end in ends)) if ends else "no spread"
    return f"{100 * difference:+.2f} {interval} | " + ("" if result["p"] is None else f"{result['p']:.2g}")


def markdown(summary):
    """The two tables of a summary in points; [the paper's values], ± half of a 95 % interval over the seeds."""
    cells = {(row["row"], row["attack"]): row for row in summary["rows"]}
    attacks = {attack: row["images"] for (_, attack), row in cells.items()}
    images = next(iter(attacks.values()))
    names = [attack + (f", first {n}" if n != images else "") for attack, n in attacks.items()]
    lines = [f"| {images} images | seeds | {' | '.join(names)} | p_y > 1 - α |", "| --- " * (len(attacks) + 3) + "|"]
    for name in dict.fromkeys(row for row, _ in cells):
        of_row = [cells.get((name, attack)) for attack in attacks]
        texts = ["" if cell is None else f"{100 * cell['mean']:.2f}"
                 + (f" ± {50 * (cell['interval'][1] - cell['interval'][0]):.2f}" if cell["interval"] else "")
                 + ("" if cell["paper"] is None else f" [{cell['paper']:.2f}]") for cell in of_row]
        share = summary.get("shares", {}).get(name)
        of_seeds = max((cell["accuracies"] for cell in of_row if cell), key=len)
        seeds = len(of_seeds) if len(of_seeds) > 1 else f"seed {next(iter(of_seeds))}"
        lines.append(f"| {name} | {seeds} | " + " | ".join([*texts, "" if share is None else f"{share:.2%}"]) + " |")
    lines += ["", "| difference, points | attack | 95 % interval | p | Holm's p | over | paper |", "| --- " * 7 + "|"]
    for c in summary["comparisons"]:
        over = f"{c['n']} seeds" if c["over"] == "seeds" else f"images of seed {c['seeds'][0]} alone"
        last = "" if c["paper"] is None else f"{c['paper']:+.2f}"
        lines.append(f"| {c['b']} - {c['a']} | {c['attack']} | {in_words(c)} | {c['p_holm']:.2g} | {over} | {last} |")
        if c["all_images"]:
            lines.append(f"| | estimated for all images | {in_words(c['all_images'])} | | {over} | |")
    return "\n".join(lines if summary["comparisons"] else lines[:-3])


def parse_args(argv=None):
    parser = runtime.Parser(prog="compare.py", description=__doc__)
    parser.add_argument("a", metavar="A.json")
    parser.add_argument("b", metavar="B.json")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    try:
        first, second = eval_attacks.read(args.a), eval_attacks.read(args.b)
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
    if {"PGD-20", "Worst case"} <= differences.keys():
        found = in_words(flattery(first, second)).replace(" | ", ", p = ")
        print(f"\nright under PGD-20 and wrong in the worst case, B - A: {found}")
    if others := [name for name in accuracy[0] | accuracy[1] if name not in differences]:
        print(f"\nnot in both, or with other parameters: {', '.join(others)}")
    return differences


if __name__ == "__main__":
    main()
