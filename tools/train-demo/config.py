"""Sizes of the demo model, as the configs of the release that export.py writes."""

PIXELS = 256  # of the high-resolution view, `image_size_aux`
DRAWN_PIXELS = 96

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's preprocessor
STD = (0.26862954, 0.26130258, 0.27577711)

VISION = {
    'hidden_size': 192,
    'intermediate_size': 768,
    'num_hidden_layers': 5,
    'num_attention_heads': 3,
    'image_size': 112,
    'patch_size': 14,
    'hidden_act': 'quick_gelu',
    'layer_norm_eps': 1e-5,
}
# At 256 px the grid of patches has 8 a side and the first map 64, so a token mines 8 x 8 positions.
CONVNEXT = {'dims': [48, 96, 160, 256], 'depths': [2, 2, 6, 2]}

DECODER = {
    'hidden_size': 256,
    'intermediate_size': 768,
    'num_hidden_layers': 6,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 64,
    'hidden_act': 'gelu_pytorch_tanh',
    'rms_norm_eps': 1e-6,
    'rope_theta': 10000.0,
    'max_position_embeddings': 2048,
}

TEXT = {
    'hidden_size': 128,
    'intermediate_size': 512,
    'num_hidden_layers': 3,
    'num_attention_heads': 2,
    'max_position_embeddings': 77,
    'layer_norm_eps': 1e-5,
    'projection_dim': 128,
}
TEXT_ACTS = ('quick_gelu', 'gelu')  # of the first and the second text encoder

VAE = {
    'in_channels': 3,
    'out_channels': 3,
    'latent_channels': 4,
    'block_out_channels': [32, 64, 64],
    'layers_per_block': 1,
    'norm_num_groups': 16,
}
VAE_SCALE = 2 ** (len(VAE['block_out_channels']) - 1)  # pixels a latent position stands for, on a side

UNET = {
    'in_channels': 4,
    'out_channels': 4,
    'block_out_channels': [64, 128, 160],
    'down_block_types': ['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
    'up_block_types': ['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
    'layers_per_block': 1,
    'transformer_layers_per_block': [1, 1, 1],
    'attention_head_dim': [2, 4, 5],  # heads, as SDXL's config means it
    'cross_attention_dim': 2 * TEXT['hidden_size'],
    'norm_num_groups': 32,
    'norm_eps': 1e-5,
    'addition_time_embed_dim': 32,
    'projection_class_embeddings_input_dim': TEXT['projection_dim'] + 6 * 32,
    'sample_size': DRAWN_PIXELS // VAE_SCALE,
}

# SDXL's betas end at 0.012, where 7 % of the latent is still the picture. On 24 x 24 positions that tells of the mean
# colour more than the noise hides, so that drawings begun from pure noise would all be of a middling grey.
SCHEDULER = {'num_train_timesteps': 1000, 'beta_start': 0.00085, 'beta_end': 0.02, 'beta_schedule': 'scaled_linear'}
