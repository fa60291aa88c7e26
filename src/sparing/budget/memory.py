"""Predicts the memory of training from the configuration: what `model/` and `kernels/` keep, part by part.

Weights, gradients and moments are float32, activations the compute type, unless `[precision]` keeps them in fewer bits. Gradients appear
while activations go, but in pieces of other sizes: the allocator holds part of both, or little (`kernels/native.py`).
N tokens of a micro-batch, D hidden size, H heads, K and V their widths, E experts, F their width, S rows that reach experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sparing.base.config import AdapterConfig, Config, ModelConfig, PrecisionConfig
from sparing.base.config_limits import chosen_experts
from sparing.base.held import held_as, held_bytes_of
from sparing.base.layers import FeedForward, Layer, layers, shapes
from sparing.budget.flops import expert_weights, factor_weights, kv_cache_bytes, parameters
from sparing.kernels.sizes import ATTENTION_ROWS, EXPERT_ROWS, FLOAT_HEAD_TOKENS, HEAD_TOKENS, MOMENT_BLOCK, OWN_HEAD_TOKENS

FULL = PrecisionConfig()

PROCESS_BYTES = {"cpu": 337e6, "cuda": 900e6}
"""A process without its model: interpreter, torch, the libraries that its first step loads. CPU: fitted, with REUSED,
on the resident peaks of eight models of 0.4-121 M parameters, dense and mixtures, in full and in few bits (LAB.md; torch
2.13, glibc); less the 77 MB of torch's compiler, which nothing imports any more. CUDA: an estimate."""
REUSED = {False: 0.5, True: 1.0}
"""Share of the gradients that lies where activations were; with pages given back, or handed on, all."""
MUON_BYTES = 12.0
"""Work space for each number of the largest group of equally shaped matrices, where they are orthogonalised together (plain kernels)."""
CORPUS_BYTES = 95e6
"""What a run of `train` has more: tokenizer, corpus, metrics, evaluations. With PROCESS_BYTES what runs of 0.2-17 M active parameters were
fitted to (LAB.md)."""
HEAP_OF_GROUPS = 2.0
"""A mixture without compiled kernels, in what it keeps, measured by a run: its experts' rows have other numbers in every step, so what was
freed seldom fits the next. Fitted to one mixture, in runs of 80 s and 5 minutes (LAB.md); dense models need nothing of the kind."""
SERVING_BYTES = 300e6
"""A process that only generates."""
SPREAD = 0.12
"""Half-width of the stated interval, as a share."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of a micro-batch at the end of its forward pass, 16-bit copies of weights and the head's work space included."""
    process: float
    """All else: libraries, work space, what the allocator holds back."""
    reused: float = 0.0
    """Of these, what is there twice in the sum: gradients where activations were."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.process - self.reused


def matrix_weights(c: ModelConfig) -> int:
    """Weights that Muon updates: everything in layers but routers and norms."""
    return sum(layer.common + layer.feed_forward.routed - layer.feed_forward.router for layer in layers(c))


def weight_bytes(c: ModelConfig, p: PrecisionConfig = FULL) -> float:
    """Of the weights, and of their gradients; routers and norms are float32 always."""
    narrow = matrix_weights(c) + (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
    return 4.0 * (parameters(c).total + parameters(c).mtp) - (2.0 * narrow if p.weights == "bfloat16" else 0.0)


def optimizer_bytes(c: ModelConfig, matrix: str, p: PrecisionConfig = FULL) -> float:
    """Moments: one number a weight under Muon, two under AdamW; a remainder of a byte for each bfloat16 weight where one is kept."""
    total = parameters(c).total + parameters(c).mtp
    numbers = matrix_weights(c) + 2 * (total - matrix_weights(c)) if matrix == "muon" else 2 * total
    remainder = (4.0 * total - weight_bytes(c, p)) / 2 if p.compensation == "kahan" else 0.0
    return numbers * (4.0 if p.moments == "float32" else 1.0 + 4.0 / min(MOMENT_BLOCK, c.hidden_size)) + remainder


def _largest_group(c: ModelConfig) -> float:
    """Numbers in the largest batch of equally shaped matrices: Muon orthogonalises them together."""
    every = [layer.feed_forward for layer in layers(c)]
    stacks = sum(f.experts * 2 * f.width * f.hidden for f in every)
    return max(stacks, sum(2 * f.width * f.hidden for f in every if not f.mixture))


def held_bytes(c: ModelConfig, adapter: AdapterConfig, dtype: str) -> float:
    """Of frozen weights as `adapter.base` holds them (None: as `dtype`), scales included; routers, norms and biases are float32."""
    base = adapter.base or dtype
    return float(sum(held_bytes_of(shape, held_as(name, shape, base)) for name, shape in shapes(c).items()))


KernelPath = Literal["plain", "passes", "products", "cuda"]
"""Which kernels run: plain ones, our compiled passes (`kernels/native.py`), those with our own products, PyTorch's on a GPU."""


