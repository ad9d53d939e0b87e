"""calibrate: what a plan would run, timed on the device in front of us; plans made afterwards use the tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from codegen import products, tiling
from codegen.lower import Target
from muxcompile import planner
from muxcompile.options import Options
from passes.adapters import resolve
from passes.measure import measure
from passes.survey import frozen
from passes.task import Task

# Sequence lengths that regions are timed with: enough for a mix, in chunks of any size.
_SEQUENCES = 32


def calibrate(model: nn.Module, tasks: Sequence[Task], options: Options) -> tuple[Path, list[int]]:
    """Plan, time every region at the plan's chunk sizes, at half and at double of them, and keep the figures.

    On a GPU the products by the backbone's matrices are timed first, at every size that the planner chooses from.

    Returns:
        The device's table of regions, and the chunk sizes.

    Raises:
        ValueError: as `planner.plan`; or nothing is forecast, so that there is nothing to measure for.
    """
    device = next(model.parameters()).device
    adapters = [resolve(task, model) for task in tasks]
    planned = planner.plan(model, device, adapters, options)
    if planned.forecast is not None and device.type == "cuda":
        survey = planned.forecast.model.survey
        # Of the loss, blocks of its rows alone.
        rows = {True: tiling.chunk_sizes(device), False: (survey.geometry.head_rows,)}
        products.write(products.measure({product: rows[chunk] for product, chunk in frozen(survey).items()}))
        planned = planner.plan(model, device, adapters, options)
    if planned.forecast is None:
        raise ValueError("calibrate: there is no forecast to measure for: give every task its lengths")
    sizes = neighbours(device, [group.tokens for group in planned.groups])
    # Evenly over all tasks' sampled sequences; a longer one fills a chunk.
    seen = sorted(length for given in planned.forecast.steps.values() for step in given for length in step)
    lengths = [min(length, max(sizes)) for length in seen[:: -(-len(seen) // _SEQUENCES)]]
    path = measure(model, adapters, planned.forecast.model.survey, sizes, device=device, target=Target.of(device), lengths=lengths)
    return path, sizes


def neighbours(device: torch.device, tokens: Sequence[int]) -> list[int]:
    """These chunk sizes with half and double of each, whole tiles, as far as the planner may choose them."""
    most = max(*tokens, *tiling.chunk_sizes(device))
    found = {tiling.chunk_tokens(device, size, 0) for own in tokens for size in (own // 2, own, 2 * own) if size}
    return sorted(size for size in found if size <= most)
