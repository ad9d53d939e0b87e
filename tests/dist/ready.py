"""What every rank of a test needs is there once this is imported: the process that does so is then forked for each rank.

Imports alone take as long as what most ranks do. Importing this changes what compiles in the process: for ranks of tests only.
"""

from __future__ import annotations

import contextlib
import gc
import warnings

import torch

# Autograd makes its threads for devices at the first backward, and works in no process that is forked off one that has them. Where
# torch is built for CUDA it would find a device as soon as fake tensors were used, even one that is not there: now it finds none.
torch.ones((), requires_grad=True).backward()

import tests.dist.test_tensor  # noqa: E402, F401  (what it imports, ranks need not)
from tests.dist import cases  # noqa: E402
from tests.once import captured_once, capturing_once, differentiated_once  # noqa: E402

torch.set_num_threads(1)
warnings.simplefilter("ignore")
stack = contextlib.ExitStack()
stack.enter_context(differentiated_once())
stack.enter_context(captured_once(capturing_once()))
cases.get_ready()  # this imports the rest, where it is first used
gc.collect()
gc.freeze()
