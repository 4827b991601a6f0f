"""Differences to a reference input: exact secants, conservation, DeepLIFT, the run time's cache, files, bad input."""

from __future__ import annotations

import copy
import functools
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import dlbc
import dlbc_runtime
from dlbc.composite import Composite
from dlbc.errors import ArtifactError, InputError, RuleError, UnsupportedOpError
from dlbc.frontends.torch_export import Imported, import_model
from dlbc.ir.core import Graph
from dlbc.ir.interpreter import interpret
from dlbc.ir.parser import parse_graph
from dlbc.ir.printer import print_graph
from dlbc.ir.verifier import verify
from dlbc.passes import run
from dlbc.passes.lower import Lower, expand
from dlbc.passes.pair import Pair
from dlbc.passes.pipeline import CANONICALISE
from dlbc.passes.rules.secants import NEAR
from dlbc_runtime.reference import Reference, blurred

Array = NDArray[Any]
CONSERVING = ("epsilon", "attnlrp", "gamma", "dlb", "auto")


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


class Around(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 16), nn.Linear(width, 4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(self.before(x) * 1.5))


class Images(nn.Module):
    """Convolutions, batch norm, pooling, a residual and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6 * 9, 5)
        with torch.no_grad():
            assert self.norm.running_mean is not None and self.norm.running_var is not None
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        h = h + F.leaky_relu(self.second(h), 0.1)
        return self.head(F.max_pool2d(h, 3, 2).flatten(1))


class Words(nn.Module):
    """Token ids, with a mask, through one block of attention and a gated product."""

    def __init__(self, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.embedding, self.norm, self.last = nn.Embedding(20, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.gate, self.up, self.down, self.head = (
            nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        n = self.norm(x)
        q, k, v = (layer(n).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        mixed = F.scaled_dot_product_attention(q * 3, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        n = self.last(x)
        return self.head((x + self.down(F.silu(self.gate(n)) * self.up(n)))[:, -1])


@functools.cache
def images() -> tuple[Images, Tensor]:
    return seeded(lambda: (Images().eval(), torch.randn(3, 2, 7, 7)))


@functools.cache
def explainer_of(rules: str, backend: str = "torch") -> dlbc.Explainer:
    model, x = images()
    return dlbc.compile(model, x, rules=rules, backend=backend, reference="zero", cache=False)


@functools.lru_cache(maxsize=4)
def captured(model: nn.Module, x: Tensor) -> tuple[Imported, Graph]:
    """What the frontend finds, and the canonical graph."""
    imported = import_model(model, (x,), {})
    return imported, run(imported.graph, CANONICALISE)


def interpreted(model: nn.Module, x: Tensor, reference: Tensor, rules: str | Composite, *, level: str = "lowered",
                chosen: int = 0) -> tuple[Array, Array]:
    """Relevance of x [B, ...] in float64, and f(x) - f(ref) of one output; the seed is that difference."""
    imported, canonical = captured(model, x)
    pair = Pair(composite=rules, reference=True) if isinstance(rules, str) else Pair(rules=rules, reference=True)
    paired = pair.run(canonical)
    verify(paired)
    graph = paired if level == "paired" else Lower().run(paired)
    verify(graph)
    weights = {name: weight.detach().numpy() for name, weight in imported.weights.items()}
    name = graph.forward.params[0].name
    here, there = (interpret(graph, {name: one.numpy()}, weights) for one in (x, reference))
    assert graph.relevance is not None
    seed, *values = graph.relevance.params
    change = here.values[seed.name[2:]] - there.values[seed.name[2:]]
    given = np.zeros((1, *change.shape))
    given[0, :, chosen] = change[:, chosen]
    found = interpret(graph, {name: x.numpy()}, weights, {
        seed.name: given, **{v.name: there.values[v.name.removeprefix("ref.")] for v in values}},
        expand=expand if level == "paired" else None)
    return found.relevance[0][0], change[:, chosen]


def total(relevance: Array) -> Array:
    """The sum over everything but the batch."""
    return relevance.reshape(len(relevance), -1).sum(1)


# --- secants: exact for every op ---------------------------------------------------------------------

def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :8], x[:, 8:]


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "relu": (F.relu, 16), "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), 16), "relu6": (lambda x: F.relu6(x * 3), 16),
    "abs": (torch.abs, 16), "gelu": (F.gelu, 16), "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), 16),
    "silu": (F.silu, 16), "elu": (F.elu, 16), "selu": (F.selu, 16), "hardswish": (F.hardswish, 16),
    "hardsigmoid": (F.hardsigmoid, 16), "softplus": (lambda x: F.softplus(x, beta=3.0), 16), "mish": (F.mish, 16),
    "sigmoid": (torch.sigmoid, 16), "tanh": (torch.tanh, 16), "softsign": (F.softsign, 16), "exp": (torch.exp, 16),
    "sin": (torch.sin, 16), "cos": (torch.cos, 16), "erf": (torch.erf, 16),
    "log": (lambda x: torch.log(x * x + 0.1), 16),
    "log1p": (lambda x: torch.log1p(x.abs()), 16), "sqrt": (lambda x: torch.sqrt(x * x + 1), 16),
    "rsqrt": (lambda x: torch.rsqrt(x * x + 0.1), 16), "reciprocal": (lambda x: 1 / (x * x + 0.5), 16),
    "square": (lambda x: x**2, 16), "cube": (lambda x: x**3, 16), "power_of_two": (lambda x: 2**x, 16),
    "log_sigmoid": (F.logsigmoid, 16), "clamp": (lambda x: x.clamp(-0.3, 0.5), 16),
    "prelu": (nn.PReLU(init=0.3), 16),
    "product": (lambda x: halves(x)[0] * torch.sigmoid(halves(x)[1]), 8), "self_product": (lambda x: x * x, 16),
    "quotient": (lambda x: halves(x)[0] / (halves(x)[1] ** 2 + 1), 8),
    "quotient_of_a_constant": (lambda x: torch.ones(16) / (x * x + 1), 16), "scaled": (lambda x: x / 7 * 2, 16),
    "unit_length": (lambda x: x / x.norm(dim=-1, keepdim=True), 16),
    "layer_norm": (lambda x: F.layer_norm(x, (16,)), 16), "rms_norm": (lambda x: F.rms_norm(x, (16,)), 16),
    "group_norm": (lambda x: F.group_norm(x[..., None], 4)[..., 0], 16),
    "softmax": (lambda x: torch.softmax(x * 3, -1), 16), "log_softmax": (lambda x: torch.log_softmax(x, 1), 16),
    "maximum": (lambda x: torch.maximum(*halves(x)), 8), "minimum": (lambda x: torch.minimum(*halves(x)), 8),
    "maximum_with_a_constant": (lambda x: torch.maximum(x, torch.full((16,), 0.3)), 16),
    "amax": (lambda x: x.reshape(-1, 4, 4).amax(-1), 4), "amin": (lambda x: x.reshape(-1, 4, 4).amin(-1), 4),
    "max": (lambda x: x.reshape(-1, 4, 4).max(-1).values, 4),
    "swiglu": (lambda x: F.silu(halves(x)[0]) * halves(x)[1], 8),
    "geglu": (lambda x: F.gelu(halves(x)[0]) * halves(x)[1], 8),
    "matmul": (lambda x: (x.reshape(-1, 4, 4) @ x.reshape(-1, 4, 4).transpose(1, 2)).reshape(-1, 16), 16),
    "einsum": (lambda x: torch.einsum("bij,bkj->bik", x.reshape(-1, 4, 4), x.reshape(-1, 4, 4)).reshape(-1, 16), 16),
    "max_pool": (lambda x: F.max_pool2d(x.reshape(-1, 1, 4, 4), 3, 1).flatten(1), 4),
    "adaptive_max_pool": (lambda x: F.adaptive_max_pool2d(x.reshape(-1, 1, 4, 4), 2).flatten(1), 4),
    "avg_pool": (lambda x: F.avg_pool2d(x.reshape(-1, 1, 4, 4), 2).flatten(1), 4),
    "constants": (lambda x: F.pad(1 - x, (1, 1), value=3.0)[:, 1:-1] + torch.ones(16), 16),
    "attention": (lambda x: F.scaled_dot_product_attention(
        *(3 * x.reshape(-1, 2, 2, 4)[..., [i, (i + 1) % 4, (i + 2) % 4]] for i in range(3)),
        is_causal=True).flatten(1), 12),
    "attention_with_a_bias": (lambda x: F.scaled_dot_product_attention(
        x.reshape(-1, 2, 2, 4), 2 * x.reshape(-1, 2, 2, 4), x.reshape(-1, 2, 2, 4),
        attn_mask=torch.tensor([[0.5, float("-inf")], [-1.0, 2.0]])).flatten(1), 16),
    "attention_with_sinks": (lambda x: _sunk(x.reshape(-1, 2, 2, 4), torch.tensor([0.7, -1.2])).flatten(1), 16),
}


def _sunk(x: Tensor, sinks: Tensor) -> Tensor:
    """Attention with one more score per head, of value 0."""
    scores = torch.cat([2 * x @ x.mT, sinks.reshape(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[2], -1)], -1)
    return torch.softmax(scores, -1)[..., :-1] @ (x + 0.2)


@functools.cache
def pairs_of_inputs() -> tuple[Tensor, Tensor]:
    """Inputs and references: one equal, one next to each other, the others apart."""
    x, reference = seeded(lambda: (torch.randn(6, 6), torch.randn(6, 6)))
    reference[0] = x[0]
    reference[1] = x[1] + 1e-4 * seeded(lambda: torch.randn(6), 1)
    return x, reference


@pytest.mark.parametrize("name", FUNCTIONS)
def test_relevance_is_the_difference(name: str) -> None:
    """What arrives at the inputs sums to f(x) - f(ref), in every row, whatever lies between."""
    function, width = FUNCTIONS[name]
    model = seeded(lambda: Around(function, width))
    x, reference = pairs_of_inputs()
    for rules in ("attnlrp", "dlb"):
        relevance, change = interpreted(model, x, reference, rules)
        assert np.isfinite(relevance).all()
        assert (relevance[0] == 0).all()
        # Where a derivative stands for dy / dx, it misses a part of the order of NEAR ** 2 / 24 of small differences.
        assert np.abs(total(relevance) - change).max() <= 3e-7 * np.abs(change).max()
        assert np.abs(total(relevance)[1] - change[1]) <= 1e-5 * np.abs(change[1])


@pytest.mark.parametrize("name", ["relu", "gelu", "softmax", "layer_norm", "attention", "max_pool", "quotient"])
def test_levels_agree(name: str) -> None:
    """The paired graph, rule by rule, does what the lowered one does; and its text parses back."""
    function, width = FUNCTIONS[name]
    model = seeded(lambda: Around(function, width))
    x, reference = pairs_of_inputs()
    for rules in ("attnlrp", "epsilon", "dlb"):
        lowered, _ = interpreted(model, x, reference, rules)
        paired, _ = interpreted(model, x, reference, rules, level="paired")
        np.testing.assert_allclose(paired, lowered, rtol=1e-9, atol=1e-12)
    graph = Pair(composite="epsilon", reference=True).run(captured(model, x)[1])
    assert print_graph(parse_graph(print_graph(graph))) == print_graph(graph)


@pytest.mark.parametrize("function", [
    lambda h: torch.topk(h, 4, dim=-1).values.repeat(1, 4), lambda h: torch.maximum(h, h.flip(-1)),
    lambda h: torch.where(h > 0.2, h, h.roll(1, -1)), lambda h: F.relu(torch.cat([h[:, :8], h[:, 8:]], -1))])
def test_relevance_by_sizes_of_differences_is_never_negative(function: Callable[[Tensor], Tensor]) -> None:
    """Selections and ReLUs share out what comes, they do not divide it by one difference and multiply by another."""
    model, (x, other) = seeded(lambda: (Around(function).eval(), torch.randn(2, 200, 6)))
    found = dlbc.compile(model, x, rules="dlb", reference=other, cache=False)(x).relevance["x"]
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(-1), 100, rtol=1e-3)


# --- DeepLIFT ----------------------------------------------------------------------------------------

def rescale(model: nn.Sequential, x: Tensor, reference: Tensor, chosen: int) -> Tensor:
    """DeepLIFT's rescale rule, written by hand: the multipliers of each layer from the output back."""
    here, there = [x.double()], [reference.double()]
    for layer in model:
        here.append(layer(here[-1]))
        there.append(layer(there[-1]))
    m = torch.zeros_like(here[-1])
    m[:, chosen] = 1.0
    for layer, a, a0, b, b0 in reversed(list(zip(model, here, there, here[1:], there[1:], strict=False))):
        m = m @ layer.weight if isinstance(layer, nn.Linear) else m * (b - b0) / (a - a0)
    return m * (here[0] - there[0])


