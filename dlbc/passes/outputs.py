"""Names of inputs and outputs as the user knows them, and which output is explained."""

from __future__ import annotations

from dlbc.ir.core import Attr, Graph, Value
from dlbc.passes.carriers import carriers

FINAL = ("softmax", "log_softmax", "sigmoid")
"""What may end a model: the value before it is explained."""


def input_names(graph: Graph) -> dict[str, str]:
    """The user's name of each parameter of the forward section."""
    params, stated = graph.forward.params, graph.attrs.get("inputs")
    named = isinstance(stated, tuple) and len(stated) == len(params)
    return dict(zip((p.name for p in params), map(str, stated) if named and isinstance(stated, tuple) else (
        p.name for p in params), strict=True))


def output_names(graph: Graph) -> tuple[str, ...]:
    """The user's names of the model's outputs, in order."""
    stated: Attr = graph.attrs.get("outputs")
    if isinstance(stated, tuple):
        return tuple(map(str, stated))
    return tuple(value.name for value in graph.forward.results)


def explainable_outputs(graph: Graph) -> dict[str, Value]:
    """The outputs that carry relevance, by the user's names."""
    known = carriers(graph)
    return {name: value for name, value in zip(output_names(graph), graph.forward.results, strict=False)
            if value.name in known}


def explained_output(graph: Graph, wanted: str = "") -> Value | None:
    """The output called `wanted`; without a name `logits`, else the first that carries relevance. None: there is
    no such output."""
    found = explainable_outputs(graph)
    return found.get(wanted or ("logits" if "logits" in found else next(iter(found), "")))
