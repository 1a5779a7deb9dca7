"""Hugging Face weights into Megatron and out again: the same logits, and the same bits, at every layout."""

import megatron_ranks as ranks
import pytest
import tiny_models
import torch

from pipeline.checksum import checksum


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 1), (4, 2, 2)], ids=["TP1", "TP2", "TP2xPP2"])
@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_logits_equal_transformers_and_export_equals_the_folder(gang, tmp_path, name, layout):
    world, tp, pp = layout
    config = tiny_models.config(name)
    source = tiny_models.weights(config)
    folder = tiny_models.write(tmp_path, config, source, files=1 + tp)
    tokens = torch.randint(0, config["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.log_softmax(tiny_models.hf_model(folder)(tokens).logits, -1)[:, :-1]
    results = gang.run(ranks.inspect, world, folder, tp, pp, tokens)
    for table, _, _ in results:
        assert (table - expected).abs().max() < 1e-4
    for version, items in ((7, results[0][1]), (8, results[0][2])):
        exported = {key: tensor for bucket in items for key, tensor in bucket.tensors.items()}
        assert exported.keys() == source.keys()
        assert all(torch.equal(exported[key], source[key]) for key in source)
        assert [(b.version, b.index, b.count) for b in items] == [(version, i, len(items)) for i in range(len(items))]
        assert all(b.checksum == checksum(b.tensors) for b in items)
    sizes = [[t.nbytes for t in bucket.tensors.values()] for bucket in results[0][2]]
    assert all(len(size) == 1 or sum(size) <= ranks.SMALL_BUCKET_MIB * 2**20 for size in sizes)
    assert any(len(size) > 1 for size in sizes)
    for _, whole, many in results[1:]:
        assert whole == [None] * len(results[0][1])
        assert many == [None] * len(results[0][2])
