"""Rotary embedding, and the sizes of channels that it turned: rules that look at sizes see pairs, not positions."""

from __future__ import annotations

from dlbc.ir.core import Op, Operand, Value
from dlbc.ir.ops import attr
from dlbc.passes.rotations import Turned, cuts
from dlbc.passes.rules import Contributions, Expansion, only, rule
from dlbc.passes.rules.linear import exchanged


@rule("rotary", "energy", form="R")
def energy(at: Expansion, op: Op, r: Value) -> Contributions:
    """R_x1 = x1^2 (R_y1 + R_y2) / (x1^2 + x2^2) for each pair of channels that is turned, x2 likewise: what a pair
    gets is shared by what each put into its length, at whatever angle.  This project.
    """
    x, interleaved = at.read(op.operands[0]), bool(attr(op, "interleaved"))
    assert isinstance(x, Value)
    r = at.unbroadcast(r, x.type)
    squares = at.mul(x, x)
    share = at.shared(r, at.add(squares, exchanged(at, squares, interleaved)))
    return only(op, 0, at.mul(squares, at.add(share, exchanged(at, share, interleaved))))


def sizes(at: Expansion, x: Operand, of: Operand) -> Value:
    """|x|; for channels that rotary embedding turned, the root mean square of the pair. x has the channels of `of`."""
    assert isinstance(x, Value)
    turned, width = at.facts.rotations.get(getattr(of, "name", ""), ()), x.type.shape[-1]
    if not turned or not isinstance(width, int):
        return at.abs(x)
    pieces = [_lengths(at, piece, how) if how else at.abs(piece)
              for start, stop, how in cuts(turned, width)
              for piece in [x if (start, stop) == (0, width) else at.slice_(x, dim=-1, start=start, stop=stop)]]
    return pieces[0] if len(pieces) == 1 else at.cat(*pieces, dim=-1)


def _lengths(at: Expansion, x: Value, how: Turned) -> Value:
    squares = at.mul(x, x)
    return at.sqrt(at.mul(at.add(squares, exchanged(at, squares, how.interleaved)), 0.5))
