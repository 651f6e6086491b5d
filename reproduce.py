"""Run every table and figure of the paper from one command, at five scales.

    python reproduce.py                                        what there is, what is finished, what the rest would take
    python reproduce.py table3 --scale digits --seeds 1 2 3    trains, evaluates and reports; again: goes on
    python reproduce.py table3 --scale paper --dry-run         the commands that it would run, one a line
    python reproduce.py figure5 --scale cpu --report           runs nothing; the tables of what is finished
    python reproduce.py table3 --scale paper --cell 3          one cell, for the array job of a scheduler, or on 8 GPUs:
    sbatch --array=1-5 --gres=gpu:1 --signal=B:TERM@120 --wrap \\
        'exec python reproduce.py table3 --scale paper --cell $SLURM_ARRAY_TASK_ID'
    python reproduce.py table3 --scale paper --cell 3 --dry-run | sed 's/^python/torchrun --nproc-per-node=8/' | bash -e

A cell is one row of a table with one seed: a line of train_cifar.py and lines of eval_attacks.py, whose output is in
output.log in its run directory. What is finished is skipped, what was interrupted goes on. Exit status: 0; 1 if a cell
failed or has results of another recipe or of two models; 130 after Ctrl-C and 143 after SIGTERM or --minutes, when all
cells have saved.
"""

import csv
import json
import math
import os
import pathlib
import re
import shlex
import signal
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

try:
    import fcntl
except ImportError:  # Windows, where nothing stops a second process from working on the same cell
    fcntl = None


class Recipe(NamedTuple):
    """One target at one scale. In its flags {data} stands for --data-dir, and {aux} for the file of pseudo-labels."""

    rows: list  # the names of the rows, which say how each is trained: see row_flags
    train: str  # the flags of all trainings
    evaluate: dict  # {how the JSON's name ends: the model file and the flags of its evaluation}
    runs: str = ""  # the folder in runs/ (default: TARGET-SCALE); rows of one name in one folder are one training
    results: str = ""  # the folder in results/ (the same default)
    own: dict = {}  # {first word of a row's name: more flags of its training}
    seeds: tuple = (1,)
    label: str = ""  # the flags of pseudo_label.py after the row "labeller", which makes {aux}
    evaluate_labeller: str = ""


# Precision and compiling are typed everywhere, so that the cells of a target are comparable.
EXACT, EAGER, FAST = "--precision fp32 --compile off", "--precision bf16 --compile off", "--precision bf16 --compile on"
SMALL = f"--batch-size 50 {EXACT}"  # larger batches are slower on a CPU, and the results the same
DIGITS = f"--dataset digits --val-size 0 --batch-size 32 --num-steps 3 --step-size 0.025 {EXACT}"
RATE = "--lr 0.2 --lr-schedule onecycle"
RATE_DECAY = f"{RATE} --weight-decay 5e-4"
DIGITS_5, WRN_10_2 = f"--epochs 5 {DIGITS}", f"--arch wrn-10-2 --epochs 6 {RATE_DECAY} {FAST}"
ALL = "--attacks natural fgsm pgd cw"
TWO_CW = f"{ALL} --kappas 50 0"
PGD_8 = "--attacks natural pgd --epsilon 8/255"
LS = "--attacks natural pgd-kl pgd-ls --alphas"
SIXTEEN = "0 1e-5 5e-5 1e-4 1e-3 1e-2 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 1"
LAST = {"": f"last.pt {ALL} {SMALL}"}
LAST_AND_BEST = {"": f"last.pt {TWO_CW} {FAST}", "-best": f"best.pt {TWO_CW} {FAST}"}
DIGITS_PGD = {"": f"last.pt --attacks natural pgd --epsilon 0.05 --num-images 200 {SMALL}"}
RST_PGD = {"": f"last.pt --protocol rst {FAST}"}
# each method without and with SPAT; trades-spat0 has CE for KL in the attack, and no smoothing
TABLE_3 = ["madry", "madry-spat0.2", "trades", "trades-spat0", "trades-spat0.1", "mart", "mart-spat0.3"]
TABLE_3_CIFAR100 = ["madry", "trades", "trades-spat0", "trades-spat0.1", "mart", "mart-spat0.2"]
FAT = [f"{method}{stop}" for method in ("madry", "madry-spat0.2", "mart", "mart-spat0.3")
       for stop in ("", "-stop0", "-stop1")]
