"""Says which tensors of a model a Hugging Face folder holds as parts of larger ones: an expert's, of one for all.

Everywhere else each expert has tensors of its own, whatever the family: the layout, the plan, the converter and the
engines know no stacked ones. The folder's reader and writer look here, and so does who hands a state dict to
transformers. No torch here: :meth:`Part.of` slices what it is given.
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

_STACKED = {  # of an expert's tensor: the stacked one, the part's first entry along its last axis, and the step
    "gate_proj.weight": ("gate_up_proj", 0, 2),
    "up_proj.weight": ("gate_up_proj", 1, 2),
    "down_proj.weight": ("down_proj", 0, 1),
    "gate_proj.bias": ("gate_up_proj_bias", 0, 2),
    "up_proj.bias": ("gate_up_proj_bias", 1, 2),
    "down_proj.bias": ("down_proj_bias", 0, 1),
}


@dataclass(frozen=True)
class Part:
    """An expert's tensor ``[out, ...]``: of ``whole[expert]`` the entries ``start::step`` of its last axis, which comes
    first.
    """

    whole: str  # name in the folder
    shape: tuple[int, ...]  # of the whole
    expert: int
    start: int
    step: int

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of the part."""
        return self.within(whole[self.expert].movedim(-1, 0))

    def within(self, turned: torch.Tensor) -> torch.Tensor:
        """A view of the part, of all that the expert has in ``whole``, its last axis first."""
        return turned[self.start :: self.step]


@lru_cache(maxsize=8)
def parts(model: Architecture) -> Mapping[str, Part]:
    """Every tensor of ``model`` that is a part, by its own name; none for families that stack nothing."""
    if not model.family.stacked or model.moe is None:
        return {}
    found = {}
    for row in rows(model):
        for source in row.sources if row.expert is not None else ():
            module, _, own = source.name.rpartition(f".{row.expert}.")
            stacked, start, step = _STACKED[own]
            shape = (model.moe.experts, *source.shape[1:], source.shape[0] * step)
            found[source.name] = Part(f"{module}.{stacked}", shape, row.expert or 0, start, step)
    return found


def stack(tensors: Mapping[str, torch.Tensor], model: Architecture) -> dict[str, torch.Tensor]:
    """``tensors`` as a folder holds them: the parts of all experts put together in new tensors."""
    known, stacked = parts(model), {}
    for name, tensor in tensors.items():
        if (part := known.get(name)) is None:
            stacked[name] = tensor
        else:
            if part.whole not in stacked:
                stacked[part.whole] = tensor.new_empty(part.shape)
            part.of(stacked[part.whole]).copy_(tensor)
    return stacked
