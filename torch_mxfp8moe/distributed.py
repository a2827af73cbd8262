"""One mixture-of-experts layer on many devices: expert and tensor parallelism of :func:`torch_mxfp8moe.fused_moe`.

====================== ========================== ====================== ========================== =================
function               weights of a rank          tokens of a rank       collectives                host reads
====================== ========================== ====================== ========================== =================
fused_moe_ep_allgather its experts                its own, T of them     all-gather, reduce-scatter none
fused_moe_ep_alltoall  its experts                its own, any number    all-to-all, twice          split sizes, or none
fused_moe_ep_allreduce its experts                all                    all-reduce                 none
fused_moe_tp           a slice of I of all        all                    all-reduce                 none
====================== ========================== ====================== ========================== =================

:mod:`.sharding` says which experts and which slices a rank holds, :class:`.Mxfp8Experts` holds them, and
:func:`arguments_of` makes a call's arguments of one.

Underneath is ``torch.distributed`` and nothing else, so NCCL, RCCL or gloo, by its functional collectives: a compiled
model keeps one graph, and what reads nothing on the host can be captured in a CUDA or HIP graph. Tokens travel as what
the experts would round them to anyway (MXFP8 codes and scale bytes, or bf16), so that a rank computes with the same
bytes as one that holds everything. Each token goes with its routing as one row of bytes: one collective, not four.

Every rank of the group calls the same function, with the same options and the same dtypes. Arguments are checked before
anything is sent, but a rank that raises leaves the others waiting until the group's timeout, or until its process ends.

Conventions: ids are global, ``expert_map`` gives a rank's local expert of each, every routed expert is held by exactly
one rank. The last ``num_shared_experts`` ids are shared experts fused into the layer, which every rank holds as its
last local experts; each of their routes is computed once, by the rank whose token it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from . import ops
from .arguments import FusedMoe
from .experts import Mxfp8Experts
from .formats import as_bytes

__all__ = [
    "arguments_of",
    "fused_moe_ep_allgather",
    "fused_moe_ep_allreduce",
    "fused_moe_ep_alltoall",
    "fused_moe_tp",
    "gather_expert_owner",
]

ROW_ALIGNMENT = 16
"""Bytes that the rows which ranks send to one another are rounded up to, so that each token starts aligned."""

# --- what travels


_c10d = torch.ops._c10d_functional
"""torch.distributed's functional collectives. (The Python functions over them return a tensor subclass outside of a
compiler, and torch 2.13 renamed two.)"""


def _wait(x: torch.Tensor) -> torch.Tensor:
    return _c10d.wait_tensor(x)


def _members(group: dist.ProcessGroup | None) -> tuple[str, int, int]:
    """The group's name, this process's rank in it, and its size."""
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is a {type(group).__name__}; it takes a torch.distributed.ProcessGroup that this process is in, or "
            "None for the default one, after init_process_group"
        )
    return group.group_name, group.rank(), group.size()


class _Tokens(NamedTuple):
    """What the experts read of tokens: what travels."""

    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_weights: torch.Tensor
    """fp32."""
    topk_ids: torch.Tensor
    """int32, -1 for a route that adds nothing."""

    def packed(self) -> torch.Tensor:
        """[T, bytes of a row] uint8. A row of 0xFF is one without routes."""
        parts = [self.hidden_states, self.topk_weights, self.topk_ids]
        parts += [] if self.hidden_states_scale is None else [self.hidden_states_scale]
        # One column has any stride, and .view(dtype) takes 1: unsqueeze(1) gives it that.
        parts = [part.squeeze(1).unsqueeze(1) if part.shape[1] == 1 else part for part in parts]
        parts = [part.contiguous().view(torch.uint8) for part in parts]
        padding = -sum(part.shape[1] for part in parts) % ROW_ALIGNMENT
        if padding:
            parts.append(parts[0].new_full((parts[0].shape[0], padding), 255))
        return torch.cat(parts, 1)

    def unpacked(self, rows: torch.Tensor) -> "_Tokens":
        """``rows`` that :meth:`packed` of tokens like these made, here or on another rank: views of them."""

        def views():
            start = 0
            for like in (self.hidden_states, self.topk_weights, self.topk_ids, self.hidden_states_scale):
                if like is not None:
                    size = like.shape[1] * like.element_size()
                    yield rows[:, start : start + size].view(like.dtype)
                    start += size

        x, topk_weights, topk_ids, *scale = views()
        return _Tokens(x, scale[0] if scale else None, topk_weights, topk_ids)


Mine = Callable[[torch.Tensor], torch.Tensor]
"""Of row numbers [R], the mask of those that are this rank's. Asked only where shared experts make it matter."""


