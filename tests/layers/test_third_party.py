"""Real models of other packages, swapped by `persistrnn.replace` and trained unchanged: the same losses as before.

The packages are the extra `models`; without one of them, its tests are skipped. Nothing is downloaded.
"""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import persistrnn
from persistrnn.functional import Backend

Swap = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Place:
    """Where a model is trained, what its new layers are asked to run, what they must have run, and a size for them."""

    device: str
    backend: Backend
    path: str
    hidden: int

    @property
    def tiny(self) -> bool:
        """In Triton's interpreter, which is slow."""
        return self.device == "cpu" and self.path == "persistent"

    @property
    def exact(self) -> bool:
        """Torch's kernels on a CPU: the very call of torch.nn, to the last bit."""
        return self.device == "cpu" and self.path == "torch"


CPU = pytest.param(Place("cpu", "auto", "torch", 16), id="cpu")
INTERPRETER = pytest.param(Place("cpu", "persistent", "persistent", 4), marks=pytest.mark.interpreter, id="interpreter")
GPU = pytest.param(Place("cuda", "persistent", "persistent", 64), marks=pytest.mark.gpu, id="gpu")

# dtype -> (of a loss: the difference, relative to the curve's largest loss; of a layer's parameters, and of all: the
# distance at the end, relative to the way that training took them).
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-3, 5e-2)}


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterable[None]:
    """float32 products in full, and on a GPU a look at the kernels' own alarm."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    # stable-baselines3 sets them for good.
    for flag in ("deterministic", "benchmark"):
        monkeypatch.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    from persistrnn.kernels import launch

    if not torch.cuda.is_available():
        pytest.fail("this test needs a CUDA device, torch sees none; run it on a machine that has one")
    yield
    torch.cuda.synchronize()
    launch.check()


def module(name: str) -> Any:
    """The module, or a skipped test."""
    return pytest.importorskip(name, reason=f"{name} does not import: pip install 'persistrnn[models]'")


def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
    # GluonTS draws from the global generator.
    module("numpy").random.seed(0)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check_same_training(
    train: Callable[[Swap], list[float]], layers: Iterable[str], place: Place, dtype: torch.dtype = torch.float32
) -> None:
    """Train with torch's layers and with ours: the same losses, and the same parameters at the end.

    train(swap): builds the model, calls swap(model) once, trains it and returns the losses.
    layers: all recurrent layers of the model, by name.
    """
    models: list[nn.Module] = []
    reports: list[persistrnn.replacement.Replacement] = []
    before: list[dict[str, torch.Tensor]] = []

    def keep(model: nn.Module) -> None:
        models.append(model)
        before.append(snapshot(model))

    def swap(model: nn.Module) -> None:
        keep(model)
        reports.append(persistrnn.replace(model, backend=place.backend))

    seed()
    expected = train(keep)
    seed()
    found = train(swap)

    (report,) = reports
    assert set(report.swapped) == set(layers), str(report)
    assert report.left == {}
    assert report.model is models[1]
    assert not any(isinstance(m, nn.RNNBase) for m in models[1].modules())
    assert all(isinstance(models[0].get_submodule(name), nn.RNNBase) for name in layers)
    # A model that runs sequences step by step may end with a single step, which torch's own path runs.
    paths = {place.path, "torch"} if place.path == "stepwise" else {place.path}
    assert {models[1].get_submodule(name).last_path for name in layers} <= paths

    same_start, same_end = before[0], snapshot(models[0])
    assert all(torch.equal(value, same_start[name]) for name, value in before[1].items()), "not the same model"
    trained = [name for name in same_start if name.rpartition(".")[0] in layers]
    still = [name for name in trained if torch.equal(same_start[name], same_end[name])]
    assert trained, "no parameters of recurrent layers"
    assert not still, f"training left {still} as they were: the model says nothing about them"

    end = snapshot(models[1])
    assert end.keys() == same_end.keys()
    assert len(found) == len(expected) > 1
    assert all(map(math.isfinite, expected))
    if place.exact:
        assert found == expected
        assert [name for name in end if not torch.equal(end[name], same_end[name])] == []
        return
    of_loss, of_parameters = TOLERANCES[dtype]
    assert found == pytest.approx(expected, rel=0, abs=of_loss * max(map(abs, expected)))
    for layer in ["", *sorted(layers)]:
        names = [name for name in end if name.startswith(layer)]
        off, moved = distance(end, same_end, names), distance(same_end, same_start, names)
        assert off <= of_parameters * moved, layer or "all parameters"


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], names: Iterable[str]) -> float:
    return math.sqrt(sum((a[name] - b[name]).double().square().sum().item() for name in names))


# ---- reinforcement learning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [CPU, INTERPRETER, GPU])
def test_recurrent_ppo_of_stable_baselines3(place):
    """Actor and critic of sb3-contrib on CartPole, with its own rollouts, whose episodes end within a sequence."""
    contrib, callbacks = module("sb3_contrib"), module("stable_baselines3.common.callbacks")
    steps, epochs, layers = (16, 1, 1) if place.tiny else (64, 2, 2)

    def train(swap: Swap) -> list[float]:
        agent = contrib.RecurrentPPO(
            "MlpLstmPolicy", "CartPole-v1", n_steps=steps, batch_size=steps // 2, n_epochs=epochs, learning_rate=3e-3,
            seed=1, device=place.device,
            policy_kwargs={"lstm_hidden_size": place.hidden, "n_lstm_layers": layers, "net_arch": [16]},
        )  # fmt: skip
        swap(agent.policy)
        losses: list[float] = []

        class Losses(callbacks.BaseCallback):
            def _on_step(self) -> bool:
                return True

            def _on_rollout_start(self) -> None:
                if self.num_timesteps:
                    losses.append(agent.logger.name_to_value["train/loss"])

        agent.learn((2 if place.tiny else 5) * steps, callback=Losses())
        return [*losses, agent.logger.name_to_value["train/loss"]]

    check_same_training(train, {"lstm_actor", "lstm_critic"}, place)


# Of cuDNN, at torch.nn's layer with the weights of TorchRL's target network:
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("place", [CPU, INTERPRETER, GPU])
def test_recurrent_dqn_of_torchrl(cell, place):
    """TorchRL's LSTMModule and GRUModule: CartPole step by step to collect, the whole sequence to learn.

    Sequences are shorter than any episode; see the next test.
    """
    check_same_training(recurrent_dqn(cell, place, steps=6, until_done=True), {f"module.1.{cell}"}, place)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("place", [CPU, INTERPRETER, GPU])
def test_episodes_within_a_sequence_of_torchrl(cell, place):
    """TorchRL packs them for an nn.LSTM; any other layer gets an argument ``mask``, as TorchRL's own layers take."""
    steps = 12 if place.tiny else 30
    swapped = replace(place, path="stepwise") if place.path == "torch" else place
    check_same_training(recurrent_dqn(cell, place, steps=steps, until_done=False), {f"module.1.{cell}"}, swapped)


