"""`dlbc explain text --experts`, on a tiny mixture of experts and on a model without any."""

from __future__ import annotations

from pathlib import Path

import pytest

from dlbc_runtime.explanation import Explanation
from dlbc_runtime.generation import GenerationExplanation
from tests.test_cli import WORDS, fails, run, tokenizer


def saved(folder: Path, *, experts: bool) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    common = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **common, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)) if experts else LlamaForCausalLM(
        LlamaConfig(**common))
    model.eval().save_pretrained(folder)
    tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("mixture"), experts=True)


def test_the_experts_are_printed_and_on_the_page(mixture: Path, tmp_path: Path) -> None:
    page, file = tmp_path / "out.html", tmp_path / "out.json"
    found = run("explain", "text", "--model", mixture, "the sky is", "--experts", "--html", page, "--save", file)
    assert found.exit_code == 0, found.output
    assert "experts: 2 layers of 4 experts, 2 for each token" in found.output
    assert "strongest experts" in found.output and found.output.index("experts:") < found.output.index("wrote")
    experts = Explanation.load(file).experts
    assert experts is not None and [layer.experts for layer in experts.layers] == [4, 4]
    assert 'class="card experts"' in page.read_text(encoding="utf-8")
    assert "experts:" not in run("explain", "text", "--model", mixture, "the sky is").output


def test_the_experts_of_a_generation_are_those_of_all_its_tokens(mixture: Path, tmp_path: Path) -> None:
    page, file = tmp_path / "out.html", tmp_path / "out.safetensors"
    found = run("explain", "text", "--model", mixture, "the sky is", "--generate", 3, "--experts", "--html", page,
                "--save", file)
    assert found.exit_code == 0, found.output
    assert "experts: 2 layers of 4 experts, 2 for each token" in found.output
    experts = GenerationExplanation.load(file).experts
    assert experts is not None and experts.seeds == 3
    assert 'class="card experts"' in page.read_text(encoding="utf-8")


def test_a_model_without_experts_is_said_to_have_none(tmp_path: Path) -> None:
    dense = saved(tmp_path, experts=False)
    for more in ((), ("--generate", 2)):
        said = fails("explain", "text", "--model", dense, "the sky is", "--experts", *more)
        assert "the model has no experts" in said and "leave --experts out" in said
