"""Compare two evaluations of the same images, image by image.

    python compare.py A.json B.json

Both files are eval_attacks.py's. For every attack that both have, it prints the difference B - A of the accuracies with
its 95 % interval, which is narrower than two separate intervals suggest, because the images are the same.
"""

import math
import statistics

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
        print(f"{letter} {path}, crafted in {result.get('precision', 'unknown precision')}")
    print(f"B - A in points, {first['n']} images of {first['model']['dataset']}\n")
    print(f"{'attack':<16}{'A':>8}{'B':>8}{'B - A':>9}   95 % interval    gained   lost   McNemar's p")
    before, after = ({row["name"]: row["accuracy"] for row in result["attacks"]} for result in (first, second))
    for name, d in differences.items():
        low, high = d["interval"]
        print(f"{name:<16}{before[name]:>8.2%}{after[name]:>8.2%}{100 * d['difference']:>+9.2f}"
              f"   {100 * low:+6.2f} to {100 * high:+6.2f} {d['gained']:>7} {d['lost']:>6}   {d['p']:.2g}")
    if "PGD-20" in differences and "Worst case" in differences:
        change = in_words(change_of_overestimate(first, second), ", p = ")
        print(f"\nright under PGD-20 and wrong in the worst case, B - A: {change}")
    if others := [name for name in before | after if name not in differences]:
        print(f"\nnot in both, or with other parameters: {', '.join(others)}")
    return differences


def paired_differences(first, second):
    """Return {attack's name: paired_difference} of the attacks that two results share, by name and parameters. Raise
    ValueError if they are not of the same images, or share no attack."""
    check_images(first, second)
    before, after = ({row["name"]: row for row in result["attacks"]} for result in (first, second))
    settings_of = eval_attacks.settings
    shared = [name for name in before if name in after and settings_of(before[name]) == settings_of(after[name])]
    if not shared:
        raise ValueError("the two files share no attack with the same parameters")
    return {name: paired_difference(*map(eval_attacks.correct_mask, (before[name], after[name]))) for name in shared}


def check_images(first, second):
    """Raise ValueError unless two results are of the same images: by their hash, wherever the files lay, or, where one
    is older than that entry, by the name of the data set."""
    if first["n"] != second["n"]:
        raise ValueError(f"not the same images: n is {first['n']} and {second['n']}")
    hashes = [result.get("images") for result in (first, second)]
    names = [result["model"]["dataset"] for result in (first, second)]
    if None not in hashes:
        if hashes[0] != hashes[1]:
            raise ValueError("not the same images: their hashes differ, of images, labels or classes")
    elif names[0] != names[1]:
        raise ValueError(f"not the same images: dataset is {names[0]} and {names[1]}")
    elif not data.is_named(names[0]):
        raise ValueError(f"no hash says that the images of {names[0]} were the same: evaluate both again")


def change_of_overestimate(first, second):
    """Return the paired_difference of two results in which images are right under PGD-20 and wrong in the worst case:
    so much of a gain under PGD-20 does not reach the worst case."""
    right = [{row["name"]: eval_attacks.correct_mask(row) for row in result["attacks"]} for result in (first, second)]
    return paired_difference(*(masks["PGD-20"] & ~masks["Worst case"] for masks in right))


def paired_difference(a, b):
    """Return how two (n,) bool outcomes on the same images differ: a dict of n, gained (wrong in a, right in b), lost,
    the difference b - a, its 95 % interval (Agresti and Min 2005: the Wald interval after half an image is added to
    each of the four cells) and McNemar's exact p."""
    gained, lost, n = int((~a & b).sum()), int((a & ~b).sum()), len(a)
    middle = (gained - lost) / (n + 2)
    half = Z * math.sqrt((gained + lost + 1) / (n + 2) - middle**2) / math.sqrt(n + 2)
    p = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0  # it refuses 0 of 0
    return {"n": n, "gained": gained, "lost": lost, "difference": (gained - lost) / n,
            "interval": (max(-1.0, middle - half), min(1.0, middle + half)), "p": float(p)}


