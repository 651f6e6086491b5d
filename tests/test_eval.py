"""The evaluation: its numbers against a loop written out, its JSON, its table and its errors."""

import json
import pathlib
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import fails_in_one_line, record_on_a_cpu
from test_checkpoints import bad_files

import attacks
import checkpoints
import data
import eval_attacks
import losses
import models
import runtime

SMALL = ["--num-images", "24", "--precision", "fp32", "--compile", "off", "--num-steps", "3", "--cw-steps", "4"]


def mask(row):
    return np.unpackbits(np.frombuffer(bytes.fromhex(row["correct_mask"]), np.uint8))[: row["n"]].astype(bool)


def test_accuracies_equal_a_loop_written_out(model_path):
    """One image at a time, with torch's own losses and the textbook's form of PGD."""
    result = eval_attacks.main(["--model-path", str(model_path), *SMALL, "--attacks", "natural", "fgsm", "pgd", "cw",
                                "pgd-kl", "pgd-ls", "--alphas", "0.2", "1"])
    model, _ = checkpoints.load_model(model_path)
    test = data.load("digits", train=False)
    epsilon = float(data.EPSILON_DIGITS)

    def cw(z, y, _):
        other = torch.cat([z[0, : y[0]], z[0, y[0] + 1 :]]).max()
        return -torch.clamp(z[0, y[0]] - other + 50, min=0)

    objectives = {
        "FGSM": (lambda z, y, _: F.cross_entropy(z, y), 1, epsilon),
        "PGD-3": (lambda z, y, _: F.cross_entropy(z, y), 3, epsilon / 10),
        "CW-inf": (cw, 4, epsilon / 10),
        "PGD-3-KL": (lambda z, y, p: F.kl_div(z.log_softmax(1), p, reduction="sum"), 3, epsilon / 10),
        "PGD-3-LS 0.2": (lambda z, y, _: F.cross_entropy(z, y, label_smoothing=0.2 * 10 / 9), 3, epsilon / 10),
        "PGD-3-LS 1": (lambda z, y, _: -(z.log_softmax(1).sum() - z.log_softmax(1)[0, y[0]]) / 9, 3, epsilon / 10),
    }
    assert [row["name"] for row in result["attacks"]] == ["Natural", *objectives, "Worst case"]
    assert len({row["correct"] for row in result["attacks"]}) > 3  # the attacks differ on this model
    assert np.array_equal(mask(result["attacks"][-1]), np.all([mask(row) for row in result["attacks"][:-1]], axis=0))
    for row in result["attacks"][:-1]:
        correct, x_advs = [], []
        for i in range(24):
            x, y = test.images[i : i + 1] / 255, test.labels[i : i + 1]
            x_adv = x
            if row["name"] in objectives:
                objective, steps, step = objectives[row["name"]]
                p = model(x).softmax(1).detach()
                if row["name"] != "FGSM":
                    x_adv = x + attacks.start_per_image("uniform", x, epsilon, torch.tensor([i]))
                    x_adv = x_adv.clamp(0, 1)
                for _ in range(steps):
                    x_adv.requires_grad_()
                    gradient = torch.autograd.grad(objective(model(x_adv), y, p), x_adv)[0]
                    x_adv = x_adv.detach() + step * gradient.sign()
                    x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
            correct.append((model(x_adv).argmax() == y).item())
            x_advs.append(x_adv)
        assert np.sum(mask(row) != correct) == 0, row["name"]
        assert row["correct"] == sum(correct) and row["accuracy"] == sum(correct) / 24
        if row["name"] in objectives:  # the images too, because many attacks have the same outcome
            with models.frozen(model):
                attack = eval_attacks.make_attack(model, row["params"])
                ours = attack(test.images[:24] / 255, test.labels[:24], torch.arange(24))
            assert ((ours - torch.cat(x_advs)).abs() < 1e-5).float().mean() > 0.995, row["name"]  # a sign may flip


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_attacked_logits_do_not_depend_on_the_batch_size(small_net, batch_size):
    g = torch.Generator().manual_seed(0)
    pixels, y = torch.randint(256, (7, 3, 8, 8), generator=g, dtype=torch.uint8), torch.randint(5, (7,), generator=g)
    seen = []

    def attack(x, labels, indices):
        assert torch.equal(labels, y[indices])
        start = attacks.start_per_image("uniform", x, 0.1, indices)
        return attacks.pgd(small_net, x, labels, losses.cross_entropy, epsilon=0.1, step_size=0.05, num_steps=3,
                           random_start=start)

    logits = eval_attacks.attacked_logits(small_net, pixels, y, attack, batch_size, seen.append)
    expected = small_net(attack(pixels.float() / 255, y, torch.arange(7))).detach()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert sum(seen) == 7


