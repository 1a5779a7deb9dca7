"""What each rank does in the Megatron tests; run by ``gang.Gang``."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from pipeline.config.schema import LearnerConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from pipeline.types import Actuation, TrainBatch
from tests.grids import ragged


def batch(rows: int = 10, auxiliary: int = 3, vocab: int = 37, seq: int = 12, seed: int = 0, **changes) -> TrainBatch:
    """Random rows of uneven length; the last ``auxiliary`` are auxiliary.

    Token-mean weights. ``changes``: as of ``ragged``.
    """
    g = torch.Generator().manual_seed(seed)
    prompt, lengths = 4, torch.randint(6, seq + 1, (rows,), generator=g)
    column = torch.arange(1, seq)
    mask = (column >= prompt) & (column < lengths[:, None])
    aux = torch.arange(rows) >= rows - auxiliary
    weights = torch.where(aux, 0.5 / mask[aux].sum().clamp(min=1), 1.0 / mask[~aux].sum())
    fields = {
        "tokens": torch.randint(0, vocab, (rows, seq), generator=g),
        "lengths": lengths,
        "loss_mask": mask,
        "weights": weights.float(),
        "advantages": torch.randn(rows, generator=g),
        "auxiliary": aux,
        "correct": aux | (torch.arange(rows) % 2 == 0),
        "temperatures": torch.where(aux, 1.2, 1.0),
        "behavior_log_probs": -3 * torch.rand(rows, seq - 1, generator=g) * mask,
        "actuation": Actuation("resample", 1.2, 1.0),
    }
    return ragged(**(fields | changes))


# Short names of the sizes in a layout.
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
}


def learner(
    rank, world, address, folder, tp, pp, *, total_steps=10, objective=None, dtype="fp32", cp=1, sizes=None, **config
):
    """A loaded learner. ``sizes`` are further entries of ``SIZES``; DP takes what is left of ``world``."""
    from megatron_ext import topology
    from megatron_ext.learner import MegatronLearner
    from pipeline.model.grid import grid_of

    optimizer = OptimizerConfig(**({"lr": 1e-2, "weight_decay": 0.1} | config.pop("optimizer", {})))
    named = {SIZES[name]: size for name, size in {"tp": tp, "pp": pp, "cp": cp, **(sizes or {})}.items()}
    layout = LearnerConfig(
        data_parallel_size=world // (tp * pp * cp),
        **named,
        **({"micro_batch_size": 4, "optimizer": optimizer} | config),
    )
    made = MegatronLearner(
        layout,
        ModelConfig(hf_path=str(folder), dtype=dtype),
        objective or ObjectiveConfig(),
        total_steps=total_steps,
        seed=0,
        topology=topology.initialize(rank, address, grid_of(layout), seed=0),
    )
    made.load(Path(folder))
    return made


def exported(made, bucket_bytes: int = 1 << 20) -> dict[str, torch.Tensor]:
    """The learner's weights as an engine takes them, on every rank."""
    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[next(iter(made._parameters.values())).dtype]
    return moved(made.send, made._hf_path, made._topology.grid, dtype, bucket_bytes)


def moved(send, folder, grid, dtype: str, bucket_bytes: int = 1 << 20) -> dict[str, torch.Tensor]:
    """What an engine, a thread of rank 0, ends up with when every rank calls ``send`` with an order.

    On every rank; FP8 codes, which torch cannot pickle here, on rank 0 only.
    """
    from pipeline.reshard.digest import plan_digest
    from pipeline.reshard.engine_grid import EngineGrid, Placement
    from pipeline.reshard.order import Order, PlanInputs
    from pipeline.reshard.participant import Participant
    from pipeline.reshard.places import HostPlaces

    first, placement = dist.get_rank() == 0, Placement.consecutive(grid.world_size, 1, False)
    inputs = PlanInputs(str(folder), grid, EngineGrid(), placement, bucket_bytes, dtype)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if first else None
    told = [store.port if store else 0]
    dist.broadcast_object_list(told)
    order = Order(0, 0, inputs, plan_digest(inputs.plan()), ("127.0.0.1", told[0]), 0, 60.0)
    places, taking = HostPlaces(), Participant()
    with ThreadPoolExecutor(1) as thread:
        report = thread.submit(taking.receive, order, 0, places) if first else None
        send(order)
    assert not report or not report.result().error, report.result().error
    taking.close()
    if dtype == "fp8":
        return places.tensors
    box = [places.tensors]
    dist.broadcast_object_list(box)
    return box[0]


