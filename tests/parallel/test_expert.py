"""Where tokens go when experts are divided among ranks."""

import torch

from sparing.base.config import ModelConfig
from sparing.model.experts import Router


def most_visited(**groups) -> int:
    """Of 200 tokens, the most ranks that one visits, of four that hold four experts each, as `AllToAll` divides them."""
    router = Router(ModelConfig(hidden_size=32, n_routed_experts=16, num_experts_per_tok=6, **groups))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(16, 32, generator=generator))
        ranks = router(torch.randn(200, 32, generator=generator)).experts_NK // 4
    return max(len(set(row)) for row in ranks.tolist())


def test_a_token_visits_as_many_ranks_as_it_may_choose_groups():
    assert most_visited() == 4
    assert [most_visited(n_group=4, topk_group=count) for count in (2, 3)] == [2, 3]
    assert most_visited(n_group=2, topk_group=1) == 2
