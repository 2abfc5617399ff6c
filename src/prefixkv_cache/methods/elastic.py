"""Elastic Cache (arXiv 2407.18121): merging at the prompt, the fixed point while decoding.

Importance as PrefixKV's (equation 4), the same fraction for all layers. Kept keys are anchors; each pruned pair is
merged, as a mean, into its nearest anchor (section 3.2). The pair at the fixed point leaves (section 3.3).

Where we differ from the published code: true positions; the best keys, where it takes an argsort's permutation for
ranks; what is merged is what was pruned, where its index lacks the sink's offset; sink and last token are kept but are
no anchors; ties in distance go to the lower anchor.
"""

from .uniform import UNIFORM

ELASTIC = UNIFORM.replace(merge=True)
