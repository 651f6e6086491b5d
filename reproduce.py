"""Every table and figure of the paper from one command, at five scales.

    python reproduce.py                                        what there is, what is finished, what the rest would take
    python reproduce.py table3 --scale digits --seeds 1 2 3    trains, evaluates and reports; again: goes on
    python reproduce.py table3 --scale paper --dry-run         the commands that it would run, one a line
    python reproduce.py figure5 --scale cpu --report           runs nothing; the tables of what is finished
    python reproduce.py table3 --scale paper --cell 3          one cell, for the array job of a scheduler, or on 8 GPUs:
    sbatch --array=1-5 --gres=gpu:1 --signal=B:TERM@120 --wrap \\
        'exec python reproduce.py table3 --scale paper --cell $SLURM_ARRAY_TASK_ID'
    python reproduce.py table3 --scale paper --cell 3 --dry-run | sed 's/^python/torchrun --nproc-per-node=8/' | bash -e

A cell is one row of a table with one seed: a line of train_cifar.py and lines of eval_attacks.py. What is finished is
skipped, what was interrupted goes on; a cell's output is in output.log in its run directory. Exit status 0; 1 if a cell
failed or has a result of another recipe; 130 or 143 after Ctrl-C, or SIGTERM and --minutes, when all cells have saved.
"""

import contextlib
import csv
import fcntl
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

import checkpoints
import compare
import data
import eval_attacks
import runtime
import train_cifar


class Recipe(NamedTuple):
    """One target at one scale. In flags {data} is --data-dir and {aux} what the row "labeller" leaves."""

    rows: dict  # name: the training's flags that are its own
    train: str  # ... that all rows have
    evaluate: dict  # how the JSON's name ends: the model file and the flags of an evaluation
    runs: str = ""  # folder in runs/, or else TARGET-SCALE; rows of one name and folder are one training
    results: str = ""  # the same in results/
    seeds: tuple = (1,)
    label: tuple = ()  # of the row "labeller": its evaluation's flags, and pseudo_label.py's


def arms(names, **more):
    """{"trades-spat0.1": "--defense trades --spat-alpha 0.1"}, with more[defense] at the end; 0: CE."""
    parts = {name: name.partition("-spat") for name in names.split()}
    return {name: f"--defense {defense}" + f" --spat-alpha {alpha}" * bool(spat) + more.get(defense, "")
            for name, (defense, spat, alpha) in parts.items()}


def alpha_epsilon(epsilons, alphas):
    """Figure 5's rows: {"eps8-alpha0.2": "--defense madry --spat-alpha 0.2 --epsilon 8/255"}."""
    return {f"eps{e.removesuffix('/255')}-alpha{alpha}": f"--defense madry --spat-alpha {alpha} --epsilon {e}"
            for e, alpha in itertools.product(epsilons.split(), alphas.split())}


def semi(labeller, alone, rst):
    """Table 4's rows, by flags; `alone` trains on the labelled images only, rst by TRADES on the labeller's too."""
    rows = arms("trades trades-spat0 trades-spat0.1 mart mart-spat0.1")
    return {"labeller": f"--defense standard {labeller}", alone: f"--defense trades --recipe rst {rst}"} | {
        row.replace("trades", "rst"): f"{flags} --recipe rst {rst} --aux-data {{aux}}" for row, flags in rows.items()}


# Precision and compiling are typed everywhere, so that the cells of a target are comparable.
EXACT, EAGER, FAST = (f"--precision {p} --compile {c}" for p, c in (("fp32", "off"), ("bf16", "off"), ("bf16", "on")))
FIVE = "madry trades trades-spat0.1 mart mart-spat0.3"
SEVEN = "madry madry-spat0.2 trades trades-spat0 trades-spat0.1 mart mart-spat0.3"
OF_100 = dict(madry=" --weight-decay 2e-4", trades=" --weight-decay 2e-4", mart=" --weight-decay 7e-4")
ALL, LS = "--attacks natural fgsm pgd cw --kappas 50 0", "--attacks natural pgd-kl pgd-ls --alphas"
PGD, APGD = "--attacks natural pgd --epsilon", "--attacks natural pgd apgd --num-images 1000"
SIXTEEN = "0 1e-5 5e-5 1e-4 1e-3 1e-2 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1"
RADII, SIX = "4/255 8/255 16/255", "0 0.2 0.4 0.6 0.8 1"
RATE, DECAY = "--lr 0.2 --lr-schedule onecycle", "--weight-decay 5e-4"
TINY = f"--dataset digits --val-size 0 --batch-size 32 --num-steps 3 --step-size 0.025 {EXACT}"
SMALL = f"--batch-size 50 {EXACT}"  # larger batches are slower on a CPU, and the results the same