def recurrent_dqn(cell: str, place: Place, steps: int, until_done: bool) -> Callable[[Swap], list[float]]:
    """What trains TorchRL's recurrent DQN on rollouts of CartPole.

    until_done: a rollout ends with its episode, else it goes on with the next one.
    """
    module("gymnasium")
    modules, envs, objectives = module("torchrl.modules"), module("torchrl.envs"), module("torchrl.objectives")
    tensordict_nn = module("tensordict.nn")
    kind, states = {"lstm": (modules.LSTMModule, ["h", "c"]), "gru": (modules.GRUModule, ["h"])}[cell]
    updates, rollouts = (3, 2) if place.tiny else (10, 4)

    def train(swap: Swap) -> list[float]:
        layer = kind(
            input_size=8, hidden_size=place.hidden, device=place.device,
            in_keys=["features", *states], out_keys=["memory", *(("next", state) for state in states)],
        )  # fmt: skip
        env = envs.TransformedEnv(
            envs.GymEnv("CartPole-v1", device=place.device),
            envs.Compose(envs.InitTracker(), layer.make_tensordict_primer()),
        )
        env.set_seed(0)
        before = modules.MLP(4, 8, num_cells=[8], device=place.device)
        after = modules.MLP(place.hidden, 2, num_cells=[], device=place.device)
        policy = tensordict_nn.TensorDictSequential(
            tensordict_nn.TensorDictModule(before, in_keys=["observation"], out_keys=["features"]),
            layer,
            tensordict_nn.TensorDictModule(after, in_keys=["memory"], out_keys=["action_value"]),
            modules.QValueModule(action_space="one_hot"),
        )
        swap(policy)
        loss = objectives.DQNLoss(policy, action_space="one_hot", delay_value=True)
        loss.make_value_estimator(gamma=0.9)
        target = objectives.SoftUpdate(loss, eps=0.9)
        greedy = modules.EGreedyModule(env.action_spec, eps_init=0.2, eps_end=0.2, annealing_num_steps=1)
        explore = tensordict_nn.TensorDictSequential(policy, greedy.to(place.device))
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        losses = []
        for _ in range(updates):
            with torch.no_grad():
                rows = [env.rollout(steps, explore, break_when_any_done=until_done) for _ in range(rollouts)]
            data = torch.stack(rows)
            with modules.set_recurrent_mode(True):
                value = loss(data)["loss"]
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            target.step()
            losses += [value.item(), data["chosen_action_value"].mean().item()]  # the latter of single steps
        return losses

    return train


