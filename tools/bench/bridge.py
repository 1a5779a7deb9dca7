"""Runs megatron-bridge on a CPU and shows what it makes of a Hugging Face folder.

Run it with the interpreter of `make bridge-env`.

    .venv-bridge/bin/python tools/bench/bridge.py tensors --tp 2 OUT FOLDER...  # the parameters it gives each rank
    .venv-bridge/bin/python tools/bench/bridge.py convert FOLDER                # checkpoints, as standard input asks

megatron-bridge 0.6.2 wants Python 3.12, CUDA and Transformer Engine, none of which its conversion uses; ``prepare``
stands in for them. Kept apart from everything else: the environment has its own megatron-core.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
import types
import typing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typing_extensions
from safetensors.torch import save_file

from megatron_ext import cpu
from pipeline.ports import free_port

# Packages that its modules import at their top. Conversion asks of them only whether a model is quantised.
ABSENT = ("transformer_engine", "modelopt", "megatron.energon", "tensorboard")


class _Anything(type):
    """A class that stands in for any other: it can be named in annotations, used as a base and called.

    Its attributes are such classes; a call gives None.
    """

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (torch.nn.Module,), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> None:
        """E.g. ``is_quantized(model)``, which is then false."""


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages of ``ABSENT``, which can then be imported, not used."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        ours = any(name == absent or name.startswith(absent + ".") for absent in ABSENT)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__version__ = "2.10.0"  # type: ignore[attr-defined]
        module.__getattr__ = lambda name: getattr(_Anything("root", (), {}), name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def prepare() -> None:
    """Everything that must be in place before ``import megatron.bridge``."""
    logging.disable(logging.INFO)
    typing.override = typing_extensions.override  # type: ignore[attr-defined]  # Python 3.12's
    cpu.install()
    cpu.install_layers()
    # megatron-core comes first: it must see that there is no Transformer Engine, and choose its own layers.
    import megatron.core.extensions.transformer_engine  # noqa: F401

    sys.meta_path.append(_Absent())
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.gpt_provider import local_layer_spec

    provider_of = AutoBridge.to_megatron_provider

    def to_megatron_provider(self: Any, *args: Any, **kwargs: Any) -> Any:
        provider = provider_of(self, *args, **kwargs)
        provider.transformer_layer_spec = local_layer_spec
        for name in (field for field in vars(provider) if field.endswith("_fusion")):
            setattr(provider, name, False)
        provider.persist_layer_norm = False
        provider.use_cpu_initialization = True
        return provider

    AutoBridge.to_megatron_provider = to_megatron_provider


def tensors(rank: int, tp: int, port: int, out: Path, folders: list[Path]) -> None:
    """Write what megatron-bridge loads into rank ``rank`` of ``tp``, in float32.

    One file ``<folder's name>-<rank>.safetensors`` each.
    """
    prepare()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=tp)
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    for folder in folders:
        provider = AutoBridge.from_hf_pretrained(folder, torch_dtype=torch.float32).to_megatron_provider()
        provider.tensor_model_parallel_size = tp
        provider.should_pad_vocab, provider.make_vocab_size_divisible_by = True, 1
        provider.finalize()
        (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        parameters = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
        save_file(parameters, out / f"{folder.name}-{rank}.safetensors")
    dist.destroy_process_group()


def convert(folder: Path) -> None:
    """Convert ``folder`` as asked on standard input; one ``done`` on standard output for each line.

    ``["there", OUT]`` writes a Megatron checkpoint, ``["back", CHECKPOINT, OUT]`` a Hugging Face folder: the calls of
    its ``import_ckpt`` and ``export_ckpt`` without those for tokenizers; then the files are flushed to the disk.
    """
    prepare()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    for line in sys.stdin:
        task, *paths = json.loads(line)
        bridge = AutoBridge.from_hf_pretrained(folder)
        if task == "there":
            model = bridge.to_megatron_model(wrap_with_ddp=False, use_cpu_initialization=True)
            bridge.save_megatron_model(model, paths[0], low_memory_save=True)
        else:
            model = bridge.load_megatron_model(paths[0], wrap_with_ddp=False)
            bridge.save_hf_weights(model, paths[1], show_progress=False)
        for file in Path(paths[-1]).rglob("*"):
            _flush(file)
        del model
        print("\ndone", flush=True)
    dist.destroy_process_group()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    """Do what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("tensors")
    command.add_argument("--tp", type=int, default=1)
    command.add_argument("out", type=Path)
    command.add_argument("folders", type=Path, nargs="+")
    command = commands.add_parser("convert")
    command.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "tensors":
        job = (arguments.tp, free_port(), arguments.out, arguments.folders)
        torch.multiprocessing.spawn(tensors, job, nprocs=arguments.tp)
    else:
        convert(arguments.folder)


if __name__ == "__main__":
    main()
