"""Pre-train a ResNet on unlabelled hands by contrast: SiMHand, PeCLR or SimCLR.

Reads hands folders with their mined pairs and writes into --out: backbone.pt (a torchvision
ResNet state dict without fc), checkpoint.pt, log.jsonl, curves.png, views.jpg. Stop it at any
moment and run the same command again: it goes on. Under torchrun the batch is spread over all
ranks; with the same --micro-batch, loss and gradient do not depend on their number.

    python pretrain.py data/ego4d data/100doh --out runs/simhand --micro-batch 512
    python pretrain.py demo/hands --out runs/tiny --backbone resnet18 --weights none \
        --batch-size 64 --epochs 2

To read: arguments, main, then the method (the pairs' views, the step, the network, the optimiser).
Whoever wants the method may stop at the banner "files"; the loss itself stands in common.py.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import resource
import statistics
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import (BACKBONES, BORDERS, CORES, InputError, any_rank, apply_view, atomic,
                    average_statistics, batchnorms, catch_sigterm, check_flags, claim_folder,
                    crop_matrix, draw_hand, end_ranks, load_array, load_backbone, load_hands,
                    load_items, move_points, normalise, nt_xent, pair_turns, pair_weights, plain,
                    plot_curves, print_settings, progress, read_crop, refuse_idle_flags, require,
                    rescale_points, resume, run_script, sample_view, save_checkpoint, save_image,
                    sheet, spread, start_log, start_ranks, undo_view, write_log)

MAY_CHANGE_ON_RESUME = ("out", "device", "workers", "save_minutes", "tensorboard")
EXTRA_AUGMENTATIONS = {
    "colour_drop": "share of the views, 0 to 1, that become grey (default of this and the next "
                   "four: 0)",
    "blur": "share that is blurred, by a Gaussian of up to 2 px (at 128 px)",
    "noise": "share that gets Gaussian noise, of up to 25 of 255",
    "sobel": "share that shows its edges alone",
    "cut_out": "share that loses a square of 0.1 to 0.4 of its side"}


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("hands", nargs="+", help="hands folders; each hand's positive comes from its own folder")
    flag("--pairs", nargs="+", help="folders with the mined pairs, one for each hands folder "
         "(default: the hands folders themselves)")
    flag("--out", required=True, help="folder of this run")
    add_method_flags(flag)
    add_view_flags(flag)
    add_training_flags(flag)
    return parser


def add_method_flags(flag):
    flag("--method", choices=("simhand", "peclr", "simclr"), default="simhand",
         help="simhand: the positive is the mined neighbour; peclr: the same picture once more; "
         "simclr: the same, without equivariance and rotation")
    flag("--weighting", choices=("none", "linear", "nonlinear", "balanced"), default="none",
         help="how the distance of two hands' keypoints becomes a weight in the loss; balanced: "
         "linear weights over their mean (paper: linear; default: none)")
    flag("--weight-on", choices=("both", "pos", "neg"), default="both",
         help="pairs that are weighted")
    flag("--weight-keypoints", choices=("augmented", "original"), default="augmented",
         help="keypoints that the distance is taken between: the views', or the crops' before any "
         "view")
    flag("--weight-pca", action="store_true", help="measure the distance in the PCA embedding of "
         "mining (pca.npy) instead of over the joints")
    flag("--slope-pos", type=float, default=1.0,
         help="nonlinear weights of positives: slope per pixel")
    flag("--slope-neg", type=float, default=0.05,
         help="nonlinear weights of all pairs: slope per pixel")
    flag("--top-k", type=int, default=1, help="draw the positive among the first k neighbours")
    flag("--temperature", type=float, default=0.5, help="of NT-Xent (paper: 0.5)")
    flag("--shift-unit", choices=("side", "hand"), default="side",
         help="side: undo a view's shift as a share of the view's side (paper); hand: as a share "
         "of the hand's own extent, which undoes it exactly for a projection that is the keypoints")
    flag("--equivariance", choices=("both", "rotation", "shift", "none"),
         help="what of a view is undone on the projection before the loss (default: both; simclr: "
         "none)")


def add_view_flags(flag):
    flag("--input-size", type=int, default=128, help="side of a view in pixels (paper: 128)")
    flag("--rotation", type=float, help="degrees to either side (default: 45; simclr: 0)")
    flag("--crop-margin", type=float, nargs=2, metavar=("LOW", "HIGH"),
         help="half side of the view, in largest distances of a keypoint from the keypoints' mean "
         "(default: 0.9 1.5; simclr: 1.25 1.25)")
    flag("--crop-move", type=float, default=15 / 448, help="largest shift of the view per axis, as "
         "a share of the crop's side (default: 15/448; paper: 15/224, of crops half as wide)")
    flag("--border", choices=sorted(BORDERS), default="mirror",
         help="what a view shows beyond the crop: the mirrored picture, or black (paper)")
    flag("--no-colour", action="store_true", help="no colour jitter")
    for name, text in EXTRA_AUGMENTATIONS.items():
        flag(f"--{name.replace('_', '-')}", type=float, default=0, metavar="SHARE", help=text)


def add_training_flags(flag):
    # network
    flag("--backbone", choices=BACKBONES, default="resnet50", help="(paper: resnet50)")
    flag("--weights", default="imagenet",
         help="start from imagenet, none (random weights), or a file")
    # optimisation
    flag("--epochs", type=int, default=100, help="(paper: 100)")
    flag("--batch-size", type=int, default=8192, help="pairs a step over all ranks; each view has "
         "2 x this - 2 negatives (paper: 8192)")
    flag("--micro-batch", type=int, help="pairs that pass the network together on one rank: less "
         "memory, more time (all are embedded twice), the gradient of the whole batch. "
         "BatchNorm's statistics are those of a micro-batch (default: the rank's whole share)")
    flag("--optimizer", choices=("lars-adam", "adam", "lars"), default="lars-adam",
         help="lars-adam: LARS around Adam (paper); lars: around SGD with momentum 0.9")
    flag("--lr", type=float, default=3.2e-3, help="peak learning rate (paper: 1e-4 x sqrt(1024))")
    flag("--weight-decay", type=float, default=1e-6, help="(paper: 1e-6)")
    flag("--warmup-epochs", type=int,
         help="linear warm-up (default: a tenth of the epochs; paper: 10)")
    flag("--seed", type=int, default=0, help="of the new layers, the order and the views")
    # machine
    flag("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    flag("--device", help="cpu or cuda (default: the GPU when there is one)")
    flag("--workers", type=int, default=min(16, CORES),
         help="loader processes of each rank, 0: none (default: one a core, 16 at most)")
    flag("--compile", action="store_true", help="compile the network (torch.compile): minutes at "
         "the start, and then less time a step")
    flag("--save-minutes", type=float, default=10,
         help="checkpoint this often, and after every epoch")
    flag("--tensorboard", action="store_true",
         help="write the log for TensorBoard as well, into --out")
    flag("--steps", type=int, help="dry run: take so many steps, print rate, memory and the time "
         "that the whole run would take, write nothing")


def parse_args():
    parser = make_parser()
    args = parser.parse_args()
    check_flags(args)
    args.hands = [os.path.normpath(folder) for folder in args.hands]
    if args.pairs:
        args.pairs = [os.path.normpath(folder) for folder in args.pairs]
    simclr = args.method == "simclr"
    if args.equivariance is None:
        args.equivariance = "none" if simclr else "both"
    if args.rotation is None:
        args.rotation = 0.0 if simclr else 45.0
    if args.crop_margin is None:
        args.crop_margin = [1.25, 1.25] if simclr else [0.9, 1.5]
    if args.weighting == "none":
        idle = ("weight_on", "weight_keypoints", "weight_pca")
        refuse_idle_flags(args, parser, idle, "so far: expected a --weighting, as linear")
    if args.weighting != "nonlinear":
        refuse_idle_flags(args, parser, ("slope_pos", "slope_neg"),
                          "without --weighting nonlinear")
    if args.method != "simhand":
        refuse_idle_flags(args, parser, ("top_k",), "without --method simhand")
    if args.warmup_epochs is None:
        args.warmup_epochs = args.epochs // 10
    require(min(args.epochs, args.top_k, args.input_size, args.temperature, args.lr) > 0,
            "--epochs, --top-k, --input-size, --temperature and --lr must be above 0")
    require(args.micro_batch is None or args.micro_batch > 0, "--micro-batch must be above 0")
    require(args.steps is None or args.steps > 1,
            "--steps must be above 1: the first half is not measured")
    shares = [getattr(args, name) for name in ("crop_move", *EXTRA_AUGMENTATIONS)]
    require(max(shares) <= 1, "--crop-move and the shares of the views must lie in 0..1")
    require(0 <= args.warmup_epochs < args.epochs,
            f"--warmup-epochs {args.warmup_epochs} must be below --epochs {args.epochs}")
    low, high = args.crop_margin
    require(0 < low <= high < math.inf, "--crop-margin: expected 0 < LOW <= HIGH")
    return args


@dataclasses.dataclass
class Plan:
    """What follows from the arguments, the hands and the machine."""
    rank: int
    ranks: int
    micro_batch: int  # pairs that pass the network together
    pieces: int  # micro-batches of a step on one rank
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    precision: str


def main():
    args = parse_args()
    stop = [] if args.steps else catch_sigterm()
    rank, ranks, device = start_ranks(args.device)
    data = load_data(args)
    plan = make_plan(args, len(data.pool), rank, ranks, device)
    out = Path(args.out)
    writes = rank == 0 and not args.steps
    claim_folder(out, writes)

    torch.manual_seed(args.seed)
    settings = plain(args, micro_batch=plan.micro_batch, precision=plan.precision)
    kept = None if args.steps else resume(out, settings, MAY_CHANGE_ON_RESUME)
    model = make_model("none" if kept else args.weights, device, args)
    optimizer = make_optimizer(model, args)
    step = restore(kept, model, optimizer, data, args) if kept else 0
    net = spread(model, device)
    if rank == 0:
        introduce(args, plan, data, model, step, device)
    rows = start_run(settings, data, step, args) if writes else []
    board = open_tensorboard(out, step) if args.tensorboard and writes else None

    end = min(plan.steps, args.steps or plan.steps)
    loader = load_items(Pairs(data, args), hands_of_steps(step, end, len(data.pool), plan, args),
                        args.workers, collate, pin_memory=device.type == "cuda")
    report_every = max(1, min(10, plan.steps_per_epoch // 4))
    recent = []  # values of the steps since the last report
    saved = since = time.time()
    net.train()
    bar = progress(total=end, initial=step, unit="step", disable=rank != 0)
    while step < end:
        set_learning_rate(optimizer, step, plan, args)
        batch = [to_device(next(loader), device) for _ in range(plan.pieces)]
        recent.append(train_step(net, optimizer, batch, data.pca, plan, args))
        step += 1
        bar.update()

        end_of_epoch = step % plan.steps_per_epoch == 0
        overdue = time.time() - saved > 60 * args.save_minutes
        stopping, due = any_rank(bool(stop), end_of_epoch or overdue)
        wanted = step in (end // 2, end) if args.steps else step % report_every == 0
        if wanted or due or stopping:
            rows.append(report(step, recent, since, optimizer, plan, args))
            show(rows[-1], bar, board, out if writes else None)
            recent = []
            since = time.time()
        if (due or stopping) and not args.steps:
            save(settings, data, step, model, optimizer, writes, args)
            if writes and (end_of_epoch or stopping):
                plot_curves(out / "curves.png", rows, [["loss"], ["lr"], VALUES[1:3], VALUES[3:]])
            saved = since = time.time()
        if stopping:
            break
    bar.close()
    if rank == 0:
        finish(step, rows, model, plan, device, args)
    end_ranks()


# ----------------------------------------------------------------------- the method: views of pairs

@dataclasses.dataclass
class PairView:
    """One of the two views of a pair; pixels are the network input's."""
    image: np.ndarray  # uint8 (S, S, 3)
    keypoints: np.ndarray  # (21, 2)
    angle: float  # degrees, and
    shift: np.ndarray  # (2,): what the equivariance undoes, as in `undo_view`
    weight_keypoints: np.ndarray  # (21, 2), what the weights are computed from