RST = ["rst", "rst-spat0", "rst-spat0.1", "mart", "mart-spat0.1"]
RST_FLAGS = "--recipe rst --epochs 6"
RST_AUX = f"{RST_FLAGS} --aux-data {{aux}}"
FIGURE_4 = ["standard", "madry"]
FIGURE_5 = [f"eps{epsilon}-alpha{alpha}" for epsilon in (4, 8, 16) for alpha in ("0", "0.2", "0.4", "0.6", "0.8", "1")]

RECIPES = {
    ("table3", "digits"): Recipe(TABLE_3, DIGITS_5, LAST),
    # where the smoothing acts: 31 % of a Madry model's training images have p_y > 0.7, found without test images
    ("table3", "confident"): Recipe(
        TABLE_3, "--dataset cifar10-first4 --arch wrn-10-1 --epsilon 4/255 --step-size 2/255 --num-steps 3 "
        f"--limit-train 6000 --val-size 0 --epochs 5 --batch-size 64 {RATE_DECAY} {EXACT}",
        {"": f"last.pt --attacks natural pgd cw --epsilon 4/255 --num-images 2000 {SMALL}"}, seeds=(1, 2, 3, 4, 5)),
    ("table3", "cpu"): Recipe(
        TABLE_3, WRN_10_2,
        {"": f"last.pt {TWO_CW} {FAST}", "-apgd": f"last.pt --attacks natural pgd apgd --num-images 1000 {EAGER}",
         "-autoattack": f"last.pt --attacks natural pgd autoattack --num-images 256 {EAGER}"},
        runs="table3", results="table3"),
    ("table3", "gpu"): Recipe(  # as it was run on an H100; its evaluation takes seconds, and compiling 40
        TABLE_3, f"--arch resnet-18 --val-size 0 --epochs 8 {RATE_DECAY} --precision bf16 --compile graphs",
        {"": f"last.pt {ALL} --batch-size 1000 {EAGER}"}),
    ("table3", "paper"): Recipe(["madry", "trades", "trades-spat0.1", "mart", "mart-spat0.3"], FAST, LAST_AND_BEST),
    # do SPAT and FAT's early-stopped attack add up? fixed before the first run: ten seeds, the worst case counts
    ("fat", "digits"): Recipe(FAT, DIGITS_5, LAST, seeds=tuple(range(1, 11))),
    ("table3-cifar100", "cpu"): Recipe(
        TABLE_3_CIFAR100, "--dataset {data}/cifar-100-png --arch wrn-10-1 --step-size 4/255 --num-steps 3 --val-size 0 "
        f"--epochs 3 --batch-size 64 {RATE} {EXACT}", LAST,
        own={"madry": "--weight-decay 2e-4", "trades": "--weight-decay 2e-4", "mart": "--weight-decay 7e-4"}),
    ("table3-cifar100", "paper"): Recipe(
        ["madry", "trades", "trades-spat0.1", "mart", "mart-spat0.2"], f"--dataset cifar100 {FAST}", LAST_AND_BEST),
    # trades-300 and trades-10000 train on the labelled images alone
    ("table4", "digits"): Recipe(
        ["labeller", "trades-300", *RST], f"--arch wrn-10-1 --limit-train 300 {RATE} {DIGITS}", DIGITS_PGD,
        own={"labeller": "--epochs 30", "trades": f"{RST_FLAGS} --epsilon 0.05", "rst": f"{RST_AUX} --epsilon 0.05",
             "mart": f"{RST_AUX} --epsilon 0.05"},
        label="--dataset digits --skip 300", evaluate_labeller=f"last.pt --attacks natural {SMALL}"),
    ("table4", "cpu"): Recipe(
        ["labeller", "trades-10000", *RST], f"--arch wrn-16-2 --limit-train 10000 --batch-size 128 {RATE} {FAST}",
        RST_PGD, runs="rst", results="rst",
        own={"labeller": "--val-size 0 --epochs 20 --weight-decay 5e-4", "trades": RST_FLAGS, "rst": RST_AUX,
             "mart": RST_AUX},
        label="--dataset cifar10 --skip 10000", evaluate_labeller=f"last.pt --attacks natural {EAGER}"),
    ("table4", "paper"): Recipe(
        ["rst", "mart", "rst-spat0.1", "mart-spat0.1"],
        f"--recipe rst --aux-data ti_500K_pseudo_labeled.pickle {FAST}", RST_PGD),
    ("figure4", "digits"): Recipe(
        FIGURE_4, DIGITS_5, {"": f"last.pt {LS} 0 0.1 0.5 1 --num-images 200 {SMALL}"}, runs="table3-digits"),
    ("figure4", "cpu"): Recipe(
        FIGURE_4, WRN_10_2, {"": f"last.pt {LS} {SIXTEEN} {FAST}"}, runs="table3", results="attack-strength"),
    ("figure4", "paper"): Recipe(FIGURE_4, FAST, {"": f"last.pt {LS} {SIXTEEN} {FAST}"}, runs="table3-paper"),
    ("figure5", "digits"): Recipe(
        [f"eps{epsilon}-alpha{alpha}" for epsilon in ("0.025", "0.05") for alpha in ("0", "0.4", "1")],
        f"--random-start uniform --limit-train 600 --epochs 3 {DIGITS}", DIGITS_PGD),
    ("figure5", "cpu"): Recipe(
        FIGURE_5, "--random-start uniform --arch wrn-10-1 --limit-train 10000 --val-size 0 --epochs 8 "
        f"{RATE_DECAY} {FAST}", {"": f"last.pt {PGD_8} {EAGER}"}, runs="figure5", results="figure5"),
    ("figure5", "paper"): Recipe(
        FIGURE_5, f"--random-start uniform --arch resnet-50 {FAST}",
        {"": f"last.pt {PGD_8} {FAST}", "-best": f"best.pt {PGD_8} {FAST}"}),
}
TARGETS = list(dict.fromkeys(target for target, _ in RECIPES))
SCALES = list(dict.fromkeys(scale for _, scale in RECIPES))
# (a, b): b minus a is what the paper compares, or tells its parts apart; where a target has both rows
PAIRS = [("madry", "madry-spat0.2"), ("trades", "trades-spat0.1"), ("trades", "trades-spat0"),
         ("trades-spat0", "trades-spat0.1"), ("mart", "mart-spat0.3"), ("mart", "mart-spat0.2"), ("trades-300", "rst"),
         ("trades-10000", "rst"), ("rst", "rst-spat0.1"), ("rst", "rst-spat0"), ("rst-spat0", "rst-spat0.1"),
         ("mart", "mart-spat0.1"), ("madry", "madry-stop0"), ("madry", "madry-stop1"), ("mart", "mart-stop0"),
         ("mart", "mart-stop1"), ("madry-stop0", "madry-spat0.2-stop0"), ("madry-stop1", "madry-spat0.2-stop1"),
         ("mart-stop0", "mart-spat0.3-stop0"), ("mart-stop1", "mart-spat0.3-stop1")]