RECIPES = {
    ("table3", "digits"): Recipe(
        arms(SEVEN), f"--epochs 5 {TINY}", {"": f"last.pt --attacks natural fgsm pgd cw {SMALL}"}),
    # where the smoothing acts: 31 % of a Madry model's training images have p_y > 0.7, found without test images
    ("table3", "confident"): Recipe(
        arms(SEVEN), "--dataset cifar10-first4 --arch wrn-10-1 --epsilon 4/255 --step-size 2/255 --num-steps 3 "
        f"--limit-train 6000 --val-size 0 --epochs 5 --batch-size 64 {RATE} {DECAY} {EXACT}",
        {"": f"last.pt --attacks natural pgd cw --epsilon 4/255 --num-images 2000 {SMALL}"}, seeds=(1, 2, 3, 4, 5)),
    ("table3", "cpu"): Recipe(
        arms(SEVEN), f"--arch wrn-10-2 --epochs 6 {RATE} {DECAY} {FAST}",
        {"": f"last.pt {ALL} {FAST}", "-apgd": f"last.pt {APGD} {EAGER}",
         "-autoattack": f"last.pt --attacks natural pgd autoattack --num-images 256 {EAGER}"}, "table3", "table3"),
    ("table3", "gpu"): Recipe(
        arms("mart mart-spat0.3 trades trades-spat0 trades-spat0.1"), f"--arch resnet-18 --val-size 0 --epochs 12 "
        f"{RATE} {DECAY} {FAST}", {"": f"last.pt {ALL} {FAST}"}, seeds=(1, 2, 3, 4)),
    ("table3", "paper"): Recipe(arms(FIVE), FAST, {"": f"last.pt {ALL} {FAST}", "-best": f"best.pt {ALL} {FAST}"}),
    ("table3-cifar100", "cpu"): Recipe(
        arms("madry trades trades-spat0 trades-spat0.1 mart mart-spat0.2", **OF_100), "--dataset {data}/cifar-100-png "
        f"--arch wrn-10-1 --step-size 4/255 --num-steps 3 --val-size 0 --epochs 3 --batch-size 64 {RATE} {EXACT}",
        {"": f"last.pt --attacks natural fgsm pgd cw {SMALL}"}),
    ("table3-cifar100", "paper"): Recipe(
        arms(FIVE.replace("0.3", "0.2"), **OF_100), f"--dataset cifar100 {FAST}",
        {"": f"last.pt {ALL} {FAST}", "-best": f"best.pt {ALL} {FAST}"}),
    ("table4", "digits"): Recipe(
        semi("--epochs 30", "trades-300", "--epochs 6 --epsilon 0.05"),
        f"--arch wrn-10-1 --limit-train 300 {RATE} {TINY}", {"": f"last.pt {PGD} 0.05 --num-images 200 {SMALL}"},
        label=(f"--attacks natural {SMALL}", "--dataset digits --skip 300")),
    ("table4", "cpu"): Recipe(
        semi(f"--val-size 0 --epochs 20 {DECAY}", "trades-10000", "--epochs 6"),
        f"--arch wrn-16-2 --limit-train 10000 --batch-size 128 {RATE} {FAST}",
        {"": f"last.pt --protocol rst {FAST}"}, "rst", "rst",
        label=(f"--attacks natural {EAGER}", "--dataset cifar10 --skip 10000")),
    ("table4", "paper"): Recipe(
        {row.replace("trades", "rst"): flags for row, flags in arms("trades mart trades-spat0.1 mart-spat0.1").items()},
        f"--recipe rst --aux-data ti_500K_pseudo_labeled.pickle {FAST}", {"": f"last.pt --protocol rst {FAST}"}),
    ("figure4", "digits"): Recipe(arms("standard madry"), f"--epochs 5 {TINY}", {
        "": f"last.pt {LS} 0 0.1 0.5 1 --num-images 200 {SMALL}"}, "table3-digits"),
    ("figure4", "cpu"): Recipe(
        arms("standard madry"), f"--arch wrn-10-2 --epochs 6 {RATE} {DECAY} {FAST}",
        {"": f"last.pt {LS} {SIXTEEN} {FAST}"}, "table3", "attack-strength"),
    ("figure4", "paper"): Recipe(arms("standard madry"), FAST, {"": f"last.pt {LS} {SIXTEEN} {FAST}"}, "table3-paper"),
    ("figure5", "digits"): Recipe(
        alpha_epsilon("0.025 0.05", "0 0.4 1"), f"--random-start uniform --limit-train 600 --epochs 3 {TINY}",
        {"": f"last.pt {PGD} 0.05 --num-images 200 {SMALL}"}),
    ("figure5", "cpu"): Recipe(
        alpha_epsilon(RADII, SIX), "--random-start uniform --arch wrn-10-1 --limit-train 10000 --val-size 0 --epochs 8 "
        f"{RATE} {DECAY} {FAST}", {"": f"last.pt {PGD} 8/255 {EAGER}"}, "figure5", "figure5"),
    ("figure5", "paper"): Recipe(
        alpha_epsilon(RADII, SIX), f"--random-start uniform --arch resnet-50 {FAST}",
        {"": f"last.pt {PGD} 8/255 {FAST}", "-best": f"best.pt {PGD} 8/255 {FAST}"}),
}
TARGETS, SCALES = (list(dict.fromkeys(key[i] for key in RECIPES)) for i in (0, 1))
# (a, b): b minus a is what the paper compares, or tells its parts apart; where a target has both rows
PAIRS = [tuple(pair.split(":")) for pair in (
    "madry:madry-spat0.2 trades:trades-spat0.1 trades:trades-spat0 trades-spat0:trades-spat0.1 mart:mart-spat0.3 "
    "mart:mart-spat0.2 trades-300:rst trades-10000:rst rst:rst-spat0.1 rst:rst-spat0 rst-spat0:rst-spat0.1 "
    "mart:mart-spat0.1").split()]
