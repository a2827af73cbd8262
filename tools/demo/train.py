#!/usr/bin/env python3
"""Train the demo's MoE language model and save it in bf16 and in MXFP8.

The text is made by prepare_text.py. The checkpoint kept is the one with the lowest loss on the validation text; the
held-out text is read once, at the end. On one H100 the default settings take less than two minutes.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
from model import Config, Model, mean_loss
from tokenizer import Tokenizer

HERE = Path(__file__).parent


def parse_args() -> argparse.Namespace:
    size = Config()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", type=Path, default=HERE / "train.txt", help="training text, UTF-8")
    parser.add_argument("--valid", type=Path, default=HERE / "valid.txt", help="text that chooses the checkpoint")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.txt", help="text for the final perplexity")
    parser.add_argument("--out", type=Path, default=HERE / "trained", help="folder for the bf16 checkpoint")
    parser.add_argument("--weights", type=Path, help="also convert there, into mxfp8/ and bf16/ (see convert.py)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do not use torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("model")
    group.add_argument("--vocab", type=int, default=size.vocab_size, help="tokenizer size, at least 256")
    group.add_argument("--hidden", type=int, default=size.hidden_size, help="divisible by 64, the head size")
    group.add_argument(
        "--intermediate", type=int, default=size.intermediate_size, help="of one expert, divisible by 32"
    )
    group.add_argument("--layers", type=int, default=size.num_hidden_layers)
    group.add_argument("--experts", type=int, default=size.num_local_experts)
    group.add_argument("--top-k", type=int, default=size.num_experts_per_tok, help="experts per token")
    group.add_argument("--context", type=int, default=size.max_position_embeddings, help="tokens")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=2500)
    group.add_argument("--batch", type=int, default=64, help="sequences per step")
    group.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (warm-up, then cosine to 0)")
    group.add_argument("--weight-decay", type=float, default=0.1)
    group.add_argument("--dropout", type=float, default=0.25)
    group.add_argument("--balance", type=float, default=0.01, help="weight of the router's load-balancing loss")
    group.add_argument("--eval-every", type=int, default=100, help="steps between validations")
    return parser.parse_args()


def read(path: Path) -> str:
    if not path.exists():
        sys.exit(f"{path} does not exist; prepare_text.py makes it (see its --help)")
    return path.read_text(encoding="utf-8")


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    text = read(args.text)
    tokenizer = Tokenizer.train(text, args.vocab)
    train, valid, heldout = (
        torch.tensor(tokenizer.encode(t), device=args.device) for t in (text, read(args.valid), read(args.heldout))
    )
    heads = args.hidden // Config.head_dim
    cfg = Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        num_local_experts=args.experts,
        num_experts_per_tok=args.top_k,
        max_position_embeddings=args.context,
    )
    model = Model(cfg, args.dropout).to(args.device)
    model.init_weights()
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    print(f"{total:,} parameters, {experts:,} in experts; {len(train):,} training tokens, seed {args.seed}", flush=True)

    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=args.device == "cuda")
    valid_bytes, heldout_bytes = (len(read(p).encode()) for p in (args.valid, args.heldout))
    warmup = max(1, min(100, args.steps // 10))

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def loss_of(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rows [batch, context + 1] -> cross-entropy and load-balancing loss."""
        hidden, balance = model.hidden(rows[:, :-1])
        logits = F.linear(hidden, model.embed_tokens.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()), balance

    step_loss = torch.compile(loss_of) if args.compile else loss_of
    window = torch.arange(args.context + 1, device=args.device)
    autocast = torch.autocast(args.device, torch.bfloat16)
    best, best_state, start = math.inf, None, time.time()
    for step in range(1, args.steps + 1):
        at = torch.randint(len(train) - args.context, (args.batch, 1), device=args.device)
        with autocast:
            loss, balance = step_loss(train[at + window])
        (loss + args.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % args.eval_every == 0 or step == args.steps:
            model.eval()
            with torch.no_grad(), autocast:
                value = mean_loss(model, valid, batch=32) * (len(valid) - 1) / valid_bytes / math.log(2)
            model.train()
            if value < best:
                best, best_state = value, copy.deepcopy(model.state_dict())
            print(
                f"step {step:5d}  train loss {loss.item():.3f}  valid {value:.4f} bits per byte  "
                f"balance {balance.item():.3f}  {time.time() - start:.0f} s",
                flush=True,
            )

    model.load_state_dict(best_state)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(args.out / "tokenizer.json")
    checkpoint.write_config(args.out, cfg)
    checkpoint.write_tensors(args.out, checkpoint.export_bf16(model))
    saved = checkpoint.load_model(args.out, args.device)
    with torch.no_grad():
        loss = mean_loss(saved, heldout, batch=32)
    bits = loss * (len(heldout) - 1) / heldout_bytes / math.log(2)
    print(f"held-out text, bf16 checkpoint: perplexity {math.exp(loss):.3f} per token, {bits:.4f} bits per byte")
    print(f"saved {args.out}")
    if args.weights:
        from convert import convert

        convert(args.out, args.weights)
        print(f"saved {args.weights}/mxfp8 and {args.weights}/bf16")


if __name__ == "__main__":
    main()
