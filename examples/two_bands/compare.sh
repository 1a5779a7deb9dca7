#!/usr/bin/env bash
# The quickstart's task at two bands, and one report of both. Further overrides may follow, e.g. steps=60.
set -euo pipefail
out=${OUT:-runs/two_bands}
isentrope train --config quickstart.yaml name=low run_dir="$out/low" entropy.band.low=0.18 entropy.band.high=0.22 "$@"
isentrope train --config quickstart.yaml name=high run_dir="$out/high" entropy.band.low=0.36 entropy.band.high=0.44 "$@"
isentrope report "$out/low" "$out/high" -o "$out/report.html"
