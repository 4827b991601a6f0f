"""ATen's operators that move elements: views, slices, joins, indexing."""

from __future__ import annotations

from collections.abc import Sequence

from dlbc.frontends.aten import UNSUPPORTED, WHOLE, Tracer, aten, listed, positive, type_of
from dlbc.ir.core import Operand
from dlbc.ir.dims import Dim, Sym, minimum, product

Sizes = Sequence[Dim]


@aten("view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as",
      "ravel", "atleast_1d.default", "atleast_2d.default", "atleast_3d.default", "view_copy",
      "unsqueeze_copy", "squeeze_copy", "_reshape_alias", "_reshape_copy", "reshape_copy", "squeeze_", "unsqueeze_")
def view(at: Tracer, x: Operand, *_: object, **__: object) -> Operand:
    """The same elements under the shape the exporter found."""
    if type_of(x).dtype != at.out.dtype:
        raise at.unsupported("a view of the bits as another element type")
    return at.viewed(x, at.shape)


@aten("transpose", "swapaxes", "swapdims", "transpose_copy")
def transpose(at: Tracer, x: Operand, dim0: int, dim1: int) -> Operand:
    """Two axes exchanged."""
    order = list(range(type_of(x).rank))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return at.permuted(x, order)


@aten("t", "numpy_T", "mT", "mH", "adjoint", "t_copy")
def t(at: Tracer, x: Operand) -> Operand:
    """The last two axes exchanged (all axes reversed for numpy_T)."""
    rank = type_of(x).rank
    return at.permuted(x, range(rank)[::-1]) if rank < 2 or "numpy" in at.target else transpose(at, x, -1, -2)


@aten("permute", "permute_copy")
def permute(at: Tracer, x: Operand, dims: Sequence[int]) -> Operand:
    """Axes in another order."""
    return at.permuted(x, dims)


@aten("movedim", "moveaxis")
def movedim(at: Tracer, x: Operand, source: int | Sequence[int], destination: int | Sequence[int]) -> Operand:
    """Axes moved to other places, the rest in order."""
    rank = type_of(x).rank
    moved = {positive(d, rank): positive(s, rank) for s, d in zip(listed(source), listed(destination), strict=True)}
    rest = iter([d for d in range(rank) if d not in moved.values()])
    return at.permuted(x, [moved[d] if d in moved else next(rest) for d in range(rank)])


@aten("expand", "expand_as", "broadcast_to", "expand_copy")
def expand(at: Tracer, x: Operand, *_: object, **__: object) -> Operand:
    """Broadcast to the shape the exporter found."""
    return at.expanded(x, at.shape)


@aten("broadcast_tensors")
def broadcast_tensors(at: Tracer, tensors: Sequence[Operand]) -> tuple[Operand, ...]:
    """All broadcast to one shape."""
    return tuple(at.expanded(x, at.shape) for x in tensors)


@aten("repeat", "tile")
def repeat(at: Tracer, x: Operand, repeats: Sizes) -> Operand:
    """Whole copies along axes, by a new axis before each."""
    shape, counts = type_of(x).shape, tuple(repeats)
    shape = (1,) * (len(counts) - len(shape)) + shape
    counts = (1,) * (len(shape) - len(counts)) + counts
    open_: list[Dim] = []
    wide: list[Dim] = []
    for size, count in zip(shape, counts, strict=True):
        open_ += [1, size] if count != 1 else [size]
        wide += [count, size] if count != 1 else [size]
    return at.viewed(at.expanded(at.viewed(x, open_), wide), at.shape)


@aten("repeat_interleave.self_int")
def repeat_interleave(at: Tracer, x: Operand, repeats: Dim, dim: int | None = None, **_: object) -> Operand:
    """Each element repeated in place, by a new axis after."""
    if dim is None:
        x, dim = at.viewed(x, (product(type_of(x).shape),)), 0
    shape = type_of(x).shape
    axis = positive(dim, len(shape))
    wide = at.expand(at.reshape(x, shape=(*shape[:axis + 1], 1, *shape[axis + 1:])),
                     shape=(*shape[:axis + 1], repeats, *shape[axis + 1:]))
    return at.reshape(wide, shape=at.shape)


@aten("cat", "concat", "concatenate")
def cat(at: Tracer, tensors: Sequence[Operand], dim: int = 0) -> Operand:
    """Joined along an axis."""
    kept = [x for x in tensors if type_of(x).shape != (0,) or len(at.shape) == 1]
    return kept[0] if len(kept) == 1 else at.cat(*kept, dim=positive(dim, len(at.shape)))


