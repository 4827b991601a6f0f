"""Python loops over experts, captured for all experts at once: sorted rows, and rows that are looked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlbc.errors import ExportError
from dlbc.frontends.torch_export import import_model
from dlbc.ir.verifier import verify
from dlbc.passes.pipeline import CANONICALISE
from tests.test_frontend import assert_same
from tests.test_moe_frontend import names_of_ops, numbered

# --- loops over sorted rows --------------------------------------------------------------------------

class Loop(nn.Module):
    """Experts over sorted rows, written by `body(module, piece, expert)`."""

    def __init__(self, body: Callable[[Any, Tensor, int], Tensor], experts: int = 3) -> None:
        super().__init__()
        self.body, self.router = body, nn.Linear(6, experts)
        self.up, self.up_bias = nn.Parameter(torch.empty(experts, 16, 6)), nn.Parameter(torch.empty(experts, 16))
        self.down, self.scale = nn.Parameter(torch.empty(experts, 8, 6)), nn.Parameter(torch.empty(6))
        self.list = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6)) for _ in range(experts))
        numbered(self)

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows by expert, how many each has, and where they come from."""
        ids = self.router(x).argmax(-1)
        order = ids.argsort(stable=True)
        return x[order], F.one_hot(ids, 3).sum(0), order

    def pieces(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows, counts.tolist())

    def forward(self, x: Tensor) -> Tensor:
        rows, counts, order = self.routed(x)
        done = [self.body(self, piece, e) for e, piece in enumerate(self.pieces(rows, counts))]
        y = torch.cat(done)
        return torch.zeros_like(y).index_copy(0, order, y)


def gated(m: Any, x: Tensor, e: int) -> Tensor:
    up, gate = F.linear(x, m.up[e], m.up_bias[e]).chunk(2, dim=-1)
    y: Tensor = (F.silu(gate) * up * 1.5) @ m.down[e]
    return y


BODIES: dict[str, Callable[[Any, Tensor, int], Tensor]] = {
    "linear": lambda m, x, e: F.linear(x, m.up[e]),
    "with_bias": lambda m, x, e: F.linear(x, m.up[e], bias=m.up_bias[e]),
    "turned": lambda m, x, e: torch.matmul(x, m.up[e].t()),
    "turned_twice": lambda m, x, e: x @ m.up[e].T.transpose(0, 1).mT,
    "gated": gated,
    "viewed": lambda m, x, e: F.linear(x, m.up.view(3, -1, 6)[e]),
    "unbound": lambda m, x, e: x @ m.up.unbind(0)[e].T,
    "a_list_of_modules": lambda m, x, e: m.list[e](x),
    "other_order": lambda m, x, e: m.list[2 - e](x),
    "shared_numbers": lambda m, x, e: (F.linear(x, m.up[e])[:, :6].softmax(-1) * m.scale + x).float(),
    "shapes": lambda m, x, e: F.linear(x, m.up[e]) * (x.shape[-1] + x.ndim),
}


@pytest.mark.parametrize("name", BODIES)
def test_loops_over_experts(name: str) -> None:
    """A loop over pieces by count is one grouped map for each linear map in it; pieces may be empty."""
    model = Loop(BODIES[name])
    imported = import_model(model, (torch.randn(7, 6),), {})
    verify(imported.graph)
    assert "grouped_linear" in names_of_ops(imported)
    assert_same(imported, model, (torch.randn(9, 6),))
    assert_same(imported, model, (torch.randn(1, 6),))


def test_weights_of_a_stack_are_not_copied() -> None:
    imported = import_model(Loop(gated), (torch.randn(7, 6),), {})
    maps = [op for op in imported.graph.forward.ops if op.name == "grouped_linear"]
    assert [getattr(op.operands[2], "name", "") for op in maps] == ["up", "down"]
    assert "cat" not in names_of_ops(import_model(Loop(BODIES["viewed"]), (torch.randn(7, 6),), {}))


@pytest.mark.parametrize("pieces", [
    lambda self, rows, counts: rows.split([counts[e].item() for e in range(3)], 0),
    lambda self, rows, counts: torch.split(rows, split_size_or_sections=counts.tolist(), dim=0),
    lambda self, rows, counts: torch.split(rows, list(counts.cpu().numpy())),
], ids=["item", "named", "numpy"])
def test_ways_to_split(pieces: Callable[..., Any]) -> None:
    model = type("Other", (Loop,), {"pieces": pieces})(gated)
    assert_same(import_model(model, (torch.randn(7, 6),), {}), model, (torch.randn(9, 6),))


