"""Emits torch code. What each op is written as is in `table.py`."""

from __future__ import annotations

from dlbc.backends.python_module import emit_module
from dlbc.backends.site import Dialect
from dlbc.backends.torch.table import OVERWRITING, TABLE
from dlbc.ir.core import Graph

TORCH = Dialect(
    name="torch",
    imports=("from math import inf, nan", "", "import torch", "import torch.nn.functional as F",
             "from dlbc_runtime import torch_kernels as kernels"),
    table=TABLE,
    overwriting=OVERWRITING,
    dtypes={"f64": "torch.float64", "f32": "torch.float32", "f16": "torch.float16", "bf16": "torch.bfloat16",
            "i64": "torch.int64", "i32": "torch.int32", "i16": "torch.int16", "i8": "torch.int8",
            "u8": "torch.uint8", "bool": "torch.bool"},
    cast="{}.to({})",
    scalar="torch.tensor({}, dtype={}{})",
    number='torch.tensor({}, dtype=torch.float32, device="cpu")',
    device="{}.device",
    no_device='torch.device("cpu")')


def emit(graph: Graph) -> str:
    """The source of the torch module of a lowered graph. UnsupportedOpError names an op it cannot write."""
    return emit_module(graph, TORCH)
