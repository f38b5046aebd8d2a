"""The names of PEFT's files, and of the tensors in them."""

from deltakit.files.formats.adapter_config import CONFIG

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
FILES = (CONFIG, TENSORS, PICKLE)

PREFIX, PREFIX_OF_PROMPTS = "base_model.model.", "base_model."
LORA_BIAS = {".lora_B.bias": "bias"}
ADAPTION = {".adaption_prompt": "prompt", ".adaption_gate": "gate"}
ADALORA = {".lora_A": "A", ".lora_B": "B", ".lora_E": "E"}
TOKENS = {".trainable_tokens_delta": "rows"}
TOKENS_OF_LORA = {".token_adapter.trainable_tokens_delta": "rows"}
"""Each: what stands behind the path of the module, and the name of the tensor in deltakit."""

PROMPT = "prompt_embeddings"
"""The only tensor of prompts and prefixes, except for prompts of several tasks."""
TASKS = {"prefix_task_cols": "columns", "prefix_task_rows": "rows"}
"""Those that they have beside it: the name in the file, and the name in deltakit."""

KNOWN = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "beta1",
    "beta2", "bias", "corda_config", "deltaT", "encoder_dropout", "encoder_hidden_size", "encoder_num_layers",
    "encoder_reparameterization_type", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "init_r", "init_weights",
    "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "monteclora_config", "num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens",
    "orth_reg_weight", "peft_type", "peft_version", "prefix_projection", "prompt_tuning_init",
    "prompt_tuning_init_text", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "target_parameters", "target_r", "task_type", "tfinal", "tinit", "token_dim", "token_indices",
    "tokenizer_kwargs", "tokenizer_name_or_path", "total_step", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "use_rslora", "velora_config",
})  # fmt: skip
"""The options of the kinds that are read, as of PEFT 0.21.2. Whether a later one changes the outputs is not known."""
