"""Paired differences against statistics that this project did not write."""

import copy
import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from helpers import digits_folder, fails_in_one_line
from scipy.stats import binomtest, ttest_1samp, ttest_ind

import compare
import data
import eval_attacks

RESULTS = pathlib.Path(__file__).parent.parent / "results"


def outcomes(n, gained, lost, both, seed=0):
    a = np.array([False] * gained + [True] * (lost + both) + [False] * (n - gained - lost - both))
    b = np.array([True] * gained + [False] * lost + [True] * both + [False] * (n - gained - lost - both))
    order = np.random.default_rng(seed).permutation(n)
    return a[order], b[order]


@pytest.mark.parametrize("gained, lost", [(0, 0), (5, 0), (3, 9), (120, 80), (700, 500)])
def test_mcnemars_p_is_the_binomial_tests(gained, lost):
    d = compare.paired_difference(*outcomes(2000, gained, lost, 300))
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert d["p"] == pytest.approx(expected, rel=1e-9)
    assert (d["gained"], d["lost"], d["difference"]) == (gained, lost, (gained - lost) / 2000)


@pytest.mark.parametrize("n, gained, lost", [(1000, 120, 80), (10000, 30, 50), (100, 12, 3)])
def test_the_interval_covers_like_a_bootstrap(n, gained, lost):
    a, b = outcomes(n, gained, lost, n // 3)
    d = compare.paired_difference(a, b)
    difference = b.astype(float) - a
    g = np.random.default_rng(0)
    bootstrap = [difference[g.integers(n, size=n)].mean() for _ in range(4000)]
    low, high = np.quantile(bootstrap, [0.025, 0.975])
    assert d["interval"] == pytest.approx((low, high), abs=0.1 * (high - low))


def test_no_change_still_has_an_interval_and_no_significance():
    a = np.array([True] * 50 + [False] * 50)
    d = compare.paired_difference(a, a)
    assert d["difference"] == 0 and d["p"] == 1 and d["interval"][0] < 0 < d["interval"][1]


def estimated(a, b, all_a, all_b):
    """One seed's difference, estimated for all images from a cheaper attack that saw them."""
    return compare.over_seeds_and_images(*((after.astype(float) - before)[None] for before, after in (
        (a, b), (all_a, all_b))))


def test_the_difference_estimator_is_unbiased_covers_and_gains_by_a_related_attack():
    """Over 2,000 draws of 256 of 10,000 images, whose true difference under the costly attack is known."""
    g = np.random.default_rng(0)
    all_a, all_b = outcomes(10_000, 900, 1100, 2500)
    falls = g.random((2, 10_000)) < 0.02  # what the costly attack breaks besides
    a, b = all_a & ~falls[0], all_b & ~falls[1]
    truth, found, plain = b.mean() - a.mean(), [], []
    for _ in range(2000):
        order = g.permutation(10_000)
        seen = order[:256]
        found.append(estimated(a[seen], b[seen], all_a[order], all_b[order]))
        plain.append(compare.paired_difference(a[seen], b[seen]))
    differences, (low, high) = np.array([d["mean"] for d in found]), np.array([d["interval"] for d in found]).T
    assert differences.mean() == pytest.approx(truth, abs=4 * differences.std() / 2000**0.5)
    assert 0.93 < ((low < truth) & (truth < high)).mean()
    plain_low, plain_high = np.array([d["interval"] for d in plain]).T
    assert (high - low).mean() < 0.5 * (plain_high - plain_low).mean()


def test_the_difference_estimator_of_all_images_is_the_paired_difference():
    a, b = outcomes(1000, 60, 90, 300)
    unrelated = outcomes(1000, 200, 100, 300, seed=1)
    found, expected = estimated(a, b, *unrelated), compare.paired_difference(a, b)
    assert found["mean"] == pytest.approx(expected["difference"])
    assert found["interval"] == pytest.approx(expected["interval"], abs=1e-4)
    assert found["p"] == pytest.approx(expected["p"], abs=0.01)


def drawn(g, seeds, images, seed_spread=0.02, image_spread=0.2, spread=0.3):
    """An (S, N) array of differences whose true mean is 0: a part of each seed, one of each image, one of both."""
    return (seed_spread * g.normal(size=(seeds, 1)) + image_spread * g.normal(size=(1, images))
            + spread * g.normal(size=(seeds, images)))


def test_the_interval_over_seeds_and_images_is_welchs():
    """Welch's test of the seeds' means against the images', centred, adds the same two variances."""
    values = drawn(np.random.default_rng(0), 7, 20_000) + 0.01
    expected = ttest_ind(values.mean(1), values.mean(0) - values.mean(), equal_var=False)
    found = compare.over_seeds_and_images(values)
    assert found["n"] == 7 and found["mean"] == pytest.approx(values.mean())
    assert found["p"] == pytest.approx(expected.pvalue, rel=0.01)
    assert found["interval"] == pytest.approx(tuple(expected.confidence_interval()), rel=0.01)


@pytest.mark.parametrize("seeds, images", [(20, 400), (5, 2000), (2, 200)])
def test_the_interval_over_seeds_and_images_covers_when_both_are_drawn(seeds, images):
    """And a t-interval over the seeds alone does not, where they are many."""
    g, covered, by_seeds_alone = np.random.default_rng(0), [], []
    for _ in range(1000):
        values = drawn(g, seeds, images)
        low, high = compare.over_seeds_and_images(values)["interval"]
        covered.append(low < 0 < high)
        by_seeds_alone.append(ttest_1samp(values.mean(1), 0).pvalue > 0.05)
    assert np.mean(covered) > 0.94 and (seeds < 20 or np.mean(by_seeds_alone) < 0.9)


@pytest.mark.parametrize("a, b, issue", [("madry", "madry-spat0.2", (-7.15, -3.97)), ("mart", "mart-spat0.3", (
    -3.64, -1.20)), ("trades", "trades-spat0", (-0.20, 1.86))])
def test_the_interval_is_that_of_a_bootstrap_of_seeds_and_images(a, b, issue):
    """Of results/: the worst case on digits, 20 seeds on the same 400 images; `issue`: a bootstrap made elsewhere."""
    summary = json.loads((RESULTS / "table3-digits.json").read_text())
    c, = (c for c in summary["comparisons"] if (c["a"], c["b"], c["attack"]) == (a, b, "Worst case"))
    files = [[RESULTS / f"table3-digits/{row}{'' if seed == 1 else f'-s{seed}'}.json" for seed in range(1, 21)]
             for row in (a, b)]
    rows = [[{row["name"]: row for row in eval_attacks.read(path)["attacks"]} for path in paths] for paths in files]
    values = compare.outcomes(rows[1], "Worst case") - compare.outcomes(rows[0], "Worst case")
    assert compare.over_seeds_and_images(values)["interval"] == pytest.approx(c["interval"])
    g = np.random.default_rng(0)
    means = [values[g.integers(20, size=20)][:, g.integers(400, size=400)].mean() for _ in range(3000)]
    expected = 100 * np.quantile(means, [0.025, 0.975])
    for ends in (expected, issue):
        assert 100 * np.array(c["interval"]) == pytest.approx(ends, abs=0.2)


@pytest.mark.parametrize("after, expected", [("madry-spat0.2", 0.0079), ("mart", 0.0245)])
def test_what_pgd_flatters_by_is_printed(after, expected, capsys):
    paths = [str(RESULTS / f"table3/{name}.json") for name in ("madry", after)]
    compare.main(paths)
    rows = [{row["name"]: row["correct"] for row in eval_attacks.read(path)["attacks"]} for path in paths]
    lost = [row["PGD-20"] - row["Worst case"] for row in rows]  # the worst case's are right under PGD-20 too
    assert (lost[1] - lost[0]) / 10_000 == pytest.approx(expected)
    assert f"wrong in the worst case, B - A: {100 * expected:+.2f} (" in capsys.readouterr().out


@pytest.fixture
def results(tmp_path):
    g = torch.Generator().manual_seed(0)
    paths = []
    for name in "AB":
        rows = [eval_attacks.outcome("PGD-20", {"epsilon": "8/255"}, torch.rand(77, generator=g) < 0.5, 1.0)]
        result = {"model": {"dataset": "cifar10"}, "n": 77, "attacks": rows}
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(result))
    return paths


