"""The compile cache: found again when nothing changed, compiled again when anything did, and never wrong."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlbc
from dlbc import cache
from dlbc.options import Options
from dlbc_runtime import folders
from dlbc_runtime.errors import InputError
from dlbc_runtime.explainer import Explainer
from dlbc_runtime.program import Variant
from tests.test_artifact import replaced, rewritten
from tests.zoo import CASES, available

ROOT = Path(__file__).parents[1]
X = torch.tensor([[0.3, -1.0, 2.0, 0.7], [1.0, 0.1, -0.4, -2.0]])


class Config:
    """Nested settings."""

    def __init__(self) -> None:
        self.slope, self.inner = 0.1, types.SimpleNamespace(sizes=(1, 2), names={"a", "b"})


class Net(nn.Module):
    """Two linear maps with a slope in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("shift", torch.full((4,), 0.5), persistent=False)
        self.config, self.factor = Config(), 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(helper(self.first(x + self.shift), self.config.slope)) * self.factor


def helper(x: torch.Tensor, slope: float) -> torch.Tensor:
    return F.leaky_relu(x, slope)


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def key(model: nn.Module, x: object = X, variant: Variant | None = None, **options: Any) -> str:
    args, kwargs = ((), x) if isinstance(x, dict) else ((x,), {})
    return cache.keys_of(model, args, kwargs, Options(**options), variant or Variant())[0]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def explained(explainer: Explainer, x: torch.Tensor = X) -> Any:
    return explainer(x).relevance["x"]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each time that something was really compiled."""
    found: list[str] = []
    real = cache.compile_now

    def counted(model: nn.Module, *args: Any, **kwargs: Any) -> Explainer:
        found.append(type(model).__name__)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(cache, "compile_now", counted)
    folders.say_once.cache_clear()
    return found


# Found again


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_a_second_compilation_comes_from_the_cache(backend: str, compilations: list[str], cache_dir: Path) -> None:
    first = dlbc.compile(net(), X, backend=backend)
    second = dlbc.compile(net(), X, backend=backend)
    assert compilations == ["Net"] and len(files(cache_dir)) == 1
    np.testing.assert_array_equal(explained(first), explained(second))
    assert [second.ir(level) for level in ("exported", "canonical", "paired", "lowered")] == \
        [first.ir(level) for level in ("exported", "canonical", "paired", "lowered")]
    assert dict(second(X, keep="modules").nodes).keys() == dict(first(X, keep="modules").nodes).keys()
    assert second(X).conservation().closes()
    assert second.graph().number_of_edges() == first.graph().number_of_edges()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mlp_batch_norm", "buffers", "two_outputs_dict",
                                  "tied_embedding", "keyword_only", "bfloat16", "resnet18_small"])
def test_models_come_from_the_cache(name: str, compilations: list[str], caplog: pytest.LogCaptureFixture) -> None:
    if not available(name):
        pytest.skip(f"{name} needs a package that is not installed")
    first, second = CASES[name](), CASES[name]()
    one = dlbc.compile(first.model, first.kwargs or first.args)
    two = dlbc.compile(second.model, second.kwargs or second.args)
    assert len(compilations) == 1 and not caplog.records
    for args, kwargs in [(first.args, first.kwargs), *first.other]:
        left, right = one(*args, **kwargs), two(*args, **kwargs)
        for input_name in left.relevance:
            np.testing.assert_array_equal(left.relevance[input_name], right.relevance[input_name])


def test_other_numbers_in_the_weights_are_no_other_program(compilations: list[str]) -> None:
    dlbc.compile(net(), X)
    model = net()
    with torch.no_grad():
        model.second.weight.add_(1.0)
        model.shift.add_(1.0)
    found = dlbc.compile(model, X)
    assert compilations == ["Net"]
    np.testing.assert_allclose(found(X).outputs["output"], model(X).detach(), rtol=1e-5, atol=1e-6)


def test_other_sizes_of_free_axes_are_no_other_program(compilations: list[str]) -> None:
    dlbc.compile(net(), X)
    dlbc.compile(net(), X.repeat(3, 1))
    assert compilations == ["Net"]


class Pairs(nn.Module):
    """Works for the batch it was captured with only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row * (i + 1) for i, row in enumerate(x)])


