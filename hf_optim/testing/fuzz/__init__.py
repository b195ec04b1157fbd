"""A fuzzer of everything that hf_optim reads: mutated inputs through the doors that users use.

``python -m hf_optim.testing.fuzz --inputs 3000 --seed 7`` prints counts by kind of input and door. An input is refused
with an ``OptimError`` in a short line, or it works. A checkpoint that loads gives the logits of the unmutated one, or
those that stock transformers gives for the same files. Anything else is a finding, which is printed with its seed.
"""
