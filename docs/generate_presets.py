"""Write the table of presets of `rules.md`: `python docs/generate_presets.py`; a test checks that it is current."""

from __future__ import annotations

from pathlib import Path

from dlbc.presets import PRESETS, find

PAGE = Path(__file__).parent / "rules.md"
BEGIN, END = "<!-- presets: begin (python docs/generate_presets.py) -->", "<!-- presets: end -->"
COLUMNS = ("linear_map", "sum_of_terms", "activation", "quotient", "product", "norm", "probabilities", "attention",
           "matmul", "einsum", "gate", "recurrent", "mixture", "reduction")
SHARED = {"move": ["move"], "selection": ["select"], "embedding": ["sum"]}


def table() -> str:
    """A row for each preset: its entries by group, and before them those of other selectors."""
    lines = ["| preset | before these | " + " | ".join(f"`{group}`" for group in COLUMNS) + " |",
             "|---|---|" + "---|" * len(COLUMNS)]
    for name, preset in PRESETS.items():
        if preset.plan:
            continue
        by_group: dict[str, list[str]] = {}
        for what, rule in find(name).entries:
            by_group.setdefault(what, []).append(rule)
        assert {group: by_group.pop(group) for group in SHARED} == SHARED
        cells = [", ".join(by_group.pop(group, ["none"])) for group in COLUMNS]
        before = "<br>".join(f"`{what}` {', '.join(rules)}" for what, rules in by_group.items())
        lines.append(f"| `{name}` | {before} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """`rules.md` with a current table."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