class Pairs(torch.utils.data.Dataset):
    """Item (epoch, hand), a hand of the pool -> its pair: two PairViews."""

    def __init__(self, data, args):
        self.data = data
        self.args = args

    def __getitem__(self, item):
        epoch, hand = item
        return make_pair(self.data, hand, epoch, self.args)


def make_pair(data, hand, epoch, args):
    """Two views, of a hand of the pool and of its positive -> two PairViews."""
    number, row = data.pool[hand]
    turn = 0.0
    views = []
    for view in (0, 1):
        rng = np.random.default_rng((args.seed, epoch, hand, view))
        if view == 1 and args.method == "simhand":
            among = np.flatnonzero(data.neighbours[number][row, :args.top_k] >= 0)
            chosen = among[rng.integers(len(among))]
            if data.turns[number] is not None:
                turn = float(data.turns[number][row, chosen])
            row = data.neighbours[number][row, chosen]
        views.append(make_view(rng, data.folders[number], row, turn, args))
    return views


def make_view(rng, hands, row, turn, args):
    """A random view of a hand of a hands folder, turned by `turn` degrees beside the
    sampled angle, so that it lies as its partner does -> PairView."""
    size = args.input_size
    points = hands.keypoints[row]
    view = sample_view(rng, points, hands.side, size, rotation=args.rotation,
                       half_side=args.crop_margin, move=args.crop_move, colour=not args.no_colour,
                       turn=turn)
    image, seen = apply_view(view, read_crop(hands, row), points, size, args.border)
    image = disturb(image, rng, args)
    shift = view.shift
    if args.shift_unit == "hand":
        shift = shift * size / np.maximum(np.ptp(seen, axis=0), 1e-3)
    weight_keypoints = seen
    if args.weight_keypoints == "original":
        weight_keypoints = original_keypoints(points, size / hands.side, turn)
    return PairView(image, seen, view.angle, shift, weight_keypoints)


