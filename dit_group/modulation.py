"""Modulation vectors computed once for each request, so that their weights need no room on the device.

In a DiT with adaptive layer norm, linear layers turn the embedding of timestep and prompt into shift, scale and gate.
They act on one vector per step, and in HunyuanVideo they hold 3.42 of 12.8 billion parameters. Here their weights stay
in host memory (mapped from the checkpoint, shared by all ranks), pass through the device once for each request, and
leave only their results behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ModulationTable:
    """Results of every modulation layer for every step of one branch: `rows[step][layer]` is [1, out_features]."""

    rows: list[list[Tensor]]


class PrecomputedLinear(nn.Module):
    """Stands where a modulation layer stood and gives its result for the step at hand."""

    def __init__(self, owner: "PrecomputedModulation", index: int) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple: not a submodule, its weights shall not follow the model to the device
        self._index = index

    def forward(self, embedding: Tensor) -> Tensor:
        """[1, in_features] -> [1, out_features], looked up."""
        return self._owner[0].current(self._index)


class PrecomputedModulation:
    """Takes the named linear layers out of a model and answers in their place.

    Args:
        model: has the layers; they are replaced in it.
        names: of `nn.Linear` submodules whose input is one vector for each batch entry and step.
    Raises:
        AttributeError: the model has no submodule of that name.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._layers: list[nn.Linear] = []
        self._table: ModulationTable | None = None
        self._step = 0
        for index, name in enumerate(names):
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear), (name, type(layer))
            self._layers.append(layer)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, PrecomputedLinear(self, index))

    @torch.no_grad()
    def compute(self, embeddings: Sequence[Tensor]) -> ModulationTable:
        """Results for each step's activated embedding.

        Args:
            embeddings: one [1, in_features] for each step, as the layers would have received it, on the device.
        Returns:
            A table on the embeddings' device; the same values as the layers themselves give, one vector at a time.
        """
        rows: list[list[Tensor]] = [[] for _ in embeddings]
        for layer in self._layers:
            device = embeddings[0].device
            weight = layer.weight.to(device, non_blocking=True)
            bias = None if layer.bias is None else layer.bias.to(device, non_blocking=True)
            for row, embedding in zip(rows, embeddings, strict=True):
                row.append(nn.functional.linear(embedding, weight, bias))
        return ModulationTable(rows)

    def blank(self, device: torch.device) -> ModulationTable:
        """Zeros for one step, to run layers of the model for their time alone; no weight is looked at."""
        row = [torch.zeros((1, layer.out_features), dtype=layer.weight.dtype, device=device) for layer in self._layers]
        return ModulationTable([row])

    def use(self, table: ModulationTable, step: int) -> None:
        """The model is about to be called for this branch and step."""
        self._table = table
        self._step = step

    def leave(self) -> tuple[ModulationTable | None, int]:
        """What is current, for an evaluation that pauses (`dit_group.ping_pong`)."""
        return self._table, self._step

    def resume(self, state: tuple[ModulationTable | None, int]) -> None:
        """Make that current again."""
        self._table, self._step = state

    def current(self, index: int) -> Tensor:
        """The result of layer `index` for the step in use."""
        assert self._table is not None, "no table in use"
        return self._table.rows[self._step][index]

    @property
    def bytes_saved(self) -> int:
        """Bytes of weights that are not on the device."""
        return sum(p.numel() * p.element_size() for layer in self._layers for p in layer.parameters())
