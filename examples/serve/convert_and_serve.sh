#!/usr/bin/env bash
# usage: convert_and_serve.sh RUN FOLDER [arguments of sglang.launch_server]
# Writes the run's newest checkpoint as a Hugging Face folder and serves it; ctrl-C ends the server. When it is up:
#   curl localhost:30000/generate -H 'Content-Type: application/json' -d '{"text": "What is 2+2?"}'
set -euo pipefail
run=$1 folder=$2
isentrope convert megatron-to-hf --checkpoint "$run" --out "$folder" --verify
exec python -m sglang.launch_server --model-path "$folder" --port 30000 "${@:3}"
