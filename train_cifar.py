"""Train an image classifier: standard, Madry, TRADES or MART, each of the last three with or without SPAT.

    python train_cifar.py --defense mart --spat-alpha 0.3                     # MART + SPAT at the paper's setting
    python train_cifar.py --defense mart --spat-alpha 0.3 --dataset digits    # a minute or two on two CPU cores
    python train_cifar.py --resume --out-dir runs/NAME                        # go on where it stopped

--defense picks the loss that the training step minimises. The attack maximises that method's usual objective, or, with
--spat-alpha A, the label-smoothed cross entropy with α = A (SPAT, Eq. 10). SPAT changes nothing else.
"""

import argparse
import collections
import contextlib
import csv
import functools
import io
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import time
from fractions import Fraction

import torch
from tqdm import tqdm

import attacks
import checkpoints
import data
import eval_attacks
import losses
import models
import runtime

OUTER = {"standard": losses.standard_loss, "madry": losses.madry_loss,
         "trades": losses.trades_loss, "mart": losses.mart_loss}
INNER = {"madry": losses.cross_entropy, "trades": losses.kl_divergence, "mart": losses.cross_entropy}

# The defaults, merged in this order as far as their name fits the run; a typed flag wins over all. The first are the
# paper's section 5.1 with MART's published settings where it is silent; rst is RST's schedule.
DEFAULTS = {
    "all": dict(spat_alpha=None, beta=None, recipe="mart", arch="wrn-34-10", dataset="cifar10", data_dir="data",
                val_size=1000, limit_train=None, aux_data=None, aux_fraction=0.5, epochs=90, batch_size=128, lr=0.1,
                lr_schedule="step", lr_milestones=None, momentum=0.9, nesterov=False, weight_decay=7e-4,
                epsilon=data.EPSILON, step_size=None, num_steps=10, random_start="gaussian", early_stop=None,
                precision="auto", compile="auto", device="auto", seed=1, save_minutes=10.0, mirror=None),
    "trades": dict(beta=6.0),
    "mart": dict(beta=5.0),
    "cifar100 madry": dict(weight_decay=2e-4),
    "cifar100 trades": dict(weight_decay=2e-4),
    "digits": dict(arch="wrn-10-1", epochs=12, batch_size=64, lr=0.2, lr_schedule="onecycle", val_size=100,
                   weight_decay=5e-4, epsilon=data.EPSILON_DIGITS),
    "recipe rst": dict(arch="wrn-28-10", epochs=200, batch_size=256, lr_schedule="cosine", nesterov=True, lr=0.1,
                       weight_decay=5e-4, epsilon="0.031", step_size="0.007", val_size=0),
}
SMALLER = "needs a GPU; to try it here: --dataset digits, or --arch wrn-16-2 --epochs 4 --limit-train 10000"
STOPPING = "stopping: the step at hand is given up, the run is saved; Ctrl-C again ends it at once"
FREE_ON_RESUME = ("out_dir", "data_dir", "device", "save_minutes")  # these do not alter the result
YOUNGER = {"mirror": None, "early_stop": None}  # flags that older runs lack, with what these did
SHARES_EVERY = 8  # steps: the two logged shares of examples cost forward passes of their own
READ_EVERY = {"cpu": 1, "cuda": 10}  # steps: reading a number waits for the GPU, a signal to several processes for it
Sums = collections.namedtuple("Sums", "loss natural robust confident easier sampled")  # tally's, sampled_shares'


