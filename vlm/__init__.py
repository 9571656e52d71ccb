"""A vision-language lineage trained stage by stage: CLIP, ViLT, ALBEF, BLIP, BLIP-2."""

__version__ = "0.1.0"
