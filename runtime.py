"""What the command lines of the scripts share: one line on stderr and exit status 2 for bad input, the types of
flags, and what --device, --precision and --compile come to on this machine."""

import argparse
import contextlib
import ctypes
import datetime
import fcntl
import math
import os
import pathlib
import signal
import sys
import time
from fractions import Fraction

import torch
import torch.distributed as dist

import models

FAULTS = OSError, torch.OutOfMemoryError  # of the machine, in the middle of the work: one line and no traceback
STOPPING = "stopping: the step at hand is given up, the run is saved; Ctrl-C again ends it at once"
COMPILE_PAYS_MINUTES = 10  # of the eager run's time; compiling all graphs takes one to two minutes


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # a default stands in the code once
        if "(default:" in action.help or any(action.default is none for none in (None, False, argparse.SUPPRESS)):
            return action.help
        values = action.default if isinstance(action.default, list) else [action.default]
        return f"{action.help} (default: {' '.join(map(str, values))})"


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line and the default of every flag in its help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

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


# below 2**30, so that 64 bits hold whatever is made of them
positive_int = _checked(int, lambda v: 0 < v < 2**30, "an integer above 0 (and below 2^30)")
natural_int = _checked(int, lambda v: 0 <= v < 2**30, "an integer of 0 or more (and below 2^30)")
positive_float = _checked(float, lambda v: 0 < v < float("inf"), "a finite number above 0")
natural_float = _checked(float, lambda v: 0 <= v < float("inf"), "a finite number of 0 or more")
fraction_below_one = _checked(float, lambda v: 0 <= v < 1, "a number of 0 or more and below 1")
unit_float = _checked(float, lambda v: 0 <= v <= 1, "a number in [0, 1]")
three_numbers = _checked(lambda text: tuple(map(float, text.split(","))),
                         lambda v: len(v) == 3 and all(map(math.isfinite, v)), "three numbers, as in 0.5,0.5,0.5")


def ratio(text):
    """"8/255" or "0.031", as given, after a check that it lies in (0, 1]: images have values in [0, 1]."""
    _checked(Fraction, lambda v: 0 < v <= 1, "a fraction or decimal in (0, 1], such as 8/255 or 0.031")(text)
    return text


def check_output(flag, path):
    """ValueError if a file could not be written at `path`, before the work whose result it is to hold; None passes."""
    if path is None:
        return
    path = pathlib.Path(path)
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{flag} {path}: its folder does not exist")
    if (path.exists() and not path.is_file()) or not path.name or not os.access(path.resolve().parent, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot be written there")


def add_runtime_flags(parser, default=None):
    """The flags of how to compute, the same for all scripts, as a group of the help; returns the group."""
    group = parser.add_argument_group("machine")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default=default,
                       help="bf16: autocast, weights stay float32; auto: the faster on this machine (default: auto)")
    group.add_argument("--compile", choices=("auto", "on", "graphs", "off"), default=default,
                       help="torch.compile; graphs: with CUDA graphs; auto: on if the work repays it (default: auto)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default=default,
                       help="auto: the GPU, if there is one (default: auto)")
    return group


def pick_device(name):
    """"auto", "cpu" or "cuda" -> torch.device; raises ValueError for cuda where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if name == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # torch's default rounds float32 convolutions to 10 bits
        torch.backends.cudnn.benchmark = True  # shapes are fixed; where they are not attacks.py turns it off
    else:
        _keep_freed_memory()
    return torch.device(name)


def _keep_freed_memory():
    """Lets glibc reuse freed buffers of any size. By default it returns those above 32 MB to the kernel and gets them
    back page by page, zeroed: in float32 at batch 256 that took up to two thirds of an attack's time."""
    with contextlib.suppress(OSError, AttributeError):  # another libc, another system: nothing to do
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer is mapped apart
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor is the heap's end given back


def timed(function, device):
    """The seconds of one call, with what it left running on a GPU and without what ran there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def seconds(function, device, repeats=3):
    """The shortest of a few timed calls, after one that is not counted."""
    return min([timed(function, device) for _ in range(repeats + 1)][1:])


def pick_precision(name, device):
    """"auto", "fp32" or "bf16" -> ("fp32" or "bf16", the reason in words). On a CPU a matrix product is timed: one
    without bf16 units takes longer for bf16 than for float32."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        units = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU has bf16 units") if units else ("fp32", "the GPU has no bf16 units")
    a = torch.randn(512, 512)  # not larger: where bf16 is emulated 1024 took 10 s
    b = a.bfloat16()
    ratio = seconds(lambda: a @ a, device) / seconds(lambda: b @ b, device)
    return "bf16" if ratio > 1.3 else "fp32", f"a bf16 matrix product runs at {ratio:.2g}x the speed of float32 here"


