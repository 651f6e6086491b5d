"""Train an image classifier: standard, Madry, TRADES or MART, each of the last three with or without SPAT.

    python train_cifar.py --defense mart --spat-alpha 0.3

--defense picks the loss that the training step minimises. The attack maximises that method's usual objective, or, with
--spat-alpha A, the label-smoothed cross entropy with α = A (SPAT, Eq. 10). Nothing else knows of SPAT.
"""

import argparse
import contextlib
import functools
import math
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
import cli
import data
import losses
import models
import rundir

OUTER = {"standard": losses.standard_loss, "madry": losses.madry_loss,
         "trades": losses.trades_loss, "mart": losses.mart_loss}
INNER = {"madry": losses.cross_entropy, "trades": losses.kl_divergence, "mart": losses.cross_entropy}

# (data set, defense, recipe), None for any: a later line wins, a flag wins over all. The first lines are the paper's
# section 5.1 with MART's published settings where it is silent; rst is RST's schedule.
DEFAULTS = (
    (None, None, None, dict(dataset="cifar10", arch="wrn-34-10", epochs=90, batch_size=128, lr=0.1, lr_schedule="step",
                            momentum=0.9, nesterov=False, weight_decay=7e-4, val_size=1000, limit_train=None,
                            epsilon="8/255", num_steps=10, random_start="gaussian", spat_alpha=None, beta=None)),
    (None, None, None, dict(data_dir="data", precision="auto", compile="auto", device="auto", seed=1, save_minutes=10.0,
                            recipe="mart", aux_data=None, aux_fraction=0.5)),
    (None, "trades", None, dict(beta=6.0)),
    (None, "mart", None, dict(beta=5.0)),
    ("cifar100", "madry", None, dict(weight_decay=2e-4)),
    ("cifar100", "trades", None, dict(weight_decay=2e-4)),
    ("digits", None, None, dict(arch="wrn-10-1", epochs=12, batch_size=64, lr=0.2, lr_schedule="onecycle", val_size=100,
                                weight_decay=5e-4, epsilon=data.EPSILON["digits"])),
    (None, None, "rst", dict(arch="wrn-28-10", epochs=200, batch_size=256, lr=0.1, lr_schedule="cosine", nesterov=True,
                             weight_decay=5e-4, epsilon="0.031", step_size="0.007", val_size=0)),
)
FREE_ON_RESUME = ("out_dir", "data_dir", "device", "save_minutes")  # these do not alter the result
SHARES_EVERY = 8  # steps: the two logged shares of examples cost forward passes of their own
READ_EVERY = {"cpu": 1, "cuda": 10}  # steps: reading a number waits for the GPU; signals to several processes wait too


