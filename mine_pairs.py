"""Find for every hand its nearest neighbours in other videos: the positive pairs of SiMHand.

Reads a hands folder, embeds each hand's 21 keypoints (divided by the crop's side, 42
numbers) by PCA in 14 dimensions, and searches exactly: by a tree on the CPU, by brute force
on a GPU, with the same result. Writes into the same folder (or --out): pca.npy,
embeddings.npy, distances.npy, neighbours.npy, with --rotation-free turns.npy, and to look
at pairs.jpg, distances.png and mining.jsonl. Under torchrun each rank searches for its
share of the hands. A search that was stopped starts again: it takes minutes.

    python mine_pairs.py data/ego4d
    python mine_pairs.py data/ego4d --limit 100000 --out data/ego4d-100k
    python mine_pairs.py demo/hands --top-k 5

To read: arguments, main, then what is compared (poses, temporal pairs). The exact search is
engineering, not method; whoever trusts brute force may stop at its banner.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from common import (atomic, check_flags, draw_crop, end_ranks, load_hands, open_folder, pair_turns,
                    plain, print_settings, progress, read_log, require, run_script, save_array,
                    save_image, sheet, start_ranks)

PALM = (5, 9, 13, 17)  # the joints whose mean, seen from the wrist, says where a hand points


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("hands", help="hands folder, as extract_hands.py writes it")
    flag("--out", help="folder for the pairs (default: the hands folder itself)")
    flag("--dims", type=int, default=14,
         help="dimensions of the PCA embedding, 1 to 42 (paper: 14)")
    # which pairs
    flag("--top-k", type=int, default=1,
         help="neighbours kept for each hand (paper: 1); the search takes longer with more")
    flag("--rotation-free", action="store_true", help="compare hands turned upright (wrist to the "
         "mean of joints 5, 9, 13 and 17) and of one size, however they lie in the picture; "
         "turns.npy says how a neighbour must be turned to lie as the hand does (paper: hands as "
         "they lie)")
    flag("--same-video", action="store_true", help="let a neighbour come from the hand's own video "
         "(ablation: mostly near-duplicates)")
    flag("--temporal", action="store_true", help="instead of similar hands: the hand of the same "
         "side with the nearest box in the next sampled frame of the same video (as in TempCLR)")
    flag("--limit", type=int, help="mine within so many hands, drawn at random, as if there were "
         "no others (paper: 50k to 2M); of one seed the smaller set lies in the larger (default: "
         "all)")
    flag("--seed", type=int, default=0, help="of --limit")
    # the machine
    flag("--device",
         help="cpu or cuda (default: the GPU when there is one); the result is the same")
    return parser


def parse_args():
    args = make_parser().parse_args()
    check_flags(args)
    require(1 <= args.dims <= 42 and args.top_k >= 1,
            "--dims must lie in 1..42, --top-k must be at least 1")
    if args.temporal:
        fits = args.top_k == 1 and args.limit is None
        require(fits and not args.same_video and not args.rotation_free,
                "--temporal pairs a hand with the next frame: it goes without --top-k, --limit, "
                "--same-video and --rotation-free")
    return args


def main():
    args = parse_args()
    rank, ranks, device = start_ranks(args.device)
    hands = load_hands(args.hands)
    count = len(hands.keypoints)
    mined = choose_rows(hands, args)
    out = Path(args.out or args.hands)
    is_its_own = out.resolve() == hands.folder.resolve()
    require(is_its_own or not (out / "keypoints.npy").exists(),
            f"{out}: is another hands folder, these pairs do not belong there")
    if rank == 0:
        open_folder(out)  # locked until the script ends
        videos = len(np.unique(hands.rows["video"][mined]))
        print_settings(args, make_parser(), count=count, mined=len(mined), videos=videos,
                       ranks=ranks, device=device)

    pca, explained, embeddings = embed(hands, mined, args)
    if ranks > 1:  # other processors may round otherwise
        shared = torch.from_numpy(embeddings).to(device)
        dist.broadcast(shared, 0)
        embeddings = shared.cpu().numpy()
    neighbours = np.full((count, args.top_k), -1)
    distances = np.full((count, args.top_k), np.inf, np.float32)
    if args.temporal:
        neighbours[:, 0], distances[:, 0] = next_frames(hands, embeddings)
    else:
        video = None if args.same_video else hands.rows["video"][mined]
        found, distances[mined] = nearest(embeddings[mined], video, args.top_k, device,
                                          slice(rank, None, ranks))
        neighbours[mined] = np.where(found < 0, -1, mined[found])
    if rank == 0:
        write(out, hands, pca, embeddings, neighbours, distances, explained, len(mined), args)
    end_ranks()


def choose_rows(hands, args):
    """The rows of the hands that take part, ascending; an InputError where there are too few."""
    count = len(hands.keypoints)
    name = f"{hands.folder / 'hands.npy'}"
    require(args.limit is None or args.limit <= count,
            f"{name}: {count} hands, fewer than --limit {args.limit}")
    if args.limit is not None:
        name += f", --limit {args.limit}"
    mined = np.sort(np.random.default_rng(args.seed).permutation(count)[:args.limit])
    require(len(mined) > args.dims,
            f"{name}: {len(mined)} hands, a PCA of --dims {args.dims} needs {args.dims + 1}")
    if args.temporal:
        order = hands.rows["video"].astype(np.int64) << 32 | hands.rows["frame"]
        require((np.diff(order) >= 0).all(), f"{name}: rows must be sorted by video, then frame")
        return mined
    sizes = np.unique(hands.rows["video"][mined], return_counts=True)[1]
    require(len(sizes) > 1 or args.same_video, f"{name}: all {len(mined)} hands come from one "
            "video, but neighbours are taken from other videos; extract more videos or allow "
            "--same-video")
    most = len(mined) - (1 if args.same_video else sizes.min())
    require(args.top_k <= most,
            f"{name}: no hand has more than {most} candidates, --top-k is {args.top_k}")
    return mined


# ------------------------------------------------------------------ the method: what is compared

def embed(hands, mined, args):
    """Fit the PCA on the mined rows and embed all hands -> pca (1 + D, 42), the mean and the
    components; share of the variance explained; embeddings (N, D) float32."""
    poses = as_poses(hands.keypoints[mined], hands.side, args.rotation_free)
    require(np.ptp(poses, axis=0).max() > 1e-9, f"{hands.folder / 'keypoints.npy'}: all hands are "
            "the same, a PCA needs them to vary")
    mean, components, explained = fit_pca(poses, args.dims)
    del poses
    embeddings = np.empty((len(hands.keypoints), args.dims), np.float32)
    for start in range(0, len(embeddings), 1 << 16):  # bounds the memory
        some = slice(start, start + (1 << 16))
        poses = as_poses(hands.keypoints[some], hands.side, args.rotation_free)
        embeddings[some] = (poses - mean) @ components.T
    return np.concatenate([mean[None], components]).astype(np.float32), explained, embeddings


def as_poses(keypoints, side, rotation_free):
    """keypoints (N, 21, 2) in pixels of crops of this side -> what is embedded, (N, 42) float64.

    Their place in the crop, or, rotation-free, what is left of a hand without its place, size and
    direction: its mean is 0, the root mean square distance from it 1, and the mean of joints 5, 9,
    13 and 17 lies above the wrist.
    """
    if not rotation_free:
        return keypoints.reshape(-1, 42) * np.float64(1 / side)
    points = keypoints - keypoints.mean(1, keepdims=True, dtype=np.float64)
    size = np.sqrt(np.square(points).sum(2).mean(1))
    points /= np.maximum(size, 1e-9)[:, None, None]
    palm = points[:, PALM].mean(1) - points[:, 0]
    angle = np.arctan2(palm[:, 0], -palm[:, 1])  # from straight up, clockwise
    cos = np.cos(angle)[:, None]
    sin = np.sin(angle)[:, None]
    x = cos * points[:, :, 0] + sin * points[:, :, 1]
    y = cos * points[:, :, 1] - sin * points[:, :, 0]
    return np.stack([x, y], 2).reshape(-1, 42)


def fit_pca(poses, dims):
    """poses (N, 42) float64 -> mean (42,), components (dims, 42), share of the variance explained.

    A component's sign is free in a PCA; here its largest loading is positive, so that the result
    does not depend on the library.
    """
    solver = "covariance_eigh" if len(poses) > 42 else "full"
    pca = PCA(dims, svd_solver=solver).fit(poses)
    largest = np.abs(pca.components_).argmax(1)
    signs = np.sign(pca.components_[np.arange(dims), largest])
    return pca.mean_, pca.components_ * signs[:, None], pca.explained_variance_ratio_.sum()


def next_frames(hands, embeddings):
    """Temporal pairs: the hand of the same side with the nearest box in the next sampled frame of
    the same video -> its row (N,), -1 where there is none; its distance (N,), inf there.

    Rows are sorted by video and frame. Frames without hands have no rows: two frames follow each
    other when nothing lies between them in the source, or when they are at most 1.5 sampling
    intervals apart (where the rate is not known: 1.5 times the median).
    """
    log = hands.folder / "log.jsonl"
    fps = read_log(log)[0]["args"].get("fps") if log.exists() else None
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
    # Of each row: the rows begin .. end of the next frame, none where none follows.
    begin = np.repeat(np.where(follows, np.append(first[1:], 0), 0), size)
    end = begin + np.repeat(np.where(follows, np.append(size[1:], 0), 0), size)
    centre = (rows["box"][:, :2] + rows["box"][:, 2:]) / 2
    neighbour = np.full(count, -1)
    nearest_box = np.full(count, np.inf)
    for k in range(size.max()):
        other = np.minimum(begin + k, count - 1)
        gap = np.linalg.norm(centre[other] - centre, axis=1)
        alike = (begin + k < end) & (rows["left"][other] == rows["left"])
        closer = alike & (gap < nearest_box)
        neighbour[closer] = other[closer]
        nearest_box[closer] = gap[closer]
    require((neighbour >= 0).any(), f"{hands.folder / 'hands.npy'}: no hand is seen again in the "
            "next sampled frame of its video")
    difference = embeddings[neighbour].astype(np.float64) - embeddings
    distance = np.sqrt((difference ** 2).sum(1))
    return neighbour, np.where(neighbour < 0, np.inf, distance).astype(np.float32)


# --------------------------------------------------------------------------- the exact search

NONE = torch.iinfo(torch.int64).max  # the key of no neighbour: it comes after all others
TILE = 16


def nearest(embeddings, video, top_k, device, share=slice(None), leaf=256, dense=32,
            budget=1 << 21):
    """Exact nearest neighbours of every row among the rows of other videos (video None: among all
    other rows).

    embeddings (N, D) float32, finite; video (N,) -> neighbours (N, K) int64, -1 where there are
    fewer; distances (N, K) float32, inf there. A distance is the root of the float64 sum of squared
    differences, rounded to float32; of equal ones the lower index comes first.

    The rows are parted into leaves of a k-d tree, and a leaf's rows are searched for
    together; share: the leaves that this rank searches for. On a CPU boxes decide which
    leaves are looked into, but for the `dense` nearest; a GPU looks into all: there a
    product is cheaper than a decision. budget: products at a time.
    """
    if device.type == "cuda":
        dense = len(embeddings)
        budget = 1 << 26
    group = np.arange(len(embeddings)) if video is None else video
    tree = grow_tree(embeddings, group, leaf, device)
    keys = torch.full((len(embeddings), top_k), NONE, device=device)

    def work(block):
        found = search(tree, block, top_k, dense, budget)
        real = ~tree.extra[block]
        keys[tree.row[block][real]] = found[real]

    blocks = range(len(tree.row))[share]
    sizes = (~tree.extra).sum(1)[share].tolist()
    threads = torch.get_num_threads()
    workers = 1 if device.type == "cuda" else threads
    torch.set_num_threads(1)  # a block to a thread: its steps are too small to be parted
    pool = ThreadPoolExecutor(workers, "search", torch.set_num_threads, (1,))
    silent = len(blocks) < 20 or blocks[0] > 0  # one rank shows its bar
    with pool, progress(total=sum(sizes), unit="hand", desc="neighbours", disable=silent) as bar:
        for size, _ in zip(sizes, pool.map(work, blocks)):
            bar.update(size)
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.all_reduce(keys, dist.ReduceOp.MIN)
    keys = keys.cpu()
    require(dist.is_initialized() is False or (keys[:, 0] != NONE).all(),
            "the ranks parted the hands differently; start them on machines of one kind")
    distances = (keys >> 32).int().view(torch.float32).masked_fill_(keys == NONE, torch.inf)
    neighbours = (keys & 0xFFFFFFFF).masked_fill_(keys == NONE, -1)
    return neighbours.numpy(), distances.numpy()


@dataclasses.dataclass
class Tree:
    """n leaves of L places. A leaf with fewer rows repeats one of them in its last places,
    which are marked as extra and lie at an infinite distance."""
    row: torch.Tensor  # (n, L)
    extra: torch.Tensor  # (n, L) bool
    group: torch.Tensor  # (n, L), the video
    point: torch.Tensor  # (n, L, D)
    norm: torch.Tensor  # (n, L), squared
    low: torch.Tensor  # (n, D), the corners of the leaf's box
    high: torch.Tensor
    column: torch.Tensor  # (n, L, D + 1), point and norm, for the products


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
    size = max(map(len, parts))
    lengths = np.array([len(part) for part in parts])
    extra = torch.from_numpy(np.arange(size) >= lengths[:, None]).to(device)
    padded = [np.pad(part, (0, size - len(part)), "edge") for part in parts]
    row = torch.from_numpy(np.stack(padded)).to(device)
    point = torch.from_numpy(embeddings).to(device)[row]
    norm = point.square().sum(2)
    column = torch.cat([point, norm.masked_fill(extra, torch.inf)[:, :, None]], 2)
    group = torch.from_numpy(group.astype(np.int32)).to(device)[row]
    return Tree(row, extra, group, point, norm, point.amin(1), point.amax(1), column)


@dataclasses.dataclass
class Query:
    """The rows of one leaf, whose neighbours are searched for."""
    point: torch.Tensor  # (L, D)
    group: torch.Tensor  # (L,)
    norm: torch.Tensor  # (L,), squared
    column: torch.Tensor  # (L, D + 1): its product with a tree's column is |p|^2 - 2 qp
    best: torch.Tensor  # (L, K), the least squared distances in K leaves
    limit: torch.Tensor  # (L,): in a leaf further away than that there is no neighbour


def search(tree, block, top_k, dense, budget):
    """Neighbours of the rows of one leaf -> keys (L, K), ascending: the bits of the float32
    distance, which order like the number, above the row's index; NONE where there is no
    neighbour.

    Leaves are visited from the nearest box on, and rows leave the search when no box can
    hold anything nearer. What is known of a row in a leaf is the least squared distance
    there, from a product in float32. The K-th least over all leaves, plus what the products
    may be wrong by, says which leaves can hold one of the K neighbours. Those alone are
    compared in float64. What is equal, or a box away, up to rounding is let through: the
    factors 1e-6 and 1e-5 are some ten times what rounding does.
    """
    n, size, dims = tree.point.shape
    point = tree.point[block]
    norm = tree.norm[block]
    query = Query(point, tree.group[block], norm,
                  column=torch.cat([-2 * point, torch.ones_like(point[:, :1])], 1),
                  best=norm.new_full((size, top_k), torch.inf),
                  limit=norm.new_full((size,), torch.inf))
    below = (tree.low - tree.high[block]).clamp_(min=0)
    above = (tree.low[block] - tree.high).clamp_(min=0)
    gaps = (below + above).square_().sum(1).mul_(1 - 1e-5)
    bound, near = gaps.sort()
    active = torch.arange(size, device=near.device)  # places of the rows still searching
    start = 0
    found = []
    while start < n and len(active):
        if start < dense:
            step = max(budget // (len(active) * size), 1)
            leaf = near[start:min(start + step, dense)]
            looked = look_into_all(tree, leaf, query, active)
        else:
            step = max(budget // (8 * len(active)), 1)
            leaf = near[start:start + step]
            looked = look_into_near(tree, leaf, query, active)
        found.append(keep_possible(query, active, leaf, looked))
        start += len(leaf)
        if start < n:
            active = active[query.limit[active] >= bound[start]]
    place, leaf, least = (torch.cat(part) for part in zip(*found))
    keep = least <= query.limit[place]
    return compare(tree, query, place[keep], leaf[keep], top_k)


def look_into_all(tree, leaf, query, active):
    """Least squared distance of each active row in each of these leaves -> number of the row in
    `active`, number of the leaf in `leaf`, squared distance; (rows x leaves,) each."""
    count = len(active)
    columns = tree.column[leaf].flatten(0, 1)
    product = (query.column[active] @ columns.T).view(count, len(leaf), -1)
    same = tree.group[leaf] == query.group[active][:, None, None]
    least = product.masked_fill_(same, torch.inf).amin(2) + query.norm[active][:, None]
    rows = torch.arange(count, device=leaf.device).repeat_interleave(len(leaf))
    leaves = torch.arange(len(leaf), device=leaf.device).repeat(count)
    return rows, leaves, least.flatten()


def look_into_near(tree, leaf, query, active):
    """The same, but only where a leaf's box is nearer to the row than its limit.

    The rows that look into a leaf are few, so they are packed in tiles of 16, one or more for each
    leaf: with 18 rows for leaf 0, none for leaf 1 and 3 for leaf 2, tiles 0 and 1 belong to leaf 0,
    tile 2 to leaf 2, and 14 + 13 places stay unused.
    """
    point = query.point[active]
    gap = query.limit.new_zeros(len(leaf), len(active))
    for k in range(point.shape[1]):
        before = tree.low[leaf][:, k, None] - point[:, k]
        behind = point[:, k] - tree.high[leaf][:, k, None]
        outside = torch.maximum(before, behind).clamp_(min=0)
        gap.addcmul_(outside, outside)
    wanted = gap.mul_(1 - 1e-5) <= query.limit[active]
    leaves, rows = wanted.nonzero(as_tuple=True)  # by leaf, then row
    times = wanted.sum(1)
    tiles = (times + TILE - 1) // TILE
    first = times.cumsum(0) - times  # of each leaf's rows
    number = torch.arange(len(leaves), device=leaf.device) - first[leaves]
    first_tile = tiles.cumsum(0) - tiles
    place = TILE * first_tile[leaves] + number
    packed = torch.zeros(int(tiles.sum()) * TILE, dtype=torch.int64, device=leaf.device)
    packed[place] = active[rows]
    packed = packed.view(-1, TILE)
    leaf_of = leaf.repeat_interleave(tiles)
    product = query.column[packed] @ tree.column[leaf_of].transpose(1, 2)
    same = tree.group[leaf_of][:, None] == query.group[packed][:, :, None]
    least = product.masked_fill_(same, torch.inf).amin(2).flatten()[place]
    return rows, leaves, least + query.norm[active][rows]


def keep_possible(query, active, leaf, looked):
    """Update what the query's rows know -> places of rows, numbers of leaves and least squared
    distances, of the pairs in which a neighbour may still be."""
    rows, leaves, least = looked
    top_k = query.best.shape[1]
    table = least.new_full((len(active), len(leaf)), torch.inf)
    table[rows, leaves] = least
    both = torch.cat([query.best[active], table], 1)
    query.best[active] = both.topk(top_k, 1, largest=False).values
    worst = query.best[active, -1]
    # |q|^2 + |p|^2 - 2 qp in float32 is wrong by less than (2 D + 8) 2^-24 (|q| + |p|)^2,
    # where p is as far from q as `worst`, so that |p| <= |q| + sqrt(worst); it counts
    # twice, once for `worst` and once for what is compared.
    dims = query.point.shape[1]
    reach = 2 * query.norm[active].sqrt() + worst.clamp(min=0).sqrt()
    error = (dims + 4) * 2.0 ** -22 * reach.square()
    query.limit[active] = worst * (1 + 1e-6) + error
    place = active[rows]
    keep = (least <= query.limit[place]) & (least < torch.inf)
    return place[keep], leaf[leaves[keep]], least[keep]


def compare(tree, query, place, leaf, top_k):
    """Exact distances of the row at place[i] to all points of leaf[i] -> keys (L, K) of each row's
    nearest, as in `search`."""
    size = tree.row.shape[1]
    order = place.argsort(stable=True)
    place = place[order]
    leaf = leaf[order]
    keys = torch.full((len(place), min(top_k, size)), NONE, device=place.device)
    for some in torch.arange(len(place), device=place.device).split(1 << 12):
        points = tree.point[leaf[some]].double()
        difference = points - query.point[place[some], None].double()
        square = difference[:, :, 0] * difference[:, :, 0]
        for k in range(1, difference.shape[2]):  # in order: how a sum is parted differs by device
            square += difference[:, :, k] * difference[:, :, k]
        bits = square.sqrt_().float().view(torch.int32).long()
        key = bits << 32 | tree.row[leaf[some]]
        same = tree.group[leaf[some]] == query.group[place[some], None]
        key.masked_fill_(same | tree.extra[leaf[some]], NONE)
        keys[some] = key.topk(keys.shape[1], 1, largest=False).values
    first = torch.searchsorted(place, place)
    number = torch.arange(len(place), device=place.device) - first  # of the leaf among its row's
    most = int(number.max()) + 1 if len(place) else 1
    table = torch.full((size, max(most, top_k), keys.shape[1]), NONE, device=place.device)
    table[place, number] = keys
    return table.flatten(1).topk(top_k, 1, largest=False).values


# -------------------------------------------------------------------------- files and pictures

def write(out, hands, pca, embeddings, neighbours, distances, explained, mined, args):
    """All files; neighbours.npy after the other arrays: where it is, they are of one mining."""
    if (out / "neighbours.npy").exists():
        print(f"{out / 'neighbours.npy'}: an earlier mining is replaced")
        (out / "neighbours.npy").unlink()
    (out / "turns.npy").unlink(missing_ok=True)
    save_array(out / "pca.npy", pca)
    save_array(out / "embeddings.npy", embeddings)
    save_array(out / "distances.npy", distances)
    turns = None
    if args.rotation_free:
        turns = pair_turns(hands.keypoints, neighbours)
        save_array(out / "turns.npy", turns)
    save_array(out / "neighbours.npy", neighbours)

    paired = neighbours[:, 0] >= 0
    chosen = np.bincount(neighbours[paired, 0])
    videos = np.unique(hands.rows["video"][neighbours[paired, 0]])
    summary = {"hands": len(neighbours), "explained_variance": round(float(explained), 4),
               "mined": mined, "without_neighbour": mined - int(paired.sum()),
               "neighbours_from_videos": len(videos), "hubs_over_100": int((chosen > 100).sum()),
               "most_often_chosen": int(chosen.max()),
               "median_distance": round(float(np.median(distances[paired, 0])), 4)}
    with atomic(out / "mining.jsonl") as file:
        for row in ({"command": shlex.join(sys.argv), "args": plain(args)}, summary):
            file.write((json.dumps(row) + "\n").encode())
    print("  ".join(f"{key} {value}" for key, value in summary.items()))
    draw_pairs(out / "pairs.jpg", hands, neighbours, distances, turns)
    unit = "hand's size" if args.rotation_free else "crop's side"
    plot_distances(out / "distances.png", embeddings, distances[paired, 0], unit)
    print(f"wrote {out}, see {out / 'pairs.jpg'} and {out / 'distances.png'}; next:")
    pairs = f" --pairs {out}" if args.out else ""
    print(f"python pretrain.py {args.hands} --out RUN{pairs}")


def draw_pairs(path, hands, neighbours, distances, turns=None, seed=0):
    """Queries beside their nearest neighbours, turned as pre-training will see them, skeletons
    drawn, the distance under each; two rows each of the best, the median and the worst tenth."""
    rng = np.random.default_rng(seed)
    order = np.argsort(distances[:, 0], kind="stable")
    order = order[neighbours[order, 0] >= 0]
    tenth = max(len(order) // 10, 1)
    middle = (len(order) - tenth) // 2
    parts = {"best": order[:tenth], "median": order[middle:middle + tenth],
             "worst": order[-tenth:]}
    shown = min(neighbours.shape[1], 5)
    across = 12 // (1 + shown)
    tiles = []
    for name, part in parts.items():
        for i in rng.permutation(part)[:2 * across]:
            group = [caption(draw_crop(hands, i, 160), f"{name}: hand {i}")]
            for k in range(shown):
                turn = 0.0 if turns is None else turns[i, k]
                group.append(draw_neighbour(hands, neighbours[i, k], distances[i, k], turn))
            gap = np.zeros((180, 8, 3), np.uint8)
            tiles.append(np.hstack([*group, gap]))
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % across)
    save_image(path, sheet(tiles, across))


def draw_neighbour(hands, row, distance, turn):
    """A neighbour's crop with its distance under it; a black one where there is none."""
    if row < 0:
        return caption(np.zeros((160, 160, 3), np.uint8), "none")
    return caption(draw_crop(hands, row, 160, turn=turn), f"{distance:.3f}")


def caption(image, text):
    """A strip with a text under a picture."""
    strip = np.zeros((20, image.shape[1], 3), np.uint8)
    cv2.putText(strip, text, (4, 14), 0, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    return np.vstack([image, strip])


def plot_distances(path, embeddings, distances, unit, seed=0):
    """Histogram of the nearest neighbours' distances beside that of random pairs."""
    a, b = np.random.default_rng(seed).integers(0, len(embeddings), (2, 20000))
    chance = np.linalg.norm(embeddings[a] - embeddings[b], axis=1)[a != b]
    figure = Figure(figsize=(6, 3.5), layout="tight")
    axis = figure.subplots()
    bins = np.linspace(0, np.quantile(chance, 0.99), 60)
    for values, label in ((distances, "nearest neighbour"), (chance, "random pair")):
        axis.hist(np.minimum(values, bins[-1]), bins, density=True, alpha=0.6, label=label)
    axis.set_xlabel(f"distance in the PCA embedding (1 = the {unit})")
    axis.set_ylabel("density")
    axis.legend()
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    run_script(main)
