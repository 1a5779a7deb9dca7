"""Adapters: a layout changes nothing of them, a run starts as the model it is given, and engines get merged weights."""

import json

import lora_ranks
import megatron_ranks as ranks
import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from pipeline.config.schema import LoraConfig, ObjectiveConfig

ADAM = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
SP = {"sequence_parallel": True}
OVERLAP = {"optimizer": {**ADAM, "distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}}
FULL = {"recompute_granularity": "full"}
LAYOUTS = {  # processes, TP, PP, the rest
    "TP2": ("qwen2", 2, 2, 1, {}),
    "TP4 x SP, two ranks per key-value head, full recompute": ("qwen3", 4, 4, 1, {**SP, **FULL}),
    "DP2 x PP2 x VPP2, overlap": ("qwen2", 4, 1, 2, {"sizes": {"vpp": 2}, "micro_batch_size": 1, **OVERLAP}),
    "CP2 x TP2 x SP, full recompute": ("qwen3", 4, 2, 1, {"cp": 2, **SP, **FULL}),
    "TP2 x SP x PP2, latent attention": ("deepseek_v3", 4, 2, 2, SP),
    "EP2 x expert-TP2": ("deepseek_v3", 4, 1, 1, {"sizes": {"ep": 2, "etp": 2}}),
    "TP2, delta nets": ("qwen3_5", 2, 2, 1, SP),
}
ATTENTION = {  # of other families than Llama's kind
    "deepseek_v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "qwen3_5": (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    ),
}
EXPERTS = {"lora": LoraConfig(rank=2, targets=["q_proj", "o_proj", "gate_proj", "up_proj"])}


def batches():
    old = {"old_log_probs": -3 * torch.rand(10, 11, generator=torch.Generator().manual_seed(1))}
    return [ranks.batch(seed=seed, **old) for seed in range(2)]


@pytest.fixture(scope="module")
def alone(gang, tmp_path_factory):
    """Folder and one-process result of a model."""
    made = {}

    def result(name, config):
        if name not in made:
            folder = tiny_models.write(tmp_path_factory.mktemp(name), tiny_models.config(name))
            made[name] = folder, gang.run(*job(1, folder, 1, 1, config))[0]
        return made[name]

    return result


def job(world, folder, tp, pp, config):
    return lora_ranks.trained, world, folder, tp, pp, batches(), {"optimizer": ADAM, **config}


def same(left, right, bound=2e-5):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=0, atol=bound), name


def joined(pieces, like):
    """Whole gradients from the pieces of all ranks; every entry must be there."""
    whole = {name: torch.full_like(tensor, torch.nan) for name, tensor in like.items()}
    for name, dim, start, values in pieces:
        whole[name].narrow(dim, start, values.shape[dim]).copy_(values)
    return whole


def whole_gradients(found):
    """Of one process."""
    out = {}
    for name, dim, _, values in sorted(found.gradients, key=lambda piece: (piece[0], piece[2])):
        out[name] = values if name not in out else torch.cat([out[name], values], dim)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(gang, alone, layout):
    name, world, tp, pp, config = LAYOUTS[layout]
    folder, one = alone(name, {})
    found = gang.run(*job(world, folder, tp, pp, config))
    for each in found:
        assert torch.allclose(each.before, one.before, rtol=0, atol=2e-5)
        # As in the test of all weights, where last digits count for more.
        assert torch.allclose(each.after, one.after, rtol=0, atol=3e-4 if name == "qwen3_5" else 1e-4)
        for ours, theirs in zip(each.stats, one.stats, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5, abs=1e-6)
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert each.base_unchanged
    same(found[0].sent_at_start, one.sent_at_start, 0)
    same(found[0].sent, one.sent, 1e-6)
    same(found[0].sent_after, one.sent_after)
    if not config.get("optimizer", {}).get("distributed"):
        whole = whole_gradients(one)
        got = joined((piece for each in found for piece in each.gradients), whole)
        for key, gradient in whole.items():
            assert torch.allclose(got[key], gradient, rtol=0, atol=2e-5 * float(gradient.abs().max())), key


@pytest.mark.parametrize(
    ("name", "config"), [("qwen2", {}), ("qwen3_moe", EXPERTS), ("deepseek_v3", {}), ("qwen3_5", {})]
)
def test_starts_as_the_base_and_sends_what_it_computes(gang, alone, tmp_path, name, config):
    """At the start to the bit; with random adapters, a learner of the merged weights has the same log-probs."""
    folder, one = alone(name, config)
    log_probs, weights = gang.run(lora_ranks.whole_model, 1, folder, batches()[0])[0]
    assert torch.equal(one.start, log_probs)
    same(one.sent_at_start, weights, 0)
    merged = tiny_models.write(tmp_path / "merged", tiny_models.config(name), one.sent)
    log_probs, _ = gang.run(lora_ranks.whole_model, 1, merged, batches()[0])[0]
    # Merged weights are rounded once more: that moves log-probs by up to 2.3e-5 (qwen3_5), 1.0e-5 (qwen2, AVX-512).
    assert torch.allclose(one.before, log_probs, rtol=0, atol={"qwen3_5": 3e-5, "qwen2": 1.1e-5}.get(name, 1e-5))
    assert not torch.allclose(one.before, one.start, rtol=0, atol=1e-2)
    targets = config["lora"].targets if config else ["proj"]
    changed = {key for key in one.sent if not torch.equal(one.sent[key], weights[key])}
    assert changed == {key for key in weights if any(target in key for target in targets) and "weight" in key}


def test_only_adapters_are_trained(alone):
    _, one = alone("qwen2", {})
    assert one.trained == one.adapted > 0
    assert one.base_unchanged


def test_reference_is_the_model_without_adapters(gang, tmp_path):
    folder = tiny_models.write(tmp_path, tiny_models.config("qwen2"))
    objective = ObjectiveConfig(kl_coef=0.1)
    for start, policy, reference, copies in gang.run(lora_ranks.reference, 2, folder, batches()[0], objective):
        assert torch.equal(reference, start)
        assert not torch.allclose(policy, start, rtol=0, atol=1e-2)
        assert copies == 0


def test_checkpoint_of_other_adapters_is_refused(gang, tmp_path):
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config("llama"))
    said = gang.run(lora_ranks.other_adapters, 1, folder, tmp_path / "save")[0]
    assert said.startswith("learner.lora.rank=2: the checkpoint")
    assert "was saved with 4" in said


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen2", (2, 2, 1, SP)),
        ("qwen3", (2, 1, 2, {"dtype": "bf16"})),
        ("deepseek_v3", (2, 2, 1, SP)),
        ("qwen3_5", (2, 2, 1, SP)),
    ],
)
def test_checkpoint_becomes_a_merged_folder_and_a_peft_folder(gang, tmp_path, name, layout):
    world, tp, pp, config = layout
    folder = tiny_models.write(tmp_path / "hf", tiny_models.config(name))
    sent = gang.run(lora_ranks.saved, world, folder, tmp_path / "save", tp, pp, config)[0]
    report = gang.run(lora_ranks.converted, 1, tmp_path / "save", folder, tmp_path / "out")[0]
    assert report.verified.startswith("tensors; logits within")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    same(merged, sent, 1e-6 if "dtype" not in config else 1e-2)
    adapters = load_file(f"{report.adapter}/adapter_model.safetensors")
    said = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    modules = (*ATTENTION.get(name, ("q_proj", "k_proj", "v_proj", "o_proj")), "gate_proj", "up_proj", "down_proj")
    assert (said["r"], said["lora_alpha"], tuple(said["target_modules"])) == (4, 6.0, modules)
    beside = [f"{block}.{module}.weight" for block in ("mlp", "shared_experts") for module in sorted(modules[-3:])]
    assert said.get("target_parameters", []) == (beside if name == "deepseek_v3" else [])
    assert said["base_model_name_or_path"] == str(folder)
    for key, weight in load_file(folder / "model.safetensors").items():
        if key.split(".")[-2] in modules and key.endswith("weight"):
            a, b = (adapters.pop(f"base_model.model.{key.removesuffix('weight')}lora_{x}.weight") for x in "AB")
            weight = weight.to(merged[key].dtype).float() + 1.5 * b.float() @ a.float()
        assert torch.allclose(merged[key].float(), weight.float(), rtol=1e-2 if "dtype" in config else 0, atol=1e-5), (
            key
        )
    assert not adapters
