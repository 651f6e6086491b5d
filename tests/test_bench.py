"""bench.py: both sides compute the same thing, the operations are counted right, and the table holds every row."""

import json

import pytest
import torch
from helpers import fails_in_one_line

import bench
import models

SMALL = ["--arch", "wrn-10-1", "--batch-size", "8", "--eval-batch-size", "8", "--num-steps", "2", "--eval-steps", "2",
         "--repeats", "1", "--compile", "off"]


@pytest.mark.parametrize("defense", ["madry", "trades", "mart"])
def test_both_sides_move_the_weights_alike(defense, monkeypatch, request):
    """Training steps of the textbook and of ours, from the same weights and the same random start; in float64,
    because in float32 the sign of a gradient near zero depends on the order of a sum, and on pixels away from 0 and 1,
    because the published code does not clip the random start and this repository does."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(lambda: torch.set_default_dtype(previous))
    args = bench.parse_args([*SMALL, "--defense", defense, "--precision", "fp32"])
    noise = 0.001 * torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(torch, "randn_like", lambda x: noise / 0.001)
    monkeypatch.setattr(bench.attacks, "start_perturbation", lambda *_: noise)
    draw, built = bench.batch, []
    monkeypatch.setattr(bench, "batch", lambda *arguments: (draw(*arguments)[0] * 0.9 + 0.05, draw(*arguments)[1]))
    real = models.build_model

    def remember(*arguments):
        torch.manual_seed(0)
        built.append(real(*arguments))
        return built[-1]

    monkeypatch.setattr(models, "build_model", remember)
    for side, _ in (bench.textbook(args), bench.ours(args, "fp32", "off")):
        side["training step"]()
        if defense == "madry":  # the others' second attack meets other running statistics: other passes, another order
            side["training step"]()
    textbook, ours = ([p.detach().flatten() for p in model.parameters()] for model in built)
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in real("wrn-10-1").parameters()])
    textbook, ours = torch.cat(textbook) - start, torch.cat(ours) - start
    assert textbook.abs().max() > 0.01
    assert (textbook - ours).norm() < 1e-3 * textbook.norm()  # p_ref is float32 in ours


def test_flops_of_a_wide_resnet_by_hand():
    args = bench.parse_args([*SMALL, "--defense", "madry"])
    convs = [(3, 16, 32, 9)] + [(i, o, s, k) for i, o, s in ((16, 16, 32), (16, 32, 16), (32, 64, 8))
                                for k in ((9,) if i == o else (9, 1))]
    convs += [(o, o, s, 9) for o, s in ((16, 32), (32, 16), (64, 8))]
    forward = sum(2 * i * o * s * s * k for i, o, s, k in convs) + 2 * 64 * 10
    counted = bench.flops(args)
    attack = 8 * 2 * 2 * forward  # batch, steps, forward and backward
    assert counted["attack alone"] == pytest.approx(attack, rel=0.01)
    assert counted["training step"] == pytest.approx(attack + 8 * 3 * forward, rel=0.03)


@pytest.mark.slow
def test_the_table_and_the_json(tmp_path, capsys):
    result = bench.main([*SMALL, "--precision", "fp32", "--json", str(tmp_path / "b.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(json.dumps(result))
    assert {(row["work"], row["side"]) for row in result["rows"]} == {
        (work, side) for work in ("training step", "attack alone", "evaluation")
        for side in ("textbook", "ours, fp32 eager")}
    for row in result["rows"]:
        assert row["side"] != "textbook" or row["ratio"] == 1
        assert row["images_per_s"] > 0 and 0 < row["share_of_matrix_product"] < 1
    assert printed.count("ours, fp32 eager") == 4 and "matrix product" in printed
    rate = result["rows"][-3]["images_per_s"]
    assert (result["rows"][-3]["side"], result["rows"][-3]["work"]) == ("ours, fp32 eager", "training step")
    assert result["hours_of_90_epochs"]["ours, fp32 eager"] == pytest.approx(90 * 50_000 / rate / 3600)
    assert printed.count("90 epochs of this take") == 2
    assert all(memory > 2**20 for memory in result["peak_memory_bytes"].values())


@pytest.mark.parametrize("argv, message", [
    (["--arch", "vgg"], "unknown architecture"), (["--repeats", "0"], "not an integer above 0"),
    (["--defense", "standard"], "invalid choice"), (["--json", "no/such.json"], "folder does not exist")])
def test_bad_input(argv, message, capsys):
    assert message in fails_in_one_line(bench.main, argv, capsys)


def test_a_failing_compiler_is_named(monkeypatch, capsys):
    def fail(*_, **__):
        def call(*_):
            raise RuntimeError("no compiler")
        return call

    monkeypatch.setattr(bench.runtime.torch, "compile", fail)
    monkeypatch.setattr(bench, "peak_memory", lambda *_: 0)  # measured in another process, which has a compiler
    result = bench.main([*SMALL[:-1], "on", "--precision", "fp32"])
    assert result["how"]["ours, fp32 compiled"] == "eager; torch.compile failed (RuntimeError): no compiler"
    assert "failed (RuntimeError)" in capsys.readouterr().out


@pytest.mark.parametrize("device, textbook, flags, levels", [
    ("cpu", "fp32", [], ["eager", "compiled"]), ("cuda", "tf32", [], ["eager", "compiled", "graphs"]),
    ("cuda", "tf32", ["--compile", "on"], ["eager", "compiled"]), ("cpu", "fp32", ["--compile", "off"], ["eager"])])
def test_the_sides(device, textbook, flags, levels):
    """On a GPU the textbook is held against TF32: its convolutions run in it there, so that a float32 product would be
    passed by, not approached."""
    args = bench.parse_args([*SMALL[:-2], "--precision", "bf16", *flags])
    args.torch_device = torch.device(device)
    sides = {name: arithmetic for name, (_, arithmetic) in bench.sides_of(args).items()}
    assert sides == {"textbook": textbook, f"ours, fp32 {levels[:2][-1]}": "fp32"} | {
        f"ours, bf16 {level}": "bf16" for level in levels}
    args.precision = "fp32"
    assert [name for name in bench.sides_of(args)] == ["textbook"] + [f"ours, fp32 {level}" for level in levels]
