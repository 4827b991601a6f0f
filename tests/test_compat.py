"""`dlbc.compat`: programs written for DL-Backtrace run after changing the import, and are right."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
from dlbc.compat import DLBacktrace, DLBAutoSampler, load_relevance, save_relevance
from dlbc.errors import ArtifactError, InputError
from tests.words import causal, classifier, tokenizer

pytest.importorskip("transformers")
TEXT = "This movie is fantastic"


def tabular() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


X = torch.linspace(-2, 2, 20).reshape(2, 10).sin()


@pytest.fixture(scope="module")
def dlb() -> DLBacktrace:
    return DLBacktrace(tabular(), (X,))


# --- the README's programs, with another import ------------------------------------------------------

def test_quick_start() -> None:
    class MyModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(10, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    model = MyModel().eval()
    x = torch.randn(1, 10)
    dlb = DLBacktrace(model=model, input_for_graph=(x,), device="cpu", verbose=False)
    node_io = dlb.predict(x)
    relevance = dlb.evaluation(mode="default", multiplier=100.0, task="binary-classification")
    np.testing.assert_allclose(node_io["output"]["output_values"], model(x).detach(), rtol=1e-5)
    parts = (model.linear.weight * x).abs().detach()
    wanted = 100 * parts / (parts.sum() + model.linear.bias.abs().detach())
    np.testing.assert_allclose(relevance["x"], wanted, rtol=1e-3)


def test_quick_start_of_text_classification() -> None:
    model = classifier()
    tokens = tokenizer()(TEXT, return_tensors="pt")
    input_ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
    dlb = DLBacktrace(model, (input_ids, attention_mask), device="cpu", verbose=False)
    results = dlb.run_task(task="text-classification",
                           inputs={"input_ids": input_ids, "attention_mask": attention_mask}, debug=False)
    predictions, relevance = results["predictions"], results["relevance"]
    wanted = model(input_ids, attention_mask).logits.argmax(-1)
    assert predictions.argmax(axis=-1) == wanted and relevance["input_ids"].shape == input_ids.shape
    automatic = dlb.run_task(task="auto", inputs={"input_ids": input_ids, "attention_mask": attention_mask})
    np.testing.assert_array_equal(automatic["relevance"]["input_ids"], relevance["input_ids"])


def test_quick_start_of_the_sampler() -> None:
    model, own = causal(max_position_embeddings=80), tokenizer(special=False)
    sampler = DLBAutoSampler(model, own)
    output = sampler.generate("the cat", strategy="greedy", max_length=50)
    wanted = model.generate(**own("the cat", return_tensors="pt"), max_length=50, do_sample=False)
    assert torch.equal(output["generated_ids"], wanted)
    with dlbc.deterministic(0):
        for options in ({"strategy": "top_k", "top_k": 5, "temperature": 0.8},
                        {"strategy": "top_p", "top_p": 0.9, "temperature": 0.8}):
            output = sampler.generate("the cat", **options)
            assert output["explanation"].strategy == options["strategy"]
    output = sampler.generate("the cat", strategy="beam_search", num_beams=5)
    scores = output["relevance_scores"]
    assert scores.shape == (output["generated_ids"].shape[1] - 2, output["generated_ids"].shape[1])
    for row, relevance in enumerate(scores):
        assert not relevance[2 + row:].any() and relevance[:2 + row].any()


def test_quick_start_of_temperature() -> None:
    ids = tokenizer(special=False)("the cat", return_tensors="pt")["input_ids"]
    dlb = DLBacktrace(causal(max_position_embeddings=120), input_for_graph=(ids,))
    with dlbc.deterministic(0):
        output = dlb.generate_with_temperature(ids, temperature=0.7, max_length=100)
    assert torch.equal(output[:, :2], ids) and output.shape[1] > 2


# --- predict and evaluation --------------------------------------------------------------------------

def test_predict_runs_the_model(dlb: DLBacktrace) -> None:
    node_io = dlb.predict(X)
    model = tabular()
    np.testing.assert_allclose(node_io["0"]["output_values"], model[0](X).detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(node_io["output"]["output_values"], model(X).detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(node_io["input"]["output_values"], X) and dlb.node_io is node_io
    warm = dlb.predict(X, temperature=2.0)["output"]["output_values"]
    np.testing.assert_allclose(warm, model(X).detach() / 2, rtol=1e-4, atol=1e-5)
    cold = dlb.apply_temperature_scaling(0.5)["output"]["output_values"]
    np.testing.assert_allclose(cold, model(X).detach() * 2, rtol=1e-4, atol=1e-5)


def test_evaluation_is_the_explainers(dlb: DLBacktrace) -> None:
    dlb.predict(X)
    relevance = dlb.evaluation(multiplier=50.0, scaler=3.0)
    wanted = dlbc.compile(tabular(), X, rules="dlb", cache=False)(X, keep="modules", multiplier=50.0, scaler=3.0)
    assert set(relevance) == {"input", *wanted.nodes} and dlb.all_wt is relevance
    np.testing.assert_allclose(relevance["input"], wanted.relevance["input"], rtol=1e-5)
    for name, array in wanted.nodes.items():
        np.testing.assert_allclose(relevance[name], array, rtol=1e-5)
    chosen = dlb.evaluation(target_token_ids=torch.tensor([2, 0]))["input"]
    np.testing.assert_allclose(chosen, dlb.explainer(X, target=dlbc.Target.index([2, 0])).relevance["input"], rtol=1e-5)


def test_what_changed_nothing_there_does_here(dlb: DLBacktrace) -> None:
    """start_wt, scaler and mode have no effect in DL-Backtrace 0.1."""
    dlb.predict(X)
    plain = dlb.evaluation()["input"]
    weights = np.array([0.25, 0.5, 0.25], np.float32)
    weighted = dlb.evaluation(start_wt=weights)["input"]
    np.testing.assert_allclose(weighted, dlb.explainer(X, target=dlbc.Target.tensor(weights)).relevance["input"],
                               rtol=1e-5)
    np.testing.assert_allclose(dlb.evaluation(scaler=2.0)["input"], 2 * plain, rtol=1e-5)
    contrastive = dlb.evaluation(mode="contrastive")["input"]
    wanted = dlbc.compile(tabular(), X, rules="dlb-contrastive", cache=False)(X)
    np.testing.assert_allclose(contrastive, wanted.relevance["input"], rtol=1e-4, atol=1e-4)
    assert dlb.explanation is not None and set(dlb.explanation.positive) == {"input"}
    assert not np.allclose(contrastive, plain)


def test_padding_gets_nothing_and_changes_nothing() -> None:
    """DL-Backtrace 0.1 ignores masks: a quarter of the relevance lands on padding."""
    model, own = classifier(), tokenizer()
    rows = own([TEXT, "good"], return_tensors="pt", padding=True)
    dlb = DLBacktrace(model, dict(rows))
    dlb.predict(rows["input_ids"], rows["attention_mask"])
    together = dlb.evaluation()["input_ids"][1]
    alone = own("good", return_tensors="pt")
    dlb.predict(**alone)
    single = dlb.evaluation()["input_ids"][0]
    np.testing.assert_allclose(together[:len(single)], single, rtol=1e-3, atol=1e-3)
    assert not together[len(single):].any()


def test_the_users_model_stays_as_it_is() -> None:
    model = tabular().train()
    before = {name: (weight.clone(), weight.requires_grad) for name, weight in model.named_parameters()}
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    dlb = DLBacktrace(model, (X,), strict_cpu=True)
    dlb.predict(X)
    dlb.evaluation()
    dlb.close(unload_model=True)
    assert model.training and torch.is_grad_enabled() == grad and torch.get_num_threads() == threads
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name][0]) and weight.requires_grad == before[name][1]
    assert dlb.node_io == {} == dlb.all_wt


@pytest.mark.parametrize("rank", ["map", "boxes"])
def test_predict_and_evaluation_of_pixels_and_objects(rank: str) -> None:
    from tests.test_run_task import PICTURE, Detector, Segmenter, seeded

    dlb = DLBacktrace(seeded({"map": Segmenter, "boxes": Detector}[rank]), PICTURE)
    outputs = dlb.predict(PICTURE)["output"]["output_values"]
    found = dlb.evaluation(thresholding=0.2, task="binary-segmentation")
    name = {"map": "x", "boxes": "pixel_values"}[rank]
    np.testing.assert_array_equal(found[name],
                                  dlb.explainer.run_task("auto", PICTURE, thresholding=0.2)["relevance"][name])
    assert outputs.shape == ((1, 2, 8, 8) if rank == "map" else (1, 3, 3))


# --- generation --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def prompt() -> Any:
    return tokenizer(special=False)("the cat sat", return_tensors="pt")


@pytest.fixture(scope="module")
def language(prompt: Any) -> DLBacktrace:
    return DLBacktrace(causal(), dict(prompt))


def test_sampling_by_ids(language: DLBacktrace, prompt: Any) -> None:
    own = tokenizer(special=False)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    wanted = language.model.generate(**prompt, max_new_tokens=4, do_sample=False)
    plain = language.sample_auto(own, ids, mask, max_new_tokens=4, top_k=None, num_beams=1, length_penalty=1.0,
                                 relevance_cache_policy="full")
    assert torch.equal(plain, wanted)
    found, info = language.sample_auto(own, ids, max_new_tokens=4, return_relevance=True, return_scores=True)
    assert torch.equal(found, wanted) and set(info) == {"relevance_trace", "scores_trace"}
    for step, relevance in enumerate(info["relevance_trace"]):
        alone = language.explainer(wanted[:, :3 + step], target=int(wanted[0, 3 + step]),
                                   attention_mask=torch.ones(1, 3 + step, dtype=torch.int64)).relevance["input_ids"]
        np.testing.assert_allclose(relevance["input_ids"], alone, rtol=1e-3, atol=1e-3)
    some = language.sample_auto(own, ids, max_new_tokens=4, return_relevance=True, explain_tokens=[1])[1]
    assert len(some["relevance_trace"]) == 1


def test_generation_by_run_task_and_its_figures(language: DLBacktrace, prompt: Any, tmp_path: Path) -> None:
    own = tokenizer(special=False)
    results = language.run_task(
        task="generation", inputs={"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"]},
        tokenizer=own, max_new_tokens=3, return_relevance=True, return_scores=True, save_relevance=True,
        save_path=str(tmp_path), save_format="fp8", save_metadata={"input_text": "the cat sat"}, debug=False)
    assert own.decode(results["generated_ids"][0], skip_special_tokens=True).startswith("the cat sat")
    assert load_relevance(results["save_path"])["metadata"]["input_text"] == "the cat sat"
    pytest.importorskip("matplotlib")
    figure = language.visualize_tokenwise_relevance_map(results["relevance_trace"], prompt["input_ids"], own,
                                                        generated_ids=results["generated_ids"])
    (image,) = figure.axes[0].get_images()
    np.testing.assert_array_equal(image.get_array(), results["relevance"]["input_ids"][:, :3].T)


def test_a_sampler_of_an_explainer_and_what_it_refuses(language: DLBacktrace) -> None:
    own = tokenizer(special=False)
    output = DLBAutoSampler(language.explainer, own).generate("the cat", max_new_tokens=2, return_scores=True)
    assert len(output["scores_trace"]) == output["generated_ids"].shape[1] - 2
    for made in (lambda: DLBAutoSampler(language, None), lambda: DLBAutoSampler(causal(), None)):
        with pytest.raises(InputError, match="no tokenizer"):
            made()
    with pytest.raises(InputError, match="not a torch"):
        DLBAutoSampler("gpt2", own)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="token id 900"):
        DLBAutoSampler(language, own).generate(torch.tensor([[900]]))


# --- files, figures, the rest ------------------------------------------------------------------------

@pytest.mark.parametrize("format", ["fp8", "safetensors", "json", "npz"])
def test_relevance_is_saved_whole(dlb: DLBacktrace, format: str, tmp_path: Path) -> None:
    """DL-Backtrace's fp8 has 16 % error and leaves nodes out."""
    result = dlb.run_task(inputs=X, save_relevance=True, save_path=tmp_path, save_format=format, save_name="own",
                          save_metadata={"note": "hello"}, return_layerwise_output=True)
    path = result["save_path"]
    assert path.name == f"own.{'safetensors' if format == 'fp8' else format}"
    loaded = load_relevance(path)
    assert loaded["metadata"]["note"] == "hello" and loaded["metadata"]["task"] == "tabular-classification"
    (step,) = loaded["relevance_trace"]
    assert set(step) == set(result["relevance"])
    for name, array in result["relevance"].items():
        np.testing.assert_array_equal(step[name], array)