def test_epsilon_is_deeplifts_rescale_rule() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)))
    for seed in range(50):  # inputs between which no tanh changes so little that its derivative is taken
        x, reference = seeded(lambda: (torch.randn(3, 6), torch.randn(3, 6)), seed)
        with torch.no_grad():
            if float((model[:3](x) - model[:3](reference)).abs().min()) > NEAR:
                break
    own, _ = interpreted(model, x, reference, "epsilon", chosen=2)
    expected = rescale(copy.deepcopy(model).double(), x, reference, 2).detach().numpy()
    assert np.abs(own - expected).max() <= 1e-8


def test_close_to_integrated_gradients() -> None:
    """On a trained network of images, with the mean of the data as the reference."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    data, labels = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    model, x = seeded(lambda: trained(data, labels)), data[1500:1516]
    reference = data[:1500].mean(0, keepdim=True)
    chosen = model(x).argmax(1)
    gradients = torch.zeros_like(x)
    for step in range(64):
        at = (reference + (step + 0.5) / 64 * (x - reference)).requires_grad_()
        model(at).gather(1, chosen[:, None]).sum().backward()
        assert at.grad is not None
        gradients += at.grad / 64
    expected = (gradients * (x - reference)).flatten(1).numpy()
    target = dlbc.Target.index(chosen.tolist())

    def agreement(**options: Any) -> float:
        found = dlbc.compile(model, x, rules="epsilon", cache=False, **options)(x, target=target).relevance["input"]
        return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(found.reshape(16, -1), expected, strict=True)]))

    assert agreement(reference=Reference.mean(data[:1500])) > 0.95 > agreement() + 0.3


def trained(data: Tensor, labels: Tensor) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
                          nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        rows = torch.randint(0, 1500, (64,))
        loss = F.cross_entropy(model(data[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


# --- compiled: conservation, the ledger, seeds -------------------------------------------------------

@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("rules", CONSERVING)
def test_conserved_at_the_inputs(rules: str, backend: str) -> None:
    """The multiplier, with the sign of f(x) - f(ref), arrives; nothing ends in a bias; the ledger closes."""
    model, x = images()
    explainer = explainer_of(rules, backend)
    for reference in (None, "mean", "blur", torch.full((1, 2, 7, 7), 0.3), x.flip(0)):
        target = [0, 1, dlbc.Target.difference(2, 3)]
        explanation = explainer(x, target=target, reference=reference)
        resolved = Reference.of("zero" if reference is None else reference).numbers("x", x)
        with torch.no_grad():
            change = (model(x) - model(torch.tensor(resolved).expand(x.shape))).numpy()
        expected = np.stack([change[:, 0], change[:, 1], change[:, 2] - change[:, 3]])
        expected = 100 * (np.ones_like(expected) if rules == "dlb" else np.sign(expected))
        expected[2] *= rules != "dlb"  # relevance itself of a difference: 100 - 100
        sums = explanation.relevance["x"].sum((2, 3, 4))
        clear = np.abs(np.stack([change[:, 0], change[:, 1], change[:, 2] - change[:, 3]])) > 0.05
        assert np.abs(sums - expected)[clear & (np.abs(x.numpy() - resolved).sum((1, 2, 3)) > 0)].max() <= 1e-2
        ledger = explanation.conservation()
        assert ledger.closes()
        assert set(ledger.absorbed) <= {"stabiliser", "constant"}
        assert sum(map(abs, ledger.absorbed.values())) <= 1e-4 * ledger.size


def test_half_precision_says_what_it_rounds() -> None:
    model, x = images()
    half, x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    explanation = dlbc.compile(half, x, rules="epsilon", reference="zero", cache=False)(x)
    assert explanation.conservation().closes()
    assert "rounding" in explanation.conservation().absorbed


def test_positive_relevance_raises_what_is_explained() -> None:
    """Of a linear model exactly w (x - ref), over |f(x) - f(ref)|, for outputs that rise and fall."""
    model = seeded(lambda: nn.Linear(4, 3))
    x, reference = seeded(lambda: (torch.randn(2, 4), torch.randn(1, 4)))
    explanation = dlbc.compile(model, x, rules="epsilon", reference=reference, cache=False)(x, target=[0, 1, 2])
    expected = (model.weight[:, None] * (x - reference)[None]).detach().numpy()
    expected *= 100 / np.abs(expected.sum(-1, keepdims=True))
    np.testing.assert_allclose(explanation.relevance["input"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rules", ["epsilon", "gamma", "dlb", "input-x-gradient"])
def test_nothing_to_explain_at_the_reference(rules: str) -> None:
    _, x = images()
    explanation = explainer_of(rules)(x, target=[0, dlbc.Target.difference(1, 2)], reference=x)
    assert (explanation.relevance["x"] == 0).all()
    assert explanation.conservation().seed == 0


def test_a_gradient_stays_a_gradient() -> None:
    """input-x-gradient on differences: the gradient at x times x - ref, and the ledger says what that leaves open."""
    model, x = images()
    at = x.clone().requires_grad_()
    model(at)[:, 1].sum().backward()
    assert at.grad is not None
    explanation = explainer_of("input-x-gradient")(x, target=1, multiplier=1.0, reference="mean")
    mean = x.mean((2, 3), keepdim=True)
    np.testing.assert_allclose(explanation.relevance["x"], (at.grad * (x - mean)).numpy(), rtol=1e-3, atol=1e-5)
    assert abs(explanation.conservation().absorbed["rule"]) > 1e-3


def test_rows_modules_and_batches() -> None:
    """Any batch; a row explains as alone; inner places sum to the same."""
    _, x = images()
    explainer, reference = explainer_of("epsilon"), torch.full((1, 2, 7, 7), 0.3)
    whole = explainer(x, target=1, reference=reference, keep="modules")
    alone = explainer(x[1:2], target=1, reference=reference)
    np.testing.assert_allclose(whole.relevance["x"][1:2], alone.relevance["x"], rtol=1e-4, atol=1e-4)
    each = explainer(x, target=1, reference=reference.expand(3, -1, -1, -1))
    np.testing.assert_allclose(whole.relevance["x"], each.relevance["x"], rtol=1e-4, atol=1e-4)
    for name in ("first", "head"):
        np.testing.assert_allclose(np.abs(total(whole.nodes[name])), 100, rtol=1e-4)


# --- models of tokens --------------------------------------------------------------------------------

@functools.cache
def words() -> tuple[Words, Tensor, Tensor]:
    ids = torch.tensor([[3, 7, 1, 4, 9], [2, 8, 8, 5, 6]])
    return seeded(lambda: Words().eval()), ids, torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def test_tokens() -> None:
    """Differences start at the embedding; [CLS]-like tokens may be kept, and then have none; masks stay masks."""
    model, ids, mask = words()
    explainer = dlbc.compile(model, {"ids": ids, "attention_mask": mask}, rules="attnlrp", cache=False,
                             reference=Reference.token(0, keep=[9]))
    explanation = explainer(ids=ids, attention_mask=mask, target=2)
    relevance = explanation.relevance["ids"]
    np.testing.assert_allclose(np.abs(relevance.sum(1)), 100, rtol=1e-4)
    assert relevance[0, 4] == 0 and (relevance[1, :2] == 0).all() and np.count_nonzero(relevance) == 7
    assert explanation.conservation().closes()
    other = explainer(ids=ids, attention_mask=mask, target=2, reference=torch.tensor([[0, 0, 0, 0, 9]]))
    np.testing.assert_allclose(other.relevance["ids"][0], relevance[0], rtol=1e-4, atol=1e-4)


def test_constant_attention_weights_say_what_they_lose() -> None:
    """cp: the change of attention weights and of gates is absorbed by the rule, and nothing else is."""
    model, ids, mask = words()
    for rules, causes in (("attnlrp", set()), ("cp-lrp", {"rule"}), ("dlb", set())):
        explainer = dlbc.compile(model, {"ids": ids, "attention_mask": mask}, rules=rules, cache=False,
                                 reference=Reference.token(0))
        ledger = explainer(ids=ids, attention_mask=mask, target=2).conservation()
        assert ledger.closes()
        assert {cause for cause, amount in ledger.absorbed.items() if abs(amount) > 1e-3} == causes, rules


def test_a_choice_by_the_data_is_a_constant() -> None:
    """Where indices or conditions are others at the reference, what that makes is recorded, and the ledger closes."""
    x, reference = pairs_of_inputs()
    functions: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.topk(8).values, lambda x: torch.where(x[:, :8] > 0, x[:, 8:], x[:, :8])]
    for function in functions:
        model = seeded(lambda: Around(function, 8))  # noqa: B023  called at once
        explainer = dlbc.compile(model, x, rules="epsilon", reference=reference, cache=False)
        ledger = explainer(x[2:], reference=reference[2:], target=1).conservation()
        assert ledger.closes() and abs(ledger.absorbed["constant"]) > 1


# --- the run time ------------------------------------------------------------------------------------

def runs(explainer: dlbc.Explainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes of all forward passes from now on."""
    seen: list[int] = []
    module = explainer._load(explainer.default).module
    plain = module.forward

    def forward(w: Any, p: Any, x: Any) -> Any:
        seen.append(len(x))
        return plain(w, p, x)

    monkeypatch.setattr(module, "forward", forward)
    return seen