def test_sizes_that_the_export_fixed_are_compiled_and_found_each(compilations: list[str], cache_dir: Path) -> None:
    one = dlbc.compile(Pairs(), X)
    assert one.manifest.static
    one(X.repeat(2, 1))
    assert len(compilations) == 2 and len(files(cache_dir)) == 2
    dlbc.compile(Pairs(), X)(X.repeat(2, 1))
    dlbc.compile(Pairs(), X.repeat(2, 1))
    assert len(compilations) == 2


# A change of anything that matters is another key


def _hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def _set(path: str, value: object) -> Callable[[Net], None]:
    def change(model: Net) -> None:
        *parts, last = path.split(".")
        owner: Any = model
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, last, value)

    return change


CHANGES: dict[str, Callable[[Net], object]] = {
    "an attribute": _set("factor", 2.0), "its type": _set("factor", 1), "a new attribute": _set("other", None),
    "a nested setting": _set("config.slope", 0.2), "a setting inside of that": _set("config.inner.sizes", (1, 3)),
    "a set": _set("config.inner.names", {"a", "c"}), "the training flag": lambda m: m.second.train(),
    "a forward hook": lambda m: m.first.register_forward_hook(_hook),
    "a pre-hook": lambda m: m.first.register_forward_pre_hook(lambda module, args: args),
    "a part": _set("second", nn.Linear(8, 3, bias=False)), "a part's class": _set("first", nn.Identity()),
    "the element type": lambda m: m.double(), "a tensor attribute": _set("table", torch.ones(2)),
    "a weight": lambda m: m.first.register_parameter("more", nn.Parameter(torch.ones(8))),
    "a method of this object": lambda m: setattr(m, "forward", types.MethodType(lambda self, x: self.first(x), m)),
    "a buffer that persists": lambda m: (delattr(m, "shift"), m.register_buffer("shift", torch.full((4,), 0.5))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_model_has_another_key(change: Callable[[Net], object]) -> None:
    model = net()
    before = key(model)
    assert key(net()) == before
    change(model)
    assert key(model) != before


def test_tied_weights_have_another_key() -> None:
    def pair(tied: bool) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if tied:
            model[1].weight = model[0].weight
        return model

    assert key(pair(tied=True)) == key(pair(tied=True)) != key(pair(tied=False))


def test_parts_that_attributes_refer_to() -> None:
    """A part of the tree in a list is that part; a module outside of the tree counts with its numbers."""
    def model(*, inside: bool, value: float = 1.0) -> nn.Module:
        found = net()
        found.parts = [found.second] if inside else [nn.Linear(8, 3)]  # type: ignore[assignment]
        for part in found.parts:  # type: ignore[union-attr]
            nn.init.constant_(part.weight, value)
            nn.init.zeros_(part.bias)
        return found

    assert key(model(inside=True)) == key(model(inside=True, value=2.0)) != key(model(inside=False))
    assert key(model(inside=False)) == key(model(inside=False)) != key(model(inside=False, value=2.0))


def test_changed_code_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the class, of a function it calls, and of what such a function closes over."""
    before = key(net())
    with monkeypatch.context() as patch:
        patch.setattr(Net, "forward", lambda self, x: self.second(self.first(x)))
        assert key(net()) != before
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "helper", lambda x, slope: F.leaky_relu(x, slope) + 1)
        assert key(net()) != before
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight))
        assert key(net()) != before
    assert key(net()) == before

    def scaled_by(factor: float) -> nn.Module:
        class Local(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * factor

        return Local()

    assert key(scaled_by(2.0)) != key(scaled_by(3.0))
    assert key(scaled_by(2.0)) == key(scaled_by(2.0))


@pytest.mark.parametrize("options", [
    {"rules": "dlb"}, {"rules": dlbc.Composite([("linear", "epsilon")], base="attnlrp")}, {"backend": "numpy"},
    {"dynamic": False}, {"explain": ("x",)}, {"fallback": "gradient"}, {"dynamic": {"x": [0]}}])
def test_other_options_have_another_key(options: dict[str, Any]) -> None:
    assert key(net(), **options) != key(net())


def test_other_predicates_have_another_key() -> None:
    one = dlbc.Composite([(lambda op: op.place == "first", "absolute")], base="attnlrp")
    two = dlbc.Composite([(lambda op: op.place == "second", "absolute")], base="attnlrp")
    assert key(net(), rules=one) != key(net(), rules=two)


def test_other_inputs_have_another_key() -> None:
    before = key(net())
    assert key(net(), X.double()) != before
    assert key(net(), X.unsqueeze(1)) != before
    assert key(net(), X[:, :3]) != before
    assert key(net(), X[:1]) == before == key(net(), {"x": X})
    assert key(net(), variant=Variant(keep="all")) != before


def test_a_key_is_the_same_in_every_process() -> None:
    """Sets and hashes of text differ between processes; keys must not."""
    code = "from tests.test_cache import key, net; print(key(net()))"
    keys = {python(code, PYTHONHASHSEED=seed) for seed in ("1", "2")}
    assert len(keys) == 1


def test_what_cannot_be_described_is_not_cached(compilations: list[str], cache_dir: Path,
                                                caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    model.guard = threading.Lock()  # type: ignore[assignment]
    with caplog.at_level(logging.INFO, "dlbc.cache"):
        dlbc.compile(model, X)
    assert "Net is not cached: `guard` is a _thread.lock" in caplog.text
    assert compilations == ["Net"] and files(cache_dir) == []


# A wrong hit


class Counted(nn.Module):
    """What it computes depends on something that no key can know."""

    state = staticmethod(lambda: os.environ["DLBC_TEST_FACTOR"])

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        nn.init.ones_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * float(self.state())


def test_a_wrong_hit_is_caught(compilations: list[str], monkeypatch: pytest.MonkeyPatch,
                               caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("DLBC_TEST_FACTOR", "1.0")
    dlbc.compile(Counted(), X)
    monkeypatch.setenv("DLBC_TEST_FACTOR", "1.5")
    model = Counted()
    unverified = dlbc.compile(model, X, verify=False)
    assert len(compilations) == 1
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(unverified(X).outputs["output"], model(X).detach(), rtol=1e-5)
    found = dlbc.compile(model, X)
    assert len(compilations) == 2 and "does not do what the model does: `output` differs by" in caplog.text
    np.testing.assert_allclose(found(X).outputs["output"], model(X).detach(), rtol=1e-5)
    dlbc.compile(model, X)
    assert len(compilations) == 2, "the right one has taken its place"


def test_verifying_changes_nothing_of_the_model() -> None:
    model = net().train()
    dlbc.compile(model, X)
    before, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.random.get_rng_state()
    dlbc.compile(model, X)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_weights_with_nan_are_refused_from_the_cache_too() -> None:
    dlbc.compile(net(), X)
    model = net()
    with torch.no_grad():
        model.second.bias[1] = float("nan")
    with pytest.raises(InputError, match=r"`second\.bias` holds NaN"):
        dlbc.compile(model, X)


# The store


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def _foreign(path: Path) -> None:
    other = dlbc.compile(Pairs(), X[:1])
    other.save(path)


def _version(path: Path) -> None:
    rewritten(path, replaced("manifest.json", '"version": 1', '"version": 0'))


def _writable(path: Path) -> None:
    path.chmod(0o666)


@pytest.mark.parametrize(("damage", "fact"), [
    (_cut, "cut short or damaged"), (_flip, "damaged|is not what was saved"), (_empty, "not a saved explainer"),
    (_foreign, "made for something else"), (_version, "version 0 of the format"), (_writable, "others could")])
def test_entries_that_cannot_be_used(damage: Callable[[Path], object], fact: str, compilations: list[str],
                                     cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    dlbc.compile(net(), X)
    entry, = cache_dir.iterdir()
    damage(entry)
    compilations.clear()
    found = dlbc.compile(net(), X)
    said = [record for record in caplog.records if record.name == "dlbc.cache"]
    assert compilations == ["Net"] and len(said) == 1
    assert said[0].levelno == logging.WARNING
    assert re.search(fact, caplog.text)
    assert explained(found).shape == X.shape
    dlbc.compile(net(), X)
    warned = [record for record in caplog.records if record.name == "dlbc.cache"]
    assert compilations == ["Net"] and len(warned) == 1, "it was mended"


def test_a_folder_that_others_can_write_is_not_used(compilations: list[str], cache_dir: Path,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    cache_dir.mkdir(parents=True)
    cache_dir.chmod(0o777)
    for _ in range(2):
        dlbc.compile(net(), X)
    assert compilations == ["Net", "Net"] and files(cache_dir) == []
    assert [r.message for r in caplog.records if "can be written by others" in r.message] == [caplog.records[0].message]


def test_a_folder_of_someone_else_is_not_used(compilations: list[str], cache_dir: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.os, "getuid", lambda: os.geteuid() + 1)
    dlbc.compile(net(), X)
    assert compilations == ["Net"] and files(cache_dir) == []


def test_a_folder_that_cannot_be_made(compilations: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DLBC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert explained(dlbc.compile(net(), X)).shape == X.shape
    assert len(caplog.records) == 1 and "cannot be used (Not a directory)" in caplog.text


def test_a_folder_that_cannot_be_written(compilations: list[str], cache_dir: Path, monkeypatch: pytest.MonkeyPatch,
                                         caplog: pytest.LogCaptureFixture) -> None:
    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "open", full)
    for _ in range(2):
        assert explained(dlbc.compile(net(), X)).shape == X.shape
    assert len(caplog.records) == 1 and "cannot be written (No space left on device)" in caplog.text
    assert files(cache_dir) == []


def test_the_folder_and_its_files_are_the_users_alone(cache_dir: Path) -> None:
    before = os.umask(0)
    try:
        dlbc.compile(net(), X)
    finally:
        os.umask(before)
    entry, = cache_dir.iterdir()
    assert cache_dir.stat().st_mode & 0o777 == 0o700 and entry.stat().st_mode & 0o777 == 0o600


def test_without_cache(compilations: list[str], cache_dir: Path) -> None:
    dlbc.compile(net(), X, cache=False)
    assert files(cache_dir) == []


def test_entries_and_clear(cache_dir: Path) -> None:
    assert cache.entries() == () and cache.clear() == 0
    dlbc.compile(net(), X)
    dlbc.compile(net(), X, rules="dlb", backend="numpy")
    (cache_dir / "notes.txt").write_text("the user's own")
    (cache_dir / ".abc.dlbc.0123").write_text("half written")
    found = cache.entries()
    assert {(e.model, e.backend) for e in found} == {("Net", "torch"), ("Net", "numpy")}
    assert {e.rules for e in found} > {"dlb"} and all(e.size == e.path.stat().st_size for e in found)
    assert cache.clear() == 3 and files(cache_dir) == ["notes.txt"]


# Two processes


RACE = """
import dlbc
from tests.test_cache import X, net
print(float(dlbc.compile(net(), X)(X).relevance["x"].sum()))
"""


def command(code: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    return [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path, **environment}


def python(code: str, **environment: str) -> str:
    arguments, env = command(code, **environment)
    done = subprocess.run(arguments, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_two_processes_at_once(cache_dir: Path) -> None:
    arguments, env = command(RACE)
    running = [subprocess.Popen(arguments, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0] and results[0] == results[1]
    assert len(files(cache_dir)) == 1 and len(cache.entries()) == 1


def test_a_second_process_loads_little(cache_dir: Path) -> None:
    """No export, no code generation, no drawing: what makes a warm start fast."""
    dlbc.compile(net(), X)
    python(RACE)
    before = files(cache_dir)
    code = f"{RACE}\nimport sys; print([m for m in ('jinja2', 'networkx', 'transformers') if m in sys.modules])"
    plain = "import torch, sys; print([m for m in ('jinja2', 'networkx', 'transformers') if m in sys.modules])"
    assert python(code).splitlines()[-1] == python(plain)
    assert files(cache_dir) == before


def test_a_model_without_numbers_is_compiled_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    """Its memory can be planned before the weights are there; constants of the meta device cannot be written."""
    monkeypatch.setenv("DLBC_CACHE_DIR", str(tmp_path))
    with torch.device("meta"):
        model, x = Net().eval(), torch.empty(2, 4)
    with caplog.at_level(logging.INFO, "dlbc.cache"):
        explainer = dlbc.compile(model, x, rules="epsilon", cache=True)
    assert explainer.memory(sizes={"B": 8}).peak.total > 0
    assert not list(tmp_path.glob("*.dlbc")) and "meta device" in caplog.text
    with pytest.raises(InputError, match="no numbers"):
        explainer(x)
