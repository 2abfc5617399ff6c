"""StreamingLLM (arXiv 2309.17453, section 3.2): the first four tokens and the most recent ones.

While decoding, the oldest pair behind the sink leaves. Where we differ from the paper: positions are those in the text,
not those in the cache. The paper numbers the kept tokens anew, which needs keys stored without their rotation; within
the model's context length true positions are what the model was trained on.
"""

from .method import Decode, Lengths, Method, Protect, Ranking

STREAMING = Method(Ranking(score="recency"), Lengths("uniform"), Protect(sink=4), Decode("oldest"))