def test_save_and_load_functions(tmp_path: Path) -> None:
    path = save_relevance([{"x": torch.ones(2)}], str(tmp_path), precision="fp16", metadata={"a": 1})
    assert path == str(tmp_path / "relevance.safetensors")
    np.testing.assert_array_equal(load_relevance(path)["relevance_trace"][0]["x"], [1, 1])
    with pytest.raises(ArtifactError, match="no saved relevance"):
        torch.save({"x": torch.ones(2)}, tmp_path / "old.pt")
        load_relevance(tmp_path / "old.pt")
    with pytest.raises(InputError, match="cannot be saved as 'pt'"):
        save_relevance([{"x": torch.ones(2)}], tmp_path, "pt")


def test_figures(dlb: DLBacktrace) -> None:
    pytest.importorskip("matplotlib")
    own = tokenizer(special=False)
    ids = own("the cat sat", return_tensors="pt")["input_ids"]
    trace = [{"input_ids": np.array([[1.0, -2.0, 3.0]])}, {"input_ids": np.array([[0.0, 1.0, 0.0, 5.0]])}]
    whole = torch.cat([ids, torch.tensor([[4, 5]])], 1)
    for generated, names in ((whole, ["the", "a"]), (whole[0, 3:], ["the", "a"]), (None, ["0", "1"])):
        axes = dlb.visualize_tokenwise_relevance_map(trace, ids, own, generated_ids=generated).axes[0]
        assert [label.get_text() for label in axes.get_xticklabels()] == names
        assert [label.get_text() for label in axes.get_yticklabels()] == ["the", "cat", "sat"]
        (image,) = axes.get_images()
        np.testing.assert_array_equal(image.get_array(), [[1, 0], [-2, 1], [3, 0]])
        assert image.get_clim() == (-3, 3)
    one = dlb.visualize_input_heatmap_for_token(trace, 1, ids, own, generated_ids=whole).axes[0]
    np.testing.assert_array_equal(one.get_images()[0].get_array(), [[0, 1, 0]])
    for wrong, says in (({"n": 2}, "no generated token 2"), ({"n": 0, "input_key": "x"}, "no relevance of 'x'"),
                        ({"n": 0, "generated_ids": [4]}, "1 generated ids for 2 steps"),
                        ({"n": 0, "input_ids": [1] * 4}, "about 3 tokens, the input has 4")):
        options: dict[str, Any] = {"input_ids": ids, "tokenizer": own, **wrong}
        with pytest.raises(InputError, match=says):
            dlb.visualize_input_heatmap_for_token(trace, **options)


