"""What of tools/gpu_check.py a CPU can hold: its order, its table after every part, and the run that is killed and goes
on.
"""

import json
import subprocess
import sys

import pytest

from pipeline.data.special_tokens import eos_token_ids
from tools import gpu_check

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}


def test_the_table_is_there_when_a_later_part_is_cut_off(monkeypatch, tmp_path):
    table = tmp_path / "new" / "table.json"

    def first():
        yield gpu_check.row("first", "it", True, seconds=1.0)

    def second():
        yield from ()
        raise RuntimeError("no kernel image")

    def third():
        rows = json.loads(table.read_text())
        assert [(line["part"], line["ok"]) for line in rows] == [("first", True), ("second", False)]
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "PARTS", {"first": first, "second": second, "third": third})
    with pytest.raises(KeyboardInterrupt):
        gpu_check.examine(["third", "second", "first"], table)
    assert len(json.loads(table.read_text())) == 2


def test_what_tells_most_runs_first():
    assert list(gpu_check.PARTS)[:5] == ["environment", "resume", "weights", "packed", "colocated"]


@pytest.mark.parametrize("uneven", [False, True])
def test_rows_end_where_their_lengths_say(uneven):
    rows = gpu_check._batch(0, uneven=uneven)
    assert (rows.targets == rows.lengths - gpu_check.PROMPT).all()
    assert len(rows.tokens) == rows.lengths.sum()
    assert (rows.lengths.unique().numel() > 1) == uneven
    assert rows.lengths.max() == gpu_check.TOKENS


def test_an_engine_finds_the_end_of_a_response_in_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "MODEL", gpu_check.MODEL | SMALL | {"num_key_value_heads": 2, "vocab_size": 64})
    assert eos_token_ids(gpu_check._model(tmp_path)) == (63,)


RESUME = """
from tools import gpu_check
small = {small!r}
gpu_check.MODEL.update(small)
gpu_check.ROWS, gpu_check.TOKENS, gpu_check.PROMPT = 4, 16, 4
gpu_check.multiprocessing.get_context = lambda _: gpu_check.multiprocessing  # fork: as changed here
(line,) = gpu_check.resume()
assert line.ok, line.found
assert line.figures == {{"first": 0.0, "second": 0.0}}
"""


def test_a_run_that_is_killed_goes_on():
    """The same on a CPU, of a small model: torch's AdamW in the distributed optimizer."""
    code = RESUME.format(small=SMALL | {"num_key_value_heads": 2, "vocab_size": 64})
    # A process of its own: forked from this one, the children would wait for threads that they do not have.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


PACKED = """
import torch
import pipeline.config.schema as schema
from tools import gpu_check
gpu_check.MODEL.update({small!r})
gpu_check.ROWS, gpu_check.TOKENS, gpu_check.PROMPT = 4, 32, 4
torch.cuda.get_device_capability, torch.version.cuda = lambda *device: (9, 0), "13.0"
real = schema.PrecisionConfig
schema.PrecisionConfig = lambda **keys: real(**keys, emulate=bool(keys))
bf16, fp8 = gpu_check.packed()
assert (bf16.what, fp8.what, bf16.ok, fp8.ok) == ("bf16", "blockwise", True, True), (bf16, fp8)
assert bf16.figures["gradient norm"] != fp8.figures["gradient norm"]
"""


def test_packed_rows_in_both_formats():
    """The same on a CPU that says it is a Hopper, FP8 emulated."""
    code = PACKED.format(small=SMALL | {"num_key_value_heads": 2, "vocab_size": 64})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
