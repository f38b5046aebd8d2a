"""Makes the files of `tests/checkpoints/adapterhub`: tiny backbones, adapters of each kind, and the outputs with them.

    pip install adapters==1.2.0 torch && python benchmarks/adapterhub_files.py

The tests read the files and need no `adapters`.
"""

import json
import sys
from pathlib import Path

import adapters
import torch
import transformers as tf
from adapters.models.llama import modeling_llama
from safetensors.torch import save_file

HERE = Path(__file__).parents[1] / "tests" / "checkpoints" / "adapterhub"
SIZES = {
    "vocab_size": 37,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 16,
}
BACKBONES = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)),
    # With SDPA and no mask the library's causal mask hides the last tokens instead of none of the prefix's.
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=3, attn_implementation="eager")),
}
SMALL = {"reduction_factor": 4}
COMPACT = {"reduction_factor": 3, "phm_init_range": 0.5, "phm_dim": 4}
CASES = {
    "seq_bn": adapters.SeqBnConfig(**SMALL),
    "double_seq_bn": adapters.DoubleSeqBnConfig(**SMALL, scaling=2.0),
    "layers": adapters.DoubleSeqBnConfig(
        reduction_factor={"0": 3, "default": 6}, non_linearity="gelu", leave_out=[1], scaling="channel"
    ),
    "par_bn": adapters.ParBnConfig(**SMALL),
    "par_bn_learned": adapters.ParBnConfig(**SMALL, mh_adapter=True, scaling="learned", non_linearity="leakyrelu"),
    "plus": adapters.AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
    "compacter": adapters.CompacterConfig(**COMPACT, scaling=2.0),
    "compacterpp": adapters.CompacterPlusPlusConfig(
        **COMPACT, shared_phm_rule=False, factorized_phm_rule=True, factorized_phm_W=False, phm_bias=False
    ),
    "lora": adapters.LoRAConfig(r=2, alpha=5, intermediate_lora=True),
    "ia3": adapters.IA3Config(),
    "prefix": adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
    "prefix_flat": adapters.PrefixTuningConfig(prefix_length=3, flat=True, leave_out=[0]),
    "loreft": adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1, dropout=0.0),
    "loreft_tied": adapters.LoReftConfig(r=3, suffix_positions=2, tied_weights=True, layers=[1], dropout=0.0),
    "noreft": adapters.NoReftConfig(r=2, suffix_positions=1, dropout=0.0),
    "gated": adapters.DoubleSeqBnConfig(**SMALL, use_gating=True),
    "par_bn_gated": adapters.ParBnConfig(**SMALL, use_gating=True),
    "compacter_gated": adapters.CompacterConfig(**COMPACT, use_gating=True),
    "lora_gated": adapters.LoRAConfig(r=2, alpha=5, intermediate_lora=True, use_gating=True),
    "prefix_gated": adapters.PrefixTuningConfig(prefix_length=3, flat=True, leave_out=[0], use_gating=True),
    "unipelt": adapters.UniPELTConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
        adapters.SeqBnConfig(**SMALL),
        adapters.LoRAConfig(r=2, alpha=2),
    ),
    "mam": adapters.MAMConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5), adapters.ParBnConfig(**SMALL)
    ),
    # The LoRAs are on the layers whose output the bottlenecks read, and come last.
    "union": adapters.ConfigUnion(
        adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1, dropout=0.0),
        adapters.DoubleSeqBnConfig(**SMALL),
        adapters.LoRAConfig(r=2, alpha=5, output_lora=True),
    ),
    "inv": adapters.SeqBnInvConfig(**SMALL, inv_adapter_reduction_factor=3),
}


PICKLED = ("seq_bn", "prefix", "prefix_flat", "prefix_gated", "unipelt", "mam")
"""Prefixes cannot be saved as safetensors: two of their tensors are one."""


def ids():
    return torch.randint(3, 37, (2, 7), generator=torch.Generator().manual_seed(4))


def mask():
    return torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])


def outputs(model, **given):
    return model.base_model(ids(), **given).last_hidden_state


def logits(kind, config, own, folder, generator):
    """The tensors of the library's own language-model head, which applies the inverse, and its logits.

    In release 1.2.0 transformers' own heads leave the inverse out.
    """
    torch.manual_seed(2)
    model = adapters.AutoAdapterModel.from_config(config).eval()
    model.load_state_dict(own, strict=False)
    if kind == "bert":
        model.add_masked_lm_head("lm")
    else:
        model.add_causal_lm_head("lm", layers=1)
    for parameter in model.heads.parameters():
        # BERT's is also the embedding.
        if parameter is not model.get_input_embeddings().weight:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    model.load_adapter(str(folder), use_safetensors=True)
    model.set_active_adapters("task")
    model.active_head = "lm"
    head = {f"head.{key}": value.clone() for key, value in model.heads["lm"].state_dict().items()}
    return {**head, "logits": model.double()(ids()).logits}


def patch_llama():
    """Release 1.2.0 transposes the output of Llama's attention twice, which changes the backbone; its repository does not."""
    whole = Path(modeling_llama.__file__).read_text("utf-8")
    line = "        attn_output = attn_output.transpose(1, 2).contiguous()\n"
    assert whole.count(line) == 1
    exec(compile(whole.replace(line, ""), modeling_llama.__file__, "exec"), modeling_llama.__dict__)


@torch.no_grad()
def main():
    patch_llama()
    for kind, build in BACKBONES.items():
        torch.manual_seed(0)
        plain = build().eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in plain.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        folder = HERE / kind
        folder.mkdir(exist_ok=True)
        state = {key: value.clone() for key, value in plain.state_dict().items()}
        own = {key: value for key, value in state.items() if not key.startswith(("classifier", "lm_head"))}
        save_file(own, folder / "backbone.safetensors")
        (folder / "config.json").write_text(json.dumps(plain.config.to_diff_dict(), indent=1) + "\n")
        expected = {"plain": outputs(plain.double())}
        for case, config in CASES.items():
            torch.manual_seed(2)
            model = build().eval()
            model.load_state_dict(state)
            adapters.init(model)
            same = outputs(model.double())
            torch.testing.assert_close(same, expected["plain"])
            model.float().add_adapter("task", config)
            for name, parameter in model.named_parameters():
                # The diagonal of an orthogonal parametrization has signs, which torch rounds towards zero.
                if ".task." in name and not name.endswith(".original"):
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            model.set_active_adapters("task")
            model.save_adapter(str(folder / case), "task", with_head=False, use_safetensors=case not in PICKLED)
            expected[case] = outputs(model.double().eval())
            difference = (expected[case] - expected["plain"]).abs().max()
            if case == "unipelt":
                # Its gates count padding, too.
                expected["unipelt_padded"] = outputs(model, attention_mask=mask())
            print(kind, case, float(difference), file=sys.stderr)
            assert difference > 1e-4
        expected |= logits(kind, plain.config, own, folder / "inv", generator)
        save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