def test_graphs_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dlb = DLBacktrace(tabular(), (X,))
    for path in (dlb.visualize(tmp_path / "graph.png"), dlb.visualize_dlbacktrace_with_modules(tmp_path / "modules")):
        assert path.exists() and path.suffix in (".png", ".svg")
    plain = (tmp_path / "modules.svg").read_text(encoding="utf-8")
    dlb.predict(X)
    dlb.evaluation()
    drawn = dlb.visualize_dlbacktrace(tmp_path / "backtrace", top_k=3)
    assert drawn == tmp_path / "backtrace.svg" and "<svg" in drawn.read_text(encoding="utf-8")
    assert dlb.visualize_dlbacktrace_with_modules(tmp_path / "after").read_text(encoding="utf-8") != plain
    with pytest.raises(InputError, match="docx"):
        dlb.visualize(tmp_path / "graph.docx")
    dlb.run_task(inputs=X)
    with pytest.raises(InputError, match=r"(?s)of the inputs alone.*evaluation\(\)"):
        dlb.visualize(tmp_path / "graph.svg")
    dlb.clear_intermediates()
    assert dlb.visualize_dlbacktrace(tmp_path / "plain.html").exists()


def test_nodes_know_their_modules(dlb: DLBacktrace) -> None:
    found = dlb.map_fx_nodes_to_modules()
    assert set(found.values()) == {("0", "Linear"), ("1", "ReLU"), ("2", "Linear")}
    assert dlb.fx_node_to_module == found


