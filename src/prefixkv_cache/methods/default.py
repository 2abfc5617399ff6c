"""The default: what this library uses where neither a method nor a profile says otherwise.

Every key head keeps its own keys, all heads equally many. A key's score is the larger of two shares of attention, each
without the sink: from the prompt's last 32 tokens, averaged over 13 neighbours, and from 64 tokens spread evenly over
the prompt; times the norm of the value. What a question at the end asks for is seen by the first, what a summary needs
by the second (docs/study.md). The prompt's pairs stay while decoding, and an answer has 64 pairs a head to itself.
"""

from .method import Decode, Lengths, Method, Protect, Ranking

DEFAULT = Method(
    Ranking(queries=32, context=64, heads="each", pooling=13, pooling_by="mean", value_norm=True),
    Lengths("uniform"),
    Protect(text_floor=0.5),
    Decode(distance=1, headroom=64),
)
