"""Nothing is lost at the end: odd terminals, closed pipes, full disks, Ctrl-C, and files that would be overwritten."""

import contextlib
import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import fails_in_one_line
from test_eval import SMALL, natural, rows_of

import attacks
import audit
import bench
import checkpoints
import compare
import data
import eval_attacks
import pseudo_label
import reproduce
import train_cifar

SCRIPTS = (train_cifar, eval_attacks, audit, compare, reproduce, bench, pseudo_label)


ENCODINGS = pytest.mark.parametrize("encoding", ["ascii", "latin-1"])


def printed_on(encoding, main, *argv):
    """What main(argv) prints on a terminal of this encoding, and how it exits."""
    terminal, status = io.TextIOWrapper(io.BytesIO(), encoding, "strict", write_through=True), None
    with contextlib.redirect_stdout(terminal):
        try:
            main(list(argv))
        except SystemExit as error:
            status = error.code
    return terminal.buffer.getvalue(), status


@ENCODINGS
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_on_a_terminal_that_is_not_utf_8(script, encoding):
    printed, status = printed_on(encoding, script.main, "--help")
    assert status == 0 and printed.startswith(b"usage: ")


@ENCODINGS
def test_the_table_on_a_terminal_that_is_not_utf_8(model_path, encoding):
    printed, status = printed_on(encoding, eval_attacks.main, "--model-path", str(model_path), *SMALL, "--attacks",
                                 "natural", "cw", "--kappas", "0")
    assert status is None and b"attacks at ? 0.05" in printed and b"CW-inf ? 0" in printed


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_closed_pipe_is_quiet_and_the_work_goes_on(model_path, tmp_path, closed):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    argv = ["--model-path", model_path, *SMALL, "--attacks", "natural", "fgsm", "--json", tmp_path / "r.json"]
    process = subprocess.Popen([sys.executable, "eval_attacks.py", *map(str, argv)], **streams, text=True,
                               cwd=pathlib.Path(eval_attacks.__file__).parent)
    getattr(process, closed).close()
    said = (process.stdout if closed == "stderr" else process.stderr).read()
    assert process.wait() == 0 and json.loads((tmp_path / "r.json").read_text())["complete"]
    assert "Traceback" not in said and "Broken" not in said and "Exception" not in said, said


@pytest.mark.parametrize("failing", ["r.json", "e.npz"])
def test_a_full_disk_does_not_lose_the_table(model_path, tmp_path, monkeypatch, capsys, failing):
    real = checkpoints.write_atomically

    def full(path, write):
        if pathlib.Path(path).name == failing:
            raise OSError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    with pytest.raises(SystemExit, match="^eval_attacks.py: .*No space left on device$"):
        rows_of(model_path, "--json", str(tmp_path / "r.json"), "--save-examples", str(tmp_path / "e.npz"))
    printed = capsys.readouterr().out
    assert "INCOMPLETE" in printed and "Natural  " in printed


def test_no_file_that_is_read_or_written_is_overwritten(model_path, tmp_path, capsys):
    for name in ("m.pt", "o.pt"):
        (tmp_path / name).write_bytes(model_path.read_bytes())
    (tmp_path / "link").symlink_to("m.pt")
    model = ["--model-path", tmp_path / "m.pt"]
    for main, *flags in (
        (eval_attacks.main, "--json", tmp_path / "m.pt"), (eval_attacks.main, "--save-examples", tmp_path / "m.pt"),
        (eval_attacks.main, "--json", tmp_path / "link"), (audit.main, "--json", tmp_path / "m.pt"),
        (eval_attacks.main, "--json", tmp_path / "a", "--save-examples", tmp_path / "no" / ".." / "a"),
        (audit.main, "--oracle", tmp_path / "o.pt", "--json", tmp_path / "o.pt"),
    ):
        (tmp_path / "no").mkdir(exist_ok=True)
        assert "another flag names that file too" in fails_in_one_line(main, [*model, *flags], capsys)
    for name in ("m.pt", "o.pt"):
        assert (tmp_path / name).read_bytes() == model_path.read_bytes()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("flags", [[], ["--pool"], ["--epsilons", "0.05"]])