def original_keypoints(points, scale, turn):
    """The crop's keypoints at the scale of the network's input, turned by `turn` degrees about
    their mean."""
    points = points * np.float32(scale)
    if not turn:
        return points
    middle = points.mean(0, dtype=np.float64)
    about = crop_matrix(middle, 1, 1, turn)  # moves the middle to 0
    return (move_points(about, points) + middle).astype(np.float32)


def collate(pairs):
    """n pairs -> tensors of 2n rows, all first views before all second: image uint8 (2n, S, S, 3),
    angle (2n,), shift (2n, 2), weight_keypoints (2n, 21, 2)."""
    views = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    return {"image": torch.from_numpy(np.stack([view.image for view in views])),
            "angle": torch.tensor([view.angle for view in views], dtype=torch.float32),
            "shift": torch.from_numpy(np.float32([view.shift for view in views])),
            "weight_keypoints": torch.from_numpy(np.stack([v.weight_keypoints for v in views]))}


def hands_of_steps(first, end, count, plan, args):
    """Yields the micro-batches of this rank from step `first` on: lists of (epoch, hand of
    the pool).

    Each epoch has a new order, in which each hand comes at most once: the last part of a batch is
    left out.
    """
    order = None
    for step in range(first, end):
        epoch, place = divmod(step, plan.steps_per_epoch)
        if order is None or place == 0:
            order = np.random.default_rng((args.seed, epoch)).permutation(count)
        share = place * args.batch_size + plan.rank * plan.pieces * plan.micro_batch
        for piece in range(plan.pieces):
            start = share + piece * plan.micro_batch
            yield [(epoch, hand) for hand in order[start:start + plan.micro_batch].tolist()]