def train(args, checkpoint, train_set, val_set, images, device, stop=()):
    """Train from the first step, or from a checkpoint of the run, to the end or until `stop` is filled, and write what
    comes of it into args.out_dir. Return whether the run is complete. images: the fingerprints of load_data."""
    torch.manual_seed(args.seed)  # for the initial weights; every later draw is a function of (seed, step)
    model = models.build_model(args.arch, len(train_set.classes)).to(device)
    run = Run(args, model, train_set, images, checkpoint)
    forward = training_pass(run, train_set, stop, strict=checkpoint is None)
    if forward is None:  # stopped while compiling: the directory stays as it was
        return False
    backward = attacks.recorded(forward, functools.partial(forward_backward, model, forward, args=args))
    run.prepare_directory(checkpoint)
    with run.begin(), contextlib.suppress(runtime.Stopped):
        attack_forward = runtime.stoppable(forward, stop)
        for epoch in range(len(run.rows), args.epochs):
            steps = data.batches(len(train_set.labels), args.batch_size, args.seed, epoch, aux_images(args)).to(device)
            for indices in steps[run.step - epoch * run.steps_per_epoch :]:  # none if stopped in the validation
                run.pause(stop)
                run.group["lr"] = learning_rate(args, epoch + 1, run.step / run.total_steps)
                x, y, start = training_batch(args, train_set, indices, run.step)
                x_adv = inner_maximisation(model, attack_forward, x, y, start, args)  # Eq. 5, 10
                shares = sampled_shares(run, forward, x, x_adv, y)  # of the model that was attacked
                loss, logits_nat, logits_adv = backward(x, x_adv, y)  # Eq. 4, section 3.3
                runtime.average_gradients(model)
                run.optimizer.step()
                runtime.broadcast_buffers(model)
                run.count(torch.cat([tally(loss, logits_nat, logits_adv, y), shares]))
            run.end_epoch(attack_forward, val_set)
        return True
    run.save()
    return False


def inner_maximisation(model, forward, x, y, start, args):
    """Return x_adv by PGD (Eq. 7) on the frozen model, or x in standard training.

    The attack maximises the defense's own objective, or LSCE, which is SPAT (Eq. 10). forward: a callable x -> logits
    of the model; x (B, C, H, W) in [0, 1]; y (B,); start: a perturbation like x.
    """
    if args.defense == "standard":
        return x
    objective = INNER[args.defense]
    if args.spat_alpha is not None:
        objective = functools.partial(losses.lsce, alpha=args.spat_alpha)  # Eq. 10, by LSCE, Eq. 8-9
    with models.frozen(model):
        target = y
        if objective is losses.kl_divergence:
            target = attacks.probabilities(forward, x)
        settings = dict(epsilon=float(Fraction(args.epsilon)), step_size=float(Fraction(args.step_size)),
                        num_steps=args.num_steps, random_start=start)
        if args.early_stop is not None:
            return attacks.early_stopped_pgd(forward, x, y, target, objective, tau=args.early_stop, **settings)
        return attacks.pgd(forward, x, target, objective, **settings)


def forward_backward(model, forward, x, x_adv, y, args):
    """Leave the gradients of the defense's loss (Eq. 4, section 3.3) in the weights. Return (loss, logits_nat,
    logits_adv), None for logits that the defense does without.

    x and x_adv go through the model apart, natural first: together they would share their batch statistics.
    """
    model.train()
    model.zero_grad()
    logits_nat = None if args.defense == "madry" else forward(x)
    logits_adv = None if args.defense == "standard" else forward(x_adv)
    loss = OUTER[args.defense](logits_adv, logits_nat, y, args.beta)
    loss.backward()
    return tuple(None if output is None else output.detach() for output in (loss, logits_nat, logits_adv))


def training_batch(args, train_set, indices, step):
    """Return (x, y, the attack's start) of one step, augmented. Of several processes each takes its part of what is
    drawn for all."""
    rng = data.step_generator(train_set.images.device, args.seed, step)
    images, y = data.mixed(train_set, indices, aux_images(args), rng)
    x = data.augment(images, rng, train_set.mirror)
    start = attacks.start_perturbation(args.random_start, x, float(Fraction(args.epsilon)), rng)
    rank, world = runtime.rank_and_world()
    return tuple(drawn.chunk(world)[rank] for drawn in (x, y, start))  # of equal size, as main checks


def aux_images(args):
    """Return how many images of each batch are pseudo-labelled ones."""
    return round(args.aux_fraction * args.batch_size) if args.aux_data else 0


