"""The paths that only a GPU takes, on machines without one: FakeTensorMode follows devices, dtypes
and shapes through the code with tensors on "cuda" that hold no data."""

import functools
import sys

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import finetune
import pretrain
from common import nt_xent, pair_weights, soft_targets

CUDA = torch.device("cuda", 0)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors hold no data. backward(), whose threads would need the device, gives each parameter
    that the graph reaches a gradient like itself."""
    def backward(self, gradient=None, **options):
        like_itself = gradient is None or (
            gradient.shape == self.shape and gradient.device == self.device
            and gradient.dtype == self.dtype)
        assert like_itself, f"{gradient} is no gradient of {self}"
        for leaf in leaves(self):
            assert leaf.device == CUDA
            leaf.grad = torch.zeros_like(leaf)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    # Autocast asks the machine, and would be off without a GPU.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def leaves(tensor):
    """The parameters that a tensor was computed from."""
    found = []
    seen = {None}
    todo = [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


# ------------------------------------------------------------------------------------- fine-tuning

def labelled_batch(count=4, side=64):
    """A batch as finetune.collate makes it, on the CPU."""
    return dict(image=torch.zeros(count, side, side, 3, dtype=torch.uint8),
                uv=torch.zeros(count, 21, 2), pose=torch.zeros(count, 21, 3),
                valid=torch.ones(count, 21, dtype=torch.bool))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", finetune.LOSSES)
def test_the_fine_tuning_step_stays_on_the_gpu(fake_gpu, head, frozen):
    plan = finetune.Plan(rank=0, ranks=1, device=CUDA, precision="bf16", batch_size=4, workers=0)
    with CUDA:
        model = finetune.NETWORKS[head]("resnet18", "none")
    optimizer = finetune.make_optimizer(model, 1e-3, None if frozen else 1e-3)
    batch = finetune.to_device(labelled_batch(), CUDA)
    loss = finetune.train_step(model, optimizer, batch, finetune.LOSSES[head], plan)
    assert (loss.device, loss.dtype, loss.shape) == (CUDA, torch.float32, ())
    for name, parameter in model.named_parameters():
        learns = not (frozen and name.startswith("backbone."))
        assert (parameter.grad is not None) == learns, name
    for state in optimizer.state.values():
        assert all(value.device == CUDA for value in state.values())


@pytest.mark.parametrize("head", finetune.LOSSES)
def test_the_prediction_of_bf16_is_read_in_float32(fake_gpu, head):
    with CUDA:
        model = finetune.NETWORKS[head]("resnet18", "none").eval()
    images = labelled_batch()["image"].to(CUDA)
    for values in model.read(finetune.forward(model, images, "bf16")):
        assert values.device == CUDA and values.shape[:2] == (4, 21)
        assert values.dtype == torch.float32


def test_autocast_reaches_the_gpu(fake_gpu):
    """Else the tests above would see float32 alone."""
    with CUDA:
        backbone = finetune.load_backbone("resnet18", "none").eval()
    features = finetune.forward(backbone, labelled_batch()["image"].to(CUDA), "bf16")
    assert (features.device, features.dtype, features.shape) == (CUDA, torch.bfloat16, (4, 512))


# ------------------------------------------------------------------------------------ pre-training

METHODS = {"simhand": [], "peclr": ["--method", "peclr"], "simclr": ["--method", "simclr"],
           "keypoints": ["--method", "keypoints"], "no keypoints": ["--keypoint-loss", "0"],
           "paper": ["--paper"], "pca": ["--weighting", "linear", "--weight-pca"],
           **{kind: ["--weighting", kind] for kind in pretrain.WEIGHTINGS if kind != "none"}}


def pretraining(monkeypatch, device, words, pieces=1, precision="bf16"):
    """-> model, and a function that takes a step of so many pieces of 4 pairs."""
    flags = ["--out", "unused", "--backbone", "resnet18", "--input-size", "64", *words]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "unused", *flags])
    args = pretrain.parse_args()
    plan = pretrain.Plan(rank=0, ranks=1, device=device, precision=precision, workers=0,
                         batch_size=4 * pieces, pieces=pieces)
    with device:  # as make_model has it: tensors that hold no data cannot be moved
        model = pretrain.SimHandModel("resnet18", "none", contrast=args.method != "keypoints",
                                      regress=args.keypoint_loss > 0)
    optimizer = pretrain.make_optimizer(model, args.optimizer, args.lr)
    piece = dict(image=torch.zeros(8, 64, 64, 3, dtype=torch.uint8), angle=torch.zeros(8),
                 keypoints=torch.rand(8, 21, 2), shift=torch.zeros(8, 2),
                 weight_keypoints=torch.rand(8, 21, 2))
    pca = torch.zeros(14, 42) if args.weight_pca else None  # stays on the CPU, as load_data has it
    batch = [pretrain.to_device(piece, device) for _ in range(pieces)]
    return model, functools.partial(pretrain.train_step, model, optimizer, batch, pca, plan, args)


def check_step(model, step, device):
    """Values, gradients and parameters stay where and what they are."""
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    values = step()
    assert "loss" in values
    for name, value in values.items():
        assert (value.device, value.dtype, value.shape) == (device, torch.float32, ()), name
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert (gradient.device, gradient.dtype) == (device, torch.float32), name
        assert gradient.shape == parameter.shape, name
    for name, tensor in model.state_dict().items():
        assert (tensor.shape, tensor.dtype) == before[name] and tensor.device == device, name


@pytest.mark.parametrize("method, pieces", [("simhand", 1), ("no keypoints", 1),
                                            *((method, 2) for method in METHODS)])
def test_the_pretraining_step_stays_on_the_gpu(fake_gpu, monkeypatch, method, pieces):
    model, step = pretraining(monkeypatch, CUDA, METHODS[method], pieces)
    check_step(model, step, CUDA)


@pytest.mark.parametrize("optimizer", ["adam", "lars"])
def test_the_other_optimisers_stay_on_the_gpu(fake_gpu, monkeypatch, optimizer):
    sgd = torch.optim.SGD  # whose fused kernel cannot be followed
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, fused, **more: sgd(*a, **more))
    words = ["--optimizer", optimizer]
    model, step = pretraining(monkeypatch, CUDA, words, precision="fp32")
    check_step(model, step, CUDA)


@pytest.mark.parametrize("method, pieces", [("simhand", 1), ("simhand", 2), ("no keypoints", 2)])
def test_autograd_gives_each_parameter_a_gradient_of_its_shape(monkeypatch, method, pieces):
    """By its own backward, which goes through bf16 and back; on a CPU that holds no data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cpu")
        model, step = pretraining(monkeypatch, device, METHODS[method], pieces)
        check_step(model, step, device)


