"""What reaches what in a model, from the toolkit."""

from hf_optim.toolkit.attention import (
    attends_to_the_far_end,
    hidden_states,
    is_causal,
    perturbed,
    relative_difference,
)

__all__ = ["attends_to_the_far_end", "hidden_states", "is_causal", "perturbed", "relative_difference"]
