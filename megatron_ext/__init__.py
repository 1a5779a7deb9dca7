"""Everything that touches megatron-core: topology, models, log-probs, learner, weights.

Importing the package installs the CPU shim (a no-op where CUDA is there), so that it stands before any ``import
megatron``.
"""

from megatron_ext import cpu

cpu.install()
