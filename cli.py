"""What the command lines of the scripts share: one line on stderr and exit status 2 for bad input, the types of
flags, and what --device, --precision and --compile come to on this machine."""

import argparse
import sys
import time
from fractions import Fraction

import torch

import models

COMPILE_PAYS_MINUTES = 10  # of the eager run's time; compiling all graphs takes one to two minutes


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line and the default of every flag in its help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        message = " ".join(str(message).split())
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)


def _checked(convert, accept, wanted):
    def parse(text):
        try:
            value = convert(text)
            if accept(value):
                return value
        except (ValueError, ZeroDivisionError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


positive_int = _checked(int, lambda v: v > 0, "an integer above 0")
natural_int = _checked(int, lambda v: v >= 0, "an integer of 0 or more")
positive_float = _checked(float, lambda v: 0 < v < float("inf"), "a number above 0")
natural_float = _checked(float, lambda v: 0 <= v < float("inf"), "a number of 0 or more")
unit_float = _checked(float, lambda v: 0 <= v <= 1, "a number in [0, 1]")


def ratio(text):
    """"8/255" or "0.031", as given, after a check that it lies in (0, 1]: images have values in [0, 1]."""
    _checked(Fraction, lambda v: 0 < v <= 1, "a fraction or decimal in (0, 1], such as 8/255 or 0.031")(text)
    return text


def add_runtime_flags(parser, default=None):
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default=default,
                        help="bf16: autocast, weights stay float32; auto: the faster on this machine (default: auto)")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default=default,
                        help="torch.compile; auto: if there is enough work to pay for it (default: auto)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default=default, help="(default: auto)")


def pick_device(name):
    """"auto", "cpu" or "cuda" -> torch.device; raises ValueError for cuda where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    return torch.device(name)


def seconds(function, device, repeats=3):
    """The shortest of a few timed calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def pick_precision(name, device):
    """"auto", "fp32" or "bf16" -> ("fp32" or "bf16", the reason in words). On a CPU a matrix product is timed: one
    without bf16 units takes longer for bf16 than for float32."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        return ("bf16", "the GPU has bf16 units") if torch.cuda.is_bf16_supported() else ("fp32", "no bf16 units")
    a = torch.randn(1024, 1024)
    b = a.bfloat16()
    ratio = seconds(lambda: a @ a, device) / seconds(lambda: b @ b, device)
    return "bf16" if ratio > 1.3 else "fp32", f"a bf16 matrix product runs at {ratio:.1f}x the speed of float32 here"


def forward_pass(model, precision="fp32"):
    """A callable x -> logits that runs the model under bf16 autocast if precision is "bf16"."""

    def forward(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(x)

    return forward


def pick_compiled(name, model, precision, x, passes):
    """(callable x -> logits, "on" or "off", the reason in words), for --compile `name`.

    auto compiles when `passes` passes over batches like x take so long that compiling pays. A compiler that is missing
    or fails gives the eager callable and says so.
    """
    eager = forward_pass(model, precision)

    def attack_pass(forward):
        def run():
            inputs = x.detach().requires_grad_()
            torch.autograd.grad(forward(inputs).float().sum(), inputs)
        return run

    with models.frozen(model):
        if name == "off":
            return eager, "off", "as asked"
        if name == "auto":
            minutes = seconds(attack_pass(eager), x.device, repeats=1) * passes / 60
            if minutes < COMPILE_PAYS_MINUTES:
                return eager, "off", f"eager needs about {minutes:.0f} minutes, too few for compiling to pay"
        # reduce-overhead captures CUDA graphs; whoever keeps a result of `compiled` beyond its next call must copy it
        mode = "reduce-overhead" if x.device.type == "cuda" else "default"
        compiled = torch.compile(eager, dynamic=False, mode=mode)
        start = time.perf_counter()
        try:
            attack_pass(compiled)()
        except Exception as error:  # whatever the toolchain may raise: the run must go on
            return eager, "off", f"torch.compile failed ({type(error).__name__}), going on without"
        return compiled, "on", f"the attack's graph took {time.perf_counter() - start:.0f} s to compile"