def _without_routes(rows: torch.Tensor, count: int) -> torch.Tensor:
    """``rows`` with ``count`` more behind them that have no routes."""
    return F.pad(rows, (0, 0, 0, count), value=255)


def _known_ids(topk_ids: torch.Tensor, known: int, num_tokens: torch.Tensor | None) -> torch.Tensor:
    """int32, -1 for ids that name none of ``known`` experts and in rows that are not real."""
    real = (topk_ids >= 0) & (topk_ids < known)  # before the cast: 2^32 + 3 is not 3
    if num_tokens is not None:
        real &= (torch.arange(topk_ids.shape[0], device=topk_ids.device) < num_tokens.reshape(())).unsqueeze(-1)
    return topk_ids.where(real, -1).int()


def _tokens(
    hidden_states, hidden_states_scale, topk_weights, topk_ids, known, num_tokens, quantize_dispatch, options
) -> _Tokens:
    """The tokens as they travel: hidden states rounded as the experts would round them."""
    mxfp8 = options.get("activation_dtype", "mxfp8") == "mxfp8"
    if quantize_dispatch is None:
        # aiter, who reads that layout, quantises by itself and takes no quantised activations
        quantize_dispatch = mxfp8 and options.get("layout", "row_major") != "aiter_gfx950"
    if hidden_states_scale is not None:
        hidden_states_scale = as_bytes(hidden_states_scale)
    elif quantize_dispatch:
        if not mxfp8:
            raise ValueError("quantize_dispatch is True with bf16 activations; it takes activation_dtype 'mxfp8'")
        hidden_states, hidden_states_scale = ops.quantize_1x32(hidden_states)
    elif not mxfp8:
        hidden_states = hidden_states.to(torch.bfloat16)
    return _Tokens(
        hidden_states, hidden_states_scale, topk_weights.float(), _known_ids(topk_ids, known, num_tokens)
    )


def _shared_once(
    topk_ids: torch.Tensor, mine: Mine, expert_map: torch.Tensor, num_shared_experts: int
) -> torch.Tensor:
    """ids [R, K] without the routes to shared experts in rows that are not ``mine``."""
    if not num_shared_experts:
        return topk_ids
    routed = expert_map.shape[0] - num_shared_experts
    row = torch.arange(topk_ids.shape[0], device=topk_ids.device)
    return topk_ids.where(mine(row).unsqueeze(-1) | (topk_ids < routed), -1)


def _checked(
    hidden_states, w1, w1_scale, w2, w2_scale, topk_weights, topk_ids, **options
) -> torch.dtype:
    """The result's dtype. Raises what ``fused_moe`` would for this rank's arguments, before anything is sent."""
    if options.pop("out", None) is not None:
        raise TypeError("out is given; it takes none: the result of a collective is a new tensor")
    tensors = (hidden_states, w1, w1_scale, w2, w2_scale, topk_weights, topk_ids)
    out_dtype, scaled = options["out_dtype"], options.get("hidden_states_scale") is not None
    if not torch.compiler.is_compiling():
        call = FusedMoe(*tensors, **options)
        call.check_once() if type(hidden_states) is torch.Tensor else call.check()
    elif torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError("the distributed fused_moe is inference only, but an input requires a gradient")
    return out_dtype or (torch.bfloat16 if scaled else hidden_states.dtype)


