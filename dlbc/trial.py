"""Whether kernels are used where nobody asked for them: they are tried beside torch, on the example inputs.

`backend="auto"` on a GPU comes here. Kernels stay where relevance and outputs agree with torch's; anything else is
torch, with one warning that says what was seen. The verdict is kept beside the compiled explainer, for this GPU, driver
and Triton. It is begun before the first kernel runs: one that ends the process is not run again.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import platform
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc import gpu, notes
from dlbc.cache import TOLERANCE, keys_of
from dlbc.compiler import compile_now
from dlbc.errors import DlbcError
from dlbc.fingerprint import Uncapturable
from dlbc.frontends.inputs import mapped
from dlbc.options import Options
from dlbc_runtime.arrays import Array
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.program import Variant
from dlbc_runtime.signature import dtype_name
from dlbc_runtime.target import Target

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

Numbers = dict[str, Array]
Make = Callable[[Options], Explainer]

WIDER = {"f16": "float32", "bf16": "float32", "f32": "float64"}
"""The element type of the copy of a model that decides where kernels and torch differ."""
FARTHER = 2.0
"""How much farther than torch kernels may then be from that copy."""


@dataclass(frozen=True)
class Verdict:
    """What came of a trial. `final`: it is kept; else the next compile tries again."""

    kernels: bool
    said: str
    final: bool = True


@dataclass(frozen=True)
class Trial:
    """A model and how it is called. `make` compiles it, by the cache where `cache`; `budget` is that of calls."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: Options
    default: Variant
    make: Make
    cache: bool = True
    budget: int | None = None

    @property
    def plain(self) -> Options:
        """The options without kernels."""
        return replace(self.options, backend="torch", target="")

    @property
    def where(self) -> torch.device:
        """The GPU."""
        return gpu.devices_of(self.model)[0]

    def explainer(self) -> Explainer:
        """With kernels where they were seen to compute what torch does, now or before; else torch's. Its plan says
        which and why. DlbcError where a kernel has made the GPU unusable for this process."""
        names = self.names()
        for name in names:
            found = known(name)
            if found is None:
                continue
            explainer = self.make(self.options if found.kernels else self.plain)
            if name != names[0] and found.kernels and explainer.manifest.static:
                break  # a program for these sizes only, which has not been tried
            return noted(explainer, found.said)
        return self.tried(names)

    def names(self) -> tuple[str, ...]:
        """Of the notes that may hold a verdict: for inputs of these sizes, and of any. None where nothing is kept."""
        if not self.cache:
            return ()
        try:
            keys = keys_of(self.model, self.args, self.kwargs, self.options, self.default)
        except Uncapturable:
            return ()
        facts = json.dumps(gpu.facts(self.where), sort_keys=True)
        return tuple(f"{hashlib.sha256(f'{key} {facts}'.encode()).hexdigest()}.trial" for key in reversed(keys))

    # --- trying --------------------------------------------------------------------------------------------

    def tried(self, names: tuple[str, ...]) -> Explainer:
        """Run both, compare, and keep the verdict."""
        torch_explainer = self.make(replace(self.plain, dump=None))
        try:
            expected, target = self.numbers(quiet(torch_explainer), None)  # freed before kernels run
        except Exception as problem:  # the example cannot be explained: calls will say so, compiling does not
            said = f"kernels were not tried, torch runs it: the example inputs cannot be explained ({_first(problem)})"
            if _of_memory(problem):
                log.warning("%s; %s", said, "give smaller ones, sizes may change from call to call")
            return noted(self.make(self.plain) if self.options.dump else torch_explainer, said)
        for name in names:
            notes.write(name, {"begun": [platform.node(), os.getpid()]})
        try:
            kernels, verdict = self.compared(expected, target)
        except BaseException:
            for name in names:
                notes.forget(name)
            raise
        # What holds for a program of any sizes is found by any.
        kept = names[:1] if torch_explainer.manifest.static else names[1:]
        for name in names:
            if verdict.final and name in kept:
                notes.write(name, asdict(verdict))
            else:
                notes.forget(name)
        if not verdict.kernels and not gpu.usable(self.where):
            raise DlbcError(f"{verdict.said}, and the GPU does nothing more for this process", where=str(self.where),
                            hint="start it again: torch is used from then on. " + _choices())
        if kernels is not None:
            log.info("%s: %s", type(self.model).__name__, verdict.said)
            return noted(kernels, verdict.said)
        return noted(self.make(self.plain) if self.options.dump else torch_explainer, verdict.said)

    def compared(self, expected: Numbers, target: Target | None) -> tuple[Explainer | None, Verdict]:
        """The explainer with kernels, or None where torch is chosen; and why."""
        from dlbc_runtime.triton_launch import failures

        name, kernels = type(self.model).__name__, None
        facts = gpu.facts(self.where)
        try:
            with failures() as failed:
                kernels = self.make(self.options)
                tested = quiet(kernels)
                # Twice: what a race does is not always the same.
                found = [self.numbers(tested, target)[0] for _ in range(2)]
                del tested
        except Exception as problem:
            if _of_memory(problem):
                said = f"kernels were not tried, torch runs it: out of memory in the trial ({_first(problem)})"
                log.warning("%s: %s; give smaller example inputs, sizes may change from call to call", name, said)
                return None, Verdict(False, said, final=False)
            said = f"kernels failed in their trial, torch runs it: {_first(problem)}"
            return None, self.rejected(said, kernels, facts, traceback.format_exc())
        if failed:
            return None, self.rejected(f"kernels failed in their trial, torch runs it: {'; '.join(failed)}", kernels,
                                       facts)
        allowed = tolerance(self.model.parameters(), self.options.precision)
        worst, place = max(apart(each, expected) for each in found)
        seen = f"the largest difference to torch was {worst:.2g} of the largest number, in {place}"
        where = f"{facts['gpu']}, Triton {facts['triton']}"
        if worst <= allowed:
            return kernels, Verdict(True, f"kernels were tried on the example inputs ({where}): {seen}; {allowed:g} is "
                                          "allowed")
        nearer = self.judged(expected, found, target)
        if nearer:
            return kernels, Verdict(True, f"kernels were tried on the example inputs ({where}): {seen}, and {nearer}")
        return None, self.rejected(f"kernels do not compute what torch does, which runs it: {seen}, where {allowed:g} "
                                   "is allowed", kernels, facts)

    def numbers(self, explainer: Explainer, target: Target | None) -> tuple[Numbers, Target | None]:
        """Outputs and relevance of the example inputs; and what was explained."""
        return numbers(explainer, self.args, self.kwargs, target, self.budget)

    def judged(self, expected: Numbers, found: list[Numbers], target: Target | None) -> str:
        """Where rules amplify rounding, torch is no judge: whether kernels are as near as torch to what a copy of the
        model gives in a wider element type; "" where they are not, or there can be no such copy."""
        import torch

        wider = WIDER.get(next((dtype_name(w) for w in self.model.parameters() if w.is_floating_point()), ""))
        if wider is None or self.options.reference is not None:
            return ""
        dtype = getattr(torch, wider)
        try:
            args, kwargs = (mapped(given, "", lambda _, x: x.to(dtype) if x.is_floating_point() else x)
                            for given in (self.args, dict(self.kwargs)))
            model = copy.deepcopy(self.model).to(dtype)
            other = replace(self, model=model, args=args, kwargs=kwargs)
            explainer = compile_now(model, args, kwargs, replace(self.plain, dump=None), self.default)
            exact, _ = other.numbers(quiet(explainer), target)
        except Exception as problem:
            log.info("no copy in %s judges kernels: %s", wider, _first(problem))
            return ""
        theirs, own = apart(expected, exact)[0], max(apart(each, exact)[0] for each in found)
        log.info("of a copy in %s, kernels are %.2g and torch is %.2g away", wider, own, theirs)
        near = own <= FARTHER * theirs
        return f"a copy in {wider} is {own:.2g} from them and {theirs:.2g} from torch" if near else ""

    def rejected(self, said: str, kernels: Explainer | None, facts: Mapping[str, str], trace: str = "") -> Verdict:
        """Torch, with the one warning."""
        file = _reproducer(said, kernels, facts, trace)
        log.warning("%s: %s. Please report it with the file %s. %s", type(self.model).__name__, said, file, _choices())
        return Verdict(False, said)