PAIRS += [(f"eps{epsilon}-alpha0", f"eps{epsilon}-alpha{alpha}")
          for epsilon in ("4", "8", "16", "0.025", "0.05") for alpha in ("0.2", "0.4", "0.6", "0.8", "1")]
DEFENSES = {"rst": "trades", "labeller": "standard"}  # of rows that are not named after theirs
HERE = pathlib.Path(__file__).parent  # of the scripts


def main(argv=None):
    parser, args = parse_args(argv)
    slots = job_slots(args.jobs)
    if not args.target:
        return listing(args, len(slots))
    states = {cell: missing_and_differing(cell) for cell in args.cells}
    unfinished = [cell for cell, (missing, differing) in states.items() if missing and not differing]
    failed, stopped = {}, None
    try:
        if args.dry_run:
            lines = [["mkdir", "-p", folder] for folder in dict.fromkeys(str(cell.log.parent) for cell in unfinished)]
            lines += [["python", *command] for cell in unfinished for command in commands_left(cell)]
            return print("\n".join(map(shlex.join, lines)))
        if not args.report:
            failed, stopped = run(unfinished, slots, args.minutes)
            failed |= {cell: "; ".join(differing) for cell, (_, differing) in states.items() if differing}
        report(args, ran=[cell for cell in unfinished if not missing_and_differing(cell)[0]])
    except (ValueError, OSError) as error:
        parser.error(error)
    for cell, why in failed.items():
        print(f"failed: {cell}: {why}", file=sys.stderr)
    if stopped:
        sys.exit(128 + stopped)
    sys.exit(1 if failed else 0)


