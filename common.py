"""What two or more of the five scripts share, in six sections.
Pictures are RGB uint8 (H, W, 3). Pixel centres lie at whole numbers, as in OpenCV: a picture of side S covers
-0.5 .. S - 0.5 and its centre is (S - 1) / 2. Keypoints are in MediaPipe's order, which is FreiHAND's.
"""

import contextlib
import fcntl
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait must not keep a core busy

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# backbone: torchvision ResNets, and the layouts in which their weights come -------------------------------------------
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
COLOURS = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])  # ImageNet's mean and deviation, of 255


def load_backbone(name, path):
    """torchvision ResNet `name` with fc = Identity: pictures (N, 3, H, W) -> features (N, 512 or 2048).
    path: "none" (random), "imagenet" (torchvision's IMAGENET1K_V1), or a file: ours, torchvision's, SiMHand's or
    PeCLR's release, or an official training checkpoint. Keys that do not fit exactly raise InputError naming them."""
    from torchvision import models  # here: it takes as long to import as all the rest
    try:
        network = getattr(models, name)(weights="IMAGENET1K_V1" if path == "imagenet" else None)
    except OSError as error:
        raise InputError(f"--weights imagenet: torchvision could not download the weights ({error})")
    network.fc = torch.nn.Identity()
    if path in (None, "none", "imagenet"):
        return network
    state = load_checkpoint(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else None  # PeCLR's and official ones are wrapped
    require(state and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()),
            f"{path}: expected a state dict of a torchvision {name}, that is names and tensors only")
    numbered = [(re.match(r"encoder\.features\.([0-7])\.(.*)", key), value) for key, value in state.items()]
    if any(match for match, _ in numbered):  # official checkpoints number the ResNet's children, and carry more beside
        names = [child for child, _ in network.named_children()]
        state = {f"{names[int(match[1])]}.{match[2]}": value for match, value in numbered if match}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # it names every key that is missing, unexpected or of another shape
        raise InputError(f"{path}: not the weights of a {name}: {' '.join(str(error).split())[:500]}")
    bad = [key for key, value in state.items() if not torch.isfinite(value.float()).all()]
    require(not bad, f"{path}: weights must be finite, not so: {', '.join(bad[:6])}")
    return network


# views: one affine matrix and one colour table per view ---------------------------------------------------------------
# What is seen outside a picture. A straight black edge tells which way is up, and with that the angle of a view.
BORDERS = {"mirror": cv2.BORDER_REFLECT_101, "black": cv2.BORDER_CONSTANT}


def best_turns(keypoints, others):
    """The turn of each other hand about its mean that brings it nearest to its partner, least squares in the plane.
    keypoints, others (..., 21, 2), pixels -> (...) float32 degrees as in cv2.getRotationMatrix2D."""
    points = keypoints - keypoints.mean(-2, keepdims=True, dtype=np.float64)
    turned = others - others.mean(-2, keepdims=True, dtype=np.float64)
    sine = (points[..., 1] * turned[..., 0] - points[..., 0] * turned[..., 1]).sum(-1)
    cosine = (points * turned).sum((-2, -1))
    return -np.degrees(np.arctan2(sine, cosine)).astype(np.float32)  # y points down: counter-clockwise is negative


def sample_view(rng, keypoints, crop_side, view_side, *, rotation=45.0, margin=(0.9, 1.5), move=15 / 448, colour=True,
                turn=0.0):
    """One random view of a hand (as in PeCLR and SiMHand; shifts to both sides are ours), a dict of
      matrix (2, 3)  crop pixels -> view pixels, turned by `angle + turn`
      angle          degrees as in cv2.getRotationMatrix2D: positive turns the content counter-clockwise
      shift (2,)     where the hand's centre lies in the view, minus the view's centre, over the view's side
      colour (4,)    factors on hue, saturation and value, and what is added to value; None: colours stay
    keypoints (21, 2) in crop pixels. rotation: degrees to either side. margin: range of the view's half side in largest
    distances of a keypoint from their mean. move: largest shift per axis, as a share of the crop's side. turn: degrees
    that bring the hand to lie as its partner does; the angle, which the equivariance undoes, is without it."""
    ranges = ((-rotation, rotation), margin, (-move, move), (-move, move), (0.01, 1), (0.01, 1), (0.5, 1), (5, 20))
    angle, scale, x, y, *factors = [a + (b - a) * u for (a, b), u in zip(ranges, rng.random(8).tolist())]
    centre = keypoints.mean(0, dtype=np.float64)
    square = 2 * scale * max(np.hypot(*(keypoints - centre).T).max(), 1e-3)
    shift = np.array([-x, -y]) * crop_side / square
    cos, sin = math.cos(math.radians(angle + turn)), math.sin(math.radians(angle + turn))
    linear = np.array([[cos, sin], [-sin, cos]]) * view_side / square
    matrix = np.concatenate([linear, ((view_side - 1) / 2 + shift * view_side - linear @ centre)[:, None]], 1)
    return dict(matrix=matrix, angle=angle, shift=shift, colour=factors if colour else None)


