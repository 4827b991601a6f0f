"""The way into Quantus, a library of more than thirty metrics for explanations (extra `quantus`).

    metric = quantus.PixelFlipping(...)
    metric(model=model, x_batch=x, y_batch=y, explain_func=dlbc.evaluate.quantus_explain("epsilon"))

Quantus calls `explain_func(model=, inputs=, targets=, **kwargs)` with numpy arrays and takes an array with relevance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc.errors import InputError
from dlbc_runtime.arrays import Array

if TYPE_CHECKING:
    import torch

    from dlbc.composite import Composite
    from dlbc_runtime.explainer import Explainer

KEPT = 2
"""Models whose explainers are kept: randomisation metrics go back and forth between two."""


def quantus_explain(rules: str | Composite | Explainer = "auto", **options: Any) -> Callable[..., Array]:
    """An `explain_func` for Quantus: relevance float32 of the shape of `inputs`.

    `rules`: a preset, a `Composite`, or an explainer, whose rules are then taken. `options` are those of
    `dlbc.compile`. Each model that Quantus shows (its randomisation metrics show others than yours) is compiled when
    first seen. Raises what compiling and explaining raise; InputError for inputs of a model with several.
    """
    from dlbc_runtime.explainer import Explainer

    made = rules if isinstance(rules, Explainer) else None
    composite = _rules_of(rules)
    held: list[tuple[torch.nn.Module, Explainer]] = []

    def explain(model: torch.nn.Module, inputs: Any, targets: Any, **_: Any) -> Array:
        import torch

        from dlbc.api import compile as compile_model
        from dlbc_runtime.target import Target

        weight = next(model.parameters(), None)
        given = torch.as_tensor(np.asarray(inputs) if not isinstance(inputs, torch.Tensor) else inputs)
        if given.is_floating_point() and weight is not None:
            given = given.to(weight)
        own = next((one for known, one in held if known is model), None)
        if own is None:
            if made is not None and _same_weights(made, model):
                own = made
            else:
                own = compile_model(model, given, rules=composite, **options)
            held.insert(0, (model, own))
            del held[KEPT:]
        labels = np.asarray(targets.cpu() if isinstance(targets, torch.Tensor) else targets)
        chosen = Target.index(np.broadcast_to(labels.reshape(-1) if labels.ndim else labels, (len(given),)).tolist())
        explanation = own(given, target=chosen)
        names = list(explanation.relevance)
        if len(names) != 1:
            raise InputError(f"the model has {len(names)} explained inputs: {', '.join(names)}",
                             where="quantus_explain", hint="Quantus knows models with one input; wrap yours")
        return np.asarray(explanation.relevance[names[0]], np.float32)

    return explain


def _rules_of(rules: str | Composite | Explainer) -> str | Composite:
    from dlbc_runtime.explainer import Explainer

    if not isinstance(rules, Explainer):
        return rules
    from dlbc.options import options_of

    return options_of(rules.recipe, rules.manifest.backend).rules


def _same_weights(explainer: Explainer, model: torch.nn.Module) -> bool:
    """Whether an explainer reads this very model's weights."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    shared = [name for name in explainer.weights if name in own]
    return bool(shared) and all(getattr(explainer.weights[name], "data_ptr", int)() == own[name].data_ptr()
                                for name in shared)
