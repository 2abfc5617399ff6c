"""PrefixKV's importance (arXiv 2412.03409, section 3.2) with one length for all layers: the paper's ablation."""

from .prefixkv import PREFIXKV

UNIFORM = PREFIXKV.replace(lengths="uniform")
