"""What went wrong in the exporter, in the user's words: their line, what it does, what to write instead."""

from __future__ import annotations

import linecache
import re
import traceback
from pathlib import Path, PurePath

import torch

from dlbc.errors import DlbcError, ExportError
from dlbc.frontends.expert_failures import experts_error

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parents[1])

_RULES: tuple[tuple[str, str, str], ...] = (
    (r"_detect_is_causal_mask",
     "nn.TransformerEncoder looks into the mask to see whether it is causal",
     "pass is_causal=True or is_causal=False along with the mask"),
    (r"packed sequence read by",
     "what a packed sequence holds is read by something else than a recurrent layer",
     "unpack it with pad_packed_sequence first: elsewhere its padding would count"),
    (r"NotByRow|rows of (one|different|some|the) experts?",
     "rows of the experts are used in a way that cannot be done for all experts at once",
     "do the same for each expert, row by row: linear maps and elementwise functions; or give an equivalent, "
     "`dlbc.register_moe`: docs/moe_models.md has an example"),
    (r"pack_padded_sequence|_pack_padded_sequence|PackedSequence",
     "pack_padded_sequence cannot be captured: its sizes depend on the data",
     "give padded sequences to the recurrent layer and mask what it returns"),
    (r"\.numpy\(\)|to numpy|numpy\(\) is not supported|numpy_array|__array__",
     "the model leaves torch for numpy",
     "use torch operations instead of `.numpy()` and np functions in forward"),
    (r"TruncToInt|specialized integer|\.item\(\)|_local_scalar_dense|\.tolist\(\)|Could not extract specialized",
     "the model turns a tensor's content into a Python number",
     "keep it a tensor: no `.item()`, `int(...)`, `float(...)` or `.tolist()` of tensors in forward"),
    (r"GuardOnDataDependentSymNode|data-dependent|DataDependent",
     "the model decides by the content of a tensor",
     "replace the `if` or `while` by torch.where, or take the decision outside of forward"),
    (r"missing \d+ required|unexpected keyword argument|takes .* positional argument|required positional",
     "the example inputs do not fit the forward method",
     "give every input that forward needs, by position or by name"),
    (r"DynamicCache|StaticCache|EncoderDecoderCache|HybridCache",
     "the model takes or returns a key-value cache",
     "set model.config.use_cache = False, or pass use_cache=False to the forward method inside"),
    (r"attributes? .*(assigned|mutat)|was assigned during export|was mutated during export",
     "forward stores tensors in the model",
     "return them instead, or register them as buffers and do not reassign them"),
    (r"unsupported (input|output)|Unsupported input type|Unexpected type|only .* supported as (input|output)",
     "an input or output of the model is of a type that cannot be captured",
     "use tensors, numbers, None, and dicts, lists and tuples of them"),
    (r"ScriptModule|ScriptFunction|ScriptMethod",
     "the model is a TorchScript module", "give the original nn.Module"),
)


def explained(problem: BaseException, model: torch.nn.Module) -> DlbcError:
    """The exporter's failure as an ExportError at the model's own line; raise it from `problem`."""
    path, at = _module(problem, model)
    return experts_error(_explained(problem, model), model, path, at)


def elsewhere(problem: DlbcError, model: torch.nn.Module) -> DlbcError:
    """The error to raise for one found in the exported program: a mixture of experts is told what it can do."""
    path, _, rest = problem.where.partition(" (")
    return experts_error(problem, model, path, rest.rstrip(")").rpartition(", ")[2])


def _module(problem: BaseException, model: torch.nn.Module) -> tuple[str, str]:
    """The innermost module of the model that was running when the problem came up, by path, and its `file.py:line`."""
    paths, found = {id(module): path for path, module in model.named_modules()}, ("", "")
    for frame, line in traceback.walk_tb(problem.__traceback__):
        own = frame.f_locals.get("self")
        if isinstance(own, torch.nn.Module) and id(own) in paths and _is_users(frame.f_code.co_filename):
            found = paths[id(own)], f"{PurePath(frame.f_code.co_filename).name}:{line}"
    return found


def _explained(problem: BaseException, model: torch.nn.Module) -> ExportError:
    frames = traceback.extract_tb(problem.__traceback__)
    text = f"{type(problem).__name__}: {problem}"
    names = " ".join(frame.name for frame in frames)
    own = [frame for frame in frames if _is_users(frame.filename)]
    line = (own[-1].line or linecache.getline(own[-1].filename, own[-1].lineno or 0)).strip() if own else ""
    where = f"{PurePath(own[-1].filename).name}:{own[-1].lineno}" if own else type(model).__name__
    shown = f": `{line}`" if line else ""
    for pattern, fact, hint in _RULES:
        if re.search(pattern, f"{text} {names} {line}"):
            return ExportError(fact + shown, where=where, hint=hint)
    first = next(iter(str(problem).strip().splitlines()), "") or type(problem).__name__
    return ExportError(f"capturing the model failed with {type(problem).__name__}: {first}{shown}", where=where,
                       hint="check that the model runs on the example inputs; "
                            "if it does, dynamic=False may help, or rewrite this line")


def brief(problem: BaseException) -> str:
    """The first line of an exception, for logs."""
    first = next(iter(str(problem).strip().splitlines()), "")
    return f"{type(problem).__name__}: {first}"[:200]


def _is_users(filename: str) -> bool:
    inside = filename.startswith((_TORCH, _OURS, "<")) or "/importlib/" in filename
    return not inside and PurePath(filename).name not in ("contextlib.py", "functools.py")
