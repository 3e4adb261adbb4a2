# SPDX-License-Identifier: BSD-3-Clause
"""SimMatch's loss block, before and after: the same p̂, loss and gradient in one call, without any [B, K] matrix.

``before`` states the block the way SimMatch's public training code does (mingkai-zheng/SimMatch, models/simmatch.py): a
bank of shape [D, K] of which teacher and student similarities are softmaxes, an unfolded and renormalised teacher, a
scatter-added p̂. ``after`` is the replacement; the bank stays [D, K], handed over transposed and not copied. Run:
``python examples/simmatch_loss_block.py``.
"""

import argparse

import torch
import torch.nn.functional as F

from ssmkernels import ops
from ssmkernels.bench.measure import peak_extra_bytes, time_alternating


def before(feat_ku, feat_qu, bank, labels, prob_ku_orig, tt=0.1, st=0.1, c_smooth=0.9):
    with torch.no_grad():
        similarity = F.softmax(feat_ku @ bank / tt, dim=1)  # [B, K]
        columns = labels.expand(len(feat_ku), -1)
        teacher = similarity * prob_ku_orig.gather(1, columns)  # [B, K]
        teacher /= teacher.sum(dim=1, keepdim=True)
        aggregated = torch.zeros_like(prob_ku_orig).scatter_add(1, columns, similarity)
        prob_ku = c_smooth * prob_ku_orig + (1 - c_smooth) * aggregated
    student = F.softmax(feat_qu @ bank / st, dim=1)  # [B, K]
    return prob_ku, -(teacher * student.log()).sum(dim=1)


def after(feat_ku, feat_qu, bank, labels, prob_ku_orig, tt=0.1, st=0.1, c_smooth=0.9):
    return ops.instance_matching(
        feat_ku, feat_qu, bank.t(), labels, prob_ku_orig, temperature_weak=tt, temperature_strong=st, alpha=c_smooth
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=320, help="unlabelled images in a batch (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=12_811, help="labelled images (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of features and labels (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the comparison (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    dim = 128
    feat_ku, feat_qu = (F.normalize(torch.randn(args.rows, dim, device=args.device)) for _ in range(2))
    bank = F.normalize(torch.randn(dim, args.slots, device=args.device), dim=0)
    labels = torch.randint(0, args.classes, (args.slots,), device=args.device)
    probs = torch.randn(args.rows, args.classes, device=args.device).softmax(dim=1)

    def step(block, dtype=torch.float32):
        weak, strong, memory, p = (tensor.detach().to(dtype) for tensor in (feat_ku, feat_qu, bank, probs))
        prob_ku, loss = block(weak, strong.requires_grad_(), memory, labels, p)
        (grad,) = torch.autograd.grad(loss.mean(), strong)
        return prob_ku, loss.detach(), grad

    # Against float64. A sum of k terms in float32 may be off by k·2⁻²⁴ of their size, whatever their order: a logit by
    # D·2⁻²⁴/t (rows have length 1), so a softmax over K slots by (2 D/t + K)·2⁻²⁴ of itself, and what is summed up
    # under one by K·2⁻²⁴ more. Twice that share is allowed: of p̂; of the loss's terms, logits of at most 1/t; and of
    # the gradient's, two rows of the bank over t·B.
    allowed = (4 * dim / 0.1 + 4 * args.slots) * 2**-24
    exact = step(before, torch.float64)
    sizes = (exact[0], 1 / 0.1, 2 * float(bank.abs().max()) / (0.1 * args.rows))
    for name, ours, expected, size in zip(("p̂", "loss", "gradient"), step(after), exact, sizes, strict=True):
        error = (ours - expected).abs()
        share = float((error / (allowed * size)).max())
        assert share <= 1, f"{name} is off by {share:.2g} × tolerance"
        print(f"{name:9} equal: largest error {float(error.max()):.1e}, {share:.2g} × tolerance")

    blocks = {"before": lambda: step(before), "after": lambda: step(after)}
    times = time_alternating(blocks, device=args.device, seconds=args.seconds)
    print(f"\nB={args.rows} D={dim} K={args.slots} L={args.classes} on {args.device}, forward and backward")
    for name, block in blocks.items():
        extra = peak_extra_bytes(block, device=args.device)
        memory = "?" if extra is None else f"{extra / 2**20:.1f}"
        print(f"{name:7} {1e3 * times[name].median:8.2f} ms   peak extra {memory} MiB")
    print(f"{times['before'].median / times['after'].median:.1f} times faster")


if __name__ == "__main__":
    main()
