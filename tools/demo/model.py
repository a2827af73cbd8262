"""A small mixture-of-experts language model in plain PyTorch, with experts in bf16; `torch_mxfp8moe.Mxfp8Experts` takes
their place where they are in MXFP8 (checkpoint.py).

Sizes in the docstrings: B sequences, T positions, N = B * T tokens, H hidden, I intermediate, E experts, K experts per
token, V vocabulary, S cache length, D head size.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [B, key-value heads, S, D]."""


@dataclasses.dataclass
class Config:
    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_local_experts: int = 16
    num_experts_per_tok: int = 4
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Bf16Experts(nn.Module):
    """SwiGLU experts as PyTorch runs them without a fused kernel; also what is trained (then in fp32 or autocast)."""

    def __init__(self, cfg: Config):
        super().__init__()
        e, h, i = cfg.num_local_experts, cfg.hidden_size, cfg.intermediate_size
        self.w1 = nn.Parameter(torch.empty(e, 2 * i, h))  # all gate rows, then all up rows
        self.w2 = nn.Parameter(torch.empty(e, h, i))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [N, H], routing weights [N, K], expert ids [N, K] -> [N, H]."""
        n, k = ids.shape
        e, i = self.w1.shape[0], self.w2.shape[2]
        if n * k <= e:  # a few tokens: read only the experts that they use
            gate, up = torch.matmul(self.w1[ids], x[:, None, :, None]).squeeze(-1).chunk(2, -1)  # [N, K, I] each
            h = F.silu(gate) * up * weights[..., None].to(gate.dtype)
            return torch.matmul(self.w2[ids], h[..., None]).squeeze(-1).sum(1)
        # Many tokens: all experts for all tokens, as two matrix products; what was not chosen has weight zero.
        every = torch.zeros(n, e, dtype=weights.dtype, device=x.device).scatter(1, ids, weights)
        gate, up = F.linear(x, self.w1.flatten(0, 1)).view(n, e, 2 * i).chunk(2, -1)  # [N, E, I] each
        h = F.silu(gate) * up * every[..., None].to(gate.dtype)
        return F.linear(h.flatten(1), self.w2.transpose(0, 1).flatten(1))


class MoE(nn.Module):
    """Top-k softmax router, chosen weights normalised to sum 1, in front of the experts."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.top_k = cfg.num_experts_per_tok
        self.gate = nn.Linear(cfg.hidden_size, cfg.num_local_experts, bias=False)
        self.experts = Bf16Experts(cfg)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, T, H] -> the same shape, and the load-balancing loss while training."""
        tokens = x.flatten(0, 1)
        probs = F.linear(tokens.float(), self.gate.weight.float()).softmax(-1)  # [N, E]
        weights, ids = probs.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        balance = None
        if self.training:  # 1 where all experts get the same share, E / K where K experts get everything
            share = torch.zeros_like(probs).scatter(1, ids, 1.0).mean(0) / self.top_k
            balance = (share * probs.mean(0)).sum() * probs.shape[1]
        return self.experts(tokens, weights, ids).view_as(x), balance


class Attention(nn.Module):
    """Grouped-query attention with RoPE and normalised queries and keys."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, cfg.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, cfg.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, cfg.rms_norm_eps)

    def forward(self, x: Tensor, rope: Tensor, position: Tensor | None, cache: Cache | None) -> Tensor:
        """x [B, T, H], rope [2, T, D] -> [B, T, H]. Without a cache: causal over the T tokens. With one: T is 1, the
        token stands at position [1] of the cache and sees what is before it."""
        b, t, _ = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(b, t, -1, self.head_dim).transpose(1, 2)

        q = rotate(self.q_norm(heads(self.q_proj(x))), rope)
        k = rotate(self.k_norm(heads(self.k_proj(x))), rope)
        v = heads(self.v_proj(x))
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            # Products and sums rather than matrix products of one row: the compiler makes single loops of them.
            k = cache[0].index_copy_(2, position, k)[:, :, None].float()
            v = cache[1].index_copy_(2, position, v)[:, :, None].float()
            q = q.view(b, self.kv_heads, -1, 1, self.head_dim).float() * self.head_dim**-0.5
            scores = (q * k).sum(-1)  # [B, key-value heads, heads per key-value head, S]
            later = torch.arange(scores.shape[-1], device=x.device) > position
            probs = scores.masked_fill(later, float("-inf")).softmax(-1)
            y = (probs[..., None] * v).sum(-2).to(x.dtype)
        return self.o_proj(y.reshape(b, t, -1))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """RoPE over the two halves of the last dimension: x [B, heads, T, D], rope [2, T, D] (cosines, sines)."""
    left, right = x.chunk(2, -1)
    return (x * rope[0] + torch.cat((-right, left), -1) * rope[1]).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, cfg: Config, dropout: float):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.block_sparse_moe = MoE(cfg)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rope: Tensor, position: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rope, position, cache))
        y, balance = self.block_sparse_moe(self.post_attention_layernorm(x))
        return x + self.dropout(y), balance


