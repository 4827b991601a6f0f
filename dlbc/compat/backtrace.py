"""`DLBacktrace`: the class of that name, on top of an explainer with its rules (`dlb`)."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dlbc.api import compile
from dlbc.compat import plots
from dlbc.compat.files import format_of
from dlbc.composite import Composite
from dlbc.errors import InputError
from dlbc_runtime import tasks_files
from dlbc_runtime.arrays import Array, as_numpy
from dlbc_runtime.calibration import check_temperature, tempered
from dlbc_runtime.explanation import Explanation
from dlbc_runtime.target import Target
from dlbc_runtime.tasks_kinds import Kinds, kinds_of
from dlbc_runtime.tasks_result import TaskResult

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from dlbc_runtime.explainer import Explainer

log = logging.getLogger(__name__)
NodeIO = dict[str, dict[str, Any]]
_TASKS = ("binary-classification", "multi-class classification", "multi-class-classification", "bbox-regression",
          "binary-segmentation", "tabular-classification", "image-classification", "text-classification", "generation",
          "segmentation", "object-detection")
_POLICIES = ("full", "summary", "disk", "none")


class DLBacktrace:
    """Explain a torch model with DL-Backtrace's rules: `predict` runs it, `evaluation` gives relevance by name.

    `input_for_graph`: example inputs, a tensor, tuple or dict. `device`: where it runs; a model that lies elsewhere is
    copied there, and stays as it is. `rules`: others than "dlb". `verbose`: log details. `dynamic_shapes`: not needed,
    batch and sequence may change. `strict_cpu`: changes nothing; `dlbc.deterministic(seed)` is for that.
    `layer_implementation`: changes nothing, there is one of each.
    `collect_node_module_map`: `fx_node_to_module` is always there.

    `explainer` is what does the work, `explanation` the last explanation; `node_io` and `all_wt` hold what the last
    `predict` and `evaluation` returned. Raises what `dlbc.compile` raises.
    """

    def __init__(self, model: torch.nn.Module, input_for_graph: object, dynamic_shapes: object = None,
                 device: str = "cpu", verbose: bool = False, strict_cpu: bool = True,
                 collect_node_module_map: bool = False, *, layer_implementation: str | None = None,
                 rules: str | Composite = "dlb", **options: Any) -> None:
        del dynamic_shapes, strict_cpu, collect_node_module_map, layer_implementation
        from dlbc.api import check_model

        check_model(model)
        self.verbose, self.device = verbose, _device(device)
        self.model = _on(model, self.device)
        self.input_for_graph = _moved(input_for_graph, self.device)
        self._options: dict[str, Any] = {"rules": rules, **options}
        self.explainer: Explainer = compile(self.model, self.input_for_graph, **self._options)
        self._contrastive: Explainer | None = None
        self.node_io: NodeIO = {}
        self.all_wt: dict[str, Array] = {}
        self.explanation: Explanation | None = None
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    # Running and explaining

    def predict(self, *inputs: Any, temperature: float = 1.0, debug: bool | None = None, **named: Any) -> NodeIO:
        """Run the model: for each input, module and output `{"output_values": tensor}`; the explained output is
        "output" too, and its logits are divided by `temperature`. InputError for inputs that do not fit."""
        temperature = check_temperature(temperature)
        kinds = kinds_of(self.explainer)
        args: tuple[Any, ...] = tuple(_moved(one, self.device) for one in inputs)
        kwargs: dict[str, Any] = dict(_moved(named, self.device))
        first = args[0] if len(args) == 1 else None
        if isinstance(first, Mapping):
            args, kwargs = (), {**first, **kwargs}
        if kinds.output in ("map", "boxes"):
            found = self._by_task(self.explainer, args, kwargs, thresholding=0.0)
        else:
            found = self.explainer(*args, keep="modules", **kwargs)
        self._inputs, self.explanation = (args, kwargs), found
        outputs = dict(found.outputs)
        self._logits = (outputs[kinds.explained], self._before(kinds))
        self.node_io = {name: {"output_values": _tensor(value)}
                        for name, value in {**found.inputs, **found.activations, **outputs}.items()}
        self.node_io["output"] = {"output_values": _tensor(tempered(*_ordered(self._logits, temperature)))}
        self._tell(self.verbose if debug is None else debug, "predict", found.inputs, outputs)
        return self.node_io

    def apply_temperature_scaling(self, temperature: float = 1.0) -> NodeIO:
        """Divide the logits of the last `predict` by a temperature; returns `node_io`. InputError before `predict`."""
        self._predicted("apply_temperature_scaling()")
        self.node_io["output"] = {
            "output_values": _tensor(tempered(*_ordered(self._logits, check_temperature(temperature))))}
        return self.node_io

    def evaluation(self, mode: str = "default", start_wt: Sequence[float] | Array = (), multiplier: float = 100.0,
                   scaler: float = 1.0, thresholding: float = 0.5, task: str = "binary-classification",
                   target_token_ids: Any = None, debug: bool = False) -> dict[str, Array]:
        """Relevance of the inputs of the last `predict` and of what its modules gave, by name, each in its own shape.

        `mode`: "default", or "contrastive": relevance of the target less that of its rivals (`explanation.positive` and
        `explanation.negative` apart). `start_wt`: weights of the output to start from, in its shape; otherwise the
        predicted class, or `target_token_ids` (one for each row). `multiplier`: the relevance at the output, `scaler`
        multiplies all that is found. `thresholding`: the probability above which pixels are explained.
        InputError before `predict`, and for options that do not fit.
        """
        args, kwargs = self._predicted("evaluation()")
        if task not in _TASKS:
            raise InputError(f"there is no task {task!r}", where="task", hint=f"tasks: {', '.join(_TASKS)}")
        explainer = self._explainer(mode)
        kinds = kinds_of(explainer)
        weights = as_numpy(start_wt)
        target: object = None
        if weights.size:
            target = Target.tensor(weights)
        elif target_token_ids is not None:
            target = Target.token(as_numpy(target_token_ids).reshape(-1).tolist())
        if kinds.output in ("map", "boxes") and target is None:
            found = self._by_task(explainer, args, kwargs, thresholding=thresholding, multiplier=multiplier,
                                  scaler=scaler)
        else:
            found = explainer(*args, target=target, keep="modules", multiplier=multiplier, scaler=scaler, **kwargs)
        self.explanation = found
        self.all_wt = {**found.relevance, **found.nodes}
        self._tell(debug or self.verbose, "evaluation", found.relevance, {})
        return self.all_wt

    def run_task(self, task: str = "auto", inputs: object = None, tokenizer: Any = None, mode: str = "default",
                 multiplier: float = 100.0, scaler: float = 1.0, thresholding: float = 0.5, temperature: float = 1.0,
                 return_scores: bool = False, return_relevance: bool = False, return_layerwise_output: bool = False,
                 relevance_cache_policy: str = "full", relevance_cache_dir: str | None = None,
                 relevance_compress_dtype: Any = None, relevance_move_to_cpu: bool = True, debug: bool = False,
                 save_relevance: bool = False, save_path: str | os.PathLike[str] = "./relevance_output",
                 save_format: str = "safetensors", save_name: str | None = None, save_compress: bool = True,
                 save_metadata: Mapping[str, Any] | None = None, **generation_kwargs: Any) -> TaskResult:
        """Run a task and explain it: `Explainer.run_task`, which says what the options are.

        Relevance of a generation is one matrix, so `relevance_cache_*`, `relevance_compress_dtype` and
        `relevance_move_to_cpu` change nothing. `save_format`: as in `save_relevance` of this module; `save_metadata`:
        JSON data that goes into the file.
        """
        del relevance_cache_dir, relevance_compress_dtype, relevance_move_to_cpu, save_compress
        if relevance_cache_policy not in _POLICIES:
            raise InputError(f"relevance_cache_policy={relevance_cache_policy!r}",
                             hint=f"one of {', '.join(_POLICIES)}")
        where = tasks_files.check_place(save_path, format_of(save_format)) if save_relevance else None
        name = "relevance" if save_name is None else save_name
        tasks_files.check_name(name)
        result = self._explainer(mode).run_task(
            task, _moved(inputs, self.device), tokenizer, mode=mode, multiplier=multiplier, scaler=scaler,
            thresholding=thresholding, temperature=temperature, return_scores=return_scores,
            return_relevance=return_relevance or save_relevance, return_layerwise_output=return_layerwise_output,
            debug=debug or self.verbose, **generation_kwargs)
        self.all_wt = dict(result.relevance)
        if isinstance(result.explanation, Explanation):
            self.explanation = result.explanation
        if where is None:
            return result
        about = {"task": result.task, "rules": self._explainer(mode).manifest.composite, **dict(save_metadata or {})}
        path = tasks_files.save_relevance(result["relevance_trace"], *where, metadata=about,
                                          name=name)
        return replace(result, save_path=path)

    def sample_auto(self, tokenizer: Any, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Generate, as `DLBAutoSampler(self, tokenizer).generate(input_ids, attention_mask, **kwargs)`."""
        from dlbc.compat.sampler import DLBAutoSampler

        return DLBAutoSampler(self, tokenizer).generate(input_ids, attention_mask, **kwargs)

    def generate_with_temperature(self, input_ids: Any, temperature: float = 1.0, *, tokenizer: Any = None,
                                  attention_mask: Any = None, **options: Any) -> torch.Tensor:
        """Sample a continuation at a temperature, with the model's own `generate`: int64 [B,T]. `input_ids`: ids [T] or
        [B,T], what a tokenizer returns, or with a `tokenizer` texts. `options` are those of `generate` (`max_length`,
        `max_new_tokens`, ...). InputError for a model that cannot generate, and for prompts and options that do not
        fit it."""
        import torch

        from dlbc_runtime.generated_prompts import check, rows_of

        where, temperature = "generate_with_temperature()", check_temperature(temperature)
        sampler = self.explainer.sampler(tokenizer)
        rows, _ = rows_of(input_ids, tokenizer, attention_mask)
        longest = 1 if sampler.encoder_decoder else max(map(len, rows))  # what is there of the output before it
        whole = options.get("max_length") if options.get("max_new_tokens") is None else None
        if isinstance(whole, int) and whole <= longest:
            raise InputError(f"max_length is {whole}, the prompt has {longest} tokens", where=where,
                             hint="max_length counts the prompt too: give more, or max_new_tokens")
        new = options.get("max_new_tokens") or (0 if whole is None else whole - longest)
        check(rows, vocabulary=sampler.vocabulary, context=sampler.context, new=0 if sampler.encoder_decoder else new)
        options = {"pad_token_id": sampler.padding(options), **options}
        return torch.from_numpy(sampler.sequences(rows, do_sample=True, temperature=temperature, **options))

    # Looking at it

    def visualize(self, save_path: str | os.PathLike[str] = "graph.png") -> Path:
        """Draw the model's graph to a .svg, .png or .html file, and return its path. With the relevance of the last
        `evaluation` (or `run_task` with `return_layerwise_output`), where there was one."""
        return self._draw(save_path, None, "op")

    def visualize_dlbacktrace(self, output_path: str | os.PathLike[str] = "backtrace_graph", top_k: int | None = None,
                              relevance_threshold: float | None = None, engine_auto_threshold: int = 1500,
                              graph_mode: str = "top_k", graph_top_k: int = 120, graph_max_nodes: int = 220) -> Path:
        """Draw the graph with the relevance of the last `evaluation`: .svg where the name has no suffix.

        `top_k` (or `graph_top_k`): how many of the most relevant nodes are drawn; the other options of DL-Backtrace's
        layout change nothing.
        """
        del relevance_threshold, engine_auto_threshold, graph_mode, graph_max_nodes
        return self._draw(output_path, top_k or graph_top_k, "op")

    def visualize_dlbacktrace_with_modules(self, output_path: str | os.PathLike[str] = "backtrace_graph_modules", *,
                                           show: bool = True, inline_format: str = "svg") -> Path:
        """Draw the graph by module, with the relevance of the last `evaluation`; the file's path."""
        del show
        place = Path(output_path)
        return self._draw(place if place.suffix else place.with_name(f"{place.name}.{inline_format}"), None, "module")

    def visualize_tokenwise_relevance_map(
            self, timewise_relevance_out: Sequence[Mapping[str, Any]], input_ids: Any, tokenizer: Any, *,
            generated_ids: Any = None, input_key: str = "input_ids", figsize: tuple[float, float] = (12, 6)) -> Figure:
        """A map of what each generated token owes to each token of the input: a figure of matplotlib."""
        return plots.relevance_map(timewise_relevance_out, input_ids, tokenizer, generated_ids, input_key, figsize)

    def visualize_input_heatmap_for_token(
            self, timewise_relevance_out: Sequence[Mapping[str, Any]], n: int, input_ids: Any, tokenizer: Any, *,
            generated_ids: Any = None, input_key: str = "input_ids", figsize: tuple[float, float] = (10, 3)) -> Figure:
        """What the n-th generated token owes to each token of the input: a figure of matplotlib."""
        return plots.heat_of_token(timewise_relevance_out, n, input_ids, tokenizer, generated_ids, input_key, figsize)

    def print_all_relevance_info(self) -> None:
        """A table of the shapes and sums of `all_wt` on the terminal."""
        from rich.console import Console
        from rich.table import Table

        table = Table("name", "shape", "sum")
        for name, value in self.all_wt.items():
            table.add_row(name, str(list(value.shape)), f"{float(value.sum(dtype=np.float64)):.6g}")
        Console().print(table)

    # The model

    @property
    def fx_node_to_module(self) -> dict[str, tuple[str, str]]:
        """For each node of the graph the path and class of the module that it is part of."""
        modules = dict(self.model.named_modules())
        nodes = self.explainer.graph("canonical").nodes(data=True)
        return {str(name): (place, type(modules[place]).__name__) for name, data in nodes
                if (place := str(data.get("place") or "")) and place in modules}

    def map_fx_nodes_to_modules(self) -> dict[str, tuple[str, str]]:
        """For each node of the graph the path and class of the module that it is part of."""
        return self.fx_node_to_module

    def clear_intermediates(self, clear_executor_cache: bool = False) -> None:
        """Forget what `predict` and `evaluation` returned; with `clear_executor_cache` the contrastive rules too."""
        self.node_io, self.all_wt, self.explanation, self._inputs = {}, {}, None, None
        if clear_executor_cache:
            self._contrastive = None

    def close(self, unload_model: bool = False) -> None:
        """As `clear_intermediates`; the model belongs to its owner and stays."""
        del unload_model
        self.clear_intermediates(clear_executor_cache=True)

    def __repr__(self) -> str:
        return f"DLBacktrace({self.explainer!r})"

    def _explainer(self, mode: str) -> Explainer:
        """The explainer of a mode; that of the contrastive rules is compiled when it is first asked for."""
        if mode not in ("default", "contrastive"):
            raise InputError(f"mode={mode!r}", where="mode", hint='"default" or "contrastive"')
        if mode == "default" or self.explainer.manifest.streams > 1:
            return self.explainer
        if self._contrastive is None:
            self._contrastive = compile(self.model, self.input_for_graph, **{**self._options,
                                                                             "rules": "dlb-contrastive"})
        return self._contrastive

    def _by_task(self, explainer: Explainer, args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any
                 ) -> Explanation:
        found = explainer.run_task("auto", dict(kwargs) or args, return_layerwise_output=True, **options).explanation
        assert isinstance(found, Explanation)
        return found

    def _predicted(self, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._inputs is None:
            raise InputError("nothing has been predicted yet", where=where, hint="call predict(inputs) before")
        return self._inputs

    def _before(self, kinds: Kinds) -> str:
        manifest = self.explainer.manifest
        return manifest.before if kinds.explained == manifest.output else ""

    def _draw(self, path: str | os.PathLike[str], top_k: int | None, by: Literal["module", "op"]) -> Path:
        place = Path(path)
        place = place if place.suffix else place.with_name(f"{place.name}.svg")
        found = self.explanation
        if found is not None and not found.nodes:
            raise InputError("the last explanation has relevance of the inputs alone", where="visualize",
                             hint="call evaluation(), or run_task(..., return_layerwise_output=True)")
        return self.explainer.draw(place, found, by=by, top_k=None if found is None else top_k)

    def _tell(self, wanted: bool, what: str, first: Mapping[str, Array], second: Mapping[str, Array]) -> None:
        for name, value in {**first, **second}.items() if wanted else ():
            log.info("%s: %s %s%s, sum %.6g", what, name, value.dtype, list(value.shape),
                     float(value.sum(dtype=np.float64)))


def _ordered(logits: tuple[Array, str], temperature: float) -> tuple[Array, float, str]:
    return logits[0], temperature, logits[1]


def _device(device: str) -> torch.device:
    """The device; the CPU, and a warning, where there is no CUDA."""
    import torch

    from dlbc.pipelines import check_device

    if str(device).startswith("cuda") and not torch.cuda.is_available():
        log.warning("device=%r: torch sees no CUDA device, the CPU is used", device)
        return torch.device("cpu")
    check_device(str(device))
    return torch.device(device)


def _on(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model on a device: itself, or a copy where it lies elsewhere."""
    weight = next(model.parameters(), None)
    here = weight is None or weight.device == device or (weight.device.type == device.type and device.index is None)
    return model if here else copy.deepcopy(model).to(device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(part, device) for part in value)
    return value.to(device) if hasattr(value, "detach") else value


def _tensor(value: Array) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(value))
