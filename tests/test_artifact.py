"""Saved explainers: what comes back is what was saved, and a file from a stranger is data."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dlbc
import dlbc_runtime
from dlbc.errors import ArtifactError
from dlbc_runtime.artifact import MANIFEST, WEIGHTS
from dlbc_runtime.explainer import Explainer
from tests.zoo import CASES, Case, available

ROOT = Path(__file__).parents[1]
KINDS = ["lenet", "mlp_batch_norm", "buffers", "tied_autoencoder", "two_outputs_dict", "bfloat16", "llama", "bert"]


class Scaled(nn.Module):
    """Two linear maps, a buffer that no state dict names, and a tensor made in the forward method."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, hidden), nn.Linear(hidden, 3)
        self.register_buffer("shift", torch.tensor([0.5, -0.25, 0.125, 1.0]), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x + self.shift))
        return self.second(hidden) * torch.tensor([2.0, 3.0, 4.0])


def scaled(hidden: int = 8) -> Scaled:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Scaled(hidden).eval()


X = torch.tensor([[0.3, -1.0, 2.0, 0.7], [1.0, 0.1, -0.4, -2.0]])


def compiled(model: nn.Module | None = None, **options: Any) -> Explainer:
    return dlbc.compile(model or scaled(), X, cache=False, **options)


def relevance(explainer: Explainer, case: Case | None = None) -> dict[str, Any]:
    args, kwargs = (case.args, case.kwargs) if case else ((X,), {})
    found = explainer(*args, **kwargs)
    return {**found.relevance, **{f"output {name}": value for name, value in found.outputs.items()}}


