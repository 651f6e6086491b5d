"""Train an image classifier: standard, Madry, TRADES or MART, each of the last three with or without SPAT.

    python train_cifar.py --defense mart --spat-alpha 0.3                     # MART + SPAT at the paper's setting
    python train_cifar.py --defense mart --spat-alpha 0.3 --dataset digits    # a minute or two on two CPU cores
    python train_cifar.py --resume --out-dir runs/NAME                        # go on where it stopped

--defense picks the loss that the training step minimises. The attack maximises that method's usual objective, or, with
--spat-alpha A, the label-smoothed cross entropy with α = A (SPAT, Eq. 10). Nothing else knows of SPAT.
"""

import argparse
import contextlib
import functools
import math
import pathlib
import signal
import sys
from fractions import Fraction

import torch

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
    parser = cli.Parser(prog="train_cifar.py", description=__doc__)

    def group(title):
        def add(flag, help, **settings):
            default = default_words(flag.removeprefix("--").replace("-", "_"))
            flags.add_argument(flag, help=help + (f" (default: {default})" if default else ""), **settings)
        flags = parser.add_argument_group(title)
        return add

    add = group("what to train")
    add("--defense", "minimise this method's loss; required for a new run", choices=OUTER)
    add("--spat-alpha", "SPAT: attack by LSCE with this α in [0, 1]; without it by CE for madry and mart, by KL for "
        "trades", type=cli.unit_float, metavar="A")
    add("--beta", "weight of the KL term", type=cli.natural_float, metavar="B")
    add("--arch", f"architecture, one of {models.ARCHS}")
    add("--recipe", "whose defaults to take: MART's, or RST's for --aux-data", choices=("mart", "rst"))
    add("--seed", "seed of the first weights and of every draw", type=cli.natural_int)
    add = group("data")
    add("--dataset", f"{', '.join(data.NAMED)}, or a folder with train/CLASS/*.png and test/CLASS/*.png")
    add("--data-dir", "where CIFAR is, or is downloaded to", metavar="DIR")
    add("--val-size", "hold out N images to choose best.pt; 0: only last.pt", type=cli.natural_int, metavar="N")
    add("--limit-train", "train on the first N images only", type=cli.positive_int, metavar="N")
    add("--aux-data", "pseudo-labelled images to train on as well: RST's pickle, or pseudo_label.py's", metavar="FILE")
    add("--aux-fraction", "their share of each batch", type=cli.fraction_below_one, metavar="F")
    add = group("optimiser")
    add("--epochs", "how often each image is seen", type=cli.positive_int, metavar="N")
    add("--batch-size", "images a step, of all processes together", type=cli.positive_int, metavar="N")
    add("--lr", "highest learning rate", type=cli.positive_float)
    add("--lr-schedule", "how the rate falls", choices=("step", "cosine", "onecycle"))
    add("--lr-milestones", "the first epochs, from 1, at lr x0.1 and x0.01 of schedule step; without it 75/90 of the "
        "epochs and the last one", type=cli.positive_int, nargs=2, metavar="EPOCH")
    add("--momentum", "momentum of SGD", type=cli.unit_float, metavar="M")
    add("--nesterov", "take Nesterov's momentum", action=argparse.BooleanOptionalAction)
    add("--weight-decay", "weight decay of SGD", type=cli.natural_float, metavar="W")
    add = group("attack")
    add("--epsilon", "radius of the L-inf ball", type=cli.ratio, metavar="E")
    add("--step-size", "step of the attack; without it epsilon / 4", type=cli.ratio, metavar="S")
    add("--num-steps", "steps of the attack", type=cli.positive_int, metavar="N")
    add("--random-start", "where the attack starts", choices=attacks.RANDOM_STARTS)
    cli.add_runtime_flags(parser)
    add = group("output")
    add("--out-dir", "directory of the run; without it runs/DATASET-ARCH-DEFENSE[-spatA]-sSEED", metavar="DIR")
    add("--save-minutes", "save this often, and after every epoch", type=cli.natural_float, metavar="M")
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
    eager, fast = cli.forward_passes(args, run.model, x, passes, 1 + (args.defense in ("trades", "mart")), SMALLER)
    both = models.BothPasses(run.model, fast)
    if run.world > 1:
        both = torch.nn.parallel.DistributedDataParallel(both, broadcast_buffers=False)
    return eager, fast, both


def training_batch(args, train_set, indices, step):
    """(x, y, the attack's start) of one step, augmented; of several processes each takes its part of what is drawn."""
    rng = data.step_generator(train_set.images.device, args.seed, step)
    images, y = data.mixed(train_set, indices, aux_images(args), rng)
    x = data.augment(images, rng, train_set.mirror)
    start = attacks.start_perturbation(args.random_start, x, float(Fraction(args.epsilon)), rng)
    rank, world = cli.rank_and_world()
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
    run = rundir.Run(args, model, build_optimizer(model, args), train_set, state)
    eager, fast, both_passes = training_passes(run, train_set)
    if cli.any_process(stop)[0]:  # while compiling, which the signal may have broken: the directory is left as it was
        return False
    with run.prepare_directory(state), contextlib.suppress(rundir.Stopped):
        for epoch in range(run.step // run.steps_per_epoch, args.epochs):
            order = data.batches(len(train_set.labels), args.batch_size, args.seed, epoch, aux_images(args)).to(device)
            for indices in order[run.step % run.steps_per_epoch :]:
                run.pause(stop)
                run.set_rate(learning_rate(args, epoch + 1, run.step / run.total_steps))
                x, y, start = training_batch(args, train_set, indices, run.step)
                x_adv = inner_maximisation(model, rundir.stoppable(fast, stop), x, y, start, args)
                shares = rundir.sampled_shares(run, eager, x, x_adv, y)  # of the model that was attacked
                loss, logits_nat, logits_adv = outer_minimisation(both_passes, run.optimizer, x, x_adv, y, args)
                cli.broadcast_buffers(model)
                run.count(torch.cat([rundir.tally(loss, logits_nat, logits_adv, y), shares]))
            run.end_epoch(fast, val_set)
        return True
    run.save()
    return False


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
            cli.barrier()  # nobody has found anything wrong
            if rank == 0:
                stack.enter_context(rundir.run_lock(args.out_dir))
                print(f"{args.dataset}: {len(train_set.labels)} images to train on, {len(val_set.labels)} held out")
            cli.barrier()  # the lock is held: until now another run may have saved there, or begun
            args, state = new_or_resumed(typed)
            cli.barrier()  # all have looked before one writes
        except (ValueError, OSError) as error:
            parser.error(error)
        stop = stack.enter_context(rundir.deferred_signals(rundir.STOPPING if rank == 0 else ""))
        try:
            complete = train(args, state, train_set.to(device), val_set.to(device), device, stop)
        except (FloatingPointError, *cli.FAULTS) as error:
            sys.exit(f"{parser.prog}: {error}; {rundir.describe_checkpoints(args.out_dir)}")
        if rank == 0:
            print(rundir.what_next(args, complete))
        if not complete:
            sys.exit(128 + (stop[0] if stop else signal.SIGTERM))


if __name__ == "__main__":
    main()
