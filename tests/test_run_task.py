"""`explainer.run_task`: every task in one call, with inputs as people have them."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import dlbc
from dlbc.errors import ArtifactError, InputError
from dlbc_runtime.tasks_files import load_relevance, save_relevance
from tests.words import VOCABULARY, causal, classifier, tokenizer

pytest.importorskip("transformers")
Explainer = dlbc.Explainer
TEXT = "the cat sat on the mat"


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


class Segmenter(nn.Module):
    """Two classes [B,2,H,W]; `last` ends it."""

    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 2, 3, padding=1), last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(8 * self.conv(x))


class Detector(nn.Module):
    """Three queries, two classes and "no object", as DETR has them."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Linear(3 * 16, 9), nn.Linear(3 * 16, 12)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        h = F.adaptive_avg_pool2d(pixel_values, 4).flatten(1)
        scores, boxes = self.scores(h).unflatten(1, (3, 3)), self.boxes(h).unflatten(1, (3, 4))
        return {"logits": scores, "pred_boxes": boxes.sigmoid()}


TABLE = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 1.0, -1.0]])
PICTURE = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8).sin()


def compiled(model: nn.Module, *inputs: Any, **named: Any) -> Explainer:
    return dlbc.compile(model, named or inputs, rules="epsilon", cache=False)


@pytest.fixture(scope="module")
def table() -> Explainer:
    return compiled(seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))), TABLE)


@pytest.fixture(scope="module")
def image() -> Explainer:
    return compiled(seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))),
                    PICTURE)


@pytest.fixture(scope="module")
def segmentation() -> Explainer:
    return compiled(seeded(Segmenter), PICTURE)


@pytest.fixture(scope="module")
def detection() -> Explainer:
    return compiled(seeded(Detector), PICTURE)


@pytest.fixture(scope="module")
def text() -> Explainer:
    return compiled(classifier(), **tokenizer()(TEXT, return_tensors="pt"))


@pytest.fixture(scope="module")
def language() -> Explainer:
    return compiled(causal(), **tokenizer()(TEXT, return_tensors="pt"))


# --- tables ------------------------------------------------------------------------------------------

def test_a_table(table: Explainer) -> None:
    result = table.run_task("tabular-classification", TABLE)
    plain = table(TABLE)
    np.testing.assert_array_equal(result["relevance"]["input"], plain.relevance["input"])
    np.testing.assert_array_equal(result["predictions"], plain.outputs["output"])
    assert list(result) == ["task", "node_io", "relevance", "relevance_computed", "predictions"]
    assert (result["task"], result["relevance_computed"], set(result["node_io"])) == (
        "tabular-classification", True, {"input", "output"})
    assert result.explanation.target == plain.target and result.reason == "asked for"
    assert repr(result) == f"TaskResult(task='tabular-classification', {plain!r})"


@pytest.mark.parametrize("given", [
    TABLE[0], TABLE[0].numpy().astype(np.float64), TABLE[0].tolist(), [TABLE[0].tolist()], (TABLE[:1],),
    {"input": TABLE[0]}, {"input": TABLE[:1].tolist()}], ids=["row", "float64", "list", "lists", "tuple", "dict", "d2"])
def test_one_row_in_any_form(table: Explainer, given: object) -> None:
    result = table.run_task(inputs=given)
    np.testing.assert_array_equal(result["relevance"]["input"], table(TABLE[:1]).relevance["input"])


def test_a_data_frame_names_its_columns(table: Explainer) -> None:
    frame = SimpleNamespace(columns=["age", "pay", "size", "cost"], to_numpy=lambda: TABLE.double().numpy())
    result = table.run_task(inputs=frame)
    assert {one.name for one in result.explanation.top(1)} <= {"age", "pay", "size", "cost"}
    np.testing.assert_array_equal(result.relevance["input"], table(TABLE).relevance["input"])


def test_numbers_that_multiply(table: Explainer) -> None:
    plain, scaled = (table.run_task(inputs=TABLE, **options) for options in ({}, {"multiplier": 50.0, "scaler": 4.0}))
    np.testing.assert_allclose(scaled["relevance"]["input"], 2 * plain["relevance"]["input"], rtol=1e-5)


