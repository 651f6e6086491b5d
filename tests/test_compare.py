"""Paired differences against statistics that this project did not write."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import fails_in_one_line
from scipy.stats import binomtest

import compare
import scores


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


@pytest.fixture
def results(tmp_path):
    g = torch.Generator().manual_seed(0)
    paths = []
    for name in "AB":
        rows = [scores.outcome("PGD-20", {"epsilon": "8/255"}, torch.rand(77, generator=g) < 0.5, 1.0)]
        result = {"model": {"dataset": "cifar10"}, "n": 77, "attacks": rows}
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(result))
    return paths


def test_the_masks_survive_the_json(results, capsys):
    differences = compare.main([str(path) for path in results])
    first, second = (scores.read(path)["attacks"][0] for path in results)
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


def test_files_that_are_no_results(tmp_path, results, capsys):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "cut.json").write_text(results[0].read_text()[:100])
    for bad in (tmp_path / "absent.json", tmp_path / "list.json", tmp_path / "cut.json", tmp_path):
        fails_in_one_line(compare.main, [results[0], bad], capsys)
