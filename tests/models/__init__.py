"""Small random models of every family the pass is tested on: `FAMILIES`, by name."""

from .family import Family, shake
from .hf_decoders import DECODERS
from .hf_dense import DENSE
from .hf_language import LANGUAGE
from .hf_pooled import POOLED
from .hf_vision import VISION
from .timm_models import TIMM_FAMILIES
from .torchvision_models import TORCHVISION_FAMILIES

FAMILIES: dict[str, Family] = {
    family.name: family for family in (*TIMM_FAMILIES, *VISION, *DENSE, *DECODERS, *LANGUAGE, *TORCHVISION_FAMILIES, *POOLED)
}

__all__ = ["FAMILIES", "Family", "shake"]