@aten("stack")
def stack(at: Tracer, tensors: Sequence[Operand], dim: int = 0) -> Operand:
    """Joined along a new axis."""
    axis = positive(dim, len(at.shape))
    shape = (*at.shape[:axis], 1, *at.shape[axis + 1:])
    rows = [at.reshape(x, shape=shape) for x in tensors]
    return rows[0] if len(rows) == 1 else at.cat(*rows, dim=axis)


def cut(at: Tracer, x: Operand, dim: int, start: Dim, stop: Dim) -> Operand:
    """A slice of step 1; x itself where it is everything."""
    axis = positive(dim, type_of(x).rank)
    whole = start == 0 and stop == type_of(x).shape[axis]
    return x if whole else at.slice(x, dim=axis, start=start, stop=stop)


def cuts(at: Tracer, x: Operand, sizes: Sizes, dim: int) -> tuple[Operand, ...]:
    """Consecutive slices of the given sizes."""
    found: list[Operand] = []
    start: Dim = 0
    for size in sizes:
        found.append(cut(at, x, dim, start, start + size))
        start = start + size
    return tuple(found)


@aten("split", "split_with_sizes", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit", "split_copy",
      "split_with_sizes_copy", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes")
def split(at: Tracer, x: Operand, parts: object, dim: int = 0, **_: object) -> tuple[Operand, ...]:
    """Consecutive slices, of the sizes the exporter found."""
    if at.target.startswith(("hsplit", "vsplit", "dsplit")):
        dim = {"h": min(1, type_of(x).rank - 1), "v": 0, "d": 2}[at.target[0]]
    return cuts(at, x, [one.shape[dim] for one in at.expected if one is not None], dim)


@aten("unbind", "unbind_copy")
def unbind(at: Tracer, x: Operand, dim: int = 0) -> tuple[Operand, ...]:
    """Every index of an axis."""
    axis = positive(dim, type_of(x).rank)
    return tuple(at.select(x, dim=axis, index=i) for i in range(len(at.expected)))


@aten("select", "select_copy")
def select(at: Tracer, x: Operand, dim: int, index: Dim) -> Operand:
    """One index of an axis, which goes."""
    axis = positive(dim, type_of(x).rank)
    size = type_of(x).shape[axis]
    if isinstance(index, int) and index < 0 and isinstance(size, int):
        index = index + size
    return at.select(x, dim=axis, index=index)


@aten("slice", "slice_copy")
def slice_(at: Tracer, x: Operand, dim: int = 0, start: Dim | None = None, end: Dim | None = None,
           step: int = 1) -> Operand:
    """Elements start, start + step, ... below end; bounds as Python has them."""
    axis = positive(dim, type_of(x).rank)
    first, stop = bounds(type_of(x).shape[axis], start, end, at.shape[axis], step)
    if step == 1:
        return cut(at, x, axis, first, stop)
    return at.slice(x, dim=axis, start=first, stop=stop, step=step)


def bounds(size: Dim, start: Dim | None, end: Dim | None, length: Dim, step: int) -> tuple[Dim, Dim]:
    """A slice's bounds with 0 <= start <= stop <= size, of the length the exporter found."""
    if length == size and step == 1:
        return 0, size
    first: Dim = 0 if start is None else start
    first = size + first if _negative(first) else first
    if isinstance(first, int) and isinstance(size, int):
        first = max(0, min(first, size))
    if step == 1:
        return first, first + length
    stop: Dim = size if end is None or (isinstance(end, int) and end >= WHOLE) else end
    stop = size + stop if _negative(stop) else stop
    stop = minimum(stop, size) if stop != size else size
    return first, max(first, stop) if isinstance(first, int) and isinstance(stop, int) else stop


def _negative(dim: Dim) -> bool:
    """Whether a bound counts from the end: a negative number, or `-T`, `-(T - 1)` of symbols."""
    return dim < 0 if isinstance(dim, int) else all(coefficient < 0 for atoms, coefficient in dim.terms if atoms)


@aten("narrow", "narrow_copy")
def narrow(at: Tracer, x: Operand, dim: int, start: Dim, length: Dim) -> Operand:
    """`length` elements from start on."""
    axis = positive(dim, type_of(x).rank)
    start = type_of(x).shape[axis] + start if _negative(start) else start
    return cut(at, x, axis, start, start + length)


@aten("slice_scatter")
def slice_scatter(at: Tracer, x: Operand, source: Operand, dim: int = 0, start: Dim | None = None,
                  end: Dim | None = None, step: int = 1) -> Operand:
    """x with a slice replaced by the source."""
    axis = positive(dim, type_of(x).rank)
    size, length = type_of(x).shape[axis], type_of(source).shape[axis]
    first, stop = bounds(size, start, end, length, step)
    source = at.converted(source, type_of(x).dtype)
    if step != 1:
        positions = at.arange(start=first, stop=stop, step=step)
        return at.index_put(x, source, positions, dims=(axis,))
    parts = [cut(at, x, axis, 0, first)] if first != 0 else []
    parts += [source]
    parts += [cut(at, x, axis, stop, size)] if stop != size else []
    return parts[0] if len(parts) == 1 else at.cat(*parts, dim=axis)


@aten("select_scatter")
def select_scatter(at: Tracer, x: Operand, source: Operand, dim: int, index: Dim) -> Operand:
    """x with one index of an axis replaced by the source."""
    shape = type_of(x).shape
    axis = positive(dim, len(shape))
    index = shape[axis] + index if _negative(index) else index
    row = at.reshape(source, shape=(*shape[:axis], 1, *shape[axis + 1:]))
    return slice_scatter(at, x, row, axis, index, index + 1)


@aten("flip", "fliplr", "flipud")
def flip(at: Tracer, x: Operand, dims: Sequence[int] = ()) -> Operand:
    """Order reversed along axes."""
    chosen = (1,) if "lr" in at.target else (0,) if "ud" in at.target else dims
    return at.flip(x, dims=tuple(positive(d, type_of(x).rank) for d in chosen))


@aten("roll")
def roll(at: Tracer, x: Operand, shifts: Dim | Sizes, dims: Sequence[int] = ()) -> Operand:
    """Elements shifted along axes, or along the flattened tensor."""
    moves = (shifts,) if isinstance(shifts, int | Sym) else tuple(shifts)
    if not dims:
        flat = at.viewed(x, (product(type_of(x).shape),))
        return at.viewed(at.roll(flat, shifts=moves, dims=(0,)), at.shape)
    return at.roll(x, shifts=moves, dims=tuple(positive(d, type_of(x).rank) for d in listed(dims)))


@aten("tril", "triu")
def triangle(at: Tracer, x: Operand, diagonal: Dim = 0) -> Operand:
    """Zeros above or below a diagonal."""
    return at.triangle(x, diagonal=diagonal, upper=at.target.startswith("triu"))


# --- padding -----------------------------------------------------------------------------------------

@aten("constant_pad_nd")
def constant_pad(at: Tracer, x: Operand, pad: Sizes, value: float = 0) -> Operand:
    """A number put around, last axis first in `pad`; negative pads crop."""
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)][::-1]
    if all(pair == (0, 0) for pair in pairs):
        return x
    rest = type_of(x).rank - len(pairs)
    return at.pad(x, pads=(*((0, 0),) * rest, *pairs), value=float(value))


