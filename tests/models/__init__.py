"""Small random models of every family the pass is tested on: `FAMILIES`, by name."""

from .family import Family, shake
from .hf_models import HF_FAMILIES
from .timm_models import TIMM_FAMILIES
from .torchvision_models import TORCHVISION_FAMILIES

FAMILIES: dict[str, Family] = {family.name: family for family in (*TIMM_FAMILIES, *HF_FAMILIES, *TORCHVISION_FAMILIES)}

__all__ = ["FAMILIES", "Family", "shake"]
