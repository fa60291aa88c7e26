"""The configuration of a run, as frozen dataclasses. Nothing is computed or read from disk here.

`ModelConfig` speaks DeepSeek-V3's language (`config.json` of the published checkpoints, in brackets where our name differs);
dense feed-forward, grouped-query attention, biases, head norms and other gates are values of the same fields, so that models of other
families (`sparing.interop.families`) are configurations too. `None` in a field that `resolve` fills in means "derive it"; a resolved
`Config` has none of those left.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


class UserError(ValueError):
    """The user's mistake: one clear line saying what is wrong, where, and the nearest valid choice. The CLI exits with 2."""


class CannotGoOn(RuntimeError):
    """A run that could not go on for a reason that is nobody's slip, in one line. The CLI exits with 3."""


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071; DeepSeek-V3 §4.3). Field names are those of `rope_scaling`."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class Llama3RopeConfig:
    """Llama 3.1's context extension: long waves of the rotary embedding are stretched by `factor`, short ones are kept. Field names are
    those of `rope_scaling`."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    """Waves longer than original_max_position_embeddings / low_freq_factor are stretched by the whole factor."""
    high_freq_factor: float = 4.0
    """Waves shorter than original_max_position_embeddings / high_freq_factor are kept."""
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model (DeepSeek-V3, arXiv 2412.19437 §2)."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 6
    """Decoder layers, MTP modules not counted [num_hidden_layers]."""
    num_dense_layers: int = 1
    """Leading layers with a dense feed-forward [first_k_dense_replace]; equal to num_layers: an all-dense model."""
    intermediate_size: int = 768
    """Width of the dense feed-forward."""

    attention: Literal["mla", "gqa"] = "mla"
    num_heads: int = 4
    num_kv_heads: int = 4
    """GQA only: key-value heads."""
    head_dim: int = 64
    """GQA only: width of a head."""
    attention_bias: bool = False
    """GQA only: the projections to queries, keys and values have biases (Qwen2)."""
    head_norm: bool = False
    """GQA only: RMS norms of each query and key head before they are rotated (Qwen3) [use_qk_norm]."""
    partial_rotary_factor: float = 1.0
    """GQA only: share of a head that is rotated by its position."""
    q_lora_rank: int | None = 128
    """MLA: rank of the query compression; None: queries are projected directly."""
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64

    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["sigmoid", "softmax", "sqrtsoftplus"] = "sigmoid"
    selection_bias: bool = True
    """The router has biases that loss-free balancing moves and that only its choice reads [topk_method noaux_tc], and scores a group by its
    two best experts. False: no biases, and a group counts as much as its best expert [greedy, group_limited_greedy]."""
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5

    mtp_depth: int = 0
    """Multi-token prediction modules, each with a MoE block [num_nextn_predict_layers]."""

    rope_theta: float = 10000.0
    yarn: YarnConfig | None = None
    llama3: Llama3RopeConfig | None = None
    linear_rope_factor: float = 1.0
    """All waves of the rotary embedding are stretched by this factor [rope_scaling linear]."""
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    init: Literal["deepseek", "scaled"] = "scaled"
    """Initial weights: `deepseek`: normal(0, 0.006) everywhere, as published; `scaled`: 1/sqrt(fan-in), zero output projections."""


@dataclass(frozen=True)
class DataConfig:
    paths: tuple[str, ...] = ()
    """Files, folders and globs; empty: the Python standard library's own source."""
    text_key: str = "text"
    """JSONL and Parquet: the field that holds the text."""
    extract: Literal["resiliparse", "trafilatura"] = "resiliparse"
    """What takes the main text out of the pages of WARC files."""
    tokenizer: str | None = None
    """A tokenizer.json to use instead of training one."""
    holdout_fraction: float = 0.02
    """Share of documents held out, chosen by a hash of their content."""
    max_tokens: int | None = None
    """Tokenise at most about this many tokens (documents sampled by hash); None: everything."""
    workers: int | None = None
    """Processes that tokenise; None: one per core."""
    sample: tuple[str, ...] = ()
    """Text of the kind that is wanted: of `paths` what is most like it is learnt, as much as the budget trains on; empty: all of it."""


@dataclass(frozen=True)
class OptimConfig:
    matrix: Literal["muon", "adamw"] = "muon"
    """Optimizer of the hidden matrices; embeddings, head, router, norms and biases always use AdamW."""
    lr: float = 0.02
    """Peak learning rate of the matrices (Muon's scale is sqrt(max(1, rows/columns)))."""
    lr_embed: float = 0.3
    lr_head: float = 0.004
    lr_router: float = 0.005
    lr_norm: float = 0.015
    momentum: float = 0.95
    beta1: float = 0.8
    beta2: float = 0.99
    eps: float = 1e-10
    weight_decay: float = 0.05
    """Decoupled weight decay of the matrices, scaled by the schedule."""
    ns_steps: int = 5
    """Newton-Schulz iterations of Muon."""
    clip: float = 1.0
    """Clip the global gradient norm; 0: off (the norm is logged all the same)."""
    warmup: float = 0.02
    """Share of the run spent on linear warm-up."""
    decay: float = 0.65
    """Share of the run spent on linear decay, which ends where the budget ends."""
    final_lr: float = 0.02
    """Learning rate at the end, as a share of the peak."""