def _check_map(expert_map: torch.Tensor | None, num_shared_experts: int) -> None:
    """What expert parallelism asks of a map that :func:`_checked` has seen."""
    if expert_map is None:
        raise TypeError("expert_map is None; it takes a tensor, int32 [G]")
    if num_shared_experts and not 0 < num_shared_experts < expert_map.shape[0]:
        takes = f"0 to {expert_map.shape[0] - 1}, fewer than the ids of expert_map"
        raise ValueError(f"num_shared_experts is {num_shared_experts}; it takes {takes}")


def _check_owner(expert_owner: torch.Tensor, routed: int, device: torch.device) -> None:
    if expert_owner.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expert_owner has dtype {str(expert_owner.dtype)[6:]}; it takes int32 or int64")
    if list(expert_owner.shape) != [routed]:
        takes = f"[{routed}], the ids of expert_map that are no shared experts"
        raise ValueError(f"expert_owner has shape {list(expert_owner.shape)}; it takes {takes}")
    if expert_owner.device != device:
        raise ValueError(f"expert_owner is on {expert_owner.device}; it takes the device of hidden_states, {device}")


def gather_expert_owner(
    expert_map: torch.Tensor, group: dist.ProcessGroup | None = None, *, num_shared_experts: int = 0
) -> torch.Tensor:
    """The rank of ``group`` that holds each routed expert, [G] int32, out of every rank's ``expert_map``.

    For placements that are not contiguous, at load: it communicates, and reads on the host.

    Args:
        expert_map: [G + num_shared_experts] int32 of this rank; -1 for an expert that it does not hold.

    Raises:
        ValueError, on every rank: an expert is held by no rank or by several.
    """
    name, _, world_size = _members(group)
    maps = _wait(_c10d.all_gather_into_tensor(expert_map.contiguous(), world_size, name)).view(world_size, -1)
    holds = maps[:, : maps.shape[1] - num_shared_experts] >= 0
    wrong = (holds.sum(0) != 1).nonzero().flatten().tolist()
    if wrong:
        holders = holds[:, wrong[0]].nonzero().flatten().tolist()
        raise ValueError(f"expert_map: expert {wrong[0]} is held by the ranks {holders}; it takes exactly one")
    return holds.int().argmax(0).int()


def arguments_of(
    experts: Mxfp8Experts, hidden_states: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, **more
) -> dict:
    """The arguments of a function of this module, but the group, for experts held by a ``nn.Module``.

    >>> fused_moe_ep_allgather(**arguments_of(experts, hidden_states, topk_weights, topk_ids), group=group)

    Adds the routes of the module's shared expert. ``experts`` has expert or tensor parallelism, as the function has.

    Args:
        hidden_states, topk_weights, topk_ids: of this rank's tokens, or of all, as the function takes them.
        **more: ``hidden_states_scale`` and ``num_tokens``, if there are any.
    """
    if experts.shared:
        topk_weights, topk_ids = experts.add_shared(topk_weights, topk_ids, every_token=True)
    arguments = experts.arguments(hidden_states, topk_weights, topk_ids, add_shared=False, **more)
    if experts.expert_map is not None:
        arguments["num_shared_experts"] = experts.num_shared
    return arguments


# --- the layer


Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""A rank's w1, w1_scale, w2 and w2_scale."""


def _partial(tokens: _Tokens, mine: Mine, weights: Weights, expert_map, num_shared_experts, options):
    """This rank's part of the sum, [R, H], for tokens of all ranks, of which ``mine`` are this rank's."""
    ids = _shared_once(tokens.topk_ids, mine, expert_map, num_shared_experts)
    return ops.fused_moe(
        tokens.hidden_states,
        *weights,
        tokens.topk_weights,
        ids,
        hidden_states_scale=tokens.hidden_states_scale,
        expert_map=expert_map,
        **options,
    )


