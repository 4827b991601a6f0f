"""The numpy backend: float32 numpy code for machines without torch."""

from dlbc.backends.numpy.emit import emit
from dlbc.backends.numpy.table import OVERWRITING as overwriting

name = "numpy"

__all__ = ["emit", "name", "overwriting"]
