"""Which ops may be part of a generated kernel, by what they ask of one.

The `fuse` pass groups by these sets, backends that write kernels have code for all of them (a test holds them to it).
What is in none of them stands outside of kernels, and is the array library's.
"""

from __future__ import annotations

from dlbc.ir.core import Op, Operand, Type, Value, Weight
from dlbc.ir.ops import attr, axes

ELEMENTS = frozenset({"f32", "f16", "bf16", "i64", "i32", "bool"})
"""Element types of values in kernels."""

POINTWISE = frozenset({
    "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "tanh", "erf", "sigmoid",
    "log_sigmoid", "silu", "mish", "hardswish", "hardsigmoid", "softsign", "neg", "abs", "sign", "relu", "floor",
    "ceil", "negative_part", "logical_not", "isnan", "isinf", "gelu", "softplus", "elu", "leaky_relu", "clamp",
    "cast", "stabilise", "damp", "relu_adjoint", "add", "sub", "mul", "pow", "maximum", "minimum", "div", "safe_div",
    "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "where", "glu",
})
"""An element of the result is made of the elements of the operands at its own place."""

MOVES = frozenset({"reshape", "permute", "expand", "slice", "select", "cat", "slice_adjoint", "select_adjoint", "full",
                   "rotary"})
"""An element of the result is made of elements of the operands at places that follow from its own."""

VIEWS = frozenset({"reshape", "permute", "expand", "slice", "select"})
"""Moves that an array library does without touching memory, as a rule."""

CHEAP = frozenset({"abs", "neg", "relu", "negative_part", "cast"})
"""Pointwise ops of one operand that are rather computed again by each reader than written to memory."""

ROWWISE = frozenset({"softmax", "log_softmax", "layer_norm", "rms_norm", "row_statistics", "sum", "mean", "amax",
                     "amin", "logsumexp"})
"""Ops that take the last axis together."""

PRODUCTS = frozenset({"linear", "matmul", "grouped_linear"})
"""Products of rows with a matrix, or each with the matrix of its expert."""

LOOP_ELEMENTS = frozenset({"f32", "f64", "i64", "i32", "bool"})
"""Element types of values in loops on a CPU."""

LOOP_POINTWISE = POINTWISE | {"round", "atan", "threshold"}
"""Pointwise ops that loops have code for."""

LOOP_MOVES = MOVES | {"roll", "flip", "triangle", "arange"}
"""Moves that loops have code for."""

LOOP_SUMS = frozenset({"sum", "prod", "amax", "amin", "any", "all", "mean", "var", "logsumexp", "softmax",
                       "log_softmax", "layer_norm", "rms_norm", "row_statistics", "batch_norm"})
"""Ops of whole rows that loops have code for, along any axes."""

LOOP_PRODUCTS = frozenset({"linear", "matmul"})
"""Products that loops have code for."""

SMALL = 2**15
"""Elements of a matrix, at most, for its products to be loops: larger ones are the array library's."""

EXPERTS = 4096
"""Experts of a product, at most: each program reads how many rows all of them have."""

LONGEST = 16384
"""Elements of a last axis that one program takes at once."""

POWERS = (2, 3, 4, -1, -2, 0.5, -0.5)
"""Exponents that are written out."""


def fits(op: Op) -> bool:
    """Whether all that a pointwise op or a move reads and makes has an element type for kernels, and its attributes
    are among those that kernels have code for."""
    if op.name not in POINTWISE and op.name not in MOVES:
        return False
    types = [o.type for o in op.operands if isinstance(o, Value | Weight)]
    if any(t.dtype not in ELEMENTS for t in (*types, *(r.type for r in op.results))):
        return False
    return _attributes(op)


def _attributes(op: Op) -> bool:
    """What is not obvious about attributes and operands."""
    match op.name:
        case "pow":
            return not isinstance(op.operands[1], Value | Weight) and op.operands[1] in POWERS and _floats(op)
        case "rotary":
            cos = op.operands[1]
            assert isinstance(cos, Value | Weight)
            return not attr(op, "interleaved") and cos.type.shape[-1:] == op.result.type.shape[-1:]
        case "slice" | "slice_adjoint":
            return attr(op, "step") == 1
        case "where":
            return isinstance(op.operands[0], Value | Weight)
        case "add" | "sub" | "mul" | "maximum" | "minimum" | "neg" | "abs":
            return op.result.type.dtype != "bool"
        case "cast" | "full" | "reshape" | "permute" | "expand" | "select" | "cat" | "select_adjoint":
            return True
        case "eq" | "ne" | "lt" | "le" | "gt" | "ge" | "logical_and" | "logical_or" | "logical_xor" | "logical_not":
            return isinstance(op.operands[0], Value | Weight)
    return _floats(op)