def fused_moe_ep_allgather(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w1_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    expert_map: torch.Tensor,
    hidden_states_scale: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    max_tokens: int | None = None,
    num_shared_experts: int = 0,
    quantize_dispatch: bool | None = None,
    reduce_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    **options,
) -> torch.Tensor:
    """Expert parallelism for small batches: every rank computes its experts for the tokens of all ranks.

    All-gather of the tokens, ``fused_moe`` on the rank's experts, reduce-scatter of the sums. All sizes are fixed and
    nothing is read on the host: it can be captured in a CUDA or HIP graph.

    Args:
        hidden_states, topk_weights, topk_ids: of this rank's T tokens, as ``fused_moe`` takes them. T is the same on
            every rank unless ``max_tokens`` is given.
        w1, w1_scale, w2, w2_scale: this rank's experts.
        group: whose ranks share the experts; the default group if None.
        expert_map: [G] int32, as ``fused_moe`` takes it; :func:`.sharding.expert_parallel_map` makes one.
        hidden_states_scale: of hidden states that are MXFP8 already, on every rank.
        num_tokens: int32, one element on the device: how many of this rank's rows are real. May differ from rank to
            rank and change in place between replays of a graph.
        max_tokens: pad this rank's rows to so many before they are sent, the same number on every rank and T at least:
            with it T may differ from rank to rank, and be 0.
        num_shared_experts: how many of the last ids are shared experts, held by every rank.
        quantize_dispatch: send tokens as MXFP8 where they are not yet. Results do not depend on it. By default where
            the experts quantise them anyway, but in layout ``aiter_gfx950``, whose backend quantises by itself.
        reduce_dtype: what the ranks' sums are rounded to before they are added; that of the result by default.
        out_dtype: as for ``fused_moe``.
        **options: every other keyword of ``fused_moe``, but ``out``.

    Returns:
        [T, H], this rank's tokens through all ranks' experts. Bit for bit: what a rank adds is ``fused_moe`` on its
        experts and the tokens of all ranks in rank order. A token whose experts are all on one rank is that rank's
        result, and on two ranks the result is the two parts added and rounded; on more, the order in which they are
        added is the communication library's.

    Raises:
        What ``fused_moe`` raises for this rank's arguments, before anything is sent.
        RuntimeError (torch.distributed.DistBackendError): another rank died or did not come before the timeout.
    """
    weights = (w1, w1_scale, w2, w2_scale)
    name, rank, world_size = _members(group)
    result_dtype = _checked(
        hidden_states, *weights, topk_weights, topk_ids, hidden_states_scale=hidden_states_scale, expert_map=expert_map,
        num_tokens=num_tokens, out_dtype=out_dtype, **options,
    )  # fmt: skip
    _check_map(expert_map, num_shared_experts)
    T = hidden_states.shape[0]
    if max_tokens is not None:
        torch._check_value(T <= max_tokens, lambda: f"max_tokens is {max_tokens}; it takes {T} or more, T of this rank")
    tokens = _tokens(
        hidden_states, hidden_states_scale, topk_weights, topk_ids, expert_map.shape[0], num_tokens, quantize_dispatch,
        options,
    )  # fmt: skip
    rows = tokens.packed()
    if max_tokens is not None:
        rows = _without_routes(rows, max_tokens - T)
    count = rows.shape[0]
    gathered = _wait(_c10d.all_gather_into_tensor(rows, world_size, name))
    mine = lambda row: row // max(count, 1) == rank
    options |= dict(out_dtype=reduce_dtype or result_dtype)
    out = _partial(tokens.unpacked(gathered), mine, weights, expert_map, num_shared_experts, options)
    out = _wait(_c10d.reduce_scatter_tensor(out, "sum", world_size, name))
    return out[:T].to(result_dtype)


