"""Calls as `decide` takes them, of which a test names what it is about."""

import torch

from persistrnn.decide import Call


def asked(cell="lstm", hidden=512, batch=16, steps=64, device="cpu", dtype=torch.float32, **changed):
    """``changed``: other fields of `Call`."""
    fixed = {
        "num_layers": 1, "directions": 1, "bias": True, "input_size": hidden, "proj_size": 0, "precision": "ieee",
        "backward": True,
    } | changed  # fmt: skip
    return Call(
        cell=cell, hidden_size=hidden, batch=batch, steps=steps, device=torch.device(device), dtype=dtype, **fixed
    )