def disturb(image, rng, args):
    """The extra augmentations, each for the share of all views that its flag says."""
    shares = [getattr(args, name) for name in EXTRA_AUGMENTATIONS]
    if not any(shares):
        return image
    drop, blur, noise, sobel, cut_out = rng.random(5) < shares
    # Drawn whether needed or not, so that one flag leaves another's draws alone.
    sigma, strength, width, x, y = rng.random(5)
    side = len(image)
    if drop:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if blur:
        image = cv2.GaussianBlur(image, (0, 0), (0.1 + 1.9 * sigma) * side / 128)
    if noise:
        image = (image + rng.normal(0, 25 * strength, image.shape)).clip(0, 255).astype(np.uint8)
    if sobel:
        across = cv2.Sobel(image, cv2.CV_32F, 1, 0)
        along = cv2.Sobel(image, cv2.CV_32F, 0, 1)
        image = cv2.magnitude(across, along).clip(0, 255).astype(np.uint8)
    if cut_out:
        width = round((0.1 + 0.3 * width) * side)
        left = int(x * (side - width + 1))
        top = int(y * (side - width + 1))
        image[top:top + width, left:left + width] = 0
    return image


# --------------------------------------------------------------------------- the method: one step

VALUES = ("loss", "positive_similarity", "negative_similarity", "positive_weight", "pair_weight")


def train_step(net, optimizer, pieces, pca, plan, args):
    """One step of the optimiser on this rank's pieces of the batch. -> (5,) on the device,
    VALUES."""
    optimizer.zero_grad(set_to_none=True)
    values = add_gradient(net, pieces, pca, plan, args)
    adapt_gradients(optimizer, args)
    optimizer.step()
    average_statistics(net)
    return values