def parse_args(argv=None):
    """(the parser, the flags that were typed as a dict); what was not typed is not in it."""
    parser = cli.Parser(prog="train_cifar.py", description=__doc__, epilog=f"Architectures: {models.ARCHS}.")
    add = parser.add_argument
    add("--defense", choices=OUTER, help="the loss to train with (no default)")
    add("--spat-alpha", type=cli.unit_float, metavar="A",
        help="SPAT: attack by LSCE with this α in [0, 1] (default: by CE for madry and mart, by KL for trades)")
    add("--beta", type=cli.natural_float, help="weight of the KL term (default: trades 6, mart 5)")
    add("--dataset", help="cifar10, cifar100, digits, or a folder with train/CLASS/*.png and test/CLASS/*.png "
        "(default: cifar10)")
    add("--data-dir", metavar="DIR", help="where CIFAR is, or is downloaded to (default: data)")
    add("--recipe", choices=("mart", "rst"), help="which defaults: MART's, or RST's for --aux-data (default: mart)")
    add("--aux-data", metavar="FILE",
        help="pseudo-labelled images to train on as well: RST's pickle, or an .npz of pseudo_label.py (default: none)")
    add("--aux-fraction", type=cli.fraction_below_one, metavar="F", help="their share of each batch (default: 0.5)")
    add("--arch", help="architecture (default: wrn-34-10; rst: wrn-28-10; digits: wrn-10-1)")
    add("--val-size", type=cli.natural_int, metavar="N",
        help="training images held out to choose best.pt; 0: none, last.pt only (default: 1000; rst: 0; digits: 100)")
    add("--limit-train", type=cli.positive_int, metavar="N", help="train on the first N images (default: all)")
    add("--epochs", type=cli.positive_int, help="(default: 90; rst: 200; digits: 12)")
    add("--batch-size", type=cli.positive_int, help="(default: 128; rst: 256; digits: 64)")
    add("--lr", type=cli.positive_float, help="highest learning rate (default: 0.1; digits: 0.2)")
    add("--lr-schedule", choices=("step", "cosine", "onecycle"), help="(default: step; rst: cosine; digits: onecycle)")
    add("--lr-milestones", type=cli.positive_int, nargs=2, metavar="EPOCH",
        help="step: the first epochs, from 1, at lr x0.1 and x0.01 (default: 75/90 of --epochs and its last)")
    add("--momentum", type=cli.unit_float, help="(default: 0.9)")
    add("--nesterov", action=argparse.BooleanOptionalAction, help="Nesterov's momentum (default: off; rst: on)")
    add("--weight-decay", type=cli.natural_float, help="(default: 7e-4; cifar100 madry, trades 2e-4; rst, digits 5e-4)")
    add("--epsilon", type=cli.ratio, help="radius of the L-inf ball (default: 8/255; rst: 0.031; digits: 0.05)")
    add("--step-size", type=cli.ratio, help="of the attack (default: epsilon / 4; rst: 0.007)")
    add("--num-steps", type=cli.positive_int, help="of the attack (default: 10)")
    add("--random-start", choices=attacks.RANDOM_STARTS, help="of the attack (default: gaussian)")
    cli.add_runtime_flags(parser)
    add("--seed", type=cli.natural_int, help="(default: 1)")
    add("--out-dir", metavar="DIR", help="(default: runs/DATASET-ARCH-DEFENSE[-spatA]-sSEED)")
    add("--save-minutes", type=cli.natural_float, metavar="M", help="save this often, and after epochs (default: 10)")
    add("--resume", action="store_true", default=None, help="go on with the run in --out-dir where it stopped")
    return parser, {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}


def with_defaults(typed):
    """typed plus the defaults of its data set, defense and recipe; ValueError where flags contradict one another."""
    if "defense" not in typed:
        raise ValueError(f"--defense is required: {', '.join(OUTER)}")
    args, of = {}, (typed.get("dataset", "cifar10"), typed["defense"], typed.get("recipe", "mart"))
    for *when, defaults in DEFAULTS:
        if all(wanted in (None, value) for wanted, value in zip(when, of, strict=True)):
            args |= defaults
    args = argparse.Namespace(**args | typed)
    models.parse_arch(args.arch)
    first, second = typed.get("lr_milestones", (0, 0))
    for wrong, why in (
        (args.defense == "standard" and "spat_alpha" in typed, "--spat-alpha: standard training has no attack"),
        (args.defense in ("standard", "madry") and "beta" in typed, f"--beta: {args.defense} has no KL term"),
        (args.defense == "trades" and args.spat_alpha is None and args.random_start == "none",
         "--random-start none: KL(p(x) || p(x)) is 0 with gradient 0, the attack would not move"),
        (args.lr_schedule != "step" and first, f"--lr-milestones: --lr-schedule {args.lr_schedule} has none"),
        (first > second, f"--lr-milestones {first} {second} are out of order"),
        (args.nesterov and args.momentum == 0, "--nesterov needs a --momentum above 0"),
        (args.aux_data is None and "aux_fraction" in typed, "--aux-fraction goes with --aux-data"),
        (args.aux_data and args.aux_fraction and not 0 < round(args.aux_fraction * args.batch_size) < args.batch_size,
         f"--aux-fraction {args.aux_fraction} of --batch-size {args.batch_size} leaves one of the two sides no image"),
    ):
        if wrong:
            raise ValueError(why)
    first = max(2, math.ceil(args.epochs * 75 / 90))  # below 6 epochs: no first epoch, and no x0.01 before x0.1
    args.lr_milestones = typed.get("lr_milestones", [first, max(args.epochs, first + 1)])
    args.step_size = getattr(args, "step_size", str(Fraction(args.epsilon) / 4))
    if "out_dir" not in typed:
        spat = "" if args.spat_alpha is None else f"-spat{args.spat_alpha:g}"
        name = pathlib.Path(args.dataset).resolve().name if args.dataset not in data.NAMED else args.dataset
        args.out_dir = f"runs/{name}-{args.arch}-{args.defense}{spat}{'-aux' if args.aux_data else ''}-s{args.seed}"
    return args


