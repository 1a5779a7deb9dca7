"""A packed sequence means the same to Transformer Engine's kernels as to the project's own attention."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("lengths", [[7, 1, 64, 33], [128]])
def test_transformer_engine_attends_within_rows(lengths):
    pytest.importorskip("transformer_engine.pytorch")
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_ext import inputs, topology
    from megatron_ext.packed_attention import PackedAttention
    from pipeline.model.grid import Grid
    from pipeline.ports import free_port

    placed = topology.initialize(0, ("127.0.0.1", free_port()), Grid(), seed=0)
    try:
        config = TransformerConfig(
            num_layers=1, hidden_size=256, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0, bf16=True
        )
        torch.manual_seed(0)
        given = [
            torch.randn(sum(lengths), heads, 64, device=placed.device, dtype=torch.bfloat16, requires_grad=True)
            for heads in (4, 2, 2)
        ]
        packed = inputs.packed_rows(lengths, placed.device)
        found = []
        for attention in (PackedAttention, TEDotProductAttention):
            core = attention(config, 1, AttnMaskType.causal, "self").to(placed.device)
            out = core(*given, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed)
            out = out.reshape(sum(lengths), -1)
            found.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() <= 0.01 * ours.norm()
    finally:
        topology.shutdown()