REFUSED: dict[str, tuple[Callable[[Any, Tensor, int], Tensor], str]] = {
    "across_rows": (lambda m, x, e: F.linear(x, m.up[e]).cumsum(0), "cumsum"),
    "mean": (lambda m, x, e: x - x.mean(0), "mean"),
    "softmax_over_rows": (lambda m, x, e: x.softmax(0), "softmax"),
    "in_place": (lambda m, x, e: F.linear(x, m.up[e]).mul_(2), "mul_"),
    "some_rows": (lambda m, x, e: x[::2], "getitem"),
    "unlike_experts": (lambda m, x, e: x if e else F.linear(x, m.up[e])[:, :6], "not every expert"),
    "other_numbers": (lambda m, x, e: x * e, "not every expert"),
    "other_vectors": (lambda m, x, e: x * m.up_bias[e, :6], "different tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_loops_that_do_not_work_row_by_row(name: str) -> None:
    """They are refused, never captured as something else; the error says what is in the way."""
    body, reason = REFUSED[name]
    with pytest.raises(ExportError, match="experts"):
        try:
            import_model(Loop(body), (torch.randn(7, 6),), {})
        except ExportError as problem:
            assert reason in f"{problem.__cause__}"
            raise


def test_a_loop_over_some_of_the_experts_is_refused() -> None:
    class Some(Loop):
        def forward(self, x: Tensor) -> Tensor:
            rows, counts, _ = self.routed(x)
            return torch.cat(self.pieces(rows, counts)[1:])

    with pytest.raises(ExportError, match="all experts at once"):
        import_model(Some(gated), (torch.randn(7, 6),), {})


# --- loops that look for the rows of each expert -----------------------------------------------------

class Searching(nn.Module):
    """Experts whose rows `body(module, x, weights, ids)` looks for; x [N, 6], weights and ids [N, 2]."""

    def __init__(self, body: Callable[[Any, Tensor, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.router, self.count = body, nn.Linear(6, 4), 4
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 6)) for _ in range(4))
        self.up, self.down = nn.Parameter(torch.empty(4, 5, 6)), nn.Parameter(torch.empty(4, 6, 5))
        numbered(self)

    def forward(self, x: Tensor) -> Any:
        rows = x.reshape(-1, 6)
        weights, ids = self.router(rows).softmax(-1).topk(2)
        y = self.body(self, rows, weights, ids)
        return y.view(x.shape) if isinstance(y, Tensor) else y


def where(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        row, slot = torch.where(ids == e)
        y.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
    return y


def written(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        row, slot = (ids == e).nonzero(as_tuple=True)
        if row.numel() == 0:
            continue
        y[row] += expert(x[row]) * weights[row, slot].unsqueeze(-1)
    return y


def one_hot(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """As transformers 4 wrote Mixtral's."""
    y = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=m.count).permute(2, 1, 0)
    for e in range(m.count):
        slot, row = torch.where(mask[e])
        if row.shape[0] == 0:
            continue
        said = m.experts[e](x[None, row].reshape(-1, x.shape[-1])) * weights[row, slot, None]
        y.index_add_(0, row, said.to(y.dtype))
    return y


def hits(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """As transformers 5 writes it, with a number for experts elsewhere."""
    y = torch.zeros_like(x)
    with torch.no_grad():
        mask = F.one_hot(ids, num_classes=m.count + 1).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for number in hit:
        e = number[0]
        if e == m.count:
            continue
        with torch.no_grad():
            slot, row = torch.where(mask[e])
        said = F.linear(F.silu(F.linear(x[row], m.up[e])), m.down[e])
        y.index_add_(0, row, (said * weights[row, slot, None]).to(y.dtype))
    return y


def hits_by_tensor(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """As in transformers' NLLB-MoE."""
    y = torch.zeros_like(x)
    mask = F.one_hot(ids, m.count).permute(2, 1, 0)
    for e in (mask.sum(dim=(-1, -2)) > 0).nonzero():
        slot, row = torch.where(mask[e].squeeze(0))
        y.index_add_(0, row, m.experts[e](x[None, row].reshape(-1, 6)) * weights[row, slot, None])
    return y


def repeated(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    many, flat = x.repeat_interleave(2, dim=0), ids.view(-1)
    y = torch.empty_like(many)
    for e in range(m.count):
        y[flat == e] = m.experts[e](many[flat == e])
    return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)


def any_row(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = ids == e
        if not mask.any():
            continue
        row, slot = mask.nonzero().T
        y = y.index_add(0, row, weights[row, slot][:, None] * expert(x[row]))
    return y


def best(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    first, y = ids[:, 0], torch.zeros_like(x)
    for e in torch.unique(first):
        row = (first == e).nonzero().squeeze(-1)
        y[row] = m.experts[e](x[row]) * weights[:, 0][row].unsqueeze(1)
    return y


def slot_by_slot(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for slot in range(2):
        own = ids[:, slot]
        for e in reversed(range(m.count)):
            y[own == e] += weights[:, slot][own == e].unsqueeze(-1) * m.experts[e](x[own == e])
    return y


def slices(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """As DeepSeek writes it: slices of the sorted rows."""
    counts = ids.new_zeros((ids.shape[0], m.count)).scatter_(1, ids, 1).sum(0)
    order = ids.view(-1).argsort()
    rows, said, start = x[order // ids.shape[1]], [], 0
    for e, n in enumerate(counts.tolist()):
        end = start + n
        if n == 0:
            continue
        said.append(m.experts[e](rows[start:end]))
        start = end
    y = torch.empty_like(x.repeat_interleave(2, 0))
    y[order] = torch.cat(said)
    return y.view(*ids.shape, -1).mul_(weights.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("body", [where, written, one_hot, hits, hits_by_tensor, repeated, any_row, best, slot_by_slot,
                                  slices], ids=lambda body: body.__name__)
def test_loops_that_look_for_rows(body: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> None:
    """Ways to write a mixture of experts with sizes that depend on data; with fewer rows than experts, too. All are
    raised to what a mixture of experts is at level 1."""
    model = Searching(body)
    imported = import_model(model, (torch.randn(2, 5, 6),), {})
    verify(imported.graph)
    assert imported.static == {}
    for rows, length in ((2, 5), (3, 7), (1, 1)):
        assert_same(imported, model, (torch.randn(rows, length, 6),))
    graph = imported.graph
    for step in CANONICALISE:
        graph = step.run(graph)
    found = {op.name for op in graph.forward.ops}
    assert "expert_linear" in found and not found & {"matmul", "index", "index_put"}
    assert {"route_topk", "combine"} <= found or body in (best, slot_by_slot)  # these two weight and add on their own


def some(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(1, m.count):
        row, slot = torch.where(ids == e)
        y.index_add_(0, row, m.experts[e](x[row]) * weights[row, slot, None])
    return y


def read_between(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        row, _ = torch.where(ids == e)
        y.index_add_(0, row, expert(x[row]))
        x = x + y
    return y


def twice(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e in (0, 1, 1, 2, 3):
        row, _ = torch.where(ids == e)
        y.index_add_(0, row, m.experts[e](x[row]))
    return y


def last_wins(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        row, _ = torch.where(ids == e)
        y[row] = expert(x[row])
    return y


def across(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        row, _ = torch.where(ids == e)
        y.index_add_(0, row, expert(x[row] - x[row].mean(0)))
    return y


def leaves_rows(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    row, _ = torch.where(ids == 0)
    return where(m, x, weights, ids), x[row]


def counts_the_idle(m: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y, idle = torch.zeros_like(x), 0
    for e, expert in enumerate(m.experts):
        row, _ = torch.where(ids == e)
        if row.numel() == 0:
            idle += 1
            continue
        y.index_add_(0, row, expert(x[row]))
    return y + idle


@pytest.mark.parametrize("body", [some, read_between, twice, last_wins, across, leaves_rows, counts_the_idle],
                         ids=lambda body: body.__name__)
def test_loops_that_do_something_else_are_refused(body: Callable[..., Any]) -> None:
    """An error, never another function: rows left out, sums read early, rows written twice, returned, or counted."""
    x = torch.zeros(1, 5, 6)  # all rows are alike, so that two experts have none
    with pytest.raises(ExportError, match="experts"):
        import_model(Searching(body), (x,), {})


def test_ids_that_may_name_no_expert_are_not_followed() -> None:
    """Only of top-k and the like it is known that each row has experts."""
    class Given(Searching):
        def forward(self, x: Tensor, ids: Tensor) -> Any:  # type: ignore[override]
            return where(self, x, torch.ones(ids.shape), ids)

    with pytest.raises(ExportError, match="depends on the content of a tensor"):
        import_model(Given(where), (torch.randn(5, 6), torch.full((5, 2), 7)), {})