def test_batch_size_does_not_alter_the_outcome(model_path):
    runs = [eval_attacks.main(["--model-path", str(model_path), *SMALL, "--batch-size", b]) for b in ("5", "24")]
    masks = [[row["correct_mask"] for row in run["attacks"]] for run in runs]
    assert masks[0] == masks[1]


def test_json_holds_what_the_reader_needs(model_path, tmp_path, capsys):
    argv = ["--model-path", str(model_path), *SMALL, "--json", str(tmp_path / "r.json")]
    eval_attacks.main(argv)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["model"]["arch"] == "wrn-10-1" and result["model"]["defense"] == "madry"
    assert result["model"]["sha256"] == checkpoints.sha256(model_path) and result["n"] == 24
    assert result["command"] == " ".join(["python", "eval_attacks.py", *argv])
    rows = {row["name"]: row for row in result["attacks"]}
    assert list(rows) == ["Natural", "FGSM", "PGD-3", "CW-inf", "Worst case"] and result["complete"]
    assert rows["PGD-3"]["params"] == {"objective": "ce", "epsilon": "0.05", "step_size": "1/200", "num_steps": 3,
                                       "random_start": "uniform", "seed": 0}
    assert rows["CW-inf"]["params"]["kappa"] == 50 and rows["CW-inf"]["params"]["num_steps"] == 4
    for row in rows.values():
        assert mask(row).sum() == row["correct"] and row["n"] == 24
        assert f"{row['correct']}/24" in printed.replace(" ", "")