def test_the_reference_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = copy.deepcopy(images()[0]), images()[1]
    explainer = dlbc.compile(model, x, rules="epsilon", reference="zero", cache=False)
    seen = runs(explainer, monkeypatch)
    first = explainer(x, target=1)
    explainer(x[:2])
    assert seen == [1, 3, 2]  # one row stands for all
    given = torch.full((1, 2, 7, 7), 0.3)
    explainer(x, reference=given)
    explainer(x, reference=given.clone())
    explainer(x)
    assert seen[3:] == [1, 3, 3, 3]
    with torch.no_grad():
        model.head.weight.mul_(2.0)
    after = explainer(x, target=1)
    assert seen[7:] == [1, 3]
    np.testing.assert_allclose(after.relevance["x"], first.relevance["x"], rtol=1e-3, atol=1e-3)
    seen.clear()
    explainer(x, reference="blur")
    explainer(x, reference="blur")
    assert seen == [3, 3, 3, 3]  # another one for each input


def test_the_users_reference_is_copied() -> None:
    _, x = images()
    reference = torch.zeros(1, 2, 7, 7)
    explainer = dlbc.compile(images()[0], x, rules="epsilon", reference=reference, cache=False)
    before = explainer(x, target=1).relevance["x"]
    reference += 5
    np.testing.assert_array_equal(explainer(x, target=1).relevance["x"], before)


