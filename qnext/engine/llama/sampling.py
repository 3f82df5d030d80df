"""How the next token is chosen: llama.cpp's samplers in llama.cpp's order."""

from __future__ import annotations

from typing import Any

from qnext.engine.llama.binding import llama


def sampler_chain(sampling: dict[str, float]) -> Any:
    """Sampler chain in llama.cpp's order; temperature 0 is greedy."""
    lib = llama()
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    add = lib.llama_sampler_chain_add
    temperature = float(sampling.get("temperature", 0.0))
    if temperature <= 0:
        add(chain, lib.llama_sampler_init_greedy())
        return chain
    add(chain, lib.llama_sampler_init_top_k(int(sampling.get("top_k", 40))))
    add(chain, lib.llama_sampler_init_top_p(float(sampling.get("top_p", 0.95)), 1))
    add(chain, lib.llama_sampler_init_min_p(float(sampling.get("min_p", 0.0)), 1))
    add(chain, lib.llama_sampler_init_temp(temperature))
    add(chain, lib.llama_sampler_init_dist(int(sampling.get("seed", 0xFFFFFFFF))))
    return chain
