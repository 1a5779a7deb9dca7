"""Says which tensors of a model a Hugging Face folder may hold as parts of larger ones: an expert's, of one for all.

Everywhere else each expert has tensors of its own, whatever the family: the layout, the plan, the converter and the
engines know no stacked ones. The folder's reader and writer look here, and so does who hands a state dict to
transformers. No torch here: ``Part.of`` slices what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from pipeline.model.architecture import Architecture
from pipeline.model.layout import rows

if TYPE_CHECKING:
    import torch

_STACKED = {  # of an expert's tensor: the stacked one, which of its equal parts the tensor is, and of how many
    "gate_proj.weight": ("gate_up_proj", 0, 2),
    "up_proj.weight": ("gate_up_proj", 1, 2),
    "down_proj.weight": ("down_proj", 0, 1),
    "gate_proj.bias": ("gate_up_proj_bias", 0, 2),
    "up_proj.bias": ("gate_up_proj_bias", 1, 2),
    "down_proj.bias": ("down_proj_bias", 0, 1),
}

_WHOLES = tuple({whole for whole, *_ in _STACKED.values()})


def is_whole(name: str) -> bool:
    """Whether a folder's tensor may be one for all experts: ``...gate_up_proj``, or what its codes are called."""
    return name.rpartition(".")[2].startswith(_WHOLES)


@dataclass(frozen=True)
class Part:
    """An expert's tensor: ``rows`` of what the expert has in ``whole``."""

    whole: str  # name in the folder
    whole_shape: tuple[int, ...]
    shape: tuple[int, ...]
    expert: int
    rows: slice
    turned: bool  # rows run along the whole's last axis

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of the part."""
        return self.within(whole[self.expert])

    def within(self, mine: torch.Tensor) -> torch.Tensor:
        """A view of the part, of all that the expert has in ``whole``."""
        return (mine.movedim(-1, 0) if self.turned else mine)[self.rows]


@lru_cache(maxsize=8)
def parts(model: Architecture) -> Mapping[str, Part]:
    """Every tensor of ``model`` that a folder may hold as a part, by its own name.

    In gpt-oss's wholes (``Family.stacked``) rows run along the last axis, and those of two parts take turns. In other
    families' they are transformers' own, whose parts lie end to end.
    """
    found, turned = {}, model.family.stacked
    for row in rows(model):
        for source in row.sources if row.expert is not None else ():
            module, _, own = source.name.rpartition(f".{row.expert}.")
            if own not in _STACKED or model.moe is None:
                continue
            stacked, number, count = _STACKED[own]
            length, *inner = source.shape
            where = slice(number, None, count) if turned else slice(number * length, (number + 1) * length)
            shape = (*inner, length * count) if turned else (length * count, *inner)
            whole = f"{module}.{stacked}"
            found[source.name] = Part(whole, (model.moe.experts, *shape), source.shape, row.expert or 0, where, turned)
    return found


def written(model: Architecture) -> Mapping[str, Part]:
    """Those of ``parts`` that a folder written here holds so: gpt-oss's, which have no other form."""
    return parts(model) if model.family.stacked else {}


def stack(tensors: Mapping[str, torch.Tensor], model: Architecture) -> dict[str, torch.Tensor]:
    """``tensors`` as a written folder holds them: the parts of all experts put together in new tensors."""
    known, stacked = written(model), {}
    for name, tensor in tensors.items():
        if (part := known.get(name)) is None:
            stacked[name] = tensor
        else:
            if part.whole not in stacked:
                stacked[part.whole] = tensor.new_empty(part.whole_shape)
            part.of(stacked[part.whole]).copy_(tensor)
    return stacked
