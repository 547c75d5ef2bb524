"""Losses between the logits and feature maps of a student and a teacher, on plain tensors."""

from .losses import affinity, fast_feature_affinity, feature_affinity, logit_distillation

__all__ = ["affinity", "fast_feature_affinity", "feature_affinity", "logit_distillation"]
