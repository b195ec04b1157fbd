"""The column recursion of Optimal Brain Surgeon quantizers: round a column, pass its error on to the columns after it.

``naive`` is the specification, ``kernel`` the Triton kernel of one block of columns, ``run`` the recursion over all.
Nothing here is recorded for autograd or compiled, so there is no ``torch.library`` operator.
"""
