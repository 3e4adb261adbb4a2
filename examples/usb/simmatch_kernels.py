# SPDX-License-Identifier: BSD-3-Clause
"""SimMatch of USB (github.com/microsoft/Semi-supervised-learning) on our kernels: algorithm ``simmatch_kernels``.

Copy this file to ``semilearn/algorithms/simmatch/`` of USB, add ``from .simmatch_kernels import SimMatchKernels`` to
the ``__init__.py`` there, and write ``algorithm: simmatch_kernels`` in a configuration of ``simmatch``. All settings
are that algorithm's. Its checkpoints load here, and those of this file there.

It differs in what is in memory, no matrix [unlabelled images, K], and where the bank is written: each slot is
normalised, where USB's ``update_bank`` divides each coordinate by its length over the batch.
"""

import torch
from semilearn.algorithms.simmatch.simmatch import SimMatch
from semilearn.algorithms.utils import concat_all_gather
from semilearn.core.utils import ALGORITHMS

from ssmkernels import ops


@ALGORITHMS.register("simmatch_kernels")
class SimMatchKernels(SimMatch):
    """USB's SimMatch with the bank as [K, D], the layout of the kernels."""

    def init(self, T, p_cutoff, proj_size, K, smoothing_alpha, da_len=0):
        self.T, self.p_cutoff, self.proj_size, self.K = T, p_cutoff, proj_size, K
        self.smoothing_alpha, self.da_len = smoothing_alpha, da_len
        device = torch.device("cuda", self.gpu) if torch.cuda.is_available() and self.gpu is not None else None
        self.bank = torch.nn.functional.normalize(torch.randn(K, proj_size, device=device))
        self.labels_bank = torch.zeros(K, dtype=torch.long, device=device)

    @property
    def mem_bank(self):
        """[D, K], as USB has it in its checkpoints."""
        return self.bank.t()

    @mem_bank.setter
    def mem_bank(self, value):
        self.bank = value.t().contiguous()

    @torch.no_grad()
    def update_bank(self, k, labels, index):
        if self.distributed and self.world_size > 1:
            k, labels, index = concat_all_gather(k), concat_all_gather(labels), concat_all_gather(index)
        momentum = 0.0 if self.use_ema_teacher else self.ema_bank
        ops.memory_update_(self.bank, self.labels_bank, index, k.to(self.bank.dtype), labels, momentum=momentum)

    def train_step(self, idx_lb, x_lb, y_lb, x_ulb_w, x_ulb_s):
        with self.amp_cm():
            labelled, weak, strong = self._outputs(x_lb, x_ulb_w, x_ulb_s)
            sup_loss = self.ce_loss(labelled["logits"], y_lb, reduction="mean")
            keys, probs_weak = self._teach(x_lb, labelled, weak)
            matching = ops.instance_matching(
                weak["feat"].detach(),
                strong["feat"],
                self.bank,
                self.labels_bank,
                probs_weak,
                temperature_weak=self.T,
                temperature_strong=self.T,
                alpha=min(self.smoothing_alpha, 1),
            )
            pseudo, in_loss = matching.pseudo_probs, matching.loss.mean()
            if self.epoch == 0:  # the bank is not filled yet
                pseudo, in_loss = probs_weak, 0 * in_loss
            mask = self.call_hook("masking", "MaskingHook", logits_x_ulb=pseudo, softmax_x_ulb=False)
            unsup_loss = self.consistency_loss(strong["logits"], pseudo, "ce", mask=mask)
            total_loss = sup_loss + self.lambda_u * unsup_loss + self.lambda_in * in_loss
            self.update_bank(keys.detach(), y_lb, idx_lb.to(self.labels_bank.device))

        features = {"x_lb": keys, "x_ulb_w": weak["feat"], "x_ulb_s": strong["feat"]}
        losses = {"sup_loss": sup_loss.item(), "unsup_loss": unsup_loss.item(), "total_loss": total_loss.item()}
        log = self.process_log_dict(**losses, in_loss=in_loss.item(), util_ratio=mask.float().mean().item())
        return self.process_out_dict(loss=total_loss, feat=features), log

    def _outputs(self, *inputs):
        """Of the network, for labelled images, weak and strong views: logits and features of each."""
        if not self.use_cat:
            return [self.model(x) for x in inputs]
        outputs = self.model(torch.cat(inputs))
        sizes = [len(x) for x in inputs]
        logits, features = outputs["logits"].split(sizes), outputs["feat"].split(sizes)
        return [{"logits": own_logits, "feat": own} for own_logits, own in zip(logits, features, strict=True)]

    @torch.no_grad()
    def _teach(self, x_lb, labelled, weak):
        """What the bank stores of the labelled images, and the aligned probabilities of the weak views."""
        self.ema.apply_shadow()
        keys = self.model(x_lb)["feat"] if self.use_ema_teacher else labelled["feat"].detach()
        probs = weak["logits"].detach().softmax(dim=-1)
        probs = self.call_hook("dist_align", "DistAlignHook", probs_x_ulb=probs)
        self.ema.restore()
        return keys, probs