# ---- forecasting ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    # Of Lightning, of which GluonTS chooses the loaders and the machine the rest:
    "ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning",
    "ignore:The 'train_dataloader' does not have many workers:UserWarning",
    "ignore:GPU available but not used:UserWarning",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    # Of torch, at an index of GluonTS':
    "ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning",
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("place", [CPU, INTERPRETER, GPU])
def test_deepar_of_gluonts(place, precision, tmp_path):
    """The DeepAR estimator, trained by Lightning from its own windows of hourly series, and what it then forecasts."""
    gluonts, datasets = module("gluonts.torch"), module("gluonts.dataset.common")
    lightning, pandas, numpy = module("lightning.pytorch"), module("pandas"), module("numpy")
    # The kernels' dropout draws other numbers than torch's.
    dropout = 0.1 if place.exact else 0.0
    forecasts: list[Any] = []

    def train(swap: Swap) -> list[float]:
        losses = []
        folder = tmp_path / str(len(forecasts))  # of checkpoints: the best one forecasts

        class Watch(lightning.Callback):
            def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
                swap(pl_module)

            def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, *_: Any) -> None:
                losses.append(outputs["loss"].item())

        hours = numpy.arange(200)
        start = pandas.Period("2024-01-01", freq="h")
        series = datasets.ListDataset(
            [{"start": start, "target": 5 + k + numpy.sin(2 * numpy.pi * hours / 24 + k)} for k in range(5)], freq="h"
        )
        estimator = gluonts.DeepAREstimator(
            freq="h", prediction_length=2 if place.tiny else 6, context_length=3 if place.tiny else 24,
            lags_seq=[1, 2, 24], num_layers=2, hidden_size=place.hidden, dropout_rate=dropout,
            batch_size=8, num_batches_per_epoch=4, num_parallel_samples=5,
            trainer_kwargs={
                "max_epochs": 1 if place.tiny else 5, "accelerator": {"cpu": "cpu", "cuda": "gpu"}[place.device],
                "devices": 1, "precision": precision, "callbacks": [Watch()], "default_root_dir": folder,
                "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
            },
        )  # fmt: skip
        predictor = estimator.train(series)
        seed()
        forecasts.append(numpy.concatenate([forecast.samples for forecast in predictor.predict(series)]))
        return losses

    dtype = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}[precision]
    check_same_training(train, {"model.rnn"}, place, dtype)
    theirs, ours = forecasts
    assert numpy.isfinite(ours).all()
    if place.exact:  # else a rounding error may reject a random number that the other run takes
        assert (ours == theirs).all()


