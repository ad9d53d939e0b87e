"""What every rank of a test needs is there once this is imported: the process that does so is then forked for each rank.

Imports alone take as long as what most ranks do. Importing this changes what compiles in the process: for ranks of tests only.
"""

from __future__ import annotations

import contextlib
import gc
import warnings

import torch

import tests.dist.test_tensor  # noqa: F401  (what it imports, ranks need not)
from tests.dist import cases
from tests.once import captured_once, capturing_once, differentiated_once

torch.set_num_threads(1)
warnings.simplefilter("ignore")
stack = contextlib.ExitStack()
stack.enter_context(differentiated_once())
stack.enter_context(captured_once(capturing_once()))
cases.get_ready()  # this imports the rest, where it is first used
gc.collect()
gc.freeze()
