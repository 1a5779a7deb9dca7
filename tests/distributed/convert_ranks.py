"""What each rank does in the tests of conversion with real Megatron models; run by ``gang.Gang``."""

import pickle
from pathlib import Path

import megatron_ranks as ranks
import torch

from megatron_ext import models, snapshot, topology
from megatron_ext.weights import convert, hf
from pipeline.model import architecture, layout
from pipeline.model.grid import Grid


def _model(rank, world, address, folder, tp=1, pp=1, ep=1, etp=None):
    model = architecture.read(Path(folder))
    place = topology.initialize(rank, address, Grid(tp=tp, pp=pp, dp=world // (tp * pp), ep=ep, etp=etp), seed=0)
    return model, place, models.build(model, place)


def stored_as_megatron_does(rank, world, address, folder, directory):
    """Names, sizes and boxes in a real model's checkpoint that a converted one lacks or has otherwise."""
    from megatron.core import dist_checkpointing

    _, place, gpt = _model(rank, world, address, folder)
    real, converted = Path(directory) / "real", Path(directory) / "converted"
    real.mkdir()
    saved = dist_checkpointing.save(
        gpt.sharded_state_dict(), str(real), snapshot.saving(place), async_sharded_save=True
    )
    saved.async_fn()
    topology.shutdown()
    convert.hf_to_megatron(Path(folder), converted)
    theirs, ours = (_described(path) for path in (real, converted))
    return {key: (value, ours.get(key)) for key, value in theirs.items() if ours.get(key) != value}


def _described(path):
    entries = pickle.loads((path / ".metadata").read_bytes()).state_dict_metadata
    return {
        key: (
            tuple(entry.size),
            entry.properties.dtype,
            sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks),
        )
        if hasattr(entry, "size")
        else None
        for key, entry in entries.items()
    }


def load_elsewhere(rank, world, address, folder, converted, tp, pp, ep, etp):
    """Parameters of this rank in which a model loaded from the checkpoint differs from one loaded from the folder."""
    from megatron.core import dist_checkpointing

    model, place, gpt = _model(rank, world, address, folder, tp, pp, ep, etp)
    parameters = models.global_parameters(gpt)
    with torch.no_grad():
        hf.load(parameters, layout.rows(model, place.grid), model, Path(folder), place)
        expected = {name: parameter.clone() for name, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.fill_(torch.nan)
        state = dist_checkpointing.load(gpt.sharded_state_dict(), str(converted))
        gpt.load_state_dict(state, strict=False)
    topology.shutdown()
    assert len(expected) > 10
    return [name for name in expected if not torch.equal(expected[name], parameters[name])]


def verified(rank, world, address, folder, directory, dtype):
    """What --verify says of both directions."""
    grid, folder, directory = Grid(tp=2, pp=2), Path(folder), Path(directory)
    there = convert.hf_to_megatron(folder, directory / "m", grid, dtype, verify=True)
    back = convert.megatron_to_hf(directory / "m", folder, directory / "back", verify=True)
    return there.verified, back.verified


def save_after_an_update(rank, world, address, folder, directory, tp, pp, config):
    """A trained learner's export, and its checkpoint on disk."""
    made = ranks.learner(rank, world, address, folder, tp, pp, **config)
    made.update(ranks.batch(), 0)
    made.save(Path(directory))()
    weights = ranks.exported(made)
    made.close()
    return weights


def refusal_to_restore(rank, world, address, folder, directory):
    """What a learner says to a checkpoint of another model."""
    return ranks.refusal_to_restore(ranks.learner(rank, world, address, folder, 1, 1), directory, {})
