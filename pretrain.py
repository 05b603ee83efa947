r"""Pre-train a ResNet on unlabelled hands: SiMHand, PeCLR, SimCLR, or regressed keypoints.

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
import itertools
import math
import os
import resource
import shlex
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

from common import (BACKBONES, BORDERS, Plan, add_machine_flags, any_rank, apply_view, atomic,
                    average_statistics, batchnorms, catch_sigterm, check_flags, crop_matrix,
                    draw_hand, end_ranks, forward, items_of_steps, load_array, load_backbone,
                    load_hands, load_items, move_points, normalise, nt_xent, open_run, pair_turns,
                    pair_weights, plain, plot_curves, print_settings, progress, read_crop,
                    refuse_idle_flags, report, require, rescale_points, run_script, sample_view,
                    save_checkpoint, save_image, sheet, soft_targets, spread, start_log,
                    start_ranks, to_device, undo_view, upright, write_log)

# What --paper sets, where no flag says otherwise.
PAPER = {"border": "black", "crop_move": 15 / 224}
WEIGHTINGS = ("none", "linear", "nonlinear", "balanced", "soft")
MAY_CHANGE_ON_RESUME = ("out", "device", "workers", "save_minutes", "paper")
CURVES = (("loss",), ("keypoint_error",), ("lr",), ("positive_similarity", "negative_similarity"),
          ("mean_pos_weight", "mean_neg_weight"), ("probe",))
EXTRA_AUGMENTATIONS = {
    "colour_drop": "share of the views, 0 to 1, that turn grey (like the next four: 0 by default)",
    "blur": "share that is blurred, by a Gaussian of up to 2 px (at 128 px)",
    "noise": "share that gets Gaussian noise, of up to 25 of 255",
    "sobel": "share that shows edges only",
    "cut_out": "share that loses a square of 0.1 to 0.4 of its side"}


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("hands", nargs="+", help="hands folders; each hand's positive comes from its own folder")
    flag("--pairs", nargs="+", help="folders with the mined pairs, one for each hands folder "
         "(default: the hands folders themselves)")
    flag("--out", required=True, help="folder of this run")
    flag("--paper", action="store_true", help="take the paper's values where ours differ: "
         "--weighting linear and --keypoint-loss 0 (with simhand), --border black, --crop-move "
         "15/224; other flags override it. Extract and mine with --paper too")
    add_method_flags(flag)
    add_view_flags(flag)
    add_training_flags(flag)
    return parser


def add_method_flags(flag):
    flag("--method", choices=("simhand", "peclr", "simclr", "keypoints"), default="simhand",
         help="simhand: the positive is the mined neighbour; peclr: another view of the hand; "
         "simclr: the same, without equivariance and rotation; keypoints: no contrast, a linear "
         "layer regresses the 21 keypoints that the detector saw (a baseline)")
    flag("--weighting", choices=WEIGHTINGS,
         help="what the distance between two hands' keypoints does. soft: the closer they are, the "
         "more similar their views should become; linear, nonlinear: it weights the pairs; "
         "balanced: linear weights over their mean (default: soft with --method simhand, else "
         "none; paper: linear)")
    flag("--weight-on", choices=("both", "pos", "neg"), default="both",
         help="which pairs are weighted")
    flag("--weight-keypoints", choices=("augmented", "original"),
         help="measure that distance between the views, or between the crops before any "
         "augmentation (default: augmented; with soft targets original)")
    flag("--weight-pca", action="store_true", help="measure it in mining's PCA embedding instead "
         "of over the joints, with pca.npy of the first folder")
    flag("--slope-pos", type=float, default=1.0,
         help="slope of the nonlinear weights of positives, per pixel")
    flag("--slope-neg", type=float, default=0.05,
         help="slope of the nonlinear weights of all pairs, per pixel")
    flag("--target-temperature", type=float, default=0.06, help="temperature of the soft targets, "
         "in units of a hand's root mean square size")
    flag("--keypoint-loss", type=float, metavar="LAMBDA",
         help="weight of the loss of --method keypoints beside the contrastive one (default: 3 "
         "with --method simhand, else 0; paper: 0)")
    flag("--top-k", type=int, default=1, help="draw the positive from the first k neighbours")
    flag("--temperature", type=float, help="temperature of NT-Xent (default: 0.2 with soft "
         "targets, else the paper's 0.5)")
    flag("--shift-unit", choices=("side", "hand"), default="side",
         help="undo a view's shift as a share of the view's side (paper), or of the hand's own "
         "extent, which is exact where the projection is the keypoints")
    flag("--equivariance", choices=("both", "rotation", "shift", "none"),
         help="what is undone on the projection before the loss (default: both; simclr: none)")


def add_view_flags(flag):
    flag("--input-size", type=int, default=128, help="side of a view in pixels (paper: 128)")
    flag("--rotation", type=float, help="degrees to either side (default: 45; simclr: 0)")
    flag("--crop-margin", type=float, nargs=2, metavar=("LOW", "HIGH"),
         help="half the view's side over the largest distance of a keypoint from their mean "
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
    flag("--batch-size", type=int, default=8192, help="pairs a step over all ranks (paper: 8192)")
    flag("--micro-batch", type=int, help="pairs that pass the network together on one rank: takes "
         "less memory and more time, and the gradient stays that of the whole batch. BatchNorm "
         "sees a micro-batch (default: the largest divisor of the rank's share up to 512)")
    flag("--optimizer", choices=("lars-adam", "adam", "lars"), default="lars-adam",
         help="lars-adam: LARS around Adam (paper); lars: around SGD with momentum 0.9")
    flag("--lr", type=float, default=3.2e-3, help="peak learning rate (paper: 1e-4 x sqrt(1024))")
    flag("--weight-decay", type=float, default=1e-6, help="(paper: 1e-6)")
    flag("--warmup-epochs", type=int,
         help="linear warm-up (default: a tenth of the epochs; paper: 10)")
    flag("--seed", type=int, default=0, help="seed of the new layers, the order and the views")
    # machine
    add_machine_flags(flag)
    flag("--compile", action="store_true",
         help="compile the network (torch.compile): starts minutes later, then runs faster")
    flag("--probe", type=int, default=2000, metavar="HANDS", help="hold out a twentieth of the "
         "videos (of 40 or more), and at most this many of their hands. After each epoch each "
         "finds another by frozen features: how alike are their poses? 0: as by chance, 1: as the "
         "nearest there are (0 hands: off)")
    flag("--steps", type=int, help="dry run: take this many steps, print speed, memory and the "
         "time that the whole run would take, and write nothing")


def parse_args():
    parser = make_parser()
    args = parser.parse_args()
    weighting = "linear" if args.paper else "soft"
    parser.set_defaults(weighting=weighting if args.method == "simhand" else "none")
    if args.paper:
        parser.set_defaults(**PAPER)
    args = parser.parse_args()
    check_flags(args)
    refuse_flags_without_effect(args, parser)
    args.hands = [os.path.normpath(folder) for folder in args.hands]
    if args.pairs:
        args.pairs = [os.path.normpath(folder) for folder in args.pairs]
    simclr = args.method == "simclr"
    derived = {"equivariance": "none" if simclr else "both",
               "rotation": 0.0 if simclr else 45.0,
               "crop_margin": [1.25, 1.25] if simclr else [0.9, 1.5],
               "temperature": 0.2 if args.weighting == "soft" else 0.5,
               "weight_keypoints": "original" if args.weighting == "soft" else "augmented",
               "keypoint_loss": {"keypoints": 1.0, "simhand": 0.0 if args.paper else 3.0}.get(
                   args.method, 0.0),
               "warmup_epochs": args.epochs // 10}
    for name, value in derived.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("epochs", "top_k", "input_size", "temperature", "target_temperature", "lr",
                 "micro_batch", "steps"):
        require(getattr(args, name) != 0, f"--{name.replace('_', '-')} must be above 0")
    shares = [getattr(args, name) for name in ("crop_move", *EXTRA_AUGMENTATIONS)]
    require(max(shares) <= 1, "--crop-move and the shares of the views must lie in 0..1")
    require(args.probe == 0 or args.probe >= 4 * len(args.hands),
            f"--probe {args.probe}: expected 0, or 4 hands of each folder or more")
    require(args.warmup_epochs < args.epochs,
            f"--warmup-epochs {args.warmup_epochs} must be below --epochs {args.epochs}")
    low, high = args.crop_margin
    require(0 < low <= high < math.inf, "--crop-margin: expected 0 < LOW <= HIGH")
    return args


def refuse_flags_without_effect(args, parser):
    """An InputError for flags that would be ignored: who gives them expects something else."""
    contrastive = ("weighting", "temperature", "shift_unit", "equivariance", "keypoint_loss")
    equivariance = args.equivariance or ("none" if args.method == "simclr" else "both")
    # Whether they are ignored, which, why.
    rules = [
        (args.method == "keypoints", contrastive, "with --method keypoints"),
        (args.method != "simhand", ("top_k",), "without --method simhand"),
        (equivariance in ("none", "rotation"), ("shift_unit",), "where no shift is undone"),
        (args.weighting == "none", ("weight_on", "weight_keypoints", "weight_pca"),
         "without --weighting, such as linear"),
        (args.weighting == "soft", ("weight_on", "weight_pca"), "with --weighting soft"),
        (args.weighting != "soft", ("target_temperature",), "without --weighting soft"),
        (args.weighting != "nonlinear", ("slope_pos", "slope_neg"),
         "without --weighting nonlinear"),
        (args.weight_on == "pos", ("slope_neg",), "with --weight-on pos"),
        (args.weight_on == "neg", ("slope_pos",), "with --weight-on neg")]
    for ignored, names, reason in rules:
        if ignored:
            refuse_idle_flags(args, parser, names, reason)


def main():
    args = parse_args()
    rank, ranks, device = start_ranks(args.device)
    data = load_data(args)
    plan = make_plan(args, len(data.pool), rank, ranks, device)
    torch.manual_seed(args.seed)
    if args.steps:
        return dry_run(data, plan, args)

    stop = catch_sigterm()
    writes = rank == 0
    settings = plain(args, micro_batch=plan.micro_batch, precision=plan.precision)
    kept = open_run(args.out, settings, data.digest, MAY_CHANGE_ON_RESUME, rank)
    model = make_model("none" if kept else args.weights, device, args)
    optimizer = make_optimizer(model, args.optimizer, args.lr)
    step = 0
    if kept:
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        step = kept["step"]
        del kept  # the memory
    net = spread(model, device).train()
    rows = start_run(settings, data, plan, model, step, args) if writes else []
    probe = load_probe(data, args) if len(data.probe) and writes else None
    loader = load_batches(data, step, plan.steps, plan, args)

    recent = []  # values of the steps since the last report
    saved = since = time.time()
    bar = progress(total=plan.steps, initial=step, unit="step", disable=not writes)
    for batch in loader:
        set_learning_rate(optimizer, step, plan, args.warmup_epochs, args.lr)
        recent.append(train_step(net, optimizer, batch, data.pca, plan, args))
        step += 1
        bar.update()

        end_of_epoch = step % plan.steps_per_epoch == 0
        overdue = time.time() - saved >= 60 * args.save_minutes
        stopping, due = any_rank(bool(stop), step == plan.steps or overdue)
        if step % plan.report_every == 0 or end_of_epoch or due or stopping:
            row = report(args.out, step, recent, optimizer, plan)
            row["views_per_s"] = 2 * args.batch_size * len(recent) / (time.time() - since)
            if end_of_epoch and probe:
                row["probe"] = probe_score(model.backbone, probe, device)
            rows.append(row)
            probed = f", probe {row['probe']:.3f}" if "probe" in row else ""
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['views_per_s']:.0f} views/s{probed}",
                                refresh=False)
            if writes:
                write_log(args.out, row)
            recent = []
            since = time.time()
        if due or stopping:
            if writes:
                save_checkpoint(args.out, settings, data.digest, step, model, optimizer)
                plot_curves(Path(args.out) / "curves.png", rows, CURVES)
            saved = since = time.time()
        if stopping:
            break
    bar.close()
    if writes:
        finish(step, rows, model, plan, args)
    end_ranks()


# ----------------------------------------------------------------------- the method: views of pairs

@dataclasses.dataclass
class PairView:
    """One of the two views of a pair; pixels are the network input's."""
    image: np.ndarray  # uint8 (S, S, 3)
    keypoints: np.ndarray  # (21, 2)
    angle: float  # degrees, and
    shift: np.ndarray  # (2,): what the equivariance undoes, as in `undo_view`
    weight_keypoints: np.ndarray  # (21, 2), what weights and soft targets are computed from


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
    """A random view of a hand of a hands folder -> PairView. turn: degrees, on top of the sampled
    angle, that bring the hand to lie as its partner does."""
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
    keypoints (2n, 21, 2), angle (2n,), shift (2n, 2), weight_keypoints (2n, 21, 2)."""
    views = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    batch = {}
    for field in dataclasses.fields(PairView):
        values = np.stack([getattr(view, field.name) for view in views])
        wanted = np.uint8 if field.name == "image" else np.float32
        batch[field.name] = torch.from_numpy(values.astype(wanted, copy=False))
    return batch


def disturb(image, rng, args):
    """The extra augmentations, each for its flag's share of the views."""
    shares = [getattr(args, name) for name in EXTRA_AUGMENTATIONS]
    if not any(shares):
        return image
    drop, blur, noise, sobel, cut_out = rng.random(5) < shares
    # Drawn whether needed or not, so that no flag changes another's draws.
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
        # cv2.magnitude would round by where its arrays lie in memory.
        image = np.hypot(across, along).clip(0, 255).astype(np.uint8)
    if cut_out:
        width = round((0.1 + 0.3 * width) * side)
        left = int(x * (side - width + 1))
        top = int(y * (side - width + 1))
        image[top:top + width, left:left + width] = 0
    return image


