"""The pre-training loss of a model on tensors, part by part."""

from types import SimpleNamespace

from sparing.data.loader import Batch
from sparing.train.objective import NextToken


def loss_of(model, tokens, targets, documents=None, *, weights=None, denominator=None, share=1.0, **options):
    """-> total (to differentiate), loss, mtp_loss and balance. options: NextToken's."""
    objective = NextToken(model.config, **options)
    found = objective(model, Batch(tokens, targets, documents, weights), denominator, share)
    parts = dict(zip(objective.parts, found.parts, strict=True))
    zero = found.parts.new_zeros(())
    return SimpleNamespace(
        total=found.total, loss=parts["loss"], mtp_loss=parts.get("mtp_loss", zero), balance=parts.get("balance_loss", zero)
    )
