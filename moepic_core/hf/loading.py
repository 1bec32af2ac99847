"""Loads a checkpoint through Transformers' own doors, with the routed experts diverted into a host store.

A custom quantizer is Transformers' documented place to treat parameters while they load: it sees each fused expert
tensor after Transformers' own renaming and merging, so no model names and no name maps are needed here. Experts stay
on the meta device, a token embedding that `embedding` diverts is left in its file, everything else loads as usual;
memory peaks at the store plus about one layer. Called once by the engine.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import BadCheckpoint
from ..host_store import HostStore
from ..lazy_tensors import LazyTensors
from ..packing import FusedLayout, check_layout
from ..spec import ModelSpec
from .embedding import divert
from .refusals import refusals

_METHOD = "moepic"
_ADVICE = "correct config.json, or download the checkpoint again"
_SUPPORTED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # flags of Transformers' experts interface


class ExpertSink:
    """Receives fused expert tensors while the model loads and hands them to the store."""

    def __init__(self, spec: ModelSpec, store: HostStore) -> None:
        self.spec = spec
        self.store = store
        self.modules: dict[str, nn.Module] = {}  # experts modules by path, in the order of execution
        self.shapes: dict[str, torch.Size] = {}  # of every parameter, as the config wants them
        self.error: Exception | None = None  # that packing ended with

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertSink:
        return self  # Transformers copies configs; the store must not be copied with them

    def find_experts(self, model: nn.Module) -> None:
        """Takes the experts modules of the skeleton."""
        self.modules = experts_of(model, self.spec)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        for module in self.modules.values():
            module._is_hf_initialized = True  # type: ignore[assignment]  # no random numbers for weights that arrive elsewhere
            if self.store.complete:
                drop_fused(module)

    def receive(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        position, module = list(self.modules).index(path), self.modules[path]
        layout = layout_of(module)
        expected = dict(module.named_parameters(recurse=False))
        check_layout(self.spec.moe_layers[position], {**expected, leaf: tensor}, layout, path)
        self.store.add(position, leaf, tensor, layout)


def experts_of(model: nn.Module, spec: ModelSpec) -> dict[str, nn.Module]:
    """The experts modules of a skeleton by path, in the order of execution. Raises BadCheckpoint when they are not
    what the files hold.
    """
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "is_concatenated")}
    if len(modules) != len(spec.moe_layers):
        raise BadCheckpoint(
            f"{spec.architecture} has {len(modules)} expert layers behind Transformers' experts interface, the files "
            f"hold {len(spec.moe_layers)}; this family or this checkpoint's config is not supported"
        )
    for (name, module), layer in zip(modules.items(), spec.moe_layers, strict=True):
        check_layout(layer, dict(module.named_parameters(recurse=False)), layout_of(module), name)
    return modules


def layout_of(module: nn.Module) -> FusedLayout:
    """The module's layout flags. Refuses by name those that packing does not support, and those it has never heard of:
    a split expert cannot be normalised as a whole, for one.
    """
    for flag, value in vars(module).items():
        if value is True and flag.startswith(("has_", "is_")) and flag not in _SUPPORTED:
            raise BadCheckpoint(
                f"{type(module).__name__} lays its experts out in a way that cannot be split ({flag}); this family is "
                f"not supported"
            )
    return FusedLayout(bool(module.has_gate), bool(module.is_transposed), bool(module.is_concatenated))


def drop_fused(module: nn.Module) -> None:
    """Removes the fused parameters that now live in the host store."""
    for name in (layout_of(module).input_name, "down_proj"):
        delattr(module, name)


def load_model(
    spec: ModelSpec, tensors: LazyTensors, store: HostStore, device: torch.device
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The model in eval mode on `device`, without routed experts, and its experts modules by path, in order of
    execution.

    Raises BadCheckpoint when anything is missing, left over in shape or unknown to Transformers; Cancelled when asked;
    RuntimeError when a memory is full.
    """
    _register()
    sink = ExpertSink(spec, store)
    config, model_class = model_class_of(spec)
    try:
        with _quiet(), refusals(spec.name, _ADVICE):
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=getattr(torch, spec.dtype),
                quantization_config=_Config(sink=sink),
                ignore_mismatched_sizes=True,  # so that they are listed; `_nothing_missing` refuses them by name
                output_loading_info=True,
            )
    except BadCheckpoint as error:
        if sink.error is not None:  # Transformers wraps what a conversion raises
            raise sink.error from error
        raise
    _nothing_missing(spec, info)
    for name, parameter in model.named_parameters():  # some versions load what does not fit without a word
        _check_shape(name, parameter.shape, sink.shapes[name])
    store.seal()
    for module in sink.modules.values():
        if hasattr(module, "down_proj"):  # dropped before loading when the store was complete already
            drop_fused(module)
    del model.config.quantization_config
    generation = _generation_config(spec)
    if generation is not None:
        model.generation_config = generation
    model.requires_grad_(False)
    return model.to(device).eval(), sink.modules


