"""One rank of transformers' expert parallelism with a capacity: ``capped_ranks.py MODEL IMPLEMENTATION OUTPUT``.

Writes ``OUTPUT-<rank>.json``: the largest difference of the logits to one process and the counts of this rank, or the
error.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from transformers import MixtralForCausalLM
from transformers.distributed import DistributedConfig

from hf_optim import ModelError
from hf_optim.toolkit.experts import Routing, attach_routing, expert_load

IDS = torch.arange(3, 43).reshape(2, 20)


def run(model):
    attach_routing(model, Routing(capacity=0.5))
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    return logits, [[list(load.chosen), list(load.dropped)] for load in expert_load(model).values()]


def main():
    path, implementation, output = sys.argv[1:]
    found = {}
    placed = DistributedConfig(tp_size=2, ep_size=2, ep_implementation=implementation)
    try:
        logits, found["counts"] = run(MixtralForCausalLM.from_pretrained(path, distributed_config=placed))
        alone, found["alone"] = run(MixtralForCausalLM.from_pretrained(path))
        found["difference"] = float((logits - alone).abs().max())
    except ModelError as error:
        found["error"] = str(error)
    with open(f"{output}-{os.environ['RANK']}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
