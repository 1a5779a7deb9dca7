# Learner and engines of Isentrope in one image, for clusters with NVIDIA GPUs (Hopper; driver 580 or newer).
# NOT YET BUILT NOR RUN by us: we had no GPU machine with a network. The versions are those that requirements and declared pins agree on
# (tests/unit/test_dockerfile.py compares them with what the project serves).
#
#   docker build -t isentrope .
#   enroot import -o isentrope.sqsh dockerd://isentrope        # pyxis
#   apptainer build isentrope.sif docker-daemon://isentrope:latest
#
# The code itself is not in the image: every launch ships the working tree. Started with --shm-size of at least 1 GiB, or --ipc=host.
FROM nvcr.io/nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

# ibverbs and rdmacm: without them NCCL crosses nodes by TCP, a tenth as fast, and says nothing.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        git ibverbs-providers iproute2 libibverbs1 libnuma1 librdmacm1 ninja-build procps python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

# An environment of its own: Ubuntu's packages cannot be replaced by pip's. In apptainer and pyxis PATH is the image's too.
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1

# torch first and alone: SGLang 0.5.17 pins this version, and Transformer Engine is compiled against it (hence no build isolation).
RUN pip install torch==2.11.0 --index-url https://download.pytorch.org/whl/cu130
RUN pip install setuptools==80.9.0 wheel==0.48.0 packaging==26.3 pybind11==3.0.1 \
    && pip install --no-build-isolation "transformer-engine[pytorch]==2.20.2"
RUN pip install sglang==0.5.17 httpx==0.28.1
RUN pip install megatron-core==0.19.2 ray==2.60.0 transformers==5.12.1 omegaconf==2.4.0 typer==0.29.2 rich==15.0.0 \
    matplotlib==3.11.2 math-verify==0.9.0 reasoning-gym==0.1.25 pebble==5.2.3

# Fails the build, not the first job, when versions do not fit together. torch_memory_saver: for engines on the learner's GPUs.
RUN python -c "import torch, transformer_engine.pytorch, megatron.core, sglang, ray, transformers, torch_memory_saver; print(torch.__version__)"
