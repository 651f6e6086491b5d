"""Model files: this project's own (written atomically, resumable) and bare state dicts of the same architectures.

Nothing from a file is executed: torch.load runs with weights_only=True everywhere.
"""

import hashlib
import os
import pathlib
import re
import warnings
import zipfile

import torch

import models

FORMAT = "spat-1"
_PREFIX = re.compile(r"^(module\.|model\.|_orig_mod\.)+")


def write_atomically(path, write):
    """Write a file so that the old one or the new one is there, whole, at any moment. write: bytes, or a function of
    the open file. Raises OSError; the old file is then untouched."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file) if callable(write) else file.write(write)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(state, path):
    """torch.save, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path, device="cpu"):
    """What a file holds; raises ValueError with one line for a file that is missing, empty, damaged, an HTML page, or
    a pickle with anything but tensors and plain values in it (which is not executed)."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise ValueError(f"{path}: empty file")
    if head.lstrip().startswith(b"<"):
        raise ValueError(f"{path}: an HTML page, not a model: the download went wrong")
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("checksum")  # torch.load does not look at the checksums
        with warnings.catch_warnings(action="ignore"):  # on another pickle protocol than torch's
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise ValueError(f"{path}: not a model file, or a damaged one ({type(error).__name__})") from None


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _count(state, pattern):
    """How many different integers the group of the pattern takes over the keys."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def infer_arch(state):
    """(architecture name, number of classes) of a state dict with TRADES' or MART's parameter names; raises
    ValueError if its names and shapes are none that models.py builds."""
    if any(value.ndim == 0 for key, value in state.items() if key.endswith("weight")):
        raise ValueError("some of its weights have no dimensions")
    if "fc.weight" in state and "block1.layer.0.conv1.weight" in state:
        width = state["block1.layer.0.conv1.weight"].shape[0] // 16
        depth = 6 * _count(state, r"block1\.layer\.(\d+)\.") + 4
        return f"wrn-{depth}-{width}", state["fc.weight"].shape[0]
    if "linear.weight" in state and "layer1.0.conv1.weight" in state:
        blocks = tuple(_count(state, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        block = (
            models.PreActBlock
            if "bn.weight" in state
            else models.Bottleneck
            if "layer1.0.conv3.weight" in state
            else models.BasicBlock
        )
        for name, known in models.RESNETS.items():
            if known == (block, blocks):
                return name, state["linear.weight"].shape[0]
    raise ValueError(f"its parameter names are of no known architecture; known: {models.ARCHS}")


def _fits(state, arch, num_classes):
    """ValueError unless the state dict has the architecture's parameters, by name and shape; before memory is spent."""
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
    """The part of an own checkpoint that says what the model is, after a check of its types; raises ValueError."""
    header = {key: content.get(key) for key in ("args", "epoch", "classes")}
    types = {"dataset": str, "defense": str, "arch": str, "epsilon": str, "seed": int, "spat_alpha": float | None}
    if not (isinstance(header["args"], dict) and isinstance(header["epoch"], int)
            and isinstance(header["classes"], list)
            and all(isinstance(header["args"].get(key), of) for key, of in types.items())):
        raise ValueError("its header is not one that train_cifar.py writes")
    return header


def load_model(path, device="cpu", arch=None, num_classes=None):
    """(the model in float32 and eval mode, info): info holds path, sha256, arch, num_classes and, for a file of this
    project, args, epoch and classes. arch and num_classes are read from the file; given, they must agree with it.

    Takes this project's checkpoints and bare state dicts (with or without DataParallel's or torch.compile's
    prefixes). Raises ValueError with one line that says what is wrong with the file.
    """
    content = load(path, device)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()):
        raise ValueError(f"{path}: holds no state dict")
    state = {_PREFIX.sub("", key): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}  # TRADES never uses it
    try:
        found_arch, found_classes = infer_arch(state)
        if arch not in (None, found_arch):
            raise ValueError(f"it is a {found_arch}, not a {arch}")
        if num_classes not in (None, found_classes):
            raise ValueError(f"it has {found_classes} classes, not {num_classes}")
        _fits(state, found_arch, found_classes)
        info = {"path": str(path), "sha256": sha256(path), "arch": found_arch, "num_classes": found_classes}
        if content.get("format") == FORMAT:
            info |= _header(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model = models.build_model(found_arch, found_classes)
    model.load_state_dict(state)
    return model.to(device).eval(), info