# --------------------------------------------------------------------------- the method: one step

EMBEDDING = 128  # columns of the projection: 64 points in the plane


def train_step(net, optimizer, pieces, pca, plan, args):
    """One step of the optimiser on this rank's pieces of the batch -> values for the log, on the
    device, by name."""
    optimizer.zero_grad(set_to_none=True)
    values = add_gradient(net, pieces, pca, plan, args)
    adapt_gradients(optimizer, args.weight_decay, args.optimizer != "adam")
    optimizer.step()
    average_statistics(net)
    return values


def add_gradient(net, pieces, pca, plan, args):
    """The gradient of the whole batch's loss, exactly, though its pieces pass the network one after
    another -> values for the log, by name.

    Embed all, take the loss of all ranks' embeddings and its gradient on them, then
    backpropagate that a piece at a time. With one piece its graph is kept; with more, they
    are embedded twice, and BatchNorm's running statistics move in the second pass only.
    """
    once = len(pieces) == 1
    if once:
        embedded = [embed(net, pieces[0], args.equivariance, plan.precision)]
    else:
        inner = net if plan.ranks == 1 else net.module
        with no_gradient(net):
            embedded = [embed(inner, piece, args.equivariance, plan.precision)
                        for piece in pieces]
    first, second = whole_batch([output.detach() for output in embedded])
    first.requires_grad_()
    second.requires_grad_()
    loss, values = batch_loss(first, second, pieces, pca, args)
    loss.backward()

    n = len(first) // (plan.ranks * len(pieces))
    for k, piece in enumerate(pieces):
        start = (plan.rank * len(pieces) + k) * n
        rows = slice(start, start + n)
        # Times the ranks, since DistributedDataParallel averages over them.
        gradient = torch.cat([first.grad[rows], second.grad[rows]]) * plan.ranks
        last = k == len(pieces) - 1
        with contextlib.nullcontext() if last or plan.ranks == 1 else net.no_sync():
            output = embedded[0] if once else embed(net, piece, args.equivariance, plan.precision)
            output.backward(gradient)
    return {"loss": loss.detach(), **values}


