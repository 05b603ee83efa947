"""Fine-tune a (pre-trained) ResNet for 3D hand pose, and test it: DetNet of minimal-hand, or
one linear layer.

Reads a data set in its own layout and writes into --out: model.pt, checkpoint.pt, log.jsonl and
curves.png, and for the test split pred_xyz.npy, gt_xyz.npy (mm), valid.npy (of AssemblyHands
wrist.npy too), pred_uv.npy, gt_uv.npy (pixels of the network's input), names.txt and overlay.jpg.
The model is chosen on a validation split, never on the test split. As in the paper, test pictures
are cropped by their true joints or boxes, and the wrist's place and the length of the bone 0-9,
which one picture cannot tell, are taken from the ground truth. Stop it at any moment and run the
same command again: it goes on.

    python finetune.py --dataset freihand --root FreiHAND_pub_v2 \
        --weights runs/simhand/backbone.pt --out runs/freihand
    python finetune.py --predict my_pictures --weights runs/freihand/model.pt --out runs/mine
    python finetune.py --dataset freihand --root demo/freihand --weights none \
        --backbone resnet18 --input-size 64 --batch-size 16 --epochs 2 --out runs/tiny

Your own data set: --dataset own --root PICTURES --labels FOLDER, where FOLDER holds train.npy,
test.npy and, unless a tenth of the training set shall serve, val.npy. Each is an array of SAMPLE
records, as documented in this script; what --labels keeps of another data set is an example.

To read: arguments, main, then the method (network, loss, training, testing). Whoever wants the
method may stop at the banner "pictures"; the three data sets' readers come last.
"""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import (BACKBONES, BORDERS, CORES, PARENTS, PICTURES, Hands, InputError, View,
                    any_rank, apply_view, atomic, catch_sigterm, check_flags, claim_folder,
                    crop_matrix, draw_hand, end_ranks, load_array, load_backbone, load_checkpoint,
                    load_hands, load_items, logged_settings, move_points, normalise, open_folder,
                    plain, plot_curves, print_settings, progress, read_crop, read_log,
                    refuse_idle_flags, refuse_other_arguments, require, rescale_points, resume,
                    run_script, save_array, save_checkpoint, save_image, sheet, spread, start_log,
                    start_ranks, write_log)

MAY_CHANGE_ON_RESUME = ("out", "labels", "device", "workers", "save_minutes")
# Flags that only training looks at, and those that --predict does not need.
OF_TRAINING = ("freeze", "epochs", "lr", "backbone_lr", "rotation", "no_colour")
IN_MODEL = (*OF_TRAINING, "backbone", "head", "input_size", "border", "labels", "label_fraction",
            "seed")
DATASETS = ("assemblyhands", "dexycb", "freihand", "own")
SETUPS = ("s0", "s1", "s2", "s3")
# The test crop's side over the longer extent of the true joints (AssemblyHands: of its box, and
# 100 px at least).
CROP = {"freihand": 2.0, "dexycb": 1.75, "assemblyhands": 1.75}


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--dataset", choices=DATASETS, help="own: labels that you made, see --labels")
    flag("--root", help="the data set's folder, in its own layout")
    flag("--out", required=True, help="folder of this run")
    flag("--setup", choices=SETUPS, help="DexYCB's division: unseen sequences (s0), subjects "
         "(s1, the default), views (s2) or objects (s3)")
    flag("--paper-filter", action="store_true", help="DexYCB: only frames with 10 joints or more "
         "in the picture, the wrist and joint 9 among them, as SiMHand (default: every labelled "
         "frame)")
    flag("--modality", choices=("ego", "exo"), help="AssemblyHands' cameras (default: ego); exo: "
         "frames cut from its videos, and the calibration as json like that of ego")
    flag("--predict", metavar="FOLDER", help="instead of a data set: what the trained --weights "
         "RUN/model.pt says of the pictures in a folder, each of one right hand that fills about "
         "half of the longer side, or of a hands folder's crops")
    # network
    flag("--weights", default="imagenet", help="start from a file (backbone.pt), imagenet, or none")
    flag("--backbone", choices=BACKBONES, default="resnet50", help="(paper: resnet50)")
    flag("--head", choices=NETWORKS, default="detnet", help="linear: one linear layer from the "
         "backbone's averaged features to the joints, which trains several times faster and "
         "needs fewer steps; knn: no training; the pose of the nearest labelled training picture, "
         "by cosine similarity of these features (default: detnet, as the paper)")
    flag("--freeze", action="store_true", help="keep the backbone as it is, train the head alone; "
         "with --head linear a linear probe")
    flag("--input-size", type=int, default=128, help="side of the network's input in pixels; for "
         "detnet, whose heat-maps have a quarter of it, a multiple of 32 (default: 128)")
    add_training_flags(flag)
    return parser


