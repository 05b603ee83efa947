"""Fine-tune a (pre-trained) ResNet for 3D hand pose: DetNet of minimal-hand on labelled pictures, then test.

Reads a data set in its own layout and writes into --out: model.pt, checkpoint.pt, log.jsonl, curves.png, and for the
test split pred_xyz.npy, gt_xyz.npy (mm), valid.npy, pred_uv.npy, gt_uv.npy (network-input pixels), names.txt and
overlay.jpg. The model is chosen on a validation split, never on the test split. As in the paper, test pictures are
cropped by their true joints, and the wrist's place and the length of the bone 0-9, which one picture cannot tell, are
taken from the ground truth. Stop it at any moment and run the same command again: it goes on.

    python finetune.py --dataset freihand --root FreiHAND_pub_v2 --weights runs/simhand/backbone.pt --out runs/freihand
    python finetune.py --dataset freihand --root demo/freihand --weights none --backbone resnet18 --input-size 64 \
        --batch-size 16 --epochs 2 --out runs/tiny
"""

import argparse
import json
import math
import os
import signal
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import (BACKBONES, PARENTS, InputError, apply_view, atomic, catch_sigterm, check_flags, draw_hand,
                    load_backbone, load_checkpoint, normalise, open_folder, plain, plot_curves, print_settings, require,
                    resume, run_script, save_array, save_checkpoint, save_image, sheet, start_log, write_log)

FREE = ("out", "device", "workers", "save_minutes")  # cannot change the result
CROP = {"freihand": 2.0}  # side of the square around the joints, over their longer extent (DetNet's values)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=sorted(READERS), required=True)
    parser.add_argument("--root", required=True, help="the data set's folder, in its own layout")
    parser.add_argument("--out", required=True, help="folder of this run")
    # network
    parser.add_argument("--weights", default="imagenet", help="start from a file (backbone.pt), imagenet, or none")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--freeze", action="store_true", help="keep the backbone as it is, train the heads alone")
    parser.add_argument("--input-size", type=int, default=128,
                        help="side of the network's input in pixels, a multiple of 32; heat-maps have a quarter (128)")
    # labels
    parser.add_argument("--label-fraction", type=float, default=1.0, help="share of the unique training samples to "
                        "use, with all their versions; a smaller share lies within a larger one of the same seed")
    # optimisation
    parser.add_argument("--epochs", type=int, default=120, help="(paper: 120)")
    parser.add_argument("--batch-size", type=int, default=128, help="pictures a step (paper: 128)")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate, a tenth of it from half of the "
                        "epochs on (DetNet's)")
    parser.add_argument("--rotation", type=float, default=90.0, help="degrees to either side (DetNet: 90)")
    parser.add_argument("--no-colour", action="store_true", help="no colour jitter and blur")
    parser.add_argument("--seed", type=int, default=0)
    # machine
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU when there is one)")
    parser.add_argument("--workers", type=int, default=min(8, len(os.sched_getaffinity(0))),
                        help="loader processes, 0: none (default: one a core, 8 at most)")
    parser.add_argument("--save-minutes", type=float, default=10, help="checkpoint this often, and after every epoch")
    args = parser.parse_args()
    check_flags(args)
    args.root = os.path.normpath(args.root)
    require(0 < args.label_fraction <= 1 and min(args.epochs, args.batch_size, args.lr) > 0,
            "--label-fraction must lie in 0..1, --epochs, --batch-size and --lr above 0")
    require(args.input_size >= 32 and args.input_size % 32 == 0,
            f"--input-size must be a multiple of 32, not {args.input_size}")
    return args


