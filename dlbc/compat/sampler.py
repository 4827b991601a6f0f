"""`DLBAutoSampler`: generation with relevance for each token, on top of the explainer's sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc.compat.backtrace import DLBacktrace
from dlbc.errors import InputError
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.tasks_inputs import tokenizer_for
from dlbc_runtime.tasks_result import TaskResult

if TYPE_CHECKING:
    import torch

_SAME = ("return_scores", "return_relevance", "return_layerwise_output", "debug", "target")
_NOTHING = ("relevance_cache_policy", "relevance_cache_dir", "relevance_compress_dtype", "relevance_move_to_cpu",
            "relevance_use_compression", "relevance_compression_method", "relevance_pickle_protocol")


class DLBAutoSampler:
    """Generate and explain. `dlb`: a `DLBacktrace`, an explainer, or a causal language model of transformers, which is
    then compiled with DL-Backtrace's rules. InputError without a tokenizer, and for a model that cannot generate."""

    def __init__(self, dlb: DLBacktrace | Explainer | torch.nn.Module, tokenizer: Any) -> None:
        if isinstance(dlb, Explainer):
            self.explainer = dlb
        else:
            if isinstance(dlb, DLBacktrace):
                self.dlb = dlb
            else:
                if tokenizer is None or not callable(tokenizer):
                    raise InputError("there is no tokenizer for the model", where="DLBAutoSampler",
                                     hint="DLBAutoSampler(model, AutoTokenizer.from_pretrained(...))")
                self.dlb = DLBacktrace(dlb, dict(tokenizer("The capital of France is Paris.", return_tensors="pt")))
            self.explainer = self.dlb.explainer
        self.tokenizer = tokenizer_for(self.explainer, tokenizer)
        self.result: TaskResult | None = None

    def generate(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """Continue a prompt; `options` are those of `Sampler.generate`, and `return_scores`, `return_relevance`,
        `return_layerwise_output` of `run_task`; `max_new_tokens` is 50 where neither it nor `max_length` is given.

        Of token ids: the first sequence int64 [1,T]; where something is to be returned beside it, `(ids, info)` with
        `info["scores_trace"]`, `info["relevance_trace"]`, `info["layerwise_output_trace"]`. Of a text: a dict with
        `generated_ids`, `text`, `relevance_scores` [explained tokens, T], `relevance_trace` and `explanation`. `result`
        holds all of the last call. InputError for prompts and options that do not fit.
        """
        for name in _NOTHING:
            options.pop(name, None)
        named = {name: options.pop(name) for name in _SAME if name in options}
        options = {name: value for name, value in options.items() if value is not None}
        if options.get("num_beams", 1) == 1 and options.get("strategy") != "beam_search":
            for name in ("num_beams", "length_penalty", "early_stopping"):  # they have no effect there
                options.pop(name, None)
        if "max_length" not in options:
            options.setdefault("max_new_tokens", 50)
        text = isinstance(input_ids, str)
        if not text and not named.get("return_relevance") and not named.get("return_layerwise_output"):
            options.setdefault("explain_tokens", "none")  # the ids alone are asked for
        named["return_relevance"] = text or bool(named.get("return_relevance"))
        inputs: Any = input_ids
        if not text and attention_mask is not None and not isinstance(input_ids, Mapping):
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        self.result = result = self.explainer.run_task("generation", inputs, self.tokenizer, **named, **options)
        assert isinstance(result.explanation, tuple)
        import torch

        first = result.explanation[0]
        ids = torch.from_numpy(np.array(first.ids)[None])
        steps = {"scores_trace": len(first.new_ids), "relevance_trace": len(first.explained),
                 "layerwise_output_trace": len(first.explained)}
        traces = {name: result[name][:count] for name, count in steps.items() if name in result}
        if text:
            return {"generated_ids": ids, "text": first.text, "relevance_scores": first.relevance,
                    "explanation": first, **traces}
        return (ids, traces) if traces else ids
