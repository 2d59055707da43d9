"""LoRA operations over the page pool: CUDA kernels and, beside each, its torch reference."""