def test_the_masks_survive_the_json(results, capsys):
    differences = compare.main([str(path) for path in results])
    first, second = (eval_attacks.read(path)["attacks"][0] for path in results)
    d = differences["PGD-20"]
    assert d["gained"] - d["lost"] == second["correct"] - first["correct"]
    assert f"{100 * d['difference']:+.2f}" in capsys.readouterr().out


def change(result, what):
    result = copy.deepcopy(result)
    row = result["attacks"][0]
    {"params": lambda: row.update(params={"epsilon": "4/255"}), "name": lambda: row.update(name="FGSM"),
     "data": lambda: result["model"].update(dataset="cifar100"), "mask": lambda: row.update(correct_mask="ff"),
     "hex": lambda: row.update(correct_mask="zz"), "no n": lambda: result.pop("n"),
     "n": lambda: (result.update(n=76), row.update(n=76))}[what]()
    return result


@pytest.mark.parametrize("what", ["params", "name", "data", "mask", "hex", "no n", "n"])
def test_other_images_or_attacks_are_refused(results, what, capsys):
    results[1].write_text(json.dumps(change(json.loads(results[1].read_text()), what)))
    fails_in_one_line(compare.main, results, capsys)


def test_attacks_with_other_parameters_are_left_out_and_named(results, capsys):
    for path, steps in zip(results, (10, 20), strict=True):
        result = json.loads(path.read_text())
        row = copy.deepcopy(result["attacks"][0])
        result["attacks"].append(row | {"name": "Worst case", "params": {"of": ["PGD-20"] * steps}})
        path.write_text(json.dumps(result | {"precision": f"of {steps}"}))
    assert list(compare.main([str(path) for path in results])) == ["PGD-20"]
    printed = capsys.readouterr().out
    assert "with other parameters: Worst case" in printed and "B.json, crafted in of 20" in printed


