"""The verifier on graphs that no text can hold, and that its errors name the place.

What it refuses in a text is shown in `filecheck/ir/errors_*.dlir`, one graph per error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from dlbc.errors import IRError
from dlbc.ir.core import Attr, Function, Graph, Location, Op, Section, Type, Value, Weight
from dlbc.ir.ops import OPS
from dlbc.ir.parser import parse_graph, parse_with_spans
from dlbc.ir.signature import check, fits
from dlbc.ir.source import LocatedError
from dlbc.ir.verifier import verify

TEXT = """\
graph @net(B: 1..8, S: 1..4)

weights {
  @w : f32[4,4]
}

prepare {
  %w2 = mul(@w, 2.0) : f32[4,4]
  return %w2
}

forward(%x : f32[B,4]) {
  %h = linear(%x, %w2) : f32[B,4]  #fc
  %g = gelu(%h)        : f32[B,4]
  return %g save %h
}

relevance(%R.g : f32[S,B,4]) {
  %R.h  = rel.gelu<identity>(%R.g; %h) of %g    : f32[S,B,4]
  %h2   = neg(%h)                               : f32[B,4]
  %R.h2 = mul(%R.h, %h2)                        : f32[S,B,4]
  %R.x  = rel.linear<epsilon>(%R.h2; %w2) of %h : f32[S,B,4]
  return %R.x
}
"""
GRAPH = parse_graph(TEXT)
F32 = Type("f32", GRAPH.forward.params[0].type.shape)


def edited(change: Callable[[Op], Op]) -> Graph:
    """The graph with every forward op changed."""
    body = tuple(change(op) for op in GRAPH.forward.ops)
    return replace(GRAPH, forward=replace(GRAPH.forward, body=body))


def test_a_good_graph_passes() -> None:
    """It reads prepared, saved and recomputed values, weights and seeds."""
    verify(GRAPH)
    verify(*parse_with_spans(TEXT))


def test_with_spans_an_error_points_into_the_text() -> None:
    graph, spans = parse_with_spans(TEXT.replace("save %h", "save %x"), "net.dlir")
    with pytest.raises(LocatedError) as problem:
        verify(graph, spans)
    assert problem.value.line == 19
    assert str(problem.value) == (
        "net.dlir:19:36: error: %h is not saved\n"
        "    %R.h  = rel.gelu<identity>(%R.g; %h) of %g    : f32[S,B,4]\n"
        "                                     ^\n"
        "  hint: write `save %h` after forward's return, or recompute it in the relevance section")


def test_without_spans_an_error_shows_section_and_op() -> None:
    graph = replace(GRAPH, forward=replace(GRAPH.forward, saves=()))
    with pytest.raises(IRError) as problem:
        verify(graph)
    assert problem.value.where == "in relevance, `%R.h = rel.gelu<identity>(%R.g; %h) of %g : f32[S,B,4]`"
    assert problem.value.fact == "%h is not saved"


def test_a_value_read_with_another_type() -> None:
    other = Value("x", Type("f16", F32.shape))
    graph = edited(lambda op: replace(op, operands=(other, *op.operands[1:])) if op.name == "linear" else op)
    with pytest.raises(IRError, match=r"%x is read as f16\[B,4\], but it is f32\[B,4\]"):
        verify(graph)


def test_a_weight_read_with_another_type() -> None:
    graph = edited(lambda op: replace(op, operands=(op.operands[0], Weight("w", Type("f32", (4, 5))))))
    with pytest.raises(IRError, match=r"@w is read as f32\[4,5\], but it is f32\[4,4\]"):
        verify(graph)


def test_a_weight_that_the_graph_does_not_list() -> None:
    graph = edited(lambda op: replace(op, operands=(op.operands[0], Weight("v", Type("f32", (4, 4))))))
    with pytest.raises(IRError, match=r"unknown weight @v\n"):
        verify(graph)


def test_a_weight_listed_under_another_name() -> None:
    with pytest.raises(IRError, match="weight @w is listed as @v"):
        verify(replace(GRAPH, weights={"v": GRAPH.weights["w"]}))


@pytest.mark.parametrize("section", ["prepare", "forward", "relevance"])
def test_a_value_that_nothing_defines(section: str) -> None:
    old = getattr(GRAPH, section)
    with pytest.raises(IRError, match="%nowhere is returned, but %nowhere is not defined above"):
        verify(replace(GRAPH, **{section: replace(old, results=(Value("nowhere", F32),))}))


def test_one_name_in_two_sections() -> None:
    assert GRAPH.relevance is not None
    seed = GRAPH.relevance.params[0]
    body = (*GRAPH.relevance.body, Op("neg", (seed,), (Value("h", seed.type),)))
    with pytest.raises(IRError, match="%h is defined twice\n  hint: it is defined in forward"):
        verify(replace(GRAPH, relevance=replace(GRAPH.relevance, body=body)))


def test_functions_have_their_own_names() -> None:
    x = GRAPH.forward.params[0]
    function = Function("f", (x,), (Op("relu", (x,), (Value("h", F32),)),), (Value("h", F32),))
    verify(replace(GRAPH, functions={"f": function}))


def test_prepare_does_not_see_inputs() -> None:
    op = Op("neg", (GRAPH.forward.params[0],), (Value("p", F32),))
    with pytest.raises(IRError, match="prepare reads the forward value %x"):
        verify(replace(GRAPH, prepare=replace(GRAPH.prepare, body=(*GRAPH.prepare.body, op))))


def test_places_are_checked_where_locations_are_known() -> None:
    with pytest.raises(IRError, match="unknown place #fc"):
        verify(replace(GRAPH, locations={"act": Location("GELU")}))


@pytest.mark.parametrize("change", [
    lambda graph: replace(graph, name="a\nb"), lambda graph: graph.with_attrs(composite="a\u2028b"),
    lambda graph: replace(graph, locations={"fc": Location("Linear", "a.py\r")}),
    lambda graph: replace(graph, weights={**graph.weights, "a\tb": Weight("a\tb", F32)}),
    lambda graph: replace(graph, forward=replace(graph.forward, params=(*graph.forward.params, Value("a\0b", F32)))),
])
def test_nothing_that_could_break_a_line_of_generated_code(change: Callable[[Graph], Graph]) -> None:
    with pytest.raises(IRError, match="holds a character that does not print"):
        verify(change(GRAPH))


@pytest.mark.parametrize(("value", "annotation", "expected"), [
    (1, "int", True), (True, "int", False), (1.0, "int", False), (1, "float", True), (True, "float", False),
    (1, "bool", False), (True, "bool", True), ("a", "str", True), (None, "int | None", True), (None, "int", False),
    (F32.shape[0], "Dim", True), (F32.shape[0], "int", False), ((1, 2), "tuple[int, ...]", True),
    ((), "tuple[int, ...] | None", True), ((1, 2.0), "tuple[int, ...]", False), (1, "tuple[int, ...]", False),
    (((0, 1),), "tuple[tuple[Dim, Dim], ...]", True), (((0, 1, 2),), "tuple[tuple[Dim, Dim], ...]", False),
])
def test_kinds_of_attributes(value: Attr, annotation: str, expected: bool) -> None:
    assert fits(value, annotation) is expected


@pytest.mark.parametrize("name", OPS)
def test_the_verifier_understands_every_annotation_of_the_catalogue(name: str) -> None:
    """Defaults are of the kind that their own annotation asks for."""
    check(name, (), OPS[name].attrs)


def test_an_empty_graph() -> None:
    verify(Graph("empty", Section()))
