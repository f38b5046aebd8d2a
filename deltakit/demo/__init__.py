"""`deltakit demo`: compares deltas with a linear probe and full fine-tuning, on a real backbone and real data."""
