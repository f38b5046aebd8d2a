"""Loads a language model, its tokenizer and its config."""

from typing import Any

from deltakit.core import checked
from deltakit.openprompt.plms.lm import LMTokenizerWrapper
from deltakit.openprompt.plms.mlm import MLMTokenizerWrapper
from deltakit.openprompt.plms.seq2seq import T5LMTokenizerWrapper, T5TokenizerWrapper
from deltakit.openprompt.plms.utils import TokenizerWrapper

_WRAPPERS: dict[str, type[TokenizerWrapper]] = {
    **dict.fromkeys(["bert", "roberta", "albert", "electra"], MLMTokenizerWrapper),
    **dict.fromkeys(["gpt", "gpt2", "opt", "gptj"], LMTokenizerWrapper),
    "t5": T5TokenizerWrapper,
    "t5-lm": T5LMTokenizerWrapper,
}


@checked
def load_plm(
    model_name: str, model_path: str, specials_to_add: list[str] | None = None
) -> tuple[Any, Any, Any, type[TokenizerWrapper]]:
    """Returns a language model, its fast tokenizer, its config, and the class of its tokenizer wrapper.

    A model without a token for padding gets one, as in OpenPrompt.

    Args:
        model_name: "bert", "roberta", "albert", "electra", "gpt", "gpt2", "opt", "gptj", "t5" or "t5-lm". Of other names
            the config says what kind of model it is.
        model_path: its folder, or its name on the Hub.
        specials_to_add: the token for padding, if the tokenizer has none.
    """
    import transformers as tf

    config = tf.AutoConfig.from_pretrained(model_path)
    wrapper = _WRAPPERS.get(model_name.lower()) or _wrapper_of(config)
    auto = {
        "mlm": tf.AutoModelForMaskedLM,
        "causal": tf.AutoModelForCausalLM,
        "seq2seq": tf.AutoModelForSeq2SeqLM,
    }["seq2seq" if issubclass(wrapper, T5TokenizerWrapper) else wrapper.kind]
    model, tokenizer = auto.from_pretrained(model_path, config=config), tf.AutoTokenizer.from_pretrained(model_path)
    if tokenizer.pad_token is None and (specials_to_add or wrapper is LMTokenizerWrapper):
        tokenizer.add_special_tokens({"pad_token": (specials_to_add or ["<pad>"])[0]})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer, config, wrapper


def _wrapper_of(config: Any) -> type[TokenizerWrapper]:
    if getattr(config, "is_encoder_decoder", False):
        return T5TokenizerWrapper
    names = getattr(config, "architectures", None) or [""]
    return MLMTokenizerWrapper if names[0].endswith("MaskedLM") else LMTokenizerWrapper
