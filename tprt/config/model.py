"""What the program asks of any model's config, whichever architecture it is."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from tprt.config.checks import count, one_of, refuse_flag, shown
from tprt.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a model; all counts are of the whole model, never of one rank.

    Args:
        vocab_size: rows of embedding and head in the checkpoint, padding rows included.
        max_position_embeddings: tokens of the longest sequence it was trained on.
        eos_token_id: what the checkpoint's config claims; the tokenizer's scan decides.

    Attributes:
        model_type: as in Hugging Face's ``config.json``.
        is_bounded: no sequence can be longer than ``max_position_embeddings``.
        overrides: fields that users may set anew, with the values they may take where those are few.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    vocab_padding_multiple: int = 1

    model_type: ClassVar[str]
    is_bounded: ClassVar[bool] = True
    overrides: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "head_dim", "max_position_embeddings", "vocab_padding_multiple",
        ):  # fmt: skip
            count(name, getattr(self, name))
        if not isinstance(self.tie_word_embeddings, bool):
            refuse_flag("tie_word_embeddings", self.tie_word_embeddings)
        if self.eos_token_id is not None and type(self.eos_token_id) is not int:
            raise CheckpointError(
                f"eos_token_id is {shown(self.eos_token_id)}", hint="a whole number or null"
            )

    @property
    def in_words(self) -> str:
        """What is special about how it runs, for logs."""
        return self.model_type

    def tp_sizes(self) -> list[int]:
        """Tensor-parallel sizes at which every rank gets whole heads and equal MLP parts."""
        heads, ffn = self.num_attention_heads, self.intermediate_size
        return [n for n in range(1, heads + 1) if heads % n == 0 and ffn % n == 0]

    def validate_parallel(self, tp_size: int) -> None:
        """Raises ConfigError with the sizes that work when ``tp_size`` does not."""
        if tp_size not in self.tp_sizes():
            sizes = ", ".join(map(str, self.tp_sizes()))
            raise ConfigError(
                f"{tp_size} ranks cannot share {self.num_attention_heads} heads and "
                f"{self.intermediate_size} MLP neurons",
                hint=f"a tensor-parallel size of {sizes}",
            )

    def with_overrides(self, values: dict[str, Any]) -> Self:
        """Another value for fields that users may set.

        Raises:
            ConfigError: this model has no such field, or not with this value.
        """
        for name, value in values.items():
            if name not in self.overrides:
                known = ", ".join(self.overrides) or "none"
                raise ConfigError(
                    f"a model of type {self.model_type} has no setting {name!r}",
                    hint=f"of its own it has: {known}",
                )
            if self.overrides[name]:
                try:
                    one_of(name, value, self.overrides[name])
                except CheckpointError as error:
                    raise ConfigError(error.what, hint=error.hint) from None
        try:
            return replace(self, **values)
        except CheckpointError as error:  # what is wrong in a file is wrong here
            raise ConfigError(error.what, hint=error.hint) from None

    def settled(self, layout: str) -> Self:
        """With what the checkpoint leaves open filled in as its layout's own code has it."""
        return self

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name, Hugging Face's, and shape of every tensor of the model, in reading order.

        ``lm_head.weight`` is absent when the head is tied.
        """
        raise NotImplementedError

    def to_megatron(self, tp_size: int, dtype: str) -> dict[str, Any]:
        """The fields of ``args`` that readers of Megatron's layout look at.

        Raises:
            CheckpointError: nobody has this architecture in that layout.
        """
        raise CheckpointError(
            f"a model of type {self.model_type} has no Megatron layout",
            hint="--format hf or --format presharded",
        )

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """From ``config.json`` in the spelling of transformers 4.x or 5.x.

        Raises:
            CheckpointError: a key is missing or malformed, or asks for what is not implemented.
        """
        raise NotImplementedError

    def to_hf(self) -> dict[str, Any]:
        """A ``config.json`` that both spellings of transformers read."""
        raise NotImplementedError
