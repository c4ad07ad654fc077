"""The architectures, found by the ``model_type`` of their config."""

from tprt.config import PersimmonConfig
from tprt.models.persimmon import PersimmonForCausalLM

MODEL_CLASSES: dict[str, type[PersimmonForCausalLM]] = {
    PersimmonConfig.model_type: PersimmonForCausalLM
}


def get_model_class(model_type: str) -> type[PersimmonForCausalLM]:
    return MODEL_CLASSES[model_type]
