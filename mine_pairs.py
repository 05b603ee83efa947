"""Find for every hand its nearest neighbours in other videos: the positive pairs of SiMHand.

Reads a hands folder, embeds each hand's 21 keypoints (divided by the crop's side, 42 numbers) by PCA in 14 dimensions,
and searches exactly: by a tree on the CPU, by brute force on a GPU, with the same result. Writes into the same folder
(or --out): pca.npy, embeddings.npy, distances.npy, neighbours.npy, and to look at pairs.jpg, distances.png and
mining.jsonl. Under torchrun each rank searches for its share of the hands. A search that was stopped starts again: it
takes minutes.

    python mine_pairs.py data/ego4d
    python mine_pairs.py data/ego4d --limit 100000 --out data/ego4d-100k
    python mine_pairs.py demo/hands --top-k 5
"""

import argparse
import json
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from tqdm import tqdm

from common import (atomic, best_turns, check_flags, draw_crop, load_hands, open_folder, plain, print_settings, read_log, require,
                    run_script, save_array, save_image, sheet, start_ranks)

NONE = torch.iinfo(torch.int64).max  # the key of no neighbour: it comes after all others


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hands", help="hands folder, as extract_hands.py writes it")
    parser.add_argument("--out", help="folder for the pairs (default: the hands folder itself)")
    parser.add_argument("--dims", type=int, default=14, help="dimensions of the PCA embedding, 1 to 42 (paper: 14)")
    # which pairs
    parser.add_argument("--top-k", type=int, default=1, help="neighbours kept for each hand (paper: 1); the search "
                        "takes longer with more")
    parser.add_argument("--rotation-free", action="store_true", help="compare hands turned upright (wrist to the mean "
                        "of joints 5, 9, 13 and 17) and of one size, however they lie in the picture; turns.npy says "
                        "how a neighbour must be turned to lie as the hand does (paper: hands as they lie)")
    parser.add_argument("--same-video", action="store_true",
                        help="let a neighbour come from the hand's own video (ablation: mostly near-duplicates)")
    parser.add_argument("--temporal", action="store_true", help="instead of similar hands: the hand of the same side "
                        "with the nearest box in the next sampled frame of the same video (as in TempCLR)")
    parser.add_argument("--limit", type=int, help="mine within so many hands, drawn at random, as if there were no "
                        "others (paper: 50k to 2M); of one seed the smaller set lies in the larger (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of --limit")
    # the machine
    parser.add_argument("--device", help="cpu or cuda (default: the GPU when there is one); the result is the same")
    args = parser.parse_args()
    check_flags(args)
    require(1 <= args.dims <= 42 and args.top_k >= 1, "--dims must lie in 1..42, --top-k must be at least 1")
    require(not args.temporal or (args.top_k == 1 and args.limit is None and not args.same_video
                                  and not args.rotation_free), "--temporal pairs a hand with the next frame: it goes "
            "without --top-k, --limit, --same-video and --rotation-free")
    return args