def embed(net, piece, equivariance, precision):
    """A piece of n pairs -> (2n, C) float32, first views before second: L2-normalised embeddings
    (128 columns), regressed keypoints (42), or both side by side."""
    projection, keypoints = forward(net, piece["image"], precision)
    outputs = []
    if projection is not None:
        z = F.normalize(projection.float(), dim=1)
        if equivariance != "none":
            angle = piece["angle"] * (equivariance != "shift")
            shift = piece["shift"] * (equivariance != "rotation")
            undone = undo_view(z.unflatten(1, (-1, 2)), angle, shift)
            z = F.normalize(undone.flatten(1), dim=1)
        outputs.append(z)
    if keypoints is not None:
        outputs.append(keypoints)
    return torch.cat(outputs, 1)


def batch_loss(first, second, pieces, pca, args):
    """The loss of what `embed` made of all pairs of the batch, (N, C) twice -> scalar, and values
    for the log, by name. pieces: those of this rank."""
    loss = 0
    values = {}
    if args.method != "keypoints":
        z1 = first[:, :EMBEDDING]
        z2 = second[:, :EMBEDDING]
        weights = {}
        if args.weighting != "none":
            hands = whole_batch([piece["weight_keypoints"] for piece in pieces])
            if args.weighting == "soft":
                weights = {"target": soft_targets(*hands, args.target_temperature)}
            else:
                slopes = (args.slope_pos, args.slope_neg)
                weights = weigh(*hands, args.weighting, args.weight_on, slopes, pca)
        loss = nt_xent(z1, z2, temperature=args.temperature, **weights)
        values = similarities(z1.detach(), z2.detach())
        values |= {f"mean_{name}": weight.mean() for name, weight in weights.items()
                   if name != "target"}
    if args.keypoint_loss:
        side = pieces[0]["image"].shape[1]
        seen = torch.cat(whole_batch([piece["keypoints"] for piece in pieces]))
        seen = (seen - (side - 1) / 2) * (2 / side)  # -1 .. 1 over the view
        regressed = torch.cat([first, second])[:, -42:]
        error = F.l1_loss(regressed, seen.flatten(1))
        loss = loss + args.keypoint_loss * error
        values["keypoint_error"] = error.detach()
    return loss, values


