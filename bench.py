"""Measure the speed of this repository's training step and evaluation against the textbook way of writing them.

    python bench.py --arch resnet-18 --defense mart

The textbook: float32 (on a GPU with TF32 in convolutions, torch's default), NCHW, eager, as the published MART and
TRADES code does it. Ours: eager, compiled, and on a GPU with CUDA graphs. All do the same work on the same shapes, on a
GPU in cuDNN's benchmark mode; repeats are interleaved, so that a machine that drifts is fair to all.
"""

import concurrent.futures
import functools
import multiprocessing
import pathlib
import re
import statistics

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import attacks
import eval_attacks
import losses
import models
import runtime
import train_cifar

LEVELS = {"off": "eager", "on": "compiled", "graphs": "graphs"}  # of --compile, each with those before it


def parse_args(argv=None):
    parser = runtime.Parser(prog="bench.py", description=__doc__)
    add = parser.add_argument
    add("--arch", default="resnet-18", help="as of train_cifar.py")
    add("--defense", choices=("madry", "trades", "mart"), default="mart", help="as of train_cifar.py")
    add("--batch-size", type=runtime.positive_int, default=128, help="of the training step")
    add("--eval-batch-size", type=runtime.positive_int, default=256, help="of the PGD-20 evaluation")
    add("--num-steps", type=runtime.positive_int, default=10, help="of the training attack")
    add("--eval-steps", type=runtime.positive_int, default=20, help="of the evaluation's attack")
    add("--repeats", type=runtime.positive_int, default=5, help="timed repeats, after one that is not counted")
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
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # by default eager code is run, and timed
        result |= measure(args)
    print(f"{result['device']}, torch {torch.__version__}: {args.arch}, {args.defense}, batch {args.batch_size}, "
          f"PGD-{args.num_steps}; evaluation PGD-{args.eval_steps}, batch {args.eval_batch_size}")
    print(table(result))
    eval_attacks.write(args.json, result)
    return result


def measure(args):
    """Time all sides in turn; return the result as a dict."""
    sides, needed, device = sides_of(args), flops(args), args.torch_device
    built = {side: build() for side, (build, _) in sides.items()}
    rates = {kind: matrix_product_rate(device, kind) for kind in dict.fromkeys(kind for _, kind in sides.values())}
    warm_up = 2 if device.type == "cuda" else 1  # the second call records the CUDA graphs
    times = {(side, work): [] for side in sides for work in needed}
    with tqdm(total=len(times) * (warm_up + args.repeats), unit="run", dynamic_ncols=True) as bar:
        for _ in range(warm_up + args.repeats):
            for side, work in times:
                bar.set_description(f"{side}: {work}")
                torch.backends.cudnn.allow_tf32 = sides[side][1] == "tf32"
                times[side, work].append(runtime.timed(built[side][0][work], device))
                bar.update()
    torch.backends.cudnn.allow_tf32 = False
    rows, hours = [], {}
    for side, work in times:
        textbook, seconds = times["textbook", work][warm_up:], times[side, work][warm_up:]
        ratios = [theirs / mine for theirs, mine in zip(textbook, seconds, strict=True)]
        median = statistics.median(seconds)
        images = args.eval_batch_size if work == "evaluation" else args.batch_size
        rows.append({"work": work, "side": side, "seconds": seconds, "images_per_s": images / median,
                     "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
                     "gflop_per_s": needed[work] / median / 1e9,
                     "share_of_matrix_product": needed[work] / median / rates[sides[side][1]]})
        if work == "training step":
            hours[side] = 90 * 50_000 * median / images / 3600
    return {"rows": rows, "matrix_product_gflop_per_s": {kind: rate / 1e9 for kind, rate in rates.items()},
            "how": {side: how for side, (_, how) in built.items()},
            "peak_memory_bytes": {side: peak_memory(args, side) for side in sides}, "hours_of_90_epochs": hours}


def table(result):
    """Return the result as text, for the screen."""
    lines = [f"{'work':<15}{'side':<20}{'images/s':>10}{'ratio':>8}{'range':>14}{'GFLOP/s':>10}{'of product':>12}"]
    for row in sorted(result["rows"], key=lambda row: row["work"], reverse=True):
        spread = "{:.2f}-{:.2f}".format(*row["ratio_range"])
        lines.append(f"{row['work']:<15}{row['side']:<20}{row['images_per_s']:>10.1f}{row['ratio']:>8.2f}"
                     f"{spread:>14}{row['gflop_per_s']:>10.0f}{row['share_of_matrix_product']:>12.0%}")
    for side, how in result["how"].items():
        memory, hours = result["peak_memory_bytes"][side] / 2**20, result["hours_of_90_epochs"][side]
        lines.append(f"{side}: {how}; peak memory of a step {memory:.0f} MiB, 90 epochs of this take {hours:.1f} hours")
    rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in result["matrix_product_gflop_per_s"].items())
    return "\n".join([*lines, f"matrix product in the same run, GFLOP/s: {rates}"])


