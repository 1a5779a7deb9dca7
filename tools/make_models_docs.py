"""Write the table of model families in docs/models.md: ``python tools/make_models_docs.py``.

A test keeps it up to date, and fails where a family has no line in ``KNOWN``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.model import architecture  # noqa: E402
from pipeline.model.architecture import FAMILIES, Architecture  # noqa: E402
from pipeline.model.rope import ANY_ROPE  # noqa: E402
from tests.tiny_folder import hf_config  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN = "<!-- models: written by tools/make_models_docs.py from pipeline/model/architecture.py -->"
END = "<!-- end of models -->"


class Known(NamedTuple):
    """What the code does not say of a family."""

    models: str  # that people know
    sglang: str  # what was tried of live updates: "server" | "places" | "refused"
    fp8: str  # rollouts in FP8: what was tried


KNOWN: Mapping[str, Known] = {
    "llama": Known("Llama 3.1, SmolLM2", "server", "native only"),
    "mistral": Known("Mistral 7B v0.3", "places", "native only"),
    "qwen2": Known("Qwen2.5", "places", "untried with SGLang"),
    "qwen3": Known("Qwen3", "server", "places"),
    "mixtral": Known("Mixtral 8x7B, 8x22B", "places", "untried with SGLang"),
    "qwen2_moe": Known("Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", "places", "untried with SGLang"),
    "qwen3_moe": Known("Qwen3-30B-A3B, Qwen3-235B-A22B", "server", "places"),
    "qwen3_next": Known("Qwen3-Next-80B-A3B", "places, 1 rank", "untried with SGLang"),
    "qwen3_5_text": Known("Qwen3.5-27B and smaller, text", "places, 1 rank", "untried with SGLang"),
    "qwen3_5_moe_text": Known("Qwen3.5-35B-A3B, text", "places, 1 rank", "untried with SGLang"),
    "gpt_oss": Known("gpt-oss-20b, gpt-oss-120b", "refused", "native only"),
    "glm4_moe": Known("GLM-4.5, GLM-4.5-Air, GLM-4.6", "places", "untried with SGLang"),
    "deepseek_v3": Known("DeepSeek-V3, V3.1, R1, Kimi-K2", "places", "untried with SGLang"),
}


def page() -> str:
    """The whole page, with the table as it must be."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def table() -> str:
    """Markdown of the table."""
    rows = [
        "| `model_type` | models | learner | native engine | SGLang | rotary scalings | FP8 rollouts |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        known = KNOWN[family.name]
        model = architecture.parse(hf_config(family.name))
        cells = [
            ", ".join(f"`{name}`" for name in (family.name, *family.aliases, family.within) if name),
            known.models,
            ", ".join(_sizes(model)),
            "own decoder" if model.native else "transformers'",
            known.sglang,
            "all" if family.rope.kinds == ANY_ROPE.kinds else ", ".join(family.rope.kinds),
            known.fp8,
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _sizes(model: Architecture) -> Iterator[str]:
    yield "TP, SP, PP, VPP"
    if model.delta is None:
        yield "CP"
    if model.moe:
        yield "EP" if model.family.biases else "EP, expert-TP"


def unknown() -> set[str]:
    """Families without a line in ``KNOWN``, and the other way round."""
    return {family.name for family in FAMILIES.values()} ^ KNOWN.keys()


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