def same(left: dict[str, Any], right: dict[str, Any], *, tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name, found in left.items():
        scale = float(np.abs(right[name]).max(initial=0.0))
        np.testing.assert_allclose(found, right[name], rtol=0.0, atol=tolerance * scale)


# What was saved comes back


@pytest.mark.parametrize("weights", [False, True], ids=["bound to the model", "weights inside"])
@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("name", KINDS)
def test_loading_explains_the_same(name: str, backend: str, weights: bool, tmp_path: Path) -> None:
    if not available(name):
        pytest.skip(f"{name} needs a package that is not installed")
    if (name, backend) == ("bfloat16", "numpy"):
        pytest.skip("numpy has no bfloat16")
    # Weights of a file lie elsewhere in memory, which changes how a matrix product is split into parts.
    tolerance = 1e-5 if weights else 0.0
    case = CASES[name]()
    explainer = dlbc.compile(case.model, case.kwargs or case.args, backend=backend, cache=False)
    expected = relevance(explainer, case)
    explainer.save(tmp_path / "e.dlbc", weights=weights)
    loaded = dlbc.load(tmp_path / "e.dlbc", None if weights else case.model)
    same(relevance(loaded, case), expected, tolerance=tolerance)
    assert loaded.source == explainer.source and loaded.manifest == explainer.manifest
    for level in ("exported", "canonical", "paired", "lowered"):
        assert loaded.ir(level) == explainer.ir(level)
    if weights:
        trusted = dlbc_runtime.load(tmp_path / "e.dlbc", trust=True)
        same(relevance(trusted, case), expected, tolerance=tolerance)


def test_a_loaded_explainer_builds_more(tmp_path: Path) -> None:
    explainer = compiled()
    nodes, closes = explainer(X, keep="modules").nodes, explainer(X).conservation().closes()
    compiled().save(tmp_path / "e.dlbc")
    loaded = dlbc.load(tmp_path / "e.dlbc", scaled())
    same(dict(loaded(X, keep="modules").nodes), dict(nodes))
    assert loaded(X).conservation().closes() == closes is True
    assert loaded.graph().number_of_nodes() == explainer.graph().number_of_nodes()


def test_every_variant_is_saved(tmp_path: Path) -> None:
    explainer = compiled()
    kept = dict(explainer(X, keep="*").nodes)
    explainer.save(tmp_path / "e.dlbc", weights=True)
    trusted = dlbc_runtime.load(tmp_path / "e.dlbc", trust=True)
    same(dict(trusted(X, keep="*").nodes), kept)
    with pytest.raises(ArtifactError, match=r"holds no program for all\n.*dlbc\.load"):
        trusted(X, keep="all")
    with pytest.raises(ArtifactError, match="without the compiler"):
        trusted.graph()
    trusted.save(tmp_path / "again.dlbc", weights=True)
    same(relevance(dlbc.load(tmp_path / "again.dlbc")), relevance(explainer))


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    compiled().save(tmp_path / "a.dlbc", weights=True)
    compiled().save(tmp_path / "b.dlbc", weights=True)
    assert (tmp_path / "a.dlbc").read_bytes() == (tmp_path / "b.dlbc").read_bytes()


def test_weights_are_outside_unless_asked_for(tmp_path: Path) -> None:
    compiled().save(tmp_path / "e.dlbc")
    with zipfile.ZipFile(tmp_path / "e.dlbc") as archive:
        names = archive.namelist()
        manifest = json.loads(archive.read(MANIFEST))
    assert WEIGHTS not in names and "constants.safetensors" in names
    assert {"manifest.json", "ir/canonical.dlir", "ir/default/paired.dlir", "source/default.py"} <= set(names)
    assert "shift" in manifest["constants"] and "first.weight" not in manifest["constants"]


def test_a_composite_goes_along(tmp_path: Path) -> None:
    composite = dlbc.Composite([("second", "absolute"), ("linear", "epsilon(0.01)")], base="epsilon", name="mine")
    explainer = compiled(rules=composite)
    expected = dict(explainer(X, keep="modules").nodes)
    compiled(rules=composite).save(tmp_path / "e.dlbc")
    loaded = dlbc.load(tmp_path / "e.dlbc", scaled())
    assert loaded.manifest.composite == "mine" and loaded.rules() == explainer.rules()
    same(dict(loaded(X, keep="modules").nodes), expected)


def test_a_predicate_does_not_go_along_but_its_choices_do(tmp_path: Path) -> None:
    composite = dlbc.Composite([(lambda op: op.place == "second", "absolute")], base="epsilon")
    explainer = compiled(rules=composite)
    explainer.save(tmp_path / "e.dlbc")
    loaded = dlbc.load(tmp_path / "e.dlbc", scaled())
    same(relevance(loaded), relevance(explainer))
    with pytest.raises(ArtifactError, match="predicate"):
        loaded(X, keep="all")


def test_a_numpy_explainer_needs_neither_torch_nor_the_compiler(tmp_path: Path) -> None:
    explainer = compiled(backend="numpy")
    explainer.save(tmp_path / "e.dlbc", weights=True)
    np.save(tmp_path / "x.npy", X.numpy())
    np.save(tmp_path / "r.npy", explainer(X).relevance["x"])
    code = f"""
import sys, numpy, dlbc_runtime
explainer = dlbc_runtime.load({str(tmp_path / "e.dlbc")!r}, trust=True)
explanation = explainer(numpy.load({str(tmp_path / "x.npy")!r}))
numpy.testing.assert_array_equal(explanation.relevance["x"], numpy.load({str(tmp_path / "r.npy")!r}))
print(sorted({{"dlbc", "torch", "jinja2", "networkx"}} & set(sys.modules)), explainer.ir()[:6])
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.stdout + done.stderr == "[] graph \n"


def test_running_stored_source_needs_trust(tmp_path: Path) -> None:
    compiled().save(tmp_path / "e.dlbc", weights=True)
    with pytest.raises(ArtifactError, match=r"executing the code in it\n.*dlbc\.load"):
        dlbc_runtime.load(tmp_path / "e.dlbc")


def test_the_compiler_never_runs_stored_source(tmp_path: Path) -> None:
    explainer = compiled()
    explainer.save(tmp_path / "e.dlbc")
    rewritten(tmp_path / "e.dlbc", lambda entries: entries.update({"source/default.py": b"raise SystemExit('run')"}))
    same(relevance(dlbc.load(tmp_path / "e.dlbc", scaled())), relevance(explainer))


# Weights that do not match


def test_without_weights_there_must_be_a_model(tmp_path: Path) -> None:
    compiled().save(tmp_path / "e.dlbc")
    with pytest.raises(ArtifactError, match=r"`first\.weight` f32\[8,4\] is missing[\s\S]*dlbc\.load\(path, model\)"):
        dlbc.load(tmp_path / "e.dlbc")
    with pytest.raises(ArtifactError, match=r"`first\.weight` f32\[8,4\] is missing[\s\S]*weights=True"):
        dlbc_runtime.load(tmp_path / "e.dlbc", trust=True)
    loaded = dlbc_runtime.load(tmp_path / "e.dlbc", trust=True, weights=dict(scaled().state_dict()))
    same(relevance(loaded), relevance(compiled()))


def test_a_model_of_other_weights_is_refused(tmp_path: Path) -> None:
    compiled().save(tmp_path / "e.dlbc")
    with pytest.raises(ArtifactError, match=r"`first\.weight` is f32\[9,4\], it should be f32\[8,4\]"):
        dlbc.load(tmp_path / "e.dlbc", scaled(hidden=9))
    with pytest.raises(ArtifactError, match=r"`second\.bias` is f64\[3\], it should be f32\[3\]"):
        dlbc.load(tmp_path / "e.dlbc", scaled().double())
    with pytest.raises(ArtifactError, match=r"`first\.bias` f32\[8\] is missing"):
        dlbc.load(tmp_path / "e.dlbc", nn.Linear(4, 3))


def test_the_weights_are_the_models_own(tmp_path: Path) -> None:
    compiled().save(tmp_path / "e.dlbc")
    model = scaled()
    loaded = dlbc.load(tmp_path / "e.dlbc", model)
    with torch.no_grad():
        model.second.weight.mul_(-1.0)
    np.testing.assert_allclose(loaded(X).outputs["output"], model(X).detach(), rtol=1e-5, atol=1e-6)


# Files that are damaged, foreign, or made to harm


Change = Callable[[dict[str, bytes]], object]


def rewritten(path: Path, change: Change, *, rehash: bool = True, compression: int = zipfile.ZIP_DEFLATED) -> None:
    """Change the entries of a file; a forger also writes the hashes anew."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    if rehash:
        import hashlib

        manifest = json.loads(entries[MANIFEST])
        manifest["entries"] = {name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                               for name, content in entries.items() if name != MANIFEST}
        entries[MANIFEST] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def replaced(name: str, old: str, new: str) -> Change:
    def change(entries: dict[str, bytes]) -> None:
        assert old.encode() in entries[name]
        entries[name] = entries[name].replace(old.encode(), new.encode())

    return change


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    compiled().save(tmp_path / "e.dlbc", weights=True)
    return tmp_path / "e.dlbc"


def refused(path: Path, match: str) -> None:
    """Both loaders refuse the file."""
    for load in (lambda: dlbc.load(path, scaled()), lambda: dlbc_runtime.load(path, trust=True)):
        with pytest.raises(ArtifactError, match=match):
            load()


@pytest.mark.parametrize(("content", "match"), [
    (b"", "not a saved explainer"), (b"PNG...", "not a saved explainer"), (b"PK\x03\x04 and no more", "damaged")])
def test_foreign_files(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "e.dlbc").write_bytes(content)
    refused(tmp_path / "e.dlbc", match)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    refused(tmp_path / "no.dlbc", "cannot be read: No such file")
    refused(tmp_path, "cannot be read")


def test_another_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "e.dlbc", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(tmp_path / "e.dlbc", "not a saved explainer")


def test_every_cut_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 25)):
        saved.write_bytes(content[:length])
        refused(saved, "damaged|not a saved explainer")


