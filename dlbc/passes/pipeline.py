"""The order of the canonicalising passes: from the graph as exported (level 0) to field-level ops (level 1)."""

from __future__ import annotations

from dlbc.passes import Pass
from dlbc.passes.canonicalise import Canonicalise
from dlbc.passes.eliminate_common import EliminateCommon
from dlbc.passes.eliminate_dead import EliminateDead
from dlbc.passes.fold_batch_norm import FoldBatchNorm
from dlbc.passes.fold_masks import FoldMasks
from dlbc.passes.hoist_constants import HoistConstants
from dlbc.passes.raise_activations import RaiseActivations
from dlbc.passes.raise_attention import RaiseAttention
from dlbc.passes.raise_experts import RaiseExperts
from dlbc.passes.raise_gated import RaiseGated
from dlbc.passes.raise_norms import RaiseNorms
from dlbc.passes.raise_rotary import RaiseRotary
from dlbc.passes.unflatten_rows import UnflattenRows
from dlbc.passes.unsort_rows import UnsortRows
from dlbc.passes.write_out import WriteOut

CANONICALISE: tuple[Pass, ...] = (
    EliminateDead(),
    Canonicalise(),
    HoistConstants(),  # weights alone: `1 + weight` is a weight to the passes below
    EliminateCommon(),  # equal values are one value to the patterns below
    Canonicalise(),
    UnsortRows(),
    EliminateDead(),
    UnflattenRows(),  # experts are found, and everything else is read, by batch and position
    Canonicalise(),
    EliminateDead(),
    RaiseExperts(),
    EliminateCommon(),
    FoldBatchNorm(),
    RaiseNorms(),
    RaiseActivations(),
    RaiseRotary(),
    RaiseAttention(),
    WriteOut(),
    FoldMasks(),  # after attention is raised: eager masks are additive, those of sdpa boolean
    RaiseGated(),  # after activations: silu may have been x * sigmoid(x)
    HoistConstants(),
    Canonicalise(),
    EliminateCommon(),
    EliminateDead(),
)