def fused_moe_ep_alltoall(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w1_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    expert_map: torch.Tensor,
    expert_owner: torch.Tensor,
    hidden_states_scale: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    capacity: int | None = None,
    num_shared_experts: int = 0,
    quantize_dispatch: bool | None = None,
    reduce_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    **options,
) -> torch.Tensor:
    """Expert parallelism for large batches: a token goes to the ranks that hold its experts, once to each.

    All-to-all of the tokens, ``fused_moe`` on the rank's experts, all-to-all of the sums back, which are added in fp32
    in the order of the ranks. T is any number on every rank, 0 included.

    Without ``capacity`` the numbers of tokens are exchanged and read on the host, one synchronisation, so it cannot be
    captured; inside ``torch.compile(fullgraph=True)`` that takes ``torch._dynamo.config.capture_scalar_outputs``. With
    ``capacity`` sizes are fixed and nothing is read.

    Args:
        expert_owner: [G - num_shared_experts] int32 or int64, the rank that holds each routed expert, as
            ``expert_map`` of all ranks says; :func:`.sharding.expert_parallel_owner`, or of other placements
            :func:`gather_expert_owner`. Where it names no rank of the group the expert adds nothing.
        capacity: tokens that a rank can send to each rank, the same number on all ranks; T of the rank with the most
            tokens is always enough. The results of a token that finds no room are NaN, never silently less.
        The others: as for :func:`fused_moe_ep_allgather`; T may differ without ``max_tokens``.

    Returns:
        [T, H], this rank's tokens through all ranks' experts.

    Raises:
        As :func:`fused_moe_ep_allgather`.
    """
    weights = (w1, w1_scale, w2, w2_scale)
    name, rank, world_size = _members(group)
    result_dtype = _checked(
        hidden_states, *weights, topk_weights, topk_ids, hidden_states_scale=hidden_states_scale, expert_map=expert_map,
        num_tokens=num_tokens, out_dtype=out_dtype, **options,
    )  # fmt: skip
    _check_map(expert_map, num_shared_experts)
    T, topk = topk_ids.shape
    device, routed = hidden_states.device, expert_map.shape[0] - num_shared_experts
    _check_owner(expert_owner, routed, device)
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity is {capacity}; it takes 1 or more tokens, or None")
    tokens = _tokens(
        hidden_states, hidden_states_scale, topk_weights, topk_ids, expert_map.shape[0], num_tokens, quantize_dispatch,
        options,
    )  # fmt: skip

    # Which rank each token goes to, and where its row lies among those that are sent: by rank, then by token.
    ids = tokens.topk_ids.long()
    owner = expert_owner.long()[ids.clamp(0, routed - 1)]
    owner = owner.where(ids < routed, rank).where(ids >= 0, -1)
    ranks = torch.arange(world_size, device=device)
    goes = (owner.unsqueeze(-1) == ranks).any(1)  # [T, ranks]
    place = goes.cumsum(0) - 1
    lost = exchanged = None
    # Every rank sends itself one row more, without routes: what comes back for it is zeros.
    if capacity is None:
        counts = goes.sum(0) + (ranks == rank)
        arriving = _wait(_c10d.all_to_all_single(counts, [1] * world_size, [1] * world_size, name))
        exchanged, most = torch.stack((counts, arriving)), T * world_size + 1
    else:
        lost = (goes & (place >= capacity)).any(1)
        goes &= place < capacity
        counts = torch.full_like(ranks, capacity + 1)
        most = world_size * (capacity + 1)
    first = counts.cumsum(0) - counts
    slot = (first + place).where(goes, most)
    source = torch.full((most + 1,), T, device=device)
    source = source.scatter(0, slot.flatten(), torch.arange(T, device=device).repeat_interleave(world_size))
    rows = _without_routes(tokens.packed(), 1)
    slot = slot.sort(1).values[:, : min(topk, world_size)]  # in the order of the ranks, those that are none last
    slot = slot.where(slot < most, first[rank] + counts[rank] - 1)

    # The device has all of that to do while the host waits for the numbers, and nothing afterwards until the host has
    # queued what depends on them.
    if capacity is not None:
        sent = got = [capacity + 1] * world_size
    else:
        assert exchanged is not None
        sent, got = exchanged.tolist()
    arrived = _wait(_c10d.all_to_all_single(rows[source.narrow(0, 0, sum(sent))], got, sent, name))
    start = sum(got[:rank])
    mine = lambda row: (row >= start) & (row < start + got[rank])
    options |= dict(out_dtype=reduce_dtype or result_dtype)
    out = _partial(tokens.unpacked(arrived), mine, weights, expert_map, num_shared_experts, options)
    parts = _wait(_c10d.all_to_all_single(out, sent, got, name))

    sums = parts[slot[:, 0]].float()
    for i in range(1, slot.shape[1]):
        sums = sums + parts[slot[:, i]].float()
    if lost is not None:
        sums = sums.masked_fill(lost.unsqueeze(-1), torch.nan)
    return sums.to(result_dtype)


