"""Reading and checking specs. Needs PyYAML, and no torch: a model repository's CI can validate its spec."""

from .errors import NotImplementedInSpec, SpecError
from .spec import Spec, presets
from .tensors import CodecSpec, LayerSpec, TensorSpec

__all__ = ["CodecSpec", "LayerSpec", "NotImplementedInSpec", "Spec", "SpecError", "TensorSpec", "presets"]
