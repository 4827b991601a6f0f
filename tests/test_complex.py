"""Complex numbers within a model: rotary positions as some models write them, each operator, and what has no way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dlbc
from dlbc.errors import DlbcError
from tests import zoo

SIZE = 8
RATES = 1 / (100 ** (torch.arange(0, SIZE, 2) / SIZE))


def angles(count: int) -> Tensor:
    return torch.outer(torch.arange(count), RATES)


class Turned(nn.Module):
    """Attention of turned queries to turned keys, two heads; `turn(x [B,T,2,8], self)` turns."""

    def __init__(self, turn: Callable[[Tensor, Turned], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.turn = turn
        self.freqs_cis = torch.polar(torch.ones(32, SIZE // 2), angles(32))  # no buffer: so does Meta's LLaMA

    def forward(self, x: Tensor) -> Tensor:
        q, k = (self.turn(linear(x).unflatten(-1, (2, SIZE)), self).transpose(1, 2) for linear in (self.q, self.k))
        scores = (q @ k.transpose(-1, -2) / 3).softmax(-1)
        return self.out((scores @ x.unflatten(-1, (2, SIZE)).transpose(1, 2)).transpose(1, 2).flatten(2)).mean(1)


def plainly(x: Tensor, model: Turned) -> Tensor:
    """With real numbers, pair by pair."""
    cos, sin = (f(angles(x.shape[1]))[None, :, None] for f in (torch.cos, torch.sin))
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def by_polar(x: Tensor, model: Turned) -> Tensor:
    """DeepSeek-V2, LLaMA 4."""
    freqs = angles(x.shape[1])
    freqs = torch.polar(torch.ones_like(freqs), freqs) * 1.0
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs[None, :, None, :]).flatten(3).type_as(x)


def by_constant(x: Tensor, model: Turned) -> Tensor:
    """Meta's LLaMA: a table of the model."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(model.freqs_cis[:x.shape[1]].unsqueeze(-2).unsqueeze(0) * pairs).flatten(-2)


def by_parts(x: Tensor, model: Turned) -> Tensor:
    """LLaMA 4's vision model; the angle's sign twice changed."""
    freqs = angles(x.shape[1])[:, None]
    turn = torch.view_as_complex(torch.stack((freqs.cos(), -freqs.sin()), -1)).conj()
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def seeded(turn: Callable[[Tensor, Turned], Tensor]) -> Turned:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        return Turned(turn).eval()


@pytest.mark.parametrize("rules", ["attnlrp", "dlb"])
@pytest.mark.parametrize("turn", [by_polar, by_constant, by_parts])
def test_rotary_positions_are_those_of_real_numbers(turn: Callable[[Tensor, Turned], Tensor], rules: str) -> None:
    """The same `rotary`, outputs and relevance, for any batch and length."""
    x = zoo.inputs(2, 7, 16)
    wanted, found = (dlbc.compile(seeded(each), x, rules=rules, cache=False) for each in (plainly, turn))
    assert found.ir("paired").count("rotary(") == wanted.ir("paired").count("rotary(") > 0
    for other in (x, zoo.inputs(3, 4, 16)):
        own, real = found(other), wanted(other)
        np.testing.assert_allclose(own.outputs["output"], seeded(turn)(other).detach().numpy(), rtol=0, atol=1e-6)
        scale = np.abs(real.relevance["x"]).max()
        np.testing.assert_allclose(own.relevance["x"], real.relevance["x"], rtol=0, atol=1e-5 * scale)


