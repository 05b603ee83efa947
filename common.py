"""What two or more of the five scripts share.

In this order: backbone, geometry and views, loss (the method: a reader of the paper may stop
after it), files, runs, drawing.

Pictures are RGB uint8 (H, W, 3). Pixel centres lie at whole numbers, as in OpenCV: a picture of
side S covers -0.5 .. S - 0.5, and its centre is (S - 1) / 2. Keypoints are in MediaPipe's order,
which is FreiHAND's.
"""

import codecs
import contextlib
import dataclasses
import fcntl
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- backbone

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# ImageNet's mean and deviation, of 255.
COLOURS = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])


def load_backbone(name, path):
    """A torchvision ResNet with fc = Identity: pictures (N, 3, H, W) -> features (N, width).

    Its attribute `width` is the number of features, 512 or 2048. path: "none" (random weights),
    "imagenet" (torchvision's IMAGENET1K_V1), or a file: ours, torchvision's, SiMHand's or PeCLR's
    release, an official training checkpoint, or a network that holds this ResNet under a prefix.
    Keys that do not fit exactly raise an InputError that names some.
    """
    from torchvision import models  # here, because it takes as long to import as all the rest

    try:
        network = getattr(models, name)(weights="IMAGENET1K_V1" if path == "imagenet" else None)
    except OSError as error:
        raise InputError(f"--weights imagenet: torchvision could not download them ({error})")
    network.width = network.fc.in_features
    network.fc = nn.Identity()
    if path in ("none", "imagenet"):
        return network
    state = read_weights(path, network)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # names all keys that are missing or surplus, each kind on a line
        kinds = [line.strip()[:120] for line in str(error).splitlines()[1:4]]
        raise InputError(f"{path}: not the weights of a {name}: {'; '.join(kinds)}")
    bad = [key for key, value in state.items() if not torch.isfinite(value.float()).all()]
    require(not bad, f"{path}: weights must be finite, not so: {', '.join(bad[:6])}")
    return network


def read_weights(path, network):
    """The weights of a ResNet like this in a file of any published layout, without fc -> {name in
    torchvision: tensor}."""
    state = load_checkpoint(path)
    if isinstance(state, dict):
        state = state.get("state_dict", state)  # PeCLR's and the official ones are wrapped
    is_state_dict = isinstance(state, dict)
    if is_state_dict:
        named = all(isinstance(key, str) for key in state)
        is_state_dict = named and all(map(torch.is_tensor, state.values()))
    require(is_state_dict, f"{path}: expected a state dict, that is names and tensors only")
    # Official training checkpoints number the ResNet's children.
    for number, (child, _) in enumerate(network.named_children()):
        state = {key.replace(f"encoder.features.{number}.", f"encoder.{child}."): value
                 for key, value in state.items()}
    # DataParallel writes "module." before each name, MoCo "module.encoder_q.".
    prefixes = [key.removesuffix("conv1.weight") for key in state if key.endswith("conv1.weight")]
    found = [prefix for prefix in prefixes if f"{prefix}layer4.0.conv1.weight" in state]
    prefix = found[0] if found else ""
    if prefix:
        print(f"{path}: the ResNet under {prefix} is used")
    return {key.removeprefix(prefix): value for key, value in state.items()
            if key.startswith(prefix) and not key.startswith(f"{prefix}fc.")}


def batchnorms(network):
    """All BatchNorm layers of a network."""
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def normalise(images):
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W), channels last in memory, ImageNet mean 0,
    deviation 1."""
    # Non-blocking, since a host that waits would stall a GPU.
    mean, deviation = COLOURS.to(images.device, non_blocking=True)
    return ((images.float() - mean) / deviation).permute(0, 3, 1, 2)


def forward(net, images, precision):
    """uint8 (N, H, W, 3) -> what a network makes of them."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return net(normalise(images))


# ----------------------------------------------------------------------------- geometry and views

# What is seen outside a picture. A straight black edge tells which way is up, and with that the
# angle of a view: the network then need not look at the hand.
BORDERS = {"mirror": cv2.BORDER_REFLECT_101, "black": cv2.BORDER_CONSTANT,
           "stretch": cv2.BORDER_REPLICATE}


def crop_matrix(centre, side, output_side, angle=0.0, shift=(0.0, 0.0)):
    """The affine matrix (2, 3) from the pixels of a picture to those of a square crop of it.

    The crop shows the square of this side around `centre` (x, y), `output_side` pixels wide.
    angle: degrees by which the content is turned, as in cv2.getRotationMatrix2D: positive turns
    it counter-clockwise. shift: by how much the content is moved then, as a share of the output's
    side.
    """
    cos = math.cos(math.radians(angle))
    sin = math.sin(math.radians(angle))
    linear = np.array([[cos, sin], [-sin, cos]]) * output_side / side
    middle = (output_side - 1) / 2 + np.asarray(shift) * output_side
    return np.concatenate([linear, (middle - linear @ centre)[:, None]], 1)


