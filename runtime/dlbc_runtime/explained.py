"""The small records of an explanation: what was explained, how, and one element's relevance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload


@dataclass(frozen=True)
class Explained:
    """What was explained in one batch row: one number of one output.

    `index` is the class or token, None for an output that has only one number; `against` the one it was
    compared with, for a difference; `position` the place in the sequence. `value` is the number itself,
    `probability` its softmax where the output is one of logits. `text` replaces the description made from
    these, for targets that are no single number.
    """

    row: int = 0
    seed: int = 0
    output: str = ""
    index: int | None = None
    against: int | None = None
    position: int | None = None
    value: float | None = None
    probability: float | None = None
    label: str | None = None
    against_label: str | None = None
    text: str = ""

    @property
    def name(self) -> str:
        """The label where there is one, in quotes, otherwise the index: `' Paris'`, `logits[3]`."""
        label, against = (text if text is None else repr(text) for text in (self.label, self.against_label))
        return self._name(label, against)

    @property
    def plain_name(self) -> str:
        """The name for a heading, where labels need no quotes: `Paris`."""
        label, against = ((text if text is None else text.strip() or repr(text))
                          for text in (self.label, self.against_label))
        return self._name(label, against)

    def _name(self, label: str | None, against: str | None) -> str:
        name = self.text or label or self._indexed(self.index)
        return name if self.against is None else f"{name} rather than {against or self._indexed(self.against)}"

    def _indexed(self, index: int | None) -> str:
        output = self.output or "output"
        return output if index is None else f"{output}[{index}]"

    def __str__(self) -> str:
        value = "" if self.value is None else f" (value {self.value:.4g})"
        likely = value if self.probability is None else f" (p={self.probability:.2f})"
        return self.name + likely + ("" if self.position is None else f" at position {self.position}")


class Meaning(Sequence[Explained]):
    """What was explained, row by row, worked out when it is first asked for: probabilities and names cost more than
    the relevance of a small model, and not everybody reads them."""

    def __init__(self, *sources: Callable[[], Sequence[Explained]]) -> None:
        self._sources = sources
        self._found: tuple[Explained, ...] | None = None

    def _all(self) -> tuple[Explained, ...]:
        if self._found is None:
            self._found = tuple(one for source in self._sources for one in source())
        return self._found

    @overload
    def __getitem__(self, index: int) -> Explained: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Explained, ...]: ...
    def __getitem__(self, index: int | slice) -> Explained | tuple[Explained, ...]:
        return self._all()[index]

    def __iter__(self) -> Iterator[Explained]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._all() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return repr(self._all())


@dataclass(frozen=True)
class Method:
    """How an explanation was made: model, backend, the seed's multiplier, seconds by stage, versions, what the
    relevance was multiplied with afterwards, and the reference that inputs were compared with ("": none)."""

    model: str = ""
    backend: str = ""
    multiplier: float = 1.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    scaler: float = 1.0
    reference: str = ""

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Method:
        """One of all of its fields, in a dict that nobody else has."""
        found = object.__new__(cls)
        object.__setattr__(found, "__dict__", fields)
        return found


@dataclass(frozen=True)
class Attribution:
    """One element of an input and its relevance; `index` is its place within the batch row."""

    row: int
    input: str
    index: tuple[int, ...]
    name: str
    relevance: float
    seed: int = 0
