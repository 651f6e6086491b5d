"""A data set as one uint8 tensor; shuffling, crop and flip as tensor operations on the data's device.

Nothing here reads or sets a global random state: every draw comes from a generator made from integers, so that the
randomness of a training step is a function of (seed, step).
"""

import contextlib
import hashlib
import math
import os
import pathlib
import re
import sys
import warnings
from typing import NamedTuple

import filelock
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

NAMED = ("cifar10", "cifar100", "digits")
# The radius to train and to evaluate with, unless a flag says otherwise. On digits PGD-20 breaks a standard model.
EPSILON, EPSILON_DIGITS = "8/255", "0.05"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # and not EPS, which Pillow would have Ghostscript run
EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow clips the other modes to 255


class Dataset(NamedTuple):
    """Images (N, 3, H, W) uint8 in channels_last, labels (N,) int64 and the names of the classes. aux is a data set of
    pseudo-labelled images to train on as well. mirror says whether a mirrored image is still of its class."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: list
    aux: "Dataset | None" = None
    mirror: bool = True

    def to(self, device):
        return self._replace(images=self.images.to(device), labels=self.labels.to(device),
                             aux=self.aux and self.aux.to(device))

    def subset(self, indices):
        return self._replace(images=self.images[indices], labels=self.labels[indices])


def load(name, data_dir="data", train=True):
    """Load the training or the test part of a data set: "cifar10" or "cifar100" (downloaded into data_dir if need be),
    "cifar10-first4" (its first four classes; any number from 2 on), "digits" (scikit-learn's, resized to 32x32) or a
    folder with train/CLASS/*.png and test/CLASS/*.png. Raise ValueError with one line for what is missing or damaged.
    """
    if name in ("cifar10", "cifar100"):
        return _cifar(name, data_dir, train)
    if name == "digits":
        return _digits(train)
    if first := re.fullmatch(r"(cifar100?)-first([2-9]|[1-9]\d)", name):
        whole, k = load(first[1], data_dir, train), int(first[2])
        return whole.subset(whole.labels < k)._replace(classes=whole.classes[:k])
    if not pathlib.Path(name).is_dir():
        raise ValueError(f"unknown data set {name!r}: neither {', '.join(NAMED)} nor a folder")
    return _image_folder(pathlib.Path(name), train)


def _dataset(images_nhwc, labels, classes):
    # permuted, NHWC is channels_last: no copy
    return Dataset(torch.from_numpy(images_nhwc).permute(0, 3, 1, 2), torch.tensor(labels), list(classes))


def _cifar(name, data_dir, train):
    import torchvision  # here and below: its import takes 1.7 s, which digits need not wait for

    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    folder = pathlib.Path(data_dir, cls.base_folder)
    lock = folder.with_name(".download.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, NotImplementedError):  # read-only, or without locks: nobody waits
                stack.enter_context(filelock.FileLock(lock))  # of several processes one downloads
                stack.callback(_unlink, lock)  # still held: who waits for it makes a new one
            data = cls(data_dir, train=train, download=not folder.exists())  # it checks every file's MD5
    except (OSError, RuntimeError) as error:
        if folder.exists():
            raise ValueError(f"{folder} is incomplete or damaged (its checksums are not {name}'s): unpack "
                             f"{cls.filename} again") from None
        raise ValueError(
            f"{folder} is not there and cannot be downloaded ({_one_line(error)}): put {cls.base_folder} from "
            f"{cls.url} there, or use --dataset digits, which needs no download") from None
    return _dataset(data.data, data.targets, data.classes)


def _unlink(path):
    with contextlib.suppress(OSError):  # Windows removes no file that is open
        path.unlink()


def _digits(train):
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None] * (255 / 16)
    images = F.interpolate(images, size=(32, 32), mode="bilinear").round().byte().expand(-1, 3, -1, -1)
    images = images.contiguous(memory_format=torch.channels_last)
    part = slice(0, 1397) if train else slice(1397, None)  # 400 test images; the file's order is by writer
    classes = list(map(str, digits.target_names))
    return Dataset(images[part], torch.from_numpy(digits.target[part]), classes, mirror=False)


def default_epsilon(name):
    return EPSILON_DIGITS if name == "digits" else EPSILON


def is_named(name):
    """Say whether a data set is one that load() knows by name, whose images are always the same."""
    return re.fullmatch(r"digits|cifar100?(-first\d+)?", name) is not None


def fitted(dataset, name, model):
    """Return the data set with its labels in the order of a model's classes. Raise ValueError unless its images and
    classes are those that the model was trained on. model: a checkpoint, or the info of checkpoints.load_model; another
    project's file states the number of classes alone."""
    check_size(dataset.images, name, model)
    classes = [str(each) for each in model.get("classes") or dataset.classes]
    wanted = model.get("num_classes", len(classes))
    if len(dataset.classes) != wanted:
        raise ValueError(f"the model has {wanted} classes, {name} has {len(dataset.classes)}")
    if sorted(classes) != sorted(dataset.classes):
        here = ", ".join(sorted(set(dataset.classes) - set(classes))[:5])
        there = ", ".join(sorted(set(classes) - set(dataset.classes))[:5])
        raise ValueError(f"{name} has other classes than the model: {here} and not {there}")
    numbers = torch.tensor([classes.index(each) for each in dataset.classes])
    return dataset._replace(labels=numbers[dataset.labels], classes=classes)


def check_size(images, name, model):
    """Raise ValueError if images (N, 3, H, W) are of another size than a model's; model: as for fitted."""
    size, found = model.get("image_size"), list(images.shape[2:])
    if size is None and is_named((model.get("args") or {}).get("dataset", "")):
        size = [32, 32]  # of a checkpoint older than this entry
    if size is not None and size != found:
        raise ValueError(f"{name} has images of {found[0]}x{found[1]} pixels (height x width), the model was trained "
                         f"on {'x'.join(map(str, size))}: resize them")


def fingerprint(dataset):
    """Return a hash of the images, in their order, with the names of their classes and of all classes. It is the same
    for every order of the classes and wherever the files lie."""
    named = [dataset.classes[label] for label in dataset.labels.tolist()]
    digest = hashlib.sha256(repr((list(dataset.images.shape), sorted(dataset.classes), named)).encode())
    for part in dataset.images.split(10_000):  # a copy of all may be 1.5 GB
        digest.update(np.ascontiguousarray(part.permute(0, 2, 3, 1).cpu().numpy()))
    return digest.hexdigest()


def read_image_files(files):
    """Return the RGB images, (N, H, W, 3) uint8, upright where EXIF says how they were taken. Raise ValueError for what
    is no image of 8 bits a channel, and unless all have the size of the first."""
    images, transparent = [], 0
    with warnings.catch_warnings(action="ignore"):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for file in files:
            try:
                with Image.open(file, formats=IMAGE_FORMATS) as image:
                    if image.mode not in EIGHT_BIT:
                        raise ValueError(f"it has pixels of mode {image.mode}: convert it to RGB or grey of 8 bits")
                    ImageOps.exif_transpose(image, in_place=True)
                    if image.has_transparency_data:
                        transparent += image.convert("RGBA").getchannel("A").getextrema()[0] < 255
                    images.append(np.asarray(image.convert("RGB")))
            except Exception as error:  # Pillow raises nearly anything on a damaged file
                raise ValueError(f"{file} cannot be read as an image ({_one_line(error):.200})") from None
            if images[-1].shape != images[0].shape:
                height, width, _ = images[0].shape
                raise ValueError(f"{file} is not {width}x{height} pixels as the images before it")
    if transparent:
        _say(f"{transparent} of {len(images)} images have transparent pixels: they become the colour that the file "
             f"holds for them, often black, as in {pathlib.Path(files[0]).parent}")
    return np.stack(images)


def _say(note):
    """Print a note on stderr, once for all processes of a job."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {note}", file=sys.stderr)


def _image_folder(path, train):
    """Load PATH/train/CLASS/* or PATH/test/CLASS/*, in a fixed shuffled order: so the first images hold every class.
    An evaluation looks into test/ alone; training asks that both have the same classes and the same size of images."""
    part = path / ("train" if train else "test")
    try:
        classes, files, labels, others = _class_names(part), [], [], []
        if train and classes != _class_names(path / "test"):
            raise ValueError("the classes of train and test differ")
        if len(classes) < 2:
            raise ValueError("one class is no classification task")
        for name in sorted(classes):
            found, left_out = _files_below(part / name)
            if not found:
                raise ValueError(f"Found no valid file for the classes {name} in {part}")
            files, labels, others = files + found, labels + [classes.index(name)] * len(found), others + left_out
        one_of_test = _files_below(path / "test" / classes[0])[0][:1] if train else []  # must be as large as the others
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None
    if others:
        _say(f"{len(others)} files below {part} are not read, as {others[0]}: only {', '.join(IMAGE_SUFFIXES)} are")
    images = read_image_files(files + one_of_test)
    order = permutation(len(files), _SPLIT).numpy()
    return _dataset(images[order], np.asarray(labels)[order].tolist(), classes)


def _class_names(folder):
    """Return the names of the folders in a folder, but for hidden ones, in their order: 0 to K-1 by number, others as
    strings. Raise OSError or ValueError if there are none."""
    names = sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not names:
        raise ValueError(f"Couldn't find any class folder in {folder}")
    numbers = [str(number) for number in range(len(names))]
    return numbers if sorted(numbers) == names else names


def _files_below(folder):
    """Return (the image files, the other files) of a class, sorted. A hidden folder is left out, and so is one that a
    link leads to a second time. Raise OSError where one cannot be listed."""
    def fail(error):
        raise error

    real = pathlib.Path(folder).resolve()
    seen, files, others = set(real.parents), [], []
    for root, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        real = pathlib.Path(root).resolve()
        folders[:] = sorted(name for name in folders if not name.startswith(".") and real not in seen)
        if real in seen:
            continue
        seen.add(real)
        for name in names:
            is_image = name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
            (files if is_image else others).append((root, name))
    return [[os.path.join(*place) for place in sorted(places)] for places in (files, others)]


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def as_images(path, arrays):
    """Return the array `data` of a file, uint8 of N x H x W x 3 or N x 3 x H x W, as a tensor (N, 3, H, W) without a
    copy. Raise ValueError if it is another. arrays: of checkpoints.load_arrays."""
    images = arrays["data"]
    if images.dtype != np.uint8 or images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise ValueError(f"{path}: `data` is {images.dtype} {images.shape}, not uint8 N x H x W x 3 or N x 3 x H x W")
    if images.size == 0:
        raise ValueError(f"{path}: holds no images")
    with warnings.catch_warnings(action="ignore"):  # of an array that cannot be written: nobody writes to it
        images = torch.from_numpy(images)
    return images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)


def pseudo_labelled(path, arrays, like):
    """Return the data set `like` with a file's `data` and `extrapolated_targets` (RST's names) as its aux. Raise
    ValueError if they do not fit it. arrays: what the file at `path` holds, `classes` if pseudo_label.py wrote it."""
    images, labels = as_images(path, arrays), arrays["extrapolated_targets"]
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(f"{path}: `extrapolated_targets` is {labels.dtype} {labels.shape}, not {len(images)} integers")
    if "classes" in arrays and arrays["classes"].tolist() != like.classes:
        raise ValueError(f"{path}: its labels are of other classes, or in another order: {arrays['classes'].tolist()}")
    if labels.min() < 0 or labels.max() >= len(like.classes):
        raise ValueError(f"{path}: labels from {labels.min()} to {labels.max()}, not 0 to {len(like.classes) - 1}")
    if images.shape[1:] != like.images.shape[1:]:
        raise ValueError(f"{path}: images of {tuple(images.shape[1:])}, not {tuple(like.images.shape[1:])}")
    return like._replace(aux=Dataset(images, torch.from_numpy(labels.astype(np.int64)), like.classes))


def check_leak(path, aux, held_out):
    """Raise ValueError if any of a file's images, aux, is one of the held-out images, to the last pixel."""
    if len(held_out.labels) == 0:
        return
    theirs = {image.tobytes() for image in held_out.images.permute(0, 2, 3, 1).numpy()}
    same = sum(image.tobytes() in theirs for image in aux.images.permute(0, 2, 3, 1).numpy())
    if same:
        raise ValueError(f"{path} holds {same} of the {len(held_out.labels)} held-out images, which would choose "
                         "best.pt: train with --val-size 0, or leave them out of the file")


def split(dataset, val_size, limit=None):
    """Return (training part, held-out part). val_size images, the same for every seed, are held out. The others stay
    in their order, and the first `limit` of them are kept. Raise ValueError if too few are left."""
    n = len(dataset.labels)
    if n - val_size < (limit or 1):
        raise ValueError(f"--val-size {val_size}: {n} training images are too few to hold out so many and train on "
                         f"{limit or 1}")
    order = permutation(n, _SPLIT)
    kept = order[val_size:].sort().values[:limit]
    return dataset.subset(kept), dataset.subset(order[:val_size])


def generator(device, *key):
    """Return a torch.Generator on the device, seeded by a hash of the integers in key."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> np.uint64(1)))


# The first integer of a key says what is drawn, so that no two draws share their randomness.
_SPLIT, _ORDER, _STEP = 1, 2, 3


def permutation(n, *key):
    """Return a permutation of n from the integers in key. It is drawn on the CPU, to be the same for every device."""
    return torch.randperm(n, generator=generator("cpu", *key))


def step_generator(device, seed, step):
    """Return the generator of everything random in one training step: crops, flips, the attack's start."""
    return generator(device, _STEP, seed, step)


def batches(n, batch_size, seed, epoch, aux=0):
    """Return the index batches of one epoch, (ceil(n / batch_size), batch_size), with every image once. The last is
    filled up with the epoch's first images. With aux, so many of each batch are left to `mixed` to fill: the epoch
    keeps its length and shows only the first images of its order, as RST's."""
    order = permutation(n, _ORDER, seed, epoch)
    steps, size = math.ceil(n / batch_size), batch_size - aux
    return order.repeat(math.ceil(steps * size / n))[: steps * size].view(steps, size)


def mixed(dataset, indices, aux, rng):
    """Return (images, labels) of the labelled images at `indices` and of `aux` pseudo-labelled ones, which are drawn
    with replacement and shuffled among them. The two stay apart in memory: there may be 1.5 GB of the latter."""
    images, labels = dataset.images[indices], dataset.labels[indices]
    if not aux:
        return images, labels
    drawn = torch.randint(len(dataset.aux.labels), (aux,), generator=rng, device=images.device)
    order = torch.randperm(len(indices) + aux, generator=rng, device=images.device)
    return (torch.cat([images, dataset.aux.images[drawn]])[order],
            torch.cat([labels, dataset.aux.labels[drawn]])[order])


def augment(images, rng, mirror=True, padding=4):
    """Crop and flip a uint8 batch at random, as TRADES and MART do; return float32 in [0, 1]."""
    b, device = len(images), images.device
    top = torch.randint(2 * padding + 1, (b,), generator=rng, device=device)
    left = torch.randint(2 * padding + 1, (b,), generator=rng, device=device)
    flip = torch.rand(b, generator=rng, device=device) < (0.5 if mirror else 0.0)
    return to_float(crop_and_flip(images, top, left, flip, padding))


def crop_and_flip(images, top, left, flip, padding=4):
    """Return images (B, C, H, W), padded with zeros, cropped at (top, left) in [0, 2·padding] and mirrored where flip
    is true, in channels_last."""
    (b, _, h, w), device = images.shape, images.device
    rows = top[:, None] + torch.arange(h, device=device)
    columns = torch.arange(w, device=device)
    columns = left[:, None] + torch.where(flip[:, None], w - 1 - columns, columns)
    padded = F.pad(images, [padding] * 4).permute(0, 2, 3, 1)
    example = torch.arange(b, device=device)[:, None, None]
    return padded[example, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def to_float(images):
    """Turn uint8 into float32 in [0, 1], channels_last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)
