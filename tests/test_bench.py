"""bench.py: both sides compute the same thing, and the table holds every row."""

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
    for _, _, side in (bench.textbook(args), bench.ours(args, "fp32", "off")):
        side["training step"]()
        if defense == "madry":  # the others' second attack meets other running statistics: other passes, another order
            side["training step"]()
    textbook, ours = ([p.detach().flatten() for p in model.parameters()] for model in built)
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in real("wrn-10-1").parameters()])
    textbook, ours = torch.cat(textbook) - start, torch.cat(ours) - start
    assert textbook.abs().max() > 0.01
    assert (textbook - ours).norm() < 1e-3 * textbook.norm()  # p_ref is float32 in ours


def test_the_table_and_the_json(tmp_path, capsys):
    result = bench.main([*SMALL, "--precision", "fp32", "--json", str(tmp_path / "b.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(json.dumps(result))
    rows = {(row["side"], row["work"]): row for row in result["rows"]}
    assert set(rows) == {(side, work) for work in bench.WORK for side in ("textbook", "ours, fp32 eager")}
    for (side, work), row in rows.items():
        assert row["images_per_s"] == pytest.approx(8 / row["seconds"][0])
        assert row["ratio"] == pytest.approx(row["images_per_s"] / rows["textbook", work]["images_per_s"])
        assert f"{work:<15}{side:<20}{row['images_per_s']:>10.1f}" in printed
    hours = 90 * 50_000 / rows["textbook", "training step"]["images_per_s"] / 3600
    assert f"textbook: 90 epochs of this take {hours:.1f} hours" in printed


@pytest.mark.parametrize("argv, message", [
    (["--arch", "vgg"], "unknown architecture"), (["--repeats", "0"], "not an integer above 0"),
    (["--defense", "standard"], "invalid choice"), (["--json", "no/such.json"], "folder does not exist")])
def test_bad_input(argv, message, capsys):
    assert message in fails_in_one_line(bench.main, argv, capsys)


def test_a_failing_compiler_is_no_row(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(bench.runtime.torch, "compile", fail)
    with pytest.raises(RuntimeError, match="no compiler"):
        bench.main([*SMALL[:-1], "on", "--precision", "fp32"])


def test_a_gpu_out_of_memory_ends_in_one_line(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "time_row", full)
    with pytest.raises(SystemExit, match="^bench.py: CUDA out of memory$"):
        bench.main([*SMALL, "--precision", "fp32"])


@pytest.mark.parametrize("device, flags, sides", [
    ("cpu", [], ["bf16 off", "bf16 on"]), ("cuda", [], ["bf16 off", "bf16 on", "bf16 graphs"]),
    ("cuda", ["--compile", "on"], ["bf16 off", "bf16 on"]), ("cpu", ["--compile", "off"], ["bf16 off"]),
    ("cpu", ["--compile", "graphs"], ["bf16 off", "bf16 on"])])
def test_the_sides(device, flags, sides):
    """The last one is held against float32 too."""
    args = bench.parse_args([*SMALL[:-2], "--precision", "bf16", *flags])
    args.torch_device = torch.device(device)
    first, *ours = bench.sides_of(args)
    assert first.func is bench.textbook
    assert [" ".join(side.args[1:]) for side in ours] == [sides[-1].replace("bf16", "fp32"), *sides]
    args.precision = "fp32"
    assert [" ".join(side.args[1:]) for side in bench.sides_of(args)[1:]] == [
        side.replace("bf16", "fp32") for side in sides]
