"""The update of a step in which tokens halt (adaptive computation time), in one launch, and its gradient in two.

``naive`` is the specification, ``kernel`` the Triton kernels, ``launch`` their launches, ``op`` the operator
``hf_optim::halting_step``.
"""
