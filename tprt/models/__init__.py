"""The architectures, found by the ``model_type`` of their config."""

from tprt.models.base import CausalLM
from tprt.models.persimmon import PersimmonForCausalLM
from tprt.models.recurrent_gemma import RecurrentGemmaForCausalLM

MODEL_CLASSES: dict[str, type[CausalLM]] = {
    cls.config_class.model_type: cls for cls in (PersimmonForCausalLM, RecurrentGemmaForCausalLM)
}

__all__ = ["MODEL_CLASSES", "CausalLM", "get_model_class"]


def get_model_class(model_type: str) -> type[CausalLM]:
    return MODEL_CLASSES[model_type]
