"""The model over a paged key-value cache: in plain PyTorch, compiled, and the choice between them for a device and number format.

`CompiledNetwork` (kernels/decode.c) runs wherever there is a C compiler. `TorchNetwork` is its reference, and runs on GPUs and without a
compiler. Both use the absorbed form of attention (DeepSeek-V2 §2.1.2, arXiv 2405.04434): queries are projected into the latent space, so
a cached token is its latent and shared rotated key, and keys and values are never expanded. Grouped queries work the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparing.base.config import ModelConfig, UserError
from sparing.base.files import DamagedError
from sparing.base.layers import layers, mixtures
from sparing.base.run import RunFolder, factor_name, fill, run_tensors
from sparing.infer.packed_weights import PackedWeights
from sparing.kernels import decode
from sparing.kernels.decode import Matrix, address, library
from sparing.kernels.formats import this_machine, warning
from sparing.kernels.sizes import CACHE_BLOCK as BLOCK
from sparing.kernels.vocabulary import logits_of
from sparing.model.rope import rotary_table, rotate, softmax_scale
from sparing.model.transformer import Transformer

FORMATS = ("auto", "float32", "bfloat16", "int8", "int4")
DEVICES = ("auto", "cpu", "cuda")


class Backend(NamedTuple):
    """Where a model runs, and in which number format."""

    device: str
    weights: str
    plain: str | None
    """Why plain PyTorch runs it; None: the compiled network does."""


def choose_backend(c: ModelConfig, device: str, weights: str, network: Transformer | None = None) -> Backend:
    """Resolve "auto": a GPU before the CPU, and there the fastest format without noticeable loss of quality. network: a model in memory,
    which stays on its device and in its format. Raises UserError for what cannot run here."""
    if network is not None:
        return Backend(network.device.type, str(network.compute_dtype).removeprefix("torch."), "the model is in memory")
    for name, value, choices in (("weights", weights, FORMATS), ("device", device, DEVICES)):
        if value not in choices:
            raise UserError(f"{name} {value}: choose from {', '.join(choices)}")
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UserError("device cuda: PyTorch finds no GPU here; choose cpu")
    device = "cuda" if gpu and device == "auto" and weights in ("auto", "float32", "bfloat16") else device.replace("auto", "cpu")
    plain = "on a GPU" if device == "cuda" else cannot_compile(c)
    if weights == "auto":
        weights = fastest_format() if not plain else "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if plain and weights not in ("float32", "bfloat16"):
        raise UserError(f"weights {weights}: this model runs in float32 and bfloat16 here ({plain})")
    return Backend(device, weights, plain)


def slow_format(backend: Backend) -> str | None:
    """A warning if this processor is slower in the backend's format than in float32."""
    if backend.plain:
        return f"weights {line}" if backend.device == "cpu" and (line := warning(backend.weights, this_machine())) else None
    times = format_seconds(backend.weights) / format_seconds("float32")
    return f"weights {backend.weights}: decoding is {times:.1f} times slower than in float32 here (measured)" if times > 1.2 else None


def cannot_compile(c: ModelConfig) -> str | None:
    """Why the compiled network cannot run this model, or None. Its vectors have 16 numbers, so widths must be multiples of 16."""
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
def fastest_format() -> str:
    """The format that decodes fastest here: int8, unless this processor is slow at it. int4 would cost quality."""
    return min(("int8", "bfloat16", "float32"), key=format_seconds) if library() else "float32"


@cache
def format_seconds(format: str) -> float:
    """Seconds of the compiled product of one row and 1024 x 1024 weights, measured in a few milliseconds."""
    return library().probe(decode.FORMATS[format], 1)


