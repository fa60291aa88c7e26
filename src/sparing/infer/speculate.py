"""Drafts from the model's own MTP module (DeepSeek-V3 §2.2), to be verified by the model in its next step.

The module reads the hidden state of a position and the token after it, and predicts the one after that; for longer drafts it reads its own
output. Its cache is a layer more in the same blocks. A text whose module has not run from the start attends to where it has.
"""

from __future__ import annotations

import numpy as np

from sparing.infer.compiled import CompiledNetwork
from sparing.infer.network import Rows, TorchNetwork
from sparing.infer.sample import choose
from sparing.infer.scheduler import Share


def propose(network: CompiledNetwork | TorchNetwork, shares: list[Share], length: int) -> None:
    """Set the draft of every text that goes on after this step: up to `length` tokens, none where `length` is 0.

    `shares`: the step that was just computed; `network.hidden` are its rows' hidden states.
    """
    rows, before, asked = Rows(), [], []
    for share in shares:
        text = share.text
        text.draft = []
        if length == 0 or not text.blocks:
            continue
        start, end = share.start, text.computed
        if text.module_end != start:
            text.module_first = start
        text.module_end = end
        complete = end == len(text.tokens) - 1
        rows.add(text.blocks, text.tokens[start + 1 : end + 1], start, int(complete))
        rows.first += [text.module_first] * (end - start)
        before.append(network.hidden[share.row : share.row + end - start])
        if complete:
            asked.append(text)
    if not rows.tokens:
        return
    logits = network.draft(rows, before[0] if len(before) == 1 else np.concatenate(before))
    for ahead in range(length):
        going, again = Rows(), []
        for i, (text, line) in enumerate(zip(asked, logits, strict=True)):
            room = text.max_tokens - (len(text.tokens) - len(text.request.prompt)) - 1
            if ahead >= room:
                continue
            s, at = text.request.sampling, len(text.tokens) + ahead
            token = choose(line, s, text.request.seed, at, edit=False)
            text.draft.append(token)
            if ahead + 1 < length:
                going.add(text.blocks, [token], text.computed + ahead, 1)
                going.first.append(text.module_first)
                again.append((i, text))
        if not again:
            return
        asked = [text for _, text in again]
        hidden = network.hidden[rows.wanted][[i for i, _ in again]]
        logits, rows = network.draft(going, hidden), going