def numbers(explainer: Explainer, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Target | None = None,
            budget: int | None = None) -> tuple[Numbers, Target | None]:
    """Outputs and relevance by name; and what was explained, for another explainer to explain the same."""
    found = explainer(*args, target=target, memory_budget=budget, **kwargs)
    named = {f"output `{n}`": a for n, a in found.outputs.items() if a.dtype.kind == "f"}
    for text, arrays in (("relevance of `{}`", found.relevance), ("relevance at `{}`", found.nodes),
                         ("positive relevance of `{}`", found.positive),
                         ("negative relevance of `{}`", found.negative)):
        named |= {text.format(n): a for n, a in arrays.items()}
    rows = list(found.target)
    if any(row.index is None for row in rows):
        return named, target
    positions = [row.position for row in rows if row.position is not None]
    return named, Target.index([row.index for row in rows if row.index is not None], positions or None)


def quiet(explainer: Explainer) -> Explainer:
    """The same explainer, which says nothing in its calls, and keeps to itself what it learns in them; kernels are
    launched one by one."""
    other = explainer.with_options(cuda_graphs=False)
    other._said = _Everything()
    return other


class _Everything(set[str]):
    """All texts."""

    def __contains__(self, text: object) -> bool:
        return True


def tolerance(weights: Iterable[torch.Tensor], precision: str = "ieee") -> float:
    """How far kernels may be from torch, of the largest number: by the narrowest element type of a model's weights."""
    found = max((TOLERANCE.get(dtype_name(weight), 1e-3) for weight in weights), default=1e-3)
    return max(found, 1e-2) if precision == "tf32" else found


