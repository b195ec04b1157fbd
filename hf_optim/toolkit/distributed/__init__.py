"""Collectives over ranks, all-to-all over a grid of nodes, and parameters sharded by FSDP2."""

from . import collectives, fsdp
from .exchange import Route, all_to_all, plan_route, route_from
from .exchange_cost import ExchangeCost, fit_cost
from .fsdp import FullWeights
from .grid import ORDERS, Grid, grid_of, messages, ranks_per_node, shape_of

__all__ = [
    "ORDERS",
    "ExchangeCost",
    "FullWeights",
    "Grid",
    "Route",
    "all_to_all",
    "collectives",
    "fit_cost",
    "fsdp",
    "grid_of",
    "messages",
    "plan_route",
    "ranks_per_node",
    "route_from",
    "shape_of",
]