def test_what_references_are() -> None:
    _, x = images()
    mean = Reference.mean().numbers("x", x)
    np.testing.assert_allclose(mean, np.broadcast_to(x.numpy().mean((2, 3), keepdims=True), x.shape), rtol=1e-5)
    np.testing.assert_allclose(Reference.mean(x).numbers("x", x), x.numpy().mean(0, keepdims=True), rtol=1e-5)
    constant = np.ones((1, 2, 5, 6), np.float32)
    np.testing.assert_allclose(blurred(constant, 2.0), constant)
    wide = blurred(x.numpy(), 1e4)
    np.testing.assert_allclose(wide, mean, rtol=1e-4, atol=1e-6)  # blurred beyond all bounds, it is the mean
    np.testing.assert_allclose(blurred(x.numpy(), 0.05), x.numpy(), rtol=1e-6)
    assert Reference.token(7, keep=[1]).numbers("ids", torch.tensor([[1, 2, 3]])).tolist() == [[1, 7, 7]]
    assert Reference.of(x).digest == Reference.of(x.clone()).digest != Reference.of(x + 1).digest
    assert not Reference.blur().fixed and not Reference.mean().fixed and Reference.zero().fixed


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.linear = nn.Embedding(5, 3), nn.Linear(7, 2)

        def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
            return self.linear(torch.cat([torch.tanh(numbers), self.table(ids)], -1))

    model = seeded(Two)
    numbers, ids = seeded(lambda: (torch.randn(2, 4), torch.tensor([1, 2])))
    parts: Mapping[str, object] = {"numbers": "zero", "ids": Reference.token(0)}
    explainer = dlbc.compile(model, (numbers, ids), rules="epsilon", reference=parts, cache=False)
    first = explainer(numbers, ids, target=1)
    second = explainer(numbers, ids, target=1, reference=(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)))
    for name in ("numbers", "ids"):
        np.testing.assert_allclose(first.relevance[name], second.relevance[name], rtol=1e-5)
    both = first.relevance["numbers"].sum(1) + first.relevance["ids"]
    np.testing.assert_allclose(np.abs(both), 100, rtol=1e-4)
    for wrong, words_ in (({"numbers": "zero"}, "no reference for input `ids`"), ("zero", "no reference for token ids"),
                          ({"nubers": "zero", "ids": Reference.token(0)}, "no input `nubers`"),
                          (torch.zeros(1, 4), "one tensor is given for 2 inputs")):
        with pytest.raises(InputError, match=words_):
            explainer(numbers, ids, reference=wrong)


