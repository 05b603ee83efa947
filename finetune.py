r"""Fine-tune a (pre-trained) ResNet for 3D hand pose, and test it: DetNet of minimal-hand, or
one linear layer.

Reads a data set in its own layout and writes into --out: model.pt, checkpoint.pt, log.jsonl and
curves.png, and for the test split pred_xyz.npy, gt_xyz.npy (mm), valid.npy (for AssemblyHands
wrist.npy too), pred_uv.npy, gt_uv.npy (pixels of the network's input), names.txt and overlay.jpg.
The model is chosen on a validation split, never on the test split. As in the paper, what one
picture cannot tell is taken from the labels: the wrist's place and the length of the bone 0-9.

    python finetune.py --dataset freihand --root FreiHAND_pub_v2 \
        --weights runs/simhand/backbone.pt --out runs/freihand
    python finetune.py --predict my_pictures --weights runs/freihand/model.pt --out runs/mine
    python finetune.py --dataset freihand --root demo/freihand --weights none \
        --backbone resnet18 --input-size 64 --batch-size 16 --epochs 2 --out runs/tiny

Your own data set: --dataset own --root PICTURES --labels FOLDER, where FOLDER holds train.npy,
test.npy and, unless a tenth of the training set is to be held out, val.npy: arrays of SAMPLE, see
below. What --labels keeps of another data set is an example.

To read: arguments, main, then the method (network, loss, training, testing). Whoever wants the
method may stop at the banner "pictures"; the three data sets' readers come last.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import json
import math
import os
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate as collate

from common import (BACKBONES, BORDERS, KEPT, PARENTS, PICTURES, Hands, InputError, Plan, View,
                    add_machine_flags, any_rank, apply_view, atomic, average_statistics,
                    catch_sigterm, check_flags, crop_matrix, draw_hand, end_ranks, forward, is_a,
                    items_of_steps, load_array, load_backbone, load_checkpoint, load_hands,
                    load_items, logged_settings, move_points, open_run, over_ranks, plain,
                    plot_curves, print_settings, progress, read_crop, read_log, read_picture,
                    report, require, rescale_points, run_script, save_array, save_checkpoint,
                    save_image, save_lines, sheet, spread, start_log, start_ranks, to_device,
                    write_log)

MAY_CHANGE_ON_RESUME = ("out", "labels", "device", "workers", "save_minutes")
# The test crop's side over the longer extent of the true joints (AssemblyHands: of its box, and
# 100 px at least).
CROP = {"freihand": 2.0, "dexycb": 1.75, "assemblyhands": 1.75}


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--dataset", choices=(*READERS, "own"), help="own: labels that you made, see --labels")
    flag("--root", help="the data set's folder, in its own layout")
    flag("--out", required=True, help="folder of this run")
    flag("--setup", choices=("s0", "s1", "s2", "s3"), help="DexYCB's split: test on unseen "
         "sequences (s0), subjects (s1, the default), views (s2) or objects (s3)")
    flag("--paper-filter", action="store_true", help="DexYCB: keep only frames with the wrist, "
         "joint 9 and 8 joints more in the picture, as SiMHand does")
    flag("--modality", choices=("ego", "exo"), help="AssemblyHands' cameras (default: ego); exo "
         "needs frames cut from its videos, and the calibration as json, laid out like that of ego")
    flag("--predict", metavar="FOLDER", help="no data set: apply the trained --weights "
         "RUN/model.pt to pictures, each of one right hand as large in them as the training's "
         "--crop says, or to a hands folder. Wrists are then at 0, and the bone 0-9 has the "
         "training set's median length")
    # network
    flag("--weights", default="imagenet", help="start from a file (backbone.pt), imagenet, or none")
    flag("--backbone", choices=BACKBONES, default="resnet50", help="(paper: resnet50)")
    flag("--head", choices=NETWORKS, default="detnet", help="detnet: the paper's; linear: one "
         "layer on the backbone's averaged features, which needs fewer steps; knn: no training, "
         "but the pose of the training picture with the most similar features")
    flag("--freeze", action="store_true",
         help="keep the backbone as it is; with --head linear this is a linear probe")
    flag("--input-size", type=int, default=128,
         help="side of the network's input in pixels; for detnet a multiple of 32 (default: 128)")
    add_training_flags(flag)
    return parser


def add_training_flags(flag):
    # labels
    flag("--labels", metavar="FOLDER",
         help="cache of the data set's labels; with --dataset own, the labels that you made")
    flag("--label-fraction", type=float, default=1.0, help="share of the unique training samples "
         "to use, drawn by --seed; a larger share contains a smaller one")
    # pictures
    flag("--crop", type=float, help="side of the test crop over the longer extent of the true "
         "joints, AssemblyHands: of its box (default: freihand 2, dexycb and assemblyhands 1.75). "
         "Pre-training's views are 1.1 to 1.9 wide: what a frozen backbone tells apart falls off "
         "beyond")
    flag("--border", choices=sorted(BORDERS), default="black",
         help="what a crop shows beyond the picture: the mirrored picture, or black (default)")
    flag("--rotation", type=float, default=90.0, help="degrees to either side (DetNet: 90)")
    flag("--no-colour", action="store_true", help="no colour jitter and blur")
    # optimisation
    flag("--epochs", type=int, default=120, help="(paper: 120)")
    flag("--batch-size", type=int, default=128, help="pictures a step over all ranks of torchrun; "
         "BatchNorm sees a rank's share (paper: 128)")
    flag("--lr", type=float, default=1e-3,
         help="Adam's learning rate; a tenth of it from half of the epochs on (DetNet)")
    flag("--backbone-lr", type=float, help="learning rate of the backbone (default: --lr)")
    flag("--seed", type=int, default=0, help="seed of everything random")
    # machine
    add_machine_flags(flag)


def parse_args():
    args = make_parser().parse_args()
    check_flags(args)
    is_trained = args.weights not in ("imagenet", "none")
    labelled = [args.dataset, args.root]
    require(all(labelled) and not args.predict
            or args.predict and is_trained and not any(labelled),
            "expected --dataset and --root, or --predict and --weights RUN/model.pt")
    require(args.dataset == "dexycb" or not (args.setup or args.paper_filter),
            "--setup and --paper-filter belong to --dataset dexycb")
    require(args.dataset == "assemblyhands" or not args.modality,
            "--modality belongs to --dataset assemblyhands")
    require(args.dataset != "own" or args.labels,
            "--dataset own: expected --labels FOLDER with train.npy and test.npy")
    require(args.dataset in CROP or not args.crop,
            "--crop belongs to --dataset freihand, dexycb and assemblyhands")
    above = min(args.epochs, args.batch_size, args.lr, args.input_size)
    require(0 < args.label_fraction <= 1 and above > 0, "--label-fraction must lie in 0..1, "
            "--epochs, --batch-size, --lr and --input-size above 0")
    require(args.head != "detnet" or args.input_size % 32 == 0,
            f"--input-size must be a multiple of 32, not {args.input_size}, with --head detnet")
    if args.root:
        args.root = os.path.normpath(args.root)
    args.setup = args.setup or {"dexycb": "s1"}.get(args.dataset)
    args.modality = args.modality or {"assemblyhands": "ego"}.get(args.dataset)
    args.crop = args.crop or CROP.get(args.dataset)
    if args.backbone_lr is None:
        args.backbone_lr = args.lr
    return args


def main():
    args = parse_args()
    if args.predict:
        return predict_folder(args)
    # Before the ranks meet: the labels may take longer than ranks wait for each other.
    data = load_data(args)
    plan = make_plan(args, len(data.train))
    torch.manual_seed(args.seed)
    settings = plain(args, ranks=plan.ranks, precision=plan.precision)
    kept = open_run(args.out, settings, data.digest, MAY_CHANGE_ON_RESUME, plan.rank)
    model = NETWORKS[args.head](args.backbone, "none" if kept else args.weights)
    model = model.to(plan.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.lr, None if args.freeze else args.backbone_lr)
    step = 0
    best = dict(error=math.inf, weights=None)
    if kept:
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        step = kept["step"]
        best = kept["best"]
    net = spread(model, plan.device)
    rows = start_run(settings, data, step, model, plan, args) if plan.rank == 0 else []

    crops = make_crops(args)
    batches = items_of_steps(step, plan.steps, len(data.train), plan, args.seed)
    loader = load_items(Pictures(data.train, crops), batches, plan.workers, collate,
                        pin_memory=plan.device.type == "cuda")
    recent = []  # values of the steps since the last report
    stop = catch_sigterm()
    saved = since = time.time()
    bar = progress(total=plan.steps, initial=step, unit="step",
                   disable=plan.rank != 0 or not plan.steps)
    while step < plan.steps:
        set_learning_rate(optimizer, step, plan.steps)
        net.train()
        if args.freeze:
            model.backbone.eval()
        batch = to_device(next(loader), plan.device)
        recent.append({"loss": train_step(net, optimizer, batch, LOSSES[args.head], plan)})
        step += 1
        bar.update()

        end_of_epoch = step % plan.steps_per_epoch == 0
        overdue = time.time() - saved >= 60 * args.save_minutes
        stopping, due = any_rank(bool(stop), overdue or step == plan.steps)
        if stopping or due or end_of_epoch or step % plan.report_every == 0:
            row = report(args.out, step, recent, optimizer, plan)
            row["pictures_per_s"] = args.batch_size * len(recent) / (time.time() - since)
            if end_of_epoch:
                error = validate(model, data.validation, crops, plan)
                row["validation_error"] = error
                if error < best["error"]:  # never where it is NaN
                    best = dict(error=error, weights=copy.deepcopy(model.state_dict()))
            rows.append(row)
            show(row, best, bar, plan, args.out)
            recent = []
            since = time.time()
        if stopping or due:
            if plan.rank == 0:
                save_checkpoint(args.out, settings, data.digest, step, model, optimizer, best=best)
            saved = time.time()
        if stopping:
            break
    bar.close()
    if args.head == "knn" and plan.rank == 0:  # so that other arguments are refused here too
        save_checkpoint(args.out, settings, data.digest, step, model, optimizer, best=best)
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
        self.heat = map_layers(256 + 2, 21)
        self.delta = map_layers(256 + 2 + 21, 63)
        self.location = map_layers(256 + 2 + 21 + 63, 63)

    def forward(self, images):
        x = images
        for name, layer in self.backbone.named_children():
            if name not in ("avgpool", "fc"):
                x = layer(x)
        x = self.up(x)
        side = torch.linspace(-1, 1, x.shape[2], device=x.device, dtype=x.dtype)
        y_axis, x_axis = torch.meshgrid(side, side, indexing="ij")
        x = torch.cat([x, torch.stack([x_axis, y_axis]).expand(len(x), -1, -1, -1)], 1)
        heat = torch.sigmoid(make_maps(self.heat, x))
        delta = make_maps(self.delta, x, heat)
        location = make_maps(self.location, x, heat, delta)
        return heat, delta.unflatten(1, (21, 3)), location.unflatten(1, (21, 3))

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


def map_layers(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, 256, 3, 1, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(inplace=True),
        nn.Conv2d(256, outputs, 1))


def make_maps(layers, *inputs):
    """What the layers make of all inputs together, in float32: with the three digits of bf16,
    several cells of a heat-map would often share its maximum."""
    x = torch.cat([part.to(inputs[0].dtype) for part in inputs], 1)
    *hidden, last = layers
    for layer in hidden:
        x = layer(x)
    with torch.autocast(x.device.type, enabled=False):
        return last(x.float())


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
        with torch.autocast(images.device.type, enabled=False):  # bf16 has only three digits
            joints = self.linear(features).unflatten(1, (21, 5))
        side = images.shape[-1]
        return (side - 1) / 2 + joints[..., :2] * side / 2, joints[..., 2:]

    def read(self, outputs):
        return outputs


# knn uses only the backbone.
NETWORKS = {"detnet": DetNet, "linear": LinearNet, "knn": DetNet}


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


def heat_targets(uv, valid, cells):
    """uv (N, 21, 2) in input pixels, cells of 4 x 4 pixels -> Gaussians (N, 21, cells, cells) of
    deviation 1 and peak 1 in the joint's cell, cut to 7 x 7; 0 for joints that are invalid or whose
    window lies outside."""
    cell = torch.floor((uv + 0.5) / 4)
    place = torch.arange(cells, device=uv.device)

    def bell(middle):  # (N, 21) -> (N, 21, cells)
        distance = place - middle[..., None]
        return torch.exp(-distance.square() / 2) * (distance.abs() <= 3)

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
    """losses (N,) -> their mean over the samples that have wrist and bone; with_bone as in
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
    bone has no length."""
    length = bone_length(xyz)[..., None, None]
    return (xyz - xyz[..., :1, :]) / np.where(length > 0, length, 1)


# -------------------------------------------------------------------------- the method: training

def set_learning_rate(optimizer, step, steps):
    """A tenth of the peak from half of the steps on."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * (0.1 if step >= steps // 2 else 1)


