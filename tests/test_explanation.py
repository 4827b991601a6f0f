"""The explanation as data: its questions, its presentation, its files, and the conservation table."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dlbc_runtime.arrays import Arrays, array_from_json, array_to_json
from dlbc_runtime.errors import ArtifactError, InputError
from dlbc_runtime.explained import Explained, Method
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.explanation_file import LARGE, write_whole
from dlbc_runtime.ledger import Ledger, LedgerRow

ROOT = Path(__file__).parents[1]
LEDGER = Ledger.of(
    [LedgerRow("head", "linear", 1.0, 0.75, {"bias": 0.25}, "epsilon(1e-06)"),
     LedgerRow("block", "softmax", 0.75, 0.5, {"non-conservative": 0.25 - 1e-9, "stabiliser": 1e-9})],
    seed=1.0, inputs={"input_ids": 0.5})


def text(relevance: list[float] | None = None, **fields: object) -> Explanation:
    """Four tokens, one row."""
    values = np.array([relevance or [0.5, -0.25, 0.0, 0.125]], np.float32)
    explained = Explained(output="logits", index=7, position=3, value=2.5, probability=0.62, label=" Paris")
    plain = Explanation(outputs={"logits": np.zeros((1, 9), np.float32)}, relevance={"input_ids": values},
                        inputs={"input_ids": np.array([[5, 6, 7, 8]])}, target=(explained,), rules="attnlrp",
                        method=Method("tiny", "numpy", 1.0, {"forward": 0.012}, {"dlbc": "0.1.0"}))
    return replace(plain, **fields)  # type: ignore[arg-type]


def table(rows: int = 2, seeds: int | None = None) -> Explanation:
    """Three features; `seeds` targets where given."""
    shape = (rows, 3) if seeds is None else (seeds, rows, 3)
    relevance = np.arange(math.prod(shape), dtype=np.float32).reshape(shape) - 2
    target = [Explained(row=row, seed=seed, output="y", index=seed)
              for seed in range(seeds or 1) for row in range(rows)]
    return Explanation(outputs={"y": np.ones((rows, 2), np.float32)}, relevance={"x": relevance},
                       inputs={"x": np.full((rows, 3), 0.5, np.float32)}, target=tuple(target),
                       many_targets=seeds is not None)


def same(first: Explanation, second: Explanation) -> None:
    for group in ("outputs", "relevance", "inputs", "nodes", "activations"):
        one, other = getattr(first, group), getattr(second, group)
        assert list(one) == list(other)
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])
    for name in ("target", "rules", "method", "many_targets", "tokens", "features", "ledger"):
        assert getattr(first, name) == getattr(second, name)
    assert len(first.images or ()) == len(second.images or ())
    for image, other in zip(first.images or (), second.images or (), strict=True):
        np.testing.assert_array_equal(image, other)


class FakeTokenizer:
    """Ids to tokens, as transformers has it; None beyond the vocabulary."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [{5: "The", 6: "Ġcapital", 7: "ĠParis", 8: "Ġis"}.get(i) for i in ids]  # type: ignore[misc]


# Questions


def test_relevance_has_the_shape_of_the_input() -> None:
    with pytest.raises(InputError, match=r"relevance has shape \[1, 4\], the input \[1, 3\]"):
        Explanation(outputs={}, relevance={"x": np.zeros((1, 4))}, inputs={"x": np.zeros((1, 3))})
    with pytest.raises(InputError, match="must have \\[targets, "):
        Explanation(outputs={}, relevance={"x": np.zeros((1, 3))}, inputs={"x": np.zeros((1, 3))}, many_targets=True)


def test_rows_and_targets() -> None:
    one = table(rows=3, seeds=2)
    assert (one.rows, one.seeds) == (3, 2)
    assert one.explained(row=2, seed=1) == Explained(row=2, seed=1, output="y", index=1)
    assert one.explained(row=3) is None
    np.testing.assert_array_equal(one.relevance_of("x", row=2, seed=1), one.relevance["x"][1, 2])
    assert replace(one, target=()).rows == 3