PAIRS += [(f"eps{e}-alpha0", f"eps{e}-alpha{a}") for e in ("4", "8", "16", "0.025", "0.05") for a in SIX.split()[1:]]
ELSEWHERE = {"results/table3/trades-spat0": "results/table3/trades-spat0-last"}  # the former's JSON is of epoch 5


class Cell(NamedTuple):
    """One row of a target at a scale, with one seed; jobs.py says what its methods are for."""

    target: str
    scale: str
    row: str
    seed: int
    data_dir: str = "data"

    def __str__(self):
        return f"{self.target} {self.scale} {self.row} seed {self.seed}"

    def names(self):  # what the flags are filled in with
        recipe, default = RECIPES[self[:2]], f"{self.target}-{self.scale}"
        s = f"-s{self.seed}" if self.seed != 1 else ""
        runs, results = f"runs/{recipe.runs or default}", f"results/{recipe.results or default}"
        return {"run": f"{runs}/{self.row}{s}", "aux": f"{runs}/pseudo{s}.npz", "result": f"{results}/{self.row}{s}",
                "seed": self.seed, "data": self.data_dir}

    @property
    def run(self):
        return pathlib.Path(self.names()["run"])

    @property
    def log(self):
        return pathlib.Path(self.names()["result"] + ".log.csv")

    @property
    def after(self):
        return self._replace(row="labeller") if self.row != "labeller" else None

    def command(self, script, flags):
        names = self.names()
        return [script, *(flag.format(**names) for flag in flags.split()),
                *(["--data-dir", self.data_dir] if self.data_dir != "data" else [])]

    def training(self):
        recipe = RECIPES[self[:2]]
        flags = f"{recipe.rows[self.row]} {recipe.train} --seed {{seed}} --out-dir {{run}}"
        return self.command("train_cifar.py", flags)

    def evaluations(self):
        recipe, result = RECIPES[self[:2]], self.names()["result"]
        lines = {"": f"last.pt {recipe.label[0]}"} if self.row == "labeller" else recipe.evaluate
        paths = {ELSEWHERE.get(result, result) + f"{end}.json": flags for end, flags in lines.items()}
        return {pathlib.Path(path): self.command("eval_attacks.py", f"--model-path {{run}}/{flags} --json {path}")
                for path, flags in paths.items()}

    def labelling(self):
        line = "--model-path {run}/last.pt --output {aux} "
        return {pathlib.Path(self.names()["aux"]): self.command("pseudo_label.py", line + RECIPES[self[:2]].label[1])
                } if self.row == "labeller" else {}


