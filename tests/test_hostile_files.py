"""Files from strangers: nothing in them is run, and a refusal is one line."""

import contextlib
import functools
import io
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import struct
import zipfile

import numpy as np
import pytest
import torch
from helpers import fails_in_one_line
from PIL import Image
from test_checkpoints import own_checkpoint

import checkpoints
import data
import eval_attacks
import train_cifar

ARRAYS = {"data": np.zeros((3, 32, 32, 3), np.uint8), "extrapolated_targets": np.arange(3)}


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["list", "object array"])
def test_code_in_a_pickle_is_not_run(where, tmp_path, capsys):
    payload = Payload(tmp_path / "run")
    payload = [payload] if where == "list" else np.array([payload], dtype=object)
    (tmp_path / "aux").write_bytes(pickle.dumps(ARRAYS | {"extrapolated_targets": payload}))
    argv = ["--defense", "trades", "--dataset", "digits", "--aux-data", tmp_path / "aux", "--out-dir", tmp_path / "out"]
    assert "posix.mkdir" in fails_in_one_line(train_cifar.main, argv, capsys)
    np.savez(tmp_path / "aux.npz", **ARRAYS | {"extrapolated_targets": np.array([payload], dtype=object)})
    argv[5] = tmp_path / "aux.npz"
    fails_in_one_line(train_cifar.main, argv, capsys)
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
    pickle.loads((tmp_path / "aux").read_bytes())  # the payload does work
    assert (tmp_path / "run").exists()


# In a process of their own, whose death is noticed and whose memory is limited ----------------------------------------


def in_child(function, *args):
    child = multiprocessing.get_context("fork").Process(target=_limited, args=(function, *args))
    child.start()
    child.join()
    assert child.exitcode == 0  # -11: the interpreter crashed, on the case that was printed last


def _limited(function, *args):
    """A file that makes it ask for all memory or work for ever is seen: it may have 4 GB more and five minutes."""
    torch.set_num_threads(1)  # others do not survive the fork
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
    train_cifar.pathlib.Path.mkdir = eval_attacks.evaluate = begin
    data.load = functools.cache(data.load)
    function(*args)


def begin(*args, **settings):
    raise SystemExit(0)


def refuses(main, argv):
    """Whether main(argv) ends in one line and status 2; AssertionError if in any other way than this or `begin`."""
    with contextlib.redirect_stderr(io.StringIO()) as error, pytest.raises(SystemExit) as exit_info:
        main(argv)
    error = error.getvalue()
    assert exit_info.value.code in (0, 2) and error.count("\n") == (exit_info.value.code == 2), error
    assert "Traceback" not in error and len(error) < 1000 and error.rstrip("\n").isprintable(), error
    return exit_info.value.code == 2


def refuses_aux(folder, content):
    """As --aux-data. What is not refused stops where the run's directory would be made."""
    (folder / "aux").write_bytes(content)
    refused = refuses(train_cifar.main, ["--defense", "mart", "--dataset", "digits", "--aux-data", str(folder / "aux"),
                                         "--out-dir", str(folder / "run")])
    assert (folder / "aux").read_bytes() == content and not (folder / "run").exists()
    return refused


def pickled(value):
    """{"data": the value that this part of a pickle makes, "extrapolated_targets": ...}"""
    return (b"\x80\x04}(" + text("data") + value + text("extrapolated_targets")
            + b"]K\x07a" + b"u.")


def text(content):
    return b"X" + struct.pack("<I", len(content.encode())) + content.encode()


