"""Architectures: sizes, the names and shapes of TRADES' and MART's parameters, and a forward pass written out."""

import pytest
import torch
import torch.nn.functional as F

import models


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name, millions", [("wrn-34-10", 46.16), ("wrn-28-10", 36.48), ("resnet-18", 11.17),
                                            ("resnet-50", 23.52), ("preact-resnet-18", 11.17)])
def test_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = models.build_model(name)
    assert round(parameters(model) / 1e6, 2) == millions


def test_wrn_names_and_shapes_are_those_of_trades():
    state = {k: tuple(v.shape) for k, v in models.build_model("wrn-16-2", 7).state_dict().items()}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (7, 128), "fc.bias": (7,)}
    expected |= {f"bn1.{k}": (128,) for k in norm}
    for stage, (before, planes) in enumerate([(16, 32), (32, 64), (64, 128)], start=1):
        for i in range(2):
            prefix = f"block{stage}.layer.{i}"
            into = before if i == 0 else planes
            expected |= {f"{prefix}.bn1.{k}": (into,) for k in norm} | {f"{prefix}.bn2.{k}": (planes,) for k in norm}
            expected[f"{prefix}.conv1.weight"] = (planes, into, 3, 3)
            expected[f"{prefix}.conv2.weight"] = (planes, planes, 3, 3)
        expected[f"block{stage}.layer.0.convShortcut.weight"] = (planes, before, 1, 1)
    expected |= {k: () for k in expected if k.endswith("num_batches_tracked")}
    assert state == expected


def conv(x, weight, stride):
    return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)


def norm(x, s, prefix):
    return F.batch_norm(x, *(s[f"{prefix}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))


def wrn_by_hand(s, x, blocks):
    x = conv(x, s["conv1.weight"], 1)
    for stage in (1, 2, 3):
        for i in range(blocks):
            p, stride = f"block{stage}.layer.{i}", 2 if stage > 1 and i == 0 else 1
            a = F.relu(norm(x, s, f"{p}.bn1"))
            short = conv(a, s[f"{p}.convShortcut.weight"], stride) if f"{p}.convShortcut.weight" in s else x
            b = F.relu(norm(conv(a, s[f"{p}.conv1.weight"], stride), s, f"{p}.bn2"))
            x = short + conv(b, s[f"{p}.conv2.weight"], 1)
    x = F.avg_pool2d(F.relu(norm(x, s, "bn1")), 8).flatten(1)
    return F.linear(x, s["fc.weight"], s["fc.bias"])


def resnet_by_hand(s, x, blocks, convs, preact):
    x = conv(x, s["conv1.weight"], 1)
    x = x if preact else F.relu(norm(x, s, "bn1"))
    for stage, count in enumerate(blocks, start=1):
        for i in range(count):
            p, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            strides = {1: 1, 2: 1, 3: 1} | {1 if convs == 2 else 2: stride}
            inner = F.relu(norm(x, s, f"{p}.bn1")) if preact else x
            short = x
            if f"{p}.shortcut.0.weight" in s:
                short = conv(inner if preact else x, s[f"{p}.shortcut.0.weight"], stride)
                short = short if preact else norm(short, s, f"{p}.shortcut.1")
            for k in range(1, convs + 1):
                if preact:
                    inner = inner if k == 1 else F.relu(norm(inner, s, f"{p}.bn{k}"))
                    inner = conv(inner, s[f"{p}.conv{k}.weight"], strides[k])
                else:
                    inner = norm(conv(inner, s[f"{p}.conv{k}.weight"], strides[k]), s, f"{p}.bn{k}")
                    inner = F.relu(inner) if k < convs else inner
            x = short + inner if preact else F.relu(short + inner)
    x = F.relu(norm(x, s, "bn")) if preact else x
    return F.linear(F.avg_pool2d(x, 4).flatten(1), s["linear.weight"], s["linear.bias"])


@pytest.mark.parametrize("name, by_hand", [
    ("wrn-16-2", lambda s, x: wrn_by_hand(s, x, 2)),
    ("wrn-10-1", lambda s, x: wrn_by_hand(s, x, 1)),
    ("resnet-18", lambda s, x: resnet_by_hand(s, x, (2, 2, 2, 2), 2, preact=False)),
    ("resnet-50", lambda s, x: resnet_by_hand(s, x, (3, 4, 6, 3), 3, preact=False)),
    ("preact-resnet-18", lambda s, x: resnet_by_hand(s, x, (2, 2, 2, 2), 2, preact=True)),
])
def test_forward_pass_written_out_from_the_papers(name, by_hand):
    torch.manual_seed(0)
    model = models.build_model(name, 6).double().eval()
    for key, value in model.state_dict().items():
        if "running" in key or key.endswith(("bn1.weight", "bn2.weight")):
            value.uniform_(0.5, 1.5)
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), by_hand(model.state_dict(), x))


@pytest.mark.parametrize("name", ["wrn-33-10", "wrn-4-10", "wrn-16-0", "wrn-16", "resnet-19", "", "WRN-16-2", "vgg"])
def test_unknown_architectures_are_refused(name):
    with pytest.raises(ValueError, match="unknown architecture"):
        models.build_model(name)
