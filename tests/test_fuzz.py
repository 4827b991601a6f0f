"""Fuzzing: a few random models for every check of `fuzz.py` (`make fuzz` tries many), that a planted mistake is found
and written down, and what fuzzing has found before, as small graphs."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc.backends.c import table
from dlbc.composite import Composite, preset
from dlbc.errors import LevelError, PassError, RuleError, UnsupportedOpError
from dlbc.ir.core import Graph, Op
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.ir.verifier import verify
from dlbc.opt import main as dlbc_opt
from dlbc.passes import PASSES, Pass, load_all, parse, run
from dlbc.passes.eliminate_common import EliminateCommon
from dlbc.passes.eliminate_dead import EliminateDead
from dlbc.passes.lower import Lower
from dlbc.passes.pair import Pair
from dlbc.passes.sink_targets import SinkTargets
from dlbc.selectors import Sites
from dlbc_runtime.c_library import compiler
from tests import fuzz
from tests.fuzz_checks import CHANGING, Bug, late, passes_at, shaken, switched

EXAMPLES = int(os.environ.get("DLBC_EXAMPLES", "20"))
NUMBER = 0 if os.environ.get("CI") else secrets.randbelow(2**31)
SMALL = """
graph @small(B: 1..8) {inputs=["x"], outputs=["y"]}
weights { @w : f32[4,4] }
forward(%x : f32[B,4]) {
  %h = sub(%x, 1.0)   : f32[B,4]  #fc
  %y = linear(%h, @w) : f32[B,4]  #fc
  return %y
}
"""

def test_rounding_leaves_infinities_as_they_are() -> None:
    """A judge that made NaN of them would call any difference one."""
    graph = parse_graph("""
