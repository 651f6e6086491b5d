"""Read and write files: this project's checkpoints, state dicts that others released, arrays of pseudo-labelled images.

Nothing from a file is executed: torch.load runs with weights_only=True, and a pickle of arrays may name nothing else.
"""

import codecs
import contextlib
import hashlib
import os
import pathlib
import pickle
import re
import warnings
import zipfile

import numpy as np
import torch

import models

FORMAT = "spat-1"
ASSUMED = "no normalisation assumed: the file cannot tell how its training images were normalised (--normalize)"
_STEM = re.compile(r"((?:(?!(?:sub_)?block\d|layer)\w+\.)*)conv1\.weight")  # the first layer, behind a wrapper's prefix


def write_atomically(path, write):
    """Replace a file so that the old or the new one is whole at any moment. write: bytes, or a function of the open
    file. Raise OSError, and leave the old file as it is, where that fails."""
    path = pathlib.Path(path).resolve()  # what a link leads to, and not the link, is replaced
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            if callable(write):
                write(file)
            else:
                file.write(write)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(state, path):
    """Write `state` by torch.save, atomically. Raise OSError where that fails."""
    def write(file):
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a full disk
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0]) from None

    write_atomically(path, write)


def load(path, device="cpu"):
    """Return what a file holds. Raise ValueError with one line for a file that is missing, empty, damaged, an HTML
    page, or a pickle with anything but tensors and plain values in it (which is not executed)."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path}: empty file")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{path}: an HTML page, not a model: the download went wrong")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git-LFS pointer, not the model: fetch it with `git lfs pull`")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        raise ValueError(f"{path}: a safetensors file: save what safetensors.torch.load_file makes of it by torch.save")
    try:
        if head.startswith(b"PK\3\4"):  # as torch.load tells its two formats apart
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("checksum")  # torch.load does not look at the checksums
        elif not head.startswith(b"\x80"):
            raise ValueError("no pickle")  # where a text begins with "c", torch.load reads the name of an object
        with warnings.catch_warnings(action="ignore"):  # on another pickle protocol than torch's
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        if "torchscript" in str(error).lower():
            raise ValueError(f"{path}: a TorchScript program: save torch.jit.load(FILE).state_dict() alone") from None
        if "unsupported global" in str(error).lower():
            raise ValueError(f"{path}: holds Python objects besides tensors, which are not loaded; where you trust it, "
                             "torch.load it with weights_only=False and save its state_dict() by torch.save") from None
        raise ValueError(f"{path}: not a model file, or a damaged one ({type(error).__name__})") from None


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(path, device="cpu", arch=None, num_classes=None, normalize=None, weights=None):
    """Return (the model in float32 and eval mode, info) of a file of this project or of TRADES, MART, RST, AWP, FAT,
    robust_overfitting and others of that line of work: a bare state dict or one in a container, under any prefix.

    info holds path, sha256, arch, num_classes, normalize, weights, notes (sentences on what the file left open) and,
    for a file of this project, args, epoch, classes, image_size and trained_on (fingerprints of the images). Where arch
    and num_classes are given, the file must agree. normalize: ((mean of 3), (std of 3)) of training images where the
    file does not say so, for a first layer.
    weights: the name of one of several sets. Raise ValueError with one line that says what is wrong with the file.
    """
    content, notes = load(path, device), []
    try:
        state, prefix = _without_prefix(pick_weights(content, weights))
        header = _header(content) if content.get("format") == FORMAT else {}
        state, normalize = _normalisation(state, content, prefix, normalize, notes)
        found_arch, found_classes = infer_arch(state)
        stated, twin = header["args"]["arch"] if header else arch, models.TWINS.get(found_arch)
        if twin and stated == twin:
            found_arch = twin
        elif twin and stated is None:
            notes.append(f"taken for a {found_arch}; there are two: if its projections see a block's input and not the "
                         f"activation, as fast_adversarial's, it needs --arch {twin}")
        if arch not in (None, found_arch):
            raise ValueError(f"it is a {found_arch}, not a {arch}")
        if num_classes not in (None, found_classes):
            raise ValueError(f"it has {found_classes} classes, not {num_classes}")
        _check_fit(state, found_arch, found_classes)
        model = models.build_model(found_arch, found_classes)
        model.load_state_dict(state)
        if normalize:
            model = models.Normalised(model, *normalize)
        for key, value in model.state_dict().items():
            if not value.isfinite().all() or (key.endswith("running_var") and value.min() < 0):
                raise ValueError(f"its weights are not finite, or a running variance is negative ({key})")
    except Exception as error:  # torch's, where a tensor is sparse, quantized, complex, without memory, ...
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    info = {"path": str(path), "sha256": sha256(path), "arch": found_arch, "num_classes": found_classes,
            "normalize": normalize, "weights": weights, "notes": notes} | header
    return model.to(device).eval(), info


def pick_weights(content, name=None):
    """Return the state dict that a file's content is or holds at any depth; of several the one called `name`. Raise
    ValueError if there is none of that name, or several and no name."""
    found, open_ends, seen = {}, [("", content)], set()
    for where, value in open_ends:  # which grows
        if _is_state_dict(value):
            found[where or "(no name)"] = value
        elif isinstance(value, dict) and id(value) not in seen and len(where) < 200:  # a dict may hold itself
            seen.add(id(value))
            open_ends += [(f"{where}.{key}".removeprefix("."), inner) for key, inner in value.items()]
    if not found:
        held = ", ".join(map(repr, content)) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(f"holds no state dict but {held or 'nothing':.200}")
    if name is None and len(found) == 1:
        return found.popitem()[1]
    if name not in found:
        names = ", ".join(map(repr, found))
        raise ValueError(f"holds the weights {names:.200}: pick one by --weights NAME")
    return found[name]


def _is_state_dict(value):
    """Return whether a value is a dict of tensors by name, weights among them."""
    return isinstance(value, dict) and any(str(key).endswith("weight") for key in value) and all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) and not tensor.is_complex()
        for key, tensor in value.items())


def _without_prefix(state):
    """Return (a state dict without what wrappers put before the network's names, that prefix). Entries that are never
    used go too: the count of torch.optim.swa_utils, and TRADES' copy of its first block."""
    prefixes = {match[1] for key in state if (match := _STEM.fullmatch(key))}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    return {key: value for key, value in state.items()
            if key.rpartition(".")[2] != "n_averaged" and not key.startswith("sub_block1.")}, prefix


def infer_arch(state):
    """Return (architecture name, number of classes) of a state dict with TRADES' or MART's parameter names. Raise
    ValueError if models.py builds nothing with its names and shapes."""
    if any("init_conv" in key for key in state):
        raise ValueError(f"it is a WideResNet with Swish (init_conv), which is not built here; known: {models.ARCHS}")
    if "fc.weight" in state and "block1.layer.0.conv1.weight" in state:
        width = state["block1.layer.0.conv1.weight"].shape[0] // 16
        depth = 6 * _count(state, r"block1\.layer\.(\d+)\.") + 4
        return f"wrn-{depth}-{width}", state["fc.weight"].shape[0]
    if "linear.weight" in state and "layer1.0.conv1.weight" in state:
        blocks = tuple(_count(state, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        block = models.BasicBlock
        if "bn.weight" in state:
            block = models.PreActBlock
        elif "layer1.0.conv3.weight" in state:
            block = models.Bottleneck
        for name, known in models.RESNETS.items():
            if known == (block, blocks):
                return name, state["linear.weight"].shape[0]
    raise ValueError(f"its parameter names are of no known architecture; known: {models.ARCHS}")


def _count(state, pattern):
    """Return how many different integers the group of the pattern takes over the keys."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _check_fit(state, arch, num_classes):
    """Raise ValueError unless the state dict has the architecture's parameters, by name and shape. Spend no memory."""
    with torch.device("meta"):
        expected = models.build_model(arch, num_classes).state_dict()
    tracked = {key for key in expected if key.endswith("num_batches_tracked")}  # older torch did not save it
    wrong = [key for key, value in expected.items() if key in state and state[key].shape != value.shape]
    missing, unknown = expected.keys() - state.keys() - tracked, state.keys() - expected.keys()
    for what, keys in (("lacks", missing), ("has besides", unknown), ("has in another shape", wrong)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"it looks like a {arch} but {what} {', '.join(sorted(keys)[:3])}{more}")


def _header(content):
    """Return what an own checkpoint says of its model. Raise ValueError where a type is wrong."""
    args, epoch, classes = content.get("args"), content.get("epoch"), content.get("classes")
    size, images = content.get("image_size"), content.get("images")  # None: of a run before there was such an entry
    entries = (args, dict), (epoch, int), (classes, list), (size, list | None), (images, dict | None)
    types = {"dataset": str, "defense": str, "arch": str, "epsilon": str, "seed": int, "spat_alpha": float | None}
    if all(isinstance(entry, kind) for entry, kind in entries) and all(
            isinstance(args.get(key), kind) for key, kind in types.items()) and all(
            isinstance(text, str) for item in (images or {}).items() for text in item):
        return {"args": args, "epoch": epoch, "classes": classes, "image_size": size, "trained_on": images}
    raise ValueError("its header is not one that train_cifar.py writes")


def _normalisation(state, content, prefix, stated, notes):
    """Return (the network's own entries, (mean, std) or None). Some files hold a layer before the network, as the first
    of a Sequential or as entries beside the weights. prefix: what stood before the network's names; stated: what the
    user says. Append to notes what the file leaves open. Raise ValueError."""
    names = {"mean": "mean", "mu": "mean", "std": "std", "stdev": "std", "sigma": "std"}
    layer = {names[leaf]: key for key in state if (leaf := key.rpartition(".")[2]) in names}
    found, own = None, content.get("format") == FORMAT
    if len(layer) == 2:
        found = tuple(state[layer[name]].flatten().tolist() for name in ("mean", "std"))
        state = {key: value for key, value in state.items() if key not in layer.values()}
        if any(len(values) != 3 for values in found) or not all(value > 0 for value in found[1]):  # nor nan
            raise ValueError("its normalisation is not three means and three positive standard deviations")
    elif stated is None and (re.search(r"\b[1-9]\d*\.", prefix) or content.get("normalize_input")):
        raise ValueError("it was trained behind a normalisation that is not in the file: state it with --normalize "
                         "MEAN STD (0,0,0 1,1,1 for none)")
    elif stated is None and not own and content.get("normalize_input") is None:
        notes.append(ASSUMED)
    if stated and min(stated[1]) <= 0:
        raise ValueError("--normalize: a standard deviation must be above 0")
    if stated and max(*stated[0], *stated[1]) > 1:
        raise ValueError("--normalize: values above 1: in units of 255? They are to be those of images in [0, 1]")
    if found and stated:
        raise ValueError(f"--normalize: the file holds its own, {found[0]} and {found[1]}")
    if own and stated:
        raise ValueError("--normalize: it is a file of this project, trained on images as they are")
    return state, found or stated


def load_arrays(path, names=("data", "extrapolated_targets"), optional=()):
    """Return {name: array} of an .npz file or of a pickle such as RST's, whose names are the default. Arrays may be
    read-only. Raise ValueError with one line for a file that is neither or lacks one of the names, not an optional one:
    those are pseudo_label.py's, which writes an .npz.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with open(path, "rb") as file, contextlib.redirect_stderr(None):  # Python tells of a bytearray without memory
            is_npz = zipfile.is_zipfile(path)
            content = np.load(file) if is_npz else _Unpickler(file).load()
            held = [key for key in content.keys() if isinstance(key, str)]
            arrays = {name: _array(content[name]) for name in (*names, *(optional if is_npz else ())) if name in held}
    except Exception as error:  # a damaged file may raise nearly anything
        why = str(error) or type(error).__name__  # shown by repr, for it may hold unprintable letters of the file
        raise ValueError(f"{path}: neither an .npz nor a pickle of arrays ({why!r:.200})") from None
    for name in names:
        if name not in arrays:
            raise ValueError(f"{path}: holds no `{name}` but {', '.join(map(repr, held)) or 'nothing':.200}")
    return arrays


# Arrays from a pickle. numpy itself does not read them: what it makes of a forged dtype may point anywhere in memory.


class _Unpickler(pickle.Unpickler):
    """Read plain values and arrays of numbers. Raise ValueError for a name of anything else, and never call it."""

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # of numpy 2 and 1
        known = {"numpy.dtype": _Unbuilt, "numpy.core.multiarray._reconstruct": _Unbuilt,
                 "numpy.ndarray": "an argument of _reconstruct", "_codecs.encode": codecs.encode,  # bytes as a text
                 "numpy.core.multiarray.scalar": lambda dtype, content: _from_bytes(content, dtype, (), "C")[()],
                 "numpy.core.numeric._frombuffer": lambda *arguments: _from_bytes(*arguments)}  # the file may alter it
        if name not in known:
            raise ValueError(f"it names {name!r:.99}, which is no array")
        return known[name]


class _Unbuilt:
    """What a pickle says of a dtype or of an array."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


def _from_bytes(content, dtype, shape, order, axes=None):
    """Return an array that shares the memory of its bytes. The arguments are those of numpy's own _frombuffer. Raise
    nearly anything, unless it is of numbers and as large as it says."""
    dtype = dtype.state[1] + dtype.arguments[0]  # the byte order, and a letter with the size
    if not re.fullmatch("[<>|=](b1|[iu][1248]|f[248])", dtype) or any(n < 0 for n in shape):  # -1 is "what is left"
        raise ValueError("an array of other things than numbers, or of an impossible shape")
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if order == "F" else "C")
    return array.transpose(axes) if axes else array


def _array(value):
    """Return an array that was read, or a list of integers as an array. Raise nearly anything if it is neither."""
    if isinstance(value, _Unbuilt):
        _, shape, dtype, fortran, content = value.state
        value = _from_bytes(content, dtype, shape, "F" if fortran else "C")
    if isinstance(value, list) and all(type(v) is int or isinstance(v, np.integer) for v in value):
        value = np.array(value)
    if not isinstance(value, np.ndarray):
        raise ValueError("something else than an array")
    return value


# A run's directory. ---------------------------------------------------------------------------------------------------

OF_RUN = "last.pt", "last.prev.pt"  # the checkpoint to go on from, and the one before it


def of_run(out_dir):
    """Return the paths of the checkpoints that a run has left to go on from."""
    return [path for path in (pathlib.Path(out_dir, name) for name in OF_RUN) if path.exists()]


def save_run(checkpoint, out_dir):
    """Save last.pt; the one before it stays as last.prev.pt. Both are whole at any moment."""
    last, previous = (pathlib.Path(out_dir, name) for name in OF_RUN)
    if last.exists():
        write_atomically(previous, last.read_bytes())  # a copy: last.pt stays there
    save(checkpoint, last)


def load_run(out_dir):
    """Return the newest whole checkpoint of a run, last.pt or else last.prev.pt. Its entry "damage" says what is wrong
    with last.pt, or is None. Raise ValueError if there is no whole one, or none of a run."""
    last, previous = (pathlib.Path(out_dir, name) for name in OF_RUN)
    if not of_run(out_dir):
        raise ValueError(f"--resume: {out_dir} holds no run (no last.pt)")
    path, damage = last, None
    try:
        checkpoint = load(last)
    except ValueError as error:
        if not previous.exists():
            raise
        path, damage, checkpoint = previous, str(error), load(previous)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"--resume: {path} is not a checkpoint of train_cifar.py")
    for key in ("args", "state_dict", "optimizer", "step", "rows", "best", "sums", "on"):
        if checkpoint.get(key) is None:
            raise ValueError(f"--resume: {path} holds no {key}: a best.pt, or of an older version")
    return checkpoint | {"damage": damage}
