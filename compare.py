"""Compare two evaluations of the same images, image by image.

    python compare.py A.json B.json

Both files are eval_attacks.py's. For every attack that both have, it prints the difference B - A of the accuracies with
its 95 % interval, which is narrower than two separate intervals suggest, because the images are the same.
"""

import math

import numpy as np
import scipy  # scipy.stats takes a second to import; scipy loads it where it is first used

import data
import eval_attacks
import runtime

Z = 1.959964  # the normal distribution's 97.5 % quantile, to the digits with which results/ was computed


def parse_args(argv=None):
    parser = runtime.Parser(prog="compare.py", description=__doc__)
    parser.add_argument("a", metavar="A.json")
    parser.add_argument("b", metavar="B.json")
    return parser, parser.parse_args(argv)


def main(argv=None):
    """Print the table, and return paired_differences."""
    parser, args = parse_args(argv)
    try:
        first, second = eval_attacks.read(args.a), eval_attacks.read(args.b)
        differences = paired_differences(first, second)
    except ValueError as error:
        parser.error(error)
    for letter, path, result in (("A", args.a, first), ("B", args.b, second)):
        print(f"{letter} {path}, crafted in {eval_attacks.crafted_in(result)}")
    print(f"B - A in points, {first['n']} images of {first['model']['dataset']}\n")
    print(f"{'attack':<16}{'A':>8}{'B':>8}{'B - A':>9}   95 % interval    gained   lost   McNemar's p")
    before, after = ({row["name"]: row for row in result["attacks"]} for result in (first, second))
    for name, d in differences.items():
        low, high = d["interval"]
        print(f"{name:<16}{before[name]['accuracy']:>8.2%}{after[name]['accuracy']:>8.2%}{100 * d['difference']:>+9.2f}"
              f"   {100 * low:+6.2f} to {100 * high:+6.2f} {d['gained']:>7} {d['lost']:>6}   {d['p']:.2g}")
    if "PGD-20" in differences and "Worst case" in differences:  # so much of a gain does not reach the worst case
        mask = eval_attacks.correct_mask
        lost = [mask(rows["PGD-20"]) & ~mask(rows["Worst case"]) for rows in (before, after)]
        print(f"\nright under PGD-20, wrong in the worst case, B - A: {in_words(paired_difference(*lost), ', p = ')}")
    if others := [name for name in before | after if name not in differences]:
        print(f"\nnot in both, or with other parameters: {', '.join(others)}")
    return differences


def paired_differences(first, second):
    """Return {attack's name: paired_difference} of the attacks that two results share, by name and parameters. Raise
    ValueError if they are not of the same images, or share no attack."""
    check_images(first, second)
    before, after = ({row["name"]: row for row in result["attacks"]} for result in (first, second))
    differences = {
        name: paired_difference(*(eval_attacks.correct_mask(rows[name]) for rows in (before, after)))
        for name in equal_attacks(before, after)}
    if not differences:
        raise ValueError("the two files share no attack with the same parameters")
    return differences


def equal_attacks(before, after):
    """Return the names of the attacks that two {name: entry} have with the same parameters, and so the attacks that an
    entry builds on, which stand before it: those of a worst case, or those whose images --pool left out."""
    equal = []
    for name in (name for name in before if name in after):
        settings, others = (eval_attacks.settings(rows[name]) for rows in (before, after))
        built_on = {*settings.get("of", []), *settings.get("pool", [])} - {name}  # two rows may have one name
        if settings == others and built_on <= set(equal):
            equal.append(name)
    return equal