def forward_pass(model, precision="fp32"):
    """A callable x -> logits that runs the model under bf16 autocast if precision is "bf16"."""

    def forward(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(x)

    # torch.compile stores its code with the code object, which closures share, and after eight falls silently to eager
    forward.__code__ = forward.__code__.replace()
    return forward


def duration(minutes):
    """0.5 -> "30 seconds", 3.2 -> "3 minutes", 50_000 -> "35 days"."""
    units = {"months": 43_800, "days": 1440, "hours": 60, "minutes": 1, "seconds": 1 / 60}
    unit = next((unit for unit, size in units.items() if minutes >= 2 * size), "seconds")
    return f"{minutes / units[unit]:.0f} {unit}"


def pick_compile(name, model, eager, x, passes, too_long=None):
    """(`name`, the reason in words), where "auto" is "on" if `passes` passes of the callable `eager` over batches like
    x take so long that compiling pays, else "off". CUDA graphs, not yet seen at work here, must be asked for.
    too_long: what to say where a CPU needs more than a day."""
    if name != "auto":
        return name, "as asked"
    part = x if x.is_cuda else x[:16]  # one pass of a WRN-34-10 over 128 images takes a minute on two cores
    minutes = seconds(lambda: rehearse(model, eager, part), x.device, 1) * len(x) / len(part) * passes / 60
    if minutes < COMPILE_PAYS_MINUTES:
        return "off", f"eager needs about {duration(minutes)}, too little for compiling to pay"
    hint = f", {too_long}" if too_long and minutes > 24 * 60 and not x.is_cuda else ""
    return "on", f"eager needs about {duration(minutes)}{hint}"


def compiled_pass(model, eager, x, level="on", train_passes=0):
    """(callable x -> logits, what came of it in words): `eager` compiled for batches like x, at the level "graphs" with
    CUDA graphs, and tried; or `eager` itself, if that fails. train_passes: the forward passes of a training step."""
    graphs, start = level == "graphs", time.perf_counter()
    try:
        # whoever keeps a result of a CUDA graph beyond the next call must copy it
        compiled = torch.compile(eager, dynamic=False, mode="reduce-overhead" if graphs else "default")
        # or_error: else torch leaves out what it cannot record. Three rounds: one warms up, one records, one replays.
        with torch._inductor.config.patch("triton.cudagraph_or_error", graphs):
            rehearse(model, compiled, x, 3 if graphs else 1, train_passes)
    except Exception as error:  # whatever the toolchain may raise: the run must go on
        return eager, f"torch.compile failed ({type(error).__name__}): {str(error).strip().partition(chr(10))[0]}"
    return compiled, f"{time.perf_counter() - start:.0f} s to compile and try"


def fast_pass(model, eager, x, level, train_passes=0):
    """(callable x -> logits, its level, [what came of it in words]): of "graphs", "on" and "off", `eager` itself, the
    first from `level` on that works in all processes; for the rest see compiled_pass."""
    words = ["no CUDA graphs on a CPU"] if level == "graphs" and not x.is_cuda else []
    for tried in {"off": (), "on": ("on",), "graphs": ("graphs", "on")}[level][len(words):]:
        forward, why = compiled_pass(model, eager, x, tried, train_passes)
        if not any_process(forward is eager)[0]:
            return forward, tried, [*words, why]
        words.append(why if forward is eager else "torch.compile failed in another process")
        torch.compiler.reset()  # gives back what was recorded
    return eager, "off", words


def forward_passes(args, model, x, passes, train_passes=0, too_long=None):
    """(eager, fast) callables x -> logits of the model, by args.precision and args.compile. What these come to goes
    into args, the same on all processes, and onto the screen. passes: how many, over batches like x, are to come."""
    args.precision, why = agreed(pick_precision(args.precision, x.device))
    eager = forward_pass(model, args.precision)
    args.compile, why_compile = agreed(pick_compile(args.compile, model, eager, x, passes, too_long))
    if rank_and_world()[0] == 0:  # before compiling, which takes minutes for a large model
        print(f"precision {args.precision}: {why}\ncompile {args.compile}: {why_compile}", flush=True)
    forward, args.compile, words = fast_pass(model, eager, x, args.compile, train_passes)
    if rank_and_world()[0] == 0 and words:
        print(f"compile {args.compile}: {'; '.join(words)}")
    return eager, forward


# Several processes, started by torchrun. With one, these do nothing. --------------------------------------------------


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def join_job(name):
    """Yields (this process's device, its rank, the number of processes); under torchrun after joining the others."""
    device = pick_device(name)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device, 0, 1
        return
    if device.type == "cuda":
        if (local := int(os.environ["LOCAL_RANK"])) >= torch.cuda.device_count():
            raise ValueError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    try:
        yield device, *rank_and_world()
    finally:
        dist.destroy_process_group()


def agreed(value):
    """Rank 0's value, on all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def sum_over_processes(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_process(*flags):
    """For each flag whether it is true in any process; waits for all of them."""
    device = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
    return [bool(v) for v in sum_over_processes(torch.tensor([float(bool(f)) for f in flags] or [0.0], device=device))]


def barrier():
    """Waits for all processes."""
    any_process()


def broadcast_buffers(model):
    """Rank 0's batch-norm statistics for all, so that every process attacks the same model."""
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, 0)


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

    return checked if rank_and_world()[1] == 1 else forward


class BothPasses(torch.nn.Module):
    """(x, x_adv) -> (logits_nat, logits_adv), None for None. x and x_adv go through the model apart, natural first:
    together they would share their batch statistics. One module, as DistributedDataParallel wants one forward call."""

    def __init__(self, model, forward_pass):
        super().__init__()
        self.model, self.forward_pass = model, forward_pass

    def forward(self, x, x_adv):
        return tuple(None if batch is None else self.forward_pass(batch) for batch in (x, x_adv))


def rehearse(model, forward, x, rounds=1, train_passes=0):
    """The passes over batches like x that are to come: the attack's, and of a training step the forward passes, in the
    mode that the model is in, and their backward pass. Leaves no trace."""
    inputs, buffers = x.detach().requires_grad_(), [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            for _ in range(rounds):
                with models.frozen(model):
                    torch.autograd.grad(forward(inputs).float().sum(), inputs)
                if train_passes:  # grad() and not backward(), which would leave .grad behind
                    total = sum(forward(x).float().sum() for _ in range(train_passes))
                    torch.autograd.grad(total, list(model.parameters()))
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)  # in place: a CUDA graph reads it where it lies