def weigh(keypoints1, keypoints2, kind, weight_on, slopes, pca=None):
    """(N, 21, 2) twice, network-input pixels -> the weights for nt_xent, by name. pca: components
    (D, 42), to measure distances in."""
    if pca is not None:
        pca = pca.to(keypoints1.device)
        keypoints1 = (keypoints1.flatten(1) @ pca.T)[:, None]
        keypoints2 = (keypoints2.flatten(1) @ pca.T)[:, None]
    pos_weight, neg_weight = pair_weights(keypoints1, keypoints2, kind, *slopes)
    weights = {"pos_weight": pos_weight, "neg_weight": neg_weight}
    if weight_on != "both":
        return {f"{weight_on}_weight": weights[f"{weight_on}_weight"]}
    return weights


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
    try:
        for norm in norms:
            norm.track_running_stats = False
        with torch.no_grad():
            yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def similarities(z1, z2):
    """Mean cosine similarity of positives, and of all other pairs of views, for the log."""
    views = 2 * len(z1)
    positive = (z1 * z2).sum(1)
    every = (z1.sum(0) + z2.sum(0)).square().sum()  # of every view with every view, itself too
    negative = (every - views - 2 * positive.sum()) / (views * (views - 2))
    return {"positive_similarity": positive.mean(), "negative_similarity": negative}


