"""Benchmarks reading and answering on one GPU, with random weights in the shape of Scout.

    python -m samples.benchmarks.benchmark_gpu --layers 8 --tokens 131072 524288 1048576 --keys device host

As many layers as fit, three in four of them RoPE layers. Reading is compared with the rate of a large matrix product on
the same GPU; decoding with the time that reading the weights, keys and values of a token takes at the measured
bandwidth; memory with the closed form that plans use. --memory caps what PyTorch may take of the GPU, --quantize holds
the experts as l4ctx ask does, --peer reads with transformers, too, at growing lengths until its memory is at an end.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from array import array
from typing import Any

import torch
from torch import nn

from cache.hybrid import HybridKVCache
from cache.layout import StoreLayout
from cache.residency import Residency, peak_bytes
from l4ctx.engine.prefill import as_batch, prefill
from l4ctx.formatting import human_bytes, parse_size
from l4ctx.planning.speed import fastest_attention
from model.config import TextConfig
from model.costs import activation_bytes, reading_operations
from model.moe import Expert, FusedExperts, SplitExperts
from model.quantization.choice import Quantization
from model.transformer import Transformer
from model.weights.quantizing import QuantizingScheme

SCOUT: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "attention_chunk_size": 8192,
    "max_position_embeddings": 10485760,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}
ANSWER_TOKENS, DECODED = 16384, 32  # room behind the prompt; tokens that are timed
DEVICE = "cuda"


def seconds(work: Any, repeats: int) -> float:
    """The median, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def matrix_rate() -> float:
    """Operations a second of a product of random bfloat16 matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b, 10)


def bandwidth() -> float:
    """Bytes a second that are read from the GPU's memory."""
    x = torch.randn(2**29, device=DEVICE)
    return x.nbytes / seconds(x.sum, 10)


def random_model(config: TextConfig, attention: str, quantization: Quantization | None) -> Transformer:
    """Layer by layer, so that no more than one layer is there in both forms."""
    with torch.device("meta"):
        model = Transformer(config, attention)
    model.to(torch.bfloat16).requires_grad_(False)
    for part in (model.model.embed_tokens, model.model.norm, model.lm_head, *model.model.layers):
        part.to_empty(device=DEVICE)
        for name, parameter in part.named_parameters():
            parameter.fill_(1) if "norm" in name or parameter.dim() == 1 else parameter.normal_(0, 0.02)
        if quantization is not None and hasattr(part, "feed_forward"):
            quantize(part.feed_forward, quantization)
    return model.eval()


def quantize(moe: Any, quantization: Quantization) -> None:
    """Routed and shared experts, as they are while a checkpoint is loaded."""

    def stored(weight: torch.Tensor, *, is_turned: bool = False) -> Any:
        scheme = QuantizingScheme(quantization, is_turned, weight.shape[-2 if is_turned else -1])
        return scheme.build({"weight": weight}, tuple(weight.shape))

    experts: FusedExperts = moe.experts
    pairs = list(zip(experts.gate_up_proj, experts.down_proj, strict=True))
    moe.experts = SplitExperts(
        [Expert(None, None, stored(gate_up, is_turned=True), stored(down, is_turned=True)) for gate_up, down in pairs]
    )
    for linear in (moe.shared_expert.gate_proj, moe.shared_expert.up_proj, moe.shared_expert.down_proj):
        weight = linear.weight
        linear._parameters.pop("weight")
        linear.weight = stored(weight)


def decode_bytes(model: Transformer, cache: HybridKVCache) -> int:
    """That one more token has to read: its experts' share of the weights, the output matrix, keys and values."""
    config = model.config
    read = model.lm_head.weight.nbytes
    for layer in model.model.layers:
        read += held(layer.self_attn) + held(layer.feed_forward.router) + held(layer.feed_forward.shared_expert)
        read += held(layer.feed_forward.experts) * config.num_experts_per_tok // config.num_local_experts
    window = cache.offset % config.attention_chunk_size
    seen = config.num_nope_layers * cache.offset + config.num_rope_layers * window
    return read + seen * cache.layout.token_bytes


def held(module: nn.Module) -> int:
    return sum(x.nbytes for part in (module.parameters(), module.buffers()) for x in part)


