"""Learner ranks and rollout engines as Ray actors, behind the same protocols as their in-process forms.

Weights pass neither through the driver nor through Ray: the learner's ranks send them to the engines' processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
import torch
import torch.distributed as dist

from launchers import environment
from launchers.run.ray_cluster import most_on_one_node, use_interface_of
from launchers.supervise.roll_call import ROLL_CALL, Whereabouts, whereabouts
from pipeline.batching.dealing import Dealer
from pipeline.fingerprints import Files
from pipeline.learner import Learner
from pipeline.monitoring.memory import resident_gib
from pipeline.reshard.order import Order
from pipeline.rollout.engine import EngineError, EngineTimeoutError, Finished, RolloutEngine, WeightUpdateError
from pipeline.types import EngineHealth, GenerateRequest, Place, Share, StepStats, TrainBatch, joined
from pipeline.units import GIB

LOCALHOST = "127.0.0.1"
DRAWS = 20  # at once on one engine: one for each step that rollout.staleness allows to be under way
HEALTH_TIMEOUT_S = 30.0  # an engine's own health check takes at most 10
CLOSE_TIMEOUT_S = 60.0
SENT_BYTES = 64 << 10  # what is smaller goes with the call: through shared memory it takes 3 ms longer
GRACE_S = 10.0  # what an engine gets above its own deadline, so that its own words arrive

# rank, address at which the ranks meet -> the learner of that rank
BuildRank = Callable[[int, tuple[str, int]], Learner]


def answer(replies: Any, who: str, timeout_s: float | None = None) -> Any:
    """``ray.get``, raising the remote exception itself (not a report of it).

    ``EngineError`` when a process died, ``EngineTimeoutError`` when it does not answer within ``timeout_s``.
    """
    try:
        return ray.get(replies, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise EngineTimeoutError(f"{who}: its process did not answer within {timeout_s:g} s") from error
    except ray.exceptions.RayTaskError as error:
        death = _death(replies)
        raise _died(who, death) if death else error.cause from error
    except ray.exceptions.RayActorError as error:
        raise _died(who, error) from error


def _died(who: str, error: ray.exceptions.RayActorError) -> EngineError:
    return EngineError(f"{who}: its process died; its last words are in Ray's log ({str(error).splitlines()[0]})")


def _death(replies: Any) -> ray.exceptions.RayActorError | None:
    """The death of one of several processes: all that the others can say of it is that their connection broke."""
    ready, _ = ray.wait(replies, num_returns=len(replies), timeout=GRACE_S) if isinstance(replies, list) else ([], [])
    for reply in ready:
        try:
            ray.get(reply)
        except ray.exceptions.RayActorError as error:
            return error
        except ray.exceptions.RayTaskError:
            continue
    return None


@ray.remote(concurrency_groups={"checkpoint": 1})  # type: ignore[call-overload]  # missing in Ray's types
class LearnerRank:
    """One process of the Megatron learner, which is given its share of every batch.

    ``checkpoint`` writes while the rank trains.
    """

    def whereabouts(self) -> Whereabouts:
        """See ``launchers.supervise.roll_call``."""
        return whereabouts()

    def build(self, build: BuildRank, rank: int, address: tuple[str, int], threads: int) -> None:
        """Make the learner of this rank and join the other ranks.

        Not in ``__init__``, where Ray would hide what went wrong.
        """
        torch.set_num_threads(threads)
        if address[0] != LOCALHOST:
            use_interface_of(ray.util.get_node_ip_address())
        self.rank = rank
        self.learner: Any = build(rank, address)  # one rank of several has more than ``Learner`` says

    def host(self) -> str:
        """IPv4 address of this rank's node."""
        return ray.util.get_node_ip_address()

    def rendezvous(self, host: str) -> int:
        """The port at which the ranks meet on ``host``, the node of rank 0.

        This process listens already, so nobody else can.
        """
        # multi_tenant: init_process_group finds this process's server at the port, instead of starting one.
        self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        return self.store.port

    def gpu(self) -> str:
        """What CUDA_VISIBLE_DEVICES calls this rank's GPU; "" without one."""
        return ",".join(map(str, ray.get_runtime_context().get_accelerator_ids()["GPU"]))

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Run one method of the learner on this rank. Rank 0 alone answers: all would send the driver the same."""
        answer = getattr(self.learner, method)(*args, **kwargs)
        return answer if self.rank == 0 else None

    def update(self, share: Share, step: int) -> StepStats:
        """``Learner.update``, with this rank's memory."""
        stats = self.learner.update(share, step)
        memory = {"learner": resident_gib()}
        if torch.cuda.is_available():
            memory["gpu"] = torch.cuda.max_memory_allocated() / GIB
        return replace(stats, memory=memory)

    def measure(self, method: str, share: Share, **kwargs: Any) -> Any:
        """``log_probs`` or ``statistics`` of this rank's share; one rank answers for each share."""
        answer = getattr(self.learner, method)(share, **kwargs)
        return answer if self.learner.speaks else None

    def dealing(self) -> tuple[Dealer, int, bool]:
        """How the learner deals a batch, which share is this rank's, and whether this rank answers for it."""
        return self.learner.dealer, self.learner.data_parallel_rank, self.learner.speaks

    def save(self, directory: Path) -> None:
        """First half of ``Learner.save``: copy this rank's state."""
        self.write = self.learner.save(directory)

    @ray.method(concurrency_group="checkpoint")
    def write_saved(self) -> Files:
        """Second half of ``Learner.save``: write the copy and drop it; the fingerprints of this rank's files."""
        write = self.write
        del self.write
        return write()


