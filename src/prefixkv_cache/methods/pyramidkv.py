"""PyramidKV (arXiv 2406.02069, section 4): SnapKV's selection, with lengths that fall from layer to layer.

Lengths fall along a line to a twentieth of the mean in the last layer (section 4, beta = 20). The window is 8 tokens,
as in the published code. Where we differ: as SnapKV; and where the first layer would keep more than all, the line is
made flatter, so that the mean stays the budget.
"""

from .snapkv import SNAPKV

PYRAMIDKV = SNAPKV.replace(queries=8, recent=8, lengths="pyramid")