def train_step(net, optimizer, batch, loss_of, plan):
    """One step of the optimiser on this rank's share of the batch, with loss_of one of LOSSES ->
    its loss, on the device."""
    with_bone = over_ranks(has_wrist_and_bone(batch["valid"]).sum().float()) / plan.ranks
    outputs = forward(net, batch["image"], plan.precision)
    loss = loss_of(outputs, batch, with_bone)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    average_statistics(net)
    return loss.detach()


def make_optimizer(model, lr, backbone_lr):
    """Adam on the heads and on the backbone, each with its own peak rate; a backbone whose rate is
    None is frozen."""
    model.backbone.requires_grad_(backbone_lr is not None)
    heads = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [dict(params=heads, peak=lr)]
    if backbone_lr is not None:
        groups.append(dict(params=list(model.backbone.parameters()), peak=backbone_lr))
    return torch.optim.Adam(groups, fused=True)


# --------------------------------------------------------------------------- the method: testing

@torch.no_grad()
def run_on_test_crops(function, shape, pictures, plan, name=""):
    """function: images (n, S, S, 3) -> (n, *shape). -> (N, *shape), that of all test crops; each
    rank does a share. With a name, a progress bar shows it."""
    count = len(pictures.samples)
    starts = range(plan.rank * plan.batch_size, count, plan.ranks * plan.batch_size)
    batches = []
    for start in starts:
        rows = range(start, min(start + plan.batch_size, count))
        batches.append([(None, row) for row in rows])
    found = torch.zeros(count, *shape, device=plan.device)
    loader = load_items(pictures, batches, plan.workers, collate)
    bar = progress(loader, unit="batch", total=len(batches), desc=name,
                   disable=not name or plan.rank != 0)
    for batch, start in zip(bar, starts):  # in this order the bar ends
        images = batch["image"].to(plan.device)
        found[start:start + len(images)] = function(images)
    return over_ranks(found)