def check_family(spec: ModelSpec) -> None:
    """Raises BadCheckpoint for a checkpoint whose config alone shows that `load_model` will refuse it: builds the
    skeleton, without memory for weights.
    """
    config, model_class = model_class_of(spec)
    with _quiet(), refusals(spec.name, _ADVICE), torch.device("meta"):
        skeleton = model_class(config)
    experts_of(skeleton, spec)


def model_class_of(spec: ModelSpec) -> tuple[Any, Any]:
    """Transformers' config and causal-LM class for the checkpoint; BadCheckpoint when there is none."""
    unknown = (
        f"model type '{spec.model_type}' has no causal language model in this Transformers; "
        f"update Transformers or choose another checkpoint (code from checkpoints is never run)"
    )
    if spec.model_type not in CONFIG_MAPPING:
        raise BadCheckpoint(unknown)
    with _quiet(), refusals(spec.name, _ADVICE):
        config = AutoConfig.from_pretrained(spec.path, trust_remote_code=False, local_files_only=True)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise BadCheckpoint(unknown)
    return config, AutoModelForCausalLM._model_mapping[type(config)]


def _generation_config(spec: ModelSpec) -> Any:
    """What `generation_config.json` says, which few need and not all bring."""
    if not (Path(spec.path) / "generation_config.json").is_file():
        return None
    with refusals(f"generation_config.json of {spec.name}", "correct it, delete it or download it again"):
        return GenerationConfig.from_pretrained(spec.path, local_files_only=True)


def _nothing_missing(spec: ModelSpec, info: Mapping[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise BadCheckpoint(f"{spec.name} lacks {len(missing)} tensors, among them {missing[0]}; download it again")
    if info["mismatched_keys"]:
        _check_shape(*min(info["mismatched_keys"]))


def _check_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise BadCheckpoint(
            f"{name} has shape {list(found)} but the config asks for {list(wanted)}; the checkpoint is damaged"
        )


class _Pack(ConversionOps):  # type: ignore[misc]
    """Transformers' quantize operation: takes a fused tensor away and reports it as treated."""

    def __init__(self, sink: ExpertSink) -> None:
        self.sink = sink

    def convert(
        self, input_dict: Mapping[str, Any], full_layer_name: str = "", missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Any]:
        for value in input_dict.values():
            try:
                self.sink.receive(full_layer_name, value[0] if isinstance(value, list) else value)
            except Exception as error:  # whatever it is, Transformers hides it, and goes on with the next tensor
                self.sink.error = self.sink.error or error
                raise
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class _Quantizer(HfQuantizer):  # type: ignore[misc]
    requires_calibration = False
    is_trainable = False

    def is_serializable(self) -> bool:
        return False

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        path, leaf = param_name.rsplit(".", 1)
        module = self.quantization_config.sink.modules.get(path)
        return module is not None and leaf in (layout_of(module).input_name, "down_proj")

    def get_quantize_ops(self) -> _Pack:
        return _Pack(self.quantization_config.sink)

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        divert(model, self.quantization_config.sink.spec)
        self.quantization_config.sink.find_experts(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        return


class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    def __init__(self, sink: ExpertSink | None = None, **_: Any) -> None:
        self.quant_method = _METHOD
        self.sink = sink

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _METHOD}


@functools.cache
def _register() -> None:
    register_quantization_config(_METHOD)(_Config)
    register_quantizer(_METHOD)(_Quantizer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers reports unused keys and draws progress bars; our own checks and progress say it better."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