def path_of(config: Config, compiled: bool = True, own: bool = True) -> KernelPath:
    """compiled: there is a C compiler. own: whether our own products will be chosen, where `train.kernels` is open. Compiled kernels want
    one thread an operation."""
    t = config.train
    if t.device == "cuda":
        return "cuda"
    if not compiled or t.kernels == "plain" or not (t.threads == 1 or (t.replicas or 1) > 1):
        return "plain"
    if t.kernels is not None:
        own = t.kernels == "vectors" or (t.kernels == "tiles" and t.dtype == "bfloat16")
    return "products" if own else "passes"


def saved_per_token(
    layer: Layer, seq_len: int, size: int, path: KernelPath = "plain", balance: bool = True, eight_bit: bool = False
) -> float:
    """Bytes that a layer keeps of one token for its backward pass. size: bytes of a number in the compute type."""
    a, f, D = layer.attention, layer.feed_forward, layer.hidden
    H, K, V = a.heads, a.key, a.value
    fused = path in ("passes", "products")
    # What can be normed or gathered again is not kept by fused kernels.
    numbers = (3 if fused else 4) * D  # of two norms: the rows, normed or (fused) not, and what the projections take
    shared = a.kv_heads if a.kind == "gqa" and fused else H  # the plain path repeats keys and values for every query head
    numbers += H * K + shared * (K + V) + H * V  # q, k, v laid out for attention, and its output
    if a.kind == "mla":
        numbers += (1 if fused else 2) * (a.latent + (a.query_rank or 0)) + (a.rope if fused else 0)
        numbers += H * K if fused and a.query_rank is None else 0
    if a.head_norm and not fused:  # the compiled sub-layer keeps what it norms in the place of what it normed
        numbers += (H + a.kv_heads) * (K + 4 / size)
    if path == "cuda":
        numbers += H * V + H * max(0, K - V)
    elif path != "products":  # the probabilities of row blocks: a block's rows up to the diagonal's end
        block = ATTENTION_ROWS if shared == H else ATTENTION_ROWS // 2
        ends = range(min(block, seq_len), seq_len + block, block)
        numbers += H * sum(min(block, seq_len - end + block) * min(end, seq_len) for end in ends) / seq_len
    kept = 2 if fused else 3  # the compiled passes make the gated activations again
    scales = 4 * (6 + H + 2 * shared) if eight_bit else 0  # of rows: a head's queries, keys and values are rows of their own
    size = 1 if eight_bit else size
    numbers += kept * f.common_width
    if not f.mixture:
        return size * (numbers - fused * D) + scales
    rows = f.chosen
    per_row = (0 if fused else D) + 2 * f.width + 1 + (2 * f.width if path == "cuda" else 0)
    copied = 2 if eight_bit else 4 if size == 2 else 0  # the router's input in float32, which float32 rows are already
    router = copied * D + 4 * f.experts * (3 if balance else 1) + rows * (8 + 4 + 4 + 8)
    return size * (numbers + rows * per_row) + scales + router + rows * 8


def filler_bytes(f: FeedForward, size: int, again: bool) -> float:
    """Rows that fill each expert's group up to a multiple of EXPERT_ROWS on a CPU, on average half of one, in one layer. again: what goes
    into the experts is gathered again for the backward pass."""
    return f.experts * EXPERT_ROWS / 2 * (size * ((0 if again else f.hidden) + 2 * f.width + 1) + 8)


def _copied(some: Iterable[Layer], path: KernelPath, whole: bool) -> float:
    """Weights that the plain kernels keep in the compute type too: all but a CPU's experts; of 16-bit ones those that are joined."""
    count = 0
    for layer in some:
        a, f = layer.attention, layer.feed_forward
        if whole:
            count += layer.common + f.routed - f.router - (f.routed if path == "plain" else 0)
        else:
            joined = sum(a.shapes[name][0] for name in a.inputs) if a.kind == "mla" else 0
            count += (joined + 2 * f.common_width) * layer.hidden
    return count


def _ends(c: ModelConfig) -> tuple[Layer, Layer]:
    """The first and the last decoder layer: a dense one and a mixture, where the model has both."""
    return layers(c)[0], layers(c)[c.num_layers - 1]


def kept_by(config: Config, some: Iterable[Layer], rows: int, seq_len: int, path: KernelPath = "plain") -> float:
    """Bytes that some of the layers keep of `rows` sequences."""
    t = config.train
    size = 2 if t.dtype == "bfloat16" else 4
    tokens = rows * seq_len
    eight_bit = config.precision.activations == "int8" and size == 2 and not t.recompute
    kept = 0.0
    for layer in some:
        if t.recompute:
            kept += tokens * layer.hidden * size
            continue
        kept += tokens * saved_per_token(layer, seq_len, size, path, t.sequence_balance > 0, eight_bit)
        if layer.mixture and path in ("plain", "passes"):
            kept += filler_bytes(layer.feed_forward, size, again=path == "passes")
    return kept