def new_or_resumed(typed):
    """(arguments, None or the checkpoint to go on from); ValueError if a run would be overwritten, or altered."""
    if not typed.get("resume"):
        args = with_defaults(typed)
        if any(pathlib.Path(args.out_dir, name).exists() for name in ("last.pt", "last.prev.pt", "best.pt", "log.csv")):
            raise ValueError(f"--out-dir {args.out_dir} holds a run already: add --resume, or choose another")
        return args, None
    out_dir = typed.get("out_dir") or with_defaults(typed).out_dir
    state = rundir.load_run(out_dir)
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
    """The rate in the epoch, counted from 1, of which the share `progress` of the whole run is done.

    step: MART's, by epoch; cosine: RST's, lr/2·(1 + cos((epoch - 1)π / epochs)); onecycle: by step, linear from
    lr/25 up to lr over the first 30 %, then down along a cosine to 0.
    """
    if args.lr_schedule == "step":
        first, second = args.lr_milestones
        return args.lr * (0.01 if epoch >= second else 0.1 if epoch >= first else 1.0)
    if args.lr_schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos((epoch - 1) * math.pi / args.epochs))
    if progress < 0.3:
        return args.lr * (0.04 + 0.96 * progress / 0.3)
    return args.lr * 0.5 * (1 + math.cos((progress - 0.3) / 0.7 * math.pi))


def validate(model, forward, val, args):
    """Accuracy and mean cross entropy on the held-out images, a dict: natural and by eval_attacks.py's PGD-20."""
    epsilon = float(Fraction(args.epsilon))

    def pgd20(x, y, indices):
        start = attacks.start_per_image("uniform", x, epsilon, indices)
        return attacks.pgd(forward, x, y, losses.cross_entropy, epsilon=epsilon, step_size=epsilon / 10, num_steps=20,
                           random_start=start)

    row = dict.fromkeys(f"val_{name}_{what}" for name in ("natural", "robust") for what in ("accuracy", "loss"))
    rank, world = cli.rank_and_world()
    batch_size = args.batch_size // world  # the training step's, for which the model is compiled
    with models.frozen(model):
        for name, attack in (("natural", None), ("robust", pgd20)) if len(val.labels) else ():
            logits = cli.sum_over_processes(attacks.attacked_logits(
                model, val.images, val.labels, attack, batch_size, rank=rank, world=world))
            row[f"val_{name}_accuracy"] = (logits.argmax(1) == val.labels).float().mean().item()
            row[f"val_{name}_loss"] = losses.cross_entropy(logits, val.labels).mean().item()
    return row


def build_optimizer(model, args):
    return torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay,
                           nesterov=args.nesterov, fused=True)


def inner_maximisation(model, plain, forward, x, y, start, args):
    """x_adv, Eq. 10: PGD on the frozen model by `forward`, which gives KL its target as well. plain: not used."""
    objective, target = INNER[args.defense], y
    if args.spat_alpha is not None:
        objective = functools.partial(losses.lsce, alpha=args.spat_alpha)
    epsilon, step_size = float(Fraction(args.epsilon)), float(Fraction(args.step_size))
    with models.frozen(model):
        if objective is losses.kl_divergence:
            target = forward(x).float().softmax(1)  # no graph: neither x nor the frozen weights want a gradient
        return attacks.pgd(forward, x, target, objective, epsilon=epsilon, step_size=step_size,
                           num_steps=args.num_steps, random_start=start)


