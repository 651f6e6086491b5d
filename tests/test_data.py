"""Augmentation against torchvision's transforms; what a data folder must be; the real CIFAR-10 where it is at hand."""

import concurrent.futures
import time

import foolbox
import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image

import data


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
