"""Training with pseudo-labelled images: the sampler, the files and their faults, the recipe, and pseudo_label.py."""

import collections
import io
import pathlib
import pickle
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import digits_folder, fails_in_one_line
from PIL import Image
from test_eval import normalised_outside
from test_train import TINY, arguments, run_until, without_times

import checkpoints
import data
import models
import pseudo_label
import train_cifar

BUILD = models.build_model


def made(n=30, seed=0, num_classes=10):
    g = np.random.default_rng(seed)
    return {"data": g.integers(256, size=(n, 32, 32, 3), dtype=np.uint8),
            "extrapolated_targets": g.integers(num_classes, size=n)}


@pytest.fixture
def aux_file(tmp_path):
    np.savez(tmp_path / "aux.npz", **made())
    return tmp_path / "aux.npz"


def numbered(n, first, label):
    """n images, each of one value that says which it is."""
    values = torch.arange(first, first + n, dtype=torch.uint8)
    return data.Dataset(values[:, None, None, None].expand(n, 3, 4, 4), torch.full((n,), label), list("ab"))


@pytest.mark.parametrize(("n", "batch_size", "fraction"), [(50_000, 256, 0.5), (1000, 128, 0.25), (10, 4, 0.5)])
def test_an_epoch_is_as_long_as_without(n, batch_size, fraction):
    aux = round(fraction * batch_size)
    order = data.batches(n, batch_size, 1, 3, aux)
    assert order.shape == (-(-n // batch_size), batch_size - aux)  # RST: 196 batches of 256, half labelled
    assert len(order.unique()) == min(n, order.numel())  # no labelled image twice while there are others
    assert not torch.equal(order, data.batches(n, batch_size, 1, 4, aux))
    assert torch.equal(data.batches(n, batch_size, 1, 3, 0), data.batches(n, batch_size, 1, 3))


def test_a_batch_is_mixed_shuffled_and_repeatable():
    mixed = numbered(50, 0, 0)._replace(aux=numbered(100, 100, 1))
    places, drawn = torch.zeros(16), collections.Counter()
    for step in range(400):
        indices = data.batches(50, 16, 0, step, 8)[0]
        images, labels = data.mixed(mixed, indices, 8, data.step_generator("cpu", 0, step))
        values = images[:, 0, 0, 0].long()
        assert labels.sum() == 8 and torch.equal(labels == 1, values >= 100)  # each image keeps its label
        assert torch.equal(values[labels == 0].sort().values, indices.sort().values)
        again, _ = data.mixed(mixed, indices, 8, data.step_generator("cpu", 0, step))
        assert torch.equal(images, again)
        places += labels
        drawn.update(values[labels == 1].tolist())
    assert places.min() > 150 and places.max() < 250  # about half of 400, at every place of the batch
    assert len(drawn) == 100 and max(drawn.values()) < 80  # 32 on average


def test_no_aux_draws_nothing():
    """So that runs without it keep their bits."""
    g = data.step_generator("cpu", 0, 0)
    before = g.get_state()
    images, labels = data.mixed(numbered(5, 0, 0), torch.tensor([3, 1]), 0, g)
    assert torch.equal(g.get_state(), before) and images[:, 0, 0, 0].tolist() == [3, 1]


def test_the_forms_of_the_file(tmp_path):
    """RST's pickle in every protocol and memory order, with an array or a list of labels, and .npz: all the same."""
    arrays, like = made(), data.load("digits")
    pixels, labels = arrays["data"], arrays["extrapolated_targets"]
    nchw, turned = pixels.transpose(0, 3, 1, 2), pixels.transpose(0, 2, 1, 3).copy()
    changes = {"c": {}, "fortran": {"data": np.asfortranarray(pixels)}, "view": {"data": turned.transpose(0, 2, 1, 3)},
               "copy": {"data": nchw.copy()}, "list": {"extrapolated_targets": labels.tolist()},
               "scalars": {"extrapolated_targets": list(labels)},
               "big endian": {"extrapolated_targets": labels.astype(">i4")}, "more": {"source": np.arange(3), 5: None}}
    forms = {}
    for name, change in changes.items():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            form = forms[f"{name}, protocol {protocol}"] = pickle.dumps(arrays | change, protocol=protocol)
            if protocol < 4:  # in which names are lines of text
                forms[f"{name}, protocol {protocol}, numpy 1"] = form.replace(b"numpy._core", b"numpy.core")
        np.savez(buffer := io.BytesIO(), **{str(key): value for key, value in (arrays | change).items()})
        forms[f"{name}.npz"] = buffer.getvalue()
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        held = checkpoints.load_arrays(tmp_path / name, optional=["source"])  # of a pickle, whose it may be, not read
        assert ("source" in held) == name.startswith("more.npz"), name
        aux = data.pseudo_labelled(name, held, like).aux
        assert torch.equal(aux.images.permute(0, 2, 3, 1), torch.from_numpy(pixels)), name
        assert aux.labels.tolist() == labels.tolist() and aux.labels.dtype == torch.int64, name
    assert len(forms) == 8 * 11 - 8 + 8


@pytest.mark.parametrize("form", ["npz", 3, 4, 5])
def test_images_are_in_memory_once(form, tmp_path):
    """There are 1.5 GB of them."""
    arrays = made(2000)
    if form == "npz":
        np.savez(tmp_path / "aux", **arrays)
    else:
        (tmp_path / "aux.npz").write_bytes(pickle.dumps(arrays, protocol=form))
    tracemalloc.start()
    read = checkpoints.load_arrays(tmp_path / "aux.npz")
    aux = data.pseudo_labelled("", read, data.Dataset(torch.zeros(1, 3, 32, 32), None, range(10))).aux
    assert tracemalloc.get_traced_memory()[1] < 1.1 * arrays["data"].nbytes
    tracemalloc.stop()
    assert aux.images.data_ptr() == read["data"].ctypes.data
    assert aux.images.is_contiguous(memory_format=torch.channels_last)


def bad(**change):
    return pickle.dumps({k: v for k, v in (made() | change).items() if v is not None})


BAD = {
    "no data": (bad(data=None), "no `data`"),
    "no labels": (bad(extrapolated_targets=None), "no `extrapolated_targets`"),
    "floats": (bad(data=np.zeros((30, 32, 32, 3))), "float64"),
    "flat": (bad(data=np.zeros((30, 3072), np.uint8)), "(30, 3072)"),
    "another size": (bad(data=np.zeros((30, 16, 16, 3), np.uint8)), "(3, 16, 16)"),
    "labels as floats": (bad(extrapolated_targets=np.zeros(30)), "30 integers"),
    "label too high": (bad(extrapolated_targets=np.full(30, 10)), "labels from 10 to 10"),
    "label below 0": (bad(extrapolated_targets=np.full(30, -1)), "labels from -1"),
    "unequal lengths": (bad(extrapolated_targets=np.zeros(29, int)), "(29,)"),
    "no images": (bad(data=np.zeros((0, 32, 32, 3), np.uint8), extrapolated_targets=np.zeros(0, int)), "no images"),
    "a list": (pickle.dumps([1, 2]), "neither an .npz nor a pickle of arrays (\"'list' object"),
    "empty": (b"", "EOFError"),
    "cut": (bad()[:5000], "neither"),
    "html": (b"<html></html>", "neither"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_end_in_one_line(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = BAD[name]
    (tmp_path / "aux").write_bytes(content)
    argv = ["--defense", "trades", "--dataset", "digits", "--aux-data", "aux"]
    error = fails_in_one_line(train_cifar.main, argv, capsys)
    assert message in error or message == "EOFError" and "neither" in error
    assert [f.name for f in tmp_path.iterdir()] == ["aux"]


@pytest.mark.parametrize("argv", [
    ["--aux-fraction", "0.5"], ["--aux-data", "nowhere"], ["--aux-data", "aux.npz", "--aux-fraction", "1"],
    ["--aux-data", "aux.npz", "--aux-fraction=-0.1"], ["--aux-data", "aux.npz", "--aux-fraction", "0.997"],
    ["--aux-data", "aux.npz", "--aux-fraction", "0.001"], ["--recipe", "fat"],
])
def test_bad_flags(argv, tmp_path, capsys, monkeypatch, aux_file):
    monkeypatch.chdir(tmp_path)
    fails_in_one_line(train_cifar.main, ["--defense", "mart", "--dataset", "digits", *argv], capsys)
    assert [f.name for f in tmp_path.iterdir()] == ["aux.npz"]


@pytest.mark.parametrize(("argv", "expected"), [
    (["--defense", "trades", "--aux-data", "f"], dict(beta=6.0, out_dir="runs/cifar10-wrn-28-10-trades-aux-s1")),
    (["--defense", "trades", "--spat-alpha", "0.1"], dict(beta=6.0, spat_alpha=0.1)),
    (["--defense", "mart"], dict(beta=5.0)), (["--defense", "mart", "--no-nesterov"], dict(nesterov=False)),
    (["--defense", "madry", "--dataset", "cifar100"], dict(weight_decay=5e-4, dataset="cifar100")),
])
def test_the_recipe_is_rsts(argv, expected):
    args = arguments("--recipe", "rst", *argv)
    rst = dict(arch="wrn-28-10", epochs=200, batch_size=256, lr=0.1, lr_schedule="cosine", momentum=0.9, nesterov=True,
               weight_decay=5e-4, epsilon="0.031", step_size="0.007", num_steps=10, val_size=0, aux_fraction=0.5)
    assert {key: getattr(args, key) for key in rst | expected} == rst | expected


@pytest.mark.usefixtures("tiny_net")
def test_the_loss_sees_the_pseudo_labels(tmp_path, monkeypatch):
    """Half of what the training step is given are the file's images (crops of them) with the file's labels."""
    arrays = made() | {"data": np.full((30, 32, 32, 3), 255, np.uint8), "extrapolated_targets": np.full(30, 7)}
    np.savez(tmp_path / "aux.npz", **arrays)
    seen, real = [], train_cifar.forward_backward

    def spy(model, forward, x, x_adv, y, args):
        seen.append((x[:, :, 12:20, 12:20].mean((1, 2, 3)) == 1, y))
        return real(model, forward, x, x_adv, y, args)

    monkeypatch.setattr(train_cifar, "forward_backward", spy)
    train_cifar.main(["--defense", "trades", *TINY, "--aux-data", str(tmp_path / "aux.npz"), "--aux-fraction", "0.25",
                      "--out-dir", str(tmp_path / "run")])
    for white, y in seen:
        assert white.sum() == len(y) // 4 and (y[white] == 7).all()


@pytest.mark.usefixtures("tiny_net")
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, monkeypatch, aux_file, capsys):
    argv = ["--defense", "mart", "--spat-alpha", "0.1", *TINY, "--save-minutes", "0", "--aux-data", str(aux_file)]
    train_cifar.main([*argv, "--out-dir", str(tmp_path / "whole")])
    run_until(2, [*argv, "--out-dir", str(tmp_path / "cut")], monkeypatch)
    resume = ["--resume", "--out-dir", str(tmp_path / "cut")]
    capsys.readouterr()
    assert "--aux-fraction 0.25" in fails_in_one_line(train_cifar.main, [*resume, "--aux-fraction", "0.25"], capsys)
    train_cifar.main(resume)
    assert without_times(tmp_path / "cut/log.csv") == without_times(tmp_path / "whole/log.csv")
    whole, cut = (checkpoints.load(tmp_path / run / "last.pt")["state_dict"] for run in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_pseudo_labels_are_the_models(model_path, tmp_path, capsys):
    test = data.load("digits", train=False)
    images = test.images.permute(0, 2, 3, 1).numpy()[:100]
    np.savez(tmp_path / "in.npz", data=images)
    (tmp_path / "in.pickle").write_bytes(pickle.dumps({"data": images}))
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03}.png")
    model, _ = checkpoints.load_model(model_path)
    with torch.no_grad():
        expected = model(test.images[:100] / 255).argmax(1)
    for source in ("in.npz", "in.pickle", "folder"):
        out = tmp_path / f"{source}.out.npz"
        pseudo_label.main(["--model-path", str(model_path), "--images", str(tmp_path / source), "--output", str(out),
                           "--batch-size", "2"])
        arrays = checkpoints.load_arrays(out)
        assert np.array_equal(arrays["data"], images)
        assert arrays["extrapolated_targets"].tolist() == expected.tolist()
        data.pseudo_labelled(out, arrays, test)  # train_cifar.py takes it
    assert "100 images" in capsys.readouterr().out


def test_a_gpu_out_of_memory_while_labelling_ends_in_one_line(model_path, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    np.savez(tmp_path / "x.npz", data=np.zeros((3, 32, 32, 3), np.uint8))
    monkeypatch.setattr(pseudo_label.eval_attacks, "attacked_logits", full)
    with pytest.raises(SystemExit, match="^pseudo_label.py: CUDA out of memory$"):
        pseudo_label.main(["--model-path", str(model_path), "--images", str(tmp_path / "x.npz"),
                           "--output", str(tmp_path / "o.npz")])
    assert not (tmp_path / "o.npz").exists()


def test_the_rest_of_a_data_set_is_labelled(model_path, tmp_path, capsys):
    flags = ["--model-path", str(model_path), "--dataset", "digits"]
    pseudo_label.main([*flags, "--skip", "1300", "--output", str(tmp_path / "out.npz")])
    train, arrays = data.load("digits"), checkpoints.load_arrays(tmp_path / "out.npz")
    assert torch.equal(data.as_images("", arrays), train.images[1300:])
    right = (torch.from_numpy(arrays["extrapolated_targets"]) == train.labels[1300:]).float().mean().item()
    assert 0.2 < right and f"; {right:.2%} of the labels are right" in capsys.readouterr().out
    error = fails_in_one_line(pseudo_label.main, [*flags, "--skip", 1397, "--output", tmp_path / "o.npz"], capsys)
    assert "--skip 1397 leaves none of the 1397 images of digits" in error


@pytest.mark.usefixtures("tiny_net")
def test_held_out_images_are_not_trained_on(tmp_path, capsys, monkeypatch):
    """At CIFAR's defaults 800 of the 1,000 images that choose best.pt had been among the pseudo-labelled ones."""
    label = ["--model-path", str(pathlib.Path(__file__).parent / "digits-wrn-10-1-madry.pt"), "--dataset", "digits"]
    with monkeypatch.context() as patch:
        patch.setattr(models, "build_model", BUILD)
        pseudo_label.main([*label, "--skip", "300", "--output", str(tmp_path / "rest.npz")])
    held_out = data.permutation(1397, 1)[:100]
    arrays, places = checkpoints.load_arrays(tmp_path / "rest.npz"), np.arange(300, 1397)
    flags = ["--defense", "trades", "--dataset", "digits", "--limit-train", "48", "--epochs", "1", "--num-steps", "1",
             "--precision", "fp32", "--compile", "off", "--aux-data"]
    capsys.readouterr()
    error = fails_in_one_line(train_cifar.main, [*flags, tmp_path / "rest.npz"], capsys)
    assert f"{(held_out >= 300).sum()} of the 100 held-out images" in error and "--val-size 0" in error
    train_cifar.main([*flags, str(tmp_path / "rest.npz"), "--val-size", "0", "--out-dir", str(tmp_path / "all")])
    kept = ~np.isin(places, held_out)
    np.savez(tmp_path / "kept.npz", **{name: values[kept] for name, values in arrays.items()})
    train_cifar.main([*flags, str(tmp_path / "kept.npz"), "--out-dir", str(tmp_path / "kept")])
    channels_first = {name: values[::-1] for name, values in arrays.items()}  # wherever they lie, and however
    channels_first["data"] = channels_first["data"].transpose(0, 3, 1, 2)
    np.savez(tmp_path / "turned.npz", **channels_first)
    capsys.readouterr()
    again = fails_in_one_line(train_cifar.main, [*flags, tmp_path / "turned.npz"], capsys)
    assert again == error.replace("rest", "turned")
    with monkeypatch.context() as patch:  # begun before there was this check, a run goes on
        patch.setattr(data, "check_leak", lambda *_: None)
        train_cifar.main([*flags, str(tmp_path / "rest.npz"), "--out-dir", str(tmp_path / "older")])
    train_cifar.main(["--resume", "--out-dir", str(tmp_path / "older")])
    (tmp_path / "rest.npz").rename(tmp_path / "moved.npz")
    resume = ["--resume", "--out-dir", str(tmp_path / "older"), "--aux-data"]
    train_cifar.main([*resume, str(tmp_path / "moved.npz")])
    capsys.readouterr()
    error = fails_in_one_line(train_cifar.main, [*resume, tmp_path / "kept.npz"], capsys)
    assert "--aux-data are no longer those" in error
    on = [checkpoints.load(tmp_path / run / "last.pt")["images"]["--aux-data"] for run in ("all", "kept", "older")]
    assert on[0] == on[2] != on[1]


@pytest.mark.usefixtures("tiny_net")
def test_labels_of_other_classes_are_refused(model_path, tmp_path, capsys, monkeypatch):
    """Of a data set that the labelling model does not know, and of a file whose classes are not the run's."""
    monkeypatch.setattr(models, "build_model", BUILD)
    letters = digits_folder(tmp_path / "letters", rename="letter {}".format, n=200)
    label = ["--model-path", model_path, "--dataset", letters, "--output", tmp_path / "o.npz"]
    assert "has other classes than the model" in fails_in_one_line(pseudo_label.main, label, capsys)
    np.savez(tmp_path / "in.npz", data=made()["data"])
    label = ["--model-path", model_path, "--images", tmp_path / "in.npz", "--output", tmp_path / "o.npz"]
    assert "--skip goes with --dataset" in fails_in_one_line(pseudo_label.main, [*label, "--skip", 3], capsys)
    pseudo_label.main(list(map(str, label)))
    assert checkpoints.load_arrays(tmp_path / "o.npz", ["classes"])["classes"].tolist() == list("0123456789")
    capsys.readouterr()
    argv = ["--defense", "madry", "--dataset", letters, "--arch", "wrn-10-1", "--epochs", "1", "--limit-train", "8",
            "--num-steps", "1", "--val-size", "0", "--aux-data", tmp_path / "o.npz", "--out-dir", tmp_path / "run"]
    assert "its labels are of other classes" in fails_in_one_line(train_cifar.main, argv, capsys)


@pytest.mark.usefixtures("tiny_net")
def test_a_resumed_run_needs_the_images_it_began_with(tmp_path, capsys):
    """Of a folder with another image, and of --aux-data with another label."""
    folder = digits_folder(tmp_path / "digits of mine")
    np.savez(tmp_path / "aux.npz", **made())
    argv = ["--defense", "madry", "--dataset", folder, "--arch", "wrn-10-1", "--val-size", "10", "--epochs", "1",
            "--num-steps", "1", "--precision", "fp32", "--compile", "off", "--aux-data", tmp_path / "aux.npz",
            "--out-dir", tmp_path / "run"]
    train_cifar.main(list(map(str, argv)))
    resume = ["--resume", "--out-dir", tmp_path / "run"]
    train_cifar.main(list(map(str, resume)))
    shutil.copy(next((folder / "train/3").iterdir()), folder / "train/3/new.png")
    capsys.readouterr()
    assert "the images to train on are no longer" in fails_in_one_line(train_cifar.main, resume, capsys)
    (folder / "train/3/new.png").unlink()
    arrays = made()
    arrays["extrapolated_targets"][0] += 1
    np.savez(tmp_path / "aux.npz", **arrays)
    assert "--aux-data are no longer" in fails_in_one_line(train_cifar.main, resume, capsys)


def test_what_pseudo_label_refuses(model_path, tmp_path, capsys):
    np.savez(tmp_path / "in.npz", data=made()["data"])
    np.savez(tmp_path / "no pixels.npz", data=np.zeros((2**40, 0, 3, 32), np.uint8))
    (tmp_path / "there.npz").write_bytes(b"precious")
    (tmp_path / "empty").mkdir()
    for images, output in (("in.npz", "there.npz"), ("none.npz", "o.npz"), ("in.npz", "no/o.npz"), ("in.npz", "o.pt"),
                           ("empty", "o.npz"), ("there.npz", "o.npz"), ("no pixels.npz", "o.npz")):
        fails_in_one_line(pseudo_label.main, ["--model-path", model_path, "--images", tmp_path / images,
                                              "--output", tmp_path / output], capsys)
    assert (tmp_path / "there.npz").read_bytes() == b"precious" and not (tmp_path / "o.npz").exists()


def test_pseudo_labels_of_a_model_whose_file_is_not_enough(model_path, tmp_path, capsys):
    """The labels that a data set has tell of a normalisation; of images without labels nothing can."""
    normalised_outside(model_path, tmp_path / "m.pt")
    np.savez(tmp_path / "in.npz", data=made()["data"])
    for source, hinted in ((["--images", tmp_path / "in.npz"], False), (["--dataset", "digits", "--skip", 1197], True)):
        argv = ["--model-path", tmp_path / "m.pt", *source, "--output", tmp_path / f"{hinted}.npz"]
        pseudo_label.main(list(map(str, argv)))
        error = capsys.readouterr().err
        assert checkpoints.ASSUMED in error and ("did you mean --normalize 0.4914" in error) == hinted
    content = checkpoints.load(model_path)
    argv = ["--model-path", tmp_path / "m.pt", "--dataset", "digits", "--skip", 1197, "--output", tmp_path / "o.npz"]
    torch.save({"model": content["state_dict"], "ema": content["state_dict"] | {"fc.bias": torch.ones(10)}},
               tmp_path / "m.pt")
    assert "pick one by --weights" in fails_in_one_line(pseudo_label.main, argv, capsys)
    pseudo_label.main([*map(str, argv), "--weights", "ema"])
    for value, status in ((float("nan"), 2), (1e38, "pseudo_label.py: the logits")):
        content["state_dict"]["fc.weight"][:] = value  # all images would get one label
        checkpoints.save(content, tmp_path / "m.pt")
        (tmp_path / "o.npz").unlink(missing_ok=True)
        with pytest.raises(SystemExit, match=f"^{status}"):
            pseudo_label.main(list(map(str, argv)))
        assert not (tmp_path / "o.npz").exists()


def test_images_of_another_size_than_the_models_are_not_labelled(model_path, tmp_path, capsys):
    np.savez(tmp_path / "in.npz", data=np.zeros((2, 64, 64, 3), np.uint8))
    argv = ["--model-path", model_path, "--images", tmp_path / "in.npz", "--output", tmp_path / "o.npz"]
    assert "64x64" in fails_in_one_line(pseudo_label.main, argv, capsys)
