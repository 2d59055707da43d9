"""LoRA operations over the page pool, and truncation for sampling: CUDA kernels and, beside each, its torch reference."""
