"""Train an image classifier: standard, Madry, TRADES or MART, each of the last three with or without SPAT.

    python train_cifar.py --defense mart --spat-alpha 0.3                     # MART + SPAT at the paper's setting
    python train_cifar.py --defense mart --spat-alpha 0.3 --dataset digits    # a minute or two on two CPU cores
    python train_cifar.py --resume --out-dir runs/NAME                        # go on where it stopped

--defense picks the loss that the training step minimises. The attack maximises that method's usual objective, or, with
--spat-alpha A, the label-smoothed cross entropy with α = A (SPAT, Eq. 10). Nothing else knows of SPAT.
"""

import argparse
import contextlib
import csv
import functools
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
                epsilon="8/255", step_size=None, num_steps=10, random_start="gaussian", precision="auto",
                compile="auto", device="auto", seed=1, save_minutes=10.0),
    "trades": dict(beta=6.0),
    "mart": dict(beta=5.0),
    "cifar100 madry": dict(weight_decay=2e-4),
    "cifar100 trades": dict(weight_decay=2e-4),
    "digits": dict(arch="wrn-10-1", epochs=12, batch_size=64, lr=0.2, lr_schedule="onecycle", val_size=100,
                   weight_decay=5e-4, epsilon=data.EPSILON["digits"]),
    "recipe rst": dict(arch="wrn-28-10", epochs=200, batch_size=256, lr_schedule="cosine", nesterov=True, lr=0.1,
                       weight_decay=5e-4, epsilon="0.031", step_size="0.007", val_size=0),
}
SMALLER = "needs a GPU; to try it here: --dataset digits, or --arch wrn-16-2 --epochs 4 --limit-train 10000"
FREE_ON_RESUME = ("out_dir", "data_dir", "device", "save_minutes")  # these do not alter the result


def default_words(name):
    """What DEFAULTS says of an argument, for the help: "90; digits: 12; rst: 200"."""
    words = {"None": "none", "True": "on", "False": "off"}
    found = {of: str(defaults[name]) for of, defaults in DEFAULTS.items() if name in defaults}
    return "; ".join(("" if of == "all" else f"{of}: ") + words.get(value, value) for of, value in found.items())


def parse_args(argv=None):
    """(the parser, the flags that were typed as a dict); what was not typed is not in it."""
    parser = runtime.Parser(prog="train_cifar.py", description=__doc__)

    def group(title):
        def add(flag, help, **settings):
            default = default_words(flag.removeprefix("--").replace("-", "_"))
            flags.add_argument(flag, help=help + (f" (default: {default})" if default else ""), **settings)
        flags = parser.add_argument_group(title)
        return add

    add = group("what to train")
    add("--defense", "minimise this method's loss; required for a new run", choices=OUTER)
    add("--spat-alpha", "SPAT: attack by LSCE with this α in [0, 1]; without it by CE for madry and mart, by KL for "
        "trades", type=runtime.unit_float, metavar="A")
    add("--beta", "weight of the KL term", type=runtime.natural_float, metavar="B")
    add("--arch", f"architecture, one of {models.ARCHS}")
    add("--recipe", "whose defaults to take: MART's, or RST's for --aux-data", choices=("mart", "rst"))
    add("--seed", "seed of the first weights and of every draw", type=runtime.natural_int)
    add = group("data")
    add("--dataset", f"{', '.join(data.NAMED)}, or a folder with train/CLASS/*.png and test/CLASS/*.png")
    add("--data-dir", "where CIFAR is, or is downloaded to", metavar="DIR")
    add("--val-size", "hold out N images to choose best.pt; 0: only last.pt", type=runtime.natural_int, metavar="N")
    add("--limit-train", "train on the first N images only", type=runtime.positive_int, metavar="N")
    add("--aux-data", "pseudo-labelled images to train on as well: RST's pickle, or pseudo_label.py's", metavar="FILE")
    add("--aux-fraction", "their share of each batch", type=runtime.fraction_below_one, metavar="F")
    add = group("optimiser")
    add("--epochs", "how often each image is seen", type=runtime.positive_int, metavar="N")
    add("--batch-size", "images a step, of all processes together", type=runtime.positive_int, metavar="N")
    add("--lr", "highest learning rate", type=runtime.positive_float)
    add("--lr-schedule", "how the rate falls", choices=("step", "cosine", "onecycle"))
    add("--lr-milestones", "the first epochs, from 1, at lr x0.1 and x0.01 of schedule step; without it 75/90 of the "
        "epochs and the last one", type=runtime.positive_int, nargs=2, metavar="EPOCH")
    add("--momentum", "momentum of SGD", type=runtime.unit_float, metavar="M")
    add("--nesterov", "take Nesterov's momentum", action=argparse.BooleanOptionalAction)
    add("--weight-decay", "weight decay of SGD", type=runtime.natural_float, metavar="W")
    add = group("attack")
    add("--epsilon", "radius of the L-inf ball", type=runtime.ratio, metavar="E")
    add("--step-size", "step of the attack; without it epsilon / 4", type=runtime.ratio, metavar="S")
    add("--num-steps", "steps of the attack", type=runtime.positive_int, metavar="N")
    add("--random-start", "where the attack starts", choices=attacks.RANDOM_STARTS)
    runtime.add_runtime_flags(parser)
    add = group("output")
    add("--out-dir", "directory of the run; without it runs/DATASET-ARCH-DEFENSE[-spatA]-sSEED", metavar="DIR")
    add("--save-minutes", "save this often, and after every epoch", type=runtime.natural_float, metavar="M")
    add("--resume", "go on with the run in --out-dir where it stopped", action="store_true", default=None)
    return parser, {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}


