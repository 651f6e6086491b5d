"""Augmentation against torchvision's transforms; what a data folder must be; the real CIFAR-10 where it is at hand."""

import concurrent.futures
import shutil
import time

import foolbox
import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from helpers import digits_folder, fails_in_one_line
from PIL import Image

import checkpoints
import data
import eval_attacks
import train_cifar


def test_crop_and_flip_equal_torchvisions():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 32, 32), generator=g, dtype=torch.uint8)
    top, left = torch.randint(9, (2, 40), generator=g)
    top[:4], left[:4] = torch.tensor([0, 8, 0, 8]), torch.tensor([0, 0, 8, 8])
    flip = torch.rand(40, generator=g) < 0.5
    ours = data.crop_and_flip(images, top, left, flip)
    for image, t, l, f, cropped in zip(images, top.tolist(), left.tolist(), flip.tolist(), ours, strict=True):
        expected = TF.crop(TF.pad(image, 4), t, l, 32, 32)
        assert torch.equal(cropped, TF.hflip(expected) if f else expected)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_augment_draws_every_offset_and_both_flips():
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = torch.stack([rows, columns, rows]).byte().expand(4000, 3, 32, 32)
    x = data.augment(images, data.step_generator("cpu", 1, 0))
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    seen = {tuple(v.flatten().tolist()) for v in x[:, :2, 16, 15:17]}
    assert len(seen) == 2 * 81  # 9x9 offsets, each with and without flip
    x_upright = data.augment(images, data.step_generator("cpu", 1, 0), mirror=False)
    assert len({tuple(v.flatten().tolist()) for v in x_upright[:, :2, 16, 15:17]}) == 81  # digits: no flip
    assert not data.load("digits").mirror and data.Dataset(images, None, []).mirror
    again = data.augment(images, data.step_generator("cpu", 1, 0))
    assert torch.equal(x, again) and not torch.equal(x, data.augment(images, data.step_generator("cpu", 1, 1)))


@pytest.mark.parametrize("n, batch_size", [(10, 3), (12, 4), (5, 8), (7, 1), (3, 20)])
def test_every_image_is_in_every_epoch(n, batch_size):
    batches = data.batches(n, batch_size, seed=1, epoch=2)
    assert batches.shape == (-(-n // batch_size), batch_size)
    flat = batches.flatten().tolist()
    assert sorted(flat[:n]) == list(range(n)) and flat[n:] == (flat * 20)[: len(flat) - n]
    assert torch.equal(batches, data.batches(n, batch_size, seed=1, epoch=2))


def test_epochs_and_seeds_differ():
    orders = {tuple(data.batches(50, 50, seed, epoch).flatten().tolist()) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_nothing_reads_or_sets_the_global_random_state():
    before = torch.get_rng_state()
    data.batches(50, 5, 1, 1)
    data.augment(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), data.step_generator("cpu", 1, 0))
    data.split(data.load("digits"), 100)
    assert torch.equal(before, torch.get_rng_state())


def test_digits_are_real_and_split():
    train, test = data.load("digits", train=True), data.load("digits", train=False)
    assert train.images.shape == (1397, 3, 32, 32) and test.images.shape == (400, 3, 32, 32)
    assert train.images.dtype == torch.uint8 and train.images.max() > 240 and len(train.classes) == 10
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))


def test_split_holds_out_the_same_images_always():
    digits = data.load("digits")
    train, val = data.split(digits, 100)
    limited, again = data.split(digits, 100, limit=50)
    assert len(train.labels) == 1297 and len(val.labels) == 100
    assert torch.equal(val.images, again.images) and torch.equal(limited.images, train.images[:50])
    together = torch.cat([train.images, val.images]).flatten(1)
    assert len(together.unique(dim=0)) == len(digits.images.flatten(1).unique(dim=0))
    with pytest.raises(ValueError, match="too few"):
        data.split(digits, 1390, limit=8)
    assert len(data.split(digits, 0)[1].labels) == 0


