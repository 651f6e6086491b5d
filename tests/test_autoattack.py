"""The adapter of AutoAttack and the evaluation that uses it, against calling pyautoattack directly."""

import contextlib
import json
import random
import sys

import numpy as np
import pyautoattack
import pytest
import torch
from helpers import SmallNet, fails_in_one_line
from test_eval import SMALL, mask

import attacks
import checkpoints
import data
import eval_attacks
import models
import runtime

EPSILON = 0.03
pytestmark = pytest.mark.usefixtures("cut_budget")


def net_and_images(num_classes, n=12):
    """A net that is right on most of the images it is shown: their labels are its own but for two."""
    torch.manual_seed(0)
    net = SmallNet(num_classes).eval()
    x = torch.rand(n, 3, 8, 8)
    x[x < 0.1], x[x > 0.9] = 0.0, 1.0
    y = net(x).argmax(1)
    y[:2] = (y[:2] + 1) % num_classes
    return net, x, y


def direct(net, x, y, components=None, batch_size=5):
    """pyautoattack as its README calls it."""
    official = pyautoattack.AutoAttack(net, eps=EPSILON, norm="Linf", seed=0, version="standard")
    if components:
        official.attacks_to_run = components
    official.apgd_targeted.n_target_classes = official.fab.n_target_classes = min(9, net.head[-1].out_features - 1)
    with torch.random.fork_rng():
        return official.run_standard_evaluation(x, y, batch_size=batch_size)[0]


@pytest.mark.parametrize(("num_classes", "components"), [
    (4, None), (10, None), (100, None), (10, ["apgd-ce", "apgd-t"])])
def test_equal_to_calling_pyautoattack(num_classes, components):
    net, x, y = net_and_images(num_classes)
    seen = {}
    x_adv = attacks.autoattack(net, x.contiguous(memory_format=torch.channels_last), y, epsilon=EPSILON, batch_size=5,
                               components=components, on_component=seen.__setitem__)
    assert torch.equal(x_adv, direct(net, x, y, components))
    broken = net(x_adv).argmax(1) != y
    assert torch.equal(x_adv[:2], x[:2]) and 2 < broken.sum()  # wrong already, hence not attacked; and others fell
    assert list(seen) == (components or ["apgd-ce", "apgd-t", "fab-t", "square"])
    shares = [robust.float().mean() for robust in seen.values()]
    assert shares == sorted(shares, reverse=True) and torch.equal(list(seen.values())[-1], ~broken)
    assert (x_adv - x).abs().max() <= EPSILON + 1e-6 and 0 <= x_adv.min() and x_adv.max() <= 1


@pytest.mark.parametrize(("num_classes", "targets"), [(4, 3), (10, 9), (100, 9)])
def test_the_standard_budget(num_classes, targets, monkeypatch):
    """What the four components are told: as pyautoattack's own standard version, but for the targets of few classes."""
    asked = []

    def record(self, x, y, batch_size):
        asked.append((self.attacks_to_run, self.apgd_targeted.n_target_classes, self.fab.n_target_classes, batch_size,
                      self.apgd.n_restarts, self.fab.n_restarts, self.version, self.norm, self.epsilon, self.seed))
        return x, y

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", record)
    net, x, y = net_and_images(num_classes)
    attacks.autoattack(net, x, y, epsilon=EPSILON, batch_size=5, seed=3)
    assert asked == [([name], targets, targets, 5, 1, 1, "standard", "Linf", EPSILON, 3)
                     for name in ("apgd-ce", "apgd-t", "fab-t", "square")]


def test_everything_is_left_as_found():
    net, x, y = net_and_images(5)
    net.train()
    net.norm.eval()
    net.conv.bias.requires_grad_(False)
    net.conv.weight.grad = torch.ones_like(net.conv.weight)
    modes, wants = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def trace(frame, event, arg):
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with models.frozen(net):
            attacks.autoattack(net, x, y, epsilon=EPSILON, batch_size=12)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()
    assert [m.training for m in net.modules()] == modes and [p.requires_grad for p in net.parameters()] == wants
    assert torch.equal(net.conv.weight.grad, torch.ones_like(net.conv.weight))
    assert net.head[1].weight.grad is None and not x.requires_grad and x.grad is None


