"""The conservation table: where the relevance of an explanation went, operation by operation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dlbc_runtime.arrays import Json

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LedgerRow:
    """One operation: relevance in, relevance passed on to its operands, and what it absorbed, by cause."""

    place: str
    op: str
    incoming: float
    outgoing: float
    absorbed: Mapping[str, float] = field(default_factory=dict)
    rule: str = ""

    @property
    def residual(self) -> float:
        """What no cause accounts for: in - out - absorbed. Zero up to rounding."""
        return self.incoming - self.outgoing - math.fsum(self.absorbed.values())

    @property
    def size(self) -> float:
        """The largest of the amounts in this row, the scale its rounding is measured on."""
        return max(abs(self.incoming), abs(self.outgoing), *map(abs, self.absorbed.values()), 0.0)

    @property
    def taken(self) -> float:
        """How much was absorbed here, whatever its sign."""
        return math.fsum(map(abs, self.absorbed.values()))

    @property
    def operation(self) -> str:
        """The operation with its rule, as the IR writes it: `linear <epsilon>`."""
        return f"{self.op} <{self.rule}>" if self.rule else self.op

    def __str__(self) -> str:
        absorbed = "".join(f", {amount:.4g} absorbed by {cause}" for cause, amount in self.absorbed.items())
        return (f"{self.place or 'model'}: {self.operation} got {self.incoming:.4g}, passed on {self.outgoing:.4g}"
                f"{absorbed}: {self.residual:.3g} is left over")

    def to_dict(self) -> dict[str, Json]:
        """This row as JSON-able data."""
        return {"place": self.place, "op": self.op, "rule": self.rule, "in": number_to_json(self.incoming),
                "out": number_to_json(self.outgoing), "absorbed": _amounts_to_json(self.absorbed)}


@dataclass(frozen=True)
class Ledger:
    """`seed = at inputs + absorbed`, summed over the batch and over all targets.

    `seed` is the relevance that was put on the outputs, `inputs` what arrived at each input, and `rows` the
    operations in the order relevance passed them. `gross` is the sum of the seed's absolute amounts, where they
    cancel: the seed of a difference of two outputs is 0.
    """

    rows: tuple[LedgerRow, ...]
    seed: float
    inputs: Mapping[str, float]
    gross: float = 0.0

    @property
    def absorbed(self) -> dict[str, float]:
        """All that was absorbed, by cause, the largest first."""
        causes = dict.fromkeys(cause for row in self.rows for cause in row.absorbed)
        totals = {cause: math.fsum(row.absorbed.get(cause, 0.0) for row in self.rows) for cause in causes}
        return dict(sorted(totals.items(), key=lambda item: -abs(item[1])))

    @property
    def at_inputs(self) -> float:
        """Relevance that arrived at the inputs."""
        return math.fsum(self.inputs.values())

    @property
    def residual(self) -> float:
        """What the table does not account for: seed - at inputs - absorbed. Zero up to rounding."""
        return self.seed - self.at_inputs - math.fsum(self.absorbed.values())

    @property
    def size(self) -> float:
        """The scale of the whole table: the seed, net or gross, or all amounts it became where those are larger."""
        parts = [*self.inputs.values(), *self.absorbed.values()]
        return max(abs(self.seed), self.gross, math.fsum(map(abs, parts)))

    def closes(self, tolerance: float = 1e-4) -> bool:
        """Whether the totals and every row balance, up to `tolerance` relative to the amounts in play."""
        balanced = abs(self.residual) <= tolerance * self.size  # False when anything is not a number
        return balanced and not self.leaks(tolerance)

    def leaks(self, tolerance: float = 1e-4) -> tuple[LedgerRow, ...]:
        """The operations that do not balance, the worst first: look here when `closes` says no."""
        found = [row for row in self.rows if not abs(row.residual) <= tolerance * max(row.size, self.size)]
        return tuple(sorted(found, key=lambda row: abs(row.residual) if math.isfinite(row.residual) else math.inf,
                            reverse=True))

    def by_absorbed(self) -> tuple[LedgerRow, ...]:
        """The operations, those that absorbed most first."""
        return tuple(sorted(self.rows, key=lambda row: row.taken if math.isfinite(row.taken) else math.inf,
                            reverse=True))

    def summary(self) -> str:
        """One line: the seed and what became of it."""
        parts = [f"{self.at_inputs:.4g} at the inputs"]
        parts += [f"{amount:.4g} absorbed by {cause}" for cause, amount in self.absorbed.items()]
        return f"seed {self.seed:.4g} = {' + '.join(parts)} (residual {self.residual:.1e})"

    def table(self, *, limit: int | None = 40, by: Literal["order", "absorbed"] = "order") -> Table:
        """A table for the terminal: `limit` operations in order, or those that absorbed most first."""
        from rich.table import Table

        causes = list(self.absorbed)
        rows = self.by_absorbed() if by == "absorbed" else self.rows
        shown = rows if limit is None else rows[:limit]
        table = Table(title="conservation of relevance", title_justify="left", title_style="bold",
                      box=None, pad_edge=False, header_style="dim", footer_style="bold", show_footer=True)
        table.add_column("place", "total", overflow="fold")
        table.add_column("operation", overflow="fold")
        table.add_column("in", _amount(self.seed), justify="right")
        table.add_column("out", _amount(self.at_inputs), justify="right")
        for cause in causes:
            table.add_column(cause, _amount(self.absorbed[cause]), justify="right")
        table.add_column("residual", _rounding(self.residual, self.size), justify="right")
        for row in shown:
            absorbed = (_amount(row.absorbed[cause]) if cause in row.absorbed else "" for cause in causes)
            table.add_row(*map(_plain, (row.place, row.operation, _amount(row.incoming), _amount(row.outgoing),
                                        *absorbed, _rounding(row.residual, row.size))))
        if len(shown) < len(rows):
            table.add_row(f"… {len(rows) - len(shown)} more", style="dim")
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Json]:
        """The table as JSON-able data; `from_dict` reads it back."""
        return {"seed": number_to_json(self.seed), "gross": number_to_json(self.gross),
                "inputs": _amounts_to_json(self.inputs), "rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def from_dict(cls, stored: Json) -> Ledger:
        """The table that `to_dict` wrote. Raises ValueError when it is not one."""
        match stored:
            case {"seed": seed, "inputs": inputs, "rows": list(rows)}:
                gross = stored.get("gross", 0.0) if isinstance(stored, dict) else 0.0
                return cls(tuple(map(_row_from_json, rows)), number_from_json(seed), _amounts_from_json(inputs),
                           number_from_json(gross))
        raise ValueError("a ledger must have seed, inputs and rows")

    @classmethod
    def of(cls, rows: Iterable[LedgerRow], *, seed: float, inputs: Mapping[str, float]) -> Ledger:
        """A table of `rows`, given as any iterable."""
        return cls(tuple(rows), float(seed), {name: float(amount) for name, amount in inputs.items()})


def number_to_json(number: float) -> Json:
    """A float as JSON, which knows no infinity and no NaN: those become text."""
    return float(number) if math.isfinite(number) else str(float(number))


def number_from_json(stored: Json) -> float:
    """The float that `number_to_json` wrote. Raises ValueError when it is not one."""
    if isinstance(stored, bool) or not (isinstance(stored, int | float) or stored in ("nan", "inf", "-inf")):
        raise ValueError(f"{stored!r} is not a number")
    return float(stored)


def _amounts_to_json(amounts: Mapping[str, float]) -> Json:
    return {name: number_to_json(amount) for name, amount in amounts.items()}


def _amounts_from_json(stored: Json) -> dict[str, float]:
    if not isinstance(stored, dict):
        raise ValueError("amounts must be an object of numbers")
    return {name: number_from_json(amount) for name, amount in stored.items()}


def _row_from_json(stored: Json) -> LedgerRow:
    match stored:
        case {"place": str(place), "op": str(op), "in": incoming, "out": outgoing, "absorbed": absorbed,
              "rule": str(rule)}:
            return LedgerRow(place, op, number_from_json(incoming), number_from_json(outgoing),
                             _amounts_from_json(absorbed), rule)
    raise ValueError("a ledger row must have place, op, rule, in, out and absorbed")


def _amount(number: float) -> str:
    return f"{number:.4g}"


def _rounding(residual: float, size: float) -> str:
    return "0" if abs(residual) <= 1e-12 * size else f"{residual:.1e}"


def _plain(text: str) -> str:
    """`text` with rich's markup made harmless."""
    from rich.markup import escape

    return escape(text)


def ledger_of(entries: tuple[tuple[str, ...], ...], totals: list[float], inputs: Mapping[str, float]) -> Ledger:
    """The ledger from the sums that a program returned, named (place, op, value, side or cause, rule)."""
    rows: list[LedgerRow] = []
    seeded = {entry[3]: total for entry, total in zip(entries, totals, strict=True) if entry[1] == "seed"}
    by_op: dict[tuple[str, ...], dict[str, float]] = {}
    for (place, op, value, side, rule), total in zip(entries, totals, strict=True):
        if op == "seed":
            continue
        amounts = by_op.setdefault((place, op, value, rule), {})
        amounts[side] = amounts.get(side, 0.0) + total
    for (place, op, _, rule), amounts in by_op.items():
        rows.append(LedgerRow(place, op, amounts.pop("in", math.fsum(amounts.values())), amounts.pop("out", 0.0),
                              amounts, rule))
    return Ledger(tuple(rows), seeded["seed"], inputs, seeded["gross"])
