"""Hugging Face folders to torch_dist checkpoints and back, without Megatron: bits, bytes, memory, kills, bad input."""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch

from launchers.cli.main import run
from megatron_ext.weights import convert, torch_dist
from megatron_ext.weights.parts import Budget, ConversionError
from pipeline.model import architecture, fp8, identity, layout
from pipeline.model import folder as safetensors_io
from pipeline.model.grid import Grid
from tests.decoding import quantised_names
from tests.tiny_folder import write_seeing_folder

FAMILIES = ["llama", "llama_tied", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_moe", "gpt_oss", "deepseek_v3"]
DENSE = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 4, 1), (2, 2, 1), (4, 4, 1)]  # kv groups: 2
EXPERT = [(1, 1, 2), (1, 1, 4), (2, 1, 2), (2, 2, 4), (4, 2, 2), (1, 4, 4)]
MOE = ("qwen3_moe", "qwen3_5_moe", "gpt_oss", "deepseek_v3")


def folder(path: Path, name: str = "llama", files: int = 1, **changes) -> tuple[Path, dict]:
    config = tiny_models.config(name, **({"vocab_size": 1000} | changes))
    tensors = tiny_models.weights(config)
    return tiny_models.write(path, config, tensors, files), tensors


def read(path: Path) -> dict[str, torch.Tensor]:
    source = safetensors_io.Folder(path, architecture.read(path))
    return {name: source.stored(name) for name in source.entries}


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_bitwise_at_every_layout(tmp_path, name):
    hf, tensors = folder(tmp_path / "hf", name, files=3)
    for tp, pp, ep in DENSE + (EXPERT if name in MOE else []):
        megatron, back = tmp_path / f"m{tp}{pp}{ep}", tmp_path / f"b{tp}{pp}{ep}"
        made = convert.hf_to_megatron(hf, megatron, Grid(tp=tp, pp=pp, dp=ep, ep=ep), workers=2)
        assert made.bytes == sum(tensor.nbytes for tensor in tensors.values())
        ranks = {path.name.split("_")[2] for path in megatron.glob("__*_*.distcp")}
        assert tp * pp <= len(ranks) <= tp * pp * ep
        convert.megatron_to_hf(megatron, hf, back, workers=2)
        assert same(read(back), tensors)
        assert not list(tmp_path.glob(".*"))