def predict(model, pictures, plan, name=""):
    """-> uv (N, 21, 2) in input pixels, and pose (N, 21, 3) relative to the wrist in lengths of the
    bone 0-9, as the model reads them from what it makes of the pictures."""
    def read(images):
        uv, pose = model.read(forward(model, images, plan.precision))
        return torch.cat([uv, pose - pose[:, :1]], 2)

    model.eval()
    found = run_on_test_crops(read, (21, 5), pictures, plan, name).cpu().numpy()
    return found[..., :2], found[..., 2:]


def predict_by_neighbour(backbone, data, crops, plan):
    """What `predict` returns, for --head knn: each test picture gets the joints of the training
    picture whose features are the most similar, both seen in test crops."""
    def describe(images):
        return F.normalize(forward(backbone, images, plan.precision).float())

    def features(samples, name):
        pictures = Pictures(samples, crops)
        return run_on_test_crops(describe, (backbone.width,), pictures, plan, name)

    backbone.eval()
    keys = features(data.train, "training")
    queries = features(data.test, "test")
    # A part at a time: all similarities at once would need too much memory.
    found = [(part @ keys.T).argmax(1) for part in queries.split(256)]
    found = torch.cat(found).cpu().numpy()
    return crop_uv(data.train, crops)[found], scaled_pose(data.train.xyz)[found]


def validate(model, samples, crops, plan):
    """The error in mm by which the model is chosen: the mean over the samples that have wrist and
    bone. It is not the MPJPE of evaluate.py, which averages each joint over the samples first."""
    _, pose = predict(model, Pictures(samples, crops), plan)
    errors = sample_errors(pose, samples)
    return float(errors[has_wrist_and_bone(samples.valid)].mean())


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
    # For training only:
    rotation: float = 0.0  # degrees to either side
    colour: bool = False
    seed: int = 0


def make_crops(args):
    return Crops(args.root, args.input_size, args.border, args.rotation, not args.no_colour,
                 args.seed)


class Pictures:
    """Called with (epoch, row): that sample as training sees it in that epoch; with None as the
    epoch, its test crop: image uint8 (S, S, 3), uv (21, 2) in its pixels, pose (21, 3) relative
    to the wrist in lengths of the bone 0-9, both float32, and valid (21,)."""

    def __init__(self, samples, crops):
        self.samples = samples
        self.crops = crops

    def __call__(self, item):
        epoch, row = item
        sample = self.samples[row]
        crops = self.crops
        if epoch is None:
            view = test_view(sample, crops.side)
        else:
            rng = np.random.default_rng((crops.seed, epoch, row))
            view = sample_crop(sample, crops, rng)
        image, uv = view_sample(sample, row, view, crops)
        if epoch is not None and crops.colour:
            image = jitter(image, rng)
        # The pose turns with the picture, about the camera's axis.
        turn = np.eye(3)
        turn[:2, :2] = crop_matrix((0, 0), 1, 1, view.angle)[:, :2].T
        pose = scaled_pose(sample.xyz) @ turn
        return dict(image=image, uv=uv, pose=pose.astype(np.float32), valid=sample.valid)