def cells_of(keys, seeds, data_dir):
    """Seed by seed, so that what is finished is balanced; seeds None: the recipe's and those that results/ holds."""
    cells = []
    for key in keys:
        files = " ".join(path.name for path in Cell(*key, "", 1).log.parent.glob("*.json"))
        there = map(int, re.findall(r"-s(\d+)(?:-[a-z]+)?\.json", files))
        cells += [Cell(*key, row, seed, data_dir) for seed in seeds or {*RECIPES[key].seeds, *there}
                  for row in RECIPES[key].rows]
    return sorted(cells, key=lambda cell: cell.seed)


def report(cells):
    """Print the tables of each target's finished cells, and write results/TARGET-SCALE.json."""
    for key in dict.fromkeys(cell[:2] for cell in cells):
        found, shares, unfinished, differing = {}, {}, [], {}
        for cell in (cell for cell in cells if cell[:2] == key and cell.row != "labeller"):
            missing, words = state(cell)
            if words:
                differing[str(cell)] = "; ".join(words)
            elif missing:
                unfinished.append(str(cell))
            else:
                found.setdefault(cell.row, {})[cell.seed] = outcomes(cell)
                share = [row["share_p_y_above_1_minus_alpha"] for row in log_rows(cell)[-1:]]
                shares.setdefault(cell.row, []).extend(float(value) for value in share if value)
        paper = {row: values for (target, row), values in PAPER.items() if target == key[0]}
        found = {row: found[row] for row in RECIPES[key].rows if row in found}
        summary = compare.summarise(found, PAIRS, paper) | {
            "shares": {row: statistics.fmean(values) for row, values in shares.items() if values},
            "unfinished": unfinished, "of_another_recipe": differing}
        print(f"\n## {key[0]}, {key[1]} scale\n\n{compare.markdown(summary) if found else 'Nothing is finished.'}\n")
        of_few = f"not finished: {len(unfinished)} of its cells\n" if unfinished else ""
        print(of_few + "".join(f"left out: {cell}: {words}\n" for cell, words in differing.items()), end="")
        if found:
            path = pathlib.Path("results", f"{key[0]}-{key[1]}.json")
            checkpoints.write_atomically(path, json.dumps(summary, indent=1).encode())


