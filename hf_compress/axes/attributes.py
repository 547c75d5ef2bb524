"""The closed vocabulary of module attributes that hold a width.

Surgery sets only attributes named here, and a checkpoint's record may name only these. An integer that a forward pass
reads from anywhere else counts as a constant, so the axis that it measures stays whole.
"""

SIZE_ATTRIBUTES: frozenset[str] = frozenset(
    """
    all_head_size attention_dim attention_heads attention_head_dim values_head_dim attention_head_size attention_hidden_size attn_dim channels d_head d_inner d_model
    dim dim_head dim_in dim_out dim_inner dims dw_channels emb_dim embed_dim embedding_dim embed_dims expanded_channels
    feature_dim features filters groups head_dim head_dims head_size heads hidden_channels hidden_dim hidden_features
    hidden_size hidden_size_output hidden_sizes in_channels in_dim in_features inner_dim inner_size intermediate_size
    internal_dim inner_channels key_dim key_channels kv_dim mid_channels n_head n_heads num_attention_heads num_channels
    num_features num_groups num_head num_heads num_key_value_heads normalized_shape out_channels out_dim
    out_dim_projection out_features planes qk_channels qk_dim qkv_dim query_dim rank size_per_head split_size
    split_sizes split_indices total_key_dim v_channels v_dim value_dim val_attn_dim val_dim width widths
    qk_channels_per_head v_channels_per_head nf
    split_indexes input_split splits channel_splits dim_conv3 dim_untouched pdim expand_chs num_1x1_c shape bias_shape
    conv_dim dim_head_qk dim_head_v dim_out_qk dim_out_v o_proj_inpdim
    num_classes_hidden output_dim proj_dim dim_qk dim_v hidden attn_head_size
    """.split()
)

HEAD_COUNT_ATTRIBUTES: frozenset[str] = frozenset(
    {
        "attention_heads",
        "heads",
        "n_head",
        "n_heads",
        "num_attention_heads",
        "num_head",
        "num_heads",
        "num_key_value_heads",
    }
)
"""Counts of attention heads: kept true for readers even where the forward pass infers the count from a shape."""
