"""The models that costs are measured on, with their baseline: plain forward and the gradient of the input.

Weights are random, float32, without gradients of their own; for language models the baseline computes the head at the
last position only (`logits_to_keep=1`): all logits would make it slower and flatter us.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests"), str(Path(__file__).resolve().parent)]

from _measure import input_gradient  # noqa: E402

Run = Callable[[], object]
BASELINE = "forward + gradient"


@dataclass(frozen=True)
class Case:
    """A model, the inputs that it is called with, and the baseline's run."""

    model: nn.Module
    inputs: Any
    baseline: Run

    def explanation(self, rules: str, **options: Any) -> Run:
        """A run that explains what the model says of the inputs."""
        import dlbc

        given = {"target": options.pop("target")} if "target" in options else {}
        explainer = dlbc.compile(self.model, self.inputs, rules=rules, cache=False, **options)
        args, kwargs = ((), self.inputs) if isinstance(self.inputs, dict) else ((self.inputs,), {})
        return lambda: dict(explainer(*args, **given, **kwargs).relevance)


def llama(tokens: int = 128, *, layers: int = 8, modeling: Any = None) -> Case:
    """A 512-wide LLaMA with a vocabulary of 32,000, and a prompt. `modeling`: the module that has its classes."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=max(2048, tokens))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (modeling or transformers).LlamaForCausalLM(config).eval().requires_grad_(False)
        ids = torch.randint(0, 32000, (1, tokens))
    embed = model.get_input_embeddings()

    def forward(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits
        return logits

    return Case(model, ids, lambda: input_gradient(forward, embed(ids)))


def qwen3_moe(tokens: int = 128, *, experts: int = 16, used: int = 16) -> Case:
    """A 512-wide Qwen3-MoE of 4 layers, top 2 of `experts`, of which tokens are routed to the first `used` only; and a
    prompt. The baseline runs experts by grouped products, transformers' default."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, moe_intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, head_dim=64, num_experts=used, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=max(2048, tokens))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
        ids = torch.randint(0, 32000, (1, tokens))
    if experts > used:
        config.num_experts = config.num_local_experts = experts
        larger = transformers.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
        for name, own in larger.named_parameters():
            weight = model.get_parameter(name)
            more = experts - used
            if name.endswith("mlp.gate.weight"):  # their score is the mean of the others': never among the two largest
                weight = torch.cat([weight, weight.mean(0, keepdim=True).expand(more, -1)])
            elif ".experts." in name:
                weight = torch.cat([weight, weight[torch.arange(more) % used]])
            own.data.copy_(weight)
        model = larger
    embed = model.get_input_embeddings()
    return Case(model, ids, lambda: input_gradient(
        lambda x: model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits, embed(ids)))


def bert_base(texts: int = 8, tokens: int = 128) -> Case:
    """BERT-base with a head for two classes, and texts."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig()).eval().requires_grad_(False)
        ids = torch.randint(0, 30000, (texts, tokens))
    embed = model.get_input_embeddings()
    return Case(model, ids, lambda: input_gradient(lambda x: model(inputs_embeds=x).logits, embed(ids)))


def _pictures(model: nn.Module, count: int = 4) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(count, 3, 224, 224).clamp(-3, 3)  # within the bounds of the z-box rule
    return Case(model, x, lambda: input_gradient(model, x))


def resnet18(pictures: int = 4) -> Case:
    """ResNet-18; pictures of 224 x 224."""
    import zoo

    return _pictures(zoo.resnet18(width=64).eval().requires_grad_(False), pictures)


def vgg11() -> Case:
    """VGG-11; four pictures of 224 x 224."""
    layers: list[nn.Module] = []
    before = 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        before = width or before
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 * 49, 4096), nn.ReLU(),
                              nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000))
    return _pictures(model.eval().requires_grad_(False))


def mlp(rows: int = 1) -> Case:
    """30 features, 64 hidden, 2 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2)).eval().requires_grad_(False)
        x = torch.randn(rows, 30)
    return Case(model, x, lambda: input_gradient(model, x))


class _Columns(nn.Module):
    """A transformer over the columns of a table: a token of 16 numbers for each, one layer, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Linear(1, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.layer(self.each(x[..., None])).mean(1))
        return found


def columns(rows: int = 1) -> Case:
    """A transformer over 10 columns, 16 wide; its baseline as others'."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = _Columns().eval().requires_grad_(False), torch.randn(rows, 10)
    return Case(model, x, lambda: input_gradient(model, x))


MODELS: dict[str, Callable[[], Case]] = {
    "LLaMA 8 x 512, 128 tokens": llama,
    "LLaMA 8 x 512, 512 tokens": lambda: llama(512),
    "Qwen3-MoE 4 x 512, 2 of 16 experts, 128 tokens": qwen3_moe,
    "BERT-base, 8 texts of 128 tokens": bert_base,
    "ResNet-18, 4 pictures of 224 x 224": resnet18,
    "VGG-11, 4 pictures of 224 x 224": vgg11,
    "MLP 30-64-2, 1 row": mlp,
}
