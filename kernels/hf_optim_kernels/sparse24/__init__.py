"""Linear layers whose weight keeps two of every four columns (2:4), stored compressed, with 16-bit inputs.

``naive`` is the specification, ``kernel`` the Triton kernels, ``launch`` the choice among them, ``op`` the operator
``hf_optim::sparse24``, ``layer`` the packed weight, ``bench`` the contenders of ``hf-optim bench``; it has no
``cpu``. Two other ways to multiply have their own files: ``cusparselt``, the library's product for many rows, and
sparse tensor cores, with their layout (``mma_layout``), kernels (``tensor_cores``) and launches
(``tensor_core_launch``).
``groups24`` finds the two columns of a group for both layouts, ``triton_helpers`` has the device functions of
``kernel``, ``tiles`` the configurations of all, and ``sweep`` checks and times them.
"""
