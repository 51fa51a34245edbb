"""Counts the bytes of the tensors that are alive, as PyTorch's own allocator would, on any device."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active: `peak` bytes of tensors made since then and alive together, `largest` elements of any of them.

    A storage counts once, as long as any tensor that operators gave out refers to it. What an operator allocates and
    frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.largest = 0
        self._tensors: Counter[int] = Counter()
        self._known: set[int] = set()
        self._foreign: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in given.values():
            storage = x.untyped_storage()._cdata
            if id(x) not in self._known and storage not in self._tensors:
                self._foreign.add(storage)
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and id(x) not in self._known:
                self._watch(x)
        self.peak = max(self.peak, self.live)
        return result

    def _watch(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._foreign:
            return
        self.largest = max(self.largest, size // x.element_size())
        if not self._tensors[key]:
            self.live += size
        self._tensors[key] += 1
        self._known.add(id(x))
        weakref.finalize(x, self._gone, id(x), key, size)

    def _gone(self, identity: int, key: int, size: int) -> None:
        self._known.discard(identity)
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self.live -= size
