"""The text of a graph: it reads back as the same graph, looks as intended, and errors point into it."""

from __future__ import annotations

import io
import math
import os
import runpy
import string
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlbc import opt
from dlbc.errors import IRError
from dlbc.ir.builder import Builder
from dlbc.ir.core import (
    DTYPES,
    Attr,
    Function,
    Graph,
    Kernel,
    Location,
    Op,
    Operand,
    Rule,
    Section,
    Type,
    Value,
    Weight,
)
from dlbc.ir.dims import maximum, symbol
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_attr, print_graph, print_op, print_operand
from dlbc.ir.verifier import verify

ROOT = Path(__file__).parents[1]
B, T = symbol("B"), symbol("T")
X = Value("x", Type("f32", (B, T, 8)))
W = Weight("w", Type("f32", (8, 8)))

# --- any graph reads back ----------------------------------------------------------------------------

BARE = st.text(string.ascii_letters + string.digits + "_.$/@-", min_size=1, max_size=8)
NAMES = st.one_of(BARE, st.text(max_size=8))
SIZES = st.sampled_from([1, 7, B, T, 2 * T + 1, -(T // 2), maximum(B, T // 2), T % 3, (T - 1) % B])
SCALARS = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), SIZES)
ATTRS: st.SearchStrategy[Attr] = st.recursive(st.one_of(SCALARS, st.text(max_size=8)),
                                              lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
KEYS = st.dictionaries(NAMES.filter(lambda name: name != "function"), ATTRS, max_size=3)
TYPES = st.builds(Type, st.sampled_from(DTYPES), st.lists(SIZES, max_size=3).map(tuple))
RULES = st.builds(Rule, NAMES, st.lists(st.tuples(NAMES, ATTRS), max_size=2).map(tuple))


@st.composite
def odd_graphs(draw: st.DrawFn) -> Graph:
    """Graphs of every part and any names, whether or not they mean something."""
    names = iter(draw(st.lists(NAMES, min_size=24, max_size=24, unique=True)))
    weights = {name: Weight(name, draw(TYPES)) for name in draw(st.lists(NAMES, max_size=2, unique=True))}

    def body(values: list[Value], own: list[Weight], length: int) -> list[Op]:
        operand: st.SearchStrategy[Operand] = st.one_of(
            SCALARS, *(st.sampled_from(group) for group in (values, own) if group))
        ops = []
        for _ in range(length):
            results = tuple(Value(next(names), draw(TYPES)) for _ in range(draw(st.integers(1, 2))))
            called = {"function": draw(NAMES)} if draw(st.booleans()) else {}
            ops.append(Op(draw(NAMES), tuple(draw(st.lists(operand, max_size=3))), results,
                          {**called, **draw(KEYS)}, draw(NAMES), draw(st.none() | RULES),
                          tuple(draw(st.lists(operand, max_size=2))), draw(NAMES)))
            values += results
        return ops

    def section(values: list[Value]) -> Section:
        values += (params := [Value(next(names), draw(TYPES))])
        ops = body(values, list(weights.values()), draw(st.integers(0, 2)))
        inner = body(values, list(weights.values()), draw(st.integers(0, 1)))
        kernel = Kernel(draw(NAMES), draw(NAMES), tuple(inner), tuple(op.result for op in inner), draw(KEYS))
        chosen = st.lists(st.sampled_from(values), max_size=3).map(tuple)
        return Section(tuple(params), (*ops, kernel), draw(chosen), draw(chosen))

    own = [Value(next(names), draw(TYPES)), Weight(draw(NAMES), draw(TYPES))]
    inside = body([own[0]], [own[1]], 1)  # type: ignore[list-item]
    function = Function(draw(NAMES), tuple(own), tuple(inside), (inside[-1].result,))
    values: list[Value] = []
    return Graph(draw(NAMES), functions={function.name: function}, weights=weights, prepare=section(values),
                 forward=section(values), relevance=section(values), attrs=draw(KEYS),
                 dims={"B": (1, 8), "T": (1, draw(st.integers(1, 4096)))},
                 locations=draw(st.dictionaries(NAMES, st.builds(Location, NAMES, NAMES), max_size=2)))


@given(graph=odd_graphs())
def test_any_graph_reads_back(graph: Graph) -> None:
    """Compared as `repr`, in which NaN equals itself and 1, 1.0 and True differ."""
    text = print_graph(graph)
    assert repr(parse_graph(text)) == repr(graph)
    assert print_graph(parse_graph(text)) == text


@st.composite
def built_graphs(draw: st.DrawFn) -> Graph:
    """Well-formed graphs of the kind that the frontend builds."""
    at = Builder({"x"})
    values = [X]
    for number in range(draw(st.integers(1, 12))):
        at.place = f"layers.{number}"
        x = draw(st.sampled_from(values))
        match draw(st.sampled_from(["linear", "unary", "binary", "literal", "move", "topk"])):
            case "linear":
                new = at.linear(x, W, result=f"h{number}")
            case "unary":
                new = at.gelu(x, approximate=draw(st.sampled_from(["none", "tanh"])))
            case "binary":
                new = at.add(x, draw(st.sampled_from(values)))
            case "literal":
                new = at.mul(x, draw(st.one_of(st.floats(allow_nan=False), st.integers(), st.just(T + 1))))
            case "move":
                new = at.reshape(at.permute(x, dims=(1, 0, 2)), shape=(B, T, 8))
            case _:
                new = at.expand(at.op("topk", x, k=1)[0], shape=(B, T, 8))
        values.append(new)
    return Graph("built", Section((X,), tuple(at.ops), (values[-1],), tuple(values[1:3])), weights={"w": W},
                 dims={"B": (1, 8), "T": (1, 64)}, attrs={"inputs": ("x",)},
                 locations={op.place: Location("Linear", "net.py:1:2") for op in at.ops})


@given(graph=built_graphs())
def test_built_graphs_read_back_and_verify(graph: Graph) -> None:
    again = parse_graph(print_graph(graph))
    assert again == graph
    verify(again)


@pytest.mark.parametrize(("value", "text"), [
    (1, "1"), (-1, "-1"), (1.0, "1.0"), (1e-05, "1e-05"), (0.1 + 0.2, "0.30000000000000004"), (1e22, "1e+22"),
    (-0.0, "-0.0"), (5e-324, "5e-324"), (math.inf, "inf"), (-math.inf, "-inf"), (math.nan, "nan"), (True, "true"),
    (None, "none"), ("tanh", '"tanh"'), ('a "b"\n', r'"a \"b\"\n"'), ((), "[]"), ((1, (2, "a")), '[1,[2,"a"]]'),
    ((B, T, 8, T // 2), "[B,T,8,T//2]"), (2 * T + 1, "2*T+1"), (maximum(B, T), "max(B,T)"),
], ids=str)
def test_literals(value: Attr, text: str) -> None:
    assert print_attr(value) == text
    graph = parse_graph(f"graph @g {{a={text}}} forward {{ return }}")
    assert repr(graph.attrs["a"]) == repr(value)


def test_a_size_as_operand_stands_in_parentheses_where_it_is_a_sum() -> None:
    assert [print_operand(o) for o in (T, T + 1, T // 2, None, 0.5)] == ["T", "(T+1)", "(T//2)", "none", "0.5"]


def test_names_that_need_quotes() -> None:
    assert [str(print_operand(Value(name, X.type))) for name in ("h.1", "a/b@1-$", "a b", "", "ü")] == [
        "%h.1", "%a/b@1-$", '%"a b"', '%""', r'%"\u00fc"']


@pytest.mark.parametrize(("rule", "text"), [
    (Rule("identity"), "<identity>"), (Rule("epsilon", (("eps", 1e-6),)), "<epsilon(1e-06)>"),
    (Rule("alpha_beta", (("alpha", 2.0), ("beta", 1.0))), "<alpha_beta(2.0, 1.0)>"),
    (Rule("absolute", (("high", 4.0),)), "<absolute(high=4.0)>"), (Rule("mine", (("k", 3),)), "<mine(k=3)>"),
    (Rule("", (("eps", 1e-6),)), "<(1e-06)>"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_rules(rule: Rule, text: str) -> None:
    op = Op("rel.linear", (X,), (Value("y", X.type),), rule=rule)
    assert print_op(op) == f"%y = rel.linear{text}(%x) : f32[B,T,8]"
    parsed = parse_graph(f"graph @g forward(%x : f32[B,T,8]) {{ {print_op(op)} return %y }}")
    assert next(parsed.forward.ops).rule == rule


# --- errors in the text ------------------------------------------------------------------------------

GOOD = """\
graph @g(B: 1..8)

weights {
  @w : f32[4,4]
}

forward(%x : f32[B,4]) {
  %n1 = linear(%x, @w) : f32[B,4]  #fc
  %n2 = relu(%n1) : f32[B,4]
  return %n2
}
"""


@pytest.mark.parametrize(("old", "new", "error"), [
    ("relu(%n1)", "relu(%n3)", "9:14: error: %n3 is not defined\n"
     "    %n2 = relu(%n3) : f32[B,4]\n               ^\n  hint: did you mean %n1?"),
    ("linear(%x,", "linear(%n2,", "8:16: error: %n2 is used before it is defined\n"),
    ("@w)", "@v)", "8:20: error: unknown weight @v\n"),
    ("f32[B,4]) {", "f33[B,4]) {", "7:14: error: unknown element type `f33`"),
    ("f32[4,4]", "f32[4,4", "4:8: error: this type does not end"),
    ("f32[4,4]", "f32[4,4/2]", "4:8: error: `4/2` is not a dimension"),
    ("%n1 = ", "%n1, %n0 = ", "8:3: error: 2 results but 1 types"),
    ("  return %n2\n", "", "10:1: error: expected an op, `kernel` or `return`, found `}`"),
    ("relu(%n1)", "relu(%n1", "9:18: error: expected `,` or `)`, found `:`"),
    ("relu(%n1)", 'relu(%n1) {a="b}', "9:22: error: this string does not end"),
    ("relu(%n1)", "relu(%n1) {a=}", "9:22: error: expected a value, found `}`"),
    ("relu(%n1)", "relu([1])", "error: an operand is a value, a weight, a number"),
    ("relu(%n1)", "relu<identity(1.0)>(%n1)", "error: rule `identity` has no parameters by position"),
    ("relu(%n1)", "relu(%n1) ~", "9:19: error: `~` means nothing here"),
    ("weights {", "wieghts {", "3:1: error: unknown section `wieghts`\n"),
    ("forward(", "relevance(", "error: the graph has no forward section"),
    ("graph @g", "@g", "1:1: error: expected `graph`, found `@g`"),
    ("(B: 1..8)", "(true: 1..8)", "1:10: error: `true` cannot name a dimension"),
    ("  return %n2\n}\n", "  return %n2\n", "10:13: error: expected `}`, the text ends"),
    (GOOD, "", "1:1: error: expected `graph`, the text ends"),
    (GOOD, GOOD + "forward { return }", "error: a second `forward` section"),
])
def test_errors_show_place_fact_and_hint(old: str, new: str, error: str) -> None:
    assert GOOD.count(old) >= 1
    with pytest.raises(IRError) as problem:
        parse_graph(GOOD.replace(old, new, 1), "net.dlir")
    assert str(problem.value).startswith("net.dlir:")
    assert error in str(problem.value)


@given(at=st.integers(0, len(GOOD)), cut=st.integers(0, 6),
       insert=st.text("%@#<>(){}[],;:=+*/-. \n\"Bx1\\", max_size=3))
def test_damaged_text_gives_a_graph_or_an_error(at: int, cut: int, insert: str) -> None:
    """Never another exception."""
    with suppress(IRError):
        verify(parse_graph(GOOD[:at] + insert + GOOD[at + cut:]))


@pytest.mark.parametrize("value", ["[" * 5000, "(" * 5000, "9" * 5000, "-" * 50000 + "1", "+".join(["B"] * 20000)],
                         ids=["lists", "parentheses", "digits", "signs", "terms"])
def test_text_made_to_break_the_parser_is_an_error(value: str) -> None:
    with pytest.raises(IRError):
        parse_graph(f"graph @g {{a={value}}} forward {{ return }}")


# --- dlbc-opt ----------------------------------------------------------------------------------------

def test_opt_writes_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                              capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(GOOD))
    assert opt.main(["-", "-p", "eliminate_dead", "-o", str(tmp_path / "out.dlir")]) == 0
    assert parse_graph((tmp_path / "out.dlir").read_text()) == parse_graph(GOOD)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("text", "arguments", "error"), [
    (GOOD.replace("relu(%n1) : f32[B,4]", "relu(%n1) : f32[B,5]"), [], ":9:3: error: %n2 is f32[B,5], but must be"),
    (GOOD, ["-p", "eliminate_daed"], "dlbc-opt: error: unknown pass `eliminate_daed`"),
    ("", [], ":1:1: error: expected `graph`"),
])
def test_opt_shows_errors(text: str, arguments: list[str], error: str, tmp_path: Path,
                          capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.dlir").write_text(text)
    assert opt.main([str(tmp_path / "net.dlir"), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and error in err


def test_opt_without_verification(tmp_path: Path) -> None:
    (tmp_path / "net.dlir").write_text(GOOD.replace("relu(%n1) : f32[B,4]", "relu(%n1) : f32[B,5]"))
    assert opt.main([str(tmp_path / "net.dlir"), "--no-verify", "-o", str(tmp_path / "out.dlir")]) == 0


def test_opt_names_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert opt.main(["nowhere.dlir"]) == 1
    assert "nowhere.dlir" in capsys.readouterr().err


@pytest.mark.parametrize(("comment", "status", "said"), [
    ("// expected-error: %n3 is not defined", 0, ""),
    ("// expected-error: did you mean %n1?", 0, ""),
    ("// expected-error: something else", 1, "net.dlir:9: expected error `something else` did not come"),
    ("", 1, "this error was not expected here"),
])
def test_opt_checks_expected_errors(comment: str, status: int, said: str, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    text = GOOD.replace("relu(%n1) : f32[B,4]", f"relu(%n3) : f32[B,4] {comment}")
    Path("net.dlir").write_text(text)
    assert opt.main(["net.dlir", "--verify-diagnostics"]) == status
    assert said in capsys.readouterr().err


def test_opt_starts_without_the_heavy_packages() -> None:
    """Passes included; by what is imported, which unlike the time does not depend on the machine."""
    code = ("import sys, dlbc.opt, dlbc.passes as p; p.load_all()\n"
            "print([m for m in ('torch', 'numpy', 'networkx', 'jinja2', 'rich') if m in sys.modules])")
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_place_of_an_error_survives_tabs() -> None:
    with pytest.raises(IRError) as problem:
        parse_graph(GOOD.replace("  %n2 = relu(%n1)", "\t%n2\t= relu(%n3)"))
    assert "\n  \t%n2\t= relu(%n3) : f32[B,4]\n  \t   \t       ^\n" in str(problem.value)


def test_printing_does_not_depend_on_how_the_graph_was_made() -> None:
    graph = parse_graph(GOOD)
    assert print_graph(replace(graph, attrs={})) == print_graph(parse_graph(GOOD.replace("  ", " "))) != GOOD


# --- docs/ir.md --------------------------------------------------------------------------------------

def test_the_table_of_ops_is_current() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate_ops.py"))
    text = (ROOT / "docs" / "ir.md").read_text(encoding="utf-8")
    assert script["page"](text) == text, "run `python docs/generate_ops.py`"


def test_the_example_of_the_page_is_a_graph() -> None:
    """It verifies, and stands as the printer prints it."""
    text = (ROOT / "docs" / "ir.md").read_text(encoding="utf-8").split("```")[1].split("\n", 2)[2]
    verify(parse_graph(text))
    assert print_graph(parse_graph(text)) == text
