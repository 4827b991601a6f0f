"""Makes docs/images/presets_image.png and presets_text.png: one input, explained by every preset.

    python examples/presets_picture.py

Each map is scaled by its own largest amount: red speaks for what is explained, blue against it. The two maps in a row
of the image are of the same picture for its class and for another one: where they agree, the rules are target-blind.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from demo import compiled_once, image_part, text_part
from matplotlib.axes import Axes
from PIL import Image

import dlbc
from dlbc.presets import PRESETS
from dlbc_runtime.views.tokens import display

FOLDER = Path(__file__).parents[1] / "docs" / "images"
OTHER = 207
"""Golden retriever: what the picture does not show."""
SKIPPED = {"auto-cnn", "auto-lm", "auto-encoder", "auto-vit"}
TRANSFORMERS_ONLY = {"attnlrp", "attnlrp-conserving", "cp-lrp"}
CNNS_ONLY = {"epsilon", "epsilon-plus", "epsilon-plus-flat", "epsilon-gamma-box", "alpha2-beta1"}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    image(FOLDER / "presets_image.png")
    text(FOLDER / "presets_text.png")


def image(to: Path) -> None:
    """The cat's class and another one, under each preset; channels are summed, as everywhere."""
    part = image_part()
    presets = [name for name in PRESETS if name not in SKIPPED | TRANSFORMERS_ONLY]
    columns = 3
    rows = -(-(len(presets) + 1) // columns)
    figure, axes = plt.subplots(rows, columns * 2, figsize=(columns * 3.7, rows * 2.05))
    places = [pair for row in axes for pair in row.reshape(-1, 2)]
    for axis in axes.flat:
        axis.axis("off")
    picture = part.named(compiled_once(part, "epsilon")(**part.inputs)).images
    assert picture is not None
    places[0][0].imshow(picture[0])
    places[0][0].set_title("the picture", fontsize=8)
    places[0][1].text(0, 0.5, "left: for Egyptian cat\nright: for golden retriever\n\nred speaks for the class,\n"
                              "blue against it", fontsize=7, va="center", transform=places[0][1].transAxes)
    for name, (left, right) in zip(presets, places[1:], strict=False):
        for axis, target in ((left, None), (right, OTHER)):
            found = compiled_once(part, name)(**part.inputs, target=target)
            relevance = next(iter(found.relevance.values()))[0].sum(0)
            draw(axis, relevance)
        left.set_title(name, fontsize=8, loc="left")
    figure.tight_layout(pad=0.4)
    save(figure, to)


def draw(axis: Axes, relevance: np.ndarray) -> None:
    size = float(np.quantile(np.abs(relevance), 0.995)) or 1.0
    axis.imshow(relevance, cmap="seismic", vmin=-size, vmax=size)


def text(to: Path) -> None:
    """The next token of a prompt, under each preset: one line of coloured tokens for each."""
    part = text_part()
    presets = [name for name in PRESETS if name not in SKIPPED | CNNS_ONLY]
    figure, axis = plt.subplots(figsize=(11, 0.62 * len(presets) + 0.3))
    axis.axis("off")
    axis.set_xlim(0, 1)
    axis.set_ylim(len(presets), 0)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    colours = plt.get_cmap("seismic")
    for line, name in enumerate(presets):
        found = part.named(compiled_once(part, name)(**part.inputs, target=part.target))
        (relevance,) = found.relevance.values()
        assert found.tokens is not None
        words = [token.text for token in display(found.tokens[0])]
        size = float(np.abs(relevance[0]).max()) or 1.0
        axis.text(0, line + 0.3, name, fontsize=8, va="center", weight="bold")
        x, y = 0.14, line + 0.3
        for word, amount in zip(words, relevance[0], strict=True):
            shade = colours(0.5 + 0.35 * amount / size)
            drawn = axis.text(x, y, word, fontsize=7.5, va="center", bbox={"facecolor": shade, "edgecolor": "none",
                                                                          "pad": 1.2})
            width = drawn.get_window_extent(renderer).transformed(axis.transData.inverted()).width
            if x + width > 1:
                x, y = 0.14, y + 0.36
                drawn.set_position((x, y))
            x += width + 0.006
    figure.tight_layout(pad=0.2)
    save(figure, to)


def save(figure: plt.Figure, to: Path) -> None:
    figure.savefig(to, dpi=100)
    plt.close(figure)
    Image.open(to).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(to, optimize=True)
    print(f"wrote {to}: {to.stat().st_size / 1000:.0f} kB; dlbc {dlbc.__version__}")


if __name__ == "__main__":
    main()