def test_of_a_model_that_also_sees_the_model_of_text_is_written(tmp_path, caplog):
    tensors = write_seeing_folder(tmp_path / "hf", "stacked")
    convert.hf_to_megatron(tmp_path / "hf", tmp_path / "m", Grid(tp=2, dp=2, ep=2))
    convert.megatron_to_hf(tmp_path / "m", convert.model_of(tmp_path / "m"), tmp_path / "back")
    assert same(read(tmp_path / "back"), tensors)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen3_5_moe_text", ["Qwen3_5MoeForCausalLM"])
    assert "vision_config" not in config
    assert architecture.read(tmp_path / "back") == architecture.read(tmp_path / "hf")
    assert "its model of text is written alone, as 'qwen3_5_moe_text'" in caplog.text


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_the_way_back_needs_no_second_folder(tmp_path, capsys, dtype):
    hf, tensors = folder(tmp_path / "hf", "qwen3", files=2, torch_dtype="float32")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (hf / name).write_text(json.dumps(name))
    described = {path.name: path.read_text() for path in hf.iterdir() if not safetensors_io.is_weights(path)}
    words = [] if dtype is None else ["--dtype", dtype]
    assert run_to_end(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m"), *words]) == 0
    shutil.rmtree(hf)
    moved = (tmp_path / "m").rename(tmp_path / "moved")
    back = ["convert", "megatron-to-hf", "--checkpoint", str(moved), "--out", str(tmp_path / "back")]
    assert run_to_end([*back, "--json"]) == 0
    expected = tensors if dtype is None else {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert same(read(tmp_path / "back"), expected)
    if dtype == "bf16":
        config = json.loads(described["config.json"]) | {"torch_dtype": "bfloat16"}
        assert json.loads((tmp_path / "back/config.json").read_text()) == config
        del described["config.json"]
    assert {name: (tmp_path / "back" / name).read_text() for name in described} == described
    shutil.rmtree(moved / convert.KEPT)
    capsys.readouterr()
    assert run_to_end([*back[:-1], str(tmp_path / "again")]) == 2
    assert f"--checkpoint {moved} holds no hf/ and is not in a run with a config.yaml: give --hf" in (
        " ".join(capsys.readouterr().err.split())
    )


@pytest.mark.parametrize(
    ("layers", "pp", "stages"), [(5, 2, [3, 2]), (5, 3, [2, 1, 2]), (8, 3, [3, 2, 3]), (7, 4, [3, 1, 1, 2])]
)
def test_stages_need_not_hold_equally_many_layers(tmp_path, layers, pp, stages):
    hf, tensors = folder(tmp_path / "hf", num_hidden_layers=layers)
    convert.hf_to_megatron(hf, tmp_path / "m", Grid(pp=pp))
    files = torch_dist.read_metadata(tmp_path / "m").storage_data
    norms = {
        i.offset[0]: at.relative_path for i, at in files.items() if i.fqn.endswith("layers.input_layernorm.weight")
    }
    assert [sum(path.startswith(f"__{rank}_") for path in norms.values()) for rank in range(pp)] == stages
    convert.megatron_to_hf(tmp_path / "m", hf, tmp_path / "back")
    assert same(read(tmp_path / "back"), tensors)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_vocabulary_that_tp_does_not_divide_is_stored_whole(tmp_path, tp):
    hf, tensors = folder(tmp_path / "hf", vocab_size=1001)
    convert.hf_to_megatron(hf, tmp_path / "m", Grid(tp=tp))
    embedding = layout.rows(architecture.read(hf))[0]
    assert [torch_dist.chunks(embedding, tp, rank)[0].length for rank in range(tp)] == {
        2: [501, 500],
        4: [251, 251, 251, 248],
    }[tp]
    convert.megatron_to_hf(tmp_path / "m", hf, tmp_path / "back")
    assert same(read(tmp_path / "back"), tensors)


@pytest.mark.parametrize("name", ["qwen2", "deepseek_v3"])
def test_a_cast_is_torchs_own_and_leaves_expert_biases_alone(tmp_path, name):
    hf, tensors = folder(tmp_path / "hf", name)
    cast = {n: t if "e_score_correction_bias" in n else t.bfloat16() for n, t in tensors.items()}
    convert.hf_to_megatron(hf, tmp_path / "m", Grid(tp=2), dtype="bf16")
    convert.megatron_to_hf(tmp_path / "m", hf, tmp_path / "back")
    assert same(read(tmp_path / "back"), cast)
    convert.hf_to_megatron(hf, tmp_path / "m32", Grid(pp=2))
    convert.megatron_to_hf(tmp_path / "m32", hf, tmp_path / "back16", dtype="bf16")
    assert same(read(tmp_path / "back16"), cast)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3"])
def test_fp8_quantises_the_matrices_alone(tmp_path, name):
    hf, tensors = folder(tmp_path / "hf", name, hidden_size=192)  # no multiple of 128
    convert.hf_to_megatron(hf, tmp_path / "m", Grid(tp=2, pp=2))
    done = convert.megatron_to_hf(tmp_path / "m", hf, tmp_path / "fp8", dtype="fp8", verify=True, shard_bytes=10**5)
    matrices = quantised_names(layout.rows(architecture.read(hf)))
    assert "model.layers.1.self_attn.o_proj.weight" in matrices
    rest = {n: t if "e_score_correction_bias" in n else t.bfloat16() for n, t in tensors.items() if n not in matrices}
    expected = rest | fp8.quantise_tensors({n: tensors[n] for n in sorted(matrices)}, matrices)
    assert same(read(tmp_path / "fp8"), expected)
    assert (done.verified, done.bytes) == ("tensors", sum(t.nbytes for t in expected.values()))
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == fp8.quantization_config()
    assert len(list((tmp_path / "fp8").glob("*.safetensors"))) > 1
    again = convert.hf_to_megatron(tmp_path / "fp8", tmp_path / "again", Grid(tp=2, pp=2), verify=True)
    assert again.verified == "tensors"
    convert.megatron_to_hf(tmp_path / "again", tmp_path / "fp8", tmp_path / "values", verify=True)
    values = {name: tensor.bfloat16() for name, tensor in fp8.values(expected).items()}
    kept = {name for name in values if "e_score_correction_bias" in name}
    assert same(read(tmp_path / "values"), values | {name: expected[name] for name in kept})
    assert "quantization_config" not in json.loads((tmp_path / "values" / "config.json").read_text())


def test_a_hugging_face_folder_keeps_all_but_its_weights(tmp_path):
    hf, tensors = folder(tmp_path / "hf", "qwen2", torch_dtype="float32")
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "pytorch_model.bin"):
        (hf / name).write_text(name)
    convert.hf_to_megatron(hf, tmp_path / "m")
    convert.megatron_to_hf(tmp_path / "m", hf, tmp_path / "back", dtype="bf16", shard_bytes=20_000)
    back = tmp_path / "back"
    kept = {"tokenizer.json", "generation_config.json", "chat_template.jinja", "config.json"}
    files = {path.name for path in back.iterdir()}
    weights = {name for name in files if name.endswith(".safetensors")}
    assert files == kept | weights | {"model.safetensors.index.json", "conversion.json"}
    assert json.loads((back / "config.json").read_text()) == json.loads((hf / "config.json").read_text()) | {
        "torch_dtype": "bfloat16"
    }
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == weights
    assert set(index["weight_map"]) == set(tensors)  # tied: no lm_head
    assert index["metadata"]["total_size"] == sum(tensor.nbytes // 2 for tensor in tensors.values())
    from safetensors.torch import load_file

    for file in weights:  # the official reader
        held = load_file(back / file)
        assert all(torch.equal(held[name], tensors[name].bfloat16()) for name in held)
        assert sum(t.nbytes for t in held.values()) <= 20_000 or len(held) == 1


@pytest.mark.parametrize(("name", "grid"), [("llama", Grid(tp=4, pp=2)), ("qwen3_moe", Grid(tp=2, dp=4, ep=4))])
def test_every_rank_reads_only_its_own_bytes(tmp_path, name, grid):
    class Counting(safetensors_io.Folder):
        count = 0

        def read(self, *arguments):
            values = super().read(*arguments)
            Counting.count += values.nbytes
            return values

    hf, tensors = folder(tmp_path / "hf", name)
    model = architecture.read(hf)
    source = Counting(hf, model)
    types = {row.parameter: torch.float32 for row in layout.rows(model, grid)}
    parts = convert._parts(layout.rows(model, grid), grid, types, 50_000)
    assert len(parts) > grid.world_size / 2
    for part in parts:
        Counting.count = 0
        convert._write_part(tmp_path, source, model, types, Budget(10**6), part)
        assert Counting.count == part.nbytes
    assert sum(part.nbytes for part in parts) == sum(tensor.nbytes for tensor in tensors.values())


MEMORY = """
import sys
from pathlib import Path
from megatron_ext.weights import convert
def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
root = Path(sys.argv[1])
before = status("VmRSS")
convert.hf_to_megatron(root / "hf", root / "m", dtype=sys.argv[2] or None)
convert.megatron_to_hf(root / "m", root / "hf", root / "back", dtype="fp32")
print(before, status("VmHWM"))
"""


def test_peak_memory_does_not_grow_with_the_model(tmp_path):
    """256 MB of which no tensor is above 8 MB: resident memory, pages of mapped files included."""
    size = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4}
    _, tensors = folder(tmp_path / "hf", num_hidden_layers=8, head_dim=64, **size)
    total, largest = sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values())
    assert total > 2.4e8 > 25 * largest
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), ""], capture_output=True, text=True, check=True)
    before, peak = map(int, done.stdout.split())
    assert peak - before <= max(2 * largest, convert.LEAST_BUDGET) + 48 * 2**20 < total
    shutil.rmtree(tmp_path / "m")