def add_gradient(net, pieces, pca, plan, args):
    """The gradient of the whole batch's loss, exactly, though its pieces pass the network one after
    another -> (5,), VALUES.

    Embed all, take the loss of all ranks' embeddings and its gradient on them, then
    backpropagate that a piece at a time. With one piece its graph is kept; with more, they
    are embedded twice, and BatchNorm's running statistics move in the second pass only.
    """
    once = len(pieces) == 1
    if once:
        embedded = [embed(net, pieces[0], plan.precision, args)]
    else:
        inner = net if plan.ranks == 1 else net.module
        with no_gradient(net):
            embedded = [embed(inner, piece, plan.precision, args) for piece in pieces]
    z1, z2 = whole_batch([z.detach() for z in embedded])
    z1.requires_grad_()
    z2.requires_grad_()
    keypoints1, keypoints2 = whole_batch([piece["weight_keypoints"] for piece in pieces])
    pos_weight, neg_weight = weigh(keypoints1, keypoints2, pca, args)
    loss = nt_xent(z1, z2, pos_weight, neg_weight, args.temperature)
    loss.backward()

    n = len(z1) // (plan.ranks * len(pieces))
    for k, piece in enumerate(pieces):
        start = (plan.rank * len(pieces) + k) * n
        rows = slice(start, start + n)
        # Times the ranks, since DistributedDataParallel averages over them.
        gradient = torch.cat([z1.grad[rows], z2.grad[rows]]) * plan.ranks
        last = k == len(pieces) - 1
        with contextlib.nullcontext() if last or plan.ranks == 1 else net.no_sync():
            z = embedded[0] if once else embed(net, piece, plan.precision, args)
            z.backward(gradient)
    return torch.stack([loss.detach(), *similarities(z1.detach(), z2.detach()),
                        *mean_weights(pos_weight, neg_weight, loss.device)])


def embed(net, piece, precision, args):
    """A piece of n pairs -> (2n, 128) L2-normalised embeddings, first views before second;
    float32."""
    images = normalise(piece["image"])
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        z = net(images)
    z = F.normalize(z.float(), dim=1)
    if args.equivariance != "none":
        angle = piece["angle"] * (args.equivariance != "shift")
        shift = piece["shift"] * (args.equivariance != "rotation")
        z = F.normalize(undo_view(z.unflatten(1, (-1, 2)), angle, shift).flatten(1), dim=1)
    return z


def weigh(keypoints1, keypoints2, pca, args):
    """(N, 21, 2) twice, network-input pixels -> weights of the positives and of all pairs,
    None where all are 1."""
    if args.weighting == "none":
        return None, None
    if args.weight_pca:
        keypoints1 = (keypoints1.flatten(1) @ pca.to(keypoints1.device).T)[:, None]
        keypoints2 = (keypoints2.flatten(1) @ pca.to(keypoints2.device).T)[:, None]
    pos_weight, neg_weight = pair_weights(keypoints1, keypoints2, args.weighting, args.slope_pos,
                                          args.slope_neg)
    if args.weight_on == "pos":
        return pos_weight, None
    if args.weight_on == "neg":
        return None, neg_weight
    return pos_weight, neg_weight


def whole_batch(pieces):
    """(2n, ...) of each piece of this rank, first views before second -> the first views of all
    pairs of the batch, on every rank, and the second."""
    first = torch.cat([piece.chunk(2)[0] for piece in pieces])
    second = torch.cat([piece.chunk(2)[1] for piece in pieces])
    return gather(first), gather(second)


def gather(tensor):
    """(n, ...) of every rank -> (ranks x n, ...) of all, in rank order; carries no gradient."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


@contextlib.contextmanager
def no_gradient(net):
    """Training mode without gradients, and without moving BatchNorm's running statistics."""
    norms = batchnorms(net)
    for norm in norms:
        norm.track_running_stats = False
    with torch.no_grad():
        yield
    for norm in norms:
        norm.track_running_stats = True


def similarities(z1, z2):
    """Mean cosine similarity of positives, and of all other pairs of views, for the log."""
    views = 2 * len(z1)
    positive = (z1 * z2).sum(1)
    every = (z1.sum(0) + z2.sum(0)).square().sum()  # of every view with every view, itself too
    negative = (every - views - 2 * positive.sum()) / (views * (views - 2))
    return positive.mean(), negative


def mean_weights(pos_weight, neg_weight, device):
    """Of the positives and of all pairs, for the log."""
    one = torch.ones((), device=device)
    return [one if w is None else w.mean() for w in (pos_weight, neg_weight)]


def make_model(weights, device, args):
    model = SimHandModel(args.backbone, weights)
    model = model.to(device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    return model


class SimHandModel(nn.Module):
    """Backbone and projection head: (N, 3, S, S) -> (N, 128), to be read as 64 points in
    the plane."""

    def __init__(self, backbone, weights):
        super().__init__()
        self.backbone = load_backbone(backbone, weights)
        self.projection = nn.Sequential(
            nn.Linear(self.backbone.width, 512), nn.BatchNorm1d(512), nn.ReLU(),
            nn.Linear(512, 128, bias=False))

    def forward(self, images):
        return self.projection(self.backbone(images))


# ------------------------------------------------------------------------ the method: optimisation

def set_learning_rate(optimizer, step, plan, args):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, plan.steps, plan.warmup_steps, args.lr)


