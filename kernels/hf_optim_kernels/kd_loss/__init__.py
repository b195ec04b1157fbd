"""The divergence of a student's distribution from its teacher's over the same classes, and its gradient.

``naive`` is the specification, ``kernel`` the Triton kernels, ``run`` their launches, ``op`` the operator
``hf_optim::kd_rows`` and the loss made of it, ``linear`` the loss of hidden states and heads, whose logits never
stand whole, ``bench`` what is timed.
"""
