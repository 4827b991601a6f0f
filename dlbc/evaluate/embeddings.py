"""The embedding of token ids in a running model, seen and changed without touching the model.

`torch.nn.functional.embedding` is intercepted in this thread only, while the context lasts: no hooks on the user's
modules. The embedding of the ids is recognised by the ids themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class EmbeddingChange(TorchFunctionMode):
    """Within this context, what the embedding of `ids` gives is handed to `change`, whose result takes its place."""

    def __init__(self, ids: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ids, self.change, self.seen = ids, change, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.nn.functional.embedding and self._ours(args[0] if args else (kwargs or {})["input"]):
            self.seen += 1
            return self.change(result)
        return result

    def _ours(self, ids: Tensor) -> bool:
        if ids.numel() != self.ids.numel():
            return False
        if ids.data_ptr() == self.ids.data_ptr():
            return True
        return not self.seen and bool((ids.reshape(-1) == self.ids.reshape(-1)).all())
