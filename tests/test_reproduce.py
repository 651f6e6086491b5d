"""reproduce.py: every line parses, what is finished is known, cells run once, one a GPU, and go on after
kills; the numbers of the report."""

import collections
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import fails_in_one_line
from scipy.stats import t

import checkpoints
import compare
import eval_attacks
import pseudo_label
import reproduce
import train_cifar

ROOT = pathlib.Path(__file__).parent.parent
PARSERS = {"train_cifar.py": train_cifar.parse_args, "eval_attacks.py": eval_attacks.parse_args,
           "pseudo_label.py": pseudo_label.parse_args}
STUB = """
import json, os, pathlib, sys, time
name, flags = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
training = name == "train_cifar.py"
key = flags[flags.index("--out-dir" if training else "--json") + 1]
def note(what):
    with open("calls.txt", "a") as file:
        file.write(json.dumps([name, key, what, os.environ.get("CUDA_VISIBLE_DEVICES"), time.time()]) + "\\n")
made = json.load(open("made.json"))
note("--resume" in flags)
if training:
    pathlib.Path(key, "last.pt").write_bytes(pathlib.Path(made[key]["begun"]).read_bytes())
print("working")
time.sleep(made[key].get("seconds", 0))
if made[key].get("fails"):
    sys.exit("no space left on the moon")
pathlib.Path(key, "last.pt" if training else "").write_bytes(pathlib.Path(made[key]["done"]).read_bytes())
note("end")
"""