def parse_args(argv=None):
    """Return the parser and the arguments, with .keys, the chosen keys of RECIPES, and .cells, their chosen cells."""
    parser = runtime.Parser(prog="reproduce.py", description=__doc__)
    add = parser.add_argument
    add("target", nargs="?", choices=[*TARGETS, "all"], metavar="TARGET", help=f"{', '.join(TARGETS)}, or all")
    add("--scale", choices=SCALES, help="digits: a minute a cell, offline, without table3-cifar100; confident: four "
        "classes that the models are sure of, table3 alone; cpu: hours; gpu: one H100, table3 alone; paper: its own")
    add("--seeds", nargs="+", type=runtime.natural_int, metavar="S", help="default: 1; fat: 1 to 10; confident: 1 to 5")
    add("--cell", type=runtime.positive_int, metavar="N", help="the N-th cell alone, from 1: seed by seed, row by row "
        "(table4's labeller first)")
    add("--jobs", type=runtime.positive_int, metavar="N", help="cells at once on a CPU (default: one a core, up to 4)")
    add("--minutes", type=runtime.positive_float, metavar="M", help="stop after so long, when all cells have saved")
    add("--dry-run", action="store_true", help="print the commands that would be run")
    add("--report", action="store_true", help="run nothing; print the tables, and write TARGET-SCALE.json")
    add("--results-dir", default="results", metavar="DIR", help="where results are looked for and written: another "
        "folder keeps yours apart from those that came with the repository (default: results)")
    add("--data-dir", default="data", metavar="DIR", help="where CIFAR is, or is downloaded to (default: data)")
    args = parser.parse_args(argv)
    args.keys = [key for key in RECIPES if args.target in (None, "all", key[0]) and args.scale in (None, key[1])]
    args.folders = args.data_dir, args.results_dir
    args.cells = []
    if args.keys and args.target and not args.report:
        for key in args.keys:
            args.cells += cells_of([key], args.seeds or RECIPES[key].seeds, *args.folders)
        args.cells.sort(key=lambda cell: cell.seed)
    for wrong, why in (
        (bool(args.target) != bool(args.scale), "TARGET and --scale go together"),
        (not args.target and (args.report or args.dry_run or args.cell), "--report, --dry-run, --cell need a TARGET"),
        (not args.keys, f"{args.target} has no scale {args.scale}"),
        (args.report and (args.seeds or args.dry_run or args.cell), "--report takes no --seeds, --dry-run or --cell"),
        (args.jobs and torch.cuda.device_count(), "--jobs: on GPUs it is one process a GPU"),
        (args.cell and args.cell > len(args.cells), f"--cell {args.cell}: there are {len(args.cells)}"),
    ):
        if wrong:
            parser.error(why)
    if args.cell:
        args.cells = [args.cells[args.cell - 1]]
    return parser, args


def run(cells, slots, minutes=None):
    """Finish the cells, one in each slot at a time. Cells with one run directory take turns; one at which another
    process works is tried again later. Return ({cell: why it failed}, the signal that stopped it or None), which is
    SIGTERM after so many minutes. A stopped cell has saved."""
    waiting, free, at_work, failed, told = list(cells), list(slots), {}, {}, set()  # at_work: {cell: (slot, its work)}
    end = time.monotonic() + 60 * minutes if minutes else math.inf
    bar = tqdm(total=len(cells), unit="cell", dynamic_ncols=True, disable=not cells)
    with bar, runtime.deferred_signals(second=signal.default_int_handler) as stopped:
        try:
            while at_work or (waiting and not stopped):
                for cell in list(waiting):
                    runs, unfinished = [other.run for other in at_work], [*waiting, *at_work]
                    if free and not stopped and cell.run not in runs and cell.after not in unfinished:
                        waiting.remove(cell)
                        slot = free.pop(0)
                        at_work[cell] = slot, finish(cell, slot, stopped)
                        bar.set_postfix_str(", ".join(map(str, at_work)))
                for cell, (slot, work) in list(at_work.items()):
                    try:
                        next(work)
                        continue
                    except BlockingIOError:
                        if cell not in told:
                            bar.write(f"{cell.run}: another process is at work there, waiting for it", file=sys.stderr)
                        told.add(cell)
                        waiting.append(cell)
                    except StopIteration:  # it is finished, or was stopped
                        bar.update()
                    except Exception as error:  # whatever it is, the other cells go on
                        failed[cell] = str(error) or type(error).__name__
                        bar.write(f"failed: {cell}", file=sys.stderr)
                        bar.update()
                    del at_work[cell]
                    free.append(slot)
                if time.monotonic() > end and not stopped:
                    stopped.append(signal.SIGTERM)
                time.sleep(0.1)
        finally:  # a second Ctrl-C: kill what is left
            for _, work in at_work.values():
                work.close()
    return failed, stopped[0] if stopped else None


