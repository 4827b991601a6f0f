"""Tiny models with random weights and a tokenizer of whole words, for tests of what needs both."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo import randomise

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("the", "a", "cat", "dog", "mat", "bird", "sat", "ran", "flew", "on", "over", "is", "was", "red", "big", "good",
         "bad", "this", "movie", "fantastic")
VOCABULARY = (*SPECIAL, *WORDS)


def tokenizer(*, special: bool = True, extra: int = 0) -> Any:
    """Lower case, split at spaces; with `special`, [CLS] before and [SEP] after the text. `extra`: unused ids that
    come before the words, as if it were another model's."""
    import tokenizers
    import transformers

    names = [*SPECIAL, *(f"[unused{number}]" for number in range(extra)), *WORDS]
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    own.normalizer = tokenizers.normalizers.Lowercase()
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        own.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        bos_token="[CLS]", eos_token="[SEP]")


def classifier(**changes: Any) -> nn.Module:
    """A BERT that tells three classes of texts; up to 40 tokens."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=40,
        pad_token_id=0, **{"vocab_size": len(VOCABULARY), "num_labels": 3, **changes})
    return _seeded(transformers.BertForSequenceClassification, config)


def causal(**changes: Any) -> nn.Module:
    """A Llama that continues texts; up to 40 tokens."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        **{"max_position_embeddings": 40, **changes})
    return _seeded(transformers.LlamaForCausalLM, config)


def _seeded(build: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return randomise(build(config))
