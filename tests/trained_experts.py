"""A mixture of experts with a known answer: two kinds of question, asked of the same tokens, need different experts.

A text has one letter, one digit and filler, in any order, and a last token that asks for the class of one of the two.
A class is the sum of a token's two attributes modulo 4, and letters and digits have attributes of their own, so a token
is read by experts of its kind; the first layer's router is taught which (0 letters, 1 digits, 2 and 3 the rest). All
texts hold one of each, so how often experts are used says nothing about the question. Which expert the answer rests on
does: that of the kind that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("letters", "digits")
EXPERTS = 4
_VALUES = 4
_TOKENS = 2 * _VALUES ** 2
_FILLERS = 4
LENGTH = 6


@dataclass(frozen=True)
class Questions:
    """Texts i64 [N, 7], the class of the token asked for [N], which kind was asked for [N] (0: letters), and the expert
    of every token [N, 7] (2: one of the last two)."""

    ids: Tensor
    answers: Tensor
    asked: Tensor
    kinds: Tensor


def questions(count: int, generator: torch.Generator) -> Questions:
    """Questions at random."""
    asked = torch.randint(0, 2, (count,), generator=generator)
    first, second = (torch.randint(0, _VALUES, (count, 2), generator=generator) for _ in range(2))
    tokens = torch.arange(2) * _VALUES ** 2 + first * _VALUES + second
    fillers = torch.randint(_TOKENS + 2, _TOKENS + 2 + _FILLERS, (count, LENGTH - 2), generator=generator)
    order = torch.rand((count, LENGTH), generator=generator).argsort(1)
    ids = torch.cat([tokens, fillers], 1).gather(1, order)
    kinds = torch.cat([order.clamp(max=2), torch.full((count, 1), 2)], 1)
    answers = ((first + second) % _VALUES).gather(1, asked[:, None])[:, 0]
    return Questions(torch.cat([ids, _TOKENS + asked[:, None]], 1), answers, asked, kinds)


def trained(seed: int = 0, steps: int = 400) -> tuple[Any, float]:
    """A Qwen3-MoE of two layers that answers the questions, and how often it is right on new ones."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=_TOKENS + 2 + _FILLERS, hidden_size=32, intermediate_size=4, moe_intermediate_size=32,
        mlp_only_layers=[1], num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        num_experts=EXPERTS, num_experts_per_tok=1, norm_topk_prob=False, output_router_logits=True,
        max_position_embeddings=16, use_cache=False, tie_word_embeddings=False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model: Any = Qwen3MoeForCausalLM(config)
        embedding = model.model.embed_tokens.weight
        with torch.no_grad():
            embedding.copy_(_features())
        embedding.requires_grad_(False)
        learnt = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(learnt, lr=5e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            asked = questions(128, generator)
            out = model(asked.ids)
            logits = out.router_logits[0]
            by_kind = torch.cat([logits[:, :2], logits[:, 2:].logsumexp(-1, keepdim=True)], 1)
            loss = (torch.nn.functional.cross_entropy(out.logits[:, -1, :_VALUES], asked.answers)
                    + 0.1 * torch.nn.functional.cross_entropy(by_kind, asked.kinds.reshape(-1)) + 0.02 * out.aux_loss)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval().requires_grad_(False)
    model.config.output_router_logits = False
    new = questions(512, torch.Generator().manual_seed(seed + 1000))
    with torch.no_grad():
        right = (model(new.ids).logits[:, -1, :_VALUES].argmax(-1) == new.answers).float().mean()
    return model, float(right)


def _features() -> Tensor:
    """Embeddings that are not learnt: the sum of a token's kind and its two attributes; questions and fillers."""
    generator = torch.Generator().manual_seed(0)
    kind, first, second, other = (torch.randn(n, 32, generator=generator)
                                  for n in (2, 2 * _VALUES, 2 * _VALUES, 2 + _FILLERS))
    rows = [1.5 * kind[t] + first[t * _VALUES + a] + second[t * _VALUES + b]
            for t in range(2) for a in range(_VALUES) for b in range(_VALUES)]
    return 0.5 * torch.cat([torch.stack(rows), other])