def outer_minimisation(both, optimizer, x, x_adv, y, args):
    """One step on the defense's loss, Eq. 4 -> (loss, logits_nat, logits_adv), None for logits that it does without."""
    both.train()
    logits_nat, logits_adv = both(None if args.defense == "madry" else x, x_adv)
    loss = OUTER[args.defense](logits_adv, logits_nat, y, args.beta)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # here: of CUDA graphs no gradient may outlive its own
    return loss.detach(), logits_nat, logits_adv


def train(args, state, train_set, val_set, device, stop=()):
    """The run from its first step, or from the checkpoint `state`, to its end or to the step in which `stop` fills.
    Rank 0 writes into args.out_dir. Returns whether the run is complete."""
    out_dir, (rank, world) = pathlib.Path(args.out_dir), cli.rank_and_world()
    mine = slice(rank * args.batch_size // world, (rank + 1) * args.batch_size // world)
    torch.manual_seed(args.seed)  # for the initial weights; every later draw is a function of (seed, step)
    model = models.build_model(args.arch, len(train_set.classes)).to(device)
    optimizer = build_optimizer(model, args)
    adversarial = args.defense != "standard"
    steps_per_epoch = math.ceil(len(train_set.labels) / args.batch_size)
    total_steps = args.epochs * steps_per_epoch
    aux = round(args.aux_fraction * args.batch_size) if args.aux_data else 0
    first_step, rows, best, sums = 0, [], -1.0, torch.zeros(6, device=device)
    if state is not None:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, rows, best, sums = state["step"], state["rows"], state["best"], state["sums"].to(device)
        if rank == 0 and state["on"] != [device.type, world]:
            print(f"resumed on {[device.type, world]}, was on {state['on']}: no longer equal to the bit")
    x = data.to_float(train_set.images[torch.arange(args.batch_size, device=device) % len(train_set.labels)][mine])
    passes_a_step = args.num_steps + 4 if adversarial else 2
    train_passes = 1 + (args.defense in ("trades", "mart"))
    plain, forward = cli.pick_forward(args, model, x, (total_steps - first_step) * passes_a_step, train_passes)
    both = models.BothPasses(model, forward)
    if world > 1:
        both = torch.nn.parallel.DistributedDataParallel(both, broadcast_buffers=False)

    def checkpoint(step):
        return {"format": checkpoints.FORMAT, "args": vars(args), "classes": train_set.classes,
                "epoch": step // steps_per_epoch, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
                "step": step, "rows": rows, "best": best, "sums": sums, "on": [device.type, world]}

    if rank == 0:
        rundir.begin(out_dir, state, checkpoint(0))  # so that from its first step on the run can be resumed
    bar = tqdm(total=total_steps * args.batch_size, initial=first_step * args.batch_size, unit="img", unit_scale=True,
               dynamic_ncols=True, mininterval=1.0, disable=rank > 0)
    saved, epoch_start, epoch_first_step = time.perf_counter(), time.perf_counter(), first_step

    for step in range(first_step, total_steps):
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0 or step == first_step:
            order = data.batches(len(train_set.labels), args.batch_size, args.seed, epoch, aux).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch + 1, step / total_steps)
        rng = data.step_generator(device, args.seed, step)  # it draws for all processes; each takes its part
        images, y = data.mixed(train_set, order[i], aux, rng)
        x = data.augment(images, rng)
        start = attacks.start_perturbation(args.random_start, x, float(Fraction(args.epsilon)), rng)
        x, y, start = x[mine], y[mine], start[mine]

        x_adv = inner_maximisation(model, plain, forward, x, y, start, args) if adversarial else None
        alpha = (args.spat_alpha or 0.0) if adversarial and i % SHARES_EVERY == 0 else None
        shares = rundir.shares(model, plain, x, x_adv, y, alpha)  # before the step, of the model that was attacked
        loss, logits_nat, logits_adv = outer_minimisation(both, optimizer, x, x_adv, y, args)
        cli.broadcast_buffers(model)

        counts = torch.cat([rundir.tally(loss, logits_nat, logits_adv, y), shares])
        sums += cli.sum_over_processes(counts) / world
        bar.update(args.batch_size)
        last_of_epoch, stop_now, save_now = i == steps_per_epoch - 1, False, False
        if last_of_epoch or step % READ_EVERY[device.type] == 0 or (stop and world == 1):  # several must agree when
            stop_now, save_now = cli.any_process(stop, time.perf_counter() - saved > 60 * args.save_minutes)
            mean_loss, _, robust = (sums[:3] / (i + 1)).tolist()
            if not math.isfinite(mean_loss):
                raise FloatingPointError(f"the loss is {mean_loss} by step {step + 1} of epoch {epoch + 1}, "
                                         f"lr {group['lr']:g}")
            bar.set_description(f"epoch {epoch + 1}/{args.epochs}", refresh=False)
            robust = f", robust {robust:.1%}" if adversarial else ""
            bar.set_postfix_str(f"loss {mean_loss:.3f}{robust}", refresh=False)

        if last_of_epoch:
            seconds = time.perf_counter() - epoch_start
            row = rundir.epoch_row(args, epoch + 1, group["lr"], sums.tolist(), steps_per_epoch)
            row |= validate(model, forward, val_set, args) | {"seconds": seconds}
            row["images_per_s"] = (step + 1 - epoch_first_step) * args.batch_size / seconds
            rows.append(row)
            sums.zero_()
            score = row["val_robust_accuracy" if adversarial else "val_natural_accuracy"]
            if is_best := score is not None and score >= best:  # of equals the later one, at a lower rate
                best = score
            if rank == 0:
                if is_best:
                    checkpoints.save(checkpoint(step + 1) | {"optimizer": None}, out_dir / "best.pt")
                rundir.write_log(out_dir, rows)
                bar.write(rundir.summary(rows, adversarial and args.epochs / 3, len(train_set.classes)))
            epoch_start, epoch_first_step = time.perf_counter(), step + 1
        if last_of_epoch or stop_now or save_now:
            if rank == 0:
                rundir.save_run(checkpoint(step + 1), out_dir)
            saved = time.perf_counter()
        if stop_now:
            break
    bar.close()
    return len(rows) == args.epochs