@pytest.fixture
def folder(tmp_path):
    g = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(6):
                pixels = g.integers(256, size=(8, 8, 3), dtype=np.uint8)
                pixels[0, 0] = label
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_a_folder_of_class_folders(folder):
    loaded = data.load(str(folder))
    assert loaded.images.shape == (12, 3, 8, 8) and loaded.classes == ["cat", "dog"]
    assert torch.equal(loaded.images[:, 0, 0, 0].long(), loaded.labels)  # label and image stay together
    assert loaded.labels.tolist() != sorted(loaded.labels.tolist())  # shuffled
    first = np.asarray(Image.open(folder / "train/cat/0.png"))
    assert any(np.array_equal(first, image.permute(1, 2, 0)) for image in loaded.images)


def break_image(folder):
    (folder / "train/dog/1.png").write_bytes((folder / "train/dog/1.png").read_bytes()[:60])


def break_sizes(folder):
    Image.new("RGB", (9, 8)).save(folder / "train/dog/1.png")


def break_classes(folder):
    (folder / "test/mouse").mkdir()


def break_empty_class(folder):
    for file in (folder / "train/cat").iterdir():
        file.unlink()


def break_no_test(folder):
    (folder / "test").rename(folder / "rest")


def break_empty(folder):
    for part in ("train", "test"):
        for child in (folder / part).iterdir():
            child.rename(folder / f"{part}-{child.name}")


