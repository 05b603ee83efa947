"""`python tests/bench.py gpu`: is what a GPU computes right, and how fast is it? In six minutes.

Needs torch, torchvision, numpy, OpenCV, tqdm, scikit-learn, scipy and matplotlib alone, and no
network: hands, pictures and labels are made up. Each part prints its rows as they come and writes
them into tests/gpu.md, so that a run that is cut leaves what it had. What is compiled comes last:
it is left out where less than two minutes are left. Exit status 1 where a result is WRONG.
"""

import contextlib
import dataclasses
import functools
import io
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

import common
import finetune
import mine_pairs
import pretrain
from bench import CORES, ROOT, Row, run_stage
from made_up import made_up_hands, write_hands, write_labels

METHODS = [["--method", "peclr"], ["--method", "simclr"], ["--method", "keypoints"],
           *[["--weighting", kind] for kind in pretrain.WEIGHTINGS], ["--keypoint-loss", "0"]]


@dataclasses.dataclass
class Run:
    """Where, on what and how large; pixels are those of a view."""
    folder: Path
    device: torch.device
    seconds: float = 360
    start: float = dataclasses.field(default_factory=time.time)
    backbone: str = "resnet50"
    side: int = 128
    hands: int = 20_000
    batches: tuple = ((8192, 512), (8192, 1024), (1024, 1024))  # pairs; pairs at a time
    steps: int = 4  # of the largest batch
    checked: int = 64  # pairs or pictures whose gradient is compared with the CPU's
    checked_side: int = 64
    mined: tuple = (200_000, 2_000_000)  # compared with the CPU's result; timed
    pictures: int = 16_384


TINY = dict(seconds=0, backbone="resnet18", side=32, hands=32, batches=((8, 4), (4, 4)), steps=2,
            checked=4, checked_side=32, mined=(400, 800), pictures=16)


def measure(args):
    if args.size == "full" and not torch.cuda.is_available():
        sys.exit("bench.py: no GPU here; --size tiny tries the command without one")
    device = common.start_ranks(None)[2]
    torch.zeros(1, device=device)  # from here on the GPU is in use, and the facts name it
    out = args.out or ROOT / "tests" / "gpu.md"
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), device, **(TINY if args.size == "tiny" else {}))
        video = np.arange(run.hands) // 100
        write_hands(run.folder / "hands", made_up_hands(run.hands), video, 224, pictures=1000)
        for name, part in PARTS.items():
            rows = []
            try:
                run_stage(out, name, keep(part(run), rows))
            except Exception:  # the other parts are worth having
                traceback.print_exc()
                wrong = True
            wrong |= any("WRONG" in row.ratio for row in rows)
            print(f"{time.time() - run.start:.0f} s so far", flush=True)
    sys.exit(int(wrong))


def keep(items, kept):
    """Yields the items, and appends them to a list."""
    for item in items:
        kept.append(item)
        yield item


def parse(module, *words):
    """The arguments of one of our scripts, as it parses them."""
    sys.argv = [f"{module.__name__}.py", *map(str, words)]
    return module.parse_args()


def pretrain_args(run, batch, micro, *words):
    return parse(pretrain, run.folder / "hands", "--out", "unused", "--weights", "none",
                 "--batch-size", batch, "--micro-batch", micro, "--device", run.device.type, *words)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work, device, times):
    """What a call of work() takes in the mean, after one that does not count."""
    work()
    wait(device)
    start = time.time()
    for _ in range(times):
        work()
    wait(device)
    return (time.time() - start) / times


def difference(found, right):
    """The length of the difference of two lists of tensors, as a share of the second's."""
    found, right = [torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors])
                    for tensors in (found, right)]
    return float((found - right).norm() / right.norm())


def verdict(is_right):
    return "right" if is_right else "WRONG"


# ----------------------------------------------------------------------------------- is it right?