def sender(parameters, rows, grid, fp8=False):
    """``send`` of any tensors under the layout's names."""
    from pipeline.reshard.execute import LearnerShards, QuantisedShards
    from pipeline.reshard.participant import Participant

    shards = LearnerShards(rows, grid, dist.get_rank(), parameters)

    def send(order):
        taking_part = Participant()
        taking_part.send(order, dist.get_rank(), QuantisedShards(shards) if fp8 else shards)
        taking_part.close()

    return send


def gradients(made, rows: TrainBatch) -> dict[str, torch.Tensor]:
    """Full gradients under Hugging Face names, by sending main_grad in the parameters' place."""
    share = made._share(rows, for_update=False)
    made._accumulate(share.batch, 0, share.micro_batches[0])
    if made._config.optimizer.distributed:
        _gather_gradients(made)
    # What has no gradient (the buffer of expert biases) stands for itself.
    grads = {name: getattr(p, "main_grad", p).clone() for name, p in made._parameters.items()}
    return moved(sender(grads, made._rows, made._topology.grid), made._hf_path, made._topology.grid, "fp32")


def _gather_gradients(made):
    """The distributed optimizer leaves each rank only its part of the reduced gradient."""
    import torch.distributed as dist

    for model in made._models:
        for group in model.bucket_groups + model.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                parts = bucket.grad_data.chunk(ranks.size())
                dist.all_gather(list(parts), parts[ranks.rank()].clone(), group=ranks)


def megatron_chunks(rank, world, address, cases):
    """Where megatron-core puts the layers, ``[case][stage][chunk]``; cases are pairs of layers and grid."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    def span(config, stage, chunk):
        start = get_transformer_layer_offset(config, chunk, stage)
        return range(start, start + get_num_layers_to_build(config, chunk, stage))

    found = []
    for layers, grid in cases:
        config = SimpleNamespace(
            num_layers=layers,
            pipeline_model_parallel_size=grid.pp,
            virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
            num_layers_in_first_pipeline_stage=grid.first_stage_layers,
            num_layers_in_last_pipeline_stage=grid.last_stage_layers,
            pipeline_model_parallel_layout=None,
            account_for_embedding_in_pipeline_split=False,
            account_for_loss_in_pipeline_split=False,
        )
        found.append(tuple(tuple(span(config, stage, chunk) for chunk in range(grid.vpp)) for stage in range(grid.pp)))
    return found


def learning_rates(rank, world, address, folder, optimizer, total_steps):
    made = learner(rank, world, address, folder, 1, 1, total_steps=total_steps, optimizer=optimizer)
    rates = [made.update(batch(4, 1), step).learning_rate for step in range(total_steps)]
    made.close()
    return rates


def messages(rank, world, address, folder):
    """What a learner says to calls it must refuse, and whether a refused update left the weights alone."""
    made = learner(rank, world, address, folder, 1, 1, updates_per_step=2)
    before = exported(made)
    calls = {
        "reference": lambda: made.log_probs(batch(), reference=True),
        "old_log_probs": lambda: made.update(batch(), 0),
        "mini_batches": lambda: made.update(batch(3, 2, old_log_probs=torch.zeros(3, 11)), 0),
        "nan": lambda: made.update(
            batch(advantages=torch.full((10,), torch.nan), old_log_probs=torch.zeros(10, 11)), 5
        ),
        "huge": lambda: made.update(batch(advantages=torch.full((10,), 1e30), old_log_probs=-torch.ones(10, 11)), 6),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, FloatingPointError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    after = exported(made)
    made.close()
    return said, all(torch.equal(before[name], after[name]) for name in before)


def reference_policy(rank, world, address, folder):
    """Log-probs of policy and reference before and after an update, on PP2."""
    made = learner(rank, world, address, folder, 1, world, objective=ObjectiveConfig(kl_coef=0.1))
    rows = batch()
    out = [made.log_probs(rows), made.log_probs(rows, reference=True)]
    made.update(batch(reference_log_probs=out[1]), 0)
    out += [made.log_probs(rows), made.log_probs(rows, reference=True)]
    made.close()
    return out


def restore_elsewhere(rank, world, address, folder, directory):
    """Save on TP ``world``, restore on PP ``world``: the message of the refusal."""
    files = learner(rank, world, address, folder, world, 1).save(Path(directory))()
    from megatron_ext import topology

    topology.shutdown()
    made = learner(rank, world, (address[0], address[1] + 1), folder, 1, world)
    return refusal_to_restore(made, directory, files)


def refusal_to_restore(made, directory, files):
    """What a learner says to a checkpoint that it cannot restore; the learner is closed."""
    try:
        made.restore(Path(directory), files)
    except ValueError as error:
        return str(error)
    finally:
        made.close()


def train(rank, world, address, folder, tp, pp, steps, batches, config):
    """Full gradients of the first batch, statistics of every step, final weights."""
    made = learner(rank, world, address, folder, tp, pp, **config)
    result = _trained(made, steps, batches)
    made.close()
    return result


def train_and_ask(rank, world, address, folder, tp, pp, steps, batches, config):
    """As ``train``, and the log-probs of the first batch: before, after, and the reference's after."""
    made = learner(rank, world, address, folder, tp, pp, **config)
    before = made.log_probs(batches[0])
    result = _trained(made, steps, batches)
    after = made.log_probs(batches[0]), made.log_probs(batches[0], reference=True)
    made.close()
    return *result, (before, *after)


