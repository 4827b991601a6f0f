"""Networks trained on the spot: the families of image classifiers in small, and a classifier of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(inputs: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    """Linear layers and ReLUs on flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def cnn(classes: int = 10) -> nn.Sequential:
    """Two convolutions on 8 x 8 and a pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, classes))


def vgg(classes: int = 10) -> nn.Sequential:
    """Three stages of two 3 x 3 convolutions with batch norm, then two linear layers (arXiv 1409.1556); 32 x 32."""
    layers: list[nn.Module] = []
    channels = 1
    for width in (16, 32, 64):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, classes))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential() if stride == 1 and inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        found: Tensor = self.relu(out + self.shortcut(x))
        return found


def resnet(classes: int = 10) -> nn.Sequential:
    """Three stages of two basic blocks (arXiv 1512.03385, the form for 32 x 32)."""
    blocks: list[nn.Module] = []
    channels = 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range(2):
            blocks.append(_Residual(channels, width, 2 if stage and not block else 1))
            channels = width
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks,
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


class DenseNet(nn.Module):
    """Three blocks in which a layer reads all earlier ones; batch norm before convolution (arXiv 1608.06993)."""

    def __init__(self, growth: int = 8, layers: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        channels = 16
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for block in range(3):
            self.blocks.append(nn.ModuleList(_dense(channels + i * growth, growth) for i in range(layers)))
            channels += layers * growth
            if block < 2:
                self.transitions.append(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(
                    channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)))
                channels //= 2
        self.norm, self.head = nn.BatchNorm2d(channels), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of pictures [B, 1, 32, 32]."""
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            assert isinstance(block, nn.ModuleList)
            for layer in block:
                x = torch.cat([x, layer(x)], 1)
            if number < len(self.transitions):
                x = self.transitions[number](x)
        found: Tensor = self.head(F.relu(self.norm(x)).mean((2, 3)))
        return found


def _dense(inputs: int, growth: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 2 * growth, 1, bias=False),
                         nn.BatchNorm2d(2 * growth), nn.ReLU(), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False))


class _Logits(nn.Module):
    """A transformers classifier that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        found: Tensor = self.model(pixel_values=pixel_values).logits
        return found


def vit(classes: int = 10) -> nn.Module:
    """A vision transformer of 3 layers on 64 patches of 4 x 4 (arXiv 2010.11929)."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
                       image_size=32, patch_size=4, num_channels=1, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0, num_labels=classes)
    return _Logits(ViTForImageClassification(config))


IMAGE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mlp": (lambda: mlp(64, (64, 32), 10), 8), "cnn": (cnn, 8), "vgg": (vgg, 32), "resnet": (resnet, 32),
    "densenet": (DenseNet, 32), "vit": (vit, 32)}
"""Families by name, with the side of the picture that they take."""
