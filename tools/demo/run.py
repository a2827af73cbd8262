#!/usr/bin/env python3
"""See a small MoE language model run on MXFP8 experts through torch.ops.mxfp8moe.fused_moe.

Loads one trained model twice, with its experts in bf16 and in MXFP8, compiles both with torch.compile(fullgraph=True),
writes text, and compares speed and perplexity. Takes about a minute on two CPU cores, half of it for compiling.
"""

import argparse
import codecs
import math
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

# Where other programs share the processor, OpenMP threads that spin while they wait cost far more than they save.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import torch
    import torch_mxfp8moe
    from safetensors import SafetensorError

    import checkpoint
    from model import Cache, Model, mean_loss
    from tokenizer import Tokenizer
except ImportError as error:
    sys.exit(f"{error}. The demo needs torch, safetensors and torch_mxfp8moe: run the command in the README.")

HERE = Path(__file__).parent
TIMED_STEPS, TIMED_SECONDS = 100, 4.0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n")[1],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--prompt", default='"My dear Mr. Bennet," said his lady', help="how the text begins")
    parser.add_argument(
        "--tokens",
        type=int,
        default=220,
        help="how many tokens to write (one is about 3 letters), then to the end of the sentence",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    parser.add_argument("--seed", type=int, default=1, help="of the sampling")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--backend", default="auto", help="who serves the op; auto takes the best that can")
    parser.add_argument(
        "--heldout-kb", type=int, default=0, metavar="KB", help="measure perplexity on so much text; 0: all"
    )
    parser.add_argument("--weights", type=Path, default=HERE / "weights", help="folder with mxfp8/ and bf16/")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.txt", help="text for the perplexity")
    return parser.parse_args()


def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def note(text: str) -> None:
    """How to read the figures above."""
    print("  -> " + text.replace("\n", "\n     "), flush=True)


def progress(label: str):
    """A callable that shows a fraction done, on one line of a terminal; 1.0 clears it."""

    def show(done: float) -> None:
        if sys.stdout.isatty():
            line = f"  {label}: {done:4.0%}"
            print("\r" + (" " * len(line) + "\r" if done >= 1 else line), end="", flush=True)

    return show


def compiled_step(model: Model, inner: str):
    """The decode step, compiled as one graph, and the list that its graphs are recorded in."""
    graphs = []
    compile_graph = torch._dynamo.lookup_backend(inner)

    def record(graph, inputs):
        graphs.append(graph)
        return compile_graph(graph, inputs)

    def step(token: torch.Tensor, position: torch.Tensor, cache: list[Cache]) -> torch.Tensor:
        """token [1, 1], position [1], a cache for each layer -> logits [V]."""
        return model(token, position, cache)[0, -1]

    return torch.compile(step, fullgraph=True, backend=record), graphs


def first_line(error: BaseException) -> str:
    """What an error of torch.compile says first, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def op_nodes(graphs: list) -> int:
    """How many nodes of the graphs, as captured, are the op."""
    targets = (torch.ops.mxfp8moe.fused_moe, torch.ops.mxfp8moe.fused_moe.default)
    return sum(node.target in targets for graph in graphs for node in graph.graph.nodes)


class Writer:
    """Prints bytes as text as they come, wrapped between words."""

    def __init__(self, width: int, indent: str = "  "):
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.width, self.indent, self.column, self.word = width, indent, 0, ""

    def write(self, piece: bytes, final: bool = False) -> None:
        for char in self.decode(piece, final):
            if char in " \n":
                self.flush()
                if char == "\n":
                    print()
                    self.column = 0
                else:
                    self.word = " "
            else:
                self.word += char
        if final:
            self.flush()
            print()

    def flush(self) -> None:
        if self.column and self.column + len(self.word) > self.width:
            print()
            self.column = 0
        if not self.column:
            self.word = self.word.lstrip()
            if self.word:
                print(self.indent, end="")
        print(self.word, end="", flush=True)
        self.column += len(self.word)
        self.word = ""


@torch.no_grad()
def write_text(step, model: Model, tokenizer: Tokenizer, args: argparse.Namespace) -> list[int]:
    """Prompt and continuation, printed token by token; returns all token ids."""
    ids = tokenizer.encode(args.prompt)
    generator = torch.Generator().manual_seed(args.seed)
    writer = Writer(min(shutil.get_terminal_size().columns, 100) - 4)
    writer.write(args.prompt.encode())
    cache, device = model.new_cache(), args.device
    enough = len(ids) + args.tokens
    for position in range(min(enough + 50, model.cfg.max_position_embeddings) - 1):
        logits = step(torch.tensor([[ids[position]]], device=device), torch.tensor([position], device=device), cache)
        if position + 1 < len(ids):
            continue
        if args.temperature > 0:
            probs = (logits.cpu() / args.temperature).softmax(-1)
            ids.append(torch.multinomial(probs, 1, generator=generator).item())
        else:
            ids.append(logits.argmax().item())
        writer.write(tokenizer.bytes[ids[-1]])
        if len(ids) >= enough and tokenizer.bytes[ids[-1]].rstrip(b'"').endswith((b".", b"!", b"?")):
            break
    writer.write(b"", final=True)
    return ids


@torch.no_grad()
def time_steps(step, model: Model, ids: list[int], device: str) -> list[float]:
    """Seconds of each decode step over the start of a text; reading the likeliest token waits for the device."""
    cache, seconds = model.new_cache(), []
    for position, token in enumerate(ids[:TIMED_STEPS]):
        if sum(seconds) > TIMED_SECONDS:
            break
        token, at = torch.tensor([[token]], device=device), torch.tensor([position], device=device)
        start = time.perf_counter()
        step(token, at, cache).argmax().item()
        seconds.append(time.perf_counter() - start)
    return seconds


def expert_bytes(model: Model) -> int:
    experts = [layer.block_sparse_moe.experts for layer in model.layers]
    return sum(t.nbytes for e in experts for t in [*e.parameters(), *e.buffers()])


def compile_steps(models: dict[str, Model], device: str) -> dict:
    """Each model's compiled decode step, run once; how long it took and what the graphs hold is printed."""
    inner, steps, position = "inductor", {}, torch.zeros(1, dtype=torch.long, device=device)
    for name, model in models.items():
        while name not in steps:
            print(f"  {name:<5} experts ...", end="", flush=True)
            began = time.time()
            try:
                step, graphs = compiled_step(model, inner)
                step(position[None], position, model.new_cache())
                steps[name] = step
            except Exception as error:
                if inner == "aot_eager":
                    raise
                inner = "aot_eager"
                torch.compiler.reset()
                print(
                    f" torch.compile cannot generate code here, usually for want of a C++ compiler:\n"
                    f"    {first_line(error)}\n"
                    "    Going on with whole graphs all the same, run operator by operator (slower)."
                )
        print(f" {time.time() - began:5.1f} s, {len(graphs)} graph, {op_nodes(graphs)} fused_moe nodes", flush=True)
    return steps


def introduce(models: dict[str, Model], device: str) -> None:
    cfg = models["bf16"].cfg
    parameters = sum(p.numel() for p in models["bf16"].parameters())
    size = {name: expert_bytes(model) / 1e6 for name, model in models.items()}
    print(
        f"  {parameters / 1e6:.1f} million parameters, {cfg.num_hidden_layers} layers "
        f"of {cfg.num_local_experts} experts, {cfg.num_experts_per_tok} per token\n"
        f"  torch {torch.__version__} on {device}, {torch.get_num_threads()} CPU threads\n"
        f"  expert weights: {size['bf16']:.2f} MB in bf16, {size['MXFP8']:.2f} MB in MXFP8"
    )
    note("both models are the same but for their experts: bf16 in plain PyTorch, or MXFP8 in the fused op.")


def explain(model: Model, backend: str) -> torch_mxfp8moe.Explanation:
    """Who serves the op for one token, printed."""
    experts, k, device = model.layers[0].block_sparse_moe.experts, model.cfg.num_experts_per_tok, model.rope.device
    hidden = torch.zeros(1, model.cfg.hidden_size, dtype=torch.bfloat16, device=device)
    weights, ids = torch.full((1, k), 1 / k, device=device), torch.arange(k, device=device)[None]
    explanation = torch_mxfp8moe.explain(**experts.arguments(hidden, weights, ids) | dict(backend=backend))
    print("  " + str(explanation).replace("\n", "\n  "))
    note("the first line names the code that computes the experts for one token (T=1), the others why not they.")
    return explanation


def compare_speed(steps: dict, models: dict[str, Model], ids: list[int], device: str, backend: str) -> None:
    """Tokens per second of both models over the same text, printed."""
    show, seconds = progress("timing"), {name: [] for name in models}
    for i in range(4):
        for name, model in models.items():
            seconds[name] += time_steps(steps[name], model, ids, device)
        show((i + 1) / 4)
    rate = {name: 1 / statistics.median(s) for name, s in seconds.items()}
    print(f"  bf16 experts   {rate['bf16']:8.1f} tokens per second")
    print(f"  MXFP8 experts  {rate['MXFP8']:8.1f} tokens per second, {rate['MXFP8'] / rate['bf16']:.2f} times bf16")
    if backend == "reference":
        remark = "The reference backend is the op's definition in plain PyTorch, written to be read, not to be fast."
    else:
        remark = "A model this small stays in the cache and gains little; MXFP8 halves what a large one must read."
    note(
        f"higher is faster: the median of {min(map(len, seconds.values()))} compiled steps, the two models taking turns"
        f"{', on one thread' if torch.get_num_threads() == 1 else ''}.\n{remark}"
    )


def compare_perplexity(text: str, tokenizer: Tokenizer, args: argparse.Namespace, dtype: torch.dtype) -> float:
    """Perplexity with MXFP8 experts over perplexity with bf16 experts, printed with both."""
    ids = torch.tensor(tokenizer.encode(text), device=args.device)
    size = len(text.encode())
    print(f"  {size / 1000:.0f} kB, {len(ids):,} tokens that training never saw", flush=True)
    perplexity = {}
    for name in ("bf16", "MXFP8"):
        model = checkpoint.load_model(args.weights / name.lower(), args.device, args.backend, dtype)
        loss = mean_loss(model, ids, progress=progress(f"{name} experts"))
        perplexity[name] = math.exp(loss)
        bits = loss * (len(ids) - 1) / math.log(2) / size
        print(f"  {name:<5} experts  {perplexity[name]:8.4f}   ({bits:.4f} bits per byte)", flush=True)
    ratio = perplexity["MXFP8"] / perplexity["bf16"]
    print(f"  MXFP8 / bf16   {ratio:8.2%}   {'' if within(ratio) else 'NOT '}within 1 % of bf16")
    note(
        f"perplexity: the model is as unsure as if it chose among that many tokens (of {len(tokenizer)}) each time;\n"
        "lower is better. 100 % means that MXFP8 experts cost no quality."
    )
    if dtype == torch.float32:
        note("the weights are the same as above; all other arithmetic is in fp32, which most CPUs do faster.")
    return ratio


def within(ratio: float) -> bool:
    return abs(ratio - 1) <= 0.01


@torch.no_grad()
def main() -> int:
    args = parse_args()
    start, threads = time.time(), torch.get_num_threads()
    try:
        device = torch.device(args.device).type
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {args.device}, but torch finds no CUDA device here")
        text = args.heldout.read_bytes()[: args.heldout_kb * 1000 or None].decode("utf-8", "ignore")
        models = {
            "bf16": checkpoint.load_model(args.weights / "bf16", args.device),
            "MXFP8": checkpoint.load_model(args.weights / "mxfp8", args.device, args.backend),
        }
        tokenizer = Tokenizer.load(args.weights / "mxfp8" / "tokenizer.json")
        room = models["bf16"].cfg.max_position_embeddings - len(tokenizer.encode(args.prompt))
        if not args.prompt or not 0 < args.tokens <= room:
            raise ValueError(f"after this prompt --tokens takes 1 to {room}, and the prompt cannot be empty")
        if len(text) < 100:
            raise ValueError(f"{args.heldout} holds too little text")

        title("A mixture-of-experts language model with MXFP8 experts")
        introduce(models, args.device)

        title("Which backend serves the op")
        backend = explain(models["MXFP8"], args.backend).backend
        if backend is None:
            raise ValueError(f"--backend {args.backend} does not serve the op here; auto takes one that does")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"error: {error}")

    title("Compiling the decode step, torch.compile(fullgraph=True)")
    if device == "cpu":
        print("  about half a minute on two cores, a few seconds from the second time on")
        torch.set_num_threads(1)  # compiled in; shared between threads, steps this small only wait for each other
    steps = compile_steps(models, args.device)
    note(
        "one graph means that nothing fell back to Python; the MXFP8 model has one fused_moe node for each of\n"
        f"its {len(models['MXFP8'].layers)} MoE layers, the bf16 model none."
    )

    title("Text, token by token, from the MXFP8 model")
    ids = write_text(steps["MXFP8"], models["MXFP8"], tokenizer, args)
    note(
        f"the prompt was: {args.prompt}\n"
        "The weights in the repository learned from Jane Austen's novels: so small a model has the style, not\n"
        "the sense."
    )

    title("Speed, one token at a time")
    compare_speed(steps, models, ids, args.device, backend)

    title("Perplexity on held-out text")
    torch.set_num_threads(threads)
    ratio = compare_perplexity(text, tokenizer, args, torch.float32 if device == "cpu" else torch.bfloat16)

    print(f"\nDone in {time.time() - start:.0f} s.")
    return 0 if within(ratio) else 1


if __name__ == "__main__":
    sys.exit(main())
