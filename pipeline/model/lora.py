"""Which low-rank adapters (LoRA, arXiv 2106.09685) a model has, and how they are divided over a learner's ranks.

An adapter is of one Megatron parameter, which may be several Hugging Face tensors (query, key and value; gate and up).
Each of those has its own pair of matrices, as in PEFT: ``A`` ``[rank, in]`` and ``B`` ``[out, rank]``. The parameter's
``A`` is theirs one below the other, its ``B`` has the parameter's own rows. Both are rows of the layout table's kind,
so that filling, checkpoints, export and estimates read them as they read all others. No torch and no megatron here.

Every line of the layout table can have an adapter whose Hugging Face tensors are weights of ``LORA_MODULES``. Routed
experts are among them, unless the family's folders have one tensor for all experts of a layer: PEFT's names are by
linear layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.config.schema import ALL_LINEAR, LORA_MODULES, LoraConfig
from pipeline.model.architecture import Architecture
from pipeline.model.grid import Grid
from pipeline.model.layout import Row, Source, names, rows

FILE = "lora.json"  # beside a checkpoint: the configuration that its adapters were made with


@dataclass(frozen=True)
class Adapter:
    """The adapter of one parameter."""

    base: Row
    a: Row  # every adapted source's [rank, in]
    b: Row  # [out, rank] with the rows of the base; those of a source without an adapter stay 0
    sources: tuple[int, ...]  # which of the base's sources have an adapter, in the order of ``a``'s

    def outputs(self, parts: int, part: int) -> Iterator[tuple[int, int, int]]:
        """Output entries that part ``part`` of ``parts`` computes: index in ``sources``, first local entry, how
        many.
        """
        if self.base.split != 0:
            yield 0, 0, self.base.sources[0].shape[0]
            return
        for cut in self.base.slices(parts, part):
            if cut.source in self.sources:
                yield self.sources.index(cut.source), cut.start, cut.length


def available(model: Architecture) -> tuple[str, ...]:
    """Hugging Face modules of ``model`` that can have an adapter."""
    lines = (sources for parameter, sources in names(model) if _adaptable(model, "{expert}" in parameter))
    found = {_module(source) for sources in lines for source in sources}
    return tuple(each for each in LORA_MODULES if each in found)


def _adaptable(model: Architecture, expert: bool) -> bool:
    return not (expert and model.family.stacked)


def _module(source: str) -> str:
    """The linear layer that a Hugging Face tensor is the weight of; empty where it is none's."""
    return source.split(".")[-2] if source.endswith(".weight") else ""


def adapters(model: Architecture, grid: Grid, config: LoraConfig) -> tuple[Adapter, ...]:
    """Every adapter of ``model`` on the ranks of ``grid``, in the order of the layout table."""
    chosen, found = _chosen(config), []
    for row in rows(model, grid) if config.rank else ():
        adapted = tuple(i for i, source in enumerate(row.sources) if _module(source.name) in chosen)
        if adapted and _adaptable(model, row.expert is not None):
            found.append(_adapter(row, adapted, config.rank))
    return tuple(found)


def beside_experts(model: Architecture, config: LoraConfig) -> bool:
    """Whether a routed expert has an adapter; asked of the table's lines, not of every expert."""
    lines = (sources for parameter, sources in names(model) if "{expert}" in parameter and _adaptable(model, True))
    return config.rank > 0 and any(_module(source) in _chosen(config) for sources in lines for source in sources)


def _chosen(config: LoraConfig) -> Sequence[str]:
    return LORA_MODULES if ALL_LINEAR in config.targets else config.targets


def _adapter(row: Row, adapted: tuple[int, ...], rank: int) -> Adapter:
    module = row.parameter.removesuffix("weight")
    inner = tuple(_source(row.sources[i], "lora_A", (rank, row.sources[i].shape[1])) for i in adapted)
    outer = tuple(_source(each, "lora_B", (each.shape[0], rank), each.stacked) for each in row.sources)
    a = replace(row, parameter=module + "lora.A", sources=inner, split=1 if row.split == 1 else None, groups=0)
    b = replace(row, parameter=module + "lora.B", sources=outer, split=0 if row.split == 0 else None)
    return Adapter(row, a, b, adapted)


def _source(source: Source, name: str, shape: tuple[int, int], stacked: tuple[int, ...] = ()) -> Source:
    """Under the name that PEFT gives it in ``adapter_model.safetensors``."""
    return Source(f"base_model.model.{source.name.removesuffix('weight')}{name}.weight", shape, stacked)


def record(directory: Path, config: LoraConfig) -> None:
    """Write into a checkpoint's folder what its adapters are; nothing without LoRA."""
    if config.rank:
        (directory / FILE).write_text(json.dumps(asdict(config), indent=1))


def recorded(directory: Path) -> LoraConfig:
    """What a checkpoint's adapters are; rank 0 where it has none."""
    path = directory / FILE
    return LoraConfig(**json.loads(path.read_text())) if path.is_file() else LoraConfig()


def check(directory: Path, config: LoraConfig) -> None:
    """Raise ``ValueError`` where a checkpoint's adapters are of another configuration."""
    saved = recorded(directory)
    for name, value in asdict(config).items() if config.rank or saved.rank else ():
        if (was := getattr(saved, name)) != value:
            raise ValueError(
                f"learner.lora.{name}={value}: the checkpoint {directory} was saved with {was}: use that, or start a "
                "new run from `isentrope convert megatron-to-hf`"
            )
