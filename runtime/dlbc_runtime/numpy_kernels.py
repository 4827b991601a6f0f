"""What generated numpy code calls, as `kernels.<name>`, where one line of numpy is not enough. No torch here.

The names are what saved explainers call, too: one that is here stays. What they do is in the modules they come from.
Element types are kept: a float32 array stays float32 (Python numbers do not widen it). float16 is computed in float32
where numpy has no fast or exact way.
"""
# ruff: noqa: F401  generated code uses them

from __future__ import annotations

from dlbc_runtime.numpy_attention import attention, attention_weights, stream
from dlbc_runtime.numpy_elementwise import (
    damp,
    elu,
    erf,
    gelu,
    glu,
    hardsigmoid,
    hardswish,
    log_sigmoid,
    mish,
    prelu,
    relu_adjoint,
    rotary,
    safe_div,
    sigmoid,
    silu,
    softplus,
    softsign,
    threshold,
)
from dlbc_runtime.numpy_experts import combine, expert_linear, expert_order, grouped_linear, route_topk
from dlbc_runtime.numpy_linear import linear, linear_rows, matmul
from dlbc_runtime.numpy_moves import (
    gather,
    index_adjoint,
    index_put,
    pad,
    scatter,
    scatter_add,
    select_adjoint,
    slice_adjoint,
    take_adjoint,
)
from dlbc_runtime.numpy_recurrent import gru, lstm, recurrence_adjoint, rnn
from dlbc_runtime.numpy_reductions import (
    batch_norm,
    group_norm,
    layer_norm,
    log_softmax,
    logsumexp,
    max_with_index,
    min_with_index,
    rms_norm,
    row_statistics,
    softmax,
    sort,
    topk,
)
from dlbc_runtime.numpy_windows import (
    adaptive_avg_pool,
    adaptive_avg_pool_adjoint,
    adaptive_max_pool,
    adaptive_max_pool_adjoint,
    avg_pool,
    avg_pool_adjoint,
    conv,
    conv_transpose,
    interpolate,
    interpolate_adjoint,
    max_pool,
    max_pool_adjoint,
)
