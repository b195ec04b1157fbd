"""The divergence of a student's distribution from its teacher's over the same classes, and its gradient.

``naive`` is the specification, ``kernel`` the Triton kernels, ``launch`` their launches, ``op`` the operator
``hf_optim::kd_rows`` and the loss built on it, ``bench`` the contenders of ``hf-optim bench``. Apart from these,
``linear`` is the loss of hidden states and heads, which never holds all logits.
"""
