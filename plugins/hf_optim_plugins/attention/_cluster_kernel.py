"""The door to the kernels of clusters: used where they are installed, and compute on the device of the tensors.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

from torch import Tensor

# Where kernels are installed, and the devices on which they are used.
CLUSTER_ORDER_KERNEL = "hf_optim_kernels.bucket_order.op"
CLUSTER_RUN_KERNEL = "hf_optim_kernels.run_attention.op"
CLUSTER_KERNEL_DEVICES = ("cuda",)


@lru_cache(maxsize=2)
def _installed_clusters(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def nearest_by_kernel(part: Tensor, centroids: Tensor, normalize: str) -> Tensor | None:
    """Return the centroid of largest cosine, int16 ``[R, H, P]``; None if no kernel finds it.

    Args:
        part: ``[R, H, P, D]``, not normalized: that changes no order of products, but for the mean of layer
            normalization, which is taken from the centroids in place of the vectors.
        centroids: ``[G, C, D]``.
        normalize: as in ``directions``.
    """
    module = _installed_clusters(CLUSTER_ORDER_KERNEL) if part.device.type in CLUSTER_KERNEL_DEVICES else None
    if module is None or module.unsupported(part) is not None or centroids.shape[1] > module.MOST_BUCKETS:
        return None
    wide = centroids.float()
    if normalize == "layer_norm":
        wide = wide - wide.mean(-1, keepdim=True)
    return module.nearest(part, wide)  # type: ignore[no-any-return]


def last_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, cluster: tuple[Tensor, Tensor], valid: Tensor | None, width: int,
    clusters: int, scale: float,
) -> Tensor | None:  # fmt: skip
    """Return ``last_of_clusters`` of rows without earlier tokens, ``[R, H, P, D]``; None if no kernel computes it."""
    found = [
        _installed_clusters(name) if query.device.type in CLUSTER_KERNEL_DEVICES else None
        for name in (CLUSTER_ORDER_KERNEL, CLUSTER_RUN_KERNEL)
    ]
    ordering, module = found
    if ordering is None or module is None or module.unsupported(query, key, value) is not None:
        return None
    if clusters > ordering.MOST_BUCKETS:
        return None
    own = [part.short() for part in cluster]
    if valid is not None:
        own = [part.masked_fill(~valid[:, None], clusters) for part in own]
    orders = ordering.runs_of_last(*own, clusters, width - 1)
    return module.run_attention(  # type: ignore[no-any-return]
        query, key, value, *orders, module.Seen(own=True, placed=valid is None), scale
    )
