# Learner and engines of Isentrope in one image, for clusters with NVIDIA GPUs (Hopper; driver 580 or newer).
# NOT YET BUILT NOR RUN by us: we had no GPU machine with a network. The versions are those that requirements and declared pins agree on.
#
#   docker build -t isentrope .
#   enroot import -o isentrope.sqsh dockerd://isentrope        # pyxis
#   apptainer build isentrope.sif docker-daemon://isentrope:latest
#
# The code itself is not in the image: every launch ships the working tree.
FROM nvcr.io/nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends git iproute2 libnuma1 ninja-build python3-dev python3-pip rsync \
    && ln -s /usr/bin/python3 /usr/local/bin/python \
    && rm -rf /var/lib/apt/lists/*

# torch first and alone: SGLang 0.5.17 pins this version, and Transformer Engine is compiled against it.
RUN pip install torch==2.11.0 --index-url https://download.pytorch.org/whl/cu130
RUN pip install --no-build-isolation "transformer-engine[pytorch]==2.20.2"
RUN pip install sglang==0.5.17 requests
RUN pip install megatron-core==0.19.2 ray==2.60.0 "omegaconf>=2.3" transformers==5.12.1 "typer>=0.15" "rich>=13" \
    "matplotlib>=3.9" "math-verify>=0.8" "reasoning-gym>=0.1" "pebble>=5.1"

# Fails the build, not the first job, when versions do not fit together.
RUN python -c "import torch, transformer_engine.pytorch, megatron.core, sglang, ray, transformers; print(torch.__version__)"
