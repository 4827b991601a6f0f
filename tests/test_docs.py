"""The documentation says what is true: its programs run, its links lead somewhere, its tables are the code's."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dlbc.backends
import dlbc.ir.ops
import dlbc.passes
from dlbc.passes.rules import load_rules
from dlbc.presets import PRESETS
from dlbc.selectors import GROUPS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


# --- programs ----------------------------------------------------------------------------------------

def blocks(page: Path) -> list[tuple[int, str]]:
    """The line before, and the source, of every block marked `python` and nothing else."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(2)), found[2])
            for found in FENCE.finditer(text) if found[1].strip() == "python"]


@pytest.fixture
def registries() -> Iterator[None]:
    """What pages register (a rule, a pass) is gone afterwards."""
    dlbc.passes.load_all()
    tables: list[dict[Any, Any]] = [load_rules(), dlbc.passes.PASSES, dlbc.ir.ops.OPS, dlbc.backends.BACKENDS]
    before = [dict(table) for table in tables]
    yield
    for table, held in zip(tables, before, strict=True):
        table.clear()
        table.update(held)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_programs_run(page: Path, registries: None, caplog: pytest.LogCaptureFixture) -> None:
    """The blocks of a page run in order in one namespace, and nothing is warned of."""
    caplog.set_level(logging.WARNING)
    namespace: dict[str, Any] = {"__name__": "docs"}
    with contextlib.redirect_stdout(io.StringIO()):
        for line, source in blocks(page):
            exec(compile("\n" * line + source, str(page), "exec", dont_inherit=True), namespace)
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("dlbc")]


def test_blocks_say_what_they_are() -> None:
    for page in PAGES:
        kinds = {found[1].strip() for found in FENCE.finditer(page.read_text(encoding="utf-8"))}
        assert kinds <= {"", "python", "python no-run"}, name_of(page)


# --- links -------------------------------------------------------------------------------------------

def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)} links to {target}"
        assert there.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)} links to {target}"


def test_every_page_is_on_the_map() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index] == []


def test_files_that_are_named_exist() -> None:
    """Paths of the repository in backticks; those with a pattern in them, and the examples' own, apart."""
    folders = "dlbc|runtime|tests|docs|benchmarks|examples|requirements"
    for page in LINKED:
        for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", prose(page)):
            assert (ROOT / path).exists() or "fold_negation" in path, f"{name_of(page)} names {path}"


# --- rules and presets -------------------------------------------------------------------------------

def rows(text: str) -> list[list[str]]:
    """The cells of every row of the tables in a text, without the lines under the headings."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not re.match(r"\|[-|]+\|$", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


RULES_PAGE = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")


def test_all_rules_are_documented_and_no_others() -> None:
    """Per op and rule: the form it carries and whether it conserves."""
    section = RULES_PAGE.partition("<!-- rules -->")[2].partition("## Laws")[0]
    documented = {}
    for operations, rule, form, conserves, *_ in rows(section):
        if operations == "operations":
            continue
        for what in named(operations):
            for op in GROUPS.get(what, (what,)):
                documented[op, *named(rule)] = (form, conserves == "yes")
    defined = {key: (found.form, found.conserves) for key, found in load_rules().items()}
    assert documented == defined


def test_the_table_of_presets_is_that_of_the_code() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate_presets.py"))
    assert script["page"](RULES_PAGE) == RULES_PAGE, "run `python docs/generate_presets.py`"


def test_the_readme_has_every_preset() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Rules")[2].partition("\n## ")[0]
    assert {name for row in rows(section)[1:] for name in named(row[0])} == set(PRESETS)


# --- passes, costs -----------------------------------------------------------------------------------

def test_every_pass_is_mentioned() -> None:
    dlbc.passes.load_all()
    section = (ROOT / "docs" / "ir.md").read_text(encoding="utf-8").partition("## The passes")[2].partition("\n## ")[0]
    assert {named(row[0])[0] for row in rows(section)[1:]} == set(dlbc.passes.PASSES)


def test_the_table_of_costs_is_what_was_measured() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script["page"](text, script["measured"]()) == text, "run `python benchmarks/tables.py`"


@pytest.mark.parametrize("name", ["products", "cost_compiled", "budget", "experts", "small"])
def test_tables_in_the_docs_are_what_was_measured(name: str) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))
    shown = script["PAGE"].read_text(encoding="utf-8").partition(script["BEGIN"] + "\n")[2].partition(script["END"])[0]
    rows = script["kept"](name)["rows"]
    assert rows and shown == script["table"](rows), f"run `python benchmarks/{name}.py --table`"


def test_the_table_of_costs() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    numbers = {"median": 1.2, "min": 1.1, "max": 1.456, "memory ratio": 1.3, "target": 1.5}
    measured = {"machine": {"cpu": "A processor", "threads": 2, "python": "3.11", "torch": "2.13"},
                "rows": [{"model": "net", "case": case, **numbers} for case in ("forward + gradient", "dlb")]}
    table = script["table"](measured)
    assert "| net | `dlb` | 1.20 (1.10 to 1.46) | 1.50 | 1.30 |" in table
    assert "`forward + gradient`" not in table and "A processor, 2 threads" in table
    text = f"before\n{script['BEGIN']}\nold\n{script['END']}\nafter\n"
    assert script["page"](text, measured) == f"before\n{script['BEGIN']}\n{table}{script['END']}\nafter\n"