def test_an_input_without_a_batch_belongs_to_the_only_row() -> None:
    one = Explanation(outputs={}, relevance={"x": np.ones(3)}, inputs={"x": np.ones(3)}, target=(Explained(),))
    assert one.relevance_of("x").shape == (3,)


@pytest.mark.parametrize(("by", "expected"), [
    ("absolute", [(0, 0.5), (1, -0.25), (3, 0.125)]), ("positive", [(0, 0.5), (3, 0.125)]), ("negative", [(1, -0.25)])])
def test_top(by: str, expected: list[tuple[int, float]]) -> None:
    found = text().top(by=by)  # type: ignore[arg-type]
    assert [(one.index[0], one.relevance) for one in found] == expected
    assert [one.name for one in text().with_tokens(["a", "b", "c", "d"]).top(1)] == ["a"]


def test_top_of_each_row_and_target() -> None:
    found = table(rows=2, seeds=2).top(1)
    assert [(one.seed, one.row, one.index, one.relevance) for one in found] == [
        (0, 0, (0,), -2.0), (0, 1, (2,), 3.0), (1, 0, (2,), 6.0), (1, 1, (2,), 9.0)]
    assert table().with_features(["age", "height", "weight"]).top(1)[1].name == "weight"


def test_top_across_inputs_skips_what_is_not_a_number() -> None:
    one = Explanation(outputs={}, relevance={"a": np.array([[math.nan, 1.0]]), "b": np.array([[math.inf, -2.0]])},
                      inputs={"a": np.zeros((1, 2)), "b": np.zeros((1, 2))}, target=(Explained(),))
    assert [(found.input, found.relevance) for found in one.top()] == [("b", -2.0), ("a", 1.0)]
    assert [found.input for found in one.top(input="a")] == ["a"]
    assert one.top(0) == []
    with pytest.raises(InputError, match="one of 'a', 'b'"):
        one.top(input="c")
    with pytest.raises(InputError, match="absolute, positive or negative"):
        one.top(by="size")  # type: ignore[arg-type]


def test_top_pixels_sum_the_channels() -> None:
    relevance = np.zeros((1, 3, 4, 5), np.float32)
    relevance[0, :, 2, 3] = 1.0
    one = Explanation(outputs={}, relevance={"x": relevance}, inputs={"x": relevance}, target=(Explained(),))
    assert [(found.index, found.relevance, found.name) for found in one.top()] == [((2, 3), 3.0, "row 2, column 3")]


def test_what_was_explained_in_words() -> None:
    assert str(Explained(output="logits", index=3)) == "logits[3]"
    assert str(text().target[0]) == "' Paris' (p=0.62) at position 3"
    assert str(Explained(index=1, against=2, label="cat", value=1.5)) == "'cat' rather than output[2] (value 1.5)"
    assert text().target[0].plain_name == "Paris"
    assert Explained(label=" ").plain_name == "' '"
    assert Explained(text="sum of both").name == "sum of both"
    assert "' Paris' (p=0.62)" in repr(text()) and "[1, 4]" in repr(text())


# Tensors


def test_tensors_become_arrays_when_first_asked_for() -> None:
    import torch

    tensors = Arrays({"x": torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True), "y": np.float16([1.5])})
    assert tensors.shape("x") == (2, 3)
    assert isinstance(tensors._source["x"], torch.Tensor)
    assert (tensors["x"].dtype, tensors["y"].dtype) == (np.float32, np.float32)
    assert tensors["x"] is tensors["x"]
    one = Explanation(outputs={}, relevance={"x": torch.ones(1, 3)}, inputs={"x": torch.ones(1, 3)},  # type: ignore[dict-item]
                      target=(Explained(),))
    assert isinstance(one.relevance["x"], np.ndarray)


