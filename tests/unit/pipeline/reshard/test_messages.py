"""Messages into parameters that are columns of larger ones."""

import pytest
import torch

from pipeline.reshard.messages import Buffer, DigestError, Layout, Piece
from pipeline.reshard.plan import Tensor

SCALES = [Tensor("a", (4, 2), 1, 4), Tensor("b", (6, 3), 1, 4)]


class Held:
    """Tensors by name."""

    def __init__(self, tensors):
        self.tensors = tensors

    def read(self, tensor, start, length):
        return [self.tensors[tensor.name].narrow(tensor.dim, start, length)]


def columns():
    """Column 1 of both tensors: strided, and of one digest."""
    pieces = tuple(Piece(tensor, 1, 1, tensor.entry_bytes) for tensor in SCALES)
    (message,) = Buffer(torch.device("cpu")).messages([Layout(0, pieces)])
    return message


def test_columns_that_share_a_digest_arrive():
    sent = {tensor.name: torch.randn(tensor.shape) for tensor in SCALES}
    engine = {tensor.name: torch.zeros(tensor.shape) for tensor in SCALES}
    message = columns()
    assert len(message.layout.groups) == 1
    message.pack(Held(sent))
    message.write(Held(engine))
    for name, values in engine.items():
        assert values[:, 1].equal(sent[name][:, 1])
        assert values[:, 0].eq(0).all()


def test_a_byte_of_a_column_that_is_lost_on_the_way_is_told():
    message = columns()
    message.pack(Held({tensor.name: torch.randn(tensor.shape) for tensor in SCALES}))
    message.buffer[3] ^= 1
    with pytest.raises(DigestError, match="within 'a' to 'b'"):
        message.write(Held({tensor.name: torch.zeros(tensor.shape) for tensor in SCALES}))


def test_a_column_that_cannot_hold_what_was_sent_is_named():
    message = columns()
    message.pack(Held({tensor.name: torch.randn(tensor.shape) for tensor in SCALES}))
    engine = {"a": torch.zeros(4, 2), "b": torch.zeros(6, 3, dtype=torch.float16)}
    with pytest.raises(DigestError, match=r"1 tensors differ .*, first 'b'"):
        message.write(Held(engine))
