"""The names of PEFT's files, and of the tensors in them."""

from deltakit.files.formats.adapter_config import CONFIG

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
FILES = (CONFIG, TENSORS, PICKLE)

PREFIX, PREFIX_OF_PROMPTS = "base_model.model.", "base_model."
LORA = {".lora_A.weight": "A", ".lora_B.weight": "B"}
LORA_OF_EMBEDDINGS = {".lora_embedding_A": "A", ".lora_embedding_B": "B"}
LORA_MAGNITUDES = {".lora_magnitude_vector": "m"}
LORA_BIAS = {".lora_B.bias": "bias"}
IA3 = {".ia3_l": "scale"}
ADALORA = {".lora_A": "A", ".lora_B": "B", ".lora_E": "E"}
TOKENS = {".trainable_tokens_delta": "rows"}
TOKENS_OF_LORA = {".token_adapter.trainable_tokens_delta": "rows"}
"""Each: what stands behind the path of the module, and the name of the tensor in deltakit."""

PROMPT = "prompt_embeddings"
"""The only tensor of prompts and prefixes."""