def learning_rate(step, total, warmup, peak):
    """Linear from peak / warmup to peak over the first `warmup` steps, then cosine to 0 at
    `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def make_optimizer(model, args):
    """Two groups: weights, and what neither decays nor adapts (biases, all normalisation
    layers)."""
    skipped = {id(p) for norm in batchnorms(model) for p in norm.parameters()}
    skipped |= {id(p) for name, p in model.named_parameters() if name.endswith(".bias")}
    weights = [p for p in model.parameters() if id(p) not in skipped]
    others = [p for p in model.parameters() if id(p) in skipped]
    groups = [dict(params=weights, adapt=True), dict(params=others, adapt=False)]
    if args.optimizer == "lars":
        return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, fused=True)
    return torch.optim.Adam(groups, lr=args.lr, fused=True)


@torch.no_grad()
def adapt_gradients(optimizer, args):
    """Add weight decay and scale each gradient by LARS's trust ratio before the optimiser sees it:
    factor = min(0.02 |p| / (|g| + decay |p| + 1e-8) / lr, 1), and 1 where |p|, |g| or lr is 0."""
    for group in optimizer.param_groups:
        if not group["adapt"]:
            continue
        parameters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        p_norm = torch.stack(torch._foreach_norm(parameters))
        g_norm = torch.stack(torch._foreach_norm(gradients))
        torch._foreach_add_(gradients, parameters, alpha=args.weight_decay)
        if args.optimizer == "adam" or group["lr"] == 0:
            continue
        factor = 0.02 * p_norm / (g_norm + args.weight_decay * p_norm + 1e-8) / group["lr"]
        factor = torch.where((p_norm > 0) & (g_norm > 0), factor.clamp(max=1), 1.0)
        torch._foreach_mul_(gradients, list(factor.unbind()))


# ------------------------------------------------------------------ files: hands folders and pairs

@dataclasses.dataclass
class Data:
    """All hands folders with their pairs; one entry a folder."""
    folders: list  # of Hands
    neighbours: list  # (N, K) rows, -1 where there is none; None: not mined
    turns: list  # (N, K) degrees; None: pairs as they lie
    pool: np.ndarray  # (U, 2) folder and row of the hands that are trained on
    pca: torch.Tensor  # (D, 42) components for --weight-pca, or None
    notes: list  # sentences for the user
    digest: int  # of all that decides which pairs are trained on


def load_data(args):
    """Check and open all folders -> Data.

    Every method uses exactly the hands that have a neighbour, so that methods compare on the same
    pictures; a folder that was not mined is used whole, by simclr and peclr only.
    """
    pair_folders = args.pairs or args.hands
    require(len(pair_folders) == len(args.hands),
            f"--pairs: {len(pair_folders)} folders for {len(args.hands)} hands folders, expected "
            "one for each")
    data = Data([], [], [], [], None, [], 0)
    for number, folder in enumerate(args.hands):
        hands = load_hands(folder)
        path = Path(pair_folders[number])
        neighbours = load_neighbours(path, len(hands.keypoints), args)
        if neighbours is None:
            rows = np.arange(len(hands.keypoints))
            data.notes.append(f"{path} was not mined: all its {len(rows)} hands are used")
        else:
            rows = np.flatnonzero(neighbours[:, 0] >= 0)
        turns = None
        if neighbours is not None and (path / "turns.npy").exists():
            turns = load_turns(path / "turns.npy", hands.keypoints, neighbours)
            require(not args.weight_pca, f"{path / 'turns.npy'}: --weight-pca needs an embedding "
                    "of hands as they lie: mine with --no-rotation-free")
        if args.weight_pca:
            add_pca(data, path, hands)
        for array in (hands.keypoints, hands.offsets, neighbours, turns, data.pca):
            if array is not None:
                data.digest = zlib.crc32(np.ascontiguousarray(array), data.digest)
        data.folders.append(hands)
        data.neighbours.append(neighbours)
        data.turns.append(turns)
        data.pool.append(np.stack([np.full(len(rows), number), rows], 1))
    data.pool = np.concatenate(data.pool)
    return data


def load_neighbours(path, count, args):
    """neighbours.npy (N, K) of a folder of N = count hands; None where it was not mined."""
    file = path / "neighbours.npy"
    hint = "run mine_pairs.py again"
    if not file.exists():
        require(args.method != "simhand" and not args.pairs,
                f"{file}: missing, expected mined pairs (run mine_pairs.py first)")
        return None
    neighbours = load_array(file, np.int64, (count, None), hint=hint)
    mined = neighbours.shape[1]
    require(mined and neighbours.min() >= -1 and neighbours.max() < count,
            f"{file}: expected one column or more with values in -1..{count - 1} ({hint})")
    require(args.method != "simhand" or args.top_k <= mined,
            f"{file}: {mined} neighbours a hand were mined, --top-k is {args.top_k}; run "
            f"mine_pairs.py --top-k {args.top_k}")
    require(not (neighbours == np.arange(count)[:, None]).any(),
            f"{file}: a hand is its own neighbour ({hint})")
    return neighbours


def load_turns(path, keypoints, neighbours):
    """turns.npy (N, K) of these neighbours. They follow from them, so that those of another mining
    are found out."""
    turns = load_array(path, np.float32, neighbours.shape, hint="run mine_pairs.py again",
                       finite=False)
    off = turns - pair_turns(keypoints, neighbours)
    off = np.abs((off + 180) % 360 - 180)
    right = np.where(neighbours >= 0, off < 0.1, np.isnan(turns))
    require(right.all(), f"{path}: row {right.all(1).argmin()} is not the turn of its neighbour in "
            "neighbours.npy: they are of two minings (run mine_pairs.py again)")
    return turns


def add_pca(data, path, hands):
    """The components of mining, for --weight-pca: those of the first folder serve all, since
    distances between hands of two folders need one PCA."""
    file = path / "pca.npy"
    own = load_array(file, np.float32, (None, 42), hint="run mine_pairs.py again")[1:]
    require(len(own), f"{file}: holds no component (run mine_pairs.py again)")
    own = torch.from_numpy(own)
    if data.pca is None:
        data.pca = own
    elif not torch.equal(data.pca, own):
        data.notes.append(f"--weight-pca: the components of the first folder serve the hands of "
                          f"{hands.folder} too")


# ------------------------------------------------------------------------------------- files: a run

def make_plan(args, pool, rank, ranks, device):
    """-> Plan, or an InputError where the arguments do not fit each other or the pool."""
    share, rest = divmod(args.batch_size, ranks)
    micro = args.micro_batch or share
    require(args.batch_size > 1, "--batch-size must be 2 pairs or more: one has no negatives")
    needed = f"{ranks} ranks" + (f" x --micro-batch {micro}" if args.micro_batch else "")
    require(not rest and share % micro == 0,
            f"--batch-size {args.batch_size} must be a multiple of {needed}")
    steps_per_epoch = pool // args.batch_size
    require(steps_per_epoch, f"{', '.join(args.hands)}: {pool} hands that can be used, fewer than "
            f"--batch-size {args.batch_size}; lower it, or extract and mine more")
    return Plan(rank=rank, ranks=ranks, micro_batch=micro, pieces=share // micro,
                steps_per_epoch=steps_per_epoch, steps=args.epochs * steps_per_epoch,
                warmup_steps=args.warmup_epochs * steps_per_epoch,
                precision=args.precision or ("bf16" if device.type == "cuda" else "fp32"))


def restore(kept, model, optimizer, data, args):
    """Put a checkpoint's content into its places -> the step that it was written after."""
    require(kept["data"] == data.digest, f"{args.out}: was trained on other hands or pairs than "
            f"those in {', '.join(args.hands)}; choose another --out")
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    torch.set_rng_state(kept["random"])
    return kept["step"]


