"""Experts of an explanation: what is counted of them, parts and wholes, files, and what does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.experts import ExpertLayer, Experts, ExpertSpec
from dlbc_runtime.explanation import Explanation
from tests.experts_example import experts, explanation

PLACE = "model.layers.0.mlp"
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.integers(1, 3), st.integers(0, 2),
                   st.booleans(), st.integers(0, 99))


def layer_of(experts: Experts) -> ExpertLayer:
    return experts[PLACE]


def some(shape: tuple[int, int, int, int, int, bool, int]) -> Experts:
    rows, tokens, count, k, targets, shared, seed = shape
    return experts(2, count, min(k, count), (rows, tokens), targets=targets, shared=shared, seed=seed)


# --- what is counted ----------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_the_columns_of_a_layer_add_up_to_what_entered_it(shape: tuple[int, int, int, int, int, bool, int]) -> None:
    """Expert by expert, token by token, or all at once: the same sum; and nothing for who was not chosen."""
    found = some(shape)
    for layer in found.layers:
        lead = (layer.seeds,) if layer.many_targets else ()
        whole = layer.relevance.reshape(*lead, -1).sum(-1, dtype=np.float64)
        if layer.shared is not None:
            whole = whole + layer.shared.reshape(*lead, -1).sum(-1, dtype=np.float64)
        np.testing.assert_allclose(layer.entering, whole, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(layer.by_token.reshape(*lead, -1).sum(-1), whole, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(layer.totals[..., layer.counts == 0], 0.0)
        assert layer.counts.sum() == layer.ids.size
        np.testing.assert_allclose(layer.load.sum(), layer.k)
        assert 0.0 <= layer.entropy <= math.log(layer.experts) + 1e-12 and 0 <= layer.normalised_entropy <= 1 + 1e-12
    np.testing.assert_allclose(found.by_token().sum((-1, -2)), sum(found.by_layer().values()), rtol=1e-5, atol=1e-5)
    for place, totals in found.all_layer_expert_relevance().items():
        assert totals.shape == (found[place].experts,)
        np.testing.assert_allclose(totals, found[place].totals.reshape(-1, found[place].experts).sum(0))


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.randoms(use_true_random=False))
def test_tokens_in_another_order_are_the_same_tokens(shape: tuple[int, int, int, int, int, bool, int],
                                                     random: object) -> None:
    found = layer_of(some(shape))
    order = np.random.default_rng(random.randrange(999)).permutation(found.rows[1])  # type: ignore[attr-defined]
    moved = ExpertLayer.of(found.spec, found.ids[:, order], found.weights[:, order], found.relevance[..., order, :],
                           None if found.shared is None else found.shared[..., order], many_targets=found.many_targets)
    np.testing.assert_array_equal(moved.by_token, found.by_token[..., order])
    np.testing.assert_array_equal(moved.counts, found.counts)
    np.testing.assert_array_equal(moved.coactivation, found.coactivation)
    np.testing.assert_allclose(moved.totals, found.totals, rtol=1e-6, atol=1e-6)


def test_counts_loads_and_entropy_of_a_layer_by_hand() -> None:
    ids = np.array([[[0, 2], [2, 3], [2, 0], [2, 3]]])
    weights = np.array([[[0.5, 0.5], [0.9, 0.1], [0.7, 0.3], [0.6, 0.4]]], np.float32)
    relevance = np.array([[[1, -2], [3, 0.5], [4, 0.25], [1, 1]]], np.float32)
    layer = ExpertLayer.of(ExpertSpec(PLACE, 4, False, 2), ids, weights, relevance)
    assert layer.totals.tolist() == [1.25, 0.0, 6.0, 1.5]
    assert layer.counts.tolist() == [2, 0, 4, 2] and layer.load.tolist() == [0.5, 0.0, 1.0, 0.5]
    assert layer.coactivation.tolist() == [[2, 0, 2, 0], [0, 0, 0, 0], [2, 0, 4, 2], [0, 0, 2, 2]]
    assert layer.by_token.tolist() == [[-1.0, 3.5, 4.25, 2.0]] and layer.entering == 8.75
    assert math.isclose(layer.entropy, 1.5 * math.log(2)) and math.isclose(layer.normalised_entropy, 0.75)
    assert layer.top(2) == [(2, 6.0), (3, 1.5)] and layer.top(by="negative") == []


def test_even_routing_has_the_largest_entropy_and_one_expert_none() -> None:
    even = ExpertLayer.of(ExpertSpec(PLACE, 4), np.arange(4)[None, :, None], np.ones((1, 4, 1)), np.ones((1, 4, 1)))
    one = ExpertLayer.of(ExpertSpec(PLACE, 4), np.zeros((1, 4, 1), int), np.ones((1, 4, 1)), np.ones((1, 4, 1)))
    assert math.isclose(even.entropy, math.log(4)) and even.normalised_entropy == 1.0
    assert one.entropy == 0.0 and one.normalised_entropy == 0.0


def test_masked_tokens_route_nowhere() -> None:
    whole = layer_of(experts(rows=(2, 5)))
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    shared = whole.shared
    assert shared is not None
    layer = ExpertLayer.of(whole.spec, whole.ids, whole.weights, whole.relevance, shared, visible=mask)
    assert (layer.ids[~mask] == -1).all() and not layer.weights[~mask].any() and not layer.relevance[~mask].any()
    assert layer.shared is not None and not layer.shared[~mask].any()
    np.testing.assert_array_equal(layer.ids[mask], whole.ids[mask])
    assert layer.counts.sum() == 2 * mask.sum() and math.isclose(layer.load.sum(), 2.0)
    assert layer.coactivation.sum() == 4 * mask.sum()
    # The same tokens as one list of rows.
    flat = ExpertLayer.of(whole.spec, *(one.reshape(10, 2) for one in (whole.ids, whole.weights, whole.relevance)),
                          shared.reshape(10), visible=mask)
    np.testing.assert_array_equal(flat.totals, layer.totals)
    # Rows that are not these tokens are left as they are.
    pooled = ExpertLayer.of(whole.spec, *(one[:, 0] for one in (whole.ids, whole.weights, whole.relevance)),
                            shared[:, 0], visible=mask)
    assert (pooled.ids >= 0).all()


# --- questions ----------------------------------------------------------------------------------------

def test_the_strongest_experts_of_a_token_over_all_layers() -> None:
    found = experts()
    for token in (0, 5, -1):
        shares = found.top(token, k=4)
        sizes = [abs(one.relevance) for one in shares]
        assert len(shares) == 4 and sizes == sorted(sizes, reverse=True)
        for one in shares:
            layer, place = found[one.place], one.token
            assert place == token % 8 and layer.shared is not None
            if one.expert is None:
                assert one.relevance == layer.shared[0, place] and one.weight == 1.0
            else:
                slot = layer.ids[0, place].tolist().index(one.expert)
                assert one.relevance == layer.relevance[0, place, slot] and one.weight == layer.weights[0, place, slot]
    every = found.top(3, k=99)
    assert len(every) == 4 * 3 and math.isclose(sum(one.relevance for one in every), found.by_token()[0, 3],
                                                rel_tol=1e-6)
    assert all(one.relevance < 0 for one in found.top(3, k=99, by="negative"))
    everywhere = found.top(k=1)[0]
    assert everywhere.token == -1 and abs(everywhere.relevance) == max(
        abs(total) for layer in found.layers for total in (*layer.totals, layer.shared_total))


def test_one_row_and_one_target_are_chosen_without_padding() -> None:
    found = explanation(experts(rows=(3, 8), targets=2)).experts
    assert found is not None
    one = found.of_row(1, 1)
    layer = one[PLACE]
    np.testing.assert_array_equal(layer.relevance, found[PLACE].relevance[1, 1])
    np.testing.assert_array_equal(layer.ids, found[PLACE].ids[1])
    assert not one.many_targets and one.tokens == (found.tokens or ())[1:2] and [t.index for t in one.target] == [8]
    short = Experts(found.layers, lengths=(8, 5, 8)).of_row(1)
    assert short[PLACE].rows == (5,) and short[PLACE].counts.sum() == 10


def test_a_layer_without_a_sequence_has_one_token_in_each_row() -> None:
    whole = layer_of(experts(rows=(3, 1), shared=False))
    layer = ExpertLayer.of(whole.spec, whole.ids[:, 0], whole.weights[:, 0], whole.relevance[:, 0])
    found = Experts((layer,))
    assert found.rows == 3 and found.of_row(2)[PLACE].rows == ()
    np.testing.assert_allclose(found.top(0, row=2, k=1)[0].relevance, whole.relevance[2].ravel()[
        np.abs(whole.relevance[2]).argmax()])
    np.testing.assert_array_equal(layer.totals, whole.totals)


# --- parts and wholes ---------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2), st.booleans(), st.integers(0, 99))
def test_parts_joined_are_the_whole(cut: int, targets: int, shared: bool, seed: int) -> None:
    whole = experts(2, 5, 2, (4, 3), targets=targets, shared=shared, seed=seed)

    def rows(own: slice) -> Experts:
        return Experts(tuple(ExpertLayer.of(
            layer.spec, layer.ids[own], layer.weights[own], layer.relevance[(..., own, slice(None), slice(None))],
            None if layer.shared is None else layer.shared[..., own, :], many_targets=layer.many_targets)
            for layer in whole.layers))

    assert_same(Experts.joined([rows(slice(0, cut)), rows(slice(cut, 4))], "rows"), whole)
    if targets:
        assert_same(Experts.joined([of_targets(whole, slice(0, 1)), of_targets(whole, slice(1, 9))], "targets"), whole)


def of_targets(whole: Experts, own: slice) -> Experts:
    return Experts(tuple(ExpertLayer.of(layer.spec, layer.ids, layer.weights, layer.relevance[own],
                                        None if layer.shared is None else layer.shared[own], many_targets=True)
                         for layer in whole.layers))


def test_parts_of_different_lengths_are_joined_as_the_longest() -> None:
    short, long = experts(rows=(1, 3)), experts(rows=(2, 5), seed=1)
    found = Experts.joined([short, long], "rows")
    layer = found[PLACE]
    assert layer.rows == (3, 5) and (layer.ids[0, 3:] == -1).all() and not layer.relevance[0, 3:].any()
    np.testing.assert_array_equal(layer.ids[0, :3], short[PLACE].ids[0])
    np.testing.assert_array_equal(layer.relevance[1:], long[PLACE].relevance)
    np.testing.assert_allclose(layer.totals, short[PLACE].totals + long[PLACE].totals)


def test_single_targets_joined_become_many() -> None:
    parts = [experts(shared=False), experts(shared=False)]
    found = Experts.joined(parts, "targets")
    assert found.many_targets and found.seeds == 2
    np.testing.assert_array_equal(found[PLACE].totals[1], parts[1][PLACE].totals)


def test_what_was_not_computed_was_routed_nowhere() -> None:
    found = experts(rows=(2, 3), targets=2)
    longer = found.lengthened(7)
    for before, after in zip(found.layers, longer.layers, strict=True):
        assert after.rows == (2, 7) and (after.ids[:, 3:] == -1).all() and not after.weights[:, 3:].any()
        assert after.shared is not None and not after.shared[..., 3:].any()
        np.testing.assert_array_equal(after.totals, before.totals)
        np.testing.assert_array_equal(after.load, before.load)
    assert_same(longer.lengthened(4), longer)


def assert_same(found: Experts, expected: Experts) -> None:
    assert list(found) == list(expected) and found.many_targets == expected.many_targets
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.spec == other.spec and (one.shared is None) == (other.shared is None)
        for name in one.arrays:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype


# --- files --------------------------------------------------------------------------------------------

@settings(max_examples=10, deadline=None)
@given(st.integers(1, 2), st.integers(0, 2), st.booleans(), st.sampled_from([".json", ".safetensors"]))
def test_what_is_saved_is_loaded(rows: int, targets: int, shared: bool, suffix: str) -> None:
    import tempfile

    found = explanation(experts(rows=(rows, 4), targets=targets, shared=shared))
    with tempfile.TemporaryDirectory() as folder:
        back = Explanation.load(found.save(Path(folder) / f"e{suffix}"))
    assert back.experts is not None and found.experts is not None
    assert_same(back.experts, found.experts)
    assert back.experts.tokens == found.tokens and list(back.experts.target) == list(found.target)


def test_masked_tokens_stay_masked_in_a_file(tmp_path: Path) -> None:
    layer = layer_of(experts(rows=(1, 8)))
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1]], bool)
    found = explanation(Experts((ExpertLayer.of(layer.spec, layer.ids, layer.weights, layer.relevance, layer.shared,
                                                visible=mask),)))
    back = Explanation.load(found.save(tmp_path / "e.json"))
    assert back.experts is not None and found.experts is not None
    assert_same(back.experts, found.experts)


def test_an_explanation_without_experts_has_none(tmp_path: Path) -> None:
    found = Explanation(outputs={}, relevance={"x": np.ones((1, 2))}, inputs={"x": np.ones((1, 2))})
    assert found.experts is None and Explanation.load(found.save(tmp_path / "e.json")).experts is None
    assert "experts" not in found.to_dict()


@pytest.mark.parametrize("damage", ["spec", "missing", "extra", "id", "shape", "kind"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = explanation(experts(2)).save(tmp_path / "e.json")
    stored = json.loads(path.read_text())
    match damage:
        case "spec":
            stored["experts"][0]["experts"] = 0
        case "missing":
            del stored["arrays"]["experts/1.weights"]
        case "extra":
            stored["arrays"]["experts/7.ids"] = stored["arrays"]["experts/0.ids"]
        case "id":
            stored["arrays"]["experts/0.ids"]["data"][0] = 8
        case "shape":
            stored["arrays"]["experts/0.weights"] = stored["arrays"]["experts/0.shared"]
        case "kind":
            stored["arrays"]["experts/0.ids"]["dtype"] = "float32"
    path.write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match="damaged"):
        Explanation.load(path)


def test_experts_alone_as_json(tmp_path: Path) -> None:
    found = experts(2)
    stored = json.loads(found.save(tmp_path / "experts.json").read_text())
    assert [one["place"] for one in stored["layers"]] == list(found)
    assert stored["layers"][0]["entropy"] == found.layers[0].entropy
    assert np.allclose(stored["layers"][1]["totals"]["data"], found.layers[1].totals)
    with pytest.raises(InputError, match=r"cannot write experts as '\.png'"):
        found.save(tmp_path / "experts.png")


# --- what does not fit --------------------------------------------------------------------------------

def test_shapes_that_do_not_fit_are_refused() -> None:
    layer = layer_of(experts())
    with pytest.raises(InputError, match=r"experts of model\.layers\.0\.mlp: ids \[1, 8, 2\]"):
        ExpertLayer.of(layer.spec, layer.ids, layer.weights[:, :4], layer.relevance, layer.shared)
    with pytest.raises(InputError, match=r"with many targets \[targets, \*rows, k\]"):
        ExpertLayer.of(layer.spec, layer.ids, layer.weights, layer.relevance, layer.shared, many_targets=True)
    with pytest.raises(InputError, match="shared None"):
        ExpertLayer.of(layer.spec, layer.ids, layer.weights, layer.relevance)
    with pytest.raises(InputError, match="ids from 0 to 9 of 8 experts"):
        _ = ExpertLayer.of(layer.spec, np.array([[[0, 9]]]), np.ones((1, 1, 2)), np.ones((1, 1, 2)),
                           np.ones((1, 1))).totals


def test_layers_that_do_not_fit_together_are_refused() -> None:
    one, other = experts(1), experts(1, targets=2)
    with pytest.raises(InputError, match=r"two layers of experts are called 'model\.layers\.0\.mlp'"):
        Experts((*one.layers, *one.layers))
    with pytest.raises(InputError, match="different targets"):
        Experts((one.layers[0], experts(2, targets=2).layers[1]))
    with pytest.raises(InputError, match="different models"):
        Experts.joined([one, experts(2)], "rows")
    with pytest.raises(InputError, match=r"tokens of the shapes \[\[1, 8\], \[2, 8\]\]"):
        Experts((one.layers[0], experts(2, rows=(2, 8)).layers[1])).by_token()
    assert other.many_targets


def test_questions_that_do_not_fit_are_refused() -> None:
    found = experts(1)
    with pytest.raises(InputError, match="token 8 of 8"):
        found.top(8)
    with pytest.raises(InputError, match="row 1, target 0 of 1 rows, 1 targets"):
        found.of_row(1)
    with pytest.raises(InputError, match="unknown order 'size'"):
        found.top(0, by="size")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"there are model\.layers\.0\.mlp"):
        found["model.layers.7.mlp"]
