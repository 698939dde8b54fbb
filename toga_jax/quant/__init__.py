"""Numbers of few bits: quantizers, packing, GPTQ."""
