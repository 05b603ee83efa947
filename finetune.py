"""Fine-tune a (pre-trained) ResNet for 3D hand pose: DetNet of minimal-hand on labelled pictures, then test.

Reads a data set in its own layout and writes into --out: model.pt, checkpoint.pt, log.jsonl, curves.png, and for the
test split pred_xyz.npy, gt_xyz.npy (mm), valid.npy (of AssemblyHands wrist.npy too), pred_uv.npy, gt_uv.npy
(network-input pixels), names.txt and overlay.jpg. The model is chosen on a validation split, never on the test split. As in the paper, test pictures are
cropped by their true joints or boxes, and the wrist's place and the length of the bone 0-9, which one picture cannot
tell, are taken from the ground truth. Stop it at any moment and run the same command again: it goes on.

    python finetune.py --dataset freihand --root FreiHAND_pub_v2 --weights runs/simhand/backbone.pt --out runs/freihand
    python finetune.py --predict my_pictures --weights runs/freihand/model.pt --out runs/mine
    python finetune.py --dataset freihand --root demo/freihand --weights none --backbone resnet18 --input-size 64 \
        --batch-size 16 --epochs 2 --out runs/tiny
"""

import argparse
import collections
import fcntl
import hashlib
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
import yaml
from torch import nn
from tqdm import tqdm

from common import (BACKBONES, CORES, PARENTS, InputError, apply_view, atomic, catch_sigterm, check_flags, draw_hand,
                    load_array, load_backbone, load_checkpoint, load_hands, load_items, normalise, open_folder, plain,
                    plot_curves, print_settings, read_crop, read_log, refuse_other_arguments, require, resume,
                    run_script, save_array, save_checkpoint, save_image, sheet, start_log, start_ranks, write_log)

FREE = ("out", "device", "workers", "save_minutes")  # cannot change the result
# The test crop's side over the longer extent of the true joints (AssemblyHands: of its box, and 100 px at least).
CROP = {"freihand": 2.0, "dexycb": 1.75, "assemblyhands": 1.75}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=sorted(READERS))
    parser.add_argument("--root", help="the data set's folder, in its own layout")
    parser.add_argument("--out", required=True, help="folder of this run")
    parser.add_argument("--setup", choices=sorted(SETUPS), help="DexYCB's division: unseen sequences (s0), subjects "
                        "(s1, the default), views (s2) or objects (s3)")
    parser.add_argument("--paper-filter", action="store_true", help="DexYCB: only frames with 10 joints or more in the "
                        "picture, the wrist and joint 9 among them, as SiMHand (default: every labelled frame)")
    parser.add_argument("--modality", choices=("ego", "exo"), help="AssemblyHands' cameras (default: ego); exo: frames "
                        "cut from its videos, and the calibration as json like that of ego")
    parser.add_argument("--predict", metavar="FOLDER", help="instead of a data set: what the trained --weights "
                        "RUN/model.pt says of the pictures in a folder, each of one right hand that fills about half "
                        "of the longer side, or of a hands folder's crops")
    # network
    parser.add_argument("--weights", default="imagenet", help="start from a file (backbone.pt), imagenet, or none")
    parser.add_argument("--backbone", choices=BACKBONES, default="resnet50")
    parser.add_argument("--head", choices=("detnet", "knn"), default="detnet", help="knn: no training; the pose of the "
                        "nearest labelled training picture, by cosine similarity of the backbone's averaged features")
    parser.add_argument("--freeze", action="store_true", help="keep the backbone as it is, train the heads alone")
    parser.add_argument("--input-size", type=int, default=128,
                        help="side of the network's input in pixels, a multiple of 32; heat-maps have a quarter (128)")
    # labels
    parser.add_argument("--label-fraction", type=float, default=1.0, help="share of the unique training samples to "
                        "use, with all their versions; a smaller share lies within a larger one of the same seed")
    # optimisation
    parser.add_argument("--epochs", type=int, default=120, help="(paper: 120)")
    parser.add_argument("--batch-size", type=int, default=128, help="pictures a step over all ranks of torchrun; "
                        "BatchNorm sees a rank's share (paper: 128)")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's, a tenth of it from half of the epochs (DetNet)")
    parser.add_argument("--backbone-lr", type=float, help="the backbone's own, in the same way (default: --lr)")
    parser.add_argument("--rotation", type=float, default=90.0, help="degrees to either side (DetNet: 90)")
    parser.add_argument("--no-colour", action="store_true", help="no colour jitter and blur")
    parser.add_argument("--seed", type=int, default=0)
    # machine
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU when there is one)")
    parser.add_argument("--workers", type=int, default=min(16, CORES),
                        help="loader processes of each rank, 0: none (default: one a core, 16 at most)")
    parser.add_argument("--save-minutes", type=float, default=10, help="checkpoint this often, and after every epoch")
    args = parser.parse_args()
    check_flags(args)
    require(bool(args.predict) != bool(args.dataset and args.root),
            "expected --dataset and --root, or --predict and --weights RUN/model.pt")
    require(not args.predict or args.weights not in ("imagenet", "none") and "RANK" not in os.environ,
            "--predict: expected --weights RUN/model.pt, and no torchrun")
    require(args.dataset == "dexycb" or not (args.setup or args.paper_filter), "--setup, --paper-filter: DexYCB only")
    require(args.dataset == "assemblyhands" or not args.modality, "--modality: AssemblyHands only")
    require(0 < args.label_fraction <= 1 and min(args.epochs, args.batch_size, args.lr) > 0,
            "--label-fraction must lie in 0..1, --epochs, --batch-size and --lr above 0")
    require(args.input_size >= 32 and args.input_size % 32 == 0,
            f"--input-size must be a multiple of 32, not {args.input_size}")
    args.root = os.path.normpath(args.root or args.predict)
    args.setup = "s1" if args.dataset == "dexycb" and not args.setup else args.setup
    args.modality = "ego" if args.dataset == "assemblyhands" and not args.modality else args.modality
    args.backbone_lr = args.lr if args.backbone_lr is None else args.backbone_lr
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or ("bf16" if args.device.startswith("cuda") else "fp32")
    return args


