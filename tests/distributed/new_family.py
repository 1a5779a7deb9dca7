"""EXAONE 3, a dense family that the project does not have, added as one would add it: one entry in the table of
families.
"""

from contextlib import contextmanager
from unittest.mock import patch

from pipeline.model import architecture

RENAMED = (  # Llama's computation under other names
    ("model.embed_tokens", "transformer.wte"),
    ("model.norm", "transformer.ln_f"),
    ("model.layers", "transformer.h"),
    ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"),
    ("self_attn.o_proj", "attn.attention.out_proj"),
    ("self_attn", "attn.attention"),
    ("gate_proj", "c_fc_0"),
    ("up_proj", "c_fc_1"),
    ("down_proj", "c_proj"),
)
FAMILIES = {"ExaoneForCausalLM": architecture.Family("exaone", renamed=RENAMED)}


@contextmanager
def registered():
    """Within, the project knows the family."""
    with patch.dict(architecture.FAMILIES, FAMILIES):
        yield
