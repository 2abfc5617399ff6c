"""SnapKV (arXiv 2404.14469, section 4): what the prompt's last queries look at, with its neighbours, for each head.

Importance is the attention of the last 32 tokens, summed, for each key head; a maximum over 7 neighbours keeps clusters
together (section 4.2, Listing 1); the window itself always stays. Nothing leaves while decoding.

Where we differ from the published code: query heads that share a key head vote together; where the budget is smaller
than the window, the window is cut to its newest tokens; the first token stays, as in all methods here.
"""

from .method import Decode, Lengths, Method, Protect, Ranking

SNAPKV = Method(Ranking(queries=32, heads="each", pooling=7), Lengths("uniform"), Protect(recent=32), Decode())