# ---- graphs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [CPU, INTERPRETER, GPU])
def test_graphsage_of_pytorch_geometric(place):
    """GraphSAGE with an LSTM over the neighbours and a bidirectional one over the layers, on the karate club."""
    models, datasets = module("torch_geometric.nn"), module("torch_geometric.datasets")
    depth = 2 if place.tiny else 3

    def train(swap: Swap) -> list[float]:
        data = datasets.KarateClub()[0].sort(sort_by_row=False).to(place.device)
        model = models.GraphSAGE(data.num_features, place.hidden, depth, 4, aggr="lstm", jk="lstm").to(place.device)
        swap(model)
        # No Adam: attention's bias has no gradient but rounding errors, which Adam takes for a direction.
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        losses = []
        for _ in range(3 if place.tiny else 20):
            loss = nn.functional.cross_entropy(model(data.x, data.edge_index), data.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    layers = {f"convs.{k}.aggr_module.lstm" for k in range(depth)} | {"jk.lstm"}
    check_same_training(train, layers, place)


# ---- language ------------------------------------------------------------------------------------------------------

SENTENCE = [
    ("The", "DET"), ("old", "ADJ"), ("man", "NOUN"), ("feeds", "VERB"), ("small", "ADJ"), ("birds", "NOUN"),
    ("slowly", "ADV"), (".", "PUNCT"),
]  # fmt: skip


@pytest.mark.parametrize("place", [CPU, INTERPRETER, GPU])
def test_tagger_of_stanza(place):
    """Stanza's tagger with its character model: packed sequences, bidirectional, trained states, dropout."""
    tagger, trainer = module("stanza.models.tagger"), module("stanza.models.pos.trainer")
    data, conll = module("stanza.models.pos.data"), module("stanza.utils.conll")
    sizes = {
        "hidden_dim": place.hidden, "char_hidden_dim": place.hidden, "char_emb_dim": 8, "word_emb_dim": 8,
        "transformed_dim": 8, "tag_emb_dim": 8, "deep_biaff_hidden_dim": 16, "composite_deep_biaff_hidden_dim": 8,
        "word_cutoff": 0, "augment_nopunct": 0.0,
    }  # fmt: skip

    def train(swap: Swap) -> list[float]:
        options = [f"--{name}={size}" for name, size in sizes.items()]
        args = vars(tagger.build_argparse().parse_args(["--no_pretrain", "--shorthand=en_test", *options]))
        sentences = data.Dataset(conll.CoNLL.conll2doc(input_str=treebank(24)), args, None)
        teacher = trainer.Trainer(args=args, vocab=sentences.vocab, pretrain=None, device=place.device)
        swap(teacher.model)
        return [
            float(teacher.update(batch))
            for _ in range(5)
            for batch in sentences.to_loader(batch_size=8, shuffle=True)
        ]  # fmt: skip

    layers = {"charmodel.charlstm.lstm", "taggerlstm.lstm.0.lstm", "taggerlstm.lstm.1.lstm"}
    check_same_training(train, layers, place)


def treebank(size: int) -> str:
    """Sentences of three to eight words in the CoNLL-U format."""
    lines = []
    for length in random.choices(range(2, len(SENTENCE)), k=size):
        for i, (word, tag) in enumerate([*SENTENCE[:length], SENTENCE[-1]]):
            fields = [i + 1, word, word.lower(), tag, "_", "_", min(i, 1), "dep" if i else "root", "_", "_"]
            lines.append("\t".join(map(str, fields)))
        lines.append("")
    return "\n".join(lines) + "\n"


# ---- tools ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Secure RNG turned off:UserWarning")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_opacus_takes_a_restored_model():
    """Its validator mends torch.nn's layers by type, and its engine trains what comes out."""
    validators, opacus = module("opacus.validators"), module("opacus")

    model = Tagger(nn.LSTM)
    expected = validators.ModuleValidator.fix(model)
    persistrnn.replace(model)
    found = validators.ModuleValidator.fix(persistrnn.restore(model).model)
    assert type(found.rnn) is type(expected.rnn)
    assert type(found.rnn) is not nn.LSTM
    data = torch.utils.data.TensorDataset(torch.randn(8, 5, 3), torch.randint(2, (8,)))
    private, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=found, optimizer=torch.optim.SGD(found.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
    )  # fmt: skip
    before = snapshot(found)
    for x, labels in loader:
        nn.functional.cross_entropy(private(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(value, before[name]) for name, value in snapshot(found).items())


class Tagger(nn.Module):
    """The class of each sequence, by its last step."""

    def __init__(self, layer: Callable[..., nn.Module] = nn.GRU, hidden: int = 8) -> None:
        super().__init__()
        self.rnn, self.head = layer(3, hidden, batch_first=True), nn.Linear(hidden, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.rnn(x)[0][:, -1])
        return y


def test_skorch_trains_clones_and_pickles_our_layer():
    skorch, numpy, pickle = module("skorch"), module("numpy"), module("pickle")
    x, labels = torch.randn(16, 5, 3).numpy(), numpy.arange(16) % 2
    losses = []
    for layer in (nn.GRU, persistrnn.GRU):
        torch.manual_seed(0)
        net = skorch.NeuralNetClassifier(
            Tagger, module__layer=layer, criterion=nn.CrossEntropyLoss, max_epochs=3, lr=0.1, train_split=None,
            verbose=0, iterator_train__shuffle=False,
        ).fit(x, labels)  # fmt: skip
        losses.append(net.history[:, "train_loss"])
        again = pickle.loads(pickle.dumps(net))
        assert (again.predict_proba(x) == net.predict_proba(x)).all()
    assert losses[0] == losses[1]


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks and attributes on non-linear:UserWarning")
def test_captum_attributes_the_same_to_inputs_and_to_a_layer():
    attr = module("captum.attr")
    model, x = Tagger(), torch.randn(2, 5, 3)

    def attributions() -> list[torch.Tensor]:
        by_input = attr.IntegratedGradients(model).attribute(x, target=1, n_steps=8)
        by_layer = attr.LayerActivation(model, model.rnn).attribute(x)[0]
        return [by_input, by_layer]

    expected = attributions()
    persistrnn.replace(model)
    torch.testing.assert_close(attributions(), expected)


def test_lightning_sums_up_our_layers_as_torchs():
    lightning, summary = module("lightning.pytorch"), module("lightning.pytorch.utilities.model_summary")

    class Training(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Tagger()
            self.example_input_array = torch.randn(2, 5, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.model(x)

    training = Training()
    expected = summary.ModelSummary(training, max_depth=-1)
    persistrnn.replace(training)
    found = summary.ModelSummary(training, max_depth=-1)
    for name in ("total_parameters", "trainable_parameters", "param_nums", "in_sizes", "out_sizes", "layer_names"):
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.interpreter
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_layers_of_pytorch_forecasting_are_accelerated(cell):
    """It subclasses torch.nn's, which `replace` leaves alone."""
    layers = module("pytorch_forecasting.models.nn.rnn")
    layer = getattr(layers, cell)(3, 4, batch_first=True)
    x, lengths = torch.randn(2, 5, 3), torch.tensor([5, 2])
    assert isinstance(layer, getattr(nn, cell))
    assert persistrnn.replace(layer).left

    def gradients() -> list[torch.Tensor]:
        y = layer(x, lengths=lengths, enforce_sorted=False)[0]
        return [y, *torch.autograd.grad(y.sin().sum(), list(layer.parameters()))]

    expected = gradients()
    with persistrnn.accelerated(backend="persistent") as calls:
        found = gradients()
    torch.testing.assert_close(found, expected)
    assert sum(calls.taken.values()) == 1
