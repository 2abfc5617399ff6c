"""H2O (arXiv 2306.14048, algorithm 1): heavy hitters by accumulated attention, beside a window of recent tokens.

Half of what a head keeps are its most recent tokens, the other half those that have received most attention so far.
While decoding each new query's attention is added, and the pair outside the window with the lowest sum leaves.

Where we differ from the published code: true positions; the best keys, where it takes an argsort's permutation for
ranks; query heads that share a key head vote together; the pair leaves before the attention of the token that pushes it
out.
"""

from .method import Decode, Lengths, Method, Protect, Ranking

H2O = Method(
    Ranking(queries="all", heads="each"), Lengths("uniform"), Protect(sink=0, recent=0.5), Decode("least-important")
)
