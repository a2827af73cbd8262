"""24 layers that decode: the tokens of a plain loop, compiled, after new weights, and through CUDA graphs where there
are any (tools/bench_decode.py, which is what is tested)."""

import csv
import sys

import pytest
import torch

import device
from device import DEVICE
from helpers import PACKAGE

TOOLS = PACKAGE.parent / "tools"
if not TOOLS.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

import bench_decode as program  # noqa: E402
from bench import timing  # noqa: E402
from bench_decode import Decoder, HostWork, decode, host_work  # noqa: E402

pytestmark = pytest.mark.skipif(device.NAME == "interpreter", reason="24 layers take too long in the interpreter")

TOKENS = 24
CUDA = DEVICE.type == "cuda"


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return program.build(program.LAYERS, DEVICE)


def plain_loop(model, first: list[int], tokens: int) -> list[list[int]]:
    """Sequence by sequence and step by step, each token read on the host: [tokens + 1, B]."""
    columns = []
    for token in first:
        cache, column = model.new_cache(), [token]
        for i in range(tokens):
            at = torch.tensor([i], device=DEVICE)
            column.append(model(torch.tensor([[column[-1]]], device=DEVICE), at, cache)[0, -1].argmax().item())
        columns.append(column)
    return torch.tensor(columns, device="cpu").T.tolist()


def test_a_step_feeds_the_next_one(model):
    """The device's loop writes what the host's does, whatever the cache held; and the model has something to say."""
    assert len(model.layers) == 24
    assert len({layer.block_sparse_moe.experts.w1.data_ptr() for layer in model.layers}) == 24
    decoder = Decoder(model, 1)
    want = plain_loop(model, [ord("A")], TOKENS)
    for _ in range(2):
        assert decode(decoder.start, decoder.step, decoder, TOKENS).tolist() == want
    assert len({token for (token,) in want}) > TOKENS // 2


def test_sequences_beside_one_another(model):
    """Each begins with a token of its own and is decoded as if it were alone."""
    decoder = Decoder(model, 3)
    got = decode(decoder.start, decoder.step, decoder, 4)
    assert got[0].tolist() == [ord("A"), ord("B"), ord("C")]
    assert (got[1:] >= 0).all() and (got[1:] < model.cfg.vocab_size).all()
    if not CUDA:  # where three rows may take other products than one, which round in another order
        assert got.tolist() == plain_loop(model, got[0].tolist(), 4)


def without_host(decoder: Decoder):
    """The step as serving runs it: a replay; or, where there are no graphs, one compiled graph."""
    if CUDA:
        decoder.start()
        return timing.capture([decoder.step]).replay
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(program.advance, fullgraph=True, backend=backend)

    def run():
        step(decoder.model, decoder.token, decoder.position, decoder.written, decoder.cache)
        assert len(graphs) == 1
        nodes = [node for node in graphs[0].graph.nodes if "mxfp8moe.fused_moe" in str(node.target)]
        assert len(nodes) == len(decoder.model.layers)

    return run


def test_replays_decode_as_the_eager_loop_also_after_an_update():
    """On a GPU graph replays, else the whole step as one graph of torch.compile; then with new weights in every layer,
    its experts backwards."""
    model = program.build(program.LAYERS, DEVICE)
    decoder = Decoder(model, 2)
    step = without_host(decoder)
    before = decode(decoder.start, decoder.step, decoder, TOKENS)
    assert decode(decoder.start, step, decoder, TOKENS).tolist() == before.tolist()
    for layer in model.layers:
        experts = layer.block_sparse_moe.experts
        w1, w1_scale, w2, w2_scale = (x.clone() for x in experts.row_major())
        experts.update_weights(w1, w2, w1_scale=w1_scale, w2_scale=w2_scale, experts=range(15, -1, -1))
    after = decode(decoder.start, decoder.step, decoder, TOKENS)
    assert after.tolist() != before.tolist()
    assert decode(decoder.start, step, decoder, TOKENS).tolist() == after.tolist()


def test_what_the_host_does_is_seen():
    x = torch.zeros(3, device=DEVICE)
    x.add_(1)
    assert host_work(lambda: None, 4, DEVICE) == HostWork(0, 0 if CUDA else None, None)
    assert host_work(lambda: x.add_(1), 4, DEVICE) == HostWork(4, 0 if CUDA else None, None)
    if CUDA:
        assert host_work(lambda: x + 1, 4, DEVICE).allocations == 4
        assert "synchroniz" in host_work(lambda: x[0].item(), 1, DEVICE).waits
    with pytest.raises(RuntimeError, match="another"):
        host_work(lambda: exec('raise RuntimeError("another")'), 1, DEVICE)


def test_verdicts(capsys):
    want = torch.arange(10, device="cpu").view(5, 2)
    other = want.clone()
    other[3:, 1] = 0
    none, some = HostWork(0, 0, None), HostWork(8, 0, None)
    waited = HostWork(0, 0, "called a synchronizing CUDA operation")
    assert program.passed(want, want, none, none) and program.passed(want, want, some, some)
    assert not program.passed(other, want, none, none)
    assert not program.passed(want, want, some, none)
    assert not program.passed(want, want, HostWork(0, 4, None), none)
    assert not program.passed(want, want, waited, waited)
    printed = capsys.readouterr().out
    assert "tokens: NOT those of the loop, from position 3 on" in printed
    assert "4 replays: 8 operations, 0 allocations, no wait for the device" in printed
    assert printed.count("host: MORE than the replays") == 3
    assert "A WAIT FOR THE DEVICE: called a synchronizing CUDA operation" in printed


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_the_program(compiled, tmp_path, capsys):
    torch.compiler.reset()
    out = tmp_path / "decode.csv"
    sizes = ["--device", DEVICE.type, "--tokens", "12", "--csv", str(out)]
    sizes += ["--layers", "3", "--compile", "aot_eager"] if compiled else []
    assert program.main(sizes) == 0
    printed = capsys.readouterr().out
    with out.open(newline="") as file:
        ways = {line["way"]: line for line in csv.DictReader(file)}
    loop = "compiled loop" if compiled else "eager loop"
    assert list(ways) == [loop, "graph replays"][: 1 + CUDA]
    assert ways[loop]["layers"] == ("3" if compiled else "24")
    assert (ways[loop]["operations"] == "") == compiled
    assert compiled or int(ways[loop]["operations"]) > 24 * 20
    assert ("no CUDA graphs on a CPU" in printed) != CUDA
    if CUDA:
        assert "tokens: those of the loop" in printed and "host: the replays alone" in printed
        replays = ways["graph replays"]
        assert int(replays["operations"]) <= 2  # what some versions of PyTorch do for random numbers
        assert compiled or float(replays["host_us"]) < float(replays["us"])  # the device never waits for the host


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["--tokens", "512"], "--tokens is 512; it takes 1 to 511"),
        (["--batch", "0"], "--batch is 0; it takes 1 to 1024"),
        (["--layers", "0"], "--layers is 0; it takes 1 or more"),
        (["--compile", "fast"], "invalid choice"),
    ),
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.parse(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