def main():
    args = parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    train, validation, test, notes = split(args)
    steps_per_epoch = len(train.uv) // args.batch_size
    require(steps_per_epoch,
            f"{args.root}: {len(train.uv)} training pictures, fewer than --batch-size {args.batch_size}")
    out, total = Path(args.out), args.epochs * steps_per_epoch

    torch.manual_seed(args.seed)
    net = DetNet(args.backbone, args.weights).to(device, memory_format=torch.channels_last)
    net.backbone.requires_grad_(not args.freeze)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], args.lr, fused=device.type == "cuda")
    lock = open_folder(out)  # held until the process ends
    step, best = 0, math.inf
    kept, digest = resume(out, args, FREE), zlib.crc32(np.concatenate([train.uv, train.xyz], 2))
    if kept:
        require(kept["data"] == digest, f"{args.root}: other labels than {out} was trained on; choose another --out")
        net.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        step, best = kept["step"], kept["best"]
    rows = start_log(out, args, step)
    print_settings(args, train=len(train.uv), validation=len(validation.uv), test=len(test.uv), steps=total, start=step,
                   device=device, parameters=f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}M")
    for note in notes:
        print(note)

    loader = iter(torch.utils.data.DataLoader(Pictures(train, args, augment=True), batch_size=None,
                                              sampler=range(step, total), num_workers=args.workers,
                                              pin_memory=device.type == "cuda", worker_init_fn=start_worker,
                                              generator=torch.Generator()))
    stop, saved, recent, since = catch_sigterm(), time.time(), [], time.time()
    bar = tqdm(total=total, initial=step, unit="step")
    while step < total:
        net.train()
        if args.freeze:
            net.backbone.eval()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (0.1 if step >= total // 2 else 1)
        batch = {key: value.to(device, non_blocking=True) for key, value in next(loader).items()}
        loss = detnet_loss(forward(net, batch["image"], args), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        recent.append(loss.detach())
        bar.update()

        end_of_epoch = step % steps_per_epoch == 0
        if end_of_epoch or stop or time.time() - saved > 60 * args.save_minutes:
            mean = torch.stack(recent).mean().item()
            require(math.isfinite(mean), f"{out}: the loss is not finite at step {step}; checkpoint.pt holds the last "
                    "good state; try a smaller --lr or --precision fp32")
            row = dict(step=step, epoch=round(step / steps_per_epoch, 3), lr=optimizer.param_groups[0]["lr"], loss=mean,
                       pictures_per_s=args.batch_size * len(recent) / (time.time() - since))
            if end_of_epoch:
                row["validation_mpjpe"] = validate(net, validation, args, device)
                if row["validation_mpjpe"] < best:
                    best = row["validation_mpjpe"]
                    with atomic(out / "model.pt") as file:
                        torch.save(dict(backbone=args.backbone, model=net.state_dict()), file)
            rows.append(row)
            write_log(out, row)
            save_checkpoint(out, dict(args=plain(args), data=digest, step=step, best=best,
                                      model=net.state_dict(), optimizer=optimizer.state_dict()))
            bar.set_postfix_str(f"loss {mean:.3f}, validation {best:.1f} mm, {row['pictures_per_s']:.0f} pictures/s")
            saved, recent, since = time.time(), [], time.time()
            if stop and step < total:
                bar.close()
                print(f"stopped by SIGTERM after step {step} of {total}; the same command goes on")
                return
    bar.close()
    plot_curves(out / "curves.png", rows, [["loss"], ["lr"], ["validation_mpjpe"]])

    net.load_state_dict(load_checkpoint(out / "model.pt")["model"])
    pred_uv, pred = predict(net, test, args, device, progress=True)
    scale = bone(test.xyz)[:, None, None]
    pred_xyz = (pred * scale + test.xyz[:, :1]).astype(np.float32)
    matrix = np.stack([crop_view(test, i, args, args.input_size)["matrix"] for i in range(len(test.uv))])
    gt_uv = test.uv @ matrix[:, :, :2].transpose(0, 2, 1) + matrix[:, None, :, 2]
    save_array(out / "gt_xyz.npy", test.xyz.astype(np.float32))
    save_array(out / "valid.npy", test.valid)
    save_array(out / "gt_uv.npy", gt_uv.astype(np.float32))
    save_array(out / "pred_uv.npy", pred_uv.astype(np.float32))
    with atomic(out / "names.txt") as file:
        file.writelines(f"{i}\t{path}\t{'left' if left else 'right'}\n".encode()
                        for i, path, left in zip(test.index, test.paths, test.left))
    error = masked_error(pred * scale, test.xyz - test.xyz[:, :1], test.valid)
    draw_overlay(out / "overlay.jpg", test, pred_uv, gt_uv, error, args)
    save_array(out / "pred_xyz.npy", pred_xyz)  # last: where it is, the run is complete
    print(f"chosen at a validation MPJPE of {best:.2f} mm; test pictures {len(test.uv)}; wrote {out}/pred_xyz.npy, see "
          f"overlay.jpg and curves.png beside it; next: python evaluate.py {out}")


# ---------------------------------------------------------------------------------------------- readers

def split(args):
    """-> train, validation, test samples, and notes on what was used; see `read_freihand` for the fields."""
    train, test, notes = READERS[args.dataset](Path(args.root))
    groups = np.unique(train.group)
    chosen = np.random.default_rng(args.seed).permutation(groups)[:max(round(args.label_fraction * len(groups)), 1)]
    require(len(chosen) > 1, f"{args.root}: {len(chosen)} training samples, expected at least 2: one is for validation")
    held_out = np.isin(train.group, chosen[::10])  # by unique sample, so that no pose is on both sides
    used = np.isin(train.group, chosen) & ~held_out
    notes = notes + [f"labels: {len(chosen)} of {len(groups)} unique training samples, "
                     f"of which every tenth, {len(chosen[::10])}, is for validation"]
    return take(train, used), take(train, held_out), test, notes


def take(samples, mask):
    return SimpleNamespace(**{key: value[mask] for key, value in vars(samples).items()})


def read_freihand(root):
    """FreiHAND v2 -> training and evaluation samples and notes. Each set is a namespace of N-long arrays:

    paths str, left bool (mirror the picture), index int (official), group int (unique sample: its versions share it),
    uv (N, 21, 2) pixels, xyz (N, 21, 3) mm in the camera's frame, valid bool (N, 21).
    """
    sets = []
    for name, places in (("training", [root]), ("evaluation", [root, root.with_name(root.name + "_eval")])):
        loaded = {}
        for key in ("K", "xyz"):
            file = next((p / f"{name}_{key}.json" for p in places if (p / f"{name}_{key}.json").is_file()), None)
            require(file, f"{places[-1] / f'{name}_{key}.json'}: missing, expected FreiHAND's list"
                    + (f", there or in {root}" if len(places) > 1 else ""))
            try:
                loaded[key] = np.array(json.loads(file.read_text()), np.float64)
            except (TypeError, ValueError):
                raise InputError(f"{file}: truncated or not a list of arrays of one shape, expected FreiHAND's json")
            shape = (3, 3) if key == "K" else (21, 3)
            require(loaded[key].shape[1:] == shape and np.isfinite(loaded[key]).all(),
                    f"{file}: has shape {loaded[key].shape}, expected (N, {shape[0]}, {shape[1]}), finite")
            loaded[key + "_file"] = file
        matrix, xyz = loaded["K"], loaded["xyz"]
        require(len(matrix) == len(xyz), f"{loaded['K_file']}: has {len(matrix)} entries, {loaded['xyz_file'].name} "
                f"has {len(xyz)}, expected equal lengths")
        bad = np.flatnonzero((xyz[..., 2] <= 0).any(1) | (bone(xyz) <= 0))
        require(not len(bad), f"{loaded['xyz_file']}: sample {bad[:1]} lies behind the camera or has no bone 0-9")
        require(np.median(bone(xyz)) < 1, f"{loaded['xyz_file']}: the bone 0-9 has a median above 1, expected metres")
        pictures = sorted((root / name / "rgb").glob("*.jpg"))
        versions = 4 if name == "training" else 1
        require(len(pictures) == versions * len(xyz),
                f"{root / name / 'rgb'}: holds {len(pictures)} pictures, expected {versions} x {len(xyz)}")
        uvw = xyz @ matrix.transpose(0, 2, 1)
        group = np.tile(np.arange(len(xyz)), versions)  # picture i shows sample i % number of samples
        sets.append(SimpleNamespace(paths=np.array([str(p) for p in pictures]), left=np.zeros(len(group), bool),
                                    index=np.arange(len(group)), group=group, uv=(uvw[..., :2] / uvw[..., 2:])[group],
                                    xyz=xyz[group] * 1000, valid=np.ones((len(group), 21), bool)))
    return *sets, [f"FreiHAND: {len(sets[0].uv)} training pictures of {len(np.unique(sets[0].group))} samples, "
                   f"{len(sets[1].uv)} evaluation pictures, all used"]


READERS = {"freihand": read_freihand}


# ---------------------------------------------------------------------------------------------- pictures

class Pictures(torch.utils.data.Dataset):
    """Item step -> one batch: image uint8 (B, S, S, 3), uv (B, 21, 2) input pixels, pose (B, 21, 3) relative to the
    wrist in bone lengths, valid (B, 21), has_pose (B,): wrist and joint 9, which scale the pose, are valid."""

    def __init__(self, samples, args, augment):
        self.samples, self.args, self.augment, self.epoch = samples, args, augment, None

    def __getitem__(self, step):
        args, samples, count = self.args, self.samples, len(self.samples.uv)
        if self.augment:
            epoch, place = divmod(step, count // args.batch_size)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng((args.seed, epoch)).permutation(count)
            rows = self.order[place * args.batch_size:(place + 1) * args.batch_size]
        else:
            rows = np.arange(step * args.batch_size, min((step + 1) * args.batch_size, count))
        made = []
        for i in rows:
            rng = np.random.default_rng((args.seed, epoch, i)) if self.augment else None
            view = crop_view(samples, i, args, args.input_size, rng)
            image, uv = apply_view(view, read_picture(samples.paths[i]), samples.uv[i], args.input_size)
            pose = (samples.xyz[i] - samples.xyz[i, 0]) / bone(samples.xyz[i])
            if self.augment:
                cos, sin = math.cos(math.radians(view["angle"])), math.sin(math.radians(view["angle"]))
                pose = pose @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])  # the picture's turn, about the axis
                image = image if args.no_colour else jitter(image, rng)
            valid = samples.valid[i]
            made.append((image, uv, pose.astype(np.float32), valid, valid[0] & valid[9]))
        return {key: torch.from_numpy(np.stack(part))
                for key, part in zip(("image", "uv", "pose", "valid", "has_pose"), zip(*made))}


def read_picture(path):
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    require(image is not None, f"{path}: missing or not a picture that can be read")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def crop_view(samples, i, args, side, rng=None):
    """The square around the true joints of sample i, `side` pixels wide; with rng, jittered and turned for training."""
    low, high = samples.uv[i].min(0), samples.uv[i].max(0)
    centre, extent, angle = (low + high) / 2, CROP[args.dataset] * (high - low).max(), 0.0
    if rng is not None:
        angle = rng.uniform(-args.rotation, args.rotation)
        centre = centre + rng.uniform(-0.1, 0.1, 2) * extent
        extent = extent * np.clip(rng.normal(1, 0.1), 0.9, 1.1)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn = np.array([[cos, sin], [-sin, cos]]) * side / max(extent, 1e-3)
    matrix = np.concatenate([turn, ((side - 1) / 2 - turn @ centre)[:, None]], 1)
    return dict(matrix=matrix, angle=angle, colour=None)


def jitter(image, rng):
    """Brightness, contrast and saturation by up to a half, hue by up to 27 degrees, a blur of up to half a pixel."""
    hue, saturation, value, contrast = rng.uniform(-13, 13), *rng.uniform(0.5, 1.5, 3)
    level = np.arange(256)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 2].mean()
    table = np.stack([(level + hue) % 180, level * saturation, (grey + (level - grey) * contrast) * value], 1)
    table[:, 1:] = table[:, 1:].clip(0, 255)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table[None].astype(np.uint8))
    image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return cv2.GaussianBlur(image, (3, 3), max(rng.uniform(0, 0.5), 1e-3))