def difference_estimator(a, b, all_a, all_b):
    """Return the difference b - a on all N images under an attack that was run on the first n alone, which must be as
    good as drawn at random. a, b: (n,) bool outcomes of that attack; all_a, all_b: (N,) of a cheaper one. The estimate
    is the cheaper one's difference on all N, plus what the two attacks' differences differ by on the n. The dict has
    n, images (N), difference, its 95 % interval (two-phase sampling, Cochran 1977, chapter 12, with the half images of
    paired_difference) and p, by the normal distribution."""
    costly, cheap = b.astype(float) - a, all_b.astype(float) - all_a
    n, images, error = len(costly), len(cheap), costly - cheap[:len(costly)]
    variances = [(d @ d + 1) / (n + 2) - (d.sum() / (n + 2)) ** 2 for d in (error, costly)]
    deviation = math.sqrt(variances[0] * (1 / n - 1 / images) + variances[1] / images)
    difference = float(cheap.mean() + error.mean())
    return {"n": n, "images": images, "difference": difference,
            "interval": (max(-1.0, difference - Z * deviation), min(1.0, difference + Z * deviation)),
            "p": 2 * float(scipy.stats.norm.sf(abs(difference) / deviation))}


def t_interval(values):
    """Return, for one value a seed, a dict of n, mean, its 95 % interval by Student's t, and the two-sided p of a mean
    of 0. The last two are None where a single value, or equal ones, have no spread to judge by."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1 or statistics.stdev(values) < 1e-12:  # equal accuracies may differ by a rounding
        return {"n": n, "mean": mean, "interval": None, "p": None}
    test = scipy.stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(0.95)
    return {"n": n, "mean": mean, "interval": (float(low), float(high)), "p": float(test.pvalue)}


def holm(p_values):
    """Return Holm's p-values (1979), adjusted for all comparisons of a family. None, which is no p, counts as 1."""
    p_values = [1.0 if p is None else p for p in p_values]
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = adjusted[i] = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
    return adjusted


def summarise(found, pairs, paper):
    """Return what several seeds say: a dict of two lists of dicts, with accuracies in [0, 1]. "rows" has each row's
    attacks with t_interval over the seeds. "comparisons" has b - a (see difference_over), with Holm's p over all of
    them; "all_images" is outside Holm's family. found: {row: {seed: {attack: its entry in the JSON}}}. pairs: the
    (row a, row b) to compare where both are found. paper: {row: {attack: accuracy in %}}."""
    rows, comparisons = [], []
    for row, of_seeds in found.items():
        for attack, entry in next(iter(of_seeds.values())).items():
            accuracies = {seed: entries[attack]["accuracy"] for seed, entries in of_seeds.items()}
            rows.append({"row": row, "attack": attack, "images": entry["n"], "accuracies": accuracies,
                         "paper": paper.get(row, {}).get(attack), **t_interval(list(accuracies.values()))})
    for a, b in pairs:
        seeds = [seed for seed in found.get(a, {}) if seed in found.get(b, {})]
        for attack in found[a][seeds[0]] if seeds else []:
            all_images, result = difference_over([(found[a][seed], found[b][seed]) for seed in seeds], attack)
            published = [paper.get(row, {}).get(attack) for row in (a, b)]
            comparisons.append({
                "a": a, "b": b, "attack": attack, "seeds": seeds, "images": found[a][seeds[0]][attack]["n"],
                "over": "images" if len(seeds) == 1 else "seeds", "all_images": all_images,
                "paper": None if None in published else published[1] - published[0], **result})
    for comparison, p in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True):
        comparison["p_holm"] = p
    return {"rows": rows, "comparisons": comparisons}


