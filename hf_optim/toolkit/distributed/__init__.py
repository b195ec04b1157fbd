"""Collectives over ranks, all-to-all over a grid of nodes, work divided among ranks, parameters
sharded by FSDP2, and layers cut into parts."""

from . import collectives, fsdp, tensor_plan
from .exchange import Route, all_to_all, plan_route, route_from
from .exchange_cost import ExchangeCost, fit_cost
from .fsdp import FullWeights
from .grid import ORDERS, Grid, grid_of, messages, ranks_per_node, shape_of
from .rank_setting import RankSetting, rank_setting_of, set_rank_setting
from .shared_work import divided

__all__ = [
    "ORDERS",
    "ExchangeCost",
    "FullWeights",
    "Grid",
    "RankSetting",
    "Route",
    "all_to_all",
    "collectives",
    "divided",
    "fit_cost",
    "fsdp",
    "grid_of",
    "messages",
    "plan_route",
    "rank_setting_of",
    "ranks_per_node",
    "route_from",
    "set_rank_setting",
    "shape_of",
    "tensor_plan",
]
