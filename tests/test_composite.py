"""Which rule explains which op: order, names, globs, predicates, groups, what is unknown, what has no rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dlbc.composite import Composite, preset, resolve
from dlbc.errors import RuleError, UnsupportedOpError
from dlbc.ir.builder import Builder
from dlbc.ir.core import Graph, Op, Rule, Section, Type, Value, Weight
from dlbc.ir.interpreter import interpret
from dlbc.ir.ops import OPS
from dlbc.passes.lower import Lower
from dlbc.passes.pair import Pair
from dlbc.passes.rules import RULES, parse_rule
from dlbc.presets import PRESETS
from dlbc.selectors import GROUPS, Sites

X = Value("x", Type("f32", (2, 4)))
W = {name: Weight(name, Type("f32", (4, 4))) for name in ("a", "b", "c")}


def graph() -> Graph:
    """Three linear layers in two blocks, then a head."""
    at = Builder(["x"])
    h = at.relu(at.linear(X, W["a"], place="blocks.0.fc"), place="blocks.0.act")
    h = at.add(at.linear(h, W["b"], place="blocks.1.fc"), h, place="blocks.1")
    y = at.linear(h, W["c"], result="y", place="head")
    return Graph("blocks", Section((X,), tuple(at.ops), (y,)), weights=W, attrs={"inputs": ("x",), "outputs": ("y",)})


def rules(composite: Composite, of: Graph | None = None) -> dict[str, Rule]:
    """The rule of each op, by place."""
    paired = Pair(rules=composite).run(of or graph())
    assert paired.relevance is not None
    return {op.place: op.rule for op in paired.relevance.ops if op.rule and not op.name.startswith("rel.to_")}


def op(name: str, **attrs: int) -> Op:
    return Op(name, (X, X), (X,), attrs, place="somewhere")


# --- what matches ------------------------------------------------------------------------------------

def test_the_first_match_wins() -> None:
    found = rules(
        Composite([("head", "absolute"), ("linear", "epsilon(1e-3)"), ("linear", "gradient")], base="attnlrp")
    )
    assert found["head"] == parse_rule("absolute")
    assert found["blocks.0.fc"] == found["blocks.1.fc"] == Rule("epsilon", (("eps", 1e-3),))
    assert found["blocks.0.act"] == Rule("identity")


@pytest.mark.parametrize(
    ("what", "matched"),
    [
        ("blocks.0", {"blocks.0.fc"}),
        ("blocks.*", {"blocks.0.fc", "blocks.1.fc"}),
        ("blocks", {"blocks.0.fc", "blocks.1.fc"}),
        ("*.fc", {"blocks.0.fc", "blocks.1.fc"}),
        ("*", {"blocks.0.fc", "blocks.1.fc", "head"}),
        ("head", {"head"}),
        ("linear", {"blocks.0.fc", "blocks.1.fc", "head"}),
        ("linear_map", {"blocks.0.fc", "blocks.1.fc", "head"}),
    ],
)
def test_globs_op_kinds_and_groups(what: str, matched: set[str]) -> None:
    """A rule applies to the ops it exists for; others of the module fall through to the base."""
    found = rules(Composite([(what, "absolute_0_1")], base="attnlrp"))
    assert {place for place, rule in found.items() if rule.name == "absolute_0_1"} == matched


def test_predicates() -> None:
    narrow = Composite([(lambda o: o.name == "linear" and o.place.startswith("blocks.1"), "absolute")], base="epsilon")
    assert {place for place, rule in rules(narrow).items() if rule.name == "absolute"} == {"blocks.1.fc"}


# --- selectors -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("what", "matched"),
    [
        ("first", {"blocks.0.fc"}),
        ("last", {"head"}),
        ("linear & !first", {"blocks.1.fc", "head"}),
        ("first | last", {"blocks.0.fc", "head"}),
        ("(first | last) & blocks.*", {"blocks.0.fc"}),
        ("before(relu)", {"blocks.0.fc"}),
        ("before(activation)", {"blocks.0.fc"}),
        ("before(sum_of_terms)", {"blocks.1.fc"}),
        ("after(add)", {"head"}),
        ("after(relu) & linear", {"blocks.1.fc"}),
        ("%y", {"head"}),
        ("!(linear & !%y)", {"head"}),
    ],
)
def test_selectors(what: str, matched: set[str]) -> None:
    found = rules(Composite([(what, "absolute_0_1")], base="attnlrp"))
    assert {place for place, rule in found.items() if rule.name == "absolute_0_1"} == matched


def test_first_and_last_are_counted_along_the_longest_way() -> None:
    """A skip connection does not make a later layer the first one, nor an earlier one the last."""
    at = Builder(["x"])
    h = at.linear(X, W["a"], place="one")
    h = at.linear(at.add(X, h), W["b"], place="two")
    y = at.add(at.linear(h, W["c"], place="three"), h, result="y")
    graph = Graph("skips", Section((X,), tuple(at.ops), (y,)), weights=W, attrs={"inputs": ("x",), "outputs": ("y",)})
    sites = Sites.of(graph)
    linear = [o.result.name for o in at.ops if o.name == "linear"]
    assert [sites.depth[name] for name in linear] == [0, 1, 2]
    assert [sites.height[name] for name in linear] == [2, 1, 0]


@pytest.mark.parametrize(
    ("what", "fact"),
    [
        ("linear &", "something to select is missing"),
        ("", "something to select is missing"),
        ("(linear", "`)` is missing"),
        ("linear head", "`head` is out of place"),
        ("before(rely)", "names no op kind"),
        ("before()", "names no op kind"),
    ],
)
def test_what_is_no_selector(what: str, fact: str) -> None:
    with pytest.raises(RuleError) as caught:
        Composite([(what, "epsilon")], base="epsilon")
    assert fact in str(caught.value)


def test_a_value_that_is_not_there() -> None:
    with pytest.raises(RuleError, match="%z"):
        rules(Composite([("%z", "epsilon")], base="epsilon"))


def test_a_composite_prints_its_entries() -> None:
    lines = str(Composite([("linear & first", "zbox(low=[-1,-2],high=3)")], base="dlb")).splitlines()
    assert lines[0] == "composite dlb+" and lines[1].split("  ")[1:] == ["linear & first", "zbox(low=[-1,-2],high=3)"]
    assert parse_rule(lines[1].split()[-1]) == parse_rule("zbox([-1, -2], 3)")


# --- options of presets ------------------------------------------------------------------------------

def test_options_of_presets() -> None:
    found = preset("epsilon-gamma-box{low=-1, high=2}").entries
    assert str(found[0][1]).startswith("zbox(low=-1,high=2") and found[0][0] == "convolution & first"
    aware = dict(preset("dlb{activation_aware=true}").entries)
    assert str(aware["layer & before(relu)"]) == "absolute(low=0)"
    assert preset("dlb{activation_aware=false}").entries == preset("dlb").entries
    assert Composite([], base="gamma{gamma=0.1}").name == "gamma{gamma=0.1}+"


@pytest.mark.parametrize(("name", "fact"), [
    ("dlb{aware=true}", "has no option `aware`"), ("dlb{activation_aware=1}", "true or false"),
    ("epsilon{x=1}", "has no option `x`"), ("gamma{gamma=much}", "`much` is no number"),
    ("gamma{gamma=-1}", "gamma"), ("epsilon-gamma-box{low=3,high=1}", "low")])
def test_what_is_no_option(name: str, fact: str) -> None:
    with pytest.raises(RuleError) as caught:
        preset(name)
    assert fact in str(caught.value)


def test_groups_hold_ops_of_the_catalogue_and_every_op_with_a_rule_has_one() -> None:
    assert {name for group in GROUPS.values() for name in group} <= set(OPS)
    grouped = {name for group in GROUPS.values() for name in group} | set(OPS)
    assert {name for name, _ in RULES} <= grouped


# --- presets -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if not preset.plan])
def test_a_preset_has_a_rule_for_every_op_that_has_rules(name: str) -> None:
    chosen = preset(name)
    for kind in {kind for kind, _ in RULES} - {"var", "logsumexp", "prod"}:  # those only by the fallback
        for accumulate in (False, True) if kind == "index_put" else (None,):
            attrs = {} if accumulate is None else {"accumulate": accumulate}
            for constant_factor in (False, True):
                rule = chosen.rule_for(op(kind, **attrs), constant_factor=constant_factor)
                definition = RULES[kind, rule.name]
                assert set(dict(rule.params)) == set(definition.params)


def test_the_table_of_presets() -> None:
    """Design: linear, add, product of carriers, attention, gate, norm."""
    kinds = ("linear", "add", "mul", "attention", "glu", "layer_norm")
    table = {
        name: tuple(preset(name).rule_for(op(kind), constant_factor=False).name for kind in kinds)
        for name, found in PRESETS.items() if not found.plan
    }
    assert table["attnlrp"] == ("epsilon", "epsilon", "half", "attnlrp", "half", "detach")
    assert table["cp-lrp"] == ("epsilon", "epsilon", "half", "cp", "signal", "detach")
    assert table["dlb"] == ("absolute", "absolute", "uniform", "dlb", "uniform", "identity")
    assert table["dlb-0.1"] == ("absolute_0_1", "equal", "uniform", "dlb_0_1", "uniform", "identity")
    assert table["input-x-gradient"] == ("gradient",) * 6


def test_a_product_has_other_rules_than_a_linear_map() -> None:
    chosen = preset("attnlrp")
    assert chosen.rule_for(op("matmul"), constant_factor=True).name == "epsilon"
    assert chosen.rule_for(op("matmul"), constant_factor=False).name == "half"
    assert chosen.rule_for(op("mul"), constant_factor=False) == Rule(
        "half"
    )  # matmul's `half` has an eps, mul's has none


# --- rules as text -----------------------------------------------------------------------------------

def test_rules_as_text() -> None:
    assert parse_rule("epsilon") == Rule("epsilon", (("eps", 1e-9),))
    assert parse_rule(" epsilon( 0.25 ) ") == parse_rule("epsilon(eps=0.25)") == Rule("epsilon", (("eps", 0.25),))
    assert parse_rule("dlb_0_1") == Rule("dlb_0_1")


@pytest.mark.parametrize(
    ("text", "fact", "hint"),
    [
        ("epsilom", "unknown rule `epsilom`", "epsilon"),
        ("zzz", "unknown rule `zzz`", "rules: "),
        ("epsilon(", "unknown rule `epsilon(`", "epsilon"),
        ("epsilon(gamma=1)", "no parameter `gamma`", "eps"),
        ("epsilon(1, 2)", "no parameter `2`", "eps"),
        ("pass(1)", "no parameter `1`", "none"),
        ("epsilon(tiny)", "`tiny` is no number", ""),
        ("epsilon(0)", "must be positive", "denominators"),
        ("epsilon(-1)", "must be positive", "denominators"),
    ],
)
def test_what_is_no_rule(text: str, fact: str, hint: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rule(text)
    assert fact in str(caught.value)
    assert hint in str(caught.value)


# --- what is unknown ---------------------------------------------------------------------------------

def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(RuleError, match=r"unknown rules `atnlrp`(.|\n)*attnlrp"):
        resolve("atnlrp")
    with pytest.raises(RuleError, match="presets: auto"):
        preset("???")
    with pytest.raises(RuleError, match=r"unknown rule `epsilonn`(.|\n)*epsilon"):
        Composite([("linear", "epsilonn")])
    with pytest.raises(RuleError, match=r"`block.0` \(for rule `absolute`\)(.|\n)*did you mean blocks\.0"):
        rules(Composite([("block.0", "absolute")], base="attnlrp"))
    with pytest.raises(RuleError, match="unknown fallback"):
        Composite([], fallback="nothing")


def test_an_op_without_a_rule() -> None:
    with pytest.raises(UnsupportedOpError) as caught:
        rules(Composite([("linear", "epsilon")]))
    assert all(part in str(caught.value) for part in ("`add` has no rule", "blocks.1", "equal", "fallback"))
    with pytest.raises(UnsupportedOpError, match="no rule exists for it yet"):
        preset("attnlrp").rule_for(op("remainder"), constant_factor=False)


def test_the_fallback_is_the_gradient_of_that_op() -> None:
    found = rules(Composite([("linear", "epsilon")], fallback="gradient"))
    assert [found[place].name for place in ("blocks.0.act", "blocks.1", "head")] == ["gradient", "gradient", "epsilon"]
    everything = Composite([], fallback="gradient")
    for kind in {kind for kind, _ in RULES} - {"index_put"}:
        for constant_factor in (False, True):
            rule = everything.rule_for(op(kind), constant_factor=constant_factor)
            assert not {"gradient", "product_gradient"} & {n for k, n in RULES if k == kind} or "gradient" in rule.name
    assert resolve("attnlrp", "gradient").entries == preset("attnlrp").entries
    assert resolve("attnlrp", "gradient").fallback == "gradient"


def test_a_composite_explains() -> None:
    """Only gradients, by fallback, is the preset `input-x-gradient`."""
    rng = np.random.default_rng(2)
    weights = {name: rng.normal(size=(4, 4)) for name in W}
    x, seeds = rng.normal(size=(2, 4)), rng.normal(size=(1, 2, 4))

    def explain(composite: Composite) -> np.ndarray:
        lowered = Lower().run(Pair(rules=composite).run(graph()))
        assert lowered.relevance is not None
        return interpret(lowered, {"x": x}, weights, {lowered.relevance.params[0].name: seeds}).relevance[0]

    gradients = Composite([], fallback="gradient", seed="M")
    np.testing.assert_allclose(explain(gradients), explain(preset("input-x-gradient")))
    assert not np.allclose(explain(Composite([("head", "absolute")], base="attnlrp")), explain(preset("attnlrp")))


def test_a_module_glob_applies_to_the_ops_it_has_a_rule_for() -> None:
    """`blocks.1` holds an add and a linear; `equal` exists for the add only."""
    found = rules(Composite([("blocks.1", "equal")], base="dlb"), replace(graph(), name="again"))
    assert found["blocks.1"].name == "equal"
    assert found["blocks.1.fc"].name == "absolute"