@pytest.mark.parametrize("name, params", [
    ("Worst case", {"of": ["CW-inf"]}), ("FGSM", {"pool": ["Natural", "CW-inf"]})])
def test_what_builds_on_attacks_with_other_parameters_is_left_out(results, name, params, capsys):
    """Their own parameters hold the names of these attacks alone."""
    for path, steps in zip(results, (20, 30), strict=True):
        result = json.loads(path.read_text())
        row = result["attacks"][0]
        rows = {"Natural": {}, "CW-inf": {"num_steps": steps}, name: params}
        result["attacks"] += [row | {"name": each, "params": of} for each, of in rows.items()]
        path.write_text(json.dumps(result))
    assert list(compare.main([str(path) for path in results])) == ["PGD-20", "Natural"]
    assert f"with other parameters: CW-inf, {name}\n" in capsys.readouterr().out
    assert list(compare.main([str(results[0])] * 2)) == ["PGD-20", "Natural", "CW-inf", name]


def test_half_of_an_interval_that_ends_at_1_is_that_of_its_other_side():
    entry = {"mean": 0.77, "interval": (0.17, 1.0), "paper": None}
    assert compare.cell_text(entry) == "77.00 ± 60.00"


def test_files_that_are_no_results(tmp_path, results, capsys):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "cut.json").write_text(results[0].read_text()[:100])
    for bad in (tmp_path / "absent.json", tmp_path / "list.json", tmp_path / "cut.json", tmp_path):
        fails_in_one_line(compare.main, [results[0], bad], capsys)


def with_hash(path, images, dataset="cifar10"):
    result = json.loads(path.read_text())
    result["model"]["dataset"] = dataset
    path.write_text(json.dumps(result | ({"images": images} if images else {})))


@pytest.mark.parametrize("hashes, names, refused", [
    (("a", "b"), ("folder", "folder"), "hash"), (("a", "a"), ("folder", "moved/folder"), None),
    ((None, None), ("cifar10", "cifar10"), None), ((None, "a"), ("cifar10-first4", "cifar10-first4"), None),
    ((None, "a"), ("folder", "folder"), "evaluate"), ((None, None), ("folder", "folder"), "evaluate"),
    ((None, "a"), ("cifar10", "cifar100"), "dataset is cifar10 and cifar100"),
])
def test_the_images_are_told_by_their_hash(results, hashes, names, refused, capsys):
    """A JSON without one is older than the hash: its images are known if it is of a named data set."""
    for path, images, dataset in zip(results, hashes, names, strict=True):
        with_hash(path, images, dataset)
    if refused:
        assert refused in fails_in_one_line(compare.main, results, capsys)
    else:
        assert list(compare.main([str(path) for path in results])) == ["PGD-20"]


