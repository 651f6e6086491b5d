"""Measure the speed of this repository's training step and evaluation against the textbook way of writing them.

    python bench.py --arch resnet-18 --defense mart

The textbook: float32 (on a GPU with TF32 in convolutions, torch's default), NCHW, eager, as the published MART and
TRADES code does it. Ours: at each level of --compile up to the one asked for. All do the same work on the same shapes,
one side after the other, each freed before the next. GPU time is that of the kernels, by torch.profiler.
"""

import functools
import gc
import statistics
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

import attacks
import eval_attacks
import losses
import models
import runtime
import train_cifar

LEVELS = {"off": "eager", "on": "compiled", "graphs": "graphs"}  # of --compile, each with those before it
WORK = "training step", "attack alone", "evaluation"


def parse_args(argv=None):
    parser = runtime.Parser(prog="bench.py", description=__doc__)
    add = parser.add_argument
    add("--arch", default="resnet-18", help="as of train_cifar.py")
    add("--defense", choices=("madry", "trades", "mart"), default="mart", help="as of train_cifar.py")
    add("--batch-size", type=runtime.positive_int, default=128, help="of the training step")
    add("--eval-batch-size", type=runtime.positive_int, default=256, help="of the PGD-20 evaluation")
    add("--num-steps", type=runtime.positive_int, default=10, help="of the training attack")
    add("--eval-steps", type=runtime.positive_int, default=20, help="of the evaluation's attack")
    add("--repeats", type=runtime.positive_int, default=5, help="timed repeats, after a call that is not counted")
    add("--json", metavar="FILE", help="write the result there (default: no file)")
    runtime.add_runtime_flags(parser, default="auto")
    args = parser.parse_args(argv)
    try:
        models.parse_arch(args.arch)
        runtime.check_output("--json", args.json)
        args.torch_device = runtime.pick_device(args.device)
    except ValueError as error:
        parser.error(error)
    return args


def main(argv=None):
    args = parse_args(argv)
    result = {"device": eval_attacks.device_name(args.torch_device), "torch": torch.__version__,
              "command": eval_attacks.command("bench.py", argv),
              "settings": {k: v for k, v in vars(args).items() if isinstance(v, str | int)}}
    args.precision, _ = runtime.pick_precision(args.precision, args.torch_device)
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # by default eager code is run, and timed
            result["rows"] = measure(args)
    except runtime.FAULTS as error:
        sys.exit(f"bench.py: {error}")
    print(f"{result['device']}, torch {torch.__version__}: {args.arch}, {args.defense}, batch {args.batch_size}, "
          f"PGD-{args.num_steps}; evaluation PGD-{args.eval_steps}, batch {args.eval_batch_size}")
    print(table(result["rows"]))
    eval_attacks.write(args.json, result)
    return result


def measure(args):
    """Time one side after the other; return a list of rows, one for each side and work."""
    rows, todo = [], sides_of(args)
    with tqdm(total=len(todo) * len(WORK), unit="row", dynamic_ncols=True) as bar:
        for build in todo:
            name, arithmetic, works = build()
            with runtime.tf32_convolutions(arithmetic == "tf32"):
                for work in WORK:
                    bar.set_description(f"{name}: {work}")
                    rows.append(time_row(args, name, work, works[work]))
                    bar.update()
            del works
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()  # on a CPU this does nothing
    of_textbook = {row["work"]: row["images_per_s"] for row in rows if row["side"] == "textbook"}
    for row in rows:
        row["ratio"] = row["images_per_s"] / of_textbook[row["work"]]
    return rows


def time_row(args, side, work, function):
    """Return the row of one work of one side. On a GPU a repeat is ten calls in a row, as in training, where nothing
    waits for it between two steps."""
    device, calls = args.torch_device, 10 if args.torch_device.type == "cuda" else 1
    images = args.eval_batch_size if work == "evaluation" else args.batch_size
    function()
    seconds = [runtime.timed(lambda: [function() for _ in range(calls)], device) / calls for _ in range(args.repeats)]
    row = {"side": side, "work": work, "seconds": seconds, "images_per_s": images / statistics.median(seconds)}
    if device.type == "cuda":
        row["gpu_seconds"] = gpu_seconds(function)
        row["gpu_busy"] = row["gpu_seconds"] / statistics.median(seconds)
    if work == "training step":
        row["hours_of_90_epochs"] = 90 * 50_000 / row["images_per_s"] / 3600
    return row


