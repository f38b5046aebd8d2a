"""How a prefix enters attention: inside the kernel call, so that caches, lengths and positions stay what they are.

kernel      keys, values and masks with a prefix in front; what a prefix must offer
interface   models that call transformers' attention interface (most of them)
mode        everything else: torch's attention, and attention written out with a softmax
sites       which modules of a backbone attend, by which of the two, with which sizes
"""