def with_defaults(typed):
    """typed plus the defaults of its data set, defense and recipe; ValueError where flags contradict one another."""
    if "defense" not in typed:
        raise ValueError(f"--defense is required: {', '.join(OUTER)}")
    args, common = {}, DEFAULTS["all"]
    dataset, recipe = (typed.get(name, common[name]) for name in ("dataset", "recipe"))
    named = {"all", typed["defense"], f"recipe {recipe}"}
    named |= {dataset, f"{dataset} {typed['defense']}"} if dataset in data.NAMED else set()
    for name, defaults in DEFAULTS.items():
        args |= defaults if name in named else {}
    args = argparse.Namespace(**args | typed)
    models.parse_arch(args.arch)
    first, second = args.lr_milestones or (0, 0)
    for wrong, why in (
        (args.defense == "standard" and "spat_alpha" in typed, "--spat-alpha: standard training has no attack"),
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
    first = max(2, math.ceil(args.epochs * 75 / 90))  # below 6 epochs: no first epoch, and no x0.01 before x0.1
    args.lr_milestones = args.lr_milestones or [first, max(args.epochs, first + 1)]
    args.step_size = args.step_size or str(Fraction(args.epsilon) / 4)
    if "out_dir" not in typed:
        spat = "" if args.spat_alpha is None else f"-spat{args.spat_alpha:g}"
        name = pathlib.Path(args.dataset).resolve().name if args.dataset not in data.NAMED else args.dataset
        args.out_dir = f"runs/{name}-{args.arch}-{args.defense}{spat}{'-aux' if args.aux_data else ''}-s{args.seed}"
    return args


def aux_images(args):
    return round(args.aux_fraction * args.batch_size) if args.aux_data else 0


def new_or_resumed(typed):
    """(arguments, None or the checkpoint to go on from); ValueError if a run would be overwritten, or altered."""
    if not typed.get("resume"):
        args = with_defaults(typed)
        if any(pathlib.Path(args.out_dir, name).exists() for name in ("last.pt", "last.prev.pt", "best.pt", "log.csv")):
            raise ValueError(f"--out-dir {args.out_dir} holds a run already: add --resume, or choose another")
        return args, None
    out_dir = typed.get("out_dir") or with_defaults(typed).out_dir
    state = load_run(out_dir)
    if missing := vars(with_defaults({"defense": "madry"})).keys() - state["args"].keys():
        raise ValueError(f"--resume: {out_dir} is of an older version: it has no {min(missing)}")
    settled = ("resume", True), ("precision", "auto"), ("compile", "auto")
    typed = dict(flag for flag in typed.items() if flag not in settled)
    for key, value in typed.items():
        of_run = state["args"].get(key)
        if key not in FREE_ON_RESUME and value != of_run:
            raise ValueError(f"--resume: --{key.replace('_', '-')} {value} would alter {out_dir}, which has {of_run}")
    return argparse.Namespace(**state["args"] | typed | {"out_dir": out_dir}), state


def learning_rate(args, epoch, progress):
    """The rate in the epoch, counted from 1; progress: the share of the whole run that is done, in [0, 1]."""
    first, second = args.lr_milestones
    return args.lr * {
        "step": 0.01 if epoch >= second else 0.1 if epoch >= first else 1.0,  # MART's
        "cosine": 0.5 * (1 + math.cos((epoch - 1) * math.pi / args.epochs)),  # RST's
        "onecycle": 0.04 + 0.96 * progress / 0.3 if progress < 0.3 else
        0.5 * (1 + math.cos((progress - 0.3) / 0.7 * math.pi)),
    }[args.lr_schedule]


def build_optimizer(model, args):
    return torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
                           nesterov=args.nesterov, fused=True)


