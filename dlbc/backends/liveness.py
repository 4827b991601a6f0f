"""Which values an op is the last to read, and which buffers it may therefore overwrite."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence

from dlbc.ir.core import Kernel, Op, Value, Weight, values
from dlbc.ir.ops import OPS

KERNEL = "kernel"
"""The name of the op that stands for a whole kernel (`whole`)."""

VIEWS = frozenset({"reshape", "permute"})
"""Ops whose result may share its operand's buffer and covers it exactly once."""

FRESH = frozenset({
    *(name for name, op in OPS.items() if op.elementwise), "linear", "matmul", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "embedding", "rotary", "softmax", "log_softmax",
    "sum", "mean", "amax", "amin", "any", "all", "layer_norm", "rms_norm", "group_norm", "batch_norm",
    "attention", "attention_weights", "max_pool_adjoint", "slice_adjoint", "select_adjoint", "cat", "gather",
    "scatter_add", "take_adjoint", "index_adjoint",
}) - {"cast", "floor", "ceil", "round"}
"""Ops whose result is a new buffer that nothing else shares and that has each element once."""

COMMUTATIVE = frozenset({"add", "mul"})


def inputs_of(kernel: Kernel) -> tuple[Value | Weight, ...]:
    """What a kernel reads from outside, each once, in the order of reading."""
    inside = {result.name for op in kernel.body for result in op.results}
    return tuple(dict.fromkeys(o for op in kernel.body for o in op.inputs
                               if isinstance(o, Weight) or (isinstance(o, Value) and o.name not in inside)))


def whole(kernel: Kernel) -> Op:
    """A kernel as one op: what it reads from outside, and what it computes for others.

    `shared`: the results that, op by op, may lie in a buffer of something else, such as a view of a weight.
    """
    place = next((op.place for op in kernel.body if op.place), "")
    seen = {value.name for op in kernel.body if op.name not in FRESH for value in (*values(op.inputs), *op.results)}
    shared = tuple(result.name for result in kernel.results if result.name in seen)
    return Op(KERNEL, inputs_of(kernel), kernel.results, {"shared": shared}, place)


def deaths(ops: Sequence[Op], keep: Collection[str], own: Collection[str]) -> list[list[str]]:
    """For each op, the values of `own` and of the ops themselves that nothing after it reads."""
    last: dict[str, int] = {}
    for number, op in enumerate(ops):
        last |= {v.name: number for v in (*values(op.inputs), *op.results)}
    known = {*own, *(r.name for op in ops for r in op.results)}
    dying: list[list[str]] = [[] for _ in ops]
    for name, number in last.items():
        if name in known and name not in keep:
            dying[number].append(name)
    return dying


def reusable(ops: Sequence[Op], dying: Sequence[Iterable[str]], keep: Container[str],
             able: Mapping[str, object]) -> dict[int, int]:
    """The ops (by number) that may write their result over an operand (by position).

    The operand is of the result's type, dies here, and shares its buffer with no value that is read
    here or later, kept, or not made by these ops.
    """
    buffer: dict[str, str] = {}  # value -> the value that its buffer was made for
    sharers: dict[str, set[str]] = {}  # that value -> the living values in its buffer
    found: dict[int, int] = {}
    for number, op in enumerate(ops):
        if op.name in able:
            for position, operand in enumerate(op.operands[:2 if op.name in COMMUTATIVE else 1]):
                if isinstance(operand, Value) and _free(op, operand, dying[number], keep, buffer, sharers):
                    found[number] = position
                    break
        _record(op, found.get(number), buffer, sharers)
        for name in dying[number]:
            if name in buffer:
                sharers[buffer[name]].discard(name)
    return found


def _free(op: Op, operand: Value, dying: Iterable[str], keep: Container[str], buffer: Mapping[str, str],
          sharers: Mapping[str, set[str]]) -> bool:
    if operand.name not in buffer or operand.name not in dying or operand.name in keep:
        return False
    return operand.type == op.result.type and operand.type.rank > 0 and sharers[buffer[operand.name]] == {
        operand.name}


def _record(op: Op, reused: int | None, buffer: dict[str, str], sharers: dict[str, set[str]]) -> None:
    """Note which buffer the results of an op are in; a buffer that escapes our sight is given up."""
    inputs = [v.name for v in values(op.inputs) if v.name in buffer]
    if reused is not None:
        operand = op.operands[reused]
        assert isinstance(operand, Value)
        _join(op.result.name, buffer[operand.name], buffer, sharers)
    elif op.name in VIEWS:
        for name in inputs[:1]:
            _join(op.result.name, buffer[name], buffer, sharers)
    elif op.name == KERNEL:
        shared = op.attrs["shared"]
        assert isinstance(shared, tuple)
        for result in op.results:
            if result.type.rank and result.name not in shared:
                _join(result.name, result.name, buffer, sharers)
    elif op.name in FRESH:
        if op.result.type.rank:
            _join(op.result.name, op.result.name, buffer, sharers)
    else:  # the results may be views of the operands: their buffers are not ours to overwrite any more
        for name in inputs:
            sharers[buffer[name]].add("")


def _join(name: str, owner: str, buffer: dict[str, str], sharers: dict[str, set[str]]) -> None:
    buffer[name] = owner
    sharers.setdefault(owner, set()).add(name)
