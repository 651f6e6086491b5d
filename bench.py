"""Speed of this repository's training step and evaluation against the textbook way of writing them.

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
import time
from argparse import Namespace

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
    add("--arch", default="resnet-18", help="(default: resnet-18)")
    add("--defense", choices=("madry", "trades", "mart"), default="mart", help="(default: mart)")
    add("--batch-size", type=runtime.positive_int, default=128, help="of the training step (default: 128)")
    add("--eval-batch-size", type=runtime.positive_int, default=256, help="of the PGD-20 evaluation (default: 256)")
    add("--num-steps", type=runtime.positive_int, default=10, help="of the training attack (default: 10)")
    add("--eval-steps", type=runtime.positive_int, default=20, help="of the evaluation's attack (default: 20)")
    add("--repeats", type=runtime.positive_int, default=5, help="timed repeats, after one that is not counted (default: 5)")
    add("--scaling", action="store_true", help="images/s against batch size, width and steps instead of the comparison")
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


# The textbook. ------------------------------------------------------------------------------------------------------


def textbook_attack(model, x, y, defense, num_steps):
    """PGD as the training code of TRADES and MART writes it; TRADES' recomputes p(x) at every step."""
    model.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(num_steps):
        x_adv = x_adv.detach().requires_grad_()
        if defense == "trades":
            objective = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")
        else:
            objective = F.cross_entropy(model(x_adv), y)
        gradient = torch.autograd.grad(objective, [x_adv])[0]
        x_adv = x_adv.detach() + 2 / 255 * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - 8 / 255), x + 8 / 255).clamp(0, 1)
    model.train()
    return x_adv.detach()


def textbook_update(model, optimizer, x, x_adv, y, defense):
    optimizer.zero_grad()
    if defense == "madry":
        loss = F.cross_entropy(model(x_adv), y)
    elif defense == "trades":  # three forward passes: the natural one is run again for the KL term
        p, p_adv = F.softmax(model(x), 1), F.log_softmax(model(x_adv), 1)
        loss = F.cross_entropy(model(x), y) + 6 * F.kl_div(p_adv, p, reduction="batchmean")
    else:
        loss = losses.mart_loss(model(x_adv), model(x), y, 5.0)
    loss.backward()
    optimizer.step()


def textbook_evaluation(model, optimizer, x, y, num_steps):
    """PGD as the evaluation code of TRADES and MART writes it: backward() computes every weight's gradient too."""
    x_adv = x + torch.empty_like(x).uniform_(-8 / 255, 8 / 255)
    for _ in range(num_steps):
        x_adv = x_adv.detach().requires_grad_()
        optimizer.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        x_adv = x_adv.detach() + 0.8 / 255 * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - 8 / 255), x + 8 / 255).clamp(0, 1)
    with torch.no_grad():
        return (model(x_adv).argmax(1) == y).sum().item()


# The two sides, as functions without arguments. ---------------------------------------------------------------------


def batch(args, size, layout):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(size, 3, 32, 32, generator=g), torch.randint(10, (size,), generator=g)
    return x.to(args.torch_device, memory_format=layout), y.to(args.torch_device)


def textbook(args):
    """({name: function} of the textbook's training step, its attack alone, and its PGD evaluation; how it runs)."""
    model = models.build_model(args.arch).to(args.torch_device, memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=7e-4)
    x, y = batch(args, args.batch_size, torch.contiguous_format)
    x_eval, y_eval = batch(args, args.eval_batch_size, torch.contiguous_format)

    def attack():
        return textbook_attack(model, x, y, args.defense, args.num_steps)

    def step():
        textbook_update(model, optimizer, x, attack(), y, args.defense)

    def evaluation():
        model.eval()
        textbook_evaluation(model, optimizer, x_eval, y_eval, args.eval_steps)

    return {"training step": step, "attack alone": attack, "evaluation": evaluation}, "eager"


def ours(args, precision, level):
    """The same of this repository, by the functions that train_cifar.py and eval_attacks.py call; level: --compile."""
    model = models.build_model(args.arch).to(args.torch_device)
    train_args = train_cifar.with_defaults({k: vars(args)[k] for k in ("defense", "arch", "num_steps", "batch_size")})
    optimizer = train_cifar.build_optimizer(model, train_args)
    x, y = batch(args, args.batch_size, torch.channels_last)
    x_eval, y_eval = batch(args, args.eval_batch_size, torch.channels_last)
    pixels = x_eval.mul(255).byte()
    eager = runtime.forward_pass(model, precision)
    forward, level, words = runtime.fast_pass(model, eager, x, level, 1 + (args.defense != "madry"))
    both = runtime.BothPasses(model, forward)

    def attack():
        start = attacks.start_perturbation("gaussian", x, 8 / 255)
        return train_cifar.inner_maximisation(model, forward, x, y, start, train_args)

    def step():
        train_cifar.outer_minimisation(both, optimizer, x, attack(), y, train_args)

    def pgd(x, y, indices):
        return attacks.pgd(forward, x, y, losses.cross_entropy, epsilon=8 / 255, step_size=0.8 / 255,
                           num_steps=args.eval_steps)

    def evaluation():
        with models.frozen(model):
            eval_attacks.attacked_logits(model, pixels, y_eval, pgd, args.eval_batch_size)

    return {"training step": step, "attack alone": attack, "evaluation": evaluation}, "; ".join([LEVELS[level], *words])