def test_ctrl_c_in_autoattack_keeps_the_components_that_are_finished(model_path, tmp_path, monkeypatch, capsys, flags):
    def interrupted(model, x, y, *, components, **settings):
        """Leave the first 9 and then the first 5; make of each other one an image of another class."""
        left = {"apgd-ce": 9, "apgd-t": 5}.get(components[0])
        if left is None:
            raise KeyboardInterrupt
        other = (model(x).argmax(1) != y[:, None]).float().argmax(1)
        return torch.cat([x[:left], x[other[left:]]])

    monkeypatch.setattr(attacks, "autoattack", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        eval_attacks.main(["--model-path", str(model_path), *SMALL, "--attacks", "natural", "autoattack", "--json",
                           str(tmp_path / "r.json"), *flags])
    assert exit_info.value.code == 130
    result = eval_attacks.read(tmp_path / "r.json")
    first, last = result["attacks"]
    assert not result["complete"] and last["params"]["components"] == ["apgd-ce", "apgd-t"]
    standing = eval_attacks.correct_mask(first).nonzero()[0][:5]  # an attack sees those that stand, here of the first 9
    assert np.array_equal(eval_attacks.correct_mask(last).nonzero()[0], standing) and last["correct"] == 5
    assert last["name"] == "APGD-CE + APGD-T" + " ε 0.05" * ("--epsilons" in flags)
    assert list(last["after"]) == ["apgd-ce", "apgd-t"]
    assert last["after"]["apgd-ce"] > last["after"]["apgd-t"] == last["accuracy"]
    printed = capsys.readouterr().out
    assert "APGD-CE + APGD-T" in printed and "AutoAttack" not in printed and "INCOMPLETE" in printed
    assert printed.endswith("\nthe same command goes on from there\n")


def test_an_interrupted_oracle_keeps_its_rows(model_path, tmp_path, monkeypatch, capsys):
    def interrupted(source, accuracy):
        raise KeyboardInterrupt

    content = checkpoints.load(model_path)
    content["state_dict"]["fc.weight"] *= 1.01
    checkpoints.save(content, tmp_path / "o.pt")
    monkeypatch.setattr(audit, "CHECKS", {"order": audit.CHECKS["order"]})
    monkeypatch.setattr(audit, "matched_radius", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        audit.main(["--model-path", str(model_path), *SMALL[:6], "--oracle", str(tmp_path / "o.pt"), "--json",
                    str(tmp_path / "a.json")])
    result = json.loads((tmp_path / "a.json").read_text())
    assert exit_info.value.code == 130 and not result["complete"]
    assert [row["name"] for row in result["semantics"]] == ["Natural", "PGD-CE"]
    assert "PGD-CE   " in capsys.readouterr().out


def test_the_examples_of_what_is_finished(model_path, tmp_path, monkeypatch):
    """And not those of the file that was there before."""
    path = tmp_path / "e.npz"
    np.savez(path, old=np.zeros(3))
    rows_of(model_path, "--attacks", "natural", "fgsm", "pgd", "--save-images", "--save-examples", str(path))
    with np.load(path) as saved:
        assert set(saved) == {"labels"} | {f"{what}/{name}" for what in ("images", "margins", "predictions")
                                           for name in ("Natural", "FGSM", "PGD-3")}
        assert 0.04 < np.abs(saved["images/FGSM"] - saved["images/Natural"]).max() < 0.051
    monkeypatch.setattr(eval_attacks, "make_attack", lambda *_: interrupt())
    with pytest.raises(SystemExit):
        rows_of(model_path, "--attacks", "natural", "fgsm", "--save-examples", str(path))
    with np.load(path) as saved:
        assert set(saved) == {"labels", "margins/Natural", "predictions/Natural"} and saved["labels"].shape == (24,)


def interrupt():
    raise KeyboardInterrupt


def test_another_radius_than_the_trainings_is_said(model_path, tmp_path, capsys):
    said = "trained at ε 0.01, attacked at ε 0.05"
    result = eval_attacks.main(["--model-path", str(model_path), *SMALL, "--attacks", "fgsm"])
    captured = capsys.readouterr()
    assert said in result["model"]["notes"] and captured.out.count(said) == captured.err.count(said) == 1
    for flags in (["--attacks", "fgsm", "--epsilon", "2/200"], ["--attacks", "natural"],
                  ["--attacks", "fgsm", "--epsilons", "0.01", "0.1"]):
        assert natural(model_path, *flags)[1]["notes"] == []
    content = checkpoints.load(model_path)
    for change, words in (({"defense": "standard"}, []), ({"epsilon": "1/0"}, None), ({"epsilon": "mine"}, None)):
        checkpoints.save(content | {"args": content["args"] | change}, tmp_path / "m.pt")
        if words is None:
            capsys.readouterr()
            fails_in_one_line(eval_attacks.main, ["--model-path", tmp_path / "m.pt", "--attacks", "fgsm"], capsys)
            fails_in_one_line(audit.main, ["--model-path", tmp_path / "m.pt"], capsys)
        else:
            assert natural(tmp_path / "m.pt", "--attacks", "fgsm")[1]["notes"] == words


def test_what_would_be_a_number_of_another_unit_is_refused(tmp_path, capsys):
    state = torch.load(pathlib.Path(__file__).parent / "digits-wrn-10-1-madry.pt", weights_only=True)["state_dict"]
    torch.save(state, tmp_path / "m.pt")
    for values in (["125.3,123.0,113.9", "63.0,62.1,66.7"], ["0.5,0.5,0.5", "0.2,0.2,66.7"]):
        argv = ["--model-path", tmp_path / "m.pt", "--dataset", "digits", "--normalize", *values]
        assert "in units of 255?" in fails_in_one_line(eval_attacks.main, argv, capsys)


def test_too_few_images_to_hold_out_name_the_flag():
    with pytest.raises(ValueError, match="^--val-size 1390: 1397 training images are too few to hold out so many"):
        data.split(data.load("digits"), 1390, limit=8)
