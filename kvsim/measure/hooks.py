"""Puts a Recorder where a model computes attention, and takes it away again.

Two ways in, tried in this order: transformers' registry of attention functions, which every current Hugging Face
model asks; and a tap on `torch.nn.functional.scaled_dot_product_attention`, for any other module.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from kvsim.measure import CaptureError
from kvsim.measure.recorder import Recorder

NAME = "kvsim_capture"
_PLAIN = ("sdpa", "eager")  # implementations whose arithmetic the recorder reproduces
_UNKNOWN = ("position_bias", "cache")  # arguments that change the weights, or where the keys are
_sdpa = torch.nn.functional.scaled_dot_product_attention


@contextlib.contextmanager
def watching(model: torch.nn.Module, recorder: Recorder, *, via: str | None = None) -> Iterator[Recorder]:
    """While inside, every forward pass of `model` is recorded. `via`: "registry", "tap", or None to choose.

    Raises CaptureError for compiled models, for attention kernels of their own (flash, flex, hub kernels), for
    encoder-decoders, and when another recorder is already at work.
    """
    refuse(model)
    via = via or ("registry" if uses_registry(model) else "tap")

    def begin(outermost: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        recorder.begin(_past(outermost, args, kwargs))

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with _registered(model, recorder) if via == "registry" else Tap(recorder, getattr(model, "config", None)):
            yield recorder
    finally:
        hook.remove()


def uses_registry(model: torch.nn.Module) -> bool:
    """Does the model ask transformers' registry for its attention function?"""
    can = getattr(model, "_can_set_attn_implementation", None)
    return bool(can and can())


def refuse(model: torch.nn.Module) -> None:
    """CaptureError if what this model computes is not what a recorder would see."""
    for part in model.modules():
        wrapped = isinstance(part, torch._dynamo.OptimizedModule)
        in_place = getattr(part, "_compiled_call_impl", None) is not None
        if wrapped or in_place or hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable"):
            raise CaptureError("the model is compiled", hint="pass the model as it was before torch.compile")
    config = getattr(model, "config", None)
    kernel = getattr(config, "_attn_implementation", None)
    if kernel not in (None, *_PLAIN):
        if kernel == NAME:
            raise CaptureError("this model is already being captured")
        hint = 'load the model with attn_implementation="sdpa"'
        raise CaptureError(f'attention runs in the kernel "{kernel}"', hint=hint)
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError("this is an encoder-decoder", hint="only decoder-only models can be captured")


def _past(model: torch.nn.Module, args: tuple, kwargs: dict) -> int | None:
    """Tokens in the cache before this pass; None without a cache object that knows, where the key count tells.

    Asked of the outermost module: some classes never call the inner one.
    """
    cache = kwargs.get("past_key_values")
    if cache is None and args:
        cache = inspect.signature(model.forward).bind_partial(*args).arguments.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    return None if length is None else int(length())


@contextlib.contextmanager
def _registered(model: Any, recorder: Recorder) -> Iterator[None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME in ALL_ATTENTION_FUNCTIONS:
        raise CaptureError("another model is being captured in this process", hint="capture one model after the other")
    base = ALL_ATTENTION_FUNCTIONS["sdpa"]
    # a name the mask registry does not know gets no mask at all, even for padded batches
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    ALL_ATTENTION_FUNCTIONS[NAME] = lambda *args, **kw: _attend(recorder, base, *args, **kw)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
        yield
    finally:
        model.set_attn_implementation(before)
        del ALL_ATTENTION_FUNCTIONS[NAME]


def _attend(
    recorder: Recorder,
    base: Any,
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *args: Any,
    **kw: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: SDPA's output, and a record of the weights behind it.

    SDPA knows neither soft-capped scores nor learned sinks; there the output comes from the recorded weights.
    """
    if strange := [name for name in _UNKNOWN if kw.get(name) is not None]:
        hint = "this model cannot be captured yet"
        raise CaptureError(f"attention takes {strange[0]}, which capture does not know", hint=hint)
    softcap, sinks = kw.get("softcap"), kw.get("s_aux")
    causal = kw.get("is_causal")
    own = softcap is not None or sinks is not None
    layer = getattr(module, "layer_idx", None)
    out = recorder.observe(
        len(recorder.seen) if layer is None else layer,
        query,
        key,
        attention_mask,
        kw.get("scaling"),
        v=value,
        softcap=softcap,
        sinks=sinks,
        causal=getattr(module, "is_causal", True) if causal is None else causal,
        window=kw.get("sliding_window"),
        compute=own,
    )
    if out is not None:
        return out.contiguous(), None
    return base(module, query, key, value, attention_mask, *args, **kw)


class Tap(TorchFunctionMode):
    """Sees every call of `scaled_dot_product_attention`; the n-th one of a forward pass is layer n.

    `config` (num_attention_heads, num_key_value_heads), where there is one, tells which of the key heads are
    copies made for grouped attention. Without it keys are taken as they come.
    """

    def __init__(self, recorder: Recorder, config: Any = None):
        super().__init__()
        self.recorder = recorder
        self.heads = getattr(config, "num_attention_heads", None)
        self.kv_heads = getattr(config, "num_key_value_heads", None)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _sdpa:
            self._observe(*args, **kwargs)
        return func(*args, **kwargs)

    def _observe(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        if query.dim() != 4:
            raise CaptureError(f"attention over {query.dim()} axes", hint="capture reads [batch, heads, tokens, dim]")
        if self.kv_heads and key.shape[1] > self.kv_heads:  # copies of each KV head, one per query head of its group
            copies = key.shape[1] // self.kv_heads
            key, value = key[:, ::copies], value[:, ::copies]
        if self.heads and query.shape[1] < self.heads:  # one token: the group was packed into the row axis
            query = query.reshape(query.shape[0], self.heads, -1, query.shape[-1])
            if attn_mask is not None and attn_mask.shape[1] > 1:
                attn_mask = attn_mask.reshape(attn_mask.shape[0], self.heads, -1, attn_mask.shape[-1])
        if is_causal:  # SDPA aligns the two axes at their starts: keys beyond the rows are never seen
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        self.recorder.observe(len(self.recorder.seen), query, key, attn_mask, scale, v=value, causal=is_causal)