class RayLearner:
    """``Learner`` over one actor per rank; every rank makes every call.

    Rank 0 answers; of what is measured of rows, one rank for each share.
    """

    def __init__(self, build: BuildRank, ranks: Sequence[Any]) -> None:
        """``build`` runs in the process of each of ``ranks`` (actors of ``LearnerRank``).

        Only there is megatron-core loaded.
        """
        self.ranks = list(ranks)
        for i, rank in enumerate(self.ranks):
            ROLL_CALL.add(f"learner-{i}", rank)
        hosts = self._answer([rank.host.remote() for rank in self.ranks])
        self.host = hosts[0]
        # Ranks meet at rank 0's node; on one machine without its outside address, which a container may not reach.
        host = hosts[0] if len(set(hosts)) > 1 else LOCALHOST
        address = (host, self._answer(self.ranks[0].rendezvous.remote(host)))
        threads = max(1, environment.cpus() // most_on_one_node(hosts))
        self._answer([rank.build.remote(build, i, address, threads) for i, rank in enumerate(self.ranks)])
        told = self._answer([rank.dealing.remote() for rank in self.ranks])
        self.dealer, self.data_parallel_ranks = told[0][0], [own for _, own, _ in told]
        self.speakers = {own: rank for rank, (_, own, speaks) in enumerate(told) if speaks}  # by share

    def _everywhere(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._answer([rank.call.remote(method, *args, **kwargs) for rank in self.ranks])[0]

    def _answer(self, replies: Any) -> Any:
        return answer(replies, "learner")

    def gpus(self) -> list[str]:
        """The GPU of every rank, as CUDA_VISIBLE_DEVICES calls it on its node."""
        return self._answer([rank.gpu.remote() for rank in self.ranks])

    def empty_cache(self) -> None:
        """See ``pipeline.learner.Learner``."""
        self._everywhere("empty_cache")

    def load(self, hf_path: Path) -> None:
        """See ``pipeline.learner.Learner``."""
        self._everywhere("load", hf_path)

    def log_probs(self, batch: TrainBatch, *, reference: bool = False) -> torch.Tensor:
        """See ``pipeline.learner.Learner``."""
        return joined(*self._measured("log_probs", batch, reference=reference))

    def statistics(self, batch: TrainBatch) -> Mapping[str, torch.Tensor]:
        """See ``pipeline.learner.Learner``."""
        found, places = self._measured("statistics", batch)
        return {name: joined([part[name] for part in found], places) for name in found[0]}

    def _measured(self, method: str, batch: TrainBatch, **kwargs: Any) -> tuple[list[Any], list[Place]]:
        """What the rank that speaks for each share measured of it, and where its targets lie."""
        given, places = self._shared(batch, for_update=False)
        answers = self._answer([rank.measure.remote(method, share, **kwargs) for rank, share in given])
        return [answers[self.speakers[own]] for own in range(len(places))], places

    def update(self, batch: TrainBatch, step: int) -> StepStats:
        """See ``pipeline.learner.Learner``."""
        given, _ = self._shared(batch, for_update=True)
        answers = self._answer([rank.update.remote(share, step) for rank, share in given])
        memory = {name: max(answer.memory[name] for answer in answers) for name in answers[0].memory}
        return replace(answers[0], memory=memory)

    def _shared(self, batch: TrainBatch, *, for_update: bool) -> tuple[list[tuple[Any, Any]], list[Place]]:
        """Every rank with its share of ``batch``, in shared memory or a small one itself; the place of every share."""
        given, places = [], []
        for share in self.dealer.shares(batch, range(self.dealer.ranks), for_update=for_update):
            given.append(share if share.nbytes < SENT_BYTES else ray.put(share))
            places.append(share.place)
        return [(rank, given[own]) for rank, own in zip(self.ranks, self.data_parallel_ranks, strict=True)], places

    def meeting_point(self, *, one_machine: bool) -> tuple[str, int]:
        """See ``pipeline.learner.Learner``."""
        _, port = self._answer(self.ranks[0].call.remote("meeting_point"))
        return (LOCALHOST if one_machine else self.host), port

    def send(self, order: Order) -> None:
        """See ``pipeline.learner.Learner``. Raises ``EngineTimeoutError`` when a rank does not answer in time."""
        replies = [rank.call.remote("send", order) for rank in self.ranks]
        answer(replies, "learner", order.timeout_s + min(order.timeout_s, GRACE_S))

    def save(self, directory: Path) -> Callable[[], Files]:
        """See ``pipeline.learner.Learner``. Every rank writes its part, beside its training."""
        self._answer([rank.save.remote(directory) for rank in self.ranks])
        ranks = list(self.ranks)

        def write() -> Files:
            written = self._answer([rank.write_saved.remote() for rank in ranks])
            return {name: found for files in written for name, found in files.items()}

        return write

    def restore(self, directory: Path, files: Files) -> None:
        """See ``pipeline.learner.Learner``."""
        self._everywhere("restore", directory, files)

    def close(self) -> None:
        """End the rank processes."""
        for i, rank in enumerate(self.ranks):
            ROLL_CALL.remove(f"learner-{i}")
            ray.kill(rank)
        self.ranks = []


@ray.remote(concurrency_groups={"control": 1, "draw": DRAWS})  # type: ignore[call-overload]  # missing in Ray's types
class EngineProcess:
    """One rollout engine in its own process; it draws while it answers other calls."""

    def __init__(self, build: Callable[[], RolloutEngine]) -> None:
        self.engine = build()
        self.streams: dict[str, tuple[Iterator[Finished], int]] = {}  # and how many groups are still to come

    def whereabouts(self) -> Whereabouts:
        """See ``launchers.supervise.roll_call``."""
        return whereabouts()

    def call(self, method: str, *args: Any) -> Any:
        """Run one method of the engine, after every call queued before it."""
        return getattr(self.engine, method)(*args)

    def perform(self, phases: Sequence[tuple[Any, ...]]) -> None:
        """Go through phases of an update, each with its arguments, after every call queued before it."""
        for phase, *arguments in phases:
            getattr(self.engine, phase)(*arguments)

    @ray.method(concurrency_group="draw")
    def draw(self, name: str, requests: Sequence[GenerateRequest]) -> Finished:
        """The next finished groups of the stream of this name; the first call begins it."""
        if requests:
            self.streams[name] = (self.engine.stream(requests), len(requests))
        stream, left = self.streams.pop(name)
        finished = next(stream)
        if left > len(finished):
            self.streams[name] = (stream, left - len(finished))
        else:
            list(stream)  # so that it ends
        return finished

    @ray.method(concurrency_group="control")
    def control(self, method: str) -> Any:
        """Run ``abort`` or ``health`` beside whatever runs."""
        return getattr(self.engine, method)()


class RayEngine(RolloutEngine):
    """``RolloutEngine`` over one actor, made by ``spawn`` at every ``start``.

    The beginning of an update, what it receives and their verification are one call, and its driver waits for that one
    alone: ``commit_update`` is done while the driver goes on, and ``stream`` waits for it. Each phase may take
    ``timeout_s`` (``rollout.weight_sync_timeout_s``) and a little grace; a process that does not answer by then is not
    alive.
    """

    def __init__(self, spawn: Callable[[], Any], name: str, timeout_s: float) -> None:
        self.spawn, self.name, self.timeout_s = spawn, name, timeout_s
        self.process: Any = None
        self.begun: tuple[str, int] | None = None  # the beginning of an update, yet to be sent
        self.verified: int | None = None  # version
        self.committed: Callable[[], None] | None = None  # returns when the update is, or raises
        self.stuck = ""

    @property
    def actor(self) -> Any:
        """The engine's process. Raises ``EngineError`` before ``start``."""
        if self.process is None:
            raise EngineError(f"{self.name}: not started (or closed)")
        return self.process

    def _call(self, method: str, *args: Any) -> Any:
        return answer(self.actor.call.remote(method, *args), self.name)

    def start(self, hf_path: Path) -> None:
        """See ``pipeline.rollout.engine.RolloutEngine``."""
        self.process, self.begun, self.verified, self.committed, self.stuck = self.spawn(), None, None, None, ""
        ROLL_CALL.add(self.name.replace(" ", "-"), self.process)
        self._call("start", hf_path)

    def stream(self, requests: Sequence[GenerateRequest]) -> Iterator[Finished]:
        """See ``pipeline.rollout.engine.RolloutEngine``. One call for each of its items; the first has the requests.

        The engine goes on with the next while the caller uses one. Raises what kept the update before from being
        committed.
        """
        self._await_commit()
        name, left = uuid4().hex, len(requests)
        reply = self.actor.draw.remote(name, requests) if left else None
        while left:
            finished = answer(reply, self.name)
            left -= len(finished)
            reply = self.actor.draw.remote(name, []) if left else None
            yield finished

    def release(self) -> None:
        """See ``pipeline.rollout.engine.RolloutEngine``."""
        self._call("release")

    def begin_update(self, version: int) -> None:
        """Done by ``receive``, which raises what goes wrong in it."""
        self.begun, self.verified, self.committed = ("begin_update", version), None, None

    def receive(self, order: Order, engine: int = 0) -> None:
        """See ``pipeline.rollout.engine.RolloutEngine``. What arrived is verified too."""
        begun, self.begun = self.begun, None
        phases = [("receive", order, engine), ("verify_update", order.version)]
        self._perform([begun, *phases] if begun else phases)()
        self.verified = order.version

    def verify_update(self, version: int) -> None:
        """See ``pipeline.rollout.engine.RolloutEngine``."""
        if version != self.verified:
            self._perform([("verify_update", version)])()

    def commit_update(self, version: int) -> None:
        """Queue it: what goes wrong in it is raised by ``stream``."""
        self.committed = self._perform([("commit_update", version)])

    def _await_commit(self) -> None:
        if (committed := self.committed) is not None:  # kept until it is done: several threads may wait
            committed()
            if self.committed is committed:
                self.committed = None

    def abort_update(self) -> None:
        """Queue the end of the update, behind whatever of it still runs."""
        self.begun = self.verified = self.committed = None
        if self.process is not None:
            self.process.perform.remote([("abort_update",)])

    def _perform(self, phases: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
        """Have the process go through phases, each with its arguments, in one call.

        What is returned waits for their end; the first failure is raised.
        """
        limit = len(phases) * (self.timeout_s + min(self.timeout_s, GRACE_S))
        names = ", ".join(phase for phase, *_ in phases)
        reply = self.actor.perform.remote(phases)

        def ended() -> None:
            try:
                answer(reply, f"{self.name}: {names}", limit)
            except EngineTimeoutError as error:
                self.stuck = f"{error}; if it is merely slow, raise rollout.weight_sync_timeout_s ({self.timeout_s:g})"
                raise WeightUpdateError(self.stuck) from error

        return ended

    def abort(self) -> None:
        """See ``pipeline.rollout.engine.RolloutEngine``."""
        answer(self.actor.control.remote("abort"), self.name, HEALTH_TIMEOUT_S)

    def health(self) -> EngineHealth:
        """See ``pipeline.rollout.engine.RolloutEngine``."""
        with suppress(EngineError):  # ``stream`` raises it
            self._await_commit()
        if self.stuck:
            return EngineHealth(alive=False, weight_version=None, detail=self.stuck)
        try:
            return answer(self.actor.control.remote("health"), self.name, HEALTH_TIMEOUT_S)
        except EngineError as error:
            return EngineHealth(alive=False, weight_version=None, detail=str(error))

    def close(self) -> None:
        """Let the engine clean up, unless it is stuck, then end its process."""
        if self.process is None:
            return
        actor, self.process = self.process, None
        ROLL_CALL.remove(self.name.replace(" ", "-"))
        if not self.stuck:
            # Already dead, or stuck without anyone having noticed: the kill below ends it.
            with suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
                ray.get(actor.call.remote("close"), timeout=CLOSE_TIMEOUT_S)
        ray.kill(actor)
