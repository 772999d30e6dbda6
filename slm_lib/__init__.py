"""The shared library of SLM from scratch: it keeps every box that a notebook has opened.

Letters for the axes of tensors, the same in every notebook and every docstring:

====  =======================================================
B     batch: how many pieces of text are looked at side by side
T     position in the context, from 0 to block_size - 1
C     channels: the width of the vector at each position (n_embd)
H     heads of attention (n_head)
D     channels per head, so that C = H * D
V     vocabulary: how many different symbols there are
====  =======================================================

Loss is in nats per token unless a name says otherwise.
"""

__version__ = "0.1.0"