def gpu_seconds(function):
    """Return how long the kernels of one call take."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.time_range.elapsed_us() for event in events if not event.name.startswith("Optimizer")) / 1e6


def table(rows):
    """Return the rows as text, for the screen."""
    lines = [f"{'work':<15}{'side':<20}{'images/s':>10}{'ratio':>8}{'seconds':>22}{'GPU time':>11}{'GPU busy':>10}"]
    for row in sorted(rows, key=lambda row: WORK.index(row["work"])):
        line = f"{row['work']:<15}{row['side']:<20}{row['images_per_s']:>10.1f}{row['ratio']:>8.2f}"
        line += f"{min(row['seconds']):>11.4g} -{max(row['seconds']):>9.4g}"
        if "gpu_seconds" in row:
            line += f"{row['gpu_seconds']:>11.4g}{row['gpu_busy']:>10.0%}"
        lines.append(line)
    return "\n".join(lines + [f"{row['side']}: 90 epochs of this take {row['hours_of_90_epochs']:.1f} hours"
                              for row in rows if "hours_of_90_epochs" in row])


# The sides. Each builds (its name, its arithmetic, {name of the work: function without arguments}). -------------------


def sides_of(args):
    """Return the functions that build the sides to be timed."""
    auto = "graphs" if args.torch_device.type == "cuda" else "on"
    last = auto if args.compile in ("auto", "graphs") else args.compile  # a CPU has no CUDA graphs
    levels = list(LEVELS)[: list(LEVELS).index(last) + 1]
    sides = [functools.partial(textbook, args)]
    if args.precision == "bf16":
        sides.append(functools.partial(ours, args, "fp32", levels[-1]))
    return sides + [functools.partial(ours, args, args.precision, level) for level in levels]


def batch(args, size, layout):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(size, 3, 32, 32, generator=g), torch.randint(10, (size,), generator=g)
    return x.to(args.torch_device, memory_format=layout), y.to(args.torch_device)


def textbook(args):
    """Build the side of the published TRADES and MART code."""
    model = models.build_model(args.arch).to(args.torch_device, memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=7e-4)
    x, y = batch(args, args.batch_size, torch.contiguous_format)
    x_eval, y_eval = batch(args, args.eval_batch_size, torch.contiguous_format)

    def move(x_adv, gradient, x, step_size):
        x_adv = x_adv.detach() + step_size * gradient.sign()
        return torch.min(torch.max(x_adv, x - 8 / 255), x + 8 / 255).clamp(0, 1)

    def attack():
        model.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(args.num_steps):
            x_adv = x_adv.detach().requires_grad_()
            if args.defense == "trades":  # p(x) is computed again at every step
                objective = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")
            else:
                objective = F.cross_entropy(model(x_adv), y)
            x_adv = move(x_adv, torch.autograd.grad(objective, x_adv)[0], x, 2 / 255)
        model.train()
        return x_adv.detach()

    def step():
        x_adv = attack()
        optimizer.zero_grad()
        if args.defense == "madry":
            loss = F.cross_entropy(model(x_adv), y)
        elif args.defense == "trades":  # three forward passes: the natural one is run again for the KL term
            p, log_p_adv = F.softmax(model(x), 1), F.log_softmax(model(x_adv), 1)
            loss = F.cross_entropy(model(x), y) + 6 * F.kl_div(log_p_adv, p, reduction="batchmean")
        else:
            loss = losses.mart_loss(model(x_adv), model(x), y, 5.0)
        loss.backward()
        optimizer.step()

    def evaluation():
        model.eval()
        x_adv = x_eval + torch.empty_like(x_eval).uniform_(-8 / 255, 8 / 255)
        for _ in range(args.eval_steps):
            x_adv = x_adv.detach().requires_grad_()
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y_eval).backward()  # computes every weight's gradient too
            x_adv = move(x_adv, x_adv.grad, x_eval, 0.8 / 255)
        with torch.no_grad():
            (model(x_adv).argmax(1) == y_eval).sum().item()

    # torch's default, with which the published code runs; runtime.pick_device turns it off
    arithmetic = "tf32" if args.torch_device.type == "cuda" else "fp32"
    return "textbook", arithmetic, {"training step": step, "attack alone": attack, "evaluation": evaluation}


def ours(args, precision, level):
    """Build a side of the functions that train_cifar.py and eval_attacks.py call. An evaluation in float32 crafts with
    TF32, as theirs on a GPU does."""
    model = models.build_model(args.arch).to(args.torch_device)
    train_args = train_cifar.with_defaults({k: vars(args)[k] for k in ("defense", "arch", "num_steps", "batch_size")})
    optimizer = train_cifar.build_optimizer(model, train_args)
    x, y = batch(args, args.batch_size, torch.channels_last)
    x_eval, y_eval = batch(args, args.eval_batch_size, torch.channels_last)
    pixels, plain = x_eval.mul(255).byte(), runtime.plain_pass(model, precision)
    # strict: what cannot be recorded is no row of "graphs"
    forward, forward_eval = (runtime.fast_pass(model, plain, like, level, strict=True) for like in (x, x_eval))
    update = attacks.recorded(forward, functools.partial(train_cifar.forward_backward, model, forward, args=train_args))

    def attack():
        start = attacks.start_perturbation("gaussian", x, 8 / 255)
        return train_cifar.inner_maximisation(model, forward, x, y, start, train_args)

    def step():
        update(x, attack(), y)
        optimizer.step()

    def pgd(x, y, indices):
        with runtime.tf32_convolutions(True):
            return attacks.pgd(forward_eval, x, y, losses.cross_entropy, epsilon=8 / 255, step_size=0.8 / 255,
                               num_steps=args.eval_steps)

    def evaluation():
        with models.frozen(model):
            eval_attacks.attacked_logits(model, pixels, y_eval, pgd, args.eval_batch_size)

    name = f"ours, {precision} {LEVELS[level]}"
    return name, precision, {"training step": step, "attack alone": attack, "evaluation": evaluation}


if __name__ == "__main__":
    main()
