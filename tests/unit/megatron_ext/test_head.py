import pytest
import torch


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "triton",
            "learner.log_prob_kernel=triton needs a CUDA device, the learner is on cpu: choose auto, fused or torch",
        ),
        ("liger", "learner.log_prob_kernel='liger' is not known; choose one of auto, fused, torch, triton"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_at_once(kernel, message):
    from megatron_ext.head import Head

    with pytest.raises(ValueError, match=message):
        Head(torch.nn.Module(), 8, None, torch.device("cpu"), kernel)