def difference_over(pairs, attack):
    """Return (the difference estimated for all images, or None if the attack saw all; the difference on those that it
    saw), over the seeds or, with one seed, over its images, which says nothing of another training. pairs: for each
    seed the two rows' {attack: its entry in the JSON}."""
    result = t_interval([after[attack]["accuracy"] - before[attack]["accuracy"] for before, after in pairs])
    estimates = [for_all_images(before, after, attack) for before, after in pairs]
    if len(pairs) == 1:
        of_images = paired_difference(*(eval_attacks.correct_mask(entries[attack]) for entries in pairs[0]))
        return estimates[0], result | {"interval": of_images["interval"], "p": of_images["p"]}
    return t_interval([estimate["difference"] for estimate in estimates]) if estimates[0] else None, result


def for_all_images(before, after, attack):
    """Return difference_estimator for an attack that saw fewer images than the worst case, the cheaper one, or None."""
    entries = [of[name] for name in (attack, "Worst case") for of in (before, after) if name in of]
    seen_fewer = len(entries) == 4 and entries[0]["n"] < entries[2]["n"]
    return difference_estimator(*map(eval_attacks.correct_mask, entries)) if seen_fewer else None


def markdown(summary):
    """Return the two tables of a summary in points; [the paper's values], ± half of a 95 % interval over the seeds."""
    cells = {(row["row"], row["attack"]): row for row in summary["rows"]}
    attacks = {row["attack"]: row["images"] for row in summary["rows"]}
    images = next(iter(attacks.values()))
    names = [attack if n == images else f"{attack}, first {n}" for attack, n in attacks.items()]
    lines = [f"| {images} images | seeds | {' | '.join(names)} | p_y > 1 - α |", "| --- " * (len(attacks) + 3) + "|"]
    for name in dict.fromkeys(row for row, _ in cells):
        of_row = [cells.get((name, attack)) for attack in attacks]
        seeds = list(max((cell["accuracies"] for cell in of_row if cell), key=len))
        texts = [name, f"seed {seeds[0]}" if len(seeds) == 1 else str(len(seeds))]
        texts += [cell_text(cell) if cell else "" for cell in of_row]
        share = summary.get("shares", {}).get(name)
        lines.append(f"| {' | '.join([*texts, '' if share is None else f'{share:.2%}'])} |")
    if summary["comparisons"]:
        heads = ("difference, points", "attack", "95 % interval", "p", "Holm's p", "over", "paper")
        lines += ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for c in summary["comparisons"]:
        over = f"{c['n']} seeds" if c["over"] == "seeds" else f"images of seed {c['seeds'][0]} alone"
        last = "" if c["paper"] is None else f"{c['paper']:+.2f}"
        lines.append(f"| {c['b']} - {c['a']} | {c['attack']} | {in_words(c)} | {c['p_holm']:.2g} | {over} | {last} |")
        if c["all_images"]:
            lines.append(f"| | estimated for all images | {in_words(c['all_images'])} | | {over} | |")
    return "\n".join(lines)


def cell_text(row):
    """Return an accuracy as in "56.10 ± 0.31 [57.32]"; row: an entry of a summary's "rows"."""
    text = f"{100 * row['mean']:.2f}"
    if row["interval"]:
        text += f" ± {50 * (row['interval'][1] - row['interval'][0]):.2f}"
    if row["paper"] is not None:
        text += f" [{row['paper']:.2f}]"
    return text


def in_words(result, before_p=" | "):
    """Return "-0.24 (-0.60 to +0.13) | 0.22": a difference in points, its interval, and p."""
    difference, ends = result["mean" if "mean" in result else "difference"], result["interval"]
    interval = "({:+.2f} to {:+.2f})".format(*(100 * end for end in ends)) if ends else "no spread"
    p = "" if result["p"] is None else f"{result['p']:.2g}"
    return f"{100 * difference:+.2f} {interval}{before_p}{p}"


if __name__ == "__main__":
    main()
