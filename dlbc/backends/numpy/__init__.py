"""The numpy backend: float32 numpy code for machines without torch."""

from dlbc.backends.numpy.emit import emit

name = "numpy"

__all__ = ["emit", "name"]
