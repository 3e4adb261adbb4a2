# SPDX-License-Identifier: BSD-3-Clause
"""The collectives that ops, modules and trainers share, on ``torch.distributed``.

Each is the identity in a group of one rank, and where ``torch.distributed`` is not initialised.
"""

from ssmkernels.distributed.collectives import (
    Group,
    agree_on,
    all_gather_counted,
    all_gather_rows,
    all_reduce_max,
    all_reduce_mean,
    all_reduce_sum,
    broadcast,
    broadcast_buffers,
    check_group,
    exchange_rows,
    for_ddp,
    gather_objects,
    gather_on_first,
    gather_rows,
    gather_sizes,
    is_distributed,
    is_of_lost_rank,
    is_split,
    rank_of,
    send_rows,
    split_rows,
    world_size,
)
from ssmkernels.distributed.packing import RowGather, pack_rows, unpack_rows
from ssmkernels.distributed.ring import ring_blocks
from ssmkernels.distributed.states import RowShard, sharded_states, states_are_sharded

__all__ = [
    "Group",
    "RowGather",
    "RowShard",
    "agree_on",
    "all_gather_counted",
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_mean",
    "all_reduce_sum",
    "broadcast",
    "broadcast_buffers",
    "check_group",
    "exchange_rows",
    "for_ddp",
    "gather_objects",
    "gather_on_first",
    "gather_rows",
    "gather_sizes",
    "is_distributed",
    "is_of_lost_rank",
    "is_split",
    "pack_rows",
    "rank_of",
    "ring_blocks",
    "send_rows",
    "sharded_states",
    "split_rows",
    "states_are_sharded",
    "unpack_rows",
    "world_size",
]
