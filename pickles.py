"""Numpy arrays from a pickle that a stranger wrote, such as RST's.

A pickle is a program for a small machine. This reads the program and never runs it: an unpickler that may call nothing
but numpy's own constructors can still be led to take bytes of the file for addresses, and one that may call nothing at
all still dies of hash(((((...))))), which Python's tuples do not guard.
"""

import pickletools
import re

import numpy as np

# The instructions that write plain values, containers and arrays; any other is refused.
_VALUES = set("""INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE
                 BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8""".split())
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARKED = {"TUPLE", "LIST", "DICT", "APPENDS", "SETITEMS"}  # take what was pushed since the last MARK
_COUNTED = {"EMPTY_TUPLE": 0, "EMPTY_LIST": 0, "EMPTY_DICT": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2,
            "APPEND": 1, "SETITEM": 2, "BUILD": 1, "STACK_GLOBAL": 2, "STOP": 1}  # take so many
_ADDING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}  # to the list below what they take
_READERS = {opcode.name: opcode.arg.reader for opcode in pickletools.opcodes if opcode.arg}
_READERS["BYTEARRAY8"] = pickletools.read_bytes8  # its own makes a second copy, and an array may be 1.5 GB
_NAMES = {"numpy ndarray", "numpy dtype", "_codecs encode"} | {
    f"numpy.{core}.{name}" for core in ("core", "_core")  # of numpy 1 and 2
    for name in ("multiarray _reconstruct", "multiarray scalar", "numeric _frombuffer")}


def _read(file):
    """What the program would build, with a list for all that is no plain value: a dict is [key, value, key, ...], an
    object [its name, [arguments]] and, with a state, [its name, [arguments], state]. So nothing here can be called,
    hashed or looked up. Raises nearly anything for a damaged file, ValueError for a name besides _NAMES."""
    stack, below, memo = [], [], {}
    while True:
        opcode = pickletools.code2op.get(file.read(1).decode("latin-1"))
        if opcode is None:
            raise ValueError("it is cut off, or no pickle at all")
        kind, taken = opcode.name, []
        argument = _READERS[kind](file) if kind in _READERS else None
        if kind in _MARKED:
            taken, stack = stack, below.pop()
        elif number := _COUNTED.get(kind):
            taken, stack[-number:] = stack[-number:], []
        if kind == "STOP":
            return taken[0]
        if kind in _VALUES:
            stack.append(argument)
        elif kind in _CONSTANTS:
            stack.append(_CONSTANTS[kind])
        elif kind in ("GLOBAL", "STACK_GLOBAL"):
            name = argument or " ".join(taken)
            if name not in _NAMES:
                raise ValueError(f"it names {name.replace(' ', '.')!r:.99}, which is no array")
            stack.append(name.split()[-1])
        elif kind in _ADDING:
            stack[-1].extend(taken)
        elif kind in _MARKED or kind in _COUNTED:
            stack.append(taken)
        elif kind == "MARK":
            below.append(stack)
            stack = []
        elif kind in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif kind in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif kind not in ("PROTO", "FRAME"):
            raise ValueError(f"its instruction {kind} writes no array")


def _array(value):
    """The array that _read's lists tell of; it shares the memory of the bytes read, and is read-only. Or a list of
    integers as an array. Raises nearly anything, unless it is of numbers and as large as it says."""
    axes = []
    match value:
        case ["_reconstruct", _, [_, shape, dtype, order, content]]:
            pass
        case ["_frombuffer", [content, dtype, shape, order, *axes]]:  # of protocol 5
            pass
        case ["scalar", [dtype, content]]:
            shape, order = [], "C"
        case list() if all(type(v) is int or isinstance(v, list) and v[:1] == ["scalar"] for v in value):
            return np.array([v if type(v) is int else _array(v) for v in value])
        case _:
            raise ValueError("something else than an array")
    match dtype:
        case ["dtype", [kind, *_], [_, endian, *_]] if re.fullmatch("[<>|=](b1|[iu][1248]|f[248])", endian + kind):
            dtype = np.dtype(endian + kind)
        case _:
            raise ValueError("an array of other things than numbers")
    match content:
        case ["encode", [str(text), "latin1"]]:  # bytes, below protocol 3
            content = text.encode("latin1")
    if any(n < 0 for n in shape):  # numpy takes -1 for "what is left"; all that does not fit reshape refuses
        raise ValueError("an array of an impossible shape")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if order in (True, "F") else "C")
    return array.transpose(*axes) if axes else array


def read_arrays(file, names):
    """({name: array} for those of the names that the pickled dict in an open file has, all the names that it has). The
    arrays are read-only. Raises nearly any Exception for a file that holds anything else."""
    content = _read(file)
    if not isinstance(content, list):
        raise ValueError(f"it holds a {type(content).__name__}")
    held = {key: value for key, value in zip(content[::2], content[1::2], strict=False) if isinstance(key, str)}
    return {name: _array(held[name]) for name in names if name in held}, list(held)


def refuse_deep_tuples(file, number=1):
    """ValueError if the first so many pickles of an open file make tuples enough to nest them until Python's hash of
    one ends the process, in torch.load too (seen at 200,000; a model file makes a few thousand)."""
    tuples = sum(opcode.name.startswith("TUPLE") for _ in range(number) for opcode, _, _ in pickletools.genops(file))
    if tuples > 20_000:
        raise ValueError(f"{tuples} tuples")
