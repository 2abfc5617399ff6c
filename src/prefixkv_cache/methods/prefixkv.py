"""PrefixKV (arXiv 2412.03409): a length for each layer, from one threshold on cumulative attention mass.

Section 3.2: the importance of key j in a layer is the mean over the heads of its attention, summed over all N queries
of the prompt, `I_j = 1/H sum_h sum_i A_h[i, j]`. Section 3.3: each layer keeps the shortest prefix of its falling
importance that reaches a threshold p, the same for all layers, found so that the budget is met. While decoding, the
pair at Elastic Cache's fixed point leaves (arXiv 2407.18121, section 3.3), 25 pairs before the prompt's end.

Where we differ from the published code: true positions; the search ends on any input; the leaving pair is overwritten
before the attention of the token that pushes it out.
"""

from .method import Decode, Lengths, Method, Protect, Ranking

PREFIXKV = Method(Ranking(queries="all", heads="mean"), Lengths("search"), Protect(), Decode(distance=25))