graph @masked(B: 1..8)
forward(%x : f32[B,3]) {
  %m = log(%x)                 : f32[B,3]
  %y = softmax(%m) {dim=-1}    : f32[B,3]
  return %y
}
""")
    for found in shaken(graph, {"x": np.array([[0.0, 1.0, 2.0]])}, {}):
        assert np.isfinite(found.outputs[0]).all()


# --- random models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "times"), [("canonical", 2), ("explained", 1), ("sunk", 3), ("generated", 2)])
def test_random_models(name: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLBC_DEBUG")  # the checks verify
    bug = fuzz.find(fuzz.CHECKS[name], times * EXAMPLES, NUMBER)
    if bug is not None:
        pytest.fail(f"seed {NUMBER}: {fuzz.report(bug, tmp_path)}", pytrace=False)


def test_no_pass_is_left_out() -> None:
    """A pass that is registered is tried on its own, or known to change what a graph computes."""
    load_all()
    tried = {step.name for level in (1, 2, 3) for step in passes_at(level)}
    assert tried | CHANGING == set(PASSES)
    assert {step.name for step in late()} <= {step.name for step in passes_at(3)}


# --- planted mistakes --------------------------------------------------------------------------------

def _swapped(op: Op) -> Op:
    return replace(op, operands=op.operands[::-1]) if op.name == "sub" else op


@dataclass(frozen=True)
class Planted(Pass):
    """Fails in the way that `how` says, where a graph has a `sub`."""

    name: ClassVar[str] = "planted"
    how: str = "swaps"

    def run(self, graph: Graph) -> Graph:
        body = tuple(map(_swapped, graph.forward.ops))
        if body == graph.forward.body:
            return graph
        if self.how == "raises":
            raise KeyError("sub")
        if self.how == "breaks":
            body = body[::-1]
        return replace(graph, forward=replace(graph.forward, body=body))


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    load_all()
    monkeypatch.setitem(PASSES, "planted", Planted)
    yield


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(("how", "why"), [("swaps", "it was"), ("raises", "KeyError: 'sub'"), ("breaks", "defined")])
def test_a_planted_mistake_is_found_and_written_down(how: str, why: str, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    step = Planted(how)

    def check(trial: fuzz.Trial) -> None:
        trial.checker.order([EliminateDead(), step], trial.model.graph)

    bug = fuzz.find(check, 100, 1, ("sequence",), 3, shrink=how == "swaps")
    assert isinstance(bug, Bug) and str(bug).startswith("pass `planted") and why in str(bug)
    assert how != "swaps" or sum(op.name == "sub" for op in bug.graph.forward.ops) == 1  # shrunk
    file, command = bug.write(tmp_path)
    assert file.read_text().startswith(f"// {command}\n")
    assert fuzz.main(shlex.split(command)[3:]) == 1
    assert why in capsys.readouterr().out
    assert fuzz.main([str(file), "--pass", "eliminate_common,eliminate_dead"]) == 0


@pytest.mark.skipif(compiler() is None, reason="there is no C compiler on this machine")
def test_functions_in_c_are_shown_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """What is written down of a backend is run by that backend."""
    graph = run(parse_graph(SMALL.replace("linear(%h, @w) : f32[B,4]  #fc", "tanh(%h) : f32[B,4]  #fc")),
                (Pair(composite="dlb"), Lower()))
    numbers = {"x": np.arange(8.0).reshape(2, 4), "R.y": np.ones((1, 2, 4))}
    file, command = Bug("", graph, "wrong", numbers, {"w": np.eye(4)}, backend="c").write(tmp_path)
    arguments = shlex.split(command)[3:]
    assert arguments == [str(file), "--backend", "c"]
    assert fuzz.main(arguments) == 0
    monkeypatch.setitem(table.TABLE, "tanh", "dlbc_tanh_{s}(2 * {a})")
    assert fuzz.main(arguments) == 1
    assert "backend c: result 1 of forward is" in capsys.readouterr().out


# --- reproducers of the compiler ---------------------------------------------------------------------

@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("how", ["raises", "breaks"])
def test_a_failing_pass_names_itself_and_leaves_a_reproducer(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DLBC_DUMP", str(tmp_path / "dump"))
    with pytest.raises(PassError, match=r"pass `planted\{how=") as caught:
        run(parse_graph(SMALL), (EliminateCommon(), Planted(how), EliminateDead()))
    problem = caught.value
    file = Path(problem.reproducer)
    assert file.parent == tmp_path / "dump" and problem.reproducer in str(problem) and problem.command in str(problem)
    assert file.read_text().splitlines()[0] == f"// {problem.command}"
    assert print_graph(parse_graph(file.read_text())) == print_graph(parse_graph(SMALL))
    name, *arguments = shlex.split(problem.command)
    assert name == "dlbc-opt" and dlbc_opt(arguments) == 1
    shown = capsys.readouterr().err
    assert problem.fact in shown and "graph before" not in shown  # it is the file that was given
    assert len(list(file.parent.iterdir())) == 1


def test_reproducers_go_to_a_fresh_folder_or_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DLBC_DUMP", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for _ in range(2):
        with pytest.raises(PassError):
            run(parse_graph(SMALL), (Planted("raises"),))
    assert len(list(tmp_path.rglob("small.planted.dlir"))) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("DLBC_DUMP", str(tmp_path / "file"))  # no folder: nothing can be written there
    with pytest.raises(PassError, match="KeyError: 'sub'") as caught:
        run(parse_graph(SMALL), (Planted("raises"),))
    assert caught.value.reproducer == "" and isinstance(caught.value.__cause__, KeyError)


def test_errors_for_users_come_through_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLBC_DUMP", str(tmp_path))
    graph = parse_graph(SMALL)
    with pytest.raises(LevelError, match="no relevance section"):
        run(graph, (Lower(),))
    with pytest.raises(RuleError, match="unknown rules"):
        run(graph, (Pair(composite="atnlrp"),))
    with pytest.raises(UnsupportedOpError):
        run(graph, (Pair(rules=Composite([], base=None)),))
    assert not list(tmp_path.iterdir())


# --- passes as text ----------------------------------------------------------------------------------

def test_every_pass_reads_back_from_its_text() -> None:
    load_all()
    steps = [step for cls in PASSES.values() for step in switched(cls)]
    steps += [Pair(composite="dlb{activation_aware=true}", output="a, {b};\"c\"", keep="model.layers.*"),
              Pair(composite="epsilon-gamma-box{low=0,high=1}"), SinkTargets("logits", 1, True)]
    for step in steps:
        assert parse(str(step)) == [step], str(step)
    assert parse(",".join(map(str, steps))) == steps


@pytest.mark.parametrize("rules", [
    preset("gamma{gamma=0.3}"), Composite([("fc", "gamma(0.123456789)"), ("add", "absolute(low=-3)")], base="attnlrp"),
    Composite([(lambda op: op.name == "linear", "zbox(low=[-1,-2,-3,-4],high=3)")], base="dlb", fallback="gradient")],
    ids=["preset", "entries", "predicate"])
def test_rules_have_a_text(rules: Composite) -> None:
    graph = parse_graph(SMALL)
    step = Pair(rules=rules)
    (read,) = parse(str(step.for_text(graph)))
    one, other = (print_graph(p.run(graph)).splitlines() for p in (step, read))
    assert one == other


@pytest.mark.parametrize("text", ["pair{composite=dlb", "lower{ledger=2}", "lower{x=1}", "sink_targets{at_least=many}",
                                  "pair{rules=[1]}", "low er"])
def test_texts_that_name_no_pass(text: str) -> None:
    with pytest.raises(dlbc.errors.IRError):
        parse(text)


# --- what fuzzing has found --------------------------------------------------------------------------

HEAD = """
graph @head(B: 1..8) {inputs=["x"], outputs=["y"]}
weights { @w : f32[3,4]
          @b : f32[3] }
