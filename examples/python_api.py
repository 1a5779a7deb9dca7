"""Isentrope from Python: ``python examples/python_api.py [KEY=VALUE ...]``."""

import sys
from pathlib import Path

from launchers import api


def main() -> None:
    """Train a few steps, look at the run, evaluate it, and write it as a Hugging Face folder."""
    run = api.train("quickstart.yaml", "runtime=inline", "learner.tensor_model_parallel_size=1", *sys.argv[1:])
    columns = api.table(run["run_dir"])  # with pandas: pandas.DataFrame(columns)
    print("entropy went from", columns["entropy/mean"][0], "to", columns["entropy/mean"][-1])
    print("kinds of events:", {event["kind"] for event in api.events(run["run_dir"])})
    print("pass@1:", api.evaluate(run["run_dir"], "evaluation.samples=16")["pass_at_k"]["1"])
    print("written:", api.to_hugging_face(run["run_dir"], Path(run["run_dir"]) / "hugging_face"))


if __name__ == "__main__":
    main()
