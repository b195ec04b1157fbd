"""Products of one row with a weight in 16 bits, at the speed of memory."""