def test_every_changed_byte_is_noticed_or_harmless(saved: Path) -> None:
    content, expected = saved.read_bytes(), relevance(compiled())
    for position in range(0, len(content), max(1, len(content) // 120)):
        changed = bytearray(content)
        changed[position] ^= 0x5A
        saved.write_bytes(bytes(changed))
        try:
            loaded = dlbc_runtime.load(saved, trust=True)
        except ArtifactError:
            continue
        same(relevance(loaded), expected)  # e.g. the date of an entry


def test_content_that_is_not_what_was_hashed(saved: Path) -> None:
    rewritten(saved, replaced("source/default.py", "def forward", "def backward"), rehash=False)
    refused(saved, r"entry `source/default\.py` is not what was saved")


def test_another_version_of_the_format(saved: Path) -> None:
    rewritten(saved, replaced(MANIFEST, '"version": 1', '"version": 2'))
    refused(saved, "written in version 2 of the format, this is version 1")


@pytest.mark.parametrize("name", ["extra.txt", "ir/other.dlir", "source/x.py", "ir/default/spare.dlir"])
def test_unknown_entries(name: str, saved: Path) -> None:
    rewritten(saved, lambda entries: entries.update({name: b"?"}))
    refused(saved, "has no place in an explainer")
    rewritten(saved, lambda entries: entries.update({f"{name}2": b"?"}), rehash=False)
    refused(saved, "is not listed")


@pytest.mark.parametrize("name", ["../up.py", "/etc/passwd", "a/../../b", "C:/x", "a\\b", "a//b", "new\nline"])
def test_names_that_leave_the_file(name: str, saved: Path) -> None:
    rewritten(saved, lambda entries: entries.update({name: b"?"}))
    refused(saved, "holds an entry of the name")


def test_a_missing_entry(saved: Path) -> None:
    rewritten(saved, lambda entries: entries.pop("ir/canonical.dlir"), rehash=False)
    refused(saved, r"entry `ir/canonical\.dlir` is missing")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_is_there_twice(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("source/default.py", "raise SystemExit")
    refused(saved, "holds two entries")


def test_a_zip_bomb(saved: Path) -> None:
    rewritten(saved, lambda entries: entries.update({"source/default.py": b" " * 50_000_000}))
    refused(saved, "would unpack to 50,000,000 bytes")


@pytest.mark.parametrize("change", [
    lambda m: m.pop("variants"), lambda m: m.update(variants=[]), lambda m: m.update(default="nothing"),
    lambda m: m.update(recipe=None), lambda m: m["variants"]["default"].pop("program"),
    lambda m: m["variants"]["default"]["variant"].update(keep=3),
    lambda m: m["variants"]["default"]["program"].update(weights=[["a"]]),
    lambda m: m["variants"]["default"]["program"]["inputs"].update(trees=3)])
def test_a_manifest_that_makes_no_sense(change: Callable[[dict[str, Any]], object], saved: Path) -> None:
    def edit(entries: dict[str, bytes]) -> None:
        manifest = json.loads(entries[MANIFEST])
        change(manifest)
        entries[MANIFEST] = json.dumps(manifest).encode()

    rewritten(saved, edit)
    refused(saved, "damaged|no place")


@pytest.mark.parametrize(("name", "old", "new"), [
    ("ir/default/paired.dlir", "relu(", "rule("), ("ir/canonical.dlir", "f32[8,4]", "f32[8,5]"),
    ("ir/canonical.dlir", "forward(", "backward("), ("ir/exported.dlir", "%", "&")])
def test_ir_that_is_not_well_formed(name: str, old: str, new: str, saved: Path) -> None:
    rewritten(saved, replaced(name, old, new))
    with pytest.raises(ArtifactError, match=r"IR cannot be compiled|of another model"):
        dlbc.load(saved, scaled())


HARM = r'; import os; os.environ[\"DLBC_HARM\"] = \"1\"; '


@pytest.mark.parametrize(("old", "new", "match"), [
    ("graph @Scaled", rf'graph @"x\"\"\"{HARM}\"\"\""', "is no name"),
    ("graph @Scaled", rf'graph @"x\n{HARM}"', "does not print"),
    ("#second", rf'#"second\n{HARM}"', "does not print")])
def test_names_that_would_become_code(old: str, new: str, match: str, saved: Path) -> None:
    """A place is a comment in generated code, and the model's name is in its docstring."""
    for name in ("ir/default/paired.dlir", "ir/canonical.dlir", "ir/exported.dlir"):
        rewritten(saved, replaced(name, old, new))
    with pytest.raises(ArtifactError, match=match):
        dlbc.load(saved, scaled())(X)
    assert "DLBC_HARM" not in os.environ


def test_numbers_that_are_damaged(saved: Path) -> None:
    rewritten(saved, lambda entries: entries.update({WEIGHTS: b"\xff" * 64}))
    with pytest.raises(ArtifactError, match="numbers are damaged"):
        dlbc.load(saved)


def test_saving_is_all_or_nothing(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        compiled().save(saved / "inside.dlbc")
    assert saved.read_bytes() == before and [p.name for p in saved.parent.iterdir()] == [saved.name]
    assert zipfile.is_zipfile(io.BytesIO(before))
