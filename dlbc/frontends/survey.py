"""Every operator of a model that has no handler, where compiling stops at the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dlbc.errors import UnsupportedOpError
from dlbc.frontends.aten import Tracer
from dlbc.frontends.inputs import Args, Dynamic, Signature, dynamic_axes, injected, tensors
from dlbc.frontends.torch_export import _Capture, evaluating
from dlbc.frontends.translate import _CHECKS, _SIZES, _handler, described, provenance


def unsupported(model: nn.Module, args: Args, kwargs: Mapping[str, Any], *, dynamic: Dynamic = True
                ) -> tuple[UnsupportedOpError, ...]:
    """One error for each such operator and place, in the order of the model. Raises ExportError, as compiling."""
    signature = Signature.of(model)
    added = injected(model, signature, args, kwargs)
    bound = signature.bind(args, {**kwargs, **added})
    named = {path: x for name, value in bound.items() for path, x in tensors(value, name)}
    with torch.no_grad(), evaluating(model):
        program, _, _ = _Capture(model, signature, bound, named).run(dynamic_axes(named, dynamic))
    found: dict[tuple[str, str], UnsupportedOpError] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.name.partition("::")[2] in _CHECKS | _SIZES or isinstance(
                node.meta.get("val"), bool | int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            continue
        place, cls, source, _ = provenance(node)
        at = Tracer()
        at.origin = described(place, cls, source)
        try:
            _handler(node.target, at)
        except UnsupportedOpError as problem:
            found.setdefault((problem.fact, problem.where), problem)
    return tuple(found.values())