@pytest.mark.parametrize("damage, message", [
    (break_image, "1.png cannot be read"), (break_sizes, "1.png is not 8x8"), (break_classes, "differ"),
    (break_empty_class, "no valid file for the classes cat"), (break_no_test, "No such file.*test"),
    (break_empty, "find any class folder"),
])
def test_damaged_folders_are_refused_by_name(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as error:
        data.load(str(folder))
    assert "\n" not in str(error.value)


def test_unknown_data_set():
    with pytest.raises(ValueError, match="unknown data set 'mnist'"):
        data.load("mnist")


def test_cifar_without_a_network_names_the_ways_on(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", refuse)
    with pytest.raises(ValueError, match="--dataset digits") as error:
        data.load("cifar10", tmp_path)
    assert "cifar-10-batches-py" in str(error.value) and "\n" not in str(error.value)


def test_truncated_cifar_is_refused_and_left_alone(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"cut")
    with pytest.raises(ValueError, match="incomplete or damaged"):
        data.load("cifar10", tmp_path)
    assert [f.name for f in tmp_path.rglob("*")] == ["cifar-10-batches-py", "data_batch_1"]


def test_of_two_processes_one_downloads(tmp_path, monkeypatch):
    """At once in an empty folder, as torchrun starts them: the second waits until the first one's files are whole."""
    downloads, folder = [], tmp_path / "new" / "cifar-10-batches-py"

    class Slow(torchvision.datasets.CIFAR10):
        def __init__(self, root, train, download):
            if download:
                downloads.append(1)
                folder.mkdir()  # from here on it looks as if it were there
                time.sleep(0.5)
                (folder / "whole").touch()
            elif not (folder / "whole").exists():
                raise RuntimeError("corrupted")
            self.data, self.targets, self.classes = np.zeros((2, 32, 32, 3), np.uint8), [0, 1], ["a", "b"]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Slow)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(data.load, "cifar10", tmp_path / "new")
        time.sleep(0.1)
        second = pool.submit(data.load, "cifar10", tmp_path / "new")
        assert first.result().labels.tolist() == second.result().labels.tolist() == [0, 1]
    assert len(downloads) == 1


def test_real_cifar10(cifar_dir):
    train, test = data.load("cifar10", cifar_dir), data.load("cifar10", cifar_dir, train=False)
    assert train.images.shape == (50000, 3, 32, 32) and test.images.shape == (10000, 3, 32, 32)
    assert train.labels.bincount().tolist() == [5000] * 10
    assert train.labels[:5].tolist() == [6, 9, 9, 4, 1]  # frog, truck, truck, deer, automobile
    assert test.labels[:5].tolist() == [3, 8, 8, 0, 6]  # cat, ship, ship, airplane, frog
    assert train.images[0, :, 0, 0].tolist() == [59, 62, 63]
    first = data.load("cifar10-first4", cifar_dir)
    assert first.classes == ["airplane", "automobile", "bird", "cat"] and first.labels.bincount().tolist() == [5000] * 4
    assert first.labels[:3].tolist() == [1, 1, 2] and torch.equal(first.images[0], train.images[4])


@pytest.mark.parametrize("name", ["cifar10-first1", "cifar10-first", "digits-first4", "cifar10-first4x"])
def test_no_such_first_classes(name):
    with pytest.raises(ValueError, match="unknown data set"):
        data.load(name)


def test_foolboxs_sample_images_are_the_first_test_images(cifar_dir):
    model = foolbox.PyTorchModel(torch.nn.Identity().eval(), bounds=(0, 1), device="cpu")
    x, y = foolbox.samples(model, dataset="cifar10", batchsize=20)
    test = data.load("cifar10", cifar_dir, train=False)
    assert y.tolist() == test.labels[:20].tolist()
    torch.testing.assert_close(x, test.images[:20] / 255, rtol=0, atol=1e-6)


# What would be a wrong number without a word ----------------------------------------------------------------------


NATURAL = ["--attacks", "natural", "--precision", "fp32", "--num-images", "60"]


def natural(model_path, dataset):
    argv = ["--model-path", str(model_path), "--dataset", str(dataset), *NATURAL]
    return eval_attacks.main(argv)["attacks"][0]["correct"]


def evaluation_fails(model_path, dataset, capsys):
    return fails_in_one_line(eval_attacks.main, ["--model-path", model_path, "--dataset", dataset, *NATURAL], capsys)


def test_a_folder_with_other_classes_is_refused(model_path, tmp_path, capsys):
    digits_folder(tmp_path, lambda label: "zero" if label == 0 else str(label))
    assert "zero and not 0" in evaluation_fails(model_path, tmp_path, capsys)


def test_classes_in_another_order_are_mapped_to_the_models(model_path, tmp_path):
    names = [f"class {9 - label}" for label in range(10)]
    checkpoint = checkpoints.load(model_path) | {"classes": names}
    checkpoints.save(checkpoint, tmp_path / "renamed.pt")
    folder = digits_folder(tmp_path / "folder", names.__getitem__)
    assert natural(tmp_path / "renamed.pt", folder) == natural(model_path, "digits")


def test_folders_named_by_numbers_are_in_numeric_order(tmp_path):
    for part in ("train", "test"):
        for label in range(12):
            (tmp_path / part / str(label)).mkdir(parents=True)
            Image.new("RGB", (4, 4), (label, 0, 0)).save(tmp_path / part / str(label) / "0.png")
    loaded = data.load(str(tmp_path))
    assert loaded.classes == [str(label) for label in range(12)]
    assert torch.equal(loaded.images[:, 0, 0, 0].long(), loaded.labels)


def test_images_of_another_size_are_refused(model_path, tmp_path, capsys):
    digits_folder(tmp_path / "64", change=lambda image: image.resize((64, 64)))
    assert "64x64" in evaluation_fails(model_path, tmp_path / "64", capsys)
    checkpoints.save(checkpoints.load(model_path) | {"image_size": [48, 64]}, tmp_path / "m.pt")
    assert "trained on 48x64" in evaluation_fails(tmp_path / "m.pt", "digits", capsys)


def test_a_folder_whose_train_and_test_differ_in_size_is_refused(tmp_path):
    digits_folder(tmp_path, parts=["train"])
    digits_folder(tmp_path, parts=["test"], change=lambda image: image.resize((64, 64)))
    with pytest.raises(ValueError, match="test/0/.*is not 32x32"):
        data.load(str(tmp_path))


def test_an_evaluation_needs_only_the_test_part(model_path, tmp_path):
    assert natural(model_path, digits_folder(tmp_path, parts=["test"])) == natural(model_path, "digits")
    with pytest.raises(ValueError, match="No such file.*train"):
        data.load(str(tmp_path))


def test_a_checkpoint_keeps_the_size_of_its_images_and_a_resumed_run_its_classes(tmp_path, capsys, tiny_net):
    folder, run = digits_folder(tmp_path / "folder"), tmp_path / "run"
    flags = ["--defense", "standard", "--epochs", "1", "--batch-size", "16", "--val-size", "4", "--precision", "fp32",
             "--compile", "off", "--dataset", str(folder), "--out-dir", str(run)]
    train_cifar.main(flags)
    assert checkpoints.load(run / "last.pt")["image_size"] == [32, 32]
    for part in ("train", "test"):
        (folder / part / "0").rename(folder / part / "zero")
    capsys.readouterr()
    assert "zero and not 0" in fails_in_one_line(train_cifar.main, ["--resume", "--out-dir", run], capsys)


def test_pixels_of_16_bits_are_refused_by_name(model_path, tmp_path, capsys):
    """Pillow clips them to 255: most of a picture is white."""
    def deep(image):
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)

    digits_folder(tmp_path, change=deep)
    assert "image (it has pixels of mode I;16: convert it" in evaluation_fails(model_path, tmp_path, capsys)


