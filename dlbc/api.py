"""What users call: `dlbc.compile` and `dlbc.load`."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlbc.compiler import compile_now
from dlbc.errors import InputError
from dlbc.gpu import choose
from dlbc.options import PRECISIONS, Options
from dlbc_runtime.cuda_graphs import check, require
from dlbc_runtime.memory import as_bytes
from dlbc_runtime.program import Variant
from dlbc_runtime.reference import Reference

if TYPE_CHECKING:
    import torch

    from dlbc.composite import Composite
    from dlbc_runtime.explainer import Explainer

log = logging.getLogger(__name__)


def compile(model: torch.nn.Module, example_inputs: object, *, rules: str | Composite = "auto", backend: str = "auto",
            dynamic: bool | Mapping[str, Collection[int]] = True, explain: Collection[str] = (), keep: str = "inputs",
            output: str = "", fallback: str | None = None, cache: bool = True, verify: bool = True,
            dump: str | os.PathLike[str] | None = None, reference: object = None,
            memory_budget: int | str | None = None, checkpoint: bool = False, precompute: str = "auto",
            target: str | None = None, precision: str = "auto", cuda_graphs: bool | str = "auto",
            tune: bool = False) -> Explainer:
    """Compile a model into an explainer.

    `example_inputs`: what the model is called with: a tensor, a tuple, or a dict of keyword inputs.
    `rules`: a preset's name (`docs/rules.md`) or a `Composite`; "auto" chooses by what the model holds, from measured
    faithfulness (`docs/faithfulness.md`), and `explainer.rules()` says what and why.
    `backend`: "torch" (any torch device), "numpy" (needs no torch to run), "c" (for small models on a CPU: whatever is
    small as functions in C; `docs/c.md`), "triton" (fused kernels for a GPU; `docs/triton.md`), or "auto": torch; for a
    model on an NVIDIA GPU Triton, where its kernels, tried once on the example inputs, give what torch gives
    (`explainer.plan()` says what was seen).
    `target`: the architecture that Triton's kernels are written for: "sm_80", "sm_86", "sm_89" or "sm_90"; default:
    that of the GPU the model is on. `precision`: how they multiply float32 numbers: "ieee", "tf32x3" (nearly as
    exact), "tf32" (10 bits); "auto" is "ieee", and relevance that meets weights of 16 bits has as many digits as these.
    `dynamic`: batch and sequence may change from call to call; or the axes of each input that may.
    `explain`: names of the inputs to explain (default: all but those called mask, or integer positions).
    `keep`, `output`: defaults for calls.
    `fallback`: "gradient" passes ops without a rule by their gradient; default: such ops are errors.
    `cache`: keep and reuse compiled explainers on disk; `verify`: check a reused one against the model.
    `dump`: a folder for the IR of every level (also the environment variable DLBC_DUMP).
    `reference`: explain differences to another input, without anything lost in biases: "zero", "mean", "blur", a tensor
    (tuple, dict) like `example_inputs`, or a `dlbc.Reference` (`docs/reference.md`).
    `memory_budget`: bytes, or text such as "2GB", that calls may take besides the weights: they work on parts of a
    batch and of many targets, and compute forward values again, as far as needed. `checkpoint`: always compute them
    again (`docs/memory.md`).
    `cuda_graphs`: for shapes that come again, have an NVIDIA GPU run each pass as one graph, instead of launching its
    kernels one by one. "auto": where that gives the same numbers, within a sixteenth of the GPU's memory and not within
    a `memory_budget`. True: within any memory, and an error where there can be none. False: never (`docs/triton.md`).
    `tune`: measure on the GPU which tiles of kernels are fastest for inputs of these sizes, once: what was measured is
    kept for later compiles, and is used by them without it (`docs/triton.md`). It takes minutes for a large model.
    `precompute`: which parts of weights that rules need, such as |W|, are kept from call to call (as much memory as the
    weights they are made of, `explainer.memory().between`): "auto", those of layers with one row for each row of a
    batch, such as a classifier's; "never"; "always".

    Raises ExportError (the model cannot be captured), UnsupportedOpError (an op without a rule), RuleError
    (unknown rules), InputError (inputs or weights with NaN). The model is not changed.
    """
    from dlbc.frontends.inputs import normalise

    check_model(model)
    args, kwargs = normalise(example_inputs)
    if precompute not in ("auto", "never", "always"):
        raise InputError(f"precompute={precompute!r}", hint='"auto", "never" or "always"')
    dump_to = os.fspath(dump) if dump else os.environ.get("DLBC_DUMP")
    explained = (explain,) if isinstance(explain, str) else tuple(explain)
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r}", hint=f"one of {', '.join(PRECISIONS)}")
    choice = choose(model, backend, target)
    options = Options(rules, choice.backend, dynamic, explained, fallback, dump_to,
                      None if reference is None else Reference.of(reference), precompute, choice.target, precision)
    default = Variant(keep=keep, output=output, checkpoint=checkpoint)
    budget = None if memory_budget is None else as_bytes(memory_budget)
    check(cuda_graphs)
    if cuda_graphs is True:
        require(choice.backend, dict(model.named_parameters()), budget)

    if tune:
        from dlbc.tuning import require as require_kernels

        require_kernels(backend, choice, model)

    def make(options: Options) -> Explainer:
        if not cache or dump_to:
            return compile_now(model, args, kwargs, options, default)
        from dlbc.cache import cached

        return cached(model, args, kwargs, options, default, verify=verify)

    if choice.trial:
        from dlbc.trial import Trial

        explainer = Trial(model, args, kwargs, options, default, make, cache and not dump_to, budget).explainer()
    else:
        explainer = make(options)
        explainer._recipe.pop("notes", None)
        if choice.why:
            explainer._recipe["notes"] = [choice.why]
    explainer.check(*args, **kwargs)
    if explainer.manifest.backend == "triton":
        explainer = _with_measured_tiles(explainer, model, args, kwargs, measure=tune, cache=cache, budget=budget)
    if budget is None and cuda_graphs == "auto":
        return explainer
    return explainer.with_options(memory_budget=budget, cuda_graphs=cuda_graphs)


def load(path: str | os.PathLike[str], model: torch.nn.Module | None = None, *, trust: bool = False) -> Explainer:
    """Load a saved explainer. Its code is generated anew from its verified IR; nothing stored is executed.

    `model` gives the weights, unless they were saved with it. `trust=True`, for files that you or someone you trust
    wrote: kernels that were compiled when it was saved (`save(..., kernels=True)`) are used where they fit this
    machine's GPU and Triton; they are machine code. All others are compiled when they first run. ArtifactError for a
    file that is damaged or foreign, or a model whose weights do not match by name, shape and element type.
    """
    from dlbc.artifact import load_artifact

    explainer = load_artifact(Path(path), model, trust=trust)
    return explainer if model is None or explainer.manifest.backend != "triton" else _with_measured_tiles(
        explainer, model)


def _with_measured_tiles(explainer: Explainer, model: torch.nn.Module, args: tuple[Any, ...] = (),
                         kwargs: Mapping[str, Any] | None = None, *, measure: bool = False, cache: bool = True,
                         budget: int | None = None) -> Explainer:
    """An explainer with kernels and the tiles that were measured for them, before or now."""
    from dlbc.tuning import tune, tuned

    if measure:
        return tune(explainer, model, args, kwargs or {}, keep=cache, budget=budget)
    return tuned(explainer, model) if cache else explainer


def check_model(model: object) -> None:
    """InputError for what is no torch module; a warning for one in training mode, which is explained as in eval."""
    import torch

    if not isinstance(model, torch.nn.Module):
        raise InputError(f"the model is {type(model).__name__} {model!r:.60}, not a torch.nn.Module",
                         hint="load it first; `dlbc explain --model NAME` on the command line loads models by name")
    if any(module.training for module in model.modules()):
        log.warning("%s is in training mode: it is explained as in eval mode, and left in training mode",
                    type(model).__name__)