def make_model(weights, device, args):
    model = SimHandModel(args.backbone, weights, contrast=args.method != "keypoints",
                         regress=args.keypoint_loss > 0)
    model = model.to(device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    return model


class SimHandModel(nn.Module):
    """Backbone and heads: pictures (N, 3, S, S) -> the projection (N, 128), to be read as 64
    points in the plane, None without `contrast`; the keypoints (N, 42), in halves of the view's
    side from its middle, None without `regress`."""

    def __init__(self, backbone, weights, contrast=True, regress=False):
        super().__init__()
        self.backbone = load_backbone(backbone, weights)
        self.projection = self.keypoints = None
        if contrast:
            self.projection = nn.Sequential(
                nn.Linear(self.backbone.width, 512), nn.BatchNorm1d(512), nn.ReLU(),
                nn.Linear(512, EMBEDDING, bias=False))
        if regress:
            self.keypoints = nn.Linear(self.backbone.width, 42)

    def forward(self, images):
        features = self.backbone(images)
        projection = self.projection(features) if self.projection else None
        keypoints = None
        if self.keypoints:
            # In bf16 a place near the border would be rounded to a quarter of a pixel.
            with torch.autocast(images.device.type, enabled=False):
                keypoints = self.keypoints(features.float())
        return projection, keypoints


# ------------------------------------------------------------------------ the method: optimisation

def set_learning_rate(optimizer, step, plan, warmup_epochs, peak):
    warmup = warmup_epochs * plan.steps_per_epoch
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, plan.steps, warmup, peak)