forward(%x : f32[B,4]) {
  %y = linear(%x, @w, @b) : f32[B,3]
  return %y
}
"""


def test_an_op_that_is_yet_to_be_lowered_is_not_dead() -> None:
    """`%scores` of sparse targets is read by no op; its rule is expanded by looking at it."""
    paired = run(parse_graph(HEAD), (SinkTargets(at_least=1), Pair(composite="dlb"), EliminateDead()))
    assert "linear_rows" in {op.name for op in paired.forward.ops}
    run(paired, (Lower(),))


def test_the_last_layer_of_sparse_targets_is_that_of_the_scores() -> None:
    graph = SinkTargets(at_least=1).run(parse_graph(HEAD))
    assert Sites.of(graph).height == {"scores": 0}
    paired = Pair(rules=Composite([("last", "zplus")], base="dlb")).run(graph)
    assert paired.relevance is not None
    assert [str(op.rule) for op in paired.relevance.ops] == ["zplus"]


def test_rows_of_a_head_are_explained_as_the_head() -> None:
    """Version 0.1's surplus in the denominator is that of linear layers, also where targets are sparse."""
    dense = parse_graph(HEAD)
    rng = np.random.default_rng(0)
    x, targets, weights = np.abs(rng.normal(size=(2, 4))), np.array([[1], [2]]), {
        "w": np.abs(rng.normal(size=(3, 4))), "b": np.zeros(3)}
    seeds = np.zeros((1, 2, 3))
    seeds[0, [0, 1], [1, 2]] = 1
    found = []
    sparse = SinkTargets(at_least=1).run(dense)
    for graph, name, seed in ((dense, "R.y", seeds), (sparse, "R.scores", np.ones((1, 2, 1)))):
        lowered = run(graph, (Pair(composite="dlb-0.1"), Lower()))
        given = {"x": x, **({"targets": targets} if graph is not dense else {})}
        found += interpret(lowered, given, weights, {name: seed}).relevance
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    assert found[0].sum() < 2  # some went into the surplus


@pytest.mark.parametrize("keep", ["modules", "all", "head"])
def test_inner_relevance_of_a_wide_head(keep: str) -> None:
    """Where 4096 numbers and more come out, targets are sparse; relevance of the head is that of all of them."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 3))
    model.add_module("head", nn.Linear(3, 5000))
    x = torch.randn(2, 4)
    found = dlbc.compile(model, (x,), rules="attnlrp", cache=False)(x, target=7, keep=keep)
    nodes = {name: values for name, values in found.nodes.items() if "head" in name}
    (head,) = nodes.values()
    assert head.shape == (2, 5000) and np.flatnonzero(head[0]).tolist() == [7]


def test_what_forward_returns_is_not_deferred() -> None:
    graph = SinkTargets(at_least=1).run(parse_graph(HEAD))
    scores = next(op.result for op in graph.forward.ops if op.name == "linear_rows")
    returned = replace(graph, forward=replace(graph.forward, results=(*graph.forward.results, scores)))
    after = run(returned, (Pair(), *parse("lower,defer")))
    verify(after)
    assert [p.name for p in after.forward.params] == ["x", "targets"]


def test_what_masks_are_made_of_in_prepare_may_be_read() -> None:
    """Of a model of fixed length the mask is a constant: its condition is used, which `prepare` did not return."""
    graph = parse_graph("""
        graph @fixed(B: 1..8)
        prepare {
          %i    = arange() {stop=3}       : i64[3]
          %row  = reshape(%i) {shape=[3,1]} : i64[3,1]
          %away = sub(%i, %row)           : i64[3,3]
          %far  = abs(%away)              : i64[3,3]
          %near = lt(%far, 2)             : bool[3,3]
          %seen = cast(%near) {dtype="f32"} : f32[3,3]
          %not  = sub(1.0, %seen)         : f32[3,3]
          %bias = mul(%not, -1e+30)       : f32[3,3]
          return %bias
        }
        forward(%x : f32[B,2,3,2]) {
          %y = attention(%x, %x, %x, %bias) {scale=1.0} : f32[B,2,3,2]
          return %y
        }""")
    folded = run(graph, parse("fold_masks"), verified=True)
    x = np.random.default_rng(0).normal(size=(2, 2, 3, 2))
    one, other = (interpret(g, {"x": x}, {}).outputs[0] for g in (graph, folded))
    np.testing.assert_allclose(one, other, rtol=1e-12)
    assert any(value.type.dtype == "bool" for value in folded.prepare.results)