def apply_view(view, image, keypoints, view_side, border="mirror"):
    """image (H, W, 3) and keypoints (21, 2) of the crop -> those of the view; outside the crop: a key of BORDERS.
    Colours change in HSV with red and blue exchanged, as published: skin has a hue of 17-114 then, which a factor
    really changes."""
    image = cv2.warpAffine(image, view["matrix"], (view_side, view_side), flags=cv2.INTER_LINEAR,
                           borderMode=BORDERS[border])
    if view["colour"] is not None:
        *factors, add = view["colour"]
        table = np.minimum(np.arange(256.0)[:, None] * factors + (0, 0, add), 255).astype(np.uint8)
        hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), table[None])  # BGR on an RGB picture: exchanged
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    return image, (keypoints @ view["matrix"][:, :2].T + view["matrix"][:, 2]).astype(np.float32)


def normalise(images):
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W), channels last in memory, ImageNet mean 0 and deviation 1."""
    mean, deviation = COLOURS.to(images.device, non_blocking=True)  # at once: a host that waited would stall a GPU
    return ((images.float() - mean) / deviation).permute(0, 3, 1, 2)


# loss: equivariance, pair weights, weighted NT-Xent -------------------------------------------------------------------
def undo_view(projection, angle, shift):
    """Undo a view's shift and rotation in the projection space (PeCLR's equivariance). Returns a new tensor.
    projection (N, M, 2): L2-normalised, read as M points in the plane, y down. angle (N,) degrees and shift (N, 2) as
    a fraction of the view's side, both as in `sample_view`. Range and mean carry no gradient."""
    low, high = projection.detach().aminmax(dim=1, keepdim=True)
    moved = projection - shift[:, None] * (high - low)
    mean = moved.detach().mean(1, keepdim=True)
    cos, sin = (f(torch.deg2rad(angle))[:, None] for f in (torch.cos, torch.sin))
    x, y = (moved - mean).unbind(2)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], 2) + mean


