"""Every rule of products with experts, as it is lowered: only the weights of experts that have rows are read, and a
mixture of one expert is explained as the layer that it is."""

from __future__ import annotations

import numpy as np
import pytest

from dlbc.compiler import lowering
from dlbc.composite import Composite
from dlbc.ir.core import Graph, Weight
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.options import Options
from dlbc.passes import run
from dlbc.passes.lower import expand
from dlbc.passes.pair import Pair
from dlbc.passes.rules import RULES, load_rules

load_rules()
NAMES = [*sorted(rule for op, rule in RULES if op == "expert_linear"), "absolute(low=-1, high=1)", "gamma(3)",
         "alpha_beta(1, 0)", "zbox(-2, 2)"]
rng = np.random.default_rng(7)


def layer(dtype: str = "f32", experts: int = 4, *, dense: bool = False) -> Graph:
    """Two products of each row's two experts (`dense`: of all rows with the one there is) with ReLUs before them."""
    def times(x: str, weight: str) -> str:
        return f"linear({x}, @{weight}, @{weight}.b)" if dense else f"expert_linear({x}, %ids, @{weight}, @{weight}.b)"

    lead = "" if dense else f"{experts},"
    return parse_graph(f"""
        graph @layer(B: 1..64) {{inputs=["x", "ids"], outputs=["y"], explain=["x"]}}
        weights {{
          @up : {dtype}[{lead}6,8]  @up.b : {dtype}[{lead}6]  @down : {dtype}[{lead}5,6]  @down.b : {dtype}[{lead}5]
        }}
        forward(%x : {dtype}[B,2,8], %ids : i64[B,2]) {{
          %p = relu(%x) : {dtype}[B,2,8]
          %u = {times("%p", "up")} : {dtype}[B,2,6]
          %a = relu(%u) : {dtype}[B,2,6]
          %d = {times("%a", "down")} : {dtype}[B,2,5]
          %y = neg(%d) : {dtype}[B,2,5]
          return %y
        }}""")


def lowered(graph: Graph, rule: str) -> Graph:
    """The graph with the rule on every product."""
    composite = Composite([("expert_linear", rule), ("linear", rule)], base="epsilon")
    return run(Pair(rules=composite).run(graph), lowering(Options(), ledger=False))


def numbers(graph: Graph) -> dict[str, np.ndarray]:
    """Weights of either sign."""
    return {name: rng.normal(size=tuple(map(int, weight.type.shape))) for name, weight in graph.weights.items()}


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("rule", NAMES)
def test_only_grouped_products_read_experts(rule: str, dtype: str) -> None:
    """No rule makes changed weights of all experts: squares, sizes and parts are taken within the product."""
    graph = lowered(layer(dtype), rule)
    readers = {op.name for _, section in graph.sections() for op in section.ops
               if any(isinstance(o, Weight) and o.type.rank == 3 for o in op.operands)}
    assert readers == {"grouped_linear"}
    made = [op for _, section in graph.sections() for op in section.ops
            for r in op.results if r.type.shape[:1] == (4,) and r.type.rank == 3]
    assert not made


@pytest.mark.parametrize("rule", NAMES)
def test_one_expert_is_the_layer(rule: str) -> None:
    """The float64 interpreter gives the same relevance for a mixture of one expert and for the dense layer."""
    mixture, dense = layer(experts=1), layer(dense=True)
    weights = numbers(dense)
    inputs = {"x": rng.normal(size=(3, 2, 8)), "ids": np.zeros((3, 2), np.int64)}
    seed = {"R.y": rng.normal(size=(2, 3, 2, 5))}
    wanted = interpret(lowered(dense, rule), inputs, weights, seed, expand=expand).relevance
    found = interpret(lowered(mixture, rule), inputs, {name: w[None] for name, w in weights.items()}, seed,
                      expand=expand).relevance
    for own, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-6 * np.abs(other).max())


@pytest.mark.parametrize("rule", NAMES)
def test_sorted_rows_change_nothing(rule: str) -> None:
    """Grouped products equal the rule as it is written, row by row."""
    graph = layer()
    weights = numbers(graph)
    inputs = {"x": rng.normal(size=(5, 2, 8)), "ids": rng.integers(0, 4, (5, 2))}
    seed = {"R.y": rng.normal(size=(2, 5, 2, 5))}
    composite = Composite([("expert_linear", rule)], base="epsilon")
    paired = Pair(rules=composite).run(graph)
    wanted = interpret(paired, inputs, weights, seed, expand=expand).relevance
    found = interpret(lowered(graph, rule), inputs, weights, seed, expand=expand).relevance
    for own, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-6 * np.abs(other).max())
