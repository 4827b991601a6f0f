"""Capturing mixtures of experts: transformers' families, registered forwards, and what is told where nothing helps."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlbc
from dlbc import cache
from dlbc.errors import ExportError, InputError
from dlbc.frontends.expert_capture import portable_experts
from dlbc.frontends.registered_capture import registered_forwards
from dlbc.frontends.torch_export import Imported, import_model
from dlbc.ir.printer import print_graph
from dlbc.ir.verifier import verify
from dlbc.options import Options
from dlbc_runtime.program import Variant
from tests.test_frontend import assert_same, results

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 32, "use_cache": False, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2, "intermediate_size": 12}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8,
                                     "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 12,
                                     "shared_expert_intermediate_size": 20}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4, "head_dim": 8, "sliding_window": 4, "num_hidden_layers": 2,
                                 "layer_types": ["sliding_attention", "full_attention"]}),
    "deepseek_v3": ("DeepseekV3Config", {
        "num_key_value_heads": 2, "moe_intermediate_size": 12, "n_routed_experts": 8, "n_shared_experts": 1,
        "n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4}),
    "jetmoe": ("JetMoeConfig", {"num_local_experts": 4, "kv_channels": 8}),
}


def family(name: str) -> nn.Module:
    """A tiny model of a family, of random numbers that matter."""
    transformers = pytest.importorskip("transformers", minversion="5")
    transformers.logging.set_verbosity_error()
    kind, own = FAMILIES[name]
    sizes = {key: size for key, size in SIZES.items() if name != "jetmoe" or key != "num_attention_heads"}
    config = getattr(transformers, kind)(**{**sizes, **own})
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    return numbered(model)


def numbered(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with normal numbers in its weights, norms left as they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 or not weight.any() or not weight.isfinite().all():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model.eval()


def texts(length: int) -> dict[str, Tensor]:
    """Two rows of tokens, the first padded at the left."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :2] = 0
    return {"input_ids": torch.randint(3, 32, (2, length), generator=generator), "attention_mask": mask}


def names_of_ops(imported: Imported) -> set[str]:
    return {op.name for op in imported.graph.forward.ops}


# --- families of transformers ------------------------------------------------------------------------

@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Each computes what the model computes as the user has set it, with padding, at two lengths."""
    model = family(name)
    config: Any = model.config
    before = config._experts_implementation
    imported = import_model(model, (), texts(6))
    verify(imported.graph)
    assert config._experts_implementation == before
    assert imported.static == {}
    for length in (6, 9):
        given = texts(length)
        with torch.no_grad():
            wanted = model(**given).logits.numpy()
        shown = given["attention_mask"].bool().numpy()  # what hidden tokens get is anybody's guess
        np.testing.assert_allclose(results(imported, (), given)[0][shown], wanted[shown], rtol=0,
                                   atol=1e-5 * max(1.0, float(np.abs(wanted[shown]).max())))


def test_the_setting_does_not_matter_and_stays() -> None:
    model = family("olmoe")
    config: Any = model.config
    found = set()
    for setting in ("eager", "grouped_mm", "batched_mm", None):
        config._experts_implementation = setting
        found.add(print_graph(import_model(model, (), texts(6)).graph))
        assert config._experts_implementation == setting
    assert len(found) == 1


def test_each_config_that_experts_hold_gets_its_own_setting_back() -> None:
    """Configs of parts, as those of models for text and pictures, are set one by one; others are let alone."""
    pytest.importorskip("transformers", minversion="5")
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    def config(setting: str) -> Any:
        made = OlmoeConfig(hidden_size=8, intermediate_size=8, num_experts=4, num_experts_per_tok=2)
        made._experts_implementation = setting
        return made

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared, block = config("eager"), cast("Callable[..., nn.Module]", OlmoeSparseMoeBlock)
            self.config, self.other = config("no such thing"), config("deepgemm")
            self.parts = nn.ModuleList(block(one) for one in (shared, config("grouped_mm"), shared))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = x + part(x)
            return x

    model: Any = numbered(Whole())
    assert_same(import_model(model, (torch.randn(2, 5, 8),), {}), model, (torch.randn(3, 4, 8),))
    found = [part.experts.config._experts_implementation for part in model.parts]
    assert found == ["eager", "grouped_mm", "eager"]
    assert (model.config._experts_implementation, model.other._experts_implementation) == ("no such thing", "deepgemm")


def test_the_setting_is_restored_after_a_failure() -> None:
    model = family("mixtral")
    config: Any = model.config
    config._experts_implementation = "eager"

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(input_ids).logits
            return logits if logits.sum() > 0 else -logits

    with pytest.raises(ExportError, match="decides by the content"):
        import_model(Failing(), (texts(6)["input_ids"],), {})
    assert config._experts_implementation == "eager"


def test_what_another_thread_sets_meanwhile_stays() -> None:
    model = family("olmoe")
    config: Any = model.config
    with portable_experts(model):
        assert config._experts_implementation == "batched_mm"
        config._experts_implementation = "eager"
    assert config._experts_implementation == "eager"


def test_transformers_is_not_imported() -> None:
    """A model without it is captured without it."""
    source = ("import sys, torch; from dlbc.frontends.torch_export import import_model\n"
              "import_model(torch.nn.Linear(2, 2), (torch.zeros(3, 2),), {})\n"
              "assert 'transformers' not in sys.modules")
    subprocess.run([sys.executable, "-c", source], check=True, cwd=Path(__file__).parents[1])


def key_of(model: nn.Module, *args: Tensor) -> str:
    return cache.keys_of(model, args, {}, Options(), Variant())[0]


def test_the_cache_finds_a_model_whatever_the_setting() -> None:
    model = family("olmoe")
    config: Any = model.config
    keys = set()
    for setting in ("eager", "grouped_mm"):
        config._experts_implementation = setting
        keys.add(key_of(model, texts(6)["input_ids"]))
        assert config._experts_implementation == setting
    assert len(keys) == 1


# --- registered forwards -----------------------------------------------------------------------------

class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.gelu(self.up(x)))
        return y


class HandWritten(nn.Module):
    """A mixture of experts that goes through its experts in Python, and leaves out those without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 4), nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x: Tensor, twice: bool = False) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        weights, ids = logits.softmax(-1).topk(2)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            row, slot = (ids == e).nonzero().T
            if len(row) > 0:
                y[row] = y[row] + weights[row, slot].unsqueeze(-1) * expert(rows[row])
        return y.view_as(x) * (2 if twice else 1), logits