def main():
    args = parse_args()
    rank, ranks, device = start_ranks(args.device)
    hands = load_hands(args.hands)
    listed, count = f"{hands.folder / 'hands.npy'}", len(hands.keypoints)
    require(args.limit is None or args.limit <= count, f"{listed}: {count} hands, fewer than --limit {args.limit}")
    listed += "" if args.limit is None else f", --limit {args.limit}"
    mined = np.sort(np.random.default_rng(args.seed).permutation(count)[:args.limit])  # the rows that take part
    video = hands.hands["video"][mined]
    sizes = np.bincount(video)
    videos = np.count_nonzero(sizes)
    require(len(mined) > args.dims, f"{listed}: {len(mined)} hands, a PCA of --dims {args.dims} needs {args.dims + 1}")
    if args.temporal:
        order = hands.hands["video"].astype(np.int64) << 32 | hands.hands["frame"]
        require((np.diff(order) >= 0).all(), f"{listed}: rows must be sorted by video, then frame")
    else:
        require(videos > 1 or args.same_video, f"{listed}: all {len(mined)} hands come from one video, but neighbours "
                "are taken from other videos; extract more videos or allow --same-video")
        most = len(mined) - (1 if args.same_video else sizes[sizes > 0].min())
        require(args.top_k <= most, f"{listed}: no hand has more than {most} candidates, --top-k is {args.top_k}")
    out = Path(args.out or args.hands)
    require(not (out / "keypoints.npy").exists() or out.resolve() == hands.folder.resolve(),
            f"{out}: is another hands folder, these pairs do not belong there")
    lock = open_folder(out) if rank == 0 else None  # held until the process ends
    if rank == 0:
        print_settings(args, count=count, mined=len(mined), videos=videos, ranks=ranks, device=device)
    poses = as_poses(hands.keypoints[mined], hands.side, args.rotation_free)
    require(np.ptp(poses, axis=0).max() > 1e-9,
            f"{hands.folder / 'keypoints.npy'}: all hands are the same, a PCA needs them to vary")
    mean, components, explained = fit_pca(poses, args.dims)
    embeddings = np.empty((count, args.dims), np.float32)
    for start in range(0, count, 1 << 16):
        piece = slice(start, start + (1 << 16))
        poses = as_poses(hands.keypoints[piece], hands.side, args.rotation_free)
        embeddings[piece] = (poses - mean) @ components.T
    del poses
    if ranks > 1:  # other processors may round otherwise
        shared = torch.from_numpy(embeddings).to(device)
        dist.broadcast(shared, 0)
        embeddings = shared.cpu().numpy()
    neighbours, distances = np.full((count, args.top_k), -1), np.full((count, args.top_k), np.inf, np.float32)
    if args.temporal:
        log = hands.folder / "log.jsonl"
        fps = read_log(log)[0]["args"].get("fps") if log.exists() else None
        neighbours[:, 0], distances[:, 0] = next_frames(hands.hands, embeddings, fps)
        require((neighbours >= 0).any(), f"{listed}: no hand is seen again in the next sampled frame of its video")
    else:
        found, distances[mined] = nearest(embeddings[mined], None if args.same_video else video, args.top_k, device,
                                          slice(rank, None, ranks))
        require((found[:, 0] >= 0).all(), "the ranks parted the hands differently; start them on machines of one kind")
        neighbours[mined] = np.where(found < 0, -1, mined[found])
    if rank == 0:
        pca = np.concatenate([mean[None], components]).astype(np.float32)
        summary = {"explained_variance": round(float(explained), 4), "mined": len(mined)}
        write(out, hands, pca, embeddings, neighbours, distances, summary, args)
    if ranks > 1:
        dist.destroy_process_group()


def write(out, hands, pca, embeddings, neighbours, distances, summary, args):
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
    summary = {"hands": len(neighbours), **summary, "without_neighbour": summary["mined"] - int(paired.sum()),
               "neighbours_from_videos": len(np.unique(hands.hands["video"][neighbours[paired, 0]])),
               "hubs_over_100": int((chosen > 100).sum()), "most_often_chosen": int(chosen.max()),
               "median_distance": round(float(np.median(distances[paired, 0])), 4)}
    with atomic(out / "mining.jsonl") as file:
        for row in ({"command": shlex.join(sys.argv), "args": plain(args)}, summary):
            file.write((json.dumps(row) + "\n").encode())
    print("  ".join(f"{key} {value}" for key, value in summary.items()))
    draw_pairs(out / "pairs.jpg", hands, neighbours, distances, turns)
    unit = "hand's size" if args.rotation_free else "crop's side"
    plot_distances(out / "distances.png", embeddings, distances[paired, 0], unit)
    print(f"wrote {out}, see {out / 'pairs.jpg'} and {out / 'distances.png'}; next:\n"
          f"python pretrain.py {args.hands} --out RUN" + (f" --pairs {out}" if args.out else ""))