def test_bad_flags(model_path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "required: --model-path" in fails_in_one_line(eval_attacks.main, [], capsys)
    for argv, message in (
        (["--attacks", "pgd-ls"], "pgd-ls and --alphas go together"), (["--alphas", "0.1"], "go together"),
        (["--num-images", "401"], "has 400 test images"), (["--num-images", "0"], "'0' is not an integer"),
        (["--epsilon", "8"], "'8' is not a fraction"), (["--attacks", "deepfool"], "invalid choice: 'deepfool'"),
        (["--attacks", "pgd-kl", "--random-start", "none"], "pgd-kl would not move"),
        (["--json", "no/such/folder.json"], "folder does not exist"), (["--arch", "wrn-16-2"], "not a wrn-16-2"),
        (["--seed=-1"], "'-1' is not an integer"), (["--dataset", "nowhere"], "unknown data set 'nowhere'"),
        (["--restarts", "2", "--random-start", "none"], "all are the same"), (["--restarts", "1001"], "at most 1000"),
        (["--pool", "--epsilons", "0.1", "0.2"], "--pool: an image"), (["--save-images"], "goes with --save-examples"),
        (["--epsilon", "0.1", "--epsilons", "0.1"], "exclude one another"),
    ):
        assert message in fails_in_one_line(eval_attacks.main, ["--model-path", model_path, *argv], capsys)
    assert not list(tmp_path.iterdir())


def test_bad_model_files(tmp_path, capsys):
    for name, message in bad_files(tmp_path).items():
        assert message in fails_in_one_line(eval_attacks.main, ["--model-path", tmp_path / name], capsys)


def test_a_model_with_another_number_of_classes_than_the_data(tmp_path, capsys):
    torch.save(models.build_model("wrn-10-1", 7).state_dict(), tmp_path / "m.pt")
    argv = ["--model-path", tmp_path / "m.pt", "--dataset", "digits"]
    assert "7 classes, digits has 10" in fails_in_one_line(eval_attacks.main, argv, capsys)


def test_evaluation_defaults_are_the_papers(model_path):
    _, args = eval_attacks.parse_args(["--model-path", "m.pt", "--epsilon", "8/255"])
    rows = eval_attacks.attack_list(args)
    assert [name for name, _ in rows] == ["Natural", "FGSM", "PGD-20", "CW-inf"]
    assert rows[2][1]["num_steps"] == 20 and Fraction(rows[2][1]["step_size"]) == Fraction(8, 2550)
    assert rows[3][1]["num_steps"] == 30 and rows[3][1]["kappa"] == 50 and rows[1][1]["random_start"] == "none"


def rows_of(model_path, *flags):
    result = eval_attacks.main(["--model-path", str(model_path), *SMALL, *flags])
    return {row["name"]: row for row in result["attacks"]}


def test_restarts_break_what_any_of_them_breaks(model_path):
    """With much noise and next to no step, so that the start decides."""
    flags = ["--attacks", "pgd", "cw", "--epsilon", "0.3", "--step-size", "0.001", "--num-steps", "1",
             "--cw-steps", "1", "--num-images", "100", "--restarts"]
    one, three = (rows_of(model_path, *flags, restarts) for restarts in "13")
    model, _ = checkpoints.load_model(model_path)
    test = data.load("digits", train=False).subset(slice(100))
    for name in ("PGD-1", "CW-inf"):
        with models.frozen(model):
            attack = eval_attacks.make_attack(model, one[name]["params"])
            right = [model(attack(test.images / 255, test.labels, torch.arange(100), restart)).argmax(1) == test.labels
                     for restart in range(3)]
        assert np.array_equal(mask(one[name]), right[0].numpy())
        assert np.array_equal(mask(three[f"{name} x3"]), torch.stack(right).all(0).numpy())
        assert three[f"{name} x3"]["params"]["restarts"] == 3
        assert three[f"{name} x3"]["correct"] < one[name]["correct"]  # 65 and 70 on one machine


def test_any_step_takes_the_worst_iterate(model_path):
    """Against PGD with 0, 1, ... steps from the same start, as each of these is one iterate. A step of twice the radius
    jumps from corner to corner: the last iterate is not the worst."""
    flags = ["--attacks", "pgd", "--any-step", "--epsilon", "0.1", "--step-size", "0.2", "--num-images", "100"]
    row = rows_of(model_path, *flags)["PGD-3 any step"]
    model, _ = checkpoints.load_model(model_path)
    test = data.load("digits", train=False).subset(slice(100))
    x = test.images / 255
    start = attacks.start_per_image("uniform", x, 0.1, torch.arange(100))
    right = []
    with models.frozen(model):
        for steps in range(4):
            x_adv = attacks.pgd(model, x, test.labels, lambda z, y: F.cross_entropy(z, y, reduction="none"),
                                epsilon=0.1, step_size=0.2, num_steps=steps, random_start=start)
            right.append(model(x_adv).argmax(1) == test.labels)
    assert np.array_equal(mask(row), torch.stack(right).all(0).numpy()) and row["params"]["any_step"] is True
    assert row["correct"] < right[-1].sum()


def test_the_pool_shrinks(model_path, monkeypatch):
    """Each attack sees what the ones before left standing, and its row is what all of them leave."""
    apart = rows_of(model_path, "--attacks", "natural", "fgsm", "pgd", "cw")
    seen, real = [], eval_attacks.attacked_logits
    monkeypatch.setattr(eval_attacks, "attacked_logits", lambda *a: (seen.append(len(a[6])), real(*a))[1])
    pooled = rows_of(model_path, "--attacks", "natural", "fgsm", "pgd", "cw", "--pool", "--batch-size", "7")
    standing = np.ones(24, bool)
    for (name, row), asked in zip(pooled.items(), [*seen, None], strict=True):
        assert asked in (None, standing.sum())
        standing &= mask(apart[name])
        assert np.array_equal(mask(row), standing), name
    assert pooled["PGD-3"]["params"]["pool"] == ["Natural", "FGSM"] and "pool" not in apart["PGD-3"]["params"]
    assert 0 < standing.sum() < mask(apart["Natural"]).sum()


def test_a_pool_that_runs_empty(model_path):
    rows = rows_of(model_path, "--attacks", "natural", "pgd", "fgsm", "cw", "--pool", "--epsilon", "1")
    assert [row["correct"] for row in rows.values()][-3:] == [0, 0, 0]


def test_sweeps_are_rows(model_path):
    rows = rows_of(model_path, "--attacks", "natural", "pgd", "pgd-ls", "--alphas", "0", "1", "--epsilons", "0.01",
                   "1/20", "--steps-sweep", "1", "4")
    assert list(rows) == ["Natural"] + [f"{name} ε {e}" for e in ("0.01", "1/20") for name in (
        "PGD-1", "PGD-4", "PGD-1-LS 0", "PGD-1-LS 1", "PGD-4-LS 0", "PGD-4-LS 1")]
    one = rows["PGD-4-LS 0 ε 1/20"]
    assert one["params"]["step_size"] == "1/200" and one["params"]["num_steps"] == 4 and one["params"]["alpha"] == 0
    assert one["correct_mask"] == rows["PGD-4 ε 1/20"]["correct_mask"]  # LSCE with α = 0 is CE
    single = rows_of(model_path, "--attacks", "pgd", "--epsilon", "0.01", "--num-steps", "4")
    assert single["PGD-4"]["correct_mask"] == rows["PGD-4 ε 0.01"]["correct_mask"]


def test_shares_of_examples_made_easier(model_path):
    natural = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [30.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    attacked = torch.tensor([[1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [31.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    y = torch.tensor([0, 1, 0, 0])  # p_y = 0.787, 0.909, 1 - 1.9e-13 (1 in float32), 0.212; lower, higher, higher, same
    for alpha, above in ((None, None), (0.0, 0.0), (1e-6, 0.25), (0.1, 0.5), (0.3, 0.75), (1.0, 1.0)):
        row = eval_attacks.spat_shares(natural, attacked, y, alpha)
        assert row["share_made_easier"] == 0.5 and row.get("share_p_y_above_1_minus_alpha") == above
    rows = rows_of(model_path, "--attacks", "natural", "pgd", "pgd-ls", "--alphas", "0", "1")
    assert rows["PGD-3-LS 0"]["share_p_y_above_1_minus_alpha"] == 0 and "share_made_easier" not in rows["Natural"]
    assert rows["PGD-3-LS 0"]["share_made_easier"] == rows["PGD-3"]["share_made_easier"] < 0.1
    assert rows["PGD-3-LS 1"]["share_made_easier"] > 0.5  # at α = 1 it raises most
    assert "share_made_easier" not in rows_of(model_path, "--attacks", "natural", "fgsm", "--pool")["FGSM"]


def test_confidences_of_cw(model_path):
    rows = rows_of(model_path, "--attacks", "cw", "--kappas", "50", "0")
    assert [row["params"]["kappa"] for row in rows.values() if "kappa" in row["params"]] == [50, 0]
    assert list(rows) == ["CW-inf", "CW-inf κ 0", "Worst case"]


@pytest.mark.parametrize(("name", "flags"), [
    ("CW-inf κ 0", ["cw", "--kappas", "0", "--cw-steps", "10"]), ("PGD-3 any step", ["pgd", "--any-step"])])
def test_where_one_step_decides_it_is_crafted_in_float32(model_path, tmp_path, name, flags, capsys):
    """In bf16 CW with κ = 0 stops where bf16 has crossed the boundary and float32, which scores, has not."""
    for precision in ("bf16", "fp32"):
        rows_of(model_path, "--num-images", "100", "--attacks", *flags, "--precision", precision,
                "--save-examples", str(tmp_path / precision))
    bf16, fp32 = (np.load(tmp_path / precision)[f"margins/{name}"] for precision in ("bf16", "fp32"))
    assert np.array_equal(bf16, fp32)
    assert f"crafted in bf16, {name} in fp32" in capsys.readouterr().out


@pytest.mark.parametrize(("protocol", "expected"), [
    ("paper", {"epsilon": "0.05", "step_size": "1/200", "num_steps": 20}),
    ("rst", {"epsilon": "0.031", "step_size": "0.003", "num_steps": 20}),
    ("rst-restarts", {"epsilon": "0.031", "step_size": "0.01", "num_steps": 40, "restarts": 5, "any_step": True,
                      "precision": "fp32"}),
])
def test_protocols(protocol, expected):
    _, args = eval_attacks.parse_args(["--model-path", "m.pt", "--protocol", protocol])
    args.epsilon = args.epsilon or "0.05"
    params = next(params for name, params in eval_attacks.attack_list(args) if name.startswith("PGD"))
    assert params == {"objective": "ce", "random_start": "uniform", "seed": 0} | expected
    _, args = eval_attacks.parse_args(["--model-path", "m.pt", "--protocol", protocol, "--num-steps", "7"])
    assert args.num_steps == 7
    _, args = eval_attacks.parse_args(["--model-path", "m.pt", "--protocol", protocol, "--epsilons", "0.1", "0.2"])
    assert (args.epsilon, args.epsilons) == (None, ["0.1", "0.2"])


@pytest.mark.parametrize("flags", [[], ["--pool", "--epsilon", "0.05"]])
def test_saved_examples(model_path, tmp_path, flags):
    path = tmp_path / "examples.npz"
    rows = rows_of(model_path, "--attacks", "natural", "pgd", "--restarts", "2", "--save-images",
                   "--save-examples", str(path), *flags)
    saved = np.load(path)
    test = data.load("digits", train=False).subset(slice(24))
    x, y = test.images.numpy() / 255, test.labels.numpy()
    assert np.array_equal(saved["labels"], y)
    model, _ = checkpoints.load_model(model_path)
    for name in ("Natural", "PGD-3 x2"):
        with torch.no_grad():
            logits = model(torch.from_numpy(saved[f"images/{name}"])).numpy()
        assert np.array_equal(saved[f"predictions/{name}"], logits.argmax(1))
        assert np.array_equal(saved[f"predictions/{name}"] == y, mask(rows[name]))
        other = np.where(np.eye(10, dtype=bool)[y], -np.inf, logits).max(1)
        np.testing.assert_allclose(saved[f"margins/{name}"], logits[np.arange(24), y] - other, atol=1e-4)
    assert np.abs(saved["images/Natural"] - x).max() < 1e-6
    assert 0.045 < np.abs(saved["images/PGD-3 x2"] - x).max() < 0.05 + 1e-6


def test_ctrl_c_keeps_what_is_finished(model_path, tmp_path, monkeypatch, capsys):
    real = eval_attacks.make_attack

    def interrupted(forward, params):
        if params["objective"] == "cw":
            raise KeyboardInterrupt
        return real(forward, params)

    monkeypatch.setattr(eval_attacks, "make_attack", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        eval_attacks.main(["--model-path", str(model_path), *SMALL, "--json", str(tmp_path / "r.json")])
    assert exit_info.value.code == 130
    result = eval_attacks.read(tmp_path / "r.json")
    assert result["complete"] is False and [row["name"] for row in result["attacks"]] == ["Natural", "FGSM", "PGD-3"]
    printed = capsys.readouterr().out
    assert "INCOMPLETE" in printed and "PGD-3" in printed and "CW" not in printed


@pytest.mark.parametrize("fails", [False, True])
def test_the_json_says_graphs_only_if_the_steps_can_be_recorded(model_path, monkeypatch, capsys, fails):
    record_on_a_cpu(monkeypatch)
    monkeypatch.setattr(runtime, "pick_compile", lambda *_: ("graphs", "the fastest"))
    if fails:
        monkeypatch.setattr(runtime.Recording, "__init__", lambda *_: torch.zeros(2).view(3))
    result = eval_attacks.main(["--model-path", str(model_path), *SMALL, "--compile", "auto", "--attacks", "pgd"])
    assert result["compile"] == ("on" if fails else "graphs") and result["complete"]
    assert ("--compile graphs failed, CompileFailed" in capsys.readouterr().out) == fails


def test_a_natural_accuracy_near_chance_is_named(model_path, tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(models.build_model("wrn-10-1", 10).state_dict(), tmp_path / "m.pt")
    eval_attacks.main(["--model-path", str(tmp_path / "m.pt"), "--dataset", "digits", *SMALL, "--attacks", "natural"])
    assert "probably wrong preprocessing" in capsys.readouterr().err
    rows_of(model_path, "--attacks", "natural")
    assert "preprocessing" not in capsys.readouterr().err


def test_more_bad_flags(model_path, tmp_path, capsys):
    for argv in (
        ["--save-examples", "no/such/folder.npz"], ["--normalize", "0.5,0.5", "0.5,0.5,0.5"], ["--protocol", "mine"],
        ["--normalize", "0,0,0", "1,1,0"], ["--normalize", "0,0,0"], ["--steps-sweep", "0"], ["--epsilons", "2"],
        ["--kappas", "x"], ["--num-classes", "9"], ["--restarts", "0"], ["--json", tmp_path], ["--json", "."],
        ["--save-examples", tmp_path], ["--seed", 2**30],
        ["--normalize", "nan,0,0", "1,1,1"], ["--normalize", "0,0,0", "1,inf,1"],
    ):
        fails_in_one_line(eval_attacks.main, ["--model-path", model_path, *argv], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   torch.OutOfMemoryError("CUDA out of memory")])
def test_a_full_disk_or_gpu_ends_in_one_line(model_path, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    with pytest.raises(SystemExit, match="No space left on device|CUDA out of memory"):
        rows_of(model_path, "--json", str(tmp_path / "r.json"))


def test_the_table_names_the_training():
    result = {"model": {"path": "m.pt", "arch": "wrn-34-10", "dataset": "cifar10", "defense": "mart", "spat_alpha": 0.3,
                        "epochs": 90, "seed": 1, "args": {}}, "n": 10, "complete": True, "epsilon": "8/255",
              "precision": "fp32",
              "attacks": [eval_attacks.outcome("Natural", {}, torch.tensor([True] * 8 + [False] * 2), 1.0)]}
    assert " 80.00%   49.02 - 94.33 " in eval_attacks.table(result)
    assert "wrn-34-10 on cifar10, mart + SPAT (α 0.3), 90 epochs, seed 1" in eval_attacks.table(result)
    result["model"]["args"]["epochs"] = 120
    assert ", epoch 90 of 120, seed 1" in eval_attacks.table(result)


MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
USUAL = ["--normalize", "0.4914,0.4822,0.4465", "0.2471,0.2435,0.2616"]
HINT = "did you mean --normalize 0.4914,0.4822,0.4465 0.2471,0.2435,0.2616?"


def normalised_outside(source, path):
    """Save a model of ours as one of somebody who normalises in his own code: its first layer wants (x - mean) / std.
    """
    state = {key: value.float() for key, value in checkpoints.load(source)["state_dict"].items()}
    first, shift = state["conv1.weight"], (state["conv1.weight"] * MEAN[:, None, None]).sum((1, 2, 3))
    state["conv1.weight"] = first * STD[:, None, None]
    state["block1.layer.0.bn1.running_mean"] -= shift
    torch.save({"state_dict": state}, path)


def natural(path, *flags):
    result = eval_attacks.main(["--model-path", str(path), *SMALL, "--attacks", "natural", *flags])
    return result["attacks"][0]["correct"], result["model"]


def test_a_normalisation_outside_the_file_is_named(cifar_dir, tmp_path, capsys):
    source = pathlib.Path(eval_attacks.__file__).parent / "pretrained/cifar10-wrn-10-2-madry-s1.pt"
    normalised_outside(source, tmp_path / "m.pt")
    flags = ["--data-dir", str(cifar_dir), "--num-images", "300"]
    correct, model = natural(tmp_path / "m.pt", *flags)
    captured = capsys.readouterr()
    assert correct < 75 and HINT in captured.err and HINT in captured.out and HINT in model["notes"][1]
    assert checkpoints.ASSUMED in captured.out and checkpoints.ASSUMED in model["notes"]
    correct, model = natural(tmp_path / "m.pt", *flags, *USUAL)
    assert abs(correct - 162) < 3 and model["notes"] == []
    captured = capsys.readouterr()
    assert "assumed" not in captured.out + captured.err and "did you mean" not in captured.out + captured.err


def test_the_same_on_digits_and_nothing_where_it_is_right(model_path, tmp_path, capsys):
    normalised_outside(model_path, tmp_path / "outside.pt")
    torch.save(checkpoints.load(model_path)["state_dict"], tmp_path / "inside.pt")
    _, model = natural(tmp_path / "outside.pt", "--dataset", "digits")
    assert [note for note in model["notes"] if "did you mean" in note]
    capsys.readouterr()
    assert natural(tmp_path / "inside.pt", "--dataset", "digits")[0] == natural(model_path)[0]
    captured = capsys.readouterr()
    assert checkpoints.ASSUMED in captured.out and "did you mean" not in captured.out + captured.err
    assert captured.out.count("assumed") == 1  # a file of this project says it


def test_a_second_normalisation_is_refused(model_path, capsys):
    error = fails_in_one_line(eval_attacks.main, ["--model-path", model_path, *USUAL], capsys)
    assert "it is a file of this project, trained on images as they are" in error


def test_of_two_sets_of_weights_the_one_asked_for(model_path, tmp_path, capsys):
    state = checkpoints.load(model_path)["state_dict"]
    torch.manual_seed(0)
    noisy = {key: value + 0.5 * value.float().std() * torch.randn_like(value) if value.ndim == 4 else value
             for key, value in state.items()}
    torch.save({"epoch": 9, "state_dict": noisy, "swa_state_dict": state}, tmp_path / "m.pth.tar")
    argv = ["--model-path", str(tmp_path / "m.pth.tar"), "--dataset", "digits"]
    error = fails_in_one_line(eval_attacks.main, argv, capsys)
    assert "'state_dict', 'swa_state_dict': pick one by --weights NAME" in error
    correct, model = natural(*argv[1:], "--weights", "swa_state_dict")
    assert correct == natural(model_path)[0] and model["weights"] == "swa_state_dict"
    assert "on digits, its swa_state_dict" in capsys.readouterr().out
    assert natural(*argv[1:], "--weights", "state_dict")[0] != correct


def test_weights_that_are_not_finite_are_refused(model_path, tmp_path, capsys):
    state = checkpoints.load(model_path)["state_dict"]
    state["block1.layer.0.bn1.weight"] *= float("nan")
    torch.save(state, tmp_path / "m.pt")
    error = fails_in_one_line(eval_attacks.main, ["--model-path", tmp_path / "m.pt", "--dataset", "digits"], capsys)
    assert "not finite, or a running variance is negative (block1.layer.0.bn1.weight)" in error


def test_logits_that_are_not_finite_are_a_fault(model_path, tmp_path, monkeypatch, capsys):
    content = checkpoints.load(model_path)
    content["state_dict"]["fc.weight"] *= 1e38
    checkpoints.save(content, tmp_path / "m.pt")
    with pytest.raises(SystemExit, match="^eval_attacks.py: the logits of [^ ]+ of 24 images are not finite: a fault"):
        natural(tmp_path / "m.pt")
    capsys.readouterr()
    torch.save(content["state_dict"], tmp_path / "foreign.pt")
    argv = ["--model-path", tmp_path / "foreign.pt", "--dataset", "digits"]
    assert "of 200 images are not finite" in fails_in_one_line(eval_attacks.main, argv, capsys)
    monkeypatch.setattr(attacks, "pgd", lambda model, x, *_, **__: x * float("nan"))
    with pytest.raises(SystemExit, match="the logits of 24 of 24 images are not finite"):  # 100 % success, once
        rows_of(model_path, "--attacks", "natural", "pgd", "--json", str(tmp_path / "r.json"))
    assert [row["name"] for row in eval_attacks.read(tmp_path / "r.json")["attacks"]] == ["Natural"]


def other_block(block, x):
    """Compute fast_adversarial's pre-activation block: the projection sees x, not the activation."""
    out = torch.relu(block.bn1(x))
    shortcut = x if block.shortcut is None else block.shortcut(x)
    return shortcut + block.conv2(torch.relu(block.bn2(block.conv1(out))))


def test_the_other_preactivation_block(tmp_path, monkeypatch, capsys):
    """With random features, and a last layer by least squares: training takes minutes."""
    torch.manual_seed(0)
    net, train, test = models.build_model("preact-resnet-18"), data.load("digits"), data.load("digits", train=False)
    monkeypatch.setattr(models.PreActBlock, "forward", other_block)
    features = []
    net.linear.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net(data.to_float(train.images[:100]))
        net.eval()(data.to_float(train.images[:100]))
        net.linear.weight[:] = torch.linalg.lstsq(features[1], F.one_hot(train.labels[:100]).float(), driver="gelsd"
                                                  ).solution.T
        net.linear.bias.zero_()
        right = (net(data.to_float(test.images[:50])).argmax(1) == test.labels[:50]).sum().item()
    monkeypatch.undo()
    torch.save({"module." + key: value for key, value in net.state_dict().items()}, tmp_path / "m.pt")
    flags = ["--dataset", "digits", "--num-images", "50", "--normalize", "0,0,0", "1,1,1"]
    correct, model = natural(tmp_path / "m.pt", *flags, "--arch", "preact-resnet-18-x")
    assert correct == right > 30 and model["notes"] == []
    correct, _ = natural(tmp_path / "m.pt", *flags)
    assert correct < right - 10
    assert "it needs --arch preact-resnet-18-x" in capsys.readouterr().err
