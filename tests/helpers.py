"""What several test files call."""

import pytest
import torch
import torch.nn as nn
from PIL import Image

import data


class SmallNet(nn.Module):
    """Non-linear, with batch norm and a sub-module in another mode than its parent's."""

    def __init__(self, num_classes=5, size=8):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * size * size, 16), nn.Tanh(), nn.Linear(16, num_classes))

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))))


def tiny_model(name, num_classes=10):
    """In the place of models.build_model, where the kind of net does not matter: quick even where bf16 is emulated."""
    layers = nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, num_classes)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def fails_in_one_line(main, argv, capsys):
    """main(argv) must exit with status 2 after one line on stderr; returns the line."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(arg) for arg in argv])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.count("\n") == 1 and "error: " in error, error
    assert "Traceback" not in error
    return error


def digits_folder(path, rename=str, parts=("train", "test"), change=lambda image: image, n=60):
    """The first digits of the test part as a folder of PNGs; rename: of a class, change: of a picture."""
    digits = data.load("digits", train=False)
    for part in parts:
        for i, (image, label) in enumerate(zip(digits.images[:n], digits.labels[:n].tolist(), strict=True)):
            file = path / part / rename(label) / f"{i:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            change(Image.fromarray(image.permute(1, 2, 0).numpy())).save(file)
    return path


def like_cuda_graphs(function, **settings):
    """In the place of torch.compile: CUDA graphs write into the same memory at every call, so here the logits and input
    gradients of earlier calls turn into NaN at the next one, but for logits whose backward pass is still to come."""
    handed_out = []  # [tensor, whether its backward pass is to come]

    def call(x):
        for tensor, pending in handed_out:
            if not pending:
                tensor.data.fill_(float("nan"))
        handed_out[:] = [entry for entry in handed_out if entry[1]]
        logits = function(x)
        handed_out.append(entry := [logits, logits.requires_grad])
        if logits.requires_grad:
            logits.register_hook(lambda _: entry.__setitem__(1, False))
        if x.requires_grad:
            x.register_hook(lambda gradient: handed_out.append([gradient, False]))
        return logits

    return call
