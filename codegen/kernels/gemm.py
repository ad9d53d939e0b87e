"""gemm: wide = x W^T + scale * narrow[:, columns] table, a frozen linear and the adapters of its output in one accumulator.

The transposed product wide = x W + ... is the same kernel over the other axis of the weight (dX = dY W + dS A). The programs stay
on their multiprocessors and walk the tiles. The adapters' product starts the accumulator: behind the sum it would delay every
tile's end, and its operands would lie beside the stages (docs/kernels.md has the figures).
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.kernels import text
from codegen.kernels.pattern import DTYPES, Link, Pattern, padded

# Ranks of one product: its operands lie in shared memory beside the stages.
MOST_RANKS = 32


@dataclass(frozen=True, slots=True)
class Config:
    """A program makes tiles of `rows` x `columns`, `step` features at a time, and walks them `group` rows of tiles at a time.

    Args:
        parts: pieces of a tile's columns that are written one after another (1, 2 or 4): fewer leave less room for `stages`.
        resident: programs of one multiprocessor; a second one computes while the first writes its tile.
        flatten: one loop over tiles and features, so that the copies of the next tile run while this one ends. The compiler gives
            up pipelining a flattened loop whose accumulator starts from a product: for products without adapters alone.
    """

    rows: int = 128
    columns: int = 128
    step: int = 64
    group: int = 8
    parts: int = 2
    resident: int = 2
    flatten: bool = False
    warps: int = 4
    stages: int = 3


_IMPORTS = """
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
"""

# Rows of tiles that are somebody's: behind them there is padding alone (`reference.linears`).
_FILLED = """
last = tl.load({route} + {blocks} - 1)
filled = tl.where(last < -1, tl.minimum(-2 - last, {blocks}), {blocks}) * {tiles}
"""

_KERNEL = """
row, column = place(tile, filled)
first = row * {rows}
rows = first + tl.arange(0, {rows})
{before}for feature in range(0, {features}, {step}):
    a = x.load([first, feature])
    b = w.load({at})
    acc = tl.dot(a, {b}, acc{precision})
{after}"""

_PLACE = '''

@triton.jit
def place(tile, filled):
    """A tile's row and column: {group} rows of tiles beside each other share what they read of the weight."""
    rows = tile // {span} * {group}
    count = tl.minimum(filled - rows, {group})
    return rows + tile % {span} % count, tile % {span} // count


@triton.jit
def halves(acc):
    """The left and the right half of the columns."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
'''

_LAUNCH = """

def launch(x, w, y{names}, warmup=False):
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    gemm.run(
        TensorDescriptor(x, [{tokens}, {features}], [x.stride(0), 1], [{rows}, {step}]),
        TensorDescriptor(w, {w_shape}, [w.stride(0), 1], {w_block}),
        TensorDescriptor(y, [{tokens}, {columns}], [y.stride(0), 1], [{rows}, {piece}]),
        {rest}grid=(min({tiles}, multiprocessors * {resident}),),
        warmup=warmup,
        num_warps={warps},
        num_stages={stages},
    )
"""


def arguments(pattern: Pattern, wide: int, *, bias: bool) -> list[str]:
    """What `launch` takes, in order: of tables, scales and routes those alone that a link of `wide` uses."""
    links = [link for link in pattern.links if link.wide == wide]
    tables = sorted({link.table for link in links})
    return [
        *("x", "w", "y"),
        *(("narrow",) if links else ()),
        *(f"table{table}" for table in tables),
        *(f"scale{table}" for table in tables if pattern.scaled[table]),
        *(f"route{bank}" for bank in sorted({link.bank for link in links})),
        *(("bias",) if bias else ()),
    ]


def _counts(pattern: Pattern, wide: int) -> dict[str, str]:
    """The parameters that hold each bank's number of slots, and the table that says it."""
    tables = {link.bank: link.table for link in reversed(pattern.links) if link.wide == wide}
    return {f"slots{bank}": f"table{table}" for bank, table in sorted(tables.items())}


