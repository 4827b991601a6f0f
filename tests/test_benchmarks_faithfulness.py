"""The benchmark of faithfulness, in small: it measures, keeps, does not measure twice, and writes tables."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.faithfulness import recall, sets, storage, tables
from benchmarks.faithfulness.__main__ import file_name, main
from benchmarks.faithfulness.arithmetic import flops
from benchmarks.faithfulness.dataset import DataSet
from benchmarks.faithfulness.methods import fingerprint, names_for
from dlbc.evaluate import Item, Tokens, delete

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLBC_CACHE_DIR", str(tmp_path / "cache"))


def _language_model(split: str) -> DataSet:
    """Two layers, untrained, on contexts of the recall task."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=recall.VOCABULARY, hidden_size=16, intermediate_size=24,
                                             num_hidden_layers=2, num_attention_heads=2, use_cache=False))
    tokens, answers, places = recall.contexts(3, early=True, generator=torch.Generator().manual_seed(0))
    items = tuple(Item({"input_ids": row[None]}, target=int(answer))
                  for row, answer in zip(tokens, answers, strict=True))
    return DataSet("tiny-lm", "lm", model.eval(), items, Tokens(last=1), (delete,), (0, 1, 2), 0.0, "held",
                   tuple((int(place),) for place in places), steps=3)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on the breast cancer set (trained here) and on a language model."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("faithfulness")
    patch.setenv("DLBC_CACHE_DIR", str(folder / "cache"))
    patch.setitem(sets.LOADERS, "tiny-lm", _language_model)
    patch.setitem(sets.ITEMS, "tiny-lm", 3)
    out = folder / "out"
    threads = torch.get_num_threads()
    common = ["--items", "3", "--threads", str(threads), "--out", str(out)]
    assert main(["--sets", "breast-cancer", "--methods", "epsilon,random", *common]) == 0
    assert main(["--sets", "tiny-lm", "--methods", "cp-lrp,latest first", *common]) == 0
    assert main(["--sets", "tiny-lm", "--methods", "centre first", *common]) == 1
    patch.undo()
    return out


def _record(results: Path, path: str) -> dict[str, object]:
    return json.loads((results / path).read_text())


def test_a_record_holds_what_was_measured(results: Path) -> None:
    record = _record(results, "breast-cancer/epsilon.json")
    areas = record["area"]["zero"]
    assert len(areas) == 3 and all(-1 <= area <= 1 for area in areas)
    assert record["accuracy"] > 0.9
    assert max(record["conservation"]["residual"]) < 1e-4
    assert record["cost"]["flops"] == pytest.approx(1, abs=0.3)
    assert all(value < -0.9 for value in record["sr"])  # of two classes, what speaks for one speaks against the other
    assert "cost" not in _record(results, "breast-cancer/random.json")


def test_epsilon_is_more_faithful_than_chance(results: Path) -> None:
    epsilon, random = (_record(results, f"breast-cancer/{name}.json") for name in ("epsilon", "random"))
    assert tables.paired(epsilon, random).mean > 0.3


def test_a_known_answer_is_looked_for(results: Path) -> None:
    record = _record(results, "tiny-lm/latest-first.json")
    assert record["pointing"] == [0, 0, 0]  # the answer stands early, and this control points at the latest token
    assert len(_record(results, "tiny-lm/cp-lrp.json")["rr"]) == 3


def test_what_fails_is_kept_as_a_failure(results: Path) -> None:
    record = _record(results, "tiny-lm/centre-first.json")
    assert "have no centre" in record["error"]
    assert "have no centre" in tables.sets_section({"tiny-lm": {"centre first": record}})