def move_points(matrix, points):
    """points (..., 2) moved by an affine matrix (2, 3)."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def rescale_points(points, factor):
    """points (..., 2) of a picture -> the same of the picture at `factor` times its size."""
    return (points + 0.5) * factor - 0.5


PALM = (5, 9, 13, 17)  # the joints whose mean, seen from the wrist, says where a hand points


def upright(keypoints):
    """Hands (N, 21, 2) without their place, size and direction -> (N, 21, 2) float64: the mean is
    0, the root mean square distance from it 1, and the mean of joints 5, 9, 13 and 17 lies above
    the wrist."""
    points = keypoints - keypoints.mean(1, keepdims=True, dtype=np.float64)
    size = np.sqrt(np.square(points).sum(2).mean(1))
    points /= np.maximum(size, 1e-9)[:, None, None]
    palm = points[:, PALM].mean(1) - points[:, 0]
    angle = np.arctan2(palm[:, 0], -palm[:, 1])  # from straight up, clockwise
    cos = np.cos(angle)[:, None]
    sin = np.sin(angle)[:, None]
    x = cos * points[:, :, 0] + sin * points[:, :, 1]
    y = cos * points[:, :, 1] - sin * points[:, :, 0]
    return np.stack([x, y], 2)


def best_turns(keypoints, others):
    """The turn of each other hand about its mean that brings it nearest to its partner, by least
    squares.

    keypoints, others (..., 21, 2), pixels -> (...) float32, degrees as in cv2.getRotationMatrix2D.
    """
    points = keypoints - keypoints.mean(-2, keepdims=True, dtype=np.float64)
    turned = others - others.mean(-2, keepdims=True, dtype=np.float64)
    sine = (points[..., 1] * turned[..., 0] - points[..., 0] * turned[..., 1]).sum(-1)
    cosine = (points * turned).sum((-2, -1))
    clockwise = np.degrees(np.arctan2(sine, cosine))  # y points down
    return -clockwise.astype(np.float32)


def pair_turns(keypoints, neighbours):
    """-> turns (N, K) float32, degrees as in cv2.getRotationMatrix2D, by which the picture of each
    neighbour must be turned so that its hand lies as the hand of that row does; NaN where there is
    no neighbour."""
    turns = np.full(neighbours.shape, np.nan, np.float32)
    for k, column in enumerate(neighbours.T):
        rows = np.flatnonzero(column >= 0)
        for some in np.array_split(rows, len(rows) // (1 << 16) + 1):  # bounds the memory
            turns[some, k] = best_turns(keypoints[some], keypoints[column[some]])
    return turns


@dataclasses.dataclass
class View:
    """How a view is made of a crop, and what the equivariance has to undo."""
    # (2, 3), crop pixels -> view pixels
    matrix: np.ndarray
    # Degrees as in cv2.getRotationMatrix2D: positive turned the content counter-clockwise.
    angle: float = 0.0
    # (2,), the hand's centre in the view, minus the view's, over the view's side.
    shift: np.ndarray = None
    # Factors on hue, saturation and value, and what is added to value; None: as they are.
    colour: tuple = None


def sample_view(rng, keypoints, crop_side, view_side, *, rotation=45.0, half_side=(0.9, 1.5),
                move=15 / 448, colour=True, turn=0.0):
    """A random view of a hand, as in PeCLR and SiMHand; that shifts go to both sides is ours.

    keypoints (21, 2) in crop pixels. rotation: largest angle, degrees. half_side: range of half
    the view's side, in largest distances of a keypoint from the keypoints' mean. move: largest
    shift per axis, as a share of the crop's side. turn: degrees that bring the hand to lie as its
    partner does; the picture is turned by angle + turn, and the equivariance undoes only the
    angle.
    """
    draws = iter(rng.random(8).tolist())

    def draw(low, high):
        return low + (high - low) * next(draws)

    angle = draw(-rotation, rotation)
    half = draw(*half_side)
    x = draw(-move, move)
    y = draw(-move, move)
    hue = draw(0.01, 1)
    saturation = draw(0.01, 1)
    value = draw(0.5, 1)
    add = draw(5, 20)
    centre = keypoints.mean(0, dtype=np.float64)
    radius = np.hypot(*(keypoints - centre).T).max()
    side = 2 * half * max(radius, 1e-3)
    shift = np.array([-x, -y]) * crop_side / side
    matrix = crop_matrix(centre, side, view_side, angle + turn, shift)
    return View(matrix, angle, shift, (hue, saturation, value, add) if colour else None)


def apply_view(view, image, keypoints, view_side, border="mirror"):
    """image (H, W, 3) and keypoints (21, 2) of the crop -> those of the view.

    border: what is seen outside the crop, a key of BORDERS. Colours change in HSV with red and
    blue exchanged, as published: skin then has a hue of 17-114, which a factor really changes.
    """
    image = cv2.warpAffine(image, view.matrix, (view_side, view_side), flags=cv2.INTER_LINEAR,
                           borderMode=BORDERS[border])
    if view.colour is not None:
        *factors, add = view.colour
        table = np.arange(256.0)[:, None] * factors + (0, 0, add)
        table = np.minimum(table, 255).astype(np.uint8)
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)  # of an RGB picture: exchanged
        image = cv2.cvtColor(cv2.LUT(hsv, table[None]), cv2.COLOR_HSV2BGR)
    return image, move_points(view.matrix, keypoints).astype(np.float32)


# --------------------------------------- loss: equivariance, pair weights, weighted NT-Xent

def undo_view(projection, angle, shift):
    """Undo a view's shift and rotation in the projection space (PeCLR's equivariance). A new
    tensor.

    projection (N, M, 2): L2-normalised, read as M points in the plane, y down. angle (N,) degrees
    and shift (N, 2) as a fraction of the view's side, both as in `View`. Range and mean carry no
    gradient.
    """
    low, high = projection.detach().aminmax(dim=1, keepdim=True)
    moved = projection - shift[:, None] * (high - low)
    mean = moved.detach().mean(1, keepdim=True)
    radians = torch.deg2rad(angle)[:, None]
    cos = torch.cos(radians)
    sin = torch.sin(radians)
    x, y = (moved - mean).unbind(2)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], 2) + mean


@torch.no_grad()
def pair_weights(keypoints1, keypoints2, kind="linear", slope_pos=1.0, slope_neg=0.05):
    """Weights of the N positive pairs (N,) and of all pairs of the 2N views (2N, 2N) (SiMHand's
    adaptive weighting).

    keypoints1, keypoints2: (N, J, C), row i of both is a positive pair; network-input pixels, or
    J = 1 PCA embedding. With d the mean over J of the Euclidean distances, positives and all
    pairs apart:
        linear     w = (d_max - d) / (d_max - d_min)
        nonlinear  w = 1 / (1 + exp(slope (d - mean d)))
        balanced   ours: the linear w over their mean. Linear weights of positives are larger than
                   those of all pairs, so that the loss falls when all embeddings draw together;
                   balanced ones are not.
    Where no two d differ by 1e-4 px or more, every weight is 1.
    """
    every = torch.cat([keypoints1, keypoints2])
    every = every.to(torch.promote_types(every.dtype, torch.float32))
    n = len(keypoints1)
    positive = torch.linalg.vector_norm(every[:n] - every[n:], dim=2).mean(1)
    pairs = all_distances(every)
    return weights_of(positive, kind, slope_pos), weights_of(pairs, kind, slope_neg)


def all_distances(keypoints):
    """(M, J, C) -> (M, M), the mean over J of the distances between any two."""
    count, joints, _ = keypoints.shape
    total = keypoints.new_zeros(count, count)
    by_joint = keypoints.permute(1, 2, 0).contiguous()
    # Some rows and one joint at a time: a (2N, 2N, 21, 2) tensor would take 45 GB at N = 8192.
    rows = max(1, 2 ** (24 if keypoints.is_cuda else 17) // count)
    for k in range(0, count, rows):
        for joint in by_joint:
            square = sum((x[k:k + rows, None] - x).square_() for x in joint)
            total[k:k + rows] += square.sqrt_()
    return total.div_(joints)


def weights_of(d, kind, slope):
    """Distances of any shape, which are overwritten -> weights, as in `pair_weights`."""
    low = d.amin()
    high = d.amax()
    equal = high - low < 1e-4
    if kind == "nonlinear":
        w = d.sub_(d.mean()).mul_(-slope).sigmoid_()
    else:
        w = d.neg_().add_(high).div_(torch.where(equal, 1.0, high - low))
    if kind == "balanced":
        w.div_(w.mean())
    return w.masked_fill_(equal, 1.0)


@torch.no_grad()
def soft_targets(keypoints1, keypoints2, temperature):
    """How each view's similarity should be spread over the others (ours, in place of weights) ->
    (2N, 2N): row i is the softmax over k != i of -d_ik / temperature, and 0 at k = i.

    keypoints1, keypoints2: (N, 21, 2), row i of both is a positive pair, the second hand turned
    as its pair says. d is the mean over the joints of the distance between two hands, each moved
    to its mean and of root mean square size 1. Every row sums to 1, on both sides of the
    cross-entropy, so that drawing all embeddings together gains nothing: linear weights, which
    are larger for positives than for others, allow that. As the temperature falls to 0, the
    nearest hand of the batch becomes the one positive. Near to it: Rank-N-Contrast (Zha et al.,
    NeurIPS 2023), which orders the batch by its labels' distances.
    """
    hands = torch.cat([keypoints1, keypoints2])
    hands = hands.to(torch.promote_types(hands.dtype, torch.float32))
    hands = hands - hands.mean(1, keepdim=True)
    size = hands.square().sum(2).mean(1).sqrt().clamp(min=1e-6)
    target = all_distances(hands / size[:, None, None])
    target.fill_diagonal_(math.inf)
    for some in target.split(4096):  # bounds the memory
        some.copy_(some.div_(-temperature).softmax(1))
    return target


def nt_xent(z1, z2, pos_weight=None, neg_weight=None, temperature=0.5, target=None):
    """SiMHand's weighted NT-Xent: mean over the 2N views i, with s the cosine similarity, of
        -log( exp(w_pos s(i, i+) / t) / sum over k != i of exp(w_neg(i, k) s(i, k) / t) )
    or, with soft targets p in place of the positive, of
        -sum over k != i of p_ik log( exp(s(i, k) / t) / sum over l != i of exp(s(i, l) / t) )

    z1, z2: (N, D), L2-normalised, row i of both is a positive pair. pos_weight (N,), neg_weight
    (2N, 2N), or None for 1; target (2N, 2N), of `soft_targets`, goes without weights. The sum
    includes the positive, with its w_neg. In float32 (float64 stays), under autocast too. Some
    rows at a time, computed again on the way back: autograd would keep (2N, 2N) matrices.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([z1, z2])
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        n = len(z1)
        rows = max(1, 2 ** 23 // n)

        def log_sums(z, k):  # of rows k .. k + rows, added up
            logits = z[k:k + rows] @ z.T
            weight = 1 if neg_weight is None else neg_weight[k:k + rows]
            logits = logits * (weight / temperature)
            itself = torch.arange(k, k + len(logits), device=z.device)[:, None]
            total = torch.logsumexp(logits.scatter(1, itself, -math.inf), 1).sum()
            if target is not None:
                total = total - (logits * target[k:k + rows]).sum()
            return total

        if rows >= 2 * n:
            total = log_sums(z, 0)
        else:
            total = sum(checkpoint(log_sums, z, k, use_reentrant=False, preserve_rng_state=False)
                        for k in range(0, 2 * n, rows))
        if target is None:
            weight = 1 if pos_weight is None else pos_weight
            positive = (z[:n] * z[n:]).sum(1) * weight / temperature
            total = total - 2 * positive.sum()
        return total / (2 * n)


# ------------------------------ files: read with checks, written under a private name

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
HANDS_DTYPE = np.dtype([("video", "<i4"), ("frame", "<i4"), ("time", "<f8"), ("box", "<f4", 4),
                        ("left", "?"), ("score", "<f4")])


class InputError(ValueError):
    """Something the user gave is wrong. The message names the file and what was expected; exit
    status 2."""


def require(condition, message):
    if not condition:
        raise InputError(message)


def program():
    """The running script's name, without .py."""
    return Path(sys.argv[0]).stem


@contextlib.contextmanager
def atomic(path):
    """Yields a binary file under a private name, which becomes `path` when the block ends without
    an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{program()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):  # torch.save makes a RuntimeError of a full disk
            raise InputError(f"{path}: could not be written: {cause.strerror or cause}")
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path, array):
    with atomic(path) as file:
        np.save(file, array)


def save_lines(path, lines):
    """Write a text file; names may hold bytes that are not UTF-8."""
    with atomic(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))


def save_image(path, image):
    encoded = cv2.imencode(Path(path).suffix, image[:, :, ::-1])[1]
    with atomic(path) as file:
        file.write(encoded)


def is_a(suffixes, name):
    """Whether a file's name ends so; hidden ones do not count, such as a Mac's ._a.jpg."""
    return name.lower().endswith(suffixes) and not name.startswith(".")


def read_picture(path):
    """A picture file -> RGB uint8 (H, W, 3), upright as its EXIF data say."""
    try:
        content = np.frombuffer(Path(path).read_bytes(), np.uint8)
        # Of a file that is cut short, cv2.imread would make a picture that ends in grey.
        image = cv2.imdecode(content, cv2.IMREAD_COLOR_RGB)
    except OSError as error:
        raise InputError(f"{path}: could not be read: {error.strerror}")
    except cv2.error:  # empty, or its header promises too many pixels
        image = None
    require(image is not None, f"{path}: cut short, or not a picture that OpenCV reads")
    return image


def read_lines(path):
    """The lines of a user's text file. UTF-16 is known by its mark; bytes that are not UTF-8 stay
    as they are in names of files."""
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16", "replace")
    else:
        text = os.fsdecode(content).removeprefix("\ufeff")
    require("\0" not in text, f"{path}: holds NUL bytes, expected text with one entry a line")
    return text.splitlines()


def load_array(path, dtype, shape, *, hint="", mmap=False, finite=True):
    """Read a .npy file, never running code from it. An InputError where it is missing, cut short,
    or differs in dtype, shape or finiteness.

    shape: numbers, None where any length will do. hint: what the user may do about a bad file.
    """
    dtype = np.dtype(dtype)
    hint = f" ({hint})" if hint else ""
    kind = f"records of {', '.join(dtype.names)}" if dtype.names else dtype.name
    lengths = ", ".join("N" if n is None else str(n) for n in shape)
    wanted = f"expected {kind} ({lengths}){hint}"
    require(Path(path).is_file(), f"{path}: missing, {wanted}")
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except Exception:  # what a damaged file raises depends on where it is damaged
        raise InputError(f"{path}: truncated or not a .npy file of numbers, {wanted}")
    fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape))
    require(fits and array.dtype == dtype, f"{path}: is {array.dtype} {array.shape}, {wanted}")
    fields = [array[name] for name in dtype.names] if dtype.names else [array]
    for field in fields:
        if finite and field.dtype.kind == "f" and not np.isfinite(field).all():
            row = np.argwhere(~np.isfinite(field))[0][0]
            raise InputError(f"{path}: values must be finite, row {row} is not{hint}")
    return array


@dataclasses.dataclass
class Hands:
    """An opened hands folder."""
    folder: Path
    crops: np.ndarray  # uint8, the JPEGs one after another; a memory map
    offsets: np.ndarray  # (N + 1,), crop i is crops[offsets[i]:offsets[i + 1]]
    keypoints: np.ndarray  # (N, 21, 2) in crop pixels
    rows: np.ndarray  # (N,) of HANDS_DTYPE
    videos: list  # names of the sources
    side: int = 0  # of the crops, pixels; 0: not known yet


def load_hands(folder):
    """Open and check a hands folder -> Hands."""
    folder = Path(folder)
    hint = "extract_hands.py writes it"
    require(folder.is_dir(), f"{folder}: no such folder, expected a hands folder ({hint})")
    keypoints = load_array(folder / "keypoints.npy", np.float32, (None, 21, 2), hint=hint)
    require(len(keypoints), f"{folder / 'keypoints.npy'}: holds no hand, expected at least one")
    extent = np.ptp(keypoints, axis=1).max(1)
    require(extent.all(), f"{folder / 'keypoints.npy'}: those of hand {extent.argmin()} are one "
            "point")
    offsets = load_array(folder / "offsets.npy", np.int64, (len(keypoints) + 1,), hint=hint)
    require(offsets[0] == 0 and (np.diff(offsets) > 0).all(),
            f"{folder / 'offsets.npy'}: must start at 0 and increase")
    rows = load_array(folder / "hands.npy", HANDS_DTYPE, (len(keypoints),), hint=hint)
    crops = load_array(folder / "crops.npy", np.uint8, (int(offsets[-1]),), hint=hint, mmap=True)
    videos = read_lines(folder / "videos.txt")
    needed = rows["video"].max() + 1
    require(rows["video"].min() >= 0 and needed <= len(videos),
            f"{folder / 'videos.txt'}: has {len(videos)} lines, expected {needed}")
    hands = Hands(folder, np.asarray(crops), offsets, keypoints, rows, videos)
    hands.side = len(read_crop(hands, 0))  # every other crop must have it too
    require(max(-keypoints.min(), keypoints.max()) < 10 * hands.side,
            f"{folder / 'keypoints.npy'}: some lie 10 crops away, expected pixels of crops of side "
            f"{hands.side}")
    return hands


def read_crop(hands, i):
    """Crop i of a hands folder -> RGB uint8 (side, side, 3)."""
    start, end = hands.offsets[i:i + 2]
    image = cv2.imdecode(hands.crops[start:end], cv2.IMREAD_COLOR_RGB)
    if image is None or image.shape[:2] != (hands.side or len(image),) * 2:
        raise InputError(f"{hands.folder}/crops.npy: crop {i}, at {start}, is not a JPEG like the "
                         "first")
    return image


def load_checkpoint(path):
    """A .pt file -> tensors, numbers, strings and containers of them; what could run code is
    refused."""
    require(Path(path).is_file(), f"{path}: missing, expected a checkpoint written by torch.save")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        thing = re.search(r"GLOBAL (\S+)", str(error))
        if thing:
            raise InputError(f"{path}: holds pickled objects ({thing[1]}), which are never loaded; "
                             "if you trust it, save only its tensors: torch.save(torch.load(FILE, "
                             "weights_only=False)['state_dict'], NEW)")
        raise InputError(f"{path}: truncated, or not a checkpoint written by torch.save")


# --------------------- runs: exit status, ranks, resuming, SIGTERM, the log, loader processes

def find_ranks():
    """-> this process's rank of torchrun or srun, the number of ranks, its share of this machine's
    cores."""
    def number(name, otherwise):
        return int(os.environ.get(name, otherwise))

    cores = sorted(os.sched_getaffinity(0))
    # A batch script, which runs once, sees SLURM_PROCID and SLURM_NTASKS too; only srun sets
    # SLURM_STEP_*, for each task that it starts.
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ:
        share = cores[number("LOCAL_RANK", 0)::number("LOCAL_WORLD_SIZE", 1)]
        return number("RANK", 0), number("WORLD_SIZE", 1), share or cores
    ranks = number("SLURM_STEP_NUM_TASKS", 1)
    if len(cores) >= number("SLURM_CPUS_ON_NODE", 0):  # else srun gave each task cores of its own
        tasks = math.ceil(ranks / number("SLURM_STEP_NUM_NODES", 1))
        cores = cores[number("SLURM_LOCALID", 0)::tasks] or cores
    return number("SLURM_PROCID", 0), ranks, cores


CORES = len(find_ranks()[2])  # of this process
HELD = contextlib.ExitStack()  # the locks of open_folder, which run_script lets go at its end


def run_script(main, when_full=""):
    """Run main(); whatever the user can mend ends in one line on stderr and status 2.

    when_full: what to do where the GPU's memory does not suffice, such as "; lower --batch-size".
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be in another encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return main()
    except (InputError, OSError, torch.cuda.OutOfMemoryError, KeyboardInterrupt) as error:
        traceback.clear_frames(error.__traceback__)  # closes bars: the message gets its own line
        stopped = isinstance(error, KeyboardInterrupt)
        message = "stopped; give the same command again" if stopped else str(error)
        if isinstance(error, torch.cuda.OutOfMemoryError):
            message = message.splitlines()[0] + when_full
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        print(f"{program()}.py: {message}", file=sys.stderr)
        sys.exit(130 if stopped else 2)
    finally:
        for child in multiprocessing.active_children():  # loader processes ignore SIGTERM
            child.kill()
        HELD.close()


def add_machine_flags(flag):
    """The flags of both trainings that do not concern the method."""
    flag("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    flag("--device", help="cpu or cuda (default: the GPU when there is one)")
    flag("--workers", type=int, default=min(16, CORES),
         help="loader processes of each rank, 0: none (default: one a core, 16 at most)")
    flag("--save-minutes", type=float, default=10,
         help="checkpoint this often, at the end, and when stopped by SIGTERM")


def check_flags(args):
    """What holds for the flags of every script: numbers are finite and not negative."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):
            limit = 2 ** 63 if isinstance(value, int) else math.inf
            flag = f"--{name.replace('_', '-')}"
            require(0 <= value < limit,
                    f"{flag} is {value}, expected a number that is finite and not negative")
    device = getattr(args, "device", None) or "cpu"
    require(re.fullmatch(r"cpu|cuda(:\d+)?", device), f"--device {device}: expected cpu or cuda")


def refuse_idle_flags(args, parser, names, reason):
    """An InputError that names the first of these flags that is given though it has no effect."""
    for name in names:
        require(getattr(args, name) == parser.get_default(name),
                f"--{name.replace('_', '-')} has no effect {reason}")


def print_settings(args, parser, **effective):
    """Once, at the start: the arguments, with the default beside those that differ from it, then
    what follows from them."""
    print("arguments:")
    for name, value in vars(args).items():
        default = parser.get_default(name)
        note = "" if default in (None, value) else f"  (default: {default})"
        print(f"  {name:18}  {value}{note}")
    print("effective:")
    for name, value in effective.items():
        print(f"  {name:18}  {value}", flush=True)


def pretrain_command(hands, pairs, pool):
    """The command that pre-trains on these folders, with `pool` hands that have a neighbour."""
    words = ["python", str(Path(sys.argv[0]).with_name("pretrain.py")), str(hands)]
    if pairs.resolve() != hands.resolve():
        words += ["--pairs", str(pairs)]
    if pool < 2 * 8192:  # pairs of a step by default; the probe keeps some hands
        words += ["--batch-size", str(2 ** max(int(np.log2(max(pool, 1) / 4)), 1))]
    return shlex.join([*words, "--out", f"runs/{pairs.resolve().name}"])


def progress(items=None, **options):
    """A tqdm bar. In a log file, where nobody watches, it prints a line every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(items, mininterval=interval, maxinterval=max(interval, 10), **options)


def open_folder(folder, rank=0, ranks=1):
    """Make an output folder, lock it until the script ends, and clear what a killed run left. ->
    the lock.

    Each rank locks its own share of the lock file's bytes: the ranks of a run do not exclude each
    other, but another run does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = HELD.enter_context(open(folder / ".lock", "w"))
    start = rank * 2 ** 40 // ranks
    end = (rank + 1) * 2 ** 40 // ranks
    try:  # a child process does not inherit the lock
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, end - start, start)
    except OSError as error:
        raise InputError(f"{folder}: could not be locked ({error.strerror}): another run is "
                         "writing to it, or its file system has no locks; choose another folder")
    if ranks == 1:
        for left in folder.glob(f".*.{program()}.*.tmp"):  # not those of another script at work
            left.unlink()
    return lock


@dataclasses.dataclass
class Plan:
    """How a training is divided over ranks, steps and processes."""
    rank: int
    ranks: int
    device: torch.device
    precision: str  # bf16 or fp32
    workers: int  # loader processes of each rank
    batch_size: int  # of a step, over all ranks
    pieces: int = 1  # of a rank's share of a batch: they pass the network one after another
    steps_per_epoch: int = 0
    steps: int = 0

    @property
    def report_every(self):
        """Steps between two rows of the log."""
        return max(1, min(10, self.steps_per_epoch // 4))

    @property
    def micro_batch(self):
        """Items of a piece."""
        return self.batch_size // self.ranks // self.pieces


def start_ranks(device):
    """Join the other processes of torchrun, if any. -> rank, number of ranks, device."""
    rank = int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    require(ranks == 1 or device.index is None,
            f"--device {device} would put all {ranks} ranks on one GPU: expected --device cuda")
    # Whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says, which some containers set: with products in
    # TF32 most mined neighbours would be wrong, and the loss would lose digits.
    torch.set_float32_matmul_precision("highest")
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        count = torch.cuda.device_count()
        require(device.index < count, f"--device {device}: this machine has {count} GPUs, fewer "
                f"than rank {rank} needs")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same, so that its trials pay
    if ranks > 1:
        on_gpu = device.type == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                                device_id=device if on_gpu else None)
    return rank, ranks, device


def spread(model, device):
    """The model as all ranks train it together; of a single process the model itself. After each
    step `average_statistics` makes the ranks' BatchNorm layers the same."""
    if not dist.is_initialized():
        return model
    devices = [device] if device.type == "cuda" else None
    net = nn.parallel.DistributedDataParallel(model, device_ids=devices)
    # Else each forward pass would replace all running statistics by those of rank 0. As an
    # argument it has another name since torch 2.14.
    net.broadcast_buffers = False
    return net


def average_statistics(model):
    """Make BatchNorm's running statistics the mean over all ranks, each of which saw its share of
    the batch. Layers in eval mode stay as they are, to the last bit."""
    statistics = []
    for norm in batchnorms(model):
        if norm.training:
            statistics += [norm.running_mean, norm.running_var]
    if dist.is_initialized() and statistics:
        mean = over_ranks(torch.cat(statistics)) / dist.get_world_size()
        parts = mean.split([len(part) for part in statistics])
        torch._foreach_copy_(statistics, list(parts))


def end_ranks():
    """Wait for all ranks: if one failed at its end, torchrun would kill the rank that still
    writes."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def over_ranks(tensor):
    """The sum of all ranks' tensors, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(*flags):
    """For each flag whether it is set on any rank: the same answer on all, so that all do the
    same."""
    return over_ranks(torch.tensor(flags).int()).bool().tolist()  # on the host: no device waits


KEPT = "the checkpoint stays as it is; try a smaller --lr or --precision fp32 in another --out"


def save_checkpoint(out, settings, data, step, model, optimizer, **more):
    """Write all that a training needs to go on. data: a checksum of what it is trained on."""
    finite = all(tensor.isfinite().all() for tensor in model.state_dict().values())
    require(finite, f"{out}: a weight is not finite after step {step}; {KEPT}")
    with atomic(Path(out) / "checkpoint.pt") as file:
        torch.save(dict(args=settings,
                        data=data,
                        step=step,
                        model=model.state_dict(),
                        optimizer=optimizer.state_dict(),
                        **more), file)


def plain(args, **effective):
    """The settings of a run: argparse's result and what follows from it, as a dict that json and
    torch.load(weights_only=True) can hold."""
    return json.loads(json.dumps(vars(args) | effective, default=str))


def open_run(out, settings, data, may_change, rank):
    """Make the folder of a training, and lock it until the script ends -> its checkpoint, or None
    where there is none.

    may_change: names of settings that cannot change the result; any other that differs from the
    checkpoint's is an error, and so are other data, and a checkpoint that not all ranks see.
    """
    path = Path(out) / "checkpoint.pt"
    require(not path.with_name("keypoints.npy").exists(),
            f"{out}: is a hands folder, choose another --out")
    if rank == 0:
        open_folder(out)
    content = load_checkpoint(path) if path.exists() else None
    if content:
        require(isinstance(content, dict) and {"args", "data", "step"} <= content.keys()
                and isinstance(content["args"], dict), f"{path}: not the checkpoint of such a run")
        refuse_other_arguments(out, content["args"], settings, may_change)
        require(content["data"] == data,
                f"{out}: was trained on other hands, pairs or labels; choose another --out")
    step = content["step"] if content else 0
    if dist.is_initialized():
        least = torch.tensor([step, -step])
        dist.all_reduce(least, dist.ReduceOp.MIN)
        require(least.sum() == 0, f"{out}: one rank finds step {least[0]}, another "
                f"{-least[1]}; expected a folder that all nodes share")
    return content


def refuse_other_arguments(folder, old, settings, may_change):
    """An InputError that names what differs from the settings of the run that the folder holds."""
    differ = []
    for key in sorted({*old, *settings} - {*may_change}):
        if old.get(key) != settings.get(key):
            flag = f"--{key.replace('_', '-')}"
            differ.append(f"{flag} was {old.get(key)}, is {settings.get(key)}")
    require(not differ, f"{folder}: holds a run with other arguments ({'; '.join(differ)}); choose "
            "another --out")


def run_facts(*packages):
    """What made a result: the versions of Python and packages, the machine (the GPU once the run
    has used it), and our commit."""
    facts = {"python": platform.python_version(), "torch": torch.__version__,
             "torchvision": importlib.metadata.version("torchvision"), "numpy": np.__version__,
             "opencv": cv2.__version__}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    if torch.cuda.is_initialized():
        facts["machine"] = torch.cuda.get_device_name()
    else:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        facts["machine"] = model[1] if model else platform.machine()
    commit = commit_of(Path(__file__).resolve().parent)
    return facts | {"commit": commit} if commit else facts


def commit_of(folder):
    """The commit of a git checkout, with a + where files differ from it; None for any other
    folder."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--exclude=*", "--abbrev=12",
               "--dirty=+"]
    # Not that of a repository around it: our files may have been copied there.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    try:
        found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return found.stdout.strip() or None


def start_log(folder, settings, step=0, packages=(), name="log.jsonl"):
    """Start a log with the command, all settings, and what runs them (see `run_facts`, to which
    `packages` go). -> the rows kept: those up to the checkpoint's step."""
    path = Path(folder) / name
    first = {"command": shlex.join(sys.argv), "args": settings, "facts": run_facts(*packages)}
    rows = []
    if step and path.exists():
        rows = [row for row in read_log(path)[1:] if row.get("step", 0) <= step]
    save_lines(path, map(json.dumps, [first, *rows]))
    return rows


def logged_settings(folder):
    """The settings in the first line of a folder's log.jsonl; none where it has no log, or
    another program's."""
    path = Path(folder) / "log.jsonl"
    rows = read_log(path) if path.exists() else []
    settings = rows[0].get("args") if rows else None
    return settings if isinstance(settings, dict) else {}


def write_log(folder, row, name="log.jsonl"):
    with open(Path(folder) / name, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_log(path):
    """log.jsonl -> list of dicts; a last line cut short by a kill is left out."""
    try:
        lines = Path(path).read_text().splitlines(keepends=True)
        return [dict(json.loads(line)) for line in lines if line.endswith("\n")]
    except (TypeError, ValueError):
        raise InputError(f"{path}: expected one JSON object a line")


def catch_sigterm():
    """A list that becomes non-empty when SIGTERM arrives; a second SIGTERM ends the process at
    once."""
    received = []

    def handler(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, handler)
    return received


def report(out, step, recent, optimizer, plan):
    """A row of the log: the means of the recent steps' values, {name: tensor} each, over all
    ranks. Only here does the host wait for the device."""
    values = torch.stack([torch.stack(list(each.values())) for each in recent])
    means = (over_ranks(values.double().mean(0)) / plan.ranks).tolist()
    require(all(map(math.isfinite, means)), f"{out}: the loss is not finite by step {step}; {KEPT}")
    return {"step": step, "epoch": round(step / plan.steps_per_epoch, 3),
            "lr": optimizer.param_groups[0]["lr"], **dict(zip(recent[0], means))}


def items_of_steps(first, end, count, plan, seed):
    """Yields the pieces of this rank's share of each batch, from step `first` on: lists of (epoch,
    item), the items being 0 to count - 1.

    Each epoch has a new order, in which each item comes at most once: what is left after the last
    whole batch is left out.
    """
    order = None
    share = plan.batch_size // plan.ranks
    for step in range(first, end):
        epoch, place = divmod(step, plan.steps_per_epoch)
        if order is None or place == 0:
            order = np.random.default_rng((seed, epoch)).permutation(count)
        start = place * plan.batch_size + plan.rank * share
        for k in range(start, start + share, plan.micro_batch):
            yield [(epoch, item) for item in order[k:k + plan.micro_batch].tolist()]


class Batches:
    """Item `batch`, a list: collate(list(map(make, batch))), or the InputError that was raised:
    from a loader process torch would pass on only its text, inside a traceback."""

    def __init__(self, make, collate):
        self.make = make
        self.collate = collate

    def __getitem__(self, batch):
        try:
            return self.collate([self.make(item) for item in batch])
        except InputError as error:
            return error


def load_items(make, batches, workers, collate, pin_memory=False):
    """Yields collate([make(item) for item in batch]) for each batch, by `workers` processes.

    Leaves the global random state alone. Raises InputError where a process dies, as when memory or
    /dev/shm is full.
    """
    # A forked process has all data already. Any other start, Python's default from 3.14 on, would
    # send each process a copy: of a memory-mapped crops.npy the whole file. Loader processes never
    # touch CUDA, which a forked process could not use.
    start = "fork" if workers else None
    try:
        loader = iter(torch.utils.data.DataLoader(
            Batches(make, collate), batch_size=None, sampler=batches, num_workers=workers,
            collate_fn=lambda batch: batch, worker_init_fn=start_worker, pin_memory=pin_memory,
            multiprocessing_context=start, generator=torch.Generator()))
        # torch's own handler would raise in the midst of whatever goes on when a process dies.
        # Without it, torch finds that out when it looks after them, every five seconds.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for batch in loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch
    except (EOFError, ConnectionError, RuntimeError) as error:
        if not workers:
            raise
        reason = (str(error).strip() or repr(error)).splitlines()[-1]
        raise InputError(f"a loader process failed ({reason}); where memory or /dev/shm is full, "
                         "lower --workers")


def to_device(batch, device):
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def start_worker(number):
    cv2.setNumThreads(0)  # one process a core: threads inside would only get in each other's way
    # The parent decides when to stop; it still needs the batches under way.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------- drawing: skeletons, contact sheets, curves

PARENTS = (0, 0, 1, 2, 3, 0, 5, 6, 7, 0, 9, 10, 11, 0, 13, 14, 15, 0, 17, 18, 19)
# Of thumb to little finger, RGB.
FINGER_COLOURS = ((255, 140, 0), (80, 220, 60), (60, 200, 255), (70, 90, 255), (230, 80, 230))


def draw_hand(image, keypoints, colour=None, text=""):
    """A copy of image (H, W, 3) with the skeleton of keypoints (21, 2), by finger or in one
    colour."""
    image = np.ascontiguousarray(image).copy()
    sixteenths = np.clip(keypoints, -1e4, 1e4) * 16  # with shift = 4 OpenCV draws to 1/16 px
    points = np.round(sixteenths).astype(int)
    width = max(1, round(image.shape[0] / 150))
    for joint in range(1, 21):
        start = points[PARENTS[joint]].tolist()
        end = points[joint].tolist()
        shade = colour or FINGER_COLOURS[(joint - 1) // 4]
        cv2.line(image, start, end, shade, width, cv2.LINE_AA, 4)
    size = image.shape[0] / 380
    for x, y, shade in ((2, 0, 0), (4, 0, 0), (3, -1, 0), (3, 1, 0), (3, 0, 255)):
        place = (x, y + round(26 * size))  # white letters with a black edge
        cv2.putText(image, text, place, 0, size, (shade,) * 3, 1, cv2.LINE_AA)
    return image


def draw_crop(hands, i, side, text="", turn=0.0):
    """Crop i of a hands folder at another side, with its skeleton, turned about its middle by
    `turn` degrees."""
    image = cv2.resize(read_crop(hands, i), (side, side), interpolation=cv2.INTER_AREA)
    points = rescale_points(hands.keypoints[i], side / hands.side)
    if turn:
        middle = (side - 1) / 2
        matrix = crop_matrix((middle, middle), side, side, float(turn))
        image = cv2.warpAffine(image, matrix, (side, side), borderMode=BORDERS["mirror"])
        points = move_points(matrix, points)
    return draw_hand(image, points, text=text)


def sheet(tiles, columns):
    """Pictures of one size -> one picture, `columns` in a row, black where the last row ends
    early."""
    tiles = list(tiles)
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[k:k + columns]) for k in range(0, len(tiles), columns)]
    return np.vstack(rows)


@contextlib.contextmanager
def figure(path, size, dpi=110):
    """Yields a matplotlib Figure of this size (width, height) in inches and writes it to `path`
    when the block ends. A plot that cannot be drawn costs one line, not the run."""
    # Before matplotlib is imported: a notebook names a backend that this environment may not have,
    # and none is needed to write a file.
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib import style  # here, since few processes draw
    from matplotlib.figure import Figure

    with style.context("default"):  # a user's own may ask for LaTeX or for fonts that are not here
        try:
            drawn = Figure(size, dpi=dpi, layout="tight")
            yield drawn
            with atomic(path) as file:
                drawn.savefig(file, format=Path(path).suffix[1:])
        except Exception as error:
            print(f"{path}: could not be drawn ({error})", file=sys.stderr)


def plot_curves(path, rows, groups):
    """One panel for each list of keys in `groups`, over the step, from the rows of a log; what was
    not logged is left out."""
    logged = {key for row in rows for key in row}
    groups = [keys for keys in groups if logged.intersection(keys)]
    with figure(path, (4.2 * len(groups), 3.2)) as drawn:
        axes = drawn.subplots(1, len(groups), squeeze=False)[0]
        for axis, keys in zip(axes, groups):
            for key in keys:
                shown = [row for row in rows if key in row]
                if shown:
                    steps = [row["step"] for row in shown]
                    axis.plot(steps, [row[key] for row in shown], label=key)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
