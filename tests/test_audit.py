"""audit.py: passes a plain model, speaks up on masked ones, and judges an attack by a second model."""

import json

import pytest
import torch
from helpers import fails_in_one_line
from test_eval import normalised_outside

import audit
import checkpoints
import data
import models

SMALL = ["--num-images", "40", "--precision", "fp32", "--compile", "off", "--epsilon", "0.02",
         "--square-queries", "300"]
pytestmark = pytest.mark.usefixtures("cut_budget")


class Scaled(torch.nn.Module):
    """Softmax saturates in float32: its gradient is zero."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 1e6 * self.model(x)


class Quantised(Scaled):
    """Rounding has no gradient."""

    def forward(self, x):
        return self.model((x * 16).round() / 16)


def run(model_path, monkeypatch, wrapper=None, *flags):
    real = checkpoints.load_model
    monkeypatch.setattr(audit, "STEPS", (1, 5, 20))
    monkeypatch.setattr(audit, "RESTARTS", 2)
    if wrapper:
        monkeypatch.setattr(checkpoints, "load_model", lambda *a, **k: (wrapper(real(*a, **k)[0]), real(*a, **k)[1]))
    result = audit.main(["--model-path", str(model_path), *SMALL, *flags])
    monkeypatch.setattr(checkpoints, "load_model", real)
    return result, {check["name"]: check for check in result["checks"]}


@pytest.mark.slow
def test_a_plain_model_passes(model_path, monkeypatch, tmp_path, capsys):
    result, checks = run(model_path, monkeypatch, None, "--json", str(tmp_path / "a.json"))
    assert all(check["fine"] for check in checks.values()), checks
    assert list(checks) == list(audit.CHECKS)
    assert "Nothing here points to gradient masking" in result["verdict"][0]
    assert checks["radius"]["numbers"]["1/2"] == 0 and checks["gradients"]["numbers"] == {"zero or non-finite": 0}
    order = list(checks["order"]["numbers"].values())
    assert order[0] > order[-1] > 0  # on this model and radius the attack bites but does not break all
    assert checks["stronger"]["numbers"]["APGD-CE + APGD-T"] <= checks["stronger"]["numbers"]["PGD-20"]
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(json.dumps(result))
    assert "ok   steps" in capsys.readouterr().out


@pytest.mark.parametrize(("wrapper", "flags", "of"), [
    (Scaled, {"gradients", "stronger"}, ("gradients", "stronger")),  # these alone, on fewer images, for time's sake
    pytest.param(Scaled, {"gradients", "stronger"}, tuple(audit.CHECKS), marks=pytest.mark.slow),
    pytest.param(Quantised, {"gradients", "gradient-free", "radius"}, tuple(audit.CHECKS), marks=pytest.mark.slow)])
def test_a_masked_model_is_flagged(model_path, monkeypatch, wrapper, flags, of):
    monkeypatch.setattr(audit, "CHECKS", {name: audit.CHECKS[name] for name in of})
    images = "40" if of == tuple(audit.CHECKS) else "16"
    result, checks = run(model_path, monkeypatch, wrapper, "--num-images", images)
    flagged = {name for name, check in checks.items() if not check["fine"]}
    assert flags <= flagged
    assert "not to be trusted" in result["verdict"][-1] and "points to" not in result["verdict"][0]


@pytest.mark.slow
def test_what_the_oracle_sees(model_path, monkeypatch, tmp_path):
    """Against the definitions, on the images themselves."""
    torch.manual_seed(1)
    oracle = checkpoints.load_model(model_path)[0].eval()
    with torch.no_grad():
        for parameter in oracle.parameters():  # it sees much of what the source sees, not all
            parameter += 0.2 * parameter.std() * torch.randn_like(parameter)
    torch.save(oracle.state_dict(), tmp_path / "o.pt")
    monkeypatch.setattr(audit, "CHECKS", {"order": audit.CHECKS["order"]})
    result, _ = run(model_path, monkeypatch, None, "--num-images", "40", "--oracle", str(tmp_path / "o.pt"),
                    "--alphas", "0", "1")
    rows = {row["name"]: row for row in result["semantics"]}
    assert list(rows) == ["Natural", "PGD-CE", "PGD-KL", "  PGD-CE as strong as PGD-KL", "PGD-LS 0",
                          "  PGD-CE as strong as PGD-LS 0", "PGD-LS 1", "  PGD-CE as strong as PGD-LS 1"]
    assert rows["Natural"]["oracle_agrees_where_source_fails"] is not None  # the model is wrong on some
    test = data.load("digits", train=False).subset(slice(40))
    with torch.no_grad():
        p = oracle(test.images / 255).softmax(1)
    assert rows["Natural"]["oracle_agrees"] == pytest.approx((p.argmax(1) == test.labels).float().mean().item())
    assert rows["Natural"]["oracle_p_true"] == pytest.approx(p[torch.arange(40), test.labels].mean().item(), abs=1e-5)
    assert rows["Natural"]["l2"] == rows["Natural"]["l_inf"] == rows["Natural"]["at_edge"] == 0
    ce = rows["PGD-CE"]
    assert {k: v for k, v in rows["PGD-LS 0"].items() if k in ce and k != "name"} == {
        k: v for k, v in ce.items() if k != "name"}
    over = {name: row["oracle_over_equal_ce"]["difference"] for name, row in rows.items() if name[4:6] in ("KL", "LS")}
    assert len(over) == 3 and any(over.values())
    for name, difference in over.items():
        equal = rows[f"  PGD-CE as strong as {name}"]
        assert difference == pytest.approx(rows[name]["oracle_agrees"] - equal["oracle_agrees"])
    assert ce["l_inf"] == pytest.approx(0.02, abs=1e-4) and ce["l2"] <= 0.02 * 3072**0.5 and 0 < ce["at_edge"] < 1
    weak, as_strong = rows["PGD-LS 1"], rows["  PGD-CE as strong as PGD-LS 1"]
    assert weak["source_accuracy"] > ce["source_accuracy"] and as_strong["epsilon"] < 0.02
    assert abs(weak["source_accuracy"] - as_strong["source_accuracy"]) <= 0.051  # two images


def test_an_interrupted_audit_keeps_what_is_finished(model_path, tmp_path, monkeypatch):
    def interrupted(source):
        raise KeyboardInterrupt

    monkeypatch.setattr(audit, "CHECKS", {"order": audit.CHECKS["order"], "steps": (interrupted, "", "")})
    with pytest.raises(SystemExit) as exit_info:
        audit.main(["--model-path", str(model_path), *SMALL, "--json", str(tmp_path / "a.json")])
    result = json.loads((tmp_path / "a.json").read_text())
    assert exit_info.value.code == 130 and result["complete"] is False
    assert [check["name"] for check in result["checks"]] == ["order"]


def test_a_gpu_out_of_memory_ends_in_one_line(model_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(audit.runtime, "forward_pass", full)
    with pytest.raises(SystemExit, match="^audit.py: CUDA out of memory$"):
        audit.main(["--model-path", str(model_path), *SMALL])


def test_all_batches_of_the_attacks_have_one_size(small_net):
    """So that compiled code is compiled once; 10 images in batches of 4 end as in one batch of 10."""
    sizes, images = set(), torch.randint(256, (10, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    labels, outcomes = small_net(images / 255).argmax(1), []

    def forward(x):
        sizes.add(len(x))
        return small_net(x)

    for batch_size in (4, 10):
        _, args = audit.parse_args(["--model-path", "m.pt", "--epsilon", "0.1", "--batch-size", str(batch_size)])
        with models.frozen(small_net):
            source = audit.Source(small_net, forward, data.Dataset(images, labels, list("abcde")), args)
            ce, kl = torch.zeros(2, 10, 3, 8, 8)
            for objective, x_adv in (("ce", ce), ("kl", kl)):
                source.logits(source.pgd(objective), x_adv=x_adv)
            masks = audit.check_order(source)[0]
            outcomes.append((ce, kl, {name: audit.share(mask) for name, mask in masks.items()}))
        assert sizes == {batch_size}
        sizes.clear()
    for a, b in zip(*(found[:2] for found in outcomes), strict=True):
        assert ((a - b).abs() < 1e-5).float().mean() > 0.99  # the batch size may turn a sign by rounding
    assert outcomes[0][2] == outcomes[1][2] and len(set(outcomes[0][2].values())) > 1


def test_what_counts_as_raised():
    """50 and 80 of the same 100 images; then 50 and 51, which is noise."""
    low, high, little = (torch.arange(100) < n for n in (50, 80, 51))
    for masks, expected in (([low, high], False), ([high, low, high], False), ([high, low], True),
                            ([low, little], True)):
        assert audit.never_raised(dict(enumerate(masks))) == expected


def test_a_radius_that_no_weaker_attack_matches(model_path, monkeypatch):
    """PGD-CE at any radius is weaker than what breaks everything."""
    model, _ = checkpoints.load_model(model_path)
    _, args = audit.parse_args(["--model-path", "m.pt", "--epsilon", "0.01"])
    source = audit.Source(model, model, data.load("digits", train=False).subset(slice(8)), args)
    with models.frozen(model):
        assert audit.matched_radius(source, -1.0, halvings=2) == (audit.Fraction("0.01"), False)
        assert audit.matched_radius(source, 1.0, halvings=2) == (audit.Fraction("0.0025"), True)


def test_the_radius_of_an_attack_as_strong_is_found_whatever_the_count(model_path):
    """1 - 12/100 and 88/100 differ in floats."""
    model, _ = checkpoints.load_model(model_path)
    _, args = audit.parse_args(["--model-path", "m.pt", "--epsilon", "0.02"])
    for n in (9, 10, 11, 13):
        source = audit.Source(model, model, data.load("digits", train=False).subset(slice(n)), args)
        with models.frozen(model):
            row, _ = audit.judged(source, model, "PGD-CE", source.pgd(epsilon="0.01"))
            assert audit.matched_radius(source, row["source_accuracy"], halvings=1) == (audit.Fraction("0.01"), True)


def test_an_oracle_that_numbers_the_classes_otherwise_is_refused(model_path, tmp_path, capsys):
    content = checkpoints.load(model_path)
    content["classes"] = content["classes"][::-1]
    content["state_dict"] |= {key: content["state_dict"][key].flip(0) for key in ("fc.weight", "fc.bias")}
    checkpoints.save(content, tmp_path / "o.pt")
    argv = ["--model-path", model_path, "--oracle", tmp_path / "o.pt"]
    assert "in another order" in fails_in_one_line(audit.main, argv, capsys)


def test_bad_input(model_path, tmp_path, capsys):
    content = checkpoints.load(model_path)
    content["args"] = content["args"] | {"dataset": "cifar10"}
    checkpoints.save(content, tmp_path / "other.pt")
    for argv in (
        ["--oracle", model_path], ["--oracle", tmp_path / "none.pt"], ["--oracle", tmp_path / "other.pt"],
        ["--num-images", "401"], ["--alphas", "2"], ["--epsilon", "8"], ["--square-queries", "0"],
        ["--json", tmp_path / "no" / "a.json"], ["--json", tmp_path],
    ):
        fails_in_one_line(audit.main, ["--model-path", model_path, *argv], capsys)


def test_what_a_file_leaves_open_is_said(model_path, tmp_path, monkeypatch, capsys):
    """Of the model and of the oracle."""
    normalised_outside(model_path, tmp_path / "m.pt")
    monkeypatch.setattr(audit, "CHECKS", {"order": audit.CHECKS["order"]})
    monkeypatch.setattr(audit, "semantics", lambda *_: [])
    result, _ = run(tmp_path / "m.pt", monkeypatch, None, "--dataset", "digits", "--oracle", str(model_path))
    assert checkpoints.ASSUMED in result["model"]["notes"] and "did you mean" in result["model"]["notes"][1]
    assert capsys.readouterr().err.count("did you mean --normalize 0.4914") == 1 and result["oracle"]["notes"] == []
    result, _ = run(model_path, monkeypatch, None, "--num-images", "100", "--oracle", str(tmp_path / "m.pt"))
    assert result["model"]["notes"] == ["trained at ε 0.01, attacked at ε 0.02"]
    assert "did you mean" in result["oracle"]["notes"][1]
    capsys.readouterr()
    error = fails_in_one_line(audit.main, ["--model-path", model_path, "--normalize", "0,0,0", "1,1,1"], capsys)
    assert "it is a file of this project" in error