class Net(nn.Module):
    def __init__(self, moe: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.moe, self.last = nn.Linear(5, 8), HandWritten() if moe is None else moe, nn.Linear(8, 3)
        numbered(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.moe(self.first(x), twice=True)[0])
        return y


def exportable(module: Any, x: Tensor, twice: bool = False) -> tuple[Tensor, Tensor]:
    """What `HandWritten.forward` computes."""
    logits = module.router(x)
    weights, ids = logits.softmax(-1).topk(2)
    y = dlbc.moe.experts(x, ids, weights, up=[e.up for e in module.experts], down=[e.down for e in module.experts],
                         activation=F.gelu)
    return y * (2 if twice else 1), logits.reshape(-1, 4)


@pytest.fixture
def registrations() -> Iterator[None]:
    """What a test registers for `HandWritten` is gone afterwards."""
    yield
    dlbc.register_moe(HandWritten, None)


def test_a_registered_forward(registrations: None) -> None:
    """It is what is captured; the module keeps its own."""
    dlbc.register_moe(HandWritten, exportable)
    model: Any = Net()
    imported = import_model(model, (torch.randn(2, 4, 5),), {})
    verify(imported.graph)
    assert {"expert_linear", "combine"} <= names_of_ops(imported)
    assert "forward" not in vars(model.moe)
    for rows, length in ((2, 4), (3, 7), (1, 1)):
        assert_same(imported, model, (torch.randn(rows, length, 5),))


def test_helpers_compute_what_experts_do() -> None:
    """Gates, biases and stacked weights, row by row."""
    generator = torch.Generator().manual_seed(3)
    up, gate, down = (torch.randn(4, *shape, generator=generator) for shape in ((6, 5), (6, 5), (5, 6)))
    biases = [torch.randn(4, size, generator=generator) for size in (6, 6, 5)]
    x, weights = torch.randn(3, 2, 5, generator=generator), torch.rand(3, 2, 2, generator=generator)
    ids = torch.randint(0, 4, (3, 2, 2), generator=generator)
    y = dlbc.moe.experts(x, ids, weights, up=up, gate=list(gate), down=down, activation=F.silu, up_bias=biases[0],
                         gate_bias=biases[1], down_bias=biases[2])
    for place in np.ndindex(3, 2):
        wanted = torch.zeros(5)
        for k, e in enumerate(ids[place].tolist()):
            hidden = F.silu(F.linear(x[place], gate[e], biases[1][e])) * F.linear(x[place], up[e], biases[0][e])
            wanted += weights[place][k] * F.linear(hidden, down[e], biases[2][e])
        torch.testing.assert_close(y[place], wanted)


def test_a_wrong_registration_says_by_how_much(registrations: None) -> None:
    dlbc.register_moe(HandWritten, lambda module, x, twice: (exportable(module, x)[0], exportable(module, x)[1]))
    model: Any = Net()
    with pytest.raises(ExportError, match=r"moe \(HandWritten\): .* differs .* by up to [\d.]+ where .* is [\d.]+"):
        import_model(model, (torch.randn(2, 4, 5),), {})
    assert "forward" not in vars(model.moe)


@pytest.mark.parametrize(("forward", "fact"), [
    (lambda module, x, twice: exportable(module, x)[0], r"returns float32\[2, 4, 8\], the module tuple\("),
    (lambda module, x, twice: (exportable(module, x, twice)[0], module.router(x)),
     r"returns float32\[2, 4, 4\], the module float32\[8, 4\]"),
    (lambda x, twice: x, "fails with TypeError"),
    (lambda module, x, twice: (exportable(module, x, twice)[0] * float("nan"), exportable(module, x)[1]),
     "by up to nan"),
])
def test_registrations_that_do_not_fit(forward: Callable[..., Any], fact: str, registrations: None) -> None:
    dlbc.register_moe(HandWritten, forward)
    with pytest.raises(ExportError, match=fact):
        import_model(Net(), (torch.randn(2, 4, 5),), {})


def test_registrations_hold_for_what_inherits_the_forward(registrations: None) -> None:
    class Heir(HandWritten):
        pass

    class Own(HandWritten):
        def forward(self, x: Tensor, twice: bool = False) -> tuple[Tensor, Tensor]:
            return x + 1, x

    dlbc.register_moe(HandWritten, exportable)
    assert "combine" in names_of_ops(import_model(Net(Heir()), (torch.randn(2, 4, 5),), {}))
    assert "combine" not in names_of_ops(import_model(Net(Own()), (torch.randn(2, 4, 5),), {}))


def test_other_threads_run_the_module_s_own_forward(registrations: None) -> None:
    calls: list[int] = []

    def counted(module: Any, x: Tensor, twice: bool = False) -> tuple[Tensor, Tensor]:
        calls.append(threading.get_ident())
        return exportable(module, x, twice)

    dlbc.register_moe(HandWritten, counted)
    model, x = Net(), torch.randn(2, 4, 5)
    with registered_forwards(model), torch.no_grad():
        other = threading.Thread(target=lambda: model(x))
        other.start()
        other.join()
        assert calls == []
        model(x)
    assert calls == [threading.get_ident()]


def test_the_cache_knows_what_is_registered(registrations: None) -> None:
    model, x = Net(), torch.randn(2, 4, 5)
    keys = [key_of(model, x)]
    dlbc.register_moe(HandWritten, exportable)
    keys += [key_of(model, x), key_of(model, x)]
    dlbc.register_moe(HandWritten, lambda module, x, twice: exportable(module, x + 0, twice))
    keys.append(key_of(model, x))
    assert keys[1] == keys[2] and len(set(keys)) == 3


def test_models_on_meta_are_not_compared(registrations: None) -> None:
    dlbc.register_moe(HandWritten, exportable)
    with torch.device("meta"):
        model: Any = HandWritten()
    assert "combine" in names_of_ops(import_model(model, (torch.randn(2, 4, 8, device="meta"),), {}))


@pytest.mark.parametrize(("module_class", "forward", "fact"), [
    ("MyMoE", exportable, "is not a class of modules"), (dict, exportable, "is not a class of modules"),
    (HandWritten, "forward", "not a function"), (HandWritten, HandWritten, "not a function")])
def test_what_cannot_be_registered(module_class: Any, forward: Any, fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        dlbc.register_moe(module_class, forward)


# --- errors ------------------------------------------------------------------------------------------

def test_a_mixture_of_experts_is_told_what_it_can_do() -> None:
    with pytest.raises(ExportError, match=r"moe \(HandWritten, test_moe_frontend.py:\d+\): a mixture of 4 experts"
                       ) as caught:
        import_model(Net(), (torch.randn(2, 4, 5),), {})
    assert "dlbc.register_moe(HandWritten, forward)" in str(caught.value)
    assert "experts_implementation" in str(caught.value)


def test_parts_of_a_mixture_are_told_the_same() -> None:
    """The router, which is a module of its own, cannot be captured."""
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            ids: Tensor = self.layer(x).argmax(-1)
            return ids if ids.sum() > 3 else 1 - ids

    class Top1(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.weight = Router(), nn.Parameter(torch.empty(4, 8, 8))

        def forward(self, x: Tensor, twice: bool) -> tuple[Tensor]:
            return (torch.einsum("...oi,...i->...o", self.weight[self.router(x)], x),)

    with pytest.raises(ExportError, match=r"moe \(Top1, test_moe_frontend.py:\d+\): a mixture of 4 experts"):
        import_model(Net(Top1()), (torch.randn(2, 4, 5),), {})


def test_other_modules_are_not_taken_for_mixtures() -> None:
    """Lists of alike layers, and decisions by content, are not enough."""
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, twice: bool) -> tuple[Tensor]:
            for layer in self.layers:
                x = layer(x)
            return (x if x.topk(2)[0].sum() > 0 else -x,)

    with pytest.raises(ExportError, match="the model decides by the content") as caught:
        import_model(Net(Deep()), (torch.randn(2, 4, 5),), {})
    assert "register_moe" not in str(caught.value)
