"""The Triton backend: fused kernels, and torch for what no kernel takes. Nothing here imports torch or triton."""

from dlbc.backends.torch.table import OVERWRITING as overwriting
from dlbc.backends.triton.emit import emit, refused

name = "triton"

__all__ = ["emit", "name", "overwriting", "refused"]