# The sides. Each builds ({name of the work: function without arguments}, how it runs). --------------------------------


def sides_of(args):
    """Return {name of the side: (function that builds it, its arithmetic)}."""
    cuda = args.torch_device.type == "cuda"
    # torch's default, which pick_device turns off, and with which the published code runs, is TF32 in convolutions
    sides = {"textbook": (functools.partial(textbook, args), "tf32" if cuda else "fp32")}
    last = args.compile
    if last == "auto":
        last = "graphs" if cuda else "on"
    levels = list(LEVELS)[: list(LEVELS).index(last) + 1]
    todo = [(args.precision, level) for level in levels]
    if args.precision == "bf16":
        todo.insert(0, ("fp32", levels[:2][-1]))  # at the best level that both devices have
    for precision, level in todo:
        sides[f"ours, {precision} {LEVELS[level]}"] = (functools.partial(ours, args, precision, level), precision)
    return sides


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

    return {"training step": step, "attack alone": attack, "evaluation": evaluation}, "eager"


def ours(args, precision, level):
    """Build a side of this repository, of the functions that train_cifar.py and eval_attacks.py call."""
    model = models.build_model(args.arch).to(args.torch_device)
    train_args = train_cifar.with_defaults({k: vars(args)[k] for k in ("defense", "arch", "num_steps", "batch_size")})
    optimizer = train_cifar.build_optimizer(model, train_args)
    x, y = batch(args, args.batch_size, torch.channels_last)
    x_eval, y_eval = batch(args, args.eval_batch_size, torch.channels_last)
    pixels, eager = x_eval.mul(255).byte(), runtime.plain_pass(model, precision)
    forward, level, words = runtime.fast_pass(model, eager, x, level, 1 if args.defense == "madry" else 2)

    def attack():
        start = attacks.start_perturbation("gaussian", x, 8 / 255)
        return train_cifar.inner_maximisation(model, forward, x, y, start, train_args)

    def step():
        train_cifar.forward_backward(model, forward, x, attack(), y, train_args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def pgd(x, y, indices):
        return attacks.pgd(forward, x, y, losses.cross_entropy, epsilon=8 / 255, step_size=0.8 / 255,
                           num_steps=args.eval_steps)

    def evaluation():
        with models.frozen(model):
            eval_attacks.attacked_logits(model, pixels, y_eval, pgd, args.eval_batch_size)

    return {"training step": step, "attack alone": attack, "evaluation": evaluation}, "; ".join([LEVELS[level], *words])


def flops(args):
    """Return {name of the work: FLOP}, by torch's counter. What the textbook does beyond it is not counted: weight
    gradients in an attack, a third forward pass."""
    model, x, y = models.build_model(args.arch), torch.rand(2, 3, 32, 32), torch.tensor([0, 1])

    def count(of_attack):
        model.requires_grad_(not of_attack)
        with FlopCounterMode(display=False) as counter:  # it cannot follow autograd.grad, hence backward
            F.cross_entropy(model(x.clone().requires_grad_(of_attack)), y).backward()
        return counter.get_total_flops() / len(x)

    attack_pass, update_pass = count(of_attack=True), count(of_attack=False)
    attack = args.batch_size * args.num_steps * attack_pass
    update = args.batch_size * update_pass * (1 if args.defense == "madry" else 2)
    return {"training step": attack + update, "attack alone": attack,
            "evaluation": args.eval_batch_size * (args.eval_steps + 1 / 2) * attack_pass}


def matrix_product_rate(device, kind):
    """Return the FLOP/s of a square matrix product in fp32, tf32 or bf16, the best of several."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    rate = 2 * size**3 / runtime.shortest_seconds(lambda: a @ b, device, repeats=10)
    torch.backends.cuda.matmul.allow_tf32 = False
    return rate


def peak_memory(args, side):
    """Return the bytes at the peak of two training steps: of the GPU, or of a process of its own on a CPU."""
    if args.torch_device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # by the models that were timed
        two_steps(args, side)
        return torch.cuda.max_memory_allocated() - before
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        # not getrusage's ru_maxrss, which a new process inherits from the one that started it
        status = pool.submit(two_steps, args, side).result()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def two_steps(args, side):
    """Run two training steps of a side; return what Linux says of this process then."""
    step = sides_of(args)[side][0]()[0]["training step"]
    step(), step()
    return pathlib.Path("/proc/self/status").read_text()


if __name__ == "__main__":
    main()
