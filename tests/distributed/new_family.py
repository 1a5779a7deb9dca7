"""EXAONE 3, a dense family that the project does not have, added as one would add it: an entry in each of two tables."""

from contextlib import contextmanager
from unittest.mock import patch

from pipeline.model import architecture, layout
from pipeline.model.layout import Template

HERE, THERE = "decoder.layers.{layer}.", "transformer.h.{layer}."
TABLE = (
    Template("embedding.word_embeddings.weight", ("transformer.wte.weight",), (("vocab", "hidden"),), 0, place="first"),
    Template("decoder.final_layernorm.weight", ("transformer.ln_f.weight",), (("hidden",),), place="last"),
    Template("output_layer.weight", ("lm_head.weight",), (("vocab", "hidden"),), 0, place="last", when="untied"),
    Template("output_layer.weight", ("transformer.wte.weight",), (("vocab", "hidden"),), 0, place="last", when="tied"),
    Template(HERE + "input_layernorm.weight", (THERE + "ln_1.weight",), (("hidden",),)),
    Template(HERE + "pre_mlp_layernorm.weight", (THERE + "ln_2.weight",), (("hidden",),)),
    Template(
        HERE + "self_attention.linear_qkv.weight",
        tuple(THERE + f"attn.attention.{name}_proj.weight" for name in "qkv"),
        (("q", "hidden"), ("kv", "hidden"), ("kv", "hidden")),
        split=0,
        grouped=True,
    ),
    Template(
        HERE + "self_attention.linear_proj.weight", (THERE + "attn.attention.out_proj.weight",), (("hidden", "q"),), 1
    ),
    Template(
        HERE + "mlp.linear_fc1.weight",
        tuple(THERE + f"mlp.c_fc_{i}.weight" for i in (0, 1)),
        (("ffn", "hidden"), ("ffn", "hidden")),
        split=0,
    ),
    Template(HERE + "mlp.linear_fc2.weight", (THERE + "mlp.c_proj.weight",), (("hidden", "ffn"),), 1),
)
FAMILIES = {"ExaoneForCausalLM": architecture.Family("exaone")}


@contextmanager
def registered():
    """Within, the project knows the family."""
    with patch.dict(architecture.FAMILIES, FAMILIES), patch.dict(layout.TABLES, {"exaone": TABLE}):
        yield


RENAMED = {  # from Llama's names, for a reference
    "model.embed_tokens": "transformer.wte",
    "model.norm": "transformer.ln_f",
    "model.layers": "transformer.h",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.attention.out_proj",
    "self_attn": "attn.attention",
    "gate_proj": "c_fc_0",
    "up_proj": "c_fc_1",
    "down_proj": "c_proj",
}