def test_a_table_of_relevance_is_printed_when_asked(dlb: DLBacktrace, capsys: pytest.CaptureFixture[str]) -> None:
    dlb.predict(X)
    dlb.evaluation()
    assert capsys.readouterr().out == ""
    dlb.print_all_relevance_info()
    assert "[2, 10]" in capsys.readouterr().out


def test_verbose_goes_to_the_log(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO, "dlbc")
    DLBacktrace(tabular(), (X,), verbose=True).predict(X)
    assert "predict: output float32[2, 3]" in caplog.text and capsys.readouterr() == ("", "")


def test_no_cuda_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    dlb = DLBacktrace(tabular(), (X,), device="cuda")
    assert "the CPU is used" in caplog.text and dlb.predict(X)["output"]["output_values"].shape == (2, 3)


# --- bad input ---------------------------------------------------------------------------------------

def test_evaluation_before_predict() -> None:
    dlb = DLBacktrace(tabular(), (X,))
    for call in (dlb.evaluation, dlb.apply_temperature_scaling):
        with pytest.raises(InputError, match=r"(?s)nothing has been predicted.*call predict"):
            call()


@pytest.mark.parametrize(("options", "says"), [
    ({"mode": "both"}, "mode='both'"), ({"task": "guess"}, "no task 'guess'"), ({"multiplier": 0}, "multiplier is 0"),
    ({"start_wt": [1.0, 2.0]}, r"\[2\]"), ({"target_token_ids": [7, 7]}, "target 7 is out of range"),
])
def test_options_of_evaluation(dlb: DLBacktrace, options: dict[str, Any], says: str) -> None:
    dlb.predict(X)
    with pytest.raises(InputError, match=says):
        dlb.evaluation(**options)


