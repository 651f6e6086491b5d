"""Model files: round trips, other people's key names, and every way in which a file can be bad."""

import argparse
import fcntl
import functools
import os
import pathlib
import pickle
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from helpers import fails_in_one_line

import checkpoints
import eval_attacks
import models
import runtime


def own_checkpoint(path, arch="wrn-10-1", num_classes=4):
    torch.manual_seed(0)
    model = models.build_model(arch, num_classes).eval()
    state = {"format": checkpoints.FORMAT, "epoch": 3, "classes": list("abcd"), "state_dict": model.state_dict(),
             "args": {"dataset": "digits", "arch": arch, "defense": "mart", "spat_alpha": 0.3, "seed": 1,
                      "epsilon": "0.1"}}
    checkpoints.save(state, path)
    return model


@pytest.mark.parametrize("arch", ["wrn-10-1", "wrn-16-2", "resnet-18", "preact-resnet-18"])
def test_bare_state_dicts_load(tmp_path, arch):
    """Those with a prefix: test_other_peoples_files."""
    model = models.build_model(arch, 7).eval()
    state = model.state_dict()
    if arch.startswith("wrn"):
        state |= {"sub_block1.layer.0.conv1.weight": torch.zeros(1)}  # TRADES' unused copy of block1
    torch.save(state, tmp_path / "m.pt")
    loaded, info = checkpoints.load_model(tmp_path / "m.pt")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert (info["arch"], info["num_classes"]) == (arch, 7) and not loaded.training and "args" not in info


