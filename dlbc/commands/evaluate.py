"""`dlbc evaluate text|image|table`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlbc.commands.shared import (
    Backend,
    Built,
    Cache,
    Data,
    Device,
    Drop,
    Fallback,
    console,
    index_of,
    working,
)
from dlbc.commands.tables import Table
from dlbc.errors import InputError

if TYPE_CHECKING:
    import torch

    from dlbc.evaluate.fills import Fill
    from dlbc.evaluate.methods import Method
    from dlbc.evaluate.units import Units

_HOW, _OUT = "How to measure", "Where to put it"

Methods = Annotated[list[str] | None, typer.Option(
    "--rules", "-r", show_default="auto",
    help="A preset, or a baseline: gradient x input, integrated gradients. May be repeated; all are compared.")]
Target = Annotated[str | None, typer.Option("--target", "-t", help="What to explain, the same for all. "
                                                                  "Default: what the model predicts of each.")]
Score = Annotated[str, typer.Option(rich_help_panel=_HOW,
                                    help="probability, log_probability, centred_logit, sigmoid or output.")]
Steps = Annotated[int, typer.Option(rich_help_panel=_HOW, min=1, help="Steps of a perturbation curve.")]
Batch = Annotated[int, typer.Option(rich_help_panel=_HOW, min=1, help="Perturbed copies per run of the model.")]
Randomise = Annotated[bool, typer.Option("--randomise", rich_help_panel=_HOW,
                                         help="Also explain a copy of the model with shuffled weights.")]
Save = Annotated[Path | None, typer.Option("--save", rich_help_panel=_OUT, help="Write the numbers: .json.")]
Plot = Annotated[Path | None, typer.Option("--plot", rich_help_panel=_OUT, help="Draw the curves: .png, .svg, .pdf.")]

app = typer.Typer(help="Measure which rules explain a model best, beside controls.", no_args_is_help=True,
                  rich_markup_mode="rich")


@dataclass(frozen=True)
class Measuring:
    """What is measured, and where the report goes."""

    rules: Sequence[str]
    score: str
    steps: int
    batch: int
    randomise: bool
    save: Path | None
    plot: Path | None
    options: dict[str, Any]

    def check_names(self) -> None:
        """InputError, before any work, for a file that could not be written at the end."""
        for path, suffixes in ((self.save, (".json",)), (self.plot, (".png", ".svg", ".pdf"))):
            if path is not None and path.suffix.lower() not in suffixes:
                raise typer.BadParameter(f"{path} must end in {' or '.join(suffixes)}")
            if path is not None and not path.absolute().parent.is_dir():
                raise InputError(f"there is no folder {path.absolute().parent}", hint="create it, or write elsewhere")

    def deliver(self, model: torch.nn.Module, items: Sequence[Any], target: int | None, units: str | Units,
                fill: str | Fill) -> None:
        """Measure, show the table, write the files."""
        from dlbc.evaluate import measure, randomisation

        targets = None if target is None else [target] * len(items)
        report = measure(model, items, self._methods(), targets=targets, units=units, fill=fill, score=self.score,
                         steps=self.steps, batch=self.batch, progress=True)
        curves = report
        if self.randomise:
            report += randomisation(model, items, self._methods(), targets=targets, units=units, controls=True,
                                    progress=True)
        out = console()
        if out.is_terminal:
            out.print(report.table())
        else:
            out.print(str(report), markup=False, highlight=False, soft_wrap=True)
        if self.save is not None:
            out.print(f"wrote {report.save(self.save)}", markup=False, highlight=False, soft_wrap=True)
        if self.plot is not None:
            curves.plot(self.plot)
            out.print(f"wrote {self.plot}", markup=False, highlight=False, soft_wrap=True)

    def _methods(self) -> list[str | Method]:
        from dlbc.evaluate.baselines import NAMED
        from dlbc.evaluate.methods import compiled

        return [name if name in NAMED else compiled(name, **self.options) for name in self.rules]


@app.command("text")
def text(
    model: Annotated[str, typer.Option(
        "--model", "-m", show_default=False,
        help="A folder, GGUF file, package or hub name: a causal language model or a text classifier.")],
    given: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="Prompts, or texts to classify.",
                                                      show_default=False)] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A file with a text in every line.")] = None,
    gguf: Annotated[str | None, typer.Option("--gguf", help="The GGUF file in the folder.")] = None,
    target: Target = None, rules: Methods = None,
    fill: Annotated[str, typer.Option(rich_help_panel=_HOW, help="What takes the place of a token: delete, zero, mask "
                                                                 "or replace.")] = "delete",
    score: Score = "probability", steps: Steps = 20, batch: Batch = 16, randomise: Randomise = False,
    backend: Backend = "auto", device: Device = "cpu", fallback: Fallback = None, cache: Cache = True,
    save: Save = None, plot: Plot = None,
) -> None:
    """Whether the tokens that are called relevant matter to a language model or classifier.

    [dim]dlbc evaluate text -m ./my-classifier --file reviews.txt -r attnlrp -r cp-lrp --plot curves.png[/dim]
    """
    measuring = Measuring(rules or ("auto",), score, steps, batch, randomise, save, plot,
                          {"backend": backend, "fallback": fallback, "cache": cache})
    measuring.check_names()
    texts = _texts(given or [], file)
    from dlbc.commands.explain import token_id
    from dlbc.evaluate.units import Tokens
    from dlbc.models import load_text

    with working(f"loading {model}"):
        loaded = load_text(model, gguf=gguf, device=device)
    tokenizer: Any = loaded.tokenizer
    chosen = None if target is None else token_id(tokenizer, target, texts[0]) if loaded.causal else \
        index_of(target, dict(loaded.labels))
    items = [loaded.inputs(one) for one in texts]
    special = tuple(tokenizer.all_special_ids)
    spared = all(any(int(token) in special for token in item["input_ids"][0]) for item in items)
    units = Tokens(input="input_ids", special=special, last=0 if spared else 1)
    measuring.deliver(loaded.model, items, chosen, units, _token_fill(fill, tokenizer))


@app.command("image")
def image(
    given: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures: .png, .jpg ...",
                                                show_default=False)],
    model: Annotated[str, typer.Option(
        "--model", "-m", show_default=False,
        help="A folder or hub name of an image classifier, `efficientnet-lite0`, or file.py:build, which returns "
             "(model, preprocess) or (model, preprocess, names of the classes).")],
    target: Target = None, rules: Methods = None,
    patch: Annotated[int | None, typer.Option(rich_help_panel=_HOW, min=1, show_default="a 14th of the side",
                                              help="Side of a patch in pixels.")] = None,
    fill: Annotated[str, typer.Option(rich_help_panel=_HOW, help="What takes the place of a patch: mean, zero, blur, "
                                                                 "blur(8), constant(0.5).")] = "mean",
    score: Score = "probability", steps: Steps = 20, batch: Batch = 16, randomise: Randomise = False,
    backend: Backend = "auto", device: Device = "cpu", fallback: Fallback = None, cache: Cache = True,
    save: Save = None, plot: Plot = None,
) -> None:
    """Whether the patches that are called relevant matter to a classifier of pictures.

    [dim]dlbc evaluate image -m efficientnet-lite0 photos/*.png -r auto -r dlb[/dim]
    """
    measuring = Measuring(rules or ("auto",), score, steps, batch, randomise, save, plot,
                          {"backend": backend, "fallback": fallback, "cache": cache})
    measuring.check_names()
    from dlbc.commands.explain import _picture, _pixels

    pictures = [_picture(path) for path in given]
    from dlbc.evaluate.units import Patches
    from dlbc.models import load_image

    with working(f"loading {model}"):
        loaded = load_image(model, device=device)
    chosen = index_of(target, dict(loaded.labels))
    items = [_pixels(loaded.preprocess(picture)).to(device) for picture in pictures]
    measuring.deliver(loaded.model, items, chosen, Patches(patch), fill)


@app.command("table")
def table(
    given: Data, model: Built,
    rows: Annotated[int, typer.Option("--rows", help="So many rows of the data, from the first on.", min=1)] = 100,
    drop: Drop = None,
    target: Target = None, rules: Methods = None,
    fill: Annotated[str, typer.Option(rich_help_panel=_HOW, help="What takes the place of a feature: mean (of these "
                                                                 "rows), zero, constant(0.5).")] = "mean",
    score: Score = "probability", steps: Steps = 20, batch: Batch = 256, randomise: Randomise = False,
    backend: Backend = "auto", device: Device = "cpu", fallback: Fallback = None, cache: Cache = True,
    save: Save = None, plot: Plot = None,
) -> None:
    """Whether the features that are called relevant matter to a model of tables.

    [dim]dlbc evaluate table -m churn.py:build customers.csv --rows 50 -r epsilon -r "integrated gradients"[/dim]
    """
    measuring = Measuring(rules or ("auto",), score, steps, batch, randomise, save, plot,
                          {"backend": backend, "fallback": fallback, "cache": cache})
    measuring.check_names()
    data = Table.read(given, drop or ())
    numbers = [data.row(0), *islice(data.rows(1), rows - 1)]
    import torch

    from dlbc.built import load_built

    with working(f"loading {model}"):
        built = load_built(model)
    example = built.second
    if isinstance(example, torch.Tensor) and example.ndim == 2 and example.shape[1] != len(numbers[0]):
        raise InputError(f"the model takes {example.shape[1]} columns, the data has {len(numbers[0])}",
                         where=str(given), hint="leave the others out with --drop NAME")
    values = torch.tensor(numbers, dtype=torch.float32, device=device)
    measuring.deliver(built.model.to(device), [values[place:place + 1] for place in range(len(values))],
                      index_of(target, dict(built.labels)), "features", fill)


def _texts(given: Sequence[str], file: Path | None) -> list[str]:
    """The texts of the command line, then those of the file. InputError when there are none."""
    if file is not None and not file.is_file():
        raise InputError(f"there is no file {file}", where="--file", hint="check the name")
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    found = [*given, *(line for line in lines if line.strip())]
    if not found:
        raise InputError("there is no text", hint="give texts, or --file with one in every line")
    return found


def _token_fill(name: str, tokenizer: Any) -> str | Fill:
    """A fill by name; what the tokenizer knows need not be given."""
    from dlbc.evaluate.fills import mask, replace

    if name == "mask":
        found = next((token for token in (tokenizer.mask_token_id, tokenizer.unk_token_id) if token is not None), None)
        if found is None:
            raise InputError("the tokenizer has no mask or unknown token", where="--fill", hint="use delete or replace")
        return mask(found)
    if name == "replace":
        special = set(tokenizer.all_special_ids)
        return replace([token for token in range(len(tokenizer)) if token not in special])
    return name