def test_view(sample, side):
    """The view that shows a sample's test crop, `side` pixels wide."""
    return View(crop_matrix(sample.centre, float(sample.side), side))


def sample_crop(sample, crops, rng):
    """The test crop jittered and turned, for training: the centre by up to a tenth of its side per
    axis, the side by up to a tenth. -> View"""
    side = float(sample.side)
    angle = rng.uniform(-crops.rotation, crops.rotation)
    centre = sample.centre + rng.uniform(-0.1, 0.1, 2) * side
    side *= min(max(rng.normal(1, 0.1), 0.9), 1.1)
    return View(crop_matrix(centre, side, crops.side, angle), angle)


def crop_uv(samples, crops):
    """-> the joints (N, 21, 2) of the samples in their test crops, pixels of the network's
    input."""
    found = np.empty(samples.uv.shape)
    for row, sample in enumerate(samples):
        found[row] = move_points(test_view(sample, crops.side).matrix, sample.uv)
    return found


def view_sample(sample, row, view, crops):
    """-> the view of a sample's picture, RGB uint8 (S, S, 3), and its joints there (21, 2)."""
    image = picture_of(sample, row, crops.source)
    image, view, uv = shrink(image, view, sample.uv, crops.border)
    return apply_view(view, image, uv, crops.side, crops.border)


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


def picture_of(sample, row, source):
    """-> RGB uint8 (H, W, 3), flipped where the sample says so: all that comes after sees right
    hands. source: as in `Crops`; `row` is the sample's in an opened hands folder."""
    if isinstance(source, Hands):
        return read_crop(source, row)
    path = os.path.join(source, os.fsdecode(sample.path))
    image = read_picture(path)
    require(sample.width in (0, image.shape[1]),
            f"{path}: is {image.shape[1]} pixels wide, its labels are for {sample.width}")
    return cv2.flip(image, 1) if sample.flip else image


# ---------------------------------------------------------------------------------- files: a run

def make_plan(args, pictures=0):
    """Join the other ranks -> Plan for a training on this many pictures."""
    rank, ranks, device = start_ranks(args.device)
    require(args.batch_size % ranks == 0, f"--batch-size must be a multiple of {ranks} ranks")
    steps_per_epoch = 0
    if args.head != "knn" and not args.predict:
        steps_per_epoch = pictures // args.batch_size
        require(steps_per_epoch, f"{args.root}: {pictures} training pictures, fewer than "
                f"--batch-size {args.batch_size}")
        require(args.batch_size > ranks or args.input_size > 32, "--batch-size: BatchNorm needs "
                "two pictures or more on each rank at this --input-size")
    precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    return Plan(rank, ranks, device, precision, args.workers, args.batch_size,
                steps_per_epoch=steps_per_epoch, steps=args.epochs * steps_per_epoch)


def start_run(settings, data, step, model, plan, args):
    """Start the log and print the settings -> the log's rows so far."""
    rows = start_log(args.out, settings, step)
    if not rows:
        write_log(args.out, {"notes": data.notes})
        if Path(args.weights).is_file():
            note_pretraining(args.out, Path(args.weights))
    parameters = sum(p.numel() for p in model.parameters())
    print_settings(args, make_parser(), train=len(data.train), validation=len(data.validation),
                   test=len(data.test), ranks=plan.ranks, device=plan.device,
                   precision=plan.precision, steps=plan.steps, start=step,
                   parameters=f"{parameters / 1e6:.1f}M")
    for note in data.notes:
        print(note)
    return rows


def note_pretraining(out, weights):
    """From the log beside the weights, if it is pretrain.py's, for the plots of evaluate.py: how
    they were pre-trained, and on how many hands."""
    with contextlib.suppress(ValueError, OSError):
        rows = read_log(weights.with_name("log.jsonl"))
        hands = next((row["hands"] for row in rows if "hands" in row), None)
        settings = logged_settings(weights.parent)
        write_log(out, {"pretraining": {"args": settings, "hands": hands}})


def show(row, best, bar, plan, out):
    """Write a row into the log and beside the progress bar, on the rank that writes."""
    if plan.rank == 0:
        write_log(out, row)
    bar.set_postfix_str(f"loss {row['loss']:.3f}, validation {best['error']:.1f} mm, "
                        f"{row['pictures_per_s']:.0f} pictures/s", refresh=False)


def finish(rows, best, model, data, crops, plan, args):
    """Predict the test split by the chosen model, and write the files of the run."""
    if args.head == "knn":
        uv, pose = predict_by_neighbour(model.backbone, data, crops, plan)
    else:
        require(best["weights"],
                f"{args.out}: no epoch had a finite validation error to choose a model by; {KEPT}")
        model.load_state_dict(best["weights"])
        if plan.rank == 0:
            save_model(model, data.train, args)
            curves = Path(args.out) / "curves.png"
            plot_curves(curves, rows, [["loss"], ["lr"], ["validation_error"]])
            print(f"chosen at a validation error of {best['error']:.2f} mm, see {curves}")
        uv, pose = predict(model, Pictures(data.test, crops), plan, "test")
    if plan.rank == 0:
        write_truth(data.test, crops, args)
        write_predictions(data.test, uv, pose, bone_lengths(data.test), crops, args.root, args.out)
        print(f"pred_xyz.npy holds the true wrist and the true length of the bone 0-9: to compare "
              f"offline, not for a leaderboard\nnext: python evaluate.py {args.out}")


