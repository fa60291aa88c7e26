"""The model over a paged cache through the compiled step: what the engine uses wherever there is a C compiler."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from sparing.base.config import ModelConfig, UserError
from sparing.base.layers import layers, mixtures
from sparing.infer.network import Rows, cache_width
from sparing.infer.pack import Pack
from sparing.kernels.decode import FORMATS, SCORING, Batch, Layer, Matrix, Model, Residency, address, library
from sparing.kernels.sizes import CACHE_BLOCK as BLOCK
from sparing.model.rope import rotary_table, softmax_scale


def fits(c: ModelConfig) -> str | None:
    """Why the compiled step cannot run this model; None: it can. Vectors have 16 numbers, so widths must be multiples of 16."""
    if library() is None:
        return "there is no C compiler"
    widths = {"hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size}
    if c.attention == "mla":
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        widths |= {name: getattr(c, name) or 0 for name in names}
    else:
        widths["head_dim"] = c.head_dim
    if mixtures(c):
        widths["moe_intermediate_size"] = c.moe_intermediate_size
    odd = [name for name, width in widths.items() if width % 16]
    return f"{odd[0]} is {widths[odd[0]]}, not a multiple of 16" if odd else None


@cache
def fastest() -> str:
    """The format of the fastest decoding here that costs no quality worth mentioning: int8, unless this processor is slow at it."""
    return min(("int8", "bfloat16", "float32"), key=seconds_of) if library() else "float32"


@cache
def seconds_of(format: str) -> float:
    """Of the compiled step's product of one row with 1024 x 1024 weights, measured in a few milliseconds."""
    return library().probe(FORMATS[format], 1)


