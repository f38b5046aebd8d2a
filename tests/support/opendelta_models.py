"""The models on which OpenDelta's own counts were measured."""

import transformers as tf

SIZES = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "max_position_embeddings": 32
}
BERT = {**SIZES, "intermediate_size": 128}
GPT2 = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
BART = {"vocab_size": 100, "d_model": 64, "max_position_embeddings": 32} | {
    f"{stack}_{name}": value
    for stack in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
}
MODELS = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT)),
    "roberta": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(**{**BERT, "max_position_embeddings": 34, "type_vocab_size": 1})
    ),
    "deberta-v2": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
}
"""Makes each of them, by its type."""