def check_images(first, second):
    """Raise ValueError unless two results are of the same images, by hash or, where one lacks it, by data set."""
    if first["n"] != second["n"]:
        raise ValueError(f"not the same images: n is {first['n']} and {second['n']}")
    hashes = [result.get("images") for result in (first, second)]
    names = [result["model"]["dataset"] for result in (first, second)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise ValueError("not the same images: their hashes differ, of images, labels or classes")
    if None in hashes and (names[0] != names[1] or not data.is_named(names[0])):
        raise ValueError(f"no hash of the images, and dataset is {names[0]} and {names[1]}: evaluate both again")


def paired_difference(a, b):
    """Return how two (n,) bool outcomes on the same images differ: a dict of n, gained (wrong in a, right in b), lost,
    the difference b - a of the accuracies, its 95 % interval (Agresti and Min 2005: Wald's, after half an image is
    added to each of the four cells) and McNemar's exact p."""
    gained, lost, n = int((~a & b).sum()), int((a & ~b).sum()), len(a)
    middle = (gained - lost) / (n + 2)
    half = Z * math.sqrt((gained + lost + 1) / (n + 2) - middle**2) / math.sqrt(n + 2)
    p = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0  # it refuses 0 of 0
    return {"n": n, "gained": gained, "lost": lost, "difference": (gained - lost) / n,
            "interval": (max(-1.0, middle - half), min(1.0, middle + half)), "p": float(p)}


def over_seeds_and_images(values, cheap=None):
    """Return the mean of (S, n) values, of S seeds on n images: a dict of n (S), mean, its 95 % interval and p, the
    two-sided one of a mean of 0. The variance is that of the seeds' means over S plus that of the images' means over n,
    as another experiment would draw both. What one seed draws on one image is in both, so the interval is rather too
    wide. It is Student's t with Welch's degrees of freedom; one seed has the images' variance alone.
    cheap: (S, N) values of a cheaper attack on N images, the first n as good as drawn at random. The mean is then
    estimated for all N: that of cheap, plus that of the differences on the n (Cochran 1977)."""
    cheap = values if cheap is None else cheap
    (seeds, n), images = values.shape, cheap.shape[1]
    error = values - cheap[:, :n]
    mean = float(cheap.mean() + error.mean())
    of_error, of_values = (  # with half an image more for each outcome, as in paired_difference
        (d @ d + 1 / seeds) / (n + 2) - (d.sum() / (n + 2)) ** 2 for d in (error.mean(axis=0), values.mean(axis=0)))
    variance, freedom = of_error * (1 / n - 1 / images) + of_values / images, math.inf
    if seeds > 1:
        of_seeds = cheap.mean(axis=1) + error.mean(axis=1)
        parts = np.array([variance, of_seeds.var(ddof=1) / seeds])
        variance = parts.sum()
        freedom = variance**2 / (parts**2 / [n - 1, seeds - 1]).sum()
    deviation = math.sqrt(variance)
    half = deviation * float(scipy.stats.t.ppf(0.975, freedom))
    return {"n": seeds, "mean": mean, "interval": (max(-1.0, mean - half), min(1.0, mean + half)),
            "p": 2 * float(scipy.stats.t.sf(abs(mean) / deviation, freedom))}


def holm(p_values):
    """Return Holm's p-values (1979), adjusted for all comparisons of a family."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = adjusted[i] = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


def summarise(found, pairs, paper):
    """Return {"rows": over_seeds_and_images of each row's accuracy in [0, 1] under each attack, "comparisons": of each
    pair (a, b) and attack difference_over, on the seeds that both rows have, with Holm's p over all of them}, lists of
    dicts. found: {row: {seed: {attack: its entry in the JSON}}}. paper: {row: {attack: accuracy in %}}."""
    rows, comparisons = [], []
    for row, of_seeds in found.items():
        for attack, entry in next(iter(of_seeds.values())).items():
            accuracies = {seed: entries[attack]["accuracy"] for seed, entries in of_seeds.items()}
            rows.append({"row": row, "attack": attack, "images": entry["n"], "accuracies": accuracies,
                         "paper": paper.get(row, {}).get(attack),
                         **over_seeds_and_images(outcomes(of_seeds.values(), attack))})
    for a, b in pairs:
        seeds = [seed for seed in found.get(a, {}) if seed in found.get(b, {})]
        of_a, of_b = ([found[row][seed] for seed in seeds] for row in (a, b))
        for attack in of_a[0] if seeds else []:
            published = [paper.get(row, {}).get(attack) for row in (a, b)]
            comparisons.append({
                "a": a, "b": b, "attack": attack, "seeds": seeds, "images": of_a[0][attack]["n"],
                "paper": None if None in published else published[1] - published[0],
                **difference_over(of_a, of_b, attack)})
    for comparison, p in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True):
        comparison["p_holm"] = p
    return {"rows": rows, "comparisons": comparisons}


def outcomes(of_seeds, attack):
    """Return which images are right under an attack, (S, n) of 0 and 1. of_seeds: S dicts {attack: its entry}."""
    return np.array([eval_attacks.correct_mask(entries[attack]) for entries in of_seeds], dtype=float)


def difference_over(of_a, of_b, attack):
    """Return over_seeds_and_images of the difference b - a and, as "all_images", the same estimated for the images of
    the worst case, or None if the attack saw them all. One seed has paired_difference's interval and p, which say
    nothing of another training. of_a, of_b: as in outcomes."""
    difference = outcomes(of_b, attack) - outcomes(of_a, attack)
    result = over_seeds_and_images(difference) | {"all_images": None}
    if len(of_a) == 1:
        exact = paired_difference(*(eval_attacks.correct_mask(entries[0][attack]) for entries in (of_a, of_b)))
        result |= {"interval": exact["interval"], "p": exact["p"]}
    if "Worst case" in of_a[0] and of_a[0][attack]["n"] < of_a[0]["Worst case"]["n"]:
        of_worst_case = outcomes(of_b, "Worst case") - outcomes(of_a, "Worst case")
        result["all_images"] = over_seeds_and_images(difference, of_worst_case)
    return result


def markdown(summary):
    """Return the two tables of a summary in points; ± half of a 95 % interval, [the paper's values]."""
    heads = dict.fromkeys(f"{entry['attack']}, n {entry['images']}" for entry in summary["rows"])
    levels = [["row", "seeds", *heads, "p_y > 1 - α"]]
    for row in dict.fromkeys(entry["row"] for entry in summary["rows"]):
        entries = [entry for entry in summary["rows"] if entry["row"] == row]
        seeds = list(entries[0]["accuracies"])
        share = f"{summary['shares'][row]:.2%}" if row in summary.get("shares", {}) else ""
        which = f"seed {seeds[0]}" if len(seeds) == 1 else str(len(seeds))
        levels.append([row, which, *map(cell_text, entries), share])
    differences = [["difference, points", "attack", "95 % interval", "p", "Holm's p", "over", "paper"]]
    for c in summary["comparisons"]:
        over = f"images of seed {c['seeds'][0]} alone" if c["n"] == 1 else f"{c['n']} seeds, {c['images']} images"
        paper = "" if c["paper"] is None else f"{c['paper']:+.2f}"
        differences.append([f"{c['b']} - {c['a']}", c["attack"], in_words(c), f"{c['p_holm']:.2g}", over, paper])
        if c["all_images"]:
            differences.append(["", "estimated for all images", in_words(c["all_images"]), "", over, ""])
    return "\n\n".join(table(lines) for lines in (levels, differences) if len(lines) > 1)


def table(lines):
    """Return lists of texts, the first of which is the head, as a table in Markdown."""
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(texts)} |" for texts in lines)


def cell_text(entry):
    """Return an accuracy as in "56.10 ± 0.31 [57.32]"; entry: one of a summary's "rows"."""
    low, high = entry["interval"]
    half = max(entry["mean"] - low, high - entry["mean"])  # one of them ends at 1, where two seeds differ much
    paper = "" if entry["paper"] is None else f" [{entry['paper']:.2f}]"
    return f"{100 * entry['mean']:.2f} ± {100 * half:.2f}{paper}"


def in_words(result, before_p=" | "):
    """Return "-0.24 (-0.60 to +0.13) | 0.22": a difference in points, its interval and p."""
    difference = result["mean"] if "mean" in result else result["difference"]
    low, high = result["interval"]
    return f"{100 * difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}){before_p}{result['p']:.2g}"


if __name__ == "__main__":
    main()