def test_an_input_called_ref() -> None:
    """Names that look like references of other values are none."""
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor, ref: dict[str, Tensor]) -> Tensor:
            return self.linear(x * ref["x"])

    x, other = seeded(lambda: (torch.randn(2, 4), torch.randn(2, 4)))
    explainer = dlbc.compile(
        seeded(Named), {"x": x, "ref": {"x": other}}, rules="epsilon", cache=False, reference="zero")
    explanation = explainer(x=x, ref={"x": other}, target=0)
    assert set(explanation.relevance) == {"x", "ref.x"}
    np.testing.assert_allclose(np.abs(sum(explanation.relevance.values()).sum(1)), 100, rtol=1e-4)  # type: ignore


# --- files and the cache -----------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_saved_and_loaded(tmp_path: Path, backend: str) -> None:
    model, x = images()
    reference = seeded(lambda: torch.randn(1, 2, 7, 7), 5)
    explainer = dlbc.compile(model, x, rules="epsilon", backend=backend, reference=reference, cache=False)
    expected = explainer(x, target=1).relevance["x"]
    explainer.save(tmp_path / "e.dlbc", weights=True)
    for found in (dlbc.load(tmp_path / "e.dlbc", model), dlbc.load(tmp_path / "e.dlbc"),
                  dlbc_runtime.load(tmp_path / "e.dlbc", trust=True)):
        np.testing.assert_allclose(found(x, target=1).relevance["x"], expected, rtol=1e-5, atol=1e-5)
        assert str(found.reference) == "given [1, 2, 7, 7]"
    assert dlbc.load(tmp_path / "e.dlbc", model)(x, target=1).conservation().closes()
    explainer.with_options(keep="modules").save(tmp_path / "plain.dlbc")
    named = dlbc.compile(model, x, rules="epsilon", backend=backend, reference=Reference.blur(2.0), cache=False)
    named.save(tmp_path / "blur.dlbc")
    assert str(dlbc.load(tmp_path / "blur.dlbc", model).reference) == "blur(2)"