def parse_args(argv=None):
    parser = runtime.Parser(prog="reproduce.py", description=__doc__)
    add = parser.add_argument
    add("target", nargs="?", choices=[*TARGETS, "all"], metavar="TARGET", help=f"{', '.join(TARGETS)}, or all")
    add("--scale", choices=SCALES, help="digits: a minute a cell, offline; confident: table3 alone, four classes of "
        "CIFAR-10 that the models are sure of; cpu: hours; gpu: one H100, table3 alone; paper: its own. digits has no "
        "table3-cifar100, whose images are not offline")
    add("--seeds", nargs="+", type=runtime.natural_int, metavar="S", help="(default: 1; gpu: 1 to 4; confident: 1 to 5)")
    add("--cell", type=runtime.positive_int, metavar="N", help="the N-th cell alone, from 1: seed by seed, row by row")
    add("--jobs", type=runtime.positive_int, metavar="N", help="cells at once on a CPU, whose cores they share (default: "
        "one a core, at most 4); on GPUs it is one a GPU")
    add("--minutes", type=runtime.positive_float, metavar="M", help="stop after so long, when all cells have saved")
    add("--dry-run", action="store_true", help="print the commands that would be run")
    add("--report", action="store_true", help="run nothing; print the tables, and write results/TARGET-SCALE.json")
    add("--data-dir", default="data", metavar="DIR", help="where CIFAR is, or is downloaded to (default: data)")
    args = parser.parse_args(argv)
    keys = [key for key in RECIPES if args.target in (None, "all", key[0]) and args.scale in (None, key[1])]
    seeds = args.seeds or (None if args.report or not args.target else RECIPES[keys[0]].seeds if keys else ())
    args.cells = cells_of(keys, set(seeds) if seeds else None, args.data_dir)
    for wrong, why in (
        (bool(args.target) != bool(args.scale), "TARGET and --scale go together"),
        (not args.target and (args.report or args.dry_run or args.cell), "--report, --dry-run, --cell need a TARGET"),
        (not keys, f"{args.target} has no scale {args.scale}"),
        (args.report and (args.seeds or args.dry_run or args.cell), "--report takes no --seeds, --dry-run or --cell"),
        (args.jobs and torch.cuda.device_count(), "--jobs: on GPUs it is one process a GPU"),
        (args.cell and args.cell > len(args.cells), f"--cell {args.cell}: there are {len(args.cells)}"),
    ):
        if wrong:
            parser.error(why)
    args.cells = args.cells[args.cell - 1:args.cell] if args.cell else args.cells
    return parser, args


# Table 3 of the paper, WRN-34-10 at ε 8/255: (data set, defense, α) -> Natural, FGSM, PGD-20, CW-inf
TABLE_3 = {
    ("cifar10", "madry", None): (84.39, 59.93, 56.37, 54.14),
    ("cifar10", "trades", None): (85.97, 62.29, 57.32, 54.38),
    ("cifar10", "mart", None): (83.70, 61.93, 58.46, 53.28),
    ("cifar10", "trades", 0.1): (84.60, 61.46, 58.22, 54.97),
    ("cifar10", "mart", 0.3): (81.93, 61.87, 59.59, 51.57),
    ("cifar100", "madry", None): (61.77, 34.42, 31.51, 30.10),
    ("cifar100", "trades", None): (57.13, 32.90, 31.02, 28.07),
    ("cifar100", "mart", None): (58.56, 36.46, 34.12, 30.16),
    ("cifar100", "trades", 0.1): (55.54, 33.35, 31.20, 28.14),
    ("cifar100", "mart", 0.2): (60.28, 36.91, 34.66, 30.93),
}

# All that the paper gives in numbers: (target of reproduce.py, row) -> {attack: accuracy in %}
PAPER = {("table3" + "-cifar100" * (dataset == "cifar100"), defense + (f"-spat{alpha}" if alpha else "")):
         dict(zip(("Natural", "FGSM", "PGD-20", "CW-inf"), values, strict=True))
         for (dataset, defense, alpha), values in TABLE_3.items()} | {
    ("table4", "rst"): {"Natural": 89.65, "PGD-20": 63.00},
    ("table4", "mart"): {"Natural": 89.81, "PGD-20": 63.06},
    ("table4", "rst-spat0.1"): {"Natural": 89.52, "PGD-20": 63.47},
    ("table4", "mart-spat0.1"): {"Natural": 89.44, "PGD-20": 63.37},
    ("figure4", "standard"): {"PGD-20-KL": 47.51, "PGD-20-LS 1e-05": 25.3, "PGD-20-LS 5e-05": 44.16,
                              "PGD-20-LS 0.0001": 51.28, "PGD-20-LS 0.001": 69.23, "PGD-20-LS 0.01": 80.04},  # Table 1
    ("figure4", "madry"): {"PGD-20-KL": 71.58, "PGD-20-LS 0.1": 57.7, "PGD-20-LS 0.2": 62.93, "PGD-20-LS 0.3": 67.7,
                           "PGD-20-LS 0.4": 72.14, "PGD-20-LS 0.5": 75.57},  # Table 2
    ("figure5", "eps8-alpha1"): {"Natural": 32.44, "PGD-20": 0.0},
}


