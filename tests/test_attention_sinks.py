"""Attention sinks (GPT-OSS) and latent attention (DeepSeek): raised, computed, explained, by blocks and in kernels.

A sink is one more score of each row, with value 0. The rules against their formulas: test_rules.py; blocks of rows and
Triton's kernels: test_stream.py and test_triton_attention.py, whose cases have sinks too.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dlbc
from dlbc.errors import IRError
from dlbc.frontends.torch_export import import_model
from dlbc.ir.core import Graph, Op, Type, Value
from dlbc.ir.interpreter import interpret
from dlbc.ir.ops import infer
from dlbc.ir.reference import REFERENCE
from dlbc.passes import run
from dlbc.passes.lower import Lower
from dlbc.passes.pair import Pair
from dlbc.passes.pipeline import CANONICALISE
from dlbc_runtime import numpy_kernels, torch_kernels
from tests.test_models import Compiled, captured, check_against_oracle, distance, on_own_values, seeds_of
from tests.zoo import Case

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "intermediate_size": 24}
RULES = ("attnlrp", "attnlrp-conserving", "cp-lrp", "dlb", "dlb-0.1", "epsilon", "gamma", "auto", "input-x-gradient")


class ClampedGate(nn.Module):
    """What one of GPT-OSS's experts computes, for all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        both = self.both(x)
        gate, up = both[..., ::2].clamp(max=0.9), both[..., 1::2].clamp(-0.8, 0.8)
        return self.down((up + 1) * (gate * torch.sigmoid(gate * 1.702))), None


def _numbers(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.3 if p.dim() > 1 else 0.2)
            if "sinks" in name:
                p.normal_(0.0, 1.5)


@functools.cache
def gpt_oss() -> Any:
    """GPT-OSS without routing: a layer with a window of 4 and one without."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(
            **SMALL, num_key_value_heads=2, head_dim=4, sliding_window=4, num_local_experts=2, num_experts_per_tok=1,
            layer_types=["sliding_attention", "full_attention"], attn_implementation="eager"))
        for layer in model.model.layers:
            layer.mlp = ClampedGate()
        _numbers(model)
    return model.eval()


def deepseek(**changes: Any) -> Any:
    """DeepSeek-V3 without routing, one layer: heads of q and k of 10 numbers, of v of 6."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**{
            **SMALL, "num_hidden_layers": 1, "num_key_value_heads": 4, "moe_intermediate_size": 8,
            "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1,
            "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6, "v_head_dim": 6, **changes}))
        _numbers(model)
    return model.eval()


def words(rows: int = 2, length: int = 9, hidden: int = 3) -> dict[str, Any]:
    """Token ids, the first row padded on the left."""
    ids = torch.from_numpy(np.random.default_rng(length).integers(3, 40, (rows, length)))
    mask = torch.ones_like(ids)
    mask[0, :hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}


@functools.cache
def compiled() -> Compiled:
    return captured(Case(gpt_oss(), kwargs=words(), name="gpt_oss without routing"))


def canonical(model: nn.Module, *args: Tensor, **kwargs: Any) -> Graph:
    return run(import_model(model, args, kwargs).graph, CANONICALISE)


def named(graph: Graph, *names: str) -> list[Op]:
    return [op for op in graph.forward.ops if op.name in names]


# --- raised ------------------------------------------------------------------------------------------------


def test_gpt_oss_is_raised() -> None:
    graph = compiled().source.canonical
    first, second = named(graph, "attention")
    assert [str(op.operands[4]) for op in (first, second)] == [f"@model.layers.{i}.self_attn.sinks" for i in range(2)]
    assert (first.attrs["causal"], first.attrs["window"]) == (True, 4)
    assert second.attrs["causal"] is True and "window" not in second.attrs
    assert all(isinstance(op.operands[3], Value) and op.operands[3].type.shape[1:3] == (1, 1)
               for op in (first, second)), "padding alone is left of the mask"
    assert [op.attrs["activation"] for op in named(graph, "glu")] == ["gelu_quick"] * 2
    assert len(named(graph, "rotary")) == 4
    assert not named(graph, "softmax", "amax", "max_with_index", "sigmoid", "gelu", "triangle")


