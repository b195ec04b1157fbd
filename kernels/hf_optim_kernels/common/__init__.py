"""Helpers shared by the kernels.

Launches: ``launch``, ``launch_plan``. The choice of tiles: ``tuning``, ``choice``. Inside kernels: ``compute_type``,
``numerics``, ``splitk``, ``gemm``, ``wide_tile``. Layers: ``codes``, ``support``, ``dense``, ``cpu_linear``. Measuring:
``benchmark``, ``tuner``, ``sweep``, ``calibrate``, ``held_out``.
"""
