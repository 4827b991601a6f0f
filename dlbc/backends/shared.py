"""Expressions that torch and numpy write alike, and pieces of text for those that they do not."""

from __future__ import annotations

from dlbc.backends.names import literal
from dlbc.backends.site import Expression, Site
from dlbc.ir.core import Attr
from dlbc.ir.dims import Sym
from dlbc.ir.ops import definition


def along(rank: int, axis: int, inside: str) -> str:
    """`[:, inside]`: an index along one axis."""
    if axis == rank - 1 and rank > 2:
        return f"[..., {inside}]"
    return f"[{':, ' * axis}{inside}]"


def reduction(site: Site, axis: str, keepdim: str) -> str:
    """`(0, 2), keepdim=True`: the arguments of a reduction; nothing for a plain one over all axes."""
    axes, rank = site.axes(), site.type(0).rank
    kept = bool(site.attr("keepdim"))
    parts = []
    if rank and (axes != tuple(range(rank)) or kept):
        parts.append(f"{axis}{axes[0] if len(axes) == 1 else literal(axes)}")
    if kept and rank:
        parts.append(f"{keepdim}=True")
    return ", ".join(parts)


def single(site: Site, axis: str, keepdim: str) -> str:
    """`, 1, keepdim=True`: the arguments of a reduction over one axis, or over all for None."""
    dim, kept = site.attr("dim"), site.attr("keepdim")
    return ("" if dim is None else f", {axis}{dim}") + (f", {keepdim}=True" if kept and dim is not None else "")


def keeping_rank(site: Site, text: str) -> str:
    """A result over all axes that keeps them as size 1."""
    if site.attr("dim") is None and site.attr("keepdim"):
        return f"{text}.reshape({literal((1,) * site.type(0).rank)})"
    return text


def _slice(site: Site) -> str:
    axis, rank = site.axis(), site.type(0).rank
    start, stop, step = site.attr("start"), site.attr("stop"), site.attr("step")
    inside = f"{'' if start == 0 else site.text('start')}:"
    inside += "" if stop == site.type(0).shape[axis] else site.text("stop")
    return f"{site.x(0)}{along(rank, axis, inside + (f':{step}' if step != 1 else ''))}"


def _select(site: Site) -> str:
    return f"{site.x(0)}{along(site.type(0).rank, site.axis(), site.text('index'))}"


def _index(site: Site) -> str:
    dims = site.axes()
    return f"{site.x(0)}[{':, ' * dims[0]}{', '.join(site.args(1))}]"


def is_zero(value: Attr) -> bool:
    """True for the number 0, not for False or a size."""
    return not isinstance(value, (Sym, bool, str, tuple)) and value == 0


INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**", "floor_divide": "//", "remainder": "%",
         "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
LOGICAL = {"logical_and": "&", "logical_or": "|", "logical_xor": "^"}

COMMON: dict[str, Expression] = {
    **{name: f"{{a:ti}} {sign} {{b:ti}}" for name, sign in INFIX.items()},
    **{name: f"{{a:i}} {sign} {{b:i}}" for name, sign in COMPARE.items()},
    **{name: f"{{a:b}} {sign} {{b:b}}" for name, sign in LOGICAL.items()},
    "neg": "-{a:i}",
    "bitwise_not": "~{a:i}",
    "reshape": "{a:i}.reshape({shape})",
    "slice": _slice,
    "select": _select,
    "index": _index,
}
"""Expressions that both libraries share."""


def _recurrent(site: Site) -> str:
    lengths = len(definition(site.op.name).operands) - 1
    operands = [site.x(i) if i == lengths else site.typed(i) for i in range(len(site.op.operands))]
    options = ("activation", "reverse") if site.op.name == "rnn" else ("reverse",)
    return f"kernels.{site.op.name}({', '.join(operands)}{site.options(*options)})"


def _recurrence_adjoint(site: Site) -> str:
    return f"kernels.recurrence_adjoint({', '.join(site.args())}{site.options('reverse')})"


RECURRENT: dict[str, Expression] = {
    **dict.fromkeys(("lstm", "gru", "rnn"), _recurrent), "recurrence_adjoint": _recurrence_adjoint}
"""Calls of the scans, which both kernels name alike."""


def _expert_linear(site: Site) -> str:
    return f"kernels.expert_linear({site.typed(0)}, {site.x(1)}, {', '.join(_typed_or_none(site, 2, 3))}, " \
           f"{site.text('transposed')})"


def _grouped_linear(site: Site) -> str:
    return f"kernels.grouped_linear({site.typed(0)}, {site.x(1)}, {site.x(2)}, {site.x(3)}, " \
           f"{site.text('transposed')}{site.options('part')})"


def _typed_or_none(site: Site, *positions: int) -> list[str]:
    return [site.typed(i) if site.has(i) else "None" for i in positions]


def _route_topk(site: Site) -> str:
    return f"kernels.route_topk({site.x(0)}, {site.x(1)}, {site.text('k')})"


EXPERTS: dict[str, Expression] = {
    "route_topk": _route_topk, "expert_linear": _expert_linear, "grouped_linear": _grouped_linear,
    "expert_order": "kernels.expert_order({a}, {experts})", "combine": "kernels.combine({a:t}, {b:t})"}
"""Calls of what mixtures of experts need, which both kernels name alike."""