def save_model(model, train, args):
    """model.pt: the weights, and what --predict needs beside them."""
    bones = bone_length(train.xyz[has_wrist_and_bone(train.valid)])
    crop = args.crop or float(np.median(train.side / np.ptp(train.uv, axis=1).max(1)))
    content = dict(head=args.head,
                   backbone=args.backbone,
                   input_size=args.input_size,
                   border=args.border,
                   crop=crop,
                   bone=float(np.median(bones)),
                   model=model.state_dict())
    with atomic(Path(args.out) / "model.pt") as file:
        torch.save(content, file)


def bone_lengths(samples):
    """(N,) mm, the true bone 0-9; where one of its ends has no place, the median of the others."""
    whole = has_wrist_and_bone(samples.valid | has_place(samples.xyz))
    return np.where(whole, bone_length(samples.xyz), np.median(bone_length(samples.xyz[whole])))


def has_place(xyz):
    """(..., 21, 3) -> (..., 21): joints without a place lie at 0."""
    return xyz.any(-1)


def write_truth(samples, crops, args):
    """What evaluate.py compares with."""
    out = Path(args.out)
    save_array(out / "valid.npy", samples.valid)
    if args.dataset == "assemblyhands":  # its toolkit aligns by every wrist that has a place
        save_array(out / "wrist.npy", has_place(samples.xyz)[:, 0])
    save_array(out / "gt_uv.npy", crop_uv(samples, crops).astype(np.float32))
    save_array(out / "gt_xyz.npy", samples.xyz.astype(np.float32))


def write_predictions(samples, uv, pose, bones, crops, root, out):
    """Predictions, names.txt and overlay.jpg. bones (N,) mm scales the poses; names start with
    root."""
    out = Path(out)
    xyz = pose * bones[:, None, None] + samples.xyz[:, :1]
    save_array(out / "pred_uv.npy", uv.astype(np.float32))
    names = []
    for sample in samples:
        path = os.path.join(root, os.fsdecode(sample.path))
        names.append(f"{sample.index}\t{path}\t{'left' if sample.left else 'right'}")
    save_lines(out / "names.txt", names)
    draw_overlay(out / "overlay.jpg", samples, uv, sample_errors(pose, samples), crops)
    save_array(out / "pred_xyz.npy", xyz.astype(np.float32))  # last: where it is, all is
    print(f"{len(samples)} pictures; wrote {out}/pred_xyz.npy, see overlay.jpg beside it")


