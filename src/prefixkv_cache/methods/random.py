"""Random keys beside the sink and the last token: the floor that every method must beat.

Lengths are uniform; each layer draws keys of its own, the same for all its heads; the fixed point leaves in decoding.
"""

from .method import Decode, Lengths, Method, Protect, Ranking

RANDOM = Method(Ranking(score="random"), Lengths("uniform"), Protect(), Decode(distance=25))