def training_passes(run, train_set):
    """(eager, fast) callables x -> logits of the model; and, by the fast one, both passes of a training step."""
    args = run.args
    x = data.to_float(train_set.images[torch.arange(args.batch_size // run.world) % len(train_set.labels)])
    passes = (run.total_steps - run.step) * (2 if args.defense == "standard" else args.num_steps + 4)
    eager, fast = runtime.forward_passes(args, run.model, x, passes, 1 + (args.defense in ("trades", "mart")), SMALLER)
    both = runtime.BothPasses(run.model, fast)
    if run.world > 1:
        both = torch.nn.parallel.DistributedDataParallel(both, broadcast_buffers=False)
    return eager, fast, both


def training_batch(args, train_set, indices, step):
    """(x, y, the attack's start) of one step, augmented; of several processes each takes its part of what is drawn."""
    rng = data.step_generator(train_set.images.device, args.seed, step)
    images, y = data.mixed(train_set, indices, aux_images(args), rng)
    x = data.augment(images, rng, train_set.mirror)
    start = attacks.start_perturbation(args.random_start, x, float(Fraction(args.epsilon)), rng)
    rank, world = runtime.rank_and_world()
    return tuple(drawn.chunk(world)[rank] for drawn in (x, y, start))  # of equal size, as main checks


def inner_maximisation(model, fast, x, y, start, args):
    """x_adv by PGD (Eq. 7) on the frozen model: of the defense's own objective, or of LSCE, SPAT's attack (Eq. 10).
    None in standard training. fast: a callable x -> logits of the model."""
    if args.defense == "standard":
        return None
    objective, target = INNER[args.defense], y
    if args.spat_alpha is not None:
        objective = functools.partial(losses.lsce, alpha=args.spat_alpha)  # Eq. 8-9
    epsilon, step_size = float(Fraction(args.epsilon)), float(Fraction(args.step_size))
    with models.frozen(model):
        if objective is losses.kl_divergence:
            target = attacks.probabilities(fast, x)
        return attacks.pgd(fast, x, target, objective, epsilon=epsilon, step_size=step_size,
                           num_steps=args.num_steps, random_start=start)


def outer_minimisation(both_passes, optimizer, x, x_adv, y, args):
    """One step on the defense's loss, Eq. 4 -> (loss, logits_nat, logits_adv), None for logits that it does without."""
    both_passes.train()
    logits_nat, logits_adv = both_passes(None if args.defense == "madry" else x, x_adv)
    loss = OUTER[args.defense](logits_adv, logits_nat, y, args.beta)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # here: of CUDA graphs no gradient may outlive its own
    return loss.detach(), logits_nat, logits_adv


def train(args, state, train_set, val_set, device, stop=()):
    """The run from its first step, or from the checkpoint `state`, to its end or until `stop` is filled; written into
    args.out_dir. Returns whether it is complete."""
    torch.manual_seed(args.seed)  # for the initial weights; every later draw is a function of (seed, step)
    model = models.build_model(args.arch, len(train_set.classes)).to(device)
    run = Run(args, model, build_optimizer(model, args), train_set, state)
    eager, fast, both_passes = training_passes(run, train_set)
    if runtime.any_process(stop)[0]:  # while compiling, which the signal may have broken: the directory is left as it was
        return False
    with run.prepare_directory(state), contextlib.suppress(runtime.Stopped):
        for epoch in range(run.step // run.steps_per_epoch, args.epochs):
            order = data.batches(len(train_set.labels), args.batch_size, args.seed, epoch, aux_images(args)).to(device)
            for indices in order[run.step % run.steps_per_epoch :]:
                run.pause(stop)
                run.set_rate(learning_rate(args, epoch + 1, run.step / run.total_steps))
                x, y, start = training_batch(args, train_set, indices, run.step)
                x_adv = inner_maximisation(model, runtime.stoppable(fast, stop), x, y, start, args)
                shares = sampled_shares(run, eager, x, x_adv, y)  # of the model that was attacked
                loss, logits_nat, logits_adv = outer_minimisation(both_passes, run.optimizer, x, x_adv, y, args)
                runtime.broadcast_buffers(model)
                run.count(torch.cat([tally(loss, logits_nat, logits_adv, y), shares]))
            run.end_epoch(fast, val_set)
        return True
    run.save()
    return False


SHARES_EVERY = 8  # steps: the two logged shares of examples cost forward passes of their own
READ_EVERY = {"cpu": 1, "cuda": 10}  # steps: reading a number waits for the GPU, a signal to several processes for it


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
        self.device, (self.rank, self.world) = train_set.images.device, runtime.rank_and_world()
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
        stop_now, save_now = runtime.any_process(stop, late)
        if stop_now:
            raise runtime.Stopped
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
        self.sums += runtime.sum_over_processes(counts) / self.world
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
    pgd20 = eval_attacks.make_attack(forward, {
        "objective": "ce", "epsilon": args.epsilon, "step_size": str(Fraction(args.epsilon) / 10), "num_steps": 20,
        "random_start": "uniform"})
    row = dict.fromkeys(f"val_{name}_{what}" for name in ("natural", "robust") for what in ("accuracy", "loss"))
    batch_size = args.batch_size // runtime.rank_and_world()[1]  # the training step's, for which the model is compiled
    with models.frozen(model):
        for name, attack in (("natural", None), ("robust", pgd20)) if len(val.labels) else ():
            logits = eval_attacks.attacked_logits(model, val.images, val.labels, attack, batch_size)
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
    left = runtime.duration((args.epochs - row["epoch"]) * row["seconds"] / 60)
    line = "  ".join([*parts, f"{row['images_per_s']:.0f} img/s", f"{left} left"])
    late = [row["val_robust_accuracy"] for row in rows[-3:] if row["epoch"] > args.epochs / 3]
    if args.defense != "standard" and len(late) == 3 and None not in late and max(late) <= 1.05 / num_classes:
        line += "\nwarning: the robust accuracy has been at chance for three epochs: is the learning rate too high?"
    return line


def main(argv=None):
    parser, typed = parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            args, state = new_or_resumed(typed)  # for all that can be wrong with the flags
            device, rank, world = stack.enter_context(runtime.join_job(args.device))
            if args.batch_size % world:
                raise ValueError(f"--batch-size {args.batch_size} cannot be split evenly over {world} processes")
            dataset = data.load(args.dataset, args.data_dir, train=True)
            train_set, val_set = data.split(dataset, args.val_size, args.limit_train)
            if args.aux_data:
                train_set = data.pseudo_labelled(args.aux_data, checkpoints.load_arrays(args.aux_data), train_set)
            runtime.barrier()  # nobody has found anything wrong
            if rank == 0:
                stack.enter_context(runtime.run_lock(args.out_dir))
                print(f"{args.dataset}: {len(train_set.labels)} images to train on, {len(val_set.labels)} held out")
            runtime.barrier()  # the lock is held: until now another run may have saved there, or begun
            args, state = new_or_resumed(typed)
            runtime.barrier()  # all have looked before one writes
        except (ValueError, OSError) as error:
            parser.error(error)
        stop = stack.enter_context(runtime.deferred_signals(runtime.STOPPING if rank == 0 else ""))
        try:
            complete = train(args, state, train_set.to(device), val_set.to(device), device, stop)
        except (FloatingPointError, *runtime.FAULTS) as error:
            sys.exit(f"{parser.prog}: {error}; {describe_checkpoints(args.out_dir)}")
        if rank == 0:
            print(what_next(args, complete))
        if not complete:
            sys.exit(128 + (stop[0] if stop else signal.SIGTERM))


if __name__ == "__main__":
    main()
