"""What a model takes and gives, read off its inputs and outputs: that is what decides which tasks it can do."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dlbc_runtime.errors import InputError
from dlbc_runtime.signature import TensorSpec

if TYPE_CHECKING:
    from dlbc_runtime.explainer import Explainer

log = logging.getLogger(__name__)

Task = Literal["tabular-classification", "image-classification", "text-classification", "generation", "segmentation",
               "object-detection"]
TASKS: dict[Task, tuple[str, str]] = {
    "tabular-classification": ("table", "scores"), "image-classification": ("image", "scores"),
    "text-classification": ("text", "scores"), "generation": ("text", "tokens"), "segmentation": ("image", "map"),
    "object-detection": ("image", "boxes")}
"""Each task's kind of input and of output."""

_WHOLE = ("i64", "i32", "i16", "i8", "u8")
_EMBEDDING = r"= embedding\(%{}, @([^,)\s]+)"


@dataclass(frozen=True)
class Kinds:
    """`input`: "text" (token ids [B,T]), "image" ([B,C,H,W]) or "table" (other numbers), of the input called `name`.
    `output`: "scores" [B,C], "tokens" [B,T,V] over the vocabulary, "map" [B,C,H,W], "boxes" (scores [B,Q,C] with boxes
    [B,Q,4]) or "" (none of these), of the output called `explained`; `boxes` is the output that holds those.
    `vocabulary`: how many token ids the model knows; None where it takes none."""

    input: str
    output: str
    name: str
    explained: str
    boxes: str = ""
    vocabulary: int | None = None
    shown: str = ""

    @property
    def task(self) -> Task | None:
        """The task that takes and gives these."""
        return next((task for task, kinds in TASKS.items() if kinds == (self.input, self.output)), None)


def kinds_of(explainer: Explainer) -> Kinds:
    """What the model of an explainer takes and gives."""
    manifest = explainer.manifest
    specs = {spec.name: spec for spec in manifest.inputs.tensors}
    first = next((specs[name] for name in manifest.explained if name in specs), None) or manifest.inputs.tensors[0]
    ids = next((spec for spec in specs.values() if _is_ids(spec)), None)
    if ids is not None and first.dtype.startswith("f") and not ids.name.endswith("input_ids"):
        ids = None  # columns of categories beside columns of numbers
    taken, named = ("text", ids) if ids is not None else ("image" if _is_image(first) else "table", first)
    vocabulary = _vocabulary(explainer, named.name) if taken == "text" else None
    given, explained, boxes = _output(explainer, vocabulary)
    shown = f"input `{named.name}` {named}, output `{explained}` {_spec(explainer, explained)}"
    return Kinds(taken, given, named.name, explained, boxes, vocabulary, shown)


def choose(explainer: Explainer, task: str, kinds: Kinds) -> tuple[Task, str]:
    """The task to run, and why: as asked for, or for "auto" what the model's inputs and outputs say. It is logged.

    InputError for a task that is not there or does not fit the model, and where none can be told.
    """
    found = kinds.task
    if task == "auto":
        if found is None:
            raise InputError(f"no task is known for a model with {kinds.shown}", where="task",
                             hint=_other(kinds) or f"name it: task={_listed()}")
        reason = f"the model has {kinds.shown}: {_meaning(kinds)}"
        log.info("task %s: %s", found, reason)
        return found, reason
    chosen = next((name for name in TASKS if name == task), None)
    if chosen is None:
        from difflib import get_close_matches

        near = get_close_matches(str(task), TASKS, 1, 0.4)
        raise InputError(f"there is no task {task!r}", where="task",
                         hint=(f"did you mean {near[0]!r}? " if near else "") + f'tasks: {_listed()}, "auto"')
    takes, gives = TASKS[chosen]
    # Whether numbers are a table or a picture without channels is for the user to say; text and its outputs are not.
    fits_input = takes == kinds.input or (takes == "table" and kinds.input != "text") or (
        takes == "image" and (gives == "map" or kinds.input == "image"))
    if not fits_input or gives != kinds.output:
        remedy = f'this model does {found}: task="{found}" or "auto"' if found else _other(kinds)
        raise InputError(f"the model does not do {chosen}: it has {kinds.shown}", where="task", hint=remedy)
    log.info("task %s: asked for", chosen)
    return chosen, "asked for"


def _output(explainer: Explainer, vocabulary: int | None) -> tuple[str, str, str]:
    """The kind of the model's output, the output that is explained, and the one with boxes."""
    manifest = explainer.manifest
    specs = {spec.name: spec for spec in manifest.outputs.tensors}
    main = specs[manifest.output]
    boxes = next((spec for spec in specs.values()
                  if len(spec.shape) == 3 and spec.shape[2] == 4 and "box" in spec.name), None)
    if boxes is not None:
        scores = next((spec for spec in (main, *specs.values())
                       if spec is not boxes and len(spec.shape) == 3 and spec.shape[1] == boxes.shape[1]), None)
        if scores is not None:
            return "boxes", scores.name, boxes.name
    if len(main.shape) == 3 and manifest.sequence:
        return ("tokens" if vocabulary is not None and main.shape[2] == vocabulary else ""), main.name, ""
    if len(main.shape) > 2:
        return ("map" if len(main.shape) == 4 else ""), main.name, ""
    return "scores", main.name, ""


def _is_ids(spec: TensorSpec) -> bool:
    """Token ids: whole numbers [B,T], of any length or called so; columns of a table have a fixed number."""
    return (spec.dtype in _WHOLE and len(spec.shape) == 2 and "mask" not in spec.name
            and (isinstance(spec.shape[1], str) or spec.name.endswith("input_ids")))


def _is_image(spec: TensorSpec) -> bool:
    return spec.dtype.startswith("f") and len(spec.shape) == 4


def _vocabulary(explainer: Explainer, name: str) -> int | None:
    """The rows of the table that token ids are looked up in, by the graph; or by the model, where it does something to
    them before."""
    match = re.search(_EMBEDDING.format(re.escape(name)), explainer.ir("canonical"))
    shapes = {spec.name: spec.shape for spec in explainer.manifest.weights}
    shape = shapes.get(match[1]) if match else None
    if shape is None:
        table: Any = getattr(explainer.model, "get_input_embeddings", lambda: None)()
        shape = getattr(getattr(table, "weight", None), "shape", None)
    return int(shape[0]) if shape else None


def _spec(explainer: Explainer, name: str) -> str:
    return next(str(spec) for spec in explainer.manifest.outputs.tensors if spec.name == name)


def _meaning(kinds: Kinds) -> str:
    inputs = {"text": "token ids", "image": "pictures", "table": "numbers of a table"}
    outputs = {"scores": "one row of scores", "tokens": "a score for each token of its vocabulary at each position",
               "map": "scores for each pixel", "boxes": "scores and boxes of objects"}
    return f"{inputs[kinds.input]} in, {outputs[kinds.output]} out"


def _other(kinds: Kinds) -> str:
    if kinds.input == "text" and not kinds.output:
        return ("for labels of single tokens call the explainer itself: "
                "explainer(..., target=dlbc.Target.index(label, position))")
    return "" if kinds.output else "call the explainer itself: explainer(..., target=dlbc.Target.tensor(weights))"


def _listed() -> str:
    return ", ".join(f'"{task}"' for task in TASKS)


def labels_of(model: Any) -> dict[int, str]:
    """Names of the classes in a model's configuration; none where it only numbers them."""
    found = getattr(getattr(model, "config", None), "id2label", None) or {}
    named = {int(index): str(name) for index, name in found.items()}
    return {} if all(name == f"LABEL_{index}" for index, name in named.items()) else named