def measure(
    model: Transformer, ids: array[int], tokens: int, residency: Residency, chunk: int, rates: tuple[float, float]
) -> dict[str, Any]:
    config = model.config
    length = tokens + ANSWER_TOKENS
    layout = StoreLayout.of(config, length=length, dtype="bfloat16")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    cache = HybridKVCache(config, length=length, dtype=torch.bfloat16, device=DEVICE, residency=residency)
    began = time.perf_counter()
    cache.pin(length)
    pinning = time.perf_counter() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in prefill(model, cache, ids[:tokens], prefill_chunk_size=chunk):
        pass
    torch.cuda.synchronize()
    taken = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated()
    kept = peak_bytes(layout, tokens, chunk, residency)
    planned = model.weight_bytes + kept.rope_windows + kept.nope_device + activation_bytes(config, chunk, 2)
    operations = reading_operations(config, 0, tokens)
    rate = (operations.linear + operations.chunked_attention + operations.full_attention) / taken
    token = as_batch([7], torch.device(DEVICE))
    is_slow = residency.device_rows == 0
    step = seconds(lambda: model(token, cache, logits="last").argmax().item(), 3 if is_slow else DECODED)
    floor = decode_bytes(model, cache) / rates[1]
    return {
        "tokens": tokens,
        "keys": "host" if is_slow else "device",
        "pinning_seconds": round(pinning, 2),
        "seconds": round(taken, 2),
        "tokens_per_second": round(tokens / taken),
        "share_of_matrix_rate": round(rate / rates[0], 3),
        "peak": human_bytes(peak),
        "peak_over_plan": round(peak / planned, 3),
        "decode_ms": round(1e3 * step, 2),
        "decode_over_floor": round(step / floor, 2),
    }


def peer(config: dict[str, Any], ids: array[int], lengths: list[int], model: Transformer) -> None:
    """transformers with the same weights, whole prompts, no logits but the last, until it fails."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    asked = {name: value for name, value in config.items() if name != "model_type"}
    asked |= {"num_hidden_layers": model.config.num_hidden_layers, "pad_token_id": None, "dtype": torch.bfloat16}
    with torch.device("meta"):
        other = Llama4ForCausalLM(Llama4TextConfig(**asked, attn_implementation="sdpa"))
    ours = dict(model.named_parameters())
    for name, _ in list(other.named_parameters()):
        owner, _, own = name.rpartition(".")
        setattr(other.get_submodule(owner), own, nn.Parameter(ours[name], requires_grad=False))
    other.model.rotary_emb = type(other.model.rotary_emb)(other.config).to(DEVICE)
    for length in lengths:
        gc.collect()
        torch.cuda.empty_cache()
        batch = torch.tensor([list(ids[:length])], device=DEVICE)
        try:
            with torch.inference_mode():
                taken = seconds(lambda batch=batch: other(batch, logits_to_keep=1).logits, 1)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            print(json.dumps({"transformers": length, "failed": str(error).splitlines()[0][:160]}), flush=True)
            return
        print(json.dumps({"transformers": length, "tokens_per_second": round(length / taken)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--keys", nargs="+", choices=["device", "host"], default=["device"])
    parser.add_argument("--prefill-chunk-size", type=int, default=8192)
    parser.add_argument("--attention", help="default: the fastest, as l4ctx ask measures it")
    parser.add_argument("--memory", type=parse_size, help="of the GPU")
    parser.add_argument("--quantize", type=Quantization.parse)
    parser.add_argument("--peer", type=int, nargs="*", default=[], metavar="TOKENS")
    args = parser.parse_args()
    if args.memory:
        torch.cuda.set_per_process_memory_fraction(args.memory / torch.cuda.get_device_properties(0).total_memory)
    raw = SCOUT | {"num_hidden_layers": args.layers}
    config = TextConfig.from_dict(raw)
    rates = matrix_rate(), bandwidth()
    attention = args.attention or fastest_attention(config, "bfloat16", DEVICE)
    model = random_model(config, attention, args.quantize)
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "attention": attention}
    about |= {"matrix_tflops": round(rates[0] / 1e12), "gb_per_second": round(rates[1] / 1e9)}
    print(json.dumps(about | {"layers": args.layers, "weights": human_bytes(model.weight_bytes)}), flush=True)
    ids = array("i", torch.randint(0, 200000, (max([*args.tokens, *args.peer]),), dtype=torch.int32).tolist())
    everything = Residency(None, 10**6, on_accelerator=True)
    nothing = Residency(None, 0, on_accelerator=True)
    for _ in prefill(model, HybridKVCache(config, length=32768, dtype=torch.bfloat16, device=DEVICE), ids[:16384]):
        pass  # kernels are loaded, plans are made
    for tokens in args.tokens:
        for keys in args.keys:
            residency = everything if keys == "device" else nothing
            found = measure(model, ids, tokens, residency, args.prefill_chunk_size, rates)
            print(json.dumps(found), flush=True)
    if args.peer:
        peer(SCOUT, ids, args.peer, model)


if __name__ == "__main__":
    main()
