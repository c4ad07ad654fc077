"""What the engine asks of a model, whichever architecture it is."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from tprt.batch import ForwardBatch
from tprt.cache import CacheSpec
from tprt.config import ModelConfig
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.vocabulary import Vocabulary
from tprt.layers.embedding import Noise, ParallelLMHead
from tprt.sizes import KernelSizes

Tensors = tuple[torch.Tensor, torch.Tensor]


class CausalLM(nn.Module, ABC):
    """One rank's part of a model; parameters are uninitialised until loaded.

    Args:
        config: of the whole model.
        tp: which part this is; without process groups it cannot run but can be planned and loaded.
        dtype: of parameters, activations and cache.
        max_positions: longest sequence that tables of positions cover; None means what the model was
            trained on.
        vocabulary: which ids have rows; None means all.

    Raises:
        ConfigError: the model does not divide over ``tp.size`` ranks.
    """

    config_class: ClassVar[type[ModelConfig]]
    lm_head: ParallelLMHead

    def __init__(
        self,
        config: ModelConfig,
        tp: TPGroup,
        dtype: torch.dtype,
        max_positions: int | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        super().__init__()
        config.validate_parallel(tp.size)
        self.config, self.tp, self.dtype = config, tp, dtype
        self.max_positions = max_positions or config.max_position_embeddings
        self.vocabulary = vocabulary or Vocabulary(config.vocab_size)

    def finish_loading(self) -> None:
        """After the weights are in: lay them out as this device reads them fastest.

        Nothing can be loaded or saved any more. Without it the model runs, slower.
        """
        for module in self.modules():
            if (
                module is not self
                and (finish := getattr(module, "finish_loading", None)) is not None
            ):
                finish()

    @abstractmethod
    def forward(self, batch: ForwardBatch, caches: Any) -> torch.Tensor:
        """Hidden states [R, hidden_size] after the last norm, the same on every rank.

        Args:
            caches: of ``allocate_caches``, one per layer.
        """

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> float32 [R, part], this rank's columns of ``vocabulary``."""
        return self.lm_head(hidden)

    def argmax(self, hidden: torch.Tensor, noise: Noise, num_valid: int) -> Tensors:
        """The best id of this rank's columns for each row; see ``ParallelLMHead.argmax``."""
        return self.lm_head.argmax(hidden, noise, num_valid)

    @abstractmethod
    def cache_spec(self) -> list[CacheSpec]:
        """What each layer keeps, per token or per sequence."""

    # ------------------------------------------------------------ for plans, on the device "meta" too

    @abstractmethod
    def activation_elements(self, tokens: int, length: int) -> int:
        """Elements alive at the peak of a layer of this rank.

        Args:
            length: tokens of a sequence whose keys and values are gathered at a time; 0 for none.
        """

    @abstractmethod
    def partial_bytes(self, rows: int, length: int) -> int:
        """Of partial results that attention over ``length`` tokens keeps for ``rows`` sequences."""

    @abstractmethod
    def copied_elements(self, sparse: bool) -> int:
        """Of weights that a CPU holds in two layouts.

        Args:
            sparse: whether rows that meet zeros are left unread, which wants a layout of its own.
        """

    @abstractmethod
    def kernel_sizes(self, block_size: int) -> KernelSizes:
        """What the operations of this rank's layers work on, for who compiles them ahead.

        Args:
            block_size: tokens of a block of a paged cache.
        """
