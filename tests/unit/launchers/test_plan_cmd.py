"""``isentrope plan weights`` as a user meets it."""

import json

import pytest

from tests import command_line

GIB = 2**30
LAYOUTS = ("--learner", "tp=8,pp=4", "--engines", "tp=8,count=4")


def call(capsys, *words):
    return command_line.call(capsys, "plan", "weights", *words)


def plan(capsys, *words):
    return command_line.answer(capsys, "plan", "weights", *words)


def test_help_has_an_example(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert "Examples" in out


def test_numbers_of_qwen3_32b(capsys):
    result = plan(capsys, "--model", "qwen3-32b", *LAYOUTS)
    assert result["per_rank_ingress_bytes"] == result["per_rank_minimum_bytes"] == pytest.approx(5.8 * GIB, rel=0.01)
    assert (
        result["inter_node_ingress_bytes"]
        == result["inter_node_lower_bound_bytes"]
        == pytest.approx(46.5 * GIB, rel=0.01)
    )
    assert result["gather_broadcast_per_rank_ingress_bytes"] == pytest.approx(59.2 * GIB, rel=0.01)
    assert result["peak_buffer_bytes"] <= 512 << 20
    assert (
        result["total_sent_bytes"]
        == sum(result["ingress_bytes_by_engine_rank"])
        == sum(result["sent_bytes_by_process"])
    )
    assert result["per_rank_ingress_ratio"] == result["inter_node_ratio"] == 1.0
    assert 0 < result["plan_seconds"] < 10
    # 46.5 GiB enter a node over 8 GPUs of 50 GB/s: 0.125 s, more where buckets are uneven or a stage is passed on.
    assert 0.125 < result["predicted_seconds"] < 0.25
    halved = plan(capsys, "--model", "qwen3-32b", *LAYOUTS, "--inter-gbps", "25")
    assert 1.5 < halved["predicted_seconds"] / result["predicted_seconds"] <= 2


def test_disaggregated_small_nodes_and_buckets(capsys):
    words = ("--model", "llama-3.1-8b", "--learner", "tp=2,dp=2", "--engines", "tp=2,count=2", "--disaggregated")
    result = plan(capsys, *words, "--gpus-per-node", "4", "--bucket-mib", "32")
    assert result["peak_buffer_bytes"] <= 32 << 20
    assert result["inter_node_ingress_bytes_by_node"] == [0, result["model_bytes"]]
    assert result["per_rank_minimum_bytes"] < result["model_bytes"]
    together = plan(capsys, *words, "--gpus-per-node", "8")
    assert together["inter_node_ingress_bytes"] == 0
    assert together["inter_node_ratio"] is None


def test_every_node_gets_one_copy_from_evenly_used_replicas(capsys):
    apart = ("--learner", "tp=8,pp=2,dp=2", "--engines", "tp=8,count=2", "--disaggregated")
    result = plan(capsys, "--model", "qwen3-32b", *apart)
    assert result["inter_node_ingress_bytes_by_node"] == [0] * 4 + [result["model_bytes"]] * 2
    assert result["gather_broadcast_inter_node_bytes"] == result["model_bytes"]
    assert result["gather_broadcast_ratio"] == pytest.approx(8, rel=0.01)
    assert result["learner_sent_max_over_mean"] <= 1.1
    assert sum(result["sent_bytes_by_process"][:32]) == 2 * result["model_bytes"]


def test_fp8_halves_the_bytes(capsys):
    bf16 = plan(capsys, "--model", "qwen3-32b", *LAYOUTS)
    fp8 = plan(capsys, "--model", "qwen3-32b", *LAYOUTS, "--dtype", "fp8")
    assert 0.5 < fp8["model_bytes"] / bf16["model_bytes"] < 0.53  # embeddings stay bf16
    assert fp8["quantise"] == {"not": 64 * 4 + 3, "before": 2 * 64 * 7}


def test_experts(capsys):
    result = plan(
        capsys, "--model", "qwen3-30b-a3b", "--learner", "tp=2,dp=4,ep=8,etp=1", "--engines", "tp=4,ep=4,count=2"
    )
    assert result["per_rank_ingress_ratio"] == 1.0


def test_table_and_figure(capsys, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
    }
    config |= {"num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))
    picture = tmp_path / "plan.png"
    words = ("--learner", "tp=2", "--engines", "tp=4", "--disaggregated", "--figure", str(picture))
    code, out, _ = call(capsys, "--model", str(folder), *words)
    assert code == 0
    assert "by an engine rank" in out
    assert "predicted" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "option", "remedy"),
    [
        (("--model", "qwen3-33b", *LAYOUTS), "--model", "qwen3-32b"),
        (("--model", "qwen3-32b", "--learner", "tp=8,pq=4", "--engines", "tp=8"), "--learner", "'pq' is not one of"),
        (("--model", "qwen3-32b", "--learner", "tp=8", "--engines", "tp=x"), "--engines", "whole number"),
        (("--model", "qwen3-32b", "--learner", "tp=8,tp=4", "--engines", "tp=8"), "--learner", "given twice"),
        (("--model", "qwen3-32b", "--learner", "tp=8,pp=5", "--engines", "tp=8"), "--learner", "choose a divisor"),
        (("--model", "qwen3-32b", "--learner", "tp=8", "--engines", "tp=8,count=2"), "--engines", "lower the number"),
        (("--model", "qwen3-32b", "--learner", "tp=8", "--engines", "tp=6"), "--engines", "choose a divisor"),
        (("--model", "qwen3-32b", *LAYOUTS, "--dtype", "int8"), "--dtype", "bf16"),
        (("--model", "qwen3-32b", "--learner", "tp=16", "--engines", "tp=16", "--dtype", "fp8"), "--dtype", "lower"),
        (
            ("--model", "qwen3-32b", "--learner", "tp=8", "--engines", "tp=8", "--bucket-mib", "0"),
            "--bucket-mib",
            "greater than",
        ),
        (("--model", "qwen3-32b", "--learner", "tp=8"), "--engines", "Missing"),
    ],
)
def test_mistakes_name_the_option_and_a_remedy(capsys, words, option, remedy):
    code, out, err = call(capsys, *words)
    assert code == 2
    assert out == ""
    text = " ".join(err.replace("│", " ").split())
    assert option in text
    assert remedy in text
    assert "Traceback" not in err
