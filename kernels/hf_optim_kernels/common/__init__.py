"""Helpers shared by the kernels.

Launches: ``launch``, ``launch_plan``, ``tuning``. Inside kernels: ``compute_type``, ``numerics``, ``splitk``, ``gemm``.
Layers: ``codes``, ``support``, ``dense``, ``cpu_linear``. Measuring: ``benchmark``.
"""
