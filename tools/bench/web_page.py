"""Measures the web page on a long run: time until it is painted and drawn, memory of browser and server.

    python tools/bench/web_page.py --steps 100000

Needs chromium and requirements/browser.txt. Writes a run of that length first, then serves it. Prints
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.config.load import load_config
from pipeline.monitoring.events import FILE_NAME, EventLog
from pipeline.monitoring.recorder import Recorder

ROOT = Path(__file__).resolve().parents[2]
LANES = {"learner": [(2.3, 5.5)], "sync": [(5.5, 5.9)], "engine 0": [(0.0, 2.2)], "engine 1": [(0.0, 1.9)]}
PHASES = {"sample": 2.1, "verify": 0.1, "batch": 0.1, "train": 3.2, "sync": 0.4, "other": 0.1}
EVALUATE_EVERY = 500


def write_long_run(run_dir: Path, steps: int) -> None:
    """A run whose entropy falls into its band and wanders there; every event as the recorder would write it."""
    config = load_config(Path("recipe/pm4.yaml"), [f"steps={steps}", "monitoring.progress=false"])
    with Recorder(run_dir, config) as recorder:
        recorder.start(0)
        recorder._end("stopped", "")
    noise = np.random.default_rng(0).standard_normal(steps)
    smooth = entropy = 0.55
    with EventLog(run_dir / FILE_NAME) as log:
        for step, deviation in enumerate(noise.tolist()):
            level = 0.3 + 0.25 * math.exp(-step / 400) + 0.02 * math.sin(step / 900)
            entropy = level + 0.02 * deviation
            smooth = 0.8 * smooth + 0.2 * entropy
            log.append("step", _step(step, entropy, smooth))
            if step % EVALUATE_EVERY == 0:
                log.append("evaluation", {"time": float(step), "step": step, "pass_at_k": _estimates(step)})


def _step(step: int, entropy: float, smooth: float) -> dict[str, Any]:
    saturated = step % 20_000 > 19_000
    temperature = 1.2 if saturated else 1 + 0.5 * (0.3 - smooth)
    return {
        "time": 1.7e9 + 6.0 * (step + 1),
        "began": 1.7e9 + 6.0 * step,
        "timeline": LANES,
        "idle": {"engines": 0.65, "learner": 0.4},
        "step": step,
        "entropy": entropy,
        "entropy_sum": 2000 * entropy,
        "entropy_count": 2000.0,
        "entropy_filtered": smooth,
        "band_low": 0.27,
        "band_high": 0.33,
        "target": 0.2985,
        "temperature": temperature,
        "command": temperature,
        "actuator": "reweight",
        "state": "saturated" if saturated else "tracking",
        "reason": "held at H=0.34" if saturated else f"H={smooth:.3f} in band",
        "reward": 0.6 - 0.4 * entropy,
        "positives": 120,
        "all_equal_groups": 0.1,
        "response_length": 800 + 100 * entropy,
        "truncated": 0.01,
        "stale_samples": 0,
        "verifier_errors": 0,
        "loss": -0.1,
        "grad_norm": 1 + entropy,
        "learning_rate": 1e-6,
        "weight_version": step,
        "metrics": {
            "mismatch_mean": 1e-3,
            "mismatch_p99": 2e-2,
            "mismatch_kl": 2e-4,
            "entropy_change_positive": 1e-4 * entropy,
        },
        "seconds": {**PHASES, "total": sum(PHASES.values())},
        "tokens": {"main": 204_800, "auxiliary": 0},
        "sync": {"bytes": 1.5e10, "buckets": 40},
        "memory": {"driver": 3.0, "learner": 40.0, "gpu": 70.0},
        "engines": {"alive": 8, "total": 8},
    }


def _estimates(step: int) -> dict[str, dict[str, float]]:
    value = 0.6 - 0.3 * math.exp(-step / 5000)
    return {str(k): {"value": v, "low": v - 0.02, "high": v + 0.02} for k, v in ((1, value), (16, value + 0.35))}


@contextmanager
def served(run_dir: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """``isentrope monitor --web`` in a process of its own: its address; how long it took to answer, its memory."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "launchers.cli.main", "monitor", str(run_dir), "--web", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]
        figures = {"ready_s": round(time.perf_counter() - started, 2)}
        yield url, figures
        figures["server_mb"] = private_mb(server.pid)
    finally:
        server.terminate()
        server.wait()


def private_mb(pid: int) -> float:
    """Memory of a process that is its own, not that of libraries: resident anonymous pages, MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000, 1)


def visit(url: str, chromium: str) -> dict[str, float]:
    """Open the page as a new visitor.

    Returns milliseconds to the first paint and to all charts, MB of its heap and of its process.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(url)
        page.wait_for_selector("#sample p, #sample pre")  # the samples come after the charts
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        drawn = page.evaluate("performance.getEntriesByName('charts drawn')[0].startTime")
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")
        heap = {entry["name"]: entry["value"] for entry in session.send("Performance.getMetrics")["metrics"]}
        processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        renderers = [private_mb(process["id"]) for process in processes if process["type"] == "renderer"]
        browser.close()
    return {
        "first_paint_ms": round(paint),
        "charts_ms": round(drawn),
        "heap_mb": round(heap["JSHeapUsedSize"] / 1e6, 1),
        "renderer_mb": max(renderers),
    }


def main() -> None:
    """Write, serve, visit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium", help="the browser's program")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        write_long_run(run_dir, arguments.steps)
        result: dict[str, Any] = {"steps": arguments.steps, "log_mb": round((run_dir / FILE_NAME).stat().st_size / 1e6)}
        with served(run_dir) as (url, figures):
            figures |= visit(url, arguments.chromium)
        result |= figures
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