def test_an_image_is_turned_upright(tmp_path):
    pixels = np.zeros((8, 6, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # taken by a camera on its side: to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    read = data.read_image_files([tmp_path / "a.png"])
    assert read.shape == (1, 6, 8, 3) and np.array_equal(read[0], np.rot90(pixels, -1))


def test_transparent_pixels_are_told(tmp_path, capsys):
    pixels = np.full((8, 8, 4), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data.read_image_files([tmp_path / "a.png"])
    assert capsys.readouterr().err == ""
    pixels[0, 0] = 9, 8, 7, 0
    Image.fromarray(pixels).save(tmp_path / "b.png")
    assert data.read_image_files([tmp_path / "a.png", tmp_path / "b.png"])[1, 0, 0].tolist() == [9, 8, 7]
    error = capsys.readouterr().err
    assert "1 of 2 images have transparent pixels" in error and error.count("\n") == 1


@pytest.mark.parametrize("pixels", [2**30 * 8, 12_000 * 8_000], ids=["error", "warning"])
def test_a_decompression_bomb_is_refused_by_name(tmp_path, capsys, pixels):
    """Pillow warns from 89 million pixels on, and raises an error of its own kind from twice as many on."""
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.bmp")
    bomb = bytearray((tmp_path / "train/a/0.bmp").read_bytes())
    bomb[18:22] = (pixels // 8).to_bytes(4, "little")
    (tmp_path / "train/a/0.bmp").write_bytes(bytes(bomb))
    argv = ["--defense", "madry", "--dataset", tmp_path, "--val-size", "0", "--out-dir", tmp_path / "run"]
    assert "train/a/0.bmp cannot be read as an image" in fails_in_one_line(train_cifar.main, argv, capsys)


def test_what_is_not_read_is_told(folder, capsys):
    plain = data.load(str(folder))
    assert capsys.readouterr().err == ""
    for part in ("train", "test"):
        (folder / part / ".ipynb_checkpoints").mkdir()
    (folder / "train/cat/self").symlink_to(folder / "train/cat")
    (folder / "train/cat/up").symlink_to(folder / "train")
    (folder / "train/cat/.hidden").mkdir()
    shutil.copy(folder / "train/cat/0.png", folder / "train/cat/.hidden")
    (folder / "train/cat/a.tif").touch()
    (folder / "train/dog/._1.png").touch()
    loaded = data.load(str(folder))
    assert loaded.classes == ["cat", "dog"] and torch.equal(loaded.images, plain.images)
    assert torch.equal(loaded.labels, plain.labels)
    error = capsys.readouterr().err
    assert error.startswith("note: 2 files") and "cat/a.tif" in error and error.count("\n") == 1


def test_files_of_a_folder_are_in_the_order_that_torchvisions_were(folder):
    """So that the images that an older run held out are still the same."""
    for name in ("b", "a-b", "a"):
        (folder / "train/cat" / name).mkdir()
        Image.new("RGB", (8, 8), (len(name), 9, 9)).save(folder / "train/cat" / name / "x.png")
    theirs = torchvision.datasets.ImageFolder(folder / "train").imgs
    pixels = np.stack([np.asarray(Image.open(file)) for file, _ in theirs])
    order = data.permutation(len(theirs), 1)
    loaded = data.load(str(folder))
    assert torch.equal(loaded.images.permute(0, 2, 3, 1), torch.from_numpy(pixels)[order])
    assert loaded.labels.tolist() == [theirs[i][1] for i in order.tolist()]