def test_the_seed_decides():
    net, x, y = net_and_images(10)
    runs = [attacks.autoattack(net, x, y, epsilon=EPSILON, batch_size=12, seed=seed, components=["square"])
            for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_what_is_refused(tmp_path, capsys):
    net, x, y = net_and_images(3)
    with pytest.raises(ValueError, match="at least 4 classes, not 3"):
        attacks.autoattack(net, x, y, epsilon=EPSILON, batch_size=4)
    net, x, y = net_and_images(5)
    with pytest.raises(ValueError, match="apgd-dlr"):
        attacks.autoattack(net, x, y, epsilon=EPSILON, batch_size=4, components=["apgd-dlr"])
    for part in ("train", "test"):
        for label in "abc":
            (tmp_path / part / label).mkdir(parents=True)
            data.Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / part / label / "0.png")
    torch.save(models.build_model("wrn-10-1", 3).state_dict(), tmp_path / "m.pt")
    argv = ["--model-path", tmp_path / "m.pt", "--dataset", tmp_path, "--attacks", "autoattack"]
    assert "at least 4 classes, not 3" in fails_in_one_line(eval_attacks.main, argv, capsys)


@pytest.mark.slow
def test_the_row_of_the_evaluation(model_path, capsys):
    """Equal to the adapter on the same images; the share after each component; never called AutoAttack if it is not."""
    result = eval_attacks.main(["--model-path", str(model_path), *SMALL, "--attacks", "natural", "apgd", "autoattack",
                                "--precision", "bf16", "--batch-size", "16"])
    names = [row["name"] for row in result["attacks"]]
    assert names == ["Natural", "APGD-CE + APGD-T", "AutoAttack", "Worst case"]
    model, _ = checkpoints.load_model(model_path)
    test = data.load("digits", train=False).subset(slice(24))
    with models.frozen(model):
        x_adv = attacks.autoattack(model, test.images / 255, test.labels, epsilon=0.05, batch_size=16)
    expected = (model(x_adv).argmax(1) == test.labels).numpy()
    row = result["attacks"][2]
    assert np.array_equal(mask(row), expected) and 0 < expected.sum() < mask(result["attacks"][0]).sum()
    assert list(row["after"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert row["after"]["square"] == row["accuracy"]
    assert row["params"] == {"components": ["apgd-ce", "apgd-t", "fab-t", "square"], "epsilon": "0.05", "seed": 0,
                             "batch_size": 16, "version": "standard"}
    assert "after fab-t" in capsys.readouterr().out


@pytest.mark.parametrize(("stops", "flags"), [
    (["apgd-ce"], ["--pool"]), (["fgsm", "fab-t", "fab-t", "square"], [])])
def test_a_stopped_evaluation_goes_on(stops, flags, model_path, tmp_path, monkeypatch, capsys):
    """Also if it is stopped again at once: to the same entries, and nothing that was finished is run again."""
    argv = ["--model-path", str(model_path), *SMALL, "--num-images", "9", "--epsilon", "0.02", *flags,
            "--attacks", "natural", "fgsm", "autoattack", "--json"]
    eval_attacks.main([*argv, str(tmp_path / "whole.json")])
    real, called, order = (eval_attacks.make_attack, attacks.autoattack), [], ["fgsm", *attacks.COMPONENTS]

    def run_until(name):
        def note(step):
            called.append(step)
            if step == name:
                raise KeyboardInterrupt

        def make_attack(*given):
            note("fgsm")
            return real[0](*given)

        def autoattack(*given, components, **settings):
            note(*components)
            return real[1](*given, components=components, **settings)

        monkeypatch.setattr(eval_attacks, "make_attack", make_attack)
        monkeypatch.setattr(attacks, "autoattack", autoattack)
        return eval_attacks.main([*argv, str(tmp_path / "r.json")])

    for name in stops:
        with pytest.raises(SystemExit):
            run_until(name)
        entries = eval_attacks.read(tmp_path / "r.json")["attacks"]
        assert ["fgsm"] * (len(entries) > 1) + list(entries[-1].get("after", [])) == order[:order.index(name)]
    before = eval_attacks.read(tmp_path / "r.json")
    before["attacks"][-1]["seconds"] = 1000
    eval_attacks.write(tmp_path / "r.json", before)
    called.clear()
    run_until(None)
    assert called == order[order.index(stops[-1]):] and "going on after" in capsys.readouterr().out
    found, whole = (eval_attacks.read(tmp_path / name) for name in ("r.json", "whole.json"))
    assert found["attacks"][len(before["attacks"]) - 1]["seconds"] >= 1000
    for entry in found["attacks"] + whole["attacks"]:
        del entry["seconds"]
    assert found["attacks"] == whole["attacks"] and found["complete"]


@pytest.mark.parametrize("flags", [
    ["--seed", "1"], ["--num-images", "9"], ["--save-examples", "e.npz"], ["--batch-size", "7"],
    ["--attacks", "natural", "fgsm", "autoattack"], ["--attacks", "natural"], ["--model-path", "other.pt"],
    ["--epsilons", "0.05"]])
def test_another_evaluation_begins_anew(flags, model_path, tmp_path, monkeypatch, capsys):
    """Of another model, other images, settings or rows; and where the file lacks what is asked for."""
    monkeypatch.chdir(tmp_path)
    content = checkpoints.load(model_path)
    content["state_dict"]["fc.weight"] *= 1.01
    checkpoints.save(content, tmp_path / "other.pt")
    monkeypatch.setattr(attacks, "autoattack", stop_after_the_first)
    argv = ["--model-path", str(model_path), *SMALL, "--attacks", "natural", "autoattack", "--json", "r.json"]
    for more in ([], flags):
        with contextlib.suppress(SystemExit):
            eval_attacks.main([*argv, *more])
        assert ": going on after" not in capsys.readouterr().out
    kept = eval_attacks.read("r.json.old")  # what was stopped is not lost by it
    assert [entry["name"] for entry in kept["attacks"]] == ["Natural", "APGD-CE"]
    with contextlib.suppress(SystemExit):
        eval_attacks.main([*argv, *more])
    assert ("going on after" in capsys.readouterr().out) == (flags[-1] not in ("natural", "e.npz"))


@pytest.mark.parametrize("change", [
    {"components": 1}, {"after": None}, {"after": {}}, {"seconds": None}, {"seconds": "x"}, {"name": "PGD-20"},
    {"complete": "x"}])
def test_from_an_edited_file_nothing_is_taken(change, model_path, tmp_path, monkeypatch, capsys):
    """None: without the entry. What is not even a result is written over, as if there were no file."""
    monkeypatch.setattr(attacks, "autoattack", stop_after_the_first)
    path = tmp_path / "r.json"
    argv = ["--model-path", str(model_path), *SMALL, "--attacks", "natural", "autoattack", "--json", str(path)]
    with pytest.raises(SystemExit):
        eval_attacks.main(argv)
    result = json.loads(path.read_text())
    last = result["attacks"][1]
    for key, value in change.items():
        {"components": last["params"], "complete": result}.get(key, last)[key] = value
    result["attacks"][1] = {key: value for key, value in last.items() if value is not None}
    edited = [json.dumps(content) for content in (result, result | {"attacks": {}}, result | {"attacks": 3}, {})]
    for text in (*edited, "[" * 100_000, "{"):
        path.write_text(text)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            eval_attacks.main(argv)
        assert ": going on after" not in capsys.readouterr().out
        assert [entry["name"] for entry in eval_attacks.read(path)["attacks"]] == ["Natural", "APGD-CE"]


def test_what_is_not_compiled_does_not_count(model_path, monkeypatch):
    """However long a pass takes: neither the natural images nor AutoAttack run by the compiled one."""
    monkeypatch.setattr(runtime, "shortest_seconds", lambda *_: 1e6)
    monkeypatch.setattr(attacks, "autoattack", lambda model, x, y, **_: x)
    argv = ["--model-path", str(model_path), *SMALL, "--compile", "auto", "--attacks", "natural", "autoattack"]
    assert eval_attacks.main(argv)["compile"] == "off"


def test_another_number_of_threads_goes_on(model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(attacks, "autoattack", stop_after_the_first)
    argv = ["--model-path", str(model_path), *SMALL, "--attacks", "natural", "autoattack"]
    devices = iter(["Some CPU, 1 threads", "Some CPU, 4 threads", "Another CPU, 4 threads"])
    monkeypatch.setattr(eval_attacks, "device_name", lambda _: next(devices))
    for goes_on in (False, True, False):
        with pytest.raises(SystemExit):
            eval_attacks.main([*argv, "--json", str(tmp_path / "r.json")])
        assert (": going on after" in capsys.readouterr().out) == goes_on


def stop_after_the_first(model, x, y, *, components, **settings):
    if components != ["apgd-ce"]:
        raise KeyboardInterrupt
    return x
