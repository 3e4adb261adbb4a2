# SPDX-License-Identifier: BSD-3-Clause
"""An MLP on all n² pairs of a batch, before and after: the same focal loss and gradients, without the pairs' features.

``before`` is how similarity heads are written: enumerate the pairs, concatenate their features, Linear, ReLU, Linear,
and torchvision's sigmoid_focal_loss against "same class" (compare GT-RIPL/L2C, modules/pairwise.py). ``after`` is the
replacement; it takes the parameters of the two Linear layers as they are. Run: ``python examples/pair_mlp_head.py``.
"""

import argparse
import copy

import torch
from torchvision.ops import sigmoid_focal_loss

from ssmkernels import ops
from ssmkernels.bench.measure import peak_extra_bytes, time_alternating


def before(features, labels, head):
    n = len(features)
    pairs = torch.cat([features[:, None].expand(n, n, -1), features[None].expand(n, n, -1)], dim=2)  # [n, n, 2d]
    logits = head(pairs)[..., 0]
    same = (labels[:, None] == labels).to(logits.dtype)
    return sigmoid_focal_loss(logits, same, alpha=0.25, gamma=2, reduction="mean")


def after(features, labels, head):
    hidden, _, out = head
    weights = (hidden.weight, hidden.bias, out.weight[0], out.bias[0])
    return ops.pair_focal_loss(features, features, labels, labels, *weights, alpha=0.25, gamma=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="n, images of a batch (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="d, features of an image (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden units (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of features, labels and weights (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the comparison (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    layers = torch.nn.Linear(2 * args.dim, args.hidden), torch.nn.ReLU(), torch.nn.Linear(args.hidden, 1)
    head = torch.nn.Sequential(*layers).to(args.device)
    features = torch.randn(args.rows, args.dim, device=args.device, requires_grad=True)
    labels = torch.randint(0, 10, (args.rows,), device=args.device)

    def step(loss_of, features=features, head=head):
        loss = loss_of(features, labels, head)
        return loss.detach(), *torch.autograd.grad(loss, (features, *head.parameters()))

    # Against float64. A sum of k terms in float32 may be off by k·2⁻²⁴ of their size, whatever their order; the longest
    # go over all pairs.
    exact = step(before, features.detach().double().requires_grad_(), copy.deepcopy(head).double())
    allowed = (args.rows**2 + 2 * args.dim + args.hidden) * 2**-24
    names = ("loss", "features", *(name for name, _ in head.named_parameters()))
    for name, ours, expected in zip(names, step(after), exact, strict=True):
        error, size = float((ours - expected).abs().max()), float(expected.abs().max())
        share = error / (allowed * size)
        assert share <= 1, f"{name} is off by {share:.2g} × tolerance"
        print(f"{name:9} equal: largest error {error:.1e} of {size:.1e}, {share:.2g} × tolerance")

    blocks = {"before": lambda: step(before), "after": lambda: step(after)}
    times = time_alternating(blocks, device=args.device, seconds=args.seconds)
    print(f"\nn={args.rows} d={args.dim} h={args.hidden} on {args.device}, forward and backward")
    for name, block in blocks.items():
        extra = peak_extra_bytes(block, device=args.device)
        memory = "?" if extra is None else f"{extra / 2**20:.1f}"
        print(f"{name:7} {1e3 * times[name].median:8.2f} ms   peak extra {memory} MiB")
    print(f"{times['before'].median / times['after'].median:.1f} times faster")


if __name__ == "__main__":
    main()
