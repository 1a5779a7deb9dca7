"""Hugging Face weights into Megatron and out again: the same logits, and the same bits, at every layout."""

import contextlib
import itertools

import megatron_ranks as ranks
import new_family
import pytest
import tiny_models
import torch

from pipeline.model import architecture, fp8, layout
from pipeline.model.checksum import checksum
from pipeline.model.grid import Grid
from pipeline.reshard.engine_grid import EngineGrid, Placement
from pipeline.reshard.plan import make_plan
from pipeline.rollout.native.decoder import Decoder
from tests.decoding import quantised_names

DENSE = {"TP1": (1, 1, 1, 1, None), "TP2": (2, 2, 1, 1, None), "TP2xPP2": (4, 2, 2, 1, None)}
SHARED_HEADS = "TP4, two ranks per key-value head"
WHOLE_EXPERTS = "TP2xEP2xPP2, whole experts"
EXPERTS = DENSE | {
    "EP2": (2, 1, 1, 2, None),
    "TP2, experts EP2": (2, 2, 1, 2, 1),
    "TP2xEP2": (4, 2, 1, 2, 2),
    "EP2xPP2": (4, 1, 2, 2, 1),
    WHOLE_EXPERTS: (4, 2, 2, 2, 1),
    SHARED_HEADS: (4, 4, 1, 1, None),
}
MIXED = ("TP2xPP2", "EP2xPP2", "TP2xEP2", "TP2, experts EP2")
CASES = [
    *(("llama", layout) for layout in DENSE),
    *(("llama_tied", layout) for layout in ("TP1", "TP2xPP2")),
    ("qwen2_window", "TP2xPP2"),
    ("qwen3", "TP2xPP2"),
    ("llama_linear", "TP2xPP2"),
    ("llama_yarn", "TP2xPP2"),
    ("qwen3_longrope", "TP2"),
    ("mistral_dynamic", "TP1"),
    ("mistral_window", "TP2xPP2"),
    ("glm4_moe_yarn", "TP1"),
    *(("glm4_moe", layout) for layout in MIXED),
    ("glm4_moe_air", "EP2"),
    *(("qwen3_next", layout) for layout in ("TP1", "EP2xPP2", "TP2xEP2", SHARED_HEADS)),
    *(("qwen3_5", layout) for layout in ("TP2xPP2", SHARED_HEADS)),
    *(("qwen3_5_moe", layout) for layout in ("TP1", "EP2xPP2", "TP2xEP2")),
    *((name, layout) for name in ("qwen2_moe", "mixtral") for layout in ("EP2xPP2", "TP2xEP2")),
    *((name, "TP1") for name in ("qwen2_moe_window", "mixtral")),
    ("llama3_short", "TP1"),
    *(("qwen3_moe", layout) for layout in ("TP1", *MIXED)),
    ("qwen3_moe_raw_window", "TP1"),
    *(("deepseek_v3", layout) for layout in ("TP1", "EP2", "EP2xPP2", "TP2, experts EP2")),
    ("deepseek_plain_query", "TP1"),
    *(("gpt_oss", layout) for layout in ("TP1", "EP2xPP2", WHOLE_EXPERTS)),
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_equal_transformers_and_an_engine_takes_the_folders_bits(gang, tmp_path, name, layout):
    world, tp, pp, ep, etp = EXPERTS[layout]
    config = tiny_models.config(name)
    source = tiny_models.weights(config)
    folder = tiny_models.write(tmp_path, config, source, files=1 + tp)
    vocab = config["vocab_size"]
    tokens = torch.randint(0, vocab, (3, 9), generator=torch.Generator().manual_seed(1))
    candidates = [0, 1, vocab // 2 - 1, vocab // 2, vocab - 2, vocab - 1]  # of both halves of the vocabulary
    with torch.no_grad():
        expected = torch.log_softmax(tiny_models.hf_model(folder)(tokens).logits, -1)[:, :-1, candidates]
    experts_under_tp = tp > 1 and "num_experts_per_tok" in config
    placed = {"tp": tp, "pp": pp, "sizes": {"ep": ep, "etp": etp or 0}, "sequence_parallel": experts_under_tp}
    results = gang.run(ranks.inspect, world, folder, placed, tokens, candidates)
    sent = tiny_models.as_sent(source)
    for table, whole, many in results:
        assert (table - expected).abs().max() < 1e-4
        for taken in (whole, many):
            assert taken.keys() == sent.keys()
            assert all(torch.equal(taken[key], sent[key]) for key in sent)


@pytest.mark.parametrize("layout", ["TP1", "TP2xPP2"])
def test_a_new_dense_family_costs_one_entry(gang, tmp_path, layout):
    """EXAONE's names for Llama's computation, in the learner and in the native engine: nothing else is asked."""
    config = tiny_models.config("llama")
    llama = tiny_models.weights(config)
    with torch.no_grad():
        tokens = torch.randint(0, config["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(1))
        reference = tiny_models.hf_model(tiny_models.write(tmp_path / "llama", config, llama))
        expected = torch.log_softmax(reference(tokens).logits, -1)[:, :-1, [3, 30]]
    source = {_renamed(name): tensor for name, tensor in llama.items()}
    assert not source.keys() & (llama.keys() - {"lm_head.weight"})
    assert {"transformer.h.3.attn.attention.out_proj.weight", "transformer.h.0.ln_2.weight"} <= source.keys()
    named = {"model_type": "exaone", "architectures": ["ExaoneForCausalLM"]}
    folder = tiny_models.write(tmp_path / "exaone", config | named, source)
    world, tp, pp, *_ = DENSE[layout]
    results = gang.run(ranks.inspect_new_family, world, folder, {"tp": tp, "pp": pp}, tokens, [3, 30])
    assert all((table - expected).abs().max() < 1e-4 for table, *_ in results)
    exported = results[0][1]
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[name], source[name]) for name in source)
    with new_family.registered(), torch.no_grad():
        decoder = Decoder(architecture.read(folder), source)
        logits = decoder.logits(decoder.prefill(tokens)[0])
    assert (torch.log_softmax(logits, -1)[:, :-1, [3, 30]] - expected).abs().max() < 1e-4


def _renamed(name):
    for old, new in new_family.RENAMED:
        name = name.replace(old, new)
    return name


PLACED = {
    "short first stage": ("qwen3_moe", Grid(pp=2, first_stage_layers=1), [[[0]], [[1, 2, 3]]]),
    "short last stage": ("qwen3_moe", Grid(pp=2, last_stage_layers=1), [[[0, 1, 2]], [[3]]]),
    "virtual stages": ("qwen3_moe", Grid(pp=2, vpp=2), [[[0], [2]], [[1], [3]]]),
    "virtual stages, EP2": ("qwen3_moe", Grid(pp=2, dp=2, ep=2, vpp=2), [[[0], [2]]] * 2 + [[[1], [3]]] * 2),
    "PP4": ("qwen3_moe", Grid(pp=4), [[[0]], [[1]], [[2]], [[3]]]),
    "EP4": ("qwen3_moe", Grid(dp=4, ep=4), [[[0, 1, 2, 3]]] * 4),
    "EP2, expert-TP2, dense TP1": ("deepseek_v3", Grid(dp=4, ep=2, etp=2), [[[0, 1, 2, 3]]] * 4),
    "TP2, CP2": ("qwen2", Grid(tp=2, dp=2, cp=2), [[[0, 1, 2, 3]]] * 4),
    "TP4": ("qwen2", Grid(tp=4), [[[0, 1, 2, 3]]] * 4),
    "GLM, TP4": ("glm4_moe", Grid(tp=4), [[[0, 1, 2, 3]]] * 4),
    "GLM, PP4": ("glm4_moe", Grid(pp=4), [[[0]], [[1]], [[2]], [[3]]]),
    "GLM, EP4": ("glm4_moe", Grid(dp=4, ep=4), [[[0, 1, 2, 3]]] * 4),
    "Qwen3-Next, TP4": ("qwen3_next", Grid(tp=4), [[[0, 1, 2, 3]]] * 4),
    "Qwen3-Next, PP4": ("qwen3_next", Grid(pp=4), [[[0]], [[1]], [[2]], [[3]]]),
    "Qwen3-Next, EP4": ("qwen3_next", Grid(dp=4, ep=4), [[[0, 1, 2, 3]]] * 4),
    "Qwen3-Next, TP2, EP2, PP2": ("qwen3_next", Grid(tp=2, ep=2, etp=1, pp=2), [[[0, 1]]] * 2 + [[[2, 3]]] * 2),
    "Qwen3.5, TP4": ("qwen3_5", Grid(tp=4), [[[0, 1, 2, 3]]] * 4),
    "Qwen3.5, PP4": ("qwen3_5", Grid(pp=4), [[[0]], [[1]], [[2]], [[3]]]),
    "Qwen3.5 with experts, EP4": ("qwen3_5_moe", Grid(dp=4, ep=4), [[[0, 1, 2, 3]]] * 4),
    "gpt-oss, TP4, EP4": ("gpt_oss", Grid(tp=4, ep=4, etp=1), [[[0, 1, 2, 3]]] * 4),
    "gpt-oss, PP4": ("gpt_oss", Grid(pp=4), [[[0]], [[1]], [[2]], [[3]]]),
    "GLM, TP2, EP2, PP2": ("glm4_moe", Grid(tp=2, ep=2, etp=1, pp=2), [[[0, 1]]] * 2 + [[[2, 3]]] * 2),
}


@pytest.mark.parametrize("case", PLACED)
def test_any_grid_holds_the_same_bits(gang, tmp_path, case):
    """Megatron puts layers where the grid says, and what was loaded comes out again."""
    name, grid, expected = PLACED[case]
    config = tiny_models.config(name, num_key_value_heads=4)
    source = tiny_models.weights(config)
    folder = tiny_models.write(tmp_path, config, source)
    results = gang.run(ranks.load_and_export, grid.world_size, folder, grid)
    assert [layers for layers, _ in results] == expected
    sent = tiny_models.as_sent(source)
    assert results[0][1].keys() == sent.keys()
    assert all(torch.equal(results[0][1][key], sent[key]) for key in sent)


def test_expert_biases_stay_float32(gang, tmp_path):
    """DeepSeek-V3 chooses experts by them; rounded to bfloat16 it would choose others."""
    config = tiny_models.config("deepseek_v3")
    source = tiny_models.weights(config)
    folder = tiny_models.write(tmp_path, config, source)
    exported = gang.run(ranks.load_and_export, 2, folder, Grid(dp=2, ep=2), "bf16")[0][1]
    biases = {name for name in source if name.endswith("e_score_correction_bias")}
    assert biases
    for name, tensor in source.items():
        assert torch.equal(exported[name], tensor if name in biases else tensor.bfloat16()), name


def test_grid_puts_layers_where_megatron_does(gang):
    """Every even and uneven division of up to 16 layers over up to 4 stages of up to 3 chunks."""
    ends = (None, 1, 2, 3, 4, 6)
    cases = [
        (layers, Grid(pp=pp, vpp=vpp, first_stage_layers=first, last_stage_layers=last))
        for layers, pp, vpp, first, last in itertools.product(range(1, 17), (2, 3, 4), (1, 2, 3), ends, ends)
        if not (pp == 2 and vpp > 1 and first and last)  # upstream then divides by the number of stages between: 0
    ]
    ours = {}
    for layers, grid in cases:
        with contextlib.suppress(ValueError):
            ours[layers, grid] = grid.chunks(layers)
    assert len(ours) > 200
    assert gang.run(ranks.megatron_chunks, 1, list(ours))[0] == list(ours.values())


FP8 = {
    "TP2xDP2": ("qwen3", Grid(tp=2, dp=2), {"before", "after"}),
    "TP2xPP2": ("qwen2", Grid(tp=2, pp=2), {"before", "after"}),
    "experts over EP2, expert-TP2": ("deepseek_v3", Grid(dp=4, ep=2, etp=2), {"before"}),
    "experts over EP2, dense TP2": ("qwen3_moe", Grid(tp=2, dp=2, ep=2, etp=2), {"before", "after"}),
}


@pytest.mark.parametrize("case", FP8)
def test_fp8_has_the_same_bits_whichever_side_quantises(gang, tmp_path, case):
    """Feed-forward shards (256 / 2) end on block edges, those of attention (64 / 2) within blocks."""
    name, grid, expected = FP8[case]
    config = tiny_models.config(name, intermediate_size=256, num_key_value_heads=4)
    if "moe_intermediate_size" in config:
        config["moe_intermediate_size"] = 256
    source = tiny_models.weights(config)
    folder = tiny_models.write(tmp_path, config, source)
    rows = layout.rows(architecture.read(folder), grid)
    placement = Placement.consecutive(grid.world_size, 1, False)
    plan = make_plan(architecture.read(folder), grid, EngineGrid(), placement, dtype="fp8")
    assert {tensor.quantise for tensor in plan.tensors} == expected | {None}
    exported = gang.run(ranks.load_and_export, grid.world_size, folder, grid, "bf16", True)[0][1]
    kept = {name: t if name.endswith("correction_bias") else t.bfloat16() for name, t in source.items()}
    whole = fp8.quantise_tensors(kept, quantised_names(rows))
    assert exported.keys() == whole.keys()
    assert checksum(exported) == checksum(whole)


def test_replicas_stay_bitwise_equal(gang, tmp_path):
    """Any replica may send: after updates they hold the same bits, also where each updates its part only."""
    folder = tiny_models.write(tmp_path, tiny_models.config("llama"))
    first, _, third, _ = gang.run(ranks.parameters_after_updates, 4, folder, 2, {"distributed": True})
    assert first.keys() == third.keys()
    assert all(torch.equal(first[name], third[name]) for name in first)