def test_importing_the_runtime_is_light() -> None:
    code = ("import sys, dlbc_runtime, dlbc_runtime.explanation, dlbc_runtime.ledger; print([name for name in "
            "('torch', 'rich', 'matplotlib', 'jinja2', 'safetensors', 'PIL') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "runtime")},
                          capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Presentation


def test_with_tokens() -> None:
    one = text()
    shown = one.with_tokens([["a", "b", "c", "d"]])
    assert shown.tokens == (("a", "b", "c", "d"),) and one.tokens is None
    assert one.with_tokens(["a", "b", "c", "d"]).tokens == shown.tokens
    with pytest.raises(InputError, match=r"row 0 has 2 tokens; the inputs have \[4\]"):
        one.with_tokens(["a", "b"])
    with pytest.raises(InputError, match="2 rows of tokens for 1 batch row"):
        one.with_tokens([["a"], ["b"]])
    with pytest.raises(InputError, match="list of tokens"):
        one.with_tokens("abcd")


def test_with_a_tokenizer() -> None:
    explained = replace(text().target[0], label=None, against=6)
    shown = text(target=(explained,)).with_tokens(FakeTokenizer())
    assert shown.tokens == (("The", "Ġcapital", "ĠParis", "Ġis"),)
    assert (shown.target[0].label, shown.target[0].against_label) == (" Paris", " capital")
    # A class is no token, and an id beyond the vocabulary shows as a number.
    classified = text(target=(Explained(index=7),), inputs={"input_ids": np.array([[5, 6, 7, 99]])})
    shown = classified.with_tokens(FakeTokenizer())
    assert shown.target[0].label is None and shown.tokens is not None and shown.tokens[0][3] == "99"
    with pytest.raises(InputError, match="no input holds token ids"):
        table().with_tokens(FakeTokenizer())
    with pytest.raises(InputError, match="no input 'ids'"):
        text().with_tokens(FakeTokenizer(), input="ids")


@pytest.mark.parametrize("labels", [["no", "yes"], {1: "yes"}, lambda index: "yes"])
def test_with_labels(labels: list[str]) -> None:
    assert text(target=(Explained(index=1),)).with_labels(labels).target[0].label == "yes"
    assert text(target=(Explained(),)).with_labels(labels).target[0].label is None


def test_labels_features_and_pictures_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="index 7 was explained, but there are 2 labels"):
        text().with_labels(["no", "yes"])
    with pytest.raises(InputError, match="2 names fit none of the inputs"):
        table().with_features(["a", "b"])
    with pytest.raises(InputError, match="1 pictures for 2 batch rows"):
        table().with_image(np.zeros((4, 4, 3), np.uint8))
    for wrong in (np.zeros((4, 4, 2), np.uint8), np.full((4, 4, 3), 7.0), np.zeros(4), np.full((4, 4), 300)):
        with pytest.raises(InputError, match="picture"):
            text().with_image(wrong)


def test_pictures_of_any_kind() -> None:
    for image in (np.full((4, 5, 3), 255, np.uint8), np.ones((4, 5)), [np.ones((4, 5, 4))], np.ones((1, 4, 5, 1))):
        shown = text().with_image(image).images
        assert shown is not None and shown[0].shape == (4, 5, 3) and (shown[0] == 255).all()


# Conservation


def test_the_ledger_adds_up() -> None:
    assert LEDGER.absorbed == pytest.approx({"bias": 0.25, "non-conservative": 0.25, "stabiliser": 1e-9})
    assert list(LEDGER.absorbed) == ["bias", "non-conservative", "stabiliser"]
    assert LEDGER.closes(1e-12) and LEDGER.leaks() == ()
    assert LEDGER.summary().startswith("seed 1 = 0.5 at the inputs + 0.25 absorbed by bias")
    assert Ledger.of([], seed=0.0, inputs={}).closes()


