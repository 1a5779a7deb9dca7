"""What of the tensor transport needs no server; tests/integration has the rest."""

import threading

import torch
import torch.multiprocessing as torch_multiprocessing

from pipeline.rollout.transport_tensor import shared


class Tensors(dict):
    """Tensors whose sharing says that it began, and waits for the other's."""

    def __init__(self, began, wait_for):
        super().__init__(weight=torch.arange(6.0))
        self.began, self.wait_for = began, wait_for

    def items(self):
        self.began.set()
        self.wait_for.wait(0.3)
        return super().items()


def share(tensors, done):
    with shared(tensors):
        done.set()


def test_two_engines_may_share_tensors_at_the_same_time():
    """Without a lock the second would remember the first one's setting, and leave that behind."""
    before = torch_multiprocessing.get_sharing_strategy()
    first_began, second_began, first_done = threading.Event(), threading.Event(), threading.Event()
    first = threading.Thread(target=share, args=(Tensors(first_began, second_began), first_done))
    second = threading.Thread(target=share, args=(Tensors(second_began, first_done), threading.Event()))
    first.start()
    first_began.wait(5)
    second.start()
    first.join()
    second.join()
    assert second_began.is_set()
    assert torch_multiprocessing.get_sharing_strategy() == before