HERE = pathlib.Path(__file__).parent  # of the scripts
TEST_IMAGES = {"digits": 400}  # of CIFAR 10,000


def trained_otherwise(args, cell):
    """In words, in what the arguments of a run differ from the cell's; of those that alter the result."""
    wanted = vars(train_cifar.with_defaults(train_cifar.parse_args(cell.training()[1:])[1]))
    found = vars(train_cifar.with_defaults({"defense": wanted["defense"]})) | args  # a flag may be younger than the run
    for of in (wanted, found):
        of["dataset"] = pathlib.Path(of["dataset"]).name  # --data-dir is free
    return [f"{key} {found[key]}, not {value}" for key, value in wanted.items()
            if key not in train_cifar.FREE_ON_RESUME and found[key] != value]


def evaluated_otherwise(result, command):
    """In words, in what a result of eval_attacks.py differs from what the command would give."""
    args, model = eval_attacks.parse_args(command[1:])[1], result["model"]
    args.epsilon = args.epsilon or data.EPSILON.get(model["dataset"], "8/255")
    wanted = {"n": args.num_images or TEST_IMAGES.get(model["dataset"], 10_000), "precision": args.precision,
              "compile": args.compile}
    found = {row["name"]: row["params"] for row in result["attacks"]}
    words = [f"evaluated with {key} {result.get(key)}, not {value}" for key, value in wanted.items()
             if result.get(key) != value]
    words += [f"no or another {name}" for name, params in eval_attacks.attack_list(args) if found.get(name) != params]
    if args.model_path.endswith("last.pt") and model["epochs"] != model["args"].get("epochs"):
        words.append(f"of epoch {model['epochs']} of {model['args'].get('epochs')}")
    return words


def state(cell):
    """({file: the command that writes it} of what is not there whole, in what the rest differs from the recipe)."""
    missing, differing = {}, []
    for path, command in cell.evaluations().items():
        try:
            result = eval_attacks.read(path)
        except ValueError:  # not there, or damaged
            result = {}
        if result.get("complete"):
            words = trained_otherwise(result["model"].get("args", {}), cell) + evaluated_otherwise(result, command)
            differing += [f"{path}: {', '.join(words)}"] if words else []
        else:
            missing[path] = command
    return missing | {path: command for path, command in cell.labelling().items() if not path.exists()}, differing


def todo(cell):
    """The commands that finish a cell. ValueError if its run directory holds a run of another recipe, or none whole."""
    missing, resume = state(cell)[0], []
    trained = not missing
    if missing and any((cell.run / name).exists() for name in ("last.pt", "last.prev.pt")):
        run, resume = train_cifar.load_run(cell.run), ["--resume"]
        if words := trained_otherwise(run["args"], cell):
            raise ValueError(f"{cell.run} is of another recipe ({', '.join(words)}): move it away")
        trained = len(run["rows"]) == run["args"]["epochs"]  # and not log.csv's: it is written before last.pt
    return ([] if trained else [cell.training() + resume]) + list(missing.values())


def finish(cell):
    """After a cell's last command: its log to results/. ValueError if its results are not what the recipe says."""
    missing, differing = state(cell)
    if missing or differing:
        raise ValueError(f"{', '.join(map(str, missing))} not written" if missing else "; ".join(differing))
    with contextlib.suppress(FileNotFoundError):
        checkpoints.write_atomically(cell.log, (cell.run / "log.csv").read_bytes())


