"""The paths that only a GPU takes, on machines without one: FakeTensorMode follows devices, dtypes
and shapes through the code with tensors on "cuda" that hold no data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import finetune

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


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("head", finetune.LOSSES)
def test_the_fine_tuning_step_stays_on_the_gpu(fake_gpu, head, frozen, precision):
    plan = finetune.Plan(rank=0, ranks=1, device=CUDA, precision=precision, batch_size=4, workers=0)
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
