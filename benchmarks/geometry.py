"""Models by their measures: what a benchmark needs of LLaVA-1.5-7B or Qwen2.5-VL-7B without their weights.

Only the text decoder is built, in transformers' own class for it, with random weights made on the device. The time and
memory of a forward pass do not depend on the weights' values, apart from the attention's being peaked or not, which
`PEAKED` cares for. A vision tower adds the same to every cache and is left out: ratios are a little harder this way.
With `layers` fewer than the real number the vocabulary shrinks, too, since the head would otherwise outweigh the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from prefixkv_cache import Method, PrefixProfile

PEAKED = 100.0
"""Over the root of the width, the factor on query and key projections: scores spread by about 4, where a fresh model's
attention is almost uniform."""
SMALL_VOCABULARY = 1000


@dataclass(frozen=True)
class Geometry:
    """The measures of a text decoder.

    Attributes:
        kind: config and model class.
        layers, hidden, intermediate, heads, kv_heads, vocabulary: as in the model's config.
    """

    kind: tuple[Any, Any]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def pair_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * dtype.itemsize

    def attention_share(self, tokens: int) -> float:
        """Causal attention's part of the arithmetic of a prompt of so many tokens, the head left out."""
        attention = 2 * tokens * self.hidden
        projections = 2 * self.hidden * (2 * self.hidden + 2 * self.kv_heads * self.head_dim)
        return attention / (attention + projections + 6 * self.hidden * self.intermediate)


LLAMA, QWEN = (LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)
GEOMETRIES = {
    "llava-1.5-7b": Geometry(LLAMA, 32, 4096, 11008, 32, 32, 32064),
    "qwen2.5-vl-7b": Geometry(QWEN, 28, 3584, 18944, 28, 4, 152064),
    # LLaVA-1.5-7B at a quarter of its width and layers: as much attention at n tokens as the original at 4 n.
    "quarter": Geometry(LLAMA, 8, 1024, 2752, 8, 8, SMALL_VOCABULARY),
    "tiny": Geometry(LLAMA, 2, 256, 688, 4, 4, SMALL_VOCABULARY),
}


def build(name: str, *, layers: int | None = None, dtype: str = "float32", device: str = "cpu") -> Any:
    """The model in eval mode on the device, sdpa attention; of `layers` layers where that is given."""
    geometry = GEOMETRIES[name]
    shrunk = layers is not None and layers < geometry.layers
    config_class, model_class = geometry.kind
    config = config_class(
        hidden_size=geometry.hidden,
        intermediate_size=geometry.intermediate,
        num_hidden_layers=layers or geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        vocab_size=SMALL_VOCABULARY if shrunk else geometry.vocabulary,
        max_position_embeddings=1 << 17,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, dtype))
        with torch.device(device):
            model = model_class(config).eval()
    finally:
        torch.set_default_dtype(default)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if parameter_name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.mul_(PEAKED * geometry.hidden**-0.5)
    return model


def keep_profile(model: Any, budget: float, method: Method, segments: int = 0) -> PrefixProfile:
    """A profile for this method.

    Args:
        model: what it is for.
        budget: its only one, a fraction.
        method: what it says it was made with.
        segments: 0: one length a layer, falling from the first layer to the last by half of the budget up and down. n:
            all layers alike, their key heads in n groups of different lengths; the same total for every n.
    """
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    n = segments or layers
    lean = torch.linspace(1, -1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    ratios = budget + min((0.8 if segments else 0.5) * budget, 1 - budget) * lean
    keep = ratios[:, None]
    if segments:
        of_heads = ratios[torch.arange(heads) * segments // heads]
        keep = (of_heads * (budget / of_heads.mean())).expand(layers, heads)
    metadata = {"source": "benchmarks", "method": method.spell(full=True)}
    return PrefixProfile(torch.tensor([budget], dtype=torch.float64), keep[None].clone(), metadata)


def prompt(model: Any, tokens: int, batch: int = 1) -> torch.Tensor:
    """int64 [batch, tokens], random words, the same for the same length."""
    random = torch.Generator().manual_seed(tokens)
    return torch.randint(10, model.config.vocab_size, (batch, tokens), generator=random).to(model.device)
