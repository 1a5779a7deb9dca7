"""Compares our log-probs, entropy and gradients with the algorithms of slime, verl and NeMo-RL: same inputs, one run.

    python -m tools.bench.logprobs                  # CPU, one process and two under TP (gloo): a table per case
    python -m tools.bench.logprobs --json out.json  # and the same as JSON
    python -m tools.bench.logprobs --device cuda    # one GPU, against the time of reading and writing the logits

Every contender starts from the same numbers and must end with the same log-probs, entropy and gradients, or the run
fails. "metric": the entropy is reported; "bonus": it is differentiated. Seconds are medians over rounds in which the
contenders take turns. Memory is the most that forward and backward hold at once, the logits and all gradients included,
by torch's allocator, in units U of the logits in the contender's own number type. Peers are written from their sources
in ``logprob_peers``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import linear

from megatron_ext.logprobs import linear_log_probs_and_entropy, log_probs_and_entropy
from pipeline.ports import free_port
from tools.bench import logprob_peers as peers
from tools.peak_memory import peak_bytes

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """Sizes per rank; ``hidden`` > 0: the output projection is part of what is measured."""

    name: str
    tokens: int
    columns: int
    hidden: int = 0
    ranks: int = 1
    dtype: torch.dtype = torch.float32


CPU_CASES = (
    Case("from logits, one process, 2048 tokens x 32768", 2048, 32768),
    Case("from logits, TP 2, 2048 tokens x 19008 a rank", 2048, 19008, ranks=2),
    Case("with the projection from 512, one process, 1024 tokens x 16384", 1024, 16384, hidden=512),
    Case("with the projection from 1024, TP 2, 512 tokens x 19008 a rank", 512, 19008, hidden=1024, ranks=2),
)
CUDA_CASES = tuple(
    Case((
        f"{'with the projection from 5120' if hidden else 'from logits'}, 8192 tokens x 19008, {name}"
    ), 8192, 19008, hidden, 1, dtype)
    for hidden in (0, 5120)
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
)  # fmt: skip

# Takes the inputs' leaves (logits; or hidden states and weight), targets, group, entropy_grad.
Contender = Callable[[tuple[torch.Tensor, ...], torch.Tensor, Any, bool], tuple[torch.Tensor, ...]]


def contenders(case: Case, device: str) -> dict[str, Contender]:
    """By name; ours first."""
    vocabulary = case.columns * case.ranks

    def ours(kernel: str) -> Contender:
        def run(inputs, targets, group, entropy_grad):  # type: ignore[no-untyped-def]
            logits = inputs[0].view(-1, case.columns) if not case.hidden else linear(*inputs)
            options = {"vocab_size": vocabulary, "group": group, "entropy_grad": entropy_grad, "kernel": kernel}
            return log_probs_and_entropy(logits, targets, **options)[:2]

        return run

    def fused(inputs, targets, group, entropy_grad):  # type: ignore[no-untyped-def]
        options = {"vocab_size": vocabulary, "group": group, "entropy_grad": entropy_grad}
        return linear_log_probs_and_entropy(*inputs, targets, **options)[:2]

    def peer(function: Callable[..., Any]) -> Contender:
        def run(inputs, targets, group, entropy_grad):  # type: ignore[no-untyped-def]
            logits = linear(*inputs) if case.hidden else inputs[0].view(-1, case.columns)
            return function(logits, targets, group, entropy_grad)

        return run

    kernels = ("triton", "torch") if device == "cuda" else ("torch",)
    found: dict[str, Contender] = {"ours, fused": fused} if case.hidden else {}
    found |= {f"ours, {kernel} from logits": ours(kernel) for kernel in kernels}
    found |= {"slime": peer(peers.slime), "verl": peer(peers.verl), "NeMo-RL": peer(peers.nemo_rl)}
    if case.hidden and case.ranks == 1:
        found["verl fused"] = lambda inputs, targets, group, entropy_grad: peers.verl_fused(*inputs, targets)
    return found


class Trial:
    """One contender's forward and backward on inputs of its own."""

    def __init__(self, run: Contender, case: Case, inputs: tuple[torch.Tensor, ...], group: Any, bonus: bool) -> None:
        *self._given, self._targets, self._upstream = inputs
        self._run, self._case, self._group, self._bonus = run, case, group, bonus

    def start(self) -> None:
        """Fresh leaves: a contender may overwrite the logits it is given."""
        self._leaves = tuple(t.clone().requires_grad_(True) for t in self._given)

    def forward(self) -> None:
        """Log-probs and entropy."""
        self.results = self._run(self._leaves, self._targets, self._group, self._bonus)

    def backward(self) -> None:
        """Gradients of a loss that weighs every token differently."""
        up = self._upstream
        loss = (self.results[0] * up[0]).sum() + ((self.results[1] * up[1]).sum() if self._bonus else 0)
        self.gradients = torch.autograd.grad(loss, self._leaves)

    def finish(self) -> None:
        """Let go of everything."""
        self.results = self.gradients = self._leaves = ()  # type: ignore[assignment]


def inputs(case: Case, rank: int, device: str) -> tuple[torch.Tensor, ...]:
    """Logits, or hidden states and this rank's weight; targets; upstream slopes.

    The same on every rank but for the shard.
    """
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + rank)
    targets = torch.randint(0, case.columns * case.ranks, (case.tokens,), generator=shared)
    upstream = torch.randn(2, case.tokens, generator=shared)
    if case.hidden:
        states = torch.randn(case.tokens, case.hidden, generator=shared)
        given = (states, torch.randn(case.columns, case.hidden, generator=own) * (3 / case.hidden**0.5))
    else:
        given = (torch.randn(case.tokens, case.columns, generator=own) * 3,)
    return (*(t.to(device, case.dtype) for t in given), targets.to(device), upstream.to(device))