def main(argv=None):
    parser, typed = parse_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            args, state = new_or_resumed(typed)  # for all that can be wrong with the flags
            device, rank, world = stack.enter_context(cli.join_job(args.device))
            if args.batch_size % world:
                raise ValueError(f"--batch-size {args.batch_size} cannot be split evenly over {world} processes")
            dataset = data.load(args.dataset, args.data_dir, train=True)
            train_set, val_set = data.split(dataset, args.val_size, args.limit_train)
            if args.aux_data:
                train_set = data.pseudo_labelled(args.aux_data, checkpoints.load_arrays(args.aux_data), train_set)
            cli.any_process()  # nobody has found anything wrong
            out_dir = pathlib.Path(args.out_dir)
            if rank == 0:
                stack.enter_context(rundir.run_lock(out_dir))
                print(f"{args.dataset}: {len(train_set.labels)} images to train on, {len(val_set.labels)} held out")
            cli.any_process()  # the lock is held: until now another run may have saved there, or begun
            args, state = new_or_resumed(typed)
            cli.any_process()  # all have looked before one writes
        except (ValueError, OSError) as error:
            parser.error(error)
        stop = stack.enter_context(rundir.deferred_signals())
        try:
            complete = train(args, state, train_set.to(device), val_set.to(device), device, stop)
        except (FloatingPointError, *cli.FAULTS) as error:
            sys.exit(f"{parser.prog}: {error}; {rundir.there(out_dir)}")
        if rank == 0 and complete:
            print(f"python eval_attacks.py --model-path {out_dir / ('best.pt' if args.val_size else 'last.pt')}")
        elif rank == 0:
            print("stopped and saved; go on with\npython train_cifar.py --resume --out-dir", shlex.quote(args.out_dir))
        if not complete:
            sys.exit(128 + (stop[0] if stop else signal.SIGTERM))


if __name__ == "__main__":
    main()
