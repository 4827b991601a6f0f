"""ATen's indexing by tensors."""

from __future__ import annotations

from collections.abc import Sequence

from dlbc.frontends.aten import Tracer, aten, is_tensor, positive, type_of
from dlbc.ir.core import Operand
from dlbc.ir.dims import Dim, product
from dlbc.ir.ops import broadcast

Indices = Sequence[Operand]


def _places(at: Tracer, indices: Indices) -> list[int]:
    places = [i for i, index in enumerate(indices) if index is not None]
    if any(type_of(indices[i]).dtype == "bool" for i in places):
        raise at.unsupported("indexing by a boolean mask: the size of the result depends on the data",
                             hint="use torch.where(mask, x, 0), or multiply by the mask")
    return places


def _fronted(at: Tracer, x: Operand, places: list[int]) -> tuple[Operand, tuple[int, ...], list[int]]:
    """x with the indexed axes consecutive: they move to the front unless they are neighbours already."""
    rank = type_of(x).rank
    if places == list(range(places[0], places[-1] + 1)):
        return x, tuple(places), list(range(rank))
    order = [*places, *(d for d in range(rank) if d not in places)]
    return at.permute(x, dims=tuple(order)), tuple(range(len(places))), order


@aten("index", "_unsafe_index")
def index(at: Tracer, x: Operand, indices: Indices) -> Operand:
    """x by tensors of positions along some axes, which broadcast; neighbours stay in place, others go first."""
    places = _places(at, indices)
    if not places:
        return x
    x, dims, _ = _fronted(at, x, places)
    return at.index(x, *(indices[i] for i in places), dims=dims)


@aten("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(at: Tracer, x: Operand, indices: Indices, values: Operand, accumulate: bool = False,
              unsafe: bool = False) -> Operand:
    """x with values written (or added) at positions."""
    masks = [i for i in indices if i is not None]
    if len(masks) == 1 and indices[0] is masks[0] and type_of(masks[0]).dtype == "bool" and type_of(values).rank == 0:
        rank, shape = type_of(x).rank, type_of(masks[0]).shape
        mask = at.viewed(masks[0], (*shape, *(1,) * (rank - len(shape))))
        values = at.converted(values, type_of(x).dtype)
        return at.where(mask, at.add(x, values) if accumulate else values, x)
    places = _places(at, indices)
    base, dims, order = _fronted(at, x, places)
    shape = type_of(base).shape
    region = (*shape[:dims[0]], *broadcast(*(type_of(indices[i]).shape for i in places)), *shape[dims[-1] + 1:])
    source = at.expanded(at.converted(values, type_of(x).dtype), region)
    y = at.index_put(base, source, *(indices[i] for i in places), dims=dims, accumulate=accumulate)
    return at.permuted(y, [order.index(d) for d in range(len(order))])


@aten("index_select", "index_select_copy")
def index_select(at: Tracer, x: Operand, dim: int, index: Operand) -> Operand:
    """Whole slices by a vector of positions."""
    axis = positive(dim, type_of(x).rank)
    return at.viewed(at.take(x, at.viewed(index, (product(type_of(index).shape),)), dim=axis), at.shape)


@aten("take")
def take(at: Tracer, x: Operand, index: Operand) -> Operand:
    """Elements of the flattened tensor."""
    return at.take(at.viewed(x, (product(type_of(x).shape),)), index, dim=0)


def _cropped(at: Tracer, x: Operand, shape: tuple[Dim, ...], axis: int | None) -> Operand:
    """x cut to a shape along every axis but one."""
    for d, size in enumerate(shape):
        if d != axis and type_of(x).shape[d] != size:
            x = at.slice(x, dim=d, stop=size)
    return x


@aten("gather")
def gather(at: Tracer, x: Operand, dim: int, index: Operand, *, sparse_grad: bool = False) -> Operand:
    """Elements along an axis by position."""
    if not type_of(x).rank:
        return x
    axis = positive(dim, type_of(x).rank)
    return at.gather(_cropped(at, x, type_of(index).shape, axis), index, dim=axis)


@aten("take_along_dim")
def take_along_dim(at: Tracer, x: Operand, indices: Operand, dim: int | None = None) -> Operand:
    """`gather` with broadcasting."""
    if dim is None:
        flat = at.viewed(x, (product(type_of(x).shape),))
        return at.gather(flat, at.viewed(indices, (product(type_of(indices).shape),)), dim=0)
    axis = positive(dim, type_of(x).rank)
    shape = broadcast(*((*s[:axis], 1, *s[axis + 1:]) for s in (type_of(x).shape, type_of(indices).shape)))

    def wide(operand: Operand) -> Operand:
        return at.expanded(operand, (*shape[:axis], type_of(operand).shape[axis], *shape[axis + 1:]))

    return at.gather(wide(x), wide(indices), dim=axis)


@aten("scatter", "scatter_add", "scatter_reduce")
def scatter(at: Tracer, x: Operand, dim: int, index: Operand, src: Operand = None, reduce: str = "", *,
            value: Operand = None, include_self: bool = True) -> Operand:
    """x with the source written or added at positions along an axis."""
    axis = positive(dim, type_of(x).rank)
    source = value if src is None else src
    adding = at.target.startswith("scatter_add") or reduce in ("add", "sum")
    if (reduce and not adding) or not include_self:
        raise at.unsupported(f"the reduction `{reduce}`", hint="`sum` with include_self=True is supported")
    if not is_tensor(source) and not adding:
        return at.scatter(x, index, source, dim=axis)
    shape = type_of(index).shape
    source = at.tensor(source, type_of(x).dtype)
    source = _cropped(at, source, shape, None) if type_of(source).rank else at.expanded(source, shape)
    return at.op("scatter_add" if adding else "scatter", x, index, source, dim=axis)[0]


@aten("index_add")
def index_add(at: Tracer, x: Operand, dim: int, index: Operand, source: Operand, *, alpha: float = 1) -> Operand:
    """x with slices of the source added at positions."""
    axis = positive(dim, type_of(x).rank)
    source = source if alpha == 1 else at.mul(source, alpha)
    return at.index_put(x, source, index, dims=(axis,), accumulate=True)


@aten("index_copy")
def index_copy(at: Tracer, x: Operand, dim: int, index: Operand, source: Operand) -> Operand:
    """x with slices replaced at positions."""
    return at.index_put(x, source, index, dims=(positive(dim, type_of(x).rank),))


@aten("index_fill")
def index_fill(at: Tracer, x: Operand, dim: int, index: Operand, value: Operand) -> Operand:
    """x with a number in slices at positions."""
    axis, shape = positive(dim, type_of(x).rank), type_of(x).shape
    region = (*shape[:axis], *type_of(index).shape, *shape[axis + 1:])
    source = at.expanded(at.converted(at.tensor(value, type_of(x).dtype), type_of(x).dtype), region)
    return at.index_put(x, source, index, dims=(axis,))