def dtype(kind="u1", endian="|", rest=b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00"):
    return b"cnumpy\ndtype\n" + text(kind) + b"\x89\x88\x87R(K\x03" + text(endian) + rest + b"tb"


PIXELS = b"B" + struct.pack("<I", 3072) + bytes(3072)


def array(shape, of=None, content=PIXELS):
    return (b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01" + shape
            + (of or dtype()) + b"\x89" + content + b"tb")


def numbers(*values):
    return b"(" + b"".join(b"\x8a\x0a" + value.to_bytes(10, "little", signed=True) for value in values) + b"t"


FORGED = dtype("O8", rest=b"NNNK\x08K\x08K\x00")  # objects, whose flags say that they are none
SCALAR = b"cnumpy._core.multiarray\nscalar\n"
GOOD = numbers(1, 32, 32, 3)
CRAFTED = {
    "scalar of a pointer": pickled(SCALAR + FORGED + b"C\x08AAAAAAAA\x86R"),
    "array of pointers": pickled(array(numbers(1), FORGED, b"C\x08AAAAAAAA")),
    "list of an array of pointers": pickled(b"]" + array(numbers(1), FORGED, b"C\x08AAAAAAAA") + b"a"),
    "unhashable keys": pickled(array(GOOD) + b"]N}N"),
    "deep tuple": pickled(b")" + b"\x85" * 300_000),
    "deep list": pickled(b"]" * 100_000 + b"a" * 99_999),
    "list of itself": pickled(b"]q\x00h\x00a"),
    "lists of lists": pickled(  # 99 to the power of 99 numbers
        b"(]q\x00K\x01a" + b"".join(b"]q%c(" % (i + 1) + b"h%c" % i * 99 + b"e" for i in range(99)) + b"t"),
    "a list of one large array": pickled(array(GOOD) + b"q\x00](" + b"h\x00" * 100_000 + b"e"),
    "shape of itself": pickled(array(b"]q\x00h\x00a")),
    **{f"opcode {code}": pickled(b"(NN" + code) for code in (
        b"P1\n", b"Q", b"iposix\nmkdir\n", b"o", b"\x81", b"\x92", b"\x82\x01", b"\x83\x01\x00",
        b"\x84\x01\x00\x00\x00", b"\x97", b"\x98", b"\x8f", b"\x90", b"\x91", b"2", b"0", b"1", b"R", b"b", b"a", b"e",
        b"s", b"u", b"t" * 9, b"\x87" * 9, b"." * 2, b"\xff", b"h\x63", b"g-1\n", b"L" + b"9" * 9999 + b"\n", b"I\n")},
    **{f"length {code}": pickled(code + b"\xff" * 7 + b"\x3f") for code in (
        b"\x8e", b"\x96", b"\x8d", b"\x95", b"B", b"X", b"T", b"\x8b\xff\xff\xff\x7f", b"\x95\x00")},
    **{f"a length of 1 TB {code}": pickled(code + struct.pack("<Q", 2**40)) for code in (b"\x8e", b"\x96", b"\x8d")},
    **{f"shape {shape}": pickled(array(numbers(*shape))) for shape in (
        (-1, 32, 32, 3), (-1, -32, 32, 3), (1, 32, 32, 4), (1, 32, 32, 2), (2**32, 2**32, 1, 3), (2**62, 4, 32, 3),
        (2**64 + 1, 32, 32, 3), (0, 2**39, 2**39, 3), (1,) * 99, (), (3072,))},
    **{f"shape {shape}": pickled(array(shape)) for shape in (
        b"N", b"K\x05", text("1234"), b"(G" + bytes(8) + b"t", b"(\x88K\x20K\x20K\x03t", b"cnumpy\ndtype\n")},
    "no pixels": pickled(array(numbers(2**39, 0, 32, 3), content=b"C\x00")),
    **{f"dtype {kind}": pickled(array(GOOD, dtype(kind))) for kind in (
        "O", "O8", "V1", "S1", "U1", "M8", "u3", "u16", "f16", "c8", "u1,u1", "(3,)u1", "", "|u1", "u1\n", "\x1b[2J")},
    "dtype of an odd byte order": pickled(array(GOOD, dtype(endian="|u1,"))),
    "dtype without arguments": pickled(array(GOOD, b"cnumpy\ndtype\n)R")),
    "dtype without a state": pickled(array(GOOD, b"cnumpy\ndtype\n" + text("u1") + b"\x85R")),
    "dtype alone": pickled(array(GOOD, b"cnumpy\ndtype\n")),
    "content is a list": pickled(array(numbers(1), content=b"]K\x01a")),
    **{f"content {codec}": pickled(array(GOOD, None, b"c_codecs\nencode\n" + text(of * 3072) + text(codec) + b"\x86R"))
       for of, codec in (("ε", "latin1"), ("a", "zip"))},
    "a state for a class": pickled(b"cnumpy\nndarray\n}" + text("__reduce__") + b"K\x01sb"),
    "an array without a state": pickled(array(GOOD)[: array(GOOD).index(b"(K\x01")]),
    "axes of another array": pickled(b"cnumpy._core.numeric\n_frombuffer\n(C\x01a" + dtype() + numbers(1) + text("K")
                                     + numbers(5) + b"tR"),
    "a name of two lines": pickled(text("a\nb\x1b[2J") + text("c") + b"\x93"),
    "a name of a megabyte": pickled(text("a" * 10**6) + text("c") + b"\x93"),
    "names of a megabyte": b"\x80\x04}(" + text("\x1b[2J" + "a" * 10**6) + b"NK\x01Nu.",
    "no names": b"\x80\x04}(K\x01N]N}NC\x01aNNNu.", "a number": b"\x80\x04K\x01.", "nothing": b"\x80\x04.",
    "numbers as images": pickled(b"](K\x01K\x02e"), "a huge number": pickled(b"]\x8a\xff" + b"\x7f" * 255 + b"a"),
}
HARMLESS = {
    "nothing odd": pickled(array(GOOD)),
}


def npy(descr="'|u1'", shape="(1, 32, 32, 3)", content=bytes(3072), version=b"\x01\x00"):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + content


NPY = {
    "a huge shape": npy(shape="(100000000, 32, 32, 3)"), "an overflow": npy(shape="(4294967296, 4294967296, 1, 3)"),
    "a shape below 0": npy(shape="(-1, 32, 32, 3)"), "objects": npy("'|O'"), "nothing": b"", "no array": b"hello",
    "another version": npy(version=b"\x09\x09"), "deep": npy("(" * 5000), "deep operators": npy("-" * 9000 + "1"),
    "code": npy("__import__('os').mkdir('run')"), "of Python 2": npy(shape="(1L, 32L, 32L, 4L)"),
    "no pixels": npy(shape="(4611686018427387904, 0, 3, 32)", content=b""), "void": npy("'|V0'", "(1000000000000,)"),
    "a record": npy("[('a', '|u1'), ('b', '|O')]"), "a dtype of a dtype": npy("('|u1', (1000000, 1000000))"),
}


def zipped(content):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.npy", content)
        file.writestr("extrapolated_targets.npy", npy("'<i8'", "(1,)", bytes(8)))
    return buffer.getvalue()


def crafted_files(folder):
    for name, content in (HARMLESS | {"npz": zipped(npy())}).items():
        print(name[:60], flush=True)
        assert not refuses_aux(folder, content), name
    for name, content in (CRAFTED | {f"npz: {name}": zipped(content) for name, content in NPY.items()}).items():
        print(name[:60], flush=True)
        assert refuses_aux(folder, content), name
        if name.startswith("dtype"):  # before an array is made of it
            with pytest.raises(ValueError, match="neither an .npz"):
                checkpoints.load_arrays(folder / "aux")


def test_crafted_files_are_refused(tmp_path):
    in_child(crafted_files, tmp_path)


def wholes(arrays):
    forms = [pickle.dumps(arrays, protocol=protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    np.savez(buffer := io.BytesIO(), **arrays)
    return [*forms, buffer.getvalue()]


def cut_files(folder):
    path = folder / "aux"
    for whole in wholes({"data": np.zeros((1, 2, 2, 3), np.uint8), "extrapolated_targets": [5, 300, 70000]}):
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="^[^\n]+$"):
                checkpoints.load_arrays(path)
        path.write_bytes(whole)
        checkpoints.load_arrays(path)


def test_files_cut_at_any_byte_are_refused(tmp_path):
    in_child(cut_files, tmp_path)


def mutated(g, whole, at):
    """The bytes cut, flipped, with others between them, partly zeroed or rotated; most often a bit is flipped."""
    content = bytearray(whole)
    kind = g.choice(["cut", "insert", "zero", "swap"] + ["flip"] * 4)
    n = g.choice([1, 8, 300])
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        content[at] ^= 1 << g.randrange(8)
    elif kind == "insert":
        content[at:at] = g.randbytes(n)
    elif kind == "zero":
        content[at : at + n] = bytes(len(content[at : at + n]))
    else:
        content = content[at:] + content[:at]
    return bytes(content)


def damaged_files(folder, cases):
    """A third of the changes is anywhere, the others where there are no pixels."""
    forms, g, refused = wholes(ARRAYS), random.Random(0), 0
    for case in range(cases):
        whole = forms[case % len(forms)]
        at = g.choice([g.randrange(len(whole)), g.randrange(300), len(whole) - 1 - g.randrange(300)])
        refused += refuses_aux(folder, mutated(g, whole, at))
    assert cases / 4 < refused < cases


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_damaged_file_of_pseudo_labels_is_refused_or_works(tmp_path, cases):
    in_child(damaged_files, tmp_path, cases)


# Image files ----------------------------------------------------------------------------------------------------------


def image_forms():
    """Small images in every format and mode that Pillow writes, right and wrong ones, with EXIF and transparency."""
    g, exif, forms = np.random.default_rng(0), Image.Exif(), []
    exif[0x0112] = 6
    grey = Image.fromarray(g.integers(256, size=(9, 8), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "EPS", "ICO", "PPM"):
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "HSV", "LAB"):
            with contextlib.suppress(OSError, ValueError, KeyError):  # which formats have which modes differs
                image = grey.convert("RGB").convert(mode) if mode != "I;16" else grey.convert("I").convert(mode)
                image.save(buffer := io.BytesIO(), kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
                forms.append(buffer.getvalue())
    return forms


def damaged_images(folder, cases):
    """Half of the changes are in the first 100 bytes, where the size and the mode stand."""
    forms, g, refused, path = image_forms(), random.Random(0), 0, folder / "x.png"
    for case in range(cases):
        whole = forms[case % len(forms)]
        path.write_bytes(mutated(g, whole, g.randrange(min(g.choice([100, 10**6]), len(whole)))))
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                images = data.read_image_files([path])
                assert images.dtype == np.uint8 and images.shape[0] == 1 and images.shape[3] == 3 and images.size
            except ValueError as error:
                refused += 1
                assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 500, error
        assert said.getvalue().count("\n") <= 1
    assert cases / 4 < refused < cases


@pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_damaged_image_is_refused_or_works(tmp_path, cases):
    in_child(damaged_images, tmp_path, cases)


# Model files ----------------------------------------------------------------------------------------------------------


def test_any_model_file_ends_in_one_line_or_works(tmp_path, monkeypatch, fuzz_cases):
    own_checkpoint(tmp_path / "m.pt", num_classes=10)
    whole = (tmp_path / "m.pt").read_bytes()
    monkeypatch.setattr(eval_attacks, "evaluate", begin)
    g, refused = random.Random(0), 0
    for _ in range(fuzz_cases):
        content = mutated(g, whole, g.randrange(len(whole)))
        (tmp_path / "m.pt").write_bytes(content)
        refused += refuses(eval_attacks.main, ["--model-path", str(tmp_path / "m.pt"), "--dataset", "digits",
                                               "--num-images", "2"])
        assert (tmp_path / "m.pt").read_bytes() == content and len(list(tmp_path.iterdir())) == 1
    assert refused > fuzz_cases / 4


HOSTILE = [
    {"args": 5}, {"args": None}, {"args": {"dataset": 5}}, {"args": {"dataset": "/etc"}}, {"args": {"dataset": "x\ny"}},
    {"args": {"dataset": "digits", "arch": "a", "defense": "mart", "spat_alpha": "x", "seed": 1, "epsilon": "0.1"}},
    {"args": {"dataset": "x\ny", "arch": "a", "defense": "b", "spat_alpha": 0.5, "seed": 1, "epsilon": "0.1"}},
    {"epoch": "x"}, {"classes": 3}, {"state_dict": {}},
    {"state_dict": {"fc.weight": torch.zeros(2)}}, {"state_dict": {5: torch.zeros(2)}},
    {"state_dict": {"fc.weight": torch.zeros(10, 64), "block1.layer.0.conv1.weight": torch.zeros(())}},
    {"state_dict": {"fc.weight": torch.zeros(10**6, 1), "block1.layer.0.conv1.weight": torch.zeros(16 * 99, 1)}},
    {"normalize_input": True}, {"state_dict": {"state_dict": 5}}, {"model_state_dict": 5},
    {"state_dict": {"mean": torch.zeros(3), "std": torch.ones(3), "1.conv1.weight": torch.zeros(1)}},
    {"state_dict": {"linear.weight": torch.zeros(()), "layer1.0.conv1.weight": torch.zeros(1)}},
]


@pytest.mark.parametrize("change", HOSTILE, ids=range(len(HOSTILE)))
def test_well_formed_files_with_the_wrong_things_in_them(tmp_path, capsys, change):
    own_checkpoint(tmp_path / "m.pt", num_classes=10)
    checkpoints.save(checkpoints.load(tmp_path / "m.pt") | change, tmp_path / "m.pt")
    try:
        eval_attacks.main(["--model-path", str(tmp_path / "m.pt"), "--num-images", "1", "--attacks", "natural",
                           "--data-dir", str(tmp_path / "no-such-folder"), "--precision", "fp32"])
    except SystemExit as error:
        assert error.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error, error


@pytest.mark.parametrize("add", [
    lambda w: {"fc.weight": w.to_sparse()}, lambda w: {"fc.weight": w.to("meta")}, lambda w: {"fc.weight": w * 1j},
    lambda w: {"mean": w[0].to_sparse(), "std": w[0]}, lambda w: {"mean": w[0, :3], "std": w[0, :3] * float("nan")},
    lambda w: {"mean": w[0, :3].to("meta"), "std": w[0, :3]},
], ids=["sparse", "meta", "complex", "sparse mean", "nan", "meta mean"])
def test_a_state_dict_of_odd_tensors_is_refused(tmp_path, add):
    own_checkpoint(tmp_path / "m.pt", num_classes=10)
    state = checkpoints.load(tmp_path / "m.pt")["state_dict"]
    checkpoints.save(state | add(state["fc.weight"]), tmp_path / "m.pt")
    with pytest.raises(ValueError, match="^[^\n]+$"):
        checkpoints.load_model(tmp_path / "m.pt")
