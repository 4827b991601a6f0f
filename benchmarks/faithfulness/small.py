"""Sets of scikit-learn, with networks trained on the spot: handwritten digits and a table of measurements."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.faithfulness.dataset import DataSet, Kind, Split, predicted
from benchmarks.faithfulness.networks import IMAGE, mlp
from benchmarks.faithfulness.storage import fit, trained
from dlbc.evaluate import Features, Item, Patches, Units, mean, zero

KINDS: dict[str, Kind] = {"mlp": "mlp", "vit": "vit"}
STEPS = {"mlp": 600, "cnn": 500, "vgg": 250, "resnet": 200, "densenet": 400, "vit": 1400}


def digits(family: str, split: Split) -> DataSet:
    """The 1,797 digits of scikit-learn (UCI): 1,097 to train, 200 to tune, 500 held out; pixels 0..1.

    Where the network takes 32 x 32 they are enlarged, and units are the 64 pixels they had: patches of 4 x 4.
    """
    pictures, labels = _digits(32 if IMAGE[family][1] == 32 else 8)
    parts = {"train": slice(0, 1097), "tune": slice(1097, 1297), "held": slice(1297, None)}
    x, y = pictures[parts["train"]], labels[parts["train"]]

    def train(model: nn.Module) -> None:
        def batch() -> tuple[Tensor, Tensor]:
            rows = torch.randint(0, len(x), (64,))
            return model(x[rows] if family == "mlp" else _shifted(x[rows])), y[rows]

        fit(model, batch, F.cross_entropy, steps=STEPS[family], rate=1.5e-3 if family == "vit" else 2e-3)

    model = trained(f"digits-{family}", IMAGE[family][0], train)
    own, truth = pictures[parts[split]], labels[parts[split]]
    return _classified(f"digits-{family}", KINDS.get(family, "cnn"), model, own, truth, x,
                       Patches(size=own.shape[-1] // 8), split)


def breast_cancer(split: Split) -> DataSet:
    """Breast cancer Wisconsin (UCI): 30 measurements of 569 tumours, standardised; 340 to train, 69 to tune, 160 held
    out. The fill `zero` is the mean of the training data."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    rows, labels = torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    parts = {"train": slice(0, 340), "tune": slice(340, 409), "held": slice(409, None)}
    rows = (rows - rows[parts["train"]].mean(0)) / rows[parts["train"]].std(0)
    x, y = rows[parts["train"]], labels[parts["train"]]

    def train(model: nn.Module) -> None:
        def batch() -> tuple[Tensor, Tensor]:
            chosen = torch.randint(0, len(x), (64,))
            return model(x[chosen]), y[chosen]

        fit(model, batch, F.cross_entropy, steps=300, rate=3e-3, decay=0.05)

    model = trained("breast-cancer", lambda: mlp(30, (32, 16), 2), train)
    return _classified("breast-cancer", "mlp", model, rows[parts[split]], labels[parts[split]], None, Features(), split)


def _classified(name: str, kind: Kind, model: nn.Module, rows: Tensor, labels: Tensor, background: Tensor | None,
                units: Units, split: Split) -> DataSet:
    inputs = list(rows.split(1))
    classes = predicted(model, inputs).argmax(1)
    items = tuple(Item(one, target=int(target)) for one, target in zip(inputs, classes, strict=True))
    fills = (zero,) if background is None else (zero, mean(of=background))
    return DataSet(name, kind, model, items, units, fills, tuple(range(len(items))),
                   float((classes == labels).float().mean()), split, batch=256)


@functools.cache
def _digits(side: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    if side != 8:
        pictures = F.interpolate(pictures, (side, side), mode="bilinear", align_corners=False)
    return pictures, torch.tensor(data.target)[order]


def _shifted(pictures: Tensor) -> Tensor:
    """Each moved by up to an eighth of a side, the same for the batch."""
    reach = pictures.shape[-1] // 8
    down, right = (int(torch.randint(-reach, reach + 1, ())) for _ in range(2))
    return torch.roll(pictures, (down, right), (2, 3))