def test_a_damaged_reference_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference"):
        Reference.from_json({"kind": "pickle"}, {})
    model, x = images()
    path = tmp_path / "e.dlbc"
    dlbc.compile(model, x, rules="epsilon", reference=torch.zeros(1, 2, 7, 7), cache=False).save(path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(entries["manifest.json"])
    for wrong in ({**manifest["reference"], "kind": "zero"}, {**manifest["reference"], "kind": "pickle"}, None, 3):
        stored = {**entries, "manifest.json": json.dumps({**manifest, "reference": wrong}).encode()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in stored.items():
                archive.writestr(name, content)
        with pytest.raises(ArtifactError):
            dlbc.load(path, model)


def test_the_cache_knows_whether_there_is_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLBC_CACHE_DIR", str(tmp_path))
    model, x = images()
    plain = dlbc.compile(model, x, rules="epsilon")(x, target=1).relevance["x"]
    zero = dlbc.compile(model, x, rules="epsilon", reference="zero")(x, target=1).relevance["x"]
    given = torch.full((1, 2, 7, 7), 0.3)
    other = dlbc.compile(model, x, rules="epsilon", reference=given)  # the same program
    assert len(list(tmp_path.glob("*.dlbc"))) == 2
    np.testing.assert_allclose(other(x, target=1, reference="zero").relevance["x"], zero, rtol=1e-5, atol=1e-5)
    assert np.abs(other(x, target=1).relevance["x"] - zero).max() > 1
    assert np.abs(zero - plain).max() > 1
    np.testing.assert_allclose(dlbc.compile(model, x, rules="epsilon")(x, target=1).relevance["x"], plain, rtol=1e-5)


def test_sizes_that_need_another_capture() -> None:
    _, x = images()
    explainer = explainer_of("epsilon")
    wide = seeded(lambda: torch.randn(1, 2, 8, 8))
    with pytest.raises(InputError, match="the input"):
        explainer(x, reference=wide)


# --- bad input ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("reference", "words_"), [
    ("blurr", "did you mean 'blur'"), (torch.full((1, 2, 7, 7), float("nan")), "NaN"),
    (torch.zeros(1, 2, 7, 8), "the model takes"), (torch.zeros(2, 7, 7), "the model takes"),
    (torch.zeros(1, 2, 7, 7, dtype=torch.int64), "element type"), (Reference.token(3), "not token ids"),
    ({"y": "zero"}, "no input `y`"), (object(), "no numbers"), ((1.0, "blur", 2), "references, the model takes"),
])
def test_bad_references_are_said_at_once(reference: object, words_: str) -> None:
    model, x = images()
    with pytest.raises(InputError, match=words_):
        dlbc.compile(model, x, rules="epsilon", reference=reference, cache=False)
    with pytest.raises(InputError, match=words_):
        explainer_of("epsilon")(x, reference=reference)