def finish(cell, slot, stopped):
    """Run the commands that finish a cell, one after the other: a generator that yields while one runs. What they print
    goes to the end of output.log in the run directory. slot: environment variables. stopped: a list; once it is filled,
    the command is told to end and no other one starts. Raise BlockingIOError where another process is at work, and
    ValueError if a command fails or leaves a result that is not the recipe's."""
    cell.run.mkdir(parents=True, exist_ok=True)
    with open(cell.run / "output.log", "ab", buffering=0) as log:
        try:  # The commands inherit this lock (filelock's they would not): it lasts as long as one of them lives.
            if fcntl:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):  # and not a network file system without locks
                raise
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        for script, *flags in commands_left(cell):
            if stopped:
                return
            log.write(f"$ {shlex.join(['python', script, *flags])}\n".encode())
            process = subprocess.Popen(  # in a group of its own, so that Ctrl-C does not reach it besides terminate()
                [sys.executable, HERE / script, *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=os.environ | slot, process_group=0)
            try:
                while process.poll() is None and not stopped:
                    yield
                if stopped:
                    process.terminate()
                while process.poll() is None:  # it saves
                    yield
            finally:
                process.kill()
            if stopped and process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM):
                return
            if process.returncode:
                last = pathlib.Path(log.name).read_text(errors="replace").strip().splitlines()[-1]
                raise ValueError(f"exit status {process.returncode}, see {log.name}: {last.strip()}")
        missing, differing = missing_and_differing(cell)
        if missing or differing:
            raise ValueError("; ".join([f"{path} was not written" for path in missing] + differing))
        if (cell.run / "log.csv").exists():
            checkpoints.write_atomically(cell.log, (cell.run / "log.csv").read_bytes())