class CompiledNetwork:
    """`forward` and `draft` for `Rows`; rows do not influence each other, bit for bit.

    blocks: of the cache. threads: that share every step. expert_bytes: keep at most so many bytes of experts in memory; 0: no limit.
    After a step with approximate texts (`Rows.shares`), `used` (rows,) counts the experts of all layers; `model.least` are used in each.
    """

    exact = True

    def __init__(
        self, c: ModelConfig, pack: Pack, format: str, blocks: int, threads: int, expert_bytes: int = 0, processor: str | None = None
    ):
        self.c, self.pack, self.format = c, pack, format
        found = library(processor)
        if found is None:
            raise UserError("the compiled step needs a C compiler (cc)")
        self._library = found
        every = len(layers(c))
        mla = c.attention == "mla"
        # Pages of an empty tensor are not there until something is written to them.
        self.cache = torch.empty(blocks, every, BLOCK, cache_width(c))
        self._turns = torch.view_as_real(rotary_table(c, c.max_position_embeddings)).contiguous()
        self._layers = (Layer * every)(*(self._layer(i) for i in range(every)))
        moe = bool(mixtures(c))
        self.model = Model(
            hidden=c.hidden_size, heads=c.num_heads, nope=c.qk_nope_head_dim, rope=c.qk_rope_head_dim, value=c.v_head_dim,
            latent=c.kv_lora_rank, q_rank=c.q_lora_rank or 0, kv_heads=c.num_kv_heads, head_dim=c.head_dim, latent_attention=int(mla),
            experts=c.n_routed_experts if moe else 0, chosen=c.num_experts_per_tok, least=1, groups=c.n_group, chosen_groups=c.topk_group,
            scoring=SCORING[c.scoring_func], normalise=int(c.norm_topk_prob), expert_width=c.moe_intermediate_size,
            vocabulary=c.vocab_size, layers=c.num_layers, all_layers=every, width=cache_width(c), embed_bf16=int(format != "float32"),
            quantised=int(format in ("int8", "int4")), eps=c.rms_norm_eps, scale=softmax_scale(c), routed_scale=c.routed_scaling_factor,
            embed=pack.at("embed"), final_norm=pack.at("norm"), rotary=self._turns.data_ptr(), cache=self.cache.data_ptr(),
            head=self._matrix("head"), layer=self._layers,
        )  # fmt: skip
        if expert_bytes and moe:
            self._limit_experts(expert_bytes)
        self._batch = Batch()
        self._whole = np.ones(every, np.float32)
        self.used: np.ndarray | None = None
        self.threads = threads
        """How many of the pool's threads take part: may be lowered, and raised again, between steps."""
        self.model.pool = found.pool_open(min(threads, 255))

    def _matrix(self, name: str) -> Matrix:
        part = self.pack.parts.get(name)
        return Matrix(FORMATS[part.format], part.outputs, part.inner, self.pack.at(name), part.stride) if part else Matrix()

    def _layer(self, i: int) -> Layer:
        layer = Layer()
        for name, kind in Layer._fields_:
            part = f"{i}.{name}"
            setattr(layer, name, self._matrix(part) if kind is Matrix else self.pack.at(part) if part in self.pack.parts else None)
        return layer

    def _limit_experts(self, most: int) -> None:
        size = max(part.stride for name, part in self.pack.parts.items() if name.endswith("expert_gate_up"))
        slots = most // size
        if slots < 1:
            raise UserError(f"{most} bytes for experts: one takes {size}")
        count = self.model.all_layers * self.c.n_routed_experts
        # An empty tensor's pages are not there until they are written.
        self._arena = (
            torch.empty(slots * size, dtype=torch.uint8),
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(2, slots, dtype=torch.int64),
        )
        arena, place, (owner, used) = self._arena
        self.model.residency = Residency(
            slots=slots, file=self.pack.file, base=self.pack.data.data_ptr(), arena=arena.data_ptr(), place=place.data_ptr(),
            owner=owner.data_ptr(), used=used.data_ptr(),
        )  # fmt: skip
        self._expert_size = size

    def close(self) -> None:
        """Stop the threads and free the scratch."""
        self._library.pool_close(self.model.pool)
        self._library.release(self.model)

    def metrics(self) -> dict[str, int]:
        """Experts read from disk since the start, and bytes of them in memory now; empty without a limit."""
        r = self.model.residency
        size = self._expert_size if r.slots else 0
        return {"expert_loads_total": r.loads, "expert_bytes": r.taken * size, "expert_bytes_limit": r.slots * size} if r.slots else {}

    def forward(self, rows: Rows) -> np.ndarray:
        """(wanted, V) float32 logits; the cache holds the rows afterwards, `hidden` their last hidden states (rows, D)."""
        return self._run(rows, 0, None)

    def draft(self, rows: Rows, before: np.ndarray) -> np.ndarray:
        """The same from the MTP module: each row's token is the one after its position, `before` the hidden state at its position."""
        return self._run(rows, 1, np.ascontiguousarray(before))

    def _run(self, rows: Rows, mtp: int, before: np.ndarray | None) -> np.ndarray:
        count, wanted, widest = len(rows.tokens), len(rows.wanted), max(map(len, rows.tables))
        integers = [*rows.tokens, *rows.positions, *rows.owners, *rows.wanted, *rows.first]
        for table in rows.tables:
            integers += table
            integers += [0] * (widest - len(table))
        packed = np.array(integers, np.int32)
        self.hidden = np.empty((count, self.c.hidden_size), np.float32)
        logits = np.empty((wanted, -(-self.c.vocab_size // 16) * 16), np.float32)
        b, at = self._batch, address(packed)
        b.rows, b.wanted, b.table_stride, b.mtp = count, wanted, widest, mtp
        b.tokens, b.positions, b.owners, b.wanted_rows = (at + 4 * count * i for i in range(4))
        at += 4 * (3 * count + wanted)
        b.first = at if rows.first else None
        b.tables = at + 4 * len(rows.first)
        b.before, b.after, b.logits = None if before is None else address(before), address(self.hidden), address(logits)
        self.used = b.shares = b.used = None
        if rows.shares:
            shares = np.array([rows.shares.get(i, self._whole) for i in range(len(rows.tables))], np.float32)
            self.used = np.zeros(count, np.int32)
            b.shares, b.used = address(shares), address(self.used)
        self._library.forward(self.model, b, max(rows.positions) + 1, self.threads)
        return logits[:, : self.c.vocab_size]