def load_transformer(run: RunFolder, c: ModelConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """A run's newest weights in plain PyTorch, kept and computed in `dtype`; routers and norms stay float32. Raises UserError if there are
    none."""
    network = Transformer(c)
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1 and ".gate." not in name:
            parameter.data = parameter.data.to(dtype)
    network.to(device).compute_dtype = dtype
    try:
        fill(network.state_dict(), run_tensors(run), run.learned_file)
    except DamagedError as error:
        raise UserError(f"{run} has no usable weights: {error}") from None
    return network.eval()


@dataclass
class Rows:
    """The tokens of one step: those of each sequence together and in order."""

    tables: list[list[int]] = field(default_factory=list)
    """Cache blocks of each sequence."""
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    """Index into `tables`."""
    wanted: list[int] = field(default_factory=list)
    """Rows whose logits are needed."""
    first: list[int] = field(default_factory=list)
    """First position that each row attends to; empty: 0 for all."""
    shares: dict[int, np.ndarray] = field(default_factory=dict)
    """Of approximate sequences, by index into `tables`: (layers,) float32. In each layer (MTP's too) a token's heaviest experts are
    computed until they carry this share of its gate weight. `CompiledNetwork` only."""

    adapters: dict[int, int] = field(default_factory=dict)
    """Of sequences with an adapter, by index into `tables`: its number. `CompiledNetwork` only."""
    routes: bool = False
    """Whether the network's `routes` are wanted: (rows, layers, experts a token) int32, the experts of each row in each layer of the
    decoder; zeros in dense layers."""

    def add(
        self, table: list[int], tokens: list[int], start: int, wanted: int, shares: np.ndarray | None = None, adapter: int | None = None
    ) -> None:
        """Add `tokens` of a sequence from position `start`; the last `wanted` of them need logits."""
        first, count = len(self.tokens), len(tokens)
        self.tokens += tokens
        self.positions += range(start, start + count)
        self.owners += [len(self.tables)] * count
        if shares is not None:
            self.shares[len(self.tables)] = shares
        if adapter is not None:
            self.adapters[len(self.tables)] = adapter
        self.tables.append(table)
        self.wanted += range(first + count - wanted, first + count)


def _no_routes(c: ModelConfig, rows: int) -> np.ndarray:
    return np.zeros((rows, c.num_layers, c.num_experts_per_tok), np.int32)


class TorchNetwork:
    """`forward` and `draft` in plain PyTorch, on the weights' device. A row's last bits may depend on the other rows of its step."""

    threads = 1

    def __init__(self, model: Transformer, blocks: int):
        self.model, self.c, self.device = model.eval(), model.config, model.device
        self.routes: np.ndarray | None = None
        shape = (len(layers(model.config)), blocks, BLOCK, layers(model.config)[0].attention.cache_width)
        self.cache = torch.empty(shape, dtype=model.compute_dtype, device=self.device)
        self.table = rotary_table(model.config, model.config.max_position_embeddings).to(self.device)
        self.scale = softmax_scale(model.config)

    def close(self) -> None:
        """Nothing to free."""

    def metrics(self) -> dict[str, int]:
        return {}

    @torch.inference_mode()
    def forward(self, rows: Rows) -> np.ndarray:
        """(wanted, V) float32 logits. Writes the rows into the cache, and their last hidden states (rows, D) into `hidden`."""
        self.routes, hooks = _no_routes(self.c, len(rows.tokens)) if rows.routes else None, []
        for i in [layer.index for layer in mixtures(self.c) if not layer.mtp] if rows.routes else []:
            hooks.append(self.model.model.layers[i].mlp.gate.register_forward_hook(partial(self._note, i)))
        try:
            x = self._run(self._embed(rows), rows, range(self.c.num_layers))
        finally:
            for hook in hooks:
                hook.remove()
        return self._logits(self.model.model.norm(x), rows)

    def _note(self, layer: int, _gate, _inputs, routing) -> None:
        self.routes[:, layer] = routing.experts_NK.cpu().numpy()

    @torch.inference_mode()
    def draft(self, rows: Rows, before: np.ndarray) -> np.ndarray:
        """The MTP module's logits. Each row's token is the one after its position; before: (rows, D) hidden states at the positions."""
        at = self.c.num_layers
        module = self.model.model.layers[at]
        x = module.join(self._embed(rows), torch.from_numpy(before).to(self.device, self.model.compute_dtype))
        return self._logits(module.shared_head.norm(self._run(x, rows, [at])), rows)

    def _embed(self, rows: Rows) -> Tensor:
        tokens = torch.tensor(rows.tokens, device=self.device)
        return self.model.model.embed_tokens(tokens).to(self.model.compute_dtype)

    def _logits(self, x: Tensor, rows: Rows) -> np.ndarray:
        if self.c.mtp_depth:
            self.hidden = x.float().cpu().numpy()
        return logits_of(x[rows.wanted], self.model.head_weight).float().cpu().numpy()

    def _run(self, x: Tensor, rows: Rows, layers: Iterable[int]) -> Tensor:
        positions = torch.tensor(rows.positions, device=self.device)
        blocks = [rows.tables[o][p // BLOCK] for o, p in zip(rows.owners, rows.positions, strict=True)]
        where = (torch.tensor(blocks, device=self.device), positions % BLOCK)
        spans, start = [], 0
        for owner, table in enumerate(rows.tables):
            end = start + rows.owners.count(owner)
            seen = range(rows.first[start] if rows.first else 0, rows.positions[end - 1] + 1)
            spans.append((slice(start, end), torch.tensor(table, device=self.device), seen))
            start = end
        attention = self._latent if self.c.attention == "mla" else self._grouped
        for i in layers:
            layer = self.model.model.layers[i]
            x = x + attention(layer.self_attn, layer.input_layernorm(x), self.cache[i], where, positions, spans)
            x = x + layer.mlp(layer.post_attention_layernorm(x)[None])[0]
        return x

    def _latent(self, m, x_ND: Tensor, cache: Tensor, where, positions: Tensor, spans) -> Tensor:
        c = self.c
        q = m.q_proj(x_ND) if c.q_lora_rank is None else m.q_b_proj(m.q_a_layernorm(m.q_a_proj(x_ND)))
        q_nope, q_rope = q.unflatten(-1, (c.num_heads, -1)).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = m.kv_a_proj_with_mqa(x_ND).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        table = self.table[positions]
        cache[where] = torch.cat((m.kv_a_layernorm(latent), rotate(k_rope[:, None], table)[:, 0]), -1)
        up_HCK, up_HCV = m.kv_b_proj.operand.whole(q.dtype).unflatten(0, (c.num_heads, -1)).split([c.qk_nope_head_dim, c.v_head_dim], 1)
        absorbed = torch.einsum("nhk,hkc->nhc", q_nope, up_HCK)
        q = torch.cat((absorbed, rotate(q_rope, table)), -1)
        mixed = torch.empty_like(absorbed)
        for mine, blocks, seen in spans:
            keys = cache[blocks].flatten(0, 1)[seen.start : seen.stop]
            scores = torch.einsum("nhc,sc->hns", q[mine], keys)
            mixed[mine] = self._weights(scores, positions[mine], seen, "hns,sc->nhc", keys[:, : c.kv_lora_rank])
        return m.o_proj(torch.einsum("nhc,hvc->nhv", mixed, up_HCV).flatten(1))

    def _grouped(self, m, x_ND: Tensor, cache: Tensor, where, positions: Tensor, spans) -> Tensor:
        c = self.c
        table = self.table[positions]
        q, k = m.queries(x_ND, table).unflatten(1, (c.num_kv_heads, -1)), m.keys(x_ND, table)
        cache[where] = torch.cat((k.flatten(1), m.v_proj(x_ND)), -1)
        out = torch.empty_like(q)
        for mine, blocks, seen in spans:
            cached = cache[blocks].flatten(0, 1)[seen.start : seen.stop]
            keys, values = cached.unflatten(-1, (2, c.num_kv_heads, c.head_dim)).unbind(1)
            scores = torch.einsum("nghd,sgd->ghns", q[mine], keys)
            out[mine] = self._weights(scores, positions[mine], seen, "ghns,sgd->nghd", values)
        return m.o_proj(out.flatten(1))

    def _weights(self, scores: Tensor, at: Tensor, seen: range, product: str, values: Tensor) -> Tensor:
        hidden = torch.arange(seen.start, seen.stop, device=self.device) > at[:, None]
        weights = (scores.float() * self.scale).masked_fill(hidden, float("-inf")).softmax(-1).to(values.dtype)
        return torch.einsum(product, weights, values)


class Factors(NamedTuple):
    """An adapter run's low-rank factors."""

    tensors: Mapping[str, Tensor]
    """By our names (`model.linear.Adaptable`)."""
    rank: int
    alpha: float


def cannot_adapt(c: ModelConfig) -> str | None:
    """Why the compiled network cannot add low-rank updates to this model's products, or None."""
    if c.attention == "mla":
        return "latent attention is computed in its absorbed form"
    return "experts have no updates there" if mixtures(c) else None


class Updates:
    """Adapters' factors as decode.c reads them: for each product, those of its parts side by side."""

    def __init__(self, c: ModelConfig, adapters: Sequence[Factors]):
        every = layers(c)
        self._kept: list[Tensor] = []
        self.narrow = 0
        """Most numbers between the two factors of a product."""
        self.array = (decode.Update * max(1, len(adapters) * len(every) * 4))()
        for i, adapter in enumerate(adapters):
            for layer in every[: c.num_layers]:
                at = f"model.layers.{layer.index}."
                sites = (
                    [f"{at}self_attn.{name}" for name in layer.attention.inputs],
                    [f"{at}self_attn.o_proj.weight"],
                    [f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight"],
                    [f"{at}mlp.down_proj.weight"],
                )
                for site, weights in enumerate(sites):
                    self._add(self.array[(i * len(every) + layer.index) * 4 + site], adapter, weights)

    def _add(self, update: decode.Update, adapter: Factors, weights: list[str]) -> None:
        downs = [adapter.tensors[factor_name(weight, "A")].float() for weight in weights]
        ups = [(adapter.tensors[factor_name(weight, "B")].float() * (adapter.alpha / adapter.rank)).t().contiguous() for weight in weights]
        down = torch.cat(downs)
        self._kept += [down, *ups]
        update.parts, update.rank, update.inner, update.down = len(weights), adapter.rank, down.shape[1], down.data_ptr()
        for part, up in enumerate(ups):
            update.up[part], update.outputs[part] = up.data_ptr(), up.shape[1]
        self.narrow = max(self.narrow, len(down))


class CompiledNetwork:
    """`forward` and `draft` in C. Each row's result is the same, bit for bit, whatever other rows its step has.

    blocks: size of the cache. threads: at most 255. expert_bytes: keep at most so many bytes of experts in memory; 0: no limit.
    processor: compile for another processor than this one. adapters: whose numbers `Rows.adapters` has. two_digits: products whose rows are
    rounded to two digits of 8 bits instead of one, by their names in `decode.TWO_DIGITS`: more exact, and twice the work (with AVX2 alone:
    the same). After a step with `Rows.shares`, `used` (rows,) has each row's experts, summed over layers; otherwise it is None.
    """

    def __init__(
        self, c: ModelConfig, weights: PackedWeights, format: str, blocks: int, threads: int, expert_bytes: int = 0,
        processor: str | None = None, adapters: Sequence[Factors] = (), two_digits: tuple[str, ...] = ("first", "o", "down"),
    ):  # fmt: skip
        self.c, self.packed_weights, self.format = c, weights, format
        self._library = library(processor)
        if self._library is None:
            raise UserError("the compiled step needs a C compiler (cc)")
        every = len(layers(c))
        mla = c.attention == "mla"
        width = layers(c)[0].attention.cache_width
        self.cache = torch.empty(blocks, every, BLOCK, width)  # takes memory only where it is written
        self._turns = torch.view_as_real(rotary_table(c, c.max_position_embeddings)).contiguous()
        self._layers = (decode.Layer * every)(*(self._layer(i) for i in range(every)))
        moe = bool(mixtures(c))
        self._struct = decode.ModelStruct(
            hidden=c.hidden_size, heads=c.num_heads, nope=c.qk_nope_head_dim, rope=c.qk_rope_head_dim, value=c.v_head_dim,
            latent=c.kv_lora_rank, q_rank=c.q_lora_rank or 0, kv_heads=c.num_kv_heads, head_dim=c.head_dim, latent_attention=int(mla),
            experts=c.n_routed_experts if moe else 0, chosen=c.num_experts_per_tok, least=1, groups=c.n_group, chosen_groups=c.topk_group,
            scoring=decode.SCORING[c.scoring_func], normalise=int(c.norm_topk_prob), expert_width=c.moe_intermediate_size,
            digits=sum(decode.TWO_DIGITS[name] for name in two_digits),
            layers=c.num_layers, all_layers=every, width=width, embed_bf16=int(format != "float32"),
            quantised=int(format in ("int8", "int4")), eps=c.rms_norm_eps, scale=softmax_scale(c), routed_scale=c.routed_scaling_factor,
            embed=weights.address("embed") if "embed" in weights.parts else None, final_norm=weights.address("norm"),
            rotary=self._turns.data_ptr(), cache=self.cache.data_ptr(),
            head=self._matrix("head"), draft_head=self._matrix("draft_head"), layer=self._layers,
        )  # fmt: skip
        self._draft_words: np.ndarray | None = None
        if "draft_words" in weights.parts:
            part = weights.parts["draft_words"]
            self._draft_words = weights.data[part.offset : part.offset + part.bytes].view(torch.int32).numpy()
        if expert_bytes and moe:
            self._limit_experts(expert_bytes)
        self._updates = Updates(c, adapters)
        self._struct.updates, self._struct.narrow = self._updates.array, self._updates.narrow
        self._batch = decode.Batch()
        self._all_experts = np.ones(every, np.float32)
        self.used: np.ndarray | None = None
        self.routes: np.ndarray | None = None
        self.threads = threads
        """Threads that compute a step; may be lowered, and raised again, between steps."""
        self._struct.pool = self._library.pool_open(min(threads, 255))

    def _matrix(self, name: str) -> Matrix:
        weights, part = self.packed_weights, self.packed_weights.parts.get(name)
        return Matrix(decode.FORMATS[part.format], part.outputs, part.inner, weights.address(name), part.stride) if part else Matrix()

    def _layer(self, i: int) -> decode.Layer:
        layer, weights = decode.Layer(), self.packed_weights
        for name, kind in layer._fields_:
            part = f"{i}.{name}"
            setattr(layer, name, self._matrix(part) if kind is Matrix else weights.address(part) if part in weights.parts else None)
        return layer

    @property
    def min_experts(self) -> int:
        """Experts that every token uses in each layer, whatever `Rows.shares` says."""
        return self._struct.least

    @min_experts.setter
    def min_experts(self, count: int) -> None:
        self._struct.least = count

    def _limit_experts(self, most: int) -> None:
        size = max(part.stride for name, part in self.packed_weights.parts.items() if name.endswith("expert_gate_up"))
        slots = most // size
        if slots < 1:
            raise UserError(f"{most} bytes for experts: one takes {size}")
        count = self._struct.all_layers * self.c.n_routed_experts
        self._arena = (
            torch.empty(slots * size, dtype=torch.uint8),  # takes memory only where it is written
            torch.zeros(count, dtype=torch.int64),
            torch.zeros(2, slots, dtype=torch.int64),
        )
        arena, place, (owner, used) = self._arena
        self._struct.residency = decode.Residency(
            slots=slots, file=self.packed_weights.file, base=self.packed_weights.data.data_ptr(), arena=arena.data_ptr(),
            place=place.data_ptr(), owner=owner.data_ptr(), used=used.data_ptr(),
        )  # fmt: skip
        self._expert_size = size

    def close(self) -> None:
        """Stop the threads and free their buffers."""
        self._library.pool_close(self._struct.pool)
        self._library.release(self._struct)

    def metrics(self) -> dict[str, int]:
        """Experts read from disk since the start, and bytes of them in memory now; empty without a limit."""
        r = self._struct.residency
        if not r.slots:
            return {}
        size = self._expert_size
        return {"expert_loads_total": r.loads, "expert_bytes": r.taken * size, "expert_bytes_limit": r.slots * size}

    def forward(self, rows: Rows) -> np.ndarray:
        """(wanted, V) float32 logits. Writes the rows into the cache, and their last hidden states (rows, D) into `hidden`."""
        return self._run(rows, 0, None)

    def draft(self, rows: Rows, before: np.ndarray) -> np.ndarray:
        """The MTP module's logits, -inf for words that it never drafts. Each row's token is the one after its position; before: (rows, D)
        hidden states at the positions."""
        found = self._run(rows, 1, np.ascontiguousarray(before))
        if self._draft_words is None:
            return found
        logits = np.full((len(found), self.c.vocab_size), -np.inf, np.float32)
        logits[:, self._draft_words] = found
        return logits

    def _run(self, rows: Rows, mtp: int, before: np.ndarray | None) -> np.ndarray:
        count, wanted, widest = len(rows.tokens), len(rows.wanted), max(map(len, rows.tables))
        integers = [*rows.tokens, *rows.positions, *rows.owners, *rows.wanted, *rows.first]
        for table in rows.tables:
            integers += table
            integers += [0] * (widest - len(table))
        packed = np.array(integers, np.int32)
        self.hidden = np.empty((count, self.c.hidden_size), np.float32)
        words = self.c.vocab_size if self._draft_words is None or not mtp else len(self._draft_words)
        logits = np.empty((wanted, -(-words // 16) * 16), np.float32)
        b, at = self._batch, address(packed)
        b.rows, b.wanted, b.table_stride, b.mtp = count, wanted, widest, mtp
        b.tokens, b.positions, b.owners, b.wanted_rows = (at + 4 * count * i for i in range(4))
        at += 4 * (3 * count + wanted)
        b.first = at if rows.first else None
        b.tables = at + 4 * len(rows.first)
        b.before, b.after, b.logits = None if before is None else address(before), address(self.hidden), address(logits)
        self.used = b.shares = b.used = None
        if rows.shares:
            shares = np.array([rows.shares.get(i, self._all_experts) for i in range(len(rows.tables))], np.float32)
            self.used = np.zeros(count, np.int32)
            b.shares, b.used = address(shares), address(self.used)
        self.routes, b.routes = _no_routes(self.c, count) if rows.routes else None, None
        if self.routes is not None:
            b.routes = address(self.routes)
        b.adapters = None
        if rows.adapters:
            adapters = np.array([rows.adapters.get(i, -1) for i in range(len(rows.tables))], np.int32)
            b.adapters = address(adapters)
        self._library.forward(self._struct, b, max(rows.positions) + 1, self.threads)
        return logits[:, :words]
