"""Run the experts of a mixture with a capacity: the plan of who computes what, the product, and what was dropped."""

from .capacity import ROUNDINGS, capacity
from .implementation import attach_experts, detach_experts, implementation_of
from .load import ExpertLoad, dropped_share, expert_load
from .plan import slot_positions
from .product import expert_product
from .routed_model import attach_routing, attach_stored_routing, detach_routing, require_routable, routing_of
from .routing import Routing, store_routing, stored_routing

__all__ = [
    "ROUNDINGS",
    "ExpertLoad",
    "Routing",
    "attach_experts",
    "attach_routing",
    "attach_stored_routing",
    "capacity",
    "detach_experts",
    "detach_routing",
    "dropped_share",
    "expert_load",
    "expert_product",
    "implementation_of",
    "require_routable",
    "routing_of",
    "slot_positions",
    "store_routing",
    "stored_routing",
]