def _floats(op: Op) -> bool:
    return op.result.type.floating or op.result.type.dtype == "bool"


def is_row(op: Op) -> bool:
    """Whether an op takes floating numbers along the last axis, of a length that is known and not too long."""
    if op.name not in ROWWISE or not op.operands or not isinstance(op.operands[0], Value | Weight):
        return False
    x = op.operands[0].type
    types = [o.type for o in op.operands if isinstance(o, Value | Weight)] + [r.type for r in op.results]
    if not x.rank or not all(t.floating and t.dtype in ELEMENTS for t in types):
        return False
    if not isinstance(x.shape[-1], int) or not 1 < x.shape[-1] <= LONGEST:
        return False
    return taken(op, x) == (x.rank - 1,)


def taken(op: Op, x: Type) -> tuple[int, ...]:
    """The axes of its operand that an op of `ROWWISE` takes together."""
    if op.name in ("softmax", "log_softmax"):
        return axes(x.rank, attr(op, "dim"))
    dims = attr(op, "dims")
    if op.name in ("layer_norm", "rms_norm", "row_statistics"):
        assert isinstance(dims, int)
        return tuple(range(x.rank - dims, x.rank))
    return axes(x.rank, dims)


def factors(op: Op) -> tuple[Operand, Operand]:
    """What a product multiplies: rows, and the matrix (or the experts' matrices)."""
    return op.operands[0], op.operands[2 if op.name == "grouped_linear" else 1]


def template_of(op: Op) -> str:
    """The template of kernels of a product."""
    return "grouped" if op.name == "grouped_linear" else "gemm"


def is_product(op: Op) -> bool:
    """Whether an op is rows times a matrix (`x W^T` or `x W`), of sizes that are known, except for the rows."""
    if op.name not in PRODUCTS or any(not isinstance(o, Value | Weight) for o in factors(op)):
        return False
    x, matrix = (o.type for o in factors(op) if isinstance(o, Value | Weight))
    if op.name == "grouped_linear" and not (isinstance(matrix.shape[0], int) and matrix.shape[0] <= EXPERTS):
        return False
    return (matrix.rank == (3 if op.name == "grouped_linear" else 2) and x.rank >= 2
            and all(isinstance(n, int) for n in matrix.shape)
            and all(t.floating and t.dtype in ELEMENTS for t in (x, matrix, op.result.type)))


def loops(op: Op) -> bool:
    """Whether an op may be part of loops on a CPU."""
    operands = [o for o in op.operands if o is not None]
    types = [o.type for o in operands if isinstance(o, Value | Weight)] + [r.type for r in op.results]
    if any(t.dtype not in LOOP_ELEMENTS for t in types):
        return False
    tensors = types[:len(types) - len(op.results)]
    if op.name in LOOP_PRODUCTS:
        matrix = tensors[1] if len(tensors) > 1 else None
        return matrix is not None and matrix.rank == 2 and _small(matrix) and all(t.floating for t in types) and (
            op.name == "linear" or tensors[0].rank >= 2)
    if op.name in LOOP_SUMS:
        return bool(tensors) and (op.name in ("sum", "any", "all") or all(t.floating for t in tensors))
    if op.name in LOOP_MOVES:
        step = attr(op, "step") if op.name in ("slice", "slice_adjoint") else 1
        return step == 1 and not (op.name == "rotary" and not _attributes(op))
    return op.name in LOOP_POINTWISE and _looped(op)


def _looped(op: Op) -> bool:
    """What is not obvious about a pointwise op's operands."""
    return any(isinstance(o, Value | Weight) for o in op.operands) and (
        _floats(op) if op.name == "pow" else _attributes(op))


def _small(matrix: Type) -> bool:
    rows, columns = matrix.shape
    return isinstance(rows, int) and isinstance(columns, int) and rows * columns <= SMALL
