"""Relevance of the first token taken apart: what changes, what does not, how it is shown and kept."""

from __future__ import annotations

import functools
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import dlbc
from dlbc.errors import ArtifactError, InputError
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.views import terminal
from dlbc_runtime.views.html import page
from tests import zoo

pytest.importorskip("transformers")


@functools.cache
def explainer(name: str = "llama", rules: str = "attnlrp") -> Explainer:
    case = zoo.CASES[name]()
    return dlbc.compile(case.model, case.args or dict(case.kwargs), rules=rules, cache=False)


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_the_first_visible_token_changes(side: str) -> None:
    inputs = zoo.padded((9, 4, 6), side)
    whole, found = explainer()(**inputs), explainer()(**inputs, sinks="apart")
    first = np.array([0, 0, 0] if side == "right" else [0, 5, 3])
    rows = np.arange(3)
    expected = whole.relevance["input_ids"].copy()
    assert np.array_equal(found.sinks["input_ids"], expected[rows, first])
    assert found.sinks["input_ids"].dtype == np.float32 and found.sinks["input_ids"].all()
    expected[rows, first] = 0
    assert np.array_equal(found.relevance["input_ids"], expected)
    assert found.sink_of("input_ids", 1) == (first[1], pytest.approx(float(found.sinks["input_ids"][1])))
    assert not whole.sinks and whole.sink_of("input_ids") is None


def test_the_ledger_counts_it_at_the_inputs() -> None:
    inputs = zoo.padded((5, 7))
    whole, found = explainer()(**inputs).conservation(), explainer()(**inputs, sinks="apart").conservation()
    assert found == whole and found.closes()


def test_one_number_for_each_target_and_row() -> None:
    inputs = zoo.padded((5, 7))
    found = explainer()(**inputs, sinks="apart", target=[0, 1, dlbc.Target.difference(0, 1)])
    assert found.sinks["input_ids"].shape == (3, 2)
    alone = explainer()(**inputs, sinks="apart", target=1)
    scale = float(np.abs(alone.sinks["input_ids"]).max())  # one row's is near 0, where rounding is most of it
    np.testing.assert_allclose(found.sinks["input_ids"][1], alone.sinks["input_ids"], rtol=1e-5, atol=1e-6 * scale)
    assert found.sink_of("input_ids", 1, 2) == (0, pytest.approx(float(found.sinks["input_ids"][2, 1])))


def test_a_classifier_with_an_attention_mask_has_a_first_token() -> None:
    inputs = zoo.padded((5, 7))
    found = explainer("bert", "cp-lrp")(**inputs, sinks="apart")
    assert list(found.sinks) == ["input_ids"] and not found.relevance["input_ids"][:, 0].any()


def test_without_a_mask_it_is_the_first_of_all() -> None:
    words = zoo.ids(2, 6)
    found = explainer("gpt2_ids_only")(input_ids=words, sinks="apart")
    assert not found.relevance["input_ids"][:, 0].any() and found.sink_of("input_ids", 1) is not None


def test_contrastive_relevance_of_both_sides_goes_with_it() -> None:
    inputs = zoo.padded((5, 7))
    whole = explainer("llama", "dlb-contrastive")(**inputs)
    found = explainer("llama", "dlb-contrastive")(**inputs, sinks="apart")
    assert np.array_equal(found.sinks["input_ids"], whole.relevance["input_ids"][:, 0])
    for part in (found.relevance, found.positive, found.negative):
        assert not part["input_ids"][:, 0].any() and part["input_ids"][:, 1:].any()


@pytest.mark.parametrize(("model", "inputs", "fact"), [
    (nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), r"it takes no token ids \[B,T\]"),
    (nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 3)), torch.randint(0, 9, (2, 5)), "no attention mask"),
])
def test_models_without_a_first_token_say_so(model: nn.Module, inputs: torch.Tensor, fact: str) -> None:
    compiled = dlbc.compile(model.eval(), inputs, rules="epsilon", cache=False)
    with pytest.raises(InputError, match=f"no first token: .*{fact}") as raised:
        compiled(inputs, sinks="apart")
    assert raised.value.where == 'sinks="apart"' and raised.value.hint
    with pytest.raises(InputError, match="sinks='drop'"):
        compiled(inputs, sinks="drop")
    assert not compiled(inputs, sinks="keep").sinks


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_it_survives_a_file(suffix: str, tmp_path: Path) -> None:
    found = explainer()(**zoo.padded((5, 7)), sinks="apart")
    loaded = Explanation.load(found.save(tmp_path / f"x{suffix}"))
    assert np.array_equal(loaded.sinks["input_ids"], found.sinks["input_ids"])
    assert loaded.sink_of("input_ids", 1) == found.sink_of("input_ids", 1)


def test_a_sink_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    found = explainer()(**zoo.padded((5, 7)), sinks="apart")
    with pytest.raises(InputError, match=r"sinks have shape \[3\], the relevance \[2, 7\]"):
        replace(found, sinks={"input_ids": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="one number for each row"):
        replace(found, sinks={"other": np.zeros(2, np.float32)})
    path = found.save(tmp_path / "x.json")
    path.write_text(path.read_text().replace('"sinks/input_ids"', '"sinks/other"'))
    with pytest.raises(ArtifactError, match="damaged"):
        Explanation.load(path)


def test_it_is_one_line_in_the_terminal_and_on_the_page() -> None:
    inputs = zoo.padded((5, 7), "left")
    whole = explainer()(**inputs).with_tokens([[f"w{i}" for i in range(7)]] * 2)
    found = explainer()(**inputs, sinks="apart").with_tokens([[f"w{i}" for i in range(7)]] * 2)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal.render(found))
    for shown in (console.export_text(), page([found])):
        assert shown.count("shown apart: ") == 2 and "first token w2 (position 2), shown apart: " in shown
    assert "shown apart" not in page([whole])
