"""Find for every hand its nearest neighbours in other videos: the positive pairs of SiMHand.

Reads a hands folder, turns each hand upright and to one size (or takes it as it lies), embeds its
21 keypoints, 42 numbers, by PCA in 14 dimensions, and searches exactly, on a CPU or a GPU alike.
Copies of the same picture, as in a video that was uploaded twice, are passed over.
Writes into the same folder (or --out): pca.npy, embeddings.npy, distances.npy, neighbours.npy,
turns.npy (not of hands as they lie), and to look at pairs.jpg, distances.png and mining.jsonl.
Under torchrun each rank searches for its share of the hands. A search that was stopped starts
again: it takes minutes.

    python mine_pairs.py data/ego4d
    python mine_pairs.py data/ego4d --limit 100000 --out data/ego4d-100k
    python mine_pairs.py demo/hands --top-k 5

To read: arguments, main, then what is compared (poses, pictures, temporal pairs). The exact search
is engineering, not method; whoever trusts brute force may stop at its banner.
"""

import argparse
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from sklearn.decomposition import PCA

from common import (check_flags, draw_crop, end_ranks, figure, load_hands, logged_settings,
                    open_folder, over_ranks, pair_turns, plain, pretrain_command, print_settings,
                    progress, require, run_script, save_array, save_image, sheet, start_log,
                    start_ranks, upright, write_log)


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("hands", help="hands folder, as extract_hands.py writes it")
    flag("--out", help="folder for the pairs (default: the hands folder itself)")
    flag("--dims", type=int, default=14,
         help="dimensions of the PCA embedding, 1 to 42 (paper: 14)")
    # which pairs
    flag("--paper", action="store_true",
         help="take the paper's value where ours differs: --no-rotation-free")
    flag("--top-k", type=int, default=1, help="neighbours kept for each hand (paper: 1)")
    flag("--rotation-free", action=argparse.BooleanOptionalAction, help="compare hands turned "
         "upright and of one size; turns.npy says how a neighbour must be turned to lie as the "
         "hand does (default: --rotation-free; paper: hands as they lie in their crops)")
    flag("--same-video", action="store_true", help="let a neighbour come from the hand's own video "
         "(ablation: mostly near-duplicates)")
    flag("--temporal", action="store_true", help="pair each hand with that of the same side and "
         "the nearest box in the next sampled frame of its video, as in TempCLR")
    flag("--limit", type=int, help="mine only this many hands, drawn at random; with the same "
         "seed a larger set contains a smaller one (default: all)")
    flag("--seed", type=int, default=0, help="seed of --limit's random choice")
    # the machine
    flag("--device",
         help="cpu or cuda (default: the GPU when there is one); the result is the same")
    return parser


def parse_args():
    args = make_parser().parse_args()
    check_flags(args)
    require(1 <= args.dims <= 42 and args.top_k >= 1,
            "--dims must lie in 1..42, --top-k must be at least 1")
    chosen = args.top_k > 1 or args.limit is not None or args.same_video or args.rotation_free
    require(not (args.temporal and chosen), "--temporal pairs a hand with the next frame: it goes "
            "without --top-k, --limit, --same-video and --rotation-free")
    if args.rotation_free is None:
        args.rotation_free = not (args.temporal or args.paper)
    return args


