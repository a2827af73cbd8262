"""Settings of the test run."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, print_blob=False)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def thread_count():
    """A test that fails while it has changed the number of threads does not change that of the next."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
