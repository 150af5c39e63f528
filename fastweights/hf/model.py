"""The language model as one of transformers' own: ``generate``, ``save_pretrained``, ``from_pretrained``, ``Trainer``, pipelines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..language.errors import SignalError
from ..language.rule import Rule
from ..models import LanguageModel, ModelConfig
from ..models.blocks import Memory, attention_window

# what a model hands on from token to token has had two names
_CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
_DEFAULT = ModelConfig()
_OWN = (
    "layers",
    "heads",
    "d_key",
    "d_value",
    "d_hidden",
    "conv",
    "decay",
    "feature_map",
    "negative_eigenvalues",
    "norm_eps",
    "options",
    "fingerprints",
)


class FastWeightConfig(PreTrainedConfig):
    """``ModelConfig`` with the names that transformers asks for: ``hidden_size`` is its d_model, ``vocab_size`` its vocabulary."""

    model_type = "fastweights"

    layers: tuple[str, ...] | list[str] = _DEFAULT.layers
    vocab_size: int = _DEFAULT.vocabulary
    hidden_size: int = _DEFAULT.d_model
    heads: int = _DEFAULT.heads
    d_key: int | None = _DEFAULT.d_key
    d_value: int | None = _DEFAULT.d_value
    d_hidden: int | None = _DEFAULT.d_hidden
    conv: int = _DEFAULT.conv
    decay: str = _DEFAULT.decay
    feature_map: str = _DEFAULT.feature_map
    negative_eigenvalues: bool = _DEFAULT.negative_eigenvalues
    norm_eps: float = _DEFAULT.norm_eps
    options: dict[str, Any] | None = None
    fingerprints: dict[str, Any] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.layers = list(self.layers)
        self.num_hidden_layers, self.num_attention_heads = len(self.layers), self.heads
        self.layer_types = ["linear_attention" if attention_window(n) is None else "full_attention" for n in self.layers]
        super().__post_init__(**kwargs)

    def to_model(self) -> ModelConfig:
        own = {n: getattr(self, n) for n in _OWN}
        own |= {"layers": tuple(self.layers), "options": self.options or {}, "fingerprints": self.fingerprints or {}}
        return ModelConfig(vocabulary=self.vocab_size, d_model=self.hidden_size, tied=self.tie_word_embeddings, **own)

    @classmethod
    def of(cls, config: ModelConfig, **more: Any) -> FastWeightConfig:
        """The same model's config for transformers."""
        own = {n: getattr(config, n) for n in _OWN}
        return cls(vocab_size=config.vocabulary, hidden_size=config.d_model, tie_word_embeddings=config.tied, **own, **more)


class FastWeightCache(DynamicCache):
    """A state a layer (fast weights, last inputs of convolutions, keys and values of softmax layers), and how many tokens made it."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: Memory | None = None
        self.seen = 0

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self.seen

    def reset(self) -> None:
        self.memory, self.seen = None, 0

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.memory is not None:
            self.memory = [{n: change(x) if x.ndim else x for n, x in state.items()} for state in self.memory]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, *_: Any, **__: Any) -> None:
        raise SignalError("fast weights cannot be rolled back to fewer tokens; keep a copy of the cache")

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False


class FastWeightForCausalLM(PreTrainedModel, GenerationMixin):
    """``LanguageModel`` for transformers: ``model(input_ids, attention_mask, labels=...)``.

    Padding belongs on the left where a cache is used, since what follows a sequence would be written over it. Packed sequences are
    told apart by ``position_ids`` that begin again at 0. Rules that are not in the catalogue are passed: ``rules={name: rule}``.
    """

    config: FastWeightConfig
    config_class = FastWeightConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _is_stateful = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = (_CACHE,)
    _keep_in_fp32_modules_strict = ("A_log", "dt_bias", "log_decay")

    def __init__(self, config: FastWeightConfig, rules: Mapping[str, Rule] | None = None) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.to_model(), rules)
        config.fingerprints = dict(self.model.config.fingerprints)
        self.post_init()

    @classmethod
    def of(cls, model: LanguageModel, **config: Any) -> FastWeightForCausalLM:
        """A trained ``LanguageModel``, weights shared, with token ids and the like for its config."""
        made = cls(FastWeightConfig.of(model.config, **config), model.rules)
        made.model = model
        return made

    def _init_weights(self, module: Any) -> None:
        """Nothing: the model has initialised itself."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.model.embed = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return self.model.head

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any) -> None:
        if generation_config.use_cache is not False and model_kwargs.get(_CACHE) is None:
            model_kwargs[_CACHE] = FastWeightCache()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: FastWeightCache | None = None,
        past_key_values: FastWeightCache | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        cache = past_key_values if cache is None else cache
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = FastWeightCache()
        x = self.model.embed(input_ids) if inputs_embeds is None else inputs_embeds
        memory = None if cache is None else cache.memory
        x, new = self._blocks(x, memory, self._begins(x, attention_mask, position_ids, memory, cache is not None))
        if cache is not None:
            cache.memory, cache.seen = new, cache.seen + x.shape[1]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        x = self.model.norm(x if isinstance(keep, int) else x[:, keep])
        logits = self.model.logits(x)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        out = CausalLMOutputWithPast(**{"loss": loss, "logits": logits, _CACHE: cache if use_cache else None})
        return out if return_dict is not False else out.to_tuple()

    def _blocks(self, x: Tensor, memory: Memory | None, reset: Tensor | None) -> tuple[Tensor, Memory]:
        new: Memory = []
        for i, block in enumerate(self.model.blocks):
            if self.gradient_checkpointing and self.training:
                x, state = self._gradient_checkpointing_func(block.__call__, x, None if memory is None else memory[i], reset)
            else:
                x, state = block(x, None if memory is None else memory[i], reset)
            new.append(state)
        return x, new

    @staticmethod
    def _begins(x: Tensor, mask: Tensor | None, positions: Tensor | None, memory: Memory | None, kept: bool) -> Tensor | None:
        """Where sequences begin inside the rows: after padding on the left, and where positions are 0 again."""
        B, T = x.shape[:2]
        begins = torch.zeros(B, T, dtype=torch.bool, device=x.device)
        if mask is not None and memory is None:
            if mask.shape != (B, T):
                raise SignalError(f"attention_mask is {tuple(mask.shape)}, expected (batch, tokens) = {(B, T)}")
            real = mask.bool()
            if kept and bool((real[:, :-1] & ~real[:, 1:]).any()):
                raise SignalError("attention_mask has padding behind or between tokens; with a cache pad on the left (padding_side='left')")
            begins |= real & (real.cumsum(1) == 1)
        if positions is not None and positions.shape[-1] == T and T > 1:
            begins |= (positions == 0).expand(B, T)
        if memory is None:
            begins[:, 0] = False
        return begins if bool(begins.any()) else None


AutoConfig.register("fastweights", FastWeightConfig, exist_ok=True)
AutoModelForCausalLM.register(FastWeightConfig, FastWeightForCausalLM, exist_ok=True)