def learning_rate(step, total, warmup, peak):
    """Linear from peak / warmup to peak over the first `warmup` steps, then cosine to 0 at
    `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def make_optimizer(model, kind, lr):
    """Two groups: weights, and what neither decays nor adapts (biases, all normalisation
    layers)."""
    skipped = {id(p) for norm in batchnorms(model) for p in norm.parameters()}
    skipped |= {id(p) for name, p in model.named_parameters() if name.endswith(".bias")}
    weights = [p for p in model.parameters() if id(p) not in skipped]
    others = [p for p in model.parameters() if id(p) in skipped]
    groups = [dict(params=weights, adapt=True), dict(params=others, adapt=False)]
    if kind == "lars":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, fused=True)
    return torch.optim.Adam(groups, lr=lr, fused=True)


@torch.no_grad()
def adapt_gradients(optimizer, weight_decay, lars):
    """Add weight decay, and with `lars` scale each gradient by LARS's trust ratio, before the
    optimiser sees it: factor = min(0.02 |p| / (|g| + decay |p| + 1e-8) / lr, 1), and 1 where |p|,
    |g| or lr is 0."""
    for group in optimizer.param_groups:
        if not group["adapt"]:
            continue
        parameters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        p_norm = torch.stack(torch._foreach_norm(parameters))
        g_norm = torch.stack(torch._foreach_norm(gradients))
        torch._foreach_add_(gradients, parameters, alpha=weight_decay)
        if not lars or group["lr"] == 0:
            continue
        factor = 0.02 * p_norm / (g_norm + weight_decay * p_norm + 1e-8) / group["lr"]
        factor = torch.where((p_norm > 0) & (g_norm > 0), factor.clamp(max=1), 1.0)
        torch._foreach_mul_(gradients, list(factor.unbind()))


# ------------------------------------------------------------- the method: a probe while it trains

@dataclasses.dataclass
class Probe:
    """Hands that no step sees, and how alike they are."""
    images: torch.Tensor  # uint8 (P, S, S, 3)
    others: torch.Tensor  # bool (P, P), whether two hands are of different videos
    distances: torch.Tensor  # (P, P), between the upright hands, as `mine_pairs.py` measures


def load_probe(data, args):
    """A view without augmentation of each hand of data.probe -> Probe."""
    margin = statistics.fmean(args.crop_margin)
    rng = np.random.default_rng(0)
    images = []
    keypoints = []
    video = []
    for number, row in data.probe:
        hands = data.folders[number]
        points = hands.keypoints[row]
        keypoints.append(points)
        video.append((number, hands.rows["video"][row]))
        view = sample_view(rng, points, hands.side, args.input_size, rotation=0,
                           half_side=(margin, margin), move=0, colour=False)
        images.append(apply_view(view, read_crop(hands, row), points, args.input_size,
                                 args.border)[0])
    video = torch.tensor(video)
    poses = torch.from_numpy(upright(np.stack(keypoints))).flatten(1)
    others = (video[:, None] != video).any(2)
    return Probe(torch.from_numpy(np.stack(images)), others, torch.cdist(poses, poses))


@torch.no_grad()
def probe_score(backbone, probe, device):
    """Each hand takes the one of another video whose features are the most alike. How far off is
    its pose, on average? -> 1: no further than the nearest pose; 0: as far as by chance."""
    backbone.eval()
    features = []
    for images in probe.images.split(256):
        features.append(backbone(normalise(images.to(device))).cpu())
    backbone.train()
    features = F.normalize(torch.cat(features), dim=1)
    alike = (features @ features.T).masked_fill(~probe.others, -math.inf)
    found = probe.distances.gather(1, alike.argmax(1, keepdim=True)).mean()
    chance = probe.distances[probe.others].mean()
    nearest = probe.distances.masked_fill(~probe.others, math.inf).amin(1).mean()
    return ((chance - found) / (chance - nearest)).item()


# ------------------------------------------------------------------ files: hands folders and pairs

MINE_AGAIN = "run mine_pairs.py"


@dataclasses.dataclass
class Data:
    """All hands folders with their pairs; one entry a folder."""
    folders: list  # of Hands
    neighbours: list  # (N, K) rows, -1 where there is none; None: not mined
    turns: list  # (N, K) degrees; None: pairs as they lie
    pca: torch.Tensor  # (D, 42) components for --weight-pca, or None
    pool: np.ndarray  # (U, 2) folder and row of the hands that are trained on
    probe: np.ndarray  # (P, 2) the same of the hands that the probe keeps
    digest: int  # of all that decides what is trained on


def load_data(args):
    """Check and open all folders -> Data.

    Every method uses exactly the hands that have a neighbour, so that methods compare on the same
    pictures; a folder that was not mined is used whole, by all methods but simhand.
    """
    pair_folders = [Path(folder) for folder in args.pairs or args.hands]
    require(len(pair_folders) == len(args.hands),
            f"--pairs: {len(pair_folders)} folders for {len(args.hands)} hands folders, expected "
            "one for each")
    pca = None
    if args.weight_pca:  # distances between hands of two folders need one PCA
        pca = load_array(pair_folders[0] / "pca.npy", np.float32, (None, 42), hint=MINE_AGAIN)[1:]
        pca = torch.from_numpy(pca)
    folders = [load_hands(folder) for folder in args.hands]
    mined = []
    turned = []
    pool = []
    probe = []
    digest = 0
    for number, (hands, path) in enumerate(zip(folders, pair_folders)):
        count = len(hands.keypoints)
        usable = np.ones(count, bool)
        held, shown = choose_probe(hands.rows["video"], args.probe // len(folders), args.seed)
        neighbours = turns = None
        if args.method == "simhand" or args.pairs or (path / "neighbours.npy").exists():
            neighbours = load_neighbours(path, count, args.top_k)
            turns = load_turns(path / "turns.npy", hands.keypoints, neighbours)
            require(turns is None or not args.weight_pca, f"{path / 'turns.npy'}: --weight-pca "
                    "needs an embedding of hands as they lie: mine with --no-rotation-free")
        kept_out = held if held.any() else None
        for array in (hands.keypoints, hands.offsets, neighbours, turns, pca, kept_out):
            if array is not None:
                digest = zlib.crc32(np.ascontiguousarray(array), digest)
        if neighbours is not None:
            neighbours[np.append(held, False)[neighbours]] = -1  # nor are they anybody's positive
            usable = neighbours[:, 0] >= 0
        mined.append(neighbours)
        turned.append(turns)
        pool.append(np.insert(np.argwhere(usable & ~held), 0, number, axis=1))
        probe.append(np.insert(shown[:, None], 0, number, axis=1))
    return Data(folders, mined, turned, pca, np.concatenate(pool), np.concatenate(probe), digest)


def choose_probe(video, limit, seed):
    """Which hands of a folder are kept out of the pool -> bool (N,): all those of a twentieth of
    its videos at most, and of no more videos than `limit` hands need; none where that is a single
    video or two hands, which would have no choice. And the rows of those that the probe looks at:
    of each video as many, evenly spaced."""
    videos, counts = np.unique(video, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(videos))[:len(videos) // 20]
    enough = np.searchsorted(np.cumsum(counts[order]), limit) + 1
    if limit == 0 or len(order) < 2 or counts[order].sum() < 3:
        return np.zeros(len(video), bool), np.zeros(0, int)
    kept = videos[order[:max(enough, 2)]]
    share = limit // len(kept)
    rows = [np.flatnonzero(video == one) for one in kept]
    rows = [some[::math.ceil(len(some) / share)] for some in rows]
    return np.isin(video, kept), np.sort(np.concatenate(rows))


def load_neighbours(path, count, top_k):
    """neighbours.npy (N, K) of a folder of N = count hands."""
    file = path / "neighbours.npy"
    neighbours = load_array(file, np.int64, (count, None), hint=MINE_AGAIN)
    require(neighbours.size and neighbours.min() >= -1 and neighbours.max() < count,
            f"{file}: expected one column or more with values in -1..{count - 1} ({MINE_AGAIN})")
    mined = neighbours.shape[1]
    require(top_k <= mined, f"{file}: {mined} neighbours a hand were mined, --top-k is {top_k}; "
            f"run mine_pairs.py --top-k {top_k}")
    require(not (neighbours == np.arange(count)[:, None]).any(),
            f"{file}: a hand is its own neighbour ({MINE_AGAIN})")
    return neighbours


def load_turns(path, keypoints, neighbours):
    """turns.npy (N, K), None where there is none. They follow from the neighbours, so that those of
    another mining are found out."""
    if not path.exists():
        return None
    turns = load_array(path, np.float32, neighbours.shape, hint=MINE_AGAIN, finite=False)
    off = turns - pair_turns(keypoints, neighbours)
    off = np.abs((off + 180) % 360 - 180)
    right = np.where(neighbours >= 0, off < 0.1, np.isnan(turns))
    require(right.all(), f"{path}: row {right.all(1).argmin()} is not the turn of its neighbour in "
            f"neighbours.npy: they are of two minings ({MINE_AGAIN})")
    return turns


# ------------------------------------------------------------------------------------- files: a run

def make_plan(args, pool, rank, ranks, device):
    """-> Plan, or an InputError where the arguments do not fit each other or the pool."""
    require(args.batch_size > 1, "--batch-size must be 2 pairs or more: one has no negatives")
    share, rest = divmod(args.batch_size, ranks)
    micro = args.micro_batch or max(k for k in range(1, 513) if share % k == 0)
    require(args.micro_batch or micro >= min(share, 16), f"--batch-size {args.batch_size}: only "
            f"{micro} pairs would pass the network together, too few for BatchNorm, since {share} "
            "has no larger divisor up to 512; take a rounder number, or give --micro-batch")
    require(share and not rest and share % micro == 0, f"--batch-size {args.batch_size} must be a "
            f"multiple of {ranks} ranks x --micro-batch {args.micro_batch or 1}")
    steps_per_epoch = pool // args.batch_size
    require(steps_per_epoch, f"{', '.join(args.hands)}: {pool} hands that can be used, fewer than "
            f"--batch-size {args.batch_size}; lower it, or extract and mine more")
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    return Plan(rank, ranks, device, precision, args.workers, args.batch_size, share // micro,
                steps_per_epoch, steps=args.epochs * steps_per_epoch)


def start_run(settings, data, plan, model, step, args):
    """Print the settings, start the log, and at the first start draw the views. -> the log's rows
    so far."""
    parameters = sum(p.numel() for p in model.parameters())
    print_settings(args, make_parser(),
                   hands=sum(len(folder.keypoints) for folder in data.folders),
                   pool=len(data.pool),
                   probe_hands=len(data.probe),
                   ranks=plan.ranks,
                   device=plan.device,
                   precision=plan.precision,
                   micro_batch=plan.micro_batch,
                   negatives=2 * args.batch_size - 2,
                   steps=plan.steps,
                   start=step,
                   parameters=f"{parameters / 1e6:.1f}M")
    rows = start_log(args.out, settings, step)
    if not rows:
        write_log(args.out, {"hands": len(data.pool)})
    if step == 0:
        draw_views(Path(args.out) / "views.jpg", data, args)
    return rows


def load_batches(data, first, end, plan, args):
    """Yields this rank's pieces of each step from `first` on, on the device."""
    def make(item):
        epoch, hand = item
        return make_pair(data, hand, epoch, args)

    hands = items_of_steps(first, end, len(data.pool), plan, args.seed)
    loader = load_items(make, hands, plan.workers, collate,
                        pin_memory=plan.device.type == "cuda")
    for _ in range(first, end):
        pieces = itertools.islice(loader, plan.pieces)
        yield [to_device(piece, plan.device) for piece in pieces]


