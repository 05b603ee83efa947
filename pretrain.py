"""Pre-train a ResNet on unlabelled hands by contrast: SiMHand, PeCLR or SimCLR.

Reads hands folders with their mined pairs and writes into --out: backbone.pt (a torchvision ResNet state dict without
fc), checkpoint.pt, log.jsonl, curves.png. Defaults are the paper's. Stop it at any moment and run the same command
again: it goes on. Under torchrun the batch is spread over all ranks; with the same --micro-batch, loss and gradient do
not depend on their number.

    python pretrain.py data/ego4d data/100doh --out runs/simhand --micro-batch 512
    python pretrain.py demo/hands --out runs/tiny --backbone resnet18 --weights none --batch-size 64 --epochs 2
"""

import argparse
import contextlib
import math
import os
import resource
import statistics
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import (BACKBONES, BORDERS, CORES, InputError, apply_view, atomic, best_turns, catch_sigterm, check_flags, draw_hand, load_array,
                    load_backbone, load_hands, load_items, normalise, nt_xent, open_folder, pair_weights, plain,
                    plot_curves, print_settings, read_crop, require, resume, run_script, sample_view, save_checkpoint,
                    save_image, sheet, start_log, start_ranks, undo_view, write_log)

FREE = ("out", "device", "workers", "save_minutes", "tensorboard")  # cannot change the result
SHARES = dict(colour_drop="share of the views, 0 to 1, that become grey (this and the next four: default 0)",
              blur="share that is blurred, by a Gaussian of up to 2 px (at 128 px)",
              noise="share that gets Gaussian noise, of up to 25 of 255", sobel="share that shows its edges alone",
              cut_out="share that loses a square of 0.1 to 0.4 of its side")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hands", nargs="+", help="hands folders; each hand's positive comes from its own folder")
    parser.add_argument("--pairs", nargs="+", help="folders with the mined pairs, one for each hands folder "
                        "(default: the hands folders themselves)")
    parser.add_argument("--out", required=True, help="folder of this run")
    # method
    parser.add_argument("--method", choices=("simhand", "peclr", "simclr"), default="simhand",
                        help="simhand: the positive is the mined neighbour; peclr: the same picture once more; simclr: "
                        "the same, without equivariance and rotation")
    parser.add_argument("--weighting", choices=("none", "linear", "nonlinear", "balanced"),
                        default="linear",
                        help="how the distance of two hands' keypoints becomes a weight in the loss (paper: linear)")
    parser.add_argument("--weight-on", choices=("both", "pos", "neg"), default="both", help="pairs that are weighted")
    parser.add_argument("--weight-keypoints", choices=("augmented", "original"), default="augmented",
                        help="keypoints that the distance is taken between: the views', or the crops' before any view")
    parser.add_argument("--weight-pca", action="store_true",
                        help="measure the distance in the PCA embedding of mining (pca.npy) instead of over the joints")
    parser.add_argument("--slope-pos", type=float, default=1.0, help="nonlinear weights of positives: slope per pixel")
    parser.add_argument("--slope-neg", type=float, default=0.05, help="nonlinear weights of all pairs: slope per pixel")
    parser.add_argument("--top-k", type=int, default=1, help="draw the positive among the first k neighbours")
    parser.add_argument("--temperature", type=float, default=0.5, help="of NT-Xent (paper: 0.5)")
    parser.add_argument("--shift-unit", choices=("side", "hand"), default="side",
                        help="side: undo a view's shift as a share of the view's side (paper); hand: as a share of the "
                        "hand's own extent, which undoes it exactly for a projection that is the keypoints")
    parser.add_argument("--equivariance", choices=("both", "rotation", "shift", "none"),
                        help="what of a view is undone on the projection before the loss (default: both; simclr: none)")
    # network
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--weights", default="imagenet", help="start from imagenet, none, or a file")
    # views
    parser.add_argument("--input-size", type=int, default=128, help="side of a view in pixels (paper: 128)")
    parser.add_argument("--rotation", type=float, help="degrees to either side (default: 45; simclr: 0)")
    parser.add_argument("--crop-margin", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="half side of the view, in largest distances of a keypoint from the keypoints' mean "
                        "(default: 0.9 1.5; simclr: 1.25 1.25)")
    parser.add_argument("--crop-move", type=float, default=15 / 448,
                        help="largest shift of the view per axis, as a share of the crop's side (default: 15/448; "
                        "paper: 15/224, of crops half as wide as ours)")
    parser.add_argument("--border", choices=sorted(BORDERS), default="mirror", help="what a view shows beyond the "
                        "crop: the mirrored picture, or black (paper)")
    parser.add_argument("--no-colour", action="store_true", help="no colour jitter")
    for name, what in SHARES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=0, metavar="SHARE", help=what)
    # optimisation
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8192, help="pairs a step over all ranks; each view has "
                        "2 x this - 2 negatives (paper: 8192)")
    parser.add_argument("--micro-batch", type=int, help="pairs that pass the network together on one rank: less "
                        "memory, more time (all are embedded twice), the gradient of the whole batch. BatchNorm's "
                        "statistics are those of a micro-batch (default: the rank's whole share)")
    parser.add_argument("--accumulate", type=int, default=1, help="add up the gradients of so many parts of the "
                        "batch, as PeCLR does: less memory, but not the loss of the large batch, which --micro-batch "
                        "gives: negatives and weights are those of a part, --batch-size / this pairs")
    parser.add_argument("--optimizer", choices=("lars-adam", "adam", "lars"), default="lars-adam",
                        help="lars-adam: LARS around Adam (paper); lars: around SGD with momentum 0.9")
    parser.add_argument("--lr", type=float, default=3.2e-3, help="peak learning rate (paper: 1e-4 x sqrt(1024))")
    parser.add_argument("--weight-decay", type=float, default=1e-6)
    parser.add_argument("--warmup-epochs", type=int, help="linear warm-up (default: a tenth of the epochs; paper: 10)")
    parser.add_argument("--seed", type=int, default=0)
    # machine
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU when there is one)")
    parser.add_argument("--workers", type=int, default=min(16, CORES),
                        help="loader processes of each rank, 0: none (default: one a core, 16 at most)")
    parser.add_argument("--compile", action="store_true", help="compile the network (torch.compile): minutes at the "
                        "start, and then less time a step")
    parser.add_argument("--save-minutes", type=float, default=10, help="checkpoint this often, and after every epoch")
    parser.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard as well, into --out")
    parser.add_argument("--steps", type=int, help="dry run: take so many steps, print rate, memory and the time that "
                        "the whole run would take, write nothing")
    args = parser.parse_args()
    check_flags(args)
    args.hands = [os.path.normpath(folder) for folder in args.hands]
    args.pairs = args.pairs and [os.path.normpath(folder) for folder in args.pairs]
    simclr = args.method == "simclr"
    args.equivariance = args.equivariance or ("none" if simclr else "both")
    args.rotation = args.rotation if args.rotation is not None else 0.0 if simclr else 45.0
    args.crop_margin = args.crop_margin or ([1.25, 1.25] if simclr else [0.9, 1.5])
    args.warmup_epochs = args.warmup_epochs if args.warmup_epochs is not None else args.epochs // 10
    require(min(args.epochs, args.top_k, args.input_size, args.temperature, args.lr, args.accumulate) > 0,
            "--epochs, --top-k, --input-size, --temperature, --lr and --accumulate must be above 0")
    require(args.micro_batch is None or args.micro_batch > 0, "--micro-batch must be above 0")
    require(args.steps is None or args.steps > 1, "--steps must be above 1: the first half is not measured")
    require(all(getattr(args, name) <= 1 for name in ("crop_move", *SHARES)), "--crop-move and the shares of the views "
            "must lie in 0..1")
    require(0 <= args.warmup_epochs < args.epochs,
            f"--warmup-epochs {args.warmup_epochs} must be below --epochs {args.epochs}")
    require(0 < args.crop_margin[0] <= args.crop_margin[1] < math.inf, "--crop-margin: expected 0 < LOW <= HIGH")
    return args


