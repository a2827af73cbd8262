"""Settings of the test run."""

import os

# Threads that wait for one another sleep instead of spinning: on a machine whose cores are busy with something else,
# spinning makes small parallel regions ten times as slow. Read when torch loads its OpenMP, here and in subprocesses.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, print_blob=False)
settings.load_profile("repeatable")

LONG = [
    f"test_{name}.py"
    for name in (
        "gfx950_gates", "triton_compile", "triton_versions", "gfx950_simulator", "triton_interpreter", "distributed",
        "vllm", "tune_gpu", "transformers", "install", "compile", "tools", "aiter", "extension", "bench_gpu",
    )
]  # fmt: skip
"""Files that take more than 15 s, the longest first: pytest-xdist's processes begin with them, so that none has a long
one left when the others are done."""


def pytest_addoption(parser):
    text = "where the ops run: cpu (default); cuda, NVIDIA's or AMD's; interpreter, Triton kernels without a GPU"
    parser.addoption("--device", choices=("cpu", "cuda", "interpreter"), default="cpu", help=text)


def pytest_configure(config):
    os.environ["MXFP8MOE_TEST_DEVICE"] = config.getoption("--device")  # device.py reads it, in subprocesses too
    import device

    why_not = device.why_not(device.NAME)
    if why_not:
        raise pytest.UsageError(f"--device {device.NAME}: {why_not}")


def pytest_report_header(config):
    import device

    gpu = f", {torch.cuda.get_device_name()}" if device.NAME == "cuda" else ""
    return f"device: {device.NAME}{gpu}"


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def thread_count():
    """A test that fails while it has changed the number of threads does not change that of the next."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def kinds():
    """What one test made of the backends, no call of the next one finds."""
    from torch_mxfp8moe import arguments

    arguments._kinds.clear()


@pytest.fixture
def tiles(request, monkeypatch):
    """The tiles that are its parameter, for every call."""
    from torch_mxfp8moe import configs

    monkeypatch.setattr(configs, "choose", lambda *args, **kwargs: request.param)
    return request.param