@dataclass(frozen=True)
class TrainConfig:
    seq_len: int = 512
    short_seq_len: int | None = None
    """Cut rows into pieces of this length at first: attention costs less, and early on the far context is not used."""
    short_until: float = 0.7
    """Share of the run trained on the short pieces."""
    batch_size: int = 16
    """Sequences per optimizer step, over all micro-batches and ranks."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; None: measured."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type; master weights are float32."""
    device: Literal["cpu", "cuda"] | None = None
    """None: the GPU where there is one."""
    kernels: Literal["tiles", "vectors", "compiled", "plain"] | None = None
    """What computes on a CPU: PyTorch's own operations (plain), our compiled kernels with PyTorch's matrix products (compiled), or with our
    own, by vectors (float32, or bfloat16 with AVX512_BF16) or AMX (tiles, of bfloat16); None: measured."""
    threads: int | None = None
    """CPU threads; None: measured."""
    replicas: int | None = None
    """Threads that each take a share of a micro-batch's rows with one thread an operation, instead of `threads` in each operation; 1: off;
    None: measured."""
    compile: bool | None = None
    """torch.compile; None: measured, used only where it wins."""
    recompute: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    document_mask: bool = True
    """Attention stays inside a document."""
    mtp_weight: float = 0.3
    """Lambda of the MTP loss (DeepSeek-V3 §2.2)."""
    bias_update_rate: float = 0.001
    """Gamma of loss-free balancing (DeepSeek-V3 §2.1.2)."""
    sequence_balance: float = 0.0001
    """Alpha of the sequence-wise balance loss."""
    seed: int = 0
    eval_bytes: int = 200_000
    """Evaluation inside a run reads at most this much held-out text."""
    eval_context: int | None = None
    """Tokens that evaluations read at a time; None: seq_len."""
    evals: int = 4
    """Evaluations inside the run besides the last one."""
    checkpoint_interval_s: float | None = None
    """Seconds between checkpoints (token and FLOP budgets: converted into steps once, and kept). None: 60; with a budget in time, once the
    run has been killed, what loses least time at that rate (`budget.spot.young_daly`)."""
    log: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go besides metrics.jsonl."""


@dataclass(frozen=True)
class PrecisionConfig:
    """Eight bits where they are safe (DeepSeek-V3, arXiv 2412.19437 §3.3): arithmetic, then storage; docs/precision.md has their worth."""

    linear: Literal["none", "int8", "fp8", "fp8_row", "auto"] = "none"
    """Products of the decoder's linears, forward and both gradients; embedding, head, router, norms and softmax never. auto: measured."""
    error_budget: float = 0.1
    """Largest relative error of a product against 16 bits; a linear that makes more gets finer blocks, then 16 bits."""
    measure_every: int = 100
    """Steps between measurements of that error; 0: only faults (infinities, NaN, blocks lost) move a linear."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """Master weights; bfloat16 ones need a compensation."""
    compensation: Literal["stochastic", "kahan"] = "stochastic"
    """How bfloat16 weights keep updates smaller than half their last bit; kahan: in 8 bits more."""
    moments: Literal["float32", "int8"] = "float32"
    """The optimizer's averages; int8: in blocks with a scale each."""
    activations: Literal["full", "int8"] = "full"
    """What the backward pass keeps of a layer's inputs."""


@dataclass(frozen=True)
class Budget:
    """A number with a unit; `parse_budget` (sparing.budget.units) reads `20m`, `50Mtok`, `3e17flop`, `$5`, `0.2kWh`."""

    amount: float
    unit: Literal["s", "tok", "flop", "usd", "kwh"]


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is divided where several ranks train (`sparing launch`); losses do not depend on it, nor do checkpoints."""

    shard: Literal["nothing", "optimizer", "weights"] | None = None
    """What each rank has only a share of, besides its rows of a batch: nothing; the optimizer's averages and updates (ZeRO stage 1, arXiv
    1910.02054); weights and gradients too, which are put together layer by layer where they are needed (stage 3). None: derived."""
    experts: int = 1
    """Among so many ranks each mixture's experts are divided; tokens travel to them (DeepSeek-V3 §3.2.2)."""
    stages: int = 1
    """So many ranks form a pipeline: each holds some of the layers, and micro-batches go from rank to rank. Pipelines divide the rows."""
    schedule: Literal["1f1b", "interleaved", "zbv", "dualpipev"] = "1f1b"
    """In which order a pipeline computes micro-batches (`parallel/schedules.py`); all but 1f1b give each rank two chunks of layers."""


