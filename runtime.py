"""What the command lines of the scripts share: one line on stderr and exit status 2 for bad input, the types of
flags, what --device, --precision and --compile come to on this machine, processes, locks and signals."""

import argparse
import contextlib
import ctypes
import datetime
import difflib
import functools
import io
import math
import os
import pathlib
import signal
import sys
import time
from fractions import Fraction

import filelock
import torch
import torch.distributed as dist

import models

COMPILE_PAYS_MINUTES = {"cpu": 10, "cuda": 3}  # of the eager run's time; compiling takes one to two minutes


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        """Append the default of a flag to its help, unless it says so itself or has none."""
        if "(default:" in action.help or any(action.default is none for none in (None, False, argparse.SUPPRESS)):
            return action.help
        values = action.default if isinstance(action.default, list) else [action.default]
        return f"{action.help} (default: {' '.join(map(str, values))})"


class Parser(argparse.ArgumentParser):
    """argparse, with errors on one line and the default of every flag in its help."""

    def __init__(self, **kwargs):
        forgive_output()
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        message = " ".join(str(message).split())
        if message.startswith("unrecognized arguments: --"):
            typed = message.split()[2].partition("=")[0]
            for flag in difflib.get_close_matches(typed, self._option_string_actions, 1):
                message += f"; did you mean {flag}?"
        self.exit(2, f"{self.prog}: error: {message}\n")