def test_a_ledger_that_does_not_add_up_says_where() -> None:
    leaking = replace(LEDGER, rows=(*LEDGER.rows, LedgerRow("leak", "add", 1.0, 0.9)))
    assert not leaking.closes() and [row.place for row in leaking.leaks()] == ["leak"]
    assert str(leaking.leaks()[0]) == "leak: add got 1, passed on 0.9: 0.1 is left over"
    worse = replace(leaking, rows=(*leaking.rows, LedgerRow("worse", "add", 1.0, 2.0),
                                   LedgerRow("nan", "add", 1, math.nan)))
    assert [row.place for row in worse.leaks()] == ["nan", "worse", "leak"]
    assert [row.place for row in LEDGER.by_absorbed()] == ["head", "block"]
    assert not replace(LEDGER, inputs={"input_ids": 0.4}).closes()
    assert not replace(LEDGER, seed=math.nan).closes()
    assert not replace(LEDGER, rows=(LedgerRow("a", "add", math.nan, 0.0),)).closes()


@given(st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 2), max_size=20), st.floats(-1e3, 1e3))
def test_ledgers_made_to_close_do_and_come_back_from_json(absorbed: list[tuple[float, float]], left: float) -> None:
    rows, flow = [], left
    for place, (bias, stabiliser) in enumerate(absorbed):
        incoming = flow + bias + stabiliser
        rows.append(LedgerRow(str(place), "linear", incoming, flow, {"bias": bias, "stabiliser": stabiliser}))
        flow = incoming
    ledger = Ledger.of(reversed(rows), seed=flow, inputs={"x": left})
    assert ledger.closes(1e-9)
    assert Ledger.from_dict(json.loads(json.dumps(ledger.to_dict()))) == ledger


def test_the_ledger_as_a_table() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(replace(LEDGER, rows=(*LEDGER.rows, LedgerRow("[red]x", "add", 0, 0))))
    printed = console.export_text()
    assert "conservation of relevance" in printed and "linear <epsilon(1e-06)>" in printed and "[red]x" in printed
    assert LEDGER.table(limit=1).row_count == 2  # one, and "… 1 more"
    assert list(LEDGER.table(by="absorbed").columns[0].cells) == ["head", "block"]


def test_conservation_is_computed_once_and_when_asked_for() -> None:
    calls: list[int] = []

    def source() -> Ledger:
        calls.append(1)
        return LEDGER

    one = text(ledger_source=source)
    copy = one.with_tokens(["a", "b", "c", "d"])
    assert one.ledger is None and calls == []
    assert one.conservation() is LEDGER and copy.conservation() is LEDGER and copy.ledger is LEDGER
    assert calls == [1]
    with pytest.raises(InputError, match="no conservation table"):
        text().conservation()


# Files


