"""Which part of a layer's weights a rank holds: whole experts (expert parallelism) or a slice of each (tensor
parallelism). No communication; :mod:`.distributed` computes with the parts."""

from collections.abc import Mapping

import torch

from .formats import BLOCK

__all__ = [
    "expert_parallel_map",
    "expert_parallel_owner",
    "expert_parallel_range",
    "expert_parallel_shard",
    "tensor_parallel_range",
    "tensor_parallel_shard",
]


def check_rank(function: str, name: str, rank: int, size: int) -> None:
    """Raises ValueError unless there is such a rank; ``name`` of its arguments: ``tp`` or ``ep``."""
    if not 0 <= rank < size:
        raise ValueError(f"{function}: {name}_rank is {rank}; it takes 0 to {name}_size - 1, {size - 1}")


def expert_parallel_range(num_experts: int, ep_rank: int, ep_size: int) -> tuple[int, int]:
    """The routed experts [start, stop) that a rank holds: as even as they come, the first ranks one more if need be.

    Raises:
        ValueError: there is no such rank, or there are fewer experts than ranks.
    """
    check_rank("expert_parallel_map", "ep", ep_rank, ep_size)
    if ep_size > num_experts:
        raise ValueError(f"expert_parallel_map: ep_size is {ep_size}; it takes at most {num_experts}, one expert each")
    fewest, more = num_experts // ep_size, num_experts % ep_size
    start = ep_rank * fewest + min(ep_rank, more)
    return start, start + fewest + (ep_rank < more)


def expert_parallel_map(
    num_experts: int, ep_rank: int, ep_size: int, *, num_shared_experts: int = 0, device: torch.device | None = None
) -> torch.Tensor:
    """``fused_moe``'s ``expert_map`` of a rank that holds :func:`expert_parallel_range`: int32, the local expert or -1.

    [num_experts + num_shared_experts]: ids from ``num_experts`` on are shared experts, which every rank holds behind
    its routed ones. On the CPU unless ``device`` says otherwise.
    """
    start, stop = expert_parallel_range(num_experts, ep_rank, ep_size)
    result = torch.full((num_experts + num_shared_experts,), -1, dtype=torch.int32, device="cpu")
    local = torch.arange(stop - start + num_shared_experts, dtype=torch.int32, device="cpu")
    result[start:stop] = local[: stop - start]
    result[num_experts:] = local[stop - start :]
    return result.to(device)


def expert_parallel_owner(num_experts: int, ep_size: int, *, device: torch.device | None = None) -> torch.Tensor:
    """The rank that holds each routed expert, [num_experts] int32, where each holds :func:`expert_parallel_range`."""
    owner = torch.empty(num_experts, dtype=torch.int32, device="cpu")
    for rank in range(ep_size):
        start, stop = expert_parallel_range(num_experts, rank, ep_size)
        owner[start:stop] = rank
    return owner.to(device)


def tensor_parallel_range(intermediate_size: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """The part [start, stop) of a model's intermediate size that a rank holds: whole blocks of 32.

    As even as they come: the usual I / tp_size wherever that is divisible by 32. Whole blocks, so that a rank rounds
    its part of the intermediate to the same MXFP8 bytes as one that holds all of it.

    Raises:
        ValueError: there is no such rank, or fewer blocks than ranks, or no whole number of them.
    """
    check_rank("tensor_parallel_range", "tp", tp_rank, tp_size)
    blocks, rest = intermediate_size // BLOCK, intermediate_size % BLOCK
    of = f"an intermediate size of {intermediate_size}"
    if rest:
        raise ValueError(f"tensor_parallel_range: {of} is given; it takes a multiple of {BLOCK}")
    if tp_size > blocks:
        takes = f"at most {blocks}, the blocks of {BLOCK} in {of}"
        raise ValueError(f"tensor_parallel_range: tp_size is {tp_size}; it takes {takes}")
    return BLOCK * (blocks * tp_rank // tp_size), BLOCK * (blocks * (tp_rank + 1) // tp_size)


def expert_parallel_shard(
    weights: Mapping[str, torch.Tensor], ep_rank: int, ep_size: int, *, num_shared_experts: int = 0
) -> dict[str, torch.Tensor]:
    """A rank's experts out of all of them: its :func:`expert_parallel_range`, then the shared ones.

    Args:
        weights: ``w1``, ``w1_scale``, ``w2``, ``w2_scale`` and, if there are any, ``w1_bias`` and ``w2_bias``, as
            ``fused_moe`` takes them, in layout ``row_major``; the last ``num_shared_experts`` experts are shared.

    Returns:
        The same names; views, if there is no shared expert.
    """
    num_experts = weights["w1"].shape[0] - num_shared_experts
    start, stop = expert_parallel_range(num_experts, ep_rank, ep_size)

    def part(x: torch.Tensor) -> torch.Tensor:
        if not num_shared_experts:
            return x[start:stop]
        return torch.cat([y.view(torch.uint8) for y in (x[start:stop], x[num_experts:])]).view(x.dtype)

    return {name: part(x) for name, x in weights.items()}


def tensor_parallel_shard(weights: Mapping[str, torch.Tensor], tp_rank: int, tp_size: int) -> dict[str, torch.Tensor]:
    """A rank's slice of every expert: its :func:`tensor_parallel_range`.

    Args:
        weights: as :func:`expert_parallel_shard` takes them.

    Returns:
        The same names, contiguous copies: w1, its scale and its bias cut in both halves of their rows, w2 and its scale
        in their columns. ``w2_bias`` stays whole: ``distributed.fused_moe_tp`` adds it on one rank.
    """
    start, stop = tensor_parallel_range(weights["w2"].shape[2], tp_rank, tp_size)

    def part(name: str, x: torch.Tensor) -> torch.Tensor:
        if name == "w2_bias":
            return x
        if name.startswith("w1"):
            return x.unflatten(1, (2, -1))[:, :, start:stop].flatten(1, 2).contiguous()
        step = 1 if name == "w2" else BLOCK
        return x[:, :, start // step : stop // step].contiguous()

    return {name: part(name, x) for name, x in weights.items()}