def source(pattern: Pattern, config: Config, *, wide: int, features: int, transposed: bool, bias: bool) -> str:
    """The kernel and its `launch`, as text.

    Args:
        wide: index of the wide tensor that is written, y [T, N]. Its links must not drop elements.
        features: K, the features of x [T, K] that are summed. The rows of x, y and the weight may have a stride of their own.
        transposed: the weight is [K, N], else [N, K] as torch stores a linear's.
        bias: a bias [N] is added.
    """
    pattern = pattern.merged(1 << 30)
    links = [link for link in pattern.links if link.wide == wide]
    size = pattern.wides[wide]
    assert not any(link.site is not None for link in links), "an element that is dropped is dropped before the sum"
    assert size % 16 == features % 16 == 0, "rows of a descriptor begin at multiples of 16 bytes"
    assert pattern.tile % config.rows == 0 or not links, "a tile of the product lies in one block"
    across, down = -(-size // config.columns), -(-pattern.tokens // config.rows)
    names, counts = arguments(pattern, wide, bias=bias), _counts(pattern, wide)
    fixed = ", ".join(f'"{name}"' for name in counts)
    decorator = f"@triton.jit(do_not_specialize=[{fixed}])" if counts else "@triton.jit"
    rest = [*names[3:], *(f"{table}.shape[0]" for table in counts.values())]
    filled = f"filled = {down}"
    if links:
        route, blocks = f"route{min(link.bank for link in links)}", pattern.tokens // pattern.tile
        filled = _FILLED.format(route=route, blocks=blocks, tiles=pattern.tile // config.rows)
    before, after = _adapters(pattern, config, links, size, bias)
    block = [config.step, config.columns] if transposed else [config.columns, config.step]
    loop = _KERNEL.format(
        rows=config.rows,
        before="".join(f"{line}\n" for line in before),
        features=features,
        step=config.step,
        at=f"[feature, column * {config.columns}]" if transposed else f"[column * {config.columns}, feature]",
        b="b" if transposed else "b.T",
        precision=_precision(pattern),
        after="".join(f"{line}\n" for line in after),
    )
    title = (
        f"gemm: y [{pattern.tokens}, {size}] = x [{pattern.tokens}, {features}] w {'' if transposed else '^T '}+ adapters; "
        f"{pattern.dtype}, blocks of {pattern.tile} rows"
    )
    return (
        f'"""{title}"""\n'
        + _IMPORTS
        + _PLACE.format(span=across * config.group, group=config.group)
        + f"\n\n{decorator}\ndef gemm({', '.join([*names, *counts])}):\n"
        + text.indent(filled, 1)
        + f"\n    for tile in tl.range(tl.program_id(0), filled * {across}, tl.num_programs(0), flatten={config.flatten}):\n"
        + text.indent(loop, 2)
        + "\n"
        + _LAUNCH.format(
            names="".join(f", {name}" for name in names[3:]),
            tiles=across * down,
            resident=config.resident,
            tokens=pattern.tokens,
            features=features,
            rows=config.rows,
            step=config.step,
            w_shape=[features, size] if transposed else [size, features],
            w_block=block,
            columns=size,
            piece=config.columns // config.parts,
            rest=f"{', '.join(rest)},\n        " if rest else "",
            warps=config.warps,
            stages=config.stages,
        )
    )


def _adapters(pattern: Pattern, config: Config, links: list[Link], size: int, bias: bool) -> tuple[list[str], list[str]]:
    """The lines before the sum over features and those after it."""
    piece = config.columns // config.parts
    before = [f"acc = tl.zeros(({config.rows}, {config.columns}), tl.float32)"]
    for bank in sorted({link.bank for link in links}):
        before.append(f"slot{bank} = tl.load(route{bank} + first // {pattern.tile})")
        before.append(f"slot{bank} = tl.where(slot{bank} < slots{bank}, slot{bank}, -1)")
    met: set[int] = set()
    for link in sorted(links, key=lambda link: not pattern.scaled[link.table]):
        before += _product(pattern, config, link, size, fresh=link.bank not in met)
        met.add(link.bank)
    after = [] if config.parts == 1 else ["acc0, acc1 = halves(acc)"]
    if config.parts == 4:
        after += ["acc2, acc3 = halves(acc1)", "acc0, acc1 = halves(acc0)"]
    for part in range(config.parts):
        acc = f"acc{part}" if config.parts > 1 else "acc"
        start = f"column * {config.columns}" + (f" + {part * piece}" if part else "")
        if bias:
            inside = "" if size % config.columns == 0 else f"columns < {size}"
            after.append(f"columns = {start} + tl.arange(0, {piece})")
            after.append(f"{acc} += tl.load(bias + columns{_mask(inside)})[None, :]")
        after.append(f"y.store([first, {start}], {acc}.to({DTYPES[pattern.dtype]}))")
    return before, after


def _product(pattern: Pattern, config: Config, link: Link, size: int, *, fresh: bool) -> list[str]:
    """acc += scale * narrow table; a `fresh` accumulator is still zero, and is scaled as a whole."""
    scaled, depth = pattern.scaled[link.table], min(padded(link.rank), MOST_RANKS)
    limit = "" if link.rank % depth == 0 else str(link.rank)
    target = "own" if scaled and not fresh else "acc"
    inside = "" if size % config.columns == 0 else f"columns[None, :] < {size}"
    slot = f"slot{link.bank}"
    at = f"table{link.table} + {slot}.to(tl.int64) * {pattern.tables[link.table] * size} + {link.row * size}"
    lines = [f"columns = column * {config.columns} + tl.arange(0, {config.columns})"]
    if target == "own":
        lines.append("own = tl.zeros(acc.shape, tl.float32)")
    for begin in range(0, link.rank, depth):
        mask_s = _mask(f"ranks[None, :] < {limit}" if limit else "")
        mask_b = _mask(f"ranks[:, None] < {limit}" if limit else "", inside)
        lines += [
            f"ranks = {f'{begin} + ' if begin else ''}tl.arange(0, {depth})",
            f"s = tl.load(narrow + {pattern.row} * {pattern.width} + {link.column} + ranks[None, :]{mask_s})",
            f"b = tl.load({at} + ranks[:, None] * {size} + columns[None, :]{mask_b})",
            f"{target} = tl.dot(s, b, {target}{_precision(pattern)})",
        ]
    if scaled:
        lines.append(f"factor = tl.load(scale{link.table} + {slot})")
        lines.append("acc *= factor" if fresh else "acc += own * factor")
    return [f"if {slot} >= 0:", *(f"    {line}" for line in lines)]


def _mask(*terms: str) -> str:
    given = [term for term in terms if term]
    joined = given[0] if len(given) == 1 else " & ".join(f"({term})" for term in given)
    return f", mask={joined}, other=0.0" if given else ""


def _precision(pattern: Pattern) -> str:
    return ', input_precision="ieee"' if pattern.dtype == "float32" else ""
