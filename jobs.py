"""Cells, each of some command lines and the files that they leave: which are finished, what they say, what the others
still need, and the doing of it, side by side. A cell (reproduce.Cell) is a tuple that begins with its target and its
scale, and has `run`, the directory of its training; `log`, where its log.csv goes in the end; `after`, a cell that must
have ended before; training(), a command, as a list; and evaluations() and labelling(), {file: the command that writes
it}."""

import contextlib
import csv
import fcntl
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import torch
from tqdm import tqdm

import checkpoints
import data
import eval_attacks
import rundir
import scores
import train_cifar

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
            result = scores.read(path)
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
        run, resume = rundir.load_run(cell.run), ["--resume"]
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
        args, result = eval_attacks.parse_args(command[1:])[1], scores.read(path)
        args.epsilon = args.epsilon or result["epsilon"]
        names = [name for name, _ in eval_attacks.attack_list(args)]
        files.append(pathlib.Path(args.model_path).name)
        rows = [row for row in result["attacks"] if row["name"] in names]
        if not entries and sum(bool(row["params"]) for row in rows) > 1:
            rows.append(scores.worst_case(rows))  # of the recipe's attacks: the file may hold more
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
            results = [scores.read(path) for cell in finished for path in cell.evaluations()]
            seconds = sum(float(row["seconds"]) for cell in finished for row in log_rows(cell))
            seconds += sum(row["seconds"] for result in results for row in result["attacks"])
            hours = seconds / len(finished) * left / processes / 3600
            rest = f"{hours:.1f} h, {processes} at a time, as fast as the finished ones on {results[0]['device']}"
        seeds = " ".join(map(str, dict.fromkeys(cell.seed for cell in states)))
        print(f"{key[0]:<17} {key[1]:<8} {len(states):>5} {len(finished):>10} {differ:>19}   {seeds}; {rest}")


def slots(jobs=None):
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
    with bar, rundir.deferred_signals(second=signal.default_int_handler) as received:
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
