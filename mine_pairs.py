"""Find for every hand its nearest neighbours in other videos: the positive pairs of SiMHand.

Reads a hands folder, embeds each hand's 21 keypoints (divided by the crop's side, 42 numbers) by PCA in 14 dimensions,
and searches exactly. Writes into the same folder (or --out): pca.npy, embeddings.npy, distances.npy, neighbours.npy,
and to look at pairs.jpg, distances.png and mining.jsonl.

    python mine_pairs.py data/ego4d
    python mine_pairs.py demo/hands --top-k 5
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from tqdm import tqdm

from common import (atomic, check_flags, draw_crop, load_hands, open_folder, plain, print_settings, require, run_script,
                    save_array, save_image, sheet)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hands", help="hands folder, as extract_hands.py writes it")
    parser.add_argument("--out", help="folder for the pairs (default: the hands folder itself)")
    parser.add_argument("--dims", type=int, default=14, help="dimensions of the PCA embedding, 1 to 42 (paper: 14)")
    parser.add_argument("--top-k", type=int, default=1, help="neighbours kept for each hand (paper: 1)")
    parser.add_argument("--same-video", action="store_true",
                        help="let a neighbour come from the hand's own video (ablation: mostly near-duplicates)")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU when there is one); the result is the same")
    args = parser.parse_args()
    check_flags(args)
    require(1 <= args.dims <= 42 and args.top_k >= 1, "--dims must lie in 1..42, --top-k must be at least 1")
    return args


def main():
    args = parse_args()
    hands = load_hands(args.hands)
    keypoints, video = hands.keypoints, hands.hands["video"]
    count, videos = len(keypoints), len(np.unique(video))
    listed = hands.folder / "hands.npy"
    require(count > args.dims, f"{listed}: {count} hands, a PCA of --dims {args.dims} needs {args.dims + 1}")
    require(videos > 1 or args.same_video, f"{listed}: all {count} hands come from one video, but neighbours are taken "
            "from other videos; extract more videos or allow --same-video")
    most = count - (1 if args.same_video else np.bincount(video)[np.unique(video)].min())
    require(args.top_k <= most, f"{listed}: no hand has more than {most} candidates, fewer than --top-k {args.top_k}")
    out = Path(args.out or args.hands)
    lock = open_folder(out)  # held until the process ends
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print_settings(args, count=count, videos=videos, device=device)
    poses = keypoints.reshape(count, 42).astype(np.float64) / hands.side
    require(np.ptp(poses, axis=0).max() > 1e-9,
            f"{hands.folder / 'keypoints.npy'}: all hands are the same, a PCA needs them to vary")
    mean, components, explained = fit_pca(poses, args.dims)
    embeddings = ((poses - mean) @ components.T).astype(np.float32)
    neighbours, distances = nearest(embeddings, None if args.same_video else video, args.top_k, device)

    if (out / "neighbours.npy").exists():
        print(f"{out / 'neighbours.npy'}: an earlier mining is replaced")
        (out / "neighbours.npy").unlink()  # written last: where it is, all files are of one mining
    save_array(out / "pca.npy", np.concatenate([mean[None], components]).astype(np.float32))
    save_array(out / "embeddings.npy", embeddings)
    save_array(out / "distances.npy", distances)
    paired = neighbours[:, 0] >= 0
    others = np.bincount(neighbours[:, 0][paired], minlength=count)
    summary = {"hands": count, "without_neighbour": int((~paired).sum()),
               "explained_variance": round(float(explained), 4),
               "neighbours_from_videos": len(np.unique(video[neighbours[paired, 0]])),
               "hubs_over_100": int((others > 100).sum()),
               "median_distance": round(float(np.median(distances[paired, 0])), 4)}
    with atomic(out / "mining.jsonl") as file:
        for row in ({"command": shlex.join(sys.argv), "args": plain(args)}, summary):
            file.write((json.dumps(row) + "\n").encode())
    draw_pairs(out / "pairs.jpg", hands, neighbours, distances)
    plot_distances(out / "distances.png", embeddings, distances[paired, 0])
    save_array(out / "neighbours.npy", neighbours)
    print("  ".join(f"{key} {value}" for key, value in summary.items()))
    print(f"wrote {out}, see {out / 'pairs.jpg'} and {out / 'distances.png'}; next:\n"
          f"python pretrain.py {args.hands} --out RUN" + (f" --pairs {out}" if args.out else ""))


def fit_pca(poses, dims):
    """poses (N, 42) float64 -> mean (42,), components (dims, 42), share of the variance explained. The component's sign
    is free in a PCA; here its largest loading is positive, so that the result does not depend on the library."""
    pca = PCA(dims, svd_solver="covariance_eigh" if len(poses) > 42 else "full").fit(poses)
    largest = np.abs(pca.components_).argmax(1)
    signs = np.sign(pca.components_[np.arange(dims), largest])
    return pca.mean_, pca.components_ * signs[:, None], pca.explained_variance_ratio_.sum()


def nearest(embeddings, video, top_k, device):
    """Exact nearest neighbours of every row among the rows of other videos (video None: among all other rows).

    embeddings (N, D) float32, video (N,) -> neighbours (N, K) int64, -1 where there are fewer; distances (N, K)
    float32, inf there. A distance is the root of the float64 sum of squared differences, rounded to float32; of equal
    ones the lower index comes first. Cost grows with the square of N.
    """
    count = len(embeddings)
    rows = torch.from_numpy(embeddings).to(device, torch.float64)
    group = torch.arange(count) if video is None else torch.from_numpy(video.astype(np.int64))
    group, index = group.to(device), torch.arange(count, device=device)
    neighbours, distances = np.empty((count, top_k), np.int64), np.empty((count, top_k), np.float32)
    block = max(1, (1 << 25) // count)  # queries at a time: about 1 GB whatever the number of hands
    for start in tqdm(range(0, count, block), unit="block", desc="neighbours", disable=count <= block):
        query = slice(start, start + block)
        d = torch.cdist(rows[query], rows, compute_mode="donot_use_mm_for_euclid_dist").float()
        d[group[query, None] == group] = torch.inf
        # the bits of a non-negative float32 order like the number: with the index below them, keys have no ties
        key = d.view(torch.int32).long() << 32 | index
        key = key.topk(top_k, largest=False).values.cpu()
        distances[query] = (key >> 32).int().view(torch.float32).numpy()
        neighbours[query] = (key & 0xFFFFFFFF).numpy()
    neighbours[np.isinf(distances)] = -1
    return neighbours, distances


def draw_pairs(path, hands, neighbours, distances, pairs=6, seed=0):
    """Queries beside their nearest neighbour, skeletons drawn; a row each of the best, median and worst tenth."""
    rng = np.random.default_rng(seed)
    order = np.argsort(distances[:, 0], kind="stable")
    order = order[neighbours[order, 0] >= 0]
    tenth = max(len(order) // 10, 1)
    middle = (len(order) - tenth) // 2
    tiles = []
    for part in (order[:tenth], order[middle:middle + tenth], order[-tenth:]):
        for i in rng.permutation(part)[:pairs]:
            tiles.append(np.hstack([draw_crop(hands, i, 160, f"{distances[i, 0]:.3f}"),
                                    draw_crop(hands, neighbours[i, 0], 160), np.zeros((160, 8, 3), np.uint8)]))
        tiles += [np.zeros((160, 328, 3), np.uint8)] * (-len(tiles) % pairs)
    save_image(path, sheet(tiles, pairs))


def plot_distances(path, embeddings, distances, seed=0):
    """Histogram of the nearest neighbours' distances beside that of random pairs."""
    a, b = np.random.default_rng(seed).integers(0, len(embeddings), (2, 20000))
    chance = np.linalg.norm(embeddings[a] - embeddings[b], axis=1)[a != b]
    figure = Figure(figsize=(6, 3.5), layout="tight")
    axis = figure.subplots()
    bins = np.linspace(0, np.quantile(chance, 0.99), 60)
    for values, label in ((distances, "nearest neighbour"), (chance, "random pair")):
        axis.hist(np.minimum(values, bins[-1]), bins, density=True, alpha=0.6, label=label)
    axis.set_xlabel("distance in the PCA embedding (1 = the crop's side)")
    axis.set_ylabel("density")
    axis.legend()
    with atomic(path) as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    run_script(main)