class Model(nn.Module):
    """Decoder with tied input and output embeddings."""

    def __init__(self, cfg: Config, dropout: float = 0.0):
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg, dropout) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)
        frequency = cfg.rope_theta ** -(torch.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        angle = torch.outer(torch.arange(cfg.max_position_embeddings), frequency).repeat(1, 2)
        self.register_buffer("rope", torch.stack((angle.cos(), angle.sin())), persistent=False)  # [2, S, D]

    def init_weights(self) -> None:
        """Normal(0, 0.02), smaller where a layer writes to the residual stream."""
        for name, p in self.named_parameters():
            if p.dim() > 1:
                out = name.endswith(("o_proj.weight", "experts.w2"))
                nn.init.normal_(p, std=0.02 / (2 * self.cfg.num_hidden_layers) ** 0.5 if out else 0.02)

    def new_cache(self, batch: int = 1) -> list[Cache]:
        """An empty cache for each layer."""
        cfg, like = self.cfg, self.embed_tokens.weight
        shape = (batch, cfg.num_key_value_heads, cfg.max_position_embeddings, cfg.head_dim)
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers]

    def hidden(
        self, tokens: Tensor, position: Tensor | None = None, cache: list[Cache] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """tokens [B, T] -> last hidden states [B, T, H], and the mean load-balancing loss while training."""
        rope = self.rope[:, : tokens.shape[1]] if position is None else self.rope[:, position]
        x = self.dropout(self.embed_tokens(tokens))
        balance = []
        for i, layer in enumerate(self.layers):
            x, b = layer(x, rope, position, None if cache is None else cache[i])
            balance.append(b)
        return self.norm(x), torch.stack(balance).mean() if self.training else None

    def forward(self, tokens: Tensor, position: Tensor | None = None, cache: list[Cache] | None = None) -> Tensor:
        """tokens [B, T] -> logits [B, T, V] in fp32. Without a cache: causal over the T tokens. With one: T is 1, the
        token stands at position [1], its keys and values are written there, and what is before it is seen."""
        return F.linear(self.hidden(tokens, position, cache)[0], self.embed_tokens.weight).float()


def mean_loss(model: Model, ids: Tensor, window: int = 0, batch: int = 2, progress=None) -> float:
    """Mean cross-entropy, in nats per token, of ids [n] cut into windows that are each read from an empty context."""
    window = window or model.cfg.max_position_embeddings
    total, done = 0.0, 0
    pieces = [ids[i : i + window + 1] for i in range(0, len(ids) - 1, window)]
    groups = [pieces[i : i + batch] for i in range(0, len(pieces), batch)]
    for group in groups:
        for size in {len(p) for p in group}:  # the last piece may be shorter
            rows = torch.stack([p for p in group if len(p) == size])
            logits = model(rows[:, :-1])
            total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
            done += rows[:, 1:].numel()
        if progress:
            progress(done / (len(ids) - 1))
    return total / done
