"""The torch backend: vectorised torch code, on the device of its inputs. Nothing here imports torch."""

from dlbc.backends.torch.emit import emit
from dlbc.backends.torch.table import OVERWRITING as overwriting

name = "torch"

__all__ = ["emit", "name", "overwriting"]