def forked(act, said: Path) -> int:
    """Exit code of a process of its own that calls ``act``; what it writes goes to the file ``said``."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with said.open("w") as sys.stderr:
                try:
                    act()
                    code = 0
                except SystemExit as ended:
                    code = ended.code
                except Exception:  # noqa: BLE001 (whatever it is, it is told as at the end of a program)
                    sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_the_third_part(convert_it):
    calls = itertools.count(1)

    def progress(done, total):
        if next(calls) == 4:  # the first call reports what was finished before
            os.kill(os.getpid(), signal.SIGKILL)

    convert_it(workers=1, part_bytes=40_000, progress=progress)


def test_a_killed_conversion_goes_on_where_it_was(tmp_path):
    hf, tensors = folder(tmp_path / "hf", "qwen3")
    megatron, back = tmp_path / "m", tmp_path / "back"
    to_megatron = partial(convert.hf_to_megatron, hf, megatron)
    to_hf = partial(convert.megatron_to_hf, megatron, hf, back)
    for convert_it, out in ((to_megatron, megatron), (to_hf, back)):
        assert forked(partial(killed_at_the_third_part, convert_it), tmp_path / "said") == -9
        assert not out.exists()
        journal = tmp_path / f".{out.name}.converting" / "journal.jsonl"
        with journal.open("a") as file:
            file.write('{"part": 3, "res')  # killed while writing a line
        if out == megatron:
            with pytest.raises(ValueError, match="other options"):
                convert_it(dtype="bf16", part_bytes=40_000)
        report = convert_it(workers=2, part_bytes=40_000)
        assert report.resumed_parts == 3 < report.parts
        assert not journal.exists()
    assert same(read(back), tensors)


def limited(words):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    run(words)


def test_a_full_disk_leaves_nothing_that_looks_complete(tmp_path):
    hf, tensors = folder(tmp_path / "hf")
    to_megatron = ["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]
    to_hf = [
        "convert",
        "megatron-to-hf",
        "--hf",
        str(hf),
        "--checkpoint",
        str(tmp_path / "m"),
        "--out",
        str(tmp_path / "b"),
    ]
    for words, out in ((to_megatron, tmp_path / "m"), (to_hf, tmp_path / "b")):
        said = tmp_path / "said"
        assert forked(partial(limited, words), said) == 1
        assert "File too large" in said.read_text()
        assert "make room" in said.read_text()
        assert "Traceback" not in said.read_text()
        assert not out.exists()
        run_to_end(words)
    assert same(read(tmp_path / "b"), tensors)


def run_to_end(words) -> int:
    with pytest.raises(SystemExit) as ended:
        run(words)
    return ended.value.code


def damaged_folder(path: Path, kind: str) -> Path:
    hf, tensors = folder(path, "llama")
    if kind == "missing":
        del tensors["model.layers.2.mlp.up_proj.weight"]
    if kind == "extra":
        tensors["model.layers.2.self_attn.q_norm.weight"] = torch.ones(8)
    if kind == "shape":
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(17, 32)
    tiny_models.write(hf, tiny_models.config("llama", vocab_size=1000), tensors)
    config = json.loads((hf / "config.json").read_text())
    if kind == "architecture":
        config["architectures"] = ["GPTNeoXForCausalLM"]
    (hf / "config.json").write_text(json.dumps(config))
    weights = hf / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    if kind == "header":
        weights.write_bytes(struct.pack("<Q", 10) + b"{not json!" + b"\0" * 64)
    if kind == "no weights":
        weights.unlink()
    return hf


MESSAGES = {
    "missing": ["lacks the tensor model.layers.2.mlp.up_proj.weight", "decoder.layers.2.mlp.linear_fc1.weight ="],
    "extra": ["1 tensors that llama does not have: model.layers.2.self_attn.q_norm.weight"],
    "shape": ["[17, 32]", "[16, 32]", "decoder.layers.1.self_attention.linear_qkv.weight ="],
    "architecture": ["GPTNeoXForCausalLM", "model_type 'llama'", "LlamaForCausalLM"],
    "truncated": ["model.safetensors is truncated", "bytes"],
    "header": ["damaged header"],
    "no weights": ["neither model.safetensors nor"],
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_bad_folder_is_refused_with_exit_code_2(tmp_path, capsys, kind):
    hf = damaged_folder(tmp_path / "hf", kind)
    assert run_to_end(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in MESSAGES[kind]), said
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_values_that_are_not_finite_are_refused_in_both_directions(tmp_path, capsys):
    hf, tensors = folder(tmp_path / "hf", files=2)
    convert.hf_to_megatron(hf, tmp_path / "sound")
    spoilt = "model.layers.2.mlp.down_proj.weight"
    tensors[spoilt][3, 4] = math.nan
    tiny_models.write(hf, tiny_models.config("llama", vocab_size=1000), tensors, 2)
    assert run_to_end(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    file = f"model-{list(tensors).index(spoilt) % 2}.safetensors"
    assert f"the tensor {spoilt} in {file} holds NaN or infinite values: download {file} again" in said
    assert not (tmp_path / "m").exists()

    weights, number = (
        tmp_path / "sound" / "__0_0.distcp",
        tensors["model.embed_tokens.weight"][:1, :4].numpy().tobytes(),
    )
    weights.write_bytes(weights.read_bytes().replace(number, struct.pack("<ffff", 0, math.inf, 0, 0)))
    words = ["convert", "megatron-to-hf", "--checkpoint", str(tmp_path / "sound"), "--out", str(tmp_path / "back")]
    assert run_to_end(words) == 2
    assert "holds NaN or infinite values: convert an earlier checkpoint" in capsys.readouterr().err


def test_impossible_requests_exit_with_2(tmp_path, capsys):
    hf, _ = folder(tmp_path / "hf")
    to_megatron = ["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]
    for words, message in (
        ([*to_megatron, "--tp", "3"], "--tp=3 does not divide the model's 4 attention heads"),
        ([*to_megatron, "--pp", "5"], "--pp=5 does not divide the model's 4 layers"),
        ([*to_megatron, "--ep", "2"], "--ep=2: a llama model has no experts"),
        ([*to_megatron[:-1], str(hf)], "exists already"),
        ([*to_megatron, "--dtype", "fp8"], "'fp8' is not one of"),
        (
            ["convert", "megatron-to-hf", "--checkpoint", str(hf), "--hf", str(hf), "--out", "x"],
            "no Megatron checkpoint",
        ),
        (["convert", "megatron-to-hf", "--checkpoint", str(hf), "--out", "x", "--shard-size", "5 apples"], "no size"),
    ):
        assert run_to_end(words) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_checkpoint_of_another_model_is_refused_field_by_field(tmp_path):
    hf, _ = folder(tmp_path / "hf")
    other, _ = folder(tmp_path / "other", num_hidden_layers=2, rope_theta=5000.0)
    convert.hf_to_megatron(hf, tmp_path / "m")
    with pytest.raises(ValueError, match="does not describe the model") as caught:
        convert.megatron_to_hf(tmp_path / "m", other, tmp_path / "back")
    lines = str(caught.value).splitlines()
    assert "  layers: checkpoint 4, config.json 2" in lines
    assert "  rope_theta: checkpoint 1000.0, config.json 5000.0" in lines
    assert len(lines) == 4
    (tmp_path / "m" / identity.FILE).unlink()  # from elsewhere: the tensors themselves are compared
    for changes, message in (
        ({"num_hidden_layers": 2}, r"\[4, 32\], config.json asks for \[2, 32\]; needed by decoder.layers.0"),
        ({"tie_word_embeddings": True}, "1 tensors that llama does not have: output_layer.weight"),
        ({"vocab_size": 1001}, r"\[1000, 32\], config.json asks for \[1001, 32\]"),
    ):
        shutil.rmtree(other)
        folder(other, **changes)
        with pytest.raises(ValueError, match=message):
            convert.megatron_to_hf(tmp_path / "m", other, tmp_path / "back")
    folder(other, "qwen3", head_dim=8)
    with pytest.raises(ValueError, match=r"lacks the tensor decoder\.layers.self_attention.q_layernorm"):
        convert.megatron_to_hf(tmp_path / "m", other, tmp_path / "back")


def test_verify_finds_a_changed_byte(tmp_path, monkeypatch):
    hf, _ = folder(tmp_path / "hf")
    publish = convert.torch_dist.finish

    def damage(directory, *arguments):
        publish(directory, *arguments)
        file = directory / "__0_0.distcp"
        first = json.loads((directory / "conversion.json").read_text())["tensors"][0]  # the embedding
        data = bytearray(file.read_bytes())
        data[first["start"] + first["nbytes"] // 2] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(convert.torch_dist, "finish", damage)
    with pytest.raises(ConversionError, match=r"tensors of .* differ from the source: embedding"):
        convert.hf_to_megatron(hf, tmp_path / "m", verify=True)
    assert not (tmp_path / "m").exists()


def test_two_conversions_into_one_folder_exclude_each_other(tmp_path):
    from megatron_ext.weights.parts import Work

    hf, _ = folder(tmp_path / "hf")
    with Work(tmp_path / "m", {}), pytest.raises(ValueError, match="another process"):
        convert.hf_to_megatron(hf, tmp_path / "m")