@dataclass(frozen=True)
class StartConfig:
    """The run whose weights, tokenizer and model shape a run begins with."""

    run: str = ""
    """Its folder."""
    weights_sha256: str = ""
    """SHA-256 of its weights/model.safetensors."""


@dataclass(frozen=True)
class AdapterConfig:
    """Low-rank updates beside the frozen weights of another run (LoRA, arXiv 2106.09685): all linears of attention and feed-forward."""

    rank: int = 16
    alpha: float = 32.0
    """An update is alpha / rank times the product of its two factors."""
    base: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """How the frozen weights are held while the factors learn; None: bfloat16 where products are computed in it, else float32."""


@dataclass(frozen=True)
class EsftConfig:
    """Expert-specialised fine-tuning (ESFT, arXiv 2407.01906): of a mixture's routed experts those learn that the conversations use most,
    and everything else stays."""

    score: Literal["gate", "token"] = "gate"
    """What an expert's share in its layer is of: gate weight, or choices of tokens."""
    share: float = 0.1
    """The fewest experts of a layer that together have this share; the paper's 0.1 for gate and 0.2 for token are derived."""
    tokens: int = 131_072
    """Of the training conversations, which the scores are of."""
    shared: bool = False
    """Shared experts learn too."""
    rest: bool = False
    """All else learns too but the experts that are not chosen, shared experts, routers and MTP modules."""
    experts: tuple[str, ...] = ()
    """Those that learn, layer by layer, such as "1: 3 7"; none: to be chosen."""


@dataclass(frozen=True)
class ChatsConfig:
    """Learning to answer (supervised fine-tuning): `data.paths` are conversations, and only their answers are learnt."""

    val: tuple[str, ...] = ()
    """Files of conversations to score on; none: a part of the others, held out by a hash of the first question."""
    keep: tuple[str, ...] = ()
    """Text whose loss is watched, so that forgetting shows; none: what the base writes by itself."""


@dataclass(frozen=True)
class GrowthConfig:
    """Experts that were grown beside a model, one of each layer for each domain; all else is, to the last bit, the model without them (its
    root)."""

    domains: tuple[str, ...] = ()
    """Their names in ascending order. Theirs are the last of the routed experts, in this order."""
    domain: str = ""
    """The one that this run learns or has learnt; empty: its experts were learnt by other runs."""
    root_sha256: str = ""
    """SHA-256 of the root's weights/model.safetensors."""
    stored: Literal["float32", "bfloat16"] = "float32"
    """What the root's matrices are stored in there."""
    dense: bool = False
    """The root is dense: its feed-forwards are the shared experts, and routed expert 0 of each layer does nothing."""
    eps: float = 3e-3
    """Share of old text's tokens, in each layer, that may wake a domain's expert."""
    width: int | None = None
    """Of an expert beside a dense root; None: a quarter of the feed-forward's, or the next part that divides it."""
    tokens: int = 16_384
    """Of old text as of the domain's, from which the routers learn which is which."""
    keep: tuple[str, ...] = ()
    """Files of old text, which the experts are to leave alone; none: what the run writes by itself."""
    apart: tuple[str, ...] = ()
    """Files of other domains' text, from which the routers learn to tell this domain."""


@dataclass(frozen=True)
class DistillConfig:
    """Learning what another model says comes next (distillation): a share of the loss is of words that this teacher drew."""

    teacher: str = ""
    """Its run folder; it has the student's tokenizer."""
    weights_sha256: str = ""
    """SHA-256 of its weights."""
    samples: int = 12
    """Words that it draws at each position."""
    truth: float = 0.2
    """Share of the loss that is of the text's own next token."""
    tokens: int | None = None
    """Positions at which it is asked: the first that the student reads; None: as many as the budget pays for."""
    teacher_share: float = 0.5
    """Of a time budget, at most, for the teacher; derived."""
    on_policy: bool = False
    """The student learns at texts that it writes itself, and not at those of the corpus."""
    prompt: int = 16
    """On-policy: tokens of the corpus with which its texts begin."""


@dataclass(frozen=True)
class DraftsConfig:
    """A module that drafts is learnt beside a frozen model."""

    words: int = 4096
    """The commonest of the text, among which it chooses; a multiple of 16."""
    samples: int = 12
    """Words that are drawn from the model's distribution at each position."""


@dataclass(frozen=True)
class DpoConfig:
    """Learning from pairs of answers, of which one is better (DPO, arXiv 2305.18290): `data.paths` are such pairs."""

    beta: float = 0.1
    """How much a pair's margin over the start's counts: the smaller, the further the model may move."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: the paper's; ipo: a margin of 1 / (2 beta) per token and no more (arXiv 2310.12036)."""
    label_smoothing: float = 0.0
    """Share of the pairs that are taken to be the wrong way round; of `sigmoid`."""