def correctness(run):
    """Losses and gradients in float32, without TF32; mined neighbours."""
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    for words in METHODS:
        args = pretrain_args(run, run.checked, run.checked // 2, "--backbone", "resnet18",
                             "--input-size", run.checked_side, "--precision", "fp32", *words)
        yield compare(" ".join(words[-2:]), functools.partial(pretraining_gradient, run, args), run)
    for head in ("detnet", "linear"):
        yield compare(f"--head {head}", functools.partial(tuning_gradient, run, head), run)
    torch.backends.cudnn.allow_tf32 = tf32
    yield mining_is_the_same(run)
    if run.device.type == "cuda":
        yield never_waits(run)


def compare(what, gradient, run):
    """gradient: device -> loss and gradients."""
    right = gradient(torch.device("cpu"))
    found = right if run.device.type == "cpu" else gradient(run.device)
    of_loss, of_gradient = [difference(a, b) for a, b in zip(found, right)]
    return Row(f"loss and gradient, {what}", f"{of_loss:.1e}, {of_gradient:.1e}", "CPU",
               verdict(of_loss < 1e-4 and of_gradient < 1e-2), "relative differences, float32")


def pretraining_gradient(run, args, device):
    data = pretrain.load_data(args)
    plan = pretrain.make_plan(args, len(data.pool), 0, 1, device)
    torch.manual_seed(0)
    model = pretrain.make_model("none", device, args).train()
    pieces = make_pieces(data, plan, args, device)
    values = pretrain.add_gradient(model, pieces, data.pca, plan, args)
    return [values["loss"]], [p.grad for p in model.parameters()]


def make_pieces(data, plan, args, device):
    """The micro-batches of the first step, on the device."""
    pieces = []
    for items in pretrain.items_of_steps(0, 1, len(data.pool), plan, args.seed):
        pairs = [pretrain.make_pair(data, hand, epoch, args) for epoch, hand in items]
        pieces.append(pretrain.to_device(pretrain.collate(pairs), device))
    return pieces


def tuning_gradient(run, head, device):
    args = parse(finetune, *write_labels(run.folder / "few", run.checked, pictures=run.checked),
                 "--out", "unused", "--weights", "none", "--input-size", run.checked_side, "--head",
                 head)
    pictures = finetune.Pictures(finetune.load_data(args).test, finetune.make_crops(args))
    batch = finetune.collate([pictures((0, k)) for k in range(run.checked)])
    batch = {key: value.to(device) for key, value in batch.items()}
    torch.manual_seed(0)
    network = finetune.NETWORKS[head]("resnet18", "none")
    network = network.to(device, memory_format=torch.channels_last).train()
    loss = finetune.LOSSES[head](finetune.forward(network, batch["image"], "fp32"), batch)
    loss.backward()
    return [loss], [p.grad for p in network.parameters()]


def mining_is_the_same(run):
    embeddings, video = embed(run.mined[0])
    ours, seconds = timed(mine_pairs.nearest, embeddings, video, 1, run.device)
    right, usual = timed(mine_pairs.nearest, embeddings, video, 1, torch.device("cpu"))
    same = all(a.tobytes() == b.tobytes() for a, b in zip(ours, right))
    return Row(f"neighbours and distances of {run.mined[0]} hands, to the last byte",
               f"{seconds:.1f} s", f"{usual:.1f} s", verdict(same), f"CPU, {CORES} cores")


def embed(count):
    """Made-up hands as mining compares them -> embeddings (N, 14), video (N,)."""
    poses = mine_pairs.as_poses(made_up_hands(count), 1, True)
    mean, components, _ = mine_pairs.fit_pca(poses, 14)
    return ((poses - mean) @ components.T).astype(np.float32), np.arange(count) // 100


def timed(function, *arguments):
    """-> what it returns, and the seconds that it took."""
    start = time.time()
    found = function(*arguments)
    return found, time.time() - start


