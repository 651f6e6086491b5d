"""WideResNet, ResNet and PreActResNet for 32x32 images in [0, 1].

Parameter names and shapes are those of the TRADES and MART repositories, so that weights released in that line of
work fit. No normalisation inside: images go in as they are, as in TRADES and MART.
"""

import contextlib
import difflib
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

ARCHS = ("wrn-D-W with D = 6n + 4 (wrn-34-10, wrn-28-10, wrn-16-2, ...), resnet-18, resnet-50, preact-resnet-18, "
         "preact-resnet-18-x")


def conv(in_planes, planes, size, stride=1):
    return nn.Conv2d(in_planes, planes, size, stride=stride, padding=size // 2, bias=False)


class WideBlock(nn.Module):
    """The pre-activation block of a WideResNet (Zagoruyko and Komodakis 2016)."""

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv(in_planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.convShortcut = conv(in_planes, planes, 1, stride) if in_planes != planes else None

    def forward(self, x):
        out = F.relu(self.bn1(x))
        if self.convShortcut is not None:
            x = self.convShortcut(out)
        return x + self.conv2(F.relu(self.bn2(self.conv1(out))))


class WideStage(nn.Module):
    def __init__(self, num_blocks, in_planes, planes, stride):
        super().__init__()
        blocks = [WideBlock(in_planes, planes, stride)]
        blocks += [WideBlock(planes, planes, 1) for _ in range(num_blocks - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of (depth - 4) / 6 blocks, with 16, 32 and 64 times `width` planes."""

    def __init__(self, depth, width, num_classes=10):
        super().__init__()
        num_blocks = (depth - 4) // 6
        self.conv1 = conv(3, 16, 3)
        self.block1 = WideStage(num_blocks, 16, 16 * width, 1)
        self.block2 = WideStage(num_blocks, 16 * width, 32 * width, 2)
        self.block3 = WideStage(num_blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(out)).mean((2, 3)))


def _shortcut(in_planes, planes, stride):
    if stride == 1 and in_planes == planes:
        return nn.Sequential()
    return nn.Sequential(conv(in_planes, planes, 1, stride), nn.BatchNorm2d(planes))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1 = conv(in_planes, planes, 3, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = _shortcut(in_planes, planes, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.conv1 = conv(in_planes, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv(planes, 4 * planes, 1)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.shortcut = _shortcut(in_planes, 4 * planes, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes, planes, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = conv(in_planes, planes, 3, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3)
        self.shortcut = _shortcut(in_planes, planes, stride)[:1]  # without the batch norm

    def forward(self, x):
        out = F.relu(self.bn1(x))
        if len(self.shortcut):  # the projection sees the activation, the identity does not
            x = self.shortcut(out)
        return x + self.conv2(F.relu(self.bn2(self.conv1(out))))


class PreActBlockX(PreActBlock):
    """The block of fast_adversarial's PreActResNet: the projection sees x itself. Its parameters are PreActBlock's."""

    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return out + self.shortcut(x)


class ResNet(nn.Module):
    """ResNet for CIFAR: a 3x3 convolution and no pooling at first. With pre-activation blocks the first batch norm
    moves behind the last block (He et al. 2016)."""

    def __init__(self, block, num_blocks, num_classes=10):
        super().__init__()
        self.preact = issubclass(block, PreActBlock)
        self.conv1 = conv(3, 64, 3)
        if not self.preact:
            self.bn1 = nn.BatchNorm2d(64)
        in_planes = 64
        for stage, count in enumerate(num_blocks):
            planes, blocks = 64 * 2**stage, []
            for i in range(count):
                blocks.append(block(in_planes, planes, 2 if stage > 0 and i == 0 else 1))
                in_planes = planes * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        if self.preact:
            self.bn = nn.BatchNorm2d(in_planes)
        self.linear = nn.Linear(in_planes, num_classes)

    def forward(self, x):
        out = self.conv1(x)
        if not self.preact:
            out = F.relu(self.bn1(out))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        if self.preact:
            out = F.relu(self.bn(out))
        return self.linear(out.mean((2, 3)))


RESNETS = {"resnet-18": (BasicBlock, (2, 2, 2, 2)), "resnet-50": (Bottleneck, (3, 4, 6, 3)),
           "preact-resnet-18": (PreActBlock, (2, 2, 2, 2)), "preact-resnet-18-x": (PreActBlockX, (2, 2, 2, 2))}
TWINS = {"preact-resnet-18": "preact-resnet-18-x"}  # names and shapes of parameters cannot tell the two apart


def parse_arch(name):
    """Return (constructor, its arguments) for an architecture's name. Raise ValueError on another name."""
    if name in RESNETS:
        return ResNet, RESNETS[name]
    if match := re.fullmatch(r"wrn-(\d{1,3})-(\d{1,2})", name):
        depth, width = int(match[1]), int(match[2])
        if depth >= 10 and (depth - 4) % 6 == 0 and width >= 1:
            return WideResNet, (depth, width)
    hint = "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(name, [*RESNETS, "wrn-34-10"], 1))
    raise ValueError(f"unknown architecture {name!r}; known: {ARCHS}{hint}")


def build_model(name, num_classes=10):
    """Return a new model of one of ARCHS, in train mode and in channels_last. Raise ValueError on another name."""
    constructor, arguments = parse_arch(name)
    return constructor(*arguments, num_classes=num_classes).to(memory_format=torch.channels_last)


class Normalised(nn.Module):
    """model((x - mean) / std), so that every attack works on x in [0, 1]. mean and std are three numbers each."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, x):
        return self.model((x - self.mean) / self.std)


@contextlib.contextmanager
def frozen(model):
    """Show an attack the model in eval mode and with constant parameters; restore every mode and requires_grad."""
    training = [module for module in model.modules() if module.training]
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval().requires_grad_(False)
        yield model
    finally:
        for module in training:
            module.training = True
        for parameter in wanting:
            parameter.requires_grad_(True)