@aten("pad")
def pad_any(at: Tracer, x: Operand, pad: Sizes, mode: str = "constant", value: float | None = None) -> Operand:
    """Padding by a number, by reflection, by the edge, or around."""
    if mode == "constant":
        return constant_pad(at, x, pad, value or 0.0)
    return _pad_by_index(at, x, pad, mode)


@aten("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
      "replication_pad3d")
def pad_named(at: Tracer, x: Operand, padding: Sizes) -> Operand:
    """Padding by reflection or by the edge."""
    return _pad_by_index(at, x, padding, "reflect" if at.target.startswith("reflection") else "replicate")


def _pad_by_index(at: Tracer, x: Operand, pad: Sizes, mode: str) -> Operand:
    """Take by computed positions, axis by axis: reflected at both ends, clamped, or modulo the size."""
    rank = type_of(x).rank
    for i in range(0, len(pad), 2):
        before, after = pad[i], pad[i + 1]
        axis = rank - 1 - i // 2
        size = type_of(x).shape[axis]
        if (before, after) == (0, 0):
            continue
        place = at.arange(start=0 - before, stop=size + after)
        if mode == "reflect":
            place = at.sub(size - 1, at.abs(at.sub(size - 1, at.abs(place))))
        elif mode == "replicate":
            place = at.minimum(at.maximum(place, 0), size - 1)
        else:
            place = at.remainder(place, size)
        x = at.take(x, place, dim=axis)
    return x


# --- windows and shuffles ----------------------------------------------------------------------------

@aten("unfold", "unfold_copy")
def unfold(at: Tracer, x: Operand, dimension: int, size: int, step: int) -> Operand:
    """Windows along an axis; the content of each becomes the last axis."""
    rank = type_of(x).rank
    if rank == 0:
        return at.viewed(x, at.shape)
    axis = positive(dimension, rank)
    windows = at.take(x, _windows(at, at.shape[axis], size, step, 1), dim=axis)
    return at.permuted(windows, [d for d in range(rank + 1) if d != axis + 1] + [axis + 1])