def kept_behind(config: Config, rows: int, seq_len: int) -> float:
    """Bytes that are kept behind the layers: of `rows` sequences, and the gradient of the head."""
    c = config.model
    size, heads = 2 if config.train.dtype == "bfloat16" else 4, 1 + c.mtp_depth
    # Last norms, their gradients; the MTP modules' joined inputs.
    kept = float(size * rows * seq_len * c.hidden_size * (2 * heads + 4 * c.mtp_depth))
    if config.adapter is None and (config.esft is None or config.esft.rest):  # made in the forward pass
        kept += (heads * 4 if config.precision.weights == "float32" else 4 + heads * 2) * c.vocab_size * c.hidden_size
    return kept


def copies_of(config: Config, some: Iterable[Layer], path: KernelPath) -> float:
    """Bytes of the 16-bit copies of their weights that some of the layers keep of each micro-batch; recomputed ones have one at a time."""
    t = config.train
    if t.dtype != "bfloat16" or t.recompute or config.adapter is not None or path not in ("plain", "cuda"):
        return 0.0
    return 2.0 * _copied(some, path, config.precision.weights == "float32")


def activations(config: Config, rows: int, seq_len: int, path: KernelPath = "plain") -> float:
    """Bytes kept of `rows` sequences, 16-bit copies of the weights included."""
    c, t = config.model, config.train
    size = 2 if t.dtype == "bfloat16" else 4
    kept = kept_by(config, layers(c), rows, seq_len, path) + kept_behind(config, rows, seq_len) + copies_of(config, layers(c), path)
    if t.recompute:  # one layer at a time is whole
        kept += rows * seq_len * max(saved_per_token(layer, seq_len, size, path) for layer in _ends(c))
    return kept + (rows * seq_len**2 * size if t.document_mask else 0.0)


def head_bytes(config: Config, path: KernelPath) -> float:
    """Work space of the output head."""
    c = config.model
    size = 2 if config.train.dtype == "bfloat16" else 4
    if path == "products":  # its rows are packed a few at a time
        return (OWN_HEAD_TOKENS if size == 2 else FLOAT_HEAD_TOKENS) * c.vocab_size * size
    return 2 * HEAD_TOKENS * c.vocab_size * size + c.vocab_size * c.hidden_size * size


def training_memory(config: Config, measured: bool = False, path: KernelPath | None = None) -> Memory:
    """Peak of one training process. Micro-batch and replicas left open count as the whole batch and one.

    measured: by a run of `train`, with its corpus and evaluations.
    """
    c, t = config.model, config.train
    path = path or path_of(config)
    replicas = t.replicas or 1
    size = 2 if t.dtype == "bfloat16" else 4
    micro = min(t.micro_batch_size or t.batch_size, t.batch_size)
    rows = -(-micro // replicas)
    seq_len = t.seq_len
    p = config.precision
    small = p.weights != "float32" or p.moments != "float32"
    weights, moments = weight_bytes(c, p), optimizer_bytes(c, config.optim.matrix, p)
    kept = replicas * activations(config, rows, seq_len, path)
    head = replicas * head_bytes(config, path)
    device = t.device or "cpu"
    # The compiled update works matrix by matrix, on less than a layer's backward pass takes besides what was kept.
    work = max(rows * seq_len * saved_per_token(layer, seq_len, size, path) for layer in _ends(c)) * replicas
    if config.optim.matrix == "muon" and path != "products" and not small:
        work = max(work, MUON_BYTES * _largest_group(c))
    if p.weights == "bfloat16":  # a layer's gradients, before they are rounded
        work += 4 * max(layer.feed_forward.common + layer.feed_forward.routed for layer in _ends(c)) * replicas
    learned = weights
    if config.adapter is not None:
        learned = 4.0 * factor_weights(c, config.adapter.rank)[0]
        weights, moments = held_bytes(c, config.adapter, t.dtype) + learned, 2.0 * learned
        if config.adapter.base in ("int8", "int4") and path != "products":  # the head is multiplied as floats
            head += c.vocab_size * c.hidden_size * size
    elif config.esft is not None:
        count = sum(map(len, chosen_experts(config).values()))
        learned = 4.0 * expert_weights(c, config.esft, count or None)
        moments = 2.0 * learned
    # Twins' gradients are added to the first model's as soon as both are there.
    gradients = learned
    process = PROCESS_BYTES[device] + work
    if measured and device == "cpu":
        process += CORPUS_BYTES
    if measured and path == "plain" and any(layer.mixture for layer in layers(c)):
        process += HEAP_OF_GROUPS * (activations(config, micro, seq_len, "plain") + head / replicas + weights)
    reused = REUSED[gives_back(p) or (device == "cpu" and path != "plain")] * min(gradients, kept)
    if micro < t.batch_size:  # the gradients of one micro-batch are there while the next one's activations come
        reused = 0.0
    return Memory(weights, gradients, moments, kept + head, process, reused)


def gives_back(p: PrecisionConfig) -> bool:
    """Whether training in this precision gives the memory of dead tensors back to the system (`kernels/native.py`)."""
    return (p.weights, p.moments, p.activations) != (FULL.weights, FULL.moments, FULL.activations)


def serving_memory(c: ModelConfig, context: int) -> float:
    """Bytes to serve a model: 16-bit weights, the cache of one full context, and the process."""
    return 2.0 * parameters(c).total + context * kv_cache_bytes(c) + SERVING_BYTES