def introduce(args, plan, data, model, step, device):
    """Print the settings once."""
    parameters = sum(p.numel() for p in model.parameters())
    print_settings(args, make_parser(), hands=sum(len(f.keypoints) for f in data.folders),
                   pool=len(data.pool), ranks=plan.ranks, device=device, precision=plan.precision,
                   micro_batch=plan.micro_batch, negatives=2 * args.batch_size - 2,
                   steps=plan.steps, start=step, parameters=f"{parameters / 1e6:.1f}M")
    for note in data.notes:
        print(note)


def start_run(settings, data, step, args):
    """Start the log, and at the first start draw the views. -> the log's rows so far."""
    rows = start_log(args.out, settings, step)
    if not rows:
        write_log(args.out, {"hands": len(data.pool)})
    if step == 0:
        draw_views(Path(args.out) / "views.jpg", data, args)
    return rows


def to_device(batch, device):
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def report(step, recent, since, optimizer, plan, args):
    """A row of the log: the means of VALUES over the recent steps. Here alone the host
    waits for the device."""
    values = torch.stack(recent).tolist()
    for k, row in enumerate(values, step - len(values) + 1):
        require(all(map(math.isfinite, row)),
                f"{args.out}: the loss is not finite at step {k}; the checkpoint stays as it is; "
                "try a smaller --lr or --precision fp32 in another --out")
    means = dict(zip(VALUES, map(statistics.fmean, zip(*values))))
    seconds = time.time() - since
    return {"step": step, "epoch": round(step / plan.steps_per_epoch, 3),
            "lr": optimizer.param_groups[0]["lr"], **means,
            "views_per_s": 2 * args.batch_size * len(recent) / seconds}


