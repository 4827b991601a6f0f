"""Emits numpy code. What each op is written as is in `table.py`."""

from __future__ import annotations

from dlbc.backends.numpy.table import OVERWRITING, TABLE
from dlbc.backends.python_module import emit_module
from dlbc.backends.site import Dialect
from dlbc.ir.core import Graph

NUMPY = Dialect(
    name="numpy",
    imports=("from math import inf, nan", "", "import numpy as np",
             "from dlbc_runtime import numpy_kernels as kernels"),
    table=TABLE,
    overwriting=OVERWRITING,
    dtypes={"f64": "np.float64", "f32": "np.float32", "f16": "np.float16", "i64": "np.int64", "i32": "np.int32",
            "i16": "np.int16", "i8": "np.int8", "u8": "np.uint8", "bool": "np.bool_"},
    cast="{}.astype({}, copy=False)",
    scalar="np.asarray({}, dtype={}{})",
    decorators=('@np.errstate(divide="ignore", over="ignore", under="ignore", invalid="ignore")',))


def emit(graph: Graph) -> str:
    """The source of the numpy module of a lowered graph. UnsupportedOpError names what it cannot write."""
    return emit_module(graph, NUMPY)
