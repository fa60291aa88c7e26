"""MODEL_CARD.md: what a run made, in a form that model hubs read."""

from __future__ import annotations

from sparing.base.config import Config
from sparing.base.layers import mixtures


def model_card(config: Config, summary: dict, cache_bytes: int) -> str:
    """Markdown text. summary: what `train` returns; cache_bytes: of the decoder's cache, a token."""
    m, bits = config.model, summary["bpb"]
    kind = f"mixture of {m.n_routed_experts} experts, {m.num_experts_per_tok} a token" if mixtures(m) else "dense"
    score = "not evaluated" if bits is None else f"{bits:.4f} bits per byte"
    return f"""# Model card

A {kind} language model of {summary["parameters"]:,} parameters ({summary["active_parameters"]:,} active), trained with Sparing.

- Data: {", ".join(config.data.paths) or "the Python standard library's source"}; {summary["tokens"]:,} tokens in {summary["steps"]:,} steps
- Held-out text: {score} (context {config.train.seq_len} tokens)
- Vocabulary {m.vocab_size:,}, {m.num_layers} layers of width {m.hidden_size}, {cache_bytes:,} bytes of cache per token (16 bit)
- Budget {summary["budget"]}; the whole recipe is in config.toml

It continues text. It was not taught to follow instructions, and what it says may be false.
"""