def start_worker(number):
    cv2.setNumThreads(0)  # one process a core: threads inside would only get in each other's way
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)  # the parent decides; it still needs the batches under way


# ---------------------------------------------------------------------------------------------- network

class DetNet(nn.Module):
    """ResNet features, three deconvolutions to a quarter of the input's side, two coordinate channels, three heads.

    (N, 3, S, S) -> heat-maps (N, 21, S/4, S/4) in 0..1, delta and location maps (N, 21, 3, S/4, S/4): direction of the
    bone that ends in a joint, and the joint's place relative to the wrist in bone lengths, wherever it is read.
    """

    def __init__(self, backbone, weights):
        super().__init__()
        self.backbone = load_backbone(backbone, weights)
        features = 512 if backbone in ("resnet18", "resnet34") else 2048
        layers = []
        for width in (features, 256, 256):
            layers += [nn.ConvTranspose2d(width, 256, 4, 2, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(inplace=True)]
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
        return heat.float(), delta.unflatten(1, (21, 3)).float(), location.unflatten(1, (21, 3)).float()


def head(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, 256, 3, 1, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU(inplace=True),
                         nn.Conv2d(256, outputs, 1))


def forward(net, images, args):
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return net(normalise(images))


def heat_targets(uv, valid, cells, sigma=1.0):
    """uv (N, 21, 2) in input pixels, cells of 4 x 4 pixels -> Gaussians (N, 21, cells, cells) of peak 1 in the joint's
    cell, cut to 7 x 7; 0 for joints that are invalid or whose window lies outside."""
    cell = torch.floor((uv + 0.5) / 4)
    place = torch.arange(cells, device=uv.device)
    dx, dy = place - cell[..., :1], place - cell[..., 1:]  # (N, 21, cells) each
    gx, gy = (torch.exp(-d.square() / (2 * sigma ** 2)) * (d.abs() <= 3) for d in (dx, dy))
    return gy[..., :, None] * gx[..., None, :] * valid[..., None, None]


def detnet_loss(outputs, batch):
    """100 x 1/2 sum over joints of the heat-map's mean squared error + (delta + 10 location) / sqrt(128), each of the
    two the mean over samples of the Frobenius norm of (prediction - target) x target heat-map: minimal-hand's loss at
    batch 128, but the same at any batch. Invalid joints carry none."""
    heat, delta, location = outputs
    target = heat_targets(batch["uv"], batch["valid"], heat.shape[-1])
    seen = target.amax((2, 3)) > 0  # in the picture and valid
    heat_loss = 0.5 * ((heat - target).square() * seen[..., None, None]).mean((0, 2, 3)).sum()
    pose, parents = batch["pose"], list(PARENTS)
    bones = F.normalize(pose - pose[:, parents], dim=2)
    both = (batch["valid"] & batch["valid"][:, parents])[..., None, None, None]
    posed, weight = batch["has_pose"], target[:, :, None]

    def map_loss(prediction, goal, mask):
        difference = (prediction - goal[..., None, None]) * weight * mask
        norms = difference.flatten(1).square().sum(1).add(1e-12).sqrt()
        return (norms * posed).sum() / posed.sum().clamp(min=1)

    return 100 * heat_loss + (map_loss(delta, bones, both) + 10 * map_loss(location, pose, 1)) / math.sqrt(128)


# ---------------------------------------------------------------------------------------------- testing

@torch.no_grad()
def predict(net, samples, args, device, progress=False):
    """-> uv (N, 21, 2) in input pixels, the centres of the hottest cells, and pose (N, 21, 3) read there from the
    location maps, relative to the wrist in lengths of the bone 0-9."""
    net.eval()
    loader = torch.utils.data.DataLoader(Pictures(samples, args, augment=False), batch_size=None,
                                         sampler=range(math.ceil(len(samples.uv) / args.batch_size)),
                                         num_workers=args.workers, worker_init_fn=start_worker)
    uvs, poses = [], []
    for batch in tqdm(loader, unit="batch", desc="test", disable=not progress):
        heat, _, location = forward(net, batch["image"].to(device), args)
        cells = heat.shape[-1]
        hottest = heat.flatten(2).argmax(2)  # (N, 21), row-major
        uvs.append((torch.stack([hottest % cells, hottest // cells], 2) + 0.5) * 4 - 0.5)
        index = hottest[..., None, None].expand(-1, -1, 3, 1)
        pose = location.flatten(3).gather(3, index)[..., 0]
        poses.append(pose - pose[:, :1])
    return torch.cat(uvs).cpu().numpy(), torch.cat(poses).cpu().numpy()


def validate(net, samples, args, device):
    """MPJPE in mm relative to the wrist, with the true bone 0-9, over valid joints."""
    _, pose = predict(net, samples, args, device)
    error = masked_error(pose * bone(samples.xyz)[:, None, None], samples.xyz - samples.xyz[:, :1], samples.valid)
    return float(np.nanmean(error))


def masked_error(prediction, truth, valid):
    """(N, 21, 3) twice, (N, 21) -> mean distance of each sample's valid joints (N,)."""
    distance = np.where(valid, np.linalg.norm(prediction - truth, axis=2), np.nan)
    return np.nanmean(distance, axis=1)


def bone(xyz):
    """(..., 21, 3) -> length of the bone from the wrist to joint 9."""
    return np.linalg.norm(xyz[..., 9, :] - xyz[..., 0, :], axis=-1)


def draw_overlay(path, samples, pred_uv, gt_uv, error, args, columns=8):
    """Test pictures, true skeleton in white, predicted in colours: a row each of the best, median and worst."""
    order, columns = np.argsort(error), max(1, min(columns, len(error) // 3))
    middle = (len(order) - columns) // 2
    tiles = []
    for i in [*order[:columns], *order[middle:middle + columns], *order[-columns:]]:
        image = cv2.warpAffine(read_picture(samples.paths[i]), crop_view(samples, i, args, 256)["matrix"], (256, 256))
        for uv, colour in ((gt_uv[i], (255, 255, 255)), (pred_uv[i], None)):
            image = draw_hand(image, (uv + 0.5) * 256 / args.input_size - 0.5, colour, f"{error[i]:.1f} mm")
        tiles.append(image)
    save_image(path, sheet(tiles, columns))


if __name__ == "__main__":
    run_script(main)