def measure(case: Case, rank: int, group: Any, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Every contender in both uses: median seconds, peak in U, collectives."""
    given = inputs(case, rank, device)
    unit = case.tokens * case.columns * case.dtype.itemsize
    table: dict[str, dict[str, Any]] = {}
    for bonus in (False, True):
        trials = {n: Trial(run, case, given, group, bonus) for n, run in contenders(case, device).items()}
        reference = None
        for name, trial in trials.items():
            peak, calls = _memory(trial, device)
            got = [t.detach().double().cpu() for t in (*trial.results, *trial.gradients)]
            reference = reference or got
            _same(name, got, reference, TOLERANCE[case.dtype])
            peak += 0 if case.hidden else unit  # the logits they were given
            table[f"{name}, {'bonus' if bonus else 'metric'}"] = {"peak_u": peak / unit, "collectives": calls}
            trial.finish()
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in trials}
        for _ in range(rounds):
            for name, trial in trials.items():
                seconds[name].append(_time(trial, group, device))
        for name, pairs in seconds.items():
            row = table[f"{name}, {'bonus' if bonus else 'metric'}"]
            row["forward_s"], row["backward_s"] = (statistics.median(column) for column in zip(*pairs, strict=True))
    return table


def _memory(trial: Trial, device: str) -> tuple[int, int]:
    """Peak bytes over forward and backward, and the collectives they took."""
    calls, real = [], dist.all_reduce
    dist.all_reduce = lambda tensor, **options: (calls.append(1), real(tensor, **options))  # type: ignore[assignment]
    trial.start()

    def both() -> None:
        trial.forward()
        trial.backward()

    try:
        with _quiet():
            peak, _ = peak_bytes(both, device)
    finally:
        dist.all_reduce = real
    return peak, len(calls)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's profiler announces itself on the terminal."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _same(name: str, got: list[torch.Tensor], reference: list[torch.Tensor], tolerance: float) -> None:
    for mine, other in zip(got, reference, strict=True):
        worst = ((mine - other).abs() / (1 + other.abs())).max().item()
        if not worst <= tolerance:
            raise SystemExit(f"{name} differs from ours by {worst:.1e}: not the same mathematics")


def _time(trial: Trial, group: Any, device: str) -> tuple[float, float]:
    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        if group is not None:
            dist.barrier(group)
        return time.perf_counter()

    trial.start()
    times = [clock()]
    for step in (trial.forward, trial.backward):
        step()
        times.append(clock())
    trial.finish()
    return times[1] - times[0], times[2] - times[1]


def floor(case: Case, device: str) -> dict[str, float]:
    """Seconds to read the logits once, and to read and write them once, at the bandwidth of a copy measured here."""
    source = torch.zeros(case.tokens, case.columns, dtype=case.dtype, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    copy = statistics.median(times)  # one read and one write
    return {"forward_s": copy / 2, "backward_s": copy}


def _worker(rank: int, case: Case, port: int, rounds: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=case.ranks)
    table = measure(case, rank, dist.group.WORLD, "cpu", rounds)
    if rank == 0:
        Path(out).write_text(json.dumps(table))
    dist.destroy_process_group()


def run(case: Case, device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """The table of one case."""
    if case.ranks == 1:
        return measure(case, 0, None, device, rounds)
    port = free_port()
    out = Path(f"/tmp/isentrope-logprobs-{os.getpid()}.json")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_worker, args=(case, port, rounds, str(out)), nprocs=case.ranks)
    table = json.loads(out.read_text())
    out.unlink()
    return table


def show(case: Case, table: dict[str, dict[str, Any]], lowest: dict[str, float] | None) -> None:
    """Markdown, with our best against each row of the same use."""
    print(f"\n### {case.name}\n\nU = {case.tokens * case.columns * case.dtype.itemsize / 2**20:.0f} MiB")
    if lowest:
        print(f"Floor: forward {1e3 * lowest['forward_s']:.2f} ms, backward {1e3 * lowest['backward_s']:.2f} ms.")
    print("\n| path | forward ms | backward ms | ours / it, time | peak U | ours / it, memory | collectives |")
    print("|---|---|---|---|---|---|---|")
    for name, row in table.items():
        use = name.rsplit(", ", 1)[1]
        best = next(r for n, r in table.items() if n.endswith(use))
        total, ours = (r["forward_s"] + r["backward_s"] for r in (row, best))
        print(
            f"| {name} | {1e3 * row['forward_s']:.1f} | {1e3 * row['backward_s']:.1f} | {ours / total:.2f} | "
            f"{row['peak_u']:.2f} | {best['peak_u'] / row['peak_u']:.2f} | {row['collectives']} |"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shrink", type=int, default=1, help="divide tokens and columns by this, to see that all runs")
    parser.add_argument("--json", type=Path, help="file to write the tables to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for case in CPU_CASES if arguments.device == "cpu" else CUDA_CASES:
        case = replace(case, tokens=case.tokens // arguments.shrink, columns=case.columns // arguments.shrink)
        table = run(case, arguments.device, arguments.rounds)
        lowest = floor(case, arguments.device) if arguments.device == "cuda" and not case.hidden else None
        show(case, table, lowest)
        results[case.name] = {"rows": table, "floor": lowest}
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