def _trained(made, steps, batches):
    grads = gradients(made, batches[0])
    stats = [_whatever_the_cut(made.update(batches[step % len(batches)], step)) for step in range(steps)]
    return grads, stats, exported(made)


def saved_for_backward(rank, world, address, folder, configs, tokens):
    """Bytes that one forward pass keeps for the backward pass, per configuration, parameters apart."""
    from torch.autograd.graph import saved_tensors_hooks

    found = []
    first = learner(rank, world, address, folder, 1, 1)
    for config in configs:
        made = _other_topology(first, folder, 1, 1, {}, replace(first._config, **config))
        own = {p.untyped_storage().data_ptr() for p in made._chunks[0].parameters()}
        kept = {}

        def note(tensor, own=own, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (tensor, storage.nbytes())  # the tensor, so that no other takes its place
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            made._models[0](tokens, None, None)
        found.append(sum(size for _, size in kept.values()))
    first.close()
    return found


def _whatever_the_cut(stats):
    """Without the metrics that speak of how the rows were cut."""
    metrics = dict(stats.metrics)
    assert metrics.pop("tokens_per_micro_batch") > 0
    assert 0 <= metrics.pop("padding_fraction") < 1
    return replace(stats, metrics=metrics)


def inspect(rank, world, address, folder, layout, tokens, candidates):
    """log p(candidate | prefix) at every position, and the weights as an engine takes them, in one and many buckets."""
    made = learner(rank, world, address, folder, **layout, micro_batch_size=512)
    table = _log_probs_of(made, tokens, torch.tensor(candidates))
    whole, many = exported(made), exported(made, SMALL_BUCKET)
    made.close()
    return table, whole, many


def inspect_new_family(*arguments):
    """As ``inspect``, where the project also knows the family of ``new_family``."""
    import new_family

    with new_family.registered():
        return inspect(*arguments)


def load_and_export(rank, world, address, folder, grid, dtype="fp32", fp8=False):
    """Global layers of each model chunk of this rank, and the weights of all chunks, on a grid of any shape."""
    from megatron_ext import models, topology
    from megatron_ext.weights import hf
    from pipeline.model import architecture, layout

    placed = topology.initialize(rank, address, grid, seed=0)
    model = architecture.read(folder)
    rows = layout.rows(model, grid)
    chunks = models.build_chunks(model, placed, dtype)
    parameters = {name: tensor for gpt in chunks for name, tensor in models.global_parameters(gpt).items()}
    hf.load(parameters, rows, model, folder, placed)
    parameters = {name: tensor.detach() for name, tensor in parameters.items()}
    whole = moved(sender(parameters, rows, grid, fp8), folder, grid, "fp8" if fp8 else dtype, SMALL_BUCKET)
    topology.shutdown()
    return [[layer.layer_number - 1 for layer in gpt.decoder.layers] for gpt in chunks], whole


def parameters_after_updates(rank, world, address, folder, tp, optimizer):
    """This rank's parameters after two updates."""
    made = learner(rank, world, address, folder, tp, 1, optimizer=optimizer)
    for step in range(2):
        made.update(batch(seed=step), step)
    found = {name: parameter.data.clone() for name, parameter in made._parameters.items()}
    made.close()
    return found


SMALL_BUCKET = 20_000  # bytes: a few tensors of the tiny models, less than the largest


def _log_probs_of(made, tokens, candidates):
    """log p(candidate | tokens[:, :t]) for every t, ``[rows, seq - 1, candidates]``: of a batch whose rows end in one
    each.
    """
    rows, seq = tokens.shape
    count = len(candidates)
    # Of each prompt, row t has its t-th token replaced, for every candidate.
    variants = tokens[:, None, None].repeat(1, seq, count, 1).flatten(0, 2)
    position = torch.arange(seq).repeat_interleave(count).repeat(rows)
    variants[torch.arange(rows * seq * count), position] = candidates.repeat(rows * seq)
    keep = position > 0
    mask = (torch.arange(1, seq) == position[:, None])[keep]
    filled = {"tokens": variants[keep], "loss_mask": mask, "lengths": position[keep] + 1}
    drawn = {"behavior_log_probs": torch.zeros(mask.shape)}
    return made.log_probs(batch(int(keep.sum()), 0, vocab=2, seq=seq, **filled, **drawn)).view(rows, seq - 1, count)


def save_and_continue(rank, world, address, folder, directory, tp, pp, batches, config):
    """Two steps, save, two more; then a fresh learner restored from the save does the last two again."""
    first = learner(rank, world, address, folder, tp, pp, **config)
    for step in range(2):
        first.update(batches[step], step)
    write = first.save(Path(directory))
    expected = [first.update(batches[step], step) for step in (2, 3)]
    weights = exported(first)
    reference = first.log_probs(batches[0], reference=True) if config.get("objective") else None
    other = _other_topology(first, folder, tp, pp, config)
    other.restore(Path(directory), everyones(write()))
    repeated = [other.update(batches[step], step) for step in (2, 3)]
    again = other.log_probs(batches[0], reference=True) if config.get("objective") else None
    result = (expected, repeated, weights, exported(other), reference, again)
    first.close()
    return result


def restore_damaged(rank, world, address, folder, directory, name, change):
    """Save, damage a file (``change``: flip, truncate or remove), restore.

    What is said, whether the weights were left alone, and the fingerprints of this rank's files.
    """
    made = learner(rank, world, address, folder, 1, 1, optimizer={"distributed": True})
    made.update(batch(), 0)
    own = made.save(Path(directory))()
    files = everyones(own)
    made.update(batch(seed=1), 1)
    before = exported(made)
    if rank == 0:
        path = Path(directory) / name
        data = bytearray(path.read_bytes())
        data[9] ^= change == "flip"
        path.unlink() if change == "remove" else path.write_bytes(data[:-1] if change == "truncate" else data)
    dist.barrier()
    try:
        made.restore(Path(directory), files)
    except ValueError as error:
        said = str(error)
    after = exported(made)
    made.close()
    return said, all(torch.equal(before[key], after[key]) for key in before), own


def everyones(files):
    """The fingerprints of all ranks' files, as the driver joins them."""
    theirs = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, files)
    return {name: found for one in theirs for name, found in one.items()}