def outcomes(cell):
    """{attack: its entry} of a finished cell, the recipe's attacks alone; of a second model file, with its name."""
    entries, files = {}, []
    for path, command in cell.evaluations().items():
        args, result = eval_attacks.parse_args(command[1:])[1], eval_attacks.read(path)
        args.epsilon = args.epsilon or result["epsilon"]
        names = [name for name, _ in eval_attacks.attack_list(args)]
        files.append(pathlib.Path(args.model_path).name)
        rows = [row for row in result["attacks"] if row["name"] in names]
        if not entries and sum(bool(row["params"]) for row in rows) > 1:
            rows.append(eval_attacks.worst_case(rows))  # of the recipe's attacks: the file may hold more
        for row in rows:
            entries.setdefault(row["name"] + f", {files[-1]}" * (files[-1] != files[0]), row)
    return entries


def log_rows(cell):
    """The rows of a cell's log.csv, or []."""
    path = next((path for path in (cell.log, cell.run / "log.csv") if path.exists()), None)
    return list(csv.DictReader(path.read_text().splitlines())) if path else []


def listing(cells, processes):
    """Print for each target and scale what is finished and what the rest takes, so many processes at a time."""
    print("target            scale    cells   finished   of another recipe   seeds; what the rest takes")
    for key in dict.fromkeys(cell[:2] for cell in cells):
        states = {cell: state(cell) for cell in cells if cell[:2] == key}
        finished = [cell for cell, (missing, differing) in states.items() if not missing and not differing]
        left, differ = (sum(bool(of_cell[i]) for of_cell in states.values()) for i in (0, 1))
        rest = "unknown" if left else "nothing"
        if left and finished:
            results = [eval_attacks.read(path) for cell in finished for path in cell.evaluations()]
            seconds = sum(float(row["seconds"]) for cell in finished for row in log_rows(cell))
            seconds += sum(row["seconds"] for result in results for row in result["attacks"])
            hours = seconds / len(finished) * left / processes / 3600
            rest = f"{hours:.1f} h, {processes} at a time, as fast as the finished ones on {results[0]['device']}"
        seeds = " ".join(map(str, dict.fromkeys(cell.seed for cell in states)))
        print(f"{key[0]:<17} {key[1]:<8} {len(states):>5} {len(finished):>10} {differ:>19}   {seeds}; {rest}")


def job_slots(jobs=None):
    """What a process is to see, as environment variables: one GPU each; or an equal part of the cores."""
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible.split(",")[:count]]
    cores = len(os.sched_getaffinity(0))
    jobs = jobs or min(cores, 4)
    return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))}] * jobs


class Job:
    """A cell's commands, one after the other. What they print goes to the end of output.log in its run directory, and
    they inherit that file's lock, which is held as long as one of them lives, even where the process that started it
    does not. BlockingIOError where it is held."""

    def __init__(self, cell, slot):
        cell.run.mkdir(parents=True, exist_ok=True)
        self.cell, self.slot, self.log = cell, slot, open(cell.run / "output.log", "ab", buffering=0)
        try:
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems have no locks
            pass
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        self.commands = todo(cell)
        self.start()

    def start(self):
        script, *flags = self.commands.pop(0)
        self.log.write(f"$ {shlex.join(['python', script, *flags])}\n".encode())
        self.process = subprocess.Popen(  # in a group of its own: Ctrl-C is not to reach it besides what run() sends
            [sys.executable, HERE / script, *flags], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            env=os.environ | self.slot, process_group=0)

    def next(self, stopped):
        """After a command has ended: whether there is one more, which is started. ValueError if this one failed."""
        code = self.process.returncode
        if code and not (stopped and code in (128 + signal.SIGTERM, -signal.SIGTERM)):
            text = pathlib.Path(self.log.name).read_text(errors="replace").strip()
            last = text.replace("\r", "\n").rsplit("\n", 1)[-1].strip()
            raise ValueError(f"exit status {code}, see {self.log.name}: {last}")
        if code == 0 and not self.commands:
            finish(self.cell)
        if code or stopped or not self.commands:
            return False
        self.start()
        return True