def paired(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


TABLE = torch.polar(torch.linspace(0.5, 2, 12).reshape(3, 4), torch.linspace(-3, 3, 12).reshape(3, 4))

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "mul": lambda z: z * TABLE, "mul by a number": lambda z: z * 2.5, "mul by real": lambda z: z * TABLE.abs(),
    "div by real": lambda z: z / torch.linspace(1, 2, 4), "add": lambda z: z + TABLE, "sub": lambda z: TABLE - z,
    "sub twice": lambda z: torch.sub(z, TABLE, alpha=2), "neg": lambda z: -z, "conj": lambda z: z.conj() * TABLE,
    "permute": lambda z: z.permute(1, 0, 2), "transpose": lambda z: z.transpose(-1, -2),
    "cat": lambda z: torch.cat((z, TABLE[None].expand_as(z)), -1), "slice": lambda z: z[:, 1:, -2:],
    "select": lambda z: z[..., -1], "index": lambda z: z[:, torch.tensor([2, 0])], "flatten": lambda z: z.flatten(1),
    "expand": lambda z: z[:, None].expand(-1, 2, -1, -1), "real": lambda z: torch.complex(z.real, z.imag * 2),
    "clone": lambda z: z.clone().contiguous(), "double": lambda z: z.to(torch.complex128) * TABLE}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_torchs(name: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(OPERATORS[name](paired(x))).float().flatten(1).cumsum(-1)

    x = zoo.inputs(2, 3, 8)
    found = dlbc.compile(Model().eval(), x, rules="attnlrp", cache=False)(x, target=1)
    np.testing.assert_allclose(found.outputs["output"], Model()(x).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("run", "says", "hint"), [
    (lambda x: torch.exp(paired(x)), "`aten.exp.default` of complex numbers is not supported", "view_as_real"),
    (lambda x: paired(x) + x[..., :4], "a sum of real and complex numbers", "torch.complex"),
    (lambda x: x[..., :4] / paired(x), "a division by complex numbers", "conjugate"),
    (torch.fft.rfft, "is not supported", "Fourier")])
def test_what_has_no_way_says_so(run: Callable[[Tensor], Tensor], says: str, hint: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(run(x)).flatten(1)

    with pytest.raises(DlbcError) as problem:
        dlbc.compile(Model().eval(), zoo.inputs(2, 3, 8), cache=False)
    assert says in problem.value.fact and hint in problem.value.hint and "test_complex.py" in problem.value.where


def test_complex_numbers_stay_inside() -> None:
    class Returned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return paired(x)

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", TABLE)

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(paired(x) * self.table).flatten(1)

    with pytest.raises(DlbcError, match="the model returns complex numbers"):
        dlbc.compile(Returned().eval(), zoo.inputs(2, 3, 8), cache=False)
    with pytest.raises(DlbcError, match="table: a weight of complex numbers"):
        dlbc.compile(Held().eval(), zoo.inputs(2, 3, 8), cache=False)
    with pytest.raises(DlbcError, match="complex64"):
        dlbc.compile(nn.Flatten().eval(), paired(zoo.inputs(2, 3, 8)), cache=False)


def deepseek_v2() -> nn.Module:
    import transformers

    return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(
        vocab_size=zoo.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, head_dim=4,
        intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, n_shared_experts=1, first_k_dense_replace=1, topk_method="group_limited_greedy",
        max_position_embeddings=64))


def llama4() -> nn.Module:
    import transformers

    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        vocab_size=zoo.VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=48, intermediate_size_mlp=40, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, max_position_embeddings=64, attention_chunk_size=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize(("build", "turned"), [(deepseek_v2, 4), (llama4, 6)])  # LLaMA 4's last layer has no positions
def test_models_of_transformers(build: Callable[[], nn.Module], turned: int) -> None:
    """Two lengths, padded on the left; nothing is lost but what the ledger says."""
    pytest.importorskip("transformers")
    model = zoo.randomise(build()).eval()
    inputs = zoo.padded((7, 4), "left")
    explainer = dlbc.compile(model, inputs, rules="attnlrp", cache=False)
    assert explainer.ir("canonical").count("= rotary(") == turned
    found = explainer(**inputs)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1].numpy()
    np.testing.assert_allclose(found.outputs["logits"][:, -1], logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert not found.relevance["input_ids"][inputs["attention_mask"].numpy() == 0].any()
    assert found.conservation().closes(1e-4)
