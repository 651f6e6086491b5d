"""What several test files call."""

import types

import pytest
import torch
import torch.nn as nn
from PIL import Image

import data
import runtime


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


def record_on_a_cpu(monkeypatch):
    """Let --compile graphs be taken on a CPU, with a stand-in for the graph: at every replay it reads its own copies of
    the inputs, and overwrites the outputs and the gradients that it handed out before. Nothing is compiled. Returns a
    list that receives the recorded functions."""
    recorded = []

    def init(self, function, inputs, pool, parameters):
        self.inputs, before = [given.detach().clone() for given in inputs], [p.grad for p in parameters]
        self.outputs = function(*self.inputs)
        self.gradients = [(p, p.grad) for p, old in zip(parameters, before, strict=True) if p.grad is not old]

        def replay():
            before = [p.grad for p in parameters]  # which a graph does not touch
            outputs, kept = function(*self.inputs), self.outputs
            if not isinstance(kept, tuple):
                outputs, kept = (outputs,), (kept,)
            for old, new in zip(kept, outputs, strict=True):
                if old is not None:
                    old.copy_(new)
            for parameter, gradient in self.gradients:
                gradient.copy_(parameter.grad)
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

        self.graph = types.SimpleNamespace(replay=replay)
        recorded.append(function)

    monkeypatch.setattr(runtime.Recording, "__init__", init)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(runtime, "pick_compile", lambda name, *_: (name, "as asked"))
    return recorded
