import os
import pathlib

import pytest
import torch
import torch.nn as nn
from helpers import SmallNet, tiny_model

import models

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox imports GitPython, which wants the git binary


def pytest_configure(config):
    """One thread, but for the slow tests: nets so small gain little from a second one, which waits actively. Beside
    other programs two threads took many times the CPU time of one."""
    if config.option.markexpr == "not slow":
        torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    if "fuzz_cases" in metafunc.fixturenames:
        metafunc.parametrize("fuzz_cases", [int(os.environ.get("FUZZ_CASES", "500"))])


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
def no_curves(monkeypatch):
    """A run's curves.png stays empty: drawing takes longer than a test's training."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)


@pytest.fixture
def tiny_net(no_curves, monkeypatch):
    """For tests of what happens around the net, whatever its kind: its training takes no time."""
    monkeypatch.setattr(models, "build_model", tiny_model)


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
def model_path():
    """A checkpoint of train_cifar.py: 74 % natural accuracy on digits, little robustness, so that attacks differ.
    It was trained once (--defense madry --dataset digits --epochs 4 --num-steps 1 --epsilon 0.01 --precision fp32
    --compile off): trained anew, it would end a little differently on every kind of CPU, and so would the tests."""
    return pathlib.Path(__file__).parent / "digits-wrn-10-1-madry.pt"


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