def check_compiler(cells):
    """ValueError if a recipe compiles and torch.compile fails here: train_cifar.py would go on without, to a result
    that is of another recipe."""
    if any("--compile on" in shlex.join(cell.training()) for cell in cells):
        try:
            torch.compile(torch.relu)(torch.zeros(9, requires_grad=True)).sum().backward()
        except Exception as error:  # whatever the toolchain may raise
            raise ValueError(f"this recipe compiles, but torch.compile fails here ({type(error).__name__})") from None


def ended(jobs, stopped, fail):
    """Those of the jobs that are at their end; the others have begun their next command where one has ended."""
    found = []
    for job in jobs:
        try:
            if job.process.poll() is not None and not job.next(stopped):
                found.append(job)
        except (ValueError, OSError) as error:
            fail(job.cell, error)
            found.append(job)
    return found


def run(cells, slots, minutes=None):
    """Finish the cells, as many at once as there are slots, never two with the same `run`; where another process is at
    work, it is waited for. -> ({cell: why it failed}, the signal that stopped it, SIGTERM after so many minutes, or
    None); a stopped cell has saved."""
    check_compiler(cells)
    waiting, jobs, free, failed, stopped, elsewhere = list(cells), [], list(slots), {}, None, set()
    end = time.monotonic() + 60 * minutes if minutes else float("inf")

    def ready(cell):
        at_work = [job.cell for job in jobs]
        return cell.run not in [other.run for other in at_work] and cell.after not in waiting + at_work

    def fail(cell, error):
        failed[cell] = str(error)
        bar.write(f"failed: {cell}", file=sys.stderr)

    bar = tqdm(total=len(cells), unit="cell", dynamic_ncols=True, disable=not cells)
    with bar, runtime.deferred_signals(second=signal.default_int_handler) as received:
        try:
            while waiting or jobs:
                if (received or time.monotonic() > end) and not stopped:
                    stopped, waiting = (received or [signal.SIGTERM])[0], []
                    for job in jobs:
                        job.process.terminate()
                while free and (cell := next(filter(ready, waiting), None)):
                    waiting.remove(cell)
                    try:
                        jobs.append(Job(cell, free[-1]))
                        free.pop()
                    except BlockingIOError:
                        waiting.append(cell)
                        if cell not in elsewhere:
                            bar.write(f"{cell.run}: another process is at work there, waiting for it", file=sys.stderr)
                            elsewhere.add(cell)
                        break
                    except (ValueError, OSError) as error:
                        fail(cell, error)
                        bar.update()
                for job in ended(jobs, stopped, fail):
                    jobs.remove(job)
                    free.append(job.slot)
                    job.log.close()
                    bar.update()
                if (now := ", ".join(str(job.cell) for job in jobs)) != bar.postfix:
                    bar.set_postfix_str(now)
                time.sleep(0.1)
        finally:  # with what a second Ctrl-C leaves
            for job in jobs:
                job.process.kill()
    return failed, stopped


def main(argv=None):
    parser, args = parse_args(argv)
    slots = job_slots(args.jobs)
    if not args.target:
        return listing(args.cells, len(slots))
    states = {cell: state(cell) for cell in args.cells}
    unfinished = [cell for cell, (missing, differing) in states.items() if missing and not differing]
    try:
        if args.dry_run:
            folders = {str(cell.log.parent): ["mkdir", "-p", str(cell.log.parent)] for cell in unfinished}
            lines = [["python", *command] for cell in unfinished for command in todo(cell)]
            return print("\n".join(map(shlex.join, [*folders.values(), *lines])))
        failed, stopped = run([] if args.report else unfinished, slots, args.minutes)
        report([] if args.cell else cells_of({cell[:2]: 0 for cell in args.cells}, None, args.data_dir))  # all seeds
    except (ValueError, OSError) as error:
        parser.error(error)
    failed |= {} if args.report else {cell: "; ".join(words) for cell, (_, words) in states.items() if words}
    for cell, why in failed.items():
        print(f"failed: {cell}: {why}", file=sys.stderr)
    sys.exit(128 + stopped if stopped else 1 if failed else 0)


if __name__ == "__main__":
    main()