def everything() -> Explanation:
    one = text([0.1, -math.inf, math.nan, 1e-30], ledger_source=lambda: LEDGER,
               nodes={"block/0": np.zeros((1, 0), np.float32), "scalar": np.float32(2.5).reshape(())},
               activations={"mask": np.array([[True, False]])})
    one.conservation()
    picture = np.arange(36, dtype=np.uint8).reshape(3, 4, 3).transpose(1, 0, 2)  # not in plain order
    return one.with_tokens(["a", "\u2581b", "<s>", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")]
                           ).with_image(picture)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
@pytest.mark.parametrize("make", [everything, lambda: table(seeds=2).with_features("abc"), lambda: table(rows=1)])
def test_files_come_back(make: Callable[[], Explanation], suffix: str, tmp_path: Path) -> None:
    one = make()
    path = one.save(tmp_path / "new folder" / f"e{suffix}")
    same(one, Explanation.load(path))
    same(one, Explanation.load(str(path)))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_arrays_in_any_memory_order_are_saved_as_they_are(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    one = Explanation(outputs={}, relevance={"x": values}, inputs={"x": values[::-1]}, target=())
    same(one, Explanation.load(one.save(tmp_path / "e.safetensors")))


@given(hnp.arrays(st.sampled_from([np.float32, np.float64, np.int64, np.int8, np.uint8, np.bool_]),
                  hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)))
def test_arrays_come_back_from_json_exactly(array: npt.NDArray[np.generic]) -> None:
    back = array_from_json(json.loads(json.dumps(array_to_json(array), allow_nan=False)))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


def test_json_is_compact_and_leaves_large_outputs_out(tmp_path: Path) -> None:
    one = text(outputs={"logits": np.zeros((1, LARGE + 1), np.float32)})
    path = one.save(tmp_path / "e.json")
    assert path.stat().st_size < 1200
    assert json.loads(path.read_text())["arrays"]["relevance/input_ids"]["data"] == [0.5, -0.25, 0.0, 0.125]
    loaded = Explanation.load(path)
    assert loaded.omitted == ("outputs/logits",) and not loaded.outputs
    assert "outputs/logits" in one.to_dict(complete=True)["arrays"]  # type: ignore[operator]
    same(one, Explanation.load(one.save(tmp_path / "all.json", complete=True)))
    same(one, Explanation.load(one.save(tmp_path / "e.safetensors")))
    assert not Explanation.load(one.save(tmp_path / "few.safetensors", complete=False)).outputs


def test_unknown_suffixes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.safetensors, \.json, \.html or \.png"):
        text().save(tmp_path / "e.pickle")
    with pytest.raises(ArtifactError, match="for looking at"):
        Explanation.load(tmp_path / "e.html")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Explanation.load(tmp_path / "missing.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.json"
    path.write_text("old")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_every_cut_file_is_refused(suffix: str, tmp_path: Path) -> None:
    content = everything().save(tmp_path / f"e{suffix}").read_bytes()
    path = tmp_path / f"cut{suffix}"
    for length in {*range(0, len(content), max(1, len(content) // 60)), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match="hint:"):
            Explanation.load(path)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = text().save(tmp_path / "e.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not those that were saved"):
        Explanation.load(path)


def test_foreign_files_and_other_versions_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save

    (tmp_path / "model.safetensors").write_bytes(save({"weight": np.zeros(3)}))
    (tmp_path / "other.json").write_text('{"format": "else"}')
    (tmp_path / "list.json").write_text("[1]")
    for name in ("model.safetensors", "other.json", "list.json"):
        with pytest.raises(ArtifactError, match="not an explanation"):
            Explanation.load(tmp_path / name)
    stored = text().to_dict()
    (tmp_path / "new.json").write_text(json.dumps({**stored, "version": 2}))
    with pytest.raises(ArtifactError, match="written in version 2"):
        Explanation.load(tmp_path / "new.json")


BROKEN: dict[str, object] = {
    "target": [{"row": -1}], "many_targets": "yes", "rules": None, "method": {"model": 3}, "tokens": [["a"], ["b"]],
    "features": {"input_ids": ["a"]}, "ledger": {"seed": "many"}, "omitted": "x",
    "arrays": {"relevance/input_ids": {"dtype": "float32", "shape": [9], "data": [1]}}}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_do_not_fit_together_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps({**text().to_dict(), name: BROKEN[name]}))
    with pytest.raises(ArtifactError, match="damaged"):
        Explanation.load(tmp_path / "e.json")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                    max_leaves=6), st.sampled_from([*BROKEN, "arrays/relevance/input_ids"]))
def test_no_content_makes_loading_fail_otherwise(tmp_path_factory: pytest.TempPathFactory, value: object,
                                                 name: str) -> None:
    stored = text().to_dict()
    if name.startswith("arrays/"):
        stored["arrays"] = {name.removeprefix("arrays/"): value}  # type: ignore[dict-item]
    else:
        stored[name] = value  # type: ignore[assignment]
    path = tmp_path_factory.mktemp("any") / "e.json"
    path.write_text(json.dumps(stored))
    try:
        Explanation.load(path)
    except ArtifactError as error:
        assert error.hint
