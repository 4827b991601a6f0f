"""The C backend: groups of ops as C functions, and torch for what no function takes. Nothing here imports torch."""

from dlbc.backends.c.emit import emit, refused
from dlbc.backends.torch.table import OVERWRITING as overwriting

name = "c"

__all__ = ["emit", "name", "overwriting", "refused"]
