"""The native step: `Transformer.hidden` and its logits for one new id of each of many streams.

step.c computes; here its structs are filled with the addresses of a model's tensors, and what a
call gives it is checked.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_void_p
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openchameleon.inference.native.build import NotBuilt, load
from openchameleon.inference.native.pages import use_large_pages
from openchameleon.model.rope import rope_tables
from openchameleon.model.transformer import Block, HeadNorm, Transformer

SOURCE = Path(__file__).parent / "step.c"
SWITCH = "OPENCHAMELEON_NATIVE"
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
log = logging.getLogger("openchameleon")


class Matrix(Structure):
    """A weight (rows, cols) as it is stored, with its scales or none."""

    _fields_ = [
        *((name, c_int64) for name in ("kind", "rows", "cols", "stride")),
        ("data", c_void_p),
        ("scale", c_void_p),
    ]


class Layer(Structure):
    _fields_ = [
        *((name, Matrix) for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm")),
        *((name, c_void_p) for name in ("q_weight", "q_bias", "k_weight", "k_bias")),
    ]


class Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("n_layers", "dim", "ffn_dim", "n_heads", "n_kv_heads")),
        *((name, c_int64) for name in ("head_dim", "n_groups", "norm_input", "n_positions")),
        ("norm_eps", c_float),
        *((name, c_void_p) for name in ("cos", "sin", "norm")),
        ("embedding", Matrix),
        ("layers", POINTER(Layer)),
    ]


class Batch(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("n_rows", "n_blocks", "block_size", "table_width")),
        *((name, c_void_p) for name in ("ids", "positions", "tables")),
        *((name, POINTER(c_void_p)) for name in ("keys", "values")),
    ]


FUNCTIONS: dict[str, list[Any]] = {  # what it returns, what it is given
    "has_openmp": [c_int],
    "hidden_floats": [c_int64, POINTER(Model), c_int64, c_int64],
    "logits_floats": [c_int64, POINTER(Matrix), c_int64, c_int64],
    "step_hidden": [c_int64, POINTER(Model), POINTER(Batch), c_void_p, c_void_p, c_int],
    "step_logits": [
        None, POINTER(Matrix), c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64,
        c_int,
    ],
}  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """step.c as a library, or None where it cannot be made, of which it tells once."""
    try:
        found = load(SOURCE)
        for name, (restype, *argtypes) in FUNCTIONS.items():
            function = getattr(found, name)
            function.restype, function.argtypes = restype, argtypes
    except (NotBuilt, AttributeError) as error:
        log.warning("Decoding runs in PyTorch, which is slower: %s.", error)
        return None
    return found


class NativeStep:
    """One model's step on a CPU, for one thread at a time. It keeps the weights it was made with.

    Weights are used where they lie: float32 or bfloat16, or what `store_weights` made of them.
    """

    max_rows = 256  # of a call
    longest: int  # new ids of a stream that PyTorch does not read faster

    def __init__(self, model: Transformer, lib: ctypes.CDLL) -> None:
        self.lib, config = lib, model.config
        self.config = config
        self._kept: list[Tensor] = []
        layers = [self._layer(block) for block in model.layers]
        positions = torch.arange(config.max_seq_len)[None]
        cos, sin = (self._floats(table) for table in rope_tables(positions, config))
        self._layers = (Layer * len(layers))(*layers)
        self.model = Model(
            config.n_layers, config.dim, config.ffn_dim, config.n_heads, config.n_kv_heads,
            config.head_dim, config.qk_norm_groups if config.qk_norm else 0,
            config.norm_placement == "input", config.max_seq_len, config.norm_eps,
            cos, sin, self._floats(model.norm.weight), self._matrix(model.tok_embeddings),
            self._layers,
        )  # fmt: skip
        self.head = self._matrix(getattr(model, "output", model.tok_embeddings))
        self.longest = 128 if layers[0].wq.kind == KINDS[torch.int8] else 64
        self.like = torch.empty(config.n_kv_heads, config.head_dim)
        self.large_pages = use_large_pages(self._kept)
        self._scratch = torch.empty(0)

    @staticmethod
    def of(model: Transformer) -> NativeStep | None:
        """The native step of a model, or None where PyTorch has to do it."""
        if os.environ.get(SWITCH) == "0":
            return None
        if not isinstance(model, Transformer) or model.dtype != torch.float32:
            return None
        if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
            return None  # somebody adds to what the layers do: a sum over processes, or a look
        tensors = [t.data for t in (*model.parameters(), *model.buffers())]
        if not all(type(t) is Tensor and t.device.type == "cpu" for t in tensors):
            return None  # in another place, or spread over processes
        if not all(t.dtype in KINDS for t in tensors):
            return None
        lib = library()
        if lib is None:
            return None
        outnumbered = torch.get_num_threads() > 1 and not lib.has_openmp()
        if outnumbered and all(t.dtype == torch.float32 for t in tensors):
            return None
        return NativeStep(model, lib)

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        tables: Tensor,
        storage: Sequence[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """What the output head reads, float32 (R, C), of R new ids; writes their keys and values.

        token_ids, positions: int64 (R,). tables: int64 (R, W), the blocks of each row's stream.
        storage: keys and values of each layer, float32 (blocks, block_size, K, D).
        """
        n_rows, table_width = tables.shape
        n_blocks, block_size, *_ = pool = storage[0][0].shape
        expect(token_ids, (n_rows,), torch.int64)
        expect(positions, (n_rows,), torch.int64)
        expect(tables, tables.shape, torch.int64)
        assert len(storage) == self.config.n_layers
        assert pool[2:] == self.like.shape
        for tensor in chain(*storage):
            expect(tensor, pool, torch.float32)
        pointers = c_void_p * len(storage)
        batch = Batch(
            n_rows, n_blocks, block_size, table_width,
            token_ids.data_ptr(), positions.data_ptr(), tables.data_ptr(),
            pointers(*(keys.data_ptr() for keys, _ in storage)),
            pointers(*(values.data_ptr() for _, values in storage)),
        )  # fmt: skip
        out = torch.empty(n_rows, self.config.dim)
        n_threads = torch.get_num_threads()
        memory = self._memory(self.lib.hidden_floats(byref(self.model), n_rows, n_threads))
        wrong = self.lib.step_hidden(
            byref(self.model), byref(batch), memory, out.data_ptr(), n_threads
        )
        assert wrong < 0, f"row {wrong}: id {token_ids[wrong]} at {positions[wrong]} has no place"
        return out

    def logits(
        self, hidden: Tensor, first: int = 0, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Float32 logits of ids first .. stop-1, from hidden states (R, C): (R, stop - first).

        Or those columns of `out`, float32 (R, ids), which comes back.
        """
        stop = self.head.rows if stop is None else stop
        assert 0 <= first <= stop <= self.head.rows, f"ids {first}..{stop - 1}"
        expect(hidden, (len(hidden), self.config.dim), torch.float32)
        if out is None:
            out, at = torch.empty(len(hidden), stop - first), 0
        else:
            expect(out, (len(hidden), self.head.rows), torch.float32)
            at = first * out.itemsize
        n_threads = torch.get_num_threads()
        self.lib.step_logits(
            byref(self.head), first, stop, hidden.data_ptr(), len(hidden),
            self._memory(self.lib.logits_floats(byref(self.head), len(hidden), n_threads)),
            out.data_ptr() + at, out.shape[1], n_threads,
        )  # fmt: skip
        return out

    def _memory(self, n_floats: int) -> int:
        if len(self._scratch) < n_floats:
            self._scratch = torch.empty(n_floats)
        return self._scratch.data_ptr()

    def _layer(self, block: nn.Module) -> Layer:
        assert isinstance(block, Block)
        a, f = block.attention, block.feed_forward
        norms: list[int | None] = [None] * 4
        if isinstance(a.q_normalization, HeadNorm) and isinstance(a.k_normalization, HeadNorm):
            q, k = a.q_normalization, a.k_normalization
            norms = [self._floats(t) for t in (q.weight, q.bias, k.weight, k.bias)]
        return Layer(
            *(self._matrix(m) for m in (a.wq, a.wk, a.wv, a.wo, f.w1, f.w2, f.w3)),
            self._floats(block.attention_norm.weight),
            self._floats(block.ffn_norm.weight),
            *norms,
        )

    def _matrix(self, module: nn.Module) -> Matrix:
        weight: Any = module.weight
        weight = self._keep(weight)
        scale = getattr(module, "scale", None)
        return Matrix(
            KINDS[weight.dtype], *weight.shape, weight.shape[1], weight.data_ptr(),
            None if scale is None else self._floats(scale),
        )  # fmt: skip

    def _floats(self, tensor: Tensor) -> int:
        """The address of the float32 numbers of a tensor."""
        return self._keep(tensor.float()).data_ptr()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1]


def expect(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Makes sure that C finds what it takes for granted."""
    assert tensor.shape == shape, f"{tuple(tensor.shape)}, not {tuple(shape)}"
    assert tensor.dtype == dtype, f"{tensor.dtype}, not {dtype}"
    assert tensor.is_contiguous(), "the numbers of a tensor do not lie in a row"