def with_fused_adam(rank, world, address, function, *arguments):
    """``function`` where megatron-core has Transformer Engine's optimizer (its stand-in)."""
    import fused_adam

    import megatron_ext  # noqa: F401 (makes megatron-core import on a CPU)

    with fused_adam.installed():
        return function(rank, world, address, *arguments)


def poisoned_gradient(rank, world, address, folder, tp, pp, config):
    """A NaN in one gradient of the last rank alone: what each rank says, and the learner beside one that was spared."""
    made = learner(rank, world, address, folder, tp, pp, **config)
    accumulate = made._accumulate

    def poisoned(*rows):
        sums = accumulate(*rows)
        if rank == world - 1:
            next(iter(made._parameters.values())).main_grad.fill_(torch.nan)
        return sums

    made._accumulate = poisoned
    try:
        made.update(batch(), 3)
    except FloatingPointError as error:
        said = str(error)
    del made._accumulate
    spared = _other_topology(made, folder, tp, pp, config)
    spared.load(Path(folder))
    pair = [_after_update(each, 4) for each in (made, spared)]
    made.close()
    return said, pair


def _after_update(made, step):
    made.update(batch(seed=step), step)
    return exported(made)


def restore_with(rank, world, address, folder, directory, optimizers, steps, config):
    """``steps`` updates and a save under the first of ``optimizers``; then, restored under each of them, one more.

    Weights at the save, and per optimizer the statistics and the weights after.
    """
    first = learner(rank, world, address, folder, 1, 1, **config, optimizer=optimizers[0])
    for step in range(steps):
        first.update(batch(seed=step), step)
    files = everyones(first.save(Path(directory))())
    results = []
    for optimizer in optimizers:
        changed = replace(first._config, optimizer=OptimizerConfig(**optimizer))
        other = _other_topology(first, folder, 1, 1, config, changed)
        other.restore(Path(directory), files)
        results.append((other.update(batch(seed=steps), steps), exported(other)))
    weights = exported(first)
    first.close()
    return weights, results


def first_update(rank, world, address, folder, optimizer, config):
    made = learner(rank, world, address, folder, 1, 1, **config, optimizer=optimizer)
    result = (made.update(batch(), 0), exported(made))
    made.close()
    return result


def _other_topology(first, folder, tp, pp, config, changed=None):
    """Another learner in the same process groups, with other weights and RNG state until it restores."""
    from megatron_ext.learner import MegatronLearner

    made = MegatronLearner(
        changed or first._config,
        ModelConfig(hf_path=str(folder), dtype=config.get("dtype", "fp32")),
        first._objective,
        total_steps=10,
        seed=1,
        topology=first._topology,
    )
    for parameter in made._parameters.values():
        parameter.data.normal_()
    return made
