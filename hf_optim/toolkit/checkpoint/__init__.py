"""Headers of safetensors files, and models on the meta device."""