@pytest.mark.parametrize("last", [None, nn.Softmax(-1), nn.LogSoftmax(-1), nn.Sigmoid()])
def test_temperature_divides_logits_and_leaves_relevance(last: nn.Module | None) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), *([last] if last else [])))
    explainer = compiled(model, TABLE)
    warm, plain = (explainer.run_task(inputs=TABLE, temperature=value) for value in (2.5, 1.0))
    logits = model[0](TABLE).detach() / 2.5
    np.testing.assert_allclose(warm.predictions, logits if last is None else last(logits), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(warm.relevance["input"], plain.relevance["input"])


def test_traces(table: Explainer) -> None:
    result = table.run_task(inputs=TABLE, return_scores=True, return_relevance=True, return_layerwise_output=True)
    plain = table(TABLE, keep="modules")
    (relevance,), (layers,), (scores,) = (
        result["relevance_trace"], result["layerwise_output_trace"], result["scores_trace"])
    assert set(relevance) == {"input", *plain.nodes} == set(result["relevance"])
    for name, array in plain.nodes.items():
        np.testing.assert_array_equal(relevance[name], array)
        np.testing.assert_array_equal(layers[name], plain.activations[name])
        np.testing.assert_array_equal(result["node_io"][name], plain.activations[name])
    np.testing.assert_array_equal(scores["output"], result["predictions"])


@pytest.mark.parametrize(("key", "says"), [
    ("relevance_trace", "return_relevance=True"), ("scores_trace", "return_scores=True"),
    ("save_path", "save_relevance=True"), ("layerwise_output_trace", "return_layerwise_output=True"),
    ("generated_ids", "there are task, node_io"), ("reason", "there are task")])
def test_keys_that_were_not_asked_for(table: Explainer, key: str, says: str) -> None:
    result = table.run_task(inputs=TABLE)
    assert key not in result and result.get(key) is None
    with pytest.raises(KeyError, match=says):
        result[key]


def test_debug_tells_and_default_does_not(table: Explainer, caplog: pytest.LogCaptureFixture,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO, "dlbc_runtime")
    table.run_task("tabular-classification", TABLE)
    assert [record.getMessage() for record in caplog.records] == ["task tabular-classification: asked for"]
    table.run_task("tabular-classification", TABLE, debug=True)
    assert "relevance of input: [2, 4], sum" in caplog.text and "explained: output[" in caplog.text
    assert capsys.readouterr() == ("", "")


def test_columns_of_categories_beside_numbers() -> None:
    from tests.zoo import CASES

    case = CASES["tabular_embeddings"]()
    explainer = compiled(case.model, *case.args)
    result = explainer.run_task(inputs=case.args)
    assert result["task"] == "tabular-classification"
    np.testing.assert_array_equal(result["relevance"]["numbers"], explainer(*case.args).relevance["numbers"])


def test_targets(table: Explainer) -> None:
    result = table.run_task(inputs=TABLE, target=[0, dlbc.Target.difference(1, 2)])
    np.testing.assert_array_equal(result["relevance"]["input"],
                                  table(TABLE, target=[0, dlbc.Target.difference(1, 2)]).relevance["input"])


def test_modes() -> None:
    explainer = dlbc.compile(seeded(lambda: nn.Linear(4, 3)), TABLE, rules="dlb-contrastive", cache=False)
    result = explainer.run_task(inputs=TABLE, mode="contrastive")
    assert result.explanation.contrastive
    np.testing.assert_array_equal(result["relevance"]["input"], explainer(TABLE).relevance["input"])


def test_a_numpy_explainer() -> None:
    model = seeded(lambda: nn.Linear(4, 3))
    explainer = dlbc.compile(model, TABLE, rules="epsilon", backend="numpy", cache=False)
    for given in (TABLE, TABLE.numpy(), TABLE.tolist()):
        np.testing.assert_allclose(explainer.run_task(inputs=given)["predictions"], model(TABLE).detach(), rtol=1e-5)


# --- texts -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given", [TEXT, [TEXT], {"text": TEXT}], ids=["text", "list", "dict"])
def test_a_text(text: Explainer, given: object) -> None:
    ids = tokenizer()(TEXT, return_tensors="pt")
    result = text.run_task("text-classification", given, tokenizer())
    plain = text(**ids)
    np.testing.assert_allclose(result["relevance"]["input_ids"], plain.relevance["input_ids"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result["predictions"], plain.outputs["logits"], rtol=1e-5)
    assert result.explanation.tokens == (("[CLS]", *TEXT.split(), "[SEP]"),)


def test_texts_of_different_lengths_are_what_they_are_alone(text: Explainer) -> None:
    texts = [TEXT, "a dog ran"]
    together = text.run_task(inputs=texts, tokenizer=tokenizer())
    assert together["predictions"].shape == (2, 3) and together.explanation.rows == 2
    for row, one in enumerate(texts):
        alone = text.run_task(inputs=one, tokenizer=tokenizer())
        np.testing.assert_allclose(together.explanation.relevance_of("input_ids", row),
                                   alone["relevance"]["input_ids"][0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(together["predictions"][row], alone["predictions"][0], rtol=1e-4, atol=1e-5)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.lists(st.lists(st.sampled_from(VOCABULARY[4:]), min_size=1, max_size=8), min_size=1, max_size=4))
def test_no_text_matters_to_another(texts: list[list[str]]) -> None:
    """Each row of any batch is what it is alone, and its padding has nothing."""
    explainer, own = law(), tokenizer()
    joined = [" ".join(one) for one in texts]
    together = explainer.run_task(inputs=joined, tokenizer=own)
    relevance = together["relevance"]["input_ids"]
    for row, one in enumerate(joined):
        alone = explainer.run_task(inputs=one, tokenizer=own)["relevance"]["input_ids"][0]
        assert np.linalg.norm(relevance[row, :len(alone)] - alone) <= 1e-4 * np.linalg.norm(alone)
        assert not relevance[row, len(alone):].any()


@functools.cache
def law() -> Explainer:
    return compiled(classifier(), **tokenizer()(TEXT, return_tensors="pt"))


def test_results_show_their_explanations(text: Explainer, capsys: pytest.CaptureFixture[str]) -> None:
    result = text.run_task(inputs=TEXT, tokenizer=tokenizer())
    assert result._repr_html_() == result.explanation._repr_html_()
    result.show()
    assert "mat" in capsys.readouterr().out


def test_what_a_tokenizer_returns(text: Explainer) -> None:
    ids = tokenizer()(TEXT, return_tensors="pt")
    wanted = text(**ids).relevance["input_ids"]
    for given in (ids, dict(ids), tuple(ids.values()), {name: value.numpy() for name, value in ids.items()},
                  {"input_ids": ids["input_ids"][0].tolist()}):
        result = text.run_task(inputs=given, tokenizer=tokenizer())
        np.testing.assert_allclose(result["relevance"]["input_ids"], wanted, rtol=1e-4, atol=1e-4)


def test_pairs_of_texts(text: Explainer) -> None:
    result = text.run_task(inputs={"text": "the cat", "text_pair": "a dog ran"}, tokenizer=tokenizer())
    assert result.explanation.tokens == (("[CLS]", "the", "cat", "[SEP]", "a", "dog", "ran", "[SEP]"),)


def test_the_tokenizer_and_labels_of_the_models_folder(tmp_path: Path) -> None:
    model = classifier(id2label={0: "bad", 1: "fair", 2: "good"})
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    explainer = compiled(loaded, **tokenizer()(TEXT, return_tensors="pt"))
    if getattr(explainer, "model", None) is None:
        pytest.skip("explainers do not know their model")
    result = explainer.run_task(inputs=TEXT)
    assert result.explanation.tokens == (("[CLS]", *TEXT.split(), "[SEP]"),)
    assert result.explanation.target[0].label in ("bad", "fair", "good")


# --- pictures ----------------------------------------------------------------------------------------

def processed(picture: Any) -> Tensor:
    return torch.from_numpy(np.asarray(picture, np.float32)).permute(2, 0, 1) / 255


def test_pictures_by_a_function(image: Explainer, tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    array = (np.arange(8 * 8 * 3).reshape(8, 8, 3) % 256).astype(np.uint8)
    picture = pillow.fromarray(array)
    picture.save(tmp_path / "one.png")
    wanted = image(processed(array)[None])
    for given in (picture, array, tmp_path / "one.png", str(tmp_path / "one.png"), [picture]):
        result = image.run_task("image-classification", given, processed)
        np.testing.assert_allclose(result["relevance"]["input"], wanted.relevance["input"], rtol=1e-4, atol=1e-5)
        assert result.explanation.images is not None and result.explanation.images[0].shape == (8, 8, 3)
    pair = image.run_task("auto", [picture, array], processed)
    assert pair["predictions"].shape == (2, 3)
    grey = image.run_task("auto", picture.convert("L"), processed)
    assert grey["predictions"].shape == (1, 3)


def test_pictures_by_a_processor_are_shown_as_they_were(image: Explainer) -> None:
    pillow, transformers = pytest.importorskip("PIL.Image"), pytest.importorskip("transformers")
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    processor = transformers.ViTImageProcessorPil if hasattr(transformers, "ViTImageProcessorPil") else (
        transformers.ViTImageProcessor)
    own = processor(size={"height": 8, "width": 8}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    pixels = own(images=pillow.fromarray(array), return_tensors="pt")["pixel_values"]
    result = image.run_task(inputs=pillow.fromarray(array), tokenizer=own)
    np.testing.assert_allclose(result["predictions"], image(pixels).outputs["output"], rtol=1e-5)
    assert result.explanation.images is not None
    assert np.abs(result.explanation.images[0].astype(int) - array).max() <= 1


def test_a_picture_as_a_tensor(image: Explainer) -> None:
    np.testing.assert_array_equal(image.run_task(inputs=PICTURE[0])["relevance"]["input"],
                                  image(PICTURE).relevance["input"])


# --- segmentation and detection ----------------------------------------------------------------------

@pytest.mark.parametrize("last", [None, nn.Softmax(1)], ids=["logits", "probabilities"])
def test_segmentation_explains_the_pixels_above_the_threshold(last: nn.Module | None) -> None:
    model = seeded(lambda: Segmenter(last))
    explainer = compiled(model, PICTURE)
    likely = (8 * model.conv(PICTURE)).softmax(1).detach()
    result = explainer.run_task("segmentation", PICTURE, thresholding=0.7)
    inside = likely > 0.7
    chosen = int(inside[0].sum((1, 2)).argmax())
    weights = torch.zeros_like(likely)
    weights[0, chosen] = inside[0, chosen] / inside[0, chosen].sum()
    wanted = explainer(PICTURE, target=dlbc.Target.tensor(weights))
    np.testing.assert_allclose(result["relevance"]["x"], wanted.relevance["x"], rtol=1e-3, atol=1e-5)
    assert result.explanation.target[0].text == f"output class {chosen}, {int(inside[0, chosen].sum())} of 64 pixels"


def test_segmentation_of_one_class_and_by_row(segmentation: Explainer) -> None:
    both = torch.cat([PICTURE, -PICTURE])
    one = segmentation.run_task("auto", both, thresholding=0.1, target=1)
    assert [each.text.split(",")[0] for each in one.explanation.target] == ["output class 1"] * 2
    result = segmentation.run_task(inputs=both)
    for row in range(2):
        alone = segmentation.run_task(inputs=both[row])
        np.testing.assert_allclose(result["relevance"]["x"][row], alone["relevance"]["x"][0], rtol=1e-3, atol=1e-5)


def test_detection_explains_the_surest_object(detection: Explainer) -> None:
    logits = seeded(Detector)(PICTURE)["logits"][0].softmax(-1)[:, :-1].detach()
    query, index = divmod(int(logits.argmax()), 2)
    result = detection.run_task("object-detection", PICTURE, thresholding=0.2)
    wanted = detection(PICTURE, target=dlbc.Target.box(query, index))
    np.testing.assert_allclose(result["relevance"]["pixel_values"], wanted.relevance["pixel_values"], rtol=1e-4,
                               atol=1e-6)
    assert result.explanation.target[0].text == f"class {index} of query {query} (p={float(logits.max()):.2f})"
    assert result["predictions"].shape == (1, 3, 3) and "pred_boxes" in result["node_io"]
    other = detection.run_task(inputs=PICTURE, thresholding=0.0, target=1 - index)
    query = int(logits[:, 1 - index].argmax())
    assert f"class {1 - index} of query {query} " in other.explanation.target[0].text
    box = detection.run_task(inputs=PICTURE, target=dlbc.Target.box(query, 0))
    np.testing.assert_array_equal(box["relevance"]["pixel_values"],
                                  detection(PICTURE, target=dlbc.Target.box(query, 0)).relevance["pixel_values"])


@pytest.mark.parametrize("rules", ["input-x-gradient", "dlb", "dlb-contrastive"])
def test_pixels_and_objects_by_other_rules(rules: str) -> None:
    """Signed seeds, and rivals, are those of the targets by hand."""
    mode = "contrastive" if rules == "dlb-contrastive" else "default"
    pixels = dlbc.compile(seeded(Segmenter), PICTURE, rules=rules, cache=False)
    found = pixels.run_task(inputs=PICTURE, mode=mode)
    chosen = int(found.explanation.target[0].text.split()[2].rstrip(","))
    wanted = pixels(PICTURE, target=dlbc.Target.mask(chosen, logits=True))
    np.testing.assert_array_equal(found["relevance"]["x"], wanted.relevance["x"])
    objects = dlbc.compile(seeded(Detector), PICTURE, rules=rules, cache=False)
    logits = seeded(Detector)(PICTURE)["logits"].detach()
    for index in range(2):
        query = int(logits.softmax(-1)[0, :, index].argmax())
        found = objects.run_task(inputs=PICTURE, mode=mode, target=index, thresholding=0.0)
        wanted = objects(PICTURE, target=dlbc.Target.box(query, index))
        np.testing.assert_allclose(found["relevance"]["pixel_values"], wanted.relevance["pixel_values"], rtol=1e-4,
                                   atol=1e-6)


# --- which task --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "given", "task", "says"), [
    ("table", TABLE, "tabular-classification", "numbers of a table in, one row of scores out"),
    ("image", PICTURE, "image-classification", "pictures in, one row of scores out"),
    ("segmentation", PICTURE, "segmentation", "pictures in, scores for each pixel out"),
    ("text", TEXT, "text-classification", "token ids in, one row of scores out"),
])
def test_auto(name: str, given: object, task: str, says: str, request: pytest.FixtureRequest,
              caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dlbc_runtime")
    result = request.getfixturevalue(name).run_task(inputs=given, tokenizer=tokenizer() if name == "text" else None)
    assert result["task"] == task and says in result.reason
    assert f"task {task}: {result.reason}" in caplog.text


def test_auto_detection(detection: Explainer) -> None:
    assert detection.run_task(inputs=PICTURE, thresholding=0.2)["task"] == "object-detection"


@pytest.mark.parametrize(("name", "task", "says"), [
    ("table", "tabular", ["no task 'tabular'", "did you mean 'tabular-classification'", '"generation"']),
    ("table", "text-classification", ["does not do text-classification", "f32[B,4]", '"tabular-classification"']),
    ("table", "generation", ["does not do generation"]),
    ("image", "segmentation", ["does not do segmentation", "f32[B,3]", '"image-classification"']),
    ("segmentation", "image-classification", ["does not do image-classification", '"segmentation"']),
    ("text", "generation", ["does not do generation", '"text-classification"']),
    ("text", "tabular-classification", ["does not do tabular-classification"]),
    ("language", "text-classification", ["does not do text-classification", '"generation"']),
    ("detection", "segmentation", ["does not do segmentation", '"object-detection"']),
    ("table", None, ["no task None"]),
])
def test_tasks_that_do_not_fit(name: str, task: Any, says: list[str], request: pytest.FixtureRequest) -> None:
    with pytest.raises(InputError) as caught:
        request.getfixturevalue(name).run_task(task, TABLE)
    assert all(word in str(caught.value) for word in says), str(caught.value)


def test_a_model_that_no_task_is_known_for() -> None:
    per_position = compiled(seeded(lambda: nn.Linear(4, 2)), torch.zeros(1, 5, 4))
    with pytest.raises(InputError, match=r"(?s)no task is known.*Target.tensor"):
        per_position.run_task(inputs=torch.zeros(1, 5, 4))


# --- files -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("format", ["json", "safetensors", "npz"])
def test_relevance_is_saved_and_read_back(text: Explainer, format: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_relevance": True, "save_path": tmp_path / "out", "save_format": format}
    result = text.run_task(inputs=TEXT, tokenizer=tokenizer(), **options)
    path = result["save_path"]
    assert path == tmp_path / "out" / f"relevance.{format}"
    read = load_relevance(path)
    assert len(read.steps) == 1 and set(read.steps[0]) == set(result["relevance_trace"][0])
    for name, array in result["relevance"].items():
        np.testing.assert_array_equal(read.steps[0][name], array)
        assert read.steps[0][name].dtype == array.dtype
    assert read.metadata["task"] == "text-classification" and read.metadata["rules"] == "epsilon"
    assert read.metadata["explained"] == [{"target": [str(result.explanation.target[0])],
                                           "tokens": [["[CLS]", *TEXT.split(), "[SEP]"]]}]
    again = text.run_task(inputs=TEXT, tokenizer=tokenizer(), **options)
    assert again["save_path"].name == f"relevance-2.{format}"
    named = text.run_task(inputs=TEXT, tokenizer=tokenizer(), save_relevance=True, save_format=format,
                          save_path=tmp_path / f"own.{format}")
    assert named["save_path"] == tmp_path / f"own.{format}" and len(load_relevance(named["save_path"]).steps) == 1


def test_several_steps_and_names_with_dots(tmp_path: Path) -> None:
    steps = [{"model.layers.0": np.ones((1, 2), np.float32), "a/b": np.zeros(3)}, {"x": np.float32([[1]])}]
    for format in ("json", "safetensors", "npz"):
        read = load_relevance(save_relevance(steps, tmp_path, format, metadata={"note": "é"}))
        assert [set(step) for step in read.steps] == [set(step) for step in steps]
        assert read.metadata == {"note": "é"}


@pytest.mark.parametrize(("path", "format", "says"), [
    ("out", "pt", ["'pt'", "pickle", "json, safetensors, npz"]), ("out", "fp8", ["'fp8'", "safetensors"]),
    ("out.json", "npz", ["ends in .json", "out.npz"]), ("", "json", ["save_path is ''"]),
    (3, "json", ["save_path is 3"]), ("file.txt/x", "json", ["is a file"]),
])
def test_places_that_cannot_be(table: Explainer, path: object, format: str, says: list[str], tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    place = tmp_path / path if isinstance(path, str) and path else path
    with pytest.raises(InputError) as caught:
        table.run_task(inputs=TABLE, save_relevance=True, save_path=place, save_format=format)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in says), str(caught.value)
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("name", ["a.json", "a.npz", "a.safetensors", "a.pt"])
@pytest.mark.parametrize("content", [b"", b"{}", b"not data", json.dumps({"format": "other", "arrays": {}}).encode(),
                                     b"PK\x03\x04broken"])
def test_files_that_are_something_else(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match="no saved relevance"):
        load_relevance(tmp_path / name)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_relevance(tmp_path / "none.json")


# --- bad input ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("options", "says"), [
    ({"mode": "both"}, ["mode='both'", '"contrastive"']),
    ({"mode": "contrastive"}, ["'epsilon'", "not contrastive", "dlb-contrastive"]),
    ({"thresholding": 1.0}, ["thresholding is 1.0", "0 to below 1"]),
    ({"thresholding": -0.1}, ["thresholding is -0.1"]),
    ({"thresholding": float("nan")}, ["thresholding is nan"]), ({"thresholding": "0.5"}, ["thresholding is '0.5'"]),
    ({"temperature": 0}, ["temperature is 0", "above 0"]), ({"temperature": float("inf")}, ["temperature is inf"]),
    ({"multiplier": 0.0}, ["multiplier is 0.0"]), ({"scaler": float("nan")}, ["scaler is nan"]),
    ({"max_new_tokens": 3}, ["`max_new_tokens` is no option of tabular-classification", "generation"]),
    ({"keep": "all"}, ["`keep` is an option of calls"]),
    ({"inputs": None}, ["no inputs"]), ({"inputs": "text"}, ["table input, not str 'text'", "f32[B,4]"]),
    ({"inputs": object()}, ["not numbers", "f32[B,4]"]), ({"inputs": [["a", "b"]]}, ["not numbers"]),
    ({"inputs": TABLE[:, :3]}, ["axis 1", "3", "4"]), ({"inputs": {"inputs": TABLE}}, ["did you mean `input`"]),
    ({"target": 3}, ["3", "out of range"]),
])
def test_options_that_do_not_fit(table: Explainer, options: dict[str, Any], says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        table.run_task(**{"inputs": TABLE, **options})
    assert all(word in str(caught.value) for word in says), str(caught.value)


def added() -> Any:
    """A tokenizer with a token that the model never learnt."""
    own = tokenizer()
    own.add_tokens(["[NEW]"])
    return own


@pytest.mark.parametrize(("given", "with_", "says"), [
    (TEXT, None, ["no tokenizer", "AutoTokenizer"]), (TEXT, "bert", ["tokenizer is str"]),
    ("  ", tokenizer, ["the text is empty"]), ([TEXT, ""], tokenizer, ["text 1 is empty"]),
    ([TEXT, 3], tokenizer, ["entry 1 is int"]), ([], tokenizer, ["no tokens"]),
    (" ".join(["cat"] * 60), tokenizer, ["62 tokens", "at most 40"]),
    (TEXT, lambda: tokenizer(extra=50), ["has 74 tokens", f"the model {len(VOCABULARY)}", "another model's"]),
    ("[NEW]", added, ["token id 24", f"vocabulary of {len(VOCABULARY)}", "belongs to this model"]),
    (torch.tensor([[0, 900]]), tokenizer, ["token id 900", f"vocabulary of {len(VOCABULARY)}"]),
    ({"input_ids": torch.tensor([[-1]])}, tokenizer, ["token id -1"]),
    ({"text": TEXT, "labels": 1}, tokenizer, ["'labels' is given beside a text"]),
    ({"text": [TEXT, TEXT], "text_pair": TEXT}, tokenizer, ["2 texts and 1 second"]),
    (b"bytes", tokenizer, ["not bytes"]),
])
def test_texts_that_do_not_fit(text: Explainer, given: object, with_: Any, says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        text.run_task(inputs=given, tokenizer=with_() if callable(with_) else with_)
    assert all(word in str(caught.value) for word in says), str(caught.value)


@pytest.mark.parametrize(("given", "with_", "says"), [
    ("cat.png", processed, ["no picture 'cat.png'"]), (b"png", processed, ["picture 0 is bytes", "pillow"]),
    (np.zeros((8, 8, 3), np.uint8), None, ["no processor"]), (np.zeros((8, 8, 3), np.uint8), 3, ["processor is int"]),
    (np.zeros((8, 8), np.uint8), processed, ["uint8[8, 8]", "[H,W,3]"]),
    (PICTURE.double(), None, ["f64", "f32"]), (PICTURE[:, :1], None, ["axis 1", "1", "3"]),
    (object(), None, ["not numbers", "f32[B,3,8,8]"]),
])
def test_pictures_that_do_not_fit(image: Explainer, given: object, with_: Any, says: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        image.run_task(inputs=given, tokenizer=with_)
    assert all(word in str(caught.value) for word in says), str(caught.value)


def test_a_tokenizer_with_few_of_the_tokens_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = classifier(vocab_size=100)
    explainer = compiled(model, **tokenizer()(TEXT, return_tensors="pt"))
    explainer.run_task(inputs=TEXT, tokenizer=tokenizer())
    assert "the tokenizer has 24 tokens, the model 100: are they of the same model?" in caplog.text


def test_pictures_of_different_sizes(image: Explainer) -> None:
    pictures = [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]
    with pytest.raises(InputError, match=r"(?s)of the shapes \[\[3, 8, 8\], \[3, 9, 8\]\].*of one size"):
        image.run_task(inputs=pictures, tokenizer=processed)


def test_files_that_are_no_pictures(image: Explainer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InputError, match="no picture that can be read"):
        image.run_task(inputs=tmp_path / "a.png", tokenizer=processed)


def test_nothing_above_the_threshold(segmentation: Explainer, detection: Explainer) -> None:
    with pytest.raises(InputError, match=r"(?s)no pixel of row 0 .* above 0.9999; the highest is .*lower thresholding"):
        segmentation.run_task(inputs=PICTURE * 0, thresholding=0.9999)
    with pytest.raises(InputError, match=r"(?s)no object in row 0 .* above 0.99; the surest, query \d, class \d"):
        detection.run_task(inputs=PICTURE, thresholding=0.99)
    with pytest.raises(InputError, match=r"(?s)target 2 is no class.*0 to 1"):
        detection.run_task(inputs=PICTURE, target=2)
    with pytest.raises(InputError, match="target 2 is out of range"):
        segmentation.run_task(inputs=PICTURE, target=2)
