"""`make quickstart`: the same small model trained three ways, and one report that draws them together.

GRPO alone (entropy collapses), the default controller, and the paper's second rollout at T+ (SCOPE-RL). Each is an ordinary
`isentrope train`; everything lands in runs/quickstart/.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("grpo", "isentrope", "scope")


def main() -> int:
    """Train, then report; returns the exit code of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollout", choices=("native", "sglang"), default="native", help="rollout engine (sglang: a shorter run)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quickstart")
    arguments = parser.parse_args()
    started = time.monotonic()
    command = [sys.executable, "-m", "launchers.cli.main"]
    run_dirs = [arguments.out / method for method in METHODS]
    for method, run_dir in zip(METHODS, run_dirs, strict=True):
        shutil.rmtree(run_dir, ignore_errors=True)
        configs = [f"configs/quickstart/{method}.yaml", *(["configs/quickstart/sglang.yaml"] if arguments.rollout == "sglang" else [])]
        train = [*command, "train", *(part for path in configs for part in ("--config", str(ROOT / path)))]
        code = subprocess.run([*train, f"seed={arguments.seed}", f"run_dir={run_dir}"], cwd=ROOT, check=False).returncode
        if code:
            return code
    report = [*command, "report", *map(str, run_dirs), "-o", str(arguments.out / "report.html"), "--png", str(arguments.out / "report.png")]
    code = subprocess.run([*report, "--summary", str(arguments.out / "summary.json")], cwd=ROOT, check=False).returncode
    print(f"{arguments.out}/report.html, report.png, summary.json — {time.monotonic() - started:.0f} s in all")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