def show(row, bar, board, out):
    """A row of the log: beside the bar, into the folder's log.jsonl, on TensorBoard's board; where
    one is None, not there."""
    bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['views_per_s']:.0f} views/s", refresh=False)
    if out:
        write_log(out, row)
    if board:
        for key, value in row.items():
            board.add_scalar(key, value, row["step"])


def save(settings, data, step, model, optimizer, writes, args):
    """Write the checkpoint, on the rank that writes."""
    finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    require(finite, f"{args.out}: a weight is not finite after step {step}; the checkpoint stays "
            "as it is; try a smaller --lr in another --out")
    if writes:
        save_checkpoint(args.out, dict(args=settings, data=data.digest, step=step,
                                       model=model.state_dict(),
                                       optimizer=optimizer.state_dict(),
                                       random=torch.get_rng_state()))


def finish(step, rows, model, plan, device, args):
    """Say how the run ended; write backbone.pt where it is complete."""
    if args.steps:
        return report_dry_run(rows[-1], plan, device, args)
    if step < plan.steps:
        print(f"stopped by SIGTERM after step {step} of {plan.steps}; the same command goes on")
        return
    weights = {key: value.cpu().contiguous() for key, value in model.backbone.state_dict().items()}
    with atomic(Path(args.out) / "backbone.pt") as file:
        torch.save(weights, file)
    if rows:  # else the log is gone
        positive, negative = (rows[-1][name] for name in VALUES[1:3])
        if positive - negative < 0.05:
            advice = "" if args.weighting == "none" else ", or try --weighting none"
            print(f"careful: the embeddings have not parted: positives are {positive:.2f} similar, "
                  f"other pairs {negative:.2f}; train longer{advice}")
    print(f"wrote {args.out}/backbone.pt, see curves.png and views.jpg beside it; next:\n"
          f"python finetune.py --dataset freihand --root ROOT --weights {args.out}/backbone.pt "
          f"--backbone {args.backbone} --out RUN")


def report_dry_run(row, plan, device, args):
    rate = row["views_per_s"]
    seconds = 2 * args.batch_size / rate
    if device.type == "cuda":
        memory = torch.cuda.max_memory_reserved()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"dry run: {rate:.0f} views/s, {seconds:.3f} s a step, {memory / 2 ** 30:.2f} GB of "
          f"{device.type} memory (loader processes apart); the whole run, {plan.steps} steps, "
          f"would take {plan.steps * seconds / 3600:.2f} hours")


def open_tensorboard(folder, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(f"--tensorboard: {error} (pip install 'tensorboard<2.20')")
    return SummaryWriter(folder, purge_step=step + 1)


def draw_views(path, data, args, pairs=6, others=250):
    """A sheet of pairs as the network sees them, keypoints drawn, with each one's weight as
    a positive among others."""
    count = min(pairs + others, len(data.pool), args.batch_size)
    chosen = np.random.default_rng(args.seed).choice(len(data.pool), count, replace=False)
    drawn = [make_pair(data, hand, 0, args) for hand in chosen.tolist()]
    first = torch.from_numpy(np.stack([pair[0].weight_keypoints for pair in drawn]))
    second = torch.from_numpy(np.stack([pair[1].weight_keypoints for pair in drawn]))
    weights = weigh(first, second, data.pca, args)[0]
    zoom = max(1, 192 // args.input_size)
    tiles = []
    for k in (0, 1):
        for number, pair in enumerate(drawn[:pairs]):
            image = np.kron(pair[k].image, np.ones((zoom, zoom, 1), np.uint8))
            text = ""
            if k == 0:
                text = "no weight" if weights is None else f"weight {weights[number]:.2f}"
            tiles.append(draw_hand(image, rescale_points(pair[k].keypoints, zoom), text=text))
    save_image(path, sheet(tiles, min(pairs, count)))


if __name__ == "__main__":
    run_script(main)
