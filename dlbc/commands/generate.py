"""`dlbc explain text --generate N`: continue the text, and explain every token that came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlbc.commands.shared import console
from dlbc.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from dlbc.models import TextModel
    from dlbc_runtime.explainer import Explainer
    from dlbc_runtime.generation import GenerationExplanation

_HOW = "How to generate"

Generate = Annotated[int | None, typer.Option(
    "--generate", "-g", rich_help_panel=_HOW, min=1,
    help="Continue the text by up to so many tokens, and explain each of them.")]
Temperature = Annotated[float | None, typer.Option("--temperature", rich_help_panel=_HOW,
                                                   help="Sample, with logits divided by this.")]
TopK = Annotated[int | None, typer.Option("--top-k", rich_help_panel=_HOW, min=1,
                                          help="Sample from the likeliest so many.")]
TopP = Annotated[float | None, typer.Option(
    "--top-p", rich_help_panel=_HOW, help="Sample from the likeliest that have this much probability together.")]
Beams = Annotated[int | None, typer.Option("--beams", rich_help_panel=_HOW, min=2,
                                           help="Search with so many beams in place of sampling.")]
Seed = Annotated[int | None, typer.Option("--seed", rich_help_panel=_HOW, min=0, help="Of the random numbers.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", rich_help_panel=_HOW,
                                                help="A text that ends it. May be repeated.")]
Layers = Annotated[bool, typer.Option("--layers", rich_help_panel=_HOW,
                                      help="Also explain at every layer, for the slider of the page.")]


@dataclass(frozen=True)
class Generating:
    """How to continue a text; what is None is as the model's own generation settings have it."""

    tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    beams: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    layers: bool = False

    @property
    def strategy(self) -> str:
        """The strategy that the options ask for: greedy where they ask for none."""
        if self.beams is not None:
            return "beam_search"
        return next((name for name in ("top_p", "top_k", "temperature") if getattr(self, name) is not None), "greedy")

    def check(self, others: Mapping[str, object]) -> None:
        """InputError, before any work, for options that mean nothing with or without `--generate`; `others` are those
        that are for explaining the next token alone."""
        own = {"--temperature": self.temperature, "--top-k": self.top_k, "--top-p": self.top_p, "--beams": self.beams,
               "--seed": self.seed, "--stop": self.stop or None, "--layers": self.layers or None}
        if self.tokens is None:
            given = next((name for name, value in own.items() if value is not None), None)
            if given is not None:
                raise InputError(f"{given} is for text that is generated", hint="add --generate 20")
            return
        given = next((name for name, value in others.items() if value), None)
        if given is not None:
            hint = {"--target": "leave it out: the tokens that come are explained", "--png": "--html writes a page"}
            raise InputError(f"{given} is not for text that is generated", hint=hint.get(given, "leave it out"))
        sampled = next((name for name in ("--temperature", "--top-k", "--top-p") if own[name] is not None), None)
        if self.beams is not None and sampled is not None:
            raise InputError(f"--beams and {sampled}", hint="search with beams, or sample")

    def options(self) -> dict[str, Any]:
        """What `Sampler.generate` takes."""
        named = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "num_beams": self.beams,
                 "seed": self.seed, "stop": list(self.stop) or None}
        return {"strategy": self.strategy, "max_new_tokens": self.tokens, "layers": self.layers,
                **{name: value for name, value in named.items() if value is not None}}


def generated(explainer: Explainer, loaded: TextModel, text: str, how: Generating, *, against: str | None, sinks: str,
              memory_budget: int | None, top: int, files: tuple[Path | None, ...], experts: bool = False) -> None:
    """Generate, show, and write the files; what an interruption leaves is shown and written, too.

    `against`: the token to compare each with, or "alternative", the likeliest other.
    """
    from rich.console import Console

    from dlbc_runtime.sampler import GenerationInterrupted

    sampler = explainer.sampler(loaded.tokenizer)
    watched = Console(stderr=True).is_terminal
    target = "chosen" if against is None else against if against == "alternative" else \
        _contrast(loaded.tokenizer, against, text)
    stopped = False
    try:
        with _watching(watched and how.beams is None) as callback:
            found = sampler.generate(text, target=target, sinks=sinks, memory_budget=memory_budget, progress=watched,
                                     callback=callback, **how.options())
    except GenerationInterrupted as problem:
        if problem.partial is None:
            raise
        found, stopped = problem.partial, True
    one = found[0] if isinstance(found, list) else found
    _deliver(one, top, files, experts)
    if stopped:
        raise typer.Exit(130)


def _contrast(tokenizer: Any, against: str, text: str) -> int:
    from dlbc.commands.explain import token_id

    return token_id(tokenizer, against, text, "--against")


def _deliver(found: GenerationExplanation, top: int, files: tuple[Path | None, ...], experts: bool) -> None:
    from dlbc.commands.experts import print_experts
    from dlbc_runtime.generated_terminal import render

    out = console()
    out.print(render(found, k=top))
    if experts:
        out.print()
        print_experts(found.experts, out)
    for path in filter(None, files):
        out.print(f"wrote {found.save(path)}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _watching(wanted: bool) -> Iterator[Callable[[Any], None] | None]:
    """The text on stderr as it comes, while somebody watches."""
    if not wanted:
        yield None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status("generating …") as status:
        pieces: list[str] = []

        def heard(step: Any) -> None:
            pieces.append(step.text)
            status.update(Text("generating … " + "".join(pieces)[-60:].replace("\n", "⏎")))
        yield heard
