"""CapFilt (BLIP, arXiv 2201.12086 §3.3): a captioner and a filter rewrite a noisy web set, for a new model."""