def test_a_large_batch_is_lost_and_weighed_on_the_gpu(fake_gpu):
    """8,192 views, of which the loss takes some rows at a time."""
    z1 = torch.zeros(4096, 16, device=CUDA, requires_grad=True)
    z2 = torch.zeros(4096, 16, device=CUDA, requires_grad=True)
    hands = torch.rand(2, 4096, 21, 2, device=CUDA)
    for more in (dict(zip(("pos_weight", "neg_weight"), pair_weights(*hands))),
                 {"target": soft_targets(*hands, 0.06)}):
        for weight in more.values():
            assert weight.device == CUDA and weight.dtype == torch.float32
        loss = nt_xent(F.normalize(z1), F.normalize(z2), **more)
        assert (loss.device, loss.dtype, loss.shape) == (CUDA, torch.float32, ())


def test_the_network_is_compiled_to_two_graphs_once(monkeypatch):
    """One with gradients and one without, whole, over three steps of micro-batches; a graph more
    would mean minutes on a GPU."""
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    counters.clear()
    words = METHODS["simhand"]
    model, step = pretraining(monkeypatch, torch.device("cpu"), words, 2, "fp32")
    model.backbone = torch.nn.Sequential(  # a small one: what breaks a graph is around it
        torch.nn.Conv2d(3, 512, 16, 16), torch.nn.BatchNorm2d(512), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten())
    model.compile(backend=count)
    for _ in range(3):
        values = step()
    assert values["loss"].isfinite()
    assert len(compiled) == 2 and not counters["graph_break"], counters["graph_break"]
    torch._dynamo.reset()
