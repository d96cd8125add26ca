"""Collectives in two levels, within a node and then among the nodes' leaders: few connections at any world size."""

import itertools
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def find_nodes(host: str = "") -> list[list[int]]:
    """The ranks of each node: runs of consecutive ranks on one host; collective. host: default is this machine's."""
    hosts: list = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, host or socket.gethostname())
    return [[rank for rank, _ in run] for _, run in itertools.groupby(enumerate(hosts), key=lambda item: item[1])]


class Nodes:
    """Gloo groups of all ranks in two levels; the lowest rank of a node is its leader, rank 0 leads them.

    nodes: ranks of each node; timeout: seconds that a collective waits for the slowest rank.
    """

    def __init__(self, nodes: list[list[int]], timeout: int):
        rank = dist.get_rank()
        node = next(ranks for ranks in nodes if rank in ranks)
        self.leader = node[0]
        self.single, self.leads = len(nodes) == 1, rank == node[0]
        self.node = new_group(node, timeout)
        # The others make a group of themselves: torch names a group after the number of groups its ranks made before.
        self.leaders = new_group([ranks[0] for ranks in nodes] if self.leads else [rank], timeout)

    def all_reduce(self, values: Tensor, op=dist.ReduceOp.SUM) -> None:
        """Reduces over all ranks, in place."""
        if self.single:
            dist.all_reduce(values, op, self.node)
            return
        dist.reduce(values, self.leader, op, self.node)
        if self.leads:
            dist.all_reduce(values, op, self.leaders)
        dist.broadcast(values, self.leader, self.node)

    def merge(self, value: Value, function: Callable[[list[Value]], Value]) -> Value | None:
        """`function` of small values of all ranks on rank 0, None elsewhere; it merges its own results, too."""
        values = gathered(value, self.leader, self.node)
        if self.leads:
            values = gathered(function(values), 0, self.leaders)
        return function(values) if values else None

    def broadcast(self, value):
        """Rank 0's Python value on every rank."""
        held = [value]
        if self.leads:
            dist.broadcast_object_list(held, 0, self.leaders)
        dist.broadcast_object_list(held, self.leader, self.node)
        return held[0]

    def gather(self, value) -> list:
        """One Python value of every rank, in rank order, on rank 0; [] elsewhere."""
        values = gathered(value, self.leader, self.node)
        if self.leads:
            values = [value for part in gathered(values, 0, self.leaders) for value in part]
        return values


def new_group(ranks: list[int], timeout: int):
    # Only the group's own ranks meet: with thousands of groups, a meeting of all ranks for each would never end.
    return dist.new_group(ranks, timedelta(seconds=timeout), "gloo", use_local_synchronization=True)


def gathered(value, leader: int, group) -> list:
    """The values of a group's ranks, on its leader; [] elsewhere."""
    values = [None] * dist.get_world_size(group) if dist.get_rank() == leader else None
    dist.gather_object(value, values, leader, group)
    return values or []
