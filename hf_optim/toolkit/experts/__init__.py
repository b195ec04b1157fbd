"""Run the experts of a mixture: capacities, the product, what was dropped, and exchanges between ranks."""

from .bucketed_model import attach_buckets, buckets_in, detach_buckets, expert_buckets
from .buckets import Buckets, store_buckets, stored_buckets
from .capacity import ROUNDINGS, capacity
from .exchange import exchange_experts, experts_per_rank
from .exchange_settings import Exchange, store_exchange, stored_exchange
from .implementation import attach_experts, detach_experts, implementation_of
from .load import ExpertLoad, dropped_share, expert_load
from .own_routing import require_limitable
from .plan import slot_positions
from .product import expert_product
from .rank_models import (
    attach_exchange,
    detach_exchange,
    exchange_of,
    expert_exchange,
    register_exchanges,
    unregister_exchanges,
)
from .routed_model import attach_routing, detach_routing, require_routable, routing_of
from .routing import Routing, store_routing, stored_routing
from .stored_model import attach_stored_settings, detach_settings

__all__ = [
    "ROUNDINGS",
    "Buckets",
    "Exchange",
    "ExpertLoad",
    "Routing",
    "attach_buckets",
    "attach_exchange",
    "attach_experts",
    "attach_routing",
    "attach_stored_settings",
    "buckets_in",
    "capacity",
    "detach_buckets",
    "detach_exchange",
    "detach_experts",
    "detach_routing",
    "detach_settings",
    "dropped_share",
    "exchange_experts",
    "exchange_of",
    "expert_buckets",
    "expert_exchange",
    "expert_load",
    "expert_product",
    "experts_per_rank",
    "implementation_of",
    "register_exchanges",
    "require_limitable",
    "require_routable",
    "routing_of",
    "slot_positions",
    "store_buckets",
    "store_exchange",
    "store_routing",
    "stored_buckets",
    "stored_exchange",
    "stored_routing",
    "unregister_exchanges",
]