def never_waits(run):
    """A step must only queue work for the GPU. -> Row"""
    args = pretrain_args(run, run.checked, run.checked // 2)
    model, optimizer, data, plan = set_up(run, args)
    pieces = make_pieces(data, plan, args, run.device)
    step = functools.partial(pretrain.train_step, model, optimizer, pieces, None, plan, args)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        error = ""
    except RuntimeError as found:
        error = str(found).splitlines()[0]
    torch.cuda.set_sync_debug_mode("default")
    return Row("a step's Python never waits for the GPU", error, "", verdict(not error))


def resuming(run):
    """A run of each script without a stop, beside one that is killed after its first checkpoint and
    started again. On a CPU they agree bit for bit; a GPU may add in another order."""
    shared = ["--weights", "none", "--backbone", "resnet18", "--input-size", 32, "--epochs", 1,
              "--device", run.device.type]
    labels = write_labels(run.folder / "few", 4 * run.checked, pictures=run.checked)
    words = {pretrain: [run.folder / "hands", "--batch-size", run.hands // 4, *shared],
             finetune: [*labels, "--batch-size", run.checked, "--head", "linear", *shared]}
    killed = {module: start(module, run, words[module]) for module in words}
    for module, process in killed.items():
        kept = run.folder / f"killed-{module.__name__}" / "checkpoint.pt"
        while not kept.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
    for module in words:
        models = []
        for name in ("killed", "straight"):
            out = run.folder / f"{name}-{module.__name__}"
            quietly(module, *words[module], "--out", out)
            models.append(common.load_checkpoint(out / "checkpoint.pt")["model"].values())
        off = difference(*models)
        yield Row(f"{module.__name__}.py, killed and resumed", f"{off:.1e}", "without a stop",
                  verdict(off < 0.02), "relative difference of the weights")


def start(module, run, words):
    command = [sys.executable, module.__file__, *words, "--save-minutes", 0, "--out",
               run.folder / f"killed-{module.__name__}"]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


# --------------------------------------------------------------------------------- how fast is it?

def speed(run, compiled=False):
    """A step with its loader, beside forward, backward and optimiser on one micro-batch that is
    there already."""
    if not compiled:
        yield loader_speed(run)
    for batch, micro in run.batches:
        if compiled and run.seconds - (time.time() - run.start) < 120:
            yield Row(f"{batch} pairs, {micro} at a time, compiled", "left out: no time left")
            continue
        yield from step_speed(run, batch, micro, compiled)


def loader_speed(run):
    micro = min(64, run.batches[0][1])  # small: the processes are then rarely all done at once
    args = pretrain_args(run, micro, micro, "--input-size", run.side)
    data = pretrain.load_data(args)
    plan = pretrain.make_plan(args, len(data.pool), 0, 1, run.device)
    items = pretrain.items_of_steps(0, 75 * run.steps, len(data.pool), plan, args.seed)
    batches = common.load_items(lambda item: pretrain.make_pair(data, item[1], item[0], args),
                                items, args.workers, pretrain.collate)
    first = 4 * args.workers  # those that were made while the processes started
    for _ in range(first):
        next(batches)
    start = time.time()
    count = sum(1 for _ in batches)
    rate = 2 * micro * count / (time.time() - start)
    return Row(f"loader alone, {args.workers} processes, views of {run.side} px",
               f"{rate:.0f} views/s")


def step_speed(run, batch, micro, compiled):
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    steps = run.steps * max(1, run.batches[0][0] // batch // 2)
    args = pretrain_args(run, batch, micro, "--backbone", run.backbone, "--input-size", run.side,
                         *(["--compile"] if compiled else []))
    model, optimizer, data, plan = set_up(run, args)
    batches = pretrain.load_batches(data, 0, steps, plan, args)
    for done, pieces in enumerate(batches, 1):
        pretrain.train_step(model, optimizer, pieces, data.pca, plan, args)
        if done == steps // 2:  # by now the kernels are chosen and the loader runs
            wait(run.device)
            start = time.time()
    wait(run.device)
    seconds = (time.time() - start) / (steps - steps // 2)
    rate = 2 * batch / seconds
    memory = pretrain.peak_memory(run.device)

    step = functools.partial(pretrain.train_step, model, optimizer, pieces, data.pca, plan, args)
    without_loader = seconds_of(step, run.device, max(1, steps // 2))
    losing = seconds_of(functools.partial(lose, pieces, args), run.device, 3)
    bare = functools.partial(bare_step, model, optimizer, pieces[0], plan.precision)
    bare_rate = 2 * micro / seconds_of(bare, run.device, 10)
    what = f"{run.backbone}, {run.side} px, {batch} pairs, {micro} at a time, {plan.precision}"
    note = "the network alone" + ("" if micro == batch else "; ours embeds twice: 0.75 at most")
    yield Row(what + (", compiled" if compiled else ""), f"{rate:.0f} views/s, {memory:.1f} GB",
              f"{bare_rate:.0f} views/s", f"{rate / bare_rate:.2f}", note)
    waits = max(0, 1 - without_loader / seconds)
    loss = losing / seconds
    yield Row("its time is spent on", f"loader {waits:.0%}, loss {loss:.0%}, network "
              f"{1 - waits - loss:.0%}")


def set_up(run, args):
    """-> model, optimizer, data, plan"""
    data = pretrain.load_data(args)
    plan = pretrain.make_plan(args, len(data.pool), 0, 1, run.device)
    model = pretrain.make_model("none", run.device, args).train()
    return model, pretrain.make_optimizer(model, args.optimizer, args.lr), data, plan


def lose(pieces, args):
    """The loss of a step and its gradient, with made-up embeddings."""
    count = sum(len(piece["angle"]) for piece in pieces) // 2
    device = pieces[0]["angle"].device
    first, second = [F.normalize(torch.randn(count, pretrain.EMBEDDING, device=device))
                     for _ in range(2)]
    first.requires_grad_()
    pretrain.batch_loss(first, second, pieces, None, args)[0].backward()


def bare_step(model, optimizer, piece, precision):
    images = common.normalise(piece["image"])
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        projection, _ = model(images)
    projection.float().sum().backward()
    optimizer.step()


def losses(run):
    """The loss of the largest batch and its gradient, by weighting."""
    batch, micro = run.batches[0]
    for kind in pretrain.WEIGHTINGS:
        args = pretrain_args(run, batch, batch, "--input-size", 16, "--weighting", kind,
                             "--keypoint-loss", 0)
        pieces = [{"angle": torch.zeros(2 * batch, device=run.device),
                   "weight_keypoints": torch.rand(2 * batch, 21, 2, device=run.device) * 128}]
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(functools.partial(lose, pieces, args), run.device, 3)
        yield Row(f"{kind}, {batch} pairs", f"{seconds:.3f} s, "
                  f"{pretrain.peak_memory(run.device):.2f} GB")


def mining(run):
    """Beside the whole matrix of distances, a block of rows at a time, for some of the rows."""
    count = run.mined[1]
    (embeddings, video), preparing = timed(embed, count)
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    (_, distances), seconds = timed(mine_pairs.nearest, embeddings, video, 1, run.device)
    memory = pretrain.peak_memory(run.device)
    points = torch.from_numpy(embeddings).to(run.device)
    group = torch.from_numpy(video).to(run.device)
    chosen = torch.arange(0, count, 200, device=run.device)
    least = []

    def brute_force():
        for rows in chosen.split(256):
            every = torch.cdist(points[rows], points)
            every.masked_fill_(group[rows, None] == group, torch.inf)
            # Measured once more: products of matrices are not exact for near neighbours.
            least.append((points[every.argmin(1)] - points[rows]).norm(dim=1))

    usual = seconds_of(brute_force, run.device, 1) * count / len(chosen)
    found = torch.cat(least[:len(least) // 2]).cpu().numpy()
    ours = distances[chosen.cpu().numpy(), 0]
    same = (ours <= found * (1 + 1e-5)).all() and np.isclose(ours, found, rtol=1e-5).mean() > 0.9
    yield Row(f"{count} hands, top-1 of other videos", f"{seconds:.1f} s, {memory:.2f} GB",
              f"{usual:.1f} s", f"{usual / seconds:.1f}, {verdict(same)}",
              "all distances, of every 200th hand, times 200")
    yield Row("making these hands up, and their PCA, not counted above", f"{preparing:.1f} s")


def tuning(run):
    """The second epoch of DetNet, its loader included, beside forward, backward and optimiser on
    tensors that are there; and the nearest features."""
    batch = min(128, run.pictures // 4)
    words = [*write_labels(run.folder / "labelled", run.pictures), "--weights", "none",
             "--backbone", run.backbone, "--input-size", run.side, "--batch-size", batch,
             "--device", run.device.type]
    out = run.folder / "tuned"
    quietly(finetune, *words, "--epochs", 2, "--out", out)
    rows = common.read_log(out / "log.jsonl")
    rate = next(row for row in rows if row.get("epoch") == 2)["pictures_per_s"]
    network = finetune.DetNet(run.backbone, "none")
    network = network.to(run.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    images = torch.zeros(batch, run.side, run.side, 3, dtype=torch.uint8, device=run.device)
    precision = "bf16" if run.device.type == "cuda" else "fp32"

    def bare():
        optimizer.zero_grad(set_to_none=True)
        outputs = finetune.forward(network, images, precision)
        sum(output.float().sum() for output in outputs).backward()
        optimizer.step()

    bare_rate = batch / seconds_of(bare, run.device, 10)
    yield Row(f"DetNet on {run.backbone}, {run.side} px, batch {batch}, {precision}",
              f"{rate:.0f} pictures/s", f"{bare_rate:.0f} pictures/s", f"{rate / bare_rate:.2f}",
              "the network alone")

    seconds = timed(quietly, finetune, *words, "--head", "knn", "--out", run.folder / "knn")[1]
    network.backbone.eval()

    @torch.no_grad()
    def describe():
        finetune.forward(network.backbone, images, precision)

    usual = seconds_of(describe, run.device, 10) / batch * 2 * run.pictures
    yield Row(f"--head knn, {run.pictures} training and as many test pictures, all of it",
              f"{seconds:.1f} s", f"{usual:.1f} s", f"{usual / seconds:.2f}",
              "the backbone alone, on tensors that are there")


def quietly(module, *words):
    """Run a script's main() here, without its output."""
    sys.argv = [f"{module.__name__}.py", *map(str, words)]
    with contextlib.redirect_stdout(io.StringIO()):
        module.main()


def one_rank(run):
    """A step as one of several ranks takes it, through nccl (a CPU: gloo), beside one without."""
    micro = run.batches[0][1]
    args = pretrain_args(run, micro, micro, "--backbone", run.backbone, "--input-size", run.side)
    gradients = []
    seconds = []
    for ranks in (False, True):
        if ranks:
            backend = "cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, init_method=f"file://{run.folder}/ranks", rank=0,
                                    world_size=1)
        torch.manual_seed(0)
        model, optimizer, data, plan = set_up(run, args)
        net = common.spread(model, run.device)
        pieces = make_pieces(data, plan, args, run.device)
        step = functools.partial(pretrain.train_step, net, optimizer, pieces, None, plan, args)
        values = pretrain.add_gradient(net, pieces, None, plan, args)
        gradients.append([values["loss"], *[p.grad.clone() for p in model.parameters()]])
        seconds.append(seconds_of(step, run.device, run.steps))
    common.end_ranks()
    off = difference(gradients[1], gradients[0])
    yield Row(f"a step of {micro} pairs", f"{seconds[1]:.3f} s", f"{seconds[0]:.3f} s",
              f"{seconds[0] / seconds[1]:.2f}, {verdict(off < 0.2)}",
              f"without ranks; the gradient differs by {off:.1e}")


PARTS = {"correctness": correctness, "resuming": resuming, "speed of pre-training": speed,
         "loss": losses, "mining": mining, "fine-tuning": tuning, "one rank of nccl": one_rank,
         "compiled": functools.partial(speed, compiled=True)}