def _checked(convert, accept, wanted):
    def parse(text):
        with contextlib.suppress(ValueError, ZeroDivisionError):
            value = convert(text)
            if accept(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return parse


# below 2**30, so that 64 bits hold whatever is made of them
positive_int = _checked(int, lambda v: 0 < v < 2**30, "an integer above 0 (and below 2^30)")
natural_int = _checked(int, lambda v: 0 <= v < 2**30, "an integer of 0 or more (and below 2^30)")
positive_float = _checked(float, lambda v: 0 < v < math.inf, "a finite number above 0")
natural_float = _checked(float, lambda v: 0 <= v < math.inf, "a finite number of 0 or more")
fraction_below_one = _checked(float, lambda v: 0 <= v < 1, "a number of 0 or more and below 1")
unit_float = _checked(float, lambda v: 0 <= v <= 1, "a number in [0, 1]")
# stays as given; not above 1, because images have values in [0, 1]
ratio = _checked(str, lambda v: Fraction(v) <= 1 and float(Fraction(v)) > 0,
                 "a fraction or decimal in (0, 1], such as 8/255 or 0.031")
three_numbers = _checked(lambda text: tuple(map(float, text.split(","))),
                         lambda v: len(v) == 3 and all(map(math.isfinite, v)), "three numbers, as in 0.5,0.5,0.5")


def check_output(flag, path):
    """Raise ValueError if a file could not be written at `path`, before the work for it is done. None passes."""
    if path is None:
        return
    folder = pathlib.Path(path).resolve().parent
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: its folder does not exist")
    if (pathlib.Path(path).exists() and not pathlib.Path(path).is_file()) or not os.access(folder, os.W_OK):
        raise ValueError(f"{flag} {path}: cannot be written there")


def add_runtime_flags(parser, default=None):
    """Add the flags of how to compute, the same for all scripts, and return the function that adds one more."""
    add = parser.add_argument_group("machine").add_argument
    add("--precision", choices=("auto", "fp32", "bf16"), default=default,
        help="bf16: autocast, weights stay float32; auto: fp32 in an evaluation, else the faster here (default: auto)")
    add("--compile", choices=("auto", "on", "graphs", "off"), default=default,
        help="torch.compile; graphs: CUDA graphs of it too; auto: the fastest, if the work repays it (default: auto)")
    add("--device", choices=("auto", "cpu", "cuda"), default=default,
        help="auto: the GPU, if there is one (default: auto)")
    return add


def duration(minutes):
    """Return a time in words: 0.5 -> "30 seconds", 3.2 -> "3 minutes", 50_000 -> "35 days"."""
    for unit, size in (("months", 43_800), ("days", 1440), ("hours", 60), ("minutes", 1)):
        if minutes >= 2 * size:
            return f"{minutes / size:.0f} {unit}"
    return f"{minutes * 60:.0f} seconds"


class _Output(io.FileIO):
    """A stream that drops what nobody reads any more: behind `| head -1` the work goes on."""

    def write(self, content):
        try:
            return super().write(content)
        except BrokenPipeError:
            return len(content)


def forgive_output():
    """Let neither a character that the terminal lacks, printed as "?", nor a closed pipe end the work."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="replace")
            if stream is getattr(sys, f"__{name}__"):
                binary = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
                setattr(sys, name, io.TextIOWrapper(binary, stream.encoding, stream.errors, line_buffering=(
                    stream.line_buffering or stream.write_through)))


# Device, precision and compiling. -------------------------------------------------------------------------------------


def forward_pass(args, model, x, passes, rehearsal=None, too_long=None, strict=True, evaluates=False):
    """Return a callable x -> logits of the model, as args.precision and args.compile ask for; write into args, and onto
    the screen, what these two come to on this machine, the same in all processes.

    x: a batch like those to come; passes: how many. rehearsal(forward) does once what is to come (default: a pass of an
    attack); where it fails the next slower level is taken, or CompileFailed raised if a level was asked for and strict.
    too_long: what to say where a CPU needs more than a day. evaluates: "auto" means float32.
    """
    asked = args.compile
    args.precision, why_precision = from_rank_0(pick_precision(args.precision, x.device, evaluates))
    plain = plain_pass(model, args.precision)
    args.compile, why_compile = from_rank_0(pick_compile(asked, model, plain, x, passes, too_long))
    say = print if rank_and_world()[0] == 0 else lambda *_, **__: None
    # before compiling, which takes minutes for a large model
    say(f"precision {args.precision}: {why_precision}\ncompile {args.compile}: {why_compile}", flush=True)
    while args.compile != "off":
        start, failure = time.perf_counter(), None
        try:
            forward = fast_pass(model, plain, x, args.compile, strict=True)
            with untouched(model):
                rehearsal(forward) if rehearsal else attack_pass(model, forward, x)
        except Exception as error:  # whatever the toolchain may raise
            failure = in_a_line(error)
        if not any_process(failure)[0]:
            say(f"{time.perf_counter() - start:.0f} s to compile and try")
            if args.compile == "graphs":
                forward.strict = strict and asked == "graphs"
            return forward
        failure = f"--compile {args.compile} failed, {failure or 'in another process'}"
        if strict and asked != "auto":
            raise CompileFailed(failure)
        args.compile = "on" if args.compile == "graphs" else "off"
        say(f"{failure}; going on with --compile {args.compile}")
    return plain


class CompileFailed(Exception):
    """Raised where --compile was asked for and cannot be had: days on the slow path would be worse."""


FAULTS = OSError, torch.OutOfMemoryError, CompileFailed  # of the machine: one line, exit status 1 and no traceback


def in_a_line(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def plain_pass(model, precision="fp32"):
    """Return a callable x -> logits that runs the model, under bf16 autocast if precision is "bf16"."""
    def forward(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(x)
    return forward


def fast_pass(model, plain, x, level, strict=False):
    """Return the callable `plain` at a level of --compile, for batches like x. strict: what cannot be recorded raises
    CompileFailed; else it is run compiled, and said."""
    if level == "graphs":
        return RecordedPass(model, compiled(plain), x, strict)
    return compiled(plain) if level == "on" else plain


def compiled(function):
    """Return torch.compile's version of a function of tensors. It gets code of its own, because torch counts versions
    by the code, which closures share, and falls silently back to eager after eight."""
    def run(*inputs):
        return function(*inputs)
    run.__code__ = run.__code__.replace()
    return torch.compile(run, dynamic=False)


def attack_pass(model, forward, x):
    """Run what an attack's step consists of: a forward pass of the frozen model, and the gradient of its input."""
    inputs = x.detach().requires_grad_()
    with models.frozen(model):
        torch.autograd.grad(forward(inputs).float().sum(), inputs)


@contextlib.contextmanager
def untouched(model):
    """Put back the model's buffers, which training passes alter, at the end."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        model.load_state_dict(before, strict=False)  # it copies in place: a CUDA graph reads them where they lie


class RecordedPass:
    """A callable x -> logits of a model, compiled, which also records what calls it again and again."""

    def __init__(self, model, forward, x, strict=False):
        self.model, self.forward, self.shape, self.strict = model, forward, x.shape, strict
        # one pool for all: each keeps its inputs and outputs, and fills the rest anew at every replay
        self.pool, self.made = torch.cuda.graph_pool_handle(), {}

    def __call__(self, x):
        return self.forward(x)

    def recorded(self, function):
        """Return the same function of tensors, of which the first is a batch, but replayed where that has x's shape."""
        def replay(*inputs):
            if inputs[0].shape != self.shape:
                return function(*inputs)
            return self._once(self._record, function, inputs)(*inputs)
        return replay

    def compiled(self, function):
        """Return the same function, compiled, for use within a recorded one: a few kernels take the place of many."""
        return self._once(compiled, function)

    def _once(self, make, function, *others):
        key = make.__name__, self.model.training, _value(function)
        if key not in self.made:
            self.made[key] = make(function, *others), function  # kept, so that its id stays its own
        return self.made[key][0]

    def _record(self, function, inputs):
        """Return a Recording that was compared with the function, or the function itself where it cannot be had."""
        try:
            with untouched(self.model):
                expected = self._outcome(function, inputs)
                recording = Recording(function, inputs, self.pool, list(self.model.parameters()))
                found = self._outcome(recording, inputs)
            if not any(differ(a, b) for a, b in zip(expected, found, strict=True)):
                return recording
            failure = "replayed it gives other values"
        except RuntimeError as error:
            failure, self.pool = in_a_line(error), torch.cuda.graph_pool_handle()
        if self.strict:
            raise CompileFailed(f"--compile graphs failed, {failure}")
        print(f"a step could not be recorded, {failure}; going on without", file=sys.stderr)
        return function

    def _outcome(self, function, inputs):
        """Return the outputs, images as their change, which is small beside the pixels, and the gradients."""
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        return [out - inputs[0] if out.shape == self.shape else out for out in outputs if out is not None] + gradients


class Recording:
    """A function of tensors, which returns copies of a tensor or of a tuple of tensors and None, as one CUDA graph:
    called with others of the same shapes, a GPU replays its kernels without waiting for the CPU. Besides its inputs it
    reads tensors where they lie and numbers as they were; the gradients of one call are overwritten by the next."""

    def __init__(self, function, inputs, pool, parameters):
        self.inputs = [given.detach().clone() for given in inputs]
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):  # what happens only once must not be recorded
                function(*self.inputs)
        current.wait_stream(side)
        before, self.graph = [p.grad for p in parameters], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph, pool=pool):
                self.outputs = function(*self.inputs)
        finally:
            torch.cuda.set_stream(current)  # where the capture fails torch leaves another
        self.gradients = [(p, p.grad) for p, old in zip(parameters, before, strict=True) if p.grad is not old]

    def __call__(self, *inputs):
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        if isinstance(self.outputs, tuple):
            return tuple(None if output is None else output.clone() for output in self.outputs)
        return self.outputs.clone()