class Written(nn.Module):
    """Attention with sinks, written out in some way, of x [B,H,T,D]."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor], heads: int = 2) -> None:
        super().__init__()
        self.sinks, self.way = nn.Parameter(torch.linspace(-1, 1, heads)), way

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        scores = x @ (x * 0.7).transpose(-1, -2) * 0.5
        return self.way(scores, self.sinks) @ (x + 0.3)


def column(sinks: Tensor, s: Tensor) -> Tensor:
    return sinks.reshape(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[-2], -1)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda s, k: torch.softmax(torch.cat([s, column(k, s)], -1), -1)[..., :-1],
    "in front": lambda s, k: torch.softmax(torch.cat([column(k, s), s], -1), -1)[..., 1:],
    "less the maximum": lambda s, k: _shifted(torch.cat([s, column(k, s)], -1))[..., :-1],
    "masked": lambda s, k: torch.softmax(torch.cat(
        [s + torch.triu(torch.full(s.shape[-2:], -1e38), 1), column(k, s)], -1), -1)[..., :-1],
    "masked by where": lambda s, k: torch.softmax(torch.cat([torch.where(
        torch.ones(s.shape[-2:], dtype=torch.bool).tril(), s, -torch.inf), column(k, s)], -1), -1)[..., :-1],
    "weights scaled": lambda s, k: torch.softmax(s, -1) * torch.sigmoid(s.logsumexp(-1) - k.view(1, -1, 1))[..., None],
    "weights scaled, axis kept": lambda s, k: torch.sigmoid(s.logsumexp(-1, True) - k.view(-1, 1, 1)) * s.softmax(-1),
    "in doubles": lambda s, k: torch.softmax(torch.cat([s, column(k, s)], -1).double(), -1)[..., :-1].float(),
}


def _shifted(scores: Tensor) -> Tensor:
    return torch.softmax(scores - scores.amax(-1, keepdim=True), -1)


def test_a_number_beside_the_scores() -> None:
    """A softmax whose weights may all be 0: the same score, 0, in every head."""
    model = Written(lambda s, k: torch.softmax(torch.cat([s, torch.zeros(*s.shape[:-1], 1)], -1), -1)[..., :-1])
    x = torch.from_numpy(np.random.default_rng(4).normal(size=(2, 2, 5, 3))).float()
    built = captured(Case(model, args=(x,), name="zero"))
    (op,) = named(built.source.canonical, "attention")
    assert isinstance(op.operands[4], Value) and op.operands[4].type.shape == (2,)
    for backend in ("torch", "numpy"):
        explainer = built.explainer("attnlrp", backend)
        explanation = explainer(x, target=dlbc_target(model(x)))
        np.testing.assert_allclose(explanation.outputs[explainer.manifest.output], model(x).detach(), atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_writing_it(way: str) -> None:
    model, x = Written(WAYS[way]), torch.from_numpy(np.random.default_rng(0).normal(size=(2, 2, 5, 3))).float()
    graph = canonical(model, x)
    (op,) = named(graph, "attention")
    assert str(op.operands[4]) == "@sinks" and not named(graph, "softmax", "cat", "amax", "logsumexp")
    assert op.attrs.get("causal", False) is ("masked" in way)
    weights = {"sinks": model.sinks.detach().double().numpy()}
    (found,) = interpret(graph, {graph.forward.params[0].name: x.double().numpy()}, weights).outputs
    np.testing.assert_allclose(found, model(x).detach(), atol=1e-6)


def test_what_attention_gives_is_scaled() -> None:
    """As Granite SWA has it; a gate of other scores, or one that is no sink, stays a gate."""
    class Scaled(nn.Module):
        def __init__(self, other: float) -> None:
            super().__init__()
            self.sinks, self.other = nn.Parameter(torch.linspace(-1, 1, 2)), other

        def forward(self, x: Tensor) -> Tensor:
            scores = x @ x.transpose(-1, -2) * 0.5
            gate = ((scores * self.other).logsumexp(-1) - self.sinks.view(1, -1, 1)).sigmoid()
            return (scores.softmax(-1) @ x) * gate[..., None]

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 2, 5, 3))).float()
    graph = canonical(Scaled(1.0), x)
    (op,) = named(graph, "attention")
    assert str(op.operands[4]) == "@sinks" and not named(graph, "mul", "sigmoid", "logsumexp")
    weights = {"sinks": torch.linspace(-1, 1, 2).double().numpy()}
    (found,) = interpret(graph, {graph.forward.params[0].name: x.double().numpy()}, weights).outputs
    np.testing.assert_allclose(found, Scaled(1.0)(x).detach(), atol=1e-6)
    assert named(canonical(Scaled(2.0), x), "sigmoid")


def test_the_largest_score_is_subtracted_without_sinks_too() -> None:
    model, x = Written(lambda s, k: _shifted(s)), torch.ones(1, 2, 4, 3)
    (op,) = named(canonical(model, x), "attention")
    assert len(op.operands) == 3


@pytest.mark.parametrize(("way", "why"), [
    (lambda s, k: torch.softmax(torch.cat([s, s.mean(-1, keepdim=True)], -1), -1)[..., :-1], "it depends on the input"),
    (lambda s, k: torch.softmax(torch.cat([s, column(k, s)], -1), -1)[..., 1:], "a key is cut off, not the sink"),
    (lambda s, k: torch.softmax(torch.cat([s, column(k, s), column(k, s)], -1), -1)[..., :-2], "there are two"),
    (lambda s, k: torch.softmax(torch.cat([s, k.reshape(1, 1, -1, 1).expand(*s.shape[:-1], 1)], -1), -1)[..., :-1],
     "one for each row"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_no_sink_stays(way: Callable[[Tensor, Tensor], Tensor], why: str) -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 4, 4, 4))).float()
    assert not named(canonical(Written(way, heads=4), x), "attention"), why


@pytest.mark.parametrize("rules", ["attnlrp", "cp-lrp", "dlb", "input-x-gradient"])
def test_rules_of_the_whole_and_of_its_parts_agree(rules: str) -> None:
    """Attention raised, and the softmax over one more column as it was written: the same relevance."""
    model, x = Written(WAYS["plain"]), torch.from_numpy(np.random.default_rng(1).normal(size=(2, 2, 5, 3)))
    graph = import_model(model, (x.float(),), {}).graph
    seeds = np.random.default_rng(2).normal(size=(2, 2, 2, 5, 3))
    found = []
    for own in (graph, run(graph, CANONICALISE)):
        lowered = Lower().run(Pair(composite=rules).run(own))
        assert lowered.relevance is not None
        found.append(interpret(lowered, {own.forward.params[0].name: x.numpy()},
                               {"sinks": model.sinks.detach().double().numpy()},
                               {lowered.relevance.params[0].name: seeds}).relevance[0])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-4 * np.abs(found[0]).max())


def test_input_x_gradient_is_torchs() -> None:
    """By autograd through the softmax with one more column, with a window and without."""
    model = Long()
    x = torch.from_numpy(np.random.default_rng(5).normal(size=(2, 7, 8))).float().requires_grad_()
    model(x)[:, 3].sum().backward()
    assert x.grad is not None
    explainer = dlbc.compile(model, x.detach(), rules="input-x-gradient", cache=False)
    found = explainer(x.detach(), target=3, multiplier=1.0).relevance["x"]
    assert distance(found, (x * x.grad).detach().numpy()) < 1e-5


def test_a_sink_is_one_number_of_each_head() -> None:
    q = Value("q", Type("f32", (1, 2, 3, 4)))
    for shape, dtype in (((3,), "f32"), ((2, 1), "f32"), ((2,), "i64")):
        sinks = Value("sinks", Type(dtype, shape))
        for name, operands in (("attention", (q, q, q, None, sinks)), ("attention_weights", (q, q, None, sinks))):
            with pytest.raises(IRError, match="2 heads: one number each"):
                infer(name, operands, {"scale": 1.0})


# --- the forward pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_forward_equals_the_model(backend: str) -> None:
    """Texts shorter and longer than the window and than what it was compiled for, with and without padding."""
    explainer = compiled().explainer("cp-lrp", backend, all_positions=True)
    for given_ in (words(), words(1, 3, 0), words(3, 4, 1), words(2, 21, 8), words(1, 1, 0)):
        with torch.no_grad():
            expected = gpt_oss()(**given_).logits
        target = dlbc_target(expected)
        found = explainer(**given_, target=target).outputs["logits"]
        seen = given_["attention_mask"].bool().numpy()
        np.testing.assert_allclose(found[seen], expected.numpy()[seen], atol=2e-5)


def dlbc_target(outputs: Tensor) -> Any:
    return dlbc.Target.tensor(np.ones(outputs.shape, np.float32))


def test_bfloat16() -> None:
    """The last position's logits, within bfloat16's rounding of eager bfloat16; relevance finite, close to that of
    float64 on what the forward pass saved, and nothing at padding."""
    model, given_ = copy.deepcopy(gpt_oss()).to(torch.bfloat16), words()
    with torch.no_grad():
        expected = model(**given_).logits[:, -1].float().numpy()
    built = captured(Case(model, kwargs=given_, name="bfloat16"))
    for rules in ("attnlrp", "dlb"):
        explainer = built.explainer(rules)
        explanation = explainer(**given_)
        assert distance(explanation.outputs["logits"][:, 0], expected) < 2e-2
        assert on_own_values(explainer, explanation) < 2e-2
        assert not explanation.relevance["input_ids"][0, :3].any()


LOW, HIGH = -1e4, 1e4


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["torch", "numpy"]), st.tuples(*[st.integers(1, 7)] * 2),
       st.sampled_from([(1, 1), (4, 2), (3, 3)]), st.tuples(st.integers(1, 9), st.integers(1, 9)), st.booleans(),
       st.sampled_from([None, 1, 3]), st.sampled_from(["", "bool", "float"]), st.sampled_from([None, 2.0]),
       st.integers(0, 99))
def test_kernels_equal_the_reference(backend: str, lengths: tuple[int, int], heads: tuple[int, int],
                                     widths: tuple[int, int], causal: bool, window: int | None, mask: str,
                                     softcap: float | None, seed: int) -> None:
    """Any shapes, heads of v of another width, rows that see nothing, and sinks that take all, nothing, or are -inf."""
    random = np.random.default_rng(seed)
    (rows, keys), (h, g), (d, e) = lengths, heads, widths
    q, k, v = (random.normal(size=(2, n, t, w)) for n, t, w in ((h, rows, d), (g, keys, d), (g, keys, e)))
    sinks = np.where(random.random(h) < 0.5, random.normal(size=h), random.choice([LOW, HIGH, -np.inf], size=h))
    seen: Any = {"": None, "bool": random.random((2, 1, rows, keys)) < 0.6,
                 "float": np.where(random.random((1, h, 1, keys)) < 0.3, -np.inf, 0.4)}[mask]
    how: dict[str, Any] = {"scale": 0.6, "causal": causal, "window": window, "softcap": softcap}
    expected = REFERENCE["attention"](q, k, v, seen, sinks, **how)
    weights = np.asarray(REFERENCE["attention_weights"](q, k, seen, sinks, **how))
    assert np.isfinite(expected).all() and (weights.sum(-1) <= 1 + 1e-12).all()
    if backend == "numpy":
        found = numpy_kernels.attention(q, k, v, seen, sinks, **how)
        parts = numpy_kernels.attention_weights(q, k, seen, sinks, **how)
    else:
        t = [None if x is None else torch.from_numpy(x) for x in (q, k, v, seen, sinks)]
        found = torch_kernels.attention(*t, **how).numpy()  # type: ignore[arg-type]
        parts = torch_kernels.attention_weights(*t[:2], *t[3:], **how).numpy()  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=1e-10)
    np.testing.assert_allclose(parts, weights, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_hold_a_sink_exactly_enough(dtype: torch.dtype) -> None:
    """The sink's score goes through torch's kernel as two halves: as good as scores that are rounded once."""
    random = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(random.normal(size=(2, 2, 40, 64))).to(dtype) for _ in range(3))
    sinks = torch.tensor([3.1415926, -0.7182818]).to(dtype)
    for causal in (False, True):
        found = torch_kernels.attention(q, k, v, None, sinks, scale=0.11, causal=causal).double().numpy()
        expected = REFERENCE["attention"](*(x.double().numpy() for x in (q, k, v)), None, sinks.double().numpy(),
                                          scale=0.11, causal=causal, window=None, softcap=None)
        assert np.abs(found - expected).max() <= 4 * torch.finfo(dtype).eps * np.abs(expected).max()


# --- relevance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES)
def test_relevance_equals_the_float64_interpreter(rules: str) -> None:
    """torch's and numpy's, under every preset, with padding and a window smaller than the text."""
    check_against_oracle(compiled(), rules)


@pytest.mark.parametrize("rules", [name for name in RULES if name != "dlb-0.1"] + ["dlb-contrastive"])
def test_padding_gets_nothing_and_the_ledger_closes(rules: str) -> None:
    explainer = compiled().explainer(rules)
    explanation = explainer(**words())
    found = explanation.relevance["input_ids"]
    assert (found[0, :3] == 0).all() and found[0, 3:].any() and np.isfinite(found).all()
    ledger = explanation.conservation()
    assert ledger.closes(), ledger
    if rules in ("attnlrp", "input-x-gradient"):  # others give the sink nothing, its value being 0
        assert any(row.absorbed.get("constant") for row in ledger.rows if row.op == "attention")


@pytest.mark.parametrize("rules", ["attnlrp", "dlb"])
def test_a_padded_row_is_explained_as_if_alone(rules: str) -> None:
    explainer = compiled().explainer(rules)
    given_ = words()
    both = explainer(**given_).relevance["input_ids"][0, 3:]
    alone = explainer(**{name: x[:1, 3:] for name, x in given_.items()}).relevance["input_ids"][0]
    assert distance(both, alone) < 1e-4


def test_outside_the_window_nothing_is_read() -> None:
    """One layer with a window of 4: the last position knows the last four tokens."""
    explainer = dlbc.compile(Windowed(), torch.ones(1, 2, 9, 4), rules="attnlrp", cache=False)
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(1, 2, 9, 4))).float()
    found = explainer(x).relevance["x"]
    assert not found[:, :, :5].any() and found[:, :, 5:].any()


class Windowed(nn.Module):
    """Attention with sinks, causal and within a window, read at the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2])
        back = at[:, None] - at
        scores = torch.where((back >= 0) & (back < 4), x @ x.transpose(-1, -2), -torch.inf)
        weights = torch.softmax(torch.cat([scores, column(self.sinks, scores)], -1), -1)[..., :-1]
        return (weights @ x)[:, :, -1].flatten(1)


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_blocks_change_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model with blocks of a few rows, and at once."""
    given_ = words(2, 23, 5)
    for rules in ("attnlrp", "dlb"):
        explainer = compiled().explainer(rules, backend)
        whole = explainer(**given_)
        monkeypatch.setattr("dlbc_runtime.streams.BUDGET", 500)
        parts = explainer(**given_)
        monkeypatch.undo()
        np.testing.assert_allclose(parts.outputs["logits"], whole.outputs["logits"], atol=1e-5)
        assert distance(parts.relevance["input_ids"], whole.relevance["input_ids"]) < 1e-4


_LONG = """
import resource, torch, dlbc
from tests.test_attention_sinks import Long
torch.set_num_threads(1)
model, tokens = Long().eval(), 8192
explainer = dlbc.compile(model, torch.zeros(1, 16, 8), rules="attnlrp", cache=False, verify=False)
explainer(torch.zeros(1, 16, 8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
explainer(torch.randn(1, tokens, 8))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


class Long(nn.Module):
    """Two heads of attention with sinks, with a window and without."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.tensor([0.5, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        back = at[:, None] - at
        for seen in ((back >= 0) & (back < 100), back >= 0):
            q, k, v = ((x * a).reshape(*x.shape[:2], 2, 4).transpose(1, 2) for a in (0.5, 1.5, 0.8))
            scores = torch.where(seen, q @ k.transpose(-1, -2), -torch.inf)
            weights = torch.softmax(torch.cat([scores, column(self.sinks, scores)], -1), -1)[..., :-1]
            x = x + (weights @ v).transpose(1, 2).flatten(2)
        return x.mean(1)


def test_memory_of_a_long_text() -> None:
    """8,192 tokens, two heads: one array of weights would take 512 MiB, and relevance reads several."""
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'runtime'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _LONG], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


def test_a_plan_for_a_gpu_has_kernels_of_it() -> None:
    pytest.importorskip("triton")
    explainer = dlbc.compile(Long(), torch.ones(1, 16, 8), rules="attnlrp", backend="triton", target="sm_90",
                             cache=False, verify=False)
    rows = [row for row in explainer.plan() if "stream" in row.ops]
    assert len(rows) == 2 and all(row.runs == "triton attention" for row in rows)


# --- gates and latent attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("rules", ["attnlrp", "cp-lrp", "dlb", "input-x-gradient"])
def test_the_clamped_gate(rules: str, backend: str) -> None:
    """`(clamp(up) + 1) * quick_gelu(clamp(gate))` alone: the interpreter's numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 16), _First(ClampedGate()))
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 5))).float()
    built = captured(Case(model, args=(x,), name="gate"))
    (op,) = named(built.source.canonical, "glu")
    assert op.attrs["activation"] == "gelu_quick"
    explainer = built.explainer(rules, backend)
    explanation = explainer(x)
    assert on_own_values(explainer, explanation) < 1e-4
    np.testing.assert_allclose(explanation.outputs[explainer.manifest.output], model(x).detach(), atol=1e-5)
    assert seeds_of(explainer, explanation).any()


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)[0]
        return found


