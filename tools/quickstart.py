"""`make quickstart`: trains the same small model in three ways and draws one report of all three.

GRPO alone (entropy collapses), the default controller, and SCOPE-RL's law with its second rollout at T+. Each is an
ordinary `isentrope train`; everything lands in runs/quickstart/, replacing what an earlier quickstart left there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from pipeline.config.load import override
from pipeline.monitoring.report import build_report

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"grpo": "recipe/pm4_grpo.yaml", "pi": "quickstart.yaml", "scope": "recipe/pm4_scope.yaml"}
# A server step takes several times as long on a CPU, so the SGLang quickstart is shorter.
SGLANG = ["rollout.engine=sglang", "rollout.sglang.dtype=float32", "rollout.sglang.max_total_tokens=16384"]
SGLANG += ["steps=40", "evaluation.every=0", "evaluation.prompts=64"]
SHOWN = ("method", "final_entropy", "time_in_band", "rms_error", "pass_at_1", "pass_at_16", "distinct_correct")


def main() -> int:
    """Train, then report; returns the exit code of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rollout", choices=("native", "sglang"), default="native", help="rollout engine (sglang: 40 steps)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart")
    arguments = parser.parse_args()
    started = time.monotonic()
    isentrope = [sys.executable, "-m", "launchers.cli.main"]
    overrides = [f"seed={arguments.seed}", *(SGLANG if arguments.rollout == "sglang" else [])]
    for method, config in CONFIGS.items():
        run_dir = arguments.out / method
        shutil.rmtree(run_dir, ignore_errors=True)
        command = [*isentrope, "train", "--config", config, override("run_dir", run_dir), *overrides]
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            return code
    runs = [arguments.out / method for method in CONFIGS]
    result = build_report(runs, arguments.out / "report.html", arguments.out / "report.png")
    (arguments.out / "summary.json").write_text(json.dumps(result, indent=1))
    print("".join(f"{name:>17}" for name in SHOWN))
    for run in result["runs"]:
        print(
            "".join(f"{run[name]:>17.3f}" if isinstance(run[name], float) else f"{run[name]!s:>17}" for name in SHOWN)
        )
    print(*result["cost"], sep="\n")
    print(f"{arguments.out}: report.html, report.png, summary.json ({time.monotonic() - started:.0f} s in all)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