def main():
    args = parse_args()
    stop = [] if args.steps else catch_sigterm()
    rank, world, device = start_ranks(args.device)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    share, rest = divmod(args.batch_size, world * args.accumulate)
    micro = args.micro_batch or share
    require(share * world > 1, "--batch-size must leave 2 pairs or more to a part: one has no negatives")
    require(not rest and share % micro == 0, f"--batch-size {args.batch_size} must be a multiple of {world} ranks x "
            f"--accumulate {args.accumulate}" + (f" x --micro-batch {micro}" if args.micro_batch else ""))
    args.micro_batch = micro  # a number of ranks that makes it another is another run: BatchNorm sees other groups
    pieces = share // micro  # of a part
    data = load_data(args)
    steps_per_epoch = len(data.usable) // args.batch_size
    require(steps_per_epoch, f"{', '.join(args.hands)}: {len(data.usable)} usable hands, fewer than --batch-size "
            f"{args.batch_size}; lower it, or extract and mine more")
    total, warmup = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    writes = rank == 0 and not args.steps
    require(not Path(args.out, "keypoints.npy").exists(), f"{args.out}: is a hands folder, choose another --out")
    lock = open_folder(args.out) if writes else None  # held until the process ends

    torch.manual_seed(args.seed)
    step, kept = 0, resume(args.out, args, FREE) if not args.steps else None
    model = SimHandModel(args.backbone, "none" if kept else args.weights)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args)
    if kept:
        require(kept["data"] == data.digest, f"{args.out}: was trained on other hands or pairs than those in "
                f"{', '.join(args.hands)}; choose another --out")
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        torch.set_rng_state(kept["random"])
        step = kept["step"]
    rows = start_log(args.out, args, step) if writes else []
    if writes and not rows:
        write_log(args.out, {"hands": len(data.usable)})
    board = open_tensorboard(args.out, step) if args.tensorboard and writes else None
    if args.compile:
        model.compile()
    net = nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None) \
        if world > 1 else model
    if rank == 0:
        print_settings(args, hands=sum(len(f.keypoints) for f in data.folders), usable=len(data.usable), ranks=world,
                       negatives=2 * args.batch_size // args.accumulate - 2, steps=total, start=step, device=device,
                       parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M")
        for note in data.notes:
            print(note)
        if writes and step == 0:
            draw_views(Path(args.out) / "views.jpg", data, args)

    end = min(total, args.steps or total)
    order = ((s, (part * world + rank) * pieces + piece)
             for s in range(step, end) for part in range(args.accumulate) for piece in range(pieces))
    loader = load_items(Views(data, args, micro), order, args, pin_memory=device.type == "cuda")
    report, recent, saved = max(1, min(10, steps_per_epoch // 4)), [], time.time()
    since = saved
    pca = None if data.pca is None else data.pca.to(device)
    net.train()
    bar = tqdm(total=end, initial=step, unit="step", disable=rank != 0)
    while step < end:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, warmup, args.lr)
        batch = [{key: value.to(device, non_blocking=True) for key, value in next(loader).items()}
                 for _ in range(args.accumulate * pieces)]
        recent.append(train_step(net, optimizer, batch, pca, rank, world, args))
        step += 1
        bar.update()

        stopping, end_of_epoch = bool(stop), step % steps_per_epoch == 0
        due = end_of_epoch or time.time() - saved > 60 * args.save_minutes
        if world > 1:  # all ranks save and leave the loop at the same step; the hosts agree, no device has to wait
            stopping, due = gather(torch.tensor([[stopping, due]])).any(0).tolist()
        if step in (end // 2, end) if args.steps else step % report == 0 or due or stopping:
            values = torch.stack(recent).tolist()  # here alone the host waits for the device
            for k, row in enumerate(values, step - len(values) + 1):
                require(all(map(math.isfinite, row)), f"{args.out}: the loss is not finite at step {k}; checkpoints "
                        "stay as they are; try a smaller --lr or --precision fp32 in another --out")
            row = dict(step=step, epoch=round(step / steps_per_epoch, 3), lr=optimizer.param_groups[0]["lr"],
                       **dict(zip(VALUES, map(statistics.fmean, zip(*values)))),
                       views_per_s=2 * args.batch_size * len(recent) / (time.time() - since))
            recent, since = [], time.time()
            rows.append(row)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['views_per_s']:.0f} views/s")
            if writes:
                write_log(args.out, row)
            for key, value in row.items() if board else ():
                board.add_scalar(key, value, step)
        if (due or stopping) and not args.steps:
            require(all(t.isfinite().all() for t in model.state_dict().values()), f"{args.out}: a weight is not finite "
                    f"after step {step}; checkpoints stay as they are; try a smaller --lr in another --out")
            if writes:
                save_checkpoint(args.out, dict(args=plain(args), data=data.digest, step=step,
                                               model=model.state_dict(), optimizer=optimizer.state_dict(),
                                               random=torch.get_rng_state()))
            if writes and (end_of_epoch or stopping):
                plot_curves(Path(args.out) / "curves.png", rows, [["loss"], ["lr"], VALUES[1:3], VALUES[3:]])
            saved = since = time.time()
        if stopping:
            break
    bar.close()
    if args.steps and rank == 0:
        seconds = 2 * args.batch_size / rows[-1]["views_per_s"]
        memory = torch.cuda.max_memory_reserved() if device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"dry run: {2 * args.batch_size / seconds:.0f} views/s, {seconds:.3f} s a step, {memory / 2 ** 30:.2f} GB"
              f" of {device.type} memory (loader processes apart); the whole run, {total} steps, would take "
              f"{total * seconds / 3600:.2f} hours")
    elif writes and step < total:
        print(f"stopped by SIGTERM after step {step} of {total}; the same command goes on")
    elif writes:
        with atomic(Path(args.out) / "backbone.pt") as file:
            torch.save({key: value.cpu().contiguous() for key, value in model.backbone.state_dict().items()}, file)
        positive, negative = (rows[-1][name] for name in VALUES[1:3]) if rows else (1, 0)  # the log may be gone
        if positive - negative < 0.05:
            print(f"careful: the embeddings have not parted: positives are {positive:.2f} similar, other pairs "
                  f"{negative:.2f}; train longer, or try --weighting none (README, Does mining similar hands help?)")
        print(f"wrote {args.out}/backbone.pt, see curves.png and views.jpg beside it; next:\n"
              f"python finetune.py --dataset freihand --root ROOT --weights {args.out}/backbone.pt "
              f"--backbone {args.backbone} --out RUN")
    if world > 1:
        dist.barrier()  # were a rank to fail while it ends, torchrun would end the one that still writes
        dist.destroy_process_group()


def open_tensorboard(folder, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:  # 2.20 wants a protobuf that mediapipe does not bear
        raise InputError(f"--tensorboard: {error} (pip install 'tensorboard<2.20')")
    return SummaryWriter(folder, purge_step=step + 1)


VALUES = ("loss", "positive_similarity", "negative_similarity", "positive_weight", "pair_weight")


def train_step(net, optimizer, batch, pca, rank, world, args):
    """One step of the optimiser on this rank's pieces of the batch, dicts of tensors. -> (5,) on the device, VALUES."""
    optimizer.zero_grad(set_to_none=True)
    size, values = len(batch) // args.accumulate, []
    for k in range(0, len(batch), size):  # parts that know nothing of each other: one, unless --accumulate says more
        values.append(add_gradient(net, batch[k:k + size], pca, rank, world, args, last=k + size == len(batch)))
    adapt_gradients(optimizer, args)
    optimizer.step()
    return torch.stack(values).mean(0)


def add_gradient(net, pieces, pca, rank, world, args, last):
    """The gradient of the whole part's loss, exactly, though its pieces pass the network one after another: embed all,
    take the loss of all ranks' embeddings and its gradient on them, then backpropagate that a piece at a time.

    With one piece its graph is kept; with more, they are embedded twice and BatchNorm's running statistics move in the
    second pass only. last: no part follows, the ranks add up what they have.
    """
    def adds_up(k):  # before the last piece's backward pass, and forward pass, the ranks keep what they have
        return contextlib.nullcontext() if world == 1 or last and k == len(pieces) - 1 else net.no_sync()

    once = len(pieces) == 1
    with adds_up(0) if once else no_gradient(net):
        embedded = [embed(net if once or world == 1 else net.module, piece, args) for piece in pieces]
    # the whole part's embeddings and keypoints, on every rank: first views of all pairs, second views of all pairs
    z1, z2 = (gather(torch.cat(half)).requires_grad_() for half in zip(*(e.detach().chunk(2) for e in embedded)))
    k1, k2 = (gather(torch.cat(half)) for half in zip(*(piece["weight_keypoints"].chunk(2) for piece in pieces)))
    pos_weight, neg_weight = weigh(k1, k2, pca, args)
    loss = nt_xent(z1, z2, pos_weight, neg_weight, args.temperature)
    loss.backward()

    n = len(z1) // (world * len(pieces))
    for k, (piece, e) in enumerate(zip(pieces, embedded)):
        rows = slice((rank * len(pieces) + k) * n, (rank * len(pieces) + k + 1) * n)
        # DistributedDataParallel averages over ranks
        gradient = torch.cat([z1.grad[rows], z2.grad[rows]]) * (world / args.accumulate)
        with adds_up(k):
            (e if once else embed(net, piece, args)).backward(gradient)
    with torch.no_grad():
        ones, positive, views = torch.ones((), device=loss.device), (z1 * z2).sum(1), 2 * len(z1)
        similarities = (z1.sum(0) + z2.sum(0)).square().sum()  # of every view with every view, itself included
        negative = (similarities - views - 2 * positive.sum()) / (views * (views - 2))
        return torch.stack([loss.detach(), positive.mean(), negative, *(ones if w is None else w.mean()
                                                                        for w in (pos_weight, neg_weight))])


def weigh(keypoints1, keypoints2, pca, args):
    """(N, 21, 2) twice, network-input pixels -> weights of the positives and of all pairs, None where all are 1."""
    if args.weighting == "none":
        return None, None
    if args.weight_pca:
        keypoints1, keypoints2 = ((k.flatten(1) @ pca.T)[:, None] for k in (keypoints1, keypoints2))
    pos_weight, neg_weight = pair_weights(keypoints1, keypoints2, args.weighting, args.slope_pos, args.slope_neg)
    return pos_weight if args.weight_on != "neg" else None, neg_weight if args.weight_on != "pos" else None


def gather(tensor):
    """(n, ...) of every rank -> (ranks x n, ...) of all, in rank order; carries no gradient."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def embed(net, piece, args):
    """A piece of n pairs -> (2n, 128) L2-normalised embeddings, first views before second; float32."""
    images = normalise(piece["image"])
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        z = net(images)
    z = F.normalize(z.float(), dim=1)
    if args.equivariance != "none":
        angle = piece["angle"][:, 0] * (args.equivariance != "shift")
        shift = piece["shift"] * (args.equivariance != "rotation")
        z = F.normalize(undo_view(z.unflatten(1, (-1, 2)), angle, shift).flatten(1), dim=1)
    return z


@contextlib.contextmanager
def no_gradient(net):
    """Training mode without gradients, and without moving BatchNorm's running statistics."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    with torch.no_grad():
        yield
    for norm in norms:
        norm.track_running_stats = True


class SimHandModel(nn.Module):
    """Backbone and projection head: (N, 3, S, S) -> (N, 128), to be read as 64 points in the plane."""

    def __init__(self, backbone, weights):
        super().__init__()
        self.backbone = load_backbone(backbone, weights)
        features = 512 if backbone in ("resnet18", "resnet34") else 2048
        self.projection = nn.Sequential(nn.Linear(features, 512), nn.BatchNorm1d(512), nn.ReLU(),
                                        nn.Linear(512, 128, bias=False))

    def forward(self, images):
        return self.projection(self.backbone(images))


# ---------------------------------------------------------------------------------------------- optimisation

def learning_rate(step, total, warmup, peak):
    """Linear from peak / warmup to peak over the first `warmup` steps, then cosine to 0 at step `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def make_optimizer(model, args):
    """Two groups: weights, and those that neither decay nor adapt (biases and all normalisation layers)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    skipped = {id(p) for m in norms for p in m.parameters()}
    skipped |= {id(p) for name, p in model.named_parameters() if name.endswith(".bias")}
    groups = [dict(params=[p for p in model.parameters() if (id(p) in skipped) != adapt], adapt=adapt)
              for adapt in (True, False)]
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
        p_norm, g_norm = torch.stack(torch._foreach_norm(parameters)), torch.stack(torch._foreach_norm(gradients))
        torch._foreach_add_(gradients, parameters, alpha=args.weight_decay)
        if args.optimizer == "adam" or group["lr"] == 0:
            continue
        factor = 0.02 * p_norm / (g_norm + args.weight_decay * p_norm + 1e-8) / group["lr"]
        factor = torch.where((p_norm > 0) & (g_norm > 0), factor.clamp(max=1), 1.0)
        torch._foreach_mul_(gradients, list(factor.unbind()))


# ---------------------------------------------------------------------------------------------- data

def load_data(args):
    """Check and open all folders -> folders, usable (U, 2) of folder and row, neighbours, pca, notes, digest.

    Every method uses exactly the hands that have a neighbour, so that methods compare on the same pictures; a folder
    that was not mined is used whole, by simclr and peclr only.
    """
    folders, neighbours, usable, notes = [load_hands(path) for path in args.hands], [], [], []
    all_turns = []
    pairs = args.pairs or args.hands
    require(len(pairs) == len(folders),
            f"--pairs: {len(pairs)} folders for {len(folders)} hands folders, expected one for each")
    pca, digest = None, 0
    for number, (hands, path) in enumerate(zip(folders, map(Path, pairs))):
        count = len(hands.keypoints)
        hint = "run mine_pairs.py again"
        if (path / "neighbours.npy").exists():
            found = load_array(path / "neighbours.npy", np.int64, (count, None), hint=hint)
            require(found.shape[1] and found.min() >= -1 and found.max() < count, f"{path / 'neighbours.npy'}: "
                    f"expected one column or more with values in -1..{count - 1} ({hint})")
            require(args.method != "simhand" or args.top_k <= found.shape[1],
                    f"{path / 'neighbours.npy'}: {found.shape[1]} neighbours a hand were mined, --top-k is "
                    f"{args.top_k}; run mine_pairs.py --top-k {args.top_k}")
            require(not (found == np.arange(count)[:, None]).any(), f"{path / 'neighbours.npy'}: a hand is its own "
                    f"neighbour ({hint})")
            rows = np.flatnonzero(found[:, 0] >= 0)
        else:
            require(args.method != "simhand" and not args.pairs,
                    f"{path / 'neighbours.npy'}: missing, expected mined pairs (run mine_pairs.py first)")
            found, rows = None, np.arange(count)
            notes.append(f"{path} was not mined: all its {count} hands are used")
        turns = None
        if found is not None and (path / "turns.npy").exists():
            turns = load_turns(path / "turns.npy", hands.keypoints, found)
            require(not args.weight_pca, f"{path / 'turns.npy'}: --weight-pca needs an embedding of hands as they lie, "
                    "and these were mined with --rotation-free")
        all_turns.append(turns)
        if args.weight_pca and args.weighting != "none":
            own = load_array(path / "pca.npy", np.float32, (None, 42), hint=hint)[1:]
            require(len(own), f"{path / 'pca.npy'}: holds no component ({hint})")
            if pca is None:
                pca = own
            elif not np.array_equal(pca, own):  # distances between hands of two folders need one PCA
                notes.append(f"--weight-pca: the components in {pairs[0]} serve the hands of {hands.folder} too")
        for array in (hands.keypoints, hands.offsets, *(a for a in (found, turns, pca) if a is not None)):
            digest = zlib.crc32(np.ascontiguousarray(array), digest)
        neighbours.append(found)
        usable.append(np.stack([np.full(len(rows), number), rows], 1))
    return SimpleNamespace(folders=folders, neighbours=neighbours, turns=all_turns, usable=np.concatenate(usable),
                           notes=notes, digest=digest, pca=None if pca is None else torch.from_numpy(pca))


def load_turns(path, keypoints, neighbours):
    """turns.npy (N, K) of these neighbours. It follows from them, so that one of another mining is found out."""
    turns = load_array(path, np.float32, neighbours.shape, hint="run mine_pairs.py again", finite=False)
    for k, column in enumerate(neighbours.T):
        rows = np.flatnonzero(column >= 0)
        wrong = np.isfinite(turns[:, k]) != (column >= 0)
        for some in np.array_split(rows, len(rows) // (1 << 16) + 1):  # bounds the memory
            off = turns[some, k] - best_turns(keypoints[some], keypoints[column[some]])
            wrong[some] |= ~(np.abs((off + 180) % 360 - 180) < 0.1)
        require(not wrong.any(), f"{path}: row {wrong.argmax()} is not the turn of its neighbour in neighbours.npy: they "
                "are of two minings (run mine_pairs.py again)")
    return turns


class Views(torch.utils.data.Dataset):
    """Item (step, piece) -> one micro-batch of n pairs as tensors of 2n rows, all first views before all second: the
    keys of make_pair, pictures as uint8 (normalised on the device)."""

    def __init__(self, data, args, micro):
        self.data, self.args, self.micro, self.epoch = data, args, micro, None

    def __getitem__(self, item):
        step, piece = item
        args, usable = self.args, self.data.usable
        epoch, place = divmod(step, len(usable) // args.batch_size)
        if epoch != self.epoch:  # a new order each epoch, each hand at most once; the last part of a batch is left out
            self.epoch, self.order = epoch, np.random.default_rng((args.seed, epoch)).permutation(len(usable))
        start = place * args.batch_size + piece * self.micro
        pairs = [make_pair(self.data, i, epoch, args) for i in self.order[start:start + self.micro]]
        return torch.utils.data.default_collate([view for half in zip(*pairs) for view in half])


def make_pair(data, i, epoch, args):
    """Two views, of usable hand i and of its positive: dicts of image (S, S, 3), keypoints (21, 2), angle (1,), shift
    (2,) and weight_keypoints (21, 2): those that the weights are computed from. Pixels are the network input's."""
    number, row = data.usable[i]
    hands, size, views, shares = data.folders[number], args.input_size, [], [getattr(args, name) for name in SHARES]
    turn = 0.0
    for view in (0, 1):
        rng = np.random.default_rng((args.seed, epoch, i, view))
        if view == 1 and args.method == "simhand":
            among = np.flatnonzero(data.neighbours[number][row, :args.top_k] >= 0)
            chosen = among[rng.integers(len(among))]
            if data.turns[number] is not None:
                turn = float(data.turns[number][row, chosen])
            row = data.neighbours[number][row, chosen]
        points = hands.keypoints[row]
        v = sample_view(rng, points, hands.side, size, rotation=args.rotation, margin=args.crop_margin,
                        move=args.crop_move, colour=not args.no_colour, turn=turn)
        image, seen = apply_view(v, read_crop(hands, row), points, size, args.border)
        if any(shares):
            image = disturb(image, rng, shares)
        shift = v["shift"] if args.shift_unit == "side" else v["shift"] * size / np.maximum(np.ptp(seen, axis=0), 1e-3)
        weight_keypoints = seen
        if args.weight_keypoints == "original":
            weight_keypoints = turn_points(points, turn) * np.float32(size / hands.side)
        views.append(dict(image=image, keypoints=seen, angle=np.float32([v["angle"]]), shift=np.float32(shift),
                          weight_keypoints=weight_keypoints))
    return views


def turn_points(points, angle):
    """points (21, 2) turned about their mean by `angle` degrees, as cv2.getRotationMatrix2D turns a picture."""
    if angle == 0:
        return points
    matrix = cv2.getRotationMatrix2D(points.mean(0, dtype=np.float64).tolist(), angle, 1.0)
    return (points @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)


def disturb(image, rng, shares):
    """The augmentations that are off by default, each for the share of all views that its flag says."""
    drop, blur, noise, sobel, cut_out = rng.random(5) < shares
    sigma, strength, width, x, y = rng.random(5)  # drawn whether needed or not: one flag leaves another's draws alone
    side = len(image)
    if drop:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if blur:
        image = cv2.GaussianBlur(image, (0, 0), (0.1 + 1.9 * sigma) * side / 128)
    if noise:
        image = (image + rng.normal(0, 25 * strength, image.shape)).clip(0, 255).astype(np.uint8)
    if sobel:
        across, along = cv2.Sobel(image, cv2.CV_32F, 1, 0), cv2.Sobel(image, cv2.CV_32F, 0, 1)
        image = cv2.magnitude(across, along).clip(0, 255).astype(np.uint8)
    if cut_out:
        width = round((0.1 + 0.3 * width) * side)
        x, y = (int(place * (side - width + 1)) for place in (x, y))
        image[y:y + width, x:x + width] = 0
    return image


def draw_views(path, data, args, pairs=6, others=250):
    """A sheet of pairs as the network sees them, keypoints drawn, with each one's weight as a positive among others."""
    count = min(pairs + others, len(data.usable), args.batch_size // args.accumulate)
    chosen = np.random.default_rng(args.seed).choice(len(data.usable), count, replace=False)
    halves = list(zip(*(make_pair(data, i, 0, args) for i in chosen)))  # first views, second views
    keypoints = (torch.from_numpy(np.stack([view["weight_keypoints"] for view in half])) for half in halves)
    weights = weigh(*keypoints, data.pca, args)[0]
    zoom, tiles = max(1, 192 // args.input_size), []
    for half in halves:
        for k, view in enumerate(half[:pairs]):
            image, points = np.kron(view["image"], np.ones((zoom, zoom, 1), np.uint8)), view["keypoints"]
            text = "no weight" if weights is None else f"weight {weights[k]:.2f}"
            tiles.append(draw_hand(image, (points + 0.5) * zoom - 0.5, text=text if half is halves[0] else ""))
    save_image(path, sheet(tiles, min(pairs, count)))


if __name__ == "__main__":
    run_script(main)
