"""A run's directory: one process at a time, checkpoints of which one is always whole, the log and its curves."""

import contextlib
import csv
import fcntl
import io
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import sys
import time
from fractions import Fraction

import torch
from tqdm import tqdm

import checkpoints
import cli
import losses
import models
import scores

STOPPING = "stopping: the step at hand is given up, the run is saved; Ctrl-C again ends it at once"
SHARES_EVERY = 8  # steps: the two logged shares of examples cost forward passes of their own
READ_EVERY = {"cpu": 1, "cuda": 10}  # steps: reading a number waits for the GPU, a signal to several processes for it


@contextlib.contextmanager
def run_lock(out_dir):
    """One process at a time in a run's directory, which is made; ValueError if a living one is there. The kernel frees
    the lock of a process that dies, however it dies."""
    pathlib.Path(out_dir).mkdir(parents=True, exist_ok=True)
    with open(pathlib.Path(out_dir, ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out-dir {out_dir}: another process is training there") from None
        except OSError as error:  # some network file systems
            print(f"{out_dir} cannot be locked ({error}): do not start a second process there")
        yield


@contextlib.contextmanager
def deferred_signals(notice="", second=signal.SIG_DFL):
    """Inside, a first SIGINT or SIGTERM only appends its number to the list that this yields, so that what is at hand
    can be saved, and prints the notice; another one is handled by `second`, by default it ends the process at once."""
    received = []

    def note(number, frame):
        received.append(number)
        for each in before:
            signal.signal(each, second)
        if notice:
            print(f"\n{notice}", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """Of a run that a signal ends: between two steps, or in the attack of one that is given up."""


def stoppable(forward, stop):
    """`forward`, a callable x -> logits, that raises Stopped once `stop` is filled: on a CPU an attack may take
    minutes, and none of it is kept. Of several processes none may leave the others: there it is `forward` itself."""

    def checked(x):
        if stop:
            raise Stopped
        return forward(x)

    return checked if cli.rank_and_world()[1] == 1 else forward


def save_run(state, out_dir):
    """Save last.pt; the one before it stays as last.prev.pt."""
    last = pathlib.Path(out_dir, "last.pt")
    if last.exists():
        # a hard link and not a rename: last.pt is there at any moment
        link = last.with_name(".last.prev.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(last, link)
        except OSError:  # exFAT, mounted drives
            shutil.copyfile(last, link)
        os.replace(link, last.with_name("last.prev.pt"))
        link.unlink(missing_ok=True)  # it stays where both names were one file already, after a failed save
    checkpoints.save(state, last)


def describe_checkpoints(out_dir):
    """What a failed run leaves to go on from, in words."""
    names = [str(path) for name in ("last.pt", "last.prev.pt") if (path := pathlib.Path(out_dir, name)).exists()]
    return f"the last checkpoints are {' and '.join(names)}" if names else "no checkpoint was written yet"


def what_next(args, complete):
    """The last words of a run: the command that evaluates it, or how a stopped one goes on."""
    if complete:
        best = f"{args.out_dir}/{'best' if args.val_size else 'last'}.pt"
        return f"python eval_attacks.py --model-path {shlex.quote(best)}"
    if not pathlib.Path(args.out_dir, "last.pt").exists():
        return "stopped before the first step, nothing to save; the same command starts again"
    return f"stopped and saved; go on with\npython train_cifar.py --resume --out-dir {shlex.quote(args.out_dir)}"


def load_run(out_dir):
    """The newest whole checkpoint of a run, last.pt or else last.prev.pt (then "damage" says why, else None); raises
    ValueError if there is none."""
    folder = pathlib.Path(out_dir)
    if not (folder / "last.pt").exists() and not (folder / "last.prev.pt").exists():
        raise ValueError(f"--resume: {out_dir} holds no run (no last.pt)")
    damage = None
    try:
        state = checkpoints.load(folder / "last.pt")
    except ValueError as error:
        damage, state = str(error), checkpoints.load(folder / "last.prev.pt")
    if not isinstance(state, dict) or state.get("format") != checkpoints.FORMAT:
        raise ValueError(f"--resume: {out_dir}/last.pt is not a checkpoint of train_cifar.py")
    needed = ("args", "state_dict", "optimizer", "step", "rows", "best", "sums", "on")
    if missing := [key for key in needed if state.get(key) is None]:
        raise ValueError(f"--resume: {out_dir}/last.pt holds no {missing[0]}: a best.pt, or of an older version")
    return state | {"damage": damage}


class Run:
    """A training run after some of its steps: what is counted, logged, saved and restored. Rank 0 alone writes into
    args.out_dir. state: the checkpoint to go on from, or None: weights, momentum, step, log and the epoch's sums. It
    holds no random state, as every draw is a function of (seed, step)."""

    def __init__(self, args, model, optimizer, train_set, state=None):
        self.args, self.model, self.optimizer, self.classes = args, model, optimizer, train_set.classes
        self.device, (self.rank, self.world) = train_set.images.device, cli.rank_and_world()
        self.steps_per_epoch = math.ceil(len(train_set.labels) / args.batch_size)
        self.total_steps = args.epochs * self.steps_per_epoch
        self.step, self.rows, self.best, self.sums = 0, [], -1.0, torch.zeros(6, device=self.device)
        self.rate = args.lr
        if state is not None:
            model.load_state_dict(state["state_dict"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.rows, self.best = state["step"], state["rows"], state["best"]
            self.sums = state["sums"].to(self.device)
            if self.rank == 0 and state["on"] != [self.device.type, self.world]:
                print(f"resumed on {[self.device.type, self.world]}, was on {state['on']}: no longer equal to the bit")

    def checkpoint(self):
        """What is saved. FloatingPointError if the last update, after the loss that is checked, broke the weights."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise FloatingPointError(f"weights are not finite after step {self.step}, lr {self.rate:g}")
        return {"format": checkpoints.FORMAT, "args": vars(self.args), "classes": self.classes,
                "epoch": self.step // self.steps_per_epoch, "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "step": self.step, "rows": self.rows, "best": self.best,
                "sums": self.sums, "on": [self.device.type, self.world]}

    def prepare_directory(self, state):
        """Write args.json, and save a new run, so that from its first step on it can be resumed. Of a resumed one, put
        last.prev.pt in the place of a last.pt that load_run found damaged: the next save would put that one over the
        only whole checkpoint. Returns the run's bar, a context."""
        if self.rank == 0:
            out_dir = pathlib.Path(self.args.out_dir)
            checkpoints.write_atomically(out_dir / "args.json", json.dumps(vars(self.args), indent=2).encode())
            if state is None:
                save_run(self.checkpoint(), out_dir)
            elif state["damage"]:
                print(f"{state['damage']}; going on from the checkpoint before it, last.prev.pt")
                os.replace(out_dir / "last.prev.pt", out_dir / "last.pt")
        self.saved = self.epoch_start = time.perf_counter()
        self.saved_step = self.epoch_first_step = self.step
        size = self.args.batch_size
        self.bar = tqdm(total=self.total_steps * size, initial=self.step * size, unit="img", unit_scale=True,
                        dynamic_ncols=True, mininterval=1.0, disable=self.rank > 0)
        return self.bar

    def save(self):
        if self.rank == 0 and self.step != self.saved_step:
            save_run(self.checkpoint(), self.args.out_dir)
        self.saved, self.saved_step = time.perf_counter(), self.step

    def pause(self, stop):
        """Between two steps: shows how the epoch goes, saves every --save-minutes, raises Stopped if `stop` is filled.
        """
        if self.step % READ_EVERY[self.device.type] and not (stop and self.world == 1):
            return  # several must agree on when to ask
        if self.step % self.steps_per_epoch:
            self.show()
        late = time.perf_counter() - self.saved > 60 * self.args.save_minutes
        stop_now, save_now = cli.any_process(stop, late)
        if stop_now:
            raise Stopped
        if save_now:
            self.save()

    def show(self):
        """The epoch so far on the bar; raises FloatingPointError if its loss is not finite."""
        epoch, i = divmod(self.step - 1, self.steps_per_epoch)
        loss, _, robust = (self.sums[:3] / (i + 1)).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} by step {self.step} of epoch {epoch + 1}, "
                                     f"lr {self.rate:g}")
        self.bar.set_description(f"epoch {epoch + 1}/{self.args.epochs}", refresh=False)
        robust = f", robust {robust:.1%}" if self.args.defense != "standard" else ""
        self.bar.set_postfix_str(f"loss {loss:.3f}{robust}", refresh=False)

    def set_rate(self, rate):
        self.rate = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def count(self, counts):
        """Add a step; counts: (6,), this process's tally and shares."""
        self.sums += cli.sum_over_processes(counts) / self.world
        self.step += 1
        self.bar.update(self.args.batch_size)

    def end_epoch(self, forward, val_set):
        """Validate and log; save the run and, if it is the best so far, best.pt."""
        self.show()
        standard, seconds = self.args.defense == "standard", time.perf_counter() - self.epoch_start
        images = (self.step - self.epoch_first_step) * self.args.batch_size
        row = epoch_row(self.args, self.sums.tolist(), self.steps_per_epoch)
        row = {"epoch": self.step // self.steps_per_epoch, "lr": self.rate} | row
        row |= validate(self.model, forward, val_set, self.args)
        self.rows.append(row | {"seconds": seconds, "images_per_s": images / seconds})
        self.sums.zero_()
        score = row["val_natural_accuracy" if standard else "val_robust_accuracy"]
        if is_best := score is not None and score >= self.best:  # of equals the later one, at a lower rate
            self.best = score
        if self.rank == 0:
            if is_best:
                checkpoints.save(self.checkpoint() | {"optimizer": None}, pathlib.Path(self.args.out_dir, "best.pt"))
            write_log(self.args.out_dir, self.rows)
            self.bar.write(summary(self.rows, self.args, len(self.classes)))
        self.epoch_start, self.epoch_first_step = time.perf_counter(), self.step
        self.save()


def validate(model, forward, val, args):
    """Accuracy and mean cross entropy on the held-out images, a dict: natural and by eval_attacks.py's PGD-20."""
    pgd20 = scores.make_attack(forward, {
        "objective": "ce", "epsilon": args.epsilon, "step_size": str(Fraction(args.epsilon) / 10), "num_steps": 20,
        "random_start": "uniform"})
    row = dict.fromkeys(f"val_{name}_{what}" for name in ("natural", "robust") for what in ("accuracy", "loss"))
    batch_size = args.batch_size // cli.rank_and_world()[1]  # the training step's, for which the model is compiled
    with models.frozen(model):
        for name, attack in (("natural", None), ("robust", pgd20)) if len(val.labels) else ():
            logits = scores.attacked_logits(model, val.images, val.labels, attack, batch_size)
            row[f"val_{name}_accuracy"] = (logits.argmax(1) == val.labels).float().mean().item()
            row[f"val_{name}_loss"] = losses.cross_entropy(logits, val.labels).mean().item()
    return row


def write_log(out_dir, rows):
    """log.csv, and curves.png drawn from it; rows: a dict an epoch, None for an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    checkpoints.write_atomically(pathlib.Path(out_dir) / "log.csv", text.getvalue().encode())

    from matplotlib.figure import Figure  # here, so that loading a model does not wait for it

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    for ax, unit, scale, names in (
        (axes[0], "accuracy (%)", 100, [f"{part}_{kind}_accuracy" for part in ("train", "val")
                                        for kind in ("natural", "robust")]),
        (axes[1], "loss", 1, ["train_loss", "val_natural_loss", "val_robust_loss"]),
    ):
        for name in names:
            values = [row[name] for row in rows]
            if None not in values:
                style = ".--" if name.startswith("train") else ".-"
                label = name.replace("_accuracy", "").replace("_", " ")
                ax.plot(epochs, [scale * v for v in values], style, label=label)
        ax.set(xlabel="epoch", ylabel=unit)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, dpi=100)
    checkpoints.write_atomically(pathlib.Path(out_dir) / "curves.png", image.getvalue())


@torch.no_grad()
def sampled_shares(run, eager, x, x_adv, y):
    """For the log, of one batch in SHARES_EVERY: (3,), losses.spat_counts and of how many examples; else zeros."""
    if x_adv is None or run.step % run.steps_per_epoch % SHARES_EVERY:
        return x.new_zeros(3)
    with models.frozen(run.model):
        counts = losses.spat_counts(eager(x), eager(x_adv), y, run.args.spat_alpha or 0.0)
    return torch.cat([counts, counts.new_full((1,), len(y))]).float()


@torch.no_grad()
def tally(loss, logits_nat, logits_adv, y):
    """More of it: (3,) the loss; the natural and the robust training accuracy, 0 without logits."""
    right = [torch.zeros_like(loss) if logits is None else (logits.argmax(1) == y).float().mean()
             for logits in (logits_nat, logits_adv)]
    return torch.stack([loss, *right])


def epoch_row(args, sums, steps):
    """The log's columns from the epoch's running sums; None, an empty cell, for what the defense does not have."""
    loss, natural, robust, confident, easier, sampled = sums
    has_alpha = sampled and (args.defense != "trades" or args.spat_alpha is not None)
    return {"train_loss": loss / steps,
            "train_natural_accuracy": natural / steps if args.defense != "madry" else None,
            "train_robust_accuracy": robust / steps if sampled else None,
            "share_p_y_above_1_minus_alpha": confident / sampled if has_alpha else None,
            "share_made_easier": easier / sampled if sampled else None}


def summary(rows, args, num_classes):
    """The lines on the screen at the end of an epoch; with a warning if a robust accuracy stays at guessing after a
    third of the epochs."""
    row = rows[-1]
    parts = [f"epoch {row['epoch']}", f"lr {row['lr']:.4g}", f"loss {row['train_loss']:.4f}"]
    for name in ("natural", "robust"):
        if row[f"val_{name}_accuracy"] is not None:
            parts.append(f"val {name} {row[f'val_{name}_accuracy']:.2%}")
    left = cli.duration((args.epochs - row["epoch"]) * row["seconds"] / 60)
    line = "  ".join([*parts, f"{row['images_per_s']:.0f} img/s", f"{left} left"])
    late = [row["val_robust_accuracy"] for row in rows[-3:] if row["epoch"] > args.epochs / 3]
    if args.defense != "standard" and len(late) == 3 and None not in late and max(late) <= 1.05 / num_classes:
        line += "\nwarning: the robust accuracy has been at chance for three epochs: is the learning rate too high?"
    return line