def main():
    args = parse_args()
    rank, ranks, device = start_ranks(args.device)
    hands = load_hands(args.hands)
    count = len(hands.keypoints)
    mined = choose_rows(hands, args)
    out = Path(args.out or args.hands)
    require(not (out / "keypoints.npy").exists() or out.samefile(args.hands),
            f"{out}: is another hands folder, these pairs do not belong there")
    if rank == 0:
        open_folder(out)  # locked until the script ends
        videos = len(np.unique(hands.rows["video"][mined]))
        print_settings(args, make_parser(), count=count, mined=len(mined), videos=videos,
                       ranks=ranks, device=device)

    pca, explained, embeddings = embed(hands, mined, args.dims, args.rotation_free)
    if ranks > 1:  # other processors may round otherwise
        dist.broadcast(torch.from_numpy(embeddings), 0)
    if args.temporal:
        pairs = next_frames(hands, embeddings)
    else:
        pictures = thumbnails(hands, mined, rank, ranks)
        pairs = similar_hands(hands, mined, embeddings, pictures, args.top_k, args.same_video,
                              device)
    require((pairs.neighbours >= 0).any(), f"{hands.folder}: no hand has a neighbour, expected "
            "other videos or, for --temporal, hands that are seen again in the next sampled frame")
    if rank == 0:
        write(out, hands, pca, embeddings, pairs, explained, len(mined), args)
    end_ranks()


def choose_rows(hands, args):
    """The rows of the hands that take part, ascending; an InputError where there are too few."""
    count = len(hands.keypoints)
    name = str(hands.folder / "hands.npy")
    require(args.limit is None or args.limit <= count,
            f"{name}: {count} hands, fewer than --limit {args.limit}")
    if args.limit is not None:
        name += f", --limit {args.limit}"
    mined = np.sort(np.random.default_rng(args.seed).permutation(count)[:args.limit])
    require(len(mined) > args.dims,
            f"{name}: {len(mined)} hands, a PCA of --dims {args.dims} needs {args.dims + 1}")
    if args.temporal:
        require(not logged_settings(hands.folder).get("annotations"), f"{hands.folder}: published "
                "annotations tell no times of pictures: --temporal needs hands out of videos")
        order = hands.rows["video"].astype(np.int64) << 32 | hands.rows["frame"]
        require((np.diff(order) >= 0).all(), f"{name}: rows must be sorted by video, then frame")
        return mined
    videos = np.unique(hands.rows["video"][mined])
    require(len(videos) > 1 or args.same_video, f"{name}: all {len(mined)} hands come from one "
            "video, but neighbours are taken from other videos; extract more videos or allow "
            "--same-video")
    return mined


# ------------------------------------------------------------------ the method: what is compared

@dataclasses.dataclass
class Pairs:
    """The neighbours of N hands, nearest first."""
    neighbours: np.ndarray  # (N, K) int64, rows; -1 where there is none
    distances: np.ndarray  # (N, K) float32, inf where there is none
    # (N,), the nearest hand of another video that shows the same picture; -1 where there is none
    copies: np.ndarray


def embed(hands, mined, dims, rotation_free):
    """Fit the PCA on the mined rows and embed all hands -> pca (1 + D, 42), the mean and the
    components; share of the variance explained; embeddings (N, D) float32."""
    poses = as_poses(hands.keypoints[mined], hands.side, rotation_free)
    mean, components, explained = fit_pca(poses, dims)
    del poses
    embeddings = np.empty((len(hands.keypoints), dims), np.float32)
    for start in range(0, len(embeddings), 1 << 16):  # bounds the memory
        some = slice(start, start + (1 << 16))
        poses = as_poses(hands.keypoints[some], hands.side, rotation_free)
        embeddings[some] = (poses - mean) @ components.T
    return np.concatenate([mean[None], components]).astype(np.float32), explained, embeddings


def as_poses(keypoints, side, rotation_free):
    """keypoints (N, 21, 2) in pixels of crops of this side -> what is embedded, (N, 42) float64:
    their place in the crop, or, rotation-free, the hands upright."""
    if rotation_free:
        return upright(keypoints).reshape(-1, 42)
    return keypoints.reshape(-1, 42) * np.float64(1 / side)


def fit_pca(poses, dims):
    """poses (N, 42) float64 -> mean (42,), components (dims, 42), share of the variance explained.
    Of each component the largest loading is positive."""
    pca = PCA(dims).fit(poses)
    return pca.mean_, pca.components_, pca.explained_variance_ratio_.sum()


