"""The mux:: operators of torch.library: one opaque node each in a captured graph, with fakes, gradients and FLOP formulas.

Importing this module registers them. Their meaning is `codegen.reference`; the CPU runs `codegen.host`, CUDA `codegen.device` and
torch's varlen attention.
"""

from codegen.affine import TILE_AFFINE, TILE_SUM, TILE_SUM_
from codegen.attention import ATTENTION
from codegen.collectives import REDUCE, SPREAD
from codegen.gather import TILE_GATHER, TILE_SCATTER, TILE_SCATTER_
from codegen.linears import LINEARS, LINEARS_BACKWARD, LINEARS_BACKWARD_
from codegen.logits import LSE, LSE_BACKWARD
from codegen.prefix import PREFIX_GRAD, PREFIX_GRAD_, PREFIXED_ATTENTION
from codegen.rowwise import ROWWISE
from codegen.sparse import TILE_SPARSE, TILE_SPARSE_SUM, TILE_SPARSE_SUM_
from codegen.tiles import DROP, TILE_MM, TILE_OUTER, TILE_OUTER_

__all__ = [
    "ATTENTION",
    "DROP",
    "LINEARS",
    "LINEARS_BACKWARD",
    "LINEARS_BACKWARD_",
    "LSE",
    "LSE_BACKWARD",
    "PREFIXED_ATTENTION",
    "PREFIX_GRAD",
    "PREFIX_GRAD_",
    "REDUCE",
    "ROWWISE",
    "SPREAD",
    "TILE_AFFINE",
    "TILE_GATHER",
    "TILE_MM",
    "TILE_OUTER",
    "TILE_OUTER_",
    "TILE_SCATTER",
    "TILE_SCATTER_",
    "TILE_SPARSE",
    "TILE_SPARSE_SUM",
    "TILE_SPARSE_SUM_",
    "TILE_SUM",
    "TILE_SUM_",
]
