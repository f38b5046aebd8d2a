"""`deltakit demo`: deltas beside a linear probe and full fine-tuning, on a real backbone and real data."""
