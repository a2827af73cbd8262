"""The routes in aiter's form: what :mod:`.kernel` computes in one launch, in plain PyTorch."""

import torch

from ...reference import local_experts


def routes(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    expert_map: torch.Tensor | None,
    num_tokens: torch.Tensor | None,
    experts: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """topk_ids and topk_weights [T, K] -> ids int32 [T, K + 1], weights fp32 [T, K + 1], mask int32 [E + 1].

    ids are the slots 0 to E - 1 of the local experts or E, the slot of no expert, which the mask, E ones and a zero,
    tells aiter to leave out. E is the slot of every route that adds nothing (:func:`.reference.local_experts`), of
    every route whose weight is zero (aiter's quantiser stores zeros for the token of such a route while the token's
    other routes store its values), and of the one that is added to each token, which aiter's tuned tables count on.

    Routes of one token to the same expert become one, the first, with the sum of their weights: aiter's sort has one
    place for each pair of a token and an expert, and loses all but one of them.
    """
    local = local_experts(topk_ids, expert_map, num_tokens, experts)
    weights = topk_weights.float()
    same = local.unsqueeze(2) == local.unsqueeze(1)  # [T, K, K]
    total = torch.where(same, weights.unsqueeze(1), 0).sum(2)
    first = ~same.tril(-1).any(2)
    live = (local >= 0) & first & (total != 0)
    pad = torch.nn.functional.pad
    ids = pad(torch.where(live, local, experts).int(), (0, 1), value=experts)
    mask = pad(torch.ones(experts, dtype=torch.int32, device=ids.device), (0, 1))
    return ids, pad(torch.where(live, total, 0), (0, 1)), mask
