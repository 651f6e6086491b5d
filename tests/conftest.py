import os
import pathlib

import pytest
import torch
import torch.nn as nn

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox imports GitPython, which wants the git binary


class SmallNet(nn.Module):
    """Non-linear, with batch norm and a sub-module in another mode than its parent's."""

    def __init__(self, num_classes=5, size=8):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * size * size, 16), nn.Tanh(), nn.Linear(16, num_classes))

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))))


@pytest.fixture
def small_net():
    torch.manual_seed(0)
    net = SmallNet()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


@pytest.fixture
def images():
    """A batch with pixels at 0 and at 1, and labels."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand(6, 3, 8, 8, generator=g)
    x[x < 0.2], x[x > 0.8] = 0.0, 1.0
    return x, torch.randint(5, (6,), generator=g)


@pytest.fixture(scope="session")
def cifar_dir():
    folder = pathlib.Path(os.environ.get("DATA_DIR", pathlib.Path(__file__).parent.parent / "data"))
    if not (folder / "cifar-10-batches-py").is_dir():
        pytest.skip("the real CIFAR-10 is not here: set DATA_DIR to the folder that holds cifar-10-batches-py")
    return folder


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A model that was trained on digits for some seconds, as train_cifar.py leaves it."""
    import train_cifar

    folder = tmp_path_factory.mktemp("run")
    train_cifar.main(["--defense", "madry", "--dataset", "digits", "--epochs", "4", "--num-steps", "1",
                      "--epsilon", "0.01", "--precision", "fp32", "--out-dir", str(folder)])
    return folder / "best.pt"


@pytest.fixture
def cut_budget(monkeypatch):
    """A tenth of AutoAttack's steps, for the adapter and the direct call alike."""
    import pyautoattack

    set_version = pyautoattack.AutoAttack._set_version

    def cut(self, version="standard"):
        set_version(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
        self.square.n_queries = 100

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", cut)


def fails_in_one_line(main, argv, capsys):
    """main(argv) must exit with status 2 after one line on stderr; returns the line."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(arg) for arg in argv])
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.count("\n") == 1 and "error: " in error, error
    assert "Traceback" not in error
    return error
