"""The two networks of V-JEPA 2-AC: a frozen video encoder and an action-conditioned predictor."""
from vjepa2_src.encoder import Encoder
from vjepa2_src.predictor import Predictor


__all__ = ["Encoder", "Predictor"]