def similar_hands(hands, mined, embeddings, pictures, top_k, same_video, device):
    """The paper's pairs: for each mined hand the most similar hands of other videos, without copies
    of its own picture, as in a video that was uploaded twice -> Pairs.

    pictures: the thumbnails of the mined hands.
    """
    video = hands.rows["video"][mined]
    group = np.arange(len(mined)) if same_video else video
    count = len(embeddings)
    neighbours = np.full((count, top_k), -1)
    distances = np.full((count, top_k), np.inf, np.float32)
    pairs = Pairs(neighbours, distances, np.full(count, -1))
    rows = np.arange(len(mined))
    wanted = top_k + 1
    while len(rows):
        found, distances = nearest(embeddings[mined], group, wanted, device, rows)
        there = found >= 0
        copy = there & (video[found] != video[rows, None]) & same_picture(pictures, rows, found)
        good = there & ~copy
        chosen = np.argsort(~good, 1, kind="stable")[:, :top_k]  # the first of the good ones
        neighbours = np.where(good, mined[found], -1)
        pairs.neighbours[mined[rows]] = np.take_along_axis(neighbours, chosen, 1)
        distances = np.where(good, distances, np.inf)
        pairs.distances[mined[rows]] = np.take_along_axis(distances, chosen, 1)
        passed_over = copy & (good.cumsum(1) < top_k)
        first = found[np.arange(len(rows)), passed_over.argmax(1)]
        pairs.copies[mined[rows]] = np.where(passed_over.any(1), mined[first], -1)
        # Where too many of those found are copies, look further.
        rows = rows[(good.sum(1) < top_k) & there[:, -1]]
        wanted = min(4 * wanted, count)
        if len(rows) * wanted > 1 << 27:  # nearly all show one picture: bounds memory and time
            break
    return pairs


