"""Small models of transformers with random weights large enough to tell a wrong answer from a right one."""

import torch
import transformers

COMMON = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
GATED = {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 0, "v_head_dim": 16, "q_lora_rank": None}


def _qwen3_next():
    config = transformers.Qwen3NextConfig(**COMMON, **HEADS, **HYBRID, **GATED, mlp_only_layers=[0, 1], num_experts=0)
    return transformers.Qwen3NextForCausalLM(config)


def _qwen3_5():
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**COMMON, **HEADS, **HYBRID, **GATED))


def _olmo_hybrid():
    return transformers.OlmoHybridForCausalLM(transformers.OlmoHybridConfig(**COMMON, **HEADS, **HYBRID, **GATED))


def _kimi_linear():
    config = transformers.KimiLinearConfig(
        **COMMON, **{**HEADS, "num_key_value_heads": 4}, **HYBRID, **LATENT, linear_num_heads=4, linear_head_dim=16,
        first_k_dense_replace=2, num_experts=1, moe_intermediate_size=32, num_experts_per_token=1,
    )  # fmt: skip
    return transformers.KimiLinearForCausalLM(config)


def _bailing_hybrid():
    config = transformers.BailingHybridConfig(
        **COMMON, **{**HEADS, "num_key_value_heads": 4}, **HYBRID, **{**LATENT, "qk_rope_head_dim": 8}, linear_num_heads=4,
        linear_head_dim=16, first_k_dense_replace=2, num_experts=2, moe_intermediate_size=32, num_experts_per_tok=1, n_group=1,
        topk_group=1,
    )  # fmt: skip
    return transformers.BailingHybridForCausalLM(config)


def _zamba2():
    config = transformers.Zamba2Config(
        **COMMON, num_attention_heads=4, intermediate_size=96, layers_block_type=["mamba", "hybrid"], n_mamba_heads=8, mamba_headdim=16,
        mamba_d_state=16, mamba_ngroups=1, chunk_size=16, num_mem_blocks=1,
    )  # fmt: skip
    return transformers.Zamba2ForCausalLM(config)


def _mamba2():
    return transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**COMMON, num_heads=8, head_dim=16, state_size=16, n_groups=2, expand=2, chunk_size=16)
    )


def _bamba():
    config = transformers.BambaConfig(
        **COMMON, **HEADS, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16
    )
    return transformers.BambaForCausalLM(config)


def _falcon_h1():
    config = transformers.FalconH1Config(
        **COMMON, **HEADS, mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16
    )
    return transformers.FalconH1ForCausalLM(config)


def _granite():
    config = transformers.GraniteMoeHybridConfig(
        **COMMON, **HEADS, layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
        mamba_chunk_size=16, num_local_experts=0, shared_intermediate_size=96,
    )  # fmt: skip
    return transformers.GraniteMoeHybridForCausalLM(config)


def _nemotron_h():
    config = transformers.NemotronHConfig(
        **COMMON, **HEADS, layers_block_type=["mamba", "attention"], mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=1,
        chunk_size=16,
    )  # fmt: skip
    return transformers.NemotronHForCausalLM(config)


def _xlstm():
    config = transformers.xLSTMConfig(
        **{**COMMON, "hidden_size": 128}, num_heads=4, chunk_size=16, qk_dim_factor=0.5, mode="inference", return_last_states=True
    )
    return transformers.xLSTMForCausalLM(config)


def _minimax():
    config = transformers.MiniMaxConfig(
        **COMMON, **HEADS, layer_types=["linear_attention", "full_attention"], block_size=16, num_local_experts=2, num_experts_per_tok=1
    )
    return transformers.MiniMaxForCausalLM(config)


BUILDERS = (
    _qwen3_next, _qwen3_5, _olmo_hybrid, _kimi_linear, _mamba2, _bamba, _falcon_h1, _granite, _nemotron_h, _xlstm, _minimax,
)  # fmt: skip
OLD = not hasattr(transformers, "KimiLinearConfig")  # before transformers 5.15, whose Nemotron-H went wrong after its first chunk
FAMILIES = {f.__name__[1:]: f for f in BUILDERS if not (OLD and f in (_kimi_linear, _nemotron_h))}
OTHERS = {f.__name__[1:]: f for f in (_bailing_hybrid, _zamba2)}


def build(family, seed=0):
    torch.manual_seed(seed)
    model = (FAMILIES | OTHERS)[family]().eval()
    for p in model.parameters():
        if p.ndim >= 2:
            torch.nn.init.normal_(p, std=0.15)
    return model
