"""How the distributed transport fails when a server does not join; tests/integration has servers that do."""

import time

import pytest

from pipeline.rollout.engine import EngineError, EngineTimeoutError
from pipeline.rollout.transport import Deadline
from pipeline.rollout.transport_distributed import DistributedTransport
from tests.stub_server import SERVE, Stub

SLOW = SERVE.replace("self.send_error", "import time; time.sleep(3); self.send_error")


@pytest.mark.parametrize(
    ("program", "seconds", "error", "message"),
    [
        (SERVE, 30.0, EngineError, r"init_weights_update_group answered 400.*no such thing"),
        (SLOW, 0.5, EngineTimeoutError, r"not formed: the server takes no part|no answer within 0\.\d+ s"),
    ],
    ids=["refuses", "is silent"],
)
def test_a_server_that_does_not_join_is_not_waited_for_beyond_the_deadline(tmp_path, program, seconds, error, message):
    server = Stub(program, tmp_path)
    server.start()
    transport = DistributedTransport(server, ranks=1)
    begun = time.monotonic()
    with pytest.raises(error, match=f"(?s){message}"):
        transport.connect(Deadline(seconds))
    assert time.monotonic() - begun < 5
    transport.close()
    server.close()
