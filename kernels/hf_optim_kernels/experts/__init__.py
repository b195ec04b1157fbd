"""The experts of a mixture: route, grouped products, activation, and the weighted sum over the experts of a token.

``naive`` is the specification, ``routing`` the kernels that sort pairs of token and expert, ``decode`` the kernels of a
few pairs, ``grouped`` those of many, ``launch`` the choice among them, ``op`` the operators, ``bench`` the contenders of
``hf-optim bench``.
"""
