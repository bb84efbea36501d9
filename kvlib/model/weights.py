"""How weights come into memory: made at random where they are to lie, and held in 8 or 4 bits through bitsandbytes.

8 bits are LLM.int8's (Dettmers et al. 2022), 4 bits NF4 (Dettmers et al. 2023). The matrices of the layers are quantised;
embeddings, norms and the output matrix stay as they are, as in transformers.
"""

import logging
import math
import warnings

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_module
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

OUTLIER = 6.0  # LLM.int8 computes channels whose inputs exceed this in 16 bits


def build_random(config: dict, dtype: torch.dtype, device: str, weight_bits: int | None = None) -> PreTrainedModel:
    """A model with random weights from torch's seed, made in `dtype` on `device`: no other copy of it ever exists.

    With `weight_bits` of 8 or 4 every matrix is quantised before the next one is made.
    """
    with torch.device("meta" if weight_bits else device):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    if not weight_bits:
        return network
    output = network.get_output_embeddings()
    for name in [name for name, _ in network.named_modules()]:  # a list of modules would keep what is replaced
        module = network.get_submodule(name)
        module.to_empty(device=device, recurse=False)
        network._init_weights(module)
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output:
            network.set_submodule(name, quantise(module, weight_bits))
    network.tie_weights()
    return network


def read_weights(source: str, dtype: torch.dtype, device: str, weight_bits: int | None = None) -> PreTrainedModel:
    """The model in a folder or on the hub: safetensors only, and no code but transformers'.

    `device` "auto" spreads its layers over all devices. Raises ValueError for a file that is not what it should be.
    """
    try:
        network = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False, device_map=device,
            **quantisation(weight_bits, dtype),
        )  # fmt: skip
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: its weights cannot be read ({reason}); copy or download them anew.") from error
    if device != "auto":
        remove_hook_from_module(network, recurse=True)  # on one device there is nothing to move
    return network


def spread_out(network: PreTrainedModel) -> PreTrainedModel:
    """The model with its layers on all GPUs, and on the host where these do not suffice, as accelerate places them."""
    places = infer_auto_device_map(network, no_split_module_classes=list(network._no_split_modules))
    return dispatch_model(network, places)


def quantise(linear: nn.Linear | Conv1D, weight_bits: int) -> nn.Module:
    """bitsandbytes' layer of 8 or 4 bits in place of a linear one, on the same device."""
    library, weight = bitsandbytes().nn, linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    shape = weight.shape[1], weight.shape[0], linear.bias is not None
    codes = weight.data.cpu()  # 8-bit codes are only made on the way from the host
    with torch.device("meta"):
        if weight_bits == 8:
            layer = library.Linear8bitLt(*shape, has_fp16_weights=False, threshold=OUTLIER)
            codes = library.Int8Params(codes, requires_grad=False)
        else:
            layer = library.Linear4bit(*shape, weight.dtype, compress_statistics=False, quant_type="nf4")
            codes = library.Params4bit(codes, requires_grad=False, compress_statistics=False, quant_type="nf4")
    layer.weight, layer.bias = codes.to(weight.device), linear.bias
    return layer


def quantisation(weight_bits: int | None, dtype: torch.dtype) -> dict:
    """What `from_pretrained` is to be told, so that it holds the weights it reads in so many bits; None: as they are."""
    if not weight_bits:
        return {}
    bitsandbytes()
    in_8 = dict(load_in_8bit=True, llm_int8_threshold=OUTLIER)
    in_4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": BitsAndBytesConfig(**(in_8 if weight_bits == 8 else in_4))}


def bitsandbytes():
    """The library, loaded where it is needed and without its remarks. Raises ValueError where it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast")
    try:
        import bitsandbytes as library
    except ImportError as error:
        raise ValueError("bitsandbytes: 8 and 4 bits need it, and it is not here; pip install bitsandbytes.") from error
    return library


def count_weights(network: nn.Module) -> tuple[int, int]:
    """How many weights a model has, tied ones once, and the bytes that they take: of quantised ones, codes and scales."""
    n_weights = n_bytes = 0
    for weight in network.parameters():
        state = getattr(weight, "quant_state", None)
        n_weights += math.prod(state.shape) if state else weight.numel()
        scales = state.absmax.nbytes if state else 4 * len(weight) if weight.dtype == torch.int8 else 0
        n_bytes += weight.nbytes + scales
    return n_weights, n_bytes