@torch.no_grad()
def pair_weights(keypoints1, keypoints2, kind="linear", slope_pos=1.0, slope_neg=0.05):
    """Weights of the N positive pairs (N,) and of all pairs of the 2N views (2N, 2N) (SiMHand's adaptive weighting).
    keypoints1, keypoints2: (N, J, C), row i of both is a positive pair; network-input pixels, or J = 1 PCA embedding.
    d, the mean over J of Euclidean distances, gives w = (d_max - d) / (d_max - d_min) if "linear" and w = 1 / (1 +
    exp(slope (d - mean d))) if "nonlinear", positives and all pairs apart; 1 where no d differ by 1e-4 px or more.
    "balanced" is ours: linear weights over their mean, positives and all pairs apart. Linear ones of positives are
    larger than those of all pairs, so that the loss falls when all embeddings draw together; balanced ones are not."""
    if kind not in ("linear", "nonlinear", "balanced"):
        raise ValueError(f"kind must be linear, nonlinear or balanced, not {kind}")
    def weights(d, slope):
        low, high = d.amin(), d.amax()
        equal = high - low < 1e-4
        if kind == "nonlinear":
            w = d.sub_(d.mean()).mul_(-slope).sigmoid_()
        else:
            w = d.neg_().add_(high).div_(torch.where(equal, 1.0, high - low))
        if kind == "balanced":
            w.div_(w.mean())
        return w.masked_fill_(equal, 1.0)
    every = torch.cat([keypoints1, keypoints2]).to(torch.promote_types(keypoints1.dtype, torch.float32))
    positive = torch.linalg.vector_norm(every[:len(keypoints1)] - every[len(keypoints1):], dim=2).mean(1)
    pairs, by_joint = every.new_zeros(len(every), len(every)), every.permute(1, 2, 0).contiguous()
    few = max(1, 2 ** (24 if every.is_cuda else 17) // len(every))  # rows at a time: a (2N, 2N, 21, 2) tensor
    for k in range(0, len(every), few):  # would take 45 GB at N = 8192
        for joint in by_joint:
            pairs[k:k + few] += sum((x[k:k + few, None] - x).square_() for x in joint).sqrt_()
    return weights(positive, slope_pos), weights(pairs.div_(every.shape[1]), slope_neg)


def nt_xent(z1, z2, pos_weight=None, neg_weight=None, temperature=0.5):
    """SiMHand's weighted NT-Xent: mean over the 2N views i, with s the cosine similarity, of
        -log( exp(w_pos s(i, i+) / t) / sum over k != i of exp(w_neg(i, k) s(i, k) / t) )
    z1, z2: (N, D), L2-normalised, row i of both is a positive pair. pos_weight (N,), neg_weight (2N, 2N), or None for
    1. The sum includes the positive, with its w_neg. In float32 (float64 stays), under autocast too; some rows at a
    time, made again on the way back, where autograd would keep (2N, 2N) matrices."""
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat([z1, z2]).to(torch.promote_types(z1.dtype, torch.float32))
        n, few = len(z1), max(1, 2 ** 23 // len(z1))
        def log_sums(z, k):  # of rows k .. k + few
            logits = z[k:k + few] @ z.T * ((1 if neg_weight is None else neg_weight[k:k + few]) / temperature)
            itself = torch.arange(k, k + len(logits), device=z.device)[:, None]
            return torch.logsumexp(logits.scatter(1, itself, -math.inf), 1).sum()
        positive = (z[:n] * z[n:]).sum(1) * (1 if pos_weight is None else pos_weight) / temperature
        sums = [checkpoint(log_sums, z, k, use_reentrant=False, preserve_rng_state=False) if few < 2 * n
                else log_sums(z, k) for k in range(0, 2 * n, few)]
        return (sum(sums) - 2 * positive.sum()) / (2 * n)


# files: read with checks, written under a private name, renamed when complete -----------------------------------------
HANDS_DTYPE = np.dtype([("video", "<i4"), ("frame", "<i4"), ("time", "<f8"), ("box", "<f4", 4), ("left", "?"),
                        ("score", "<f4")])


class InputError(ValueError):
    """Something the user gave is wrong. The message names the file and what was expected; exit status 2."""


def require(condition, message):
    if not condition:
        raise InputError(message)


@contextlib.contextmanager
def atomic(path):
    """Yields a binary file under a private name, which becomes `path` when the block ends without an exception."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise InputError(f"{path}: could not be written: {cause.strerror or cause}")
        raise
    finally:
        temporary.exists() and temporary.unlink()  # on a read-only disk unlink fails even if nothing is there


def save_array(path, array):
    with atomic(path) as file:
        np.save(file, array)


def save_image(path, image):
    with atomic(path) as file:
        file.write(cv2.imencode(Path(path).suffix, image[:, :, ::-1])[1])


def load_array(path, dtype, shape, *, hint="", mmap=False, finite=True):
    """Read a .npy file, never running code from it. shape: numbers, None where any length will do; hint: what to do.
    Raises InputError where the file is missing, cut short, or differs from dtype, shape or finiteness."""
    hint = f" ({hint})" if hint else ""
    name = "records of " + ", ".join(dtype.names) if np.dtype(dtype).names else np.dtype(dtype).name
    wanted = f"{name} ({', '.join('N' if n is None else str(n) for n in shape)})"
    require(Path(path).is_file(), f"{path}: missing, expected {wanted}{hint}")
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except Exception:  # what a damaged file raises depends on where it is damaged
        raise InputError(f"{path}: truncated or not a .npy file of numbers, expected {wanted}{hint}")
    require(isinstance(array, np.ndarray), f"{path}: is an archive of arrays, expected {wanted}{hint}")
    fits = len(array.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape))
    require(fits and array.dtype == dtype, f"{path}: is {array.dtype} {array.shape}, expected {wanted}{hint}")
    for part in [array[name] for name in array.dtype.names or ()] or [array]:
        if finite and part.dtype.kind == "f" and not np.isfinite(part).all():
            raise InputError(f"{path}: values must be finite, row {np.argwhere(~np.isfinite(part))[0][0]} is not{hint}")
    return array


def load_hands(folder):
    """A hands folder, checked -> folder, crops (memory map), offsets, keypoints, hands, videos, side (of the crops)."""
    folder, hint = Path(folder), "extract_hands.py writes it"
    require(folder.is_dir(), f"{folder}: no such folder, expected a hands folder ({hint})")
    keypoints = load_array(folder / "keypoints.npy", np.float32, (None, 21, 2), hint=hint)
    require(len(keypoints), f"{folder / 'keypoints.npy'}: holds no hand, expected at least one")
    offsets = load_array(folder / "offsets.npy", np.int64, (len(keypoints) + 1,), hint=hint)
    require(offsets[0] == 0 and (np.diff(offsets) > 0).all(), f"{folder / 'offsets.npy'}: must start at 0 and increase")
    rows = load_array(folder / "hands.npy", HANDS_DTYPE, (len(keypoints),), hint=hint)
    crops = np.asarray(load_array(folder / "crops.npy", np.uint8, (int(offsets[-1]),), hint=hint, mmap=True))
    listed = folder / "videos.txt"
    require(listed.is_file(), f"{listed}: missing, expected one source a line ({hint})")
    videos, needed = listed.read_text(errors="replace").splitlines(), rows["video"].max() + 1
    require(rows["video"].min() >= 0 and needed <= len(videos), f"{listed}: has {len(videos)} lines, expected {needed}")
    hands = SimpleNamespace(folder=folder, crops=crops, offsets=offsets, keypoints=keypoints, hands=rows, videos=videos,
                            side=None)
    hands.side = len(read_crop(hands, 0))  # every other crop must have it too
    require(max(-keypoints.min(), keypoints.max()) < 10 * hands.side,
            f"{folder / 'keypoints.npy'}: some lie 10 crops away, expected pixels of crops of side {hands.side}")
    return hands


def read_crop(hands, i):
    """Crop i of a hands folder -> RGB uint8 (side, side, 3)."""
    image = cv2.imdecode(hands.crops[hands.offsets[i]:hands.offsets[i + 1]], cv2.IMREAD_COLOR_RGB)
    if image is None or image.shape[:2] != (hands.side or len(image),) * 2:
        raise InputError(f"{hands.folder}/crops.npy: crop {i}, at {hands.offsets[i]}, is not a JPEG like the first")
    return image


def load_checkpoint(path):
    """A .pt file -> tensors, numbers, strings and containers of them; anything that could run code is refused."""
    require(Path(path).is_file(), f"{path}: missing, expected a checkpoint written by torch.save")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        thing = re.search(r"GLOBAL (\S+)", str(error))
        require(not thing, f"{path}: holds pickled objects ({thing and thing[1]}), which are never loaded; if you "
                "trust it, save its tensors alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)")
        raise InputError(f"{path}: truncated, or not a checkpoint written by torch.save")


# run: exit status, ranks, resuming, SIGTERM, the log, loader processes ------------------------------------------------
def run_script(main):
    """Run main(); whatever the user can mend ends in one line on stderr and status 2."""
    try:
        return main()
    except InputError as error:  # raised in a loader's worker it arrives with a traceback before the message
        message, status = str(error).split("InputError: ")[-1].strip(), 2
    except OSError as error:
        message, status = f"{error.filename}: {error.strerror}" if error.filename else str(error), 2
    except torch.cuda.OutOfMemoryError as error:
        message, status = f"{str(error).partition(chr(10))[0]}; lower --micro-batch or --batch-size", 2
    except KeyboardInterrupt:
        message, status = "stopped; the same command goes on", 130
    finally:
        for child in multiprocessing.active_children():  # loader processes ignore SIGTERM
            child.kill()
        HELD.close()
    for bar in list(tqdm._instances):
        bar.close()  # the message gets a line of its own
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def check_flags(args):
    """What holds for the flags of every script: numbers are finite and not negative, the device is there."""
    for name, value in vars(args).items():
        require(not isinstance(value, (int, float)) or 0 <= value < (2 ** 63 if isinstance(value, int) else math.inf),
                f"--{name.replace('_', '-')} is {value}, expected a number that is finite and not negative")
    if getattr(args, "device", None):  # nothing is put there yet: a CUDA context would be made
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = ["cpu", "cuda", *(f"cuda:{k}" for k in range(count))] if count else ["cpu"]
        require(args.device in devices,
                f"--device {args.device}: not here, expected one of {', '.join(devices)}")


def print_settings(args, **effective):
    """All arguments and the quantities that follow from them, once, at the start."""
    print(*("  ".join(f"{k} {v}" for k, v in group.items()) for group in (vars(args), effective)), sep="\n", flush=1)


HELD = contextlib.ExitStack()  # the locks of open_folder, which run_script lets go at its end


def open_folder(folder, rank=0, ranks=1):
    """Make an output folder, lock it (a rank: its share) until the script ends, clear what a killed run left."""
    folder = Path(folder)
    require(not folder.is_file(), f"{folder}: is a file, expected a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    lock = HELD.enter_context(open(folder / ".lock", "w"))
    start, end = (k * 2 ** 40 // ranks for k in (rank, rank + 1))  # another whole run's shares overlap with it
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, end - start, start)  # a child does not inherit it
    except BlockingIOError:
        lock.close()
        raise InputError(f"{folder}: another run is writing to it, wait for it or choose another folder")
    for left in folder.glob(".*.tmp") if ranks == 1 else ():
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return lock  # a process that dies unlocks it as well


def start_ranks(device):
    """Join the other processes of torchrun, if any. -> rank, number of ranks, device."""
    rank, local, world = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def save_checkpoint(folder, content):
    """Write checkpoint.pt; the one before it stays as checkpoint-previous.pt."""
    new, path, previous = (Path(folder) / f"checkpoint{name}.pt" for name in ("-new", "", "-previous"))
    with atomic(new) as file:
        torch.save(content, file)
    if path.exists():
        os.replace(path, previous)
    os.replace(new, path)


def resume(folder, args, free):
    """The newest checkpoint of a run, or None where there is none.
    free: names of arguments that cannot change the result; any other that differs from the checkpoint's is an error."""
    path, previous = Path(folder) / "checkpoint.pt", Path(folder) / "checkpoint-previous.pt"
    if not path.exists() and not previous.exists():
        return None
    try:
        content = load_checkpoint(path)
    except InputError as error:
        require(previous.exists(), error)
        print(f"{error}; going on from {previous}", file=sys.stderr)
        content = load_checkpoint(previous)
    require(isinstance(content, dict) and "args" in content, f"{path}: not the checkpoint of such a run")
    refuse_other_arguments(folder, content["args"], args, free)
    return content


def refuse_other_arguments(folder, old, args, free):
    new = plain(args)
    differ = [f"--{key.replace('_', '-')} was {old.get(key)}, is {new.get(key)}"
              for key in sorted({*old, *new} - {*free}) if old.get(key) != new.get(key)]
    require(not differ, f"{folder}: holds a run with other arguments ({'; '.join(differ)}); choose another --out")


def plain(args):
    """argparse's result as a dict that json and torch.load(weights_only=True) can hold."""
    return json.loads(json.dumps(vars(args), default=str))


def start_log(folder, args, step=0):
    """Start log.jsonl with the command and all arguments. -> the rows kept: those up to the checkpoint's step."""
    path = Path(folder) / "log.jsonl"
    rows = [row for row in read_log(path)[1:] if row.get("step", 0) <= step] if step and path.exists() else []
    with atomic(path) as file:
        for row in ({"command": shlex.join(sys.argv), "args": plain(args)}, *rows):
            file.write((json.dumps(row) + "\n").encode())
    return rows


def write_log(folder, row):
    with open(Path(folder) / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def read_log(path):
    """log.jsonl -> list of dicts; a last line cut short by a kill is left out."""
    try:
        lines = Path(path).read_text().splitlines(keepends=True)
        return [dict(json.loads(line)) for line in lines if line.endswith("\n")]
    except (TypeError, ValueError):
        raise InputError(f"{path}: expected one JSON object a line")


def catch_sigterm():
    """A list that becomes non-empty when SIGTERM arrives; a second SIGTERM ends the process at once. Under torchrun,
    which passes on what the cluster has sent to each rank already, all of five seconds count as one."""
    received = []
    def handler(number, frame):
        received.append(time.monotonic())
        if len(received) > 1 and (received[-1] - received[0] > 5 or "TORCHELASTIC_RUN_ID" not in os.environ):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
    signal.signal(signal.SIGTERM, handler)
    return received


CORES = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or 1  # for each rank here


def load_items(items, order, args, **more):
    """Yields the items in this order, made by args.workers processes; the global random state stays as it is.
    Where memory or /dev/shm is full, and such a process dies or complains, InputError is raised."""
    if args.workers:
        # A forked process has the items already. Any other start, Python's default from 3.14 on,
        # would send each process a copy: of a memory-mapped crops.npy the whole file. Loader
        # processes never touch CUDA, which a forked process could not use.
        more["multiprocessing_context"] = "fork"
    try:
        loader = iter(torch.utils.data.DataLoader(items, batch_size=None, sampler=order, num_workers=args.workers,
                                                  worker_init_fn=start_worker, generator=torch.Generator(), **more))
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise in the midst of whatever goes on
        yield from loader  # it looks every five seconds whether all are alive
    except (EOFError, ConnectionError, RuntimeError) as error:  # the first two: it died while it handed over an item
        if isinstance(error, RuntimeError) and not re.search(
                r"^DataLoader worker \(pid|^Pin memory thread|unable to allocate shared memory", str(error)):
            raise
        raise InputError("a loader process failed, as where memory or /dev/shm is full; lower --workers, --micro-batch "
                         "or --batch-size")


def start_worker(number):
    cv2.setNumThreads(0)  # one process a core: threads inside would only get in each other's way
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)  # the parent decides; it still needs the batches under way


# drawing: skeletons, contact sheets, curves ---------------------------------------------------------------------------
PARENTS = (0, 0, 1, 2, 3, 0, 5, 6, 7, 0, 9, 10, 11, 0, 13, 14, 15, 0, 17, 18, 19)
FINGER_COLOURS = ((255, 140, 0), (80, 220, 60), (60, 200, 255), (70, 90, 255), (230, 80, 230))  # thumb .. little, RGB


def draw_hand(image, keypoints, colour=None, text=""):
    """A copy of image (H, W, 3) with the skeleton of keypoints (21, 2), coloured by finger or in one colour."""
    image = np.ascontiguousarray(image).copy()
    points = np.round(np.clip(keypoints, -1e4, 1e4) * 16).astype(int)  # OpenCV draws to 1/16 px with shift=4
    width = max(1, round(image.shape[0] / 150))
    for joint in range(1, 21):
        a, b = points[PARENTS[joint]].tolist(), points[joint].tolist()
        cv2.line(image, a, b, colour or FINGER_COLOURS[(joint - 1) // 4], width, cv2.LINE_AA, 4)
    size = image.shape[0] / 380
    for shade, width in ((0, 3), (255, 1)):
        cv2.putText(image, text, (3, round(26 * size)), 0, size, (shade, shade, shade), width, cv2.LINE_AA)
    return image


def draw_crop(hands, i, side, text="", turn=0.0):
    """Crop i of a hands folder at another side, with its skeleton, turned about its middle by `turn` degrees."""
    image = cv2.resize(read_crop(hands, i), (side, side), interpolation=cv2.INTER_AREA)
    points = (hands.keypoints[i] + 0.5) * (side / hands.side) - 0.5
    if turn:
        middle = (side - 1) / 2
        matrix = cv2.getRotationMatrix2D((middle, middle), float(turn), 1.0)
        image = cv2.warpAffine(image, matrix, (side, side), borderMode=cv2.BORDER_REFLECT_101)
        points = points @ matrix[:, :2].T + matrix[:, 2]
    return draw_hand(image, points, text=text)


def sheet(tiles, columns):
    """Pictures of one size -> one picture, `columns` of them in a row, black where the last row ends early."""
    tiles = list(tiles) + [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[k:k + columns]) for k in range(0, len(tiles), columns)])


def plot_curves(path, rows, groups):
    """One panel for each list of keys in `groups`, over the step, from the rows of a log."""
    from matplotlib.figure import Figure  # here: few processes draw, and none needs a display
    figure = Figure(figsize=(4.2 * len(groups), 3.2), layout="tight")
    for axis, keys in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        for key in keys:
            axis.plot([row["step"] for row in rows if key in row], [row[key] for row in rows if key in row], label=key)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)
