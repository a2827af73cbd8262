"""The machine that a program measures: a GPU, or its CPU for a try."""

import argparse

import torch


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"),
                        help="(default: cuda where PyTorch finds a GPU)")  # fmt: skip


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """Ends the program if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")


def described(device: str) -> str:
    """The machine and the version of torch, for the head of a table."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}"