@dataclass(frozen=True)
class GrpoConfig:
    """Learning from rewards: the model answers problems, and answers that are worth more than others of their group become likelier."""

    task: str = ""
    """A file of problems, or a built-in task: add, countdown, gsm8k."""
    data: tuple[str, ...] = ()
    """gsm8k's own files."""
    kind: Literal["dr_grpo", "grpo", "dapo", "gspo", "cispo"] = "dr_grpo"
    """How answers are weighed, and how far a step may go (`adapt/policy.py` has the papers)."""
    problems: int = 16
    """In a rollout."""
    samples: int = 8
    """Answers to each, a group; `train.batch_size` is what an update learns from."""
    pass_at: int = 1
    """Learns for one right answer among so many (pass@k); 1: for each to be right. Larger: hard problems count more."""
    max_tokens: int = 128
    """Of an answer."""
    updates: int = 1
    """Steps that learn from one rollout, each from a part of its problems; 1: on-policy."""
    epsilon_low: float | None = None
    """How far a ratio may fall below 1; None: the kind's own."""
    epsilon_high: float | None = None
    """How far it may rise above 1; None: the kind's own."""
    truncate: float = 2.0
    """On-policy: the largest weight that corrects what sampled for what learns (truncated as in arXiv 1802.01561)."""
    mask_cut: bool | None = None
    """Answers that were cut off at max_tokens are not learnt from; None: so for dapo alone."""
    replay: bool = True
    """A mixture's tokens are learnt through the experts that they were sampled through."""
    weights: Literal["float32", "bfloat16", "int8"] | None = None
    """What rollouts are computed with; None: the fastest here."""
    scored: int = 64
    """Held-out problems of an evaluation, each answered `samples` times."""


@dataclass(frozen=True)
class UseConfig:
    """Learning from use: answers that people accepted or corrected, kept only where trusted answers and old text say so."""

    data: tuple[str, ...] = ()
    """Files of such answers; what of them is learnt is in `data.paths`."""
    check: tuple[str, ...] = ()
    """Files of trusted conversations, which are never learnt."""
    old_limit: float = 0.001
    """Share by which the loss of old text may rise."""


@dataclass(frozen=True)
class ReasonConfig:
    """Learning to reason by stages, each a run of its own in this run's folder: worked answers, rewards, right answers of its own, and a
    smaller model that is taught those (`adapt/reason.py`)."""

    task: str = ""
    """A file of problems, or a built-in task: add, countdown, gsm8k."""
    data: tuple[str, ...] = ()
    """gsm8k's own files."""
    cold: tuple[str, ...] = ()
    """Files of conversations with worked answers; none: those that the task has."""
    student: str = ""
    """The run of a smaller model that is taught too; empty: none is."""
    method: Literal["lora", "full"] = "lora"
    """What learns in each stage."""
    samples: int = 4
    """Answers to each problem, of which the right ones are kept."""
    kept: int = 1
    """Right answers to a problem that are kept at most, the shortest first."""


@dataclass(frozen=True)
class TokensConfig:
    """Ids of the tokens that begin and end a text, as an imported model has them."""

    bos: int | None = None
    """The token that begins a text."""
    add_bos: bool = False
    """Prompts and documents begin with `bos`."""
    eos: tuple[int, ...] = ()
    """Each ends an answer: the tokenizer's end token first, then the others, such as the end of a turn."""


@dataclass(frozen=True)
class Config:
    """One run, fully resolved."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    budget: Budget = field(default_factory=lambda: Budget(300.0, "s"))
    start: StartConfig | None = None
    """None: random weights from train.seed."""
    adapter: AdapterConfig | None = None
    """None: the weights themselves learn; otherwise those of `start.run` stay, and only updates beside them learn."""
    esft: EsftConfig | None = None
    """None: what learns is not limited to chosen experts."""
    chats: ChatsConfig | None = None
    """None: texts are learnt as they are."""
    growth: GrowthConfig | None = None
    """None: no experts were grown beside the model."""
    distill: DistillConfig | None = None
    """None: nobody teaches."""
    drafts: DraftsConfig | None = None
    """None: what learns is not limited to a module that drafts."""
    dpo: DpoConfig | None = None
    """None: answers are learnt as they are, and not one against another."""
    grpo: GrpoConfig | None = None
    """None: texts or answers are given, and not sampled and judged."""
    use: UseConfig | None = None
    """None: what was learnt is kept, whatever it does to what was known."""
    reason: ReasonConfig | None = None
    """None: one run, and not one that is made of several."""
    tokens: TokensConfig | None = None
    """None: what the tokenizer's names say; the end-of-text token also begins every text."""