def test_an_evaluation_states_the_hash_of_its_images_labels_and_classes(tmp_path, model_path, capsys):
    """compare-grown: one file more in test/, and a model gained 6 points on itself."""
    folder = digits_folder(tmp_path / "folder", parts=["test"])
    shutil.copytree(folder, tmp_path / "moved")

    def evaluated(dataset, name):
        eval_attacks.main(["--model-path", str(model_path), "--dataset", str(dataset), "--num-images", "50",
                           "--attacks", "natural", "--precision", "fp32", "--json", str(tmp_path / name)])
        return str(tmp_path / name)

    before, moved = evaluated(folder, "before.json"), evaluated(tmp_path / "moved", "moved.json")
    assert compare.main([before, moved])["Natural"]["p"] == 1
    shutil.copy(next((folder / "test/3").iterdir()), folder / "test/3/new.png")
    grown = evaluated(folder, "grown.json")
    capsys.readouterr()
    assert "not the same images" in fails_in_one_line(compare.main, [before, grown], capsys)


def test_the_hash_is_of_images_labels_and_classes_in_any_order_of_these():
    digits = data.load("digits", train=False).subset(slice(40))
    turned = digits._replace(labels=9 - digits.labels, classes=digits.classes[::-1])
    assert data.fingerprint(turned) == data.fingerprint(digits)
    pixel = digits.images.clone()
    pixel[0, 0, 0, 0] ^= 1
    others = [digits._replace(images=pixel), digits._replace(labels=digits.labels.roll(1)), digits.subset(slice(39)),
              digits._replace(classes=[*digits.classes[:9], "nine"]), digits.subset(torch.arange(39, -1, -1))]
    assert len({data.fingerprint(each) for each in (digits, *others)}) == 6


def test_equal_radii_are_equal_however_written(results, capsys):
    for path, epsilon in zip(results, ("8/255", "16/510"), strict=True):
        result = json.loads(path.read_text())
        result["attacks"][0]["params"]["epsilon"] = epsilon
        path.write_text(json.dumps(result))
    assert list(compare.main([str(path) for path in results])) == ["PGD-20"]
    for wrong in ({"epsilon": "x"}, {"epsilon": None}, {"epsilon": "1/0"}, []):
        result["attacks"][0]["params"] = wrong
        results[1].write_text(json.dumps(result))
        assert "not a result" in fails_in_one_line(compare.main, results, capsys)


def test_many_pooled_rows_and_two_of_one_name_are_compared_at_once():
    """Each row builds on all before it."""
    rows = {f"row {i}": {"params": {"seed": 0, "pool": [f"row {j}" for j in range(i)]}} for i in range(60)}
    assert compare.equal_attacks(rows, rows) == list(rows)
    other = copy.deepcopy(rows)
    other["row 30"]["params"]["seed"] = 1
    assert compare.equal_attacks(rows, other) == compare.equal_attacks(other, rows) == list(rows)[:30]
    twice = {"Natural": {"params": {}}, "PGD-20": {"params": {"pool": ["Natural", "PGD-20"]}}}
    assert compare.equal_attacks(twice, twice) == list(twice)


@pytest.mark.parametrize("gained, lost, n", [(20, 0, 20), (0, 20, 20), (1, 0, 1)])
def test_the_interval_stays_in_what_is_possible(gained, lost, n):
    a, b = outcomes(n, gained, lost, 0)
    for found in (compare.paired_difference(a, b), estimated(a, b, a, b)):
        assert -1 <= found["interval"][0] <= found["interval"][1] <= 1
    before, after = outcomes(400, 90, 30, 200)
    low, high = compare.paired_difference(before, after)["interval"]
    assert (low, high) == pytest.approx((0.0978, 0.2007), abs=1e-3)