def test_bad_parameters() -> None:
    for make, words_ in (
            (lambda: Reference.blur(0), "sigma"), (lambda: Reference.blur(float("nan")), "sigma"),
            (lambda: Reference.token(-1), "token id"), (lambda: Reference.mean(torch.zeros(0, 3)), "sample"),
            (lambda: Reference.mean(torch.zeros(3, 3, dtype=torch.int64)), "sample")):
        with pytest.raises(InputError, match=words_):
            make()


def test_wrong_numbers_of_rows() -> None:
    _, x = images()
    with pytest.raises(InputError, match=r"dlbc\.Reference\.mean"):
        explainer_of("epsilon")(x, reference=torch.zeros(2, 2, 7, 7))


def test_token_ids_have_no_blur() -> None:
    model, ids, _ = words()
    for reference in ("blur", "zero", "mean"):
        with pytest.raises(InputError, match="no reference for token ids"):
            dlbc.compile(model, ids, rules="attnlrp", reference=reference, cache=False)
    flat = seeded(lambda: nn.Linear(3, 2))
    with pytest.raises(InputError, match="needs positions"):
        dlbc.compile(flat, torch.zeros(2, 3), rules="epsilon", reference="mean", cache=False)


def test_a_plain_explainer_takes_no_reference() -> None:
    model, x = images()
    with pytest.raises(InputError, match="compile with reference"):
        dlbc.compile(model, x, rules="epsilon", cache=False)(x, reference="zero")


def test_a_model_that_is_infinite_at_the_reference() -> None:
    model = seeded(lambda: Around(lambda x: torch.log(x * x)))
    with torch.no_grad():
        model.before.bias.zero_()
    x = seeded(lambda: torch.randn(2, 6))
    with pytest.raises(InputError, match="at the reference"):
        dlbc.compile(model, x, rules="epsilon", reference="zero", cache=False)(x)


def test_rules_that_know_no_reference() -> None:
    model, x = images()
    with pytest.raises(RuleError, match="no form for differences"):
        dlbc.compile(model, x, rules="dlb-contrastive", reference="zero", cache=False)
    for rules in ("dlb-0.1", Composite([("linear", "absolute(low=0)")], base="dlb")):
        with pytest.raises(UnsupportedOpError, match="does not work with a reference"):
            dlbc.compile(model, x, rules=rules, reference="zero", cache=False)
    recurrent = seeded(lambda: nn.LSTM(3, 4, batch_first=True))

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = recurrent

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0][:, -1]

    with pytest.raises(UnsupportedOpError, match="no form for differences"):
        dlbc.compile(Last(), torch.zeros(2, 5, 3), rules="epsilon", reference="zero", cache=False)
