"""The experts of a mixture on their codes: products of tokens with the packed matrices that a router chose.

``naive`` is the specification, ``kernel`` the Triton kernels, ``launch`` their launches, ``op`` the operators
``hf_optim::packed_experts`` and ``hf_optim::packed_expert_linear``, ``layer`` the packed weights of experts, ``cpu``
their form on PyTorch's own packed operators, ``base`` what both share. ``experts.routing`` sorts pairs by expert.
"""