def test_other_bad_input(dlb: DLBacktrace) -> None:
    with pytest.raises(InputError, match="not a torch"):
        DLBacktrace("bert", (X,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no device 'abacus'"):
        DLBacktrace(tabular(), (X,), device="abacus")
    with pytest.raises(InputError, match="temperature is -1"):
        dlb.predict(X, temperature=-1)
    with pytest.raises(InputError, match="relevance_cache_policy='ram'"):
        dlb.run_task(inputs=X, relevance_cache_policy="ram")
    with pytest.raises(InputError, match="has no `generate`"):
        dlb.generate_with_temperature(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "..", "", "a\\b", "C:evil"])
def test_files_stay_in_their_folder(name: str, dlb: DLBacktrace, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    if name:
        with pytest.raises(InputError, match=r"(?s)name of a file.*without folders"):
            save_relevance([{"x": np.ones(3)}], folder, name=name)
    with pytest.raises(InputError, match=r"(?s)name of a file.*without folders"):
        dlb.run_task(inputs=X, save_relevance=True, save_path=folder, save_name=name)
    assert list(tmp_path.iterdir()) == []


def test_quick_start_of_other_versions() -> None:
    """The README's quick start at another time: the implementation of layers is named, and the model is training."""
    model = nn.Sequential(nn.Linear(10, 1))
    dlb = DLBacktrace(model=model, input_for_graph=(X,), layer_implementation="pytorch")
    dlb.predict(X)
    assert dlb.evaluation(mode="default", multiplier=100.0, task="binary-classification")["input"].shape == X.shape
    assert model.training


def test_prompts_in_any_form(language: DLBacktrace, prompt: Any) -> None:
    own, options = tokenizer(special=False), {"temperature": 0.5, "max_new_tokens": 3}
    found = []
    for given in (prompt, prompt["input_ids"], prompt["input_ids"].tolist(), "the cat sat", ["the cat sat"]):
        with dlbc.deterministic(1):
            found.append(language.generate_with_temperature(given, tokenizer=own, **options))
    assert all(torch.equal(one, found[0]) for one in found) and found[0].shape[0] == 1
    padded = language.generate_with_temperature(["the cat sat", "the"], tokenizer=own, **options)
    assert padded.shape[0] == 2 and padded[1, :2].tolist() == [0, 0]


@pytest.mark.parametrize(("given", "options", "says"), [
    ("the cat", {}, "no tokenizer"), ([[900]], {}, "holds token 900"), ([[4, 6]], {"max_new_tokens": 39}, "context of"),
    ([[4, 6]], {"max_length": 41}, "context of 40"), ([[4, 6]], {"max_length": 2}, "max_length is 2"),
    ([[4, 6]], {"colour": "red"}, "transformers cannot"), ([[]], {}, "empty"), ([[4]], {"temperature": 0}, "is 0")])
def test_prompts_that_do_not_fit(language: DLBacktrace, given: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        language.generate_with_temperature(given, **options)
    assert caught.value.hint


def test_generate_with_temperature() -> None:
    model = causal()
    ids = tokenizer(special=False)("the cat", return_tensors="pt")["input_ids"]
    dlb = DLBacktrace(model, dict(input_ids=ids, attention_mask=torch.ones_like(ids)))
    with dlbc.deterministic(3):
        found = dlb.generate_with_temperature(ids, temperature=0.7, max_length=12)
    with dlbc.deterministic(3):
        wanted = model.generate(ids, do_sample=True, temperature=0.7, max_length=12)
    assert torch.equal(found, wanted)