def job_slots(jobs=None):
    """Return the environment variables of each process that may run at once: one GPU, or an equal part of the cores."""
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible.split(",")[:count]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS, Windows
    jobs = jobs or min(cores, 4)
    return [{"OMP_NUM_THREADS": str(max(1, cores // jobs))}] * jobs


def row_flags(row):
    """Return the flags of train_cifar.py that a row's name stands for, such as mart-spat0.3-stop1 or eps8-alpha0.4."""
    if row.startswith("eps"):
        epsilon, alpha = row.removeprefix("eps").split("-alpha")
        if "." not in epsilon:
            epsilon += "/255"
        return f"--defense madry --spat-alpha {alpha} --epsilon {epsilon}"
    method, *parts = row.split("-")
    flags = f"--defense {DEFENSES.get(method, method)}"
    for part in parts:
        if part.startswith("spat"):
            flags += f" --spat-alpha {part.removeprefix('spat')}"
        if part.startswith("stop"):
            flags += f" --early-stop {part.removeprefix('stop')}"
    return flags


class Cell(NamedTuple):
    """One row of a recipe with one seed."""

    target: str
    scale: str
    row: str
    seed: int
    data_dir: str = "data"
    results_dir: str = "results"

    def __str__(self):
        return f"{self.target} {self.scale} {self.row} seed {self.seed}"

    def path(self, folder, name, end=""):
        """Return where a file of the cell is; folder: "runs" or that of the results."""
        of_recipe = self.recipe.runs if folder == "runs" else self.recipe.results
        if self.seed != 1:
            name += f"-s{self.seed}"
        return pathlib.Path(folder, of_recipe or f"{self.target}-{self.scale}", name + end)

    recipe = property(lambda self: RECIPES[self.target, self.scale])
    run = property(lambda self: self.path("runs", self.row))
    log = property(lambda self: self.path(self.results_dir, self.row, ".log.csv"))
    labels = property(lambda self: self.path("runs", "labeller") / "pseudo.npz")  # by that row's model, beside it
    own_flags = property(lambda self: f"{row_flags(self.row)} {self.recipe.own.get(self.row.split('-')[0], '')}")
    after = property(lambda self: self._replace(row="labeller") if "{aux}" in self.own_flags else None)  # that cell

    def command(self, script, flags):
        words = [script, *(flag.format(data=self.data_dir, aux=self.labels) for flag in flags.split())]
        return words if self.data_dir == "data" else [*words, "--data-dir", self.data_dir]

    def training(self):
        flags = f"{self.own_flags} {self.recipe.train} --seed {self.seed} --out-dir {self.run}"
        return self.command("train_cifar.py", flags)

    def evaluations(self):
        """Return {JSON: the command that writes it}, whose third word is the model file."""
        evaluate = {"": self.recipe.evaluate_labeller} if self.row == "labeller" else self.recipe.evaluate
        commands = {}
        for end, flags in evaluate.items():
            path = self.path(self.results_dir, self.row, f"{end}.json")
            words = self.command("eval_attacks.py", f"--model-path {self.run}/{flags}")
            commands[path] = [*words, "--json", str(path)]  # a word of its own: the folder may have a space
        return commands


def cells_of(keys, seeds, data_dir="data", results_dir="results"):
    """Return the cells of these recipes seed by seed, so that what is finished is balanced. seeds None: the recipe's,
    and those of which the folder of results holds a file."""
    cells = []
    for key in keys:
        files = Cell(*key, "", 1, data_dir, results_dir).log.parent.glob("*.json")
        found = [int(seed) for path in files for seed in re.findall(r"-s(\d+)(?:-[a-z]+)?\.json", path.name)]
        for seed in set(seeds or [*RECIPES[key].seeds, *found]):
            cells += [Cell(*key, row, seed, data_dir, results_dir) for row in RECIPES[key].rows]
    return sorted(cells, key=lambda cell: cell.seed)


def missing_and_differing(cell):
    """Compare a cell's files with its recipe: return ({file: the command that writes it} for those that are missing or
    incomplete, a list of texts that say where the others are of another recipe or of a second model)."""
    missing, differing, models = {}, [], {}  # models: {model file: (its sha256, the JSON that states it)}
    for path, command in cell.evaluations().items():
        try:
            result = eval_attacks.read(path)
        except ValueError:  # not there, or damaged
            result = {}
        if not result.get("complete"):
            missing[path] = command
            continue
        words = trained_otherwise(result["model"].get("args", {}), cell) + evaluated_otherwise(result, command)
        sha256 = result["model"].get("sha256", "unknown")
        first, stated_by = models.setdefault(command[2], (sha256, path))
        if sha256 != first:
            words.append(f"mixed, of another model than {stated_by}")
        if words:
            differing.append(f"{path}: {', '.join(words)}")
    if cell.row == "labeller" and not cell.labels.exists():
        rows = [cell._replace(row=row) for row in cell.recipe.rows]
        if any(missing_and_differing(row)[0] for row in rows if row.after == cell):  # else nothing needs the labels
            flags = f"--model-path {cell.run}/last.pt --output {{aux}} {cell.recipe.label}"
            missing[cell.labels] = cell.command("pseudo_label.py", flags)
    return missing, differing


def trained_otherwise(args, cell):
    """Return a text for each argument of a run that is not the cell's and alters the result."""
    wanted = vars(train_cifar.with_defaults(train_cifar.parse_args(cell.training()[1:])[1]))
    found = vars(train_cifar.with_defaults({"defense": wanted["defense"]})) | args  # a flag may be younger than the run
    for each in (wanted, found):
        each["dataset"] = pathlib.Path(each["dataset"]).name  # --data-dir is free
        each["aux_data"] = bool(each["aux_data"])  # as is where it lies
    return [f"{key} {found[key]}, not {value}" for key, value in wanted.items()
            if train_cifar.alters(key, value, found[key])]


def evaluated_otherwise(result, command):
    """Return a text for each way in which a result of eval_attacks.py is not what the command would give."""
    args, model = eval_attacks.parse_args(command[1:])[1], result["model"]
    args.epsilon = args.epsilon or data.default_epsilon(model["dataset"])
    test_images = 400 if model["dataset"] == "digits" else 10_000
    wanted = {"n": args.num_images or test_images, "precision": args.precision, "compile": args.compile}
    found = {row["name"]: eval_attacks.settings(row) for row in result["attacks"]}
    words = [f"evaluated with {key} {result.get(key)}, not {value}" for key, value in wanted.items()
             if result.get(key) != value]
    words += [f"no or another {attack.name}" for attack in eval_attacks.attack_list(args)
              if found.get(attack.name) != eval_attacks.settings({"params": attack.params})]
    if args.model_path.endswith("last.pt") and model["epochs"] != model["args"].get("epochs"):
        words.append(f"of epoch {model['epochs']} of {model['args'].get('epochs')}")
    return words


def commands_left(cell):
    """Return the commands that finish a cell. Raise ValueError if its run directory holds a run of another recipe, a
    damaged one, or not the model of the results that are there."""
    missing, _ = missing_and_differing(cell)
    if not missing:
        return []
    for path in cell.evaluations().keys() - missing.keys():
        if not has_model(cell, path):
            raise ValueError(f"{path} is of a model that is not in {cell.run}: move it away, or use --results-dir")
    if not any((cell.run / name).exists() for name in ("last.pt", "last.prev.pt")):
        return [cell.training(), *missing.values()]
    found = checkpoints.load_run(cell.run)
    if words := trained_otherwise(found["args"], cell):
        raise ValueError(f"{cell.run} is of another recipe ({', '.join(words)}): move it away")
    if len(found["rows"]) < found["args"]["epochs"]:  # and not log.csv's: it is written before last.pt
        return [cell.training() + ["--resume"], *missing.values()]
    return list(missing.values())


def has_model(cell, path):
    """Return whether a cell's run directory holds the model whose result lies at path."""
    model = cell.evaluations()[path][2]
    return os.path.exists(model) and checkpoints.sha256(model) == eval_attacks.read(path)["model"].get("sha256")


def entries_of(cell):
    """Return {attack: its entry in the JSON} of a finished cell, for the recipe's attacks and their worst case; attacks
    on best.pt say so in their name."""
    entries = {}
    for path, command in cell.evaluations().items():
        args, result = eval_attacks.parse_args(command[1:])[1], eval_attacks.read(path)
        args.epsilon = args.epsilon or result["epsilon"]
        names = [name for name, _ in eval_attacks.attack_list(args)]
        by_name = {row["name"]: row for row in result["attacks"]}
        rows = [by_name[name] for name in names]  # in the recipe's order, which the table's head has
        if not entries and sum(bool(row["params"]) for row in rows) > 1:
            rows.append(eval_attacks.worst_case(rows))  # of the recipe's attacks: the file may hold more
        of = ", best.pt" if args.model_path.endswith("best.pt") else ""
        for row in rows:
            entries.setdefault(row["name"] + of, row)
    return entries


def log_rows(cell):
    return list(csv.DictReader(cell.log.read_text().splitlines())) if cell.log.exists() else []


def report(args, ran):
    """Print how many cells were run now (ran), and how many before; unless it is one --cell, print all tables."""
    cells = args.cells if args.cell else cells_of(args.keys, None, *args.folders)
    before = [cell for cell in cells if cell not in ran and not any(missing_and_differing(cell))]
    here = [cell for cell in before if all(has_model(cell, path) for path in cell.evaluations())]
    now = f"Cells run now: {len(ran)}" if ran else "Nothing was run"
    print(f"{now}; before: {len(here)}; came with the repository, or from elsewhere: {len(before) - len(here)}")
    if not args.cell:
        for key in args.keys:
            print_tables(key, args.folders)


def print_tables(key, folders):
    """Print the tables of a target at a scale, and write TARGET-SCALE.json."""
    found, shares, unfinished, differing, hashes = {}, {}, [], {}, {}
    for cell in cells_of([key], None, *folders):
        if cell.row == "labeller":
            continue
        missing, words = missing_and_differing(cell)
        of_cell = {}
        for result in [] if missing or words else map(eval_attacks.read, cell.evaluations()):
            of_cell["images", result["n"]] = result.get("images")
            of_cell["pseudo-labels", cell.seed] = (result["model"].get("trained_on") or {}).get("--aux-data")
        of_cell = {what: found for what, found in of_cell.items() if found}  # older results have no such hash
        words += [f"of other {what[0]} than the cells before" for what in of_cell
                  if of_cell[what] != hashes.get(what, of_cell[what])]
        if words:
            differing[str(cell)] = "; ".join(words)
        elif missing:
            unfinished.append(str(cell))
        else:
            hashes |= of_cell
            found.setdefault(cell.row, {})[cell.seed] = entries_of(cell)
            share = [row["share_p_y_above_1_minus_alpha"] for row in log_rows(cell)][-1:]
            shares.setdefault(cell.row, []).extend(float(last) for last in share if last)
    print("\n## {}, {} scale\n".format(*key))
    if found:
        found = {row: found[row] for row in RECIPES[key].rows if row in found}
        paper = {row: values for (target, row), values in PAPER.items() if target == key[0]}
        if key[1] in ("digits", "confident"):  # another task than the paper's
            paper = {}
        summary = compare.summarise(found, PAIRS, paper) | {
            "shares": {row: sum(values) / len(values) for row, values in shares.items() if values},
            "unfinished": unfinished, "of_another_recipe": differing}
        path = pathlib.Path(folders[1], f"{'-'.join(key)}.json")
        checkpoints.write_atomically(path, json.dumps(summary, indent=1).encode())
    print(f"{compare.markdown(summary) if found else 'Nothing is finished.'}\n")
    if unfinished:
        print(f"not finished: {len(unfinished)} of its cells")
    for cell, words in differing.items():
        print(f"left out: {cell}: {words}")


def listing(args, processes):
    """Print for each target and scale what is finished and what the rest takes, so many processes at a time."""
    print("target            scale    cells   finished   of another recipe   seeds; what the rest takes")
    for target, scale in args.keys:
        states = {cell: missing_and_differing(cell) for cell in cells_of([(target, scale)], args.seeds, *args.folders)}
        finished = [cell for cell, state in states.items() if not any(state)]
        left = sum(bool(missing) for missing, _ in states.values())
        differ = sum(bool(differing) for _, differing in states.values())
        rest = "unknown" if left else "nothing"
        if left and finished:
            results = [eval_attacks.read(path) for cell in finished for path in cell.evaluations()]
            rows = [row for cell in finished for row in log_rows(cell)]
            rows += [row for result in results for row in result["attacks"]]
            hours = sum(float(row["seconds"]) for row in rows) / len(finished) * left / processes / 3600
            rest = f"{hours:.1f} h, {processes} at a time, as fast as the finished ones on {results[0]['device']}"
        seeds = " ".join(map(str, dict.fromkeys(cell.seed for cell in states)))
        print(f"{target:<17} {scale:<8} {len(states):>5} {len(finished):>10} {differ:>19}   {seeds}; {rest}")


# All that the paper gives in numbers: {(target, row): {attack: accuracy in %}}. Table 3 is WRN-34-10 at ε 8/255.
PAPER = {
    ("table3", "madry"): {"Natural": 84.39, "FGSM": 59.93, "PGD-20": 56.37, "CW-inf": 54.14},
    ("table3", "trades"): {"Natural": 85.97, "FGSM": 62.29, "PGD-20": 57.32, "CW-inf": 54.38},
    ("table3", "mart"): {"Natural": 83.70, "FGSM": 61.93, "PGD-20": 58.46, "CW-inf": 53.28},
    ("table3", "trades-spat0.1"): {"Natural": 84.60, "FGSM": 61.46, "PGD-20": 58.22, "CW-inf": 54.97},
    ("table3", "mart-spat0.3"): {"Natural": 81.93, "FGSM": 61.87, "PGD-20": 59.59, "CW-inf": 51.57},
    ("table3-cifar100", "madry"): {"Natural": 61.77, "FGSM": 34.42, "PGD-20": 31.51, "CW-inf": 30.10},
    ("table3-cifar100", "trades"): {"Natural": 57.13, "FGSM": 32.90, "PGD-20": 31.02, "CW-inf": 28.07},
    ("table3-cifar100", "mart"): {"Natural": 58.56, "FGSM": 36.46, "PGD-20": 34.12, "CW-inf": 30.16},
    ("table3-cifar100", "trades-spat0.1"): {"Natural": 55.54, "FGSM": 33.35, "PGD-20": 31.20, "CW-inf": 28.14},
    ("table3-cifar100", "mart-spat0.2"): {"Natural": 60.28, "FGSM": 36.91, "PGD-20": 34.66, "CW-inf": 30.93},
    ("table4", "rst"): {"Natural": 89.65, "PGD-20": 63.00}, ("table4", "mart"): {"Natural": 89.81, "PGD-20": 63.06},
    ("table4", "rst-spat0.1"): {"Natural": 89.52, "PGD-20": 63.47},
    ("table4", "mart-spat0.1"): {"Natural": 89.44, "PGD-20": 63.37},
    ("figure4", "standard"): {"PGD-20-KL": 47.51, "PGD-20-LS 1e-05": 25.3, "PGD-20-LS 5e-05": 44.16,
                              "PGD-20-LS 0.0001": 51.28, "PGD-20-LS 0.001": 69.23, "PGD-20-LS 0.01": 80.04},  # Table 1
    ("figure4", "madry"): {"PGD-20-KL": 71.58, "PGD-20-LS 0.1": 57.7, "PGD-20-LS 0.2": 62.93, "PGD-20-LS 0.3": 67.7,
                           "PGD-20-LS 0.4": 72.14, "PGD-20-LS 0.5": 75.57},  # Table 2
    ("figure5", "eps8-alpha1"): {"Natural": 32.44, "PGD-20": 0.0},
}


if __name__ == "__main__":
    main()
