"""The experts of a mixture: route, grouped products, activation, and the weighted sum over the experts of a token.

``naive`` is the specification, ``routing`` the kernels that sort pairs of token and expert, ``decode`` the kernels for
few pairs, ``grouped`` those for many, ``launch`` the choice among them, ``op`` the operators, ``bench`` the contenders
of ``hf-optim bench``. Training has the same files: ``naive_backward``, ``backward``, ``training``, ``training_op``.
"""