def test_own_files_carry_their_arguments(tmp_path):
    model = own_checkpoint(tmp_path / "m.pt")
    loaded, info = checkpoints.load_model(tmp_path / "m.pt", arch="wrn-10-1", num_classes=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert info["args"]["dataset"] == "digits" and info["epoch"] == 3 and len(info["sha256"]) == 64


class Payload:
    """Unpickled without care, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for name in ("zip.pt", "pickle.pt"):
        with pytest.raises(ValueError, match="not a model file|Python objects"):
            checkpoints.load_model(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    pickle.loads((tmp_path / "pickle.pt").read_bytes())
    assert (tmp_path / "ran").exists()  # the payload works: the test can fail


def bad_files(folder):
    own_checkpoint(folder / "good.pt")
    whole = (folder / "good.pt").read_bytes()
    torch.save([1, 2], folder / "list.pt")
    torch.save({"a": 1}, folder / "numbers.pt")
    torch.save({"state_dict": {}, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)}, folder / "objects.pt")
    torch.save({"weight": torch.zeros(2)}, folder / "unknown.pt")
    state = models.build_model("wrn-10-1").state_dict()
    del state["bn1.weight"]
    torch.save(state, folder / "incomplete.pt")
    with zipfile.ZipFile(folder / "zip.pt", "w") as file:
        file.writestr("a.txt", "hello")
    with warnings.catch_warnings(action="ignore"):  # torch deprecates it, but such files stay
        torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "script.pt")
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    tensors = len(header).to_bytes(8, "little") + header + bytes(4)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name, content in (("pointer.pt", pointer), ("tensors.pt", tensors),
                          ("empty.pt", b""), ("page.pt", b"<!DOCTYPE html><html>"), ("text.pt", b"hello world\n" * 50),
                          ("half.pt", whole[: len(whole) // 2]), ("cut.pt", whole[:-1])):
        (folder / name).write_bytes(content)
    return {"absent.pt": "no such file", "empty.pt": "empty", "page.pt": "HTML page", "text.pt": "not a model file",
            "half.pt": "not a model file", "cut.pt": "not a model file", "list.pt": "no state dict but a list",
            "numbers.pt": "no state dict but 'a'", "objects.pt": "save its state_dict",
            "pointer.pt": "git lfs pull", "tensors.pt": "a safetensors file", "script.pt": "a TorchScript program",
            "unknown.pt": "no known architecture", "incomplete.pt": "bn1.weight", "zip.pt": "not a model file"}


def test_bad_files_are_refused_in_one_line(tmp_path):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=message) as error:
            checkpoints.load_model(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)


def test_the_file_must_be_what_the_caller_says(tmp_path):
    own_checkpoint(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="it is a wrn-10-1, not a resnet-18"):
        checkpoints.load_model(tmp_path / "m.pt", arch="resnet-18")
    with pytest.raises(ValueError, match="4 classes, not 10"):
        checkpoints.load_model(tmp_path / "m.pt", num_classes=10)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoints.save({"a": torch.zeros(1)}, tmp_path / "m.pt")
    before = (tmp_path / "m.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        checkpoints.save({"a": torch.ones(1)}, tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]


def test_a_run_keeps_the_checkpoint_before_the_last(tmp_path, capsys):
    rest = dict.fromkeys(("args", "state_dict", "optimizer", "rows", "best", "sums", "on"), 0)
    for step in (1, 2):
        checkpoints.save_run({"format": checkpoints.FORMAT, "step": step} | rest, tmp_path)
    assert checkpoints.load_run(tmp_path)["step"] == 2
    (tmp_path / "last.pt").write_bytes(b"cut")
    assert checkpoints.load_run(tmp_path)["step"] == 1
    assert "damaged" in checkpoints.load_run(tmp_path)["damage"]


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with runtime.run_lock(tmp_path):
        for step in (1, 2):
            checkpoints.save_run({"step": step}, tmp_path)
    assert "cannot be locked" in capsys.readouterr().out
    assert [checkpoints.load(tmp_path / name)["step"] for name in ("last.prev.pt", "last.pt")] == [1, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == [".lock", "last.prev.pt", "last.pt"]


def test_what_a_link_leads_to_is_written_and_the_link_stays(tmp_path):
    (tmp_path / "link.json").symlink_to("real.json")
    checkpoints.write_atomically(tmp_path / "link.json", b"1")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_bytes() == b"1"


def test_no_flipped_or_missing_byte_goes_unseen(tmp_path):
    """A checkpoint cut at any length, or with a bit flipped anywhere, is refused or holds what was saved."""
    state = {"a": torch.arange(200.0).sin(), "b": {"x": 1.5, "n": "hello"}, "step": 7}
    checkpoints.save(state, tmp_path / "m.pt")
    whole = (tmp_path / "m.pt").read_bytes()
    damaged = [whole[:n] for n in range(0, len(whole), 13)]
    for i in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << (i % 8)
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        (tmp_path / "m.pt").write_bytes(content)
        try:
            loaded = checkpoints.load(tmp_path / "m.pt")
            assert torch.equal(loaded.pop("a"), state["a"]) and loaded == {"b": state["b"], "step": 7}
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 0.5 * len(damaged)  # flips in a zip's padding do no harm


def test_a_lock_is_held_by_the_living_only(tmp_path):
    with runtime.run_lock(tmp_path):
        with pytest.raises(ValueError, match="another process"), runtime.run_lock(tmp_path):
            pass
    with runtime.run_lock(tmp_path):
        pass
    holder = ("import sys, time, runtime\n"
              "with runtime.run_lock(sys.argv[1]):\n print(1, flush=True)\n time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", holder, tmp_path], stdout=subprocess.PIPE,
                               cwd=pathlib.Path(checkpoints.__file__).parent)
    process.stdout.readline()
    with pytest.raises(ValueError, match="another process"), runtime.run_lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with runtime.run_lock(tmp_path):
        pass


MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]
LAYER = {"mean": torch.tensor(MEAN).view(1, 3, 1, 1), "std": torch.tensor(STD).view(1, 3, 1, 1)}
UNUSED = {"sub_block1.layer.0.conv1.weight": torch.zeros(16, 16, 3, 3)}  # in TRADES' network, never called
MOMENTUM = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
FORMS = {  # source -> (what the file holds, from a network's state dict; whether a normalisation is part of the model;
    # None: the file cannot tell, as the training code of some has the normalisation outside the network)
    "TRADES, MART": (lambda net: net | UNUSED, None),
    "RST": (lambda net: {"num_classes": 10, "normalize_input": False, "state_dict": prefixed(net | UNUSED, "module.")},
            False),
    "RST, normalised": (lambda net: {"num_classes": 10, "normalize_input": True, "state_dict":
                                     prefixed(LAYER, "module.0.") | prefixed(net | UNUSED, "module.1.")}, True),
    "AWP": (lambda net: prefixed(net, "module."), None),
    "robust_overfitting": (lambda net: {"state_dict": prefixed(net, "module."), "optimizer": MOMENTUM}, None),
    "FAT": (lambda net: {"epoch": 1, "state_dict": prefixed(net | UNUSED, "module."), "optimizer": {"lr": 0.1}}, None),
    "imrahulr, no layer": (lambda net: {"model_state_dict": prefixed(net, "module.0.")}, None),
    "imrahulr, DM-Improves-AT": (lambda net: {"model_state_dict": prefixed(LAYER, "module.0.")
                                 | prefixed(net, "module.1.")}, True),
    "RobustBench": (lambda net: prefixed(net, "model."), None),
    "RobustBench, inside": (lambda net: {"state_dict": prefixed(
        net | {"mu": LAYER["mean"], "sigma": LAYER["std"]}, "module.model.")}, True),
    "compiled": (lambda net: prefixed(net, "module._orig_mod."), None),
    "swa_utils": (lambda net: {"n_averaged": torch.tensor(3)} | prefixed(net, "module.module."), None),
    "a layer before DataParallel": (lambda net: prefixed(LAYER, "0.") | prefixed(net, "1.module."), True),
    "kuangliu": (lambda net: {"net": prefixed(net, "module."), "acc": 93.0, "epoch": 7}, None),
    "model_state": (lambda net: {"epoch": 7, "model_state": net, "args": {"lr": 0.1}}, None),
    "nested": (lambda net: {"checkpoint": {"model": prefixed(net, "encoder.net.")}, "optim": MOMENTUM}, None),
}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@functools.cache
def trained(arch, num_classes):
    """A net whose statistics are as if it were trained; nobody alters it."""
    torch.manual_seed(0)
    net = models.build_model(arch, num_classes).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("arch", "num_classes"), [("wrn-10-2", 10), ("resnet-18", 100), ("preact-resnet-18", 10)])
def test_other_peoples_files(tmp_path, form, arch, num_classes):
    net = trained(arch, num_classes)
    of, normalised = FORMS[form]
    torch.save(of(net.state_dict()), tmp_path / "m.pt")
    loaded, info = checkpoints.load_model(tmp_path / "m.pt")
    assert (info["arch"], info["num_classes"]) == (arch, num_classes) and "args" not in info
    inside = loaded.model if normalised else loaded
    for (name, value), (_, expected) in zip(inside.state_dict().items(), net.state_dict().items(), strict=True):
        assert torch.equal(value, expected), name
    x = torch.rand(2, 3, 32, 32)
    seen = (x - LAYER["mean"]) / LAYER["std"] if normalised else x
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net(seen))
    assert (info["normalize"] is not None) == bool(normalised) and not loaded.training
    assert (checkpoints.ASSUMED in info["notes"]) == (normalised is None)
    if normalised is None:
        stated, info = checkpoints.load_model(tmp_path / "m.pt", normalize=(MEAN, STD))
        with torch.no_grad():
            torch.testing.assert_close(stated(x), net((x - LAYER["mean"]) / LAYER["std"]))
        assert checkpoints.ASSUMED not in info["notes"]


def test_a_normalisation_that_the_user_states(tmp_path):
    net = models.build_model("wrn-10-1").eval()
    torch.save(prefixed(net.state_dict(), "module."), tmp_path / "m.pt")
    loaded, info = checkpoints.load_model(tmp_path / "m.pt", normalize=(MEAN, STD))
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), net((x - LAYER["mean"]) / LAYER["std"]))
    assert info["normalize"] == (MEAN, STD)
    torch.save(prefixed(net.state_dict(), "module.1."), tmp_path / "m.pt")
    loaded, _ = checkpoints.load_model(tmp_path / "m.pt", normalize=(MEAN, STD))
    torch.testing.assert_close(loaded(x), net((x - LAYER["mean"]) / LAYER["std"]))


@pytest.mark.parametrize(("content", "normalize", "message"), [
    (lambda net: {"model_state_dict": prefixed(net, "module.1.")}, None, "--normalize"),
    (lambda net: {"normalize_input": True, "state_dict": net}, None, "--normalize"),
    (lambda net: net | LAYER, (MEAN, STD), "holds its own"),
    (lambda net: net | {"mean": torch.zeros(1), "std": torch.ones(1)}, None, "not three means"),
    (lambda net: net | {"mean": torch.zeros(3), "std": torch.zeros(3)}, None, "not three means"),
    (lambda net: {"module.init_conv.weight": torch.zeros(16, 3, 3, 3)}, None, "Swish"),
    (lambda net: {"model_state_dict": 3}, None, "no state dict"),
])
def test_what_a_foreign_file_cannot_say(tmp_path, content, normalize, message):
    torch.save(content(models.build_model("wrn-10-1").state_dict()), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=message):
        checkpoints.load_model(tmp_path / "m.pt", normalize=normalize)


def test_a_file_of_this_project_takes_no_second_normalisation(tmp_path):
    own_checkpoint(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="--normalize: it is a file of this project"):
        checkpoints.load_model(tmp_path / "m.pt", normalize=(MEAN, STD))


@pytest.mark.parametrize("names", [("state_dict", "swa_state_dict"), ("model", "ema"), ("model", "model_ema"),
                                   ("student", "teacher"), ("model_state_dict", "unaveraged_model_state_dict")])
def test_of_several_sets_of_weights_none_is_taken_unsaid(tmp_path, names):
    nets = [models.build_model("wrn-10-1").state_dict() for _ in names]
    torch.save({"epoch": 9} | dict(zip(names, nets, strict=True)), tmp_path / "m.pt")
    with pytest.raises(ValueError, match=f"the weights '{names[0]}', '{names[1]}': pick one by --weights"):
        checkpoints.load_model(tmp_path / "m.pt")
    for name, net in zip(names, nets, strict=True):
        loaded, info = checkpoints.load_model(tmp_path / "m.pt", weights=name)
        assert all(torch.equal(value, net[key]) for key, value in loaded.state_dict().items())
        assert info["weights"] == name
    with pytest.raises(ValueError, match=f"the weights '{names[0]}', '{names[1]}': pick one by --weights"):
        checkpoints.load_model(tmp_path / "m.pt", weights="swa")


@pytest.mark.parametrize(("key", "value"), [
    ("block1.layer.0.bn1.weight", float("nan")), ("fc.bias", float("inf")), ("bn1.running_var", -1.0),
    ("conv1.weight", 1e300),  # it overflows in float32
])
def test_weights_that_cannot_compute_are_refused(tmp_path, key, value):
    state = models.build_model("wrn-10-1").double().state_dict()
    state[key][0] = value
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=rf"not finite, or a running variance is negative \({key}\)"):
        checkpoints.load_model(tmp_path / "m.pt")


def test_the_two_preactivation_blocks(tmp_path):
    """The file cannot tell them apart, but for one of this project."""
    torch.manual_seed(0)
    plain, other = "preact-resnet-18", "preact-resnet-18-x"
    torch.save(models.build_model(plain).state_dict(), tmp_path / "m.pt")
    loaded, info = checkpoints.load_model(tmp_path / "m.pt")
    assert info["arch"] == plain and any(f"--arch {other}" in note for note in info["notes"])
    x = torch.rand(2, 3, 32, 32)
    for arch, same in ((plain, True), (other, False)):
        asked, info = checkpoints.load_model(tmp_path / "m.pt", arch=arch)
        assert info["arch"] == arch and info["notes"] == [checkpoints.ASSUMED]
        with torch.no_grad():
            assert torch.allclose(asked(x), loaded(x)) == same
    own_checkpoint(tmp_path / "own.pt", other)
    _, info = checkpoints.load_model(tmp_path / "own.pt")
    assert info["arch"] == other and info["notes"] == []
    with pytest.raises(ValueError, match=f"it is a {other}, not a {plain}$"):
        checkpoints.load_model(tmp_path / "own.pt", arch=plain)


def test_a_result_says_what_its_model_was_trained_on(model_path, tmp_path, capsys):
    content = checkpoints.load(model_path)
    argv = ["--model-path", str(tmp_path / "m.pt"), "--attacks", "natural", "--num-images", "2"]
    for images in (None, {"--aux-data": "5e1f"}):
        checkpoints.save(content | {"images": images}, tmp_path / "m.pt")
        result = eval_attacks.main(argv)
        assert result["model"]["trained_on"] == images
    capsys.readouterr()
    for wrong in ({"--aux-data": 3}, {3: "5e1f"}, [1], torch.zeros(2)):
        checkpoints.save(content | {"images": wrong}, tmp_path / "m.pt")
        assert "its header is not one that" in fails_in_one_line(eval_attacks.main, argv, capsys)
