"""Writes TensorBoard event files below ``<run_dir>/tensorboard``, without torch or TensorFlow.

Two runs as it understands them, ``train`` and ``evaluation``. After a resume each begins with the step from which
TensorBoard purges what it has read: an evaluation after k updates stays when a run resumes at step k, a training step k
does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar import layout_pb2 as layout
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from pipeline.config.keys import flat
from pipeline.config.load import to_yaml
from pipeline.config.schema import RunConfig
from pipeline.monitoring.alerts.alert import Alert
from pipeline.monitoring.events import run_id
from pipeline.monitoring.metrics import scalars


class TensorboardSink:
    """Scalars of steps and evaluations, hyperparameters, and the band as a custom scalar.

    Configuration, alerts and faults are texts.
    """

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        self._config = config
        self._id = run_id(run_dir)
        folder = run_dir / "tensorboard"
        self._train = EventFileWriter(str(folder / "train"))
        self._evaluation = EventFileWriter(str(folder / "evaluation"))
        self._step = 0

    def event(self, event: dict[str, Any]) -> None:
        """Write one event and flush it."""
        self._step = event.get("step", self._step)
        kind, time = event["kind"], event["time"]
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(event).items()]
        if kind in ("run_start", "resume"):
            self._purge(event["step"], time)
            self._write(self._train, time, self._about(time))
        elif kind == "alert":
            alert = Alert.of(event)
            begins = "" if alert.begins else "over: "
            values = [_text(f"alerts/{alert.severity}", f"**{begins}{alert.rule}**: {alert.reason}")]
        elif kind == "fault":
            values = [_text("faults", event["description"])]
        if values:
            self._write(self._evaluation if kind == "evaluation" else self._train, time, values)

    def close(self) -> None:
        """Flush and close the files."""
        self._train.close()
        self._evaluation.close()

    def _write(self, writer: EventFileWriter, time: float, values: list[Summary.Value]) -> None:
        writer.add_event(Event(step=self._step, wall_time=time, summary=Summary(value=values)))
        writer.flush()

    def _purge(self, step: int, time: float) -> None:
        start = SessionLog(status=SessionLog.START)
        for writer, first in ((self._train, step), (self._evaluation, step + 1)):
            writer.add_event(Event(step=first, wall_time=time, session_log=start))
            writer.flush()

    def _about(self, time: float) -> list[Summary.Value]:
        """Configuration as text and as hyperparameters, and the layout of the custom scalars."""
        plain = {
            key: value if isinstance(value, (bool, int, float)) else str(value)
            for key, value in flat(self._config).items()
        }
        config = _text("config", f"```\n{to_yaml(self._config)}```")
        return [config, *hparams_pb(plain, trial_id=self._id, start_time_secs=time).value, _layout()]


def _text(tag: str, text: str) -> Summary.Value:
    return _tensor(tag, text.encode(), text_metadata.create_summary_metadata("", ""), shape=[1])


def _tensor(tag: str, content: bytes, metadata: SummaryMetadata, shape: list[int]) -> Summary.Value:
    sizes = [TensorShapeProto.Dim(size=size) for size in shape]
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(dim=sizes), string_val=[content])
    return Summary.Value(tag=tag, tensor=tensor, metadata=metadata)


def _layout() -> Summary.Value:
    """Entropy in its band as TensorBoard's margin chart, with what acts on it below."""
    series = layout.MarginChartContent.Series(
        value="entropy/filtered", lower="entropy/band_low", upper="entropy/band_high"
    )
    band = layout.Chart(title="filtered entropy in its band", margin=layout.MarginChartContent(series=[series]))
    actuator = layout.Chart(
        title="T+ and command", multiline=layout.MultilineChartContent(tag=["control/temperature", "control/command"])
    )
    category = layout.Category(title="entropy control", chart=[band, actuator])
    content = layout.Layout(category=[category]).SerializeToString()
    return _tensor(layout_metadata.CONFIG_SUMMARY_TAG, content, layout_metadata.create_summary_metadata(), shape=[])
