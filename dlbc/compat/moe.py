"""`Backtrace`: the class of that name of `moe_pytorch_backtrace`, for mixtures of experts, on top of an explainer.

`from dl_backtrace.moe_pytorch_backtrace import Backtrace` becomes `from dlbc.compat.moe import Backtrace`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dlbc.compat.backtrace import DLBacktrace, NodeIO
from dlbc.composite import Composite
from dlbc.errors import InputError
from dlbc_runtime.arrays import Array
from dlbc_runtime.tasks_result import TaskResult

if TYPE_CHECKING:
    import torch

MODEL_TYPES = ("jetmoe", "olmoe", "qwen3_moe", "gpt_oss", "qwen2_moe", "mixtral", "deepseek_v3", "phimoe", "granitemoe")
"""What `model_type` may be: the `config.model_type` of transformers. Recognition does not need it."""

_EXAMPLE = 8  # tokens of the example that a model is compiled for; texts may have any number of them


class Backtrace(DLBacktrace):
    """Explain a mixture of experts: `run_task`, `predict` and `evaluation` as in `DLBacktrace`, and then
    `all_layer_expert_relevance`, by layer the relevance of each expert.

    `model`: a causal language model of transformers. `model_type`: what it is, one of `MODEL_TYPES`; it is checked, and
    changes nothing (None: not checked). `input_for_graph`: example inputs; left out, token ids and an attention mask.
    InputError for another type than the model has, and for a model without experts; else what `dlbc.compile` raises.
    """

    def __init__(self, model: torch.nn.Module, model_type: str | None = None, device: str = "cpu", *,
                 input_for_graph: object = None, rules: str | Composite = "dlb", verbose: bool = False, **options: Any
                 ) -> None:
        if model_type is not None:
            _check_type(model, model_type)
        self.model_type = model_type
        example = _example(model) if input_for_graph is None else input_for_graph
        super().__init__(model, example, device=device, verbose=verbose, rules=rules, **options)
        if not self.explainer.manifest.experts:
            raise InputError(f"{type(model).__name__} has no experts that dlbc knows", where="model",
                             hint="use dlbc.compat.DLBacktrace; docs/moe.md says what is recognised as experts")
        self.all_layer_expert_relevance: dict[str, Array] = {}

    def predict(self, *inputs: Any, temperature: float = 1.0, debug: bool | None = None, **named: Any) -> NodeIO:
        """As `DLBacktrace.predict`; what was known of experts is of other inputs, and is forgotten."""
        found = super().predict(*inputs, temperature=temperature, debug=debug, **named)
        self.all_layer_expert_relevance = {}
        return found

    def evaluation(self, *args: Any, **options: Any) -> dict[str, Array]:
        """As `DLBacktrace.evaluation`; then `all_layer_expert_relevance` is of the last `predict`'s inputs."""
        found = super().evaluation(*args, **options)
        assert self.explanation is not None and self.explanation.experts is not None
        self.all_layer_expert_relevance = self.explanation.experts.all_layer_expert_relevance()
        return found

    def run_task(self, *args: Any, **options: Any) -> TaskResult:
        """As `DLBacktrace.run_task`; then `all_layer_expert_relevance` is of what was explained, of a generation of all
        explained tokens."""
        result = super().run_task(*args, **options)
        self.all_layer_expert_relevance = dict(result.all_layer_expert_relevance or {})
        return result


def _check_type(model: torch.nn.Module, model_type: str) -> None:
    """InputError for what is no type, or not the model's."""
    if model_type not in MODEL_TYPES:
        raise InputError(f"there is no model type {model_type!r}", where="model_type",
                         hint=f"one of {', '.join(MODEL_TYPES)}; left out, any mixture of experts will do")
    own = getattr(getattr(model, "config", None), "model_type", None)
    if own != model_type:
        raise InputError(f"the model is {type(model).__name__}, of type {own!r}, not {model_type!r}",
                         where="model_type", hint=f"give model_type={own!r}" if own in MODEL_TYPES else "leave it out")


def _example(model: torch.nn.Module) -> dict[str, Any]:
    """Token ids and an attention mask. InputError for a model that reads none."""
    import torch

    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        raise InputError(f"{type(model).__name__} reads no token ids", where="model",
                         hint="give input_for_graph=..., example inputs")
    ids = torch.arange(1, 1 + _EXAMPLE) % int(embeddings.weight.shape[0])
    return {"input_ids": ids[None], "attention_mask": torch.ones(1, _EXAMPLE, dtype=torch.int64)}