def learning_rate(args, epoch, progress):
    """Return the rate in the epoch, counted from 1. progress: the share of the whole run that is done, in [0, 1]."""
    if args.lr_schedule == "cosine":  # RST's
        return args.lr * 0.5 * (1 + math.cos((epoch - 1) * math.pi / args.epochs))
    if args.lr_schedule == "onecycle":
        if progress < 0.3:
            return args.lr * (0.04 + 0.96 * progress / 0.3)
        return args.lr * 0.5 * (1 + math.cos((progress - 0.3) / 0.7 * math.pi))
    first, second = args.lr_milestones  # MART's
    if epoch >= second:
        return args.lr * 0.01
    return args.lr * 0.1 if epoch >= first else args.lr


def build_optimizer(model, args):
    return torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
                           nesterov=args.nesterov, fused=True)


def training_pass(run, train_set, stop, strict):
    """Return a callable x -> logits of the model, as fast as --precision and --compile make it for the run's batches,
    after a rehearsal of a step of the attack and of the update; None if `stop` was filled meanwhile. strict: see
    runtime.forward_pass."""
    args = run.args
    indices = torch.arange(args.batch_size // run.world) % len(train_set.labels)
    x, y = data.to_float(train_set.images[indices]), train_set.labels[indices]

    def rehearsal(forward):
        one_step = argparse.Namespace(**vars(args) | {"num_steps": 1})
        start = torch.full_like(x, float(Fraction(args.epsilon)) / 2)  # not zero, where KL has no gradient
        x_adv = inner_maximisation(run.model, forward, x, y, start, one_step)
        if args.val_size:
            with models.frozen(run.model):
                eval_attacks.make_attack(forward, eval_attacks.pgd_params(args.epsilon, num_steps=1))(x, y, indices)
        attacks.recorded(forward, functools.partial(forward_backward, run.model, forward, args=args))(x, x_adv, y)

    passes_a_step = 2 if args.defense == "standard" else args.num_steps + 4
    passes = (run.total_steps - run.step) * passes_a_step
    try:
        forward = runtime.forward_pass(args, run.model, x, passes, rehearsal, SMALLER, strict=strict)
    except runtime.CompileFailed:
        if not runtime.any_process(stop)[0]:  # else the signal may have broken the compiler
            raise
        return None
    return None if runtime.any_process(stop)[0] else forward


# A run and its directory. ---------------------------------------------------------------------------------------------


class Run:
    """A training run after some of its steps: what is counted, logged, saved and restored. It holds no random state, as
    every draw is a function of (seed, step). Rank 0 alone writes. checkpoint: what to go on from, or None."""

    def __init__(self, args, model, train_set, images, checkpoint=None):
        self.args, self.model, self.train_set, self.images = args, model, train_set, images
        self.optimizer = build_optimizer(model, args)
        self.device, (self.rank, self.world) = train_set.images.device, runtime.rank_and_world()
        self.steps_per_epoch = math.ceil(len(train_set.labels) / args.batch_size)
        self.total_steps = args.epochs * self.steps_per_epoch
        self.step, self.rows, self.best, self.saved_step = 0, [], -1.0, None
        self.timed = 0.0, 0  # seconds and steps of this epoch, which may have begun before the run was resumed
        self.sums = torch.zeros(len(Sums._fields), device=self.device)  # in their order
        if checkpoint is not None:
            model.load_state_dict(checkpoint["state_dict"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.step = self.saved_step = checkpoint["step"]
            self.rows, self.best = checkpoint["rows"], checkpoint["best"]
            self.sums = checkpoint["sums"].to(self.device)
            self.timed = checkpoint.get("timed", self.timed)
            on = [self.device.type, self.world]
            if self.rank == 0 and checkpoint["on"] != on:
                print(f"resumed on {on}, was on {checkpoint['on']}: no longer equal to the bit")
        self.group = self.optimizer.param_groups[0]  # its entry lr is the rate

    def check_weights(self):
        """Raise FloatingPointError if the last update broke the weights. The loss that is checked is of before it."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise FloatingPointError(f"weights are not finite after step {self.step}, lr {self.group['lr']:g}")

    def checkpoint(self):
        """Return what is saved."""
        self.check_weights()
        return {"format": checkpoints.FORMAT, "args": vars(self.args), "classes": self.train_set.classes,
                "image_size": list(self.train_set.images.shape[2:]), "epoch": self.step // self.steps_per_epoch,
                "state_dict": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                "rows": self.rows, "best": self.best, "sums": self.sums, "timed": self.timed, "images": self.images,
                "on": [self.device.type, self.world]}

    def prepare_directory(self, checkpoint):
        """Write args.json, and save a new run, so that from its first step on it can be resumed.

        Of a resumed run last.prev.pt takes the place of a last.pt that load_run found damaged: else the next save would
        put that one over the only whole checkpoint.
        """
        out_dir = pathlib.Path(self.args.out_dir)
        if self.rank == 0:
            checkpoints.write_atomically(out_dir / "args.json", json.dumps(vars(self.args), indent=2).encode())
            if checkpoint is not None and checkpoint["damage"]:
                print(f"{checkpoint['damage']}; going on from the checkpoint before it, last.prev.pt")
                os.replace(out_dir / "last.prev.pt", out_dir / "last.pt")
        self.save()

    def begin(self):
        """Start the first epoch's clock and return the progress bar."""
        self.epoch_start = time.perf_counter() - self.timed[0]
        size = self.args.batch_size
        self.bar = tqdm(total=self.total_steps * size, initial=self.step * size, unit="img", unit_scale=True,
                        dynamic_ncols=True, mininterval=1.0, disable=self.rank > 0)
        return self.bar

    def pause(self, stop):
        """Show how the epoch goes, and save every --save-minutes. Raise Stopped if `stop` is filled."""
        if self.step % READ_EVERY[self.device.type] and not (stop and self.world == 1):
            return  # several must agree on when to ask
        if self.step % self.steps_per_epoch:
            self.show()
        late = time.perf_counter() - self.saved_at > 60 * self.args.save_minutes
        stop_now, save_now = runtime.any_process(stop, late)
        if stop_now:
            raise runtime.Stopped
        if save_now:
            self.save()

    def count(self, counts):
        """Add a step to the sums; counts: (6,), this process's tally and shares."""
        self.sums += runtime.sum_over_processes(counts) / self.world
        self.step += 1
        self.timed = time.perf_counter() - self.epoch_start, self.timed[1] + 1
        self.bar.update(self.args.batch_size)

    def show(self):
        """Show the epoch so far on the bar. Raise FloatingPointError if its loss is not finite."""
        epoch, i = divmod(self.step - 1, self.steps_per_epoch)
        means = Sums(*(self.sums / (i + 1)).tolist())
        if not math.isfinite(means.loss):
            raise FloatingPointError(
                f"the loss is {means.loss} by step {self.step} of epoch {epoch + 1}, lr {self.group['lr']:g}")
        robust = "" if self.args.defense == "standard" else f", robust {means.robust:.1%}"
        self.bar.set_description(f"epoch {epoch + 1}/{self.args.epochs}", refresh=False)
        self.bar.set_postfix_str(f"loss {means.loss:.3f}{robust}", refresh=False)

    def end_epoch(self, forward, val_set):
        """Validate and log; save the run and, if it is the best so far, best.pt."""
        self.show()
        self.check_weights()
        seconds = time.perf_counter() - self.epoch_start
        images = self.timed[1] * self.args.batch_size
        row = {"epoch": self.step // self.steps_per_epoch, "lr": self.group["lr"]}
        row |= epoch_row(self.args, Sums(*self.sums.tolist()), self.steps_per_epoch)
        row |= validate(self.model, forward, val_set, self.args)
        row |= {"seconds": seconds, "images_per_s": images / seconds}
        self.rows.append(row)
        self.sums.zero_()
        score = row["val_natural_accuracy" if self.args.defense == "standard" else "val_robust_accuracy"]
        is_best = score is not None and score >= self.best  # of equals the later one, at a lower rate
        if is_best:
            self.best = score
        if self.rank == 0:
            if is_best:
                checkpoints.save(self.checkpoint() | {"optimizer": None}, pathlib.Path(self.args.out_dir, "best.pt"))
            write_log(self.args.out_dir, self.rows)
            self.bar.write(summary(self.rows, self.args, len(self.train_set.classes)))
        self.epoch_start, self.timed = time.perf_counter(), (0.0, 0)
        self.saved_step = None  # the row is new, even where no step is
        self.save()

    def save(self):
        if self.rank == 0 and self.step != self.saved_step:
            checkpoints.save_run(self.checkpoint(), self.args.out_dir)
        self.saved_at, self.saved_step = time.perf_counter(), self.step


def validate(model, forward, val_set, args):
    """Return the log's columns of the held-out images, None where there are none: accuracy and mean cross entropy,
    natural and by PGD-20."""
    pgd20, row = eval_attacks.make_attack(forward, eval_attacks.pgd_params(args.epsilon)), {}
    batch_size = args.batch_size // runtime.rank_and_world()[1]  # the training step's, for which the model is compiled
    with models.frozen(model):
        for name, attack in (("natural", None), ("robust", pgd20)):
            row[f"val_{name}_accuracy"] = row[f"val_{name}_loss"] = None
            if len(val_set.labels):
                logits = eval_attacks.attacked_logits(model, val_set.images, val_set.labels, attack, batch_size)
                row[f"val_{name}_accuracy"] = (logits.argmax(1) == val_set.labels).float().mean().item()
                row[f"val_{name}_loss"] = losses.cross_entropy(logits, val_set.labels).mean().item()
    return row


def sampled_shares(run, forward, x, x_adv, y):
    """Return (3,), the last of Sums: losses.spat_counts and the batch size every SHARES_EVERY steps, else zeros."""
    if run.args.defense == "standard" or run.step % run.steps_per_epoch % SHARES_EVERY:
        return x.new_zeros(3)
    with models.frozen(run.model):
        logits_nat, logits_adv = (attacks.constant_logits(forward, batch) for batch in (x, x_adv))
    counts = losses.spat_counts(logits_nat, logits_adv, y, run.args.spat_alpha or 0.0)
    return torch.cat([counts, counts.new_full((1,), len(y))]).float()


@torch.no_grad()
def tally(loss, logits_nat, logits_adv, y):
    """Return (3,), the first of Sums: the loss, the natural and the robust training accuracy, 0 without logits."""
    right = [torch.zeros_like(loss) if logits is None else (logits.argmax(1) == y).float().mean()
             for logits in (logits_nat, logits_adv)]
    return torch.stack([loss, *right])


def epoch_row(args, sums, steps):
    """Return the log's columns of an epoch's Sums; None, an empty cell, for what the defense does without."""
    attacked, by_label = args.defense != "standard", args.defense != "trades" or args.spat_alpha is not None
    return {"train_loss": sums.loss / steps,
            "train_natural_accuracy": None if args.defense == "madry" else sums.natural / steps,
            "train_robust_accuracy": sums.robust / steps if attacked else None,
            "share_p_y_above_1_minus_alpha": sums.confident / sums.sampled if attacked and by_label else None,
            "share_made_easier": sums.easier / sums.sampled if attacked else None}


def summary(rows, args, num_classes):
    """Return the line on the screen at the end of an epoch, with a warning if a robust accuracy stays at guessing after
    a third of the epochs."""
    row = rows[-1]
    line = f"epoch {row['epoch']}  lr {row['lr']:.4g}  loss {row['train_loss']:.4f}"
    for name in ("natural", "robust"):
        if row[f"val_{name}_accuracy"] is not None:
            line += f"  val {name} {row[f'val_{name}_accuracy']:.2%}"
    left = runtime.duration((args.epochs - row["epoch"]) * row["seconds"] / 60)
    line += f"  {row['images_per_s']:.0f} img/s  {left} left"
    late = [row["val_robust_accuracy"] for row in rows[-3:] if row["epoch"] > args.epochs / 3]
    if args.defense != "standard" and len(late) == 3 and None not in late and max(late) <= 1.05 / num_classes:
        line += "\nwarning: the robust accuracy has been at chance for three epochs: is the learning rate too high?"
    return line


def write_log(out_dir, rows):
    """Write log.csv, and curves.png drawn from it. rows: a dict an epoch, None for an empty cell."""
    text = io.StringIO()
    cells = [[f"{value:.6g}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    csv.writer(text, lineterminator="\n").writerows([rows[0].keys(), *cells])
    checkpoints.write_atomically(pathlib.Path(out_dir, "log.csv"), text.getvalue().encode())

    from matplotlib.figure import Figure  # here, so that loading a model does not wait for it

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, unit in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name.endswith(unit) and None not in values:
                axes.plot([row["epoch"] for row in rows], values, ".-", label=name)
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    checkpoints.write_atomically(pathlib.Path(out_dir, "curves.png"), lambda file: figure.savefig(file, dpi=100))


# Flags. ---------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    """Return (the parser, the flags that were typed as a dict); what was not typed is not in it."""
    parser = runtime.Parser(prog="train_cifar.py", description=__doc__)

    def add(flag, help, **settings):
        name = flag.removeprefix("--").replace("-", "_")
        words = "; ".join(f"{of}: {defaults[name]}" for of, defaults in DEFAULTS.items() if name in defaults)
        words = f" (default: {words.removeprefix('all: ')})" if words else ""
        group.add_argument(flag, help=help + words, **settings)

    group = parser.add_argument_group("what to train")
    add("--defense", f"minimise the loss of this method, one of {', '.join(OUTER)}; required for a new run")
    add("--spat-alpha", "SPAT: attack by LSCE with this α in [0, 1], no CE or KL", type=runtime.unit_float, metavar="A")
    add("--beta", "weight of the KL term", type=runtime.natural_float, metavar="B")
    add("--arch", f"architecture, one of {models.ARCHS}")
    add("--recipe", "whose defaults to take: MART's, or RST's for --aux-data", choices=("mart", "rst"))
    add("--seed", "seed of the first weights and of every draw", type=runtime.natural_int)
    group = parser.add_argument_group("data")
    add("--dataset", f"{', '.join(data.NAMED)}, or a folder with train/CLASS/*.png and test/CLASS/*.png")
    add("--data-dir", "where CIFAR is, or is downloaded to", metavar="DIR")
    add("--val-size", "hold out N images to choose best.pt; 0: only last.pt", type=runtime.natural_int, metavar="N")
    add("--limit-train", "train on the first N images only", type=runtime.positive_int, metavar="N")
    add("--aux-data", "pseudo-labelled images to train on as well: RST's pickle, or pseudo_label.py's", metavar="FILE")
    add("--aux-fraction", "their share of each batch", type=runtime.fraction_below_one, metavar="F")
    add("--mirror", "train on mirrored images too, --no-mirror for digits or text; without either all data sets but "
        "--dataset digits are mirrored", action=argparse.BooleanOptionalAction)
    group = parser.add_argument_group("optimiser")
    add("--epochs", "how often each image is seen", type=runtime.positive_int, metavar="N")
    add("--batch-size", "images a step, of all processes together", type=runtime.positive_int, metavar="N")
    add("--lr", "highest learning rate", type=runtime.positive_float)
    add("--lr-schedule", "how the rate falls", choices=("step", "cosine", "onecycle"))
    add("--lr-milestones", "the first epochs, from 1, at lr x0.1 and x0.01 of schedule step; without it 75/90 of the "
        "epochs and the last one", type=runtime.positive_int, nargs=2, metavar="EPOCH")
    add("--momentum", "momentum of SGD", type=runtime.unit_float, metavar="M")
    add("--nesterov", "take Nesterov's momentum", action=argparse.BooleanOptionalAction)
    add("--weight-decay", "weight decay of SGD", type=runtime.natural_float, metavar="W")
    group = parser.add_argument_group("attack")
    add("--epsilon", "radius of the L-inf ball", type=runtime.ratio, metavar="E")
    add("--step-size", "step of the attack; without it epsilon / 4", type=runtime.ratio, metavar="S")
    add("--num-steps", "steps of the attack", type=runtime.positive_int, metavar="N")
    add("--random-start", "where the attack starts", choices=attacks.RANDOM_STARTS)
    add("--early-stop", "FAT: what the model gets wrong moves T more steps only", type=runtime.natural_int, metavar="T")
    runtime.add_runtime_flags(parser)
    group = parser.add_argument_group("output")
    add("--out-dir", "directory of the run; without it runs/DATASET-ARCH-DEFENSE[-spatA][-stopT]-sSEED", metavar="DIR")
    add("--save-minutes", "save this often, and after every epoch", type=runtime.natural_float, metavar="M")
    add("--resume", "go on with the run in --out-dir where it stopped", action="store_true", default=None)
    return parser, {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}


def with_defaults(typed):
    """Return `typed` and the defaults of its data set, defense and recipe as a namespace. Raise ValueError where flags
    contradict one another."""
    if typed.get("defense") not in OUTER:
        raise ValueError(f"--defense is required: {', '.join(OUTER)}; with SPAT --defense mart --spat-alpha 0.3, say")
    dataset, recipe = (typed.get(name, DEFAULTS["all"][name]) for name in ("dataset", "recipe"))
    args = {}
    of_dataset = (dataset, f"{dataset} {typed['defense']}") if data.is_named(dataset) else ()  # a folder may be "mart"
    for name, defaults in DEFAULTS.items():
        if name in ("all", typed["defense"], *of_dataset, f"recipe {recipe}"):
            args |= defaults
    args = argparse.Namespace(**args | typed)
    models.parse_arch(args.arch)
    first, second = args.lr_milestones or (0, 0)
    for wrong, why in (
        (args.defense == "standard" and {"spat_alpha", "early_stop"} & typed.keys(),
         "--spat-alpha, --early-stop: standard training has no attack"),
        (args.defense in ("standard", "madry") and "beta" in typed, f"--beta: {args.defense} has no KL term"),
        (args.defense == "trades" and args.spat_alpha is None and args.random_start == "none",
         "--random-start none: KL(p(x) || p(x)) is 0 with gradient 0, the attack would not move"),
        (args.lr_schedule != "step" and first, f"--lr-milestones: --lr-schedule {args.lr_schedule} has none"),
        (first > second, f"--lr-milestones {first} {second} are out of order"),
        (args.nesterov and args.momentum == 0, "--nesterov needs a --momentum above 0"),
        (args.aux_data is None and "aux_fraction" in typed, "--aux-fraction goes with --aux-data"),
        (args.aux_data and args.aux_fraction and not 0 < aux_images(args) < args.batch_size,
         f"--aux-fraction {args.aux_fraction} of --batch-size {args.batch_size} leaves one of the two sides no image"),
    ):
        if wrong:
            raise ValueError(why)
    if args.lr_milestones is None:
        first = max(2, math.ceil(args.epochs * 75 / 90))  # below 6 epochs: no first epoch, and no x0.01 before x0.1
        args.lr_milestones = [first, max(args.epochs, first + 1)]
    if args.step_size is None:
        args.step_size = str(Fraction(args.epsilon) / 4)
    if "out_dir" not in typed:
        name = args.dataset if args.dataset in data.NAMED else pathlib.Path(args.dataset).resolve().name
        alpha = "" if args.spat_alpha is None else f"-spat{args.spat_alpha:g}"
        stop = "" if args.early_stop is None else f"-stop{args.early_stop}"
        aux = "-aux" if args.aux_data else ""
        args.out_dir = f"runs/{name}-{args.arch}-{args.defense}{alpha}{stop}{aux}-s{args.seed}"
    return args


def new_or_resumed(typed):
    """Return (arguments, None or the checkpoint to go on from). Raise ValueError if a run would be overwritten, or
    altered."""
    if typed.get("out_dir") == "":
        raise ValueError("--out-dir: an empty name")
    if not typed.get("resume"):
        args = with_defaults(typed)
        if any(pathlib.Path(args.out_dir, name).exists() for name in (*checkpoints.OF_RUN, "best.pt", "log.csv")):
            raise ValueError(f"--out-dir {args.out_dir} holds a run already: add --resume, or choose another")
        return args, None
    out_dir = typed.get("out_dir") or with_defaults(typed).out_dir
    checkpoint = checkpoints.load_run(out_dir)
    of_run = YOUNGER | checkpoint["args"]
    if missing := DEFAULTS["all"].keys() - of_run.keys():
        raise ValueError(f"--resume: {out_dir} is of an older version: it has no {min(missing)}")
    settled = ("resume", True), ("precision", "auto"), ("compile", "auto")
    typed = dict(flag for flag in typed.items() if flag not in settled)
    if (checkpoint.get("images") or {}).get("--aux-data"):  # load_data compares what is in the file
        of_run["aux_data"] = typed.get("aux_data", of_run["aux_data"])
    for key, value in typed.items():
        if alters(key, value, of_run.get(key)):
            flag = "--" + key.replace("_", "-")
            raise ValueError(f"--resume: {flag} {value} would alter {out_dir}, which has {of_run.get(key)}")
    return argparse.Namespace(**of_run | typed | {"out_dir": out_dir}), checkpoint


def alters(key, value, other):
    """Return whether an argument of another value alters what a run comes to. Where there is no GPU, --compile graphs
    becomes "on", whose numbers are the same."""
    is_graphs = key == "compile" and {value, other} == {"graphs", "on"}
    return key not in FREE_ON_RESUME and value != other and not is_graphs


def load_data(args, checkpoint):
    """Return (the images to train on, the ones held out, {what: fingerprint} of both and of --aux-data). Raise
    ValueError or OSError where something is wrong with them, or they are not the run's. checkpoint: of it, or None."""
    dataset = data.load(args.dataset, args.data_dir, train=True)
    if checkpoint is not None:
        dataset = data.fitted(dataset, args.dataset, checkpoint)
    if args.mirror is not None:
        dataset = dataset._replace(mirror=args.mirror)
    train_set, val_set = data.split(dataset, args.val_size, args.limit_train)
    if args.aux_data:
        arrays = checkpoints.load_arrays(args.aux_data, optional=["classes"])
        train_set = data.pseudo_labelled(args.aux_data, arrays, train_set)
        if checkpoint is None:  # else they were checked at the beginning, or nothing can be done any more
            data.check_leak(args.aux_data, train_set.aux, val_set)
    parts = {"the images to train on": train_set, "the held-out images": val_set, "--aux-data": train_set.aux}
    images = {what: data.fingerprint(part) for what, part in parts.items() if part is not None}
    for what, now in images.items():
        if checkpoint is not None and checkpoint.get("images", images)[what] != now:  # an older run does not say
            raise ValueError(f"--resume: {what} are no longer those that the run in {args.out_dir} began with")
    return train_set, val_set, images


def what_next(args, complete):
    """Return the last words of a run: the command that evaluates it, or how a stopped one goes on."""
    if complete:
        model_path = pathlib.Path(args.out_dir, "best.pt" if args.val_size else "last.pt")
        return f"python eval_attacks.py --model-path {shlex.quote(str(model_path))}"
    if not checkpoints.of_run(args.out_dir):
        return "stopped before the first step, nothing to save; the same command starts again"
    return f"stopped and saved; go on with\npython train_cifar.py --resume --out-dir {shlex.quote(args.out_dir)}"


def main(argv=None):
    parser, typed = parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            args, checkpoint = new_or_resumed(typed)  # for all that can be wrong with the flags
            device, rank, world = stack.enter_context(runtime.join_job(args.device))
            if args.batch_size % world:
                raise ValueError(f"--batch-size {args.batch_size} cannot be split evenly over {world} processes")
            train_set, val_set, images = load_data(args, checkpoint)
            runtime.barrier()  # nobody has found anything wrong
            if rank == 0:
                stack.enter_context(runtime.run_lock(args.out_dir))
                print(f"{args.dataset}: {len(train_set.labels)} images to train on, {len(val_set.labels)} held out")
            runtime.barrier()  # the lock is held: until now another run may have saved there, or begun
            args, checkpoint = new_or_resumed(typed)  # train() waits for all before one writes
        except (ValueError, OSError) as error:
            parser.error(error)
        stop = stack.enter_context(runtime.deferred_signals(STOPPING if rank == 0 else ""))
        try:
            complete = train(args, checkpoint, train_set.to(device), val_set.to(device), images, device, stop)
        except (FloatingPointError, *runtime.FAULTS) as error:
            left = " and ".join(map(str, checkpoints.of_run(args.out_dir)))
            left = f"the last checkpoints are {left}" if left else "no checkpoint was written yet"
            sys.exit(f"{parser.prog}: {error}; {left}")
        if rank == 0:
            print(what_next(args, complete))
        if not complete:
            sys.exit(128 + (stop[0] if stop else signal.SIGTERM))


if __name__ == "__main__":
    main()