def add_training_flags(flag):
    # labels
    flag("--labels", metavar="FOLDER", help="keep what was read of the label files here, for later "
         "runs: train.npy, val.npy (may be missing) and test.npy. With --dataset own these are "
         "the labels that you made (default: read the label files at every start)")
    flag("--label-fraction", type=float, default=1.0, help="share of the unique training samples "
         "to use, with all their versions; a smaller share lies within a larger one of the same "
         "seed")
    # pictures
    flag("--border", choices=sorted(BORDERS), default="black",
         help="what a crop shows beyond the picture: the mirrored picture, or black (default)")
    flag("--rotation", type=float, default=90.0, help="degrees to either side (DetNet: 90)")
    flag("--no-colour", action="store_true", help="no colour jitter and blur")
    # optimisation
    flag("--epochs", type=int, default=120, help="(paper: 120)")
    flag("--batch-size", type=int, default=128, help="pictures a step over all ranks of torchrun; "
         "BatchNorm sees a rank's share (paper: 128)")
    flag("--lr", type=float, default=1e-3,
         help="Adam's, a tenth of it from half of the epochs (DetNet)")
    flag("--backbone-lr", type=float, help="the backbone's own, in the same way (default: --lr)")
    flag("--seed", type=int, default=0, help="of the new layers, the order, the views, and the "
         "choice of labels")
    # machine
    flag("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    flag("--device", help="cpu or cuda (default: the GPU when there is one)")
    flag("--workers", type=int, default=min(16, CORES),
         help="loader processes of each rank, 0: none (default: one a core, 16 at most)")
    flag("--save-minutes", type=float, default=10,
         help="checkpoint this often, and after every epoch")


def parse_args():
    parser = make_parser()
    args = parser.parse_args()
    check_flags(args)
    if args.predict:
        refuse_idle_flags(args, parser, IN_MODEL, "with --predict: model.pt knows it all")
    if args.head == "knn":
        refuse_idle_flags(args, parser, OF_TRAINING, "with --head knn, which trains nothing")
    require(bool(args.predict) != bool(args.dataset and args.root),
            "expected --dataset and --root, or --predict and --weights RUN/model.pt")
    trained = args.weights not in ("imagenet", "none")
    require(not args.predict or trained and "RANK" not in os.environ,
            "--predict: expected --weights RUN/model.pt, and no torchrun")
    require(args.dataset == "dexycb" or not (args.setup or args.paper_filter),
            "--setup, --paper-filter: DexYCB only")
    require(args.dataset == "assemblyhands" or not args.modality, "--modality: AssemblyHands only")
    require(args.dataset != "own" or args.labels,
            "--dataset own: expected --labels FOLDER with train.npy and test.npy")
    require(0 < args.label_fraction <= 1 and min(args.epochs, args.batch_size, args.lr) > 0,
            "--label-fraction must lie in 0..1, --epochs, --batch-size and --lr above 0")
    require(args.input_size >= 32, f"--input-size must be at least 32, not {args.input_size}")
    require(args.head != "detnet" or args.input_size % 32 == 0,
            f"--input-size must be a multiple of 32, not {args.input_size}, with --head detnet")
    if args.root:
        args.root = os.path.normpath(args.root)
    if args.dataset == "dexycb" and not args.setup:
        args.setup = "s1"
    if args.dataset == "assemblyhands" and not args.modality:
        args.modality = "ego"
    if args.backbone_lr is None:
        args.backbone_lr = args.lr
    return args


@dataclasses.dataclass
class Plan:
    """What follows from the arguments, the labels and the machine."""
    rank: int
    ranks: int
    device: torch.device
    precision: str
    steps_per_epoch: int = 0
    steps: int = 0


def main():
    args = parse_args()
    if args.predict:
        return predict_folder(args)
    # Before the ranks meet: while one of them reads the labels, the others may have to wait long.
    data = load_data(args)
    plan = make_plan(args, len(data.train))
    claim_folder(args.out, plan.rank == 0)
    torch.manual_seed(args.seed)
    settings = plain(args, ranks=plan.ranks, precision=plan.precision)
    kept = resume(args.out, settings, MAY_CHANGE_ON_RESUME)
    model = NETWORKS[args.head](args.backbone, "none" if kept else args.weights)
    model = model.to(plan.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args)
    step, best = restore(kept, model, optimizer, data, args) if kept else (0, math.inf)
    net = spread(model, plan.device)
    rows = start_run(settings, data, step, model, plan, args) if plan.rank == 0 else []

    crops = make_crops(args)
    batches = rows_of_steps(step, len(data.train), plan, args)
    loader = load_items(Pictures(data.train, crops), batches, args.workers, collate,
                        pin_memory=plan.device.type == "cuda")
    stop = catch_sigterm()
    recent = []  # losses of the steps since the last report
    saved = since = time.time()
    bar = progress(total=plan.steps, initial=step, unit="step",
                   disable=plan.rank != 0 or not plan.steps)
    while step < plan.steps:
        recent.append(train_step(net, model, optimizer, next(loader), step, plan, args))
        step += 1
        bar.update()

        end_of_epoch = step % plan.steps_per_epoch == 0
        overdue = time.time() - saved > 60 * args.save_minutes
        stopping, due = any_rank(bool(stop), end_of_epoch or overdue)
        if stopping or due:
            row = report(step, recent, since, model, optimizer, plan, args)
            if end_of_epoch:
                row["validation_error"] = validate(model, data.validation, crops, plan, args)
                if row["validation_error"] < best:
                    best = row["validation_error"]
                    save_model(model, data.train, plan, args)
            rows.append(row)
            if plan.rank == 0:
                write_log(args.out, row)
            save(settings, data, step, best, model, optimizer, plan, args)
            bar.set_postfix_str(f"loss {row['loss']:.3f}, validation {best:.1f} mm, "
                                f"{row['pictures_per_s']:.0f} pictures/s", refresh=False)
            recent = []
            saved = since = time.time()
        if stopping:
            break
    bar.close()
    if args.head == "knn":  # so that other arguments are refused here too
        save(settings, data, step, best, model, optimizer, plan, args)
    if step == plan.steps:
        finish(rows, best, model, data, crops, plan, args)
    elif plan.rank == 0:
        print(f"stopped by SIGTERM after step {step} of {plan.steps}; the same command goes on")
    end_ranks()


# --------------------------------------------------------------------------- the method: network

class DetNet(nn.Module):
    """ResNet features, three deconvolutions to a quarter of the input's side, two coordinate
    channels, three heads.

    (N, 3, S, S) -> heat-maps (N, 21, S/4, S/4) in 0..1, delta and location maps (N, 21, 3, S/4,
    S/4): the direction of the bone that ends in a joint, and the joint's place relative to the
    wrist in lengths of the bone 0-9, wherever it is read.
    """

    def __init__(self, backbone, weights):
        super().__init__()
        self.backbone = load_backbone(backbone, weights)
        layers = []
        for width in (self.backbone.width, 256, 256):
            layers += [nn.ConvTranspose2d(width, 256, 4, 2, 1, bias=False), nn.BatchNorm2d(256),
                       nn.ReLU(inplace=True)]
        self.up = nn.Sequential(*layers)
        self.heat = head(256 + 2, 21)
        self.delta = head(256 + 2 + 21, 63)
        self.location = head(256 + 2 + 21 + 63, 63)

    def forward(self, images):
        x = images
        for name, layer in self.backbone.named_children():
            if name not in ("avgpool", "fc"):
                x = layer(x)
        x = self.up(x)
        side = torch.linspace(-1, 1, x.shape[2], device=x.device, dtype=x.dtype)
        y_axis, x_axis = torch.meshgrid(side, side, indexing="ij")
        x = torch.cat([x, torch.stack([x_axis, y_axis]).expand(len(x), -1, -1, -1)], 1)
        heat = torch.sigmoid(self.heat(x))
        delta = self.delta(torch.cat([x, heat], 1))
        location = self.location(torch.cat([x, heat, delta], 1))
        delta = delta.unflatten(1, (21, 3))
        location = location.unflatten(1, (21, 3))
        return heat.float(), delta.float(), location.float()

    def read(self, outputs):
        """-> uv (N, 21, 2), the centres of the hottest cells, and pose (N, 21, 3), read there from
        the location maps."""
        heat, _, location = outputs
        cells = heat.shape[-1]
        hottest = heat.flatten(2).argmax(2)  # (N, 21), row-major
        place = torch.stack([hottest % cells, hottest // cells], 2)
        everywhere = location.flatten(3)
        pose = everywhere.gather(3, hottest[..., None, None].expand(-1, -1, 3, 1))[..., 0]
        return rescale_points(place, 4), pose


def head(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, 256, 3, 1, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(inplace=True),
        nn.Conv2d(256, outputs, 1))


class LinearNet(nn.Module):
    """One linear layer on ResNet's averaged features.

    (N, 3, S, S) -> uv (N, 21, 2) in input pixels, and pose (N, 21, 3) relative to the wrist in
    lengths of the bone 0-9.
    """

    def __init__(self, backbone, weights):
        super().__init__()
        self.backbone = load_backbone(backbone, weights)
        self.linear = nn.Linear(self.backbone.width, 21 * 5)

    def forward(self, images):
        features = self.backbone(images).float()
        with torch.autocast(images.device.type, enabled=False):  # bf16 has but three digits
            joints = self.linear(features).unflatten(1, (21, 5))
        side = images.shape[-1]
        return (side - 1) / 2 + joints[..., :2] * side / 2, joints[..., 2:]

    def read(self, outputs):
        return outputs


# knn uses the backbone alone.
NETWORKS = {"detnet": DetNet, "linear": LinearNet, "knn": DetNet}


def forward(net, images, precision):
    """uint8 (N, S, S, 3) -> what the network makes of them."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return net(normalise(images))


# ------------------------------------------------------------------------------ the method: loss

def detnet_loss(outputs, batch, with_bone=None):
    """Minimal-hand's loss at batch 128, but the same at any batch:

        100 x heat + (delta + 10 x location) / sqrt(128)

    heat: half the sum over joints of the heat-map's mean squared error. delta, location: the mean
    over samples of the Frobenius norm of (prediction - target) x target heat-map. Invalid joints
    carry none. with_bone: the number of samples of the whole batch that have wrist and bone, over
    the number of ranks, whose gradients are averaged (default: that of this batch).
    """
    heat, delta, location = outputs
    valid = batch["valid"]
    pose = batch["pose"]
    target = heat_targets(batch["uv"], valid, heat.shape[-1])
    shown = target.amax((2, 3)) > 0  # in the picture and valid
    squares = (heat - target).square() * shown[..., None, None]
    heat_loss = 0.5 * squares.mean((0, 2, 3)).sum()
    parents = list(PARENTS)
    bones = F.normalize(pose - pose[:, parents], dim=2)
    both_ends = (valid & valid[:, parents])[..., None, None, None]

    def map_loss(prediction, goal, mask):
        difference = (prediction - goal[..., None, None]) * target[:, :, None] * mask
        norms = difference.flatten(1).square().sum(1).add(1e-12).sqrt()
        return mean_with_bone(norms, valid, with_bone)

    map_losses = map_loss(delta, bones, both_ends) + 10 * map_loss(location, pose, 1)
    return 100 * heat_loss + map_losses / math.sqrt(128)


def heat_targets(uv, valid, cells, sigma=1.0):
    """uv (N, 21, 2) in input pixels, cells of 4 x 4 pixels -> Gaussians (N, 21, cells, cells) of
    peak 1 in the joint's cell, cut to 7 x 7; 0 for joints that are invalid or whose window lies
    outside."""
    cell = torch.floor((uv + 0.5) / 4)
    place = torch.arange(cells, device=uv.device)

    def bell(middle):  # (N, 21) -> (N, 21, cells)
        distance = place - middle[..., None]
        return torch.exp(-distance.square() / (2 * sigma ** 2)) * (distance.abs() <= 3)

    across = bell(cell[..., 0])
    along = bell(cell[..., 1])
    return along[..., :, None] * across[..., None, :] * valid[..., None, None]


def linear_loss(outputs, batch, with_bone=None):
    """The mean distance along an axis, over joints and axes: of uv in halves of the input's side,
    plus that of the pose in lengths of the bone 0-9. Invalid joints carry none; with_bone as in
    detnet_loss."""
    uv, pose = outputs
    valid = batch["valid"][..., None]
    half = batch["image"].shape[1] / 2
    uv_loss = ((uv - batch["uv"]).abs() / half * valid).mean()
    pose_losses = ((pose - batch["pose"]).abs() * valid).mean((1, 2))
    return uv_loss + mean_with_bone(pose_losses, batch["valid"], with_bone)


def mean_with_bone(losses, valid, with_bone):
    """losses (N,) -> their mean over the samples that have wrist and bone; `with_bone` as of
    detnet_loss."""
    counts = has_wrist_and_bone(valid)
    if with_bone is None:
        with_bone = counts.sum()
    return (losses * counts).sum() / with_bone.clamp(min=1e-6)


LOSSES = {"detnet": detnet_loss, "linear": linear_loss}


def has_wrist_and_bone(valid):
    """valid (..., 21) -> (...): the wrist and joint 9 are valid, which align and scale the pose."""
    return valid[..., 0] & valid[..., 9]


def bone_length(xyz):
    """(..., 21, 3) -> (...), the length of the bone from the wrist to joint 9."""
    return np.linalg.norm(xyz[..., 9, :] - xyz[..., 0, :], axis=-1)


def scaled_pose(xyz):
    """(..., 21, 3) -> the same relative to the wrist, in lengths of the bone 0-9; in mm where that
    has none."""
    length = bone_length(xyz)[..., None, None]
    return (xyz - xyz[..., :1, :]) / np.where(length > 0, length, 1)


# -------------------------------------------------------------------------- the method: training

def train_step(net, model, optimizer, batch, step, plan, args):
    """One step of the optimiser on this rank's share of the batch -> its loss, on the device."""
    net.train()
    if args.freeze:
        model.backbone.eval()
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * (0.1 if step >= plan.steps // 2 else 1)
    batch = {key: value.to(plan.device, non_blocking=True) for key, value in batch.items()}
    with_bone = over_ranks(has_wrist_and_bone(batch["valid"]).sum().double()) / plan.ranks
    outputs = forward(net, batch["image"], plan.precision)
    loss = LOSSES[args.head](outputs, batch, with_bone)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def make_optimizer(model, args):
    """Adam on the heads, and on the backbone unless it is frozen; each with its own peak rate."""
    model.backbone.requires_grad_(not args.freeze)
    heads = []
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            heads.append(parameter)
    groups = [dict(params=heads, peak=args.lr)]
    if not args.freeze:
        groups.append(dict(params=list(model.backbone.parameters()), peak=args.backbone_lr))
    return torch.optim.Adam(groups, fused=True)


def rows_of_steps(step, count, plan, args):
    """Yields this rank's share of each batch from `step` on: a list of (epoch, row of the training
    set).

    Each epoch has a new order, in which each row comes at most once: the last part of a batch is
    left out.
    """
    order = None
    share = args.batch_size // plan.ranks
    for step in range(step, plan.steps):
        epoch, place = divmod(step, plan.steps_per_epoch)
        if order is None or place == 0:
            order = np.random.default_rng((args.seed, epoch)).permutation(count)
        start = place * args.batch_size + plan.rank * share
        yield [(epoch, row) for row in order[start:start + share].tolist()]


def over_ranks(tensor):
    """The sum of all ranks' tensors."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


# --------------------------------------------------------------------------- the method: testing

@torch.no_grad()
def run_on_test_crops(function, shape, pictures, plan, args, name=""):
    """function: images (n, S, S, 3) -> (n, *shape). -> (N, *shape), that of all test crops; each
    rank does a share. With a name, a progress bar shows it."""
    count = len(pictures.samples)
    starts = range(plan.rank * args.batch_size, count, plan.ranks * args.batch_size)
    batches = []
    for start in starts:
        rows = range(start, min(start + args.batch_size, count))
        batches.append([(None, row) for row in rows])
    found = torch.zeros(count, *shape, device=plan.device)
    loader = load_items(pictures, batches, args.workers, collate)
    bar = progress(loader, unit="batch", total=len(batches), desc=name, disable=not name)
    for start, batch in zip(starts, bar):
        images = batch["image"].to(plan.device)
        found[start:start + len(images)] = function(images)
    return over_ranks(found)


def predict(model, pictures, plan, args, name=""):
    """-> uv (N, 21, 2) in input pixels, and pose (N, 21, 3) relative to the wrist in lengths of the
    bone 0-9, as the model reads them from what it makes of the pictures."""
    def read(images):
        uv, pose = model.read(forward(model, images, plan.precision))
        return torch.cat([uv, pose - pose[:, :1]], 2)

    if dist.is_initialized():
        # BatchNorm's statistics differ, and rank 0 may have loaded the chosen model.
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    model.eval()
    found = run_on_test_crops(read, (21, 5), pictures, plan, args, name).cpu().numpy()
    return found[..., :2], found[..., 2:]


def nearest(model, data, crops, plan, args):
    """-> uv and pose, as of `predict`, of each test picture's nearest training picture, both in
    test crops."""
    def describe(images):
        return F.normalize(forward(model.backbone, images, plan.precision).float())

    def features(samples, name):
        pictures = Pictures(samples, crops)
        return run_on_test_crops(describe, (model.backbone.width,), pictures, plan, args, name)

    model.eval()
    keys = features(data.train, "training")
    queries = features(data.test, "test")
    found = [(part @ keys.T).argmax(1) for part in queries.split(256)]  # all at once: too big
    found = torch.cat(found).cpu().numpy()
    return crop_uv(data.train, crops)[found], scaled_pose(data.train.xyz)[found]


def validate(model, samples, crops, plan, args):
    """The error in mm by which the model is chosen: the mean over the samples. Not called MPJPE:
    evaluate.py averages each joint over the samples first, and also counts samples without a
    valid joint 9."""
    _, pose = predict(model, Pictures(samples, crops), plan, args)
    return float(np.nanmean(sample_errors(pose, samples)))


def sample_errors(pose, samples):
    """pose (N, 21, 3) in lengths of the bone 0-9 -> (N,) mm, the mean distance of each sample's
    valid joints, wrists aligned; NaN where the wrist or joint 9 is not valid."""
    difference = pose - scaled_pose(samples.xyz)
    millimetres = bone_length(samples.xyz)[:, None, None]
    distance = np.linalg.norm(difference * millimetres, axis=2)
    counts = samples.valid & has_wrist_and_bone(samples.valid)[:, None]
    return (distance * counts).sum(1) / np.where(counts.any(1), counts.sum(1), np.nan)


# -------------------------------------------------------------------------------------- pictures

@dataclasses.dataclass
class Crops:
    """How pictures become the network's input."""
    source: str | Hands  # the folder that paths start from, or an opened hands folder
    side: int  # of the network's input, pixels
    border: str  # what a crop shows beyond the picture, a key of BORDERS
    # Of training alone:
    rotation: float = 0.0  # degrees to either side
    colour: bool = False
    seed: int = 0


def make_crops(args):
    return Crops(args.root, args.input_size, args.border, args.rotation, not args.no_colour,
                 args.seed)


@dataclasses.dataclass
class Item:
    """One sample as the network sees it; pixels are the network input's."""
    image: np.ndarray  # uint8 (S, S, 3)
    uv: np.ndarray  # (21, 2) float32
    pose: np.ndarray  # (21, 3) float32, relative to the wrist, in lengths of the bone 0-9
    valid: np.ndarray  # (21,) bool


class Pictures(torch.utils.data.Dataset):
    """Item (epoch, row) of the samples, as training sees it in that epoch; with None as the epoch,
    its test crop."""

    def __init__(self, samples, crops):
        self.samples = samples
        self.crops = crops

    def __getitem__(self, item):
        epoch, row = item
        if epoch is None:
            return self.test_item(row)
        rng = np.random.default_rng((self.crops.seed, epoch, row))
        return self.training_item(row, rng)

    def test_item(self, row):
        sample = self.samples[row]
        image, uv = cut(sample, row, test_view(sample, self.crops.side), self.crops)
        return Item(image, uv, scaled_pose(sample.xyz).astype(np.float32), sample.valid)

    def training_item(self, row, rng):
        sample = self.samples[row]
        view = sample_crop(sample, self.crops, rng)
        image, uv = cut(sample, row, view, self.crops)
        if self.crops.colour:
            image = jitter(image, rng)
        # The pose turns with the picture, about the camera's axis.
        turn = np.eye(3)
        turn[:2, :2] = crop_matrix((0, 0), 1, 1, view.angle)[:, :2].T
        pose = scaled_pose(sample.xyz) @ turn
        return Item(image, uv, pose.astype(np.float32), sample.valid)


def collate(items):
    """n items -> tensors of n rows: image, uv, pose and valid."""
    batch = {}
    for name in ("image", "uv", "pose", "valid"):
        batch[name] = torch.from_numpy(np.stack([getattr(item, name) for item in items]))
    return batch


def test_view(sample, side):
    """The view that shows a sample's test crop, `side` pixels wide."""
    return View(crop_matrix(sample.centre, max(float(sample.side), 1e-3), side))


def sample_crop(sample, crops, rng):
    """The test crop jittered and turned, for training: the centre by up to a tenth of its side per
    axis, the side by up to a tenth. -> View"""
    side = float(sample.side)
    angle = rng.uniform(-crops.rotation, crops.rotation)
    centre = sample.centre + rng.uniform(-0.1, 0.1, 2) * side
    side *= min(max(rng.normal(1, 0.1), 0.9), 1.1)
    return View(crop_matrix(centre, max(side, 1e-3), crops.side, angle), angle)


def crop_uv(samples, crops):
    """-> the joints (N, 21, 2) of the samples in their test crops, pixels of the network's
    input."""
    found = np.empty(samples.uv.shape)
    for row, sample in enumerate(samples):
        found[row] = move_points(test_view(sample, crops.side).matrix, sample.uv)
    return found


def cut(sample, row, view, crops, side=None):
    """-> the view of a sample's picture, RGB uint8 (side, side, 3), by default of the input's side,
    and its joints there (21, 2)."""
    image = read_picture(sample, row, crops.source)
    image, view, uv = shrink(image, view, sample.uv, crops.border)
    return apply_view(view, image, uv, side or crops.side, crops.border)


def shrink(image, view, uv, border):
    """Large photographs: means of blocks of pixels first, since a view only samples points. ->
    the smaller picture, the view and the joints in it."""
    height, width = image.shape[:2]
    times = int(1 / np.linalg.norm(view.matrix[0, :2]))
    if times < 2:
        return image, view, uv
    image = cv2.copyMakeBorder(image, 0, -height % times, 0, -width % times, BORDERS[border])
    image = cv2.resize(image, None, fx=1 / times, fy=1 / times, interpolation=cv2.INTER_AREA)
    # From the smaller picture's pixels to those of the picture, as rescale_points does it.
    middle = (times - 1) / 2
    back = np.array([[times, 0, middle], [0, times, middle], [0, 0, 1]])
    return image, View(view.matrix @ back, view.angle), rescale_points(uv, 1 / times)


def jitter(image, rng):
    """Brightness, contrast and saturation by up to a half, hue by up to 27 degrees, a blur of up to
    half a pixel."""
    hue = rng.uniform(-13, 13)
    saturation, value, contrast = rng.uniform(0.5, 1.5, 3)
    level = np.arange(256)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 2].mean()
    hues = (level + hue) % 180
    saturations = level * saturation
    values = (grey + (level - grey) * contrast) * value
    table = np.stack([hues, saturations, values], 1)
    table[:, 1:] = table[:, 1:].clip(0, 255)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table[None].astype(np.uint8))
    image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return cv2.GaussianBlur(image, (3, 3), max(rng.uniform(0, 0.5), 1e-3))


def read_picture(sample, row, source):
    """-> RGB uint8 (H, W, 3), flipped where the sample says so: all that comes after sees right
    hands. source: as in `Crops`; `row` is the sample's in an opened hands folder."""
    if isinstance(source, Hands):
        return read_crop(source, row)
    path = os.path.join(source, os.fsdecode(sample.path))
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: could not be read: {error.strerror}")
    image = None
    cut_short = content[:2] == b"\xff\xd8" and b"\xff\xd9" not in content
    if content and not cut_short:  # OpenCV fills what a cut JPEG lacks with grey
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    require(image is not None, f"{path}: truncated, or not a picture that OpenCV reads")
    require(sample.width in (0, image.shape[1]),
            f"{path}: is {image.shape[1]} pixels wide, its labels are for {sample.width}")
    return cv2.flip(image, 1) if sample.flip else image


# ---------------------------------------------------------------------------------- files: a run

def make_plan(args, pictures):
    """Join the other ranks -> Plan, or an InputError where the arguments do not fit the set."""
    rank, ranks, device = start_ranks(args.device)
    require(args.batch_size % ranks == 0, f"--batch-size must be a multiple of {ranks} ranks")
    steps_per_epoch = pictures // args.batch_size if args.head != "knn" else 0
    require(steps_per_epoch or args.head == "knn",
            f"{args.root}: {pictures} training pictures, fewer than --batch-size "
            f"{args.batch_size}")
    precision = args.precision or default_precision(device)
    return Plan(rank, ranks, device, precision, steps_per_epoch, args.epochs * steps_per_epoch)


def default_precision(device):
    return "bf16" if device.type == "cuda" else "fp32"


def restore(kept, model, optimizer, data, args):
    """Put a checkpoint's content into its places -> the step that it was written after, and the
    best validation error so far."""
    require(kept["data"] == data.digest,
            f"{args.root}: other labels than {args.out} was trained on; choose another --out")
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    return kept["step"], kept["best"]


def start_run(settings, data, step, model, plan, args):
    """Start the log and print the settings. -> the log's rows so far."""
    rows = start_log(args.out, settings, step)
    if not rows:
        write_log(args.out, {"split": data.notes[0], "notes": data.notes[1:]})
        before = Path(args.weights).parent / "log.jsonl"
        if Path(args.weights).is_file() and before.exists():
            note_pretraining(args.out, before)
    parameters = sum(p.numel() for p in model.parameters())
    print_settings(args, make_parser(), train=len(data.train), validation=len(data.validation),
                   test=len(data.test), ranks=plan.ranks, device=plan.device,
                   precision=plan.precision, steps=plan.steps, start=step,
                   parameters=f"{parameters / 1e6:.1f}M")
    for note in data.notes:
        print(note)
    return rows


def note_pretraining(out, path):
    """From the log beside the weights, for plots of evaluate.py: how they were pre-trained, and on
    how many hands."""
    try:
        first, *rows = read_log(path)
    except ValueError as error:  # another program's log, or an empty one
        print(f"{path}: not of pretrain.py, so plots will not name the pre-training ({error})")
        return
    hands = next((row["hands"] for row in rows if "hands" in row), None)
    write_log(out, {"pretraining": {"args": first.get("args"), "hands": hands}})


def report(step, recent, since, model, optimizer, plan, args):
    """A row of the log, with the mean loss of the recent steps. Here alone the host waits for the
    device."""
    mean = over_ranks(torch.stack(recent).mean()).item() / plan.ranks
    weights_finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    require(math.isfinite(mean) and weights_finite,
            f"{args.out}: the loss or a weight is not finite by step {step}; the checkpoint stays "
            "as it is; try a smaller --lr or --precision fp32 in another --out")
    return {"step": step, "epoch": round(step / plan.steps_per_epoch, 3),
            "lr": optimizer.param_groups[0]["lr"], "loss": mean,
            "pictures_per_s": args.batch_size * len(recent) / (time.time() - since)}


def save(settings, data, step, best, model, optimizer, plan, args):
    """Write the checkpoint, on the rank that writes."""
    if plan.rank == 0:
        save_checkpoint(args.out, dict(args=settings, data=data.digest, step=step, best=best,
                                       model=model.state_dict(),
                                       optimizer=optimizer.state_dict()))


def save_model(model, train, plan, args):
    """model.pt: the weights, and what --predict needs beside them."""
    if plan.rank != 0:
        return
    bones = bone_length(train.xyz[has_wrist_and_bone(train.valid)])
    content = dict(head=args.head, backbone=args.backbone, input_size=args.input_size,
                   border=args.border, crop=crop_factor(train, args), bone=float(np.median(bones)),
                   model=model.state_dict())
    with atomic(Path(args.out) / "model.pt") as file:
        torch.save(content, file)


def crop_factor(samples, args):
    """The test crop's side over the longer extent of the joints."""
    if args.dataset in CROP:
        return CROP[args.dataset]
    return float(np.median(samples.side / np.ptp(samples.uv, axis=1).max(1)))


def finish(rows, best, model, data, crops, plan, args):
    """Predict the test split, by the chosen model, and write the files of the run."""
    if args.head == "knn":
        uv, pose = nearest(model, data, crops, plan, args)
    else:
        if plan.rank == 0:
            curves = Path(args.out) / "curves.png"
            plot_curves(curves, rows, [["loss"], ["lr"], ["validation_error"]])
            model.load_state_dict(load_checkpoint(Path(args.out) / "model.pt")["model"])
            print(f"chosen at a validation error of {best:.2f} mm, see {curves}")
        name = "test" if plan.rank == 0 else ""
        uv, pose = predict(model, Pictures(data.test, crops), plan, args, name)
    if plan.rank != 0:
        return
    truth_uv = write_truth(data.test, crops, args)
    xyz = pose * bone_lengths(data.test)[:, None, None] + data.test.xyz[:, :1]
    error = sample_errors(pose, data.test)
    write_predictions(data.test, uv, xyz, crops, args.root, args.out, truth_uv, error)
    print(f"next: python evaluate.py {args.out}")


def bone_lengths(samples):
    """(N,) mm, the true bone 0-9; where one of its ends has no place, the median of the others."""
    whole = has_wrist_and_bone(known(samples.xyz))
    return np.where(whole, bone_length(samples.xyz), np.median(bone_length(samples.xyz[whole])))


def known(xyz):
    """(..., 21, 3) -> (..., 21), joints that have a place: the others lie at 0."""
    return xyz.any(-1)


def write_truth(samples, crops, args):
    """What evaluate.py compares with -> the true joints in the test crops."""
    out = Path(args.out)
    uv = crop_uv(samples, crops)
    save_array(out / "valid.npy", samples.valid)
    if args.dataset == "assemblyhands":  # its toolkit aligns by every wrist that has a place
        save_array(out / "wrist.npy", known(samples.xyz)[:, 0])
    save_array(out / "gt_uv.npy", uv.astype(np.float32))
    save_array(out / "gt_xyz.npy", samples.xyz.astype(np.float32))
    return uv


def write_predictions(samples, uv, xyz, crops, root, out, truth_uv=None, error=None):
    """Predictions, names.txt and overlay.jpg. Paths start with root; without truth_uv and error
    there is no truth."""
    out = Path(out)
    save_array(out / "pred_uv.npy", uv.astype(np.float32))
    with atomic(out / "names.txt") as file:
        for sample in samples:
            path = os.path.join(root, os.fsdecode(sample.path))
            side = "left" if sample.left else "right"
            file.write(os.fsencode(f"{sample.index}\t{path}\t{side}\n"))
    draw_overlay(out / "overlay.jpg", samples, uv, truth_uv, error, crops)
    save_array(out / "pred_xyz.npy", xyz.astype(np.float32))  # last: where it is, all is
    print(f"{len(samples)} pictures; wrote {out}/pred_xyz.npy, see overlay.jpg beside it")


def draw_overlay(path, samples, pred_uv, true_uv, error, crops, columns=8):
    """Pictures with the predicted skeleton in colours: a row each of the best, median and worst,
    the true one in white; without errors, of the first, middle and last."""
    order = np.arange(len(samples))
    if error is not None:
        scored = max(np.isfinite(error).sum(), 1)
        order = np.argsort(error)[:scored]  # NaN comes last
    columns = max(1, min(columns, len(order) // 3))
    middle = (len(order) - columns) // 2
    tiles = []
    for i in [*order[:columns], *order[middle:middle + columns], *order[-columns:]]:
        image, _ = cut(samples[i], i, test_view(samples[i], 256), crops, 256)
        zoom = 256 / crops.side
        words = ""
        if error is not None:
            words = f"{error[i]:.1f} mm"
            image = draw_hand(image, rescale_points(true_uv[i], zoom), (255, 255, 255))
        tiles.append(draw_hand(image, rescale_points(pred_uv[i], zoom), None, words))
    save_image(path, sheet(tiles, columns))


# ----------------------------------------------------------------------- files: your own pictures

def predict_folder(args):
    """--predict: a trained model on a folder of pictures, each its whole square, or on a hands
    folder."""
    out = Path(args.out)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kept, model = load_model(args.weights, device)
    samples, source = samples_of_folder(Path(args.predict), kept["crop"])
    crops = Crops(source, kept["input_size"], kept.get("border", "black"))
    plan = Plan(0, 1, device, args.precision or default_precision(device))
    open_folder(out)  # locked until the script ends
    taken = [name for name in ("checkpoint.pt", "gt_xyz.npy", "keypoints.npy")
             if (out / name).exists()]
    require(not taken, f"{out}: holds a fine-tuning run or hands, choose another --out")
    settings = plain(args, backbone=kept["backbone"], head=kept.get("head", "detnet"),
                     input_size=crops.side, border=crops.border, precision=plan.precision)
    old = logged_settings(out)
    if old:
        refuse_other_arguments(out, old, settings, MAY_CHANGE_ON_RESUME)
    start_log(out, settings)
    print_settings(args, make_parser(), pictures=len(samples), device=device,
                   precision=plan.precision, trained_backbone=kept["backbone"],
                   trained_size=crops.side, trained_border=crops.border)
    uv, pose = predict(model, Pictures(samples, crops), plan, args, "pictures")
    write_predictions(samples, uv, pose * kept["bone"], crops, args.predict, out)


def load_model(path, device):
    """model.pt -> its content, and the network."""
    kept = load_checkpoint(path)
    try:
        needed = {key: kept[key] for key in ("backbone", "input_size", "crop", "bone", "model")}
        network = NETWORKS[kept.get("head", "detnet")]  # older files do not name it
        model = network(needed["backbone"], "none")
        model = model.to(device, memory_format=torch.channels_last)
        model.load_state_dict(needed["model"])
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(repr(error).split())[:200]
        raise InputError(f"{path}: not the model.pt of a fine-tuning run: {reason}")
    return kept, model


def samples_of_folder(folder, crop):
    """A folder of pictures, or a hands folder -> samples without labels, and the source that
    `Crops` wants. crop: the crop's side over a hand's longer extent."""
    require(folder.is_dir(), f"{folder}: no such folder, expected pictures or a hands folder")
    if (folder / "keypoints.npy").exists():
        hands = load_hands(folder)
        # Nothing to flip: a hands folder's crops show right hands already.
        samples = make_samples(crop, path=["crops.npy"] * len(hands.rows), uv=hands.keypoints,
                               left=hands.rows["left"])
        return samples, hands
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    require(names, f"{folder}: holds neither keypoints.npy nor a picture ({', '.join(PICTURES)})")
    samples = make_samples(1, path=names)
    for row, sample in enumerate(samples):
        height, width = read_picture(sample, row, str(folder)).shape[:2]
        samples.centre[row] = (width - 1) / 2, (height - 1) / 2
        samples.side[row] = max(height, width)
    return samples, str(folder)


# -------------------------------------------------------- labels: which train, choose and test

# A labelled hand in a picture. --labels keeps these as .npy files, and an own data set is made of
# them. All hands are as the picture shows them: left ones are flipped after they were read.
SAMPLE = np.dtype([
    ("path", "S255"),  # of the picture, below --root
    ("left", "?"),  # the hand is a left one
    ("flip", "?"),  # the picture is to be flipped when it is read; the script sets it
    ("index", "<i8"),  # the sample's official number, -1 where it cannot be known; in names.txt
    ("group", "<i8"),  # samples of one group are drawn together by --label-fraction
    ("scene", "<i8"),  # samples of one scene are never on both sides of train and validation
    ("width", "<i8"),  # of the picture, pixels; of a right hand 0 where it does not matter
    ("uv", "<f8", (21, 2)),  # joints, pixels of the picture
    ("xyz", "<f8", (21, 3)),  # joints, mm in the camera's frame; 0 where a joint has no place
    ("valid", "?", 21),  # joints that count
    ("centre", "<f8", 2),  # of the square test crop, pixels
    ("side", "<f8")])  # of the same


@dataclasses.dataclass
class Labels:
    """What a reader returns: arrays of SAMPLE, and sentences for the user, the first naming the
    split. validation is None where a tenth of train shall serve."""
    train: np.recarray
    validation: np.recarray
    test: np.recarray
    notes: list


@dataclasses.dataclass
class Data(Labels):
    """What a run uses of them. All hands are right ones from here on."""
    digest: int  # of all three arrays


def load_data(args):
    """Read the labels, flip left hands, and choose the samples that train -> Data."""
    labels = kept_labels(args) if args.labels else READERS[args.dataset].read(args)
    for samples in (labels.train, labels.validation, labels.test):
        if samples is not None:
            check_bones(samples, labels.notes, args)
            flip_left_hands(samples)
    train = labels.train
    groups = np.unique(train.group)
    share = max(round(args.label_fraction * len(groups)), 1)
    chosen = np.random.default_rng(args.seed).permutation(groups)[:share]
    used = np.isin(train.group, chosen)
    note = f"labels: {len(chosen)} of {len(groups)} unique training samples"
    validation = labels.validation
    if args.head == "knn":  # no model to choose, and only a whole pose can be aligned and scaled
        validation = train[:0]
        whole = used & has_wrist_and_bone(train.valid)
        note += f"; compared with the {whole.sum()} of {used.sum()} that have wrist and joint 9"
        require(whole.any(), f"{args.root}: no training sample with a valid wrist and joint 9")
        used = whole
    elif validation is None:
        held_out, more = hold_out(train, used, args)
        validation = train[held_out]
        used = used & ~held_out
        note += more
    require(args.head == "knn" or has_wrist_and_bone(validation.valid).any(),
            f"{args.root}: no validation sample with a valid wrist and joint 9")
    data = Data(train[used], validation, labels.test, [*labels.notes, note], 0)
    for samples in (data.train, data.validation, data.test):
        data.digest = zlib.crc32(samples, data.digest)
    return data


def check_bones(samples, notes, args):
    """An InputError where these cannot be hands in mm."""
    whole = has_wrist_and_bone(samples.valid)
    require(whole.any(), f"{args.root}: a split without a labelled wrist and joint 9: "
            f"{'; '.join(notes)}")
    lengths = bone_length(samples.xyz[whole])
    middle = np.median(lengths)
    require(lengths.min() > 0 and 40 < middle < 140,
            f"{args.root}: the bone 0-9 has a length of {lengths.min():.3g} mm at least and "
            f"{middle:.3g} mm in the median, expected hands")


def flip_left_hands(samples):
    """Make right hands of left ones, u' = width - 1 - u and x' = -x, and mark their pictures to be
    flipped as well."""
    left = samples.left
    last_column = samples.width[left] - 1
    samples.flip = left
    samples.xyz[left, :, 0] *= -1
    samples.uv[left, :, 0] = last_column[:, None] - samples.uv[left, :, 0]
    samples.centre[left, 0] = last_column - samples.centre[left, 0]


def hold_out(train, used, args):
    """Every tenth scene of the labels used is for validation, so that no pose is on both sides. ->
    (N,) bool, and a note."""
    kind = {"assemblyhands": "sequences", "own": "scenes"}.get(args.dataset, "samples")
    scenes = np.random.default_rng(args.seed).permutation(np.unique(train.scene))
    scenes = scenes[np.isin(scenes, train.scene[used])]
    require(len(scenes) > 1, f"{args.root}: labels of {len(scenes)} training {kind}, expected at "
            "least 2: one is for validation")
    tenth = scenes[::10]
    note = f"; every tenth of their {kind}, {len(tenth)} of {len(scenes)}, is for validation"
    return used & np.isin(train.scene, tenth), note


def make_samples(crop=None, **fields):
    """Columns of SAMPLE -> array of SAMPLE. The index counts unless it is given. With `crop`, the
    test crop is a square that many times as long as the joints."""
    count = len(fields["path"])
    samples = np.zeros(count, SAMPLE).view(np.recarray)
    paths = [os.fsencode(path) for path in fields.pop("path")]
    longest = max(map(len, paths), default=0)
    require(longest <= SAMPLE["path"].itemsize, "a path below the root has more than 255 bytes")
    samples["path"] = paths
    samples["index"] = np.arange(count)
    for name, column in fields.items():
        samples[name] = column
    if crop:
        low = samples.uv.min(1)
        high = samples.uv.max(1)
        samples.centre = (low + high) / 2
        samples.side = crop * (high - low).max(1)
    return samples


# ------------------------------------------------------------------- labels: kept with --labels

# To be raised when a reader changes what it returns: then older folders are refused.
READERS_VERSION = 1


def kept_labels(args):
    """The labels of the folder --labels, which is filled first where it is empty -> Labels.

    origin.json says what they were read from; a folder with other labels is refused. Of several
    processes the first reads, and the others wait for it.
    """
    folder = Path(args.labels)
    if args.dataset == "own":
        notes = [f"own labels: those in {folder}"]
        return load_labels(folder, notes, "expected records of SAMPLE, see finetune.py")
    files = READERS[args.dataset].files(args)
    origin = describe_origin(args, files)
    folder.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder / ".lock", f"waiting for the process that reads {args.root}"):
        kept = load_origin(folder)
        same = kept is None or kept[0] == origin
        require(same, f"{folder}: its labels are of another data set, division or root, or of "
                "label files that were changed since; delete it, or choose another --labels")
        if not (folder / "test.npy").exists():
            labels = READERS[args.dataset].read(args)
            save_labels(folder, origin, labels)
            return labels
    text = f"labels: those that an earlier run left in {folder}"
    if args.dataset == "dexycb":
        text += "; only meta.yml was compared: delete it where labels_*.npz were changed"
    print(text)
    return load_labels(folder, kept[1], "delete this folder, it will be made again")


def describe_origin(args, files):
    """What labels follow from. Of DexYCB's 580,000 label files only the meta.yml are looked at."""
    digest = 0
    for file in files:
        status = file.stat()
        name = os.path.relpath(file, args.root)
        digest = zlib.crc32(repr((name, status.st_size, status.st_mtime_ns)).encode(), digest)
    return {"dataset": args.dataset, "setup": args.setup, "paper_filter": args.paper_filter,
            "modality": args.modality, "root": os.path.realpath(args.root), "files": len(files),
            "names_sizes_and_times": digest, "version": READERS_VERSION}


def load_origin(folder):
    """-> what the labels in the folder were read from, and notes; None where it holds none."""
    if not (folder / "origin.json").exists():
        own = any((folder / f"{name}.npy").exists() for name in ("train", "val", "test"))
        require(not own, f"{folder}: holds labels of your own, use them with --dataset own, or "
                "choose another --labels")
        return None
    try:
        content = read_json(folder / "origin.json")
        return content["origin"], list(content["notes"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}: delete this folder, it will be made again ({error!r})")


def save_labels(folder, origin, labels):
    """origin.json first: it says that the other files are not the user's; test.npy last: where it
    is, all is."""
    with atomic(folder / "origin.json") as file:
        content = {"origin": origin, "notes": labels.notes}
        file.write((json.dumps(content, indent=1) + "\n").encode())
    save_array(folder / "train.npy", labels.train.view(SAMPLE))
    (folder / "val.npy").unlink(missing_ok=True)
    if labels.validation is not None:
        save_array(folder / "val.npy", labels.validation.view(SAMPLE))
    save_array(folder / "test.npy", labels.test.view(SAMPLE))


def load_labels(folder, notes, hint):
    """train.npy, val.npy where it is there, and test.npy -> Labels."""
    arrays = []
    for name in ("train", "val", "test"):
        path = folder / f"{name}.npy"
        if name == "val" and not path.exists():
            arrays.append(None)
            continue
        samples = load_array(path, SAMPLE, (None,), hint=hint).view(np.recarray)
        require((samples.side > 0).all(), f"{path}: a test crop's side must be above 0")
        require((samples.width > 0)[samples.left].all(),
                f"{path}: a left hand's width must be the picture's, since it is flipped")
        arrays.append(samples)
    return Labels(*arrays, notes)


@contextlib.contextmanager
def waiting_lock(path, message):
    """Hold the lock file; where another process has it, say so and wait."""
    with open(path, "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(message, flush=True)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def read_json(file):
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: truncated or not json ({error})")


# --------------------------------------------- readers: what the labels of three data sets mean
#
# read_freihand, read_dexycb and read_assemblyhands turn a data set in its own layout into Labels:
# arrays of SAMPLE with hands as the pictures show them, FreiHAND's order of joints, and only
# samples that have a label. Nothing after this line belongs to the method.

@dataclasses.dataclass
class Reader:
    files: collections.abc.Callable  # args -> the label files that tell whether labels changed
    read: collections.abc.Callable  # args -> Labels


# --------------------------------------------------------------------------------------- FreiHAND

def freihand_files(args):
    """-> training_K.json, training_xyz.json, and the same two of evaluation."""
    root = Path(args.root)
    evaluation = [root, Path(os.path.abspath(root) + "_eval")]
    files = []
    for name, places in (("training", [root]), ("evaluation", evaluation)):
        for key in ("K", "xyz"):
            there = [place / f"{name}_{key}.json" for place in places]
            found = [file for file in there if file.is_file()]
            more = f", there or in {root}" if len(places) > 1 else ""
            require(found, f"{there[-1]}: missing, expected FreiHAND's list{more}")
            files.append(found[0])
    return files


def read_freihand(args):
    """FreiHAND v2 -> Labels."""
    root = Path(args.root)
    training_k, training_xyz, evaluation_k, evaluation_xyz = freihand_files(args)
    train = read_freihand_split(root, "training", 4, training_k, training_xyz)
    test = read_freihand_split(root, "evaluation", 1, evaluation_k, evaluation_xyz)
    notes = ["FreiHAND: tested on the evaluation split",
             f"{len(train)} training pictures of {len(train) // 4} samples, {len(test)} evaluation "
             "pictures, all used"]
    return Labels(train, None, test, notes)


def read_freihand_split(root, name, versions, k_file, xyz_file):
    """The camera matrices and the joints in metres of one split -> array of SAMPLE."""
    matrix = read_array(k_file, 3)
    xyz = read_array(xyz_file, 21)
    require(len(matrix) == len(xyz), f"{root / name}_K.json: has {len(matrix)} entries, "
            f"{xyz_file.name} has {len(xyz)}")
    lengths = bone_length(xyz)
    bad = np.flatnonzero((xyz[..., 2] <= 0).any(1) | (lengths <= 0))
    require(not len(bad),
            f"{xyz_file}: sample {bad[:1]} lies behind the camera or has no bone 0-9")
    require(np.median(lengths) < 1,
            f"{xyz_file}: the bone 0-9 has a median above 1, expected metres")
    pictures = [f"{i:08d}.jpg" for i in range(versions * len(xyz))]
    folder = root / name / "rgb"
    there = set(os.listdir(folder))
    lacking = [picture for picture in pictures if picture not in there]
    require(not lacking, f"{folder}: {len(lacking)} pictures are missing, the first {lacking[:1]}; "
            f"expected {versions} x {len(xyz)}, 00000000.jpg and so on")
    uvw = xyz @ matrix.transpose(0, 2, 1)
    uv = uvw[..., :2] / uvw[..., 2:]
    sample = np.tile(np.arange(len(xyz)), versions)  # picture i shows sample i % their number
    return make_samples(CROP["freihand"], path=[f"{name}/rgb/{picture}" for picture in pictures],
                        group=sample, scene=sample, uv=uv[sample], xyz=xyz[sample] * 1000,
                        valid=True)


def read_array(file, rows):
    """A json list -> float64 (N, rows, 3)."""
    try:
        array = np.array(read_json(file), np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: truncated or not a list of arrays of one shape ({error})")
    require(array.shape[1:] == (rows, 3) and np.isfinite(array).all(),
            f"{file}: has shape {array.shape}, expected (N, {rows}, 3), finite")
    return array


# ----------------------------------------------------------------------------------------- DexYCB

SERIALS = ("836212060125", "839512060362", "840412060917", "841412060263", "932122060857",
           "932122060861", "932122061900", "932122062010")
WIDTH, HEIGHT = 640, 480


@dataclasses.dataclass
class Camera:
    """A folder of frames that one camera saw of one sequence. All numbers count from 0."""
    folder: Path
    frames: int
    left: bool  # the sequence shows a left hand
    subject: int
    sequence: int  # within the subject's
    number: int  # of the camera, in SERIALS


def dexycb_part(setup, subject, sequence, camera):
    """"train", "val" or "test", as dex-ycb-toolkit divides; all numbers count from 0."""
    if setup == "s0":
        if sequence % 5 != 4:
            return "train"
        return "val" if subject < 2 else "test"
    if setup == "s1":
        return {6: "val", 7: "test", 8: "test"}.get(subject, "train")
    if setup == "s2":
        return {6: "val", 7: "test"}.get(camera, "train")
    grasped = sequence // 5  # each subject grasps 20 objects, five times each
    return {3: "val", 19: "val", 7: "test", 11: "test", 15: "test"}.get(grasped, "train")


def dexycb_files(args):
    """-> the meta.yml of all sequences."""
    files = []
    for found in find_sequences(args):
        files += found
    return files


def find_sequences(args):
    """-> for each of the ten subjects a list of meta.yml, in the official order."""
    files = []
    for subject in range(1, 11):
        pattern = f"*-subject-{subject:02d}"
        found = sorted(Path(args.root).glob(f"{pattern}/*/meta.yml"))
        require(len(found) == 100 or found and args.setup in ("s1", "s2"),
                f"{args.root}/{pattern}: holds {len(found)} sequences with a meta.yml, expected "
                "100 (or some for s1 and s2, whatever their order)")
        files.append(found)
    return files


def read_dexycb(args):
    """DexYCB -> Labels. valid: visible as SiMHand's reader defines it; xyz keeps all 21 joints."""
    files = find_sequences(args)
    cameras = find_cameras(files)
    note = f"{sum(map(len, files))} of 1000 sequences and {len(cameras)} of 8000 cameras are there"
    complete = len(cameras) == 8000  # what is missing would shift the official indices
    if not complete:
        note += ": names.txt has no official indices but -1"
    notes = [f"DexYCB {args.setup}: chosen on val, tested on test", note]
    splits = []
    for name in ("train", "val", "test"):
        part = []
        for camera in cameras:
            if dexycb_part(args.setup, camera.subject, camera.sequence, camera.number) == name:
                part.append(camera)
        frames = read_frames(part, args)
        if not complete:
            frames.index = -1
        samples, note = keep_labelled(frames, args)
        splits.append(samples)
        notes.append(f"{name}: {note}")
    return Labels(*splits, notes)


def find_cameras(files):
    """The meta.yml of each subject's sequences -> a Camera for each folder of frames, in the
    official order."""
    import yaml  # here: the other data sets do without it

    # Its tuples are read as lists; any other tag of Python's is refused.
    yaml.SafeLoader.add_constructor("tag:yaml.org,2002:python/tuple",
                                    yaml.SafeLoader.construct_yaml_seq)
    cameras = []
    for subject, found in enumerate(files):
        for sequence, file in enumerate(found):
            serials, frames, side = read_meta(file)
            for number, serial in enumerate(SERIALS):
                if serial in serials:
                    cameras.append(Camera(file.parent / serial, frames, side == "left", subject,
                                          sequence, number))
    return cameras


def read_meta(file):
    """meta.yml -> serial numbers of the cameras, number of frames, side of the hand."""
    import yaml

    try:
        meta = yaml.safe_load(file.read_bytes())
        serials = {str(serial) for serial in meta["serials"]}
        frames = int(meta["num_frames"])
        side = meta["mano_sides"][0]
        require(serials <= {*SERIALS} and frames > 0 and side in ("left", "right"),
                "a value that none can have")
    except (yaml.YAMLError, LookupError, TypeError, ValueError, ArithmeticError,
            RecursionError) as error:
        reason = " ".join(repr(error).split())[:300]
        raise InputError(f"{file}: expected DexYCB's serials, num_frames and mano_sides "
                         f"({reason})")
    return serials, frames, side


def read_frames(cameras, args):
    """-> array of SAMPLE of all frames, those without a label too: they count in the index."""
    def read(batch):
        return read_camera(batch[0], args.root)

    batches = [[k] for k in range(len(cameras))]
    loader = load_items(cameras, batches, args.workers, read)
    parts = [np.zeros(0, SAMPLE)]
    parts += progress(loader, desc="labels", unit="camera", total=len(cameras))
    samples = np.concatenate(parts).view(np.recarray)
    samples.index = np.arange(len(samples))
    samples.group = samples.index
    return samples


def read_camera(camera, root):
    """-> array of SAMPLE of a camera's frames; one without a label has no place for any joint."""
    xyz = []
    uv = []
    paths = []
    for frame in range(camera.frames):
        metres, pixels = read_label(camera.folder / f"labels_{frame:06d}.npz")
        xyz.append(metres)
        uv.append(pixels)
        paths.append(f"{camera.folder.relative_to(root)}/color_{frame:06d}.jpg")
    xyz = np.array(xyz)
    uv = np.array(uv)
    inside = ((uv > 0) & (uv <= (WIDTH, HEIGHT))).all(2)
    valid = inside & (xyz[..., 0] != -1)
    labelled = (xyz != -1).any((1, 2))  # DexYCB puts -1 everywhere in a frame without a label
    xyz[~labelled] = 0
    return make_samples(CROP["dexycb"], path=paths, left=camera.left,
                        scene=100 * camera.subject + camera.sequence, width=WIDTH, uv=uv,
                        xyz=xyz * 1000.0, valid=valid)


def read_label(file):
    """A frame's labels -> joint_3d (21, 3) in metres, joint_2d (21, 2) in pixels."""
    try:
        # Opened here: np.load leaves a damaged file open.
        with open(file, "rb") as content, np.load(content, allow_pickle=False) as labels:
            xyz = labels["joint_3d"].reshape(21, 3)
            uv = labels["joint_2d"].reshape(21, 2)
        require(np.isfinite(xyz).all() and np.isfinite(uv).all(), "not finite")
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise InputError(f"{file}: missing, truncated, or without finite joint_3d (1, 21, 3) and "
                         f"joint_2d (1, 21, 2): {error}")
    return xyz, uv


def keep_labelled(frames, args):
    """-> the frames that have a label (and that --paper-filter keeps), and a note that counts."""
    labelled = known(frames.xyz).any(1)
    kept = labelled
    if args.paper_filter:
        kept = labelled & (frames.valid.sum(1) >= 10) & has_wrist_and_bone(frames.valid)
    outside = kept & ~frames.valid.all(1)
    note = (f"{kept.sum()} of {len(frames)} frames kept, {outside.sum()} of them with joints "
            f"outside the picture; dropped {(~labelled).sum()} without a label")
    if args.paper_filter:
        note += f" and {(labelled & ~kept).sum()} by --paper-filter"
    return frames[kept], note


# ---------------------------------------------------------------------------------- AssemblyHands

# Its joints, of each finger the tip first and the wrist last, in FreiHAND's order.
TIPS_FIRST = np.array([20, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16])


def assemblyhands_files(args):
    """-> data, calibration and poses of train, and the same of val."""
    files = []
    for part in ("train", "val"):
        for name in (f"{args.modality}_data", f"{args.modality}_calib", "joint_3d"):
            folder = Path(args.root, "annotations", part)
            files.append(folder / f"assemblyhands_{part}_{name}_v1-1.json")
    return files


def read_assemblyhands(args):
    """AssemblyHands v1-1 -> Labels."""
    files = assemblyhands_files(args)
    train, train_note = read_annotations(*files[:3])
    test, test_note = read_annotations(*files[3:])
    notes = [f"AssemblyHands {args.modality}: tested on val, as the public test split has no "
             "labels",
             f"train: {train_note}", f"val: {test_note}"]
    return Labels(train, None, test, notes)


def read_annotations(data_file, calib_file, pose_file):
    """One split -> array of SAMPLE, and a note that counts what was dropped."""
    data = read_json(data_file)
    calibration = read_json(calib_file)
    poses = read_json(pose_file)
    columns = collections.defaultdict(list)
    dropped = collections.Counter()
    scenes = {}  # sequence -> its number
    at = ""
    try:
        images = {image["id"]: image for image in data["images"]}
        for annotation in progress(data["annotations"], desc=data_file.stem, unit="picture"):
            at = f"annotation {annotation['id']}: "
            image = images[annotation["image_id"]]
            for side in ("right", "left"):
                hand, reason = read_hand(annotation, image, side, calibration, poses)
                if reason:
                    dropped[reason] += 1
                    continue
                hand["scene"] = scenes.setdefault(image["seq_name"], len(scenes))
                for name, value in hand.items():
                    columns[name].append(value)
        count = len(columns["path"])
        samples = make_samples(group=np.arange(count), **columns)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{data_file}: {at}not in AssemblyHands' layout, or missing in "
                         f"{calib_file.name} or {pose_file.name}: {error!r}")
    reasons = [f"{times} {reason}" for reason, times in sorted(dropped.items())]
    return samples, (f"{count} hands of {len(scenes)} sequences kept; dropped "
                     f"{', '.join(reasons) or 'none'}")


def read_hand(annotation, image, side, calibration, poses):
    """One hand of a picture -> its fields of SAMPLE, and why it is dropped: one of both is None."""
    sequence = image["seq_name"]
    frame = f"{image['frame_idx']:06d}"
    pose = (poses["annotations"].get(sequence, {}).get(frame) or {}).get("world_coord")
    box = (annotation["bbox"] or {}).get(side)
    if annotation["joint_valid"] is None or pose is None:
        return None, "without labels"
    if box is None:
        return None, "without a box"
    low, high = np.array(box, float).reshape(2, 2)
    if not (high > low).all():
        return None, "without a box"
    matrix, turn = read_camera_of(image, frame, calibration["calibration"][sequence])
    order = TIPS_FIRST if side == "right" else 21 + TIPS_FIRST
    visible = np.reshape(annotation["joint_valid"], 42)[order] > 0
    xyz = np.array(pose, float).reshape(42, 3)[order] @ turn[:, :3].T + turn[:, 3]
    placed = np.isfinite(xyz).all(1)
    valid = placed & (xyz[:, 2] > 0) & visible
    if valid.sum() < 10:
        return None, "with fewer than 10 valid joints"
    xyz[~placed] = 0
    uv = (xyz @ matrix.T)[:, :2] / np.maximum(xyz[:, 2:], 1)  # rectified pictures: a pinhole
    crop_side = max(CROP["assemblyhands"] * (high - low).max(), 100)
    return dict(path=f"images/{image['file_name']}", left=side == "left",
                index=int(annotation["id"]), width=image["width"], uv=uv, xyz=xyz, valid=valid,
                centre=(low + high) / 2, side=crop_side), None


def read_camera_of(image, frame, cameras):
    """-> the intrinsic matrix (3, 3), and world to camera (3, 4), of the camera that took it."""
    name = image["camera"].removesuffix("_mono10bit")
    if name not in cameras["intrinsics"]:
        name += "_mono10bit"
    matrix = np.array(cameras["intrinsics"][name], float).reshape(3, 3)
    turn = np.array(cameras["extrinsics"][frame][name], float).reshape(3, 4)
    if not (np.isfinite(matrix).all() and np.isfinite(turn).all()):
        raise ValueError(f"calibration of {name}, frame {frame}, is not finite")
    return matrix, turn


READERS = {"freihand": Reader(freihand_files, read_freihand),
           "dexycb": Reader(dexycb_files, read_dexycb),
           "assemblyhands": Reader(assemblyhands_files, read_assemblyhands)}


if __name__ == "__main__":
    run_script(main)