def differ(a, b):
    """Return whether more than one value in twenty differs by more than one in a hundred of the largest: some of
    cuDNN's kernels add in a varying order, and a sign that tips moves a pixel by two steps."""
    return bool(((a - b).abs() > 0.01 * a.abs().max()).float().mean() > 0.05) or not bool(b.isfinite().all())


def _value(part):
    """Return a dictionary's key for a function: two functools.partial of the same function and numbers share it."""
    if isinstance(part, functools.partial):
        return _value(part.func), *map(_value, part.args), *((key, _value(v)) for key, v in part.keywords.items())
    return part if isinstance(part, int | float | str) else id(part)


def pick_compile(name, model, plain, x, passes, too_long=None):
    """Return (a level of --compile, the reason in words). "auto" is "off" where `passes` passes of the callable `plain`
    over batches like x take too little time for compiling to pay, else "graphs" on a GPU and "on" on a CPU."""
    if name == "graphs" and not x.is_cuda:
        return "on", "no CUDA graphs on a CPU"
    if name != "auto":
        return name, "as asked"
    if not passes:
        return "off", "what is run here does without it"
    part = x if x.is_cuda else x[:16]  # one pass of a WRN-34-10 over 128 images takes a minute on two cores
    seconds = shortest_seconds(lambda: attack_pass(model, plain, part), x.device, 1)
    minutes = seconds * len(x) / len(part) * passes / 60
    why = f"without it the work takes about {duration(minutes)}"
    if minutes < COMPILE_PAYS_MINUTES[x.device.type]:
        return "off", f"{why}, too little to repay compiling"
    if x.is_cuda:
        return "graphs", why
    return "on", f"{why}, {too_long}" if too_long and minutes > 24 * 60 else why


