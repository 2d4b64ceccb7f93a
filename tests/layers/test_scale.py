"""Many processes, little memory, many runs: DDP, FSDP2, checkpointing, saved and copied layers, seeds."""

import contextlib
import copy
import io
import itertools
import os
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pairs import CELLS, PATHS, assert_close, assert_same_bits, pair, results, tensors
from torch import nn
from torch.utils.checkpoint import checkpoint

import persistrnn

HAS_COMPILER = any(shutil.which(name) for name in ("g++", "c++", "clang++"))
STEPS, BATCH, INPUT, HIDDEN = 2, 4, 4, 6
LR = 0.5


def make_pair(cell, backend="torch", **options):
    return pair(cell, INPUT, HIDDEN, backend=backend, **options)


def run(call, layer, x=None, seed=1):
    """(outputs, gradients of x and the parameters, state of the generator after the call)."""
    torch.manual_seed(seed)
    found = results(call, batch() if x is None else x, None, layer.parameters())
    return *found, torch.get_rng_state()


# --- many processes ---------------------------------------------------------------------------------------------


WRAPPED = {"ddp": "gru", "fsdp2": "lstm"}


class Model(nn.Module):
    def __init__(self, cell, backend):
        super().__init__()
        self.rnn, _ = make_pair(cell, backend)
        self.head = nn.Linear(HIDDEN, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


def batch():
    return torch.randn(STEPS, BATCH, INPUT, generator=torch.Generator().manual_seed(2))


def train(model, x, steps=2):
    """The gradients of the last step, and the parameters after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 0.25).square().mean().backward()
        optimizer.step()
    return [(p.grad, p.detach()) for p in model.parameters()]


def data_parallel(wrap, cell, backend, rank):
    model = Model(cell, backend)
    if wrap == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.rnn)
        wrapped = fully_shard(model)
    found = train(wrapped, batch()[:, 2 * rank : 2 * rank + 2])
    assert model.rnn.last_path == backend
    if wrap == "fsdp2":
        assert all(p.to_local().numel() < p.numel() for p in model.rnn.parameters())
        found = [(grad.full_tensor(), value.full_tensor()) for grad, value in found]
    return found


def one_of_two(rank, backend, folder):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nn.Linear's output is one, too
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {wrap: data_parallel(wrap, cell, backend, rank) for wrap, cell in WRAPPED.items()}
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", PATHS)
def test_two_processes_train_as_one_on_the_joined_batch(backend, tmp_path):
    mp.spawn(one_of_two, (backend, tmp_path), nprocs=2)
    for rank, (wrap, cell) in itertools.product(range(2), WRAPPED.items()):
        found = torch.load(tmp_path / f"rank{rank}.pt")[wrap]
        torch.testing.assert_close(found, train(Model(cell, backend), batch()), rtol=1e-4, atol=1e-6)


def train_seeded(backend):
    """The parameters after steps with dropout."""
    layer, _ = make_pair("lstm", backend, num_layers=2, dropout=0.5)
    optimizer = torch.optim.Adam(layer.parameters())
    torch.manual_seed(3)
    for _ in range(2):
        optimizer.zero_grad()
        layer(batch())[0].square().mean().backward()
        optimizer.step()
    return [p.detach() for p in layer.parameters()]


def read_train_and_change(layer, may_read, folder):
    assert may_read.wait(240)
    torch.save((layer(batch())[0].detach(), train_seeded(layer.backend)), f"{folder}/found.pt")
    with torch.no_grad():
        layer.weight_hh_l0.mul_(-1)


@pytest.mark.parametrize("backend", PATHS)
def test_another_process_sees_updates_shows_its_own_and_trains_to_the_same_bits(backend, tmp_path):
    layer = make_pair("gru", backend)[0].share_memory()
    assert all(p.is_shared() for p in layer.parameters())
    spawn = mp.get_context("spawn")
    may_read = spawn.Event()
    process = spawn.Process(target=read_train_and_change, args=(layer, may_read, tmp_path))
    process.start()
    before = layer(batch())[0].detach()
    with torch.no_grad():
        layer.weight_hh_l0.add_(0.5)
    expected, weight = layer(batch())[0].detach(), layer.weight_hh_l0.detach().clone()
    assert not torch.allclose(expected, before, rtol=0.01)
    may_read.set()
    process.join()
    assert process.exitcode == 0
    assert_same_bits(torch.load(tmp_path / "found.pt"), (expected, train_seeded(backend)))
    assert_same_bits(layer.weight_hh_l0.detach(), -weight)


# --- little memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", PATHS)
def test_checkpointing_gives_the_same_bits(backend):
    """With dropout, whose mask is drawn again."""
    layer, _ = make_pair("lstm", backend, num_layers=2, dropout=0.5)
    calls = []
    layer.register_forward_pre_hook(lambda *args: calls.append(None))
    expected = run(layer, layer)
    actual = run(lambda *given: checkpoint(layer, *given, use_reentrant=False), layer)
    assert_same_bits(actual, expected)
    assert len(calls) == 3, "the checkpointed forward runs twice"


# --- files and copies -------------------------------------------------------------------------------------------


def through_torch(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def through_safetensors(state, path):
    import safetensors.torch as safetensors  # only here: the machine with a GPU has it not

    safetensors.save_file(state, path)
    return safetensors.load_file(path)


@pytest.mark.parametrize("through", [through_torch, through_safetensors])
@pytest.mark.parametrize("cell", CELLS)
def test_saved_state_dict_loads_into_ours_and_torch_nn(cell, through, tmp_path):
    ours, theirs = make_pair(cell, num_layers=2, bidirectional=True)
    for source, target in ((ours, theirs), (theirs, ours)):
        source.reset_parameters()
        target.load_state_dict(through(source.state_dict(), tmp_path / "weights"))
        assert_same_bits(target(batch()), source(batch()))


def test_safetensors_keeps_tied_weights(tmp_path):
    import safetensors.torch as safetensors  # only here: the machine with a GPU has it not

    layer, other = (persistrnn.GRU(INPUT, HIDDEN, 2) for _ in range(2))
    for tied in (layer, other):
        tied.weight_hh_l1 = tied.weight_hh_l0
    safetensors.save_model(layer, tmp_path / "weights")
    safetensors.load_model(other, tmp_path / "weights")
    assert other.weight_hh_l1 is other.weight_hh_l0
    assert_same_bits(other(batch()), layer(batch()))


def through_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("duplicate", "backend"),
    [
        (copy.deepcopy, "torch"),
        (lambda layer: pickle.loads(pickle.dumps(layer)), "torch"),
        (through_file, "torch"),
        pytest.param(copy.deepcopy, "persistent", marks=pytest.mark.interpreter),
    ],
)
def test_copy_trains_alone(duplicate, backend):
    """Tied weights stay tied."""
    layer, _ = make_pair("gru", backend, num_layers=2)
    layer.weight_hh_l1 = layer.weight_hh_l0
    expected = layer(batch())[0].detach()
    other = duplicate(layer)
    assert other.last_path == backend
    assert other.weight_hh_l1 is other.weight_hh_l0
    y, _ = other(batch())
    assert_same_bits(y.detach(), expected)
    y.square().mean().backward()
    torch.optim.SGD(other.parameters(), lr=LR).step()
    with torch.no_grad():
        assert not torch.allclose(other(batch())[0], expected, rtol=1e-3)
        assert_same_bits(layer(batch())[0], expected)
    assert all(p.grad is None for p in layer.parameters())


# --- many runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiled", "backend"),
    [(False, "torch"), (True, "torch"), pytest.param(False, "persistent", marks=pytest.mark.interpreter)],
)
def test_seed_decides_every_bit(compiled, backend):
    """Of outputs, gradients and the generator's state after the call; another seed gives others."""
    layer, _ = make_pair("lstm", backend, num_layers=2, dropout=0.5)
    torch._dynamo.reset()
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    first, second, other = (run(call, layer, seed=seed) for seed in (1, 1, 2))
    assert_same_bits(first, second)
    assert not torch.allclose(first[0][0], other[0][0], rtol=0.01)


def assert_masks_are_torch_nn(call, theirs, x):
    """Another mask moves outputs and gradients by far more than rounding does."""
    actual, expected = (run(layer, layer, x) for layer in (call, theirs))
    assert_close(actual[:2], expected[:2])
    assert torch.equal(actual[2], expected[2]), "the generator goes on from another state"


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(
    ("compiled", "options", "shape"),
    [
        (False, {"num_layers": 3}, (STEPS, BATCH, INPUT)),
        (False, {"bidirectional": True, "batch_first": True}, (BATCH, STEPS, INPUT)),
        (True, {"bidirectional": True, "batch_first": True}, (BATCH, STEPS, INPUT)),
        (False, {}, (STEPS, INPUT)),
    ],
    ids=["three layers", "both ways, batch first", "the same, compiled", "unbatched"],
)
def test_all_paths_draw_the_dropout_masks_of_torch_nn(compiled, options, shape, backend):
    ours, theirs = make_pair("gru", backend, **{"num_layers": 2, "dropout": 0.5} | options)
    torch._dynamo.reset()
    call = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    assert_masks_are_torch_nn(call, theirs, torch.randn(shape))


@pytest.mark.skipif(not HAS_COMPILER, reason="inductor on the CPU needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own
def test_inductor_draws_the_dropout_masks_of_torch_nn_if_told_to(monkeypatch, tmp_path):
    """Inductor has a generator of its own for the dropout that it sees, in any model, unless fallback_random is set."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a killed run leaves half a library
    ours, theirs = make_pair("gru", num_layers=2, dropout=0.5)
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):
        assert_masks_are_torch_nn(torch.compile(ours, fullgraph=True), theirs, batch())


def test_first_compiled_call_has_the_bits_of_the_others():
    layer, _ = make_pair("gru", batch_first=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5, INPUT)
    expected = layer(x)[0]
    for _ in range(3):
        assert torch.equal(compiled(x)[0], expected)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(("how", "cut"), [("no_grad", False), ("inference_mode", True), ("frozen", False)])
def test_compiled_layer_runs_without_gradients(how, cut, backend):
    layer, theirs = make_pair("lstm", backend, num_layers=2)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    if how == "frozen":
        layer.requires_grad_(False)
    with contextlib.nullcontext() if how == "frozen" else getattr(torch, how)():
        x = batch()
        # Every row has all steps: the same result, by another operator.
        options = {"lengths": torch.full((x.shape[1],), x.shape[0])} if cut else {}
        actual, expected = tensors(compiled(x, **options)), tensors(theirs(x))
    assert not any(t.requires_grad for t in actual)
    assert_close(actual, [t.detach() for t in expected])