def main():
    args = parse_args()
    if args.predict:
        return predict_folder(args)
    train, validation, test, notes = split(args)  # before the ranks meet: waiting for the one that reads may take long
    rank, args.ranks, device = start_ranks(args.device)
    require(args.batch_size % args.ranks == 0, f"--batch-size must be a multiple of {args.ranks} ranks")
    steps_per_epoch = len(train) // args.batch_size if args.head == "detnet" else 0
    require(steps_per_epoch or args.head == "knn",
            f"{args.root}: {len(train)} training pictures, fewer than --batch-size {args.batch_size}")
    out, total = Path(args.out), args.epochs * steps_per_epoch

    torch.manual_seed(args.seed)
    model = DetNet(args.backbone, args.weights).to(device, memory_format=torch.channels_last)
    model.backbone.requires_grad_(not args.freeze)
    heads = [p for name, p in model.named_parameters() if not name.startswith("backbone.")]
    groups = [dict(params=heads, peak=args.lr), dict(params=list(model.backbone.parameters()), peak=args.backbone_lr)]
    optimizer = torch.optim.Adam(groups[:1] if args.freeze else groups, fused=True)
    require(not (out / "keypoints.npy").exists(), f"{out}: is a hands folder, choose another --out")
    if rank == 0:
        open_folder(out)  # locked until the script ends
    step, best, digest, kept = 0, math.inf, 0, resume(out, args, FREE)
    for samples in (train, validation, test):
        digest = zlib.crc32(samples, digest)
    if kept:
        require(kept["data"] == digest, f"{args.root}: other labels than {out} was trained on; choose another --out")
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        step, best = kept["step"], kept["best"]
    rows = start_log(out, args, step) if rank == 0 else []
    if rank == 0:
        if not rows:
            write_log(out, {"split": notes[0], "notes": notes[1:]})
            before = Path(args.weights).parent / "log.jsonl"
            if Path(args.weights).is_file() and before.exists():
                note_pretraining(out, before)
        print_settings(args, train=len(train), validation=len(validation), test=len(test), steps=total, start=step,
                       parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M")
        print(*notes, sep="\n")

    def save():
        if rank == 0:
            save_checkpoint(out, dict(args=plain(args), data=digest, step=step, best=best, model=model.state_dict(),
                                      optimizer=optimizer.state_dict()))

    net = model if args.ranks == 1 else nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None)
    loader = load_items(Pictures(train, args, True, rank, args.ranks), range(step, total), args,
                        pin_memory=device.type == "cuda")
    length = float(np.median(bone(train.xyz[posed(train)])))  # for --predict, which has none to go by
    stop, saved, recent, since = catch_sigterm(), time.time(), [], time.time()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank != 0 or not total)
    while step < total:
        net.train()
        if args.freeze:
            model.backbone.eval()
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (0.1 if step >= total // 2 else 1)
        batch = {key: value.to(device, non_blocking=True) for key, value in next(loader).items()}
        loss = detnet_loss(forward(net, batch["image"], args), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        recent.append(loss.detach())
        bar.update()

        end_of_epoch = step % steps_per_epoch == 0
        due = torch.tensor([bool(stop), end_of_epoch or time.time() - saved > 60 * args.save_minutes]).int()
        stopping, due = over_ranks(due).tolist()  # all do the same at a step; on the hosts, no device has to wait
        if stopping or due:
            mean = over_ranks(torch.stack(recent).mean()).item() / args.ranks
            finite = math.isfinite(mean) and all(t.isfinite().all() for t in model.state_dict().values())
            require(finite, f"{out}: the loss or a weight is not finite by step {step}; checkpoints stay as they are; "
                    "try a smaller --lr or --precision fp32 in another --out")
            row = dict(step=step, epoch=round(step / steps_per_epoch, 3), lr=optimizer.param_groups[0]["lr"], loss=mean,
                       pictures_per_s=args.batch_size * len(recent) / (time.time() - since))
            if end_of_epoch:
                error = pose_error(predict(model, validation, args, device)[1], validation)
                row["validation_mpjpe"] = float(np.nanmean(error))
                if row["validation_mpjpe"] < best and rank == 0:
                    with atomic(out / "model.pt") as file:  # with what --predict needs beside the weights
                        torch.save(dict(backbone=args.backbone, input_size=args.input_size, crop=CROP[args.dataset],
                                        bone=length, model=model.state_dict()), file)
                best = min(best, row["validation_mpjpe"])
            rows.append(row)
            if rank == 0:
                write_log(out, row)
            save()
            bar.set_postfix_str(f"loss {mean:.3f}, validation {best:.1f} mm, {row['pictures_per_s']:.0f} pictures/s")
            saved, recent, since = time.time(), [], time.time()
        if stopping:
            break
    bar.close()
    if step < total:
        if rank == 0:
            print(f"stopped by SIGTERM after step {step} of {total}; the same command goes on")
    elif args.head == "knn":
        save()  # so that other arguments are refused here too
        uv, pose = nearest(model, train, test, args, device)
    else:
        if rank == 0:
            plot_curves(out / "curves.png", rows, [["loss"], ["lr"], ["validation_mpjpe"]])
            model.load_state_dict(load_checkpoint(out / "model.pt")["model"])
            print(f"chosen at a validation MPJPE of {best:.2f} mm, see {out}/curves.png")
        uv, pose = predict(model, test, args, device, "test" if rank == 0 else "")
    if rank == 0 and step == total:
        write_predictions(out, test, uv, pose, args)
        print(f"next: python evaluate.py {out}")
    if args.ranks > 1:
        dist.barrier()  # were a rank to fail while it ends, torchrun would end the one that still writes
        dist.destroy_process_group()


def note_pretraining(out, path):
    """From the log beside the weights, for plots of evaluate.py: how they were pre-trained, and on how many hands."""
    try:
        first, *rows = read_log(path)
    except ValueError as error:  # another program's log, or an empty one
        print(f"{path}: not of pretrain.py, so plots will not name the pre-training ({error})")
        return
    hands = next((row["hands"] for row in rows if "hands" in row), None)
    write_log(out, {"pretraining": {"args": first.get("args"), "hands": hands}})


def predict_folder(args):
    """--predict: a trained model on a folder of pictures, each its whole square, or on a hands folder."""
    kept, folder, out = load_checkpoint(args.weights), Path(args.root), Path(args.out)
    device = torch.device(args.device)
    try:
        args.backbone, args.input_size, crop, length = (kept[k] for k in ("backbone", "input_size", "crop", "bone"))
        net = DetNet(args.backbone, "none").to(device, memory_format=torch.channels_last)
        net.load_state_dict(kept["model"])
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(repr(error).split())[:200]
        raise InputError(f"{args.weights}: not the model.pt of a fine-tuning run: {reason}")
    require(folder.is_dir(), f"{folder}: no such folder, expected pictures or a hands folder")
    source = load_hands(folder) if (folder / "keypoints.npy").exists() else args.root
    if source is not args.root:
        samples = make_set(crop, path=["crops.npy"] * len(source.keypoints), left=source.hands["left"],
                           uv=source.keypoints)
    else:
        names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICTURES)
        require(names, f"{folder}: holds neither keypoints.npy nor a picture ({', '.join(PICTURES)})")
        samples = make_set(1, path=names)
        sizes = np.array([read_picture(samples, i, source).shape[1::-1] for i in range(len(names))])
        samples.centre, samples.side = (sizes - 1) / 2, sizes.max(1)
    open_folder(out)  # locked until the script ends
    require(not any((out / name).exists() for name in ("checkpoint.pt", "gt_xyz.npy", "keypoints.npy")),
            f"{out}: holds a fine-tuning run or hands, choose another --out")
    if (out / "log.jsonl").exists():
        refuse_other_arguments(out, read_log(out / "log.jsonl")[0]["args"], args, FREE)
    start_log(out, args)
    print_settings(args, pictures=len(samples))
    args.root = source
    uv, pose = predict(net, samples, args, device, "pictures")
    write_predictions(out, samples, uv, pose, args, length)


# ---------------------------------------------------------------------------------------------- readers

# A set is a record array. path: below the root; index: the official one, -1 where it cannot be known; group: unique
# sample, whose versions share it; scene: what validation must not share with training; camera: DexYCB's; width: the
# picture's, 0 where it does not matter; uv: its pixels; xyz: mm in the camera's frame, of AssemblyHands 0 where it is
# not known; valid: joints; centre and side: the square test crop.
SAMPLE = np.dtype([("path", "S255"), ("left", "?"), ("index", "<i8"), ("group", "<i8"), ("scene", "<i8"),
                   ("camera", "<i8"), ("width", "<i8"), ("uv", "<f8", (21, 2)), ("xyz", "<f8", (21, 3)),
                   ("valid", "?", 21), ("centre", "<f8", 2), ("side", "<f8")])
CACHE = 1  # to be raised when a reader or the records change: then nothing is taken from an older cache
SERIALS = ("836212060125", "839512060362", "840412060917", "841412060263", "932122060857", "932122060861",
           "932122061900", "932122062010")
SETUPS = {  # subject, sequence within it, camera, all counted from 0 -> 0 train, 1 val, 2 test
    "s0": lambda subject, sequence, camera: 0 if sequence % 5 != 4 else 1 if subject < 2 else 2,
    "s1": lambda subject, sequence, camera: {6: 1, 7: 2, 8: 2}.get(subject, 0),
    "s2": lambda subject, sequence, camera: max(camera - 5, 0),
    "s3": lambda subject, sequence, camera: {3: 1, 19: 1, 7: 2, 11: 2, 15: 2}.get(sequence // 5, 0)}
TIPS_FIRST = np.array([20, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16])  # -> FreiHAND's order


def split(args):
    """-> train, validation, test, and notes on what was used, the first naming the split. From here on all hands are
    right ones: left ones are mirrored, u' = width - 1 - u and x' = -x, and `read_picture` mirrors their pictures."""
    train, validation, test, notes = READERS[args.dataset](args)
    for samples in (train, test) if validation is None else (train, validation, test):
        require(posed(samples).any(), f"{args.root}: a split without a labelled wrist and joint 9: {'; '.join(notes)}")
        lengths = bone(samples.xyz[posed(samples)])
        require(lengths.min() > 0 and 40 < np.median(lengths) < 140, f"{args.root}: the bone 0-9 has a length of "
                f"{lengths.min():.3g} mm at least and {np.median(lengths):.3g} mm in the median, expected hands")
        left = samples.left
        samples.xyz[left, :, 0] *= -1
        samples.uv[left, :, 0] = samples.width[left, None] - 1 - samples.uv[left, :, 0]
        samples.centre[left, 0] = samples.width[left] - 1 - samples.centre[left, 0]
    groups = np.unique(train.group)
    chosen = np.random.default_rng(args.seed).permutation(groups)[:max(round(args.label_fraction * len(groups)), 1)]
    used = np.isin(train.group, chosen)
    notes = notes + [f"labels: {len(chosen)} of {len(groups)} unique training samples"]
    if args.head == "knn":  # there is no model to choose, and only a whole pose can be aligned and scaled
        notes[-1] += f"; compared with the {(used & posed(train)).sum()} of {used.sum()} that have wrist and joint 9"
        require((used & posed(train)).any(), f"{args.root}: no training sample with a valid wrist and joint 9")
        return train[used & posed(train)], train[:0], test, notes
    if validation is None:  # every tenth scene of the chosen labels, so that no pose is on both sides
        scenes = np.random.default_rng(args.seed).permutation(np.unique(train.scene))
        scenes = scenes[np.isin(scenes, train.scene[used])]
        kind = "sequences" if args.dataset == "assemblyhands" else "samples"
        require(len(scenes) > 1,
                f"{args.root}: labels of {len(scenes)} training {kind}, expected at least 2: one is for validation")
        held_out = used & np.isin(train.scene, scenes[::10])
        validation, used = train[held_out], used & ~held_out
        notes[-1] += f"; every tenth of their {kind}, {len(scenes[::10])} of {len(scenes)}, is for validation"
    require(posed(validation).any(), f"{args.root}: no validation sample with a valid wrist and joint 9")
    return train[used], validation, test, notes


def make_set(crop, **fields):
    """Fields of `SAMPLE` -> record array; the index counts, the crop is a square `crop` times as long as the joints."""
    samples = np.zeros(len(fields["path"]), SAMPLE).view(np.recarray)
    fields["path"] = list(map(os.fsencode, fields["path"]))
    require(max(map(len, fields["path"])) <= SAMPLE["path"].itemsize, "a path below the root has more than 255 bytes")
    for name, values in dict(index=np.arange(len(samples)), **fields).items():
        samples[name] = values
    low, high = samples.uv.min(1), samples.uv.max(1)
    samples.centre, samples.side = (low + high) / 2, crop * (high - low).max(1)
    return samples


def read_freihand(args):
    """FreiHAND v2 -> training, no validation, evaluation, notes."""
    sets, root = [], Path(args.root)
    for name, versions, places in (("training", 4, [root]),
                                   ("evaluation", 1, [root, Path(os.path.abspath(root) + "_eval")])):
        loaded = []
        for key, rows in (("K", 3), ("xyz", 21)):
            file = next((p / f"{name}_{key}.json" for p in places if (p / f"{name}_{key}.json").is_file()), None)
            require(file, f"{places[-1] / f'{name}_{key}.json'}: missing, expected FreiHAND's list"
                    + (f", there or in {root}" if len(places) > 1 else ""))
            try:
                loaded.append(np.array(read_json(file), np.float64))
            except (TypeError, ValueError) as error:
                raise InputError(f"{file}: truncated or not a list of arrays of one shape ({error})")
            require(loaded[-1].shape[1:] == (rows, 3) and np.isfinite(loaded[-1]).all(),
                    f"{file}: has shape {loaded[-1].shape}, expected (N, {rows}, 3), finite")
        matrix, xyz = loaded
        require(len(matrix) == len(xyz), f"{root / name}_K.json: has {len(matrix)} entries, {file.name} has {len(xyz)}")
        bad = np.flatnonzero((xyz[..., 2] <= 0).any(1) | (bone(xyz) <= 0))
        require(not len(bad), f"{file}: sample {bad[:1]} lies behind the camera or has no bone 0-9")
        require(np.median(bone(xyz)) < 1, f"{file}: the bone 0-9 has a median above 1, expected metres")
        pictures, there = [f"{i:08d}.jpg" for i in range(versions * len(xyz))], set(os.listdir(root / name / "rgb"))
        lacking = [picture for picture in pictures if picture not in there]
        require(not lacking, f"{root / name / 'rgb'}: {len(lacking)} pictures are missing, the first {lacking[:1]}; "
                f"expected {versions} x {len(xyz)}, 00000000.jpg and so on")
        uvw = xyz @ matrix.transpose(0, 2, 1)
        group = np.tile(np.arange(len(xyz)), versions)  # picture i shows sample i % number of samples
        sets.append(make_set(CROP["freihand"], path=[f"{name}/rgb/{p}" for p in pictures], group=group, scene=group,
                             uv=(uvw[..., :2] / uvw[..., 2:])[group], xyz=xyz[group] * 1000, valid=True))
    return sets[0], None, sets[1], ["FreiHAND: tested on the evaluation split", f"{len(sets[0])} training pictures of "
                                    f"{len(sets[0]) // 4} samples, {len(sets[1])} evaluation pictures, all used"]


def read_dexycb(args):
    """DexYCB -> train, val, test, notes. valid: visible as SiMHand's reader defines it; xyz keeps all 21 joints."""
    files = [sorted(Path(args.root).glob(f"*-subject-{k:02d}/*/meta.yml")) for k in range(1, 11)]
    for k, found in enumerate(files):
        require(len(found) == 100 or found and args.setup in ("s1", "s2"), f"{args.root}/*-subject-{k + 1:02d}: holds "
                f"{len(found)} sequences with a meta.yml, expected 100 (or some for s1 and s2, whatever their order)")
    every, notes = cached(args, sum(files, []), lambda: read_sequences(args, files))
    places, which = np.unique(every.scene * 8 + every.camera, return_inverse=True)  # subject, sequence and camera
    part = np.array([SETUPS[args.setup](place // 800, place // 8 % 100, place % 8) for place in places])[which]
    labelled, clear = (every.xyz != -1000).any((1, 2)), (every.valid.sum(1) >= 10) & posed(every)
    sets, notes = [], [f"DexYCB {args.setup}: chosen on val, tested on test", *notes]
    for number, name in enumerate(("train", "val", "test")):
        mine = part == number
        # frames without a label count; what is missing would shift the indices
        every.index[mine] = np.arange(mine.sum()) if len(places) == 8000 else -1
        kept = mine & labelled & (clear | (not args.paper_filter))
        sets.append(every[kept])
        notes.append(f"{name}: {kept.sum()} of {mine.sum()} frames kept, {(kept & ~every.valid.all(1)).sum()} of them "
                     f"with joints outside the picture; dropped {(mine & ~labelled).sum()} without a label"
                     + f" and {(mine & labelled & ~kept).sum()} by --paper-filter" * args.paper_filter)
    return *sets, notes


def read_sequences(args, files):
    """The meta.yml of each subject's sequences -> all frames, with or without a label, in the official order; notes."""
    yaml.SafeLoader.add_constructor("tag:yaml.org,2002:python/tuple", yaml.SafeLoader.construct_yaml_seq)
    cameras = []  # folder, number of frames, and what these share: left, scene, camera
    for subject, place, file in ((s, q, file) for s, found in enumerate(files) for q, file in enumerate(found)):
        try:
            meta = yaml.safe_load(file.read_bytes())
            serials, frames, side = {str(s) for s in meta["serials"]}, int(meta["num_frames"]), meta["mano_sides"][0]
            require(serials <= {*SERIALS} and frames > 0 and side in ("left", "right"), "a value that none can have")
        except (yaml.YAMLError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise InputError(f"{file}: expected DexYCB's serials, num_frames and mano_sides "
                             f"({' '.join(repr(error).split())[:300]})")
        cameras += [(file.parent / serial, frames, side == "left", 100 * subject + place, camera)
                    for camera, serial in enumerate(SERIALS) if serial in serials]
    loader = load_items(cameras, range(len(cameras)), args, collate_fn=read_labels)
    xyz, uv = (np.concatenate(part) for part in zip(*tqdm(loader, desc="labels", unit="camera", total=len(cameras))))
    left, scene, camera = (np.repeat(values, [c[1] for c in cameras]) for values in list(zip(*cameras))[2:])
    valid = ((uv > 0) & (uv <= (640, 480))).all(2) & (xyz[..., 0] != -1)
    every = make_set(CROP["dexycb"], left=left, group=np.arange(len(uv)), scene=scene, camera=camera, width=640, uv=uv,
                     valid=valid, xyz=xyz * 1000.0, path=[f"{folder.relative_to(args.root)}/color_{k:06d}.jpg"
                                                          for folder, frames, *_ in cameras for k in range(frames)])
    count = sum(map(len, files))
    return [every], [f"{count} of 1000 sequences and {len(cameras)} of 8000 cameras are there"
                     + ("" if len(cameras) == 8000 else ": names.txt has no official indices but -1")]


def read_labels(camera):
    """All frames of a DexYCB camera folder -> joint_3d (F, 21, 3) in metres, joint_2d (F, 21, 2) in pixels."""
    made = []
    for frame in range(camera[1]):
        file = camera[0] / f"labels_{frame:06d}.npz"
        try:
            # opened here: np.load leaves a damaged file open
            with open(file, "rb") as content, np.load(content, allow_pickle=False) as labels:
                made.append((labels["joint_3d"].reshape(21, 3), labels["joint_2d"].reshape(21, 2)))
            require(np.isfinite(made[-1][0]).all() and np.isfinite(made[-1][1]).all(), "not finite")
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise InputError(f"{file}: missing, truncated, or without finite joint_3d (1, 21, 3) and joint_2d "
                             f"(1, 21, 2): {error}")
    return tuple(np.array(part) for part in zip(*made))


def read_assemblyhands(args):
    """AssemblyHands v1-1 -> train, no validation, val, notes."""
    parts = [[Path(args.root, "annotations", part, f"assemblyhands_{part}_{name}_v1-1.json")
              for name in (f"{args.modality}_data", f"{args.modality}_calib", "joint_3d")] for part in ("train", "val")]

    def read():
        (train, first), (test, second) = (read_annotations(*files) for files in parts)
        return (train, test), [f"AssemblyHands {args.modality}: tested on val, as the public test split has no labels",
                               f"train: {first}", f"val: {second}"]

    train, test, notes = cached(args, sum(parts, []), read)
    return train, None, test, notes


def read_annotations(data_file, calib_file, pose_file):
    """One split of AssemblyHands -> samples, and a note that counts what was dropped."""
    data, calibration, poses = map(read_json, (data_file, calib_file, pose_file))
    rows, dropped, at, sequences = [], collections.Counter(), "", {}
    try:
        images = {image["id"]: image for image in data["images"]}
        for annotation in tqdm(data["annotations"], desc=data_file.stem, unit="picture"):
            at = f"annotation {annotation['id']}: "
            image, visible = images[annotation["image_id"]], annotation["joint_valid"]
            sequence, frame = image["seq_name"], f"{image['frame_idx']:06d}"
            pose = (poses["annotations"].get(sequence, {}).get(frame) or {}).get("world_coord")
            for hand, side in enumerate(("right", "left")):
                box, order = (annotation["bbox"] or {}).get(side), 21 * hand + TIPS_FIRST
                if visible is None or pose is None:
                    dropped["without labels"] += 1
                    continue
                if box is None or not (np.diff(np.reshape(box, (2, 2)), axis=0) > 0).all():
                    dropped["without a box"] += 1
                    continue
                cameras = calibration["calibration"][sequence]
                name = image["camera"].removesuffix("_mono10bit")
                name = name if name in cameras["intrinsics"] else name + "_mono10bit"
                matrix = np.array(cameras["intrinsics"][name], float).reshape(3, 3)
                turn = np.array(cameras["extrinsics"][frame][name], float).reshape(3, 4)  # world to camera
                if not (np.isfinite(matrix).all() and np.isfinite(turn).all()):
                    raise ValueError(f"calibration of {name}, frame {frame}, is not finite")
                xyz = np.array(pose, float).reshape(42, 3)[order] @ turn[:, :3].T + turn[:, 3]
                valid = np.isfinite(xyz).all(1) & (xyz[:, 2] > 0) & (np.reshape(visible, 42)[order] > 0)
                if valid.sum() < 10:
                    dropped["with fewer than 10 valid joints"] += 1
                    continue
                xyz[~np.isfinite(xyz).all(1)] = 0
                uv = (xyz @ matrix.T)[:, :2] / np.maximum(xyz[:, 2:], 1)  # rectified pictures: a pinhole
                low, high = np.array(box, float).reshape(2, 2)
                rows.append((f"images/{image['file_name']}", hand == 1, int(annotation["id"]), len(rows),
                             sequences.setdefault(sequence, len(sequences)), 0, image["width"], uv, xyz, valid,
                             (low + high) / 2, max(CROP["assemblyhands"] * (high - low).max(), 100)))
        samples = np.array(rows, SAMPLE).view(np.recarray)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{data_file}: {at}not in AssemblyHands' layout, or missing in {calib_file.name} or "
                         f"{pose_file.name}: {error!r}")
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items())) or "none"
    return samples, f"{len(rows)} hands of {len(sequences)} sequences kept; dropped {counts}"


READERS = {"freihand": read_freihand, "dexycb": read_dexycb, "assemblyhands": read_assemblyhands}


def read_json(file):
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: truncated or not json ({error})")


def cached(args, files, read):
    """read() -> sets, notes -> the same in one list, kept as .npy files beside the run: what takes minutes is
    then loaded in seconds. The folder's name follows from data set, root, and names, sizes and times of `files`.
    Of several processes the first reads and the others wait for it."""
    key = repr((CACHE, SAMPLE, args.dataset, args.modality, os.path.realpath(args.root), [
        (str(file.relative_to(args.root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]))
    folder = Path(args.out).parent / ".simhand-cache" / hashlib.sha256(key.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that reads {args.root}", flush=True)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        for left in folder.glob(".*.tmp"):  # of a killed run
            left.unlink()
        if not (folder / "notes.json").exists():
            sets, notes = read()
            for k, samples in enumerate(sets):
                save_array(folder / f"{k}.npy", samples.view(SAMPLE))
            with atomic(folder / "notes.json") as file:  # last: where it is, all is
                file.write(json.dumps([len(sets), notes]).encode())
    try:
        count, notes = read_json(folder / "notes.json")
        return [*(load_array(folder / f"{k}.npy", SAMPLE, (None,)).view(np.recarray) for k in range(count)), notes]
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder}: delete this folder, it will be made again ({error})")


# ---------------------------------------------------------------------------------------------- pictures

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


class Pictures(torch.utils.data.Dataset):
    """Item step -> one batch, or a rank's share of it: image uint8 (B, S, S, 3), uv (B, 21, 2) input pixels, pose
    (B, 21, 3) relative to the wrist in bone lengths, valid (B, 21), has_pose (B,): wrist and joint 9, which scale the
    pose, are valid; posed: how many of the whole batch have one, over the number of ranks."""

    def __init__(self, samples, args, augment, rank=0, ranks=1):
        self.samples, self.args, self.augment, self.epoch = samples, args, augment, None
        self.rank, self.ranks = rank, ranks

    def __getitem__(self, step):
        args, samples, count = self.args, self.samples, len(self.samples)
        if self.augment:
            epoch, place = divmod(step, count // args.batch_size)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, np.random.default_rng((args.seed, epoch)).permutation(count)
            rows = self.order[place * args.batch_size:(place + 1) * args.batch_size]
        else:
            rows = np.arange(step * args.batch_size, min((step + 1) * args.batch_size, count))
        whole, share, made = posed(samples[rows]).sum() / self.ranks, len(rows) // self.ranks, []
        for i in rows[self.rank * share:(self.rank + 1) * share]:
            rng = np.random.default_rng((args.seed, epoch, i)) if self.augment else None
            view = crop_view(samples, i, args, args.input_size, rng)
            image, uv = cut(samples, i, args.root, view, args.input_size)
            pose = scaled_pose(samples.xyz[i])
            if self.augment:
                cos, sin = math.cos(math.radians(view["angle"])), math.sin(math.radians(view["angle"]))
                pose = pose @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])  # the picture's turn, about the axis
                image = image if args.no_colour else jitter(image, rng)
            valid = samples.valid[i]
            made.append((image, uv, pose.astype(np.float32), valid, valid[0] & valid[9]))
        return {key: torch.from_numpy(np.stack(part)) for key, part in zip(
            ("image", "uv", "pose", "valid", "has_pose"), zip(*made))} | {"posed": torch.tensor(whole)}


def read_picture(samples, i, root):
    """-> RGB uint8 (H, W, 3), mirrored where it shows a left hand: all that comes after sees right hands.
    root: the folder, or an opened hands folder, whose crops show right hands already."""
    if not isinstance(root, str):
        return read_crop(root, i)
    path = os.path.join(root, os.fsdecode(samples.path[i]))
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: could not be read: {error.strerror}")
    whole = content[:2] != b"\xff\xd8" or b"\xff\xd9" in content  # OpenCV fills what a cut JPEG lacks with grey
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB) if content and whole else None
    require(image is not None, f"{path}: truncated, or not a picture that OpenCV reads")
    require(samples.width[i] in (0, image.shape[1]),
            f"{path}: is {image.shape[1]} pixels wide, its labels are for {samples.width[i]}")
    return cv2.flip(image, 1) if samples.left[i] else image


def crop_view(samples, i, args, side, rng=None):
    """The test crop of sample i, `side` pixels wide; with rng, jittered and turned for training."""
    centre, extent, angle = samples.centre[i], float(samples.side[i]), 0.0
    if rng is not None:
        angle = rng.uniform(-args.rotation, args.rotation)
        centre = centre + rng.uniform(-0.1, 0.1, 2) * extent
        extent = extent * np.clip(rng.normal(1, 0.1), 0.9, 1.1)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn = np.array([[cos, sin], [-sin, cos]]) * side / max(extent, 1e-3)
    matrix = np.concatenate([turn, ((side - 1) / 2 - turn @ centre)[:, None]], 1)
    return dict(matrix=matrix, angle=angle, colour=None)


def cut(samples, i, root, view, side):
    """-> the view of sample i's picture, RGB uint8 (side, side, 3), and its joints there (21, 2)."""
    image, view, uv = shrink(read_picture(samples, i, root), view, samples.uv[i])
    return apply_view(view, image, uv, side)


def shrink(image, view, uv):
    """Where a pixel of the view covers several of the picture, as of a large photo: the means of squares of so many
    pixels first, since a view only samples. -> smaller picture, the view and the joints in it."""
    height, width = image.shape[:2]
    times = int(1 / np.linalg.norm(view["matrix"][0, :2]))
    if times < 2:
        return image, view, uv
    image = cv2.copyMakeBorder(image, 0, -height % times, 0, -width % times, cv2.BORDER_CONSTANT)
    image = cv2.resize(image, None, fx=1 / times, fy=1 / times, interpolation=cv2.INTER_AREA)
    back = view["matrix"] @ np.array([[times, 0, (times - 1) / 2], [0, times, (times - 1) / 2], [0, 0, 1]])
    return image, view | {"matrix": back}, (uv + 0.5) / times - 0.5


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


# ---------------------------------------------------------------------------------------------- network

class DetNet(nn.Module):
    """ResNet features, three deconvolutions to a quarter of the input's side, two coordinate channels, three heads.

    (N, 3, S, S) -> heat-maps (N, 21, S/4, S/4) in 0..1, delta and location maps (N, 21, 3, S/4, S/4): direction of the
    bone that ends in a joint, and the joint's place relative to the wrist in bone lengths, wherever it is read.
    """

    def __init__(self, backbone, weights):
        super().__init__()
        self.backbone = load_backbone(backbone, weights)
        self.features, layers = 512 if backbone in ("resnet18", "resnet34") else 2048, []
        for width in (self.features, 256, 256):
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
    count = batch.get("posed", posed.sum())  # of all ranks, whose gradients are averaged

    def map_loss(prediction, goal, mask):
        difference = (prediction - goal[..., None, None]) * weight * mask
        norms = difference.flatten(1).square().sum(1).add(1e-12).sqrt()
        return (norms * posed).sum() / count.clamp(min=1e-6)

    return 100 * heat_loss + (map_loss(delta, bones, both) + 10 * map_loss(location, pose, 1)) / math.sqrt(128)


# ---------------------------------------------------------------------------------------------- testing

@torch.no_grad()
def of_pictures(function, shape, samples, args, device, progress=""):
    """function: images (n, S, S, 3) -> (n, *shape). -> (N, *shape) of all test crops; each rank does a share."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order, found = range(rank, math.ceil(len(samples) / args.batch_size), ranks), torch.zeros(
        len(samples), *shape, device=device)
    loader = load_items(Pictures(samples, args, augment=False), order, args)
    for k, batch in zip(order, tqdm(loader, unit="batch", total=len(order), desc=progress, disable=not progress)):
        found[k * args.batch_size:(k + 1) * args.batch_size] = function(batch["image"].to(device))
    return over_ranks(found)


def predict(net, samples, args, device, progress=""):
    """-> uv (N, 21, 2) in input pixels, the centres of the hottest cells, and pose (N, 21, 3) read there from the
    location maps, relative to the wrist in lengths of the bone 0-9."""
    def read(images):
        heat, _, location = forward(net, images, args)
        cells, hottest = heat.shape[-1], heat.flatten(2).argmax(2)  # (n, 21), row-major
        uv = (torch.stack([hottest % cells, hottest // cells], 2) + 0.5) * 4 - 0.5
        pose = location.flatten(3).gather(3, hottest[..., None, None].expand(-1, -1, 3, 1))[..., 0]
        return torch.cat([uv, pose - pose[:, :1]], 2)

    for tensor in net.state_dict().values() if dist.is_initialized() else ():
        dist.broadcast(tensor, 0)  # BatchNorm's statistics differ, and rank 0 may have loaded the chosen model
    net.eval()
    found = of_pictures(read, (21, 5), samples, args, device, progress).cpu().numpy()
    return found[..., :2], found[..., 2:]


def nearest(net, train, test, args, device):
    """-> uv and pose, as of `predict`, of each test picture's nearest training picture, both in test crops."""
    net.eval()
    keys, queries = (of_pictures(lambda images: F.normalize(forward(net.backbone, images, args).float()),
                                 (net.features,), samples, args, device, name)
                     for name, samples in (("training", train), ("test", test)))
    found = torch.cat([(part @ keys.T).argmax(1) for part in queries.split(256)]).cpu().numpy()  # all at once: too big
    return crop_uv(train, args)[found], scaled_pose(train.xyz)[found]


def over_ranks(tensor):
    """The sum of all ranks' tensors."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def pose_error(pose, samples):
    """pose (N, 21, 3) in lengths of the bone 0-9 -> mean distance in mm over each sample's valid joints (N,), relative
    to the wrist; NaN where the wrist or joint 9 is not valid."""
    distance = np.linalg.norm((pose - scaled_pose(samples.xyz)) * bone(samples.xyz)[:, None, None], axis=2)
    counted = samples.valid & posed(samples)[:, None]
    return (distance * counted).sum(1) / np.where(counted.any(1), counted.sum(1), np.nan)


def posed(samples):
    """(N,): the wrist and joint 9, which align and scale the pose, are valid."""
    return samples.valid[:, 0] & samples.valid[:, 9]


def bone(xyz):
    """(..., 21, 3) -> length of the bone from the wrist to joint 9."""
    return np.linalg.norm(xyz[..., 9, :] - xyz[..., 0, :], axis=-1)


def scaled_pose(xyz):
    """(..., 21, 3) -> the same relative to the wrist, in lengths of the bone 0-9; in mm where that has none."""
    length = bone(xyz)[..., None, None]
    return (xyz - xyz[..., :1, :]) / np.where(length > 0, length, 1)


def crop_uv(samples, args):
    """-> the samples' uv (N, 21, 2) in their test crops, in pixels of the network's input."""
    scale = (args.input_size / np.maximum(samples.side, 1e-3))[:, None, None]
    return (samples.uv - samples.centre[:, None]) * scale + (args.input_size - 1) / 2


def write_predictions(out, samples, uv, pose, args, length=None):
    """The files of a run, from uv and pose as of `predict`. With a length of the bone 0-9 in mm there is no truth."""
    arrays, error = dict(pred_uv=uv), None
    if length is None:
        error = pose_error(pose, samples)
        arrays |= dict(gt_uv=crop_uv(samples, args), gt_xyz=samples.xyz)
        save_array(out / "valid.npy", samples.valid)
        known = samples.xyz.any(2)
        whole = known[:, 0] & known[:, 9]  # the others have no bone 0-9: a median one takes its place
        length = np.where(whole, bone(samples.xyz), np.median(bone(samples.xyz[whole])))[:, None, None]
        if args.dataset == "assemblyhands":  # its toolkit aligns by every wrist with a place, valid or not
            save_array(out / "wrist.npy", known[:, 0])
    xyz = pose * length + samples.xyz[:, :1]
    for name, array in arrays.items():
        save_array(out / f"{name}.npy", array.astype(np.float32))
    with atomic(out / "names.txt") as file:
        for i, path, left in zip(samples.index, map(os.fsdecode, samples.path), samples.left):
            path = os.path.join(args.predict or args.root, path)
            file.write(os.fsencode(f"{i}\t{path}\t{'left' if left else 'right'}\n"))
    draw_overlay(out / "overlay.jpg", samples, uv, arrays.get("gt_uv"), error, args)
    save_array(out / "pred_xyz.npy", xyz.astype(np.float32))  # last: where it is, the run is complete
    print(f"{len(samples)} pictures; wrote {out}/pred_xyz.npy, see overlay.jpg beside it")


def draw_overlay(path, samples, pred_uv, true_uv, error, args, columns=8):
    """Pictures with the predicted skeleton in colours: a row each of the best, median and worst, the true one in white;
    without errors, of the first, middle and last."""
    order = np.arange(len(samples)) if error is None else np.argsort(error)[:max(np.isfinite(error).sum(), 1)]
    columns = max(1, min(columns, len(order) // 3))
    middle = (len(order) - columns) // 2
    tiles = []
    for i in [*order[:columns], *order[middle:middle + columns], *order[-columns:]]:
        (image, _), words = cut(samples, i, args.root, crop_view(samples, i, args, 256), 256), ""
        if error is not None:
            words = f"{error[i]:.1f} mm"
            image = draw_hand(image, (true_uv[i] + 0.5) * 256 / args.input_size - 0.5, (255, 255, 255))
        tiles.append(draw_hand(image, (pred_uv[i] + 0.5) * 256 / args.input_size - 0.5, None, words))
    save_image(path, sheet(tiles, columns))


if __name__ == "__main__":
    run_script(main)
