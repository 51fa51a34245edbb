"""Counts what tensor code does, operation by operation: bytes alive at the peak, bytes moved, FLOPs.

Inside `FakeTensorMode` nothing is computed, so that real sizes take a second (`tools/bench_vae.py --cost`); the
meta device would do as well, but there attention falls apart into products that materialise its scores.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_ALLOCATE_ONLY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)  # shapes


class OpCounter(TorchDispatchMode):
    """Counts while it is entered: `with OpCounter() as count: ...`.

    Attributes:
        peak: most bytes alive at once in tensors that were made inside; what an operation allocates for itself alone,
            such as a convolution's workspace, is not seen.
        live: bytes alive now.
        largest: elements of the largest tensor made inside.
        moved: bytes of all operands read and results written, each once for each operation; views move nothing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.largest = 0
        self.moved = 0
        self._known: set[int] = set()
        self._flops: Any = FlopCounterMode(
            display=False,
            custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops},
        )

    @property
    def flops(self) -> int:
        """Multiplications plus additions of convolutions, matrix products and attention."""
        return self._flops.get_total_flops()

    def __enter__(self) -> "OpCounter":
        self._flops.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._flops.__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten" or func.is_view:
            return result
        read, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        if func.overloadpacket.__name__ not in _ALLOCATE_ONLY:
            self.moved += sum(x.numel() * x.element_size() for x in (*read, *made))
        given = {x.untyped_storage()._cdata for x in read}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in given:
                self._watch(tensor)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