def apart(found: Numbers, expected: Numbers) -> tuple[float, str]:
    """The largest difference, and of what: of outputs by their own largest number, of relevance by that of all.
    Infinite where shapes differ, or only one is a number."""
    largest = {name: float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) for name, x in expected.items()}
    whole = max((size for name, size in largest.items() if not name.startswith("output")), default=0.0)
    worst = (0.0, "nothing")
    for name, right in expected.items():
        scale = (largest[name] if name.startswith("output") else whole) + 1e-6
        own = found.get(name)
        if own is None or own.shape != right.shape:
            return np.inf, name
        with np.errstate(invalid="ignore"):
            off = np.where(own == right, 0.0, np.abs(own.astype(np.float64) - right))
        off = np.where(np.isnan(own) & np.isnan(right), 0.0, np.where(np.isnan(off), np.inf, off))
        largest_here = float(off.max(initial=0.0)) / scale
        worst = (largest_here, name) if largest_here > worst[0] else worst
    return worst


def known(name: str) -> Verdict | None:
    """A verdict that was kept. One that was begun by a process that has ended since is against the kernels."""
    note = notes.read(name)
    begun = note.get("begun")
    if isinstance(begun, list) and len(begun) == 2:
        host, process = begun
        if host != platform.node() or not isinstance(process, int) or _alive(process):
            return None
        verdict = Verdict(False, "kernels are not used, torch runs it: the process that first tried them ended in it")
        log.warning("%s. Please report the model, the GPU and Triton's version. %s", verdict.said, _choices())
        notes.write(name, asdict(verdict))
        return verdict
    if not isinstance(note.get("kernels"), bool) or not isinstance(note.get("said"), str):
        return None
    return Verdict(note["kernels"], note["said"])


def noted(explainer: Explainer, *said: str) -> Explainer:
    """The explainer, whose plan says so."""
    explainer._recipe["notes"] = [text for text in said if text]
    return explainer


def _choices() -> str:
    return ('backend="torch" chooses torch without a trial, backend="triton" the kernels; dlbc.cache.clear() has them '
            "tried again")


def _alive(process: int) -> bool:
    """Whether a process is still there, as far as can be told: on Windows asking would end it."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _first(problem: BaseException) -> str:
    lines = str(problem).splitlines()
    return f"{type(problem).__name__}: {lines[0][:200]}" if lines else type(problem).__name__


def _of_memory(problem: BaseException | None) -> bool:
    """Whether an error, or one behind it, is about memory that is not there."""
    while problem is not None:
        text = str(problem).lower()
        if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError" or (
                "out of memory" in text and "illegal" not in text):
            return True
        problem = problem.__cause__
    return False


def _reproducer(said: str, kernels: Explainer | None, facts: Mapping[str, str], trace: str) -> str:
    """A file with what a report needs, and no numbers of the model's: the facts, the fused IR and the source."""
    lines = [said, *(f"{name}: {text}" for name, text in facts.items()), *trace.splitlines()]
    text = "".join(f"# {line}\n" for line in lines)
    if kernels is not None:
        text += "".join(f"# {line}\n" for line in kernels.ir("fused").splitlines()) + "\n" + kernels.source
    try:
        with tempfile.NamedTemporaryFile("w", prefix="dlbc-trial-", suffix=".py", delete=False) as file:
            file.write(text)
    except OSError as problem:
        return f"(which cannot be written: {problem.strerror})"
    return file.name