def lines_of(argv, capsys):
    reproduce.main([*argv, "--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("mkdir -p results/")]


@pytest.mark.parametrize("key", reproduce.RECIPES, ids=" ".join)
def test_every_line_parses(key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = lines_of([key[0], "--scale", key[1], "--seeds", "7"], capsys)
    for python, script, *flags in lines:
        parsed = PARSERS[script](flags)
        assert python == "python"
        if script == "train_cifar.py":
            args = train_cifar.with_defaults(parsed[1])
            assert args.precision != "auto" and args.compile != "auto"
        if script == "eval_attacks.py":
            assert parsed[1].precision != "auto" and parsed[1].compile != "auto"
            assert (tmp_path / parsed[1].json).parent.is_relative_to(tmp_path / "results")
    cells = reproduce.cells_of([key], {2, 1}, "data")
    assert 2 * [line[1] for line in lines].count("train_cifar.py") == len(cells) == 2 * len(reproduce.RECIPES[key].rows)
    assert len({cell.log for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_the_papers_scale_is_the_papers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained = {target: [train_cifar.with_defaults(train_cifar.parse_args(line[2:])[1]) for line in lines_of(
        [target, "--scale", "paper"], capsys) if line[1] == "train_cifar.py"]
        for target in reproduce.TARGETS if target != "fat"}
    table3 = trained["table3"] + trained["table3-cifar100"]
    names = {"cifar10": "table3", "cifar100": "table3-cifar100"}
    assert {(names[args.dataset], args.defense + ("" if args.spat_alpha is None else f"-spat{args.spat_alpha:g}"))
            for args in table3} == {key for key in reproduce.PAPER if key[0].startswith("table3")}
    assert {(args.arch, args.epochs, args.epsilon, args.lr) for args in table3} == {("wrn-34-10", 90, "8/255", 0.1)}
    decay = {(args.dataset, args.defense): args.weight_decay for args in table3}
    assert [decay["cifar100", defense] for defense in ("madry", "trades", "mart")] == [2e-4, 2e-4, 7e-4]
    assert {decay["cifar10", defense] for defense in ("madry", "trades", "mart")} == {7e-4}
    assert len(table3) == 10 and len(trained["table4"]) == 4 and len(trained["figure5"]) == 18
    assert {(a.defense, a.spat_alpha, a.arch, a.epochs) for a in trained["table4"]} == {
        (defense, alpha, "wrn-28-10", 200) for defense in ("trades", "mart") for alpha in (None, 0.1)}
    assert {(args.epsilon, args.spat_alpha) for args in trained["figure5"]} == {
        (f"{e}/255", a) for e in (4, 8, 16) for a in (0, 0.2, 0.4, 0.6, 0.8, 1)}
    rows = reproduce.RECIPES["table4", "paper"].rows
    assert {row for target, row in reproduce.PAPER if target == "table4"} == set(rows)


def test_earlier_results_count_where_their_recipe_is_the_tables(monkeypatch):
    monkeypatch.chdir(ROOT)
    states = {cell: reproduce.missing_and_differing(cell) for cell in reproduce.cells_of(
        [key for key in reproduce.RECIPES if key[1] == "cpu" and key[0] != "table3-cifar100"], {1}, "data")}
    of_another = {cell.row: differing for cell, (_, differing) in states.items() if differing}
    assert len([cell for cell, state in states.items() if not any(state)]) == 7 + 4 + 2 + 12
    assert of_another.pop("mart") == ["results/rst/mart.json: evaluated with compile off, not on"]
    assert sorted(of_another) == sorted(["eps4-alpha0.6", "eps4-alpha0.8", "eps8-alpha0.8", "eps16-alpha0",
                                         "eps16-alpha0.4", "eps16-alpha0.6"])
    assert all(differing[0].endswith(": compile off, not on") for differing in of_another.values())
    rows = reproduce.entries_of(reproduce.Cell("table3", "cpu", "trades-spat0", 1))
    assert round(100 * rows["Worst case"]["accuracy"], 2) == 28.00  # of the last epoch, and not epoch 5's 27.05
    assert rows["APGD-CE + APGD-T"]["n"] == 1000 and rows["PGD-20"]["n"] == 10_000


# Cells whose scripts are stubs ----------------------------------------------------------------------------------------


def made_result(cell, command, right=300, sha256="of a model"):
    """What eval_attacks.py would write for the cell's command; the first `right` images are right in all attacks."""
    trained = vars(train_cifar.with_defaults(train_cifar.parse_args(cell.training()[1:])[1]))
    args = eval_attacks.parse_args(command[1:])[1]
    args.epsilon = args.epsilon or "0.05"
    n = args.num_images or 400
    rows = [eval_attacks.outcome(name, params, torch.arange(n) < right)
            for name, params in eval_attacks.attack_list(args)]
    rows += [eval_attacks.worst_case(rows)] if len(rows) > 2 else []
    model = {"dataset": "digits", "epochs": trained["epochs"], "args": trained, "sha256": sha256}
    return {"model": model, "n": n, "epsilon": args.epsilon, "device": "stub", "precision": args.precision,
            "compile": args.compile, "complete": True, "attacks": rows}


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Scripts that copy what was made before to where the real ones would write; stubs(cells, {cell: more}) makes it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for script in PARSERS:
        (tmp_path / script).write_text(STUB)

    def make(cells, more=None):
        made = {}
        for i, cell in enumerate(cells):
            args = vars(train_cifar.with_defaults(train_cifar.parse_args(cell.training()[1:])[1]))
            run = {"format": checkpoints.FORMAT, "args": args, "state_dict": {}, "optimizer": {}, "step": 0,
                   "best": 0.0, "sums": torch.zeros(6), "on": ["cpu", 1]}
            checkpoints.save(run | {"rows": []}, f"begun{i}.pt")
            checkpoints.save(run | {"rows": [{}] * args["epochs"]}, f"done{i}.pt")
            made[str(cell.run)] = {"begun": f"begun{i}.pt", "done": f"done{i}.pt"} | (more or {}).get(cell, {})
            for j, (path, command) in enumerate(cell.evaluations().items()):
                result = made_result(cell, command, 300 + i, checkpoints.sha256(f"done{i}.pt"))
                eval_attacks.write(f"result{i}-{j}.json", result)
                made[str(path)] = {"done": f"result{i}-{j}.json"}
        pathlib.Path("made.json").write_text(json.dumps(made))
        return cells

    return make


def calls():
    return [json.loads(line) for line in pathlib.Path("calls.txt").read_text().splitlines()]


def begun():
    return [(script, key) for script, key, resumed, *_ in calls() if resumed != "end"]


def ends(argv):
    with pytest.raises(SystemExit) as exit_info:
        reproduce.main(argv)
    return exit_info.value.code


TABLE3 = ["table3", "--scale", "digits", "--seeds", "1"]


def seven():
    return reproduce.cells_of([("table3", "digits")], {1}, "data")


def test_two_gpus_get_one_process_each_and_no_cell_runs_twice(stubs, monkeypatch, capsys):
    cells = stubs(seven(), {cell: {"seconds": 0.1} for cell in seven()})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert ends(TABLE3) == 0
    expected = [("train_cifar.py", str(cell.run)) for cell in cells]
    expected += [("eval_attacks.py", str(path)) for cell in cells for path in cell.evaluations()]
    assert sorted(begun()) == sorted(expected)
    at_work = collections.Counter()
    for _, _, resumed, gpu, _ in sorted(calls(), key=lambda call: call[-1]):
        at_work[gpu] += -1 if resumed == "end" else 1
        assert at_work[gpu] <= 1
    assert set(at_work) == {"3", "5"}
    capsys.readouterr()
    assert "one process a GPU" in fails_in_one_line(reproduce.main, [*TABLE3, "--jobs", 2], capsys)
    assert "working\n$ python eval_attacks.py" in (cells[0].run / "output.log").read_text()


@pytest.mark.parametrize("what", ["images", "pseudo-labels"])
def test_a_cell_on_others_than_the_rest_is_left_out_of_the_report(what, stubs, capsys):
    """Also if the first is of another recipe, and so says nothing of the rest, and the second is older than a hash."""
    cells = stubs(seven())
    for i in range(7):
        result = json.loads(pathlib.Path(f"result{i}-0.json").read_text())
        of = {0: "former", 1: None, 3: "other"}.get(i, "same")
        if what == "images":  # and the one that is left out is the first to name pseudo-labels, which are others too
            result["images"] = of
            result["model"]["trained_on"] = {"--aux-data": of} if i >= 3 else None
        else:
            result["model"]["trained_on"] = of and {"--aux-data": of}
        eval_attacks.write(f"result{i}-0.json", result | ({"compile": "on"} if i == 0 else {}))
    assert ends(TABLE3) == 1
    capsys.readouterr()
    assert ends([*TABLE3[:3], "--report"]) == 0
    printed = capsys.readouterr().out
    assert f"left out: {cells[0]}: results/table3-digits/madry.json: evaluated with compile on, not off\n" in printed
    assert f"left out: {cells[3]}: of other {what} than the cells before\n" in printed
    assert printed.count("left out") == 2


def test_graphs_that_became_on_are_of_the_same_recipe():
    """Where there is no GPU."""
    cell = reproduce.Cell("table3", "gpu", "madry", 1)
    args = vars(train_cifar.with_defaults(train_cifar.parse_args(cell.training()[1:])[1]))
    assert args["compile"] == "graphs" and reproduce.trained_otherwise(args | {"compile": "on"}, cell) == []
    assert reproduce.trained_otherwise(args | {"compile": "off"}, cell) == ["compile off, not graphs"]


def test_what_is_finished_is_skipped_and_a_lost_json_alone_is_made_again(stubs):
    cells = stubs(seven())
    assert ends(TABLE3) == 0
    pathlib.Path("calls.txt").write_text("")
    assert ends(TABLE3) == 0 and begun() == []
    path = next(iter(cells[2].evaluations()))
    eval_attacks.write(path, eval_attacks.read(path) | {"complete": False})  # what a stopped evaluation leaves
    assert ends(TABLE3) == 0 and begun() == [("eval_attacks.py", str(path))]
    path.unlink()
    assert ends([*TABLE3, "--cell", "2"]) == 0 and len(begun()) == 1  # another one
    assert ends([*TABLE3, "--cell", "3"]) == 0 and begun()[1:] == [("eval_attacks.py", str(path))]


def first_line(capsys):
    return capsys.readouterr().out.splitlines()[0]


CAME = "came with the repository, or from elsewhere"


def test_the_first_line_says_what_was_run_and_what_came_with_the_repository(stubs, capsys):
    cells = stubs(seven())
    assert ends(TABLE3) == 0
    assert first_line(capsys) == f"Cells run now: 7; before: 0; {CAME}: 0"
    (cells[3].run / "last.pt").unlink()  # as in a clone, which has results and no runs
    next(iter(cells[6].evaluations())).unlink()
    assert ends(TABLE3) == 0
    assert first_line(capsys) == f"Cells run now: 1; before: 5; {CAME}: 1"
    assert ends([*TABLE3, "--cell", "4"]) == 0
    assert first_line(capsys) == f"Nothing was run; before: 0; {CAME}: 1"


@pytest.mark.parametrize("target, scale, cells", [("table3", "confident", 35), ("table4", "digits", 14)])
def test_in_a_fresh_clone_a_table_says_that_nothing_was_run(target, scale, cells, tmp_path, monkeypatch, capsys):
    """And it trains no labeller anew, whose labels are not needed."""
    shutil.copytree(ROOT / f"results/{target}-{scale}", tmp_path / f"results/{target}-{scale}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ends([target, "--scale", scale]) == 0 and not pathlib.Path("runs").exists()
    out = capsys.readouterr().out
    assert out.startswith(f"Nothing was run; before: 0; {CAME}: {cells}\n\n## {target}, {scale} scale\n")


def test_results_dir_keeps_results_apart(stubs, capsys):
    """In a folder with a space."""
    cells = stubs(seven())
    for path in cells[0].evaluations():  # came with the repository
        path.parent.mkdir(parents=True)
        eval_attacks.write(path, made_result(cells[0], cells[0].evaluations()[path]))
    before = sorted(pathlib.Path("results").rglob("*"))
    mine = [cell._replace(results_dir="my results") for cell in cells]
    made = json.loads(pathlib.Path("made.json").read_text())
    made |= {str(new): made[str(old)] for cell, own in zip(cells, mine, strict=True)
             for old, new in zip(cell.evaluations(), own.evaluations(), strict=True)}
    pathlib.Path("made.json").write_text(json.dumps(made))
    assert ends([*TABLE3, "--results-dir", "my results"]) == 0
    assert first_line(capsys) == f"Cells run now: 7; before: 0; {CAME}: 0"
    assert sorted(pathlib.Path("results").rglob("*")) == before
    assert all(path.exists() for cell in mine for path in cell.evaluations())
    assert pathlib.Path("my results/table3-digits.json").exists()
    reproduce.main(["--results-dir", "my results", "--seeds", "1"])
    assert re.search(r"^table3 +digits +7 +7 +0 +1; nothing$", capsys.readouterr().out, re.M)


@pytest.fixture
def two_files(monkeypatch):
    """Each cell of the table has two JSONs."""
    recipe = reproduce.RECIPES["table3", "digits"]
    evaluate = {"": recipe.evaluate[""], "-first": "last.pt --attacks natural pgd --num-images 100 --precision fp32 "
                "--batch-size 50 --compile off"}
    monkeypatch.setitem(reproduce.RECIPES, ("table3", "digits"), recipe._replace(evaluate=evaluate))


def test_a_cell_of_two_models_is_named_and_not_averaged_in(two_files, stubs, capsys):
    cells = stubs(seven())
    assert ends(TABLE3) == 0
    first, second = cells[2].evaluations()
    eval_attacks.write(second, made_result(cells[2], cells[2].evaluations()[second], sha256="another"))
    capsys.readouterr()
    assert ends(TABLE3) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == (
        f"failed: {cells[2]}: {second}: mixed, of another model than {first}")
    assert f"left out: {cells[2]}: {second}: mixed" in out and "| trades |" not in out and "| madry |" in out


@pytest.mark.parametrize("left", ["no run", "another run", "half a run"])
def test_a_lost_model_is_not_mixed_with_the_results_that_remain(left, two_files, stubs, capsys):
    cells = stubs(seven())
    assert ends(TABLE3) == 0
    pathlib.Path("calls.txt").write_text("")
    first, second = cells[2].evaluations()
    second.unlink()
    if left == "no run":
        shutil.rmtree(cells[2].run)
    else:  # of another training by the same recipe
        name = "done3.pt" if left == "another run" else "begun2.pt"
        (cells[2].run / "last.pt").write_bytes(pathlib.Path(name).read_bytes())
    assert ends(TABLE3) == 1 and begun() == []
    why = f"{first} is of a model that is not in {cells[2].run}: move it away, or use --results-dir"
    assert capsys.readouterr().err.splitlines()[-1] == f"failed: {cells[2]}: {why}"
    first.unlink()
    if left == "no run":
        assert ends(TABLE3) == 0 and [script for script, _ in begun()] == ["train_cifar.py", *["eval_attacks.py"] * 2]


@pytest.mark.parametrize("scale, shown", [
    ("cpu", True), ("gpu", True), ("paper", True), ("digits", False), ("confident", False)])
def test_the_papers_numbers_stand_beside_its_task_alone(scale, shown, stubs, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "evaluated_otherwise", lambda result, command: [])
    cell = reproduce.Cell("table3", scale, "madry", 1)
    for path, command in cell.evaluations().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        eval_attacks.write(path, made_result(cell, command))
    assert ends(["table3", "--scale", scale, "--report"]) == 0
    printed = capsys.readouterr().out
    assert "| madry | seed 1 |" in printed and ("[84.39]" in printed) == shown


def test_a_cell_that_another_process_has_finished_meanwhile_is_done(stubs):
    cells = stubs(seven())
    assert ends(TABLE3) == 0
    pathlib.Path("calls.txt").write_text("")
    assert reproduce.run(cells[:1], [{}]) == ({}, None) and begun() == []


def test_a_failing_cell_does_not_stop_the_others(stubs, capsys):
    cells = seven()
    stubs(cells, {cells[1]: {"fails": True}})
    assert ends(TABLE3) == 1
    assert [cell.row for cell in cells if any(reproduce.missing_and_differing(cell))] == ["madry-spat0.2"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == ("failed: table3 digits madry-spat0.2 seed 1: exit status 1, see "
                    "runs/table3-digits/madry-spat0.2/output.log: no space left on the moon")
    stubs(cells)
    pathlib.Path("calls.txt").unlink()
    assert ends(TABLE3) == 0 and [call[2] for call in calls()[:1]] == [True]  # it resumes
    assert len(begun()) == 2


def test_the_worst_case_is_of_the_recipes_attacks(stubs):
    """A file that holds one attack more, under which nothing is right."""
    cell = stubs(seven()[:1])[0]
    assert ends([*TABLE3, "--cell", "1"]) == 0
    path, = cell.evaluations()
    result, before = json.loads(path.read_text()), reproduce.entries_of(cell)
    more = result["attacks"][1] | {"name": "another", "correct_mask": "00" * 50}
    result["attacks"] = [*result["attacks"][:-1], more, eval_attacks.worst_case([*result["attacks"][:-1], more])]
    path.write_text(json.dumps(result))
    assert reproduce.entries_of(cell) == before and before["Worst case"]["correct"] > 0
    path.write_text(json.dumps(result | {"attacks": result["attacks"][::-1]}))
    assert list(reproduce.entries_of(cell)) == list(before)  # the order of the table's head, whatever the file's


def test_a_changed_recipe_is_named_and_not_mixed_in(stubs, monkeypatch, capsys):
    cells = stubs(seven())
    assert ends(TABLE3) == 0
    recipe = reproduce.RECIPES["table3", "digits"]._replace(rows=["madry", "mart"], own={"mart": "--beta 4"})
    monkeypatch.setitem(reproduce.RECIPES, ("table3", "digits"), recipe)
    capsys.readouterr()
    pathlib.Path("calls.txt").write_text("")
    assert ends(TABLE3) == 1 and begun() == []
    out, err = capsys.readouterr()
    why = "table3 digits mart seed 1: results/table3-digits/mart.json: beta 5.0, not 4.0"
    assert f"left out: {why}" in out and err == f"failed: {why}\n"
    assert "| mart |" not in out and "| madry | seed 1 |" in out
    next(iter(cells[5].evaluations())).unlink()  # but the weights are still of the former recipe
    assert ends(TABLE3) == 1 and begun() == []
    assert "runs/table3-digits/mart is of another recipe (beta 5.0, not 4.0): move it away" in capsys.readouterr().err


def test_a_result_that_is_not_what_was_asked_for_fails_its_cell(stubs, capsys):
    cells = stubs(seven())
    eval_attacks.write("result0-0.json", eval_attacks.read("result0-0.json") | {"compile": "on"})
    assert ends(TABLE3) == 1
    assert ("failed: table3 digits madry seed 1: results/table3-digits/madry.json: evaluated with compile on, not off"
            in capsys.readouterr().err)
    assert len([cell for cell in cells if not any(reproduce.missing_and_differing(cell))]) == 6


def test_trainings_that_targets_share_run_once_and_labels_come_first(stubs):
    keys = [("table3", "digits"), ("figure4", "digits"), ("table4", "digits")]
    cells = reproduce.cells_of(keys, {1}, "data")
    labeller = next(cell for cell in cells if cell.row == "labeller")
    assert cells[0].run == next(cell for cell in cells if (cell.target, cell.row) == ("figure4", "madry")).run
    waiting = [cell for cell in cells if cell.after == labeller]
    assert {cell.target for cell in waiting} == {"table4"} and labeller.after is None
    assert str(labeller.labels) in shlex.join(waiting[1].training())
    assert labeller.labels.parent == labeller.run  # who moves the model away takes its labels along


def start(argv, prepare, **where):
    """reproduce.py after the statements of `prepare`, as a process."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pathlib, reproduce; {prepare}; "
            f"reproduce.main({argv!r})")
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code], text=True, **pipes, **where)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_it_waits_for_its_orphan_and_goes_on(stubs, capsys):
    cells = seven()[:1]
    stubs(seven(), {cells[0]: {"seconds": 8}})
    first = start([*TABLE3, "--cell", "1"], "reproduce.HERE = pathlib.Path().resolve()")
    wait_for(lambda: pathlib.Path("calls.txt").exists())
    first.kill()
    first.communicate()
    assert ends([*TABLE3, "--cell", "1"]) == 0
    assert f"{cells[0].run}: another process is at work there, waiting for it" in capsys.readouterr().err
    assert [script for script, _ in begun()] == ["train_cifar.py", "eval_attacks.py"]


TWO = """key = ("table3", "digits"); recipe = reproduce.RECIPES[key]
reproduce.RECIPES[key] = recipe._replace(
    rows=["trades", "mart-spat0.3"], train=recipe.train + " --limit-train 512",
    evaluate={"": recipe.evaluate[""] + " --num-images 50"})"""


@pytest.mark.slow
def test_two_real_cells_killed_three_times_end_as_those_left_alone(tmp_path):
    random.seed(seed := time.time_ns())
    print("seed", seed)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder, kills in ((alone, []), (killed, ["all", "parent", "all"])):
        folder.mkdir()
        for kill in kills:
            first = start(TABLE3, TWO, cwd=folder)
            wait_for(lambda: any(killed.glob("runs/*/*/last.pt")))  # from then on there is something to resume
            time.sleep(random.uniform(0, 15))
            children = pathlib.Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
            first.kill()
            for child in children if kill == "all" else ():
                os.kill(int(child), signal.SIGKILL)
            first.communicate()
        last = start(TABLE3, TWO, cwd=folder)
        assert "| mart-spat0.3 | seed 1 |" in last.communicate(timeout=600)[0] and last.returncode == 0
    for name in ("trades", "mart-spat0.3"):
        a, b = (checkpoints.load(folder / f"runs/table3-digits/{name}/last.pt") for folder in (alone, killed))
        assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])
        a, b = (eval_attacks.read(folder / f"results/table3-digits/{name}.json") for folder in (alone, killed))
        assert [row["correct_mask"] for row in a["attacks"]] == [row["correct_mask"] for row in b["attacks"]]


@pytest.mark.parametrize("flags, number, code", [([], signal.SIGTERM, 143), ([], signal.SIGINT, 130),
                                                 (["--minutes", "0.01"], None, 143)])
def test_a_signal_ends_the_children_and_the_next_run_resumes(flags, number, code, stubs, capsys):
    cells = stubs(seven(), {cell: {"seconds": 300} for cell in seven()[:2]})

    def send():
        wait_for(lambda: sum((cell.run / "last.pt").exists() for cell in cells[:2]) == 2)
        os.kill(os.getpid(), number)

    if number:
        threading.Thread(target=send).start()
    assert ends([*TABLE3, "--jobs", "2", *flags]) == code
    assert "failed" not in capsys.readouterr().err
    for cell in cells[:2]:
        with open(cell.run / "output.log", "ab") as file:  # nobody holds it
            reproduce.fcntl.flock(file, reproduce.fcntl.LOCK_EX | reproduce.fcntl.LOCK_NB)
    if not flags:
        expected = [cells[0].training() + ["--resume"], *cells[0].evaluations().values()]
        assert reproduce.commands_left(cells[0]) == expected


@pytest.mark.parametrize("argv, words", [
    (["table5", "--scale", "cpu"], "table5"), (["table3"], "--scale go together"), (["--scale", "cpu"], "go together"),
    (["table3-cifar100", "--scale", "digits"], "has no scale digits"), (["figure5", "--scale", "gpu"], "no scale gpu"),
    ([*TABLE3, "--cell", "8"], "there are 7"), ([*TABLE3, "--cell", "0"], "above 0"),
    ([*TABLE3, "--report", "--dry-run"], "--report"), ([*TABLE3, "--minutes", "-1"], "above 0"),
])
def test_bad_input_ends_in_one_line(argv, words, capsys):
    assert words in fails_in_one_line(reproduce.main, argv, capsys)


# The numbers of a report ----------------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([]) == []


def test_an_attack_on_few_images_is_estimated_for_all(monkeypatch, tmp_path):
    """Of results/: Madry + SPAT's difference on the first 256 and 1,000 images, and on all by the worst case."""
    monkeypatch.chdir(ROOT)
    found = {row: {1: reproduce.entries_of(reproduce.Cell("table3", "cpu", row, 1))}
             for row in ("madry", "madry-spat0.2")}
    of = {c["attack"]: c for c in compare.summarise(found, [("madry", "madry-spat0.2")], {})["comparisons"]}
    assert of["PGD-20"]["all_images"] is None and of["Worst case"]["all_images"] is None
    assert {c["n"] for c in of.values()} == {1}
    assert of["PGD-20"]["interval"] == pytest.approx((0.0017, 0.0093), abs=1e-4)
    masks = {name: [eval_attacks.correct_mask(seeds[1][name]).astype(int) for seeds in found.values()]
             for name in ("AutoAttack", "Worst case")}
    costly, cheap = (after - before for before, after in masks.values())
    estimate = of["AutoAttack"]["all_images"]
    assert estimate["mean"] == pytest.approx(cheap.mean() + (costly - cheap[:256]).mean())
    assert round(100 * of["APGD-CE + APGD-T"]["all_images"]["mean"], 2) == 0.46
    found = {row: seeds | {2: seeds[1]} for row, seeds in found.items()}
    summary = compare.summarise(found, [("madry", "madry-spat0.2")], {})
    of_two, = (c["all_images"] for c in summary["comparisons"] if c["attack"] == "AutoAttack")
    assert of_two["n"] == 2 and of_two["mean"] == estimate["mean"]  # two equal seeds, so the spread is of the images
    assert of_two["interval"] == pytest.approx(estimate["interval"], abs=1e-3)
    assert "|  | estimated for all images | -0.24 (" in compare.markdown(summary)


def welch(mean, of_seeds, of_images):
    """The 95 % interval and p of a mean over 2 seeds and 200 images, from its two variances."""
    law = t((of_seeds + of_images) ** 2 / (of_seeds**2 / 1 + of_images**2 / 199), scale=(of_seeds + of_images) ** 0.5)
    return (mean + law.ppf(0.025), mean + law.ppf(0.975)), 2 * law.sf(mean)


def test_the_report_by_hand(stubs, capsys):
    cells = reproduce.cells_of([("figure5", "digits")], {1, 2}, "data")
    right = {("eps0.05-alpha0", 1): 150, ("eps0.05-alpha0", 2): 152, ("eps0.05-alpha0.4", 1): 154,
             ("eps0.05-alpha0.4", 2): 158, ("eps0.025-alpha0", 1): 100, ("eps0.025-alpha1", 1): 50}
    for cell in cells:
        for path, command in cell.evaluations().items():
            if (cell.row, cell.seed) in right:
                path.parent.mkdir(parents=True, exist_ok=True)
                eval_attacks.write(path, made_result(cell, command, right[cell.row, cell.seed]))
                cell.log.write_text(f"epoch,share_p_y_above_1_minus_alpha\n1,0.9\n2,{cell.seed / 10}\n")
    assert ends(["figure5", "--scale", "digits", "--report"]) == 0
    out, summary = capsys.readouterr().out, json.loads(pathlib.Path("results/figure5-digits.json").read_text())
    rows = {(row["row"], row["attack"]): row for row in summary["rows"]}
    row = rows["eps0.05-alpha0.4", "PGD-20"]
    assert (row["mean"], row["n"], row["images"]) == (pytest.approx(0.78), 2, 200)
    # 154 images are right with both seeds, 4 with one; the second seed has two hundredths more than the first
    interval, _ = welch(0.78, 0.02**2 / 2 / 2, ((154 + 4 / 4 + 1 / 2) / 202 - (156 / 202) ** 2) / 200)
    assert row["interval"] == pytest.approx(interval, abs=1e-6)
    assert summary["shares"]["eps0.05-alpha0.4"] == pytest.approx(0.15)
    found = {(c["b"], c["attack"]): c for c in summary["comparisons"]}
    assert len(found) == 4 and len(summary["unfinished"]) == 6
    paired, images = found["eps0.05-alpha0.4", "PGD-20"], found["eps0.025-alpha1", "PGD-20"]
    assert paired["n"] == 2 and paired["mean"] == pytest.approx(0.025)  # of +0.02 and +0.03
    # two images are gained with both seeds, two with the first alone and four with the second alone
    interval, p = welch(0.025, 0.01**2 / 2 / 2, ((2 + 6 / 4 + 1 / 2) / 202 - (5 / 202) ** 2) / 200)
    assert paired["interval"] == pytest.approx(interval, abs=1e-6) and paired["p"] == pytest.approx(p)
    assert images["n"] == 1 and images["mean"] == -0.25 and images["interval"][1] < -0.18
    assert images["p_holm"] == pytest.approx(4 * images["p"]) and paired["p_holm"] == pytest.approx(2 * paired["p"])
    assert "| eps0.05-alpha0.4 | 2 | 78.00 ± 6." in out and "| 15.00% |" in out
    assert "| 2 seeds, 200 images |" in out
    assert "| eps0.025-alpha1 - eps0.025-alpha0 | PGD-20 | -25.00 (" in out and "| images of seed 1 alone |" in out
    assert "not finished: 6 of its cells" in out


def test_a_finished_cell_needs_no_run_directory(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results/table3-digits", tmp_path / "results/table3-digits")
    monkeypatch.chdir(tmp_path)
    assert reproduce.commands_left(reproduce.Cell("table3", "digits", "madry", 1)) == []


def test_the_other_cells_go_on_whatever_one_fails_by(monkeypatch):
    def finish(cell, slot, stopped):
        yield
        if cell.row == "madry":
            raise KeyError("args")
        done.append(cell.row)

    done = []
    monkeypatch.setattr(reproduce, "finish", finish)
    cells = [reproduce.Cell("table3", "digits", row, 1) for row in ("madry", "mart")]
    assert reproduce.run(cells, [{}, {}]) == ({cells[0]: "'args'"}, None) and done == ["mart"]