def fused_moe_ep_allreduce(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w1_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    expert_map: torch.Tensor,
    num_shared_experts: int = 0,
    reduce_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    **options,
) -> torch.Tensor:
    """Expert parallelism where every rank has all tokens, as behind attention in tensor parallelism.

    ``fused_moe`` on the rank's experts, then one all-reduce. Can be captured in a graph.

    Args:
        hidden_states, topk_weights, topk_ids: of all T tokens, the same on every rank.
        The others: as for :func:`fused_moe_ep_allgather`, and ``hidden_states_scale`` and ``num_tokens`` as for
            ``fused_moe``. A shared expert's routes are dealt to the ranks, row by row.

    Returns:
        [T, H], the same on every rank as far as the communication library's all-reduce is.

    Raises:
        As :func:`fused_moe_ep_allgather`.
    """
    weights = (w1, w1_scale, w2, w2_scale)
    name, rank, world_size = _members(group)
    result_dtype = _checked(
        hidden_states, *weights, topk_weights, topk_ids, expert_map=expert_map, out_dtype=out_dtype, **options
    )
    _check_map(expert_map, num_shared_experts)
    ids = _shared_once(topk_ids, lambda row: row % world_size == rank, expert_map, num_shared_experts)
    options |= dict(out_dtype=reduce_dtype or result_dtype)
    out = ops.fused_moe(hidden_states, *weights, topk_weights, ids, expert_map=expert_map, **options)
    return _wait(_c10d.all_reduce(out, "sum", name)).to(result_dtype)


def fused_moe_tp(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w1_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    w2_bias: torch.Tensor | None = None,
    reduce_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    **options,
) -> torch.Tensor:
    """Tensor parallelism: every rank computes its slice of every expert, then one all-reduce.

    Can be captured in a graph. A shared expert that is fused into the layer is sliced like the others.

    Args:
        hidden_states, topk_weights, topk_ids: of all T tokens, the same on every rank.
        w1, w1_scale, w2, w2_scale: this rank's slices, whole blocks of 32 of I; :func:`.sharding.tensor_parallel_shard`
            makes them.
        w2_bias: [E, H], whole, on every rank: the first rank of the group adds it.
        reduce_dtype: as for :func:`fused_moe_ep_allgather`. On more than 8 ranks a 16-bit sum that is rounded at every
            hop of a ring leaves the contract's tolerance: take fp32.
        The others: ``w1_bias``, sliced, and the rest as for ``fused_moe``.

    Returns:
        [T, H], the same on every rank as far as the communication library's all-reduce is.

    Raises:
        As :func:`fused_moe_ep_allgather`.
    """
    weights = (w1, w1_scale, w2, w2_scale)
    name, rank, _ = _members(group)
    result_dtype = _checked(
        hidden_states, *weights, topk_weights, topk_ids, w2_bias=w2_bias, out_dtype=out_dtype, **options
    )
    options |= dict(w2_bias=w2_bias if rank == 0 else None, out_dtype=reduce_dtype or result_dtype)
    out = ops.fused_moe(hidden_states, *weights, topk_weights, topk_ids, **options)
    return _wait(_c10d.all_reduce(out, "sum", name)).to(result_dtype)