def test_nothing_is_measured_twice(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = results / "breast-cancer" / "random.json"
    ask = ["--sets", "breast-cancer", "--methods", "random", "--threads", str(torch.get_num_threads()), "--out",
           str(results)]
    before = path.stat().st_mtime_ns
    assert main([*ask, "--items", "3"]) == 0
    assert path.stat().st_mtime_ns == before
    kept = path.read_text()
    assert main([*ask, "--items", "4"]) == 0
    assert len(json.loads(path.read_text())["area"]["zero"]) == 4
    path.write_text(kept)


def test_tables_are_written_between_the_markers(results: Path) -> None:
    text = "".join(f"before\n{tables.BEGIN.format(name)}\nold\n{tables.END.format(name)}\n" for name in tables.SECTIONS)
    made = tables.page(text, tables.read(results))
    assert "old" not in made and made.count("before") == 3
    assert "### breast-cancer" in made and "| `epsilon` |" in made
    with pytest.raises(ValueError, match="lacks"):
        tables.page("no markers", {})


def test_the_page_has_its_markers_and_is_current() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.page(text, tables.read()) == text, "run `python -m benchmarks.faithfulness.tables`"


def test_standard_errors_are_over_groups() -> None:
    values = [1.0, 1.0, 3.0, 3.0]
    alone, grouped = tables.estimate(values, [0, 1, 2, 3]), tables.estimate(values, [0, 0, 1, 1])
    assert alone.mean == grouped.mean == 2
    assert alone.error == pytest.approx(np.std(values, ddof=1) / 2)
    assert grouped.error == pytest.approx(np.std([1, 3], ddof=1) / np.sqrt(2))
    assert tables.estimate([1.0, None, 3.0], [0, 1, 2]).mean == 2


def test_recall_has_one_answer_and_it_stands_early() -> None:
    tokens, answers, places = recall.contexts(50, early=True, generator=torch.Generator().manual_seed(3))
    rows = torch.arange(50)
    assert (tokens[rows, places] == tokens[:, -1]).all() and (tokens[rows, places + 1] == answers).all()
    assert ((tokens[:, :-1] == tokens[:, -1:]).sum(1) == 1).all()
    assert int(places.max()) < recall.EARLY


def test_methods_that_say_the_same_are_measured_once() -> None:
    data = _language_model("held")
    names = names_for(data)
    assert {"attnlrp", "cp-lrp", "latest first", "integrated gradients"} <= set(names)
    assert not {"epsilon", "epsilon-plus", "centre first"} & set(names)
    assert fingerprint("cp-lrp") != fingerprint("attnlrp")
    assert fingerprint("gamma{gamma=0.1}") != fingerprint("gamma")


def test_file_names() -> None:
    assert file_name("gamma{gamma=0.1}") == "gamma-gamma-0.1"
    assert file_name("latest first") == "latest-first"


def test_arithmetic_is_counted_forwards_and_backwards() -> None:
    layer, x = torch.nn.Linear(8, 4), torch.ones(2, 8, requires_grad=True)
    assert flops(lambda: layer(x)) == 2 * 2 * 8 * 4
    assert flops(lambda: torch.autograd.grad(layer(x).sum(), x)) == 2 * (2 * 2 * 8 * 4)
    with torch.inference_mode():
        assert flops(lambda: layer(x)) == 2 * 2 * 8 * 4


def test_archives_must_be_the_file_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("folder/a.txt", "text")
    monkeypatch.setattr(storage.Archive, "_fetched", lambda self: data.getvalue())
    found = storage.Archive("project", "project-1.zip", "")
    assert found.read(["a.txt"]) == {"a.txt": b"text"}
    monkeypatch.setattr(storage.Archive, "_fetched", lambda self: pytest.fail("fetched twice"))
    assert found.read(["a.txt"]) == {"a.txt": b"text"}
    with pytest.raises(ValueError, match=r"holds no b\.txt"):
        storage._members("project-1.zip", data.getvalue(), ["b.txt"])


def test_a_fetched_file_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"https://index/simple/p/": b'<a href="../../f/p-1.zip#sha256=0">p-1.zip</a>',
             "https://index/f/p-1.zip": b"x"}
    monkeypatch.setenv("PIP_INDEX_URL", "https://index/simple")
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(pages[url]))
    right = hashlib.sha256(b"x").hexdigest()
    assert storage.Archive("p", "p-1.zip", right)._fetched() == b"x"
    with pytest.raises(ValueError, match="not the file"):
        storage.Archive("p", "p-1.zip", "0")._fetched()
    with pytest.raises(OSError, match="no file"):
        storage.Archive("p", "p-2.zip", right)._fetched()