LATENT: dict[str, dict[str, Any]] = {
    "pairs": {}, "halves, eager": {"rope_interleave": False, "attn_implementation": "eager"},
    "queries without latents, wide values": {"q_lora_rank": None, "v_head_dim": 12},
    "yarn": {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 16}},
}


@functools.cache
def latent(kind: str) -> Compiled:
    return captured(Case(deepseek(**LATENT[kind]), kwargs=words(), name=kind))


@pytest.mark.parametrize("kind", LATENT)
def test_latent_attention_is_raised(kind: str) -> None:
    """However rotary pairs lie; k, which is written into a buffer part by part, is two parts side by side."""
    graph = latent(kind).source.canonical
    found = Counter(op.name for op in graph.forward.ops)
    assert (found["attention"], found["rotary"], found["glu"]) == (1, 2, 1)
    assert not any(found[name] for name in ("softmax", "full", "where", "sub", "neg", "scatter", "slice_scatter"))
    assert all(op.attrs["causal"] is True for op in named(graph, "attention"))


@pytest.mark.parametrize("kind", ["pairs", "queries without latents, wide values"])
def test_latent_attention_is_explained(kind: str) -> None:
    built = latent(kind)
    for rules in ("attnlrp", "dlb"):
        check_against_oracle(built, rules)
    explainer = built.explainer("attnlrp")
    for given_ in (words(), words(1, 4, 0), words(3, 17, 6)):
        with torch.no_grad():
            expected = built.case.model(**given_).logits[:, -1].numpy()
        explanation = explainer(**given_)
        np.testing.assert_allclose(explanation.outputs["logits"][:, 0], expected, atol=2e-5)
        hidden = given_["attention_mask"].numpy() == 0
        assert (explanation.relevance["input_ids"][hidden] == 0).all()


def test_a_part_of_a_cat_is_what_was_laid_there() -> None:
    """Parts as a whole, from within one, across two (which stays), and along another axis (which stays)."""
    class Parts(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            both = torch.cat([a, b], -1)
            return both[..., 4:] * 2, both[..., 1:3] * 2, both[..., 3:6] * 2, both[:, 1:] * 2, F.relu(both[..., ::2])

    graph = canonical(Parts(), torch.ones(2, 3, 4), torch.ones(2, 3, 5))
    reads = [str(op.operands[0]) for op in named(graph, "slice")]
    assert len(named(graph, "slice")) == 4 and reads.count("%a") == 1