# Measuring. -----------------------------------------------------------------------------------------------------------


def flops(args):
    """The operations that the work needs, by torch's counter: {name: FLOP}. Nothing that the textbook does beyond it
    (weight gradients in an attack, a third forward pass) is counted."""
    model = models.build_model(args.arch)
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])

    def count(frozen):
        inputs = x.clone().requires_grad_(frozen)
        for parameter in model.parameters():
            parameter.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:  # it cannot follow autograd.grad, hence backward
            F.cross_entropy(model(inputs), y).backward()
        return counter.get_total_flops() / len(x)

    attack_pass, update_pass = count(frozen=True), count(frozen=False)
    attack = args.batch_size * args.num_steps * attack_pass
    update = args.batch_size * update_pass * (1 if args.defense == "madry" else 2)
    return {"training step": attack + update, "attack alone": attack,
            "evaluation": args.eval_batch_size * (args.eval_steps + 1 / 2) * attack_pass}


def matrix_product_rate(device, name, size=2048):
    """FLOP/s of a square matrix product in fp32, tf32 or bf16, the best of several: what the hardware can do."""
    size = 8192 if device.type == "cuda" else size
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    rate = 2 * size**3 / runtime.seconds(lambda: a @ b, device, repeats=10)
    torch.backends.cuda.matmul.allow_tf32 = False
    return rate


def sides_of(args):
    """{name: (constructor of the functions, its arithmetic)}"""
    cuda = args.torch_device.type == "cuda"
    # torch's default, which pick_device turns off, and with which the published code runs, is TF32 in convolutions
    sides = {"textbook": (lambda: textbook(args), "tf32" if cuda else "fp32")}
    last = ("graphs" if cuda else "on") if args.compile == "auto" else args.compile
    levels = list(LEVELS)[: list(LEVELS).index(last) + 1]
    float32 = [("fp32", levels[:2][-1])] if args.precision == "bf16" else []  # at the best level of both devices
    for precision, level in float32 + [(args.precision, level) for level in levels]:
        sides[f"ours, {precision} {LEVELS[level]}"] = (functools.partial(ours, args, precision, level), precision)
    return sides


def peak_memory(args, name):
    """Bytes at the peak of two training steps of one side: of the GPU, or of a process of its own on a CPU."""
    if args.torch_device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # by the models that were timed
        step = sides_of(args)[name][0]()[0]["training step"]
        step(), step()
        return torch.cuda.max_memory_allocated() - before
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_of_this_process, args, name).result()


def _peak_of_this_process(args, name):
    step = sides_of(args)[name][0]()[0]["training step"]
    step(), step()
    # not getrusage's ru_maxrss, which a new process inherits from the one that started it
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def compare(args):
    """Time all sides in turn -> the result as a dict."""
    sides, needed = sides_of(args), flops(args)
    built, first = {}, {}
    for side, (build, _) in sides.items():
        start = time.perf_counter()
        built[side] = build()
        first[side] = time.perf_counter() - start
    rates = {of: matrix_product_rate(args.torch_device, of) for of in dict.fromkeys(of for _, of in sides.values())}
    times = {(side, name): [] for side in sides for name in needed}
    warm_up = 2 if args.torch_device.type == "cuda" else 1  # the second call records the CUDA graphs
    with tqdm(total=len(times) * (args.repeats + warm_up), unit="run", dynamic_ncols=True) as bar:
        for repeat in range(args.repeats + warm_up):
            for side, name in times:
                bar.set_description(f"{side}: {name}")
                torch.backends.cudnn.allow_tf32 = sides[side][1] == "tf32"
                seconds = runtime.timed(built[side][0][name], args.torch_device)
                if repeat >= warm_up:
                    times[side, name].append(seconds)
                else:
                    first[side] += seconds
                bar.update()
    rows = []
    for (side, name), seconds in times.items():
        median = statistics.median(seconds)
        ratios = [a / b for a, b in zip(times["textbook", name], seconds, strict=True)]
        images = args.eval_batch_size if name == "evaluation" else args.batch_size
        rows.append({
            "work": name, "side": side, "seconds": seconds, "images_per_s": images / median,
            "ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
            "gflop_per_s": needed[name] / median / 1e9,
            "share_of_matrix_product": needed[name] / median / rates[sides[side][1]]})
    torch.backends.cudnn.allow_tf32 = False
    extra = {side: first[side] - warm_up * sum(statistics.median(times[side, of]) for of in needed) for side in sides}
    memory = {side: peak_memory(args, side) for side in sides}
    hours = {row["side"]: 90 * 50_000 / row["images_per_s"] / 3600 for row in rows if row["work"] == "training step"}
    return {"rows": rows, "matrix_product_gflop_per_s": {k: v / 1e9 for k, v in rates.items()},
            "how": {side: how for side, (_, how) in built.items()}, "compile_and_warm_up_seconds": extra,
            "peak_memory_bytes": memory, "hours_of_90_epochs": hours}


