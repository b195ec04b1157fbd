"""The column recursion of Optimal Brain Surgeon quantizers: round a column, pass its error on to the columns after it.

``naive`` is the specification, ``kernel`` the Triton kernel of one block of columns, ``launch`` the recursion over all.
It has no ``op``: autograd does not record the call, and it is not compiled.
"""