def finish(step, rows, model, plan, args):
    """Say how the run ended; write backbone.pt where it is complete."""
    if step < plan.steps:
        print(f"stopped by SIGTERM after step {step} of {plan.steps}; the same command goes on")
        return
    weights = {key: value.cpu().contiguous() for key, value in model.backbone.state_dict().items()}
    with atomic(Path(args.out) / "backbone.pt") as file:
        torch.save(weights, file)
    last = rows[-1] if rows else {}  # empty where the log is gone
    for name, value in last.items():
        print(f"{name}: {value:g}")
    print(f"memory_gb: {peak_memory(plan.device):.2f}")
    print(f"wrote {args.out}/backbone.pt, see curves.png and views.jpg beside it; next:\n"
          "python finetune.py --dataset freihand --root ROOT --weights "
          f"{shlex.quote(args.out)}/backbone.pt "
          f"--backbone {args.backbone} --input-size {args.input_size} --out RUN")


def peak_memory(device):
    """GB that this process held at most: of the GPU, or of the host (loader processes apart)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def dry_run(data, plan, args):
    """Take --steps steps; print rate, memory, and how long the whole run would take. Writes
    nothing."""
    model = make_model(args.weights, plan.device, args)
    optimizer = make_optimizer(model, args.optimizer, args.lr)
    net = spread(model, plan.device).train()
    half = args.steps // 2
    batches = load_batches(data, 0, args.steps, plan, args)
    start = time.time()
    for step, batch in enumerate(progress(batches, total=args.steps, disable=plan.rank != 0), 1):
        set_learning_rate(optimizer, step - 1, plan, args.warmup_epochs, args.lr)
        values = train_step(net, optimizer, batch, data.pca, plan, args)
        if step in (half, args.steps):
            values["loss"].item()  # waits for the device
        if step == half:  # by now the kernels are chosen and the loader runs
            start = time.time()
    seconds = (time.time() - start) / (args.steps - half)
    if plan.rank == 0:
        print(f"dry run: {2 * args.batch_size / seconds:.0f} views/s, {seconds:.3f} s a step, "
              f"{peak_memory(plan.device):.2f} GB of {plan.device.type} memory (loader processes "
              f"apart) at --micro-batch {plan.micro_batch}; all {plan.steps} steps would take "
              f"{plan.steps * seconds / 3600:.2f} hours")
    end_ranks()


def draw_views(path, data, args, pairs=6):
    """A sheet of pairs as the network sees them, keypoints drawn: above the hand, below its
    positive."""
    count = min(pairs, len(data.pool))
    chosen = np.random.default_rng(args.seed).choice(len(data.pool), count, replace=False)
    drawn = [make_pair(data, hand, 0, args) for hand in chosen.tolist()]
    zoom = max(1, 192 // args.input_size)
    tiles = []
    for k, text in enumerate(("hand", "its positive")):
        for pair in drawn:
            image = np.kron(pair[k].image, np.ones((zoom, zoom, 1), np.uint8))
            tiles.append(draw_hand(image, rescale_points(pair[k].keypoints, zoom), text=text))
    save_image(path, sheet(tiles, count))


if __name__ == "__main__":
    run_script(main, "; lower --micro-batch")