def scaling(args):
    """Images/s of the training step against batch size, width and attack steps, one varied at a time."""
    points = [("batch size", n, {"batch_size": n}) for n in (32, 64, 128, 256, 512)]
    points += [("width", w, {"arch": f"wrn-16-{w}"}) for w in (1, 2, 4)]
    points += [("attack steps", k, {"num_steps": k}) for k in (1, 2, 5, 10, 20)]
    rows, level = [], "off" if args.compile == "auto" else args.compile
    for what, value, change in tqdm(points, unit="point", dynamic_ncols=True):
        point = Namespace(**vars(args) | {"eval_batch_size": 1} | change)
        torch.compiler.reset()  # gives back what the point before it compiled
        work, how = ours(point, args.precision, level)
        seconds = runtime.seconds(work["training step"], args.torch_device, repeats=args.repeats)
        rows.append({"varied": what, "value": value, "seconds": seconds, "images_per_s": point.batch_size / seconds,
                     "gflop_per_s": flops(point)["training step"] / seconds / 1e9, "how": how})
    return {"rows": rows, "precision": args.precision, "compile": level}


def table(result):
    if result["scaling"]:
        lines = [f"{'varied':<14}{'value':>6}{'seconds':>10}{'images/s':>10}{'GFLOP/s':>10}  how"]
        for row in result["rows"]:
            lines.append(f"{row['varied']:<14}{row['value']:>6}{row['seconds']:>10.3f}{row['images_per_s']:>10.1f}"
                         f"{row['gflop_per_s']:>10.0f}  {row['how']}")
        return "\n".join(lines)
    lines = [f"{'work':<15}{'side':<20}{'images/s':>10}{'ratio':>8}{'range':>14}{'GFLOP/s':>10}{'of product':>12}"]
    for row in sorted(result["rows"], key=lambda row: row["work"], reverse=True):
        low, high = row["ratio_range"]
        lines.append(f"{row['work']:<15}{row['side']:<20}{row['images_per_s']:>10.1f}{row['ratio']:>8.2f}"
                     f"{f'{low:.2f}-{high:.2f}':>14}{row['gflop_per_s']:>10.0f}{row['share_of_matrix_product']:>12.0%}")
    for side, seconds in result["compile_and_warm_up_seconds"].items():
        memory, hours = result["peak_memory_bytes"][side] / 2**20, result["hours_of_90_epochs"][side]
        lines.append(f"{side}: {result['how'][side]}; compile and warm-up {seconds:.0f} s in all, "
                     f"peak memory of a step {memory:.0f} MiB, 90 epochs of this take {hours:.1f} hours here")
    rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in result["matrix_product_gflop_per_s"].items())
    return "\n".join([*lines, f"matrix product in the same run, GFLOP/s: {rates}"])


def main(argv=None):
    args = parse_args(argv)
    result = {"device": eval_attacks.device_name(args.torch_device), "torch": torch.__version__, "scaling": args.scaling,
              "command": eval_attacks.command("bench.py", argv),
              "settings": {k: v for k, v in vars(args).items() if isinstance(v, str | int)}}
    args.precision, _ = runtime.pick_precision(args.precision, args.torch_device)  # once, for this process and its child
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # by default eager code is run, and timed
        result |= scaling(args) if args.scaling else compare(args)
    print(f"{result['device']}, torch {torch.__version__}: {args.arch}, {args.defense}, batch {args.batch_size}, "
          f"PGD-{args.num_steps}; evaluation PGD-{args.eval_steps}, batch {args.eval_batch_size}")
    print(table(result))
    eval_attacks.write(args.json, result)
    return result


if __name__ == "__main__":
    main()