def thumbnails(hands, rows, rank, ranks):
    """Small grey pictures of these crops, (n, 144) uint8; each rank makes its share."""
    pictures = np.zeros((len(rows), 144), np.uint8)

    def make(part):
        for k in part:
            start, end = hands.offsets[rows[k]:rows[k] + 2]
            image = cv2.imdecode(hands.crops[start:end], cv2.IMREAD_REDUCED_GRAYSCALE_8)
            require(image is not None,
                    f"{hands.folder}/crops.npy: crop {rows[k]}, at {start}, is not a JPEG")
            pictures[k] = cv2.resize(image, (12, 12), interpolation=cv2.INTER_AREA).ravel()
        return len(part)

    share = np.arange(rank, len(rows), ranks)
    parts = np.array_split(share, len(share) // 1000 + 1)
    bar = progress(total=len(share), unit="hand", desc="pictures", disable=rank > 0)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, bar:
        for done in pool.map(make, parts):
            bar.update(done)
    return over_ranks(torch.from_numpy(pictures)).numpy()


def same_picture(pictures, rows, found):
    """Whether the thumbnails of rows (n,) and of the hands found for each (n, W) differ by at most
    a fifth of their contrast (root mean square over standard deviation) -> (n, W) bool.

    That held for 98 % of the hands of a video that was encoded again at half its size, and for 2
    of 4,768 hands of 783 clips of signers and their nearest neighbours.
    """
    same = np.empty(found.shape, bool)
    for k, column in enumerate(found.T):
        for some in np.array_split(np.arange(len(rows)), len(rows) // (1 << 16) + 1):
            one = pictures[rows[some]].astype(np.float32)
            apart = np.square(pictures[column[some]] - one).mean(1)
            same[some, k] = apart <= one.var(1) / 25
    return same


def next_frames(hands, embeddings):
    """Temporal pairs: the hand of the same side with the nearest box in the next sampled frame of
    the same video -> Pairs."""
    rows = hands.rows
    begin, end = rows_of_next_frame(hands)
    centre = (rows["box"][:, :2] + rows["box"][:, 2:]) / 2
    neighbour = np.full(len(rows), -1)
    nearest_box = np.full(len(rows), np.inf)
    for k in range((end - begin).max()):
        other = np.minimum(begin + k, len(rows) - 1)
        gap = np.linalg.norm(centre[other] - centre, axis=1)
        alike = (begin + k < end) & (rows["left"][other] == rows["left"])
        closer = alike & (gap < nearest_box)
        neighbour[closer] = other[closer]
        nearest_box[closer] = gap[closer]
    difference = embeddings[neighbour].astype(np.float64) - embeddings
    distance = np.sqrt((difference ** 2).sum(1))
    distance = np.where(neighbour < 0, np.inf, distance).astype(np.float32)
    return Pairs(neighbour[:, None], distance[:, None], np.full(len(rows), -1))


def rows_of_next_frame(hands):
    """-> begin, end (N,): the next sampled frame of each row's video has the rows begin .. end;
    none where no frame follows.

    Rows are sorted by video and frame. Frames without hands have no rows: two frames follow each
    other when nothing lies between them in the source, or when they are at most 1.5 sampling
    intervals apart (where the rate is not known: 1.5 times the median).
    """
    fps = logged_settings(hands.folder).get("fps")
    rows = hands.rows
    count = len(rows)
    is_new = np.diff(rows["video"], prepend=-1) | np.diff(rows["frame"], prepend=-1)
    first = np.flatnonzero(is_new)  # the first row of each frame
    size = np.diff(first, append=count)
    same = np.diff(rows["video"][first]) == 0
    apart = np.diff(rows["time"][first])
    usual = np.median(apart[same]) if same.any() else 0
    if fps:
        usual = 1 / fps
    follows = same & ((apart <= 1.5 * usual) | (np.diff(rows["frame"][first]) == 1))
    follows = np.append(follows, False)
    begin = np.repeat(np.where(follows, np.append(first[1:], 0), 0), size)
    end = begin + np.repeat(np.where(follows, np.append(size[1:], 0), 0), size)
    return begin, end


# --------------------------------------------------------------------------- the exact search

NONE = torch.iinfo(torch.int64).max  # the key of no neighbour: it comes after all others
LARGEST = torch.finfo(torch.float32).max  # anything but infinite
AT_ONCE = 1 << 20  # pairs that wait to be measured, of many equal hands: bounds the memory
# Rows in a leaf at most. Large leaves suit a GPU, where a product is cheaper than a decision.
LEAF = {"cpu": 256, "cuda": 8192}
# Leaves whose rows are searched for together. On a GPU 16,384 x 8,192 distances are 0.5 GB, and
# with masks and copies below 2 GB.
TOGETHER = {"cpu": 16, "cuda": 2}


def nearest(embeddings, group, top_k, device, rows=None, leaf=None):
    """Exact nearest neighbours of these rows (None: all) among the rows of other groups.

    embeddings (N, D) float32, finite; group (N,), the video -> neighbours (n, K) int64, -1 where
    there are fewer; distances (n, K) float32, inf there. A distance is the root of the float64 sum
    of squared differences, rounded to float32; of equal ones the lower index comes first.

    The rows are parted into leaves of a k-d tree, of at most `leaf` rows. Each rank searches for
    its share of them.
    """
    rows = np.arange(len(embeddings)) if rows is None else rows
    tree = grow_tree(embeddings, group, leaf or LEAF[device.type], device)
    place = tree.row.argsort()[torch.from_numpy(rows).to(device)]  # of each row in the tree
    places, order = place.sort()
    step = TOGETHER[device.type]
    bounds = torch.tensor(tree.start[step:-1:step], dtype=torch.int64)
    cuts = [0, *torch.searchsorted(places.cpu(), bounds).tolist(), len(rows)]
    rank = dist.get_rank() if dist.is_initialized() else 0
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    parts = [slice(*ends) for ends in zip(cuts, cuts[1:])][rank::ranks]
    keys = torch.full((len(rows), top_k), NONE, device=device)

    def work(part):
        if part.start < part.stop:
            keys[order[part]] = search(tree, places[part], top_k)
        return part.stop - part.start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a part to a thread: its steps are too small to be shared
    pool = ThreadPoolExecutor(threads, "search", torch.set_num_threads, (1,))
    run = map if device.type == "cuda" else pool.map
    total = sum(part.stop - part.start for part in parts)
    silent = len(cuts) < 3 or rank > 0  # one rank shows its bar
    with pool, progress(total=total, unit="hand", desc="neighbours", disable=silent) as bar:
        for done in run(work, parts):
            bar.update(done)
    torch.set_num_threads(threads)
    if ranks > 1:
        dist.all_reduce(keys, dist.ReduceOp.MIN)
        require((keys[:, 0] != NONE).all(),
                "the ranks parted the hands differently; start them on machines of one kind")
    keys = keys.cpu()
    distances = (keys >> 32).int().view(torch.float32).masked_fill_(keys == NONE, torch.inf)
    neighbours = (keys & 0xFFFFFFFF).masked_fill_(keys == NONE, -1)
    return neighbours.numpy(), distances.numpy()


@dataclasses.dataclass
class Tree:
    """The rows in the order of the leaves: leaf i holds the places start[i] to start[i + 1]."""
    start: list
    row: torch.Tensor  # (N,), the row at each place
    group: torch.Tensor  # (N,), its video
    point: torch.Tensor  # (N, D), its embedding
    norm: torch.Tensor  # (N,), squared
    low: torch.Tensor  # (leaves, D), the corners of the leaves' boxes
    high: torch.Tensor


def grow_tree(embeddings, group, leaf, device):
    """Halve the rows along their widest axis until at most `leaf` of them are together -> Tree."""
    parts = [np.arange(len(embeddings))]
    while max(map(len, parts)) > leaf:
        halves = []
        for part in parts:
            values = embeddings[part]
            widest = values.var(0).argmax()
            half = (len(part) + 1) // 2
            order = np.argpartition(values[:, widest], half - 1)
            halves += [part[order[:half]], part[order[half:]]]
        parts = halves
    start = np.cumsum([0] + [len(part) for part in parts])
    row = np.concatenate(parts)
    low = np.minimum.reduceat(embeddings[row], start[:-1])
    high = np.maximum.reduceat(embeddings[row], start[:-1])
    point = torch.from_numpy(embeddings[row]).to(device)
    arrays = row, group[row].astype(np.int64), low, high
    row, group, low, high = [torch.from_numpy(array).to(device) for array in arrays]
    return Tree(start.tolist(), row, group, point, point.square().sum(1), low, high)


def search(tree, some, top_k):
    """Neighbours of the rows at these places (n,) -> keys (n, K), ascending: the bits of the
    float32 distance, which order like the number, above the row's index; NONE where there is no
    neighbour.

    Leaves are visited in the order of their distance from these rows' common box, until the next
    one is further away than any neighbour can be. A row looks into a leaf only where the
    leaf's box is not further away than the row's K-th nearest so far, in float32. What then is near
    enough to be a neighbour is measured in float64.
    """
    point = tree.point[some]
    norm = tree.norm[some]
    group = tree.group[some]
    best = norm.new_full((len(norm), top_k), torch.inf)  # the least squared distances so far
    limit = norm.new_full((len(norm),), LARGEST)  # what is further away is no neighbour
    from_box, order = gaps(tree, point.amin(0), point.amax(0)).sort()
    keys = torch.full((len(norm), top_k), NONE, device=norm.device)
    found = []
    waiting = 0
    for distance, leaf in zip(from_box.tolist(), order.tolist()):
        if distance > limit.max():
            break
        places = slice(tree.start[leaf], tree.start[leaf + 1])
        rows = (gaps(tree, point, point, leaf) <= limit).nonzero()[:, 0]
        square = torch.addmm(tree.norm[places], point[rows], tree.point[places].T, alpha=-2)
        square += norm[rows, None]
        square.masked_fill_(tree.group[places] == group[rows, None], torch.inf)
        hit = (square.amin(1) <= limit[rows]).nonzero()[:, 0]
        rows = rows[hit]
        square = square[hit]
        least = square.topk(min(top_k, square.shape[1]), 1, largest=False).values
        best[rows] = torch.cat([best[rows], least], 1).topk(top_k, 1, largest=False).values
        limit[rows] = with_rounding(best[rows, -1], norm[rows], point.shape[1])
        near, place = (square <= limit[rows, None]).nonzero().unbind(1)
        found.append((rows[near], place + places.start, square[near, place]))
        waiting += len(near)
        if waiting > AT_ONCE:
            keys = measure(tree, point, found, limit, keys)
            found = []
            waiting = 0
    return measure(tree, point, found, limit, keys) if found else keys


def gaps(tree, low, high, leaf=slice(None)):
    """Squared distances of leaves' boxes from the boxes (..., D) between low and high, made smaller
    by some ten times what rounding does, so that none is too large."""
    below = (tree.low[leaf] - high).clamp_(min=0)
    above = (low - tree.high[leaf]).clamp_(min=0)
    return (below + above).square_().sum(-1).mul_(1 - 1e-5)


def with_rounding(worst, norm, dims):
    """The largest squared distance that float32, as in `search`, may show for a point that in
    truth is not further from a row than `worst`; norm: the row's squared length.

    |q|^2 + |p|^2 - 2 qp in float32 is wrong by less than (2 D + 8) 2^-24 (|q| + |p|)^2, where
    |p| <= |q| + sqrt(worst); it counts twice, once for `worst` and once for what is compared.
    """
    reach = 2 * norm.sqrt() + worst.clamp(min=0).sqrt()
    limit = worst * (1 + 1e-6) + (dims + 4) * 2.0 ** -22 * reach.square()
    return limit.clamp_(max=LARGEST)


def measure(tree, point, found, limit, keys):
    """found: list of (row of `point`, place in the tree, their squared distance in float32), each
    a tensor. Measures those within the limit in float64 -> keys (n, K), as in `search`, with the
    nearest of them merged in."""
    number, place, rough = (torch.cat(part) for part in zip(*found))
    keep = rough <= limit[number]
    number = number[keep]
    place = place[keep]
    square = torch.zeros(len(number), dtype=torch.float64, device=number.device)
    for k in range(point.shape[1]):  # in order: how a sum is parted differs by device
        difference = tree.point[place, k].double() - point[number, k].double()
        square += difference * difference
    bits = square.sqrt_().float().view(torch.int32).long()
    key = bits << 32 | tree.row[place]
    order = key.argsort()
    order = order[number[order].argsort(stable=True)]  # by number, then by key
    number = number[order]
    rank = torch.arange(len(number), device=number.device) - torch.searchsorted(number, number)
    first = rank < keys.shape[1]
    measured = torch.full_like(keys, NONE)
    measured[number[first], rank[first]] = key[order[first]]
    return torch.cat([keys, measured], 1).topk(keys.shape[1], 1, largest=False).values


# -------------------------------------------------------------------------- files and pictures

def write(out, hands, pca, embeddings, pairs, explained, mined, args):
    """All files; neighbours.npy after the other arrays: where it is, they are of one mining."""
    for name in ("neighbours.npy", "turns.npy"):  # of an earlier mining
        (out / name).unlink(missing_ok=True)
    save_array(out / "pca.npy", pca)
    save_array(out / "embeddings.npy", embeddings)
    save_array(out / "distances.npy", pairs.distances)
    turns = None
    if args.rotation_free:
        turns = pair_turns(hands.keypoints, pairs.neighbours)
        save_array(out / "turns.npy", turns)
    save_array(out / "neighbours.npy", pairs.neighbours)

    paired = pairs.neighbours[:, 0] >= 0
    first = pairs.neighbours[paired, 0]
    distances = pairs.distances[paired, 0]
    twice = np.flatnonzero(pairs.copies >= 0)
    summary = {"hands": len(paired),
               "explained_variance": round(float(explained), 4),
               "mined": mined,
               "without_neighbour": mined - int(paired.sum()),
               "same_picture": len(twice),
               "neighbours_from_videos": len(np.unique(hands.rows["video"][first])),
               "most_often_chosen": int(np.bincount(first).max()),
               "median_distance": round(float(np.median(distances)), 4)}
    start_log(out, plain(args), name="mining.jsonl")
    write_log(out, summary, name="mining.jsonl")
    print("  ".join(f"{key} {value}" for key, value in summary.items()))
    if len(twice):
        one, other = hands.rows["video"][[twice[0], pairs.copies[twice[0]]]]
        print(f"{len(twice)} hands have the same picture in another video, as in "
              f"{hands.videos[one]} and {hands.videos[other]}: the next nearest hand was taken")
    draw_pairs(out / "pairs.jpg", hands, pairs, turns)
    unit = "crop's side"
    if args.rotation_free:
        unit = "joints' root mean square distance from their mean"
    plot_distances(out / "distances.png", embeddings, distances, unit)
    print(f"wrote {out}, see {out / 'pairs.jpg'} and {out / 'distances.png'}; next:")
    print(pretrain_command(hands.folder, out, int(paired.sum())))


def draw_pairs(path, hands, pairs, turns=None, seed=0):
    """Queries beside their nearest neighbours, turned as pre-training will see them, with
    skeletons and distances; two rows each of the best, the median and the worst tenth."""
    rng = np.random.default_rng(seed)
    order = np.argsort(pairs.distances[:, 0], kind="stable")
    order = order[pairs.neighbours[order, 0] >= 0]
    tenth = max(len(order) // 10, 1)
    middle = (len(order) - tenth) // 2
    parts = {"best": order[:tenth], "median": order[middle:middle + tenth],
             "worst": order[-tenth:]}
    shown = min(pairs.neighbours.shape[1], 5)
    across = 12 // (1 + shown)
    black = np.zeros((160, 160, 3), np.uint8)
    tiles = []
    for name, part in parts.items():
        for i in rng.permutation(part)[:2 * across]:
            group = [draw_crop(hands, i, 160, f"{name}: hand {i}")]
            for k, row in enumerate(pairs.neighbours[i, :shown]):
                turn = 0.0 if turns is None else turns[i, k]
                text = f"distance {pairs.distances[i, k]:.2f}"
                if turn:
                    text += f", turned {turn:.0f}"
                group.append(draw_crop(hands, row, 160, text, turn) if row >= 0 else black)
            tiles.append(np.hstack([*group, black[:, :8]]))
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % across)
    save_image(path, sheet(tiles, across))


def plot_distances(path, embeddings, distances, unit, seed=0):
    """Histogram of the nearest neighbours' distances beside that of random pairs."""
    a, b = np.random.default_rng(seed).integers(0, len(embeddings), (2, 20000))
    chance = np.linalg.norm(embeddings[a] - embeddings[b], axis=1)[a != b]
    bins = np.linspace(0, np.quantile(chance, 0.99), 60)
    with figure(path, (6, 3.5)) as drawn:
        axis = drawn.subplots()
        for values, label in ((distances, "nearest neighbour"), (chance, "random pair")):
            axis.hist(np.minimum(values, bins[-1]), bins, density=True, alpha=0.6, label=label)
        axis.set_xlabel(f"distance in the PCA embedding, over all joints;\n1: the {unit}")
        axis.set_ylabel("density")
        axis.legend()


if __name__ == "__main__":
    run_script(main)