def pick_precision(name, device, evaluates=False):
    """Return ("fp32" or "bf16", the reason in words) for a value of --precision. On a CPU "auto" times a matrix
    product: a CPU without bf16 units takes longer for bf16 than for float32."""
    if name != "auto":
        return name, "as asked"
    if evaluates:
        return "fp32", "what an evaluation counts by"
    if device.type == "cuda":
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU has bf16 units") if has_units else ("fp32", "the GPU has no bf16 units")
    a = torch.randn(512, 512)  # not larger: where bf16 is emulated 1024 took 10 s
    b = a.bfloat16()
    ratio = shortest_seconds(lambda: a @ a, device) / shortest_seconds(lambda: b @ b, device)
    return ("bf16", "this CPU is faster with it") if ratio > 1.3 else ("fp32", "this CPU is not faster with bf16")


def pick_device(name):
    """Return the torch.device for "auto", "cpu" or "cuda", and set how it computes. Raise ValueError without CUDA."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if name == "cpu" or not torch.cuda.is_available():
        # glibc gives freed buffers above 32 MB back to the kernel, and gets them anew page by page, zeroed: in float32
        # at batch 256 that took up to two thirds of an attack's time
        with contextlib.suppress(OSError, AttributeError):  # another libc
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer is mapped apart
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor is the heap's end given back
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False  # torch's default rounds float32 convolutions to 10 bits
    torch.backends.cudnn.benchmark = True  # shapes are fixed; where they are not attacks.py turns it off
    return torch.device("cuda")


def tf32_convolutions(allowed):
    """Return a context, or a decorator, in which cuDNN may or may not round what float32 convolutions multiply."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=allowed)


def timed(function, device):
    """Return the seconds of one call, with what it left running on a GPU and without what ran there before."""
    synchronize = torch.get_device_module(device).synchronize  # does nothing on a CPU
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def shortest_seconds(function, device, repeats=3):
    """Return the shortest of a few timed calls, after one that is not counted."""
    timed(function, device)
    return min(timed(function, device) for _ in range(repeats))


# Several processes, started by torchrun. With one, these do nothing. --------------------------------------------------


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def join_job(name):
    """Yield (this process's device, its rank, the number of processes); under torchrun after joining the others."""
    device = pick_device(name)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device, 0, 1
        return
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    try:
        yield device, *rank_and_world()
    finally:
        dist.destroy_process_group()


def from_rank_0(value):
    """Return rank 0's value, on all processes."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def sum_over_processes(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_process(*flags):
    """Return for each flag whether it is true in any process, after waiting for all of them."""
    device = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
    counts = torch.tensor([float(bool(flag)) for flag in flags], device=device)
    return sum_over_processes(counts).bool().tolist()


def barrier():
    """Wait for all processes."""
    any_process(False)


def broadcast_buffers(model):
    """Give rank 0's batch-norm statistics to all, so that every process attacks the same model."""
    _in_one_exchange(lambda flat: dist.broadcast(flat, 0), [b for b in model.buffers() if b.is_floating_point()])


def average_gradients(model):
    """Replace every gradient by its mean over the processes."""
    _in_one_exchange(dist.all_reduce, [p.grad for p in model.parameters()], divisor=rank_and_world()[1])


def _in_one_exchange(communicate, tensors, divisor=1):
    """Replace the tensors by what communicate(flat) makes of all of them, as one flat tensor, over the divisor."""
    if dist.is_initialized() and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors]) / divisor
        communicate(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


# Locks and signals. ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(out_dir):
    """Make a run's directory and hold its lock, which a dying process frees; raise ValueError if another holds it."""
    pathlib.Path(out_dir).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(pathlib.Path(out_dir, ".lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"--out-dir {out_dir}: another process is training there") from None
    except (OSError, NotImplementedError) as error:  # some network file systems
        print(f"{out_dir} cannot be locked ({error}): do not start a second process there")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def deferred_signals(notice="", second=signal.SIG_DFL):
    """Yield a list to which a first SIGINT or SIGTERM only appends its number, and print the notice then, so that what
    is at hand can be saved. Another one is handled by `second`, by default it ends the process at once."""
    received, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def note(number, frame):
        received.append(number)
        for each in numbers:
            signal.signal(each, second)
        if notice:
            print(f"\n{notice}", file=sys.stderr)

    before = [signal.signal(number, note) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Stopped(Exception):
    """Raised where a signal ends a run: between two steps, or in the attack of one that is given up."""


def stoppable(forward, stop):
    """Return `forward`, a callable x -> logits, but raising Stopped once `stop` is filled: on a CPU an attack takes
    minutes. With several processes, of which none may leave the others, or a recorded pass, return it unchanged."""
    if rank_and_world()[1] > 1 or isinstance(forward, RecordedPass):
        return forward

    def checked(x):
        if stop:
            raise Stopped
        return forward(x)

    return checked