def draw_overlay(path, samples, uv, errors, crops, columns=8):
    """The predicted skeleton in colours, the true one in white: a row each of the best, the median
    and the worst; where no sample is labelled, of the first, middle and last."""
    scored = np.isfinite(errors)
    order = np.argsort(errors, kind="stable")[:scored.sum() or None]  # NaN comes last
    columns = max(1, min(columns, len(order) // 3))
    middle = (len(order) - columns) // 2
    large = dataclasses.replace(crops, side=256)
    tiles = []
    for i in [*order[:columns], *order[middle:middle + columns], *order[-columns:]]:
        view = test_view(samples[i], large.side)
        image, truth = view_sample(samples[i], i, view, large)
        words = ""
        if scored[i]:
            words = f"{errors[i]:.1f} mm off, truth white"
            image = draw_hand(image, truth, (255, 255, 255))
        predicted = rescale_points(uv[i], large.side / crops.side)
        tiles.append(draw_hand(image, predicted, None, words))
    save_image(path, sheet(tiles, columns))


# ----------------------------------------------------------------------- files: your own pictures

def predict_folder(args):
    """--predict: a trained model on a folder of pictures, or on a hands folder."""
    plan = make_plan(args)
    content, model = load_model(args.weights, plan.device)
    samples, source = samples_of_folder(Path(args.predict), content["crop"])
    crops = Crops(source, content["input_size"], content["border"])
    settings = plain(args, backbone=content["backbone"], head=content["head"],
                     input_size=crops.side, border=crops.border, precision=plan.precision)
    open_run(args.out, settings, None, MAY_CHANGE_ON_RESUME, plan.rank)
    if plan.rank == 0:
        start_log(args.out, settings)
        print_settings(argparse.Namespace(**settings), make_parser(), pictures=len(samples),
                       device=plan.device)
    uv, pose = predict(model, Pictures(samples, crops), plan, "pictures")
    if plan.rank == 0:
        bones = np.full(len(samples), content["bone"])
        write_predictions(samples, uv, pose, bones, crops, args.predict, args.out)
    end_ranks()


def load_model(path, device):
    """model.pt -> its content, and the network."""
    content = load_checkpoint(path)
    keys = {"model", "backbone", "head", "input_size", "border", "crop", "bone"}
    require(isinstance(content, dict) and keys <= content.keys(),
            f"{path}: not the model.pt of a fine-tuning run")
    model = NETWORKS[content["head"]](content["backbone"], "none")
    model.load_state_dict(content["model"])
    return content, model.to(device, memory_format=torch.channels_last)


def samples_of_folder(folder, crop):
    """A folder of pictures, or a hands folder -> samples without labels, and the source that
    `Crops` wants. crop: the crop's side over a hand's longer extent."""
    if (folder / "keypoints.npy").exists():
        hands = load_hands(folder)
        # Nothing to flip: a hands folder's crops show right hands already.
        samples = make_samples(crop, path=["crops.npy"] * len(hands.rows), uv=hands.keypoints,
                               left=hands.rows["left"])
        return samples, hands
    names = sorted(name for name in os.listdir(folder) if is_a(PICTURES, name))
    require(names, f"{folder}: holds neither keypoints.npy nor a picture ({', '.join(PICTURES)})")
    samples = make_samples(1, path=names)
    for row, sample in enumerate(samples):
        height, width = picture_of(sample, row, str(folder)).shape[:2]
        samples.centre[row] = (width - 1) / 2, (height - 1) / 2
        samples.side[row] = max(height, width)
    return samples, str(folder)


# ---------------------------------------------------------- labels: which train, choose and test

# A labelled hand in a picture. --labels keeps arrays of these, and an own data set is made of
# them. Hands are as the picture shows them: left ones are flipped after they were read.
SAMPLE = np.dtype([
    ("path", "S255"),  # of the picture, below --root
    ("left", "?"),  # the hand is a left one
    ("flip", "?"),  # the picture is to be flipped when it is read; the script sets it
    ("index", "<i8"),  # the sample's official number, -1 where it cannot be known; in names.txt
    ("group", "<i8"),  # samples of one group are drawn together by --label-fraction
    ("scene", "<i8"),  # samples of one scene are never on both sides of train and validation
    ("width", "<i8"),  # of the picture, pixels; may be 0 for right hands
    ("uv", "<f8", (21, 2)),  # joints, pixels of the picture
    ("xyz", "<f8", (21, 3)),  # joints, mm in the camera's frame; 0 where a joint has no place
    ("valid", "?", 21),  # joints that count
    ("centre", "<f8", 2),  # of the square test crop, pixels
    ("side", "<f8")])  # of the same


@dataclasses.dataclass
class Labels:
    """Arrays of SAMPLE, and sentences for the user."""
    train: np.recarray
    validation: np.recarray  # None: a tenth of train is to be held out
    test: np.recarray
    notes: list
    digest: int = 0  # of all three arrays, as a run uses them


def load_data(args):
    """Read the labels, make right hands of left ones, and choose which samples train -> Labels."""
    labels = kept_labels(args) if args.labels else READERS[args.dataset](args)
    for samples in (labels.train, labels.validation, labels.test):
        if samples is not None:
            check_bones(samples, labels.notes, args.root)
            # Here, not in the readers: --labels keeps the data set's own crops.
            samples.side *= args.crop / CROP[args.dataset] if args.crop else 1
            flip_left_hands(samples)
    used, note = draw_labels(labels.train, args.label_fraction, args.seed)
    if args.head == "knn":  # no model to choose; only a whole pose can be aligned and scaled
        train = labels.train[used & has_wrist_and_bone(labels.train.valid)]
        validation = train[:0]
        require(len(train), f"{args.root}: no label that is used has wrist and joint 9")
        more = f"; compared with the {len(train)} of {used.sum()} that have wrist and joint 9"
    else:
        train, validation, more = hold_out(labels, used, args.seed)
        require(has_wrist_and_bone(validation.valid).any(), f"{args.root}: no label that is for "
                "validation has wrist and joint 9; another --seed chooses others")
    digest = zlib.crc32(np.concatenate([train, validation, labels.test]))
    return Labels(train, validation, labels.test, [*labels.notes, note + more], digest)


def check_bones(samples, notes, root):
    """An InputError where these cannot be hands in mm."""
    whole = has_wrist_and_bone(samples.valid)
    require(whole.any(), f"{root}: a split without a labelled wrist and joint 9: "
            f"{'; '.join(notes)}")
    middle = np.median(bone_length(samples.xyz[whole]))
    require(40 < middle < 140, f"{root}: the median bone 0-9 is {middle:.3g} mm long, expected "
            "hands (FreiHAND's and DexYCB's labels are in metres)")


def flip_left_hands(samples):
    """Make right hands of left ones, u' = width - 1 - u and x' = -x, and mark their pictures to be
    flipped as well."""
    left = samples.left
    last_column = samples.width[left] - 1
    samples.flip = left
    samples.xyz[left, :, 0] *= -1
    samples.uv[left, :, 0] = last_column[:, None] - samples.uv[left, :, 0]
    samples.centre[left, 0] = last_column - samples.centre[left, 0]


def draw_labels(train, fraction, seed):
    """-> (N,) bool, a random share of the groups, which lies within each larger share; a note."""
    groups = np.unique(train.group)
    share = max(round(fraction * len(groups)), 1)
    chosen = np.random.default_rng(seed).permutation(groups)[:share]
    note = f"labels: {len(chosen)} of {len(groups)} unique training samples"
    return np.isin(train.group, chosen), note


def hold_out(labels, used, seed):
    """-> training and validation samples, and a note. Where the data set has no validation split,
    every tenth scene of the labels used is held out, so that no pose is on both sides."""
    train = labels.train
    if labels.validation is not None:
        return train[used], labels.validation, ""
    scenes = np.random.default_rng(seed).permutation(np.unique(train.scene))
    scenes = scenes[np.isin(scenes, train.scene[used])]
    require(len(scenes) > 1, f"labels of {len(scenes)} training scenes, expected at least 2: one "
            "is for validation")
    tenth = scenes[::10]
    held_out = np.isin(train.scene, tenth)
    note = f"; every tenth of their scenes, {len(tenth)} of {len(scenes)}, is for validation"
    return train[used & ~held_out], train[used & held_out], note


def make_samples(crop=None, **fields):
    """Columns of SAMPLE -> array of SAMPLE. The index counts unless it is given. With `crop`, the
    test crop is a square that many times as long as the joints."""
    paths = [os.fsencode(path) for path in fields.pop("path")]
    samples = np.zeros(len(paths), SAMPLE).view(np.recarray)
    samples["path"] = paths
    samples["index"] = np.arange(len(paths))
    for name, column in fields.items():
        samples[name] = column
    if crop:
        low = samples.uv.min(1)
        high = samples.uv.max(1)
        samples.centre = (low + high) / 2
        samples.side = crop * (high - low).max(1)
    return samples


# ------------------------------------------------------------------- labels: kept with --labels

def kept_labels(args):
    """The labels of the folder --labels, which is filled where it is empty -> Labels. Its
    labels.txt says in one line what it holds."""
    folder = Path(args.labels)
    if args.dataset == "own":
        return load_labels(folder)
    division = args.setup or args.modality or ""
    filtered = " --paper-filter" if args.paper_filter else ""
    wanted = f"{args.dataset} {division}{filtered} of {os.path.realpath(args.root)}"
    origin = folder / "labels.txt"
    found = origin.read_text(errors="replace").strip() if origin.exists() else "labels of your own"
    require(found == wanted or not list(folder.glob("*.npy")),
            f"{folder}: holds {found}, not {wanted}; delete it, or choose another --labels")
    if (folder / "test.npy").exists():
        return load_labels(folder)
    labels = READERS[args.dataset](args)
    folder.mkdir(parents=True, exist_ok=True)
    origin.write_text(f"{wanted}\n")  # first: it says that the arrays are not the user's
    arrays = {"train": labels.train, "val": labels.validation, "test": labels.test}
    for name, samples in arrays.items():  # test.npy last: where it is, all is
        if samples is not None:
            save_array(folder / f"{name}.npy", samples.view(SAMPLE))
    return labels


def load_labels(folder):
    """train.npy, val.npy where it is there, and test.npy -> Labels."""
    arrays = []
    for name in ("train", "val", "test"):
        path = folder / f"{name}.npy"
        if name == "val" and not path.exists():
            arrays.append(None)
            continue
        samples = load_array(path, SAMPLE, (None,), hint="see SAMPLE in finetune.py")
        samples = samples.view(np.recarray)
        require((samples.side > 0).all(), f"{path}: a test crop's side must be above 0")
        require((samples.width > 0)[samples.left].all(),
                f"{path}: a left hand's width must be the picture's, since it is flipped")
        arrays.append(samples)
    return Labels(*arrays, [f"labels: those of {folder}"])


# --------------------------------------------- readers: what the labels of three data sets mean
#
# read_freihand, read_dexycb and read_assemblyhands turn a data set in its own layout into Labels:
# hands as the pictures show them, FreiHAND's order of joints, and only samples that have a label.
# Nothing after this line belongs to the method.

def read_json(file):
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file}: truncated or not json ({error})")


# --------------------------------------------------------------------------------------- FreiHAND

def read_freihand(args):
    """FreiHAND v2, whose evaluation lists lie in the root or in the folder ROOT_eval -> Labels."""
    root = Path(args.root).absolute()
    train = read_freihand_split(root, "training", 4)
    test = read_freihand_split(root, "evaluation", 1)
    note = (f"FreiHAND: {len(train)} training pictures of {len(train) // 4} samples, tested on the "
            f"{len(test)} evaluation pictures")
    return Labels(train, None, test, [note])


def read_freihand_split(root, split, versions):
    """The lists of camera matrices and of joints in metres -> array of SAMPLE."""
    matrix = read_array(root, f"{split}_K.json", 3)
    xyz = read_array(root, f"{split}_xyz.json", 21)
    require(len(matrix) == len(xyz), f"{root / split}_K.json: has {len(matrix)} entries, "
            f"{split}_xyz.json has {len(xyz)}")
    pictures = [f"{split}/rgb/{i:08d}.jpg" for i in range(versions * len(xyz))]
    there = len(list((root / split / "rgb").glob("*.jpg")))
    require(there >= len(pictures), f"{root / split}/rgb: holds {there} pictures, expected "
            f"{versions} x {len(xyz)}")
    uvw = xyz @ matrix.transpose(0, 2, 1)
    behind = (uvw[..., 2] <= 0).any(1)
    require(not behind.any(), f"{root / split}_xyz.json: entry {behind.argmax()}, counted from 0, "
            "has joints that are not before the camera")
    uv = uvw[..., :2] / uvw[..., 2:]
    sample = np.tile(np.arange(len(xyz)), versions)  # picture i shows sample i % their number
    return make_samples(CROP["freihand"], path=pictures, group=sample, scene=sample,
                        uv=uv[sample], xyz=xyz[sample] * 1000, valid=True)


def read_array(root, name, rows):
    """A list of FreiHAND's, as json -> float64 (N, rows, 3)."""
    places = (root.with_name(f"{root.name}_eval") / name, root / name)
    file = next((place for place in places if place.exists()), None)
    require(file, f"{root}: expected {name} there or in {places[0].parent}")
    content = read_json(file)
    try:
        array = np.array(content, np.float64)
    except (TypeError, ValueError):  # entries of several lengths, or not of numbers
        array = np.zeros(0)
    require(array.shape[1:] == (rows, 3) and np.isfinite(array).all(),
            f"{file}: has shape {array.shape}, expected (N, {rows}, 3), finite")
    return array


# ----------------------------------------------------------------------------------------- DexYCB

SERIALS = ("836212060125", "839512060362", "840412060917", "841412060263", "932122060857",
           "932122060861", "932122061900", "932122062010")
WIDTH, HEIGHT = 640, 480


@dataclasses.dataclass
class Camera:
    """A folder of frames that one camera saw of one sequence. All counts start at 0."""
    folder: Path
    frames: int
    left: bool  # the sequence shows a left hand
    sequence: int  # of all 1000
    part: str  # of the data set: "train", "val" or "test"


def dexycb_part(setup, subject, sequence, camera):
    """"train", "val" or "test", as dex-ycb-toolkit divides; all counts start at 0."""
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


def read_dexycb(args):
    """DexYCB -> Labels. valid: visible as SiMHand's reader defines it; xyz keeps all 21 joints."""
    cameras = find_cameras(args.root, args.setup)
    notes = [f"DexYCB {args.setup}: {len(cameras)} of 8000 cameras are there"]
    complete = len(cameras) == 8000  # what is missing would shift the official indices
    if not complete:
        notes.append("names.txt has no official indices but -1")
    splits = []
    for name in ("train", "val", "test"):
        part = [camera for camera in cameras if camera.part == name]
        frames = read_frames(part, args.root, args.workers)
        if not complete:
            frames.index = -1
        samples, note = keep_labelled(frames, args.paper_filter)
        splits.append(samples)
        notes.append(f"{name}: {note}")
    return Labels(*splits, notes)


def find_cameras(root, setup):
    """-> a Camera for each folder of frames, in the official order."""
    cameras = []
    for subject in range(10):
        pattern = f"*-subject-{subject + 1:02d}"
        found = sorted(Path(root).glob(f"{pattern}/*/meta.yml"))
        require(len(found) == 100 or found and setup in ("s1", "s2"),
                f"{root}/{pattern}: holds {len(found)} sequences with a meta.yml, expected 100 (or "
                "some for s1 and s2, whatever their order)")
        for sequence, file in enumerate(found):
            serials, frames, side = read_meta(file)
            for position, serial in enumerate(SERIALS):
                if serial in serials:
                    part = dexycb_part(setup, subject, sequence, position)
                    cameras.append(Camera(file.parent / serial, frames, side == "left",
                                          100 * subject + sequence, part))
    return cameras


def read_meta(file):
    """meta.yml -> serial numbers of the cameras, number of frames, side of the hand."""
    import yaml  # here: the other data sets do without it

    try:
        # This loader makes strings and lists of all, Python's tuples too, and runs no code.
        meta = yaml.load(file.read_bytes(), yaml.BaseLoader)
        return meta["serials"], int(meta["num_frames"]), meta["mano_sides"][0]
    except (yaml.YAMLError, LookupError, TypeError, ValueError):
        raise InputError(f"{file}: expected DexYCB's serials, num_frames and mano_sides")


def read_frames(cameras, root, workers):
    """-> array of SAMPLE of all frames, those without a label too: they count in the index."""
    batches = [[camera] for camera in cameras]
    loader = load_items(lambda camera: read_camera(camera, root), batches, workers, np.concatenate)
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
    return make_samples(CROP["dexycb"], path=paths, left=camera.left, scene=camera.sequence,
                        width=WIDTH, uv=uv, xyz=xyz * 1000.0, valid=valid)


def read_label(file):
    """A frame's labels -> joint_3d (21, 3) in metres, joint_2d (21, 2) in pixels."""
    try:
        # Opened here: np.load leaves a damaged file open.
        with open(file, "rb") as content, np.load(content, allow_pickle=False) as labels:
            xyz = labels["joint_3d"].reshape(21, 3)
            uv = labels["joint_2d"].reshape(21, 2)
        require(np.isfinite(xyz).all() and np.isfinite(uv).all(), "not finite")
        return xyz, uv
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise InputError(f"{file}: missing, truncated, or without joint_3d (1, 21, 3) and "
                         f"joint_2d (1, 21, 2): {error}")


def keep_labelled(frames, paper_filter):
    """-> the frames that have a label (and that --paper-filter keeps), and a note that counts."""
    labelled = has_place(frames.xyz).any(1)
    kept = labelled
    if paper_filter:
        kept = labelled & (frames.valid.sum(1) >= 10) & has_wrist_and_bone(frames.valid)
    note = f"{kept.sum()} of {len(frames)} frames kept; dropped {(~labelled).sum()} without a label"
    if paper_filter:
        note += f" and {(labelled & ~kept).sum()} by --paper-filter"
    return frames[kept], note


# ---------------------------------------------------------------------------------- AssemblyHands

# The places of FreiHAND's joints in its lists: each finger from its tip on, the wrist last.
TIPS_FIRST = np.array([20, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16])


def read_assemblyhands(args):
    """AssemblyHands v1-1 -> Labels."""
    train, train_note = read_assemblyhands_split(args.root, "train", args.modality)
    test, test_note = read_assemblyhands_split(args.root, "val", args.modality)
    notes = [f"AssemblyHands {args.modality}, tested on val", train_note, test_note]
    return Labels(train, None, test, notes)


def read_assemblyhands_split(root, split, modality):
    """-> array of SAMPLE, and a note that counts what was dropped."""
    start = f"{root}/annotations/{split}/assemblyhands_{split}"
    data_file = Path(f"{start}_{modality}_data_v1-1.json")
    calib_file = Path(f"{start}_{modality}_calib_v1-1.json")
    pose_file = Path(f"{start}_joint_3d_v1-1.json")
    data = read_json(data_file)
    calibration = read_json(calib_file)
    poses = read_json(pose_file)
    columns = collections.defaultdict(list)
    dropped = collections.Counter()
    scenes = {}  # sequence -> its place among them
    try:
        images = {image["id"]: image for image in data["images"]}
        for annotation in progress(data["annotations"], desc=data_file.stem, unit="picture"):
            image = images[annotation["image_id"]]
            for side in ("right", "left"):
                fields, reason = read_assemblyhands_hand(annotation, image, side, calibration,
                                                         poses)
                if reason:
                    dropped[reason] += 1
                    continue
                fields["scene"] = scenes.setdefault(image["seq_name"], len(scenes))
                for name, value in fields.items():
                    columns[name].append(value)
        count = len(columns["path"])
        samples = make_samples(group=np.arange(count), **columns)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{data_file}: not in AssemblyHands' layout, or missing in "
                         f"{calib_file.name} or {pose_file.name}: {error!r}")
    reasons = [f"{times} {reason}" for reason, times in sorted(dropped.items())]
    return samples, (f"{split}: {count} hands of {len(scenes)} sequences kept; dropped "
                     f"{', '.join(reasons) or 'none'}")


def read_assemblyhands_hand(annotation, image, side, calibration, poses):
    """One hand of a picture -> its fields of SAMPLE, and why it is dropped: one is None."""
    sequence = image["seq_name"]
    frame = f"{image['frame_idx']:06d}"
    pose = (poses["annotations"].get(sequence, {}).get(frame) or {}).get("world_coord")
    box = (annotation["bbox"] or {}).get(side) or [0, 0, 0, 0]
    if annotation["joint_valid"] is None or pose is None:
        return None, "without labels"
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


READERS = {"freihand": read_freihand, "dexycb": read_dexycb, "assemblyhands": read_assemblyhands}


if __name__ == "__main__":
    run_script(main, "; lower --batch-size")