def as_poses(keypoints, side, rotation_free):
    """keypoints (N, 21, 2) in pixels of crops of this side -> what the embedding is made of, (N, 42) float64: their
    place in the crop, or rotation-free what is left of a hand once its place, size and direction are taken away: its
    mean is 0, the root mean square distance from it 1, and the mean of joints 5, 9, 13 and 17 lies above the wrist."""
    if not rotation_free:
        return keypoints.reshape(-1, 42) * np.float64(1 / side)
    points = keypoints - keypoints.mean(1, keepdims=True, dtype=np.float64)
    size = np.sqrt(np.square(points).sum(2).mean(1))
    points /= np.maximum(size, 1e-9)[:, None, None]
    palm = points[:, [5, 9, 13, 17]].mean(1) - points[:, 0]
    angle = np.arctan2(palm[:, 0], -palm[:, 1])  # from straight up, clockwise
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x = cos * points[:, :, 0] + sin * points[:, :, 1]
    y = cos * points[:, :, 1] - sin * points[:, :, 0]
    return np.stack([x, y], 2).reshape(-1, 42)


def pair_turns(keypoints, neighbours):
    """-> turns (N, K) float32, degrees as in cv2.getRotationMatrix2D, by which the picture of each neighbour must be
    turned so that its hand lies as the hand of that row does; NaN where there is no neighbour."""
    turns = np.full(neighbours.shape, np.nan, np.float32)
    for k, column in enumerate(neighbours.T):
        rows = np.flatnonzero(column >= 0)
        for some in np.array_split(rows, len(rows) // (1 << 16) + 1):  # bounds the memory
            turns[some, k] = best_turns(keypoints[some], keypoints[column[some]])
    return turns


def fit_pca(poses, dims):
    """poses (N, 42) float64 -> mean (42,), components (dims, 42), share of the variance explained. The component's sign
    is free in a PCA; here its largest loading is positive, so that the result does not depend on the library."""
    pca = PCA(dims, svd_solver="covariance_eigh" if len(poses) > 42 else "full").fit(poses)
    largest = np.abs(pca.components_).argmax(1)
    signs = np.sign(pca.components_[np.arange(dims), largest])
    return pca.mean_, pca.components_ * signs[:, None], pca.explained_variance_ratio_.sum()


def next_frames(rows, embeddings, fps=None):
    """Temporal pairs. rows (N,) of hands.npy, sorted by video and frame -> neighbour (N,), -1 where the next sampled
    frame shows no hand of that side; distance (N,), inf there. Frames without hands have no rows: two frames follow
    each other when nothing lies between them in the source, or when they are at most 1.5 / fps apart (fps None: 1.5
    times the median)."""
    first = np.flatnonzero(np.diff(rows["video"], prepend=-1) | np.diff(rows["frame"], prepend=-1))  # row of each frame
    size = np.diff(first, append=len(rows))
    same, apart = np.diff(rows["video"][first]) == 0, np.diff(rows["time"][first])
    usual = 1 / fps if fps else np.median(apart[same]) if same.any() else 0
    follows = np.append(same & ((apart <= 1.5 * usual) | (np.diff(rows["frame"][first]) == 1)), False)
    begin = np.repeat(np.where(follows, np.append(first[1:], 0), 0), size)
    end = begin + np.repeat(np.where(follows, np.append(size[1:], 0), 0), size)
    centre = (rows["box"][:, :2] + rows["box"][:, 2:]) / 2
    neighbour, nearest_box = np.full(len(rows), -1), np.full(len(rows), np.inf)
    for k in range(size.max()):
        other = np.minimum(begin + k, len(rows) - 1)
        gap = np.linalg.norm(centre[other] - centre, axis=1)
        closer = (begin + k < end) & (rows["left"][other] == rows["left"]) & (gap < nearest_box)
        neighbour[closer], nearest_box[closer] = other[closer], gap[closer]
    difference = embeddings[neighbour].astype(np.float64) - embeddings
    return neighbour, np.where(neighbour < 0, np.inf, np.sqrt((difference ** 2).sum(1))).astype(np.float32)


# ---------------------------------------------------------------------------------------------- exact search

def nearest(embeddings, video, top_k, device, share=slice(None), leaf=256, dense=32, budget=1 << 21):
    """Exact nearest neighbours of every row among the rows of other videos (video None: among all other rows).

    embeddings (N, D) float32, finite; video (N,) -> neighbours (N, K) int64, -1 where there are fewer; distances (N, K)
    float32, inf there. A distance is the root of the float64 sum of squared differences, rounded to float32; of equal
    ones the lower index comes first. The rows are parted into leaves of a k-d tree, and a leaf's rows are searched for
    together; share: the leaves that this rank searches for. On a CPU boxes decide which leaves are looked into, but for
    the `dense` nearest; a GPU looks into all: there a product is cheaper than a decision. budget: products at a time.
    """
    if device.type == "cuda":
        dense, budget = len(embeddings), 1 << 26
    tree = grow_tree(embeddings, np.arange(len(embeddings)) if video is None else video, leaf, device)
    keys = torch.full((len(embeddings), top_k), NONE, device=device)

    def work(block):
        found, real = search(tree, block, top_k, dense, budget), ~tree.extra[block]
        keys[tree.row[block][real]] = found[real]

    blocks, threads = range(len(tree.row))[share], torch.get_num_threads()
    torch.set_num_threads(1)  # a block to a thread: its steps are too small to be parted
    pool = ThreadPoolExecutor(1 if device.type == "cuda" else threads, "search", torch.set_num_threads, (1,))
    sizes, silent = (~tree.extra).sum(1)[share].tolist(), len(blocks) < 20 or blocks[0] > 0  # one rank shows it
    with pool, tqdm(total=sum(sizes), unit="hand", desc="neighbours", disable=silent) as bar:
        for size, _ in zip(sizes, pool.map(work, blocks)):
            bar.update(size)
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.all_reduce(keys, dist.ReduceOp.MIN)
    keys = keys.cpu()
    distances = (keys >> 32).int().view(torch.float32).masked_fill_(keys == NONE, torch.inf)
    return (keys & 0xFFFFFFFF).masked_fill_(keys == NONE, -1).numpy(), distances.numpy()


def grow_tree(embeddings, group, leaf, device):
    """Halve the rows along their widest axis until at most `leaf` of them are together. -> n leaves of L places:
    row, extra, group (n, L); point (n, L, D); norm (n, L), squared; low, high (n, D), the leaf's box; column
    (n, L, D + 1), point and norm for the products. Where a leaf has fewer rows, its last places are extra: they repeat
    a row, at an infinite distance."""
    parts = [np.arange(len(embeddings))]
    while max(map(len, parts)) > leaf:
        halves = []
        for part in parts:
            values, half = embeddings[part], (len(part) + 1) // 2
            order = np.argpartition(values[:, values.var(0).argmax()], half - 1)
            halves += [part[order[:half]], part[order[half:]]]
        parts = halves
    size = max(map(len, parts))
    extra = torch.from_numpy(np.arange(size) >= np.array([len(part) for part in parts])[:, None]).to(device)
    row = torch.from_numpy(np.stack([np.pad(part, (0, size - len(part)), "edge") for part in parts])).to(device)
    point = torch.from_numpy(embeddings).to(device)[row]
    norm = point.square().sum(2)
    return SimpleNamespace(row=row, extra=extra, group=torch.from_numpy(group.astype(np.int32)).to(device)[row],
                           point=point, norm=norm, low=point.amin(1), high=point.amax(1),
                           column=torch.cat([point, norm.masked_fill(extra, torch.inf)[:, :, None]], 2))


def search(tree, block, top_k, dense, budget):
    """Neighbours of the rows of one leaf -> keys (L, K), ascending: the bits of the float32 distance (which order like
    the number) above the row's index, NONE where there is no neighbour.

    Leaves are visited from the nearest box on, and rows leave the search when no box can hold anything nearer. What is
    known of a row in a leaf is the least squared distance there, from a product in float32. The K-th least over all
    leaves, plus what the products may be wrong by, says which leaves can hold one of the K neighbours. Those alone
    are compared in float64. What is equal, or a box away, up to rounding is let through: the factors 1e-6 and 1e-5 are
    some ten times what rounding does.
    """
    n, size, dims = tree.point.shape
    rows = SimpleNamespace(point=tree.point[block], group=tree.group[block], norm=tree.norm[block])
    rows.column = torch.cat([-2 * rows.point, torch.ones_like(rows.point[:, :1])], 1)
    between = (tree.low - tree.high[block]).clamp_(min=0) + (tree.low[block] - tree.high).clamp_(min=0)
    bound, near = between.square_().sum(1).mul_(1 - 1e-5).sort()
    best = rows.norm.new_full((size, top_k), torch.inf)  # the least distances in K leaves, squared
    limit = rows.norm.new_full((size,), torch.inf)  # above it, in a leaf, there is no neighbour
    active, start, found = torch.arange(size, device=near.device), 0, []
    while start < n and len(active):
        if start < dense:
            leaf = near[start:min(start + max(budget // (len(active) * size), 1), dense)]
            r, l, least = visit_all(tree, leaf, rows, active)
        else:
            leaf = near[start:start + max(budget // (8 * len(active)), 1)]
            r, l, least = visit_near(tree, leaf, rows, active, limit)
        table = least.new_full((len(active), len(leaf)), torch.inf)
        table[r, l] = least
        best[active] = torch.cat([best[active], table], 1).topk(top_k, 1, largest=False).values
        worst = best[active, -1]
        # |q|^2 + |p|^2 - 2 qp in float32 is wrong by less than (2 D + 8) 2^-24 (|q| + |p|)^2, where p is as far from q
        # as `worst`, so that |p| <= |q| + sqrt(worst); it counts twice, once for `worst` and once for what is compared
        error = (dims + 4) * 2.0 ** -22 * (2 * rows.norm[active].sqrt() + worst.clamp(min=0).sqrt()).square()
        limit[active] = worst * (1 + 1e-6) + error
        keep = (least <= limit[active[r]]) & (least < torch.inf)
        found.append((active[r[keep]], leaf[l[keep]], least[keep]))
        start += len(leaf)
        if start < n:
            active = active[limit[active] >= bound[start]]
    r, l, least = (torch.cat(part) for part in zip(*found))
    keep = least <= limit[r]
    return compare(tree, rows, r[keep], l[keep], top_k)


def visit_all(tree, leaf, rows, active):
    """Least product of each active row in each of these leaves -> place of the row in `active`, of the leaf in `leaf`,
    squared distance; (rows x leaves,) each."""
    count, size = len(active), tree.row.shape[1]
    product = (rows.column[active] @ tree.column[leaf].flatten(0, 1).T).view(count, len(leaf), size)
    product.masked_fill_(tree.group[leaf] == rows.group[active][:, None, None], torch.inf)
    least = product.amin(2) + rows.norm[active][:, None]
    place = torch.arange(max(count, len(leaf)), device=leaf.device)
    return place[:count].repeat_interleave(len(leaf)), place[:len(leaf)].repeat(count), least.flatten()


def visit_near(tree, leaf, rows, active, limit, tile=16):
    """The same, but only where a leaf's box is nearer to the row than its limit. The rows that look into a leaf are
    few, so they are packed in tiles of 16, one or more for each leaf: with 18 rows for leaf 0, none for leaf 1 and 3
    for leaf 2, tiles 0 and 1 belong to leaf 0, tile 2 to leaf 2, and 14 + 13 places stay unused."""
    gap = limit.new_zeros(len(leaf), len(active))
    low, high, point = tree.low[leaf], tree.high[leaf], rows.point[active]
    for k in range(point.shape[1]):
        outside = torch.maximum(low[:, k, None] - point[:, k], point[:, k] - high[:, k, None]).clamp_(min=0)
        gap.addcmul_(outside, outside)
    wanted = gap.mul_(1 - 1e-5) <= limit[active]
    l, r = wanted.nonzero(as_tuple=True)  # by leaf, then row
    times = wanted.sum(1)
    tiles = (times + tile - 1) // tile
    number = torch.arange(len(l), device=leaf.device) - (times.cumsum(0) - times)[l]  # of the row among its leaf's
    place = tile * (tiles.cumsum(0) - tiles)[l] + number
    row_of = torch.zeros(int(tiles.sum()) * tile, dtype=torch.int64, device=leaf.device)
    row_of[place] = active[r]
    row_of, leaf_of = row_of.view(-1, tile), leaf.repeat_interleave(tiles)
    product = rows.column[row_of] @ tree.column[leaf_of].transpose(1, 2)
    product.masked_fill_(tree.group[leaf_of][:, None] == rows.group[row_of][:, :, None], torch.inf)
    return r, l, product.amin(2).flatten()[place] + rows.norm[active][r]


def compare(tree, rows, r, l, top_k):
    """Exact distances of row r[i] to all points of leaf l[i] -> keys (L, K) of each row's nearest, as in `search`."""
    size = tree.row.shape[1]
    order = r.argsort(stable=True)
    r, l = r[order], l[order]
    keys = torch.full((len(r), min(top_k, size)), NONE, device=r.device)
    for piece in torch.arange(len(r), device=r.device).split(1 << 12):
        difference = tree.point[l[piece]].double() - rows.point[r[piece], None].double()
        square = difference[:, :, 0] * difference[:, :, 0]
        for k in range(1, difference.shape[2]):  # one after another: how a sum is parted differs between devices
            square += difference[:, :, k] * difference[:, :, k]
        key = square.sqrt_().float().view(torch.int32).long() << 32 | tree.row[l[piece]]
        key.masked_fill_((tree.group[l[piece]] == rows.group[r[piece], None]) | tree.extra[l[piece]], NONE)
        keys[piece] = key.topk(keys.shape[1], 1, largest=False).values
    number = torch.arange(len(r), device=r.device) - torch.searchsorted(r, r)  # of the leaf among its row's
    most = int(number.max()) + 1 if len(r) else 1
    table = torch.full((size, max(most, top_k), keys.shape[1]), NONE, device=r.device)
    table[r, number] = keys
    return table.flatten(1).topk(top_k, 1, largest=False).values


# ---------------------------------------------------------------------------------------------- pictures

def draw_pairs(path, hands, neighbours, distances, turns=None, seed=0):
    """Queries beside their nearest neighbours, turned as pre-training will see them, skeletons drawn, the distance
    under each; two rows each of the best, the median and the worst tenth."""
    rng = np.random.default_rng(seed)
    order = np.argsort(distances[:, 0], kind="stable")
    order = order[neighbours[order, 0] >= 0]
    tenth, shown = max(len(order) // 10, 1), min(neighbours.shape[1], 5)
    middle, across = (len(order) - tenth) // 2, 12 // (1 + shown)
    tiles = []
    for name, part in (("best", order[:tenth]), ("median", order[middle:middle + tenth]), ("worst", order[-tenth:])):
        for i in rng.permutation(part)[:2 * across]:
            group = [caption(draw_crop(hands, i, 160), f"{name}: hand {i}")]
            for k in range(shown):
                j, distance = neighbours[i, k], distances[i, k]
                turn = 0.0 if turns is None else turns[i, k]
                tile = draw_crop(hands, j, 160, turn=turn) if j >= 0 else np.zeros((160, 160, 3), np.uint8)
                group.append(caption(tile, f"{distance:.3f}" if j >= 0 else "none"))
            tiles.append(np.hstack([*group, np.zeros((180, 8, 3), np.uint8)]))
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % across)
    save_image(path, sheet(tiles, across))


def caption(image, text):
    """A strip with a text under a picture."""
    strip = np.zeros((20, image.shape[1], 3), np.uint8)
    return np.vstack([image, cv2.putText(strip, text, (4, 14), 0, 0.42, (255, 255, 255), 1, cv2.LINE_AA)])


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
