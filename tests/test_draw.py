"""Graphs of models as pictures and pages: what flows where, what is folded, how it is laid out, how it is written."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dlbc
from dlbc_runtime.errors import DlbcError, InputError
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.views.graph_drawing import Painter
from dlbc_runtime.views.graph_flow import Flow, Node, flow_of, strongest, totals
from dlbc_runtime.views.graph_folds import Module, module_tree, scene
from dlbc_runtime.views.graph_layout import Arc, Size, layered
from dlbc_runtime.views.graph_shapes import Box, Label
from tests import generated, zoo
from tests.browser import in_browser

BLOCKS = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@functools.lru_cache(maxsize=1)
def deep() -> tuple[Explainer, Explanation]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, x = Deep().eval(), torch.randn(2, 5)
    explainer = dlbc.compile(model, x, rules="epsilon", cache=False)
    return explainer, explainer(x, keep="all")


@functools.lru_cache(maxsize=1)
def llama() -> tuple[Explainer, dict[str, Any]]:
    if not zoo.available("llama"):
        pytest.skip("needs transformers")
    case = zoo.CASES["llama"]()
    return dlbc.compile(case.model, case.kwargs, rules="attnlrp", cache=False), case.kwargs


def flow(explainer: Explainer, explanation: Explanation, by: str = "module") -> Flow:
    return flow_of(explainer.graph("canonical"), explainer.manifest.explained,
                   {**totals(explanation.relevance), **totals(explanation.nodes)}, by)


def given_of(found: Flow, key: str) -> float:
    return sum(amount or 0.0 for (before, _), amount in found.edges.items() if before == key)


def got_of(found: Flow, key: str) -> float:
    return sum(amount or 0.0 for (_, after), amount in found.edges.items() if after == key)


def graph(edges: dict[tuple[str, str], None], ops: dict[str, tuple[str, str]]) -> networkx.MultiDiGraph:
    found = networkx.MultiDiGraph()
    for name, (op, place) in ops.items():
        found.add_node(name, op=op, section="forward", type="f32[2]", **({"place": place} if op != "input" else {}))
    found.add_edges_from(edges)
    return found


# What flows


def test_around_a_residual_connection_all_edges_are_known() -> None:
    ops = {"x": ("input", ""), "f": ("linear", "f"), "g": ("linear", "g"), "y": ("add", "")}
    drawn = graph(dict.fromkeys([("x", "f"), ("f", "g"), ("g", "y"), ("x", "y")]), ops)
    # g absorbs 1 in its bias: what reaches x through f is 2, the other 7 came past it.
    found = flow_of(drawn, ["x"], {"x": 9.0, "f": 2.0, "g": 3.0, "y": 10.0}, "op")
    assert {edge: pytest.approx(amount) for edge, amount in found.edges.items()} == {
        ("x", "f"): 2.0, ("f", "g"): 2.0, ("g", "y"): 3.0, ("x", "y"): 7.0}


def test_what_moves_numbers_is_left_out_by_module_and_inputs_that_are_not_explained_are_too() -> None:
    ops = {"x": ("input", ""), "mask": ("input", ""), "a": ("linear", "m.a"), "r": ("reshape", "m"),
           "b": ("mul", "m.b"), "c": ("exp", "m.b"), "y": ("add", "m")}
    drawn = graph(dict.fromkeys([("x", "a"), ("a", "r"), ("r", "b"), ("b", "c"), ("c", "y"), ("mask", "y")]), ops)
    by_op = flow_of(drawn, ["x"], {}, "op")
    assert list(by_op.nodes) == ["x", "a", "r", "b", "c", "y"]
    found = flow_of(drawn, ["x"], {"m.a": 4.0, "m.b": 4.0}, "module")
    assert [(node.path, node.ops) for node in found.nodes.values()] == [
        ("x", ("input",)), ("m.a", ("linear",)), ("m.b", ("mul", "exp")), ("m.add", ("add",))]
    assert found.edges == {("x", "a"): None, ("a", "c"): 4.0, ("c", "y"): 4.0} or found.edges[("a", "c")] == 4.0


@pytest.mark.parametrize("by", ["module", "op"])
def test_every_node_gives_what_it_has(by: str) -> None:
    for explainer, explanation in (deep(), (llama()[0], llama()[0](**llama()[1], keep="all"))):
        found = flow(explainer, explanation, by)
        assert all(amount is not None for amount in found.edges.values())
        for key, node in found.nodes.items():
            assert node.relevance is not None
            if any(before == key for before, _ in found.edges):
                assert given_of(found, key) == pytest.approx(node.relevance, abs=1e-3 * found.limit), node.path
            if node.name == "add":  # of sums nothing is absorbed
                assert got_of(found, key) == pytest.approx(node.relevance, abs=2e-3 * found.limit), node.path


def test_modules_alone_tell_nearly_as_much() -> None:
    explainer, inputs = llama()
    whole, less = (flow(explainer, explainer(**inputs, keep=keep)) for keep in ("all", "modules"))
    assert list(whole.nodes) == list(less.nodes)
    for key, node in whole.nodes.items():
        other = less.nodes[key].relevance
        assert node.relevance is not None and other == pytest.approx(node.relevance, abs=1e-3 * whole.limit), node.path


def test_the_strongest_are_kept_and_what_flows_between_them() -> None:
    found = flow(*deep())
    seed, ends = found.limit, {"x", "head"}
    strongest(found, 5, "module")
    assert len(found.nodes) == 5 + len(ends) and {"x", "head"} <= {node.name for node in found.nodes.values()}
    assert "add" not in {node.name for node in found.nodes.values()}
    assert networkx.is_directed_acyclic_graph(found.graph()) and seed
    reached = networkx.descendants(found.graph(), next(iter(found.nodes)))
    assert len(reached) == len(found.nodes) - 1


# What is folded


def test_repeated_blocks_are_folded_and_open_one_by_one() -> None:
    found = flow(*deep())
    tree = module_tree(found)
    whole = scene(tree, "")
    assert [one if isinstance(one, str) else one.path for one in whole.items] == [
        key for key in found.nodes if found.nodes[key].name in ("x", "first")] + ["blocks"] + [
        key for key in found.nodes if found.nodes[key].name == "head"]
    run = next(one for one in whole.items if isinstance(one, Module))
    assert run.run and not run.open and len(run.blocks) == BLOCKS
    assert sorted(tree.leaves()) == sorted(found.nodes)
    inside = scene(tree, "blocks.3")
    assert [found.nodes[str(one)].name for one in inside.items] == ["norm", "up", "relu", "down", "add"]
    assert scene(tree, "", room=200).shown() >= len(found.nodes)  # where there is room, nothing is folded


def test_a_module_that_is_left_and_entered_again_has_no_frame() -> None:
    nodes = {key: Node(key, key, place, ("linear",)) for key, place in
             (("a1", "a"), ("b1", "b"), ("b2", "b"), ("a2", "a"), ("c1", "c"), ("c2", "c"))}
    found = Flow(nodes, dict.fromkeys([("a1", "b1"), ("b1", "b2"), ("b2", "a2"), ("a2", "c1"), ("c1", "c2")]))
    tree = module_tree(found)
    assert [one if isinstance(one, str) else one.path for one in tree.items] == ["a1", "b", "a2", "c"]


# How it is laid out

sizes = st.lists(st.tuples(st.floats(10, 120), st.floats(10, 60)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(sizes, st.data())
def test_items_stand_apart_and_every_edge_leads_down(of: list[tuple[float, float]], data: st.DataObject) -> None:
    items = {place: Size(*size) for place, size in enumerate(of)}
    pairs = list(combinations(range(len(of)), 2))
    edges = data.draw(st.lists(st.sampled_from(pairs), unique=True, max_size=20)) if pairs else []
    arcs = [Arc(a, a, b) for a, b in edges]
    found = layered(items, arcs)
    for a, b in combinations(items, 2):
        (ax, ay), (bx, by) = found.places[a], found.places[b]
        assert (ax + items[a].width <= bx + 1e-6 or bx + items[b].width <= ax + 1e-6
                or ay + items[a].height <= by + 1e-6 or by + items[b].height <= ay + 1e-6)
    for key, (x, y) in found.places.items():
        assert x >= -1e-6 and y >= -1e-6
        assert x + items[key].width <= found.width + 1e-6 and y + items[key].height <= found.height + 1e-6
    for arc, way in found.ways.items():
        ys = [y for _, y in way]
        assert ys == sorted(ys)
        assert way[0][1] == pytest.approx(found.places[arc.start][1] + items[arc.start].height)
        assert way[-1][1] == pytest.approx(found.places[arc.end][1])
        for (x, top), (other, bottom) in zip(way[1:-1:2], way[2:-1:2], strict=False):  # past a rank, beside its items
            assert x == other
            assert not any(left < x < left + items[key].width and y < bottom - 1e-6
                           and y + items[key].height > top + 1e-6 for key, (left, y) in found.places.items())


def test_colours_and_widths_follow_relevance() -> None:
    found = flow(*deep())
    shapes = Painter(found).drawing(scene(module_tree(found), "blocks.3")).shapes
    boxes = {box.says[1].split(",")[0]: box for box in shapes if isinstance(box, Box)}
    for node in found.nodes.values():
        if node.place == "blocks.3":
            assert node.relevance is not None
            assert boxes[node.path].strength == pytest.approx(node.relevance / found.limit)


# How it is written


def test_svg_is_xml_and_says_what_it_shows(tmp_path: Path) -> None:
    explainer, explanation = deep()
    path = explanation.draw(tmp_path / "deep.svg", opened=["blocks.3"], title="<deep> & wide")
    root = ElementTree.parse(path).getroot()
    texts = ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<deep> & wide", "first", "head", "blocks 0–11", "blocks.3", "norm"} <= set(texts)
    plain = explainer.draw(tmp_path / "plain.svg").read_text()
    assert "blocks 0–11" in plain and "#f" in plain and "+" not in "".join(
        one.text or "" for one in ElementTree.fromstring(plain).iter("{http://www.w3.org/2000/svg}text"))


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    _, explanation = deep()
    content = explanation.draw(tmp_path / "deep.png", by="op").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(DlbcError, match="matplotlib"):
        explanation.draw(tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_blocks_open_on_the_page(tmp_path: Path) -> None:
    _, explanation = deep()
    page = explanation.draw(tmp_path / "deep.html").read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    opened, closed, keyboard, tip, wide = in_browser(page, """
        const rows = [...document.querySelectorAll('.row')];
        const shown = () => [...document.querySelectorAll('[data-scene]')].filter((one) => one.checkVisibility())
            .map((one) => one.dataset.scene);
        const press = (element, key) => element.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
        rows[3].dispatchEvent(new MouseEvent('click', { bubbles: true })); const opened = shown();
        document.querySelector('[data-scene="blocks.3"] .close').click(); const closed = shown();
        rows[0].focus(); press(rows[0], 'ArrowDown'); press(document.activeElement, 'Enter'); const keyboard = [shown(),
            rows[1].getAttribute('aria-expanded')];
        press(document.activeElement, 'Escape'); keyboard.push(shown());
        document.querySelector('.node').dispatchEvent(new MouseEvent('mousemove', { bubbles: true }));
        const box = document.documentElement;
        return [opened, closed, keyboard, document.getElementById('tip').textContent, box.scrollWidth <= innerWidth];
        """, tmp_path)
    assert opened == ["blocks.3"] and closed == []
    assert keyboard == [["blocks.1"], "true", []] and wide
    assert tip and tip[0] in "+−0123456789"


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    explainer, explanation = deep()
    with pytest.raises(InputError, match=r"\.svg, \.png or \.html"):
        explanation.draw(tmp_path / "x.pdf")
    with pytest.raises(InputError, match="module"):
        explanation.draw(tmp_path / "x.svg", by="layer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="top_k=0"):
        explanation.draw(tmp_path / "x.svg", top_k=0)
    with pytest.raises(InputError, match="chooses by relevance"):
        explainer.draw(tmp_path / "x.svg", top_k=3)
    with pytest.raises(InputError, match=r"there is no module 'blocks\.99'"):
        explanation.draw(tmp_path / "x.svg", opened=["blocks.99"])
    with pytest.raises(InputError, match=r"GenerationExplanation holds no.*\s+hint: give what explainer"):
        explainer.draw(tmp_path / "x.svg", generated.example())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="inputs alone"):
        explainer(torch.randn(1, 5)).draw(tmp_path / "x.svg")
    loaded = Explanation.load(explanation.save(tmp_path / "x.safetensors"))
    with pytest.raises(InputError, match=r"explainer\.draw"):
        loaded.draw(tmp_path / "x.svg")
    assert explainer.draw(tmp_path / "y.svg", loaded).exists() and not (tmp_path / "x.svg").exists()


@pytest.mark.real
def test_thirty_layers_can_be_read() -> None:
    if not zoo.available("smollm2_next_token"):
        pytest.skip("needs SmolLM2")
    model, tokenizer = zoo.smollm2()
    inputs = dict(tokenizer("The capital of France is", return_tensors="pt"))
    explainer = dlbc.compile(model, inputs, rules="attnlrp")
    found = flow(explainer, explainer(**inputs, keep="all"))
    drawing = Painter(found).drawing(scene(module_tree(found), ""))
    assert drawing.width < 500 and drawing.height < 1200
    labels = {shape.text for shape in drawing.shapes if isinstance(shape, Label)}
    assert {"layers 0–29", "embed_tokens", "norm", "lm_head", *map(str, range(30))} <= labels
