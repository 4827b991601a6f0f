"""What is explained by both sides: small nets with random weights, the same in every process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dlbc_runtime.target import Target
from tests import zoo

Built = tuple[nn.Module, torch.Tensor]

_DECODER = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64, "use_cache": False}


def _seeded(build: Callable[[], Built]) -> Built:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build()


def decoder(family: str) -> Built:
    """A causal language model of 4 layers x 64, and token ids [2, 12]; or SmolLM2 and a prompt [1, 5]."""

    def build() -> Built:
        import transformers

        if family == "smollm2":
            trained, tokenizer = zoo.smollm2()
            return trained, tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
        if family == "gpt2":
            model: nn.Module = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=96, n_embd=64, n_layer=4, n_head=8, n_positions=64, use_cache=False))
        elif family == "qwen3":
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_DECODER, head_dim=16))
        elif family == "qwen3_moe":
            model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
                **_DECODER, head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=56,
                norm_topk_prob=True))
        else:
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_DECODER))
        zoo.randomise(model)
        return model, zoo.ids(2, 12)

    return _seeded(build)


def embedding(model: nn.Module) -> str:
    """The path of a language model's token embedding."""
    return next(path for path, module in model.named_modules() if isinstance(module, nn.Embedding))


def picture_net(name: str) -> Built:
    """A net of the zoo and a batch of two; `lenet_avg` is `lenet` with average pooling throughout."""
    case = zoo.CASES[name.removesuffix("_avg")]()
    if name.endswith("_avg"):
        for place, layer in case.model.named_children():
            if isinstance(layer, nn.MaxPool2d):
                setattr(case.model, place, nn.AvgPool2d(layer.kernel_size).eval())
    return case.model, case.args[0]


def reference(x: torch.Tensor) -> torch.Tensor:
    """Something to explain differences to, unlike each row and of no special value."""
    return x.roll(1, 0) * 0.5 + 0.1


def without_batch_norm(model: nn.Module) -> nn.Module:
    """A sequential net with every batch norm folded into the layer before, as compiling does, and no in-place ReLU."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    layers: list[nn.Module] = []
    for layer in model.children():
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(nn.ReLU() if isinstance(layer, nn.ReLU) else layer)
    return nn.Sequential(*layers).eval()


def targets(model: nn.Module, x: torch.Tensor) -> list[Target]:
    """Two things to explain: the largest output of each row, and the smallest (which is negative)."""
    with torch.no_grad():
        output = model(x) if x.is_floating_point() else model(x).logits[:, -1]
    if output.shape[-1] == 1:
        return [Target.predicted()]
    assert (output.amin(-1) < 0).all()
    return [Target.predicted(), Target.index(output.argmin(-1).tolist())]
