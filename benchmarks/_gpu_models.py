"""The models that are measured on a GPU and counted without one, with random weights, and the baseline of each: plain
forward and the gradient of the input. `device` "meta" makes them without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LEAST = {("dlb", 128): 2.84, ("dlb", 512): 11.25, ("attnlrp", 128): 2.76, ("attnlrp", 512): 7.51}
"""An estimate of the least work for LLaMA-3.2-3B, milliseconds of an H200, by rules and tokens: weights read, products
computed, and nothing else."""


def llama(device: str, *, small: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The architecture of LLaMA-3.2-3B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = ({"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
                              "num_attention_heads": 4, "num_key_value_heads": 2} if small else
                             {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
                              "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
                              "head_dim": 128, "max_position_embeddings": 16384})
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    return model


def bert(device: str, *, small: bool = False) -> nn.Module:
    """BERT-base with a head for two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device(device):
        return BertForSequenceClassification(BertConfig(num_hidden_layers=2 if small else 12)).eval()


def resnet(device: str, *, small: bool = False) -> nn.Module:
    """ResNet-50."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(depths=[1, 1, 1, 1], num_labels=10) if small else ResNetConfig(num_labels=1000)
    with torch.device(device):
        return ResNetForImageClassification(config).eval()


def vit(device: str, *, small: bool = False) -> nn.Module:
    """ViT-B/16."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_hidden_layers=2, num_labels=10) if small else ViTConfig(num_labels=1000)
    with torch.device(device):
        return ViTForImageClassification(config).eval()


def gradient_of_tokens(model: Any, ids: Tensor) -> Callable[[], object]:
    """Forward, and the gradient of the last token's largest logit by the embeddings."""
    embed = model.get_input_embeddings()

    def run() -> object:
        with torch.enable_grad():
            x = embed(ids).detach().requires_grad_(True)
            logits = model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits
            logits[:, -1].max(-1).values.sum().backward()
        model.zero_grad(set_to_none=True)
        return x.grad

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return run


def gradient_of_texts(model: Any, ids: Tensor) -> Callable[[], object]:
    """Forward of an encoder, and the gradient of the largest output by the embeddings."""
    embed = model.get_input_embeddings()

    def run() -> object:
        with torch.enable_grad():
            x = embed(ids).detach().requires_grad_(True)
            model(inputs_embeds=x).logits.max(-1).values.sum().backward()
        return x.grad

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return run


def gradient_of_vectors(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward, and the gradient of the largest output by the input."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def run() -> object:
        with torch.enable_grad():
            given = x.detach().requires_grad_(True)
            found = model(given)
            logits = getattr(found, "logits", found)
            logits.float().max(-1).values.sum().backward()
        return given.grad

    return run