def _windows(at: Tracer, count: Dim, size: int, step: int, dilation: int) -> Operand:
    """Positions in windows: [count, size]."""
    starts = at.reshape(at.mul(at.arange(stop=count), step), shape=(count, 1))
    return at.add(starts, at.arange(stop=size * dilation, step=dilation))


@aten("im2col")
def im2col(at: Tracer, x: Operand, kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
           stride: Sequence[int]) -> Operand:
    """Sliding blocks of a picture as columns."""
    single = type_of(x).rank == 3
    x = at.reshape(x, shape=(1, *type_of(x).shape)) if single else x
    if any(padding):
        x = at.pad(x, pads=((0, 0), (0, 0), *((p, p) for p in padding)))
    batch, channels, height, width = type_of(x).shape
    down, across = ((size - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
                    for i, size in enumerate((height, width)))
    x = at.take(x, _windows(at, across, kernel_size[1], stride[1], dilation[1]), dim=3)
    x = at.take(x, _windows(at, down, kernel_size[0], stride[0], dilation[0]), dim=2)
    x = at.permute(x, dims=(0, 1, 3, 5, 2, 4))
    x = at.reshape(x, shape=(batch, channels * kernel_size[0] * kernel_size[1], down * across))
    return at.viewed(x, at.shape)


@aten("col2im")
def col2im(at: Tracer, x: Operand, output_size: Sizes, kernel_size: Sequence[int], dilation: Sequence[int],
           padding: Sequence[int], stride: Sequence[int]) -> Operand:
    """Columns added up as the sliding blocks of a picture: a transposed convolution that puts each number in place."""
    single = type_of(x).rank == 2
    batch, rows, _ = (1, *type_of(x).shape) if single else type_of(x).shape
    elements = kernel_size[0] * kernel_size[1]
    counts = [(output_size[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
              for i in range(2)]
    spare = tuple(output_size[i] - ((counts[i] - 1) * stride[i] - 2 * padding[i]
                                    + dilation[i] * (kernel_size[i] - 1) + 1) for i in range(2))
    own = at.eq(at.reshape(at.arange(stop=elements), shape=(elements, 1)), at.arange(stop=elements))
    weight = at.reshape(at.cast(own, dtype=type_of(x).dtype), shape=(elements, 1, *kernel_size))
    blocks = at.reshape(x, shape=(batch * (rows // elements), elements, *counts))
    y = at.conv_transpose2d(blocks, weight, stride=tuple(stride), padding=tuple(padding), output_padding=spare,
                            dilation=tuple(dilation))
    return at.viewed(y, at.shape)


@aten("pixel_shuffle")
def pixel_shuffle(at: Tracer, x: Operand, upscale_factor: int) -> Operand:
    """Channels laid out as finer pixels."""
    *lead, channels, height, width = type_of(x).shape
    r, n = upscale_factor, len(lead)
    x = at.reshape(x, shape=(*lead, channels // (r * r), r, r, height, width))
    x = at.permute(x, dims=(*range(n), n, n + 3, n + 1, n + 4, n + 2))
    return at.reshape(x, shape=at.shape)


@aten("pixel_unshuffle")
def pixel_unshuffle(at: Tracer, x: Operand, downscale_factor: int) -> Operand:
    """Pixels of a block laid out as channels."""
    *lead, channels, height, width = type_of(x).shape
    r, n = downscale_factor, len(lead)
    x = at.reshape(x, shape=(*lead, channels, height // r, r, width // r, r))
    x = at.permute(x, dims=(*range(n), n, n + 2, n + 4, n + 1, n + 3))
    return at.reshape(x, shape=at.shape)


@aten("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(at: Tracer, x: Operand, groups: int) -> Operand:
    """Channels of the groups interleaved."""
    batch, channels, *rest = type_of(x).shape
    x = at.reshape(x, shape=(batch, groups, channels // groups, *rest))
    x = at.permute(x, dims=(0, 2, 1, *range(3, 3 + len(rest))))
    return at.reshape(x, shape=at.shape)


@aten("diag_embed")
def diag_embed(at: Tracer, x: Operand, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Operand:
    """The last axis laid on the diagonal of two new axes."""
    size = type_of(x).shape[-1]
    if offset or (dim1, dim2) != (-2, -1):
        raise at.unsupported("only the main diagonal of the last two axes")
    row = at.reshape(at.arange(stop=size), shape=(size, 1))
    return at.where(at.eq(row, at.arange(stop=size)), at.reshape(x, shape=(*type_of(x).shape, 1)), 0.0)


UNSUPPORTED.update(dict.fromkeys(("repeat_interleave.Tensor", "repeat_interleave.self_Tensor"),
                                 "the size depends on the data: repeat by a plain number"))
UNSUPPORTED["as_strided"] = "strides are not part of the IR: use views, slices, unfold or flip"
